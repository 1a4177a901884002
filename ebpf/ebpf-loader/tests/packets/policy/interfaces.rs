//! Real sockets in pods whose own interfaces are guarded, by the stack and past it.

use std::{
    collections::BTreeSet,
    fs::File,
    io::{ErrorKind, Read as _, Write as _},
    net::{TcpListener, TcpStream, UdpSocket},
    path::Path,
    thread,
    time::Duration,
};

use aya::programs::{SchedClassifier, TcAttachType};
use ebpf_loader::{
    BPFFS, Clients, Frontend, InterfaceError, LinkHeader, Pins, Protocol, RedirectKind,
    RedirectLink, policy::end_left,
};

use super::*;
use crate::{
    bpffs::new_bpffs,
    lan::index,
    machine::uninterrupted,
    netns::ip,
    pods::{A, B, C, Name, Node, Pod, SERVICES, exchange, forwarded, host},
    redirect::{read_for, tun},
};

/// What is not coming is waited for so long.
pub(super) const SHORT: Duration = Duration::from_millis(200);

/// Two retransmissions of a SYN, and a loaded machine.
const LONG: Duration = Duration::from_secs(5);

/// Behind the tunnel, in the order of families.
const FAR: [&str; 2] = ["10.245.0.9", "fd45::9"];
const FAR_CLASS: u32 = 20;

pub(super) fn class(pod: Name) -> u32 {
    match pod {
        A => 10,
        B => 11,
        _ => ANYBODY,
    }
}

/// `A` and `B` are guarded, and everything is allowed. `C`, where it is, is somebody outside.
pub(super) struct Guarded {
    pub(super) policy: Policy,
    pub(super) tables: Tables,
    before: BTreeMap<PolicyCounter, u64>,
}

impl Guarded {
    pub(super) fn new() -> Self {
        let mut guarded = Self::unattached();
        guarded.attach();
        guarded
    }

    pub(super) fn unattached() -> Self {
        Self::kept(None)
    }

    pub(super) fn kept(pins: Option<Pins>) -> Self {
        let mut tables = Tables {
            enforced: true,
            ..Tables::default()
        };
        for all in ["0.0.0.0", "::"] {
            tables.addresses.insert((all.parse().unwrap(), 0), ANYBODY);
        }
        for far in FAR {
            tables
                .addresses
                .insert(host(far.parse().unwrap()), FAR_CLASS);
        }
        for pod in [A, B] {
            let own = pod.addresses().map(|address| (host(address), class(pod)));
            tables.addresses.extend(own);
        }
        let policy = Policy::load(pins).unwrap_or_else(|error| panic!("{error}\n{error:?}"));
        let mut guarded = Self {
            policy,
            tables,
            before: BTreeMap::new(),
        };
        guarded.say_of_all(ALLOWED);
        guarded
    }

    /// Of all that both pods do.
    pub(super) fn say_of_all(&mut self, verdict: Verdict) {
        for local in [A, B] {
            for remote in [ANYBODY, class(A), class(B), FAR_CLASS] {
                for direction in [In, Out] {
                    self.set(local, remote, direction, verdict, None);
                }
            }
        }
        self.apply();
    }

    pub(super) fn say(&mut self, local: Name, remote: u32, direction: Direction, verdict: Verdict) {
        self.set(local, remote, direction, verdict, None);
        self.apply();
    }

    fn set(
        &mut self,
        local: Name,
        remote: u32,
        direction: Direction,
        strictest: Verdict,
        set: Option<u32>,
    ) {
        let pair = Pair {
            local: class(local),
            remote,
            direction,
        };
        self.tables.pairs.insert(pair, rules(strictest, set));
    }

    pub(super) fn apply(&mut self) {
        self.policy.apply(&self.tables).unwrap();
    }

    pub(super) fn attach(&mut self) -> usize {
        self.attach_to(&[A, B])
    }

    pub(super) fn attach_to(&mut self, pods: &[Name]) -> usize {
        let pods = pods.iter().map(|pod| index(pod.port)).collect();
        let report = self.policy.attach_pods(&pods).unwrap();
        assert!(report.failed.is_empty(), "{report:?}");
        report.attached
    }

    /// How often it was counted since it was last asked.
    pub(super) fn new_ones(&mut self, counter: PolicyCounter) -> u64 {
        let now = self.policy.counters().unwrap()[&counter];
        let before = self.before.insert(counter, now).unwrap_or_default();
        now - before
    }
}

/// Whether a datagram arrives.
pub(super) fn hears(from: &UdpSocket, to: &UdpSocket) -> bool {
    hears_at(from, to, to.local_addr().unwrap())
}

