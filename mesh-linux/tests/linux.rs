//! The adapters against the real kernel, in a namespace that each test makes. Needs root.

#![expect(clippy::unwrap_used, reason = "tests fail loudly")]

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    io::{self, IoSlice},
    net::{IpAddr, SocketAddr, UdpSocket},
    os::{fd::AsFd as _, unix::fs::MetadataExt as _},
    process::Command,
    sync::atomic::{AtomicUsize, Ordering},
    time::{Duration, Instant},
};

use ipnet::IpNet;
use mesh_linux::{
    IfIndex,
    netlink::{Changes, Netlink, NetlinkError, Route, Towards, Veth},
    netns, sock_diag,
    tun::{Tun, TunError, VnetHeader},
    udp::{Ecn, IpFields, LocalEnd, ReceiveBatch, UdpPair},
    wake::StopSignal,
};

/// Longer than anything here takes.
const PATIENCE: Duration = Duration::from_secs(10);

/// Longer than the kernel takes to follow one change with the next (it probes an IPv6 address for
/// a second).
const QUIET: Duration = Duration::from_millis(2500);

/// A namespace; gone when dropped, also after a panic.
struct Namespace(String);

impl Namespace {
    fn new() -> Self {
        static NUMBER: AtomicUsize = AtomicUsize::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = format!("hfl{}-{number}", std::process::id());
        run(&format!("ip netns add {name}"));
        run(&format!("ip -n {name} link set lo up"));
        Self(name)
    }

    fn ip(&self, arguments: &str) -> String {
        run(&format!("ip -n {} {arguments}", self.0))
    }

    /// Adds a link, down; its other end is up, so that a carrier comes with `up`.
    fn add_link(&self, name: &str) {
        self.ip(&format!("link add {name} type veth peer name {name}-end"));
        self.ip(&format!("link set {name}-end up"));
    }

    fn on<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        netns::run_in(&netns::named(&self.0), work).unwrap()
    }

    /// Runs `work` on an async runtime inside the namespace.
    fn block_on<T: Send>(&self, work: impl AsyncFnOnce() -> T + Send) -> T {
        self.on(|| {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build();
            runtime
                .unwrap()
                .block_on(async { tokio::time::timeout(PATIENCE, work()).await.unwrap() })
        })
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        Command::new("ip")
            .args(["netns", "delete", &self.0])
            .status()
            .ok();
    }
}

