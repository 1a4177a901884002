//! A day in the life of a mesh: many nodes, most of them quiet most of the time, and now and then something
//! breaks. What only shows after hours: timers that nobody stops, state that nobody forgets, NATs that forget,
//! pauses that grow until nobody tries any more.
//!
//! **What is asserted.** Every call between nodes whose lines are up is answered within [`TALKS_WITHIN_MS`] of
//! its beginning or of the end of what was broken; without anything broken, and without loss on the lines, not a
//! packet is lost once it was (but for the second and a half in which a relay dies); none comes twice; and when
//! everybody is silent nobody has a timer any more, but for those who try blocked UDP again once in an hour.
//!
//! **How much.** [`SMALL`] on every run, [`LARGE`] with `HOLDFAST_NIGHTLY`.

use std::collections::BTreeMap;

use mesh_core::io::PeerState;
use rand::{RngExt, SeedableRng, rngs::Xoshiro256PlusPlus};

use crate::{
    nat::NatSort,
    world::{Change, World},
};

/// How large a mesh, for how long.
#[derive(Debug, Clone, Copy)]
struct Size {
    nodes: usize,
    hours: u64,
}

const SMALL: Size = Size {
    nodes: 60,
    hours: 1,
};
const LARGE: Size = Size {
    nodes: 1_000,
    hours: 24,
};

const MINUTE_MS: u64 = 60_000;
/// The requirement.
const TALKS_WITHIN_MS: u64 = 5_000;
/// A call's length; it is judged when it is over.
const CALL_MS: u64 = 45_000;
/// How often somebody says something in a call.
const PING_MS: u64 = 500;
/// Calls of each node in an hour.
const CALLS_PER_HOUR: u64 = 5;
/// Nodes that one node ever calls.
const FRIENDS: usize = 6;
/// What broke is remembered for as long as it may matter to a call.
const REMEMBERED_MS: u64 = 5 * MINUTE_MS;

struct Call {
    from: usize,
    to: usize,
    flow: usize,
    at: u64,
}

struct Day {
    world: World,
    dice: Xoshiro256PlusPlus,
    relays: usize,
    friends: Vec<Vec<usize>>,
    flows: BTreeMap<(usize, usize), usize>,
    calls: Vec<Call>,
    /// What broke when, and when it was whole again: by node.
    broken: Vec<Vec<(u64, u64)>>,
    answered: u64,
    judged: u64,
    direct: u64,
    slowest_ms: u64,
    problems: Vec<String>,
}

impl Day {
    fn new(seed: u64, size: Size) -> Self {
        let mut dice = Xoshiro256PlusPlus::seed_from_u64(seed ^ 0xda7);
        let mut world = World::new(seed);
        let relays = 4;
        for relay in 0..relays {
            world.add_relay(&format!("relay-{relay}"));
        }
        while world.nodes.len() < size.nodes {
            let sort = match dice.random_range(0..100) {
                0..10 => NatSort::Open,
                10..25 => NatSort::FullCone,
                25..60 => NatSort::PortRestricted,
                60..75 => NatSort::Symmetric,
                75..85 => NatSort::SymmetricRandom,
                85..92 => NatSort::Double,
                _ => NatSort::UdpBlocked,
            };
            let site = world.add_site(sort);
            world.sites[site].delay_us = dice.random_range(2_000..80_000);
            // One in five loses something.
            let loss = dice.random_range(0..5) == 0;
            world.sites[site].loss = if loss { 0.01 } else { 0.0 };
            world.sites[site]
                .nat
                .expire_after(dice.random_range(25..180) * 1_000_000);
            for relay in 0..relays {
                let far = dice.random_range(0..40_000);
                world.relays[relay].far_us.insert(site, far);
            }
            let alone = matches!(sort, NatSort::Open | NatSort::Firewall);
            let room = if alone { 1 } else { dice.random_range(1..=6) };
            let first = world.nodes.len();
            for _ in 0..room.min(size.nodes - first) {
                let name = format!("node-{}", world.nodes.len());
                world.add_node(&name, site);
            }
            // Some sites have a relay of their own.
            if room >= 4 && dice.random_range(0..3) == 0 {
                world.add_peer_relay(first, dice.random_bool(0.5), &[site]);
            }
        }
        let nodes = world.nodes.len();
        let friends = (0..nodes).map(|node| {
            let friends = (0..FRIENDS).map(|_| dice.random_range(0..nodes));
            friends.filter(|friend| *friend != node).collect()
        });
        let friends = friends.collect();
        world.boot_all();
        Self {
            world,
            dice,
            relays,
            friends,
            flows: BTreeMap::new(),
            calls: Vec::new(),
            broken: vec![Vec::new(); nodes],
            answered: 0,
            judged: 0,
            direct: 0,
            slowest_ms: 0,
            problems: Vec::new(),
        }
    }

