//! What all controllers of a mesh share: its authority, its tokens, and which node has which key
//! and address. What is published follows from that and from what each of them reads by itself.
//!
//! Every change is one transaction that takes place only if what it was decided from is still so;
//! if not, it is decided anew. So two controllers never give one name, key or address to two nodes.

use std::{
    collections::BTreeSet,
    net::Ipv4Addr,
    thread,
    time::{Duration, Instant},
};

use mesh_identity::authority::CertificateAuthority;
use mesh_wire::id::{NodeId, NodeName};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::{
    store::{JoinError, Nodes, Registered, StoreError},
    token::{Applicant, REMEMBER_S, Refusal, TOKENS_MAX, TokenRecord},
};

pub mod etcd;
pub mod kubernetes;

/// Most attempts at one change. Each conflict means that another controller's change succeeded, and
/// what it did is known to the next attempt: of three that are all busy, one succeeds in three.
const ATTEMPTS_MAX: u32 = 32;

/// How long a change may take with all its attempts: a node that asks waits for no longer.
const CHANGE_TIMEOUT: Duration = Duration::from_secs(10);

/// Pause after an attempt of which nobody knows what became.
const RETRY: Duration = Duration::from_millis(100);

/// Nodes that are adopted at once: etcd takes 128 changes, and a node is three.
const ADOPT_BATCH: usize = 40;

/// Most expired tokens that are forgotten when one is made: etcd takes 128 changes at once.
const FORGET_MAX: usize = 100;

/// One thing that is shared.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Key {
    /// A token, by its id: [`TokenRecord`].
    Token(String),
    /// A node, by its name.
    Node(NodeName),
    /// Whose name has this address.
    Address(Ipv4Addr),
    /// Whose name has this WireGuard key.
    PublicKey(NodeId),
}

/// What stands there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// As it was written.
    pub value: Vec<u8>,
    /// Another after each change.
    pub revision: u64,
}

/// What a decision was made from: it must still be so.
pub type Seen = (Key, Option<Found>);

/// What is to be; `None`: nothing.
pub type Change = (Key, Option<Vec<u8>>);

/// Where all that is kept. Methods block.
pub trait Shared: std::fmt::Debug + Send {
    /// Where that is, for people.
    fn place(&self) -> String;

    /// The mesh's authority: `proposed`, if there was none.
    ///
    /// # Errors
    ///
    /// The store failed.
    fn authority(
        &mut self,
        proposed: &CertificateAuthority,
    ) -> Result<CertificateAuthority, StoreError>;

    /// Every node, and the revision of which that is true.
    ///
    /// # Errors
    ///
    /// The store failed.
    fn nodes(&mut self) -> Result<(Nodes, u64), StoreError>;

    /// Every token, by its id.
    ///
    /// # Errors
    ///
    /// The store failed.
    fn tokens(&mut self) -> Result<Vec<(String, TokenRecord)>, StoreError>;

    /// What stands at each key, in their order.
    ///
    /// # Errors
    ///
    /// The store failed.
    fn get(&mut self, keys: &[Key]) -> Result<Vec<Option<Found>>, StoreError>;

    /// Makes the changes, all or none, and gives the revision after them; `None`: something is not as it
    /// was seen, and nothing changed.
    ///
    /// # Errors
    ///
    /// The store failed. If it is [`StoreError::Remote`], nobody knows whether the changes took place.
    fn commit(&mut self, seen: &[Seen], changes: &[Change]) -> Result<Option<u64>, StoreError>;
}

/// Who vouches for a node that wants to join.
#[derive(Debug, Clone, Copy)]
pub enum Pass<'a> {
    /// A token, by its id, and the hash of the secret that was shown.
    Token(&'a str, [u8; 32]),
    /// Somebody else; the node may come with whatever key it has now.
    Vouched,
}

/// A node that wants to join.
#[derive(Debug, Clone, Copy)]
pub struct Candidate<'a> {
    /// The name it wants.
    pub name: &'a NodeName,
    /// Its WireGuard key.
    pub id: NodeId,
    /// Why it may.
    pub pass: Pass<'a>,
}

/// A node that joined.
#[derive(Debug)]
pub struct Joined<T> {
    /// As it is registered.
    pub registered: Registered,
    /// Since then.
    pub revision: u64,
    /// What was made for it.
    pub prepared: T,
}

#[derive(Debug, Serialize, Deserialize)]
struct NodeRecord {
    public_key: String,
    overlay_v4: Ipv4Addr,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    removed_unix_s: Option<i64>,
}

