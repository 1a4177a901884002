//! Nodes behind NATs that map by destination are called at a port that the router maps for them, nodes behind an IPv6 firewall
//! through a pinhole: Debian's `miniupnpd` is the router's, by each of its protocols; it is started anew, refuses, and is
//! somebody who means harm.

use std::{
    collections::BTreeMap,
    fs,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use netns_tests::{
    link::Impairment,
    mesh::{Mesh, word},
    nat::{Ipv6Kind, NatKind},
    node::{Node, Process},
    site::Internet,
    tool,
};
use serde_json::Value;

const INVENTORY: &str = "http://inventory.shop.svc.cluster.local/";

/// Outside addresses for tests are reserved ones everywhere else, and for those `miniupnpd` maps nothing.
const WAN: Ipv4Addr = Ipv4Addr::new(45, 0, 113, 1);
const MAPPED: &str = "45.0.113.1:51820";

/// What should happen soon has happened by then, or never will.
const SOON: Duration = Duration::from_secs(30);

/// The rules that `miniupnpd` adds its own to.
const TABLE: &str = "table inet miniupnpd\ndelete table inet miniupnpd\ntable inet miniupnpd {\n\
    chain forward { type filter hook forward priority 0; policy accept; jump miniupnpd; }\n chain miniupnpd { }\n\
    chain prerouting { type nat hook prerouting priority -100; jump prerouting_miniupnpd; }\n\
    chain postrouting { type nat hook postrouting priority 90; jump postrouting_miniupnpd; }\n\
    chain prerouting_miniupnpd { }\n chain postrouting_miniupnpd { }\n}\n";

const GRANT: &str = "allow 1024-65535 192.168.1.0/24 1024-65535\n";

/// The router's clients may speak NAT-PMP, and not its successor: PCP is version 2.
const NO_PCP: &str = "table inet nopcp { chain input { type filter hook input priority -10; \
    udp dport 5351 @th,64,8 2 drop; }; }\n";

/// `edge-a1` and `edge-b1` behind symmetric NATs with random ports.
fn mesh() -> Result<Mesh> {
    let mut mesh = Mesh::demo()?;
    let link = Impairment::delay_loss(Duration::from_millis(10), 0.0);
    let hard = NatKind::SymmetricRandom;
    mesh.add_site("site-a", hard, WAN, link, &["edge-a1"])?;
    mesh.add_site("site-b", hard, [203, 0, 113, 2].into(), link, &["edge-b1"])?;
    for node in ["edge-a1", "edge-b1"] {
        mesh.start_agent(node)?;
    }
    for node in ["edge-a1", "edge-b1"] {
        mesh.agent_ready(node, 2)?;
    }
    mesh.serve("edge-b1", "inventory", &["http", "edge-b1", "[::]:8080"])?;
    Ok(mesh)
}

/// Site A's router begins to map ports.
fn daemon(mesh: &Mesh, protocols: &str, rules: &str) -> Result<Process> {
    daemon_with(
        mesh,
        TABLE,
        &format!("ipv6_disable=yes\n{protocols}{rules}"),
    )
}

fn daemon_with(mesh: &Mesh, table: &str, lines: &str) -> Result<Process> {
    let router = mesh.site("site-a")?.router();
    tool::nft(router.netns(), table)?;
    let config = format!(
        "ext_ifname=wan\nlistening_ip=lan\nhttp_port=0\nsecure_mode=yes\n\
         upnp_table_name=miniupnpd\nupnp_nat_table_name=miniupnpd\nupnp_forward_chain=miniupnpd\n\
         upnp_nat_chain=prerouting_miniupnpd\nupnp_nat_postrouting_chain=postrouting_miniupnpd\n\
         uuid=00000000-0000-0000-0000-000000000001\n{lines}deny 0-65535 0.0.0.0/0 0-65535\n"
    );
    let path = |name: &str| router.dir().join(name).display().to_string();
    router.write("miniupnpd.conf", &config)?;
    let words = [
        "/usr/sbin/miniupnpd",
        "-d",
        "-f",
        &path("miniupnpd.conf"),
        "-P",
        &path("miniupnpd.pid"),
    ];
    router.spawn("miniupnpd", &words)
}

/// What `edge-a1` says of its gateway.
fn said(mesh: &Mesh) -> Result<String> {
    said_of(mesh, "192.168.1.1")
}

fn said_of(mesh: &Mesh, gateway: &str) -> Result<String> {
    let status = mesh.status("edge-a1")?;
    let said = status.pointer(&format!("/port_mappings/{gateway}"));
    let said = said.and_then(Value::as_str);
    Ok(said
        .with_context(|| format!("nothing of the gateway: {status}"))?
        .to_owned())
}

fn is_mapped(mesh: &Mesh, protocol: &str) -> Result<()> {
    is_mapped_at(mesh, "192.168.1.1", MAPPED, protocol)
}

fn is_mapped_at(mesh: &Mesh, gateway: &str, outside: &str, protocol: &str) -> Result<()> {
    tool::eventually("the port is mapped", SOON, || {
        let said = said_of(mesh, gateway)?;
        ensure!(said == format!("{outside} by {protocol}"), "{said}");
        Ok(())
    })
}

fn ask(mesh: &Mesh) -> Result<()> {
    mesh.get("edge-a1", &["-4", INVENTORY], Duration::from_secs(2))?;
    Ok(())
}

fn is_relayed(mesh: &Mesh, reason: &str) -> Result<()> {
    tool::eventually(
        "the relay carries it, as neither can guess the other",
        SOON,
        || {
            ask(mesh)?;
            let why = mesh.ask("edge-a1", &["path", "why", "edge-b1"])?;
            ensure!(
                word(&why, "state") == "relayed" && word(&why, "reason") == reason,
                "{why}"
            );
            Ok(())
        },
    )
}

/// `edge-b1` reaches `edge-a1` at this address; returns of what kind that is.
fn is_direct(mesh: &Mesh, address: &str) -> Result<String> {
    tool::eventually("the path is direct", SOON, || {
        ask(mesh).ok();
        let why = mesh.ask("edge-b1", &["path", "why", "edge-a1"])?;
        ensure!(word(&why, "state") == "direct", "{why}");
        let paths = why.pointer("/paths").and_then(Value::as_array);
        let mut paths = paths.context("no paths")?.iter();
        let primary = paths.find(|path| word(path, "state") == "primary");
        let primary = primary.context("no primary")?;
        ensure!(word(primary, "path").contains(address), "{primary}");
        Ok(word(primary, "kind"))
    })
}

/// A router that speaks UPnP only says nothing, when it starts, that anybody hears: the agent asks in half a minute, or when
/// its network changes.
fn unplug(mesh: &Mesh) -> Result<()> {
    let host = mesh.node("edge-a1")?;
    tool::ip(host.netns(), "link set eth0 down\n")?;
    thread::sleep(Duration::from_millis(500));
    let up = "link set eth0 up\nroute add default via 192.168.1.1 dev eth0\n";
    tool::ip(host.netns(), up)
}

/// The port's mapping as the router's kernel has it.
fn rule(mesh: &Mesh) -> Result<String> {
    rule_of(mesh, "prerouting_miniupnpd")
}

fn rule_of(mesh: &Mesh, chain: &str) -> Result<String> {
    let netns = mesh.site("site-a")?.router().netns().to_owned();
    let words = ["netns", "exec", &netns, "nft", "list", "chain", "inet"];
    let list = [&words[..], &["miniupnpd", chain]].concat();
    let rules = tool::run("ip", &list, "")?;
    let rule = rules
        .lines()
        .find(|line| line.contains("51820"))
        .unwrap_or_default();
    Ok(rule.trim().to_owned())
}

/// Without a mapping they have a relay, and know why; with one, a direct path.
fn meets_by(protocol: &str, protocols: &str) -> Result<()> {
    let mesh = mesh()?;
    is_relayed(&mesh, "hard_nat_both")?;
    tool::eventually("all protocols were tried", SOON, || {
        let said = said(&mesh)?;
        let none = "not mapped: the router speaks none of PCP, NAT-PMP and UPnP";
        ensure!(said == none, "{said}");
        Ok(())
    })?;
    let mut router = daemon(&mesh, protocols, GRANT)?;
    if protocol == "UPnP" {
        unplug(&mesh)?;
    }
    let begin = Instant::now();
    is_mapped(&mesh, protocol)?;
    let mapped = begin.elapsed();
    let direct = is_direct(&mesh, MAPPED)?;
    eprintln!(
        "{protocol}: mapped after {mapped:?}, direct after {:?}",
        begin.elapsed()
    );
    assert_eq!(direct, "port_mapped");
    assert!(rule(&mesh)?.contains("192.168.1.11:51820"));
    mesh.all_run()?;

    let mut agent = mesh.take("edge-a1", "mesh-agent")?;
    assert!(agent.terminate(SOON)?.success(), "{}", agent.log());
    assert_eq!(rule(&mesh)?, "", "the agent gives it back");
    router.running()?;
    mesh.ends_well()
}

#[test]
fn hard_nats_meet_at_a_port_mapped_by_pcp() -> Result<()> {
    meets_by("PCP", "enable_natpmp=yes\nenable_upnp=no\n")
}

#[test]
fn hard_nats_meet_at_a_port_mapped_by_upnp() -> Result<()> {
    meets_by("UPnP", "enable_natpmp=no\nenable_upnp=yes\n")
}

/// The router forgets everything, so often.
fn is_mapped_again_by(protocol: &str, times: u32) -> Result<()> {
    let mesh = mesh()?;
    if protocol == "NAT-PMP" {
        tool::nft(mesh.site("site-a")?.router().netns(), NO_PCP)?;
    }
    let protocols = "enable_natpmp=yes\nenable_upnp=no\n";
    let mut router = daemon(&mesh, protocols, GRANT)?;
    is_mapped(&mesh, protocol)?;
    for time in 0..times {
        if time > 0 {
            thread::sleep(Duration::from_secs(7)); // The agent listens to such news once in 10 s.
        }
        // Its clock has to have gone on to be seen to begin anew.
        thread::sleep(Duration::from_secs(4));
        router.kill()?;
        tool::nft(mesh.site("site-a")?.router().netns(), TABLE)?;
        assert_eq!(rule(&mesh)?, "");
        router = daemon(&mesh, protocols, GRANT)?;
        let begin = Instant::now();
        tool::eventually("the port is mapped again", SOON, || {
            let rule = rule(&mesh)?;
            ensure!(rule.contains("192.168.1.11:51820"), "{rule}");
            Ok(())
        })?;
        eprintln!(
            "{protocol}: mapped again {:?} after the router's start",
            begin.elapsed()
        );
    }
    is_mapped(&mesh, protocol)?;
    mesh.ends_well()
}

#[test]
fn a_port_mapped_by_pcp_is_mapped_again_when_the_router_starts_anew() -> Result<()> {
    is_mapped_again_by("PCP", 2)
}

#[test]
fn a_port_mapped_by_nat_pmp_is_mapped_again_when_the_router_starts_anew() -> Result<()> {
    is_mapped_again_by("NAT-PMP", 1)
}

const PREFIX_A: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0xa, 0, 0, 0, 0, 0);
const PREFIX_B: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0xb, 0, 0, 0, 0, 0);
const PINHOLE: &str = "[2001:db8:a::b]:51820";

