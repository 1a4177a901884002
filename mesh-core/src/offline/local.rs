//! What a node corrects of the mesh's state by what it sees itself while no controller speaks: where its own pods are.
//!
//! After a reboot each pod has another address, and another pod may have the one that it had. What the state says of an
//! address is true of the pod that had it when a controller last spoke, so that is kept with the state. An address of which
//! that is not known is left as the state says: whoever has it is not wired by this node's CNI plug-in.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
};

use mesh_wire::id::NodeName;

use crate::{
    policy::resources::{ObjectName, Pod},
    snapshot::{Endpoint, Snapshot},
};

/// An interface of a pod: the same one again when the pod was started anew, whatever its address.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct PodInterface {
    /// Whose.
    pub pod: ObjectName,
    /// Its name in the pod.
    pub interface: String,
}

/// The addresses of this node's pods, as its CNI plug-in recorded them.
pub type Pods = BTreeMap<PodInterface, Vec<IpAddr>>;

/// Whose each address was when a controller last spoke.
pub type Holders = BTreeMap<IpAddr, PodInterface>;

/// What was corrected.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Corrected {
    /// Addresses of endpoints and of pods that policies know: so many are others now.
    pub moved: usize,
    /// So many are nobody's any more.
    pub gone: usize,
}

/// Whose the addresses are that a controller tells as `snapshot`, while the pods are as in `pods`. What was known `before`
/// counts on for an address whose pod is gone.
#[must_use]
pub fn holders(before: &Holders, snapshot: &Snapshot, node: &NodeName, pods: &Pods) -> Holders {
    let slices = snapshot.slices.values().flat_map(BTreeMap::values);
    let endpoints = slices.flat_map(|slice| &slice.endpoints);
    let own = endpoints.filter(|endpoint| may_be_on(endpoint, node));
    let own = own.map(|endpoint| endpoint.address);
    let policed = snapshot.policy.pods.values();
    let policed = policed.flat_map(|pod| &pod.addresses).copied();
    let told: BTreeSet<IpAddr> = own.chain(policed).collect();
    let now = pods
        .iter()
        .flat_map(|(holder, addresses)| addresses.iter().map(move |at| (at, holder)));
    // Later ones take the place of earlier ones.
    let all = before.iter().chain(now);
    all.filter(|(address, _)| told.contains(address))
        .map(|(address, holder)| (*address, holder.clone()))
        .collect()
}

/// `snapshot` with the endpoints on `node`, and its pods that policies know, where `pods` says that they are now; those that are
/// nowhere are left out. `None`: it is right as it is.
#[must_use]
pub fn correct(
    snapshot: &Snapshot,
    node: &NodeName,
    holders: &Holders,
    pods: &Pods,
) -> Option<(Snapshot, Corrected)> {
    let others: BTreeMap<IpAddr, Option<IpAddr>> = holders
        .iter()
        .map(|(&address, holder)| (address, now_at(address, pods.get(holder))))
        .filter(|(address, now)| *now != Some(*address))
        .collect();
    if others.is_empty() {
        return None;
    }
    let mut right = snapshot.clone();
    let mut corrected = Corrected::default();
    let mut keep = |address: &mut IpAddr| match others.get(address) {
        None => true,
        Some(Some(now)) => {
            *address = *now;
            corrected.moved += 1;
            true
        }
        Some(None) => {
            corrected.gone += 1;
            false
        }
    };
    let wrong =
        |endpoint: &Endpoint| may_be_on(endpoint, node) && others.contains_key(&endpoint.address);
    for slice in right.slices.values_mut().flat_map(BTreeMap::values_mut) {
        if slice.endpoints.iter().any(wrong) {
            let endpoints = &mut Arc::make_mut(slice).endpoints;
            endpoints.retain_mut(|one| !may_be_on(one, node) || keep(&mut one.address));
        }
    }
    let wrong = |pod: &Pod| {
        let mut addresses = pod.addresses.iter();
        pod.node.as_ref() == Some(node) && addresses.any(|at| others.contains_key(at))
    };
    for pod in right.policy.pods.values_mut() {
        if !pod.host_network && wrong(pod) {
            Arc::make_mut(pod).addresses.retain_mut(&mut keep);
        }
    }
    (corrected != Corrected::default()).then_some((right, corrected))
}

/// Where the interface is now that had this address, by its addresses.
fn now_at(address: IpAddr, addresses: Option<&Vec<IpAddr>>) -> Option<IpAddr> {
    let addresses = addresses?;
    if addresses.contains(&address) {
        return Some(address);
    }
    let mut alike = addresses.iter().copied();
    alike.find(|at| at.is_ipv4() == address.is_ipv4())
}