    fn chance(&mut self, per_hour: f64) -> bool {
        self.dice.random_bool((per_hour / 60.0).min(1.0))
    }

    fn break_for(&mut self, nodes: &[usize], ms: u64) {
        let now = self.world.now_ms();
        for &node in nodes {
            self.broken[node].push((now, now + ms));
        }
    }

    /// What happens within a minute, somewhere.
    fn trouble(&mut self) {
        for site in 0..self.world.sites.len() {
            if self.chance(0.1) {
                let ms = self.dice.random_range(200..40_000);
                let now = self.world.now_ms();
                self.world.change(Change::SiteDown(site));
                self.world.at(now + ms, Change::SiteUp(site));
                let nodes = self.world.nodes_at(site);
                self.break_for(&nodes, ms);
            }
            if self.chance(0.05) {
                self.world.sites[site].nat.forget();
                let nodes = self.world.nodes_at(site);
                self.break_for(&nodes, 0);
            }
        }
        for node in 0..self.world.nodes.len() {
            if self.chance(0.02) {
                self.world.boot(node);
                self.break_for(&[node], 0);
                // Who is on its relay notices.
                let site = self.world.nodes[node].site;
                let nodes = self.world.nodes_at(site);
                self.break_for(&nodes, 0);
            }
        }
        // One at a time, so that there always is one.
        let relay = self.dice.random_range(0..self.relays);
        if self.chance(1.0) {
            let now = self.world.now_ms();
            let ms = self.dice.random_range(1_000..50_000);
            self.world.change(Change::RelayDown(relay));
            self.world.at(now + ms, Change::RelayUp(relay));
        }
    }

    fn call(&mut self) {
        let nodes = self.world.nodes.len();
        for from in 0..nodes {
            if !self
                .dice
                .random_ratio(u32::try_from(CALLS_PER_HOUR).unwrap(), 60)
            {
                continue;
            }
            let friends = &self.friends[from];
            let to = friends[self.dice.random_range(0..friends.len())];
            if self
                .calls
                .iter()
                .any(|call| (call.from, call.to) == (from, to))
            {
                continue;
            }
            let world = &mut self.world;
            let new = || world.add_flow(from, to, PING_MS, false);
            let flow = *self.flows.entry((from, to)).or_insert_with(new);
            self.world.flows[flow].forget();
            let at = self.world.now_ms();
            self.world.start_flow(flow);
            self.calls.push(Call { from, to, flow, at });
        }
    }

    fn judge(&mut self) {
        let now = self.world.now_ms();
        let over = |call: &Call| now >= call.at + CALL_MS;
        let (over, going_on): (Vec<Call>, Vec<Call>) =
            std::mem::take(&mut self.calls).into_iter().partition(over);
        self.calls = going_on;
        for call in over {
            self.judge_one(&call, now);
            self.world.stop_flow(call.flow);
        }
        for broken in &mut self.broken {
            broken.retain(|(_, to)| now < to + REMEMBERED_MS);
        }
        for node in &mut self.world.nodes {
            node.events.clear();
            node.moves.clear();
        }
    }

