//! From the desired state to one node's tables.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{Ipv4Addr, Ipv6Addr},
    sync::Arc,
};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use mesh_wire::id::NodeName;

use super::{
    Class, Decider, Direction, Limits, Pair, PairRules, RuleSet, Tables, Verdict,
    atoms::{Atom, Namespaces, Owner, Scope, World},
    ports::ByPort,
    resources::{
        Action, DefaultAction, IpProtocol, MeshRule, NetworkRule, Party, PortMatch, Ports,
    },
};
use crate::snapshot::Snapshot;

/// Meetings of classes whose rules are remembered while tables are made: 100 bytes and the rules' each.
const MEETINGS_MAX: usize = 65_536;

/// Makes one node's tables, and remembers which number means what, so that what did not change
/// keeps its number.
#[derive(Debug)]
pub struct Compiler {
    node: NodeName,
    limits: Limits,
    scope: Scope,
    last: Option<Arc<Snapshot>>,
    tables: Arc<Tables>,
    atoms: Numbers<Atom>,
    /// By the atoms that hold.
    classes: Numbers<BTreeSet<u32>>,
    rule_sets: Numbers<ByPort>,
    deciders: Numbers<String>,
}

impl Compiler {
    /// For `node`, whose kernel tables hold so much.
    #[must_use]
    pub fn new(node: NodeName, limits: Limits) -> Self {
        Self::of(Scope::Ends, node, limits)
    }

    /// For flows that pods of `node` open: the tables have what is said at the sender, and in the other direction
    /// what is said at the receiver, wherever that is. They are about no other flows.
    #[must_use]
    pub fn of_calls(node: NodeName, limits: Limits) -> Self {
        Self::of(Scope::Calls, node, limits)
    }

    fn of(scope: Scope, node: NodeName, limits: Limits) -> Self {
        Self {
            node,
            limits,
            scope,
            last: None,
            tables: Arc::default(),
            atoms: Numbers::default(),
            classes: Numbers::default(),
            rule_sets: Numbers::default(),
            deciders: Numbers::default(),
        }
    }

    /// Takes `snapshot`; whether the tables are others now. A snapshot in which only services or
    /// relays changed costs a comparison.
    pub fn update(&mut self, snapshot: &Arc<Snapshot>) -> bool {
        let last = self.last.replace(Arc::clone(snapshot));
        if last.is_some_and(|last| is_same(&last, snapshot)) {
            return false;
        }
        let tables = self.compile(snapshot);
        let changed = tables != *self.tables;
        self.tables = Arc::new(tables);
        changed
    }

    /// Whose tables they are.
    #[must_use]
    pub fn node(&self) -> &NodeName {
        &self.node
    }

    /// The tables of the last snapshot.
    #[must_use]
    pub fn tables(&self) -> &Arc<Tables> {
        &self.tables
    }

    fn compile(&mut self, snapshot: &Snapshot) -> Tables {
        let node = self.node.clone();
        let world = World::new(snapshot, &node, self.scope);
        let owners = world.owners();
        let rules = Rules::relevant(self, &world, &owners);
        if !rules.enforced {
            return Tables::default();
        }
        let mut tables = Tables {
            enforced: true,
            ..Tables::default()
        };
        let (all, local) = self.classify(&world, owners, &rules, &mut tables);
        self.fill_pairs(&rules, &all, &local, &mut tables);
        self.forget(&rules, &tables);
        let deciders = self.deciders.by_number().into_iter();
        let deciders = deciders.map(|(number, name)| (Decider(number), name.clone()));
        tables.deciders = deciders.collect();
        tables
    }

