//! Whether this node goes on without a controller, also after a restart.

use mesh_api::admin::{FactsResponse, SlotReport};

use super::{Check, Outcome};
use crate::{
    report::{Peer, Status},
    snapshot::NOT_WRITTEN,
    table::duration,
};

/// The next renewal is due long before.
const CERTIFICATE_SOON_S: i64 = 7 * 86_400;

/// A snapshot of a large mesh, twice, and a certificate.
const DISK_SHORT_BYTES: u64 = 64 << 20;

/// What the agent says.
pub(super) struct Known<'a> {
    pub(super) status: &'a Status,
    pub(super) slots: &'a [SlotReport],
    pub(super) age_s: u64,
    pub(super) facts: &'a FactsResponse,
    pub(super) peers: &'a [Peer],
    pub(super) now_unix_s: i64,
}

/// A line for each thing that the time without a controller needs; `name`: what this node's own listener says of its name.
pub(super) fn judge(known: &Known<'_>, name: Check) -> Vec<Check> {
    let names = Check {
        what: "names",
        ..name
    };
    vec![
        snapshot(known),
        certificate(known),
        disk(known),
        names,
        services(known),
        neighbours(known),
    ]
}

fn snapshot(known: &Known<'_>) -> Check {
    let usable = known.slots.iter().filter(|slot| slot.damage.is_empty());
    let usable = usable.count();
    let mut slots = known.slots.iter();
    let damaged = slots.any(|slot| !slot.damage.is_empty() && slot.damage != NOT_WRITTEN);
    let age = duration(known.age_s);
    let (verdict, text) = if usable == 0 {
        let text = "no slot can be used: a restart without a controller has nothing to begin with: `meshctl snapshot verify`";
        (Outcome::Failed, text.to_owned())
    } else if damaged {
        let text =
            format!("a slot is damaged: `meshctl snapshot verify`; the state served is {age} old");
        (Outcome::Warning, text)
    } else {
        let generation = known.status.snapshot.generation;
        let text = format!("generation {generation}, {age} old, {usable} slots can be used");
        (Outcome::Ok, text)
    };
    Check::new("snapshot", known.status.node.clone(), verdict, text)
}

fn certificate(known: &Known<'_>) -> Check {
    let check = |verdict, text| Check::new("certificate", known.status.node.clone(), verdict, text);
    let Some(expires) = known.status.certificate_expires_unix_s else {
        return check(Outcome::Untried, "its end is not known".to_owned());
    };
    let left = expires - known.now_unix_s;
    let shown = duration(left.unsigned_abs());
    if left <= 0 {
        let text = format!("ended {shown} ago: relays let the node in no more");
        check(Outcome::Failed, text)
    } else if left < CERTIFICATE_SOON_S {
        let text = format!("ends in {shown}, and only a controller renews it");
        check(Outcome::Warning, text)
    } else {
        check(Outcome::Ok, format!("good for {shown}"))
    }
}

fn disk(known: &Known<'_>) -> Check {
    let folder = &known.facts.state_dir;
    let (verdict, text) = match known.facts.state_free_bytes {
        None => (Outcome::Untried, "the file system does not say".to_owned()),
        Some(free) if free < DISK_SHORT_BYTES => (
            Outcome::Warning,
            format!(
                "{} MiB are free: what neighbours give may not be kept",
                free >> 20
            ),
        ),
        Some(free) => (Outcome::Ok, format!("{} MiB are free", free >> 20)),
    };
    Check::new("disk", folder.clone(), verdict, text)
}

fn services(known: &Known<'_>) -> Check {
    let (verdict, text) = match &known.status.services_unkept {
        Some(why) => (Outcome::Warning, format!("they end with the agent: {why}")),
        None => (
            Outcome::Ok,
            format!(
                "{} are balanced by this node alone, also while the agent restarts",
                known.status.snapshot.services
            ),
        ),
    };
    Check::new("services", known.status.node.clone(), verdict, text)
}

/// Whom the node still speaks with when relays are gone, too.
fn neighbours(known: &Known<'_>) -> Check {
    let direct = known.peers.iter().filter(|peer| peer.state == "direct");
    let relayed = known.peers.iter().filter(|peer| peer.state == "relayed");
    let (direct, relayed) = (direct.count(), relayed.count());
    let heard = known.status.lan_announcements.get("believed");
    let text = format!(
        "{direct} peers are reached directly, {relayed} by a relay; {} announcements of neighbours were believed",
        heard.copied().unwrap_or_default()
    );
    let verdict = match (direct, relayed) {
        (0, 1..) => Outcome::Warning,
        _ => Outcome::Ok,
    };
    Check::new("neighbours", known.status.node.clone(), verdict, text)
}