/// Of IPv6 site A's router lets in what was asked for from inside, and what has a pinhole.
const FIREWALL: &str = "table inet miniupnpd\ndelete table inet miniupnpd\ntable inet miniupnpd {\n\
    chain forward { type filter hook forward priority 0; policy accept; ct state established,related accept; \
    jump miniupnpd; iifname \"wan\" meta nfproto ipv6 drop; }\n chain miniupnpd { }\n\
    chain prerouting_miniupnpd { }\n chain postrouting_miniupnpd { }\n}\n";

/// Site B has one IPv6 address for all, and a random port for each destination.
const NAT66: &str = "table ip6 nat66 { chain postrouting { type nat hook postrouting priority 100; \
    oifname \"wan\" meta l4proto udp snat to [2001:db8:b::1]:1024-65535 fully-random; }; }\n";

/// `edge-a1` behind a firewall, `edge-b1` behind a NAT that maps by destination, which has no IPv4: what `edge-a1` asks for
/// from inside is not from where `edge-b1` calls.
fn mesh_v6() -> Result<Mesh> {
    let mut mesh = Mesh::dual_demo()?;
    let link = Impairment::delay_loss(Duration::from_millis(10), 0.0);
    let both = Internet {
        ipv4: Some((NatKind::PortRestricted, WAN)), // `miniupnpd` wants it.
        ipv6: Some((Ipv6Kind::Open, PREFIX_A)),
    };
    mesh.add_site_with("site-a", both, link, &["edge-a1"])?;
    tool::nft(mesh.site("site-a")?.router().netns(), FIREWALL)?;
    let v6 = Internet::ipv6(Ipv6Kind::Firewall, PREFIX_B);
    mesh.add_site_with("site-b", v6, link, &["edge-b1"])?;
    tool::nft(mesh.site("site-b")?.router().netns(), NAT66)?;
    for node in ["edge-a1", "edge-b1"] {
        mesh.start_agent(node)?;
    }
    for node in ["edge-a1", "edge-b1"] {
        mesh.agent_ready(node, 2)?;
    }
    mesh.serve("edge-b1", "inventory", &["http", "edge-b1", "[::]:8080"])?;
    Ok(mesh)
}

