//! The snapshot on disk: two slots, checksummed, replaced atomically.
//!
//! Each write goes to a temporary file that is synced and renamed over the **older** slot, so
//! that losing power at any byte leaves the newer slot as it was; a slot that was damaged later
//! fails its checksum and the other one is used.

use std::{
    fs::{self, File},
    io::{self, Write},
    path::{Path, PathBuf},
};

use ring::digest::{Context, SHA256, SHA256_OUTPUT_LEN, digest};

/// Marks a slot file and its version.
const MAGIC: &[u8; 8] = b"HFSNAP1\n";

/// Largest slot that is read: 100,000 nodes and 250,000 endpoints at about 150 bytes are 53 MB.
pub const SLOT_LEN_MAX: u64 = 256 << 20;

/// How many slots there are.
pub const SLOTS: usize = 2;

const HEADER_LEN: usize = MAGIC.len() + 8;

/// The two slots in one folder.
#[derive(Debug)]
pub struct Store {
    folder: PathBuf,
    /// Sequence number of the newest valid slot, and which it is.
    newest: Option<(u64, usize)>,
}

/// Why a slot holds nothing usable.
#[derive(Debug, thiserror::Error)]
pub enum SlotError {
    /// It is not there.
    #[error("not written yet")]
    Absent,
    /// It cannot be read.
    #[error("cannot be read: {0}")]
    Read(io::Error),
    /// It was cut, or changed since it was written.
    #[error("damaged: {0}")]
    Damaged(&'static str),
}

/// A slot's file, and its sequence number and payload if it is whole.
pub type FoundSlot = (PathBuf, Result<(u64, Vec<u8>), SlotError>);

/// What opening a store found.
#[derive(Debug)]
pub struct Opened {
    /// The store.
    pub store: Store,
    /// Payload of the newest valid slot.
    pub payload: Option<Vec<u8>>,
    /// Slots that hold something, but nothing usable.
    pub damaged: Vec<(PathBuf, SlotError)>,
}

impl Store {
    /// Opens the store in `folder`, which must exist.
    #[must_use]
    pub fn open(folder: &Path) -> Opened {
        let mut store = Self {
            folder: folder.to_owned(),
            newest: None,
        };
        let mut payload = None;
        let mut damaged = Vec::new();
        for slot in 0..SLOTS {
            match read_slot(&store.path(slot)) {
                Ok((sequence, content)) => {
                    if store.newest.is_none_or(|(newest, _)| sequence > newest) {
                        store.newest = Some((sequence, slot));
                        payload = Some(content);
                    }
                }
                Err(SlotError::Absent) => {}
                Err(error) => damaged.push((store.path(slot), error)),
            }
        }
        Opened {
            store,
            payload,
            damaged,
        }
    }

    /// Every slot.
    pub fn slots(folder: &Path) -> [FoundSlot; SLOTS] {
        std::array::from_fn(|slot| {
            let path = folder.join(slot_name(slot));
            let read = read_slot(&path);
            (path, read)
        })
    }

    /// Writes `payload` over the older slot. After an error the newer slot is what it was.
    ///
    /// # Errors
    ///
    /// Any of the file system's, a full disk among them.
    pub fn write(&mut self, payload: &[u8]) -> io::Result<()> {
        let (sequence, slot) = match self.newest {
            Some((sequence, slot)) => (sequence + 1, 1 - slot),
            None => (1, 0),
        };
        let sequence_bytes = sequence.to_be_bytes();
        let mut checksum = Context::new(&SHA256);
        let signed = [MAGIC, &sequence_bytes, payload];
        for part in signed {
            checksum.update(part);
        }
        let checksum = checksum.finish();
        let [magic, place, payload] = signed;
        write_parts(
            &self.path(slot),
            &[magic, place, payload, checksum.as_ref()],
        )?;
        self.newest = Some((sequence, slot));
        Ok(())
    }

