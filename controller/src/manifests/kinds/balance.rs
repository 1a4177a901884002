//! `MeshService`, and annotations of a `v1 Service` that say the same.

use std::{collections::BTreeMap, num::NonZeroU16};

use mesh_api::crd::{
    EndpointWeight, MAX_CONNECTIONS_ANNOTATION, MeshServiceSpec, POLICY_ANNOTATION,
    SOCKMAP_ANNOTATION, SPILL_OVER_ANNOTATION,
};
use mesh_core::snapshot::{
    Balance, CONNECTIONS_MAX, Place, Policy, SPILL_OVER_MAX, ServiceName, WEIGHT_MAX, WEIGHTS_MAX,
    Weight,
};

use super::{Checked, FieldProblem, Object, ObjectId, optional, parse};

pub(crate) fn mesh_service(id: &ObjectId, spec: &MeshServiceSpec) -> Checked<Object> {
    if spec.weights.len() > WEIGHTS_MAX {
        let text = format!("are {}, more than {WEIGHTS_MAX}", spec.weights.len());
        return Err(FieldProblem::new("spec.weights", text));
    }
    let weights = spec.weights.iter().enumerate();
    let balance = Balance {
        policy: policy("spec.policy", spec.policy.as_deref())?,
        spill_over: spill_over("spec.spillOver", spec.spill_over)?,
        max_connections: max_connections("spec.maxConnections", spec.max_connections)?,
        sockmap: spec.sockmap.unwrap_or_default(),
        weights: weights
            .map(|(index, raw)| weight(&format!("spec.weights[{index}]"), raw))
            .collect::<Checked<_>>()?,
    };
    let name = ServiceName {
        namespace: id.namespace.clone(),
        name: id.name.clone(),
    };
    Ok(Object::Balance(name, balance))
}

pub(super) fn by_annotations(said: Option<&BTreeMap<String, String>>) -> Checked<Balance> {
    let text = |name: &str| said.and_then(|said| said.get(name)).map(String::as_str);
    let field = |name: &str| format!("metadata.annotations[{name}]");
    let parts = field(SPILL_OVER_ANNOTATION);
    let enough = text(SPILL_OVER_ANNOTATION).map(|text| parse(&parts, text));
    let connections = field(MAX_CONNECTIONS_ANNOTATION);
    let limit = text(MAX_CONNECTIONS_ANNOTATION).map(|text| parse(&connections, text));
    let sockmap = optional(&field(SOCKMAP_ANNOTATION), text(SOCKMAP_ANNOTATION))?;
    Ok(Balance {
        policy: policy(&field(POLICY_ANNOTATION), text(POLICY_ANNOTATION))?,
        spill_over: spill_over(&parts, enough.transpose()?)?,
        max_connections: max_connections(&connections, limit.transpose()?)?,
        sockmap: sockmap.unwrap_or_default(),
        weights: Vec::new(),
    })
}

fn policy(field: &str, text: Option<&str>) -> Checked<Policy> {
    match text {
        None | Some("random") => Ok(Policy::Random),
        Some("consistent-hash") => Ok(Policy::ConsistentHash),
        Some("round-robin") => Ok(Policy::RoundRobin),
        Some("least-latency") => Ok(Policy::LeastLatency),
        Some(other) => {
            let text = format!(
                "{other:?} is not one of random, consistent-hash, round-robin and least-latency"
            );
            Err(FieldProblem::new(field, text))
        }
    }
}

fn spill_over(field: &str, enough: Option<u16>) -> Checked<u16> {
    // What says nothing is the same as the default, so that both make one resource.
    match enough {
        None | Some(1) => Ok(0),
        Some(enough) if (1..=SPILL_OVER_MAX).contains(&enough) => Ok(enough),
        Some(other) => {
            let text = format!("{other} is not in 1 to {SPILL_OVER_MAX}");
            Err(FieldProblem::new(field, text))
        }
    }
}

fn max_connections(field: &str, limit: Option<u16>) -> Checked<Option<NonZeroU16>> {
    match limit {
        None => Ok(None),
        Some(limit @ 1..=CONNECTIONS_MAX) => Ok(NonZeroU16::new(limit)),
        Some(other) => {
            let text = format!("{other} is not in 1 to {CONNECTIONS_MAX}");
            Err(FieldProblem::new(field, text))
        }
    }
}

fn weight(field: &str, raw: &EndpointWeight) -> Checked<Weight> {
    if !(1..=WEIGHT_MAX).contains(&raw.weight) {
        let text = format!("{} is not in 1 to {WEIGHT_MAX}", raw.weight);
        return Err(FieldProblem::new(format!("{field}.weight"), text));
    }
    let at = |name: &str| format!("{field}.{name}");
    let EndpointWeight {
        weight,
        address,
        node,
        site,
        zone,
        region,
    } = raw;
    let place = match (address, node, site, zone, region) {
        (Some(text), None, None, None, None) => Place::Address(parse(&at("address"), text)?),
        (None, Some(text), None, None, None) => Place::Node(parse(&at("node"), text)?),
        (None, None, Some(text), None, None) => Place::Site(parse(&at("site"), text)?),
        (None, None, None, Some(text), None) if !text.is_empty() => Place::Zone(text.clone()),
        (None, None, None, None, Some(text)) if !text.is_empty() => Place::Region(text.clone()),
        _ => {
            let text = "says not exactly one of address, node, site, zone and region";
            return Err(FieldProblem::new(field, text));
        }
    };
    Ok(Weight {
        place,
        weight: *weight,
    })
}
