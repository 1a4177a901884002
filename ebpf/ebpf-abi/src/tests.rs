extern crate std;

use core::net::Ipv4Addr;
use std::{collections::BTreeSet, string::ToString};

use super::*;

fn address(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

#[track_caller]
fn survives(text: &str) {
    let addr = address(text);
    let key = SocketAddress::new(addr.ip(), addr.port(), 17);
    assert_eq!(key.socket_addr(), addr);
}

#[test]
fn an_address_comes_back_as_it_was() {
    survives("10.96.0.1:53");
    survives("0.0.0.0:0");
    survives("[fd00:1:2:3:4:5:6:7]:65535");
    survives("[::1]:1");
}

#[test]
fn a_mapped_address_is_the_same_key_as_its_ipv4_form() {
    let v4 = Ipv4Addr::new(10, 96, 0, 1);
    let mapped = SocketAddress::new(v4.to_ipv6_mapped().into(), 80, 6);
    assert_eq!(mapped, SocketAddress::new(v4.into(), 80, 6));
    assert_eq!(mapped.ip[2].to_ne_bytes(), [0, 0, 0xff, 0xff]);
    assert_eq!(mapped.ip[3].to_ne_bytes(), [10, 96, 0, 1]);
    assert_eq!(mapped.port.to_ne_bytes(), [0, 80]);
}

#[test]
fn slots_of_different_lists_never_meet() {
    let long = EndpointList::new(7, LIST_ENDPOINTS_MAX as usize + 1);
    let next = EndpointList::new(8, 2);
    let slots: BTreeSet<u64> = long.slots().chain(next.slots()).collect();
    assert_eq!(slots.len(), LIST_ENDPOINTS_MAX as usize + 2);
    assert!(
        slots
            .iter()
            .all(|slot| slot & u64::from(LIST_LENGTH_MASK) < long.value())
    );
}

#[test]
fn what_a_list_asks_for_is_one_bit_of_the_value_and_of_every_slot() {
    let plain = EndpointList::new(7, 3);
    let lists = [
        (plain.with_affinity(), LIST_AFFINITY_BIT),
        (plain.with_hash(), LIST_HASH_BIT),
        (plain.with_turns(), LIST_TURNS_BIT),
        (plain.with_ranges(), LIST_RANGES_BIT),
    ];
    for (list, bit) in lists {
        assert!(list.has(bit));
        let bit = 1 << bit;
        assert_eq!(list.value(), plain.value() | bit);
        assert!(list.slots().eq(plain.slots().map(|slot| slot | bit)));
        let back = EndpointList::from_value(list.value());
        assert_eq!((back, back.number()), (list, 7));
        let has = |(_, bit)| u32::from(back.has(bit));
        assert_eq!(lists.map(has).iter().sum::<u32>(), 1);
    }
}

#[test]
fn the_header_has_each_layout_limit_and_counter() {
    let header = CHeader.to_string();
    for line in [
        "#define FLOWS_MAX 16384u",
        "    COUNT_read_again,",
        "struct socket_flow {",
        "    struct socket_address address;",
        "    __u32 ip[4];",
        "_Static_assert(sizeof(struct peer) == 40, \"struct peer: size\");",
        "_Static_assert(offsetof(struct choice, endpoint) == 8, \"struct choice.endpoint: offset\");",
    ] {
        assert!(
            header.lines().any(|found| found == line),
            "no {line:?} in\n{header}"
        );
    }
}
