//! What daemons complained about: a healthy mesh logs nothing above `INFO`.

use std::fs;

use anyhow::{Result, ensure};

use crate::{mesh::Mesh, node::Node};

impl Mesh {
    /// Announces what the test does to the mesh: lines above `INFO` with one of these texts in them are not judged.
    /// A text is the head of what is said, so that it excuses nothing else.
    pub fn provokes(&self, texts: &[&str]) {
        let texts = texts.iter().map(|&text| text.to_owned());
        self.provoked().extend(texts);
    }

    /// A test's end: fails if a process ended by itself, or with every line above `INFO` that any daemon logged, of
    /// any start, and that the test did not provoke. Not done when the mesh is dropped: a panic there would hide why
    /// a test failed. That every scenario ends so is a rule of `cargo xtask tidy`.
    ///
    /// # Errors
    ///
    /// With the process, or with those lines.
    pub fn ends_well(&self) -> Result<()> {
        self.all_run()?;
        let provoked = self.provoked();
        let mut complaints = Vec::new();
        for node in self.lab().nodes() {
            for (process, log) in logs(&node)? {
                let lines = loud(&log, &provoked);
                complaints.extend(lines.map(|line| format!("{} {process}: {line}", node.name())));
            }
        }
        ensure!(
            complaints.is_empty(),
            "nothing was to go wrong, but for {provoked:?}:\n{}",
            complaints.join("\n")
        );
        Ok(())
    }
}

/// What was logged by each process of a node that has a log.
fn logs(node: &Node) -> Result<Vec<(String, String)>> {
    let mut logs = Vec::new();
    for entry in fs::read_dir(node.dir())? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if let Some(process) = name.strip_suffix(".log") {
            let log = String::from_utf8_lossy(&fs::read(entry.path())?).into_owned();
            logs.push((process.to_owned(), log));
        }
    }
    Ok(logs)
}

/// The lines above `INFO` that have none of `provoked` in them. The level is a line's second word.
fn loud<'a>(log: &'a str, provoked: &'a [String]) -> impl Iterator<Item = &'a str> {
    log.lines().filter(move |line| {
        let level = line.split_whitespace().nth(1);
        level.is_some_and(|level| ["WARN", "ERROR"].contains(&level))
            && !provoked.iter().any(|text| line.contains(text.as_str()))
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
        let loud = |provoked: &[&str]| {
            let provoked: Vec<_> = provoked.iter().map(|&text| text.to_owned()).collect();
            loud(log, &provoked).count()
        };
        assert_eq!(loud(&[]), 2);
        assert_eq!(loud(&["controller is gone"]), 1);
        assert_eq!(loud(&["controller is gone", "no disk"]), 0);
    }
}
