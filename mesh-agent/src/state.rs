//! The state folder: who this node is, and what it remembers.

use std::{
    collections::BTreeMap,
    fs::{self, File, TryLockError},
    io,
    net::SocketAddr,
    os::unix::fs::{DirBuilderExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    time::Duration,
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use mesh_tunnel::tunnel::PrivateKey;
use mesh_wire::id::NodeId;
use zeroize::Zeroizing;

use crate::store::{SLOTS, remove_if_there, slot_name, temporary, write_atomically};

/// Permissions of the folder: keys are in it.
const FOLDER_MODE: u32 = 0o700;

/// The WireGuard private key, base64.
const WIREGUARD_KEY_FILE: &str = "wireguard.key";

/// Certificate chain, private key and authority, PEM, in this order.
const IDENTITY_FILE: &str = "identity.pem";

/// Addresses that worked.
const PEERS_FILE: &str = "peers";

/// For how long no controller spoke, as far as it was counted, and when it last did.
const OFFLINE_FILE: &str = "offline";

/// Who holds it may use the folder.
const LOCK_FILE: &str = "lock";

/// Between the parts of the identity: PEM readers skip text outside the blocks.
const SEPARATOR: &str = "\n# next\n";

/// The locked state folder. Dropping it lets the next agent in.
#[derive(Debug)]
pub struct StateFolder {
    path: PathBuf,
    _lock: File,
}

/// Why the state folder cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// Another agent has it.
    #[error(
        "{0} is in use by another mesh-agent: stop that one first, or give this one its own `state_dir`"
    )]
    InUse(PathBuf),
    /// The file system refuses.
    #[error("cannot {action} {path}: {source}")]
    Io {
        /// What was attempted.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A file is not what the agent wrote.
    #[error(
        "{path} is damaged ({problem}): restore it from a backup, or remove the state folder and join again with a new token"
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
}

/// The texts that make up a node's TLS identity.
#[derive(Clone)]
pub struct IdentityFiles {
    /// Certificate chain, PEM.
    pub certificate: String,
    /// Private key, PEM.
    pub key: String,
    /// The mesh's certificate authority, PEM.
    pub ca: String,
}

impl std::fmt::Debug for IdentityFiles {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("IdentityFiles").finish_non_exhaustive()
    }
}

impl StateFolder {
    /// Opens the folder at `path`, makes it if it is not there, and locks it. A disk that can only be read any more, as of a worn
    /// card, is good enough: what is on it serves, and each thing that cannot be kept is said.
    ///
    /// # Errors
    ///
    /// [`StateError::InUse`] if another process has it, [`StateError::Io`] otherwise.
    pub fn open(path: &Path) -> Result<Self, StateError> {
        let mut builder = fs::DirBuilder::new();
        builder.recursive(true).mode(FOLDER_MODE);
        builder
            .create(path)
            .map_err(|source| io_error("create", path, source))?;
        protect(path).map_err(|source| io_error("protect", path, source))?;
        let lock_path = path.join(LOCK_FILE);
        let lock = File::create(&lock_path).or_else(|error| {
            if error.kind() == io::ErrorKind::ReadOnlyFilesystem {
                return File::open(&lock_path).map_err(|_| error);
            }
            Err(error)
        });
        let lock = lock.map_err(|source| io_error("create", &lock_path, source))?;
        match lock.try_lock() {
            Ok(()) => {
                for secret in [WIREGUARD_KEY_FILE, IDENTITY_FILE] {
                    mesh_daemon::warn_if_exposed(&path.join(secret));
                }
                Ok(Self {
                    path: path.to_owned(),
                    _lock: lock,
                })
            }
            Err(TryLockError::WouldBlock) => Err(StateError::InUse(path.to_owned())),
            Err(TryLockError::Error(source)) => Err(io_error("lock", &lock_path, source)),
        }
    }

