//! Every kind of NAT against every other, with real agents behind real translators.
//!
//! Two hosts of each kind, at sites of their own: one calls, the other is called, so that each of the 121
//! pairs meets for the first time. The same table in virtual time is `mesh-core/tests/sim/matrix.rs`.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    fs, io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
    path::Path,
    sync::{
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread::{self, Scope},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::{
    link::Impairment,
    mesh::{Mesh, word},
    nat::{Ipv6Kind, NatKind},
    site::Internet,
    tool,
};

/// How a site is connected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Kind {
    /// As tables name it.
    pub name: &'static str,
    /// IPv4, and how it is translated.
    pub ipv4: Option<NatKind>,
    /// IPv6, and how it is filtered.
    pub ipv6: Option<Ipv6Kind>,
    /// No UDP passes.
    pub udp_blocked: bool,
}

const fn of_ipv4(name: &'static str, kind: NatKind) -> Kind {
    Kind {
        name,
        ipv4: Some(kind),
        ipv6: None,
        udp_blocked: false,
    }
}

const fn of_ipv6(name: &'static str, kind: Ipv6Kind) -> Kind {
    Kind {
        name,
        ipv4: None,
        ipv6: Some(kind),
        udp_blocked: false,
    }
}

const fn blocked(kind: Kind) -> Kind {
    Kind {
        udp_blocked: true,
        ..kind
    }
}

/// All kinds, in the order of the table.
pub const KINDS: [Kind; 11] = [
    of_ipv4("Open", NatKind::None),
    of_ipv4("FullCone", NatKind::FullCone),
    of_ipv4("Restricted", NatKind::RestrictedCone),
    of_ipv4("PortRestricted", NatKind::PortRestricted),
    of_ipv4("Double", NatKind::Double),
    of_ipv4("Symmetric", NatKind::Symmetric),
    of_ipv4("SymmetricRandom", NatKind::SymmetricRandom),
    blocked(of_ipv4("UdpBlocked", NatKind::PortRestricted)),
    of_ipv6("Open v6", Ipv6Kind::Open),
    of_ipv6("Firewall v6", Ipv6Kind::Firewall),
    blocked(of_ipv6("UdpBlocked v6", Ipv6Kind::Firewall)),
];

impl Kind {
    fn is_symmetric(self) -> bool {
        matches!(
            self.ipv4,
            Some(NatKind::Symmetric | NatKind::SymmetricRandom)
        )
    }

    /// Lets in only ports that were written to, and nobody can name those of a symmetric one.
    fn filters_ports(self) -> bool {
        matches!(self.ipv4, Some(NatKind::PortRestricted | NatKind::Double))
    }

    /// What a node here says of its own NAT.
    fn nat(self) -> &'static str {
        match self.ipv4 {
            _ if self.udp_blocked => "udp_blocked",
            None | Some(NatKind::None) => "none",
            Some(NatKind::Symmetric | NatKind::SymmetricRandom) => "hard",
            Some(
                NatKind::FullCone
                | NatKind::RestrictedCone
                | NatKind::PortRestricted
                | NatKind::Double,
            ) => "easy",
        }
    }

    fn host(self, end: char) -> String {
        format!("{end}-{}", self.name.to_lowercase().replace(' ', "-"))
    }

    fn internet(self, end: u8, index: u8) -> Internet {
        let wan = Ipv4Addr::new(203, 0, 113, 40 * end + index);
        let prefix = Ipv6Addr::new(0x2001, 0xdb8, end.into(), index.into(), 0, 0, 0, 0);
        Internet {
            ipv4: self.ipv4.map(|kind| (kind, wan)),
            ipv6: self.ipv6.map(|kind| (kind, prefix)),
        }
    }
}

/// Why two kinds stay on a relay, as `meshctl path why` says it; `None`: they can be direct.
#[must_use]
pub fn obstacle(a: Kind, b: Kind) -> Option<&'static str> {
    let hard_one = a.is_symmetric() && b.filters_ports() || b.is_symmetric() && a.filters_ports();
    if a.udp_blocked || b.udp_blocked {
        Some("udp_blocked")
    } else if a.ipv6.is_some() != b.ipv6.is_some() {
        Some("no_candidates")
    } else if a.is_symmetric() && b.is_symmetric() {
        Some("hard_nat_both")
    } else if hard_one {
        Some("hard_nat_one")
    } else {
        None
    }
}

/// Until every node is up, linked to the relay, and knows its NAT: 3 s without an answer to STUN say that UDP is
/// blocked, and some time for so many processes on few cores.
const BOOT_LIMIT: Duration = Duration::from_secs(60);

/// After this a pair counts as one that does not get through.
const ANSWER_LIMIT: Duration = Duration::from_secs(20);

