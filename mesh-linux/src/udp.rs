//! UDP sockets that move batches: one system call for many datagrams, by `UDP_SEGMENT` on the
//! way out (Linux 4.18) and `recvmmsg` with `UDP_GRO` (Linux 5.0) on the way in.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
    os::fd::{AsFd, AsRawFd, BorrowedFd},
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    net::sockopt::{self, Ipv4PathMtuDiscovery, Ipv6PathMtuDiscovery},
};
use socket2::{Domain, Protocol, SockAddr, SockAddrStorage, Socket, Type};

use crate::IfIndex;

/// Bytes the kernel may hold for us on receive: 1 Gb/s for the 30 ms that a busy machine may
/// keep a thread off the processor (125 MB/s × 30 ms = 3.75 MB). Left at its default of 208 KiB,
/// the socket capped another relay at 95 Mb/s (netbird#6021). An eighth of it would let a small flow beside a bulk one
/// wait for less, but takes up to two fifths of the throughput where programs compute beside it (`mesh-tunnel/README.md`).
pub const RECEIVE_BUFFER_BYTES: usize = 4 << 20;

/// Bytes the kernel may hold for us on send: four batches of 64 KiB with its own books (the kernel
/// doubles the number for these). More would only add delay in front of the interface's own queue:
/// what finds no room here waits in a queue that is fair among flows.
pub const SEND_BUFFER_BYTES: usize = 256 << 10;

/// Both buffers of a socket of which many are open and most wait in vain: some handfuls of small datagrams. 256 of them hold
/// 4 MiB at most, as the kernel doubles the number for its own books.
pub const SPARE_BUFFER_BYTES: usize = 8 << 10;

/// Most datagrams in one send: the kernel's `UDP_MAX_SEGMENTS` until 6.8 (128 since).
pub const SEGMENTS_MAX: usize = 64;

/// Most bytes in one send: what fits the length field of an IPv4 packet besides its headers
/// (65,535 − 20 − 8).
pub const SEND_BYTES_MAX: usize = 65_507;

/// Messages of one receive. Each may be up to 64 KiB of glued datagrams, so eight are what a
/// thread deciphers in half a millisecond: the other direction waits no longer. They take 512 KiB of
/// address space; pages that no datagram ever touched cost nothing.
pub const RECEIVE_MESSAGES: usize = 8;

/// Tries to find a port that is free for both families before giving up.
const BIND_ATTEMPTS: usize = 16;

/// The node's port: an IPv4 socket and, unless the machine has no IPv6, an IPv6 socket.
#[derive(Debug)]
pub struct UdpPair {
    v4: UdpBatch,
    v6: Option<UdpBatch>,
    port: u16,
}

impl UdpPair {
    /// Binds both families to `port` on all addresses; 0 picks a port that is free for both.
    ///
    /// # Errors
    ///
    /// `AddrInUse` if another process has the port; what the kernel says otherwise.
    pub fn bind(port: u16) -> io::Result<Self> {
        let mut attempt = 0;
        loop {
            attempt += 1;
            match Self::bind_both(port, false) {
                Err(error)
                    if port == 0
                        && error.kind() == io::ErrorKind::AddrInUse
                        && attempt < BIND_ATTEMPTS => {}
                result => return result,
            }
        }
    }

    /// Binds `count` pairs (at least one) to the same port. The kernel hands what one sender sends
    /// to one of them, always the same while their number does not change (`SO_REUSEPORT`).
    ///
    /// # Errors
    ///
    /// As [`Self::bind`]: the first pair shares the port with nobody, so a second agent is noticed.
    pub fn bind_many(port: u16, count: usize) -> io::Result<Vec<Self>> {
        let first = Self::bind(port)?;
        let port = first.port;
        let mut pairs = vec![first];
        if count > 1 {
            for socket in pairs.iter().flat_map(Self::sockets) {
                sockopt::set_socket_reuseport(&socket.socket, true)?;
            }
        }
        for _ in 1..count {
            pairs.push(Self::bind_both(port, true)?);
        }
        Ok(pairs)
    }

    /// Marks what is sent (`SO_MARK`), for rules and filters; 0 for no mark. Needs CAP_NET_ADMIN.
    ///
    /// # Errors
    ///
    /// What the kernel says.
    pub fn set_mark(&self, mark: u32) -> io::Result<()> {
        self.sockets().try_for_each(|socket| {
            let socket = socket2::SockRef::from(&socket.socket);
            socket.set_mark(mark)
        })
    }

