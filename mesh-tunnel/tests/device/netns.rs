//! What WireGuard's own `netns.sh` checks, as far as it concerns a program and not the kernel.

use std::{
    io::Write as _,
    net::UdpSocket,
    process::{Command, Stdio},
    thread,
    time::Duration,
};

use crate::harness::{Device, Keys, Lab, Program, wait_until, wg};

/// Two devices: the first one's interface is in namespace 1, the second one's in 2.
struct Pair {
    lab: Lab,
    devices: [Device; 2],
    keys: [Keys; 2],
}

impl Pair {
    /// Both made in namespace 0, where their UDP sockets stay.
    fn over_loopback() -> Self {
        let lab = Lab::new();
        let devices = [1, 2].map(|n| {
            let device = Device::start(&lab, 0, Program::MeshTunnel);
            lab.ip(
                0,
                &format!("link set {} netns {}", device.name, lab.name(n)),
            );
            device
        });
        Self::configured(lab, devices)
    }

    /// Made in their namespaces, which the caller connects.
    fn apart() -> Self {
        let lab = Lab::new();
        let devices = [1, 2].map(|n| Device::start(&lab, n, Program::MeshTunnel));
        Self::configured(lab, devices)
    }

    fn configured(lab: Lab, devices: [Device; 2]) -> Self {
        let keys = [Keys::new(), Keys::new()];
        let psk = wg("genpsk", "").unwrap();
        for (n, device) in devices.iter().enumerate() {
            let other = 1 - n;
            device.conf(
                "setconf",
                &format!(
                    "[Interface]\nPrivateKey={}\nListenPort={}\n[Peer]\nPublicKey={}\nPresharedKey={psk}\n\
                     AllowedIPs=192.168.241.{},fd00::{}\n",
                    keys[n].private,
                    n + 1,
                    keys[other].public,
                    other + 1,
                    other + 1
                ),
            );
            let name = &device.name;
            lab.ip(
                n + 1,
                &format!("addr add 192.168.241.{}/24 dev {name}", n + 1),
            );
            lab.ip(n + 1, &format!("addr add fd00::{}/112 dev {name}", n + 1));
            lab.ip(n + 1, &format!("link set {name} up"));
        }
        Self { lab, devices, keys }
    }

    /// The other's endpoint, as the device `n` (0 or 1) is told.
    fn endpoint(&self, n: usize, endpoint: &str) {
        let peer = &self.keys[1 - n].public;
        self.devices[n].set(&format!("peer {peer} endpoint {endpoint}"));
    }

    /// Where the device `n` knows the other to be.
    fn knows(&self, n: usize) -> String {
        let said = self.devices[n].show("endpoints");
        said.split_whitespace().nth(1).unwrap().to_owned()
    }

    fn mtu(&self, bytes: usize) {
        for (n, device) in self.devices.iter().enumerate() {
            self.lab
                .ip(n + 1, &format!("link set {} mtu {bytes}", device.name));
        }
    }
}

const MTU: usize = 1_420;
/// What netns.sh calls big: fragments of a datagram on the loopback interface's 64 KiB.
const BIG_MTU: usize = 34_816 - 1_500 + MTU;

/// Counts are what `wg` shows: an initiation of 148 bytes, an answer of 92, and pings of 84,
/// padded to 96, with 32 bytes around them.
#[test]
fn bytes_are_counted_as_they_are_on_the_wire() {
    let pair = Pair::over_loopback();
    pair.endpoint(0, "127.0.0.1:2");
    pair.endpoint(1, "127.0.0.1:1");
    assert_eq!(
        pair.devices[0].show("latest-handshakes").split('\t').nth(1),
        Some("0")
    );
    pair.lab.exec(2, "ping -c 10 -f -W 1 192.168.241.1");
    let pings = 10 * (96 + 32);
    // The one who began may have to prove the session by a keepalive (the paper, §5.4.6).
    for keepalive in [0, 32] {
        let one_sent = 92 + pings;
        let other_sent = 148 + pings + keepalive;
        let is = (pair.devices[0].transferred(), pair.devices[1].transferred());
        if is == ((other_sent, one_sent), (one_sent, other_sent)) {
            break;
        }
        assert_eq!(keepalive, 0, "{is:?}");
    }
    let began: u64 = pair.devices[0]
        .show("latest-handshakes")
        .split('\t')
        .nth(1)
        .unwrap()
        .parse()
        .unwrap();
    let now = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap()
        .as_secs();
    assert!((now - 5..=now).contains(&began), "{began}, and it is {now}");
    // They go on when the packet path begins again.
    pair.devices[1].set("listen-port 9");
    let (received, sent) = pair.devices[1].transferred();
    assert!(
        received >= 92 + pings && sent >= 148 + pings,
        "{received} {sent}"
    );
    assert_eq!(
        pair.devices[1]
            .show("latest-handshakes")
            .split('\t')
            .nth(1)
            .unwrap()
            .len(),
        10
    );
}

