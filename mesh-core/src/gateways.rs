//! Which of several gateways packets for a LAN go to.
//!
//! Gateways of one LAN have the same prefix. A node sends to the nearest of them that is alive, and stays with it while
//! nothing is much better: another gateway means another way, on which packets may overtake each other.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use ipnet::IpNet;
use mesh_wire::id::{NodeId, NodeName};

use crate::{
    node::choose::is_cheaper,
    services::{Tier, View, tier},
    snapshot::{Node, Snapshot},
};

/// The gateways of prefixes that several nodes have.
#[derive(Debug, Default)]
pub struct Gateways {
    /// Of which snapshot the rest is.
    snapshot: Option<Arc<Snapshot>>,
    /// Other nodes with the same prefix, in the order in which they are chosen.
    shared: BTreeMap<IpNet, Vec<NodeName>>,
}

impl Gateways {
    /// Takes what the node sees now. Returns whether another gateway is chosen for any prefix, or may be.
    pub fn handle_view(&mut self, view: &View) -> bool {
        let same = |known: &Arc<Snapshot>| Arc::ptr_eq(known, &view.snapshot);
        let before = self.shared.clone();
        if !self.snapshot.as_ref().is_some_and(same) {
            self.snapshot = Some(Arc::clone(&view.snapshot));
            self.shared = shared(view);
            for (prefix, gateways) in &mut self.shared {
                let chosen = before.get(prefix).and_then(|before| before.first());
                let chosen = gateways.iter().position(|one| Some(one) == chosen);
                put_first(gateways, chosen.unwrap_or_default());
            }
        }
        for gateways in self.shared.values_mut() {
            let chosen = choose(view, gateways);
            put_first(gateways, chosen);
        }
        self.shared != before
    }

    /// Each such prefix, with the node that gets its packets first; from the others they may come.
    pub fn orders(&self) -> impl Iterator<Item = (IpNet, Vec<NodeId>)> + '_ {
        let nodes = self.snapshot.iter().map(|snapshot| &snapshot.nodes);
        nodes.flat_map(|nodes| {
            self.shared.iter().map(move |(prefix, gateways)| {
                let ids = gateways.iter().filter_map(|name| Some(nodes.get(name)?.id));
                (*prefix, ids.collect())
            })
        })
    }
}

/// What more than one other node has.
fn shared(view: &View) -> BTreeMap<IpNet, Vec<NodeName>> {
    let (mut seen, mut twice) = (BTreeSet::new(), BTreeSet::new());
    let others = || {
        let nodes = view.snapshot.nodes.values();
        let others = nodes.filter(|node| node.name != view.node);
        others.flat_map(|node| node.prefixes.iter().map(move |net| (net.trunc(), node)))
    };
    for (net, _) in others() {
        if !seen.insert(net) {
            twice.insert(net);
        }
    }
    let mut shared: BTreeMap<IpNet, Vec<NodeName>> = BTreeMap::new();
    for (net, node) in others().filter(|(net, _)| twice.contains(net)) {
        let gateways = shared.entry(net).or_default();
        if !gateways.contains(&node.name) {
            gateways.push(node.name.clone());
        }
    }
    shared.retain(|_, gateways| gateways.len() > 1); // One node may say it twice.
    shared
}

/// The place of the one to use; the one in use is the first.
fn choose(view: &View, gateways: &[NodeName]) -> usize {
    let nodes = &view.snapshot.nodes;
    let unknown = Tier::Anywhere;
    let distance = |name: &NodeName| match (nodes.get(&view.node), nodes.get(name)) {
        (Some(own), Some(node)) => tier(own, &node.locality, None),
        _ => unknown,
    };
    // While none is alive, the next packet is what may bring one back.
    let rank = |name: &NodeName| (view.dead.contains(name), distance(name));
    let cost = |name: &NodeName| view.costs.get(name).copied();
    let all = gateways.iter().enumerate();
    let best = all.min_by_key(|(_, name)| {
        let known = cost(name);
        (rank(name), known.is_none(), known, *name)
    });
    let (Some((at, best)), Some(current)) = (best, gateways.first()) else {
        return 0;
    };
    let better = rank(best) < rank(current)
        || match (cost(best), cost(current)) {
            (Some(best), Some(current)) => is_cheaper(best, current),
            _ => false,
        };
    if better { at } else { 0 }
}

fn put_first(gateways: &mut [NodeName], chosen: usize) {
    if let Some(head) = gateways.get_mut(..=chosen) {
        head.rotate_right(1);
    }
}

