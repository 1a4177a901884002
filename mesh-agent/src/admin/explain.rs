//! What the admin socket tells of policies: who decides of flows between two ends, both ways.

use std::net::IpAddr;

use mesh_api::admin::{ExplainPolicyRequest, ExplainPolicyResponse, PolicyVerdict};
use mesh_core::{
    policy::{
        Flow,
        judges::{Judged, Judges, UnknownEnd},
        resources::IpProtocol,
    },
    snapshot::Snapshot,
};
use tokio::task;
use tonic::Status;

use super::{Admin, diagnosis::internal};
use crate::policy::LIMITS;

impl Admin {
    pub(super) async fn explain_policy_report(
        &self,
        request: ExplainPolicyRequest,
    ) -> Result<ExplainPolicyResponse, Status> {
        let view = self.ask(|driver| driver.view()).await?;
        let view = view.ok_or_else(|| Status::unavailable("there is no state of the mesh yet"))?;
        let enforces = self.facts.enforces;
        let work = move || {
            let mut judges = Judges::new(view.snapshot.clone(), LIMITS);
            Ok(ExplainPolicyResponse {
                verdicts: explain(&mut judges, &view.snapshot, &request)?,
                enforces,
            })
        };
        task::spawn_blocking(work).await.map_err(internal)?
    }
}

/// Of each family that both ends have: what the two sides say of the flow, and of one the other way.
fn explain(
    judges: &mut Judges,
    snapshot: &Snapshot,
    request: &ExplainPolicyRequest,
) -> Result<Vec<PolicyVerdict>, Status> {
    let wanted = request.protocol.to_ascii_uppercase();
    let protocol = IpProtocol::ALL
        .into_iter()
        .find(|one| one.as_str() == wanted);
    let protocol = protocol.ok_or_else(|| {
        let text = format!("protocol {:?}: TCP, UDP, SCTP or ICMP", request.protocol);
        Status::invalid_argument(text)
    })?;
    let port = u16::try_from(request.port)
        .map_err(|_| Status::invalid_argument("a port is at most 65535"))?;
    let addresses = |end: &str| {
        let found = judges.addresses(end);
        found.map_err(|error| Status::not_found(unknown(&error, snapshot)))
    };
    let (sources, destinations) = (
        addresses(&request.source)?,
        addresses(&request.destination)?,
    );
    let mut verdicts = Vec::new();
    for &source in &sources {
        for &to in destinations
            .iter()
            .filter(|to| to.is_ipv4() == source.is_ipv4())
        {
            let flow = |from: IpAddr, to: IpAddr| Flow {
                from,
                to,
                protocol: Some(protocol),
                port,
            };
            for (way, flow) in [("there", flow(source, to)), ("back", flow(to, source))] {
                let judged = judges.sides(&flow).into_iter();
                verdicts.extend(judged.map(|judged| verdict(way, &flow, judged)));
            }
        }
    }
    match verdicts.is_empty() {
        true => Err(Status::invalid_argument(
            "neither end is on a node of the mesh, or they have no address family in common",
        )),
        false => Ok(verdicts),
    }
}

/// What is wrong with an end that has no address: a service's packets are judged by the endpoint that they go to.
fn unknown(error: &UnknownEnd, snapshot: &Snapshot) -> String {
    let service = match error {
        UnknownEnd::Pod(name) => snapshot.services.values().find(|service| {
            let service = &service.name;
            (&service.namespace, &service.name) == (&name.namespace, &name.name)
        }),
        UnknownEnd::Node(_) => None,
    };
    match service {
        None => error.to_string(),
        Some(service) => format!(
            "{} is a service, and policies judge what its packets are sent to: ask for a pod or a node \
             behind it, or for its address (`meshctl services` names them)",
            service.name
        ),
    }
}

fn verdict(way: &str, flow: &Flow, judged: Judged) -> PolicyVerdict {
    let said = match (
        judged.enforced,
        judged.verdict.allowed,
        judged.verdict.unaudited,
    ) {
        (false, ..) => "none",
        (true, false, _) => "deny",
        (true, true, false) => "audit",
        (true, true, true) => "allow",
    };
    PolicyVerdict {
        way: way.to_owned(),
        from: flow.from.to_string(),
        to: flow.to.to_string(),
        node: judged.node.to_string(),
        direction: judged.direction.as_str().to_owned(),
        verdict: said.to_owned(),
        by: judged.by,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use mesh_core::snapshot::{MeshSettings, Service, ServiceKind, ServiceName};
    use mesh_wire::id::MeshId;

    use super::*;

    #[test]
    fn a_service_is_not_called_a_pod_that_is_not_there() {
        let mut snapshot = Snapshot::empty(MeshSettings::with_defaults(MeshId([7; 32]), "demo"));
        let name = ServiceName {
            namespace: "default".to_owned(),
            name: "web".to_owned(),
        };
        let service = Service::new(name.clone(), ServiceKind::Headless);
        snapshot.services.insert(name, Arc::new(service));
        let judges = Judges::new(Arc::new(snapshot.clone()), LIMITS);
        let said = |end: &str| unknown(&judges.addresses(end).unwrap_err(), &snapshot);
        let service = said("default/web");
        assert!(
            service.starts_with("default/web is a service, and"),
            "{service}"
        );
        assert_eq!(
            said("default/wob"),
            "there is no pod default/wob with an address"
        );
        assert!(said("web").starts_with("there is no node web"));
    }
}
