//! The text that `wg` and a device exchange (<https://www.wireguard.com/xplatform/>).

use std::{collections::HashMap, fmt::Write as _, net::SocketAddr, str::FromStr, time::Duration};

use ipnet::IpNet;
use mesh_wire::id::NodeId;
use rustix::io::Errno;
use zeroize::Zeroizing;

use super::config::{AllowedIp, Change, Config, PeerChange, Refused, Secret};

/// Longest request: [`super::config::PEERS_MAX`] peers with every key and three allowed IPs,
/// about 480 bytes each.
pub(crate) const REQUEST_BYTES_MAX: usize = 32 << 20;

/// What a log line shows of a value at most.
const SHOWN_CHARS_MAX: usize = 64;

/// What a client asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Request {
    /// How the device is.
    Get,
    /// That it changes.
    Set(Change),
}

/// What the packet path knows of a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Live {
    /// When the last handshake was completed, since the Unix epoch; 0 if never.
    pub(crate) last_handshake: Duration,
    pub(crate) sent_bytes: u64,
    pub(crate) received_bytes: u64,
}

/// Reads a request, with or without the empty line that ends it. `link_index` finds an interface
/// by its name, which may stand in a link-local endpoint.
///
/// # Errors
///
/// At the first line that is not what it should be.
pub(crate) fn parse(
    request: &[u8],
    link_index: impl Fn(&str) -> Option<u32>,
) -> Result<Request, Refused> {
    let text = str::from_utf8(request)
        .map_err(|_| Refused::new(Errno::PROTO, "the request is not text (UTF-8)"))?;
    let mut lines = (1..)
        .zip(text.split('\n'))
        .take_while(|(_, line)| !line.is_empty());
    match lines.next() {
        Some((_, "get=1")) => match lines.next() {
            None => Ok(Request::Get),
            Some((number, line)) => Err(Line::read(number, line)?.refused("`get` takes no keys")),
        },
        Some((_, "set=1")) => parse_set(lines, link_index).map(Request::Set),
        Some((number, line)) => {
            let what = "neither `get=1` nor `set=1`";
            let refused = Line::read(number, line)?.refused(what);
            Err(Refused {
                errno: Errno::PROTO,
                ..refused
            })
        }
        None => Err(Refused::new(Errno::PROTO, "the request is empty")),
    }
}

fn parse_set<'a>(
    lines: impl Iterator<Item = (usize, &'a str)>,
    link_index: impl Fn(&str) -> Option<u32>,
) -> Result<Change, Refused> {
    let mut change = Change::default();
    for (number, line) in lines {
        let line = Line::read(number, line)?;
        if line.key == "public_key" {
            change.peers.push(PeerChange::new(NodeId(*line.bytes()?)));
            continue;
        }
        match change.peers.last_mut() {
            None => set_device(&line, &mut change)?,
            Some(peer) => set_peer(&line, peer, &link_index)?,
        }
    }
    Ok(change)
}

fn set_device(line: &Line<'_>, change: &mut Change) -> Result<(), Refused> {
    match line.key {
        "private_key" => change.private_key = Some(line.secret()?.map(Secret::clamped)),
        "listen_port" => change.listen_port = Some(line.parsed("not a port")?),
        "fwmark" => change.fwmark = Some(line.parsed("not a number of 32 bits")?),
        "replace_peers" => change.replace_peers = line.yes()?,
        _ => return Err(line.refused("not a key of the device")),
    }
    Ok(())
}

fn set_peer(
    line: &Line<'_>,
    peer: &mut PeerChange,
    link_index: impl Fn(&str) -> Option<u32>,
) -> Result<(), Refused> {
    match line.key {
        "remove" => peer.remove = line.yes()?,
        "update_only" => peer.update_only = line.yes()?,
        "preshared_key" => peer.preshared_key = Some(line.secret()?),
        "endpoint" => peer.endpoint = Some(line.endpoint(link_index)?),
        "persistent_keepalive_interval" => {
            peer.keepalive_s = Some(line.parsed("not seconds, at most 65535")?);
        }
        "replace_allowed_ips" => {
            peer.replace_allowed_ips = line.yes()?;
            peer.allowed_ips.clear();
        }
        "allowed_ip" => peer.allowed_ips.push(line.allowed_ip()?),
        "protocol_version" if line.value == "1" => {}
        "protocol_version" => return Err(line.refused("only version 1 is spoken here")),
        _ => return Err(line.refused("not a key of a peer")),
    }
    Ok(())
}

/// A line `key=value`.
struct Line<'a> {
    number: usize,
    key: &'a str,
    value: &'a str,
}

impl<'a> Line<'a> {
    fn read(number: usize, line: &'a str) -> Result<Self, Refused> {
        let (key, value) = line.split_once('=').ok_or_else(|| {
            Refused::new(Errno::PROTO, format!("line {number} is not `key=value`"))
        })?;
        Ok(Self { number, key, value })
    }

