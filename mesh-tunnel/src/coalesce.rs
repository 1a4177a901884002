//! Glues packets that follow one another in a flow into super-packets, so that the kernel works
//! once for what would have been up to 64 KiB in small pieces.
//!
//! Within a flow the order never changes: a flow has at most one super-packet open, and whatever
//! of that flow cannot join it closes it first. Only packets whose checksums are right are
//! joined, because joining replaces the checksum.

use std::{io::IoSlice, mem};

use arrayvec::ArrayVec;
use mesh_linux::tun::VnetHeader;

use crate::{
    checksum::Sum,
    segment::{self, TCP, TCP_CHECKSUM_AT, UDP, UDP_CHECKSUM_AT},
};

/// Flows that are joined at a time. With more, the one that waits longest is written early.
const SLOTS: usize = 8;

/// Largest IP packet, by the length field of IPv4.
const PACKET_LEN_MAX: usize = 65_535;

/// Most packets in a super-packet: what the kernel allows for UDP (`UDP_MAX_SEGMENTS` until 6.8), and for
/// TCP more than 64 KiB of packets of 1,280 bytes. Eight slots of so many pieces are 8 KiB of a
/// thread's stack.
const SEGMENTS_MAX: usize = 64;

const ACK: u8 = 0x10;
const PSH: u8 = 0x08;
const FIN: u8 = 0x01;

/// Joins the packets of one batch where they lie: nothing is copied, the kernel gathers the pieces.
#[derive(Debug)]
pub(crate) struct Coalescer<'b> {
    slots: ArrayVec<Slot<'b>, SLOTS>,
    /// How many super-packets were begun.
    begun: usize,
    /// Whether the kernel takes UDP super-packets.
    udp: bool,
}

/// A super-packet that grows.
#[derive(Debug)]
struct Slot<'b> {
    /// The first packet with its room for an offload header; its headers become those of all.
    first: &'b mut [u8],
    /// A place for `first`, and the payloads that follow it.
    pieces: ArrayVec<IoSlice<'b>, SEGMENTS_MAX>,
    /// Of the super-packet, without the offload header.
    len: usize,
    shape: Shape,
    next_sequence: u32,
    /// Its place in the order in which they were begun.
    begun: usize,
    open: bool,
}

/// Where the parts of a packet are.
#[derive(Debug, Clone, Copy, Default)]
struct Shape {
    protocol: u8,
    transport_at: usize,
    headers_len: usize,
    payload_len: usize,
}

impl<'b> Coalescer<'b> {
    pub(crate) fn new(udp: bool) -> Self {
        Self {
            slots: ArrayVec::new(),
            begun: 0,
            udp,
        }
    }

