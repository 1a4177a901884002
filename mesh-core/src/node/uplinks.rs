//! Which of a node's ways out is in use: hot standby by weight, metered ones only when they must be.
//!
//! One uplink carries everything at a time. The others, unless they are metered, are asked now and
//! then whether they still lead anywhere, so that the one that steps in is known to work. A way out
//! that has a carrier and leads nowhere is recognised by silence: something was doubted, and the
//! uplink itself does not answer either.

use std::{
    cmp::Reverse,
    collections::BTreeMap,
    net::SocketAddr,
    time::{Duration, Instant},
};

use mesh_wire::id::canonical;

use crate::io::{Output, Uplink, UplinkId};

/// Uplinks that count: more than an edge device has slots for. The rest is not used.
const UPLINKS_MAX: usize = 8;

/// How often a standby is asked: 15 s as a warm relay (`paths.md`), 28 bytes of STUN and back.
const ASK_EVERY: Duration = Duration::from_secs(15);

/// How often one that failed is asked whether it works again.
const ASK_FAILED_EVERY: Duration = Duration::from_secs(5);

/// Questions in a row without an answer that make a standby fail, and answers in a row that make
/// one that failed good again: a line that flickers does not get the traffic back at once.
const IN_A_ROW: u32 = 3;

/// Gaps between the questions to a doubted uplink; after the last one it has failed. With 0.45 s
/// until somebody doubts, traffic moves 1.5 s after the line died, without a word from the kernel.
const TEST_GAPS: [Duration; 3] = [
    Duration::from_millis(200),
    Duration::from_millis(300),
    Duration::from_millis(500),
];

#[derive(Debug)]
struct Known {
    uplink: Uplink,
    /// Since when it is taken to lead nowhere.
    failed_at: Option<Instant>,
    unanswered: u32,
    answers: u32,
    ask_at: Option<Instant>,
}

/// The uplinks of this node.
#[derive(Debug, Default)]
pub(crate) struct Uplinks {
    known: BTreeMap<UplinkId, Known>,
    active: Option<UplinkId>,
    /// Questions to the active uplink that were sent, and when the next is due.
    test: Option<(usize, Instant)>,
}

impl Uplinks {
    /// The uplinks are these now. Returns whether another one is active, or the same with other
    /// addresses.
    pub(crate) fn set(
        &mut self,
        uplinks: Vec<Uplink>,
        now: Instant,
        out: &mut dyn FnMut(Output),
    ) -> bool {
        let before = self.active().cloned();
        let works = |uplink: &Uplink| uplink.up && !uplink.addresses.is_empty();
        let stays = uplinks
            .iter()
            .any(|one| Some(one.id) == self.active && works(one));
        let mut known = BTreeMap::new();
        for mut uplink in uplinks.into_iter().take(UPLINKS_MAX) {
            for address in &mut uplink.addresses {
                *address = canonical(*address);
            }
            let id = uplink.id;
            // Another network behind the same socket is another chance.
            let old = self.known.remove(&id);
            let old = old.filter(|old| old.uplink.addresses == uplink.addresses && old.uplink.up);
            // A carrier is no way yet: a switch behind it may pass nothing for a while. While another
            // uplink works this one has to answer first; where asking costs, its turn comes when it must.
            let unproven = old.is_none() && stays && Some(id) != self.active && !uplink.metered;
            let failed_at = match &old {
                Some(old) => old.failed_at,
                None => unproven.then_some(now),
            };
            let ask_at = old.map_or(Some(now), |old| old.ask_at);
            let (unanswered, answers) = (0, 0);
            let one = Known {
                uplink,
                failed_at,
                unanswered,
                answers,
                ask_at,
            };
            known.insert(id, one);
        }
        self.known = known;
        self.choose(now, out);
        let (active, before) = (self.active(), before.as_ref());
        active.map(|uplink| (uplink.id, &uplink.addresses))
            != before.map(|uplink| (uplink.id, &uplink.addresses))
    }

