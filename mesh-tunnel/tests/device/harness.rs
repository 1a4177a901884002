//! Network namespaces, and WireGuard programs that run in them.

#[path = "../common/pattern.rs"]
mod pattern;

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    sync::atomic::{AtomicUsize, Ordering},
    thread,
    time::{Duration, Instant},
};

use mesh_linux::netns;
use pattern::pattern;

/// Longer than anything here takes, shorter than anybody's patience.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

pub(crate) const MESH_TUNNEL: &str = env!("CARGO_BIN_EXE_mesh-tunnel");

/// Three network namespaces that know nothing of one another; gone when dropped, also after a panic.
pub(crate) struct Lab {
    names: [String; 3],
}

impl Lab {
    pub(crate) fn new() -> Self {
        static NUMBER: AtomicUsize = AtomicUsize::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let lab = Self {
            names: ["a", "b", "c"].map(|n| format!("hfd{}-{number}{n}", std::process::id())),
        };
        for (n, name) in lab.names.iter().enumerate() {
            run(&format!("ip netns add {name}"));
            lab.ip(n, "link set lo up");
            // An address that is still being checked cannot be used.
            lab.sysctl(n, "net/ipv6/conf/all/accept_dad", "0");
            lab.sysctl(n, "net/ipv6/conf/default/accept_dad", "0");
        }
        lab
    }

    /// Joins two namespaces by a veth pair with these addresses, `LINK ADDRESS…` on either side.
    pub(crate) fn join(&self, [(a, a_has), (b, b_has)]: [(usize, &str); 2]) {
        let link = |has: &str| has.split(' ').next().unwrap().to_owned();
        let (a_link, b_link, b_name) = (link(a_has), link(b_has), &self.names[b]);
        self.ip(
            a,
            &format!("link add {a_link} type veth peer name {b_link} netns {b_name}"),
        );
        for (n, has) in [(a, a_has), (b, b_has)] {
            let link = link(has);
            for address in has.split(' ').skip(1) {
                self.ip(n, &format!("addr add {address} dev {link}"));
            }
            self.ip(n, &format!("link set {link} up"));
        }
        for (n, link) in [(a, a_link), (b, b_link)] {
            // IPv6 does not begin before the kernel has noticed the carrier.
            let show = format!("link show {link}");
            wait_until("the link is up", || self.ip(n, &show).contains("state UP"));
        }
    }

    pub(crate) fn name(&self, n: usize) -> &str {
        &self.names[n]
    }

    #[track_caller]
    pub(crate) fn ip(&self, n: usize, words: &str) -> String {
        run(&format!("ip -n {} {words}", self.names[n]))
    }

    /// Runs a command that must succeed; what it says.
    #[track_caller]
    pub(crate) fn exec(&self, n: usize, command: &str) -> String {
        run(&format!("ip netns exec {} {command}", self.names[n]))
    }

    /// Whether a command succeeds.
    pub(crate) fn succeeds(&self, n: usize, command: &str) -> bool {
        output(&format!("ip netns exec {} {command}", self.names[n]))
            .status
            .success()
    }

    #[track_caller]
    pub(crate) fn ping(&self, n: usize, to: &str) {
        self.exec(n, &format!("ping -c 1 -W 1 {to}"));
    }

    pub(crate) fn sysctl(&self, n: usize, key: &str, value: &str) {
        let path = Path::new("/proc/sys").join(key);
        self.on(n, || fs::write(&path, value).unwrap());
    }

    /// Runs `work` in a namespace.
    pub(crate) fn on<T: Send>(&self, n: usize, work: impl FnOnce() -> T + Send) -> T {
        netns::run_in(&netns::named(&self.names[n]), work).expect("enter the namespace")
    }

    /// One second of `iperf3` from `from` to the address `to` of another namespace.
    #[track_caller]
    pub(crate) fn iperf(&self, from: usize, server: usize, to: &str, words: &str) {
        let name = &self.names[server];
        let mut server = Command::new("ip")
            .args(["netns", "exec", name, "iperf3", "-s", "-1", "-B", to])
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let client = format!("iperf3 -Z -t 1 -J -c {to} {words}");
        // It may not listen yet.
        wait_until(&client, || self.succeeds(from, &client));
        server.kill().ok();
        server.wait().unwrap();
    }

