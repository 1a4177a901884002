//! Why there is nothing to show, and what to do about it.

use std::{fmt, io, path::Path, time::Duration};

use mesh_api::connect::ConnectError;
use tonic::{Code, Status};

use crate::Verdict;

/// Why there is nothing to show.
#[derive(Debug)]
pub(crate) enum Failure {
    /// No daemon answers at its socket.
    Unreachable(String),
    /// The daemon did not answer in time.
    Slow(&'static str, Duration),
    /// The daemon says that the question is wrong.
    Refused(String),
    /// The daemon does not answer this caller.
    Denied(String),
    /// The daemon, or what this command does itself, could not answer.
    Failed(String),
    /// A file could not be written.
    File(String),
    /// The cluster, or kubectl.
    Cluster(String),
    /// The CONNECT proxy, or what it says.
    Proxy(String),
}

/// Which daemon is talked to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Daemon {
    Agent,
    Controller,
}

impl Daemon {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Agent => "agent",
            Self::Controller => "controller",
        }
    }

    fn option(self) -> &'static str {
        match self {
            Self::Agent => "--socket",
            Self::Controller => "--controller-socket",
        }
    }
}

impl Failure {
    pub(crate) fn connecting(daemon: Daemon, path: &Path, error: &ConnectError) -> Self {
        let (name, option, path) = (daemon.name(), daemon.option(), path.display());
        let kind = match error {
            ConnectError::Socket { source, .. } => source.kind(),
            ConnectError::Resolve { .. }
            | ConnectError::Tcp { .. }
            | ConnectError::Tls { .. }
            | ConnectError::Http { .. } => io::ErrorKind::Other,
        };
        Self::Unreachable(if kind == io::ErrorKind::NotFound {
            format!(
                "no {name} here: {path} does not exist. Start it (systemctl start mesh-{name}), \
                 or say where its admin socket is: {option} PATH"
            )
        } else if kind == io::ErrorKind::ConnectionRefused {
            format!(
                "the {name} is not running: nobody listens at {path}. Start it \
                 (systemctl start mesh-{name}) and look at its log (journalctl -u mesh-{name})"
            )
        } else if kind == io::ErrorKind::PermissionDenied {
            format!("{path} is for its owner only: try again with sudo")
        } else {
            format!("cannot talk to the {name}: {error}. Is {path} its admin socket? ({option})")
        })
    }

    /// What this command makes was not written to `path`: nothing that is there is written over.
    pub(crate) fn writing(path: &Path, error: &io::Error) -> Self {
        let path = path.display();
        if error.kind() == io::ErrorKind::AlreadyExists {
            let text = format!("{path} is there already: remove it, or give another name");
            return Self::Refused(text);
        }
        Self::File(format!("cannot write {path}: {error}"))
    }

    /// Whether the script or the mesh has to change.
    pub(crate) fn verdict(&self) -> Verdict {
        match self {
            Self::Refused(_) => Verdict::Usage,
            Self::Unreachable(_)
            | Self::Slow(..)
            | Self::Denied(_)
            | Self::Failed(_)
            | Self::File(_)
            | Self::Cluster(_)
            | Self::Proxy(_) => Verdict::Down,
        }
    }

    pub(crate) fn to_json(&self) -> serde_json::Value {
        let kind = match self {
            Self::Unreachable(_) => "unreachable",
            Self::Slow(..) => "slow",
            Self::Refused(_) => "refused",
            Self::Denied(_) => "denied",
            Self::Failed(_) => "failed",
            Self::File(_) => "file",
            Self::Cluster(_) => "cluster",
            Self::Proxy(_) => "proxy",
        };
        serde_json::json!({ "error": { "kind": kind, "message": self.to_string() } })
    }
}

impl From<Status> for Failure {
    fn from(status: Status) -> Self {
        let message = crate::table::printable(status.message());
        match status.code() {
            Code::InvalidArgument
            | Code::NotFound
            | Code::AlreadyExists
            | Code::OutOfRange
            | Code::FailedPrecondition => Self::Refused(message),
            Code::PermissionDenied => Self::Denied(message),
            // tonic's own answer, without a word: of the other daemon, or of one that is older than this command.
            Code::Unimplemented => Self::Failed(
                "the daemon does not know this question: is that its admin socket (--socket is the agent's, \
                 --controller-socket the controller's), and is it as new as this meshctl (meshctl --version)?"
                    .to_owned(),
            ),
            Code::Ok
            | Code::Cancelled
            | Code::Unknown
            | Code::DeadlineExceeded
            | Code::ResourceExhausted
            | Code::Aborted
            | Code::Internal
            | Code::Unavailable
            | Code::DataLoss
            | Code::Unauthenticated => {
                Self::Failed(format!("the daemon says: {message} ({:?})", status.code()))
            }
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unreachable(message)
            | Self::Refused(message)
            | Self::Denied(message)
            | Self::Failed(message)
            | Self::File(message)
            | Self::Cluster(message)
            | Self::Proxy(message) => f.write_str(message),
            Self::Slow(name, limit) => write!(
                f,
                "the {name} did not answer within {limit:?}: look at its log (journalctl -u mesh-{name})"
            ),
        }
    }
}
