//! Programs of Debian's next release, unpacked beside the system.

use std::{fs, path::PathBuf, process::Command};

use anyhow::{Context as _, Result, ensure};

use crate::root;

const SUITE: &str = "sid";

fn folder() -> PathBuf {
    root().join("target/bench-tools")
}

/// Where `program` of `package` is; unpacked once.
///
/// # Errors
///
/// If the package cannot be had, or has no such program.
pub(crate) fn program(package: &str, program: &str) -> Result<PathBuf> {
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
    ensure!(
        path.is_file(),
        "{package} of Debian {SUITE} has no {program}"
    );
    Ok(path)
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
        // Of that release, even if the system has a higher version from elsewhere.
        let wanted = format!("{package}/{SUITE}");
        succeed(download.args(["download", &wanted]).current_dir(&folder))?;
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

/// What a command said that did what it should, and asked nobody anything.
///
/// # Errors
///
/// If it did not.
pub(crate) fn succeed(command: &mut Command) -> Result<String> {
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
