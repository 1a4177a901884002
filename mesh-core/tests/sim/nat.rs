//! Address translators that really translate (RFC 4787): mapping, filtering, expiry.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
};

/// Mappings and permissions end after this much silence, in microseconds: what Linux grants a
/// stream of UDP.
const EXPIRY_US: u64 = 120_000_000;

/// How a site's router treats UDP.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum NatSort {
    /// No translation, no filter.
    Open,
    /// One mapping for all destinations; anyone may answer.
    FullCone,
    /// One mapping; hosts that were written to may answer.
    Restricted,
    /// One mapping; ports that were written to may answer.
    PortRestricted,
    /// A mapping for each destination.
    Symmetric,
    /// No UDP at all.
    UdpBlocked,
}

/// One router.
#[derive(Debug)]
pub(crate) struct Nat {
    pub(crate) sort: NatSort,
    pub(crate) public: IpAddr,
    /// Inside address and, if the mapping depends on it, destination, to outside port.
    ports: BTreeMap<(SocketAddr, Option<SocketAddr>), u16>,
    insides: BTreeMap<u16, SocketAddr>,
    /// Outside port and whom it was written to, to when that was.
    permitted: BTreeMap<(u16, SocketAddr), u64>,
    next_port: u16,
}

impl Nat {
    pub(crate) fn new(sort: NatSort, public: IpAddr) -> Self {
        Self {
            sort,
            public,
            ports: BTreeMap::new(),
            insides: BTreeMap::new(),
            permitted: BTreeMap::new(),
            next_port: 20_000,
        }
    }

    /// The source address that `to` sees of a packet from `inside`; `None`: dropped.
    pub(crate) fn outbound(
        &mut self,
        inside: SocketAddr,
        to: SocketAddr,
        now_us: u64,
    ) -> Option<SocketAddr> {
        let by_destination = match self.sort {
            NatSort::Open => return Some(inside),
            NatSort::UdpBlocked => return None,
            NatSort::FullCone | NatSort::Restricted | NatSort::PortRestricted => None,
            NatSort::Symmetric => Some(to),
        };
        let next_port = &mut self.next_port;
        let port = *self
            .ports
            .entry((inside, by_destination))
            .or_insert_with(|| {
                *next_port += 1;
                *next_port
            });
        self.insides.insert(port, inside);
        self.permitted.insert((port, to), now_us);
        Some(SocketAddr::new(self.public, port))
    }

    /// Where a packet from `from` to the outside address `to` goes; `None`: dropped.
    pub(crate) fn inbound(
        &self,
        from: SocketAddr,
        to: SocketAddr,
        now_us: u64,
    ) -> Option<SocketAddr> {
        let fresh = |at: &u64| now_us < at + EXPIRY_US;
        let written_to = |matches: &dyn Fn(&SocketAddr) -> bool| {
            let all = (to.port(), SocketAddr::new([0, 0, 0, 0].into(), 0))..;
            let of_port = self.permitted.range(all);
            let mut of_port = of_port.take_while(|((port, _), _)| *port == to.port());
            of_port.any(|((_, written), at)| matches(written) && fresh(at))
        };
        let permitted = match self.sort {
            NatSort::Open => return Some(to),
            NatSort::UdpBlocked => false,
            NatSort::FullCone => written_to(&|_| true),
            NatSort::Restricted => written_to(&|written| written.ip() == from.ip()),
            NatSort::PortRestricted | NatSort::Symmetric => written_to(&|written| *written == from),
        };
        let inside = self.insides.get(&to.port());
        inside.copied().filter(|_| permitted)
    }
}

#[test]
fn the_translators_do_what_their_names_say() {
    let addr = |text: &str| text.parse::<SocketAddr>().unwrap();
    let (inside, peer) = (addr("10.0.0.2:51820"), addr("198.51.100.1:1000"));
    let (same_host, stranger) = (addr("198.51.100.1:2000"), addr("198.51.100.2:1000"));
    // Which of peer, same host on another port, and stranger get in; whether a second
    // destination sees the same port.
    let table = [
        (NatSort::FullCone, [true, true, true], true),
        (NatSort::Restricted, [true, true, false], true),
        (NatSort::PortRestricted, [true, false, false], true),
        (NatSort::Symmetric, [true, false, false], false),
    ];
    for (sort, lets_in, same_port) in table {
        let mut nat = Nat::new(sort, "203.0.113.1".parse().unwrap());
        let outside = nat.outbound(inside, peer, 0).unwrap();
        let got = [peer, same_host, stranger].map(|from| nat.inbound(from, outside, 1).is_some());
        assert_eq!(got, lets_in, "{sort:?}");
        assert_eq!(
            nat.inbound(peer, outside, EXPIRY_US),
            None,
            "{sort:?} expires"
        );
        let again = nat.outbound(inside, stranger, 0).unwrap();
        assert_eq!(again == outside, same_port, "{sort:?}");
    }
    let mut blocked = Nat::new(NatSort::UdpBlocked, "203.0.113.1".parse().unwrap());
    assert_eq!(blocked.outbound(inside, peer, 0), None);
}
