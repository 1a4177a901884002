//! The replies of one batch: those of one length for one client leave together, as one packet that the kernel cuts
//! (`UDP_SEGMENT`, Linux 4.18), the others one by one in one system call. A forwarder, or whoever asks much, has many in one
//! batch, and the way through the stack is most of what an answer costs.

use std::{
    io::IoSlice,
    net::{SocketAddr, UdpSocket},
    os::fd::AsRawFd as _,
    sync::Arc,
};

use nix::{
    errno::Errno,
    sys::socket::{ControlMessage, MsgFlags, MultiHeaders, SockaddrStorage, sendmmsg, sendmsg},
};

use crate::datagrams::BATCH;

/// Most bytes in one packet that the kernel cuts: what fits the length field of an IPv4 packet beside its headers
/// (65,535 − 20 − 8). A batch of the longest answers, 64 × 1,232, is two.
const TOGETHER_MAX_BYTES: usize = 65_507;

/// Replies that wait to be sent by one socket.
pub(crate) struct Outbox {
    socket: Arc<UdpSocket>,
    /// One behind the other; whoever adds a reply writes it at the end.
    pub(crate) bytes: Vec<u8>,
    replies: Vec<Reply>,
    /// Whether the kernel cuts; cleared for good when a device says that it cannot.
    cuts: bool,
    together: Vec<u8>,
    alone: Vec<Reply>,
    headers: MultiHeaders<SockaddrStorage>,
}

#[derive(Debug, Clone, Copy)]
struct Reply {
    to: SocketAddr,
    len: usize,
    start: usize,
}

impl Outbox {
    pub(crate) fn new(socket: Arc<UdpSocket>) -> Self {
        Self {
            socket,
            bytes: Vec::new(),
            replies: Vec::with_capacity(BATCH),
            cuts: true,
            together: Vec::new(),
            alone: Vec::with_capacity(BATCH),
            headers: MultiHeaders::preallocate(BATCH, None),
        }
    }

    pub(crate) fn socket(&self) -> &Arc<UdpSocket> {
        &self.socket
    }

    /// What was written since the last reply ended is one for `to`. Returns it.
    pub(crate) fn end(&mut self, to: SocketAddr) -> &[u8] {
        let start = self.replies.last().map_or(0, |last| last.start + last.len);
        let len = self.bytes.len() - start;
        self.replies.push(Reply { to, len, start });
        self.bytes.get(start..).unwrap_or_default()
    }

    /// Sends all, and is empty then. Returns how many the kernel did not take.
    pub(crate) fn send(&mut self) -> usize {
        let mut replies = std::mem::take(&mut self.replies);
        if replies.len() > 1 {
            replies.sort_unstable_by_key(|one| (one.to, one.len));
        }
        for equals in replies.chunk_by(|one, other| (one.to, one.len) == (other.to, other.len)) {
            let len = equals.first().map_or(0, |one| one.len);
            for some in equals.chunks((TOGETHER_MAX_BYTES / len.max(1)).max(1)) {
                if !self.send_together(some) {
                    self.alone.extend_from_slice(some);
                }
            }
        }
        let unsent = self.send_alone();
        replies.clear();
        self.replies = replies;
        self.alone.clear();
        self.bytes.clear();
        unsent
    }

    /// Sends replies of one length to one client. `false`: nothing was sent.
    fn send_together(&mut self, replies: &[Reply]) -> bool {
        let [first, _, ..] = replies else {
            return false;
        };
        let Some(len) = u16::try_from(first.len).ok().filter(|_| self.cuts) else {
            return false;
        };
        self.together.clear();
        for one in replies {
            self.together.extend_from_slice(of(&self.bytes, one));
        }
        let sent = sendmsg(
            self.socket.as_raw_fd(),
            &[IoSlice::new(&self.together)],
            &[ControlMessage::UdpGsoSegments(&len)],
            MsgFlags::MSG_DONTWAIT,
            Some(&SockaddrStorage::from(first.to)),
        );
        // The device cannot do checksums (udp(7), UDP_SEGMENT): it never will. What else is wrong is found out one by one.
        self.cuts &= sent != Err(Errno::EIO);
        sent.is_ok()
    }