fn run(command: &str) -> String {
    let mut words = command.split_whitespace();
    let output = Command::new(words.next().unwrap())
        .args(words)
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{command}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

fn nets(list: &[&str]) -> BTreeSet<IpNet> {
    list.iter().map(|net| net.parse().unwrap()).collect()
}

#[test]
fn a_link_comes_up_with_exactly_the_addresses_that_are_wanted() {
    let namespace = Namespace::new();
    namespace.add_link("d0");
    namespace.ip("addr add 10.9.9.9/24 dev d0");
    namespace.block_on(async || {
        let netlink = Netlink::connect().unwrap();
        let link = netlink.link_index("d0").await.unwrap();
        netlink.set_link_up(link, 1280, Some(59_000)).await.unwrap();
        let wanted = nets(&["100.96.0.1/32", "fd00::1/128"]);
        let first = netlink.apply_addresses(link, &wanted).await.unwrap();
        assert_eq!((first.added, first.removed, first.failed.len()), (2, 1, 0));
        assert_eq!(netlink.addresses(link).await.unwrap(), wanted);
        let again = netlink.apply_addresses(link, &wanted).await.unwrap();
        assert_eq!((again.added, again.removed), (0, 0));
    });
    let shown = namespace.ip("-d link show d0");
    for part in ["mtu 1280", ",UP", "gso_max_size 59000"] {
        assert!(shown.contains(part), "{shown}");
    }
}

#[test]
fn only_our_routes_are_touched_and_a_predecessors_go() {
    let namespace = Namespace::new();
    namespace.add_link("d0");
    namespace.ip("link set d0 up");
    namespace.ip("addr add 10.1.0.1/32 dev d0");
    namespace.ip("route add 10.50.0.0/16 dev d0 proto 72");
    namespace.ip("-6 route add fd50::/16 dev d0 proto 72");
    namespace.ip("route add 10.60.0.0/16 dev d0 proto static");
    namespace.block_on(async || {
        let netlink = Netlink::connect().unwrap();
        let link = netlink.link_index("d0").await.unwrap();
        let route = |net: &str, source: Option<&str>| {
            let source = source.map(|source| source.parse().unwrap());
            Route::new(net.parse().unwrap(), link, source)
        };
        let mut wanted = BTreeSet::from([
            route("10.50.0.0/16", Some("10.1.0.1")),
            route("10.51.7.7/16", None),
            route("fd51::/16", None),
        ]);
        let first = netlink.apply_routes(&wanted).await.unwrap();
        assert_eq!((first.added, first.removed), (3, 2), "{:?}", first.failed);
        assert_eq!(netlink.routes().await.unwrap(), wanted);
        let again = netlink.apply_routes(&wanted).await.unwrap();
        assert_eq!((again.added, again.removed), (0, 0));

        wanted.insert(route("10.60.0.0/16", None));
        wanted.insert(route("10.61.0.0/16", None));
        let conflict = netlink.apply_routes(&wanted).await.unwrap();
        assert_eq!((conflict.added, conflict.failed.len()), (1, 1));
        let message = conflict.failed[0].to_string();
        assert_eq!(message, "cannot add a route to 10.60.0.0/16");

        netlink.apply_routes(&BTreeSet::new()).await.unwrap();
        assert_eq!(netlink.routes().await.unwrap(), BTreeSet::new());
    });
    assert_eq!(
        namespace.ip("route show proto static").trim(),
        "10.60.0.0/16 dev d0 scope link"
    );
}

#[test]
fn a_missing_interface_is_named_in_the_error() {
    let namespace = Namespace::new();
    namespace.block_on(async || {
        let result = Netlink::connect().unwrap().link_index("nowhere").await;
        assert!(matches!(result, Err(NetlinkError::NoLink(name)) if name == "nowhere"));
    });
}

#[test]
fn the_ways_out_are_interfaces_that_others_can_reach_and_their_routes() {
    let namespace = Namespace::new();
    for link in ["up0", "lan0", "down0", "mesh0"] {
        namespace.add_link(link);
    }
    for (link, address) in [
        ("up0", "10.0.0.1/24"),
        ("up0", "169.254.7.7/16"),
        ("up0", "2001:db8::1/64"),
        ("lan0", "10.0.1.1/24"),
        ("mesh0", "100.96.0.1/32"),
    ] {
        let nodad = if address.contains("::") { "nodad" } else { "" };
        namespace.ip(&format!("addr add {address} dev {link} {nodad}"));
    }
    let _vpn = namespace.on(|| Tun::create("vpn0", 1).unwrap());
    namespace.ip("addr add 10.8.0.1/24 dev vpn0");
    for link in ["up0", "lan0", "mesh0", "vpn0"] {
        namespace.ip(&format!("link set {link} up"));
    }
    namespace.ip("route add default via 10.0.0.9 dev up0 metric 50");
    namespace.ip("route add default via 2001:db8::9 dev up0 metric 600");
    namespace.ip("route add 10.9.0.0/16 via 10.0.1.9 dev lan0");
    namespace.ip("route add default via 10.8.0.9 dev vpn0 metric 1");
    let found = namespace.block_on(async || Netlink::connect().unwrap().ways("mesh0").await);
    let found = found.unwrap();
    let shown = found.interfaces.iter().map(|one| {
        let addresses: Vec<_> = one.addresses.iter().map(ToString::to_string).collect();
        let metrics = (one.metric_v4, one.metric_v6);
        (one.name.as_str(), one.up, addresses.join(" "), metrics)
    });
    let mut shown: Vec<_> = shown.filter(|one| !one.0.ends_with("-end")).collect();
    shown.sort();
    assert_eq!(
        shown,
        [
            ("down0", false, String::new(), (None, None)),
            ("lan0", true, "10.0.1.1".to_owned(), (None, None)),
            (
                "up0",
                true,
                "10.0.0.1 2001:db8::1".to_owned(),
                (Some(50), Some(600))
            ),
        ]
    );
    let index = |name: &str| {
        let mut all = found.interfaces.iter();
        all.find(|one| one.name == name).unwrap().index
    };
    let route = |net: &str, link| found.routes.contains(&(net.parse().unwrap(), index(link)));
    assert!(route("10.0.0.0/24", "up0") && route("10.9.0.0/16", "lan0"));
    assert!(!found.routes.iter().any(|(net, _)| net.prefix_len() == 0));
}

#[test]
fn a_datagram_leaves_by_the_interface_that_is_named_with_that_ones_address() {
    let namespace = Namespace::new();
    for (number, link) in ["wired", "modem"].into_iter().enumerate() {
        namespace.add_link(link);
        namespace.ip(&format!("link set {link} up"));
        namespace.ip(&format!("addr add 10.0.{number}.1/24 dev {link}"));
        let six = format!("addr add fd0{number}::1/64 dev {link} nodad");
        namespace.ip(&six);
        for gateway in [format!("10.0.{number}.9"), format!("fd0{number}::9")] {
            let metric = 100 + number;
            namespace.ip(&format!(
                "route add default via {gateway} dev {link} metric {metric}"
            ));
            namespace.ip(&format!(
                "neigh add {gateway} lladdr 02:00:00:00:00:09 dev {link}"
            ));
        }
    }
    let index = |name: &str| {
        let text = namespace.ip(&format!("-o link show {name}"));
        IfIndex::new(text.split(':').next().unwrap().parse().unwrap())
    };
    let nft = |words: &str| run(&format!("ip netns exec {} nft {words}", namespace.0));
    nft("add table inet seen");
    nft("add chain inet seen out { type filter hook output priority 0 ; }");
    for (number, link) in ["wired", "modem"].into_iter().enumerate() {
        let from = [
            format!("ip saddr 10.0.{number}.1"),
            format!("ip6 saddr fd0{number}::1"),
        ];
        for from in from {
            nft(&format!(
                "add rule inet seen out oifname {link} {from} udp dport 9 counter comment \"{link}\""
            ));
        }
        // With another's address: nothing should.
        nft(&format!(
            "add rule inet seen out oifname {link} udp dport 9 counter comment \"all\""
        ));
    }
    let sent = |comment: &str| -> u64 {
        let rules = nft("list chain inet seen out");
        let rules = rules
            .lines()
            .filter(|line| line.contains(&format!("comment \"{comment}\"")));
        let packets = rules.filter_map(|line| {
            let after = line.split("packets ").nth(1)?;
            after.split(' ').next()?.parse::<u64>().ok()
        });
        packets.sum()
    };
    let pair = namespace.on(|| UdpPair::bind(0).unwrap());
    for to in ["192.0.2.1:9", "[2001:db8::1]:9"] {
        for (name, other) in [("wired", "modem"), ("modem", "wired")] {
            let link = index(name);
            for datagrams in [&b"x"[..], &[b'x'; 3000]] {
                let before = (sent(name), sent(other), sent("all"));
                let fields = IpFields {
                    link,
                    ..IpFields::default()
                };
                pair.send(to.parse().unwrap(), datagrams, 1000, fields)
                    .unwrap();
                // A batch is one packet until the interface cuts it.
                let now = (sent(name), sent(other), sent("all"));
                assert_eq!(
                    now,
                    (before.0 + 1, before.1, before.2 + 1),
                    "{to} by {name}"
                );
            }
        }
    }
}

#[test]
fn the_interface_towards_an_address_depends_on_routes_and_on_the_source() {
    let ns = Namespace::new();
    for (name, net) in [("one", "10.0.0.1/24"), ("two", "10.1.0.1/24")] {
        ns.add_link(name);
        ns.ip(&format!("addr add {net} dev {name}"));
        ns.ip(&format!("link set {name} up"));
    }
    ns.ip("rule add from 10.1.0.1 table 7");
    ns.ip("rule add fwmark 9 prohibit");
    ns.ip("route add 10.0.0.0/24 dev two table 7");
    ns.block_on(async || {
        let netlink = Netlink::connect().unwrap();
        let index = async |name| netlink.link_index(name).await.unwrap();
        let towards = async |source: &str, mark| {
            let (to, from) = ("10.0.0.9".parse().unwrap(), source.parse().unwrap());
            netlink.link_towards(to, from, mark).await
        };
        let one = towards("10.0.0.1", 0).await.unwrap();
        assert_eq!(one, Some(index("one").await));
        let two = towards("10.1.0.1", 0).await.unwrap();
        assert_eq!(two, Some(index("two").await));
        // The mark counts, and so does whether the address is ours.
        assert!(towards("10.0.0.1", 9).await.is_err());
        assert!(towards("10.0.0.7", 0).await.is_err());
    });
}

#[test]
fn what_the_kernel_does_with_packets_is_told_with_the_route_that_counts() {
    let ns = Namespace::new();
    ns.add_link("one");
    ns.ip("addr add 10.0.0.1/24 dev one");
    ns.ip("link set one up");
    ns.ip("addr add fd01::1/64 dev one nodad");
    ns.ip("route add 10.8.0.0/13 via 10.0.0.254 src 10.0.0.1");
    ns.ip("route add prohibit 10.9.9.0/24");
    ns.block_on(async || {
        let netlink = Netlink::connect().unwrap();
        let towards = async |to: &str| netlink.towards(to.parse().unwrap()).await;
        let link = Some(netlink.link_index("one").await.unwrap());
        let expected = Towards {
            prefix: Some("10.8.0.0/13".parse().unwrap()),
            link,
            interface: "one".to_owned(),
            source: Some([10, 0, 0, 1].into()),
            gateway: Some([10, 0, 0, 254].into()),
            table: 254,
            kind: "unicast",
        };
        assert_eq!(towards("10.9.1.2").await.unwrap(), Some(expected));
        let own = towards("10.0.0.1").await.unwrap().unwrap();
        assert_eq!(own.kind, "local");
        let v6 = towards("fd01::7").await.unwrap().unwrap();
        assert_eq!(v6.prefix, Some("fd01::/64".parse().unwrap()));
        assert_eq!((v6.link, v6.gateway), (link, None));
        assert_eq!(towards("192.0.2.1").await.unwrap(), None);
        assert!(towards("10.9.9.1").await.is_err());
    });
}

#[test]
fn changes_are_told_and_our_own_routes_are_not() {
    let namespace = Namespace::new();
    namespace.add_link("d0");
    namespace.ip("link set d0 up");
    namespace.block_on(async || {
        let mut changes = Changes::listen().unwrap();
        namespace.ip("addr add 10.7.0.1/24 dev d0");
        while !changes.next().await.unwrap().addresses {}
        namespace.ip("link set d0 down");
        while !changes.next().await.unwrap().links {}
        namespace.ip("link set d0 up");
        while !changes.next().await.unwrap().links {}
        // Let the kernel finish what it does by itself for a link that comes up.
        while let Ok(change) = tokio::time::timeout(QUIET, changes.next()).await {
            change.unwrap();
        }
        namespace.ip("route add 10.8.0.0/16 dev d0 proto 72");
        namespace.ip("link set lo alias end-of-test");
        loop {
            let change = changes.next().await.unwrap();
            assert!(!change.routes, "our own route was told");
            if change.links {
                break;
            }
        }
    });
}

#[test]
fn pods_of_a_whole_node_at_once_are_not_too_many_changes_and_what_is_too_much_is_said_as_everything()
 {
    /// As many as a kubelet has at most, unless it is told otherwise.
    const PODS: usize = 110;
    let (here, pods) = (Namespace::new(), Namespace::new());
    let batch = |lines: &str| {
        let path = std::env::temp_dir().join(&here.0);
        fs::write(&path, lines).unwrap();
        here.ip(&format!("-batch {}", path.display()));
        fs::remove_file(path).unwrap();
    };
    let pod = |number: usize| {
        format!(
            "link add h{number} type veth peer name e{number}\nlink set e{number} netns {}\nlink set h{number} up\n\
             addr add 169.254.1.1/32 dev h{number}\nroute add 10.9.0.{number}/32 dev h{number}\n\
             route add fd44::{number}/128 dev h{number}\n",
            pods.0
        )
    };
    here.block_on(async || {
        // Nobody reads while changes are made.
        let mut changes = Changes::listen().unwrap();
        batch(&(1..=PODS).map(pod).collect::<String>());
        let change = changes.next().await.unwrap();
        assert!(change.links && change.addresses && change.routes);
        assert!(!change.own_routes, "the kernel threw notifications away");

        batch(&"link set lo alias a\nlink set lo alias b\n".repeat(5_000));
        let change = changes.next().await.unwrap();
        assert!(
            change.addresses && change.routes && change.own_routes,
            "what was thrown away may have been anything: {change:?}"
        );
        // It hears again.
        here.ip("route add 10.8.0.0/16 dev lo proto 72");
        while !changes.next().await.unwrap().own_routes {}
    });
}

#[test]
fn a_second_tun_of_the_same_name_is_refused_with_a_hint() {
    let namespace = Namespace::new();
    namespace.on(|| {
        for queues in [1, 2] {
            let first = create_when_free("hf0", queues);
            assert_eq!(first.name(), "hf0");
            let error = Tun::create("hf0", queues).unwrap_err();
            assert!(matches!(error, TunError::NameTaken(_)), "{error}");
            assert!(error.to_string().contains("second agent"), "{error}");
            drop(first);
        }
        // Nothing persists: the name is free again.
        assert_eq!(create_when_free("hf0", 2).queues().len(), 2);
        for name in ["", "a/b", "sixteen-bytes-16", ".."] {
            let error = Tun::create(name, 1).unwrap_err();
            assert!(matches!(error, TunError::BadName(_)), "{name}: {error}");
        }
    });
}

/// A child that another test's thread forked holds a copy of the last device's descriptor until it
/// executes its program: that long the name stays taken.
#[test]
fn a_tun_knows_when_it_was_moved_away() {
    let (here, there) = (Namespace::new(), Namespace::new());
    let tun = here.on(|| Tun::create("hf", 1).unwrap());
    let is_here = || here.on(|| tun.is_here());
    assert!(is_here().unwrap());
    assert!(!there.on(|| tun.is_here()).unwrap());
    here.ip(&format!("link set hf netns {}", there.0));
    assert!(!is_here().unwrap());
    assert!(there.on(|| tun.is_here()).unwrap());
    there.ip("link del hf");
    assert_eq!(
        is_here().unwrap_err().raw_os_error(),
        Some(libc::EBADFD),
        "it is gone"
    );
}

fn create_when_free(name: &str, queues: usize) -> Tun {
    let deadline = Instant::now() + Duration::from_secs(2);
    loop {
        match Tun::create(name, queues) {
            Err(TunError::NameTaken(_)) if Instant::now() < deadline => std::thread::yield_now(),
            created => return created.unwrap(),
        }
    }
}

#[test]
fn a_packet_goes_through_a_tun_both_ways() {
    let namespace = Namespace::new();
    let tun = namespace.on(|| Tun::create("hf0", 1).unwrap());
    let queue = &tun.queues()[0];
    namespace.ip("addr add 10.3.0.1/24 dev hf0");
    namespace.ip("link set hf0 up");
    let socket = namespace.on(|| std::net::UdpSocket::bind("10.3.0.1:0").unwrap());
    socket.send_to(b"out", "10.3.0.2:7").unwrap();
    let stop = StopSignal::new().unwrap();
    let mut waiter = stop.waiter([queue.as_fd()]);
    let mut buffer = vec![0; mesh_linux::tun::READ_LEN_MAX];
    let packet = loop {
        assert!(waiter.wait(None, None).unwrap() && waiter.is_readable(0));
        let len = queue.read(&mut buffer).unwrap();
        let (_, packet) = VnetHeader::split(&buffer[..len]).unwrap();
        // The kernel's own IPv6 multicast comes too.
        if packet[0] >> 4 == 4 {
            break packet.to_vec();
        }
    };
    assert_eq!(packet[28..], *b"out");
    // Back as an answer: addresses and ports swapped; checksums do not notice.
    let mut answer = packet;
    answer[12..20].rotate_left(4);
    answer[20..24].rotate_left(2);
    answer[26..28].fill(0);
    queue
        .write(&[&VnetHeader::default().to_bytes(), &answer[..]].map(IoSlice::new))
        .unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut received = [0; 8];
    let (len, from) = socket.recv_from(&mut received).unwrap();
    assert_eq!(
        (&received[..len], from),
        (&b"out"[..], "10.3.0.2:7".parse().unwrap())
    );
    stop.stop();
    assert!(!waiter.wait(None, None).unwrap());
}

/// Sends `datagrams` as one batch from one pair to another at `ip`; what arrives, and from where.
fn send_batch(ip: IpAddr, datagrams: &[u8], segment_len: usize) -> Vec<Vec<u8>> {
    let (from, to) = (UdpPair::bind(0).unwrap(), UdpPair::bind(0).unwrap());
    let target = SocketAddr::new(ip, to.port());
    let fields = IpFields {
        ecn: Ecn::Capable0,
        ..IpFields::default()
    };
    from.send(target, datagrams, segment_len, fields).unwrap();
    let socket = to.sockets().nth(usize::from(ip.is_ipv6())).unwrap();
    let mut batch = ReceiveBatch::new();
    let mut received = Vec::new();
    let deadline = Instant::now() + PATIENCE;
    while received.len() < datagrams.len().div_ceil(segment_len) && Instant::now() < deadline {
        match socket.receive(&mut batch) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => std::thread::yield_now(),
            result => {
                result.unwrap();
            }
        }
        for message in batch.messages() {
            assert_eq!(message.from, SocketAddr::new(ip, from.port()));
            let to = Some(LocalEnd {
                address: ip,
                link: IfIndex::new(1), // lo
            });
            assert_eq!((message.ecn, message.to), (Ecn::Capable0, to));
            let each = message.bytes.chunks(message.segment_len);
            received.extend(each.map(<[u8]>::to_vec));
        }
    }
    received
}