/// Lets `candidate` in, or not: a token's use and the node's registration are one transaction.
///
/// `prepare` is told what the node had before and which addresses are taken although nobody here
/// knows it yet; it gives the address and whatever the answer needs. It may be asked several times.
///
/// # Errors
///
/// [`JoinError`]; unless it is [`StoreError::Remote`], nothing was written then.
pub fn join<T, E>(
    shared: &mut dyn Shared,
    candidate: Candidate<'_>,
    now_unix_s: i64,
    mut prepare: impl FnMut(Option<&Registered>, &BTreeSet<Ipv4Addr>) -> Result<(Ipv4Addr, T), E>,
) -> Result<Joined<T>, JoinError<E>> {
    let mut taken = BTreeSet::new();
    persist(shared, |shared| {
        attempt(shared, candidate, now_unix_s, &mut taken, &mut prepare)
    })
}

/// Adds a token; forgets those that expired long ago.
///
/// # Errors
///
/// [`StoreError::TokensFull`], or the store failed.
pub fn create_token(
    shared: &mut dyn Shared,
    id: &str,
    token: &TokenRecord,
    now_unix_s: i64,
) -> Result<(), StoreError> {
    let tokens = shared.tokens()?;
    let (old, kept): (Vec<_>, Vec<_>) = tokens
        .into_iter()
        .partition(|(_, token)| token.expires_unix_s + REMEMBER_S < now_unix_s);
    if kept.len() >= TOKENS_MAX {
        return Err(StoreError::TokensFull);
    }
    let new = Key::Token(id.to_owned());
    let value = encode(token);
    let forgotten = old.into_iter().take(FORGET_MAX);
    let mut changes: Vec<_> = forgotten.map(|(id, _)| (Key::Token(id), None)).collect();
    changes.push((new.clone(), Some(value.clone())));
    persist(shared, |shared| {
        // Written by an attempt whose answer was lost.
        let found = shared.get(std::slice::from_ref(&new))?.pop().flatten();
        if found.is_some_and(|found| found.value == value) {
            return Ok(Some(()));
        }
        let done = shared.commit(&[(new.clone(), None)], &changes)?;
        Ok::<_, StoreError>(done.map(|_| ()))
    })
}

/// Removes a token; `false`: there was none.
///
/// # Errors
///
/// The store failed.
pub fn revoke_token(shared: &mut dyn Shared, id: &str) -> Result<bool, StoreError> {
    let key = Key::Token(id.to_owned());
    persist(shared, |shared| {
        let found = shared.get(std::slice::from_ref(&key))?.pop().flatten();
        if found.is_none() {
            return Ok::<_, StoreError>(Some(false));
        }
        let done = shared.commit(&[(key.clone(), found)], &[(key.clone(), None)])?;
        Ok(done.map(|_| true))
    })
}

/// Takes a node out of the mesh: its key is free, and its address rests (`State::node_lifetime`). `None`: there is no such
/// node. One that was taken out before stays so.
///
/// # Errors
///
/// The store failed.
pub fn remove_node(
    shared: &mut dyn Shared,
    name: &NodeName,
    now_unix_s: i64,
) -> Result<Option<(Registered, u64)>, StoreError> {
    let (place, key) = (shared.place(), Key::Node(name.clone()));
    persist(shared, |shared| {
        let found = shared.get(std::slice::from_ref(&key))?.pop().flatten();
        let Some(found) = found else {
            return Ok::<_, StoreError>(Some(None));
        };
        let node = decode_node(&place, name, &found.value)?;
        if !node.is_in() {
            return Ok(Some(Some((node, found.revision))));
        }
        let removed = Registered {
            removed_unix_s: Some(now_unix_s),
            ..node
        };
        let changes = [
            (key.clone(), Some(encode_node(&removed))),
            (Key::PublicKey(removed.id), None),
        ];
        let done = shared.commit(&[(key.clone(), Some(found))], &changes)?;
        Ok(done.map(|revision| Some((removed, revision))))
    })
}

/// Forgets a node whose address has rested; `None`: it is another now, or gone.
///
/// # Errors
///
/// The store failed.
pub fn forget_node(
    shared: &mut dyn Shared,
    name: &NodeName,
    node: &Registered,
) -> Result<Option<u64>, StoreError> {
    let key = Key::Node(name.clone());
    persist(shared, |shared| {
        let found = shared.get(std::slice::from_ref(&key))?.pop().flatten();
        let is_other = |found: &Found| found.value != encode_node(node);
        if found.as_ref().is_none_or(is_other) {
            return Ok::<_, StoreError>(Some(None));
        }
        let changes = [(key.clone(), None), (Key::Address(node.overlay_v4), None)];
        let done = shared.commit(&[(key.clone(), found)], &changes)?;
        Ok(done.map(Some))
    })
}

