//! The real server on loopback, asked by `dig`, by glibc, and by hostile hands.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::wildcard_enum_match_arm,
    reason = "a test may fail loudly, and its helpers too"
)]

mod common;

use std::{
    io,
    net::{IpAddr, SocketAddr},
    sync::{Arc, Mutex},
    time::Duration,
};

use common::{
    add_big_service, query,
    running::{LOOPBACK, SOON, Upstream, plain, start, start_with, stub_answer, text},
    snapshot, view,
};
use hickory_proto::{
    op::{Message, ResponseCode},
    rr::{Name, RData, RecordType, rdata::A},
};
use mesh_core::services::View;
use mesh_dns::{
    client,
    counters::DropReason,
    local::domain_name,
    server::{DnsConfig, DnsServer, HELD_RETRY, StartError, Stub},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream, UdpSocket},
    process::{Child, Command},
    time::{Instant, sleep, timeout},
};
use tokio_util::sync::CancellationToken;

fn big_view(endpoints: u16) -> View {
    let mut snapshot = snapshot();
    add_big_service(&mut snapshot, endpoints);
    View {
        snapshot: Arc::new(snapshot),
        ..view()
    }
}

#[tokio::test]
async fn dig_gets_every_kind_of_record() {
    let running = start(&[], Some(view())).await;
    for (arguments, want) in [
        ("+short inventory.shop.svc.cluster.local", "10.43.0.10\n"),
        (
            "+short +tcp inventory.shop.svc.cluster.local AAAA",
            "fd43::a\n",
        ),
        (
            "+short db.shop.svc.cluster.local AAAA",
            "fd02::1\nfd02::3:1\n",
        ),
        (
            "+short _http._tcp.inventory.shop.svc.cluster.local SRV",
            "0 100 80 inventory.shop.svc.cluster.local.\n",
        ),
        ("+short dns-version.cluster.local TXT", "\"1.1.0\"\n"),
        (
            "+short search.shop.svc.cluster.local CNAME",
            "search.example.org.\n",
        ),
        (
            "+short -x 10.43.0.10",
            "inventory.shop.svc.cluster.local.\n",
        ),
        ("+short -x 100.96.0.2", "edge-a2.mesh.\n"),
        ("+short edge-b1.mesh", "100.96.0.3\n"),
    ] {
        let got = running.dig(arguments).await;
        assert_eq!(sorted(&got), sorted(want), "{arguments}");
    }
    let missing = running.dig("missing.shop.svc.cluster.local").await;
    assert!(
        missing.contains("status: NXDOMAIN") && missing.contains("SOA"),
        "{missing}"
    );
    assert!(missing.contains("flags: qr aa rd ra"), "{missing}");
    let transfer = running.dig("cluster.local AXFR").await;
    assert!(transfer.contains("Transfer failed"), "{transfer}");
    let version = running.dig("+edns=1 +noednsneg edge-b1.mesh").await;
    assert!(version.contains("BADVERS"), "{version}");
    assert_eq!(running.server.counters().nxdomain.get(), 1);
}

fn sorted(lines: &str) -> Vec<&str> {
    let mut lines: Vec<_> = lines.lines().collect();
    lines.sort_unstable();
    lines
}

#[tokio::test]
async fn an_answer_too_large_for_udp_comes_over_tcp() {
    let running = start(&[], Some(big_view(1500))).await;
    let name = "big.shop.svc.cluster.local";
    let whole = running.dig(&format!("+short {name}")).await;
    assert_eq!(whole.lines().count(), 1500);

    // A client that never asks over TCP (old musl) gets the first ones.
    for (options, size_max) in [
        ("+noedns", 512),
        ("+bufsize=700", 700),
        ("+bufsize=9000", 1232),
    ] {
        let cut = running.dig(&format!("+ignore {options} {name}")).await;
        assert!(cut.contains("flags: qr aa tc rd ra"), "{options}: {cut}");
        assert!(cut.matches("\tA\t10.2.").count() > 20, "{options}: {cut}");
        let size = cut.split("MSG SIZE  rcvd: ").nth(1).unwrap();
        let size: u32 = size.split_whitespace().next().unwrap().parse().unwrap();
        assert!(
            (size_max - 32..=size_max).contains(&size),
            "{options}: {size}"
        );
    }

    // 1500 SRV records do not fit TCP either: the nearest that do are given.
    let ports = running.dig(&format!("+tcp _http._tcp.{name} SRV")).await;
    assert!(ports.contains("flags: qr aa rd ra"), "{ports:.500}");
    assert!(ports.matches("SRV").count() > 500, "{ports:.500}");
}

