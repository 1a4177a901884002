//! What must change in the maps. Pure: the maps are not touched here.

use std::{
    borrow::Cow,
    cmp::Reverse,
    collections::{BTreeMap, btree_map::Entry},
    net::SocketAddr,
    time::Duration,
};

use ebpf_abi::EndpointList;

use crate::{Backends, Frontend, Ranges, Selection};

/// What the maps hold for a frontend.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Installed {
    pub(crate) list: EndpointList,
    pub(crate) backends: Backends,
}

/// How much the maps hold.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    pub(crate) frontends: usize,
    pub(crate) endpoints: usize,
    pub(crate) list_endpoints: usize,
    pub(crate) ranges: usize,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Change {
    Remove(Frontend),
    /// Replaces the list, or adds the frontend.
    Set(Frontend, Backends),
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
    /// Prefixes beyond the limit, the last in order: their clients are not served.
    pub ranges: usize,
}

impl LeftOut {
    pub(crate) fn is_nothing(self) -> bool {
        let Self {
            frontends,
            endpoints,
            ranges,
            other_family: _,
        } = self;
        (frontends, endpoints, ranges) == (0, 0, 0)
    }
}

/// Compares without copying where every address is in its one form, as the core gives them: one
/// change among many costs little more than reading them all.
pub(crate) fn plan(
    desired: &BTreeMap<Frontend, Backends>,
    actual: &BTreeMap<Frontend, Installed>,
    limits: Limits,
) -> Plan {
    let (fitting, left_out) = fit(desired, limits);
    let stale = actual
        .keys()
        .filter(|frontend| !fitting.contains_key(frontend));
    // What keeps clients out goes last.
    let stale = stale.rev().map(|&frontend| Change::Remove(frontend));
    let mut changes: Vec<Change> = stale.collect();

    let fitting_count = fitting.len();
    let installed = |frontend: &Frontend| actual.get(frontend).map(|found| &found.backends);
    let mut sets: Vec<_> = fitting
        .into_iter()
        .filter(|(frontend, wanted)| !installed(frontend).is_some_and(|found| wanted.is(found)))
        .collect();
    // Lists that shrink first: they make room for those that grow.
    sets.sort_by_cached_key(|(frontend, wanted)| {
        Reverse(
            installed(frontend)
                .map_or(0, |found| found.endpoints.len())
                .saturating_sub(wanted.endpoints.len()),
        )
    });
    let unchanged = fitting_count - sets.len();
    let set = |(frontend, wanted): (_, Wanted<'_>)| Change::Set(frontend, wanted.into_backends());
    changes.extend(sets.into_iter().map(set));
    Plan {
        changes,
        unchanged,
        left_out,
    }
}

/// Of the frontend's family, in the order given.
type Endpoints<'a> = Cow<'a, [SocketAddr]>;

/// [`Backends`] that are copied only where they change.
struct Wanted<'a> {
    endpoints: Endpoints<'a>,
    selection: Selection,
    affinity: Option<Duration>,
    ranges: Cow<'a, Option<Ranges>>,
}

impl Wanted<'_> {
    fn is(&self, found: &Backends) -> bool {
        (self.affinity, self.selection) == (found.affinity, found.selection)
            && *self.endpoints == *found.endpoints
            && *self.ranges == found.ranges
    }

    fn into_backends(self) -> Backends {
        Backends {
            endpoints: self.endpoints.into(),
            selection: self.selection,
            affinity: self.affinity,
            ranges: self.ranges.into_owned(),
        }
    }
}

/// What of `desired` the maps can hold: the first frontends in order, the first endpoints in order.
fn fit(
    desired: &BTreeMap<Frontend, Backends>,
    limits: Limits,
) -> (BTreeMap<Frontend, Wanted<'_>>, LeftOut) {
    let (mut fitting, other_family) = canonical(desired);
    let mut left_out = LeftOut {
        other_family,
        ..LeftOut::default()
    };
    let mut frontends = 0;
    let mut room = limits.endpoints;
    let mut room_for_ranges = limits.ranges;
    fitting.retain(|_, wanted| {
        let Wanted {
            endpoints, ranges, ..
        } = wanted;
        let wanted = endpoints.len();
        // Without room for one endpoint the frontend stays away: an empty list would say that the
        // service has none.
        if frontends == limits.frontends || (wanted > 0 && room == 0) {
            left_out.frontends += 1;
            left_out.endpoints += wanted;
            return false;
        }
        truncate(endpoints, room.min(limits.list_endpoints));
        frontends += 1;
        room -= endpoints.len();
        left_out.endpoints += wanted - endpoints.len();
        if let Some(wanted) = ranges.as_ref() {
            let fitting = wanted.len().min(room_for_ranges);
            room_for_ranges -= fitting;
            if fitting < wanted.len() {
                left_out.ranges += wanted.len() - fitting;
                let fitting = wanted.iter().copied().take(fitting);
                *ranges = Cow::Owned(Some(fitting.collect()));
            }
        }
        true
    });
    (fitting, left_out)
}

fn truncate(endpoints: &mut Endpoints<'_>, length: usize) {
    match endpoints {
        Cow::Borrowed(list) => *list = list.get(..length).unwrap_or(list),
        Cow::Owned(list) => list.truncate(length),
    }
}

/// One form for each address, and endpoints of the frontend's family only.
fn canonical(desired: &BTreeMap<Frontend, Backends>) -> (BTreeMap<Frontend, Wanted<'_>>, usize) {
    let mut canonical: BTreeMap<Frontend, Wanted<'_>> = BTreeMap::new();
    let mut other_family = 0;
    for (frontend, given) in desired {
        let address = frontend.address.to_canonical();
        let v4 = address.is_ipv4();
        let endpoints = canonical_list(&given.endpoints, v4, &mut other_family);
        let (affinity, selection) = (given.affinity, given.selection);
        match canonical.entry(Frontend {
            address,
            ..*frontend
        }) {
            Entry::Vacant(entry) => {
                entry.insert(Wanted {
                    endpoints,
                    selection,
                    affinity,
                    ranges: Cow::Borrowed(&given.ranges),
                });
            }
            // The IPv4 and the mapped form of one address were both given.
            Entry::Occupied(mut entry) => {
                let entry = entry.get_mut();
                entry.affinity = entry.affinity.or(affinity);
                entry.endpoints.to_mut().extend_from_slice(&endpoints);
            }
        }
    }
    (canonical, other_family)
}

fn canonical_list<'a>(
    given: &'a [SocketAddr],
    ipv4: bool,
    other_family: &mut usize,
) -> Endpoints<'a> {
    let is_canonical =
        |addr: &SocketAddr| addr.is_ipv4() == ipv4 && (ipv4 || !addr.ip().to_canonical().is_ipv4());
    if given.iter().all(is_canonical) {
        return Cow::Borrowed(given);
    }
    let canonical = given
        .iter()
        .map(|addr| SocketAddr::new(addr.ip().to_canonical(), addr.port()));
    let list: Vec<SocketAddr> = canonical.filter(|addr| addr.is_ipv4() == ipv4).collect();
    *other_family += given.len() - list.len();
    Cow::Owned(list)
}

#[cfg(test)]
mod tests;
