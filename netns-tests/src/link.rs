//! A link that delays, loses, limits and fails, as told.
//!
//! The kernel of the development machines has no netem: a process of the lab moves the frames
//! between two TAP devices, one in each namespace.

pub mod process;

use std::{
    io::{BufRead as _, BufReader, Write as _},
    path::Path,
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    sync::{Mutex, PoisonError},
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};

use crate::tool;

/// What a link does to frames, the same in both directions.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Impairment {
    /// Added to each frame's way.
    pub delay: Duration,
    /// Added on top, uniformly from nothing to this. Frames keep their order.
    pub jitter: Duration,
    /// The share of frames that vanish, 0 to 1.
    pub loss: f64,
    /// How many frames in a row vanish on average (Gilbert's model: a chain of a good state, which loses
    /// nothing, and a bad one, which loses all). 0: frames vanish independently of each other.
    pub loss_burst_frames: f64,
    /// Bits a second; 0 is no limit. The queue in front holds [`QUEUE_TIME`].
    pub rate_bps: u64,
    /// Nothing passes.
    pub down: bool,
    /// Where the losses come from: the same seed loses the same frames.
    pub seed: u64,
}

/// A rate limit's queue: what the link carries in this time, as a home router of the better kind.
pub const QUEUE_TIME: Duration = Duration::from_millis(100);

impl Impairment {
    /// A wire.
    pub const NONE: Self = Self {
        delay: Duration::ZERO,
        jitter: Duration::ZERO,
        loss: 0.0,
        loss_burst_frames: 0.0,
        rate_bps: 0,
        down: false,
        seed: 1,
    };

    /// A delay each way, and a loss each way.
    #[must_use]
    pub const fn delay_loss(delay: Duration, loss: f64) -> Self {
        Self {
            delay,
            loss,
            ..Self::NONE
        }
    }

    pub(crate) fn check(&self) -> Result<()> {
        ensure!(
            (0.0..=1.0).contains(&self.loss),
            "loss {} is not between 0 and 1",
            self.loss
        );
        // By the model: from the good state a burst begins with `loss / (1 − loss) / burst`, a chance of 1 at most.
        let burst = self.loss_burst_frames;
        ensure!(
            burst == 0.0 || burst >= 1.0 && self.loss <= burst / (burst + 1.0),
            "bursts of {burst} frames cannot make a loss of {}",
            self.loss
        );
        let limit = Duration::from_secs(10);
        ensure!(
            self.delay + self.jitter <= limit,
            "delay and jitter are over {limit:?}"
        );
        Ok(())
    }
}

/// A line on the control pipe. Each is answered with `ok`.
#[derive(Debug, Serialize, Deserialize)]
enum Order {
    Set(Impairment),
    /// The pipe's end is not to be the link's.
    Keep,
}

/// A running link.
#[derive(Debug)]
pub struct Link(Mutex<Inner>);

#[derive(Debug)]
struct Inner {
    child: Child,
    stdin: Option<ChildStdin>,
    stdout: BufReader<ChildStdout>,
    impairment: Impairment,
    kept: bool,
}

impl Link {
    pub(crate) fn start(
        a_netns: &str,
        a_if: &str,
        b_netns: &str,
        b_if: &str,
        cgroup: &Path,
        impairment: Impairment,
    ) -> Result<Self> {
        let mut child = Command::new(tool::binary("lab")?)
            .args(["link", a_netns, a_if, b_netns, b_if])
            .arg(cgroup)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("start a link process")?;
        let stdin = child.stdin.take();
        let stdout = BufReader::new(child.stdout.take().context("no pipe from the link")?);
        let link = Self(Mutex::new(Inner {
            child,
            stdin,
            stdout,
            impairment,
            kept: false,
        }));
        link.set(impairment)?; // The answer says that both devices are there.
        Ok(link)
    }

    /// Changes what it does, for frames from now on; those on their way arrive.
    ///
    /// # Errors
    ///
    /// If the impairment is out of range, or the process is gone.
    pub fn set(&self, impairment: Impairment) -> Result<()> {
        impairment.check()?;
        let mut inner = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        inner.say(&Order::Set(impairment))?;
        inner.impairment = impairment;
        Ok(())
    }

    /// Cuts it, or joins it again.
    ///
    /// # Errors
    ///
    /// If the process is gone.
    pub fn set_down(&self, down: bool) -> Result<()> {
        let now = self
            .0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .impairment;
        self.set(Impairment { down, ..now })
    }

    /// Lets it run on when the owner ends.
    ///
    /// # Errors
    ///
    /// If the process is gone.
    pub fn keep(&self) -> Result<()> {
        let mut inner = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        inner.say(&Order::Keep)?;
        inner.kept = true;
        Ok(())
    }
}

impl Inner {
    fn say(&mut self, order: &Order) -> Result<()> {
        let line = serde_json::to_string(order)?;
        let stdin = self.stdin.as_mut().context("the link is closed")?;
        writeln!(stdin, "{line}").context("tell the link process")?;
        let mut answer = String::new();
        self.stdout.read_line(&mut answer)?;
        if answer != "ok\n" {
            bail!("the link process does not obey; it says {answer:?}");
        }
        Ok(())
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        if !self.kept {
            drop(self.stdin.take()); // It ends when the pipe does.
            self.child.wait().ok();
        }
    }
}
