//! What the state has of the store that controllers share: nodes that others let in, and the lead.

use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex},
    thread,
    time::{Duration, Instant, SystemTime},
};

use mesh_identity::authority::CertificateAuthority;
use mesh_wire::id::NodeName;
use tokio::runtime::Handle;

use super::{StartError, State, Work, lock, spans::Origin};
use crate::{
    config::Settings,
    kubernetes,
    shared::{self, Shared, etcd::Etcd, kubernetes::ClusterStore},
    status::Role,
    store::{Embedded, Registered, Store, StoreError},
};

/// How long a controller that begins waits for the shared store: whoever starts it anew does so ever more slowly.
const START_PATIENCE: Duration = Duration::from_secs(120);

/// How often it asks meanwhile, besides the time that the answer takes.
const START_RETRY: Duration = Duration::from_millis(500);

/// What is heard of a node in the shared store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeChange {
    /// Which.
    pub name: NodeName,
    /// What it is now.
    pub fact: NodeFact,
    /// Since when. What is older than what is known counts no more.
    pub revision: u64,
}

/// What a node in the shared store is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NodeFact {
    /// This.
    Is(Registered),
    /// It is not there any more.
    Gone,
    /// Its record cannot be read: it stays what it was.
    Unreadable,
}

/// Who does what only one controller may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Lead {
    /// This one, for there is no other.
    Sole,
    /// This one until then, by the clock that nobody sets.
    Until(Instant),
    /// Another, or nobody.
    Not,
}

impl Lead {
    fn holds(self, now: Instant) -> bool {
        match self {
            Self::Sole => true,
            Self::Until(until) => now < until,
            Self::Not => false,
        }
    }
}

/// Opens the store that is configured, and finds the mesh's authority in it. What an embedded store has
/// becomes shared first.
pub(super) fn open(
    settings: &Settings,
    store: &Arc<Mutex<Store>>,
) -> Result<(Box<dyn Shared>, Lead, CertificateAuthority), StartError> {
    let name = &settings.mesh_name;
    let mut embedded = Embedded::new(store.clone());
    let Some(mut far) = beyond(settings)? else {
        let proposed = CertificateAuthority::generate(name, SystemTime::now())?;
        let authority = embedded.authority(&proposed)?;
        check_mesh(&embedded, &authority, name)?;
        return Ok((Box::new(embedded), Lead::Sole, authority));
    };
    let local = embedded.local()?;
    if let Some(local) = &local {
        check_mesh(&embedded, &local.authority, name)?;
    }
    let new = CertificateAuthority::generate(name, SystemTime::now())?;
    let proposed = local.as_ref().map_or(&new, |local| &local.authority);
    let authority = patiently(|| far.authority(proposed))?;
    check_mesh(far.as_ref(), &authority, name)?;
    if let Some(local) = &local {
        if authority.mesh_id() != local.authority.mesh_id() {
            return Err(StartError::Store(StoreError::OtherAuthority {
                place: far.place(),
                other: embedded.place(),
            }));
        }
        patiently(|| shared::adopt(far.as_mut(), local))?;
        embedded.forget()?;
        tracing::info!(
            nodes = local.nodes.len(),
            "what the embedded store had is shared now"
        );
    }
    Ok((far, Lead::Not, authority))
}

/// Asks a store that is just not to be reached again and again, for a while.
pub(super) fn patiently<T>(
    mut ask: impl FnMut() -> Result<T, StoreError>,
) -> Result<T, StoreError> {
    let until = Instant::now() + START_PATIENCE;
    let mut told = false;
    loop {
        match ask() {
            Err(error @ StoreError::Remote { .. }) if Instant::now() < until => {
                if !std::mem::replace(&mut told, true) {
                    tracing::warn!(%error, "waiting for the shared store");
                }
                thread::sleep(START_RETRY);
            }
            answer => return answer,
        }
    }
}

/// The store beyond this machine; `None`: the embedded one counts.
fn beyond(settings: &Settings) -> Result<Option<Box<dyn Shared>>, StartError> {
    if let Some(etcd) = &settings.etcd {
        return Ok(Some(Box::new(Etcd::new(etcd.clone(), Handle::current()))));
    }
    let cluster = settings.kubernetes.as_ref();
    let Some(cluster) = cluster.filter(|cluster| cluster.store) else {
        return Ok(None);
    };
    let runtime = Handle::current();
    let client = runtime.block_on(kubernetes::client(cluster))?;
    let store = ClusterStore::new(&client, &cluster.namespace, runtime);
    Ok(Some(Box::new(store)))
}

