//! Services' addresses and node ports: defaults, allocation, and what is refused.

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use ipnet::IpNet;
use serde_json::{Value, json};

use super::{error::Cause, kinds::Kind, object};

/// As `--service-node-port-range` is unless said otherwise.
const NODE_PORTS: std::ops::RangeInclusive<i64> = 30_000..=32_767;

/// Addresses and ports that services have.
#[derive(Debug)]
pub(crate) struct Pools {
    /// The first family is the one that a single-stack service gets.
    ranges: Vec<IpNet>,
    addresses: BTreeSet<IpAddr>,
    ports: BTreeSet<(i64, String)>,
    /// Where the search for a free address goes on, per range.
    next: Vec<u128>,
}

impl Pools {
    pub(crate) fn new(ranges: Vec<IpNet>) -> Self {
        Self {
            next: vec![1; ranges.len()],
            ranges,
            addresses: BTreeSet::new(),
            ports: BTreeSet::new(),
        }
    }

    /// Remembers what a kept service has.
    pub(crate) fn take(&mut self, kind: &Kind, service: &Value) {
        if kind.kind == "Service" {
            self.addresses.extend(addresses(service));
            self.ports.extend(node_ports(service));
        }
    }

    /// Forgets what a deleted service had.
    pub(crate) fn release(&mut self, kind: &Kind, service: &Value) {
        if kind.kind == "Service" {
            for address in addresses(service) {
                self.addresses.remove(&address);
            }
            for port in node_ports(service) {
                self.ports.remove(&port);
            }
        }
    }

    /// Fills in families, addresses and ports of a service, and says what is wrong with those given.
    pub(crate) fn allocate(&mut self, old: Option<&Value>, new: &mut Value) -> Vec<Cause> {
        let text = |value: &Value, key: &str| {
            object::text(value, &["spec", key])
                .unwrap_or_default()
                .to_owned()
        };
        if text(new, "type") == "ExternalName" {
            for key in ["clusterIP", "clusterIPs", "ipFamilies", "ipFamilyPolicy"] {
                object::remove(new, &["spec", key]);
            }
            if let Some(old) = old {
                self.addresses_and_ports_of(old, false);
            }
            return Vec::new();
        }
        let was = old.map(|old| text(old, "clusterIP")).unwrap_or_default();
        let mut causes = Vec::new();
        if !was.is_empty() {
            // What it has, it keeps, also if the writer did not know it.
            for key in ["clusterIP", "clusterIPs", "ipFamilies", "ipFamilyPolicy"] {
                if let Some(value) = old.and_then(|old| object::at(old, &["spec", key])) {
                    object::set_default(new, &["spec", key], value.clone());
                }
            }
            if text(new, "clusterIP") != was {
                let got = text(new, "clusterIP");
                let why = "may not change once set";
                causes.push(Cause::invalid("spec.clusterIPs[0]", &got.into(), why));
                return causes;
            }
        }
        self.families(new, &mut causes);
        if causes.is_empty() {
            self.cluster_ips(old, new, &mut causes);
        }
        if causes.is_empty() {
            self.node_ports(old, new, &mut causes);
        }
        causes
    }

    fn addresses_and_ports_of(&mut self, service: &Value, keep: bool) {
        for address in addresses(service) {
            if keep {
                self.addresses.insert(address);
            } else {
                self.addresses.remove(&address);
            }
        }
    }

