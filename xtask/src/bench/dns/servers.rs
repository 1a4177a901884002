//! The same names in other programs: an own zone in each, two threads or processes where they can.

use std::fmt::Write as _;

use anyhow::Result;
use netns_tests::{
    node::{Node, Process},
    tool,
};

use super::service;

/// Another program.
pub(super) struct Peer {
    pub(super) name: &'static str,
    pub(super) address: ([u8; 4], u16),
    pub(super) version: fn() -> Result<String>,
    /// Writes its configuration into the node's folder, and says how it is started.
    configure: fn(&Node, usize) -> Result<Vec<String>>,
}

impl Peer {
    /// # Errors
    ///
    /// If it cannot be configured or started.
    pub(super) fn start(&self, node: &Node, names: usize) -> Result<Process> {
        node.spawn(self.name, &(self.configure)(node, names)?)
    }
}

pub(super) const SERVERS: &[Peer] = &[
    Peer {
        name: "unbound",
        address: ([127, 0, 0, 11], 53),
        version: || first_line("unbound", &["-V"]),
        configure: unbound,
    },
    Peer {
        name: "dnsmasq",
        address: ([127, 0, 0, 12], 53),
        version: || first_line("dnsmasq", &["--version"]),
        configure: dnsmasq,
    },
    Peer {
        name: "knot",
        address: ([127, 0, 0, 13], 53),
        version: || first_line("knotd", &["--version"]),
        configure: knot,
    },
    Peer {
        name: "nsd",
        address: ([127, 0, 0, 14], 53),
        version: || first_line("sh", &["-c", "nsd -v 2>&1"]),
        configure: nsd,
    },
];

fn first_line(program: &str, args: &[&str]) -> Result<String> {
    let said = tool::run(program, args, "")?;
    Ok(said.lines().next().unwrap_or_default().to_owned())
}

fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(|&word| word.to_owned()).collect()
}

fn unbound(node: &Node, names: usize) -> Result<Vec<String>> {
    let mut text = format!(
        "server:\n interface: 127.0.0.11\n do-daemonize: no\n num-threads: 2\n so-reuseport: yes\n chroot: \"\"\n username: \"\"\n \
         directory: \"{0}\"\n pidfile: \"\"\n use-syslog: no\n logfile: \"\"\n access-control: 127.0.0.0/8 allow\n \
         local-zone: \"cluster.local.\" static\nremote-control:\n control-enable: no\nserver:\n",
        node.dir().display()
    );
    for number in 0..names {
        let (name, address) = service(number);
        writeln!(
            text,
            " local-data: \"{name}.bench.svc.cluster.local. 5 IN A {address}\""
        )
        .ok();
    }
    let path = node.write("unbound.conf", &text)?.display().to_string();
    Ok(words(&["unbound", "-d", "-c", &path]))
}

fn dnsmasq(node: &Node, names: usize) -> Result<Vec<String>> {
    let mut text = String::new();
    for number in 0..names {
        let (name, address) = service(number);
        writeln!(text, "{address} {name}.bench.svc.cluster.local").ok();
    }
    let path = node.write("dnsmasq.hosts", &text)?.display().to_string();
    Ok(words(&[
        "dnsmasq",
        "--keep-in-foreground",
        "--conf-file=/dev/null",
        "--no-resolv",
        "--no-hosts",
        &format!("--addn-hosts={path}"),
        "--listen-address=127.0.0.12",
        "--bind-interfaces",
        "--local=/cluster.local/",
        "--local-ttl=5",
        "--user=root",
        "--pid-file=",
        "--log-facility=-",
    ]))
}

fn zone(node: &Node, file: &str, names: usize) -> Result<String> {
    let mut text = "$ORIGIN cluster.local.\n$TTL 5\n@ SOA ns hostmaster 1 7200 1800 86400 5\n@ NS ns\nns A 127.0.0.1\n".to_owned();
    for number in 0..names {
        let (name, address) = service(number);
        writeln!(text, "{name}.bench.svc A {address}").ok();
    }
    Ok(node.write(file, &text)?.display().to_string())
}

fn knot(node: &Node, names: usize) -> Result<Vec<String>> {
    let file = zone(node, "knot.zone", names)?;
    let dir = node.dir().display();
    let text = format!(
        "server:\n  rundir: {dir}\n  listen: 127.0.0.13@53\n  udp-workers: 2\ndatabase:\n  storage: {dir}/knot\nlog:\n  - target: stderr\n    \
         any: warning\nzone:\n  - domain: cluster.local\n    file: {file}\n    zonefile-sync: -1\n    journal-content: none\n"
    );
    let path = node.write("knot.conf", &text)?.display().to_string();
    Ok(words(&["knotd", "-c", &path]))
}

fn nsd(node: &Node, names: usize) -> Result<Vec<String>> {
    let file = zone(node, "nsd.zone", names)?;
    let dir = node.dir().display();
    let text = format!(
        "server:\n  ip-address: 127.0.0.14\n  server-count: 2\n  reuseport: yes\n  username: \"\"\n  chroot: \"\"\n  zonesdir: \"{dir}\"\n  \
         database: \"\"\n  pidfile: \"{dir}/nsd.pid\"\n  xfrdfile: \"{dir}/nsd.xfrd\"\n  zonelistfile: \"{dir}/nsd.list\"\n  \
         xfrdir: \"{dir}\"\n  cookie-secret-file: \"{dir}/nsd.cookie\"\n  rrl-ratelimit: 0\nremote-control:\n  control-enable: no\n\
         zone:\n  name: cluster.local\n  zonefile: {file}\n"
    );
    let path = node.write("nsd.conf", &text)?.display().to_string();
    Ok(words(&["nsd", "-d", "-c", &path]))
}
