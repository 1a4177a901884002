//! `bpf`: the agent's programs and maps in the kernel, and whether all is there that the data path wants.

use clap::Subcommand;
use mesh_api::admin::{self, BpfRequest, BpfResponse};
use serde::Serialize;

use crate::{
    Verdict,
    connect::{self, Agent, ask},
    failure::{Daemon, Failure},
    preflight::{self, Check, Level, Wanted, check},
    report::{Preflight, some},
    run::Screen,
    show::Report,
    table::{Cell, Tone, bytes, table},
};

/// Of the machine's checks, those that are about programs and maps.
const KERNEL_CHECKS: [&str; 6] = [
    "kernel",
    "machine",
    "BTF",
    "cgroup2",
    "BPF file system",
    "lockdown",
];

/// From here on a map that forgets nothing is nearly full, in percent: what comes next may have no room.
const NEARLY_FULL_PERCENT: u64 = 90;

/// The program that is attached now and then only, by its hook.
const NOW_AND_THEN: &str = "cgroup sock_ops";

#[derive(Debug, Subcommand)]
pub(crate) enum Bpf {
    /// Programs: where each is attached, whether it stays without the agent, how often it ran.
    Progs,
    /// Maps: how many entries each has, of how many, and the memory.
    Maps,
    /// What the kernel has of what the data path wants, and whether programs are where they should be.
    Check,
}

pub(crate) async fn run(
    agent: Agent<'_>,
    command: Bpf,
    screen: Screen,
) -> Result<Verdict, Failure> {
    let entries = matches!(command, Bpf::Maps);
    let mut client = connect::agent(agent).await?;
    let said = ask(Daemon::Agent, client.bpf(BpfRequest { entries })).await?;
    match command {
        Bpf::Progs => screen.show(&Programs::from(said)),
        Bpf::Maps => screen.show(&Maps::from(said)),
        Bpf::Check => {
            let mut checks = Vec::new();
            // Another node's kernel is not this machine's.
            if agent.node.is_none() {
                let wanted = Wanted::default();
                let all = preflight::judge(&preflight::facts::gather(&wanted), &wanted);
                let kernel = all.into_iter();
                checks.extend(kernel.filter(|one| KERNEL_CHECKS.contains(&one.name.as_str())));
            }
            checks.extend(judge(&said));
            screen.show(&Preflight::new(checks))
        }
    }
}

/// `bpf progs`.
#[derive(Debug, Serialize)]
pub(crate) struct Programs {
    /// Whether the kernel counts runs: `sysctl kernel.bpf_stats_enabled=1`, which costs some 20 ns a run.
    pub(crate) counts_runs: bool,
    pub(crate) programs: Vec<Program>,
}

#[derive(Debug, Serialize)]
pub(crate) struct Program {
    /// `services`, `policy` or `mapping`.
    pub(crate) part: String,
    pub(crate) name: String,
    /// `cgroup connect4`, `tcx ingress` and so on.
    pub(crate) hook: String,
    /// As `bpftool prog show id` knows it.
    pub(crate) id: u32,
    /// Of its instructions, hexadecimal.
    pub(crate) tag: String,
    /// `null`: the kernel does not say.
    pub(crate) verified_instructions: Option<u32>,
    /// As machine code; `null`: the kernel interprets it.
    pub(crate) machine_bytes: Option<u32>,
    /// While the kernel counted; `null`: it does not, and did not.
    pub(crate) runs: Option<u64>,
    pub(crate) run_ns: Option<u64>,
    /// Empty: it is loaded, and nothing needs it now.
    pub(crate) places: Vec<Place>,
}

#[derive(Debug, Serialize)]
pub(crate) struct Place {
    /// A cgroup's folder, or an interface's name.
    pub(crate) at: String,
    /// Whether the kernel says so, too.
    pub(crate) attached: bool,
    /// Whether it goes on without the agent; `null`: it is not meant to.
    pub(crate) pinned: Option<bool>,
}

