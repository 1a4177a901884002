//! The configuration: the file as written, then settings as checked.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
};

use mesh_daemon::{FileError, ListenAddress, metrics, traces::TracingSettings};
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
    /// What is shared with other controllers, if it is in etcd. If it is not in Kubernetes either, there is one
    /// controller, and all is in `state_dir`.
    pub etcd: Option<Arc<EtcdSettings>>,
    /// Unix socket for `meshctl`.
    pub admin_socket: PathBuf,
    /// Where Prometheus is shown what the controller did.
    pub metrics: metrics::Listen,
    /// Where traces of changes are sent; `None`: nowhere.
    pub tracing: Option<TracingSettings>,
}

/// The `[etcd]` table, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EtcdSettings {
    /// `host:port` of each member; the host's name is in the member's certificate.
    pub endpoints: Vec<String>,
    /// What all keys begin with; ends with `/`.
    pub prefix: String,
    /// Who signed the members' certificates, PEM.
    pub ca_file: PathBuf,
    /// The certificate that is shown to them.
    pub client: Option<EtcdClient>,
    /// The user that logs in.
    pub login: Option<EtcdLogin>,
}

/// A client's certificate and its key, PEM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EtcdClient {
    /// The certificate.
    pub certificate_file: PathBuf,
    /// Its key.
    pub key_file: PathBuf,
}

/// A user of etcd.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EtcdLogin {
    /// The name.
    pub username: String,
    /// Where the password is.
    pub password_file: PathBuf,
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
    /// Whether what is shared with other controllers is in that namespace too.
    #[serde(default)]
    pub store: bool,
    /// How long after its MeshNode or its Node was deleted a node is taken out of the mesh, in seconds, if it does not come
    /// back: a kubelet that starts again, or an operator who was mistaken, has made it anew by then.
    #[serde(default = "default_removal_grace_s")]
    pub removal_grace_s: u64,
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
    listen: ListenAddress,
    #[serde(default = "default_state_dir")]
    state_dir: PathBuf,
    manifests: Option<PathBuf>,
    kubernetes: Option<KubernetesSettings>,
    etcd: Option<EtcdTable>,
    #[serde(default = "default_admin_socket")]
    admin_socket: PathBuf,
    #[serde(default = "default_metrics_listen")]
    metrics_listen: metrics::Listen,
    tracing: Option<TracingSettings>,
}

/// The `[etcd]` table, as written.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct EtcdTable {
    endpoints: Vec<String>,
    #[serde(default = "default_prefix")]
    prefix: String,
    ca_file: PathBuf,
    certificate_file: Option<PathBuf>,
    key_file: Option<PathBuf>,
    username: Option<String>,
    password_file: Option<PathBuf>,
}

/// Most members: etcd's documentation advises against more than 7.
const ETCD_ENDPOINTS_MAX: usize = 9;

fn default_prefix() -> String {
    "/holdfast/".to_owned()
}

fn default_namespace() -> String {
    "holdfast".to_owned()
}

fn default_agent_service_account() -> String {
    "mesh-agent".to_owned()
}

fn default_removal_grace_s() -> u64 {
    300
}

fn default_listen() -> ListenAddress {
    ListenAddress(([0, 0, 0, 0], 7440).into())
}

fn default_state_dir() -> PathBuf {
    "/var/lib/holdfast-controller".into()
}

fn default_admin_socket() -> PathBuf {
    "/run/holdfast/controller.sock".into()
}

