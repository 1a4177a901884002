//! `MeshConfig`, `SiteRoute` and `Community`: the mesh and its sites as wholes.

use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{ObjectStatus, SITE_PATTERN};

/// What holds for the whole mesh. Its name is `default`.
#[derive(
    CustomResource, Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema,
)]
#[kube(
    group = "mesh.holdfast.dev",
    version = "v1alpha1",
    kind = "MeshConfig",
    derive = "PartialEq",
    status = "ObjectStatus",
    doc = "What holds for the whole mesh. There is one, named default.",
    shortname = "mc",
    category = "holdfast",
    printcolumn(
        name = "Overlay",
        type_ = "string",
        json_path = ".spec.overlayIPv4CIDR"
    ),
    printcolumn(
        name = "Join-Approval",
        type_ = "string",
        json_path = ".spec.joinApproval"
    ),
    printcolumn(
        name = "Accepted",
        type_ = "string",
        json_path = ".status.conditions[?(@.type==\"Accepted\")].status"
    ),
    printcolumn(
        name = "Age",
        type_ = "date",
        json_path = ".metadata.creationTimestamp"
    )
)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct MeshConfigSpec {
    /// Overlay IPv4 addresses come from here; `100.96.0.0/12` unless said otherwise.
    #[serde(
        default,
        rename = "overlayIPv4CIDR",
        skip_serializing_if = "Option::is_none"
    )]
    #[schemars(length(max = 18))]
    pub overlay_ipv4_cidr: Option<String>,
    /// Zone of the services; `cluster.local` unless said otherwise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 253))]
    pub cluster_domain: Option<String>,
    /// Zone of the node names; `mesh` unless said otherwise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 253))]
    pub node_domain: Option<String>,
    /// MTU of the overlay; 1280 unless said otherwise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1280, max = 8920))]
    pub mtu_bytes: Option<u16>,
    /// What happens to flows of which no MeshPolicy says anything: `allow` (unless said otherwise),
    /// `audit` (they pass, and are counted as what `deny` would drop) or `deny`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("enum" = ["allow", "audit", "deny", null]))]
    pub default_action: Option<String>,
    /// For how many days nodes count on what they have while no controller speaks with them; 30 unless said otherwise, 0 for ever.
    /// Then they serve what is their own, and speak with nobody. They warn from half of it on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 3650))]
    pub offline_limit_days: Option<u32>,
    /// Who lets nodes in that have a good token: `automatic` (unless said otherwise), or `manual`:
    /// a node waits until its MeshNode says `approved: true`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("enum" = ["automatic", "manual", null]))]
    pub join_approval: Option<String>,
}

/// LAN subnets behind gateway nodes.
#[derive(
    CustomResource, Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema,
)]
#[kube(
    group = "mesh.holdfast.dev",
    version = "v1alpha1",
    kind = "SiteRoute",
    derive = "PartialEq",
    status = "ObjectStatus",
    doc = "LAN subnets of a site, and the nodes through which the mesh reaches them.",
    shortname = "sr",
    category = "holdfast",
    printcolumn(name = "Gateways", type_ = "string", json_path = ".spec.gateways"),
    printcolumn(
        name = "Subnets",
        type_ = "string",
        json_path = ".spec.subnets[*].subnet"
    ),
    printcolumn(
        name = "Accepted",
        type_ = "string",
        json_path = ".status.conditions[?(@.type==\"Accepted\")].status"
    ),
    printcolumn(
        name = "Reason",
        type_ = "string",
        json_path = ".status.conditions[?(@.type==\"Accepted\")].reason"
    ),
    printcolumn(
        name = "Age",
        type_ = "date",
        json_path = ".metadata.creationTimestamp"
    )
)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct SiteRouteSpec {
    /// Nodes in the LAN, each with all of its subnets. Other nodes send to the nearest one that is alive. Of the LAN's
    /// devices, packets to the mesh may go to any of them: give the LAN one address for its router (VRRP).
    #[schemars(length(min = 1, max = 8), inner(length(max = 63)))]
    pub gateways: Vec<String>,
    /// The LAN's subnets.
    #[schemars(length(min = 1, max = 64))]
    pub subnets: Vec<Subnet>,
}

/// A subnet of a LAN.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Subnet {
    /// The subnet as the LAN itself knows it, for example `192.168.1.0/24`.
    #[schemars(length(min = 1, max = 43))]
    pub subnet: String,
    /// The subnet as the rest of the mesh sees it, address by address, when another site uses the
    /// same range; of the same length. Nothing: as the LAN knows it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 43))]
    pub mapped_to: Option<String>,
}

/// Sites that may connect directly.
#[derive(
    CustomResource, Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema,
)]
#[kube(
    group = "mesh.holdfast.dev",
    version = "v1alpha1",
    kind = "Community",
    plural = "communities",
    derive = "PartialEq",
    status = "ObjectStatus",
    doc = "Sites whose nodes may connect to each other directly. Without any Community all may; with one, nodes whose sites no Community has together speak through relays.",
    shortname = "cty",
    category = "holdfast",
    printcolumn(name = "Sites", type_ = "string", json_path = ".spec.sites"),
    printcolumn(
        name = "Accepted",
        type_ = "string",
        json_path = ".status.conditions[?(@.type==\"Accepted\")].status"
    ),
    printcolumn(
        name = "Reason",
        type_ = "string",
        json_path = ".status.conditions[?(@.type==\"Accepted\")].reason"
    ),
    printcolumn(
        name = "Age",
        type_ = "date",
        json_path = ".metadata.creationTimestamp"
    )
)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct CommunitySpec {
    /// The sites' names (`spec.site` of a MeshNode, or the label mesh.holdfast.dev/site of a Node). Nodes of one
    /// site may always connect directly, nodes without a site then with nobody.
    #[schemars(
        length(min = 1, max = COMMUNITY_SITES_MAX),
        inner(length(max = 63), regex(pattern = SITE_PATTERN))
    )]
    pub sites: Vec<String>,
}

/// Most sites of a community: each is told to every node, 256 of them 16 KiB at most.
pub const COMMUNITY_SITES_MAX: usize = 256;
