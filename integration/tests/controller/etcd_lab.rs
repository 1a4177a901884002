//! Three members of etcd and two controllers, each in a network namespace of its own, and nodes that join.
//!
//! Whoever connects must do so inside: [`EtcdLab::inside`] runs a test there.

use std::{
    fs,
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use mesh_api::{
    admin::{
        ControllerStatusRequest, CreateTokenRequest, ListNodesRequest, ListTokensRequest,
        NodeReport, TokenReport, controller_admin_client::ControllerAdminClient,
    },
    connect::admin_channel,
    control::JoinRequest,
};
use mesh_identity::{credentials::Credentials, token::JoinToken};
use netns_tests::{
    lab::Lab,
    node::{Node, Process},
    tool::{binary, nft, run},
};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use tokio::time::sleep;
use tonic::{Status, transport::Channel};

use crate::lab::{PATIENCE, join_by};

const MEMBERS: [Ipv4Addr; 3] = [
    Ipv4Addr::new(198, 51, 100, 21),
    Ipv4Addr::new(198, 51, 100, 22),
    Ipv4Addr::new(198, 51, 100, 23),
];

const CONTROLLERS: [Ipv4Addr; 2] = [
    Ipv4Addr::new(198, 51, 100, 31),
    Ipv4Addr::new(198, 51, 100, 32),
];

/// How long a token of etcd's lasts that nobody uses, where one has to log in.
pub(crate) const TOKEN_TTL: Duration = Duration::from_secs(4);

/// How long an orderly end may take.
const STOP: Duration = Duration::from_secs(15);

pub(crate) struct EtcdLab {
    client: Node,
    pub(crate) members: Vec<Member>,
    pub(crate) controllers: Vec<Replica>,
    // The last, so that what runs in it ends before.
    lab: Lab,
}

/// A member of etcd.
pub(crate) struct Member {
    node: Node,
    words: Vec<String>,
    process: Option<Process>,
}

/// One of the controllers.
pub(crate) struct Replica {
    node: Node,
    pub(crate) address: SocketAddr,
    process: Option<Process>,
}

impl EtcdLab {
    /// Nothing runs on the controllers' machines yet; each has these manifests, and logs in if there is a login.
    fn new(manifests: &str, login: bool) -> Self {
        let lab = Lab::new().unwrap();
        let pki = Pki::new(lab.dir());
        let members = ["m1", "m2", "m3"].iter().zip(MEMBERS);
        let mut members: Vec<_> = members
            .map(|(name, address)| Member::new(&lab, name, address, &pki))
            .collect();
        for member in &mut members {
            if login {
                let ttl = TOKEN_TTL.as_secs().to_string();
                member.words.extend(["--auth-token-ttl".to_owned(), ttl]);
            }
            member.start();
        }
        let controllers = ["c1", "c2"].iter().zip(CONTROLLERS);
        let controllers = controllers.map(|(name, address)| {
            let node = lab.public_node(name, address).unwrap();
            fs::create_dir(node.dir().join("manifests")).unwrap();
            node.write("manifests/all.yaml", manifests).unwrap();
            let mut config = controller_config(&node, address, &pki);
            if login {
                let password = node.dir().join("password");
                config += &format!(
                    "username = \"holdfast\"\npassword_file = {:?}\n",
                    password.display().to_string()
                );
            }
            node.write("controller.toml", &config).unwrap();
            Replica {
                node,
                address: SocketAddr::from((address, 7440)),
                process: None,
            }
        });
        let controllers = controllers.collect();
        let client = lab
            .public_node("client", Ipv4Addr::new(198, 51, 100, 41))
            .unwrap();
        Self {
            client,
            members,
            controllers,
            lab,
        }
    }

    /// Runs `test` where the controllers can be reached. Both are ready, and have these manifests.
    pub(crate) fn inside(manifests: &str, test: impl AsyncFnOnce(&mut Self) + Send) {
        let mut lab = Self::new(manifests, false);
        for controller in &mut lab.controllers {
            controller.start();
        }
        lab.run(test);
    }

    /// Runs `test` where etcd wants to know who asks: users `root` and `holdfast`, the second of which has what is below
    /// `/holdfast/`. No controller runs yet.
    pub(crate) fn inside_with_login(test: impl AsyncFnOnce(&mut Self) + Send) {
        let lab = Self::new("", true);
        for words in [
            "user add root:the-root-of-all",
            "user add holdfast:open-sesame",
            "role add holdfast",
            "role grant-permission holdfast --prefix=true readwrite /holdfast/",
            "user grant-role holdfast holdfast",
            "user grant-role root root",
            "auth enable",
        ] {
            let words: Vec<_> = words.split(' ').collect();
            lab.etcdctl(&words);
        }
        lab.run(test);
    }

    fn run(mut self, test: impl AsyncFnOnce(&mut Self) + Send) {
        let lab = &mut self;
        let client = lab.client.clone();
        let run = || {
            let mut runtime = tokio::runtime::Builder::new_current_thread();
            let runtime = runtime.enable_all().build().unwrap();
            runtime.block_on(test(lab));
        };
        client.enter(run).unwrap();
    }

    /// Asks etcd itself for the value of a key.
    pub(crate) fn value(&self, key: &str) -> String {
        self.etcdctl(&["get", "--print-value-only", key])
    }

    /// Runs `etcdctl`, which has to succeed.
    pub(crate) fn etcdctl(&self, words: &[&str]) -> String {
        let pki = self.lab.dir();
        let file = |name: &str| pki.join(name).display().to_string();
        let endpoints = MEMBERS.map(|address| format!("https://{address}:2379"));
        let own = [
            "env".to_owned(),
            "ETCDCTL_API=3".to_owned(),
            "etcdctl".to_owned(),
            format!("--endpoints={}", endpoints.join(",")),
            format!("--cacert={}", file("ca.pem")),
            format!("--cert={}", file("client.pem")),
            format!("--key={}", file("client.key")),
        ];
        let asked = words.iter().map(|&word| word.to_owned());
        let words: Vec<_> = own.into_iter().chain(asked).collect();
        let said = self.client.run(&words, STOP).unwrap().ok().unwrap();
        said.trim().to_owned()
    }

    /// Which controller leads, once one does.
    pub(crate) async fn leader(&self) -> usize {
        crate::lab::until("a leader", async || {
            let leads = |replica: &Replica| {
                let log = replica.log();
                let took = log.matches("this controller leads now").count();
                took > log.matches("this controller leads no more").count()
            };
            self.controllers.iter().position(leads)
        })
        .await
    }
}

impl Member {
    fn new(lab: &Lab, name: &str, address: Ipv4Addr, pki: &Pki) -> Self {
        let node = lab.public_node(name, address).unwrap();
        let names = ["m1", "m2", "m3"].iter().zip(MEMBERS);
        let cluster: Vec<_> = names
            .map(|(name, address)| format!("{name}=http://{address}:2380"))
            .collect();
        let data = node.dir().join("data").display().to_string();
        let client = format!("https://{address}:2379");
        let peer = format!("http://{address}:2380");
        let words = [
            ("--name", name.to_owned()),
            ("--data-dir", data),
            ("--listen-client-urls", client.clone()),
            ("--advertise-client-urls", client),
            ("--listen-peer-urls", peer.clone()),
            ("--initial-advertise-peer-urls", peer),
            ("--initial-cluster", cluster.join(",")),
            ("--cert-file", pki.path("server.pem")),
            ("--key-file", pki.path("server.key")),
            ("--trusted-ca-file", pki.path("ca.pem")),
        ];
        let words = words
            .into_iter()
            .flat_map(|(name, value)| [name.to_owned(), value]);
        let words = ["etcd".to_owned(), "--client-cert-auth".to_owned()]
            .into_iter()
            .chain(words);
        Self {
            node,
            words: words.collect(),
            process: None,
        }
    }

    pub(crate) fn start(&mut self) {
        self.process = Some(self.node.spawn("etcd", &self.words).unwrap());
    }

    pub(crate) fn kill(&mut self) {
        self.process.take().unwrap().kill().unwrap();
    }

    /// Nothing leaves it any more, or everything does again.
    pub(crate) fn cut(&self, cut: bool) {
        cut_off(&self.node, cut);
    }
}

impl Replica {
    pub(crate) fn start(&mut self) {
        let before = self.log().matches("mesh-controller serves").count();
        self.begin();
        let process = self.process.as_mut().unwrap();
        let deadline = Instant::now() + PATIENCE;
        while process.log().matches("mesh-controller serves").count() == before {
            process.running().unwrap();
            assert!(Instant::now() < deadline, "{}", process.log());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Starts it, ready or not.
    pub(crate) fn begin(&mut self) {
        let config = self.node.dir().join("controller.toml");
        let words = [
            binary("mesh-controller").unwrap().display().to_string(),
            "--config".to_owned(),
            config.display().to_string(),
        ];
        let mut command = self.node.command(&words).unwrap();
        command
            .env("NO_COLOR", "1")
            .env("HOLDFAST_LOG", "debug,h2=info,hyper_util=info,tower=info");
        let process = self.node.spawn_with("controller", command);
        self.process = Some(process.unwrap());
    }

    pub(crate) fn set_password(&self, password: &str) {
        self.node.write("password", password).unwrap();
    }

    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.node.dir().join("controller.log")).unwrap_or_default()
    }

    pub(crate) fn kill(&mut self) {
        self.process.take().unwrap().kill().unwrap();
    }

    pub(crate) fn stop(&mut self) {
        let mut process = self.process.take().unwrap();
        assert!(process.terminate(STOP).unwrap().success());
    }

    /// SIGSTOP or SIGCONT.
    pub(crate) fn signal(&self, signal: &str) {
        let pid = self.process.as_ref().unwrap().id().to_string();
        run("kill", &[signal, &pid], "").unwrap();
    }

    pub(crate) fn cut(&self, cut: bool) {
        cut_off(&self.node, cut);
    }

    pub(crate) fn write_manifest(&self, text: &str) {
        self.node.write("manifests/all.yaml", text).unwrap();
    }

    pub(crate) async fn token(&self, uses: u32) -> JoinToken {
        let request = CreateTokenRequest {
            uses,
            ..CreateTokenRequest::default()
        };
        let made = self.admin().await.create_token(request).await.unwrap();
        made.into_inner().token.parse().unwrap()
    }

    pub(crate) async fn tokens(&self) -> Vec<TokenReport> {
        let listed = self.admin().await.list_tokens(ListTokensRequest {}).await;
        listed.unwrap().into_inner().tokens
    }

    pub(crate) async fn nodes(&self) -> Vec<NodeReport> {
        let listed = self.admin().await.list_nodes(ListNodesRequest {}).await;
        listed.unwrap().into_inner().nodes
    }

    pub(crate) async fn problems(&self) -> Vec<String> {
        let status = self.admin().await.status(ControllerStatusRequest {}).await;
        status.unwrap().into_inner().problems
    }

    /// Joins once, and tells what became of it.
    pub(crate) async fn join(
        &self,
        token: &JoinToken,
        name: &str,
        seed: u8,
    ) -> Result<Credentials, Status> {
        let request = JoinRequest {
            token: token.to_string(),
            node_name: name.to_owned(),
            wireguard_public_key: vec![seed; 32],
            ..JoinRequest::default()
        };
        join_by(self.address, token.mesh, request).await
    }

    async fn admin(&self) -> ControllerAdminClient<Channel> {
        let path = self.node.dir().join("admin.sock");
        ControllerAdminClient::new(admin_channel(&path).await.unwrap())
    }
}

fn cut_off(node: &Node, cut: bool) {
    let rules = if cut {
        "table inet cut {\nchain out {\ntype filter hook output priority 0; policy drop;\n}\n}\n"
    } else {
        "delete table inet cut\n"
    };
    nft(node.netns(), rules).unwrap();
}

fn controller_config(node: &Node, address: Ipv4Addr, pki: &Pki) -> String {
    let path = |name: &str| node.dir().join(name).display().to_string();
    let endpoints = MEMBERS.map(|address| format!("\"{address}:2379\""));
    format!(
        "mesh_name = \"demo\"\nlisten = \"{address}:7440\"\nstate_dir = \"{}\"\nmanifests = \"{}\"\nadmin_socket = \"{}\"\n\
         [etcd]\nendpoints = [{}]\nca_file = \"{}\"\ncertificate_file = \"{}\"\nkey_file = \"{}\"\n",
        path("state"),
        path("manifests"),
        path("admin.sock"),
        endpoints.join(", "),
        pki.path("ca.pem"),
        pki.path("client.pem"),
        pki.path("client.key"),
    )
}

/// The certificates of etcd's members, and of the controllers as its clients.
struct Pki {
    folder: PathBuf,
}

impl Pki {
    fn new(folder: &Path) -> Self {
        let key = KeyPair::generate().unwrap();
        let mut ca = CertificateParams::new([]).unwrap();
        ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        fs::write(folder.join("ca.pem"), ca.self_signed(&key).unwrap().pem()).unwrap();
        let issuer = Issuer::new(ca, key);
        let addresses = MEMBERS.map(|address| address.to_string());
        for (name, names) in [
            ("server", addresses.to_vec()),
            ("client", vec!["controller".to_owned()]),
        ] {
            let key = KeyPair::generate().unwrap();
            let issued = CertificateParams::new(names).unwrap();
            let issued = issued.signed_by(&key, &issuer).unwrap();
            fs::write(folder.join(format!("{name}.pem")), issued.pem()).unwrap();
            fs::write(folder.join(format!("{name}.key")), key.serialize_pem()).unwrap();
        }
        Self {
            folder: folder.to_owned(),
        }
    }

    fn path(&self, name: &str) -> String {
        self.folder.join(name).display().to_string()
    }
}

/// As an agent does: asks one controller after the other until one lets it in.
pub(crate) async fn join_somewhere(
    controllers: &[Replica],
    first: usize,
    token: &JoinToken,
    name: &str,
    seed: u8,
) -> Credentials {
    let deadline = Instant::now() + PATIENCE;
    for turn in first.. {
        let controller = &controllers[turn % controllers.len()];
        match controller.join(token, name, seed).await {
            Ok(credentials) => return credentials,
            Err(status) => assert!(
                Instant::now() < deadline && status.code() == tonic::Code::Unavailable,
                "{name}: {status}"
            ),
        }
        sleep(Duration::from_millis(200)).await;
    }
    unreachable!()
}
