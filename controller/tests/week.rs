//! A site is cut off for seven days while everything goes on elsewhere, and then comes back: no wrong answer, no lost update,
//! and all is one mesh again within 5 s. In virtual time, with the machines that decide: the controller's history and lineage, the
//! nodes' exchange, retries and limit; what is told is signed, applied and checked as it is by real ones.
//!
//! Not in it, and modelled after what they do: connections (50 s until a dead one is noticed), announcements on a LAN (at once
//! when there is something new, otherwise every five minutes), and links to relays, which are there again within 3 s.

#![forbid(unsafe_code)]
#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::cast_possible_truncation,
    reason = "a model may fail loudly, and clippy sees only functions marked as tests"
)]

use std::{
    collections::{BTreeMap, BTreeSet},
    env,
    time::{Duration, Instant, UNIX_EPOCH},
};

use mesh_api::{
    control::{Head, Resource, ResourceKey, SignedHead, SyncResponse},
    convert::{key, mesh_resource, service_resource},
    resources::{
        Resources, State, Trust, apply,
        digest::{buckets, difference, digests},
    },
};
use mesh_controller::{
    history::{History, Wanted},
    lineage::{Lineage, Place, Told},
};
use mesh_core::{
    offline::{
        Position, Version,
        exchange::{Answers, Ask, Exchange, Offer, Outcome},
        limit::{LIMIT_DEFAULT, Limit, Standing},
        retry::{Failure, Retry},
    },
    snapshot::{Generation, MeshSettings, Service, ServiceKind, ServiceName},
};
use mesh_identity::authority::CertificateAuthority;
use mesh_wire::id::NodeId;
use rand::{RngExt as _, SeedableRng as _, rngs::Xoshiro256PlusPlus};

/// Unless `HOLDFAST_WEEK_SEEDS` says otherwise: a seed takes some seconds in a debug build.
const SEEDS: u64 = 2;
const SITES: usize = 2;
const NODES_PER_SITE: usize = 4;

const MINUTE: Duration = Duration::from_secs(60);
const HOUR: Duration = Duration::from_secs(3_600);
const DAY: Duration = Duration::from_secs(86_400);

/// When the second site is cut off, and when it comes back.
const CUT: Duration = HOUR;
const MERGE: Duration = Duration::from_secs(7 * 86_400 + 3_600);

/// All are one mesh again within this.
const CONVERGED: Duration = Duration::from_secs(5);

/// Nothing changes for so long after something was healed, so that it can be seen how long that takes.
const CALM: Duration = Duration::from_secs(60);

/// A message there and back.
const ROUND_TRIP: Duration = Duration::from_millis(100);

/// Until a connection is given up that nobody answers by (`mesh_api::connect`).
const NOTICED: Duration = Duration::from_secs(50);

/// Until a link to a relay is there again, at most, and a connection is given up that is doubted then (`mesh-agent`'s `sync`).
const RELAY_BACK: Duration = Duration::from_secs(3);
const DOUBT: Duration = Duration::from_secs(1);

/// Between two announcements of a node of which nothing is new.
const ANNOUNCED: Duration = Duration::from_secs(300);

/// What the services' names lead to, by their numbers.
type Truth = BTreeMap<u8, u16>;

struct Controller {
    authority: CertificateAuthority,
    history: History,
    lineage: Lineage,
    store: Vec<u8>,
    services: Truth,
    /// What was published with each generation.
    published: BTreeMap<u64, Truth>,
    up: bool,
}

fn name(number: u8) -> ServiceName {
    ServiceName {
        namespace: "shop".to_owned(),
        name: format!("s{number}"),
    }
}

fn service(number: u8, version: u16) -> Resource {
    let [high, low] = version.to_be_bytes();
    let address = [10, number, high, low].into();
    service_resource(&Service::new(
        name(number),
        ServiceKind::ClusterIp(vec![address]),
    ))
}

impl Controller {
    fn new() -> Self {
        let mut controller = Self {
            authority: CertificateAuthority::generate("demo", UNIX_EPOCH).unwrap(),
            history: History::default(),
            lineage: Lineage::default(),
            store: vec![7; 16],
            services: (0..30).map(|number| (number, 0)).collect(),
            published: BTreeMap::new(),
            up: true,
        };
        controller.lineage.begin(1, 0);
        controller.publish(Duration::ZERO);
        controller
    }

