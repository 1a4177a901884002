//! Pairs of nodes at sites of their own, traffic between the two of each, and what happens to it.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    fs,
    net::Ipv4Addr,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow, ensure};
use netns_tests::{
    link::Impairment,
    matrix::path_in_use,
    mesh::{CLOUD, Mesh, word},
    nat::NatKind,
    stream::{Gaps, Traffic},
    tool,
};
use serde_json::Value;

use super::ms;
use crate::bench::Samples;

/// Pairs at the same time: each is cut for itself, and a killed relay is one of all of them.
pub(super) const PAIRS: u8 = 5;

/// Of each pair in a round: with [`PAIRS`] and five rounds, 50.
const RUNS: u32 = 2;

/// A datagram each 10 ms: no gap is known better than to this.
const EVERY: Duration = Duration::from_millis(10);

/// Long enough for ten times what must be.
const WINDOW: Duration = Duration::from_secs(3);

/// Traffic that is not back by then does not come back.
const BACK_LIMIT: Duration = Duration::from_secs(30);

/// Until a path is as it was: the direct one is looked for again after 5, 10, 20, 40 and 60 s, and then each 60 s.
const HEAL_LIMIT: Duration = Duration::from_secs(90);

/// Heartbeats come each 3 s (`paths.md`): what happens has to happen at every moment in between.
const HEARTBEAT: Duration = Duration::from_secs(3);

/// Where the second relay is: another /24, so another failure domain.
pub(super) const FAR: Ipv4Addr = Ipv4Addr::new(198, 51, 101, 20);

/// A node may speak with the relays alone.
const ONLY_RELAYS: &str = "table inet only\ndelete table inet only\ntable inet only { chain forward { type filter hook \
                           forward priority -20; oifname \"wan\" ip daddr != { 198.51.100.10, 198.51.101.20 } drop; \
                           iifname \"wan\" ip saddr != { 198.51.100.10, 198.51.101.20 } drop; }; }\n";
const EVERYBODY: &str = "table inet only\ndelete table inet only\n";

/// The second way out of a pair's first node.
const MODEM: &str = "[[uplink]]\ninterface = \"wwan0\"\nmetered = true\n";

const LINES: &str = "services = false\npacket_threads = 1\n";

const LINK: Impairment = Impairment::delay_loss(Duration::from_millis(10), 0.0);

/// Both relays, by name and the node that they are on.
const RELAYS: [(&str, &str); 2] = [("cloud-relay", "cloud"), ("far-relay", "far")];

/// What happens to one pair's path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum What {
    /// Nothing but relays can be reached any more, for a while.
    Cut,
    /// The node has another address on its LAN.
    Address,
    /// Its site has another public address.
    Wan,
    /// The cable of its LAN is pulled, and it has a modem: another interface, address and NAT.
    Cable,
}

/// Two nodes; all addresses by number.
#[derive(Debug, Clone)]
pub(super) struct Pair {
    number: u8,
    pub(super) a: String,
    pub(super) b: String,
    site: String,
}

impl Pair {
    fn new(number: u8) -> Self {
        Self {
            number,
            a: format!("a{number}"),
            b: format!("b{number}"),
            site: format!("site-a{number}"),
        }
    }

    pub(super) fn address(&self, node: &str) -> Ipv4Addr {
        Ipv4Addr::new(100, 96, if node == self.a { 1 } else { 2 }, self.number)
    }
}

/// The lab, and traffic between all pairs.
pub(super) struct Pairs {
    // Before the lab that it runs in.
    traffic: Vec<Traffic>,
    pub(super) pairs: Vec<Pair>,
    pub(super) mesh: Mesh,
}

fn traffic(mesh: &Mesh, pair: &Pair) -> Result<Traffic> {
    let [a, b] = [mesh.node(&pair.a)?, mesh.node(&pair.b)?];
    let addresses = [&pair.a, &pair.b].map(|name| pair.address(name));
    Traffic::start([&a, &b], addresses, EVERY)
}

/// Waits until it flows again, and says how long nothing came.
fn gaps(traffic: &Traffic, since: Instant) -> Result<Gaps> {
    thread::sleep((since + WINDOW).saturating_duration_since(Instant::now()));
    traffic.flows(BACK_LIMIT)?;
    Ok(traffic.gaps(since))
}