fn hears_at(from: &UdpSocket, to: &UdpSocket, at: SocketAddr) -> bool {
    to.set_read_timeout(Some(SHORT)).unwrap();
    from.send_to(b"question", at).unwrap();
    to.recv(&mut [0; 8]).is_ok()
}

/// A connection, if it comes to be.
pub(super) fn connect(from: &Pod, to: &TcpListener) -> Option<(TcpStream, TcpStream)> {
    connect_within(from, to, SHORT)
}

/// Where it must be possible: a first packet may be lost while neighbours are looked for.
pub(super) fn connected(from: &Pod, to: &TcpListener) -> (TcpStream, TcpStream) {
    let connected = connect_within(from, to, LONG);
    connected.unwrap_or_else(|| panic!("cannot connect to {:?}", to.local_addr()))
}

fn connect_within(
    from: &Pod,
    to: &TcpListener,
    patience: Duration,
) -> Option<(TcpStream, TcpStream)> {
    let at = to.local_addr().unwrap();
    let client = from
        .run(|| TcpStream::connect_timeout(&at, patience))
        .ok()?;
    let (server, _) = to.accept().unwrap();
    Some((client, server))
}

/// Whether what one end says comes to the other within a retransmission.
pub(super) fn talks(from: &mut TcpStream, to: &mut TcpStream, patience: Duration) -> bool {
    to.set_read_timeout(Some(patience)).unwrap();
    from.write_all(b".").unwrap();
    to.read_exact(&mut [0]).is_ok()
}

/// Redirected and by the stack, in both families.
fn each_way(mut test: impl FnMut(&mut Node, &Pod, &Pod, [IpAddr; 2], bool)) {
    let (mut node, a, b) = Node::with_pods();
    for redirected in [true, false] {
        if !redirected {
            node.leave_alone(A);
            node.leave_alone(B);
        }
        for (a_ip, b_ip) in A.addresses().into_iter().zip(B.addresses()) {
            let before = forwarded();
            test(&mut node, &a, &b, [a_ip, b_ip], redirected);
            assert_eq!(forwarded() == before, redirected, "who handed packets on");
        }
    }
}

#[test]
fn pods_of_one_node_are_judged_by_the_rules_of_both() {
    each_way(|_, a, b, [a_ip, b_ip], _| {
        let mut guarded = Guarded::new();
        let (at_a, at_b) = (a.listener(a_ip), b.listener(b_ip));
        connected(a, &at_b);
        connected(b, &at_a);
        for (denier, other, direction) in [(A, B, Out), (B, A, In)] {
            guarded.say_of_all(ALLOWED);
            guarded.say(denier, class(other), direction, DENIED);
            assert!(connect(a, &at_b).is_none(), "{denier:?}");
            assert!(guarded.new_ones(Denied) > 0);
            let told = guarded.policy.events().last().copied().unwrap();
            assert_eq!((told.direction, told.from.ip()), (direction, a_ip));
            connected(b, &at_a); // The other way, with answers.
        }
        assert_eq!(guarded.new_ones(Spoofed), 0);
    });
}

#[test]
fn each_end_decides_once_and_the_hook_behind_the_stack_finds_it_decided() {
    each_way(|_, a, b, [a_ip, b_ip], redirected| {
        let mut guarded = Guarded::new();
        exchange(&a.socket(a_ip), &b.socket(b_ip));
        assert_eq!(guarded.new_ones(FlowOpened), 2);
        let times = if redirected { 2 } else { 3 };
        assert_eq!(guarded.new_ones(Passed), times);
        assert_eq!(guarded.new_ones(Answered), times);
    });
}

#[test]
fn an_open_connection_of_pods_is_cut_both_ways_and_goes_on() {
    const RETRANSMITTED: Duration = Duration::from_secs(5);
    each_way(|_, a, b, [_, b_ip], _| {
        let mut guarded = Guarded::new();
        let (mut client, mut server) = connected(a, &b.listener(b_ip));
        assert!(talks(&mut client, &mut server, SHORT));
        assert!(talks(&mut server, &mut client, SHORT));
        guarded.say(B, class(A), In, DENIED);
        assert!(!talks(&mut client, &mut server, SHORT));
        assert!(!talks(&mut server, &mut client, SHORT));
        assert!(guarded.new_ones(FlowEnded) > 0);
        guarded.say(B, class(A), In, AUDITED);
        assert!(talks(&mut client, &mut server, RETRANSMITTED));
        assert!(talks(&mut server, &mut client, RETRANSMITTED));
        assert!(guarded.new_ones(Audited) > 0);
    });
}

