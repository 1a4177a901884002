//! How the server reaches kubelets: directly, or by the proxy that an `EgressSelectorConfiguration` names
//! (`apiserver.k8s.io/v1beta1`), as `k8s.io/apiserver/pkg/server/egressselector` does.

use std::{fs, path::PathBuf, sync::Arc};

use anyhow::{Context as _, Result, bail, ensure};
use serde::Deserialize;
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    net::{TcpStream, UnixStream},
};
use tokio_rustls::{
    TlsConnector,
    rustls::{
        ClientConfig, RootCertStore,
        crypto::ring::default_provider,
        pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject as _},
    },
};

/// Longest answer to a CONNECT request.
const HEAD_BYTES_MAX: usize = 64 << 10;

/// A connection to a kubelet, before TLS.
pub(crate) trait Connection: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Connection for T {}

/// The way for the selection `cluster`.
#[derive(Debug)]
pub(crate) enum Egress {
    Direct,
    /// `HTTPConnect` over a Unix socket.
    Uds(PathBuf),
    /// `HTTPConnect` over TCP with mutual TLS.
    Tls {
        address: String,
        name: ServerName<'static>,
        config: Arc<ClientConfig>,
    },
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Configuration {
    api_version: String,
    kind: String,
    egress_selections: Vec<Selection>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Selection {
    name: String,
    connection: ProxyConnection,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct ProxyConnection {
    proxy_protocol: String,
    transport: Option<Transport>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Transport {
    tcp: Option<Tcp>,
    uds: Option<Uds>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Tcp {
    url: String,
    tls_config: TlsConfig,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct TlsConfig {
    ca_bundle: PathBuf,
    client_cert: PathBuf,
    client_key: PathBuf,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Uds {
    uds_name: PathBuf,
}

impl Egress {
    /// # Errors
    ///
    /// If the text is no such configuration, or what it names cannot be read.
    pub(crate) fn read(text: &str) -> Result<Self> {
        let read: Configuration =
            serde_yaml_ng::from_str(text).context("an EgressSelectorConfiguration")?;
        ensure!(
            read.api_version == "apiserver.k8s.io/v1beta1"
                && read.kind == "EgressSelectorConfiguration",
            "{} {} is no EgressSelectorConfiguration of apiserver.k8s.io/v1beta1",
            read.api_version,
            read.kind
        );
        let mut selections = read.egress_selections.into_iter();
        let Some(cluster) = selections.find(|selection| selection.name == "cluster") else {
            return Ok(Self::Direct);
        };
        let ProxyConnection {
            proxy_protocol,
            transport,
        } = cluster.connection;
        let (tcp, uds) = transport.map_or((None, None), |both| (both.tcp, both.uds));
        match (proxy_protocol.as_str(), tcp, uds) {
            ("Direct", None, None) => Ok(Self::Direct),
            ("HTTPConnect", None, Some(uds)) => Ok(Self::Uds(uds.uds_name)),
            ("HTTPConnect", Some(tcp), None) => Self::tls(&tcp),
            ("HTTPConnect", ..) => {
                bail!("exactly one of transport.tcp and transport.uds is needed")
            }
            (other, ..) => bail!("proxyProtocol {other:?} is not offered here"),
        }
    }

    fn tls(tcp: &Tcp) -> Result<Self> {
        let address = tcp
            .url
            .strip_prefix("https://")
            .context("url is not https")?;
        let address = address.trim_end_matches('/');
        let (host, _) = address.rsplit_once(':').context("url has no port")?;
        let name = ServerName::try_from(host.trim_matches(['[', ']']).to_owned())?;
        let read = |path: &PathBuf| {
            fs::read_to_string(path).with_context(|| format!("read {}", path.display()))
        };
        let (ca, files) = (read(&tcp.tls_config.ca_bundle)?, &tcp.tls_config);
        let (certificate, key) = (read(&files.client_cert)?, read(&files.client_key)?);
        Ok(Self::Tls {
            address: address.to_owned(),
            name,
            config: client_config(&ca, &certificate, &key)?,
        })
    }

    /// A connection to `host:port`.
    ///
    /// # Errors
    ///
    /// What went wrong, in the words of the real server.
    pub(crate) async fn dial(&self, host: &str, port: u16) -> Result<Box<dyn Connection>> {
        match self {
            Self::Direct => {
                let stream = TcpStream::connect((host, port)).await;
                Ok(Box::new(
                    stream.with_context(|| format!("dial tcp {host}:{port}"))?,
                ))
            }
            Self::Uds(path) => {
                let stream = UnixStream::connect(path).await;
                let shown = path.display().to_string();
                let stream = stream.with_context(|| format!("dialing proxy {shown:?} failed"))?;
                tunnel(stream, &shown, host, port).await
            }
            Self::Tls {
                address,
                name,
                config,
            } => {
                let dialed = async {
                    let stream = TcpStream::connect(address).await?;
                    let connector = TlsConnector::from(Arc::clone(config));
                    connector.connect(name.clone(), stream).await
                };
                let stream = dialed.await;
                let stream = stream.with_context(|| format!("dialing proxy {address:?} failed"))?;
                tunnel(stream, address, host, port).await
            }
        }
    }
}

/// What the real server sends and takes (`tunnelHTTPConnect`): bytes that come before their time are an error.
async fn tunnel(
    mut stream: impl Connection + 'static,
    proxy: &str,
    host: &str,
    port: u16,
) -> Result<Box<dyn Connection>> {
    let target = match host.contains(':') {
        true => format!("[{host}]:{port}"),
        false => format!("{host}:{port}"),
    };
    let request = format!("CONNECT {target} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        ensure!(head.len() < HEAD_BYTES_MAX, "the proxy's answer has no end");
        let byte = stream.read_u8().await.with_context(|| {
            format!("reading HTTP response from CONNECT to {target} via proxy {proxy} failed")
        })?;
        head.push(byte);
    }
    let head = String::from_utf8_lossy(&head);
    let status = head.lines().next().unwrap_or_default();
    let status = status.split_once(' ').map_or("", |(_, rest)| rest);
    let code = status.split(' ').next().unwrap_or_default();
    ensure!(
        code == "200",
        "proxy error from {proxy} while dialing {target}, code {code}: {status}"
    );
    Ok(Box::new(stream))
}

/// TLS that trusts the authorities in `ca` and shows a certificate (all PEM).
pub(crate) fn client_config(ca: &str, certificate: &str, key: &str) -> Result<Arc<ClientConfig>> {
    let mut roots = RootCertStore::empty();
    for authority in CertificateDer::pem_slice_iter(ca.as_bytes()) {
        roots.add(authority?)?;
    }
    let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(certificate.as_bytes()).collect();
    let config = ClientConfig::builder_with_provider(Arc::new(default_provider()))
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots)
        .with_client_auth_cert(chain?, PrivateKeyDer::from_pem_slice(key.as_bytes())?)?;
    Ok(Arc::new(config))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn the_shipped_example_is_read() {
        let example = include_str!("../../../examples/egress-selector.yaml");
        let egress = Egress::read(example).unwrap();
        assert!(
            matches!(egress, Egress::Uds(path) if path == Path::new("/run/holdfast/proxy.sock"))
        );
    }

    #[test]
    fn what_the_real_server_refuses_is_refused() {
        let example = include_str!("../../../examples/egress-selector.yaml");
        for (from, to) in [
            ("v1beta1", "v1"),
            ("HTTPConnect", "HttpConnect"),
            ("udsName", "udsPath"),
            ("uds:", "tcp: {url: x}\n      uds:"),
        ] {
            let wrong = example.replacen(from, to, 1);
            assert_ne!(wrong, example, "{from}");
            assert!(Egress::read(&wrong).is_err(), "{wrong}");
        }
    }
}
