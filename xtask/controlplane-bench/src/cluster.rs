//! The cluster that the controller follows.

use std::{
    collections::BTreeMap, fs, io::Write as _, net::Ipv4Addr, os::unix::fs::OpenOptionsExt as _,
    path::Path, time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use integration::apiserver::{Options, Standin};
use kube::{
    Api, Client,
    api::{Patch, PatchParams},
    core::{ApiResource, DynamicObject, GroupVersionKind},
};
use mesh_api::{
    admin::{ControllerStatusRequest, controller_admin_client::ControllerAdminClient},
    connect::admin_channel,
};
use serde_json::{Value, json};
use tokio::time::{Instant, sleep};

use crate::{deploy, now_ns, questions, say};

/// No cluster takes longer to be read.
const READY_LIMIT: Duration = Duration::from_secs(120);

/// How often the controller is asked whether it has read everything.
const READY_ASK: Duration = Duration::from_millis(10);

/// The controller has written all that it has to write when it wrote nothing for so long: it looks every second.
const SETTLED: Duration = Duration::from_secs(3);

/// At 50 writes a second, 5,000 nodes take 100 s to be made and as long to get a status.
const SETTLE_LIMIT: Duration = Duration::from_secs(300);

/// Port of every service, TCP.
pub(crate) const SERVICE_PORT: u16 = 80;

/// What the controller says of a cluster that it has not read as a whole.
const NOT_READ: &str = "not all of the cluster is read yet";

/// How many objects there are.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Size {
    pub(crate) services: u32,
    /// Of each service.
    pub(crate) endpoints: u32,
    pub(crate) nodes: u32,
}

/// The API server's stand-in, and its administrator.
pub(crate) struct Cluster {
    standin: Standin,
    client: Client,
    size: Size,
    /// Endpoints of services of which some were changed.
    changed: BTreeMap<u32, Vec<Value>>,
}

impl Cluster {
    /// Starts the server, puts everything into it, and writes the controller's kubeconfig.
    ///
    /// # Errors
    ///
    /// If an object is refused, or the file cannot be written.
    pub(crate) async fn start(folder: &Path, size: Size) -> Result<Self> {
        let standin = Standin::start(Options::default()).await?;
        let client = standin.client().await?;
        deploy::apply(&client).await?;
        for number in 0..size.nodes {
            standin.insert(&node(number))?;
        }
        for number in 0..size.services {
            standin.insert(&service(number))?;
            standin.insert(&slice(number, size))?;
        }
        let token = standin.token(deploy::NAMESPACE, deploy::ACCOUNT, &[], None)?;
        write_private(
            &folder.join("kubeconfig"),
            &standin.kubeconfig_with_token(&token),
        )?;
        Ok(Self {
            standin,
            client,
            size,
            changed: BTreeMap::new(),
        })
    }

    /// Serves and answers until standard input ends.
    ///
    /// # Errors
    ///
    /// If nobody reads the answers.
    pub(crate) async fn run(mut self) -> Result<()> {
        let mut questions = questions();
        while let Some(question) = questions.next_line().await? {
            let answer = self.answer(&question).await;
            say(&question, answer)?;
        }
        Ok(())
    }

    /// | question | answer |
    /// |---|---|
    /// | `full` | once everything is there: how many services that is |
    /// | `ready SOCKET` | once the controller with this admin socket has read everything: how it stands, in its own words |
    /// | `settled COUNT` | once there are so many MeshNodes and nothing was written for [`SETTLED`]: how many there are |
    /// | `change SERVICE ENDPOINT ADDRESS` | the time at which the API server was asked to give the endpoint this address |
    async fn answer(&mut self, question: &str) -> Result<Value> {
        let words: Vec<_> = question.split(' ').collect();
        match words.as_slice() {
            ["full"] => Ok(json!(self.standin.count("/services"))),
            ["ready", socket] => ready(Path::new(socket)).await,
            ["settled", count] => self.settled(count.parse().context("COUNT")?).await,
            ["change", service, endpoint, address] => {
                let service = service.parse().context("SERVICE")?;
                let endpoint = endpoint.parse().context("ENDPOINT")?;
                self.change(service, endpoint, address.parse().context("ADDRESS")?)
                    .await
            }
            _ => bail!("no such question"),
        }
    }

