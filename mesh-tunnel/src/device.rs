//! A plain WireGuard device: configured by its control socket, with nothing of a mesh.
//!
//! `config` is what the device shall be and `uapi` the text that says it, both pure; `running`
//! makes the packet path so; `control` is the socket.

pub(crate) mod config;
pub(crate) mod control;
pub(crate) mod running;
pub(crate) mod uapi;

use rustix::io::Errno;

/// Why a request was not carried out. Nothing of it was.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what}")]
pub(crate) struct Refused {
    /// What the client is told.
    pub(crate) errno: Errno,
    /// What the log is told; never holds a key.
    pub(crate) what: String,
}

impl Refused {
    pub(crate) fn new(errno: Errno, what: impl Into<String>) -> Self {
        let what = what.into();
        Self { errno, what }
    }
}
