//! `mtu probe`: the largest packet that reaches a node through the tunnel and comes back.
//!
//! ICMP echoes that must not be fragmented (RFC 1191 §4) are sent through the tunnel; an answer has the size of its question, so
//! one that is back passed both ways. The other node's kernel answers them.

use std::{
    io::{self, Read as _},
    net::{Ipv4Addr, SocketAddr},
    time::{Duration, Instant},
};

use etherparse::{Icmpv4Type, NetHeaders, PacketBuilder, PacketHeaders, TransportHeader};
use mesh_api::admin::FactsRequest;
use serde::Serialize;
use socket2::{Domain, Protocol, Socket, Type};

use crate::{
    Verdict,
    connect::{self, Agent, ask},
    failure::{Daemon, Failure},
    reach::{self, v4},
    report::Path,
    run::{self, Screen},
    show::Report,
    table::{Cell, Tone, printable, table},
};

/// Headers of an echo: IPv4's and ICMP's.
const HEADERS_BYTES: u16 = 20 + 8;

/// Of each size: one may be lost for another reason.
const TRIES: u32 = 3;

/// How long the first answer may take: a path may have to be woken (`../shared/paths.md`).
const ANSWER_LIMIT: Duration = Duration::from_secs(2);

/// How long others may take: as long as the smallest one took, so many times, and at least so long.
const ROUND_TRIPS: u32 = 4;
const ANSWER_LEAST: Duration = Duration::from_millis(200);

/// What takes longer is said to go on.
const PROGRESS_AFTER: Duration = Duration::from_secs(1);

/// `mtu probe`.
#[derive(Debug, Serialize)]
pub(crate) struct MtuProbe {
    pub(crate) node: String,
    /// What the mesh lets packets have.
    pub(crate) overlay_mtu_bytes: u16,
    /// The largest IP packet that went there and back by the path in use; `null`: none did.
    pub(crate) largest_bytes: Option<u16>,
    /// The path in use after that, as `path why` names it.
    pub(crate) path: Option<String>,
    /// Every path that is known, with whether the overlay's MTU was proven on it (`full_size_ok`).
    pub(crate) paths: Vec<Path>,
}

pub(crate) async fn probe(
    agent: Agent<'_>,
    node: &str,
    screen: Screen,
) -> Result<MtuProbe, Failure> {
    let status = run::status(agent).await?;
    let own = v4(&status.overlay_addresses)?;
    let to = reach::address(agent, node).await?;
    let mut client = connect::agent(agent).await?;
    let facts = ask(Daemon::Agent, client.facts(FactsRequest {})).await?;
    let most = u16::try_from(facts.mtu_bytes).unwrap_or(u16::MAX);
    let cannot =
        |error: io::Error| Failure::Failed(format!("ICMP through {}: {error}", status.interface));
    let mut echoes = Echoes::open(own, to, &status.interface).map_err(cannot)?;
    let began = Instant::now();
    let largest = largest(most, |bytes| {
        if began.elapsed() > PROGRESS_AFTER {
            screen.note(&format!("trying {bytes} bytes"));
        }
        echoes.pass(bytes)
    });
    let largest_bytes = largest.map_err(cannot)?;
    let why = run::path_why(agent, node.to_owned()).await?;
    let used = why.paths.iter().find(|path| path.state == "primary");
    Ok(MtuProbe {
        node: node.to_owned(),
        overlay_mtu_bytes: most,
        largest_bytes,
        path: used.map(|path| path.path.clone()),
        paths: why.paths,
    })
}

/// The largest size up to `most` that passes, if every smaller one does, too.
fn largest(most: u16, mut pass: impl FnMut(u16) -> io::Result<bool>) -> io::Result<Option<u16>> {
    if !pass(HEADERS_BYTES)? {
        return Ok(None);
    }
    if pass(most)? {
        return Ok(Some(most));
    }
    let (mut passes, mut fails) = (HEADERS_BYTES, most);
    while fails - passes > 1 {
        let middle = passes.midpoint(fails);
        if pass(middle)? {
            passes = middle;
        } else {
            fails = middle;
        }
    }
    Ok(Some(passes))
}

