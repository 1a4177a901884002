//! With the other WireGuard programs that a registry or Debian carries.

use std::{thread, time::Duration};

use crate::harness::{Device, Keys, Lab, PATIENCE, Program, comes_true, wg};

const BULK_BYTES: usize = 32 << 20;

/// Which ends know where the other one is, and so may begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Begins {
    Own,
    Stock,
}

/// This program in namespace 0, another one in namespace 1.
struct Ends {
    lab: Lab,
    devices: [Device; 2],
    confs: [String; 2],
    keys: [Keys; 2],
}

impl Ends {
    fn new(stock: Program, begins: Begins, underlay: [&str; 2]) -> Self {
        let lab = Lab::new();
        lab.join([
            (0, "eth0 192.0.2.1/24 2001:db8::1/64"),
            (1, "eth0 192.0.2.2/24 2001:db8::2/64"),
        ]);
        let programs = [Program::MeshTunnel, stock];
        let devices = [0, 1].map(|n| Device::start(&lab, n, programs[n]));
        let keys = [Keys::new(), Keys::new()];
        let psk = wg("genpsk", "").unwrap();
        let confs = [0, 1].map(|n| {
            let other = 1 - n;
            let knows = (n == 0) == (begins == Begins::Own);
            let endpoint = if knows {
                format!("Endpoint={}:{}\n", underlay[other], 51_820 + other)
            } else {
                String::new()
            };
            format!(
                "[Interface]\nPrivateKey={}\nListenPort={}\n[Peer]\nPublicKey={}\nPresharedKey={psk}\n\
                 AllowedIPs=10.7.0.{}/32,fd07::{}/128\n{endpoint}",
                keys[n].private,
                51_820 + n,
                keys[other].public,
                other + 1,
                other + 1,
            )
        });
        for (n, device) in devices.iter().enumerate() {
            device.conf("setconf", &confs[n]);
            let name = &device.name;
            lab.ip(n, &format!("addr add 10.7.0.{}/24 dev {name}", n + 1));
            lab.ip(n, &format!("addr add fd07::{}/64 dev {name}", n + 1));
            lab.ip(n, &format!("link set {name} mtu 1420 up"));
        }
        Self {
            lab,
            devices,
            confs,
            keys,
        }
    }

    /// Pings from `n`, whose first one must not be lost.
    fn talk(&self, n: usize) {
        let other = 2 - n;
        for to in [format!("10.7.0.{other}"), format!("fd07::{other}")] {
            self.lab.ping(n, &to);
            self.lab.exec(n, &format!("ping -c 20 -f -W 1 {to}"));
            self.lab
                .exec(n, &format!("ping -c 2 -i 0.1 -W 1 -s 1300 {to}"));
        }
    }

    /// Sets all of `n`'s configuration again, with this line more: sessions are gone. (Not by `wg
    /// set peer`: boringtun 0.7 ends when a peer of its is changed.)
    fn begin_again(&self, n: usize, line: &str) {
        let device = &self.devices[n];
        let peer = device.show("endpoints");
        let endpoint = peer.split('\t').nth(1).unwrap();
        device.conf(
            "setconf",
            &format!("{}Endpoint={endpoint}\n{line}\n", self.confs[n]),
        );
    }

    /// Transfers from either end, in the middle of which the sender forgets its session and makes
    /// another. (A receiver that forgets is called again only after 15 s; the paper, §6.3.)
    fn transfers_with_rekey(&self) {
        for n in [0, 1] {
            let other = 1 - n;
            for to in [
                format!("10.7.0.{}", other + 1),
                format!("fd07::{}", other + 1),
            ] {
                self.lab.transfer(n, (other, &to), BULK_BYTES, || {
                    self.begin_again(n, "");
                });
            }
        }
        assert!(!self.devices[0].show("latest-handshakes").ends_with("\t0"));
    }

    /// Only keepalives move, from `n` to the other. Not all programs count them: this one does.
    fn keeps_alive(&self, n: usize) {
        self.begin_again(n, "PersistentKeepalive=1");
        let moved = || {
            let (received, sent) = self.devices[0].transferred();
            if n == 0 { sent } else { received }
        };
        let before = moved();
        thread::sleep(Duration::from_secs(3));
        let after = moved();
        assert!(
            after >= before + 2 * 32,
            "{before} bytes, 3 s later {after}"
        );
    }
}

fn this_program_begins(stock: Program) {
    let ends = Ends::new(stock, Begins::Own, ["192.0.2.1", "192.0.2.2"]);
    ends.talk(0);
    ends.talk(1);
    ends.transfers_with_rekey();
    ends.keeps_alive(0);
    // The other one goes elsewhere. Not all of them can each: gotatun refuses another port, or hears nothing there, in one run
    // of some fifty; boringtun keeps sockets that are connected from the old address.
    let elsewhere = if stock == Program::Gotatun {
        ends.lab.ip(1, "addr del 192.0.2.2/24 dev eth0");
        ends.lab.ip(1, "addr add 192.0.2.9/24 dev eth0");
        "\t192.0.2.9:51821"
    } else {
        ends.devices[1].set("listen-port 51999");
        "\t192.0.2.2:51999"
    };
    let found = comes_true(PATIENCE, || {
        ends.lab.succeeds(1, "ping -c 1 -W 1 10.7.0.1")
            && ends.devices[0].show("endpoints").ends_with(elsewhere)
    });
    assert!(found, "the peer is never found again");
    ends.talk(0);
}

fn the_other_begins(stock: Program) {
    let ends = Ends::new(stock, Begins::Stock, ["[2001:db8::1]", "[2001:db8::2]"]);
    ends.talk(1);
    ends.talk(0);
    assert!(
        ends.devices[0]
            .show("endpoints")
            .ends_with("\t[2001:db8::2]:51821")
    );
    ends.transfers_with_rekey();
    ends.keeps_alive(1);
    // A key that only one of them shares is none.
    ends.devices[0].set(&format!(
        "peer {} preshared-key /dev/null",
        ends.keys[1].public
    ));
    ends.devices[1].conf("setconf", &ends.confs[1]);
    assert!(!ends.lab.succeeds(1, "ping -c 1 -W 2 10.7.0.1"));
}

#[test]
fn wireguard_go_is_called() {
    this_program_begins(Program::WireguardGo);
}

#[test]
fn wireguard_go_calls() {
    the_other_begins(Program::WireguardGo);
}

#[test]
fn boringtun_is_called() {
    this_program_begins(Program::Boringtun);
}

#[test]
fn boringtun_calls() {
    the_other_begins(Program::Boringtun);
}

#[test]
fn gotatun_is_called() {
    this_program_begins(Program::Gotatun);
}

#[test]
fn gotatun_calls() {
    the_other_begins(Program::Gotatun);
}