fn traffic_of_all_kinds(underlay: [&str; 2]) {
    let pair = Pair::over_loopback();
    pair.endpoint(0, underlay[1]);
    pair.endpoint(1, underlay[0]);
    let lab = &pair.lab;
    for mtu in [MTU, BIG_MTU] {
        pair.mtu(mtu);
        for (from, to) in [
            (2, "192.168.241.1"),
            (1, "192.168.241.2"),
            (2, "fd00::1"),
            (1, "fd00::2"),
        ] {
            lab.exec(from, &format!("ping -c 10 -f -W 1 {to}"));
            lab.ping(from, &format!("-s {} {to}", mtu - 48));
        }
        lab.iperf(1, 2, "192.168.241.2", "");
        lab.iperf(2, 1, "fd00::1", "");
        lab.iperf(2, 1, "192.168.241.1", "-u -b 0");
        lab.iperf(1, 2, "fd00::2", "-u -b 0");
        lab.iperf(1, 2, "192.168.241.2", "-P 8");
        lab.transfer(1, (2, "fd00::2"), 32 << 20, || {});
    }
}

#[test]
fn traffic_of_all_kinds_over_ipv4() {
    traffic_of_all_kinds(["127.0.0.1:1", "127.0.0.1:2"]);
}

#[test]
fn traffic_of_all_kinds_over_ipv6() {
    traffic_of_all_kinds(["[::1]:1", "[::1]:2"]);
}

#[test]
fn peers_are_followed_where_they_go() {
    let pair = Pair::over_loopback();
    let (lab, device) = (&pair.lab, &pair.devices[0]);
    pair.endpoint(0, "127.0.0.1:2");
    lab.ping(1, "fd00::2");
    lab.ip(0, "-4 addr del 127.0.0.1/8 dev lo");
    lab.ip(0, "-4 addr add 127.212.121.99/8 dev lo");
    device.set("listen-port 9999");
    pair.endpoint(0, "127.0.0.1:2");
    lab.ping(1, "fd00::2");
    assert_eq!(pair.knows(1), "127.212.121.99:9999");
    // Sessions live on, whoever moves: a ping of 84 bytes, padded to 96, and 32 around it is all that is sent.
    for [port, other] in [[9998, 3], [9997, 2]] {
        let (received, sent) = device.transferred();
        device.set(&format!("listen-port {port}"));
        pair.endpoint(0, "[::1]:2");
        pair.devices[1].set(&format!("listen-port {other}"));
        pair.endpoint(0, &format!("[::1]:{other}"));
        lab.ping(1, "192.168.241.2");
        assert_eq!(pair.knows(1), format!("[::1]:{port}"));
        let ping = 96 + 32;
        assert_eq!(device.transferred(), (received + ping, sent + ping));
        // The other way round, the peer hears of it by the next packet.
        pair.devices[1].set("listen-port 4");
        lab.ping(2, "192.168.241.1");
        assert_eq!(pair.knows(0), "[::1]:4");
        pair.devices[1].set("listen-port 2");
        pair.endpoint(0, "127.0.0.1:2");
    }
}

