//! The pages of `docs/` whose commands are for machines without Kubernetes, followed word by word with the real binaries:
//! a machine with a public address, two at sites behind NATs, and spare ones for who reads on.

use std::{collections::BTreeMap, fs, net::Ipv4Addr, path::Path, time::Duration};

use anyhow::{Context as _, Error, Result, bail, ensure};
use netns_tests::{
    document::{Command, Machine, commands},
    lab::Lab,
    link::Impairment,
    nat::NatKind,
    site::Site,
    tool,
};

/// Where every page begins.
const START: &str = "getting-started.md";

/// Machines with public addresses.
const PUBLIC: [(&str, Ipv4Addr); 2] = [
    ("cloud", Ipv4Addr::new(198, 51, 100, 10)),
    ("relay-2", Ipv4Addr::new(198, 51, 100, 20)),
];

/// Sites, what their NATs are, their public address, and their machines.
const SITES: [(&str, NatKind, Ipv4Addr, &[&str]); 2] = [
    (
        "site-a",
        NatKind::PortRestricted,
        Ipv4Addr::new(203, 0, 113, 1),
        &["edge-a", "press"],
    ),
    (
        "site-b",
        NatKind::PortRestricted,
        Ipv4Addr::new(203, 0, 113, 2),
        &["edge-b", "edge-c"],
    ),
];

/// What a page says instead of what a command printed, to be put there by who follows it.
const TOKEN: &str = "TOKEN";

struct World {
    // Before the lab that they are in.
    machines: BTreeMap<String, Machine>,
    _sites: Vec<Site>,
    _lab: Lab,
}

impl World {
    fn new() -> Result<Self> {
        let lab = Lab::new()?;
        let link = Impairment::delay_loss(Duration::from_millis(10), 0.0);
        let mut nodes = Vec::new();
        for (name, address) in PUBLIC {
            nodes.push(lab.public_node(name, address)?);
        }
        let mut sites = Vec::new();
        for (name, kind, wan, hosts) in SITES {
            let site = lab.site(name, kind, wan, link)?;
            for host in hosts {
                nodes.push(site.host(&lab, host)?);
            }
            sites.push(site);
        }
        let machines = nodes.into_iter().map(|node| {
            let name = node.name().to_owned();
            Ok((name, Machine::new(node, root())?))
        });
        Ok(Self {
            machines: machines.collect::<Result<_>>()?,
            _sites: sites,
            _lab: lab,
        })
    }

    /// Types all commands of a page of `docs/`.
    fn follow(&mut self, page: &str) -> Result<()> {
        let text = fs::read_to_string(root().join("docs").join(page))?;
        let commands = commands(&text);
        ensure!(!commands.is_empty(), "{page} has no commands");
        let mut token = String::new();
        for mut command in commands {
            if page == START && command.machine.is_empty() {
                continue; // For no machine of a lab: see `follow_here`.
            }
            command.text = command.text.replace(TOKEN, token.trim());
            if command.text.starts_with("scp -r ") {
                self.copy(&command).context(page.to_owned())?;
                continue;
            }
            let machine = self.machines.get_mut(&command.machine);
            let machine = machine.with_context(|| format!("{page}: {command:?}: no machine"))?;
            let said = machine.follow(&command).context(page.to_owned())?;
            if command.text.starts_with("meshctl token create") {
                token = said;
            }
        }
        Ok(())
    }

    /// `scp -r FOLDER MACHINE:FOLDER`: nobody has a key of the lab's machines.
    fn copy(&self, command: &Command) -> Result<()> {
        let words: Vec<_> = command.text.split(' ').collect();
        let ["scp", "-r", from, to] = words.as_slice() else {
            bail!("{}: not as expected", command.text);
        };
        let (machine, to) = to.split_once(':').context("to which machine?")?;
        let path = |machine: &str, path: &str| {
            let machine = self.machines.get(machine).context("no such machine")?;
            let below = path.strip_prefix('/').context("not a whole path")?;
            Ok::<_, Error>(machine.node().dir().join(below).display().to_string())
        };
        let (from, to) = (path(&command.machine, from)?, path(machine, to)?);
        let folder = Path::new(&to).parent().context("into the root")?;
        fs::create_dir_all(folder)?;
        tool::run("cp", &["-a", &from, &to], "").map(drop)
    }
}

fn root() -> &'static Path {
    let own = Path::new(env!("CARGO_MANIFEST_DIR"));
    own.parent().unwrap_or(own)
}

fn follow(pages: &[&str]) -> Result<()> {
    let mut world = World::new()?;
    pages.iter().try_for_each(|page| world.follow(page))
}

/// A page for a job, after where all of them begin.
fn how_to(page: &str) -> Result<()> {
    follow(&[START, &format!("howto/{page}.md")])
}

#[test]
fn two_machines_become_a_mesh_as_getting_started_says() -> Result<()> {
    follow(&[START])
}

/// The commands of [`START`] that are typed on the machine that labs are made on.
fn follow_here() -> Result<()> {
    let text = fs::read_to_string(root().join("docs").join(START))?;
    let mut here = commands(&text);
    here.retain(|command| command.machine.is_empty());
    ensure!(!here.is_empty(), "{START} has no commands for this machine");
    let programs = tool::binary("meshctl")?;
    let programs = programs.parent().context("meshctl has no folder")?;
    let path = format!("{}:{}", programs.display(), std::env::var("PATH")?);
    let typed = |text: &str| {
        let mut shell = std::process::Command::new("sh");
        shell.args(["-euc", text]).env("PATH", &path);
        shell.output().context(text.to_owned())
    };
    let done = here.iter().try_for_each(|command| {
        let output = typed(&command.text)?;
        ensure!(output.status.success(), "{}: {output:?}", command.text);
        command.check(&String::from_utf8(output.stdout)?)
    });
    if done.is_err() {
        typed("meshctl lab down")?;
    }
    done
}

#[test]
fn a_mesh_that_stays_is_made_on_this_machine_as_getting_started_says() -> Result<()> {
    follow_here()
}

macro_rules! how_to {
    ($($test:ident: $page:literal),+ $(,)?) => {
        $(
            #[test]
            fn $test() -> Result<()> {
                how_to($page)
            }
        )+

        #[test]
        fn every_page_for_a_job_is_followed() -> Result<()> {
            let followed = ["README", $($page),+];
            for entry in fs::read_dir(root().join("docs/howto"))? {
                let path = entry?.path();
                let name = path.file_stem().context("no name")?.to_string_lossy().into_owned();
                ensure!(followed.contains(&name.as_str()), "no test follows docs/howto/{name}.md");
            }
            Ok(())
        }
    };
}

how_to! {
    another_node_is_let_in_as_the_page_says: "add-a-node",
    a_lan_is_reached_as_the_page_says: "expose-a-lan",
    a_relay_is_added_as_the_page_says: "add-a-relay",
    nodes_and_tokens_are_taken_out_as_the_page_says: "revoke",
    versions_change_as_the_page_says: "upgrade",
    the_controller_comes_back_as_the_page_says: "backup",
    what_is_slow_is_looked_at_as_the_page_says: "slow",
    access_is_limited_as_the_page_says: "limit-access",
    the_cloud_goes_as_the_page_says: "without-the-cloud",
    an_uplink_is_metered_as_the_page_says: "metered-uplink",
}
