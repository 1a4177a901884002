//! Questions to a cluster, by the `kubectl` that the operator has, with whatever context and `KUBECONFIG` that has.

use std::{path::Path, time::Duration};

use serde_json::Value;

use crate::process;

/// An API server behind a slow link may take some seconds for a long list of nodes.
const ANSWER_MAX: Duration = Duration::from_secs(30);

/// What `kubectl` said.
#[derive(Debug)]
pub(crate) struct Said {
    pub(crate) success: bool,
    pub(crate) text: String,
    /// The last line of what it complained of.
    pub(crate) complaint: String,
}

/// Runs it with `input`, for at most `limit` beyond the usual.
///
/// # Errors
///
/// If it cannot be run, or does not end.
pub(crate) async fn run(arguments: &[&str], input: &str, limit: Duration) -> Result<Said, String> {
    let timeout = format!("--request-timeout={}s", ANSWER_MAX.as_secs());
    let arguments: Vec<_> = arguments
        .iter()
        .copied()
        .chain([timeout.as_str()])
        .collect();
    let limit = ANSWER_MAX * 2 + limit;
    let said = process::run(Path::new("kubectl"), &arguments, input, limit).await?;
    Ok(Said {
        success: said.code == Some(0),
        text: said.text,
        complaint: said.complaint.lines().last().unwrap_or_default().to_owned(),
    })
}

/// Runs it, and it must succeed.
///
/// # Errors
///
/// What it complained of.
pub(crate) async fn done(
    arguments: &[&str],
    input: &str,
    limit: Duration,
) -> Result<String, String> {
    let said = run(arguments, input, limit).await?;
    if said.success {
        return Ok(said.text);
    }
    Err(format!(
        "kubectl {}: {}",
        arguments.join(" "),
        said.complaint
    ))
}

/// The object or list that it answers; null if it answers nothing.
///
/// # Errors
///
/// What it complained of, or that this is no JSON.
pub(crate) async fn object(arguments: &[&str]) -> Result<Value, String> {
    let text = done(arguments, "", Duration::ZERO).await?;
    if text.trim().is_empty() {
        return Ok(Value::Null);
    }
    let parsed = serde_json::from_str(&text);
    parsed.map_err(|error| format!("kubectl {}: {error}", arguments.join(" ")))
}
