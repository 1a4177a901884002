//! The Internet checksum (RFC 1071), computed in the machine's own byte order, which its §2(B)
//! shows to give the same bytes.

/// A running sum. Add only whole 16-bit words, except in the last call.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Sum(u64);

impl Sum {
    /// Adds bytes; an odd last one counts as if followed by a zero.
    pub(crate) fn add(mut self, bytes: &[u8]) -> Self {
        // Whole words with their carries, which count as 1 (RFC 1071 §2(B)): fast without vector instructions,
        // which a build for size does not have.
        let (blocks, rest) = bytes.as_chunks::<32>();
        let (mut sum, mut carries) = (0_u64, 0);
        for block in blocks {
            let (words, _) = block.as_chunks::<8>();
            for word in words {
                let (next, carry) = sum.overflowing_add(u64::from_ne_bytes(*word));
                sum = next;
                carries += u64::from(carry);
            }
        }
        // A packet has fewer than 2¹⁵ words of 32 bits: 64 bits cannot overflow.
        self.0 += (sum & u64::from(u32::MAX)) + (sum >> 32) + carries;
        let (words, rest) = rest.as_chunks::<4>();
        for word in words {
            self.0 += u64::from(u32::from_ne_bytes(*word));
        }
        match *rest {
            [a] => self.0 += u64::from(u16::from_ne_bytes([a, 0])),
            [a, b] => self.0 += u64::from(u16::from_ne_bytes([a, b])),
            [a, b, c] => {
                self.0 += u64::from(u16::from_ne_bytes([a, b]));
                self.0 += u64::from(u16::from_ne_bytes([c, 0]));
            }
            _ => {}
        }
        self
    }

    /// Adds the pseudo header (RFC 9293 §3.1, RFC 8200 §8.1): addresses, protocol, length.
    pub(crate) fn add_pseudo(self, addresses: &[u8], protocol: u8, len: u16) -> Self {
        self.add(addresses)
            .add(&[0, protocol])
            .add(&len.to_be_bytes())
    }

    /// The sum folded to 16 bits, as it stands in a packet whose checksum is to be completed.
    pub(crate) fn partial(self) -> [u8; 2] {
        self.fold().to_ne_bytes()
    }

    /// The checksum as it stands in a packet.
    pub(crate) fn checksum(self) -> [u8; 2] {
        (!self.fold()).to_ne_bytes()
    }

    /// Whether bytes that contain their own checksum add up.
    pub(crate) fn is_valid(self) -> bool {
        self.fold() == u16::MAX
    }

    fn fold(self) -> u16 {
        let mut sum = self.0;
        while let Err(_too_large) = u16::try_from(sum) {
            sum = (sum >> 16) + (sum & 0xffff);
        }
        u16::try_from(sum).unwrap_or(u16::MAX)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn by_the_book(bytes: &[u8]) -> [u8; 2] {
        let words = bytes.chunks(2).map(|pair| {
            u64::from(u16::from_be_bytes([
                pair[0],
                pair.get(1).copied().unwrap_or(0),
            ]))
        });
        let mut sum: u64 = words.sum();
        while sum > 0xffff {
            sum = (sum >> 16) + (sum & 0xffff);
        }
        (!u16::try_from(sum).unwrap()).to_be_bytes()
    }

    proptest! {
        #[test]
        fn agrees_with_the_definition(bytes: Vec<u8>) {
            prop_assert_eq!(Sum::default().add(&bytes).checksum(), by_the_book(&bytes));
        }

        #[test]
        fn may_be_computed_in_parts(first: Vec<u16>, second: Vec<u8>) {
            let first: Vec<u8> = first.iter().flat_map(|word| word.to_be_bytes()).collect();
            let whole = [first.as_slice(), &second].concat();
            prop_assert_eq!(
                Sum::default().add(&first).add(&second).checksum(),
                by_the_book(&whole)
            );
        }
    }

    #[test]
    fn an_example_from_rfc_1071_adds_up() {
        let sum = Sum::default().add(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]);
        assert_eq!(sum.partial(), [0xdd, 0xf2]);
        assert!(sum.add(&sum.checksum()).is_valid());
    }
}
