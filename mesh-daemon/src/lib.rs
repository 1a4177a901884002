//! What every daemon does the same way: arguments, log, configuration file, signals, exit codes.
//!
//! **Invariant:** nothing here knows what a mesh is. A configuration error ends the process with
//! [`EXIT_CONFIG`] and any other with 1, after the whole chain of causes was printed once.

#![forbid(unsafe_code)]

pub mod http;
pub mod http_proxy;
pub mod metrics;
pub mod supervisor;
pub mod traces;

use std::{
    error::Error,
    fs, io, iter,
    net::SocketAddr,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::ExitCode,
};

use clap::{Arg, Command, value_parser};
pub use sd_notify::NotifyState;
use serde::{Deserialize, de::DeserializeOwned};
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::{
    Layer as _, filter::Targets, fmt, layer::SubscriberExt as _, util::SubscriberInitExt as _,
};

/// Bad arguments or configuration: the operator must change them (`EX_USAGE`, sysexits.h).
pub const EXIT_CONFIG: u8 = 64;

/// What is logged unless somebody says otherwise.
const DEFAULT_LOG: &str = "info";

/// Where a kubelet keeps what it mounts of a Secret, so that it changes all at once.
const KUBELET_LINK: &str = "..data";

/// Something else that a daemon's binary does with its configuration, as a subcommand.
#[derive(Debug, Clone, Copy)]
pub struct Subcommand<S> {
    /// Its name.
    pub name: &'static str,
    /// What it is for, in one sentence.
    pub about: &'static str,
    /// What it does.
    pub run: fn(S) -> anyhow::Result<()>,
}

/// Who a daemon is.
#[derive(Debug, Clone, Copy)]
pub struct Daemon {
    /// The binary's name.
    pub name: &'static str,
    /// What it is for, in one sentence.
    pub about: &'static str,
    /// Its version.
    pub version: &'static str,
    /// Where its configuration is, if `--config` does not say otherwise.
    pub config: &'static str,
}

impl Daemon {
    /// The whole of `main`: `--config FILE` is read by `read`, and what it gives is run by `run`.
    pub fn main<S, E: Error + Send + Sync + 'static>(
        self,
        read: impl FnOnce(&Path) -> Result<S, E>,
        run: impl FnOnce(S) -> anyhow::Result<()>,
    ) -> ExitCode {
        self.main_with(read, run, &[])
    }

    /// The same, for a binary with subcommands. Without one it is the daemon.
    pub fn main_with<S, E: Error + Send + Sync + 'static>(
        self,
        read: impl FnOnce(&Path) -> Result<S, E>,
        run: impl FnOnce(S) -> anyhow::Result<()>,
        subcommands: &[Subcommand<S>],
    ) -> ExitCode {
        let known = subcommands.iter();
        let known = known.map(|one| Command::new(one.name).about(one.about));
        let arguments = match self.command().subcommands(known).try_get_matches() {
            Ok(arguments) => arguments,
            Err(error) => {
                error.print().ok(); // Nowhere to say that the terminal is gone.
                let bad = error.use_stderr();
                return if bad {
                    EXIT_CONFIG.into()
                } else {
                    ExitCode::SUCCESS
                };
            }
        };
        if let Some(filter) = arguments.get_one::<Targets>("log").cloned() {
            let lines = fmt::layer().with_writer(io::stderr).with_ansi(false);
            let log = tracing_subscriber::registry();
            log.with(lines.with_filter(filter)).init();
        }
        let config = arguments.get_one::<PathBuf>("config");
        let settings = match read(config.map_or(Path::new(self.config), PathBuf::as_path)) {
            Ok(settings) => settings,
            Err(error) => return self.fail(&error.into(), EXIT_CONFIG),
        };
        let mut asked = subcommands.iter();
        let asked = asked.find(|one| Some(one.name) == arguments.subcommand_name());
        let ended = match asked {
            Some(subcommand) => (subcommand.run)(settings),
            None => run(settings),
        };
        match ended {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => self.fail(&error, 1),
        }
    }

    fn command(self) -> Command {
        let config = Arg::new("config")
            .long("config")
            .value_name("FILE")
            .global(true);
        let log = Arg::new("log")
            .long("log")
            .value_name("FILTER")
            .env("HOLDFAST_LOG")
            .global(true);
        Command::new(self.name)
            .about(self.about)
            .version(self.version)
            .arg(
                config
                    .value_parser(value_parser!(PathBuf))
                    .default_value(self.config)
                    .help("The configuration file (TOML)"),
            )
            .arg(
                log.value_parser(|text: &str| text.parse::<Targets>())
                    .default_value(DEFAULT_LOG)
                    .help("What to log: info, debug, mesh_core=debug,info, …"),
            )
    }

    fn fail(self, error: &anyhow::Error, code: u8) -> ExitCode {
        eprintln!("Error: {}: {}", self.name, chain(error.as_ref()));
        code.into()
    }
}

/// An error with all that caused it, each said once: many errors end with what caused them already.
#[must_use]
pub fn chain(error: &dyn Error) -> String {
    let mut said = error.to_string().trim_end().to_owned();
    for cause in iter::successors(error.source(), |&cause| cause.source()) {
        let cause = cause.to_string();
        let cause = cause.trim_end();
        if !said.ends_with(cause) {
            said = format!("{said}: {cause}");
        }
    }
    said
}

