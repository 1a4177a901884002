//! Who gets in, and as whom.

use std::{
    sync::Arc,
    time::{Duration, UNIX_EPOCH},
};

use mesh_api::{
    admin::{
        ApproveNodesRequest, CreateTokenRequest, IssueRelayRequest, ListNodesRequest,
        ListTokensRequest, ListWaitingRequest, RemoveNodeRequest, RevokeTokenRequest,
    },
    connect::{ALPN, ConnectError},
    control::{RenewRequest, SyncRequest},
};
use mesh_identity::{
    authority::{CertificateAuthority, new_key},
    certificate::{BACK_DATE, NODE_LIFETIME_MAX, NODE_LIFETIME_MIN, Validity},
    credentials::Credentials,
    tls::{client_config, join_client_config},
    token::JoinToken,
};
use mesh_wire::id::{Identity, MeshId, NodeId};
use tokio_rustls::rustls::{
    crypto::ring::default_provider,
    pki_types::{PrivateKeyDer, pem::PemObject as _},
    sign::{CertifiedKey, SingleCertAndKey},
};
use tonic::Code;

use crate::lab::{Lab, now};

#[tokio::test]
async fn a_token_lets_a_node_in_which_then_is_a_node_of_the_mesh() {
    let lab = Lab::start(&[]);
    let credentials = lab.node("edge-a1", 1).await;
    let expected = Identity::Node {
        name: "edge-a1".parse().unwrap(),
        id: NodeId([1; 32]),
    };
    assert_eq!(credentials.identity(), &expected);
    let nodes = lab.admin().await.list_nodes(ListNodesRequest {}).await;
    let nodes = nodes.unwrap().into_inner().nodes;
    assert_eq!(nodes[0].name, "edge-a1");
    assert_eq!(nodes[0].overlay_addresses[0], "100.96.0.1");
    assert!(!nodes[0].connected);
    assert_eq!(nodes[0].last_seen_unix_s, 0, "it never spoke");
}

const MANUAL: &str = "# The mesh.
apiVersion: mesh.holdfast.dev/v1alpha1
kind: MeshConfig
metadata: {name: default}
spec: {joinApproval: manual}
---
apiVersion: mesh.holdfast.dev/v1alpha1
kind: MeshNode
metadata: {name: edge-a1}
spec:
  site: a # hall 3
";

#[tokio::test]
async fn who_waits_is_known_with_key_and_address_and_is_in_once_approved() {
    let lab = Lab::start(&[("mesh.yaml", MANUAL)]);
    let token = lab.token(CreateTokenRequest::default()).await;
    let waiting = async || {
        let said = lab.admin().await.list_waiting(ListWaitingRequest {}).await;
        let said = said.unwrap().into_inner();
        assert!(said.manual);
        said.nodes
    };
    let approve = async |names: &[&str]| {
        let names = names.iter().map(|&name| name.to_owned()).collect();
        let request = ApproveNodesRequest { names };
        let said = lab.admin().await.approve_nodes(request).await;
        said.map(|said| said.into_inner().nodes)
    };
    assert_eq!(waiting().await, []);
    let mut since_unix_s = Vec::new();
    for _ in 0..2 {
        let refused = lab.join(&token, "edge-a1", 1).await.unwrap_err();
        assert_eq!(refused.code(), Code::Unavailable, "{refused}");
        let node = waiting().await.remove(0);
        let key = NodeId([1; 32]).to_string();
        assert_eq!((node.name.as_str(), node.public_key), ("edge-a1", key));
        assert_eq!(node.address, "127.0.0.1");
        since_unix_s.push(node.since_unix_s);
    }
    // Asking again is no other waiting.
    assert_eq!(since_unix_s[0], since_unix_s[1]);
    let now_unix_s = now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    let waited_s = i64::try_from(now_unix_s).unwrap() - since_unix_s[0];
    assert!((0..60).contains(&waited_s), "{waited_s}");

    let strange = approve(&["edge-a1", "edge-a2"]).await.unwrap_err();
    assert_eq!(strange.code(), Code::NotFound, "{strange}");
    assert!(
        strange.message().contains("no node edge-a2 waits"),
        "{strange}"
    );
    lab.join(&token, "edge-a1", 1).await.unwrap_err();

    let approved = approve(&["edge-a1"]).await.unwrap();
    assert_eq!(approved[0].file, "mesh.yaml");
    let manifest = std::fs::read_to_string(lab.path("manifests/mesh.yaml")).unwrap();
    let line = "spec:\n  approved: true\n  site: a # hall 3\n";
    assert_eq!(
        manifest,
        MANUAL.replace("spec:\n  site: a # hall 3\n", line)
    );
    assert_eq!(waiting().await, []);
    lab.join(&token, "edge-a1", 1).await.unwrap();
    // Nothing is left to say about it.
    assert_eq!(lab.status().await.problems, [""; 0]);
}