    /// The one in use.
    pub(crate) fn active(&self) -> Option<&Uplink> {
        let active = self.known.get(&self.active?)?;
        Some(&active.uplink)
    }

    /// Whether what goes out costs.
    pub(crate) fn is_metered(&self) -> bool {
        self.active().is_some_and(|uplink| uplink.metered)
    }

    /// Something behind the active uplink fell silent: is it the uplink? Without another one it
    /// does not matter.
    pub(crate) fn doubt(&mut self, now: Instant) {
        let active = self.active;
        let other = |(id, known): (&UplinkId, &Known)| Some(*id) != active && known.is_there();
        if self.test.is_none() && active.is_some() && self.known.iter().any(other) {
            self.test = Some((0, now));
        }
    }

    /// An uplink answered. Returns whether another one is active now.
    pub(crate) fn on_answer(
        &mut self,
        id: UplinkId,
        now: Instant,
        out: &mut dyn FnMut(Output),
    ) -> bool {
        if Some(id) == self.active {
            self.test = None;
        }
        let Some(known) = self.known.get_mut(&id) else {
            return false;
        };
        known.unanswered = 0;
        known.answers += 1;
        if Some(id) == self.active || known.answers >= IN_A_ROW {
            known.failed_at = None;
        }
        self.choose(now, out)
    }

    /// Asks who is due; `targets`: whom by. Returns whether another one is active now.
    pub(crate) fn on_timeout(
        &mut self,
        targets: &[SocketAddr],
        now: Instant,
        out: &mut dyn FnMut(Output),
    ) -> bool {
        self.go_on_testing(targets, now, out);
        let active = self.active;
        for (&id, known) in &mut self.known {
            if Some(id) == active || !known.is_asked() {
                known.ask_at = None;
                known.unanswered = 0;
                continue;
            }
            if known.ask_at.is_some_and(|at| now < at) {
                continue;
            }
            if known.unanswered > 0 {
                known.answers = 0;
            }
            if known.unanswered >= IN_A_ROW {
                known.failed_at.get_or_insert(now);
            }
            known.unanswered += 1;
            let pause = match known.failed_at {
                // One that may have failed is asked quickly, too.
                None if known.unanswered <= 1 => ASK_EVERY,
                None | Some(_) => ASK_FAILED_EVERY,
            };
            known.ask_at = Some(now + pause);
            ask(&known.uplink, targets, out);
        }
        self.choose(now, out)
    }

    fn go_on_testing(&mut self, targets: &[SocketAddr], now: Instant, out: &mut dyn FnMut(Output)) {
        let Some((sent, next)) = self.test else {
            return;
        };
        if now < next {
            return;
        }
        let Some(known) = self.active.and_then(|id| self.known.get_mut(&id)) else {
            self.test = None;
            return;
        };
        match TEST_GAPS.get(sent) {
            Some(&gap) => {
                self.test = Some((sent + 1, now + gap));
                ask(&known.uplink, targets, out);
            }
            None => {
                self.test = None;
                known.failed_at = Some(now);
                (known.answers, known.ask_at) = (0, Some(now + ASK_FAILED_EVERY));
            }
        }
    }

    /// When [`Self::on_timeout`] has something to do.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        let asked = |(id, known): (&UplinkId, &Known)| {
            let at = known.ask_at.filter(|_| Some(*id) != self.active);
            at.filter(|_| known.is_asked())
        };
        let asks = self.known.iter().filter_map(asked).min();
        let test = self.test.map(|(_, next)| next);
        asks.into_iter().chain(test).min()
    }

    /// Settles which one is active. Returns whether it is another one.
    fn choose(&mut self, now: Instant, out: &mut dyn FnMut(Output)) -> bool {
        let key = |(id, known): &(&UplinkId, &Known)| {
            (
                // If all failed, the one that did longest ago gets another chance.
                known.failed_at,
                known.uplink.metered,
                Reverse(known.uplink.weight),
                Some(**id) != self.active,
                **id,
            )
        };
        let there = self.known.iter().filter(|(_, known)| known.is_there());
        let best = there.min_by_key(key).map(|(&id, _)| id);
        if best == self.active {
            return false;
        }
        let old = std::mem::replace(&mut self.active, best);
        self.test = None;
        if let Some(old) = old.and_then(|old| self.known.get_mut(&old)) {
            old.ask_at.get_or_insert(now + ASK_FAILED_EVERY);
        }
        if let Some(uplink) = best {
            out(Output::UseUplink { uplink });
        }
        true
    }
}

