//! Which gateway is asked for what, and when; what peers are told. Pure: it gets the time with each call.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    fmt,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    time::{Duration, Instant},
};

use rand::{RngExt as _, SeedableRng as _, rngs::Xoshiro256PlusPlus};

use super::notice::Notice;

/// Default gateways that are asked, of each family; a machine with more has its reasons, and the first four will do.
pub const GATEWAYS_MAX: usize = 4;

/// For how long a mapping is asked. Short, so that a gateway forgets a machine that was switched off, and that a lost
/// mapping is made again by the next renewal where nobody said that it is lost; 300 bytes in five minutes cost nothing.
/// (RFC 6886 recommends two hours; RFC 6887, section 11.2.1, allows renewals every 4 s.)
pub const LIFETIME: Duration = Duration::from_secs(600);

/// A gateway that grants less is not worth the renewals: RFC 6887, section 15, has servers grant two minutes or more.
const LIFETIME_MIN: Duration = Duration::from_secs(60);

/// What is granted beyond this is taken for this.
const LIFETIME_MAX: Duration = Duration::from_secs(86_400);

/// Pauses after renewals without an answer, each of which was sent several times: then the gateway is another one, or gone,
/// and peers should not be sent to it any more.
const RENEW_PAUSES: [Duration; 2] = [Duration::from_secs(2), Duration::from_secs(8)];

/// After all protocols failed: 30 s, and twice as long each time, up to half an hour.
const REST_FIRST: Duration = Duration::from_secs(30);
const REST_MAX: Duration = Duration::from_secs(1_800);

/// How often, at most, a gateway's own news make it be asked again: anybody on the LAN could forge them, and an honest one
/// says them several times (RFC 6886, section 3.2.1; RFC 6887, section 14.1.1).
const NOTICE_EVERY: Duration = Duration::from_secs(10);

/// Outside ports that are tried with a gateway that leaves the choice to the asker.
const PORT_TRIES: u32 = 4;

/// The dynamic ports (RFC 6335, section 6).
const PORTS: std::ops::RangeInclusive<u16> = 49_152..=65_535;

/// By what a gateway is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Protocol {
    /// Port Control Protocol (RFC 6887).
    Pcp,
    /// NAT Port Mapping Protocol (RFC 6886).
    NatPmp,
    /// UPnP Internet Gateway Device: WANIPConnection, and WANIPv6FirewallControl.
    Upnp,
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Pcp => "PCP",
            Self::NatPmp => "NAT-PMP",
            Self::Upnp => "UPnP",
        })
    }
}

/// The most capable first; UPnP last, as it needs a search, and HTTP.
const ORDER: [Protocol; 3] = [Protocol::Pcp, Protocol::NatPmp, Protocol::Upnp];

/// The same for IPv6, of which NAT-PMP knows nothing (RFC 6886, section 1).
const ORDER_V6: [Protocol; 2] = [Protocol::Pcp, Protocol::Upnp];

/// A default gateway, and this machine as it sees it. One of IPv4 translates, and is asked for a port; one of IPv6 lets in
/// only what was asked for from inside (RFC 6092), and is asked for a pinhole. Both are a mapping here: of a pinhole the
/// outside address is the machine's own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Gateway {
    /// Where it is asked.
    pub address: IpAddr,
    /// The index of the interface that leads there.
    pub link: u32,
    /// This machine's address, as the gateway sees it.
    pub own: IpAddr,
}

impl Gateway {
    fn order(&self) -> &'static [Protocol] {
        match self.address {
            IpAddr::V4(_) => &ORDER,
            IpAddr::V6(_) => &ORDER_V6,
        }
    }

    /// Whether somebody outside could be kept from this machine by it. A public IPv4 address has no NAT before it; an IPv6
    /// address that is not global (RFC 4291, section 2.4, in the part that IANA gives out, 2000::/3) is of no use outside.
    fn is_worth_asking(&self) -> bool {
        match self.own {
            IpAddr::V4(_) => is_inside(self.own),
            IpAddr::V6(own) => own.segments()[0] & 0xe000 == 0x2000,
        }
    }
}

