//! How a resolver does, and what it was told.

use mesh_api::admin::{
    DnsCacheEntry, DnsCacheRequest, DnsCacheResponse, DnsFlushRequest, DnsFlushResponse,
    DnsStatusResponse, DnsUpstream, Health,
};
use serde_json::json;
use tonic::Status;

use crate::{Lab, daemons::texts};

/// A name that somebody asked for.
pub(crate) const CACHED: &str = "clinic.example.org";

pub(crate) fn status(health: Health) -> DnsStatusResponse {
    let answers = DnsUpstream {
        address: "192.0.2.1:53".to_owned(),
        transport: "udp".to_owned(),
        state: "answers".to_owned(),
        mean_ms: Some(12.5),
        deviation_ms: Some(1.25),
        next_after_ms: 20.0,
        answered_ago_ms: Some(400),
        ..DnsUpstream::default()
    };
    let passed_over = DnsUpstream {
        domain: "corp.example.".to_owned(),
        address: "192.0.2.2:853".to_owned(),
        transport: "tls".to_owned(),
        state: "passed_over".to_owned(),
        next_after_ms: 250.0,
        passed_over_ms: Some(1_200),
        failures: 2,
        failed_ago_ms: Some(800),
        failure: "nothing came back in time".to_owned(),
        ..DnsUpstream::default()
    };
    let counts = |counts: &[(&str, u64)]| {
        let counts = counts.iter();
        counts
            .map(|(name, count)| ((*name).to_owned(), *count))
            .collect()
    };
    DnsStatusResponse {
        health: health.into(),
        problems: texts(&["the upstream 192.0.2.2:853 of corp.example. gives no answers"]),
        listen: texts(&["169.254.53.53:53"]),
        zones: texts(&["cluster.local", "mesh", "100.96.0.0/12"]),
        generation: Some(42),
        age_s: 3,
        upstreams: vec![answers, passed_over],
        counters: counts(&[("queries", 9), ("own", 4), ("stale", 0)]),
        drops: counts(&[("source", 2), ("short", 0)]),
        cached: 7,
        cached_max: 4096,
        stale_max_s: 86_400,
        allow_from: texts(&["172.17.0.0/16"]),
        leave_out_denied: true,
        query_log: false,
    }
}

pub(crate) fn cache(request: &DnsCacheRequest) -> DnsCacheResponse {
    let fresh = DnsCacheEntry {
        name: format!("{CACHED}."),
        r#type: "A".to_owned(),
        code: "NOERROR".to_owned(),
        records: texts(&["a 40 IN A 192.0.2.7", "a 40 IN A 192.0.2.8"]),
        records_left_out: 3,
        left_s: Some(40),
        stale_left_s: 140,
        hits: 5,
        dnssec_ok: true,
        ..DnsCacheEntry::default()
    };
    let stale = DnsCacheEntry {
        name: "gone.example.org.".to_owned(),
        r#type: "AAAA".to_owned(),
        code: "NXDOMAIN".to_owned(),
        stale_left_s: 7_200,
        ..DnsCacheEntry::default()
    };
    let mut entries = vec![fresh, stale];
    entries.retain(|one| one.name.contains(&request.name));
    let more = if request.entries_max == 0 { 0 } else { 10 };
    DnsCacheResponse {
        matching: entries.len() as u64 + more,
        entries,
    }
}

pub(crate) fn flush(request: &DnsFlushRequest) -> Result<DnsFlushResponse, Status> {
    match request.name.as_str() {
        "a..b" => Err(Status::invalid_argument("\"a..b\" is not a domain name")),
        "" => Ok(DnsFlushResponse { forgotten: 7 }),
        _ => Ok(DnsFlushResponse { forgotten: 1 }),
    }
}

