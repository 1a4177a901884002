//! The verbs.

use std::{io::Read, net::IpAddr};

use ipnet::IpNet;
use mesh_api::cni::{
    ATTACHMENTS_MAX, Attachment, AttachmentId, FileName, HostInterface, NodeNetwork, VethRecord,
    boot_id,
};
use mesh_linux::netlink::Netlink;
use serde_json::Value;
use tokio::runtime::Builder;

use crate::{
    allocate::{free, is_usable},
    check::{Made, problems},
    config::{self, Config},
    egress,
    environment::{self, Target, Verb},
    error::{CniError, Code},
    guard::{self, guard},
    kernel::{self, attach, detach, host_end, kernel, look, macs, noted, open_namespace},
    result::{Previous, render},
    store::{LOCK_WAIT, Last, Store, held},
    version::Version,
};

/// Most addresses that are free by our files and are asked about in the kernel before ADD gives up: somebody else uses
/// the range then.
const KERNEL_ASKS_MAX: usize = 256;

/// Does what the runtime asks in the environment and on `input`, and returns what goes to the standard output.
///
/// # Errors
///
/// The error, and the version in which the runtime is to be told.
pub fn run(
    lookup: impl Fn(&str) -> Option<String>,
    input: impl Read,
) -> Result<Option<Value>, (Version, CniError)> {
    let mut version = Version::LATEST;
    let done = environment::verb(&lookup).and_then(|verb| {
        if verb == Verb::Version {
            return answer_version(input).map(Some);
        }
        let fields = config::read(input)?;
        version = config::version(&fields)?;
        speaks(verb, version)?;
        let config = config::check(fields)?;
        let runtime = Builder::new_current_thread().enable_io().build();
        let runtime = runtime.map_err(|error| {
            CniError::new(Code::Kernel, "cannot wait for the kernel's answers").with(error)
        })?;
        runtime.block_on(perform(verb, &config, &lookup))
    });
    done.map_err(|error| (version, error))
}

/// Old libraries send nothing with VERSION.
fn answer_version(input: impl Read) -> Result<Value, CniError> {
    let asked = match config::read(input) {
        Ok(fields) => fields
            .get("cniVersion")
            .and_then(Value::as_str)
            .map(str::to_owned),
        Err(error) if error.code == Code::Io => return Err(error),
        Err(_) => None,
    };
    let asked = asked.unwrap_or_else(|| Version::LATEST.as_str().to_owned());
    Ok(Version::answer(&asked))
}

/// Whether the version has the verb.
fn speaks(verb: Verb, version: Version) -> Result<(), CniError> {
    let since = match verb {
        Verb::Add | Verb::Del | Verb::Version => Version::V0_3_1,
        Verb::Check => Version::V0_4_0,
        Verb::Gc | Verb::Status => Version::V1_1_0,
    };
    if version >= since {
        return Ok(());
    }
    let (verb, version) = (verb.as_str(), version.as_str());
    let message = format!("CNI_COMMAND is {verb}, which version {version} does not have");
    let hint = format!("cniVersion has to be {} or later", since.as_str());
    Err(CniError::new(Code::IncompatibleVersion, message).with(hint))
}

async fn perform(
    verb: Verb,
    config: &Config,
    lookup: &impl Fn(&str) -> Option<String>,
) -> Result<Option<Value>, CniError> {
    let node = Node::new(config)?;
    match verb {
        Verb::Add => {
            let target = environment::target(verb, lookup)?;
            node.add(&target).await.map(Some)
        }
        Verb::Del => node
            .del(&environment::target(verb, lookup)?)
            .await
            .map(|()| None),
        Verb::Check => node
            .check(&environment::target(verb, lookup)?)
            .await
            .map(|()| None),
        Verb::Gc => node.gc().await.map(|()| None),
        Verb::Status => node.status().map(|()| None),
        Verb::Version => Ok(None), // Answered without a configuration.
    }
}

/// This node, as a network configuration sees it.
struct Node<'a> {
    config: &'a Config,
    store: Store,
    netlink: Netlink,
}

/// What ADD goes on with.
struct Reserved {
    name: FileName,
    attachment: Attachment,
    veth: VethRecord,
    /// Nobody knew of the attachment before.
    is_new: bool,
}

