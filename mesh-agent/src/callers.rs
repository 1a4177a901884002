//! What policy denies to this node's pods, for answers about names.

use std::sync::Arc;

use mesh_core::{
    policy::{Compiler, callers::Callers},
    services::View,
    snapshot::Snapshot,
};
use mesh_wire::id::NodeName;
use tokio::{sync::watch, task};
use tokio_util::sync::CancellationToken;

use crate::policy::LIMITS;

/// Follows the view of `node` until `stop`. It takes as much work as the tables that the kernel enforces, apart from them:
/// those do not have what other nodes enforce for their own pods.
///
/// # Errors
///
/// If nobody has a view any more.
pub async fn keep_callers(
    node: NodeName,
    mut views: watch::Receiver<Option<Arc<View>>>,
    callers: watch::Sender<Option<Arc<Callers>>>,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    let mut compiler = Compiler::of_calls(node, LIMITS);
    let mut last: Option<Arc<Snapshot>> = None;
    loop {
        let view = views.borrow_and_update().clone();
        let snapshot = view.map(|view| Arc::clone(&view.snapshot));
        let is_news =
            |one: &Arc<Snapshot>| last.as_ref().is_none_or(|last| !Arc::ptr_eq(last, one));
        if let Some(snapshot) = snapshot.filter(is_news) {
            last = Some(Arc::clone(&snapshot));
            let made = task::spawn_blocking(move || {
                compiler.update(&snapshot);
                let callers = Callers::new(&compiler, &snapshot);
                (compiler, callers)
            });
            let made = made.await?;
            compiler = made.0;
            callers.send_replace(Some(Arc::new(made.1)));
        }
        tokio::select! {
            () = stop.cancelled() => return Ok(()),
            changed = views.changed() => changed?,
        }
    }
}
