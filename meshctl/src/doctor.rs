//! What is wrong, and what to do about it: a list of judgements over what the agent, the kernel and the disk say. Pure; what
//! reads the machine is in [`facts`].

use std::{collections::BTreeMap, net::IpAddr};

use ipnet::IpNet;
use mesh_api::admin::{FactsResponse, PeerTrouble};
use serde::Serialize;

use crate::{
    Verdict,
    preflight::{Check, Level},
    report::{Endpoint, Service, Services, Status},
    show::Report,
    table::{Cell, Tone, columns, duration, printable},
};

pub(crate) mod facts;

/// Below this the next snapshot, a renewed certificate, or the log may not fit: two slots of a mesh of some thousand nodes.
const DISK_SHORT_BYTES: u64 = 16 << 20;

/// Less than two pages: nothing can be written.
const DISK_FULL_BYTES: u64 = 64 << 10;

/// A certificate that has less left was not renewed when it should have been: renewal is tried from two thirds of its life on.
const CERTIFICATE_SHORT_S: i64 = 86_400;

/// Endpoints and nodes that are named one by one; of others only the number is said.
const NAMED_MAX: usize = 3;

/// Port of DNS.
const DNS_PORT: u16 = 53;

/// What is judged.
#[derive(Debug)]
pub(crate) struct Facts {
    /// What the agent says, or why it does not.
    pub(crate) agent: Result<Agent, String>,
    /// Whether this machine can have an agent, as `install --check` says.
    pub(crate) machine: Vec<Check>,
    /// How the kernel forwards and filters.
    pub(crate) kernel: Kernel,
    /// By this machine's clock.
    pub(crate) now_unix_s: i64,
}

/// What the agent says.
#[derive(Debug)]
pub(crate) struct Agent {
    pub(crate) status: Status,
    pub(crate) services: Services,
    pub(crate) facts: FactsResponse,
}

/// What `/proc` says of routing.
#[derive(Debug, Clone, Default)]
pub(crate) struct Kernel {
    /// Interfaces whose `rp_filter` is strict (1), their own or by `all`.
    pub(crate) strict: Vec<String>,
    /// Packets dropped because the way back to their source leads by another interface, since the machine started.
    pub(crate) reverse_path_drops: u64,
    /// Routes of the main table: where to, by which interface.
    pub(crate) routes: Vec<(IpNet, String)>,
}

/// One thing that is wrong.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Finding {
    /// For machines; docs/troubleshooting.md has a section for each.
    pub(crate) fault: &'static str,
    pub(crate) level: Level,
    /// One sentence.
    pub(crate) cause: String,
    /// What to do.
    pub(crate) fix: String,
}

/// `doctor`.
#[derive(Debug, Serialize)]
pub(crate) struct Doctor {
    /// `ok`, `warning` or `error`: the worst.
    pub(crate) level: Level,
    /// The worst first; of equal ones, causes before what they lead to.
    pub(crate) findings: Vec<Finding>,
}

/// Every judgement, causes before what they lead to: of findings that are equally bad the first says most.
type Judgement = fn(&Agent, &Facts) -> Vec<Finding>;

const JUDGEMENTS: [Judgement; 16] = [
    disk,
    clock,
    certificate,
    kernel_features,
    duplicates,
    dns_loop,
    route_gone,
    asymmetric_route,
    udp_blocked,
    relays,
    mtu_hole,
    policy,
    endpoints,
    unreachable,
    controller,
    others,
];

impl Doctor {
    /// Judges everything.
    pub(crate) fn new(facts: &Facts) -> Self {
        let mut findings = match &facts.agent {
            Ok(agent) => {
                let all = JUDGEMENTS.iter().flat_map(|judge| judge(agent, facts));
                all.collect()
            }
            Err(why) => no_agent(why, &facts.machine),
        };
        findings.sort_by_key(|one| std::cmp::Reverse(one.level));
        Self {
            level: findings.first().map_or(Level::Ok, |one| one.level),
            findings,
        }
    }
}

fn finding(fault: &'static str, level: Level, cause: String, fix: &str) -> Finding {
    let fix = fix.to_owned();
    Finding {
        fault,
        level,
        cause,
        fix,
    }
}

/// What keeps it from running comes first, if that can be seen.
fn no_agent(why: &str, machine: &[Check]) -> Vec<Finding> {
    let mut findings = missing_features(machine, Level::Error);
    findings.push(finding(
        "agent_down",
        Level::Error,
        why.to_owned(),
        "`systemctl status mesh-agent` and `journalctl -u mesh-agent -n 50` say why it does not run; its last line names the cause",
    ));
    findings
}