    fn families(&self, new: &mut Value, causes: &mut Vec<Cause>) {
        let headless_without_selector = object::text(new, &["spec", "clusterIP"]) == Some("None")
            && object::members(new, &["spec", "selector"]).next().is_none();
        let given: Vec<_> = object::texts(new, &["spec", "ipFamilies"])
            .into_iter()
            .map(str::to_owned)
            .collect();
        let from_address = object::text(new, &["spec", "clusterIP"])
            .and_then(|address| address.parse::<IpAddr>().ok())
            .map(|address| family(&address).to_owned());
        let default = if headless_without_selector && self.ranges.len() > 1 {
            "RequireDualStack"
        } else if given.len() > 1 {
            "PreferDualStack"
        } else {
            "SingleStack"
        };
        object::set_default(new, &["spec", "ipFamilyPolicy"], default);
        let policy = object::text(new, &["spec", "ipFamilyPolicy"])
            .unwrap_or_default()
            .to_owned();
        let has: Vec<_> = self
            .ranges
            .iter()
            .map(|range| family(&range.addr()))
            .collect();
        for (index, one) in given.iter().enumerate() {
            if !has.contains(&one.as_str()) {
                let field = format!("spec.ipFamilies[{index}]");
                let why = "not configured on this cluster";
                causes.push(Cause::invalid(field, &one.as_str().into(), why));
            }
        }
        if policy == "RequireDualStack" && has.len() < 2 {
            let why = "this cluster is not configured for dual-stack services";
            causes.push(Cause::invalid(
                "spec.ipFamilyPolicy",
                &policy.as_str().into(),
                why,
            ));
        }
        if policy == "SingleStack" && given.len() > 1 {
            let why = "may only hold up to 1 value when ipFamilyPolicy is SingleStack";
            causes.push(Cause::invalid(
                "spec.ipFamilies",
                &given.clone().into(),
                why,
            ));
        }
        let mut families = given;
        if families.is_empty() {
            families.extend(from_address.or_else(|| has.first().map(|one| (*one).to_owned())));
        }
        if policy != "SingleStack" {
            for one in has {
                if !families.iter().any(|known| known == one) {
                    families.push(one.to_owned());
                }
            }
        }
        object::set(new, &["spec", "ipFamilies"], families);
    }

    fn cluster_ips(&mut self, old: Option<&Value>, new: &mut Value, causes: &mut Vec<Cause>) {
        let given = object::text(new, &["spec", "clusterIP"])
            .unwrap_or_default()
            .to_owned();
        if given == "None" {
            object::set(new, &["spec", "clusterIPs"], json!(["None"]));
            return;
        }
        let mut wanted: Vec<_> = object::texts(new, &["spec", "clusterIPs"])
            .into_iter()
            .map(str::to_owned)
            .collect();
        if !given.is_empty() && wanted.is_empty() {
            wanted.push(given.clone());
        }
        if !given.is_empty() && wanted.first() != Some(&given) {
            let why = "first value must match `clusterIP`";
            causes.push(Cause::invalid("spec.clusterIPs", &wanted.into(), why));
            return;
        }
        let own: Vec<_> = old.map(addresses).unwrap_or_default();
        let families: Vec<_> = object::texts(new, &["spec", "ipFamilies"])
            .into_iter()
            .map(str::to_owned)
            .collect();
        let mut chosen = Vec::new();
        for (index, one) in families.iter().enumerate() {
            let field = format!("spec.clusterIPs[{index}]");
            let Some(range) = self
                .ranges
                .iter()
                .position(|range| family(&range.addr()) == one)
            else {
                continue;
            };
            match wanted.get(index) {
                None => match self.free(range) {
                    Some(address) => chosen.push(address.to_string()),
                    None => causes.push(Cause::invalid(field, &Value::Null, "range is full")),
                },
                Some(text) => {
                    let parsed = text.parse::<IpAddr>().ok();
                    let inside = parsed.filter(|address| {
                        self.ranges
                            .get(range)
                            .is_some_and(|range| range.contains(address))
                    });
                    match inside {
                        None => {
                            let why =
                                "failed to allocate IP: the provided IP is not in the valid range";
                            causes.push(Cause::invalid(field, &text.as_str().into(), why));
                        }
                        Some(address)
                            if self.addresses.contains(&address) && !own.contains(&address) =>
                        {
                            let why = "failed to allocate IP: provided IP is already allocated";
                            causes.push(Cause::invalid(field, &text.as_str().into(), why));
                        }
                        Some(address) => chosen.push(address.to_string()),
                    }
                }
            }
        }
        if let Some(first) = chosen.first() {
            object::set(new, &["spec", "clusterIP"], first.as_str());
        }
        object::set(new, &["spec", "clusterIPs"], chosen);
    }

