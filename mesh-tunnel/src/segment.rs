//! Cuts a super-packet from the kernel into the packets it stands for.

use mesh_linux::tun::VnetHeader;

use crate::checksum::Sum;

/// The kernel handed over a packet that contradicts its own header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Malformed;

pub(crate) const TCP: u8 = 6;
pub(crate) const UDP: u8 = 17;

const TCP_FIN: u8 = 0x01;
const TCP_PSH: u8 = 0x08;
const TCP_CWR: u8 = 0x80;

/// Set in [`VnetHeader::gso_type`] when the first segment carries CWR (`VIRTIO_NET_HDR_GSO_ECN`).
const GSO_ECN: u8 = 0x80;

/// A super-packet, and the packets it stands for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Cut<'a> {
    header: VnetHeader,
    packet: &'a [u8],
    parts: Parts,
}

#[derive(Debug, Clone, Copy)]
enum Parts {
    /// An ordinary packet.
    One,
    /// Packets of up to `payload_len` bytes of payload behind `headers_len` of headers.
    Many {
        protocol: u8,
        headers_len: usize,
        payload_len: usize,
        count: usize,
    },
}

impl<'a> Cut<'a> {
    /// Reads the offload header; checks what it says against the packet.
    pub(crate) fn new(header: VnetHeader, packet: &'a [u8]) -> Result<Self, Malformed> {
        let protocol = match header.gso_type & !GSO_ECN {
            VnetHeader::GSO_NONE => None,
            VnetHeader::GSO_TCPV4 | VnetHeader::GSO_TCPV6 => Some(TCP),
            VnetHeader::GSO_UDP_L4 => Some(UDP),
            _ => return Err(Malformed),
        };
        let parts = match protocol {
            None => Parts::One,
            Some(protocol) => many(protocol, header, packet).ok_or(Malformed)?,
        };
        Ok(Self {
            header,
            packet,
            parts,
        })
    }

    /// The same of what was read from the TUN device, offload header first.
    pub(crate) fn read(raw: &'a [u8]) -> Result<Self, Malformed> {
        let (header, packet) = VnetHeader::split(raw).ok_or(Malformed)?;
        Self::new(header, packet)
    }

    /// The super-packet.
    pub(crate) fn packet(&self) -> &'a [u8] {
        self.packet
    }

    /// How many packets there are.
    pub(crate) fn count(&self) -> usize {
        match self.parts {
            Parts::One => 1,
            Parts::Many { count, .. } => count,
        }
    }

    /// The length of packet `index`; all have the same but the last, which may be shorter.
    pub(crate) fn len(&self, index: usize) -> usize {
        match self.parts {
            Parts::One => self.packet.len(),
            Parts::Many {
                headers_len,
                payload_len,
                ..
            } => {
                let payload = self.packet.len() - headers_len;
                headers_len + payload.saturating_sub(index * payload_len).min(payload_len)
            }
        }
    }

    /// Writes packet `index` to `to`, which has its length, with all lengths and checksums right.
    pub(crate) fn write(&self, index: usize, to: &mut [u8]) -> Result<(), Malformed> {
        match self.parts {
            Parts::One => {
                to.get_mut(..self.packet.len())
                    .ok_or(Malformed)?
                    .copy_from_slice(self.packet);
                if self.header.flags & VnetHeader::NEEDS_CHECKSUM != 0 {
                    complete_checksum(self.header, to).ok_or(Malformed)?;
                }
                Ok(())
            }
            Parts::Many {
                protocol,
                headers_len,
                payload_len,
                count,
            } => self
                .write_segment(protocol, headers_len, payload_len, count, index, to)
                .ok_or(Malformed),
        }
    }

    fn write_segment(
        &self,
        protocol: u8,
        headers_len: usize,
        payload_len: usize,
        count: usize,
        index: usize,
        segment: &mut [u8],
    ) -> Option<()> {
        let transport_at = usize::from(self.header.checksum_start);
        let (headers, payload) = self.packet.split_at_checked(headers_len)?;
        let offset = index * payload_len;
        let (to_headers, to_payload) = segment.split_at_mut_checked(headers_len)?;
        to_headers.copy_from_slice(headers);
        to_payload.copy_from_slice(payload.get(offset..offset + to_payload.len())?);
        fix_ip(segment, transport_at, u16::try_from(index).ok()?)?;
        let (ip, transport) = segment.split_at_mut_checked(transport_at)?;
        if protocol == TCP {
            let offset = u32::try_from(offset).ok()?;
            fix_tcp(transport, offset, index == 0, index + 1 == count)?;
        } else {
            fix_udp(transport)?;
        }
        write_checksum(protocol, ip, transport)
    }
}

