//! The commands of `docs/kubernetes.md`, run as an operator runs them. The test is the cluster's part: the pods of controllers
//! and agents, as real processes with the rights that their manifests give them, on nodes behind two kinds of NAT; the
//! Service in front of the controllers; and the controller of DaemonSets. And on the way, controllers die.

#![forbid(unsafe_code)]
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test may fail loudly"
)]

mod cluster;
mod pods;

use std::{
    fs,
    net::{Ipv4Addr, SocketAddr},
    time::Duration,
};

use netns_tests::{
    document::commands,
    lab::Lab,
    link::Impairment,
    nat::NatKind,
    node::{Node, Process},
};
use tokio::{runtime, time::Instant};

use crate::{
    cluster::{Cluster, NODES, root, until},
    pods::{Agent, Controller, Service, start_relay},
};

/// Where the controllers' Service is.
const SERVICE: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 20);

/// The relay of `examples/kubernetes/mesh.yaml`.
const RELAY: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 10);

/// How soon an agent whose controller was killed hears of changes again: it sees the connection break at once, waits half a
/// second, may be sent to the dead one by the Service, and again; and this machine has two cores.
const MOVED_WITHIN: Duration = Duration::from_secs(15);

#[test]
fn the_walk_through_works_as_it_is_written_while_controllers_die() {
    let lab = Lab::new().unwrap();
    let machine = lab.public_node("cluster", SERVICE).unwrap();
    let relay = lab.public_node("relay", RELAY).unwrap();
    let link = Impairment::delay_loss(Duration::from_millis(5), 0.0);
    let wans = [[203, 0, 113, 1], [203, 0, 113, 2]];
    let kinds = [NatKind::PortRestricted, NatKind::Symmetric];
    let sites = ["site-a", "site-b"].iter().zip(wans).zip(kinds);
    let sites = sites.map(|((name, wan), kind)| lab.site(name, kind, wan.into(), link).unwrap());
    let sites: Vec<_> = sites.collect();
    let nodes = sites.iter().zip(NODES);
    let nodes = nodes.map(|(site, name)| site.host(&lab, name).unwrap());
    let world = World {
        nodes: nodes.collect(),
        relay,
        machine: machine.clone(),
    };
    // Threads that are made inside stay there, and so does what they start.
    let run = || {
        let runtime = runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build();
        runtime.unwrap().block_on(walk(&world));
    };
    machine.enter(run).unwrap();
}

struct World {
    machine: Node,
    relay: Node,
    nodes: Vec<Node>,
}

async fn walk(world: &World) {
    let text = fs::read_to_string(root().join("docs/kubernetes.md")).unwrap();
    let commands = commands(&text).into_iter().map(|command| command.text);
    let commands: Vec<_> = commands.collect();
    assert!(commands.len() >= 10, "{commands:?}");
    let cluster = Cluster::new(&world.machine).await;
    let mut mesh = None;
    for command in &commands {
        if command.starts_with("meshctl uninstall") {
            let mesh: Mesh = mesh.take().unwrap();
            let (said, ()) = tokio::join!(cluster.shell(command), mesh.clean(&cluster));
            let said = said.unwrap();
            assert!(said.contains("2 nodes are clean"), "{said}");
            continue;
        }
        let said = cluster.shell(command).await;
        let said = said.unwrap_or_else(|said| panic!("{command}: {said}"));
        match command.as_str() {
            "kubectl apply -k deploy/kubernetes" => {
                mesh = Some(Mesh::start(&cluster, world).await);
            }
            "kubectl get meshnodes" => {
                assert!(NODES.iter().all(|node| said.contains(node)), "{said}");
            }
            "kubectl explain meshconfig.spec" => {
                assert!(said.contains("overlayIPv4CIDR"), "{said}");
            }
            "kubectl describe meshrelay r1" => {
                let mesh = mesh.as_mut().unwrap();
                mesh.nodes_speak(&cluster, world).await;
                mesh.controllers_die(&cluster, world).await;
            }
            "kubectl label node edge-b1 mesh.holdfast.dev/exclude=" => {
                let agent = &mut mesh.as_mut().unwrap().agents[1];
                agent.end(&cluster).await;
            }
            "kubectl delete meshnode edge-b1" => {
                mesh.as_mut().unwrap().left(&cluster, "edge-b1").await;
            }
            _ => {}
        }
    }
    let left = cluster
        .kubectl("get namespaces,crds,clusterroles,clusterrolebindings -o name")
        .await;
    let left = left.unwrap();
    assert!(!left.contains("holdfast"), "{left}");
}

