//! The raw UDP framing: frames as plain datagrams between a node's WireGuard port and the relay's
//! QUIC port.
//!
//! Data frames are as on every link. What else there is begins with the same eight bytes, of which
//! only the type says something:
//!
//! ```text
//!         node                                             relay
//!          | -- AskBindKey, by the QUIC link -------------> |
//!          | <-- BindKey: id, key ------------------------- |
//!  0x22    | -- Bind: id, sequence, nothing --------------> |  not longer than what it answers:
//!  0x23    | <-- Cookie: sequence, cookie ----------------- |  a keyed hash of address and bind
//!  0x22    | -- Bind: id, sequence, cookie, proof, padding > |
//!  0x24    | <-- Bound: sequence, proof, padding ---------- |  now this address is this link's
//!  0x20    | <== data ====================================> |
//!  0x25/26 | -- Ping ------------> <------------------ Pong |
//!  0x27    | <-- Unbound: what came, in part -------------- |  after a rebinding NAT, a restart
//! ```
//!
//! The cookie shows that the node receives at its address, the proof that it is the node of the
//! link. Both large messages are padded to a full-size frame: a path that loses those is never
//! bound. Neither key nor node id travels in the clear.

use std::fmt;

use ring::hmac;

use super::{BadFrame, FRAME_LEN_MAX, HEADER_LEN, Session, TYPE_DATA, data_header, header};

const TYPE_BIND: u8 = 0x22;
const TYPE_COOKIE: u8 = 0x23;
const TYPE_BOUND: u8 = 0x24;
const TYPE_PING: u8 = 0x25;
const TYPE_PONG: u8 = 0x26;
const TYPE_UNBOUND: u8 = 0x27;

/// Length of an HMAC-SHA256.
const TAG_LEN: usize = 32;

/// A keyed hash.
pub type Tag = [u8; TAG_LEN];

/// Shortest `Bind`: header, id, sequence, cookie, proof.
pub const BIND_LEN_MIN: usize = HEADER_LEN + 8 + 8 + 2 * TAG_LEN;

/// Length of a ping, and of every other frame that has nothing but eight bytes to say.
const SHORT_LEN: usize = HEADER_LEN + 8;

/// One datagram of the UDP framing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UdpFrame {
    /// A packet for, or from, the other node of the session: everything behind the header.
    Data(Session),
    /// Node: this address is mine.
    Bind(Bind),
    /// Relay: show that you receive this.
    Cookie {
        /// From the question.
        sequence: u64,
        /// To be sent back.
        cookie: Tag,
    },
    /// Relay: your frames come to this address from now on.
    Bound(Bound),
    /// Node: are you there, and do you know me?
    Ping {
        /// Copied into the answer.
        txid: u64,
    },
    /// Answers `Ping`.
    Pong {
        /// From the question.
        txid: u64,
    },
    /// Relay: nobody is bound to the address that this came from.
    Unbound {
        /// As in the data that came.
        session: Session,
        /// The eight bytes behind the header of what came: of a ping, its `txid`.
        echo: u64,
    },
}

/// A node asks for its address to be bound.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bind {
    /// Which key: [`BindKey::id`].
    pub id: u64,
    /// Counted up with every attempt, so that an old one is worth nothing.
    pub sequence: u64,
    /// From the relay; zeros at first.
    pub cookie: Tag,
    proof: Tag,
    len: usize,
}

/// A relay says that it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bound {
    /// From the question.
    pub sequence: u64,
    proof: Tag,
    len: usize,
}

/// What proves that a datagram comes from the node of a link. Given out by the relay over the link
/// itself; lives as long as that.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct BindKey {
    /// Says which key, to the relay.
    pub id: u64,
    /// The secret.
    pub key: Tag,
}

impl fmt::Debug for BindKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BindKey")
            .field("id", &self.id)
            .finish_non_exhaustive()
    }
}