#[test]
fn a_batch_arrives_as_the_datagrams_it_was_made_of() {
    let namespace = Namespace::new();
    let bytes: Vec<u8> = (0..20_u8).flat_map(|i| [i; 1340]).collect();
    let bytes = &bytes[..bytes.len() - 700];
    namespace.on(|| {
        for ip in ["127.0.0.1", "::1"] {
            let received = send_batch(ip.parse().unwrap(), bytes, 1340);
            assert!(
                received.iter().eq(bytes.chunks(1340)),
                "{ip}: {}",
                received.len()
            );
        }
    });
}

#[test]
fn datagrams_larger_than_the_paths_mtu_are_fragmented_not_lost() {
    let namespace = Namespace::new();
    namespace.ip("link set lo mtu 1300");
    let bytes: Vec<u8> = (0..5_u8).flat_map(|i| [i; 1400]).collect();
    namespace.on(|| {
        for ip in ["127.0.0.1", "::1"] {
            let received = send_batch(ip.parse().unwrap(), &bytes, 1400);
            assert!(
                received.iter().eq(bytes.chunks(1400)),
                "{ip}: {}",
                received.len()
            );
        }
    });
}

#[test]
fn pairs_that_share_a_port_share_its_senders_and_let_nobody_else_in() {
    let namespace = Namespace::new();
    namespace.on(|| {
        let pairs = UdpPair::bind_many(0, 4).unwrap();
        let port = pairs[0].port();
        assert!(pairs.iter().all(|pair| pair.port() == port));
        let error = UdpPair::bind_many(port, 4).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
        let senders: Vec<_> = (0..64).map(|_| UdpPair::bind(0).unwrap()).collect();
        let to = SocketAddr::new("127.0.0.1".parse().unwrap(), port);
        for sender in &senders {
            for _ in 0..2 {
                sender.send(to, b"x", 1, IpFields::default()).unwrap();
            }
        }
        let mut batch = ReceiveBatch::new();
        let mut received = Vec::new();
        for pair in &pairs {
            let mut own = Vec::new();
            while pair.sockets().next().unwrap().receive(&mut batch).is_ok() {
                own.extend(batch.messages().map(|message| message.from));
            }
            received.push(own);
        }
        let all: usize = received.iter().map(Vec::len).sum();
        assert_eq!(all, 128);
        for own in &received {
            // One of 4 gets none of 64 senders once in 10⁷ runs.
            assert!(!own.is_empty(), "{received:?}");
            let both = |from| own.iter().filter(|other| *other == from).count() == 2;
            assert!(own.iter().all(both), "a sender's datagrams stay together");
        }
    });
}

