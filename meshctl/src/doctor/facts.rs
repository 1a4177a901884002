//! What `doctor` judges: asked of the agent, read from `/proc`.

use std::{
    fs,
    path::Path,
    time::{SystemTime, UNIX_EPOCH},
};

use mesh_api::admin::{FactsRequest, ServicesRequest, StatusRequest};

use super::{Agent, Facts, Kernel};
use crate::{
    connect::{self, ask},
    failure::{Daemon, Failure},
    preflight::{self, Wanted},
    report::{Services, Status},
};

/// Asks and reads everything. What cannot be had keeps nothing else from being looked at.
///
/// # Errors
///
/// Another node's agent that does not answer: nothing else is known of that machine.
pub(crate) async fn gather(socket: connect::Agent<'_>) -> Result<Facts, Failure> {
    let agent = agent(socket).await;
    let now_unix_s = now_unix_s();
    if socket.node.is_some() {
        // This machine says nothing of that one.
        return Ok(Facts {
            agent: Ok(agent?),
            machine: Vec::new(),
            kernel: Kernel::default(),
            now_unix_s,
        });
    }
    let wanted = match &agent {
        Ok(agent) => wanted(agent),
        Err(_) => Wanted::default(),
    };
    let machine = preflight::facts::gather(&wanted);
    Ok(Facts {
        kernel: Kernel {
            routes: machine.routes.clone(),
            ..kernel(Path::new("/proc"))
        },
        machine: preflight::judge(&machine, &wanted),
        now_unix_s,
        agent: agent.map_err(|failure| failure.to_string()),
    })
}

pub(crate) fn now_unix_s() -> i64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.map_or(0, |now| i64::try_from(now.as_secs()).unwrap_or(i64::MAX))
}

async fn agent(socket: connect::Agent<'_>) -> Result<Agent, Failure> {
    let mut agent = connect::agent(socket).await?;
    let status = ask(Daemon::Agent, agent.status(StatusRequest {})).await?;
    let services = ask(Daemon::Agent, agent.services(ServicesRequest {})).await?;
    let facts = ask(Daemon::Agent, agent.facts(FactsRequest {})).await?;
    Ok(Agent {
        status: Status::from(status),
        services: Services::from(services),
        facts,
    })
}

/// The machine is judged by what the running agent is configured with.
fn wanted(agent: &Agent) -> Wanted {
    let default = Wanted::default();
    let overlay = agent.facts.overlay_v4.parse();
    Wanted {
        overlay: overlay.unwrap_or(default.overlay),
        interface: agent.status.interface.clone(),
        ..default
    }
}

fn kernel(proc: &Path) -> Kernel {
    let netstat = fs::read_to_string(proc.join("net/netstat")).unwrap_or_default();
    let folder = proc.join("sys/net/ipv4/conf");
    let strict = |name: &str| {
        let value = fs::read_to_string(folder.join(name).join("rp_filter"));
        value.is_ok_and(|value| value.trim() == "1")
    };
    let names = fs::read_dir(&folder).into_iter().flatten().flatten();
    let names = names.map(|entry| entry.file_name().to_string_lossy().into_owned());
    // The larger of an interface's and `all`'s counts (ip-sysctl.rst): 2 is loose.
    let loose = fs::read_to_string(folder.join("all/rp_filter"));
    let loose = loose.is_ok_and(|value| value.trim() == "2");
    let all = strict("all");
    let own = names.filter(|name| !matches!(name.as_str(), "all" | "default" | "lo"));
    let mut found: Vec<_> = own.filter(|name| !loose && (all || strict(name))).collect();
    found.sort();
    Kernel {
        strict: found,
        reverse_path_drops: counter(&netstat, "TcpExt", "IPReversePathFilter").unwrap_or(0),
        routes: Vec::new(),
    }
}

/// The counter `name` of `group`: a line of names, and below it one of numbers.
fn counter(netstat: &str, group: &str, name: &str) -> Option<u64> {
    let mut lines = netstat.lines().filter(|line| {
        let found = line.split_once(':');
        found.is_some_and(|(found, _)| found == group)
    });
    let (names, numbers) = (lines.next()?, lines.next()?);
    let mut both = names.split_whitespace().zip(numbers.split_whitespace());
    both.find(|(found, _)| *found == name)?.1.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_s_counter_and_its_filters_are_read() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| {
            let path = folder.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        write(
            "net/netstat",
            "TcpExt: A IPReversePathFilter B\nTcpExt: 1 42 3\nIpExt: X\nIpExt: 9\n",
        );
        for (name, value) in [
            ("all", "0"),
            ("default", "1"),
            ("lo", "1"),
            ("eth0", "1\n"),
            ("wg0", "2"),
        ] {
            write(&format!("sys/net/ipv4/conf/{name}/rp_filter"), value);
        }
        let found = kernel(folder.path());
        assert_eq!(
            (found.reverse_path_drops, found.strict),
            (42, vec!["eth0".to_owned()])
        );
        write("sys/net/ipv4/conf/all/rp_filter", "2");
        assert!(kernel(folder.path()).strict.is_empty());
        assert_eq!(counter("TcpExt: A\n", "TcpExt", "A"), None);
        // This machine's is understood as well.
        let netstat = fs::read_to_string("/proc/net/netstat").unwrap();
        assert!(counter(&netstat, "TcpExt", "IPReversePathFilter").is_some());
    }
}