    /// Sends `len` bytes of pattern by TCP and checks every one. `middle` runs when half is through.
    #[track_caller]
    pub(crate) fn transfer(
        &self,
        from: usize,
        to: (usize, &str),
        len: usize,
        middle: impl FnOnce(),
    ) {
        let (server, to): (_, IpAddr) = (to.0, to.1.parse().unwrap());
        let listener = self.on(server, || TcpListener::bind((to, 0)).unwrap());
        let address: SocketAddr = listener.local_addr().unwrap();
        let data = pattern(len);
        let (first, second) = data.split_at(len / 2);
        thread::scope(|scope| {
            let receiver = scope.spawn(|| {
                let (mut stream, _) = listener.accept().unwrap();
                stream.set_read_timeout(Some(PATIENCE)).unwrap();
                let mut received = Vec::new();
                stream.read_to_end(&mut received).unwrap();
                received
            });
            let connect = || TcpStream::connect_timeout(&address, PATIENCE).unwrap();
            let mut stream = self.on(from, connect);
            stream.set_write_timeout(Some(PATIENCE)).unwrap();
            stream.write_all(first).unwrap();
            middle();
            stream.write_all(second).unwrap();
            drop(stream);
            let received = receiver.join().unwrap();
            let count = received.len();
            assert!(
                received == data,
                "{count} of {len} bytes arrived, or others"
            );
        });
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        for name in &self.names {
            output(&format!("ip netns delete {name}"));
        }
    }
}

pub(crate) fn output(command: &str) -> Output {
    let mut words = command.split_whitespace();
    Command::new(words.next().unwrap())
        .args(words)
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

/// Runs a command that must succeed; what it says.
#[track_caller]
pub(crate) fn run(command: &str) -> String {
    let output = output(command);
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let complained = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command}: {complained}{said}");
    said
}

/// Runs `wg` with a text on its standard input; what it says, or complains of.
pub(crate) fn wg(words: &str, input: &str) -> Result<String, String> {
    let mut wg = Command::new("wg")
        .args(words.split_whitespace())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("start `wg`: Debian package wireguard-tools");
    wg.stdin
        .take()
        .unwrap()
        .write_all(input.as_bytes())
        .unwrap();
    let output = wg.wait_with_output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap().trim_end().to_owned();
    if output.status.success() {
        return Ok(text(output.stdout));
    }
    Err(text(output.stderr))
}

/// A private key and its public key, as `wg` writes them.
#[derive(Debug, Clone)]
pub(crate) struct Keys {
    pub(crate) private: String,
    pub(crate) public: String,
}

impl Keys {
    pub(crate) fn new() -> Self {
        let private = wg("genkey", "").unwrap();
        let public = wg("pubkey", &private).unwrap();
        Self { private, public }
    }
}

/// A program that is a WireGuard device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Program {
    MeshTunnel,
    WireguardGo,
    Boringtun,
    Gotatun,
}

impl Program {
    fn command(self, interface: &str) -> Vec<String> {
        let tool = |name| tool(name).to_string_lossy().into_owned();
        let words = match self {
            Self::MeshTunnel => vec![MESH_TUNNEL.to_owned(), "-f".to_owned()],
            Self::WireguardGo => vec!["wireguard-go".to_owned(), "-f".to_owned()],
            Self::Boringtun => {
                let stay_root = "--disable-drop-privileges".to_owned();
                vec![tool("boringtun-cli"), "-f".to_owned(), stay_root]
            }
            Self::Gotatun => {
                let stay_root = "--disable-drop-privileges".to_owned();
                vec![tool("gotatun"), "-f".to_owned(), stay_root]
            }
        };
        words.into_iter().chain([interface.to_owned()]).collect()
    }
}

/// A program of crates.io that `cargo xtask` installs.
fn tool(name: &str) -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    // Where the benches have theirs, and where the tests have what no bench has installed.
    let folders = ["target/bench-tools/bin", "target/test-tools/bin"];
    let mut paths = folders.iter().map(|folder| root.join(folder).join(name));
    let found = paths.find(|path| path.exists());
    found.unwrap_or_else(|| panic!("{name} is missing: `cargo xtask test` installs it"))
}