    fn refused(&self, why: &str) -> Refused {
        let secret = ["private_key", "preshared_key"].contains(&self.key);
        let value = if secret { "…" } else { self.value };
        let key: String = self.key.chars().take(SHOWN_CHARS_MAX).collect();
        let value: String = value.chars().take(SHOWN_CHARS_MAX).collect();
        let what = format!("line {}, {key:?} = {value:?}: {why}", self.number);
        Refused::new(Errno::INVAL, what)
    }

    fn bytes(&self) -> Result<Zeroizing<[u8; 32]>, Refused> {
        let mut bytes = Zeroizing::new([0; 32]);
        hex::decode_to_slice(self.value, bytes.as_mut_slice())
            .map_err(|_| self.refused("not a key: 64 hexadecimal digits"))?;
        Ok(bytes)
    }

    /// A key that may be absent: zeros or nothing.
    fn secret(&self) -> Result<Option<Secret>, Refused> {
        if self.value.is_empty() {
            return Ok(None);
        }
        self.bytes().map(Secret::new)
    }

    fn parsed<T: FromStr>(&self, why: &str) -> Result<T, Refused> {
        self.value.parse().map_err(|_| self.refused(why))
    }

    fn yes(&self) -> Result<bool, Refused> {
        if self.value == "true" {
            return Ok(true);
        }
        Err(self.refused("only `true` can be said here"))
    }

    /// An address and port; the zone of a link-local address may be the interface's name.
    fn endpoint(&self, link_index: impl Fn(&str) -> Option<u32>) -> Result<SocketAddr, Refused> {
        if let Ok(endpoint) = self.value.parse() {
            return Ok(endpoint);
        }
        let zoned = || {
            let (address, rest) = self.value.strip_prefix('[')?.split_once('%')?;
            let (link, port) = rest.split_once("]:")?;
            let index = link_index(link)?;
            format!("[{address}%{index}]:{port}").parse().ok()
        };
        zoned().ok_or_else(|| {
            self.refused("not an address and port: 192.0.2.1:51820 or [2001:db8::1]:51820")
        })
    }

    fn allowed_ip(&self) -> Result<AllowedIp, Refused> {
        let (make, text): (fn(IpNet) -> AllowedIp, _) = match self.value.strip_prefix('-') {
            Some(text) => (AllowedIp::Remove, text),
            None => (AllowedIp::Add, self.value),
        };
        let net: IpNet = text
            .parse()
            .map_err(|_| self.refused("not a prefix: 10.0.0.0/8 or fd00::/64"))?;
        Ok(make(net.trunc()))
    }
}

/// The answer to [`Request::Get`].
pub(crate) fn reply_to_get(config: &Config, live: &HashMap<NodeId, Live>) -> Zeroizing<String> {
    let mut text = Zeroizing::new(String::new());
    // Writing to a `String` never fails.
    let mut line = |key: &str, value: &dyn std::fmt::Display| {
        writeln!(text, "{key}={value}").unwrap_or_default();
    };
    let hex = |bytes: &[u8; 32]| Zeroizing::new(hex::encode(bytes));
    if let Some(key) = config.private_key() {
        line("private_key", &*hex(key.bytes()));
    }
    if config.listen_port != 0 {
        line("listen_port", &config.listen_port);
    }
    if config.fwmark != 0 {
        line("fwmark", &config.fwmark);
    }
    for (id, peer) in config.peers() {
        let live = live.get(id).copied().unwrap_or_default();
        line("public_key", &*hex(&id.0));
        let preshared_key = peer.preshared_key.as_ref();
        let none = [0; 32];
        line(
            "preshared_key",
            &*hex(preshared_key.map_or(&none, Secret::bytes)),
        );
        line("protocol_version", &1);
        if let Some(endpoint) = peer.endpoint {
            line("endpoint", &endpoint);
        }
        line("last_handshake_time_sec", &live.last_handshake.as_secs());
        line(
            "last_handshake_time_nsec",
            &live.last_handshake.subsec_nanos(),
        );
        line("tx_bytes", &live.sent_bytes);
        line("rx_bytes", &live.received_bytes);
        line("persistent_keepalive_interval", &peer.keepalive_s);
        for net in &peer.allowed_ips {
            line("allowed_ip", net);
        }
    }
    text.push_str("errno=0\n\n");
    text
}

/// The answer to [`Request::Set`], and to whatever was refused. The number is negative, as
/// wireguard-go's is: the protocol's text does not say so, but `wg` finds the words only then.
pub(crate) fn reply_to_set(result: Result<(), Errno>) -> String {
    let errno = result.err().map_or(0, |errno| -errno.raw_os_error());
    format!("errno={errno}\n\n")
}

#[cfg(test)]
pub(super) mod tests;
