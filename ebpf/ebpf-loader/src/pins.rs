//! What outlives the process: maps and links with a name in bpffs.
//!
//! The kernel keeps a map with its entries, and a link with its program, while they have a name there.
//! So the services go on while no agent runs, and the next one takes over: [`Services::take_over`]. A
//! map of the object is kept if its name begins with `hf_`, and a link if it came by [`Keeper::keep`];
//! nothing else is to be done for another one.
//!
//! The folder is `holdfast/<cgroup>_<network namespace>`, by their inode numbers: of a machine's agent
//! they stay the same from start to start, and two agents of one kernel do not share them. Policy has one of its
//! own, `holdfast/policy_<network namespace>`, with links, and what [`crate::guard`] attaches to new pods.
//!
//! [`Services::take_over`]: crate::Services::take_over

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    io::{self, ErrorKind},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use aya::{
    EbpfError, EbpfLoader,
    maps::{MapInfo, MapType},
    pin::PinError,
    programs::{
        ProgramError,
        links::{FdLink, PinnedLink},
    },
};
use aya_obj::{Object, generated::bpf_map_type};
use ebpf_abi::MAPS_VERSION;
use rustix::{
    fs::{FlockOperation, flock, fstatfs},
    io::Errno,
};

use crate::{
    cgroup::{CgroupError, open_cgroup2},
    guard::{self, Turn},
    sockmap,
};

/// Where bpffs is, on every machine that has it mounted.
pub const BPFFS: &str = "/sys/fs/bpf";

/// `BPF_FS_MAGIC` of `linux/magic.h`.
const BPF_FS_MAGIC: u64 = 0xcafe_4a11;

const OWN_FOLDER: &str = "holdfast";
const LINKS: &str = "links";
const PUBLISHED: &str = "published";
const MAPS_PREFIX: &str = "maps_";

/// Of the maps that are kept. Others (constants, for one) belong to one load of the programs.
const KEPT_PREFIX: &str = "hf_";

/// `BPF_F_RDONLY_PROG`: the kernel adds it to maps of devices by itself.
const READ_ONLY_FOR_PROGRAMS: u32 = 1 << 7;

/// How often a lock that somebody else has is asked for again. It is held for less.
const LOOK_AGAIN: Duration = Duration::from_millis(1);

/// Of a link that is about to take its name. A dot is not allowed in bpffs.
const NEW_SUFFIX: &str = "-new";

/// A folder in bpffs that is this process' alone, until it ends.
#[derive(Debug, Clone)]
pub struct Pins {
    folder: PathBuf,
    /// The folder, locked: the kernel unlocks it at the end of the process.
    _lock: Arc<File>,
}

/// Why nothing can be kept.
#[derive(Debug, thiserror::Error)]
pub enum PinsError {
    /// The path is not in a bpffs.
    #[error(
        "{} is no bpffs: mount it (mount -t bpf bpf {BPFFS}), in a container as a hostPath",
        .0.display()
    )]
    NotMounted(PathBuf),
    /// Another process has the folder.
    #[error("{} is in use: does another agent run for this cgroup?", .0.display())]
    InUse(PathBuf),
    /// The cgroup has no number.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// Something else.
    #[error("cannot {doing} {}", path.display())]
    Io {
        /// What was attempted.
        doing: &'static str,
        /// With what.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
}

impl Pins {
    /// The folder of the agent for `cgroup` in the calling thread's network namespace, made if it is
    /// not there.
    ///
    /// # Errors
    ///
    /// [`PinsError`]. Without pins the services work all the same, but end with the process.
    pub fn open(bpffs: &Path, cgroup: &Path) -> Result<Self, PinsError> {
        let number = open_cgroup2(cgroup)?.metadata().map(|found| found.ino());
        let number = number.map_err(|error| failed("look at", cgroup, error))?;
        Self::lock(bpffs, &number.to_string())
    }

    /// The folder for policy in the calling thread's network namespace, made if it is not there.
    ///
    /// # Errors
    ///
    /// [`PinsError`]. Without pins policy works all the same, but ends with the process.
    pub fn of_policy(bpffs: &Path) -> Result<Self, PinsError> {
        Self::lock(bpffs, "policy")
    }

