//! The last step of everything that leaves: by which socket or relay, in which frame.

use std::{
    collections::HashMap,
    hash::{BuildHasher as _, RandomState},
    io,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use mesh_linux::udp::{Ecn, IpFields, LocalEnd, SEGMENTS_MAX, SEND_BYTES_MAX};
use mesh_wire::{
    id::{NodeId, RelayId, Via},
    relay::{self, HEADER_LEN, Session},
};

use crate::{
    batch::Target,
    stats::DropReason,
    tunnel::{Inner, TunnelEvent},
};

/// How long control threads wait for room in a socket before they give datagrams up: longer than
/// a batch takes at 100 Mb/s (64 KiB in 5 ms), shorter than anyone notices. Packet threads do not
/// wait here.
const SEND_WAIT: Duration = Duration::from_millis(10);

/// What a thread needs to send.
#[derive(Debug)]
pub(crate) struct Leave {
    /// Which pair of sockets is its own.
    pair: usize,
    /// Whether it may wait for room.
    may_wait: bool,
    /// Which socket of the pair had no room when something last did not leave; `None`: it was one of a burst.
    pub(crate) full: Option<usize>,
    /// Datagrams with a relay's header in front.
    frames: Vec<u8>,
}

impl Leave {
    /// For packet thread `number`.
    pub(crate) fn worker(number: usize) -> Self {
        Self {
            pair: number,
            may_wait: false,
            full: None,
            frames: Vec::new(),
        }
    }

    /// For all other threads.
    pub(crate) fn other() -> Self {
        Self {
            pair: 0,
            may_wait: true,
            full: None,
            frames: Vec::new(),
        }
    }
}

/// A way, and this machine's end from which it is to be gone; `None`: the kernel chooses.
/// Who answers a stock device must do it from the address that was asked, as the kernel's
/// WireGuard does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Way {
    pub(crate) via: Via,
    pub(crate) source: Option<LocalEnd>,
}

impl From<Via> for Way {
    fn from(via: Via) -> Self {
        Self { via, source: None }
    }
}

/// How a relay is reached by plain UDP from the node's own port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RelayUdp {
    /// The relay's address and port.
    pub address: SocketAddr,
    /// The peers that it has sessions to.
    pub sessions: HashMap<NodeId, Session>,
}

/// All relays that are reached so.
#[derive(Debug, Default, Clone)]
pub(crate) struct RelayUdpTable {
    by_id: HashMap<RelayId, Arc<RelayUdp>>,
    by_address: HashMap<SocketAddr, (RelayId, HashMap<Session, NodeId>)>,
}

impl RelayUdpTable {
    pub(crate) fn with(&self, relay: RelayId, udp: Option<RelayUdp>) -> Self {
        let mut table = self.clone();
        if let Some(before) = table.by_id.remove(&relay) {
            table.by_address.remove(&before.address);
        }
        if let Some(udp) = udp {
            let sessions = udp.sessions.iter().map(|(peer, session)| (*session, *peer));
            table
                .by_address
                .insert(udp.address, (relay, sessions.collect()));
            table.by_id.insert(relay, Arc::new(udp));
        }
        table
    }

    /// The relay at an address, and whose its sessions are.
    pub(crate) fn at(&self, address: &SocketAddr) -> Option<&(RelayId, HashMap<Session, NodeId>)> {
        self.by_address.get(address)
    }

    fn session(&self, relay: RelayId, peer: &NodeId) -> Option<(SocketAddr, Session)> {
        let udp = self.by_id.get(&relay)?;
        Some((udp.address, *udp.sessions.get(peer)?))
    }
}

impl Inner {
    /// Sends what fits one call to where it goes, and the copy of it. Returns as [`Self::transmit`] does.
    pub(crate) fn send_call(
        &self,
        target: &Target,
        datagrams: &[u8],
        segment_len: usize,
        leave: &mut Leave,
    ) -> usize {
        let Target { peer, ecn, .. } = target;
        let sent = self.transmit(peer, target.primary, datagrams, segment_len, *ecn, leave);
        let all = sent == datagrams.len();
        if let Some(duplicate) = target.duplicate.filter(|_| all) {
            // A copy: what finds no room is not waited for.
            let copied = self.transmit(peer, duplicate.into(), datagrams, segment_len, *ecn, leave);
            let lost = (datagrams.len() - copied).div_ceil(segment_len.max(1));
            self.drops.count_many(DropReason::SendFailed, lost);
        }
        sent
    }

