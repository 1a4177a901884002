//! Join tokens as the controller keeps them, and who may join with one.

use mesh_identity::certificate::Moment;
use mesh_wire::id::{NodeId, NodeName};
use serde::{Deserialize, Serialize};
use std::time::{Duration, UNIX_EPOCH};

/// Most tokens at once: at 300 bytes each, 3 MB.
pub const TOKENS_MAX: usize = 10_000;

/// Most uses of one token.
pub const USES_MAX: u32 = 10_000;

/// How long a token is valid if nothing is said: time enough to carry it to a machine.
pub const DEFAULT_TTL_S: u64 = 3600;

/// Longest validity: 90 days, for machines that are shipped with one.
pub const TTL_S_MAX: u64 = 90 * 86_400;

/// How long an expired token is remembered, so that "expired" can be told from "unknown".
pub const REMEMBER_S: i64 = 7 * 86_400;

/// A token as it is kept: without its secret.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenRecord {
    /// SHA-256 of the secret. 192 random bits need no slow hash.
    pub secret_hash: [u8; 32],
    /// What the operator wrote about it.
    pub description: String,
    /// From then on it is expired.
    pub expires_unix_s: i64,
    /// How many nodes may still join with it.
    pub uses_left: u32,
    /// Only this node may use it.
    pub node: Option<String>,
    /// Nodes that joined with it: each may do so again with the same key, for example because
    /// the answer got lost, without another use.
    pub used_by: Vec<String>,
}

/// Who wants to join.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Applicant {
    /// The name it wants.
    pub name: NodeName,
    /// Its WireGuard key.
    pub id: NodeId,
    /// SHA-256 of the secret it showed.
    pub secret_hash: [u8; 32],
}

/// Why a node may not join.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// There is no such token, or its secret is another.
    #[error(
        "token refused: this controller knows no such token (mistyped, revoked, or of another controller)"
    )]
    Unknown,
    /// Its time is over.
    #[error("token refused: it expired on {}; make another with `meshctl token create`", moment(*.0))]
    Expired(i64),
    /// All its uses are used.
    #[error("token refused: it is used up; make another with `meshctl token create`")]
    UsedUp,
    /// It was made for another node.
    #[error("token refused: it was made for node {0} only")]
    OtherNode(String),
    /// The name belongs to a node with another key.
    #[error(
        "node name {0} is taken by a node with another key; to replace that one, use a token made for it (`meshctl token create --node {0}`)"
    )]
    NameTaken(NodeName),
    /// The key belongs to a node with another name.
    #[error("this WireGuard key belongs to node {0} already")]
    KeyTaken(NodeName),
}

impl TokenRecord {
    /// Decides whether `applicant` may join with this token at `now`, and takes one use if that
    /// needs one. `registered` is the key that its name has now.
    ///
    /// # Errors
    ///
    /// [`Refusal`]; the record is then as before.
    pub fn admit(
        &mut self,
        applicant: &Applicant,
        registered: Option<NodeId>,
        now_unix_s: i64,
    ) -> Result<(), Refusal> {
        // Two hashes are compared: how long that takes tells nothing about the secret.
        if self.secret_hash != applicant.secret_hash {
            return Err(Refusal::Unknown);
        }
        if now_unix_s >= self.expires_unix_s {
            return Err(Refusal::Expired(self.expires_unix_s));
        }
        let name = applicant.name.as_str();
        let bound = self.node.as_deref();
        if let Some(node) = bound.filter(|&node| node != name) {
            return Err(Refusal::OtherNode(node.to_owned()));
        }
        let again = registered == Some(applicant.id);
        if again && self.used_by.iter().any(|used| used == name) {
            return Ok(());
        }
        if self.uses_left == 0 {
            return Err(Refusal::UsedUp);
        }
        if registered.is_some() && !again && bound.is_none() {
            return Err(Refusal::NameTaken(applicant.name.clone()));
        }
        self.uses_left -= 1;
        self.used_by.push(name.to_owned());
        Ok(())
    }
}

fn moment(unix_s: i64) -> Moment {
    let seconds = u64::try_from(unix_s).unwrap_or(0);
    Moment(UNIX_EPOCH + Duration::from_secs(seconds))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_refusal_is_told_apart() {
        let (key, other) = (NodeId([1; 32]), NodeId([2; 32]));
        let refusal = |change: &dyn Fn(&mut TokenRecord, &mut Applicant), registered, now| {
            let (mut token, mut applicant) = (token(), applicant(key));
            change(&mut token, &mut applicant);
            token.admit(&applicant, registered, now).err()
        };
        let nothing = |_: &mut TokenRecord, _: &mut Applicant| {};
        assert_eq!(refusal(&nothing, None, 99), None);
        assert_eq!(refusal(&nothing, None, 100), Some(Refusal::Expired(100)));
        assert_eq!(
            refusal(&|_, applicant| applicant.secret_hash = [0; 32], None, 0),
            Some(Refusal::Unknown)
        );
        assert_eq!(
            refusal(&|token, _| token.uses_left = 0, None, 0),
            Some(Refusal::UsedUp)
        );
        assert_eq!(
            refusal(&|token, _| token.node = Some("b".to_owned()), None, 0),
            Some(Refusal::OtherNode("b".to_owned()))
        );
        let taken = Refusal::NameTaken("a".parse().unwrap());
        assert_eq!(refusal(&nothing, Some(other), 0), Some(taken));
        let bound = |token: &mut TokenRecord, _: &mut Applicant| token.node = Some("a".to_owned());
        assert_eq!(refusal(&bound, Some(other), 0), None);
    }

    #[test]
    fn joining_again_with_the_same_key_costs_no_second_use() {
        let mut token = token();
        let applicant = applicant(NodeId([1; 32]));
        assert_eq!(token.admit(&applicant, None, 0), Ok(()));
        assert_eq!(token.uses_left, 0);
        assert_eq!(token.admit(&applicant, Some(applicant.id), 0), Ok(()));
    }

    fn token() -> TokenRecord {
        TokenRecord {
            secret_hash: [7; 32],
            description: String::new(),
            expires_unix_s: 100,
            uses_left: 1,
            node: None,
            used_by: Vec::new(),
        }
    }

    fn applicant(id: NodeId) -> Applicant {
        Applicant {
            name: "a".parse().unwrap(),
            id,
            secret_hash: [7; 32],
        }
    }
}