    fn bind_both(port: u16, shared: bool) -> io::Result<Self> {
        let v4 = UdpBatch::bind(SocketAddr::from((Ipv4Addr::UNSPECIFIED, port)), shared)?;
        let port = v4.socket.local_addr()?.port();
        let v6 = match UdpBatch::bind(SocketAddr::from((Ipv6Addr::UNSPECIFIED, port)), shared) {
            Ok(socket) => Some(socket),
            Err(error)
                if matches!(
                    error.raw_os_error(),
                    Some(libc::EAFNOSUPPORT | libc::EADDRNOTAVAIL)
                ) =>
            {
                None
            }
            Err(error) => return Err(error),
        };
        Ok(Self { v4, v6, port })
    }

    /// The port of both sockets.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The sockets, IPv4 first.
    pub fn sockets(&self) -> impl Iterator<Item = &UdpBatch> {
        std::iter::once(&self.v4).chain(&self.v6)
    }

    /// Waits until the socket of `to`'s family has room, at most for `time`.
    pub fn wait_writable(&self, to: SocketAddr, time: Duration) {
        let number = self.number_for(to);
        if let Some(socket) = self.sockets().nth(number) {
            socket.wait_writable(time);
        }
    }

    /// Which of [`Self::sockets`] sends to an address.
    #[must_use]
    pub fn number_for(&self, to: SocketAddr) -> usize {
        usize::from(to.ip().to_canonical().is_ipv6())
    }

    /// The socket of an address's family, and the address as that family writes it.
    fn socket_for(&self, to: SocketAddr) -> Option<(&UdpBatch, SocketAddr)> {
        match (to, to.ip()) {
            (_, IpAddr::V6(ip)) if ip.to_ipv4_mapped().is_some() => {
                let ip = ip.to_ipv4_mapped()?;
                Some((&self.v4, SocketAddr::from((ip, to.port()))))
            }
            (SocketAddr::V4(_), _) => Some((&self.v4, to)),
            (SocketAddr::V6(_), _) => Some((self.v6.as_ref()?, to)),
        }
    }

    /// Sends by the socket of `to`'s family; see [`UdpBatch::send`].
    ///
    /// # Errors
    ///
    /// Those of [`UdpBatch::send`]; `Unsupported` for an IPv6 address on a machine without.
    pub fn send(
        &self,
        to: SocketAddr,
        datagrams: &[u8],
        segment_len: usize,
        fields: IpFields,
    ) -> io::Result<()> {
        let (socket, to) = self.socket_for(to).ok_or(io::ErrorKind::Unsupported)?;
        socket.send(to, datagrams, segment_len, fields)
    }
}

/// What may be chosen of the IP header of datagrams.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct IpFields {
    /// Explicit congestion notification.
    pub ecn: Ecn,
    /// From which address of this machine; `None`, or one that is not there any more: the kernel
    /// chooses by its routes.
    pub source: Option<IpAddr>,
    /// By which interface, with the best of its own routes and the address that belongs to it; `None`:
    /// the kernel chooses by all of its routes.
    pub link: Option<IfIndex>,
}

/// The two bits of explicit congestion notification in an IP header (RFC 3168 §5).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(u8)]
pub enum Ecn {
    /// The flow knows nothing of it.
    #[default]
    NotCapable = 0b00,
    /// ECT(1).
    Capable1 = 0b01,
    /// ECT(0).
    Capable0 = 0b10,
    /// CE: a router on the way was congested.
    Congested = 0b11,
}

impl Ecn {
    /// The lower two bits of an IPv4 type of service or an IPv6 traffic class.
    #[must_use]
    pub fn of(traffic_class: u8) -> Self {
        match traffic_class & 0b11 {
            0b00 => Self::NotCapable,
            0b01 => Self::Capable1,
            0b10 => Self::Capable0,
            _ => Self::Congested,
        }
    }
}

/// One UDP socket.
#[derive(Debug)]
pub struct UdpBatch {
    socket: UdpSocket,
    /// Cleared for good when the device below refuses `UDP_SEGMENT`.
    segment_offload: AtomicBool,
}