impl Pairs {
    /// [`PAIRS`] pairs, each node behind a NAT of its own, direct paths between them and traffic on these; if so
    /// wanted, with a modem beside the wire of each pair's first node.
    ///
    /// # Errors
    ///
    /// If something does not come up.
    pub(super) fn start(bins: &Path, modems: bool) -> Result<Self> {
        let mut mesh = sites(bins, PAIRS, "")?;
        if modems {
            (1..=PAIRS).try_for_each(|number| add_modem(&mut mesh, number))?;
        }
        start_agents(&mesh, PAIRS, if modems { MODEM } else { "" })?;
        let mut pairs = Self {
            traffic: Vec::new(),
            pairs: (1..=PAIRS).map(Pair::new).collect(),
            mesh,
        };
        for pair in &pairs.pairs {
            pairs.traffic.push(traffic(&pairs.mesh, pair)?);
        }
        Ok(pairs)
    }

    /// Lets this happen to every pair, [`RUNS`] times, each at another moment between two heartbeats.
    ///
    /// # Errors
    ///
    /// If traffic does not come back, or the path is not direct again.
    pub(super) fn each(
        &self,
        what: What,
        case: &str,
        round: u32,
        samples: &mut Samples,
    ) -> Result<()> {
        let gaps: Vec<Result<Vec<Gaps>>> = thread::scope(|scope| {
            let begin = |(pair, traffic)| {
                scope.spawn(move || {
                    let turns = (0..RUNS).map(|run| (round - 1) * RUNS + run);
                    turns
                        .map(|turn| self.one(what, pair, traffic, turn))
                        .collect()
                })
            };
            let running: Vec<_> = self.pairs.iter().zip(&self.traffic).map(begin).collect();
            let joined = running.into_iter().map(|one| one.join());
            joined
                .map(|ended| ended.unwrap_or_else(|_| Err(anyhow!("a pair's thread panicked"))))
                .collect()
        });
        for gap in gaps {
            gap?.into_iter().for_each(|gap| add(samples, case, gap));
        }
        Ok(())
    }

    fn one(&self, what: What, pair: &Pair, traffic: &Traffic, turn: u32) -> Result<Gaps> {
        self.is_direct(pair)?;
        thread::sleep(phase(u32::from(PAIRS) * turn + u32::from(pair.number)));
        let site = self.mesh.site(&pair.site)?;
        let router = site.router().netns();
        let step = u8::try_from(turn % 50)?;
        let since = Instant::now();
        match what {
            What::Cut => tool::nft(router, ONLY_RELAYS)?,
            What::Address => {
                let own = Ipv4Addr::new(192, 168, 1, 200 + step);
                site.renumber(&self.mesh.node(&pair.a)?, own)?;
            }
            What::Wan => {
                let wan = Ipv4Addr::new(203, 0, 113, 50 + 40 * (pair.number - 1) + step % 40);
                site.set_wan(self.mesh.lab().internet(), wan)?;
            }
            What::Cable => tool::ip(router, "link set host0 down\n")?,
        }
        let gap = gaps(traffic, since);
        match what {
            What::Cut => tool::nft(router, EVERYBODY)?,
            What::Cable => {
                self.leaves_by(pair, "wwan0")?;
                tool::ip(router, "link set host0 up\n")?;
                self.leaves_by(pair, "eth0")?;
            }
            What::Address | What::Wan => {}
        }
        gap.with_context(|| format!("{what:?} of pair {}", pair.number))
    }

    /// Waits until both ends say so.
    fn is_direct(&self, pair: &Pair) -> Result<()> {
        tool::eventually("the path is direct", HEAL_LIMIT, || {
            for why in self.why(pair)? {
                ensure!(word(&why, "state") == "direct", "{why}");
            }
            Ok(())
        })
    }

    /// Waits until the first node says that it leaves by this interface.
    fn leaves_by(&self, pair: &Pair, interface: &str) -> Result<()> {
        tool::eventually("the uplink in use", HEAL_LIMIT, || {
            let status = self.mesh.status(&pair.a)?;
            let uplinks = status.get("uplinks").and_then(Value::as_array);
            let mut uplinks = uplinks.into_iter().flatten();
            let used = uplinks.find(|one| one.get("used") == Some(&Value::Bool(true)));
            let name = used.map(|one| word(one, "interface")).unwrap_or_default();
            ensure!(name == interface, "{name} and not {interface}: {status}");
            Ok(())
        })
    }

    fn why(&self, pair: &Pair) -> Result<[Value; 2]> {
        let ask = |at: &str, of: &str| self.mesh.ask(at, &["path", "why", of]);
        Ok([ask(&pair.a, &pair.b)?, ask(&pair.b, &pair.a)?])
    }

