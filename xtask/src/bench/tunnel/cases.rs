//! What is measured.

use std::path::Path;

use anyhow::{Result, ensure};
use netns_tests::node::Process;

use super::{
    install::{self, Tool},
    peers,
    world::{Ends, Route},
};
use crate::bench::Options;

/// A way from the left node to the right one.
#[derive(Debug)]
pub(super) struct Case {
    pub(super) name: &'static str,
    pub(super) kind: Kind,
}

type Get = fn(&Path) -> Result<Tool>;

/// What makes the way.
#[derive(Debug)]
pub(super) enum Kind {
    /// Nothing: the wire.
    Raw,
    /// `mesh-agent`, by one of its paths, and more lines for its configuration.
    Agents(Route, &'static str),
    /// `mesh-agent` on the left node, with more lines for its configuration, and two peers of it by direct paths.
    Hub(&'static str),
    /// A program that `wg` configures.
    WireGuard {
        get: Get,
        words: &'static [&'static str],
    },
    /// A program with a protocol of its own.
    Other {
        get: Get,
        start: fn(&Ends, &Tool) -> Result<Vec<Process>>,
    },
}

impl Case {
    /// The path that the router leaves.
    pub(super) fn route(&self) -> Route {
        match self.kind {
            Kind::Agents(route, _) => route,
            Kind::Raw | Kind::Hub(_) | Kind::WireGuard { .. } | Kind::Other { .. } => Route::Direct,
        }
    }

    /// The program, where it is another than the agent: installed or built if need be.
    pub(super) fn get(&self, bins: &Path) -> Result<Option<Tool>> {
        match self.kind {
            Kind::Raw | Kind::Agents(..) | Kind::Hub(_) => Ok(None),
            Kind::WireGuard { get, .. } | Kind::Other { get, .. } => get(bins).map(Some),
        }
    }
}

/// The wire, and Holdfast.
pub(super) const OWN: &[Case] = &[
    Case {
        name: "raw",
        kind: Kind::Raw,
    },
    Case {
        name: "holdfast",
        kind: Kind::Agents(Route::Direct, ""),
    },
    Case {
        name: "holdfast-1-thread",
        kind: Kind::Agents(Route::Direct, "packet_threads = 1\n"),
    },
    Case {
        name: "holdfast-hub-2-threads",
        kind: Kind::Hub("packet_threads = 2\n"),
    },
    Case {
        name: "holdfast-hub-1-thread",
        kind: Kind::Hub("packet_threads = 1\n"),
    },
    Case {
        name: "holdfast-relay-udp",
        kind: Kind::Agents(Route::RelayUdp, ""),
    },
    Case {
        name: "holdfast-relay-quic",
        kind: Kind::Agents(Route::RelayQuic, ""),
    },
    Case {
        name: "holdfast-relay-tls",
        kind: Kind::Agents(Route::RelayTls, ""),
    },
    Case {
        name: "mesh-tunnel",
        kind: Kind::WireGuard {
            get: install::own,
            words: &["--foreground"],
        },
    },
    Case {
        name: "mesh-tunnel-no-cipher",
        kind: Kind::WireGuard {
            get: |_| install::own_without_cipher(),
            words: &["--foreground"],
        },
    },
];

/// The others.
pub(super) const PEERS: &[Case] = &[
    Case {
        name: "boringtun-cli",
        kind: Kind::WireGuard {
            get: |_| install::from_crates("boringtun-cli", "boringtun-cli"),
            words: &["--foreground", "--disable-drop-privileges"],
        },
    },
    Case {
        name: "gotatun-cli",
        kind: Kind::WireGuard {
            get: |_| install::from_crates("gotatun-cli", "gotatun"),
            words: &["--foreground", "--disable-drop-privileges"],
        },
    },
    Case {
        name: "wireguard-go",
        kind: Kind::WireGuard {
            get: |_| install::from_debian("wireguard-go", "wireguard-go"),
            words: &["--foreground"],
        },
    },
    Case {
        name: "wireguard-go-offloads",
        kind: Kind::WireGuard {
            get: |_| install::from_sid("wireguard-go", "wireguard-go", "--version"),
            words: &["--foreground"],
        },
    },
    Case {
        name: "vpncloud",
        kind: Kind::Other {
            get: |_| install::from_crates("vpncloud", "vpncloud"),
            start: peers::vpncloud,
        },
    },
    Case {
        name: "openvpn",
        kind: Kind::Other {
            get: |_| install::from_debian("openvpn", "openvpn"),
            start: peers::openvpn,
        },
    },
    Case {
        name: "tinc",
        kind: Kind::Other {
            get: |_| install::from_debian("tinc", "tincd"),
            start: peers::tinc,
        },
    },
    Case {
        name: "nebula",
        kind: Kind::Other {
            get: |_| install::from_sid("nebula", "nebula", "-version"),
            start: peers::nebula,
        },
    },
];

/// Whether a case of this name is another program's.
pub(in crate::bench) fn is_peer(name: &str) -> bool {
    PEERS.iter().any(|case| case.name == name)
}

/// Whether there is a case of this name.
#[cfg(test)]
pub(in crate::bench) fn is_case(name: &str) -> bool {
    OWN.iter().chain(PEERS).any(|case| case.name == name)
}

/// The cases to measure: Holdfast's always, unless `only` names others.
///
/// # Errors
///
/// If a name is unknown: says which there are.
pub(super) fn choose(options: &Options) -> Result<Vec<&'static Case>> {
    check(&options.peers, PEERS.iter())?;
    check(&options.only, OWN.iter().chain(PEERS))?;
    let wanted = |case: &&Case| {
        let named = |list: &[String]| list.iter().any(|name| name == case.name);
        let peer = is_peer(case.name) && !options.peers.is_empty() && !named(&options.peers);
        named(&options.only) || (options.only.is_empty() && !peer)
    };
    Ok(OWN.iter().chain(PEERS).filter(wanted).collect())
}

fn check<'a>(names: &[String], known: impl Iterator<Item = &'a Case>) -> Result<()> {
    let known: Vec<_> = known.map(|case| case.name).collect();
    let strange: Vec<_> = names
        .iter()
        .filter(|name| !known.contains(&name.as_str()))
        .map(String::as_str)
        .collect();
    ensure!(
        strange.is_empty(),
        "no case {}; there are: {}",
        strange.join(", "),
        known.join(", ")
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(peers: &[&str], only: &[&str]) -> Result<Vec<&'static str>, String> {
        let own = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
        let options = Options {
            peers: own(peers),
            only: own(only),
            ..Options::default()
        };
        let cases = choose(&options).map_err(|error| error.to_string())?;
        Ok(cases.iter().map(|case| case.name).collect())
    }

    #[test]
    fn everything_is_measured_unless_told_otherwise() {
        assert_eq!(chosen(&[], &[]).unwrap().len(), OWN.len() + PEERS.len());
    }

    #[test]
    fn our_own_cases_are_always_beside_the_chosen_peers() {
        let cases = chosen(&["tinc"], &[]).unwrap();
        assert_eq!(cases.len(), OWN.len() + 1);
        assert!(cases.contains(&"holdfast") && cases.contains(&"tinc"));
        assert_eq!(chosen(&[], &["raw", "tinc"]).unwrap(), ["raw", "tinc"]);
    }

    #[test]
    fn an_unknown_name_is_told() {
        let said = chosen(&["tink"], &[]).unwrap_err();
        assert!(
            said.starts_with("no case tink; there are: boringtun-cli"),
            "{said}"
        );
    }
}
