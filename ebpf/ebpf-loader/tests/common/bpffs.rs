//! A bpffs of its own for a test.

use rustix::{
    mount::{MountFlags, MountPropagationFlags, mount, mount_change},
    thread::{UnshareFlags, unshare_unsafe},
};

/// Mounts one for the calling thread and those that it starts: it ends with them, and with it all
/// names in it.
pub(crate) fn new_bpffs() {
    #[expect(unsafe_code, reason = "rustix guards against sharing file tables")]
    // SAFETY: the file table stays shared: only the mount table changes, with the working directory.
    unsafe { unshare_unsafe(UnshareFlags::NEWNS) }.unwrap();
    mount_change(
        "/",
        MountPropagationFlags::PRIVATE | MountPropagationFlags::REC,
    )
    .unwrap();
    mount("bpf", ebpf_loader::BPFFS, "bpf", MountFlags::empty(), None).unwrap();
}
