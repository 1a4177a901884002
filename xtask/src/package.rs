//! `cargo xtask package`: what is installed. Binaries that need nothing but a kernel, Debian packages and images made of them.

use std::{
    collections::BTreeSet,
    fs, io,
    os::unix::fs::{PermissionsExt as _, symlink},
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail, ensure};

use crate::{cargo, root};

/// The binaries that are installed anywhere, and the packages of the workspace that have them.
const BINARIES: [(&str, &str); 6] = [
    ("mesh-agent", "mesh-agent"),
    ("mesh-cni", "mesh-cni"),
    ("mesh-controller", "mesh-controller"),
    ("mesh-relay", "mesh-relay"),
    ("meshctl", "meshctl"),
    (LAB, "netns-tests"),
];

/// Makes the meshes of `meshctl lab`. It is in no image: a mesh in namespaces is of a machine.
const LAB: &str = "lab";

/// Targets of `deploy/images/Containerfile`, and the name of each one's image.
const IMAGES: [(&str, &str); 5] = [
    ("agent", "holdfast-agent"),
    ("cni", "holdfast-cni"),
    ("controller", "holdfast-controller"),
    ("relay", "holdfast-relay"),
    ("meshctl", "holdfast-meshctl"),
];

/// An agent larger than this is a mistake: a gateway has 8 GB of flash, and gets it by 3 Mb/s.
const AGENT_BYTES_MAX: u64 = 25_000_000;

/// A Debian package.
struct Package {
    name: &'static str,
    about: &'static str,
    binaries: &'static [&'static str],
    daemon: Option<Daemon>,
}

/// What there is beside a program that systemd starts.
struct Daemon {
    /// Its unit, without `.service`.
    unit: &'static str,
    /// In `examples/`.
    example: &'static str,
    /// What a purge takes away.
    state: &'static str,
}

const PACKAGES: [Package; 4] = [
    Package {
        name: "holdfast-agent",
        about: "Mesh data plane: the agent of a node, and meshctl",
        binaries: &["mesh-agent", "meshctl"],
        daemon: Some(Daemon {
            unit: "mesh-agent",
            example: "agent.toml",
            state: "/var/lib/holdfast",
        }),
    },
    Package {
        name: "holdfast-controller",
        about: "Mesh data plane: the controller of a mesh",
        binaries: &["mesh-controller"],
        daemon: Some(Daemon {
            unit: "mesh-controller",
            example: "controller.toml",
            state: "/var/lib/holdfast-controller",
        }),
    },
    Package {
        name: "holdfast-relay",
        about: "Mesh data plane: a relay for nodes behind NAT",
        binaries: &["mesh-relay"],
        daemon: Some(Daemon {
            unit: "mesh-relay",
            example: "relay.toml",
            state: "/etc/holdfast/relay",
        }),
    },
    Package {
        name: "holdfast-lab",
        about: "Mesh data plane: meshes in network namespaces, for meshctl lab",
        binaries: &[LAB],
        daemon: None,
    },
];

/// Where `lab` is, and finds the others beside itself; not in everybody's `PATH`.
const LAB_FOLDER: &str = "usr/lib/holdfast";

/// The programs that `lab` starts, and the packages that have them.
const STARTED_BY_LAB: [(&str, &str); 4] = [
    ("mesh-agent", "holdfast-agent"),
    ("meshctl", "holdfast-agent"),
    ("mesh-controller", "holdfast-controller"),
    ("mesh-relay", "holdfast-relay"),
];

/// What to make.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum What {
    /// Static binaries.
    Binaries,
    /// Debian packages.
    Deb,
    /// Container images, by `buildah`, as archives.
    Images,
}

/// A machine that packages are for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Machine {
    Amd64,
    Arm64,
}

impl Machine {
    /// As Debian and container images call it.
    fn name(self) -> &'static str {
        match self {
            Self::Amd64 => "amd64",
            Self::Arm64 => "arm64",
        }
    }

    /// Takes symbols off its programs (binutils, for the other machine its cross variant).
    fn strip(self) -> &'static str {
        match self {
            _ if self.is_this() => "strip",
            Self::Amd64 => "x86_64-linux-gnu-strip",
            Self::Arm64 => "aarch64-linux-gnu-strip",
        }
    }

    fn is_this(self) -> bool {
        self.target().starts_with(std::env::consts::ARCH)
    }

    fn target(self) -> &'static str {
        match self {
            Self::Amd64 => "x86_64-unknown-linux-gnu",
            Self::Arm64 => "aarch64-unknown-linux-gnu",
        }
    }
}