    fn lock(bpffs: &Path, of: &str) -> Result<Self, PinsError> {
        let not_mounted = || PinsError::NotMounted(bpffs.to_owned());
        let root = File::open(bpffs).map_err(|_absent| not_mounted())?;
        let filesystem = fstatfs(&root).map_err(|errno| failed("look at", bpffs, errno.into()))?;
        if u64::try_from(filesystem.f_type) != Ok(BPF_FS_MAGIC) {
            return Err(not_mounted());
        }
        let folder = bpffs.join(OWN_FOLDER).join(own_name(of)?);
        make_folder(&folder)?;
        let lock = File::open(&folder).map_err(|error| failed("open", &folder, error))?;
        match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Self {
                folder,
                _lock: Arc::new(lock),
            }),
            Err(Errno::WOULDBLOCK) => Err(PinsError::InUse(folder)),
            Err(errno) => Err(failed("lock", &folder, errno.into())),
        }
    }

    /// The folder.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Where an agent of the calling thread's network namespace leaves what others attach.
    pub(crate) fn published_folder(bpffs: &Path) -> Result<PathBuf, PinsError> {
        let folder = bpffs.join(OWN_FOLDER).join(own_name("policy")?);
        Ok(folder.join(PUBLISHED))
    }

    /// Takes away the name of a link in the folder for policy, of a process that need not run any more.
    pub(crate) fn forget_of_policy(bpffs: &Path, link: &str) {
        let Ok(own) = own_name("policy") else {
            return;
        };
        let path = bpffs.join(OWN_FOLDER).join(own).join(LINKS).join(link);
        let mut problems = Vec::new();
        remove_file(&path, &mut problems);
        tell(problems);
    }

    /// The folder of [`Self::published_folder`], and the right to attach what is in it.
    /// `None`: there is none. It may be withdrawn by now.
    ///
    /// # Errors
    ///
    /// [`PinsError::InUse`] if others have it for all of `wait`, and others.
    pub(crate) fn published_in(
        bpffs: &Path,
        wait: Duration,
    ) -> Result<Option<(PathBuf, Turn)>, PinsError> {
        let folder = Self::published_folder(bpffs)?;
        let file = match File::open(&folder) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            file => file.map_err(|error| failed("open", &folder, error))?,
        };
        let limit = Instant::now() + wait;
        loop {
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => return Ok(Some((folder, file))),
                Err(Errno::WOULDBLOCK) if Instant::now() < limit => thread::sleep(LOOK_AGAIN),
                Err(Errno::WOULDBLOCK) => return Err(PinsError::InUse(folder)),
                Err(errno) => return Err(failed("lock", &folder, errno.into())),
            }
        }
    }

    /// The right to change what others attach; `None`: they cannot be kept from it.
    pub(crate) fn turn(&self) -> Option<Turn> {
        let folder = self.folder.join(PUBLISHED);
        let taken = make_folder(&folder).and_then(|()| {
            let file = File::open(&folder).map_err(|error| failed("open", &folder, error))?;
            let locked = flock(&file, FlockOperation::LockExclusive);
            locked.map_err(|errno| failed("lock", &folder, errno.into()))?;
            Ok(file)
        });
        taken.map_err(|error| tell(vec![error])).ok()
    }

    /// Gives something a name among what others attach, in the place of what had it.
    pub(crate) fn publish(
        &self,
        name: &str,
        pin: impl FnOnce(&Path) -> Result<(), PinError>,
    ) -> Result<(), PinsError> {
        let folder = self.folder.join(PUBLISHED);
        let path = folder.join(name);
        let new = folder.join(format!("{name}{NEW_SUFFIX}"));
        fs::remove_file(&new).ok(); // Of a process that was killed right here.
        pin(&new).map_err(|error| failed("make", &path, io::Error::other(error)))?;
        fs::rename(&new, &path).map_err(|error| failed("make", &path, error))
    }

    /// Takes all those names away.
    pub(crate) fn unpublish(&self) {
        let mut problems = Vec::new();
        remove_folder(&self.folder.join(PUBLISHED), &mut problems);
        tell(problems);
    }

    /// Ends the services that an earlier process left: its programs leave, its maps are freed. Returns
    /// what could not be removed.
    #[must_use]
    pub fn remove(self) -> Vec<PinsError> {
        let mut problems = Vec::new();
        // Programs before the maps that they read.
        if self.folder.join(PUBLISHED).exists() {
            guard::withdraw(&self);
        }
        remove_folder(&self.folder.join(LINKS), &mut problems);
        for folder in self.maps_folders() {
            sockmap::leave_at(&folder);
            remove_folder(&folder, &mut problems);
        }
        remove_folder(&self.folder, &mut problems);
        if let Some(all) = self.folder.parent() {
            fs::remove_dir(all).ok(); // Other agents' folders may be in it.
        }
        problems
    }

    /// Lets the maps of `shapes` that an earlier process left be the ones of this load, and keeps
    /// those that are made. All or none: maps refer to each other.
    pub(crate) fn keep_maps<'a>(
        &self,
        shapes: &'a Shapes,
        loader: &mut EbpfLoader<'a>,
    ) -> Result<(), PinsError> {
        let folder = self.maps_folder();
        make_folder(&folder)?;
        let other = shapes.0.iter().find_map(|(name, wanted)| {
            let found = MapInfo::from_pin(folder.join(name)).ok()?;
            let found = Shape::of(&found);
            (found != *wanted).then_some((name, found, wanted))
        });
        if let Some((map, found, wanted)) = other {
            tracing::warn!(
                map,
                ?found,
                ?wanted,
                "the maps left by another version or configuration are replaced: what they remember \
                 of flows and clients is lost"
            );
            let mut problems = Vec::new();
            sockmap::leave_at(&folder);
            remove_files(&folder, &mut problems);
            if let Some(problem) = problems.pop() {
                return Err(problem);
            }
        }
        for name in shapes.0.keys() {
            loader.map_pin_path(name, folder.join(name));
        }
        Ok(())
    }

    /// Frees the maps of earlier versions that no map of `shapes` replaced. Their programs may go on
    /// with them until they are replaced.
    pub(crate) fn forget_maps(&self, shapes: &Shapes) {
        let mut problems = Vec::new();
        let own = self.maps_folder();
        for folder in self.maps_folders() {
            if folder != own {
                tracing::info!(folder = %folder.display(), "maps of another version are not taken over");
                sockmap::leave_at(&folder);
                remove_folder(&folder, &mut problems);
            }
        }
        for name in names_in(&own) {
            if !shapes.0.contains_key(&name) {
                remove_file(&own.join(name), &mut problems);
            }
        }
        tell(problems);
    }

    fn maps_folder(&self) -> PathBuf {
        self.folder.join(format!("{MAPS_PREFIX}{MAPS_VERSION}"))
    }

    fn maps_folders(&self) -> Vec<PathBuf> {
        let names = names_in(&self.folder).into_iter();
        let maps = names.filter(|name| name.starts_with(MAPS_PREFIX));
        maps.map(|name| self.folder.join(name)).collect()
    }
}

