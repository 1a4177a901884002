use std::net::{Ipv4Addr, Ipv6Addr};

use mesh_api::{
    admin::{PeersResponse, ServicesResponse},
    connect::{KEEPALIVE_INTERVAL, KEEPALIVE_TIMEOUT},
};
use mesh_core::snapshot::{
    Endpoint, EndpointPort, EndpointSlice, MeshSettings, Node, ServiceName, ServicePort, Snapshot,
};
use mesh_wire::id::MeshId;
use prost::Message as _;

use super::*;

const NODES: u32 = 100_000;
const SERVICES: u32 = 1_000;

/// What `meshctl` takes (`MESSAGE_MAX_BYTES`).
const ANSWER_BYTES_MAX: usize = 64 << 20;

/// Of 100,000 nodes, with an endpoint on each.
fn large() -> View {
    let mesh = MeshId([7; 32]);
    let mut snapshot = Snapshot::empty(MeshSettings::with_defaults(mesh, "demo"));
    let above = |first: [u8; 4], number: u32| Ipv4Addr::from(u32::from_be_bytes(first) + number);
    let name = |number: u32| -> NodeName { format!("node-{number}").parse().unwrap() };
    for number in 0..NODES {
        let mut key = [0; 32];
        key[..4].copy_from_slice(&number.to_be_bytes());
        let overlay = above([100, 96, 0, 1], number);
        let node = Node::new(&mesh, name(number), NodeId(key), overlay);
        snapshot.nodes.insert(name(number), node);
    }
    for number in 0..SERVICES {
        let service = ServiceName {
            namespace: "shop".to_owned(),
            name: format!("service-{number}"),
        };
        let address = above([10, 43, 0, 1], number).into();
        let mut own = Service::new(service.clone(), ServiceKind::ClusterIp(vec![address]));
        own.ports = vec![ServicePort {
            name: String::new(),
            protocol: Protocol::Tcp,
            port: 80,
            node_port: None,
        }];
        let endpoint =
            |number: u32| Endpoint::new(above([10, 128, 0, 1], number).into(), Some(name(number)));
        let each = NODES / SERVICES;
        let slice = EndpointSlice {
            name: "one".to_owned(),
            ports: vec![EndpointPort {
                name: String::new(),
                protocol: Protocol::Tcp,
                port: 8080,
            }],
            endpoints: (number * each..(number + 1) * each).map(endpoint).collect(),
        };
        let slices = [(slice.name.clone(), Arc::new(slice))].into();
        snapshot.slices.insert(service.clone(), slices);
        snapshot.services.insert(service, Arc::new(own));
    }
    View::new(Arc::new(snapshot), name(0))
}

#[tokio::test]
async fn the_driver_s_thread_goes_on_while_100_000_endpoints_are_reported_and_meshctl_takes_them() {
    let view = Arc::new(large());
    // All on one thread, as in the agent.
    let (mut rounds, mut latest) = (0_u32, Duration::ZERO);
    let began = Instant::now();
    let mut last = began;
    let mut report = std::pin::pin!(services_beside(view));
    let services = loop {
        tokio::select! {
            services = &mut report => break services.unwrap(),
            () = time::sleep(Duration::from_millis(1)) => {
                rounds += 1;
                latest = latest.max(last.elapsed());
                last = Instant::now();
            }
        }
    };
    let took = began.elapsed();
    let endpoints: usize = services.iter().map(|one| one.endpoints.len()).sum();
    assert_eq!((services.len(), endpoints), (1_000, 100_000));
    // Made on this thread, there would be none.
    assert!(rounds > 0, "the report took {took:?}, and nothing else ran");
    let answer = ServicesResponse { services };
    let began = Instant::now();
    let bytes = answer.encode_to_vec().len();
    let encoded = began.elapsed();
    assert!(bytes < ANSWER_BYTES_MAX / 4, "{bytes}");
    println!(
        "{endpoints} endpoints: {bytes} bytes, made in {took:?} beside the thread, which went on {rounds} times, the longest pause \
         {latest:?}; encoded on it in {encoded:?}"
    );
}

#[test]
fn however_many_nodes_are_out_of_reach_the_status_stays_one_page() {
    let all = |many: u32| {
        let name = |number: u32| -> NodeName { format!("node-{number}").parse().unwrap() };
        out_of_reach((0..many).map(|number| (name(number), Reason::MapStale)))
    };
    assert!(all(0).is_empty());
    let told = all(20);
    assert_eq!(told.len(), 20);
    assert!(told[19].starts_with("node node-19 is unreachable: It is connected to a relay"));
    let told = all(NODES);
    assert_eq!(told.len(), 21);
    assert_eq!(
        told[20],
        "99980 more nodes are unreachable (`meshctl peers` has all)"
    );
    let status = StatusResponse {
        problems: told,
        ..StatusResponse::default()
    };
    assert!(status.encoded_len() < 8 << 10, "{}", status.encoded_len());
}

