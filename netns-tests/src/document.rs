//! Documents whose commands are run: the blocks of shell of a page of `docs/`, on machines of the lab that have folders of
//! their own.
//!
//! In a block, a line that begins with a prompt is a command: `$ ` on the one machine of the page, `edge-a$ ` on that one.
//! What a here-document has belongs to it; the lines after it are what it answers, with `…` for whatever differs.

use std::{
    fs,
    os::unix::{
        fs::{DirBuilderExt as _, PermissionsExt as _},
        net::UnixDatagram,
    },
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};

use crate::{
    lab::cgroup_mount,
    node::{Node, Output, Process},
    tool,
};

/// A command that takes longer hangs.
const COMMAND_LIMIT: Duration = Duration::from_secs(60);

/// How long systemd waits for a daemon to be ready.
const START_LIMIT: Duration = Duration::from_secs(20);

/// How long it waits for one to end.
const STOP_LIMIT: Duration = Duration::from_secs(10);

/// An operator looks at what is not there yet again, and types slower than this anyway.
const LOOK_LIMIT: Duration = Duration::from_secs(40);

/// Stands for anything in what a command answers.
const ANYTHING: char = '…';

/// A command of a page.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Command {
    /// Where it is typed; empty on a page with one machine.
    pub machine: String,
    /// What is typed, a here-document with it.
    pub text: String,
    /// What it answers, as far as the page says so.
    pub answer: Vec<String>,
}

/// The commands in the blocks of shell, in order.
#[must_use]
pub fn commands(page: &str) -> Vec<Command> {
    let mut found: Vec<Command> = Vec::new();
    let mut inside = false;
    let mut until = None;
    for line in page.lines() {
        if !inside {
            inside = line == "```sh";
        } else if let Some(end) = &until {
            if let Some(command) = found.last_mut() {
                command.text += &format!("\n{line}");
            }
            if line == end {
                until = None;
            }
        } else if line == "```" {
            inside = false;
        } else if let Some((machine, text)) = prompt(line) {
            until = here_document(text);
            found.push(Command {
                machine: machine.to_owned(),
                text: text.to_owned(),
                answer: Vec::new(),
            });
        } else if let Some(command) = found.last_mut() {
            command.answer.push(line.to_owned());
        }
    }
    found
}

fn prompt(line: &str) -> Option<(&str, &str)> {
    let (machine, text) = line.split_once("$ ")?;
    let is_name = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    machine.chars().all(is_name).then_some((machine, text))
}

/// The line that ends it.
fn here_document(text: &str) -> Option<String> {
    let (_, word) = text.split_once("<<")?;
    let word = word.split_whitespace().next()?;
    Some(word.trim_matches(['\'', '"']).to_owned())
}

impl Command {
    /// Whether `said` has the lines of the answer, in this order.
    ///
    /// # Errors
    ///
    /// The first line that it has not.
    pub fn check(&self, said: &str) -> Result<()> {
        let mut lines = said.lines();
        for wanted in &self.answer {
            let found = lines.any(|line| is_like(wanted.trim(), line.trim()));
            ensure!(found, "no line is like {wanted:?} in:\n{said}");
        }
        Ok(())
    }
}

/// Spaces count once: a table is as wide as what is in it.
fn is_like(wanted: &str, line: &str) -> bool {
    let words = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
    let (wanted, line) = (words(wanted), words(line));
    let mut parts = wanted.split(ANYTHING).map(str::trim);
    let Some(rest) = parts.next().and_then(|first| line.strip_prefix(first)) else {
        return false;
    };
    let parts: Vec<_> = parts.collect();
    let Some((last, between)) = parts.split_last() else {
        return rest.is_empty();
    };
    let rest = between.iter().try_fold(rest, |rest, part| {
        rest.find(part).and_then(|at| rest.get(at + part.len()..))
    });
    rest.is_some_and(|rest| rest.ends_with(last))
}

/// A node with its own `/etc`, `/run` and `/var/lib`, and with what the Debian packages install.
#[derive(Debug)]
pub struct Machine {
    // Before the node that they run on.
    services: Vec<(String, Process)>,
    node: Node,
    /// The repository, with its units.
    root: PathBuf,
    bins: PathBuf,
}

