//! Two links on a network that a test makes up, in virtual time.

use std::{
    collections::VecDeque,
    sync::Arc,
    time::{Duration, SystemTime},
};

use mesh_identity::{
    authority::{CertificateAuthority, new_key},
    certificate::Validity,
    credentials::Credentials,
    tls::{ClientAuth, client_config, server_config, server_name},
};
use mesh_wire::{
    id::{Identity, NodeId},
    relay::{ALPN_QUIC, PAYLOAD_LEN_MAX, Session, data_frame},
};
use quinn_proto::{
    ClientConfig, ConnectionHandle, DatagramEvent, Endpoint, EndpointConfig, ServerConfig,
    crypto::rustls::{QuicClientConfig, QuicServerConfig},
};

use super::*;
use crate::{
    KEEP_ALIVE,
    quic::{transport_config, without_grease},
};

/// From one side to the other.
const DELAY: Duration = Duration::from_millis(10);

/// Full-size frames of an overlay with an MTU of 1,280 bytes.
const FRAME_LEN: usize = 8 + 32 + 1280;

struct Side {
    endpoint: Endpoint,
    link: Option<(ConnectionHandle, QuicLink)>,
    inbox: VecDeque<(Instant, Vec<u8>)>,
    frames: Vec<Bytes>,
    controls: VecDeque<Control>,
    ended: Option<ConnectionError>,
}

impl Side {
    fn new(endpoint: Endpoint) -> Self {
        Self {
            endpoint,
            link: None,
            inbox: VecDeque::new(),
            frames: Vec::new(),
            controls: VecDeque::new(),
            ended: None,
        }
    }

    fn link(&mut self) -> &mut QuicLink {
        &mut self.link.as_mut().unwrap().1
    }
}

/// A node (0) and a relay (1), and what lies between.
struct World {
    now: Instant,
    sides: [Side; 2],
    /// Longest UDP payload that passes.
    mtu: usize,
    /// Nothing passes.
    cut: bool,
    /// Every so many datagrams one is lost; 0: none is.
    lose_every: usize,
    sent: usize,
}

fn credentials(authority: &CertificateAuthority, identity: &Identity) -> Credentials {
    let key = new_key().unwrap();
    let validity = Validity::from_now(SystemTime::now(), Duration::from_secs(3600));
    let certificate = authority.issue(identity, &key.csr_der, validity).unwrap();
    let root = authority.certificate_der().clone();
    Credentials::from_parts(vec![certificate], &key.key_pem, root).unwrap()
}

fn settings() -> Arc<EndpointConfig> {
    Arc::new(without_grease(EndpointConfig::default()))
}

impl World {
    fn new(mtu: usize) -> Self {
        let authority = CertificateAuthority::generate("test", SystemTime::now()).unwrap();
        let relay_identity = Identity::Relay("r1".parse().unwrap());
        let node = credentials(
            &authority,
            &Identity::Node {
                name: "n1".parse().unwrap(),
                id: NodeId([1; 32]),
            },
        );
        let relay = credentials(&authority, &relay_identity);

        let tls = server_config(&relay, ClientAuth::Required, &[ALPN_QUIC]).unwrap();
        let tls = QuicServerConfig::try_from(tls).unwrap();
        let mut server = ServerConfig::with_crypto(Arc::new(tls));
        server.transport_config(transport_config(1, None));
        let relay_endpoint = Endpoint::new(settings(), Some(Arc::new(server)), true, None);

        let tls = client_config(&node, &[ALPN_QUIC]).unwrap();
        let tls = QuicClientConfig::try_from(tls).unwrap();
        let mut client = ClientConfig::new(Arc::new(tls));
        client.transport_config(transport_config(0, Some(KEEP_ALIVE)));
        let mut node_endpoint = Endpoint::new(settings(), None, true, None);
        let now = Instant::now();
        let name = server_name("test", &relay_identity).unwrap();
        let (handle, connection) = node_endpoint
            .connect(
                now,
                client,
                "192.0.2.1:443".parse().unwrap(),
                &name.to_str(),
            )
            .unwrap();
        let mut world = Self {
            now,
            sides: [Side::new(node_endpoint), Side::new(relay_endpoint)],
            mtu,
            cut: false,
            lose_every: 0,
            sent: 0,
        };
        world.sides[0].link = Some((handle, QuicLink::new(connection)));
        world
    }

    /// A world in which the node has said `Hello` and paths are probed.
    fn up(mtu: usize) -> Self {
        let mut world = Self::new(mtu);
        world.run(Duration::from_millis(100));
        world.sides[0].link().send_control(&Control::AskBindKey);
        world.run(Duration::from_secs(2));
        assert_eq!(
            world.sides[1].controls.pop_front(),
            Some(Control::AskBindKey)
        );
        world
    }