impl UdpFrame {
    /// Reads one datagram. Padding and flags are ignored.
    ///
    /// # Errors
    ///
    /// [`BadFrame`]: count it and drop it.
    pub fn decode(bytes: &[u8]) -> Result<Self, BadFrame> {
        let len = bytes.len();
        if len > FRAME_LEN_MAX {
            return Err(BadFrame::TooLong(len));
        }
        let truncated = BadFrame::Truncated(len);
        let (kind, session) = header(bytes)?;
        let mut rest = Rest(bytes.get(HEADER_LEN..).unwrap_or_default());
        let frame = match kind {
            TYPE_DATA => Some(Self::Data(session)),
            TYPE_BIND => rest.bind(len).map(Self::Bind),
            TYPE_COOKIE => rest.number().zip(rest.tag()).map(cookie),
            TYPE_BOUND => rest.number().zip(rest.tag()).map(|it| bound(it, len)),
            TYPE_PING => rest.number().map(|txid| Self::Ping { txid }),
            TYPE_PONG => rest.number().map(|txid| Self::Pong { txid }),
            TYPE_UNBOUND => rest.number().map(|echo| Self::Unbound { session, echo }),
            unknown => return Err(BadFrame::UnknownType(unknown)),
        };
        frame.ok_or(truncated)
    }
}

fn cookie((sequence, cookie): (u64, Tag)) -> UdpFrame {
    UdpFrame::Cookie { sequence, cookie }
}

fn bound((sequence, proof): (u64, Tag), len: usize) -> UdpFrame {
    UdpFrame::Bound(Bound {
        sequence,
        proof,
        len,
    })
}

/// What is still to be read of a datagram.
struct Rest<'a>(&'a [u8]);

impl Rest<'_> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (taken, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*taken)
    }

    fn number(&mut self) -> Option<u64> {
        self.take().map(u64::from_be_bytes)
    }

    fn tag(&mut self) -> Option<Tag> {
        self.take()
    }

    fn bind(&mut self, len: usize) -> Option<Bind> {
        Some(Bind {
            id: self.number()?,
            sequence: self.number()?,
            cookie: self.tag()?,
            proof: self.tag()?,
            len,
        })
    }
}

impl BindKey {
    /// A request that only asks for a cookie.
    #[must_use]
    pub fn ask_for_cookie(&self, sequence: u64) -> Vec<u8> {
        self.bind_frame(sequence, [0; TAG_LEN], [0; TAG_LEN])
    }

    /// A request with the relay's cookie, padded to `len` bytes.
    #[must_use]
    pub fn bind(&self, sequence: u64, cookie: Tag, len: usize) -> Vec<u8> {
        let len = len.clamp(BIND_LEN_MIN, FRAME_LEN_MAX);
        let proof = self.proof(TYPE_BIND, sequence, &cookie, len);
        let mut frame = self.bind_frame(sequence, cookie, proof);
        frame.resize(len, 0);
        frame
    }

    fn bind_frame(&self, sequence: u64, cookie: Tag, proof: Tag) -> Vec<u8> {
        let numbers = [self.id.to_be_bytes(), sequence.to_be_bytes()].concat();
        frame(TYPE_BIND, &[&numbers, &cookie, &proof])
    }

    /// Whether a request was made with this key.
    #[must_use]
    pub fn proves(&self, bind: &Bind) -> bool {
        let message = message(TYPE_BIND, bind.sequence, &bind.cookie, bind.len);
        hmac::verify(&self.hmac(), &message, &bind.proof).is_ok()
    }

    /// The relay's answer, as long as the request.
    #[must_use]
    pub fn bound(&self, bind: &Bind) -> Vec<u8> {
        let proof = self.proof(TYPE_BOUND, bind.sequence, &[], bind.len);
        let mut frame = frame(TYPE_BOUND, &[&bind.sequence.to_be_bytes(), &proof]);
        frame.resize(bind.len, 0);
        frame
    }

    /// Whether an answer was made with this key.
    #[must_use]
    pub fn confirms(&self, bound: &Bound) -> bool {
        let message = message(TYPE_BOUND, bound.sequence, &[], bound.len);
        hmac::verify(&self.hmac(), &message, &bound.proof).is_ok()
    }

    fn proof(&self, kind: u8, sequence: u64, cookie: &[u8], len: usize) -> Tag {
        tag(&self.hmac(), &message(kind, sequence, cookie, len))
    }

