//! Interfaces whose devices use services through this node: followed by name as they come and go,
//! and looked at by the service programs.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    net::IpAddr,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use anyhow::Context as _;
use ebpf_loader::{InterfaceError, Services};
use ipnet::IpNet;
use mesh_core::pattern::NamePattern;
use mesh_daemon::chain;
use mesh_linux::{
    IfIndex,
    netlink::{Changes, Forwarding, LinkHeader, Netlink, NetlinkError},
};
use tokio::{
    sync::watch,
    task,
    time::{self, Instant},
};
use tokio_util::sync::CancellationToken;

use crate::{
    cni::Attachments,
    policy::Enforcer,
    redirect::{self, Found},
};

/// How often an interface with a problem is looked at again: forwarding is switched on without a
/// word by netlink.
const RETRY: Duration = Duration::from_secs(5);

/// Pause after a change of the network before the interfaces are looked up: changes come in bursts.
const SETTLE: Duration = Duration::from_millis(20);

/// In problems of no single interface.
const ALL_PODS: &str = "pod_interfaces";

/// How it stands with an interface.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Served {
    /// Its packets are looked at.
    pub attached: bool,
    /// Why they are not, or why its devices reach nothing all the same.
    pub problem: Option<String>,
}

/// By name.
pub type AllServed = BTreeMap<String, Served>;

/// On which interfaces programs are wanted.
#[derive(Debug, Default)]
pub struct Wanted {
    /// Whose devices use services through this node.
    pub names: BTreeSet<String>,
    /// Pods': where policy is enforced, and between which, and the tunnel, packets go past the host's stack. None:
    /// nothing does.
    pub pods: BTreeSet<NamePattern>,
    /// Further ones of pods, as the CNI plug-in records them.
    pub attachments: Option<Attachments>,
}

impl Wanted {
    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.names.is_empty() && !self.has_pods()
    }

    /// Whether pods are followed at all.
    #[must_use]
    pub fn has_pods(&self) -> bool {
        !self.pods.is_empty() || self.attachments.is_some()
    }

    /// Which interfaces are pods' now, and why some may be missing.
    #[must_use]
    pub fn pods_now(&self) -> (BTreeSet<NamePattern>, Option<String>) {
        let Some(attachments) = &self.attachments else {
            return (self.pods.clone(), None);
        };
        let (mut pods, problem) = attachments.interfaces();
        pods.extend(self.pods.iter().cloned());
        (pods, problem)
    }

    async fn changed(&mut self) {
        match &mut self.attachments {
            Some(attachments) => attachments.changed().await,
            None => std::future::pending().await,
        }
    }
}

/// What is told of interfaces, by whoever holds it at the time.
#[derive(Debug, Clone)]
pub struct Programs {
    /// Services, and redirection.
    pub services: Arc<Mutex<Services>>,
    /// Policy.
    pub enforcer: Arc<Mutex<Enforcer>>,
}