/// Whether packets for `net` are for this node's own networks, though others lead there too.
#[must_use]
pub fn is_own(own: &Node, net: &IpNet) -> bool {
    let lans = own.mapped.iter().map(|mapping| &mapping.lan);
    let mut own = own.prefixes.iter().chain(lans);
    own.any(|own| own.contains(net))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use mesh_wire::id::MeshId;

    use super::*;
    use crate::{
        node::tests::node,
        snapshot::{Locality, MeshSettings},
    };

    fn lan() -> IpNet {
        "10.201.0.0/24".parse().unwrap()
    }

    /// `n0`, which asks, and gateways of one LAN, the last of them at the asker's site.
    fn view(gateways: u32) -> View {
        let mesh = MeshSettings::with_defaults(MeshId([0; 32]), "m");
        let mut snapshot = Snapshot::empty(mesh);
        for number in 0..=gateways {
            let mut node = node(number);
            let site = match number {
                0 => "yard".to_owned(),
                other if other == gateways && gateways > 2 => "yard".to_owned(),
                other => format!("site-{other}"),
            };
            node.locality = Locality {
                site: Some(site.parse().unwrap()),
                ..Locality::default()
            };
            if number > 0 {
                node.prefixes = vec![lan()];
            }
            snapshot.nodes.insert(node.name.clone(), node);
        }
        View::new(Arc::new(snapshot), "n0".parse().unwrap())
    }

    fn costs(view: &mut View, costs: &[(&str, u64)]) {
        let costs = costs
            .iter()
            .map(|&(name, ms)| (name.parse().unwrap(), Duration::from_millis(ms)));
        view.costs = costs.collect();
    }

    fn dead(view: &mut View, dead: &[&str]) {
        view.dead = dead.iter().map(|name| name.parse().unwrap()).collect();
    }

    fn chosen(gateways: &Gateways) -> String {
        gateways.shared[&lan()][0].to_string()
    }

    #[test]
    fn the_nearest_living_one_is_chosen_and_kept_until_it_dies() {
        let mut view = view(3);
        let mut gateways = Gateways::default();
        assert!(gateways.handle_view(&view));
        assert_eq!(chosen(&gateways), "n3", "of the same site");
        dead(&mut view, &["n3"]);
        assert!(gateways.handle_view(&view));
        assert_eq!(chosen(&gateways), "n1", "the first by name");
        dead(&mut view, &["n3", "n1"]);
        assert!(gateways.handle_view(&view));
        assert_eq!(chosen(&gateways), "n2");
        dead(&mut view, &["n3"]);
        assert!(!gateways.handle_view(&view), "it stays with what works");
        dead(&mut view, &[]);
        assert!(gateways.handle_view(&view), "the same site is better");
        assert_eq!(chosen(&gateways), "n3");
        dead(&mut view, &["n1", "n2", "n3"]);
        assert!(!gateways.handle_view(&view), "nobody is better");
    }

    #[test]
    fn within_a_tier_only_a_much_cheaper_one_is_worth_a_move() {
        let mut view = view(2);
        let mut gateways = Gateways::default();
        gateways.handle_view(&view);
        assert_eq!(chosen(&gateways), "n1");
        for (n1, n2, moves) in [(100, 85, false), (20, 11, false), (100, 70, true)] {
            costs(&mut view, &[("n1", n1), ("n2", n2)]);
            assert_eq!(gateways.handle_view(&view), moves, "{n1} ms to {n2} ms");
        }
        assert_eq!(chosen(&gateways), "n2");
        costs(&mut view, &[("n1", 1)]);
        assert!(!gateways.handle_view(&view), "what n2 costs is not known");
    }

    #[test]
    fn another_snapshot_keeps_the_choice_and_everybody_else_may_send() {
        let mut view = view(2);
        let mut gateways = Gateways::default();
        gateways.handle_view(&view);
        dead(&mut view, &["n1"]);
        gateways.handle_view(&view);
        dead(&mut view, &[]);
        view.snapshot = Arc::new(Snapshot::clone(&view.snapshot));
        assert!(!gateways.handle_view(&view));
        let ids = vec![node(2).id, node(1).id];
        let orders: Vec<_> = gateways.orders().collect();
        assert_eq!(orders, [(lan(), ids)]);
        // To one of the two itself, only the other is another gateway: nothing is to be chosen.
        view.node = "n1".parse().unwrap();
        view.snapshot = Arc::new(Snapshot::clone(&view.snapshot));
        assert!(gateways.handle_view(&view));
        assert_eq!(gateways.orders().count(), 0);
    }
}
