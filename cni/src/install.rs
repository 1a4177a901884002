//! Putting the plug-in into place, and taking it away: what an init container runs.
//!
//! A runtime uses the first configuration of its folder, and executes the programs that it names. So the program comes
//! before the configuration, goes after it, and each of them appears whole.

use std::{
    env,
    ffi::OsStr,
    fs::{self, File},
    io::{self, Write as _},
    os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
};

use clap::{Args, Parser, Subcommand};
use mesh_api::cni::{STATE_DIR, boot_id, boots_dir};
use serde_json::{Map, Value, json};
use tokio::runtime::Builder;

use crate::{
    config::NETWORK_LEN_MAX,
    egress,
    environment::is_id,
    error::{CniError, Code},
    kernel::{self, kernel, noted},
    store::{Store, io_error, read_if_there},
};

/// The program's name, and its `type` in configurations.
pub const PROGRAM: &str = "mesh-cni";

/// The configuration's file. Runtimes take the first one in the order of names.
pub const CONF_FILE: &str = "00-holdfast.conflist";

/// Stock plug-ins that are chained behind ours if the runtime has them, and the capability that each one takes.
const BEHIND: [(&str, &str); 2] = [("portmap", "portMappings"), ("bandwidth", "bandwidth")];

/// Puts the CNI plug-in into place. A runtime executes it with CNI_COMMAND in the environment.
#[derive(Debug, Parser)]
#[command(name = PROGRAM, version, arg_required_else_help = true)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Copy the program and write the network configuration. Done again, it changes nothing.
    Install(Install),
    /// Remove both.
    Uninstall(Uninstall),
}

/// Where things are.
#[derive(Debug, Args)]
pub struct Places {
    /// The folder of network configurations.
    #[arg(long, default_value = "/etc/cni/net.d")]
    pub conf_dir: PathBuf,
    /// The folder of plug-ins.
    #[arg(long, default_value = "/opt/cni/bin")]
    pub bin_dir: PathBuf,
    /// The folder that plug-in and agent share.
    #[arg(long, default_value = STATE_DIR)]
    pub state_dir: PathBuf,
}

/// `mesh-cni install`.
#[derive(Debug, Args)]
pub struct Install {
    /// Where things go.
    #[command(flatten)]
    pub places: Places,
    /// The network's name.
    #[arg(long, default_value = "holdfast")]
    pub network: String,
    /// Another plug-in's network configuration: pods are connected by that one, and ours is chained behind.
    #[arg(long, value_name = "EXISTING")]
    pub chain_behind: Option<PathBuf>,
}

/// `mesh-cni uninstall`.
#[derive(Debug, Args)]
pub struct Uninstall {
    /// Where things are.
    #[command(flatten)]
    pub places: Places,
    /// Also remove pods' interfaces that the plug-in made, and the records of all attachments.
    #[arg(long)]
    pub purge: bool,
}

/// Does it, and says what was done.
///
/// # Errors
///
/// [`Code::BadConfig`] if a value is of no use, [`Code::Io`] or [`Code::Kernel`] if the machine refuses.
pub fn run(cli: &Cli) -> Result<Vec<String>, CniError> {
    match &cli.command {
        Command::Install(install) => install.run(),
        Command::Uninstall(uninstall) => uninstall.run(),
    }
}

