//! Upstreams: by TLS and HTTPS (Debian's unbound as the server), slow ones, and what is kept of their answers.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test may fail loudly, and its helpers too"
)]

mod common;

use std::{
    fs,
    net::SocketAddr,
    path::PathBuf,
    process::Stdio,
    sync::{Arc, Mutex},
    time::Duration,
};

use common::running::{LOOPBACK, Running, SOON, Upstream, plain, start, start_by, start_with};
use mesh_dns::{
    server::{DnsConfig, DnsServer, StartError},
    upstream::UpstreamConfig,
};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use tempfile::TempDir;
use tokio::{
    net::{TcpStream, UdpSocket},
    process::{Child, Command},
    time::{Instant, sleep, timeout},
};
use tokio_util::sync::CancellationToken;

const NAME: &str = "resolver.example.org";

/// Unbound with a certificate for [`NAME`] and its address; `www.example.org` is 192.0.2.53 there.
struct Secure {
    tls: SocketAddr,
    https: SocketAddr,
    /// The one that signed the certificate.
    ca_file: PathBuf,
    process: Child,
    folder: TempDir,
}

impl Secure {
    async fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let authority = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        let key = KeyPair::generate().unwrap();
        let names = [NAME.to_owned(), LOOPBACK.to_string()];
        let certificate = CertificateParams::new(names).unwrap();
        let certificate = certificate.signed_by(&key, &authority).unwrap();
        fs::write(path("ca.pem"), authority.pem()).unwrap();
        fs::write(path("cert.pem"), certificate.pem()).unwrap();
        fs::write(path("key.pem"), key.serialize_pem()).unwrap();
        let [tls, https] = [free_port().await, free_port().await];
        let ca_file = path("ca.pem");
        let mut secure = Self {
            process: unbound(&folder, tls, https),
            tls,
            https,
            ca_file,
            folder,
        };
        secure.until_up().await;
        secure
    }

    async fn again(&mut self) {
        self.process.kill().await.unwrap();
        self.process = unbound(&self.folder, self.tls, self.https);
        self.until_up().await;
    }

    /// `-STOP`: it goes silent, and the kernel takes connections all the same; `-CONT`: it goes on.
    async fn signal(&self, signal: &str) {
        let id = self.process.id().unwrap().to_string();
        let sent = Command::new("kill").args([signal, &id]).status();
        assert!(sent.await.unwrap().success());
    }

    async fn until_up(&mut self) {
        let start = Instant::now();
        while TcpStream::connect(self.https).await.is_err() {
            assert_eq!(
                self.process.try_wait().unwrap(),
                None,
                "unbound (Debian's unbound) ended"
            );
            assert!(start.elapsed() < SOON);
            sleep(Duration::from_millis(20)).await;
        }
    }

    fn config(&self, upstream: UpstreamConfig) -> DnsConfig {
        DnsConfig {
            upstreams: vec![upstream],
            ca_file: Some(self.ca_file.clone()),
            ..DnsConfig::default()
        }
    }
}

fn unbound(folder: &TempDir, tls: SocketAddr, https: SocketAddr) -> Child {
    let dir = folder.path().display();
    let text = format!(
        "server:\n interface: {}@{}\n interface: {}@{}\n tls-port: {}\n https-port: {}\n http-endpoint: \"/dns-query\"\n \
         tls-service-key: {dir}/key.pem\n tls-service-pem: {dir}/cert.pem\n do-daemonize: no\n chroot: \"\"\n \
         username: \"\"\n directory: {dir}\n pidfile: \"\"\n use-syslog: no\n logfile: \"\"\n \
         local-zone: example.org. static\n local-data: \"www.example.org. 60 A 192.0.2.53\"\n \
         local-data: \"brief.example.org. 1 A 192.0.2.54\"\nremote-control:\n \
         control-enable: no\n",
        tls.ip(),
        tls.port(),
        https.ip(),
        https.port(),
        tls.port(),
        https.port(),
    );
    let file = folder.path().join("unbound.conf");
    fs::write(&file, text).unwrap();
    let path = std::env::var("PATH").unwrap_or_default();
    let mut command = Command::new("unbound");
    command
        .arg("-d")
        .arg("-c")
        .arg(file)
        .env("PATH", path + ":/usr/sbin");
    command.stderr(Stdio::null()).kill_on_drop(true);
    command.spawn().expect("unbound (Debian's unbound)")
}

async fn free_port() -> SocketAddr {
    let listener = tokio::net::TcpListener::bind((LOOPBACK, 0)).await;
    listener.unwrap().local_addr().unwrap()
}

impl Running {
    async fn gets(&self, name: &str, code: &str) {
        let reply = self.ask(name).await;
        assert_eq!(reply.code, code, "{name}: {reply:?}");
    }
}