#[tokio::test]
async fn other_names_come_from_the_upstream_once_and_then_from_the_cache() {
    let upstream = Upstream::start().await;
    let running = start(&[upstream.address], Some(view())).await;
    for _ in 0..3 {
        let reply = running.ask("www.example.org").await;
        assert_eq!(reply.code, "NOERROR");
        assert!(reply.answers[0].contains("192.0.2.1"), "{reply:?}");
        assert_eq!(running.ask("missing.example.org").await.code, "NXDOMAIN");
    }
    assert_eq!(upstream.asked("www.example.org."), 1);
    assert_eq!(upstream.asked("missing.example.org."), 1);
    let counters = running.server.counters();
    assert_eq!(
        (counters.forwarded.get(), counters.cache_hits.get()),
        (2, 4)
    );

    // Random letters (0x20) are the same name, and come back as asked.
    let shown = running.dig("wWw.eXample.oRg").await;
    assert!(
        shown.contains(";wWw.eXample.oRg.") && shown.contains("192.0.2.1"),
        "{shown}"
    );
    assert_eq!(counters.forwarded.get(), 2);

    running.answers_own_names().await;
    running.ask("missing.shop.svc.cluster.local").await;
    running.ask("nobody.mesh").await;
    assert_eq!(upstream.asked_in_all(), 2, "own names stay here");
    // The last answer was ready, and is counted all the same.
    running.ask("nobody.mesh").await;
    assert_eq!(counters.unknown.get(), 3, "of the mesh, and not there");
}

#[tokio::test]
async fn a_stub_domain_has_upstreams_of_its_own() {
    let [general, company, branch] = [
        Upstream::start().await,
        Upstream::start().await,
        Upstream::start().await,
    ];
    let stub = |domain, upstream: &Upstream| Stub {
        domain: domain_name(domain).unwrap(),
        upstreams: plain(&[upstream.address]),
    };
    let config = DnsConfig {
        upstreams: plain(&[general.address]),
        stubs: vec![
            stub("Example.org", &company),
            stub("branch.example.org", &branch),
        ],
        ..DnsConfig::default()
    };
    let running = start_with(config, None).await;
    for name in [
        "www.EXAMPLE.org",
        "www.branch.example.org",
        "www.example.net",
    ] {
        running.ask(name).await;
    }
    let asked = [&general, &company, &branch].map(Upstream::asked_in_all);
    assert_eq!(asked, [1, 1, 1]);
    assert_eq!(branch.asked("www.branch.example.org."), 1);
    assert_eq!(company.asked("www.EXAMPLE.org."), 1);
}

#[tokio::test]
async fn an_external_name_is_followed_to_the_upstream() {
    let upstream = Upstream::start().await;
    let running = start(&[upstream.address], Some(view())).await;
    let shown = running.dig("+short search.shop.svc.cluster.local").await;
    assert_eq!(shown, "search.example.org.\n192.0.2.1\n");
    assert_eq!(upstream.asked_in_all(), 1);
    // Its time to live counts down: what the upstream said is looked up each time.
    let counters = running.server.counters();
    for asked in 1..=3 {
        let reply = running.ask("search.shop.svc.cluster.local").await;
        assert_eq!(reply.answers.len(), 2, "{reply:?}");
        assert_eq!(counters.cache_hits.get(), asked);
    }
}

#[tokio::test]
async fn a_truncated_answer_of_the_upstream_is_asked_for_over_tcp() {
    let upstream = Upstream::start().await;
    let running = start(&[upstream.address], Some(view())).await;
    let shown = running.dig("+short large.example.org").await;
    assert_eq!(shown.lines().count(), 200);
}

#[tokio::test]
async fn an_upstream_that_knows_no_edns_is_asked_without() {
    let upstream = Upstream::start().await;
    let running = start(&[upstream.address], Some(view())).await;
    assert_eq!(running.ask("plain.example.org").await.code, "NOERROR");
    assert_eq!(upstream.asked("plain.example.org."), 2);
}

