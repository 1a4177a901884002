//! The packet path of a device, made to be as its configuration says.

use std::{
    collections::HashMap,
    net::SocketAddr,
    thread,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, Result};
use mesh_linux::{
    netlink::LinkState,
    tun::Tun,
    udp::{LocalEnd, UdpPair},
};
use mesh_tunnel::{
    route::RouteTable,
    tunnel::{PrivateKey, Tunnel, TunnelConfig, TunnelEvent, Workers},
};
use mesh_wire::id::{NodeId, Via};
use rustix::{
    io::Errno,
    net::{AddressFamily, SocketType, netdevice::name_to_index, socket},
};
use tokio::sync::mpsc;
use zeroize::Zeroizing;

use super::{
    config::{Change, Config, Plan, Refused},
    uapi::{self, Live, Request},
};

/// How far two readings of the time of one handshake may differ: the clock was set, or time
/// passed between asking the kernel twice. Handshakes are 5 s apart (the paper, §6.1).
const SAME_HANDSHAKE: Duration = Duration::from_secs(1);

/// Most packet threads: four fill a link of 10 Gb/s, and the rest of a large machine belongs to
/// its users.
const PACKET_THREADS_MAX: usize = 4;

/// What fits an Ethernet frame: 1,500 − 40 (IPv6) − 8 (UDP) − 32 (WireGuard). The interface has
/// this MTU until somebody says otherwise.
pub(crate) const MTU_BYTES: u16 = 1_420;

/// A device that runs.
pub(crate) struct Running {
    tun: Tun,
    config: Config,
    /// `None` only between two, or when the second could not be made.
    path: Option<PacketPath>,
    meters: HashMap<NodeId, Meter>,
    /// Nobody hears of a device whose interface is down.
    up: bool,
    mtu_bytes: u16,
    broken: mpsc::Sender<String>,
}

struct PacketPath {
    tunnel: Tunnel,
    workers: Workers,
}

impl Running {
    /// Makes the interface, without key or peers. A reason why no packets move any more goes to
    /// `broken`.
    pub(crate) fn start(interface: &str, broken: mpsc::Sender<String>) -> Result<Self> {
        let threads = packet_threads();
        let tun = Tun::create(interface, threads)
            .with_context(|| format!("cannot make the interface {interface}"))?;
        let sockets = UdpPair::bind_many(0, threads).context("cannot bind any UDP port")?;
        let mut config = Config::default();
        config.listen_port = port_of(&sockets);
        let mut running = Self {
            tun,
            config,
            path: None,
            meters: HashMap::new(),
            up: false,
            mtu_bytes: MTU_BYTES,
            broken,
        };
        let path = running.open(sockets, &running.config);
        running.path = Some(path.context("cannot start the packet path")?);
        Ok(running)
    }

    /// Stops all packets.
    pub(crate) fn stop(&mut self) {
        if let Some(path) = self.path.take() {
            path.workers.stop();
        }
    }

    pub(crate) fn tun(&self) -> &Tun {
        &self.tun
    }

    /// Carries out a request of the control socket.
    pub(crate) fn answer(&mut self, request: &[u8]) -> Zeroizing<String> {
        let result = match uapi::parse(request, link_index) {
            Ok(Request::Get) => {
                self.observe();
                let live = self.meters.iter().map(|(id, meter)| (*id, meter.total()));
                return uapi::reply_to_get(&self.config, &live.collect());
            }
            Ok(Request::Set(change)) => self.change(&change),
            Err(refused) => Err(refused),
        };
        if let Err(refused) = &result {
            tracing::warn!(errno = refused.errno.raw_os_error(), "refused: {refused}");
        }
        uapi::reply_to_set(result.map_err(|refused| refused.errno)).into()
    }

    /// See [`Tunnel::sources`].
    pub(crate) fn sources(&self) -> Vec<(NodeId, SocketAddr, LocalEnd)> {
        let path = self.path.as_ref();
        path.map_or_else(Vec::new, |path| path.tunnel.sources())
    }

    /// See [`Tunnel::forget_source`].
    pub(crate) fn forget_source(&self, peer: &NodeId, source: LocalEnd) {
        if let Some(path) = &self.path {
            path.tunnel.forget_source(peer, source);
        }
    }

    /// The mark of the packets that leave; 0: none.
    pub(crate) fn mark(&self) -> u32 {
        self.config.fwmark
    }