#[test]
fn the_node_itself_and_its_pods_always_reach_each_other() {
    let (_node, a, _b) = Node::with_pods();
    let mut guarded = Guarded::new();
    guarded.say_of_all(DENIED);
    for (own, unspecified) in A.addresses().into_iter().zip(["0.0.0.0:0", "[::]:0"]) {
        let (pod, node) = (a.socket(own), UdpSocket::bind(unspecified).unwrap());
        assert!(hears(&node, &pod));
        // By each address that it has, also where no rule knows it.
        let at_node = if own.is_ipv4() {
            "10.244.0.1"
        } else {
            "fd44::1"
        };
        let port = node.local_addr().unwrap().port();
        assert!(hears_at(
            &pod,
            &node,
            SocketAddr::new(at_node.parse().unwrap(), port)
        ));
        assert!(guarded.new_ones(OwnNode) >= 2);
    }
    assert_eq!(guarded.new_ones(Denied), 0);
}

#[test]
fn the_world_is_judged_both_ways_and_icmp_errors_pass_about_what_may() {
    let (_node, a, _b) = Node::with_pods();
    let outside = Pod::new(C, &[]);
    let mut guarded = Guarded::new();
    for (own, other) in A.addresses().into_iter().zip(C.addresses()) {
        guarded.say_of_all(ALLOWED);
        let [asking, asked] = [(&a, own), (&outside, other)].map(|(pod, ip)| pod.socket(ip));
        exchange(&asking, &asked);
        let closed = outside.socket(other).local_addr().unwrap();
        let refused = |expected: bool| {
            let client = a.socket(own);
            client.set_read_timeout(Some(SHORT)).unwrap();
            client.connect(closed).unwrap();
            client.send(b"question").unwrap();
            let error = client.recv(&mut [0; 8]).unwrap_err();
            assert_eq!(error.kind() == ErrorKind::ConnectionRefused, expected);
        };
        refused(true);
        guarded.say(A, ANYBODY, In, DENIED);
        let [asking, asked] = [(&outside, other), (&a, own)].map(|(pod, ip)| pod.socket(ip));
        assert!(!hears(&asking, &asked));
        assert!(connect(&outside, &a.listener(own)).is_none());
        exchange(&a.socket(own), &outside.socket(other));
        refused(true);
        assert!(guarded.new_ones(ErrorPassed) > 0);
        guarded.say(A, ANYBODY, Out, DENIED);
        assert!(!hears(&a.socket(own), &outside.socket(other)));
        refused(false);
    }
    assert_eq!(guarded.new_ones(Spoofed), 0);
}

#[test]
fn what_devices_ask_of_pods_is_judged_where_it_comes_in() {
    let (mut node, [_a, b, device]) = Node::with_a_device();
    let listeners = B.addresses().map(|address| b.listener(address));
    node.serve([0, 1].map(|family: usize| listeners[family].local_addr().unwrap()));
    let asks = |family: usize, patience| {
        let asked: SocketAddr = SERVICES[family].parse().unwrap();
        let client = device.run(|| TcpStream::connect_timeout(&asked, patience));
        client
            .ok()
            .map(|client| (client, listeners[family].accept().unwrap().0))
    };
    let mut guarded = Guarded::new();
    let wanted = BTreeSet::from([index(C.port)]);
    assert!(guarded.policy.attach_devices(&wanted).is_empty());
    for family in [0, 1] {
        let before = forwarded();
        guarded.say_of_all(ALLOWED);
        let (mut client, mut server) = asks(family, LONG).unwrap();
        assert!(talks(&mut client, &mut server, SHORT));
        guarded.say(B, ANYBODY, In, DENIED);
        assert!(!talks(&mut client, &mut server, SHORT));
        assert!(guarded.new_ones(FlowEnded) > 0);
        assert!(asks(family, SHORT).is_none());
        assert!(guarded.new_ones(Denied) > 0);
        assert_eq!(forwarded(), before, "it was redirected");
    }
    assert_eq!(guarded.new_ones(Spoofed), 0);
    // Whoever has a pod's address, and is none.
    guarded.say_of_all(ALLOWED);
    let [own, _] = A.addresses();
    let strange = strange(&device, own);
    let answers = b.socket(B.addresses()[0]);
    assert!(!hears(&strange, &answers));
    assert!(guarded.new_ones(Spoofed) > 0);
    // Nothing of the node's own is touched.
    let node = UdpSocket::bind("10.244.0.1:0").unwrap();
    guarded.say_of_all(DENIED);
    exchange(&device.socket(C.addresses()[0]), &node);
    assert!(guarded.policy.attach_devices(&BTreeSet::new()).is_empty());
    let at_devices = SchedClassifier::query_tcx(C.port, TcAttachType::Ingress)
        .unwrap()
        .1;
    assert!(
        at_devices
            .iter()
            .all(|one| one.name_as_str() != Some("hf_policy_device"))
    );
}