    fn publish(&mut self, now: Duration) {
        let mesh = MeshSettings::with_defaults(self.authority.mesh_id(), "demo");
        let services = self.services.iter();
        let services = services.map(|(&number, &version)| service(number, version));
        let all = services.chain([mesh_resource(&mesh)]);
        let wanted: BTreeMap<ResourceKey, Wanted> = all
            .map(|resource| (key(&resource).unwrap(), Wanted::Resource(resource.into())))
            .collect();
        let step = self
            .history
            .plan(wanted, |_| Err::<Resource, _>("no nodes"));
        if let Some(mut step) = step.unwrap() {
            step.made_unix_ms = self.history.made_after(now.as_millis() as u64);
            self.history.apply(step);
        }
        let generation = self.history.generation();
        self.published.insert(generation, self.services.clone());
    }

    /// What a node is told that has this, by the rules of `control`; `None`: it has what was lost here.
    fn answer(&self, node: &Node) -> Option<SyncResponse> {
        let known = if node.position.store == self.store {
            let head = node.head.as_ref().and_then(SignedHead::read);
            let told = Told {
                life: head.map_or(0, |head| head.life),
                epoch: node.position.epoch,
                generation: node.position.generation.0,
            };
            match self.lineage.place(told, self.history.generation()) {
                Place::Known => Some(told.generation),
                Place::Unknown => None,
                Place::Lost => return None,
            }
        } else {
            None
        };
        let mut answer = match self.history.known(known) {
            Some(known) => self.history.since(&self.store, Some(known)),
            None if node.state.resources().is_empty() => self.history.since(&self.store, None),
            None => {
                let index = std::sync::Arc::new(self.history.index());
                let theirs = digests(node.state.resources(), index.buckets());
                let differing = index.compare(&theirs).unwrap();
                self.history.since_differing(&self.store, &differing)
            }
        };
        let head = Head {
            store_id: self.store.clone(),
            generation: self.history.generation(),
            epoch: self.lineage.epoch(),
            made_unix_ms: self.history.made_unix_ms(),
            digest: self.history.digest(),
            life: self.lineage.life(),
        };
        answer.head = Some(head.sign(&self.authority).unwrap());
        Some(answer)
    }
}

/// A node's connection to the controller.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Line {
    /// The next attempt is then.
    Off(Duration),
    Open,
    /// Nothing comes by it any more, and the node notices that then.
    Dead(Duration),
}

struct Node {
    site: usize,
    id: NodeId,
    state: State,
    position: Position,
    head: Option<SignedHead>,
    version: Version,
    exchange: Exchange,
    answers: Answers,
    retry: Retry,
    limit: Limit,
    on: bool,
    /// It has a way out of its own.
    modem: bool,
    /// Who is on the same part of the LAN.
    lan: u8,
    line: Line,
    /// When it hears of what is new at the controller.
    told_at: Option<Duration>,
    announces_at: Duration,
    asks: Option<(Duration, Ask)>,
    /// Since when it has what it has.
    changed_at: Duration,
}

struct World {
    start: Instant,
    now: Duration,
    controller: Controller,
    nodes: Vec<Node>,
    site_up: [bool; SITES],
    dice: Xoshiro256PlusPlus,
    changes: u64,
    questions: u64,
    wrong: Vec<String>,
}

impl World {
    fn new(seed: u64) -> Self {
        let start = Instant::now();
        let controller = Controller::new();
        let authority = controller.authority.certificate_der().clone();
        let node = |number: usize| Node {
            site: number / NODES_PER_SITE,
            id: NodeId([number as u8 + 1; 32]),
            state: State::new(authority.clone()).unwrap(),
            position: Position::default(),
            head: None,
            version: Version::default(),
            exchange: Exchange::new(Version::default(), seed + number as u64, start),
            answers: Answers::default(),
            retry: Retry::new(1, seed + number as u64),
            limit: Limit::new(Some(LIMIT_DEFAULT), Duration::ZERO, Duration::ZERO, start),
            on: true,
            modem: false,
            lan: 0,
            line: Line::Off(Duration::ZERO),
            told_at: None,
            announces_at: Duration::ZERO,
            asks: None,
            changed_at: Duration::ZERO,
        };
        Self {
            start,
            now: Duration::ZERO,
            controller,
            nodes: (0..SITES * NODES_PER_SITE).map(node).collect(),
            site_up: [true; SITES],
            dice: Xoshiro256PlusPlus::seed_from_u64(seed),
            changes: 0,
            questions: 0,
            wrong: Vec::new(),
        }
    }

