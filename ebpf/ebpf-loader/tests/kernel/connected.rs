//! Which connected UDP sockets are known to be led somewhere.

use std::net::{IpAddr, SocketAddr, UdpSocket};

use ebpf_loader::{Clients, Frontend, Protocol};
use rustix::net::sockopt::socket_cookie;

use crate::lab::{FAMILIES, Lab, addresses, udp_servers};

/// An address as a socket names it that can also ask for `asked`.
fn reach(address: SocketAddr, asked: SocketAddr) -> SocketAddr {
    match (address.ip(), asked.ip()) {
        (IpAddr::V4(v4), IpAddr::V6(_)) => {
            SocketAddr::new(v4.to_ipv6_mapped().into(), address.port())
        }
        _ => address,
    }
}

#[test]
fn a_connected_udp_socket_is_known_by_its_number_until_it_is_connected_elsewhere() {
    for family in &FAMILIES {
        let mut lab = Lab::new();
        let servers = udp_servers(family.loopback, 2);
        let at = addresses(&servers, UdpSocket::local_addr);
        let asked = family.asked();
        let frontend = Frontend {
            clients: Clients::All,
            address: asked.ip().to_canonical(),
            port: asked.port(),
            protocol: Protocol::Udp,
        };
        lab.apply(&[(asked, Protocol::Udp, &at[..1])]);
        let [led, direct, unconnected] = [(); 3].map(|()| family.client());
        led.connect(asked).unwrap();
        // The same address, without the service: not ours.
        direct.connect(reach(at[0], asked)).unwrap();
        unconnected.send_to(b"?", asked).unwrap();
        let known = |lab: &mut Lab| lab.services().connected().unwrap();
        let cookie = socket_cookie(&led).unwrap();
        let is_known = known(&mut lab);
        assert_eq!(is_known.len(), 1, "{}: {is_known:?}", family.name);
        assert_eq!(is_known[&cookie], (frontend, at[0]), "{}", family.name);

        lab.apply(&[(asked, Protocol::Udp, &at[1..])]);
        assert_eq!(known(&mut lab)[&cookie].1, at[0], "it did not move");
        led.connect(asked).unwrap();
        assert_eq!(known(&mut lab)[&cookie].1, at[1], "connected again");
        lab.services().forget_connected(cookie).unwrap();
        assert!(known(&mut lab).is_empty());
        lab.services().forget_connected(cookie).unwrap(); // Twice is no error.
        led.connect(asked).unwrap();
        led.connect(reach(at[0], asked)).unwrap();
        assert!(
            known(&mut lab).is_empty(),
            "{}: connected elsewhere",
            family.name
        );
    }
}
