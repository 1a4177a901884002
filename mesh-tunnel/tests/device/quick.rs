//! `wg-quick`, with everything in the tunnel.

use std::{
    fs::{self, Permissions},
    os::unix::fs::PermissionsExt as _,
    process::Command,
};

use crate::harness::{Background, Keys, Lab, MESH_TUNNEL, new_name, socket_path, wait_until};

#[test]
fn wg_quick_takes_it_up_and_down() {
    let lab = Lab::new();
    lab.join([
        (0, "eth0 192.0.2.1/24 2001:db8::1/64"),
        (1, "eth0 192.0.2.2/24 2001:db8::2/64"),
    ]);
    let folder = tempfile::tempdir().unwrap();
    // The script, blind to a kernel that has WireGuard itself.
    let script = fs::read_to_string("/usr/bin/wg-quick").unwrap();
    let script = script
        .replace("cmd ip link add \"$INTERFACE\" type wireguard", "false")
        .replace("/sys/module/wireguard", "/nowhere");
    let program = folder.path().join("wg-quick");
    fs::write(&program, script).unwrap();
    fs::set_permissions(&program, Permissions::from_mode(0o755)).unwrap();
    let (names, keys) = ([new_name(), new_name()], [Keys::new(), Keys::new()]);
    let _devices = names.clone().map(Background);
    let quick = |n: usize, verb: &str| {
        let conf = folder.path().join(format!("{}.conf", names[n]));
        let output = Command::new("ip")
            .args(["netns", "exec", lab.name(n)])
            .arg(&program)
            .arg(verb)
            .arg(&conf)
            .env("WG_QUICK_USERSPACE_IMPLEMENTATION", MESH_TUNNEL)
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "wg-quick {verb}: {said}");
    };
    for n in [0, 1] {
        let (own, other) = (n + 1, 2 - n);
        // One end sends everything into the tunnel, and the tunnel's packets beside it.
        let allowed = if n == 0 {
            "0.0.0.0/0, ::/0".to_owned()
        } else {
            format!("10.8.0.{other}/32, fd08::{other}/128")
        };
        let conf = format!(
            "[Interface]\nAddress = 10.8.0.{own}/24, fd08::{own}/64\nPrivateKey = {}\nListenPort = 51820\n\
             [Peer]\nPublicKey = {}\nAllowedIPs = {allowed}\nEndpoint = 192.0.2.{other}:51820\n",
            keys[n].private,
            keys[1 - n].public,
        );
        let path = folder.path().join(format!("{}.conf", names[n]));
        fs::write(&path, conf).unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
        quick(n, "up");
    }
    lab.ip(1, "addr add 198.51.100.7/32 dev lo");
    // The other end may not have noticed yet that it is up.
    wait_until("they talk", || lab.succeeds(0, "ping -c 1 -W 1 10.8.0.2"));
    lab.ping(0, "fd08::2");
    lab.ping(1, "10.8.0.1");
    assert!(lab.exec(0, "ip route get 198.51.100.7").contains(&names[0]));
    for n in [0, 1] {
        quick(n, "down");
        wait_until("the device ends", || !socket_path(&names[n]).exists());
        assert!(!lab.succeeds(n, &format!("ip link show {}", names[n])));
    }
}