    fn send_alone(&mut self) -> usize {
        let mut slices = [[IoSlice::new(&[])]; BATCH];
        let mut to = [None; BATCH];
        for ((slice, to), one) in slices.iter_mut().zip(&mut to).zip(&self.alone) {
            *slice = [IoSlice::new(of(&self.bytes, one))];
            *to = Some(SockaddrStorage::from(one.to));
        }
        let count = self.alone.len();
        let (mut done, mut unsent) = (0, 0);
        while let (Some(slices), Some(to)) = (slices.get(done..count), to.get(done..count))
            && !to.is_empty()
        {
            let (socket, flags) = (self.socket.as_raw_fd(), MsgFlags::MSG_DONTWAIT);
            let none: [ControlMessage<'_>; 0] = [];
            let tried = sendmmsg(socket, &mut self.headers, slices, to, none, flags);
            done += match tried.map_or(0, Iterator::count) {
                0 => {
                    unsent += 1; // The first; the others may go.
                    1
                }
                some => some,
            };
        }
        unsent
    }
}

fn of<'a>(bytes: &'a [u8], one: &Reply) -> &'a [u8] {
    bytes
        .get(one.start..one.start + one.len)
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, time::Duration};

    use super::*;

    fn socket(address: &str) -> UdpSocket {
        let socket = UdpSocket::bind(address).unwrap();
        socket
            .set_read_timeout(Some(Duration::from_secs(5)))
            .unwrap();
        socket
    }

    /// What comes within a batch, by how often.
    fn received(client: &UdpSocket, count: usize) -> BTreeMap<Vec<u8>, usize> {
        let mut received = BTreeMap::new();
        let mut buffer = [0; 2048];
        for _ in 0..count {
            let len = client.recv(&mut buffer).unwrap();
            *received.entry(buffer[..len].to_vec()).or_default() += 1;
        }
        client.set_nonblocking(true).unwrap();
        assert!(client.recv(&mut buffer).is_err(), "one came twice");
        client.set_nonblocking(false).unwrap();
        received
    }

    #[test]
    fn each_client_gets_its_own_replies_each_in_a_datagram_of_its_own() {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let clients = [(); 3].map(|()| socket(address));
            let mut outbox = Outbox::new(Arc::new(socket(address)));
            for cuts in [true, false] {
                outbox.cuts = cuts;
                // Of all lengths up to the longest, some alone, most together, of one client more than one packet holds.
                let mut wanted = [const { Vec::new() }; 3];
                for number in 0..BATCH {
                    let (of, len) = match number {
                        0..56 => (0, 1_232),
                        56..60 => (1, 40),
                        60 => (1, 41),
                        _ => (2, number),
                    };
                    let mut reply = vec![7; len];
                    reply[0] = u8::try_from(number).unwrap();
                    outbox.bytes.extend_from_slice(&reply);
                    let to = clients[of].local_addr().unwrap();
                    assert_eq!(outbox.end(to), reply);
                    wanted[of].push(reply);
                }
                assert_eq!(outbox.send(), 0);
                for (client, wanted) in clients.iter().zip(wanted) {
                    let received = received(client, wanted.len());
                    let wanted: BTreeMap<_, _> = wanted.into_iter().map(|one| (one, 1)).collect();
                    assert!(received == wanted, "{address}, cut by the kernel: {cuts}");
                }
                assert_eq!(outbox.cuts, cuts, "loopback cuts");
                assert_eq!(outbox.send(), 0, "there is nothing left");
            }
        }
    }

    #[test]
    fn what_cannot_be_sent_is_counted_one_by_one_and_keeps_nobody_from_theirs() {
        let client = socket("127.0.0.1:0");
        let mut outbox = Outbox::new(Arc::new(socket("127.0.0.1:0")));
        let (nobody, to) = ("[::1]:53".parse().unwrap(), client.local_addr().unwrap());
        for to in [nobody, to, nobody, to, to] {
            outbox.bytes.extend_from_slice(b"answer");
            outbox.end(to);
        }
        assert_eq!(outbox.send(), 2);
        assert_eq!(received(&client, 3).values().sum::<usize>(), 3);
    }
}
