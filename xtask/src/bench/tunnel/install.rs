//! Gets the programs that are measured: the workspace's own, crates, Debian packages, and packages of
//! Debian's next release, unpacked beside the system.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};

use crate::{cargo, root, setup};

/// Where Debian's next release is.
const SUITE: &str = "sid";

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

/// A program of Debian's next release, unpacked beside the system once. Go programs want nothing but a
/// C library that is older than this machine's.
pub(super) fn from_sid(package: &str, program: &str, version_word: &str) -> Result<Tool> {
    let unpacked = folder().join(SUITE).join(package);
    let path = unpacked.join("usr/bin").join(program);
    if !path.is_file() {
        eprintln!("unpacking {package} of Debian {SUITE} …");
        let apt = Apt::new()?;
        let archive = apt.download(package)?;
        fs::create_dir_all(&unpacked)?;
        let mut unpack = Command::new("dpkg");
        unpack.arg("--extract").arg(archive).arg(&unpacked);
        succeed(&mut unpack)?;
    }
    Tool::ask(path, version_word)
}

/// `apt-get` with folders of its own: what it knows of another release must not reach the system's.
struct Apt {
    folder: PathBuf,
}

impl Apt {
    fn new() -> Result<Self> {
        let apt = Self {
            folder: folder().join("apt"),
        };
        for part in ["lists/partial", "cache/archives/partial", "packages"] {
            fs::create_dir_all(apt.folder.join(part))?;
        }
        let source = format!("deb {} {SUITE} main\n", mirror()?);
        fs::write(apt.folder.join("sources.list"), source)?;
        Ok(apt)
    }

    fn command(&self) -> Command {
        let at = |key: &str, part: &str| format!("{key}={}", self.folder.join(part).display());
        let options = [
            at("Dir::Etc::SourceList", "sources.list"),
            "Dir::Etc::SourceParts=-".to_owned(),
            at("Dir::State::Lists", "lists"),
            at("Dir::Cache", "cache"),
            "Acquire::Languages=none".to_owned(),
            "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false".to_owned(),
            "APT::Sandbox::User=root".to_owned(), // Others may not read this folder.
        ];
        let mut command = Command::new("apt-get");
        command.arg("--quiet");
        for option in options {
            command.args(["--option", &option]);
        }
        command
    }

    /// The archive of a package, checked against the release's signature by `apt-get`.
    fn download(&self, package: &str) -> Result<PathBuf> {
        succeed(self.command().arg("update"))?;
        let folder = self.folder.join("packages");
        let mut download = self.command();
        succeed(download.args(["download", package]).current_dir(&folder))?;
        let prefix = format!("{package}_");
        let is_it = |entry: &fs::DirEntry| {
            let name = entry.file_name();
            name.to_string_lossy().starts_with(&prefix)
        };
        let found = fs::read_dir(&folder)?.flatten().find(is_it);
        Ok(found.context("apt-get download left no archive")?.path())
    }
}

/// Where this machine's own Debian packages come from.
fn mirror() -> Result<String> {
    let mut ask = Command::new("apt-get");
    ask.args(["indextargets", "--format", "$(REPO_URI)"]);
    ask.args(["Created-By: Packages", "Label: Debian"]);
    let mut said = succeed(&mut ask)?;
    if said.is_empty() {
        // Container images come without lists.
        succeed(Command::new("apt-get").args(["--quiet", "update"]))?;
        said = succeed(&mut ask)?;
    }
    let first = said.lines().next().map(str::to_owned);
    first.context("no repository of Debian's is configured in /etc/apt")
}

fn succeed(command: &mut Command) -> Result<String> {
    let output = command.env("DEBIAN_FRONTEND", "noninteractive").output();
    let output = output.with_context(|| format!("start {command:?}"))?;
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.success(),
        "{command:?}: {}: {}",
        output.status,
        errors.trim()
    );
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
