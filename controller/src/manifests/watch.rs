//! Says when the folder may have changed.

use std::{path::PathBuf, sync::Arc, time::Duration};

use notify::{RecommendedWatcher, RecursiveMode, Watcher as _};
use tokio::{
    sync::Notify,
    time::{Instant, timeout},
};

/// How long it must be quiet before the folder is read: editors write in several steps.
const QUIET: Duration = Duration::from_millis(100);

/// How long to wait for quiet at most.
const QUIET_WAIT_MAX: Duration = Duration::from_secs(1);

/// How often to read the folder although nobody said that it changed: network file systems say
/// nothing, and a folder that was replaced takes its watch with it.
pub const RESCAN: Duration = Duration::from_secs(10);

/// Watches one folder.
#[derive(Debug)]
pub struct Watch {
    folder: PathBuf,
    changed: Arc<Notify>,
    /// Kept alive; made anew at each rescan, so that it follows a folder that was replaced.
    watcher: Option<RecommendedWatcher>,
    warned: bool,
}

impl Watch {
    /// Begins to watch `folder`. If the system cannot, only rescans remain.
    #[must_use]
    pub fn new(folder: PathBuf) -> Self {
        let mut watch = Self {
            folder,
            changed: Arc::new(Notify::new()),
            watcher: None,
            warned: false,
        };
        watch.renew();
        watch
    }

    /// Waits until the folder may have changed and is quiet again, or [`RESCAN`] is over.
    pub async fn changed(&mut self) {
        if timeout(RESCAN, self.changed.notified()).await.is_err() {
            return self.renew();
        }
        let end = Instant::now() + QUIET_WAIT_MAX;
        while Instant::now() < end && timeout(QUIET, self.changed.notified()).await.is_ok() {}
    }

    fn renew(&mut self) {
        let changed = self.changed.clone();
        let made = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
            // Reading the files is no change; otherwise each scan would cause the next.
            if !event.is_ok_and(|event| event.kind.is_access()) {
                changed.notify_one();
            }
        });
        let made = made.and_then(|mut watcher| {
            watcher.watch(&self.folder, RecursiveMode::NonRecursive)?;
            Ok(watcher)
        });
        match made {
            Ok(watcher) => {
                self.watcher = Some(watcher);
                self.warned = false;
            }
            Err(error) => {
                self.watcher = None;
                if !std::mem::replace(&mut self.warned, true) {
                    let folder = self.folder.display();
                    tracing::warn!(%folder, %error, every = ?RESCAN, "cannot watch the manifests, scanning instead");
                }
            }
        }
    }
}
