//! All agents: what they are told, and when.

use std::{
    collections::BTreeMap,
    fs,
    net::Ipv4Addr,
    path::Path,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use integration::joining::join;
use mesh_api::control::JoinRequest;
use mesh_identity::{credentials::Credentials, token::JoinToken};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde_json::{Value, json};
use tokio::{
    sync::{mpsc, watch},
    task::JoinSet,
    time::timeout_at,
};

use crate::{
    away::Away,
    cluster::{SERVICE_PORT, node_name, service_address},
    maps::Maps,
    now_ns, questions, say,
    stream::{Agent, Heard, What},
};

/// Nodes that join at once.
const JOINING: usize = 8;

/// Reports that wait to be taken: four of each of 1,000 agents.
const HEARD_MAX: usize = 4_096;

/// 1,000 full answers of 25 MB each, at 100 MB/s: the longest that is waited for.
const CONNECT_LIMIT: Duration = Duration::from_secs(600);

/// Nobody waits longer for one change: thirty times what is asked for.
const CHANGE_LIMIT: Duration = Duration::from_secs(30);

/// How often a map is looked at while a change is on its way to it: some 12 system calls each time.
const MAP_EVERY: Duration = Duration::from_millis(1);

/// Simulated agents of one controller, and the maps of some real ones.
pub(crate) struct Fleet {
    controller: String,
    token: JoinToken,
    /// Of those that joined, in the order of their numbers.
    joined: Vec<Credentials>,
    agents: JoinSet<()>,
    heard: mpsc::Receiver<Heard>,
    teller: mpsc::Sender<Heard>,
    wanted: watch::Sender<Option<Ipv4Addr>>,
    maps: Vec<Arc<Maps>>,
    seen: Seen,
    looking: JoinSet<Result<u64>>,
    /// Those that are not connected but for a moment.
    away: BTreeMap<usize, Away>,
    /// What went wrong last, for people.
    problem: String,
}

/// What was heard since it was last asked to forget.
#[derive(Debug, Default)]
struct Seen {
    /// Agents' first answers on a connection: when, how large, and whether it held everything.
    first: BTreeMap<usize, (u64, u64, bool)>,
    /// Agents that have the change: when, and how large the message was.
    changed: BTreeMap<usize, (u64, u64)>,
}

impl Fleet {
    /// Agents of the controller at `controller`, that join by the token in a file.
    ///
    /// # Errors
    ///
    /// If that is no token.
    pub(crate) fn new(controller: &str, token: &Path) -> Result<Self> {
        let text =
            fs::read_to_string(token).with_context(|| format!("read {}", token.display()))?;
        // One connection each, and the shell's limit is often 1,024.
        let most = getrlimit(Resource::Nofile).maximum;
        let all = Rlimit {
            current: most,
            maximum: most,
        };
        setrlimit(Resource::Nofile, all).context("raise the limit of open files")?;
        let (teller, heard) = mpsc::channel(HEARD_MAX);
        Ok(Self {
            controller: controller.to_owned(),
            token: text.trim().parse()?,
            joined: Vec::new(),
            agents: JoinSet::new(),
            heard,
            teller,
            wanted: watch::Sender::new(None),
            maps: Vec::new(),
            seen: Seen::default(),
            looking: JoinSet::new(),
            away: BTreeMap::new(),
            problem: String::new(),
        })
    }

    /// Answers until standard input ends.
    ///
    /// # Errors
    ///
    /// If nobody reads the answers.
    pub(crate) async fn run(mut self) -> Result<()> {
        let mut questions = questions();
        loop {
            tokio::select! {
                question = questions.next_line() => {
                    let Some(question) = question? else {
                        return Ok(());
                    };
                    let answer = self.answer(&question).await;
                    say(&question, answer)?;
                }
                // Agents must not wait for somebody to ask.
                heard = self.heard.recv() => self.take(heard),
            }
        }
    }

    /// | question | answer |
    /// |---|---|
    /// | `join COUNT` | so many nodes more join, some at once: how long it took |
    /// | `connect` | all that joined connect: once each has an answer, how long each took, and the sizes of the answers |
    /// | `maps FOLDER` | the real agent whose bpffs this is counts too |
    /// | `expect SERVICE ADDRESS` | from now on it is watched who has this endpoint of the service |
    /// | `seen` | once all have it: when each simulated agent, when each map, and the sizes of the messages |
    /// | `forget` | the time: from now on it is watched who connects again |
    /// | `returned SINCE` | as `connect`, for those, from that time on |
    /// | `back NUMBER` | the node that joined as this one is there for a moment: what it was told of what changed since it last was |
    async fn answer(&mut self, question: &str) -> Result<Value> {
        let words: Vec<_> = question.split(' ').collect();
        match words.as_slice() {
            ["join", count] => self.join(count.parse().context("COUNT")?).await,
            ["connect"] => {
                let begun = self.forget();
                self.connect();
                self.firsts(begun).await
            }
            ["maps", folder] => {
                self.maps.push(Arc::new(Maps::open(Path::new(folder))?));
                Ok(Value::Null)
            }
            ["expect", service, address] => {
                let service = service.parse().context("SERVICE")?;
                self.expect(service, address.parse().context("ADDRESS")?);
                Ok(Value::Null)
            }
            ["seen"] => self.seen().await,
            ["forget"] => Ok(json!(self.forget())),
            ["back", number] => self.back(number.parse().context("NUMBER")?).await,
            ["returned", since] => self.firsts(since.parse().context("SINCE")?).await,
            _ => bail!("no such question"),
        }
    }

    async fn join(&mut self, count: usize) -> Result<Value> {
        let begun = Instant::now();
        let first = self.joined.len();
        let numbers = first..first + count;
        let joins =
            stream::iter(numbers).map(|number| one_joins(&self.controller, &self.token, number));
        let joined: Vec<_> = joins.buffered(JOINING).try_collect().await?;
        self.joined.extend(joined);
        Ok(json!({"took_ns": begun.elapsed().as_nanos()}))
    }

    async fn back(&mut self, number: usize) -> Result<Value> {
        let credentials = self
            .joined
            .get(number)
            .context("nobody joined as this one")?;
        let away = self.away.entry(number).or_default();
        Ok(json!(away.come_back(&self.controller, credentials).await?))
    }

    fn connect(&mut self) {
        let new = self.joined.iter().enumerate().skip(self.agents.len());
        for (number, credentials) in new.collect::<Vec<_>>() {
            let agent = Agent {
                number,
                controller: self.controller.clone(),
                credentials: credentials.clone(),
                wanted: self.wanted.subscribe(),
                heard: self.teller.clone(),
            };
            self.agents.spawn(agent.run());
        }
    }

    fn forget(&mut self) -> u64 {
        while let Ok(heard) = self.heard.try_recv() {
            drop(heard);
        }
        self.seen = Seen::default();
        self.problem.clear();
        now_ns()
    }

    fn expect(&mut self, service: u32, address: Ipv4Addr) {
        self.forget();
        self.looking = JoinSet::new();
        self.wanted.send_replace(Some(address));
        let frontend = (service_address(service), SERVICE_PORT);
        for maps in &self.maps {
            let maps = Arc::clone(maps);
            self.looking
                .spawn_blocking(move || look(&maps, frontend, address));
        }
    }

    async fn seen(&mut self) -> Result<Value> {
        let all = self.agents.len();
        self.until(CHANGE_LIMIT, |seen| seen.changed.len() == all)
            .await
            .with_context(|| format!("{} of {all} have it", self.seen.changed.len()))?;
        let mut maps = Vec::new();
        while let Some(found) = self.looking.join_next().await {
            maps.push(found??);
        }
        let (times, sizes): (Vec<_>, Vec<_>) = self.seen.changed.values().copied().unzip();
        Ok(json!({"agents_ns": times, "bytes": sizes, "maps_ns": maps}))
    }

    /// Once each agent had a first answer since `begun`.
    async fn firsts(&mut self, begun: u64) -> Result<Value> {
        let all = self.agents.len();
        self.until(CONNECT_LIMIT, |seen| seen.first.len() == all)
            .await
            .with_context(|| {
                let problem = &self.problem;
                format!(
                    "{} of {all} have an answer: {problem}",
                    self.seen.first.len()
                )
            })?;
        let firsts = self.seen.first.values();
        let times: Vec<_> = firsts
            .clone()
            .map(|(at, ..)| at.saturating_sub(begun))
            .collect();
        let sizes: Vec<_> = firsts.clone().map(|(_, bytes, _)| *bytes).collect();
        let full = firsts.filter(|(.., full)| *full).count();
        Ok(json!({"times_ns": times, "bytes": sizes, "full": full}))
    }

    async fn until(&mut self, limit: Duration, enough: impl Fn(&Seen) -> bool) -> Result<()> {
        let end = tokio::time::Instant::now() + limit;
        while !enough(&self.seen) {
            let heard = timeout_at(end, self.heard.recv()).await;
            let heard = heard.map_err(|_late| anyhow!("not within {limit:?}"))?;
            self.take(heard);
        }
        Ok(())
    }

    fn take(&mut self, heard: Option<Heard>) {
        // There is always one who tells: `teller`.
        let Some(Heard { agent, at_ns, what }) = heard else {
            return;
        };
        match what {
            What::First { bytes, full } => {
                let first = self.seen.first.entry(agent);
                first.or_insert((at_ns, bytes, full));
            }
            What::Change { bytes } => {
                self.seen.changed.entry(agent).or_insert((at_ns, bytes));
            }
            What::Ended(problem) => self.problem = problem,
        }
    }
}

/// When the endpoint is in the map.
fn look(maps: &Maps, service: (Ipv4Addr, u16), endpoint: Ipv4Addr) -> Result<u64> {
    let begun = Instant::now();
    loop {
        if maps.leads(service, endpoint)? {
            return Ok(now_ns());
        }
        ensure!(
            begun.elapsed() < CHANGE_LIMIT,
            "{endpoint} is not in a real agent's map after {CHANGE_LIMIT:?}"
        );
        thread::sleep(MAP_EVERY);
    }
}

async fn one_joins(controller: &str, token: &JoinToken, number: usize) -> Result<Credentials> {
    let number = u32::try_from(number)?;
    // Nobody has the other half: no packets are for these nodes.
    let key = (number + 1).to_be_bytes().into_iter().cycle().take(32);
    let request = JoinRequest {
        token: token.to_string(),
        node_name: node_name(number),
        wireguard_public_key: key.collect(),
        ..JoinRequest::default()
    };
    let joined = join(controller, (&token.trust_domain, token.mesh), request).await?;
    joined.map_err(|status| anyhow!("{}: {}", node_name(number), status.message()))
}
