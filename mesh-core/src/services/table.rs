//! The table of every frontend, changed by what a view changed.

use std::{
    collections::{BTreeMap, BTreeSet},
    iter,
    net::SocketAddr,
    sync::Arc,
};

use mesh_wire::id::NodeName;

use super::{API_SERVER, Backends, Frontend, Kind, View, frontends, judge_all};
use crate::snapshot::{EndpointSlice, Policy, Service, ServiceName, ServicePort, Snapshot};

/// What every frontend leads to by the last view, service by service: a view that changes one
/// service costs one service, beside a look at whether the others are still the same (a pointer
/// each). It takes some 100 bytes a frontend, 32 an endpoint and 16 for each service of each node.
#[derive(Debug, Default)]
pub struct Table {
    view: Option<Arc<View>>,
    /// What each service asks for.
    services: BTreeMap<Arc<ServiceName>, Vec<Frontend>>,
    /// Which services have endpoints on a node.
    on_node: BTreeMap<NodeName, BTreeSet<Arc<ServiceName>>>,
    /// Who asks for a frontend; never empty, and the first has it.
    frontends: BTreeMap<Frontend, Vec<Claim>>,
}

#[derive(Debug)]
struct Claim {
    kind: Kind,
    service: Arc<ServiceName>,
    backends: Backends,
}

/// What a view changed.
#[derive(Debug, Default)]
pub struct Update {
    /// Frontends that lead elsewhere than before, or are gone (`None`).
    pub changed: BTreeMap<Frontend, Option<Backends>>,
    /// Services whose endpoints were judged anew.
    pub services: usize,
    /// The view before, to be let go when the changes are where they belong: to free a large
    /// snapshot takes longer than everything else.
    pub before: Option<Arc<View>>,
}

impl Table {
    /// Makes it the table of `view`.
    pub fn update(&mut self, view: &Arc<View>) -> Update {
        let last = self.view.take();
        let touched = match &last {
            None => view.snapshot.services.keys().cloned().collect(),
            Some(last) => {
                let touched = self.touched(last, view);
                for name in &touched {
                    self.forget_nodes(&last.snapshot, name);
                }
                touched
            }
        };
        let mut before = BTreeMap::new();
        for name in &touched {
            self.forget(name, &mut before);
            self.add(name, view, &mut before);
        }
        self.view = Some(Arc::clone(view));
        let changed = before.into_iter().filter_map(|(frontend, before)| {
            let now = self.get(&frontend);
            (now != before.as_ref()).then(|| (frontend, now.cloned()))
        });
        Update {
            changed: changed.collect(),
            services: touched.len(),
            before: last,
        }
    }

    /// Where `frontend` leads. `None`: it is none.
    #[must_use]
    pub fn get(&self, frontend: &Frontend) -> Option<&Backends> {
        Some(&self.frontends.get(frontend)?.first()?.backends)
    }

    /// All of it.
    pub fn iter(&self) -> impl Iterator<Item = (Frontend, &Backends)> {
        let all = self.frontends.iter();
        all.filter_map(|(&frontend, claims)| Some((frontend, &claims.first()?.backends)))
    }

    /// Whether the service at `frontend` has `endpoint` still, in whatever condition and however far: a
    /// flow that is there may stay.
    #[must_use]
    pub fn has(&self, frontend: &Frontend, endpoint: SocketAddr) -> bool {
        let claims = self.frontends.get(frontend);
        let has = |view: &Arc<View>| {
            let name = &claims?.first()?.service;
            let service = view.snapshot.services.get(&**name)?;
            let number = |port: &&ServicePort| {
                port.protocol == frontend.protocol
                    && [Some(port.port), port.node_port].contains(&Some(frontend.port))
            };
            let ports: Vec<_> = service.ports.iter().filter(number).collect();
            let all = judge_all(view, service);
            let mut here = all.iter().filter(|one| one.address == endpoint.ip());
            let target = Some(endpoint.port());
            Some(here.any(|one| ports.iter().any(|port| one.target(port) == target)))
        };
        self.view.as_ref().and_then(has).unwrap_or_default()
    }

