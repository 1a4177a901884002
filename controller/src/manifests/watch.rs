//! Says when the folder may have changed.

use std::{
    collections::BTreeSet,
    mem,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use notify::{
    Event, EventKind, RecommendedWatcher, RecursiveMode, Watcher as _,
    event::{AccessKind, AccessMode, ModifyKind, RenameMode},
};
use tokio::{
    sync::Notify,
    time::{Instant, timeout, timeout_at},
};

use super::manifest_name;

/// How long it must be quiet before the folder is read: editors write in several steps.
const QUIET: Duration = Duration::from_millis(100);

/// Files that were written are told at most so often: as one, what somebody writes one after the other. As long as the
/// cluster's changes are gathered.
const FILES_EVERY: Duration = Duration::from_millis(30);

/// How long to wait for quiet at most.
const QUIET_WAIT_MAX: Duration = Duration::from_secs(1);

/// How often to read the folder although nobody said that it changed: network file systems say
/// nothing, and a folder that was replaced takes its watch with it. So long, too, a file that is being
/// written is waited for.
pub const RESCAN: Duration = Duration::from_secs(10);

/// What may have changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FolderChange {
    /// These files, each written to its end. Others may follow, and one of them may hold what these no longer do:
    /// [`Self::Any`] comes soon.
    Files(BTreeSet<String>),
    /// Anything, and the folder is quiet.
    Any,
}

/// Watches one folder.
#[derive(Debug)]
pub struct Watch {
    folder: PathBuf,
    seen: Arc<Seen>,
    /// Kept alive; made anew at each rescan, so that it follows a folder that was replaced.
    watcher: Option<RecommendedWatcher>,
    warned: bool,
    /// Since when files changed, and the folder as a whole was not told.
    owes_folder: Option<Instant>,
    /// When files were told last.
    told_files: Option<Instant>,
}

#[derive(Debug, Default)]
struct Seen {
    files: Mutex<Files>,
    changed: Notify,
}

/// By name; at most as many as there are files in the folder.
#[derive(Debug, Default)]
struct Files {
    /// Written to their end, or put there as a whole, and not told yet.
    whole: BTreeSet<String>,
    /// Somebody writes them.
    unfinished: BTreeSet<String>,
}

impl Watch {
    /// Begins to watch `folder`. If the system cannot, only rescans remain.
    #[must_use]
    pub fn new(folder: PathBuf) -> Self {
        let mut watch = Self {
            folder,
            seen: Arc::default(),
            watcher: None,
            warned: false,
            owes_folder: None,
            told_files: None,
        };
        watch.renew();
        watch
    }

    /// Waits until files may have changed, or [`RESCAN`] is over.
    pub async fn changed(&mut self) -> FolderChange {
        let changed = self.seen.changed.notified();
        if self.owes_folder.is_none() && timeout(RESCAN, changed).await.is_err() {
            self.renew();
            return FolderChange::Any;
        }
        let start = *self.owes_folder.get_or_insert_with(Instant::now);
        let told = self.told_files.map(|at| at + FILES_EVERY);
        let mut quiet_at = Instant::now() + QUIET;
        loop {
            let (is_written, whole) = self.seen.so_far();
            let now = Instant::now();
            let waits_max = start + if is_written { RESCAN } else { QUIET_WAIT_MAX };
            if now >= waits_max || (now >= quiet_at && !is_written) {
                *self.seen.files() = Files::default();
                self.owes_folder = None;
                return FolderChange::Any;
            }
            let mut look_at = if is_written {
                waits_max
            } else {
                waits_max.min(quiet_at)
            };
            if whole {
                let due = told.unwrap_or(now);
                if due <= now {
                    self.told_files = Some(now);
                    return FolderChange::Files(mem::take(&mut self.seen.files().whole));
                }
                look_at = look_at.min(due);
            }
            if timeout_at(look_at, self.seen.changed.notified())
                .await
                .is_ok()
            {
                quiet_at = Instant::now() + QUIET;
            }
        }
    }

    fn renew(&mut self) {
        let seen = self.seen.clone();
        let made = notify::recommended_watcher(move |event: notify::Result<Event>| {
            let news = event.map(|event| seen.files().handle_event(&event));
            if news.unwrap_or(true) {
                seen.changed.notify_one();
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
                if !mem::replace(&mut self.warned, true) {
                    let folder = self.folder.display();
                    tracing::warn!(%folder, %error, every = ?RESCAN, "cannot watch the manifests, scanning instead");
                }
            }
        }
    }
}

impl Seen {
    /// Whether files are being written, and whether some were.
    fn so_far(&self) -> (bool, bool) {
        let files = self.files();
        (!files.unfinished.is_empty(), !files.whole.is_empty())
    }

