//! `cargo xtask bench paths` with real programs: that figures, verdicts and notes are there and can be true. Never how
//! large one is: this machine has other things to do. (The matrix and the rest are in `netns-tests/tests`.)

#[cfg(test)]
mod common;

use crate::common::measured;

#[test]
fn a_cut_and_a_narrow_line_are_measured_and_judged() {
    let (lines, said) = measured("paths", "direct-cut,mtu-1280");
    let figure = |case: &str, metric: &str| {
        let mut of = lines.iter().filter(|line| line["case"] == case);
        let found = of.find(|line| line["metric"] == metric);
        found
            .unwrap_or_else(|| panic!("no {metric} of {case}: {said}"))
            .clone()
    };
    let gap = figure("direct-cut", "gap");
    assert_eq!(
        (gap["runs"].as_u64(), gap["must"].as_str()),
        (Some(10), Some("p99 <= 1 s"))
    );
    // Nobody doubts a path sooner than 0.4 s after its last packet (`paths.md`), and traffic came back.
    let least = gap["min"].as_f64().unwrap();
    assert!((300.0..30_000.0).contains(&least), "{said}");
    assert_eq!(figure("direct-cut", "duplicates")["median"], 0.0);
    assert_eq!(figure("direct-cut", "tcp_broken")["median"], 0.0);
    assert_eq!(figure("mtu-1280", "missing_bytes")["ok"], true, "{said}");
    let noted = lines
        .iter()
        .any(|line| line["case"] == "direct-cut" && line["note"].is_string());
    assert!(noted, "{said}");
    let unjudged = lines.last().unwrap()["unjudged"].to_string();
    assert!(
        unjudged.contains("paths/nat-matrix/direct p99 <= 5 s"),
        "{unjudged}"
    );
}