impl From<BpfResponse> for Programs {
    fn from(said: BpfResponse) -> Self {
        let counts_runs = said.counts_runs;
        let place = |one: admin::BpfPlace| Place {
            at: one.at,
            attached: one.attached,
            pinned: one.pinned,
        };
        let program = |one: admin::BpfProgram| {
            let counted = counts_runs || one.runs > 0;
            Program {
                part: one.part,
                name: one.name,
                hook: one.hook,
                id: one.id,
                tag: one.tag,
                verified_instructions: number(one.verified_instructions),
                machine_bytes: number(one.machine_bytes),
                runs: counted.then_some(one.runs),
                run_ns: counted.then_some(one.run_ns),
                places: one.places.into_iter().map(place).collect(),
            }
        };
        Self {
            counts_runs,
            programs: said.programs.into_iter().map(program).collect(),
        }
    }
}

/// The kernel's 0 is "not said".
fn number(said: u32) -> Option<u32> {
    (said > 0).then_some(said)
}

impl Report for Programs {
    fn text(&self, colours: bool) -> String {
        if self.programs.is_empty() {
            return "no program is loaded: services are off, and there is no policy\n".to_owned();
        }
        let mut rows = Vec::new();
        for one in &self.programs {
            let said = |number: Option<u64>| number.map_or("-".to_owned(), |it| it.to_string());
            let each_ns = one.runs.zip(one.run_ns).filter(|(runs, _)| *runs > 0);
            let each_ns = each_ns.map(|(runs, run_ns)| run_ns / runs);
            let row = |at: Cell| {
                vec![
                    (&one.part).into(),
                    (&one.name).into(),
                    (&one.hook).into(),
                    at,
                    one.id.to_string().into(),
                    (&one.tag).into(),
                    said(one.verified_instructions.map(u64::from)).into(),
                    said(one.runs).into(),
                    each_ns
                        .map_or("-".to_owned(), |ns| format!("{ns} ns"))
                        .into(),
                ]
            };
            rows.extend(one.places.iter().map(|place| row(place_cell(place))));
            if one.places.is_empty() {
                rows.push(row(Cell::new("-", Tone::Faint)));
            }
        }
        let head = [
            "PART", "PROGRAM", "HOOK", "AT", "ID", "TAG", "VERIFIED", "RUNS", "EACH",
        ];
        let mut text = table(&head, rows, colours);
        if !self.counts_runs {
            text += "\nruns are not counted: `sysctl kernel.bpf_stats_enabled=1`, for a while\n";
        }
        text
    }

    fn verdict(&self) -> Verdict {
        let mut places = self.programs.iter().flat_map(|one| &one.places);
        match places.any(|place| !place.attached || place.pinned == Some(false)) {
            true => Verdict::Degraded,
            false => Verdict::Ok,
        }
    }
}

fn place_cell(place: &Place) -> Cell {
    match (place.attached, place.pinned) {
        (false, _) => Cell::new(format!("{} (not attached)", place.at), Tone::Bad),
        (true, Some(false)) => Cell::new(format!("{} (not pinned)", place.at), Tone::Warning),
        (true, Some(true)) => Cell::new(format!("{} (pinned)", place.at), Tone::Plain),
        (true, None) => (&place.at).into(),
    }
}

/// `bpf maps`.
#[derive(Debug, Serialize)]
pub(crate) struct Maps {
    pub(crate) maps: Vec<Map>,
}

#[derive(Debug, Serialize)]
pub(crate) struct Map {
    /// As the kernel has it: at most 15 characters.
    pub(crate) name: String,
    /// As `bpftool map show id` knows it.
    pub(crate) id: u32,
    /// `hash`, `lru_hash`, `lpm_trie`, `array` and so on.
    pub(crate) kind: String,
    /// `null`: of its kind all are always there.
    pub(crate) entries: Option<u32>,
    /// Of `ringbuf`, bytes.
    pub(crate) entries_max: u32,
    /// By the kernel's reckoning; `null`: it does not say.
    pub(crate) bytes: Option<u64>,
}