    /// Sends datagrams of `segment_len` bytes (the last may be shorter) by `way`. Returns the bytes
    /// that are gone, sent or dropped and counted; fewer than there are only if the socket has no room
    /// now and `leave` may not wait.
    pub(crate) fn transmit(
        &self,
        peer: &NodeId,
        way: Way,
        datagrams: &[u8],
        segment_len: usize,
        ecn: Ecn,
        leave: &mut Leave,
    ) -> usize {
        let segment_len = segment_len.max(1);
        let fields = (ecn, way.source);
        match way.via {
            Via::Direct(to) => self.send_udp(to, datagrams, segment_len, fields, leave),
            Via::Relay(id) => {
                if let Some((to, session)) = self.relay_udp.load().session(id, peer) {
                    let mut frames = std::mem::take(&mut leave.frames);
                    frames.clear();
                    for datagram in datagrams.chunks(segment_len) {
                        frames.extend(relay::data_header(session));
                        frames.extend(datagram);
                    }
                    let framed_len = segment_len + HEADER_LEN;
                    let sent = self.send_udp(to, &frames, framed_len, fields, leave);
                    let sent = sent - sent.div_ceil(framed_len) * HEADER_LEN;
                    leave.frames = frames;
                    return sent;
                }
                let relays = self.relays.load();
                let count = datagrams.len().div_ceil(segment_len);
                let (dropped, reason) = match relays.get(&id) {
                    Some(relay) => (
                        relay.send(peer, datagrams, segment_len),
                        DropReason::RelayFull,
                    ),
                    None => (count, DropReason::RelayGone),
                };
                self.drops.count_many(reason, dropped);
                datagrams.len()
            }
        }
    }

    /// Whether packets to `peer` go over the link to a relay, which has enough for now.
    pub(crate) fn is_relay_full(&self, peer: &NodeId, via: Via) -> bool {
        let Via::Relay(id) = via else {
            return false;
        };
        let by_link = self.relay_udp.load().session(id, peer).is_none();
        by_link
            && self
                .relays
                .load()
                .get(&id)
                .is_some_and(|relay| relay.is_full())
    }

    fn send_udp(
        &self,
        to: SocketAddr,
        datagrams: &[u8],
        segment_len: usize,
        (ecn, end): (Ecn, Option<LocalEnd>),
        leave: &mut Leave,
    ) -> usize {
        let egress = self.egress.load();
        let fields = IpFields {
            ecn,
            source: end.map(|end| end.address),
            link: egress.as_ref().and_then(|egress| egress.answering(to, end)),
        };
        let pairs = self.sockets.load();
        let Some(sockets) = pairs.get(leave.pair) else {
            return datagrams.len();
        };
        let spare = self.bursts.towards(&to);
        let send = |part: &[u8]| match &spare {
            Some(spare) => spare.socket.send(to, part, segment_len, fields),
            None => sockets.send(to, part, segment_len, fields),
        };
        let mut gone = 0;
        for part in datagrams.chunks(segments_of(segment_len) * segment_len) {
            let mut sent = send(part);
            if is_full(&sent) {
                if !leave.may_wait {
                    leave.full = spare.is_none().then(|| sockets.number_for(to));
                    return gone;
                }
                match &spare {
                    Some(spare) => spare.socket.wait_writable(SEND_WAIT),
                    None => sockets.wait_writable(to, SEND_WAIT),
                }
                sent = send(part);
            }
            if let Err(error) = sent {
                let count = part.len().div_ceil(segment_len);
                self.drops.count_many(DropReason::SendFailed, count);
                if is_refusal(&error) && self.unsendable.is_news(to, Instant::now()) {
                    self.emit(TunnelEvent::Unsendable(to));
                }
            }
            gone += part.len();
        }
        gone
    }
}

/// How many datagrams of `segment_len` bytes one call can send by `via`.
pub(crate) fn segments_at_once(via: Via, segment_len: usize) -> usize {
    match via {
        Via::Direct(_) => segments_of(segment_len),
        // A link takes any number; many nodes have both a link and sessions by UDP.
        Via::Relay(_) => segments_of(segment_len + HEADER_LEN),
    }
}

fn segments_of(wire_len: usize) -> usize {
    (SEND_BYTES_MAX / wire_len.max(1)).clamp(1, SEGMENTS_MAX)
}

/// The kernel has no way there, or may not go it: what is sent next will not leave either.
fn is_refusal(error: &io::Error) -> bool {
    const CODES: [rustix::io::Errno; 5] = [
        rustix::io::Errno::NETUNREACH,
        rustix::io::Errno::HOSTUNREACH,
        rustix::io::Errno::NETDOWN,
        rustix::io::Errno::NODEV,
        rustix::io::Errno::PERM,
    ];
    rustix::io::Errno::from_io_error(error).is_some_and(|code| CODES.contains(&code))
}

