//! What stays when the process ends, and how the next one takes it over. A process' end is here the
//! end of all its descriptors, as after `kill -9`.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    net::{SocketAddr, TcpListener, TcpStream, UdpSocket},
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    thread,
    time::{Duration, Instant},
};

use aya::{
    Pod,
    maps::{HashMap, Map, MapData},
};
use ebpf_abi::{EndpointList, MAPS_VERSION, SocketAddress};
use ebpf_loader::{
    BPFFS, Backends, Clients, Frontend, Pins, PinsError, Protocol, Selection, Services,
};
use rustix::net::sockopt::set_socket_linger;

use crate::{
    bpffs::new_bpffs,
    lab::{
        BpfObjects, FAMILIES, Lab, PATIENCE, accepted, addresses, own_bpf_objects, tcp_servers,
        udp_servers,
    },
};

/// A cgroup with nobody's programs, and a bpffs.
struct Kept {
    lab: Lab,
    folder: PathBuf,
}

impl Kept {
    fn new() -> Self {
        let mut lab = Lab::new();
        drop(lab.take_services());
        new_bpffs();
        let folder = open(&lab).unwrap().folder().to_owned();
        Self { lab, folder }
    }

    /// The next process: it has taken over, and attached nothing yet.
    fn take_over(&self) -> Services {
        let pins = open(&self.lab).unwrap();
        Services::take_over(self.lab.cgroup(), Some(pins), false).unwrap()
    }

    fn maps(&self) -> PathBuf {
        self.folder.join(format!("maps_{MAPS_VERSION}"))
    }

    fn map<K: Pod, V: Pod>(&self, name: &str) -> HashMap<MapData, K, V> {
        let map = MapData::from_pin(self.maps().join(name));
        Map::HashMap(map.unwrap()).try_into().unwrap()
    }
}

fn open(lab: &Lab) -> Result<Pins, PinsError> {
    Pins::open(Path::new(BPFFS), lab.cgroup())
}

fn frontend(at: &str, protocol: Protocol) -> Frontend {
    let at: SocketAddr = at.parse().unwrap();
    Frontend {
        clients: Clients::All,
        address: at.ip().to_canonical(),
        port: at.port(),
        protocol,
    }
}

#[test]
fn services_go_on_while_nobody_runs_and_the_next_process_takes_over() {
    for family in &FAMILIES {
        let kept = Kept::new();
        let tcp = tcp_servers(family.loopback, 1);
        let udp = udp_servers(family.loopback, 1);
        let asked = family.asked();
        let desired = BTreeMap::from([
            (
                frontend(family.asked, Protocol::Tcp),
                addresses(&tcp, TcpListener::local_addr).into(),
            ),
            (
                frontend(family.asked, Protocol::Udp),
                addresses(&udp, UdpSocket::local_addr).into(),
            ),
        ]);
        let mut first = kept.take_over();
        assert!(first.are_kept());
        assert_eq!(first.apply(&desired).unwrap().written, 2);
        first.attach().unwrap();
        let stream = TcpStream::connect(asked).unwrap();
        let connected = family.client();
        connected.connect(asked).unwrap();
        let unconnected = family.client();
        let answers = || {
            assert_eq!(stream.peer_addr().unwrap(), asked, "{}", family.name);
            let other = TcpStream::connect(asked).unwrap();
            assert_eq!(other.peer_addr().unwrap(), asked, "{}", family.name);
            connected.send(b"?").unwrap();
            unconnected.send_to(b"?", asked).unwrap();
            for _ in 0..2 {
                let (_, from) = udp[0].recv_from(&mut [0]).unwrap();
                udp[0].send_to(b"!", from).unwrap();
            }
            for client in [&connected, &unconnected] {
                let (_, shown) = client.recv_from(&mut [0]).unwrap();
                assert_eq!(shown, asked, "{}", family.name);
            }
        };
        answers();
        let before = own_bpf_objects();
        drop(first);
        assert!(own_bpf_objects().links.is_empty());
        answers();

        let mut second = kept.take_over();
        answers();
        let report = second.apply(&desired).unwrap();
        assert_eq!(
            (report.written, report.unchanged),
            (0, 2),
            "{}",
            family.name
        );
        second.attach().unwrap();
        answers();
        let after = own_bpf_objects();
        let same = after.maps.intersection(&before.maps);
        let maps = fs::read_dir(kept.maps()).unwrap();
        assert_eq!(same.count(), maps.count(), "{}: other maps", family.name);
        let links = fs::read_dir(kept.folder.join("links")).unwrap();
        assert_eq!(links.count(), after.links.len());
        let replaced = BpfObjects {
            maps: before.maps.difference(&after.maps).copied().collect(),
            ..before
        };
        replaced.wait_until_gone();
    }
}