/// A question to a gateway. Answered once, by [`Machine::handle_answer`] with its number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ask {
    /// Which question.
    pub number: u64,
    /// Whom.
    pub gateway: Gateway,
    /// By what.
    pub protocol: Protocol,
    /// What makes the mapping this process' own (PCP).
    pub nonce: [u32; 3],
    /// The node's own port.
    pub inner_port: u16,
    /// The outside port that would be best.
    pub port: u16,
    /// For how long; zero: until it is taken back.
    pub lifetime: Duration,
}

/// What a gateway said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// There is a mapping now.
    Granted {
        /// Where others reach this machine.
        outside: SocketAddr,
        /// For how long.
        lifetime: Duration,
        /// For how long the gateway has kept its mappings, in seconds (PCP, NAT-PMP).
        epoch_s: Option<u32>,
    },
    /// Somebody else has the outside port.
    PortTaken,
    /// It grants mappings without end only.
    PermanentOnly,
    /// It does not want to, or does not speak this protocol.
    Refused(String),
    /// Nobody is at its port.
    Absent,
    /// Nothing.
    Silent,
}

/// Something must be done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Output {
    /// Ask a gateway.
    Ask(Ask),
    /// Give a mapping back: of all in it, the port is the outside one.
    Release(Ask),
    /// Tell the core that these are all outside addresses.
    Tell(Vec<SocketAddr>),
}

/// How it stands with a gateway, for people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// The gateway.
    pub gateway: IpAddr,
    /// What it granted.
    pub mapped: Option<(SocketAddr, Protocol)>,
    /// Why it did not, or what is wrong with what it granted.
    pub problem: String,
}

/// All gateways.
#[derive(Debug)]
pub struct Machine {
    port: u16,
    gateways: BTreeMap<Gateway, Entry>,
    told: Vec<SocketAddr>,
    number: u64,
    /// One for the life of the process: a gateway that comes back still knows the mapping as ours.
    nonce: [u32; 3],
    dice: Xoshiro256PlusPlus,
    out: VecDeque<Output>,
}

#[derive(Debug)]
struct Entry {
    state: State,
    /// What worked last: tried first.
    favourite: Option<Protocol>,
    rest: Duration,
    problem: String,
    noticed_at: Option<Instant>,
    /// It said that it started anew while it was asked: those that it refused before it was ready are asked again.
    again: bool,
}

#[derive(Debug)]
enum State {
    /// It is asked for a mapping.
    Asking {
        ask: Ask,
        /// How far in the order of protocols.
        turn: usize,
        /// Ports tried by this one.
        tries: u32,
    },
    /// There is one.
    Mapped(Held),
    /// All protocols failed.
    Resting { until: Instant },
}

#[derive(Debug)]
struct Held {
    /// What was granted: its port is the outside one.
    ask: Ask,
    outside: SocketAddr,
    /// Whether a renewal is on its way.
    asking: bool,
    renew_at: Instant,
    expires_at: Instant,
    /// The gateway's clock, and when it said so.
    epoch: Option<(u32, Instant)>,
    unanswered: usize,
}

impl Machine {
    /// Maps the UDP port `port` of this machine.
    #[must_use]
    pub fn new(port: u16, seed: u64) -> Self {
        let mut dice = Xoshiro256PlusPlus::seed_from_u64(seed);
        Self {
            port,
            gateways: BTreeMap::new(),
            told: Vec::new(),
            number: 0,
            nonce: dice.random(),
            dice,
            out: VecDeque::new(),
        }
    }

    /// The default gateways are now these. Those that were there before keep what they granted; what one granted that is
    /// gone, or to an address that is gone, is nothing any more. The network changed: who rested is asked at once.
    pub fn handle_gateways(&mut self, gateways: impl IntoIterator<Item = Gateway>, now: Instant) {
        let gateways = gateways.into_iter().filter(Gateway::is_worth_asking);
        let wanted: BTreeSet<_> = gateways.collect();
        let (v4, v6): (Vec<_>, Vec<_>) = wanted.iter().partition(|one| one.address.is_ipv4());
        let of_each = [v4, v6].map(|all| all.into_iter().take(GATEWAYS_MAX));
        let wanted: Vec<Gateway> = of_each.into_iter().flatten().collect();
        self.gateways.retain(|gateway, _| wanted.contains(gateway));
        for gateway in wanted {
            if let Some(entry) = self.gateways.get_mut(&gateway) {
                if let State::Resting { until } = &mut entry.state {
                    entry.rest = REST_FIRST;
                    *until = now;
                }
                continue;
            }
            let entry = Entry {
                state: State::Resting { until: now },
                favourite: None,
                rest: REST_FIRST,
                problem: String::new(),
                noticed_at: None,
                again: false,
            };
            self.gateways.insert(gateway, entry);
        }
        self.handle_timeout(now);
        self.tell();
    }