    /// The folder.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The node's WireGuard private key; `None` before the first start.
    ///
    /// # Errors
    ///
    /// [`StateError::Damaged`] if the file holds something else.
    pub fn wireguard_key(&self) -> Result<Option<PrivateKey>, StateError> {
        let Some(text) = self.read_text(WIREGUARD_KEY_FILE)? else {
            return Ok(None);
        };
        let text = Zeroizing::new(text);
        let bytes = STANDARD.decode(text.trim()).ok().map(Zeroizing::new);
        let key = bytes.and_then(|bytes| <[u8; 32]>::try_from(bytes.as_slice()).ok());
        let damaged = || self.damaged(WIREGUARD_KEY_FILE, "not a WireGuard private key");
        key.map(|key| Some(PrivateKey::new(key)))
            .ok_or_else(damaged)
    }

    /// Keeps the node's WireGuard private key, as `wg genkey` writes it.
    ///
    /// # Errors
    ///
    /// [`StateError::Io`].
    pub fn set_wireguard_key(&self, key: &[u8; 32]) -> Result<(), StateError> {
        self.write_text(WIREGUARD_KEY_FILE, &Zeroizing::new(STANDARD.encode(key)))
    }

    /// The node's TLS identity; `None` if it did not join yet.
    ///
    /// # Errors
    ///
    /// [`StateError::Damaged`] if only a part of it is there.
    pub fn identity(&self) -> Result<Option<IdentityFiles>, StateError> {
        let Some(text) = self.read_text(IDENTITY_FILE)? else {
            return Ok(None);
        };
        let mut parts = text.split(SEPARATOR).map(str::to_owned);
        match (parts.next(), parts.next(), parts.next()) {
            (Some(certificate), Some(key), Some(ca)) => Ok(Some(IdentityFiles {
                certificate,
                key,
                ca,
            })),
            _ => Err(self.damaged(IDENTITY_FILE, "a part is missing")),
        }
    }

    /// Keeps what the controller answered to `Join` or `Renew`: one file, so that certificate
    /// and key always belong together.
    ///
    /// # Errors
    ///
    /// [`StateError::Io`].
    pub fn set_identity(&self, identity: &IdentityFiles) -> Result<(), StateError> {
        let IdentityFiles {
            certificate,
            key,
            ca,
        } = identity;
        self.write_text(
            IDENTITY_FILE,
            &format!("{certificate}{SEPARATOR}{key}{SEPARATOR}{ca}"),
        )
    }

    /// Addresses that worked for each peer, the last one first. A damaged file counts as empty:
    /// it only saves time.
    #[must_use]
    pub fn remembered(&self) -> BTreeMap<NodeId, Vec<SocketAddr>> {
        let text = self
            .read_text(PEERS_FILE)
            .ok()
            .flatten()
            .unwrap_or_default();
        let line = |line: &str| {
            let mut words = line.split(' ');
            let peer = words.next()?.parse().ok()?;
            Some((peer, words.filter_map(|word| word.parse().ok()).collect()))
        };
        text.lines().filter_map(line).collect()
    }

    /// Keeps the addresses that worked.
    ///
    /// # Errors
    ///
    /// [`StateError::Io`].
    pub fn remember(&self, peers: &BTreeMap<NodeId, Vec<SocketAddr>>) -> Result<(), StateError> {
        let line = |(peer, addresses): (&NodeId, &Vec<SocketAddr>)| {
            let words = addresses.iter().map(|address| format!(" {address}"));
            format!("{peer}{}\n", words.collect::<String>())
        };
        self.write_text(PEERS_FILE, &peers.iter().map(line).collect::<String>())
    }

    /// For how long no controller spoke, and when it last did by its own clock, since 1970. A damaged file counts as empty: then
    /// what the node has counts for longer, never shorter.
    #[must_use]
    pub fn offline(&self) -> (Duration, Duration) {
        let text = self.read_text(OFFLINE_FILE).ok().flatten();
        let text = text.unwrap_or_default();
        let mut numbers = text.split_whitespace().map(str::parse);
        match (numbers.next(), numbers.next()) {
            (Some(Ok(counted)), Some(Ok(confirmed))) => {
                (Duration::from_secs(counted), Duration::from_secs(confirmed))
            }
            _ => Default::default(),
        }
    }

