//! Address translators that really translate (RFC 4787): mapping, filtering, expiry.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
};

/// Permissions end after this much silence, in microseconds, unless said otherwise: what Linux grants a
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
    /// A mapping for each destination; ports are given out in order.
    Symmetric,
    /// The same, with ports that nobody can guess.
    SymmetricRandom,
    /// The router of a home behind that of a carrier, both restricted by port.
    Double,
    /// No translation; ports that were written to may answer (what protects hosts with IPv6).
    Firewall,
    /// No UDP at all.
    UdpBlocked,
}

/// One router.
#[derive(Debug)]
pub(crate) struct Nat {
    pub(crate) sort: NatSort,
    pub(crate) public: IpAddr,
    /// Permissions end after this much silence; and mappings, if it was said how long that is.
    expiry_us: u64,
    forgets: bool,
    forgot_at: u64,
    /// Inside address and, if the mapping depends on it, destination, to outside port.
    ports: BTreeMap<(SocketAddr, Option<SocketAddr>), u16>,
    insides: BTreeMap<u16, SocketAddr>,
    /// Outside port and whom it was written to, to when that was.
    permitted: BTreeMap<(u16, SocketAddr), u64>,
    next_port: u16,
    /// The carrier's.
    upstream: Option<Box<Self>>,
}

impl Nat {
    pub(crate) fn new(sort: NatSort, public: IpAddr) -> Self {
        let carrier = || Box::new(Self::new(NatSort::PortRestricted, public));
        let upstream = (sort == NatSort::Double).then(carrier);
        Self {
            sort,
            // RFC 6598: what carriers use between themselves and their customers.
            public: match upstream {
                Some(_) => [100, 64, 0, 1].into(),
                None => public,
            },
            expiry_us: EXPIRY_US,
            forgets: false,
            forgot_at: 0,
            ports: BTreeMap::new(),
            insides: BTreeMap::new(),
            permitted: BTreeMap::new(),
            next_port: 20_000,
            upstream,
        }
    }

    /// Mappings that nobody uses for so long are given up.
    pub(crate) fn expire_after(&mut self, us: u64) {
        (self.expiry_us, self.forgets) = (us, true);
    }

    fn forget_unused(&mut self, now_us: u64) {
        let expiry_us = self.expiry_us;
        self.permitted.retain(|_, at| now_us < *at + expiry_us);
        let permitted = &self.permitted;
        let used = |port: u16| {
            let all = (port, SocketAddr::new([0, 0, 0, 0].into(), 0))..;
            let mut of_port = permitted.range(all);
            of_port.next().is_some_and(|((used, _), _)| *used == port)
        };
        self.ports.retain(|_, port| used(*port));
        self.insides.retain(|port, _| used(*port));
    }

    /// The router starts anew, and remembers nothing.
    pub(crate) fn forget(&mut self) {
        self.ports.clear();
        self.insides.clear();
        self.permitted.clear();
        self.next_port += 1_000;
        if let Some(upstream) = &mut self.upstream {
            upstream.forget();
        }
    }

    /// Whether packets to this address come to this router.
    pub(crate) fn reaches(&self, ip: IpAddr) -> bool {
        let public = self.upstream.as_ref().map_or(self.public, |up| up.public);
        ip == public
    }

    /// Whether two destinations see two addresses of a host.
    pub(crate) fn is_symmetric(&self) -> bool {
        matches!(self.sort, NatSort::Symmetric | NatSort::SymmetricRandom)
    }

    /// The same or another kind, with nothing remembered.
    pub(crate) fn replace(&mut self, sort: NatSort) {
        let public = self.upstream.as_ref().map_or(self.public, |up| up.public);
        let next_port = self.next_port + 1_000;
        *self = Self::new(sort, public);
        self.next_port = next_port;
    }

    /// The source address that `to` sees of a packet from `inside`; `None`: dropped.
    pub(crate) fn outbound(
        &mut self,
        inside: SocketAddr,
        to: SocketAddr,
        now_us: u64,
    ) -> Option<SocketAddr> {
        if self.forgets && now_us >= self.forgot_at + 1_000_000 {
            self.forgot_at = now_us;
            self.forget_unused(now_us);
        }
        let by_destination = match self.sort {
            NatSort::Open => return Some(inside),
            NatSort::UdpBlocked => return None,
            NatSort::Firewall => {
                self.insides.insert(inside.port(), inside);
                self.permitted.insert((inside.port(), to), now_us);
                return Some(inside);
            }
            NatSort::FullCone | NatSort::Restricted | NatSort::PortRestricted | NatSort::Double => {
                None
            }
            NatSort::Symmetric | NatSort::SymmetricRandom => Some(to),
        };
        let random = self.sort == NatSort::SymmetricRandom;
        let next_port = &mut self.next_port;
        let port = *self
            .ports
            .entry((inside, by_destination))
            .or_insert_with(|| {
                *next_port += 1;
                // A permutation of the 2^14 ports from 20,000 on that looks like none.
                let turned = (*next_port).wrapping_mul(0x2b5d) % 0x4000;
                if random { 20_000 + turned } else { *next_port }
            });
        self.insides.insert(port, inside);
        self.permitted.insert((port, to), now_us);
        let source = SocketAddr::new(self.public, port);
        match &mut self.upstream {
            Some(upstream) => upstream.outbound(source, to, now_us),
            None => Some(source),
        }
    }

    /// Where a packet from `from` to the outside address `to` goes; `None`: dropped.
    pub(crate) fn inbound(
        &mut self,
        from: SocketAddr,
        to: SocketAddr,
        now_us: u64,
    ) -> Option<SocketAddr> {
        let to = match &mut self.upstream {
            Some(upstream) => upstream.inbound(from, to, now_us)?,
            None => to,
        };
        let fresh = |at: &u64| now_us < at + self.expiry_us;
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
            NatSort::PortRestricted
            | NatSort::Symmetric
            | NatSort::SymmetricRandom
            | NatSort::Double
            | NatSort::Firewall => written_to(&|written| *written == from),
        };
        let inside = self.insides.get(&to.port()).copied();
        let inside = inside.filter(|_| permitted)?;
        if self.forgets
            && let Some(used) = self.permitted.get_mut(&(to.port(), from))
        {
            *used = now_us; // What comes in keeps the mapping, too, as Linux does it.
        }
        Some(inside)
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
        (NatSort::SymmetricRandom, [true, false, false], false),
        (NatSort::Double, [true, false, false], true),
        (NatSort::Firewall, [true, false, false], true),
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
