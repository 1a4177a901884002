//! `snapshot`: what a node keeps on disk of the mesh.

use std::{
    collections::BTreeMap,
    fs::File,
    io::Write as _,
    path::Path,
    time::{SystemTime, UNIX_EPOCH},
};

use mesh_api::admin::{ResourceReport, SlotReport, SnapshotsResponse};
use serde::Serialize;

use crate::{
    Verdict,
    failure::Failure,
    report::some,
    show::{Report, row},
    table::{Cell, Tone, bytes, columns, duration, printable, table},
};

/// A young node's second slot, of which the agent says so.
pub(crate) const NOT_WRITTEN: &str = "not written yet";

/// `snapshot show` and `snapshot verify`.
#[derive(Debug, Serialize)]
pub(crate) struct Snapshots {
    /// The newest first.
    pub(crate) slots: Vec<Slot>,
    #[serde(skip)]
    each: bool,
}

#[derive(Debug, Serialize)]
pub(crate) struct Slot {
    pub(crate) file: String,
    /// Why nothing in it can be used; `null`: it can.
    pub(crate) damage: Option<String>,
    /// The slot with the largest is what a restart begins with.
    pub(crate) sequence: u64,
    pub(crate) bytes: u64,
    /// Of the controller's store, hexadecimal.
    pub(crate) store_id: Option<String>,
    pub(crate) generation: u64,
    pub(crate) epoch: u64,
    /// By the controller's clock; `null`: it is not signed as a whole.
    pub(crate) made_unix_ms: Option<u64>,
    /// By this node's clock of then.
    pub(crate) received_unix_s: Option<i64>,
    /// The mesh's authority signed exactly this.
    pub(crate) signed: bool,
    /// What is wrong with signatures, and with single resources.
    pub(crate) problems: Vec<String>,
    pub(crate) resources: Vec<Resource>,
}

#[derive(Debug, Clone, Serialize)]
pub(crate) struct Resource {
    /// `mesh`, `node`, `external_peer`, `relay`, `service`, `slice`, `pod`, `namespace`, `network_policy`, `mesh_policy` or
    /// `community`.
    pub(crate) kind: String,
    pub(crate) name: String,
    /// The same digest: the same content. Hexadecimal.
    pub(crate) digest: String,
}

impl Slot {
    fn new(said: SlotReport) -> Self {
        let resource = |one: ResourceReport| Resource {
            kind: one.kind,
            name: one.name,
            digest: one.digest,
        };
        Self {
            file: said.file,
            damage: some(said.damage),
            sequence: said.sequence,
            bytes: said.bytes,
            store_id: some(said.store_id),
            generation: said.generation,
            epoch: said.epoch,
            made_unix_ms: (said.made_unix_ms != 0).then_some(said.made_unix_ms),
            received_unix_s: (said.received_unix_s != 0).then_some(said.received_unix_s),
            signed: said.signed,
            problems: said.problems,
            resources: said.resources.into_iter().map(resource).collect(),
        }
    }

    fn verdict(&self) -> Verdict {
        if self.damage.is_some() {
            Verdict::Down
        } else if self.problems.is_empty() && self.signed {
            Verdict::Ok
        } else {
            Verdict::Degraded
        }
    }

    fn rows(&self) -> Vec<Vec<Cell>> {
        let mut rows = vec![row("slot", &self.file)];
        if let Some(damage) = &self.damage {
            rows.push(vec!["".into(), Cell::new(damage, Tone::Bad)]);
            return rows;
        }
        let signed = match self.signed {
            true => Cell::new("yes, and the signature holds", Tone::Good),
            false => Cell::new("no", Tone::Warning),
        };
        let received = self.received_unix_s.map(ago);
        rows.extend([
            row(
                "generation",
                format!("{} of epoch {}", self.generation, self.epoch),
            ),
            row("received", received.unwrap_or_else(|| "-".to_owned())),
            row("size", bytes(self.bytes)),
            vec!["signed".into(), signed],
            row("has", counted(&self.resources)),
        ]);
        let problems = self.problems.iter();
        rows.extend(problems.map(|problem| vec!["".into(), Cell::new(problem, Tone::Bad)]));
        rows
    }
}

/// How many of each kind.
fn counted(resources: &[Resource]) -> String {
    let mut kinds: BTreeMap<&str, u32> = BTreeMap::new();
    for one in resources {
        *kinds.entry(&one.kind).or_default() += 1;
    }
    let words = kinds.iter().map(|(kind, count)| format!("{count} {kind}"));
    words.collect::<Vec<_>>().join(", ")
}

/// By this machine's clock.
pub(crate) fn ago(unix_s: i64) -> String {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    match u64::try_from(unix_s) {
        Ok(then) if then <= now.as_secs() => format!("{} ago", duration(now.as_secs() - then)),
        _ => "in the future: a clock was wrong".to_owned(),
    }
}

impl Snapshots {
    /// With `each`, text has every resource, too.
    pub(crate) fn new(said: SnapshotsResponse, each: bool) -> Self {
        let slots = said.slots.into_iter().map(Slot::new).collect();
        Self { slots, each }
    }
}