/// A socket of the pod by an address that is not its own.
fn strange(pod: &Pod, address: IpAddr) -> UdpSocket {
    pod.run(|| {
        let nodad = address.is_ipv6().then_some("nodad");
        let text = address.to_string();
        ip(&[&["addr", "add", &text, "dev", "eth0"], nodad.as_slice()].concat());
        UdpSocket::bind((address, 0)).unwrap()
    })
}

#[test]
fn a_pod_speaks_from_its_own_addresses_alone() {
    let (_node, a, b) = Node::with_pods();
    let mut guarded = Guarded::new();
    // Who is spoofed may do everything.
    guarded.say(A, class(B), Out, DENIED);
    let nobody = ["10.9.9.9", "fd09::9"].map(|text| text.parse().unwrap());
    let far = FAR.map(|text| text.parse().unwrap());
    for claimed in [nobody, far, C.addresses()] {
        for (claimed, other) in claimed.into_iter().zip(B.addresses()) {
            let liar = strange(&a, claimed);
            assert!(!hears(&liar, &b.socket(other)), "{claimed}");
            // Not even to the node.
            let (at, unspecified) = match claimed {
                IpAddr::V4(_) => ("10.244.0.1", "0.0.0.0:0"),
                IpAddr::V6(_) => ("fd44::1", "[::]:0"),
            };
            let node = UdpSocket::bind(unspecified).unwrap();
            let at = SocketAddr::new(at.parse().unwrap(), node.local_addr().unwrap().port());
            assert!(!hears_at(&liar, &node, at), "{claimed}");
            assert_eq!(guarded.new_ones(Spoofed), 2, "{claimed}");
        }
    }
}

/// A tunnel that the node's routes to [`FAR`] lead by.
fn far_away(node: &mut Node, guarded: &mut Guarded) -> File {
    let tun = tun("tun0");
    for (far, length) in FAR.into_iter().zip([16, 64]) {
        let far: IpAddr = far.parse().unwrap();
        let net = if far.is_ipv4() {
            "10.245.0.0"
        } else {
            "fd45::"
        };
        ip(&["route", "add", &format!("{net}/{length}"), "dev", "tun0"]);
        let prefix = (net.parse().unwrap(), length);
        node.redirects.routes.insert(prefix, Some(index("tun0")));
    }
    let link = RedirectLink {
        kind: RedirectKind::Tunnel,
        mtu_bytes: 1_400,
    };
    node.redirects.links.insert(index("tun0"), link);
    node.tell();
    guarded.policy.attach_tunnel(index("tun0")).unwrap();
    tun
}

#[test]
fn nobody_outside_has_the_address_of_a_pod_of_the_mesh_or_of_the_node() {
    let (mut node, a, b) = Node::with_pods();
    let outside = Pod::new(C, &[]);
    let mut guarded = Guarded::new();
    let _tun = far_away(&mut node, &mut guarded);
    // What the kernel would judge by itself, for IPv4.
    for interface in ["all", C.port] {
        let judges = format!("/proc/sys/net/ipv4/conf/{interface}/rp_filter");
        std::fs::write(judges, "0").unwrap();
    }
    guarded.say(B, ANYBODY, In, DENIED);
    exchange(&a.socket(A.addresses()[0]), &b.socket(B.addresses()[0]));
    for (claimed, to) in A.addresses().into_iter().zip(B.addresses()) {
        assert!(
            !hears(&strange(&outside, claimed), &b.socket(to)),
            "{claimed}"
        );
        assert_eq!(guarded.new_ones(Spoofed), 1, "{claimed}");
    }
    for (claimed, to) in FAR.into_iter().zip(B.addresses()) {
        let liar = strange(&outside, claimed.parse().unwrap());
        assert!(!hears(&liar, &b.socket(to)), "{claimed}");
        assert_eq!(guarded.new_ones(Spoofed), 1, "{claimed}");
    }
    // The kernel itself drops the node's IPv4 addresses.
    let [_, to] = B.addresses();
    let own = strange(&outside, "fd44::2".parse().unwrap());
    ip(&["addr", "add", "fd44::2", "dev", "lo", "nodad"]);
    let before = guarded.new_ones(Denied);
    assert!(!hears(&own, &b.socket(to)), "denied before: {before}");
    assert_eq!(guarded.new_ones(Denied), 1);
    guarded.say(B, ANYBODY, In, ALLOWED);
    assert!(hears(&own, &b.socket(to)), "as anybody's");
}

