//! A node joins the mesh: by whose word, and by which way out.

use std::{collections::BTreeMap, fs, path::Path, sync::Arc, time::Duration};

use anyhow::{Context as _, bail, ensure};
use mesh_api::{
    connect::{ALPN, control_channel_over, control_client},
    control::{JoinRequest, JoinResponse, control_client::ControlClient},
};
use mesh_core::offline::retry::{Failure, Retry};
use mesh_daemon::{NotifyState, http_proxy::HttpProxy};
use mesh_identity::{
    authority::new_key,
    credentials::Credentials,
    tls,
    token::{JoinToken, MeshAnchor},
};
use mesh_linux::netlink::Netlink;
use mesh_wire::id::{Identity, NodeId};
use tokio::time;
use tonic::{Code, Status, transport::Channel};

use super::{connect_out, said};
use crate::{
    config::{Settings, TokenSource},
    network,
    state::{IdentityFiles, StateFolder},
    uplinks::Way,
};

/// No attempt takes longer: a connection by each address of a controller's name, a handshake, an answer.
const ATTEMPT_MAX: Duration = Duration::from_secs(120);

/// Joins the mesh; tries until the controller answers. What a join token does not open stays shut; a
/// ServiceAccount token is another in an hour, and what refuses it can be mended without this node.
/// By each way out, the best first; then, as nothing is known yet of where the controller is, as the kernel's routes say.
pub(super) async fn join(
    settings: &Settings,
    state: &StateFolder,
    id: NodeId,
    netlink: &Netlink,
) -> anyhow::Result<Credentials> {
    let renewed = matches!(settings.token, TokenSource::ServiceAccount { .. });
    let mut controllers = Retry::new(settings.controllers.len(), rand::random());
    if let TokenSource::File(path) = &settings.token {
        mesh_daemon::warn_if_exposed(path);
    }
    let new = new_key()?;
    let mut told = BTreeMap::new();
    let mut attempt = 0;
    loop {
        let Some(controller) = settings.controllers.get(controllers.current()) else {
            bail!("this node has not joined a mesh yet: set `controller` in the configuration");
        };
        let network = network::read(netlink, settings).await?;
        let mut ways = network.map_or_else(Vec::new, |network| network.ways());
        ways.push(Way::default());
        // Each controller by this one before the next one's turn.
        let turn = attempt / settings.controllers.len().max(1) % ways.len();
        let way = ways.swap_remove(turn);
        attempt += 1;
        let tried = match read_pass(&settings.token) {
            Ok(pass) => {
                let csr_der = new.csr_der.clone();
                try_join(controller, &way, pass, settings, id, csr_der).await
            }
            Err(error) if renewed => Err(JoinError::Unreachable(error)),
            Err(error) => return Err(error),
        };
        let problem = match tried {
            Ok(response) => {
                let credentials = credentials_from(response, &new.key_pem)?;
                state.set_identity(&files_of(&credentials))?;
                tracing::info!(mesh = credentials.trust_domain(), "joined");
                return Ok(credentials);
            }
            Err(JoinError::Refused(status)) if renewed => said(status),
            Err(JoinError::Refused(status)) => bail!(
                "the controller {controller} refused to let this node join: {}",
                status.message()
            ),
            Err(JoinError::Unreachable(error)) => error,
        };
        let problem = mesh_daemon::chain(problem.as_ref());
        if told.insert(controller.clone(), problem.clone()) != Some(problem.clone()) {
            // One may be of the other family, where this node has none: it is a problem once none lets it in.
            if attempt < settings.controllers.len() {
                tracing::info!(%controller, %problem, "cannot join at this controller; trying the next");
            } else {
                tracing::warn!(%controller, %problem, %id, "cannot join yet; trying again");
            }
        }
        // How many nodes there are is not known yet: the longest pause is that of the largest mesh.
        let failure = Failure::Ended(Duration::ZERO);
        let pause = controllers.handle_failure(failure, 0, None);
        wait_on(pause, &problem);
        time::sleep(pause).await;
    }
}

/// Tells systemd that this start goes on: it ends one after 90 s (`DefaultTimeoutStartSec`), and to be let in may take days.
fn wait_on(pause: Duration, problem: &str) {
    let more = u32::try_from((pause + ATTEMPT_MAX).as_micros()).unwrap_or(u32::MAX);
    mesh_daemon::notify(NotifyState::ExtendTimeoutUsec(more));
    mesh_daemon::notify(NotifyState::Status(&format!("cannot join yet: {problem}")));
}

/// What lets this node in, and by what it knows the controller.
pub(super) struct Pass {
    mesh: MeshAnchor,
    token: String,
    service_account_token: String,
}