    /// Gives every prefix its class. Returns all classes, and those of addresses on this node.
    fn classify(
        &mut self,
        world: &World<'_>,
        owners: BTreeMap<IpNet, Owner<'_>>,
        rules: &Rules<'_>,
        tables: &mut Tables,
    ) -> (BTreeSet<Class>, BTreeSet<Class>) {
        let everything = [
            IpNet::V4(Ipv4Net::new_assert(Ipv4Addr::UNSPECIFIED, 0)),
            IpNet::V6(Ipv6Net::new_assert(Ipv6Addr::UNSPECIFIED, 0)),
        ];
        let borders = rules.atoms.values().flat_map(Atom::borders);
        let mut prefixes: BTreeMap<_, _> = borders.map(|border| (border, None)).collect();
        prefixes.extend(everything.map(|all| (all, Some(Owner::Unknown))));
        prefixes.extend(
            owners
                .into_iter()
                .map(|(prefix, owner)| (prefix, Some(owner))),
        );
        let mut local = BTreeSet::new();
        // Those that contain the next one, longest last: a prefix comes after what contains it.
        let mut around: Vec<(IpNet, Owner<'_>, Class)> = Vec::new();
        for (prefix, owner) in prefixes {
            while around
                .last()
                .is_some_and(|(last, ..)| !last.contains(&prefix))
            {
                around.pop();
            }
            let outer = around.last().copied();
            let owner = owner.or(outer.map(|(_, owner, _)| owner));
            let owner = owner.unwrap_or(Owner::Unknown);
            let atoms = rules.atoms.iter();
            let holding = atoms.filter(|(_, atom)| atom.holds(&owner, &prefix, world));
            let class = Class(
                self.classes
                    .number(holding.map(|(number, _)| *number).collect()),
            );
            if owner.is_local(world) {
                local.insert(class);
            }
            if outer.is_none_or(|(.., outer)| outer != class) {
                tables.addresses.insert(prefix, class);
            }
            around.push((prefix, owner, class));
        }
        let all = tables.addresses.values().copied().collect();
        leave_out(tables, self.limits.addresses);
        let lengths = tables.addresses.keys();
        tables.lengths = lengths
            .map(|prefix| {
                (
                    prefix.addr().is_ipv4(),
                    std::cmp::Reverse(prefix.prefix_len()),
                )
            })
            .collect();
        (all, local)
    }

    fn fill_pairs(
        &mut self,
        rules: &Rules<'_>,
        all: &BTreeSet<Class>,
        local: &BTreeSet<Class>,
        tables: &mut Tables,
    ) {
        let known: BTreeMap<u32, &BTreeSet<u32>> = self.classes.by_number();
        let atoms = |class: &Class| known.get(&class.0).copied();
        let all = all.iter();
        let all = all.filter_map(|class| Some(ClassRules::new(*class, atoms(class)?, rules)));
        let all: Vec<_> = all.collect();
        let here: Vec<_> = all
            .iter()
            .filter(|one| local.contains(&one.class))
            .collect();
        let lacking = tables.left_out.addresses > 0;
        let kept: BTreeSet<Class> = tables.addresses.values().copied().collect();
        let is_kept = |class| class == Class::STRICT || kept.contains(&class);
        let mut made = BTreeMap::new();
        let mut strict = Strict::default();
        for one in &here {
            for other in &all {
                for direction in Direction::ALL {
                    if !lacking && tables.pairs.len() == self.limits.pairs {
                        tables.left_out.pairs += 1;
                        continue;
                    }
                    if made.len() == MEETINGS_MAX {
                        made.clear();
                    }
                    let called_elsewhere = self.scope == Scope::Calls && direction == Direction::In;
                    let (one, other) = match called_elsewhere {
                        true => (other, *one),
                        false => (*one, other),
                    };
                    let mut meeting = rules.meeting(one, other, direction);
                    // What a pod sends to its own node passes the pod's interface, and no other judge.
                    meeting.own_node |= called_elsewhere && one.own_node;
                    let by_port = made
                        .entry(meeting)
                        .or_insert_with_key(|meeting| rules.by_port(meeting, one, other));
                    let pair = Pair {
                        local: one.class,
                        remote: other.class,
                        direction,
                    };
                    if lacking {
                        strict.add(pair, by_port);
                    }
                    if is_kept(pair.local) && is_kept(pair.remote) {
                        self.insert_pair(pair, by_port, tables);
                    }
                }
            }
        }
        for (pair, by_port) in strict.0 {
            if is_kept(pair.local) && is_kept(pair.remote) {
                self.insert_pair(pair, &by_port, tables);
            }
        }
    }

    fn insert_pair(&mut self, pair: Pair, by_port: &ByPort, tables: &mut Tables) {
        let strictest = by_port.strictest();
        let mut ports = None;
        if !by_port.is_uniform() {
            let rules = RuleSet(self.rule_sets.number(by_port.clone()));
            let prefixes = by_port.prefixes(rules);
            let there = prefixes.first().map(|(first, _)| *first);
            let new = there.is_some_and(|first| !tables.ports.contains_key(&first));
            if new && tables.ports.len() + prefixes.len() > self.limits.ports {
                tables.left_out.pairs += 1;
                return;
            }
            tables.ports.extend(prefixes);
            ports = Some(rules);
        }
        if tables.pairs.len() == self.limits.pairs {
            tables.left_out.pairs += 1;
            return;
        }
        tables.pairs.insert(pair, PairRules { strictest, ports });
    }

    /// Lets go of numbers that nothing has any more.
    fn forget(&mut self, rules: &Rules<'_>, tables: &Tables) {
        self.atoms.retain(&rules.atoms.keys().copied().collect());
        self.deciders.retain(&rules.deciders);
        let classes = tables.addresses.values();
        let classes = classes.chain(tables.pairs.keys().map(|pair| &pair.local));
        let classes = classes.map(|class| class.0).collect();
        self.classes.retain(&classes);
        let sets = tables.ports.keys().map(|prefix| prefix.rules.0).collect();
        self.rule_sets.retain(&sets);
    }
}

/// Whether policy and whom it is about are the same in both.
fn is_same(one: &Snapshot, other: &Snapshot) -> bool {
    std::ptr::eq(one, other)
        || one.mesh.default_action == other.mesh.default_action
            && one.policy == other.policy
            && one.nodes == other.nodes
            && one.external_peers == other.external_peers
}

/// Keeps the longest prefixes: what misses is then in none that was kept, and strictly judged.
fn leave_out(tables: &mut Tables, room: usize) {
    let excess = tables.addresses.len().saturating_sub(room);
    if excess == 0 {
        return;
    }
    let bits = |prefix: &IpNet| match prefix {
        IpNet::V4(net) => net.prefix_len() + 96,
        IpNet::V6(net) => net.prefix_len(),
    };
    let mut order: Vec<_> = tables.addresses.keys().copied().collect();
    order.sort_by_key(|prefix| (bits(prefix), *prefix));
    for prefix in order.iter().take(excess) {
        tables.addresses.remove(prefix);
    }
    tables.left_out.addresses = excess;
}

/// What holds for addresses without a class: the strictest of what holds for any class.
#[derive(Default)]
struct Strict(BTreeMap<Pair, ByPort>);

impl Strict {
    fn add(&mut self, pair: Pair, rules: &ByPort) {
        let of_remote = Pair {
            remote: Class::STRICT,
            ..pair
        };
        let of_local = Pair {
            local: Class::STRICT,
            ..pair
        };
        let of_both = Pair {
            local: Class::STRICT,
            ..of_remote
        };
        for pair in [of_remote, of_local, of_both] {
            match self.0.get_mut(&pair) {
                Some(known) => *known = known.and(rules),
                None => {
                    self.0.insert(pair, rules.clone());
                }
            }
        }
    }
}

/// Rules that may be about an end on this node.
struct Rules<'a> {
    enforced: bool,
    default: DefaultAction,
    by_default: Decider,
    by_own_node: Decider,
    own_node: u32,
    mesh: Vec<Mesh<'a>>,
    network: Vec<Network<'a>>,
    /// All that they tell addresses apart by.
    atoms: BTreeMap<u32, Atom>,
    deciders: BTreeSet<u32>,
}

