//! What holds for clients from outside alone: `externalTrafficPolicy: Local` and
//! `loadBalancerSourceRanges`, at every kind of address.

use std::{
    collections::BTreeMap,
    io,
    net::{IpAddr, SocketAddr, TcpListener, TcpStream},
    time::Duration,
};

use ebpf_abi::PacketCounter;
use ebpf_loader::{Backends, Clients, Frontend, Protocol, Ranges};

use crate::{
    lan::{Family, Lan, families},
    sockets::{ask, client_socket, connect, connected, listener, server_socket, transfer},
};

/// A client that is dropped has sent its first packet, and once again, by then.
const DROPPED: Duration = Duration::from_millis(1_500);

fn frontend(clients: Clients, asked: SocketAddr, protocol: Protocol) -> Frontend {
    Frontend {
        clients,
        address: asked.ip(),
        port: asked.port(),
        protocol,
    }
}

/// Where all are led, and where clients from outside are.
fn serve(lan: &mut Lan, asked: SocketAddr, all: &[SocketAddr], outside: Option<Backends>) {
    let mut desired = BTreeMap::new();
    for protocol in [Protocol::Tcp, Protocol::Udp] {
        desired.insert(frontend(Clients::All, asked, protocol), all.to_vec().into());
        if let Some(outside) = &outside {
            let frontend = frontend(Clients::Outside, asked, protocol);
            desired.insert(frontend, outside.clone());
        }
    }
    lan.services.apply(&desired).unwrap();
}

fn in_ranges(endpoints: &[SocketAddr], ranges: &[(IpAddr, u8)]) -> Option<Backends> {
    Some(Backends {
        ranges: Some(Ranges::from_iter(ranges.iter().copied())),
        ..endpoints.to_vec().into()
    })
}

/// Neither connected nor refused, and counted as `counter`.
#[track_caller]
fn is_dropped(lan: &Lan, family: &Family, counter: PacketCounter) {
    let before = lan.counted(counter);
    let error = lan
        .in_client(|| TcpStream::connect_timeout(&family.service, DROPPED))
        .unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::TimedOut, "{error}");
    client_socket(lan, family)
        .send_to(b"?", family.service)
        .unwrap();
    assert!(lan.counted(counter) >= before + 3, "SYN, SYN again, UDP");
}

#[test]
fn they_are_led_by_a_list_of_their_own_as_themselves() {
    let mut lan = Lan::new();
    for family in &families() {
        let (here, here_at) = listener(&lan, family);
        let (far, far_at) = listener(&lan, family);
        serve(
            &mut lan,
            family.service,
            &[far_at],
            Some(vec![here_at].into()),
        );
        for _ in 0..8 {
            let (client, server) = connected(&lan, family, &here);
            transfer(&client, &server, 1_000);
            transfer(&server, &client, 1_000);
        }
        let (udp, udp_at) = server_socket(&lan, family);
        serve(
            &mut lan,
            family.service,
            &[far_at],
            Some(vec![udp_at].into()),
        );
        ask(&client_socket(&lan, family), &udp, family, 100);
        // The same for all again.
        serve(&mut lan, family.service, &[far_at], None);
        connected(&lan, family, &far);
    }
}

#[test]
fn without_an_endpoint_here_they_are_dropped_and_without_any_refused() {
    let mut lan = Lan::new();
    for family in &families() {
        let (far, far_at) = listener(&lan, family);
        serve(&mut lan, family.service, &[far_at], None);
        let (client, server) = connected(&lan, family, &far);
        serve(
            &mut lan,
            family.service,
            &[far_at],
            Some(Backends::default()),
        );
        is_dropped(&lan, family, PacketCounter::NotLocal);
        transfer(&client, &server, 1_000); // An open flow stays.
        serve(&mut lan, family.service, &[], Some(Backends::default()));
        let error = connect(&lan, family).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
    }
}

#[test]
fn only_those_in_the_source_ranges_are_served() {
    let mut lan = Lan::new();
    for family in &families() {
        let (server, at) = listener(&lan, family);
        let elsewhere: [(IpAddr, u8); 2] = [
            ("192.168.6.0".parse().unwrap(), 24),
            ("fd06::".parse().unwrap(), 32),
        ];
        let [own_v4, own_v6]: [(IpAddr, u8); 2] = [
            ("192.168.7.0".parse().unwrap(), 30),
            ("fd07::".parse().unwrap(), 126),
        ];
        let (own, other) = match family.client {
            IpAddr::V4(_) => (own_v4, own_v6),
            IpAddr::V6(_) => (own_v6, own_v4),
        };
        let alone = (family.client, if own == own_v4 { 32 } else { 128 });
        for ranges in [&[own, elsewhere[0]][..], &[elsewhere[1], alone]] {
            serve(&mut lan, family.service, &[at], in_ranges(&[at], ranges));
            connected(&lan, family, &server);
        }
        let (client, open) = connected(&lan, family, &server);
        for ranges in [&elsewhere[..], &[other], &[]] {
            serve(&mut lan, family.service, &[at], in_ranges(&[at], ranges));
            is_dropped(&lan, family, PacketCounter::NotInRange);
        }
        transfer(&client, &open, 1_000); // An open flow stays.
        serve(&mut lan, family.service, &[at], in_ranges(&[], &[own]));
        is_dropped(&lan, family, PacketCounter::NotLocal);
        serve(&mut lan, family.service, &[at], None);
        connected(&lan, family, &server);
    }
}

/// The gateway's own address with a node port, an endpoint behind it, and one that is itself.
#[test]
fn a_node_port_leads_elsewhere_or_to_the_node_itself() {
    let mut lan = Lan::new();
    for family in &families() {
        let own: IpAddr = match family.client {
            IpAddr::V4(_) => "192.168.7.1".parse().unwrap(),
            IpAddr::V6(_) => "fd07::1".parse().unwrap(),
        };
        let inside: IpAddr = match family.client {
            IpAddr::V4(_) => "10.0.9.1".parse().unwrap(),
            IpAddr::V6(_) => "fd00:9::1".parse().unwrap(),
        };
        let family = &Family {
            service: SocketAddr::new(own, 30_080),
            ..*family
        };
        let (behind, behind_at) = listener(&lan, family);
        let itself = TcpListener::bind((inside, 0)).unwrap();
        let itself_at = itself.local_addr().unwrap();
        serve(&mut lan, family.service, &[behind_at], None);
        connected(&lan, family, &behind);
        let here = Some(vec![itself_at].into());
        serve(&mut lan, family.service, &[behind_at, itself_at], here);
        for _ in 0..8 {
            let (client, server) = connected(&lan, family, &itself);
            transfer(&client, &server, 1_000);
            transfer(&server, &client, 1_000);
        }
    }
}
