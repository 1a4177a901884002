//! Which address comes next.

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use ipnet::IpNet;

/// The free addresses of a range, in the order in which they are to be given: those that were never given, or longest
/// ago, come first, since others may still send to the last ones. `last` is what was given last.
pub fn free(
    range: IpNet,
    last: Option<IpAddr>,
    taken: &BTreeSet<IpAddr>,
) -> impl Iterator<Item = IpAddr> {
    let (first, count) = usable(range);
    let begin = last
        .filter(|last| range.contains(last))
        .map_or(0, |last| number(last).wrapping_sub(first).wrapping_add(1));
    let places = (0..count).map(move |step| begin.wrapping_add(step) % count);
    let addresses = places.map(move |place| address(range, first.wrapping_add(place)));
    addresses.filter(|address| !taken.contains(address))
}

/// Whether a pod may have this address of the range.
#[must_use]
pub fn is_usable(range: IpNet, wanted: IpAddr) -> bool {
    let (first, count) = usable(range);
    range.contains(&wanted) && number(wanted).wrapping_sub(first) < count
}

/// The first address of a range that a pod may have, as a number, and how many there are. The first of all is the
/// network's own (IPv4) or every router's (RFC 4291, section 2.6.1), the last one IPv4's broadcast.
fn usable(range: IpNet) -> (u128, u128) {
    let first = number(range.network());
    let host_bits = u32::from(range.max_prefix_len() - range.prefix_len());
    // Of all of IPv6 the last address is left out: the count must fit.
    let count = 1_u128.checked_shl(host_bits).unwrap_or(u128::MAX);
    match range {
        // RFC 3021: a range of two has two.
        _ if host_bits <= 1 => (first, count),
        IpNet::V4(_) => (first + 1, count - 2),
        IpNet::V6(_) => (first + 1, count - 1),
    }
}

fn number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(ip) => u32::from(ip).into(),
        IpAddr::V6(ip) => ip.into(),
    }
}

fn address(range: IpNet, number: u128) -> IpAddr {
    match range {
        // What is in an IPv4 range fits.
        IpNet::V4(_) => Ipv4Addr::from(u32::try_from(number).unwrap_or(u32::MAX)).into(),
        IpNet::V6(_) => Ipv6Addr::from(number).into(),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn all(range: &str, last: Option<&str>, taken: &[&str]) -> Vec<String> {
        let taken = taken.iter().map(|text| text.parse().unwrap()).collect();
        let last = last.map(|text| text.parse().unwrap());
        let found = free(range.parse().unwrap(), last, &taken);
        found.map(|address| address.to_string()).collect()
    }

    #[test]
    fn a_range_is_given_from_its_beginning_without_its_own_addresses() {
        assert_eq!(
            all("10.0.0.0/29", None, &[]),
            [
                "10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.0.4", "10.0.0.5", "10.0.0.6"
            ]
        );
        assert_eq!(
            all("fd00::/126", None, &[]),
            ["fd00::1", "fd00::2", "fd00::3"]
        );
    }

    #[test]
    fn small_ranges_have_all_of_their_addresses() {
        assert_eq!(all("10.0.0.4/31", None, &[]), ["10.0.0.4", "10.0.0.5"]);
        assert_eq!(all("10.0.0.4/32", None, &[]), ["10.0.0.4"]);
        assert_eq!(all("fd00::4/128", None, &[]), ["fd00::4"]);
    }

    #[test]
    fn the_address_after_the_last_given_comes_first_and_that_one_last() {
        assert_eq!(
            all("10.0.0.0/30", Some("10.0.0.1"), &[]),
            ["10.0.0.2", "10.0.0.1"]
        );
        assert_eq!(
            all("10.0.0.0/30", Some("10.0.0.2"), &[]),
            ["10.0.0.1", "10.0.0.2"]
        );
        // Of another range, or no address that a pod has.
        assert_eq!(
            all("10.0.0.0/30", Some("10.9.0.1"), &[]),
            ["10.0.0.1", "10.0.0.2"]
        );
        assert_eq!(
            all("10.0.0.0/30", Some("10.0.0.0"), &[]),
            ["10.0.0.1", "10.0.0.2"]
        );
    }

    #[test]
    fn what_is_taken_is_left_out() {
        assert_eq!(all("10.0.0.0/30", None, &["10.0.0.1"]), ["10.0.0.2"]);
        assert!(all("10.0.0.0/30", None, &["10.0.0.1", "10.0.0.2"]).is_empty());
    }

    #[test]
    fn the_largest_ranges_have_a_next_address() {
        for (range, last) in [("::/0", "::ffff"), ("0.0.0.0/0", "255.255.255.254")] {
            let found = free(
                range.parse().unwrap(),
                Some(last.parse().unwrap()),
                &BTreeSet::new(),
            )
            .next();
            assert!(found.is_some(), "{range}");
        }
    }

    proptest! {
        /// A node's life: pods come and go; the model is a plain set.
        #[test]
        fn no_address_is_given_twice_and_none_is_lost(
            v6: bool,
            host_bits in 0_u8..6,
            steps in proptest::collection::vec((any::<bool>(), any::<usize>()), 0..200),
        ) {
            let range: IpNet = if v6 {
                format!("fd00:1::/{}", 128 - host_bits).parse().unwrap()
            } else {
                format!("10.1.2.0/{}", 32 - host_bits).parse().unwrap()
            };
            let size = free(range, None, &BTreeSet::new()).count();
            let (mut taken, mut last, mut released) = (BTreeSet::new(), None, None);
            for (add, which) in steps {
                if add {
                    let next = free(range, last, &taken).next();
                    prop_assert_eq!(next.is_none(), taken.len() == size);
                    if let Some(address) = next {
                        prop_assert!(is_usable(range, address));
                        if taken.len() + 1 < size {
                            prop_assert_ne!(Some(address), released, "given again at once");
                        }
                        prop_assert!(taken.insert(address));
                        last = Some(address);
                    }
                } else if !taken.is_empty() {
                    // The last one given goes at once in half of the cases: the worst that can happen.
                    let gone = match last.filter(|last| taken.contains(last) && which % 2 == 0) {
                        Some(last) => last,
                        None => *taken.iter().nth(which % taken.len()).unwrap(),
                    };
                    taken.remove(&gone);
                    released = Some(gone).filter(|gone| last == Some(*gone));
                }
            }
            let rest: BTreeSet<_> = free(range, last, &taken).collect();
            prop_assert_eq!(rest.len() + taken.len(), size);
        }
    }
}
