//! `capture`: packets inside the tunnel and the tunnel's own outside, in one pcapng file
//! (draft-ietf-opsawg-pcapng) with an interface for each.
//!
//! Outside is UDP of the agent's port, as it leaves and comes: ciphertext. The file has no keys, and what is inside is plain text:
//! its mode is 0600.

use std::{
    borrow::Cow,
    fs::{File, OpenOptions},
    io::{self, BufWriter, Write},
    os::unix::fs::OpenOptionsExt as _,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use etherparse::{PacketHeaders, TransportHeader};
use pcap_file::{
    DataLink, PcapError,
    pcapng::{
        PcapNgWriter,
        blocks::{
            enhanced_packet::EnhancedPacketBlock,
            interface_description::{InterfaceDescriptionBlock, InterfaceDescriptionOption},
        },
    },
};
use serde::Serialize;
use tokio::{signal, task};

use crate::{
    cli,
    connect::Agent,
    failure::Failure,
    run::{self, Screen},
    show::Report,
    sniff::{Packet, Sniffer, index},
    table::bytes,
};

/// The interfaces of the file, by their number in it.
const INSIDE: u32 = 0;
const OUTSIDE: u32 = 1;

/// Times are in units of 10^-9 s (`if_tsresol`).
const NANOSECONDS: u8 = 9;

/// What a packet costs in the file beyond its bytes: the block's fields and padding, at most.
const BLOCK_BYTES: u64 = 32 + 3;

/// `capture`.
#[derive(Debug, Serialize)]
pub(crate) struct Captured {
    pub(crate) file: String,
    /// Interface 0 of the file: the tunnel's.
    pub(crate) inside_packets: u64,
    /// Interface 1: UDP of the agent's port at all others.
    pub(crate) outside_packets: u64,
    /// Of packets, with the file's own.
    pub(crate) bytes: u64,
    /// `time`, `packets`, `bytes` or `interrupt`.
    pub(crate) ended_by: &'static str,
}

/// What is written, and when that is enough.
#[derive(Debug, Clone, Copy)]
struct Wanted {
    tunnel: u32,
    port: u16,
    inside: bool,
    outside: bool,
    time: Duration,
    packets: u64,
    bytes: u64,
}

pub(crate) async fn capture(
    agent: Agent<'_>,
    arguments: &cli::Capture,
    screen: Screen,
) -> Result<Captured, Failure> {
    let status = run::status(agent).await?;
    let cannot = |error: io::Error| {
        Failure::Failed(format!(
            "packets cannot be looked at (CAP_NET_RAW is needed): {error}"
        ))
    };
    let port = status.local_addresses.iter().find_map(|address| {
        let (_, port) = address.rsplit_once(':')?;
        port.parse().ok()
    });
    let wanted = Wanted {
        tunnel: index(&status.interface).map_err(cannot)?,
        port: port.ok_or_else(|| Failure::Failed("the agent has no address outside".to_owned()))?,
        inside: !arguments.outside,
        outside: !arguments.inside,
        time: arguments.time,
        packets: arguments.packets,
        bytes: arguments.mebibytes << 20,
    };
    let sniffer = Sniffer::open().map_err(cannot)?;
    let path = arguments.out.display().to_string();
    let wrong = |error: String| Failure::File(format!("cannot write {path}: {error}"));
    let file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&arguments.out)
        .map_err(|error| Failure::writing(&arguments.out, &error))?;
    screen.note(&format!(
        "capturing for {:?}, {} packets or {} at most; ^C ends it",
        wanted.time,
        wanted.packets,
        bytes(wanted.bytes)
    ));
    let stop = Arc::new(AtomicBool::new(false));
    let stopped = Arc::clone(&stop);
    let interface = status.interface;
    let mut work = task::spawn_blocking(move || {
        let file = Writer::new(BufWriter::new(file), &interface)?;
        run_until(sniffer, file, wanted, &stopped)
    });
    let done = tokio::select! {
        done = &mut work => done,
        _ = signal::ctrl_c() => {
            stop.store(true, Ordering::Relaxed);
            work.await
        }
    };
    let done = done.map_err(|error| wrong(error.to_string()))?;
    let (counted, ended_by) = done.map_err(|error| wrong(error.to_string()))?;
    Ok(Captured {
        file: path,
        inside_packets: counted.inside,
        outside_packets: counted.outside,
        bytes: counted.bytes,
        ended_by,
    })
}