impl<'a> Node<'a> {
    fn new(config: &'a Config) -> Result<Self, CniError> {
        let boot = boot_id().map_err(|error| {
            CniError::new(Code::Io, "cannot read the kernel's boot id").with(error)
        })?;
        Ok(Self {
            config,
            store: Store::new(&config.state_dir, &boot),
            netlink: kernel::connect()?,
        })
    }

    async fn add(&self, target: &Target) -> Result<Value, CniError> {
        let netns = target.netns.as_deref().unwrap_or("".as_ref()); // ADD has one.
        let namespace = open_namespace(netns)?;
        let id = self.config.id(target);
        if let Some(previous) = &self.config.prev_result {
            self.record_chained(&namespace, id, target, previous)
                .await?;
            return Ok(previous.clone());
        }
        if self.config.chained {
            let message = "the network configuration says chained, but has no prevResult";
            return Err(CniError::new(Code::BadConfig, message).with(
                "put the plug-in that makes the interface before mesh-cni, or take chained out",
            ));
        }
        let network = self.network()?;
        let mut reserved = self.reserve(&id, target, &network).await?;
        if let Some(host) = &reserved.attachment.host {
            let made = made(&reserved.attachment, host, &reserved.veth);
            let seen = look(&self.netlink, &namespace, made).await?;
            if problems(made, &seen).is_empty() {
                self.masquerade(&network)?;
                return Ok(self.result(&reserved));
            }
            // Made before, and not there any more: made again, with the same addresses if they are of this node still.
            if !self.suits(&network, &reserved.name.held) {
                detach(&self.netlink, &id).await?;
                self.store.remove(&reserved.name)?;
                reserved = self.reserve(&id, target, &network).await?;
            }
            reserved.attachment.host = None;
            reserved.attachment.netns = netns.to_owned();
            reserved.attachment.pod.clone_from(&target.pod);
        }
        if !reserved.is_new {
            // What a killed ADD, or somebody's hand, left.
            detach(&self.netlink, &id).await?;
        }
        let done = match self.masquerade(&network) {
            Ok(()) => self.make(&namespace, &mut reserved).await,
            Err(error) => Err(error),
        };
        match done {
            Ok(()) => Ok(self.result(&reserved)),
            Err(error) => Err(self.undo(error, &reserved).await),
        }
    }

    fn masquerade(&self, network: &NodeNetwork) -> Result<(), CniError> {
        if self.config.masquerade {
            egress::masquerade(&self.store, network)?;
        }
        Ok(())
    }

    fn result(&self, reserved: &Reserved) -> Value {
        let Reserved {
            attachment, veth, ..
        } = reserved;
        render(
            self.config.version,
            attachment,
            veth,
            self.config.dns.as_ref(),
        )
    }

    async fn make(
        &self,
        namespace: &std::fs::File,
        reserved: &mut Reserved,
    ) -> Result<(), CniError> {
        let Reserved {
            name,
            attachment,
            veth,
            ..
        } = reserved;
        let Attachment { id, addresses, .. } = attachment;
        let guard = |link| guard(&self.config.state_dir, link, None);
        let host = attach(&self.netlink, namespace, id, addresses, veth, guard).await?;
        attachment.host = Some(host);
        self.store.write(name, attachment)
    }

    /// Takes back what a failed ADD did. What cannot be taken back stays recorded, for DEL and GC.
    async fn undo(&self, error: CniError, reserved: &Reserved) -> CniError {
        if let Err(more) = detach(&self.netlink, &reserved.attachment.id).await {
            return error.with(more);
        }
        match self.store.remove(&reserved.name) {
            Ok(()) => error,
            Err(more) => error.with(more),
        }
    }