/// What an embedded store has that becomes shared.
#[derive(Debug)]
pub struct Local {
    /// The mesh's authority.
    pub authority: CertificateAuthority,
    /// Its nodes.
    pub nodes: Nodes,
    /// Its tokens.
    pub tokens: Vec<(String, TokenRecord)>,
}

/// Writes those nodes and tokens of an embedded store that are not in the shared one. What is there already stays
/// as it is, so that this can be begun anew.
///
/// # Errors
///
/// The store failed.
pub fn adopt(shared: &mut dyn Shared, local: &Local) -> Result<(), StoreError> {
    let mut changes = Vec::new();
    for (name, node) in &local.nodes {
        let holder = || Some(name.as_str().as_bytes().to_vec());
        let mut of_node = vec![
            (Key::Node(name.clone()), Some(encode_node(node))),
            (Key::Address(node.overlay_v4), holder()),
        ];
        if node.is_in() {
            of_node.push((Key::PublicKey(node.id), holder()));
        }
        changes.push(of_node);
    }
    for (id, token) in &local.tokens {
        changes.push(vec![(Key::Token(id.clone()), Some(encode(token)))]);
    }
    for batch in changes.chunks(ADOPT_BATCH) {
        persist(shared, |shared| adopt_batch(shared, batch))?;
    }
    Ok(())
}

fn adopt_batch(shared: &mut dyn Shared, batch: &[Vec<Change>]) -> Result<Option<()>, StoreError> {
    let keys = batch.iter().flatten().map(|(key, _)| key.clone());
    let keys: Vec<_> = keys.collect();
    let found = shared.get(&keys)?;
    let mut found = found.into_iter();
    let (mut seen, mut changes) = (Vec::new(), Vec::new());
    for one in batch {
        let there: Vec<_> = found.by_ref().take(one.len()).collect();
        if there.iter().all(Option::is_none) {
            changes.extend(one.iter().cloned());
            seen.extend(one.iter().map(|(key, _)| (key.clone(), None)));
        }
    }
    if changes.is_empty() {
        return Ok(Some(()));
    }
    Ok(shared.commit(&seen, &changes)?.map(|_| ()))
}

/// Attempts it until there is a result, a bounded number of times.
fn persist<T, E: From<StoreError> + MaybeRemote>(
    shared: &mut dyn Shared,
    mut attempt: impl FnMut(&mut dyn Shared) -> Result<Option<T>, E>,
) -> Result<T, E> {
    let until = Instant::now() + CHANGE_TIMEOUT;
    for _ in 0..ATTEMPTS_MAX {
        match attempt(shared) {
            Ok(Some(done)) => return Ok(done),
            Ok(None) => {}
            Err(error) if error.is_remote() && Instant::now() < until => thread::sleep(RETRY),
            Err(error) => return Err(error),
        }
        if Instant::now() >= until {
            break;
        }
    }
    Err(StoreError::Contended(shared.place()).into())
}

/// Whether an error is the network's, so that another attempt may help.
trait MaybeRemote {
    fn is_remote(&self) -> bool;
}

impl MaybeRemote for StoreError {
    fn is_remote(&self) -> bool {
        matches!(self, Self::Remote { .. })
    }
}

impl<E> MaybeRemote for JoinError<E> {
    fn is_remote(&self) -> bool {
        matches!(self, Self::Store(StoreError::Remote { .. }))
    }
}