#[tokio::test]
async fn the_resolver_s_state_has_a_stable_form_and_is_the_exit_code() {
    let lab = Lab::start(Health::Ok).await;
    let want = json!({
        "health": "ok",
        "problems": ["the upstream 192.0.2.2:853 of corp.example. gives no answers"],
        "listen": ["169.254.53.53:53"],
        "zones": ["cluster.local", "mesh", "100.96.0.0/12"],
        "generation": 42,
        "age_s": 3,
        "upstreams": [
            { "domain": null, "address": "192.0.2.1:53", "transport": "udp", "state": "answers",
              "mean_ms": 12.5, "deviation_ms": 1.25, "next_after_ms": 20.0, "passed_over_ms": null,
              "failures": 0, "answered_ago_ms": 400, "failed_ago_ms": null, "failure": null },
            { "domain": "corp.example.", "address": "192.0.2.2:853", "transport": "tls", "state": "passed_over",
              "mean_ms": null, "deviation_ms": null, "next_after_ms": 250.0, "passed_over_ms": 1200,
              "failures": 2, "answered_ago_ms": null, "failed_ago_ms": 800,
              "failure": "nothing came back in time" },
        ],
        "counters": { "queries": 9, "own": 4, "stale": 0 },
        "drops": { "source": 2, "short": 0 },
        "cached": 7,
        "cached_max": 4096,
        "stale_max_s": 86400,
        "allow_from": ["172.17.0.0/16"],
        "leave_out_denied": true,
        "query_log": false,
    });
    assert_eq!(lab.json("dns status").await, (0, want));
    let text = lab.run("dns status --watch 0.1 --rounds 2").await;
    for line in [
        "own names         cluster.local, mesh, 100.96.0.0/12 of generation 42, 3s old",
        "asked by          this node, and what is behind it, 172.17.0.0/16",
        "questions         4 own, 9 queries",
        "cache             7 of 4096 answers, given for 1d beyond their time",
        "192.0.2.1:53   udp  everything     answers",
        "192.0.2.2:853  tls  corp.example.  passed over, 1200 ms more  -",
    ] {
        let shown = text.out.matches(line).count();
        assert_eq!(shown, 2, "{line}: {}{}", text.out, text.err);
    }
    for (health, code) in [(Health::Degraded, 1), (Health::Down, 2)] {
        let lab = Lab::start(health).await;
        assert_eq!(lab.json("dns status").await.0, code);
    }
}

#[tokio::test]
async fn the_cache_is_shown_in_part_or_whole_and_forgotten_here_only() {
    let lab = Lab::start(Health::Ok).await;
    let want = json!({ "matching": 12, "entries": [
        { "name": "clinic.example.org.", "type": "A", "code": "NOERROR",
          "records": ["a 40 IN A 192.0.2.7", "a 40 IN A 192.0.2.8"], "records_left_out": 3,
          "left_s": 40, "stale_left_s": 140, "hits": 5, "dnssec_ok": true, "checking_disabled": false },
        { "name": "gone.example.org.", "type": "AAAA", "code": "NXDOMAIN",
          "records": [], "records_left_out": 0,
          "left_s": null, "stale_left_s": 7200, "hits": 0, "dnssec_ok": false, "checking_disabled": false },
    ]});
    assert_eq!(lab.json("dns cache").await, (0, want));
    let (_, all) = lab.json("dns cache clinic --all").await;
    assert_eq!(
        (&all["matching"], all["entries"].as_array().unwrap().len()),
        (&json!(1), 1)
    );
    let want = "NAME                 TYPE  CODE      HOLDS FOR           GIVEN  RECORDS\n\
                clinic.example.org.  A DO  NOERROR   40s                 5      a 40 IN A 192.0.2.7\n\
                \x20                                                               a 40 IN A 192.0.2.8\n\
                \x20                                                               and 3 more\n\
                gone.example.org.    AAAA  NXDOMAIN  over; stale for 2h  0\n\
                \nand 10 that were learnt before: `--all`\n";
    assert_eq!(lab.run("dns cache").await.out, want);
    let none = lab.run("dns cache nobody").await;
    assert_eq!(
        (none.code, none.out.as_str()),
        (0, "the cache has nothing of that\n")
    );

    assert_eq!(
        lab.json("dns cache --flush").await,
        (0, json!({ "forgotten": 7 }))
    );
    let one = lab.run("dns cache clinic.example.org --flush").await;
    assert_eq!(one.out, "forgot 1 answers\n");
    for wrong in [
        "dns cache a..b --flush",
        "dns cache --flush --all",
        "--node edge-b1 dns cache --flush",
    ] {
        let ran = lab.run(wrong).await;
        assert_eq!(ran.code, 64, "{wrong}: {}{}", ran.out, ran.err);
    }
    for read in ["dns cache", "dns status"] {
        assert_eq!(
            lab.run(&format!("--node edge-b1 {read}")).await.code,
            0,
            "{read}"
        );
    }
}
