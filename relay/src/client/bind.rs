//! When a node uses plain UDP beside its QUIC link, and when it does not: pure decisions.
//!
//! ```text
//!   Waiting ──time──► Asking ──Bound──► Bound ──silent, or the relay does not know us──► Waiting
//!      ▲                 └──no answer──────────────────────────────────────────────────────┘
//! ```

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use mesh_wire::relay::udp::{BindKey, Tag, UdpFrame, ping_frame};
use rand::Rng;

/// Times between requests that are not answered, and after the last of them: UDP is taken to be
/// blocked after 3 s (`paths.md`), and both requests of a bind fit into that.
const ASK_GAPS: [Duration; 3] = [
    Duration::from_millis(200),
    Duration::from_millis(400),
    Duration::from_millis(800),
];

/// Time from the bind to the first ping, which makes the relay send the node's data by plain UDP:
/// by then the node's packet path knows what to do with it.
const FIRST_PING: Duration = Duration::from_millis(50);

/// Time between pings while packets go by the relay: with what follows, a dead path is left after
/// 1.7 s at most.
const PING_USED: Duration = Duration::from_secs(1);

/// Time between those of them that are as long as a full-size frame: an MTU that shrinks on the way loses
/// nothing else of the pings. 2 × 1,352 bytes in 5 s are 0.5 KB/s, while packets go by the relay.
const PING_FULL: Duration = Duration::from_secs(5);

/// How long that lasts after the last packet (`paths.md`, keepalive).
const USED_FOR: Duration = Duration::from_secs(45);

/// Time between pings otherwise: as on the QUIC link (`paths.md`, warm relay).
const PING_IDLE: Duration = Duration::from_secs(15);

/// Shortest time after which a ping is late (`paths.md`, suspect).
const LATE_MIN: Duration = Duration::from_millis(400);

/// Times after which the two further pings are late (`paths.md`, suspect).
const FAST_PROBES: [Duration; 2] = [Duration::from_millis(100), Duration::from_millis(200)];

/// Times until the next attempt (`paths.md`, retry direct).
const RETRY_AFTER: [Duration; 5] = [
    Duration::from_secs(5),
    Duration::from_secs(10),
    Duration::from_secs(20),
    Duration::from_secs(40),
    Duration::from_secs(60),
];

/// What has worked for so long has not failed before.
const GOOD_AFTER: Duration = Duration::from_secs(60);

/// Something must be done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Output {
    /// Send this from the node's port to the relay.
    Send(Vec<u8>),
    /// Send data by plain UDP from now on.
    Bound,
    /// Send data by the link from now on, and tell the relay: [`Control::Unbind`].
    ///
    /// [`Control::Unbind`]: mesh_wire::relay::Control::Unbind
    Unbound {
        /// Of the bind that is over.
        sequence: u64,
    },
}

/// The decisions for one link.
#[derive(Debug)]
pub(super) struct Binder<R> {
    key: BindKey,
    /// Length of a full-size data frame: what the path must carry.
    frame_len: usize,
    rng: R,
    sequence: u64,
    failures: usize,
    rtt: Option<Rtt>,
    used_until: Instant,
    /// When the next full-size ping is due, if packets go by the relay then.
    full_at: Instant,
    state: State,
    outputs: VecDeque<Output>,
}

#[derive(Debug)]
enum State {
    Waiting {
        until: Instant,
    },
    Asking {
        cookie: Option<Tag>,
        /// When this question was sent first.
        first: Instant,
        sent: Instant,
        tries: usize,
    },
    Bound {
        since: Instant,
        last_ping: Option<Instant>,
        ping: Option<Ping>,
    },
}

#[derive(Debug, Clone, Copy)]
struct Ping {
    txid: u64,
    /// Of the datagram, and so of its answer.
    len: usize,
    /// When it was sent first.
    first: Instant,
    tries: usize,
    late: Instant,
}

/// As TCP does it (RFC 6298 §2).
#[derive(Debug, Clone, Copy)]
struct Rtt {
    smoothed: Duration,
    variation: Duration,
}

impl Rtt {
    fn with(before: Option<Self>, sample: Duration) -> Self {
        match before {
            None => Self {
                smoothed: sample,
                variation: sample / 2,
            },
            Some(Self {
                smoothed,
                variation,
            }) => Self {
                smoothed: smoothed - smoothed / 8 + sample / 8,
                variation: variation - variation / 4 + smoothed.abs_diff(sample) / 4,
            },
        }
    }
}

