//! `cargo xtask test`: every check and every test, in one table.

use std::{
    collections::BTreeMap,
    env,
    ffi::{OsStr, OsString},
    fs::File,
    io::{Read as _, Seek as _},
    iter,
    path::PathBuf,
    process::{Command, Stdio},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use netns_tests::node::tail;
use serde_json::Value;

use crate::{cargo, report, setup, tidy, wireguard_netns};

/// A test executable that takes longer hangs. The whole of CI has 30 minutes.
const LIMIT: Duration = Duration::from_secs(10 * 60);

/// How often a running test executable is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// Namespace scenarios at the same time: more would measure each other on two cores.
const SCENARIOS_AT_ONCE: &str = "--test-threads=2";

/// Tests of one run that may be asked a second time, alone: if each of 1,500, on real clocks and kernels and two cores that
/// others use too, failed once in 500 runs, then nineteen runs in twenty would fail. More than this is no chance. What was
/// unsteady is named at the end with what it said, and nightly nothing is asked twice.
const SECOND_TRIES: usize = 3;

/// One line of the table.
struct Row {
    what: String,
    passed: u64,
    failed: u64,
    time: Duration,
    /// Shown when something failed.
    said: String,
}

impl Row {
    /// Says at once how it went, for who is waiting.
    fn announced(self) -> Self {
        let mark = if self.failed == 0 { "ok" } else { "FAILED" };
        eprintln!("{mark:>6}  {} ({})", self.what, report::took(self.time));
        self
    }
}

/// Runs everything; says whether all of it passed.
///
/// # Errors
///
/// If the machine is not fit for it, or the tests do not build.
pub(crate) fn run(nightly: bool) -> Result<bool> {
    setup::ready()?;
    setup::wireguard_peers()?;
    setup::resolved()?;
    let path = path_with(setup::kubectl()?)?;
    let clippy = "clippy --quiet --workspace --all-targets -- -D warnings";
    let mut rows = vec![
        check("format", "fmt --all --check"),
        check("clippy", clippy),
        tidy_row(),
    ];
    let built = Instant::now();
    let programs = match build_all().and_then(|()| test_programs()) {
        Ok(programs) => programs,
        Err(error) => {
            rows.push(Row {
                what: "build".to_owned(),
                passed: 0,
                failed: 1,
                time: built.elapsed(),
                said: format!("{error:#}: its messages are above"),
            });
            return Ok(finish(&rows));
        }
    };
    let mut unsteady = Vec::new();
    let mut tries = if nightly { 0 } else { SECOND_TRIES };
    for (program, mut row) in run_programs(&programs, &path, nightly) {
        let names = failed_tests(&row.said);
        if (1..=tries).contains(&names.len()) && names.len() as u64 == row.failed {
            tries -= names.len();
            unsteady.extend(second_tries(program, &path, &names, &mut row));
        }
        rows.push(row);
    }
    if nightly {
        rows.push(netns_row());
    }
    let doc = cargo(&["test", "--workspace", "--doc", "--no-fail-fast", "--quiet"]);
    rows.push(count("documentation examples", doc, true));
    for name in unsteady {
        println!("unsteady, failed at first, to be mended: {name}");
    }
    Ok(finish(&rows))
}

/// Runs scenarios and the other tests beside each other: both wait for clocks and the kernel more than they compute.
fn run_programs<'a>(
    programs: &'a [TestProgram],
    path: &OsStr,
    nightly: bool,
) -> Vec<(&'a TestProgram, Row)> {
    let (sender, receiver) = mpsc::channel();
    thread::scope(|scope| {
        for scenarios in [false, true] {
            let sender = sender.clone();
            scope.spawn(move || {
                let rounds = if nightly && scenarios { 3 } else { 1 };
                let lane = programs.iter().filter(|one| one.scenario == scenarios);
                for program in lane.flat_map(|one| iter::repeat_n(one, rounds)) {
                    let row = run_tests(program, path, nightly);
                    if sender.send((program, row)).is_err() {
                        return;
                    }
                }
            });
        }
        drop(sender);
        receiver.into_iter().collect()
    })
}

/// Runs what failed again, each test alone; says which passed now. What they said at first is printed, so that it can be mended.
fn second_tries(
    program: &TestProgram,
    path: &OsStr,
    names: &[String],
    row: &mut Row,
) -> Vec<String> {
    println!(
        "\n──── {}, at first ────\n{}",
        row.what,
        row.said.trim_end()
    );
    let mut passed = Vec::new();
    for name in names {
        let mut command = test_command(program, path);
        command.args(["--exact", name]);
        let again = count(name, command, true);
        row.time += again.time;
        if (again.passed, again.failed) == (1, 0) {
            row.passed += 1;
            row.failed -= 1;
            passed.push(format!("{}: {name}", program.what));
        } else {
            row.said = again.said;
        }
    }
    passed
}

