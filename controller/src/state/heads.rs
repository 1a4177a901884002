//! The signed head of what is published, and what becomes of nodes that have what this store lost.

use std::{sync::Mutex, time::UNIX_EPOCH};

use mesh_api::control::{Head, SignedHead, SyncRequest, SyncResponse};
use mesh_wire::id::NodeName;
use ring::rand::{SecureRandom as _, SystemRandom};

use super::{State, lock};
use crate::{
    history::History,
    lineage::{Lineage, Place, Told},
    store::{Store, StoreError},
};

/// The lineage, and the head that was made last.
#[derive(Debug)]
pub(super) struct Heads {
    lineage: Mutex<Lineage>,
    /// Of which generation and epoch, and the head.
    last: Mutex<Option<((u64, u64), SignedHead)>>,
    /// Who has what this store lost, for people.
    lost: Mutex<Option<String>>,
}

impl Heads {
    /// A life begins with what the store has: it is on the disk before anybody hears of it.
    ///
    /// # Errors
    ///
    /// The store failed, or the system gives no random bytes.
    pub(super) fn begin(
        mut lineage: Lineage,
        generation: u64,
        store: &mut Store,
    ) -> Result<Self, StoreError> {
        let mut number = [0; 8];
        let filled = SystemRandom::new().fill(&mut number);
        filled.map_err(|_| StoreError::Random)?;
        lineage.begin(u64::from_be_bytes(number).max(1), generation);
        store.save_lineage(&lineage)?;
        Ok(Self {
            lineage: Mutex::new(lineage),
            last: Mutex::default(),
            lost: Mutex::default(),
        })
    }

    /// With what is wrong otherwise.
    pub(super) fn problems(&self, others: &[String]) -> Vec<String> {
        let lost = lock(&self.lost).clone();
        others.iter().cloned().chain(lost).collect()
    }
}

impl State {
    /// What an agent that says this of what it has can be told the changes since; `None`: it needs to be compared, or everything.
    ///
    /// # Errors
    ///
    /// It has what this store lost: for people, what to do.
    pub fn has(&self, node: &NodeName, request: &SyncRequest) -> Result<Option<u64>, String> {
        if request.store_id != self.store_id {
            return Ok(None);
        }
        let told = Told {
            life: request.life,
            epoch: request.epoch,
            generation: request.generation,
        };
        let generation = self.published(|published| published.history.generation());
        match lock(&self.heads.lineage).place(told, generation) {
            Place::Known => Ok(Some(told.generation)),
            Place::Unknown => Ok(None),
            Place::Lost => {
                let text = format!(
                    "this controller's store was restored from an older copy: node {node} has generation {} that it lost, and keeps that. If the older state is to count, run `meshctl controller accept-rollback`",
                    told.generation
                );
                let before = lock(&self.heads.lost).replace(text.clone());
                if before.is_none() {
                    tracing::error!(%node, generation = told.generation, "nodes have what this store lost: it was restored from an older copy");
                }
                Err(text)
            }
        }
    }

    /// Lets what this store has count for all nodes, also those that have what it lost. Returns the epoch. Blocks on the disk.
    ///
    /// # Errors
    ///
    /// The store failed; all is as it was.
    pub fn accept_rollback(&self) -> Result<u64, StoreError> {
        let work = self.work();
        let mut lineage = lock(&self.heads.lineage).clone();
        lineage.accept_rollback();
        lock(&work.store).save_lineage(&lineage)?;
        let epoch = lineage.epoch();
        *lock(&self.heads.lineage) = lineage;
        *lock(&self.heads.lost) = None;
        tracing::info!(
            epoch,
            "an operator lets what this store has count for all nodes"
        );
        Ok(epoch)
    }

    /// Adds what makes an answer whole: the head of what the node has with it, and the time.
    pub(super) fn with_head(&self, history: &History, mut response: SyncResponse) -> SyncResponse {
        response.now_unix_s = self.now_unix_s();
        response.head = self.head(history);
        response
    }

    /// `None`: the system gave no random bytes to sign with. Such an answer counts, but cannot be passed on.
    fn head(&self, history: &History) -> Option<SignedHead> {
        let (epoch, life) = {
            let lineage = lock(&self.heads.lineage);
            (lineage.epoch(), lineage.life())
        };
        let of = (history.generation(), epoch);
        let mut last = lock(&self.heads.last);
        if let Some((_, head)) = last.as_ref().filter(|(made, _)| *made == of) {
            return Some(head.clone());
        }
        let head = Head {
            store_id: self.store_id.clone(),
            generation: history.generation(),
            epoch,
            made_unix_ms: history.made_unix_ms(),
            digest: history.digest(),
            life,
        };
        let signed = head.sign(&self.authority).inspect_err(|error| {
            tracing::warn!(%error, "cannot sign the head of the snapshot");
        });
        let signed = signed.ok()?;
        *last = Some((of, signed.clone()));
        Some(signed)
    }

    /// [`Self::now`] in milliseconds since 1970.
    pub(super) fn now_unix_ms(&self) -> u64 {
        let since = self.now().duration_since(UNIX_EPOCH).unwrap_or_default();
        u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
    }
}
