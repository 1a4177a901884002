//! Small servers and clients, so that a scenario knows exactly what answers it.

use std::{
    io::{BufRead as _, BufReader, Write as _},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use crate::tool;

/// Connections that the HTTP server serves at the same time; more wait in the kernel's backlog.
const CONNECTIONS_MAX: usize = 64;

/// A client that says nothing for this long is let go.
const CLIENT_LIMIT: Duration = Duration::from_secs(20);

/// What the HTTP server answers.
#[derive(Debug, Serialize, Deserialize)]
pub struct Hello {
    /// The server's name.
    pub node: String,
    /// The client as the server sees it.
    pub client: SocketAddr,
}

/// What a flow counted.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct FlowReport {
    /// Numbered packets sent.
    pub sent: u64,
    /// Packets that came back.
    pub answered: u64,
    /// Numbers that never came back, the first few.
    pub lost: Vec<u64>,
    /// The longest time without an answer.
    pub longest_gap_ms: u64,
}

/// Answers every HTTP request with a [`Hello`], for ever.
///
/// # Errors
///
/// If an address cannot be listened on.
pub fn serve_http(name: &str, listen: &[SocketAddr]) -> Result<()> {
    let listeners = listen
        .iter()
        .map(|address| TcpListener::bind(address).with_context(|| format!("listen on {address}")));
    let listeners: Vec<_> = listeners.collect::<Result<_>>()?;
    println!("listening");
    thread::scope(|scope| {
        for listener in &listeners {
            // A fixed number of threads is the limit on connections.
            for _ in 0..CONNECTIONS_MAX / listeners.len().max(1) {
                scope.spawn(|| {
                    for stream in listener.incoming().flatten() {
                        answer(name, stream).ok(); // The client went away: its own affair.
                    }
                });
            }
        }
    });
    Ok(())
}

fn answer(name: &str, mut stream: TcpStream) -> Result<()> {
    stream.set_read_timeout(Some(CLIENT_LIMIT))?;
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    // Headers end with an empty line; 100 of them are more than any client of the lab sends.
    for line in lines.by_ref().take(100) {
        if line?.is_empty() {
            break;
        }
    }
    let hello = Hello {
        node: name.to_owned(),
        client: unmapped(stream.peer_addr()?),
    };
    let body = serde_json::to_string(&hello)? + "\n";
    let length = body.len();
    write!(
        stream,
        "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\
         Connection: close\r\n\r\n{body}"
    )?;
    Ok(())
}

