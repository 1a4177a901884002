//! What a datagram is, by its first bytes alone (the paper, §5.4).

/// Bytes in front of a sealed packet: type, receiver, counter.
pub const DATA_HEADER_LEN: usize = 16;

/// Bytes of an authentication tag.
pub const TAG_LEN: usize = 16;

/// Bytes that sealing adds, padding apart.
pub const OVERHEAD: usize = DATA_HEADER_LEN + TAG_LEN;

/// Bytes of an initiation.
pub const INITIATION_LEN: usize = 148;

/// Bytes of a response.
pub const RESPONSE_LEN: usize = 92;

/// Bytes of a cookie reply.
pub const COOKIE_REPLY_LEN: usize = 64;

pub(crate) const TYPE_INITIATION: u8 = 1;
pub(crate) const TYPE_RESPONSE: u8 = 2;
pub(crate) const TYPE_COOKIE_REPLY: u8 = 3;
pub(crate) const TYPE_DATA: u8 = 4;

/// A datagram's type, and the receiver's session number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Somebody begins a handshake.
    Initiation,
    /// The answer to our initiation.
    Response {
        /// As in our initiation.
        receiver: u32,
    },
    /// A cookie for our next handshake message.
    CookieReply {
        /// As in our message.
        receiver: u32,
    },
    /// A sealed packet, or a keepalive.
    Data {
        /// Our session.
        receiver: u32,
    },
}

impl Kind {
    /// Reads type and receiver; `None` unless the length fits the type and the reserved bytes are
    /// zero.
    #[must_use]
    pub fn of(datagram: &[u8]) -> Option<Self> {
        let (&[kind, 0, 0, 0], rest) = datagram.split_first_chunk::<4>()? else {
            return None;
        };
        let number = |at: usize| {
            let bytes = rest.get(at..)?.first_chunk::<4>()?;
            Some(u32::from_le_bytes(*bytes))
        };
        match (kind, datagram.len()) {
            (TYPE_INITIATION, INITIATION_LEN) => Some(Self::Initiation),
            (TYPE_RESPONSE, RESPONSE_LEN) => Some(Self::Response {
                receiver: number(4)?,
            }),
            (TYPE_COOKIE_REPLY, COOKIE_REPLY_LEN) => Some(Self::CookieReply {
                receiver: number(0)?,
            }),
            (TYPE_DATA, OVERHEAD..) => Some(Self::Data {
                receiver: number(0)?,
            }),
            _ => None,
        }
    }
}

pub(crate) fn header(kind: u8) -> [u8; 4] {
    [kind, 0, 0, 0]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_right_lengths_and_zero_reserved_bytes_pass() {
        let datagram = |kind: u8, len: usize| {
            let mut bytes = vec![0; len];
            bytes[0] = kind;
            bytes[4..8].copy_from_slice(&7_u32.to_le_bytes());
            bytes
        };
        assert_eq!(Kind::of(&datagram(1, 148)), Some(Kind::Initiation));
        assert_eq!(Kind::of(&datagram(1, 149)), None);
        assert_eq!(Kind::of(&datagram(2, 91)), None);
        let receiver = 7;
        assert_eq!(
            Kind::of(&datagram(3, 64)),
            Some(Kind::CookieReply { receiver })
        );
        assert_eq!(Kind::of(&datagram(4, 32)), Some(Kind::Data { receiver }));
        assert_eq!(Kind::of(&datagram(4, 31)), None);
        assert_eq!(Kind::of(&datagram(5, 32)), None);
        let mut reserved = datagram(4, 32);
        reserved[2] = 1;
        assert_eq!(Kind::of(&reserved), None);
        assert_eq!(Kind::of(&[]), None);
    }
}
