//! The services that all ways have in their tables, and how kube-proxy would program them.

use std::{fmt::Write as _, net::Ipv4Addr};

/// What the pods of the node have their addresses from.
const POD_RANGE: &str = "10.244.0.0/16";

/// The first service's address: 10,000 end at 10.96.39.15.
const FIRST_SERVICE: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 0);

/// The first of the endpoints that nobody is at.
const FIRST_ENDPOINT: Ipv4Addr = Ipv4Addr::new(10, 128, 0, 0);

/// The server pod's addresses: the endpoints of the service that is asked for.
pub(super) const ENDPOINTS: [Ipv4Addr; 4] = [
    Ipv4Addr::new(10, 244, 2, 1),
    Ipv4Addr::new(10, 244, 2, 2),
    Ipv4Addr::new(10, 244, 2, 3),
    Ipv4Addr::new(10, 244, 2, 4),
];

/// Where the server answers.
pub(super) const ENDPOINT_PORT: u16 = 8080;

/// Where services are asked for.
pub(super) const SERVICE_PORT: u16 = 80;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Protocol {
    Tcp,
    Udp,
}

impl Protocol {
    fn name(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        }
    }
}

/// One port of a service.
#[derive(Debug)]
struct Frontend {
    /// The service's number, and with it its place in every table.
    number: usize,
    protocol: Protocol,
    address: Ipv4Addr,
    endpoints: Vec<Ipv4Addr>,
}

impl Frontend {
    fn endpoint_numbers(&self) -> impl Iterator<Item = (usize, Ipv4Addr)> {
        self.endpoints.iter().copied().enumerate()
    }
}

/// So many services of one TCP port and four endpoints each. One of them, in the middle, has the server pod for its
/// endpoints, and a UDP port besides: what has to look through the services one after the other has to look
/// through half of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Cluster {
    pub(super) services: usize,
}

impl Cluster {
    /// The address of the service that is asked for.
    pub(super) fn asked(self) -> Ipv4Addr {
        after(FIRST_SERVICE, self.services / 2)
    }

    fn frontends(self) -> impl Iterator<Item = Frontend> {
        (0..self.services).flat_map(move |number| self.of_service(number))
    }

    fn of_service(self, number: usize) -> Vec<Frontend> {
        let frontend = |protocol, endpoints| Frontend {
            number,
            protocol,
            address: after(FIRST_SERVICE, number),
            endpoints,
        };
        if number == self.services / 2 {
            return [Protocol::Tcp, Protocol::Udp]
                .map(|protocol| frontend(protocol, ENDPOINTS.to_vec()))
                .into();
        }
        let first = number * ENDPOINTS.len();
        let nobody = first..first + ENDPOINTS.len();
        let endpoints = nobody.map(|number| after(FIRST_ENDPOINT, number));
        vec![frontend(Protocol::Tcp, endpoints.collect())]
    }

    /// For `services-bench hold`: a line each frontend.
    pub(super) fn table(self) -> String {
        let mut text = String::new();
        for frontend in self.frontends() {
            let protocol = frontend.protocol.name();
            write!(text, "{protocol} {}:{SERVICE_PORT}", frontend.address).ok();
            for endpoint in &frontend.endpoints {
                write!(text, " {endpoint}:{ENDPOINT_PORT}").ok();
            }
            text.push('\n');
        }
        text
    }

    /// For `nft -f`: the table that kube-proxy 1.33 makes in its nftables mode (`pkg/proxy/nftables`, with its test's
    /// base rules), for ClusterIPs.
    pub(super) fn nftables(self) -> String {
        let mut text = NFTABLES_BASE.to_owned();
        for frontend in self.frontends() {
            let Frontend {
                address, protocol, ..
            } = frontend;
            let name = format!("{:08X}-team/service-{}", frontend.number, frontend.number);
            let protocol = protocol.name();
            let service = format!("service-{name}/{protocol}/main");
            let endpoint = |number, endpoint| {
                format!("endpoint-{name}/{protocol}/main__{number}_{endpoint}/{ENDPOINT_PORT}")
            };
            let (mut chains, mut choice) = (String::new(), String::new());
            for (number, to) in frontend.endpoint_numbers() {
                let chain = endpoint(number, to);
                write!(
                    chains,
                    "add chain ip kube-proxy {chain}\n\
                     add rule ip kube-proxy {chain} ip saddr {to} jump mark-for-masquerade\n\
                     add rule ip kube-proxy {chain} meta l4proto {protocol} dnat to {to}:{ENDPOINT_PORT}\n"
                )
                .ok();
                write!(choice, "{number} : goto {chain} , ").ok();
            }
            let count = frontend.endpoints.len();
            let choice = choice.trim_end_matches(" , ");
            write!(
                text,
                "add chain ip kube-proxy {service}\n{chains}\
                 add rule ip kube-proxy {service} ip daddr {address} ip saddr != {POD_RANGE} jump mark-for-masquerade\n\
                 add rule ip kube-proxy {service} numgen random mod {count} vmap {{ {choice} }}\n\
                 add element ip kube-proxy cluster-ips {{ {address} }}\n\
                 add element ip kube-proxy service-ips {{ {address} . {protocol} . {SERVICE_PORT} : goto {service} }}\n"
            )
            .ok();
        }
        text
    }

