//! What the mesh's own zones hold at a name: Kubernetes' DNS-based service discovery 1.1.0,
//! node names, and the reverse of both.

use std::{collections::BTreeSet, net::IpAddr};

use hickory_proto::rr::{
    Name, RData, Record, RecordType,
    rdata::{CNAME, PTR, SOA, SRV, TXT},
};
use ipnet::IpNet;
use mesh_core::{
    policy::callers::Caller,
    services::{Ranked, View, rank},
    snapshot::{
        EndpointPort, ExternalPeer, MeshSettings, Node, Protocol, Service, ServiceKind,
        ServiceName, ServicePort, Snapshot,
    },
};
use mesh_wire::id::MeshId;

use crate::{answer::Told, local::PodNames};

/// How long clients may keep an own record, in seconds. Endpoints move, and the answer is on the
/// same machine: the specification's schema knows no time, CoreDNS uses 5.
pub(crate) const OWN_TTL_S: u32 = 5;

/// The version of the specification that `dns-version.<zone>` promises.
const SCHEMA_VERSION: &str = "1.1.0";

/// Weights of the SRV records of one headless port add up to about this (CoreDNS does the same).
const SRV_WEIGHT_SUM: u16 = 100;

/// Reverse names found for one address: an endpoint is rarely in more than a handful of services.
const REVERSE_NAMES_MAX: usize = 16;

/// What there is at a name.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Found {
    /// Another zone's name: ask an upstream.
    Foreign,
    /// An own zone's name that does not exist. `apex` is the zone.
    NoName { apex: Name },
    /// An own name.
    Here(Records),
}

/// The records at a name, of every type.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Records {
    /// The zone.
    pub(crate) apex: Name,
    /// Best first. Empty: something exists below, nothing here.
    pub(crate) data: Vec<RData>,
    /// Addresses of what `data` points to.
    pub(crate) additional: Vec<Record>,
    pub(crate) told: Told,
}

/// What is asked, and by whom.
#[derive(Clone, Copy)]
pub(crate) struct Asked<'a> {
    pub(crate) name: &'a Name,
    pub(crate) record_type: RecordType,
    /// Rotates endpoints that are equally good.
    pub(crate) turn: u16,
    /// A pod to which policy denies something.
    pub(crate) caller: Option<Caller<'a>>,
}

/// Looks a name up.
pub(crate) fn find(view: &View, pods: PodNames, asked: Asked<'_>) -> Found {
    let (mesh, name) = (&view.snapshot.mesh, asked.name);
    if let Some((apex, labels)) = zone_of(mesh, name) {
        let Some(labels) = labels else {
            return Found::NoName { apex };
        };
        let zone = Zone {
            view,
            pods,
            apex,
            asked,
        };
        let labels: Vec<&str> = labels.iter().map(String::as_str).collect();
        let records = if Some(&zone.apex) == parse(&mesh.cluster_domain).as_ref() {
            zone.service_name(&labels)
        } else {
            zone.node_name(&labels)
        };
        return match records {
            Some(records) => Found::Here(records),
            None => Found::NoName { apex: zone.apex },
        };
    }
    reverse(view, name)
}

/// Whether `name` is in a zone that every mesh has unless its operator says otherwise: all that
/// is known before the first snapshot.
pub(crate) fn is_in_a_default_zone(name: &Name) -> bool {
    zone_of(&MeshSettings::with_defaults(MeshId([0; 32]), ""), name).is_some()
}

/// The start-of-authority record of an own zone; its minimum is how long "no" may be kept
/// (RFC 2308 §4).
pub(crate) fn soa(view: Option<&View>, apex: &Name) -> Record {
    Record::from_rdata(apex.clone(), OWN_TTL_S, soa_data(view, apex))
}

fn soa_data(view: Option<&View>, apex: &Name) -> RData {
    let child = |label: &str| below(apex, label).unwrap_or_else(|| apex.clone());
    // A serial only has to change (RFC 1982): the low half of the generation does.
    let generation = view.map_or(0, |view| view.snapshot.generation.0);
    let [.., a, b, c, d] = generation.to_be_bytes();
    let serial = u32::from_be_bytes([a, b, c, d]);
    RData::SOA(SOA::new(
        child("ns"),
        child("hostmaster"),
        serial,
        7200,
        1800,
        86_400,
        OWN_TTL_S,
    ))
}

