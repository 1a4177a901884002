//! Attachments on disk: who may change them, and how.
//!
//! Addresses are chosen by whoever holds the lock. Files appear and vanish by one rename or unlink, so that a kill at any
//! point leaves the old or the new state, and a temporary file at most, which GC and the same attachment's next file take
//! away. A runtime does one thing at a time for an attachment, so its own file needs no lock. Nothing waits for the disk:
//! see [`mesh_api::cni`] for why power loss needs no care.

use std::{
    collections::BTreeSet,
    fs::{self, DirBuilder, File, TryLockError},
    io::{self, Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::unix::fs::{DirBuilderExt as _, FileExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    sync::mpsc,
    thread,
    time::Duration,
};

use mesh_api::cni::{Attachment, FileName, boots_dir, file_names, read_attachment};
use serde::{Deserialize, Serialize};

use crate::error::{CniError, Code};

/// How long a process waits for the lock. It is held for less than a millisecond; runtimes give a plug-in minutes.
pub const LOCK_WAIT: Duration = Duration::from_secs(10);

const LOCK_FILE: &str = "lock";

/// The attachments of this boot.
#[derive(Debug, Clone)]
pub struct Store {
    state_dir: PathBuf,
    folder: PathBuf,
}

/// The right to choose addresses, until it is dropped.
#[derive(Debug)]
pub struct Lock(File);

/// The addresses that were given last; kept in the lock's own file, which is there anyway.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Last {
    /// Of IPv4.
    pub v4: Option<Ipv4Addr>,
    /// Of IPv6.
    pub v6: Option<Ipv6Addr>,
}

impl Last {
    /// Every value fits into this many bytes: two addresses of 15 and 39, and 19 of JSON. Shorter ones are filled with
    /// spaces, so that a new value covers the old one whole.
    const LEN: usize = 80;

    /// That of the family of `range`.
    #[must_use]
    pub fn of(&self, is_v4: bool) -> Option<IpAddr> {
        if is_v4 {
            self.v4.map(IpAddr::from)
        } else {
            self.v6.map(IpAddr::from)
        }
    }

    /// Notes that these were given.
    pub fn note(&mut self, addresses: &[IpAddr]) {
        for address in addresses {
            match address {
                IpAddr::V4(ip) => self.v4 = Some(*ip),
                IpAddr::V6(ip) => self.v6 = Some(*ip),
            }
        }
    }
}

impl Store {
    /// The attachments below `state_dir` of the boot with this id. Touches nothing.
    #[must_use]
    pub fn new(state_dir: &Path, boot_id: &str) -> Self {
        Self {
            state_dir: state_dir.to_owned(),
            folder: boots_dir(state_dir).join(boot_id),
        }
    }

    /// Takes the lock, with folders made that are missing. Attachments of earlier boots go with the first one of this
    /// boot: their namespaces are gone.
    ///
    /// # Errors
    ///
    /// [`Code::TryAgain`] if others hold it for `wait`; [`Code::Io`] if a file cannot be made.
    pub fn lock(&self, wait: Duration) -> Result<Lock, CniError> {
        let mut builder = DirBuilder::new();
        builder.recursive(true).mode(0o700);
        let made = builder.create(&self.state_dir);
        made.map_err(io_error("make the folder", &self.state_dir))?;
        let path = self.state_dir.join(LOCK_FILE);
        let mut options = File::options();
        let options = options.read(true).write(true).create(true).truncate(false);
        let file = options.mode(0o600).open(&path);
        let file = file.map_err(io_error("open", &path))?;
        let locked = lock_within(file, wait).map_err(io_error("lock", &path))?;
        let file = locked.ok_or_else(|| {
            let message = format!(
                "{} is locked by another process for {wait:?}",
                path.display()
            );
            CniError::new(Code::TryAgain, message)
                .with("`fuser -v` on the file says by which; it may be stopped or wait for a disk")
        })?;
        if !self.folder.is_dir() {
            remove_other_boots(&self.folder)?;
            let made = builder.create(&self.folder);
            made.map_err(io_error("make the folder", &self.folder))?;
        }
        Ok(Lock(file))
    }

    /// All attachments' names, in order.
    ///
    /// # Errors
    ///
    /// [`Code::Io`].
    pub fn names(&self) -> Result<Vec<FileName>, CniError> {
        file_names(&self.folder).map_err(io_error("list", &self.folder))
    }

    /// The attachment's name whose key this is.
    ///
    /// # Errors
    ///
    /// [`Code::Io`].
    pub fn find(&self, key: &str) -> Result<Option<FileName>, CniError> {
        let mut names = self.names()?.into_iter();
        Ok(names.find(|name| name.key == key))
    }

    /// Reads an attachment; `None` if its file says nothing usable.
    #[must_use]
    pub fn read(&self, name: &FileName) -> Option<Attachment> {
        read_attachment(&self.path(name)).ok()
    }

    /// Writes an attachment, in place of the one with this name, or none.
    ///
    /// # Errors
    ///
    /// [`Code::Io`], a full disk among others; nothing has changed then.
    pub fn write(&self, name: &FileName, attachment: &Attachment) -> Result<(), CniError> {
        let (new, path) = (self.new_file(&name.key), self.path(name));
        let content = serde_json::to_vec(attachment).unwrap_or_default();
        let written = write_new(&new, &content).and_then(|()| fs::rename(&new, &path));
        if written.is_err() {
            // It takes room on a disk that is full, perhaps.
            fs::remove_file(&new).ok();
        }
        written.map_err(io_error("write", &path))
    }

    /// Proves that attachments can be written.
    ///
    /// # Errors
    ///
    /// [`Code::Io`].
    pub fn probe(&self) -> Result<(), CniError> {
        let new = self.new_file("probe");
        let written = write_new(&new, &[b' '; 1_024]);
        let removed = gone(fs::remove_file(&new));
        written.and(removed).map_err(io_error("write", &new))
    }

    /// Removes an attachment. One that is gone is fine.
    ///
    /// # Errors
    ///
    /// [`Code::Io`].
    pub fn remove(&self, name: &FileName) -> Result<(), CniError> {
        let path = self.path(name);
        fs::remove_file(self.new_file(&name.key)).ok(); // What a kill may have left.
        gone(fs::remove_file(&path)).map_err(io_error("remove", &path))
    }

    /// Removes what kills left, and the attachments of earlier boots. Nobody else may be at work.
    ///
    /// # Errors
    ///
    /// [`Code::Io`].
    pub fn sweep(&self) -> Result<(), CniError> {
        let entries = fs::read_dir(&self.folder).map_err(io_error("list", &self.folder))?;
        for entry in entries.flatten() {
            let path = entry.path();
            if entry.file_name().as_encoded_bytes().starts_with(b".") {
                gone(fs::remove_file(&path)).map_err(io_error("remove", &path))?;
            }
        }
        remove_other_boots(&self.folder)
    }

    fn path(&self, name: &FileName) -> PathBuf {
        self.folder.join(name.to_string())
    }

    fn new_file(&self, key: &str) -> PathBuf {
        self.folder.join(format!(".{key}.new"))
    }
}

fn write_new(path: &Path, content: &[u8]) -> io::Result<()> {
    let mut options = File::options();
    let options = options.write(true).create(true).truncate(true);
    let mut file = options.mode(0o600).open(path)?;
    file.write_all(content)
}

/// The addresses that these attachments hold.
#[must_use]
pub fn held(names: &[FileName]) -> BTreeSet<IpAddr> {
    let held = names.iter().flat_map(|name| &name.held);
    held.copied().collect()
}

impl Lock {
    /// What was given last. A file that does not say it is as good as a new one.
    #[must_use]
    pub fn last(&self) -> Last {
        let mut text = [0; Last::LEN];
        let read = self.0.read_exact_at(&mut text, 0);
        let last = read.ok().and_then(|()| serde_json::from_slice(&text).ok());
        last.unwrap_or_default()
    }

    /// Notes what was given last. If that fails, an address may be given again sooner, and nothing else.
    pub fn set_last(&self, last: Last) {
        let text = serde_json::to_string(&last).unwrap_or_default();
        let text = format!("{text:<width$}", width = Last::LEN);
        self.0.write_all_at(text.as_bytes(), 0).ok();
    }
}

fn remove_other_boots(own: &Path) -> Result<(), CniError> {
    let boots = own.parent().unwrap_or(own);
    let entries = match fs::read_dir(boots) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries.map_err(io_error("list", boots))?,
    };
    for entry in entries.flatten().map(|entry| entry.path()) {
        if entry != own && entry.is_dir() {
            gone(fs::remove_dir_all(&entry)).map_err(io_error("remove", &entry))?;
        }
    }
    Ok(())
}