fn run_until(
    mut sniffer: Sniffer,
    mut file: Writer<BufWriter<File>>,
    wanted: Wanted,
    stop: &AtomicBool,
) -> Result<(Counted, &'static str), PcapError> {
    /// So soon is an interrupt noticed.
    const TURN: Duration = Duration::from_millis(200);
    let until = Instant::now() + wanted.time;
    let ended_by = loop {
        if stop.load(Ordering::Relaxed) {
            break "interrupt";
        }
        if Instant::now() >= until {
            break "time";
        }
        let turn = until.min(Instant::now() + TURN);
        let Some(packet) = sniffer.next(turn).map_err(PcapError::IoError)? else {
            continue;
        };
        let Some(place) = place(&packet, &wanted) else {
            continue;
        };
        let size = u64::try_from(packet.bytes.len()).unwrap_or(u64::MAX);
        if file.counted.bytes + size + BLOCK_BYTES > wanted.bytes {
            break "bytes";
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        file.write(place, now.unwrap_or_default(), packet.bytes)?;
        if file.counted.inside + file.counted.outside >= wanted.packets {
            break "packets";
        }
    };
    Ok((file.finish()?, ended_by))
}

/// On which interface of the file a packet is, if at all.
fn place(packet: &Packet<'_>, wanted: &Wanted) -> Option<u32> {
    if packet.interface == wanted.tunnel {
        return wanted.inside.then_some(INSIDE);
    }
    let outside = wanted.outside && is_udp_of(packet.bytes, wanted.port);
    outside.then_some(OUTSIDE)
}

fn is_udp_of(packet: &[u8], port: u16) -> bool {
    let headers = PacketHeaders::from_ip_slice(packet);
    match headers.map(|headers| headers.transport) {
        Ok(Some(TransportHeader::Udp(udp))) => {
            [udp.source_port, udp.destination_port].contains(&port)
        }
        _ => false,
    }
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct Counted {
    inside: u64,
    outside: u64,
    bytes: u64,
}

struct Writer<W: Write> {
    file: PcapNgWriter<W>,
    counted: Counted,
}

impl<W: Write> Writer<W> {
    fn new(file: W, tunnel: &str) -> Result<Self, PcapError> {
        let mut file = PcapNgWriter::new(file)?;
        let mut bytes = 0;
        for (name, says) in [
            (tunnel, "inside the tunnel"),
            ("outside", "UDP of the tunnel, at all other interfaces"),
        ] {
            bytes += file.write_pcapng_block(InterfaceDescriptionBlock {
                linktype: DataLink::RAW,
                snaplen: 0,
                options: vec![
                    InterfaceDescriptionOption::IfName(Cow::Borrowed(name)),
                    InterfaceDescriptionOption::IfDescription(Cow::Borrowed(says)),
                    InterfaceDescriptionOption::IfTsResol(NANOSECONDS),
                ],
            })?;
        }
        let counted = Counted {
            bytes: u64::try_from(bytes).unwrap_or(u64::MAX),
            ..Counted::default()
        };
        Ok(Self { file, counted })
    }

    fn write(&mut self, place: u32, at: Duration, bytes: &[u8]) -> Result<(), PcapError> {
        let written = self.file.write_pcapng_block(EnhancedPacketBlock {
            interface_id: place,
            timestamp: at,
            original_len: u32::try_from(bytes.len()).unwrap_or(u32::MAX),
            data: Cow::Borrowed(bytes),
            options: Vec::new(),
        })?;
        self.counted.bytes += u64::try_from(written).unwrap_or(u64::MAX);
        match place {
            INSIDE => self.counted.inside += 1,
            _ => self.counted.outside += 1,
        }
        Ok(())
    }

    fn finish(mut self) -> Result<Counted, PcapError> {
        self.file.get_mut().flush().map_err(PcapError::IoError)?;
        Ok(self.counted)
    }
}

impl Report for Captured {
    fn text(&self, _: bool) -> String {
        format!(
            "{}: {} packets inside, {} outside, {}; ended by {}\n",
            self.file,
            self.inside_packets,
            self.outside_packets,
            bytes(self.bytes),
            self.ended_by
        )
    }
}

#[cfg(test)]
mod tests {
    use etherparse::PacketBuilder;
    use pcap_file::pcapng::{Block, PcapNgReader};

    use super::*;

    fn udp(from: u16, to: u16) -> Vec<u8> {
        let mut packet = Vec::new();
        PacketBuilder::ipv4([192, 168, 7, 1], [203, 0, 113, 5], 64)
            .udp(from, to)
            .write(&mut packet, &[4; 40])
            .unwrap();
        packet
    }

    #[test]
    fn outside_only_the_tunnel_s_own_packets_are_taken() {
        let wanted = Wanted {
            tunnel: 7,
            port: 51_820,
            inside: true,
            outside: true,
            time: Duration::ZERO,
            packets: 0,
            bytes: 0,
        };
        let at = |interface, bytes: &[u8], wanted: &Wanted| {
            let packet = Packet { interface, bytes };
            place(&packet, wanted)
        };
        let (own, other) = (udp(51_820, 40_000), udp(53, 5_353));
        assert_eq!(at(7, &other, &wanted), Some(INSIDE));
        assert_eq!(at(2, &own, &wanted), Some(OUTSIDE));
        assert_eq!(at(2, &udp(40_000, 51_820), &wanted), Some(OUTSIDE));
        assert_eq!(at(2, &other, &wanted), None);
        assert_eq!(at(2, &own[..24], &wanted), None);
        let inside = Wanted {
            outside: false,
            ..wanted
        };
        assert_eq!(at(2, &own, &inside), None);
        let outside = Wanted {
            inside: false,
            ..wanted
        };
        assert_eq!(at(7, &other, &outside), None);
    }

    #[test]
    fn it_has_a_stable_form_for_machines() {
        let captured = Captured {
            file: "x.pcapng".to_owned(),
            inside_packets: 3,
            outside_packets: 4,
            bytes: 2_048,
            ended_by: "time",
        };
        let want = serde_json::json!({
            "file": "x.pcapng",
            "inside_packets": 3,
            "outside_packets": 4,
            "bytes": 2_048,
            "ended_by": "time",
        });
        assert_eq!(serde_json::to_value(&captured).unwrap(), want);
    }

    #[test]
    fn the_file_has_two_interfaces_and_each_packet_with_its_time() {
        let mut file = Vec::new();
        let mut writer = Writer::new(&mut file, "holdfast0").unwrap();
        let at = Duration::new(1_795_364_033, 123_456_789);
        writer.write(INSIDE, at, &udp(1, 2)).unwrap();
        writer.write(OUTSIDE, at, &udp(51_820, 2)).unwrap();
        let counted = writer.finish().unwrap();
        assert_eq!((counted.inside, counted.outside), (1, 1));
        // Beside the section's header, of 28 bytes.
        assert_eq!(counted.bytes + 28, file.len() as u64);
        let mut reader = PcapNgReader::new(&file[..]).unwrap();
        let mut packets = Vec::new();
        while let Some(block) = reader.next_block() {
            if let Block::EnhancedPacket(packet) = block.unwrap() {
                packets.push((packet.interface_id, packet.timestamp, packet.data.len()));
            }
        }
        assert_eq!(packets, [(INSIDE, at, 68), (OUTSIDE, at, 68)]);
        let name = |option: &InterfaceDescriptionOption<'_>| {
            let InterfaceDescriptionOption::IfName(name) = option else {
                return None;
            };
            Some(name.to_string())
        };
        let interfaces = reader.interfaces().iter();
        let names = interfaces.map(|one| one.options.iter().find_map(name));
        let names: Vec<_> = names.flatten().collect();
        assert_eq!(names, ["holdfast0", "outside"]);
    }
}
