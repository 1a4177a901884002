//! The Debian packages, made by the real tool and installed by the real one, in a root folder of their own; and the
//! container images, made by buildah.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test may fail loudly")]

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::Mutex,
};

use netns_tests::tool::binary;
use serde_json::{Value, json};

/// `cargo xtask package` has one folder for what it makes.
static FOLDER: Mutex<()> = Mutex::new(());

/// What is in each image, the program that it runs first, and who that runs as.
const IMAGES: [(&[&str], &str); 5] = [
    (&["mesh-agent"], ""),
    (&["mesh-cni"], ""),
    (&["mesh-controller", "meshctl"], "65532:65532"),
    (&["mesh-relay"], ""),
    (&["meshctl"], ""),
];

const PACKAGES: [&str; 4] = [
    "holdfast-agent",
    "holdfast-controller",
    "holdfast-lab",
    "holdfast-relay",
];

#[test]
fn packages_install_keep_the_operator_s_configuration_and_purge_without_a_trace() {
    let _alone = FOLDER.lock();
    let bins = binary("mesh-agent").unwrap();
    let made = run(Command::new(binary("xtask").unwrap())
        .args(["package", "deb", "--bins"])
        .arg(bins.parent().unwrap()));
    let packages = made.lines().map(|line| line.split(' ').next().unwrap());
    let packages: Vec<PathBuf> = packages.map(PathBuf::from).collect();
    assert_eq!(packages.len(), PACKAGES.len(), "{made}");

    let root = tempfile::tempdir().unwrap();
    let root = root.path();
    for folder in [
        "var/lib/dpkg/info",
        "var/lib/dpkg/updates",
        "var/log",
        "etc",
    ] {
        fs::create_dir_all(root.join(folder)).unwrap();
    }
    for file in ["status", "available"] {
        fs::write(root.join("var/lib/dpkg").join(file), "").unwrap();
    }
    let before = tree(root);
    for _ in ["first", "again, as an upgrade does"] {
        run(dpkg(root).arg("--install").args(&packages));
    }
    let agent = root.join("usr/bin/mesh-agent");
    let version = run(Command::new(&agent).arg("--version"));
    assert_eq!(
        version.trim(),
        concat!("mesh-agent ", env!("CARGO_PKG_VERSION"))
    );
    // Each finds the next: meshctl the lab, the lab what it starts.
    let labs = run(Command::new(root.join("usr/bin/meshctl")).args(["lab", "list", "--json"]));
    assert!(labs.contains("\"labs\""), "{labs}");
    for program in ["mesh-agent", "mesh-controller", "mesh-relay", "meshctl"] {
        let link = fs::read_link(root.join("usr/lib/holdfast").join(program)).unwrap();
        let program = root.join(link.strip_prefix("/").unwrap());
        assert!(program.is_file(), "{}", program.display());
    }
    // No daemon may start before the operator said something.
    for unit in ["mesh-agent", "mesh-controller", "mesh-relay"] {
        let path = root.join(format!("usr/lib/systemd/system/{unit}.service"));
        let text = fs::read_to_string(path).unwrap();
        let condition = text
            .lines()
            .find_map(|line| line.strip_prefix("ConditionPathExists="));
        let program = text
            .lines()
            .find_map(|line| line.strip_prefix("ExecStart="));
        let program = program.unwrap();
        assert!(program.ends_with(condition.unwrap()), "{program}");
        let (binary, _) = program.split_once(' ').unwrap();
        assert!(root.join(&binary[1..]).is_file(), "{binary}");
    }
    let configuration = root.join("etc/holdfast/agent.toml");
    fs::create_dir_all(configuration.parent().unwrap()).unwrap();
    fs::write(&configuration, "node_name = \"a\"\n").unwrap();
    let key = root.join("var/lib/holdfast/wireguard.key");
    fs::create_dir_all(key.parent().unwrap()).unwrap();
    fs::write(&key, "key").unwrap();

    run(dpkg(root).arg("--remove").args(PACKAGES));
    assert!(!agent.exists() && key.exists() && configuration.exists());
    fs::remove_file(&configuration).unwrap();
    run(dpkg(root).arg("--purge").args(PACKAGES));
    let left: Vec<_> = tree(root)
        .into_iter()
        .filter(|path| !before.contains(path) && !path.starts_with("var/lib/dpkg"))
        .collect();
    assert_eq!(left, [PathBuf::from("var/log/dpkg.log")]);
}

