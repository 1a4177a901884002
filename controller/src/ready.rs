//! `mesh-controller ready`: whether the controller that runs with this configuration serves agents. For a readiness probe:
//! its image has no other program.

use std::{path::Path, time::Duration};

use anyhow::{Context as _, Result, ensure};
use mesh_api::{
    admin::{
        ControllerStatusRequest, ControllerStatusResponse,
        controller_admin_client::ControllerAdminClient,
    },
    connect::admin_channel,
};
use tokio::{runtime, time::timeout};

use crate::config::Settings;

/// How long the answer may take: the probe gives up after 5 s.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(4);

/// Asks.
///
/// # Errors
///
/// Why it does not serve.
pub fn ready(settings: Settings) -> Result<()> {
    let socket = settings.admin_socket;
    let runtime = runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let asked = async { timeout(ANSWER_TIMEOUT, ask(&socket)).await };
    let status = runtime.block_on(asked);
    let status = status
        .with_context(|| format!("no answer in {ANSWER_TIMEOUT:?}"))?
        .with_context(|| format!("ask the controller at {}", socket.display()))?;
    ensure!(
        status.serves,
        "it does not serve agents yet: {}",
        status.problems.join("; ")
    );
    Ok(())
}

async fn ask(socket: &Path) -> Result<ControllerStatusResponse> {
    let mut controller = ControllerAdminClient::new(admin_channel(socket).await?);
    let status = controller.status(ControllerStatusRequest {}).await?;
    Ok(status.into_inner())
}
