//! In which order programs stand at an interface, whoever of them comes first.

use std::{
    os::fd::{AsFd as _, BorrowedFd},
    sync::{Mutex, PoisonError},
};

use aya::{
    Ebpf,
    programs::{
        LinkOrder, MultiProgram, ProgramError, ProgramFd, SchedClassifier, TcAttachType,
        tc::{SchedClassifierLink, TcAttachOptions},
    },
};

use crate::program;

/// Where a program stands among those that are not ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Edge {
    First,
    Last,
}

/// For packets that come in. What comes by the tunnel is judged by policy before anything changes it, what a pod or a device
/// sends as what it became; what is redirected leaves. Who is first among others stands before who is last.
const INGRESS: [(&str, Edge); 9] = [
    ("hf_policy_in", Edge::First),
    ("hf_requests", Edge::First),
    ("hf_requests_ip", Edge::First),
    ("hf_policy_from", Edge::First),
    ("hf_policy_device", Edge::First),
    ("hf_entering", Edge::Last),
    ("hf_mapped_in", Edge::Last),
    ("hf_redirect", Edge::Last),
    ("hf_redirect_ip", Edge::Last),
];

/// For packets that leave. Policy sees endpoints where pods see services, and what the mesh will see. Whom the mesh
/// knows by a mapped address goes as that, and not as this node.
const EGRESS: [(&str, Edge); 6] = [
    ("hf_policy_to", Edge::First),
    ("hf_answers_out", Edge::First),
    ("hf_answers_ip", Edge::First),
    ("hf_mapped_out", Edge::First),
    ("hf_leaving", Edge::First),
    ("hf_policy_out", Edge::Last),
];

/// Which way packets go that a program looks at; `None`: it looks at none.
pub(crate) fn way(name: &str) -> Option<TcAttachType> {
    let is_in = |order: &[(&str, Edge)]| order.iter().any(|(one, _)| *one == name);
    match (is_in(&INGRESS), is_in(&EGRESS)) {
        (true, _) => Some(TcAttachType::Ingress),
        (false, true) => Some(TcAttachType::Egress),
        (false, false) => None,
    }
}

/// Nobody comes between who looks for a place and takes it.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// Puts a program of ours where it belongs at an interface.
pub(crate) fn attach(
    ebpf: &mut Ebpf,
    name: &str,
    interface: &str,
    way: TcAttachType,
) -> Result<SchedClassifierLink, ProgramError> {
    let _turn = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let order: &[_] = match way {
        TcAttachType::Egress => &EGRESS,
        TcAttachType::Ingress | TcAttachType::Custom(_) => &INGRESS,
    };
    let (_, there) = SchedClassifier::query_tcx(interface, way)?;
    let names = there.iter().map(|one| one.name_as_str());
    let (edge, neighbour) = place(order, name, &names.collect::<Vec<_>>());
    let neighbour = neighbour.and_then(|index| there.get(index));
    // Held until the program is attached.
    let neighbour = neighbour.map(|one| one.fd().map(Neighbour)).transpose()?;
    let order = match (edge, &neighbour) {
        (Edge::First, Some(lower)) => LinkOrder::after_program(lower)?,
        (Edge::First, None) => LinkOrder::first(),
        (Edge::Last, Some(higher)) => LinkOrder::before_program(higher)?,
        (Edge::Last, None) => LinkOrder::last(),
    };
    let program = program::<SchedClassifier>(ebpf, name)?;
    let link = program.attach_with_options(interface, way, TcAttachOptions::TcxOrder(order))?;
    program.take_link(link)
}

struct Neighbour(ProgramFd);

impl MultiProgram for Neighbour {
    fn fd(&self) -> Result<BorrowedFd<'_>, ProgramError> {
        Ok(self.0.as_fd())
    }
}

/// At which edge a program stands, and of those that are `there` the one behind which it comes, or at the last
/// edge before which.
fn place(order: &[(&str, Edge)], name: &str, there: &[Option<&str>]) -> (Edge, Option<usize>) {
    let rank = |name: &str| order.iter().position(|(one, _)| *one == name);
    let own = rank(name);
    let edge = own.and_then(|own| order.get(own));
    let edge = edge.map_or(Edge::Last, |(_, edge)| *edge);
    let mut ranks = there.iter().map(|name| rank((*name)?));
    let neighbour = match edge {
        Edge::First => ranks.rposition(|one| one.is_some_and(|one| Some(one) < own)),
        Edge::Last => ranks.position(|one| one.is_some_and(|one| Some(one) > own)),
    };
    (edge, neighbour)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Where the programs stand that came in this order, where another one was before.
    fn after(order: &[(&str, Edge)], coming: &[&'static str]) -> Vec<&'static str> {
        let mut there = vec!["other"];
        for name in coming {
            let names: Vec<_> = there.iter().map(|name| Some(*name)).collect();
            let index = match place(order, name, &names) {
                (Edge::First, lower) => lower.map_or(0, |lower| lower + 1),
                (Edge::Last, higher) => higher.unwrap_or(there.len()),
            };
            there.insert(index, *name);
        }
        there
    }

    #[test]
    fn whoever_comes_first_they_stand_in_order_and_around_others() {
        type Order<'a> = &'a [(&'a str, Edge)];
        let at_pod = ["hf_requests", "hf_policy_from", "other", "hf_redirect"];
        let at_devices = ["hf_requests", "hf_policy_device", "other", "hf_redirect"];
        let at_tunnel = [
            "hf_policy_in",
            "other",
            "hf_entering",
            "hf_mapped_in",
            "hf_redirect_ip",
        ];
        let to_pod = ["hf_policy_to", "hf_answers_out", "other"];
        let to_tunnel = ["hf_mapped_out", "hf_leaving", "other", "hf_policy_out"];
        let cases: [(Order<'_>, &[&'static str]); 5] = [
            (&INGRESS, &at_pod),
            (&INGRESS, &at_devices),
            (&INGRESS, &at_tunnel),
            (&EGRESS, &to_pod),
            (&EGRESS, &to_tunnel),
        ];
        for (order, expected) in cases {
            let names = expected.iter().copied().filter(|name| *name != "other");
            let mut names: Vec<_> = names.collect();
            for _ in 0..names.len() {
                names.rotate_left(1);
                assert_eq!(after(order, &names), expected, "{names:?}");
                let mut turned = names.clone();
                turned.reverse();
                assert_eq!(after(order, &turned), expected, "{turned:?}");
            }
        }
    }
}
