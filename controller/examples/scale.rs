//! How long a change takes in the controller, and what it keeps in memory, at 10,000 services with ten
//! endpoints each and 1,000 agents: `cargo run -p mesh-controller --example scale`.
//!
//! Without sockets: what is measured is the work from an API server's event to the 1,000 answers.

use std::{
    fs,
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use k8s_openapi::api::{core::v1::Service, discovery::v1::EndpointSlice};
use mesh_controller::{
    cluster::{Event, KINDS},
    config::{KubernetesSettings, Settings},
    kubernetes::read,
    manifests::Kind,
    state::State,
};
use mesh_daemon::metrics::Listen;
use prost::Message as _;
use serde_json::{from_value, json};

const SERVICES: u32 = 10_000;
const ENDPOINTS: u32 = 10;
const AGENTS: usize = 1_000;
const CHANGES: u32 = 100;

fn main() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let state = State::open(settings(folder.path().to_owned()))?;
    let begun = Instant::now();
    for kind in KINDS {
        let mut events = vec![Event::ListBegins(kind)];
        for number in 0..SERVICES {
            if kind == Kind::Service {
                events.push(Event::Listed(read::service(service(number)?).into()));
            } else if kind == Kind::EndpointSlice {
                events.push(Event::Listed(read::slice(slice(number, 0)?).into()));
            }
        }
        events.push(Event::ListEnds(kind));
        state.hear(events);
    }
    println!(
        "first state: {:?}, {} MiB resident",
        begun.elapsed(),
        resident_mib()?
    );
    let full = state.since(None);
    println!(
        "full answer: {} KiB in {} resources",
        full.encoded_len() >> 10,
        full.set.len()
    );
    drop(full);

    let mut took = Vec::new();
    let mut bytes = 0;
    for change in 1..=CHANGES {
        let item = read::slice(slice(change * 97 % SERVICES, change)?);
        let had = *state.changes().borrow();
        let begun = Instant::now();
        state.hear(vec![Event::Set(item.into())]);
        let heard = begun.elapsed();
        for _ in 0..AGENTS {
            bytes = state.since(Some(had)).encode_to_vec().len();
        }
        took.push((begun.elapsed(), heard));
    }
    took.sort();
    let at = |share: usize| {
        took.get(took.len() * share / 100)
            .copied()
            .unwrap_or_default()
    };
    let (median, p99): ((Duration, Duration), (Duration, Duration)) = (at(50), at(99));
    println!(
        "a change, until {AGENTS} answers are made: median {:?}, p99 {:?}",
        median.0, p99.0
    );
    println!(
        "of which until it is published: median {:?}; {bytes} bytes for each agent",
        median.1
    );
    println!(
        "{} MiB resident, {} MiB at most",
        resident_mib()?,
        peak_mib()?
    );
    Ok(())
}

fn settings(folder: PathBuf) -> Settings {
    Settings {
        mesh_name: "demo".to_owned(),
        listen: ([127, 0, 0, 1], 0).into(),
        admin_socket: folder.join("admin.sock"),
        metrics: Listen(None),
        state_dir: folder,
        manifests: None,
        etcd: None,
        kubernetes: Some(KubernetesSettings {
            kubeconfig: None,
            namespace: "holdfast".to_owned(),
            agent_service_account: "mesh-agent".to_owned(),
            store: false,
            removal_grace_s: 300,
        }),
        tracing: None,
    }
}

fn service(number: u32) -> Result<Service> {
    let address = format!(
        "10.{}.{}.{}",
        96 + (number >> 16),
        (number >> 8) & 255,
        number & 255
    );
    Ok(from_value(json!({
        "metadata": {"name": format!("service-{number}"), "namespace": format!("namespace-{}", number % 100), "uid": number.to_string()},
        "spec": {"clusterIP": address, "clusterIPs": [address], "ports": [{"name": "http", "port": 80, "protocol": "TCP"}]},
    }))?)
}

fn slice(number: u32, change: u32) -> Result<EndpointSlice> {
    let endpoints = (0..ENDPOINTS).map(|index| {
        let host = number * ENDPOINTS + index;
        json!({
            "addresses": [format!("10.{}.{}.{}", 128 + (host >> 16), (host >> 8) & 255, host & 255)],
            "nodeName": format!("node-{}", host % 1000),
            "zone": "zone-a",
            "conditions": {"ready": index != change % ENDPOINTS || change == 0},
            "targetRef": {"kind": "Pod", "name": format!("service-{number}-{index}")},
        })
    });
    Ok(from_value(json!({
        "metadata": {
            "name": format!("service-{number}-abcde"),
            "namespace": format!("namespace-{}", number % 100),
            "uid": number.to_string(),
            "labels": {"kubernetes.io/service-name": format!("service-{number}")},
        },
        "addressType": "IPv4",
        "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}],
        "endpoints": endpoints.collect::<Vec<_>>(),
    }))?)
}

fn resident_mib() -> Result<u64> {
    status_mib("VmRSS:")
}

fn peak_mib() -> Result<u64> {
    status_mib("VmHWM:")
}

fn status_mib(name: &str) -> Result<u64> {
    let text = fs::read_to_string("/proc/self/status")?;
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    let number = line.and_then(|line| line.split_whitespace().next());
    Ok(number.context("no such line")?.parse::<u64>()? >> 10)
}