    async fn settled(&self, count: usize) -> Result<Value> {
        let nodes = || self.standin.count("mesh.holdfast.dev/meshnodes");
        let begun = Instant::now();
        let (mut version, mut since) = (self.standin.version(), Instant::now());
        while nodes() < count || since.elapsed() < SETTLED {
            ensure!(
                begun.elapsed() < SETTLE_LIMIT,
                "{} MeshNodes, and the controller still writes",
                nodes()
            );
            sleep(SETTLED / 10).await;
            let now = self.standin.version();
            if now != version {
                (version, since) = (now, Instant::now());
            }
        }
        Ok(json!(nodes()))
    }

    /// By a merge patch: the whole list, as the cluster's own controller of slices writes it.
    async fn change(&mut self, service: u32, endpoint: usize, address: Ipv4Addr) -> Result<Value> {
        let size = self.size;
        let list = self.changed.entry(service);
        let list = list.or_insert_with(|| endpoints(service, size));
        let of = list.get_mut(endpoint).context("no such endpoint")?;
        let of = of.as_object_mut().context("an endpoint is an object")?;
        of.insert("addresses".to_owned(), json!([address]));
        let patch = Patch::Merge(json!({"endpoints": list}));
        let kind = GroupVersionKind::gvk("discovery.k8s.io", "v1", "EndpointSlice");
        let resource = ApiResource::from_gvk(&kind);
        let namespace = namespace(service);
        let slices: Api<DynamicObject> =
            Api::namespaced_with(self.client.clone(), &namespace, &resource);
        let asked_ns = now_ns();
        slices
            .patch(&slice_name(service), &PatchParams::default(), &patch)
            .await?;
        Ok(json!(asked_ns))
    }
}

async fn ready(socket: &Path) -> Result<Value> {
    let begun = Instant::now();
    loop {
        let problem = match status(socket).await {
            Ok(problems) => match problems.iter().find(|problem| problem.contains(NOT_READ)) {
                None => return Ok(json!(problems)),
                Some(problem) => problem.clone(),
            },
            Err(error) => format!("{error:#}"),
        };
        ensure!(begun.elapsed() < READY_LIMIT, "{problem}");
        sleep(READY_ASK).await;
    }
}

async fn status(socket: &Path) -> Result<Vec<String>> {
    let mut admin = ControllerAdminClient::new(admin_channel(socket).await?);
    let status = admin.status(ControllerStatusRequest {}).await?;
    Ok(status.into_inner().problems)
}

/// It holds a token: nobody else reads it.
fn write_private(path: &Path, text: &str) -> Result<()> {
    let mut options = fs::File::options();
    options.write(true).create_new(true).mode(0o600);
    let mut file = options
        .open(path)
        .with_context(|| format!("make {}", path.display()))?;
    Ok(file.write_all(text.as_bytes())?)
}

/// A service's only address: from 10.96.1.0 on, as the first 256 are the cluster's own.
pub(crate) fn service_address(number: u32) -> Ipv4Addr {
    Ipv4Addr::from_bits(Ipv4Addr::new(10, 96, 1, 0).to_bits() + number)
}

/// The name of a node, and of the agent there.
pub(crate) fn node_name(number: u32) -> String {
    format!("node-{number}")
}

/// A node's /24 for pods, of 10.128.0.0/9: room for 32,768.
fn pods(node: u32) -> Ipv4Addr {
    Ipv4Addr::from_bits(Ipv4Addr::new(10, 128, 0, 0).to_bits() + (node << 8))
}

fn namespace(service: u32) -> String {
    format!("namespace-{}", service % 100)
}

fn service_name(number: u32) -> String {
    format!("service-{number}")
}

fn slice_name(service: u32) -> String {
    format!("service-{service}-x7k2p")
}