/// The own zone that holds `name`, and the labels below its apex, from the apex down and in
/// lower case; no labels if one of them could not be any name of ours.
fn zone_of(mesh: &MeshSettings, name: &Name) -> Option<(Name, Option<Vec<String>>)> {
    let zones = [&mesh.cluster_domain, &mesh.node_domain];
    let apex = zones
        .into_iter()
        .filter_map(|zone| parse(zone))
        .filter(|zone| zone.zone_of(name))
        .max_by_key(|zone| zone.iter().len())?;
    let below = name.iter().rev().skip(apex.iter().len());
    Some((apex, below.map(label_text).collect()))
}

/// A zone's name; `None` for the root, which nobody may own.
fn parse(zone: &str) -> Option<Name> {
    let mut name = Name::from_ascii(zone).ok()?.to_lowercase();
    name.set_fqdn(true);
    (!name.is_root()).then_some(name)
}

fn label_text(label: &[u8]) -> Option<String> {
    let ours = |c: &u8| c.is_ascii_alphanumeric() || matches!(c, b'-' | b'_');
    let text = std::str::from_utf8(label).ok()?;
    label.iter().all(ours).then(|| text.to_ascii_lowercase())
}

fn below(zone: &Name, label: &str) -> Option<Name> {
    zone.prepend_label(label.as_bytes()).ok()
}

struct Zone<'a> {
    view: &'a View,
    pods: PodNames,
    apex: Name,
    asked: Asked<'a>,
}