impl Install {
    fn run(&self) -> Result<Vec<String>, CniError> {
        let Places {
            conf_dir,
            bin_dir,
            state_dir,
        } = &self.places;
        if !state_dir.is_absolute() {
            let message = format!(
                "--state-dir is {}, not an absolute path",
                state_dir.display()
            );
            return Err(CniError::new(Code::BadConfig, message));
        }
        let conf = conf_dir.join(CONF_FILE);
        let list = match &self.chain_behind {
            Some(existing) => chained(&self.existing(existing)?, state_dir)
                .map_err(|problem| bad_existing(existing, problem))?,
            None if is_id(&self.network, NETWORK_LEN_MAX) => {
                own(&self.network, state_dir, |program| {
                    bin_dir.join(program).is_file()
                })
            }
            None => {
                let message = format!(
                    "--network is {:?}: letters, digits, `_`, `.`, `-`",
                    self.network
                );
                return Err(CniError::new(Code::BadConfig, message));
            }
        };
        for folder in [bin_dir, conf_dir] {
            fs::create_dir_all(folder).map_err(io_error("make the folder", folder))?;
        }
        let own = env::current_exe().map_err(io_error("find", Path::new("/proc/self/exe")))?;
        let program = fs::read(&own).map_err(io_error("read", &own))?;
        let mut said = Vec::new();
        let path = bin_dir.join(PROGRAM);
        said.push(told(place(&path, &program, 0o755)?, &path));
        let text = format!("{list:#}\n");
        said.push(told(place(&conf, text.as_bytes(), 0o644)?, &conf));
        Ok(said)
    }

    fn existing(&self, path: &Path) -> Result<Value, CniError> {
        let name = path.file_name().unwrap_or_default();
        let problem = if name == OsStr::new(CONF_FILE) {
            "it is our own: name the one of the other plug-in"
        } else if name < OsStr::new(CONF_FILE) {
            "runtimes would go on using it, since its name is sorted before ours: rename it"
        } else {
            ""
        };
        if !problem.is_empty() {
            return Err(bad_existing(path, problem.to_owned()));
        }
        let text = fs::read(path).map_err(io_error("read", path))?;
        serde_json::from_slice(&text).map_err(|error| bad_existing(path, error.to_string()))
    }
}

fn bad_existing(path: &Path, problem: String) -> CniError {
    let message = format!("cannot chain behind {}", path.display());
    CniError::new(Code::BadConfig, message).with(problem)
}

fn told(changed: bool, path: &Path) -> String {
    let what = if changed { "wrote" } else { "unchanged:" };
    format!("{what} {}", path.display())
}

/// The configuration with which our plug-in connects pods. Its version is one that runtimes know since 2021; newer ones
/// find theirs in the list.
fn own(network: &str, state_dir: &Path, has: impl Fn(&str) -> bool) -> Value {
    let mut plugins = vec![json!({
        "type": PROGRAM,
        "masquerade": true,
        "capabilities": {"ips": true, "mac": true},
    })];
    with_state_dir(&mut plugins, state_dir);
    for (program, capability) in BEHIND {
        if has(program) {
            plugins.push(json!({"type": program, "capabilities": {capability: true}}));
        }
    }
    json!({
        "cniVersion": "1.0.0",
        "cniVersions": ["0.4.0", "1.0.0", "1.1.0"],
        "name": network,
        "plugins": plugins,
    })
}

/// A copy of another plug-in's configuration, with ours behind it.
fn chained(existing: &Value, state_dir: &Path) -> Result<Value, String> {
    let fields = existing.as_object().ok_or("it is no JSON object")?;
    let mut list = match fields.get("type") {
        // One plug-in (`.conf`) instead of a list.
        Some(_) => as_list(fields),
        None => fields.clone(),
    };
    let plugins = list.get_mut("plugins").and_then(Value::as_array_mut);
    let plugins = plugins.ok_or("it has no list of plugins")?;
    if plugins.is_empty() {
        return Err("its list of plugins is empty".to_owned());
    }
    if plugins
        .iter()
        .any(|plugin| plugin.get("type") == Some(&json!(PROGRAM)))
    {
        return Err(format!("it has {PROGRAM} already"));
    }
    let mut ours = vec![json!({"type": PROGRAM, "chained": true})];
    with_state_dir(&mut ours, state_dir);
    plugins.append(&mut ours);
    Ok(Value::Object(list))
}

fn as_list(fields: &Map<String, Value>) -> Map<String, Value> {
    let shared = ["cniVersion", "name"];
    let (outer, plugin): (Map<_, _>, Map<_, _>) = fields
        .clone()
        .into_iter()
        .partition(|(key, _)| shared.contains(&key.as_str()));
    let mut list = outer;
    list.insert("plugins".to_owned(), json!([plugin]));
    list
}

