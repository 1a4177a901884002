//! Who a client is: certificates, and tokens of service accounts.

use std::sync::Arc;

use anyhow::{Context as _, Result};
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};
use ring::{
    rand::SystemRandom,
    signature::{self, EcdsaKeyPair, KeyPair as _},
};
use serde_json::{Value, json};
use tokio_rustls::rustls::{
    RootCertStore, ServerConfig,
    crypto::ring::default_provider,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
    server::WebPkiClientVerifier,
};
use x509_parser::prelude::{FromDer as _, X509Certificate};

use super::{
    object,
    rbac::{MASTERS, User},
    store::Store,
};

/// Audience of tokens that are for the server itself, and who signed them.
pub(crate) const ISSUER: &str = "https://kubernetes.default.svc.cluster.local";

pub(crate) const SERVICE_ACCOUNTS: &str = "/serviceaccounts";

/// The server's own authority, and what it made at the start.
pub(crate) struct Authority {
    pub(crate) ca_pem: String,
    pub(crate) admin_cert_pem: String,
    pub(crate) admin_key_pem: String,
    /// By which it is known to kubelets.
    pub(crate) kubelet_client: Issued,
    pub(crate) admin_token: String,
    issuer: Issuer<'static, KeyPair>,
    server: Arc<ServerConfig>,
    signer: EcdsaKeyPair,
    random: SystemRandom,
}

/// A certificate of the server's authority, with its key, both as PEM.
#[derive(Clone)]
pub struct Issued {
    /// The certificate.
    pub certificate_pem: String,
    /// Its key.
    pub key_pem: String,
}

impl std::fmt::Debug for Issued {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Issued").finish_non_exhaustive()
    }
}

fn serving(issuer: &Issuer<'_, KeyPair>, common_name: &str, names: &[&str]) -> Result<Issued> {
    let names: Vec<_> = names.iter().map(|&name| name.to_owned()).collect();
    let mut params = CertificateParams::new(names)?;
    let subject = &mut params.distinguished_name;
    subject.push(DnType::CommonName, common_name);
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    issue(issuer, &params)
}

fn client(issuer: &Issuer<'_, KeyPair>, user: &str, group: &str) -> Result<Issued> {
    let mut params = CertificateParams::default();
    let subject = &mut params.distinguished_name;
    subject.push(DnType::CommonName, user);
    subject.push(DnType::OrganizationName, group);
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
    issue(issuer, &params)
}

fn issue(issuer: &Issuer<'_, KeyPair>, params: &CertificateParams) -> Result<Issued> {
    let key = KeyPair::generate()?;
    Ok(Issued {
        certificate_pem: params.signed_by(&key, issuer)?.pem(),
        key_pem: key.serialize_pem(),
    })
}

impl std::fmt::Debug for Authority {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Authority").finish_non_exhaustive()
    }
}

impl Authority {
    /// Makes an authority, the server's certificate and the administrator's.
    ///
    /// # Errors
    ///
    /// Only if the machine has no randomness.
    pub(crate) fn new() -> Result<Self> {
        let ca_key = KeyPair::generate()?;
        let mut ca = CertificateParams::default();
        ca.distinguished_name
            .push(DnType::CommonName, "kube-standin");
        ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        ca.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let ca_pem = ca.self_signed(&ca_key)?.pem();
        let issuer = Issuer::new(ca, ca_key);

        let names = ["127.0.0.1", "::1", "localhost", "kubernetes.default.svc"];
        let server = serving(&issuer, "kube-apiserver", &names)?;
        let admin = client(&issuer, "kubernetes-admin", MASTERS)?;
        // As kubeadm names it.
        let kubelet_client = client(
            &issuer,
            "kube-apiserver-kubelet-client",
            "kubeadm:cluster-admins",
        )?;

        let random = SystemRandom::new();
        let algorithm = &signature::ECDSA_P256_SHA256_FIXED_SIGNING;
        let pkcs8 = EcdsaKeyPair::generate_pkcs8(algorithm, &random)
            .ok()
            .context("make a key for tokens")?;
        let signer = EcdsaKeyPair::from_pkcs8(algorithm, pkcs8.as_ref(), &random)
            .ok()
            .context("read the key for tokens")?;
        Ok(Self {
            server: server_config(
                &ca_pem,
                CertificateDer::from_pem_slice(server.certificate_pem.as_bytes())?,
                PrivateKeyDer::from_pem_slice(server.key_pem.as_bytes())?,
            )?,
            ca_pem,
            admin_cert_pem: admin.certificate_pem,
            admin_key_pem: admin.key_pem,
            kubelet_client,
            admin_token: random_text(&random)?,
            issuer,
            signer,
            random,
        })
    }