#[test]
fn a_pod_is_judged_where_the_tunnel_s_packets_go_past_the_stack() {
    let (mut node, a, _b) = Node::with_pods();
    let mut guarded = Guarded::new();
    let tun = far_away(&mut node, &mut guarded);
    let before = forwarded();
    for (own, far) in A.addresses().into_iter().zip(FAR) {
        let far = SocketAddr::new(far.parse().unwrap(), 9);
        guarded.say_of_all(ALLOWED);
        let socket = a.socket(own);
        let at = socket.local_addr().unwrap();
        let says = |text: &[u8]| {
            let packet = without_ethernet(wire::udp(far, at, text));
            (&tun).write_all(&packet).unwrap();
            socket.set_read_timeout(Some(SHORT)).unwrap();
            socket.recv(&mut [0; 8]).is_ok()
        };
        socket.send_to(b"question", far).unwrap();
        read_for(&tun, far.ip());
        assert!(says(b"answer"));
        // Once at the pod's interface, found again at the tunnel's; the answer at the tunnel's alone.
        assert_eq!(guarded.new_ones(FlowOpened), 1);
        assert_eq!(guarded.new_ones(Passed), 2);
        assert_eq!(guarded.new_ones(Answered), 1);
        guarded.say(A, FAR_CLASS, In, DENIED);
        assert!(says(b"answer"), "to what the pod may ask");
        guarded.say(A, FAR_CLASS, Out, DENIED);
        assert!(!says(b"answer"));
        socket.send_to(b"question", far).unwrap();
        let ended = guarded.new_ones(FlowEnded);
        assert_eq!(ended, 2, "each at the interface that it came by");
        guarded.say(A, FAR_CLASS, In, ALLOWED);
        let other = a.socket(own);
        let packet = without_ethernet(wire::udp(far, other.local_addr().unwrap(), b"question"));
        (&tun).write_all(&packet).unwrap();
        let (_, asked_by) = other.recv_from(&mut [0; 8]).unwrap();
        other.send_to(b"answer", asked_by).unwrap();
        let (_, payload) = read_for(&tun, far.ip());
        assert_eq!(&payload[8..], b"answer");
        let new = [FlowOpened, Passed, Answered].map(|counter| guarded.new_ones(counter));
        assert_eq!(new[0], 1, "{new:?}");
    }
    assert_eq!(forwarded(), before, "the stack handed nothing on");
}

#[test]
fn a_service_is_judged_as_its_endpoint_whoever_was_attached_first() {
    for policy_first in [true, false] {
        for redirected in [true, false] {
            let (mut node, a, b) = Node::with_pods();
            let mut early = policy_first.then(Guarded::new);
            node.services
                .attach_interface(index(A.port), LinkHeader::Ethernet)
                .unwrap();
            node.redirect(A); // Now it is served.
            if !redirected {
                node.leave_alone(A);
                node.leave_alone(B);
            }
            let mut guarded = early.take().unwrap_or_else(Guarded::new);
            let listeners = B.addresses().map(|address| b.listener(address));
            let endpoints = [&listeners[0], &listeners[1]].map(|one| one.local_addr().unwrap());
            node.serve(endpoints);
            for (listener, asked) in listeners.iter().zip(SERVICES) {
                let asked: SocketAddr = asked.parse().unwrap();
                let endpoint = listener.local_addr().unwrap();
                guarded.tables.ports.clear();
                guarded.say_of_all(DENIED);
                assert!(a.run(|| TcpStream::connect_timeout(&asked, SHORT)).is_err());
                assert!(guarded.new_ones(Denied) > 0);
                // The pod may ask the endpoint alone, and not the service's address.
                let of_endpoint = PortPrefix {
                    rule_set: 1,
                    protocol: Some(TCP),
                    port: endpoint.port(),
                    bits: 16,
                };
                guarded.tables.ports.insert(of_endpoint, ALLOWED);
                for (local, remote, direction) in [(A, B, Out), (B, A, In)] {
                    guarded.set(local, class(remote), direction, DENIED, Some(1));
                }
                guarded.apply();
                let mut client = a
                    .run(|| TcpStream::connect_timeout(&asked, SHORT))
                    .unwrap_or_else(|error| panic!("{policy_first} {redirected}: {error}"));
                let (mut server, _) = listener.accept().unwrap();
                assert!(talks(&mut client, &mut server, SHORT));
                assert!(talks(&mut server, &mut client, SHORT));
                guarded.tables.ports.clear();
                guarded.apply();
                assert!(!talks(&mut client, &mut server, SHORT));
                assert!(!talks(&mut server, &mut client, SHORT));
            }
            // Without endpoints it is refused, by the pod's own interface, whatever it may ask.
            guarded.say_of_all(DENIED);
            let none = SERVICES.map(|asked| {
                let asked: SocketAddr = asked.parse().unwrap();
                let frontend = Frontend {
                    clients: Clients::All,
                    address: asked.ip(),
                    port: asked.port(),
                    protocol: Protocol::Tcp,
                };
                (frontend, Vec::new().into())
            });
            node.services.apply(&none.into()).unwrap();
            for asked in SERVICES {
                let asked = asked.parse().unwrap();
                let error = a
                    .run(|| TcpStream::connect_timeout(&asked, SHORT))
                    .unwrap_err();
                assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
            }
        }
    }
}