/// A round of probes takes some 8 s (`mesh_core`'s gaps); after two in vain the reason is final.
const REASON_LIMIT: Duration = Duration::from_secs(40);

/// Between one turn's last answer and the next turn: its direct paths are there by then, in 0.2 s on an idle
/// machine, and are not in each other's times.
const BETWEEN: Duration = Duration::from_millis(600);

/// How often a pair speaks until the first answer, and afterwards: paths are looked for while there is traffic.
const ASK_EVERY: Duration = Duration::from_millis(50);
const KEEP_EVERY: Duration = Duration::from_millis(500);

/// A site's way to the internet: 10 ms.
const LINK: Impairment = Impairment::delay_loss(Duration::from_millis(10), 0.0);

/// What these agents go without: it is 22 of them, and paths that are looked at.
const LINES: &str = "services = false\npacket_threads = 1\n";

const ECHO_PORT: u16 = 7;

/// What became of one pair.
#[derive(Debug, Clone)]
pub struct Met {
    /// The caller.
    pub from: Kind,
    /// The called.
    pub to: Kind,
    /// From the first packet to its first answer.
    pub answered: Option<Duration>,
    /// From the first packet until both ends were direct.
    pub direct: Option<Duration>,
    /// What both ends say: state, and reason while it is relayed.
    pub ends: [(String, String); 2],
    /// The caller's path at the end.
    pub path: String,
}

impl Met {
    /// Whether it came as the kinds say: direct, or relayed for the right reason at both ends.
    #[must_use]
    pub fn as_expected(&self) -> bool {
        self.answered.is_some()
            && self
                .ends
                .iter()
                .all(|(state, reason)| match obstacle(self.from, self.to) {
                    None => state == "direct",
                    Some(why) => state == "relayed" && reason == why,
                })
    }
}

/// The lab.
#[derive(Debug)]
pub struct Matrix {
    mesh: Mesh,
    addresses: BTreeMap<String, Ipv4Addr>,
}

impl Matrix {
    /// Two sites of every kind, all agents up.
    ///
    /// # Errors
    ///
    /// If something does not come up, or a node takes its NAT for another kind.
    pub fn start(bins: &Path) -> Result<Self> {
        let nodes = || {
            [('a', 1_u8), ('b', 2)].into_iter().flat_map(|end| {
                KINDS
                    .into_iter()
                    .zip(1_u8..)
                    .map(move |(kind, index)| (end, kind, index))
            })
        };
        let mut manifest = "apiVersion: mesh.holdfast.dev/v1alpha1\nkind: MeshRelay\nmetadata: {name: cloud-relay}\n\
                            spec: {addresses: [198.51.100.10, \"2001:db8:0:a::1\"]}\n"
            .to_owned();
        let mut addresses = BTreeMap::new();
        for ((end, number), kind, index) in nodes() {
            let (name, address) = (kind.host(end), Ipv4Addr::new(100, 96, number, index));
            write!(
                manifest,
                "---\napiVersion: mesh.holdfast.dev/v1alpha1\nkind: MeshNode\nmetadata: {{name: {name}}}\nspec: \
                 {{overlayIPv4: {address}}}\n"
            )?;
            addresses.insert(name, address);
        }
        let manifests = tempfile::tempdir()?;
        fs::write(manifests.path().join("matrix.yaml"), manifest)?;
        let mut mesh = Mesh::start_dual(bins, manifests.path())?;
        mesh.start_relay()?;
        for ((end, number), kind, index) in nodes() {
            let name = kind.host(end);
            let site = format!("s-{name}");
            mesh.add_site_with(&site, kind.internet(number, index), LINK, &[&name])?;
            mesh.site(&site)?.block_udp(kind.udp_blocked)?;
        }
        let matrix = Self { mesh, addresses };
        matrix.boot()?;
        for kind in KINDS {
            let (name, port) = (kind.host('b'), ECHO_PORT);
            matrix
                .mesh
                .serve(&name, "echo", &["echo", &format!("0.0.0.0:{port}")])?;
        }
        Ok(matrix)
    }

    /// What it is built on.
    #[must_use]
    pub fn mesh(&self) -> &Mesh {
        &self.mesh
    }