fn default_metrics_listen() -> metrics::Listen {
    metrics::Listen::local(9_642)
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
        let etcd = file.etcd.map(EtcdTable::check).transpose();
        let etcd = etcd.map_err(|problem| value("etcd", problem))?;
        let in_kubernetes = file.kubernetes.as_ref().is_some_and(|table| table.store);
        if in_kubernetes && etcd.is_some() {
            let problem =
                "there is one store: remove this table, or `store = true` in [kubernetes]";
            return Err(value("etcd", problem.to_owned()));
        }
        Ok(Self {
            etcd: etcd.map(Arc::new),
            mesh_name: file.mesh_name,
            listen: file.listen.0,
            state_dir: file.state_dir,
            manifests: file.manifests,
            kubernetes: file.kubernetes,
            admin_socket: file.admin_socket,
            metrics: file.metrics_listen,
            tracing: file.tracing,
        })
    }

    /// What only the controller should be able to read, beside what it writes itself.
    pub fn secret_files(&self) -> impl Iterator<Item = &Path> {
        let etcd = self.etcd.as_deref();
        let key = etcd.and_then(|etcd| Some(etcd.client.as_ref()?.key_file.as_path()));
        let password = etcd.and_then(|etcd| Some(etcd.login.as_ref()?.password_file.as_path()));
        key.into_iter().chain(password)
    }
}

impl EtcdTable {
    fn check(self) -> Result<EtcdSettings, String> {
        let count = self.endpoints.len();
        if count == 0 || count > ETCD_ENDPOINTS_MAX {
            return Err(format!(
                "endpoints: {count} given, 1 to {ETCD_ENDPOINTS_MAX} are needed"
            ));
        }
        let wrong = self.endpoints.iter().find(|endpoint| {
            let parts = endpoint.rsplit_once(':');
            !parts.is_some_and(|(host, port)| {
                !host.is_empty() && !host.contains('/') && port.parse::<u16>().is_ok()
            })
        });
        if let Some(wrong) = wrong {
            return Err(format!(
                "endpoints: {wrong:?} is not `host:port` (connections are TLS always)"
            ));
        }
        if !self.prefix.ends_with('/') {
            return Err(format!("prefix: {:?} does not end with `/`", self.prefix));
        }
        let client = match (self.certificate_file, self.key_file) {
            (None, None) => None,
            (Some(certificate_file), Some(key_file)) => Some(EtcdClient {
                certificate_file,
                key_file,
            }),
            _ => return Err("give `certificate_file` and `key_file`, or none".to_owned()),
        };
        let login = match (self.username, self.password_file) {
            (None, None) => None,
            (Some(username), Some(password_file)) => Some(EtcdLogin {
                username,
                password_file,
            }),
            _ => return Err("give `username` and `password_file`, or none".to_owned()),
        };
        Ok(EtcdSettings {
            endpoints: self.endpoints,
            prefix: self.prefix,
            ca_file: self.ca_file,
            client,
            login,
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
        assert_eq!(file.metrics_listen, default_metrics_listen());
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
        let both = read(
            "mesh_name = 'demo'\n[kubernetes]\nstore = true\n[etcd]\nendpoints = ['a:1']\nca_file = 'c'",
        );
        let both = both.unwrap_err();
        assert!(both.contains("etcd: there is one store"), "{both}");
        let typo = read("mesh_name = 'demo'\n[kubernetes]\nkubeconf = 'x'").unwrap_err();
        assert!(typo.contains("cannot parse"), "{typo}");
    }
    #[test]
    fn etcd_is_checked_key_by_key() {
        let check = |table: &str| {
            let table: EtcdTable = toml::from_str(table).unwrap();
            table.check()
        };
        let full = check(
            "endpoints = ['a:2379', '[::1]:2379']\nca_file = 'ca'\ncertificate_file = 'c'\nkey_file = 'k'\nusername = 'u'\npassword_file = 'p'",
        );
        let full = full.unwrap();
        assert_eq!(
            (full.endpoints.len(), full.prefix.as_str()),
            (2, "/holdfast/")
        );
        assert!(full.client.is_some() && full.login.is_some());
        for (wrong, said) in [
            ("endpoints = []", "endpoints: 0 given"),
            ("endpoints = ['https://a:2379']", "TLS always"),
            ("endpoints = ['a:1']\nprefix = '/x'", "does not end with"),
            ("endpoints = ['a:1']\nkey_file = 'k'", "certificate_file"),
            ("endpoints = ['a:1']\nusername = 'u'", "password_file"),
        ] {
            let error = check(&format!("{wrong}\nca_file = 'ca'")).unwrap_err();
            assert!(error.contains(said), "{error}");
        }
    }
}