    /// For `iptables-restore`: what kube-proxy 1.33 makes in its iptables mode (`pkg/proxy/iptables`), for ClusterIPs.
    pub(super) fn iptables(self) -> String {
        let (mut chains, mut portals, mut rules) = (String::new(), String::new(), String::new());
        for frontend in self.frontends() {
            let Frontend {
                address, protocol, ..
            } = frontend;
            let protocol = protocol.name();
            let said = format!("team/service-{}:main", frontend.number);
            // Sixteen letters of a hash there.
            let letter = protocol.to_uppercase();
            let name = format!("{letter}{:0>13}", frontend.number);
            let service = format!("KUBE-SVC-{name}");
            writeln!(chains, ":{service} - [0:0]").ok();
            writeln!(
                portals,
                "-A KUBE-SERVICES -m comment --comment \"{said} cluster IP\" -m {protocol} -p {protocol} -d {address} \
                 --dport {SERVICE_PORT} -j {service}"
            )
            .ok();
            writeln!(
                rules,
                "-A {service} -m comment --comment \"{said} cluster IP\" -m {protocol} -p {protocol} -d {address} \
                 --dport {SERVICE_PORT} ! -s {POD_RANGE} -j KUBE-MARK-MASQ"
            )
            .ok();
            for (number, to) in frontend.endpoint_numbers() {
                let endpoint = format!("KUBE-SEP-{letter}{:0>11}{number:02}", frontend.number);
                let left = frontend.endpoints.len() - number;
                let share = if left > 1 {
                    let probability = 1.0 / left as f64;
                    format!("-m statistic --mode random --probability {probability:.10} ")
                } else {
                    String::new()
                };
                write!(
                    rules,
                    "-A {service} -m comment --comment \"{said} -> {to}:{ENDPOINT_PORT}\" {share}-j {endpoint}\n\
                     -A {endpoint} -m comment --comment {said} -s {to} -j KUBE-MARK-MASQ\n\
                     -A {endpoint} -m comment --comment {said} -m {protocol} -p {protocol} -j DNAT --to-destination \
                     {to}:{ENDPOINT_PORT}\n"
                )
                .ok();
                writeln!(chains, ":{endpoint} - [0:0]").ok();
            }
        }
        format!(
            "{IPTABLES_FILTER}{IPTABLES_NAT_CHAINS}{chains}{IPTABLES_NAT}{portals}{IPTABLES_NODE_PORTS}{rules}COMMIT\n"
        )
    }
}

fn after(first: Ipv4Addr, number: usize) -> Ipv4Addr {
    let number = u32::try_from(number).unwrap_or(u32::MAX);
    Ipv4Addr::from(u32::from(first).saturating_add(number))
}

/// For `haproxy -f`: the service at `address`, and its defaults otherwise.
pub(super) fn haproxy(address: Ipv4Addr) -> String {
    let servers = ENDPOINTS.iter().zip(1..);
    let servers: String = servers
        .map(|(endpoint, number)| format!("  server pod{number} {endpoint}:{ENDPOINT_PORT}\n"))
        .collect();
    format!(
        "global\n  maxconn 4096\ndefaults\n  mode tcp\n  timeout connect 5s\n  timeout client 60s\n  timeout server 60s\n\
         listen service\n  bind {address}:{SERVICE_PORT}\n  balance random\n{servers}"
    )
}

