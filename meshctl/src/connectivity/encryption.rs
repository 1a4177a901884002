//! Whether packets to peers leave in plain text: a pattern that nobody else sends goes into the tunnel, and is looked for at every
//! interface of this machine.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, Read as _},
    net::{Ipv4Addr, UdpSocket},
    time::{Duration, Instant},
};

use super::{Check, Outcome};
use crate::{
    failure::Failure,
    reach::{Echoed, v4},
    report::{Peer, Status},
    run::Screen,
    sniff::{Sniffer, index},
};

/// As good as a key: nobody sends it by chance.
const PATTERN_BYTES: usize = 32;

/// Where it is sent: nobody listens (RFC 863), and an ICMP error comes back through the tunnel, too.
const DISCARD_PORT: u16 = 9;

/// Datagrams for each peer: one may be lost while a path changes.
const DATAGRAMS: usize = 3;

/// How long it is looked for after the last one was sent: packets wait 2 s at most for a path (`mesh_tunnel`).
const LOOK: Duration = Duration::from_millis(2_500);

type Pattern = [u8; PATTERN_BYTES];

/// Where each peer's pattern was seen.
#[derive(Debug, Default, PartialEq, Eq)]
struct Seen {
    inside: u32,
    /// By interface index.
    outside: BTreeMap<u32, u32>,
}

pub(super) fn test(
    echoed: &[(String, Result<Echoed, Failure>)],
    status: &Status,
    peers: &[Peer],
    screen: Screen,
) -> Result<Vec<Check>, Failure> {
    let mut checks = Vec::new();
    let mut patterns = Vec::new();
    for (node, echoed) in echoed {
        let peer = peers.iter().find(|peer| peer.name == *node);
        let address = peer.and_then(|peer| v4(&peer.overlay_addresses).ok());
        // A path has to be awake: a packet that is held or dropped proves nothing.
        let awake = echoed
            .as_ref()
            .is_ok_and(|one| !one.round_trips_ms.is_empty());
        match address.filter(|_| awake) {
            Some(address) => {
                let pattern = random().map_err(cannot)?;
                patterns.push((node.clone(), address, pattern));
            }
            None => checks.push(Check::new(
                "encryption",
                node,
                Outcome::Untried,
                format!("it does not answer: `meshctl path why {node}`"),
            )),
        }
    }
    screen.note("sending what nobody else sends, and looking for it at every interface");
    let tunnel = index(&status.interface).map_err(cannot)?;
    let seen = look(&patterns, tunnel).map_err(cannot)?;
    let judged = patterns.iter().zip(&seen);
    checks.extend(judged.map(|((name, ..), seen)| judge(name, seen, &status.interface)));
    Ok(checks)
}

fn cannot(error: io::Error) -> Failure {
    Failure::Failed(format!(
        "packets cannot be looked at (CAP_NET_RAW is needed): {error}"
    ))
}

fn random() -> io::Result<Pattern> {
    let mut pattern = [0; PATTERN_BYTES];
    File::open("/dev/urandom")?.read_exact(&mut pattern)?;
    Ok(pattern)
}

fn look(patterns: &[(String, Ipv4Addr, Pattern)], tunnel: u32) -> io::Result<Vec<Seen>> {
    let mut sniffer = Sniffer::open()?;
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    for (_, address, pattern) in patterns {
        for _ in 0..DATAGRAMS {
            socket.send_to(pattern, (*address, DISCARD_PORT))?;
        }
    }
    let mut seen: Vec<Seen> = patterns.iter().map(|_| Seen::default()).collect();
    let until = Instant::now() + LOOK;
    while let Some(packet) = sniffer.next(until)? {
        let found = seen.iter_mut().zip(patterns);
        for (seen, (_, _, pattern)) in found {
            let mut windows = packet.bytes.windows(PATTERN_BYTES);
            if !windows.any(|window| window == pattern) {
                continue;
            }
            if packet.interface == tunnel {
                seen.inside += 1;
            } else {
                *seen.outside.entry(packet.interface).or_default() += 1;
            }
        }
    }
    Ok(seen)
}

fn judge(name: &str, seen: &Seen, interface: &str) -> Check {
    let (verdict, text) = match (seen.inside, seen.outside.first_key_value()) {
        (_, Some((index, count))) => (
            Outcome::Failed,
            format!(
                "{count} packets leave in plain text by interface {index} (`ip link`): a route leads past the tunnel: `meshctl doctor`"
            ),
        ),
        (0, None) => (
            Outcome::Failed,
            format!("what is sent to it does not go into {interface}: `ip route get` its address"),
        ),
        (count, None) => (
            Outcome::Ok,
            format!("{count} packets went into {interface}, and none left in plain text"),
        ),
    };
    Check::new("encryption", name, verdict, text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_seen_outside_is_worse_than_what_is_not_seen_at_all() {
        let seen = |inside, outside: &[(u32, u32)]| Seen {
            inside,
            outside: outside.iter().copied().collect(),
        };
        for (seen, verdict, words) in [
            (seen(3, &[]), Outcome::Ok, "none left in plain text"),
            (seen(0, &[]), Outcome::Failed, "does not go into holdfast0"),
            (seen(3, &[(2, 1)]), Outcome::Failed, "by interface 2"),
            (seen(0, &[(2, 3)]), Outcome::Failed, "past the tunnel"),
        ] {
            let check = judge("edge-b1", &seen, "holdfast0");
            assert!(
                check.verdict == verdict && check.text.contains(words),
                "{check:?}"
            );
        }
    }
}