/// As netns.sh has it when it tries a routing loop.
#[test]
fn an_interface_that_comes_where_ours_was_is_not_taken_for_it() {
    let pair = Pair::over_loopback();
    let (lab, [one, two]) = (&pair.lab, &pair.devices);
    pair.endpoint(0, "127.0.0.1:2");
    lab.ping(1, "192.168.241.2");
    let (received, sent) = one.transferred();
    for (n, device) in [(1, one), (2, two)] {
        // Interfaces keep their number when they move: others get it here, and are down.
        let said = lab.ip(n, &format!("-oneline link show {}", device.name));
        let index = said.split(':').next().unwrap();
        lab.ip(0, &format!("link add other{n} index {index} type bridge"));
    }
    lab.ping(1, "192.168.241.2");
    let ping = 96 + 32;
    assert_eq!(one.transferred(), (received + ping, sent + ping));
}

#[test]
fn packets_from_addresses_that_are_not_the_peers_are_dropped() {
    let pair = Pair::over_loopback();
    let lab = &pair.lab;
    pair.endpoint(0, "[::1]:2");
    pair.endpoint(1, "[::1]:1");
    let arrives = || {
        let receiver = lab.on(1, || UdpSocket::bind("192.168.241.1:1111").unwrap());
        receiver
            .set_read_timeout(Some(Duration::from_secs(1)))
            .unwrap();
        let sender = lab.on(2, || UdpSocket::bind("192.168.241.2:0").unwrap());
        sender.send_to(b"X", "192.168.241.1:1111").unwrap();
        receiver.recv(&mut [0; 9]).is_ok()
    };
    let peer = &pair.keys[1].public;
    pair.devices[0].set(&format!("peer {peer} allowed-ips 192.168.241.0/24"));
    assert!(arrives());
    // Somebody else has the more specific prefix: the packet is the peer's, its source is not.
    let other = Keys::new().public;
    pair.devices[0].set(&format!("peer {other} allowed-ips 192.168.241.2/32"));
    pair.devices[1].set("listen-port 9997");
    assert!(!arrives());
    pair.devices[0].set(&format!("peer {other} remove"));
    // The peer is where its authentic packets come from, whatever is in them.
    assert_eq!(pair.knows(0), "[::1]:9997");
    assert!(arrives());
}

#[test]
fn keys_change_and_it_goes_on_at_once() {
    let pair = Pair::over_loopback();
    let (lab, [one, two]) = (&pair.lab, &pair.devices);
    pair.endpoint(0, "127.0.0.1:2");
    lab.ping(1, "192.168.241.2");
    let psk = two
        .show("preshared-keys")
        .split('\t')
        .nth(1)
        .unwrap()
        .to_owned();
    let third = Keys::new();
    one.set_with("private-key /dev/stdin", &third.private);
    let (first, third) = (&pair.keys[0].public, &third.public);
    two.set_with(
        &format!(
            "peer {third} preshared-key /dev/stdin allowed-ips 192.168.241.1/32 peer {first} remove"
        ),
        &psk,
    );
    lab.ping(1, "192.168.241.2");
    // Back, while the other end does not move.
    one.set_with("private-key /dev/stdin", &pair.keys[0].private);
    two.set_with(
        &format!("peer {first} preshared-key /dev/stdin allowed-ips 192.168.241.1/32"),
        &psk,
    );
    lab.ping(1, "192.168.241.2");
    // A preshared key that only one side has.
    two.set(&format!("peer {first} preshared-key /dev/null"));
    one.set(&format!("peer {} remove", pair.keys[1].public));
    one.set_with(
        &format!(
            "peer {} preshared-key /dev/stdin allowed-ips 192.168.241.2/32 endpoint 127.0.0.1:2",
            pair.keys[1].public
        ),
        &psk,
    );
    assert!(!lab.succeeds(1, "ping -c 1 -W 1 192.168.241.2"));
}