impl From<BpfResponse> for Maps {
    fn from(said: BpfResponse) -> Self {
        let maps = said.maps.into_iter().map(|one| Map {
            name: one.name,
            id: one.id,
            kind: one.kind,
            entries: one.entries,
            entries_max: one.entries_max,
            bytes: one.bytes,
        });
        Self {
            maps: maps.collect(),
        }
    }
}

impl Map {
    /// In percent.
    fn fill(&self) -> Option<u64> {
        let entries = u64::from(self.entries?);
        Some(entries * 100 / u64::from(self.entries_max.max(1)))
    }

    /// What an `lru_hash` has no room for takes the place of what was used longest ago: it may be full.
    fn is_nearly_full(&self) -> bool {
        let forgets = self.kind == "lru_hash";
        !forgets && self.fill().is_some_and(|fill| fill >= NEARLY_FULL_PERCENT)
    }
}

impl Report for Maps {
    fn text(&self, colours: bool) -> String {
        let row = |one: &Map| {
            let tone = match one.is_nearly_full() {
                true => Tone::Warning,
                false => Tone::Plain,
            };
            let entries = one.entries.map_or("-".to_owned(), |it| it.to_string());
            let fill = one
                .fill()
                .map_or("-".to_owned(), |fill| format!("{fill} %"));
            vec![
                (&one.name).into(),
                (&one.kind).into(),
                entries.into(),
                one.entries_max.to_string().into(),
                Cell::new(fill, tone),
                one.bytes.map_or("-".to_owned(), bytes).into(),
                one.id.to_string().into(),
            ]
        };
        let head = ["MAP", "KIND", "ENTRIES", "MAX", "FULL", "MEMORY", "ID"];
        let all: u64 = self.maps.iter().filter_map(|map| map.bytes).sum();
        let maps = table(&head, self.maps.iter().map(row).collect(), colours);
        format!("{maps}\n{} in all\n", bytes(all))
    }

    fn verdict(&self) -> Verdict {
        match self.maps.iter().any(Map::is_nearly_full) {
            true => Verdict::Degraded,
            false => Verdict::Ok,
        }
    }
}

/// Whether programs are where they should be. Pure.
fn judge(said: &BpfResponse) -> Vec<Check> {
    let mut checks: Vec<_> = ["services", "policy", "mapping"]
        .into_iter()
        .flat_map(|part| part_checks(part, said))
        .collect();
    if let Some(why) = some(said.services_unkept.clone()) {
        let text = format!("services end with the agent: {why}");
        checks.push(check("kept", Level::Warning, text));
    }
    let troubled = said.interfaces.iter().filter(|(_, why)| !why.is_empty());
    let troubled =
        troubled.map(|(name, why)| check("interface", Level::Warning, format!("{name}: {why}")));
    checks.extend(troubled);
    let interpreted = said.programs.iter().find(|one| one.machine_bytes == 0);
    if let Some(program) = interpreted {
        let text = format!(
            "{} is interpreted, and slow: `sysctl net.core.bpf_jit_enable=1`, and start the agent again",
            program.name
        );
        checks.push(check("compiler", Level::Warning, text));
    }
    checks
}

