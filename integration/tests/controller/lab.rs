//! One API server, one controller with exactly the rights that `deploy/` gives it, and agents made of
//! the libraries.

use std::{
    collections::BTreeMap,
    fs,
    net::SocketAddr,
    os::unix::net::UnixDatagram,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use integration::joining;
use kube::{
    Api, Client,
    api::{DeleteParams, Patch, PatchParams},
    core::{ApiResource, DynamicObject, GroupVersionKind},
};
use mesh_api::{
    connect::{ALPN, control_client},
    control::{JoinRequest, NodeReport, SyncRequest, SyncResponse},
    resources::{Resources, apply, digest::digests},
};
use mesh_identity::{credentials::Credentials, tls::client_config, token::MeshAnchor};
use mesh_wire::id::MeshId;
use netns_tests::tool::binary;
use serde_json::Value;
use tempfile::TempDir;
use tokio::{
    sync::mpsc,
    time::{sleep, timeout},
};
use tokio_rustls::rustls::ClientConfig;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

/// The mesh's name.
const MESH: &str = "demo";

/// No test waits longer for anything.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// How often is asked whether something is so.
const ASK: Duration = Duration::from_millis(20);

/// The controller's process, with its folder.
pub(crate) struct Controller {
    pub(crate) folder: TempDir,
    pub(crate) address: SocketAddr,
    /// What else the table [kubernetes] has.
    more: String,
    child: Child,
}

impl Controller {
    /// A controller that is ready, which reaches the API server by `kubeconfig`.
    pub(crate) fn start(kubeconfig: &str, more: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("kubeconfig"), kubeconfig).unwrap();
        Self::start_in(folder, SocketAddr::from(([127, 0, 0, 1], 0)), more)
    }

    /// One that ends by itself, and what it said.
    pub(crate) fn refused(kubeconfig: &str, more: &str) -> String {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("kubeconfig"), kubeconfig).unwrap();
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        let mut child = spawn(folder.path(), any, more);
        assert!(!child.wait().unwrap().success());
        log(folder.path())
    }

    fn start_in(folder: TempDir, listen: SocketAddr, more: &str) -> Self {
        let ready = UnixDatagram::bind(folder.path().join("notify")).unwrap();
        ready.set_read_timeout(Some(PATIENCE)).unwrap();
        let child = spawn(folder.path(), listen, more);
        let mut message = [0; 64];
        let told = ready.recv(&mut message);
        assert!(told.is_ok(), "not ready: {}", log(folder.path()));
        drop(ready);
        fs::remove_file(folder.path().join("notify")).unwrap();
        let address = listening(&log(folder.path()));
        Self {
            folder,
            address,
            more: more.to_owned(),
            child,
        }
    }

    /// With a store that it shares from now on.
    pub(crate) fn sharing(mut self, more: &str) -> Self {
        more.clone_into(&mut self.more);
        self.restart()
    }

    /// Killed, and started again at the same address with what it has on its disk.
    pub(crate) fn restart(mut self) -> Self {
        self.kill();
        let folder = std::mem::replace(&mut self.folder, tempfile::tempdir().unwrap());
        Self::start_in(folder, self.address, &self.more)
    }

    pub(crate) fn pid(&self) -> String {
        self.child.id().to_string()
    }

    pub(crate) fn log(&self) -> String {
        log(self.folder.path())
    }

    pub(crate) async fn logged(&self, text: &str) {
        until(text, async || self.log().contains(text).then_some(())).await;
    }

    pub(crate) fn kill(&mut self) {
        // It may have ended already.
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

impl Drop for Controller {
    fn drop(&mut self) {
        self.kill();
    }
}

fn spawn(folder: &Path, listen: SocketAddr, more: &str) -> Child {
    let path = |name: &str| folder.join(name).display().to_string();
    let config = format!(
        "mesh_name = \"{MESH}\"\nlisten = \"{listen}\"\nstate_dir = \"{}\"\nadmin_socket = \"{}\"\n\
         metrics_listen = \"127.0.0.1:0\"\n[kubernetes]\nkubeconfig = \"{}\"\n{more}",
        path("state"),
        path("admin.sock"),
        path("kubeconfig"),
    );
    fs::write(folder.join("controller.toml"), config).unwrap();
    Command::new(binary("mesh-controller").unwrap())
        .args(["--config", &path("controller.toml")])
        .env("NOTIFY_SOCKET", folder.join("notify"))
        .env("NO_COLOR", "1")
        .env("HOLDFAST_LOG", "debug,h2=info,hyper_util=info,tower=info")
        .stdin(Stdio::null())
        .stderr(fs::File::create(folder.join("log")).unwrap())
        .spawn()
        .unwrap()
}

/// Asks until there is an answer.
pub(crate) async fn until<T>(what: &str, mut ask: impl AsyncFnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(answer) = ask().await {
            return answer;
        }
        assert!(Instant::now() < deadline, "in vain: {what}");
        sleep(ASK).await;
    }
}

/// What an administrator does.
#[derive(Clone)]
pub(crate) struct Admin {
    pub(crate) client: Client,
}

