//! `cargo xtask wireguard-netns`: WireGuard's own test script, with `mesh-tunnel` as the WireGuard.
//!
//! The script is not ours (GPL-2.0) and is taken from Debian's package of the kernel's source. It tests
//! what `ip link add type wireguard` makes. What has to be different for a program, and why, is
//! in `mesh-tunnel/README.md`; here is how: [`IP`] stands before the real `ip`, and [`CHANGES`] are
//! what its text says otherwise. A script that takes a program as its argument, as wireguard-go's does,
//! is run as it is.

use std::{
    env, fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use netns_tests::{node::tail, tool};

use crate::{cargo, report, root, setup};

/// What the script needs beside what every lab does.
const PACKAGES: &[(&str, &str)] = &[
    ("ncat", "ncat"),
    ("xz", "xz-utils"),
    ("unshare", "util-linux"),
];

/// Where the script is in the kernel's source.
const SCRIPT: &str = "tools/testing/selftests/wireguard/netns.sh";

/// Seconds for one run, which takes 100 on two cores.
const RUN_LIMIT_S: &str = "540";

/// What the script says when it has come to its end.
const LAST_WORDS: &str = "Objects that were created were also destroyed.";

/// A program sees within half a second that its socket is gone; machines are slow at times.
const ENDING: Duration = Duration::from_secs(5);

const LOOK_EVERY: Duration = Duration::from_millis(50);

/// `ip`, for whom interfaces of the type "wireguard" are programs.
///
/// Control sockets are files in one folder for all network namespaces, and the script has a `wg0`
/// in two at once. So every program has a folder of its own there, and whoever looks from a
/// namespace sees links to the sockets of the interfaces that are in it.
const IP: &str = r#"#!/bin/bash
set -e
view() { mkdir -p "$LAB/views/$1"; echo "$LAB/views/$1"; }
inside() { exec "$REAL_IP" netns exec "$2" "$LAB/inside" "$1" "${@:3}"; } # FOLDER NAMESPACE COMMAND…
case "$*" in
"netns exec "*)
	inside "$(view "$3")" "${@:3}"
	;;
