//! `cargo xtask instructions`: how many instructions the packet path's inner loops take for a packet.
//! Unlike times, the counts of two commits on one machine can be compared.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};

use crate::{cargo, report, root};

/// Packets that each loop handles in the shorter of two runs; the difference to twice as many is what
/// counts, so that making the input does not.
const PACKETS: u64 = 3_000;

/// Counts, prints, and with `save` keeps it in `docs/bench/`.
///
/// # Errors
///
/// If valgrind is missing or does not understand the program, or the program does not build.
pub(crate) fn run(save: bool) -> Result<bool> {
    let valgrind = said("valgrind", &["--version"])
        .context("valgrind does not start: `apt-get install valgrind`")?;
    let program = build()?;
    let listed = said(&program, &[])?;
    let mut rows = Vec::new();
    for line in listed.lines() {
        let (packets, name) = line.split_once(' ').context("the program's list")?;
        let packets: u64 = packets.parse()?;
        let turns = PACKETS.div_ceil(packets);
        let count = |turns| count(&program, name, turns);
        let (once, twice) = (count(turns)?, count(2 * turns)?);
        let each = twice.saturating_sub(once) / (turns * packets);
        eprintln!("{name}: {each}");
        rows.push(vec![name.to_owned(), each.to_string()]);
    }
    let table = report::table(&["loop", "instructions for a packet"], &rows);
    println!("{table}");
    if save {
        keep(&table, &valgrind)?;
    }
    Ok(!rows.is_empty())
}

fn build() -> Result<PathBuf> {
    let words = [
        "build",
        "--release",
        "-p",
        "mesh-tunnel",
        "--example",
        "instructions",
    ];
    let status = cargo(&words).status().context("start cargo")?;
    ensure!(status.success(), "cargo {} failed", words.join(" "));
    let target =
        env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from);
    Ok(target.join("release/examples/instructions"))
}

/// Instructions of a whole run.
fn count(program: &Path, name: &str, turns: u64) -> Result<u64> {
    let output = Command::new("valgrind")
        .args(["--tool=callgrind", "--callgrind-out-file=/dev/null"])
        .arg(program)
        .args([name, &turns.to_string()])
        .output()
        .context("start valgrind")?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.success(),
        "{name} fails under valgrind (an unknown instruction, if it says SIGILL):\n{said}"
    );
    collected(&said).with_context(|| format!("valgrind counted nothing for {name}:\n{said}"))
}

/// The number in `==123== Collected : 456`.
fn collected(said: &str) -> Option<u64> {
    let line = said.lines().find_map(|line| line.split_once("Collected :"));
    line?.1.trim().parse().ok()
}

fn keep(table: &str, valgrind: &str) -> Result<()> {
    let folder = root().display().to_string();
    let commit = said("git", &["-C", &folder, "describe", "--always", "--dirty"])?;
    let rustc = said("rustc", &["--version"])?;
    let cpu = fs::read_to_string("/proc/cpuinfo")?;
    let cpu = cpu
        .lines()
        .find_map(|line| line.strip_prefix("model name\t: "))
        .unwrap_or("unknown processor");
    let text = format!(
        "# instructions\n\n\
         Commit {commit}; {rustc}, release profile; {valgrind} on {cpu}.\n\
         Made by `cargo xtask instructions --save`. Counts of two commits can be compared if the toolchain and the kind of\n\
         processor are the same: `ring` chooses its code by what valgrind says the processor can do, which is AVX2 at most.\n\
         `open` includes the copy of what it opens. An instruction is not a time: the cipher's do 32 bytes each.\n\n\
         ```text\n{table}\n```\n"
    );
    let path = root().join("docs/bench/instructions.md");
    fs::write(&path, text).with_context(|| format!("write {}", path.display()))
}

fn said(program: impl AsRef<Path>, words: &[&str]) -> Result<String> {
    let program = program.as_ref();
    let output = Command::new(program).args(words).output();
    let output = output.with_context(|| format!("start {}", program.display()))?;
    ensure!(output.status.success(), "{} failed", program.display());
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_valgrind_says_at_its_end_is_found() {
        let said = "==7== Callgrind, a call-graph generating cache profiler\n\
                    ==7== Events    : Ir\n==7== Collected : 123456\n==7==\n";
        assert_eq!(collected(said), Some(123_456));
        assert_eq!(collected("==7== Process terminating"), None);
    }
}
