use proptest::prelude::*;

use super::*;
use crate::testing::start;

const SECOND: Duration = Duration::from_secs(1);

fn endpoint(last: u16) -> SocketAddr {
    let [high, low] = last.to_be_bytes();
    SocketAddr::from(([10, 42, high, low], 8080))
}

/// One endpoint, looked at once a second.
struct Lab {
    outliers: Outliers,
    counted: Failures,
    now: Instant,
}

impl Lab {
    fn new() -> Self {
        Self {
            outliers: Outliers::default(),
            counted: Failures::default(),
            now: start(),
        }
    }

    /// So many connects fail, then it is looked at; whether it is ejected.
    fn fail(&mut self, connects: u32) -> bool {
        self.counted.failed += u64::from(connects);
        self.counted.in_a_row += connects;
        self.look()
    }

    fn succeed(&mut self) -> bool {
        self.counted.in_a_row = 0;
        self.look()
    }

    fn look(&mut self) -> bool {
        self.now += SECOND;
        let counts = BTreeMap::from([(endpoint(1), self.counted)]);
        let forgotten = self.outliers.handle_counts(&counts, self.now);
        if !forgotten.is_empty() {
            self.counted = Failures::default();
        }
        self.outliers.ejected().contains(&endpoint(1))
    }

    /// Seconds until it is not ejected any more.
    fn seconds_out(&mut self) -> u64 {
        (1..).find(|_| !self.look()).unwrap()
    }
}

#[test]
fn failures_in_a_row_eject_and_a_success_between_them_does_not() {
    let mut lab = Lab::new();
    for _ in 0..10 {
        assert!(!lab.fail(FAILURES_MAX - 1));
        assert!(!lab.succeed());
    }
    assert!(!lab.fail(FAILURES_MAX - 1));
    assert!(lab.fail(1));
}

#[test]
fn each_trial_that_fails_doubles_the_time_out_up_to_a_bound() {
    let mut lab = Lab::new();
    assert!(lab.fail(FAILURES_MAX));
    for out in [10, 20, 40, 80, 160, 300, 300] {
        assert_eq!(lab.seconds_out(), out);
        assert!(!lab.look(), "nobody tried it yet");
        assert!(lab.fail(1));
    }
}

#[test]
fn a_trial_that_goes_well_lets_it_in_as_if_nothing_had_been() {
    let mut lab = Lab::new();
    assert!(lab.fail(FAILURES_MAX));
    lab.seconds_out();
    assert!(lab.fail(1));
    lab.seconds_out();
    assert!(!lab.succeed());
    assert!(!lab.fail(FAILURES_MAX - 1));
    assert!(lab.fail(1));
    assert_eq!(lab.seconds_out(), 10);
    // A success, and then a failure, between two looks.
    lab.counted.in_a_row = 0;
    assert!(!lab.fail(1));
}

#[test]
fn what_fails_while_it_is_out_began_before() {
    let mut lab = Lab::new();
    assert!(lab.fail(FAILURES_MAX));
    assert!(lab.fail(3));
    assert_eq!(lab.seconds_out(), 9);
    assert!(!lab.look());
}

#[test]
fn a_trial_that_nobody_makes_is_forgotten() {
    let mut lab = Lab::new();
    assert!(lab.fail(FAILURES_MAX));
    lab.seconds_out();
    for _ in 0..FORGET.as_secs() {
        assert!(!lab.look());
    }
    assert_eq!(lab.counted, Failures::default());
}

#[test]
fn at_the_limit_others_are_not_ejected_until_one_is_forgotten() {
    let mut outliers = Outliers::default();
    let now = start();
    let bad = Failures {
        failed: 5,
        in_a_row: FAILURES_MAX,
    };
    let most = u16::try_from(OUTLIERS_MAX).unwrap();
    let mut counts: BTreeMap<_, _> = (0..=most).map(|last| (endpoint(last), bad)).collect();
    let forgotten = outliers.handle_counts(&counts, now);
    assert_eq!(outliers.ejected().len(), OUTLIERS_MAX);
    assert_eq!(forgotten, BTreeSet::new());
    assert!(!outliers.ejected().contains(&endpoint(most)));
    counts.insert(endpoint(0), Failures { in_a_row: 0, ..bad });
    for seconds in [10, 11] {
        outliers.handle_counts(&counts, now + SECOND * seconds);
    }
    counts.retain(|at, _| *at == endpoint(most));
    outliers.handle_counts(&counts, now + SECOND * 12);
    outliers.handle_counts(&counts, now + SECOND * 13);
    assert!(outliers.ejected().contains(&endpoint(most)));
}

#[test]
fn connects_are_counted_now_and_then_and_all_the_time_while_one_is_suspicious() {
    let mut lab = Lab::new();
    let watched = (0..20).filter(|_| {
        lab.look();
        lab.outliers.watches()
    });
    assert_eq!(watched.count(), 4);
    lab.fail(1);
    for _ in 1..FORGET.as_secs() {
        lab.look();
        assert!(lab.outliers.watches());
    }
    let watched = (0..20).filter(|_| {
        lab.look();
        lab.outliers.watches()
    });
    assert!(watched.count() < 6);
}

proptest! {
    /// Whatever happens, nobody is out for more than the longest time without being tried.
    #[test]
    fn nobody_stays_out(steps in prop::collection::vec((0_u32..9, any::<bool>(), 0_u64..400), 1..60)) {
        let mut lab = Lab::new();
        let mut out_since = None;
        for (connects, well, seconds) in steps {
            lab.now += SECOND * u32::try_from(seconds).unwrap();
            if well {
                lab.counted.in_a_row = 0;
            }
            let is_out = lab.fail(connects);
            out_since = is_out.then(|| out_since.unwrap_or(lab.now));
            if let Some(since) = out_since {
                prop_assert!(lab.now - since <= EJECTION_MAX);
            }
        }
    }
}
