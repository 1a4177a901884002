//! Who may speak with whom: what the snapshot says of it, kept in the kernel's tables.
//!
//! The programs are there while there is something to enforce, and judge before the first packet
//! comes: at the start they are filled from the snapshot on the disk before the device is up. At pods' interfaces
//! they stay when the agent ends, however it does, until the next one puts its own in their place.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use anyhow::Context as _;
use ebpf_loader::{
    Pins, PinsError, Services,
    fill::{Fill, FlowMap},
    inspect::LoadedProgram,
    policy as kernel,
};
use mesh_api::cni::POLICY_FILE;
use mesh_core::{
    policy::{
        Class, Compiler, Direction, Limits, PairRules, PortPrefix, Tables, Verdict,
        resources::IpProtocol,
    },
    services::View,
    snapshot::Snapshot,
};
use mesh_daemon::chain;
use mesh_linux::IfIndex;
use mesh_wire::id::NodeName;
use tokio::{sync::watch, task, time};
use tokio_util::sync::CancellationToken;

use crate::{
    redirect::Guarded,
    store::{remove_if_there, write_atomically},
};

/// Pause before the tables are written again when the kernel refused a part, for want of memory.
const RETRY: Duration = Duration::from_secs(5);

pub(crate) const LIMITS: Limits = Limits {
    addresses: kernel::ADDRESSES_MAX,
    pairs: kernel::PAIRS_MAX,
    ports: kernel::PORTS_MAX,
};

/// What is enforced on this node, and by what.
#[derive(Debug)]
pub struct Enforcer {
    compiler: Compiler,
    tunnel: IfIndex,
    /// Otherwise the configuration says that nothing is enforced here.
    wanted: bool,
    programs: Option<kernel::Policy>,
    /// Where what pods are judged by is kept while no agent runs.
    pins: Option<Pins>,
    /// Whether an earlier agent's may still be in force.
    left: bool,
    /// Once it is known: until then what an earlier agent enforced at pods holds.
    guarded: Option<Guarded>,
    /// Whose open connections may go past the packets that are judged.
    services: Option<Arc<Mutex<Services>>>,
    /// What the kernel refused.
    refused: Option<String>,
    /// The file by which the CNI plug-in knows that new pods are to be guarded.
    file: Option<PathBuf>,
    /// Whether the file is there, once that is known.
    told: Option<bool>,
}

/// How it stands, for people.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    /// Whether packets are judged.
    pub enforced: bool,
    /// What became of them.
    pub packets: BTreeMap<String, u64>,
    /// Those that were denied or audited last, a line each.
    pub events: Vec<String>,
    /// What does not work that should.
    pub problems: Vec<String>,
}

impl Enforcer {
    /// For `node` and its tunnel's interface, with nothing to enforce yet. If not `wanted`, never. With `pins`, pods
    /// are judged by what held last while no agent runs.
    #[must_use]
    pub fn new(node: NodeName, tunnel: IfIndex, wanted: bool, pins: Option<Pins>) -> Self {
        Self {
            compiler: Compiler::new(node, LIMITS),
            tunnel,
            wanted,
            programs: None,
            left: pins.is_some(),
            pins,
            guarded: None,
            services: None,
            refused: None,
            file: None,
            told: None,
        }
    }

    /// Also tells the CNI plug-in, which shares `folder` with this agent, whether new pods are to be guarded.
    #[must_use]
    pub fn telling(self, folder: Option<&Path>) -> Self {
        Self {
            file: folder.map(|folder| folder.join(POLICY_FILE)),
            ..self
        }
    }

    /// From now on, what is enforced anew holds for open connections of these as well that go from socket to socket.
    pub fn judge_sockets(&mut self, services: Arc<Mutex<Services>>) {
        self.services = Some(services);
        if self.programs.is_some() {
            self.leave_sockmap();
        }
    }

    /// What goes past packets goes by them again, as those are what is judged.
    fn leave_sockmap(&self) {
        let Some(services) = &self.services else {
            return;
        };
        let mut services = services.lock().unwrap_or_else(PoisonError::into_inner);
        if let Err(error) = services.leave_sockmap() {
            tracing::warn!(error = %chain(&error), "policy does not see what open connections of services with `sockmap` say");
        }
    }