#[test]
fn an_answer_comes_from_the_address_that_was_asked_while_the_machine_has_it() {
    let namespace = Namespace::new();
    namespace.ip("addr add 127.0.0.7/8 dev lo");
    namespace.ip("addr add fd07::7/128 dev lo nodad");
    namespace.on(|| {
        let (from, to) = (UdpPair::bind(0).unwrap(), UdpPair::bind(0).unwrap());
        let mut batch = ReceiveBatch::new();
        for (own, gone, target) in [
            ("127.0.0.7", "192.0.2.9", "127.0.0.1"),
            ("fd07::7", "2001:db8::9", "::1"),
        ] {
            let target = SocketAddr::new(target.parse().unwrap(), to.port());
            let socket = to.sockets().nth(usize::from(target.is_ipv6())).unwrap();
            for (source, expected) in [(own, own.parse().unwrap()), (gone, target.ip())] {
                let fields = IpFields {
                    source: source.parse().ok(),
                    ..IpFields::default()
                };
                for datagrams in [&b"x"[..], &[b'x'; 3000]] {
                    from.send(target, datagrams, 1000, fields).unwrap();
                    socket.receive(&mut batch).unwrap();
                    for message in batch.messages() {
                        assert_eq!(message.from, SocketAddr::new(expected, from.port()));
                        assert_eq!(message.to.unwrap().address, target.ip());
                    }
                }
            }
        }
    });
}