#[tokio::test]
async fn the_second_upstream_answers_when_the_first_is_gone_or_unhelpful() {
    let upstream = Upstream::start().await;
    let running = start(&[refusing().await, upstream.address], Some(view())).await;
    assert_eq!(running.ask("www.example.org").await.code, "NOERROR");

    let both = start(&[upstream.address, upstream.address], Some(view())).await;
    assert_eq!(both.ask("broken.example.org").await.code, "SERVFAIL");
    assert_eq!(upstream.asked("broken.example.org."), 2);
}

#[tokio::test]
async fn a_refusing_upstream_gives_servfail_at_once_with_the_reason() {
    let running = start(&[refusing().await], Some(view())).await;
    let started = Instant::now();
    let shown = running.dig("www.example.org").await;
    assert!(
        started.elapsed() < Duration::from_secs(1),
        "{:?}",
        started.elapsed()
    );
    assert!(shown.contains("status: SERVFAIL"), "{shown}");
    assert!(shown.contains("EDE: 22"), "{shown}");
    running.answers_own_names().await;
}

#[tokio::test]
async fn a_silent_upstream_gives_servfail_soon_and_own_names_do_not_wait() {
    let silent = UdpSocket::bind((LOOPBACK, 0)).await.unwrap();
    let running = start(&[silent.local_addr().unwrap()], Some(view())).await;
    let socket = UdpSocket::bind((LOOPBACK, 0)).await.unwrap();
    socket.connect(running.address).await.unwrap();
    for id in 0..100 {
        let mut message = query(&format!("n{id}.example.org."), RecordType::A);
        message.metadata.id = id;
        socket.send(&message.to_vec().unwrap()).await.unwrap();
    }
    running.answers_own_names().await; // While a hundred others wait.
    let started = Instant::now();
    for _ in 0..100 {
        let code = timeout(SOON, receive(&socket)).await.unwrap().response_code;
        assert_eq!(code, ResponseCode::ServFail);
    }
    assert!(
        started.elapsed() < Duration::from_secs(3),
        "{:?}",
        started.elapsed()
    );

    // It is passed over now.
    let again = running.ask("other.example.org").await;
    assert_eq!(again.code, "SERVFAIL");
    assert!(again.elapsed < Duration::from_secs(1), "{again:?}");
}

#[tokio::test]
async fn a_source_with_too_many_open_questions_is_told_at_once() {
    let silent = UdpSocket::bind((LOOPBACK, 0)).await.unwrap();
    let running = start(&[silent.local_addr().unwrap()], Some(view())).await;
    let socket = UdpSocket::bind((LOOPBACK, 0)).await.unwrap();
    socket.connect(running.address).await.unwrap();
    let started = Instant::now();
    for id in 0..=256 {
        let mut message = query("www.example.org.", RecordType::A);
        message.metadata.id = id;
        socket.send(&message.to_vec().unwrap()).await.unwrap();
    }
    let told = timeout(SOON, receive(&socket)).await.unwrap();
    assert_eq!((told.id, told.response_code), (256, ResponseCode::ServFail));
    assert!(
        started.elapsed() < Duration::from_secs(1),
        "{:?}",
        started.elapsed()
    );
    assert_eq!(running.server.counters().busy.get(), 1);
}

#[tokio::test]
async fn a_forged_answer_is_passed_over() {
    let upstream = UdpSocket::bind((LOOPBACK, 0)).await.unwrap();
    let running = start(&[upstream.local_addr().unwrap()], Some(view())).await;
    let forge = async {
        let mut buffer = [0; 1500];
        let (len, from) = upstream.recv_from(&mut buffer).await.unwrap();
        let asked = Message::from_vec(&buffer[..len]).unwrap();
        let mut wrong_id = stub_answer(&asked, false);
        wrong_id.metadata.id = asked.id.wrapping_add(1);
        let mut wrong_name = stub_answer(&asked, false);
        wrong_name.queries[0].set_name(Name::from_ascii("evil.example.org.").unwrap());
        wrong_id.answers[0].data = RData::A(A::new(203, 0, 113, 66));
        wrong_name.answers[0].data = RData::A(A::new(203, 0, 113, 66));
        // The right id, and a name that points to itself.
        let looped = [
            &buffer[..2],
            &[0x81, 0x80, 0, 1, 0, 0, 0, 0, 0, 0, 0xc0, 12, 0, 1, 0, 1],
        ];
        upstream.send_to(&looped.concat(), from).await.unwrap();
        for message in [wrong_id, wrong_name, stub_answer(&asked, false)] {
            upstream
                .send_to(&message.to_vec().unwrap(), from)
                .await
                .unwrap();
        }
        upstream.send_to(b"garbage", from).await.unwrap();
    };
    let (reply, ()) = tokio::join!(running.ask("www.example.org"), forge);
    assert!(reply.answers[0].contains("192.0.2.1"), "{reply:?}");
}