impl Admin {
    /// Applies every document of `text`.
    pub(crate) async fn apply(&self, text: &str) {
        for document in documents(text) {
            let objects = self.api(&document);
            let name = document["metadata"]["name"].as_str().unwrap();
            let patch = Patch::Apply(&document);
            let parameters = PatchParams::apply("test").force();
            let applied = objects.patch(name, &parameters, &patch).await;
            applied.unwrap_or_else(|error| panic!("{document}: {error}"));
        }
    }

    /// Writes the status of every document of `text`, as another controller would.
    pub(crate) async fn apply_status(&self, text: &str) {
        for document in documents(text) {
            let objects = self.api(&document);
            let name = document["metadata"]["name"].as_str().unwrap();
            let patch = Patch::Merge(&document);
            let parameters = PatchParams::default();
            objects
                .patch_status(name, &parameters, &patch)
                .await
                .unwrap();
        }
    }

    pub(crate) async fn delete(&self, kind: &str, namespace: &str, name: &str) {
        let objects = self.objects(kind, namespace);
        objects
            .delete(name, &DeleteParams::default())
            .await
            .unwrap();
    }

    /// The object, once `wanted` says that it is as it should be.
    pub(crate) async fn wait(
        &self,
        kind: &str,
        namespace: &str,
        name: &str,
        wanted: impl Fn(&Value) -> bool,
    ) -> Value {
        let objects = self.objects(kind, namespace);
        let last = std::cell::RefCell::new(Value::Null);
        let ask = async || {
            // A connection of before the server was away fails at its first use.
            let found = objects.get_opt(name).await.ok()??;
            let found = serde_json::to_value(found).unwrap();
            last.replace(found.clone());
            wanted(&found).then_some(found)
        };
        let deadline = timeout(PATIENCE, async {
            loop {
                if let Some(found) = ask().await {
                    return found;
                }
                sleep(ASK).await;
            }
        });
        let found = deadline.await;
        found.unwrap_or_else(|_| panic!("{kind} {name} in vain: {}", last.borrow()))
    }

    pub(crate) fn objects(&self, kind: &str, namespace: &str) -> Api<DynamicObject> {
        let (group, version) = match kind {
            "Service" | "Node" | "ConfigMap" | "Namespace" | "Pod" | "Secret"
            | "ServiceAccount" => ("", "v1"),
            "Lease" => ("coordination.k8s.io", "v1"),
            "EndpointSlice" => ("discovery.k8s.io", "v1"),
            "Event" => ("events.k8s.io", "v1"),
            "NetworkPolicy" => ("networking.k8s.io", "v1"),
            _ => ("mesh.holdfast.dev", "v1alpha1"),
        };
        let resource = ApiResource::from_gvk(&GroupVersionKind::gvk(group, version, kind));
        if namespace.is_empty() {
            Api::all_with(self.client.clone(), &resource)
        } else {
            Api::namespaced_with(self.client.clone(), namespace, &resource)
        }
    }

    fn api(&self, document: &Value) -> Api<DynamicObject> {
        let text = |name: &str| document[name].as_str().unwrap();
        let (group, version) = text("apiVersion")
            .rsplit_once('/')
            .unwrap_or(("", text("apiVersion")));
        let resource = ApiResource::from_gvk(&GroupVersionKind::gvk(group, version, text("kind")));
        match document["metadata"]["namespace"].as_str() {
            None => Api::all_with(self.client.clone(), &resource),
            Some(namespace) => Api::namespaced_with(self.client.clone(), namespace, &resource),
        }
    }
}

/// The condition `name` in `object`'s status.
pub(crate) fn condition<'a>(object: &'a Value, name: &str) -> &'a Value {
    let conditions = object["status"]["conditions"].as_array();
    let conditions = conditions.map(Vec::as_slice).unwrap_or_default();
    let found = conditions.iter().find(|one| one["type"] == name);
    found.unwrap_or(&Value::Null)
}

fn documents(text: &str) -> Vec<Value> {
    use serde::Deserialize as _;
    let documents = serde_yaml_ng::Deserializer::from_str(text);
    let documents = documents.map(|one| Value::deserialize(one).unwrap());
    documents.filter(|one| !one.is_null()).collect()
}

/// Where `deploy/` is.
pub(crate) fn deploy() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/kubernetes")
}

/// A node that wants to join.
pub(crate) struct Applicant<'a> {
    pub(crate) node: &'a str,
    /// Its WireGuard key is made of this.
    pub(crate) seed: u8,
    pub(crate) service_account_token: &'a str,
}

/// Joins the mesh that `anchor` names.
pub(crate) async fn join(
    controller: SocketAddr,
    anchor: &MeshAnchor,
    applicant: Applicant<'_>,
) -> Result<Credentials, Status> {
    let request = JoinRequest {
        node_name: applicant.node.to_owned(),
        wireguard_public_key: vec![applicant.seed; 32],
        service_account_token: applicant.service_account_token.to_owned(),
        ..JoinRequest::default()
    };
    join_by(controller, anchor.mesh, request).await
}