    /// The services that lead elsewhere for what is different in `now`, or may.
    fn touched(&self, before: &View, now: &View) -> BTreeSet<ServiceName> {
        let (old, new) = (&before.snapshot, &now.snapshot);
        let own = |view: &View| view.snapshot.nodes.get(&view.node).cloned();
        if before.node != now.node || own(before) != own(now) {
            return old
                .services
                .keys()
                .chain(new.services.keys())
                .cloned()
                .collect();
        }
        let ejected = before.ejected.symmetric_difference(&now.ejected);
        let mut touched = services_with(new, ejected, |_| true);
        let open = different(&before.open, &now.open, |_, _| false, PartialEq::eq);
        let is_limited = |service: &Service| service.balance.max_connections.is_some();
        touched.extend(services_with(new, open, is_limited));
        touched.extend(self.measured(before, now));
        let mut nodes: BTreeSet<&NodeName> = before.dead.symmetric_difference(&now.dead).collect();
        if !Arc::ptr_eq(old, new) {
            let services = different(&old.services, &new.services, Arc::ptr_eq, PartialEq::eq);
            touched.extend(services.cloned());
            let slices = different(&old.slices, &new.slices, are_one, same_slices);
            touched.extend(slices.cloned());
            nodes.extend(different(
                &old.nodes,
                &new.nodes,
                |_, _| false,
                PartialEq::eq,
            ));
        }
        if !nodes.is_empty() {
            let api_server = |name: &ServiceName| (&*name.namespace, &*name.name) == API_SERVER;
            touched.extend(new.services.keys().find(|name| api_server(name)).cloned());
        }
        let there = nodes.into_iter().filter_map(|node| self.on_node.get(node));
        touched.extend(there.flatten().map(|name| ServiceName::clone(name)));
        touched
    }

    /// The services that go by cost and have endpoints on nodes of another cost.
    fn measured<'a>(
        &'a self,
        before: &'a View,
        now: &'a View,
    ) -> impl Iterator<Item = ServiceName> + 'a {
        let nodes = different(&before.costs, &now.costs, |_, _| false, PartialEq::eq);
        let there = nodes.filter_map(|node| self.on_node.get(node)).flatten();
        let by_cost = there.filter(|name| {
            let service = now.snapshot.services.get(&***name);
            service.is_some_and(|service| service.balance.policy == Policy::LeastLatency)
        });
        by_cost.map(|name| ServiceName::clone(name))
    }

    fn forget_nodes(&mut self, before: &Snapshot, name: &ServiceName) {
        for node in nodes_of(before, name) {
            if let Some(services) = self.on_node.get_mut(node) {
                services.remove(name);
                if services.is_empty() {
                    self.on_node.remove(node);
                }
            }
        }
    }

    /// `before`: what the frontends led to that were touched until now.
    fn forget(&mut self, name: &ServiceName, before: &mut BTreeMap<Frontend, Option<Backends>>) {
        for frontend in self.services.remove(name).into_iter().flatten() {
            before
                .entry(frontend)
                .or_insert_with(|| self.get(&frontend).cloned());
            if let Some(claims) = self.frontends.get_mut(&frontend) {
                claims.retain(|claim| *claim.service != *name);
                if claims.is_empty() {
                    self.frontends.remove(&frontend);
                }
            }
        }
    }

    fn add(
        &mut self,
        name: &ServiceName,
        view: &View,
        before: &mut BTreeMap<Frontend, Option<Backends>>,
    ) {
        let Some(service) = view.snapshot.services.get(name) else {
            return;
        };
        let name = Arc::new(name.clone());
        let mut asked = Vec::new();
        for (frontend, kind, backends) in frontends(view, service) {
            before
                .entry(frontend)
                .or_insert_with(|| self.get(&frontend).cloned());
            let claims = self
                .frontends
                .entry(frontend)
                .or_insert_with(|| Vec::with_capacity(1));
            let rank = (kind, &name);
            let place = claims.partition_point(|claim| (claim.kind, &claim.service) <= rank);
            let claim = Claim {
                kind,
                service: Arc::clone(&name),
                backends,
            };
            claims.insert(place, claim);
            asked.push(frontend);
        }
        for node in nodes_of(&view.snapshot, &name) {
            let services = self.on_node.entry(node.clone()).or_default();
            services.insert(Arc::clone(&name));
        }
        self.services.insert(name, asked);
    }
}

