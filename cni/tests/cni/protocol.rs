//! Each verb, in each version, and each error.

use std::{
    fs,
    io::{Read as _, Write as _},
};

use anyhow::Result;
use mesh_api::cni::{NETWORK_FILE, POLICY_FILE, PodName};
use serde_json::{Value, json};

use crate::harness::{Machine, Pod, addresses, inside, plugin, run, verb_alone};

#[test]
fn two_pods_reach_each_other_and_the_node_by_both_families_at_once() -> Result<()> {
    let machine = Machine::new()?;
    let (one, two) = (Pod::new("one")?, Pod::new("two")?);
    let first = machine.call("ADD", &one, &machine.config())?.done();
    let second = machine.call("ADD", &two, &machine.config())?.done();
    assert_eq!(addresses(&first).len(), 2);
    machine.reaches(&one, &first)?;
    machine.reaches(&two, &second)?;
    for address in addresses(&first) {
        let door = one.listen(address)?;
        let mut out = two.connect(door.local_addr()?)?;
        let (mut back, from) = door.accept()?;
        assert!(addresses(&second).contains(&from.ip()), "{from}");
        // More than an MTU, so that it is cut and put together.
        let sent = vec![7; 100_000];
        let mut received = Vec::new();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                out.write_all(&sent).unwrap();
                out.shutdown(std::net::Shutdown::Write).unwrap();
            });
            back.read_to_end(&mut received).unwrap();
        });
        assert!(received == sent);
        let text = address.to_string();
        let words = ["-c", "1", "-W", "3", "-M", "do", "-s", "1300", &text];
        inside(&two.namespace, || run("ping", &words))?;
    }
    for pod in [&one, &two] {
        let links: Value = serde_json::from_str(&pod.ip("-j link show eth0")?)?;
        assert_eq!(links[0]["mtu"], 1_380);
        let lo: Value = serde_json::from_str(&pod.ip("-j link show lo")?)?;
        assert!(lo[0]["flags"].as_array().unwrap().contains(&json!("UP")));
    }
    Ok(())
}

#[test]
fn a_pod_cannot_send_from_anothers_ipv4_address() -> Result<()> {
    let machine = Machine::new()?;
    let (one, two) = (Pod::new("one")?, Pod::new("two")?);
    let first = machine.call("ADD", &one, &machine.config())?.done();
    machine.call("ADD", &two, &machine.config())?.done();
    let target = addresses(&first)[0];
    two.ip("address add 10.77.0.200/32 dev lo")?;
    let text = target.to_string();
    let ping = |from: &str| {
        let words = ["-c", "1", "-W", "1", "-I", from, &text];
        inside(&two.namespace, || run("ping", &words))
    };
    ping("eth0")?;
    assert!(ping("10.77.0.200").is_err());
    Ok(())
}

#[test]
fn the_agent_reads_what_is_attached() -> Result<()> {
    let machine = Machine::new()?;
    let pod = Pod::new("one")?;
    let result = machine.call("ADD", &pod, &machine.config())?.done();
    let found = machine.attachments()?;
    let [attachment] = found.as_slice() else {
        panic!("{found:?}");
    };
    assert_eq!(attachment.id, pod.id());
    assert_eq!(attachment.addresses, addresses(&result));
    assert_eq!(attachment.netns.to_str(), Some(pod.path().as_str()));
    let name = PodName {
        namespace: "shop".to_owned(),
        name: "web-0".to_owned(),
    };
    assert_eq!(attachment.pod, Some(name));
    let host = attachment.host.clone().unwrap();
    let links: Value = serde_json::from_str(&machine.ip(&format!("-j link show {}", host.name))?)?;
    assert_eq!(links[0]["ifindex"], host.index);
    assert_eq!(machine.ports()?, [host.name]);
    Ok(())
}

#[test]
fn every_version_is_answered_in_its_own_form() -> Result<()> {
    let machine = Machine::new()?;
    for version in ["0.3.1", "0.4.0", "1.0.0", "1.1.0"] {
        let pod = Pod::new(&format!("c{version}"))?;
        let config = machine.config_with("cniVersion", json!(version));
        let result = machine.call("ADD", &pod, &config)?.done();
        assert_eq!(result["cniVersion"], version);
        let old = version.starts_with('0');
        assert_eq!(result["ips"][0]["version"] == "4", old, "{result}");
        let mut checked = config.clone();
        checked["prevResult"] = result;
        let check = machine.call("CHECK", &pod, &checked)?;
        if version == "0.3.1" {
            assert_eq!(check.code(), 1);
            assert_eq!(check.out["cniVersion"], version);
        } else {
            check.done();
        }
        let status = machine.execute(&plugin(), &verb_alone("STATUS"), &config)?;
        if version == "1.1.0" {
            status.done();
        } else {
            assert_eq!(status.code(), 1);
        }
        machine.call("DEL", &pod, &checked)?.done();
    }
    let asked = json!({"cniVersion": "1.0.0"});
    let said = machine
        .execute(&plugin(), &verb_alone("VERSION"), &asked)?
        .done();
    assert_eq!(
        said,
        json!({"cniVersion": "1.0.0", "supportedVersions": ["0.3.1", "0.4.0", "1.0.0", "1.1.0"]})
    );
    assert!(machine.ports()?.is_empty());
    Ok(())
}

