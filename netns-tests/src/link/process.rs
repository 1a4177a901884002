//! The link process: one thread, two TAPs, one queue a direction, one control pipe.

use std::{
    collections::VecDeque,
    fs::{self, File},
    io::{self, ErrorKind, Read, Stdin, Write as _},
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::{Impairment, Order, QUEUE_TIME};
use crate::sys;

/// Frames on their way in one direction: 100 Mb/s of full frames with 1 s of delay are 8 700;
/// 16 384 of them are 24 MB. Beyond, frames are lost.
const FRAMES_MAX: usize = 16_384;

/// Frames read from one TAP before the other one has its turn.
const BURST: usize = 64;

/// The largest frame: Ethernet header and VLAN tag around an MTU of up to 9 000.
const FRAME_MAX: usize = 9_018;

/// Runs until the control pipe ends.
///
/// # Errors
///
/// If the devices cannot be made.
pub fn run(a: (&str, &str), b: (&str, &str), cgroup: &Path) -> Result<()> {
    fs::write(cgroup.join("cgroup.procs"), "0").context("enter the links' cgroup")?;
    sys::enter_netns(a.0)?;
    let a = sys::open_tap(a.1)?;
    sys::enter_netns(b.0)?;
    let b = sys::open_tap(b.1)?;
    let mut link = Ends {
        taps: [a, b],
        ways: [Way::default(), Way::default()],
        kept: false,
    };
    link.run()
}

struct Ends {
    taps: [File; 2],
    ways: [Way; 2],
    kept: bool,
}

impl Ends {
    fn run(&mut self) -> Result<()> {
        let stdin = io::stdin();
        let mut control = Control {
            stdin,
            pending: Vec::new(),
        };
        let mut open = true;
        while open || self.kept {
            let ready = self.wait(&control.stdin, open)?;
            let [first, second] = &mut self.ways;
            let [a, b] = &mut self.taps;
            let now = Instant::now();
            first.pump(a, b, now)?;
            second.pump(b, a, now)?;
            if ready {
                open = self.obey(&mut control)?;
            }
        }
        Ok(())
    }

    /// Sleeps until a frame, an order, or a frame's time has come; says whether an order has.
    fn wait(&self, stdin: &Stdin, open: bool) -> Result<bool> {
        let due = self
            .ways
            .iter()
            .filter_map(|way| way.queue.front())
            .map(|(due, _)| *due)
            .min();
        let limit = due.map(|due| due.saturating_duration_since(Instant::now()));
        let limit = limit.map(|limit| Timespec {
            tv_sec: i64::try_from(limit.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: limit.subsec_nanos().into(),
        });
        let [a, b] = &self.taps;
        let mut fds = vec![PollFd::new(a, PollFlags::IN), PollFd::new(b, PollFlags::IN)];
        if open {
            fds.push(PollFd::new(stdin, PollFlags::IN));
        }
        match poll(&mut fds, limit.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error).context("poll"),
        }
        Ok(fds.get(2).is_some_and(|fd| !fd.revents().is_empty()))
    }

    fn obey(&mut self, control: &mut Control) -> Result<bool> {
        let Some(lines) = control.read()? else {
            return Ok(false);
        };
        for line in lines {
            match serde_json::from_str(&line).with_context(|| format!("order {line}"))? {
                Order::Set(impairment) => {
                    for (index, way) in self.ways.iter_mut().enumerate() {
                        way.set(impairment, index as u64);
                    }
                }
                Order::Keep => {
                    self.kept = true;
                    // Whoever has the lab made may read until the end of what all of it says.
                    let nowhere = File::options().write(true).open("/dev/null")?;
                    rustix::stdio::dup2_stderr(&nowhere)?;
                }
            }
            println!("ok");
        }
        Ok(true)
    }
}

struct Control {
    stdin: Stdin,
    pending: Vec<u8>,
}

impl Control {
    /// The lines that are there; `None` at the pipe's end.
    fn read(&mut self) -> Result<Option<Vec<String>>> {
        let mut bytes = [0; 4096];
        // Not through `Stdin`'s own buffer: what it holds, `poll` does not see.
        let count = rustix::io::read(&self.stdin, &mut bytes)?;
        if count == 0 {
            return Ok(None);
        }
        self.pending.extend(bytes.iter().take(count));
        let mut lines = Vec::new();
        while let Some(end) = self.pending.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = self.pending.drain(..=end).collect();
            lines.push(String::from_utf8_lossy(&line).trim().to_owned());
        }
        Ok(Some(lines))
    }
}

