//! The network between the nodes: lines and routers of sites, and relays with their connections.

use std::{
    hash::Hash,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use mesh_core::io::{Input, RelayTransport};
use mesh_wire::id::{NodeId, RelayId, Via};
use rand::RngExt;

use super::{EXTRA_PORT, World, queue::Happening};
use crate::{nat::NatSort, session::Packet};

/// A packet's way inside a site, and inside a node.
const LAN_US: u64 = 300;
const LOOPBACK_US: u64 = 50;
/// A connection attempt without an answer is repeated after this (RFC 6298 §2, RFC 9002 §6.2.2).
const CONNECT_RETRY_US: u64 = 1_000_000;

impl World {
    // The internet.

    fn lost(&mut self, site: usize) -> bool {
        let loss = self.sites[site].loss;
        self.sites[site].down || (loss > 0.0 && self.dice.random_bool(loss))
    }

    pub(super) fn send(&mut self, index: usize, peer: NodeId, via: Via, packet: Packet) {
        let to = self.ids[&peer];
        self.count(index, packet.len());
        match via {
            Via::Direct(address) => {
                let sent = &mut self.nodes[index].direct_sent;
                *sent.entry(peer).or_default() += 1;
                self.send_udp(index, address, packet);
            }
            Via::Relay(relay) => self.send_by_relay(index, self.relay_index(relay), to, packet),
        }
    }

    fn send_udp(&mut self, index: usize, to: SocketAddr, packet: Packet) {
        let (site, mut host) = (self.nodes[index].site, self.nodes[index].host);
        if let Some(port) = self.nodes[index].adopted.get(&to) {
            host.set_port(*port);
        }
        if self.refused.contains(&index) {
            let (node, boot) = (index, self.nodes[index].boot);
            let input = Input::Unsendable { address: to };
            return self.push(self.now, Happening::Tell { node, boot, input });
        }
        if let Some(&node) = self.hosts.get(&(site, to)) {
            if self.sites[site].lan_blocked {
                return;
            }
            let via = Via::Direct(host);
            let deliver = Happening::Deliver {
                node,
                from: index,
                via,
                packet,
            };
            return self.push(self.now + LAN_US, deliver);
        }
        let private = matches!(to.ip(), IpAddr::V4(ip) if ip.is_private());
        let other_family = host.is_ipv4() != to.is_ipv4();
        if private
            || other_family
            || self.lost(site)
            || packet.inner_len() > self.sites[site].carries_bytes
        {
            return;
        }
        let Some(source) = self.sites[site].nat.outbound(host, to, self.now) else {
            return;
        };
        let Some(target) = self.site_of(to.ip()) else {
            return;
        };
        let delay = self.sites[site].delay_us + self.sites[target].delay_us;
        let most = 500 + self.sites[site].jitter_us + self.sites[target].jitter_us;
        let copies = self.sites[site].copies.max(self.sites[target].copies);
        let copies = usize::from(copies > 0.0 && self.dice.random_bool(copies));
        for _ in 0..=copies {
            let jitter = self.dice.random_range(0..most);
            let arrive = Happening::Arrive {
                from: index,
                source,
                to,
                packet: packet.clone(),
            };
            self.push(self.now + delay + jitter, arrive);
        }
    }

    fn site_of(&self, ip: IpAddr) -> Option<usize> {
        let index = match ip {
            IpAddr::V4(ip) => match ip.octets() {
                [203, 1, high, low] => u16::from_be_bytes([high, low]),
                _ => return None,
            },
            IpAddr::V6(ip) => match ip.segments() {
                [0x2001, 0xdb8, index, 0, ..] => index,
                _ => return None,
            },
        };
        let here = |site: &usize| self.sites.get(*site).is_some_and(|s| s.nat.reaches(ip));
        Some(usize::from(index)).filter(here)
    }

    pub(super) fn arrive(
        &mut self,
        from: usize,
        source: SocketAddr,
        to: SocketAddr,
        packet: Packet,
    ) {
        let Some(site) = self.site_of(to.ip()) else {
            return;
        };
        let between = [site, self.nodes[from].site];
        let severed = self.severed.contains(&(between[0], between[1]))
            || self.severed.contains(&(between[1], between[0]))
            || self.severed_one_way.contains(&(between[1], between[0]));
        let lossy = self.lossy.get(&(between[1], between[0])).copied();
        let gone = lossy.is_some_and(|loss| self.dice.random_bool(loss));
        let line = self.carries_one_way.get(&(between[1], between[0]));
        let line = line.map_or(u16::MAX, |line| *line);
        let too_large = packet.inner_len() > self.sites[site].carries_bytes.min(line);
        if severed || gone || self.lost(site) || too_large {
            return;
        }
        let Some(inside) = self.sites[site].nat.inbound(source, to, self.now) else {
            return;
        };
        if let Some(&node) = self.hosts.get(&(site, inside)) {
            (self.now, from, node).hash(&mut self.trace);
            if inside.port() >= EXTRA_PORT && matches!(packet, Packet::Sealed { .. }) {
                self.nodes[node].adopted.insert(source, inside.port());
            }
            self.deliver(node, from, Via::Direct(source), packet);
        }
    }

    pub(super) fn ask_reflexive(&mut self, index: usize, id: RelayId, asked: SocketAddr) {
        let relay = self.relay_index(id);
        let (site, host, boot) = {
            let node = &self.nodes[index];
            (node.site, node.host, node.boot)
        };
        let near = self.is_near(index, relay);
        let lost = !near && (self.lost(site) || self.lost(site)) || self.sites[site].lan_blocked;
        if lost || !self.reaches(index, relay) || !self.relay_runs(relay) {
            return;
        }
        let round_trip = 2 * self.line_us(index, relay);
        let observed = match near {
            true => Some(host),
            false => self.sites[site].nat.outbound(host, asked, self.now),
        };
        if let Some(observed) = observed {
            let input = Input::Reflexive {
                relay: id,
                asked,
                observed,
                rtt: Duration::from_micros(round_trip),
            };
            let at = self.now + round_trip;
            self.push(
                at,
                Happening::Tell {
                    node: index,
                    boot,
                    input,
                },
            );
        }
    }

    // Relays.

    /// One way between a site and a relay.
    pub(super) fn line_from(&self, site: usize, relay: usize) -> u64 {
        let far = self.relays[relay].far_us.get(&site);
        let other = self.relays[relay]
            .host
            .map(|(host, _)| self.nodes[host].site);
        let other = other.map(|site| self.sites[site].delay_us);
        self.sites[site].delay_us + far.copied().or(other).unwrap_or_default()
    }

    /// One way between a node and a relay.
    pub(super) fn line_us(&self, node: usize, relay: usize) -> u64 {
        match self.relays[relay].host {
            Some((host, _)) if host == node => LOOPBACK_US,
            Some(_) if self.is_near(node, relay) => LAN_US,
            Some(_) | None => self.line_from(self.nodes[node].site, relay),
        }
    }

    /// Whether a relay is on a node's own LAN.
    fn is_near(&self, node: usize, relay: usize) -> bool {
        let host = self.relays[relay].host;
        host.is_some_and(|(host, _)| self.nodes[host].site == self.nodes[node].site)
    }

    /// Whether there is a line from a node to a relay at all.
    fn reaches(&self, node: usize, relay: usize) -> bool {
        let site = self.nodes[node].site;
        let works = |site: usize| !self.sites[site].down;
        let cut_off = self.cut_off.contains(&(site, relay));
        match self.relays[relay].host {
            None => works(site) && !cut_off,
            Some(_) if self.is_near(node, relay) => true,
            Some((host, public)) => {
                public && works(site) && works(self.nodes[host].site) && !cut_off
            }
        }
    }

    fn relay_runs(&self, relay: usize) -> bool {
        let runs = |(host, _)| self.runs(host) && !self.nodes[host].frozen;
        self.relays[relay].up && self.relays[relay].host.is_none_or(runs)
    }

    /// Whether UDP between a node and a relay is dropped.
    fn udp_is_blocked(&self, node: usize, relay: usize) -> bool {
        let site = &self.sites[self.nodes[node].site];
        let own = self.relays[relay]
            .host
            .is_some_and(|(host, _)| host == node);
        match self.is_near(node, relay) {
            true => site.lan_blocked && !own,
            false => site.nat.sort == NatSort::UdpBlocked,
        }
    }

    pub(super) fn relay_index(&self, id: RelayId) -> usize {
        self.relays.iter().position(|relay| relay.id == id).unwrap()
    }

    pub(super) fn connect(&mut self, node: usize, relay: usize, transport: RelayTransport) {
        let blocked = transport == RelayTransport::Quic && self.udp_is_blocked(node, relay);
        let attempt = (node, relay, transport);
        if !self.attempts.contains(&attempt) {
            return; // Given up meanwhile.
        }
        let host_is_off = self.relays[relay].up && !self.relay_runs(relay);
        if blocked || host_is_off || !self.reaches(node, relay) {
            // Both TCP and QUIC ask again; the core's own patience ends it.
            let boot = self.nodes[node].boot;
            let again = Happening::Connect {
                node,
                boot,
                relay,
                transport,
            };
            return self.push(self.now + CONNECT_RETRY_US, again);
        }
        self.attempts.remove(&attempt);
        let id = self.relays[relay].id;
        if !self.relay_runs(relay) {
            let reason = "connection refused".to_owned();
            return self.input(
                node,
                Input::RelayLost {
                    relay: id,
                    transport,
                    reason,
                },
            );
        }
        let first = !self.relays[relay].clients.contains_key(&node);
        self.relays[relay]
            .clients
            .entry(node)
            .or_default()
            .insert(transport);
        self.relays[relay].using.entry(node).or_insert(transport);
        self.input(
            node,
            Input::RelayConnected {
                relay: id,
                transport,
            },
        );
        if first {
            self.tell_presence(relay, node, true);
        }
    }

    /// A client's connections are gone; `reason`: it notices.
    pub(super) fn disconnect(&mut self, relay: usize, node: usize, reason: Option<&str>) {
        let id = self.relays[relay].id;
        let Some(legs) = self.relays[relay].clients.remove(&node) else {
            return;
        };
        self.relays[relay].using.remove(&node);
        for transport in legs {
            if let Some(reason) = reason {
                let reason = reason.to_owned();
                self.input(
                    node,
                    Input::RelayLost {
                        relay: id,
                        transport,
                        reason,
                    },
                );
            }
        }
        self.tell_presence(relay, node, false);
    }

    pub(super) fn drop_leg(&mut self, relay: usize, node: usize, transport: RelayTransport) {
        let Some(legs) = self.relays[relay].clients.get_mut(&node) else {
            return;
        };
        if !legs.remove(&transport) {
            return;
        }
        match legs.first().copied() {
            Some(other) => {
                self.relays[relay].using.insert(node, other);
            }
            None => {
                self.relays[relay].clients.remove(&node);
                self.relays[relay].using.remove(&node);
                self.tell_presence(relay, node, false);
            }
        }
    }

    fn tell_presence(&mut self, relay: usize, node: usize, present: bool) {
        let peer = self.nodes[node].id;
        let id = self.relays[relay].id;
        let askers: Vec<usize> = self.relays[relay]
            .asked
            .iter()
            .filter(|(asked, asker)| {
                *asked == peer && self.relays[relay].clients.contains_key(asker)
            })
            .map(|(_, asker)| *asker)
            .collect();
        for asker in askers {
            self.tell_later(
                asker,
                relay,
                Input::RelayPeer {
                    relay: id,
                    peer,
                    present,
                },
            );
        }
    }

    /// Half a round trip later, if the line is up then as now.
    pub(super) fn tell_later(&mut self, node: usize, relay: usize, input: Input) {
        if self.reaches(node, relay) {
            let at = self.now + self.line_us(node, relay);
            let boot = self.nodes[node].boot;
            self.push(at, Happening::Tell { node, boot, input });
        }
    }

    pub(super) fn find(&mut self, node: usize, id: RelayId, peer: NodeId) {
        let relay = self.relay_index(id);
        if !self.leg_works(relay, node) {
            return;
        }
        self.relays[relay].asked.insert((peer, node));
        let present = self.relays[relay].clients.contains_key(&self.ids[&peer]);
        let at = self.now + 2 * self.line_us(node, relay);
        let boot = self.nodes[node].boot;
        let input = Input::RelayPeer {
            relay: id,
            peer,
            present,
        };
        self.push(at, Happening::Tell { node, boot, input });
    }

    /// Whether a client's connection carries anything now.
    fn leg_works(&self, relay: usize, node: usize) -> bool {
        match self.relays[relay].using.get(&node) {
            None => false,
            Some(RelayTransport::Quic) if self.udp_is_blocked(node, relay) => false,
            Some(_) => self.relay_runs(relay) && self.reaches(node, relay),
        }
    }

    /// How long one line of a relayed packet takes; `None`: lost. TCP does not lose, it waits.
    fn leg_delay(&mut self, relay: usize, node: usize) -> Option<u64> {
        if !self.leg_works(relay, node) {
            return None;
        }
        let site = self.nodes[node].site;
        let delay = self.line_us(node, relay);
        let lost = !self.is_near(node, relay) && self.lost(site);
        match (lost, self.relays[relay].using.get(&node)) {
            (false, _) => Some(delay),
            (true, Some(RelayTransport::Tls)) => Some(delay * 3 + 200_000),
            (true, Some(RelayTransport::Quic) | None) => None,
        }
    }

    fn send_by_relay(&mut self, index: usize, relay: usize, to: usize, packet: Packet) {
        if let Some(delay) = self.leg_delay(relay, index) {
            let from = index;
            self.push(
                self.now + delay,
                Happening::Forward {
                    relay,
                    from,
                    to,
                    packet,
                },
            );
        }
    }

    pub(super) fn forward(&mut self, relay: usize, from: usize, to: usize, packet: Packet) {
        if !self.relays[relay].clients.contains_key(&from) {
            return;
        }
        if let Some(delay) = self.leg_delay(relay, to) {
            (self.now, from, to, relay).hash(&mut self.trace);
            let via = Via::Relay(self.relays[relay].id);
            self.push(
                self.now + delay,
                Happening::Deliver {
                    node: to,
                    from,
                    via,
                    packet,
                },
            );
        }
    }
}