#[tokio::test]
async fn upstreams_are_asked_by_tls_and_by_https_also_after_they_restarted() {
    let mut secure = Secure::start().await;
    let url = format!("https://{NAME}/dns-query");
    let by_tls = UpstreamConfig::tls(secure.tls, NAME).unwrap();
    let by_address = format!("tls://{}", secure.tls).parse().unwrap();
    let by_https = UpstreamConfig::https(secure.https, &url).unwrap();
    let mut servers = Vec::new();
    for upstream in [by_tls, by_address, by_https] {
        servers.push(start_with(secure.config(upstream), None).await);
    }
    for server in &servers {
        let reply = server.ask("www.example.org").await;
        assert!(
            reply.answers.concat().contains("192.0.2.53"),
            "{reply:?} {:?}",
            server.server.counters()
        );
        server.gets("missing.example.org", "NXDOMAIN").await;
    }
    // The connection that they have is over.
    secure.again().await;
    for server in &servers {
        server.gets("missing2.example.org", "NXDOMAIN").await;
        assert_eq!(server.server.counters().forwarded.get(), 3);
    }
}

#[tokio::test]
async fn a_lone_upstream_by_tls_or_https_that_falls_silent_is_waited_for_once_and_back_when_it_is()
{
    let secure = Secure::start().await;
    let url = format!("https://{NAME}/dns-query");
    let by_tls = UpstreamConfig::tls(secure.tls, NAME).unwrap();
    let by_https = UpstreamConfig::https(secure.https, &url).unwrap();
    for upstream in [by_tls, by_https] {
        let server = start_with(secure.config(upstream), None).await;
        let counters = server.server.counters();
        server.gets("brief.example.org", "NOERROR").await;
        sleep(Duration::from_millis(1100)).await; // Its time to live is one second.
        secure.signal("-STOP").await;
        for passed_over in 0..4 {
            let said = server.dig("brief.example.org").await;
            assert!(said.contains("192.0.2.54"), "{said}");
            assert!(said.contains("EDE: 3 (Stale Answer)"), "{said}");
            assert_eq!(counters.passed_over.get(), passed_over);
        }
        let [.., most, _] = counters.waits.counts();
        assert_eq!(most, 1, "waited for more than a second");
        assert_eq!(counters.stale.get(), 4);
        secure.signal("-CONT").await;
        let start = Instant::now();
        let mut stale = 0;
        while counters.stale.get() > stale {
            stale = counters.stale.get();
            assert!(start.elapsed() < SOON, "it was back long ago");
            sleep(Duration::from_millis(100)).await;
            server.gets("brief.example.org", "NOERROR").await;
        }
    }
}

#[tokio::test]
async fn an_upstream_by_tls_that_lost_its_connections_in_a_power_cut_is_asked_by_a_new_one() {
    let secure = Secure::start().await;
    // Passes on what comes by new connections; those of before the cut stay, and nothing moves there.
    let (listener, (cut, _)) = (
        tokio::net::TcpListener::bind((LOOPBACK, 0)).await.unwrap(),
        tokio::sync::watch::channel(()),
    );
    let address = listener.local_addr().unwrap();
    let (to, cuts) = (secure.tls, cut.clone());
    tokio::spawn(async move {
        while let Ok((mut one, _)) = listener.accept().await {
            let mut cut = cuts.subscribe();
            tokio::spawn(async move {
                let mut other = TcpStream::connect(to).await.unwrap();
                tokio::select! {
                    _ = tokio::io::copy_bidirectional(&mut one, &mut other) => {}
                    _ = cut.changed() => std::future::pending().await,
                }
            });
        }
    });
    let upstream = UpstreamConfig::tls(address, NAME).unwrap();
    let server = start_with(secure.config(upstream), None).await;
    server.gets("n1.example.org", "NXDOMAIN").await;
    cut.send(()).unwrap();
    let waits = server.dig("n2.example.org").await;
    assert!(waits.contains("status: SERVFAIL"), "{waits}");
    server.gets("n3.example.org", "NXDOMAIN").await;
}

#[tokio::test]
async fn upstreams_are_asked_by_the_interface_that_is_named_also_when_it_is_another() {
    let (plainly, secure) = (Upstream::start().await, Secure::start().await);
    let url = format!("https://{NAME}/dns-query");
    let upstreams = [
        (UpstreamConfig::plain(plainly.address), "NOERROR"),
        (UpstreamConfig::tls(secure.tls, NAME).unwrap(), "NXDOMAIN"),
        (
            UpstreamConfig::https(secure.https, &url).unwrap(),
            "NXDOMAIN",
        ),
    ];
    for (upstream, works) in upstreams {
        let named = Arc::new(Mutex::new(None));
        let (said, to) = (Arc::clone(&named), upstream.address.ip());
        let device = move |ip| {
            assert_eq!(ip, to);
            said.lock().unwrap().clone()
        };
        let server = start_by(secure.config(upstream), None, device).await;
        // By an interface that there is not nobody is reached, nor by the connection that there is by another.
        for (number, device, code) in [
            (1, None, works),
            (2, Some("lo"), works),
            (3, Some("nowhere0"), "SERVFAIL"),
            (4, Some("lo"), works),
            (5, None, works),
        ] {
            *named.lock().unwrap() = device.map(str::to_owned);
            server.gets(&format!("n{number}.example.org"), code).await;
        }
    }
}