impl Machine {
    /// On `node`, with the binaries beside the running test, in the repository at `root`.
    ///
    /// # Errors
    ///
    /// If the binaries are not built, or the disk is full.
    pub fn new(node: Node, root: &Path) -> Result<Self> {
        let agent = tool::binary("mesh-agent")?;
        let bins = agent
            .parent()
            .context("the binaries have no folder")?
            .to_owned();
        for folder in ["run", "lib"] {
            fs::create_dir_all(node.dir().join(folder))?;
        }
        let etc = node.dir().join("etc");
        tool::run("cp", &["-a", "/etc", &etc.display().to_string()], "")?;
        let resolver = etc.join("resolv.conf");
        fs::remove_file(&resolver).ok(); // It may be a link to elsewhere.
        fs::write(&resolver, "")?;
        Ok(Self {
            services: Vec::new(),
            node,
            root: root.to_owned(),
            bins,
        })
    }

    /// The node.
    #[must_use]
    pub fn node(&self) -> &Node {
        &self.node
    }

    /// Types a command, and looks again until it answers as the page says: what the mesh learns takes a moment.
    ///
    /// # Errors
    ///
    /// If it does not; with the logs of the machine's daemons.
    pub fn follow(&mut self, command: &Command) -> Result<String> {
        let words: Vec<_> = command.text.split_whitespace().collect();
        let done = match words.as_slice() {
            ["systemctl", "start", "--no-block", units @ ..] => units
                .iter()
                .try_for_each(|unit| self.launch(unit).map(drop)),
            ["systemctl", "enable", "--now", units @ ..] | ["systemctl", "start", units @ ..] => {
                units.iter().try_for_each(|unit| self.start(unit))
            }
            ["systemctl", "restart", units @ ..] => units.iter().try_for_each(|unit| {
                self.stop(unit)?;
                self.start(unit)
            }),
            ["systemctl", "stop", units @ ..] => units.iter().try_for_each(|unit| self.stop(unit)),
            _ => return self.ask(command),
        };
        done.map(|()| String::new())
            .with_context(|| format!("{}: {}", self.node.name(), command.text))
    }

    fn ask(&self, command: &Command) -> Result<String> {
        let asked = tool::eventually(&command.text, LOOK_LIMIT, || {
            let output = self.run(&command.text)?;
            // `meshctl` ends with 1 and 2 where something is wrong, and a page may be about that.
            let said = match command.answer.is_empty() {
                true => output.ok()?,
                false => output.stdout + &output.stderr,
            };
            command.check(&said)?;
            Ok(said)
        });
        asked.with_context(|| {
            let logs = self.services.iter();
            let logs = logs
                .map(|(unit, process)| format!("{unit}: {}\n", crate::node::tail(&process.log())));
            format!("{}:\n{}", self.node.name(), logs.collect::<String>())
        })
    }

    /// Runs a line of shell.
    ///
    /// # Errors
    ///
    /// If it hangs.
    pub fn run(&self, text: &str) -> Result<Output> {
        let command = self.command(&["bash", "-eu", "-o", "pipefail", "-c", text])?;
        self.node.run_with(command, COMMAND_LIMIT)
    }

    /// A command with the machine's own folders, and whose cgroup is the root of what it sees.
    fn command(&self, words: &[&str]) -> Result<std::process::Command> {
        let enter = "d=$1; shift; c=$1; shift; \
             mount --bind $d/etc /etc; \
             mount --bind $d/lib /var/lib; mount --bind $d/run /run; \
             umount -l $c; mount -t cgroup2 cgroup2 $c; exec \"$@\"";
        let dir = self.node.dir().display().to_string();
        let cgroups = cgroup_mount()?.display().to_string();
        let enter = ["unshare", "--cgroup", "sh", "-euc", enter, "sh"];
        let words = [&enter, [dir.as_str(), &cgroups].as_slice(), words].concat();
        let mut command = self.node.command(&words)?;
        let path = std::env::var("PATH").unwrap_or_default();
        command
            .env("PATH", format!("{}:{path}", self.bins.display()))
            .env("NO_COLOR", "1")
            .current_dir(&self.root);
        Ok(command)
    }