/// `None`: another controller was faster.
fn attempt<T, E>(
    shared: &mut dyn Shared,
    candidate: Candidate<'_>,
    now_unix_s: i64,
    taken: &mut BTreeSet<Ipv4Addr>,
    prepare: &mut impl FnMut(Option<&Registered>, &BTreeSet<Ipv4Addr>) -> Result<(Ipv4Addr, T), E>,
) -> Result<Option<Joined<T>>, JoinError<E>> {
    let Candidate { name, id, pass } = candidate;
    let place = shared.place();
    let mut keys = vec![Key::Node(name.clone()), Key::PublicKey(id)];
    if let Pass::Token(token, _) = pass {
        keys.push(Key::Token(token.to_owned()));
    }
    let found = shared.get(&keys)?;
    let seen: Vec<Seen> = keys.into_iter().zip(found).collect();
    let value = |index: usize| seen.get(index)?.1.as_ref().map(|found| &found.value);
    let before = value(0)
        .map(|raw| decode_node(&place, name, raw))
        .transpose()?;
    if let Some(holder) = value(1).filter(|holder| holder.as_slice() != name.as_str().as_bytes()) {
        return Err(Refusal::KeyTaken(node_name(&place, holder)?).into());
    }
    let mut changes = Vec::new();
    // The key of one that was taken out may be another's by now.
    let in_mesh = before.as_ref().filter(|before| before.is_in());
    if let Pass::Token(token, secret_hash) = pass {
        let raw = value(2).ok_or(Refusal::Unknown)?;
        let mut record: TokenRecord = decode(&place, "a token", raw)?;
        let applicant = Applicant {
            name: name.clone(),
            id,
            secret_hash,
        };
        record.admit(&applicant, in_mesh.map(|node| node.id), now_unix_s)?;
        changes.push((Key::Token(token.to_owned()), Some(encode(&record))));
    }
    let (overlay_v4, prepared) = prepare(before.as_ref(), taken).map_err(JoinError::Prepare)?;
    let registered = Registered::new(id, overlay_v4);
    let mut seen = seen;
    let holder = || Some(name.as_str().as_bytes().to_vec());
    changes.push((Key::Node(name.clone()), Some(encode_node(&registered))));
    changes.push((Key::PublicKey(id), holder()));
    if let Some(before) = in_mesh.filter(|before| before.id != id) {
        changes.push((Key::PublicKey(before.id), None));
    }
    let new_address = before.as_ref().map(|before| before.overlay_v4) != Some(overlay_v4);
    if new_address {
        if taken.contains(&overlay_v4) {
            return Err(StoreError::AddressTaken(overlay_v4).into());
        }
        seen.push((Key::Address(overlay_v4), None));
        changes.push((Key::Address(overlay_v4), holder()));
        if let Some(before) = &before {
            changes.push((Key::Address(before.overlay_v4), None));
        }
    }
    if let Some(revision) = shared.commit(&seen, &changes)? {
        return Ok(Some(Joined {
            registered,
            revision,
            prepared,
        }));
    }
    if new_address {
        let holder = shared.get(&[Key::Address(overlay_v4)])?.pop().flatten();
        if holder.is_some_and(|holder| holder.value != name.as_str().as_bytes()) {
            taken.insert(overlay_v4);
        }
    }
    Ok(None)
}

/// As JSON: strings, numbers and arrays of them, so there is nothing that it cannot hold.
pub(crate) fn encode(value: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(value).unwrap_or_default()
}

/// What [`encode`] made.
///
/// # Errors
///
/// It is something else; `what` it should be.
pub(crate) fn decode<T: DeserializeOwned>(
    place: &str,
    what: &str,
    bytes: &[u8],
) -> Result<T, StoreError> {
    serde_json::from_slice(bytes).map_err(|_| damaged(place, what))
}

/// A node as it is kept.
pub(crate) fn encode_node(node: &Registered) -> Vec<u8> {
    encode(&NodeRecord {
        public_key: node.id.to_string(),
        overlay_v4: node.overlay_v4,
        removed_unix_s: node.removed_unix_s,
    })
}

/// What [`encode_node`] made.
///
/// # Errors
///
/// It is something else.
pub(crate) fn decode_node(
    place: &str,
    name: &NodeName,
    bytes: &[u8],
) -> Result<Registered, StoreError> {
    let record: NodeRecord = decode(place, name.as_str(), bytes)?;
    let id = record.public_key.parse();
    Ok(Registered {
        id: id.map_err(|_| damaged(place, name.as_str()))?,
        overlay_v4: record.overlay_v4,
        removed_unix_s: record.removed_unix_s,
    })
}

/// A node's name as it is kept.
///
/// # Errors
///
/// It is something else.
pub(crate) fn node_name(place: &str, bytes: &[u8]) -> Result<NodeName, StoreError> {
    let name = std::str::from_utf8(bytes).ok();
    let name = name.and_then(|name| name.parse().ok());
    name.ok_or_else(|| damaged(place, "a node's name"))
}

/// The error of a record that cannot be read.
pub(crate) fn damaged(place: &str, what: &str) -> StoreError {
    StoreError::Damaged {
        place: place.to_owned(),
        what: what.to_owned(),
    }
}

#[cfg(test)]
mod tests;