    /// Gives addresses to an attachment, and records it; or finds what was recorded.
    async fn reserve(
        &self,
        id: &AttachmentId,
        target: &Target,
        network: &NodeNetwork,
    ) -> Result<Reserved, CniError> {
        let lock = self.store.lock(LOCK_WAIT)?;
        let mut names = self.store.names()?;
        let key = id.key();
        let own = names.iter().position(|name| name.key == key);
        let own = own.map(|place| names.swap_remove(place));
        let is_new = own.is_none();
        let mut kept = None;
        if let Some(name) = own {
            if let Some(attachment) = self.store.read(&name) {
                if attachment.id != *id {
                    return Err(same_key(id, &attachment.id));
                }
                if let (Some(_), Some(veth)) = (&attachment.host, attachment.veth) {
                    return Ok(Reserved {
                        name,
                        attachment,
                        veth,
                        is_new,
                    });
                }
            }
            if self.suits(network, &name.held) {
                kept = Some(name.held);
            } else {
                detach(&self.netlink, id).await?;
                self.store.remove(&name)?;
            }
        }
        let addresses = match kept {
            Some(addresses) => addresses,
            None => {
                if names.len() >= ATTACHMENTS_MAX {
                    let message = format!("this node has {ATTACHMENTS_MAX} attachments already");
                    return Err(CniError::new(Code::Exhausted, message)
                        .with("DEL or GC takes away those that are not used"));
                }
                let mut last = lock.last();
                let addresses = self.choose(network, &held(&names), last).await?;
                last.note(&addresses);
                lock.set_last(last);
                addresses
            }
        };
        let (mac, host_mac) = macs(id);
        let veth = VethRecord {
            mac: self.config.mac.unwrap_or(mac),
            host_mac,
            mtu_bytes: network.mtu_bytes,
        };
        let name = FileName {
            key,
            held: addresses.clone(),
        };
        let attachment = Attachment {
            id: id.clone(),
            netns: target.netns.clone().unwrap_or_default(),
            host: None,
            addresses,
            veth: Some(veth),
            pod: target.pod.clone(),
        };
        self.store.write(&name, &attachment)?;
        Ok(Reserved {
            name,
            attachment,
            veth,
            is_new,
        })
    }

    /// Whether an attachment that has these addresses may keep them.
    fn suits(&self, network: &NodeNetwork, held: &[IpAddr]) -> bool {
        let ranges = ranges(network);
        let fits = |(range, address): (&IpNet, &IpAddr)| is_usable(*range, *address);
        ranges.len() == held.len()
            && ranges.iter().zip(held).all(fits)
            && self.config.ips.iter().all(|wanted| held.contains(wanted))
    }

    /// One address of each family that the node has a range of.
    async fn choose(
        &self,
        network: &NodeNetwork,
        taken: &std::collections::BTreeSet<IpAddr>,
        last: Last,
    ) -> Result<Vec<IpAddr>, CniError> {
        let ranges = ranges(network);
        let outside = |wanted: &&IpAddr| !ranges.iter().any(|range| is_usable(*range, **wanted));
        if let Some(wanted) = self.config.ips.iter().find(outside) {
            let message =
                format!("runtimeConfig.ips has {wanted}, which is of no pod range of this node");
            return Err(CniError::new(Code::BadConfig, message).with(format!("ranges: {ranges:?}")));
        }
        let mut chosen = Vec::new();
        for range in ranges {
            let is_v4 = range.addr().is_ipv4();
            let mut wanted = self.config.ips.iter().filter(|ip| ip.is_ipv4() == is_v4);
            if let Some(wanted) = wanted.next() {
                if taken.contains(wanted) || self.in_kernel(*wanted).await? {
                    let message = format!("runtimeConfig.ips has {wanted}, which another pod has");
                    return Err(CniError::new(Code::Exhausted, message)
                        .with("ask for another one, or end that pod"));
                }
                chosen.push(*wanted);
                continue;
            }
            chosen.push(self.next(range, last.of(is_v4), taken).await?);
        }
        Ok(chosen)
    }

    async fn next(
        &self,
        range: IpNet,
        last: Option<IpAddr>,
        taken: &std::collections::BTreeSet<IpAddr>,
    ) -> Result<IpAddr, CniError> {
        for address in free(range, last, taken).take(KERNEL_ASKS_MAX) {
            if !self.in_kernel(address).await? {
                return Ok(address);
            }
        }
        let message = format!("no address of {range} is free");
        Err(CniError::new(Code::Exhausted, message).with(
            "DEL or GC frees those of pods that are gone; or give the node a larger pod range",
        ))
    }

    /// Whether somebody has the address, of whom our files do not know.
    async fn in_kernel(&self, address: IpAddr) -> Result<bool, CniError> {
        let route = self.netlink.exact_route(address).await.map_err(kernel)?;
        Ok(route.is_some())
    }