    /// Lets all pairs go by relays, and kills the one that most use, until there are as many runs as of [`Self::each`].
    ///
    /// # Errors
    ///
    /// If traffic does not come back, or a relay.
    pub(super) fn kill_relays(&self, case: &str, round: u32, samples: &mut Samples) -> Result<()> {
        self.let_pass(ONLY_RELAYS)?;
        let (mut runs, mut kills) = (0, 0);
        let killed = loop {
            // Of five pairs three use it, at least: four kills are enough.
            let turn = (round - 1) * 2 * RUNS + kills;
            match self.kill_relay(case, turn, samples) {
                Ok(pairs) => runs += pairs,
                Err(error) => break Err(error),
            }
            kills += 1;
            if runs >= usize::from(PAIRS) * RUNS as usize {
                break Ok(());
            }
        };
        let back = self.let_pass(EVERYBODY);
        killed.and(back)
    }

    fn let_pass(&self, rules: &str) -> Result<()> {
        let sites = self.pairs.iter().map(|pair| self.mesh.site(&pair.site));
        sites
            .into_iter()
            .try_for_each(|site| tool::nft(site?.router().netns(), rules))
    }

    /// Returns how many pairs used it.
    fn kill_relay(&self, case: &str, turn: u32, samples: &mut Samples) -> Result<usize> {
        self.relays_are_warm()?;
        let users = tool::eventually("all go by a relay", HEAL_LIMIT, || self.users())?;
        let (relay, users) = users
            .into_iter()
            .max_by_key(|(_, users)| users.len())
            .context("nobody uses a relay")?;
        let (name, node) = RELAYS
            .into_iter()
            .find(|(name, _)| *name == relay)
            .with_context(|| format!("no relay {relay}"))?;
        thread::sleep(phase(turn));
        let since = Instant::now();
        self.mesh.kill(node, "mesh-relay")?;
        for number in &users {
            let traffic = self.traffic.get(*number).context("a pair")?;
            add(samples, case, gaps(traffic, since)?);
        }
        let node = self.mesh.node(node)?;
        self.mesh.start_relay_on(&node, name, "")?;
        self.relays_are_warm()?;
        Ok(users.len())
    }

    /// Which pairs send by which relay, in either direction.
    fn users(&self) -> Result<BTreeMap<String, Vec<usize>>> {
        let mut users: BTreeMap<String, Vec<usize>> = BTreeMap::new();
        for (number, pair) in self.pairs.iter().enumerate() {
            for why in self.why(pair)? {
                let path = path_in_use(&why);
                let name = path
                    .strip_prefix("relay ")
                    .and_then(|rest| rest.split(' ').next());
                let name = name.with_context(|| format!("not by a relay: {why}"))?;
                let of = users.entry(name.to_owned()).or_default();
                if of.last() != Some(&number) {
                    of.push(number);
                }
            }
        }
        Ok(users)
    }

    /// Waits until every node is linked to both.
    fn relays_are_warm(&self) -> Result<()> {
        for name in self.pairs.iter().flat_map(|pair| [&pair.a, &pair.b]) {
            tool::eventually("both relays are warm", HEAL_LIMIT, || {
                let status = self.mesh.status(name)?;
                let relays = status.get("relays").and_then(Value::as_array);
                let up = relays
                    .into_iter()
                    .flatten()
                    .filter(|relay| relay["transport"].is_string());
                let up = up.count();
                ensure!(up == RELAYS.len(), "{name} is linked to {up}: {status}");
                Ok(())
            })?;
        }
        Ok(())
    }

    /// Notes what must not be at all.
    pub(super) fn tell_totals(&self, case: &str, samples: &mut Samples) {
        let duplicates: u64 = self.traffic.iter().map(Traffic::duplicates).sum();
        let broken = self.traffic.iter().filter(|traffic| {
            let intact = traffic.intact();
            if let Err(error) = &intact {
                samples.note(case, format!("TCP: {error:#}"));
            }
            intact.is_err()
        });
        let broken = broken.count();
        samples.add(case, "duplicates", "datagrams", duplicates as f64);
        samples.add(case, "tcp_broken", "connections", broken as f64);
        let pairs = self.pairs.len();
        samples.note(
            case,
            format!(
                "{pairs} pairs, {RUNS} runs of each a round, in the moments between two heartbeats in the order of the \
                 golden ratio; duplicates and broken connections are those of all cases with pairs together"
            ),
        );
    }
}

fn add(samples: &mut Samples, case: &str, gap: Gaps) {
    samples.add(case, "gap", "ms", ms(gap.datagrams()));
    samples.add(case, "tcp_gap", "ms", ms(gap.tcp));
}

/// The moment between two heartbeats in which something happens: multiples of the golden ratio are spread evenly over
/// the time between two however many there are.
fn phase(turn: u32) -> Duration {
    const GOLDEN: f64 = 0.618_033_988_749_894_9;
    HEARTBEAT.mul_f64((f64::from(turn) * GOLDEN).fract())
}