impl Known {
    /// Whether it could carry something.
    fn is_there(&self) -> bool {
        self.uplink.up && !self.uplink.addresses.is_empty()
    }

    /// Whether it is asked while it is a standby: never where that costs.
    fn is_asked(&self) -> bool {
        self.is_there() && !self.uplink.metered
    }
}

fn ask(uplink: &Uplink, targets: &[SocketAddr], out: &mut dyn FnMut(Output)) {
    let family = |target: &&SocketAddr| {
        let mut own = uplink.addresses.iter();
        own.any(|own| own.is_ipv4() == target.is_ipv4())
    };
    if let Some(&target) = targets.iter().find(family) {
        let uplink = uplink.id;
        out(Output::ProbeUplink { uplink, target });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::tests::at;

    const WIRED: UplinkId = UplinkId(2);
    const WIFI: UplinkId = UplinkId(3);
    const MOBILE: UplinkId = UplinkId(4);

    fn uplink(id: UplinkId, weight: u16, metered: bool) -> Uplink {
        let host = u8::try_from(id.0).unwrap();
        Uplink {
            id,
            addresses: vec![SocketAddr::new([10, 0, host, 2].into(), 51_820)],
            up: true,
            metered,
            weight,
        }
    }

    struct Bench {
        uplinks: Uplinks,
        /// Which uplinks lead somewhere.
        alive: Vec<UplinkId>,
        asked: Vec<(u128, UplinkId)>,
        used: Vec<(u128, UplinkId)>,
    }

    impl Bench {
        fn new(uplinks: Vec<Uplink>) -> Self {
            let alive = uplinks.iter().map(|uplink| uplink.id).collect();
            let mut bench = Self {
                uplinks: Uplinks::default(),
                alive,
                asked: Vec::new(),
                used: Vec::new(),
            };
            bench.act(0, |all, now, out| all.set(uplinks, now, out));
            bench
        }

        fn act(
            &mut self,
            ms: u64,
            act: impl FnOnce(&mut Uplinks, Instant, &mut dyn FnMut(Output)) -> bool,
        ) {
            let mut said = Vec::new();
            act(&mut self.uplinks, at(ms), &mut |output| said.push(output));
            for output in said {
                if let Output::UseUplink { uplink } = output {
                    self.used.push((ms.into(), uplink));
                } else if let Output::ProbeUplink { uplink, .. } = output {
                    self.asked.push((ms.into(), uplink));
                    if self.alive.contains(&uplink) {
                        self.answer(ms, uplink);
                    }
                } else {
                    panic!("{output:?}");
                }
            }
        }

        fn answer(&mut self, ms: u64, uplink: UplinkId) {
            let used = &mut self.used;
            self.uplinks.on_answer(uplink, at(ms), &mut |output| {
                if let Output::UseUplink { uplink } = output {
                    used.push((ms.into(), uplink));
                }
            });
        }

        fn run_to(&mut self, until_ms: u64) {
            let relay: SocketAddr = "192.0.2.1:3478".parse().unwrap();
            let mut turns = 0;
            while let Some(now) = self.uplinks.deadline().filter(|now| *now <= at(until_ms)) {
                let ms = u64::try_from(now.duration_since(at(0)).as_millis()).unwrap();
                self.act(ms, |all, now, out| all.on_timeout(&[relay], now, out));
                turns += 1;
                assert!(turns < 10_000, "spins");
            }
        }

        fn active(&self) -> Option<UplinkId> {
            self.uplinks.active().map(|uplink| uplink.id)
        }
    }

    fn three() -> Vec<Uplink> {
        vec![
            uplink(MOBILE, 100, true),
            uplink(WIFI, 10, false),
            uplink(WIRED, 50, false),
        ]
    }

    #[test]
    fn the_heaviest_that_costs_nothing_is_used_and_a_metered_one_is_never_asked() {
        let mut bench = Bench::new(three());
        assert_eq!(bench.active(), Some(WIRED));
        bench.run_to(600_000);
        assert!(bench.asked.iter().all(|(_, uplink)| *uplink == WIFI));
        assert!(
            (40..=42).contains(&bench.asked.len()),
            "{}",
            bench.asked.len()
        );
    }

    #[test]
    fn a_cable_that_is_pulled_moves_everything_at_once_and_back() {
        let mut bench = Bench::new(three());
        let mut pulled = three();
        pulled[2].up = false;
        bench.act(1_000, |all, now, out| all.set(pulled.clone(), now, out));
        pulled[1].addresses.clear();
        bench.act(2_000, |all, now, out| all.set(pulled, now, out));
        bench.act(3_000, |all, now, out| all.set(three(), now, out));
        let used = [(0, WIRED), (1_000, WIFI), (2_000, MOBILE)];
        assert_eq!(bench.used, used);
        // Back once they have answered, and not when the carrier came: three times, 5 s apart.
        bench.run_to(20_000);
        assert_eq!(bench.used[3..], [(13_000, WIRED)]);
    }

    #[test]
    fn a_line_that_leads_nowhere_is_left_within_a_second_and_taken_again_when_it_is_steady() {
        let mut bench = Bench::new(three());
        bench.run_to(100_000);
        bench.alive.retain(|uplink| *uplink != WIRED);
        bench.uplinks.doubt(at(100_000));
        bench.run_to(102_000);
        assert_eq!(bench.used.last(), Some(&(101_000, WIFI)));
        bench.run_to(200_000);
        assert_eq!(bench.active(), Some(WIFI), "it still does not answer");
        bench.alive.push(WIRED);
        bench.run_to(230_000);
        let back = bench.used.last().unwrap();
        assert!(
            back.1 == WIRED && (210_000..=220_000).contains(&back.0),
            "{back:?}"
        );
    }

    #[test]
    fn doubt_about_a_line_that_answers_changes_nothing() {
        let mut bench = Bench::new(three());
        bench.uplinks.doubt(at(1_000));
        bench.run_to(10_000);
        assert_eq!(bench.used, [(0, WIRED)]);
        // With nothing to turn to, nobody asks.
        let mut alone = Bench::new(vec![uplink(WIRED, 1, false)]);
        alone.alive.clear();
        alone.uplinks.doubt(at(1_000));
        alone.run_to(100_000);
        assert_eq!((alone.asked.len(), alone.used.len()), (0, 1));
    }

    #[test]
    fn a_standby_that_does_not_answer_is_not_turned_to() {
        let mut bench = Bench::new(three());
        bench.alive.retain(|uplink| *uplink != WIFI);
        bench.run_to(100_000);
        let mut pulled = three();
        pulled[2].up = false;
        bench.act(100_000, |all, now, out| all.set(pulled, now, out));
        assert_eq!(bench.active(), Some(MOBILE));
    }

    #[test]
    fn if_nothing_leads_anywhere_they_take_turns() {
        let mut bench = Bench::new(vec![uplink(WIRED, 50, false), uplink(MOBILE, 1, true)]);
        bench.alive.clear();
        for second in (1..20).step_by(3) {
            bench.uplinks.doubt(at(second * 1_000));
            bench.run_to(second * 1_000 + 2_000);
        }
        let used: Vec<UplinkId> = bench.used.iter().map(|(_, uplink)| *uplink).collect();
        assert_eq!(used[..4], [WIRED, MOBILE, WIRED, MOBILE]);
    }
}