impl Zone<'_> {
    /// `labels` from the apex down.
    fn service_name(&self, labels: &[&str]) -> Option<Records> {
        match *labels {
            [] => self.here(vec![soa_data(Some(self.view), &self.apex)]),
            ["dns-version"] => {
                let version = TXT::new(vec![SCHEMA_VERSION.to_owned()]);
                self.here(vec![RData::TXT(version)])
            }
            ["svc"] => self.here(Vec::new()),
            ["pod", ref rest @ ..] if self.pods != PodNames::Off => self.pod_name(rest),
            ["svc", namespace] => {
                let exists = has_namespace(&self.view.snapshot, namespace);
                exists.then(|| self.here(Vec::new())).flatten()
            }
            ["svc", namespace, name, ref rest @ ..] => {
                let name = ServiceName {
                    namespace: namespace.to_owned(),
                    name: name.to_owned(),
                };
                self.below_service(self.view.snapshot.services.get(&name)?, rest)
            }
            _ => None,
        }
    }

    /// `labels` below `pod`, from there down.
    fn pod_name(&self, labels: &[&str]) -> Option<Records> {
        match *labels {
            [] => self.here(Vec::new()),
            [namespace] => {
                let exists = has_namespace(&self.view.snapshot, namespace);
                exists.then(|| self.here(Vec::new())).flatten()
            }
            [namespace, label] => {
                let address = dashed_address(label)?;
                let exists = match self.pods {
                    PodNames::Off => false,
                    PodNames::Insecure => has_namespace(&self.view.snapshot, namespace),
                    PodNames::Verified => has_pod(&self.view.snapshot, namespace, address),
                };
                exists.then(|| self.here(vec![address.into()])).flatten()
            }
            _ => None,
        }
    }

    fn below_service(&self, service: &Service, rest: &[&str]) -> Option<Records> {
        match (&service.kind, rest) {
            (ServiceKind::ClusterIp(addresses), []) => {
                self.here(addresses.iter().copied().map(RData::from).collect())
            }
            (ServiceKind::Headless, []) => {
                let (endpoints, told) = self.endpoints_for_caller(service);
                let records = self.here(addresses(&endpoints))?;
                Some(Records { told, ..records })
            }
            (ServiceKind::ExternalName(target), []) => {
                let mut target = Name::from_ascii(target).ok()?;
                target.set_fqdn(true);
                self.here(vec![RData::CNAME(CNAME(target))])
            }
            (ServiceKind::ExternalName(_), _) => None,
            (_, [protocol]) if parse_protocol(protocol).is_some() => {
                let protocol = parse_protocol(protocol)?;
                let named = |port: &_| named_port(port, None, protocol);
                let exists = service.ports.iter().any(named);
                exists.then(|| self.here(Vec::new())).flatten()
            }
            (_, [protocol, port]) => {
                let protocol = parse_protocol(protocol)?;
                self.port(service, port.strip_prefix('_')?, protocol)
            }
            (ServiceKind::Headless, [host]) => {
                let mut endpoints = self.endpoints(service);
                endpoints.retain(|one| endpoint_label(one) == *host);
                (!endpoints.is_empty())
                    .then(|| self.here(addresses(&endpoints)))
                    .flatten()
            }
            (ServiceKind::ClusterIp(_) | ServiceKind::Headless, _) => None,
        }
    }

    fn port(&self, service: &Service, port: &str, protocol: Protocol) -> Option<Records> {
        let named = |one: &&_| named_port(one, Some(port), protocol);
        let port = service.ports.iter().find(named)?;
        let target = service_domain(&self.apex, &service.name)?;
        let (data, additional, told) = match &service.kind {
            ServiceKind::ClusterIp(addresses) => {
                let data = SRV::new(0, SRV_WEIGHT_SUM, port.port, target.clone());
                let additional = addresses.iter().map(|&one| address_record(&target, one));
                (vec![RData::SRV(data)], additional.collect(), Told::All)
            }
            ServiceKind::Headless => {
                let (endpoints, told) = self.endpoints_for_caller(service);
                let (data, additional) = headless_ports(&endpoints, &port.name, protocol, &target);
                (data, additional, told)
            }
            ServiceKind::ExternalName(_) => return None,
        };
        let apex = self.apex.clone();
        Some(Records {
            apex,
            data,
            additional,
            told,
        })
    }

    /// Endpoints that may be told to clients: near and alive first; those on dead nodes only
    /// when there is no other of their family.
    fn endpoints(&self, service: &Service) -> Vec<Ranked<'_>> {
        self.in_turn(usable(self.view, service))
    }

    /// The same, without those that policy denies to who asks, if there are others of their family. It comes before
    /// liveness: a path may come back with the next packet.
    fn endpoints_for_caller(&self, service: &Service) -> (Vec<Ranked<'_>>, Told) {
        let mut usable = usable(self.view, service);
        let all = usable.len();
        if let Some(caller) = self.asked.caller {
            let asked = self.asked.record_type;
            let is_asked_for = |one: &Ranked<'_>| match one.address {
                IpAddr::V4(_) => asked != RecordType::AAAA,
                IpAddr::V6(_) => asked != RecordType::A,
            };
            prefer(&mut usable, |one| {
                !is_asked_for(one) || !caller.is_denied(one.address, &one.slice.ports)
            });
        }
        let told = if usable.len() < all {
            Told::Part
        } else {
            Told::Whole
        };
        (self.in_turn(usable), told)
    }

    fn in_turn<'r>(&self, mut ranked: Vec<Ranked<'r>>) -> Vec<Ranked<'r>> {
        prefer(&mut ranked, |one| one.alive);
        for equals in ranked.chunk_by_mut(|one, other| one.tier == other.tier) {
            let turn = usize::from(self.asked.turn) % equals.len().max(1);
            equals.rotate_left(turn);
        }
        ranked
    }

    /// `labels` from the apex down. Node names may hold dots.
    fn node_name(&self, labels: &[&str]) -> Option<Records> {
        if labels.is_empty() {
            return self.here(vec![soa_data(Some(self.view), &self.apex)]);
        }
        let wanted = labels.iter().rev().copied().collect::<Vec<_>>().join(".");
        let snapshot = &self.view.snapshot;
        if let Some(node) = snapshot.nodes.get(wanted.as_str()) {
            return self.here(vec![node.overlay_v4.into(), node.overlay_v6.into()]);
        }
        if let Some(peer) = snapshot.external_peers.get(wanted.as_str()) {
            let hosts = peer.prefixes.iter().filter_map(single_address);
            return self.here(hosts.map(RData::from).collect());
        }
        let suffix = format!(".{wanted}");
        let names = snapshot.nodes.keys().chain(snapshot.external_peers.keys());
        let parent = names
            .map(|name| name.as_str())
            .any(|name| name.ends_with(&suffix));
        parent.then(|| self.here(Vec::new())).flatten() // RFC 8020: a name with a child exists.
    }

    #[expect(
        clippy::unnecessary_wraps,
        reason = "every arm that calls it gives an Option"
    )]
    fn here(&self, data: Vec<RData>) -> Option<Records> {
        Some(Records {
            apex: self.apex.clone(),
            data,
            additional: Vec::new(),
            told: Told::All,
        })
    }
}

fn usable<'a>(view: &'a View, service: &Service) -> Vec<Ranked<'a>> {
    let mut ranked = rank(view, service);
    ranked.retain(|one| one.usable);
    ranked
}