const NFTABLES_BASE: &str = r#"add table ip kube-proxy { comment "rules for kube-proxy" ; }
add set ip kube-proxy cluster-ips { type ipv4_addr ; }
add set ip kube-proxy nodeport-ips { type ipv4_addr ; }
add map ip kube-proxy firewall-ips { type ipv4_addr . inet_proto . inet_service : verdict ; }
add map ip kube-proxy no-endpoint-nodeports { type inet_proto . inet_service : verdict ; }
add map ip kube-proxy no-endpoint-services { type ipv4_addr . inet_proto . inet_service : verdict ; }
add map ip kube-proxy service-ips { type ipv4_addr . inet_proto . inet_service : verdict ; }
add map ip kube-proxy service-nodeports { type inet_proto . inet_service : verdict ; }
add chain ip kube-proxy cluster-ips-check
add chain ip kube-proxy filter-prerouting-pre-dnat { type filter hook prerouting priority -110 ; }
add chain ip kube-proxy filter-output-pre-dnat { type filter hook output priority -110 ; }
add chain ip kube-proxy filter-forward { type filter hook forward priority 0 ; }
add chain ip kube-proxy filter-input { type filter hook input priority 0 ; }
add chain ip kube-proxy filter-output { type filter hook output priority 0 ; }
add chain ip kube-proxy firewall-check
add chain ip kube-proxy mark-for-masquerade
add chain ip kube-proxy masquerading
add chain ip kube-proxy nat-output { type nat hook output priority -100 ; }
add chain ip kube-proxy nat-postrouting { type nat hook postrouting priority 100 ; }
add chain ip kube-proxy nat-prerouting { type nat hook prerouting priority -100 ; }
add chain ip kube-proxy nodeport-endpoints-check
add chain ip kube-proxy services
add chain ip kube-proxy service-endpoints-check
add rule ip kube-proxy cluster-ips-check ip daddr @cluster-ips reject
add rule ip kube-proxy cluster-ips-check ip daddr { 10.96.0.0/12 } drop
add rule ip kube-proxy filter-prerouting-pre-dnat ct state new jump firewall-check
add rule ip kube-proxy filter-forward ct state new jump service-endpoints-check
add rule ip kube-proxy filter-forward ct state new jump cluster-ips-check
add rule ip kube-proxy filter-input ct state new jump nodeport-endpoints-check
add rule ip kube-proxy filter-input ct state new jump service-endpoints-check
add rule ip kube-proxy filter-output ct state new jump service-endpoints-check
add rule ip kube-proxy filter-output-pre-dnat ct state new jump firewall-check
add rule ip kube-proxy filter-output ct state new jump cluster-ips-check
add rule ip kube-proxy firewall-check ip daddr . meta l4proto . th dport vmap @firewall-ips
add rule ip kube-proxy mark-for-masquerade mark set mark or 0x4000
add rule ip kube-proxy masquerading mark and 0x4000 == 0 return
add rule ip kube-proxy masquerading mark set mark xor 0x4000
add rule ip kube-proxy masquerading masquerade fully-random
add rule ip kube-proxy nat-output jump services
add rule ip kube-proxy nat-postrouting jump masquerading
add rule ip kube-proxy nat-prerouting jump services
add rule ip kube-proxy nodeport-endpoints-check ip daddr @nodeport-ips meta l4proto . th dport vmap @no-endpoint-nodeports
add rule ip kube-proxy services ip daddr . meta l4proto . th dport vmap @service-ips
add rule ip kube-proxy services ip daddr @nodeport-ips meta l4proto . th dport vmap @service-nodeports
add rule ip kube-proxy service-endpoints-check ip daddr . meta l4proto . th dport vmap @no-endpoint-services
add element ip kube-proxy nodeport-ips { 10.244.0.1 }
"#;