struct Mesh<'a> {
    decider: Decider,
    audit: bool,
    rule: &'a MeshRule,
    from: AnyOf,
    to: AnyOf,
}

/// One direction of a `NetworkPolicy`.
struct Network<'a> {
    decider: Decider,
    pods: u32,
    direction: Direction,
    rules: Vec<(AnyOf, &'a NetworkRule)>,
}

/// Of atoms; empty: anything.
struct AnyOf(Vec<u32>);

impl AnyOf {
    fn holds(&self, class: &BTreeSet<u32>) -> bool {
        self.0.is_empty() || self.0.iter().any(|atom| class.contains(atom))
    }
}

impl<'a> Rules<'a> {
    fn relevant(
        compiler: &mut Compiler,
        world: &World<'a>,
        owners: &BTreeMap<IpNet, Owner<'a>>,
    ) -> Self {
        let Compiler {
            atoms, deciders, ..
        } = compiler;
        let mut rules = Self {
            enforced: false,
            default: world.snapshot.mesh.default_action,
            by_default: Decider::default(),
            by_own_node: Decider::default(),
            own_node: 0,
            mesh: Vec::new(),
            network: Vec::new(),
            atoms: BTreeMap::new(),
            deciders: BTreeSet::new(),
        };
        let mut atom = |atom: Atom| {
            let number = atoms.number(atom.clone());
            rules.atoms.insert(number, atom);
            number
        };
        let mut decider = |name: String| {
            let number = Decider(deciders.number(name));
            rules.deciders.insert(number.0);
            number
        };
        rules.by_default = decider("defaultAction".to_owned());
        rules.by_own_node = decider("the pod's own node".to_owned());
        rules.own_node = atom(Atom::OwnNode);
        let here: Vec<_> = owners
            .iter()
            .filter(|(_, owner)| owner.is_local(world))
            .collect();
        let is_here = |atom: &Atom| {
            here.iter()
                .any(|(prefix, owner)| atom.holds(owner, prefix, world))
        };
        let may_be_here = |parties: &[Party]| {
            let may_be =
                |party: &Party| !party.cidrs.is_empty() || is_here(&Atom::Party(party.clone()));
            parties.is_empty() || parties.iter().any(may_be)
        };
        for policy in world.snapshot.policy.mesh.values() {
            for rule in &policy.rules {
                if !may_be_here(&rule.from) && !may_be_here(&rule.to) {
                    continue;
                }
                let mut any_of = |parties: &[Party]| {
                    AnyOf(
                        parties
                            .iter()
                            .map(|party| atom(Atom::Party(party.clone())))
                            .collect(),
                    )
                };
                rules.mesh.push(Mesh {
                    decider: decider(format!("MeshPolicy {}", policy.name)),
                    audit: policy.audit,
                    rule,
                    from: any_of(&rule.from),
                    to: any_of(&rule.to),
                });
            }
        }
        for policy in world.snapshot.policy.network.values() {
            let namespace = &policy.name.namespace;
            let pods = Atom::Pods {
                pods: policy.pods.clone(),
                namespaces: Namespaces::Named(namespace.clone()),
            };
            let is_about_called = world.scope == Scope::Calls && policy.ingress.is_some();
            if !is_about_called && !is_here(&pods) {
                continue;
            }
            let pods = atom(pods);
            let sides = [
                (Direction::In, &policy.ingress),
                (Direction::Out, &policy.egress),
            ];
            for (direction, said) in sides {
                let Some(said) = said else {
                    continue;
                };
                let with_peers = said.iter().map(|rule| {
                    let peers = rule.peers.iter();
                    let peers = peers.map(|peer| atom(Atom::peer(peer, namespace)));
                    (AnyOf(peers.collect()), rule)
                });
                rules.network.push(Network {
                    decider: decider(format!("NetworkPolicy {}", policy.name)),
                    pods,
                    direction,
                    rules: with_peers.collect(),
                });
            }
        }
        for port in named_ports(&rules.network, world) {
            atom(port);
        }
        let nothing = rules.mesh.is_empty() && rules.network.is_empty();
        rules.enforced = rules.default != DefaultAction::Allow || !nothing;
        rules
    }

