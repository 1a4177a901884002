//! How the program begins and ends.

use std::{
    fs,
    os::unix::{fs::PermissionsExt as _, net::UnixListener},
    process::Command,
    time::{Duration, Instant},
};

use crate::harness::{
    Background, Device, Keys, Lab, MESH_TUNNEL, Program, new_name, output, run, socket_path,
    wait_until, wg,
};

#[test]
fn it_goes_to_the_background_when_it_answers() {
    let lab = Lab::new();
    let name = new_name();
    let _device = Background(name.clone());
    let start = format!("ip netns exec {} {MESH_TUNNEL} {name}", lab.name(0));
    // This also waits until nobody can write to our pipes any more.
    assert_eq!(run(&start), "");
    assert!(
        wg(&format!("show {name}"), "")
            .unwrap()
            .contains("listening port")
    );
    let mode = fs::metadata(socket_path(&name))
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o600);
    assert!(lab.ip(0, &format!("link show {name}")).contains("mtu 1420"));

    let second = output(&start);
    let complaint = String::from_utf8_lossy(&second.stderr);
    assert_eq!(second.status.code(), Some(1));
    assert!(complaint.contains("a program answers at"), "{complaint}");
    // Another in the same namespace, with the socket out of the way.
    let hidden = socket_path(&format!("{name}-hidden"));
    fs::rename(socket_path(&name), &hidden).unwrap();
    let second = output(&start);
    let complaint = String::from_utf8_lossy(&second.stderr);
    assert!(
        !second.status.success() && complaint.contains("exists already"),
        "{complaint}"
    );
    fs::remove_file(&hidden).unwrap();
    // Without its socket nobody can reach it any more.
    let there = || lab.succeeds(0, &format!("ip link show {name}"));
    wait_until("the interface is gone", || !there());
}

#[test]
fn bad_arguments_are_explained() {
    for words in ["", "-x wg0", "--background", "wg0 wg1", "-f"] {
        let output = output(&format!("{MESH_TUNNEL} {words}"));
        let complaint = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(64), "{words:?}");
        assert!(
            complaint.contains("usage: mesh-tunnel"),
            "{words:?}: {complaint}"
        );
    }
    let output = output(&format!("{MESH_TUNNEL} -f an-interface-with-a-long-name"));
    let complaint = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1));
    assert!(
        complaint.contains("is not an interface name"),
        "{complaint}"
    );
    assert!(run(&format!("{MESH_TUNNEL} --help")).contains("LOG_LEVEL"));
}

#[test]
fn it_ends_when_it_is_told_and_leaves_nothing() {
    let lab = Lab::new();
    let gone = |device: &Device| {
        assert!(!socket_path(&device.name).exists());
        assert!(!lab.succeeds(0, &format!("ip link show {}", device.name)));
    };
    for signal in ["TERM", "INT"] {
        let mut device = Device::start(&lab, 0, Program::MeshTunnel);
        run(&format!("kill -{signal} {}", device.process.id()));
        device.await_end();
        assert!(device.process.wait().unwrap().success());
        gone(&device);
    }
    let mut device = Device::start(&lab, 0, Program::MeshTunnel);
    lab.ip(0, &format!("link delete {}", device.name));
    device.await_end();
    gone(&device);
    let mut device = Device::start(&lab, 0, Program::MeshTunnel);
    fs::remove_file(socket_path(&device.name)).unwrap();
    device.await_end();
    gone(&device);
    // A successor at once.
    let mut first = Device::start(&lab, 0, Program::MeshTunnel);
    let start = format!("ip netns exec {} {MESH_TUNNEL} {}", lab.name(0), first.name);
    let _second = Background(first.name.clone());
    lab.ip(0, &format!("link delete {}", first.name));
    run(&start);
    first.await_end();
    assert!(wg(&format!("show {}", first.name), "").is_ok());
    // The namespace to which the interface was moved.
    let mut device = Device::start(&lab, 0, Program::MeshTunnel);
    lab.ip(
        0,
        &format!("link set {} netns {}", device.name, lab.name(1)),
    );
    run(&format!("ip netns delete {}", lab.name(1)));
    device.await_end();
    gone(&device);
}

#[test]
fn a_socket_that_a_dead_one_left_is_replaced() {
    let lab = Lab::new();
    let name = new_name();
    let _device = Background(name.clone());
    fs::create_dir_all("/var/run/wireguard").unwrap();
    drop(UnixListener::bind(socket_path(&name)).unwrap());
    assert!(socket_path(&name).exists());
    run(&format!(
        "ip netns exec {} {MESH_TUNNEL} {name}",
        lab.name(0)
    ));
    assert!(wg(&format!("show {name}"), "").is_ok());
    lab.ip(0, &format!("link delete {name}"));
    wait_until("the socket is gone", || !socket_path(&name).exists());
}

#[test]
fn it_stays_in_the_foreground_if_the_environment_says_so() {
    let lab = Lab::new();
    let name = new_name();
    let mut process = Command::new("ip")
        .args(["netns", "exec", lab.name(0), MESH_TUNNEL, &name])
        .env("WG_PROCESS_FOREGROUND", "1")
        .spawn()
        .unwrap();
    wait_until("it answers", || wg(&format!("show {name}"), "").is_ok());
    assert!(process.try_wait().unwrap().is_none());
    run(&format!("kill {}", process.id()));
    assert!(process.wait().unwrap().success());
}

/// What issue 2 asks for: at most 16 MiB with one peer.
#[test]
fn one_peer_takes_little_memory() {
    let lab = Lab::new();
    lab.join([(0, "eth0 192.0.2.1/24"), (1, "eth0 192.0.2.2/24")]);
    let devices = [0, 1].map(|n| Device::start(&lab, n, Program::MeshTunnel));
    let keys = [Keys::new(), Keys::new()];
    for n in [0, 1] {
        let other = 1 - n;
        devices[n].conf(
            "setconf",
            &format!(
                "[Interface]\nPrivateKey={}\nListenPort=51820\n[Peer]\nPublicKey={}\n\
                 AllowedIPs=10.9.0.{}/32\nEndpoint=192.0.2.{}:51820\n",
                keys[n].private,
                keys[other].public,
                other + 1,
                other + 1
            ),
        );
        let name = &devices[n].name;
        lab.ip(n, &format!("addr add 10.9.0.{}/24 dev {name}", n + 1));
        lab.ip(n, &format!("link set {name} up"));
    }
    wait_until("they talk", || lab.succeeds(0, "ping -c 1 -W 1 10.9.0.2"));
    for device in &devices {
        let status = fs::read_to_string(format!("/proc/{}/status", device.process.id())).unwrap();
        let resident = status
            .lines()
            .find(|line| line.starts_with("VmRSS"))
            .unwrap();
        let kib: usize = resident.split_whitespace().nth(1).unwrap().parse().unwrap();
        println!("{kib} KiB resident");
        assert!(kib < 16 << 10, "{resident}");
    }
}

#[test]
fn ending_takes_no_time() {
    let lab = Lab::new();
    let mut device = Device::start(&lab, 0, Program::MeshTunnel);
    let started = Instant::now();
    device.terminate();
    assert!(
        started.elapsed() < Duration::from_secs(2),
        "{:?}",
        started.elapsed()
    );
}