#[test]
fn adding_again_gives_the_same_and_no_second_address() -> Result<()> {
    let machine = Machine::new()?;
    let pod = Pod::new("one")?;
    let first = machine.call("ADD", &pod, &machine.config())?.done();
    let again = machine.call("ADD", &pod, &machine.config())?.done();
    assert_eq!(first, again);
    // Broken by somebody's hand: made again, with the same addresses.
    machine.ip(&format!("link delete {}", pod.port()))?;
    let mended = machine.call("ADD", &pod, &machine.config())?.done();
    assert_eq!(first, mended);
    machine.reaches(&pod, &mended)?;
    // The container began anew in another namespace.
    let other = Pod::new("one")?;
    let moved = machine.call("ADD", &other, &machine.config())?.done();
    assert_eq!(addresses(&first), addresses(&moved));
    machine.reaches(&other, &moved)?;
    assert_eq!(machine.attachments()?.len(), 1);
    assert_eq!(machine.ports()?.len(), 1);
    Ok(())
}

#[test]
fn an_address_is_not_given_again_at_once() -> Result<()> {
    let machine = Machine::new()?;
    let mut seen = Vec::new();
    for turn in 0..5 {
        let pod = Pod::new(&format!("c{turn}"))?;
        let result = machine.call("ADD", &pod, &machine.config())?.done();
        for address in addresses(&result) {
            assert!(!seen.contains(&address), "{address} again");
            seen.push(address);
        }
        machine.call("DEL", &pod, &machine.config())?.done();
    }
    Ok(())
}

#[test]
fn deleting_works_whatever_is_gone_already() -> Result<()> {
    let machine = Machine::new()?;
    let config = machine.config();
    let add = |pod: &Pod| {
        machine
            .call("ADD", pod, &config)
            .map(|answer| drop(answer.done()))
    };

    let pod = Pod::new("never-added")?;
    machine.call("DEL", &pod, &config)?.done();

    let pod = Pod::new("twice")?;
    add(&pod)?;
    machine.call("DEL", &pod, &config)?.done();
    machine.call("DEL", &pod, &config)?.done();

    let pod = Pod::new("no-netns-said")?;
    add(&pod)?;
    machine
        .call_with("DEL", &pod, &[("CNI_NETNS", None)], &config)?
        .done();

    let pod = Pod::new("interface-gone")?;
    add(&pod)?;
    pod.ip("link delete eth0")?;
    machine.call("DEL", &pod, &config)?.done();

    let pod = Pod::new("netns-gone")?;
    add(&pod)?;
    let gone = [("CNI_NETNS", Some("/run/netns/no-such"))];
    machine.call_with("DEL", &pod, &gone, &config)?.done();

    assert!(machine.ports()?.is_empty());
    assert!(machine.attachments()?.is_empty());

    let pod = Pod::new("state-gone")?;
    add(&pod)?;
    fs::remove_dir_all(machine.state_dir().join("attachments"))?;
    fs::remove_file(machine.state_dir().join(NETWORK_FILE))?;
    machine.call("DEL", &pod, &config)?.done();
    assert!(machine.ports()?.is_empty());
    Ok(())
}

