//! `MeshRelay`.

use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::ObjectStatus;

/// A relay, by its name.
#[derive(
    CustomResource, Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema,
)]
#[kube(
    group = "mesh.holdfast.dev",
    version = "v1alpha1",
    kind = "MeshRelay",
    derive = "PartialEq",
    status = "ObjectStatus",
    doc = "A relay: carries the nodes' ciphertext where no direct path works.",
    shortname = "mr",
    category = "holdfast",
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
pub struct MeshRelaySpec {
    /// Its addresses.
    #[schemars(length(min = 1, max = 8), inner(length(max = 45)))]
    pub addresses: Vec<String>,
    /// UDP port for QUIC; 443 unless said otherwise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 65535))]
    pub quic_port: Option<u16>,
    /// TCP port for TLS; 443 unless said otherwise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 65535))]
    pub tls_port: Option<u16>,
    /// UDP ports that answer STUN; the QUIC port and 3478 unless said otherwise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 8), inner(range(min = 1, max = 65535)))]
    pub stun_ports: Option<Vec<u16>>,
    /// A node of the mesh that acts as this relay, with its own certificate; a relay of its own
    /// (`mesh-relay`, `meshctl relay issue`) unless said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 63))]
    pub node: Option<String>,
    /// The sites that it serves: one of two nodes that meet there is in one of them. Everybody
    /// unless said.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64), inner(length(min = 1, max = 63)))]
    pub sites: Vec<String>,
}
