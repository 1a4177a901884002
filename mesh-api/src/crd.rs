//! Holdfast's own Kubernetes kinds, `mesh.holdfast.dev/v1alpha1`: `MeshService` is in its service's
//! namespace, the others are cluster-scoped.
//!
//! Values are text as the user wrote it; the controller checks them and names the field.

use std::collections::BTreeMap;

use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// `apiVersion` of every kind here.
pub const API_VERSION: &str = "mesh.holdfast.dev/v1alpha1";

/// Label of a `v1 Node` that says its site.
pub const SITE_LABEL: &str = "mesh.holdfast.dev/site";

/// Annotation of a `v1 Service` with the `policy` of a [`MeshService`].
pub const POLICY_ANNOTATION: &str = "mesh.holdfast.dev/policy";

/// Annotation of a `v1 Service` with the `spillOver` of a [`MeshService`].
pub const SPILL_OVER_ANNOTATION: &str = "mesh.holdfast.dev/spill-over";

/// What the operator says of a node, by its name.
#[derive(
    CustomResource, Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema,
)]
#[kube(
    group = "mesh.holdfast.dev",
    version = "v1alpha1",
    kind = "MeshNode",
    derive = "PartialEq"
)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct MeshNodeSpec {
    /// Its overlay IPv4 address; otherwise the controller chooses one when it joins.
    #[serde(
        default,
        rename = "overlayIPv4",
        skip_serializing_if = "Option::is_none"
    )]
    pub overlay_ipv4: Option<String>,
    /// Its site: nodes of one site share a LAN.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub site: Option<String>,
    /// Its zone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub zone: Option<String>,
    /// Its region.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub region: Option<String>,
    /// Prefixes behind it, for example the LAN.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub prefixes: Vec<String>,
    /// `address:port` at which its UDP socket is reachable for sure.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub static_candidates: Vec<String>,
}

/// A relay, by its name.
#[derive(
    CustomResource, Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema,
)]
#[kube(
    group = "mesh.holdfast.dev",
    version = "v1alpha1",
    kind = "MeshRelay",
    derive = "PartialEq"
)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct MeshRelaySpec {
    /// Its addresses.
    pub addresses: Vec<String>,
    /// UDP port for QUIC; 443 unless said otherwise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quic_port: Option<u16>,
    /// TCP port for TLS; 443 unless said otherwise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls_port: Option<u16>,
    /// UDP ports that answer STUN; the QUIC port and 3478 unless said otherwise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stun_ports: Option<Vec<u16>>,
}

/// A plain WireGuard device, by its name.
#[derive(
    CustomResource, Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema,
)]
#[kube(
    group = "mesh.holdfast.dev",
    version = "v1alpha1",
    kind = "ExternalPeer",
    derive = "PartialEq"
)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ExternalPeerSpec {
    /// Its WireGuard public key.
    pub public_key: String,
    /// Its prefixes in the overlay.
    pub addresses: Vec<String>,
    /// The node that it has its tunnel with.
    pub gateway: String,
    /// `address:port` where it listens; otherwise it calls first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub endpoint: Option<String>,
    /// How often the gateway keeps its NAT open; otherwise never.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub keepalive_seconds: Option<u16>,
}

/// What holds for the whole mesh. Its name is `default`.
#[derive(
    CustomResource, Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema,
)]
#[kube(
    group = "mesh.holdfast.dev",
    version = "v1alpha1",
    kind = "MeshConfig",
    derive = "PartialEq"
)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct MeshConfigSpec {
    /// Overlay IPv4 addresses come from here; `100.96.0.0/12` unless said otherwise.
    #[serde(
        default,
        rename = "overlayIPv4CIDR",
        skip_serializing_if = "Option::is_none"
    )]
    pub overlay_ipv4_cidr: Option<String>,
    /// Zone of the services; `cluster.local` unless said otherwise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cluster_domain: Option<String>,
    /// Zone of the node names; `mesh` unless said otherwise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node_domain: Option<String>,
    /// MTU of the overlay; 1280 unless said otherwise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu_bytes: Option<u16>,
    /// What happens to flows of which no MeshPolicy says anything: `allow` (unless said otherwise),
    /// `audit` (they pass, and are counted as what `deny` would drop) or `deny`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub default_action: Option<String>,
}

