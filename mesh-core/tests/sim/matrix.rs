//! Every kind of NAT against every other: how soon they talk, how soon directly, and if not, why.
//!
//! `cargo test -p mesh-core --test sim matrix -- --nocapture` prints the table that stands in
//! `docs/paths.md`.

use mesh_core::io::{PeerState, Reason};

use crate::{
    nat::NatSort::{
        self, Double, Firewall, FullCone, Open, PortRestricted, Restricted, Symmetric,
        SymmetricRandom, UdpBlocked,
    },
    scenarios::no_ping_is_lost,
    world::World,
};

/// The requirements.
const TALKS_WITHIN_MS: u64 = 3_000;
const DIRECT_WITHIN_MS: u64 = 5_000;
/// After this a reason is final: a whole round of probes was in vain.
const REASON_AFTER_MS: u64 = 18_000;

/// A kind of NAT, and whether its hosts have IPv6 instead of IPv4.
type Kind = (NatSort, bool);

const KINDS: [Kind; 11] = [
    (Open, false),
    (FullCone, false),
    (Restricted, false),
    (PortRestricted, false),
    (Double, false),
    (Symmetric, false),
    (SymmetricRandom, false),
    (UdpBlocked, false),
    (Open, true),
    (Firewall, true),
    (UdpBlocked, true),
];

/// Seeds of each pair at night: with 121 pairs, over 6,000 runs.
const SEEDS_NIGHTLY: u64 = 50;

/// Why two cannot be direct; `None`: they can.
fn obstacle((a, a_v6): Kind, (b, b_v6): Kind) -> Option<Reason> {
    let symmetric = |sort| matches!(sort, Symmetric | SymmetricRandom);
    // Whoever only lets in ports that were written to waits for one that nobody can name.
    let filters = |sort| matches!(sort, PortRestricted | Double | Firewall);
    if a == UdpBlocked || b == UdpBlocked {
        Some(Reason::UdpBlocked)
    } else if symmetric(a) && symmetric(b) {
        Some(Reason::HardNatBoth)
    } else if a_v6 != b_v6 {
        Some(Reason::NoCandidates)
    } else if symmetric(a) && filters(b) || symmetric(b) && filters(a) {
        Some(Reason::HardNatOne)
    } else {
        None
    }
}

fn edge(world: &mut World, name: &str, (sort, v6): Kind) -> usize {
    let site = if v6 {
        world.add_site_v6(sort)
    } else {
        world.add_site(sort)
    };
    world.add_node(name, site)
}

/// Milliseconds from the first packet to the first answer, and until both ends are direct.
fn run(a_kind: Kind, b_kind: Kind, seed: u64) -> (u64, Option<u64>) {
    let mut world = World::new(seed);
    world.add_relay("r1");
    world.add_relay("r2");
    let (a, b) = (edge(&mut world, "a", a_kind), edge(&mut world, "b", b_kind));
    let flow = world.add_flow(a, b, 20, false);
    world.boot_all();
    world.run_for(1_000);
    world.start_flow(flow);
    let what = format!("{a_kind:?} {b_kind:?} seed {seed}");
    let talks = world.run_until(TALKS_WITHIN_MS, &what, |w| {
        !w.flows[flow].answered.is_empty()
    });
    let state = |w: &World, of, peer| w.report(of, peer).map(|report| report.state);
    let is_direct = |w: &World, of, peer| state(w, of, peer) == Some(PeerState::Direct);
    let obstacle = obstacle(a_kind, b_kind);
    let direct = match obstacle {
        None => {
            let more = world.run_until(DIRECT_WITHIN_MS - talks, &what, |w| {
                is_direct(w, a, b) && is_direct(w, b, a)
            });
            Some(talks + more)
        }
        Some(reason) => {
            world.run_for(REASON_AFTER_MS);
            for (of, peer) in [(a, b), (b, a)] {
                let report = world.report(of, peer).unwrap();
                let got = (report.state, report.reason);
                assert_eq!(got, (PeerState::Relayed, reason), "{what}: {report:#?}");
            }
            None
        }
    };
    no_ping_is_lost(&mut world, flow);
    (talks, direct)
}

#[test]
fn every_kind_of_nat_against_every_other() {
    let nightly = std::env::var_os("HOLDFAST_NIGHTLY").is_some();
    let seeds = if nightly { SEEDS_NIGHTLY } else { 1 };
    let name = |(sort, v6): Kind| format!("{sort:?}{}", if v6 { " v6" } else { "" });
    println!("| from | to | talks after (ms) | direct after (ms) | or by relay, as |");
    println!("|---|---|---|---|---|");
    for a in KINDS {
        for b in KINDS {
            let runs: Vec<_> = (1..=seeds).map(|seed| run(a, b, seed)).collect();
            let talks = runs.iter().map(|(talks, _)| *talks).max().unwrap();
            let direct = runs.iter().filter_map(|(_, direct)| *direct).max();
            let direct = direct.map_or_else(String::new, |ms| ms.to_string());
            let reason = obstacle(a, b).map_or_else(String::new, |why| format!("{why:?}"));
            let (a, b) = (name(a), name(b));
            println!("| {a} | {b} | {talks} | {direct} | {reason} |");
        }
    }
}