fn disk(agent: &Agent, _: &Facts) -> Vec<Finding> {
    let folder = &agent.facts.state_dir;
    let Some(free) = agent.facts.state_free_bytes else {
        return Vec::new();
    };
    let fix = "free space there: `df -h` and `du -x --max-depth=2 / | sort -n | tail` say what takes it. Until then the node goes on with what it has, and a restart begins with an older state of the mesh";
    if free < DISK_FULL_BYTES {
        let cause = format!(
            "the disk of {folder} is full: the state of the mesh, and renewed certificates, are not kept"
        );
        vec![finding("full_disk", Level::Error, cause, fix)]
    } else if free < DISK_SHORT_BYTES {
        let cause = format!(
            "the disk of {folder} is nearly full: {} MiB are free",
            free >> 20
        );
        vec![finding("full_disk", Level::Warning, cause, fix)]
    } else {
        Vec::new()
    }
}

fn clock(agent: &Agent, facts: &Facts) -> Vec<Finding> {
    let fix = "set it: `timedatectl set-ntp true`, or `date -s`; `timedatectl` says whether it is synchronised";
    let of = |cause: String| vec![finding("clock_skew", Level::Error, cause, fix)];
    let says = agent
        .status
        .problems
        .iter()
        .find(|text| text.starts_with("the clock is"));
    if let Some(text) = says {
        let cause = text.trim_end_matches(": set it");
        return of(cause.to_owned());
    }
    let implausible = facts
        .machine
        .iter()
        .find(|one| one.name == "clock" && one.level != Level::Ok);
    if let Some(check) = implausible {
        return of(format!("this machine's clock is {}", check.text));
    }
    let refused = agent
        .facts
        .troubles
        .iter()
        .find(|peer| peer.reason == "clock_skew");
    refused.map_or_else(Vec::new, |peer| {
        of(format!("the clock of this node or of {} is wrong: handshakes are refused as older than one before", peer.node))
    })
}

fn certificate(agent: &Agent, facts: &Facts) -> Vec<Finding> {
    let Some(expires) = agent.status.certificate_expires_unix_s else {
        return Vec::new();
    };
    let left = expires.saturating_sub(facts.now_unix_s);
    let fix = "if the clock is right: bring the controller back in reach, and the agent renews its certificate by itself; after its end it joins again with a fresh token (`meshctl token create --node NAME`, `token` in agent.toml, restart)";
    if let Ok(ago) = u64::try_from(left.saturating_neg())
        && left <= 0
    {
        let cause = format!(
            "this node's certificate ended {} ago, by this machine's clock: no controller and no relay lets it in",
            duration(ago)
        );
        return vec![finding("expired_certificate", Level::Error, cause, fix)];
    }
    if left < CERTIFICATE_SHORT_S {
        let left = duration(u64::try_from(left).unwrap_or_default());
        let cause = format!("this node's certificate ends in {left}, and was not renewed");
        return vec![finding("expired_certificate", Level::Warning, cause, fix)];
    }
    Vec::new()
}

/// Those of `install --check` without which the agent, or a part of it, does not work.
fn missing_features(machine: &[Check], least: Level) -> Vec<Finding> {
    const FEATURES: [&str; 7] = [
        "kernel",
        "machine",
        "BTF",
        "cgroup2",
        "BPF file system",
        "TUN",
        "lockdown",
    ];
    let found = machine
        .iter()
        .filter(|one| FEATURES.contains(&one.name.as_str()) && one.level >= least);
    let said = found.map(|one| {
        let cause = format!(
            "the kernel lacks what Holdfast needs: {}: {}",
            one.name, one.text
        );
        finding(
            "kernel_feature",
            one.level,
            cause,
            "`meshctl install --check` lists everything that is looked at",
        )
    });
    said.collect()
}

fn kernel_features(agent: &Agent, facts: &Facts) -> Vec<Finding> {
    // It runs: what is only a part's is a warning.
    let mut findings = missing_features(&facts.machine, Level::Warning);
    for one in &mut findings {
        one.level = Level::Warning;
    }
    if let Some(why) = &agent.status.services_unkept
        && !findings
            .iter()
            .any(|one| one.cause.contains("BPF file system"))
    {
        let cause = format!(
            "the kernel lacks what Holdfast needs: {why}: services end with the agent, at each restart"
        );
        let fix = "`mount -t bpf bpf /sys/fs/bpf` (in a container: mount the host's), then restart the agent";
        findings.push(finding("kernel_feature", Level::Warning, cause, fix));
    }
    let attached = agent.status.service_interfaces.iter();
    for (name, _) in attached.filter(|(_, attached)| !**attached) {
        let cause = format!("the packets of devices at interface {name} are not looked at");
        let fix = "`meshctl status` says why; programs at interfaces need Linux 6.6 (tcx)";
        findings.push(finding("kernel_feature", Level::Warning, cause, fix));
    }
    findings
}

