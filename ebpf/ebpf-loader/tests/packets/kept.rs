//! Flows through a gateway whose process ends, and another takes over.

use std::{
    collections::BTreeMap,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use aya::programs::{SchedClassifier, TcAttachType};
use ebpf_abi::PacketCounter;
use ebpf_loader::{BPFFS, Clients, Frontend, LinkHeader, Pins, Protocol, Services};

use crate::{
    bpffs::new_bpffs,
    lan::{Lan, families, index},
    netns::ip,
    sockets::{PATIENCE, connected, listener, transfer},
};

/// Each way.
const TRANSFER_BYTES: usize = 1 << 20;

/// A gateway without programs, and a bpffs.
fn new_lan() -> Lan {
    let mut lan = Lan::new();
    assert!(lan.services.detach_interface(index("lan0")));
    new_bpffs();
    lan
}

/// The next process: it has taken over, and attached nothing yet.
fn take_over(lan: &Lan) -> Services {
    let pins = Pins::open(Path::new(BPFFS), lan.cgroup()).unwrap();
    let taken = Services::take_over(lan.cgroup(), Some(pins), true);
    taken.unwrap_or_else(|error| panic!("{error}\n{error:?}"))
}

/// Numbers of the programs that packets meet on their way in by the clients' interface.
fn requests_programs() -> Vec<u32> {
    let (_, programs) = SchedClassifier::query_tcx("lan0", TcAttachType::Ingress).unwrap();
    programs.iter().map(|program| program.id()).collect()
}

/// The kernel lets go of what was pinned in the background.
fn becomes_empty(interface: &str) {
    let on = |direction| {
        let (_, programs) = SchedClassifier::query_tcx(interface, direction).unwrap();
        programs.len()
    };
    let began = Instant::now();
    while on(TcAttachType::Ingress) + on(TcAttachType::Egress) > 0 {
        assert!(began.elapsed() < PATIENCE, "programs stay on {interface}");
        thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn flows_keep_their_endpoint_across_a_restart_and_are_led_while_nobody_runs() {
    let lan = new_lan();
    let families = families();
    let servers = families.map(|family| [listener(&lan, &family), listener(&lan, &family)]);
    let desired = |which: usize| -> BTreeMap<_, _> {
        let both = families.iter().zip(&servers);
        let services = both.map(|(family, servers)| {
            let frontend = Frontend {
                clients: Clients::All,
                address: family.service.ip(),
                port: family.service.port(),
                protocol: Protocol::Tcp,
            };
            (frontend, vec![servers[which].1].into())
        });
        services.collect()
    };
    let lan0 = index("lan0");
    let mut first = take_over(&lan);
    first.apply(&desired(0)).unwrap();
    first.attach().unwrap();
    assert!(first.attach_interface(lan0, LinkHeader::Ethernet).unwrap());
    let before = requests_programs();
    let both = families.iter().zip(&servers);
    let flows: Vec<_> = both
        .map(|(family, servers)| connected(&lan, family, &servers[0].0))
        .collect();
    let go_on = || {
        for (client, server) in &flows {
            transfer(client, server, TRANSFER_BYTES);
            transfer(server, client, TRANSFER_BYTES);
        }
    };
    drop(first);
    go_on();
    assert_eq!(requests_programs(), before);
    let met: Vec<_> = families.iter().zip(&servers).collect();
    for (family, servers) in &met {
        drop(connected(&lan, family, &servers[0].0)); // New ones too.
    }

    let mut second = take_over(&lan);
    second.apply(&desired(1)).unwrap();
    second.attach().unwrap();
    go_on();
    assert!(second.attach_interface(lan0, LinkHeader::Ethernet).unwrap());
    assert!(!second.attach_interface(lan0, LinkHeader::Ethernet).unwrap());
    go_on();
    let after = requests_programs();
    assert_eq!(after.len(), before.len());
    assert_ne!(after, before, "the old program was not replaced");
    for (family, servers) in met {
        drop(connected(&lan, family, &servers[1].0));
    }
    // What was counted goes on as well.
    let counted = second.packet_counters().unwrap();
    assert_eq!(counted[&PacketCounter::FlowOpened], 6);
}

#[test]
fn an_interface_that_is_not_wanted_any_more_or_came_anew_is_not_taken_over() {
    let lan = new_lan();
    let mut first = take_over(&lan);
    first.attach().unwrap();
    let lan0 = index("lan0");
    first.attach_interface(lan0, LinkHeader::Ethernet).unwrap();
    let net0 = index("net0");
    first.attach_interface(net0, LinkHeader::Ethernet).unwrap();
    drop(first);
    assert_eq!(requests_programs().len(), 1);
    // Another interface with the index of one whose programs have a name still.
    ip(&["link", "del", "net0"]);
    let number = net0.to_string();
    ip(&[
        "link", "add", "net0", "index", &number, "type", "veth", "peer", "name", "net1",
    ]);
    assert_eq!(index("net0"), net0);
    let mut second = take_over(&lan);
    second.attach().unwrap();
    assert!(second.attach_interface(net0, LinkHeader::Ethernet).unwrap());
    second.detach_others();
    becomes_empty("lan0");
    let (_, there) = SchedClassifier::query_tcx("net0", TcAttachType::Ingress).unwrap();
    assert_eq!(there.len(), 1);
    assert!(second.detach_interface(net0));
    becomes_empty("net0");
}