    /// The deadline that [`Self::poll_timeout`] gave has come.
    pub fn handle_timeout(&mut self, now: Instant) {
        let gateways: Vec<_> = self.gateways.keys().copied().collect();
        for gateway in gateways {
            let Some(entry) = self.gateways.get_mut(&gateway) else {
                continue;
            };
            match &mut entry.state {
                State::Asking { .. } => {}
                State::Resting { until } if *until <= now => self.begin(gateway, 0, now),
                State::Resting { .. } => {}
                State::Mapped(held) if held.expires_at <= now => self.begin(gateway, 0, now),
                State::Mapped(held) if held.renew_at <= now && !held.asking => {
                    held.asking = true;
                    self.number += 1;
                    held.ask.number = self.number;
                    self.out.push_back(Output::Ask(held.ask));
                }
                State::Mapped(_) => {}
            }
        }
        self.tell();
    }

    /// When to call [`Self::handle_timeout`].
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Instant> {
        let deadlines = self
            .gateways
            .values()
            .filter_map(|entry| match &entry.state {
                State::Asking { .. } => None,
                State::Resting { until } => Some(*until),
                State::Mapped(held) if held.asking => Some(held.expires_at),
                State::Mapped(held) => Some(held.renew_at.min(held.expires_at)),
            });
        deadlines.min()
    }

    /// What is to be done next.
    pub fn poll_output(&mut self) -> Option<Output> {
        self.out.pop_front()
    }

    /// The answer to the question `number`. One to a question that nobody asks any more means nothing.
    pub fn handle_answer(&mut self, number: u64, answer: Answer, now: Instant) {
        let asked = self.gateways.iter().find(|(_, entry)| entry.asks(number));
        let Some((&gateway, _)) = asked else {
            return;
        };
        let answer = match answer {
            Answer::Granted {
                outside, lifetime, ..
            } => match problem_of(outside, gateway.own, lifetime) {
                Some(problem) => Answer::Refused(problem),
                None => answer,
            },
            Answer::PortTaken
            | Answer::PermanentOnly
            | Answer::Refused(_)
            | Answer::Absent
            | Answer::Silent => answer,
        };
        let Some(entry) = self.gateways.get_mut(&gateway) else {
            return;
        };
        match (&mut entry.state, answer) {
            (
                State::Asking { ask, .. } | State::Mapped(Held { ask, .. }),
                Answer::Granted {
                    outside,
                    lifetime,
                    epoch_s,
                },
            ) => {
                let ask = Ask {
                    port: outside.port(),
                    ..*ask
                };
                entry.granted(ask, outside, lifetime.min(LIFETIME_MAX), epoch_s, now);
            }
            (State::Asking { tries, .. }, Answer::PortTaken) if *tries < PORT_TRIES => {
                *tries += 1;
                let port = self.dice.random_range(PORTS);
                self.ask_again(gateway, |ask| ask.port = port);
            }
            (State::Asking { ask, .. }, Answer::PermanentOnly) if !ask.lifetime.is_zero() => {
                self.ask_again(gateway, |ask| ask.lifetime = Duration::ZERO);
            }
            (State::Asking { ask, turn, .. }, answer) => {
                let (protocol, next) = (ask.protocol, *turn + 1);
                entry.note(protocol, &answer);
                self.begin(gateway, next, now);
            }
            (State::Mapped(held), Answer::Silent) if held.unanswered < RENEW_PAUSES.len() => {
                let pause = RENEW_PAUSES.get(held.unanswered).copied();
                held.unanswered += 1;
                held.asking = false;
                held.renew_at = now + pause.unwrap_or_default();
            }
            (State::Mapped(held), answer) => {
                let protocol = held.ask.protocol;
                entry.note(protocol, &answer);
                self.begin(gateway, 0, now);
            }
            (State::Resting { .. }, _) => {}
        }
        self.tell();
    }

