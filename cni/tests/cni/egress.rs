//! What pods send out of the mesh leaves as the node's: real sockets, to a machine that `ptp` joined to the node.

use std::{
    fs,
    net::{IpAddr, SocketAddr, TcpListener, UdpSocket},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use mesh_api::cni::NodeNetwork;
use serde_json::{Value, json};

use crate::harness::{Machine, NETWORK, Pod, addresses, inside, run};

/// What the node has towards the world.
const NODE: [&str; 2] = ["198.51.100.1", "2001:db8:51::1"];

fn world_of(machine: &Machine, name: &str) -> Result<(Pod, Vec<IpAddr>)> {
    inside(&machine.namespace, || {
        for family in ["ipv4", "ipv6"] {
            fs::write(format!("/proc/sys/net/{family}/conf/all/forwarding"), "1")?;
        }
        Ok(())
    })?;
    let world = Pod::new(name)?;
    let config = json!({
        "cniVersion": "1.0.0",
        "name": NETWORK,
        "type": "ptp",
        "ipam": {
            "type": "host-local",
            "dataDir": machine.state_dir().join("host-local"),
            "ranges": [[{"subnet": "198.51.100.0/24"}], [{"subnet": "2001:db8:51::/64"}]],
            "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}],
        },
    });
    let made = machine.call_stock("ptp", "ADD", &world, &config)?.done();
    // Until it knows that nobody else has its new address, the node sends from another one.
    for _ in 0..100 {
        if machine.ip("-6 address show tentative")?.is_empty() {
            break;
        }
        thread::sleep(Duration::from_millis(50));
    }
    Ok((world, addresses(&made)))
}

fn masquerading(machine: &Machine) -> Value {
    machine.config_with("masquerade", json!(true))
}

/// As whom `from` is seen at `to`, by TCP and by UDP.
fn seen(from: &Pod, to: &Pod, at: IpAddr) -> Result<IpAddr> {
    let limit = Some(Duration::from_secs(5));
    let listener: TcpListener = to.listen(at)?;
    let client = from.connect(listener.local_addr()?)?;
    let (_, by_tcp) = listener.accept()?;
    drop(client);
    let unspecified: IpAddr = match at {
        IpAddr::V4(_) => [0; 4].into(),
        IpAddr::V6(_) => [0; 16].into(),
    };
    let bind = |pod: &Pod, ip: IpAddr| inside(&pod.namespace, || Ok(UdpSocket::bind((ip, 0))?));
    let (client, server) = (bind(from, unspecified)?, bind(to, at)?);
    server.set_read_timeout(limit)?;
    client.set_read_timeout(limit)?;
    client.send_to(b"question", server.local_addr()?)?;
    let mut heard = [0; 8];
    let (_, by_udp): (_, SocketAddr) = server.recv_from(&mut heard)?;
    server.send_to(b"answer", by_udp)?;
    client.recv(&mut heard).context("no answer")?;
    ensure!(by_tcp.ip() == by_udp.ip(), "{by_tcp} {by_udp}");
    Ok(by_tcp.ip())
}

fn nft(machine: &Machine, words: &[&str]) -> Result<String> {
    inside(&machine.namespace, || run("nft", words))
}

fn tables(machine: &Machine) -> Result<usize> {
    Ok(nft(machine, &["list", "tables"])?
        .matches("holdfast-pods")
        .count())
}

#[test]
fn pods_are_the_node_to_the_world_and_themselves_in_the_mesh() -> Result<()> {
    let machine = Machine::new()?;
    // As another one's, kube-proxy's for one: its rules stay, and count.
    nft(
        &machine,
        &[
            "add table ip other; add chain ip other c { type nat hook postrouting priority 100; }; \
                     add rule ip other c meta mark 0x4000 masquerade",
        ],
    )?;
    let (world, at) = world_of(&machine, "world")?;
    let (plain, one, two) = (Pod::new("plain")?, Pod::new("one")?, Pod::new("two")?);
    let mut own = Vec::new();
    let configs = [
        machine.config(),
        masquerading(&machine),
        masquerading(&machine),
    ];
    for (number, (pod, config)) in [&plain, &one, &two].into_iter().zip(&configs).enumerate() {
        let result = machine.call("ADD", pod, config)?.done();
        own.push(addresses(&result));
        if number == 0 {
            for (&at, &own) in at.iter().zip(&own[0]) {
                assert_eq!(seen(pod, &world, at)?, own, "nobody asked for it");
            }
        }
        machine.check(pod, &result)?.done();
    }
    assert_eq!(tables(&machine)?, 2);
    for (family, &at) in at.iter().enumerate() {
        for pod in [&one, &two, &plain] {
            let node: IpAddr = NODE[family].parse()?;
            assert_eq!(seen(pod, &world, at)?, node, "{}", pod.container);
        }
        assert_eq!(seen(&one, &two, own[2][family])?, own[1][family]);
        // Who comes in is seen as he is, and answered.
        assert_eq!(seen(&world, &one, own[1][family])?, at);
    }
    // Once more: nothing is written.
    let before = nft(&machine, &["-a", "list", "ruleset"])?;
    machine.call("ADD", &one, &configs[1])?.done();
    assert_eq!(nft(&machine, &["-a", "list", "ruleset"])?, before);
    machine.gc(&[&one])?.done();
    assert_eq!(tables(&machine)?, 2, "one pod is left");
    machine.gc(&[])?.done();
    assert_eq!(tables(&machine)?, 0);
    assert!(nft(&machine, &["list", "tables"])?.contains("table ip other"));
    Ok(())
}

#[test]
fn what_is_of_the_mesh_is_followed_as_the_agent_says_it() -> Result<()> {
    let machine = Machine::new()?;
    let (world, at) = world_of(&machine, "world")?;
    let (one, two) = (Pod::new("one")?, Pod::new("two")?);
    let own = addresses(&machine.call("ADD", &one, &masquerading(&machine))?.done());
    let node: IpAddr = NODE[0].parse()?;
    assert_eq!(seen(&one, &world, at[0])?, node);
    let says = |mesh_interface: &str, behind: &[&str]| -> Result<()> {
        let behind = behind.iter().map(|net| net.parse());
        machine.set_network(&NodeNetwork {
            ipv4: Some("10.77.0.0/24".parse()?),
            ipv6: Some("fd77::/64".parse()?),
            mtu_bytes: 1_380,
            mesh_interface: Some(mesh_interface.to_owned()),
            behind: behind.collect::<Result<_, _>>()?,
        })?;
        machine.call("ADD", &two, &masquerading(&machine))?.done();
        Ok(())
    };
    // A LAN of the mesh behind this node, in one family.
    says(
        "holdfast0",
        &["10.77.0.0/24", "fd77::/64", "198.51.100.0/24"],
    )?;
    assert_eq!(seen(&one, &world, at[0])?, own[0]);
    assert_eq!(seen(&one, &world, at[1])?, NODE[1].parse::<IpAddr>()?);
    // What leads to the mesh.
    let route: Value = serde_json::from_str(&machine.ip(&format!("-j route get {}", at[0]))?)?;
    let by = route[0]["dev"].as_str().context("no interface")?.to_owned();
    says(&by, &["10.77.0.0/24", "fd77::/64"])?;
    for (&at, &own) in at.iter().zip(&own) {
        assert_eq!(seen(&one, &world, at)?, own);
    }
    says("holdfast0", &[])?;
    assert_eq!(seen(&one, &world, at[0])?, node);
    Ok(())
}

#[test]
fn many_pods_at_once_make_one_table_and_purging_takes_it() -> Result<()> {
    const AT_ONCE: usize = 20;
    let machine = Machine::new()?;
    let pods = (0..AT_ONCE).map(|number| Pod::new(&format!("c{number}")));
    let pods = pods.collect::<Result<Vec<_>>>()?;
    let config = masquerading(&machine);
    thread::scope(|scope| {
        let (machine, config) = (&machine, &config);
        let adds = pods
            .iter()
            .map(|pod| scope.spawn(move || machine.call("ADD", pod, config)));
        for add in adds.collect::<Vec<_>>() {
            add.join().unwrap().unwrap().done();
        }
    });
    let (world, at) = world_of(&machine, "world")?;
    for pod in [&pods[0], &pods[AT_ONCE - 1]] {
        assert_eq!(seen(pod, &world, at[0])?, NODE[0].parse::<IpAddr>()?);
    }
    assert_eq!(tables(&machine)?, 2);
    let folder = machine.state_dir().display().to_string();
    let (conf, bin) = (format!("{folder}/conf"), format!("{folder}/bin"));
    let words = [
        "uninstall",
        "--purge",
        "--conf-dir",
        &conf,
        "--bin-dir",
        &bin,
        "--state-dir",
        &folder,
    ];
    let program = env!("CARGO_BIN_EXE_mesh-cni");
    let said = inside(&machine.namespace, || run(program, &words))?;
    ensure!(said.contains("holdfast-pods"), "{said}");
    assert_eq!(tables(&machine)?, 0);
    assert!(machine.ports()?.is_empty());
    Ok(())
}
