//! What sockets and interfaces leave to one another: the cutting of many datagrams that one call sent, and checksums.

use std::{
    ffi::c_int,
    io::{self, IoSliceMut},
    mem::MaybeUninit,
    net::{SocketAddr, UdpSocket},
    os::fd::AsRawFd,
    ptr,
};

use libc::{SOL_UDP, UDP_GRO, UDP_SEGMENT, setsockopt};
use rustix::{
    ioctl::{Opcode, Setter, ioctl},
    net::{AddressFamily, RecvAncillaryBuffer, RecvFlags, SocketType, recvmsg, socket},
};

fn set(socket: &UdpSocket, name: c_int, value: usize) {
    let value = c_int::try_from(value).unwrap();
    let length = u32::try_from(size_of_val(&value)).unwrap();
    #[expect(unsafe_code, reason = "neither std nor rustix has these options")]
    // SAFETY: the kernel reads `length` bytes of a value that lives until the call ends.
    let done = unsafe {
        setsockopt(
            socket.as_raw_fd(),
            SOL_UDP,
            name,
            (&raw const value).cast(),
            length,
        )
    };
    assert_eq!(done, 0, "{}", io::Error::last_os_error());
}

/// What one call sends from now on becomes datagrams of so many bytes, the last one of what is left.
pub(crate) fn cut(socket: &UdpSocket, bytes: usize) {
    set(socket, UDP_SEGMENT, bytes);
}

/// From now on one call receives what came together.
pub(crate) fn gather(socket: &UdpSocket) {
    set(socket, UDP_GRO, 1);
}

/// What came together for a socket that asked for it, from whom, and how long each datagram of it is: `None` if it
/// is one alone.
pub(crate) fn gathered(socket: &UdpSocket) -> (Vec<u8>, SocketAddr, Option<usize>) {
    /// A `struct cmsghdr` with an `int` behind it.
    const HEADER: usize = 16;
    #[repr(align(8))]
    struct Control([MaybeUninit<u8>; HEADER + 8]);
    let mut control = Control([MaybeUninit::new(0); HEADER + 8]);
    let mut bytes = vec![0; 1 << 16];
    let mut ancillary = RecvAncillaryBuffer::new(&mut control.0);
    let into = &mut [IoSliceMut::new(&mut bytes)];
    let received = recvmsg(socket, into, &mut ancillary, RecvFlags::empty()).unwrap();
    drop(ancillary);
    bytes.truncate(received.bytes);
    #[expect(unsafe_code, reason = "rustix shows no messages of this kind")]
    // SAFETY: all of it was written above, and what the kernel wrote over it are bytes, too.
    let control = control.0.map(|byte| unsafe { byte.assume_init() });
    let word = |at: usize| c_int::from_ne_bytes(control[at..at + 4].try_into().unwrap());
    let is_there = (word(8), word(12)) == (SOL_UDP, UDP_GRO);
    let each = is_there.then(|| usize::try_from(word(HEADER)).unwrap());
    (bytes, received.address.unwrap().try_into().unwrap(), each)
}

/// As a network card that completes no checksums, and so cuts nothing either: the gateway has to do both before it.
pub(crate) fn without_checksums(interface: &str) {
    #[repr(C)]
    struct Value {
        command: u32,
        value: u32,
    }
    #[repr(C)]
    struct Request {
        name: [u8; 16],
        value: *mut Value,
        rest: [u8; 16],
    }
    const SIOCETHTOOL: Opcode = 0x8946;
    const ETHTOOL_STXCSUM: u32 = 0x17;
    let mut value = Value {
        command: ETHTOOL_STXCSUM,
        value: 0,
    };
    let mut request = Request {
        name: [0; 16],
        value: ptr::from_mut(&mut value),
        rest: [0; 16],
    };
    request.name[..interface.len()].copy_from_slice(interface.as_bytes());
    let any = socket(AddressFamily::INET, SocketType::DGRAM, None).unwrap();
    #[expect(unsafe_code, reason = "rustix has no call for it")]
    // SAFETY: linux/sockios.h: SIOCETHTOOL takes a `struct ifreq`, whose 40 bytes these are, and in it where a
    // `struct ethtool_value` is, which lives until the call ends.
    unsafe { ioctl(&any, Setter::<SIOCETHTOOL, Request>::new(request)) }.unwrap();
}
