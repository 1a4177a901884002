//! Whether a machine, or a cluster, can have Holdfast: what was found, judged. Pure; what reads the machine is in
//! [`facts`], what asks the cluster in [`cluster`].

use std::{collections::BTreeMap, path::PathBuf};

use ipnet::IpNet;
use serde::Serialize;

use crate::table::duration;

pub(crate) mod cluster;
pub(crate) mod facts;

/// tcx links, by which the agent looks at packets, came with Linux 6.6.
const KERNEL_MIN: (u32, u32) = (6, 6);

/// What IPv6, UDP and WireGuard (its paper, §5.4.6) add to a packet of the mesh: 40 + 8 + 32 bytes; and 8
/// of a relay's header.
const OVERHEAD_BYTES: u32 = 88;

/// The overlay's MTU unless the MeshConfig says otherwise: IPv6's smallest (RFC 8200 §5).
const OVERLAY_MTU_BYTES: u32 = 1280;

/// An idle agent with 50 peers and 1,000 services keeps less than 30 MiB; twice that leaves room for a burst.
const MEMORY_MIN_BYTES: u64 = 64 << 20;

/// Two snapshot slots of a large mesh at 16 MiB each, and the keys.
const DISK_MIN_BYTES: u64 = 64 << 20;

/// Certificates are made valid from an hour before; half of that is too near to it.
const CLOCK_OFF_MAX_S: u64 = 30 * 60;

/// When this was written: no clock that is right says less. 2026-11-01.
const WRITTEN_UNIX_S: u64 = 1_793_491_200;

/// `CAP_NET_ADMIN`, `CAP_SYS_ADMIN` and `CAP_BPF` (capability.h), which the agent needs.
const CAPABILITIES: [(u32, &str); 3] = [
    (12, "CAP_NET_ADMIN"),
    (21, "CAP_SYS_ADMIN"),
    (39, "CAP_BPF"),
];

/// How it stands with one thing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Level {
    /// As it should be.
    Ok,
    /// It will work, but not all of it, or not for long.
    Warning,
    /// It will not work.
    Error,
}

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Check {
    /// What.
    pub(crate) name: String,
    pub(crate) level: Level,
    /// What was found, and what to do if that is not well.
    pub(crate) text: String,
}

pub(crate) fn check(name: &str, level: Level, text: impl Into<String>) -> Check {
    Check {
        name: name.to_owned(),
        level,
        text: text.into(),
    }
}

/// What the machine should be fit for.
#[derive(Debug, Clone)]
pub(crate) struct Wanted {
    /// UDP port of WireGuard.
    pub(crate) listen_port: u16,
    /// Overlay addresses come from here.
    pub(crate) overlay: IpNet,
    /// Name of the TUN device.
    pub(crate) interface: String,
}

/// As an agent of which nothing is said: the defaults of its file, and of the MeshConfig.
impl Default for Wanted {
    fn default() -> Self {
        Self {
            listen_port: 51_820,
            overlay: IpNet::new_assert([100, 96, 0, 0].into(), 12),
            interface: "holdfast0".to_owned(),
        }
    }
}

/// What was found, or why that cannot be known.
pub(crate) type Found<T> = Result<T, String>;

/// The machine.
#[derive(Debug, Clone)]
pub(crate) struct Facts {
    /// As `uname -r` says.
    pub(crate) kernel_release: Found<String>,
    pub(crate) machine: &'static str,
    /// The kernel describes its types.
    pub(crate) btf: bool,
    /// Where cgroup2 is mounted.
    pub(crate) cgroup2: Option<PathBuf>,
    /// The BPF file system is mounted at `/sys/fs/bpf`.
    pub(crate) bpffs: bool,
    /// `/dev/net/tun` can be opened.
    pub(crate) tun: Found<()>,
    /// `none`, `integrity` or `confidentiality`; none where the kernel has no lockdown.
    pub(crate) lockdown: Option<String>,
    /// Effective capabilities of this process.
    pub(crate) capabilities: Found<u64>,
    /// Whether the UDP port can be bound.
    pub(crate) port: Found<()>,
    /// Interfaces that exist, with their MTU in bytes.
    pub(crate) interfaces: BTreeMap<String, u32>,
    /// Routes of the main table: where to, by which interface.
    pub(crate) routes: Vec<(IpNet, String)>,
    /// CNI configurations in the order in which a kubelet reads them, with the types of their plug-ins.
    pub(crate) cni: Vec<(String, Found<Vec<String>>)>,
    /// By the machine's clock.
    pub(crate) now_unix_s: u64,
    /// Free below the state folder.
    pub(crate) disk_free_bytes: Found<u64>,
    /// Available, by `/proc/meminfo`.
    pub(crate) memory_bytes: Found<u64>,
}