    /// Takes note of how the interface is; `None` if that cannot be seen because it was moved
    /// to another network namespace.
    pub(crate) fn set_link(&mut self, link: Option<LinkState>) {
        self.observe();
        let up = link.is_none_or(|link| link.up);
        let (was_up, before) = (self.up, self.mtu_bytes);
        self.up = up;
        self.mtu_bytes = link
            .and_then(|link| u16::try_from(link.mtu_bytes?).ok())
            .unwrap_or(before);
        let Some(PacketPath { tunnel, .. }) = &self.path else {
            return;
        };
        tunnel.set_mtu(self.mtu_bytes);
        match (was_up, up) {
            (false, true) => introduce_all(tunnel, &self.config),
            (true, false) => {
                tunnel.set_routes(RouteTable::default());
                for (id, _) in self.config.peers() {
                    tunnel.remove_external(id);
                }
            }
            (true, true) | (false, false) => {}
        }
    }

    fn change(&mut self, change: &Change) -> Result<(), Refused> {
        self.observe();
        let new = self.config.changed(change)?;
        let plan = Plan::new(&self.config, &new);
        for id in &plan.remove {
            self.meters.remove(id);
        }
        if plan.restart {
            self.restart(&plan, new)?;
        } else {
            self.apply(&plan, new)?;
        }
        // Whoever was described anew may count from zero again.
        self.observe();
        Ok(())
    }

    fn apply(&mut self, plan: &Plan, mut new: Config) -> Result<(), Refused> {
        let gone = || Refused::new(Errno::IO, "there is no packet path any more");
        if plan.port {
            let sockets = self.bind(&new)?;
            new.listen_port = port_of(&sockets);
            let PacketPath { tunnel, workers } = self.path.take().ok_or_else(gone)?;
            let workers = tunnel.rebind(workers, sockets).map_err(|error| {
                // The channel is full only if the program ends already.
                self.broken.try_send(error.to_string()).ok();
                refused("go on at another port".to_owned())(error)
            })?;
            self.path = Some(PacketPath { tunnel, workers });
        }
        let Some(PacketPath { tunnel, .. }) = &self.path else {
            return Err(gone());
        };
        if plan.mark {
            tunnel.set_mark(new.fwmark).map_err(cannot_mark(&new))?;
        }
        for id in &plan.remove {
            tunnel.remove_external(id);
        }
        if self.up {
            for id in &plan.describe {
                introduce(tunnel, &new, id);
            }
            if plan.routes {
                tunnel.set_routes(new.routes());
            }
        }
        self.config = new;
        Ok(())
    }

    /// Begins again with another key. The device stays as it was if a port that it shall have too is
    /// taken.
    fn restart(&mut self, plan: &Plan, mut new: Config) -> Result<(), Refused> {
        // One's own port is free only when the old packet path is gone.
        let early = if plan.port {
            Some(self.bind(&new)?)
        } else {
            None
        };
        self.stop();
        let sockets = early.map_or_else(|| self.bind(&new), Ok);
        let opened = sockets.and_then(|sockets| {
            new.listen_port = port_of(&sockets);
            self.open(sockets, &new)
                .map_err(refused("start the packet path".to_owned()))
        });
        let path = opened.inspect_err(|refused| {
            // The channel is full only if the program ends already.
            self.broken.try_send(refused.to_string()).ok();
        })?;
        self.path = Some(path);
        self.config = new;
        Ok(())
    }

    /// Sockets for a device that is as `config` says.
    fn bind(&self, config: &Config) -> Result<Vec<UdpPair>, Refused> {
        let port = config.listen_port;
        let sockets = UdpPair::bind_many(port, self.tun.queues().len())
            .map_err(refused(format!("bind UDP port {port}")))?;
        if config.fwmark != 0 {
            let mut pairs = sockets.iter();
            let marked = pairs.try_for_each(|pair| pair.set_mark(config.fwmark));
            marked.map_err(cannot_mark(config))?;
        }
        Ok(sockets)
    }

    /// Starts a packet path that is as `config` says.
    fn open(&self, sockets: Vec<UdpPair>, config: &Config) -> std::io::Result<PacketPath> {
        let identity = config.private_key();
        // Without a key the device is nobody, and knows nobody.
        let private_key = identity.map_or_else(rand::random, |key| *key.bytes());
        let settings = TunnelConfig {
            private_key: PrivateKey::new(private_key),
            overlay_v6: std::net::Ipv6Addr::UNSPECIFIED,
            bursts: false,
        };
        let broken = self.broken.clone();
        let (tunnel, workers) = Tunnel::start(self.tun.clone(), sockets, settings, move |event| {
            if let TunnelEvent::Broken(reason) = event {
                broken.try_send(reason).ok(); // One reason is enough.
            }
        })?;
        tunnel.set_mtu(self.mtu_bytes);
        if self.up {
            introduce_all(&tunnel, config);
        }
        Ok(PacketPath { tunnel, workers })
    }