/// Keeps the programs on the interfaces of these names, whatever index they have, and on the tunnel's,
/// until `stop`. They leave with the last reference to `programs`.
///
/// # Errors
///
/// If the kernel tells no changes any more; what it refuses is told, and tried again.
pub async fn keep_interfaces(
    programs: Programs,
    (tunnel, tunnel_name): (IfIndex, String),
    mut wanted: Wanted,
    netlink: Netlink,
    mut changes: Changes,
    told: watch::Sender<AllServed>,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    let mut attached = BTreeSet::new();
    let mut complaints = Complaints::default();
    loop {
        let mut found = BTreeMap::new();
        for name in &wanted.names {
            found.insert(name.clone(), find(&netlink, name).await);
        }
        let here = found.values().flatten();
        let here: BTreeMap<_, _> = here.map(|found| (found.index, found.header)).collect();
        let results = attach(&programs.services, tunnel, attached, here).await?;
        let all = results.iter().filter(|(_, result)| result.is_ok());
        attached = all.map(|(&index, _)| index).collect();
        let ethernet = |found: &&Interface| found.header == ebpf_loader::LinkHeader::Ethernet;
        let devices = found.values().flatten().filter(ethernet);
        let devices = devices.map(|found| found.index);
        let devices = devices.filter(|index| attached.contains(index)).collect();
        let served = found.into_iter().map(|(name, found)| {
            let served = report(&name, found, &results, forwards);
            (name, served)
        });
        let mut served: AllServed = served.collect();
        if let Some(Err(error)) = results.get(&tunnel) {
            let refused = Served {
                attached: false,
                problem: Some(chain(error)),
            };
            served.insert(tunnel_name.clone(), refused);
        }
        if wanted.has_pods() {
            let (pods, problem) = wanted.pods_now();
            let places = (&pods, &devices, tunnel);
            let problems = keep_pods(&programs, &netlink, places).await?;
            for (name, problem) in problems {
                let one = &mut served.entry(name).or_default().problem;
                *one = Some(match one.take() {
                    Some(before) => format!("{before}; {problem}"),
                    None => problem,
                });
            }
            if let Some(problem) = problem {
                served.entry(ALL_PODS.to_owned()).or_default().problem = Some(problem);
            }
        }
        for (interface, problem) in complaints.due(&served, Instant::now()) {
            tracing::warn!(%interface, %problem, "devices are not served");
        }
        told.send_if_modified(|before| {
            let changed = *before != served;
            before.clone_from(&served);
            changed
        });
        let retry = Instant::now() + RETRY;
        loop {
            tokio::select! {
                () = stop.cancelled() => return Ok(()),
                change = changes.next() => {
                    let change = change.context("cannot hear of changes of the network")?;
                    let routes = change.routes || change.own_routes;
                    if change.links || change.addresses || (routes && wanted.has_pods()) {
                        time::sleep(SETTLE).await;
                        break;
                    }
                }
                () = wanted.changed() => break,
                () = time::sleep_until(retry), if has_problem(&served) => break,
            }
        }
    }
}

/// An interface as it is now.
#[derive(Debug, Clone)]
struct Interface {
    index: IfIndex,
    header: ebpf_loader::LinkHeader,
    addresses: BTreeSet<IpNet>,
}

/// Or why it cannot be served. Also between two questions an interface may go.
async fn find(netlink: &Netlink, name: &str) -> Result<Interface, String> {
    let said = |error: NetlinkError| chain(&error);
    let index = netlink.link_index(name).await.map_err(said)?;
    let state = netlink.link_state(index).await.map_err(said)?;
    let header = match state.ok_or("it is gone")?.header {
        LinkHeader::Ethernet => ebpf_loader::LinkHeader::Ethernet,
        LinkHeader::Ip => ebpf_loader::LinkHeader::Ip,
        LinkHeader::Other(kind) => {
            return Err(format!(
                "its packets begin neither with Ethernet's header nor with IP's (ARPHRD {kind})"
            ));
        }
    };
    let addresses = netlink.addresses(index).await.map_err(said)?;
    Ok(Interface {
        index,
        header,
        addresses,
    })
}

/// What the kernel said of each interface.
type Attached = BTreeMap<IfIndex, Result<bool, InterfaceError>>;

/// Attaches to all of `here`, and leaves those alone that are not there any more.
async fn attach(
    services: &Arc<Mutex<Services>>,
    tunnel: IfIndex,
    before: BTreeSet<IfIndex>,
    here: BTreeMap<IfIndex, ebpf_loader::LinkHeader>,
) -> anyhow::Result<Attached> {
    let services = Arc::clone(services);
    let results = task::spawn_blocking(move || {
        let mut services = services.lock().unwrap_or_else(PoisonError::into_inner);
        let gone = |index: &&IfIndex| **index != tunnel && !here.contains_key(index);
        for gone in before.iter().filter(gone) {
            services.detach_interface(gone.0);
        }
        let attach = |(index, header): (IfIndex, _)| {
            let attached = services.attach_interface(index.0, header);
            (index, attached)
        };
        let mut results: Attached = here.into_iter().map(attach).collect();
        results.insert(tunnel, services.attach_tunnel(tunnel.0));
        services.detach_others();
        results
    });
    Ok(results.await?)
}