fn gone(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

/// `None` if somebody else has the lock all the time.
fn lock_within(file: File, wait: Duration) -> io::Result<Option<File>> {
    match file.try_lock() {
        Ok(()) => return Ok(Some(file)),
        Err(TryLockError::WouldBlock) => {}
        Err(TryLockError::Error(error)) => return Err(error),
    }
    // The kernel wakes who waits longest, but knows no limit. A thread that still waits ends with the process.
    let (sender, receiver) = mpsc::sync_channel(1);
    thread::Builder::new().spawn(move || {
        let locked = file.lock().map(|()| file);
        sender.send(locked).ok();
    })?;
    match receiver.recv_timeout(wait) {
        Ok(locked) => locked.map(Some),
        Err(mpsc::RecvTimeoutError::Timeout | mpsc::RecvTimeoutError::Disconnected) => Ok(None),
    }
}

/// Reads a file whole, if it is there.
pub(crate) fn read_if_there(path: &Path) -> io::Result<Option<Vec<u8>>> {
    let mut content = Vec::new();
    match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        file => file?.read_to_end(&mut content)?,
    };
    Ok(Some(content))
}

pub(crate) fn io_error(what: &str, path: &Path) -> impl FnOnce(io::Error) -> CniError {
    let message = format!("cannot {what} {}", path.display());
    move |error| CniError::new(Code::Io, message).with(error)
}