/// Makes it, from the binaries in `bins` or from ones built for the purpose, and says where it is.
///
/// # Errors
///
/// If a tool is missing, or fails.
pub(crate) fn run(what: What, machine: Machine, bins: Option<PathBuf>) -> Result<bool> {
    let out = root().join("target/package");
    let staged = out.join(machine.name());
    fs::create_dir_all(&staged).with_context(|| format!("make {}", staged.display()))?;
    let is_release = bins.is_none();
    let bins = bins.map_or_else(|| build(machine), Ok)?;
    let wanted = BINARIES.iter().map(|&(binary, _)| binary);
    let wanted = wanted.filter(|&binary| what != What::Images || binary != LAB);
    for binary in wanted.clone() {
        let mut strip = Command::new(machine.strip());
        strip
            .arg("-o")
            .arg(staged.join(binary))
            .arg(bins.join(binary));
        done(strip)?;
    }
    let agent = staged.join("mesh-agent");
    let bytes = fs::metadata(&agent).context("size of mesh-agent")?.len();
    ensure!(
        !is_release || bytes < AGENT_BYTES_MAX,
        "mesh-agent has {bytes} bytes, at most {AGENT_BYTES_MAX} are allowed"
    );
    let made = match what {
        What::Binaries => wanted.map(|binary| staged.join(binary)).collect(),
        What::Deb => PACKAGES
            .iter()
            .map(|package| deb(package, &staged, &out, machine))
            .collect::<Result<Vec<_>>>()?,
        What::Images => {
            for binary in wanted {
                is_static(&staged.join(binary))?;
            }
            let images = IMAGES.iter();
            let images = images.map(|(target, image)| build_image(target, image, &out, machine));
            images.collect::<Result<Vec<_>>>()?
        }
    };
    for path in made {
        let bytes = fs::metadata(&path).with_context(|| path.display().to_string())?;
        println!("{} ({} KiB)", path.display(), bytes.len() >> 10);
    }
    Ok(true)
}

/// Static ones: they run in an empty image, and on any distribution.
fn build(machine: Machine) -> Result<PathBuf> {
    let target = machine.target();
    let mut words = vec!["build", "--release", "--locked", "--target", target];
    for (_, package) in BINARIES {
        words.extend(["-p", package]);
    }
    eprintln!("building static binaries for {target} …");
    let mut command = cargo(&words);
    command.env("RUSTFLAGS", "-C target-feature=+crt-static");
    done(command)?;
    Ok(root().join("target").join(target).join("release"))
}

fn install(from: &Path, to: &Path, mode: u32) -> Result<()> {
    fs::copy(from, to).with_context(|| format!("copy {} to {}", from.display(), to.display()))?;
    fs::set_permissions(to, fs::Permissions::from_mode(mode))?;
    Ok(())
}

fn deb(package: &Package, staged: &Path, out: &Path, machine: Machine) -> Result<PathBuf> {
    let version = env!("CARGO_PKG_VERSION");
    let tree = tempfile::tempdir().context("make a temporary folder")?;
    let tree = tree.path();
    let documents = tree.join("usr/share/doc").join(package.name);
    for folder in [&tree.join("DEBIAN"), &documents] {
        fs::create_dir_all(folder)?;
    }
    install(&root().join("LICENSE"), &documents.join("copyright"), 0o644)?;
    let programs = tree.join(match package.daemon {
        Some(_) => "usr/bin",
        None => LAB_FOLDER,
    });
    fs::create_dir_all(&programs)?;
    for binary in package.binaries {
        install(&staged.join(binary), &programs.join(binary), 0o755)?;
    }
    let needs = match &package.daemon {
        Some(daemon) => {
            add_daemon(daemon, tree, &documents)?;
            String::new()
        }
        None => {
            for (program, _) in STARTED_BY_LAB {
                symlink(format!("/usr/bin/{program}"), programs.join(program))?;
            }
            let packages = STARTED_BY_LAB.map(|(_, package)| format!("{package} (= {version})"));
            let packages = BTreeSet::from(packages).into_iter().collect::<Vec<_>>();
            let packages = packages.join(", ");
            format!(
                "Depends: {packages}\nRecommends: conntrack, iproute2, iputils-ping, nftables\n"
            )
        }
    };
    let control = format!(
        "Package: {}\nVersion: {version}\nArchitecture: {}\nSection: net\nPriority: optional\n\
         Maintainer: Holdfast <holdfast@localhost>\n{needs}Description: {}\n",
        package.name,
        machine.name(),
        package.about
    );
    fs::write(tree.join("DEBIAN/control"), control)?;
    let path = out.join(format!("{}_{version}_{}.deb", package.name, machine.name()));
    let mut command = Command::new("dpkg-deb");
    command.args(["--root-owner-group", "--build"]);
    command.arg(tree).arg(&path);
    done(command)?;
    Ok(path)
}

