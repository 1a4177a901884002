//! IP packets of every interface as they pass, by an `AF_PACKET` socket (packet(7)): needs CAP_NET_RAW.

use std::{
    io,
    os::fd::{AsRawFd as _, OwnedFd},
    time::{Duration, Instant},
};

use nix::{
    net::if_::if_nametoindex,
    sys::{
        socket::{
            AddressFamily, LinkAddr, SockFlag, SockProtocol, SockType, recvfrom, setsockopt,
            socket,
            sockopt::{RcvBuf, ReceiveTimeout},
        },
        time::TimeVal,
    },
};

/// Largest IP packet, also one that the kernel has yet to cut up.
const PACKET_BYTES_MAX: usize = u16::MAX as usize;

/// What the kernel holds until it is read: 0.1 s at 300 Mb/s. The kernel drops what comes while it is full.
const HELD_BYTES: usize = 4 << 20;

/// How long one wait lasts: so late is a deadline noticed at most.
const WAIT: Duration = Duration::from_millis(100);

/// `ETH_P_IP` and `ETH_P_IPV6` (linux/if_ether.h).
const IP: [u16; 2] = [0x0800, 0x86dd];

pub(crate) struct Sniffer {
    socket: OwnedFd,
    buffer: Vec<u8>,
}

/// One IP packet, without what its link puts before it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Packet<'a> {
    /// The interface's index.
    pub(crate) interface: u32,
    pub(crate) bytes: &'a [u8],
}

impl Sniffer {
    pub(crate) fn open() -> io::Result<Self> {
        let (kind, all) = (SockType::Datagram, SockProtocol::EthAll);
        let socket = socket(AddressFamily::Packet, kind, SockFlag::SOCK_CLOEXEC, all)?;
        setsockopt(&socket, RcvBuf, &HELD_BYTES)?;
        let wait = TimeVal::new(0, i64::try_from(WAIT.as_micros()).unwrap_or(i64::MAX));
        setsockopt(&socket, ReceiveTimeout, &wait)?;
        Ok(Self {
            socket,
            buffer: vec![0; PACKET_BYTES_MAX],
        })
    }

    /// The next one, if it comes until then.
    pub(crate) fn next(&mut self, until: Instant) -> io::Result<Option<Packet<'_>>> {
        let (count, interface) = loop {
            if Instant::now() >= until {
                return Ok(None);
            }
            match recvfrom::<LinkAddr>(self.socket.as_raw_fd(), &mut self.buffer) {
                Ok((count, Some(from))) if IP.contains(&u16::from_be(from.protocol())) => {
                    break (count, u32::try_from(from.ifindex()).unwrap_or_default());
                }
                Ok(_) | Err(nix::Error::EAGAIN | nix::Error::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
        };
        Ok(Some(Packet {
            interface,
            bytes: self.buffer.get(..count).unwrap_or_default(),
        }))
    }
}

/// The index by which the kernel knows an interface of this name.
pub(crate) fn index(interface: &str) -> io::Result<u32> {
    Ok(if_nametoindex(interface)?)
}
