//! STUN on every UDP port.

use std::{
    io::ErrorKind,
    net::{SocketAddr, UdpSocket},
    time::Duration,
};

use mesh_wire::reflexive::{parse_response, request};

use crate::harness::{Mesh, Node, PATIENCE, Quic, counter};

fn ask(socket: &UdpSocket, relay: SocketAddr, txid: [u8; 12]) -> Option<SocketAddr> {
    socket.send_to(&request(txid), relay).unwrap();
    let mut answer = [0; 1500];
    let (length, from) = socket.recv_from(&mut answer).unwrap();
    assert_eq!(from, relay);
    assert!(length <= request(txid).len());
    let (answered, observed) = parse_response(&answer[..length])?;
    assert_eq!(answered, txid);
    Some(observed)
}

#[test]
fn both_ports_say_where_a_request_came_from() {
    let mesh = Mesh::new();
    let relay = mesh.relay();
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    for (n, port) in [relay.quic, relay.stun].into_iter().enumerate() {
        let txid = [u8::try_from(n).unwrap(); 12];
        assert_eq!(ask(&socket, port, txid), Some(socket.local_addr().unwrap()));
    }
    assert_eq!(counter(&relay.stop(), "stun_answers"), 2);
}

#[test]
fn a_dual_stack_port_says_ipv4_addresses_as_such_and_answers_from_the_address_asked() {
    let mesh = Mesh::new();
    let any = "[::]:0".parse().unwrap();
    let config = mesh.configure(Some([any; 3]), "");
    let relay = crate::harness::Relay::start(crate::harness::command(&config));
    for (local, asked) in [("127.0.0.1:0", "127.0.0.7"), ("[::1]:0", "::1")] {
        let socket = UdpSocket::bind(local).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        for port in [relay.quic.port(), relay.stun.port()] {
            let asked = SocketAddr::new(asked.parse().unwrap(), port);
            let observed = ask(&socket, asked, [3; 12]);
            assert_eq!(observed, Some(socket.local_addr().unwrap()));
        }
    }
}

#[test]
fn a_request_shorter_than_its_answer_is_ignored_and_counted() {
    let mesh = Mesh::new();
    let relay = mesh.relay();
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    let mut bare = request([1; 12])[..20].to_vec();
    bare[2..4].copy_from_slice(&[0, 0]);
    socket.send_to(&bare, relay.quic).unwrap();
    socket.send_to(&bare, relay.stun).unwrap();
    // Both were handled before these are answered, for a socket keeps its order.
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    ask(&socket, relay.quic, [2; 12]).unwrap();
    ask(&socket, relay.stun, [3; 12]).unwrap();
    socket
        .set_read_timeout(Some(Duration::from_millis(1)))
        .unwrap();
    let more = socket.recv(&mut [0; 1500]).map_err(|error| error.kind());
    assert_eq!(more, Err(ErrorKind::WouldBlock));
    assert_eq!(counter(&relay.stop(), "stun_ignored"), 2);
}

#[tokio::test]
async fn stun_and_quic_share_a_port_without_harm() {
    let mesh = Mesh::new();
    let relay = mesh.relay();
    let a = Node::connect(&mesh, &relay, 1, Quic).await;
    let mut b = Node::connect(&mesh, &relay, 2, Quic).await;
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    for n in 0..50 {
        socket.send_to(&request([n; 12]), relay.quic).unwrap();
        a.send(&b, &[n]);
        assert_eq!(b.data().await.1, [n]);
    }
    assert_eq!(counter(&relay.stop(), "stun_answers"), 50);
}
