//! What the state folder has of the mesh, slot by slot, and whether its signatures hold: for who asks, and for exports. Reads
//! the disk, changes nothing.

use std::path::Path;

use mesh_api::{
    admin::{ResourceReport, SlotReport},
    control::{SnapshotFile, SyncResponse, resource_key::Kind},
    resources::{State, Trust, digest::resource_digest},
};
use mesh_core::snapshot::Generation;
use prost::Message as _;
use tokio_rustls::rustls::pki_types::CertificateDer;

use crate::store::{SlotError, Store};

/// Broken signatures that are told of one slot: the first ones say what it is about.
const PROBLEMS_MAX: usize = 20;

/// Bytes of a resource's digest that are told: by chance two of 100,000 are alike once in three billion changes.
const DIGEST_BYTES: usize = 8;

/// Every slot in `folder`, the newest first; with what is in it, if `contents`. It reads all of them and checks every
/// signature: 0.1 ms each.
#[must_use]
pub fn report(
    folder: &Path,
    authority: &CertificateDer<'static>,
    contents: bool,
) -> Vec<SlotReport> {
    let mut slots: Vec<_> = Store::slots(folder)
        .into_iter()
        .map(|(path, slot)| {
            let file = path.display().to_string();
            match slot {
                Ok((sequence, payload)) => SlotReport {
                    file,
                    sequence,
                    ..one(payload, authority, contents)
                },
                Err(error) => SlotReport {
                    file,
                    damage: match error {
                        SlotError::Absent => "not written yet".to_owned(),
                        SlotError::Read(_) | SlotError::Damaged(_) => error.to_string(),
                    },
                    ..SlotReport::default()
                },
            }
        })
        .collect();
    slots.sort_by_key(|slot| std::cmp::Reverse(slot.sequence));
    slots
}

fn one(payload: Vec<u8>, authority: &CertificateDer<'static>, contents: bool) -> SlotReport {
    let bytes = payload.len() as u64;
    let file = match SnapshotFile::decode(payload.as_slice()) {
        Ok(file) => file,
        Err(error) => {
            return SlotReport {
                damage: format!("not a snapshot of this version: {error}"),
                bytes,
                ..SlotReport::default()
            };
        }
    };
    let mut problems = Vec::new();
    let mut report = SlotReport {
        bytes,
        store_id: hex(&file.store_id),
        generation: file.generation,
        received_unix_s: file.received_unix_s,
        ..SlotReport::default()
    };
    let head = file.head.as_ref().map(|head| head.verify(authority));
    let mut state = match State::new(authority.clone()) {
        Ok(state) => state,
        Err(error) => {
            report.problems.push(error.to_string());
            return report;
        }
    };
    let all = SyncResponse {
        full: true,
        set: file.resources,
        ..SyncResponse::default()
    };
    let rejected = state.apply(all, Trust::Check);
    problems.extend(rejected.iter().map(ToString::to_string));
    match head {
        None => problems.push("it is not signed as a whole: an older controller made it, and neighbours do not take it".to_owned()),
        Some(Err(error)) => problems.push(error.to_string()),
        Some(Ok(head)) => {
            report.epoch = head.epoch;
            report.made_unix_ms = head.made_unix_ms;
            match head.check(state.resources()) {
                Ok(()) => report.signed = true,
                Err(error) => problems.push(error.to_string()),
            }
        }
    }
    if let Err(error) = state.snapshot(Generation(file.generation)) {
        problems.push(error.to_string());
    }
    problems.truncate(PROBLEMS_MAX);
    report.problems = problems;
    let resources = state.resources().iter();
    report.resources = resources
        .map(|(key, encoded)| {
            let digest = resource_digest(key, &encoded.decode());
            let digest = digest.first_chunk::<DIGEST_BYTES>();
            ResourceReport {
                kind: kind(key.kind()).to_owned(),
                name: key.name.clone(),
                digest: digest.map(|bytes| hex(bytes)).unwrap_or_default(),
            }
        })
        .collect();
    if contents {
        report.contents = payload;
    }
    report
}