fn meets_by_pinhole(mesh: &Mesh, gateway: &str, protocol: &str, lines: &str) -> Result<Process> {
    is_relayed(mesh, "hard_nat_one")?;
    tool::eventually("all protocols were tried", SOON, || {
        let said = said_of(mesh, gateway)?;
        let none = "not mapped: the router speaks none of PCP and UPnP";
        ensure!(said == none, "{said}");
        Ok(())
    })?;
    let router = daemon_with(mesh, FIREWALL, &format!("{lines}{GRANT}"))?;
    if protocol == "UPnP" {
        let edge = mesh.node("edge-a1")?;
        tool::ip(edge.netns(), "route del ::/0\n")?;
        thread::sleep(Duration::from_millis(1_500)); // The agent looks once in a second.
        let route = format!("route add ::/0 via {gateway} dev eth0\n");
        tool::ip(edge.netns(), &route)?;
    }
    let begin = Instant::now();
    is_mapped_at(mesh, gateway, PINHOLE, protocol)?;
    let mapped = begin.elapsed();
    let direct = is_direct(mesh, PINHOLE)?;
    eprintln!(
        "{protocol}: a pinhole after {mapped:?}, direct after {:?}",
        begin.elapsed()
    );
    assert_eq!(direct, "port_mapped");
    assert_ne!(rule_of(mesh, "miniupnpd")?, "");
    mesh.all_run()?;
    Ok(router)
}

