//! What tests of benches need.

use std::{path::Path, process::Command};

use serde_json::Value;

/// What one round of a bench says of some cases, with the binaries beside this one: a figure a line; and as it was
/// said. No case failed.
pub(crate) fn measured(bench: &str, cases: &str) -> (Vec<Value>, String) {
    let program = env!("CARGO_BIN_EXE_xtask");
    let bins = Path::new(program).parent().unwrap();
    let mut command = Command::new(program);
    command.args(["bench", bench, "--json", "--rounds", "1"]);
    command.args(["--only", cases, "--bins"]).arg(bins);
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}\n{errors}");
    let lines: Vec<Value> = said
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert!(
        !lines.iter().any(|line| line.get("error").is_some()),
        "{said}"
    );
    (lines, said)
}