/// What a map is, as far as another version's programs could not use it if it were different.
#[derive(Debug, PartialEq)]
struct Shape {
    kind: Option<MapType>,
    key_bytes: u32,
    value_bytes: u32,
    entries: u32,
    flags: u32,
}

impl Shape {
    fn of(found: &MapInfo) -> Self {
        Self {
            kind: found.map_type().ok(),
            key_bytes: found.key_size(),
            value_bytes: found.value_size(),
            entries: found.max_entries(),
            flags: found.map_flags() & !READ_ONLY_FOR_PROGRAMS,
        }
    }
}

/// Of the maps to be kept, by name.
#[derive(Debug)]
pub(crate) struct Shapes(BTreeMap<String, Shape>);

impl Shapes {
    /// Of a compiled object, where maps in `single` have one entry.
    pub(crate) fn of_object(object: &[u8], single: &[&str]) -> Result<Self, EbpfError> {
        let object = Object::parse(object)?;
        let kept = object.maps.iter();
        let kept = kept.filter(|(name, _)| name.starts_with(KEPT_PREFIX));
        let shape = |(name, map): (&String, &aya_obj::Map)| {
            let entries = if single.contains(&name.as_str()) {
                1
            } else {
                map.max_entries()
            };
            let kind = bpf_map_type::try_from(map.map_type()).ok();
            let shape = Shape {
                kind: kind.and_then(|kind| MapType::try_from(kind).ok()),
                key_bytes: map.key_size(),
                value_bytes: map.value_size(),
                entries,
                flags: map.map_flags() & !READ_ONLY_FOR_PROGRAMS,
            };
            (name.clone(), shape)
        };
        Ok(Self(kept.map(shape).collect()))
    }
}

/// Keeps links, if there is where.
#[derive(Debug, Default)]
pub(crate) struct Keeper {
    pins: Option<Pins>,
    /// Links of this process. Others were left by an earlier one.
    claimed: BTreeSet<String>,
}

/// A link. Dropped, it stays if it has a name in bpffs, else it detaches its program.
#[derive(Debug)]
pub(crate) struct KeptLink {
    link: FdLink,
    pin: Option<PathBuf>,
}

impl KeptLink {
    /// The kernel's number for its program.
    pub(crate) fn program_id(&self) -> Option<u32> {
        self.link.info().ok().map(|info| info.program_id())
    }

    /// Whether it has its name still; `None`: it never had one.
    pub(crate) fn is_pinned(&self) -> Option<bool> {
        self.pin.as_ref().map(|pin| pin.exists())
    }