/// Leaves out those that are not `better`, where others of their family are: no answer at all looks like a service that
/// is down.
fn prefer(endpoints: &mut Vec<Ranked<'_>>, better: impl Fn(&Ranked<'_>) -> bool) {
    for v4 in [true, false] {
        let family = |one: &Ranked<'_>| one.address.is_ipv4() == v4;
        if endpoints.iter().any(|one| family(one) && better(one)) {
            endpoints.retain(|one| !family(one) || better(one));
        }
    }
}

fn has_namespace(snapshot: &Snapshot, namespace: &str) -> bool {
    let first = ServiceName {
        namespace: namespace.to_owned(),
        name: String::new(),
    };
    let next = snapshot.services.range(first..).next();
    next.is_some_and(|(name, _)| name.namespace == namespace)
}

/// Whether a pod, or an endpoint of a service, in that namespace has that address.
fn has_pod(snapshot: &Snapshot, namespace: &str, address: IpAddr) -> bool {
    let pods = &snapshot.policy.pods;
    let of_pods = pods.values().filter(|pod| pod.name.namespace == namespace);
    let mut of_pods = of_pods.flat_map(|pod| &pod.addresses);
    let first = ServiceName {
        namespace: namespace.to_owned(),
        name: String::new(),
    };
    let slices = snapshot.slices.range(first..);
    let slices = slices.take_while(|(name, _)| name.namespace == namespace);
    let mut endpoints = slices
        .flat_map(|(_, slices)| slices.values())
        .flat_map(|slice| &slice.endpoints);
    of_pods.any(|&own| own == address) || endpoints.any(|endpoint| endpoint.address == address)
}

/// `10-2-3-1`, or an IPv6 address with dashes for colons, two of them for zeros that are left out.
fn dashed_address(label: &str) -> Option<IpAddr> {
    let v4 = label.replace('-', ".").parse().map(IpAddr::V4);
    let v6 = || label.replace('-', ":").parse().map(IpAddr::V6);
    v4.or_else(|_| v6()).ok()
}

fn parse_protocol(label: &str) -> Option<Protocol> {
    match label {
        "_tcp" => Some(Protocol::Tcp),
        "_udp" => Some(Protocol::Udp),
        _ => None,
    }
}

/// Only named ports have SRV records.
fn named_port(port: &ServicePort, name: Option<&str>, protocol: Protocol) -> bool {
    let named = !port.name.is_empty() && name.is_none_or(|name| port.name == name);
    named && port.protocol == protocol
}

fn service_domain(apex: &Name, name: &ServiceName) -> Option<Name> {
    let namespace = below(&below(apex, "svc")?, &name.namespace)?;
    below(&namespace, &name.name)
}

fn address_record(name: &Name, address: IpAddr) -> Record {
    Record::from_rdata(name.clone(), OWN_TTL_S, address.into())
}

