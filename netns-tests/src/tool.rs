//! Calls of `ip` and `nft`, and where the lab finds its own binaries.

use std::{
    env, fs,
    io::Write as _,
    path::PathBuf,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};

/// How often [`eventually`] looks again.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// Runs `program` with `input` on its standard input.
///
/// # Errors
///
/// If it cannot be started, or ends with anything but success: its own words, and the input.
pub fn run(program: &str, args: &[&str], input: &str) -> Result<String> {
    let mut child = Command::new(program)
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("start {program} (is it installed?)"))?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(input.as_bytes())?;
    }
    let output = child.wait_with_output()?;
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.success(),
        "{program} {}: {}\n{input}",
        args.join(" "),
        errors.trim()
    );
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Runs lines of `ip` in a namespace.
///
/// # Errors
///
/// If one of them fails.
pub fn ip(netns: &str, batch: &str) -> Result<()> {
    run("ip", &["-n", netns, "-batch", "-"], batch).map(drop)
}

/// Runs an nftables script in a namespace, as one transaction.
///
/// # Errors
///
/// If it does not parse or the kernel refuses it; nothing was changed then.
pub fn nft(netns: &str, script: &str) -> Result<()> {
    run("ip", &["netns", "exec", netns, "nft", "-f", "-"], script).map(drop)
}

/// Finds one of the workspace's binaries beside the running test, bench or `xtask`.
///
/// # Errors
///
/// If it is not there: it has to be built first, as `cargo xtask test` does.
pub fn binary(name: &str) -> Result<PathBuf> {
    let own = env::current_exe().context("find the running executable")?;
    let folder = own.parent().context("the executable has no folder")?;
    let profile = if folder.ends_with("deps") {
        folder.parent()
    } else {
        Some(folder)
    };
    let path = profile
        .context("the executable has no profile folder")?
        .join(name);
    if path.is_file() {
        return Ok(path);
    }
    bail!(
        "{} is not there: run `cargo build --workspace`, or `cargo xtask test`",
        path.display()
    )
}

/// What a command begins with whose clock is off by so much (`+10y`); monotonic time is right, as it is where a clock is
/// wrong. Not through the `faketime` command, which stays in between and passes no signal on.
///
/// # Errors
///
/// If Debian's library for wrong clocks is not there.
pub fn with_clock(offset: &str) -> Result<Vec<String>> {
    // Wherever this architecture has it.
    let folders = fs::read_dir("/usr/lib")?.flatten();
    let mut paths = folders.map(|folder| folder.path().join("faketime/libfaketimeMT.so.1"));
    let library = paths
        .find(|path| path.is_file())
        .context("no libfaketimeMT.so.1: apt-get install faketime")?;
    Ok(vec![
        "env".to_owned(),
        format!("LD_PRELOAD={}", library.display()),
        format!("FAKETIME={offset}"),
        "FAKETIME_DONT_FAKE_MONOTONIC=1".to_owned(),
    ])
}

/// Looks at something until it holds, and says in the error what did not.
///
/// # Errors
///
/// If it does not hold within `limit`; the error carries the last reason that `look` gave.
pub fn eventually<T>(
    what: &str,
    limit: Duration,
    mut look: impl FnMut() -> Result<T>,
) -> Result<T> {
    let start = Instant::now();
    loop {
        let error = match look() {
            Ok(value) => return Ok(value),
            Err(error) => error,
        };
        if start.elapsed() > limit {
            return Err(error.context(format!("{what}: not within {limit:?}")));
        }
        std::thread::sleep(LOOK_EVERY);
    }
}
