//! A session: two keys, a counter that goes up, and a window of what arrived. Sealing needs no lock,
//! so any number of threads may send by one session; opening takes a short one for the window.

use std::{
    fmt,
    ops::Range,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use ring::aead::{CHACHA20_POLY1305, LessSafeKey, UnboundKey};
use zeroize::Zeroizing;

use crate::{
    message::{DATA_HEADER_LEN, OVERHEAD, TAG_LEN, TYPE_DATA, header},
    window::Window,
};

/// A new handshake is due after so many messages (the paper, §6.1: 2⁶⁰).
pub const REKEY_AFTER_MESSAGES: u64 = 1 << 60;

/// No counter from here on is ever used or accepted (the paper, §6.1: 2⁶⁴ − 2¹³ − 1).
pub const REJECT_AFTER_MESSAGES: u64 = u64::MAX - (1 << 13);

/// A new handshake is due after this time (the paper, §6.1).
pub const REKEY_AFTER_TIME: Duration = Duration::from_secs(120);

/// Nothing is sealed or opened after this time (the paper, §6.1).
pub const REJECT_AFTER_TIME: Duration = Duration::from_secs(180);

/// Packets are filled up with zeros to a multiple of this (the paper, §5.4.6).
pub const PADDING: usize = 16;

/// Who began the handshake: that side renews it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// This side sent the initiation.
    Initiator,
    /// This side sent the response.
    Responder,
}

/// One session. See the module.
pub struct Session {
    local: u32,
    remote: u32,
    role: Role,
    begun: Instant,
    proven: AtomicBool,
    sealing: LessSafeKey,
    opening: LessSafeKey,
    next: AtomicU64,
    window: Mutex<Window>,
}

/// Why a sealed packet was not opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// The tag is wrong: another key, or changed bytes.
    #[error("the authentication tag is wrong")]
    Unauthentic,
    /// Its counter was used before, is too old, or is beyond [`REJECT_AFTER_MESSAGES`].
    #[error("the counter was used before or is too old")]
    Replayed,
    /// The session is older than [`REJECT_AFTER_TIME`].
    #[error("the session has expired")]
    Expired,
}

/// The two keys of a new session, in the order of use by its initiator.
pub(crate) struct Keys {
    pub(crate) of_initiator: Zeroizing<[u8; 32]>,
    pub(crate) of_responder: Zeroizing<[u8; 32]>,
}

impl Session {
    pub(crate) fn new(
        keys: &Keys,
        role: Role,
        local: u32,
        remote: u32,
        now: Instant,
    ) -> Option<Self> {
        let (sealing, opening) = match role {
            Role::Initiator => (&keys.of_initiator, &keys.of_responder),
            Role::Responder => (&keys.of_responder, &keys.of_initiator),
        };
        let key = |bytes: &[u8; 32]| {
            let key = UnboundKey::new(&CHACHA20_POLY1305, bytes).ok()?;
            Some(LessSafeKey::new(key))
        };
        Some(Self {
            local,
            remote,
            role,
            begun: now,
            proven: AtomicBool::new(role == Role::Initiator),
            sealing: key(sealing)?,
            opening: key(opening)?,
            next: AtomicU64::new(0),
            window: Mutex::new(Window::new()),
        })
    }

    /// The number by which the peer addresses it.
    #[must_use]
    pub fn local(&self) -> u32 {
        self.local
    }

    /// Who began the handshake.
    #[must_use]
    pub fn role(&self) -> Role {
        self.role
    }

    /// When the handshake was complete on this side.
    #[must_use]
    pub fn begun(&self) -> Instant {
        self.begun
    }

    /// Whether something authentic has come by it. Until then a session that our response offered may
    /// be the answer to somebody's recording, and nothing is sent by it.
    #[must_use]
    pub fn is_proven(&self) -> bool {
        self.proven.load(Relaxed)
    }

    /// Something authentic came by it; whether that was the first.
    pub(crate) fn prove(&self) -> bool {
        !self.proven.swap(true, Relaxed)
    }

