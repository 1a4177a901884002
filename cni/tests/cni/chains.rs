//! With the stock plug-ins of Debian's `containernetworking-plugins`: behind `bridge`, and before `portmap`.

use std::{fs, net::SocketAddr};

use anyhow::Result;
use mesh_api::cni::read_attachments;
use serde_json::{Value, json};

use crate::harness::{Machine, NETWORK, Pod, addresses};

fn bridge(machine: &Machine) -> Value {
    json!({
        "cniVersion": "1.0.0",
        "name": NETWORK,
        "type": "bridge",
        "bridge": "cni0",
        "isGateway": true,
        "ipam": {
            "type": "host-local",
            "dataDir": machine.state_dir().join("host-local"),
            "ranges": [[{"subnet": "10.88.0.0/24"}]],
            "routes": [{"dst": "0.0.0.0/0"}],
        },
    })
}

/// Ours behind another one.
fn behind(machine: &Machine, previous: &Value) -> Value {
    json!({
        "cniVersion": "1.0.0",
        "name": NETWORK,
        "type": "mesh-cni",
        "chained": true,
        "stateDir": machine.state_dir(),
        "prevResult": previous,
    })
}

#[test]
fn behind_the_stock_bridge_it_records_and_changes_nothing() -> Result<()> {
    let machine = Machine::new()?;
    fs::remove_file(machine.state_dir().join("network.json"))?; // Nobody asks for it.
    let pod = Pod::new("one")?;
    let made = machine
        .call_stock("bridge", "ADD", &pod, &bridge(&machine))?
        .done();
    let before = (machine.ip("address show")?, pod.ip("address show")?);
    let passed = machine.call("ADD", &pod, &behind(&machine, &made))?.done();
    assert_eq!(passed, made);
    assert_eq!(
        (machine.ip("address show")?, pod.ip("address show")?),
        before
    );

    let attachments = machine.attachments()?;
    let [attachment] = attachments.as_slice() else {
        panic!("{attachments:?}");
    };
    assert_eq!(attachment.id, pod.id());
    assert_eq!(attachment.addresses, addresses(&made));
    let host = attachment.host.clone().unwrap();
    // The bridge is the first interface of its result, the veth the second one.
    assert_eq!(made["interfaces"][1]["name"], host.name);
    let link: Value = serde_json::from_str(&machine.ip(&format!("-j link show {}", host.name))?)?;
    assert_eq!(link[0]["ifindex"], host.index);

    machine.call("ADD", &pod, &behind(&machine, &made))?.done();
    assert_eq!(machine.attachments()?.len(), 1);
    machine
        .call("CHECK", &pod, &behind(&machine, &made))?
        .done();
    machine.ip(&format!("link set {} down", host.name))?;
    assert_eq!(
        machine
            .call("CHECK", &pod, &behind(&machine, &made))?
            .code(),
        101
    );

    machine.call("DEL", &pod, &behind(&machine, &made))?.done();
    assert!(machine.attachments()?.is_empty());
    assert!(
        pod.ip("link show eth0").is_ok(),
        "the interface is the bridge's"
    );
    machine
        .call_stock("bridge", "DEL", &pod, &bridge(&machine))?
        .done();
    machine.call("DEL", &pod, &behind(&machine, &made))?.done();
    Ok(())
}

#[test]
fn chained_it_tells_an_interface_that_is_no_veth_and_gc_forgets_pods() -> Result<()> {
    let machine = Machine::new()?;
    let (one, two) = (Pod::new("one")?, Pod::new("two")?);
    one.ip("link add eth0 type bridge")?;
    let result = json!({
        "cniVersion": "1.0.0",
        "interfaces": [{"name": "eth0", "sandbox": one.path()}],
        "ips": [],
    });
    assert_eq!(
        machine
            .call("ADD", &one, &behind(&machine, &result))?
            .code(),
        7
    );
    let missing = Pod::new("missing")?;
    assert_eq!(
        machine
            .call("ADD", &missing, &behind(&machine, &result))?
            .code(),
        7
    );
    let made = machine
        .call_stock("bridge", "ADD", &two, &bridge(&machine))?
        .done();
    machine.call("ADD", &two, &behind(&machine, &made))?.done();
    machine.gc(&[&two])?.done();
    assert_eq!(machine.attachments()?.len(), 1);
    machine.gc(&[])?.done();
    assert!(machine.attachments()?.is_empty());
    assert!(two.ip("link show eth0").is_ok());
    let folder = mesh_api::cni::attachments_dir(machine.state_dir())?;
    assert!(read_attachments(&folder)?.unreadable.is_empty());
    Ok(())
}

#[test]
fn a_host_port_of_the_stock_portmap_leads_to_a_pod_of_ours() -> Result<()> {
    let machine = Machine::new()?;
    // A machine outside: its packets pass the node's rules for what comes in.
    let outside = Pod::new("outside")?;
    let line = "link add up0 type veth peer name eth0 netns";
    machine.ip(&format!("{line} {}", outside.path()))?;
    machine.ip("address add 192.0.2.1/24 dev up0")?;
    machine.ip("link set up0 up")?;
    outside.ip("address add 192.0.2.2/24 dev eth0")?;
    outside.ip("link set eth0 up")?;
    // As any node of Kubernetes has it.
    crate::harness::inside(&machine.namespace, || {
        Ok(fs::write("/proc/sys/net/ipv4/ip_forward", "1")?)
    })?;

    let pod = Pod::new("web")?;
    let result = machine
        .call(
            "ADD",
            &pod,
            &machine.config_with("cniVersion", json!("1.0.0")),
        )?
        .done();
    let door = pod.listen(addresses(&result)[0])?;
    let portmap = json!({
        "cniVersion": "1.0.0",
        "name": NETWORK,
        "type": "portmap",
        "capabilities": {"portMappings": true},
        "runtimeConfig": {"portMappings": [
            {"hostPort": 8080, "containerPort": door.local_addr()?.port(), "protocol": "tcp"},
        ]},
        "prevResult": result,
    });
    let passed = machine.call_stock("portmap", "ADD", &pod, &portmap)?.done();
    assert_eq!(passed["ips"], result["ips"]);
    let to: SocketAddr = "192.0.2.1:8080".parse()?;
    outside.connect(to)?;
    machine.call_stock("portmap", "DEL", &pod, &portmap)?.done();
    machine.call("DEL", &pod, &machine.config())?.done();
    assert!(outside.connect(to).is_err());
    Ok(())
}
