//! The `[proxy]` table: as written, then as checked.

use std::{
    net::SocketAddr,
    num::NonZeroUsize,
    ops::RangeInclusive,
    path::{Path, PathBuf},
    time::Duration,
};

use mesh_core::{
    pattern::NamePattern,
    proxy::{ClientName, Rule},
};
use mesh_wire::id::SiteName;
use serde::Deserialize;

/// Most rules: each is compared with each request. A mesh has a few kinds of operators and a few of sites.
const RULES_MAX: usize = 256;

/// Most addresses to listen at: both families in a few networks.
const LISTEN_MAX: usize = 16;

/// Checked settings of the proxy.
#[derive(Debug, Clone)]
pub struct ProxySettings {
    /// Unix socket, whose clients are known by their user.
    pub socket: Option<PathBuf>,
    /// TCP addresses, and the files of mutual TLS.
    pub tls: Option<TlsSettings>,
    /// Where each connection is written down.
    pub audit_log: PathBuf,
    /// Most connections to nodes at once,
    pub connections_max: usize,
    /// and of these, of one client.
    pub connections_per_client_max: usize,
    /// How long a node may take to accept a connection.
    pub connect_timeout: Duration,
    /// How long no byte may go either way.
    pub idle_timeout: Duration,
    /// How long the other side's kernel may leave what was sent unanswered: it is gone then.
    pub unanswered_timeout: Duration,
    /// Who may reach what. What no rule allows is refused.
    pub rules: Vec<Rule>,
}

/// Where TCP clients come, and how both sides prove who they are. Files are read again once they change.
#[derive(Debug, Clone)]
pub struct TlsSettings {
    /// Addresses.
    pub listen: Vec<SocketAddr>,
    /// The proxy's certificate, and those that lead to its authority (PEM).
    pub certificate: PathBuf,
    /// Its key (PEM).
    pub key: PathBuf,
    /// The authorities of clients' certificates (PEM).
    pub client_ca: PathBuf,
}

/// The table as written.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct ProxyFile {
    socket: Option<PathBuf>,
    #[serde(default)]
    listen: Vec<SocketAddr>,
    certificate: Option<PathBuf>,
    key: Option<PathBuf>,
    client_ca: Option<PathBuf>,
    #[serde(default = "default_audit_log")]
    audit_log: PathBuf,
    #[serde(default = "default_connections_max")]
    connections_max: NonZeroUsize,
    #[serde(default = "default_connections_per_client_max")]
    connections_per_client_max: NonZeroUsize,
    /// How many seconds a node may take to accept a connection.
    #[serde(default = "default_connect_timeout_s")]
    connect_timeout_s: u32,
    /// For how many seconds no byte may go either way.
    #[serde(default = "default_idle_timeout_s")]
    idle_timeout_s: u32,
    /// For how many seconds the other side's kernel may leave what was sent unanswered.
    #[serde(default = "default_unanswered_timeout_s")]
    unanswered_timeout_s: u32,
    #[serde(default)]
    allow: Vec<RuleFile>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RuleFile {
    /// `uid:`, `cn:`, `o:` or `uri:` and what it has to be; one that fits is enough.
    clients: Vec<String>,
    /// Names of nodes, or their beginning and `*`.
    #[serde(default)]
    nodes: Vec<String>,
    /// All nodes of these sites.
    #[serde(default)]
    sites: Vec<SiteName>,
    /// TCP ports.
    ports: Vec<PortFile>,
}

/// `10250` or `"9100-9110"`.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum PortFile {
    One(u16),
    Several(String),
}

fn default_audit_log() -> PathBuf {
    "/var/log/holdfast/proxy.jsonl".into()
}

/// Two sockets each, so 600 of the 1,024 file descriptors that a process has unless more are given to it; with two
/// buffers of 8 KiB and TLS's own of up to 48 KiB each, 19 MiB.
fn default_connections_max() -> NonZeroUsize {
    NonZeroUsize::MIN.saturating_add(299)
}

/// An API server with many `kubectl logs -f` leaves room for others.
fn default_connections_per_client_max() -> NonZeroUsize {
    NonZeroUsize::MIN.saturating_add(199)
}

/// Waking a path takes 2 s at worst (`../shared/paths.md`), on a bad link a few more for TCP; an API server waits 30 s.
fn default_connect_timeout_s() -> u32 {
    10
}

