//! Policy at a pod's interface, from before its first packet on.
//!
//! The agent leaves in bpffs what it enforces now, for as long as it enforces anything, and a file in the shared folder
//! that says so also after the machine started anew, when bpffs is empty and no agent ran yet.

use std::path::Path;

use ebpf_loader::{
    BPFFS, PinsError,
    guard::{self, GuardError},
};
use mesh_api::cni::{HostInterface, POLICY_FILE};
use mesh_linux::IfIndex;

use crate::{
    error::{CniError, Code},
    store::LOCK_WAIT,
};

/// Has what the node's end of a new pod's interface carries judged by the policies that hold. In the namespace of the
/// calling thread, the node's; it may be a port of `bridge`. Without policies there is nothing to do.
///
/// # Errors
///
/// [`Code::TryAgain`] if there are policies, and no agent loaded them since the machine started; [`Code::Kernel`].
pub fn guard(state_dir: &Path, link: IfIndex, bridge: Option<IfIndex>) -> Result<(), CniError> {
    let bridge = bridge.map(|bridge| bridge.0);
    match guard::attach(Path::new(BPFFS), link.0, bridge, LOCK_WAIT) {
        Ok(true) => Ok(()),
        Ok(false) => ready(state_dir),
        Err(error) => {
            let code = match error {
                GuardError::Pins(PinsError::InUse(_)) => Code::TryAgain,
                GuardError::Pins(_)
                | GuardError::Published { .. }
                | GuardError::Interface(_)
                | GuardError::Attach { .. } => Code::Kernel,
            };
            Err(CniError::from_error(code, &error))
        }
    }
}

/// Whether [`guard`] would find what is to be enforced.
///
/// # Errors
///
/// [`Code::TryAgain`] if there are policies, and no agent loaded them since the machine started.
pub fn ready(state_dir: &Path) -> Result<(), CniError> {
    let said = state_dir.join(POLICY_FILE);
    if !said.exists() || guard::is_published(Path::new(BPFFS)) {
        return Ok(());
    }
    let message = format!(
        "{} says that policies are enforced on this node, but its agent did not load them since the machine started",
        said.display()
    );
    Err(CniError::new(Code::TryAgain, message)
        .with("pods are connected once the agent runs; if it is gone for good, remove the file"))
}

/// Lets go of what the agent keeps in bpffs for an interface that is gone, where it does not run to do so itself.
pub fn forget(host: Option<&HostInterface>) {
    if let Some(index) = host.and_then(|host| IfIndex::new(host.index)) {
        guard::forget(Path::new(BPFFS), index.0);
    }
}
