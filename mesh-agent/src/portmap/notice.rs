//! What gateways say unasked, to all on the LAN: that they started anew, or have another address.

use std::net::Ipv4Addr;

/// Where they say so (RFC 6886, section 3.2.1; RFC 6887, section 14.1).
pub const GROUP: Ipv4Addr = Ipv4Addr::new(224, 0, 0, 1);

/// At this UDP port.
pub const PORT: u16 = 5350;

/// From this one.
pub const SERVER_PORT: u16 = 5351;

/// What a gateway says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Notice {
    /// For how long it has kept its mappings, in seconds.
    pub epoch_s: u32,
    /// Its outside address (NAT-PMP only).
    pub outside: Option<Ipv4Addr>,
}

impl Notice {
    /// Reads a datagram: NAT-PMP's answer to a question for the outside address, or PCP's to `ANNOUNCE`, either with the
    /// result that all is well.
    #[must_use]
    pub fn decode(datagram: &[u8]) -> Option<Self> {
        let epoch_s = |bytes: [u8; 4]| u32::from_be_bytes(bytes);
        match *datagram {
            // Version, opcode, result, epoch, address.
            [0, 128, 0, 0, a, b, c, d, e, f, g, h] => Some(Self {
                epoch_s: epoch_s([a, b, c, d]),
                outside: Some(Ipv4Addr::new(e, f, g, h)),
            }),
            // Version, opcode, reserved, result, lifetime, epoch, reserved; options.
            [2, 128, _, 0, _, _, _, _, a, b, c, d, ..] if datagram.len() >= 24 => Some(Self {
                epoch_s: epoch_s([a, b, c, d]),
                outside: None,
            }),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn both_protocols_notices_are_read_and_nothing_else() {
        let nat_pmp = [0, 128, 0, 0, 0, 0, 1, 0, 203, 0, 113, 7];
        let outside = Some([203, 0, 113, 7].into());
        let said = |epoch_s, outside| Some(Notice { epoch_s, outside });
        assert_eq!(Notice::decode(&nat_pmp), said(256, outside));
        let mut pcp = [0; 24];
        pcp[..2].copy_from_slice(&[2, 128]);
        pcp[11] = 9;
        assert_eq!(Notice::decode(&pcp), said(9, None));
        assert_eq!(Notice::decode(&pcp[..23]), None);
        let failed = [0, 128, 0, 3, 0, 0, 1, 0, 0, 0, 0, 0];
        assert_eq!(Notice::decode(&failed), None);
        assert_eq!(Notice::decode(&nat_pmp[..11]), None);
    }

    proptest! {
        #[test]
        fn no_bytes_make_decode_panic(bytes: Vec<u8>) {
            std::hint::black_box(Notice::decode(&bytes));
        }
    }
}