    fn files(&self) -> MutexGuard<'_, Files> {
        self.files.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Files {
    /// Takes in what happened to a file. Says whether the folder may be another now.
    fn handle_event(&mut self, event: &Event) -> bool {
        let name = event.paths.first().and_then(|path| manifest_name(path));
        let Some(name) = name.map(ToOwned::to_owned) else {
            // The link that a ConfigMap's volume swaps, say.
            return !event.kind.is_access();
        };
        match event.kind {
            EventKind::Access(AccessKind::Close(AccessMode::Write))
            | EventKind::Modify(ModifyKind::Name(RenameMode::To)) => {
                self.unfinished.remove(&name);
                self.whole.insert(name);
            }
            EventKind::Modify(ModifyKind::Data(_)) => {
                self.whole.remove(&name);
                self.unfinished.insert(name);
            }
            // Reading the files is no change; otherwise each scan would cause the next.
            EventKind::Access(_) => return false,
            EventKind::Create(_)
            | EventKind::Remove(_)
            | EventKind::Modify(ModifyKind::Name(RenameMode::From)) => {
                self.whole.remove(&name);
                self.unfinished.remove(&name);
            }
            // Both names of a renamed file came before, one by one.
            EventKind::Modify(_) | EventKind::Any | EventKind::Other => {}
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        io::{self, Write as _},
        path::Path,
    };

    use super::*;

    fn one() -> FolderChange {
        FolderChange::Files(["one.yaml".to_owned()].into())
    }

    #[tokio::test]
    async fn a_file_put_there_as_a_whole_is_told_before_the_folder_is_quiet() {
        let place = tempfile::tempdir().unwrap();
        let mut watch = Watch::new(place.path().to_owned());
        for text in ["a", "b"] {
            let fresh = place.path().join(".one");
            fs::write(&fresh, text).unwrap();
            fs::rename(&fresh, place.path().join("one.yaml")).unwrap();
            assert_eq!(watch.changed().await, one());
            assert_eq!(watch.changed().await, FolderChange::Any);
        }
    }

    /// How often to look for something that a busy machine may hide.
    const TRIES: usize = 50;

    #[tokio::test]
    async fn the_next_change_does_not_wait_for_quiet_and_a_folder_that_never_rests_is_told_too() {
        let place = tempfile::tempdir().unwrap();
        let mut watch = Watch::new(place.path().to_owned());
        let put = |text: &str| {
            let fresh = place.path().join(".one");
            fs::write(&fresh, text).unwrap();
            fs::rename(&fresh, place.path().join("one.yaml")).unwrap();
        };
        // On a busy machine the kernel's word may come when it was quiet for long: that says nothing.
        let are_told_at_once = async |watch: &mut Watch| {
            let begin = Instant::now();
            for text in ["a", "b"] {
                put(text);
                match watch.changed().await {
                    told @ FolderChange::Files(_) => assert_eq!(told, one()),
                    FolderChange::Any => {
                        assert!(begin.elapsed() >= QUIET, "it was not quiet");
                        return false;
                    }
                }
            }
            true
        };
        let mut tries = 0..TRIES;
        while !are_told_at_once(&mut watch).await {
            assert!(tries.next().is_some(), "soon, and not after the folder");
        }
        while watch.changed().await != FolderChange::Any {}
        let (begin, mut files) = (Instant::now(), 0);
        loop {
            put("c");
            match watch.changed().await {
                FolderChange::Files(_) => files += 1,
                FolderChange::Any => break,
            }
            assert!(begin.elapsed() < RESCAN, "{files}");
        }
        let most = QUIET_WAIT_MAX.as_millis() / FILES_EVERY.as_millis();
        assert!(files <= most + 1, "{files}");
        assert!(files > 0 || begin.elapsed() >= QUIET, "it was not quiet");
    }

    #[tokio::test]
    async fn a_file_that_is_being_written_is_waited_for() {
        let place = tempfile::tempdir().unwrap();
        let mut watch = Watch::new(place.path().to_owned());
        let mut file = fs::File::create(place.path().join("one.yaml")).unwrap();
        file.write_all(b"half").unwrap();
        let early = timeout(QUIET * 4, watch.changed()).await;
        assert!(early.is_err(), "{early:?}");
        file.write_all(b" and half").unwrap();
        drop(file);
        assert_eq!(watch.changed().await, one());
        assert_eq!(watch.changed().await, FolderChange::Any);
    }

    #[tokio::test]
    async fn what_is_taken_away_and_what_is_no_manifest_waits_for_quiet() {
        let place = tempfile::tempdir().unwrap();
        let path = |name: &str| place.path().join(name);
        fs::write(path("one.yaml"), "a").unwrap();
        let mut watch = Watch::new(place.path().to_owned());
        let remove = || fs::remove_file(path("one.yaml"));
        let swap = || std::os::unix::fs::symlink("..now", path("..data"));
        let link = || std::os::unix::fs::symlink("..data/one.yaml", path("one.yaml"));
        let changes: [&dyn Fn() -> io::Result<()>; 3] = [&remove, &swap, &link];
        for change in changes {
            change().unwrap();
            assert_eq!(watch.changed().await, FolderChange::Any);
        }
    }

    #[test]
    fn reading_is_no_change() {
        let mut files = Files::default();
        let read = AccessKind::Open(AccessMode::Any);
        for name in ["/m/one.yaml", "/m/.one"] {
            let event = Event::new(EventKind::Access(read)).add_path(Path::new(name).to_owned());
            assert!(!files.handle_event(&event), "{name}");
        }
    }
}