    /// A free address of a range; the search begins where the last one ended.
    fn free(&mut self, range: usize) -> Option<IpAddr> {
        let net = *self.ranges.get(range)?;
        let next = self.next.get_mut(range)?;
        let size = match net {
            IpNet::V4(net) => (1_u128 << (32 - net.prefix_len())) - 1,
            IpNet::V6(net) => (1_u128 << (128 - net.prefix_len()).min(64)) - 1,
        };
        // One turn around the range, or as many steps as there are services in it.
        let steps = u128::try_from(self.addresses.len())
            .unwrap_or(u128::MAX)
            .saturating_add(2);
        for _ in 0..steps.min(size) {
            let offset = *next;
            *next = if *next + 1 >= size { 1 } else { *next + 1 };
            let address = match net {
                IpNet::V4(net) => IpAddr::V4(Ipv4Addr::from_bits(
                    net.network().to_bits() | u32::try_from(offset).ok()?,
                )),
                IpNet::V6(net) => IpAddr::V6(Ipv6Addr::from_bits(net.network().to_bits() | offset)),
            };
            if !self.addresses.contains(&address) {
                return Some(address);
            }
        }
        None
    }

    fn node_ports(&mut self, old: Option<&Value>, new: &mut Value, causes: &mut Vec<Cause>) {
        let kind = object::text(new, &["spec", "type"]).unwrap_or_default();
        let has_ports = kind == "NodePort"
            || kind == "LoadBalancer"
                && object::at(new, &["spec", "allocateLoadBalancerNodePorts"])
                    != Some(&Value::Bool(false));
        let own: BTreeSet<_> = old
            .map(node_ports)
            .unwrap_or_default()
            .into_iter()
            .collect();
        let before = old.map(|old| object::list(old, &["spec", "ports"]).to_vec());
        let Some(Value::Array(ports)) = new.get_mut("spec").and_then(|spec| spec.get_mut("ports"))
        else {
            return;
        };
        let mut chosen = BTreeSet::new();
        for (index, port) in ports.iter_mut().enumerate() {
            let field = format!("spec.ports[{index}].nodePort");
            let protocol = object::text(port, &["protocol"])
                .unwrap_or("TCP")
                .to_owned();
            let given = port
                .get("nodePort")
                .and_then(Value::as_i64)
                .filter(|port| *port != 0);
            if !has_ports {
                if given.is_some() && kind_forbids(given, old) {
                    let why = "may not be used when `type` is 'ClusterIP'";
                    causes.push(Cause::forbidden(field, why));
                }
                object::remove(port, &["nodePort"]);
                continue;
            }
            let kept = || {
                let same = before.iter().flatten().find(|one| {
                    one.get("port") == port.get("port")
                        && one.get("protocol") == port.get("protocol")
                });
                same.and_then(|one| one.get("nodePort"))
                    .and_then(Value::as_i64)
            };
            let number = match given.or_else(kept) {
                Some(number) if !NODE_PORTS.contains(&number) => {
                    let why = "provided port is not in the valid range. The range of valid ports is 30000-32767";
                    causes.push(Cause::invalid(field, &number.into(), why));
                    continue;
                }
                Some(number) => {
                    let key = (number, protocol.clone());
                    if self.ports.contains(&key) && !own.contains(&key) || chosen.contains(&key) {
                        let why = "provided port is already allocated";
                        causes.push(Cause::invalid(field, &number.into(), why));
                        continue;
                    }
                    number
                }
                None => {
                    let taken = |number: i64| {
                        self.ports
                            .iter()
                            .chain(&chosen)
                            .any(|(one, _)| *one == number)
                    };
                    let Some(number) = NODE_PORTS.clone().find(|number| !taken(*number)) else {
                        causes.push(Cause::invalid(field, &Value::Null, "range is full"));
                        continue;
                    };
                    number
                }
            };
            chosen.insert((number, protocol));
            object::set(port, &["nodePort"], number);
        }
    }
}

/// A service that becomes a `ClusterIP` one may still name the ports that it had.
fn kind_forbids(given: Option<i64>, old: Option<&Value>) -> bool {
    !old.map(node_ports)
        .unwrap_or_default()
        .iter()
        .any(|(port, _)| Some(*port) == given)
}

fn family(address: &IpAddr) -> &'static str {
    if address.is_ipv4() { "IPv4" } else { "IPv6" }
}

fn addresses(service: &Value) -> Vec<IpAddr> {
    let texts = object::texts(service, &["spec", "clusterIPs"]).into_iter();
    texts.filter_map(|text| text.parse().ok()).collect()
}

fn node_ports(service: &Value) -> Vec<(i64, String)> {
    let ports = object::list(service, &["spec", "ports"]).iter();
    ports
        .filter_map(|port| {
            let number = port.get("nodePort").and_then(Value::as_i64)?;
            let protocol = object::text(port, &["protocol"]).unwrap_or("TCP");
            Some((number, protocol.to_owned()))
        })
        .collect()
}