#[test]
fn a_pod_reaches_itself_by_a_service_whatever_it_may() {
    let (mut node, a, _b) = unredirected();
    node.services
        .attach_interface(index(A.port), LinkHeader::Ethernet)
        .unwrap();
    let listeners = A.addresses().map(|address| a.listener(address));
    node.serve([&listeners[0], &listeners[1]].map(|one| one.local_addr().unwrap()));
    let mut guarded = Guarded::new();
    guarded.say_of_all(DENIED);
    for (listener, asked) in listeners.iter().zip(SERVICES) {
        let asked: SocketAddr = asked.parse().unwrap();
        let mut client = a
            .run(|| TcpStream::connect_timeout(&asked, SHORT))
            .unwrap_or_else(|error| panic!("{asked}: {error}"));
        let (mut server, from) = listener.accept().unwrap();
        assert_eq!(from.ip(), asked.ip(), "the other end is the service");
        assert!(talks(&mut client, &mut server, SHORT));
        assert!(talks(&mut server, &mut client, SHORT));
    }
    assert_eq!(
        (guarded.new_ones(Denied), guarded.new_ones(Spoofed)),
        (0, 0)
    );
}

#[test]
fn what_may_be_ip_behind_more_tags_than_are_looked_through_is_dropped() {
    let guarded = Guarded::unattached();
    let [net, _] = ip_nets();
    let packet = syn(net.client, net.endpoint);
    let run = |packet: &[u8]| {
        let options = TestRunOptions {
            data_in: Some(packet),
            ..TestRunOptions::new()
        };
        let program = guarded.policy.program(At::Pod, Out).unwrap();
        program.test_run(options).unwrap().return_value
    };
    let mut tagged = packet.clone();
    for _ in 0..2 {
        tagged.splice(12..12, [0x81, 0, 0, 0]);
    }
    assert_eq!(run(&tagged), DROPPED);
    let mut arp = packet;
    arp[12..14].copy_from_slice(&[8, 6]);
    assert_eq!(run(&arp), u32::MAX);
    let counted = guarded.policy.counters().unwrap();
    assert_eq!((counted[&Malformed], counted[&Control]), (1, 1));
}

#[test]
fn an_interface_that_is_gone_is_said_so_and_who_has_its_index_is_guarded_anew() {
    let (_node, _a, _old) = Node::with_pods();
    let mut guarded = Guarded::new();
    assert_eq!(guarded.attach(), 0);
    let number = index(B.port);
    ip(&["link", "del", B.port]);
    let report = guarded
        .policy
        .attach_pods(&BTreeSet::from([number]))
        .unwrap();
    let error = &report.failed[&number];
    assert!(
        matches!(
            error,
            InterfaceError::Policy(_) | InterfaceError::Unknown { .. }
        ),
        "{error:?}"
    );
    let _b = Pod::new(B, &["index", &number.to_string()]);
    assert_eq!(
        guarded.attach(),
        2,
        "one was given up, the other one is new"
    );
}

/// How many programs of policy see what the pod sends.
pub(super) fn programs_from(pod: Name) -> usize {
    let (_, there) = SchedClassifier::query_tcx(pod.port, TcAttachType::Ingress).unwrap();
    let names = there.iter().filter_map(|program| program.name_as_str());
    names.filter(|name| *name == "hf_policy_from").count()
}

/// The kernel lets go of what was pinned in the background.
#[track_caller]
pub(super) fn becomes_so(is_so: impl Fn() -> bool) {
    let tries = || {
        thread::sleep(Duration::from_millis(10));
        is_so()
    };
    assert!((0..300).any(|_| tries()), "not in 3 s");
}