#[tokio::test]
async fn an_upstream_without_the_right_certificate_is_not_believed() {
    let (secure, other) = (Secure::start().await, Secure::start().await);
    let wrong_name = UpstreamConfig::tls(secure.tls, "other.example.org").unwrap();
    let wrong_address = UpstreamConfig::tls(secure.tls, "127.0.0.2").unwrap();
    let right_name = UpstreamConfig::tls(secure.tls, NAME).unwrap();
    let strange_authority = DnsConfig {
        ca_file: Some(other.ca_file.clone()),
        ..secure.config(right_name)
    };
    let wrong = [wrong_name, wrong_address].map(|upstream| secure.config(upstream));
    for config in wrong.into_iter().chain([strange_authority]) {
        let server = start_with(config, None).await;
        server.gets("www.example.org", "SERVFAIL").await;
        assert_eq!(server.server.counters().upstream_failures.get(), 1);
    }
}

#[tokio::test]
async fn authorities_that_are_none_are_named_before_anything_is_asked() {
    let folder = tempfile::tempdir().unwrap();
    let empty = folder.path().join("empty.pem");
    fs::write(&empty, "").unwrap();
    for (file, want) in [
        (&empty, "no certificates of authorities in"),
        (&folder.path().join("none"), "cannot read"),
    ] {
        let upstream = UpstreamConfig::tls(([192, 0, 2, 1], 853).into(), NAME).unwrap();
        let config = DnsConfig {
            upstreams: vec![upstream],
            ca_file: Some(file.clone()),
            ..DnsConfig::default()
        };
        let started =
            DnsServer::start(config, || None, || None, |_| None, CancellationToken::new()).await;
        let Err(StartError::Authorities(error)) = started else {
            panic!("started")
        };
        assert!(error.to_string().contains(want), "{error}");
    }
}

#[tokio::test]
async fn a_slow_upstream_is_overtaken_by_the_next_of_the_other_family_and_then_passed_over() {
    let silent = UdpSocket::bind(("::1", 0)).await.unwrap();
    let upstream = Upstream::start().await;
    let running = start(&[silent.local_addr().unwrap(), upstream.address], None).await;
    let counters = running.server.counters();
    for asked in 1..=2 {
        // Long before the silent one has had its 1.2 s.
        let reply = running.ask(&format!("n{asked}.example.org")).await;
        assert_eq!(reply.code, "NOERROR");
        assert!(reply.elapsed < Duration::from_millis(1100), "{reply:?}");
        assert_eq!(counters.hedged.get(), asked);
    }
    running.gets("n3.example.org", "NOERROR").await;
    assert_eq!(counters.hedged.get(), 2, "the silent one was asked again");
    assert_eq!(upstream.asked_in_all(), 3);
}

#[tokio::test]
async fn where_nothing_goes_by_udp_an_upstream_is_asked_by_tcp() {
    let upstream = Upstream::start().await;
    upstream.end();
    let by_tcp = format!("tcp://{}", upstream.address).parse().unwrap();
    let config = DnsConfig {
        upstreams: vec![by_tcp],
        ..DnsConfig::default()
    };
    let running = start_with(config, None).await;
    for name in ["www.example.org", "large.example.org"] {
        running.gets(name, "NOERROR").await;
    }
    running.gets("missing.example.org", "NXDOMAIN").await;
    assert_eq!(running.server.counters().upstream_failures.get(), 0);
}

#[tokio::test]
async fn what_is_asked_for_often_is_there_when_its_time_is_over() {
    let upstream = Upstream::start().await;
    let running = start(&[upstream.address], None).await;
    let counters = running.server.counters();
    let start = Instant::now();
    // Its time to live is 3 s: asked for all the time, it is asked for anew in the last 0.3 s.
    while counters.prefetched.get() == 0 {
        running.gets("short.example.org", "NOERROR").await;
        assert!(start.elapsed() < SOON);
        sleep(Duration::from_millis(20)).await;
    }
    timeout(SOON, async {
        while upstream.asked("short.example.org.") < 2 {
            sleep(Duration::from_millis(5)).await;
        }
    })
    .await
    .unwrap();
    assert_eq!(counters.forwarded.get(), 1, "nobody had to wait for it");
}

#[tokio::test]
async fn stale_answers_are_given_for_as_long_as_is_configured() {
    for (stale_max, code) in [
        (Duration::from_secs(60), "NOERROR"),
        (Duration::ZERO, "SERVFAIL"),
    ] {
        let upstream = Upstream::start().await;
        let config = DnsConfig {
            upstreams: plain(&[upstream.address]),
            stale_max,
            ..DnsConfig::default()
        };
        let running = start_with(config, None).await;
        running.gets("brief.example.org", "NOERROR").await;
        upstream.end();
        sleep(Duration::from_millis(1100)).await; // Its time to live is one second.
        let start = Instant::now();
        running.gets("brief.example.org", code).await;
        assert!(start.elapsed() < Duration::from_secs(3));
        let given = u64::from(code == "NOERROR");
        assert_eq!(running.server.counters().stale.get(), given);
    }
}
