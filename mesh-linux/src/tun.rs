//! TUN devices that exchange super-packets: each read and write is a [`VnetHeader`] and one IP
//! packet of up to 64 KiB, which the kernel cut late or glued early.

use std::{
    fs::File,
    io::{self, IoSlice},
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd as _, OwnedFd},
    sync::Arc,
};

use crate::IfIndex;

/// Where the kernel offers TUN devices.
pub const DEVICE_PATH: &str = "/dev/net/tun";

/// Longest name of an interface, in bytes (`IFNAMSIZ` minus the NUL).
pub const NAME_LEN_MAX: usize = libc::IFNAMSIZ - 1;

/// Room that any one read needs: the header, and the largest IP packet there is.
pub const READ_LEN_MAX: usize = VnetHeader::LEN + 65_535;

/// A TUN device of this process, shared by its clones. It disappears with the last of them: nothing
/// persists.
#[derive(Debug, Clone)]
pub struct Tun {
    name: String,
    index: IfIndex,
    queues: Arc<[Queue]>,
}

/// Why there is no TUN device.
#[derive(Debug, thiserror::Error)]
pub enum TunError {
    /// The kernel module or the device node is not there.
    #[error(
        "{DEVICE_PATH} is missing: load the `tun` kernel module, or give the container the device"
    )]
    NoDevice,
    /// The process lacks a capability.
    #[error("creating a TUN device needs CAP_NET_ADMIN and access to {DEVICE_PATH}")]
    NoPrivilege,
    /// An interface of this name exists.
    #[error("interface {0:?} exists already: does a second agent run in this network namespace?")]
    NameTaken(String),
    /// Not a name for an interface.
    #[error(
        "{0:?} is not an interface name: 1 to {NAME_LEN_MAX} bytes without `/` and white space"
    )]
    BadName(String),
    /// Something else.
    #[error("cannot {what}")]
    Io {
        /// What was attempted.
        what: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
}

impl Tun {
    /// Creates the device `name` with `queues` queues (at least one), each with segmentation
    /// offload for TCP, and for UDP where the kernel has it (6.2 and later).
    ///
    /// # Errors
    ///
    /// See [`TunError`]; in particular it never joins an existing device.
    pub fn create(name: &str, queues: usize) -> Result<Self, TunError> {
        let valid = (1..=NAME_LEN_MAX).contains(&name.len())
            && name.bytes().all(|c| c.is_ascii_graphic() && c != b'/');
        if !valid || name == "." || name == ".." {
            return Err(TunError::BadName(name.to_owned()));
        }
        let multi = queues > 1;
        let mut opened = vec![Queue::open(name, multi, true)?];
        for _ in 1..queues {
            opened.push(Queue::open(name, multi, false)?);
        }
        let index = index_of(name).map_err(|error| io_error("find the new interface", error))?;
        Ok(Self {
            name: name.to_owned(),
            index,
            queues: opened.into(),
        })
    }

    /// The interface's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The interface's index.
    #[must_use]
    pub fn index(&self) -> IfIndex {
        self.index
    }

    /// Whether the interface is in the network namespace of the calling thread. If it was moved to
    /// another one, [`Self::index`] here is nobody's, or somebody else's.
    ///
    /// # Errors
    ///
    /// `EBADFD` if the interface is gone; what the kernel says otherwise.
    pub fn is_here(&self) -> io::Result<bool> {
        let Some(queue) = self.queues.first() else {
            return Ok(false);
        };
        let there = rustix::fs::fstat(namespace_of(&queue.fd)?)?;
        let here = rustix::fs::stat("/proc/thread-self/ns/net")?;
        Ok((there.st_dev, there.st_ino) == (here.st_dev, here.st_ino))
    }

    /// The device's queues, for one reader each. The kernel keeps a flow on one queue: the one by
    /// which the flow's last packet was written, if there was one.
    #[must_use]
    pub fn queues(&self) -> &[Queue] {
        &self.queues
    }
}

