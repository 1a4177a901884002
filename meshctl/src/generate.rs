//! What is made of the command line itself: completion for shells, and manual pages.

use std::{fs, path::Path};

use clap::CommandFactory as _;
use serde::Serialize;

use crate::{cli::Cli, failure::Failure, show::Report};

/// What `shell` reads.
pub(crate) fn completion(shell: clap_complete::Shell) -> Vec<u8> {
    let mut text = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "meshctl", &mut text);
    text
}

/// `man`.
#[derive(Debug, Serialize)]
pub(crate) struct Pages {
    /// `meshctl.1`, `meshctl-path-why.1` and so on.
    pub(crate) files: Vec<String>,
}

impl Report for Pages {
    fn text(&self, _colours: bool) -> String {
        let lines = self.files.iter().map(|file| format!("wrote {file}\n"));
        lines.collect()
    }
}

/// Writes a page for each command into `out`.
pub(crate) fn man(out: &Path) -> Result<Pages, Failure> {
    let mut root = Cli::command().disable_help_subcommand(true);
    root.build();
    let mut files = Vec::new();
    let mut left = vec![root];
    let written = fs::create_dir_all(out).and_then(|()| {
        while let Some(command) = left.pop() {
            left.extend(command.get_subcommands().cloned());
            let file = clap_mangen::Man::new(command).generate_to(out)?;
            files.push(file.display().to_string());
        }
        Ok(())
    });
    written.map_err(|error| Failure::writing(out, &error))?;
    files.sort();
    Ok(Pages { files })
}
