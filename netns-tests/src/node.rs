//! A node: a network namespace, a cgroup, a name server of its own, folders, processes.

use std::{
    ffi::OsStr,
    fs::{self, File},
    io::{Read as _, Seek as _},
    net::Ipv4Addr,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::Arc,
    thread,
    time::Duration,
};

use anyhow::{Context, Result, anyhow, bail, ensure};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
    mount::{MountFlags, UnmountFlags, mount, unmount},
    process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open},
};

use crate::{sys, tool};

/// What a node's processes find in `/etc/resolv.conf` until told otherwise: nobody.
const NO_RESOLVER: &str = "nameserver 127.0.0.1\noptions timeout:1 attempts:1\n";

/// Folder of a node's WireGuard control sockets: `/run/wireguard` to its processes, so that two
/// nodes may have a device of one name.
const CONTROL_SOCKETS: &str = "wireguard";

/// Folder of a node's own bpffs: `/sys/fs/bpf` to its processes. What they pin ends with the mount.
const BPFFS: &str = "bpf";

/// A machine of the lab. Clones are the same machine.
#[derive(Debug, Clone)]
pub struct Node(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    name: String,
    netns: String,
    cgroup: PathBuf,
    dir: PathBuf,
}

/// What a finished command left.
#[derive(Debug)]
pub struct Output {
    /// How it ended.
    pub status: ExitStatus,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl Output {
    /// The standard output of a command that has to succeed.
    ///
    /// # Errors
    ///
    /// If it did not: what it said.
    pub fn ok(self) -> Result<String> {
        if self.status.success() {
            return Ok(self.stdout);
        }
        bail!(
            "{}: {} {}",
            self.status,
            self.stdout.trim(),
            self.stderr.trim()
        )
    }
}

impl Node {
    pub(crate) fn new(lab: &str, name: &str, labs: &Path, cgroups: &Path) -> Result<Self> {
        let netns = format!("{lab}-{name}");
        let shared = Shared {
            name: name.to_owned(),
            dir: labs.join(name),
            cgroup: cgroups.join(name),
            netns,
        };
        fs::create_dir_all(shared.dir.join("state"))?;
        fs::create_dir_all(shared.dir.join(CONTROL_SOCKETS))?;
        fs::create_dir_all(&shared.cgroup)?;
        let bpffs = shared.dir.join(BPFFS);
        fs::create_dir_all(&bpffs)?;
        mount("bpf", &bpffs, "bpf", MountFlags::empty(), None).context("mount a bpffs")?;
        tool::run("ip", &["netns", "add", &shared.netns], "")?;
        tool::ip(&shared.netns, "link set lo up\n")?;
        let node = Self(Arc::new(shared));
        node.set_resolver(NO_RESOLVER)?;
        Ok(node)
    }

    pub(crate) fn make_router(&self) -> Result<()> {
        self.sysctl("net/ipv4/ip_forward", "1")?;
        self.sysctl("net/ipv6/conf/all/forwarding", "1")?;
        self.sysctl("net/ipv4/conf/all/rp_filter", "0")?;
        self.sysctl("net/ipv4/conf/default/rp_filter", "0")
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// The name of its network namespace.
    #[must_use]
    pub fn netns(&self) -> &str {
        &self.0.netns
    }

    /// Its cgroup's folder.
    #[must_use]
    pub fn cgroup(&self) -> &Path {
        &self.0.cgroup
    }

    /// Its folder: configuration and logs; `state` below it is for daemons.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.0.dir
    }

    /// Writes a file into its folder.
    ///
    /// # Errors
    ///
    /// If the disk is full.
    pub fn write(&self, name: &str, content: &str) -> Result<PathBuf> {
        let path = self.dir().join(name);
        fs::write(&path, content).with_context(|| format!("write {}", path.display()))?;
        Ok(path)
    }

