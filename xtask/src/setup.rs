//! What a machine needs for labs, and how it gets it.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail, ensure};
use netns_tests::{lab, tool};

use crate::{
    cargo, root,
    sid::{self, succeed},
};

/// A program or a file, and the Debian package that brings it.
const PACKAGES: &[(&str, &str)] = &[
    ("ip", "iproute2"),
    ("nft", "nftables"),
    ("iptables", "iptables"),
    ("clang", "clang"),
    ("/usr/include/bpf/bpf_helpers.h", "libbpf-dev"),
    ("/usr/include/linux/bpf.h", "linux-libc-dev"),
    ("cc", "gcc"),
    ("curl", "curl"),
    ("strip", "binutils"),
    ("dpkg-deb", "dpkg"),
    ("buildah", "buildah"),
    ("dig", "dnsutils"),
    ("iperf3", "iperf3"),
    ("socat", "socat"),
    ("/usr/sbin/miniupnpd", "miniupnpd-nftables"),
    ("openssl", "openssl"),
    ("ssh", "openssh-client"),
    ("/usr/sbin/sshd", "openssh-server"),
    ("wireguard-go", "wireguard-go"),
    ("wg", "wireguard-tools"),
    ("tinyproxy", "tinyproxy-bin"),
    ("faketime", "faketime"),
    ("ping", "iputils-ping"),
    ("ps", "procps"),
    ("nsenter", "util-linux"),
    ("mkfs.ext4", "e2fsprogs"),
    ("mount", "mount"),
    ("bpftool", "bpftool"),
    ("/usr/lib/cni/bridge", "containernetworking-plugins"),
    ("podman", "podman"),
    ("containerd", "containerd"),
    ("runc", "runc"),
    ("busybox", "busybox-static"),
    ("musl-gcc", "musl-tools"),
    ("unbound", "unbound"),
    ("dnsmasq", "dnsmasq-base"),
    ("promtool", "prometheus"),
    ("etcd", "etcd-server"),
    ("etcdctl", "etcd-client"),
];

/// WireGuard programs that tests talk to, and the packages of crates.io that bring them.
const WIREGUARD_PEERS: &[(&str, &str)] = &[
    ("boringtun-cli", "boringtun-cli"),
    ("gotatun", "gotatun-cli"),
];

/// Resolvers and name servers that a bench measures beside ours, unbound and dnsmasq apart, and what loads them.
const DNS_PACKAGES: &[(&str, &str)] = &[("dnsperf", "dnsperf"), ("knotd", "knot"), ("nsd", "nsd")];

/// tcx links came with Linux 6.6.
const KERNEL_MIN: (u32, u32) = (6, 6);

/// `kubectl exec` and `port-forward` as the tests use them: by WebSocket since 1.31. Debian 12 has 1.20.
const KUBECTL_MIN: (u32, u32) = (1, 31);

/// A folder with a `kubectl` that is new enough, if the system has none.
///
/// # Errors
///
/// If there is none to be had.
pub(crate) fn kubectl() -> Result<Option<PathBuf>> {
    let asked = tool::run("kubectl", &["version", "--client", "-o", "json"], "");
    let said: Option<serde_json::Value> =
        asked.ok().and_then(|said| serde_json::from_str(&said).ok());
    let found = said.and_then(|said| {
        let text = said.pointer("/clientVersion/gitVersion")?.as_str()?;
        version(text.trim_start_matches('v'))
    });
    if found.is_some_and(|found| found >= KUBECTL_MIN) {
        return Ok(None);
    }
    let program = sid::program("kubectl", "kubectl")?;
    Ok(program.parent().map(Path::to_owned))
}

/// Installs what is missing and checks the rest.
///
/// # Errors
///
/// If something is missing that cannot be installed: every such thing at once, each with how to
/// get it.
pub(crate) fn ready() -> Result<()> {
    let uid = fs::metadata("/proc/self").context("read /proc/self")?;
    let root = std::os::unix::fs::MetadataExt::uid(&uid) == 0;
    ensure!(
        root,
        "not root: the lab makes network namespaces, TUN devices and BPF programs; run it with sudo"
    );
    install(PACKAGES)?;
    let problems: Vec<_> = CHECKS.iter().filter_map(|check| check().err()).collect();
    let lines: Vec<_> = problems
        .iter()
        .map(|problem| format!("\n  {problem:#}"))
        .collect();
    ensure!(lines.is_empty(), "this machine lacks:{}", lines.concat());
    Ok(())
}

/// Installs what the bench of DNS needs.
///
/// # Errors
///
/// If something cannot be installed.
pub(crate) fn dns_servers() -> Result<()> {
    install(DNS_PACKAGES)
}

const CHECKS: &[fn() -> Result<()>] = &[tun, cgroup2, btf, kernel, namespaces, bpf];

fn tun() -> Result<()> {
    let open = fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/net/tun");
    open.map(drop).context(
        "/dev/net/tun: `modprobe tun`; in a container, pass the device in (--device /dev/net/tun)",
    )
}

fn cgroup2() -> Result<()> {
    let mount = lab::cgroup_mount()?;
    ensure!(
        mount.join("cgroup.procs").exists(),
        "a readable cgroup2 at {}: `mount -t cgroup2 none /sys/fs/cgroup`",
        mount.display()
    );
    Ok(())
}

fn btf() -> Result<()> {
    let there = Path::new("/sys/kernel/btf/vmlinux").exists();
    ensure!(
        there,
        "/sys/kernel/btf/vmlinux: a kernel with CONFIG_DEBUG_INFO_BTF=y, as Debian's is"
    );
    Ok(())
}