/// One queue of a TUN device. Never blocks: see [`crate::wake::Waiter`].
#[derive(Debug)]
pub struct Queue {
    fd: OwnedFd,
    udp_offload: bool,
}

impl Queue {
    fn open(name: &str, multi_queue: bool, exclusive: bool) -> Result<Self, TunError> {
        let file = File::options().read(true).write(true).open(DEVICE_PATH);
        let file = file.map_err(|error| match error.raw_os_error() {
            Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => TunError::NoDevice,
            Some(libc::EPERM | libc::EACCES) => TunError::NoPrivilege,
            _ => io_error("open /dev/net/tun", error),
        })?;
        let fd = OwnedFd::from(file);
        attach(&fd, name, multi_queue, exclusive).map_err(|error| match error.raw_os_error() {
            Some(libc::EBUSY | libc::EEXIST | libc::EINVAL) => TunError::NameTaken(name.to_owned()),
            Some(libc::EPERM | libc::EACCES) => TunError::NoPrivilege,
            _ => io_error("attach to the TUN device", error),
        })?;
        let tcp = libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO6;
        let udp_offload = set_offload(&fd, tcp | libc::TUN_F_USO4 | libc::TUN_F_USO6).is_ok();
        if !udp_offload {
            set_offload(&fd, tcp).map_err(|error| io_error("switch offloads on", error))?;
        }
        rustix::io::ioctl_fionbio(&fd, true)
            .map_err(|error| io_error("make the TUN device non-blocking", error.into()))?;
        Ok(Self { fd, udp_offload })
    }

    /// Whether the kernel takes UDP super-packets ([`VnetHeader::GSO_UDP_L4`]).
    #[must_use]
    pub fn has_udp_offload(&self) -> bool {
        self.udp_offload
    }

    /// Reads one header and packet into `buffer`, which should have [`READ_LEN_MAX`] bytes.
    ///
    /// # Errors
    ///
    /// `WouldBlock` if there is none; what the kernel says otherwise.
    pub fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        Ok(rustix::io::read(&self.fd, buffer)?)
    }

    /// Hands the kernel one header and packet, which may be in pieces.
    ///
    /// # Errors
    ///
    /// `WouldBlock` or ENOBUFS if the kernel has no room, `EINVAL` for a packet that contradicts its
    /// header, `EIO` while the interface is down.
    pub fn write(&self, packet: &[IoSlice<'_>]) -> io::Result<()> {
        rustix::io::writev(&self.fd, packet)?;
        Ok(())
    }
}

impl AsFd for Queue {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// What stands in front of each packet: `struct virtio_net_hdr` (virtio 1.2 §5.1.6), in the
/// machine's own byte order as TUN wants it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct VnetHeader {
    /// [`Self::NEEDS_CHECKSUM`] or 0.
    pub flags: u8,
    /// One of the `GSO_` numbers.
    pub gso_type: u8,
    /// Bytes of all headers of the packet; the kernel treats it as a hint.
    pub header_len: u16,
    /// Bytes of payload in each segment.
    pub gso_size: u16,
    /// Where the checksummed part of the packet begins.
    pub checksum_start: u16,
    /// Where the checksum stands, counted from `checksum_start`.
    pub checksum_offset: u16,
}

impl VnetHeader {
    /// Bytes of the header.
    pub const LEN: usize = 10;
    /// The transport checksum holds the pseudo header's sum only (`VIRTIO_NET_HDR_F_NEEDS_CSUM`).
    pub const NEEDS_CHECKSUM: u8 = 1;
    /// An ordinary packet.
    pub const GSO_NONE: u8 = 0;
    /// TCP over IPv4, many segments.
    pub const GSO_TCPV4: u8 = 1;
    /// TCP over IPv6, many segments.
    pub const GSO_TCPV6: u8 = 4;
    /// UDP, many datagrams.
    pub const GSO_UDP_L4: u8 = 5;