impl Report for Snapshots {
    fn text(&self, colours: bool) -> String {
        let slots = self.slots.iter().map(|slot| {
            let mut text = columns(&slot.rows(), colours);
            if self.each && !slot.resources.is_empty() {
                let resources = slot.resources.iter();
                let rows = resources
                    .map(|one| vec![(&one.kind).into(), (&one.name).into(), (&one.digest).into()]);
                text.push('\n');
                text.push_str(&table(&["KIND", "NAME", "DIGEST"], rows.collect(), colours));
            }
            text
        });
        slots.collect::<Vec<_>>().join("\n")
    }

    /// The newest that can be used is what counts; that there is no older one is how each node begins.
    fn verdict(&self) -> Verdict {
        let usable = self.slots.iter().find(|slot| slot.damage.is_none());
        let damaged = |slot: &&Slot| {
            let damage = slot.damage.as_deref();
            damage.is_some_and(|damage| damage != NOT_WRITTEN)
        };
        match usable {
            None => Verdict::Down,
            Some(_) if self.slots.iter().any(|slot| damaged(&slot)) => Verdict::Degraded,
            Some(slot) => slot.verdict(),
        }
    }
}

/// `snapshot age`.
#[derive(Debug, Serialize)]
pub(crate) struct Age {
    /// What the agent serves.
    pub(crate) generation: u64,
    /// Since a controller last vouched for it; 0 while one is connected.
    pub(crate) age_s: u64,
}

impl Report for Age {
    fn text(&self, _colours: bool) -> String {
        let since = match self.age_s {
            0 => "a controller vouches for it now".to_owned(),
            age => format!("a controller vouched for it {} ago", duration(age)),
        };
        format!("generation {}: {since}\n", self.generation)
    }
}

/// `snapshot diff`.
#[derive(Debug, Serialize)]
pub(crate) struct Diff {
    pub(crate) from_generation: u64,
    pub(crate) to_generation: u64,
    pub(crate) added: Vec<Resource>,
    pub(crate) removed: Vec<Resource>,
    /// With the digest that they have now.
    pub(crate) changed: Vec<Resource>,
}

impl Diff {
    pub(crate) fn new(said: SnapshotsResponse) -> Result<Self, Failure> {
        let slots: Vec<_> = said.slots.into_iter().map(Slot::new).collect();
        let mut usable = slots.into_iter().filter(|slot| slot.damage.is_none());
        let (Some(newer), Some(older)) = (usable.next(), usable.next()) else {
            return Err(Failure::Refused(
                "there are not two snapshots on disk that could be compared: `meshctl snapshot show` says why".to_owned(),
            ));
        };
        let by_name = |slot: &Slot| -> BTreeMap<(String, String), Resource> {
            let resources = slot.resources.iter();
            resources
                .map(|one| ((one.kind.clone(), one.name.clone()), one.clone()))
                .collect()
        };
        let (before, after) = (by_name(&older), by_name(&newer));
        let of = |from: &BTreeMap<_, Resource>,
                  wanted: &dyn Fn(&(String, String), &Resource) -> bool| {
            let found = from.iter().filter(|(key, one)| wanted(key, one));
            found.map(|(_, one)| one.clone()).collect()
        };
        Ok(Self {
            from_generation: older.generation,
            to_generation: newer.generation,
            added: of(&after, &|key, _| !before.contains_key(key)),
            removed: of(&before, &|key, _| !after.contains_key(key)),
            changed: of(&after, &|key, one| {
                before.get(key).is_some_and(|was| was.digest != one.digest)
            }),
        })
    }
}

impl Report for Diff {
    fn text(&self, colours: bool) -> String {
        let lines = |sign: &str, tone: Tone, resources: &[Resource]| -> Vec<Vec<Cell>> {
            let row = |one: &Resource| {
                let sign = Cell::new(sign, tone);
                vec![sign, (&one.kind).into(), (&one.name).into()]
            };
            resources.iter().map(row).collect()
        };
        let rows = [
            lines("+", Tone::Good, &self.added),
            lines("-", Tone::Bad, &self.removed),
            lines("~", Tone::Warning, &self.changed),
        ];
        let rows: Vec<_> = rows.into_iter().flatten().collect();
        let head = format!(
            "generation {} -> {}",
            self.from_generation, self.to_generation
        );
        match rows.is_empty() {
            true => format!("{head}: the same resources\n"),
            false => format!("{head}\n{}", columns(&rows, colours)),
        }
    }
}

/// `snapshot export`.
#[derive(Debug, Serialize)]
pub(crate) struct Exported {
    pub(crate) file: String,
    pub(crate) generation: u64,
    pub(crate) bytes: u64,
}

/// Writes the newest slot that can be used.
pub(crate) fn export(said: SnapshotsResponse, out: &Path) -> Result<Exported, Failure> {
    let usable = said.slots.into_iter().find(|slot| slot.damage.is_empty());
    let Some(slot) = usable else {
        return Err(Failure::Failed(
            "no snapshot on disk can be used".to_owned(),
        ));
    };
    let written = File::create_new(out).and_then(|mut file| {
        file.write_all(&slot.contents)?;
        file.sync_all()
    });
    written.map_err(|error| Failure::writing(out, &error))?;
    Ok(Exported {
        file: out.display().to_string(),
        generation: slot.generation,
        bytes: slot.bytes,
    })
}

impl Report for Exported {
    fn text(&self, _colours: bool) -> String {
        let file = printable(&self.file);
        format!(
            "wrote generation {} to {file}, {}\n",
            self.generation,
            bytes(self.bytes)
        )
    }
}
