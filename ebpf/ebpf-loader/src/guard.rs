//! Pods that are new: guarded by whoever makes their interface, before it carries a packet.
//!
//! The agent notices an interface some 20 ms after it is there, and not at all while it does not run. So it publishes the
//! programs that hold now ([`crate::policy::Policy::attach_pods`]), under names in bpffs, and the CNI plug-in attaches
//! them: as filters of the interface's `clsact` qdisc, which need no name, end with the interface, and take tens of
//! microseconds. The agent's own place is tcx, where each change waits until no processor is in the old programs any
//! more: 5 to 16 ms under a lock that all interfaces of the network namespace share, too long for many pods at once.
//! When the agent comes to know the pod, it attaches its own first and then takes the filters away.
//!
//! Who publishes, withdraws, attaches or takes away has the folder locked: nobody attaches what was just withdrawn.

use std::{
    fs::{self, File},
    io::{self, ErrorKind},
    num::NonZeroU32,
    path::{Path, PathBuf},
    time::Duration,
};

use aya::{
    Ebpf,
    maps::{HashMap, Map, MapData, MapError, xdp::DevMapHash},
    programs::{
        ProgramError, SchedClassifier, TcAttachType, TcError,
        tc::{NlOptions, TcAttachOptions, TcHandle, qdisc_add_clsact, qdisc_detach_program},
    },
};

use crate::{InterfaceError, Pins, PinsError, packets::interface_name, program};

/// At pods' interfaces, between the services' programs and all others.
pub(crate) const PROGRAMS: [(&str, TcAttachType); 2] = [
    ("hf_policy_from", TcAttachType::Ingress),
    ("hf_policy_to", TcAttachType::Egress),
];

/// What names of links begin with.
pub(crate) const LINKS: &str = "policy_";

/// Of the interfaces that have them.
pub(crate) const PODS: &str = "hf_pol_pods";

/// Of those that are a bridge's port, the bridge.
pub(crate) const BRIDGES: &str = "hf_pol_bridges";

/// Ours alone among filters: whoever finds the place taken knows by whom. Before most others.
const PRIORITY: u16 = 7;
const HANDLE: u32 = 1;

