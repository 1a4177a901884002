//! Who may ask.

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
};

use ipnet::IpNet;
use mesh_core::services::View;
use mesh_wire::id::canonical_ip;

/// This node, what is behind it, and whom the operator names: never an open resolver.
#[derive(Debug)]
pub(crate) struct Clients {
    listen: BTreeSet<IpAddr>,
    allow_from: Vec<IpNet>,
}

impl Clients {
    pub(crate) fn new(listen: &[SocketAddr], allow_from: Vec<IpNet>) -> Self {
        Self {
            // Processes on the node ask 169.254.53.53 from that same address.
            listen: listen.iter().map(|one| canonical_ip(one.ip())).collect(),
            allow_from,
        }
    }

    pub(crate) fn include(&self, source: IpAddr, view: Option<&View>) -> bool {
        let node = view.and_then(|view| view.snapshot.nodes.get(&view.node));
        source.is_loopback()
            || self.listen.contains(&source)
            || self
                .allow_from
                .iter()
                .any(|prefix| prefix.contains(&source))
            || node.is_some_and(|node| {
                let lans = node.mapped.iter().map(|mapping| mapping.lan);
                let mut behind = node.allowed_prefixes().chain(lans);
                node.underlay_addresses.contains(&source)
                    || behind.any(|prefix| prefix.contains(&source))
            })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use mesh_core::snapshot::{MeshSettings, Node, Snapshot};
    use mesh_wire::id::{MeshId, NodeId};

    use super::*;

    #[test]
    fn only_this_node_and_what_is_behind_it_may_ask() {
        let mut snapshot = Snapshot::empty(MeshSettings::with_defaults(MeshId([9; 32]), "demo"));
        for (number, name) in [(1, "own"), (2, "other")] {
            let (name, id) = (name.parse().unwrap(), NodeId([number; 32]));
            let node = Node {
                prefixes: vec![format!("10.2.{number}.0/24").parse().unwrap()],
                underlay_addresses: vec![IpAddr::from([192, 168, 7, number])],
                ..Node::new(&snapshot.mesh.id, name, id, [100, 96, 0, number].into())
            };
            snapshot.nodes.insert(node.name.clone(), node);
        }
        let view = View::new(Arc::new(snapshot), "own".parse().unwrap());
        let listen = ["169.254.53.53:53".parse().unwrap()];
        let clients = Clients::new(&listen, vec!["172.17.0.0/16".parse().unwrap()]);
        for (source, with_view, without) in [
            ("127.0.0.1", true, true),
            ("::1", true, true),
            ("169.254.53.53", true, true),
            ("172.17.0.9", true, true),
            ("100.96.0.1", true, false),
            ("10.2.1.7", true, false),
            ("192.168.7.1", true, false),
            ("100.96.0.2", false, false),
            ("10.2.2.7", false, false),
            ("192.168.7.2", false, false),
            ("203.0.113.5", false, false),
            ("169.254.53.54", false, false),
        ] {
            let source = source.parse().unwrap();
            assert_eq!(clients.include(source, Some(&view)), with_view, "{source}");
            assert_eq!(clients.include(source, None), without, "{source}, no view");
        }
    }
}
