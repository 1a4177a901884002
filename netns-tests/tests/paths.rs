//! Paths that never let go: the rows of issue 6 that no other scenario has, in small. `cargo xtask bench paths`
//! measures them.

use std::{
    net::Ipv4Addr,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use netns_tests::{
    link::Impairment,
    load::{ROUND_TRIP_MAX, Way, round_trips},
    matrix::path_in_use,
    mesh::{Mesh, word},
    nat::NatKind,
    stream::{Traffic, transfer},
    tool,
};

/// Until a path is as it has to be.
const SOON: Duration = Duration::from_secs(40);

/// The issue asks for 1 s and 500 ms, and the bench judges by that; here other tests may run beside it.
const BACK_WITHIN: Duration = Duration::from_secs(4);

const EVERY: Duration = Duration::from_millis(10);

const A: Ipv4Addr = Ipv4Addr::new(100, 96, 1, 1);
const B: Ipv4Addr = Ipv4Addr::new(100, 96, 2, 1);

/// Site A may speak with the cloud alone.
const ONLY_CLOUD: &str = "table inet only\ndelete table inet only\ntable inet only { chain forward { type filter hook \
                          forward priority -20; oifname \"wan\" ip daddr != 198.51.100.10 drop; \
                          iifname \"wan\" ip saddr != 198.51.100.10 drop; }; }\n";

/// Between `edge-a1` and `edge-b1`.
fn traffic(mesh: &Mesh) -> Result<Traffic> {
    let [a, b] = [mesh.node("edge-a1")?, mesh.node("edge-b1")?];
    Traffic::start([&a, &b], [A, B], EVERY)
}

/// Waits until everything flows again, and says for how long no datagrams came.
fn gap(traffic: &Traffic, since: Instant) -> Result<Duration> {
    std::thread::sleep((since + Duration::from_secs(2)).saturating_duration_since(Instant::now()));
    traffic.flows(SOON)?;
    traffic.unharmed()?;
    Ok(traffic.gaps(since).datagrams())
}

fn is(mesh: &Mesh, state: &str) -> Result<()> {
    tool::eventually(state, SOON, || {
        for (at, of) in [("edge-a1", "edge-b1"), ("edge-b1", "edge-a1")] {
            let why = mesh.ask(at, &["path", "why", of])?;
            ensure!(word(&why, "state") == state, "{why}");
        }
        Ok(())
    })
}

/// Traffic of three kinds goes on over a cut, a new address on the LAN and a new public one, and nothing comes twice.
#[test]
fn traffic_goes_on_over_a_cut_and_over_new_addresses_and_nothing_comes_twice() -> Result<()> {
    let mesh = Mesh::two_sites()?;
    let traffic = traffic(&mesh)?;
    let site = mesh.site("site-a")?;
    let internet = mesh.lab().internet();
    let changes: [(&str, &dyn Fn() -> Result<()>); 3] = [
        ("a cut", &|| tool::nft(site.router().netns(), ONLY_CLOUD)),
        ("a new address", &|| {
            site.renumber(&mesh.node("edge-a1")?, [192, 168, 1, 200].into())
        }),
        ("a new public address", &|| {
            site.set_wan(internet, [203, 0, 113, 77].into())
        }),
    ];
    for (what, change) in changes {
        is(&mesh, "direct")?;
        let since = Instant::now();
        change()?;
        let gap = gap(&traffic, since).with_context(|| format!("after {what}"))?;
        ensure!(gap < BACK_WITHIN, "{gap:?} of silence after {what}");
        tool::nft(
            site.router().netns(),
            "table inet only\ndelete table inet only\n",
        )?;
    }
    mesh.ends_well()
}

/// The relay in use is killed; the other is warm, and traffic that has no direct path goes on by it.
#[test]
fn a_killed_relay_is_left_for_the_warm_one() -> Result<()> {
    let bins = tool::binary("lab")?;
    let manifests = tempfile::tempdir()?;
    let manifest = "apiVersion: mesh.holdfast.dev/v1alpha1\nkind: MeshRelay\nmetadata: {name: cloud-relay}\nspec: \
                    {addresses: [198.51.100.10]}\n---\napiVersion: mesh.holdfast.dev/v1alpha1\nkind: MeshRelay\nmetadata: \
                    {name: far-relay}\nspec: {addresses: [198.51.101.20]}\n---\napiVersion: mesh.holdfast.dev/v1alpha1\n\
                    kind: MeshNode\nmetadata: {name: edge-a1}\nspec: {overlayIPv4: 100.96.1.1}\n---\napiVersion: \
                    mesh.holdfast.dev/v1alpha1\nkind: MeshNode\nmetadata: {name: edge-b1}\nspec: {overlayIPv4: 100.96.2.1}\n";
    std::fs::write(manifests.path().join("mesh.yaml"), manifest)?;
    let mut mesh = Mesh::start(bins.parent().context("a folder")?, manifests.path())?;
    let far = mesh.lab().public_node("far", [198, 51, 101, 20].into())?;
    mesh.start_relay()?;
    mesh.start_relay_on(&far, "far-relay", "")?;
    let link = Impairment::delay_loss(Duration::from_millis(10), 0.0);
    for (site, last, host) in [("site-a", 1, "edge-a1"), ("site-b", 2, "edge-b1")] {
        let wan = [203, 0, 113, last].into();
        mesh.add_site(site, NatKind::SymmetricRandom, wan, link, &[host])?;
        mesh.start_agent(host)?;
    }
    ["edge-a1", "edge-b1"]
        .iter()
        .try_for_each(|host| mesh.agent_ready(host, 2))?;
    let traffic = traffic(&mesh)?;
    is(&mesh, "relayed")?;
    for host in ["edge-a1", "edge-b1"] {
        tool::eventually("both relays are warm", SOON, || {
            let status = mesh.status(host)?;
            for relay in ["/relays/0/transport", "/relays/1/transport"] {
                ensure!(
                    status.pointer(relay).is_some_and(|said| said.is_string()),
                    "{status}"
                );
            }
            Ok(())
        })?;
    }
    let path = path_in_use(&mesh.ask("edge-a1", &["path", "why", "edge-b1"])?);
    let node = if path.contains("far-relay") {
        "far"
    } else {
        "cloud"
    };
    let since = Instant::now();
    mesh.kill(node, "mesh-relay")?;
    let gap = gap(&traffic, since)?;
    ensure!(gap < BACK_WITHIN, "{gap:?} of silence by {path}");
    let now = path_in_use(&mesh.ask("edge-a1", &["path", "why", "edge-b1"])?);
    ensure!(now != path, "still by {now}");
    mesh.ends_well()
}

/// UDP sockets of a host, of both families.
fn udp_sockets(mesh: &Mesh, host: &str) -> Result<usize> {
    let lines = mesh.node(host)?.run(&["ss", "-Huan"], SOON)?.ok()?;
    Ok(lines.lines().count())
}

/// One behind a NAT whose ports nobody can guess, one whose NAT lets in only what was written to: with sockets and guesses of
/// both they find a direct path, which carries traffic, and keep one socket for it.
#[test]
fn an_easy_and_a_hard_nat_become_direct_by_a_burst_of_sockets() -> Result<()> {
    const BURSTS: &str = "hard_nat_bursts = true\nport_mapping = false\nservices = false\n";
    const HOSTS: [&str; 2] = ["edge-a1", "edge-b1"];
    // A round of probes that are in vain, 7 s of guesses, and as much again.
    const BURST: Duration = Duration::from_secs(40);
    let mut mesh = Mesh::demo()?;
    let link = Impairment::delay_loss(Duration::from_millis(10), 0.0);
    let kinds = [NatKind::SymmetricRandom, NatKind::PortRestricted];
    for ((site, last, host), kind) in [("site-a", 1, HOSTS[0]), ("site-b", 2, HOSTS[1])]
        .into_iter()
        .zip(kinds)
    {
        mesh.add_site(site, kind, [203, 0, 113, last].into(), link, &[host])?;
        mesh.start_agent_with(host, BURSTS)?;
    }
    HOSTS
        .iter()
        .try_for_each(|host| mesh.agent_ready(host, 2))?;
    let before = udp_sockets(&mesh, HOSTS[0])?;
    // One burst of sixty finds nothing (1.7 %, `mesh_core`'s arithmetic), and the next comes after five minutes:
    // then the agents begin anew. Three in a row are one run of 200,000.
    let mut most = 0;
    let mut burst = || -> Result<(Traffic, Duration)> {
        let traffic = traffic(&mesh)?;
        let since = Instant::now();
        loop {
            most = most.max(udp_sockets(&mesh, HOSTS[0])?);
            let whys = [(HOSTS[0], HOSTS[1]), (HOSTS[1], HOSTS[0])]
                .map(|(at, of)| mesh.ask(at, &["path", "why", of]));
            let [a, b] = [&whys[0], &whys[1]].map(|why| match why {
                Ok(why) => word(why, "state"),
                Err(error) => error.to_string(),
            });
            if a == "direct" && b == "direct" {
                return Ok((traffic, since.elapsed()));
            }
            ensure!(since.elapsed() < BURST, "{a}, {b}: {whys:?}");
            std::thread::sleep(Duration::from_millis(200));
        }
    };
    let mut found = burst();
    for _ in 0..2 {
        if found.is_ok() {
            break;
        }
        for host in HOSTS {
            mesh.kill(host, "mesh-agent")?;
            mesh.start_agent_with(host, BURSTS)?;
            mesh.agent_ready(host, 2)?;
        }
        found = burst();
    }
    let (traffic, took) = found?;
    println!("direct after {took:?}; {most} sockets at most, {before} before");
    ensure!(most > before + 200, "{most} sockets, {before} before");
    tool::eventually("the others are closed", SOON, || {
        let now = udp_sockets(&mesh, HOSTS[0])?;
        ensure!(now <= before + 8, "{now} sockets, {before} before");
        Ok(())
    })?;
    is(&mesh, "direct")?;
    traffic.unharmed()?;
    let [from, to] = [mesh.node(HOSTS[0])?, mesh.node(HOSTS[1])?];
    for (from, to, address) in [(&from, &to, B), (&to, &from, A)] {
        transfer(Way { from, to, address }, 5_000_000, SOON)?;
    }
    is(&mesh, "direct")?;
    mesh.ends_well()
}

/// Nobody tells that packets are too big, and in the second turn fragments vanish too: nodes join, find out, and every
/// byte arrives.
#[test]
fn nodes_join_and_5_mb_arrive_where_1280_bytes_pass_and_nobody_says_so() -> Result<()> {
    let whole = "table ip whole { chain raw { type filter hook prerouting priority -450; ip frag-off & 0x3fff != 0 \
                 drop; }; }\n";
    for fragments in [true, false] {
        let mut mesh = Mesh::demo()?;
        mesh.add_two_sites(Impairment::NONE, &["edge-a1"], &["edge-b1"])?;
        let site = mesh.site("site-a")?;
        site.narrow(mesh.lab().internet(), 1_280)?;
        if !fragments {
            tool::nft(mesh.lab().internet().netns(), whole)?;
            tool::nft(site.router().netns(), whole)?;
        }
        for host in ["edge-a1", "edge-b1"] {
            mesh.start_agent(host)?;
        }
        ["edge-a1", "edge-b1"]
            .iter()
            .try_for_each(|host| mesh.agent_ready(host, 2))?;
        let [from, to] = [mesh.node("edge-a1")?, mesh.node("edge-b1")?];
        for (from, to, address) in [(&from, &to, B), (&to, &from, A)] {
            let way = Way { from, to, address };
            transfer(way, 5_000_000, SOON)
                .with_context(|| format!("fragments pass: {fragments}"))?;
        }
        mesh.ends_well()?;
    }
    Ok(())
}

/// A tenth of all frames vanish in bursts, round trips take 200 ms, and 1 Mb/s pass: the tunnel holds, names are
/// answered, and a service is.
#[test]
fn a_tunnel_over_a_bad_line_holds_with_names_and_services() -> Result<()> {
    let mesh = Mesh::two_sites()?;
    mesh.serve("edge-b1", "inventory", &["http", "edge-b1", "[::]:8080"])?;
    let inventory = "inventory.shop.svc.cluster.local";
    let url = format!("http://{inventory}/");
    mesh.get("edge-a1", &["-4", &url], SOON)?;
    mesh.site("site-a")?.link().set(Impairment {
        delay: Duration::from_millis(90), // And 10 of the other site.
        loss: 0.1,
        loss_burst_frames: 4.0,
        rate_bps: 1_000_000,
        ..Impairment::NONE
    })?;
    let [from, to] = [mesh.node("edge-a1")?, mesh.node("edge-b1")?];
    let way = Way {
        from: &from,
        to: &to,
        address: B,
    };
    let until = Instant::now() + Duration::from_secs(20);
    while Instant::now() < until {
        let times = round_trips(way, 60, Duration::from_millis(50))?;
        let lost = times.iter().filter(|time| **time == ROUND_TRIP_MAX).count();
        // A burst goes on with 3 of 4 frames: one of 60 comes once in 10⁷ times.
        ensure!(lost < times.len(), "nothing came back in 3 s: {times:?}");
        mesh.resolve("edge-a1", inventory)?;
        mesh.get("edge-a1", &["-4", &url], SOON)?;
        let why = mesh.ask("edge-a1", &["path", "why", "edge-b1"])?;
        ensure!(word(&why, "state") != "unreachable", "{why}");
    }
    mesh.ends_well()
}
