//! Seven days cut off and a merge, in virtual time: `mesh-controller`'s test of it, and what it says.

use anyhow::{Context as _, Result, ensure};
use serde::Deserialize;

use super::WEEK;
use crate::{bench::Samples, cargo};

/// How many.
const SEEDS: &str = "5";

/// Before what it says.
const SAYS: &str = "week: ";

/// What the test says; milliseconds of virtual time.
#[derive(Debug, Deserialize)]
struct Week {
    seeds: u64,
    changes: u64,
    questions: u64,
    wrong_answers: u64,
    lost_updates: u64,
    converged_ms: Vec<u64>,
}

/// Runs it.
///
/// # Errors
///
/// If it does not hold.
pub(super) fn measure(samples: &mut Samples) -> Result<()> {
    let words = [
        "test",
        "-p",
        "mesh-controller",
        "--test",
        "week",
        "--",
        "--nocapture",
    ];
    let run = cargo(&words).env("HOLDFAST_WEEK_SEEDS", SEEDS).output();
    let output = run.context("start cargo")?;
    let said = String::from_utf8_lossy(&output.stdout);
    ensure!(
        output.status.success(),
        "cargo {}: {said}{}",
        words.join(" "),
        String::from_utf8_lossy(&output.stderr)
    );
    let line = said.lines().find_map(|line| line.strip_prefix(SAYS));
    let week: Week = serde_json::from_str(line.context("it says nothing of the week")?)?;
    samples.add(WEEK, "wrong_answers", "", week.wrong_answers as f64);
    samples.add(WEEK, "lost_updates", "", week.lost_updates as f64);
    for ms in week.converged_ms {
        samples.add(WEEK, "converged", "ms", ms as f64);
    }
    let note = format!(
        "{} seeds, {} changes, {} questions of what a node says, in virtual time",
        week.seeds, week.changes, week.questions
    );
    samples.note(WEEK, note);
    Ok(())
}
