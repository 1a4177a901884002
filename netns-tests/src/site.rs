//! A site: a router with a NAT, a LAN, and a link to the internet.

use std::{
    net::{Ipv4Addr, Ipv6Addr},
    sync::{Mutex, MutexGuard, PoisonError},
};

use anyhow::{Context as _, Result, ensure};

use crate::{
    lab::{INTERNET, Lab},
    link::Link,
    nat::{HOSTS_MAX, Ipv6Kind, NatKind, ipv6_rules, rules},
    node::Node,
    tool,
};

/// What a site has of the internet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Internet {
    /// How IPv4 is translated, and the public address.
    pub ipv4: Option<(NatKind, Ipv4Addr)>,
    /// How IPv6 is filtered, and the LAN's prefix, a /64.
    pub ipv6: Option<(Ipv6Kind, Ipv6Addr)>,
}

impl Internet {
    /// IPv4 alone.
    #[must_use]
    pub const fn ipv4(kind: NatKind, wan: Ipv4Addr) -> Self {
        Self {
            ipv4: Some((kind, wan)),
            ipv6: None,
        }
    }

    /// IPv6 alone.
    #[must_use]
    pub const fn ipv6(kind: Ipv6Kind, prefix: Ipv6Addr) -> Self {
        Self {
            ipv4: None,
            ipv6: Some((kind, prefix)),
        }
    }
}

/// A router, and the LAN behind it. Every LAN behind a NAT is 192.168.1.0/24, as at home: addresses
/// of different sites overlap, and nothing may rely on them being unique.
#[derive(Debug)]
pub struct Site {
    name: String,
    internet: Internet,
    router: Node,
    /// The router with the public address: a carrier's, or the same.
    border: Node,
    port: String,
    lan: [u8; 3],
    link: Link,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    wan: Option<Ipv4Addr>,
    hosts: Vec<Host>,
    /// Of the next lease.
    key: usize,
}

#[derive(Debug)]
struct Host {
    node: Node,
    address: Ipv4Addr,
    key: usize,
}

impl State {
    fn next_key(&mut self) -> usize {
        self.key += 1;
        self.key - 1
    }
}

/// The router's address ends so.
const GATEWAY: u8 = 1;

/// No router tells anybody that a packet was too big.
const SILENT: &str = "table inet silent\ndelete table inet silent\ntable inet silent {\n chain output {\n \
                      type filter hook output priority 0; policy accept;\n \
                      icmp type destination-unreachable drop\n icmpv6 type packet-too-big drop\n }\n}\n";

/// The first host's address ends so; the others follow.
const FIRST_HOST: u8 = 11;