    /// Which rules are about flows between the two.
    fn meeting(&self, one: &ClassRules, other: &ClassRules, direction: Direction) -> Meeting {
        let (from, to) = match direction {
            Direction::In => (other, one),
            Direction::Out => (one, other),
        };
        let both = from.from.iter().zip(&to.to);
        let mesh = both.map(|(from, to)| from & to).collect();
        let networks = self.network.iter().enumerate();
        let about = networks.filter(|(_, network)| {
            network.direction == direction && one.atoms.contains(&network.pods)
        });
        let network = about.map(|(index, network)| {
            let rules = network.rules.iter().enumerate();
            let rules = rules.filter(|(_, (peers, _))| peers.holds(&other.atoms));
            (index, rules.map(|(rule, _)| rule).collect())
        });
        let network: Vec<(usize, Vec<usize>)> = network.collect();
        let by_name = network.iter().flat_map(|(index, rules)| {
            rules
                .iter()
                .filter_map(|&rule| Some(self.network.get(*index)?.rules.get(rule)?.1))
        });
        let by_name = by_name.flat_map(|rule| &rule.ports);
        let by_name = by_name
            .clone()
            .any(|port| matches!(port.ports, Ports::Named(_)));
        Meeting {
            own_node: other.own_node && !one.own_node,
            mesh,
            network,
            named_at: by_name.then_some(to.class),
        }
    }

