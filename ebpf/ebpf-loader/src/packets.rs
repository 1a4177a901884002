//! The packet level: services for packets that no local socket made, on interfaces behind which
//! such clients are.

use std::{collections::BTreeMap, num::NonZeroU32, path::Path};

use aya::{
    Ebpf, EbpfLoader,
    maps::MapError,
    programs::{
        LinkOrder, ProgramError, SchedClassifier, TcAttachType,
        tc::{SchedClassifierLink, TcAttachOptions},
    },
};
use ebpf_abi::PacketCounter;
use rustix::{
    io::Errno,
    net::{AddressFamily, SocketFlags, SocketType, netdevice, socket_with},
};

use crate::{LoadError, Services, rejected};

const COUNTERS: &str = "hf_pkt_counters";

/// Of one entry where no packets are looked at: maps of this kind take all their memory at once.
const FLOW_MAPS: [&str; 3] = ["hf_tracked", "hf_answers", "hf_fragmented"];

/// What an interface's packets begin with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LinkHeader {
    /// Ethernet's header.
    Ethernet,
    /// The IP header: TUN devices and IP tunnels.
    Ip,
}

impl LinkHeader {
    const ALL: [Self; 2] = [Self::Ethernet, Self::Ip];

    /// In the order of attaching: what shows the service's address comes before what hides it.
    const fn programs(self) -> [(&'static str, TcAttachType); 2] {
        let [answers, requests] = match self {
            Self::Ethernet => ["hf_answers_out", "hf_requests"],
            Self::Ip => ["hf_answers_ip", "hf_requests_ip"],
        };
        [
            (answers, TcAttachType::Egress),
            (requests, TcAttachType::Ingress),
        ]
    }
}

/// The links of each interface, by its index. Dropping a link detaches its program.
pub(crate) type Interfaces = BTreeMap<NonZeroU32, Vec<SchedClassifierLink>>;

/// Why packets of an interface cannot be looked at.
#[derive(Debug, thiserror::Error)]
pub enum InterfaceError {
    /// By [`Services::load`].
    #[error("the services were loaded for sockets alone")]
    SocketsAlone,
    /// Not in the thread's network namespace, or not any more.
    #[error("no interface has the index {index}")]
    Unknown {
        /// The index.
        index: NonZeroU32,
        /// What the kernel said.
        source: Errno,
    },
    /// The kernel took the program but not its place on the interface.
    #[error("cannot attach {program} to interface {index}, which needs Linux 6.6 or newer")]
    Attach {
        /// The program.
        program: &'static str,
        /// The interface's index.
        index: NonZeroU32,
        /// What the kernel said.
        source: ProgramError,
    },
}

impl Services {
    /// As [`Services::load`], and ready to look at packets. The flows' memory, 17 MiB
    /// (`TRACKED_MAX`), is taken now.
    ///
    /// # Errors
    ///
    /// What this machine lacks, and how to get it. Nothing stays loaded.
    pub fn load_with_packets(cgroup: &Path) -> Result<Self, LoadError> {
        let mut services = Self::load_object(cgroup, &mut EbpfLoader::new())?;
        for (name, _) in LinkHeader::ALL.into_iter().flat_map(LinkHeader::programs) {
            program(&mut services.ebpf, name)
                .and_then(SchedClassifier::load)
                .map_err(|error| rejected(name, error.into()))?;
        }
        services.interfaces = Some(Interfaces::new());
        Ok(services)
    }

    /// Serves the clients behind an interface of the calling thread's network namespace:
    /// what they send to a service goes to an endpoint, and answers come back as the service's.
    /// The programs come before all others on the interface. Returns whether they were not there
    /// before: they are asked for, because the index may have come to another interface.
    ///
    /// # Errors
    ///
    /// [`InterfaceError`]; nothing stays attached.
    pub fn attach_interface(
        &mut self,
        index: NonZeroU32,
        header: LinkHeader,
    ) -> Result<bool, InterfaceError> {
        let programs = header.programs();
        let interfaces = self.interfaces.as_mut();
        let interfaces = interfaces.ok_or(InterfaceError::SocketsAlone)?;
        let name = interface_name(index)?;
        if interfaces.contains_key(&index) && are_attached(&mut self.ebpf, &name, programs) {
            return Ok(false);
        }
        interfaces.remove(&index);
        let mut links = Vec::with_capacity(programs.len());
        for (program_name, direction) in programs {
            let link = program(&mut self.ebpf, program_name)
                .and_then(|program| attach(program, &name, direction));
            links.push(link.map_err(|source| InterfaceError::Attach {
                program: program_name,
                index,
                source,
            })?);
        }
        // aya takes names, and a name may have gone to another interface meanwhile.
        if interface_name(index)? != name {
            let source = Errno::NODEV;
            return Err(InterfaceError::Unknown { index, source });
        }
        interfaces.insert(index, links);
        Ok(true)
    }

    /// Leaves an interface alone again; whether the programs were there. Open flows of its
    /// clients end. Must also be called for an interface that is gone.
    pub fn detach_interface(&mut self, index: NonZeroU32) -> bool {
        let interfaces = self.interfaces.as_mut();
        interfaces.is_some_and(|interfaces| interfaces.remove(&index).is_some())
    }

    /// What became of the packets of all interfaces since the programs were loaded.
    ///
    /// # Errors
    ///
    /// [`MapError`] if the kernel does not say.
    pub fn packet_counters(&self) -> Result<BTreeMap<PacketCounter, u64>, MapError> {
        self.sums(COUNTERS, PacketCounter::ALL, |counter| counter as u32)
    }
}

/// For sockets alone.
pub(crate) fn without_flows<'a>(loader: &mut EbpfLoader<'a>) {
    for map in FLOW_MAPS {
        loader.map_max_entries(map, 1);
    }
}

fn program<'a>(ebpf: &'a mut Ebpf, name: &str) -> Result<&'a mut SchedClassifier, ProgramError> {
    let found = ebpf.program_mut(name);
    found
        .ok_or(ProgramError::UnexpectedProgramType)
        .and_then(TryInto::try_into)
}

/// Whether the interface has every program where it belongs.
fn are_attached(ebpf: &mut Ebpf, interface: &str, programs: [(&str, TcAttachType); 2]) -> bool {
    programs.iter().all(|&(name, direction)| {
        let own = program(ebpf, name).and_then(|program| Ok(program.info()?.id()));
        let there = SchedClassifier::query_tcx(interface, direction);
        own.is_ok_and(|own| {
            there.is_ok_and(|(_, programs)| programs.iter().any(|one| one.id() == own))
        })
    })
}

fn attach(
    program: &mut SchedClassifier,
    interface: &str,
    direction: TcAttachType,
) -> Result<SchedClassifierLink, ProgramError> {
    let first = TcAttachOptions::TcxOrder(LinkOrder::first());
    let link = program.attach_with_options(interface, direction, first)?;
    program.take_link(link)
}

fn interface_name(index: NonZeroU32) -> Result<String, InterfaceError> {
    let name = socket_with(
        AddressFamily::INET,
        SocketType::DGRAM,
        SocketFlags::CLOEXEC,
        None,
    )
    .and_then(|socket| netdevice::index_to_name(socket, index.get()));
    name.map_err(|source| InterfaceError::Unknown { index, source })
}