    fn judge_one(&mut self, call: &Call, now: u64) {
        let Call { from, to, flow, at } = *call;
        // The links of a node may take as long as that to come back after a short outage.
        let since = at.saturating_sub(MINUTE_MS);
        let broken = self.broken[from].iter().chain(&self.broken[to]);
        let broken = broken.filter(|(_, until)| *until >= since);
        let whole = broken.map(|(_, until)| *until).max();
        let due = whole.unwrap_or(at).max(at) + TALKS_WITHIN_MS;
        let flow = &self.world.flows[flow];
        self.judged += 1;
        // Of those packets that went out early enough: what breaks later is of no interest.
        let early = |id: &u64| flow.sent.get(id).is_some_and(|sent| *sent <= due);
        let answered = flow.answered.iter().filter(|(id, _)| early(id));
        let first = answered.map(|(_, at)| *at).min();
        let sort = |node: usize| {
            let site = self.world.nodes[node].site;
            (site, self.world.sites[site].nat.sort)
        };
        let say = |problem: String| {
            let (a, b) = (sort(from), sort(to));
            format!("{from} {a:?} → {to} {b:?} at {at}, due {due}: {problem}")
        };
        let mut problem = None;
        match first {
            Some(first) if first <= due => {
                self.answered += 1;
                if whole.is_none() {
                    self.slowest_ms = self.slowest_ms.max(first - at);
                }
            }
            Some(_) | None if due > now => {}
            Some(_) | None => problem = Some(say(format!("answered {first:?}"))),
        }
        let loss = [from, to].iter().any(|node| {
            let site = self.world.nodes[*node].site;
            self.world.sites[site].loss > 0.0
        });
        if whole.is_none() && !loss && first.is_some() {
            let lost = flow
                .sent
                .iter()
                .filter(|(id, at)| **at + 1_000 < now && !flow.answered.contains_key(id));
            let lost: Vec<u64> = lost.map(|(_, sent)| sent - at).collect();
            // A relay may have died under it: half a second, and what was under way.
            if lost.len() as u64 > 1_500 / PING_MS {
                problem = Some(say(format!("lost packets, sent after {lost:?} ms")));
            }
        }
        if flow.twice > 0 {
            problem = Some(say(format!("{} packets came twice", flow.twice)));
        }
        let report = self.world.report(from, to);
        let direct = report.is_some_and(|report| report.state == PeerState::Direct);
        self.direct += u64::from(direct);
        if let Some(problem) = problem {
            // At once: a day takes ten minutes.
            let ends = [(from, to), (to, from)].map(|(at, of)| self.world.report(at, of));
            println!("{problem}\n{ends:#?}");
            self.problems.push(problem);
        }
    }
}

fn run(seed: u64, size: Size) -> Day {
    let mut day = Day::new(seed, size);
    day.world.run_for(5_000);
    for minute in 0..size.hours * 60 {
        // The last half hour is quiet.
        if minute + 30 < size.hours * 60 {
            day.trouble();
            day.call();
        }
        for _ in 0..4 {
            day.world.run_for(MINUTE_MS / 4);
            day.judge();
        }
    }
    day
}

#[test]
fn a_day_of_a_mesh_in_which_something_breaks_now_and_then() {
    let nightly = std::env::var_os("HOLDFAST_NIGHTLY").is_some();
    let size = if nightly { LARGE } else { SMALL };
    let day = run(1, size);
    println!(
        "{size:?}: {} calls, {} answered in time, {} direct at their end, the slowest undisturbed one after {} ms; {} steps",
        day.judged, day.answered, day.direct, day.slowest_ms, day.world.steps
    );
    let shown = day.problems.iter().take(20).cloned();
    let shown = shown.collect::<Vec<_>>().join("\n");
    assert!(day.problems.is_empty(), "{}:\n{shown}", day.problems.len());
    assert!(day.judged > size.hours * CALLS_PER_HOUR * size.nodes as u64 / 4);
    let mut world = day.world;
    for node in 0..world.nodes.len() {
        for report in world.core(node).peers() {
            assert_eq!(report.state, PeerState::Idle, "{node}: {report:#?}");
        }
    }
    let before = world.steps;
    world.run_for(10 * MINUTE_MS);
    // But for those whose UDP is blocked: they try QUIC again once in an hour.
    let steps = world.steps - before;
    let nodes = world.nodes.len() as u64;
    assert!(steps <= nodes, "{steps} steps while nobody does anything");
}