/// The route names the router by a link-local address, as routers tell it (RFC 4861, section 4.2): it is asked at the network's
/// first address. Started anew, it says so in IPv4, as this daemon's word in IPv6 leaves by another interface.
#[test]
fn a_pinhole_by_pcp_lets_a_hard_nat_in_and_is_there_again_when_the_router_starts_anew() -> Result<()>
{
    let mesh = mesh_v6()?;
    let (router, edge) = (mesh.site("site-a")?.router(), mesh.node("edge-a1")?);
    tool::ip(router.netns(), "addr add fe80::1/64 dev lan nodad\n")?;
    tool::ip(edge.netns(), "route replace ::/0 via fe80::1 dev eth0\n")?;
    let lines = "enable_natpmp=yes\nenable_upnp=no\n";
    let mut daemon = meets_by_pinhole(&mesh, "2001:db8:a::", "PCP", lines)?;

    thread::sleep(Duration::from_secs(11)); // Its clock goes on, and the agent listens to such news once in 10 s.
    daemon.kill()?;
    tool::nft(router.netns(), FIREWALL)?;
    assert_eq!(rule_of(&mesh, "miniupnpd")?, "");
    let _daemon = daemon_with(&mesh, FIREWALL, &format!("{lines}{GRANT}"))?;
    let begin = Instant::now();
    tool::eventually("the pinhole is there again", SOON, || {
        ensure!(!rule_of(&mesh, "miniupnpd")?.is_empty(), "not yet");
        Ok(())
    })?;
    eprintln!(
        "a pinhole again {:?} after the router's start",
        begin.elapsed()
    );
    mesh.ends_well()
}

/// It is given back, which this daemon (2.3.1) refuses by PCP: what it keeps of a pinhole is not what it compares.
#[test]
fn a_pinhole_by_upnp_lets_a_hard_nat_in_and_is_given_back() -> Result<()> {
    let mesh = mesh_v6()?;
    // Of IPv6 the daemon answers PCP all the same.
    tool::nft(mesh.site("site-a")?.router().netns(), NO_PCP)?;
    let lines = "enable_natpmp=no\nenable_upnp=yes\n";
    let mut daemon = meets_by_pinhole(&mesh, "2001:db8:a::1", "UPnP", lines)?;
    let mut agent = mesh.take("edge-a1", "mesh-agent")?;
    assert!(agent.terminate(SOON)?.success(), "{}", agent.log());
    assert_eq!(rule_of(&mesh, "miniupnpd")?, "", "the agent gives it back");
    daemon.running()?;
    mesh.ends_well()
}

