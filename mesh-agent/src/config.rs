//! The configuration: the file as written, then settings as checked.

mod dns;

use std::{
    collections::BTreeSet,
    env,
    net::SocketAddr,
    num::NonZeroUsize,
    ops::RangeInclusive,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use mesh_core::pattern::NamePattern;
use mesh_daemon::{FileError, http_proxy::HttpProxy, metrics};
use mesh_wire::id::NodeName;
use serde::Deserialize;

use self::dns::DnsConfig;
use crate::{
    admin::operators,
    proxy::settings::{ProxyFile, ProxySettings},
    sync::VISITS_EVERY,
    uplinks::UplinkRule,
};

/// Checked settings of the agent.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The node's name in the mesh.
    pub node_name: NodeName,
    /// `host:port` of each controller, any of which will do; none: serve what is on disk.
    pub controllers: Vec<String>,
    /// Where the join token is; only read when there is no certificate yet.
    pub token: TokenSource,
    /// Keys, certificate, snapshot.
    pub state_dir: PathBuf,
    /// Name of the TUN device.
    pub interface: String,
    /// UDP port of WireGuard and STUN.
    pub listen_port: u16,
    /// Threads that move packets, each with a queue of the TUN device and sockets of its own.
    pub packet_threads: usize,
    /// Unix socket for `meshctl`.
    pub admin_socket: PathBuf,
    /// Where Prometheus asks.
    pub metrics_listen: metrics::Listen,
    /// The cgroup whose processes see services; `None`: the cgroup2 root.
    pub cgroup: Option<PathBuf>,
    /// Whether to load the eBPF programs.
    pub services: bool,
    /// Whether the mesh's policies are enforced on this node.
    pub policy: bool,
    /// Interfaces whose devices use services through this node.
    pub service_interfaces: BTreeSet<String>,
    /// Interfaces between which, and the mesh's own, packets go past the host's stack.
    pub pod_interfaces: BTreeSet<NamePattern>,
    /// Where this node's CNI plug-in looks; `None`: it has none.
    pub cni: Option<PathBuf>,
    /// The CONNECT proxy to the mesh's nodes; `None`: this node has none.
    pub proxy: Option<ProxySettings>,
    /// Nodes whose operators may look at this one (`meshctl --node`); none: nobody.
    pub operators: Vec<NamePattern>,
    /// The HTTP proxy to the outside, for TLS to relays and controllers; `None`: there is none.
    pub https_proxy: Option<Arc<HttpProxy>>,
    /// What is to be known of this machine's ways out.
    pub uplinks: Vec<UplinkRule>,
    /// How long the controller is not asked, at most, while the way out is metered.
    pub metered_sync: Duration,
    /// Addresses where this node's UDP socket is reachable for sure.
    pub static_candidates: Vec<SocketAddr>,
    /// Whether default gateways are asked to lead an outside port to this node's (PCP, NAT-PMP, UPnP).
    pub port_mapping: bool,
    /// Whether the node takes part in bursts of sockets and guesses, by which an easy and a hard NAT become direct.
    pub hard_nat_bursts: bool,
    /// Whether the node announces itself on its LANs, and listens for others.
    pub lan_discovery: bool,
    /// Where DNS listens, and what it forwards to.
    pub dns: mesh_dns::server::DnsConfig,
}

/// Where the join token is.
#[derive(Debug, Clone)]
pub enum TokenSource {
    /// Nowhere.
    None,
    /// In the configuration itself.
    Inline(SecretText),
    /// In this file.
    File(PathBuf),
    /// The node is one of a Kubernetes cluster, and its pod's ServiceAccount token counts.
    ServiceAccount {
        /// The token, written by the kubelet again and again.
        token: PathBuf,
        /// Which mesh it is, as the controller published it.
        mesh: PathBuf,
    },
}

/// A text that must not be logged.
#[derive(Clone, Deserialize)]
#[serde(transparent)]
pub struct SecretText(pub String);

impl std::fmt::Debug for SecretText {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("(secret)")
    }
}

/// The `[cni]` table.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct CniConfig {
    /// `stateDir` of the plug-in's network configuration.
    #[serde(default = "default_cni_state_dir")]
    state_dir: PathBuf,
}

fn default_cni_state_dir() -> PathBuf {
    mesh_api::cni::STATE_DIR.into()
}