    /// Keeps these, unless they are there already.
    ///
    /// # Errors
    ///
    /// [`StateError::Io`].
    pub fn set_offline(&self, counted: Duration, confirmed: Duration) -> Result<(), StateError> {
        let text = format!("{} {}\n", counted.as_secs(), confirmed.as_secs());
        let before = self.read_text(OFFLINE_FILE).ok().flatten();
        if before.as_deref() == Some(text.as_str()) {
            return Ok(());
        }
        self.write_text(OFFLINE_FILE, &text)
    }

    /// Removes every file that agents keep here, and the folder if nothing else is in it.
    ///
    /// # Errors
    ///
    /// [`StateError::Io`]; what was not reached is still there.
    pub fn purge(self) -> Result<(), StateError> {
        let files = [
            WIREGUARD_KEY_FILE,
            IDENTITY_FILE,
            PEERS_FILE,
            OFFLINE_FILE,
            LOCK_FILE,
        ];
        let slots = (0..SLOTS).map(slot_name);
        for name in slots.chain(files.map(str::to_owned)) {
            let path = self.path.join(name);
            for path in [temporary(&path), path] {
                remove_if_there(&path).map_err(|e| io_error("remove", &path, e))?;
            }
        }
        // Another's file, or a volume that is mounted here: then it stays.
        fs::remove_dir(&self.path).ok();
        Ok(())
    }