/// Enforces policy at the pods' interfaces that are there already.
///
/// # Errors
///
/// If the kernel does not say which interfaces there are.
pub async fn guard_pods(
    enforcer: &Arc<Mutex<Enforcer>>,
    netlink: &Netlink,
    pods: &BTreeSet<NamePattern>,
    tunnel: IfIndex,
) -> anyhow::Result<()> {
    let none = BTreeSet::new();
    let (_, Found { guarded, .. }) = find_pods(netlink, (pods, &none, tunnel)).await?;
    let enforcer = Arc::clone(enforcer);
    let guarded = task::spawn_blocking(move || {
        let mut enforcer = enforcer.lock().unwrap_or_else(PoisonError::into_inner);
        enforcer.guard(guarded);
    });
    Ok(guarded.await?)
}

/// Names of pods' interfaces, those that have devices behind them, and the tunnel's.
type Places<'a> = (&'a BTreeSet<NamePattern>, &'a BTreeSet<IfIndex>, IfIndex);

async fn find_pods(
    netlink: &Netlink,
    (pods, devices, tunnel): Places<'_>,
) -> anyhow::Result<(Forwarding, Found)> {
    let forwarding = netlink.forwarding().await;
    let forwarding = forwarding.context("read how packets are handed on")?;
    let found = redirect::redirects(&forwarding, pods, devices, Some(tunnel), forwards);
    Ok((forwarding, found))
}

/// Tells the programs which interfaces are pods' and how packets are handed on now: policy before redirection, which
/// goes past what policy does not see. Returns what cannot be, by interface.
async fn keep_pods(
    programs: &Programs,
    netlink: &Netlink,
    places: Places<'_>,
) -> anyhow::Result<Vec<(String, String)>> {
    let (forwarding, found) = find_pods(netlink, places).await?;
    let Found {
        guarded,
        mut redirects,
        problems,
    } = found;
    let Programs { services, enforcer } = programs.clone();
    let told = task::spawn_blocking(move || {
        let mut enforcer = enforcer.lock().unwrap_or_else(PoisonError::into_inner);
        let unguarded = enforcer.guard(guarded);
        drop(enforcer);
        let links = &mut redirects.links;
        links.retain(|index, _| !unguarded.contains_key(&IfIndex(*index)));
        let mut services = services.lock().unwrap_or_else(PoisonError::into_inner);
        (unguarded, services.redirect(&redirects))
    });
    let (mut unguarded, mut report) = told.await?;
    let failed = report.iter().flat_map(|report| report.failed.keys());
    let failed = failed.map(|&index| IfIndex(index));
    let refused: Vec<_> = failed.chain(unguarded.keys().copied()).collect();
    for index in refused {
        // Its pod was taken away meanwhile.
        if matches!(netlink.link_state(index).await, Ok(None)) {
            unguarded.remove(&index);
            if let Ok(report) = &mut report {
                report.failed.remove(&index.0);
            }
        }
    }
    let name = |index: IfIndex| {
        let found = forwarding.links.get(&index);
        found.map_or_else(|| index.to_string(), |link| link.name.clone())
    };
    let not_redirected = |problem| format!("packets are not redirected: {problem}");
    let problems = problems.into_iter();
    let mut said: Vec<(String, String)> = problems
        .map(|(name, problem)| (name, not_redirected(problem)))
        .collect();
    let unguarded = unguarded.into_iter();
    said.extend(unguarded.map(|(index, problem)| {
        let problem = format!("policy does not see its packets: {problem}");
        (name(index), problem)
    }));
    match report {
        Ok(report) => {
            if report.attached > 0 {
                tracing::info!(interfaces = report.attached, "packets are redirected");
            }
            let failed = report.failed.iter();
            said.extend(failed.map(|(&index, error)| {
                let problem = not_redirected(chain(error));
                (name(IfIndex(index)), problem)
            }));
            if report.left_out > 0 {
                let problem = format!("{} have no room, or too many routes", report.left_out);
                said.push((ALL_PODS.to_owned(), not_redirected(problem)));
            }
        }
        Err(error) => said.push((ALL_PODS.to_owned(), not_redirected(chain(&error)))),
    }
    Ok(said)
}