impl Site {
    pub(crate) fn new(
        name: &str,
        internet: Internet,
        [router, border]: [Node; 2],
        port: String,
        lan: [u8; 3],
        link: Link,
    ) -> Result<Self> {
        let state = Mutex::new(State {
            wan: internet.ipv4.map(|(_, wan)| wan),
            hosts: Vec::new(),
            key: 0,
        });
        let site = Self {
            name: name.to_owned(),
            internet,
            router,
            border,
            port,
            lan,
            link,
            state,
        };
        let mut bridge = "link add lan type bridge\n".to_owned();
        if site.internet.ipv4.is_some() {
            let gateway = site.address(GATEWAY);
            bridge.push_str(&format!("addr add {gateway}/24 dev lan\n"));
        }
        if let Some((_, prefix)) = site.internet.ipv6 {
            let gateway = with_last(prefix, GATEWAY);
            bridge.push_str(&format!("addr add {gateway}/64 dev lan nodad\n"));
        }
        bridge.push_str("link set lan up\n");
        tool::ip(site.router.netns(), &bridge)?;
        if let Some((kind, _)) = site.internet.ipv6 {
            tool::nft(site.router.netns(), &ipv6_rules(kind))?;
        }
        site.apply(&site.lock())?;
        Ok(site)
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The router of the LAN.
    #[must_use]
    pub fn router(&self) -> &Node {
        &self.router
    }

    /// The link to the internet.
    #[must_use]
    pub fn link(&self) -> &Link {
        &self.link
    }

    /// Adds a host to the LAN.
    ///
    /// # Errors
    ///
    /// If the name is taken, or the LAN is full.
    pub fn host(&self, lab: &Lab, name: &str) -> Result<Node> {
        let mut state = self.lock();
        let index = state.hosts.len();
        ensure!(
            index < HOSTS_MAX,
            "site {} has {HOSTS_MAX} hosts already",
            self.name
        );
        let last = FIRST_HOST + u8::try_from(index)?;
        let node = lab.add_node(name)?;
        let port = format!("host{index}");
        lab.veth(&node, "eth0", &self.router, &port)?;
        tool::ip(
            self.router.netns(),
            &format!("link set {port} master lan\n"),
        )?;
        let address = self.address(last);
        if self.internet.ipv4.is_some() {
            self.set_address(&node, address)?;
        }
        if let Some((_, prefix)) = self.internet.ipv6 {
            let [own, gateway] = [last, GATEWAY].map(|last| with_last(prefix, last));
            let batch = format!(
                "addr add {own}/64 dev eth0 nodad\nroute add ::/0 via {gateway} dev eth0\n"
            );
            tool::ip(node.netns(), &batch)?;
        }
        let key = state.next_key();
        state.hosts.push(Host {
            node: node.clone(),
            address,
            key,
        });
        self.apply(&state)?;
        Ok(node)
    }

    /// Gives a host another address on the LAN (200 and up are free), as a new DHCP lease does.
    ///
    /// # Errors
    ///
    /// If the site has no IPv4, or `ip` refuses.
    pub fn renumber(&self, host: &Node, address: Ipv4Addr) -> Result<()> {
        ensure!(
            self.internet.ipv4.is_some(),
            "site {} has no IPv4",
            self.name
        );
        let mut state = self.lock();
        let key = state.next_key();
        for old in &mut state.hosts {
            if old.node.name() == host.name() {
                (old.address, old.key) = (address, key);
            }
        }
        // First: what an agent sends at once would get a mapping that nobody meant it to have.
        self.apply(&state)?;
        self.set_address(host, address)
    }

    /// Gives the site another public address, as an access provider does at night. Mappings die.
    ///
    /// # Errors
    ///
    /// If the site has no IPv4, or `ip` refuses.
    pub fn set_wan(&self, internet: &Node, wan: Ipv4Addr) -> Result<()> {
        let mut state = self.lock();
        let port = &self.port;
        let before = state
            .wan
            .with_context(|| format!("site {} has no IPv4", self.name))?;
        let down = format!("route del {before}/32 dev {port}\nroute add {wan}/32 dev {port}\n");
        tool::ip(internet.netns(), &down)?;
        let up = format!(
            "addr flush dev wan to 0.0.0.0/0\naddr add {wan}/32 dev wan\n\
             route replace default via {INTERNET} dev wan onlink\n"
        );
        tool::ip(self.border.netns(), &up)?;
        state.wan = Some(wan);
        self.apply(&state)
    }

    /// Drops every UDP packet that would pass the router, or stops doing so.
    ///
    /// # Errors
    ///
    /// If `nft` refuses.
    pub fn block_udp(&self, blocked: bool) -> Result<()> {
        let mut script = "table inet fw\ndelete table inet fw\n".to_owned();
        if blocked {
            script.push_str(
                "table inet fw {\n chain forward {\n type filter hook forward priority -10; \
                 policy accept;\n meta l4proto udp drop\n }\n}\n",
            );
        }
        tool::nft(self.router.netns(), &script)
    }

    /// Makes the wire to the internet one of this MTU, and lets nobody hear of it: what does not fit vanishes, and the
    /// ICMP errors about it (RFC 1191, RFC 4443) with it.
    ///
    /// # Errors
    ///
    /// If `ip` or `nft` refuses.
    pub fn narrow(&self, internet: &Node, mtu_bytes: u16) -> Result<()> {
        for (node, interface) in [(&self.border, "wan"), (internet, &self.port)] {
            let narrow = format!("link set {interface} mtu {mtu_bytes}\n");
            tool::ip(node.netns(), &narrow)?;
            tool::nft(node.netns(), SILENT)?;
        }
        Ok(())
    }

    fn apply(&self, state: &State) -> Result<()> {
        let Some((kind, _)) = self.internet.ipv4 else {
            return Ok(());
        };
        let hosts = state.hosts.iter().map(|host| (host.address, host.key));
        let hosts: Vec<_> = hosts.collect();
        tool::nft(self.router.netns(), &rules(kind, &hosts))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn address(&self, last: u8) -> Ipv4Addr {
        let [a, b, c] = self.lan;
        Ipv4Addr::new(a, b, c, last)
    }

    fn set_address(&self, host: &Node, address: Ipv4Addr) -> Result<()> {
        let gateway = self.address(GATEWAY);
        let batch = format!(
            "addr flush dev eth0 to 0.0.0.0/0\naddr add {address}/24 dev eth0\n\
             route replace default via {gateway} dev eth0\n"
        );
        tool::ip(host.netns(), &batch)
    }
}

/// An address of a /64.
fn with_last(prefix: Ipv6Addr, last: u8) -> Ipv6Addr {
    Ipv6Addr::from_bits(prefix.to_bits() | u128::from(last))
}