    /// Stops all agents and starts them with nothing remembered: every pair meets for the first time again.
    ///
    /// # Errors
    ///
    /// If one does not stop or come up.
    pub fn forget(&self) -> Result<()> {
        for name in self.addresses.keys() {
            self.mesh.kill(name, "mesh-agent")?;
            let peers = self.mesh.node(name)?.dir().join("state/peers");
            match fs::remove_file(&peers) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(error).with_context(|| format!("remove {}", peers.display()));
                }
                Ok(()) | Err(_) => {}
            }
        }
        self.boot()
    }

    fn boot(&self) -> Result<()> {
        let names = || self.addresses.keys();
        names().try_for_each(|name| self.mesh.start_agent_with(name, LINES))?;
        let all = u64::try_from(self.addresses.len())?;
        names().try_for_each(|name| self.mesh.agent_ready(name, all))?;
        let ends = KINDS
            .into_iter()
            .flat_map(|kind| [(kind, 'a'), (kind, 'b')]);
        for (kind, end) in ends {
            let name = kind.host(end);
            tool::eventually(
                &format!("{name} is linked and knows its NAT"),
                BOOT_LIMIT,
                || {
                    let status = self.mesh.status(&name)?;
                    let linked = status
                        .pointer("/relays/0/transport")
                        .is_some_and(Value::is_string);
                    let nat = word(&status, "nat");
                    ensure!(
                        linked && nat == kind.nat(),
                        "{nat} and not {}: {status}",
                        kind.nat()
                    );
                    Ok(())
                },
            )?;
        }
        Ok(())
    }

    /// Lets every pair meet, eleven at a time, and looks at what came of it.
    ///
    /// # Errors
    ///
    /// If something cannot be asked; what a pair came to is in the result.
    pub fn meet(&self) -> Result<Vec<Met>> {
        let stop = AtomicBool::new(false);
        thread::scope(|scope| {
            let met = self.meet_all(scope, &stop);
            stop.store(true, Ordering::Relaxed);
            met
        })
    }

    fn meet_all<'s>(&'s self, scope: &'s Scope<'s, '_>, stop: &'s AtomicBool) -> Result<Vec<Met>> {
        let mut talks = Vec::new();
        for turn in 0..KINDS.len() {
            let called = KINDS.into_iter().cycle().skip(turn);
            let mut waiting = Vec::new();
            for (from, to) in KINDS.into_iter().zip(called) {
                let socket = self.socket(from, to)?;
                let (tell, told) = mpsc::channel();
                scope.spawn(move || talk(&socket, &tell, stop));
                waiting.push((from, to, told));
            }
            let until = Instant::now() + ANSWER_LIMIT;
            for (from, to, told) in waiting {
                let first = told.recv().context("a talk ended")?;
                let rest = until.saturating_duration_since(Instant::now());
                talks.push((from, to, first, told.recv_timeout(rest).ok()));
            }
            thread::sleep(BETWEEN);
        }
        let until = Instant::now() + REASON_LIMIT;
        let mut all = Vec::new();
        for (from, to, first, answered) in talks {
            let answered = answered.map(|answered| answered - first);
            all.push(loop {
                let met = self.look(from, to, first, answered)?;
                if met.as_expected() || Instant::now() > until {
                    break met;
                }
                thread::sleep(KEEP_EVERY);
            });
        }
        self.mesh.all_run()?;
        Ok(all)
    }

    fn socket(&self, from: Kind, to: Kind) -> Result<UdpSocket> {
        let to = self.addresses.get(&to.host('b')).context("an address")?;
        let to = SocketAddr::from((*to, ECHO_PORT));
        let socket = self.mesh.node(&from.host('a'))?.enter(|| {
            let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
            socket.connect(to)?;
            socket.set_read_timeout(Some(ASK_EVERY))?;
            io::Result::Ok(socket)
        })?;
        socket.with_context(|| format!("a socket from {} to {to}", from.name))
    }

    fn look(
        &self,
        from: Kind,
        to: Kind,
        first: Instant,
        answered: Option<Duration>,
    ) -> Result<Met> {
        let (a, b) = (from.host('a'), to.host('b'));
        let (mut ends, mut direct, mut path) = (Vec::new(), Vec::new(), String::new());
        for (at, of) in [(&a, &b), (&b, &a)] {
            let why = self.mesh.ask(at, &["path", "why", of])?;
            let since = Instant::now().saturating_duration_since(first);
            // After the question was answered: late by its way here, and never early.
            let ago = became_direct_ago(&why);
            direct.extend(ago.map(|ago| since.saturating_sub(ago)));
            ends.push((word(&why, "state"), word(&why, "reason")));
            if at == &a {
                path = path_in_use(&why);
            }
        }
        let direct = <[Duration; 2]>::try_from(direct).ok();
        Ok(Met {
            from,
            to,
            answered,
            direct: direct.map(|[one, other]| one.max(other)),
            ends: ends.try_into().map_err(|_| anyhow::anyhow!("two ends"))?,
            path,
        })
    }
}

/// How long ago the node itself first became direct.
fn became_direct_ago(why: &Value) -> Option<Duration> {
    let transitions = why.get("transitions").and_then(Value::as_array)?;
    let own = transitions
        .iter()
        .filter(|one| one.get("path").is_some_and(Value::is_null));
    let mut direct = own.filter(|one| word(one, "to") == "direct");
    let ago_ms = direct.next()?.get("ago_ms").and_then(Value::as_u64)?;
    Some(Duration::from_millis(ago_ms))
}