fn report(
    name: &str,
    found: Result<Interface, String>,
    results: &Attached,
    forwards: impl Fn(&str, bool) -> bool,
) -> Served {
    let found = match found {
        Ok(found) => found,
        Err(problem) => {
            return Served {
                attached: false,
                problem: Some(problem),
            };
        }
    };
    match results.get(&found.index) {
        Some(Ok(is_new)) => {
            if *is_new {
                tracing::info!(interface = name, index = %found.index, "devices are served");
            }
            Served {
                attached: true,
                problem: unforwarded(name, &found.addresses, forwards),
            }
        }
        Some(Err(error)) => Served {
            attached: false,
            problem: Some(chain(error)),
        },
        None => Served::default(),
    }
}

/// What keeps the packets of an interface with these addresses from going on.
fn unforwarded(
    name: &str,
    addresses: &BTreeSet<IpNet>,
    forwards: impl Fn(&str, bool) -> bool,
) -> Option<String> {
    let of_family = |v6: bool| {
        addresses.iter().any(|net| match net.addr() {
            IpAddr::V4(_) => !v6,
            IpAddr::V6(address) => v6 && !address.is_unicast_link_local(),
        })
    };
    let switches = [
        (false, format!("net/ipv4/conf/{name}/forwarding=1")),
        (true, "net/ipv6/conf/all/forwarding=1".to_owned()),
    ];
    let missing = switches
        .into_iter()
        .filter(|(v6, _)| of_family(*v6) && !forwards(name, *v6));
    let missing: Vec<_> = missing.map(|(_, switch)| switch).collect();
    (!missing.is_empty()).then(|| {
        let switches = missing.join(" ");
        format!("its packets are not forwarded by the kernel: sysctl -w {switches}")
    })
}

/// Whether packets that come in by the interface may go on, as far as the kernel's switches say.
#[must_use]
pub fn forwards(name: &str, v6: bool) -> bool {
    let on = |switch: &str| {
        let path = Path::new("/proc/sys/net").join(switch);
        fs::read_to_string(path).is_ok_and(|value| value.trim() != "0")
    };
    if v6 {
        // The latter came with Linux 6.17.
        on("ipv6/conf/all/forwarding") || on(&format!("ipv6/conf/{name}/force_forwarding"))
    } else {
        on(&format!("ipv4/conf/{name}/forwarding"))
    }
}

fn has_problem(served: &AllServed) -> bool {
    served.values().any(|one| one.problem.is_some())
}

/// Problems by the interface's name, and what of them was logged.
#[derive(Debug, Default)]
struct Complaints(BTreeMap<String, Complaint>);

#[derive(Debug)]
struct Complaint {
    /// There was none just before.
    since: Instant,
    logged: Option<String>,
}