/// A WireGuard device; its process ends when dropped.
pub(crate) struct Device {
    pub(crate) name: String,
    pub(crate) process: Child,
}

/// A name for an interface that no other test has: control sockets have one folder for all
/// network namespaces.
pub(crate) fn new_name() -> String {
    static NUMBER: AtomicUsize = AtomicUsize::new(0);
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    format!("wg{}x{number}", std::process::id())
}

pub(crate) fn socket_path(interface: &str) -> PathBuf {
    Path::new("/var/run/wireguard").join(format!("{interface}.sock"))
}

impl Device {
    #[track_caller]
    pub(crate) fn start(lab: &Lab, n: usize, program: Program) -> Self {
        let name = new_name();
        let process = Command::new("ip")
            .args(["netns", "exec", lab.name(n)])
            .args(program.command(&name))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let device = Self { name, process };
        let what = format!("{program:?} answers `wg show`");
        wait_until(&what, || wg(&format!("show {}", device.name), "").is_ok());
        device
    }

    /// `wg set` with these words.
    #[track_caller]
    pub(crate) fn set(&self, words: &str) {
        self.set_with(words, "");
    }

    /// `wg set` with these words; what `/dev/stdin` among them holds.
    #[track_caller]
    pub(crate) fn set_with(&self, words: &str, input: &str) {
        if let Err(complaint) = wg(&format!("set {} {words}", self.name), input) {
            panic!("wg set {words}: {complaint}");
        }
    }

    /// `wg setconf` (or `addconf`, `syncconf`) with this configuration.
    #[track_caller]
    pub(crate) fn conf(&self, verb: &str, configuration: &str) {
        let words = format!("{verb} {} /dev/stdin", self.name);
        if let Err(complaint) = wg(&words, configuration) {
            panic!("wg {verb}: {complaint}: {configuration}");
        }
    }

    /// What `wg show` says of one thing.
    #[track_caller]
    pub(crate) fn show(&self, what: &str) -> String {
        wg(&format!("show {} {what}", self.name), "").unwrap()
    }

    /// Bytes received from and sent to the only peer.
    #[track_caller]
    pub(crate) fn transferred(&self) -> (u64, u64) {
        let said = self.show("transfer");
        let mut words = said.split_whitespace().skip(1);
        let mut next = || words.next().unwrap().parse().unwrap();
        (next(), next())
    }

    /// Sends bytes to the control socket; the answer, until an empty line or the end.
    pub(crate) fn ask(&self, request: &str) -> String {
        let mut stream = UnixStream::connect(socket_path(&self.name)).unwrap();
        ask(&mut stream, request)
    }

    /// Asks the process to end, and waits for that.
    pub(crate) fn terminate(&mut self) {
        run(&format!("kill {}", self.process.id()));
        self.await_end();
    }

    #[track_caller]
    pub(crate) fn await_end(&mut self) {
        wait_until("the process ends", || {
            self.process.try_wait().unwrap().is_some()
        });
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        self.process.kill().ok();
        self.process.wait().ok();
        fs::remove_file(socket_path(&self.name)).ok();
    }
}

/// A device in the background, which ends when its socket is removed: also after a panic.
pub(crate) struct Background(pub(crate) String);

impl Drop for Background {
    fn drop(&mut self) {
        fs::remove_file(socket_path(&self.0)).ok();
    }
}

/// Sends a request by a connection; the answer, until an empty line or the end.
pub(crate) fn ask(stream: &mut UnixStream, request: &str) -> String {
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.write_all(request.as_bytes()).unwrap();
    let (mut answer, mut byte) = (Vec::new(), [0]);
    while !answer.ends_with(b"\n\n") && stream.read(&mut byte).unwrap() == 1 {
        answer.push(byte[0]);
    }
    String::from_utf8(answer).unwrap()
}

/// Waits until `condition` holds.
#[track_caller]
pub(crate) fn wait_until(what: &str, condition: impl FnMut() -> bool) {
    assert!(comes_true(PATIENCE, condition), "never: {what}");
}

pub(crate) fn comes_true(patience: Duration, mut condition: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + patience;
    while !condition() {
        if Instant::now() >= deadline {
            return false;
        }
        thread::sleep(Duration::from_millis(20));
    }
    true
}