"netns del "* | "netns delete "*)
	# The kernel's interfaces go with their namespace, but a process keeps its own. Whoever removes a
	# program's socket ends it (https://www.wireguard.com/xplatform/).
	for link in "$LAB/views/$3"/*; do rm -f "$(readlink "$link")" "$link"; done
	;;
"-n "*" link add "*" type wireguard")
	name=${*:$#-2:1}
	link=$(view "$2")/$name.sock
	# A program asked by its own name would wait so for the last one to end.
	for _ in {1..50}; do [[ -S $link ]] || break; sleep 0.1; done
	folder=$(mktemp -d "$LAB/program.XXXXXX")
	ln -sfn "$folder/$name.sock" "$link"
	inside "$folder" "$2" "$LAB/mesh-tunnel" "$name"
	;;
"-n "*" link set "*"netns "*)
	[[ $* =~ \ netns\ ([^ ]+) ]] && to=${BASH_REMATCH[1]}
	[[ $* =~ \ (wg[0-9]+)( |$) ]] && name=${BASH_REMATCH[1]}
	link=$(view "$2")/$name.sock
	if [[ -n $name && -S $link ]]; then mv -T "$link" "$(view "$to")/$name.sock"; fi
	;;
"-n "*" link add "*" type dummy")
	# Some kernels have no such type. A bridge without ports is another interface to have an address on.
	"$REAL_IP" "$@" 2>/dev/null || exec "$REAL_IP" "${@:1:$#-1}" bridge
	exit
	;;
esac
exec "$REAL_IP" "$@"
"#;

/// Runs a command that sees a folder's sockets as all that there are.
const INSIDE: &str = r#"#!/bin/sh
mount --bind "$1" /var/run/wireguard && shift && exec "$@"
"#;

/// Runs a script that sees no namespaces and no WireGuard devices of the machine's; its own go with it.
const APART: &str = r#"mount -t tmpfs none /run/netns && mount --bind "$LAB/views" /var/run/wireguard && exec bash "$@""#;

/// Runs the script so many times, the kernel's or another; says whether it held each time.
///
/// # Errors
///
/// If the machine is not fit for it, or there is no script.
pub(crate) fn run(script: Option<&Path>, runs: u32) -> Result<bool> {
    setup::ready()?;
    setup::install(PACKAGES)?;
    let folder = root().join("target/wireguard-netns");
    fs::create_dir_all(&folder)?;
    let script = match script {
        Some(path) => path.to_owned(),
        None => kernel_script(&folder)?,
    };
    let text = fs::read_to_string(&script);
    let text = text.with_context(|| format!("cannot read {}", script.display()))?;
    let program = program()?;
    let mut held = true;
    for run in 1..=runs {
        let start = Instant::now();
        let log = folder.join(format!("run-{run}.log"));
        let result = Lab::new(&program)?.run(&text, &log);
        let took = report::took(start.elapsed());
        match result {
            Ok(()) => println!("run {run} of {runs}: passed ({took})"),
            Err(error) => {
                held = false;
                println!("run {run} of {runs}: FAILED ({took}): {error:#}");
                println!("the end of {}:", log.display());
                let said = fs::read(&log).unwrap_or_default();
                println!("{}", tail(&String::from_utf8_lossy(&said)));
            }
        }
    }
    println!(
        "{} of {runs} runs held",
        if held { "all" } else { "not all" }
    );
    Ok(held)
}

/// `mesh-tunnel` as users have it.
fn program() -> Result<PathBuf> {
    eprintln!("building mesh-tunnel (release) …");
    let words = ["build", "--release", "--package", "mesh-tunnel"];
    let status = cargo(&words).status().context("start cargo")?;
    ensure!(status.success(), "mesh-tunnel does not build");
    let target =
        env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from);
    Ok(target.join("release/mesh-tunnel"))
}

/// The kernel's script, downloaded once with the kernel's whole source: 140 MB, of which the script
/// is kept.
fn kernel_script(folder: &Path) -> Result<PathBuf> {
    let script = folder.join("netns.sh");
    if script.is_file() {
        return Ok(script);
    }
    tool::run("apt-get", &["-q", "update"], "")?;
    let said = tool::run("apt-cache", &["depends", "linux-source"], "")?;
    let package = said
        .lines()
        .find_map(|line| line.trim().strip_prefix("Depends: "))
        .with_context(|| format!("linux-source stands for no package: {said}"))?;
    eprintln!("getting netns.sh of {package} (140 MB) …");
    let download = tempfile::tempdir_in(folder)?;
    let unpack = "set -e -o pipefail
        apt-get -q -o APT::Sandbox::User=root download \"$1\"
        dpkg-deb --fsys-tarfile ./*.deb | tar -xO --occurrence \"./usr/src/$1.tar.xz\" | tar -xJO --occurrence \"$1/$2\" >netns.sh";
    let mut command = Command::new("bash");
    command.args(["-c", unpack, "bash", package, SCRIPT]);
    let output = command.current_dir(download.path()).output()?;
    let unpacked = download.path().join("netns.sh");
    // The first `tar` is told that nobody wants the rest: only what came out counts.
    ensure!(
        fs::metadata(&unpacked).is_ok_and(|file| file.len() > 0),
        "cannot get {SCRIPT} of {package}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    fs::rename(unpacked, &script)?;
    Ok(script)
}

/// A folder with all that one run has; programs of it that are left end when it is dropped.
struct Lab(tempfile::TempDir);

impl Lab {
    fn new(program: &Path) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        // A copy: its path tells the programs of this run from all others.
        fs::copy(program, folder.path().join("mesh-tunnel"))?;
        fs::create_dir(folder.path().join("views"))?;
        fs::create_dir_all("/run/netns")?;
        fs::create_dir_all("/var/run/wireguard")?;
        for (name, text) in [("ip", IP), ("inside", INSIDE)] {
            let path = folder.path().join(name);
            fs::write(&path, text)?;
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
        }
        Ok(Self(folder))
    }

    /// Runs a script to its end; what it says goes to `log`.
    fn run(&self, text: &str, log: &Path) -> Result<()> {
        let folder = self.0.path();
        let path = env::var_os("PATH").unwrap_or_default();
        let real_ip = env::split_paths(&path).map(|folder| folder.join("ip"));
        let real_ip = real_ip.into_iter().find(|path| path.is_file());
        let takes_program = text.contains("program=$1");
        let (text, path) = if takes_program {
            (text.to_owned(), path)
        } else {
            let first = std::iter::once(folder.to_owned());
            (
                adapt(text)?,
                env::join_paths(first.chain(env::split_paths(&path)))?,
            )
        };
        let script = folder.join("netns.sh");
        fs::write(&script, text)?;
        let out = fs::File::create(log)?;
        let status = Command::new("timeout")
            .args([RUN_LIMIT_S, "unshare", "--mount", "sh", "-c", APART, "sh"])
            .arg(script)
            .arg(folder.join("mesh-tunnel"))
            .env("PATH", path)
            .env("LAB", folder)
            .env("REAL_IP", real_ip.context("ip")?)
            .stdin(Stdio::null())
            .stdout(out.try_clone()?)
            .stderr(out)
            .status()?;
        ensure!(status.success(), "the script ended with {status}");
        let said = fs::read(log)?;
        let whole = String::from_utf8_lossy(&said).contains(LAST_WORDS);
        ensure!(whole, "the script ended before its end");
        // The kernel's script reads of that in the kernel's log.
        let deadline = Instant::now() + ENDING;
        while !self.programs().is_empty() {
            let left = self.programs();
            ensure!(Instant::now() < deadline, "programs did not end: {left:?}");
            thread::sleep(LOOK_EVERY);
        }
        Ok(())
    }

    /// The processes of this run's programs.
    fn programs(&self) -> Vec<String> {
        let program = self.0.path().join("mesh-tunnel");
        let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
        let ours = processes.filter(|process| {
            fs::read_link(process.path().join("exe")).is_ok_and(|exe| exe == program)
        });
        ours.map(|process| process.file_name().to_string_lossy().into_owned())
            .collect()
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        for process in self.programs() {
            // It may have ended meanwhile.
            tool::run("kill", &[&process], "").ok();
        }
    }
}

/// What the kernel's script says, once, and what it says instead for a program.
const CHANGES: &[(&str, &str)] = &[
    // An interface of a program counts packets as they are inside the tunnel: 10 pings of 84 bytes, and
    // what IPv6 sends by itself. `wg` is asked for the numbers outside by the script's next lines.
    (
        "(ip2 -stats link show dev wg0)\n(( rx_bytes == 1372 && (tx_bytes == 1428 || tx_bytes == 1460) ))",
        "(ip2 -stats link show dev wg0)\n(( rx_bytes == 840 && tx_bytes >= 840 ))",
    ),
    (
        "(ip1 -stats link show dev wg0)\n(( tx_bytes == 1372 && (rx_bytes == 1428 || rx_bytes == 1460) ))",
        "(ip1 -stats link show dev wg0)\n(( rx_bytes == 840 && tx_bytes >= 840 ))",
    ),
    // The kernel refuses a packet that claims to be from one of its own addresses, so our ICMP errors are
    // from the address that nobody has. A packet filter of the script lets none of these through.
    (
        "From 10.0.0.100 icmp_seq=1",
        "From 192.168.241.1 icmp_seq=1",
    ),
    (
        "n0 iptables -t filter -A INPUT \\! -s 10.0.0.0/24 -i vethrs -j DROP",
        "",
    ),
];

/// The kernel's script for a program.
///
/// # Errors
///
/// If what has to be different is not there: then it is another script than the one that was read.
fn adapt(script: &str) -> Result<String> {
    let mut adapted = script.to_owned();
    for (theirs, ours) in CHANGES {
        let found = adapted.matches(theirs).count();
        ensure!(
            found == 1,
            "this is not the kernel's netns.sh as it is known: {theirs:?} is there {found} times, not once"
        );
        adapted = adapted.replace(theirs, ours);
    }
    Ok(adapted)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_program_cannot_do_is_asked_otherwise() {
        let texts = |which: fn(&(&'static str, &'static str)) -> &'static str| {
            CHANGES
                .iter()
                .map(which)
                .collect::<Vec<_>>()
                .join(" between\n")
        };
        let theirs = texts(|(theirs, _)| theirs);
        let ours = texts(|(_, ours)| ours);
        assert_eq!(adapt(&theirs).unwrap(), ours);
        // Another script is not changed blindly.
        assert!(adapt(&ours).is_err());
        assert!(adapt(&theirs.repeat(2)).is_err());
        assert!(adapt("").is_err());
    }
}