#[test]
fn a_peer_behind_nat_is_reached_as_long_as_it_speaks() {
    let pair = Pair::apart();
    let lab = &pair.lab;
    lab.join([(0, "inside 192.168.1.1/24"), (1, "eth0 192.168.1.100/24")]);
    lab.join([(0, "outside 10.0.0.1/24"), (2, "eth0 10.0.0.100/24")]);
    lab.ip(1, "route add default via 192.168.1.1");
    lab.sysctl(0, "net/ipv4/ip_forward", "1");
    let rules = "table ip nat { chain post { type nat hook postrouting priority 100; \
                 ip saddr 192.168.1.0/24 ip daddr 10.0.0.0/24 masquerade; }; }";
    let mut nft = Command::new("ip")
        .args(["netns", "exec", lab.name(0), "nft", "-f", "-"])
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    nft.stdin
        .take()
        .unwrap()
        .write_all(rules.as_bytes())
        .unwrap();
    assert!(nft.wait().unwrap().success());
    lab.sysctl(0, "net/netfilter/nf_conntrack_udp_timeout", "2");
    lab.sysctl(0, "net/netfilter/nf_conntrack_udp_timeout_stream", "2");
    let peer = &pair.keys[1].public;
    pair.devices[0].set(&format!(
        "peer {peer} endpoint 10.0.0.100:2 persistent-keepalive 1"
    ));
    lab.ping(1, "192.168.241.2");
    lab.ping(2, "192.168.241.1");
    assert_eq!(pair.knows(1), "10.0.0.1:1");
    // Keepalives keep the translation; without them it ends.
    thread::sleep(Duration::from_secs(3));
    lab.ping(2, "192.168.241.1");
    pair.devices[0].set(&format!("peer {peer} persistent-keepalive off"));
    let entries = || lab.exec(0, "cat /proc/net/nf_conntrack");
    wait_until("the translation ends", || !entries().contains("dport=2 "));
    assert!(!lab.succeeds(2, "ping -c 1 -W 1 192.168.241.1"));
    lab.ping(1, "192.168.241.2");
    lab.ping(2, "192.168.241.1");
}

/// As wg-quick does it: everything goes into the tunnel but the tunnel's own packets.
#[test]
fn the_default_route_goes_by_the_mark() {
    let pair = Pair::apart();
    let lab = &pair.lab;
    lab.join([
        (1, "eth0 10.0.0.1/24 fc00::1/96"),
        (2, "eth0 10.0.0.100/24 fc00::100/96"),
    ]);
    lab.ip(1, "-6 route add default via fc00::100");
    lab.ip(
        2,
        &format!("-4 addr add 192.168.99.7/32 dev {}", pair.devices[1].name),
    );
    lab.ip(
        2,
        &format!("-6 addr add abab::1111/128 dev {}", pair.devices[1].name),
    );
    let (name, peer) = (&pair.devices[0].name, &pair.keys[1].public);
    for endpoint in ["10.0.0.100:2", "[fc00::100]:2"] {
        pair.devices[0].set(&format!(
            "fwmark 51820 peer {peer} allowed-ips 0.0.0.0/0,::/0 endpoint {endpoint}"
        ));
        for family in ["-4", "-6"] {
            lab.ip(
                1,
                &format!("{family} route replace default dev {name} table 51820"),
            );
            lab.ip(
                1,
                &format!("{family} rule add not fwmark 51820 table 51820"),
            );
            lab.ip(
                1,
                &format!("{family} rule add table main suppress_prefixlength 0"),
            );
        }
        lab.exec(1, "ping -W 1 -c 100 -f 192.168.99.7");
        lab.exec(1, "ping -W 1 -c 100 -f abab::1111");
        for family in ["-4", "-6"] {
            lab.ip(
                1,
                &format!("{family} rule del not fwmark 51820 table 51820"),
            );
            lab.ip(
                1,
                &format!("{family} rule del table main suppress_prefixlength 0"),
            );
        }
    }
    // Another mark, on the sockets that are there.
    pair.devices[0].set("fwmark 7");
    lab.ip(1, "-4 rule add fwmark 7 prohibit");
    assert!(!lab.succeeds(1, "ping -W 1 -c 1 192.168.241.2") || pair.knows(0).contains("fc00"));
}

#[test]
fn addresses_may_change_below() {
    let pair = Pair::apart();
    let lab = &pair.lab;
    lab.join([
        (1, "eth0 10.0.0.1/24 fd00:aa::1/96"),
        (2, "eth0 10.0.0.2/24 fd00:aa::2/96"),
    ]);
    lab.sysctl(1, "net/ipv4/conf/eth0/promote_secondaries", "1");
    pair.endpoint(0, "10.0.0.2:2");
    lab.ping(1, "192.168.241.2");
    lab.ip(1, "addr add 10.0.0.10/24 dev eth0");
    lab.ip(1, "addr del 10.0.0.1/24 dev eth0");
    lab.ping(1, "192.168.241.2");
    pair.endpoint(0, "[fd00:aa::2]:2");
    lab.ping(1, "192.168.241.2");
    lab.ip(1, "addr add fd00:aa::10/96 dev eth0");
    lab.ip(1, "addr del fd00:aa::1/96 dev eth0");
    lab.ping(1, "192.168.241.2");
    assert_eq!(pair.knows(1), "[fd00:aa::10]:1");
    // Nobody is there: told at once, as by a router.
    pair.devices[0].set(&format!("peer {} remove", pair.keys[1].public));
    let refused = lab.succeeds(1, "ping -c 1 -W 5 192.168.241.2");
    assert!(!refused);
}