/// The names in the list of failures with which libtest ends.
fn failed_tests(said: &str) -> Vec<String> {
    let mut lines = said.lines().rev();
    lines
        .by_ref()
        .find(|line| line.starts_with("test result: FAILED"));
    let names = lines
        .skip_while(|line| line.is_empty())
        .map_while(|line| line.strip_prefix("    "));
    names.map(str::to_owned).collect()
}

/// Where programs are looked for: in this folder first.
fn path_with(first: Option<PathBuf>) -> Result<OsString> {
    let others = env::var_os("PATH").unwrap_or_default();
    let all = first.into_iter().chain(env::split_paths(&others));
    env::join_paths(all).context("PATH")
}

fn finish(rows: &[Row]) -> bool {
    for row in rows.iter().filter(|row| row.failed > 0) {
        println!("\n──── {} ────\n{}", row.what, row.said.trim_end());
    }
    let cells = rows.iter().map(|row| {
        vec![
            row.what.clone(),
            row.passed.to_string(),
            row.failed.to_string(),
            report::took(row.time),
        ]
    });
    let cells: Vec<_> = cells.collect();
    println!(
        "\n{}",
        report::table(&["what ran", "passed", "failed", "time"], &cells)
    );
    let passed: u64 = rows.iter().map(|row| row.passed).sum();
    let failed: u64 = rows.iter().map(|row| row.failed).sum();
    println!("skipped: 0 (what cannot run fails)");
    println!("{passed} passed, {failed} failed");
    failed == 0 && passed > 0
}

/// A command that passes or fails as a whole.
fn check(what: &str, words: &str) -> Row {
    let words: Vec<_> = words.split(' ').collect();
    count(what, cargo(&words), false)
}

fn tidy_row() -> Row {
    let start = Instant::now();
    let results = tidy::check_all();
    let failed: Vec<_> = results
        .iter()
        .filter(|(_, problems)| !problems.is_empty())
        .collect();
    Row {
        what: "tidy".to_owned(),
        passed: (results.len() - failed.len()) as u64,
        failed: failed.len() as u64,
        time: start.elapsed(),
        said: failed
            .iter()
            .flat_map(|(_, problems)| problems.iter())
            .fold(String::new(), |all, line| all + line + "\n"),
    }
    .announced()
}

/// WireGuard's own script: it comes with 140 MB of other things, so only nightly.
fn netns_row() -> Row {
    let start = Instant::now();
    let (held, said) = match wireguard_netns::run(None, 1) {
        Ok(held) => (held, "what it said is above".to_owned()),
        Err(error) => (false, format!("{error:#}")),
    };
    Row {
        what: "WireGuard's netns.sh".to_owned(),
        passed: held.into(),
        failed: (!held).into(),
        time: start.elapsed(),
        said,
    }
    .announced()
}

/// Binaries and tests in one step: tests want more features of some crates, and apart half of all would be built twice.
fn build_all() -> Result<()> {
    let status = cargo(&["build", "--workspace", "--bins", "--tests"]).status();
    ensure!(
        status.context("start cargo")?.success(),
        "the workspace does not build"
    );
    Ok(())
}

struct TestProgram {
    what: String,
    path: PathBuf,
    folder: PathBuf,
    scenario: bool,
}

/// Builds every test once, in one feature set, and says where the executables are.
fn test_programs() -> Result<Vec<TestProgram>> {
    let mut command = cargo(&[
        "test",
        "--workspace",
        "--no-run",
        "--message-format=json-render-diagnostics",
    ]);
    let output = command
        .stderr(Stdio::inherit())
        .output()
        .context("start cargo")?;
    ensure!(output.status.success(), "the tests do not build");
    let lines = String::from_utf8_lossy(&output.stdout);
    let mut programs = BTreeMap::new();
    for line in lines.lines() {
        let message: Value =
            serde_json::from_str(line).with_context(|| format!("cargo said {line}"))?;
        let text = |pointer: &str| message.pointer(pointer).and_then(Value::as_str);
        let is_test = message.pointer("/profile/test").and_then(Value::as_bool) == Some(true);
        let (true, Some(path), Some(manifest), Some(target)) = (
            is_test,
            text("/executable"),
            text("/manifest_path"),
            text("/target/name"),
        ) else {
            continue;
        };
        let folder = PathBuf::from(manifest)
            .parent()
            .map(PathBuf::from)
            .unwrap_or_default();
        let kind = text("/target/kind/0").unwrap_or_default();
        let name = folder
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        let what = if kind == "test" {
            format!("{name}, tests/{target}")
        } else {
            format!("{name}, {kind}")
        };
        let scenario = name == "netns-tests" && kind == "test";
        programs.insert(
            (scenario, what.clone()),
            TestProgram {
                what,
                path: path.into(),
                folder,
                scenario,
            },
        );
    }
    Ok(programs.into_values().collect())
}