impl Complaints {
    /// What is worth a line: once each, and not before it was there for [`RETRY`]. A pod's interface that comes or goes
    /// has no other end for a moment.
    fn due<'a>(&mut self, served: &'a AllServed, now: Instant) -> Vec<(&'a str, &'a str)> {
        let with_problem =
            |name: &String| served.get(name).is_some_and(|one| one.problem.is_some());
        self.0.retain(|name, _| with_problem(name));
        let mut due = Vec::new();
        for (name, one) in served {
            let Some(problem) = &one.problem else {
                continue;
            };
            let complaint = self.0.entry(name.clone()).or_insert(Complaint {
                since: now,
                logged: None,
            });
            let lasts = now.saturating_duration_since(complaint.since) >= RETRY;
            if lasts && complaint.logged.as_ref() != Some(problem) {
                complaint.logged = Some(problem.clone());
                due.push((name.as_str(), problem.as_str()));
            }
        }
        due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(index: u32, addresses: &[&str]) -> Interface {
        Interface {
            index: IfIndex::new(index).unwrap(),
            header: ebpf_loader::LinkHeader::Ethernet,
            addresses: addresses.iter().map(|net| net.parse().unwrap()).collect(),
        }
    }

    /// What is said of an attached interface where each family is forwarded or not.
    fn problem(addresses: &[&str], v4: bool, v6: bool) -> Option<String> {
        let found = found(7, addresses);
        let results = BTreeMap::from([(found.index, Ok(false))]);
        let forwards = |_: &str, is_v6: bool| if is_v6 { v6 } else { v4 };
        let served = report("lan0", Ok(found.clone()), &results, forwards);
        assert!(served.attached);
        served.problem
    }

    #[test]
    fn a_problem_is_logged_once_and_not_while_an_interface_comes_or_goes() {
        let served = |problem: Option<&str>| {
            let one = Served {
                attached: true,
                problem: problem.map(str::to_owned),
            };
            AllServed::from([("pod0".to_owned(), one)])
        };
        let begin = Instant::now();
        let mut complaints = Complaints::default();
        for (seconds, problem, logged) in [
            (0, Some("no other end"), None),
            (1, None, None),
            (2, Some("no other end"), None),
            (6, Some("no other end"), None),
            (7, Some("no other end"), Some("no other end")),
            (12, Some("no other end"), None),
            (17, Some("down"), Some("down")),
            (18, None, None),
            (30, Some("down"), None),
            (35, Some("down"), Some("down")),
        ] {
            let served = served(problem);
            let due = complaints.due(&served, begin + Duration::from_secs(seconds));
            let expected: Vec<_> = logged
                .map(|problem| ("pod0", problem))
                .into_iter()
                .collect();
            assert_eq!(due, expected, "after {seconds} s");
        }
        complaints.due(&AllServed::new(), begin);
        assert!(complaints.0.is_empty());
    }

    #[test]
    fn forwarding_is_missed_only_for_families_that_the_interface_has() {
        let both = ["192.168.7.1/24", "fd07::1/64", "fe80::1/64"];
        assert_eq!(problem(&both, true, true), None);
        assert_eq!(
            problem(&["192.168.7.1/24", "fe80::1/64"], true, false),
            None
        );
        assert_eq!(problem(&["fd07::1/64"], false, true), None);
        let said = problem(&both, false, false).unwrap();
        for switch in ["ipv4/conf/lan0/forwarding=1", "ipv6/conf/all/forwarding=1"] {
            assert!(said.contains(switch), "{said}");
        }
        let said = problem(&both, true, false).unwrap();
        assert!(!said.contains("ipv4"), "{said}");
    }

    #[test]
    fn an_interface_that_is_absent_or_refused_is_said_so() {
        let absent = report("lan0", Err("gone".to_owned()), &BTreeMap::new(), |_, _| {
            true
        });
        assert!(!absent.attached);
        assert_eq!(absent.problem.unwrap(), "gone");
        let found = found(7, &[]);
        let refused = InterfaceError::SocketsAlone;
        let results = BTreeMap::from([(found.index, Err(refused))]);
        let refused = report("lan0", Ok(found.clone()), &results, |_, _| true);
        assert!(!refused.attached);
        assert!(refused.problem.unwrap().contains("sockets alone"));
    }
}
