//! LAN subnets behind this node that the mesh sees under another range: what the snapshot says of them, kept in the
//! kernel's maps. The programs are there while there are such subnets.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use anyhow::Context as _;
use ebpf_loader::{
    fill::Fill,
    inspect::LoadedProgram,
    mapping::{Mapping, Mappings},
};
use mesh_core::{services::View, snapshot::Snapshot};
use mesh_daemon::chain;
use mesh_linux::IfIndex;
use mesh_wire::id::NodeName;
use tokio::{sync::watch, task, time};
use tokio_util::sync::CancellationToken;

/// Pause before the kernel is asked again for what it refused.
const RETRY: Duration = Duration::from_secs(5);

/// What is mapped on this node, and by what.
#[derive(Debug)]
pub struct Mapper {
    node: NodeName,
    tunnel: IfIndex,
    wanted: BTreeSet<Mapping>,
    programs: Option<Mappings>,
    problem: Option<String>,
}

/// How it stands, for people.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    /// What became of packets.
    pub packets: BTreeMap<String, u64>,
    /// What does not work that should.
    pub problems: Vec<String>,
}

impl Mapper {
    /// For `node` and its tunnel's interface, with nothing to map yet.
    #[must_use]
    pub fn new(node: NodeName, tunnel: IfIndex) -> Self {
        Self {
            node,
            tunnel,
            wanted: BTreeSet::new(),
            programs: None,
            problem: None,
        }
    }

    /// Maps what `snapshot` says. It takes system calls. What the kernel refuses is told, and asked for again with the
    /// next call: devices of such subnets are not reached until then, as neither address is theirs on the other side.
    pub fn take(&mut self, snapshot: &Snapshot) {
        let wanted = wanted(snapshot, &self.node);
        if wanted == self.wanted && self.problem.is_none() {
            return;
        }
        self.wanted = wanted;
        let problem = self.apply().err();
        let problem = problem.map(|error| format!("subnets are not mapped: {error:#}"));
        if let Some(problem) = problem.as_ref().filter(|_| problem != self.problem) {
            tracing::warn!(%problem, "devices behind this node are not reached");
        }
        self.problem = problem;
    }

    fn apply(&mut self) -> anyhow::Result<()> {
        if self.wanted.is_empty() {
            if self.programs.take().is_some() {
                tracing::info!("no subnets are mapped any more");
            }
            return Ok(());
        }
        let fresh = self.programs.is_none();
        let programs = match &mut self.programs {
            Some(programs) => programs,
            none => none.insert(Mappings::load()?),
        };
        let left_out = programs.apply(&self.wanted).context("write the maps")?;
        // After the maps: what comes before them is for nobody.
        if fresh && let Err(error) = programs.attach_tunnel(self.tunnel.0) {
            self.programs = None; // So that attaching is tried again.
            return Err(error.into());
        }
        tracing::info!(
            subnets = self.wanted.len() - left_out,
            "subnets behind this node are mapped"
        );
        anyhow::ensure!(left_out == 0, "{left_out} of them have no room");
        Ok(())
    }

    /// The programs that translate; none where there is nothing to map.
    #[must_use]
    pub fn loaded(&self) -> Vec<LoadedProgram> {
        let programs = self.programs.as_ref();
        programs.map_or_else(Vec::new, |programs| programs.programs(self.tunnel.0))
    }

    /// How full its maps are.
    #[must_use]
    pub fn fills(&self) -> Vec<Fill> {
        let programs = self.programs.as_ref();
        programs.map(Mappings::fills).unwrap_or_default()
    }

    /// How it stands.
    #[must_use]
    pub fn report(&self) -> Report {
        let mut report = Report {
            problems: self.problem.clone().into_iter().collect(),
            ..Report::default()
        };
        match self.programs.as_ref().map(Mappings::counters).transpose() {
            Ok(counters) => {
                let counted = counters.into_iter().flatten();
                let counted = counted.filter(|(_, count)| *count > 0);
                report.packets = counted
                    .map(|(counter, count)| (counter.as_str().to_owned(), count))
                    .collect();
            }
            Err(error) => report.problems.push(chain(&error)),
        }
        report
    }
}

fn wanted(snapshot: &Snapshot, node: &NodeName) -> BTreeSet<Mapping> {
    let own = snapshot.nodes.get(node);
    let mapped = own.into_iter().flat_map(|own| &own.mapped);
    mapped
        .map(|mapping| Mapping {
            lan: mapping.lan.network(),
            seen_as: mapping.seen_as.network(),
            length: mapping.lan.prefix_len(),
        })
        .collect()
}

/// Follows the view until `stop`.
///
/// # Errors
///
/// None but the end of whoever publishes the view: what the kernel refuses is tried again.
pub async fn keep_mapping(
    mapper: Arc<Mutex<Mapper>>,
    mut views: watch::Receiver<Option<Arc<View>>>,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    loop {
        let view = views.borrow_and_update().clone();
        let mapper = Arc::clone(&mapper);
        let work = move || {
            let mut mapper = mapper.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(view) = view {
                mapper.take(&view.snapshot);
            }
            mapper.problem.is_some()
        };
        let refused = task::spawn_blocking(work).await?;
        tokio::select! {
            () = stop.cancelled() => return Ok(()),
            changed = views.changed() => changed?,
            () = time::sleep(RETRY), if refused => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use mesh_core::snapshot::{Locality, MeshSettings, Node};
    use mesh_wire::id::{MeshId, NodeId};

    use super::*;

    #[test]
    fn only_this_node_s_subnets_are_mapped_each_by_its_first_address() {
        let mesh = MeshId([1; 32]);
        let mut snapshot = Snapshot::empty(MeshSettings::with_defaults(mesh, "test"));
        for (number, name, seen_as) in [(1, "own", "10.201.0.0/24"), (2, "other", "10.202.0.0/24")]
        {
            let id = NodeId([number; 32]);
            let node = Node {
                id,
                name: name.parse().unwrap(),
                locality: Locality::default(),
                overlay_v4: [100, 96, 0, number].into(),
                overlay_v6: mesh.overlay_v6(&id),
                prefixes: Vec::new(),
                pod_prefixes: Vec::new(),
                underlay_addresses: Vec::new(),
                static_candidates: Vec::new(),
                mapped: vec![mesh_core::snapshot::Mapping {
                    lan: "192.168.1.7/24".parse().unwrap(),
                    seen_as: seen_as.parse().unwrap(),
                }],
            };
            snapshot.nodes.insert(node.name.clone(), node);
        }
        let mapped = wanted(&snapshot, &"own".parse().unwrap());
        let expected = Mapping {
            lan: [192, 168, 1, 0].into(),
            seen_as: [10, 201, 0, 0].into(),
            length: 24,
        };
        assert_eq!(mapped, BTreeSet::from([expected]));
        assert!(wanted(&snapshot, &"stranger".parse().unwrap()).is_empty());
    }
}