    /// Takes a packet with room for an offload header in front. It may be kept; then it is
    /// written by a later call, at the latest by [`Self::flush`]. `write` gets the pieces of a
    /// packet, offload header first.
    pub(crate) fn push(&mut self, framed: &'b mut [u8], write: &mut impl FnMut(&[IoSlice<'_>])) {
        let Some(packet) = framed.get(VnetHeader::LEN..) else {
            return;
        };
        let flow = Shape::of(packet);
        let mergeable = flow.filter(|shape| self.may_begin(shape, packet));
        let is_last = flow.is_some_and(|shape| ends_super_packet(shape, packet));
        match flow {
            // A fragment or the like may belong to any flow.
            None => self.flush(write),
            Some(shape) => {
                let mut slots = self.slots.iter_mut();
                if let Some(slot) = slots.find(|slot| slot.is_flow_of(shape, packet)) {
                    if mergeable.is_some() && slot.may_append(shape, packet) {
                        slot.append(shape, framed);
                        if is_last || slot.is_full(shape) {
                            slot.write_out(write);
                        }
                        return;
                    }
                    slot.write_out(write);
                }
            }
        }
        match mergeable {
            Some(shape) if !is_last => self.begin(shape, framed, write),
            _ => {
                if let Some(room) = framed.first_chunk_mut() {
                    *room = VnetHeader::default().to_bytes();
                }
                write(&[IoSlice::new(framed)]);
            }
        }
    }

    /// Writes everything that is open.
    pub(crate) fn flush(&mut self, write: &mut impl FnMut(&[IoSlice<'_>])) {
        for slot in &mut self.slots {
            slot.write_out(write);
        }
    }

    /// Whether the packet is of a kind that can be part of a super-packet at all.
    fn may_begin(&self, shape: &Shape, packet: &[u8]) -> bool {
        let plain = match shape.protocol {
            TCP => tcp_flags(*shape, packet).is_some_and(|flags| flags & !(PSH | FIN) == ACK),
            _ => self.udp && udp_is_plain(*shape, packet),
        };
        plain && shape.payload_len > 0 && checksums_are_right(*shape, packet)
    }

    fn begin(
        &mut self,
        shape: Shape,
        framed: &'b mut [u8],
        write: &mut impl FnMut(&[IoSlice<'_>]),
    ) {
        self.begun += 1;
        let begun = self.begun;
        if !self.slots.is_full() && self.slots.iter().all(|slot| slot.open) {
            self.slots.push(Slot::new());
        }
        // One that is not open, or else the one that was begun first.
        let slot = self
            .slots
            .iter_mut()
            .min_by_key(|slot| if slot.open { slot.begun } else { 0 });
        if let Some(slot) = slot {
            slot.write_out(write);
            slot.begin(shape, framed, begun);
        }
    }
}

impl<'b> Slot<'b> {
    fn new() -> Self {
        Self {
            first: &mut [],
            pieces: ArrayVec::new(),
            len: 0,
            shape: Shape::default(),
            next_sequence: 0,
            begun: 0,
            open: false,
        }
    }

    fn packet(&self) -> &[u8] {
        self.first.get(VnetHeader::LEN..).unwrap_or_default()
    }

    fn begin(&mut self, shape: Shape, framed: &'b mut [u8], begun: usize) {
        self.first = framed;
        let packet = self.packet();
        let next_sequence = sequence(shape, packet).wrapping_add(len_u32(shape.payload_len));
        self.len = packet.len();
        self.shape = shape;
        self.next_sequence = next_sequence;
        self.pieces.clear();
        self.pieces.push(IoSlice::new(&[]));
        self.begun = begun;
        self.open = true;
    }

    /// Whether the packet is of the flow of this open slot: protocol, addresses and ports.
    fn is_flow_of(&self, shape: Shape, packet: &[u8]) -> bool {
        let own = self.packet();
        self.open
            && self.shape.protocol == shape.protocol
            && self.shape.transport_at == shape.transport_at
            && segment::addresses(own) == segment::addresses(packet)
            && ports(self.shape, own) == ports(shape, packet)
    }

    /// Whether a packet of this flow continues what is there, and all that is said once for a
    /// super-packet is the same in both.
    fn may_append(&self, shape: Shape, packet: &[u8]) -> bool {
        let continues = shape.protocol != TCP || self.next_sequence == sequence(shape, packet);
        continues
            && self.len + shape.payload_len <= PACKET_LEN_MAX
            && shape.payload_len <= self.shape.payload_len
            && same_headers(shape, self.packet(), packet)
    }

    /// Adds the payload of a packet that [`Self::may_append`].
    fn append(&mut self, shape: Shape, framed: &'b [u8]) {
        let packet = framed.get(VnetHeader::LEN..).unwrap_or_default();
        let payload = packet.get(shape.headers_len..).unwrap_or_default();
        self.pieces.push(IoSlice::new(payload));
        self.len += shape.payload_len;
        self.next_sequence = self.next_sequence.wrapping_add(len_u32(shape.payload_len));
        let own = self
            .first
            .get_mut(VnetHeader::LEN + shape.transport_at + 13);
        if let (Some(flags), Some(own)) = (tcp_flags(shape, packet), own) {
            *own |= flags;
        }
    }

    /// Whether nothing can follow the packet that was added last.
    fn is_full(&self, last: Shape) -> bool {
        last.payload_len < self.shape.payload_len || self.pieces.is_full()
    }

    fn write_out(&mut self, write: &mut impl FnMut(&[IoSlice<'_>])) {
        if !mem::take(&mut self.open) {
            return;
        }
        let first = mem::take(&mut self.first);
        let Some((room, headers)) = first.split_first_chunk_mut::<{ VnetHeader::LEN }>() else {
            return;
        };
        let header = match self.pieces.len() {
            1 => Some(VnetHeader::default()),
            _ => finish(self.shape, headers, self.len),
        };
        if let (Some(header), Some(place)) = (header, self.pieces.first_mut()) {
            *room = header.to_bytes();
            *place = IoSlice::new(first);
            write(&self.pieces);
        }
    }
}

impl Shape {
    /// Finds the parts of a TCP or UDP packet without IP options, extension headers or
    /// fragmentation, whose lengths are consistent.
    fn of(packet: &[u8]) -> Option<Self> {
        let len = packet.len();
        let (protocol, transport_at) = match *packet.first()? {
            // Version 4, five words of header.
            0x45 => {
                let total_len = u16::from_be_bytes(*packet.get(2..)?.first_chunk()?);
                let fragment = u16::from_be_bytes(*packet.get(6..)?.first_chunk()?);
                // All but "don't fragment".
                let whole = fragment & 0xbfff == 0 && usize::from(total_len) == len;
                (whole.then_some(*packet.get(9)?)?, 20)
            }
            first if first >> 4 == 6 => {
                let payload_len = u16::from_be_bytes(*packet.get(4..)?.first_chunk()?);
                let whole = usize::from(payload_len) + 40 == len;
                (whole.then_some(*packet.get(6)?)?, 40)
            }
            _ => return None,
        };
        let header_len = match protocol {
            TCP => usize::from(packet.get(transport_at + 12)? >> 4) * 4,
            UDP => 8,
            _ => return None,
        };
        let headers_len = transport_at + header_len;
        let shortest = if protocol == TCP { 20 } else { 8 };
        if header_len < shortest {
            return None;
        }
        Some(Self {
            protocol,
            transport_at,
            headers_len,
            payload_len: len.checked_sub(headers_len)?,
        })
    }
}

fn ports(shape: Shape, packet: &[u8]) -> Option<&[u8]> {
    packet.get(shape.transport_at..shape.transport_at + 4)
}

fn sequence(shape: Shape, packet: &[u8]) -> u32 {
    let bytes = packet
        .get(shape.transport_at + 4..)
        .and_then(<[u8]>::first_chunk);
    bytes.map_or(0, |bytes| u32::from_be_bytes(*bytes))
}

fn tcp_flags(shape: Shape, packet: &[u8]) -> Option<u8> {
    let flags = packet.get(shape.transport_at + 13).copied();
    flags.filter(|_| shape.protocol == TCP)
}

/// Whether nothing may follow the packet in its super-packet: cutting would move the flag.
fn ends_super_packet(shape: Shape, packet: &[u8]) -> bool {
    tcp_flags(shape, packet).is_some_and(|flags| flags & (PSH | FIN) != 0)
}

fn udp_is_plain(shape: Shape, packet: &[u8]) -> bool {
    let udp = packet.get(shape.transport_at..).unwrap_or_default();
    let has_checksum = udp.get(6..8).is_some_and(|checksum| checksum != [0, 0]);
    let len = udp
        .get(4..6)
        .and_then(<[u8]>::first_chunk)
        .copied()
        .map(u16::from_be_bytes);
    has_checksum && len.is_some_and(|len| usize::from(len) == udp.len())
}

fn checksums_are_right(shape: Shape, packet: &[u8]) -> bool {
    let Some((ip, transport)) = packet.split_at_checked(shape.transport_at) else {
        return false;
    };
    let (Some(addresses), Ok(len)) = (segment::addresses(ip), u16::try_from(transport.len()))
    else {
        return false;
    };
    let ip_is_right = shape.transport_at == 40 || Sum::default().add(ip).is_valid();
    let sum = Sum::default()
        .add_pseudo(addresses, shape.protocol, len)
        .add(transport);
    ip_is_right && sum.is_valid()
}

/// Whether two packets of a flow have the same headers but for lengths, checksums, IPv4's
/// identification, TCP's sequence number, and the flags that end a super-packet.
fn same_headers(shape: Shape, one: &[u8], other: &[u8]) -> bool {
    let same = |from: usize, to: usize| {
        one.get(from..to)
            .is_some_and(|part| other.get(from..to) == Some(part))
    };
    let ip = if shape.transport_at == 20 {
        same(0, 2) && same(6, 10)
    } else {
        same(0, 4) && same(6, 8)
    };
    let at = shape.transport_at;
    // Acknowledgement, data offset, window, urgent pointer, options.
    let tcp =
        || same(at + 8, at + 13) && same(at + 14, at + 16) && same(at + 18, shape.headers_len);
    ip && (shape.protocol != TCP || tcp())
}

/// Makes the headers of the first packet those of a super-packet of `len` bytes; the offload header
/// that goes with it.
fn finish(shape: Shape, first: &mut [u8], len: usize) -> Option<VnetHeader> {
    let total_len = u16::try_from(len).ok()?;
    let transport_len = u16::try_from(len.checked_sub(shape.transport_at)?).ok()?;
    let (ip, transport) = first.split_at_mut_checked(shape.transport_at)?;
    let v4 = shape.transport_at == 20;
    if v4 {
        ip.get_mut(2..4)?.copy_from_slice(&total_len.to_be_bytes());
        segment::write_ipv4_checksum(ip)?;
    } else {
        ip.get_mut(4..6)?
            .copy_from_slice(&transport_len.to_be_bytes());
    }
    let (checksum_at, gso_type) = match (shape.protocol, v4) {
        (TCP, true) => (TCP_CHECKSUM_AT, VnetHeader::GSO_TCPV4),
        (TCP, false) => (TCP_CHECKSUM_AT, VnetHeader::GSO_TCPV6),
        _ => (UDP_CHECKSUM_AT, VnetHeader::GSO_UDP_L4),
    };
    if shape.protocol == UDP {
        transport
            .get_mut(4..6)?
            .copy_from_slice(&transport_len.to_be_bytes());
    }
    let pseudo = Sum::default().add_pseudo(segment::addresses(ip)?, shape.protocol, transport_len);
    transport
        .get_mut(checksum_at..checksum_at + 2)?
        .copy_from_slice(&pseudo.partial());
    Some(VnetHeader {
        flags: VnetHeader::NEEDS_CHECKSUM,
        gso_type,
        header_len: u16::try_from(shape.headers_len).ok()?,
        gso_size: u16::try_from(shape.payload_len).ok()?,
        checksum_start: u16::try_from(shape.transport_at).ok()?,
        checksum_offset: u16::try_from(checksum_at).ok()?,
    })
}

/// A payload is shorter than [`PACKET_LEN_MAX`].
fn len_u32(len: usize) -> u32 {
    u32::try_from(len).unwrap_or(u32::MAX)
}

#[cfg(test)]
pub(crate) mod tests;