    /// Whether it may still seal and open.
    #[must_use]
    pub fn is_alive(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.begun) < REJECT_AFTER_TIME
    }

    /// Whether a packet that is sent now should bring about a new handshake.
    #[must_use]
    pub fn is_worn(&self, now: Instant) -> bool {
        let old = now.saturating_duration_since(self.begun) >= REKEY_AFTER_TIME;
        (old && self.role == Role::Initiator) || self.next.load(Relaxed) >= REKEY_AFTER_MESSAGES
    }

    /// Takes `count` counters, that many in a row from the result on. `None` at the protocol's
    /// limit.
    #[must_use]
    pub fn reserve(&self, count: usize) -> Option<u64> {
        let count = u64::try_from(count).ok()?;
        let take = |next: u64| {
            let after = next.checked_add(count)?;
            (after <= REJECT_AFTER_MESSAGES).then_some(after)
        };
        self.next.try_update(Relaxed, Relaxed, take).ok()
    }

    /// Seals in place: `datagram` has [`DATA_HEADER_LEN`] bytes of room, the packet with its
    /// padding, and [`TAG_LEN`] bytes of room. `counter` must come from [`Self::reserve`] and be used
    /// once. Whether it was sealed; not if `datagram` is too short.
    pub fn seal(&self, counter: u64, datagram: &mut [u8]) -> bool {
        let Some((head, rest)) = datagram.split_first_chunk_mut::<DATA_HEADER_LEN>() else {
            return false;
        };
        let Some((plain, tag)) = rest.split_last_chunk_mut::<TAG_LEN>() else {
            return false;
        };
        let (kind, rest) = head.split_at_mut(4);
        let (receiver, number) = rest.split_at_mut(4);
        kind.copy_from_slice(&header(TYPE_DATA));
        receiver.copy_from_slice(&self.remote.to_le_bytes());
        number.copy_from_slice(&counter.to_le_bytes());
        match cipher::seal(&self.sealing, counter, plain) {
            Some(made) => {
                *tag = made;
                true
            }
            None => false,
        }
    }

    /// Opens in place; where in `datagram` the packet (with its padding) stands. The window is
    /// the caller's to ask next: [`Self::window`].
    ///
    /// # Errors
    ///
    /// [`OpenError`]. The bytes of `datagram` are lost then.
    pub fn open(
        &self,
        datagram: &mut [u8],
        now: Instant,
    ) -> Result<(u64, Range<usize>), OpenError> {
        if !self.is_alive(now) {
            return Err(OpenError::Expired);
        }
        let plain = DATA_HEADER_LEN..datagram.len().saturating_sub(TAG_LEN);
        let (head, sealed) = datagram
            .split_first_chunk_mut::<DATA_HEADER_LEN>()
            .filter(|(_, sealed)| sealed.len() >= OVERHEAD - DATA_HEADER_LEN)
            .ok_or(OpenError::Unauthentic)?;
        let number = head.last_chunk::<8>().copied().unwrap_or_default();
        let counter = u64::from_le_bytes(number);
        if counter >= REJECT_AFTER_MESSAGES {
            return Err(OpenError::Replayed);
        }
        if !cipher::open(&self.opening, counter, sealed) {
            return Err(OpenError::Unauthentic);
        }
        Ok((counter, plain))
    }

    /// The window, locked: hold it for a batch, not longer.
    pub fn window(&self) -> WindowGuard<'_> {
        WindowGuard(self.window.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Session")
            .field("local", &self.local)
            .field("role", &self.role)
            .finish_non_exhaustive()
    }
}

/// See [`Session::window`].
#[derive(Debug)]
pub struct WindowGuard<'a>(MutexGuard<'a, Window>);

impl WindowGuard<'_> {
    /// Notes the counter of an opened packet.
    ///
    /// # Errors
    ///
    /// [`OpenError::Replayed`] if it was seen before or is too old: drop the packet.
    pub fn accept(&mut self, counter: u64) -> Result<(), OpenError> {
        let fresh = self.0.accept(counter);
        fresh.then_some(()).ok_or(OpenError::Replayed)
    }
}

/// The padded length of a packet of `len` bytes: a multiple of [`PADDING`], but never beyond `mtu`
/// (as the kernel's WireGuard does, so that padding never makes a full-size packet too long).
#[must_use]
pub fn padded_len(len: usize, mtu: usize) -> usize {
    len.next_multiple_of(PADDING).min(mtu.max(len))
}

#[cfg(not(holdfast_bench_no_cipher))]
mod cipher {
    use ring::aead::{Aad, LessSafeKey, Nonce};

    use super::TAG_LEN;

    /// Four bytes of zeros and the counter, little-endian (the paper, §5.4.6).
    fn nonce(counter: u64) -> Nonce {
        let mut nonce = [0; 12];
        if let Some(number) = nonce.last_chunk_mut::<8>() {
            *number = counter.to_le_bytes();
        }
        Nonce::assume_unique_for_key(nonce)
    }

