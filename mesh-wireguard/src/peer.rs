//! One peer: its handshakes, sessions and timers (the paper, §5 and §6).

use std::{
    collections::VecDeque,
    fmt,
    sync::Arc,
    time::{Duration, Instant},
};

use snow::HandshakeState;

pub use crate::handshake::Received;
use crate::{
    gate::{self, COOKIE_LIFETIME},
    handshake::{self, Timestamp},
    keys::{LocalKey, PresharedKey},
    mac::{self, LABEL_COOKIE, LABEL_MAC1, MAC_LEN},
    message::{INITIATION_LEN, Kind, RESPONSE_LEN},
    session::{REJECT_AFTER_TIME, Role, Session},
    timers::{Activity, KEEPALIVE_TIMEOUT, REKEY_ATTEMPT_TIME, REKEY_TIMEOUT},
};

/// Initiations of one peer that may wait for a response: the one that was sent last, and the one
/// before it, whose answer may be slow.
const INITIATIONS_MAX: usize = 2;

/// Sessions of one peer at a time. Two would do if handshakes came one after the other; but both
/// sides may begin at once, and answers to several initiations may be on the way, and what was
/// sealed by any of them must still be opened.
const SESSIONS_MAX: usize = 6;

/// Most spread of [`REKEY_TIMEOUT`] (the paper, §6.1).
const JITTER_MAX_MS: u64 = 333;

/// Least time between two initiations of one peer that are answered (the kernel's
/// `INITIATIONS_PER_SECOND`, 50).
const INITIATION_GAP: Duration = Duration::from_millis(20);

/// Who only receives renews its session so long before it would expire (the paper, §6.2).
const RENEW_WHEN_RECEIVING: Duration = Duration::from_secs(
    REJECT_AFTER_TIME.as_secs() - KEEPALIVE_TIMEOUT.as_secs() - REKEY_TIMEOUT.as_secs(),
);

/// Why a handshake message was not accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// The last initiation of this peer once more.
    #[error("the initiation was answered before")]
    Replayed,
    /// An initiation that is older than one that was answered.
    #[error("the initiation is {} s older than one that was answered", behind.as_secs())]
    Older {
        /// By how much, in whole seconds.
        behind: Duration,
    },
    /// The peer's last initiation was answered a moment ago.
    #[error("too many initiations")]
    TooMany,
    /// A response or a cookie to something that we did not say (any more).
    #[error("nobody waits for it")]
    Unasked,
    /// It does not prove what it must.
    #[error("the message proves nothing")]
    Forged,
}

/// What time demands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Due {
    /// Call [`Peer::initiate`] and send what it makes.
    pub initiate: bool,
    /// Seal and send a packet of no bytes.
    pub keepalive: bool,
    /// A session is gone: ask [`Peer::sessions`] again.
    pub sessions_changed: bool,
    /// There is no session, and no handshake on the way (any more).
    pub idle: bool,
}

/// What became of handshakes with a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Handshakes {
    /// Series of initiations that this end began. Those that neither of the next three counts are under way, or were
    /// forgotten with the peer.
    pub begun: u64,
    /// Those that the peer's response ended.
    pub completed: u64,
    /// Those that a handshake which the peer began ended before.
    pub overtaken: u64,
    /// Those that nobody answered within [`REKEY_ATTEMPT_TIME`].
    pub timed_out: u64,
    /// Initiations of the peer that were answered.
    pub answered: u64,
    /// Those whose answer the peer has proven to have. The answers to others were lost, or too late.
    pub proven: u64,
}

impl Handshakes {
    /// Those of another peer as well.
    pub fn add(&mut self, other: Self) {
        self.begun += other.begun;
        self.completed += other.completed;
        self.overtaken += other.overtaken;
        self.timed_out += other.timed_out;
        self.answered += other.answered;
        self.proven += other.proven;
    }
}

/// An initiation that was sent.
struct Initiation {
    noise: Box<HandshakeState>,
    index: u32,
}