/// An `[[uplink]]` table.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct UplinkFile {
    interface: String,
    weight: Option<u16>,
    #[serde(default)]
    metered: bool,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct ConfigFile {
    node_name: Option<NodeName>,
    #[serde(default)]
    controller: Controllers,
    token: Option<SecretText>,
    token_file: Option<PathBuf>,
    service_account_token_file: Option<PathBuf>,
    mesh_file: Option<PathBuf>,
    #[serde(default = "default_state_dir")]
    state_dir: PathBuf,
    #[serde(default = "default_interface")]
    interface: String,
    #[serde(default = "default_listen_port")]
    listen_port: u16,
    #[serde(default = "default_packet_threads")]
    packet_threads: NonZeroUsize,
    #[serde(default = "default_admin_socket")]
    admin_socket: PathBuf,
    #[serde(default = "default_metrics_listen")]
    metrics_listen: metrics::Listen,
    cgroup: Option<PathBuf>,
    #[serde(default = "default_true")]
    services: bool,
    #[serde(default = "default_true")]
    policy: bool,
    #[serde(default)]
    service_interfaces: Vec<String>,
    #[serde(default)]
    pod_interfaces: Vec<String>,
    cni: Option<CniConfig>,
    proxy: Option<ProxyFile>,
    #[serde(default)]
    operators: Vec<String>,
    https_proxy: Option<SecretText>,
    no_proxy: Option<Vec<String>>,
    #[serde(default)]
    uplink: Vec<UplinkFile>,
    #[serde(default = "default_metered_sync_s")]
    metered_sync_s: u64,
    #[serde(default)]
    static_candidates: Vec<SocketAddr>,
    #[serde(default = "default_true")]
    port_mapping: bool,
    #[serde(default)]
    hard_nat_bursts: bool,
    #[serde(default = "default_true")]
    lan_discovery: bool,
    #[serde(default)]
    dns: DnsConfig,
}

/// One `host:port`, or a list of them.
#[derive(Debug, Deserialize)]
#[serde(untagged, expecting = "`host:port`, or a list of them, expected")]
enum Controllers {
    One(String),
    Several(Vec<String>),
}

impl Default for Controllers {
    fn default() -> Self {
        Self::Several(Vec::new())
    }
}

fn default_state_dir() -> PathBuf {
    "/var/lib/holdfast".into()
}

fn default_interface() -> String {
    "holdfast0".into()
}

/// WireGuard's customary port.
fn default_listen_port() -> u16 {
    51_820
}

/// Most packet threads unless more are asked for: four fill a link of 10 Gb/s, and the rest of a
/// large machine belongs to its users.
const DEFAULT_PACKET_THREADS_MAX: usize = 4;

/// One for each core.
fn default_packet_threads() -> NonZeroUsize {
    let most = NonZeroUsize::new(DEFAULT_PACKET_THREADS_MAX).unwrap_or(NonZeroUsize::MIN);
    std::thread::available_parallelism().map_or(NonZeroUsize::MIN, |cores| cores.min(most))
}

fn default_metered_sync_s() -> u64 {
    VISITS_EVERY.as_secs()
}

fn default_metrics_listen() -> metrics::Listen {
    metrics::Listen::local(9_640)
}

fn default_admin_socket() -> PathBuf {
    "/run/holdfast/agent.sock".into()
}

fn default_true() -> bool {
    true
}

/// The node's name where the configuration is the same for all nodes: in Kubernetes, from `spec.nodeName`.
const NODE_NAME_VARIABLE: &str = "HOLDFAST_NODE_NAME";

/// `host:port` of a controller, beside those in the file: in Kubernetes, of the controllers' Service, as the kubelet says it
/// where names cannot be resolved yet.
const CONTROLLER_VARIABLE: &str = "HOLDFAST_CONTROLLER";

/// Most controllers: two or three serve a mesh, and a node tries one after the other.
const CONTROLLERS_MAX: usize = 16;

/// Longest name of a network interface (`IFNAMSIZ` − 1, linux/if.h).
const INTERFACE_NAME_LEN_MAX: usize = 15;

/// Most `service_interfaces`: a gateway with a VLAN for each machine hall. Each is looked up, by three
/// system calls, whenever a link or an address of the machine changes.
const SERVICE_INTERFACES_MAX: usize = 64;

/// Most `pod_interfaces`: one for each kind of network plug-in, and some to spare. All are compared with the name of each
/// interface whenever the network changes.
const POD_PATTERNS_MAX: usize = 16;