#[test]
fn images_hold_static_programs_and_nothing_else() {
    let _alone = FOLDER.lock();
    let bins = binary("mesh-agent").unwrap();
    let images = |bins: &Path| {
        let mut command = Command::new(binary("xtask").unwrap());
        command.args(["package", "images", "--bins"]).arg(bins);
        command
    };
    // Those of the tests ask for a loader, and would not start.
    let refused = images(bins.parent().unwrap()).output().unwrap();
    let said = String::from_utf8_lossy(&refused.stderr);
    assert!(!refused.status.success());
    assert!(said.contains("mesh-agent needs libraries"), "{said}");

    // To build the real ones takes ten minutes; this one is static, and says by which name it was called.
    let folder = tempfile::tempdir().unwrap();
    for name in IMAGES.iter().flat_map(|(programs, _)| *programs) {
        fs::copy("/bin/busybox", folder.path().join(name)).unwrap();
    }
    let made = run(&mut images(folder.path()));
    let archives: Vec<_> = made
        .lines()
        .map(|line| line.split(' ').next().unwrap())
        .collect();
    assert_eq!(archives.len(), IMAGES.len(), "{made}");
    for ((programs, user), archive) in IMAGES.iter().zip(archives) {
        let program = programs[0];
        let inside = tempfile::tempdir().unwrap();
        let inside = inside.path();
        run(Command::new("tar")
            .arg("-xf")
            .arg(archive)
            .arg("-C")
            .arg(inside));
        let manifest = json(&inside.join("manifest.json"));
        let image = &manifest[0];
        let config = json(&inside.join(image["Config"].as_str().unwrap()));
        assert_eq!(
            config["config"]["Entrypoint"],
            json!([format!("/{program}")])
        );
        let runs_as = config["config"]["User"].as_str().unwrap_or_default();
        assert_eq!(runs_as, *user, "{program}");
        let root = inside.join("root");
        fs::create_dir(&root).unwrap();
        for layer in image["Layers"].as_array().unwrap() {
            let layer = inside.join(layer.as_str().unwrap());
            run(Command::new("tar")
                .arg("-xf")
                .arg(layer)
                .arg("-C")
                .arg(&root));
        }
        let expected: Vec<_> = programs.iter().map(PathBuf::from).collect();
        assert_eq!(tree(&root), expected);
        let ran = Command::new("chroot")
            .arg(&root)
            .arg(format!("/{program}"))
            .output();
        let said = String::from_utf8_lossy(&ran.unwrap().stderr).into_owned();
        assert_eq!(said.trim(), format!("{program}: applet not found"));
    }
}

fn json(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

fn dpkg(root: &Path) -> Command {
    let mut command = Command::new("dpkg");
    command
        .arg("--root")
        .arg(root)
        .arg("--log")
        .arg(root.join("var/log/dpkg.log"))
        .arg("--force-script-chrootless")
        .env(
            "PATH",
            "/usr/local/sbin:/usr/sbin:/sbin:/usr/local/bin:/usr/bin:/bin",
        );
    command
}

fn run(command: &mut Command) -> String {
    let output = command.output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let said = text(&output.stderr);
    assert!(
        output.status.success(),
        "{command:?}: {said}{}",
        text(&output.stdout)
    );
    text(&output.stdout)
}

/// Everything below `root`, relative to it.
fn tree(root: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut open = vec![root.to_owned()];
    while let Some(folder) = open.pop() {
        for entry in fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() && !path.is_symlink() {
                open.push(path.clone());
            }
            found.push(path.strip_prefix(root).unwrap().to_owned());
        }
    }
    found.sort();
    found
}