    /// New pods are guarded by the plug-in, or need not be.
    fn tell(&mut self, guarded: bool) {
        let Some(file) = self.file.as_ref().filter(|_| self.told != Some(guarded)) else {
            return;
        };
        let done = match guarded {
            true => fs::create_dir_all(file.parent().unwrap_or(file))
                .and_then(|()| write_atomically(file, b"")),
            false => remove_if_there(file),
        };
        match done {
            Ok(()) => self.told = Some(guarded),
            Err(error) => {
                tracing::warn!(file = %file.display(), %error, "cannot tell the CNI plug-in whether there are policies");
            }
        }
    }

    /// From now on these are the interfaces of pods and devices: all packets of pods are judged, while there is
    /// anything to enforce. Returns those where they are not, and why. It takes system calls; to be called whenever an
    /// interface has changed.
    pub fn guard(&mut self, guarded: Guarded) -> BTreeMap<IfIndex, String> {
        self.guarded = Some(guarded);
        self.attach_guards()
    }

    fn attach_guards(&mut self) -> BTreeMap<IfIndex, String> {
        let (Some(programs), Some(guarded)) = (&mut self.programs, &self.guarded) else {
            return BTreeMap::new();
        };
        let wanted = guarded.pods.iter().map(|index| index.0).collect();
        let bridges = guarded.bridges.iter();
        let bridges = bridges.map(|(port, bridge)| (port.0, bridge.0)).collect();
        let report = programs
            .say_bridges(&bridges)
            .and_then(|()| programs.attach_pods(&wanted));
        let devices = guarded.devices.iter().map(|index| index.0).collect();
        let devices = programs.attach_devices(&devices);
        let is_published = programs.is_published();
        self.tell(is_published);
        let guarded = self.guarded.iter();
        let report = match report {
            Ok(report) => report,
            Err(error) => {
                let all = guarded.flat_map(|guarded| guarded.pods.union(&guarded.devices));
                return all.map(|&index| (index, chain(&error))).collect();
            }
        };
        let attached = report.attached;
        if attached > 0 {
            tracing::info!(
                interfaces = attached,
                "policies are enforced at pods' interfaces"
            );
        }
        let failed = report.failed.iter().chain(&devices);
        let failed = failed.map(|(&index, error)| (IfIndex(index), chain(error)));
        let left_out = report.left_out.into_iter();
        let left_out = left_out.map(|index| {
            let problem = format!("there is room for {} interfaces", kernel::PODS_MAX);
            (IfIndex(index), problem)
        });
        let unguarded = failed.chain(left_out).collect();
        if attached > 0 {
            self.leave_sockmap();
        }
        unguarded
    }

    /// Enforces what `snapshot` says. It takes system calls.
    ///
    /// # Errors
    ///
    /// If the programs cannot be loaded or attached: the node must not be reached then. What the kernel
    /// refuses of the tables is denied, told, and tried again with the next call.
    pub fn take(&mut self, snapshot: &Arc<Snapshot>) -> anyhow::Result<()> {
        let changed = self.compiler.update(snapshot);
        if !self.wanted || !self.compiler.tables().enforced {
            self.refused = None;
            self.enforce_nothing();
            return Ok(());
        }
        if !changed && self.refused.is_none() {
            return Ok(());
        }
        let fresh = self.programs.is_none();
        let programs = match &mut self.programs {
            Some(programs) => programs,
            none => none.insert(kernel::Policy::load(self.pins.clone())?),
        };
        let applied = programs.apply(&convert(self.compiler.tables()));
        // After the tables: what comes before them passes as it did until now.
        programs.attach_tunnel(self.tunnel.0)?;
        let unguarded = self.attach_guards();
        self.leave_sockmap();
        let left_out = self.compiler.tables().left_out;
        if !left_out.is_nothing() {
            tracing::warn!(?left_out, "the policy tables are full: judged strictly");
        }
        if fresh {
            tracing::info!("policies are enforced");
        }
        let refused = applied.err();
        let refused = refused.map(|error| format!("{}: what is missing is denied", chain(&error)));
        self.refused = refused.or_else(|| {
            let (index, problem) = unguarded.into_iter().next()?;
            Some(format!(
                "policy does not see the packets of interface {index}: {problem}"
            ))
        });
        if let Some(problem) = &self.refused {
            tracing::warn!(%problem, "policy is not complete in the kernel");
        }
        Ok(())
    }