impl UdpBatch {
    /// Binds a socket of the family of `to` to a port that the kernel chooses, with room for little
    /// ([`SPARE_BUFFER_BYTES`]) until [`Self::make_room`].
    ///
    /// # Errors
    ///
    /// What the kernel says: no descriptor or port is left, or the machine does not have this family.
    pub fn spare(to: SocketAddr) -> io::Result<Self> {
        let any = match to {
            SocketAddr::V4(_) => SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0)),
            SocketAddr::V6(_) => SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0)),
        };
        let socket = Self::bind_only(any, false)?;
        let inner = socket2::SockRef::from(&socket.socket);
        inner.set_recv_buffer_size(SPARE_BUFFER_BYTES)?;
        inner.set_send_buffer_size(SPARE_BUFFER_BYTES)?;
        Ok(socket)
    }

    /// Gives the socket buffers for `receive_bytes` and [`SEND_BUFFER_BYTES`].
    ///
    /// # Errors
    ///
    /// What the kernel says; then it goes on with what it had.
    pub fn make_room(&self, receive_bytes: usize) -> io::Result<()> {
        let socket = socket2::SockRef::from(&self.socket);
        // Only CAP_NET_ADMIN may exceed net.core.rmem_max; without it the kernel gives what it may.
        if sockopt::set_socket_recv_buffer_size_force(&self.socket, receive_bytes).is_err() {
            socket.set_recv_buffer_size(receive_bytes)?;
        }
        if sockopt::set_socket_send_buffer_size_force(&self.socket, SEND_BUFFER_BYTES).is_err() {
            socket.set_send_buffer_size(SEND_BUFFER_BYTES)?;
        }
        Ok(())
    }

    /// Waits until there is room to send, at most for `time`.
    pub fn wait_writable(&self, time: Duration) {
        let mut fds = [PollFd::new(&self.socket, PollFlags::OUT)];
        // An interrupted or failed wait is a short one.
        poll(&mut fds, Timespec::try_from(time).ok().as_ref()).ok();
    }

    /// Binds a socket with large buffers, no "don't fragment" bit (as the kernel's WireGuard: a
    /// path that does not carry 1,340 bytes still carries fragments), and receive offload if the
    /// kernel has it.
    ///
    /// # Errors
    ///
    /// What the kernel says of the address.
    fn bind(address: SocketAddr, shared: bool) -> io::Result<Self> {
        let socket = Self::bind_only(address, shared)?;
        socket.make_room(RECEIVE_BUFFER_BYTES)?;
        Ok(socket)
    }

    fn bind_only(address: SocketAddr, shared: bool) -> io::Result<Self> {
        let socket = Socket::new(
            Domain::for_address(address),
            Type::DGRAM,
            Some(Protocol::UDP),
        )?;
        socket.set_reuse_port(shared)?;
        if address.is_ipv6() {
            socket.set_only_v6(true)?;
            socket.set_recv_tclass_v6(true)?;
            switch_on(&socket, libc::IPPROTO_IPV6, libc::IPV6_RECVPKTINFO)?;
            sockopt::set_ipv6_mtu_discover(&socket, Ipv6PathMtuDiscovery::DONT)?;
        } else {
            socket.set_recv_tos_v4(true)?;
            switch_on(&socket, libc::IPPROTO_IP, libc::IP_PKTINFO)?;
            sockopt::set_ip_mtu_discover(&socket, Ipv4PathMtuDiscovery::DONT)?;
        }
        socket.set_nonblocking(true)?;
        socket.bind(&SockAddr::from(address))?;
        // A kernel before 5.0 hands over one datagram at a time; nothing else changes.
        switch_on(&socket, libc::SOL_UDP, libc::UDP_GRO).ok();
        Ok(Self {
            socket: socket.into(),
            segment_offload: AtomicBool::new(true),
        })
    }

    /// Where the socket is bound.
    ///
    /// # Errors
    ///
    /// What the kernel says.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.socket.local_addr()
    }

    /// Sends the datagrams that stand one behind the other in `datagrams`, each of `segment_len`
    /// bytes except that the last may be shorter. At most [`SEGMENTS_MAX`] and
    /// [`SEND_BYTES_MAX`] go out in one call.
    ///
    /// # Errors
    ///
    /// `WouldBlock` if there was no room; what the kernel says of the address. Some of the
    /// datagrams may have been sent.
    pub fn send(
        &self,
        to: SocketAddr,
        datagrams: &[u8],
        segment_len: usize,
        fields: IpFields,
    ) -> io::Result<()> {
        let sent = self.send_from(to, datagrams, segment_len, fields);
        match &sent {
            // The address has left this machine, or never was its.
            Err(error)
                if fields.source.is_some()
                    && matches!(
                        error.raw_os_error(),
                        Some(libc::EINVAL | libc::EADDRNOTAVAIL | libc::ENETUNREACH)
                    ) =>
            {
                let source = None;
                self.send_from(to, datagrams, segment_len, IpFields { source, ..fields })
            }
            _ => sent,
        }
    }

    fn send_from(
        &self,
        to: SocketAddr,
        datagrams: &[u8],
        segment_len: usize,
        fields: IpFields,
    ) -> io::Result<()> {
        if segment_len == 0 || datagrams.len() <= segment_len {
            return self.send_message(to, datagrams, None, fields);
        }
        if let (true, Ok(size)) = (
            self.segment_offload.load(Ordering::Relaxed),
            u16::try_from(segment_len),
        ) {
            match self.send_message(to, datagrams, Some(size), fields) {
                // The device below cannot do checksums (udp(7), UDP_SEGMENT): it never will.
                Err(error) if error.raw_os_error() == Some(libc::EIO) => {
                    self.segment_offload.store(false, Ordering::Relaxed);
                }
                // This path's MTU is smaller than a datagram: send them alone, to be fragmented.
                Err(error)
                    if matches!(error.raw_os_error(), Some(libc::EMSGSIZE | libc::EINVAL)) => {}
                result => return result,
            }
        }
        let each = datagrams.chunks(segment_len);
        each.map(|datagram| self.send_message(to, datagram, None, fields))
            .fold(Ok(()), Result::and)
    }

    #[expect(unsafe_code, reason = "std has no sendmsg with control messages")]
    fn send_message(
        &self,
        to: SocketAddr,
        bytes: &[u8],
        segment: Option<u16>,
        fields: IpFields,
    ) -> io::Result<()> {
        let IpFields { ecn, source, link } = fields;
        if segment.is_none() && fields == IpFields::default() {
            return self.socket.send_to(bytes, to).map(drop);
        }
        let class = if to.is_ipv6() {
            (libc::IPPROTO_IPV6, libc::IPV6_TCLASS)
        } else {
            (libc::IPPROTO_IP, libc::IP_TOS)
        };
        let to_v4 = to.is_ipv4();
        let to = SockAddr::from(to);
        let mut vector = libc::iovec {
            iov_base: bytes.as_ptr().cast_mut().cast(),
            iov_len: bytes.len(),
        };
        let mut control = ControlBuffer([0; CONTROL_LEN]);
        // SAFETY: `msghdr` is plain data for which all zeros is a value.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_name = to.as_ptr().cast_mut().cast();
        message.msg_namelen = to.len();
        message.msg_iov = &raw mut vector;
        message.msg_iovlen = 1;
        message.msg_control = control.0.as_mut_ptr().cast();
        let mut used = 0;
        if let Some(segment) = segment {
            used += control.put(
                used,
                libc::SOL_UDP,
                libc::UDP_SEGMENT,
                &segment.to_ne_bytes(),
            );
        }
        if ecn != Ecn::NotCapable {
            let value = libc::c_int::from(ecn as u8).to_ne_bytes();
            used += control.put(used, class.0, class.1, &value);
        }
        let source = source.filter(|ip| ip.is_ipv4() == to_v4);
        if source.is_some() || link.is_some() {
            used += control.put_end(used, to_v4, source, link);
        }
        message.msg_controllen = used as _;
        loop {
            // SAFETY: address, vector and control buffer are alive and of the lengths stated; the
            // kernel only reads them.
            let sent = unsafe { libc::sendmsg(self.socket.as_raw_fd(), &raw const message, 0) };
            if sent >= 0 {
                return Ok(());
            }
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
        }
    }

    /// Fills `batch` with what has arrived, without waiting; the number of messages.
    ///
    /// # Errors
    ///
    /// `WouldBlock` if nothing has arrived; what the kernel says otherwise.
    #[expect(unsafe_code, reason = "std has no recvmmsg")]
    pub fn receive(&self, batch: &mut ReceiveBatch) -> io::Result<usize> {
        batch.filled = 0;
        let mut vectors: [libc::iovec; RECEIVE_MESSAGES] =
            // SAFETY: an `iovec` of zeros is an empty buffer.
            unsafe { std::mem::zeroed() };
        let mut messages: [libc::mmsghdr; RECEIVE_MESSAGES] =
            // SAFETY: `mmsghdr` is plain data for which all zeros is a value.
            unsafe { std::mem::zeroed() };
        let controls = batch.controls.iter_mut();
        let names = batch.names.iter_mut();
        let buffers = batch.bytes.chunks_exact_mut(MESSAGE_BYTES);
        for ((((message, vector), control), name), buffer) in messages
            .iter_mut()
            .zip(&mut vectors)
            .zip(controls)
            .zip(names)
            .zip(buffers)
        {
            vector.iov_base = buffer.as_mut_ptr().cast();
            vector.iov_len = buffer.len();
            message.msg_hdr.msg_name = (&raw mut *name).cast();
            message.msg_hdr.msg_namelen = name.size_of();
            message.msg_hdr.msg_iov = &raw mut *vector;
            message.msg_hdr.msg_iovlen = 1;
            message.msg_hdr.msg_control = control.0.as_mut_ptr().cast();
            message.msg_hdr.msg_controllen = CONTROL_LEN as _;
        }
        // SAFETY: each of the RECEIVE_MESSAGES entries points at its own live name, vector, buffer
        // and control buffer of the lengths stated.
        let count = unsafe {
            libc::recvmmsg(
                self.socket.as_raw_fd(),
                messages.as_mut_ptr(),
                MESSAGE_COUNT,
                libc::MSG_DONTWAIT,
                std::ptr::null_mut(),
            )
        };
        let count = usize::try_from(count).map_err(|_| io::Error::last_os_error())?;
        for (message, meta) in messages.iter().zip(&mut batch.metas).take(count) {
            let len = (message.msg_len as usize).min(MESSAGE_BYTES);
            let control = received_control(&message.msg_hdr);
            *meta = Meta {
                len,
                segment_len: control.segment_len.unwrap_or(len),
                ecn: control.ecn,
                to: control.to,
                name_len: message.msg_hdr.msg_namelen,
            };
        }
        batch.filled = count;
        Ok(count)
    }
}