fn duplicates(agent: &Agent, _: &Facts) -> Vec<Finding> {
    let found = agent.facts.duplicates.iter().map(|one| {
        let cause = format!(
            "address {} of this machine is node {}'s overlay address: what is for it stays here",
            one.address, one.node
        );
        let fix = format!("`ip addr | grep {}` says at which interface it is; take it away there (`ip addr del`), or give the MeshConfig another spec.overlayIPv4CIDR", one.address);
        finding("duplicate_address", Level::Error, cause, &fix)
    });
    found.collect()
}

fn dns_loop(agent: &Agent, _: &Facts) -> Vec<Finding> {
    let own: Vec<IpAddr> = {
        let overlay = agent.status.overlay_addresses.iter();
        overlay.filter_map(|text| text.parse().ok()).collect()
    };
    let found = agent.facts.dns_upstreams.iter().filter(|upstream| {
        let parsed = upstream.parse::<std::net::SocketAddr>().ok();
        let is_own = parsed.is_some_and(|at| at.port() == DNS_PORT && own.contains(&at.ip()));
        is_own || agent.status.dns_listen.contains(upstream)
    });
    let said = found.map(|upstream| {
        let cause = format!("DNS leads in a circle: the upstream {upstream} (`dns.upstreams`) is this node itself, so no name outside the mesh is found");
        let fix = "put the resolvers of this network there, as DHCP or `resolvectl status` names them, and restart the agent";
        finding("dns_loop", Level::Error, cause, fix)
    });
    said.collect()
}

/// Who manages the machine's network may take away routes that are not its own.
fn route_gone(agent: &Agent, facts: &Facts) -> Vec<Finding> {
    let interface = &agent.status.interface;
    let routes = &facts.kernel.routes;
    let overlay = agent.facts.overlay_v4.parse::<IpNet>();
    // Without any route nothing is known: of another node, or as `/proc` cannot be read.
    let Some(overlay) = overlay.ok().filter(|_| !routes.is_empty()) else {
        return Vec::new();
    };
    let own = |(net, by): &(IpNet, String)| by == interface && net.contains(&overlay);
    if routes.iter().any(own) {
        return Vec::new();
    }
    let cause = format!(
        "the route of the overlay is gone: {overlay} does not lead by {interface}, so nothing from this machine reaches its nodes"
    );
    let fix = "the agent puts it back within seconds: look again. Where it stays away, `ip monitor route` shows who takes it each time; systemd-networkd does at its starts, unless its networkd.conf says ManageForeignRoutes=no";
    vec![finding("route_gone", Level::Error, cause, fix)]
}

/// A more specific route of somebody else's into the overlay is the usual one.
fn asymmetric_route(agent: &Agent, facts: &Facts) -> Vec<Finding> {
    let Kernel {
        strict,
        reverse_path_drops,
        routes,
    } = &facts.kernel;
    let overlay = agent.facts.overlay_v4.parse::<IpNet>().ok();
    let foreign = routes.iter().find(|(net, interface)| {
        let inside = overlay.is_some_and(|overlay| overlay.contains(net) || net.contains(&overlay));
        inside && net.prefix_len() > 0 && *interface != agent.status.interface
    });
    let drops = match reverse_path_drops {
        0 => String::new(),
        count => format!("; rp_filter dropped {count} packets"),
    };
    match foreign {
        Some((net, interface)) => {
            let cause = format!(
                "asymmetric route: {net} of the overlay leads by {interface}, not by {}: its nodes are heard and not answered{drops}",
                agent.status.interface
            );
            let fix = format!(
                "`ip route del {net} dev {interface}`, and take it from what sets it (another VPN, a static route)"
            );
            vec![finding("asymmetric_route", Level::Error, cause, &fix)]
        }
        None if *reverse_path_drops > 0 && !strict.is_empty() => {
            let cause = format!(
                "asymmetric route: the kernel dropped {reverse_path_drops} packets since it started, as the way back to their source leads by another interface (rp_filter = 1 at {})",
                strict.join(", ")
            );
            let fix = "`ip route get ADDRESS` says where answers go; mend that route, or loosen the filter: `sysctl -w net.ipv4.conf.INTERFACE.rp_filter=2`";
            vec![finding("asymmetric_route", Level::Warning, cause, fix)]
        }
        None => Vec::new(),
    }
}

