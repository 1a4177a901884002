//! Load on a way between two nodes, and what came of it: datagrams at a rate, and round trips.
//!
//! One process has a socket in each of the two namespaces, so both ends share a clock and nothing
//! has to be reported over the way that is being measured.

use std::{
    io::{self, IoSlice},
    net::{Ipv4Addr, UdpSocket},
    num::NonZeroU64,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, ensure};
use rustix::{
    net::{MMsgHdr, SendAncillaryBuffer, SendFlags, sendmmsg, sockopt},
    thread::set_current_timer_slack,
};

use crate::{node::Node, sys};

/// The sender wakes this often: at 400,000 datagrams a second it sends 80 at once, which fit every
/// queue between here and there.
const TICK: Duration = Duration::from_micros(200);

/// A sender that was not scheduled for longer than this does not make up for it: it would measure
/// the queues by a burst of its own.
const BEHIND_MAX: Duration = Duration::from_millis(2);

/// Datagrams a system call.
const BATCH: usize = 64;

/// The kernel charges some 800 bytes for a small datagram: room for 20,000, so that a reader that is not
/// scheduled for 20 ms loses none at a million a second.
const RECEIVE_BUFFER_BYTES: usize = 16 << 20;

/// A receiver looks this often whether it may stop; and after this time without a datagram, none
/// is on its way any more.
const QUIET: Duration = Duration::from_millis(40);

/// A round trip that takes longer counts as lost, and as this long.
pub const ROUND_TRIP_MAX: Duration = Duration::from_secs(1);

/// Payload of a probe: number, time, and what a voice packet's size is made of.
const PROBE_BYTES: usize = 64;

/// From one node to an address of another.
#[derive(Debug, Clone, Copy)]
pub struct Way<'a> {
    /// The sender.
    pub from: &'a Node,
    /// The receiver.
    pub to: &'a Node,
    /// The receiver's address on this way.
    pub address: Ipv4Addr,
}

impl Way<'_> {
    /// The sender's socket, connected, and the receiver's.
    pub(crate) fn sockets(self) -> Result<(UdpSocket, UdpSocket)> {
        let receiver = self
            .to
            .enter(|| UdpSocket::bind((self.address, 0)))?
            .with_context(|| format!("bind {} on {}", self.address, self.to.name()))?;
        sockopt::set_socket_recv_buffer_size_force(&receiver, RECEIVE_BUFFER_BYTES)
            .context("enlarge a receive buffer")?;
        receiver.set_read_timeout(Some(QUIET))?;
        let to = receiver.local_addr()?;
        let sender = self.from.enter(|| {
            let sender = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
            sender.connect(to)?;
            io::Result::Ok(sender)
        })?;
        let sender = sender.with_context(|| format!("connect to {to} on {}", self.from.name()))?;
        sender.set_read_timeout(Some(QUIET))?;
        Ok((sender, receiver))
    }
}

/// Datagrams to send.
#[derive(Debug, Clone, Copy)]
pub struct Offer {
    /// UDP payload of each.
    pub payload_bytes: usize,
    /// Datagrams a second; `None`: as many as the kernel takes.
    pub rate: Option<f64>,
    /// For how long.
    pub time: Duration,
}

/// What became of an [`Offer`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Trial {
    /// Datagrams that the kernel took.
    pub sent: u64,
    /// Datagrams that arrived.
    pub received: u64,
    /// How long the sender took.
    pub sending: Duration,
    /// From the first one sent to the last one received: the queues' emptying counts.
    pub receiving: Duration,
}

/// Sends datagrams at a rate and counts what arrives.
///
/// # Errors
///
/// If a socket cannot be made or fails.
pub fn offer(way: Way, offer: Offer) -> Result<Trial> {
    let (sender, receiver) = way.sockets()?;
    let sent_all = AtomicBool::new(false);
    let start = Instant::now();
    let (sent, counted) = thread::scope(|scope| {
        let counting = scope.spawn(|| count(&receiver, &sent_all));
        let sent = send(&sender, offer, start);
        sent_all.store(true, Ordering::Relaxed);
        let counted = counting
            .join()
            .map_err(|_| anyhow!("the receiver panicked"));
        Ok::<_, anyhow::Error>((sent?, counted??))
    })?;
    let (received, last) = counted;
    Ok(Trial {
        sent: sent.0,
        received,
        sending: sent.1,
        receiving: last.map_or(sent.1, |last| last.duration_since(start)),
    })
}