fn with_state_dir(plugins: &mut [Value], state_dir: &Path) {
    if state_dir == Path::new(STATE_DIR) {
        return;
    }
    for fields in plugins.iter_mut().filter_map(Value::as_object_mut) {
        fields.insert("stateDir".to_owned(), json!(state_dir));
    }
}

/// Makes the file so, in one step, and says whether it was otherwise. Runtimes look for names that end in `.conf`,
/// `.conflist` or `.json`, which the temporary file's does not.
fn place(path: &Path, content: &[u8], mode: u32) -> Result<bool, CniError> {
    let old = read_if_there(path).map_err(io_error("read", path))?;
    let is_mode = fs::metadata(path).is_ok_and(|old| old.permissions().mode() & 0o777 == mode);
    if is_mode && old.is_some_and(|old| old == content) {
        return Ok(false);
    }
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let new = path.with_file_name(format!(".{name}.new"));
    let written = write_new(&new, content, mode).and_then(|()| fs::rename(&new, path));
    if written.is_err() {
        fs::remove_file(&new).ok(); // It takes room on a disk that is full, perhaps.
    }
    written.map_err(io_error("write", path))?;
    let folder = path.parent().unwrap_or(path);
    let synced = File::open(folder).and_then(|folder| folder.sync_all());
    synced.map_err(io_error("write", folder))?;
    Ok(true)
}

fn write_new(path: &Path, content: &[u8], mode: u32) -> io::Result<()> {
    let mut options = File::options();
    let mut file = options
        .write(true)
        .create(true)
        .truncate(true)
        .mode(mode)
        .open(path)?;
    // A leftover, or the umask, may have another one.
    file.set_permissions(fs::Permissions::from_mode(mode))?;
    file.write_all(content)?;
    file.sync_all()
}

impl Uninstall {
    fn run(&self) -> Result<Vec<String>, CniError> {
        let Places {
            conf_dir,
            bin_dir,
            state_dir,
        } = &self.places;
        let mut said = Vec::new();
        said.extend(take_away(&conf_dir.join(CONF_FILE))?);
        if self.purge {
            said.extend(purge(state_dir)?);
        }
        said.extend(take_away(&bin_dir.join(PROGRAM))?);
        Ok(said)
    }
}

fn take_away(path: &Path) -> Result<Option<String>, CniError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        removed => {
            removed.map_err(io_error("remove", path))?;
            Ok(Some(format!("removed {}", path.display())))
        }
    }
}