/// The pairs' nodes, with two relays and nothing to say.
///
/// # Errors
///
/// If something does not come up.
pub(super) fn quiet(bins: &Path, count: u8, relay: &str) -> Result<Mesh> {
    let mesh = sites(bins, count, relay)?;
    start_agents(&mesh, count, "")?;
    Ok(mesh)
}

/// A modem at a pair's first node, with a site of its own behind it.
fn add_modem(mesh: &mut Mesh, number: u8) -> Result<()> {
    let (pair, site) = (Pair::new(number), format!("mobile-a{number}"));
    let wan = Ipv4Addr::new(203, 0, 113, 30 + number);
    mesh.add_site(&site, NatKind::PortRestricted, wan, LINK, &[])?;
    let (edge, modem) = (mesh.node(&pair.a)?, mesh.site(&site)?.router());
    mesh.lab().veth(&edge, "wwan0", modem, "modem")?;
    tool::ip(modem.netns(), "addr add 192.168.8.1/24 dev modem\n")?;
    let batch = "addr add 192.168.8.2/24 dev wwan0\n\
                 route add default via 192.168.8.1 dev wwan0 metric 700\n";
    tool::ip(edge.netns(), batch)
}

/// The same without agents.
///
/// # Errors
///
/// If something does not come up.
pub(super) fn sites(bins: &Path, count: u8, relay: &str) -> Result<Mesh> {
    let mut manifest = format!(
        "apiVersion: mesh.holdfast.dev/v1alpha1\nkind: MeshRelay\nmetadata: {{name: cloud-relay}}\nspec: {{addresses: \
         [{CLOUD}]}}\n---\napiVersion: mesh.holdfast.dev/v1alpha1\nkind: MeshRelay\nmetadata: {{name: far-relay}}\n\
         spec: {{addresses: [{FAR}]}}\n"
    );
    let pairs: Vec<_> = (1..=count).map(Pair::new).collect();
    for pair in &pairs {
        for node in [&pair.a, &pair.b] {
            let address = pair.address(node);
            write!(
                manifest,
                "---\napiVersion: mesh.holdfast.dev/v1alpha1\nkind: MeshNode\nmetadata: {{name: {node}}}\nspec: \
                 {{overlayIPv4: {address}}}\n"
            )?;
        }
    }
    let manifests = tempfile::tempdir()?;
    fs::write(manifests.path().join("pairs.yaml"), manifest)?;
    let mut mesh = Mesh::start(bins, manifests.path())?;
    let far = mesh.lab().public_node("far", FAR)?;
    mesh.start_relay_with(relay)?;
    mesh.start_relay_on(&far, "far-relay", relay)?;
    for pair in &pairs {
        let at_b = format!("site-b{}", pair.number);
        for (site, node, last) in [(&pair.site, &pair.a, 10), (&at_b, &pair.b, 20)] {
            let wan = Ipv4Addr::new(203, 0, 113, last + pair.number);
            mesh.add_site(site, NatKind::PortRestricted, wan, LINK, &[node])?;
        }
    }
    Ok(mesh)
}

/// Starts them on all nodes of [`sites`], with more lines of configuration for the first of each pair.
///
/// # Errors
///
/// If one does not come up.
pub(super) fn start_agents(mesh: &Mesh, count: u8, first: &str) -> Result<()> {
    let mut nodes = Vec::new();
    for pair in (1..=count).map(Pair::new) {
        mesh.start_agent_with(&pair.a, &format!("{LINES}{first}"))?;
        mesh.start_agent_with(&pair.b, LINES)?;
        nodes.extend([pair.a, pair.b]);
    }
    let all = u64::try_from(nodes.len())?;
    nodes
        .iter()
        .try_for_each(|node| mesh.agent_ready(node, all))
}

/// Lets the first node of a pair speak with relays alone.
///
/// # Errors
///
/// If `nft` refuses.
pub(super) fn only_relays(mesh: &Mesh, number: u8) -> Result<Pair> {
    let pair = Pair::new(number);
    tool::nft(mesh.site(&pair.site)?.router().netns(), ONLY_RELAYS)?;
    Ok(pair)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_are_spread_evenly_between_two_heartbeats() {
        let mut moments: Vec<_> = (0..50).map(phase).collect();
        moments.sort();
        let widest = moments.windows(2).map(|two| two[1] - two[0]).max().unwrap();
        assert!(widest < HEARTBEAT / 20, "{widest:?}"); // 50 of them: a 50th on average.
        assert!(moments.iter().all(|moment| *moment < HEARTBEAT));
    }
}