    async fn record_chained(
        &self,
        namespace: &std::fs::File,
        id: AttachmentId,
        target: &Target,
        previous: &Value,
    ) -> Result<(), CniError> {
        let previous = Previous::read(previous)?;
        let host = host_end(&self.netlink, namespace, &id.interface).await?;
        let host = host.ok_or_else(|| no_veth(&id.interface))?;
        if !previous.has_host_interface(&host.name) {
            eprintln!(
                "mesh-cni: prevResult does not list {}, the node's end of {}",
                host.name, id.interface
            );
        }
        // Nothing is recorded of a pod that may not be connected yet; what is attached goes with its interface.
        let whole = match host.part_of {
            Some(whole) => self.netlink.look_at_link(whole).await.map_err(kernel)?,
            None => None,
        };
        // In a VRF or a bond it is not enforced, as the agent says.
        if whole.as_ref().is_none_or(|whole| whole.is_bridge) {
            let bridge = whole.map(|bridge| bridge.index);
            guard(&self.config.state_dir, host.index, bridge)?;
        }
        let name = FileName {
            key: id.key(),
            held: Vec::new(),
        };
        let attachment = Attachment {
            netns: target.netns.clone().unwrap_or_default(),
            host: Some(HostInterface {
                name: host.name,
                index: host.index.0.get(),
            }),
            addresses: previous.addresses(&id.interface),
            veth: None,
            pod: target.pod.clone(),
            id,
        };
        drop(self.store.lock(LOCK_WAIT)?); // The folder is there then.
        if let Some(old) = self.store.find(&name.key)? {
            let other = self.store.read(&old).filter(|old| old.id != attachment.id);
            if let Some(other) = other {
                return Err(same_key(&attachment.id, &other.id));
            }
            if old != name {
                self.store.remove(&old)?;
            }
        }
        self.store.write(&name, &attachment)
    }

    async fn del(&self, target: &Target) -> Result<(), CniError> {
        let id = self.config.id(target);
        // Before the address is free, nobody has it.
        detach(&self.netlink, &id).await?;
        let Some(name) = self.store.find(&id.key())? else {
            return Ok(());
        };
        let found = self.store.read(&name);
        if found.as_ref().is_some_and(|found| found.id != id) {
            return Ok(());
        }
        guard::forget(found.and_then(|found| found.host).as_ref());
        self.store.remove(&name)
    }

    async fn check(&self, target: &Target) -> Result<(), CniError> {
        let id = self.config.id(target);
        let Some(previous) = &self.config.prev_result else {
            let message = "CHECK needs prevResult, which the network configuration does not have";
            return Err(CniError::new(Code::BadConfig, message));
        };
        let said = Previous::read(previous)?.addresses(&id.interface);
        let namespace = open_namespace(target.netns.as_deref().unwrap_or("".as_ref()))?;
        let name = self.store.find(&id.key())?;
        let attachment = name.and_then(|name| self.store.read(&name));
        let attachment = attachment.filter(|attachment| attachment.id == id);
        let Some((attachment, host)) = attachment
            .as_ref()
            .and_then(|attachment| Some((attachment, attachment.host.as_ref()?)))
        else {
            let folder = self.config.state_dir.display();
            return Err(differs(&id, vec![format!("{folder} has no record of it")]));
        };
        let mut found = Vec::new();
        for address in attachment
            .addresses
            .iter()
            .filter(|address| !said.contains(address))
        {
            found.push(format!("prevResult lacks the address {address}"));
        }
        for address in said
            .iter()
            .filter(|address| !attachment.addresses.contains(address))
        {
            found.push(format!(
                "prevResult has the address {address}, the record does not"
            ));
        }
        if let Some(veth) = &attachment.veth {
            let made = made(attachment, host, veth);
            let seen = look(&self.netlink, &namespace, made).await?;
            found.extend(problems(made, &seen));
        } else {
            let end = host_end(&self.netlink, &namespace, &id.interface).await;
            let end = end.map_err(|error| differs(&id, vec![error.message]))?;
            let is_it = end.is_some_and(|end| end.index.0.get() == host.index && end.is_up);
            if !is_it {
                found.push(format!(
                    "{} is not the node's end of it, or is down",
                    host.name
                ));
            }
        }
        if found.is_empty() {
            Ok(())
        } else {
            Err(differs(&id, found))
        }
    }

