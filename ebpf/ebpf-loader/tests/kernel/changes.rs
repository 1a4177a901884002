//! Changes alone, told by somebody who follows them.

use std::{
    collections::BTreeMap,
    io,
    net::{SocketAddr, TcpListener, TcpStream},
    time::Duration,
};

use ebpf_abi::{LIST_ENDPOINTS_MAX, SocketAddress};
use ebpf_loader::{Backends, Clients, Frontend, Protocol};

use crate::lab::{FAMILIES, Lab, accepted, addresses, tcp_servers};

/// How many lists are written for a change, whatever else is there.
#[test]
fn changes_alone_are_applied_without_a_look_at_the_rest() {
    let mut lab = Lab::new();
    let servers = tcp_servers(FAMILIES[0].loopback, 2);
    let at = addresses(&servers, TcpListener::local_addr);
    let frontend = |number: u8| Frontend {
        clients: Clients::All,
        address: [10, 96, 7, number].into(),
        port: 80,
        protocol: Protocol::Tcp,
    };
    let to = |index: usize| Some(Backends::from(vec![at[index]]));
    let all: BTreeMap<_, _> = (0..200).map(|number| (frontend(number), to(0))).collect();
    let report = lab.services().apply_changes(&all).unwrap().unwrap();
    assert_eq!(
        (report.written, report.removed, report.unchanged),
        (200, 0, 0)
    );
    let changes = [
        (frontend(1), to(1)),
        (frontend(2), to(0)),
        (frontend(3), None),
        (frontend(201), None),
        (frontend(202), Some(Backends::default())),
    ];
    let report = lab
        .services()
        .apply_changes(&BTreeMap::from(changes))
        .unwrap()
        .unwrap();
    assert_eq!(
        (report.written, report.removed, report.unchanged),
        (2, 1, 1)
    );
    let connected = |number| {
        let asked = SocketAddr::new(frontend(number).address, 80);
        TcpStream::connect_timeout(&asked, Duration::from_secs(1)).map(drop)
    };
    connected(1).unwrap();
    assert_eq!(accepted(&servers).0, 1);
    connected(2).unwrap();
    assert_eq!(accepted(&servers).0, 0);
    assert_eq!(
        connected(202).unwrap_err().kind(),
        io::ErrorKind::ConnectionRefused
    );
    assert_eq!(lab.map_entries::<SocketAddress, u64>("hf_frontends"), 200);
    assert_eq!(lab.map_entries::<u64, SocketAddress>("hf_endpoints"), 199);
}

#[test]
fn changes_that_do_not_fit_ask_for_everything() {
    let mut lab = Lab::new();
    let list = |count: u16| {
        let endpoints = (0..count).map(|port| SocketAddr::from(([10, 0, 0, 1], port)));
        Backends::from(endpoints.collect::<Vec<_>>())
    };
    let frontend = |port| Frontend {
        clients: Clients::All,
        address: [10, 96, 7, 1].into(),
        port,
        protocol: Protocol::Tcp,
    };
    let mut all = BTreeMap::from([(frontend(1), list(1))]);
    let services = lab.services();
    services.apply(&all).unwrap();
    // A list too long: nothing is changed.
    let long = list(u16::try_from(LIST_ENDPOINTS_MAX).unwrap() + 1);
    let change = BTreeMap::from([(frontend(2), Some(long.clone()))]);
    assert_eq!(services.apply_changes(&change).unwrap(), None);
    all.insert(frontend(2), long);
    let report = services.apply(&all).unwrap();
    assert_eq!((report.written, report.left_out.endpoints), (1, 1));
    // Something is left out: whoever goes may make room for it.
    let change = BTreeMap::from([(frontend(1), None)]);
    assert_eq!(services.apply_changes(&change).unwrap(), None);
    all.insert(frontend(2), list(3));
    services.apply(&all).unwrap();
    let report = services.apply_changes(&change).unwrap().unwrap();
    assert_eq!((report.written, report.removed), (0, 1));
    // An IPv6-mapped frontend may be one that is there already.
    let mapped = Frontend {
        address: "::ffff:10.96.7.1".parse().unwrap(),
        ..frontend(2)
    };
    let change = BTreeMap::from([(mapped, Some(list(1)))]);
    assert_eq!(services.apply_changes(&change).unwrap(), None);
}