fn udp_blocked(agent: &Agent, _: &Facts) -> Vec<Finding> {
    if agent.status.nat != "udp_blocked" {
        return Vec::new();
    }
    let by_tls = agent
        .status
        .relays
        .iter()
        .any(|one| one.transport.as_deref() == Some("tls"));
    let (level, then) = match by_tls {
        true => (Level::Warning, "all traffic goes through a relay, over TCP"),
        false => (Level::Error, "and no relay is reached by TCP 443 either"),
    };
    let cause = format!("UDP is blocked: nothing comes back from any relay by it; {then}");
    let fix = "let UDP out to any port, and answers in; at least to the relays' ports 443 and 3478. `meshctl netcheck` shows what passes";
    vec![finding("udp_blocked", level, cause, fix)]
}

/// What the relay says when it lets nobody more in.
const FULL: [&str; 3] = [
    "the relay is full",
    "too many handshakes",
    "too many connections",
];

fn relays(agent: &Agent, _: &Facts) -> Vec<Finding> {
    let status = &agent.status;
    let none_up = status.relays.iter().all(|relay| relay.transport.is_none());
    let level = if none_up {
        Level::Error
    } else {
        Level::Warning
    };
    let problems = status
        .relays
        .iter()
        .filter_map(|relay| Some((relay, relay.problem.as_ref()?)));
    let said = problems.map(|(relay, problem)| {
        if FULL.iter().any(|full| problem.contains(full)) {
            let cause = format!("relay {} is overloaded: {problem}", relay.name);
            let fix = "raise `clients_max` (`clients_per_network_max`) in its relay.toml if the machine can carry more, or add a relay (a MeshRelay, `meshctl relay issue`)";
            return finding("relay_overloaded", level, cause, fix);
        }
        let cause = format!("relay {} is not reached: {problem}", relay.name);
        let fix = "is it running (`systemctl status mesh-relay` there), are its addresses in the MeshRelay right, do UDP and TCP 443 get there? `meshctl netcheck`";
        finding("relay_down", level, cause, fix)
    });
    said.collect()
}

fn mtu_hole(agent: &Agent, _: &Facts) -> Vec<Finding> {
    let holes = agent
        .facts
        .troubles
        .iter()
        .filter(|peer| !peer.small_only.is_empty());
    let said = holes.map(|peer| {
        let cause = format!(
            "MTU hole: only small packets pass to {} by {}, and nobody says so; a relay carries the traffic",
            peer.node,
            peer.small_only.join(", ")
        );
        let fix = format!(
            "let ICMP \"fragmentation needed\" and ICMPv6 \"packet too big\" through the firewalls between, or give that line an MTU of at least {} bytes (PPPoE, VPN), or lower spec.mtu of the MeshConfig",
            agent.facts.mtu_bytes + 80
        );
        finding("mtu_hole", Level::Warning, cause, &fix)
    });
    said.take(NAMED_MAX).collect()
}

fn policy(agent: &Agent, _: &Facts) -> Vec<Finding> {
    let denied = agent
        .status
        .policy_packets
        .get("denied")
        .copied()
        .unwrap_or_default();
    let mut events = agent.status.policy_events.iter().rev();
    let Some(last) = events
        .find(|event| event.starts_with("denied"))
        .filter(|_| denied > 0)
    else {
        return Vec::new();
    };
    let cause = format!("policy: {last} (the last of {denied} packets)");
    let fix = "if that flow should pass, change that policy, or allow it in another; `meshctl trace DESTINATION:PORT` says who decides at both ends. If it should not, all is well";
    vec![finding("policy_denies", Level::Warning, cause, fix)]
}

/// How many of so many are not named one by one; `None`: all are.
fn unnamed(found: usize) -> Option<usize> {
    found.checked_sub(NAMED_MAX).filter(|more| *more > 0)
}