    pub(super) fn seal(key: &LessSafeKey, counter: u64, plain: &mut [u8]) -> Option<[u8; TAG_LEN]> {
        let tag = key.seal_in_place_separate_tag(nonce(counter), Aad::empty(), plain);
        tag.ok()?.as_ref().first_chunk().copied()
    }

    pub(super) fn open(key: &LessSafeKey, counter: u64, sealed: &mut [u8]) -> bool {
        key.open_in_place(nonce(counter), Aad::empty(), sealed)
            .is_ok()
    }
}

/// For `cargo xtask bench` alone, which wants to know what the cipher costs: `RUSTFLAGS` must say
/// `--cfg holdfast_bench_no_cipher`, and `mesh-agent` does not compile with it.
#[cfg(holdfast_bench_no_cipher)]
mod cipher {
    use ring::aead::LessSafeKey;

    use super::TAG_LEN;

    pub(super) fn seal(_: &LessSafeKey, _: u64, _: &mut [u8]) -> Option<[u8; TAG_LEN]> {
        Some([0; TAG_LEN])
    }

    pub(super) fn open(_: &LessSafeKey, _: u64, _: &mut [u8]) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair(now: Instant) -> (Session, Session) {
        let keys = Keys {
            of_initiator: Zeroizing::new([1; 32]),
            of_responder: Zeroizing::new([2; 32]),
        };
        let one = Session::new(&keys, Role::Initiator, 10, 20, now).unwrap();
        let other = Session::new(&keys, Role::Responder, 20, 10, now).unwrap();
        (one, other)
    }

    fn sealed(session: &Session, packet: &[u8]) -> Vec<u8> {
        let mut datagram = vec![0; packet.len() + OVERHEAD];
        datagram[DATA_HEADER_LEN..][..packet.len()].copy_from_slice(packet);
        let counter = session.reserve(1).unwrap();
        assert!(session.seal(counter, &mut datagram));
        datagram
    }

    #[test]
    fn what_one_side_seals_the_other_opens_once() {
        let now = Instant::now();
        let (one, other) = pair(now);
        for (from, to) in [(&one, &other), (&other, &one)] {
            let mut datagram = sealed(from, b"packet");
            let mut copy = datagram.clone();
            let (counter, at) = to.open(&mut datagram, now).unwrap();
            assert_eq!(&datagram[at], b"packet");
            to.window().accept(counter).unwrap();
            let (counter, _) = to.open(&mut copy, now).unwrap();
            assert_eq!(to.window().accept(counter), Err(OpenError::Replayed));
        }
    }

    #[test]
    fn a_changed_bit_anywhere_is_noticed() {
        let now = Instant::now();
        let (one, other) = pair(now);
        let datagram = sealed(&one, b"packet");
        for at in 8..datagram.len() {
            let mut changed = datagram.clone();
            changed[at] ^= 1;
            let result = other.open(&mut changed, now);
            assert_eq!(result, Err(OpenError::Unauthentic), "byte {at}");
        }
    }

    #[test]
    fn the_counter_ends_at_the_protocols_limit() {
        let now = Instant::now();
        let (one, other) = pair(now);
        one.next.store(REJECT_AFTER_MESSAGES - 3, Relaxed);
        assert!(one.is_worn(now));
        assert_eq!(one.reserve(4), None);
        let counter = one.reserve(3).unwrap();
        assert_eq!(counter, REJECT_AFTER_MESSAGES - 3);
        assert_eq!(one.reserve(1), None);
        let mut datagram = vec![0; OVERHEAD];
        assert!(one.seal(REJECT_AFTER_MESSAGES, &mut datagram));
        assert_eq!(other.open(&mut datagram, now), Err(OpenError::Replayed));
    }

    #[test]
    fn a_session_wears_and_expires() {
        let now = Instant::now();
        let (one, other) = pair(now);
        assert!(!one.is_worn(now));
        let later = now + REKEY_AFTER_TIME;
        assert!(one.is_worn(later) && !other.is_worn(later));
        let late = now + REJECT_AFTER_TIME;
        assert!(!one.is_alive(late));
        let mut datagram = sealed(&one, b"");
        assert_eq!(other.open(&mut datagram, late), Err(OpenError::Expired));
    }

    #[test]
    fn padding_stays_below_the_mtu() {
        for (len, mtu, padded) in [
            (0, 1420, 0),
            (1, 1420, 16),
            (84, 1420, 96),
            (1420, 1420, 1420),
            (1419, 1420, 1420),
            (1500, 1420, 1500),
            (1280, 1280, 1280),
        ] {
            assert_eq!(padded_len(len, mtu), padded, "{len} of {mtu}");
        }
    }
}