    fn by_port(&self, meeting: &Meeting, one: &ClassRules, other: &ClassRules) -> ByPort {
        let mesh: Vec<&Mesh<'_>> = bits(&meeting.mesh)
            .filter_map(|index| self.mesh.get(index))
            .collect();
        let at = [one, other]
            .into_iter()
            .find(|side| Some(side.class) == meeting.named_at);
        let isolating: Vec<_> = meeting
            .network
            .iter()
            .filter_map(|(index, rules)| {
                let network = self.network.get(*index)?;
                let rules = rules.iter().filter_map(|rule| network.rules.get(*rule));
                let ports = rules.map(|(_, rule)| self.numbered(&rule.ports, at));
                Some((network.decider, ports.collect::<Vec<_>>()))
            })
            .collect();
        let of_mesh = mesh.iter().flat_map(|mesh| &mesh.rule.ports);
        let of_network = isolating
            .iter()
            .flat_map(|(_, rules)| rules.iter().flatten().flatten());
        let default = (self.default, self.by_default);
        ByPort::new(of_mesh.chain(of_network), |protocol, port| {
            if meeting.own_node {
                allowed(self.by_own_node)
            } else {
                judge(&mesh, &isolating, default, protocol, port)
            }
        })
    }

    /// Ports by number, as the pods of the class at which they are call them. `None`: all.
    fn numbered(&self, ports: &[PortMatch], at: Option<&ClassRules>) -> Option<Vec<PortMatch>> {
        if ports.is_empty() {
            return None;
        }
        let mut numbered = Vec::new();
        for one in ports {
            let Ports::Named(name) = &one.ports else {
                numbered.push(one.clone());
                continue;
            };
            let atoms = at.iter().flat_map(|at| &at.atoms);
            for atom in atoms.filter_map(|atom| self.atoms.get(atom)) {
                if let Atom::Port(protocol, called, number) = atom
                    && (protocol, called) == (&one.protocol, name)
                {
                    numbered.push(PortMatch {
                        protocol: *protocol,
                        ports: Ports::Range(*number, *number),
                    });
                }
            }
        }
        Some(numbered)
    }
}

/// What pods call ports that rules name.
fn named_ports(network: &[Network<'_>], world: &World<'_>) -> BTreeSet<Atom> {
    let ports = network.iter().flat_map(|network| &network.rules);
    let ports = ports.flat_map(|(_, rule)| &rule.ports);
    let names = ports.filter_map(|port| match &port.ports {
        Ports::Named(name) => Some((port.protocol, name.as_str())),
        Ports::All | Ports::Range(..) => None,
    });
    let names: BTreeSet<_> = names.collect();
    if names.is_empty() {
        return BTreeSet::new();
    }
    let pods = world.snapshot.policy.pods.values();
    let ports = pods.flat_map(|pod| &pod.ports);
    let ports = ports.filter(|port| names.contains(&(port.protocol, &port.name)));
    ports
        .map(|port| Atom::Port(port.protocol, port.name.clone(), port.port))
        .collect()
}

/// Rules about flows between two classes. What is the same here is the same for all ports.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Meeting {
    /// One is a pod and the other its node.
    own_node: bool,
    /// A bit for each rule of the mesh.
    mesh: Vec<u64>,
    /// Policies that isolate, each with its rules that have the other end as a peer.
    network: Vec<(usize, Vec<usize>)>,
    /// Where named ports are, if there are any.
    named_at: Option<Class>,
}

/// A class, and the mesh's rules that have it as caller and as called.
struct ClassRules {
    class: Class,
    atoms: BTreeSet<u32>,
    own_node: bool,
    from: Vec<u64>,
    to: Vec<u64>,
}

impl ClassRules {
    fn new(class: Class, atoms: &BTreeSet<u32>, rules: &Rules<'_>) -> Self {
        let bits = |side: for<'a, 'b> fn(&'a Mesh<'b>) -> &'a AnyOf| {
            let chunks = rules.mesh.chunks(64);
            let word = |chunk: &[Mesh<'_>]| {
                let rules = chunk.iter().enumerate();
                let holding = rules.filter(|(_, rule)| side(rule).holds(atoms));
                holding.fold(0, |word, (bit, _)| word | 1u64 << bit)
            };
            chunks.map(word).collect()
        };
        Self {
            class,
            atoms: atoms.clone(),
            own_node: atoms.contains(&rules.own_node),
            from: bits(|rule| &rule.from),
            to: bits(|rule| &rule.to),
        }
    }
}

