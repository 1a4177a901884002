//! `cargo xtask bench services` with real namespaces, rules and programs: that every figure is there and can be
//! true. Never how large one is: this machine has other things to do.

#[cfg(test)]
mod common;

use crate::common::measured;

/// A case of each kind, each of which has all its figures.
const CASES: &str =
    "direct,holdfast-socket-1000,holdfast-packets-1,nftables-1,iptables-1,userspace-proxy";

#[test]
fn every_kind_of_way_is_measured_and_beside_the_direct_one() {
    let (lines, said) = measured("services", CASES);
    let find = |case: &str, metric: &str| {
        let mut of = lines.iter().filter(|line| line["case"] == case);
        of.find(|line| line["metric"] == metric)
    };
    for case in CASES.split(',') {
        for metric in ["connect", "first_byte", "rtt", "udp"] {
            let [median, high] =
                ["p50", "p99"].map(|share| find(case, &format!("{metric}_{share}")));
            if case == "userspace-proxy" && ["connect", "udp"].contains(&metric) {
                assert_eq!((median, high), (None, None));
                continue;
            }
            let [median, high] =
                [median, high].map(|figure| figure.unwrap()["median"].as_f64().unwrap());
            // No system call takes a tenth of a microsecond, and every answer came within the client's limit.
            assert!(
                0.1 < median && median <= high && high < 5e6,
                "{case} {metric}: {said}"
            );
        }
        for metric in ["tcp_1", "cpu_per_gb"] {
            assert!(
                find(case, metric).unwrap()["median"].as_f64() > Some(0.0),
                "{case} {metric}: {said}"
            );
        }
        let has_tables = !["direct", "userspace-proxy"].contains(&case);
        assert_eq!(find(case, "load").is_some(), has_tables, "{case}");
        if case != "direct" {
            assert!(find(case, "first_byte_p50").unwrap()["ratio"].as_f64() > Some(0.0));
        }
    }
    let judged = find("holdfast-socket-1000", "connect_p50").unwrap();
    assert_eq!(judged["must"], "<= 1.03 x direct");
    let unjudged = lines.last().unwrap()["unjudged"].to_string();
    assert!(unjudged.contains("services/holdfast-redirect-1/connect_p50 <= 0.95 x direct"));
}