/// With the longest that each field can be.
#[test]
fn meshctl_takes_the_answer_of_a_node_that_speaks_with_100_000_others() {
    let longest = |first: u32| format!("{first:0>63}");
    let peer = |number: u32| Peer {
        name: longest(number),
        public_key: NodeId([0xff; 32]).to_string(),
        site: longest(number),
        overlay_addresses: vec![
            Ipv4Addr::BROADCAST.to_string(),
            Ipv6Addr::from([0xff; 16]).to_string(),
        ],
        state: state_text(PeerState::Unreachable).to_owned(),
        reason: reason_text(Reason::PolicyRelayOnly).to_owned(),
        path: format!("relay {} (relay_udp)", longest(0)),
        rtt_ms: 1.5,
        sent_bytes: u64::MAX,
        received_bytes: u64::MAX,
        last_received_ms: Some(u64::MAX),
        last_handshake_ms: Some(u64::MAX),
        external: false,
    };
    let peers = (0..NODES).map(peer).collect();
    let bytes = PeersResponse { peers }.encoded_len();
    assert!(bytes < ANSWER_BYTES_MAX, "{bytes}");
}

const DAY: Duration = Duration::from_secs(86_400);

/// Of a certificate that was made so many days ago, and is renewed after 30.
fn made_days_ago(days: u32) -> Validity {
    let made = SystemTime::now() - days * DAY;
    Validity::from_now(made, 60 * DAY)
}

#[test]
fn since_a_controller_was_heard_counts_from_the_stream_s_end_not_from_its_last_word() {
    let validity = made_days_ago(25);
    let mut connection = Connection {
        connected: true,
        last_contact: Some(SystemTime::now() - 21 * DAY),
        ..Connection::default()
    };
    assert_eq!(snapshot_age(&connection, validity), Some(Duration::ZERO));
    connection.end();
    assert!(!connection.connected);
    assert!(snapshot_age(&connection, validity).unwrap() < DAY);
    // Attempts that fail change nothing.
    connection.last_contact = Some(SystemTime::now() - 2 * DAY);
    connection.end();
    assert!(snapshot_age(&connection, validity).unwrap() >= 2 * DAY);
    // Whatever the clock said.
    connection.last_contact = Some(SystemTime::now() + 2 * DAY);
    connection.silent = Some((5 * DAY, time::Instant::now()));
    assert!(snapshot_age(&connection, validity).unwrap() >= 5 * DAY);
}

#[test]
fn a_clock_that_is_wrong_makes_the_state_neither_fresh_nor_years_old() {
    let right = SystemTime::now();
    let last = right - 4 * DAY;
    let made = made_days_ago(10); // Ends in 50 days.
    let counted = 3 * DAY; // A day without power.
    for (name, last, now, expected) in [
        ("right", last, right, 4 * DAY),
        ("behind the last contact", last, last - DAY, counted),
        ("years behind", last, UNIX_EPOCH, counted),
        ("a little behind", last, last + 2 * DAY, counted),
        ("years ahead", last, right + 3_650 * DAY, counted),
        (
            "ahead by less than anybody can tell",
            last,
            right + DAY,
            5 * DAY,
        ),
        (
            "years ahead then, right now",
            right + 3_650 * DAY,
            right,
            counted,
        ),
    ] {
        assert_eq!(silence(last, now, made, counted), expected, "{name}");
    }
    // As it boots without a battery: the controller was there when it made the certificate.
    let since_made = right.duration_since(made.not_before).unwrap();
    assert_eq!(silence(UNIX_EPOCH, right, made, counted), since_made);
}

#[test]
fn the_documentation_says_how_soon_a_controller_that_is_gone_is_noticed() {
    let text = include_str!("../../../docs/offline.md");
    let [interval, timeout] = [KEEPALIVE_INTERVAL, KEEPALIVE_TIMEOUT].map(|time| time.as_secs());
    let row = format!(
        "| the controller | {timeout} to {} s | it is asked after {interval} s of silence (`KEEPALIVE_INTERVAL`), and has {timeout} s",
        interval + timeout
    );
    assert!(text.contains(&row), "{row}");
}