/// Everything that matters to an agent here.
#[must_use]
pub(crate) fn judge(facts: &Facts, wanted: &Wanted) -> Vec<Check> {
    let running = facts.interfaces.contains_key(&wanted.interface);
    let mut checks = vec![
        kernel("kernel", &facts.kernel_release),
        machine("machine", facts.machine),
        capabilities(&facts.capabilities),
        presence(
            "BTF",
            facts.btf,
            Level::Error,
            "the kernel describes its types",
            "/sys/kernel/btf/vmlinux is missing: use a kernel built with CONFIG_DEBUG_INFO_BTF (all large distributions' are)",
        ),
        match &facts.cgroup2 {
            Some(path) => check(
                "cgroup2",
                Level::Ok,
                format!("mounted at {}", path.display()),
            ),
            None => check(
                "cgroup2",
                Level::Error,
                "not mounted: `mount -t cgroup2 none /sys/fs/cgroup/unified` (a folder of its own beside cgroup v1), or start the kernel with systemd.unified_cgroup_hierarchy=1",
            ),
        },
        presence(
            "BPF file system",
            facts.bpffs,
            Level::Warning,
            "mounted at /sys/fs/bpf",
            "not mounted at /sys/fs/bpf: services would end with the agent at each restart; `mount -t bpf bpf /sys/fs/bpf`",
        ),
        match &facts.tun {
            Ok(()) => check("TUN", Level::Ok, "/dev/net/tun opens"),
            Err(problem) => check(
                "TUN",
                Level::Error,
                format!(
                    "/dev/net/tun: {problem}: `modprobe tun`; in a container, pass the device in"
                ),
            ),
        },
        lockdown(facts.lockdown.as_deref()),
        port(&facts.port, wanted.listen_port, running),
    ];
    checks.extend(mtu(facts));
    checks.push(overlay(facts, wanted));
    checks.push(cni(&facts.cni));
    checks.push(clock(facts.now_unix_s, None));
    checks.push(room(
        "disk",
        &facts.disk_free_bytes,
        DISK_MIN_BYTES,
        "free for /var/lib/holdfast",
    ));
    checks.push(room(
        "memory",
        &facts.memory_bytes,
        MEMORY_MIN_BYTES,
        "available",
    ));
    checks
}

