//! `ExternalPeer`.

use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::ObjectStatus;

/// A plain WireGuard device, by its name.
#[derive(
    CustomResource, Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema,
)]
#[kube(
    group = "mesh.holdfast.dev",
    version = "v1alpha1",
    kind = "ExternalPeer",
    derive = "PartialEq",
    status = "ObjectStatus",
    doc = "A plain WireGuard device, for example a phone, that reaches the mesh through one node.",
    shortname = "xp",
    category = "holdfast",
    printcolumn(name = "Gateway", type_ = "string", json_path = ".spec.gateway"),
    printcolumn(name = "Addresses", type_ = "string", json_path = ".spec.addresses"),
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
pub struct ExternalPeerSpec {
    /// Its WireGuard public key, in base64.
    #[schemars(length(max = 44), regex(pattern = r"^[A-Za-z0-9+/]{43}=$"))]
    pub public_key: String,
    /// Its prefixes in the overlay.
    #[schemars(length(min = 1, max = 64), inner(length(max = 43)))]
    pub addresses: Vec<String>,
    /// The node that it has its tunnel with.
    #[schemars(length(min = 1, max = 63))]
    pub gateway: String,
    /// `address:port` where it listens; otherwise it calls first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64))]
    pub endpoint: Option<String>,
    /// How often the gateway keeps its NAT open; otherwise never.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(max = 65535))]
    pub keepalive_seconds: Option<u16>,
}
