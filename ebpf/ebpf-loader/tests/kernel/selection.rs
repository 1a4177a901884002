//! Who gets the next flow: by turn and by the client's hash. By chance is what the others try.

use std::net::{SocketAddr, TcpListener, UdpSocket};

use ebpf_loader::{Backends, Protocol, Selection};

use crate::{
    affinity::{assert_namespaces_are_clients, reach},
    lab::{FAMILIES, Lab, addresses, ask, tcp_servers, udp_servers},
};

fn by(selection: Selection) -> Backends {
    Backends {
        selection,
        ..Backends::default()
    }
}

#[test]
fn in_turns_each_endpoint_is_next_as_often_as_it_is_in_the_list() {
    for family in &FAMILIES {
        let mut lab = Lab::new();
        let servers = tcp_servers(family.loopback, 3);
        let [a, b, c] = addresses(&servers, TcpListener::local_addr)[..] else {
            panic!("three servers");
        };
        let list = [a, b, a, c];
        let services = [(family.asked(), Protocol::Tcp, &list[..])];
        lab.apply_like(&by(Selection::Turns), &services);
        let reached: Vec<_> = (0..12).map(|_| reach(family.asked(), &servers)).collect();
        let first = reached.iter().position(|&server| server == 1).unwrap() + 3;
        let expected = [0, 1, 0, 2].repeat(4);
        assert_eq!(reached, expected[4 - first % 4..][..12], "{}", family.name);
    }
}

#[test]
fn datagrams_of_sockets_go_in_turns_and_a_socket_stays() {
    let family = &FAMILIES[0];
    let mut lab = Lab::new();
    let servers = udp_servers(family.loopback, 2);
    let list = addresses(&servers, UdpSocket::local_addr);
    lab.apply_like(
        &by(Selection::Turns),
        &[(family.asked(), Protocol::Udp, &list)],
    );
    let clients = [family.client(), family.client()];
    let first = clients
        .each_ref()
        .map(|client| ask(client, family, &servers));
    assert_ne!(first[0], first[1]);
    for _ in 0..3 {
        let again = clients
            .each_ref()
            .map(|client| ask(client, family, &servers));
        assert_eq!(again, first);
    }
}

#[test]
fn a_client_has_the_place_of_its_hash_also_after_a_restart() {
    let mut lab = Lab::new();
    let family = &FAMILIES[0];
    let at: [SocketAddr; 3] = [7001, 7002, 7003].map(|port| ([127, 0, 0, 1], port).into());
    let services = [(family.asked(), Protocol::Tcp, &at[..])];
    let like = by(Selection::ClientHash);
    lab.apply_like(&like, &services);
    assert_namespaces_are_clients(family.asked(), at, |first, servers| {
        drop(lab.take_services());
        lab.load();
        lab.apply_like(&like, &services);
        assert_eq!(reach(family.asked(), servers), first, "after a restart");
    });
}