#[test]
fn what_pods_may_do_holds_while_no_agent_runs_and_until_the_next_one_is_attached() {
    let (_node, a, b) = Node::with_pods();
    new_bpffs();
    let pins = || Pins::of_policy(Path::new(BPFFS)).unwrap();
    let next = || Guarded::kept(Some(pins()));
    for (a_ip, b_ip) in A.addresses().into_iter().zip(B.addresses()) {
        let from_a = || hears(&a.socket(a_ip), &b.socket(b_ip));
        let from_b = || hears(&b.socket(b_ip), &a.socket(a_ip));
        let mut first = next();
        assert_eq!(first.attach(), 2);
        first.say(A, class(B), Out, DENIED);
        assert!(!from_a() && from_b());
        drop(first);
        assert!(!from_a() && from_b(), "nobody runs");

        let mut second = next();
        second.say(B, class(A), Out, DENIED);
        assert!(!from_a() && from_b(), "it is loaded and attached nowhere");
        assert_eq!(second.attach(), 2);
        assert!(from_a() && !from_b());
        assert_eq!(programs_from(A), 1, "in the place of the first");
        drop(second);

        let mut third = next();
        third.say_of_all(DENIED);
        assert_eq!(third.attach_to(&[A]), 1, "B is no pod any more");
        assert!(!from_a());
        becomes_so(|| programs_from(A) == 1 && programs_from(B) == 0);
        third.policy.remove();
        becomes_so(|| from_a() && from_b());

        let mut fourth = next();
        fourth.attach();
        fourth.say_of_all(DENIED);
        drop(fourth);
        assert!(!from_a() && !from_b());
        end_left(pins());
        becomes_so(|| from_a() && from_b());
        assert_eq!(programs_from(A) + programs_from(B), 0);
    }
    assert!(pins().remove().is_empty());
}

/// Redirection comes after the agent's policy, and filters see nothing of it.
pub(super) fn unredirected() -> (Node, Pod, Pod) {
    let (mut node, a, b) = Node::with_pods();
    [A, B].into_iter().for_each(|pod| node.leave_alone(pod));
    (node, a, b)
}

/// What a packet costs at pods' interfaces, for the documentation: `--nocapture`.
#[test]
fn what_pods_say_to_each_other_and_to_the_world_is_judged_many_times_over() {
    const TIMES: u32 = 100_000;
    /// Fifty times more than here: what is looked through one by one would show.
    const MOST: Duration = Duration::from_micros(50);
    let (_node, _a, _b) = unredirected();
    let _outside = Pod::new(C, &[]);
    let mut guarded = Guarded::new();
    // No other program's, and no more than there may be in the tables of a large mesh.
    for index in 0..20_000_u32 {
        let [_, first, second, third] = index.to_be_bytes();
        let address = IpAddr::from([100, 64 + first, second, third]);
        guarded.tables.addresses.insert((address, 32), FAR_CLASS);
    }
    guarded.apply();
    let number = |pod: Name| index(pod.port).get();
    for (own, other) in A.addresses().into_iter().zip(B.addresses()) {
        let outside: IpAddr = match own {
            IpAddr::V4(_) => C.addresses()[0],
            IpAddr::V6(_) => C.addresses()[1],
        };
        let [own, other, outside] = [own, other, outside].map(|ip| SocketAddr::new(ip, 40_000));
        let rows = [
            ("to a pod, at both ends", Out, own, other, 0, number(A), 2),
            ("from a pod, again", In, own, other, number(A), number(B), 1),
            ("to the node's networks", Out, own, outside, 0, number(A), 1),
        ];
        for (what, direction, from, to, came_by, at, decided) in rows {
            let mut context = [0; 192]; // struct __sk_buff of linux/bpf.h.
            context[36..40].copy_from_slice(&came_by.to_ne_bytes());
            context[40..44].copy_from_slice(&at.to_ne_bytes());
            let packet = wire::udp(from, to, b"question");
            let program = guarded.policy.program(At::Pod, direction).unwrap();
            let run = |repeat| {
                uninterrupted(|| {
                    program.test_run(TestRunOptions {
                        data_in: Some(&packet),
                        ctx_in: Some(&context),
                        repeat,
                        ..TestRunOptions::new()
                    })
                })
            };
            let passed = || guarded.policy.counters().unwrap()[&Passed];
            let before = passed();
            assert_eq!(run(1).return_value, u32::MAX, "{what}");
            assert_eq!(passed() - before, decided, "{what}");
            let cost = run(TIMES).duration;
            println!("{what}, {from} to {to}: {cost:?} a packet");
            assert!(cost < MOST, "{what}: {cost:?}");
        }
    }
}

/// Both pods at the ports of one bridge, which has the node's addresses. They reach each other as neighbours, or by the
/// node.
pub(super) fn at_bridge(as_neighbours: bool) -> (Node, Pod, Pod) {
    let (node, a, b) = unredirected();
    ip(&["link", "add", "br0", "type", "bridge"]);
    ip(&["link", "set", "br0", "up"]);
    for own in ["10.244.0.1", "fd44::1"] {
        let nodad = own.contains(':').then_some("nodad");
        let add = ["addr", "add", own, "dev", "br0"];
        ip(&[&add, nodad.as_slice()].concat());
    }
    for (name, pod, other) in [(A, &a, B), (B, &b, A)] {
        ip(&["addr", "flush", "dev", name.port]);
        ip(&["link", "set", name.port, "master", "br0"]);
        for (own, other) in name.addresses().into_iter().zip(other.addresses()) {
            let [own, other] = [own, other].map(|ip| ip.to_string());
            ip(&["route", "replace", &own, "dev", "br0"]);
            if as_neighbours {
                pod.run(|| ip(&["route", "add", &other, "dev", "eth0"]));
            }
        }
    }
    (node, a, b)
}