#[tokio::test]
async fn without_a_snapshot_only_own_names_fail() {
    let upstream = Upstream::start().await;
    let running = start(&[upstream.address], None).await;
    assert_eq!(
        running.ask("inventory.shop.svc.cluster.local").await.code,
        "SERVFAIL"
    );
    assert_eq!(running.ask("www.example.org").await.code, "NOERROR");
}

#[tokio::test]
async fn a_flood_of_garbage_leaves_it_answering() {
    let running = start(&[], Some(view())).await;
    let socket = UdpSocket::bind((LOOPBACK, 0)).await.unwrap();
    socket.connect(running.address).await.unwrap();
    let mut noise = Noise(7);
    for _ in 0..20_000 {
        let bytes = noise.bytes();
        socket.send(&bytes).await.unwrap();
    }
    for _ in 0..40 {
        let mut stream = TcpStream::connect(running.address).await.unwrap();
        for _ in 0..4 {
            let bytes = noise.bytes();
            stream.write_all(&bytes).await.ok(); // It may have hung up already.
        }
    }
    running.answers_own_names().await;
    let counters = running.server.counters();
    assert!(counters.dropped(DropReason::Short) > 0);
    assert!(counters.dropped(DropReason::Response) > 0);
    assert!(counters.refused.get() > 0);
}

#[tokio::test]
async fn one_connection_may_ask_many_times() {
    let running = start(&[], Some(view())).await;
    let mut stream = TcpStream::connect(running.address).await.unwrap();
    let bytes = query("edge-a1.mesh.", RecordType::A).to_vec().unwrap();
    let framed = [
        &u16::try_from(bytes.len()).unwrap().to_be_bytes()[..],
        &bytes,
    ]
    .concat();
    stream
        .write_all(&[&framed[..], &framed].concat())
        .await
        .unwrap();
    for _ in 0..2 {
        let mut answer = vec![0; usize::from(stream.read_u16().await.unwrap())];
        stream.read_exact(&mut answer).await.unwrap();
        assert_eq!(Message::from_vec(&answer).unwrap().answers.len(), 1);
    }
}

#[tokio::test]
async fn what_waits_for_an_upstream_keeps_nobody_waiting_on_the_same_connection() {
    let silent = UdpSocket::bind((LOOPBACK, 0)).await.unwrap();
    let running = start(&[silent.local_addr().unwrap()], Some(view())).await;
    let mut stream = TcpStream::connect(running.address).await.unwrap();
    for (id, name) in [(1, "www.example.org."), (2, "edge-a1.mesh.")] {
        let mut asked = query(name, RecordType::A);
        asked.metadata.id = id;
        let bytes = asked.to_vec().unwrap();
        let len = u16::try_from(bytes.len()).unwrap();
        stream.write_u16(len).await.unwrap();
        stream.write_all(&bytes).await.unwrap();
    }
    stream.shutdown().await.unwrap(); // It asks no more, and listens.
    for want in [(2, ResponseCode::NoError), (1, ResponseCode::ServFail)] {
        let mut answer = vec![0; usize::from(stream.read_u16().await.unwrap())];
        stream.read_exact(&mut answer).await.unwrap();
        let answer = Message::from_vec(&answer).unwrap();
        assert_eq!((answer.id, answer.response_code), want);
    }
    assert!(stream.read_u16().await.is_err(), "it hung up");
}

#[tokio::test]
async fn one_source_cannot_hold_every_connection() {
    let running = start(&[], Some(view())).await;
    let mut held = Vec::new();
    for _ in 0..64 {
        held.push(TcpStream::connect(running.address).await.unwrap());
    }
    let mut one_more = TcpStream::connect(running.address).await.unwrap();
    let hung_up = timeout(SOON, one_more.read(&mut [0])).await.unwrap();
    assert!(matches!(hung_up, Ok(0) | Err(_)), "{hung_up:?}");
    assert_eq!(
        running.server.counters().dropped(DropReason::Connections),
        1
    );
    running.answers_own_names().await;
}