/// What a service says by saying nothing.
pub(crate) fn fill_in(service: &mut Value) {
    object::set_default(service, &["spec", "type"], "ClusterIP");
    object::set_default(service, &["spec", "sessionAffinity"], "None");
    let kind = object::text(service, &["spec", "type"])
        .unwrap_or_default()
        .to_owned();
    if kind != "ExternalName" {
        object::set_default(service, &["spec", "internalTrafficPolicy"], "Cluster");
    }
    if matches!(kind.as_str(), "NodePort" | "LoadBalancer") {
        object::set_default(service, &["spec", "externalTrafficPolicy"], "Cluster");
    }
    if kind == "LoadBalancer" {
        object::set_default(service, &["spec", "allocateLoadBalancerNodePorts"], true);
    }
    if object::text(service, &["spec", "sessionAffinity"]) == Some("ClientIP") {
        let place = [
            "spec",
            "sessionAffinityConfig",
            "clientIP",
            "timeoutSeconds",
        ];
        object::set_default(service, &place, 10_800);
    }
    if let Some(Value::Array(ports)) = service
        .get_mut("spec")
        .and_then(|spec| spec.get_mut("ports"))
    {
        for port in ports {
            let number = port.get("port").cloned().unwrap_or_default();
            object::set_default(port, &["protocol"], "TCP");
            object::set_default(port, &["targetPort"], number);
        }
    }
    object::set_default(service, &["status"], json!({"loadBalancer": {}}));
}

/// What is wrong with a service beyond its addresses.
pub(crate) fn check(service: &Value) -> Vec<Cause> {
    let mut causes = Vec::new();
    let text = |key: &str| object::text(service, &["spec", key]).unwrap_or_default();
    let ports = object::list(service, &["spec", "ports"]);
    let (kind, cluster_ip) = (text("type"), text("clusterIP"));
    if kind == "ExternalName" {
        if !super::names::is_subdomain(text("externalName").trim_end_matches('.')) {
            causes.push(Cause::required("spec.externalName", ""));
        }
    } else if ports.is_empty() && cluster_ip != "None" {
        causes.push(Cause::required("spec.ports", ""));
    }
    if cluster_ip == "None" && kind != "ClusterIP" && kind != "ExternalName" {
        let why = "may not be set to 'None' for NodePort and LoadBalancer services";
        causes.push(Cause::invalid("spec.clusterIPs[0]", &"None".into(), why));
    }
    let (mut seen_names, mut seen_ports) = (BTreeSet::new(), BTreeSet::new());
    for (index, port) in ports.iter().enumerate() {
        let path = format!("spec.ports[{index}]");
        let name = object::text(port, &["name"]).unwrap_or_default();
        if name.is_empty() && ports.len() > 1 {
            causes.push(Cause::required(format!("{path}.name"), ""));
        } else if !name.is_empty() && !super::names::is_label(name) {
            let why = "must be an RFC 1123 label";
            causes.push(Cause::invalid(format!("{path}.name"), &name.into(), why));
        } else if !seen_names.insert(name) {
            causes.push(Cause::duplicate(format!("{path}.name"), &name.into()));
        }
        let number = port.get("port").and_then(Value::as_i64).unwrap_or(0);
        if !(1..=65_535).contains(&number) {
            let why = "must be between 1 and 65535, inclusive";
            causes.push(Cause::invalid(format!("{path}.port"), &number.into(), why));
        }
        let protocol = object::text(port, &["protocol"]).unwrap_or_default();
        if !seen_ports.insert((number, protocol)) {
            causes.push(Cause::duplicate(&path, port));
        }
    }
    if let Some(seconds) = object::at(
        service,
        &[
            "spec",
            "sessionAffinityConfig",
            "clientIP",
            "timeoutSeconds",
        ],
    )
    .and_then(Value::as_i64)
        && !(1..=86_400).contains(&seconds)
    {
        let field = "spec.sessionAffinityConfig.clientIP.timeoutSeconds";
        let why = "must be greater than 0 and less than 86400";
        causes.push(Cause::invalid(field, &seconds.into(), why));
    }
    for (index, address) in object::texts(service, &["spec", "externalIPs"])
        .into_iter()
        .enumerate()
    {
        if address.parse::<IpAddr>().is_err() {
            let field = format!("spec.externalIPs[{index}]");
            causes.push(Cause::invalid(
                field,
                &address.into(),
                "must be a valid IP address",
            ));
        }
    }
    causes
}

