//! Beside kube-proxy on the same gateway.

use std::{
    io::{ErrorKind, Read as _, Write as _},
    net::{TcpListener, TcpStream},
};

use ebpf_loader::LinkHeader;

use crate::{
    kube_proxy::{KubeProxy, MODES},
    lan::{Family, Lan, families, index},
    sockets::{PATIENCE, ask, client_socket, connect, listener, server_socket, transfer},
};

/// Bytes each way.
fn exchange(client: &TcpStream, server: &TcpStream) {
    transfer(client, server, 100);
    transfer(server, client, 100);
}

/// Both ends of a new connection to the service, which has to lead to `listener`.
fn reach(lan: &Lan, family: &Family, listener: &TcpListener, why: &str) -> [TcpStream; 2] {
    let client = connect(lan, family).unwrap();
    listener.set_nonblocking(true).unwrap();
    let accepted = listener.accept();
    let (server, _) = accepted.unwrap_or_else(|error| panic!("{why}: it went elsewhere: {error}"));
    server.set_nonblocking(false).unwrap();
    server.set_read_timeout(Some(PATIENCE)).unwrap();
    exchange(&client, &server);
    [client, server]
}

#[track_caller]
fn assert_ends(mut client: &TcpStream, why: &str) {
    // A late acknowledgement may have ended it already.
    let asked = client.write_all(b"?");
    let ended = asked.and_then(|()| client.read(&mut [0])).unwrap_err();
    assert_eq!(ended.kind(), ErrorKind::ConnectionReset, "{why}");
}

#[test]
fn kube_proxy_may_come_first_restart_and_stay_behind() {
    for (mode, family) in MODES
        .iter()
        .flat_map(|&mode| families().map(|it| (mode, it)))
    {
        let mut lan = Lan::new();
        let (ours, our_address) = listener(&lan, &family);
        let (theirs, their_address) = listener(&lan, &family);
        let what = format!("{mode:?}, {}", family.service);
        lan.services.detach_interface(index("lan0"));
        lan.serve(family.service, &[our_address]);
        let proxy = KubeProxy::start(mode, family.service, their_address);
        let [their_client, their_server] = reach(&lan, &family, &theirs, &what);
        assert_eq!(proxy.flows(), 1, "{what}: alone");

        let attached = lan
            .services
            .attach_interface(index("lan0"), LinkHeader::Ethernet);
        attached.unwrap();
        let [client, server] = reach(&lan, &family, &ours, &what);
        assert_eq!(proxy.flows(), 1, "{what}: we came second");
        // What it had open is nothing that we know of: it ends, and at once.
        assert_ends(&their_client, &what);
        drop(their_server);

        drop(proxy);
        reach(&lan, &family, &ours, &what);
        exchange(&client, &server);
        let proxy = KubeProxy::start(mode, family.service, their_address);
        reach(&lan, &family, &ours, &what);
        assert_eq!(proxy.flows(), 0, "{what}: it came second");
        exchange(&client, &server);

        lan.services.detach_interface(index("lan0"));
        reach(&lan, &family, &theirs, &what);
        // Late words of the connections that were closed count too.
        assert!(proxy.flows() >= 1, "{what}: we are gone");
        assert_ends(&client, &what);
        drop(server);
    }
}

#[test]
fn datagrams_of_one_port_go_to_whoever_leads_now() {
    for (mode, family) in MODES
        .iter()
        .flat_map(|&mode| families().map(|it| (mode, it)))
    {
        let mut lan = Lan::new();
        let (ours, our_address) = server_socket(&lan, &family);
        let (theirs, their_address) = server_socket(&lan, &family);
        let client = client_socket(&lan, &family);
        lan.services.detach_interface(index("lan0"));
        lan.serve(family.service, &[our_address]);
        let proxy = KubeProxy::start(mode, family.service, their_address);
        ask(&client, &theirs, &family, 9);

        let attached = lan
            .services
            .attach_interface(index("lan0"), LinkHeader::Ethernet);
        attached.unwrap();
        ask(&client, &ours, &family, 9);
        drop(proxy);
        ask(&client, &ours, &family, 9);
        let _proxy = KubeProxy::start(mode, family.service, their_address);
        ask(&client, &ours, &family, 9);

        lan.services.detach_interface(index("lan0"));
        ask(&client, &theirs, &family, 9);
    }
}