    /// Takes over what the packet path has learnt: where peers are, and how much moved.
    fn observe(&mut self) {
        let Some(PacketPath { tunnel, .. }) = &self.path else {
            return;
        };
        let ids: Vec<_> = self.config.peers().into_iter().map(|(id, _)| *id).collect();
        for id in ids {
            let Some(stats) = tunnel.peer_stats(&id) else {
                continue;
            };
            if let Some(Via::Direct(endpoint)) = stats.primary {
                self.config.note_endpoint(&id, endpoint);
            }
            let since_epoch = SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .unwrap_or_default();
            let seen = Live {
                last_handshake: stats
                    .last_handshake
                    .map_or(Duration::ZERO, |age| since_epoch.saturating_sub(age)),
                sent_bytes: stats.wire_sent_bytes,
                received_bytes: stats.wire_received_bytes,
            };
            self.meters.entry(id).or_default().note(seen);
        }
    }
}

/// Tells a packet path that knows nobody of everybody.
fn introduce_all(tunnel: &Tunnel, config: &Config) {
    for (id, _) in config.peers() {
        introduce(tunnel, config, id);
    }
    tunnel.set_routes(config.routes());
}

/// Describes a peer to the packet path.
fn introduce(tunnel: &Tunnel, config: &Config, id: &NodeId) {
    let Some(peer) = config.partner(id) else {
        return;
    };
    tunnel.add_external(*id, peer.external());
    let has_session = tunnel.peer_stats(id).is_some_and(|stats| stats.has_session);
    if let Some(endpoint) = peer
        .endpoint
        .filter(|_| peer.keepalive_s > 0 && !has_session)
    {
        // Not only when the first interval is over (kernel: `wg_open`, `set_peer`).
        tunnel.handshake(id, &[Via::Direct(endpoint)]);
    }
}

/// Counts of one peer that go on when the packet path begins again.
#[derive(Debug, Default)]
struct Meter {
    /// What the packet paths before this one had counted.
    before: Live,
    now: Live,
}

impl Meter {
    fn note(&mut self, seen: Live) {
        if seen.sent_bytes < self.now.sent_bytes || seen.received_bytes < self.now.received_bytes {
            self.before.sent_bytes += self.now.sent_bytes;
            self.before.received_bytes += self.now.received_bytes;
        }
        let known = self.now.last_handshake;
        let is_known = seen.last_handshake.abs_diff(known) < SAME_HANDSHAKE;
        let last_handshake = if is_known || seen.last_handshake.is_zero() {
            known
        } else {
            seen.last_handshake
        };
        self.now = Live {
            last_handshake,
            ..seen
        };
    }

    fn total(&self) -> Live {
        Live {
            last_handshake: self.now.last_handshake,
            sent_bytes: self.before.sent_bytes + self.now.sent_bytes,
            received_bytes: self.before.received_bytes + self.now.received_bytes,
        }
    }
}

fn cannot_mark(config: &Config) -> impl Fn(std::io::Error) -> Refused {
    refused(format!("mark packets with {}", config.fwmark))
}

fn refused(what: String) -> impl Fn(std::io::Error) -> Refused {
    move |error| {
        let errno = Errno::from_io_error(&error).unwrap_or(Errno::IO);
        Refused::new(errno, format!("cannot {what}: {error}"))
    }
}

/// One for each core, as the agent does.
fn packet_threads() -> usize {
    thread::available_parallelism().map_or(1, |cores| cores.get().min(PACKET_THREADS_MAX))
}

fn port_of(sockets: &[UdpPair]) -> u16 {
    sockets.first().map_or(0, UdpPair::port)
}

/// The index of an interface in the namespace of the UDP sockets.
fn link_index(name: &str) -> Option<u32> {
    let any_socket = socket(AddressFamily::INET, SocketType::DGRAM, None).ok()?;
    name_to_index(any_socket, name).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_go_on_after_a_restart() {
        let at = |seconds, sent_bytes, received_bytes| Live {
            last_handshake: Duration::from_secs(seconds),
            sent_bytes,
            received_bytes,
        };
        let mut meter = Meter::default();
        meter.note(at(0, 148, 0));
        meter.note(at(1_000, 500, 92));
        assert_eq!(meter.total(), at(1_000, 500, 92));
        // A new packet path, which knows of no handshake yet.
        meter.note(at(0, 0, 0));
        assert_eq!(meter.total(), at(1_000, 500, 92));
        meter.note(at(1_200, 148, 92));
        assert_eq!(meter.total(), at(1_200, 648, 184));
        // The same handshake, looked at later.
        let later = Live {
            last_handshake: Duration::from_millis(1_200_040),
            ..at(0, 160, 92)
        };
        meter.note(later);
        assert_eq!(meter.total(), at(1_200, 660, 184));
    }
}
