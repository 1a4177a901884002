//! What must change in the maps. Pure: the maps are not touched here.

use std::{
    cmp::Reverse,
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
};

use ebpf_abi::EndpointList;

use crate::Frontend;

/// What the maps hold for a frontend.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Installed {
    pub(crate) list: EndpointList,
    pub(crate) endpoints: Vec<SocketAddr>,
}

/// How much the maps hold.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    pub(crate) frontends: usize,
    pub(crate) endpoints: usize,
    pub(crate) list_endpoints: usize,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Change {
    Remove(Frontend),
    /// Replaces the list, or adds the frontend.
    Set(Frontend, Vec<SocketAddr>),
}

#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Plan {
    /// In an order in which the maps never hold more than before or after, plus one list.
    pub(crate) changes: Vec<Change>,
    pub(crate) unchanged: usize,
    pub(crate) left_out: LeftOut,
}

/// What was asked for and is not in the maps.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LeftOut {
    /// Frontends beyond the limit, the last in order. Their addresses are passed untouched.
    pub frontends: usize,
    /// Endpoints beyond a limit, of frontends that are there and of those left out.
    pub endpoints: usize,
    /// Endpoints of the other address family than their frontend: no socket could reach them.
    pub other_family: usize,
}

pub(crate) fn plan(
    desired: &BTreeMap<Frontend, Vec<SocketAddr>>,
    actual: &BTreeMap<Frontend, Installed>,
    limits: Limits,
) -> Plan {
    let (fitting, left_out) = fit(desired, limits);
    let stale = actual
        .keys()
        .filter(|frontend| !fitting.contains_key(frontend));
    let mut changes: Vec<Change> = stale.map(|&frontend| Change::Remove(frontend)).collect();

    let fitting_count = fitting.len();
    let installed = |frontend: &Frontend| actual.get(frontend).map(|found| &found.endpoints);
    let mut sets: Vec<_> = fitting
        .into_iter()
        .filter(|(frontend, endpoints)| installed(frontend) != Some(endpoints))
        .collect();
    // Lists that shrink first: they make room for those that grow.
    sets.sort_by_cached_key(|(frontend, endpoints)| {
        Reverse(
            installed(frontend)
                .map_or(0, Vec::len)
                .saturating_sub(endpoints.len()),
        )
    });
    let unchanged = fitting_count - sets.len();
    changes.extend(
        sets.into_iter()
            .map(|(frontend, endpoints)| Change::Set(frontend, endpoints)),
    );
    Plan {
        changes,
        unchanged,
        left_out,
    }
}

/// What of `desired` the maps can hold: the first frontends in order, the first endpoints in order.
fn fit(
    desired: &BTreeMap<Frontend, Vec<SocketAddr>>,
    limits: Limits,
) -> (BTreeMap<Frontend, Vec<SocketAddr>>, LeftOut) {
    let (canonical, other_family) = canonical(desired);
    let mut left_out = LeftOut {
        other_family,
        ..LeftOut::default()
    };
    let mut fitting = BTreeMap::new();
    let mut room = limits.endpoints;
    for (frontend, mut endpoints) in canonical {
        let wanted = endpoints.len();
        // Without room for one endpoint the frontend stays away: an empty list would say that the
        // service has none.
        if fitting.len() == limits.frontends || (wanted > 0 && room == 0) {
            left_out.frontends += 1;
            left_out.endpoints += wanted;
            continue;
        }
        endpoints.truncate(room.min(limits.list_endpoints));
        room -= endpoints.len();
        left_out.endpoints += wanted - endpoints.len();
        fitting.insert(frontend, endpoints);
    }
    (fitting, left_out)
}

/// One form for each address, endpoints of the frontend's family only, sorted and once each.
fn canonical(
    desired: &BTreeMap<Frontend, Vec<SocketAddr>>,
) -> (BTreeMap<Frontend, Vec<SocketAddr>>, usize) {
    let mut canonical: BTreeMap<Frontend, Vec<SocketAddr>> = BTreeMap::new();
    let mut other_family = 0;
    for (frontend, endpoints) in desired {
        let address = frontend.address.to_canonical();
        let list = canonical
            .entry(Frontend {
                address,
                ..*frontend
            })
            .or_default();
        for endpoint in endpoints {
            let ip: IpAddr = endpoint.ip().to_canonical();
            if ip.is_ipv4() == address.is_ipv4() {
                list.push(SocketAddr::new(ip, endpoint.port()));
            } else {
                other_family += 1;
            }
        }
        list.sort_unstable();
        list.dedup();
    }
    (canonical, other_family)
}

#[cfg(test)]
mod tests;
