//! The local socket: what `meshctl` asks the controller.

use std::{collections::BTreeSet, sync::Arc};

use mesh_api::admin::{
    AcceptRollbackRequest, AcceptRollbackResponse, ApproveNodesRequest, ApproveNodesResponse,
    ApprovedReport, ControllerStatusRequest, ControllerStatusResponse, CreateTokenRequest,
    CreateTokenResponse, IssueRelayRequest, IssueRelayResponse, ListNodesRequest,
    ListNodesResponse, ListTokensRequest, ListTokensResponse, ListWaitingRequest,
    ListWaitingResponse, NodeReport, RemoveNodeRequest, RemoveNodeResponse, RevokeTokenRequest,
    RevokeTokenResponse, TokenReport, WaitingReport, controller_admin_server::ControllerAdmin,
};
use mesh_wire::id::{NodeName, RelayName};
use tokio::task::spawn_blocking;
use tonic::{Request, Response, Status};

use crate::state::{ApprovalError, NodeView, State, TokenError};

/// Longest description of a token, in bytes.
const DESCRIPTION_LEN_MAX: usize = 200;

/// The service.
#[derive(Debug, Clone)]
pub struct AdminService {
    state: Arc<State>,
}

impl AdminService {
    /// Serves `state`.
    #[must_use]
    pub fn new(state: Arc<State>) -> Self {
        Self { state }
    }

    /// Does on a blocking thread what waits for the disk.
    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&State) -> T + Send + 'static,
    ) -> Result<T, Status> {
        let state = self.state.clone();
        let done = spawn_blocking(move || work(&state)).await;
        done.map_err(|error| Status::internal(error.to_string()))
    }
}

#[tonic::async_trait]
impl ControllerAdmin for AdminService {
    async fn create_token(
        &self,
        request: Request<CreateTokenRequest>,
    ) -> Result<Response<CreateTokenResponse>, Status> {
        let request = request.into_inner();
        if request.description.len() > DESCRIPTION_LEN_MAX {
            let text = format!("description: longer than {DESCRIPTION_LEN_MAX} bytes");
            return Err(Status::invalid_argument(text));
        }
        let node = (!request.node.is_empty()).then(|| request.node.parse());
        let node = node.transpose();
        let node = node.map_err(|error| Status::invalid_argument(format!("node: {error}")))?;
        let (ttl_s, uses, description) = (request.ttl_s, request.uses, request.description);
        let made = self.blocking(move |state| state.create_token(ttl_s, uses, description, node));
        let (token, expires_unix_s) = made.await?.map_err(|error| match error {
            TokenError::TooLong | TokenError::TooManyUses => {
                Status::invalid_argument(error.to_string())
            }
            TokenError::Random(_) | TokenError::Store(_) => Status::unavailable(error.to_string()),
        })?;
        tracing::info!(id = %token.id, "token made");
        Ok(Response::new(CreateTokenResponse {
            token: token.to_string(),
            id: token.id.clone(),
            expires_unix_s,
        }))
    }

    async fn list_tokens(
        &self,
        _: Request<ListTokensRequest>,
    ) -> Result<Response<ListTokensResponse>, Status> {
        let tokens = self.blocking(State::tokens).await?;
        let tokens = tokens.map_err(|error| Status::unavailable(error.to_string()))?;
        let tokens = tokens.into_iter().map(|(id, token)| TokenReport {
            id,
            description: token.description,
            expires_unix_s: token.expires_unix_s,
            uses_left: token.uses_left,
            node: token.node.unwrap_or_default(),
        });
        let tokens = tokens.collect();
        Ok(Response::new(ListTokensResponse { tokens }))
    }

    async fn revoke_token(
        &self,
        request: Request<RevokeTokenRequest>,
    ) -> Result<Response<RevokeTokenResponse>, Status> {
        let id = request.into_inner().id;
        let asked = id.clone();
        let revoked = self
            .blocking(move |state| state.revoke_token(&asked))
            .await?;
        match revoked {
            Ok(true) => {
                tracing::info!(%id, "token revoked");
                Ok(Response::new(RevokeTokenResponse {}))
            }
            Ok(false) => Err(Status::not_found(format!("there is no token {id:?}"))),
            Err(error) => Err(Status::unavailable(error.to_string())),
        }
    }

    async fn accept_rollback(
        &self,
        _: Request<AcceptRollbackRequest>,
    ) -> Result<Response<AcceptRollbackResponse>, Status> {
        let accepted = self.blocking(State::accept_rollback).await?;
        let epoch = accepted.map_err(|error| Status::unavailable(error.to_string()))?;
        Ok(Response::new(AcceptRollbackResponse { epoch }))
    }

