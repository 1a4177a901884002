//! `cargo xtask soak`: two tunnels under traffic while everything around them changes, for long.

use anyhow::{Context as _, Result};

use crate::{cargo, setup};

/// Ten minutes.
const SECONDS: u64 = 600;

/// Two hours.
const NIGHTLY_SECONDS: u64 = 7_200;

/// Runs `mesh-tunnel/tests/soak`; says whether it held.
///
/// # Errors
///
/// If the machine is not fit for it, or cargo does not start.
pub(crate) fn run(seconds: Option<u64>, nightly: bool) -> Result<bool> {
    setup::ready()?;
    let usual = if nightly { NIGHTLY_SECONDS } else { SECONDS };
    let seconds = seconds.unwrap_or(usual).to_string();
    let words = ["test", "--workspace", "--test", "soak", "--", "--nocapture"];
    let status = cargo(&words)
        .env("HOLDFAST_SOAK_SECONDS", seconds)
        .status()
        .context("start cargo")?;
    Ok(status.success())
}
