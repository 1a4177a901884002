//! Whether a ServiceAccount token lets a node in: the API server says whose it is and to which
//! node it is bound.

use std::{sync::Arc, time::Duration};

use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec, TokenReviewStatus};
use kube::{Api, Client, api::PostParams};
use mesh_wire::id::NodeName;
use tokio::{sync::Semaphore, time::timeout};

use super::follow::client_error;

/// The audience that a node's ServiceAccount token must be made for.
pub const AUDIENCE: &str = "holdfast";

/// Where an API server says to which node a token is bound (Kubernetes 1.30 and later).
const NODE_NAME: &str = "authentication.kubernetes.io/node-name";

/// Reviews under way at once: anybody who reaches the controller can cause one, and the API server
/// has others to serve. A review takes milliseconds, so that a cluster of 5,000 nodes joins within a minute.
const REVIEWS_MAX: usize = 16;

/// How long a review may take, with the wait for its turn.
const REVIEW_TIMEOUT: Duration = Duration::from_secs(10);

/// Longest token: the API server's own are some 1,200 bytes.
const TOKEN_LEN_MAX: usize = 8 << 10;

/// Why a ServiceAccount token does not let a node in.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReviewError {
    /// The API server did not say.
    #[error("the API server cannot be asked about the ServiceAccount token: {0}")]
    Unavailable(String),
    /// It is none, or of another cluster, or over.
    #[error("the API server does not know the ServiceAccount token: {0}")]
    Unknown(String),
    /// It is for somebody else's ears.
    #[error("the ServiceAccount token is not for audience {AUDIENCE}")]
    Audience,
    /// It is another account's.
    #[error("the ServiceAccount token is of {found}, not of {expected}")]
    Account {
        /// Whose it is.
        found: String,
        /// Whose it should be.
        expected: String,
    },
    /// It says nothing of a node.
    #[error(
        "the ServiceAccount token is bound to no node: use a projected volume of a pod, of Kubernetes 1.30 or later"
    )]
    Unbound,
    /// It is another node's.
    #[error("the ServiceAccount token is bound to node {found}, not to {expected}")]
    Node {
        /// The node it is bound to.
        found: String,
        /// The node that wants to join.
        expected: String,
    },
}

/// Asks the API server about tokens.
#[derive(Clone)]
pub struct Reviewer {
    client: Client,
    /// `system:serviceaccount:<namespace>:<name>`.
    account: String,
    turns: Arc<Semaphore>,
}

impl std::fmt::Debug for Reviewer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { account, .. } = self;
        f.debug_struct("Reviewer")
            .field("account", account)
            .finish_non_exhaustive()
    }
}

impl Reviewer {
    /// Lets tokens of the account `name` in `namespace` count.
    #[must_use]
    pub fn new(client: Client, namespace: &str, name: &str) -> Self {
        Self {
            client,
            account: format!("system:serviceaccount:{namespace}:{name}"),
            turns: Arc::new(Semaphore::new(REVIEWS_MAX)),
        }
    }

    /// Whether `token` lets `node` in.
    ///
    /// # Errors
    ///
    /// [`ReviewError`]. None of them has the token in it.
    pub async fn review(&self, token: &str, node: &NodeName) -> Result<(), ReviewError> {
        if token.len() > TOKEN_LEN_MAX {
            let text = format!("longer than {TOKEN_LEN_MAX} bytes");
            return Err(ReviewError::Unknown(text));
        }
        let asked = timeout(REVIEW_TIMEOUT, self.ask(token)).await;
        let late = |_| ReviewError::Unavailable(format!("no answer within {REVIEW_TIMEOUT:?}"));
        let status = asked.map_err(late)??;
        judge(&status, &self.account, node)
    }

    async fn ask(&self, token: &str) -> Result<TokenReviewStatus, ReviewError> {
        // Never closed.
        let _turn = self.turns.acquire().await;
        let review = TokenReview {
            spec: TokenReviewSpec {
                token: Some(token.to_owned()),
                audiences: Some(vec![AUDIENCE.to_owned()]),
            },
            ..TokenReview::default()
        };
        let reviews: Api<TokenReview> = Api::all(self.client.clone());
        let answer = reviews.create(&PostParams::default(), &review).await;
        let answer = answer.map_err(|error| ReviewError::Unavailable(client_error(&error)))?;
        Ok(answer.status.unwrap_or_default())
    }
}