fn endpoints(agent: &Agent, _: &Facts) -> Vec<Finding> {
    let mut findings = Vec::new();
    let dead = |one: &&Endpoint| one.ready && (one.ejected || !one.alive);
    let services = &agent.services.services;
    let with_dead: Vec<(&Service, Vec<&Endpoint>)> = services
        .iter()
        .map(|service| {
            (
                service,
                service.endpoints.iter().filter(dead).collect::<Vec<_>>(),
            )
        })
        .filter(|(_, dead)| !dead.is_empty())
        .collect();
    for (service, dead) in with_dead.iter().take(NAMED_MAX) {
        let name = format!("{}/{}", service.namespace, service.name);
        let named = dead.iter().take(NAMED_MAX).map(|one| {
            let node = one.node.as_deref().unwrap_or("outside the mesh");
            let why = match one.ejected {
                true => "TCP connects to it fail",
                false => "no path to its node is alive",
            };
            format!("{} on {node} ({why})", one.address)
        });
        let named: Vec<_> = named.collect();
        let others = service
            .endpoints
            .iter()
            .any(|one| one.ready && !one.ejected && one.alive);
        let (level, then) = match others {
            true => (Level::Warning, "others take its flows"),
            false => (Level::Error, "and it has no other"),
        };
        let cause = format!(
            "dead endpoint: service {name} has {} called ready, {then}",
            named.join(", ")
        );
        let fix = "start what should listen there, or let its readiness probe say that it is not ready; `ss -ltn` on that node shows what listens. If its node is unreachable, see that first";
        findings.push(finding("dead_endpoint", level, cause, fix));
    }
    let more = unnamed(with_dead.len()).map(|more| {
        let cause = format!("dead endpoint: {more} services more have some");
        let fix = "`meshctl services --endpoints`";
        finding("dead_endpoint", Level::Warning, cause, fix)
    });
    findings.extend(more);
    findings
}

fn unreachable(agent: &Agent, _: &Facts) -> Vec<Finding> {
    let gone = agent
        .facts
        .troubles
        .iter()
        .filter(|peer| peer.state == "unreachable" && peer.reason != "clock_skew");
    let gone: Vec<&PeerTrouble> = gone.collect();
    let mut findings: Vec<_> = gone
        .iter()
        .take(NAMED_MAX)
        .map(|peer| {
            let cause = format!("node {} is unreachable ({}): {}", peer.node, peer.reason, peer.explanation);
            let fix = format!("`meshctl path why {0}` has every path that was tried; is {0} on, and what does `meshctl doctor` say there?", peer.node);
            finding("unreachable", Level::Error, cause, &fix)
        })
        .collect();
    let more = unnamed(gone.len()).map(|more| {
        let cause = format!("{more} nodes more are unreachable");
        finding("unreachable", Level::Error, cause, "`meshctl peers`")
    });
    findings.extend(more);
    findings
}

fn controller(agent: &Agent, _: &Facts) -> Vec<Finding> {
    let said = agent
        .status
        .problems
        .iter()
        .find(|text| text.starts_with("no connection to the controller"));
    said.map_or_else(Vec::new, |text| {
        let fix = "the node goes on with the state that it has. Is the controller running, and does TCP to its port get there? `systemctl status mesh-controller` there";
        vec![finding("controller_unreachable", Level::Warning, text.clone(), fix)]
    })
}

/// What the agent calls a problem and nothing above judged: no problem is kept back.
fn others(agent: &Agent, _: &Facts) -> Vec<Finding> {
    const JUDGED: [&str; 5] = [
        "the clock is",
        "no connection to the controller",
        "relay ",
        "node ",
        "no relay is up",
    ];
    let problems = agent.status.problems.iter();
    let rest = problems.filter(|text| !JUDGED.iter().any(|judged| text.starts_with(judged)));
    let said = rest.map(|text| {
        finding(
            "problem",
            Level::Warning,
            text.clone(),
            "`meshctl status` and the agent's log have the rest",
        )
    });
    said.collect()
}

impl Report for Doctor {
    fn text(&self, colours: bool) -> String {
        if self.findings.is_empty() {
            return "nothing is wrong that can be seen from this node\n".to_owned();
        }
        let paragraphs = self.findings.iter().map(|one| {
            let (word, tone) = match one.level {
                Level::Ok => ("ok:", Tone::Good),
                Level::Warning => ("warning:", Tone::Warning),
                Level::Error => ("error:", Tone::Bad),
            };
            let head = columns(&[vec![Cell::new(word, tone)]], colours);
            format!(
                "{} {}\n  fix: {}\n",
                head.trim_end(),
                printable(&one.cause),
                printable(&one.fix)
            )
        });
        paragraphs.collect()
    }

    fn verdict(&self) -> Verdict {
        match self.level {
            Level::Ok => Verdict::Ok,
            Level::Warning => Verdict::Degraded,
            Level::Error => Verdict::Down,
        }
    }
}

/// Faults by name, with how many there are: for a bug report's first page.
pub(crate) fn counted(doctor: &Doctor) -> BTreeMap<&'static str, usize> {
    let mut counts = BTreeMap::new();
    for one in &doctor.findings {
        *counts.entry(one.fault).or_default() += 1;
    }
    counts
}

#[cfg(test)]
mod tests;
