//! A process on a node, asked from here: a question a line, and an answer a line, `{"Ok":…}` or `{"Err":"…"}`.

use std::{
    io::{BufRead as _, BufReader, Write as _},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
};

use anyhow::{Context as _, Result, anyhow, bail};
use serde::de::DeserializeOwned;

/// Killed when dropped.
#[derive(Debug)]
pub(crate) struct Asked {
    child: Child,
    questions: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Asked {
    /// Starts it.
    ///
    /// # Errors
    ///
    /// If it cannot be started.
    pub(crate) fn start(mut command: Command) -> Result<Self> {
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command
            .spawn()
            .with_context(|| format!("start {command:?}"))?;
        let questions = child.stdin.take().context("its standard input")?;
        let answers = child.stdout.take().context("its standard output")?;
        Ok(Self {
            child,
            questions,
            answers: BufReader::new(answers),
        })
    }

    /// Asks, and waits for the answer.
    ///
    /// # Errors
    ///
    /// What it says, or that it ended.
    pub(crate) fn ask<T: DeserializeOwned>(&mut self, question: &str) -> Result<T> {
        writeln!(self.questions, "{question}").context("whom to ask ended")?;
        let mut answer = String::new();
        if self.answers.read_line(&mut answer)? == 0 {
            let status = self.child.wait().context("whom to ask ended")?;
            bail!(
                "{question}: the program ended without an answer ({status}); is it in the folder that `--bins` names?"
            );
        }
        let answer: Result<T, String> = serde_json::from_str(&answer)
            .with_context(|| format!("{question}: the answer was {answer:?}"))?;
        answer.map_err(|error| anyhow!(error))
    }
}

impl Drop for Asked {
    fn drop(&mut self) {
        self.child.kill().ok(); // It may have ended already.
        self.child.wait().ok();
    }
}
