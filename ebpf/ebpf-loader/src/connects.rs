//! How TCP connects to endpoints end, as the program at sockets' changes of state counts it.

use std::{collections::BTreeMap, net::SocketAddr};

use aya::{
    Ebpf,
    maps::{HashMap, MapData, MapError},
    programs::{CgroupAttachMode, ProgramError, SockOps},
};
use ebpf_abi::{Failing, PROTOCOL_TCP, SocketAddress};

use crate::{
    LoadError, Services, absent_is_gone, cgroup::open_cgroup2, missing, patiently, program,
};

pub(crate) const PROGRAM: &str = "hf_sock_ops";

const FAILING: &str = "hf_failing";

/// How connects to an endpoint ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Failures {
    /// How many were reset, unreachable, or had no answer within a second.
    pub failed: u64,
    /// How many of them since the last one that went well.
    pub in_a_row: u32,
}

impl Services {
    /// Counts how connects end that begin from now on, or stops it. It is nobody's business when nobody
    /// reads it, and ends with the process in any case. Meanwhile each connect and accept of the cgroup
    /// costs about a microsecond more, to whatever it is: the kernel asks the program several times.
    ///
    /// # Errors
    ///
    /// [`LoadError::Attach`].
    pub fn watch_connects(&mut self, watch: bool) -> Result<(), LoadError> {
        if !watch {
            self.watching = None;
        } else if self.watching.is_none() {
            let folder = open_cgroup2(&self.cgroup)?;
            let link = program::<SockOps>(&mut self.ebpf, PROGRAM).and_then(|program| {
                let link = program.attach(folder, CgroupAttachMode::Single)?;
                program.take_link(link)
            });
            self.watching = Some(link.map_err(|source| LoadError::Attach {
                program: PROGRAM,
                cgroup: self.cgroup.clone(),
                source,
            })?);
        }
        Ok(())
    }

    /// The endpoints to which a TCP connect by a service failed while it was watched, until they are
    /// forgotten.
    ///
    /// # Errors
    ///
    /// [`MapError`] if the kernel does not say.
    pub fn failures(&self) -> Result<BTreeMap<SocketAddr, Failures>, MapError> {
        let map = self.ebpf.map(FAILING).ok_or_else(|| missing(FAILING))?;
        let map: HashMap<&MapData, SocketAddress, Failing> = map.try_into()?;
        let found = |entry: Result<(SocketAddress, Failing), MapError>| {
            let (
                endpoint,
                Failing {
                    failed, in_a_row, ..
                },
            ) = entry?;
            Ok((endpoint.socket_addr(), Failures { failed, in_a_row }))
        };
        map.iter().map(found).collect()
    }

    /// Begins anew with an endpoint.
    ///
    /// # Errors
    ///
    /// [`MapError`] if the kernel refuses; it is no error if nothing was counted.
    pub fn forget_failures(&mut self, endpoint: SocketAddr) -> Result<(), MapError> {
        let map = self.ebpf.map_mut(FAILING).ok_or_else(|| missing(FAILING))?;
        let mut map: HashMap<&mut MapData, SocketAddress, Failing> = map.try_into()?;
        let protocol = PROTOCOL_TCP.to_le_bytes()[0]; // It is below 256.
        let key = SocketAddress::new(endpoint.ip(), endpoint.port(), protocol);
        absent_is_gone(map.remove(&key))
    }
}

pub(crate) fn load(ebpf: &mut Ebpf) -> Result<(), ProgramError> {
    let program = program::<SockOps>(ebpf, PROGRAM)?;
    patiently(|| program.load())
}
