use rustls::{ClientConnection, ServerConnection};

use super::*;
use crate::{
    authority::{CertificateAuthority, new_key},
    certificate::{NODE_LIFETIME_MIN, peer_identity},
};

const ALPN: &[&[u8]] = &[b"h2"];

#[test]
fn a_node_and_a_relay_of_one_mesh_know_each_other() {
    let mesh = mesh("demo");
    let (server, client) = (credentials(&mesh, relay()), credentials(&mesh, node()));
    let seen = shake(
        server_config(&server, ClientAuth::Required, ALPN),
        client_config(&client, ALPN),
        &relay(),
    );
    assert_eq!(seen, Ok(("demo".to_owned(), node())));
}

#[test]
fn a_certificate_of_another_mesh_is_refused_by_both_sides() {
    let (ours, theirs) = (mesh("demo"), mesh("demo"));
    let server = credentials(&ours, relay());
    let client = credentials(&theirs, node());
    let server = server_config(&server, ClientAuth::Required, ALPN);
    let stranger = client_config(&client, ALPN);
    let error = shake(server, stranger, &relay()).unwrap_err();
    assert!(error.contains("not from this mesh's authority"), "{error}");
}

#[test]
fn a_server_wants_the_client_s_certificate_from_its_own_mesh() {
    let (ours, theirs) = (mesh("demo"), mesh("demo"));
    let server = credentials(&ours, relay());
    // The stranger trusts us, but its own certificate is from elsewhere.
    let mut roots_ours = client_config(&credentials(&ours, node()), ALPN).unwrap();
    let stranger = credentials(&theirs, node());
    roots_ours.client_auth_cert_resolver =
        Arc::new(SingleCertAndKey::from(stranger.certified().clone()));
    let server = server_config(&server, ClientAuth::Optional, ALPN);
    let error = shake(server, Ok(roots_ours), &relay()).unwrap_err();
    assert!(error.contains("not from this mesh's authority"), "{error}");
}

#[test]
fn a_relay_s_certificate_does_not_pass_for_the_controller_s() {
    let mesh = mesh("demo");
    let server = credentials(&mesh, relay());
    let error = shake(
        server_config(&server, ClientAuth::Optional, ALPN),
        client_config(&credentials(&mesh, node()), ALPN),
        &Identity::Controller,
    );
    assert!(error.unwrap_err().contains("controller.demo"));
}

#[test]
fn a_token_s_holder_joins_only_the_mesh_it_names() {
    let (ours, theirs) = (mesh("demo"), mesh("demo"));
    let controller = credentials(&ours, Identity::Controller);
    let join = |mesh: MeshId| {
        let server = server_config(&controller, ClientAuth::Optional, ALPN);
        shake(
            server,
            join_client_config(mesh, ALPN),
            &Identity::Controller,
        )
    };
    assert_eq!(
        join(ours.mesh_id()).unwrap_err(),
        "no certificate was shown"
    );
    let error = join(theirs.mesh_id()).unwrap_err();
    assert!(error.contains("does not belong to the mesh"), "{error}");
}

#[test]
fn a_clock_that_fell_back_to_1970_does_not_keep_anybody_out() {
    let mesh = mesh("demo");
    let (server, client) = (credentials(&mesh, relay()), credentials(&mesh, node()));
    let seen = shake(
        server_config_at(&server, ClientAuth::Required, ALPN, || UNIX_EPOCH),
        client_config_at(&client, ALPN, || UNIX_EPOCH),
        &relay(),
    );
    assert_eq!(seen, Ok(("demo".to_owned(), node())));
}

#[test]
fn a_clock_ten_years_ahead_is_named_in_the_error() {
    fn ahead() -> SystemTime {
        SystemTime::now() + Duration::from_secs(10 * 365 * 86_400)
    }
    let mesh = mesh("demo");
    let (server, client) = (credentials(&mesh, relay()), credentials(&mesh, node()));
    let error = shake(
        server_config(&server, ClientAuth::Required, ALPN),
        client_config_at(&client, ALPN, ahead),
        &relay(),
    )
    .unwrap_err();
    assert!(error.contains("certificate expired on"), "{error}");
    assert!(error.contains("this machine's clock says"), "{error}");
}