/// Joins by `request`; a controller that cannot be reached is unavailable.
pub(crate) async fn join_by(
    controller: SocketAddr,
    mesh: MeshId,
    request: JoinRequest,
) -> Result<Credentials, Status> {
    let joined = joining::join(&controller.to_string(), (MESH, mesh), request).await;
    joined.unwrap_or_else(|error| Err(Status::unavailable(error.to_string())))
}

/// An agent's stream, and what it has.
pub(crate) struct Agent {
    controller: SocketAddr,
    config: ClientConfig,
    stream: Streaming<SyncResponse>,
    say: mpsc::Sender<SyncRequest>,
    pub(crate) resources: Resources,
    /// Everything it was ever told.
    pub(crate) told: Vec<SyncResponse>,
    pub(crate) has: SyncRequest,
}

impl Agent {
    /// Begins with nothing, or with what an agent before it had.
    pub(crate) async fn new(
        controller: SocketAddr,
        credentials: &Credentials,
        before: Option<Self>,
    ) -> Self {
        let (resources, has) = before.map_or_else(
            || (Resources::new(), SyncRequest::default()),
            |before| (before.resources, before.has),
        );
        let config = client_config(credentials, ALPN).unwrap();
        let (stream, say) = open(controller, &config, &has).await;
        let mut agent = Self {
            controller,
            config,
            stream,
            say,
            resources,
            told: Vec::new(),
            has,
        };
        agent.next().await;
        agent
    }

    pub(crate) async fn next(&mut self) {
        let message = timeout(PATIENCE, self.stream.message()).await;
        let told = message.expect("no answer in time").unwrap();
        let Some(told) = told else {
            // After a large answer a node opens another stream.
            (self.stream, self.say) = open(self.controller, &self.config, &self.has).await;
            return Box::pin(self.next()).await;
        };
        if told.digests_wanted > 0 {
            let digests = SyncRequest {
                digests: digests(&self.resources, told.digests_wanted),
                ..self.has.clone()
            };
            self.say.send(digests).await.unwrap();
            return Box::pin(self.next()).await;
        }
        self.has = SyncRequest {
            store_id: told.store_id.clone(),
            generation: told.generation,
            compares: true,
            ..SyncRequest::default()
        };
        self.say.send(self.has.clone()).await.unwrap();
        assert_eq!(apply(&mut self.resources, told.clone()), []);
        self.told.push(told);
    }

    /// Waits until its stream ends, and tells why.
    pub(crate) async fn ended(&mut self) -> Status {
        let deadline = Instant::now() + PATIENCE;
        loop {
            assert!(Instant::now() < deadline, "the stream does not end");
            let message = timeout(PATIENCE, self.stream.message()).await;
            if let Err(status) = message.unwrap() {
                return status;
            }
        }
    }

    /// Says how it is.
    pub(crate) async fn report(&mut self, report: NodeReport) {
        let report = SyncRequest {
            report: Some(report),
            ..self.has.clone()
        };
        self.say.send(report).await.unwrap();
    }

    /// Takes answers until it has what `wanted` looks for.
    pub(crate) async fn until(&mut self, wanted: impl Fn(&BTreeMap<String, String>) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !wanted(&self.view()) {
            assert!(Instant::now() < deadline, "{:#?}", self.view());
            self.next().await;
        }
    }

    /// What it has, by key, as text.
    pub(crate) fn view(&self) -> BTreeMap<String, String> {
        let view = self.resources.iter();
        view.map(|(key, resource)| (key.to_string(), format!("{resource:?}")))
            .collect()
    }

    /// The keys of everything that was taken away since it began.
    pub(crate) fn removed(&self) -> Vec<String> {
        let told = self.told.iter();
        told.flat_map(|told| told.removed.iter().map(ToString::to_string))
            .collect()
    }
}

/// A stream, once the controller serves.
async fn open(
    controller: SocketAddr,
    config: &ClientConfig,
    has: &SyncRequest,
) -> (Streaming<SyncResponse>, mpsc::Sender<SyncRequest>) {
    until("a stream", async || {
        let channel = joining::connect(&controller.to_string(), MESH, config.clone()).await;
        let mut client = control_client(channel.unwrap());
        let (say, said) = mpsc::channel(4);
        say.send(has.clone()).await.unwrap();
        match client.sync(ReceiverStream::new(said)).await {
            Ok(stream) => Some((stream.into_inner(), say)),
            Err(status) => {
                assert_eq!(status.code(), tonic::Code::Unavailable, "{status}");
                None
            }
        }
    })
    .await
}

fn log(folder: &Path) -> String {
    fs::read_to_string(folder.join("log")).unwrap()
}

fn listening(log: &str) -> SocketAddr {
    let line = log
        .lines()
        .find(|line| line.contains("mesh-controller serves"));
    let line = line.unwrap_or_else(|| panic!("{log}"));
    let field = line
        .split_whitespace()
        .find_map(|word| word.strip_prefix("address="));
    field.unwrap().parse().unwrap()
}
