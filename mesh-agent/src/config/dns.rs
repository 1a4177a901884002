//! The `[dns]` table.

use std::{
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    time::Duration,
};

use ipnet::IpNet;
use mesh_dns::{
    local::{BadRecords, LocalNames, PodNames, domain_name},
    server::{self, Stub},
    upstream::{BadUpstream, UpstreamConfig},
};
use serde::Deserialize;

/// The `[dns]` table.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct DnsConfig {
    /// UDP and TCP addresses; ones that are link-local are put on the interface by the agent.
    #[serde(default = "default_dns_listen")]
    listen: Vec<SocketAddr>,
    /// Resolvers for all other names.
    #[serde(default)]
    upstreams: Vec<DnsUpstream>,
    /// Certificates (PEM) of those who certify upstreams by TLS, instead of whom the system trusts.
    ca_file: Option<PathBuf>,
    /// For how long beyond its time an answer is given while no upstream answers.
    #[serde(default = "default_serve_stale_s")]
    serve_stale_s: u32,
    /// Who may ask beyond this node and what is behind it, as prefixes.
    #[serde(default)]
    allow_from: Vec<IpNet>,
    /// Whether each answer is logged.
    #[serde(default)]
    query_log: bool,
    /// Whether a pod is not told of endpoints of headless services that policy denies to it.
    #[serde(default)]
    pub(super) leave_out_denied: bool,
    /// Whether `a-b-c-d.<namespace>.pod.<cluster domain>` exists.
    #[serde(default)]
    pod_names: PodNames,
    /// Domains that are asked elsewhere.
    #[serde(default)]
    stub: Vec<DnsStub>,
    /// Names of this node's own.
    #[serde(default)]
    record: Vec<DnsRecord>,
}

/// A `[[dns.stub]]`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
struct DnsStub {
    /// The domain; what is below it is meant too.
    domain: String,
    /// Resolvers for it.
    upstreams: Vec<DnsUpstream>,
}

/// An upstream: `"10.0.0.53:53"`, `"tcp://192.0.2.1"`, `"tls://192.0.2.1"`, or a table that says how it is asked.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(
    untagged,
    expecting = "`\"address:port\"`, `\"tcp://address\"`, `\"tls://address\"`, `{ address = …, tls = \"name\" }` or `{ address = …, https = \"https://name/path\" }` expected"
)]
enum DnsUpstream {
    Address(String),
    Secure(SecureUpstream),
}

/// An upstream with a certificate.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
struct SecureUpstream {
    address: SocketAddr,
    /// DNS over TLS: the certificate's name.
    tls: Option<String>,
    /// DNS over HTTPS: the URL.
    https: Option<String>,
}

