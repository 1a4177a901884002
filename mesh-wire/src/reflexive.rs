//! Reflexive addresses: STUN binding requests (RFC 8489) and their answers, no more of it.
//!
//! An answer is never longer than its request, so that a relay cannot be used to amplify traffic
//! towards a forged source address. Our own requests are padded accordingly.

use std::net::SocketAddr;

use stun_types::{
    attribute::{Software, XorMappedAddress},
    message::{
        BINDING, MAGIC_COOKIE, Message, MessageClass, MessageType, MessageWriteVec, TransactionId,
    },
    prelude::*,
};

use crate::id::canonical;

/// Chosen by who asks, copied into the answer.
pub type Txid = [u8; 12];

/// Length of a STUN header (RFC 8489 §5).
const HEADER_LEN: usize = 20;

/// Length of our requests: that of the longest answer, 20 bytes of header and 24 of
/// XOR-MAPPED-ADDRESS with an IPv6 address.
pub const REQUEST_LEN: usize = 44;

/// 20 bytes of SOFTWARE value after 4 of attribute header: the padding.
const SOFTWARE: &str = "holdfast\0\0\0\0\0\0\0\0\0\0\0\0";

/// A binding request of [`REQUEST_LEN`] bytes.
#[must_use]
pub fn request(txid: Txid) -> Vec<u8> {
    let kind = MessageType::from_class_method(MessageClass::Request, BINDING);
    let mut message = Message::builder(kind, to_transaction(txid), MessageWriteVec::new());
    if let Ok(padding) = Software::new(SOFTWARE) {
        message.add_attribute(&padding).ok(); // The first of its kind always fits.
    }
    message.finish()
}

/// The answer to `request`, which came from `from`; `None` if it is not a binding request, or is
/// shorter than its answer would be.
#[must_use]
pub fn answer(request: &[u8], from: SocketAddr) -> Option<Vec<u8>> {
    if !looks_like_stun(request) {
        return None;
    }
    let request_message = Message::from_bytes(request).ok()?;
    if !request_message.has_class(MessageClass::Request) || !request_message.has_method(BINDING) {
        return None;
    }
    let address = XorMappedAddress::new(canonical(from), request_message.transaction_id());
    let mut response = Message::builder_success(&request_message, MessageWriteVec::new());
    response.add_attribute(&address).ok()?;
    let response = response.finish();
    (response.len() <= request.len()).then_some(response)
}

/// The transaction and the reflexive address in an answer; `None` if `bytes` are none.
#[must_use]
pub fn parse_response(bytes: &[u8]) -> Option<(Txid, SocketAddr)> {
    if !looks_like_stun(bytes) {
        return None;
    }
    let message = Message::from_bytes(bytes).ok()?;
    if !message.has_class(MessageClass::Success) || !message.has_method(BINDING) {
        return None;
    }
    let address = message.attribute::<XorMappedAddress>().ok()?;
    let transaction = message.transaction_id();
    Some((
        from_transaction(transaction),
        canonical(address.addr(transaction)),
    ))
}

/// Whether a packet on a port shared with QUIC or WireGuard is STUN: by the two leading zero bits,
/// the length and the magic cookie (RFC 8489 §5). WireGuard's bytes 2 and 3 are zero, which as a
/// length would mean a packet shorter than any of WireGuard's.
#[must_use]
pub fn looks_like_stun(bytes: &[u8]) -> bool {
    let Some((&[first, _, l0, l1, c0, c1, c2, c3], _)) = bytes.split_first_chunk() else {
        return false;
    };
    let length = usize::from(u16::from_be_bytes([l0, l1]));
    first & 0xc0 == 0
        && bytes.len() == HEADER_LEN + length
        && u32::from_be_bytes([c0, c1, c2, c3]) == MAGIC_COOKIE
}

fn to_transaction(txid: Txid) -> TransactionId {
    let mut wide = [0; 16];
    wide[4..].copy_from_slice(&txid);
    u128::from_be_bytes(wide).into()
}

fn from_transaction(transaction: TransactionId) -> Txid {
    let wide = u128::from(transaction).to_be_bytes();
    wide.last_chunk().copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn an_answer_says_where_the_request_came_from(txid: Txid, from: SocketAddr) {
            let request = request(txid);
            prop_assert_eq!(request.len(), REQUEST_LEN);
            let answer = answer(&request, from).unwrap();
            prop_assert!(answer.len() <= request.len());
            // STUN has no place for a scope or a flow label.
            let expected = canonical(SocketAddr::new(from.ip(), from.port()));
            prop_assert_eq!(parse_response(&answer), Some((txid, expected)));
        }

        #[test]
        fn no_bytes_make_it_panic_and_no_answer_is_longer_than_its_request(bytes: Vec<u8>, from: SocketAddr) {
            if let Some((_, address)) = parse_response(&bytes) {
                prop_assert_eq!(address, canonical(address));
            }
            if let Some(answer) = answer(&bytes, from) {
                prop_assert!(answer.len() <= bytes.len());
            }
        }

        #[test]
        fn no_bytes_behind_a_stun_header_make_it_panic(class: bool, body: Vec<u8>, from: SocketAddr) {
            let mut bytes = request([7; 12])[..HEADER_LEN].to_vec();
            bytes[0] = u8::from(class); // 0x0101 is a success response.
            bytes[2..4].copy_from_slice(&u16::try_from(body.len()).unwrap().to_be_bytes());
            bytes.extend(&body);
            prop_assert!(looks_like_stun(&bytes));
            if let Some((_, address)) = parse_response(&bytes) {
                prop_assert_eq!(address, canonical(address));
            }
            if let Some(answer) = answer(&bytes, from) {
                prop_assert!(answer.len() <= bytes.len());
            }
        }
    }

    #[test]
    fn a_request_shorter_than_its_answer_gets_none() {
        let mut bare = request([1; 12])[..HEADER_LEN].to_vec();
        bare[2..4].copy_from_slice(&[0, 0]);
        assert!(looks_like_stun(&bare));
        assert_eq!(answer(&bare, "192.0.2.1:5000".parse().unwrap()), None);
    }

    #[test]
    fn an_answer_is_not_answered() {
        let from = "192.0.2.1:5000".parse().unwrap();
        let response = answer(&request([1; 12]), from).unwrap();
        assert_eq!(answer(&response, from), None);
    }

    #[test]
    fn wireguard_and_quic_are_not_stun() {
        let mut wireguard = vec![4, 0, 0, 0];
        wireguard.extend(MAGIC_COOKIE.to_be_bytes()); // The worst receiver index there is.
        wireguard.extend([0; 24]);
        assert!(!looks_like_stun(&wireguard));
        let mut quic = request([0; 12]);
        quic[0] |= 0x40;
        assert!(!looks_like_stun(&quic));
    }
}