/// As JSON has it.
fn kind(kind: Kind) -> &'static str {
    match kind {
        Kind::Unspecified => "unknown",
        Kind::Mesh => "mesh",
        Kind::Node => "node",
        Kind::ExternalPeer => "external_peer",
        Kind::Relay => "relay",
        Kind::Service => "service",
        Kind::Slice => "slice",
        Kind::Pod => "pod",
        Kind::Namespace => "namespace",
        Kind::NetworkPolicy => "network_policy",
        Kind::MeshPolicy => "mesh_policy",
        Kind::Community => "community",
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use std::time::UNIX_EPOCH;

    use mesh_api::{
        control::{Head, Relay, Resource, resource},
        resources::{Resources, digest::whole},
    };
    use mesh_identity::authority::CertificateAuthority;

    use super::*;

    fn relay(name: &str) -> Resource {
        let kind = resource::Kind::Relay(Relay {
            name: name.to_owned(),
            addresses: vec!["198.51.100.10".to_owned()],
            quic_port: 443,
            tls_port: 443,
            ..Relay::default()
        });
        Resource { kind: Some(kind) }
    }

    fn settings(authority: &CertificateAuthority) -> Resource {
        let id = authority.mesh_id();
        let kind = resource::Kind::Mesh(mesh_api::control::MeshSettings {
            mesh_id: id.0.to_vec(),
            trust_domain: "demo".to_owned(),
            overlay_v4: "100.96.0.0/12".to_owned(),
            cluster_domain: "cluster.local".to_owned(),
            node_domain: "mesh".to_owned(),
            mtu_bytes: 1280,
            ..mesh_api::control::MeshSettings::default()
        });
        Resource { kind: Some(kind) }
    }

    fn file(authority: &CertificateAuthority, generation: u64, relays: &[&str]) -> SnapshotFile {
        let mut resources = vec![settings(authority)];
        resources.extend(relays.iter().map(|name| relay(name)));
        let mut all = Resources::new();
        let set = resources.clone();
        let response = SyncResponse {
            set,
            ..SyncResponse::default()
        };
        assert!(mesh_api::resources::apply(&mut all, response).is_empty());
        let head = Head {
            generation,
            epoch: 1,
            made_unix_ms: 1_000,
            digest: whole(&all).to_vec(),
            ..Head::default()
        };
        SnapshotFile {
            store_id: vec![0xab; 2],
            generation,
            resources,
            head: Some(head.sign(authority).unwrap()),
            ..SnapshotFile::default()
        }
    }

    #[test]
    fn both_generations_are_told_with_what_is_in_them_and_their_signatures_hold() {
        let authority = CertificateAuthority::generate("demo", UNIX_EPOCH).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let mut store = Store::open(folder.path()).store;
        for (generation, relays) in [(1, &["r1"][..]), (2, &["r1", "r2"])] {
            let payload = file(&authority, generation, relays).encode_to_vec();
            store.write(&payload).unwrap();
        }
        let slots = report(folder.path(), authority.certificate_der(), true);
        let generations: Vec<_> = slots.iter().map(|slot| slot.generation).collect();
        assert_eq!(generations, [2, 1]);
        for slot in &slots {
            assert!(
                slot.signed && slot.problems.is_empty(),
                "{:?}",
                slot.problems
            );
            assert_eq!((slot.epoch, slot.store_id.as_str()), (1, "abab"));
            let again = SnapshotFile::decode(slot.contents.as_slice()).unwrap();
            assert_eq!(again.generation, slot.generation);
        }
        let newest = &slots[0].resources;
        let names = newest.iter().map(|one| [one.kind.as_str(), &one.name]);
        let names: Vec<_> = names.collect();
        assert_eq!(names, [["mesh", ""], ["relay", "r1"], ["relay", "r2"]]);
        assert_eq!(newest[1].digest, slots[1].resources[1].digest);
        assert_ne!(newest[1].digest, newest[2].digest);
    }

    #[test]
    fn what_was_changed_on_disk_is_told_and_so_is_another_mesh_s() {
        let authority = CertificateAuthority::generate("demo", UNIX_EPOCH).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let mut store = Store::open(folder.path()).store;
        // Whoever writes a slot by the agent's own means cannot sign what is in it.
        let mut forged = file(&authority, 1, &["r1"]);
        forged.resources.push(relay("evil"));
        store.write(&forged.encode_to_vec()).unwrap();
        let slots = report(folder.path(), authority.certificate_der(), false);
        let problem = slots[0].problems.join("; ");
        assert!(
            !slots[0].signed && problem.contains("not those"),
            "{problem}"
        );
        assert!(slots[0].contents.is_empty());
        assert_eq!(slots[1].damage, "not written yet");

        let other = CertificateAuthority::generate("other", UNIX_EPOCH).unwrap();
        let slots = report(folder.path(), other.certificate_der(), false);
        assert!(!slots[0].signed && !slots[0].problems.is_empty());

        let path = folder.path().join("snapshot.0");
        let whole = std::fs::read(&path).unwrap();
        std::fs::write(&path, &whole[..40]).unwrap();
        let slots = report(folder.path(), authority.certificate_der(), false);
        assert!(slots.iter().any(|slot| slot.damage.contains("checksum")));
    }
}