/// Most `[[uplink]]` tables: twice what the core has use for.
const UPLINK_RULES_MAX: usize = 16;

/// What `metered_sync_s` may be: for tests and meters that do not count much; and once a day, as a certificate of a week
/// is renewed when half of it is over.
const METERED_SYNC_S: RangeInclusive<u64> = 10..=86_400;

/// Why the configuration cannot be used. Exit code 64.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file itself.
    #[error(transparent)]
    File(#[from] FileError),
    /// A value is out of its range.
    #[error("{path}: `{key}`: {problem}")]
    Value {
        /// The file.
        path: PathBuf,
        /// The key.
        key: &'static str,
        /// What is wrong, and what would be right.
        problem: String,
    },
}

impl Settings {
    /// Reads and checks the configuration file at `path`.
    ///
    /// # Errors
    ///
    /// [`ConfigError`], which names the file and the key.
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        Self::check(path, mesh_daemon::read_toml(path)?)
    }

    fn check(path: &Path, file: ConfigFile) -> Result<Self, ConfigError> {
        let bad = |key, problem: String| ConfigError::Value {
            path: path.to_owned(),
            key,
            problem,
        };
        let node_name = match (file.node_name.clone(), env::var(NODE_NAME_VARIABLE)) {
            (Some(name), _) => name,
            (None, Ok(text)) => text.parse().map_err(|error| {
                bad(
                    "node_name",
                    format!("{NODE_NAME_VARIABLE}={text:?}: {error}"),
                )
            })?,
            (None, Err(_)) => {
                let text = format!("missing: say it here, or in {NODE_NAME_VARIABLE}");
                return Err(bad("node_name", text));
            }
        };
        check_interface_name(&file.interface).map_err(|problem| bad("interface", problem))?;
        let service_interfaces =
            service_interfaces(&file).map_err(|problem| bad("service_interfaces", problem))?;
        if file.cni.is_some() && !file.services {
            return Err(bad("cni", "needs `services = true`".to_owned()));
        }
        let pod_interfaces =
            pod_interfaces(&file).map_err(|problem| bad("pod_interfaces", problem))?;
        if file.listen_port == 0 {
            return Err(bad(
                "listen_port",
                "must be 1 to 65535; the default is 51820".to_owned(),
            ));
        }
        let controllers = controllers(
            file.controller,
            env::var(CONTROLLER_VARIABLE).ok().as_deref(),
        )
        .map_err(|problem| bad("controller", problem))?;
        let token = token_source(
            (file.token, file.token_file),
            (file.service_account_token_file, file.mesh_file),
        );
        let token = token.map_err(|(key, problem)| bad(key, problem.to_owned()))?;
        let proxy = file.proxy.map(|proxy| proxy.check(&file.admin_socket));
        let proxy = proxy.transpose().map_err(|problem| bad("proxy", problem))?;
        let operators =
            operators::patterns(file.operators).map_err(|problem| bad("operators", problem))?;
        let https_proxy = HttpProxy::choose(
            file.https_proxy.as_ref().map(|url| url.0.as_str()),
            file.no_proxy.as_deref(),
        )
        .map_err(|problem| bad("https_proxy", problem))?;
        let uplinks =
            uplinks(file.uplink, &file.interface).map_err(|problem| bad("uplink", problem))?;
        if !METERED_SYNC_S.contains(&file.metered_sync_s) {
            let (least, most) = (METERED_SYNC_S.start(), METERED_SYNC_S.end());
            let text = format!("must be {least} to {most} seconds; the default is 3600");
            return Err(bad("metered_sync_s", text));
        }
        if file.dns.leave_out_denied && !file.policy {
            let text = "needs `policy = true`: on this node nothing is denied to pods";
            return Err(bad("dns.leave_out_denied", text.to_owned()));
        }
        Ok(Self {
            node_name,
            controllers,
            token,
            state_dir: file.state_dir,
            interface: file.interface,
            listen_port: file.listen_port,
            packet_threads: file.packet_threads.get(),
            admin_socket: file.admin_socket,
            metrics_listen: file.metrics_listen,
            cgroup: file.cgroup,
            services: file.services,
            policy: file.policy,
            service_interfaces,
            pod_interfaces,
            cni: file.cni.map(|cni| cni.state_dir),
            proxy,
            operators,
            https_proxy: https_proxy.map(Arc::new),
            uplinks,
            metered_sync: Duration::from_secs(file.metered_sync_s),
            static_candidates: file.static_candidates,
            port_mapping: file.port_mapping,
            hard_nat_bursts: file.hard_nat_bursts,
            lan_discovery: file.lan_discovery,
            dns: file
                .dns
                .settings()
                .map_err(|error| bad("dns", error.to_string()))?,
        })
    }
}