/// One direction.
struct Way {
    impairment: Impairment,
    random: StdRng,
    /// The link is in the bad state of Gilbert's model.
    bad: bool,
    queue: VecDeque<(Instant, Vec<u8>)>,
    /// When the rate limit's line is free again.
    free: Option<Instant>,
    /// When the last frame arrives: later ones do not overtake it.
    last: Option<Instant>,
}

impl Default for Way {
    fn default() -> Self {
        Self {
            impairment: Impairment::NONE,
            random: StdRng::seed_from_u64(0),
            bad: false,
            queue: VecDeque::new(),
            free: None,
            last: None,
        }
    }
}

impl Way {
    fn set(&mut self, impairment: Impairment, direction: u64) {
        let losses = |of: &Impairment| (of.seed, of.loss, of.loss_burst_frames);
        if losses(&impairment) != losses(&self.impairment) {
            self.random = StdRng::seed_from_u64(impairment.seed.wrapping_mul(2) + direction);
            self.bad = false;
        }
        self.impairment = impairment;
    }

    fn pump(&mut self, from: &mut File, to: &mut File, now: Instant) -> Result<()> {
        let mut frame = [0; FRAME_MAX];
        for _ in 0..BURST {
            match from.read(&mut frame) {
                Ok(length) => self.take(frame.iter().take(length).copied().collect(), now),
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                // EIO: this end is down. The frames on their way still arrive.
                Err(error) if error.raw_os_error() == Some(libc::EIO) => break,
                Err(error) => return Err(error).context("read a TAP"),
            }
        }
        while let Some((due, _)) = self.queue.front() {
            if *due > now {
                break;
            }
            if let Some((_, frame)) = self.queue.pop_front() {
                to.write_all(&frame).ok(); // EIO: the other end is down, and the frame is lost.
            }
        }
        Ok(())
    }

    fn take(&mut self, frame: Vec<u8>, now: Instant) {
        if self.loses() || self.impairment.down || self.queue.len() == FRAMES_MAX {
            return;
        }
        let Some(sent) = self.transmit(frame.len(), now) else {
            return;
        };
        let jitter = self.impairment.jitter.mul_f64(self.random.random::<f64>());
        let due = sent + self.impairment.delay + jitter;
        let due = self.last.map_or(due, |last| last.max(due));
        self.last = Some(due);
        self.queue.push_back((due, frame));
    }

    /// Whether the next frame vanishes.
    fn loses(&mut self) -> bool {
        let dice = self.random.random::<f64>();
        let Impairment {
            loss,
            loss_burst_frames: burst,
            ..
        } = self.impairment;
        if burst == 0.0 {
            return dice < loss;
        }
        // E. N. Gilbert, "Capacity of a burst-noise channel" (1960): the mean stay in the bad state is `burst`
        // frames, and the share of frames in it is `loss`.
        let leave = 1.0 / burst;
        let enter = loss / (1.0 - loss) / burst;
        self.bad = if self.bad {
            dice >= leave
        } else {
            dice < enter
        };
        self.bad
    }

    /// When the frame's last bit is on the line; `None` if the queue in front of it is full.
    fn transmit(&mut self, length: usize, now: Instant) -> Option<Instant> {
        if self.impairment.rate_bps == 0 {
            return Some(now);
        }
        let start = self.free.map_or(now, |free| free.max(now));
        if start.duration_since(now) > QUEUE_TIME {
            return None;
        }
        let bits = length as u64 * 8;
        let line_time = Duration::from_nanos(bits * 1_000_000_000 / self.impairment.rate_bps);
        self.free = Some(start + line_time);
        self.free
    }
}
