//! One service by TCP and UDP as kube-proxy programs it, in the network namespace of the calling thread.

use std::{
    io::Write as _,
    net::SocketAddr,
    process::{Command, Stdio},
    thread,
};

/// How kube-proxy works.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    Iptables,
    Nftables,
}

pub(crate) const MODES: [Mode; 2] = [Mode::Iptables, Mode::Nftables];

/// The rules, until this is dropped or the namespace is gone.
pub(crate) struct KubeProxy {
    mode: Mode,
    v4: bool,
}

impl KubeProxy {
    pub(crate) fn start(mode: Mode, service: SocketAddr, endpoint: SocketAddr) -> Self {
        let v4 = service.is_ipv4();
        let proxy = Self { mode, v4 };
        match mode {
            Mode::Iptables => {
                let program = format!("{}-restore", proxy.iptables());
                run(&program, &["--noflush"], &iptables(service, endpoint));
            }
            Mode::Nftables => {
                run("nft", &["-f", "-"], &nftables(service, endpoint));
            }
        }
        proxy
    }

    /// TCP flows that it led to its endpoint.
    pub(crate) fn flows(&self) -> u64 {
        let (program, arguments) = match self.mode {
            Mode::Iptables => (
                self.iptables(),
                "-t nat -nvxL KUBE-SEP-A".split(' ').collect(),
            ),
            Mode::Nftables => (
                "nft",
                vec!["list", "counter", self.family(), "kube-proxy", "flows"],
            ),
        };
        let said = run(program, &arguments, "");
        let words: Vec<_> = said.split_whitespace().collect();
        let count = match self.mode {
            // The line of the rule begins with its packets, and its third word is its target.
            Mode::Iptables => words.windows(3).find(|three| three[2] == "DNAT"),
            Mode::Nftables => words.windows(3).find(|three| three[0] == "packets"),
        };
        let number = usize::from(self.mode == Mode::Nftables);
        let count = count.unwrap_or_else(|| panic!("no count in {said}"))[number];
        count.parse().unwrap()
    }

    fn iptables(&self) -> &'static str {
        if self.v4 { "iptables" } else { "ip6tables" }
    }

    fn family(&self) -> &'static str {
        if self.v4 { "ip" } else { "ip6" }
    }
}

impl Drop for KubeProxy {
    fn drop(&mut self) {
        // The namespace takes the rules along.
        if thread::panicking() {
            return;
        }
        match self.mode {
            Mode::Iptables => {
                for table in ["nat", "filter"] {
                    run(self.iptables(), &["-t", table, "-F"], "");
                    run(self.iptables(), &["-t", table, "-X"], "");
                }
            }
            Mode::Nftables => {
                run("nft", &["delete", "table", self.family(), "kube-proxy"], "");
            }
        }
    }
}

/// As `pkg/proxy/iptables` makes them, without comments.
fn iptables(service: SocketAddr, endpoint: SocketAddr) -> String {
    let (address, port) = (service.ip(), service.port());
    format!(
        "*filter
:KUBE-FORWARD - [0:0]
-A FORWARD -j KUBE-FORWARD
-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP
-A KUBE-FORWARD -m mark --mark 0x4000/0x4000 -j ACCEPT
-A KUBE-FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
COMMIT
*nat
:KUBE-SERVICES - [0:0]
:KUBE-SVC-A - [0:0]
:KUBE-SEP-A - [0:0]
:KUBE-POSTROUTING - [0:0]
-A PREROUTING -j KUBE-SERVICES
-A OUTPUT -j KUBE-SERVICES
-A POSTROUTING -j KUBE-POSTROUTING
-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN
-A KUBE-POSTROUTING -j MARK --xor-mark 0x4000
-A KUBE-POSTROUTING -j MASQUERADE --random-fully
-A KUBE-SERVICES -d {address} -p tcp --dport {port} -j KUBE-SVC-A
-A KUBE-SERVICES -d {address} -p udp --dport {port} -j KUBE-SVC-A
-A KUBE-SVC-A -j KUBE-SEP-A
-A KUBE-SEP-A -p tcp -j DNAT --to-destination {endpoint}
-A KUBE-SEP-A -p udp -j DNAT --to-destination {endpoint}
COMMIT
"
    )
}

/// As `pkg/proxy/nftables` makes them, without comments.
fn nftables(service: SocketAddr, endpoint: SocketAddr) -> String {
    let (address, port) = (service.ip(), service.port());
    let family = if service.is_ipv4() { "ip" } else { "ip6" };
    let kind = if service.is_ipv4() { "ipv4" } else { "ipv6" };
    format!(
        "table {family} kube-proxy {{
    counter flows {{ }}
    chain endpoint-a {{
        meta l4proto tcp counter name flows dnat to {endpoint}
        meta l4proto udp dnat to {endpoint}
    }}
    chain service-a {{ goto endpoint-a; }}
    map service-ips {{
        type {kind}_addr . inet_proto . inet_service : verdict
        elements = {{ {address} . tcp . {port} : goto service-a, {address} . udp . {port} : goto service-a }}
    }}
    chain services {{ {family} daddr . meta l4proto . th dport vmap @service-ips; }}
    chain nat-prerouting {{ type nat hook prerouting priority -100; jump services; }}
    chain nat-output {{ type nat hook output priority -100; jump services; }}
    chain filter-forward {{ type filter hook forward priority -110; ct state invalid drop; }}
}}
"
    )
}

/// What the program says.
#[track_caller]
fn run(program: &str, arguments: &[&str], input: &str) -> String {
    let child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn();
    let mut child = child
        .unwrap_or_else(|error| panic!("{program}: {error}: apt-get install iptables nftables"));
    // Closed at the end of the statement.
    let written = child.stdin.take().unwrap().write_all(input.as_bytes());
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{program} {arguments:?}");
    written.unwrap();
    String::from_utf8(output.stdout).unwrap()
}