    /// A gateway says that it started anew, or has another address (RFC 6886, section 3.2.1; RFC 6887, section 14.1).
    /// Nobody signs that: it makes it be asked, and nothing more. Its link's gateways of IPv6 are asked, too: one router is
    /// both, mostly, and its clock is one.
    pub fn handle_notice(&mut self, from: Ipv4Addr, notice: Notice, now: Instant) {
        let gateways = self.gateways.keys();
        let by_it = gateways.filter(|gateway| gateway.address == IpAddr::V4(from));
        let links: BTreeSet<u32> = by_it.map(|gateway| gateway.link).collect();
        let of_it = |(gateway, _): &(&Gateway, &mut Entry)| {
            let its_other_half = gateway.address.is_ipv6() && links.contains(&gateway.link);
            gateway.address == IpAddr::V4(from) || its_other_half
        };
        for (_, entry) in self.gateways.iter_mut().filter(of_it) {
            // What comes sooner is heeded then; what comes meanwhile says the same.
            let at = entry
                .noticed_at
                .map_or(now, |last| now.max(last + NOTICE_EVERY));
            if entry.noticed_at.is_some_and(|last| last > now) {
                continue;
            }
            match &mut entry.state {
                State::Asking { .. } if at > now => continue,
                State::Asking { .. } => entry.again = true,
                State::Resting { until } => *until = at.min(*until),
                State::Mapped(held) => {
                    let moved = match held.outside {
                        SocketAddr::V4(held) => notice.outside.is_some_and(|ip| ip != *held.ip()),
                        SocketAddr::V6(_) => false,
                    };
                    let restarted = held.epoch.is_none_or(|(epoch_s, at)| {
                        has_restarted(epoch_s, notice.epoch_s, now.saturating_duration_since(at))
                    });
                    if !moved && !restarted {
                        continue;
                    }
                    held.renew_at = at.min(held.renew_at);
                }
            }
            entry.noticed_at = Some(at);
        }
        self.handle_timeout(now);
    }

    /// The agent stops: what was granted is given back.
    pub fn shut_down(&mut self) {
        for (_, entry) in std::mem::take(&mut self.gateways) {
            if let State::Mapped(held) = entry.state {
                self.out.push_back(Output::Release(held.ask));
            }
        }
    }

    /// How it stands.
    pub fn reports(&self) -> impl Iterator<Item = Report> {
        self.gateways.iter().map(|(gateway, entry)| Report {
            gateway: gateway.address,
            mapped: match &entry.state {
                State::Mapped(held) => Some((held.outside, held.ask.protocol)),
                State::Asking { .. } | State::Resting { .. } => None,
            },
            problem: entry.problem.clone(),
        })
    }

    /// Asks by the protocol whose turn it is; rests if all had theirs.
    fn begin(&mut self, gateway: Gateway, turn: usize, now: Instant) {
        let Some(entry) = self.gateways.get_mut(&gateway) else {
            return;
        };
        let favourite = entry.favourite.into_iter();
        let others = gateway.order().iter().copied();
        let mut order = favourite.chain(others.filter(|one| Some(*one) != entry.favourite));
        if order.clone().count() <= turn && std::mem::take(&mut entry.again) {
            return self.begin(gateway, 0, now);
        }
        let Some(protocol) = order.nth(turn) else {
            let spread = self.dice.random_range(0.9..1.1);
            let until = now + entry.rest.mul_f64(spread);
            if entry.problem.is_empty() {
                entry.problem = speaks_none(gateway.order());
            }
            entry.rest = (entry.rest * 2).min(REST_MAX);
            entry.state = State::Resting { until };
            return;
        };
        if turn == 0 {
            entry.problem.clear();
        }
        self.number += 1;
        let ask = Ask {
            number: self.number,
            gateway,
            protocol,
            nonce: self.nonce,
            inner_port: self.port,
            port: self.port,
            lifetime: LIFETIME,
        };
        entry.state = State::Asking {
            ask,
            turn,
            tries: 1,
        };
        self.out.push_back(Output::Ask(ask));
    }

    fn ask_again(&mut self, gateway: Gateway, change: impl FnOnce(&mut Ask)) {
        self.number += 1;
        let entry = self.gateways.get_mut(&gateway);
        if let Some(State::Asking { ask, .. }) = entry.map(|entry| &mut entry.state) {
            change(ask);
            ask.number = self.number;
            self.out.push_back(Output::Ask(*ask));
        }
    }