/// By UPnP: asked by PCP for what it may not grant, this daemon tries all ports, and answers nobody for half a minute.
#[test]
fn a_router_that_refuses_is_quoted_and_nobody_misses_it() -> Result<()> {
    let mesh = mesh()?;
    let _router = daemon(&mesh, "enable_natpmp=no\nenable_upnp=yes\n", "")?;
    unplug(&mesh)?;
    tool::eventually("the refusals are told", SOON, || {
        let said = said(&mesh)?;
        // Of PCP and NAT-PMP, of which it says nothing, there is nothing to say.
        let words = ["not mapped: UPnP: ", "not authorized"];
        ensure!(words.iter().all(|word| said.contains(word)), "{said}");
        Ok(())
    })?;
    eprintln!("{}", said(&mesh)?);
    assert_eq!(rule(&mesh)?, "");
    mesh.get("edge-a1", &["-4", INVENTORY], SOON)?;
    mesh.ends_well()
}

/// Answers every question to the router with nonsense, and tells all the LAN that it starts anew, until `end`. Returns how
/// many questions came.
fn hostile(router: &Node, end: Instant) -> Result<usize> {
    let bind = || {
        let socket = UdpSocket::bind("192.168.1.1:5351")?;
        socket.set_read_timeout(Some(Duration::from_micros(200)))?;
        Ok::<_, std::io::Error>(socket)
    };
    let socket = router.enter(bind)??;
    let mut questions = 0;
    let mut buffer = [0; 1_200];
    let mut epoch_s = 0_u32;
    while Instant::now() < end {
        if let Ok((length, from)) = socket.recv_from(&mut buffer) {
            questions += 1;
            let Some(question) = buffer.get_mut(..length) else {
                continue;
            };
            if let Some(operation) = question.get_mut(1) {
                *operation |= 0x80; // An answer.
            }
            let nonsense: &[u8] = match questions % 5 {
                0 => &[],
                1 => &[2, 0x81, 0, 0],
                2 => &[0xff; 1_100],
                3 => question,
                _ => &[0, 129, 0, 0, 0, 0, 0, 0, 0, 1, 0, 1, 0, 0, 0, 0], // For no time at all.
            };
            socket.send_to(nonsense, from).ok();
        }
        epoch_s = epoch_s.wrapping_add(100_000);
        let [a, b, c, d] = epoch_s.to_be_bytes();
        let notice = [0, 128, 0, 0, a, b, c, d, 45, 0, 113, 1];
        let all = SocketAddr::from(([224, 0, 0, 1], 5350));
        socket.send_to(&notice, all).ok();
    }
    Ok(questions)
}

/// Processor time of a process, in ticks of 10 ms.
fn ticks(process: &Process) -> Result<u64> {
    let stat = fs::read_to_string(format!("/proc/{}/stat", process.id()))?;
    let fields: Vec<_> = stat
        .rsplit(") ")
        .next()
        .unwrap_or_default()
        .split(' ')
        .collect();
    // Fields 14 and 15 of proc_pid_stat(5); the first after the name is the third.
    let times = fields.get(11..13).context("/proc/PID/stat is too short")?;
    times.iter().map(|field| Ok(field.parse::<u64>()?)).sum()
}

#[test]
fn nonsense_and_a_flood_of_news_cost_a_few_questions_and_no_processor() -> Result<()> {
    const LENGTH: Duration = Duration::from_secs(15); // News are listened to once in 10 s.
    let mesh = mesh()?;
    let router = mesh.site("site-a")?.router().clone();
    let agent = mesh.take("edge-a1", "mesh-agent")?;
    let before = ticks(&agent)?;
    let questions = hostile(&router, Instant::now() + LENGTH)?;
    let spent = ticks(&agent)? - before;
    eprintln!(
        "{questions} questions, {} ms of a processor in {LENGTH:?}",
        spent * 10
    );
    // Each time all protocols, of which two are retransmitted, and no more often than every 10 s.
    assert!((2..=20).contains(&questions), "{questions}");
    assert!(spent * 10 < 1_500, "{spent} ticks");
    let said = said(&mesh)?;
    assert!(said.starts_with("not mapped") || said == "asked", "{said}");
    mesh.put("edge-a1", "mesh-agent", agent);
    mesh.get("edge-a1", &["-4", INVENTORY], SOON)?;

    mesh.kill("edge-a1", "mesh-agent")?;
    mesh.start_agent_with("edge-a1", "port_mapping = false\n")?;
    mesh.agent_ready("edge-a1", 2)?;
    let questions = hostile(&router, Instant::now() + Duration::from_secs(4))?;
    assert_eq!(questions, 0, "it is switched off");
    let status = mesh.status("edge-a1")?;
    let said: BTreeMap<String, String> =
        serde_json::from_value(status.pointer("/port_mappings").context("none")?.clone())?;
    assert!(said.is_empty(), "{said:?}");
    mesh.ends_well()
}