    fn run(&mut self, how_long: Duration) {
        let end = self.now + how_long;
        loop {
            while self.step() {}
            let timeouts = self.sides.iter_mut().filter_map(|side| {
                let timeout = side.link.as_mut().and_then(|(_, link)| link.poll_timeout());
                let arrival = side.inbox.front().map(|(at, _)| *at);
                timeout.into_iter().chain(arrival).min()
            });
            match timeouts.min() {
                Some(at) if at <= end => self.now = self.now.max(at),
                _ => break,
            }
        }
        self.now = end;
    }

    /// Does what can be done now; returns whether that was anything.
    fn step(&mut self) -> bool {
        let mut done = false;
        for number in 0..2 {
            done |= self.deliver(number);
            let now = self.now;
            let side = &mut self.sides[number];
            let Some((handle, link)) = &mut side.link else {
                continue;
            };
            link.handle_timeout(now);
            loop {
                let before = side.frames.len();
                let mut batch = Vec::new();
                link.receive(&mut batch, &mut side.controls, now);
                side.frames.append(&mut batch);
                if side.frames.len() == before {
                    break;
                }
            }
            side.ended = side.ended.take().or_else(|| link.ended());
            while let Some(event) = link.poll_endpoint_event() {
                if let Some(answer) = side.endpoint.handle_event(*handle, event) {
                    link.handle_event(answer);
                }
            }
            let (mut buffer, mut out) = (Vec::new(), Vec::new());
            while let Some(transmit) = link.poll_transmit(now, 10, &mut buffer) {
                let each = transmit.segment_size.unwrap_or(transmit.size);
                out.extend(buffer[..transmit.size].chunks(each).map(<[u8]>::to_vec));
                buffer.clear();
            }
            done |= !out.is_empty();
            for datagram in out {
                self.send(1 - number, datagram);
            }
        }
        done
    }

    fn send(&mut self, to: usize, datagram: Vec<u8>) {
        self.sent += 1;
        let lost = self.lose_every > 0 && self.sent.is_multiple_of(self.lose_every);
        if !self.cut && !lost && datagram.len() <= self.mtu {
            self.sides[to].inbox.push_back((self.now + DELAY, datagram));
        }
    }

    fn deliver(&mut self, number: usize) -> bool {
        let (now, side) = (self.now, &mut self.sides[number]);
        let mut answers = Vec::new();
        let mut delivered = false;
        while let Some((_, datagram)) = side.inbox.pop_front_if(|(at, _)| *at <= now) {
            delivered = true;
            let from = [1, 2].map(|last| ([192, 0, 2, last], 443).into())[number];
            let mut answer = Vec::new();
            let data = datagram.as_slice().into();
            let event = side
                .endpoint
                .handle(now, from, None, None, data, &mut answer);
            match event {
                Some(DatagramEvent::ConnectionEvent(_, event)) => side.link().handle_event(event),
                Some(DatagramEvent::NewConnection(incoming)) => {
                    let accepted = side.endpoint.accept(incoming, now, &mut answer, None);
                    let (handle, connection) = accepted.map_err(|error| error.cause).unwrap();
                    side.link = Some((handle, QuicLink::new(connection)));
                }
                Some(DatagramEvent::Response(_)) => answers.push(answer),
                None => {}
            }
        }
        for answer in answers {
            self.send(1 - number, answer);
        }
        delivered
    }
}

fn frame(number: u8, len: usize) -> Bytes {
    let session = Session {
        number: 1,
        epoch: 1,
    };
    data_frame(session, &vec![number; len - 8]).into()
}

#[test]
fn frames_pass_both_ways_each_as_one_datagram() {
    let mut world = World::up(1500);
    let sent: Vec<_> = (0..50).map(|n| frame(n, FRAME_LEN)).collect();
    for side in [0, 1] {
        for frame in &sent {
            assert!(world.sides[side].link().room() > 0);
            world.sides[side].link().send_frame(frame.clone()).unwrap();
        }
        world.run(DELAY * 2);
        assert_eq!(world.sides[1 - side].frames, sent);
    }
    assert_eq!(world.sides[0].link().rtt(), Some(DELAY * 2));
    assert!(world.sides[1].ended.is_none());
}

#[test]
fn frames_that_are_too_long_for_a_datagram_travel_as_streams_and_hold_up_no_other() {
    let mut world = World::up(1200);
    world.lose_every = 7;
    let sent: Vec<_> = (0..100).map(|n| frame(n, FRAME_LEN)).collect();
    for frame in &sent {
        world.sides[0].link().send_frame(frame.clone()).unwrap();
    }
    world.run(DELAY * 2);
    let at_once = world.sides[1].frames.len();
    assert!(
        (50..100).contains(&at_once),
        "{at_once} of 100 frames were not held up"
    );
    world.run(Duration::from_secs(5));
    let mut received = world.sides[1].frames.clone();
    received.sort();
    assert_eq!(received, sent, "streams repeat what was lost");
}