fn controllers(written: Controllers, variable: Option<&str>) -> Result<Vec<String>, String> {
    let mut controllers = match written {
        Controllers::One(controller) => vec![controller],
        Controllers::Several(controllers) => controllers,
    };
    // What the kubelet knows no Service for it leaves as it is written in the manifest.
    let filled = variable.filter(|text| !text.is_empty() && !text.contains("$("));
    controllers.extend(filled.map(|text| match text.rsplit_once(':') {
        Some((host, port)) if host.contains(':') && !host.starts_with('[') => {
            format!("[{host}]:{port}")
        }
        Some(_) | None => text.to_owned(),
    }));
    if controllers.len() > CONTROLLERS_MAX {
        return Err(format!(
            "{} controllers, at most {CONTROLLERS_MAX} are tried",
            controllers.len()
        ));
    }
    match controllers.iter().find(|one| !is_host_port(one)) {
        Some(wrong) => Err(format!("{wrong:?} is not `host:port`")),
        None => Ok(controllers),
    }
}

/// The one source that is named, or the key that is wrong and why.
fn token_source(
    (token, file): (Option<SecretText>, Option<PathBuf>),
    (account, mesh): (Option<PathBuf>, Option<PathBuf>),
) -> Result<TokenSource, (&'static str, &'static str)> {
    match (token, file, account, mesh) {
        (None, None, None, None) => Ok(TokenSource::None),
        (Some(token), None, None, None) => Ok(TokenSource::Inline(token)),
        (None, Some(file), None, None) => Ok(TokenSource::File(file)),
        (None, None, Some(token), Some(mesh)) => Ok(TokenSource::ServiceAccount { token, mesh }),
        (None, None, Some(_), None) => Err((
            "service_account_token_file",
            "needs `mesh_file`: by what it says the node knows the controller",
        )),
        (_, _, None, Some(_)) => Err(("mesh_file", "is only for `service_account_token_file`")),
        _ => Err((
            "token",
            "give one of `token`, `token_file` and `service_account_token_file`",
        )),
    }
}

fn check_interface_name(name: &str) -> Result<(), String> {
    let odd = |c: char| c == '/' || c.is_whitespace() || !c.is_ascii();
    if (1..=INTERFACE_NAME_LEN_MAX).contains(&name.len()) && !name.contains(odd) {
        return Ok(());
    }
    Err(format!(
        "{name:?} is not an interface name (1 to {INTERFACE_NAME_LEN_MAX} characters without `/` and spaces)"
    ))
}

fn service_interfaces(file: &ConfigFile) -> Result<BTreeSet<String>, String> {
    let names = &file.service_interfaces;
    names
        .iter()
        .try_for_each(|name| check_interface_name(name))?;
    if names.contains(&file.interface) {
        return Err(format!(
            "{:?} is the mesh's own interface: name those of the devices",
            file.interface
        ));
    }
    if !names.is_empty() && !file.services {
        return Err("needs `services = true`".to_owned());
    }
    if names.len() > SERVICE_INTERFACES_MAX {
        return Err(format!(
            "{} interfaces, at most {SERVICE_INTERFACES_MAX} can be served",
            names.len()
        ));
    }
    Ok(names.iter().cloned().collect())
}

fn uplinks(written: Vec<UplinkFile>, own: &str) -> Result<Vec<UplinkRule>, String> {
    if written.len() > UPLINK_RULES_MAX {
        return Err(format!(
            "{} tables, at most {UPLINK_RULES_MAX} are read",
            written.len()
        ));
    }
    let mut rules: Vec<UplinkRule> = Vec::new();
    for uplink in written {
        let name = uplink.interface;
        check_interface_pattern(&name)?;
        if name == own {
            return Err(format!("{name:?} is the mesh's own interface"));
        }
        let interface = NamePattern::new(name.clone());
        if rules.iter().any(|rule| rule.interface == interface) {
            return Err(format!(
                "{name:?} is there twice: the first one would count"
            ));
        }
        rules.push(UplinkRule {
            interface,
            weight: uplink.weight,
            metered: uplink.metered,
        });
    }
    Ok(rules)
}