impl AsFd for UdpBatch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Room for one [`UdpBatch::receive`], made once and used again and again.
pub struct ReceiveBatch {
    bytes: Vec<u8>,
    names: Vec<SockAddrStorage>,
    controls: Vec<ControlBuffer>,
    metas: [Meta; RECEIVE_MESSAGES],
    filled: usize,
}

/// Room for each message: the largest UDP payload, glued or not.
const MESSAGE_BYTES: usize = 1 << 16;

#[derive(Clone, Copy, Default)]
struct Meta {
    len: usize,
    segment_len: usize,
    ecn: Ecn,
    to: Option<LocalEnd>,
    name_len: libc::socklen_t,
}

impl ReceiveBatch {
    /// Takes the memory: [`RECEIVE_MESSAGES`] times 64 KiB.
    #[must_use]
    pub fn new() -> Self {
        Self {
            bytes: vec![0; RECEIVE_MESSAGES * MESSAGE_BYTES],
            names: (0..RECEIVE_MESSAGES)
                .map(|_| SockAddrStorage::zeroed())
                .collect(),
            controls: (0..RECEIVE_MESSAGES)
                .map(|_| ControlBuffer([0; CONTROL_LEN]))
                .collect(),
            metas: [Meta::default(); RECEIVE_MESSAGES],
            filled: 0,
        }
    }