fn many(protocol: u8, header: VnetHeader, packet: &[u8]) -> Option<Parts> {
    let transport_at = usize::from(header.checksum_start);
    let headers_len = transport_at + transport_header_len(protocol, packet.get(transport_at..)?)?;
    let payload_len = usize::from(header.gso_size);
    let payload = packet.get(headers_len..)?;
    if payload_len == 0 || payload.is_empty() {
        return None;
    }
    Some(Parts::Many {
        protocol,
        headers_len,
        payload_len,
        count: payload.len().div_ceil(payload_len),
    })
}

/// The checksum field holds the pseudo header's sum; the rest is left to us.
fn complete_checksum(header: VnetHeader, packet: &mut [u8]) -> Option<()> {
    let covered = packet.get_mut(usize::from(header.checksum_start)..)?;
    let checksum = Sum::default().add(covered).checksum();
    let at = usize::from(header.checksum_offset);
    let field = covered.get_mut(at..at + 2)?;
    // Zero means "no checksum" in UDP (RFC 768), whose checksum stands at 6; TCP's stands at 16.
    let zero_in_udp = checksum == [0, 0] && at == UDP_CHECKSUM_AT;
    field.copy_from_slice(if zero_in_udp {
        &[0xff, 0xff]
    } else {
        &checksum
    });
    Some(())
}

pub(crate) const UDP_CHECKSUM_AT: usize = 6;
pub(crate) const TCP_CHECKSUM_AT: usize = 16;

fn transport_header_len(protocol: u8, transport: &[u8]) -> Option<usize> {
    match protocol {
        TCP => {
            let len = usize::from(transport.get(12)? >> 4) * 4;
            (len >= 20).then_some(len)
        }
        _ => Some(8),
    }
}

fn fix_ip(segment: &mut [u8], transport_at: usize, index: u16) -> Option<()> {
    let total = u16::try_from(segment.len()).ok()?;
    match segment.first()? >> 4 {
        4 => {
            let ip = segment.get_mut(..transport_at)?;
            ip.get_mut(2..4)?.copy_from_slice(&total.to_be_bytes());
            let id = ip.get_mut(4..6)?.first_chunk_mut::<2>()?;
            *id = u16::from_be_bytes(*id).wrapping_add(index).to_be_bytes();
            write_ipv4_checksum(ip)
        }
        6 => {
            let payload_len = total.checked_sub(40)?;
            segment
                .get_mut(4..6)?
                .copy_from_slice(&payload_len.to_be_bytes());
            Some(())
        }
        _ => None,
    }
}

/// Fills in the checksum of an IPv4 header, options included.
pub(crate) fn write_ipv4_checksum(header: &mut [u8]) -> Option<()> {
    header.get_mut(10..12)?.fill(0);
    let checksum = Sum::default().add(header).checksum();
    header.get_mut(10..12)?.copy_from_slice(&checksum);
    Some(())
}

fn fix_tcp(tcp: &mut [u8], offset: u32, first: bool, last: bool) -> Option<()> {
    let sequence = tcp.get_mut(4..8)?.first_chunk_mut::<4>()?;
    *sequence = u32::from_be_bytes(*sequence)
        .wrapping_add(offset)
        .to_be_bytes();
    let flags = tcp.get_mut(13)?;
    if !last {
        *flags &= !(TCP_FIN | TCP_PSH);
    }
    if !first {
        *flags &= !TCP_CWR;
    }
    Some(())
}

fn fix_udp(udp: &mut [u8]) -> Option<()> {
    let len = u16::try_from(udp.len()).ok()?;
    udp.get_mut(4..6)?.copy_from_slice(&len.to_be_bytes());
    Some(())
}

fn write_checksum(protocol: u8, ip: &[u8], transport: &mut [u8]) -> Option<()> {
    let at = if protocol == TCP {
        TCP_CHECKSUM_AT
    } else {
        UDP_CHECKSUM_AT
    };
    let len = u16::try_from(transport.len()).ok()?;
    transport.get_mut(at..at + 2)?.fill(0);
    let sum = Sum::default()
        .add_pseudo(addresses(ip)?, protocol, len)
        .add(transport);
    let mut checksum = sum.checksum();
    if checksum == [0, 0] && protocol == UDP {
        checksum = [0xff, 0xff];
    }
    transport.get_mut(at..at + 2)?.copy_from_slice(&checksum);
    Some(())
}

/// Source and destination address, as they stand in the header.
pub(crate) fn addresses(ip: &[u8]) -> Option<&[u8]> {
    match ip.first()? >> 4 {
        4 => ip.get(12..20),
        6 => ip.get(8..40),
        _ => None,
    }
}