fn test_command(program: &TestProgram, path: &OsStr) -> Command {
    let mut command = Command::new(&program.path);
    command
        .current_dir(&program.folder)
        .env("CARGO_MANIFEST_DIR", &program.folder)
        .env("PATH", path);
    command
}

fn run_tests(program: &TestProgram, path: &OsStr, nightly: bool) -> Row {
    let mut command = test_command(program, path);
    if program.scenario {
        command.arg(SCENARIOS_AT_ONCE);
    }
    if nightly {
        command
            .env("HOLDFAST_NIGHTLY", "1")
            .env("PROPTEST_CASES", "10000");
    }
    count(&program.what, command, true)
}

/// Runs a command to its end, with its output kept for the case that it fails.
fn count(what: &str, command: Command, tests: bool) -> Row {
    let start = Instant::now();
    let (ok, said) = match run_captured(command) {
        Ok(result) => result,
        Err(error) => (false, format!("{error:#}")),
    };
    let (mut passed, mut failed) = if tests { results(&said) } else { (0, 0) };
    if !tests && ok {
        passed = 1;
    }
    if !ok && failed == 0 {
        failed = 1; // It crashed, hung, or is a plain check.
    }
    Row {
        what: what.to_owned(),
        passed,
        failed,
        time: start.elapsed(),
        said,
    }
    .announced()
}

fn run_captured(mut command: Command) -> Result<(bool, String)> {
    let mut file = tempfile::tempfile()?;
    command
        .stdin(Stdio::null())
        .stdout(file.try_clone()?)
        .stderr(file.try_clone()?);
    let mut child = command
        .spawn()
        .with_context(|| format!("start {command:?}"))?;
    let start = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if start.elapsed() > LIMIT {
            child.kill()?;
            child.wait()?;
            let said = read_again(&mut file)?;
            return Ok((false, format!("{}\nkilled after {LIMIT:?}", tail(&said))));
        }
        thread::sleep(LOOK_EVERY);
    };
    Ok((status.success(), read_again(&mut file)?))
}

fn read_again(file: &mut File) -> Result<String> {
    let mut bytes = Vec::new();
    file.rewind()?;
    file.read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// The sum of libtest's result lines. What was ignored did not run: it counts as failed.
fn results(said: &str) -> (u64, u64) {
    let mut sum = (0, 0);
    for line in said.lines().filter(|line| line.starts_with("test result:")) {
        let number = |word: &str| {
            let mut words = line
                .split([' ', ';', '.'])
                .filter(|word| !word.is_empty())
                .collect::<Vec<_>>()
                .into_iter()
                .rev();
            words.find(|found| *found == word);
            words
                .next()
                .and_then(|number| number.parse::<u64>().ok())
                .unwrap_or(0)
        };
        sum.0 += number("passed");
        sum.1 += number("failed") + number("ignored");
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_are_summed_and_ignored_tests_count_as_failed() {
        let said = "test result: ok. 17 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 4.69s\n\
                    noise\n\
                    test result: FAILED. 2 passed; 3 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.01s\n";
        assert_eq!(results(said), (19, 4));
    }

    #[test]
    fn the_names_of_what_failed_are_found() {
        let said = "test a::one ... ok\ntest a::two ... FAILED\n\nfailures:\n\n---- a::two stdout ----\n\n    noise\n\n\
                    failures:\n    a::two\n    b::three\n\n\
                    test result: FAILED. 1 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out; finished in 1s\n\n";
        assert_eq!(failed_tests(said), ["b::three", "a::two"]);
        assert!(failed_tests("test result: ok. 17 passed; 0 failed; 0 ignored").is_empty());
        assert!(failed_tests("killed after 600s").is_empty());
    }

    #[test]
    fn a_crash_is_one_failure() {
        let mut command = Command::new("sh");
        command.args(["-c", "kill -9 $$"]);
        let row = count("crash", command, true);
        assert_eq!((row.passed, row.failed), (0, 1));
    }

    #[test]
    fn nothing_run_is_not_success() {
        assert!(!finish(&[]));
    }
}