    fn enforce_nothing(&mut self) {
        let left = std::mem::take(&mut self.left);
        if let Some(programs) = self.programs.take() {
            programs.remove();
            tracing::info!("there are no policies for this node any more");
        } else if left {
            // The place is not held by who never enforces anything: another agent may.
            let pins = match self.wanted {
                true => self.pins.clone(),
                false => self.pins.take(),
            };
            if let Some(pins) = pins {
                kernel::end_left(pins);
            }
        }
        self.tell(false);
    }

    /// The programs that judge; none where there is nothing to enforce.
    #[must_use]
    pub fn loaded(&self) -> Vec<LoadedProgram> {
        let programs = self.programs.as_ref();
        programs.map(kernel::Policy::programs).unwrap_or_default()
    }

    /// How full its maps are, and those that have to be counted for that.
    #[must_use]
    pub fn fills(&self) -> (Vec<Fill>, Vec<FlowMap>) {
        let programs = self.programs.as_ref();
        let fills = |programs: &kernel::Policy| (programs.fills(), programs.flow_maps());
        programs.map(fills).unwrap_or_default()
    }

    /// How it stands.
    pub fn report(&mut self) -> Report {
        let tables = self.compiler.tables();
        let mut problems = Vec::new();
        if tables.enforced && !self.wanted {
            problems.push("policies are not enforced here (`policy = false`)".to_owned());
        }
        let left_out = tables.left_out;
        if !left_out.is_nothing() {
            problems.push(format!(
                "the policy tables are full: {} prefixes are judged strictly, nothing passes between {} pairs of classes",
                left_out.addresses, left_out.pairs
            ));
        }
        problems.extend(self.refused.clone());
        let mut report = Report {
            enforced: self.programs.is_some(),
            problems,
            ..Report::default()
        };
        let Some(programs) = &mut self.programs else {
            return report;
        };
        match programs.counters() {
            Ok(counters) => {
                let counted = counters.into_iter().filter(|(_, count)| *count > 0);
                report.packets = counted
                    .map(|(counter, count)| (counter.as_str().to_owned(), count))
                    .collect();
            }
            Err(error) => report.problems.push(chain(&error)),
        }
        report.events = programs.events().map(|event| line(event, tables)).collect();
        report
    }
}

/// Why policies end with this process, if any are `wanted` here.
#[must_use]
pub fn unkept(wanted: bool, pins: &Result<Pins, PinsError>) -> Option<String> {
    let error = pins.as_ref().err().filter(|_| wanted)?;
    Some(chain(error))
}

/// Follows the view until `stop`.
///
/// # Errors
///
/// If policies cannot be enforced at all: a node that lets everybody in is worse than none.
pub async fn keep_policy(
    enforcer: Arc<Mutex<Enforcer>>,
    mut views: watch::Receiver<Option<Arc<View>>>,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    loop {
        let view = views.borrow_and_update().clone();
        let mut again = false;
        if let Some(view) = view {
            let enforcer = Arc::clone(&enforcer);
            let taken = task::spawn_blocking(move || {
                let mut enforcer = enforcer.lock().unwrap_or_else(PoisonError::into_inner);
                enforcer.take(&view.snapshot)?;
                anyhow::Ok(enforcer.refused.is_some())
            });
            again = taken.await?.context("policies cannot be enforced")?;
        }
        tokio::select! {
            () = stop.cancelled() => return Ok(()),
            changed = views.changed() => changed?,
            () = time::sleep(RETRY), if again => {}
        }
    }
}

/// `audited by MeshPolicy trial: TCP 100.96.0.1:40000 to 100.96.0.2:22, in`.
fn line(event: &kernel::Event, tables: &Tables) -> String {
    let word = if event.verdict.allowed {
        "audited"
    } else {
        "denied"
    };
    let by = tables.name(mesh_core::policy::Decider(event.verdict.decider));
    let protocol = match event.protocol {
        1 | 58 => "ICMP".to_owned(),
        6 => "TCP".to_owned(),
        17 => "UDP".to_owned(),
        132 => "SCTP".to_owned(),
        other => format!("protocol {other}"),
    };
    let way = match event.direction {
        kernel::Direction::In => "in",
        kernel::Direction::Out => "out",
    };
    format!(
        "{word} by {by}: {protocol} {} to {}, {way}",
        event.from, event.to
    )
}