    fn tell(&mut self) {
        let held = self
            .gateways
            .values()
            .filter_map(|entry| match &entry.state {
                State::Mapped(held) => Some(held.outside),
                State::Asking { .. } | State::Resting { .. } => None,
            });
        let held: Vec<_> = held.collect();
        if held != self.told {
            self.told.clone_from(&held);
            self.out.push_back(Output::Tell(held));
        }
    }
}

impl Entry {
    fn asks(&self, number: u64) -> bool {
        match &self.state {
            State::Asking { ask, .. } => ask.number == number,
            State::Mapped(held) => held.asking && held.ask.number == number,
            State::Resting { .. } => false,
        }
    }

    fn granted(
        &mut self,
        ask: Ask,
        outside: SocketAddr,
        lifetime: Duration,
        epoch_s: Option<u32>,
        now: Instant,
    ) {
        self.favourite = Some(ask.protocol);
        self.again = false;
        self.rest = REST_FIRST;
        self.problem = if is_inside(outside.ip()) {
            format!(
                "{} is behind another NAT: only who is before that one can call",
                outside.ip()
            )
        } else {
            String::new()
        };
        self.state = State::Mapped(Held {
            ask,
            outside,
            asking: false,
            renew_at: now + lifetime / 2,
            expires_at: now + lifetime,
            epoch: epoch_s.map(|epoch_s| (epoch_s, now)),
            unanswered: 0,
        });
    }

    /// Of those that say nothing there is nothing to tell: most routers speak one of them at most.
    fn note(&mut self, protocol: Protocol, answer: &Answer) {
        let problem = match answer {
            Answer::Granted { .. } | Answer::Absent | Answer::Silent => return,
            Answer::PortTaken => "all ports that were tried are taken",
            Answer::PermanentOnly => "refuses what it asked for",
            Answer::Refused(problem) => problem,
        };
        if !self.problem.is_empty() {
            self.problem.push_str("; ");
        }
        self.problem.push_str(&format!("{protocol}: {problem}"));
    }
}

fn speaks_none(of: &[Protocol]) -> String {
    let names: Vec<_> = of.iter().map(Protocol::to_string).collect();
    let names = names.join(", ");
    let names = match names.rsplit_once(", ") {
        Some((others, last)) => format!("{others} and {last}"),
        None => names,
    };
    format!("the router speaks none of {names}")
}

/// What makes a mapping useless. A private outside address (double NAT) does not: machines between the two NATs, such as
/// those of other tenants of the building or of the same carrier, are reached by it, and to all others it is no more than
/// one candidate that does not answer, as the private addresses are that every node tells.
fn problem_of(outside: SocketAddr, own: IpAddr, lifetime: Duration) -> Option<String> {
    let ip = outside.ip();
    if ip.is_ipv4() && ip == own {
        return Some(format!(
            "{ip} is this machine's own address: there is no NAT"
        ));
    }
    let special = match ip {
        IpAddr::V4(ip) => ip.is_link_local() || ip.octets()[0] >= 240,
        IpAddr::V6(ip) => ip.is_unicast_link_local(),
    };
    let unusable = special
        || ip.is_ipv4() != own.is_ipv4()
        || ip.is_unspecified()
        || ip.is_loopback()
        || ip.is_multicast()
        || outside.port() == 0;
    if unusable {
        return Some(format!("{outside} is no address to be called at"));
    }
    (lifetime < LIFETIME_MIN)
        .then(|| format!("a mapping for {lifetime:?} only, and {LIFETIME_MIN:?} is the least"))
}

/// Private (RFC 1918, RFC 4193), a carrier's (RFC 6598), or link-local.
fn is_inside(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => {
            let [a, b, ..] = ip.octets();
            ip.is_private() || ip.is_link_local() || (a == 100 && (64..128).contains(&b))
        }
        IpAddr::V6(ip) => ip.is_unique_local() || ip.is_unicast_link_local(),
    }
}

/// Whether a server whose clock stood at `before`, and at `after` when `elapsed` had gone by here, forgot everything in
/// between (RFC 6887, section 8.5).
fn has_restarted(before: u32, after: u32, elapsed: Duration) -> bool {
    let client = elapsed.as_secs();
    let (before, after) = (u64::from(before), u64::from(after));
    if after + 1 < before {
        return true;
    }
    let server = after.saturating_sub(before);
    client + 2 < server - server / 16 || server + 2 < client - client / 16
}

#[cfg(test)]
mod tests;