    async fn list_nodes(
        &self,
        _: Request<ListNodesRequest>,
    ) -> Result<Response<ListNodesResponse>, Status> {
        let nodes = self.state.nodes().into_iter().map(node_report).collect();
        Ok(Response::new(ListNodesResponse { nodes }))
    }

    async fn remove_node(
        &self,
        request: Request<RemoveNodeRequest>,
    ) -> Result<Response<RemoveNodeResponse>, Status> {
        let name = request.into_inner().name;
        let node: NodeName = name
            .parse()
            .map_err(|error| Status::invalid_argument(format!("name: {error}")))?;
        match self.blocking(move |state| state.remove_node(&node)).await? {
            Ok(Some(address_rests_until_unix_s)) => Ok(Response::new(RemoveNodeResponse {
                address_rests_until_unix_s,
            })),
            Ok(None) => {
                let text =
                    format!("no node {name:?} has joined (`meshctl nodes` lists those that have)");
                Err(Status::not_found(text))
            }
            Err(error) => Err(Status::unavailable(error.to_string())),
        }
    }

    async fn list_waiting(
        &self,
        _: Request<ListWaitingRequest>,
    ) -> Result<Response<ListWaitingResponse>, Status> {
        let (manual, waiting) = self.blocking(State::waiting).await?;
        let nodes = waiting.into_iter().map(|(name, pending)| WaitingReport {
            name: name.into(),
            public_key: pending.id.to_string(),
            address: pending
                .address
                .map_or_else(String::new, |address| address.to_string()),
            since_unix_s: pending.since_unix_s,
        });
        let nodes = nodes.collect();
        Ok(Response::new(ListWaitingResponse { manual, nodes }))
    }

    async fn approve_nodes(
        &self,
        request: Request<ApproveNodesRequest>,
    ) -> Result<Response<ApproveNodesResponse>, Status> {
        let names = request.into_inner().names;
        let names = names.iter().map(|name| name.parse::<NodeName>());
        let names: BTreeSet<_> = names
            .collect::<Result<_, _>>()
            .map_err(|error| Status::invalid_argument(format!("names: {error}")))?;
        let approved = self.blocking(move |state| state.approve(&names)).await?;
        let approved = approved.map_err(|error| match error {
            ApprovalError::NotWaiting(_) => Status::not_found(error.to_string()),
            ApprovalError::Cluster | ApprovalError::NoFolder => {
                Status::failed_precondition(error.to_string())
            }
            ApprovalError::Manifest(_) => Status::unavailable(error.to_string()),
        })?;
        let report = |(name, file): (NodeName, String)| {
            tracing::info!(node = %name, %file, "approved");
            let name = name.into();
            ApprovedReport { name, file }
        };
        let nodes = approved.into_iter().map(report).collect();
        Ok(Response::new(ApproveNodesResponse { nodes }))
    }

    async fn issue_relay(
        &self,
        request: Request<IssueRelayRequest>,
    ) -> Result<Response<IssueRelayResponse>, Status> {
        let name: RelayName = request
            .into_inner()
            .name
            .parse()
            .map_err(|error| Status::invalid_argument(format!("name: {error}")))?;
        let issued = self.state.relay_credentials(name.clone());
        let credentials = issued.map_err(|error| Status::internal(error.to_string()))?;
        tracing::info!(relay = %name, "relay certificate issued");
        Ok(Response::new(IssueRelayResponse {
            certificate_pem: credentials.chain_pem(),
            key_pem: credentials.key_pem().to_string(),
            ca_pem: credentials.authority_pem(),
        }))
    }

    async fn status(
        &self,
        _: Request<ControllerStatusRequest>,
    ) -> Result<Response<ControllerStatusResponse>, Status> {
        let (generation, nodes, connected, problems) = self.state.summary();
        let count = |number: usize| u32::try_from(number).unwrap_or(u32::MAX);
        Ok(Response::new(ControllerStatusResponse {
            trust_domain: self.state.authority().trust_domain().to_owned(),
            generation,
            nodes: count(nodes),
            agents_connected: count(connected),
            problems,
            mesh_id: self.state.authority().mesh_id().to_string(),
            serves: self.state.serves(),
            leads: self.state.leads(),
        }))
    }
}

fn node_report(view: NodeView) -> NodeReport {
    let NodeView {
        node,
        generation,
        last_seen_unix_s,
    } = view;
    let site = node.locality.site.as_ref();
    NodeReport {
        name: node.name.to_string(),
        public_key: node.id.to_string(),
        overlay_addresses: vec![node.overlay_v4.to_string(), node.overlay_v6.to_string()],
        site: site.map(ToString::to_string).unwrap_or_default(),
        connected: generation.is_some(),
        generation: generation.unwrap_or(0),
        last_seen_unix_s: last_seen_unix_s.unwrap_or(0),
    }
}