    /// Sets the content of `/etc/resolv.conf` for processes started from now on, and for those
    /// that run.
    ///
    /// # Errors
    ///
    /// If the disk is full.
    pub fn set_resolver(&self, content: &str) -> Result<()> {
        self.write("resolv.conf", content).map(drop)
    }

    /// Adds a public address beside the first one.
    ///
    /// # Errors
    ///
    /// If `ip` refuses.
    pub fn add_address(&self, address: Ipv4Addr, interface: &str) -> Result<()> {
        tool::ip(
            self.netns(),
            &format!("addr add {address}/32 dev {interface}\n"),
        )
    }

    /// Sets one of the namespace's `/proc/sys` values.
    ///
    /// # Errors
    ///
    /// If there is no such value.
    pub fn sysctl(&self, name: &str, value: &str) -> Result<()> {
        let path = Path::new("/proc/sys").join(name);
        self.enter(|| fs::write(&path, value))?
            .with_context(|| format!("set {}", path.display()))
    }

    /// Runs a closure on a thread inside the network namespace. Sockets made there stay there.
    ///
    /// # Errors
    ///
    /// If the namespace is gone, or the closure panicked.
    pub fn enter<T: Send>(&self, inside: impl FnOnce() -> T + Send) -> Result<T> {
        let entered = || sys::enter_netns(self.netns()).map(|()| inside());
        let joined = thread::scope(|scope| scope.spawn(entered).join());
        joined.map_err(|_| anyhow!("panicked inside {}", self.netns()))?
    }

    /// How many eBPF programs look at the packets of an interface.
    ///
    /// # Errors
    ///
    /// If there is no such interface.
    pub fn tcx_programs(&self, interface: &str) -> Result<u32> {
        let count = self.enter(|| sys::tcx_programs(interface))?;
        count.with_context(|| format!("ask for the programs on {interface} of {}", self.netns()))
    }

    /// A command that will run on this node: in its namespaces and its cgroup.
    ///
    /// # Errors
    ///
    /// If the `lab` binary is not built.
    pub fn command<S: AsRef<OsStr>>(&self, words: &[S]) -> Result<Command> {
        let mut command = Command::new(tool::binary("lab")?);
        command
            .args(["exec", self.netns()])
            .arg(self.cgroup())
            .arg(self.dir());
        command
            .args(words)
            .stdin(Stdio::null())
            .env("RUST_BACKTRACE", "0");
        Ok(command)
    }

    /// Starts a process with its output in `<dir>/<log>.log`. It is killed when dropped.
    ///
    /// # Errors
    ///
    /// If it cannot be started.
    pub fn spawn<S: AsRef<OsStr>>(&self, log: &str, words: &[S]) -> Result<Process> {
        self.spawn_with(log, self.command(words)?)
    }

    /// Like [`Self::spawn`], for a command that was changed since [`Self::command`] made it.
    ///
    /// # Errors
    ///
    /// If it cannot be started.
    pub fn spawn_with(&self, log: &str, mut command: Command) -> Result<Process> {
        let path = self.dir().join(format!("{log}.log"));
        let file = File::options().create(true).append(true).open(&path)?;
        command.stdout(file.try_clone()?).stderr(file);
        let child = command
            .spawn()
            .with_context(|| format!("start {command:?}"))?;
        Ok(Process {
            child,
            log: path,
            name: format!("{log} on {}", self.name()),
            kept: false,
        })
    }

    /// Runs a command to its end.
    ///
    /// # Errors
    ///
    /// If it cannot be started, or takes longer than `limit`: it is killed then.
    pub fn run<S: AsRef<OsStr>>(&self, words: &[S], limit: Duration) -> Result<Output> {
        self.run_with(self.command(words)?, limit)
    }

