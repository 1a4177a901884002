//! Who may speak with whom, as one node must enforce it. `docs/policy.md` has the semantics row by
//! row.
//!
//! Addresses that no rule tells apart are one *class*. A packet is judged by the class of its end
//! on this node, the class of the other end, and the destination port; so the tables grow with
//! what policies distinguish, not with the mesh.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use ipnet::IpNet;

pub use self::compile::Compiler;
use self::resources::IpProtocol;

mod atoms;
pub mod callers;
mod compile;
pub mod judges;
mod ports;
pub mod resources;
#[cfg(test)]
mod tests;

/// Addresses that no rule tells apart. Numbers are given once and never to another set of rules:
/// an old table beside a new one is never read as something else.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Class(pub u32);

impl Class {
    /// What an address has for which there was no room: all that is denied to any class is denied
    /// to it.
    pub const STRICT: Self = Self(0);
}

/// What the other side of the flow is to the end on this node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Direction {
    /// The end on this node was called.
    In,
    /// The end on this node calls.
    Out,
}

impl Direction {
    /// Both.
    pub const ALL: [Self; 2] = [Self::In, Self::Out];

    /// For people.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::In => "in",
            Self::Out => "out",
        }
    }
}

/// The classes of a flow's ends, as the end on this node sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Pair {
    /// Of the end on this node.
    pub local: Class,
    /// Of the other.
    pub remote: Class,
    /// Who called.
    pub direction: Direction,
}

/// Who decided: an index that [`Tables::deciders`] has a name for. 0: nobody, there was no room.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Decider(pub u32);

/// What becomes of a packet. The least is the strictest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Verdict {
    /// Whether it passes.
    pub allowed: bool,
    /// Nobody audited it. Otherwise it passes, but by a policy in audit it would not.
    pub unaudited: bool,
    /// Whose word this is.
    pub decider: Decider,
}

impl Verdict {
    /// What holds for everything that the tables do not have.
    pub const NO_ROOM: Self = Self {
        allowed: false,
        unaudited: true,
        decider: Decider(0),
    };
}

/// Rules by destination port, shared by pairs of classes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RuleSet(pub u32);

/// What holds between two classes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PairRules {
    /// For packets whose port cannot be known; without `ports`, for all packets.
    pub strictest: Verdict,
    /// Where it depends on the port.
    pub ports: Option<RuleSet>,
}

/// A range of destination ports under a rule set. The longest that has a packet's port counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PortPrefix {
    /// Whose.
    pub rules: RuleSet,
    /// `None`: any protocol.
    pub protocol: Option<IpProtocol>,
    /// The first port.
    pub port: u16,
    /// How many of its leading bits count.
    pub bits: u8,
}

/// How much the kernel's tables hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Prefixes with a class.
    pub addresses: usize,
    /// Pairs of classes.
    pub pairs: usize,
    /// Port prefixes of all rule sets.
    pub ports: usize,
}

/// What has no room. It is judged strictly: nothing passes that should not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct LeftOut {
    /// Prefixes: addresses in them are of class [`Class::STRICT`].
    pub addresses: usize,
    /// Pairs of classes: nothing passes between them.
    pub pairs: usize,
}

impl LeftOut {
    /// Whether everything has room.
    #[must_use]
    pub fn is_nothing(&self) -> bool {
        *self == Self::default()
    }
}

/// Everything that one node must know to judge packets.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Tables {
    /// Whether there is anything to enforce. Otherwise the rest is empty and everything passes.
    pub enforced: bool,
    /// The class of addresses: the longest prefix counts.
    pub addresses: BTreeMap<IpNet, Class>,
    /// What holds between classes.
    pub pairs: BTreeMap<Pair, PairRules>,
    /// By port.
    pub ports: BTreeMap<PortPrefix, Verdict>,
    /// What each decider is called: `MeshPolicy lock-down`.
    pub deciders: BTreeMap<Decider, String>,
    /// What has no room.
    pub left_out: LeftOut,
    /// Prefix lengths that `addresses` has, each family's longest first.
    lengths: BTreeSet<(bool, std::cmp::Reverse<u8>)>,
}

/// A flow's first packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Flow {
    /// Who opens it.
    pub from: IpAddr,
    /// To whom.
    pub to: IpAddr,
    /// By what; `None`: none that rules can name.
    pub protocol: Option<IpProtocol>,
    /// The destination port; 0 where there is none.
    pub port: u16,
}

impl Tables {
    /// What the kernel's programs make of `flow`, on the side that `direction` says.
    #[must_use]
    pub fn judge(&self, flow: &Flow, direction: Direction) -> Verdict {
        let (local, remote) = match direction {
            Direction::In => (flow.to, flow.from),
            Direction::Out => (flow.from, flow.to),
        };
        if !self.enforced || local == remote {
            // A pod cannot block access to itself.
            let (allowed, unaudited, decider) = (true, true, Decider(0));
            return Verdict {
                allowed,
                unaudited,
                decider,
            };
        }
        let pair = Pair {
            local: self.class(local),
            remote: self.class(remote),
            direction,
        };
        let Some(rules) = self.pairs.get(&pair) else {
            return Verdict::NO_ROOM;
        };
        let Some(ports) = rules.ports else {
            return rules.strictest;
        };
        self.by_port(ports, flow.protocol, flow.port)
    }

    /// What `decider` is called.
    #[must_use]
    pub fn name(&self, decider: Decider) -> &str {
        let name = self.deciders.get(&decider).map(String::as_str);
        name.unwrap_or(if self.enforced {
            "no room"
        } else {
            "no policy"
        })
    }

    /// The class of an address.
    #[must_use]
    pub fn class(&self, address: IpAddr) -> Class {
        let v4 = address.is_ipv4();
        let lengths = self.lengths.iter().filter(|(family, _)| *family == v4);
        let mut prefixes = lengths.filter_map(|(_, length)| {
            let prefix = IpNet::new(address, length.0).ok()?;
            self.addresses.get(&prefix.trunc())
        });
        prefixes.next().copied().unwrap_or(Class::STRICT)
    }

    fn by_port(&self, rules: RuleSet, protocol: Option<IpProtocol>, port: u16) -> Verdict {
        let of_protocol = (0..=16u8).rev().filter_map(|bits| {
            let prefix = PortPrefix {
                rules,
                protocol: Some(protocol?),
                port: port & ports::mask(bits),
                bits,
            };
            self.ports.get(&prefix)
        });
        let any = PortPrefix {
            rules,
            protocol: None,
            port: 0,
            bits: 0,
        };
        let mut found = of_protocol.chain(self.ports.get(&any));
        found.next().copied().unwrap_or(Verdict::NO_ROOM)
    }
}