/// What the installation brought to life.
struct Mesh {
    service: Service,
    controllers: Vec<Controller>,
    agents: Vec<Agent>,
    relay: Option<Process>,
    /// How many controllers there were.
    started: u16,
}

impl Mesh {
    async fn start(cluster: &Cluster, world: &World) -> Self {
        let set = cluster.get("deployment/mesh-controller -n holdfast").await;
        let replicas = set["spec"]["replicas"].as_u64().unwrap();
        assert_eq!(replicas, 2, "{set}");
        let address = SocketAddr::from((SERVICE, 7440));
        let mut mesh = Self {
            service: Service::new(address).await,
            controllers: Vec::new(),
            agents: Vec::new(),
            relay: None,
            started: 0,
        };
        for _ in 0..replicas {
            mesh.add_controller(cluster, world).await;
        }
        for node in &world.nodes {
            let mut agent = Agent::start(cluster, node, address).await;
            agent.ready().await;
            mesh.agents.push(agent);
        }
        for node in NODES {
            let joined = |node: &serde_json::Value| node["status"]["connected"] == true;
            cluster.wait(&format!("meshnode/{node}"), joined).await;
        }
        mesh
    }

    async fn add_controller(&mut self, cluster: &Cluster, world: &World) {
        self.started += 1;
        let controller = Controller::start(cluster, &world.machine, self.started).await;
        self.controllers.push(controller);
        self.tell_ready();
    }

    fn tell_ready(&self) {
        let addresses = self.controllers.iter().map(|one| one.address);
        self.service.ready.send_replace(addresses.collect());
    }