/// Slices that were written by hand may not say the node.
fn may_be_on(endpoint: &Endpoint, node: &NodeName) -> bool {
    endpoint.node.as_ref().is_none_or(|on| on == node)
}

#[cfg(test)]
mod tests {
    use mesh_wire::id::MeshId;

    use super::*;
    use crate::snapshot::{EndpointSlice, MeshSettings, ServiceName};

    const OWN: &str = "edge-1";

    fn interface(pod: &str) -> PodInterface {
        PodInterface {
            pod: ObjectName {
                namespace: "shop".to_owned(),
                name: pod.to_owned(),
            },
            interface: "eth0".to_owned(),
        }
    }

    fn at(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn pods(all: &[(&str, &[&str])]) -> Pods {
        let all = all.iter();
        all.map(|(pod, addresses)| {
            let addresses = addresses.iter().map(|address| at(address));
            (interface(pod), addresses.collect())
        })
        .collect()
    }

    fn endpoint(address: &str, node: Option<&str>) -> Endpoint {
        Endpoint::new(at(address), node.map(|node| node.parse().unwrap()))
    }

    fn service() -> ServiceName {
        ServiceName {
            namespace: "shop".to_owned(),
            name: "web".to_owned(),
        }
    }

    /// A service of these endpoints, and policies that know pods by these addresses.
    fn snapshot(endpoints: &[(&str, Option<&str>)], policed: &[(&str, &str, bool)]) -> Snapshot {
        let mut snapshot = Snapshot::empty(MeshSettings::with_defaults(MeshId([7; 32]), "demo"));
        let slice = EndpointSlice {
            name: "web-1".to_owned(),
            ports: Vec::new(),
            endpoints: endpoints
                .iter()
                .map(|(address, node)| endpoint(address, *node))
                .collect(),
        };
        let slices = [(slice.name.clone(), Arc::new(slice))];
        snapshot.slices.insert(service(), slices.into());
        for (name, address, host_network) in policed {
            let pod = Pod {
                name: interface(name).pod,
                labels: [("app".to_owned(), (*name).to_owned())].into(),
                service_account: "default".to_owned(),
                node: Some(OWN.parse().unwrap()),
                addresses: vec![at(address)],
                host_network: *host_network,
                ports: Vec::new(),
            };
            let policed = &mut snapshot.policy.pods;
            policed.insert(pod.name.clone(), Arc::new(pod));
        }
        snapshot
    }

    fn addresses(snapshot: &Snapshot) -> Vec<String> {
        let endpoints = snapshot.endpoints(&service());
        endpoints.map(|(_, one)| one.address.to_string()).collect()
    }

    fn own() -> NodeName {
        OWN.parse().unwrap()
    }

    #[test]
    fn endpoints_are_where_their_pods_are_now_or_nowhere() {
        let told = [
            ("10.1.0.2", Some(OWN)),
            ("10.1.0.3", Some(OWN)),
            ("fd00::3", Some(OWN)),
            ("10.1.0.4", Some(OWN)),
        ];
        let before = pods(&[
            ("web-0", &["10.1.0.2"]),
            ("web-1", &["10.1.0.3", "fd00::3"]),
        ]);
        let state = snapshot(&told, &[]);
        let held = holders(&Holders::new(), &state, &own(), &before);
        type Case<'a> = (&'a str, Pods, &'a [&'a str], (usize, usize));
        let cases: [Case<'_>; 6] = [
            (
                "as it was",
                before.clone(),
                &["10.1.0.2", "10.1.0.3", "fd00::3", "10.1.0.4"],
                (0, 0),
            ),
            (
                "after a reboot, before any pod is back",
                Pods::new(),
                &["10.1.0.4"],
                (0, 3),
            ),
            (
                "one is back",
                pods(&[("web-1", &["10.1.0.9", "fd00::9"])]),
                &["10.1.0.9", "fd00::9", "10.1.0.4"],
                (2, 1),
            ),
            (
                "with each other's addresses",
                pods(&[("web-0", &["10.1.0.3"]), ("web-1", &["10.1.0.2"])]),
                &["10.1.0.3", "10.1.0.2", "10.1.0.4"],
                (2, 1),
            ),
            (
                "another pod has the address",
                pods(&[("web-0", &["10.1.0.2"]), ("db", &["10.1.0.3"])]),
                &["10.1.0.2", "10.1.0.4"],
                (0, 2),
            ),
            (
                "the old one is not taken away yet",
                pods(&[
                    ("web-0", &["10.1.0.8", "10.1.0.2"]),
                    ("web-1", &["10.1.0.3", "fd00::3"]),
                ]),
                &["10.1.0.2", "10.1.0.3", "fd00::3", "10.1.0.4"],
                (0, 0),
            ),
        ];
        for (name, now, expected, (moved, gone)) in cases {
            let right = correct(&state, &own(), &held, &now);
            let (found, corrected) = right.unwrap_or((state.clone(), Corrected::default()));
            assert_eq!(addresses(&found), expected, "{name}");
            assert_eq!(corrected, Corrected { moved, gone }, "{name}");
        }
    }

    #[test]
    fn what_is_not_of_this_node_s_plug_in_is_left_as_it_is() {
        let told = [
            ("10.1.0.2", Some("edge-2")), // Another node's, by whatever mistake.
            ("100.96.0.1", Some(OWN)),    // On the host's network.
            ("10.1.0.5", Some(OWN)),      // Wired by somebody else.
        ];
        let state = snapshot(&told, &[("host", "10.1.0.2", true)]);
        let before = pods(&[("web-0", &["10.1.0.2"])]);
        let held = holders(&Holders::new(), &state, &own(), &before);
        assert_eq!(correct(&state, &own(), &held, &Pods::new()), None);
        // A pod of another node has the address by now.
        let mut state = snapshot(&[], &[("db", "10.1.0.2", false)]);
        let db = state.policy.pods.values_mut().next().unwrap();
        Arc::make_mut(db).node = Some("edge-2".parse().unwrap());
        assert_eq!(correct(&state, &own(), &held, &Pods::new()), None);
        // By hand, and of no node: whose address it is says where it is.
        let state = snapshot(&[("10.1.0.2", None)], &[]);
        let (right, _) = correct(&state, &own(), &held, &Pods::new()).unwrap();
        assert!(addresses(&right).is_empty());
    }

    #[test]
    fn policies_know_a_pod_by_the_address_that_it_has_now() {
        let state = snapshot(
            &[],
            &[("web-0", "10.1.0.2", false), ("db", "10.1.0.3", false)],
        );
        let before = pods(&[("web-0", &["10.1.0.2"]), ("db", &["10.1.0.3"])]);
        let held = holders(&Holders::new(), &state, &own(), &before);
        // One that nobody told of has the address of one that may do more.
        let now = pods(&[("web-0", &["10.1.0.7"]), ("new", &["10.1.0.3"])]);
        let (right, corrected) = correct(&state, &own(), &held, &now).unwrap();
        assert_eq!(corrected, Corrected { moved: 1, gone: 1 });
        let of = |pod: &str| right.policy.pods[&interface(pod).pod].addresses.clone();
        assert_eq!(of("web-0"), [at("10.1.0.7")]);
        assert!(of("db").is_empty());
    }

    #[test]
    fn whose_an_address_was_is_known_for_as_long_as_the_controller_tells_it() {
        let told = ["10.1.0.2", "10.1.0.3", "10.1.0.4"].map(|address| (address, Some(OWN)));
        let state = snapshot(&told, &[]);
        let before = pods(&[
            ("web-0", &["10.1.0.2"]),
            ("web-1", &["10.1.0.3"]),
            ("web-2", &["10.1.0.4"]),
            ("job", &["10.1.0.5"]), // Of no service.
        ]);
        let known = |held: &Holders| -> Vec<_> {
            let held = held.iter();
            held.map(|(at, holder)| format!("{at} {}", holder.pod.name))
                .collect()
        };
        let held = holders(&Holders::new(), &state, &own(), &before);
        let first = ["10.1.0.2 web-0", "10.1.0.3 web-1", "10.1.0.4 web-2"];
        assert_eq!(known(&held), first);
        // One is gone, one has another address, and one has what the third had.
        let now = pods(&[("web-1", &["10.1.0.9"]), ("web-3", &["10.1.0.4"])]);
        let held = holders(&held, &state, &own(), &now);
        let second = ["10.1.0.2 web-0", "10.1.0.3 web-1", "10.1.0.4 web-3"];
        assert_eq!(known(&held), second);
        let state = snapshot(&[("10.1.0.9", Some(OWN))], &[]);
        let held = holders(&held, &state, &own(), &now);
        assert_eq!(known(&held), ["10.1.0.9 web-1"]);
    }
}