    fn at(&self) -> Instant {
        self.start + self.now
    }

    fn reaches(&self, node: usize) -> bool {
        let node = &self.nodes[node];
        node.on && self.controller.up && (node.modem || self.site_up[node.site])
    }

    /// Who reaches whom is another now.
    fn network_changed(&mut self) {
        for number in 0..self.nodes.len() {
            let (reaches, up) = (self.reaches(number), self.controller.up);
            let back = self.now + self.dice.random_range(Duration::ZERO..RELAY_BACK);
            let now = self.now;
            let node = &mut self.nodes[number];
            match node.line {
                // A controller that ends, ends its connections.
                Line::Open if !up => self.attempt_failed(number),
                Line::Open if !reaches => node.line = Line::Dead(now + NOTICED),
                Line::Dead(_) if reaches => node.line = Line::Dead(back + DOUBT),
                Line::Off(at) if reaches => node.line = Line::Off(at.min(back)),
                Line::Open | Line::Dead(_) | Line::Off(_) => {}
            }
        }
    }

    fn attempt_failed(&mut self, number: usize) {
        let (now, at, count) = (self.now, self.at(), self.nodes.len());
        let node = &mut self.nodes[number];
        let pause = node.retry.handle_failure(Failure::Unreachable, count, None);
        node.line = Line::Off(now + pause);
        node.exchange.handle_controller(false, at);
        node.limit.handle_controller(None, at);
    }

    /// The node hears all that the controller has for it.
    fn take(&mut self, number: usize) {
        let answer = self.controller.answer(&self.nodes[number]);
        let Some(answer) = answer else {
            self.wrong
                .push(format!("{number} has what was lost, at {:?}", self.now));
            return;
        };
        let (now, at) = (self.now, self.at());
        let node = &mut self.nodes[number];
        let head = answer.head.clone();
        let read = head.as_ref().and_then(SignedHead::read).unwrap();
        let offered = Position {
            store: read.store_id.clone(),
            epoch: read.epoch,
            generation: Generation(read.generation),
        };
        if let Err(error) = node.position.check(&offered) {
            self.wrong.push(format!("{number}: {error}"));
            return;
        }
        node.limit.handle_controller(Some(now), at);
        node.adopt(answer, head, &read, now);
    }

    fn announce(&mut self, number: usize) {
        let at = self.at();
        let from = &self.nodes[number];
        let (site, lan, version) = (from.site, from.lan, from.version);
        let ask = Ask {
            node: from.id,
            name: format!("node-{number}").parse().unwrap(),
            address: ([192, 168, 1, number as u8], 51_818).into(),
        };
        for (other, node) in self.nodes.iter_mut().enumerate() {
            if other != number && node.on && (node.site, node.lan) == (site, lan) {
                let ask = ask.clone();
                node.exchange.handle_offer(Offer { ask, version }, at);
            }
        }
    }

    /// What became of a question to a neighbour.
    fn fetched(&mut self, number: usize, ask: &Ask) {
        let at = self.at();
        let own = digests(
            self.nodes[number].state.resources(),
            buckets(self.nodes[number].state.resources().len()),
        );
        let (site, lan, id) = {
            let node = &self.nodes[number];
            (node.site, node.lan, node.id)
        };
        let giver = self
            .nodes
            .iter_mut()
            .find(|node| node.id == ask.node)
            .unwrap();
        let there = giver.on && (giver.site, giver.lan) == (site, lan);
        let given = (there && giver.answers.handle_request(id, at)).then(|| {
            let change = difference(giver.state.resources(), &own);
            (giver.head.clone(), change)
        });
        let outcome = match given {
            Some((Some(head), change)) => self.adopt_given(number, head, change),
            Some((None, _)) | None => Outcome::Failed,
        };
        let node = &mut self.nodes[number];
        node.exchange.handle_own(node.version);
        node.exchange.handle_outcome(ask.node, outcome, at);
    }