    /// Like [`Self::run`], for a command that was changed since [`Self::command`] made it.
    ///
    /// # Errors
    ///
    /// As [`Self::run`].
    pub fn run_with(&self, mut command: Command, limit: Duration) -> Result<Output> {
        let mut stdout = tempfile::tempfile()?;
        let mut stderr = tempfile::tempfile()?;
        command
            .stdout(stdout.try_clone()?)
            .stderr(stderr.try_clone()?);
        let mut child = command
            .spawn()
            .with_context(|| format!("start {command:?}"))?;
        let status = wait(&mut child, limit)?;
        if status.is_none() {
            child.kill()?;
            child.wait()?;
        }
        let stdout = read_again(&mut stdout)?;
        let stderr = read_again(&mut stderr)?;
        let Some(status) = status else {
            bail!(
                "{command:?} on {} took more than {limit:?}: {stdout}{stderr}",
                self.name()
            );
        };
        Ok(Output {
            status,
            stdout,
            stderr,
        })
    }
}

/// A process on a node; killed when dropped.
#[derive(Debug)]
pub struct Process {
    child: Child,
    log: PathBuf,
    name: String,
    kept: bool,
}

impl Process {
    /// Its number.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// What it wrote so far, this process and earlier ones with the same log.
    #[must_use]
    pub fn log(&self) -> String {
        let bytes = fs::read(&self.log).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Fails, with the end of its log, if it is no longer running.
    ///
    /// # Errors
    ///
    /// If it ended.
    pub fn running(&mut self) -> Result<()> {
        match self.child.try_wait()? {
            None => Ok(()),
            Some(status) => bail!("{} ended, {status}:\n{}", self.name, tail(&self.log())),
        }
    }

    /// Waits until it wrote so many lines more; it goes on.
    ///
    /// # Errors
    ///
    /// If it did not within `limit`, or ended.
    pub fn says_more(&mut self, lines: usize, limit: Duration) -> Result<()> {
        let count = |process: &Self| process.log().lines().count();
        let before = count(self);
        tool::eventually("it says more", limit, || {
            self.running()?;
            let more = count(self).saturating_sub(before);
            ensure!(more >= lines, "{} said {more} lines more", self.name);
            Ok(())
        })
    }

    /// Waits for its end.
    ///
    /// # Errors
    ///
    /// If it is still running after `limit`.
    pub fn wait(&mut self, limit: Duration) -> Result<ExitStatus> {
        let status = wait(&mut self.child, limit)?;
        status.with_context(|| {
            format!(
                "{} still runs after {limit:?}:\n{}",
                self.name,
                tail(&self.log())
            )
        })
    }

    /// Asks it to stop (SIGTERM), and waits.
    ///
    /// # Errors
    ///
    /// If it is still running after `limit`.
    pub fn terminate(&mut self, limit: Duration) -> Result<ExitStatus> {
        if self.child.try_wait()?.is_none() {
            kill_process(pid_of(&self.child)?, Signal::TERM)?;
        }
        self.wait(limit)
    }

    /// Kills it as a power cut would.
    ///
    /// # Errors
    ///
    /// If it was reaped already.
    pub fn kill(&mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    /// Lets it run on when the owner ends.
    pub fn keep(mut self) {
        self.kept = true;
    }

    /// Its highest resident memory so far, in KiB.
    ///
    /// # Errors
    ///
    /// If it ended.
    pub fn resident_peak_kib(&self) -> Result<u64> {
        self.memory_kib("status", "VmHWM:")
    }

    /// Its resident memory now, in KiB: page by page, as the counter behind `VmRSS` lags by up to 64 pages
    /// a processor.
    ///
    /// # Errors
    ///
    /// If it ended.
    pub fn resident_kib(&self) -> Result<u64> {
        self.memory_kib("smaps_rollup", "Rss:")
    }

    fn memory_kib(&self, file: &str, key: &str) -> Result<u64> {
        let text = fs::read_to_string(format!("/proc/{}/{file}", self.id()))?;
        let line = text.lines().find_map(|line| line.strip_prefix(key));
        let value = line.and_then(|line| line.split_whitespace().next());
        let value = value.with_context(|| format!("no {key} in the {file} of {}", self.name))?;
        Ok(value.parse()?)
    }

    /// Processor time so far, of all its threads.
    ///
    /// # Errors
    ///
    /// If it ended.
    pub fn cpu_time(&self) -> Result<Duration> {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.id()))?;
        let after_name = stat.rsplit(") ").next().unwrap_or_default();
        // Fields 14 and 15 of proc_pid_stat(5), in ticks of 10 ms (USER_HZ is 100 everywhere).
        let ticks = after_name
            .split(' ')
            .skip(11)
            .take(2)
            .map(str::parse::<u64>);
        let ticks = ticks
            .sum::<Result<u64, _>>()
            .context("read /proc/PID/stat")?;
        Ok(Duration::from_millis(10 * ticks))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if !self.kept {
            self.child.kill().ok(); // It may have ended already.
            self.child.wait().ok();
        }
    }
}

fn pid_of(child: &Child) -> Result<Pid> {
    Pid::from_raw(i32::try_from(child.id())?).context("process 0")
}

/// Waits on the process' own descriptor: no signal handler, no looking again and again.
fn wait(child: &mut Child, limit: Duration) -> Result<Option<ExitStatus>> {
    let pidfd = pidfd_open(pid_of(child)?, PidfdFlags::empty())?;
    let limit = Timespec {
        tv_sec: i64::try_from(limit.as_secs())?,
        tv_nsec: limit.subsec_nanos().into(),
    };
    match poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&limit))? {
        0 => Ok(None),
        _ => Ok(Some(child.wait()?)),
    }
}