impl<R: Rng> Binder<R> {
    /// Begins to ask at once.
    pub(super) fn new(key: BindKey, frame_len: usize, rng: R, now: Instant) -> Self {
        let mut binder = Self {
            key,
            frame_len,
            rng,
            sequence: 0,
            failures: 0,
            rtt: None,
            used_until: now + USED_FOR,
            full_at: now,
            state: State::Waiting { until: now },
            outputs: VecDeque::new(),
        };
        binder.ask(now);
        binder
    }

    /// A datagram came from the relay's address. `knows` says whether a session is one of ours.
    pub(super) fn handle_datagram(
        &mut self,
        datagram: &[u8],
        knows: impl Fn(mesh_wire::relay::Session) -> bool,
        now: Instant,
    ) {
        let Ok(frame) = UdpFrame::decode(datagram) else {
            return; // Anybody may send that.
        };
        match (frame, &mut self.state) {
            (
                UdpFrame::Cookie { sequence, cookie },
                State::Asking {
                    cookie: known @ None,
                    first,
                    sent,
                    tries,
                },
            ) if sequence == self.sequence => {
                *known = Some(cookie);
                (*first, *sent, *tries) = (now, now, 1);
                let request = self.key.bind(sequence, cookie, self.frame_len);
                self.outputs.push_back(Output::Send(request));
            }
            (UdpFrame::Bound(bound), &mut State::Asking { first, .. })
                if bound.sequence == self.sequence && self.key.confirms(&bound) =>
            {
                self.sample(first, now);
                self.full_at = now + PING_FULL; // The bind was as long.
                self.state = State::Bound {
                    since: now,
                    last_ping: None,
                    ping: None,
                };
                self.outputs.push_back(Output::Bound);
            }
            (UdpFrame::Pong { txid }, State::Bound { ping, .. }) => {
                if let Some(Ping { first, .. }) = ping.take_if(|ping| ping.txid == txid) {
                    self.sample(first, now);
                }
            }
            (UdpFrame::Unbound { session, echo }, State::Bound { ping, .. }) => {
                // Nobody else knows the number of a ping, or so easily a session.
                if ping.is_some_and(|ping| ping.txid == echo) || knows(session) {
                    self.fall_back(now);
                }
            }
            // What came late, what only nodes say, and data, which goes another way.
            (
                UdpFrame::Cookie { .. }
                | UdpFrame::Bound(_)
                | UdpFrame::Pong { .. }
                | UdpFrame::Unbound { .. }
                | UdpFrame::Data(_)
                | UdpFrame::Bind(_)
                | UdpFrame::Ping { .. },
                _,
            ) => {}
        }
    }

    /// Packets go by this relay, or should.
    pub(super) fn handle_used(&mut self, now: Instant) {
        self.used_until = now + USED_FOR;
    }

    /// The time of [`Self::poll_timeout`] has come.
    pub(super) fn handle_timeout(&mut self, now: Instant) {
        if now < self.poll_timeout() {
            return;
        }
        match self.state {
            State::Waiting { .. } => self.ask(now),
            State::Asking {
                cookie,
                first,
                tries,
                ..
            } if tries < ASK_GAPS.len() => {
                let request = match cookie {
                    Some(cookie) => self.key.bind(self.sequence, cookie, self.frame_len),
                    None => self.key.ask_for_cookie(self.sequence),
                };
                self.outputs.push_back(Output::Send(request));
                let (sent, tries) = (now, tries + 1);
                self.state = State::Asking {
                    cookie,
                    first,
                    sent,
                    tries,
                };
            }
            State::Asking { .. } => self.wait(now),
            State::Bound { since, ping, .. } => {
                let (txid, len, first, tries) = match ping {
                    None => (self.rng.next_u64(), self.ping_len(now), now, 0),
                    Some(Ping { tries, .. }) if tries > FAST_PROBES.len() => {
                        return self.fall_back(now);
                    }
                    Some(Ping {
                        txid,
                        len,
                        first,
                        tries,
                        ..
                    }) => (txid, len, first, tries),
                };
                self.outputs.push_back(Output::Send(ping_frame(txid, len)));
                let late = now + self.patience(tries);
                let tries = tries + 1;
                self.state = State::Bound {
                    since,
                    last_ping: Some(now),
                    ping: Some(Ping {
                        txid,
                        len,
                        first,
                        tries,
                        late,
                    }),
                };
            }
        }
    }

