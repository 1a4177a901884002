//! What is told of objects in Events: what became of Holdfast's own, where their status is about to say something new, and
//! what is left out of others, which have no status of ours. Pure.

use serde_json::Value;

use super::AWAITING_APPROVAL;
use crate::{
    cluster::Item,
    manifests::{Kind, ObjectId},
};

/// Longest note of an Event (`events.k8s.io/v1`).
pub(super) const NOTE_LEN_MAX: usize = 1024;

/// The same is told of the same object once within so long, for which API servers keep Events unless they are told
/// otherwise: what comes and goes all day is one Event an hour.
const AGAIN_S: i64 = 3600;

/// Whether somebody should look, why in one word, and for people.
type Told = (bool, &'static str, String);

/// Something to tell people about an object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// Which.
    pub id: ObjectId,
    /// `metadata.uid`.
    pub uid: String,
    /// Whether somebody should look.
    pub is_warning: bool,
    /// Why, in one word.
    pub reason: &'static str,
    /// Why, for people.
    pub note: String,
    /// In which [`AGAIN_S`] it came about; `None`: it holds as long as the object is as it is.
    pub period: Option<i64>,
}

impl Event {
    /// That the mesh does not act on all of `item`, which is not Holdfast's.
    pub(super) fn left_out(item: &Item, text: &str) -> Self {
        let reason = if item.id.kind == Kind::NetworkPolicy {
            "PolicyNotEnforced"
        } else {
            "NotInMesh"
        };
        Self::new(item, None, true, reason, text)
    }

    fn new(
        item: &Item,
        period: Option<i64>,
        is_warning: bool,
        reason: &'static str,
        text: &str,
    ) -> Self {
        let note = text.get(..text.floor_char_boundary(NOTE_LEN_MAX));
        Self {
            id: item.id.clone(),
            uid: item.uid.clone(),
            is_warning,
            reason,
            note: note.unwrap_or_default().to_owned(),
            period,
        }
    }
}

/// What is told when the status of `item` becomes `status`.
pub(super) fn told(item: &Item, status: &Value, now_unix_s: i64) -> Vec<Event> {
    let period = Some(now_unix_s.div_euclid(AGAIN_S));
    let event =
        |(is_warning, reason, note): Told| Event::new(item, period, is_warning, reason, &note);
    let conditions = status["conditions"].as_array().into_iter().flatten();
    let new = conditions.filter_map(|now| {
        let name = now["type"].as_str()?;
        let before = condition(&item.status, name);
        match name {
            "Accepted" => rejected(item.id.kind, before, now),
            "Joined" => joined(before, now, &item.status, status),
            "EndpointsReady" => warned(before, now, "NoEndpoint"),
            "CertificateCurrent" => certificate(before, now),
            _ => None,
        }
    });
    new.map(event).collect()
}

fn condition<'a>(status: &'a Value, name: &str) -> Option<&'a Value> {
    let conditions = status["conditions"].as_array()?;
    conditions.iter().find(|one| one["type"] == name)
}

/// An object that is changed and still not right is told anew, with what is wrong now.
fn rejected(kind: Kind, before: Option<&Value>, now: &Value) -> Option<Told> {
    let same = |before: &Value| {
        ["status", "reason", "message"]
            .iter()
            .all(|name| before[name] == now[name])
    };
    if now["status"] != "False" || before.is_some_and(same) {
        return None;
    }
    let reason = match (kind, now["reason"].as_str()) {
        (Kind::MeshPolicy, _) => "PolicyNotEnforced",
        (_, Some("Conflict")) => "Conflict",
        (_, _) => "Invalid",
    };
    Some((true, reason, text(now)))
}

fn joined(before: Option<&Value>, now: &Value, had: &Value, has: &Value) -> Option<Told> {
    let had_key = had["wireguardPublicKey"].as_str();
    let key = has["wireguardPublicKey"].as_str();
    if now["status"] == "True" {
        let key = key?;
        return match had_key {
            Some(had_key) if had_key != key => {
                let note = format!(
                    "it joined again with key {key}; {had_key}, its key before, counts no more"
                );
                Some((false, "Rejoined", note))
            }
            // A MeshNode of before this was told has a key, and one that waits with another key has its old one.
            Some(_) => None,
            None => Some((false, "Joined", format!("it joined with key {key}"))),
        };
    }
    if before.is_some_and(|before| before["reason"] == now["reason"]) {
        return None;
    }
    match now["reason"].as_str() {
        Some(AWAITING_APPROVAL) => Some((true, AWAITING_APPROVAL, text(now))),
        Some("Removed") => {
            let note = format!("{}: its key and its certificate count no more", text(now));
            Some((false, "Removed", note))
        }
        _ => None,
    }
}

fn certificate(before: Option<&Value>, now: &Value) -> Option<Told> {
    let was_late = before.is_some_and(|before| before["status"] == "False");
    if was_late && now["status"] == "True" {
        let note = "its certificate was renewed, late".to_owned();
        return Some((false, "Renewed", note));
    }
    warned(before, now, "RenewalOverdue").or_else(|| warned(before, now, "Expired"))
}

/// If the condition is for this reason now, and was not.
fn warned(before: Option<&Value>, now: &Value, reason: &'static str) -> Option<Told> {
    let new = before.is_none_or(|before| before["reason"] != reason);
    (new && now["reason"] == reason).then(|| (true, reason, text(now)))
}

fn text(condition: &Value) -> String {
    condition["message"].as_str().unwrap_or_default().to_owned()
}
