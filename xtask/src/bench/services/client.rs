//! The client in a pod, asked from here.

use std::{path::Path, time::Duration};

use anyhow::{Result, anyhow};
use netns_tests::node::Node;

use crate::bench::ask::Asked;

/// `services-bench ask` on a node; killed when dropped.
#[derive(Debug)]
pub(super) struct Client(Asked);

impl Client {
    /// Starts it on `node`, and in `cgroup`.
    ///
    /// # Errors
    ///
    /// If it cannot be started.
    pub(super) fn start(node: &Node, program: &str, cgroup: &Path) -> Result<Self> {
        let cgroup = cgroup.display().to_string();
        let command = node.command(&[program, "ask", &cgroup])?;
        Asked::start(command).map(Self)
    }

    /// `count` times in nanoseconds, of what `verb` does with each of the addresses in turn.
    ///
    /// # Errors
    ///
    /// If one of them did not come to its end.
    pub(super) fn times(&mut self, verb: &str, addresses: &str, count: usize) -> Result<Vec<u64>> {
        self.ask(&format!("{verb} {addresses} {count}"))
    }

    /// One stream to one of the addresses, another one each time.
    ///
    /// # Errors
    ///
    /// If it broke.
    pub(super) fn bulk(&mut self, addresses: &str, time: Duration) -> Result<Flow> {
        let said = self.ask(&format!("bulk {addresses} {}", time.as_millis()))?;
        let &[bytes, nanoseconds, busy_us] = said.as_slice() else {
            return Err(anyhow!("bulk: {said:?}"));
        };
        Ok(Flow {
            bytes,
            took: Duration::from_nanos(nanoseconds),
            busy: Duration::from_micros(busy_us),
        })
    }

    /// Begins connects for `time`, 5 ms apart: how many were not answered, and the time from the first of those
    /// until the last.
    ///
    /// # Errors
    ///
    /// If none could be begun.
    pub(super) fn unanswered(&mut self, address: &str, time: Duration) -> Result<(u64, Duration)> {
        let said = self.ask(&format!("unanswered {address} {}", time.as_millis()))?;
        let &[count, nanoseconds] = said.as_slice() else {
            return Err(anyhow!("unanswered: {said:?}"));
        };
        Ok((count, Duration::from_nanos(nanoseconds)))
    }

    fn ask(&mut self, question: &str) -> Result<Vec<u64>> {
        self.0.ask(question)
    }
}

/// What one stream did.
#[derive(Debug, Clone, Copy)]
pub(super) struct Flow {
    /// Bytes that arrived.
    pub(super) bytes: u64,
    /// Until the receiver said so.
    pub(super) took: Duration,
    /// For how long the machine's processors worked meanwhile, all together.
    pub(super) busy: Duration,
}

impl Flow {
    /// Both, one after the other.
    pub(super) fn and(self, other: Self) -> Self {
        Self {
            bytes: self.bytes + other.bytes,
            took: self.took + other.took,
            busy: self.busy + other.busy,
        }
    }

    pub(super) fn mbit_per_s(&self) -> f64 {
        self.bytes as f64 * 8.0 / 1e6 / self.took.as_secs_f64()
    }

    pub(super) fn busy_s_per_gb(&self) -> f64 {
        self.busy.as_secs_f64() / (self.bytes as f64 / 1e9)
    }
}