/// Datagrams that the kernel took, and how long that took.
fn send(socket: &UdpSocket, offer: Offer, start: Instant) -> Result<(u64, Duration)> {
    exact_sleep()?;
    let payload = vec![0; offer.payload_bytes];
    let slices = [IoSlice::new(&payload)];
    let mut controls: [SendAncillaryBuffer<'_, '_, '_>; BATCH] =
        std::array::from_fn(|_| SendAncillaryBuffer::default());
    let mut messages: Vec<_> = controls
        .iter_mut()
        .map(|control| MMsgHdr::new(&slices, control))
        .collect();
    let (mut sent, mut forgiven) = (0_u64, Duration::ZERO);
    loop {
        let now = start.elapsed();
        if now >= offer.time {
            return Ok((sent, now));
        }
        let due = match offer.rate {
            None => sent + BATCH as u64,
            Some(rate) => {
                let behind = (now - forgiven).saturating_sub(time_of(sent, rate));
                // Not what is between two datagrams of a slow offer.
                forgiven += behind.saturating_sub(BEHIND_MAX.max(time_of(2, rate)));
                count_in(now - forgiven, rate)
            }
        };
        let burst = usize::try_from(due.saturating_sub(sent))?.min(BATCH);
        if burst == 0 {
            thread::sleep(TICK);
            continue;
        }
        let batch = messages.get_mut(..burst).context("a batch")?;
        sent += match sendmmsg(socket, batch, SendFlags::empty()) {
            Ok(taken) => taken as u64,
            // The device's queue is full: that one is lost.
            Err(rustix::io::Errno::NOBUFS) => 1,
            Err(error) => return Err(error).context("sendmmsg"),
        };
    }
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "datagrams of a fraction of a second"
)]
fn count_in(time: Duration, rate: f64) -> u64 {
    (time.as_secs_f64() * rate) as u64
}

fn time_of(count: u64, rate: f64) -> Duration {
    Duration::from_secs_f64(count as f64 / rate)
}

/// Datagrams that came, and when the last one did.
fn count(socket: &UdpSocket, sent_all: &AtomicBool) -> Result<(u64, Option<Instant>)> {
    let (mut received, mut last) = (0, None);
    loop {
        let ended = sent_all.load(Ordering::Relaxed);
        match sys::discard_batch(socket) {
            Ok(count) => {
                received += count as u64;
                last = Some(Instant::now());
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                if ended {
                    return Ok((received, last));
                }
            }
            Err(error) => return Err(error).context("recvmmsg"),
        }
    }
}

/// Sends `count` probes, one each `interval` whether or not answers come, and returns each one's
/// round trip in the order sent. A lost one took [`ROUND_TRIP_MAX`].
///
/// # Errors
///
/// If a socket cannot be made or fails.
pub fn round_trips(way: Way, count: u32, interval: Duration) -> Result<Vec<Duration>> {
    let (prober, echo) = way.sockets()?;
    let stop = AtomicBool::new(false);
    let start = Instant::now();
    let end = start + interval * count + ROUND_TRIP_MAX;
    thread::scope(|scope| {
        let echoing = scope.spawn(|| echo_until(&echo, &stop));
        let collecting = scope.spawn(|| collect(&prober, count, start, end));
        let probed = probe(&prober, count, interval, start);
        let collected = collecting.join();
        stop.store(true, Ordering::Relaxed);
        let echoed = echoing.join().map_err(|_| anyhow!("the echo panicked"));
        probed?;
        echoed??;
        collected.map_err(|_| anyhow!("the collector panicked"))?
    })
}

fn probe(socket: &UdpSocket, count: u32, interval: Duration, start: Instant) -> Result<()> {
    exact_sleep()?;
    for number in 0..count {
        let due = interval * number;
        thread::sleep(due.saturating_sub(start.elapsed()));
        let now = u64::try_from(start.elapsed().as_nanos())?;
        let mut datagram = [u64::from(number).to_be_bytes(), now.to_be_bytes()].concat();
        datagram.resize(PROBE_BYTES, 0);
        socket.send(&datagram).context("send a probe")?;
    }
    Ok(())
}