    /// Both nodes hear of what is new; says how long that took.
    async fn hear(&self, cluster: &Cluster, service: &str) -> Duration {
        let begun = Instant::now();
        let number = service.trim_start_matches('s');
        let text = format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{name: {service}, namespace: default}}\n\
             spec: {{clusterIP: 10.96.0.{number}, ports: [{{name: http, port: 80}}]}}\n"
        );
        cluster.apply("service.yaml", &text).await;
        for agent in &self.agents {
            until("the agent hears of it", async || {
                let there = agent.has_service(service);
                there.then_some(()).ok_or_else(|| agent.log())
            })
            .await;
        }
        begun.elapsed()
    }

    /// By the relay, whose certificate the mesh gives; and what nodes say of their NATs is known.
    async fn nodes_speak(&mut self, cluster: &Cluster, world: &World) {
        self.relay = Some(start_relay(&world.relay, &self.controllers[0], "r1"));
        for (node, nat) in NODES.iter().zip(["Easy", "Hard"]) {
            let known = |node: &serde_json::Value| node["status"]["nat"] == nat;
            cluster.wait(&format!("meshnode/{node}"), known).await;
        }
        let shown = cluster.kubectl("get meshnodes -o wide").await.unwrap();
        assert!(shown.contains("Hard") && shown.contains("NAT"), "{shown}");
        until("the nodes reach each other", async || {
            let said = self.agents[0].ask("ping edge-b1 -c 1");
            let answered = said["received"] == 1;
            answered.then_some(()).ok_or_else(|| said.to_string())
        })
        .await;
    }

    /// First the one that edge-a1 is at, then the leader, then one by one in an orderly way. Meanwhile packets flow.
    async fn controllers_die(&mut self, cluster: &Cluster, world: &World) {
        let other = cluster.get("meshnode/edge-b1").await;
        let other = other["status"]["overlayAddresses"][0].as_str().unwrap();
        let words = ["ping", "-n", "-O", "-i", "0.1", other];
        let mut flows = world.nodes[0].spawn("flows", &words).unwrap();
        self.hear(cluster, "s11").await;

        let at = until("it is at one of them", async || {
            let mut all = self.controllers.iter();
            all.position(|one| one.has("edge-a1"))
                .ok_or_else(|| self.agents[0].log())
        })
        .await;
        self.controllers.remove(at).kill();
        // It is in the Service a little longer.
        let took = self.hear(cluster, "s12").await;
        println!("killed: a change was heard of after {took:?}");
        assert!(took < MOVED_WITHIN, "{took:?}");
        assert!(self.controllers[0].has("edge-a1"));
        self.tell_ready();

        // Another pod in its place; then the leader goes, whichever it is.
        self.add_controller(cluster, world).await;
        let leader = until("one leads", async || {
            let leader = self.controllers.iter().position(Controller::leads);
            leader.ok_or_else(|| "none".to_owned())
        })
        .await;
        self.controllers.remove(leader).kill();
        self.tell_ready();
        let took = self.hear(cluster, "s13").await;
        println!("the leader killed: a change was heard of after {took:?}");
        assert!(took < MOVED_WITHIN, "{took:?}");
        until("the other leads", async || {
            let leads = self.controllers[0].leads();
            leads.then_some(()).ok_or_else(|| "not yet".to_owned())
        })
        .await;
        // It writes what a leader writes.
        let community = "apiVersion: mesh.holdfast.dev/v1alpha1\nkind: Community\nmetadata: {name: ab}\nspec: {sites: [a, b]}\n";
        cluster.apply("community.yaml", community).await;
        let said = cluster
            .kubectl("wait community/ab --for=condition=Accepted --timeout=30s")
            .await;
        said.unwrap();
        cluster.kubectl("delete community ab").await.unwrap();

        // A rolling update: a new one is ready before an old one ends.
        self.add_controller(cluster, world).await;
        self.controllers.remove(0).terminate();
        self.tell_ready();
        let took = self.hear(cluster, "s14").await;
        println!("rolled over: a change was heard of after {took:?}");
        assert!(took < MOVED_WITHIN, "{took:?}");
        self.add_controller(cluster, world).await;

        for agent in &mut self.agents {
            agent.running();
        }
        // All that time packets went from one node to the other.
        flows.running().unwrap();
        flows.terminate(Duration::from_secs(5)).unwrap();
        let log = flows.log();
        let answers = log.matches("bytes from").count();
        println!("{answers} packets came back meanwhile");
        assert!(answers > 50 && !log.contains("no answer yet"), "{log}");
    }

    /// Who was deleted is forgotten by the other, and gets nothing any more.
    async fn left(&mut self, cluster: &Cluster, node: &str) {
        until("the others forget it", async || {
            let peers = self.agents[0].ask("peers").to_string();
            let gone = !peers.contains(node);
            gone.then_some(()).ok_or(peers)
        })
        .await;
        for controller in &self.controllers {
            until("no controller has it", async || {
                let nodes = controller.ask("nodes").to_string();
                let gone = !nodes.contains(node);
                gone.then_some(()).ok_or(nodes)
            })
            .await;
        }
        assert!(cluster.get(&format!("meshnode/{node}")).await.is_null());
        // With its old certificate, and the token of a pod that is gone, it does not come back.
        let set = cluster.get("daemonset/mesh-agent -n holdfast").await;
        let agent = &mut self.agents[1];
        agent.start_again(&set);
        agent.ready().await;
        until("it is told", async || {
            let problems = agent.ask("status")["problems"].to_string();
            let told = problems.contains("was taken out of the mesh");
            told.then_some(()).ok_or(problems)
        })
        .await;
        assert!(cluster.get(&format!("meshnode/{node}")).await.is_null());
        // Where the cluster wants it again, it joins again by itself.
        agent.give_token(cluster, &set);
        until("it joins again", async || {
            let status = agent.ask("status");
            let connected = status["controller"]["connected"] == true;
            connected.then_some(()).ok_or_else(|| status.to_string())
        })
        .await;
        let joined = |node: &serde_json::Value| node["status"]["connected"] == true;
        cluster.wait(&format!("meshnode/{node}"), joined).await;
    }

    /// What the cluster's controllers and kubelets do with the DaemonSet that cleans nodes.
    async fn clean(self, cluster: &Cluster) {
        let cleaner = "daemonset/mesh-uninstall -n holdfast";
        let set = cluster.wait(cleaner, serde_json::Value::is_object).await;
        let agents = cluster.get("daemonset/mesh-agent -n holdfast").await;
        assert!(agents.is_null(), "the agents end first");
        for agent in self.agents {
            agent.end_and_clean(&set);
        }
        for node in NODES {
            cluster.make_pod(&set, node);
        }
        cluster.all_ready(&set).await;
    }
}