/// Why a configuration file cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// Not at all.
    #[error("cannot read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is not what it should be; the source names line, key and accepted keys.
    #[error("cannot parse {path}")]
    Parse {
        /// The file.
        path: PathBuf,
        /// Where and why.
        source: Box<toml::de::Error>,
    },
}

/// Reads a configuration file as it is written.
///
/// # Errors
///
/// [`FileError`], which names the file, the line, the key and the accepted keys.
pub fn read_toml<T: DeserializeOwned>(path: &Path) -> Result<T, FileError> {
    let text = fs::read_to_string(path).map_err(|source| FileError::Read {
        path: path.to_owned(),
        source,
    })?;
    toml::from_str(&text).map_err(|source| FileError::Parse {
        path: path.to_owned(),
        source: Box::new(source),
    })
}

/// Where a daemon listens, as its configuration says: an address and a port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct ListenAddress(pub SocketAddr);

impl TryFrom<String> for ListenAddress {
    type Error = String;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse().map(Self).map_err(|_| {
            format!("{text:?} is not an address with a port, such as 0.0.0.0:7555 or [::]:7555")
        })
    }
}

/// Warns of a file with a secret that others than its owner may read; one that is not there is not spoken of.
pub fn warn_if_exposed(path: &Path) {
    let file = fs::metadata(path);
    if file.is_ok_and(|file| is_exposed(path, file.permissions().mode())) {
        let path = path.display();
        tracing::warn!("others may read {path}, which holds a secret: chmod 600 {path}");
    }
}

/// What a kubelet mounts has the mode that the pod says, is only in the pod, and cannot be changed there.
fn is_exposed(path: &Path, mode: u32) -> bool {
    let folder = path.parent().unwrap_or(Path::new(""));
    mode & 0o077 != 0 && !folder.join(KUBELET_LINK).is_symlink()
}

/// Waits for SIGTERM or SIGINT. The signals are caught from this call on, not from the first
/// poll.
///
/// # Errors
///
/// If the system does not let a handler be set.
pub fn stop_signal() -> io::Result<impl Future<Output = ()> + Send> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => tracing::info!("told to stop"),
            _ = interrupt.recv() => tracing::info!("interrupted"),
        }
    })
}

/// Tells systemd, if it asked (`Type=notify`).
pub fn notify(state: NotifyState<'_>) {
    if let Err(error) = sd_notify::notify(&[state]) {
        tracing::debug!(%error, "systemd was not told");
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct File {
        listen: ListenAddress,
    }

    /// The chain of causes of reading `text`, as the operator sees it.
    fn problem(text: &str) -> String {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.toml");
        fs::write(&path, text).unwrap();
        chain(&read_toml::<File>(&path).unwrap_err())
    }

    #[test]
    fn a_typo_is_told_with_file_line_key_and_accepted_keys() {
        let problem = problem("\nlistn = 'a'");
        for part in ["x.toml", "line 2", "listn", "`listen`"] {
            assert!(problem.contains(part), "{part} is not in {problem}");
        }
    }

    #[test]
    fn an_address_without_a_port_is_told_what_is_wanted() {
        for wrong in ["7555", "off", "localhost:7555", "0.0.0.0"] {
            let problem = problem(&format!("listen = {wrong:?}"));
            for part in ["line 1", wrong, "such as 0.0.0.0:7555"] {
                assert!(problem.contains(part), "{part} is not in {problem}");
            }
        }
        let given: File = toml::from_str("listen = '[::]:7555'").unwrap();
        assert_eq!(given.listen.0.port(), 7555);
    }

    #[test]
    fn a_secret_that_others_may_read_is_noticed_unless_a_kubelet_mounted_it() {
        let folder = tempfile::tempdir().unwrap();
        let key = folder.path().join("key");
        for (mode, exposed) in [
            (0o100_600, false),
            (0o100_400, false),
            (0o100_640, true),
            (0o100_604, true),
        ] {
            assert_eq!(is_exposed(&key, mode), exposed, "{mode:o}");
        }
        symlink("..2026", folder.path().join(KUBELET_LINK)).unwrap();
        assert!(!is_exposed(&key, 0o100_644));
    }

    #[test]
    fn each_cause_is_said_once() {
        #[derive(Debug, thiserror::Error)]
        enum Problem {
            #[error("cannot create /x: {0}")]
            Told(#[source] io::Error),
            #[error("certificate: {0}")]
            Twice(#[source] Box<Self>),
            #[error("cannot start")]
            Silent(#[source] Box<Self>),
        }
        let told = || Box::new(Problem::Told(io::Error::other("denied\n")));
        assert_eq!(chain(&*told()), "cannot create /x: denied");
        let twice = Problem::Twice(told());
        assert_eq!(chain(&twice), "certificate: cannot create /x: denied");
        let silent = Problem::Silent(Box::new(twice));
        let whole = "cannot start: certificate: cannot create /x: denied";
        assert_eq!(chain(&silent), whole);
        let context = anyhow::Error::new(silent).context("task a failed");
        assert_eq!(chain(context.as_ref()), format!("task a failed: {whole}"));
    }

    #[test]
    fn a_missing_file_is_named() {
        let error = read_toml::<File>(Path::new("/nonexistent/x.toml")).unwrap_err();
        assert!(error.to_string().contains("/nonexistent/x.toml"));
    }
}