    /// By the rules of `mesh-agent`'s `Desired::adopt`.
    fn adopt_given(&mut self, number: usize, signed: SignedHead, change: SyncResponse) -> Outcome {
        let (now, at) = (self.now, self.at());
        let authority = self.controller.authority.certificate_der();
        let node = &mut self.nodes[number];
        if matches!(node.line, Line::Open | Line::Dead(_)) {
            return Outcome::Failed; // As far as it knows, the controller speaks.
        }
        let head = signed.verify(authority).unwrap();
        let mut copy: Resources = node.state.resources().clone();
        assert_eq!(apply(&mut copy, change.clone()), []);
        if head.version() <= node.version || head.check(&copy).is_err() {
            self.wrong
                .push(format!("{number} was given what is not signed"));
            return Outcome::Distrusted;
        }
        let made = Duration::from_millis(head.made_unix_ms);
        node.limit.handle_newer(made, at);
        node.adopt(change, Some(signed), &head, now);
        Outcome::Taken
    }

    /// What nodes say is what was published with the generation that they name, and none goes back.
    fn question(&mut self) {
        for (number, node) in self.nodes.iter().enumerate() {
            if !node.on || node.position.generation.0 == 0 {
                continue;
            }
            self.questions += 1;
            let truth = &self.controller.published[&node.position.generation.0];
            let snapshot = node.state.snapshot(node.position.generation).unwrap();
            let said = snapshot.services.values().map(|service| {
                let ServiceKind::ClusterIp(addresses) = &service.kind else {
                    panic!("{service:?}")
                };
                addresses[0]
            });
            let said: BTreeSet<_> = said.collect();
            let expected: BTreeSet<_> = truth
                .iter()
                .map(|(&number, version)| {
                    let [high, low] = version.to_be_bytes();
                    std::net::IpAddr::from([10, number, high, low])
                })
                .collect();
            if said != expected {
                self.wrong.push(format!("{number} at {:?}", self.now));
            }
        }
        // Those that hear each other, and no controller, have the same.
        for number in 0..self.nodes.len() {
            let node = &self.nodes[number];
            let settled = |node: &Node| {
                node.on
                    && matches!(node.line, Line::Off(_))
                    && self.now > node.changed_at + Duration::from_secs(400)
            };
            let peers = self
                .nodes
                .iter()
                .filter(|peer| (peer.site, peer.lan) == (node.site, node.lan) && settled(peer));
            if settled(node)
                && let Some(newest) = peers.map(|peer| peer.version).max()
                && newest > node.version
            {
                self.wrong.push(format!(
                    "{number} has {:?} and a neighbour {newest:?} at {:?}",
                    node.version, self.now
                ));
            }
        }
    }

    /// When the next thing happens that nobody planned.
    fn next(&self) -> Duration {
        let of = |node: &Node| {
            let line = match node.line {
                Line::Off(at) | Line::Dead(at) => Some(at),
                Line::Open => None,
            };
            let exchange = node.exchange.poll_timeout();
            let exchange = exchange.map(|at| at.saturating_duration_since(self.start));
            let asks = node.asks.as_ref().map(|(at, _)| *at);
            [line, exchange, asks, node.told_at, Some(node.announces_at)]
                .into_iter()
                .flatten()
                .min()
        };
        let nodes = self.nodes.iter().filter(|node| node.on);
        nodes.filter_map(of).min().unwrap_or(Duration::MAX)
    }

    /// Lets time pass until `then`.
    fn pass_until(&mut self, then: Duration) {
        for _turn in 0..10_000_000 {
            let next = self.next().max(self.now);
            if next >= then {
                self.now = then;
                return;
            }
            self.now = next;
            for number in 0..self.nodes.len() {
                if self.nodes[number].on {
                    self.handle(number);
                }
            }
        }
        panic!("time stands still at {:?}", self.now);
    }

    fn handle(&mut self, number: usize) {
        let (now, at) = (self.now, self.at());
        let reaches = self.reaches(number);
        let before = self.nodes[number].version;
        match self.nodes[number].line {
            Line::Off(due) if due <= now && reaches => {
                let node = &mut self.nodes[number];
                node.line = Line::Open;
                node.retry.handle_success();
                node.exchange.handle_controller(true, at);
                node.told_at = Some(now + 3 * ROUND_TRIP);
            }
            Line::Off(due) | Line::Dead(due) if due <= now => self.attempt_failed(number),
            Line::Off(_) | Line::Dead(_) | Line::Open => {}
        }
        if self.nodes[number].told_at.is_some_and(|due| due <= now) {
            self.nodes[number].told_at = None;
            if self.nodes[number].line == Line::Open && reaches {
                self.take(number);
            }
        }
        if let Some((due, ask)) = self.nodes[number].asks.take() {
            if due <= now {
                self.fetched(number, &ask);
            } else {
                self.nodes[number].asks = Some((due, ask));
            }
        }
        let node = &mut self.nodes[number];
        node.exchange.handle_own(node.version);
        if let Some(ask) = node.exchange.handle_timeout(at) {
            node.asks = Some((now + 3 * ROUND_TRIP, ask));
        }
        if node.version != before {
            node.announces_at = now + ROUND_TRIP / 2;
        } else if node.announces_at <= now {
            node.announces_at = now + ANNOUNCED;
            self.announce(number);
        }
    }

