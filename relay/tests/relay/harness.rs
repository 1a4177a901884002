//! A mesh with its certificates, a relay process, and nodes that remember what came.

use std::{
    fs,
    io::{BufRead as _, BufReader},
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::{Arc, Mutex},
    thread,
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use mesh_identity::{
    authority::{CertificateAuthority, new_key},
    certificate::Validity,
    credentials::Credentials,
};
use mesh_relay::client::{
    ConnectError, Link, LinkConfig, LinkEvent, OnData, SendError, UdpPort, connect_quic,
    connect_tls, outbound::Outbound,
};
use mesh_wire::id::{Identity, NodeId};
use tempfile::TempDir;
use tokio::{sync::mpsc, time};

/// Longest time for anything that a test waits for, on a machine that is busy with other builds.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Transport {
    Quic,
    Tls,
}

pub(crate) use Transport::{Quic, Tls};

pub(crate) fn id(n: u8) -> NodeId {
    NodeId([n; 32])
}

/// A mesh: its authority, and the folder of its relay.
pub(crate) struct Mesh {
    authority: CertificateAuthority,
    folder: TempDir,
}

impl Mesh {
    pub(crate) fn new() -> Self {
        let authority = CertificateAuthority::generate("test", SystemTime::now()).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let mesh = Self { authority, folder };
        let relay = mesh.credentials(&Identity::Relay("r1".parse().unwrap()));
        mesh.write("relay.pem", &relay.chain_pem());
        mesh.write("relay.key", &relay.key_pem());
        mesh.write("ca.pem", &relay.authority_pem());
        mesh
    }

    pub(crate) fn credentials(&self, identity: &Identity) -> Credentials {
        self.credentials_for(identity, Duration::from_secs(3600))
    }

    pub(crate) fn credentials_for(&self, identity: &Identity, lifetime: Duration) -> Credentials {
        let key = new_key().unwrap();
        let validity = Validity::from_now(SystemTime::now(), lifetime);
        let certificate = self
            .authority
            .issue(identity, &key.csr_der, validity)
            .unwrap();
        let authority = self.authority.certificate_der().clone();
        Credentials::from_parts(vec![certificate], &key.key_pem, authority).unwrap()
    }

    pub(crate) fn node_credentials(&self, n: u8) -> Credentials {
        let name = format!("node-{n}").parse().unwrap();
        self.credentials(&Identity::Node { name, id: id(n) })
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub(crate) fn write(&self, name: &str, text: &str) {
        fs::write(self.path(name), text).unwrap();
    }

    /// Writes `relay.toml`: three free loopback ports, or those that `listen` says.
    pub(crate) fn configure(&self, listen: Option<[SocketAddr; 3]>, more: &str) -> PathBuf {
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        let [quic, tls, stun] = listen.unwrap_or([any; 3]);
        let metrics = if more.contains("metrics_listen") {
            ""
        } else {
            "metrics_listen = \"off\"\n" // Its port is not free for all tests at once.
        };
        let text = format!(
            "name = \"r1\"\ncertificate = \"relay.pem\"\nkey = \"relay.key\"\nca = \"ca.pem\"\n\
             quic_listen = \"{quic}\"\ntls_listen = \"{tls}\"\nstun_listen = [\"{stun}\"]\n{metrics}{more}\n"
        );
        self.write("relay.toml", &text);
        self.path("relay.toml")
    }

    pub(crate) fn relay(&self) -> Relay {
        self.relay_with("")
    }

    pub(crate) fn relay_with(&self, more: &str) -> Relay {
        Relay::start(command(&self.configure(None, more)))
    }
}

/// The relay, which does not outlive the test, however that ends.
pub(crate) fn command(config: &Path) -> Command {
    let mut command = Command::new("setpriv");
    command.args([
        "--pdeathsig",
        "KILL",
        env!("CARGO_BIN_EXE_mesh-relay"),
        "--config",
    ]);
    command.arg(config);
    command
}

/// A relay process; killed when dropped.
pub(crate) struct Relay {
    child: Child,
    log: Arc<Mutex<Vec<String>>>,
    reader: Option<thread::JoinHandle<()>>,
    pub(crate) quic: SocketAddr,
    pub(crate) tls: SocketAddr,
    pub(crate) stun: SocketAddr,
}

impl Relay {
    pub(crate) fn start(mut command: Command) -> Self {
        let mut child = command
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let mut before = Vec::new();
        let listening = loop {
            match lines.next() {
                Some(line) => {
                    let line = line.unwrap();
                    if line.contains("listening") {
                        break line;
                    }
                    before.push(line);
                }
                None => panic!("the relay ended: {:?}", child.wait()),
            }
        };
        let log = Arc::new(Mutex::new(before));
        let writer = log.clone();
        let reader = thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                writer.lock().unwrap().push(line);
            }
        });
        Self {
            child,
            log,
            reader: Some(reader),
            quic: field(&listening, "quic="),
            tls: field(&listening, "tls="),
            stun: field(&listening, "stun=["),
        }
    }

    pub(crate) fn addresses(&self) -> [SocketAddr; 3] {
        [self.quic, self.tls, self.stun]
    }

    /// The line with `words` in it, once it has been written.
    pub(crate) async fn logged(&self, words: &str) -> String {
        let logged = || {
            let log = self.log.lock().unwrap();
            log.iter().find(|line| line.contains(words)).cloned()
        };
        let waiting = async {
            loop {
                if let Some(line) = logged() {
                    return line;
                }
                time::sleep(Duration::from_millis(50)).await;
            }
        };
        let waited = time::timeout(PATIENCE, waiting).await;
        waited.unwrap_or_else(|_| panic!("nothing of {words:?} in the log"))
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn terminate(&self) {
        let pid = i32::try_from(self.child.id()).unwrap();
        let pid = rustix::process::Pid::from_raw(pid).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    }

    pub(crate) fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    pub(crate) fn wait(&mut self) -> ExitStatus {
        self.child.wait().unwrap()
    }

    /// Stops it in order. Returns what it wrote.
    pub(crate) fn stop(mut self) -> String {
        self.terminate();
        let status = self.wait();
        self.reader.take().unwrap().join().unwrap();
        let log = self.log.lock().unwrap().join("\n");
        assert!(status.success(), "{status}: {log}");
        log
    }

    pub(crate) fn resident_kib(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap();
        let line = status
            .lines()
            .find(|line| line.starts_with("VmRSS:"))
            .unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.child.kill().ok(); // It may have ended already.
        self.child.wait().ok();
    }
}