/// Why the `[dns]` table is refused.
#[derive(Debug, thiserror::Error)]
pub(super) enum BadDns {
    #[error(transparent)]
    Records(#[from] BadRecords),
    #[error(transparent)]
    Upstream(#[from] BadUpstream),
    #[error("upstream {0} needs either `tls` or `https`")]
    HowAsked(SocketAddr),
    #[error("serve_stale_s = {0} is more than {SERVE_STALE_MAX_S} (a week)")]
    ServeStale(u32),
}

impl DnsUpstream {
    fn settings(&self) -> Result<UpstreamConfig, BadDns> {
        match self {
            Self::Address(text) => Ok(text.parse()?),
            Self::Secure(one) => Ok(match (&one.tls, &one.https) {
                (Some(name), None) => UpstreamConfig::tls(one.address, name)?,
                (None, Some(url)) => UpstreamConfig::https(one.address, url)?,
                (None, None) | (Some(_), Some(_)) => return Err(BadDns::HowAsked(one.address)),
            }),
        }
    }
}

/// A `[[dns.record]]`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
struct DnsRecord {
    /// The name.
    name: String,
    /// Its addresses, of either family.
    addresses: Vec<IpAddr>,
}

impl DnsConfig {
    /// As the resolver takes it.
    ///
    /// # Errors
    ///
    /// For a name that is none, a record without addresses, an upstream that cannot be asked so.
    pub(super) fn settings(self) -> Result<server::DnsConfig, BadDns> {
        if self.serve_stale_s > SERVE_STALE_MAX_S {
            return Err(BadDns::ServeStale(self.serve_stale_s));
        }
        let upstreams = |written: &[DnsUpstream]| {
            let upstreams = written.iter().map(DnsUpstream::settings);
            upstreams.collect::<Result<Vec<_>, _>>()
        };
        let records = self.record.iter();
        let records = records.map(|one| (one.name.as_str(), one.addresses.as_slice()));
        let stubs = self.stub.iter().map(|stub| {
            Ok(Stub {
                domain: domain_name(&stub.domain)?,
                upstreams: upstreams(&stub.upstreams)?,
            })
        });
        Ok(server::DnsConfig {
            stubs: stubs.collect::<Result<_, BadDns>>()?,
            local: LocalNames::new(self.pod_names, records)?,
            listen: self.listen,
            upstreams: upstreams(&self.upstreams)?,
            ca_file: self.ca_file,
            stale_max: Duration::from_secs(self.serve_stale_s.into()),
            allow_from: self.allow_from,
            query_log: self.query_log,
            leave_out_denied: self.leave_out_denied,
        })
    }
}

impl Default for DnsConfig {
    fn default() -> Self {
        Self {
            listen: default_dns_listen(),
            upstreams: Vec::new(),
            ca_file: None,
            serve_stale_s: default_serve_stale_s(),
            allow_from: Vec::new(),
            query_log: false,
            leave_out_denied: false,
            pod_names: PodNames::Off,
            stub: Vec::new(),
            record: Vec::new(),
        }
    }
}

/// Link-local, so that it is the same on every node and never leaves one.
fn default_dns_listen() -> Vec<SocketAddr> {
    vec![SocketAddr::from(([169, 254, 53, 53], 53))]
}

/// A day (RFC 8767 §5: one to three).
fn default_serve_stale_s() -> u32 {
    86_400
}

/// Addresses that old say nothing of where a name is now (RFC 8767 §5).
const SERVE_STALE_MAX_S: u32 = 7 * 86_400;

#[cfg(test)]
mod tests {
    use mesh_dns::upstream::Transport;

    use super::*;

    #[test]
    fn dns_upstreams_say_how_they_are_asked() {
        let dns = |text: &str| {
            let file: DnsConfig = toml::from_str(text).map_err(|error| error.to_string())?;
            file.settings().map_err(|error| error.to_string())
        };
        let address = "192.0.2.1:853".parse().unwrap();
        let settings = dns(
            "upstreams = ['10.0.0.53:53', {address = '192.0.2.1:853', tls = 'dns.example.org'}, 'tls://192.0.2.1', 'tcp://192.0.2.1']\nca_file = '/ca.pem'\n\
             query_log = true\nserve_stale_s = 60\n[[stub]]\ndomain = 'corp.example'\n\
             upstreams = [{address = '192.0.2.1:853', https = 'https://dns.example.org/dns-query'}]",
        );
        let settings = settings.unwrap();
        let upstreams = [
            UpstreamConfig::plain("10.0.0.53:53".parse().unwrap()),
            UpstreamConfig::tls(address, "dns.example.org").unwrap(),
            UpstreamConfig::tls(address, "192.0.2.1").unwrap(),
            UpstreamConfig {
                address: "192.0.2.1:53".parse().unwrap(),
                transport: Transport::Tcp,
            },
        ];
        assert_eq!(settings.upstreams, upstreams);
        let stub = UpstreamConfig::https(address, "https://dns.example.org/dns-query");
        assert_eq!(settings.stubs[0].upstreams, [stub.unwrap()]);
        assert_eq!(settings.ca_file, Some("/ca.pem".into()));
        assert_eq!(settings.stale_max.as_secs(), 60);
        assert!(settings.query_log);
        for (text, part) in [
            ("upstreams = ['resolver']", "tls://192.0.2.1"),
            ("upstreams = [53]", "tls ="),
            ("upstreams = [53]", "tcp://address"),
            (
                "upstreams = [{address = '192.0.2.1:853'}]",
                "either `tls` or `https`",
            ),
            (
                "upstreams = [{address = '192.0.2.1:853', tls = 'a b'}]",
                "a b",
            ),
            (
                "upstreams = [{address = '192.0.2.1:443', https = 'dns.example'}]",
                "https://",
            ),
            ("serve_stale_s = 604801", "a week"),
        ] {
            let error = dns(text).unwrap_err();
            assert!(error.contains(part), "{part} is not in: {error}");
        }
    }
}
