//! A site: a router with a NAT, a LAN, and a link to the internet.

use std::{
    net::Ipv4Addr,
    sync::{Mutex, MutexGuard, PoisonError},
};

use anyhow::{Result, ensure};

use crate::{
    lab::{INTERNET, Lab},
    link::Link,
    nat::{HOSTS_MAX, NatKind, rules},
    node::Node,
    tool,
};

/// A router, and the LAN behind it. Every LAN behind a NAT is 192.168.1.0/24, as at home: addresses
/// of different sites overlap, and nothing may rely on them being unique.
#[derive(Debug)]
pub struct Site {
    name: String,
    kind: NatKind,
    router: Node,
    port: String,
    lan: [u8; 3],
    link: Link,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    wan: Ipv4Addr,
    hosts: Vec<(Node, Ipv4Addr)>,
}

/// The router's address ends so.
const GATEWAY: u8 = 1;

/// The first host's address ends so; the others follow.
const FIRST_HOST: u8 = 11;

impl Site {
    pub(crate) fn new(
        name: &str,
        kind: NatKind,
        router: Node,
        port: String,
        lan: [u8; 3],
        wan: Ipv4Addr,
        link: Link,
    ) -> Result<Self> {
        let state = Mutex::new(State {
            wan,
            hosts: Vec::new(),
        });
        let site = Self {
            name: name.to_owned(),
            kind,
            router,
            port,
            lan,
            link,
            state,
        };
        let gateway = site.address(GATEWAY);
        let bridge =
            format!("link add lan type bridge\naddr add {gateway}/24 dev lan\nlink set lan up\n");
        tool::ip(site.router.netns(), &bridge)?;
        site.apply(&site.lock())?;
        Ok(site)
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The router.
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
        self.set_address(&node, address)?;
        state.hosts.push((node.clone(), address));
        self.apply(&state)?;
        Ok(node)
    }

    /// Gives a host another address on the LAN (200 and up are free), as a new DHCP lease does.
    ///
    /// # Errors
    ///
    /// If `ip` refuses.
    pub fn renumber(&self, host: &Node, address: Ipv4Addr) -> Result<()> {
        let mut state = self.lock();
        for (node, old) in &mut state.hosts {
            if node.name() == host.name() {
                *old = address;
            }
        }
        self.set_address(host, address)?;
        self.apply(&state)
    }

    /// Gives the site another public address, as an access provider does at night. Mappings die.
    ///
    /// # Errors
    ///
    /// If `ip` refuses.
    pub fn set_wan(&self, internet: &Node, wan: Ipv4Addr) -> Result<()> {
        let mut state = self.lock();
        let port = &self.port;
        let down = format!(
            "route del {}/32 dev {port}\nroute add {wan}/32 dev {port}\n",
            state.wan
        );
        tool::ip(internet.netns(), &down)?;
        let up = format!(
            "addr flush dev wan\naddr add {wan}/32 dev wan\n\
             route replace default via {INTERNET} dev wan onlink\n"
        );
        tool::ip(self.router.netns(), &up)?;
        state.wan = wan;
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

    fn apply(&self, state: &State) -> Result<()> {
        let hosts: Vec<_> = state.hosts.iter().map(|(_, address)| *address).collect();
        tool::nft(self.router.netns(), &rules(self.kind, &hosts))
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
            "addr flush dev eth0 scope global\naddr add {address}/24 dev eth0\n\
             route replace default via {gateway} dev eth0\n"
        );
        tool::ip(host.netns(), &batch)
    }
}
