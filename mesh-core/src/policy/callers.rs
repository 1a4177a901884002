//! What a node's pods may call, by what is enforced at both ends: for answers that need not name whom a pod cannot reach.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
};

use super::{Class, Compiler, Direction, Flow, Tables};
use crate::snapshot::{EndpointPort, Snapshot};

/// The pods of one node to which anything is denied.
#[derive(Debug, Clone)]
pub struct Callers {
    tables: Arc<Tables>,
    /// All addresses of a pod, by each of them.
    pods: BTreeMap<IpAddr, Arc<[IpAddr]>>,
}

/// One of them.
#[derive(Debug, Clone, Copy)]
pub struct Caller<'a> {
    tables: &'a Tables,
    addresses: &'a [IpAddr],
}

impl Callers {
    /// By the tables of `compiler` ([`Compiler::of_calls`]), which were made of `snapshot`. Where they were full, it
    /// is not known what is denied to whom: then there is nobody.
    #[must_use]
    pub fn new(compiler: &Compiler, snapshot: &Snapshot) -> Self {
        let tables = Arc::clone(compiler.tables());
        let mut pods = BTreeMap::new();
        let strict = denied(&tables);
        if strict.is_empty() || !tables.left_out.is_nothing() {
            return Self { tables, pods };
        }
        let here = snapshot.policy.pods.values();
        let here = here.filter(|pod| pod.node.as_ref() == Some(compiler.node()));
        for pod in here.filter(|pod| !pod.host_network) {
            let mut addresses = pod.addresses.iter();
            if addresses.any(|&own| strict.contains(&tables.class(own))) {
                let all: Arc<[IpAddr]> = pod.addresses.as_slice().into();
                pods.extend(pod.addresses.iter().map(|&own| (own, Arc::clone(&all))));
            }
        }
        Self { tables, pods }
    }

    /// The pod that has `address`, if anything is denied to it.
    #[must_use]
    pub fn caller(&self, address: IpAddr) -> Option<Caller<'_>> {
        let addresses = self.pods.get(&address)?;
        Some(Caller {
            tables: &self.tables,
            addresses,
        })
    }
}

/// The callers' classes to which anything is denied.
fn denied(tables: &Tables) -> BTreeSet<Class> {
    let strict = tables.pairs.iter();
    let strict = strict.filter(|(_, rules)| !rules.strictest.allowed);
    let callers = strict.map(|(pair, _)| match pair.direction {
        Direction::Out => pair.local,
        Direction::In => pair.remote,
    });
    callers.collect()
}

impl Caller<'_> {
    /// Whether flows to `to` are denied at either end, by every one of `ports`. Not if there are none, or if the pod
    /// has no address of that family: nothing is said of such flows.
    #[must_use]
    pub fn is_denied(&self, to: IpAddr, ports: &[EndpointPort]) -> bool {
        let mut own = self.addresses.iter();
        let Some(&from) = own.find(|own| own.is_ipv4() == to.is_ipv4()) else {
            return false;
        };
        let is_denied = |port: &EndpointPort| {
            let flow = Flow {
                from,
                to,
                protocol: Some(port.protocol.into()),
                port: port.port,
            };
            let mut ends = Direction::ALL.into_iter();
            ends.any(|end| !self.tables.judge(&flow, end).allowed)
        };
        !ports.is_empty() && ports.iter().all(is_denied)
    }
}