    /// When to call [`Self::handle_timeout`].
    pub(super) fn poll_timeout(&self) -> Instant {
        match &self.state {
            State::Waiting { until } => *until,
            State::Asking { sent, tries, .. } => {
                let gap = ASK_GAPS.get(tries.saturating_sub(1));
                *sent + gap.copied().unwrap_or_default()
            }
            State::Bound {
                ping: Some(ping), ..
            } => ping.late,
            State::Bound {
                since,
                last_ping: None,
                ..
            } => *since + FIRST_PING,
            State::Bound {
                last_ping: Some(last),
                ..
            } if *last + PING_USED <= self.used_until => *last + PING_USED,
            State::Bound {
                last_ping: Some(last),
                ..
            } => *last + PING_IDLE,
        }
    }

    /// The next thing to do.
    pub(super) fn poll_output(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    fn ask(&mut self, now: Instant) {
        self.sequence += 1;
        let request = self.key.ask_for_cookie(self.sequence);
        self.outputs.push_back(Output::Send(request));
        self.state = State::Asking {
            cookie: None,
            first: now,
            sent: now,
            tries: 1,
        };
    }

    /// How long the next ping is, in bytes.
    fn ping_len(&mut self, now: Instant) -> usize {
        if now < self.full_at || self.used_until < now {
            return 0; // As short as there are.
        }
        self.full_at = now + PING_FULL;
        self.frame_len
    }

    /// How long the ping that goes out after `tries` others may take.
    fn patience(&self, tries: usize) -> Duration {
        let (smoothed, variation) = self
            .rtt
            .map_or_else(Default::default, |rtt| (rtt.smoothed, rtt.variation));
        match tries
            .checked_sub(1)
            .and_then(|index| FAST_PROBES.get(index))
        {
            None => LATE_MIN.max(3 * smoothed + 4 * variation),
            Some(&fast) => fast.max(smoothed + 4 * variation),
        }
    }

    /// From the first of several questions: rather too long than too short, which would make the
    /// next one late too.
    fn sample(&mut self, first: Instant, now: Instant) {
        let sample = now.saturating_duration_since(first);
        self.rtt = Some(Rtt::with(self.rtt, sample));
    }

    /// Plain UDP stopped working. If that is news, the reason may be a NAT that maps us anew.
    fn fall_back(&mut self, now: Instant) {
        let sequence = self.sequence;
        self.outputs.push_back(Output::Unbound { sequence });
        if let State::Bound { since, .. } = self.state
            && now.saturating_duration_since(since) >= GOOD_AFTER
        {
            self.failures = 0;
        }
        if self.failures == 0 {
            self.failures = 1;
            self.ask(now);
        } else {
            self.wait(now);
        }
    }

    fn wait(&mut self, now: Instant) {
        let after = RETRY_AFTER.get(self.failures).or(RETRY_AFTER.last());
        let until = now + after.copied().unwrap_or_default();
        self.failures = (self.failures + 1).min(RETRY_AFTER.len());
        self.state = State::Waiting { until };
    }
}

#[cfg(test)]
mod tests {
    use mesh_core::{
        io::RelayTransport,
        relay_server::{Limits, LinkId, Output as RelayOutput, RelayServer, UdpPath},
    };
    use mesh_wire::{
        id::NodeId,
        relay::{Control, PROTOCOL_VERSION, Session, data_frame, udp::unbound_frame},
    };
    use rand::{SeedableRng as _, rngs::StdRng};

    use super::*;

    const FRAME_LEN: usize = 1320;
    const OURS: Session = Session {
        number: 3,
        epoch: 4,
    };

    /// A binder and the real relay's decisions, with a path between them, in virtual time.
    struct World {
        now: Instant,
        binder: Binder<StdRng>,
        relay: RelayServer,
        link: LinkId,
        /// The node's port as the NAT shows it.
        port: u16,
        rtt: Duration,
        /// Longest datagram that passes.
        mtu: usize,
        on_the_way: VecDeque<(Instant, Vec<u8>)>,
        sent: usize,
        bound: Vec<(bool, Duration)>,
        start: Instant,
    }