/// Its unit, an example of its configuration, and what dpkg runs.
fn add_daemon(daemon: &Daemon, tree: &Path, documents: &Path) -> Result<()> {
    let deploy = root().join("deploy");
    let (units, unit) = (
        tree.join("usr/lib/systemd/system"),
        format!("{}.service", daemon.unit),
    );
    fs::create_dir_all(&units)?;
    install(
        &deploy.join("systemd").join(&unit),
        &units.join(&unit),
        0o644,
    )?;
    install(
        &root().join("examples").join(daemon.example),
        &documents.join(daemon.example),
        0o644,
    )?;
    for script in ["postinst", "prerm", "postrm"] {
        let text = fs::read_to_string(deploy.join("debian").join(script))?;
        let text = text.replace("@UNIT@", daemon.unit);
        let text = text.replace("@STATE@", &format!("\"$DPKG_ROOT{}\"", daemon.state));
        let path = tree.join("DEBIAN").join(script);
        fs::write(&path, text)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    }
    Ok(())
}

/// Refuses a program that asks for a loader (its ELF header has `PT_INTERP`): there is none in an empty image.
fn is_static(program: &Path) -> Result<()> {
    let mut readelf = Command::new("readelf");
    let output = readelf.args(["-l", "-W"]).arg(program).output();
    let output = output.context("run readelf: install the Debian package binutils")?;
    let headers = String::from_utf8_lossy(&output.stdout);
    ensure!(
        output.status.success() && headers.contains("LOAD"),
        "readelf cannot read {}: {}",
        program.display(),
        String::from_utf8_lossy(&output.stderr)
    );
    ensure!(
        !headers.contains("INTERP"),
        "{} needs libraries, and an image has none: leave --bins out, or give static binaries",
        program.display()
    );
    Ok(())
}

fn build_image(target: &str, image: &str, out: &Path, machine: Machine) -> Result<PathBuf> {
    let version = env!("CARGO_PKG_VERSION");
    let tag = format!("{image}:{version}");
    let archive = out.join(format!("{image}_{version}_{}.tar", machine.name()));
    // Buildah's own storage would be left behind: this one goes with the command.
    let storage = tempfile::tempdir().context("make a temporary folder")?;
    let buildah = || {
        let mut command = Command::new("buildah");
        command.arg("--root").arg(storage.path().join("root"));
        command.arg("--runroot").arg(storage.path().join("run"));
        command.args(["--storage-driver", "vfs"]);
        command
    };
    let mut command = buildah();
    let platform = format!("linux/{}", machine.name());
    command.args(["build", "--isolation", "chroot", "--target", target]);
    command.args(["--platform", &platform, "--tag", &tag, "--file"]);
    command
        .arg(root().join("deploy/images/Containerfile"))
        .arg(out);
    done(command)?;
    if archive.exists() {
        fs::remove_file(&archive)?; // Buildah adds to an archive that is there.
    }
    let mut command = buildah();
    command.args(["push", &tag]);
    command.arg(format!("docker-archive:{}:{tag}", archive.display()));
    done(command)?;
    Ok(archive)
}

fn done(mut command: Command) -> Result<()> {
    let name = command.get_program().to_string_lossy().into_owned();
    // Standard output is for what was made.
    let status = match command.stdout(io::stderr()).status() {
        Ok(status) => status,
        Err(error) => bail!("{name} cannot be run ({error}): install its Debian package"),
    };
    ensure!(
        status.success(),
        "{name} failed: {status}; it says why above"
    );
    Ok(())
}