#[test]
fn answers_leave_from_the_address_that_was_asked_until_they_would_leave_elsewhere() {
    let pair = Pair::apart();
    let lab = &pair.lab;
    lab.join([(1, "eth0 10.0.0.1/24 10.0.0.2/24"), (2, "eth0 10.0.0.3/24")]);
    // Not the address that the kernel would choose.
    pair.endpoint(1, "10.0.0.2:1");
    lab.ping(2, "192.168.241.1");
    lab.ping(1, "192.168.241.2");
    assert_eq!(pair.knows(1), "10.0.0.2:1");
    // Changes elsewhere are none.
    lab.join([(1, "eth1 10.0.1.1/24"), (2, "eth1 10.0.1.2/24")]);
    lab.ping(1, "192.168.241.2");
    assert_eq!(pair.knows(1), "10.0.0.2:1");
    // Now the way is another one.
    for (n, link) in [(1, "eth0"), (2, "eth1")] {
        lab.sysctl(n, "net/ipv4/conf/all/rp_filter", "0");
        lab.sysctl(n, &format!("net/ipv4/conf/{link}/rp_filter"), "0");
    }
    lab.ip(1, "route add 10.0.0.3/32 dev eth1 src 10.0.1.1");
    wait_until("it leaves by the new way", || {
        lab.ping(1, "192.168.241.2");
        pair.knows(1) == "10.0.1.1:1"
    });
}

#[test]
fn a_device_that_is_down_is_silent() {
    let lab = Lab::new();
    let device = Device::start(&lab, 0, Program::MeshTunnel);
    let listener = lab.on(0, || UdpSocket::bind("127.0.0.1:1111").unwrap());
    let hears = |time| {
        listener.set_read_timeout(Some(time)).unwrap();
        listener.recv(&mut [0; 999]).is_ok()
    };
    let (own, peer) = (Keys::new(), Keys::new());
    let words = format!(
        "peer {} endpoint 127.0.0.1:1111 persistent-keepalive 1",
        peer.public
    );
    device.set(&words);
    device.set_with("private-key /dev/stdin", &own.private);
    assert!(!hears(Duration::from_secs(2)));
    lab.ip(0, &format!("link set {} up", device.name));
    assert!(hears(Duration::from_secs(5)));
    lab.ip(0, &format!("link set {} down", device.name));
    // What was on its way.
    while hears(Duration::from_millis(300)) {}
    assert!(!hears(Duration::from_secs(6)));
    // Without a key it is nobody, up or down.
    device.set("private-key /dev/null");
    lab.ip(0, &format!("link set {} up", device.name));
    assert!(!hears(Duration::from_secs(2)));
    device.set_with("private-key /dev/stdin", &own.private);
    assert!(hears(Duration::from_secs(1)));
    // Keys with which everybody has the same secret (as netns.sh lists them).
    device.set(&format!("peer {} remove", peer.public));
    while hears(Duration::from_millis(300)) {}
    for low in [
        "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=",
        "AQAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=",
        "4Ot6fDtBuK4WVuP68Z/EatoJjeucMrH9hmIFFl9JuAA=",
        "X5yVvKNQjCSx0LFVnIPvWwREXMRYHI6G2CJO3dCfEVc=",
        "7P///////////////////////////////////////38=",
        "7f///////////////////////////////////////38=",
        "7v///////////////////////////////////////38=",
    ] {
        device.set(&format!(
            "peer {low} persistent-keepalive 1 endpoint 127.0.0.1:1111"
        ));
    }
    assert_eq!(device.show("peers").lines().count(), 7);
    assert!(!hears(Duration::from_secs(2)));
}