/// Why a new pod's interface is not guarded.
#[derive(Debug, thiserror::Error)]
pub enum GuardError {
    /// The names in bpffs.
    #[error(transparent)]
    Pins(#[from] PinsError),
    /// What an agent published cannot be used.
    #[error("cannot use {}, which the agent left for new pods", path.display())]
    Published {
        /// Which.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The kernel does not know the interface.
    #[error(transparent)]
    Interface(#[from] InterfaceError),
    /// The kernel does not take the programs as filters.
    #[error(
        "cannot attach {program} to {interface}, which needs clsact and cls_bpf (CONFIG_NET_CLS_BPF)"
    )]
    Attach {
        /// The program.
        program: &'static str,
        /// The interface's name.
        interface: String,
        /// What the kernel said.
        source: ProgramError,
    },
}

/// Attaches what an agent of this network namespace published to a new pod's interface, which may be down, and may be
/// a port of `bridge`. Returns
/// whether anything is: `false` if none enforces anything, or none ran since the machine started. Waits at most for
/// `wait` for others that do the same.
///
/// # Errors
///
/// [`GuardError`]. What is attached then ends with the interface.
pub fn attach(
    bpffs: &Path,
    index: NonZeroU32,
    bridge: Option<NonZeroU32>,
    wait: Duration,
) -> Result<bool, GuardError> {
    let Some((folder, _turn)) = Pins::published_in(bpffs, wait)? else {
        return Ok(false);
    };
    if !folder.join(PODS).exists() {
        return Ok(false); // It was withdrawn while this one waited.
    }
    let unusable = |name: &str, error: io::Error| GuardError::Published {
        path: folder.join(name),
        source: error,
    };
    let interface = interface_name(index)?;
    // First: it is to be known as the home of its addresses before anybody has them.
    let known = know(&folder.join(PODS), index);
    known.map_err(|error| unusable(PODS, io::Error::other(error)))?;
    if let Some(bridge) = bridge {
        let known = know_bridge(&folder.join(BRIDGES), index, bridge);
        known.map_err(|error| unusable(BRIDGES, io::Error::other(error)))?;
    }
    for (name, way) in PROGRAMS {
        if has_agents(name, &interface, way) {
            continue;
        }
        let program = SchedClassifier::from_pin(folder.join(name));
        let mut program = program.map_err(|error| unusable(name, io::Error::other(error)))?;
        let attached = add_filter(&mut program, &interface, way);
        attached.map_err(|source| GuardError::Attach {
            program: name,
            interface: interface.clone(),
            source,
        })?;
    }
    Ok(true)
}

/// Whether there is anything that [`attach`] would attach.
#[must_use]
pub fn is_published(bpffs: &Path) -> bool {
    Pins::published_folder(bpffs).is_ok_and(|folder| folder.join(PODS).exists())
}

/// Takes away the names that an agent, which need not run any more, gave to its links at an interface that is gone.
pub fn forget(bpffs: &Path, index: NonZeroU32) {
    if interface_name(index).is_ok() {
        return;
    }
    for (name, _) in PROGRAMS {
        Pins::forget_of_policy(bpffs, &format!("{LINKS}{index}_{name}"));
    }
}

fn know(pods: &Path, index: NonZeroU32) -> Result<(), MapError> {
    let pods = MapData::from_pin(pods).and_then(Map::from_map_data)?;
    let mut pods: DevMapHash<MapData> = pods.try_into()?;
    let known = pods.insert(index.get(), index.get(), None, 0);
    known.map_err(|error| MapError::IoError(io::Error::other(error)))
}

fn know_bridge(bridges: &Path, port: NonZeroU32, bridge: NonZeroU32) -> Result<(), MapError> {
    let bridges = MapData::from_pin(bridges).and_then(Map::from_map_data)?;
    let mut bridges: HashMap<MapData, u32, u32> = bridges.try_into()?;
    bridges.insert(port.get(), bridge.get(), 0)
}

/// Whether the agent was there before.
fn has_agents(name: &str, interface: &str, way: TcAttachType) -> bool {
    let there = SchedClassifier::query_tcx(interface, way);
    there.is_ok_and(|(_, there)| there.iter().any(|one| one.name_as_str() == Some(name)))
}

fn add_filter(
    program: &mut SchedClassifier,
    interface: &str,
    way: TcAttachType,
) -> Result<(), ProgramError> {
    match qdisc_add_clsact(interface) {
        Err(error) if !is_kind(&error, ErrorKind::AlreadyExists) => return Err(error.into()),
        Ok(()) | Err(_) => {}
    }
    let options = NlOptions {
        priority: PRIORITY,
        handle: TcHandle::from(HANDLE),
        classid: None,
    };
    match program.attach_with_options(interface, way, TcAttachOptions::Netlink(options)) {
        Ok(link) => {
            // It goes with the interface, or by `release`.
            std::mem::forget(program.take_link(link)?);
            Ok(())
        }
        Err(ProgramError::TcError(error)) if is_kind(&error, ErrorKind::AlreadyExists) => Ok(()),
        Err(error) => Err(error),
    }
}

fn is_kind(error: &TcError, kind: ErrorKind) -> bool {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(error) = cause {
        let found = error.downcast_ref::<io::Error>();
        if found.is_some_and(|error| error.kind() == kind) {
            return true;
        }
        cause = error.source();
    }
    false
}

/// Takes the filters away, where the agent's own programs are by now or nothing is to be enforced any more. What is
/// not there is fine.
pub(crate) fn release(interface: &str) {
    for (name, way) in PROGRAMS {
        match qdisc_detach_program(interface, way, name) {
            Err(error) if !is_kind(&error, ErrorKind::NotFound) => {
                let error: &dyn std::error::Error = &error;
                tracing::debug!(error, interface, "no filters of new pods are looked for");
            }
            Ok(()) | Err(_) => {}
        }
    }
}

/// Lets others attach these. Who calls has the folder locked.
pub(crate) fn publish(pins: &Pins, ebpf: &mut Ebpf) -> Result<(), PinsError> {
    let lacks = |name: &str| PinsError::Io {
        doing: "find in the object",
        path: name.into(),
        source: ErrorKind::NotFound.into(),
    };
    for (name, _) in PROGRAMS {
        let found: Result<&mut SchedClassifier, _> = program(ebpf, name);
        let found = found.map_err(|_other| lacks(name))?;
        pins.publish(name, |path| found.pin(path))?;
    }
    // `PODS` is the last: where it is, all are.
    for name in [BRIDGES, PODS] {
        let map = ebpf.map(name).ok_or_else(|| lacks(name))?;
        pins.publish(name, |path| map.pin(path))?;
    }
    Ok(())
}

/// Lets nobody attach anything any more, and takes away what was attached and the agent did not make its own.
pub(crate) fn withdraw(pins: &Pins) {
    let Some(_turn) = pins.turn() else {
        return;
    };
    pins.unpublish();
    interfaces().iter().for_each(|name| release(name));
}

/// All names of interfaces in the calling thread's network namespace.
fn interfaces() -> Vec<String> {
    let text = fs::read_to_string("/proc/thread-self/net/dev").unwrap_or_default();
    let names = text.lines().filter_map(|line| line.split_once(':'));
    names.map(|(name, _)| name.trim().to_owned()).collect()
}

/// The right to change what is published and attached, until it is dropped.
pub(crate) type Turn = File;
