//! `perf`: round trips and throughput between two nodes by TCP through the mesh.
//!
//! The other node's operator lets it: `meshctl perf --serve` listens there, at the overlay address only, for a time that is
//! said, and serves one connection after the other. Nothing listens otherwise.

use std::{
    io::{self, Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    time::{Duration, Instant},
};

use serde::Serialize;

use crate::{
    connect::Agent,
    failure::Failure,
    reach::{self, v4},
    run::{self, Screen},
    show::Report,
    table::{bytes, milliseconds},
};

/// TCP port on the overlay, below the agents' own.
const PORT: u16 = 51_816;

/// Round trips that are measured, of a byte each.
const ROUND_TRIPS: usize = 20;

/// Longest that one way of one connection takes, and most that it carries, whatever the other side asks for: 60 s at
/// 1 Gb/s.
pub(crate) const TIME_MAX: Duration = Duration::from_secs(60);
const BYTES_MAX: u64 = 8 << 30;

/// What is written at once.
const CHUNK_BYTES: usize = 128 << 10;

/// How long the other side may be silent: a path is woken in 2 s, a segment is sent again in 3.
const SILENCE: Duration = Duration::from_secs(10);

/// How often a listener looks whether its time is over.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// How long a test may go on before it is said what it does.
const PROGRESS_EVERY: Duration = Duration::from_secs(1);

/// What a client's first byte asks for.
const ECHO: u8 = b'e';
/// It sends until it shuts its side, and is told how much came: eight bytes, the largest first.
const TAKE: u8 = b't';
/// It is sent to until it closes.
const GIVE: u8 = b'g';

/// `perf NODE`.
#[derive(Debug, Serialize)]
pub(crate) struct Perf {
    pub(crate) node: String,
    /// By which the agent reaches it after the test.
    pub(crate) path: Option<String>,
    /// Of a byte there and back by TCP.
    pub(crate) rtt_min_ms: f64,
    pub(crate) rtt_median_ms: f64,
    pub(crate) rtt_max_ms: f64,
    pub(crate) to_node: Way,
    pub(crate) from_node: Way,
}

/// One way.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(crate) struct Way {
    /// That arrived.
    pub(crate) bytes: u64,
    pub(crate) seconds: f64,
    pub(crate) megabits_per_s: f64,
}

impl Way {
    fn new(bytes: u64, time: Duration) -> Self {
        let seconds = time.as_secs_f64();
        #[expect(clippy::cast_precision_loss, reason = "shown with one decimal")]
        let bits = bytes as f64 * 8.0;
        Self {
            bytes,
            seconds,
            megabits_per_s: bits / seconds.max(f64::EPSILON) / 1e6,
        }
    }
}

/// `perf --serve`.
#[derive(Debug, Serialize)]
pub(crate) struct Served {
    pub(crate) connections: u64,
    pub(crate) received_bytes: u64,
    pub(crate) sent_bytes: u64,
}

/// How much one way may take.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limit {
    pub(crate) time: Duration,
    pub(crate) bytes: u64,
}

pub(crate) async fn measure(
    agent: Agent<'_>,
    node: &str,
    limit: Limit,
    screen: Screen,
) -> Result<Perf, Failure> {
    let to = SocketAddr::from((reach::address(agent, node).await?, PORT));
    let failed = |error: io::Error| {
        if error.kind() == io::ErrorKind::ConnectionRefused {
            let text = format!("nobody listens at {node}: `meshctl perf --serve` there first");
            return Failure::Failed(text);
        }
        Failure::Failed(format!(
            "{node} ({to}): {error}: `meshctl ping {node}`, `meshctl trace {node}:{PORT}`"
        ))
    };
    let mut times = round_trips(to).map_err(failed)?;
    times.sort();
    let at = |index: usize| {
        times
            .get(index)
            .map_or(0.0, |time| time.as_secs_f64() * 1e3)
    };
    let to_node = send(to, limit, screen).map_err(failed)?;
    let from_node = receive(to, limit, screen).map_err(failed)?;
    let why = run::path_why(agent, node.to_owned()).await?;
    let used = why.paths.into_iter().find(|path| path.state == "primary");
    Ok(Perf {
        node: node.to_owned(),
        path: used.map(|path| path.path),
        rtt_min_ms: at(0),
        rtt_median_ms: at(times.len() / 2),
        rtt_max_ms: at(times.len().saturating_sub(1)),
        to_node,
        from_node,
    })
}

fn open(to: SocketAddr, asks: u8) -> io::Result<TcpStream> {
    let mut stream = TcpStream::connect_timeout(&to, SILENCE)?;
    limit_silence(&stream)?;
    stream.write_all(&[asks])?;
    Ok(stream)
}