fn purge(state_dir: &Path) -> Result<Vec<String>, CniError> {
    let boot = boot_id().map_err(io_error(
        "read",
        Path::new("/proc/sys/kernel/random/boot_id"),
    ))?;
    let names = Store::new(state_dir, &boot).names()?;
    let runtime = Builder::new_current_thread().enable_io().build();
    let runtime = runtime.map_err(|error| {
        CniError::new(Code::Kernel, "cannot wait for the kernel's answers").with(error)
    })?;
    let mut said = Vec::new();
    runtime.block_on(async {
        let netlink = kernel::connect()?;
        for link in netlink.links().await.map_err(kernel)? {
            let is_noted = link.alias.as_deref().and_then(noted).is_some();
            if is_noted || names.iter().any(|name| name.key == link.name) {
                netlink.remove_link(link.index).await.map_err(kernel)?;
                said.push(format!("removed interface {}", link.name));
            }
        }
        Ok(())
    })?;
    if egress::remove()? {
        said.push(format!("removed nftables table {}", egress::TABLE));
    }
    let boots = boots_dir(state_dir);
    match fs::remove_dir_all(&boots) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        removed => {
            removed.map_err(io_error("remove", &boots))?;
            said.push(format!("removed {}", boots.display()));
        }
    }
    said.extend(take_away(&state_dir.join("lock"))?);
    Ok(said)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt as _;

    use super::*;

    struct Machine(tempfile::TempDir);

    impl Machine {
        fn new() -> Self {
            Self(tempfile::tempdir().unwrap())
        }

        fn path(&self, name: &str) -> PathBuf {
            self.0.path().join(name)
        }

        fn cli(&self, words: &[&str]) -> Result<Vec<String>, CniError> {
            let (conf, bin) = (self.path("net.d"), self.path("bin"));
            let places = [
                "--conf-dir",
                conf.to_str().unwrap(),
                "--bin-dir",
                bin.to_str().unwrap(),
            ];
            let state = self.path("state");
            let state = ["--state-dir", state.to_str().unwrap()];
            let words = [PROGRAM].iter().chain(words).chain(&places).chain(&state);
            run(&Cli::try_parse_from(words).unwrap())
        }

        fn list(&self) -> Value {
            let text = fs::read(self.path("net.d").join(CONF_FILE)).unwrap();
            serde_json::from_slice(&text).unwrap()
        }

        fn other(&self, name: &str, content: &Value) -> String {
            fs::create_dir_all(self.path("net.d")).unwrap();
            let path = self.path("net.d").join(name);
            fs::write(&path, content.to_string()).unwrap();
            path.to_str().unwrap().to_owned()
        }
    }

    #[test]
    fn installing_puts_program_and_configuration_in_place_and_again_changes_nothing() {
        let machine = Machine::new();
        machine.cli(&["install"]).unwrap();
        let program = machine.path("bin").join(PROGRAM);
        let own = fs::read(env::current_exe().unwrap()).unwrap();
        assert!(fs::read(&program).unwrap() == own);
        assert_eq!(fs::metadata(&program).unwrap().mode() & 0o777, 0o755);
        assert_eq!(
            machine.list(),
            json!({
                "cniVersion": "1.0.0",
                "cniVersions": ["0.4.0", "1.0.0", "1.1.0"],
                "name": "holdfast",
                "plugins": [{
                    "type": "mesh-cni",
                    "masquerade": true,
                    "capabilities": {"ips": true, "mac": true},
                    "stateDir": machine.path("state"),
                }],
            })
        );
        let inode = fs::metadata(&program).unwrap().ino();
        let said = machine.cli(&["install"]).unwrap();
        assert!(
            said.iter().all(|line| line.starts_with("unchanged")),
            "{said:?}"
        );
        assert_eq!(fs::metadata(&program).unwrap().ino(), inode);
        for folder in ["bin", "net.d"] {
            assert_eq!(
                fs::read_dir(machine.path(folder)).unwrap().count(),
                1,
                "{folder}"
            );
        }
    }

    #[test]
    fn stock_plug_ins_are_chained_if_they_are_there() {
        let machine = Machine::new();
        fs::create_dir(machine.path("bin")).unwrap();
        fs::write(machine.path("bin").join("portmap"), "").unwrap();
        machine.cli(&["install"]).unwrap();
        let plugins = machine.list()["plugins"].as_array().unwrap().len();
        assert_eq!(plugins, 2);
        assert_eq!(
            machine.list()["plugins"][1],
            json!({"type": "portmap", "capabilities": {"portMappings": true}})
        );
    }

    #[test]
    fn an_older_program_is_replaced_in_one_step() {
        let machine = Machine::new();
        fs::create_dir(machine.path("bin")).unwrap();
        let program = machine.path("bin").join(PROGRAM);
        fs::write(&program, "old").unwrap();
        let running = File::open(&program).unwrap();
        machine.cli(&["install"]).unwrap();
        let content = io::read_to_string(running).unwrap();
        assert_eq!(content, "old", "who runs it keeps what it has");
        assert!(fs::metadata(&program).unwrap().len() > 3);
    }

    #[test]
    fn chaining_copies_the_other_list_with_ours_behind() {
        let machine = Machine::new();
        let other = json!({
            "cniVersion": "0.3.1",
            "name": "k8s-pod-network",
            "plugins": [{"type": "calico", "x": 1}, {"type": "portmap"}],
        });
        let path = machine.other("10-calico.conflist", &other);
        machine.cli(&["install", "--chain-behind", &path]).unwrap();
        let list = machine.list();
        assert_eq!(list["name"], "k8s-pod-network");
        assert_eq!(list["cniVersion"], "0.3.1");
        assert_eq!(list["plugins"][0], other["plugins"][0]);
        assert_eq!(
            list["plugins"][2],
            json!({"type": "mesh-cni", "chained": true, "stateDir": machine.path("state")})
        );
        let names: Vec<_> = fs::read_dir(machine.path("net.d"))
            .unwrap()
            .flatten()
            .map(|e| e.file_name())
            .collect();
        assert_eq!(
            names.iter().min().unwrap(),
            CONF_FILE,
            "runtimes take it first"
        );
    }

    #[test]
    fn a_single_plug_in_becomes_a_list() {
        let machine = Machine::new();
        let other = json!({"cniVersion": "1.0.0", "name": "n", "type": "bridge", "bridge": "cni0"});
        let path = machine.other("87-bridge.conf", &other);
        machine.cli(&["install", "--chain-behind", &path]).unwrap();
        let list = machine.list();
        assert_eq!(list["name"], "n");
        assert_eq!(
            list["plugins"][0],
            json!({"type": "bridge", "bridge": "cni0"})
        );
        assert_eq!(list["plugins"][1]["type"], "mesh-cni");
    }

    #[test]
    fn what_cannot_be_chained_behind_is_told_and_nothing_is_written() {
        let list = |plugins: Value| json!({"cniVersion": "1.0.0", "name": "n", "plugins": plugins});
        let good = list(json!([{"type": "bridge"}]));
        for (name, content, word) in [
            ("10-a.conflist", json!([]), "object"),
            ("10-a.conflist", json!({"name": "n"}), "no list"),
            ("10-a.conflist", list(json!([])), "empty"),
            (
                "10-a.conflist",
                list(json!([{"type": "mesh-cni"}])),
                "already",
            ),
            ("00-a.conflist", good.clone(), "rename"),
            (CONF_FILE, good, "our own"),
        ] {
            let machine = Machine::new();
            let path = machine.other(name, &content);
            let error = machine
                .cli(&["install", "--chain-behind", &path])
                .unwrap_err();
            assert_eq!(error.code, Code::BadConfig);
            assert!(error.details.contains(word), "{error}");
            assert!(!machine.path("bin").exists());
        }
        let machine = Machine::new();
        let error = machine
            .cli(&["install", "--chain-behind", "/no/10-such"])
            .unwrap_err();
        assert_eq!(error.code, Code::Io);
        let error = machine.cli(&["install", "--network", "a b"]).unwrap_err();
        assert_eq!(error.code, Code::BadConfig);
    }

    #[test]
    fn a_configuration_that_cannot_be_written_leaves_none() {
        let machine = Machine::new();
        fs::create_dir_all(machine.path("net.d").join(CONF_FILE)).unwrap(); // Renaming over it fails.
        let error = machine.cli(&["install"]).unwrap_err();
        assert_eq!(error.code, Code::Io);
        assert_eq!(fs::read_dir(machine.path("net.d")).unwrap().count(), 1);
    }

    #[test]
    fn uninstalling_leaves_what_is_others_and_is_fine_twice() {
        let machine = Machine::new();
        machine.other("10-calico.conflist", &json!({}));
        machine.cli(&["install"]).unwrap();
        let said = machine.cli(&["uninstall"]).unwrap();
        assert!(
            said[0].contains(CONF_FILE),
            "the configuration goes first: {said:?}"
        );
        assert_eq!(fs::read_dir(machine.path("net.d")).unwrap().count(), 1);
        assert_eq!(fs::read_dir(machine.path("bin")).unwrap().count(), 0);
        assert_eq!(machine.cli(&["uninstall"]).unwrap(), Vec::<String>::new());
    }
}