    /// The messages of the last receive.
    pub fn messages(&mut self) -> impl Iterator<Item = Message<'_>> {
        let buffers = self.bytes.chunks_exact_mut(MESSAGE_BYTES);
        buffers
            .zip(&self.names)
            .zip(&self.metas)
            .take(self.filled)
            .filter_map(|((buffer, name), meta)| {
                Some(Message {
                    from: sender(name, meta.name_len)?,
                    to: meta.to,
                    bytes: buffer.get_mut(..meta.len)?,
                    segment_len: meta.segment_len.max(1),
                    ecn: meta.ecn,
                })
            })
    }
}

/// This machine's end of a way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LocalEnd {
    /// Its address.
    pub address: IpAddr,
    /// By which of its interfaces packets come.
    pub link: Option<IfIndex>,
}

/// Datagrams of one sender that arrived together.
#[derive(Debug)]
pub struct Message<'a> {
    /// Who sent them.
    pub from: SocketAddr,
    /// To where on this machine; `None` if the kernel did not say, or the address is link-local.
    pub to: Option<LocalEnd>,
    /// Their bytes, one behind the other.
    pub bytes: &'a mut [u8],
    /// The length of each; the last may be shorter.
    pub segment_len: usize,
    /// What their IP headers say of congestion.
    pub ecn: Ecn,
}