fn collect(socket: &UdpSocket, count: u32, start: Instant, end: Instant) -> Result<Vec<Duration>> {
    let mut times = vec![ROUND_TRIP_MAX; usize::try_from(count)?];
    let mut buffer = [0; PROBE_BYTES];
    let mut left = times.len();
    while left > 0 && Instant::now() < end {
        let length = match socket.recv(&mut buffer) {
            Ok(length) => length,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
            Err(error) => return Err(error).context("receive a probe's answer"),
        };
        let now = start.elapsed();
        ensure!(
            length == PROBE_BYTES,
            "a probe's answer of {length} bytes, and not {PROBE_BYTES}"
        );
        let [number, sent] = [0, 8].map(|at| {
            let bytes = buffer.get(at..).and_then(|rest| rest.first_chunk());
            bytes.map_or(u64::MAX, |bytes| u64::from_be_bytes(*bytes))
        });
        let slot = usize::try_from(number)?;
        let slot = times.get_mut(slot).context("a probe that nobody sent")?;
        left -= usize::from(*slot == ROUND_TRIP_MAX); // A second answer is none.
        *slot = (*slot).min(now.saturating_sub(Duration::from_nanos(sent)));
    }
    Ok(times)
}

fn echo_until(socket: &UdpSocket, stop: &AtomicBool) -> Result<()> {
    let mut buffer = [0; PROBE_BYTES];
    while !stop.load(Ordering::Relaxed) {
        match socket.recv_from(&mut buffer) {
            Ok((_, from)) => drop(socket.send_to(&buffer, from).context("echo a probe")?),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error).context("receive a probe"),
        }
    }
    Ok(())
}

/// The kernel may add 50 µs to every sleep of a thread, in order to save power.
fn exact_sleep() -> Result<()> {
    set_current_timer_slack(NonZeroU64::new(1)).context("set the timer slack")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lab::Lab;

    fn with_wire(test: impl FnOnce(Way)) {
        let lab = Lab::new().unwrap();
        let from = lab.add_node("from").unwrap();
        let to = lab.add_node("to").unwrap();
        lab.veth(&from, "eth0", &to, "eth0").unwrap();
        for (node, address) in [(&from, "10.0.0.1/24"), (&to, "10.0.0.2/24")] {
            crate::tool::ip(node.netns(), &format!("addr add {address} dev eth0\n")).unwrap();
        }
        test(Way {
            from: &from,
            to: &to,
            address: [10, 0, 0, 2].into(),
        });
    }

    #[test]
    fn a_slow_offer_arrives_whole_at_its_rate() {
        with_wire(|way| {
            let wanted = Offer {
                payload_bytes: 64,
                rate: Some(5_000.0),
                time: Duration::from_millis(200),
            };
            let trial = offer(way, wanted).unwrap();
            assert_eq!(trial.sent, trial.received, "{trial:?}");
            // A machine that did not let us send in time is forgiven, with a smaller number.
            assert!((1..=1_000).contains(&trial.sent), "{trial:?}");
            assert!(trial.receiving <= trial.sending + QUIET, "{trial:?}");
        });
    }

    #[test]
    fn an_offer_of_a_few_datagrams_a_second_is_sent_too() {
        with_wire(|way| {
            let wanted = Offer {
                payload_bytes: 64,
                rate: Some(50.0),
                time: Duration::from_millis(300),
            };
            let trial = offer(way, wanted).unwrap();
            assert!((5..=16).contains(&trial.sent), "{trial:?}");
        });
    }

    #[test]
    fn what_is_lost_is_seen() {
        with_wire(|way| {
            let lossy = "table ip t {\n chain c {\n type filter hook input priority 0;\n \
                         meta l4proto udp numgen inc mod 2 == 0 drop\n }\n}\n";
            crate::tool::nft(way.to.netns(), lossy).unwrap();
            let wanted = Offer {
                payload_bytes: 64,
                rate: None,
                time: Duration::from_millis(20),
            };
            let trial = offer(way, wanted).unwrap();
            assert!(trial.received.abs_diff(trial.sent / 2) <= 1, "{trial:?}");
            let times = round_trips(way, 10, Duration::from_millis(1)).unwrap();
            let lost = times.iter().filter(|time| **time == ROUND_TRIP_MAX);
            assert_eq!((times.len(), lost.count()), (10, 5), "{times:?}");
        });
    }
}
