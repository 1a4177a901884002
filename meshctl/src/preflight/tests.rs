//! Each finding by itself, on a machine that is otherwise fit.

use super::{cluster::Node, *};

fn fit() -> Facts {
    Facts {
        kernel_release: Ok("6.18.44-amd64".into()),
        machine: "x86_64",
        btf: true,
        cgroup2: Some("/sys/fs/cgroup".into()),
        bpffs: true,
        tun: Ok(()),
        lockdown: None,
        capabilities: Ok(u64::MAX),
        port: Ok(()),
        interfaces: [("lo".to_owned(), 65_536), ("eth0".to_owned(), 1500)].into(),
        routes: vec![
            (net("0.0.0.0/0"), "eth0".into()),
            (net("10.0.0.0/24"), "eth0".into()),
        ],
        cni: Vec::new(),
        now_unix_s: WRITTEN_UNIX_S + 86_400,
        disk_free_bytes: Ok(1 << 30),
        memory_bytes: Ok(1 << 30),
    }
}

fn wanted() -> Wanted {
    Wanted {
        listen_port: 51_820,
        overlay: net("100.96.0.0/12"),
        interface: "holdfast0".into(),
    }
}

fn net(text: &str) -> IpNet {
    text.parse().unwrap()
}

/// The one check that is not well after `change`.
fn finding(change: impl FnOnce(&mut Facts)) -> (String, Level, String) {
    let mut facts = fit();
    change(&mut facts);
    let checks = judge(&facts, &wanted());
    let mut bad: Vec<_> = checks
        .into_iter()
        .filter(|check| check.level != Level::Ok)
        .collect();
    assert_eq!(bad.len(), 1, "{bad:?}");
    let Check { name, level, text } = bad.remove(0);
    (name, level, text)
}

#[test]
fn a_fit_machine_has_nothing_to_mend() {
    let checks = judge(&fit(), &wanted());
    assert!(
        checks.iter().all(|check| check.level == Level::Ok),
        "{checks:?}"
    );
    assert!(checks.len() >= 14);
}

#[test]
fn what_keeps_an_agent_from_starting_is_an_error_that_says_what_to_do() {
    type Change = fn(&mut Facts);
    let cases: [(Change, &str, &str); 12] = [
        (
            |f| f.kernel_release = Ok("6.1.0-18".into()),
            "kernel",
            "newer kernel",
        ),
        (|f| f.kernel_release = Err("gone".into()), "kernel", "gone"),
        (|f| f.machine = "riscv64", "machine", "amd64 and arm64"),
        (|f| f.btf = false, "BTF", "CONFIG_DEBUG_INFO_BTF"),
        (|f| f.cgroup2 = None, "cgroup2", "mount -t cgroup2"),
        (
            |f| f.tun = Err("no such device".into()),
            "TUN",
            "modprobe tun",
        ),
        (
            |f| f.lockdown = Some("confidentiality".into()),
            "lockdown",
            "lockdown=integrity",
        ),
        (|f| f.port = Err("in use".into()), "UDP port", "ss -ulpn"),
        (
            |f| {
                f.interfaces.insert("eth0".into(), 1300);
            },
            "MTU",
            "1368 are needed",
        ),
        (
            |f| f.routes.push((net("100.64.0.0/10"), "ts0".into())),
            "overlay",
            "spec.overlayIPv4CIDR",
        ),
        (|f| f.disk_free_bytes = Ok(1 << 20), "disk", "1 MiB"),
        (|f| f.memory_bytes = Ok(1 << 20), "memory", "64 are needed"),
    ];
    for (change, name, hint) in cases {
        let (found, level, text) = finding(change);
        assert_eq!((found.as_str(), level), (name, Level::Error), "{text}");
        assert!(text.contains(hint), "{text}");
    }
}