    fn hmac(&self) -> hmac::Key {
        hmac::Key::new(hmac::HMAC_SHA256, &self.key)
    }
}

/// The hash of `message` with `key`, an HMAC-SHA256.
#[must_use]
pub fn tag(key: &hmac::Key, message: &[u8]) -> Tag {
    let tag = hmac::sign(key, message);
    tag.as_ref().first_chunk().copied().unwrap_or_default()
}

fn message(kind: u8, sequence: u64, cookie: &[u8], len: usize) -> Vec<u8> {
    let len = u16::try_from(len).unwrap_or(u16::MAX); // FRAME_LEN_MAX
    [
        &[kind][..],
        &sequence.to_be_bytes(),
        &len.to_be_bytes(),
        cookie,
    ]
    .concat()
}

fn frame(kind: u8, parts: &[&[u8]]) -> Vec<u8> {
    [&[kind, 0, 0, 0, 0, 0, 0, 0], parts.concat().as_slice()].concat()
}

/// A cookie: shorter than any `Bind`.
#[must_use]
pub fn cookie_frame(sequence: u64, cookie: &Tag) -> Vec<u8> {
    frame(TYPE_COOKIE, &[&sequence.to_be_bytes(), cookie])
}

const _: () = assert!(SHORT_LEN + TAG_LEN <= BIND_LEN_MIN);

/// A ping of so many bytes, or as short as there are.
#[must_use]
pub fn ping_frame(txid: u64, len: usize) -> Vec<u8> {
    padded(frame(TYPE_PING, &[&txid.to_be_bytes()]), len)
}

/// Its answer: `len` is the ping's own.
#[must_use]
pub fn pong_frame(txid: u64, len: usize) -> Vec<u8> {
    padded(frame(TYPE_PONG, &[&txid.to_be_bytes()]), len)
}

fn padded(mut frame: Vec<u8>, len: usize) -> Vec<u8> {
    frame.resize(len.clamp(frame.len(), FRAME_LEN_MAX), 0);
    frame
}

/// Says that nobody is bound to the address from which `came` did. `None`: that is shorter than
/// the answer.
#[must_use]
pub fn unbound_frame(came: &[u8]) -> Option<[u8; SHORT_LEN]> {
    let mut frame: [u8; SHORT_LEN] = *came.first_chunk()?;
    let [kind, ..] = &mut frame;
    *kind = TYPE_UNBOUND;
    Some(frame)
}

/// Whether a datagram of a port that QUIC and STUN share belongs to this framing.
#[must_use]
pub fn looks_like_frame(datagram: &[u8]) -> bool {
    matches!(datagram.first(), Some(0x20..=0x3f))
}

/// The session of a data frame; quicker than [`UdpFrame::decode`], for one datagram after another.
#[must_use]
pub fn data_session(datagram: &[u8]) -> Option<Session> {
    match header(datagram) {
        Ok((TYPE_DATA, session)) => Some(session),
        Ok(_) | Err(_) => None,
    }
}

