//! Named tasks that live and die together: one that ends early takes the process down, because
//! half a daemon is worse than none.

use std::{future::Future, io, time::Duration};

use anyhow::{Context as _, bail};
use tokio::{task::JoinSet, time};
use tokio_util::sync::CancellationToken;

use crate::{NotifyState, notify, stop_signal};

/// How long tasks may take to end once they are told: streams are closed and a snapshot is
/// written, and systemd waits 90 s.
pub(crate) const SHUTDOWN_GRACE: Duration = Duration::from_secs(3);

/// The tasks of this process.
#[derive(Debug)]
pub struct Supervisor {
    stop: CancellationToken,
    ended: CancellationToken,
    tasks: JoinSet<(&'static str, anyhow::Result<()>)>,
}

impl Supervisor {
    /// With no tasks yet. Tasks end when `stop` is cancelled.
    #[must_use]
    pub fn new(stop: CancellationToken) -> Self {
        Self {
            stop,
            ended: CancellationToken::new(),
            tasks: JoinSet::new(),
        }
    }

    /// Starts a task that runs until the process stops.
    pub fn spawn(
        &mut self,
        name: &'static str,
        task: impl Future<Output = anyhow::Result<()>> + Send + 'static,
    ) {
        let ended = self.ended.clone().drop_guard(); // Also of one that panics.
        self.tasks.spawn(async move {
            let result = task.await;
            drop(ended);
            (name, result)
        });
    }

    /// Waits until a task ended, for who still starts others: [`Self::run`] then says why.
    pub fn task_ended(&self) -> impl Future<Output = ()> + Send + 'static {
        self.ended.clone().cancelled_owned()
    }

    /// Stops all tasks on SIGTERM or SIGINT.
    ///
    /// # Errors
    ///
    /// If the system does not let a handler be set.
    pub fn stop_on_signal(&mut self) -> io::Result<()> {
        let (told, stop) = (stop_signal()?, self.stop.clone());
        self.spawn("signals", async move {
            tokio::select! {
                () = told => stop.cancel(),
                () = stop.cancelled() => {}
            }
            Ok(())
        });
        Ok(())
    }

    /// Waits until the process is told to stop or a task ends early; then ends all of them.
    ///
    /// # Errors
    ///
    /// The error of the task that ended early, with its name.
    pub async fn run(mut self) -> anyhow::Result<()> {
        let early = tokio::select! {
            () = self.stop.cancelled() => None,
            ended = self.tasks.join_next() => ended,
        };
        let stopping = self.stop.is_cancelled();
        notify(NotifyState::Stopping);
        self.stop.cancel();
        let mut tasks = self.tasks;
        let drain = async { while tasks.join_next().await.is_some() {} };
        if time::timeout(SHUTDOWN_GRACE, drain).await.is_err() {
            tracing::warn!(left = tasks.len(), "tasks did not end in time");
        }
        if let Some(joined) = early {
            let (name, result) = joined.context("a task panicked")?;
            result.with_context(|| format!("task {name} failed"))?;
            if !stopping {
                bail!("task {name} ended early");
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_task_that_ends_while_others_are_still_started_is_noticed_and_said() {
        for (panics, why) in [(true, "a task panicked"), (false, "task one ended early")] {
            let mut supervisor = Supervisor::new(CancellationToken::new());
            let ended = supervisor.task_ended();
            supervisor.spawn("one", async move {
                assert!(!panics, "as a test wants it");
                Ok(())
            });
            time::timeout(SHUTDOWN_GRACE, ended).await.unwrap();
            let error = supervisor.run().await.unwrap_err();
            assert_eq!(error.to_string(), why);
        }
    }
}