    fn read_text(&self, name: &str) -> Result<Option<String>, StateError> {
        let path = self.path.join(name);
        match fs::read_to_string(&path) {
            Ok(text) => Ok(Some(text)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(io_error("read", &path, source)),
        }
    }

    fn write_text(&self, name: &str, text: &str) -> Result<(), StateError> {
        let path = self.path.join(name);
        write_atomically(&path, text.as_bytes()).map_err(|e| io_error("write", &path, e))
    }

    fn damaged(&self, name: &str, problem: &str) -> StateError {
        StateError::Damaged {
            path: self.path.join(name),
            problem: problem.to_owned(),
        }
    }
}

fn protect(folder: &Path) -> io::Result<()> {
    const PERMISSIONS: u32 = 0o7777;
    let is = fs::metadata(folder)?.permissions().mode() & PERMISSIONS;
    if is == FOLDER_MODE {
        return Ok(());
    }
    fs::set_permissions(folder, fs::Permissions::from_mode(FOLDER_MODE))
}

fn io_error(action: &'static str, path: &Path, source: io::Error) -> StateError {
    StateError::Io {
        action,
        path: path.to_owned(),
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_agent_on_the_same_folder_is_refused_until_the_first_is_gone() {
        let parent = tempfile::tempdir().unwrap();
        let path = parent.path().join("state");
        let first = StateFolder::open(&path).unwrap();
        assert!(matches!(
            StateFolder::open(&path),
            Err(StateError::InUse(_))
        ));
        drop(first);
        StateFolder::open(&path).unwrap();
    }

    /// Runs itself once more, where the folder can only be read. Needs root.
    #[test]
    fn a_disk_that_can_only_be_read_is_no_reason_not_to_start() {
        const FOLDER: &str = "HOLDFAST_TEST_READ_ONLY_FOLDER";
        if let Some(path) = std::env::var_os(FOLDER) {
            let state = StateFolder::open(Path::new(&path)).unwrap();
            assert!(state.wireguard_key().unwrap().is_some());
            assert!(state.set_wireguard_key(&[8; 32]).is_err(), "it is written");
            let second = StateFolder::open(Path::new(&path));
            assert!(matches!(second, Err(StateError::InUse(_))));
            return;
        }
        let parent = tempfile::tempdir().unwrap();
        let path = parent.path().join("state");
        let state = StateFolder::open(&path).unwrap();
        state.set_wireguard_key(&[7; 32]).unwrap();
        drop(state);
        let script =
            "mount --bind \"$1\" \"$1\" && mount -o remount,bind,ro \"$1\" && shift && exec \"$@\"";
        let test = "state::tests::a_disk_that_can_only_be_read_is_no_reason_not_to_start";
        let said = std::process::Command::new("unshare")
            .args(["--mount", "sh", "-c", script, "sh"])
            .arg(&path)
            .arg(std::env::current_exe().unwrap())
            .args(["--exact", test])
            .env(FOLDER, &path)
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&said.stdout);
        assert!(
            said.status.success() && text.contains("1 passed"),
            "{said:?}"
        );
    }

    #[test]
    fn purging_takes_what_is_the_agent_s_and_nothing_else() {
        let parent = tempfile::tempdir().unwrap();
        let path = parent.path().join("state");
        let fill = || {
            let state = StateFolder::open(&path).unwrap();
            state.set_wireguard_key(&[7; 32]).unwrap();
            state.remember(&BTreeMap::new()).unwrap();
            for name in ["identity.pem", "identity.tmp", "snapshot.0", "snapshot.1"] {
                fs::write(path.join(name), "x").unwrap();
            }
            state
        };
        fill().purge().unwrap();
        assert!(!path.exists());
        let state = fill();
        fs::write(path.join("notes"), "somebody else's").unwrap();
        state.purge().unwrap();
        let left: Vec<_> = fs::read_dir(&path).unwrap().collect();
        assert_eq!(left.len(), 1, "{left:?}");
    }

    #[test]
    fn what_is_remembered_reads_back_and_damage_only_forgets() {
        let parent = tempfile::tempdir().unwrap();
        let state = StateFolder::open(parent.path()).unwrap();
        let addresses = vec![
            "192.0.2.1:51820".parse().unwrap(),
            "[2001:db8::1]:1".parse().unwrap(),
        ];
        let peers = BTreeMap::from([(NodeId([3; 32]), addresses)]);
        state.remember(&peers).unwrap();
        assert_eq!(state.remembered(), peers);
        fs::write(parent.path().join("peers"), "x\u{0}garbage\n= =").unwrap();
        assert_eq!(state.remembered(), BTreeMap::new());
    }

    #[test]
    fn how_long_no_controller_spoke_reads_back_and_damage_only_forgets() {
        let parent = tempfile::tempdir().unwrap();
        let state = StateFolder::open(parent.path()).unwrap();
        assert_eq!(state.offline(), Default::default());
        let told = (
            Duration::from_secs(86_400),
            Duration::from_secs(1_800_000_000),
        );
        state.set_offline(told.0, told.1).unwrap();
        assert_eq!(state.offline(), told);
        for damaged in ["", "86400", "-1 7", "x 7", "\0"] {
            fs::write(parent.path().join(OFFLINE_FILE), damaged).unwrap();
            assert_eq!(state.offline(), Default::default(), "{damaged:?}");
        }
    }

    fn identity() -> IdentityFiles {
        IdentityFiles {
            certificate: "cert".into(),
            key: "key".into(),
            ca: "ca".into(),
        }
    }

    #[test]
    fn an_identity_reads_back_and_a_part_of_one_is_damage_that_says_what_to_do() {
        let parent = tempfile::tempdir().unwrap();
        let state = StateFolder::open(parent.path()).unwrap();
        assert!(state.identity().unwrap().is_none());
        state.set_identity(&identity()).unwrap();
        assert_eq!(state.identity().unwrap().unwrap().key, "key");
        fs::write(parent.path().join(IDENTITY_FILE), "cert").unwrap();
        let error = state.identity().unwrap_err().to_string();
        assert!(error.contains("join again"), "{error}");
    }

    #[test]
    fn keys_are_readable_by_the_owner_only() {
        let parent = tempfile::tempdir().unwrap();
        let state = StateFolder::open(parent.path()).unwrap();
        state.set_identity(&identity()).unwrap();
        let mode = fs::metadata(parent.path().join(IDENTITY_FILE))
            .unwrap()
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o600);
    }
}