#[tokio::test]
async fn addresses_of_both_families_are_served_beside_each_other() {
    let config = DnsConfig {
        listen: ["127.0.0.1:0", "[::1]:0"]
            .map(|one| one.parse().unwrap())
            .into(),
        ..DnsConfig::default()
    };
    let (view, stop) = (Arc::new(view()), CancellationToken::new());
    let server = DnsServer::start(
        config,
        move || Some(Arc::clone(&view)),
        || None,
        |_| None,
        stop.clone(),
    );
    let server = server.await.unwrap();
    for _ in 0..4 {
        for &address in server.local_addresses() {
            let asked = timeout(SOON, client::ask(address, "edge-b1.mesh", "A"));
            assert_eq!(asked.await.unwrap().unwrap().code, "NOERROR", "{address}");
        }
    }
    stop.cancel();
    timeout(SOON, server.stopped()).await.unwrap();
}

#[tokio::test]
async fn it_stops_when_told_and_leaves_its_ports() {
    let running = start(&[], Some(view())).await;
    let _open = TcpStream::connect(running.address).await.unwrap();
    running.stop.cancel();
    timeout(SOON, running.server.stopped()).await.unwrap();
    UdpSocket::bind(running.address).await.unwrap();
    TcpListener::bind(running.address).await.unwrap();
}

/// Lets the time go by after which the server tries again; not longer, as other timers are real.
async fn tried_again() {
    sleep(Duration::from_millis(50)).await; // The task that tries has its timer.
    tokio::time::pause();
    tokio::time::advance(HELD_RETRY).await;
    tokio::time::resume();
    sleep(Duration::from_millis(50)).await;
}

async fn start_at(address: SocketAddr, stop: &CancellationToken) -> Result<DnsServer, StartError> {
    let config = DnsConfig {
        listen: vec![address],
        ..DnsConfig::default()
    };
    let view = Arc::new(view());
    let view = move || Some(Arc::clone(&view));
    DnsServer::start(config, view, || None, |_| None, stop.clone()).await
}

fn held(server: &DnsServer) -> Vec<&'static str> {
    let held = server.inspector().held();
    held.keys().map(|(_, transport)| *transport).collect()
}

#[tokio::test]
async fn an_address_of_another_server_is_taken_when_it_is_free_for_more_than_a_moment() {
    let running = start(&[], Some(view())).await;
    let stop = CancellationToken::new();
    let later = start_at(running.address, &stop).await.unwrap();
    assert_eq!(later.local_addresses(), [running.address]);
    assert_eq!(held(&later), ["TCP", "UDP"]);
    let said = later.inspector().held();
    assert!(said.values().all(|one| one.contains("in use")), "{said:?}");
    tried_again().await;
    assert_eq!(held(&later), ["TCP", "UDP"]);

    running.stop.cancel();
    let address = running.address;
    timeout(SOON, running.server.stopped()).await.unwrap();
    tried_again().await;
    assert_eq!(held(&later), ["TCP", "UDP"]);
    let again = UdpSocket::bind(address).await;
    drop(again.expect("who starts anew has it back"));
    tried_again().await;
    assert_eq!(held(&later), <[&str; 0]>::default());
    client::ask(address, "edge-a1.mesh", "A").await.unwrap();
    TcpStream::connect(address).await.unwrap();
}

#[tokio::test]
async fn what_is_free_is_served_while_the_other_transport_is_somebody_elses() {
    let stop = CancellationToken::new();
    let other = UdpSocket::bind((LOOPBACK, 0)).await.unwrap();
    let address = other.local_addr().unwrap();
    let server = start_at(address, &stop).await.unwrap();
    assert_eq!(held(&server), ["UDP"]);
    TcpStream::connect(address).await.unwrap();

    let other = TcpListener::bind((LOOPBACK, 0)).await.unwrap();
    let address = other.local_addr().unwrap();
    let server = start_at(address, &stop).await.unwrap();
    assert_eq!(held(&server), ["TCP"]);
    client::ask(address, "edge-a1.mesh", "A").await.unwrap();
}

#[tokio::test]
async fn an_address_that_is_not_there_is_named_in_the_error() {
    let started = start_at("192.0.2.77:53".parse().unwrap(), &CancellationToken::new()).await;
    let want = "cannot listen for DNS at UDP 192.0.2.77:53";
    assert_eq!(started.unwrap_err().to_string(), want);
}