/// The services with one of `endpoints`, of those that `are_asked`: costs a look at every endpoint of these,
/// when there is any.
fn services_with<'a>(
    snapshot: &Snapshot,
    endpoints: impl Iterator<Item = &'a SocketAddr>,
    are_asked: impl Fn(&Service) -> bool,
) -> BTreeSet<ServiceName> {
    let led_to: BTreeSet<_> = endpoints.map(SocketAddr::ip).collect();
    if led_to.is_empty() {
        return BTreeSet::new();
    }
    // As slices may call them.
    let nodes = snapshot.nodes.values().filter(|node| {
        let overlay = [node.overlay_v4.into(), node.overlay_v6.into()];
        overlay.iter().any(|address| led_to.contains(address))
    });
    let underlay = nodes.flat_map(|node| &node.underlay_addresses).copied();
    let addresses: BTreeSet<_> = underlay.chain(led_to.iter().copied()).collect();
    let asked = |name| {
        snapshot
            .services
            .get(name)
            .is_some_and(|one| are_asked(one))
    };
    let slices = snapshot.slices.iter().filter(|(name, _)| asked(name));
    let with = slices.filter(|(_, slices)| {
        let mut endpoints = slices.values().flat_map(|slice| &slice.endpoints);
        endpoints.any(|endpoint| addresses.contains(&endpoint.address))
    });
    with.map(|(name, _)| name.clone()).collect()
}

fn nodes_of<'a>(snapshot: &'a Snapshot, name: &ServiceName) -> BTreeSet<&'a NodeName> {
    let endpoints = snapshot.endpoints(name);
    endpoints
        .filter_map(|(_, endpoint)| endpoint.node.as_ref())
        .collect()
}

fn same_slices(
    one: &BTreeMap<String, Arc<EndpointSlice>>,
    other: &BTreeMap<String, Arc<EndpointSlice>>,
) -> bool {
    let same = |(a, b): (&Arc<_>, &Arc<_>)| Arc::ptr_eq(a, b) || a == b;
    one.len() == other.len()
        && one.keys().eq(other.keys())
        && one.values().zip(other.values()).all(same)
}

/// Whether these are the slices of one service, and unchanged. No two services share a slice.
fn are_one(
    one: &BTreeMap<String, Arc<EndpointSlice>>,
    other: &BTreeMap<String, Arc<EndpointSlice>>,
) -> bool {
    let one_is = |(a, b)| Arc::ptr_eq(a, b);
    !one.is_empty() && one.len() == other.len() && one.values().zip(other.values()).all(one_is)
}

/// The keys of what only one has, or what is not the same in both. What `is_one` says is the same
/// under the same key: to compare names would take most of the time.
fn different<'a, K: Ord, V>(
    one: &'a BTreeMap<K, V>,
    other: &'a BTreeMap<K, V>,
    is_one: impl Fn(&V, &V) -> bool,
    same: impl Fn(&V, &V) -> bool,
) -> impl Iterator<Item = &'a K> {
    let mut ones = one.iter().peekable();
    let mut others = other.iter().peekable();
    let next = move || match (ones.peek(), others.peek()) {
        (None, None) => None,
        (Some(&(a, x)), Some(&(_, y))) if is_one(x, y) => {
            ones.next();
            others.next();
            Some((false, a))
        }
        (Some(&(a, x)), Some(&(b, y))) if a == b => {
            let different = !same(x, y);
            ones.next();
            others.next();
            Some((different, a))
        }
        (Some(&(a, _)), Some(&(b, _))) if a > b => {
            others.next();
            Some((true, b))
        }
        (Some(&(a, _)), _) => {
            ones.next();
            Some((true, a))
        }
        (None, Some(&(b, _))) => {
            others.next();
            Some((true, b))
        }
    };
    iter::from_fn(next).filter_map(|(different, key)| different.then_some(key))
}