    /// Removes what is not listed: does all that it can, and says all that it could not.
    async fn gc(&self) -> Result<(), CniError> {
        let Some(valid) = &self.config.valid else {
            let message =
                "GC needs cni.dev/valid-attachments, which the network configuration does not have";
            return Err(CniError::new(Code::BadConfig, message)
                .with("without it everything would be removed"));
        };
        let mut failed = Vec::new();
        let _alone = self.store.lock(LOCK_WAIT)?;
        let links = self.netlink.links().await.map_err(kernel)?;
        for link in &links {
            let id = link.alias.as_deref().and_then(noted);
            let id = id.filter(|id| id.network == self.config.network && id.key() == link.name);
            if id.is_some_and(|id| !valid.contains(&id)) {
                let removed = self.netlink.remove_link(link.index).await;
                failed.extend(removed.err().map(kernel));
            }
        }
        for name in self.store.names()? {
            let link = links.iter().find(|link| link.name == name.key);
            let is_gone = match self.store.read(&name) {
                Some(attachment) => {
                    let own = attachment.id.network == self.config.network;
                    let gone = own && !valid.contains(&attachment.id);
                    if gone {
                        // One that was killed before it noted whose it is.
                        failed.extend(detach(&self.netlink, &attachment.id).await.err());
                        guard::forget(attachment.host.as_ref());
                    }
                    gone
                }
                None => {
                    let listed = valid.iter().any(|id| id.key() == name.key);
                    let id = link.and_then(|link| link.alias.as_deref()).and_then(noted);
                    // Nobody says any more which network's it was; without an interface it is nobody's.
                    let own = id.is_some_and(|id| id.network == self.config.network);
                    !listed && (link.is_none() || own)
                }
            };
            if is_gone {
                failed.extend(self.store.remove(&name).err());
            }
        }
        failed.extend(self.store.sweep().err());
        if self.store.names()?.is_empty() {
            failed.extend(egress::remove().err());
        }
        let Some((first, rest)) = failed.split_first() else {
            return Ok(());
        };
        Err(rest.iter().fold(first.clone(), CniError::with))
    }

    fn status(&self) -> Result<(), CniError> {
        let problem = match self.ready() {
            Ok(()) => return Ok(()),
            Err(problem) => problem,
        };
        let pods = self.store.names().map_or(0, |names| names.len());
        let (code, message) = if pods == 0 {
            (Code::Unavailable, "pods cannot be connected".to_owned())
        } else {
            let message = format!("pods cannot be connected, and {pods} that are may be cut off");
            (Code::Limited, message)
        };
        Err(CniError::new(code, message).with(problem))
    }

    fn ready(&self) -> Result<(), CniError> {
        if !self.config.chained {
            self.network()?;
        }
        guard::ready(&self.config.state_dir)?;
        drop(self.store.lock(LOCK_WAIT)?);
        self.store.probe()
    }

    fn network(&self) -> Result<NodeNetwork, CniError> {
        NodeNetwork::read(&self.config.state_dir)
            .map_err(|error| CniError::from_error(Code::TryAgain, &error))
    }
}

fn ranges(network: &NodeNetwork) -> Vec<IpNet> {
    let v4 = network.ipv4.map(IpNet::from);
    v4.into_iter()
        .chain(network.ipv6.map(IpNet::from))
        .collect()
}

fn made<'a>(attachment: &'a Attachment, host: &'a HostInterface, veth: &'a VethRecord) -> Made<'a> {
    Made {
        id: &attachment.id,
        host,
        addresses: &attachment.addresses,
        veth,
    }
}

fn differs(id: &AttachmentId, problems: Vec<String>) -> CniError {
    let AttachmentId {
        network,
        container,
        interface,
    } = id;
    let message =
        format!("{interface} of container {container} in network {network} is not as ADD left it");
    CniError::new(Code::Differs, message).with(problems.join("; "))
}

fn same_key(id: &AttachmentId, other: &AttachmentId) -> CniError {
    let message = format!(
        "the name {} belongs to container {} already, and would be the same for {}",
        id.key(),
        other.container,
        id.container
    );
    CniError::new(Code::Exhausted, message).with("try with another container id")
}

fn no_veth(interface: &str) -> CniError {
    let message = format!("the pod's {interface} is no veth whose other end is on this node");
    CniError::new(Code::BadConfig, message).with(
        "mesh-cni can be chained behind plug-ins that make a veth: bridge, ptp, calico, flannel",
    )
}