/// As the kernel's side is told.
#[must_use]
pub fn convert(tables: &Tables) -> kernel::Tables {
    let addresses = tables.addresses.iter();
    let pairs = tables.pairs.iter();
    let ports = tables.ports.iter();
    kernel::Tables {
        enforced: tables.enforced,
        addresses: addresses
            .map(|(prefix, Class(class))| ((prefix.network(), prefix.prefix_len()), *class))
            .collect(),
        pairs: pairs
            .map(|(pair, PairRules { strictest, ports })| {
                let pair = kernel::Pair {
                    local: pair.local.0,
                    remote: pair.remote.0,
                    direction: match pair.direction {
                        Direction::In => kernel::Direction::In,
                        Direction::Out => kernel::Direction::Out,
                    },
                };
                let rules = kernel::PairRules {
                    strictest: verdict(*strictest),
                    rule_set: ports.and_then(|rules| rules.0.try_into().ok()),
                };
                (pair, rules)
            })
            .collect(),
        ports: ports
            .map(|(prefix, said)| (port_prefix(prefix), verdict(*said)))
            .collect(),
    }
}

fn verdict(said: Verdict) -> kernel::Verdict {
    kernel::Verdict {
        allowed: said.allowed,
        audited: said.allowed && !said.unaudited,
        decider: said.decider.0,
    }
}

fn port_prefix(prefix: &PortPrefix) -> kernel::PortPrefix {
    kernel::PortPrefix {
        rule_set: prefix.rules.0,
        protocol: prefix.protocol.map(number),
        port: prefix.port,
        bits: prefix.bits,
    }
}

/// IANA's number.
fn number(protocol: IpProtocol) -> u8 {
    match protocol {
        IpProtocol::Icmp => 1,
        IpProtocol::Tcp => 6,
        IpProtocol::Udp => 17,
        IpProtocol::Sctp => 132,
    }
}

#[cfg(test)]
mod tests {
    use mesh_core::policy::{Decider, Pair, RuleSet};

    use super::*;

    fn said(allowed: bool, unaudited: bool) -> Verdict {
        Verdict {
            allowed,
            unaudited,
            decider: Decider(7),
        }
    }

    #[test]
    fn the_kernel_is_told_the_numbers_of_protocols_and_who_decides() {
        let mut tables = Tables::default();
        let pair = Pair {
            local: Class(2),
            remote: Class(3),
            direction: Direction::Out,
        };
        let rules = PairRules {
            strictest: said(false, true),
            ports: Some(RuleSet(5)),
        };
        tables.pairs.insert(pair, rules);
        for protocol in IpProtocol::ALL {
            let prefix = PortPrefix {
                rules: RuleSet(5),
                protocol: Some(protocol),
                port: 80,
                bits: 16,
            };
            tables.ports.insert(prefix, said(true, false));
        }
        let told = convert(&tables);
        let (pair, rules) = told.pairs.first_key_value().unwrap();
        assert_eq!((pair.local, pair.remote), (2, 3));
        assert_eq!(pair.direction, kernel::Direction::Out);
        assert_eq!(rules.rule_set.map(std::num::NonZeroU32::get), Some(5));
        assert!(!rules.strictest.allowed && !rules.strictest.audited);
        let numbers: Vec<_> = told.ports.keys().filter_map(|one| one.protocol).collect();
        assert_eq!(numbers, [1, 6, 17, 132]);
        let mut verdicts = told.ports.values();
        assert!(verdicts.all(|one| one.allowed && one.audited && one.decider == 7));
    }

    #[test]
    fn who_enforces_nothing_does_not_mind_that_nothing_is_kept() {
        let taken = || Err(PinsError::InUse("/sys/fs/bpf/holdfast/policy".into()));
        assert_eq!(unkept(false, &taken()), None);
        let problem = unkept(true, &taken()).unwrap();
        assert!(problem.contains("is in use"), "{problem}");
    }

    #[test]
    fn an_event_is_a_line_with_the_policy_s_name() {
        let mut tables = Tables::default();
        tables
            .deciders
            .insert(Decider(7), "MeshPolicy trial".to_owned());
        let event = kernel::Event {
            from: "100.96.0.1:4000".parse().unwrap(),
            to: "100.96.0.2:22".parse().unwrap(),
            protocol: 6,
            direction: kernel::Direction::In,
            verdict: verdict(said(true, false)),
        };
        let expected = "audited by MeshPolicy trial: TCP 100.96.0.1:4000 to 100.96.0.2:22, in";
        assert_eq!(line(&event, &tables), expected);
    }
}
