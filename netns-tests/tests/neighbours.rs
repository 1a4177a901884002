//! A site that is cut off since before its nodes start meshes all the same: they announce themselves on their LAN. What
//! somebody else on it says is counted, and nothing more.

use std::{
    fs,
    net::{Ipv4Addr, SocketAddr, UdpSocket},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use netns_tests::{
    mesh::{Mesh, word},
    node::Node,
    tool,
};
use serde_json::Value;

/// Where announcements go.
const GROUP: Ipv4Addr = Ipv4Addr::new(239, 255, 72, 70);
const PORT: u16 = 51_818;

/// What should happen soon has happened by then, or never will.
const SOON: Duration = Duration::from_secs(20);

const NODES: [&str; 2] = ["edge-a1", "edge-a2"];
const SECOND: &str = "100.96.1.2";

/// The nodes stop, and remember no addresses.
fn forget(mesh: &Mesh) -> Result<()> {
    for name in NODES {
        mesh.kill(name, "mesh-agent")?;
        let peers = mesh.node(name)?.dir().join("state/peers");
        if peers.exists() {
            fs::remove_file(&peers)?;
        }
    }
    Ok(())
}

/// The nodes start in another life: other addresses, none remembered, and nobody beyond the router. Returns when.
fn restart_cut_off(mesh: &Mesh, lines: &str, addresses: [u8; 2]) -> Result<Instant> {
    forget(mesh)?;
    for (name, last) in NODES.into_iter().zip(addresses) {
        let address = [192, 168, 1, last].into();
        mesh.site("site-a")?.renumber(&mesh.node(name)?, address)?;
    }
    start_cut_off(mesh, lines)
}

fn start_cut_off(mesh: &Mesh, lines: &str) -> Result<Instant> {
    mesh.site("site-a")?.link().set_down(true)?;
    let begin = Instant::now();
    for node in NODES {
        mesh.start_agent_with(node, lines)?;
    }
    Ok(begin)
}

fn ping(mesh: &Mesh) -> Result<()> {
    let words = ["ping", "-q", "-c", "1", "-W", "0.3", SECOND];
    mesh.node(NODES[0])?.run(&words, SOON)?.ok().map(drop)
}

/// How often a node counted this.
fn counted(mesh: &Mesh, node: &str, name: &str) -> Result<u64> {
    let status = mesh.status(node)?;
    let count = status.pointer(&format!("/lan_announcements/{name}"));
    Ok(count.and_then(Value::as_u64).unwrap_or_default())
}

#[test]
fn nodes_of_a_site_that_is_cut_off_find_each_other_within_two_seconds() -> Result<()> {
    let mesh = Mesh::one_site_of(&NODES)?;
    // They would not, otherwise.
    let begin = restart_cut_off(&mesh, "lan_discovery = false\n", [201, 202])?;
    for node in NODES {
        mesh.agent_ready(node, 2)?;
    }
    while begin.elapsed() < Duration::from_secs(6) {
        let answered = ping(&mesh);
        assert!(answered.is_err(), "they found each other without a word");
    }
    assert_eq!(counted(&mesh, NODES[0], "sent")?, 0);

    let mut times = Vec::new();
    for addresses in [[203, 204], [205, 206], [207, 208]] {
        let begin = restart_cut_off(&mesh, "", addresses)?;
        tool::eventually("they reach each other", SOON, || ping(&mesh))?;
        times.push(begin.elapsed());
    }
    eprintln!("from the agents' start to the first answer: {times:?}");
    assert!(
        times.iter().all(|time| *time < Duration::from_secs(2)),
        "{times:?}"
    );
    let why = mesh.ask(NODES[0], &["path", "why", NODES[1]])?;
    assert_eq!(word(&why, "state"), "direct", "{why}");
    mesh.ends_well()
}

#[test]
fn nodes_with_ipv6_alone_find_each_other_as_well() -> Result<()> {
    let mesh = Mesh::one_site_of(&NODES)?;
    forget(&mesh)?;
    for (name, last) in NODES.into_iter().zip([7, 8]) {
        let batch =
            format!("addr flush dev eth0 scope global\naddr add fd07::{last}/64 dev eth0 nodad\n");
        tool::ip(mesh.node(name)?.netns(), &batch)?;
    }
    let begin = start_cut_off(&mesh, "")?;
    tool::eventually("they reach each other", SOON, || ping(&mesh))?;
    eprintln!("by IPv6, the first answer after {:?}", begin.elapsed());
    assert!(
        begin.elapsed() < Duration::from_secs(2),
        "{:?}",
        begin.elapsed()
    );
    let why = mesh.ask(NODES[0], &["path", "why", NODES[1]])?;
    assert!(why.to_string().contains("[fd07::8]:51820"), "{why}");
    mesh.ends_well()
}

#[test]
fn a_node_that_comes_later_finds_those_that_are_there() -> Result<()> {
    let mesh = Mesh::one_site_of(&NODES)?;
    restart_cut_off(&mesh, "", [201, 202])?;
    tool::eventually("they reach each other", SOON, || ping(&mesh))?;
    mesh.kill(NODES[0], "mesh-agent")?;
    let node = mesh.node(NODES[0])?;
    fs::remove_file(node.dir().join("state/peers")).ok();
    mesh.site("site-a")?
        .renumber(&node, [192, 168, 1, 203].into())?;
    let begin = Instant::now();
    mesh.start_agent(NODES[0])?;
    tool::eventually("they reach each other again", SOON, || ping(&mesh))?;
    eprintln!(
        "the second to start had an answer after {:?}",
        begin.elapsed()
    );
    assert!(
        begin.elapsed() < Duration::from_secs(2),
        "{:?}",
        begin.elapsed()
    );
    mesh.ends_well()
}

/// Another machine on the LAN, that belongs to nobody.
struct Mallory(Node);

impl Mallory {
    fn new(mesh: &Mesh) -> Result<Self> {
        let node = mesh.site("site-a")?.host(mesh.lab(), "mallory")?;
        Ok(Self(node))
    }

    /// What a node says of itself next.
    fn overhear(&self, from: Ipv4Addr) -> Result<Vec<u8>> {
        let listen = || {
            let socket = UdpSocket::bind((GROUP, PORT))?;
            socket.join_multicast_v4(&GROUP, &Ipv4Addr::new(192, 168, 1, 13))?;
            socket.set_read_timeout(Some(SOON))?;
            Ok::<_, std::io::Error>(socket)
        };
        let socket = self.0.enter(listen)??;
        let mut buffer = [0; 2_048];
        loop {
            let (length, sender) = socket.recv_from(&mut buffer)?;
            if sender.ip() == from {
                return Ok(buffer.get(..length).unwrap_or_default().to_vec());
            }
        }
    }

    /// Says this to all, from an address that it takes.
    fn say(&self, from: Ipv4Addr, datagram: &[u8]) -> Result<()> {
        let batch = format!("addr replace {from}/24 dev eth0\n");
        tool::ip(self.0.netns(), &batch)?;
        let send = || {
            let socket = UdpSocket::bind((from, 0))?;
            let to = SocketAddr::from((GROUP, PORT));
            socket.send_to(datagram, to)
        };
        self.0.enter(send)??;
        tool::ip(self.0.netns(), &format!("addr del {from}/24 dev eth0\n"))
    }
}

/// A protobuf varint, and what follows it.
fn varint(bytes: &[u8]) -> Option<(usize, &[u8])> {
    let (mut value, mut shift) = (0, 0);
    for (index, byte) in bytes.iter().enumerate().take(5) {
        value |= usize::from(byte & 0x7f) << shift;
        shift += 7;
        if byte & 0x80 == 0 {
            return Some((value, bytes.get(index + 1..)?));
        }
    }
    None
}

/// Changes what an announcement says of its node's start, behind twelve bytes in the clear and in the first field: all else,
/// the certificate too, is as it was.
fn with_another_start(datagram: &[u8]) -> Option<Vec<u8>> {
    let rest = datagram.get(12..)?.strip_prefix(&[0x0a])?;
    let (length, mut fields) = varint(rest)?;
    let end = datagram.len() - fields.len() + length;
    loop {
        let (tag, value) = varint(fields)?;
        let (number, kind) = (tag >> 3, tag & 7);
        let at = datagram.len() - value.len();
        if (number, kind) == (6, 1) && at + 8 <= end {
            let mut changed = datagram.to_vec();
            *changed.get_mut(at)? ^= 1;
            return Some(changed);
        }
        fields = match kind {
            0 => varint(value)?.1,
            1 => value.get(8..)?,
            2 => {
                let (length, rest) = varint(value)?;
                rest.get(length..)?
            }
            _ => return None,
        };
    }
}

#[test]
fn forged_and_repeated_announcements_are_counted_and_harmless() -> Result<()> {
    let mesh = Mesh::one_site_of(&NODES)?;
    let mallory = Mallory::new(&mesh)?;
    let second = Ipv4Addr::new(192, 168, 1, 204);
    let true_one = std::thread::scope(|scope| -> Result<_> {
        let heard = scope.spawn(|| mallory.overhear(second));
        restart_cut_off(&mesh, "", [203, 204])?;
        heard
            .join()
            .map_err(|_| anyhow::anyhow!("the listener panicked"))?
    })?;
    tool::eventually("they reach each other", SOON, || ping(&mesh))?;
    eprintln!("an announcement has {} bytes", true_one.len());
    assert!(true_one.len() < 1_000, "{}", true_one.len());
    std::thread::sleep(Duration::from_secs(2)); // The first round is over.

    let mallorys = Ipv4Addr::new(192, 168, 1, 66);
    let forged = with_another_start(&true_one).context("not an announcement")?;
    let mut other_mesh = true_one.clone();
    *other_mesh.get_mut(4).context("empty")? ^= 1;
    let cases: [(&str, Ipv4Addr, &[u8]); 5] = [
        ("malformed", mallorys, b"M-SEARCH * HTTP/1.1\r\n\r\n"),
        ("other_mesh", mallorys, &other_mesh),
        ("other_source", mallorys, &true_one),
        ("repeated", second, &true_one),
        ("forged", second, &forged),
    ];
    let believed = counted(&mesh, NODES[0], "believed")?;
    for (reason, from, datagram) in cases {
        let before = counted(&mesh, NODES[0], reason)?;
        mallory.say(from, datagram)?;
        tool::eventually("it is counted", SOON, || {
            let now = counted(&mesh, NODES[0], reason)?;
            ensure!(now > before, "{reason}: {now}");
            Ok(())
        })?;
    }
    assert_eq!(counted(&mesh, NODES[0], "believed")?, believed);
    let why = mesh.ask(NODES[0], &["path", "why", NODES[1]])?.to_string();
    assert!(!why.contains("192.168.1.66"), "{why}");
    // Mallory took the address for a moment: who speaks with it learns that it is another's again.
    tool::eventually("they still reach each other", SOON, || ping(&mesh))?;
    mesh.ends_well()
}