    /// What systemd does with one of `deploy/systemd`.
    fn start(&mut self, unit: &str) -> Result<()> {
        let told = self.launch(unit)?;
        told.set_read_timeout(Some(START_LIMIT))?;
        let process = self.services.last_mut().map(|(_, process)| process);
        let process = process.context("nothing was started")?;
        let mut message = [0; 4096];
        loop {
            let Ok(length) = told.recv(&mut message) else {
                process.running()?;
                bail!(
                    "{unit} is not ready after {START_LIMIT:?}: {}",
                    process.log()
                );
            };
            let said = String::from_utf8_lossy(message.get(..length).unwrap_or_default());
            if said.contains("READY=1") {
                return Ok(());
            }
        }
    }

    /// The same, but for waiting: the daemon says at the socket when it is ready.
    fn launch(&mut self, unit: &str) -> Result<UnixDatagram> {
        let path = self.root.join(format!("deploy/systemd/{unit}.service"));
        let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
        let says = |key: &str| {
            let mut lines = text.lines();
            lines.find_map(|line| line.strip_prefix(&format!("{key}=")))
        };
        if let Some(needed) = says("ConditionPathExists") {
            let there = self.run(&format!("test -e {needed}"))?;
            ensure!(there.status.success(), "{unit} needs {needed}");
        }
        for (key, below) in [("StateDirectory", "lib"), ("RuntimeDirectory", "run")] {
            if let Some(name) = says(key) {
                let mode = if below == "lib" { 0o700 } else { 0o755 };
                let mut builder = fs::DirBuilder::new();
                let folder = self.node.dir().join(below).join(name);
                builder.recursive(true).mode(mode).create(folder)?;
            }
        }
        let program = says("ExecStart").and_then(|line| line.strip_prefix("/usr/bin/"));
        let program = program.with_context(|| format!("{unit} has no ExecStart"))?;
        let words: Vec<_> = program.split(' ').collect();
        let mut command = self.command(&words)?;
        let socket = self.node.dir().join("run/notify");
        fs::remove_file(&socket).ok(); // Of the daemon before.
        let told = UnixDatagram::bind(&socket)?;
        fs::set_permissions(&socket, fs::Permissions::from_mode(0o777))?;
        command.env("NOTIFY_SOCKET", "/run/notify");
        let process = self.node.spawn_with(unit, command)?;
        self.services.push((unit.to_owned(), process));
        Ok(told)
    }

    fn stop(&mut self, unit: &str) -> Result<()> {
        let at = self.services.iter().position(|(name, _)| name == unit);
        let at = at.with_context(|| format!("{unit} does not run"))?;
        let (_, mut process) = self.services.swap_remove(at);
        process.terminate(STOP_LIMIT).map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompts_here_documents_and_answers_are_told_apart() {
        let page = "```sh\nnot$Typed\n```\n```sh\na$ cat > f <<'END'\nx$ y\nEND\n$ ls\nf …\n```\n```toml\n$ no\n```";
        let command = |machine: &str, text: &str, answer: &[&str]| Command {
            machine: machine.to_owned(),
            text: text.to_owned(),
            answer: answer.iter().map(|&line| line.to_owned()).collect(),
        };
        let expected = [
            command("a", "cat > f <<'END'\nx$ y\nEND", &[]),
            command("", "ls", &["f …"]),
        ];
        assert_eq!(commands(page), expected);
    }

    #[test]
    fn an_answer_is_like_its_line_but_for_what_is_left_open() {
        for (wanted, line) in [
            ("ok", "ok"),
            ("a  … b", "a x y b"),
            ("… ms", "12 ms"),
            ("a …", "a "),
            ("a … b … c", "a 1 b 2 c"),
        ] {
            assert!(is_like(wanted, line.trim()), "{wanted:?} {line:?}");
        }
        for (wanted, line) in [("ok", "not ok"), ("a … b", "a b c"), ("a", "ab")] {
            assert!(!is_like(wanted, line), "{wanted:?} {line:?}");
        }
    }
}
