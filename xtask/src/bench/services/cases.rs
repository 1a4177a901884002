//! What is measured.

use anyhow::Result;

use super::cluster::Cluster;
use crate::bench;

/// A way from the client to the server.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Case {
    pub(super) name: &'static str,
    pub(super) kind: Kind,
}

/// What makes the way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// Nothing: the client asks the endpoints themselves.
    Direct,
    /// Holdfast's cgroup programs.
    Sockets(Cluster),
    /// Those, and both ends of a connection joined in the sockmap.
    Sockmap(Cluster),
    /// The cgroup programs, and packets between the pods redirected past the node's stack.
    Redirect(Cluster),
    /// Holdfast's tcx programs at the node's end of the client's wire.
    Packets(Cluster),
    /// Those, and packets redirected, as of a pod.
    PacketsRedirect(Cluster),
    /// The same, as of devices of a LAN.
    DevicesRedirect(Cluster),
    /// Rules as kube-proxy makes them in its nftables mode.
    Nftables(Cluster),
    /// Rules as kube-proxy makes them in its iptables mode.
    Iptables(Cluster),
    /// A proxy process on the node.
    Haproxy,
    /// Nobody asks: Holdfast's tables with 250,000 endpoints, and one of them changes.
    Change,
    /// Real agents: the path to an endpoint dies.
    DeadPath,
}

const ONE: Cluster = Cluster { services: 1 };
const THOUSAND: Cluster = Cluster { services: 1_000 };
const TEN_THOUSAND: Cluster = Cluster { services: 10_000 };

const fn case(name: &'static str, kind: Kind) -> Case {
    Case { name, kind }
}

/// The case without a client.
pub(super) const CHANGE: &str = "holdfast-250000";

/// The case with agents.
pub(super) const DEAD_PATH: &str = "holdfast-dead-path";

pub(super) const CASES: &[Case] = &[
    case("direct", Kind::Direct),
    // The same once more: how far its ratio is from 1 says what chance does to all ratios.
    case("direct-again", Kind::Direct),
    case("holdfast-socket-1", Kind::Sockets(ONE)),
    case("holdfast-socket-1000", Kind::Sockets(THOUSAND)),
    case("holdfast-socket-10000", Kind::Sockets(TEN_THOUSAND)),
    case("holdfast-sockmap-1", Kind::Sockmap(ONE)),
    case("holdfast-sockmap-1000", Kind::Sockmap(THOUSAND)),
    case("holdfast-redirect-1", Kind::Redirect(ONE)),
    case("holdfast-redirect-1000", Kind::Redirect(THOUSAND)),
    case("holdfast-redirect-10000", Kind::Redirect(TEN_THOUSAND)),
    case("holdfast-packets-1", Kind::Packets(ONE)),
    case("holdfast-packets-1000", Kind::Packets(THOUSAND)),
    case("holdfast-packets-10000", Kind::Packets(TEN_THOUSAND)),
    case("holdfast-packets-redirect-1", Kind::PacketsRedirect(ONE)),
    case(
        "holdfast-packets-redirect-1000",
        Kind::PacketsRedirect(THOUSAND),
    ),
    case(
        "holdfast-packets-redirect-10000",
        Kind::PacketsRedirect(TEN_THOUSAND),
    ),
    case("holdfast-devices-redirect-1", Kind::DevicesRedirect(ONE)),
    case(
        "holdfast-devices-redirect-1000",
        Kind::DevicesRedirect(THOUSAND),
    ),
    case(
        "holdfast-devices-redirect-10000",
        Kind::DevicesRedirect(TEN_THOUSAND),
    ),
    case("nftables-1", Kind::Nftables(ONE)),
    case("nftables-1000", Kind::Nftables(THOUSAND)),
    case("nftables-10000", Kind::Nftables(TEN_THOUSAND)),
    case("iptables-1", Kind::Iptables(ONE)),
    case("iptables-1000", Kind::Iptables(THOUSAND)),
    case("iptables-10000", Kind::Iptables(TEN_THOUSAND)),
    case("userspace-proxy", Kind::Haproxy),
    case(CHANGE, Kind::Change),
    case(DEAD_PATH, Kind::DeadPath),
];

impl Kind {
    /// Whether a client asks by it, in turns with all others that do.
    pub(super) fn is_way(self) -> bool {
        self != Self::Change && self != Self::DeadPath
    }

    /// Whether a client can do this here. The connection to a proxy process is none to the service, and haproxy
    /// passes on no datagrams.
    pub(super) fn does(self, verb: &str) -> bool {
        self != Self::Haproxy || !["connect", "datagram"].contains(&verb)
    }

    /// Whether it is another program's, so that its failure is not ours.
    pub(super) fn is_other(self) -> bool {
        match self {
            Self::Nftables(_) | Self::Iptables(_) | Self::Haproxy => true,
            Self::Direct
            | Self::Sockets(_)
            | Self::Sockmap(_)
            | Self::Redirect(_)
            | Self::Packets(_)
            | Self::PacketsRedirect(_)
            | Self::DevicesRedirect(_)
            | Self::Change
            | Self::DeadPath => false,
        }
    }
}

/// Whether a case of this name is another program's.
pub(in crate::bench) fn is_other(name: &str) -> bool {
    let of_name = CASES.iter().find(|case| case.name == name);
    of_name.is_some_and(|case| case.kind.is_other())
}

/// Whether there is a case of this name.
#[cfg(test)]
pub(in crate::bench) fn is_case(name: &str) -> bool {
    CASES.iter().any(|case| case.name == name)
}

/// The cases to measure: all, unless `only` names some.
///
/// # Errors
///
/// If a name is unknown: says which there are.
pub(super) fn choose(only: &[String]) -> Result<Vec<&'static Case>> {
    bench::choose(CASES, |case| case.name, only)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_are_measured_unless_some_are_named_and_an_unknown_name_is_told() {
        let own =
            |names: &[&str]| -> Vec<_> { names.iter().map(|&name| name.to_owned()).collect() };
        assert_eq!(choose(&[]).unwrap().len(), CASES.len());
        let chosen = choose(&own(&["nftables-1", "direct"])).unwrap();
        assert_eq!(chosen[0].name, "direct");
        assert_eq!((chosen.len(), chosen[1].name), (2, "nftables-1"));
        let said = choose(&own(&["ipvs-1"])).unwrap_err().to_string();
        assert!(
            said.starts_with("no case ipvs-1; there are: direct, "),
            "{said}"
        );
    }

    #[test]
    fn what_kube_proxy_and_a_proxy_do_is_not_ours() {
        assert!(is_other("iptables-1000") && is_other("userspace-proxy"));
        assert!(!is_other("direct") && !is_other("holdfast-packets-1"));
    }
}