fn limit_silence(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(SILENCE))?;
    stream.set_write_timeout(Some(SILENCE))
}

fn round_trips(to: SocketAddr) -> io::Result<Vec<Duration>> {
    let mut stream = open(to, ECHO)?;
    let mut times = Vec::with_capacity(ROUND_TRIPS);
    for _ in 0..ROUND_TRIPS {
        let at = Instant::now();
        stream.write_all(&[0])?;
        stream.read_exact(&mut [0])?;
        times.push(at.elapsed());
    }
    Ok(times)
}

fn send(to: SocketAddr, limit: Limit, screen: Screen) -> io::Result<Way> {
    let mut stream = open(to, TAKE)?;
    let began = Instant::now();
    let mut progress = Progress::new("to the node", screen);
    let chunk = vec![0; CHUNK_BYTES];
    let mut sent = 0;
    while began.elapsed() < limit.time && sent < limit.bytes {
        let left = usize::try_from(limit.bytes - sent).unwrap_or(usize::MAX);
        let part = chunk.get(..left.min(CHUNK_BYTES)).unwrap_or_default();
        sent += count(stream.write(part)?);
        progress.on(sent, began);
    }
    stream.shutdown(std::net::Shutdown::Write)?;
    // What is still under way belongs to the time.
    let mut arrived = [0; 8];
    stream.read_exact(&mut arrived)?;
    Ok(Way::new(u64::from_be_bytes(arrived), began.elapsed()))
}

fn receive(to: SocketAddr, limit: Limit, screen: Screen) -> io::Result<Way> {
    let mut stream = open(to, GIVE)?;
    let began = Instant::now();
    let mut progress = Progress::new("from the node", screen);
    let mut chunk = vec![0; CHUNK_BYTES];
    let mut received = 0;
    while began.elapsed() < limit.time && received < limit.bytes {
        match stream.read(&mut chunk)? {
            0 => break,
            some => received += count(some),
        }
        progress.on(received, began);
    }
    Ok(Way::new(received, began.elapsed()))
}

/// Says once a second how far it is.
struct Progress {
    way: &'static str,
    screen: Screen,
    next: Instant,
}

impl Progress {
    fn new(way: &'static str, screen: Screen) -> Self {
        Self {
            way,
            screen,
            next: Instant::now() + PROGRESS_EVERY,
        }
    }

    fn on(&mut self, count: u64, began: Instant) {
        let now = Instant::now();
        if now >= self.next {
            self.next = now + PROGRESS_EVERY;
            let rate = Way::new(count, began.elapsed()).megabits_per_s;
            let text = format!("{}: {} so far, {rate:.1} Mb/s", self.way, bytes(count));
            self.screen.note(&text);
        }
    }
}

pub(crate) async fn serve(
    agent: Agent<'_>,
    time: Duration,
    screen: Screen,
) -> Result<Served, Failure> {
    let status = run::status(agent).await?;
    let own = v4(&status.overlay_addresses)?;
    let failed = |error: io::Error| Failure::Failed(format!("{own}:{PORT}: {error}"));
    screen.note(&format!(
        "listening at {own}:{PORT}, in the mesh only, for {time:?}: `meshctl perf {}` elsewhere",
        status.node
    ));
    serve_until(own, PORT, Instant::now() + time).map_err(failed)
}

/// One connection after the other: two would share what is measured.
fn serve_until(own: Ipv4Addr, port: u16, until: Instant) -> io::Result<Served> {
    let listener = TcpListener::bind((own, port))?;
    listener.set_nonblocking(true)?;
    let mut served = Served {
        connections: 0,
        received_bytes: 0,
        sent_bytes: 0,
    };
    while Instant::now() < until {
        match listener.accept() {
            Ok((stream, _)) => {
                served.connections += 1;
                // The client says what went wrong.
                answer(stream, &mut served).ok();
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                std::thread::sleep(LOOK_EVERY);
            }
            Err(error) => return Err(error),
        }
    }
    Ok(served)
}

fn answer(mut stream: TcpStream, served: &mut Served) -> io::Result<()> {
    stream.set_nonblocking(false)?;
    limit_silence(&stream)?;
    let mut asks = [0];
    stream.read_exact(&mut asks)?;
    let until = Instant::now() + TIME_MAX;
    let goes_on = |bytes: u64| bytes < BYTES_MAX && Instant::now() < until;
    let mut chunk = vec![0; CHUNK_BYTES];
    match asks {
        [ECHO] => {
            for _ in 0..ROUND_TRIPS {
                let mut byte = [0];
                stream.read_exact(&mut byte)?;
                stream.write_all(&byte)?;
            }
        }
        [TAKE] => {
            let mut received = 0;
            while goes_on(received) {
                match stream.read(&mut chunk)? {
                    0 => break,
                    some => received += count(some),
                }
            }
            served.received_bytes += received;
            stream.write_all(&received.to_be_bytes())?;
        }
        [GIVE] => {
            let mut sent = 0;
            while goes_on(sent) {
                match stream.write(&chunk) {
                    Ok(some) => sent += count(some),
                    Err(_) => break, // It has enough.
                }
            }
            served.sent_bytes += sent;
        }
        _ => {} // Somebody else's protocol.
    }
    Ok(())
}