    /// A certificate with which a server shows that it has these names (DNS names and addresses).
    ///
    /// # Errors
    ///
    /// If a name is none.
    pub(crate) fn serving(&self, common_name: &str, names: &[&str]) -> Result<Issued> {
        serving(&self.issuer, common_name, names)
    }

    /// A certificate with which a client shows that it is this user, of this group.
    ///
    /// # Errors
    ///
    /// Only if the machine has no randomness.
    pub(crate) fn client(&self, user: &str, group: &str) -> Result<Issued> {
        client(&self.issuer, user, group)
    }

    pub(crate) fn server_config(&self) -> Arc<ServerConfig> {
        Arc::clone(&self.server)
    }

    /// The user of a client certificate: its common name, and its organizations as groups.
    pub(crate) fn user_of_certificate(certificate: &[u8]) -> Option<User> {
        let (_, certificate) = X509Certificate::from_der(certificate).ok()?;
        let subject = certificate.subject();
        let text = |attribute: &x509_parser::x509::AttributeTypeAndValue<'_>| {
            attribute.as_str().ok().map(str::to_owned)
        };
        let mut groups: Vec<_> = subject.iter_organization().filter_map(text).collect();
        groups.push("system:authenticated".to_owned());
        let name = subject.iter_common_name().find_map(text)?;
        Some(User {
            name,
            groups,
            ..User::default()
        })
    }

    /// Signs what a token says.
    pub(crate) fn sign(&self, claims: &Value) -> Result<String> {
        let part = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
        let header = part(&json!({"alg": "ES256", "kid": "kube-standin"}));
        let body = format!("{header}.{}", part(claims));
        let signature = self.signer.sign(&self.random, body.as_bytes());
        let signature = signature.ok().context("sign a token")?;
        Ok(format!("{body}.{}", URL_SAFE_NO_PAD.encode(signature)))
    }

    /// What a token says, if this server signed it.
    fn claims(&self, token: &str) -> Option<Value> {
        let (body, signature) = token.rsplit_once('.')?;
        let (_, payload) = body.split_once('.')?;
        let key = signature::UnparsedPublicKey::new(
            &signature::ECDSA_P256_SHA256_FIXED,
            self.signer.public_key().as_ref(),
        );
        let signature = URL_SAFE_NO_PAD.decode(signature).ok()?;
        key.verify(body.as_bytes(), &signature).ok()?;
        serde_json::from_slice(&URL_SAFE_NO_PAD.decode(payload).ok()?).ok()
    }

    /// The user of a token that is for one of `audiences`, and which of them it is for.
    ///
    /// # Errors
    ///
    /// A sentence that says what is wrong with the token.
    pub(crate) fn user_of_token(
        &self,
        store: &Store,
        token: &str,
        audiences: &[&str],
        now_s: i64,
    ) -> Result<(User, Vec<String>), &'static str> {
        if token == self.admin_token {
            let groups = [MASTERS, "system:authenticated"]
                .map(str::to_owned)
                .to_vec();
            let user = User {
                name: "kubernetes-admin".to_owned(),
                groups,
                ..User::default()
            };
            let audiences = audiences.iter().map(|one| (*one).to_owned()).collect();
            return Ok((user, audiences));
        }
        let claims = self.claims(token).ok_or("invalid bearer token")?;
        let seconds = |key: &str| claims.get(key).and_then(Value::as_i64).unwrap_or(0);
        if now_s >= seconds("exp") {
            return Err("service account token has expired");
        }
        let shared: Vec<_> = object::texts(&claims, &["aud"])
            .into_iter()
            .filter(|one| audiences.contains(one))
            .map(str::to_owned)
            .collect();
        if shared.is_empty() {
            return Err("token audiences is invalid for the target audiences");
        }
        let user = bound_user(store, &claims)?;
        Ok((user, shared))
    }
}

fn random_text(random: &SystemRandom) -> Result<String> {
    let bytes: [u8; 24] = ring::rand::generate(random)
        .ok()
        .context("randomness")?
        .expose();
    Ok(URL_SAFE_NO_PAD.encode(bytes))
}

fn server_config(
    ca_pem: &str,
    cert: CertificateDer<'static>,
    key: PrivateKeyDer<'static>,
) -> Result<Arc<ServerConfig>> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(ca_pem.as_bytes())?)?;
    let provider = Arc::new(default_provider());
    let clients =
        WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider))
            .allow_unauthenticated()
            .build()?;
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_client_cert_verifier(clients)
        .with_single_cert(vec![cert], key)?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}

