//! Which services may join both ends of a connection in the sockmap, as their manifests ask for it: `docs/services.md` says
//! what applications gain and what they give up.

use std::{collections::BTreeSet, mem, net::SocketAddr, path::Path};

use aya::{
    Ebpf,
    maps::{Array, HashMap, Map, MapData, MapError, SockHash},
    programs::{CgroupAttachMode, ProgramError, SkMsg, SockOps, sk_msg::SkMsgLink},
};
use ebpf_abi::{ConnectionEnd, Peer, SOCKMAP_PAIRS_MAX};

use crate::{
    CGROUP_LINKS, Frontend, LoadError, Protocol, Services, absent_is_gone,
    cgroup::open_cgroup2,
    leftover, missing, no_link, open,
    packets::map_of,
    patiently,
    pins::{Keeper, KeptLink},
    program, rejected,
};

/// Asked of each connect and accept of the cgroup.
const JOIN: &str = "hf_sockmap_join";
/// Asked of what sockets write that joined.
const PASS: &str = "hf_sockmap_pass";

pub(crate) const WANTED: &str = "hf_sockmap_for";
const ENDS: &str = "hf_sockmap";
const LEFT: &str = "hf_sockmap_left";

/// What is told, and what is attached for it.
#[derive(Debug)]
pub(crate) struct Sockmap {
    told: BTreeSet<(Frontend, SocketAddr)>,
    /// Only where somebody asks for it, as it costs each connect and accept something.
    join: Option<KeptLink>,
    pass: Passes,
}

/// Whether the program is attached to the map of sockets that joined.
#[derive(Debug)]
enum Passes {
    Not,
    /// For as long as the services are loaded.
    Meanwhile {
        _link: SkMsgLink,
    },
    /// For as long as there is the map: sockets join also while no agent runs.
    Kept,
}

