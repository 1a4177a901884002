//! Beside kube-proxy on the same node.

use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};

use ebpf_loader::Protocol;

use crate::{
    kube_proxy::{KubeProxy, MODES},
    lab::{
        self, Lab, accepted, add_to_loopback, addresses, ask, ask_connected, exchange, tcp_servers,
        udp_servers,
    },
    netns::ip,
};

/// The service, and where its endpoints are.
const FAMILIES: [(&str, &str); 2] = [("10.96.0.1:80", "10.0.0.1"), ("[fd00:96::1]:80", "fd00::1")];

/// kube-proxy's rules see the service's address only where there is a way to it.
fn route(service: SocketAddr, endpoints: &str) {
    add_to_loopback(endpoints.parse().unwrap());
    ip(&["route", "add", &service.ip().to_string(), "dev", "lo"]);
}

/// Both ends of a new connection to the service, and which server has it.
fn connect(service: SocketAddr, servers: &[TcpListener]) -> (usize, [TcpStream; 2]) {
    let client = TcpStream::connect(service).unwrap();
    let (server, other) = accepted(servers);
    (server, [client, other])
}

#[test]
fn kube_proxy_may_come_first_restart_and_stay_behind() {
    const OURS: usize = 0;
    const THEIRS: usize = 1;
    for (mode, (service, endpoints)) in MODES.iter().flat_map(|&mode| FAMILIES.map(|it| (mode, it)))
    {
        let mut lab = Lab::new();
        let service: SocketAddr = service.parse().unwrap();
        route(service, endpoints);
        let servers = tcp_servers(
            &SocketAddr::new(endpoints.parse().unwrap(), 0).to_string(),
            2,
        );
        let at = addresses(&servers, TcpListener::local_addr);
        let connect = || connect(service, &servers);
        let what = format!("{mode:?}, {service}");

        let proxy = KubeProxy::start(mode, service, at[THEIRS]);
        let (server, [their_client, their_server]) = connect();
        assert_eq!((server, proxy.flows()), (THEIRS, 1), "{what}: alone");

        lab.apply(&[(service, Protocol::Tcp, &[at[OURS]])]);
        let (server, [client, ours]) = connect();
        assert_eq!((server, proxy.flows()), (OURS, 1), "{what}: we came second");
        exchange(&their_client, &their_server);

        drop(proxy);
        assert_eq!(connect().0, OURS, "{what}: it is gone");
        exchange(&client, &ours);
        let proxy = KubeProxy::start(mode, service, at[THEIRS]);
        assert_eq!(
            (connect().0, proxy.flows()),
            (OURS, 0),
            "{what}: it came second"
        );
        exchange(&client, &ours);

        drop(lab.take_services());
        assert_eq!(
            (connect().0, proxy.flows()),
            (THEIRS, 1),
            "{what}: we are gone"
        );
        exchange(&client, &ours);
    }
}

#[test]
fn datagrams_are_ours_while_we_are_there_and_a_connected_socket_s_stay_whatever_kube_proxy_does() {
    const OURS: usize = 0;
    const THEIRS: usize = 1;
    for (mode, (index, (_, endpoints))) in MODES
        .iter()
        .flat_map(|&mode| FAMILIES.into_iter().enumerate().map(move |it| (mode, it)))
    {
        let mut lab = Lab::new();
        let family = &lab::FAMILIES[index];
        let service = family.asked();
        route(service, endpoints);
        let any_port = SocketAddr::new(endpoints.parse().unwrap(), 0);
        let servers = udp_servers(&any_port.to_string(), 2);
        let at = addresses(&servers, UdpSocket::local_addr);
        let connected = || {
            let client = family.client();
            client.connect(service).unwrap();
            client
        };
        let what = format!("{mode:?}, {service}");

        let proxy = KubeProxy::start(mode, service, at[THEIRS]);
        let (client, theirs) = (family.client(), connected());
        assert_eq!(ask(&client, family, &servers), THEIRS, "{what}: alone");
        assert_eq!(ask_connected(&theirs, &servers).0, THEIRS, "{what}: alone");

        lab.apply(&[(service, Protocol::Udp, &[at[OURS]])]);
        let ours = connected();
        let go_on = |why| {
            assert_eq!(ask(&client, family, &servers), OURS, "{what}: {why}");
            assert_eq!(ask_connected(&ours, &servers).0, OURS, "{what}: {why}");
        };
        go_on("we came second");
        assert_eq!(
            ask_connected(&theirs, &servers).0,
            THEIRS,
            "{what}: it was open"
        );
        drop(proxy);
        go_on("it is gone");
        let _proxy = KubeProxy::start(mode, service, at[THEIRS]);
        go_on("it came second");

        drop(lab.take_services());
        assert_eq!(
            ask(&client, family, &servers),
            THEIRS,
            "{what}: we are gone"
        );
        assert_eq!(
            ask_connected(&ours, &servers).0,
            OURS,
            "{what}: we are gone"
        );
    }
}