impl Default for ReceiveBatch {
    fn default() -> Self {
        Self::new()
    }
}

impl std::fmt::Debug for ReceiveBatch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ReceiveBatch")
            .field("filled", &self.filled)
            .finish_non_exhaustive()
    }
}

/// Room for two control messages of an `int` or smaller each and one of 20 bytes, on all Linux
/// architectures: 24 + 24 + 40 bytes with 64-bit headers.
const CONTROL_LEN: usize = 96;

const IN_PKTINFO_LEN: usize = 12;
const _: () = assert!(size_of::<libc::in_pktinfo>() == IN_PKTINFO_LEN);
const IN6_PKTINFO_LEN: usize = 20;
const _: () = assert!(size_of::<libc::in6_pktinfo>() == IN6_PKTINFO_LEN);

const INT_LEN: libc::socklen_t = 4;
const _: () = assert!(size_of::<libc::c_int>() == 4);

const MESSAGE_COUNT: libc::c_uint = 8;
const _: () = assert!(MESSAGE_COUNT as usize == RECEIVE_MESSAGES);

/// Aligned as `cmsghdr` must be: its largest field is a `size_t`.
#[repr(align(8))]
struct ControlBuffer([u8; CONTROL_LEN]);

const _: () = assert!(align_of::<ControlBuffer>() >= align_of::<libc::cmsghdr>());

impl ControlBuffer {
    /// Writes a control message at `at`, where the one before it ended; its length with padding.
    #[expect(unsafe_code, reason = "the C macros are unsafe functions in libc")]
    fn put(&mut self, at: usize, level: libc::c_int, kind: libc::c_int, data: &[u8]) -> usize {
        let data_len = libc::c_uint::try_from(data.len()).unwrap_or(0);
        // SAFETY: pure arithmetic.
        let (len, space) = unsafe { (libc::CMSG_LEN(data_len), libc::CMSG_SPACE(data_len)) };
        let (len, space) = (len as usize, space as usize);
        let Some(room) = self.0.get_mut(at..at + space) else {
            return 0;
        };
        // SAFETY: `cmsghdr` is plain data for which all zeros is a value.
        let mut header: libc::cmsghdr = unsafe { std::mem::zeroed() };
        header.cmsg_len = len as _;
        header.cmsg_level = level;
        header.cmsg_type = kind;
        // SAFETY: `room` has `CMSG_SPACE` bytes, more than a header.
        unsafe {
            room.as_mut_ptr()
                .cast::<libc::cmsghdr>()
                .write_unaligned(header)
        };
        if let Some(place) = room.get_mut(len - data.len()..len) {
            place.copy_from_slice(data);
        }
        space
    }
}

impl ControlBuffer {
    /// Writes this machine's end of the way; what is `None` the kernel chooses.
    fn put_end(
        &mut self,
        at: usize,
        v4: bool,
        source: Option<IpAddr>,
        link: Option<IfIndex>,
    ) -> usize {
        let link = link.map_or(0, IfIndex::get).to_ne_bytes();
        if v4 {
            // `struct in_pktinfo` (ip(7)): interface, source, and a field that is not read.
            let mut info = [0; IN_PKTINFO_LEN];
            let (head, tail) = info.split_at_mut(4);
            head.copy_from_slice(&link);
            if let (Some(IpAddr::V4(ip)), Some(place)) = (source, tail.first_chunk_mut()) {
                *place = ip.octets();
            }
            self.put(at, libc::IPPROTO_IP, libc::IP_PKTINFO, &info)
        } else {
            // `struct in6_pktinfo` (RFC 3542 §6.2): source and interface.
            let mut info = [0; IN6_PKTINFO_LEN];
            let (head, tail) = info.split_at_mut(16);
            if let Some(IpAddr::V6(ip)) = source {
                head.copy_from_slice(&ip.octets());
            }
            tail.copy_from_slice(&link);
            self.put(at, libc::IPPROTO_IPV6, libc::IPV6_PKTINFO, &info)
        }
    }
}