/// Why connections cannot go past TCP as is asked for.
#[derive(Debug, thiserror::Error)]
pub enum SockmapError {
    /// The kernel refuses a change of the map.
    #[error("cannot tell the kernel which services' connections go past TCP")]
    Map(#[from] MapError),
    /// The kernel does not take a program.
    #[error(transparent)]
    Load(#[from] LoadError),
}

impl Sockmap {
    /// Loads the programs, attached nowhere yet, and reads back what an earlier process left.
    pub(crate) fn load(ebpf: &mut Ebpf) -> Result<Self, LoadError> {
        program::<SockOps>(ebpf, JOIN)
            .and_then(|program| patiently(|| program.load()))
            .map_err(|error| rejected(JOIN, error.into()))?;
        program::<SkMsg>(ebpf, PASS)
            .and_then(|program| patiently(|| program.load()))
            .map_err(|error| rejected(PASS, error.into()))?;
        let told = map_of(ebpf, WANTED).and_then(|map| {
            let map: HashMap<&mut MapData, Peer, u32> = map;
            let mut told = BTreeSet::new();
            for peer in map.keys() {
                let Peer { service, endpoint } = peer?;
                told.extend(
                    leftover::frontend(&service).map(|found| (found, endpoint.socket_addr())),
                );
            }
            Ok(told)
        });
        Ok(Self {
            told: told.map_err(|error| rejected(WANTED, error.into()))?,
            join: None,
            pass: Passes::Not,
        })
    }

    /// How many pairs the kernel was told.
    pub(crate) fn told_len(&self) -> usize {
        self.told.len()
    }

    /// Of the program that is asked of each connect and accept, while it is.
    pub(crate) fn link(&self) -> Option<&KeptLink> {
        self.join.as_ref()
    }

    fn attach(
        &mut self,
        ebpf: &mut Ebpf,
        keeper: &mut Keeper,
        cgroup: &Path,
    ) -> Result<(), LoadError> {
        let failed = |program| {
            move |source| LoadError::Attach {
                program,
                cgroup: cgroup.to_owned(),
                source,
            }
        };
        if matches!(self.pass, Passes::Not) {
            let link = attach_pass(ebpf).map_err(failed(PASS))?;
            self.pass = if keeper.pins().is_some() {
                mem::forget(link);
                Passes::Kept
            } else {
                Passes::Meanwhile { _link: link }
            };
        }
        if self.join.is_none() {
            let folder = open_cgroup2(cgroup)?;
            let link = program::<SockOps>(ebpf, JOIN).and_then(|program| {
                let link = program.attach(folder, CgroupAttachMode::Single)?;
                let link = program.take_link(link)?.try_into().map_err(no_link)?;
                keeper.keep(&format!("{CGROUP_LINKS}{JOIN}"), link)
            });
            self.join = Some(link.map_err(failed(JOIN))?);
        }
        Ok(())
    }
}

fn attach_pass(ebpf: &mut Ebpf) -> Result<SkMsgLink, ProgramError> {
    let ends = ebpf.map(ENDS).ok_or_else(|| missing(ENDS))?;
    let ends: SockHash<&MapData, ConnectionEnd> = ends.try_into()?;
    let ends = ends.fd().try_clone().map_err(ProgramError::IOError)?;
    let program = program::<SkMsg>(ebpf, PASS)?;
    let link = program.attach(&ends)?;
    program.take_link(link)
}

impl Services {
    /// From now on, TCP connections by these services to these endpoints, which are on this node, go past TCP once they
    /// are open: what one end writes goes into the other's queue. Others stay what they are. Told before [`Self::attach`], what an
    /// earlier process told goes on without a gap. How many were left out beyond [`SOCKMAP_PAIRS_MAX`], the last in order.
    ///
    /// # Errors
    ///
    /// [`SockmapError`]: tell it again.
    pub fn use_sockmap(
        &mut self,
        wanted: &BTreeSet<(Frontend, SocketAddr)>,
    ) -> Result<usize, SockmapError> {
        let fitting = wanted
            .iter()
            .filter(|(frontend, _)| frontend.protocol == Protocol::Tcp)
            .take(SOCKMAP_PAIRS_MAX as usize);
        let fitting: BTreeSet<_> = fitting.copied().collect();
        let mut map: HashMap<&mut MapData, Peer, u32> = map_of(&mut self.ebpf, WANTED)?;
        let told = &mut self.sockmap.told;
        let stale: Vec<_> = told.difference(&fitting).copied().collect();
        let new: Vec<_> = fitting.difference(told).copied().collect();
        for pair in stale {
            absent_is_gone(map.remove(&peer(pair)))?;
            told.remove(&pair);
        }
        for pair in new {
            map.insert(peer(pair), 1, 0)?;
            told.insert(pair);
        }
        if fitting.is_empty() {
            if let Some(link) = self.sockmap.join.take() {
                link.remove();
            }
        } else {
            self.sockmap
                .attach(&mut self.ebpf, &mut self.keeper, &self.cgroup)?;
        }
        Ok(wanted.len() - fitting.len())
    }

    /// Has all open connections that go past TCP go by it again: packets are what policy judges, and it
    /// changed. New ones go by it, too, if they are opened within [`SOCKMAP_SETTLE_MS`](ebpf_abi::SOCKMAP_SETTLE_MS).
    ///
    /// # Errors
    ///
    /// [`MapError`] if the kernel refuses.
    pub fn leave_sockmap(&mut self) -> Result<(), MapError> {
        leave(map_of(&mut self.ebpf, LEFT)?)
    }
}

fn peer((frontend, endpoint): (Frontend, SocketAddr)) -> Peer {
    Peer {
        service: frontend.key(),
        endpoint: frontend.socket_address(endpoint),
    }
}

fn leave(mut map: Array<&mut MapData, u64>) -> Result<(), MapError> {
    let now_ns = u64::try_from(open::now().as_nanos()).unwrap_or(u64::MAX);
    map.set(0, now_ns, 0)
}

/// The same for those of the maps in a folder, which nobody will tell any more.
pub(crate) fn leave_at(folder: &Path) {
    let path = folder.join(LEFT);
    if !path.exists() {
        return;
    }
    let left = MapData::from_pin(&path).and_then(|map| {
        let mut map = Map::Array(map);
        leave((&mut map).try_into()?)
    });
    if let Err(error) = left {
        tracing::warn!(path = %path.display(), %error, "open connections go on past TCP");
    }
}