#[tokio::test]
async fn it_refuses_to_ask_itself() {
    let own = SocketAddr::from((LOOPBACK, 5353));
    let config = DnsConfig {
        listen: vec![own],
        upstreams: plain(&[own]),
        ..DnsConfig::default()
    };
    let started =
        DnsServer::start(config, || None, || None, |_| None, CancellationToken::new()).await;
    assert!(matches!(started, Err(StartError::UpstreamIsListener(one)) if one == own));
}

/// Runs a test again in a network namespace, after `script`; whether this is that run.
async fn is_inside(test: &str, script: &str) -> bool {
    const INSIDE: &str = "HOLDFAST_DNS_TEST_INSIDE";
    if std::env::var_os(INSIDE).is_some() {
        return true;
    }
    let script = format!("set -e; ip link set lo up; {script}; exec \"$0\" --exact {test}");
    let output = Command::new("unshare")
        .args(["--net", "sh", "-c", &script])
        .arg(std::env::current_exe().unwrap())
        .env(INSIDE, "1")
        .output();
    let output = timeout(SOON, output).await.unwrap().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}\n{errors}", text(&output));
    assert!(text(&output).contains("1 passed"), "{}", text(&output));
    false
}

/// dnsmasq, for which every name has the address 192.0.2.1.
fn dnsmasq_with(options: &[&str]) -> Command {
    let mut dnsmasq = Command::new("dnsmasq");
    dnsmasq
        .args(["--keep-in-foreground", "--conf-file=/dev/null"])
        .args(["--no-resolv", "--no-hosts", "--user=root", "--pid-file="])
        .args(["--log-facility=-", "--address=/#/192.0.2.1"])
        .args(options)
        .kill_on_drop(true);
    dnsmasq
}

/// One that has started.
async fn dnsmasq(options: &[&str]) -> Child {
    let mut dnsmasq = dnsmasq_with(options);
    let mut dnsmasq = dnsmasq.spawn().expect("dnsmasq (dnsmasq-base)");
    let there: SocketAddr = "127.0.0.1:53".parse().unwrap();
    let start = Instant::now();
    while TcpStream::connect(there).await.is_err() {
        let ended = dnsmasq.try_wait().unwrap();
        assert!(ended.is_none() && start.elapsed() < SOON, "{ended:?}");
        sleep(Duration::from_millis(20)).await;
    }
    dnsmasq
}

async fn end(mut dnsmasq: Child) {
    dnsmasq.kill().await.unwrap();
}