#[test]
fn a_port_that_is_taken_is_refused() {
    let namespace = Namespace::new();
    namespace.on(|| {
        let first = UdpPair::bind(0).unwrap();
        let error = UdpPair::bind(first.port()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
    });
}

/// What `SO_COOKIE` says.
fn cookie(socket: &UdpSocket) -> u64 {
    rustix::net::sockopt::socket_cookie(socket).unwrap()
}

#[test]
fn a_udp_socket_ends_by_its_number_where_it_is_and_no_other_does() {
    let namespaces = [Namespace::new(), Namespace::new()];
    for (client, peer) in [
        ("127.0.0.1:0", "127.0.0.1:9"),
        ("[::1]:0", "[::1]:9"),
        ("[::]:0", "[::ffff:127.0.0.1]:9"),
    ] {
        let peer: SocketAddr = peer.parse().unwrap();
        let [here, there] = namespaces.each_ref().map(|namespace| {
            namespace.on(|| {
                [(); 3].map(|()| {
                    let socket = UdpSocket::bind(client).unwrap();
                    socket.connect(peer).unwrap();
                    socket
                })
            })
        });
        let [ended, moved, other] = here;
        moved.connect(SocketAddr::new(peer.ip(), 10)).unwrap();
        let at = SocketAddr::new(peer.ip().to_canonical(), peer.port());
        let mut wanted = BTreeMap::from([
            (cookie(&ended), at),
            (cookie(&moved), at),
            (cookie(&there[0]), at),
        ]);
        let count = namespaces[0]
            .on(|| sock_diag::end_udp(&mut wanted))
            .unwrap();
        assert_eq!(count, 1, "{peer}");
        assert!(!wanted.contains_key(&cookie(&ended)));
        assert_eq!(wanted.len(), 2, "not here, or elsewhere: {wanted:?}");
        let error = ended.take_error().unwrap().unwrap();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionAborted, "{peer}");
        for socket in [&moved, &other].into_iter().chain(&there) {
            assert!(socket.take_error().unwrap().is_none(), "{peer}");
            socket.peer_addr().unwrap();
        }
        let error = ended.send(b"?").unwrap_err().raw_os_error();
        assert_eq!(error, Some(rustix::io::Errno::DESTADDRREQ.raw_os_error()));
        ended.connect(peer).unwrap(); // It may be used again.
        ended.send(b"?").unwrap();
    }
}