fn bits(words: &[u64]) -> impl Iterator<Item = usize> + '_ {
    let words = words.iter().enumerate();
    words.flat_map(|(index, word)| {
        let set = (0..64).filter(move |bit| word >> bit & 1 == 1);
        set.map(move |bit| index * 64 + bit)
    })
}

/// For each isolating policy its decider, and the ports of its rules; `None`: all.
type Isolating = [(Decider, Vec<Option<Vec<PortMatch>>>)];

/// The mesh's rules and the pods' policies are two filters one after the other. Of the first:
/// denials before allowances before the default.
fn judge(
    mesh: &[&Mesh<'_>],
    isolating: &Isolating,
    (default, by_default): (DefaultAction, Decider),
    protocol: Option<IpProtocol>,
    port: u16,
) -> Verdict {
    let find = |action, audit| {
        let mut rules = mesh.iter();
        let found = rules.find(|mesh| {
            (mesh.rule.action, mesh.audit) == (action, audit)
                && have(&mesh.rule.ports, protocol, port)
        });
        found.map(|mesh| mesh.decider)
    };
    if let Some(decider) = find(Action::Deny, false) {
        return denied(decider);
    }
    let mut by_network = None;
    if let Some((first, _)) = isolating.first() {
        let allowing = isolating.iter().find(|(_, rules)| {
            let has = |ports: &Option<Vec<PortMatch>>| match ports {
                None => true,
                Some(ports) => ports.iter().any(|one| has(one, protocol, port)),
            };
            rules.iter().any(has)
        });
        match allowing {
            None => return denied(*first),
            Some((decider, _)) => by_network = Some(*decider),
        }
    }
    let by_mesh = find(Action::Allow, false);
    if by_mesh.is_none() && default == DefaultAction::Deny {
        return denied(by_default);
    }
    let by_audit = by_mesh.is_none() && default == DefaultAction::Audit;
    let audited = find(Action::Deny, true).or(by_audit.then_some(by_default));
    match audited {
        Some(decider) => Verdict {
            unaudited: false,
            ..allowed(decider)
        },
        None => allowed(by_network.or(by_mesh).unwrap_or(by_default)),
    }
}

/// Whether a rule with these ports is about the packet; one without is about all.
fn have(ports: &[PortMatch], protocol: Option<IpProtocol>, port: u16) -> bool {
    ports.is_empty() || ports.iter().any(|one| has(one, protocol, port))
}

fn has(one: &PortMatch, protocol: Option<IpProtocol>, port: u16) -> bool {
    Some(one.protocol) == protocol
        && match one.ports {
            Ports::All => true,
            Ports::Range(first, last) => (first..=last).contains(&port),
            // Of a rule of the mesh: those have none.
            Ports::Named(_) => false,
        }
}

fn allowed(decider: Decider) -> Verdict {
    Verdict {
        allowed: true,
        unaudited: true,
        decider,
    }
}

fn denied(decider: Decider) -> Verdict {
    Verdict {
        allowed: false,
        ..allowed(decider)
    }
}

/// Numbers for things, from 1 on, each given once.
#[derive(Debug)]
struct Numbers<T> {
    known: BTreeMap<T, u32>,
    last: u32,
}

impl<T> Default for Numbers<T> {
    fn default() -> Self {
        Self {
            known: BTreeMap::new(),
            last: 0,
        }
    }
}

impl<T: Ord> Numbers<T> {
    fn number(&mut self, thing: T) -> u32 {
        *self.known.entry(thing).or_insert_with(|| {
            // After four billion changes they begin anew, but never with 0.
            self.last = self.last.wrapping_add(1).max(1);
            self.last
        })
    }

    fn by_number(&self) -> BTreeMap<u32, &T> {
        self.known
            .iter()
            .map(|(thing, number)| (*number, thing))
            .collect()
    }

    fn retain(&mut self, used: &BTreeSet<u32>) {
        self.known.retain(|_, number| used.contains(number));
    }
}
