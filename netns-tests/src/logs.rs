//! What daemons complained about: a healthy mesh logs nothing above `INFO`.

use std::fs;

use anyhow::{Result, ensure};

use crate::{mesh::Mesh, node::Node};

impl Mesh {
    /// Fails with every line above `INFO` that any daemon logged so far, of any start, and that has none of `provoked` in it.
    ///
    /// # Errors
    ///
    /// With those lines; or if no daemon logged anything.
    pub fn is_quiet(&self, provoked: &[&str]) -> Result<()> {
        let mut logs = 0;
        let mut complaints = Vec::new();
        for node in self.lab().nodes() {
            for (daemon, log) in daemon_logs(&node)? {
                logs += 1;
                let lines = loud(&log, provoked);
                complaints.extend(lines.map(|line| format!("{} {daemon}: {line}", node.name())));
            }
        }
        ensure!(logs > 0, "no daemon logged anything");
        ensure!(
            complaints.is_empty(),
            "nothing was to go wrong, but for {provoked:?}:\n{}",
            complaints.join("\n")
        );
        Ok(())
    }
}

/// What each daemon of a node logged.
fn daemon_logs(node: &Node) -> Result<Vec<(String, String)>> {
    let mut logs = Vec::new();
    for entry in fs::read_dir(node.dir())? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if let Some(daemon) = name
            .strip_suffix(".log")
            .filter(|name| name.starts_with("mesh-"))
        {
            let log = String::from_utf8_lossy(&fs::read(entry.path())?).into_owned();
            logs.push((daemon.to_owned(), log));
        }
    }
    Ok(logs)
}

/// The lines above `INFO` that have none of `provoked` in them. The level is a line's second word.
fn loud<'a>(log: &'a str, provoked: &'a [&str]) -> impl Iterator<Item = &'a str> {
    log.lines().filter(move |line| {
        let level = line.split_whitespace().nth(1);
        level.is_some_and(|level| ["WARN", "ERROR"].contains(&level))
            && !provoked.iter().any(|text| line.contains(text))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_not_provoked_is_loud() {
        let log = "2026-11-22T20:00:00Z  INFO mesh_agent: a name like WARN\n\
                   2026-11-22T20:00:01Z  WARN mesh_agent::sync: the controller is gone\n\
                   2026-11-22T20:00:02Z ERROR mesh_agent: no disk\n\
                   WARN of nobody\n";
        let loud = |provoked: &[&str]| loud(log, provoked).count();
        assert_eq!(loud(&[]), 2);
        assert_eq!(loud(&["controller is gone"]), 1);
        assert_eq!(loud(&["controller is gone", "no disk"]), 0);
    }
}
