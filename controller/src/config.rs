//! The configuration: the file as written, then settings as checked.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
};

use mesh_daemon::FileError;
use mesh_identity::authority::check_trust_domain;
use serde::Deserialize;

/// Checked settings of the controller.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The mesh's name: the SPIFFE trust domain.
    pub mesh_name: String,
    /// Where agents connect, TCP.
    pub listen: SocketAddr,
    /// Where the store is.
    pub state_dir: PathBuf,
    /// The folder of manifests, if there is one.
    pub manifests: Option<PathBuf>,
    /// The cluster, if there is one.
    pub kubernetes: Option<KubernetesSettings>,
    /// Unix socket for `meshctl`.
    pub admin_socket: PathBuf,
}

/// The `[kubernetes]` table.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KubernetesSettings {
    /// How to reach the API server; `None`: as a pod does.
    pub kubeconfig: Option<PathBuf>,
    /// The namespace of the controller and of the agents' ServiceAccount.
    #[serde(default = "default_namespace")]
    pub namespace: String,
    /// The agents' ServiceAccount: its tokens let nodes in.
    #[serde(default = "default_agent_service_account")]
    pub agent_service_account: String,
}

/// Why the configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file itself.
    #[error(transparent)]
    File(#[from] FileError),
    /// A value is out of range.
    #[error("{}: {key}: {problem}", path.display())]
    Value {
        /// The file.
        path: PathBuf,
        /// The key.
        key: &'static str,
        /// What is wrong.
        problem: String,
    },
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct ConfigFile {
    mesh_name: String,
    #[serde(default = "default_listen")]
    listen: SocketAddr,
    #[serde(default = "default_state_dir")]
    state_dir: PathBuf,
    manifests: Option<PathBuf>,
    kubernetes: Option<KubernetesSettings>,
    #[serde(default = "default_admin_socket")]
    admin_socket: PathBuf,
}

fn default_namespace() -> String {
    "holdfast".to_owned()
}

fn default_agent_service_account() -> String {
    "mesh-agent".to_owned()
}

fn default_listen() -> SocketAddr {
    SocketAddr::from(([0, 0, 0, 0], 7440))
}

fn default_state_dir() -> PathBuf {
    "/var/lib/holdfast-controller".into()
}

fn default_admin_socket() -> PathBuf {
    "/run/holdfast/controller.sock".into()
}

impl Settings {
    /// Reads and checks the file at `path`.
    ///
    /// # Errors
    ///
    /// [`ConfigError`] with the file, the line and the key.
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        let file: ConfigFile = mesh_daemon::read_toml(path)?;
        let value = |key, problem: String| ConfigError::Value {
            path: path.to_owned(),
            key,
            problem,
        };
        check_trust_domain(&file.mesh_name)
            .map_err(|error| value("mesh_name", error.to_string()))?;
        if let Some(folder) = &file.manifests
            && !folder.is_dir()
        {
            let problem = format!("{} is not a folder", folder.display());
            return Err(value("manifests", problem));
        }
        if file.manifests.is_none() && file.kubernetes.is_none() {
            let problem = "give a folder, or a table [kubernetes], or both".to_owned();
            return Err(value("manifests", problem));
        }
        Ok(Self {
            mesh_name: file.mesh_name,
            listen: file.listen,
            state_dir: file.state_dir,
            manifests: file.manifests,
            kubernetes: file.kubernetes,
            admin_socket: file.admin_socket,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shipped_example_has_only_keys_that_are_known() {
        let text = include_str!("../../examples/controller.toml");
        let file: ConfigFile = toml::from_str(text).unwrap();
        check_trust_domain(&file.mesh_name).unwrap();
    }

    #[test]
    fn a_cluster_needs_no_folder_and_nothing_said_of_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("controller.toml");
        let read = |text: &str| {
            std::fs::write(&path, text).unwrap();
            Settings::read(&path).map_err(|error| error.to_string())
        };
        let settings = read("mesh_name = 'demo'\n[kubernetes]").unwrap();
        let kubernetes = settings.kubernetes.unwrap();
        assert_eq!(kubernetes.namespace, "holdfast");
        assert_eq!(kubernetes.agent_service_account, "mesh-agent");
        assert_eq!((kubernetes.kubeconfig, settings.manifests), (None, None));
        let neither = read("mesh_name = 'demo'").unwrap_err();
        assert!(neither.contains("manifests: give a folder"), "{neither}");
        let typo = read("mesh_name = 'demo'\n[kubernetes]\nkubeconf = 'x'").unwrap_err();
        assert!(typo.contains("cannot parse"), "{typo}");
    }
}