/// `::ffff:a.b.c.d` is an IPv4 client on a socket for both families.
fn unmapped(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

/// Sends every datagram back, for ever.
///
/// # Errors
///
/// If the address cannot be bound.
pub fn serve_echo(listen: SocketAddr) -> Result<()> {
    let socket = UdpSocket::bind(listen).with_context(|| format!("bind {listen}"))?;
    println!("listening");
    let mut buffer = [0; 2048];
    loop {
        let (length, from) = socket.recv_from(&mut buffer)?;
        if let Some(bytes) = buffer.get(..length) {
            socket.send_to(bytes, from).ok(); // No route back: the client counts it as lost.
        }
    }
}

/// How long an awaited answer may take before it is asked for again.
const AGAIN: Duration = Duration::from_millis(20);

/// Asks the node's own resolver for an A record until it has one, of `address` if that is said.
///
/// # Errors
///
/// If there is none within 20 s.
pub fn await_name(name: &str, address: Option<Ipv4Addr>) -> Result<()> {
    // RFC 1035 §4.1: id, recursion desired, one question; then the name, type A, class IN.
    let mut query = vec![0x48, 0x46, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in name.split('.') {
        query.push(u8::try_from(label.len())?);
        query.extend(label.bytes());
    }
    query.extend([0, 0, 1, 0, 1]);
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    socket.set_read_timeout(Some(AGAIN))?;
    tool::eventually(name, Duration::from_secs(20), || {
        socket.send_to(&query, "169.254.53.53:53")?;
        let mut answer = [0; 512];
        let (length, _) = socket.recv_from(&mut answer)?;
        let answers = answer.get(7).copied().filter(|_| length > query.len());
        ensure!(answers.is_some_and(|count| count > 0), "an empty answer");
        let records = answer.get(query.len()..length).unwrap_or_default();
        let is_there = |address: Ipv4Addr| {
            let mut places = records.windows(address.octets().len());
            places.any(|bytes| bytes == address.octets())
        };
        ensure!(address.is_none_or(is_there), "other addresses");
        Ok(())
    })
}

/// Connects until it works.
///
/// # Errors
///
/// If it does not within 20 s.
pub fn await_tcp(to: SocketAddr) -> Result<()> {
    tool::eventually("a connection", Duration::from_secs(20), || {
        Ok(TcpStream::connect_timeout(&to, AGAIN).map(drop)?)
    })
}

/// Sends numbered datagrams of `size_bytes` to an echo server at a fixed pace, and counts what
/// comes back until `linger` after the last one.
///
/// # Errors
///
/// If the socket cannot be made, or a datagram is too small to carry its number.
pub fn flow(
    to: SocketAddr,
    count: u64,
    interval: Duration,
    size_bytes: usize,
    linger: Duration,
) -> Result<FlowReport> {
    ensure!(size_bytes >= 8, "a datagram needs 8 bytes for its number");
    let any: SocketAddr = if to.is_ipv4() {
        "0.0.0.0:0".parse()?
    } else {
        "[::]:0".parse()?
    };
    let socket = UdpSocket::bind(any)?;
    socket
        .connect(to)
        .with_context(|| format!("connect to {to}"))?;
    let receiver = socket.try_clone()?;
    let start = Instant::now();
    let end = start + interval * u32::try_from(count)? + linger;
    let (seen, longest_gap) = thread::scope(|scope| -> Result<_> {
        let counting = scope.spawn(|| collect(&receiver, count, end, linger));
        for (number, turn) in (0..count).zip(0_u32..) {
            let mut datagram = number.to_be_bytes().to_vec();
            datagram.resize(size_bytes, 0);
            socket.send(&datagram).ok(); // No route or no buffer: lost, and counted as that.
            let next = start + interval * (turn + 1);
            thread::sleep(next.saturating_duration_since(Instant::now()));
        }
        counting
            .join()
            .map_err(|_| anyhow::anyhow!("the receiver panicked"))?
    })?;
    let missing = seen.iter().enumerate().filter(|(_, seen)| !**seen);
    Ok(FlowReport {
        sent: count,
        answered: seen.iter().map(|seen| u64::from(*seen)).sum(),
        lost: missing.map(|(number, _)| number as u64).take(20).collect(),
        longest_gap_ms: u64::try_from(longest_gap.as_millis())?,
    })
}

fn collect(
    socket: &UdpSocket,
    count: u64,
    end: Instant,
    linger: Duration,
) -> Result<(Vec<bool>, Duration)> {
    let mut seen = vec![false; usize::try_from(count)?];
    let mut buffer = [0; 2048];
    let mut last = Instant::now();
    let mut longest = Duration::ZERO;
    let mut left = seen.len();
    while left > 0 {
        let rest = end.saturating_duration_since(Instant::now());
        if rest.is_zero() {
            // The time in which nothing was sent any more is no gap.
            longest = longest.max(end.duration_since(last).saturating_sub(linger));
            break;
        }
        socket.set_read_timeout(Some(rest))?;
        // Errors are unreachable ports and the time-out: the loop's condition sees to both.
        let Ok(length) = socket.recv(&mut buffer) else {
            continue;
        };
        let number = buffer.get(..length).and_then(|bytes| bytes.first_chunk());
        let number = number
            .map(|bytes| u64::from_be_bytes(*bytes))
            .and_then(|n| usize::try_from(n).ok());
        if let Some(slot) = number.and_then(|number| seen.get_mut(number)) {
            left -= usize::from(!*slot);
            *slot = true;
            longest = longest.max(last.elapsed());
            last = Instant::now();
        }
    }
    Ok((seen, longest))
}