#[cfg(test)]
mod tests {
    use mesh_api::cni::AttachmentId;

    use super::*;

    fn attachment(container: &str, address: &str) -> (FileName, Attachment) {
        let id = AttachmentId {
            network: "mesh".to_owned(),
            container: container.to_owned(),
            interface: "eth0".to_owned(),
        };
        let addresses: Vec<IpAddr> = vec![address.parse().unwrap()];
        let name = FileName {
            key: id.key(),
            held: addresses.clone(),
        };
        let attachment = Attachment {
            id,
            netns: "/run/netns/x".into(),
            host: None,
            addresses,
            veth: None,
            pod: None,
        };
        (name, attachment)
    }

    #[test]
    fn what_is_written_is_found_and_removed() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::new(folder.path(), "b1");
        let (name, one) = attachment("c1", "10.0.0.1");
        drop(store.lock(LOCK_WAIT).unwrap());
        store.write(&name, &one).unwrap();
        assert_eq!(store.find(&one.id.key()).unwrap(), Some(name.clone()));
        assert_eq!(store.read(&name), Some(one));
        assert_eq!(
            held(&store.names().unwrap()),
            BTreeSet::from([name.held[0]])
        );
        store.remove(&name).unwrap();
        store.remove(&name).unwrap();
        assert!(store.names().unwrap().is_empty());
    }

    #[test]
    fn another_boot_begins_with_nothing_but_the_last_addresses() {
        let folder = tempfile::tempdir().unwrap();
        let (name, one) = attachment("c1", "10.0.0.1");
        let last = Last {
            v4: Some(Ipv4Addr::new(255, 255, 255, 254)),
            v6: Some(Ipv6Addr::from([0xfd; 16])),
        };
        {
            let store = Store::new(folder.path(), "b1");
            let lock = store.lock(LOCK_WAIT).unwrap();
            store.write(&name, &one).unwrap();
            lock.set_last(last);
        }
        let store = Store::new(folder.path(), "b2");
        let lock = store.lock(LOCK_WAIT).unwrap();
        assert!(store.names().unwrap().is_empty());
        assert!(!boots_dir(folder.path()).join("b1").exists());
        assert_eq!(lock.last(), last);
        lock.set_last(Last::default());
        assert_eq!(
            lock.last(),
            Last::default(),
            "a shorter value covers a longer one"
        );
    }

    #[test]
    fn a_name_says_what_is_held_whatever_is_in_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::new(folder.path(), "b1");
        let (name, one) = attachment("c1", "10.0.0.1");
        drop(store.lock(LOCK_WAIT).unwrap());
        store.write(&name, &one).unwrap();
        for garbage in [&b""[..], b"{", b"\0\0\0\0", br#"{"id":{}}"#] {
            fs::write(store.path(&name), garbage).unwrap();
            assert_eq!(store.read(&name), None);
            assert_eq!(held(&store.names().unwrap()).len(), 1);
        }
    }

    #[test]
    fn a_second_process_waits_and_gives_up_in_time() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::new(folder.path(), "b1");
        let held = store.lock(LOCK_WAIT).unwrap();
        let error = store.lock(Duration::from_millis(20)).unwrap_err();
        assert_eq!(error.code, Code::TryAgain);
        drop(held);
        store.lock(LOCK_WAIT).unwrap();
    }

    #[test]
    fn whoever_waits_gets_the_lock_when_it_is_free() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::new(folder.path(), "b1");
        let held = store.lock(LOCK_WAIT).unwrap();
        thread::scope(|scope| {
            let waiting = scope.spawn(|| store.lock(LOCK_WAIT).map(drop));
            drop(held);
            waiting.join().unwrap().unwrap();
        });
    }

    #[test]
    fn a_garbled_lock_file_is_a_new_one() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::new(folder.path(), "b1");
        for garbage in [&b""[..], b"{\"v4\":", &[0xff; 200]] {
            fs::write(folder.path().join(LOCK_FILE), garbage).unwrap();
            let lock = store.lock(LOCK_WAIT).unwrap();
            assert_eq!(lock.last(), Last::default());
        }
    }

    #[test]
    fn sweeping_takes_leftovers_and_leaves_attachments() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::new(folder.path(), "b1");
        let (name, one) = attachment("c1", "10.0.0.1");
        drop(store.lock(LOCK_WAIT).unwrap());
        store.write(&name, &one).unwrap();
        fs::write(store.new_file("killed"), "half").unwrap();
        fs::create_dir(boots_dir(folder.path()).join("b0")).unwrap();
        store.sweep().unwrap();
        assert_eq!(fs::read_dir(&store.folder).unwrap().count(), 1);
        assert_eq!(fs::read_dir(boots_dir(folder.path())).unwrap().count(), 1);
        store.probe().unwrap();
        assert_eq!(fs::read_dir(&store.folder).unwrap().count(), 1);
    }
}
