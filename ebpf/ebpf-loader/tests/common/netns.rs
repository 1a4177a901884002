//! Network namespaces for tests.

use std::process::Command;

use rustix::thread::{UnshareFlags, unshare_unsafe};

/// Moves the test's thread to another, with loopback only.
pub(crate) fn new_network_namespace() {
    #[expect(unsafe_code, reason = "rustix guards against sharing file tables")]
    // SAFETY: the file table stays shared: only the network namespace changes.
    unsafe { unshare_unsafe(UnshareFlags::NEWNET) }.unwrap();
    ip(&["link", "set", "lo", "up"]);
}

/// In the thread's network namespace.
#[track_caller]
pub(crate) fn ip(arguments: &[&str]) {
    let status = Command::new("ip").args(arguments).status();
    let status = status.expect("no ip command: apt-get install iproute2");
    assert!(status.success(), "ip {arguments:?}");
}