    impl World {
        fn new(rtt: Duration, mtu: usize) -> Self {
            let start = Instant::now();
            let mut relay = RelayServer::new(Limits::default(), &[5; 32], start);
            let ip = [198, 51, 100, 1].into();
            let (node, quic) = (NodeId([1; 32]), RelayTransport::Quic);
            let link = relay.handle_connected(node, quic, ip, PROTOCOL_VERSION, start);
            let link = link.unwrap();
            relay.handle_control(link, Control::AskBindKey);
            let said = std::iter::from_fn(|| relay.poll_output());
            let key = said.filter_map(|output| match output {
                RelayOutput::Send {
                    message: Control::BindKey(key),
                    ..
                } => Some(key),
                RelayOutput::Send { .. } | RelayOutput::Close { .. } => None,
            });
            let key = key.last().unwrap();
            let mut world = Self {
                now: start,
                binder: Binder::new(key, FRAME_LEN, StdRng::seed_from_u64(1), start),
                relay,
                link,
                port: 4000,
                rtt,
                mtu,
                on_the_way: VecDeque::new(),
                sent: 0,
                bound: Vec::new(),
                start,
            };
            world.perform();
            world
        }

        fn perform(&mut self) {
            while let Some(output) = self.binder.poll_output() {
                let elapsed = self.now - self.start;
                match output {
                    Output::Send(datagram) => self.send(&datagram),
                    Output::Bound => self.bound.push((true, elapsed)),
                    Output::Unbound { sequence } => {
                        self.bound.push((false, elapsed));
                        let unbind = Control::Unbind { sequence };
                        self.relay.handle_control(self.link, unbind);
                    }
                }
            }
        }

        fn send(&mut self, datagram: &[u8]) {
            self.sent += 1;
            if datagram.len() > self.mtu {
                return;
            }
            let path = UdpPath {
                remote: ([198, 51, 100, 1], self.port).into(),
                local: None,
            };
            let answer = self.relay.handle_udp(path, datagram, self.now).unwrap();
            if let Some(answer) = answer {
                self.on_the_way.push_back((self.now + self.rtt, answer));
            }
        }

        fn run_for(&mut self, time: Duration) {
            let end = self.now + time;
            loop {
                let timeout = self.binder.poll_timeout();
                let arrival = self.on_the_way.front().map(|(at, _)| *at);
                let next = arrival.map_or(timeout, |at| at.min(timeout));
                if next > end {
                    self.now = end;
                    return;
                }
                self.now = self.now.max(next);
                if arrival == Some(next) {
                    let (_, answer) = self.on_the_way.pop_front().unwrap();
                    let knows = |session| session == OURS;
                    self.binder.handle_datagram(&answer, knows, self.now);
                } else {
                    self.binder.handle_timeout(self.now);
                }
                self.perform();
            }
        }

        #[track_caller]
        fn expect_bound(&self, expected: &[(bool, u64)]) {
            let ms = |&(bound, at): &(bool, Duration)| (bound, at.as_millis());
            let bound: Vec<_> = self.bound.iter().map(ms).collect();
            let expected: Vec<_> = expected
                .iter()
                .map(|&(bound, at)| (bound, u128::from(at)))
                .collect();
            assert_eq!(bound, expected);
        }
    }

    const MS: Duration = Duration::from_millis(1);
    const S: Duration = Duration::from_secs(1);

    #[test]
    fn binding_takes_two_round_trips() {
        let mut world = World::new(40 * MS, 1500);
        world.run_for(100 * MS);
        world.expect_bound(&[(true, 80)]);
        assert_eq!(world.sent, 2);
    }

    #[test]
    fn a_round_trip_longer_than_the_gap_between_requests_does_not_matter() {
        let mut world = World::new(500 * MS, 1500);
        world.run_for(10 * S);
        world.expect_bound(&[(true, 1000)]);
    }

    #[test]
    fn a_path_that_loses_full_size_datagrams_is_never_bound() {
        let mut world = World::new(10 * MS, FRAME_LEN - 1);
        world.run_for(300 * S);
        world.expect_bound(&[]);
    }

