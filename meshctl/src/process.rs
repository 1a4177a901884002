//! Other programs that are asked, with a limit on how long they take.

use std::{path::Path, process::Stdio, time::Duration};

use tokio::{io::AsyncWriteExt as _, process::Command, time::timeout};

/// What a program said.
#[derive(Debug)]
pub(crate) struct Said {
    /// `None`: a signal ended it.
    pub(crate) code: Option<i32>,
    pub(crate) text: String,
    /// What it complained of.
    pub(crate) complaint: String,
}

/// Runs it with `input`, for at most `limit`.
///
/// # Errors
///
/// If it cannot be run, or does not end.
pub(crate) async fn run(
    program: &Path,
    arguments: &[&str],
    input: &str,
    limit: Duration,
) -> Result<Said, String> {
    let name = program.file_name().unwrap_or_default().display();
    let mut command = Command::new(program);
    command.args(arguments).kill_on_drop(true);
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let whole = async {
        let mut child = command.spawn()?;
        if let Some(mut stdin) = child.stdin.take() {
            stdin.write_all(input.as_bytes()).await?;
        }
        child.wait_with_output().await
    };
    let output = timeout(limit, whole).await;
    let output = output.map_err(|_| format!("{name} {} does not end", arguments.join(" ")))?;
    let output = output.map_err(|error| format!("{name} cannot be run: {error}"))?;
    Ok(Said {
        code: output.status.code(),
        text: String::from_utf8_lossy(&output.stdout).into_owned(),
        complaint: String::from_utf8_lossy(&output.stderr).into_owned(),
    })
}