struct Echoes {
    socket: Socket,
    own: Ipv4Addr,
    to: Ipv4Addr,
    /// Tells them from other processes' (RFC 792).
    id: u16,
    sequence: u16,
    /// How long an answer may take.
    limit: Duration,
}

impl Echoes {
    fn open(own: Ipv4Addr, to: Ipv4Addr, interface: &str) -> io::Result<Self> {
        let socket = Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::ICMPV4))?;
        // So that the bit that forbids fragments can be set, and no route's MTU counts but the tunnel's.
        socket.set_header_included_v4(true)?;
        socket.bind_device(Some(interface.as_bytes()))?;
        socket.connect(&SocketAddr::from((to, 0)).into())?;
        Ok(Self {
            socket,
            own,
            to,
            id: u16::try_from(std::process::id() & 0xffff).unwrap_or_default(),
            sequence: 0,
            limit: ANSWER_LIMIT,
        })
    }

    /// Whether a packet of this size is back.
    fn pass(&mut self, bytes: u16) -> io::Result<bool> {
        for _ in 0..TRIES {
            self.sequence = self.sequence.wrapping_add(1);
            let packet = PacketBuilder::ipv4(self.own.octets(), self.to.octets(), 64)
                .icmpv4_echo_request(self.id, self.sequence);
            let mut sent = Vec::with_capacity(bytes.into());
            let payload = vec![0; usize::from(bytes.saturating_sub(HEADERS_BYTES))];
            packet
                .write(&mut sent, &payload)
                .map_err(io::Error::other)?;
            let at = Instant::now();
            self.socket.send(&sent)?;
            if self.answered(bytes)? {
                let limit = at.elapsed() * ROUND_TRIPS;
                self.limit = limit.clamp(ANSWER_LEAST, ANSWER_LIMIT);
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn answered(&mut self, bytes: u16) -> io::Result<bool> {
        let until = Instant::now() + self.limit;
        let mut received = [0; u16::MAX as usize];
        loop {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(false);
            }
            self.socket.set_read_timeout(Some(left))?;
            match self.socket.read(&mut received) {
                Ok(count) => {
                    let packet = received.get(..count).unwrap_or_default();
                    if is_answer(packet, self.id, self.sequence, bytes) {
                        return Ok(true);
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
}

/// Whether `packet` answers that echo, at its size.
fn is_answer(packet: &[u8], id: u16, sequence: u16, bytes: u16) -> bool {
    let Ok(headers) = PacketHeaders::from_ip_slice(packet) else {
        return false;
    };
    let Some(TransportHeader::Icmpv4(icmp)) = headers.transport else {
        return false;
    };
    let whole =
        matches!(headers.net, Some(NetHeaders::Ipv4(header, _)) if header.total_len == bytes);
    let Icmpv4Type::EchoReply(echo) = icmp.icmp_type else {
        return false;
    };
    whole && (echo.id, echo.seq) == (id, sequence)
}

impl Report for MtuProbe {
    fn text(&self, colours: bool) -> String {
        let (node, most) = (printable(&self.node), self.overlay_mtu_bytes);
        let by = self.path.as_deref().map(printable);
        let by = by.map_or_else(String::new, |path| format!(" by {path}"));
        let head = match self.largest_bytes {
            Some(bytes) if bytes >= most => {
                format!("{bytes} bytes, the overlay's MTU, go to {node} and back{by}")
            }
            Some(bytes) => format!(
                "MTU hole: {bytes} bytes go to {node} and back{by}, {} do not, of an overlay's MTU of {most}",
                bytes + 1
            ),
            None => format!(
                "nothing goes to {node} and back: `meshctl ping {node}` says whether it is there; if so, its firewall or a policy drops ICMP"
            ),
        };
        let row = |path: &Path| -> Vec<Cell> {
            let (text, tone) = match (path.full_size_ok, path.probes_answered) {
                (true, _) => ("pass".to_owned(), Tone::Good),
                (false, 0) => ("not known: nothing is answered".to_owned(), Tone::Faint),
                (false, _) => ("only smaller ones are answered".to_owned(), Tone::Warning),
            };
            vec![
                (&path.path).into(),
                (&path.kind).into(),
                (&path.state).into(),
                Cell::new(text, tone),
            ]
        };
        let full = format!("{most} BYTES");
        let rows = self.paths.iter().map(row).collect();
        let paths = table(&["PATH", "KIND", "STATE", &full], rows, colours);
        format!("{head}\n\n{paths}")
    }

    fn verdict(&self) -> Verdict {
        match self.largest_bytes {
            Some(bytes) if bytes >= self.overlay_mtu_bytes => Verdict::Ok,
            Some(_) => Verdict::Degraded,
            None => Verdict::Down,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(most: u16, hole: u16, want: Option<u16>) {
        let mut tried = 0;
        let found = largest(most, |bytes| {
            tried += 1;
            Ok(bytes <= hole)
        });
        assert_eq!(found.unwrap(), want);
        assert!(tried <= 15, "{tried} sizes for {most}");
    }

    #[test]
    fn it_has_a_stable_form_for_machines() {
        let probe = |largest_bytes| MtuProbe {
            node: "edge-b1".to_owned(),
            overlay_mtu_bytes: 1_280,
            largest_bytes,
            path: Some("203.0.113.5:51820".to_owned()),
            paths: Vec::new(),
        };
        let want = serde_json::json!({
            "node": "edge-b1",
            "overlay_mtu_bytes": 1_280,
            "largest_bytes": 1_000,
            "path": "203.0.113.5:51820",
            "paths": [],
        });
        assert_eq!(serde_json::to_value(probe(Some(1_000))).unwrap(), want);
        for (largest, verdict, words) in [
            (
                Some(1_280),
                Verdict::Ok,
                "1280 bytes, the overlay's MTU, go to edge-b1",
            ),
            (
                Some(1_000),
                Verdict::Degraded,
                "MTU hole: 1000 bytes go to edge-b1",
            ),
            (None, Verdict::Down, "nothing goes to edge-b1"),
        ] {
            let probe = probe(largest);
            assert_eq!(probe.verdict(), verdict);
            assert!(
                probe.text(false).starts_with(words),
                "{}",
                probe.text(false)
            );
        }
    }

    #[test]
    fn the_largest_size_is_found_in_few_steps() {
        check(1_280, 9_000, Some(1_280));
        check(1_280, 1_280, Some(1_280));
        check(1_280, 1_279, Some(1_279));
        check(1_420, 1_000, Some(1_000));
        check(1_280, 28, Some(28));
        check(28, 28, Some(28));
        check(1_280, 0, None);
        check(9_000, 1_400, Some(1_400));
    }

    #[test]
    fn only_the_echo_s_own_answer_at_its_size_counts() {
        let mut packet = Vec::new();
        let payload = [0; 72];
        PacketBuilder::ipv4([100, 96, 0, 2], [100, 96, 0, 1], 64)
            .icmpv4_echo_reply(7, 9)
            .write(&mut packet, &payload)
            .unwrap();
        assert!(is_answer(&packet, 7, 9, 100));
        assert!(!is_answer(&packet, 7, 8, 100) && !is_answer(&packet, 8, 9, 100));
        assert!(!is_answer(&packet, 7, 9, 101) && !is_answer(&packet[..50], 7, 9, 100));
        let mut asked = Vec::new();
        PacketBuilder::ipv4([100, 96, 0, 2], [100, 96, 0, 1], 64)
            .icmpv4_echo_request(7, 9)
            .write(&mut asked, &payload)
            .unwrap();
        assert!(!is_answer(&asked, 7, 9, 100) && !is_answer(&[], 7, 9, 0));
    }
}
