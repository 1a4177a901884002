//! `relay.toml`: the file as written, and the settings as checked.

use std::{
    net::{Ipv6Addr, SocketAddr},
    path::{Path, PathBuf},
};

use mesh_core::relay_server::{Limits, Rate};
use mesh_daemon::{FileError, ListenAddress, metrics, warn_if_exposed};
use mesh_identity::credentials::{Credentials, CredentialsError};
use mesh_wire::id::{Identity, RelayName};
use serde::Deserialize;

/// Most STUN ports beside the one that QUIC has: two vantage points are enough for anybody.
const STUN_LISTEN_MAX: usize = 8;

/// Highest rate of one node that makes sense, in Mb/s.
const CLIENT_RATE_MAX_MBIT_PER_S: u64 = 100_000;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct ConfigFile {
    /// As in its MeshRelay and its certificate.
    name: RelayName,
    /// PEM files; relative paths begin at the configuration file's folder.
    certificate: PathBuf,
    /// Of the certificate.
    key: PathBuf,
    /// The mesh's authority: who comes with a certificate of it is let in.
    ca: PathBuf,
    /// UDP: QUIC, STUN, and packets without either.
    #[serde(default = "https_port")]
    quic_listen: ListenAddress,
    /// TCP: TLS, where UDP is blocked.
    #[serde(default = "https_port")]
    tls_listen: ListenAddress,
    /// UDP ports beside that one, by which nodes recognise a NAT that maps by destination.
    #[serde(default = "stun_ports")]
    stun_listen: Vec<ListenAddress>,
    #[serde(default = "metrics_port")]
    metrics_listen: metrics::Listen,
    /// Most links at once; one more is refused.
    #[serde(default)]
    clients_max: Option<usize>,
    /// And of these, from one network: a /24, or a /48 of IPv6.
    #[serde(default)]
    clients_per_network_max: Option<usize>,
    /// What one node may send on; without it, as much as the machine carries.
    #[serde(default)]
    client_rate_mbit_per_s: Option<u64>,
}

fn https_port() -> ListenAddress {
    ListenAddress((Ipv6Addr::UNSPECIFIED, 443).into())
}

fn stun_ports() -> Vec<ListenAddress> {
    vec![ListenAddress((Ipv6Addr::UNSPECIFIED, 3478).into())]
}

fn metrics_port() -> metrics::Listen {
    metrics::Listen::local(9_641)
}

/// What a relay needs to run.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Its name.
    pub name: RelayName,
    /// Its certificate, key and authority.
    pub credentials: Credentials,
    /// Where they were read.
    pub files: CredentialFiles,
    /// Where it listens.
    pub listen: Listen,
    /// Where Prometheus asks.
    pub metrics: metrics::Listen,
    /// How much is too much.
    pub limits: Limits,
}

/// Where a relay listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listen {
    /// UDP address of QUIC and STUN.
    pub quic: SocketAddr,
    /// TCP address of TLS.
    pub tls: SocketAddr,
    /// Further UDP addresses of STUN.
    pub stun: Vec<SocketAddr>,
}

/// PEM files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CredentialFiles {
    certificate: PathBuf,
    key: PathBuf,
    authority: PathBuf,
}

impl CredentialFiles {
    /// What is in them.
    ///
    /// # Errors
    ///
    /// If they cannot be read, or do not go together.
    pub fn read(&self) -> Result<Credentials, CredentialsError> {
        Credentials::from_files(&self.certificate, &self.key, &self.authority)
    }
}

/// What is wrong with a configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file itself.
    #[error(transparent)]
    File(#[from] FileError),
    /// `certificate`, `key` and `ca` do not go together.
    #[error("{path}: `certificate`, `key`, `ca`: {source}")]
    Credentials {
        /// The configuration file.
        path: PathBuf,
        /// Which, and why.
        source: CredentialsError,
    },
    /// The certificate is another's.
    #[error("{path}: `name` is {name}, but the certificate belongs to {actual}")]
    OtherName {
        /// The configuration file.
        path: PathBuf,
        /// As configured.
        name: RelayName,
        /// As certified.
        actual: String,
    },
    /// A number is out of range.
    #[error("{path}: `{key}` must lie between {min} and {max}")]
    Range {
        /// The configuration file.
        path: PathBuf,
        /// The key.
        key: &'static str,
        /// Smallest that is accepted.
        min: u64,
        /// Largest that is accepted.
        max: u64,
    },
}

impl Settings {
    /// Reads and checks a configuration file and the files that it names.
    ///
    /// # Errors
    ///
    /// [`ConfigError`] for the person who wrote the file.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let file: ConfigFile = mesh_daemon::read_toml(path)?;
        let folder = path.parent().unwrap_or(Path::new(""));
        let files = CredentialFiles {
            certificate: folder.join(&file.certificate),
            key: folder.join(&file.key),
            authority: folder.join(&file.ca),
        };
        let credentials = files.read().map_err(|source| ConfigError::Credentials {
            path: path.to_owned(),
            source,
        })?;
        warn_if_exposed(&files.key);
        if *credentials.identity() != Identity::Relay(file.name.clone()) {
            return Err(ConfigError::OtherName {
                path: path.to_owned(),
                name: file.name,
                actual: credentials.identity().to_uri(credentials.trust_domain()),
            });
        }
        Ok(Self {
            limits: limits(&file, path)?,
            metrics: file.metrics_listen,
            name: file.name,
            credentials,
            files,
            listen: Listen {
                quic: file.quic_listen.0,
                tls: file.tls_listen.0,
                stun: file.stun_listen.iter().map(|one| one.0).collect(),
            },
        })
    }
}

fn limits(file: &ConfigFile, path: &Path) -> Result<Limits, ConfigError> {
    let check = |key, value: u64, max| {
        if (1..=max).contains(&value) {
            return Ok(value);
        }
        let path = path.to_owned();
        Err(ConfigError::Range {
            path,
            key,
            min: 1,
            max,
        })
    };
    let count = |key, value: Option<usize>, default| match value {
        Some(value) => {
            let wide = u64::try_from(value).unwrap_or(u64::MAX);
            check(key, wide, 65_536).map(|_| value)
        }
        None => Ok(default),
    };
    let stun = u64::try_from(file.stun_listen.len()).unwrap_or(u64::MAX);
    let stun_max = u64::try_from(STUN_LISTEN_MAX).unwrap_or(u64::MAX);
    if stun > stun_max {
        check("stun_listen", stun, stun_max)?;
    }
    let mut limits = match file.client_rate_mbit_per_s {
        Some(rate) => {
            check("client_rate_mbit_per_s", rate, CLIENT_RATE_MAX_MBIT_PER_S)?;
            Limits {
                rate: Some(Rate::new(rate * 125_000)),
                ..Limits::default()
            }
        }
        None => Limits::default(),
    };
    limits.links_max = count("clients_max", file.clients_max, limits.links_max)?;
    let per_network = file.clients_per_network_max;
    let default = limits.links_per_source_max;
    limits.links_per_source_max = count("clients_per_network_max", per_network, default)?;
    Ok(limits)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shipped_example_has_only_keys_that_are_known() {
        let file: ConfigFile = toml::from_str(include_str!("../../examples/relay.toml")).unwrap();
        assert_eq!(file.stun_listen.len(), 1);
    }
}