fn kernel() -> Result<()> {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let found =
        version(&release).with_context(|| format!("unreadable kernel release {release}"))?;
    let (major, minor) = KERNEL_MIN;
    ensure!(
        found >= KERNEL_MIN,
        "tcx: Linux {major}.{minor} or newer (this is {}); Debian 13's kernel has it",
        release.trim()
    );
    Ok(())
}

fn version(release: &str) -> Option<(u32, u32)> {
    let mut parts = release.split(['.', '-']);
    Some((
        parts.next()?.parse().ok()?,
        parts.next()?.trim().parse().ok()?,
    ))
}

/// Tries the real thing in a namespace that ends with the command.
fn namespaces() -> Result<()> {
    let script = "set -e
ip link add v0 type veth peer name v1
ip link add b0 type bridge
nft add table ip t
nft add chain ip t c '{ type nat hook postrouting priority 100; }'
nft add rule ip t c oifname v0 masquerade fully-random";
    let tried = tool::run("unshare", &["--net", "sh", "-c", script], "");
    tried.map(drop).context(
        "network namespaces with veth, bridge and nftables NAT: CONFIG_NET_NS, CONFIG_VETH, CONFIG_BRIDGE, \
         CONFIG_NFT_NAT, CONFIG_NFT_MASQ; in a container, --privileged",
    )
}

fn bpf() -> Result<()> {
    let listed = tool::run("bpftool", &["prog", "list"], "");
    listed
        .map(drop)
        .context("the bpf system call: CONFIG_BPF_SYSCALL, CAP_BPF; in a container, --privileged")
}

/// Installs the packages of what is missing: a program's name or a path, and its package.
///
/// # Errors
///
/// If something is still missing then.
pub(crate) fn install(wanted: &[(&str, &str)]) -> Result<()> {
    let missing = |wanted: &[(&str, &str)]| -> Vec<String> {
        let missing = wanted.iter().filter(|(what, _)| !is_there(what));
        missing.map(|(_, package)| (*package).to_owned()).collect()
    };
    let packages = missing(wanted);
    if packages.is_empty() {
        return Ok(());
    }
    eprintln!("installing {} …", packages.join(" "));
    if !is_there("apt-get") {
        bail!(
            "{} missing, and this is no Debian: install them by hand",
            packages.join(", ")
        );
    }
    apt(&["update", "-q"])?;
    let mut words = vec!["install", "-q", "-y", "--no-install-recommends"];
    words.extend(packages.iter().map(String::as_str));
    apt(&words)?;
    let left = missing(wanted);
    ensure!(left.is_empty(), "still missing after apt-get: {left:?}");
    Ok(())
}

fn apt(words: &[&str]) -> Result<()> {
    succeed(Command::new("apt-get").args(words)).map(drop)
}

/// Installs what is missing of [`WIREGUARD_PEERS`]: unoptimised, which builds faster, and so in a
/// folder where no bench looks.
///
/// # Errors
///
/// If one cannot be built.
pub(crate) fn wireguard_peers() -> Result<()> {
    let target = root().join("target");
    for (program, package) in WIREGUARD_PEERS {
        let folders = ["bench-tools", "test-tools"].map(|folder| target.join(folder));
        if folders
            .iter()
            .any(|folder| folder.join("bin").join(program).is_file())
        {
            continue;
        }
        eprintln!("installing {package} …");
        let mut install = cargo(&["install", "--quiet", "--locked", "--debug", "--root"]);
        install.arg(target.join("test-tools")).arg(package);
        let output = install.output().context("start cargo")?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "cargo install {package}: {said}");
    }
    Ok(())
}

/// Unpacks systemd-resolved with the library that it needs: installed, it would become this machine's resolver.
///
/// # Errors
///
/// If it cannot be had.
pub(crate) fn resolved() -> Result<()> {
    let folder = root().join("target/test-tools/systemd-resolved");
    if folder.join("lib/systemd/systemd-resolved").is_file() {
        return Ok(());
    }
    eprintln!("unpacking systemd-resolved …");
    fs::create_dir_all(&folder)?;
    apt(&["update", "-q"])?;
    let mut download = Command::new("apt-get");
    download.args(["download", "-q", "systemd-resolved", "libsystemd-shared"]);
    succeed(download.current_dir(&folder))?;
    let archives = fs::read_dir(&folder)?.map(|entry| Ok(entry?.path()));
    let archives = archives.collect::<Result<Vec<_>>>()?;
    let is_archive = |path: &&PathBuf| path.extension().is_some_and(|ending| ending == "deb");
    for archive in archives.iter().filter(is_archive) {
        let mut unpack = Command::new("dpkg");
        succeed(unpack.arg("--extract").args([archive, &folder]))?;
    }
    Ok(())
}

fn is_there(what: &str) -> bool {
    if what.starts_with('/') {
        return Path::new(what).exists();
    }
    // Root's `PATH` lacks /usr/sbin on some machines, and cargo's children inherit it.
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path).any(|folder| folder.join(what).is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_releases_are_read() {
        assert_eq!(version("6.18.44-fc-v595\n"), Some((6, 18)));
        assert_eq!(version("6.6\n"), Some((6, 6)));
        assert_eq!(version("six"), None);
    }

    #[test]
    fn a_missing_program_is_noticed() {
        assert!(is_there("sh"));
        assert!(!is_there("no-such-program"));
        assert!(!is_there("/no/such/file"));
    }
}