#[test]
fn of_a_stream_of_connects_through_restarts_none_fails_and_none_goes_past() {
    let kept = Kept::new();
    let family = &FAMILIES[0];
    let servers = tcp_servers(family.loopback, 2);
    let at = addresses(&servers, TcpListener::local_addr);
    let frontend = frontend(family.asked, Protocol::Tcp);
    let restarted = |services: &mut Services, server: usize| {
        let desired = BTreeMap::from([(frontend, vec![at[server]].into())]);
        services.apply(&desired).unwrap();
        services.attach().unwrap();
    };
    let mut services = kept.take_over();
    restarted(&mut services, 0);
    let stop = AtomicBool::new(false);
    let connects = AtomicU64::new(0);
    let services = thread::scope(|scope| {
        let _stop_at_end = OnDrop(|| stop.store(true, Ordering::Relaxed));
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                // There is no route to it: past the service is an error.
                let client = TcpStream::connect(family.asked).unwrap();
                drop(accepted(&servers));
                set_socket_linger(&client, Some(Duration::ZERO)).unwrap(); // No TIME_WAIT.
                connects.fetch_add(1, Ordering::Relaxed);
            }
        });
        let go_on = || {
            let seen = connects.load(Ordering::Relaxed);
            let began = Instant::now();
            while connects.load(Ordering::Relaxed) < seen + 10 {
                assert!(began.elapsed() < PATIENCE, "no connects any more");
                thread::yield_now();
            }
        };
        for (version, server) in ["same", "same", "other", "same"]
            .into_iter()
            .zip([0, 1, 1, 0])
        {
            go_on();
            drop(services);
            go_on();
            if version == "other" {
                // What is there under a name is not what it should be, as after an upgrade.
                let maps = kept.maps();
                fs::rename(maps.join("hf_affinities"), maps.join("hf_turns")).unwrap();
            }
            services = kept.take_over();
            go_on();
            restarted(&mut services, server);
        }
        go_on();
        services
    });
    drop(services);
}

/// Also when the test fails.
struct OnDrop<F: Fn()>(F);

impl<F: Fn()> Drop for OnDrop<F> {
    fn drop(&mut self) {
        self.0();
    }
}

#[test]
fn whatever_a_service_asks_for_is_read_back() {
    let kept = Kept::new();
    let to = |endpoints: &[&str]| {
        Backends::from(
            endpoints
                .iter()
                .map(|at| at.parse().unwrap())
                .collect::<Vec<SocketAddr>>(),
        )
    };
    let tcp = |at| frontend(at, Protocol::Tcp);
    let outside = Frontend {
        clients: Clients::Outside,
        ..tcp("10.96.0.1:80")
    };
    let ranges = [("192.168.0.0", 16), ("0.0.0.0", 0), ("10.1.2.3", 32)];
    let ranges_v6 = [("fd00::", 8), ("::", 0)];
    let prefixes = |ranges: &[(&str, u8)]| {
        let prefixes = ranges
            .iter()
            .map(|&(net, length)| (net.parse().unwrap(), length));
        Some(prefixes.collect())
    };
    let desired = BTreeMap::from([
        (
            tcp("10.96.0.1:80"),
            to(&["10.0.0.1:8080", "10.0.0.2:8081", "10.0.0.1:8080"]),
        ),
        (
            frontend("10.96.0.1:80", Protocol::Udp),
            to(&["10.0.0.1:53"]),
        ),
        (
            outside,
            Backends {
                ranges: prefixes(&ranges),
                ..to(&["10.0.0.2:8081"])
            },
        ),
        (
            Frontend {
                clients: Clients::Outside,
                ..tcp("[fd00:96::1]:80")
            },
            Backends {
                ranges: prefixes(&ranges_v6),
                ..to(&["[fd00::1]:80"])
            },
        ),
        (tcp("[fd00:96::1]:80"), to(&["[fd00::1]:80"])),
        (tcp("10.96.0.2:80"), Backends::default()),
        (
            tcp("10.96.0.3:80"),
            Backends {
                affinity: Some(Duration::from_secs(10_800)),
                ..to(&["10.0.0.1:1"])
            },
        ),
        (
            tcp("10.96.0.4:80"),
            Backends {
                selection: Selection::ClientHash,
                ..to(&["10.0.0.1:1", "10.0.0.2:1"])
            },
        ),
        (
            tcp("10.96.0.5:80"),
            Backends {
                selection: Selection::Turns,
                ..to(&["10.0.0.1:1"])
            },
        ),
    ]);
    assert_eq!(kept.take_over().apply(&desired).unwrap().written, 9);
    let mut second = kept.take_over();
    let report = second.apply(&desired).unwrap();
    assert_eq!(
        (report.written, report.removed, report.unchanged),
        (0, 0, 9)
    );
    // Numbers of lists are not given out twice.
    let values = |kept: &Kept| -> BTreeSet<u64> {
        let frontends = kept.map::<SocketAddress, u64>("hf_frontends");
        let lists = frontends
            .iter()
            .map(|entry| EndpointList::from_value(entry.unwrap().1));
        lists.map(EndpointList::number).collect()
    };
    let before = values(&kept);
    let moved = desired
        .keys()
        .map(|&frontend| (frontend, to(&["10.0.0.3:3"])));
    let moved = moved
        .filter(|(frontend, _)| frontend.address.is_ipv4())
        .collect();
    let report = second.apply(&moved).unwrap();
    assert_eq!((report.written, report.removed), (7, 2));
    assert!(before.is_disjoint(&values(&kept)));
    assert_eq!(
        kept.map::<u64, SocketAddress>("hf_endpoints")
            .keys()
            .count(),
        7
    );
    assert_eq!(
        kept.map::<SocketAddress, u64>("hf_timeouts").keys().count(),
        0
    );
}

