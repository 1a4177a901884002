//! Keeps TCP between devices of two LANs within the tunnel's MTU: the kernel lowers the segment size that they agree on, as
//! long as this node hands on others' packets.

use std::{sync::Arc, time::Duration};

use mesh_core::services::View;
use mesh_linux::mss;
use tokio::{sync::watch, task, time};
use tokio_util::sync::CancellationToken;

use crate::network::{self, Local};

/// The table of nftables that is this node's own.
const TABLE: &str = "holdfast_mss";

/// How often is looked whether it stands: who reloads a firewall often flushes all tables first. A look is two short
/// messages to the kernel.
const LOOK_EVERY: Duration = Duration::from_secs(30);

/// Keeps the table as the view wants it until `stop`; it goes with the agent.
///
/// # Errors
///
/// None of the kernel's: without the table, devices learn the MTU by ICMP, where that is not filtered.
pub async fn keep_clamped(
    interface: String,
    local: Local,
    mut views: watch::Receiver<Option<Arc<View>>>,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    let mut rounds = time::interval(LOOK_EVERY);
    rounds.set_missed_tick_behavior(time::MissedTickBehavior::Delay);
    let (mut clamps, mut complaint) = (None, String::new());
    loop {
        let look = tokio::select! {
            () = stop.cancelled() => break,
            changed = views.changed() => {
                if changed.is_err() {
                    break; // The driver was told to stop as well, and was quicker.
                }
                false
            }
            _ = rounds.tick() => true,
        };
        let view = views.borrow_and_update().clone();
        let forwards = view.is_some_and(|view| {
            let own = view.snapshot.nodes.get(&view.node);
            own.is_some_and(|own| network::forwards(own, &local))
        });
        if clamps == Some(forwards) && !(look && forwards) {
            continue;
        }
        let name = interface.clone();
        let applied = task::spawn_blocking(move || {
            if forwards {
                mss::clamp(TABLE, &name)
            } else {
                mss::remove(TABLE)
            }
        });
        match applied.await? {
            Ok(changed) => {
                if changed {
                    tracing::debug!(forwards, "TCP's segment size is clamped, or no more");
                }
                clamps = Some(forwards);
                complaint.clear();
            }
            Err(error) => {
                clamps = None; // Tried again with the next view, or the next round.
                let problem = error.to_string();
                if problem != complaint {
                    tracing::warn!(%error, "cannot clamp TCP's segment size (nftables): devices behind this node need ICMP");
                    complaint = problem;
                }
            }
        }
    }
    Ok(remove()?)
}

/// Takes the table away, if there is one.
///
/// # Errors
///
/// If the kernel refuses.
pub fn remove() -> std::io::Result<()> {
    mss::remove(TABLE).map(drop)
}