fn read_again(file: &mut File) -> Result<String> {
    let mut bytes = Vec::new();
    file.rewind()?;
    file.read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// The last lines of a log, for an error message.
#[must_use]
pub fn tail(log: &str) -> String {
    let lines: Vec<_> = log.lines().rev().take(15).collect();
    lines.into_iter().rev().collect::<Vec<_>>().join("\n")
}

/// Ends the bpffs of the node with this folder, and what is pinned there.
///
/// # Errors
///
/// What the kernel says.
pub(crate) fn unmount_bpffs(dir: &Path) -> Result<()> {
    match unmount(dir.join(BPFFS), UnmountFlags::DETACH) {
        // Was not mounted, not yet, or is no node's folder.
        Ok(()) | Err(Errno::INVAL | Errno::NOENT | Errno::NOTDIR) => Ok(()),
        Err(errno) => Err(errno).with_context(|| format!("unmount the bpffs of {}", dir.display())),
    }
}

/// The launcher: moves this process onto a node and becomes `words`.
///
/// # Errors
///
/// Always when it returns: it could not become the command.
pub fn exec(netns: &str, cgroup: &Path, dir: &Path, words: &[String]) -> Result<()> {
    use std::os::unix::process::CommandExt as _;
    enter(netns, cgroup, dir)?;
    let (program, args) = words.split_first().context("no command")?;
    Err(Command::new(program).args(args).exec()).with_context(|| format!("execute {program}"))
}

/// Moves this process, which has one thread, onto a node.
///
/// # Errors
///
/// If the node is gone, or the process is not root.
pub(crate) fn enter(netns: &str, cgroup: &Path, dir: &Path) -> Result<()> {
    let procs = cgroup.join("cgroup.procs");
    fs::write(&procs, "0").with_context(|| format!("write {}", procs.display()))?;
    sys::enter_netns(netns)?;
    sys::unshare_mounts().context("unshare the mount table")?;
    rustix::mount::mount_change(
        "/",
        rustix::mount::MountPropagationFlags::PRIVATE | rustix::mount::MountPropagationFlags::REC,
    )
    .context("make the mounts private")?;
    let bind = |from: &str, to: &str| {
        rustix::mount::mount_bind(dir.join(from), to).with_context(|| format!("bind {to}"))
    };
    bind("resolv.conf", "/etc/resolv.conf")?;
    fs::create_dir_all("/run/wireguard")?;
    bind(CONTROL_SOCKETS, "/run/wireguard")?;
    bind(BPFFS, "/sys/fs/bpf")
}