    fn path(&self, slot: usize) -> PathBuf {
        self.folder.join(slot_name(slot))
    }
}

/// The name of a slot's file.
#[must_use]
pub fn slot_name(slot: usize) -> String {
    format!("snapshot.{slot}")
}

/// Where what will be at `path` is written first.
#[must_use]
pub fn temporary(path: &Path) -> PathBuf {
    path.with_extension("tmp")
}

/// Removes the file at `path`, if it is there.
///
/// # Errors
///
/// Any other of the file system's.
pub fn remove_if_there(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Replaces the file at `path` by `content`, or leaves it as it was. Mode 0600.
///
/// # Errors
///
/// Any of the file system's; the temporary file is removed then.
pub fn write_atomically(path: &Path, content: &[u8]) -> io::Result<()> {
    write_parts(path, &[content])
}

fn write_parts(path: &Path, parts: &[&[u8]]) -> io::Result<()> {
    let temporary = temporary(path);
    let written = write_synced(&temporary, parts).and_then(|()| fs::rename(&temporary, path));
    if written.is_err() {
        // The first error is the one that matters; a leftover is overwritten by the next try.
        fs::remove_file(&temporary).ok();
    }
    written?;
    match path.parent() {
        Some(folder) => File::open(folder)?.sync_all(),
        None => Ok(()),
    }
}

fn write_synced(path: &Path, parts: &[&[u8]]) -> io::Result<()> {
    use std::os::unix::fs::OpenOptionsExt as _;
    let mut options = File::options();
    let mut file = options
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)?;
    for part in parts {
        file.write_all(part)?;
    }
    file.sync_all()
}

fn read_slot(path: &Path) -> Result<(u64, Vec<u8>), SlotError> {
    let size = match fs::metadata(path) {
        Ok(metadata) => metadata.len(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(SlotError::Absent),
        Err(error) => return Err(SlotError::Read(error)),
    };
    if size > SLOT_LEN_MAX {
        return Err(SlotError::Damaged("larger than any snapshot may be"));
    }
    parse_slot(fs::read(path).map_err(SlotError::Read)?)
}

fn parse_slot(mut content: Vec<u8>) -> Result<(u64, Vec<u8>), SlotError> {
    let (signed, checksum) = content
        .split_last_chunk::<SHA256_OUTPUT_LEN>()
        .ok_or(SlotError::Damaged("shorter than its checksum"))?;
    if digest(&SHA256, signed).as_ref() != checksum {
        return Err(SlotError::Damaged("checksum does not match"));
    }
    let sequence = signed
        .strip_prefix(MAGIC)
        .and_then(|rest| rest.first_chunk::<8>())
        .ok_or(SlotError::Damaged("not a snapshot of this version"))?;
    let sequence = u64::from_be_bytes(*sequence);
    content.truncate(content.len() - SHA256_OUTPUT_LEN);
    content.drain(..HEADER_LEN);
    Ok((sequence, content))
}

#[cfg(test)]
mod power;

#[cfg(test)]
mod tests {
    use std::{
        env,
        os::unix::{fs::FileExt as _, process::parent_id},
        process::{Child, Command, Stdio},
        thread,
        time::Duration,
    };

    use super::*;

    fn reopen(folder: &Path) -> Option<Vec<u8>> {
        Store::open(folder).payload
    }

    #[test]
    fn the_newest_write_is_what_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let mut store = Store::open(folder.path()).store;
        for text in ["one", "two", "three"] {
            store.write(text.as_bytes()).unwrap();
            assert_eq!(reopen(folder.path()), Some(text.into()));
        }
    }

    #[test]
    fn cutting_the_newest_slot_at_any_byte_leaves_the_state_before() {
        let folder = tempfile::tempdir().unwrap();
        let mut store = Store::open(folder.path()).store;
        store.write(b"old").unwrap();
        store.write(b"new").unwrap();
        let newest = folder.path().join("snapshot.1");
        let whole = fs::read(&newest).unwrap();
        for length in 0..whole.len() {
            fs::write(&newest, whole.get(..length).unwrap()).unwrap();
            assert_eq!(
                reopen(folder.path()),
                Some(b"old".to_vec()),
                "cut at {length}"
            );
        }
    }

    #[test]
    fn losing_power_at_any_byte_of_a_write_leaves_the_state_before() {
        let folder = tempfile::tempdir().unwrap();
        let mut store = Store::open(folder.path()).store;
        store.write(b"old").unwrap();
        let whole = fs::read(folder.path().join("snapshot.0")).unwrap();
        for length in 0..=whole.len() {
            // What was written so far is beside the slots; nobody renamed it.
            fs::write(folder.path().join("snapshot.tmp"), &whole[..length]).unwrap();
            let opened = Store::open(folder.path());
            assert!(opened.damaged.is_empty(), "cut at {length}");
            let before = opened.payload.unwrap();
            // And the next write is not in its way.
            let mut store = opened.store;
            let next = format!("after {length}").into_bytes();
            store.write(&next).unwrap();
            assert_eq!(reopen(folder.path()), Some(next));
            assert_ne!(reopen(folder.path()), Some(before));
        }
    }

    /// What [`a_process_killed_inside_any_write_leaves_the_state_before_or_after`] and `power` run and kill. Says each number in
    /// a file of its own, once the write of it is over.
    #[test]
    fn writer() {
        let (Some(folder), Some(said)) = (
            env::var_os("HOLDFAST_TEST_STORE"),
            env::var_os("HOLDFAST_TEST_SAID"),
        ) else {
            return;
        };
        let said = File::create(said).unwrap();
        let mut store = Store::open(Path::new(&folder)).store;
        let parent = parent_id();
        let mut number = 0_u64;
        while parent_id() == parent {
            number += 1;
            // Of the size of some pages, so that a write is more than one.
            store.write(&number.to_be_bytes().repeat(4_096)).unwrap();
            said.write_all_at(&number.to_be_bytes(), 0).unwrap(); // Whole or not at all.
        }
    }

    /// Killed when it is dropped.
    pub(super) struct Writer {
        pub(super) process: Child,
        said: PathBuf,
    }

    impl Writer {
        /// Writes into `folder`, as what `command` becomes, and has done so once.
        pub(super) fn start(mut command: Command, folder: &Path, said: PathBuf) -> Self {
            command
                .env("HOLDFAST_TEST_STORE", folder)
                .env("HOLDFAST_TEST_SAID", &said);
            let process = command.stdout(Stdio::null()).spawn().unwrap();
            let mut writer = Self { process, said };
            while writer.said() == 0 {
                let ended = writer.process.try_wait().unwrap();
                assert!(ended.is_none(), "{ended:?}");
                thread::sleep(Duration::from_millis(1));
            }
            writer
        }

        /// The last number whose write was over.
        pub(super) fn said(&self) -> u64 {
            let said = fs::read(&self.said).ok();
            let said = said.and_then(|said| said.try_into().ok());
            said.map_or(0, u64::from_be_bytes)
        }
    }

    impl Drop for Writer {
        fn drop(&mut self) {
            self.process.kill().ok();
            self.process.wait().ok();
        }
    }

    /// The number in `folder`, where nothing is damaged.
    pub(super) fn number_in(folder: &Path) -> u64 {
        let opened = Store::open(folder);
        assert!(opened.damaged.is_empty(), "{:?}", opened.damaged);
        let payload = opened.payload.unwrap();
        let (numbers, odd) = payload.as_chunks::<8>();
        assert!(odd.is_empty() && numbers.iter().all(|other| *other == numbers[0]));
        u64::from_be_bytes(numbers[0])
    }

    #[test]
    fn a_process_killed_inside_any_write_leaves_the_state_before_or_after() {
        let (mut between, mut leftovers) = (0, 0);
        for run in 0..60_u64 {
            let folder = tempfile::tempdir().unwrap();
            let mut command = Command::new(env::current_exe().unwrap());
            command.args(["--exact", "store::tests::writer"]);
            let mut writer = Writer::start(command, folder.path(), folder.path().join("said"));
            // Another point of the write each time.
            thread::sleep(Duration::from_micros(997 * run % 7_000));
            writer.process.kill().unwrap();
            writer.process.wait().unwrap();
            leftovers += u32::from(folder.path().join("snapshot.tmp").exists());
            let (number, said) = (number_in(folder.path()), writer.said());
            assert!(
                number == said || number == said + 1,
                "{number}, said {said}"
            );
            between += u32::from(number == said + 1);
        }
        eprintln!(
            "killed with a part written: {leftovers} of 60, and between write and word: {between}"
        );
        assert!(leftovers > 0, "no kill hit a write");
    }

    #[test]
    fn any_changed_byte_is_noticed() {
        let folder = tempfile::tempdir().unwrap();
        let mut store = Store::open(folder.path()).store;
        store.write(b"only").unwrap();
        let slot = folder.path().join("snapshot.0");
        let whole = fs::read(&slot).unwrap();
        for index in 0..whole.len() {
            let mut changed = whole.clone();
            changed[index] ^= 1;
            fs::write(&slot, changed).unwrap();
            let opened = Store::open(folder.path());
            assert!(
                opened.payload.is_none() && opened.damaged.len() == 1,
                "byte {index}"
            );
        }
    }

    #[test]
    fn a_write_that_fails_leaves_the_state_and_no_temporary_file() {
        let folder = tempfile::tempdir().unwrap();
        let mut store = Store::open(folder.path()).store;
        store.write(b"old").unwrap();
        fs::create_dir(folder.path().join("snapshot.1")).unwrap(); // Renaming over it fails.
        store.write(b"new").unwrap_err();
        assert_eq!(reopen(folder.path()), Some(b"old".to_vec()));
        assert!(!folder.path().join("snapshot.tmp").exists());
    }
}