#[test]
fn asked_addresses_and_link_layer_addresses_are_given_or_refused() -> Result<()> {
    let machine = Machine::new()?;
    let ask = |container: &str, runtime: Value| -> Result<_> {
        let pod = Pod::new(container)?;
        let answer = machine.call("ADD", &pod, &machine.config_with("runtimeConfig", runtime))?;
        Ok((pod, answer))
    };
    let runtime = json!({"ips": ["10.77.0.99/24", "fd77::99"], "mac": "02:11:22:33:44:55"});
    let (pod, answer) = ask("both", runtime)?;
    let result = answer.done();
    assert_eq!(result["ips"][0]["address"], "10.77.0.99/32");
    assert_eq!(result["ips"][1]["address"], "fd77::99/128");
    assert_eq!(result["interfaces"][1]["mac"], "02:11:22:33:44:55");
    let links: Value = serde_json::from_str(&pod.ip("-j link show eth0")?)?;
    assert_eq!(links[0]["address"], "02:11:22:33:44:55");
    machine.reaches(&pod, &result)?;

    let (_pod, answer) = ask("taken", json!({"ips": ["10.77.0.99"]}))?;
    assert_eq!(answer.code(), 100);
    for outside in ["10.78.0.1", "10.77.0.0", "10.77.0.255", "fd78::1"] {
        let (_pod, answer) = ask("outside", json!({"ips": [outside]}))?;
        assert_eq!(answer.code(), 7, "{outside}");
    }
    let (pod, answer) = ask("one-of-two", json!({"ips": ["fd77::1234"]}))?;
    let result = answer.done();
    assert_eq!(result["ips"][1]["address"], "fd77::1234/128");
    machine.reaches(&pod, &result)?;
    assert_eq!(machine.attachments()?.len(), 2);
    Ok(())
}

#[test]
fn one_family_alone_and_two_interfaces_of_a_pod_work() -> Result<()> {
    let machine = Machine::new()?;
    for (v4, v6) in [(Some("10.77.0.0/24"), None), (None, Some("fd77::/64"))] {
        machine.set_ranges(v4, v6)?;
        let pod = Pod::new(if v4.is_some() { "v4" } else { "v6" })?;
        let result = machine.call("ADD", &pod, &machine.config())?.done();
        assert_eq!(addresses(&result).len(), 1);
        machine.reaches(&pod, &result)?;
        let mut second = Pod::new("other")?;
        second.container.clone_from(&pod.container);
        "net1".clone_into(&mut second.interface);
        let more = machine.call("ADD", &second, &machine.config())?.done();
        assert_ne!(addresses(&result), addresses(&more));
        machine.reaches(&second, &more)?;
    }
    Ok(())
}

#[test]
fn a_full_range_is_told_and_is_whole_again_after_a_del() -> Result<()> {
    let machine = Machine::new()?;
    machine.set_ranges(Some("10.77.0.0/30"), None)?;
    let pods = [Pod::new("a")?, Pod::new("b")?, Pod::new("c")?];
    for pod in &pods[..2] {
        machine.call("ADD", pod, &machine.config())?.done();
    }
    let full = machine.call("ADD", &pods[2], &machine.config())?;
    assert_eq!(full.code(), 100);
    assert_eq!(
        machine.attachments()?.len(),
        2,
        "nothing is left of what failed"
    );
    machine.call("DEL", &pods[0], &machine.config())?.done();
    let result = machine.call("ADD", &pods[2], &machine.config())?.done();
    machine.reaches(&pods[2], &result)
}

#[test]
fn an_address_that_the_kernel_has_is_not_given_whoever_made_it() -> Result<()> {
    let machine = Machine::new()?;
    machine.set_ranges(Some("10.77.0.0/29"), None)?;
    machine.ip("link add other type veth peer name other-peer")?;
    machine.ip("link set other up")?;
    machine.ip("address add 10.77.0.1/32 dev lo")?;
    machine.ip("route add 10.77.0.2/32 dev other")?;
    machine.ip("route add blackhole 10.77.0.0/16")?;
    let pod = Pod::new("one")?;
    let result = machine.call("ADD", &pod, &machine.config())?.done();
    assert_eq!(result["ips"][0]["address"], "10.77.0.3/32");
    Ok(())
}

#[test]
fn where_policies_are_enforced_nobody_comes_before_the_agent_loaded_them() -> Result<()> {
    let machine = Machine::new()?;
    let pod = Pod::new("one")?;
    let file = machine.state_dir().join(POLICY_FILE);
    fs::write(&file, "")?;
    let answer = machine.call("ADD", &pod, &machine.config())?;
    assert_eq!(answer.code(), 11);
    assert!(
        answer.out["msg"]
            .as_str()
            .unwrap_or_default()
            .contains("policies")
    );
    assert_eq!(machine.status()?.code(), 50);
    assert!(machine.ports()?.is_empty() && machine.attachments()?.is_empty());
    assert!(pod.ip("link show eth0").is_err());
    fs::remove_file(&file)?;
    machine.status()?.done();
    machine.call("ADD", &pod, &machine.config())?.done();
    Ok(())
}

