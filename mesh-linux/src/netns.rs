//! Network namespaces: run a piece of work in another one.

use std::{
    fs::File,
    io,
    os::fd::AsFd,
    path::{Path, PathBuf},
    thread,
};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

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
    let namespace = File::open(path)?;
    thread::scope(|scope| {
        let inside = scope.spawn(move || {
            enter(&namespace)?;
            Ok(work())
        });
        inside
            .join()
            .unwrap_or_else(|_| Err(io::Error::other("the work in the namespace panicked")))
    })
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