#[test]
fn ten_thousand_services_are_taken_over_without_writing_a_list() {
    let kept = Kept::new();
    let desired: BTreeMap<_, _> = (0..10_000_u16)
        .map(|n| {
            let [high, low] = n.to_be_bytes();
            let service = frontend(&format!("10.97.{high}.{low}:80"), Protocol::Tcp);
            let endpoint = |port: u16| SocketAddr::from(([10, 42, high, low], port));
            let endpoints: Vec<_> = (1..=25).map(endpoint).collect();
            (service, endpoints.into())
        })
        .collect();
    let mut first = kept.take_over();
    assert_eq!(first.apply(&desired).unwrap().written, 10_000);
    drop(first);
    let began = Instant::now();
    drop(Services::take_over(kept.lab.cgroup(), None, false).unwrap());
    let loaded = began.elapsed();
    let began = Instant::now();
    let mut second = kept.take_over();
    let taken_over = began.elapsed();
    let report = second.apply(&desired).unwrap();
    assert_eq!((report.written, report.unchanged), (0, 10_000));
    println!(
        "10,000 services, 250,000 endpoints: loaded in {loaded:?}, with reading back in {taken_over:?}"
    );
}

#[test]
fn what_a_killed_process_left_half_written_is_put_right() {
    let kept = Kept::new();
    let family = &FAMILIES[0];
    let servers = tcp_servers(family.loopback, 1);
    let at = addresses(&servers, TcpListener::local_addr);
    let broken = frontend("10.96.0.9:80", Protocol::Tcp);
    let desired = BTreeMap::from([
        (frontend(family.asked, Protocol::Tcp), at.clone().into()),
        (broken, vec![at[0], at[0]].into()),
    ]);
    let mut first = kept.take_over();
    first.apply(&desired).unwrap();
    drop(first);
    // A list that no frontend has yet, and one of which a part is erased.
    let mut endpoints = kept.map::<u64, SocketAddress>("hf_endpoints");
    let endpoint = SocketAddress::new(at[0].ip(), at[0].port(), 6);
    for slot in EndpointList::new(77, 5).slots() {
        endpoints.insert(slot, endpoint, 0).unwrap();
    }
    let frontends = kept.map::<SocketAddress, u64>("hf_frontends");
    let key = SocketAddress::new(broken.address, broken.port, 6);
    let list = EndpointList::from_value(frontends.get(&key, 0).unwrap());
    endpoints.remove(&list.slots().next().unwrap()).unwrap();

    let mut second = kept.take_over();
    assert_eq!(endpoints.keys().count(), 1, "the whole list alone");
    assert_eq!(frontends.keys().count(), 1, "its frontend alone");
    let report = second.apply(&desired).unwrap();
    assert_eq!((report.written, report.unchanged), (1, 1));
    let list = EndpointList::from_value(frontends.get(&key, 0).unwrap());
    assert!(list.number() > 77, "{list:?}");
    second.attach().unwrap();
    for asked in [family.asked(), "10.96.0.9:80".parse().unwrap()] {
        drop(TcpStream::connect(asked).unwrap());
        accepted(&servers);
    }
}

#[test]
fn removal_ends_the_services_and_leaves_nothing() {
    let kept = Kept::new();
    let family = &FAMILIES[0];
    let servers = tcp_servers(family.loopback, 1);
    let at = addresses(&servers, TcpListener::local_addr);
    let mut services = kept.take_over();
    let desired = BTreeMap::from([(frontend(family.asked, Protocol::Tcp), at.into())]);
    services.apply(&desired).unwrap();
    services.attach().unwrap();
    let ids = own_bpf_objects();
    let in_use = open(&kept.lab).unwrap_err();
    assert!(matches!(in_use, PinsError::InUse(_)), "{in_use:?}");
    let outside = Pins::open(Path::new(BPFFS), kept.lab.outside()).unwrap();
    assert_ne!(outside.folder(), kept.folder, "another cgroup's is another");
    drop(services);
    drop(TcpStream::connect(family.asked).unwrap());
    let problems = open(&kept.lab).unwrap().remove();
    assert!(problems.is_empty(), "{problems:?}");
    ids.wait_until_gone();
    TcpStream::connect(family.asked).unwrap_err();
    assert!(!kept.folder.exists());
    assert!(outside.remove().is_empty());
    assert!(!Path::new(BPFFS).join("holdfast").exists());
}

#[test]
fn without_bpffs_the_error_says_how_to_get_it() {
    let lab = Lab::new();
    let error = Pins::open(Path::new("/tmp"), lab.cgroup()).unwrap_err();
    assert!(matches!(error, PinsError::NotMounted(_)), "{error:?}");
    assert!(
        error.to_string().contains("mount -t bpf bpf /sys/fs/bpf"),
        "{error}"
    );
}