const IPTABLES_FILTER: &str = r#"*filter
:KUBE-NODEPORTS - [0:0]
:KUBE-SERVICES - [0:0]
:KUBE-EXTERNAL-SERVICES - [0:0]
:KUBE-FIREWALL - [0:0]
:KUBE-FORWARD - [0:0]
:KUBE-PROXY-FIREWALL - [0:0]
-A INPUT -m conntrack --ctstate NEW -j KUBE-PROXY-FIREWALL
-A INPUT -m comment --comment "kubernetes health check service ports" -j KUBE-NODEPORTS
-A INPUT -m conntrack --ctstate NEW -j KUBE-EXTERNAL-SERVICES
-A INPUT -j KUBE-FIREWALL
-A FORWARD -m conntrack --ctstate NEW -j KUBE-PROXY-FIREWALL
-A FORWARD -m comment --comment "kubernetes forwarding rules" -j KUBE-FORWARD
-A FORWARD -m conntrack --ctstate NEW -j KUBE-SERVICES
-A FORWARD -m conntrack --ctstate NEW -j KUBE-EXTERNAL-SERVICES
-A OUTPUT -m conntrack --ctstate NEW -j KUBE-PROXY-FIREWALL
-A OUTPUT -m conntrack --ctstate NEW -j KUBE-SERVICES
-A OUTPUT -j KUBE-FIREWALL
-A KUBE-FIREWALL -m comment --comment "block incoming localnet connections" -d 127.0.0.0/8 ! -s 127.0.0.0/8 -m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT -j DROP
-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP
-A KUBE-FORWARD -m comment --comment "kubernetes forwarding rules" -m mark --mark 0x4000/0x4000 -j ACCEPT
-A KUBE-FORWARD -m comment --comment "kubernetes forwarding conntrack rule" -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
COMMIT
"#;

const IPTABLES_NAT_CHAINS: &str = "*nat
:KUBE-NODEPORTS - [0:0]
:KUBE-SERVICES - [0:0]
:KUBE-MARK-MASQ - [0:0]
:KUBE-POSTROUTING - [0:0]
";

const IPTABLES_NAT: &str = r#"-A PREROUTING -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A OUTPUT -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A POSTROUTING -m comment --comment "kubernetes postrouting rules" -j KUBE-POSTROUTING
-A KUBE-MARK-MASQ -j MARK --or-mark 0x4000
-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN
-A KUBE-POSTROUTING -j MARK --xor-mark 0x4000
-A KUBE-POSTROUTING -m comment --comment "kubernetes service traffic requiring SNAT" -j MASQUERADE --random-fully
"#;

const IPTABLES_NODE_PORTS: &str = r#"-A KUBE-SERVICES -m comment --comment "kubernetes service nodeports; NOTE: this must be the last rule in this chain" -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS
"#;

#[cfg(test)]
mod tests {
    use super::*;

    const THREE: Cluster = Cluster { services: 3 };

    #[test]
    fn the_service_in_the_middle_leads_to_the_server() {
        assert_eq!(THREE.asked(), Ipv4Addr::new(10, 96, 0, 1));
        assert_eq!(Cluster { services: 1 }.asked(), FIRST_SERVICE);
        let table = THREE.table();
        let lines: Vec<_> = table.lines().collect();
        let to_server = "10.244.2.1:8080 10.244.2.2:8080 10.244.2.3:8080 10.244.2.4:8080";
        assert_eq!(lines.len(), 4);
        assert!(lines[0].starts_with("tcp 10.96.0.0:80 10.128.0.0:8080 "));
        assert_eq!(lines[1], format!("tcp 10.96.0.1:80 {to_server}"));
        assert_eq!(lines[2], format!("udp 10.96.0.1:80 {to_server}"));
        assert!(lines[3].starts_with("tcp 10.96.0.2:80 10.128.0.8:8080 "));
    }

    #[test]
    fn every_frontend_has_a_verdict_in_the_map_and_shares_by_chance() {
        let script = THREE.nftables();
        assert_eq!(
            script
                .matches("add element ip kube-proxy service-ips")
                .count(),
            4
        );
        assert_eq!(script.matches("numgen random mod 4 vmap").count(), 4);
        assert_eq!(script.matches(" dnat to ").count(), 16);
        assert!(script.contains("udp dnat to 10.244.2.4:8080"));
    }

    #[test]
    fn every_frontend_has_a_rule_in_the_linear_chain_and_shares_by_chance() {
        let script = THREE.iptables();
        assert_eq!(script.matches("-A KUBE-SERVICES ").count(), 5);
        assert_eq!(script.matches("--probability 0.2500000000").count(), 4);
        assert_eq!(script.matches("--probability 0.5000000000").count(), 4);
        assert_eq!(script.matches("--to-destination").count(), 16);
        // The kernel takes 28 letters (xtables, XT_EXTENSION_MAXNAMELEN).
        let chains = script.lines().filter_map(|line| line.strip_prefix(':'));
        for chain in chains.filter_map(|line| line.split(' ').next()) {
            assert!(chain.len() <= 28, "{chain}");
        }
    }
}
