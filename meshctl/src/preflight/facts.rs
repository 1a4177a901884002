//! What this machine is: read from `/proc` and `/sys`, and by trying.

use std::{
    collections::BTreeMap,
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket},
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

use ipnet::IpNet;
use rustix::fs::statvfs;
use serde_json::Value;

use super::{Facts, Found, Wanted};

/// Where a kubelet looks for CNI configurations unless it is told otherwise.
const CNI_FOLDER: &str = "/etc/cni/net.d";

/// Route flags (route.h): it leads nowhere.
const RTF_REJECT: u32 = 0x200;

/// Looks at everything. Nothing that it cannot read keeps it from looking at the rest.
pub(crate) fn gather(wanted: &Wanted) -> Facts {
    let mounts = fs::read_to_string("/proc/mounts").unwrap_or_default();
    let release = fs::read_to_string("/proc/sys/kernel/osrelease");
    let tun = fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/net/tun");
    let bound = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, wanted.listen_port))
        .or_else(|_| UdpSocket::bind((Ipv4Addr::UNSPECIFIED, wanted.listen_port)));
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    Facts {
        kernel_release: said("/proc/sys/kernel/osrelease", release).map(|text| text.trim().into()),
        machine: std::env::consts::ARCH,
        btf: Path::new("/sys/kernel/btf/vmlinux").exists(),
        cgroup2: mounted(&mounts, "cgroup2").into_iter().next(),
        bpffs: mounted(&mounts, "bpf").contains(&PathBuf::from("/sys/fs/bpf")),
        tun: tun.map(drop).map_err(|error| error.to_string()),
        lockdown: fs::read_to_string("/sys/kernel/security/lockdown")
            .ok()
            .and_then(|text| chosen(&text)),
        capabilities: said("/proc/self/status", fs::read_to_string("/proc/self/status"))
            .and_then(|text| effective(&text)),
        port: bound.map(drop).map_err(|error| error.to_string()),
        interfaces: interfaces(),
        routes: routes(),
        cni: cni(Path::new(CNI_FOLDER)),
        now_unix_s: since.map_or(0, |since| since.as_secs()),
        disk_free_bytes: disk_free(Path::new("/var/lib/holdfast")),
        memory_bytes: said("/proc/meminfo", fs::read_to_string("/proc/meminfo"))
            .and_then(|text| available(&text)),
    }
}

fn said<T>(path: &str, result: std::io::Result<T>) -> Found<T> {
    result.map_err(|error| format!("{path}: {error}"))
}

/// Where file systems of this type are mounted, by `/proc/mounts`.
fn mounted(mounts: &str, kind: &str) -> Vec<PathBuf> {
    let at = |line: &str| {
        let mut words = line.split(' ');
        let (_, path, found) = (words.next()?, words.next()?, words.next()?);
        (found == kind).then(|| PathBuf::from(path))
    };
    mounts.lines().filter_map(at).collect()
}

/// `none [integrity] confidentiality` → `integrity`.
fn chosen(text: &str) -> Option<String> {
    let (_, rest) = text.split_once('[')?;
    let (word, _) = rest.split_once(']')?;
    Some(word.to_owned())
}

fn effective(status: &str) -> Found<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let value = line.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok());
    value.ok_or_else(|| "/proc/self/status has no CapEff".to_owned())
}

fn available(meminfo: &str) -> Found<u64> {
    let line = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|rest| rest.trim().strip_suffix("kB"));
    let kib = kib.and_then(|number| number.trim().parse::<u64>().ok());
    kib.map(|kib| kib << 10)
        .ok_or_else(|| "/proc/meminfo has no MemAvailable".to_owned())
}

/// At the folder, or the nearest one above it that exists.
fn disk_free(folder: &Path) -> Found<u64> {
    let there = folder.ancestors().find(|path| path.exists());
    let there = there.unwrap_or(Path::new("/"));
    match statvfs(there) {
        Ok(found) => Ok(found.f_bavail.saturating_mul(found.f_frsize)),
        Err(error) => Err(format!("{}: {error}", there.display())),
    }
}

fn interfaces() -> BTreeMap<String, u32> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir("/sys/class/net")
        .into_iter()
        .flatten()
        .flatten()
    {
        let mtu = fs::read_to_string(entry.path().join("mtu"));
        if let Some(mtu) = mtu.ok().and_then(|text| text.trim().parse().ok()) {
            found.insert(entry.file_name().to_string_lossy().into_owned(), mtu);
        }
    }
    found
}

fn routes() -> Vec<(IpNet, String)> {
    let v4 = fs::read_to_string("/proc/net/route").unwrap_or_default();
    let v6 = fs::read_to_string("/proc/net/ipv6_route").unwrap_or_default();
    let v4 = v4.lines().skip(1).filter_map(route_v4);
    v4.chain(v6.lines().filter_map(route_v6)).collect()
}

/// Interface, destination, gateway, flags, three counters, mask: addresses in hex as the machine has them in memory.
fn route_v4(line: &str) -> Option<(IpNet, String)> {
    let words: Vec<_> = line.split_whitespace().collect();
    let address = |index: usize| {
        let raw = u32::from_str_radix(words.get(index)?, 16).ok()?;
        Some(Ipv4Addr::from(raw.to_ne_bytes()))
    };
    let flags = u32::from_str_radix(words.get(3)?, 16).ok()?;
    let net = IpNet::with_netmask(IpAddr::V4(address(1)?), IpAddr::V4(address(7)?)).ok()?;
    (flags & RTF_REJECT == 0).then(|| (net, (*words.first()?).to_owned()).into())?
}

