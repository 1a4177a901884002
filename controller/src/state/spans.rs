//! The traces of changes: what was read, what the mesh was worked out to be, what was published, and each node that was told.

use std::time::SystemTime;

use mesh_api::control::SyncResponse;
use mesh_daemon::traces::{Parent, Span, Traces};
use mesh_wire::id::NodeName;
use prost::Message as _;

use super::{State, Work};
use crate::history::Step;

/// What a change came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Origin {
    /// The folder of manifests.
    Folder,
    /// The Kubernetes cluster.
    Cluster,
    /// A node that joined here, or asked to.
    Join,
    /// What another controller, or an operator, did to the registry of nodes.
    Registry,
}

impl Origin {
    fn as_str(self) -> &'static str {
        match self {
            Self::Folder => "folder",
            Self::Cluster => "cluster",
            Self::Join => "join",
            Self::Registry => "registry",
        }
    }
}

/// The generation that was published last, and the span that was its publication.
#[derive(Debug, Clone, Default)]
pub(super) struct Publication {
    pub(super) generation: u64,
    pub(super) span: Parent,
}

impl State {
    /// Where spans are made.
    #[must_use]
    pub fn traces(&self) -> &Traces {
        &self.traces
    }

    /// Publishes a change of which the reading began then, as one trace.
    pub(super) fn trace_change(
        &self,
        work: &mut Work,
        origin: Origin,
        began: SystemTime,
        publish: impl FnOnce(&mut Work),
    ) {
        let mut change = self.traces.root("change", began);
        change.set("origin", origin.as_str());
        drop(self.traces.past_child("read", &change.parent(), began));
        work.trace = change.parent();
        publish(work);
        work.trace = None;
    }

    /// What changed is written and published.
    pub(super) fn trace_publication(&self, work: &Work, step: Option<&Step>) -> Span {
        let Some(step) = step else {
            return Span::default();
        };
        let mut span = self.traces.child("publish", &work.trace);
        span.set("generation", wide(step.generation));
        span.set("changed", wide(step.changed.len()));
        span
    }

    /// A node is told this. The span ends when the node says that it has it; if it never does, with its stream or the next answer.
    #[must_use]
    pub fn trace_answer(&self, node: &NodeName, answer: &SyncResponse) -> Span {
        let published = self.published(|published| published.publication.clone());
        if published.span.is_none() || published.generation != answer.generation {
            return Span::default();
        }
        let mut span = self.traces.child("answer", &published.span);
        span.set("node", node.to_string());
        span.set("full", answer.full);
        span.set("bytes", wide(answer.encoded_len()));
        span
    }
}

/// OpenTelemetry's integers are signed.
pub(super) fn wide(count: impl TryInto<i64>) -> i64 {
    count.try_into().unwrap_or(i64::MAX)
}
