//! Waiting for file descriptors or for the word to stop.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::Arc,
    time::Duration,
};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

/// Says "stop" to every thread that waits with it, once and for good.
#[derive(Debug, Clone)]
pub struct StopSignal(Arc<OwnedFd>);

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

    /// Somebody who waits for descriptors and for this signal.
    #[must_use]
    pub fn waiter<'fd>(&'fd self, fds: impl IntoIterator<Item = BorrowedFd<'fd>>) -> Waiter<'fd> {
        let fds: Vec<_> = std::iter::once(self.0.as_fd()).chain(fds).collect();
        let polls = fds
            .iter()
            .map(|fd| PollFd::from_borrowed_fd(*fd, PollFlags::IN));
        let polls = polls.collect();
        Waiter { fds, polls }
    }
}

/// Waits again and again for the same descriptors.
#[derive(Debug)]
pub struct Waiter<'fd> {
    /// The signal, and the descriptors.
    fds: Vec<BorrowedFd<'fd>>,
    polls: Vec<PollFd<'fd>>,
}

impl Waiter<'_> {
    /// Blocks until a descriptor can be read or has an error to tell, until descriptor `writable` can
    /// be written, until `patience` is over, or until the signal is given. Whether it was not the
    /// signal.
    ///
    /// # Errors
    ///
    /// What `poll` says; an interrupted call is a short one.
    pub fn wait(
        &mut self,
        patience: Option<Duration>,
        writable: Option<usize>,
    ) -> io::Result<bool> {
        let wanted = writable.map(|number| number + 1);
        for (number, (poll, fd)) in self.polls.iter_mut().zip(&self.fds).enumerate() {
            let flags = if wanted == Some(number) {
                PollFlags::IN | PollFlags::OUT
            } else {
                PollFlags::IN
            };
            *poll = PollFd::from_borrowed_fd(*fd, flags);
        }
        let timeout = patience.and_then(|time| Timespec::try_from(time).ok());
        match poll(&mut self.polls, timeout.as_ref()) {
            Ok(_) => Ok(self
                .polls
                .first()
                .is_some_and(|stop| stop.revents().is_empty())),
            // Nothing was found out: what the polls say is empty.
            Err(rustix::io::Errno::INTR) => Ok(true),
            Err(error) => Err(error.into()),
        }
    }

    /// Whether descriptor `number` could be read when [`Self::wait`] returned.
    #[must_use]
    pub fn is_readable(&self, number: usize) -> bool {
        let found = self.polls.get(number + 1);
        found.is_some_and(|fd| !(fd.revents() - PollFlags::OUT).is_empty())
    }
}