/// Destination and prefix length, source and its, next hop, metric, two counters, flags, interface.
fn route_v6(line: &str) -> Option<(IpNet, String)> {
    let words: Vec<_> = line.split_whitespace().collect();
    let raw = u128::from_str_radix(words.first()?, 16).ok()?;
    let length = u8::from_str_radix(words.get(1)?, 16).ok()?;
    let flags = u32::from_str_radix(words.get(8)?, 16).ok()?;
    let net = IpNet::new(IpAddr::V6(Ipv6Addr::from_bits(raw)), length).ok()?;
    let interface = (*words.get(9)?).to_owned();
    (flags & RTF_REJECT == 0).then_some((net, interface))
}

/// Configurations as a kubelet reads them: by name, with these endings.
fn cni(folder: &Path) -> Vec<(String, Found<Vec<String>>)> {
    let mut files: Vec<PathBuf> = fs::read_dir(folder)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| {
            let ending = path.extension().and_then(|ending| ending.to_str());
            matches!(ending, Some("conf" | "conflist" | "json"))
        })
        .collect();
    files.sort();
    let read = |path: &PathBuf| {
        let text = fs::read_to_string(path).map_err(|error| error.to_string());
        (
            path.display().to_string(),
            text.and_then(|text| types(&text)),
        )
    };
    files.iter().map(read).collect()
}

/// Types of the plug-ins of a configuration, or of a list of them.
fn types(text: &str) -> Found<Vec<String>> {
    let config: Value = serde_json::from_str(text).map_err(|error| error.to_string())?;
    let plugins = config.get("plugins").and_then(Value::as_array);
    let plugins = plugins.map_or_else(|| vec![&config], |plugins| plugins.iter().collect());
    let kind = |plugin: &Value| plugin.get("type")?.as_str().map(str::to_owned);
    let types: Option<Vec<String>> = plugins.into_iter().map(kind).collect();
    types.ok_or_else(|| "a plug-in in it has no type".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_s_tables_are_understood() {
        let v4 = "eth0\t0000FEA9\t00000000\t0001\t0\t0\t0\t0000FFFF\t0\t0\t0";
        let net = |text: &str| text.parse::<IpNet>().unwrap();
        if cfg!(target_endian = "little") {
            assert_eq!(route_v4(v4), Some((net("169.254.0.0/16"), "eth0".into())));
        }
        let reject = v4.replace("\t0001\t", "\t0200\t");
        assert_eq!(route_v4(&reject), None);
        let v6 = "fd00000000000000000000000000abcd 40 00000000000000000000000000000000 00 \
                  00000000000000000000000000000000 00000100 00000001 00000000 00000001     eth1";
        assert_eq!(route_v6(v6), Some((net("fd00::abcd/64"), "eth1".into())));
        for broken in ["", "eth0", "eth0\tx\ty\tz\t0\t0\t0\tw", &v6[..60]] {
            assert_eq!(route_v4(broken), None, "{broken}");
            assert_eq!(route_v6(broken), None, "{broken}");
        }
        let mounts = "none /sys/fs/cgroup/unified cgroup2 rw 0 0\nbpf /sys/fs/bpf bpf rw 0 0\n";
        let path = PathBuf::from("/sys/fs/cgroup/unified");
        assert_eq!(mounted(mounts, "cgroup2"), [path]);
        assert!(mounted(mounts, "tmpfs").is_empty());
        let lockdown = chosen("none [integrity] confidentiality\n");
        assert_eq!(lockdown.as_deref(), Some("integrity"));
        assert_eq!(
            effective("Name:\tx\nCapEff:\t0000000000001000\n"),
            Ok(1 << 12)
        );
        assert_eq!(available("MemAvailable:   2048 kB\n"), Ok(2 << 20));
    }

    #[test]
    fn configurations_are_read_in_the_kubelet_s_order() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| fs::write(folder.path().join(name), text).unwrap();
        write("20-b.conf", r#"{"type":"bridge"}"#);
        write(
            "10-a.conflist",
            r#"{"plugins":[{"type":"ptp"},{"type":"portmap"}]}"#,
        );
        write("30-c.json", "{");
        write("05-no.txt", "");
        let found = cni(folder.path());
        let types: Vec<_> = found.iter().map(|(_, types)| types.clone().ok()).collect();
        let texts = |texts: &[&str]| Some(texts.iter().map(|&text| text.to_owned()).collect());
        assert_eq!(
            types,
            [texts(&["ptp", "portmap"]), texts(&["bridge"]), None]
        );
    }

    #[test]
    fn this_machine_can_be_looked_at() {
        let wanted = Wanted {
            listen_port: 0,
            overlay: "100.96.0.0/12".parse().unwrap(),
            interface: "holdfast0".into(),
        };
        let facts = gather(&wanted);
        assert!(facts.interfaces.contains_key("lo"));
        assert_eq!(facts.port, Ok(()));
        assert!(facts.memory_bytes.is_ok() && facts.disk_free_bytes.is_ok());
        let Ok(release) = facts.kernel_release else {
            panic!("no release");
        };
        assert!(super::super::release(&release).is_some(), "{release}");
    }
}
