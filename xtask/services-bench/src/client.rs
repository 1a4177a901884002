//! The end that asks, and measures.

use std::{
    collections::VecDeque,
    fs,
    io::{self, Read as _, Write as _},
    net::{Shutdown, SocketAddr, TcpStream, UdpSocket},
    os::fd::OwnedFd,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use rustix::{
    io::{Errno, ioctl_fionbio},
    net::{
        AddressFamily, SocketFlags, SocketType, connect, getpeername, socket_with,
        sockopt::{Timeout, set_socket_linger, set_socket_timeout},
    },
};

use crate::{
    keep_to,
    server::{PIECE_BYTES, TAKE_IN},
};

/// What takes longer never ends.
const LIMIT: Duration = Duration::from_secs(5);

/// Between the beginnings of connects of which is asked whether they are answered,
const CONNECT_EVERY: Duration = Duration::from_millis(5);

/// which they are by then, some ten times the round trip, or not before the SYN is sent again.
const ANSWER_LIMIT: Duration = Duration::from_millis(500);

/// Payload of a round trip and of a datagram: a small question.
const MESSAGE_BYTES: usize = 64;

/// Round trips before the first that counts: the connection's windows and timers settle.
const UNCOUNTED_ROUND_TRIPS: usize = 20;

/// Answers questions on standard input, each with one line: `{"Ok":[…]}` or `{"Err":"…"}`.
///
/// # Errors
///
/// If the cgroup cannot be entered, or nobody reads the answers.
pub(crate) fn run(cgroup: &Path) -> Result<()> {
    let procs = cgroup.join("cgroup.procs");
    fs::write(&procs, "0").with_context(|| format!("write {}", procs.display()))?;
    keep_to(0)?;
    for (number, question) in io::stdin().lines().enumerate() {
        let question = question?;
        let answer = answer(&question, number).map_err(|error| format!("{question}: {error:#}"));
        println!("{}", serde_json::to_string(&answer)?);
    }
    Ok(())
}

/// Each question begins with another address: with some ways, which endpoint one gets is not for the client to say, and
/// an endpoint that is always the same has its memory at hand.
fn answer(question: &str, number: usize) -> Result<Vec<u64>> {
    let words: Vec<_> = question.split(' ').collect();
    let &[verb, targets, amount] = words.as_slice() else {
        bail!("not three words");
    };
    let targets = targets.split(',').map(str::parse);
    let mut targets: Vec<SocketAddr> = targets.collect::<Result<_, _>>().context("ADDR:PORT")?;
    let first = number % targets.len().max(1);
    targets.rotate_left(first);
    let amount: usize = amount.parse().context("a number")?;
    let mut in_turns = targets.iter().cycle().copied();
    let mut next = || in_turns.next().context("no address");
    let each = |measure: fn(SocketAddr) -> Result<Duration>| {
        let targets = targets.iter().cycle().take(amount);
        targets
            .map(|target| nanoseconds(measure(*target)?))
            .collect()
    };
    match verb {
        "connect" => each(connect_alone),
        "first_byte" => each(first_byte),
        "datagram" => each(datagram),
        "round_trip" => round_trips(next()?, amount),
        "unanswered" => unanswered(next()?, Duration::from_millis(amount as u64)),
        "bulk" => bulk(next()?, Duration::from_millis(amount as u64)),
        _ => bail!("no such question"),
    }
}

fn nanoseconds(time: Duration) -> Result<u64> {
    Ok(u64::try_from(time.as_nanos())?)
}

/// A TCP socket that waits for nothing longer than [`LIMIT`], and whose end leaves nothing behind: with
/// closed connections kept for a minute, the search for a free port would be measured.
fn tcp_socket() -> Result<OwnedFd> {
    let socket = socket_with(
        AddressFamily::INET,
        SocketType::STREAM,
        SocketFlags::CLOEXEC,
        None,
    )?;
    for side in [Timeout::Recv, Timeout::Send] {
        set_socket_timeout(&socket, side, Some(LIMIT))?;
    }
    set_socket_linger(&socket, Some(Duration::ZERO))?;
    Ok(socket)
}

/// How long the system call `connect` takes.
fn connect_alone(target: SocketAddr) -> Result<Duration> {
    let socket = tcp_socket()?;
    let began = Instant::now();
    connect(&socket, &target)?;
    Ok(began.elapsed())
}

/// Begins a connect every [`CONNECT_EVERY`]: how many were not answered, and the nanoseconds from the first of those
/// until the last.
fn unanswered(target: SocketAddr, time: Duration) -> Result<Vec<u64>> {
    let mut waiting: VecDeque<(Duration, OwnedFd)> = VecDeque::new();
    let mut lost = Vec::new();
    let began = Instant::now();
    while began.elapsed() < time || !waiting.is_empty() {
        if began.elapsed() < time {
            let socket = tcp_socket()?;
            ioctl_fionbio(&socket, true)?;
            match connect(&socket, &target) {
                Ok(()) | Err(Errno::INPROGRESS) => waiting.push_back((began.elapsed(), socket)),
                Err(error) => return Err(error.into()),
            }
        }
        while let Some((at, socket)) = waiting.pop_front() {
            if began.elapsed() < at + ANSWER_LIMIT {
                waiting.push_front((at, socket));
                break;
            }
            if getpeername(&socket).is_err() {
                lost.push(at);
            }
        }
        thread::sleep(CONNECT_EVERY);
    }
    let times = lost.first().zip(lost.last());
    let between = times.map_or(Duration::ZERO, |(&first, &last)| last - first);
    Ok(vec![lost.len().try_into()?, nanoseconds(between)?])
}

/// How long it takes from `connect` until the answer to one byte, which is one byte.
fn first_byte(target: SocketAddr) -> Result<Duration> {
    let socket = tcp_socket()?;
    let began = Instant::now();
    connect(&socket, &target)?;
    let mut stream = TcpStream::from(socket);
    stream.write_all(b"?")?;
    stream.read_exact(&mut [0])?;
    Ok(began.elapsed())
}

fn connected(target: SocketAddr) -> Result<TcpStream> {
    let socket = tcp_socket()?;
    connect(&socket, &target)?;
    let stream = TcpStream::from(socket);
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// How long 64 bytes and as many back take on one open connection, again and again.
fn round_trips(target: SocketAddr, count: usize) -> Result<Vec<u64>> {
    let mut stream = connected(target)?;
    let mut message = [0; MESSAGE_BYTES];
    let mut times = Vec::with_capacity(count);
    for number in 0..UNCOUNTED_ROUND_TRIPS + count {
        let began = Instant::now();
        stream.write_all(&message)?;
        stream.read_exact(&mut message)?;
        if number >= UNCOUNTED_ROUND_TRIPS {
            times.push(nanoseconds(began.elapsed())?);
        }
    }
    Ok(times)
}

/// How long a UDP socket of its own takes to connect, to send 64 bytes and to receive as many: what a
/// resolver does for each name.
fn datagram(target: SocketAddr) -> Result<Duration> {
    let socket = UdpSocket::bind(("0.0.0.0", 0))?;
    socket.set_read_timeout(Some(LIMIT))?;
    let mut message = [0; MESSAGE_BYTES];
    let began = Instant::now();
    socket.connect(target)?;
    socket.send(&message)?;
    let length = socket.recv(&mut message)?;
    let took = began.elapsed();
    ensure!(length == message.len(), "an answer of {length} bytes");
    Ok(took)
}

/// One stream for a time: the bytes that arrived, the nanoseconds until their receiver said so, and the
/// microseconds for which the machine's processors worked meanwhile.
fn bulk(target: SocketAddr, time: Duration) -> Result<Vec<u64>> {
    let mut stream = connected(target)?;
    let mut piece = vec![0; PIECE_BYTES];
    if let Some(first) = piece.first_mut() {
        *first = TAKE_IN;
    }
    let processors = Processors::now()?;
    let began = Instant::now();
    while began.elapsed() < time {
        stream.write_all(&piece)?;
    }
    stream.shutdown(Shutdown::Write)?;
    let mut taken = [0; 8];
    // In the sockmap, a reader whom the kernel woke for something else is told that there is nothing to wait for.
    while let Err(error) = stream.peek(&mut taken) {
        ensure!(
            error.kind() == io::ErrorKind::WouldBlock && began.elapsed() < time + LIMIT,
            error
        );
    }
    stream.read_exact(&mut taken)?;
    let took = began.elapsed();
    let busy = Processors::now()?.since(&processors, took);
    let taken = u64::from_be_bytes(taken);
    Ok(vec![
        taken,
        nanoseconds(took)?,
        u64::try_from(busy.as_micros())?,
    ])
}

/// What the machine's processors did, by `/proc/stat`: of everybody, with what the kernel does for packets.
struct Processors {
    count: u32,
    idle_ticks: u64,
}

impl Processors {
    fn now() -> Result<Self> {
        let stat = fs::read_to_string("/proc/stat").context("read /proc/stat")?;
        processors(&stat).context("no processors in /proc/stat")
    }

    /// The time for which they were not idle.
    ///
    /// The kernel measures idle times, and only samples the others 100 times a second: so the time that is left
    /// is the exact one.
    fn since(&self, before: &Self, took: Duration) -> Duration {
        // A tick is 10 ms: USER_HZ is 100 everywhere.
        let idle = Duration::from_millis(10 * self.idle_ticks.saturating_sub(before.idle_ticks));
        (took * self.count).saturating_sub(idle)
    }
}

/// proc_stat(5): a line of sums, and one each processor: user, nice, system, idle, iowait, …
fn processors(stat: &str) -> Option<Processors> {
    let mut lines = stat.lines().filter(|line| line.starts_with("cpu"));
    let mut sums = lines.next()?.split_whitespace().skip(4);
    let idle: u64 = sums.next()?.parse().ok()?;
    let waiting: u64 = sums.next()?.parse().ok()?;
    Some(Processors {
        count: u32::try_from(lines.count()).ok()?,
        idle_ticks: idle + waiting,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processors_are_counted_and_their_idle_ticks_summed() {
        let stat = "cpu  100 2 30 4000 50 6 7 8 0 0\ncpu0 50 1 15 2000 25 3 3 4 0 0\n\
                    cpu1 50 1 15 2000 25 3 4 4 0 0\nintr 12 0\n";
        let before = processors(stat).unwrap();
        assert_eq!((before.count, before.idle_ticks), (2, 4_050));
        let after = Processors {
            count: 2,
            idle_ticks: 4_050 + 70,
        };
        // Of 2 × 1 s, 0.7 s were idle.
        let busy = after.since(&before, Duration::from_secs(1));
        assert_eq!(busy, Duration::from_millis(1_300));
        assert!(processors("intr 12 0\n").is_none());
    }

    #[test]
    fn what_is_no_question_is_told() {
        assert!(answer("connect 127.0.0.1:1", 0).is_err());
        assert!(answer("connect nowhere 1", 0).is_err());
        assert!(answer("dance 127.0.0.1:1 1", 0).is_err());
    }
}
