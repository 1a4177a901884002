//! What comes to a UDP port of the relay: STUN is answered, relay frames go on, and QUIC is left.

use std::{
    io,
    net::SocketAddr,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use mesh_core::relay_server::UdpPath;
use mesh_wire::{
    reflexive,
    relay::udp::{data_session, looks_like_frame, run_len},
};
use quinn_udp::{RecvMeta, Transmit};
use tokio::time;

use super::hub::Hub;
use crate::quic::endpoint::{Buffers, ERROR_PAUSE, Socket};

/// Answers a second and socket, to STUN and to who wants to bind or pings. A node asks about twice in
/// 20 s: enough for 200,000 nodes, and one core at 10 %.
const ANSWERS_PER_S_MAX: u32 = 20_000;

/// The bit that every QUIC packet has set (RFC 9000 §17.2, §17.3).
const QUIC_BIT: u8 = 0x40;

/// A UDP socket for STUN, and for QUIC and relay frames too if it has those.
#[derive(Debug)]
pub(super) struct SharedSocket {
    inner: Arc<Socket>,
    has_quic: bool,
    hub: Arc<Hub>,
    answers: Mutex<AnswersOfThisSecond>,
}

#[derive(Debug)]
struct AnswersOfThisSecond {
    since: Option<Instant>,
    answers: u32,
}

impl SharedSocket {
    pub(super) fn new(inner: Arc<Socket>, has_quic: bool, hub: Arc<Hub>) -> Self {
        if has_quic {
            hub.set_udp(inner.clone());
        }
        let answers = Mutex::new(AnswersOfThisSecond {
            since: None,
            answers: 0,
        });
        Self {
            inner,
            has_quic,
            hub,
            answers,
        }
    }

    pub(super) fn local_addr(&self) -> io::Result<SocketAddr> {
        self.inner.local_addr()
    }

    /// Answers STUN on a socket that has no QUIC. Does not end.
    pub(super) async fn serve(self: Arc<Self>) {
        let mut buffers = Buffers::default();
        loop {
            match self.inner.receive(&mut buffers).await {
                Ok(received) => {
                    for (buffer, meta) in buffers.iter_mut(received) {
                        self.take_out(buffer, meta);
                    }
                }
                Err(error) => {
                    tracing::debug!(%error, "cannot receive");
                    time::sleep(ERROR_PAUSE).await;
                }
            }
        }
    }

    /// Answers, sends on or drops what is not QUIC, and closes the gaps that leaves in `buffer`.
    /// Returns the bytes that are left.
    pub(super) fn take_out(&self, buffer: &mut [u8], meta: &RecvMeta) -> usize {
        let (mut read, mut kept) = (0, 0);
        while read < meta.len {
            let end = meta.len.min(read.saturating_add(meta.stride.max(1)));
            let Some(datagram) = buffer.get(read..end) else {
                break;
            };
            if self.has_quic && looks_like_frame(datagram) {
                let rest = buffer.get(read..meta.len).unwrap_or(datagram);
                read += self.take_frames(rest, meta);
                continue;
            }
            if self.is_for_quic(datagram, meta) {
                buffer.copy_within(read..end, kept);
                kept += end - read;
            }
            read = end;
        }
        kept
    }

    /// Takes the frames at the start of `datagrams`: all data of one session, or one of another
    /// kind. Returns how many bytes that are.
    fn take_frames(&self, datagrams: &[u8], meta: &RecvMeta) -> usize {
        let stride = meta.stride.max(1);
        let from = UdpPath {
            remote: meta.addr,
            local: meta.dst_ip,
        };
        let (first, _) = datagrams.split_at(stride.min(datagrams.len()));
        let (taken, answer) = match data_session(first) {
            Some(session) => {
                let len = run_len(datagrams, stride, session).saturating_mul(stride);
                let run = datagrams.get(..len).unwrap_or(datagrams);
                let answer = self.hub.datagrams(from, session, run, stride, meta.ecn);
                (run, answer)
            }
            None => (first, self.hub.datagram(from, first)),
        };
        if let Some(answer) = answer.filter(|_| self.may_answer()) {
            self.send(&answer, meta);
        }
        taken.len().max(1)
    }

    fn is_for_quic(&self, datagram: &[u8], meta: &RecvMeta) -> bool {
        if reflexive::looks_like_stun(datagram) {
            self.answer(datagram, meta);
            return false;
        }
        let is_quic = self.has_quic && datagram.first().is_some_and(|first| first & QUIC_BIT != 0);
        if !is_quic {
            count(&self.hub.udp_counters.garbage_datagrams);
        }
        is_quic
    }

    fn answer(&self, request: &[u8], meta: &RecvMeta) {
        let answer = reflexive::answer(request, meta.addr).filter(|_| self.may_answer());
        let sent = answer.is_some_and(|answer| self.send(&answer, meta));
        count(if sent {
            &self.hub.udp_counters.stun_answers
        } else {
            &self.hub.udp_counters.stun_ignored
        });
    }

    /// Whether an answer went out; where the socket is full, the node asks again.
    fn send(&self, answer: &[u8], meta: &RecvMeta) -> bool {
        let transmit = Transmit {
            destination: meta.addr,
            ecn: None,
            contents: answer,
            segment_size: None,
            src_ip: meta.dst_ip, // From the address that was asked.
        };
        self.inner.try_send(&transmit).is_ok()
    }

    fn may_answer(&self) -> bool {
        let now = Instant::now();
        let mut window = self.answers.lock().unwrap_or_else(PoisonError::into_inner);
        let current = window
            .since
            .is_some_and(|since| now.saturating_duration_since(since) < Duration::from_secs(1));
        if !current {
            *window = AnswersOfThisSecond {
                since: Some(now),
                answers: 0,
            };
        }
        window.answers += 1;
        window.answers <= ANSWERS_PER_S_MAX
    }
}

fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Relaxed);
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;

    use mesh_core::relay_server::Limits;

    use super::*;

    fn socket() -> SharedSocket {
        let inner = crate::sockets::udp("127.0.0.1:0".parse().unwrap()).unwrap();
        let hub = Hub::new(Limits::default(), &[7; 32]);
        let inner = Arc::new(Socket::new(inner).unwrap());
        SharedSocket::new(inner, true, Arc::new(hub))
    }

    #[tokio::test]
    async fn stun_between_quic_packets_of_one_batch_is_taken_out() {
        let asker = UdpSocket::bind("127.0.0.1:0").unwrap();
        let asker_address = asker.local_addr().unwrap();
        let shared = socket();
        let stun = reflexive::request([9; 12]);
        let quic = |n: u8| vec![QUIC_BIT | n; stun.len()];
        let mut batch = [quic(1), stun.clone(), quic(2), vec![0; stun.len()], quic(3)].concat();
        batch.truncate(batch.len() - 4); // The last of a batch may be shorter.
        let meta = RecvMeta {
            addr: asker_address,
            len: batch.len(),
            stride: stun.len(),
            ecn: None,
            dst_ip: None,
        };
        let kept = shared.take_out(&mut batch, &meta);
        let mut expected = [quic(1), quic(2), quic(3)].concat();
        expected.truncate(expected.len() - 4);
        assert_eq!(batch[..kept], expected);
        let counters = &shared.hub.udp_counters;
        assert_eq!(counters.stun_answers.load(Relaxed), 1);
        assert_eq!(counters.garbage_datagrams.load(Relaxed), 1);
        let mut answer = [0; 100];
        let length = asker.recv(&mut answer).unwrap();
        let expected = Some(([9; 12], asker_address));
        assert_eq!(reflexive::parse_response(&answer[..length]), expected);
    }

    #[tokio::test]
    async fn answers_are_bounded() {
        let shared = socket();
        let asked = ANSWERS_PER_S_MAX * 2;
        // More than a second would allow more: the machine would have to be very slow.
        let answered = (0..asked).filter(|_| shared.may_answer()).count();
        assert!((20_000..40_000).contains(&answered), "{answered}");
    }

    #[tokio::test]
    async fn no_meta_makes_it_panic() {
        let shared = socket();
        for (len, stride) in [(0, 0), (10, 0), (10, 3), (100, 50), (10, usize::MAX)] {
            let meta = RecvMeta {
                addr: "127.0.0.1:9".parse().unwrap(),
                len,
                stride,
                ecn: None,
                dst_ip: None,
            };
            assert!(shared.take_out(&mut [0x45; 20], &meta) <= 20);
            assert_eq!(shared.take_out(&mut [0x20; 20], &meta), 0);
        }
    }
}