    /// Detaches the program.
    pub(crate) fn remove(self) {
        let mut problems = Vec::new();
        if let Some(pin) = &self.pin {
            remove_file(pin, &mut problems);
        }
        drop(self.link);
        tell(problems);
    }
}

impl Keeper {
    pub(crate) fn new(pins: Option<Pins>) -> Self {
        Self {
            pins,
            claimed: BTreeSet::new(),
        }
    }

    pub(crate) fn pins(&self) -> Option<&Pins> {
        self.pins.as_ref()
    }

    /// Keeps a new link by a name. The one that had the name is let go only now.
    pub(crate) fn keep(&mut self, name: &str, link: FdLink) -> Result<KeptLink, ProgramError> {
        let Some(pins) = &self.pins else {
            return Ok(KeptLink { link, pin: None });
        };
        let folder = pins.folder.join(LINKS);
        make_folder(&folder).map_err(|error| ProgramError::IOError(io::Error::other(error)))?;
        let pin = folder.join(name);
        let new = folder.join(format!("{name}{NEW_SUFFIX}"));
        fs::remove_file(&new).ok(); // Of a process that was killed right here.
        let link = link.pin(&new).map_err(|error| match error {
            PinError::SyscallError(error) => ProgramError::SyscallError(error),
            error @ (PinError::NoFd { .. } | PinError::InvalidPinPath { .. }) => {
                ProgramError::IOError(io::Error::other(error))
            }
        })?;
        fs::rename(&new, &pin).map_err(ProgramError::IOError)?;
        self.claimed.insert(name.to_owned());
        Ok(KeptLink {
            link: link.into(),
            pin: Some(pin),
        })
    }

    /// The link of this name, if an earlier process left one.
    pub(crate) fn found(&self, name: &str) -> Option<FdLink> {
        let folder = self.pins.as_ref()?.folder.join(LINKS);
        PinnedLink::from_pin(folder.join(name)).ok().map(Into::into)
    }

    /// The link that was [`found`](Self::found) is this process' from now on.
    pub(crate) fn claim(&mut self, name: &str, link: FdLink) -> KeptLink {
        self.claimed.insert(name.to_owned());
        let pin = self.pins.as_ref();
        KeptLink {
            link,
            pin: pin.map(|pins| pins.folder.join(LINKS).join(name)),
        }
    }

    /// Detaches what an earlier process left under names with this beginning, and this process did
    /// not claim. Returns how many.
    pub(crate) fn forget(&mut self, prefix: &str) -> usize {
        let Some(pins) = &self.pins else {
            return 0;
        };
        let folder = pins.folder.join(LINKS);
        let mut problems = Vec::new();
        let names = names_in(&folder).into_iter();
        let stale = names.filter(|name| name.starts_with(prefix) && !self.claimed.contains(name));
        let removed = stale.map(|name| remove_file(&folder.join(name), &mut problems));
        let removed = removed.count();
        tell(problems);
        removed
    }
}

/// The name of a folder of the calling thread's network namespace.
fn own_name(of: &str) -> Result<String, PinsError> {
    let namespace = Path::new("/proc/thread-self/ns/net");
    let found = fs::metadata(namespace).map_err(|error| failed("look at", namespace, error))?;
    Ok(format!("{of}_{}", found.ino()))
}

/// With its parent, which others may make at the same time.
fn make_folder(folder: &Path) -> Result<(), PinsError> {
    fs::create_dir_all(folder).map_err(|error| failed("make", folder, error))
}

fn names_in(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut names: Vec<_> = entries
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect();
    names.sort_unstable();
    names
}

fn remove_files(folder: &Path, problems: &mut Vec<PinsError>) {
    for name in names_in(folder) {
        remove_file(&folder.join(name), problems);
    }
}

fn remove_file(path: &Path, problems: &mut Vec<PinsError>) {
    note("remove", path, fs::remove_file(path), problems);
}

/// With the files in it.
fn remove_folder(folder: &Path, problems: &mut Vec<PinsError>) {
    remove_files(folder, problems);
    note("remove", folder, fs::remove_dir(folder), problems);
}

fn note(doing: &'static str, path: &Path, result: io::Result<()>, problems: &mut Vec<PinsError>) {
    match result {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            problems.push(failed(doing, path, error));
        }
        Ok(()) | Err(_) => {}
    }
}

fn tell(problems: Vec<PinsError>) {
    for problem in problems {
        let error: &dyn std::error::Error = &problem;
        tracing::warn!(error, "something of an earlier agent stays in bpffs");
    }
}

fn failed(doing: &'static str, path: &Path, source: io::Error) -> PinsError {
    PinsError::Io {
        doing,
        path: path.to_owned(),
        source,
    }
}