    /// Reads the header at the front of `bytes`, and what follows it.
    #[must_use]
    pub fn split(bytes: &[u8]) -> Option<(Self, &[u8])> {
        let (header, packet) = bytes.split_first_chunk::<{ Self::LEN }>()?;
        let [flags, gso_type, a, b, c, d, e, f, g, h] = *header;
        let header = Self {
            flags,
            gso_type,
            header_len: u16::from_ne_bytes([a, b]),
            gso_size: u16::from_ne_bytes([c, d]),
            checksum_start: u16::from_ne_bytes([e, f]),
            checksum_offset: u16::from_ne_bytes([g, h]),
        };
        Some((header, packet))
    }

    /// The header as the kernel reads it.
    #[must_use]
    pub fn to_bytes(self) -> [u8; Self::LEN] {
        let [a, b] = self.header_len.to_ne_bytes();
        let [c, d] = self.gso_size.to_ne_bytes();
        let [e, f] = self.checksum_start.to_ne_bytes();
        let [g, h] = self.checksum_offset.to_ne_bytes();
        [self.flags, self.gso_type, a, b, c, d, e, f, g, h]
    }
}

fn index_of(name: &str) -> io::Result<IfIndex> {
    let any_socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::DGRAM, None)?;
    let index = rustix::net::netdevice::name_to_index(&any_socket, name)?;
    IfIndex::new(index).ok_or_else(|| io::ErrorKind::NotFound.into())
}

fn io_error(what: &'static str, source: io::Error) -> TunError {
    TunError::Io { what, source }
}

#[expect(unsafe_code, reason = "no safe wrapper of TUNSETIFF is in the tree")]
fn attach(fd: &OwnedFd, name: &str, multi_queue: bool, exclusive: bool) -> io::Result<()> {
    let mut flags = libc::IFF_TUN | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    if multi_queue {
        flags |= libc::IFF_MULTI_QUEUE;
    }
    if exclusive {
        // Without it the kernel would add us to another agent's multi-queue device.
        flags |= libc::IFF_TUN_EXCL;
    }
    // SAFETY: `ifreq` is plain data for which all zeros is a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    // The flags are 16 bits in a C `short`; the top one is EXCL.
    #[expect(clippy::cast_possible_truncation, reason = "all flags are below 2¹⁶")]
    let flags = flags as libc::c_short;
    request.ifr_ifru.ifru_flags = flags;
    // SAFETY: TUNSETIFF reads and writes one `ifreq`, which outlives the call.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    check(result)
}

#[expect(
    unsafe_code,
    reason = "no safe wrapper of TUNSETOFFLOAD is in the tree"
)]
fn set_offload(fd: &OwnedFd, offloads: libc::c_uint) -> io::Result<()> {
    // SAFETY: TUNSETOFFLOAD takes its argument by value and touches no memory of ours.
    let result = unsafe {
        libc::ioctl(
            fd.as_raw_fd(),
            libc::TUNSETOFFLOAD,
            libc::c_ulong::from(offloads),
        )
    };
    check(result)
}

/// The network namespace in which the interface of a queue is.
#[expect(
    unsafe_code,
    reason = "no safe wrapper of TUNGETDEVNETNS is in the tree"
)]
fn namespace_of(fd: &OwnedFd) -> io::Result<OwnedFd> {
    /// `_IO('T', 227)` of linux/if_tun.h; Linux 5.2 and later.
    const TUNGETDEVNETNS: libc::Ioctl = 0x54e3;
    // SAFETY: TUNGETDEVNETNS takes no argument and touches no memory of ours.
    let namespace = unsafe { libc::ioctl(fd.as_raw_fd(), TUNGETDEVNETNS) };
    check(namespace)?;
    // SAFETY: the kernel has just opened this descriptor for us, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(namespace) })
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