#[tokio::test]
async fn beside_dnsmasq_at_all_addresses_questions_by_udp_are_ours_and_those_by_tcp_when_it_leaves_them()
 {
    let test = "beside_dnsmasq_at_all_addresses_questions_by_udp_are_ours_and_those_by_tcp_when_it_leaves_them";
    let script = "ip link add mesh type veth peer name other; ip link set mesh up; ip address add 169.254.53.53/32 dev mesh";
    if !is_inside(test, script).await {
        return;
    }
    let (name, own): (_, SocketAddr) = ("edge-b1.mesh", "169.254.53.53:53".parse().unwrap());
    let asked = async |at: &str, more: &str| {
        let dig = Command::new("dig")
            .args([
                &format!("@{at}"),
                "+short",
                "+tries=1",
                "+time=5",
                more,
                name,
            ])
            .output();
        text(&timeout(SOON, dig).await.unwrap().unwrap())
    };
    let (ours, its) = ("100.96.0.3\n", "192.0.2.1\n");
    let wildcard = dnsmasq(&[]).await;
    let stop = CancellationToken::new();
    let server = start_at(own, &stop).await.unwrap();
    assert_eq!(held(&server), ["TCP"]);
    for _ in 0..20 {
        // Whichever thread's socket.
        assert_eq!(asked("169.254.53.53", "+notcp").await, ours);
    }
    assert_eq!(asked("127.0.0.1", "+notcp").await, its);
    // Another agent does not take them away.
    let stop_second = CancellationToken::new();
    let second = start_at(own, &stop_second).await.unwrap();
    assert_eq!(held(&second), ["TCP", "UDP"]);
    assert_eq!(asked("169.254.53.53", "+notcp").await, ours);
    stop_second.cancel();
    second.stopped().await;

    // It starts anew, also while its port is tried.
    end(wildcard).await;
    tried_again().await;
    let wildcard = dnsmasq(&[]).await;
    tried_again().await;
    assert_eq!(held(&server), ["TCP"]);
    assert_eq!(asked("169.254.53.53", "+notcp").await, ours);
    assert_eq!(asked("127.0.0.1", "+notcp").await, its);

    // As docs/dns.md says; in either order.
    end(wildcard).await;
    for mode in ["--bind-dynamic", "--bind-interfaces"] {
        let leaves_it = dnsmasq(&[mode, "--except-interface=mesh"]).await;
        tried_again().await;
        tried_again().await;
        assert_eq!(held(&server), <[&str; 0]>::default(), "{mode}");
        for more in ["+notcp", "+tcp"] {
            assert_eq!(asked("169.254.53.53", more).await, ours, "{mode}");
            assert_eq!(asked("127.0.0.1", more).await, its, "{mode}");
        }
        end(leaves_it).await;
    }

    // Who starts later and wants the same ends, and says why.
    for (options, place) in [(&[][..], "port 53"), (&["--bind-dynamic"], "169.254.53.53")] {
        let ended = timeout(SOON, dnsmasq_with(options).output()).await;
        let said = String::from_utf8(ended.unwrap().unwrap().stderr).unwrap();
        let want = format!("failed to create listening socket for {place}");
        assert!(said.contains(&want), "{said}");
    }
    // One at this very address is no more shared with than another agent.
    stop.cancel();
    server.stopped().await;
    let _everywhere = dnsmasq(&["--bind-dynamic"]).await;
    let server = start_at(own, &CancellationToken::new()).await.unwrap();
    assert_eq!(held(&server), ["TCP", "UDP"]);
    assert_eq!(asked("169.254.53.53", "+notcp").await, its);
}

/// Strangers have addresses that are not loopback.
#[tokio::test]
async fn strangers_get_no_answer() {
    let script = "ip address add 198.51.100.77/32 dev lo; ip address add 198.51.100.78/32 dev lo";
    if is_inside("strangers_get_no_answer", script).await {
        strangers_get_no_answer_inside().await;
    }
}

async fn strangers_get_no_answer_inside() {
    let (own, stranger) = ([198, 51, 100, 77], [198, 51, 100, 78]);
    for (allow_from, dropped) in [(None, 2), (Some("198.51.100.78/32"), 0)] {
        let config = DnsConfig {
            listen: vec![(own, 0).into()],
            allow_from: allow_from
                .map(|one| one.parse().unwrap())
                .into_iter()
                .collect(),
            ..DnsConfig::default()
        };
        let view = Arc::new(view());
        let (view, stop) = (move || Some(Arc::clone(&view)), CancellationToken::new());
        let server = DnsServer::start(config, view, || None, |_| None, stop)
            .await
            .unwrap();
        let bytes = query("edge-a1.mesh.", RecordType::A).to_vec().unwrap();
        let framed = [
            &u16::try_from(bytes.len()).unwrap().to_be_bytes()[..],
            &bytes,
        ]
        .concat();

        let sockets = [stranger, own].map(|source| UdpSocket::bind((IpAddr::from(source), 0)));
        let [from_stranger, from_own] = sockets;
        let (from_stranger, from_own) = (from_stranger.await.unwrap(), from_own.await.unwrap());
        for socket in [&from_stranger, &from_own] {
            socket.connect(server.local_addresses()[0]).await.unwrap();
            socket.send(&bytes).await.unwrap();
        }
        receive(&from_own).await;
        let tcp = tokio::net::TcpSocket::new_v4().unwrap();
        tcp.bind((stranger, 0).into()).unwrap();
        let mut stream = tcp.connect(server.local_addresses()[0]).await.unwrap();
        let silent = timeout(Duration::from_secs(2), stream.read_u16()).await;
        // It holds no connection either.
        assert_eq!(matches!(silent, Ok(Err(_))), dropped > 0, "{silent:?}");
        if dropped == 0 {
            stream.write_all(&framed).await.unwrap();
            stream.read_u16().await.unwrap();
            receive(&from_stranger).await;
        }
        // Another thread may have the stranger's datagram.
        let counted = || server.counters().dropped(DropReason::Source);
        timeout(SOON, async {
            while counted() < dropped {
                sleep(Duration::from_millis(5)).await;
            }
        })
        .await
        .unwrap();
        assert_eq!(counted(), dropped);
    }
}

