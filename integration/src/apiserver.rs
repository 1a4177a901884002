//! A stand-in for a Kubernetes API server, as strict as the real one (1.34 to 1.36) where Holdfast
//! touches it, for tests with `kube` and `kubectl`.
//!
//! What it decides (`store`, `schema`, `apply`, `rbac`, `registry` …) does no I/O; `server` is a
//! thin shell of TLS and HTTP around it. It runs no controllers, except that definitions are
//! established, owned objects go with their owners and namespaces with their content. A deleted pod
//! is gone at once, since there is no kubelet that could end it.

mod apply;
mod auth;
mod builtin;
mod cel;
mod cel_check;
mod cel_cost;
mod crd;
mod decode;
mod discovery;
mod egress;
mod error;
mod events;
mod faults;
mod fields;
mod kinds;
mod kubelets;
mod lists;
mod metadata;
mod names;
mod object;
mod openapi;
mod patch;
mod pods;
mod protobuf;
mod rbac;
mod registry;
mod request;
mod reviews;
mod routes;
mod schema;
mod selector;
mod server;
mod service;
mod store;
mod structural;
mod views;
mod watching;

use std::{
    net::{Ipv4Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, Result};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use ipnet::IpNet;
use jiff::Timestamp;
use serde::Serialize;
use serde_json::{Value, json};
use tokio::{net::TcpListener, task::JoinHandle};

pub use auth::Issued;
pub use faults::{Faults, Refusal, StreamingLists, UsedRight};
pub(crate) use request::Query;

use self::{
    auth::Authority, egress::Egress, kinds::Catalog, registry::State, server::Shared,
    service::Pools, store::Store,
};

/// How a stand-in is.
#[derive(Debug, Clone)]
pub struct Options {
    /// Where it listens; port 0 for any.
    pub listen: SocketAddr,
    /// Where services' addresses come from: one range for each family, the first is the one of
    /// single-stack services.
    pub service_ranges: Vec<IpNet>,
    /// How often a watch that allows bookmarks gets one.
    pub bookmark_interval: Duration,
    /// How long the content of a deleted namespace stays; the real server waits 5 s.
    pub namespace_grace: Duration,
    /// How kubelets are reached: an `EgressSelectorConfiguration` as text, in YAML, as the real server gets it by
    /// `--egress-selector-config-file`. Nothing: as the machine routes.
    pub egress_selector: Option<String>,
}

impl Default for Options {
    /// Any port of 127.0.0.1, both families, a bookmark a minute as the real server has it.
    fn default() -> Self {
        let ranges = ["10.96.0.0/12", "fd00:10:96::/112"];
        Self {
            listen: (Ipv4Addr::LOCALHOST, 0).into(),
            service_ranges: ranges
                .iter()
                .filter_map(|range| range.parse().ok())
                .collect(),
            bookmark_interval: Duration::from_secs(60),
            namespace_grace: Duration::from_secs(1),
            egress_selector: None,
        }
    }
}

/// A running stand-in; it ends when this is dropped.
#[derive(Debug)]
pub struct Standin {
    shared: Arc<Shared>,
    address: SocketAddr,
    server: JoinHandle<()>,
}

impl Drop for Standin {
    fn drop(&mut self) {
        self.server.abort();
    }
}

impl Standin {
    /// Starts a stand-in on the runtime that this is called from.
    ///
    /// # Errors
    ///
    /// If its address is taken, the machine has no randomness, or the egress selector is none.
    pub async fn start(options: Options) -> Result<Self> {
        let egress = options.egress_selector.as_deref().map(Egress::read);
        let egress = egress.transpose()?.unwrap_or(Egress::Direct);
        let listener = TcpListener::bind(options.listen)
            .await
            .with_context(|| format!("listen at {}", options.listen))?;
        let address = listener.local_addr()?;
        let authority = Authority::new()?;
        let mut state = State {
            ca_pem: authority.ca_pem.clone(),
            ending: Vec::new(),
            store: Store::default(),
            catalog: Catalog::default(),
            pools: Pools::new(options.service_ranges.clone()),
        };
        for name in ["default", "kube-system", "kube-public", "kube-node-lease"] {
            let namespace =
                json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}});
            state.insert(namespace)?;
        }
        for object in rbac::bootstrap() {
            state.insert(object)?;
        }
        let shared = Arc::new(Shared::new(options, authority, egress, state));
        let server = tokio::spawn(server::serve(listener, Arc::clone(&shared)));
        Ok(Self {
            shared,
            address,
            server,
        })
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Where it listens, as clients write it.
    #[must_use]
    pub fn url(&self) -> String {
        format!("https://{}", self.address)
    }

    /// The certificate of its authority, as PEM.
    #[must_use]
    pub fn ca_pem(&self) -> &str {
        &self.shared.authority.ca_pem
    }

    /// A certificate of its authority for a server with these names, a kubelet for instance.
    ///
    /// # Errors
    ///
    /// If one of them is neither a DNS name nor an address.
    pub fn issue_serving(&self, common_name: &str, names: &[&str]) -> Result<Issued> {
        self.shared.authority.serving(common_name, names)
    }

    /// A certificate of its authority for a client.
    ///
    /// # Errors
    ///
    /// Only if the machine has no randomness.
    pub fn issue_client(&self, user: &str, group: &str) -> Result<Issued> {
        self.shared.authority.client(user, group)
    }

    /// A token of the administrator, who may do everything.
    #[must_use]
    pub fn admin_token(&self) -> &str {
        &self.shared.authority.admin_token
    }

    /// A kubeconfig file for the administrator, with a client certificate.
    #[must_use]
    pub fn kubeconfig(&self) -> String {
        let authority = &self.shared.authority;
        self.kubeconfig_of(&json!({
            "client-certificate-data": STANDARD.encode(&authority.admin_cert_pem),
            "client-key-data": STANDARD.encode(&authority.admin_key_pem),
        }))
    }

    /// A kubeconfig file for the holder of a token.
    #[must_use]
    pub fn kubeconfig_with_token(&self, token: &str) -> String {
        self.kubeconfig_of(&json!({"token": token}))
    }

    fn kubeconfig_of(&self, user: &Value) -> String {
        let ca = STANDARD.encode(self.ca_pem());
        let config = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "standin",
            "clusters": [{"name": "standin", "cluster": {
                "server": self.url(), "certificate-authority-data": ca,
            }}],
            "users": [{"name": "user", "user": user}],
            "contexts": [{"name": "standin", "context": {"cluster": "standin", "user": "user"}}],
        });
        config.to_string()
    }

    /// A client configuration for the administrator.
    ///
    /// # Errors
    ///
    /// Never, unless `kube` changes what it reads.
    pub async fn client_config(&self) -> Result<kube::Config> {
        client_config(&self.kubeconfig()).await
    }

    /// A client configuration for the holder of a token.
    ///
    /// # Errors
    ///
    /// Never, unless `kube` changes what it reads.
    pub async fn client_config_with_token(&self, token: &str) -> Result<kube::Config> {
        client_config(&self.kubeconfig_with_token(token)).await
    }

    /// A client for the administrator.
    ///
    /// # Errors
    ///
    /// If the client cannot be made.
    pub async fn client(&self) -> Result<kube::Client> {
        Ok(kube::Client::try_from(self.client_config().await?)?)
    }

    /// A client for the holder of a token.
    ///
    /// # Errors
    ///
    /// If the client cannot be made.
    pub async fn client_with_token(&self, token: &str) -> Result<kube::Client> {
        Ok(kube::Client::try_from(
            self.client_config_with_token(token).await?,
        )?)
    }

    /// Creates or replaces an object as it is, with its status and unchecked, as a test's fixture;
    /// its namespace comes with it. Watches see it.
    ///
    /// # Errors
    ///
    /// If its kind is unknown, or a service's address is taken.
    pub fn insert(&self, object: &impl Serialize) -> Result<Value> {
        let object = serde_json::to_value(object).context("object as JSON")?;
        Ok(self.shared.change(|state| state.insert(object))?)
    }

    /// An object as it is kept; nothing if there is none.
    #[must_use]
    pub fn get(&self, api_version: &str, kind: &str, namespace: &str, name: &str) -> Option<Value> {
        let state = self.shared.state();
        let kind = state
            .catalog
            .of_object(&json!({"apiVersion": api_version, "kind": kind}))?;
        state.existing(kind, namespace, name).ok()
    }

    /// Deletes an object as the administrator would; whether it was there.
    pub fn delete(&self, api_version: &str, kind: &str, namespace: &str, name: &str) -> bool {
        self.shared.change(|state| {
            let kind = state
                .catalog
                .of_object(&json!({"apiVersion": api_version, "kind": kind}))
                .cloned();
            let options = registry::Options {
                now: metadata::now(),
                ..registry::Options::default()
            };
            kind.is_some_and(|kind| {
                state
                    .delete(&kind, namespace, name, &json!({}), &options)
                    .is_ok()
            })
        })
    }

    /// A token of a service account, as `TokenRequest` gives it; `pod` binds it to a pod.
    ///
    /// # Errors
    ///
    /// If the account or the pod does not exist.
    pub fn token(
        &self,
        namespace: &str,
        account: &str,
        audiences: &[&str],
        pod: Option<&str>,
    ) -> Result<String> {
        let mut request = json!({"spec": {"audiences": audiences}});
        if let Some(pod) = pod {
            object::set(
                &mut request,
                &["spec", "boundObjectRef"],
                json!({"apiVersion": "v1", "kind": "Pod", "name": pod}),
            );
        }
        let state = self.shared.state();
        let account = state
            .store
            .get(auth::SERVICE_ACCOUNTS, namespace, account)
            .with_context(|| format!("no service account {namespace}/{account}"))?
            .value();
        let now_s = Timestamp::now().as_second();
        let authority = &self.shared.authority;
        let answer = reviews::token_request(request, &account, &state.store, authority, now_s)?;
        let token = object::text(&answer, &["status", "token"]);
        Ok(token.context("a token request without a token")?.to_owned())
    }

    /// What a test can make it do wrong.
    #[must_use]
    pub fn faults(&self) -> &Faults {
        &self.shared.faults
    }

    /// Forgets all history: whoever asks for an older version is told `410`.
    pub fn compact(&self) {
        self.shared.state().store.compact();
    }

    /// From now on (or no longer) lists show what there is now, as a server that lags does.
    pub fn freeze_lists(&self, yes: bool) {
        let version = self.version();
        self.shared.faults.set_stale(yes.then_some(version));
    }

    /// The newest `resourceVersion`.
    #[must_use]
    pub fn version(&self) -> u64 {
        self.shared.state().store.version()
    }

    /// How many objects of a resource there are; `resource` is `group/plural`, with an empty group
    /// for the core one, as `/pods`.
    #[must_use]
    pub fn count(&self, resource: &str) -> usize {
        self.shared.state().store.count(resource)
    }
}

async fn client_config(kubeconfig: &str) -> Result<kube::Config> {
    let kubeconfig = serde_json::from_str(kubeconfig).context("read our own kubeconfig")?;
    let options = kube::config::KubeConfigOptions::default();
    Ok(kube::Config::from_custom_kubeconfig(kubeconfig, &options).await?)
}