    #[test]
    fn where_udp_is_blocked_few_datagrams_are_wasted() {
        let mut world = World::new(10 * MS, 0);
        world.run_for(600 * S);
        world.expect_bound(&[]);
        // After 1.4 s each: 5, 10, 20, 40, then every 60 s.
        assert_eq!(world.sent, 3 * (1 + 4 + 8));
    }

    #[test]
    fn pings_are_few_when_idle_and_each_second_when_used() {
        let mut world = World::new(10 * MS, 1500);
        world.run_for(46 * S);
        let busy = world.sent;
        assert!((46..=48).contains(&busy), "{busy}");
        world.run_for(60 * S);
        assert_eq!(world.sent, busy + 4);
        world.binder.handle_used(world.now);
        world.run_for(5 * S);
        assert!(world.sent >= busy + 4 + 5, "{}", world.sent);
        world.expect_bound(&[(true, 20)]);
    }

    #[test]
    fn a_path_that_dies_is_left_within_two_seconds_and_tried_again() {
        let mut world = World::new(10 * MS, 1500);
        world.run_for(100 * MS);
        world.mtu = 0;
        world.run_for(4 * S);
        // The ping of 1.07 s, 400, 100 and 200 ms.
        world.expect_bound(&[(true, 20), (false, 1770)]);
        world.mtu = 1500;
        world.run_for(12 * S);
        // Asked at once, until 3.17 s; then 10 s later.
        world.expect_bound(&[(true, 20), (false, 1770), (true, 13_190)]);
    }

    #[test]
    fn a_path_on_which_only_small_packets_pass_any_more_is_left() {
        let mut world = World::new(10 * MS, 1500);
        world.run_for(61 * S);
        world.expect_bound(&[(true, 20)]);
        world.mtu = FRAME_LEN - 1;
        world.run_for(30 * S);
        // Nobody uses it: nothing is lost, and nothing is sent to find out.
        world.expect_bound(&[(true, 20)]);
        world.binder.handle_used(world.now);
        world.run_for(20 * S);
        let [_, (false, left)] = world.bound[..] else {
            panic!("{:?}", world.bound);
        };
        assert!(left < 93 * S, "{left:?}");
        // In use all the time it takes as long as between two full-size pings.
        let mut world = World::new(10 * MS, 1500);
        world.run_for(7 * S);
        world.mtu = FRAME_LEN - 1;
        world.run_for(PING_FULL + 2 * S);
        assert_eq!(world.bound.len(), 2, "{:?}", world.bound);
    }

    #[test]
    fn late_answers_of_a_slow_path_are_waited_for() {
        for (before, after) in [(900, 1200), (300, 900)] {
            let mut world = World::new(before * MS, 1500);
            world.run_for(2 * S);
            world.rtt = after * MS;
            world.run_for(120 * S);
            world.expect_bound(&[(true, 2 * u64::from(before))]);
        }
    }

    #[test]
    fn a_nat_that_maps_anew_is_noticed_by_the_next_ping() {
        let mut world = World::new(10 * MS, 1500);
        world.run_for(S);
        world.port = 5000;
        world.run_for(S);
        world.expect_bound(&[(true, 20), (false, 1080), (true, 1100)]);
        world.port = 6000; // A NAT that does that all the time is not worth it.
        world.run_for(5 * S);
        world.expect_bound(&[(true, 20), (false, 1080), (true, 1100), (false, 2160)]);
    }

    #[test]
    fn who_is_not_the_relay_cannot_make_it_fall_back_or_believe_it_is_bound() {
        let mut world = World::new(10 * MS, 1500);
        let forged = BindKey {
            id: 0,
            key: [0; 32],
        };
        let request = match UdpFrame::decode(&forged.bind(1, [0; 32], FRAME_LEN)) {
            Ok(UdpFrame::Bind(bind)) => bind,
            other => panic!("{other:?}"),
        };
        let forged = forged.bound(&request);
        world.binder.handle_datagram(&forged, |_| true, world.now);
        world.perform();
        world.expect_bound(&[]);
        world.run_for(S);
        let other = Session { number: 0, ..OURS };
        for session in [other, OURS] {
            let unbound = unbound_frame(&data_frame(session, &[0; 32])).unwrap();
            let knows = |session| session == OURS;
            world.binder.handle_datagram(&unbound, knows, world.now);
            world.perform();
            let still_bound = session == other;
            assert_eq!(world.bound.len() == 1, still_bound);
        }
    }
}