fn count(bytes: usize) -> u64 {
    u64::try_from(bytes).unwrap_or(u64::MAX)
}

impl Report for Perf {
    fn text(&self, _: bool) -> String {
        let ms = |ms| milliseconds(Some(ms));
        let way = |way: &Way| {
            format!(
                "{:.1} Mb/s ({} in {:.1} s)",
                way.megabits_per_s,
                bytes(way.bytes),
                way.seconds
            )
        };
        let by = self.path.as_deref().map(crate::table::printable);
        format!(
            "{}{}\nround trip  min {}, median {}, max {}\nto it       {}\nfrom it     {}\n",
            self.node,
            by.map_or_else(String::new, |path| format!(" by {path}")),
            ms(self.rtt_min_ms),
            ms(self.rtt_median_ms),
            ms(self.rtt_max_ms),
            way(&self.to_node),
            way(&self.from_node),
        )
    }
}

impl Report for Served {
    fn text(&self, _: bool) -> String {
        format!(
            "{} connections, {} received, {} sent\n",
            self.connections,
            bytes(self.received_bytes),
            bytes(self.sent_bytes)
        )
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    const SILENT: Screen = Screen {
        json: true,
        colours: false,
    };

    #[test]
    fn what_is_measured_is_what_arrived_within_the_limits() {
        let port = {
            let free = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
            free.local_addr().unwrap().port()
        };
        let until = Instant::now() + Duration::from_secs(4);
        let server = thread::spawn(move || serve_until(Ipv4Addr::LOCALHOST, port, until));
        let to = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        let connected = (0..40).any(|_| {
            thread::sleep(Duration::from_millis(50));
            round_trips(to).is_ok_and(|times| times.len() == ROUND_TRIPS)
        });
        assert!(connected);
        let limit = Limit {
            time: Duration::from_secs(2),
            bytes: 3_000_000,
        };
        let sent = send(to, limit, SILENT).unwrap();
        assert_eq!(sent.bytes, 3_000_000);
        assert!(sent.megabits_per_s > 1.0 && sent.seconds < 3.0, "{sent:?}");
        let received = receive(to, limit, SILENT).unwrap();
        assert!(received.bytes >= 3_000_000 && received.bytes < 3_000_000 + 2 * CHUNK_BYTES as u64);
        let served = server.join().unwrap().unwrap();
        assert!(served.connections >= 3, "{served:?}");
        assert_eq!(served.received_bytes, 3_000_000);
        // Its time is over.
        let refused = TcpStream::connect(to).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
    }

    #[test]
    fn it_has_a_stable_form_for_machines() {
        let way = Way::new(1_250_000, Duration::from_secs(2));
        let perf = Perf {
            node: "edge-b1".to_owned(),
            path: Some("203.0.113.5:51820".to_owned()),
            rtt_min_ms: 20.0,
            rtt_median_ms: 21.5,
            rtt_max_ms: 40.0,
            to_node: way,
            from_node: way,
        };
        let way = serde_json::json!({ "bytes": 1_250_000, "seconds": 2.0, "megabits_per_s": 5.0 });
        let want = serde_json::json!({
            "node": "edge-b1",
            "path": "203.0.113.5:51820",
            "rtt_min_ms": 20.0,
            "rtt_median_ms": 21.5,
            "rtt_max_ms": 40.0,
            "to_node": way,
            "from_node": way,
        });
        assert_eq!(serde_json::to_value(&perf).unwrap(), want);
        let want = "\
edge-b1 by 203.0.113.5:51820
round trip  min 20.0 ms, median 21.5 ms, max 40.0 ms
to it       5.0 Mb/s (1.2 MiB in 2.0 s)
from it     5.0 Mb/s (1.2 MiB in 2.0 s)
";
        assert_eq!(perf.text(false), want);
    }

    #[test]
    fn a_rate_is_bits_in_a_second() {
        let way = Way::new(1_250_000, Duration::from_secs(2));
        assert!((way.megabits_per_s - 5.0).abs() < 1e-9, "{way:?}");
    }
}