#[test]
fn credentials_read_back_and_say_what_is_wrong() {
    let ours = mesh("demo");
    let held = credentials(&ours, node());
    let (chain, key, authority) = (held.chain_pem(), held.key_pem(), held.authority_pem());
    let read = Credentials::from_pem(&chain, &key, &authority).unwrap();
    assert_eq!((read.identity(), read.mesh_id()), (&node(), ours.mesh_id()));

    let other_key = new_key().unwrap().key_pem;
    let other_mesh = mesh("demo").certificate_pem();
    let cases = [
        (
            "",
            key.as_str(),
            authority.as_str(),
            "the certificate: no PEM",
        ),
        (&chain, "nonsense", &authority, "the private key:"),
        (&chain, &other_key, &authority, "does not belong"),
        (&chain, &key, &other_mesh, "not issued by this CA"),
        (&authority, &key, &authority, "not a Holdfast identity"),
    ];
    for (chain, key, authority, expected) in cases {
        let error = Credentials::from_pem(chain, key, authority).unwrap_err();
        assert!(error.to_string().contains(expected), "{error}");
    }
}

#[test]
fn the_authority_reads_back_and_signs_the_same_mesh() {
    let made = mesh("demo");
    let read = CertificateAuthority::from_pem(&made.certificate_pem(), &made.key_pem()).unwrap();
    let signature = read.sign_record(b"record").unwrap();
    let authority = made.certificate_der();
    assert_eq!(read.mesh_id(), made.mesh_id());
    assert!(crate::record::verify_record(authority, b"record", &signature).is_ok());
    assert!(crate::record::verify_record(authority, b"Record", &signature).is_err());
    let other = mesh("demo").key_pem();
    let mixed = CertificateAuthority::from_pem(&made.certificate_pem(), &other).unwrap_err();
    assert!(mixed.to_string().contains("does not belong"), "{mixed}");
}

#[test]
fn a_certificate_is_renewed_at_half_of_its_life() {
    let held = credentials(&mesh("demo"), node());
    let validity = held.validity();
    let left = validity.remaining(validity.renew_at());
    let half = (NODE_LIFETIME_MIN + crate::certificate::BACK_DATE) / 2;
    assert_eq!(left, half);
}

fn mesh(trust_domain: &str) -> CertificateAuthority {
    CertificateAuthority::generate(trust_domain, SystemTime::now()).unwrap()
}

fn node() -> Identity {
    Identity::Node {
        name: "edge-a1".parse().unwrap(),
        id: mesh_wire::id::NodeId([5; 32]),
    }
}

fn relay() -> Identity {
    Identity::Relay("r1".parse().unwrap())
}

fn credentials(mesh: &CertificateAuthority, identity: Identity) -> Credentials {
    let key = new_key().unwrap();
    let validity = Validity::from_now(SystemTime::now(), NODE_LIFETIME_MIN);
    let certificate = mesh.issue(&identity, &key.csr_der, validity).unwrap();
    let authority = mesh.certificate_der().clone();
    Credentials::from_parts(vec![certificate], &key.key_pem, authority).unwrap()
}

/// A handshake in memory: whom the server saw, or the first error of either side.
fn shake(
    server: Result<ServerConfig, Error>,
    client: Result<ClientConfig, Error>,
    expected: &Identity,
) -> Result<(String, Identity), String> {
    let name = server_name("demo", expected).unwrap();
    let mut client = ClientConnection::new(Arc::new(client.unwrap()), name).unwrap();
    let mut server = ServerConnection::new(Arc::new(server.unwrap())).unwrap();
    let mut wire = Vec::new();
    while client.is_handshaking() || server.is_handshaking() {
        wire.clear();
        client.write_tls(&mut wire).unwrap();
        server.read_tls(&mut wire.as_slice()).unwrap();
        server
            .process_new_packets()
            .map_err(|error| explain(&error))?;
        wire.clear();
        server.write_tls(&mut wire).unwrap();
        client.read_tls(&mut wire.as_slice()).unwrap();
        client
            .process_new_packets()
            .map_err(|error| explain(&error))?;
    }
    let shown = server.peer_certificates().unwrap_or_default();
    peer_identity(shown).map_err(|error| error.to_string())
}