/// See the module.
pub struct Peer {
    remote: [u8; 32],
    psk: PresharedKey,
    keepalive: Option<Duration>,
    mac1_key: [u8; 32],
    cookie_key: [u8; 32],
    cookie: Option<(Instant, [u8; MAC_LEN])>,
    /// Session number and mac1 of the last handshake message we sent, for a cookie that answers it.
    last_mac1: Option<(u32, [u8; MAC_LEN])>,
    timestamp_sent: Timestamp,
    timestamp_seen: Timestamp,
    answered_at: Option<Instant>,
    initiations: VecDeque<Initiation>,
    /// When the series of initiations began, and when the next is due.
    series: Option<(Instant, Instant)>,
    /// By which the peer may send, the newest last.
    sessions: VecDeque<Arc<Session>>,
    /// By which we send: one of them.
    current: Option<Arc<Session>>,
    renewed_for: Option<u32>,
    last_handshake: Option<Instant>,
    handshakes: Handshakes,
}

impl fmt::Debug for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Peer")
            .field("current", &self.current)
            .finish_non_exhaustive()
    }
}

impl Peer {
    /// A peer without session.
    #[must_use]
    pub fn new(remote: [u8; 32], psk: PresharedKey, keepalive: Option<Duration>) -> Self {
        Self {
            remote,
            psk,
            keepalive,
            mac1_key: mac::hash(LABEL_MAC1, &remote),
            cookie_key: mac::hash(LABEL_COOKIE, &remote),
            cookie: None,
            last_mac1: None,
            timestamp_sent: Timestamp::default(),
            timestamp_seen: Timestamp::default(),
            answered_at: None,
            initiations: VecDeque::new(),
            series: None,
            sessions: VecDeque::new(),
            current: None,
            renewed_for: None,
            last_handshake: None,
            handshakes: Handshakes::default(),
        }
    }

    /// Another interval of persistent keepalives.
    pub fn set_keepalive(&mut self, keepalive: Option<Duration>) {
        self.keepalive = keepalive;
    }

    /// Another preshared key, from the next handshake on.
    pub fn set_preshared_key(&mut self, psk: PresharedKey) {
        self.psk = psk;
    }

    /// The session to send by, if there is one that both sides have proven.
    #[must_use]
    pub fn current(&self) -> Option<&Arc<Session>> {
        self.current.as_ref()
    }

    /// All sessions by which the peer may send, the newest last: [`SESSIONS_MAX`] at most.
    pub fn sessions(&self) -> impl Iterator<Item = &Arc<Session>> {
        self.sessions.iter()
    }

    /// When the last handshake was complete.
    #[must_use]
    pub fn last_handshake(&self) -> Option<Instant> {
        self.last_handshake
    }

    /// What became of its handshakes.
    #[must_use]
    pub fn handshakes(&self) -> Handshakes {
        self.handshakes
    }

    /// Whether an initiation waits for its response.
    #[must_use]
    pub fn is_initiating(&self) -> bool {
        self.series.is_some()
    }

    /// A fresh initiation for the new session `index`, which no other session of this device may
    /// have. `since_1970` is the wall clock; one that goes back is not followed.
    pub fn initiate(
        &mut self,
        local: &LocalKey,
        index: u32,
        now: Instant,
        since_1970: Duration,
    ) -> Option<[u8; INITIATION_LEN]> {
        let timestamp = handshake::timestamp(since_1970).max(successor(self.timestamp_sent));
        let (noise, body) = handshake::initiate(local, &self.remote, &self.psk, index, timestamp)?;
        self.timestamp_sent = timestamp;
        while self.initiations.len() >= INITIATIONS_MAX {
            self.initiations.pop_front();
        }
        let noise = Box::new(noise);
        self.initiations.push_back(Initiation { noise, index });
        let jitter = Duration::from_millis(rand::random_range(0..=JITTER_MAX_MS));
        self.handshakes.begun += u64::from(self.series.is_none());
        let begun = self.series.map_or(now, |(begun, _)| begun);
        self.series = Some((begun, now + REKEY_TIMEOUT + jitter));
        self.with_macs(&body, index, now)
    }