#[test]
fn namespaces_are_found_by_name_and_by_process_each_once() {
    let named = Namespace::new();
    let number = |namespace: &File| namespace.metadata().unwrap().ino();
    let here = named.on(|| number(&File::open("/proc/thread-self/ns/net").unwrap()));
    let own = number(&File::open("/proc/self/ns/net").unwrap());
    let unmounted = netns::named(&format!("{}-unmounted", named.0));
    File::create(&unmounted).unwrap();
    let all = netns::all();
    fs::remove_file(&unmounted).unwrap();
    let all = all.unwrap();
    for namespace in &all {
        netns::run_inside(namespace, || ()).unwrap();
    }
    let all: Vec<_> = all.iter().map(number).collect();
    for wanted in [here, own] {
        let times = all.iter().filter(|&&one| one == wanted).count();
        assert_eq!(times, 1, "{wanted} in {all:?}");
    }
}

#[test]
fn how_packets_are_handed_on_is_told_as_the_kernel_does_it() {
    let (namespace, pod) = (Namespace::new(), Namespace::new());
    let veth = "link add port address 02:00:00:00:00:01 type veth";
    let peer = "peer name eth0 address 02:00:00:00:00:02 netns";
    namespace.ip(&format!("{veth} {peer} {}", pod.0));
    pod.ip("link set eth0 up");
    namespace.ip("link set port mtu 1400 up");
    namespace.add_link("d0");
    namespace.ip("link set d0 up");
    namespace.ip("addr add 10.9.1.1/24 dev d0");
    for route in [
        "10.9.0.5/32 dev port",
        "fd09::5/128 dev port",
        "10.9.0.0/16 dev d0",
        "10.9.0.0/16 dev port metric 5",
        "blackhole 10.8.0.0/16",
        "10.7.0.0/16 dev d0 mtu 1300 advmss 1200",
        "10.3.0.0/16 dev d0 advmss 1200 initcwnd 20",
        "fd03::/16 dev d0 quickack 1",
        "10.5.0.0/16 nexthop dev d0 nexthop dev port",
        "local 10.6.0.0/16 dev lo",
        "10.6.1.0/24 dev d0",
        "10.4.0.0/16 dev d0 table 100",
    ] {
        namespace.ip(&format!("route add {route}"));
    }
    let forwarding =
        || namespace.block_on(async || Netlink::connect().unwrap().forwarding().await.unwrap());
    let told = forwarding();
    assert!(told.by_destination);
    let named = |name: &str| {
        let mut links = told.links.iter();
        links.find(|(_, link)| link.name == name).unwrap()
    };
    let ((&port, link), (&d0, other)) = (named("port"), named("d0"));
    assert_eq!((link.mtu_bytes, link.is_up), (1_400, true));
    assert_eq!(
        (link.part_of, link.is_bridge, link.is_tap),
        (None, false, false)
    );
    let veth = Veth {
        mac: [2, 0, 0, 0, 0, 1],
        peer_mac: [2, 0, 0, 0, 0, 2],
    };
    assert_eq!(link.veth, Some(veth));
    assert_eq!(other.veth, None, "its other end is here");
    for (net, way) in [
        ("10.9.0.5/32", Some(Some(port))),
        ("fd09::5/128", Some(Some(port))),
        ("10.9.0.0/16", Some(Some(d0))),
        ("10.9.1.0/24", Some(Some(d0))),
        ("10.9.1.1/32", Some(None)),
        ("10.8.0.0/16", Some(None)),
        ("10.7.0.0/16", Some(None)),
        ("10.3.0.0/16", Some(Some(d0))),
        ("fd03::/16", Some(Some(d0))),
        ("10.5.0.0/16", Some(None)),
        ("10.6.1.0/24", Some(None)),
        ("10.4.0.0/16", None),
    ] {
        assert_eq!(
            told.routes.get(&net.parse().unwrap()).copied(),
            way,
            "{net}"
        );
    }
    namespace.ip("rule add fwmark 5 lookup 100");
    assert!(!forwarding().by_destination);
}