/// An address at which nobody listens.
async fn refusing() -> SocketAddr {
    let socket = UdpSocket::bind((LOOPBACK, 0)).await.unwrap();
    socket.local_addr().unwrap()
}

async fn receive(socket: &UdpSocket) -> Message {
    let mut buffer = [0; 1500];
    let len = socket.recv(&mut buffer).await.unwrap();
    Message::from_vec(&buffer[..len]).unwrap()
}

/// Xorshift: the same garbage every time.
struct Noise(u64);

impl Noise {
    fn bytes(&mut self) -> Vec<u8> {
        let len = self.next() % 64;
        (0..len).map(|_| self.next().to_be_bytes()[0]).collect()
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

/// What is logged, as text.
#[derive(Clone, Default)]
struct Logged(Arc<Mutex<Vec<u8>>>);

impl io::Write for Logged {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        io::Write::write(&mut *self.0.lock().unwrap(), bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[tokio::test]
async fn a_pod_is_told_what_it_may_reach_only_where_that_is_asked_for_and_others_everything() {
    const POD: &str = "127.0.0.77";
    let mut snapshot = common::snapshot();
    common::add_policies(&mut snapshot, POD);
    let view = View {
        snapshot: Arc::new(snapshot),
        ..view()
    };
    for leave_out_denied in [false, true] {
        let config = DnsConfig {
            leave_out_denied,
            ..DnsConfig::default()
        };
        let running = start_with(config, Some(view.clone())).await;
        let told = async |from: &str, more: &str| {
            let name = "db.shop.svc.cluster.local";
            let said = running
                .dig(&format!("-b {from} +short {more} {name}"))
                .await;
            let mut addresses: Vec<_> = said.lines().map(str::to_owned).collect();
            addresses.sort();
            addresses
        };
        let all = ["10.2.1.1", "10.2.2.1", "10.2.3.1"];
        let expected = if leave_out_denied { &all[..1] } else { &all };
        // Also where the answer for everybody, in each order, is ready.
        for _ in 0..5 {
            for more in ["+notcp", "+tcp"] {
                assert_eq!(told("127.0.0.1", more).await, all, "{more}");
                assert_eq!(told(POD, more).await, expected, "{more}");
            }
        }
        let counted = running.server.counters().denied_left_out.get();
        assert_eq!(counted, if leave_out_denied { 10 } else { 0 });
    }
}

#[tokio::test]
async fn queries_are_logged_only_where_that_is_asked_for() {
    let logged = Logged::default();
    let writer = logged.clone();
    let subscriber = tracing_subscriber::fmt().with_writer(move || writer.clone());
    let _guard = tracing::subscriber::set_default(subscriber.with_ansi(false).finish());
    for query_log in [false, true] {
        let config = DnsConfig {
            query_log,
            ..DnsConfig::default()
        };
        let running = start_with(config, Some(view())).await;
        // Decided, the same again as it was sent, one that is not there, and by TCP.
        for arguments in [
            "inventory.shop.svc.cluster.local",
            "inventory.shop.svc.cluster.local",
            "nobody.shop.svc.cluster.local AAAA",
            "+tcp edge-a1.mesh",
        ] {
            running.dig(arguments).await;
        }
        let counters = Arc::clone(running.server.counters());
        running.stop.cancel();
        running.server.stopped().await;
        assert_eq!((counters.queries.get(), counters.unlogged.get()), (4, 0));
        let text = String::from_utf8(std::mem::take(&mut *logged.0.lock().unwrap())).unwrap();
        let lines: Vec<_> = text
            .lines()
            .filter_map(|line| line.split("DNS query ").nth(1))
            .collect();
        let a = "client=127.0.0.1 name=inventory.shop.svc.cluster.local. kind=A code=No Error answers=1";
        let no = "client=127.0.0.1 name=nobody.shop.svc.cluster.local. kind=AAAA code=Non-Existent Domain answers=0";
        let tcp = "client=127.0.0.1 name=edge-a1.mesh. kind=A code=No Error answers=1";
        let want: &[_] = if query_log { &[a, a, no, tcp] } else { &[] };
        assert_eq!(lines, want);
    }
}