#[tokio::test]
async fn tokens_that_do_not_count_are_refused_each_with_its_reason() {
    let lab = Lab::start(&[]);
    let refusal = async |token: &JoinToken, name: &str, seed| {
        let status = lab.join(token, name, seed).await.unwrap_err();
        (status.code(), status.message().to_owned())
    };
    let own = lab.token(CreateTokenRequest::default()).await;
    let wrong = JoinToken::generate("demo", own.mesh).unwrap();
    let (code, text) = refusal(&wrong, "a", 1).await;
    assert_eq!(code, Code::Unauthenticated, "{text}");
    assert!(text.contains("knows no such token"), "{text}");

    // The id of one token with the secret of another.
    let mixed = own.to_string().replace(&own.id, &wrong.id);
    let (code, _) = refusal(&mixed.parse().unwrap(), "a", 1).await;
    assert_eq!(code, Code::Unauthenticated);

    lab.join(&own, "a", 1).await.unwrap();
    let (code, text) = refusal(&own, "b", 2).await;
    assert_eq!(code, Code::PermissionDenied);
    assert!(text.contains("it is used up"), "{text}");

    let bound = lab
        .token(CreateTokenRequest {
            node: "c".to_owned(),
            ..Default::default()
        })
        .await;
    let (_, text) = refusal(&bound, "b", 2).await;
    assert!(text.contains("it was made for node c only"), "{text}");
    let tokens = lab.admin().await.list_tokens(ListTokensRequest {}).await;
    let tokens = tokens.unwrap().into_inner().tokens;
    let listed = tokens.iter().find(|token| token.id == bound.id);
    assert_eq!(listed.unwrap().node, "c");

    let short = lab
        .token(CreateTokenRequest {
            ttl_s: 1,
            ..Default::default()
        })
        .await;
    tokio::time::sleep(Duration::from_secs(2)).await; // Its time is real time.
    let (_, text) = refusal(&short, "b", 2).await;
    assert!(
        text.contains("it expired on 2") && text.contains(" UTC; make"),
        "{text}"
    );

    let revoked = lab.token(CreateTokenRequest::default()).await;
    let id = revoked.id.clone();
    lab.admin()
        .await
        .revoke_token(RevokeTokenRequest { id })
        .await
        .unwrap();
    let (code, _) = refusal(&revoked, "b", 2).await;
    assert_eq!(code, Code::Unauthenticated);
    let log = lab.log();
    assert!(!log.contains(&own.to_string()), "a token is in the log");
}

