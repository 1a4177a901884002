//! The real server on loopback, and an upstream.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    process::Output,
    sync::{Arc, Mutex},
    time::Duration,
};

use hickory_proto::{
    op::{Message, ResponseCode},
    rr::{
        Name, RData, Record,
        rdata::{A, SOA},
    },
};
use mesh_core::services::View;
use mesh_dns::{
    client,
    server::{DnsConfig, DnsServer},
    upstream::UpstreamConfig,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, UdpSocket},
    process::Command,
    task::AbortHandle,
    time::timeout,
};
use tokio_util::sync::CancellationToken;

pub(crate) const LOOPBACK: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

/// Longer than anything here may take.
pub(crate) const SOON: Duration = Duration::from_secs(10);

pub(crate) fn plain(addresses: &[SocketAddr]) -> Vec<UpstreamConfig> {
    let addresses = addresses.iter().copied();
    addresses.map(UpstreamConfig::plain).collect()
}

pub(crate) struct Running {
    pub(crate) server: DnsServer,
    pub(crate) address: SocketAddr,
    pub(crate) stop: CancellationToken,
}

pub(crate) async fn start(upstreams: &[SocketAddr], view: Option<View>) -> Running {
    let config = DnsConfig {
        upstreams: plain(upstreams),
        ..DnsConfig::default()
    };
    start_with(config, view).await
}

pub(crate) async fn start_with(config: DnsConfig, view: Option<View>) -> Running {
    start_by(config, view, |_| None).await
}

pub(crate) async fn start_by(
    config: DnsConfig,
    view: Option<View>,
    device: impl Fn(IpAddr) -> Option<String> + Clone + Send + Sync + 'static,
) -> Running {
    let callers = view.as_ref().map(|view| super::callers(&view.snapshot));
    let (view, callers) = (view.map(Arc::new), callers.map(Arc::new));
    for _ in 0..16 {
        let config = DnsConfig {
            listen: vec![(LOOPBACK, 0).into()],
            ..config.clone()
        };
        let (view, callers, stop) = (view.clone(), callers.clone(), CancellationToken::new());
        let view = move || view.clone();
        let callers = move || callers.clone();
        let started = DnsServer::start(config, view, callers, device.clone(), stop.clone());
        match started.await {
            // The port that UDP got may be somebody's on TCP.
            Ok(server) if !server.inspector().held().is_empty() => {
                stop.cancel();
                server.stopped().await;
            }
            Ok(server) => {
                let address = server.local_addresses()[0];
                return Running {
                    server,
                    address,
                    stop,
                };
            }
            Err(error) => panic!("{error}"),
        }
    }
    panic!("no free port after 16 attempts");
}

impl Running {
    pub(crate) async fn dig(&self, arguments: &str) -> String {
        let output = Command::new("dig")
            .arg(format!("@{}", self.address.ip()))
            .args(["-p", &self.address.port().to_string()])
            .args(["+tries=1", "+time=5"])
            .args(arguments.split_whitespace())
            .output();
        text(
            &timeout(SOON, output)
                .await
                .unwrap()
                .expect("dig (dnsutils)"),
        )
    }

    pub(crate) async fn ask(&self, name: &str) -> client::Reply {
        timeout(SOON, client::ask(self.address, name, "A"))
            .await
            .unwrap()
            .unwrap()
    }

    pub(crate) async fn answers_own_names(&self) {
        let reply = self.ask("inventory.shop.svc.cluster.local").await;
        assert_eq!(reply.code, "NOERROR");
        assert!(reply.elapsed < Duration::from_secs(1), "{reply:?}");
    }
}

pub(crate) fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// A resolver that knows `*.example.org`; ends with the test's runtime.
pub(crate) struct Upstream {
    pub(crate) address: SocketAddr,
    pub(crate) asked: Arc<Mutex<BTreeMap<String, u32>>>,
    ended: AbortHandle,
}

impl Upstream {
    pub(crate) async fn start() -> Self {
        let (udp, tcp) = both_at_one_port().await;
        let address = udp.local_addr().unwrap();
        let asked = Arc::<Mutex<BTreeMap<String, u32>>>::default();
        let seen = Arc::clone(&asked);
        let udp_task = tokio::spawn(async move {
            let mut buffer = [0; 1500];
            while let Ok((len, from)) = udp.recv_from(&mut buffer).await {
                let query = Message::from_vec(&buffer[..len]).unwrap();
                let name = query.queries[0].name().to_ascii();
                *seen.lock().unwrap().entry(name).or_default() += 1;
                let answer = stub_answer(&query, false).to_vec().unwrap();
                udp.send_to(&answer, from).await.unwrap();
            }
        });
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = tcp.accept().await {
                let mut query = vec![0; usize::from(stream.read_u16().await.unwrap())];
                stream.read_exact(&mut query).await.unwrap();
                let answer = stub_answer(&Message::from_vec(&query).unwrap(), true);
                let answer = answer.to_vec().unwrap();
                let len = u16::try_from(answer.len()).unwrap();
                stream.write_u16(len).await.unwrap();
                stream.write_all(&answer).await.unwrap();
            }
        });
        let ended = udp_task.abort_handle();
        Self {
            address,
            asked,
            ended,
        }
    }

    /// Nobody listens at its UDP port any more.
    pub(crate) fn end(&self) {
        self.ended.abort();
    }

    pub(crate) fn asked(&self, name: &str) -> u32 {
        self.asked
            .lock()
            .unwrap()
            .get(name)
            .copied()
            .unwrap_or_default()
    }

    pub(crate) fn asked_in_all(&self) -> u32 {
        self.asked.lock().unwrap().values().sum()
    }
}

pub(crate) async fn both_at_one_port() -> (UdpSocket, TcpListener) {
    for _ in 0..16 {
        let udp = UdpSocket::bind((LOOPBACK, 0)).await.unwrap();
        if let Ok(tcp) = TcpListener::bind(udp.local_addr().unwrap()).await {
            return (udp, tcp);
        }
    }
    panic!("no free port after 16 attempts");
}

pub(crate) fn stub_answer(query: &Message, over_tcp: bool) -> Message {
    let mut answer = query.clone().into_response();
    answer.metadata.recursion_available = true;
    let name = query.queries[0].name().clone();
    let first = name.to_ascii();
    let first = first.split('.').next().unwrap();
    let ttl_s = match first {
        "short" => 3,
        "brief" => 1,
        _ => 60,
    };
    let record = |low| Record::from_rdata(name.clone(), ttl_s, RData::A(A::new(192, 0, 2, low)));
    match first {
        "missing" => {
            answer.metadata.response_code = ResponseCode::NXDomain;
            let zone = Name::from_ascii("example.org.").unwrap();
            let soa = SOA::new(zone.clone(), zone.clone(), 1, 1, 1, 1, 60);
            answer.add_authority(Record::from_rdata(zone, 60, RData::SOA(soa)));
        }
        "broken" => answer.metadata.response_code = ResponseCode::ServFail,
        "plain" if query.edns.is_some() => {
            answer.metadata.response_code = ResponseCode::FormErr;
            answer.edns = None;
        }
        "large" if over_tcp => {
            answer.add_answers((0..200).map(record));
        }
        "large" => answer.metadata.truncation = true,
        _ => {
            answer.add_answer(record(1));
        }
    }
    answer
}