/// The way that packets take, as `meshctl path why` says it; empty: none.
#[must_use]
pub fn path_in_use(why: &Value) -> String {
    let paths = why.get("paths").and_then(Value::as_array);
    let mut paths = paths.into_iter().flatten();
    let primary = paths.find(|path| word(path, "state") == "primary");
    primary.map(|path| word(path, "path")).unwrap_or_default()
}

/// Speaks until `stop`; tells when it began, and when the first answer came.
fn talk(socket: &UdpSocket, tell: &mpsc::Sender<Instant>, stop: &AtomicBool) {
    tell.send(Instant::now()).ok(); // Nobody listens: the run has failed.
    let mut answered = false;
    while !stop.load(Ordering::Relaxed) {
        socket.send(b"holdfast").ok(); // No route yet: as if it were lost.
        let mut buffer = [0; 64];
        // Waits for [`ASK_EVERY`] at most.
        if !answered && socket.recv(&mut buffer).is_ok() {
            answered = true;
            tell.send(Instant::now()).ok();
        }
        if answered {
            thread::sleep(KEEP_EVERY);
        }
    }
}

/// The table: milliseconds to the first answer / until direct, the slowest of all rounds, or why it is relayed.
#[must_use]
pub fn markdown(rounds: &[Vec<Met>]) -> String {
    let names: Vec<_> = KINDS.iter().map(|kind| kind.name).collect();
    let mut text = format!(
        "| from \\ to | {} |\n|{}\n",
        names.join(" | "),
        "---|".repeat(12)
    );
    for from in KINDS {
        let cells = KINDS.iter().map(|&to| {
            let of = rounds
                .iter()
                .flatten()
                .filter(|met| (met.from, met.to) == (from, to));
            cell(&of.collect::<Vec<_>>())
        });
        let cells: Vec<_> = cells.collect();
        writeln!(text, "| {} | {} |", from.name, cells.join(" | ")).ok();
    }
    text
}

fn cell(met: &[&Met]) -> String {
    let ms = |of: fn(&Met) -> Option<Duration>| {
        let slowest = met.iter().map(|met| of(met)).collect::<Option<Vec<_>>>()?;
        slowest.iter().max().map(Duration::as_millis)
    };
    let answered = ms(|met| met.answered).map_or("never".to_owned(), |ms| ms.to_string());
    if let Some(direct) = ms(|met| met.direct) {
        return format!("{answered} / {direct}");
    }
    let mut reasons: Vec<_> = met
        .iter()
        .flat_map(|met| &met.ends)
        .map(|(_, why)| why.as_str())
        .collect();
    reasons.sort_unstable();
    reasons.dedup();
    format!("{answered} `{}`", reasons.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kind(name: &str) -> Kind {
        KINDS.into_iter().find(|kind| kind.name == name).unwrap()
    }

    #[test]
    fn obstacles_are_the_same_from_both_ends_and_as_docs_say() {
        let mut direct = 0;
        for a in KINDS {
            for b in KINDS {
                assert_eq!(obstacle(a, b), obstacle(b, a));
                direct += usize::from(obstacle(a, b).is_none());
            }
        }
        // Open and the four cones with each other, two symmetric ones with three of them, IPv6: 25 + 12 + 4.
        assert_eq!(direct, 41);
        let why = |a, b| obstacle(kind(a), kind(b));
        assert_eq!(why("Symmetric", "SymmetricRandom"), Some("hard_nat_both"));
        assert_eq!(why("Double", "Symmetric"), Some("hard_nat_one"));
        assert_eq!(why("Open v6", "Open"), Some("no_candidates"));
        assert_eq!(why("Open v6", "UdpBlocked"), Some("udp_blocked"));
    }

    #[test]
    fn a_cell_tells_the_slowest_round_and_every_reason() {
        let (open, cone) = (kind("Open"), kind("FullCone"));
        let met = |answered, direct: Option<u64>, why: &str| Met {
            from: open,
            to: cone,
            answered: Some(Duration::from_millis(answered)),
            direct: direct.map(Duration::from_millis),
            ends: [(); 2].map(|()| ("direct".to_owned(), why.to_owned())),
            path: String::new(),
        };
        let rounds = [vec![met(80, Some(200), "")], vec![met(90, Some(170), "")]];
        assert!(markdown(&rounds).contains("| 90 / 200 |"));
        let rounds = [
            vec![met(80, None, "silent")],
            vec![met(90, Some(170), "probing")],
        ];
        assert!(markdown(&rounds).contains("| 90 `probing, silent` |"));
    }
}
