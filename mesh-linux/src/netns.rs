//! Network namespaces: run a piece of work in another one.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io,
    os::{fd::AsFd, unix::fs::MetadataExt as _},
    path::{Path, PathBuf},
    thread,
};

use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space, unshare_unsafe};

/// Where `ip netns add` puts the names.
pub const NAMED_DIR: &str = "/run/netns";

/// The path of the namespace that `ip netns` calls `name`.
#[must_use]
pub fn named(name: &str) -> PathBuf {
    Path::new(NAMED_DIR).join(name)
}

/// Runs `work` on a new thread inside the network namespace at `path` and returns what it
/// returns. Sockets and TUN devices that it opens stay in that namespace and work from anywhere.
///
/// # Errors
///
/// If `path` cannot be opened or is not a network namespace, if the caller may not enter it
/// (`CAP_SYS_ADMIN`), or if `work` panicked.
pub fn run_in<T: Send>(path: &Path, work: impl FnOnce() -> T + Send) -> io::Result<T> {
    run_inside(&File::open(path)?, work)
}

/// As [`run_in`], for a namespace that is open.
///
/// # Errors
///
/// As [`run_in`].
pub fn run_inside<T: Send>(namespace: &File, work: impl FnOnce() -> T + Send) -> io::Result<T> {
    thread::scope(|scope| {
        let inside = scope.spawn(move || {
            enter(namespace)?;
            Ok(work())
        });
        inside
            .join()
            .unwrap_or_else(|_| Err(io::Error::other("the work in the namespace panicked")))
    })
}

/// Most namespaces that [`all`] looks for: a pod has one, and a node at most some hundred pods.
pub const NAMESPACES_MAX: usize = 4_096;

/// The network namespaces that a process is in, as far as `/proc` shows them, or that have a name
/// ([`NAMED_DIR`]), each once; no more than [`NAMESPACES_MAX`].
///
/// # Errors
///
/// If `/proc` cannot be read.
pub fn all() -> io::Result<Vec<File>> {
    let processes = fs::read_dir("/proc")?.flatten();
    let processes = processes.filter(|entry| {
        let name = entry.file_name();
        name.as_encoded_bytes().iter().all(u8::is_ascii_digit)
    });
    let of_processes = processes.map(|entry| entry.path().join("ns/net"));
    // Nobody made a name yet.
    let named = fs::read_dir(NAMED_DIR).into_iter().flatten().flatten();
    let named = named.map(|entry| entry.path());
    let nsfs = fs::metadata("/proc/self/ns/net")?.dev();
    let mut found = BTreeMap::new();
    for path in of_processes.chain(named) {
        // It may be gone by now.
        let Ok(namespace) = File::open(&path) else {
            continue;
        };
        // A name is a plain file before its namespace is mounted there, and after.
        match namespace.metadata() {
            Ok(metadata) if metadata.dev() == nsfs => {
                found.entry(metadata.ino()).or_insert(namespace);
            }
            Ok(_) | Err(_) => {}
        }
        if found.len() == NAMESPACES_MAX {
            break;
        }
    }
    Ok(found.into_values().collect())
}

/// Makes a network namespace with nothing in it but a loopback that is down. It has no name, and ends with the last
/// that uses it; until then `/proc/<pid>/fd/<number>` of the file is its path.
///
/// # Errors
///
/// If the caller may not (`CAP_SYS_ADMIN`), or the kernel has no room for one more.
pub fn make() -> io::Result<File> {
    thread::scope(|scope| {
        let inside = scope.spawn(|| {
            unshare_network()?;
            File::open("/proc/thread-self/ns/net")
        });
        inside
            .join()
            .unwrap_or_else(|_| Err(io::Error::other("the thread of the new namespace panicked")))
    })
}

/// Moves the calling thread, and no other, into a new network namespace.
#[expect(
    unsafe_code,
    reason = "rustix marks unshare unsafe for its CLONE_FILES flag"
)]
fn unshare_network() -> io::Result<()> {
    // SAFETY: `NEWNET` leaves the file descriptor table alone.
    unsafe { unshare_unsafe(UnshareFlags::NEWNET) }.map_err(Into::into)
}

/// Moves the calling thread, and no other, into a network namespace.
///
/// # Errors
///
/// If `namespace` is not a network namespace, or the caller may not enter it.
pub fn enter(namespace: impl AsFd) -> io::Result<()> {
    move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))?;
    Ok(())
}
