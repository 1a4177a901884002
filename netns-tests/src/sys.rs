//! The system calls of the lab that have no safe wrapper.

use std::{
    fs::{File, OpenOptions},
    io,
    os::fd::{AsFd, AsRawFd},
    path::Path,
    ptr,
};

use anyhow::{Context, Result, ensure};
use rustix::{
    net::{AddressFamily, SocketType, netdevice, socket},
    thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space, unshare_unsafe},
};

/// Moves the calling thread into a network namespace made by `ip netns add`.
///
/// # Errors
///
/// If there is no such namespace, or the process is not root.
pub(crate) fn enter_netns(name: &str) -> Result<()> {
    let path = Path::new("/run/netns").join(name);
    let file = File::open(&path).with_context(|| format!("open {}", path.display()))?;
    move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network))
        .with_context(|| format!("enter {}", path.display()))
}

/// Gives the calling thread its own mount table.
///
/// # Errors
///
/// If the process is not root.
#[expect(
    unsafe_code,
    reason = "rustix marks unshare unsafe for its CLONE_FILES flag"
)]
pub(crate) fn unshare_mounts() -> io::Result<()> {
    // SAFETY: `NEWNS` leaves the file descriptor table alone; the launcher that calls this has
    // one thread and executes another program next.
    unsafe { unshare_unsafe(UnshareFlags::NEWNS) }.map_err(Into::into)
}

/// Makes a TAP device in the calling thread's network namespace. Without `TUNSETOFFLOAD` the
/// kernel fills in every checksum and cuts every super-packet before we read it.
///
/// # Errors
///
/// If `/dev/net/tun` is not there, or the name is taken or too long.
#[expect(unsafe_code, reason = "TUNSETIFF has no safe wrapper")]
pub(crate) fn open_tap(name: &str) -> Result<File> {
    ensure!(
        name.len() < libc::IFNAMSIZ,
        "interface name {name} is too long"
    );
    let tun = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/net/tun");
    let tun = tun.context("open /dev/net/tun")?;
    rustix::io::ioctl_fionbio(&tun, true).context("make /dev/net/tun non-blocking")?;
    // `struct ifreq`: 16 bytes of name, then a union of 24 that starts with the flags here.
    let mut request = [0_u8; 40];
    for (to, from) in request.iter_mut().zip(name.bytes()) {
        *to = from;
    }
    let flags = u16::try_from(libc::IFF_TAP | libc::IFF_NO_PI)?.to_ne_bytes();
    for (to, from) in request.iter_mut().skip(libc::IFNAMSIZ).zip(flags) {
        *to = from;
    }
    // SAFETY: the descriptor is open, and the kernel copies exactly one `ifreq` (40 bytes) in
    // and out of `request`, which is that long and lives until the call returns.
    let result = unsafe { libc::ioctl(tun.as_raw_fd(), libc::TUNSETIFF, request.as_mut_ptr()) };
    ensure!(
        result == 0,
        "make TAP {name}: {}",
        io::Error::last_os_error()
    );
    Ok(tun)
}

/// Datagrams that [`discard_batch`] takes at once.
const DISCARD_BATCH: usize = 64;

/// Waits for a datagram, and takes it and what else is there, without the payloads. Returns their
/// number.
///
/// # Errors
///
/// [`io::ErrorKind::WouldBlock`] if none came within the socket's read time-out.
#[expect(unsafe_code, reason = "recvmmsg has no safe wrapper")]
pub(crate) fn discard_batch(socket: &impl AsFd) -> io::Result<usize> {
    // No buffers: the kernel drops the payloads (`MSG_TRUNC`), the datagrams count all the same.
    let empty = libc::mmsghdr {
        msg_hdr: libc::msghdr {
            msg_name: ptr::null_mut(),
            msg_namelen: 0,
            msg_iov: ptr::null_mut(),
            msg_iovlen: 0,
            msg_control: ptr::null_mut(),
            msg_controllen: 0,
            msg_flags: 0,
        },
        msg_len: 0,
    };
    let mut messages = [empty; DISCARD_BATCH];
    let length = libc::c_uint::try_from(messages.len()).map_err(io::Error::other)?;
    // SAFETY: the descriptor is open; `messages` is an array of `length` headers that lives until
    // the call returns, each without any buffer, so the kernel writes to the headers alone.
    let taken = unsafe {
        libc::recvmmsg(
            socket.as_fd().as_raw_fd(),
            messages.as_mut_ptr(),
            length,
            libc::MSG_WAITFORONE,
            ptr::null_mut(),
        )
    };
    usize::try_from(taken).map_err(|_| io::Error::last_os_error())
}

/// `BPF_PROG_QUERY`, and where tcx programs are (linux/bpf.h, 6.6).
const PROG_QUERY: libc::c_long = 16;
const TCX_INGRESS: u32 = 46;
const TCX_EGRESS: u32 = 47;

/// `union bpf_attr`, as far as `BPF_PROG_QUERY` of Linux 6.6 goes.
#[repr(C)]
#[derive(Default)]
struct ProgQuery {
    target: u32,
    attach_type: u32,
    flags: [u32; 2],
    ids: u64,
    count: u32,
    zero: u32,
    more: [u64; 4],
}

const _: () = assert!(
    size_of::<ProgQuery>() == 64,
    "padding would reach the kernel"
);

/// How many programs look at the packets of an interface of the thread's network namespace, both
/// directions together. `bpftool` shows these from version 7.3 on.
///
/// # Errors
///
/// If there is no such interface, or the process is not root.
#[expect(unsafe_code, reason = "bpf has no safe wrapper")]
pub(crate) fn tcx_programs(interface: &str) -> io::Result<u32> {
    let any = socket(AddressFamily::INET, SocketType::DGRAM, None)?;
    let index = netdevice::name_to_index(&any, interface)?;
    let mut programs = 0;
    for attach_type in [TCX_INGRESS, TCX_EGRESS] {
        let mut query = ProgQuery {
            target: index,
            attach_type,
            ..ProgQuery::default()
        };
        // SAFETY: the kernel reads and writes the structure alone, whose size is told, for it is
        // given no buffer for the programs' ids.
        let failed = unsafe {
            libc::syscall(
                libc::SYS_bpf,
                PROG_QUERY,
                &raw mut query,
                size_of::<ProgQuery>(),
            )
        };
        if failed != 0 {
            return Err(io::Error::last_os_error());
        }
        programs += query.count;
    }
    Ok(programs)
}
