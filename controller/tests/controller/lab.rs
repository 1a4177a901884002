//! One controller in a temporary folder, and agents made of the libraries.

use std::{
    fs,
    net::SocketAddr,
    os::unix::net::UnixDatagram,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use mesh_api::{
    admin::{
        ControllerStatusRequest, ControllerStatusResponse, CreateTokenRequest,
        controller_admin_client::ControllerAdminClient,
    },
    connect::{ALPN, ConnectError, admin_channel, control_channel, control_client},
    control::{
        Head, JoinRequest, SignedHead, SyncRequest, SyncResponse, control_client::ControlClient,
    },
};
use mesh_identity::{
    authority::new_key,
    credentials::Credentials,
    tls::{client_config, join_client_config, server_name},
    token::JoinToken,
};
use mesh_wire::id::Identity;
use tempfile::TempDir;
use tokio::{sync::mpsc, time::timeout};
use tokio_rustls::rustls::ClientConfig;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming, transport::Channel};

/// No test waits longer for anything.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

pub(crate) struct Lab {
    pub(crate) folder: TempDir,
    pub(crate) address: SocketAddr,
    child: Child,
}

impl Lab {
    /// A controller that is ready.
    pub(crate) fn start(manifests: &[(&str, &str)]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("manifests")).unwrap();
        for (name, text) in manifests {
            fs::write(folder.path().join("manifests").join(name), text).unwrap();
        }
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        write_config(folder.path(), any, "");
        Self::start_in(folder, &[])
    }

    /// Starts what `folder` configures, behind `wrapper`'s arguments.
    pub(crate) fn start_in(folder: TempDir, wrapper: &[&str]) -> Self {
        let ready = UnixDatagram::bind(folder.path().join("notify")).unwrap();
        ready.set_read_timeout(Some(PATIENCE)).unwrap();
        let child = spawn(folder.path(), wrapper);
        let mut message = [0; 64];
        let length = ready.recv(&mut message).unwrap_or_else(|error| {
            panic!("not ready ({error}): {}", log(folder.path()));
        });
        assert_eq!(&message[..length], b"READY=1\n");
        drop(ready);
        fs::remove_file(folder.path().join("notify")).unwrap();
        let address = listening(&log(folder.path()));
        Self {
            folder,
            address,
            child,
        }
    }

    /// Stops the controller in an orderly way, and starts it again at the same address.
    pub(crate) fn restart(mut self) -> Self {
        assert!(self.stop().success());
        self.start_again()
    }

    /// Starts one that was stopped again, at the same address.
    pub(crate) fn start_again(mut self) -> Self {
        let folder = std::mem::replace(&mut self.folder, tempfile::tempdir().unwrap());
        write_config(folder.path(), self.address, "");
        Self::start_in(folder, &[])
    }

    pub(crate) fn stop(&mut self) -> ExitStatus {
        let pid = self.pid();
        let killed = Command::new("kill").args(["-TERM", &pid]).status();
        assert!(killed.unwrap().success());
        self.child.wait().unwrap()
    }

    pub(crate) fn pid(&self) -> String {
        self.child.id().to_string()
    }

    pub(crate) fn is_running(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub(crate) fn write_manifest(&self, name: &str, text: &str) {
        fs::write(self.path("manifests").join(name), text).unwrap();
    }

    pub(crate) fn log(&self) -> String {
        log(self.folder.path())
    }

    /// Waits until the log has `text`: the controller answers first and writes its log after that.
    pub(crate) async fn logged(&self, text: &str) {
        let deadline = Instant::now() + PATIENCE;
        while !self.log().contains(text) {
            assert!(Instant::now() < deadline, "no {text:?} in {}", self.log());
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    pub(crate) async fn admin(&self) -> ControllerAdminClient<Channel> {
        let channel = admin_channel(&self.path("admin.sock")).await;
        ControllerAdminClient::new(channel.unwrap())
    }

    pub(crate) async fn status(&self) -> ControllerStatusResponse {
        let status = self.admin().await.status(ControllerStatusRequest {}).await;
        status.unwrap().into_inner()
    }

    pub(crate) async fn token(&self, request: CreateTokenRequest) -> JoinToken {
        let made = self.admin().await.create_token(request).await.unwrap();
        made.into_inner().token.parse().unwrap()
    }

    /// Joins with a new token.
    pub(crate) async fn node(&self, name: &str, seed: u8) -> Credentials {
        let token = self.token(CreateTokenRequest::default()).await;
        self.join(&token, name, seed).await.unwrap()
    }

    pub(crate) async fn join(
        &self,
        token: &JoinToken,
        name: &str,
        seed: u8,
    ) -> Result<Credentials, Status> {
        let config = join_client_config(token.mesh, ALPN).unwrap();
        let mut client = self.connect(config).await.unwrap();
        let key = new_key().unwrap();
        let request = JoinRequest {
            token: token.to_string(),
            node_name: name.to_owned(),
            csr_der: key.csr_der,
            wireguard_public_key: vec![seed; 32],
            ..JoinRequest::default()
        };
        let response = client.join(request).await?.into_inner();
        let chain = response.certificate_chain_der.into_iter();
        let chain = chain.map(Into::into).collect();
        let authority = response.ca_certificate_der.into();
        Ok(Credentials::from_parts(chain, &key.key_pem, authority).unwrap())
    }

    pub(crate) async fn connect(
        &self,
        config: ClientConfig,
    ) -> Result<ControlClient<Channel>, ConnectError> {
        let name = server_name("demo", &Identity::Controller).unwrap();
        let address = self.address.to_string();
        let channel = control_channel(&address, Arc::new(config), name).await?;
        Ok(control_client(channel))
    }

    pub(crate) async fn client(&self, credentials: &Credentials) -> ControlClient<Channel> {
        let config = client_config(credentials, ALPN).unwrap();
        self.connect(config).await.unwrap()
    }

    /// Opens a Sync stream of a node that has `had`, and takes the first answer.
    pub(crate) async fn sync(
        &self,
        credentials: &Credentials,
        had: Option<&SyncResponse>,
    ) -> Result<(Agent, SyncResponse), Status> {
        let mut client = self.client(credentials).await;
        let (say, said) = mpsc::channel(1);
        let request = had.map_or_else(SyncRequest::default, |had| SyncRequest {
            store_id: had.store_id.clone(),
            generation: had.generation,
            life: head(had).life,
            epoch: head(had).epoch,
            ..SyncRequest::default()
        });
        say.send(request).await.unwrap();
        let stream = client.sync(ReceiverStream::new(said)).await?.into_inner();
        let mut agent = Agent { stream, say };
        let first = agent.next().await?;
        Ok((agent, first))
    }
}

/// What the controller signed with this answer.
pub(crate) fn head(answer: &SyncResponse) -> Head {
    answer.head.as_ref().and_then(SignedHead::read).unwrap()
}

impl Drop for Lab {
    fn drop(&mut self) {
        // It may have ended already.
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

pub(crate) struct Agent {
    stream: Streaming<SyncResponse>,
    pub(crate) say: mpsc::Sender<SyncRequest>,
}

impl Agent {
    pub(crate) async fn next(&mut self) -> Result<SyncResponse, Status> {
        let message = timeout(PATIENCE, self.stream.message()).await;
        let message = message.expect("no answer in time")?;
        Ok(message.expect("the stream ended"))
    }

    /// Waits until the controller ends the stream, with nothing more on it.
    pub(crate) async fn ended(&mut self) {
        let message = timeout(PATIENCE, self.stream.message()).await;
        assert_eq!(message.expect("no end in time").unwrap(), None);
    }
}

pub(crate) fn write_config(folder: &Path, listen: SocketAddr, more: &str) {
    let path = |name: &str| folder.join(name).display().to_string();
    let text = format!(
        "mesh_name = \"demo\"\nlisten = \"{listen}\"\nstate_dir = \"{}\"\nmanifests = \"{}\"\nadmin_socket = \"{}\"\n\
         metrics_listen = \"127.0.0.1:0\"\n{more}",
        path("state"),
        path("manifests"),
        path("admin.sock"),
    );
    fs::write(folder.join("controller.toml"), text).unwrap();
}

/// Runs a controller that is expected to end by itself: its exit code, and what it said.
pub(crate) fn run_to_end(folder: &Path) -> (Option<i32>, String) {
    let status = spawn(folder, &[]).wait().unwrap();
    (status.code(), log(folder))
}

fn spawn(folder: &Path, wrapper: &[&str]) -> Child {
    let binary = env!("CARGO_BIN_EXE_mesh-controller");
    let config = folder.join("controller.toml").display().to_string();
    let mut words = wrapper.to_vec();
    words.extend([binary, "--config", &config]);
    let log = fs::File::create(folder.join("log")).unwrap();
    Command::new(words[0])
        .args(&words[1..])
        .env("NOTIFY_SOCKET", folder.join("notify"))
        .env("NO_COLOR", "1")
        .env("HOLDFAST_LOG", "debug,h2=info")
        .stdin(Stdio::null())
        .stderr(log)
        .spawn()
        .unwrap()
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

pub(crate) fn now() -> SystemTime {
    SystemTime::now()
}