fn check_mesh(
    shared: &dyn Shared,
    authority: &CertificateAuthority,
    expected: &str,
) -> Result<(), StoreError> {
    let found = authority.trust_domain();
    if found == expected {
        return Ok(());
    }
    Err(StoreError::OtherMesh {
        place: shared.place(),
        found: found.to_owned(),
        expected: expected.to_owned(),
    })
}

impl State {
    /// What this controller is called among those that share a store.
    #[must_use]
    pub fn instance(&self) -> String {
        let bytes = self.store_id.iter();
        bytes.map(|byte| format!("{byte:02x}")).collect()
    }

    /// Whether agents can be told anything: something was published, and, where there are other
    /// controllers to ask, what this one has is not of a time when it was last up.
    #[must_use]
    pub fn serves(&self) -> bool {
        let published = self.published(|published| published.history.generation() > 0);
        published && (self.is_sole() || *self.ready.borrow())
    }

    /// Whether this controller may write what only one may write.
    #[must_use]
    pub fn leads(&self) -> bool {
        lock(&self.lead).holds(Instant::now())
    }

    /// Of which objects this controller, which is called `instance`, speaks now.
    pub(super) fn role<'a>(&self, instance: &'a str) -> Role<'a> {
        match (self.is_sole(), self.leads()) {
            (true, _) => Role::Sole,
            (false, true) => Role::Leader(instance),
            (false, false) => Role::Follower(instance),
        }
    }

    /// Takes the lead until then, or leaves it.
    pub fn lead(&self, until: Option<Instant>) {
        let mut lead = lock(&self.lead);
        let next = until.map_or(Lead::Not, Lead::Until);
        match (*lead, next) {
            (Lead::Not, Lead::Until(_)) => tracing::info!("this controller leads now"),
            (Lead::Until(_), Lead::Not) => tracing::info!("this controller leads no more"),
            _ => {}
        }
        *lead = next;
    }

    /// Takes in every node that there is in the shared store at `revision`. Blocks.
    pub fn take_nodes(&self, nodes: Vec<NodeChange>, revision: u64) {
        let gone: Vec<_> = self.published(|published| {
            let listed: BTreeSet<_> = nodes.iter().map(|change| &change.name).collect();
            let known = published.registry.keys();
            let gone = known.filter(|name| !listed.contains(name));
            gone.cloned().collect()
        });
        let gone = gone.into_iter().map(|name| NodeChange {
            name,
            fact: NodeFact::Gone,
            revision,
        });
        self.change_nodes(nodes.into_iter().chain(gone).collect());
    }

    /// Takes in what changed in the shared store, and publishes what follows. Blocks.
    pub fn change_nodes(&self, changes: Vec<NodeChange>) {
        let mut work = self.work();
        let mut changed = false;
        let mut out = BTreeSet::new();
        for change in changes {
            if matches!(&change.fact, NodeFact::Is(node) if !node.is_in()) {
                out.insert(change.name.clone());
            }
            changed |= self.change_node(change);
        }
        // Who comes back in a moment is not to leave for what was deleted before.
        if let Some(cluster) = work.cluster.as_mut().filter(|_| !out.is_empty()) {
            cluster.retain_deleted(|id| !out.contains(id.name.as_str()));
        }
        if changed {
            let refresh = |work: &mut Work| self.refresh(work);
            self.trace_change(&mut work, Origin::Registry, SystemTime::now(), refresh);
        }
    }

    /// Remembers why the shared store cannot be followed, or that it can. Blocks.
    pub fn hear_of_shared(&self, trouble: Option<String>) {
        let mut work = self.work();
        // The first reason stands until it is well again: one is worth the work, not each.
        if work.trouble.is_some() != trouble.is_some() {
            work.trouble = trouble.map(|trouble| {
                format!("what other controllers do is not heard of; agents are served: {trouble}")
            });
            self.refresh(&mut work);
        }
    }

    fn is_sole(&self) -> bool {
        *lock(&self.lead) == Lead::Sole
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_leader_that_nobody_renews_leads_no_more_although_nobody_tells_it() {
        let now = Instant::now();
        let lead = Lead::Until(now + Duration::from_secs(8));
        assert!(lead.holds(now + Duration::from_secs(7)));
        assert!(!lead.holds(now + Duration::from_secs(8)));
        assert!(Lead::Sole.holds(now) && !Lead::Not.holds(now));
    }
}