/// What the kernel says beside a datagram.
#[derive(Default)]
struct Control {
    segment_len: Option<usize>,
    ecn: Ecn,
    to: Option<LocalEnd>,
}

#[expect(unsafe_code, reason = "control messages are a chain of C structures")]
fn received_control(message: &libc::msghdr) -> Control {
    let mut control = Control::default();
    // SAFETY: the kernel filled the control buffer of `message` and set its length.
    let mut header = unsafe { libc::CMSG_FIRSTHDR(message) };
    while !header.is_null() {
        // SAFETY: not null, so it is a whole header inside the control buffer.
        let (level, kind) = unsafe { ((*header).cmsg_level, (*header).cmsg_type) };
        // SAFETY: as above; only the address is computed.
        let data = unsafe { libc::CMSG_DATA(header) };
        match (level, kind) {
            (libc::SOL_UDP, libc::UDP_GRO) => {
                // SAFETY: the kernel puts an `int` behind a header of this type (udp(7), UDP_GRO).
                let size = unsafe { data.cast::<libc::c_int>().read_unaligned() };
                control.segment_len = usize::try_from(size).ok();
            }
            (libc::IPPROTO_IP, libc::IP_TOS) => {
                // SAFETY: the kernel puts one byte behind a header of this type (ip(7), IP_RECVTOS).
                control.ecn = Ecn::of(unsafe { data.read() });
            }
            (libc::IPPROTO_IPV6, libc::IPV6_TCLASS) => {
                // SAFETY: the kernel puts an `int` behind a header of this type (RFC 3542 §6.5).
                let class = unsafe { data.cast::<libc::c_int>().read_unaligned() };
                let [.., low] = class.to_be_bytes();
                control.ecn = Ecn::of(low);
            }
            (libc::IPPROTO_IP, libc::IP_PKTINFO) => {
                // SAFETY: the kernel puts an `in_pktinfo` behind a header of this type (ip(7)).
                let info = unsafe { data.cast::<libc::in_pktinfo>().read_unaligned() };
                let ip = Ipv4Addr::from(info.ipi_spec_dst.s_addr.to_ne_bytes());
                control.to = Some(LocalEnd {
                    address: ip.into(),
                    link: info.ipi_ifindex.try_into().ok().and_then(IfIndex::new),
                });
            }
            (libc::IPPROTO_IPV6, libc::IPV6_PKTINFO) => {
                // SAFETY: the kernel puts an `in6_pktinfo` behind a header of this type (RFC 3542 §6.2).
                let info = unsafe { data.cast::<libc::in6_pktinfo>().read_unaligned() };
                let ip = Ipv6Addr::from(info.ipi6_addr.s6_addr);
                // A link-local one would need its interface, too; the kernel finds it by the target.
                control.to = (!ip.is_unicast_link_local()).then(|| LocalEnd {
                    address: ip.into(),
                    link: IfIndex::new(info.ipi6_ifindex),
                });
            }
            _ => {}
        }
        // SAFETY: `header` is a header of this message.
        header = unsafe { libc::CMSG_NXTHDR(message, header) };
    }
    control
}

#[expect(unsafe_code, reason = "socket2 cannot know what the kernel filled in")]
fn sender(name: &SockAddrStorage, len: libc::socklen_t) -> Option<SocketAddr> {
    // SAFETY: a copy of plain bytes, zeroed at first and since written only by the kernel.
    let name = unsafe { std::ptr::read(name) };
    // SAFETY: the kernel wrote an address of `len` bytes.
    unsafe { SockAddr::new(name, len) }.as_socket()
}

#[expect(
    unsafe_code,
    reason = "no safe wrapper of these options is in the tree"
)]
fn switch_on(socket: &Socket, level: libc::c_int, option: libc::c_int) -> io::Result<()> {
    let on: libc::c_int = 1;
    // SAFETY: the option is an `int`, which outlives the call.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            option,
            (&raw const on).cast(),
            INT_LEN,
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