pub(crate) fn field(line: &str, key: &str) -> SocketAddr {
    let (_, rest) = line.split_once(key).unwrap();
    let word = rest.split([' ', ',']).next().unwrap();
    word.trim_end_matches(']').parse().unwrap() // The end of the list.
}

/// The number behind `key=` in the relay's last words.
#[track_caller]
pub(crate) fn counter(log: &str, key: &str) -> u64 {
    let line = log.lines().rfind(|line| line.contains("stopped"));
    let line = line.unwrap_or_else(|| panic!("no last words in {log:?}"));
    let (_, rest) = line.split_once(&format!(" {key}=")).unwrap();
    rest.split(' ').next().unwrap().parse().unwrap()
}

/// A node with one link.
pub(crate) struct Node {
    pub(crate) id: NodeId,
    pub(crate) link: Arc<Link>,
    events: mpsc::Receiver<LinkEvent>,
    data: mpsc::UnboundedReceiver<(NodeId, Vec<u8>)>,
}

impl Node {
    pub(crate) async fn connect(mesh: &Mesh, relay: &Relay, n: u8, transport: Transport) -> Self {
        let node = Self::try_connect(mesh.node_credentials(n), relay, transport).await;
        Self {
            id: id(n),
            ..node.unwrap()
        }
    }

    pub(crate) async fn try_connect(
        credentials: Credentials,
        relay: &Relay,
        transport: Transport,
    ) -> Result<Self, ConnectError> {
        Self::try_connect_to(credentials, relay.addresses(), transport).await
    }

    pub(crate) async fn try_connect_to(
        credentials: Credentials,
        addresses: [SocketAddr; 3],
        transport: Transport,
    ) -> Result<Self, ConnectError> {
        Self::try_connect_with(credentials, addresses, transport, None).await
    }

    pub(crate) async fn try_connect_with(
        credentials: Credentials,
        [quic, tls, _]: [SocketAddr; 3],
        transport: Transport,
        udp: Option<UdpPort>,
    ) -> Result<Self, ConnectError> {
        let (to_events, events) = mpsc::channel(64);
        let (to_data, data) = mpsc::unbounded_channel();
        let on_data: OnData = Arc::new(move |packets: &[(NodeId, Bytes)]| {
            for (node, bytes) in packets {
                to_data.send((*node, bytes.to_vec())).ok(); // The test is over.
            }
        });
        let config = |address| LinkConfig {
            relay: "r1".parse().unwrap(),
            identity: Identity::Relay("r1".parse().unwrap()),
            address,
            credentials,
            udp,
            outbound: Outbound::default(),
        };
        let link = match transport {
            Quic => connect_quic(config(quic), to_events, on_data).await?,
            Tls => connect_tls(config(tls), to_events, on_data).await?,
        };
        Ok(Self {
            id: id(0),
            link: Arc::new(link),
            events,
            data,
        })
    }

    #[track_caller]
    pub(crate) fn send(&self, to: &Self, bytes: &[u8]) {
        self.link.send(&to.id, bytes).unwrap();
    }

    pub(crate) fn try_send(&self, to: NodeId) -> Result<(), SendError> {
        self.link.send(&to, b"x")
    }

    pub(crate) async fn event(&mut self) -> LinkEvent {
        let event = time::timeout(PATIENCE, self.events.recv()).await;
        event
            .expect("an event in time")
            .expect("a link with events")
    }

    pub(crate) async fn data(&mut self) -> (NodeId, Vec<u8>) {
        let data = time::timeout(PATIENCE, self.data.recv()).await;
        data.expect("a packet in time")
            .expect("a link with packets")
    }

    /// Closes the link and waits for its task to end. Returns an event that came nevertheless.
    pub(crate) async fn close(self) -> Option<LinkEvent> {
        let Self {
            link, mut events, ..
        } = self;
        link.close();
        drop(link);
        let event = time::timeout(PATIENCE, events.recv()).await;
        event.expect("the end of the link's task")
    }

    pub(crate) async fn expect_peer(&mut self, node: NodeId, present: bool) {
        assert_eq!(self.event().await, LinkEvent::Peer { node, present });
    }

    /// Waits for the end of the link. Returns the reason.
    pub(crate) async fn lost(&mut self) -> String {
        loop {
            if let LinkEvent::Lost { reason } = self.event().await {
                return reason;
            }
        }
    }
}
