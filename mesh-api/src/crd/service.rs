//! `MeshService`.

use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::ObjectStatus;

/// How new flows are spread over the endpoints of the `v1 Service` of its name and namespace.
#[derive(
    CustomResource, Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema,
)]
#[kube(
    group = "mesh.holdfast.dev",
    version = "v1alpha1",
    kind = "MeshService",
    namespaced,
    derive = "PartialEq",
    status = "ObjectStatus",
    doc = "How new flows are spread over the endpoints of the Service of the same name.",
    shortname = "ms",
    category = "holdfast",
    printcolumn(name = "Policy", type_ = "string", json_path = ".spec.policy"),
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
pub struct MeshServiceSpec {
    /// `random` (unless said otherwise), `consistent-hash` (by client), `round-robin` or `least-latency`
    /// (of the nearest, those behind the best measured paths).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("enum" = ["random", "consistent-hash", "round-robin", "least-latency", null]))]
    pub policy: Option<String>,
    /// How many endpoints carry the whole load: where fewer come first, those that come next take
    /// the rest. Unless said otherwise 1: the first always carry it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1000))]
    pub spill_over: Option<u16>,
    /// How many TCP connections of one node an endpoint takes before new ones go on to others, the nearest with room
    /// first. As each node counts by itself, once a second; where all are full they share. Unless said otherwise any number.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 10000))]
    pub max_connections: Option<u16>,
    /// Whether TCP connections between a client and an endpoint on one node pass data from socket to socket instead of
    /// through TCP; `docs/services.md` says what applications give up. Unless said otherwise they do not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sockmap: Option<bool>,
    /// Endpoints that take more flows than others beside them; the first that matches counts.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64))]
    pub weights: Vec<EndpointWeight>,
}

/// A weight, and exactly one of the others: which endpoints have it.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[schemars(extend("x-kubernetes-validations" = [{
    "rule": "(has(self.address) ? 1 : 0) + (has(self.node) ? 1 : 0) + (has(self.site) ? 1 : 0) + (has(self.zone) ? 1 : 0) + (has(self.region) ? 1 : 0) == 1",
    "message": "give exactly one of address, node, site, zone and region"
}]))]
pub struct EndpointWeight {
    /// How many flows they take where others take one.
    #[schemars(range(min = 1, max = 100))]
    pub weight: u16,
    /// The endpoint with this address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 45))]
    pub address: Option<String>,
    /// Those on this node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 63))]
    pub node: Option<String>,
    /// Those at this site.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 63))]
    pub site: Option<String>,
    /// Those in this zone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 63))]
    pub zone: Option<String>,
    /// Those in this region.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 63))]
    pub region: Option<String>,
}