    fn change(&mut self) {
        let number = self.dice.random_range(0..40);
        match self.dice.random_range(0..4) {
            0 => drop(self.controller.services.remove(&number)),
            _ => *self.controller.services.entry(number).or_default() += 1,
        }
        self.changes += 1;
        if !self.controller.up {
            return; // In the manifests: it is read at the start.
        }
        self.controller.publish(self.now);
        for node in &mut self.nodes {
            if node.line == Line::Open {
                node.told_at.get_or_insert(self.now + ROUND_TRIP / 2);
            }
        }
    }

    /// A node loses power, or has it again: what it has is on its disk, its agent's life begins anew.
    fn power(&mut self, number: usize, on: bool) {
        let (now, at, seed) = (self.now, self.at(), self.dice.random());
        let node = &mut self.nodes[number];
        node.on = on;
        node.exchange = Exchange::new(node.version, seed, at);
        node.retry = Retry::new(1, seed);
        let (counted, confirmed) = node.limit.counted(at);
        node.limit = Limit::new(Some(LIMIT_DEFAULT), counted, confirmed, at);
        (node.asks, node.told_at, node.line) = (None, None, Line::Off(now));
        (node.announces_at, node.changed_at) = (now, now);
    }

    /// How long it takes until all that reach the controller have what it has; `None`: longer than that may take.
    fn converges(&mut self) -> Option<Duration> {
        let healed = self.now;
        let newest = self.controller.history.generation();
        while self.now < healed + CALM {
            let reach: Vec<_> = (0..self.nodes.len())
                .filter(|&node| self.reaches(node))
                .collect();
            let behind = |&&node: &&usize| self.nodes[node].position.generation.0 != newest;
            if reach.iter().filter(behind).count() == 0 {
                return Some(self.now - healed);
            }
            self.pass_until(self.now + Duration::from_millis(10));
            if self.now.subsec_millis() < 10 {
                self.question();
            }
        }
        None
    }
}

impl Node {
    fn adopt(
        &mut self,
        change: SyncResponse,
        signed: Option<SignedHead>,
        head: &Head,
        now: Duration,
    ) {
        assert_eq!(self.state.apply(change, Trust::Check), []);
        assert_eq!(head.check(self.state.resources()), Ok(()));
        assert!(head.version() >= self.version, "it went back");
        self.position = Position {
            store: head.store_id.clone(),
            epoch: head.epoch,
            generation: Generation(head.generation),
        };
        if self.version != head.version() {
            self.changed_at = now;
        }
        (self.version, self.head) = (head.version(), signed);
    }
}

/// What is done to the mesh, and when.
#[derive(Debug, Clone, Copy)]
enum Step {
    Change,
    Ask,
    Site(usize, bool),
    Controller(bool),
    Lan(usize, u8),
    Modem(usize, bool),
    Power(usize, bool),
}

fn plan(dice: &mut Xoshiro256PlusPlus) -> BTreeMap<(Duration, u32), Step> {
    let mut steps = BTreeMap::new();
    let mut count = 0;
    let mut add = |at: Duration, step| {
        count += 1;
        steps.insert((at, count), step);
    };
    let mut at = MINUTE;
    while at < MERGE - HOUR {
        add(at, Step::Change);
        at += dice.random_range(Duration::from_secs(1)..20 * MINUTE);
    }
    let mut at = MINUTE;
    while at < MERGE {
        add(at, Step::Ask);
        at += dice.random_range(Duration::from_secs(1)..20 * MINUTE);
    }
    add(CUT, Step::Site(1, false));
    add(MERGE, Step::Site(1, true));
    let mut span = |from: Duration, longest: Duration| {
        let begin = from + dice.random_range(Duration::ZERO..20 * HOUR);
        (begin, begin + dice.random_range(MINUTE..longest))
    };
    for day in 0..7 {
        let from = CUT + DAY * day;
        let (begin, end) = span(from, 2 * HOUR);
        add(begin, Step::Site(0, false));
        add(end, Step::Site(0, true));
        let (begin, end) = span(from, 2 * HOUR);
        add(begin, Step::Controller(false));
        add(end, Step::Controller(true));
        for site in 0..SITES {
            let first = site * NODES_PER_SITE;
            for node in [first + 1, first + 2] {
                let (begin, end) = span(from, 3 * HOUR);
                add(begin, Step::Lan(node, 1));
                add(end, Step::Lan(node, 0));
            }
            for node in [first, first + 1, first + 3] {
                let (begin, end) = span(from, 3 * HOUR);
                add(begin, Step::Power(node, false));
                add(end, Step::Power(node, true));
            }
        }
        // Once in a while one of those cut off has a way out of its own, and brings news home.
        let (begin, end) = span(from, 10 * MINUTE);
        let courier = NODES_PER_SITE + day as usize % NODES_PER_SITE;
        add(begin, Step::Modem(courier, true));
        add(end, Step::Modem(courier, false));
    }
    steps
}

