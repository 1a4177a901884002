//! This node's own pods, by which it corrects what it was told of them while no controller speaks:
//! `mesh_core::offline::local` decides.

use std::{mem, path::Path, time::Duration};

use mesh_api::control::PodAddress;
use mesh_core::{
    offline::local::{Holders, PodInterface, Pods, correct, holders},
    policy::resources::ObjectName,
    snapshot::Snapshot,
};
use mesh_wire::id::NodeName;
use tokio::{
    task,
    time::{self, Instant},
};
use tokio_util::sync::CancellationToken;

use super::Shared;
use crate::cni::{Attachments, pods};

/// Pause after a record of the CNI plug-in before all are read: after a boot they come in bursts.
const SETTLE: Duration = Duration::from_millis(50);

/// Where this node's pods are, and whose the addresses were that the state speaks of.
#[derive(Debug)]
pub(super) struct Local {
    /// `None`: what the plug-in recorded cannot be read, and nothing is corrected.
    pods: Option<Pods>,
    holders: Holders,
}

impl Local {
    /// By what the plug-in recorded below `state_dir`.
    pub(super) fn read(state_dir: &Path) -> Self {
        Self {
            pods: pods(state_dir),
            holders: Holders::new(),
        }
    }

    /// The plug-in recorded something else.
    pub(super) fn set_pods(&mut self, pods: Option<Pods>) {
        self.pods = pods;
    }

    /// What was kept with the state.
    pub(super) fn set_kept(&mut self, kept: Vec<PodAddress>) {
        let holder = |one: PodAddress| {
            let pod = ObjectName {
                namespace: one.namespace,
                name: one.pod,
            };
            let interface = one.interface;
            Some((one.address.parse().ok()?, PodInterface { pod, interface }))
        };
        self.holders = kept.into_iter().filter_map(holder).collect();
    }

    /// What has to be kept with the state.
    pub(super) fn kept(&self) -> Vec<PodAddress> {
        let holders = self.holders.iter();
        let kept = holders.map(|(address, holder)| PodAddress {
            address: address.to_string(),
            namespace: holder.pod.namespace.clone(),
            pod: holder.pod.name.clone(),
            interface: holder.interface.clone(),
        });
        kept.collect()
    }

    /// A controller says this now. Returns whether there is something else to keep.
    pub(super) fn handle_controller(&mut self, snapshot: &Snapshot, node: &NodeName) -> bool {
        let Some(pods) = &self.pods else {
            return false;
        };
        let now = holders(&self.holders, snapshot, node, pods);
        let before = mem::replace(&mut self.holders, now);
        before != self.holders
    }

    /// `None`: the state is right as far as this node sees.
    pub(super) fn correct(&self, snapshot: &Snapshot, node: &NodeName) -> Option<Snapshot> {
        let (right, corrected) = correct(snapshot, node, &self.holders, self.pods.as_ref()?)?;
        tracing::info!(
            moved = corrected.moved,
            gone = corrected.gone,
            "no controller speaks: addresses of this node's pods are as its CNI plug-in says"
        );
        Some(right)
    }
}

/// Looks where this node's pods are whenever the CNI plug-in records something, until `stop`.
///
/// # Errors
///
/// If the machine is out of threads.
pub async fn keep_pods(
    desired: Shared,
    mut attachments: Attachments,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    // Some may have come between the first look and the first thing that is heard of.
    loop {
        let known = attachments.clone();
        let pods = task::spawn_blocking(move || known.pods()).await?;
        let due = {
            let mut desired = desired.lock().await;
            desired.handle_pods(pods);
            desired.write_due()
        };
        tokio::select! {
            () = stop.cancelled() => return Ok(()),
            () = attachments.changed() => time::sleep(SETTLE).await,
            () = time::sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => {
                desired.lock().await.write_if_dirty().await;
            }
        }
    }
}
