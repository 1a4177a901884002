//! What stands in the kernel: the service maps that an agent pinned, read by path.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use aya::maps::{HashMap, Map, MapData, MapError};
use ebpf_abi::{EndpointList, PROTOCOL_TCP, SocketAddress};

/// An agent's.
#[derive(Debug)]
pub(crate) struct Maps {
    frontends: HashMap<MapData, SocketAddress, u64>,
    endpoints: HashMap<MapData, u64, SocketAddress>,
}

impl Maps {
    /// The maps below `bpffs`, a node's.
    ///
    /// # Errors
    ///
    /// If no agent pinned any there.
    pub(crate) fn open(bpffs: &Path) -> Result<Self> {
        let frontends = find(bpffs, "hf_frontends")?;
        let endpoints = find(bpffs, "hf_endpoints")?;
        let open = |path: &Path| {
            let map = MapData::from_pin(path);
            map.map(Map::HashMap)
                .with_context(|| format!("open {}", path.display()))
        };
        Ok(Self {
            frontends: HashMap::try_from(open(&frontends)?)?,
            endpoints: HashMap::try_from(open(&endpoints)?)?,
        })
    }

    /// Whether new flows to the service may be led to the endpoint.
    ///
    /// # Errors
    ///
    /// What the kernel says.
    pub(crate) fn leads(&self, service: (Ipv4Addr, u16), endpoint: Ipv4Addr) -> Result<bool> {
        let protocol = u8::try_from(PROTOCOL_TCP)?;
        let key = SocketAddress::new(service.0.into(), service.1, protocol);
        let Some(list) = found(self.frontends.get(&key, 0))? else {
            return Ok(false);
        };
        for slot in EndpointList::from_value(list).slots() {
            // A list that was replaced meanwhile has no slots any more: the new one is read next time.
            let one = found(self.endpoints.get(&slot, 0))?;
            if one.is_some_and(|one| one.socket_addr().ip() == IpAddr::V4(endpoint)) {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

fn found<T>(looked: Result<T, MapError>) -> Result<Option<T>> {
    match looked {
        Ok(value) => Ok(Some(value)),
        Err(MapError::KeyNotFound) => Ok(None),
        Err(error) => Err(error).context("look into a map"),
    }
}

fn find(folder: &Path, name: &str) -> Result<PathBuf> {
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        let read = fs::read_dir(&folder);
        for entry in read.with_context(|| format!("read {}", folder.display()))? {
            let entry = entry?;
            if entry.file_name() == name {
                return Ok(entry.path());
            }
            if entry.file_type()?.is_dir() {
                folders.push(entry.path());
            }
        }
    }
    anyhow::bail!("no {name} below {}", folder.display())
}
