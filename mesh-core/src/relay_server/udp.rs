//! Who is at which address.

use std::{
    net::{IpAddr, SocketAddr},
    time::{Duration, Instant},
};

use mesh_wire::relay::udp::{Bind, BindKey, Tag, tag};
use ring::hmac;

use super::{ADDRESS_SILENCE_MAX, LinkId, UdpPath};

/// How long the secret of the cookies stays the same. A cookie is good for that long at least, and
/// for twice that at most, which is how long the proof that somebody receives at an address holds.
const COOKIE_PERIOD: Duration = Duration::from_secs(120);

/// The address beside a QUIC link.
#[derive(Debug)]
pub(super) struct Address {
    pub(super) path: UdpPath,
    /// When something last came from there.
    pub(super) heard: Instant,
    /// Whether the node's last data came from there, and not by the link.
    pub(super) in_use: bool,
}

impl Address {
    pub(super) fn is_alive(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.heard) < ADDRESS_SILENCE_MAX
    }
}

/// All keys and cookies, from one secret: nothing is remembered of who asks.
#[derive(Debug)]
pub(super) struct BindSecrets {
    master: hmac::Key,
    began: Instant,
}

impl BindSecrets {
    pub(super) fn new(secret: &Tag, began: Instant) -> Self {
        let master = hmac::Key::new(hmac::HMAC_SHA256, secret);
        Self { master, began }
    }

    /// Random numbers for what needs no secret: a hash's seed, and a first epoch.
    pub(super) fn numbers(&self) -> (u64, u16) {
        let [a, b, c, d, e, f, g, h, i, j, ..] = self.derive(b"numbers", 0);
        (
            u64::from_be_bytes([a, b, c, d, e, f, g, h]),
            u16::from_be_bytes([i, j]),
        )
    }

    /// The key of a link.
    pub(super) fn key(&self, link: LinkId) -> BindKey {
        let LinkId(id) = link;
        let key = self.derive(b"key", id);
        BindKey { id, key }
    }

    /// The cookie of the present period for this request from this address.
    pub(super) fn cookie(&self, from: SocketAddr, bind: &Bind, now: Instant) -> Tag {
        let secret = self.cookie_secret(self.period(now));
        tag(&secret, &cookie_message(from, bind))
    }

    /// Whether the request carries such a cookie, of this period or the one before.
    pub(super) fn is_cookie_good(&self, from: SocketAddr, bind: &Bind, now: Instant) -> bool {
        let (message, period) = (cookie_message(from, bind), self.period(now));
        [Some(period), period.checked_sub(1)]
            .into_iter()
            .flatten()
            .any(|period| hmac::verify(&self.cookie_secret(period), &message, &bind.cookie).is_ok())
    }

    fn period(&self, now: Instant) -> u64 {
        now.saturating_duration_since(self.began).as_secs() / COOKIE_PERIOD.as_secs()
    }

    fn cookie_secret(&self, period: u64) -> hmac::Key {
        hmac::Key::new(hmac::HMAC_SHA256, &self.derive(b"cookies", period))
    }

    fn derive(&self, purpose: &[u8], number: u64) -> Tag {
        tag(&self.master, &[purpose, &number.to_be_bytes()].concat())
    }
}

fn cookie_message(from: SocketAddr, bind: &Bind) -> Vec<u8> {
    let ip = match from.ip() {
        IpAddr::V4(v4) => v4.to_ipv6_mapped(),
        IpAddr::V6(v6) => v6,
    };
    [
        &ip.octets()[..],
        &from.port().to_be_bytes(),
        &bind.id.to_be_bytes(),
        &bind.sequence.to_be_bytes(),
    ]
    .concat()
}