#[test]
fn what_works_for_a_while_or_not_wholly_is_a_warning() {
    type Change = fn(&mut Facts);
    let cases: [(Change, &str, &str); 5] = [
        (|f| f.bpffs = false, "BPF file system", "mount -t bpf"),
        (
            |f| f.capabilities = Ok(!(1 << 39)),
            "capabilities",
            "CAP_BPF",
        ),
        (|f| f.now_unix_s = 86_400, "clock", "wrong"),
        (|f| f.routes.clear(), "MTU", "no default route"),
        (
            |f| f.kernel_release = Ok("custom".into()),
            "kernel",
            "no version",
        ),
    ];
    for (change, name, hint) in cases {
        let (found, level, text) = finding(change);
        assert_eq!((found.as_str(), level), (name, Level::Warning), "{text}");
        assert!(text.contains(hint), "{text}");
    }
}

#[test]
fn a_running_agent_is_no_conflict_with_itself() {
    let mut facts = fit();
    facts.interfaces.insert("holdfast0".into(), 1280);
    facts
        .routes
        .push((net("100.96.0.0/12"), "holdfast0".into()));
    facts.port = Err("in use".into());
    let checks = judge(&facts, &wanted());
    assert!(
        checks.iter().all(|check| check.level == Level::Ok),
        "{checks:?}"
    );
}

#[test]
fn the_kubelet_s_first_configuration_counts() {
    let list = |name: &str, types: &[&str]| {
        let types = types.iter().map(|&kind| kind.to_owned()).collect();
        (name.to_owned(), Ok(types))
    };
    let bridge = list("10-bridge.conflist", &["bridge", "portmap"]);
    let ours = list("05-holdfast.conflist", &["bridge", "mesh-cni"]);
    let late = list("50-holdfast.conflist", &["mesh-cni"]);
    let broken = ("00-x.conf".to_owned(), Err("not JSON".to_owned()));
    assert!(cni(std::slice::from_ref(&bridge)).text.contains("chained"));
    assert_eq!(cni(&[ours, bridge.clone()]).level, Level::Ok);
    assert_eq!(cni(&[bridge.clone(), late]).level, Level::Warning);
    assert_eq!(cni(&[broken, bridge]).level, Level::Error);
}

#[test]
fn a_cluster_is_judged_by_server_rights_clock_and_nodes() {
    let node = |name: &str, kernel: &str, system: &str| Node {
        name: name.into(),
        kernel: kernel.into(),
        machine: "arm64".into(),
        system: system.into(),
    };
    let fit = cluster::Facts {
        version: Ok("v1.36.1+k3s1".into()),
        nodes: Ok(vec![node("a", "6.12.1", "linux")]),
        denied: Ok(Vec::new()),
        clocks_unix_s: Ok((WRITTEN_UNIX_S, WRITTEN_UNIX_S + 5)),
    };
    let worst = |facts: &cluster::Facts| {
        let checks = cluster::judge(facts);
        checks.into_iter().max_by_key(|check| check.level).unwrap()
    };
    assert_eq!(worst(&fit).level, Level::Ok);
    let mut old = fit.clone();
    old.version = Ok("v1.28.3".into());
    assert!(worst(&old).text.contains("1.29 or later"));
    let mut denied = fit.clone();
    denied.denied = Ok(vec!["create namespaces".into()]);
    assert_eq!(worst(&denied).text, "this user may not create namespaces");
    let mut off = fit.clone();
    off.clocks_unix_s = Ok((WRITTEN_UNIX_S, WRITTEN_UNIX_S + 7200));
    assert!(worst(&off).text.contains("2h away"));
    let mut nodes = fit.clone();
    let mixed = [
        node("old", "5.15.0", "linux"),
        node("win", "10.0", "windows"),
    ];
    nodes.nodes = Ok(mixed
        .into_iter()
        .chain(fit.nodes.clone().unwrap())
        .collect());
    let checks = cluster::judge(&nodes);
    let texts: Vec<_> = checks
        .iter()
        .map(|check| format!("{} {}", check.name, check.text))
        .collect();
    assert!(
        texts
            .iter()
            .any(|text| text.starts_with("node old Linux 5.15.0 is older")),
        "{texts:?}"
    );
    assert!(
        texts
            .iter()
            .any(|text| text.starts_with("node win windows")),
        "{texts:?}"
    );
    assert!(
        texts.contains(&"nodes 1 of 3 are fit by kernel and machine".to_owned()),
        "{texts:?}"
    );
    let mut down = fit;
    down.version = Err("connection refused".into());
    assert_eq!(cluster::judge(&down).len(), 1);
}