#[test]
fn before_the_agent_wrote_the_network_runtimes_are_told_to_try_again() -> Result<()> {
    let machine = Machine::new()?;
    machine.status()?.done();
    let (one, two) = (Pod::new("one")?, Pod::new("two")?);
    let path = machine.state_dir().join(NETWORK_FILE);
    for damage in [None, Some(""), Some("{\"ipv4\":")] {
        match damage {
            None => fs::remove_file(&path)?,
            Some(text) => fs::write(&path, text)?,
        }
        assert_eq!(machine.call("ADD", &one, &machine.config())?.code(), 11);
        assert_eq!(machine.status()?.code(), 50);
    }
    machine.set_ranges(Some("10.77.0.0/24"), None)?;
    machine.status()?.done();
    machine.call("ADD", &two, &machine.config())?.done();
    fs::remove_file(&path)?;
    assert_eq!(
        machine.status()?.code(),
        51,
        "a pod is there, and nobody serves it"
    );
    machine.call("DEL", &two, &machine.config())?.done();
    Ok(())
}

#[test]
fn each_wrong_input_has_its_code_and_leaves_nothing() -> Result<()> {
    let machine = Machine::new()?;
    let pod = Pod::new("one")?;
    let config = machine.config();
    let bad = |config: &Value, code: u64| -> Result<()> {
        let answer = machine.call("ADD", &pod, config)?;
        assert_eq!(answer.code(), code, "{}", answer.out);
        assert!(answer.log.contains("mesh-cni: "), "{}", answer.log);
        Ok(())
    };
    bad(&machine.config_with("cniVersion", json!("9.0.0")), 1)?;
    bad(&machine.config_with("stateDri", json!("/x")), 2)?;
    bad(
        &machine.config_with("runtimeConfig", json!({"portMappings": [{}]})),
        2,
    )?;
    bad(&json!("no object"), 6)?;
    bad(&machine.config_with("prevResult", json!({"ips": 1})), 6)?;
    bad(&machine.config_with("name", json!("a/b")), 7)?;
    bad(&machine.config_with("chained", json!(true)), 7)?;
    bad(&machine.config_with("stateDir", json!("/proc/no-such")), 11)?;
    for (changes, code) in [
        ([("CNI_NETNS", Some("/run/netns/no-such"))], 3),
        ([("CNI_NETNS", None)], 4),
        ([("CNI_NETNS", Some("/proc/self/ns/net"))], 4),
        ([("CNI_CONTAINERID", None)], 4),
        ([("CNI_IFNAME", Some("a/b"))], 4),
        ([("CNI_COMMAND", Some("ATTACH"))], 4),
        ([("CNI_ARGS", Some("COLOUR=red"))], 4),
        ([("CNI_NETNS", Some("/dev/null"))], 102),
    ] {
        let answer = machine.call_with("ADD", &pod, &changes, &config)?;
        assert_eq!(answer.code(), code, "{changes:?}: {}", answer.out);
    }
    let answer = machine.call("CHECK", &pod, &config)?;
    assert_eq!(answer.code(), 7, "CHECK without prevResult");
    let answer = machine.execute(&plugin(), &verb_alone("GC"), &config)?;
    assert_eq!(answer.code(), 7, "GC without a list");
    assert!(machine.ports()?.is_empty());
    // An interface of that name is there.
    pod.ip("link add eth0 type veth peer name x")?;
    assert_eq!(machine.call("ADD", &pod, &config)?.code(), 4);
    assert!(machine.ports()?.is_empty());
    assert!(machine.attachments()?.is_empty());
    Ok(())
}

#[test]
fn uninstalling_takes_pods_interfaces_and_records_if_it_is_asked_to() -> Result<()> {
    let machine = Machine::new()?;
    let pod = Pod::new("one")?;
    machine.call("ADD", &pod, &machine.config())?.done();
    let path = |name: &str| machine.state_dir().join(name).display().to_string();
    let (conf, bin, state) = (path("net.d"), path("bin"), path(""));
    let places = [
        "--conf-dir",
        &conf,
        "--bin-dir",
        &bin,
        "--state-dir",
        &state,
    ];
    let program = plugin().display().to_string();
    let call = |words: &[&str]| {
        let words = [words, &places[..]].concat();
        inside(&machine.namespace, || run(&program, &words))
    };
    call(&["install"])?;
    call(&["uninstall"])?;
    assert_eq!(machine.ports()?, [pod.port()], "pods live on");
    call(&["uninstall", "--purge"])?;
    assert!(machine.ports()?.is_empty());
    assert!(machine.attachments()?.is_empty());
    assert!(
        machine.state_dir().join(NETWORK_FILE).exists(),
        "it is the agent's"
    );
    Ok(())
}