fn part_checks(part: &str, said: &BpfResponse) -> Vec<Check> {
    let programs: Vec<_> = said
        .programs
        .iter()
        .filter(|one| one.part == part)
        .collect();
    if programs.is_empty() {
        let why = match part {
            "services" => "not loaded: services are off here (`services = false`)",
            "policy" => "not loaded: nothing is to be enforced here",
            _ => "not loaded: no subnet here has another range in the mesh",
        };
        return vec![check(part, Level::Ok, why)];
    }
    let mut wrong = Vec::new();
    let mut attached = 0;
    for program in &programs {
        let name = &program.name;
        let everywhere = program.hook.starts_with("cgroup ") && program.hook != NOW_AND_THEN;
        if everywhere && program.places.is_empty() {
            let text = format!("{name} is attached nowhere: start the agent again");
            wrong.push(check(part, Level::Error, text));
        }
        for place in &program.places {
            let at = &place.at;
            if !place.attached {
                let text = format!(
                    "{name} is not at {at} any more: somebody took it away, or {at} is gone; start the agent again"
                );
                wrong.push(check(part, Level::Error, text));
            } else if place.pinned == Some(false) {
                let text = format!(
                    "{name} at {at} has lost its name in /sys/fs/bpf: it ends with the agent; start the agent again"
                );
                wrong.push(check(part, Level::Warning, text));
            } else {
                attached += 1;
            }
        }
    }
    if wrong.is_empty() {
        let text = format!(
            "{} programs are loaded, and attached at {attached} places",
            programs.len()
        );
        wrong.push(check(part, Level::Ok, text));
    }
    wrong
}

#[cfg(test)]
mod tests {
    use mesh_api::admin::{BpfPlace, BpfProgram};

    use super::*;

    fn program(hook: &str, places: &[(bool, Option<bool>)]) -> BpfResponse {
        let places = places.iter().map(|&(attached, pinned)| BpfPlace {
            at: "lan0".to_owned(),
            attached,
            pinned,
        });
        let program = BpfProgram {
            part: "services".to_owned(),
            name: "hf_x".to_owned(),
            hook: hook.to_owned(),
            machine_bytes: 1,
            places: places.collect(),
            ..BpfProgram::default()
        };
        BpfResponse {
            programs: vec![program],
            ..BpfResponse::default()
        }
    }

    #[test]
    fn a_program_that_is_not_where_it_should_be_is_named() {
        for (hook, places, level, says) in [
            (
                "tcx ingress",
                &[(true, Some(true))][..],
                Level::Ok,
                "1 places",
            ),
            ("tcx ingress", &[], Level::Ok, "0 places"),
            (NOW_AND_THEN, &[], Level::Ok, "0 places"),
            ("cgroup connect4", &[], Level::Error, "attached nowhere"),
            (
                "tcx ingress",
                &[(false, Some(true))],
                Level::Error,
                "not at lan0 any more",
            ),
            (
                "tcx ingress",
                &[(true, Some(false))],
                Level::Warning,
                "lost its name",
            ),
            ("tcx ingress", &[(true, None)], Level::Ok, "1 places"),
        ] {
            let checks = judge(&program(hook, places));
            assert_eq!(checks[0].level, level, "{hook} {places:?}");
            assert!(checks[0].text.contains(says), "{}", checks[0].text);
            assert_eq!(checks.len(), 3, "{checks:?}");
        }
        let mut slow = program("tcx ingress", &[]);
        slow.programs[0].machine_bytes = 0;
        slow.services_unkept = "no bpffs".to_owned();
        let levels: Vec<_> = judge(&slow).iter().map(|one| one.level).collect();
        assert_eq!(
            levels.iter().filter(|one| **one == Level::Warning).count(),
            2
        );
    }

    #[test]
    fn only_a_map_that_forgets_nothing_is_too_full() {
        let map = |kind: &str, entries| Map {
            name: "hf".to_owned(),
            id: 1,
            kind: kind.to_owned(),
            entries,
            entries_max: 100,
            bytes: None,
        };
        for (kind, entries, full) in [
            ("hash", Some(89), false),
            ("hash", Some(90), true),
            ("lpm_trie", Some(100), true),
            ("lru_hash", Some(100), false),
            ("array", None, false),
        ] {
            assert_eq!(
                map(kind, entries).is_nearly_full(),
                full,
                "{kind} {entries:?}"
            );
        }
    }
}