/// How new flows are spread over the endpoints of the `v1 Service` of its name and namespace.
#[derive(
    CustomResource, Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema,
)]
#[kube(
    group = "mesh.holdfast.dev",
    version = "v1alpha1",
    kind = "MeshService",
    namespaced,
    derive = "PartialEq"
)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct MeshServiceSpec {
    /// `random` (unless said otherwise), `consistent-hash` (by client), `round-robin` or `least-latency`
    /// (of the nearest, those behind the best measured paths).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub policy: Option<String>,
    /// How many endpoints carry the whole load: where fewer come first, those that come next take
    /// the rest. Unless said otherwise 1: the first always carry it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub spill_over: Option<u16>,
    /// Endpoints that take more flows than others beside them; the first that matches counts.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub weights: Vec<EndpointWeight>,
}

/// A weight, and exactly one of the others: which endpoints have it.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct EndpointWeight {
    /// How many flows they take where others take one.
    pub weight: u16,
    /// The endpoint with this address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<String>,
    /// Those on this node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    /// Those at this site.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub site: Option<String>,
    /// Those in this zone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub zone: Option<String>,
    /// Those in this region.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub region: Option<String>,
}

/// Who may speak with whom in the whole mesh. Denials come before allowances, and those before
/// the `defaultAction` of the MeshConfig.
#[derive(
    CustomResource, Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema,
)]
#[kube(
    group = "mesh.holdfast.dev",
    version = "v1alpha1",
    kind = "MeshPolicy",
    plural = "meshpolicies",
    derive = "PartialEq"
)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct MeshPolicySpec {
    /// It changes nothing: what it would deny passes and is counted.
    #[serde(default)]
    pub audit: bool,
    /// In no order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub rules: Vec<PolicyRule>,
}

/// Flows and what becomes of them.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct PolicyRule {
    /// `allow` or `deny`.
    pub action: String,
    /// Who opened the flow: one of these; anybody unless said otherwise.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub from: Vec<PolicyParty>,
    /// To whom: one of these; anybody unless said otherwise.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub to: Vec<PolicyParty>,
    /// By what: one of these; anything unless said otherwise.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ports: Vec<PolicyPort>,
}

/// Ends of flows: everything that is said here must hold, of each list one entry.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct PolicyParty {
    /// Nodes with their pods and what is behind them, or plain WireGuard devices.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub nodes: Vec<String>,
    /// All nodes at these sites, with their pods and what is behind them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub sites: Vec<String>,
    /// Pods in these namespaces.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub namespaces: Vec<String>,
    /// Pods in namespaces with such labels.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub namespace_selector: Option<PolicySelector>,
    /// Pods that run as these: `namespace/name`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub service_accounts: Vec<String>,
    /// Pods with such labels.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod_selector: Option<PolicySelector>,
    /// Addresses in these prefixes, whoever has them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub cidrs: Vec<String>,
}

/// `metav1.LabelSelector`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct PolicySelector {
    /// Labels that must be there.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub match_labels: BTreeMap<String, String>,
    /// What else must hold.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub match_expressions: Vec<PolicyRequirement>,
}

/// What must hold for a label.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct PolicyRequirement {
    /// The label.
    pub key: String,
    /// `In`, `NotIn`, `Exists` or `DoesNotExist`.
    pub operator: String,
    /// For `In` and `NotIn`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub values: Vec<String>,
}

/// Destination ports.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct PolicyPort {
    /// `TCP` (unless said otherwise), `UDP`, `SCTP` or `ICMP`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub protocol: Option<String>,
    /// All unless said otherwise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
    /// The last, if they are more than one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub end_port: Option<u16>,
}

#[cfg(test)]
mod tests {
    use kube::CustomResourceExt as _;

    use super::*;

    #[test]
    fn each_kind_has_a_definition_with_the_field_names_that_users_write() {
        let definitions = [
            (MeshNode::crd(), "meshnodes", "overlayIPv4"),
            (MeshRelay::crd(), "meshrelays", "quicPort"),
            (ExternalPeer::crd(), "externalpeers", "keepaliveSeconds"),
            (MeshConfig::crd(), "meshconfigs", "overlayIPv4CIDR"),
            (MeshService::crd(), "meshservices", "spillOver"),
            (MeshPolicy::crd(), "meshpolicies", "audit"),
        ];
        for (definition, plural, field) in definitions {
            assert_eq!(definition.spec.names.plural, plural);
            let scope = if plural == "meshservices" {
                "Namespaced"
            } else {
                "Cluster"
            };
            assert_eq!(definition.spec.scope, scope);
            let version = serde_json::to_value(&definition.spec.versions[0]).unwrap();
            let schema = &version["schema"]["openAPIV3Schema"]["properties"]["spec"];
            assert!(
                schema["properties"][field].is_object(),
                "{plural}: {version}"
            );
            let named = format!(
                "{}/{}",
                definition.spec.group, definition.spec.versions[0].name
            );
            assert_eq!(named, API_VERSION);
        }
    }
}