#[tokio::test]
async fn a_token_of_one_use_is_used_once_by_however_many_at_the_same_time() {
    let lab = Lab::start(&[]);
    let token = lab.token(CreateTokenRequest::default()).await;
    let names: Vec<_> = (1..=8).map(|seed| (format!("n{seed}"), seed)).collect();
    let joins = names
        .iter()
        .map(|(name, seed)| lab.join(&token, name, *seed));
    let results = futures_util::future::join_all(joins).await;
    let joined = results.iter().filter(|result| result.is_ok()).count();
    assert_eq!(joined, 1);
    for status in results.into_iter().filter_map(Result::err) {
        assert!(status.message().contains("used up"), "{status}");
    }
    let tokens = lab.admin().await.list_tokens(ListTokensRequest {}).await;
    let tokens = tokens.unwrap().into_inner().tokens;
    assert_eq!((tokens[0].uses_left, tokens[0].node.as_str()), (0, ""));
    assert_eq!(lab.status().await.nodes, 1);
}

#[tokio::test]
async fn joining_again_is_the_same_node_and_its_name_is_its_own() {
    let lab = Lab::start(&[]);
    let token = lab
        .token(CreateTokenRequest {
            uses: 9,
            ..Default::default()
        })
        .await;
    let first = lab.join(&token, "a", 1).await.unwrap();
    lab.join(&token, "a", 1).await.unwrap();
    assert_eq!(lab.status().await.nodes, 1);

    let taken = lab.join(&token, "a", 2).await.unwrap_err();
    assert_eq!(taken.code(), Code::AlreadyExists);
    assert!(taken.message().contains("--node a"), "{taken}");
    let key = lab.join(&token, "b", 1).await.unwrap_err();
    assert!(key.message().contains("belongs to node a already"), "{key}");

    // A token made for the node replaces it: what the old key has counts no more.
    let (mut stream, _) = lab.sync(&first, None).await.unwrap();
    let bound = lab
        .token(CreateTokenRequest {
            node: "a".to_owned(),
            ..Default::default()
        })
        .await;
    let second = lab.join(&bound, "a", 2).await.unwrap();
    assert_eq!(
        stream.next().await.unwrap_err().code(),
        Code::PermissionDenied
    );
    let refused = lab.sync(&first, None).await.err().unwrap();
    assert_eq!(refused.code(), Code::PermissionDenied);
    lab.sync(&second, None).await.unwrap();
}

#[tokio::test]
async fn a_certificate_is_renewed_for_its_holder_and_nobody_else() {
    let lab = Lab::start(&[]);
    let credentials = lab.node("a", 1).await;
    let key = new_key().unwrap();
    let csr_der = key.csr_der.clone();
    let mut client = lab.client(&credentials).await;
    let renewed = client
        .renew(RenewRequest {
            csr_der: csr_der.clone(),
        })
        .await;
    let chain = renewed.unwrap().into_inner().certificate_chain_der;
    let chain = chain.into_iter().map(Into::into).collect();
    let authority = credentials.authority().clone();
    let renewed = Credentials::from_parts(chain, &key.key_pem, authority).unwrap();
    assert_eq!(renewed.identity(), credentials.identity());

    let nobody = join_client_config(credentials.mesh_id(), ALPN).unwrap();
    let mut nobody = lab.connect(nobody).await.unwrap();
    let refused = nobody.renew(RenewRequest { csr_der }).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unauthenticated);
    let garbage = RenewRequest {
        csr_der: vec![1, 2, 3],
    };
    let refused = client.renew(garbage).await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument);
    assert!(refused.message().starts_with("csr_der: "), "{refused}");
}