/// How often it is said of an address that nothing can be sent there.
const REFUSAL_EVERY: Duration = Duration::from_secs(1);

/// Addresses that are remembered: a node of a few dozen peers sends to so many in a second.
const REFUSALS_MAX: usize = 64;

/// Which addresses were told lately, by what their hash leaves of them: without a lock, without memory for
/// each. Two that share a place are told more often than they need to be; the queue of events is bounded.
#[derive(Debug)]
pub(crate) struct Refusals {
    began: Instant,
    hasher: RandomState,
    /// The hash's upper half, and milliseconds since `began`.
    told: [AtomicU64; REFUSALS_MAX],
}

impl Default for Refusals {
    fn default() -> Self {
        Self {
            began: Instant::now(),
            hasher: RandomState::new(),
            told: [const { AtomicU64::new(0) }; REFUSALS_MAX],
        }
    }
}

impl Refusals {
    /// Whether this address was not told within [`REFUSAL_EVERY`]; it is now.
    fn is_news(&self, to: SocketAddr, now: Instant) -> bool {
        // One second later than the truth, so that 0 is long ago. It wraps after 49 days: told once too often.
        let at = now.saturating_duration_since(self.began) + REFUSAL_EVERY;
        let at = at.as_millis() & u128::from(u32::MAX);
        let at = u64::try_from(at).unwrap_or_default();
        let hash = self.hasher.hash_one(to);
        let place = usize::try_from(hash % REFUSALS_MAX as u64).unwrap_or_default();
        let Some(told) = self.told.get(place) else {
            return true;
        };
        let (tag, low) = (hash & !u64::from(u32::MAX), u64::from(u32::MAX));
        let before = told.load(Relaxed);
        let since = at.wrapping_sub(before & low);
        if before & !low == tag && u128::from(since) < REFUSAL_EVERY.as_millis() {
            return false;
        }
        told.store(tag | at, Relaxed);
        true
    }
}

fn is_full(sent: &io::Result<()>) -> bool {
    matches!(sent, Err(error) if error.kind() == io::ErrorKind::WouldBlock)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_that_nothing_can_be_sent_to_is_told_once_in_a_second() {
        let refusals = Refusals::default();
        let at = |ms| refusals.began + Duration::from_millis(ms);
        let to = |last| SocketAddr::from(([192, 0, 2, last], 1));
        assert!(refusals.is_news(to(1), at(0)));
        assert!(!refusals.is_news(to(1), at(999)));
        assert!(refusals.is_news(to(1), at(1_000)));
        assert!(!refusals.is_news(to(1), at(1_999)));
        // Another one is another matter, whichever place it has.
        assert!(refusals.is_news(to(2), at(2_000)));
        // And what it was said of 49 days ago is news.
        let later = u64::from(u32::MAX) + 1_500;
        assert!(refusals.is_news(to(2), at(later)));
    }

    #[test]
    fn only_what_will_go_on_is_a_refusal() {
        let refused = |code: rustix::io::Errno| is_refusal(&code.into());
        assert!(refused(rustix::io::Errno::NETUNREACH) && refused(rustix::io::Errno::PERM));
        assert!(!refused(rustix::io::Errno::AGAIN) && !refused(rustix::io::Errno::NOBUFS));
        assert!(!is_refusal(&io::ErrorKind::Unsupported.into()));
    }

    #[test]
    fn a_relay_that_moves_is_not_found_at_its_old_address() {
        let (relay, peer) = (RelayId(1), NodeId([1; 32]));
        let session = Session {
            number: 7,
            epoch: 1,
        };
        let udp = |port| RelayUdp {
            address: SocketAddr::from(([192, 0, 2, 1], port)),
            sessions: [(peer, session)].into(),
        };
        let table = RelayUdpTable::default().with(relay, Some(udp(1)));
        assert_eq!(table.session(relay, &peer), Some((udp(1).address, session)));
        let table = table.with(relay, Some(udp(2)));
        assert!(table.at(&udp(1).address).is_none());
        let (found, sessions) = table.at(&udp(2).address).unwrap();
        assert_eq!((*found, sessions[&session]), (relay, peer));
        let table = table.with(relay, None);
        assert_eq!(table.session(relay, &peer), None);
        assert!(table.at(&udp(2).address).is_none());
    }
}