#[test]
fn at_a_bridge_s_ports_pods_are_judged_as_everywhere() {
    for as_neighbours in [true, false] {
        let (_node, a, b) = at_bridge(as_neighbours);
        let outside = Pod::new(C, &[]);
        let mut guarded = Guarded::unattached();
        let bridges = [A, B].map(|pod| (index(pod.port), index("br0")));
        guarded.policy.say_bridges(&bridges.into()).unwrap();
        guarded.attach();
        for (family, (a_ip, b_ip)) in A.addresses().into_iter().zip(B.addresses()).enumerate() {
            guarded.say_of_all(ALLOWED);
            let c_ip = C.addresses()[family];
            let (at_a, at_b) = (a.listener(a_ip), b.listener(b_ip));
            let at_c = outside.listener(c_ip);
            let (mut client, mut server) = connected(&a, &at_b);
            for (from, to) in [(&b, &at_a), (&a, &at_c), (&outside, &at_a)] {
                connected(from, to);
            }
            for (denier, other, direction) in [(A, B, Out), (B, A, In)] {
                guarded.say_of_all(ALLOWED);
                guarded.say(denier, class(other), direction, DENIED);
                is_one_way((&a, &at_a), (&b, &at_b), (&mut client, &mut server));
            }
            guarded.say_of_all(ALLOWED);
            guarded.say(A, ANYBODY, In, DENIED);
            assert!(connect(&outside, &at_a).is_none());
            connected(&a, &at_c);
            guarded.say(A, ANYBODY, Out, DENIED);
            assert!(connect(&a, &at_c).is_none());
            // The node itself, always.
            let node = TcpListener::bind(["10.244.0.1:0", "[fd44::1]:0"][family]).unwrap();
            connected(&a, &node);
            assert_eq!(guarded.new_ones(Spoofed), 0);
            let liar = strange(&a, ["10.9.9.9", "fd09::9"][family].parse().unwrap());
            assert!(!hears(&liar, &b.socket(b_ip)));
            assert_eq!(guarded.new_ones(Spoofed), 1);
        }
        let fewer = [(index(A.port), index("br0"))];
        guarded.policy.say_bridges(&fewer.into()).unwrap();
        guarded.say_of_all(ALLOWED);
        let [b_ip, _] = B.addresses();
        let [a_ip, _] = A.addresses();
        assert!(
            !hears(&b.socket(b_ip), &a.socket(a_ip)),
            "the routes do not lead to B by its port"
        );
        assert!(guarded.new_ones(Spoofed) > 0);
    }
}

/// A comes to B no more, by new connections and by this one that was open; B still comes to A.
#[track_caller]
fn is_one_way(
    (a, at_a): (&Pod, &TcpListener),
    (b, at_b): (&Pod, &TcpListener),
    (client, server): (&mut TcpStream, &mut TcpStream),
) {
    assert!(connect(a, at_b).is_none());
    connected(b, at_a); // With answers.
    assert!(!talks(client, server, SHORT), "it was open");
}

#[test]
fn a_virtual_machine_at_a_tap_device_is_judged_as_a_pod() {
    let (_node, _veth, b) = unredirected();
    ip(&["link", "del", A.port]);
    let a = Pod::virtual_machine(A);
    let mut guarded = Guarded::new();
    assert_eq!(programs_from(A), 1);
    for (family, (a_ip, b_ip)) in A.addresses().into_iter().zip(B.addresses()).enumerate() {
        guarded.say_of_all(ALLOWED);
        let (at_a, at_b) = (a.listener(a_ip), b.listener(b_ip));
        connected(&b, &at_a);
        let (mut client, mut server) = connected(&a, &at_b);
        assert!(talks(&mut client, &mut server, LONG));
        for (denier, other, direction) in [(A, B, Out), (B, A, In)] {
            guarded.say_of_all(ALLOWED);
            guarded.say(denier, class(other), direction, DENIED);
            is_one_way((&a, &at_a), (&b, &at_b), (&mut client, &mut server));
        }
        guarded.say_of_all(ALLOWED);
        guarded.say(A, class(B), In, DENIED);
        assert!(connect(&b, &at_a).is_none());
        connected(&a, &at_b);
        assert_eq!(guarded.new_ones(Spoofed), 0);
        let liar = strange(&a, ["10.9.9.9", "fd09::9"][family].parse().unwrap());
        assert!(!hears(&liar, &b.socket(b_ip)));
        assert_eq!(guarded.new_ones(Spoofed), 1);
    }
}
