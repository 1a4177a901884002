//! `MeshNode`.

use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Condition, SITE_PATTERN};

/// What the operator says of a node, by its name; and what the mesh knows of it.
#[derive(
    CustomResource, Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema,
)]
#[kube(
    group = "mesh.holdfast.dev",
    version = "v1alpha1",
    kind = "MeshNode",
    derive = "PartialEq",
    status = "MeshNodeStatus",
    doc = "A node of the mesh: what the operator says of it, and what the mesh knows of it.",
    shortname = "mn",
    category = "holdfast",
    printcolumn(name = "Site", type_ = "string", json_path = ".spec.site"),
    printcolumn(
        name = "Address",
        type_ = "string",
        json_path = ".status.overlayAddresses[0]"
    ),
    printcolumn(name = "Connected", type_ = "boolean", json_path = ".status.connected"),
    printcolumn(
        name = "Accepted",
        type_ = "string",
        json_path = ".status.conditions[?(@.type==\"Accepted\")].status"
    ),
    printcolumn(name = "NAT", type_ = "string", json_path = ".status.nat"),
    printcolumn(name = "Last-Seen", type_ = "date", json_path = ".status.lastSeen"),
    printcolumn(
        name = "Key",
        type_ = "string",
        json_path = ".status.wireguardPublicKey",
        priority = 1
    ),
    printcolumn(
        name = "Direct",
        type_ = "integer",
        json_path = ".status.paths.direct",
        priority = 1
    ),
    printcolumn(
        name = "Relayed",
        type_ = "integer",
        json_path = ".status.paths.relayed",
        priority = 1
    ),
    printcolumn(
        name = "Snapshot",
        type_ = "date",
        json_path = ".status.snapshotTime",
        priority = 1
    ),
    printcolumn(
        name = "Age",
        type_ = "date",
        json_path = ".metadata.creationTimestamp"
    )
)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct MeshNodeSpec {
    /// Its overlay IPv4 address; otherwise the controller chooses one when it joins.
    #[serde(
        default,
        rename = "overlayIPv4",
        skip_serializing_if = "Option::is_none"
    )]
    #[schemars(extend("format" = "ipv4"))]
    pub overlay_ipv4: Option<String>,
    /// Its site: nodes of one site share a LAN.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 63), regex(pattern = SITE_PATTERN))]
    pub site: Option<String>,
    /// Its zone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 63))]
    pub zone: Option<String>,
    /// Its region.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 63))]
    pub region: Option<String>,
    /// Prefixes behind it, for example the LAN.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 256), inner(length(max = 43)))]
    pub prefixes: Vec<String>,
    /// `address:port` at which its UDP socket is reachable for sure.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16), inner(length(max = 64)))]
    pub static_candidates: Vec<String>,
    /// Whether a node of this name may join although the MeshConfig says `joinApproval: manual`.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub approved: bool,
}

/// How many nodes a node reaches in which way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct NodePaths {
    /// Without a relay.
    #[serde(default)]
    pub direct: u32,
    /// Through a relay.
    #[serde(default)]
    pub relayed: u32,
    /// Not at all.
    #[serde(default)]
    pub unreachable: u32,
}

/// What the mesh knows of a node.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct MeshNodeStatus {
    /// The generation of the object that this is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// Its WireGuard public key, since it joined.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub wireguard_public_key: Option<String>,
    /// Its addresses in the overlay, IPv4 first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 2), extend("x-kubernetes-list-type" = "atomic"))]
    pub overlay_addresses: Vec<String>,
    /// Whether it has a stream to the controller, or, where its way out is metered, comes as it said (`missedAt`). The mesh
    /// carries traffic without one.
    #[serde(default)]
    pub connected: bool,
    /// Which controller it is or was connected to, where there are several.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub controller: Option<String>,
    /// When it was last seen, to the hour while it is connected, to the second once it is not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("format" = "date-time"))]
    pub last_seen: Option<String>,
    /// Of a node that comes now and then only, because its way out is metered: when it is taken to be gone unless it came.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("format" = "date-time"))]
    pub missed_at: Option<String>,
    /// The generation of the mesh's state that it had on its disk when it was last seen.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshot_generation: Option<i64>,
    /// When it last said that it has all that the controller knew then: how old what it serves from may be. Written with
    /// `lastSeen`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("format" = "date-time"))]
    pub snapshot_time: Option<String>,
    /// What is in front of its UDP socket, as far as it knows. `None`: nothing. `Easy`: one mapping for all destinations, so
    /// that direct paths can be had. `Hard`: another mapping for each destination, so that a relay is needed to other such
    /// nodes. `UDPBlocked`: UDP does not get out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("enum" = ["None", "Easy", "Hard", "UDPBlocked", null]))]
    pub nat: Option<String>,
    /// By how its packets reach the nodes that it spoke with since it started. Written at most every ten minutes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub paths: Option<NodePaths>,
    /// When its certificate ends, as it showed or was given it last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("format" = "date-time"))]
    pub certificate_expires: Option<String>,
    /// `Accepted`: whether the mesh acts on this object. `Joined`: whether the node is in the mesh.
    /// `Ready`: whether it is connected. `CertificateCurrent`: whether its certificate is renewed in time; not before it
    /// was connected once.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(
        length(max = 8),
        extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"])
    )]
    pub conditions: Vec<Condition>,
}