    /// Answers an initiation of this peer by the new session `index`: the response, and the session,
    /// by which nothing may be sent before something has come by it ([`Self::confirm`]).
    ///
    /// # Errors
    ///
    /// [`Refused`].
    pub fn respond(
        &mut self,
        received: Received,
        index: u32,
        now: Instant,
    ) -> Result<([u8; RESPONSE_LEN], Arc<Session>), Refused> {
        let (sent, seen) = (received.timestamp(), self.timestamp_seen);
        if sent < seen {
            let behind = handshake::between(&sent, &seen);
            return Err(Refused::Older { behind });
        }
        if sent == seen {
            return Err(Refused::Replayed);
        }
        let soon = |at| now.saturating_duration_since(at) < INITIATION_GAP;
        if self.answered_at.is_some_and(soon) {
            return Err(Refused::TooMany);
        }
        let (timestamp, sender) = (received.timestamp(), received.sender());
        let (body, keys) = received.respond(&self.psk, index).ok_or(Refused::Forged)?;
        let session = Session::new(&keys, Role::Responder, index, sender, now);
        let session = Arc::new(session.ok_or(Refused::Forged)?);
        let response = self.with_macs(&body, index, now).ok_or(Refused::Forged)?;
        self.timestamp_seen = timestamp;
        self.answered_at = Some(now);
        self.handshakes.answered += 1;
        self.add(Arc::clone(&session));
        Ok((response, session))
    }

    /// Takes a response. The session is the current one from now on; its first packet proves it to
    /// the peer, so send one.
    ///
    /// # Errors
    ///
    /// [`Refused`]. A forged response does not end the wait for the real one.
    pub fn finish(&mut self, response: &[u8], now: Instant) -> Result<Arc<Session>, Refused> {
        let Some(Kind::Response { receiver }) = Kind::of(response) else {
            return Err(Refused::Forged);
        };
        let waiting = self.initiations.iter_mut();
        let mut found = waiting.filter(|initiation| initiation.index == receiver);
        let initiation = found.next().ok_or(Refused::Unasked)?;
        let (remote, keys) =
            handshake::finish(&mut initiation.noise, response).ok_or(Refused::Forged)?;
        let session = Session::new(&keys, Role::Initiator, receiver, remote, now);
        let session = Arc::new(session.ok_or(Refused::Forged)?);
        self.handshakes.completed += 1;
        self.add(Arc::clone(&session));
        self.establish(Arc::clone(&session), now);
        Ok(session)
    }

    /// Something authentic came by the session `index`. Whether that proved a session that our
    /// response had offered, which is the current one from now on.
    pub fn confirm(&mut self, index: u32, now: Instant) -> bool {
        let mut all = self.sessions.iter();
        let found = all.find(|session| session.local() == index).cloned();
        match found.filter(|session| session.prove()) {
            Some(session) => {
                self.handshakes.proven += 1;
                self.handshakes.overtaken += u64::from(self.series.is_some());
                self.establish(session, now);
                true
            }
            None => false,
        }
    }

    /// Adds a session; the oldest that is not in use makes room.
    fn add(&mut self, session: Arc<Session>) {
        if self.sessions.len() >= SESSIONS_MAX {
            let current = self.current.as_ref().map(|session| session.local());
            let unused = |session: &Arc<Session>| Some(session.local()) != current;
            if let Some(oldest) = self.sessions.iter().position(unused) {
                self.sessions.remove(oldest);
            }
        }
        self.sessions.push_back(session);
    }

    fn establish(&mut self, session: Arc<Session>, now: Instant) {
        self.current = Some(session);
        self.last_handshake = Some(now);
        self.initiations.clear();
        self.series = None;
    }