/// Reads it anew: a kubelet writes another ServiceAccount token long before the last one is over.
pub(super) fn read_pass(source: &TokenSource) -> anyhow::Result<Pass> {
    let read = |key: &str, path: &Path| {
        fs::read_to_string(path).with_context(|| format!("cannot read `{key}` {}", path.display()))
    };
    let (token, given) = match source {
        TokenSource::None => bail!(
            "this node has not joined a mesh yet: set `token` or `token_file` (made by `meshctl token create`), or `service_account_token_file`"
        ),
        TokenSource::Inline(text) => (text.0.clone(), "`token`".to_owned()),
        TokenSource::File(path) => {
            let given = format!("`token_file` {}", path.display());
            (read("token_file", path)?, given)
        }
        TokenSource::ServiceAccount { token, mesh } => {
            let anchor = read("mesh_file", mesh)?.parse::<MeshAnchor>();
            return Ok(Pass {
                mesh: anchor.with_context(|| format!("`mesh_file` {}", mesh.display()))?,
                token: String::new(),
                service_account_token: read("service_account_token_file", token)?.trim().to_owned(),
            });
        }
    };
    let token = token.trim();
    ensure!(
        !token.is_empty(),
        "{given} is empty: make a token with `meshctl token create`"
    );
    let token = token.parse::<JoinToken>().context(given)?;
    Ok(Pass {
        mesh: MeshAnchor {
            trust_domain: token.trust_domain.clone(),
            mesh: token.mesh,
        },
        token: token.to_string(),
        service_account_token: String::new(),
    })
}

pub(super) enum JoinError {
    /// The controller said no: trying again does not help.
    Refused(Status),
    /// No answer.
    Unreachable(anyhow::Error),
}

pub(super) async fn try_join(
    controller: &str,
    way: &Way,
    pass: Pass,
    settings: &Settings,
    id: NodeId,
    csr_der: Vec<u8>,
) -> Result<JoinResponse, JoinError> {
    let proxy = settings.https_proxy.as_deref();
    let mut client = connect_to_join(controller, way, &pass.mesh, proxy)
        .await
        .map_err(JoinError::Unreachable)?;
    let request = JoinRequest {
        token: pass.token,
        node_name: settings.node_name.to_string(),
        csr_der,
        wireguard_public_key: id.0.to_vec(),
        service_account_token: pass.service_account_token,
    };
    match client.join(request).await {
        Ok(response) => Ok(response.into_inner()),
        Err(status) if is_refusal(status.code()) => Err(JoinError::Refused(status)),
        Err(status) => Err(JoinError::Unreachable(said(status))),
    }
}

fn is_refusal(code: Code) -> bool {
    matches!(
        code,
        Code::InvalidArgument
            | Code::PermissionDenied
            | Code::Unauthenticated
            | Code::AlreadyExists
            | Code::FailedPrecondition
            | Code::NotFound
    )
}

async fn connect_to_join(
    controller: &str,
    way: &Way,
    anchor: &MeshAnchor,
    proxy: Option<&HttpProxy>,
) -> anyhow::Result<ControlClient<Channel>> {
    let config = Arc::new(tls::join_client_config(anchor.mesh, ALPN)?);
    let name = tls::server_name(&anchor.trust_domain, &Identity::Controller)?;
    let tcp = connect_out(controller, proxy, |ip| way.device(ip, None)).await?;
    let channel = control_channel_over(tcp, controller, config, name).await?;
    Ok(control_client(channel))
}

pub(super) fn credentials_from(
    response: JoinResponse,
    key_pem: &str,
) -> anyhow::Result<Credentials> {
    let chain = response
        .certificate_chain_der
        .into_iter()
        .map(Into::into)
        .collect();
    let authority = response.ca_certificate_der.into();
    Credentials::from_parts(chain, key_pem, authority)
        .context("the controller's answer is not usable")
}

pub(super) fn files_of(credentials: &Credentials) -> IdentityFiles {
    IdentityFiles {
        certificate: credentials.chain_pem(),
        key: credentials.key_pem().to_string(),
        ca: credentials.authority_pem(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_service_account_s_token_is_read_anew_and_never_shown() {
        let folder = tempfile::tempdir().unwrap();
        let (token, mesh) = (folder.path().join("token"), folder.path().join("mesh"));
        let source = TokenSource::ServiceAccount {
            token: token.clone(),
            mesh: mesh.clone(),
        };
        let problem = || read_pass(&source).err().map(|error| format!("{error:#}"));
        assert!(problem().unwrap().contains("cannot read `mesh_file`"));
        fs::write(&mesh, "nothing of the kind").unwrap();
        assert!(problem().unwrap().contains("not a mesh's anchor"));
        fs::write(&mesh, format!("hfmesh1.demo.{}\n", "07".repeat(32))).unwrap();
        let missing = problem().unwrap();
        assert!(
            missing.contains("cannot read `service_account_token_file`"),
            "{missing}"
        );
        for text in ["first", "second"] {
            fs::write(&token, format!("{text}\n")).unwrap();
            let pass = read_pass(&source).unwrap();
            assert_eq!(pass.service_account_token, text);
            assert_eq!(
                (pass.token.as_str(), pass.mesh.trust_domain.as_str()),
                ("", "demo")
            );
        }
        assert!(!format!("{source:?}").contains("second"));
    }

    #[test]
    fn a_file_that_holds_no_token_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("token");
        for (text, problem) in [
            (" \n", "is empty: make a token"),
            ("hello\n", "not a join token: it does not begin"),
        ] {
            fs::write(&path, text).unwrap();
            let error = read_pass(&TokenSource::File(path.clone())).err().unwrap();
            let said = format!("{error:#}");
            let named = format!("`token_file` {}", path.display());
            assert!(said.contains(&named) && said.contains(problem), "{said}");
        }
    }
}
