//! What is measured.

use std::time::Duration;

/// One of the bench's cases.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Case {
    pub(super) name: &'static str,
    pub(super) kind: Kind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// A controller that follows a cluster, and its agents.
    Cluster(Size),
    /// An agent that has nothing to do.
    Idle(Idle),
    /// A node's pods, connected at once.
    Pods(Plugin),
}

/// A cluster and a fleet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Size {
    pub(super) services: u32,
    /// Of each service.
    pub(super) endpoints: u32,
    pub(super) nodes: u32,
    /// Simulated agents, on the first of the nodes.
    pub(super) agents: u32,
    /// Real agents.
    pub(super) real: u8,
    /// Endpoints that change, one after the other.
    pub(super) changes: u32,
}

/// An agent with peers and services.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::bench) struct Idle {
    pub(in crate::bench) peers: u8,
    pub(in crate::bench) services: u16,
    /// For how long its processor time is counted.
    pub(in crate::bench) time: Duration,
}

/// What connects pods.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Plugin {
    /// Ours, with addresses of both families.
    Mesh,
    /// Ours, with an IPv4 address.
    MeshIpv4,
    /// The stock `bridge` with `host-local`, with an IPv4 address: with IPv6 it would wait a second and more until
    /// the kernel has looked for duplicates.
    Bridge,
}

const fn case(name: &'static str, kind: Kind) -> Case {
    Case { name, kind }
}

pub(super) const CASES: &[Case] = &[
    // What a change costs must not depend on how large the cluster is: this one is what the others are compared with.
    case(
        "controller-1000",
        Kind::Cluster(Size {
            services: 100,
            endpoints: 10,
            nodes: 20,
            agents: 20,
            real: 1,
            changes: 20,
        }),
    ),
    case(
        "controller-100000",
        Kind::Cluster(Size {
            services: 10_000,
            endpoints: 10,
            nodes: 1_000,
            agents: 1_000,
            real: 2,
            changes: 300,
        }),
    ),
    case(
        "controller-250000",
        Kind::Cluster(Size {
            services: 10_000,
            endpoints: 25,
            nodes: 5_000,
            agents: 1_000,
            real: 1,
            changes: 200,
        }),
    ),
    case(
        "agent-2-peers",
        Kind::Idle(Idle {
            peers: 2,
            services: 10,
            time: Duration::from_secs(2),
        }),
    ),
    case(
        "agent-50-peers",
        Kind::Idle(Idle {
            peers: 50,
            services: 1_000,
            time: Duration::from_secs(60),
        }),
    ),
    case("cni-mesh", Kind::Pods(Plugin::Mesh)),
    case("cni-mesh-ipv4", Kind::Pods(Plugin::MeshIpv4)),
    case(BRIDGE, Kind::Pods(Plugin::Bridge)),
];

/// The case that is another program's.
pub(super) const BRIDGE: &str = "cni-bridge-ipv4";
