//! Real container runtimes: podman with its CNI backend, and containerd with `ctr run --cni`.

use std::{
    fs,
    io::{BufRead as _, BufReader, Read as _},
    net::{IpAddr, SocketAddr},
    path::Path,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::json;

use crate::harness::{Machine, STOCK, inside, plugin, run};

/// What a container on two busy cores needs to be there, with much to spare.
const LIMIT: Duration = Duration::from_secs(30);

/// The port on which containers say hello.
const PORT: u16 = 7000;

/// What the second container asks the first one.
const GREET: &str = "while :; do /bin/nc -l -p 7000 -e /bin/echo hello; done";

#[test]
fn podman_runs_containers_in_the_mesh_and_leaves_nothing() -> Result<()> {
    let runtime = Runtime::new()?;
    let podman = |words: &[&str]| {
        let shared = runtime.podman();
        let all: Vec<&str> = shared
            .iter()
            .map(String::as_str)
            .chain(words.iter().copied())
            .collect();
        runtime.command(&all)
    };
    let tar = runtime.path("rootfs.tar");
    podman(&["import", &tar, "local/busybox:1"])?;
    let parent = runtime.cgroup();
    let flags = [
        "run",
        "--network",
        "mesh",
        "--cgroup-parent",
        &parent,
        "--name",
    ];
    let start = |name: &str, more: &[&str]| podman(&[&flags[..], &[name], more].concat());
    start("one", &["-d", "local/busybox:1", "/bin/sh", "-c", GREET])?;
    let one = runtime.addresses()?;
    runtime.greets(&one)?;
    let shown = start("two", &["local/busybox:1", "/bin/ip", "-o", "address"])?;
    ensure!(
        shown.contains("10.77.0.") && shown.contains("fd77::"),
        "{shown}"
    );
    let v4 = one[0].to_string();
    let asks = ["local/busybox:1", "/bin/nc", &v4, "7000"];
    assert_eq!(start("three", &asks)?.trim(), "hello");
    podman(&["rm", "-f", "-t", "0", "-a"])?;
    assert!(runtime.machine.ports()?.is_empty());
    assert!(runtime.machine.attachments()?.is_empty());
    Ok(())
}

#[test]
fn containerd_runs_containers_in_the_mesh_and_leaves_nothing() -> Result<()> {
    let runtime = Runtime::new()?;
    let daemon = runtime.containerd()?;
    let ctr = |words: &[&str]| {
        let socket = runtime.path("containerd.sock");
        runtime.command(&[&["ctr", "-a", &socket][..], words].concat())
    };
    eventually(|| ctr(&["version"]).map(drop))?;
    ctr(&[
        "images",
        "import",
        "--snapshotter",
        "native",
        &runtime.archive()?,
    ])?;
    let image = "local.invalid/busybox:1";
    let flags = [
        "run",
        "--cni",
        "--rm",
        "--cgroup",
        "",
        "--snapshotter",
        "native",
        image,
    ];
    let start = |name: &str, more: &[&str]| ctr(&[&flags[..], &[name], more].concat());
    thread::scope(|scope| -> Result<()> {
        // It stays in the foreground: only then `ctr` calls DEL.
        let first = scope.spawn(|| start("one", &["/bin/sh", "-c", GREET]));
        let tried = (|| -> Result<()> {
            let one = eventually(|| runtime.addresses())?;
            runtime.greets(&one)?;
            let shown = start("two", &["/bin/ip", "-o", "address"])?;
            ensure!(
                shown.contains("10.77.0.") && shown.contains("fd77::"),
                "{shown}"
            );
            assert_eq!(
                start("three", &["/bin/nc", &one[0].to_string(), "7000"])?.trim(),
                "hello"
            );
            Ok(())
        })();
        let killed = ctr(&["task", "kill", "-s", "9", "one"]);
        // `ctr` ends as its container did: by a signal.
        drop(first.join());
        tried.and(killed.map(drop))
    })?;
    assert!(runtime.machine.ports()?.is_empty());
    assert!(runtime.machine.attachments()?.is_empty());
    drop(daemon);
    Ok(())
}

/// A node on which a runtime finds nothing but what the test gave it: its own network and mount namespace.
struct Runtime {
    machine: Machine,
    holder: Child,
}

impl Runtime {
    fn new() -> Result<Self> {
        let machine = Machine::new()?;
        let folder = machine.state_dir().to_owned();
        let path = |name: &str| folder.join(name).display().to_string();
        for name in ["bin", "net.d", "rootfs/bin", "podman/tmp", "opt"] {
            fs::create_dir_all(folder.join(name))?;
        }
        for name in ["portmap", "loopback"] {
            std::os::unix::fs::symlink(Path::new(STOCK).join(name), folder.join("bin").join(name))?;
        }
        let program = plugin().display().to_string();
        let places = ["--conf-dir", &path("net.d"), "--bin-dir", &path("bin")];
        let rest = ["--state-dir", &path(""), "--network", "mesh"];
        run(&program, &[&["install"], &places[..], &rest].concat())?;
        fs::copy("/usr/bin/busybox", folder.join("rootfs/bin/busybox"))
            .context("copy /usr/bin/busybox (is busybox-static installed?)")?;
        for name in ["sh", "ip", "nc", "echo"] {
            std::os::unix::fs::symlink("busybox", folder.join("rootfs/bin").join(name))?;
        }
        run(
            "tar",
            &["-C", &path("rootfs"), "-cf", &path("rootfs.tar"), "."],
        )?;
        // Waits for the end of its input, which comes with the end of the test at the latest.
        let script = "set -e
            for place in /run /var/lib/cni /dev/shm /opt; do
                if [ -d $place ]; then mount -t tmpfs none $place; fi
            done
            mkdir -p /run/netns /opt/cni/bin
            mount --bind \"$0/bin\" /opt/cni/bin
            mount --bind \"$0/net.d\" /etc/cni/net.d
            echo ready
            exec cat";
        let mut command = Command::new("unshare");
        command
            .args(["--mount", "sh", "-c", script, &folder.display().to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        let mut holder = inside(&machine.namespace, || Ok(command.spawn()?))?;
        let mut line = String::new();
        let out = holder.stdout.as_mut().context("no output")?;
        BufReader::new(out).read_line(&mut line)?;
        ensure!(line == "ready\n", "no mount namespace: {line:?}");
        Ok(Self { machine, holder })
    }

    fn path(&self, name: &str) -> String {
        self.machine.state_dir().join(name).display().to_string()
    }

    /// The parent of podman's cgroups, which nobody else has: it does not remove it.
    fn cgroup(&self) -> String {
        format!("/holdfast-cni-{}", self.holder.id())
    }

    /// A program on this node.
    fn prepare(&self, words: &[&str]) -> Command {
        let mut command = Command::new("nsenter");
        command
            .args([
                "--mount",
                "--net",
                "--target",
                &self.holder.id().to_string(),
                "--",
            ])
            .args(words)
            .env("CONTAINERS_CONF", self.path("containers.conf"))
            .stdin(Stdio::null());
        command
    }

    /// Runs a program on this node. Its output may stay open behind it: podman's helpers inherit it.
    fn command(&self, words: &[&str]) -> Result<String> {
        let (out, errors) = (tempfile::tempfile()?, tempfile::tempfile()?);
        let mut command = self.prepare(words);
        command.stdout(out.try_clone()?).stderr(errors.try_clone()?);
        let mut child = command.spawn()?;
        let start = Instant::now();
        let status = loop {
            if let Some(status) = child.try_wait()? {
                break status;
            }
            if start.elapsed() > 2 * LIMIT {
                child.kill()?;
                child.wait()?;
                bail!("{words:?}: not within {:?}", 2 * LIMIT);
            }
            thread::sleep(Duration::from_millis(5));
        };
        let (out, errors) = (again(out)?, again(errors)?);
        ensure!(status.success(), "{words:?}: {status} {out} {errors}");
        Ok(out)
    }

    /// podman with folders of its own, and limits that are allowed everywhere.
    fn podman(&self) -> Vec<String> {
        let plugins = [self.path("bin")];
        let config = format!(
            "[containers]\ndefault_ulimits = [\"nofile=1024:1024\", \"nproc=1024:1024\"]\n\
             [network]\nnetwork_backend = \"cni\"\ncni_plugin_dirs = {plugins:?}\nnetwork_config_dir = {:?}\n\
             [engine]\nruntime = \"runc\"\ncgroup_manager = \"cgroupfs\"\nevents_logger = \"file\"\n",
            self.path("net.d"),
        );
        fs::write(self.path("containers.conf"), config).ok();
        let folder = |name: &str| self.path(&format!("podman/{name}"));
        let words = [
            "podman",
            "--storage-driver",
            "vfs",
            "--root",
            &folder("root"),
        ];
        let more = ["--runroot", &folder("run"), "--tmpdir", &folder("tmp")];
        words
            .iter()
            .chain(&more)
            .map(|word| (*word).to_owned())
            .collect()
    }

    fn containerd(&self) -> Result<Daemon> {
        let off = [
            "grpc.v1.cri",
            "snapshotter.v1.btrfs",
            "snapshotter.v1.zfs",
            "snapshotter.v1.devmapper",
        ];
        let off = off.map(|name| format!("io.containerd.{name}"));
        let (root, state, socket) = (
            self.path("containerd/root"),
            self.path("containerd/state"),
            self.path("containerd.sock"),
        );
        let config = format!(
            "version = 2\nroot = {root:?}\nstate = {state:?}\ndisabled_plugins = {off:?}\n[grpc]\naddress = {socket:?}\n"
        );
        let path = self.path("containerd.toml");
        fs::write(&path, config)?;
        let log = fs::File::create(self.path("containerd.log"))?;
        let mut command = self.prepare(&["containerd", "--config", &path]);
        command.stdout(log.try_clone()?).stderr(log);
        Ok(Daemon(command.spawn()?))
    }

    /// The image as `docker save` writes it.
    fn archive(&self) -> Result<String> {
        let sum = run("sha256sum", &[&self.path("rootfs.tar")])?;
        let sum = sum.split_whitespace().next().unwrap_or_default();
        let config = json!({
            "architecture": if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" },
            "os": "linux",
            "config": {},
            "rootfs": {"type": "layers", "diff_ids": [format!("sha256:{sum}")]},
        });
        let image = "local.invalid/busybox:1";
        let manifest =
            json!([{"Config": "config.json", "RepoTags": [image], "Layers": ["rootfs.tar"]}]);
        fs::write(self.path("config.json"), config.to_string())?;
        fs::write(self.path("manifest.json"), manifest.to_string())?;
        let path = self.path("image.tar");
        let files = ["manifest.json", "config.json", "rootfs.tar"];
        run(
            "tar",
            &[&["-C", &self.path(""), "-cf", &path], &files[..]].concat(),
        )?;
        Ok(path)
    }

    /// Those of the one container that is there.
    fn addresses(&self) -> Result<Vec<IpAddr>> {
        let attachments = self.machine.attachments()?;
        let [attachment] = attachments.as_slice() else {
            bail!("{} attachments", attachments.len());
        };
        ensure!(attachment.host.is_some(), "not made yet");
        Ok(attachment.addresses.clone())
    }

    /// The node hears hello from the container at each of its addresses.
    fn greets(&self, addresses: &[IpAddr]) -> Result<()> {
        assert_eq!(addresses.len(), 2);
        for address in addresses {
            let heard = eventually(|| {
                let mut stream = self.machine.connect(SocketAddr::new(*address, PORT))?;
                let mut heard = String::new();
                stream.read_to_string(&mut heard)?;
                Ok(heard)
            })?;
            assert_eq!(heard, "hello\n", "{address}");
        }
        Ok(())
    }
}

impl Drop for Runtime {
    fn drop(&mut self) {
        if Path::new(&self.path("podman/root")).exists() {
            let words = self.podman();
            let mut words: Vec<&str> = words.iter().map(String::as_str).collect();
            words.extend(["rm", "-f", "-t", "0", "-a"]);
            self.command(&words).ok();
        }
        for hierarchy in fs::read_dir("/sys/fs/cgroup")
            .into_iter()
            .flatten()
            .flatten()
        {
            let parent = hierarchy.path().join(self.cgroup().trim_start_matches('/'));
            for child in fs::read_dir(&parent).into_iter().flatten().flatten() {
                fs::remove_dir(child.path()).ok(); // Files in it are the kernel's.
            }
            fs::remove_dir(&parent).ok();
        }
        self.holder.kill().ok();
        self.holder.wait().ok();
    }
}

/// `nsenter` becomes the daemon, so that the child's id is the daemon's.
struct Daemon(Child);

impl Drop for Daemon {
    fn drop(&mut self) {
        run("kill", &[&self.0.id().to_string()]).ok();
        self.0.wait().ok();
    }
}

fn again(mut file: fs::File) -> Result<String> {
    use std::io::Seek as _;
    let mut text = String::new();
    file.rewind()?;
    file.read_to_string(&mut text)?;
    Ok(text)
}

fn eventually<T>(mut look: impl FnMut() -> Result<T>) -> Result<T> {
    let start = Instant::now();
    loop {
        match look() {
            Err(_) if start.elapsed() < LIMIT => thread::sleep(Duration::from_millis(20)),
            done => return done,
        }
    }
}
