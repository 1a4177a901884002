//! Waiting for a file descriptor or for the word to stop.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    sync::Arc,
    time::Duration,
};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

/// Says "stop" to every thread that waits with it, once and for good.
#[derive(Debug, Clone)]
pub struct StopSignal(Arc<OwnedFd>);

/// Why [`StopSignal::wait_readable`] returned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Woken {
    /// The descriptor can be read, or has an error to tell.
    Readable,
    /// [`StopSignal::stop`] was called.
    Stopped,
}

impl StopSignal {
    /// Makes a signal that has not been given.
    ///
    /// # Errors
    ///
    /// If the process has no file descriptor left.
    pub fn new() -> io::Result<Self> {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        Ok(Self(Arc::new(eventfd(0, flags)?)))
    }

    /// Wakes all waiters, now and in the future.
    pub fn stop(&self) {
        // Fails only when the counter is full, that is after 2⁶⁴ − 1 calls: stopped anyway.
        rustix::io::write(&self.0, &1_u64.to_ne_bytes()).ok();
    }

    /// Blocks for `time`, or until the signal is given; whether it was.
    #[must_use]
    pub fn wait(&self, time: Duration) -> bool {
        let timeout = Timespec::try_from(time).ok();
        let mut fds = [PollFd::new(&self.0, PollFlags::IN)];
        // An interrupted or failed wait is a short one; callers come round again.
        poll(&mut fds, timeout.as_ref()).is_ok_and(|ready| ready > 0)
    }

    /// Blocks until `fd` can be read or the signal is given.
    ///
    /// # Errors
    ///
    /// What `poll` says, except that an interrupted call is begun again.
    pub fn wait_readable(&self, fd: impl AsFd) -> io::Result<Woken> {
        let mut fds = [
            PollFd::new(&self.0, PollFlags::IN),
            PollFd::from_borrowed_fd(fd.as_fd(), PollFlags::IN),
        ];
        loop {
            match poll(&mut fds, None) {
                Ok(_) if fds.first().is_some_and(|stop| !stop.revents().is_empty()) => {
                    return Ok(Woken::Stopped);
                }
                Ok(_) => return Ok(Woken::Readable),
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}
