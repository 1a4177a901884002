//! Gets the programs that are measured: the workspace's own, crates, Debian packages.

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};

use crate::{cargo, root, setup, sid};

/// What makes `mesh-tunnel` leave the payload as it is. No build of the product sets it.
const NO_CIPHER: &str = "--cfg holdfast_bench_no_cipher";

/// A program that is there, and what it says of its version.
#[derive(Debug, Clone)]
pub(super) struct Tool {
    pub(super) program: PathBuf,
    pub(super) version: String,
}

impl Tool {
    /// Takes the line of what `program` says to `word` that has a number in it.
    fn ask(program: PathBuf, word: &str) -> Result<Self> {
        let output = Command::new(&program).arg(word).output();
        let output = output.with_context(|| format!("start {}", program.display()))?;
        let said = [output.stdout, output.stderr].concat();
        let said = String::from_utf8_lossy(&said).into_owned();
        let line = said
            .lines()
            .find(|line| line.contains(|c: char| c.is_ascii_digit()));
        let version = line.with_context(|| format!("{} {word}: {said}", program.display()))?;
        let version = version.split(" [").next().unwrap_or(version).to_owned();
        Ok(Self { program, version })
    }

    pub(super) fn path(&self) -> String {
        self.program.display().to_string()
    }
}

fn folder() -> PathBuf {
    root().join("target/bench-tools")
}

/// `mesh-tunnel` of the build that is measured.
pub(super) fn own(bins: &Path) -> Result<Tool> {
    let program = bins.join("mesh-tunnel");
    Tool::ask(program, "--version")
}

/// `mesh-tunnel` built without its cipher, in a target folder of its own: no such binary ever lies where
/// the product's are.
pub(super) fn own_without_cipher() -> Result<Tool> {
    let target = root().join("target/bench-no-cipher");
    eprintln!("building mesh-tunnel without its cipher …");
    let mut build = cargo(&["build", "--quiet", "--release", "--package", "mesh-tunnel"]);
    build
        .args(["--bin", "mesh-tunnel", "--target-dir"])
        .arg(&target)
        .env("RUSTFLAGS", NO_CIPHER);
    let output = build.output().context("start cargo")?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "build it: {}", said.trim());
    let tool = Tool::ask(target.join("release/mesh-tunnel"), "--version")?;
    let version = format!("{}, built with {NO_CIPHER}", tool.version);
    Ok(Tool { version, ..tool })
}

/// A program of crates.io, installed once.
pub(super) fn from_crates(package: &str, program: &str) -> Result<Tool> {
    let path = folder().join("bin").join(program);
    if !path.is_file() {
        eprintln!("installing {package} …");
        let mut install = cargo(&["install", "--quiet", "--locked", "--root"]);
        let output = install.arg(folder()).arg(package).output()?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(
            output.status.success(),
            "cargo install {package}: {}",
            said.trim()
        );
    }
    Tool::ask(path, "--version")
}

/// A program of this machine's own Debian, installed if it is missing.
pub(super) fn from_debian(package: &'static str, program: &'static str) -> Result<Tool> {
    setup::install(&[(program, package)])?;
    let path = env::var_os("PATH").unwrap_or_default();
    let found = env::split_paths(&path).map(|folder| folder.join(program));
    let found = found.into_iter().find(|path| path.is_file());
    Tool::ask(found.context(program)?, "--version")
}

/// A program of Debian's next release. Go programs want nothing but a C library that is older than this machine's.
pub(super) fn from_sid(package: &str, program: &str, version_word: &str) -> Result<Tool> {
    Tool::ask(sid::program(package, program)?, version_word)
}