#[tokio::test]
async fn a_certificate_lasts_twice_the_offline_limit_and_a_removed_node_s_address_rests_as_long() {
    const DAY: Duration = Duration::from_secs(86_400);
    let config = |days: u32| {
        format!(
            "apiVersion: mesh.holdfast.dev/v1alpha1\nkind: MeshConfig\nmetadata: {{name: default}}\n\
             spec: {{offlineLimitDays: {days}}}\n"
        )
    };
    let lab = Lab::start(&[("mesh.yaml", &config(1))]);
    let limits = [
        (1, NODE_LIFETIME_MIN),
        (30, 60 * DAY),
        (90, 180 * DAY),
        (3_650, NODE_LIFETIME_MAX),
        (0, NODE_LIFETIME_MAX),
    ];
    for (days, expected) in limits {
        let before = lab.status().await.generation;
        lab.write_manifest("mesh.yaml", &config(days));
        while days > 1 && lab.status().await.generation == before {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        let name = format!("edge-{days}");
        let credentials = lab.node(&name, u8::try_from(days % 200).unwrap() + 1).await;
        let validity = credentials.validity();
        let lasts = validity
            .not_after
            .duration_since(validity.not_before)
            .unwrap();
        assert_eq!(lasts, expected + BACK_DATE, "{days}");
        // A node that is cut off at any moment has at least so much left, as long as that is within the bounds.
        let left = validity.remaining(validity.renew_at());
        let limit = DAY * days;
        assert!(days > 365 || left >= limit, "{days}: {left:?}");
        let removed = lab
            .admin()
            .await
            .remove_node(RemoveNodeRequest { name })
            .await;
        let until = removed.unwrap().into_inner().address_rests_until_unix_s;
        let now = now().duration_since(UNIX_EPOCH).unwrap();
        let rests = Duration::from_secs(until.unsigned_abs()) - now;
        assert!(
            rests <= expected && rests > expected - DAY,
            "{days}: {rests:?}"
        );
    }
}

#[tokio::test]
async fn a_certificate_of_another_mesh_opens_nothing() {
    let lab = Lab::start(&[]);
    let ours = lab.node("a", 1).await;
    let theirs = CertificateAuthority::generate("demo", now()).unwrap();
    let key = new_key().unwrap();
    let validity = Validity::from_now(now(), NODE_LIFETIME_MIN);
    let forged = theirs
        .issue(ours.identity(), &key.csr_der, validity)
        .unwrap();

    // It even trusts our authority, so that the server must be the one to refuse.
    let mut config = client_config(&ours, ALPN).unwrap();
    let private = PrivateKeyDer::from_pem_slice(key.key_pem.as_bytes()).unwrap();
    let certified = CertifiedKey::from_der(vec![forged.clone()], private, &default_provider());
    config.client_auth_cert_resolver = Arc::new(SingleCertAndKey::from(certified.unwrap()));
    // In TLS 1.3 the client may learn of the refusal only when it asks for something.
    if let Ok(mut client) = lab.connect(config).await {
        let asked = client.sync(tokio_stream::once(SyncRequest::default()));
        asked.await.map(drop).unwrap_err();
    }
    lab.logged("not from this mesh's authority").await;

    let foreign =
        Credentials::from_parts(vec![forged], &key.key_pem, theirs.certificate_der().clone());
    let config = client_config(&foreign.unwrap(), ALPN).unwrap();
    let error = lab.connect(config).await.unwrap_err().to_string();
    assert!(error.contains("not from this mesh's authority"), "{error}");

    let pinned = join_client_config(MeshId([9; 32]), ALPN).unwrap();
    let error = lab.connect(pinned).await.unwrap_err();
    assert!(matches!(error, ConnectError::Tls { .. }));
    assert!(
        error
            .to_string()
            .contains("does not belong to the mesh that the token names")
    );
}

#[tokio::test]
async fn a_relay_s_files_are_whole_and_do_not_make_it_a_node() {
    let lab = Lab::start(&[]);
    let request = IssueRelayRequest {
        name: "r1".to_owned(),
    };
    let files = lab
        .admin()
        .await
        .issue_relay(request)
        .await
        .unwrap()
        .into_inner();
    let relay =
        Credentials::from_pem(&files.certificate_pem, &files.key_pem, &files.ca_pem).unwrap();
    assert_eq!(relay.identity(), &Identity::Relay("r1".parse().unwrap()));
    let refused = lab.sync(&relay, None).await.err().unwrap();
    assert_eq!(refused.code(), Code::PermissionDenied);
}