#[cfg(test)]
mod tests {
    use super::{super::kinds::Catalog, *};

    fn pools() -> Pools {
        let ranges = ["10.96.0.0/29", "fd00:96::/112"].map(|net| net.parse().unwrap());
        Pools::new(ranges.to_vec())
    }

    fn made(pools: &mut Pools, spec: Value) -> Result<Value, String> {
        let catalog = Catalog::default();
        let kind = catalog.find("", "v1", "services").unwrap();
        let mut service = json!({"metadata": {"name": "s"}, "spec": spec});
        fill_in(&mut service);
        let mut causes = pools.allocate(None, &mut service);
        causes.extend(check(&service));
        if let Some(cause) = causes.first() {
            return Err(cause.field.clone());
        }
        pools.take(kind, &service);
        Ok(service["spec"].clone())
    }

    #[test]
    fn addresses_are_given_out_once_and_given_back() {
        let mut pools = pools();
        let ports = json!([{"port": 80}]);
        let mut seen = BTreeSet::new();
        for _ in 0..6 {
            let spec = made(&mut pools, json!({"ports": ports})).unwrap();
            assert!(seen.insert(spec["clusterIP"].to_string()));
        }
        assert_eq!(
            made(&mut pools, json!({"ports": ports})).unwrap_err(),
            "spec.clusterIPs[0]"
        );
        let catalog = Catalog::default();
        let kind = catalog.find("", "v1", "services").unwrap();
        pools.release(kind, &json!({"spec": {"clusterIPs": ["10.96.0.3"]}}));
        let again = made(&mut pools, json!({"ports": ports})).unwrap();
        assert_eq!(again["clusterIP"], "10.96.0.3");
    }

    #[test]
    fn families_follow_the_policy() {
        let mut pools = pools();
        let ports = json!([{"port": 80}]);
        let dual = made(
            &mut pools,
            json!({"ports": ports, "ipFamilyPolicy": "PreferDualStack"}),
        )
        .unwrap();
        assert_eq!(dual["ipFamilies"], json!(["IPv4", "IPv6"]));
        assert_eq!(dual["clusterIPs"][1], "fd00:96::1");
        let six = made(&mut pools, json!({"ports": ports, "ipFamilies": ["IPv6"]})).unwrap();
        assert_eq!(
            (six["ipFamilyPolicy"].as_str(), six["clusterIP"].as_str()),
            (Some("SingleStack"), Some("fd00:96::2"))
        );
        let none = made(
            &mut pools,
            json!({"clusterIP": "None", "selector": {"a": "b"}}),
        )
        .unwrap();
        assert_eq!(none["clusterIPs"], json!(["None"]));
        let external = made(
            &mut pools,
            json!({"type": "ExternalName", "externalName": "a.b"}),
        )
        .unwrap();
        assert!(external.get("clusterIP").is_none());
    }

    #[test]
    fn node_ports_are_given_out() {
        let mut pools = pools();
        let spec = json!({"type": "NodePort", "ports": [
            {"name": "a", "port": 80}, {"name": "b", "port": 80, "protocol": "UDP", "nodePort": 30_053},
        ]});
        let made_spec = made(&mut pools, spec.clone()).unwrap();
        assert_eq!(made_spec["ports"][0]["nodePort"], 30_000);
        assert_eq!(made_spec["ports"][0]["targetPort"], 80);
        assert_eq!(
            made(&mut pools, spec).unwrap_err(),
            "spec.ports[1].nodePort"
        );
    }

    #[test]
    fn wrong_services_are_refused() {
        for (spec, field) in [
            (json!({}), "spec.ports"),
            (json!({"ports": [{"port": 0}]}), "spec.ports[0].port"),
            (
                json!({"ports": [{"port": 1}, {"port": 2}]}),
                "spec.ports[0].name",
            ),
            (
                json!({"ports": [{"port": 1}], "clusterIP": "10.97.0.1"}),
                "spec.clusterIPs[0]",
            ),
            (json!({"type": "ExternalName"}), "spec.externalName"),
        ] {
            assert_eq!(
                made(&mut pools(), spec.clone()).unwrap_err(),
                field,
                "{spec}"
            );
        }
    }
}
