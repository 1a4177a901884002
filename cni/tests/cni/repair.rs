//! CHECK tells what is broken; GC removes what nobody needs.

use std::fs;

use anyhow::Result;
use mesh_api::cni::{attachments_dir, boots_dir};
use serde_json::json;

use crate::harness::{Machine, Pod, addresses};

#[test]
fn check_tells_each_thing_that_is_broken_and_add_mends_it() -> Result<()> {
    let machine = Machine::new()?;
    let pod = Pod::new("one")?;
    let result = machine.call("ADD", &pod, &machine.config())?.done();
    machine.check(&pod, &result)?.done();
    let (port, found) = (pod.port(), addresses(&result));
    let (v4, v6) = (found[0], found[1]);
    let on_node = |line: String| machine.ip(&line).map(drop);
    let in_pod = |line: String| pod.ip(&line).map(drop);
    type Break<'a> = (&'a str, &'a dyn Fn() -> Result<()>);
    let breaks: [Break<'_>; 14] = [
        ("hfp", &|| on_node(format!("link delete {port}"))),
        ("is down", &|| on_node(format!("link set {port} down"))),
        ("is down", &|| in_pod("link set eth0 down".to_owned())),
        ("no interface eth0", &|| {
            in_pod("link set eth0 down".to_owned())?;
            in_pod("link set eth0 name net9".to_owned())
        }),
        ("MTU 1300", &|| on_node(format!("link set {port} mtu 1300"))),
        ("MTU 1300", &|| in_pod("link set eth0 mtu 1300".to_owned())),
        ("link-layer address", &|| {
            in_pod("link set eth0 address 02:00:00:00:00:99".to_owned())
        }),
        ("lacks the address", &|| {
            in_pod(format!("address delete {v4}/32 dev eth0"))
        }),
        ("lacks the address", &|| {
            in_pod(format!("address delete {v6}/128 dev eth0"))
        }),
        ("route to 0.0.0.0/0", &|| {
            in_pod("route delete default".to_owned())
        }),
        ("route to ::/0", &|| {
            in_pod("-6 route delete default".to_owned())
        }),
        ("gateway 169.254.1.1", &|| {
            in_pod("neighbour delete 169.254.1.1 dev eth0".to_owned())
        }),
        ("the node lacks the route", &|| {
            on_node(format!("route delete {v4}/32 dev {port}"))
        }),
        ("the node lacks the route", &|| {
            on_node(format!("-6 route delete {v6}/128 dev {port}"))
        }),
    ];
    for (said, break_it) in breaks {
        break_it()?;
        let answer = machine.check(&pod, &result)?;
        assert_eq!(answer.code(), 101, "{said}");
        let details = answer.out["details"].as_str().unwrap_or_default();
        assert!(details.contains(said), "{said}: {details}");
        let mended = machine.call("ADD", &pod, &machine.config())?.done();
        assert_eq!(mended, result, "{said}");
        machine.check(&pod, &result)?.done();
        machine.reaches(&pod, &result)?;
    }
    Ok(())
}

#[test]
fn check_tells_a_lost_record_a_lost_namespace_and_another_result() -> Result<()> {
    let machine = Machine::new()?;
    let pod = Pod::new("one")?;
    let result = machine.call("ADD", &pod, &machine.config())?.done();
    let mut other = result.clone();
    other["ips"][0]["address"] = json!("10.77.0.250/32");
    assert_eq!(machine.check(&pod, &other)?.code(), 101);
    let config = machine.config_with("prevResult", result.clone());
    let gone = [("CNI_NETNS", Some("/run/netns/no-such"))];
    assert_eq!(machine.call_with("CHECK", &pod, &gone, &config)?.code(), 3);
    fs::remove_file(machine.record(&pod)?)?;
    assert_eq!(machine.check(&pod, &result)?.code(), 101);
    Ok(())
}

#[test]
fn gc_removes_what_is_not_listed_and_nothing_else() -> Result<()> {
    let machine = Machine::new()?;
    let pods = ["kept", "gone", "lost-record", "garbled", "garbled-kept"];
    let pods = pods.map(Pod::new).into_iter().collect::<Result<Vec<_>>>()?;
    let [kept, gone, lost, garbled, garbled_kept] = pods.as_slice() else {
        unreachable!();
    };
    let mut results = Vec::new();
    for pod in &pods {
        results.push(machine.call("ADD", pod, &machine.config())?.done());
    }
    fs::remove_file(machine.record(lost)?)?;
    fs::write(machine.record(garbled)?, "{")?;
    fs::write(machine.record(garbled_kept)?, "")?;
    // Of another network with the same folder, of another boot, and of a kill.
    let elsewhere = Pod::new("elsewhere")?;
    let other = machine.config_with("name", json!("other"));
    machine.call("ADD", &elsewhere, &other)?.done();
    fs::create_dir(boots_dir(machine.state_dir()).join("0-0"))?;
    let folder = attachments_dir(machine.state_dir())?;
    fs::write(folder.join(".new"), "half")?;

    machine.gc(&[kept, garbled_kept])?.done();

    let mut left = vec![kept.port(), garbled_kept.port()];
    let mut other_id = elsewhere.id();
    "other".clone_into(&mut other_id.network);
    left.push(other_id.key());
    left.sort();
    assert_eq!(machine.ports()?, left);
    let files = fs::read_dir(&folder)?.count();
    assert_eq!(files, 3);
    assert_eq!(fs::read_dir(boots_dir(machine.state_dir()))?.count(), 1);
    machine.check(kept, &results[0])?.done();
    machine.reaches(kept, &results[0])?;
    machine.reaches(garbled_kept, &results[4])?;
    // The runtime disagrees about this one: it is made anew, with the same addresses.
    let mended = machine.call("ADD", garbled_kept, &machine.config())?.done();
    assert_eq!(mended, results[4]);
    assert!(gone.ip("link show eth0").is_err());
    machine.gc(&[])?.done();
    assert_eq!(machine.ports()?, [other_id.key()]);
    Ok(())
}