fn addresses(endpoints: &[Ranked<'_>]) -> Vec<RData> {
    let mut addresses: Vec<IpAddr> = Vec::with_capacity(endpoints.len());
    let mut seen = BTreeSet::new();
    for one in endpoints {
        if seen.insert(one.address) {
            addresses.push(one.address); // Several slices may hold the same endpoint.
        }
    }
    addresses.into_iter().map(RData::from).collect()
}

fn headless_ports(
    endpoints: &[Ranked<'_>],
    port: &str,
    protocol: Protocol,
    service: &Name,
) -> (Vec<RData>, Vec<Record>) {
    let mut targets: Vec<(u16, Name)> = Vec::new();
    let mut seen = BTreeSet::new();
    let mut additional = Vec::new();
    for one in endpoints {
        let serves = |target: &&EndpointPort| target.name == port && target.protocol == protocol;
        let label = endpoint_label(one);
        let (Some(target), Some(name)) =
            (one.slice.ports.iter().find(serves), below(service, &label))
        else {
            continue;
        };
        if seen.insert((one.address, label.clone(), 0)) {
            additional.push(address_record(&name, one.address));
        }
        let unspecified = IpAddr::from([0, 0, 0, 0]); // A name with both families counts once.
        if seen.insert((unspecified, label, target.port)) {
            targets.push((target.port, name));
        }
    }
    let count = u16::try_from(targets.len()).unwrap_or(u16::MAX).max(1);
    let weight = (SRV_WEIGHT_SUM / count).max(1);
    let data = targets
        .into_iter()
        .map(|(port, name)| RData::SRV(SRV::new(0, weight, port, name)))
        .collect();
    (data, additional)
}

/// The label of an endpoint below its service: its hostname, or else its address with dashes.
/// IPv6 is written out in full, because a label must not begin or end with a dash.
fn endpoint_label(one: &Ranked<'_>) -> String {
    if let Some(hostname) = &one.endpoint.hostname {
        return hostname.to_ascii_lowercase();
    }
    match one.address {
        IpAddr::V4(address) => address.to_string().replace('.', "-"),
        IpAddr::V6(address) => {
            let groups = address.segments().map(|group| format!("{group:x}"));
            groups.join("-")
        }
    }
}

fn reverse(view: &View, name: &Name) -> Found {
    let Ok(prefix) = name.parse_arpa_name() else {
        return Found::Foreign;
    };
    // `parse_arpa_name` also reads `+1` and `01`, which are other names.
    let address = single_address(&prefix).filter(|&address| Name::from(address) == *name);
    let names = address.map_or_else(Vec::new, |address| names_of(view, address));
    let apex = match overlay_zone(&view.snapshot.mesh, &prefix) {
        Some(labels) => name.trim_to(labels),
        None if names.is_empty() => return Found::Foreign,
        None => name.clone(), // The address is ours, the network around it perhaps not.
    };
    if names.is_empty() && single_address(&prefix).is_some() {
        return Found::NoName { apex };
    }
    Found::Here(Records {
        apex,
        data: names
            .into_iter()
            .map(|name| RData::PTR(PTR(name)))
            .collect(),
        additional: Vec::new(),
        told: Told::All,
    })
}

/// How many labels the reverse zone has that `prefix` lies in, if it is one of the overlay's:
/// the smallest cut at an octet or nibble that holds only overlay addresses.
fn overlay_zone(mesh: &MeshSettings, prefix: &IpNet) -> Option<usize> {
    let (own, bits_per_label) = match prefix {
        IpNet::V4(_) => (IpNet::from(mesh.overlay_v4), 8),
        IpNet::V6(_) => (IpNet::from(mesh.id.ula_prefix()), 4),
    };
    let labels = own.prefix_len().div_ceil(bits_per_label);
    let inside = own.contains(prefix) && prefix.prefix_len() >= labels * bits_per_label;
    inside.then(|| usize::from(labels) + 2) // `in-addr.arpa`, `ip6.arpa`
}

fn names_of(view: &View, address: IpAddr) -> Vec<Name> {
    let snapshot = &view.snapshot;
    let mesh = &snapshot.mesh;
    let (Some(services), Some(nodes)) = (parse(&mesh.cluster_domain), parse(&mesh.node_domain))
    else {
        return Vec::new();
    };
    let own = |node: &&Node| node.overlay_v4 == address || node.overlay_v6 == address;
    let host = |peer: &&ExternalPeer| {
        let mut hosts = peer.prefixes.iter().filter_map(single_address);
        hosts.any(|host| host == address)
    };
    let node = snapshot.nodes.values().find(own).map(|node| &node.name);
    let peer = || {
        snapshot
            .external_peers
            .values()
            .find(host)
            .map(|peer| &peer.name)
    };
    if let Some(name) = node.or_else(peer) {
        let name = Name::from_ascii(name.as_str()).and_then(|name| name.append_domain(&nodes));
        return name.into_iter().collect();
    }
    let names = snapshot.services.values().flat_map(|service| {
        let domain = service_domain(&services, &service.name);
        domain.map_or_else(Vec::new, |domain| {
            reverse_of(view, service, &domain, address)
        })
    });
    names.take(REVERSE_NAMES_MAX).collect()
}

fn reverse_of(view: &View, service: &Service, domain: &Name, address: IpAddr) -> Vec<Name> {
    match &service.kind {
        ServiceKind::ClusterIp(addresses) if addresses.contains(&address) => vec![domain.clone()],
        ServiceKind::Headless => {
            let mut endpoints = view.snapshot.endpoints(&service.name);
            if !endpoints.any(|(_, endpoint)| endpoint.address == address) {
                return Vec::new(); // Ranking costs more, and most services end here.
            }
            let ranked = rank(view, service);
            let here = ranked
                .iter()
                .filter(|one| one.usable && one.address == address);
            let mut names: Vec<_> = here
                .filter_map(|one| below(domain, &endpoint_label(one)))
                .collect();
            names.dedup();
            names
        }
        ServiceKind::ClusterIp(_) | ServiceKind::ExternalName(_) => Vec::new(),
    }
}

fn single_address(prefix: &IpNet) -> Option<IpAddr> {
    (prefix.prefix_len() == prefix.max_prefix_len()).then(|| prefix.addr())
}
