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
    fs, io,
    path::{Path, PathBuf},
    process::ExitCode,
};

use clap::{Arg, Command, value_parser};
pub use sd_notify::NotifyState;
use serde::de::DeserializeOwned;
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::{
    Layer as _, filter::Targets, fmt, layer::SubscriberExt as _, util::SubscriberInitExt as _,
};

/// Bad arguments or configuration: the operator must change them (`EX_USAGE`, sysexits.h).
pub const EXIT_CONFIG: u8 = 64;

/// What is logged unless somebody says otherwise.
const DEFAULT_LOG: &str = "info";

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
        eprintln!("Error: {}: {error:#}", self.name);
        code.into()
    }
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
    use serde::Deserialize;

    use super::*;

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct File {
        #[expect(dead_code, reason = "only its name matters here")]
        listen: String,
    }

    /// The chain of causes of reading `text`, as the operator sees it.
    fn problem(text: &str) -> String {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.toml");
        fs::write(&path, text).unwrap();
        format!(
            "{:#}",
            anyhow::Error::new(read_toml::<File>(&path).unwrap_err())
        )
    }

    #[test]
    fn a_typo_is_told_with_file_line_key_and_accepted_keys() {
        let problem = problem("\nlistn = 'a'");
        for part in ["x.toml", "line 2", "listn", "`listen`"] {
            assert!(problem.contains(part), "{part} is not in {problem}");
        }
    }

    #[test]
    fn a_missing_file_is_named() {
        let error = read_toml::<File>(Path::new("/nonexistent/x.toml")).unwrap_err();
        assert!(error.to_string().contains("/nonexistent/x.toml"));
    }
}