/// As long as the kubelet lets a session idle (`streamingConnectionIdleTimeout`, kubelet-config.v1beta1).
fn default_idle_timeout_s() -> u32 {
    4 * 3_600
}

/// A link that is back within a minute finds its sessions as they were.
fn default_unanswered_timeout_s() -> u32 {
    60
}

impl ProxyFile {
    /// # Errors
    ///
    /// Which key is wrong, and what would be right.
    pub(crate) fn check(self, admin_socket: &Path) -> Result<ProxySettings, String> {
        if self.socket.as_deref() == Some(admin_socket) {
            return Err("`socket` must not be `admin_socket`".to_owned());
        }
        if self.socket.is_none() && self.listen.is_empty() {
            return Err("needs `socket`, `listen`, or both".to_owned());
        }
        if self.listen.len() > LISTEN_MAX {
            let count = self.listen.len();
            return Err(format!(
                "`listen` has {count} addresses, at most {LISTEN_MAX} can be"
            ));
        }
        let tls = match (self.certificate, self.key, self.client_ca) {
            (None, None, None) if self.listen.is_empty() => None,
            (Some(certificate), Some(key), Some(client_ca)) if !self.listen.is_empty() => {
                Some(TlsSettings {
                    listen: self.listen,
                    certificate,
                    key,
                    client_ca,
                })
            }
            _ => {
                return Err(
                    "`listen`, `certificate`, `key` and `client_ca` go together: \
                     clients at TCP addresses are known by their certificates"
                        .to_owned(),
                );
            }
        };
        let seconds = |key: &str, value: u32| match value {
            0 => Err(format!("`{key}` must be at least 1")),
            value => Ok(Duration::from_secs(value.into())),
        };
        if self.allow.len() > RULES_MAX {
            let count = self.allow.len();
            return Err(format!(
                "{count} rules (`allow`), at most {RULES_MAX} can be"
            ));
        }
        let rules = self.allow.into_iter().enumerate();
        let rules = rules.map(|(index, rule)| {
            rule.check()
                .map_err(|problem| format!("rule {} (`allow`): {problem}", index + 1))
        });
        Ok(ProxySettings {
            socket: self.socket,
            tls,
            audit_log: self.audit_log,
            connections_max: self.connections_max.get(),
            connections_per_client_max: self.connections_per_client_max.get(),
            connect_timeout: seconds("connect_timeout_s", self.connect_timeout_s)?,
            idle_timeout: seconds("idle_timeout_s", self.idle_timeout_s)?,
            unanswered_timeout: seconds("unanswered_timeout_s", self.unanswered_timeout_s)?,
            rules: rules.collect::<Result<_, _>>()?,
        })
    }
}

impl RuleFile {
    fn check(self) -> Result<Rule, String> {
        let clients = self.clients.iter().map(|text| text.parse::<ClientName>());
        let clients: Vec<_> = clients
            .collect::<Result<_, _>>()
            .map_err(|error| error.to_string())?;
        if clients.is_empty() {
            return Err("`clients` is empty".to_owned());
        }
        if self.nodes.is_empty() && self.sites.is_empty() {
            return Err("names no `nodes` and no `sites`; all nodes are [\"*\"]".to_owned());
        }
        if self.ports.is_empty() {
            return Err("`ports` is empty".to_owned());
        }
        let inner = |pattern: &&String| pattern.strip_suffix('*').unwrap_or(pattern).contains('*');
        if let Some(pattern) = self.nodes.iter().find(inner) {
            return Err(format!("node {pattern:?} has a `*` that is not at its end"));
        }
        Ok(Rule {
            clients,
            nodes: self.nodes.into_iter().map(NamePattern::new).collect(),
            sites: self.sites,
            ports: self
                .ports
                .into_iter()
                .map(PortFile::check)
                .collect::<Result<_, _>>()?,
        })
    }
}

impl PortFile {
    fn check(self) -> Result<RangeInclusive<u16>, String> {
        let range = match &self {
            Self::One(port) => Some(*port..=*port),
            Self::Several(text) => text
                .split_once('-')
                .and_then(|(first, last)| Some(first.parse().ok()?..=last.parse().ok()?)),
        };
        range
            .filter(|range| *range.start() > 0 && !range.is_empty())
            .ok_or_else(|| format!("port {self:?} is neither a port nor \"first-last\""))
    }
}