/// Whether an answer of the API server lets `node` in.
fn judge(status: &TokenReviewStatus, account: &str, node: &NodeName) -> Result<(), ReviewError> {
    if status.authenticated != Some(true) {
        let said = status.error.clone();
        let said = said.unwrap_or_else(|| "it is of another audience, over, or none".to_owned());
        return Err(ReviewError::Unknown(said));
    }
    // An API server that does not know of audiences would not name any: such a token is for the
    // API server itself, and must not let anybody in here.
    let audiences = status.audiences.as_deref().unwrap_or_default();
    if !audiences.iter().any(|audience| audience == AUDIENCE) {
        return Err(ReviewError::Audience);
    }
    let user = status.user.clone().unwrap_or_default();
    let found = user.username.unwrap_or_default();
    if found != account {
        let expected = account.to_owned();
        return Err(ReviewError::Account { found, expected });
    }
    let extra = user.extra.unwrap_or_default();
    match extra.get(NODE_NAME).map(Vec::as_slice) {
        Some([found]) if found == node.as_str() => Ok(()),
        Some([found]) => Err(ReviewError::Node {
            found: found.clone(),
            expected: node.to_string(),
        }),
        _ => Err(ReviewError::Unbound),
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::authentication::v1::UserInfo;

    use super::*;

    #[test]
    fn only_the_agents_account_on_that_node_with_our_audience_gets_in() {
        let account = "system:serviceaccount:holdfast:mesh-agent";
        let node = "edge-a1".parse().unwrap();
        let judged = |change: &dyn Fn(&mut TokenReviewStatus)| {
            let mut status = good();
            change(&mut status);
            judge(&status, account, &node).map_err(|error| error.to_string())
        };
        let refused = |change: &dyn Fn(&mut TokenReviewStatus), expected: &str| {
            let error = judged(change).unwrap_err();
            assert!(error.contains(expected), "{error}");
        };
        assert_eq!(judged(&|_| {}), Ok(()));
        refused(
            &|status| status.authenticated = Some(false),
            "does not know",
        );
        refused(&|status| status.authenticated = None, "does not know");
        refused(&|status| status.audiences = None, "audience");
        let other = |status: &mut TokenReviewStatus| {
            status.audiences = Some(vec!["https://kubernetes.default.svc".to_owned()]);
        };
        refused(&other, "audience");
        let user = |name: &'static str| {
            move |status: &mut TokenReviewStatus| {
                let user = status.user.get_or_insert_default();
                user.username = Some(name.to_owned());
            }
        };
        refused(
            &user("system:serviceaccount:holdfast:default"),
            "is of system:",
        );
        refused(
            &user("system:admin"),
            "not of system:serviceaccount:holdfast:mesh-agent",
        );
        let bound = |nodes: &'static [&'static str]| {
            move |status: &mut TokenReviewStatus| {
                let user = status.user.get_or_insert_default();
                let nodes = nodes.iter().map(|&node| node.to_owned()).collect();
                user.extra = Some([(NODE_NAME.to_owned(), nodes)].into());
            }
        };
        refused(
            &bound(&["edge-a2"]),
            "bound to node edge-a2, not to edge-a1",
        );
        refused(&bound(&[]), "bound to no node");
        refused(&bound(&["edge-a1", "edge-a2"]), "bound to no node");
        refused(
            &|status| status.user.get_or_insert_default().extra = None,
            "bound to no node",
        );
    }

    fn good() -> TokenReviewStatus {
        TokenReviewStatus {
            audiences: Some(vec![AUDIENCE.to_owned()]),
            authenticated: Some(true),
            error: None,
            user: Some(UserInfo {
                username: Some("system:serviceaccount:holdfast:mesh-agent".to_owned()),
                extra: Some([(NODE_NAME.to_owned(), vec!["edge-a1".to_owned()])].into()),
                ..UserInfo::default()
            }),
        }
    }
}