/// How many datagrams of `segment_len` bytes at the start of `datagrams` are data frames of
/// `session`.
#[must_use]
pub fn run_len(datagrams: &[u8], segment_len: usize, session: Session) -> usize {
    let header = data_header(session);
    let [kind, _, rest @ ..] = header;
    let same = |datagram: &&[u8]| match datagram.first_chunk::<HEADER_LEN>() {
        Some([first, _flags, others @ ..]) => *first == kind && *others == rest,
        None => false,
    };
    let each = datagrams.chunks(segment_len.max(1));
    each.take_while(same).count()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{super::data_frame, *};

    const KEY: BindKey = BindKey {
        id: 7,
        key: [3; 32],
    };
    const COOKIE: Tag = [9; 32];

    fn bind(bytes: &[u8]) -> Bind {
        match UdpFrame::decode(bytes) {
            Ok(UdpFrame::Bind(bind)) => bind,
            other => panic!("{other:?}"),
        }
    }

    proptest! {
        #[test]
        fn short_frames_survive_the_wire(number: u64, len in 0..=FRAME_LEN_MAX, cookie: [u8; 32], session: (u32, u16)) {
            let session = Session { number: session.0, epoch: session.1 };
            let decode = |bytes: &[u8]| UdpFrame::decode(bytes).unwrap();
            let txid = number;
            prop_assert_eq!(decode(&ping_frame(txid, len)), UdpFrame::Ping { txid });
            prop_assert_eq!(decode(&pong_frame(txid, len)), UdpFrame::Pong { txid });
            let sequence = number;
            prop_assert_eq!(decode(&cookie_frame(sequence, &cookie)), UdpFrame::Cookie { sequence, cookie });
            let data = data_frame(session, &number.to_be_bytes());
            prop_assert_eq!(decode(&data), UdpFrame::Data(session));
            prop_assert_eq!(data_session(&data), Some(session));
            let unbound = unbound_frame(&data).unwrap();
            prop_assert_eq!(decode(&unbound), UdpFrame::Unbound { session, echo: number });
        }

        #[test]
        fn no_bytes_make_decode_panic(mut bytes: Vec<u8>, kind in 0x1f..0x29_u8) {
            UdpFrame::decode(&bytes).ok();
            if let Some(first) = bytes.first_mut() {
                *first = kind;
            }
            UdpFrame::decode(&bytes).ok();
            prop_assert!(unbound_frame(&bytes).is_none_or(|answer| answer.len() <= bytes.len()));
            let session = Session { number: 0, epoch: 0 };
            prop_assert!(run_len(&bytes, bytes.len() / 3, session) <= bytes.len());
        }

        #[test]
        fn a_proof_holds_for_the_whole_request_only(index in 8..BIND_LEN_MIN, bit in 0..8_u32) {
            let mut bytes = KEY.bind(5, COOKIE, 1320);
            prop_assert!(KEY.proves(&bind(&bytes)));
            bytes[index] ^= 1 << bit;
            let changed = bind(&bytes);
            // The id only says which key.
            prop_assert_eq!(KEY.proves(&changed), (8..16).contains(&index));
        }
    }

    #[test]
    fn a_proof_says_how_long_the_datagram_was() {
        let bytes = KEY.bind(5, COOKIE, 1320);
        assert_eq!(bytes.len(), 1320);
        assert!(!KEY.proves(&bind(&bytes[..1319])));
        let answer = KEY.bound(&bind(&bytes));
        assert_eq!(answer.len(), bytes.len());
        let bound = |bytes: &[u8]| match UdpFrame::decode(bytes) {
            Ok(UdpFrame::Bound(bound)) => bound,
            other => panic!("{other:?}"),
        };
        assert!(KEY.confirms(&bound(&answer)));
        assert!(!KEY.confirms(&bound(&answer[..100])));
        let other = BindKey {
            key: [4; 32],
            ..KEY
        };
        assert!(!other.confirms(&bound(&answer)) && !other.proves(&bind(&bytes)));
    }

    #[test]
    fn a_request_without_cookie_proves_nothing_and_is_longer_than_its_answer() {
        let bytes = KEY.ask_for_cookie(1);
        assert!(!KEY.proves(&bind(&bytes)));
        assert!(cookie_frame(1, &COOKIE).len() < bytes.len());
        let short = UdpFrame::decode(&bytes[..BIND_LEN_MIN - 1]);
        assert_eq!(short, Err(BadFrame::Truncated(BIND_LEN_MIN - 1)));
    }

    #[test]
    fn a_run_ends_at_another_session_another_type_or_the_end() {
        let session = |number| Session { number, epoch: 1 };
        let frame = |number| data_frame(session(number), &[7; 12]);
        let mut bytes = [frame(1), frame(1), frame(2), frame(1)].concat();
        assert_eq!(run_len(&bytes, 20, session(1)), 2);
        assert_eq!(run_len(&bytes[40..], 20, session(2)), 1);
        bytes[20] = TYPE_PING;
        assert_eq!(run_len(&bytes, 20, session(1)), 1);
        bytes.truncate(10); // The last of a batch may be shorter.
        assert_eq!(run_len(&bytes, 20, session(1)), 1);
        assert_eq!(run_len(&[], 20, session(1)), 0);
    }

    #[test]
    fn the_key_does_not_show() {
        assert_eq!(format!("{KEY:?}"), "BindKey { id: 7, .. }");
    }
}