/// What holds a token: its account, and the pod and node it is bound to; all must still be there.
const BOUND: &[(&str, &str, &str)] = &[
    (
        "serviceaccount",
        SERVICE_ACCOUNTS,
        "service account UID claim does not match",
    ),
    ("pod", "/pods", "pod UID does not match or the pod is gone"),
    (
        "secret",
        "/secrets",
        "secret UID does not match or the secret is gone",
    ),
    (
        "node",
        "/nodes",
        "node UID does not match or the node is gone",
    ),
];

fn bound_user(store: &Store, claims: &Value) -> Result<User, &'static str> {
    let claim = |path: &[&str]| {
        let path: Vec<_> = ["kubernetes.io"].iter().chain(path).copied().collect();
        object::text(claims, &path).unwrap_or_default()
    };
    let namespace = claim(&["namespace"]);
    let account = claim(&["serviceaccount", "name"]);
    let mut extra = std::collections::BTreeMap::new();
    let id = object::text(claims, &["jti"]).unwrap_or_default();
    extra.insert(
        "authentication.kubernetes.io/credential-id".to_owned(),
        vec![format!("JTI={id}")],
    );
    for (kind, resource, wrong) in BOUND {
        let (name, uid) = (claim(&[kind, "name"]), claim(&[kind, "uid"]));
        if name.is_empty() {
            continue;
        }
        let namespace = if *kind == "node" { "" } else { namespace };
        let found = store.get(resource, namespace, name).ok_or(*wrong)?;
        // A pod's node is told, and not checked: it may be gone before the pod.
        let is_bound = *kind != "node" || claim(&["pod", "name"]).is_empty();
        if is_bound && object::uid(&found.value()) != uid {
            return Err(wrong);
        }
        if *kind == "pod" || *kind == "node" {
            let key = |what: &str| format!("authentication.kubernetes.io/{kind}-{what}");
            extra.insert(key("name"), vec![name.to_owned()]);
            extra.insert(key("uid"), vec![uid.to_owned()]);
        }
    }
    Ok(User {
        name: format!("system:serviceaccount:{namespace}:{account}"),
        uid: claim(&["serviceaccount", "uid"]).to_owned(),
        groups: vec![
            "system:serviceaccounts".to_owned(),
            format!("system:serviceaccounts:{namespace}"),
            "system:authenticated".to_owned(),
        ],
        extra,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn store() -> Store {
        let mut store = Store::default();
        let object = |name: &str| json!({"metadata": {"name": name, "namespace": "n", "uid": format!("uid-{name}")}});
        store.put(SERVICE_ACCOUNTS, object("sa"));
        store.put("/pods", object("p"));
        store
    }

    fn claims() -> Value {
        json!({
            "aud": ["a", "b"], "exp": 100, "jti": "1",
            "kubernetes.io": {
                "namespace": "n", "serviceaccount": {"name": "sa", "uid": "uid-sa"},
                "pod": {"name": "p", "uid": "uid-p"},
            },
        })
    }

    #[test]
    fn a_token_says_who_and_what_for() {
        let authority = Authority::new().unwrap();
        let token = authority.sign(&claims()).unwrap();
        let (user, audiences) = authority
            .user_of_token(&store(), &token, &["b", "c"], 99)
            .unwrap();
        assert_eq!(user.name, "system:serviceaccount:n:sa");
        assert_eq!(audiences, ["b"]);
        assert_eq!(user.extra["authentication.kubernetes.io/pod-name"], ["p"]);
    }

    #[test]
    fn tokens_that_no_longer_hold_are_refused() {
        let authority = Authority::new().unwrap();
        let token = authority.sign(&claims()).unwrap();
        let check = |store: &Store, token: &str, audience: &str, now_s: i64| {
            authority
                .user_of_token(store, token, &[audience], now_s)
                .is_err()
        };
        assert!(check(&store(), &token, "a", 100), "expired");
        assert!(check(&store(), &token, "c", 1), "for others");
        assert!(check(&store(), &format!("{token}x"), "a", 1), "changed");
        let other = Authority::new().unwrap().sign(&claims()).unwrap();
        assert!(check(&store(), &other, "a", 1), "of another server");
        let mut without_pod = store();
        without_pod.delete("/pods", "n", "p");
        assert!(check(&without_pod, &token, "a", 1), "pod gone");
        assert!(check(&Store::default(), &token, "a", 1), "account gone");
        assert!(!check(&store(), &token, "a", 1));
    }

    #[test]
    fn a_certificate_says_who() {
        let authority = Authority::new().unwrap();
        let der = CertificateDer::from_pem_slice(authority.admin_cert_pem.as_bytes()).unwrap();
        let user = Authority::user_of_certificate(&der).unwrap();
        assert_eq!(user.name, "kubernetes-admin");
        assert!(user.groups.contains(&MASTERS.to_owned()));
    }
}