/// A name, or its beginning and `*`.
fn check_interface_pattern(pattern: &str) -> Result<(), String> {
    let beginning = pattern.strip_suffix('*').unwrap_or(pattern);
    if beginning.contains('*') {
        return Err(format!("{pattern:?} has a `*` that is not at its end"));
    }
    if beginning.is_empty() && !pattern.is_empty() {
        return Ok(());
    }
    check_interface_name(beginning)
}

fn pod_interfaces(file: &ConfigFile) -> Result<BTreeSet<NamePattern>, String> {
    let patterns = &file.pod_interfaces;
    patterns
        .iter()
        .try_for_each(|pattern| check_interface_pattern(pattern))?;
    if !patterns.is_empty() && !file.services {
        return Err("needs `services = true`".to_owned());
    }
    if patterns.len() > POD_PATTERNS_MAX {
        return Err(format!(
            "{} patterns, at most {POD_PATTERNS_MAX} can be followed",
            patterns.len()
        ));
    }
    Ok(patterns.iter().cloned().map(NamePattern::new).collect())
}

fn is_host_port(text: &str) -> bool {
    let parts = text.rsplit_once(':');
    parts.is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok_and(|p| p != 0))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Settings, String> {
        let file = toml::from_str(text).map_err(|error| error.to_string())?;
        let checked = Settings::check(Path::new("/etc/holdfast/agent.toml"), file);
        checked.map_err(|error| error.to_string())
    }

    #[test]
    fn a_controller_that_the_kubelet_knows_is_asked_beside_those_in_the_file() {
        let asked = |variable| {
            let written = Controllers::One("controller.example:7440".to_owned());
            controllers(written, variable).map(|all| all.into_iter().skip(1).collect::<Vec<_>>())
        };
        for nothing in [None, Some(""), Some("$(HOST):$(PORT)")] {
            assert_eq!(asked(nothing), Ok(vec![]), "{nothing:?}");
        }
        for (said, meant) in [
            ("10.96.0.7:7440", "10.96.0.7:7440"),
            ("fd00::7:7440", "[fd00::7]:7440"),
            ("[fd00::7]:7440", "[fd00::7]:7440"),
        ] {
            assert_eq!(asked(Some(said)), Ok(vec![meant.to_owned()]));
        }
        assert!(asked(Some("nonsense")).is_err());
    }

    #[test]
    fn a_name_is_all_that_is_needed() {
        let settings = parse("node_name = 'edge-a1'").unwrap();
        assert_eq!(settings.listen_port, 51_820);
        assert_eq!(settings.dns.listen, ["169.254.53.53:53".parse().unwrap()]);
    }

    #[test]
    fn the_shipped_example_is_what_the_defaults_are() {
        let example = parse(include_str!("../../examples/agent.toml")).unwrap();
        let defaults = parse("node_name = 'edge-a1'").unwrap();
        assert_eq!(example.state_dir, defaults.state_dir);
        assert_eq!(example.interface, defaults.interface);
        assert_eq!(example.listen_port, defaults.listen_port);
        assert_eq!(example.admin_socket, defaults.admin_socket);
        assert_eq!(example.metrics_listen, defaults.metrics_listen);
        assert_eq!(example.dns.listen, defaults.dns.listen);
        assert!(example.services && example.policy);
        assert!(example.port_mapping && example.lan_discovery);
        assert!(!example.hard_nat_bursts && !defaults.hard_nat_bursts);
        assert_eq!(example.dns, defaults.dns);
    }

    #[test]
    fn a_typo_names_line_key_and_accepted_keys() {
        let error = parse("node_name = 'edge-a1'\nlisten_prot = 1").unwrap_err();
        for part in ["line 2", "listen_prot", "listen_port"] {
            assert!(error.contains(part), "{part} is not in: {error}");
        }
    }

    #[test]
    fn values_out_of_range_are_refused_with_their_key() {
        for (key, line) in [
            ("interface", "interface = 'a name too long'"),
            ("listen_port", "listen_port = 0"),
            ("controller", "controller = 'nowhere'"),
            ("controller", "controller = ['a:1', 'nowhere']"),
            ("controller", "controller = 7"),
            ("token", "token = 'a'\ntoken_file = 'b'"),
            (
                "token",
                "token = 'a'\nservice_account_token_file = 'b'\nmesh_file = 'c'",
            ),
            (
                "service_account_token_file",
                "service_account_token_file = 'b'",
            ),
            ("mesh_file", "token_file = 'b'\nmesh_file = 'c'"),
            ("node_name", "node_name = 'Edge'"),
            ("service_interfaces", "service_interfaces = ['br lan']"),
            ("service_interfaces", "service_interfaces = ['holdfast0']"),
            ("pod_interfaces", "pod_interfaces = ['v*h']"),
            ("pod_interfaces", "pod_interfaces = ['a name*']"),
            (
                "pod_interfaces",
                "services = false\npod_interfaces = ['veth*']",
            ),
            (
                "service_interfaces",
                "services = false\nservice_interfaces = ['lan0']",
            ),
            ("metered_sync_s", "metered_sync_s = 9"),
            ("metered_sync_s", "metered_sync_s = 86401"),
            ("uplink", "[[uplink]]\ninterface = 'w*n'"),
            ("uplink", "[[uplink]]\ninterface = ''"),
            ("uplink", "[[uplink]]\ninterface = 'holdfast0'"),
            (
                "uplink",
                "[[uplink]]\ninterface = 'eth0'\n[[uplink]]\ninterface = 'eth0'",
            ),
            ("https_proxy", "https_proxy = 'socks5://10.0.0.1:1080'"),
            ("https_proxy", "https_proxy = 'http://10.0.0.1:99999'"),
        ] {
            let name = if key == "node_name" {
                ""
            } else {
                "node_name = 'edge-a1'\n"
            };
            let error = parse(&format!("{name}{line}")).unwrap_err();
            assert!(error.contains(key), "{error}");
        }
    }

    #[test]
    fn what_is_denied_is_left_out_of_answers_only_where_policies_are_enforced() {
        let leaves_out = |policy| {
            let text =
                format!("node_name = 'edge-a1'\npolicy = {policy}\n[dns]\nleave_out_denied = true");
            parse(&text).map(|settings| settings.dns.leave_out_denied)
        };
        assert_eq!(leaves_out(true), Ok(true));
        let error = leaves_out(false).unwrap_err();
        assert!(error.contains("dns.leave_out_denied"), "{error}");
    }

    #[test]
    fn there_may_be_one_controller_or_several_or_none() {
        let controllers = |line: &str| {
            let settings = parse(&format!("node_name = 'a'\n{line}")).unwrap();
            settings.controllers
        };
        assert_eq!(controllers(""), [""; 0]);
        assert_eq!(controllers("controller = 'a:1'"), ["a:1"]);
        assert_eq!(controllers("controller = ['a:1', 'b:2']"), ["a:1", "b:2"]);
        let many = vec!["'a:1'"; CONTROLLERS_MAX + 1].join(", ");
        let error = parse(&format!("node_name = 'a'\ncontroller = [{many}]")).unwrap_err();
        assert!(error.contains("at most 16"), "{error}");
    }

    #[test]
    fn a_proxy_needs_a_place_and_rules_that_say_what_they_mean() {
        let parse = |lines: &str| parse(&format!("node_name = 'gw'\n[proxy]\n{lines}"));
        let settings = parse(
            "socket = '/run/p.sock'\n[[proxy.allow]]\nclients = ['uid:0']\nnodes = ['edge-*']\n\
             ports = [22, '9100-9110']",
        );
        let proxy = settings.unwrap().proxy.unwrap();
        assert!(proxy.tls.is_none());
        assert_eq!(proxy.rules[0].ports, [22..=22, 9_100..=9_110]);
        let rule = |rule: &str| format!("socket = 's'\n[[proxy.allow]]\n{rule}");
        for (wrong, said) in [
            ("".to_owned(), "needs `socket`"),
            (
                "listen = ['10.0.0.1:8131']".to_owned(),
                "`client_ca` go together",
            ),
            ("socket = 's'\ncertificate = 'c'".to_owned(), "go together"),
            (
                "socket = '/run/holdfast/agent.sock'".to_owned(),
                "`admin_socket`",
            ),
            (
                "socket = 's'\nidle_timeout_s = 0".to_owned(),
                "idle_timeout_s",
            ),
            (
                "socket = 's'\nconnections_max = 0".to_owned(),
                "connections_max",
            ),
            (
                rule("clients = ['root']\nnodes = ['*']\nports = [22]"),
                "rule 1",
            ),
            (
                rule("clients = []\nnodes = ['*']\nports = [22]"),
                "`clients` is empty",
            ),
            (rule("clients = ['uid:0']\nports = [22]"), "all nodes are"),
            (
                rule("clients = ['uid:0']\nnodes = ['a*b']\nports = [22]"),
                "not at its end",
            ),
            (
                rule("clients = ['uid:0']\nnodes = ['*']\nports = []"),
                "`ports` is empty",
            ),
            (
                rule("clients = ['uid:0']\nnodes = ['*']\nports = [0]"),
                "neither a port",
            ),
            (
                rule("clients = ['uid:0']\nnodes = ['*']\nports = ['9-8']"),
                "neither a port",
            ),
        ] {
            let error = parse(&wrong).unwrap_err();
            assert!(error.contains(said), "{said} is not in: {error}");
        }
    }

    #[test]
    fn interfaces_beyond_the_limit_are_refused_and_a_name_counts_once() {
        let config = |count: usize| {
            let names: Vec<_> = (0..count).map(|n| format!("'lan{n}'")).collect();
            parse(&format!(
                "node_name = 'a'\nservice_interfaces = [{}]",
                names.join(", ")
            ))
        };
        let most = config(SERVICE_INTERFACES_MAX).unwrap();
        assert_eq!(most.service_interfaces.len(), SERVICE_INTERFACES_MAX);
        let error = config(SERVICE_INTERFACES_MAX + 1).unwrap_err();
        assert!(error.contains("at most 64"), "{error}");
        let twice = parse("node_name = 'a'\nservice_interfaces = ['lan0', 'lan0']").unwrap();
        assert_eq!(twice.service_interfaces.len(), 1);
    }

    #[test]
    fn uplinks_are_named_or_meant_by_their_beginning_and_only_so_many() {
        let config = "node_name = 'a'\n[[uplink]]\ninterface = 'wwan*'\nmetered = true\n\
                      [[uplink]]\ninterface = '*'\nweight = 7";
        let rules = parse(config).unwrap().uplinks;
        let shown = rules
            .iter()
            .map(|rule| (rule.interface.matches("wwan0"), rule.weight, rule.metered));
        let expected = [(true, None, true), (true, Some(7), false)];
        assert_eq!(shown.collect::<Vec<_>>(), expected);
        let table = |number| format!("[[uplink]]\ninterface = 'eth{number}'\n");
        let many: String = (0..=UPLINK_RULES_MAX).map(table).collect();
        let error = parse(&format!("node_name = 'a'\n{many}")).unwrap_err();
        assert!(error.contains("at most 16"), "{error}");
    }

    #[test]
    fn operators_are_names_or_their_beginnings_and_nobody_without_a_word() {
        assert_eq!(parse("node_name = 'a'").unwrap().operators, []);
        let named = parse("node_name = 'a'\noperators = ['ops-*', 'cloud-1']").unwrap();
        assert!(named.operators[0].matches("ops-7") && !named.operators[1].matches("cloud-12"));
        for wrong in ["''", "'a*b'", "'**'"] {
            let error = parse(&format!("node_name = 'a'\noperators = [{wrong}]")).unwrap_err();
            assert!(error.contains("`operators`"), "{error}");
        }
        let many = vec!["'a'"; operators::PATTERNS_MAX + 1].join(", ");
        assert!(parse(&format!("node_name = 'a'\noperators = [{many}]")).is_err());
    }

    #[test]
    fn a_proxys_password_is_not_shown() {
        let config = "node_name = 'a'\nhttps_proxy = 'http://edge:topsecret@10.0.0.1'\n\
                      no_proxy = ['10.0.0.0/8']";
        let settings = parse(config).unwrap();
        let proxy = settings.https_proxy.clone().unwrap();
        assert_eq!(proxy.address(), "10.0.0.1:3128");
        assert!(!proxy.is_for("10.9.9.9"));
        assert!(!format!("{settings:?}").contains("topsecret"));
        let off = parse("node_name = 'a'\nhttps_proxy = ''").unwrap();
        assert!(off.https_proxy.is_none());
    }

    #[test]
    fn a_token_in_the_file_is_not_shown() {
        let settings = parse("node_name = 'a'\ntoken = 'hf1.topsecret'").unwrap();
        assert!(!format!("{settings:?}").contains("topsecret"));
    }
}
