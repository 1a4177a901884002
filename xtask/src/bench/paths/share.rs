//! What one client of a relay takes from another when it sends ten times what it may.

use std::{path::Path, thread, time::Duration};

use anyhow::{Result, anyhow, ensure};
use netns_tests::{
    load::{Offer, Way, offer, round_trips},
    matrix::path_in_use,
    tool,
};

use super::{SHARE_0, SHARE_1, SHARE_10, pairs};
use crate::bench::{Samples, percentile};

/// A node's share of each relay, in Mb/s: ten times that is what one core of a small machine seals, sends, takes and
/// opens without being full.
const SHARE_MBIT_PER_S: u32 = 4;

/// UDP payload of the greedy client's datagrams, and what they have on the relay's line: two headers of UDP and IPv4,
/// WireGuard's and the relay's.
const PAYLOAD_BYTES: usize = 1_000;
const ON_THE_LINE_BYTES: u32 = 1_000 + 28 + 32 + 8 + 28;

/// Round trips of one turn, one each 5 ms: the 99th percentile is the 10th from above.
const PROBES: u32 = 1_000;
const PROBE_EVERY: Duration = Duration::from_millis(5);

/// The greedy client begins before and ends after the other is measured.
const LEAD: Duration = Duration::from_millis(500);

/// Turns of each case in a round.
const TURNS: u32 = 2;

/// Measures the three in turns.
///
/// # Errors
///
/// If a node does not come up, or a path is not by a relay.
pub(super) fn measure(bins: &Path, rounds: u32, samples: &mut Samples) -> Result<()> {
    let limit = format!("client_rate_mbit_per_s = {SHARE_MBIT_PER_S}\n");
    let mesh = pairs::quiet(bins, 2, &limit)?;
    // Two pairs may choose two relays, and then share none.
    mesh.kill("far", "mesh-relay")?;
    let [greedy, modest] = [1, 2].map(|number| pairs::only_relays(&mesh, number));
    let [greedy, modest] = [greedy?, modest?];
    let names =
        |pair: &pairs::Pair| Ok::<_, anyhow::Error>([mesh.node(&pair.a)?, mesh.node(&pair.b)?]);
    let [[greedy_a, greedy_b], [modest_a, modest_b]] = [names(&greedy)?, names(&modest)?];
    let load = Way {
        from: &greedy_a,
        to: &greedy_b,
        address: greedy.address(&greedy.b),
    };
    let probed = Way {
        from: &modest_a,
        to: &modest_b,
        address: modest.address(&modest.b),
    };
    // Each wakes its path, and both have to go by the same relay.
    let same = || {
        round_trips(load, 20, PROBE_EVERY)?;
        round_trips(probed, 20, PROBE_EVERY)?;
        let paths = [(&greedy.a, &greedy.b), (&modest.a, &modest.b)].map(|(at, of)| {
            mesh.ask(at, &["path", "why", of])
                .map(|why| path_in_use(&why))
        });
        let [one, two] = paths;
        let (one, two) = (one?, two?);
        ensure!(
            one.starts_with("relay ") && one == two,
            "{one:?} and {two:?}"
        );
        Ok(one)
    };
    let relay = tool::eventually("both go by the same relay", Duration::from_secs(60), same)?;
    samples.note(
        SHARE_10,
        format!(
            "a share is {SHARE_MBIT_PER_S} Mb/s, set by client_rate_mbit_per_s; both by {relay}"
        ),
    );
    for turn in 1..=rounds * TURNS {
        for (case, shares) in [(SHARE_0, 0), (SHARE_1, 1), (SHARE_10, 10)] {
            eprintln!("{case}: turn {turn} of {}", rounds * TURNS);
            let times = beside(load, shares, || round_trips(probed, PROBES, PROBE_EVERY))?;
            let mut us: Vec<_> = times.iter().map(|time| time.as_secs_f64() * 1e6).collect();
            us.sort_by(f64::total_cmp);
            for (metric, share) in [("rtt_p50", 0.5), ("rtt_p99", 0.99)] {
                if let Some(time) = percentile(&us, share) {
                    samples.add(case, metric, "µs", time);
                }
            }
        }
    }
    Ok(())
}

/// Does this while so many shares are sent.
fn beside<T>(load: Way, shares: u32, measure: impl FnOnce() -> Result<T>) -> Result<T> {
    if shares == 0 {
        return measure();
    }
    let rate = f64::from(shares * SHARE_MBIT_PER_S) * 1e6 / f64::from(8 * ON_THE_LINE_BYTES);
    let wanted = Offer {
        payload_bytes: PAYLOAD_BYTES,
        rate: Some(rate),
        time: PROBE_EVERY * PROBES + 2 * LEAD,
    };
    thread::scope(|scope| {
        let sending = scope.spawn(|| offer(load, wanted));
        thread::sleep(LEAD);
        let measured = measure();
        let trial = sending
            .join()
            .map_err(|_| anyhow!("the sender panicked"))??;
        let came = trial.received as f64 / trial.sent as f64;
        eprintln!(
            "{shares} shares: {} sent, {:.0} % came",
            trial.sent,
            came * 100.0
        );
        measured
    })
}