    /// Takes a cookie for the next handshake message.
    ///
    /// # Errors
    ///
    /// [`Refused`].
    pub fn receive_cookie(&mut self, reply: &[u8], now: Instant) -> Result<(), Refused> {
        let Some(Kind::CookieReply { receiver }) = Kind::of(reply) else {
            return Err(Refused::Forged);
        };
        let asked = self.last_mac1.filter(|(index, _)| *index == receiver);
        let (_, mac1) = asked.ok_or(Refused::Unasked)?;
        let cookie = gate::open_reply(reply, &self.cookie_key, &mac1).ok_or(Refused::Forged)?;
        self.cookie = Some((now, cookie));
        Ok(())
    }

    /// What is due. Call several times a second.
    pub fn tick(&mut self, activity: &Activity, now: Instant) -> Due {
        let mut due = Due {
            sessions_changed: self.drop_dead_sessions(now),
            ..Due::default()
        };
        let (data_sent, data_received) = activity.take_data();
        match self.series {
            Some((begun, _)) if now.saturating_duration_since(begun) >= REKEY_ATTEMPT_TIME => {
                self.handshakes.timed_out += 1;
                self.series = None;
                self.initiations.clear();
                activity.forget_unanswered();
            }
            Some((_, next)) => due.initiate = now >= next,
            None => due.initiate = self.wants_handshake(activity, data_sent, data_received, now),
        }
        let owes = activity.owing(now).is_some_and(|t| t >= KEEPALIVE_TIMEOUT);
        let quiet = self.keepalive.is_some_and(|interval| {
            activity
                .since_last(now)
                .is_none_or(|since| since >= interval)
        });
        if self.current.is_some() {
            due.keepalive = owes || quiet;
        } else if quiet && self.series.is_none() {
            due.initiate = true;
        }
        due.idle = self.sessions.is_empty() && self.series.is_none() && !due.initiate;
        due
    }

    fn wants_handshake(
        &mut self,
        activity: &Activity,
        data_sent: bool,
        data_received: bool,
        now: Instant,
    ) -> bool {
        let unanswered = activity.unanswered(now);
        if unanswered.is_some_and(|time| time >= KEEPALIVE_TIMEOUT + REKEY_TIMEOUT) {
            activity.forget_unanswered();
            return true;
        }
        let Some(current) = &self.current else {
            return false;
        };
        if data_sent && current.is_worn(now) {
            return true;
        }
        let late = now.saturating_duration_since(current.begun()) >= RENEW_WHEN_RECEIVING;
        let renew = data_received
            && late
            && current.role() == Role::Initiator
            && self.renewed_for != Some(current.local());
        if renew {
            self.renewed_for = Some(current.local());
        }
        renew
    }

    /// Forgets the keys that nothing can be done with any more; whether there were any.
    fn drop_dead_sessions(&mut self, now: Instant) -> bool {
        let before = self.sessions.len();
        self.sessions.retain(|session| session.is_alive(now));
        self.current.take_if(|session| !session.is_alive(now));
        self.sessions.len() != before
    }

    /// `body` with mac1, and with mac2 if the peer gave us a cookie.
    fn with_macs<const LEN: usize>(
        &mut self,
        body: &[u8],
        index: u32,
        now: Instant,
    ) -> Option<[u8; LEN]> {
        let mac1 = mac::mac(&self.mac1_key, &[body]);
        self.last_mac1 = Some((index, mac1));
        let fresh = |at: &Instant| now.saturating_duration_since(*at) < COOKIE_LIFETIME;
        let cookie = self.cookie.filter(|(at, _)| fresh(at));
        let mac2 = cookie.map_or([0; MAC_LEN], |(_, cookie)| {
            mac::mac(&cookie, &[body, &mac1])
        });
        [body, &mac1, &mac2].concat().first_chunk().copied()
    }
}

/// The least timestamp that is greater: a clock that stands still or goes back must not make the
/// peer refuse us.
fn successor(timestamp: Timestamp) -> Timestamp {
    let mut next = timestamp;
    for byte in next.iter_mut().rev() {
        let (sum, overflow) = byte.overflowing_add(1);
        *byte = sum;
        if !overflow {
            break;
        }
    }
    next
}

#[cfg(test)]
mod tests;