#[test]
fn seven_days_cut_off_and_then_one_mesh_again_with_no_wrong_answer_and_no_lost_update() {
    let seeds = env::var("HOLDFAST_WEEK_SEEDS").map_or(SEEDS, |seeds| seeds.parse().unwrap());
    let (mut changes, mut questions, mut lost, mut brought) = (0, 0, 0, 0);
    let (mut wrong, mut converged) = (Vec::new(), Vec::new());
    for seed in 0..seeds {
        let mut world = World::new(seed);
        let mut dice = Xoshiro256PlusPlus::seed_from_u64(seed);
        let mut lives = 1;
        let mut cut_off_had = Version::default();
        for ((at, _), step) in plan(&mut dice) {
            world.pass_until(at.max(world.now));
            match step {
                Step::Change => world.change(),
                Step::Ask => world.question(),
                Step::Site(site, up) => world.site_up[site] = up,
                Step::Controller(up) => {
                    world.controller.up = up;
                    if up {
                        lives += 1;
                        let generation = world.controller.history.generation();
                        world.controller.lineage.begin(lives, generation);
                        world.controller.publish(world.now);
                    }
                }
                Step::Lan(node, lan) => {
                    world.nodes[node].lan = lan;
                    (world.nodes[node].announces_at, world.nodes[node].changed_at) = (at, at);
                }
                Step::Modem(node, up) => world.nodes[node].modem = up,
                Step::Power(node, on) => world.power(node, on),
            }
            let heals = matches!(step, Step::Site(_, true) | Step::Controller(true));
            match step {
                Step::Change | Step::Ask | Step::Lan(..) => {}
                Step::Site(..) | Step::Controller(_) | Step::Modem(..) | Step::Power(..) => {
                    world.network_changed();
                }
            }
            if matches!(step, Step::Site(1, false)) {
                cut_off_had = world.nodes[NODES_PER_SITE].version;
            }
            if matches!(step, Step::Site(1, true)) {
                let cut_off = &world.nodes[NODES_PER_SITE..];
                brought += cut_off
                    .iter()
                    .filter(|node| node.version > cut_off_had)
                    .count();
            }
            if heals && world.controller.up {
                let time = world.converges();
                lost += u64::from(time.is_none());
                converged.extend(time);
            }
        }
        // And nothing comes after that.
        let last = world.controller.history.generation();
        world.pass_until(world.now + HOUR);
        world.question();
        let at = world.at();
        for node in world.nodes.iter_mut().filter(|node| node.on) {
            lost += u64::from(node.position.generation.0 != last);
            assert_eq!(node.limit.standing(at), Standing::Counts);
        }
        changes += world.changes;
        questions += world.questions;
        wrong.append(&mut world.wrong);
    }
    let converged_ms: Vec<_> = converged.iter().map(Duration::as_millis).collect();
    println!(
        "week: {{\"seeds\": {seeds}, \"changes\": {changes}, \"questions\": {questions}, \"wrong_answers\": {}, \
         \"lost_updates\": {lost}, \"converged_ms\": {converged_ms:?}}}",
        wrong.len()
    );
    assert!(wrong.is_empty(), "{wrong:#?}");
    assert_eq!(lost, 0);
    assert!(brought > 0, "nobody of those cut off heard anything new");
    let slowest = converged.into_iter().max().unwrap();
    assert!(slowest <= CONVERGED, "{slowest:?}");
}
