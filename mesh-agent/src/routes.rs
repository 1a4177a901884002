//! Where packets to an address go, as the mesh wants it. Pure: what the kernel does stands beside it (`mesh-linux`, `lookup`).

use std::net::IpAddr;

use ipnet::IpNet;
use mesh_api::admin::RouteResponse;
use mesh_core::{
    services::View,
    snapshot::{ExternalPeer, Snapshot},
};

use crate::{
    network::{self, Local},
    trace::{owner, service_at},
};

/// What the mesh says of packets to `address` that this node makes. `tunnel`: the name of its device.
#[must_use]
pub fn route(view: &View, tunnel: &str, address: IpAddr) -> RouteResponse {
    let snapshot = &view.snapshot;
    let mut said = by_mesh(view, address);
    // What the kernel was given, whoever has the address.
    let given = network::desired(snapshot, &view.node, &Local::default());
    let routes = given.map(|given| given.routes).unwrap_or_default();
    let matching = routes.into_iter().filter(|(net, _)| net.contains(&address));
    let longest = matching.max_by_key(|(net, _)| net.prefix_len());
    let stays = matches!(said.kind.as_str(), "local" | "behind_this_node" | "service");
    if let Some((_, source)) = longest.filter(|_| !stays) {
        tunnel.clone_into(&mut said.interface);
        said.source = source.map(|ip| ip.to_string()).unwrap_or_default();
    }
    said
}

fn by_mesh(view: &View, address: IpAddr) -> RouteResponse {
    let snapshot = &view.snapshot;
    let said = |kind: &str, by: String, node: String| RouteResponse {
        kind: kind.to_owned(),
        by,
        node,
        ..RouteResponse::default()
    };
    if let Some(service) = service_at(snapshot, address) {
        return said("service", service.name.to_string(), String::new());
    }
    if let Some((peer, prefix)) = external(snapshot, address) {
        return said("external", prefix.to_string(), peer.name.to_string());
    }
    let Some(node) = owner(snapshot, address) else {
        let overlay = IpNet::from(snapshot.mesh.overlay_v4);
        let ula = IpNet::from(snapshot.mesh.id.ula_prefix());
        let mesh = [overlay, ula]
            .into_iter()
            .find(|net| net.contains(&address));
        return match mesh {
            Some(net) => said("nobody", net.to_string(), String::new()),
            None => said("outside", String::new(), String::new()),
        };
    };
    let name = node.name.to_string();
    let own = node.name == view.node;
    if node.own_addresses().any(|one| one == address) {
        let kind = if own { "local" } else { "node" };
        return said(kind, IpNet::from(address).to_string(), name);
    }
    let behind = node.allowed_prefixes().filter(|net| net.contains(&address));
    let longest = behind.max_by_key(IpNet::prefix_len);
    let kind = match own {
        true => "behind_this_node",
        false => "behind_node",
    };
    let prefix = longest.map(|net| net.to_string());
    said(kind, prefix.unwrap_or_default(), name)
}

/// The plain WireGuard device that has the address.
fn external(snapshot: &Snapshot, address: IpAddr) -> Option<(&ExternalPeer, IpNet)> {
    let peers = snapshot.external_peers.values();
    let mut found = peers.filter_map(|peer| {
        let mut prefixes = peer.prefixes.iter();
        let prefix = prefixes.find(|net| net.contains(&address))?;
        Some((peer, *prefix))
    });
    found.next()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use mesh_core::snapshot::{MeshSettings, Node};
    use mesh_wire::id::{MeshId, NodeId, NodeName};

    use super::*;

    fn view() -> View {
        let mesh = MeshId([7; 32]);
        let mut snapshot = Snapshot::empty(MeshSettings::with_defaults(mesh, "demo"));
        for (name, last) in [("edge-a1", 1), ("edge-b1", 2)] {
            let name: NodeName = name.parse().unwrap();
            let overlay = [100, 96, 0, last].into();
            let mut node = Node::new(&mesh, name.clone(), NodeId([last; 32]), overlay);
            node.prefixes = vec![format!("192.168.{last}.0/24").parse().unwrap()];
            snapshot.nodes.insert(name, node);
        }
        let phone = ExternalPeer {
            id: NodeId([9; 32]),
            name: "phone".parse().unwrap(),
            prefixes: vec!["100.96.9.9/32".parse().unwrap()],
            gateway: "edge-b1".parse().unwrap(),
            endpoint: None,
            keepalive: None,
        };
        snapshot.external_peers.insert(phone.name.clone(), phone);
        View::new(Arc::new(snapshot), "edge-a1".parse().unwrap())
    }

    #[test]
    fn what_has_an_address_is_named_and_whether_the_tunnel_leads_there() {
        let view = view();
        for (address, kind, by, node, by_tunnel) in [
            ("100.96.0.1", "local", "100.96.0.1/32", "edge-a1", false),
            ("100.96.0.2", "node", "100.96.0.2/32", "edge-b1", true),
            (
                "192.168.2.7",
                "behind_node",
                "192.168.2.0/24",
                "edge-b1",
                true,
            ),
            (
                "192.168.1.7",
                "behind_this_node",
                "192.168.1.0/24",
                "edge-a1",
                false,
            ),
            ("100.96.9.9", "external", "100.96.9.9/32", "phone", true),
            ("100.96.7.7", "nobody", "100.96.0.0/12", "", true),
            ("192.0.2.1", "outside", "", "", false),
        ] {
            let said = route(&view, "holdfast0", address.parse().unwrap());
            assert_eq!(
                (said.kind.as_str(), said.by.as_str()),
                (kind, by),
                "{address}"
            );
            assert_eq!(said.node, node, "{address}");
            let leads = (said.interface.as_str(), said.source.as_str());
            let expected = if by_tunnel {
                ("holdfast0", "100.96.0.1")
            } else {
                ("", "")
            };
            assert_eq!(leads, expected, "{address}");
        }
    }
}