#[test]
fn without_credit_a_frame_is_refused_and_not_half_of_it_sent() {
    let mut world = World::up(1200);
    world.cut = true;
    let refused = (0..400_u16)
        .filter(|_| {
            world.sides[0]
                .link()
                .send_frame(frame(1, FRAME_LEN))
                .is_err()
        })
        .count();
    assert!((100..390).contains(&refused), "{refused}");
    world.cut = false;
    world.run(Duration::from_secs(10));
    assert_eq!(world.sides[1].frames.len(), 400 - refused);
    world.sides[0]
        .link()
        .send_frame(frame(2, FRAME_LEN))
        .unwrap();
    world.run(DELAY * 2);
    assert_eq!(world.sides[1].frames.last(), Some(&frame(2, FRAME_LEN)));
}

#[test]
fn a_stream_longer_than_a_frame_is_given_up() {
    let mut world = World::up(1200);
    let connection = &mut world.sides[0].link().connection;
    let id = connection.streams().open(Dir::Uni).unwrap();
    let long = vec![1; FRAME_LEN_MAX + 1];
    assert_eq!(connection.send_stream(id).write(&long), Ok(long.len()));
    world.run(Duration::from_secs(1));
    assert!(world.sides[1].frames.is_empty() && world.sides[1].link().partial.is_empty());
    world.sides[0]
        .link()
        .send_frame(frame(3, PAYLOAD_LEN_MAX))
        .unwrap();
    world.run(DELAY * 2);
    assert_eq!(world.sides[1].frames, [frame(3, PAYLOAD_LEN_MAX)]);
}

#[test]
fn control_messages_keep_their_order_under_loss_and_unknown_ones_are_skipped() {
    let mut world = World::up(1500);
    world.lose_every = 5;
    let messages: Vec<_> = (0..500).map(|txid| Control::Ping { txid }).collect();
    for (number, message) in messages.iter().enumerate() {
        let link = world.sides[0].link();
        if number == 250 {
            link.control_unsent.put_slice(&[0, 3, 250, 1, 2]);
        }
        link.send_control(message);
    }
    world.run(Duration::from_secs(10));
    assert!(world.sides[0].link().takes_control());
    assert_eq!(world.sides[1].controls, messages);
}

#[test]
fn a_control_message_that_is_too_long_ends_the_link() {
    let mut world = World::up(1500);
    let link = world.sides[0].link();
    link.control_unsent.put_slice(&[0xff; 400]);
    link.write_control();
    world.run(Duration::from_secs(1));
    let Some(ConnectionError::ApplicationClosed(close)) = &world.sides[0].ended else {
        panic!("{:?}", world.sides[0].ended);
    };
    assert_eq!(close.reason, "a control message that is too long");
}

#[test]
fn who_closes_is_heard_and_both_end() {
    let mut world = World::up(1500);
    let now = world.now;
    world.sides[1].link().close("the relay is stopping", now);
    world.run(Duration::from_secs(1));
    assert_eq!(world.sides[1].ended, Some(ConnectionError::LocallyClosed));
    let Some(ConnectionError::ApplicationClosed(close)) = &world.sides[0].ended else {
        panic!("{:?}", world.sides[0].ended);
    };
    assert_eq!(close.reason, "the relay is stopping");
}

#[test]
fn a_link_that_is_cut_ends_after_the_idle_timeout_and_a_silent_one_does_not() {
    let mut world = World::up(1500);
    world.run(Duration::from_secs(3600));
    assert!(world.sides[0].ended.is_none() && world.sides[1].ended.is_none());
    world.cut = true;
    world.run(Duration::from_secs(20));
    assert!(world.sides[0].ended.is_none() && world.sides[1].ended.is_none());
    world.run(Duration::from_secs(60));
    assert_eq!(world.sides[0].ended, Some(ConnectionError::TimedOut));
    assert_eq!(world.sides[1].ended, Some(ConnectionError::TimedOut));
}

#[test]
fn a_receiver_that_is_gone_costs_no_more_than_the_window() {
    let mut world = World::up(1500);
    world.cut = true;
    let (mut taken, before) = (0, world.sent);
    for _ in 0..10_000 {
        let link = world.sides[0].link();
        if link.room() > 0 {
            link.send_frame(frame(1, FRAME_LEN)).unwrap();
            taken += FRAME_LEN;
        }
        world.run(Duration::from_micros(100));
    }
    let sent = world.sent - before;
    assert!(taken < 3 << 20, "{taken} bytes");
    assert!(sent < 2000, "{sent} datagrams");
}
