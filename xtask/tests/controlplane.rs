//! `cargo xtask bench controlplane` with real programs and a small cluster: that every figure is there and can be true.
//! Never how large one is: this machine has other things to do.

#[cfg(test)]
mod common;

use crate::common::measured;

const CASES: &str = "controller-1000,agent-2-peers,cni-mesh,cni-mesh-ipv4,cni-bridge-ipv4";

const CLUSTER: &[&str] = &[
    "ready",
    "first_answers",
    "first_answer",
    "idle_cpu",
    "change_p50",
    "change_p99",
    "change_max",
    "map_p50",
    "map_p99",
    "map_max",
    "change_message",
    "change_wire",
    "change_cpu",
    "resident",
    "resident_peak",
    "restarted",
    "restarted_wire",
    "join",
    "agent_resident",
];

#[test]
fn every_kind_of_case_is_measured() {
    let (lines, said) = measured("controlplane", CASES);
    let figure = |case: &str, metric: &str| {
        let mut of = lines.iter().filter(|line| line["case"] == case);
        let found = of.find(|line| line["metric"] == metric);
        let found = found.unwrap_or_else(|| panic!("no {metric} of {case}: {said}"));
        found["median"].as_f64().unwrap()
    };
    for metric in CLUSTER {
        assert!(figure("controller-1000", metric) >= 0.0, "{metric}");
    }
    let cluster = |metric: &str| figure("controller-1000", metric);
    // 100 services and 1,000 endpoints, none of which fits in 20 bytes; a change is ten of those and no more.
    assert!(cluster("first_answer") > 20.0, "{said}");
    let message = cluster("change_message");
    assert!((200.0..2_000.0).contains(&message), "{said}");
    assert!(cluster("change_wire") > message, "{said}");
    assert!(
        cluster("restarted_wire") < 1_024.0 * cluster("first_answer"),
        "{said}"
    );
    for of in ["change", "map"] {
        let at = ["p50", "p99", "max"].map(|share| cluster(format!("{of}_{share}").as_str()));
        // No message goes through three processes in a tenth of a millisecond.
        assert!(0.1 < at[0] && at[0] <= at[1] && at[1] <= at[2], "{said}");
    }
    for case in [
        "agent-2-peers",
        "cni-mesh",
        "cni-mesh-ipv4",
        "cni-bridge-ipv4",
    ] {
        let metric = if case == "agent-2-peers" {
            "resident"
        } else {
            "add_p50"
        };
        assert!(figure(case, metric) > 0.1, "{case}: {said}");
    }
    assert!(
        figure("cni-mesh", "add_p50") <= figure("cni-mesh", "all"),
        "{said}"
    );
    let judged = lines
        .iter()
        .find(|line| line["case"] == "cni-mesh" && line["metric"] == "add_p99");
    assert_eq!(judged.unwrap()["must"], "<= 100 ms");
    let unjudged = lines.last().unwrap()["unjudged"].to_string();
    assert!(
        unjudged.contains("controlplane/controller-100000/map_p99 <= 1 s"),
        "{unjudged}"
    );
}