/// `6.18.44-amd64` → (6, 18).
fn release(text: &str) -> Option<(u32, u32)> {
    let mut numbers = text.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

fn kernel(name: &str, found: &Found<String>) -> Check {
    let (major, minor) = KERNEL_MIN;
    match found {
        Err(problem) => check(name, Level::Error, problem),
        Ok(text) => match release(text) {
            Some(version) if version >= KERNEL_MIN => {
                check(name, Level::Ok, format!("Linux {text}"))
            }
            Some(_) => check(
                name,
                Level::Error,
                format!("Linux {text} is older than {major}.{minor}: install a newer kernel"),
            ),
            None => check(
                name,
                Level::Warning,
                format!("{text:?} is no version that is understood; {major}.{minor} is needed"),
            ),
        },
    }
}

fn machine(name: &str, found: &str) -> Check {
    match found {
        "x86_64" | "aarch64" | "amd64" | "arm64" => check(name, Level::Ok, found),
        other => check(
            name,
            Level::Error,
            format!("{other}: there are images for amd64 and arm64 only"),
        ),
    }
}

fn capabilities(found: &Found<u64>) -> Check {
    let name = "capabilities";
    let has = match found {
        Ok(has) => has,
        Err(problem) => return check(name, Level::Warning, problem),
    };
    let missing = CAPABILITIES
        .iter()
        .filter(|(number, _)| has >> number & 1 == 0);
    let missing: Vec<_> = missing.map(|(_, capability)| *capability).collect();
    if missing.is_empty() {
        check(name, Level::Ok, "those that the agent needs")
    } else {
        let text = format!(
            "this process has not {}: run it as root, or what it says of TUN and the port is of no use",
            missing.join(", ")
        );
        check(name, Level::Warning, text)
    }
}

fn presence(name: &str, is: bool, otherwise: Level, yes: &str, no: &str) -> Check {
    if is {
        check(name, Level::Ok, yes)
    } else {
        check(name, otherwise, no)
    }
}

fn lockdown(mode: Option<&str>) -> Check {
    match mode {
        Some("confidentiality") => check(
            "lockdown",
            Level::Error,
            "the kernel is locked down for confidentiality, so that BPF programs cannot read: start it with lockdown=integrity or none",
        ),
        mode => check("lockdown", Level::Ok, mode.unwrap_or("none")),
    }
}

fn port(found: &Found<()>, number: u16, running: bool) -> Check {
    let name = "UDP port";
    match found {
        Ok(()) => check(name, Level::Ok, format!("{number} is free")),
        Err(_) if running => check(name, Level::Ok, format!("{number} is the running agent's")),
        Err(problem) => check(
            name,
            Level::Error,
            format!(
                "{number} cannot be bound ({problem}): `ss -ulpn sport = :{number}` says whose it is; free it, or give the agent another `listen_port`"
            ),
        ),
    }
}

/// Of every interface by which a default route leaves.
fn mtu(facts: &Facts) -> Vec<Check> {
    let needed = OVERLAY_MTU_BYTES + OVERHEAD_BYTES;
    let mut uplinks: Vec<&String> = facts
        .routes
        .iter()
        .filter(|(net, _)| net.prefix_len() == 0)
        .map(|(_, name)| name)
        .collect();
    uplinks.sort();
    uplinks.dedup();
    if uplinks.is_empty() {
        let text = "no default route: nothing to be said of the MTU; the node serves what is on its disk until there is one";
        return vec![check("MTU", Level::Warning, text)];
    }
    let of = |name: &String| match facts.interfaces.get(name) {
        Some(bytes) if *bytes >= needed => {
            check("MTU", Level::Ok, format!("{name}: {bytes} bytes"))
        }
        Some(bytes) => check(
            "MTU",
            Level::Error,
            format!(
                "{name}: {bytes} bytes, but {needed} are needed for packets of {OVERLAY_MTU_BYTES}: raise it"
            ),
        ),
        None => check("MTU", Level::Warning, format!("{name}: went away")),
    };
    uplinks.into_iter().map(of).collect()
}

/// Routes of others into the overlay's range: the more specific one would win, on this node only.
fn overlay(facts: &Facts, wanted: &Wanted) -> Check {
    let name = "overlay";
    let foreign = facts.routes.iter().find(|(net, interface)| {
        let overlaps = net.contains(&wanted.overlay) || wanted.overlay.contains(net);
        overlaps && net.prefix_len() > 0 && *interface != wanted.interface
    });
    match foreign {
        None => check(name, Level::Ok, format!("{} is free", wanted.overlay)),
        Some((net, interface)) => check(
            name,
            Level::Error,
            format!(
                "{} overlaps the route to {net} by {interface}: give the MeshConfig another spec.overlayIPv4CIDR",
                wanted.overlay
            ),
        ),
    }
}

fn cni(configs: &[(String, Found<Vec<String>>)]) -> Check {
    let name = "CNI";
    let ours = |types: &[String]| types.iter().any(|one| one == "mesh-cni");
    match configs {
        [] => check(
            name,
            Level::Ok,
            "no configuration: mesh-cni can be the node's plug-in",
        ),
        [(file, Err(problem)), ..] => check(
            name,
            Level::Error,
            format!("{file}: {problem}: the kubelet cannot use it either; mend or remove it"),
        ),
        [(file, Ok(types)), ..] if ours(types) => {
            check(name, Level::Ok, format!("{file} has mesh-cni"))
        }
        [(file, Ok(types)), rest @ ..] => {
            let late = rest
                .iter()
                .find(|(_, types)| types.as_ref().is_ok_and(|types| ours(types)));
            match late {
                Some((second, _)) => check(
                    name,
                    Level::Warning,
                    format!(
                        "{file} comes before {second}, so that mesh-cni is not asked: `mesh-cni install` again"
                    ),
                ),
                None => check(
                    name,
                    Level::Ok,
                    format!(
                        "{file} ({}): mesh-cni can be chained behind it",
                        types.join(", ")
                    ),
                ),
            }
        }
    }
}

/// `server_unix_s`: what the API server's clock says, if one was asked.
fn clock(now_unix_s: u64, server_unix_s: Option<u64>) -> Check {
    let name = "clock";
    if now_unix_s < WRITTEN_UNIX_S {
        let behind = duration(WRITTEN_UNIX_S - now_unix_s);
        let text = format!(
            "wrong: {behind} before this program was written. A node works all the same once it has joined; joining needs the right time"
        );
        return check(name, Level::Warning, text);
    }
    match server_unix_s.map(|server| server.abs_diff(now_unix_s)) {
        Some(off) if off > CLOCK_OFF_MAX_S => check(
            name,
            Level::Warning,
            format!(
                "{} away from the API server's: certificates that are made now may not count yet",
                duration(off)
            ),
        ),
        Some(_) => check(name, Level::Ok, "as the API server's"),
        None => check(name, Level::Ok, "plausible"),
    }
}

fn room(name: &str, found: &Found<u64>, needed: u64, what: &str) -> Check {
    let mib = |bytes: u64| bytes >> 20;
    match found {
        Err(problem) => check(name, Level::Warning, problem),
        Ok(bytes) if *bytes >= needed => {
            check(name, Level::Ok, format!("{} MiB {what}", mib(*bytes)))
        }
        Ok(bytes) => check(
            name,
            Level::Error,
            format!("{} MiB {what}, {} are needed", mib(*bytes), mib(needed)),
        ),
    }
}

#[cfg(test)]
mod tests;
