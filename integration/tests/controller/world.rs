//! The API server, and what is in it before a test begins.

use std::{fs, net::SocketAddr};

use integration::apiserver::{Options, Standin};
use mesh_api::{
    admin::{
        ControllerStatusRequest, ListNodesRequest, NodeReport, RemoveNodeRequest,
        RemoveNodeResponse, controller_admin_client::ControllerAdminClient,
    },
    connect::admin_channel,
};
use mesh_identity::{credentials::Credentials, token::MeshAnchor};
use netns_tests::tool::binary;
use serde_json::{Value, json};
use tokio::{
    net::{TcpListener, TcpStream},
    process::Command,
    sync::watch,
    task::JoinHandle,
    time::timeout,
};
use tonic::{Status, transport::Channel};

use crate::lab::{Admin, Agent, Applicant, Controller, PATIENCE, deploy, join, until};

pub(crate) const SHOP: &str = "apiVersion: v1
kind: Namespace
metadata: {name: shop}
---
apiVersion: v1
kind: Service
metadata: {name: inventory, namespace: shop}
spec: {clusterIP: 10.96.0.10, ports: [{name: http, port: 80}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: inventory-1, namespace: shop, labels: {kubernetes.io/service-name: inventory}}
addressType: IPv4
ports: [{name: http, port: 8080, protocol: TCP}]
endpoints: [{addresses: [10.244.1.7], nodeName: edge-a1}]
";

pub(crate) const NODES: &str = "apiVersion: v1
kind: Node
metadata: {name: edge-a1, labels: {mesh.holdfast.dev/site: a}}
spec: {podCIDR: 10.244.1.0/24, podCIDRs: [10.244.1.0/24]}
---
apiVersion: v1
kind: Node
metadata: {name: edge-b1, labels: {mesh.holdfast.dev/site: b}}
spec: {podCIDR: 10.244.2.0/24, podCIDRs: [10.244.2.0/24]}
";

/// An API server with what `deploy/` puts there, and a controller that follows it.
pub(crate) struct World {
    pub(crate) standin: Standin,
    pub(crate) admin: Admin,
    pub(crate) controller: Controller,
    kubeconfig: String,
    gate: Gate,
}

impl World {
    pub(crate) async fn new() -> Self {
        Self::with(|_| ()).await
    }

    /// With an API server that is prepared in some way.
    pub(crate) async fn with(prepare: impl FnOnce(&Standin)) -> Self {
        Self::build(prepare, "").await
    }

    /// And another controller; what both share is in the cluster.
    pub(crate) async fn with_two() -> (Self, Controller) {
        let world = Self::build(|_| (), STORE).await;
        let second = world.another_controller();
        (world, second)
    }

    /// And another controller, which share; nodes whose objects were deleted are soon out.
    pub(crate) async fn with_two_that_remove() -> (Self, Controller) {
        let more = format!("{STORE}removal_grace_s = {REMOVAL_GRACE_S}\n");
        let world = Self::build(|_| (), &more).await;
        let second = Controller::start(&world.kubeconfig, &more);
        (world, second)
    }

    /// One more, with nothing of its own yet.
    pub(crate) fn another_controller(&self) -> Controller {
        Controller::start(&self.kubeconfig, STORE)
    }

    /// From now on what the controller has is shared.
    pub(crate) fn share(self) -> Self {
        Self {
            controller: self.controller.sharing(STORE),
            ..self
        }
    }

    /// Another controller that shares, and ends at once; what it said.
    pub(crate) fn refused_controller(&self) -> String {
        Controller::refused(&self.kubeconfig, STORE)
    }

    async fn build(prepare: impl FnOnce(&Standin), more: &str) -> Self {
        let standin = Standin::start(Options::default()).await.unwrap();
        prepare(&standin);
        let client = standin.client().await.unwrap();
        let admin = Admin { client };
        for entry in fs::read_dir(deploy().join("crds")).unwrap() {
            let path = entry.unwrap().path();
            if !path.ends_with("kustomization.yaml") {
                admin.apply(&fs::read_to_string(path).unwrap()).await;
            }
        }
        let namespace = "apiVersion: v1\nkind: Namespace\nmetadata: {name: holdfast}\n";
        admin.apply(namespace).await;
        let rules = deploy().join("controller/rbac.yaml");
        admin.apply(&fs::read_to_string(rules).unwrap()).await;
        admin.apply(ACCOUNTS).await;
        admin.apply(NODES).await;
        let token = standin.token("holdfast", "mesh-controller", &[], None);
        let gate = Gate::new(standin.address()).await;
        let kubeconfig = standin.kubeconfig_with_token(&token.unwrap());
        let kubeconfig = kubeconfig.replace(&standin.url(), &format!("https://{}", gate.address));
        let controller = Controller::start(&kubeconfig, more);
        Self {
            standin,
            admin,
            controller,
            kubeconfig,
            gate,
        }
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.controller.address
    }

    /// From now on nobody reaches the API server from the controller.
    pub(crate) fn stop_api(&self) {
        self.gate.open.send_replace(false);
    }

    pub(crate) fn start_api(&self) {
        self.gate.open.send_replace(true);
    }

    /// Cuts every watch; `forget`: and what it would go on from is forgotten.
    pub(crate) fn drop_watches(&self, forget: bool) {
        if forget {
            self.standin.compact();
        }
        self.standin.faults().drop_watches();
    }

    pub(crate) fn restart_controller(self) -> Self {
        Self {
            controller: self.controller.restart(),
            ..self
        }
    }

    /// A ServiceAccount token, of a pod on `node` if there is one.
    pub(crate) fn token(&self, account: &str, audiences: &[&str], node: Option<&str>) -> String {
        let pod = node.map(|node| format!("{account}-{node}"));
        if let (Some(node), Some(pod)) = (node, &pod) {
            let object = json!({
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {"name": pod, "namespace": "holdfast"},
                "spec": {
                    "nodeName": node,
                    "serviceAccountName": account,
                    "hostNetwork": true,
                    "containers": [{"name": "agent", "image": "agent"}],
                },
            });
            self.standin.insert(&object).unwrap();
        }
        let token = self
            .standin
            .token("holdfast", account, audiences, pod.as_deref());
        token.unwrap()
    }

    /// What the controller published for agents.
    pub(crate) async fn anchor(&self) -> MeshAnchor {
        let published = |map: &Value| map["data"]["mesh"].is_string();
        let map = self
            .admin
            .wait("ConfigMap", "holdfast", "holdfast-mesh", published);
        map.await["data"]["mesh"].as_str().unwrap().parse().unwrap()
    }

    /// Joins as a node of the cluster, once the controller has read it.
    pub(crate) async fn join(&self, node: &str, seed: u8) -> Result<Credentials, Status> {
        self.join_at(self.address(), node, seed).await
    }

    /// The same, at this controller.
    pub(crate) async fn join_at(
        &self,
        controller: SocketAddr,
        node: &str,
        seed: u8,
    ) -> Result<Credentials, Status> {
        let token = self.token("mesh-agent", &["holdfast"], Some(node));
        let anchor = self.anchor().await;
        until("the controller is ready", async || {
            let applicant = Applicant {
                node,
                seed,
                service_account_token: &token,
            };
            match join(controller, &anchor, applicant).await {
                Err(status) if status.message().contains("not read the whole cluster") => None,
                joined => Some(joined),
            }
        })
        .await
    }

    pub(crate) async fn agent(&self, credentials: &Credentials) -> Agent {
        Agent::new(self.address(), credentials, None).await
    }

    /// The nodes that joined, as a controller knows them.
    pub(crate) async fn nodes_of(controller: &Controller) -> Vec<NodeReport> {
        let socket = controller.folder.path().join("admin.sock");
        let mut socket = ControllerAdminClient::new(admin_channel(&socket).await.unwrap());
        let nodes = socket.list_nodes(ListNodesRequest {}).await;
        nodes.unwrap().into_inner().nodes
    }

    /// Takes a node out at a controller, as `meshctl node remove` does.
    pub(crate) async fn remove(
        controller: &Controller,
        name: &str,
    ) -> Result<RemoveNodeResponse, Status> {
        let socket = controller.folder.path().join("admin.sock");
        let mut socket = ControllerAdminClient::new(admin_channel(&socket).await.unwrap());
        let name = name.to_owned();
        let removed = socket.remove_node(RemoveNodeRequest { name }).await?;
        Ok(removed.into_inner())
    }

    /// The nodes that joined.
    pub(crate) async fn joined(&self) -> Vec<String> {
        let nodes = self.socket().await.list_nodes(ListNodesRequest {}).await;
        let nodes = nodes.unwrap().into_inner().nodes.into_iter();
        nodes.map(|node| node.name).collect()
    }

    /// What `meshctl` says is wrong.
    pub(crate) async fn problems(&self) -> Vec<String> {
        let status = self.socket().await.status(ControllerStatusRequest {}).await;
        status.unwrap().into_inner().problems
    }

    /// What `meshctl` says to who has the cluster's administrator's `kubectl`, or what it complains of.
    pub(crate) async fn meshctl(&self, arguments: &[&str]) -> Result<Value, String> {
        let folder = self.controller.folder.path();
        let kubeconfig = folder.join("administrator");
        fs::write(&kubeconfig, self.standin.kubeconfig()).unwrap();
        let mut command = Command::new(binary("meshctl").unwrap());
        command
            .args(arguments)
            .env("KUBECONFIG", kubeconfig)
            .env("HOME", folder) // For what `kubectl` keeps.
            .kill_on_drop(true);
        let output = timeout(PATIENCE, command.output()).await.unwrap().unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        match output.status.success() {
            true => Ok(serde_json::from_slice(&output.stdout).unwrap()),
            false => Err(text(&output.stdout) + &text(&output.stderr)),
        }
    }

    pub(crate) async fn version(&self, kind: &str, namespace: &str, name: &str) -> String {
        let object = self.admin.objects(kind, namespace).get(name).await.unwrap();
        object.metadata.resource_version.unwrap()
    }

    async fn socket(&self) -> ControllerAdminClient<Channel> {
        let socket = self.controller.folder.path().join("admin.sock");
        ControllerAdminClient::new(admin_channel(&socket).await.unwrap())
    }
}

/// How long an object of a node may be gone, where tests wait for what comes of that.
pub(crate) const REMOVAL_GRACE_S: u64 = 3;

/// In the table [kubernetes].
const STORE: &str = "store = true\n";

const ACCOUNTS: &str = "apiVersion: v1
kind: ServiceAccount
metadata: {name: mesh-agent, namespace: holdfast}
---
apiVersion: v1
kind: ServiceAccount
metadata: {name: default, namespace: holdfast}
";

/// The way from the controller to the API server: open, or gone.
struct Gate {
    address: SocketAddr,
    open: watch::Sender<bool>,
    task: JoinHandle<()>,
}

impl Gate {
    async fn new(to: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (open, is_open) = watch::channel(true);
        let task = tokio::spawn(async move {
            while let Ok((inner, _)) = listener.accept().await {
                tokio::spawn(pass(inner, to, is_open.clone()));
            }
        });
        Self {
            address,
            open,
            task,
        }
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// One connection, as long as the gate is open.
async fn pass(mut inner: TcpStream, to: SocketAddr, mut is_open: watch::Receiver<bool>) {
    if !*is_open.borrow() {
        return;
    }
    let Ok(mut outer) = TcpStream::connect(to).await else {
        return;
    };
    tokio::select! {
        _ = tokio::io::copy_bidirectional(&mut inner, &mut outer) => {}
        _ = is_open.wait_for(|open| !open) => {}
    }
}