fn node(number: u32) -> Value {
    let range = format!("{}/24", pods(number));
    json!({
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": node_name(number), "labels": {
            "kubernetes.io/hostname": node_name(number),
            "topology.kubernetes.io/zone": format!("zone-{}", number % 3),
        }},
        "spec": {"podCIDR": range, "podCIDRs": [range]},
    })
}

fn service(number: u32) -> Value {
    let address = service_address(number);
    let app = service_name(number);
    json!({
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": app, "namespace": namespace(number), "labels": {"app": app}},
        "spec": {
            "type": "ClusterIP",
            "clusterIP": address,
            "clusterIPs": [address],
            "selector": {"app": app},
            "ports": [{"name": "http", "port": SERVICE_PORT, "targetPort": 8080, "protocol": "TCP"}],
        },
    })
}

fn slice(service: u32, size: Size) -> Value {
    json!({
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "name": slice_name(service),
            "namespace": namespace(service),
            "labels": {
                "kubernetes.io/service-name": service_name(service),
                "endpointslice.kubernetes.io/managed-by": "endpointslice-controller.k8s.io",
            },
        },
        "addressType": "IPv4",
        "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}],
        "endpoints": endpoints(service, size),
    })
}

/// Spread over all nodes, with addresses of their ranges.
fn endpoints(service: u32, size: Size) -> Vec<Value> {
    let all = (0..size.endpoints).map(|index| {
        let number = service * size.endpoints + index;
        let node = number % size.nodes;
        let address = pods(node).to_bits() + 1 + number / size.nodes % 250;
        json!({
            "addresses": [Ipv4Addr::from_bits(address)],
            "nodeName": node_name(node),
            "zone": format!("zone-{}", node % 3),
            "conditions": {"ready": true, "serving": true, "terminating": false},
            "targetRef": {
                "kind": "Pod",
                "name": format!("service-{service}-{index}"),
                "namespace": namespace(service),
                "uid": format!("00000000-0000-4000-8000-{number:012}"),
            },
        })
    });
    all.collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    const SMALL: Size = Size {
        services: 30,
        endpoints: 10,
        nodes: 7,
    };

    #[test]
    fn every_endpoint_has_an_address_of_its_own_in_its_nodes_range() {
        let all: Vec<_> = (0..SMALL.services)
            .flat_map(|service| endpoints(service, SMALL))
            .collect();
        let text = |one: &Value, pointer: &str| one.pointer(pointer).unwrap().to_string();
        let addresses: BTreeSet<_> = all.iter().map(|one| text(one, "/addresses/0")).collect();
        assert_eq!(addresses.len(), 300);
        for one in &all {
            let node: String = serde_json::from_str(&text(one, "/nodeName")).unwrap();
            let node: u32 = node.strip_prefix("node-").unwrap().parse().unwrap();
            let address: Ipv4Addr = serde_json::from_str(&text(one, "/addresses/0")).unwrap();
            assert_eq!(address.to_bits() & !255, pods(node).to_bits());
        }
    }

    #[tokio::test]
    async fn the_api_server_has_everything_and_takes_a_change() {
        let folder = tempfile::tempdir().unwrap();
        let mut cluster = Cluster::start(folder.path(), SMALL).await.unwrap();
        assert!(folder.path().join("kubeconfig").exists());
        assert_eq!(cluster.standin.count("/services"), 30);
        assert_eq!(cluster.standin.count("/nodes"), 7);
        let before = now_ns();
        let asked = cluster.answer("change 3 9 10.64.0.1").await.unwrap();
        assert!(asked.as_u64().unwrap() >= before);
        let find = || {
            let kind = ("discovery.k8s.io/v1", "EndpointSlice");
            let found = cluster
                .standin
                .get(kind.0, kind.1, "namespace-3", &slice_name(3));
            found.unwrap()
        };
        assert_eq!(
            find().pointer("/endpoints/9/addresses/0").unwrap(),
            "10.64.0.1"
        );
        assert_eq!(
            find().pointer("/endpoints/8").unwrap(),
            &endpoints(3, SMALL)[8]
        );
        let error = cluster.answer("change 3 10 10.64.0.2").await.unwrap_err();
        assert_eq!(error.to_string(), "no such endpoint");
    }
}
