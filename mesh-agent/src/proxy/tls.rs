//! Mutual TLS of clients from elsewhere: files that are read again once they change, and the names of who came.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::SystemTime,
};

use mesh_core::proxy::ClientName;
use mesh_identity::{
    certificate::Holder,
    tls::{OutsideTlsError, outside_server_config},
};
use tokio_rustls::rustls::{ServerConfig, pki_types::CertificateDer};

use super::settings::TlsSettings;

/// Largest file that is read: an authority's bundle with hundreds of certificates.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// Why there is no TLS.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TlsError {
    /// A file.
    #[error("{}: {source}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why it cannot be read.
        source: io::Error,
    },
    /// What is in them.
    #[error("`certificate` {}, `key`, `client_ca`: {source}", certificate.display())]
    Content {
        /// The first of them.
        certificate: PathBuf,
        /// What is wrong.
        source: OutsideTlsError,
    },
}

/// What a file was when it was read.
type Seen = Option<(SystemTime, u64)>;

/// The settings in force.
#[derive(Debug)]
pub(crate) struct Tls {
    files: TlsSettings,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    config: Arc<ServerConfig>,
    seen: [Seen; 3],
    problem: Option<String>,
}

impl Tls {
    /// # Errors
    ///
    /// [`TlsError`].
    pub(crate) fn open(files: &TlsSettings) -> Result<Self, TlsError> {
        let seen = seen(files);
        let state = State {
            config: read(files)?,
            seen,
            problem: None,
        };
        Ok(Self {
            files: files.clone(),
            state: Mutex::new(state),
        })
    }

    /// The settings, from the files as they are; as they were, if what they are now is of no use.
    pub(crate) fn config(&self) -> Arc<ServerConfig> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let now = seen(&self.files);
        if now != state.seen {
            state.seen = now;
            match read(&self.files) {
                Ok(config) => {
                    state.config = config;
                    state.problem = None;
                }
                Err(error) => {
                    tracing::warn!(%error, "the proxy goes on with the TLS files that it has");
                    state.problem = Some(format!("{error}; those from before are in use"));
                }
            }
        }
        Arc::clone(&state.config)
    }

    /// Why the files as they are now are not in use.
    pub(crate) fn problem(&self) -> Option<String> {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.problem.clone()
    }
}

fn seen(files: &TlsSettings) -> [Seen; 3] {
    [&files.certificate, &files.key, &files.client_ca].map(|path| {
        let metadata = fs::metadata(path).ok()?;
        Some((metadata.modified().ok()?, metadata.len()))
    })
}

fn read(files: &TlsSettings) -> Result<Arc<ServerConfig>, TlsError> {
    let (certificate, key) = (text(&files.certificate)?, text(&files.key)?);
    let config = outside_server_config(&certificate, &key, &text(&files.client_ca)?);
    config.map(Arc::new).map_err(|source| TlsError::Content {
        certificate: files.certificate.clone(),
        source,
    })
}

fn text(path: &Path) -> Result<zeroize::Zeroizing<String>, TlsError> {
    let read = || {
        if fs::metadata(path)?.len() > FILE_BYTES_MAX {
            let why = format!("is larger than {FILE_BYTES_MAX} bytes");
            return Err(io::Error::other(why));
        }
        fs::read_to_string(path)
    };
    let text = read().map_err(|source| TlsError::File {
        path: path.to_owned(),
        source,
    })?;
    Ok(zeroize::Zeroizing::new(text))
}

/// Every name in the certificate that a client showed.
pub(crate) fn names(certificates: &[CertificateDer<'_>]) -> Vec<ClientName> {
    let holder = certificates
        .first()
        .and_then(|own| Holder::of(own).ok())
        .unwrap_or_default();
    let common = holder.common_names.into_iter().map(ClientName::CommonName);
    let organizations = holder.organizations.into_iter();
    let organizations = organizations.map(ClientName::Organization);
    let uris = holder.uris.into_iter().map(ClientName::Uri);
    common.chain(organizations).chain(uris).collect()
}
