//! Who may make this device compute a handshake (the paper, §5.3 and §5.4.7): whoever knows its public
//! key, and under load only whoever also proves by a cookie that it is where it says.

use std::{
    fmt,
    hash::{BuildHasher as _, RandomState},
    time::{Duration, Instant},
};

use chacha20poly1305::{
    AeadInPlace as _, KeyInit as _, XChaCha20Poly1305, aead::generic_array::GenericArray,
};

use crate::{
    keys::LocalKey,
    mac::{self, MAC_LEN},
    message::{COOKIE_REPLY_LEN, INITIATION_LEN, RESPONSE_LEN, TYPE_COOKIE_REPLY, header},
};

/// Handshake messages a second after which cookies are demanded: one costs about 200 µs of
/// processor time, so a flood of less takes 4 % of one processor.
pub const HANDSHAKES_PER_SECOND: u32 = 200;

/// Handshake messages a second of one source that has shown its cookie (the kernel's
/// `ratelimiter.c` lets through 20).
pub const PER_SOURCE_PER_SECOND: u16 = 20;

/// How long a cookie is good for (the paper, §5.4.7).
pub const COOKIE_LIFETIME: Duration = Duration::from_secs(120);

/// Sources that are counted apart. Several may share a counter by a keyed hash, so that no
/// number of them makes it grow: 1,024 × 4 bytes.
const SOURCES: usize = 1024;

const SECOND: Duration = Duration::from_secs(1);

/// What becomes of a handshake message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Admission {
    /// Compute it.
    Admitted,
    /// Send this instead; it is shorter than what came.
    Cookie([u8; COOKIE_REPLY_LEN]),
    /// mac1 is wrong: the sender does not know our public key.
    Stranger,
    /// A source that shows its cookie, too often.
    TooMany,
}

/// Counts handshakes, and makes cookies.
pub struct Gate {
    second: Option<Instant>,
    this_second: u32,
    sources: Box<[u16; SOURCES]>,
    hasher: RandomState,
    secret: [u8; 32],
    secret_since: Option<Instant>,
}

impl Default for Gate {
    fn default() -> Self {
        Self {
            second: None,
            this_second: 0,
            sources: Box::new([0; SOURCES]),
            hasher: RandomState::new(),
            secret: [0; 32],
            secret_since: None,
        }
    }
}

impl fmt::Debug for Gate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Gate")
            .field("this_second", &self.this_second)
            .finish_non_exhaustive()
    }
}

impl Gate {
    /// Looks at an initiation or a response that came from `source`, whose bytes stand for an
    /// address (and port).
    pub fn admit(
        &mut self,
        local: &LocalKey,
        datagram: &[u8],
        source: &[u8],
        now: Instant,
    ) -> Admission {
        let Some(macs) = Macs::of(datagram) else {
            return Admission::Stranger;
        };
        if !mac::equal(&mac::mac(local.mac1_key(), &[macs.before_mac1]), &macs.mac1) {
            return Admission::Stranger;
        }
        let over = |since: Option<Instant>, time| {
            since.is_none_or(|since| now.saturating_duration_since(since) >= time)
        };
        if over(self.second, SECOND) {
            self.second = Some(now);
            self.this_second = 0;
            self.sources.fill(0);
        }
        self.this_second = self.this_second.saturating_add(1);
        if self.this_second <= HANDSHAKES_PER_SECOND {
            return Admission::Admitted;
        }
        if over(self.secret_since, COOKIE_LIFETIME) {
            self.secret_since = Some(now);
            self.secret = rand::random();
        }
        let cookie = mac::mac(&self.secret, &[source]);
        if !mac::equal(&mac::mac(&cookie, &[macs.before_mac2]), &macs.mac2) {
            return reply(local, &macs, &cookie).map_or(Admission::Stranger, Admission::Cookie);
        }
        let hash = self.hasher.hash_one(source);
        let bucket = usize::try_from(hash % SOURCES as u64).unwrap_or_default();
        match self.sources.get_mut(bucket) {
            Some(count) if *count < PER_SOURCE_PER_SECOND => {
                *count += 1;
                Admission::Admitted
            }
            _ => Admission::TooMany,
        }
    }
}

/// The parts of a handshake message that MACs are about.
struct Macs<'a> {
    sender: [u8; 4],
    before_mac1: &'a [u8],
    before_mac2: &'a [u8],
    mac1: [u8; MAC_LEN],
    mac2: [u8; MAC_LEN],
}

impl<'a> Macs<'a> {
    fn of(datagram: &'a [u8]) -> Option<Self> {
        if !matches!(datagram.len(), INITIATION_LEN | RESPONSE_LEN) {
            return None;
        }
        let (before_mac2, mac2) = datagram.split_last_chunk::<MAC_LEN>()?;
        let (before_mac1, mac1) = before_mac2.split_last_chunk::<MAC_LEN>()?;
        Some(Self {
            sender: *datagram.get(4..)?.first_chunk()?,
            before_mac1,
            before_mac2,
            mac1: *mac1,
            mac2: *mac2,
        })
    }
}

fn reply(
    local: &LocalKey,
    macs: &Macs<'_>,
    cookie: &[u8; MAC_LEN],
) -> Option<[u8; COOKIE_REPLY_LEN]> {
    let nonce: [u8; 24] = rand::random();
    let mut sealed = *cookie;
    let key = XChaCha20Poly1305::new(GenericArray::from_slice(local.cookie_key()));
    let tag =
        key.encrypt_in_place_detached(GenericArray::from_slice(&nonce), &macs.mac1, &mut sealed);
    let parts = [
        &header(TYPE_COOKIE_REPLY)[..],
        &macs.sender,
        &nonce,
        &sealed,
        &tag.ok()?,
    ];
    parts.concat().first_chunk().copied()
}

/// The cookie in a reply to a message whose mac1 was `mac1`, sealed by the device whose
/// [`LocalKey::cookie_key`] is `key`.
pub(crate) fn open_reply(
    reply: &[u8],
    key: &[u8; 32],
    mac1: &[u8; MAC_LEN],
) -> Option<[u8; MAC_LEN]> {
    let (nonce, rest) = reply.get(8..)?.split_first_chunk::<24>()?;
    let (sealed, rest) = rest.split_first_chunk::<MAC_LEN>()?;
    let mut cookie = *sealed;
    let key = XChaCha20Poly1305::new(GenericArray::from_slice(key));
    let tag = rest.first_chunk::<16>().filter(|_| rest.len() == 16)?;
    key.decrypt_in_place_detached(
        GenericArray::from_slice(nonce),
        mac1,
        &mut cookie,
        GenericArray::from_slice(tag),
    )
    .ok()?;
    Some(cookie)
}
