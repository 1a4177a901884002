//! What the CNI plug-in and the agent of a node leave for each other, below one folder.
//!
//! ```text
//! /var/lib/holdfast/cni/
//!   network.json                                  the agent's: NodeNetwork
//!   policy                                        the agent's: policies are enforced, see POLICY_FILE
//!   attachments/<boot id>/<interface>,<addresses>.json   the plug-in's: an Attachment for each pod
//!   lock                                          the plug-in's: who holds it may choose addresses
//! ```
//!
//! An attachment lives as long as its pod's network namespace, and that ends with the machine's boot at the latest:
//! what power loss can take from a file of an attachment, it took from the kernel as well. So each boot has a folder of
//! its own, and a file is replaced by renaming, which no kill can cut in two, without waiting for the disk.

use std::{
    fmt, fs, io,
    net::IpAddr,
    path::{Path, PathBuf},
};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use serde::{Deserialize, Serialize};

/// The folder, unless the network configuration has another `stateDir`.
pub const STATE_DIR: &str = "/var/lib/holdfast/cni";

/// The agent's file in it.
pub const NETWORK_FILE: &str = "network.json";

/// Is there while the agent enforces policies at pods' interfaces and leaves in bpffs what the plug-in attaches to new
/// ones; it stays when the agent ends. So it says, when the machine has started anew, that the agent has to come first.
pub const POLICY_FILE: &str = "policy";

/// How the names of the node's ends of pods' interfaces begin, if the plug-in made them. `hfp*` as a pattern.
pub const INTERFACE_PREFIX: &str = "hfp";

/// The `proto` of the routes to pods in `ip route`. Not the one of the agent's routes, which removes those that it does
/// not want.
pub const ROUTE_PROTOCOL: u8 = 73;

/// Most attachments of a node: Kubernetes' own limit is 110 pods, and large nodes are run with some hundred.
pub const ATTACHMENTS_MAX: usize = 4_096;

/// Most addresses of a pod that the plug-in gives: one of each family.
pub const ADDRESSES_MAX: usize = 2;

/// Largest file that is read: an attachment has some 600 bytes, and names of at most 255.
pub const FILE_LEN_MAX: u64 = 64 << 10;

/// Most networks of [`NodeNetwork::behind`]: a gateway has some tens of LANs. Pods reach those beyond as their node.
pub const BEHIND_MAX: usize = 256;

/// Smallest MTU: what IPv6 asks of every link (RFC 8200, section 5).
pub const MTU_BYTES_MIN: u32 = 1_280;

/// What the plug-in needs to know of the node's network. The agent writes it, atomically.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct NodeNetwork {
    /// Pods' IPv4 addresses are from here, if they get one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ipv4: Option<Ipv4Net>,
    /// Pods' IPv6 addresses are from here, if they get one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ipv6: Option<Ipv6Net>,
    /// The MTU of pods' interfaces: that of the mesh.
    pub mtu_bytes: u32,
    /// The interface that leads to the rest of the mesh.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mesh_interface: Option<String>,
    /// Networks of the mesh behind this node, which pods reach as themselves: its pods' ranges among them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub behind: Vec<IpNet>,
}

/// Why there is no usable [`NodeNetwork`].
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// The agent did not write it yet.
    #[error("{0} is not there: the agent of this node did not write it yet")]
    Absent(PathBuf),
    /// It cannot be read.
    #[error("cannot read {0}")]
    Read(PathBuf, #[source] io::Error),
    /// It is not what the agent writes.
    #[error("{0} is damaged: {1}; the agent writes it anew when it starts")]
    Damaged(PathBuf, String),
}

impl NodeNetwork {
    /// Reads what the agent wrote below `state_dir`.
    ///
    /// # Errors
    ///
    /// Any of [`NetworkError`]. All of them pass when the agent writes the file.
    pub fn read(state_dir: &Path) -> Result<Self, NetworkError> {
        let path = state_dir.join(NETWORK_FILE);
        let text = match read_bounded(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(NetworkError::Absent(path));
            }
            Err(error) => return Err(NetworkError::Read(path, error)),
        };
        let damaged = |what: String| NetworkError::Damaged(path.clone(), what);
        let network: Self =
            serde_json::from_slice(&text).map_err(|error| damaged(error.to_string()))?;
        network.checked().map_err(damaged)
    }

    /// As the file says it. Write it to [`NETWORK_FILE`] by renaming a whole file over it.
    #[must_use]
    pub fn to_json(&self) -> String {
        // Two prefixes and a number always have a form.
        serde_json::to_string_pretty(self).unwrap_or_default()
    }

    /// Checks the ranges and the MTU, and takes host bits off.
    ///
    /// # Errors
    ///
    /// A sentence that says what is wrong.
    pub fn checked(mut self) -> Result<Self, String> {
        if self.ipv4.is_none() && self.ipv6.is_none() {
            return Err("neither ipv4 nor ipv6 has a range".to_owned());
        }
        if !(MTU_BYTES_MIN..=65_535).contains(&self.mtu_bytes) {
            return Err(format!(
                "mtuBytes is {}, not {MTU_BYTES_MIN} to 65535",
                self.mtu_bytes
            ));
        }
        if self.behind.len() > BEHIND_MAX {
            return Err(format!("behind has more than {BEHIND_MAX} networks"));
        }
        let is_name = |name: &String| (1..16).contains(&name.len()) && !name.contains(['/', '\0']);
        if !self.mesh_interface.iter().all(is_name) {
            return Err("meshInterface is no name of an interface".to_owned());
        }
        self.ipv4 = self.ipv4.map(|net| net.trunc());
        self.ipv6 = self.ipv6.map(|net| net.trunc());
        Ok(self)
    }
}

/// What an attachment is known by (CNI specification, "primary key").
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct AttachmentId {
    /// The network's name.
    pub network: String,
    /// The runtime's id of the container: with Kubernetes, of the pod's sandbox.
    pub container: String,
    /// The name of the interface in the pod.
    pub interface: String,
}

impl AttachmentId {
    /// The name of the node's end of the interface, if the plug-in makes one; and of the attachment's file. The same
    /// for the same id always. Two ids of one node have one name by chance in one of 2^48 pairs; whoever comes second
    /// is refused.
    #[must_use]
    pub fn key(&self) -> String {
        let hash = self.hash();
        format!(
            "{INTERFACE_PREFIX}{:012x}",
            (hash ^ (hash >> 48)) & 0xffff_ffff_ffff
        )
    }

    /// FNV-1a (64 bits) of the parts, with a byte between that none of them has.
    #[must_use]
    pub fn hash(&self) -> u64 {
        let parts = [&self.network, &self.container, &self.interface];
        let bytes = parts
            .into_iter()
            .flat_map(|part| part.bytes().chain([b'/']));
        bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        })
    }
}

/// A pod's interface in a network, as the plug-in recorded it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Attachment {
    /// What it is known by.
    pub id: AttachmentId,
    /// The path of the pod's network namespace, as the runtime gave it.
    pub netns: PathBuf,
    /// The node's end of the pod's interface; `None` while it is being made.
    pub host: Option<HostInterface>,
    /// All addresses of the pod's interface.
    pub addresses: Vec<IpAddr>,
    /// The veth, if the plug-in made one; `None`: it is chained behind another plug-in, which made the interface and
    /// gave the addresses.
    pub veth: Option<VethRecord>,
    /// The pod, if the runtime said which one. By it the agent knows where a pod is that was started anew.
    pub pod: Option<PodName>,
}

/// A network interface of the node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct HostInterface {
    /// Its name.
    pub name: String,
    /// Its index: another one with the same name is another interface.
    pub index: u32,
}

/// What was said of a veth when it was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct VethRecord {
    /// The link-layer address of the pod's end.
    pub mac: [u8; 6],
    /// That of the node's end.
    pub host_mac: [u8; 6],
    /// The MTU of both.
    pub mtu_bytes: u32,
}

/// A pod.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct PodName {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
}

/// The name of an attachment's file. It says whose addresses are given even if the content is lost, and appears and
/// goes in one step with both addresses.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct FileName {
    /// [`AttachmentId::key`].
    pub key: String,
    /// The addresses of the node's ranges that this attachment holds.
    pub held: Vec<IpAddr>,
}

impl FileName {
    /// Reads a name; `None` if it is none of an attachment.
    #[must_use]
    pub fn parse(name: &str) -> Option<Self> {
        let mut parts = name.strip_suffix(".json")?.split(',');
        let key = parts.next()?;
        if !key.starts_with(INTERFACE_PREFIX) {
            return None;
        }
        let held = parts.map(|part| part.parse().ok()).collect::<Option<_>>()?;
        let key = key.to_owned();
        Some(Self { key, held })
    }
}

impl fmt::Display for FileName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.key)?;
        for address in &self.held {
            write!(f, ",{address}")?;
        }
        f.write_str(".json")
    }
}

/// Says which boot of the machine this is.
///
/// # Errors
///
/// If `/proc` is not there, or does not say it.
pub fn boot_id() -> io::Result<String> {
    let text = fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    let id = text.trim();
    let is_id = !id.is_empty() && id.bytes().all(|b| b.is_ascii_hexdigit() || b == b'-');
    if is_id {
        return Ok(id.to_owned());
    }
    Err(io::Error::other(format!(
        "the kernel's boot id is {id:?}: letters a to f, digits and dashes were expected"
    )))
}

/// Where the attachments of all boots are. Only the folder of this boot means anything.
#[must_use]
pub fn boots_dir(state_dir: &Path) -> PathBuf {
    state_dir.join("attachments")
}

/// Where the attachments of this boot are. The plug-in makes the folder with the first one.
///
/// # Errors
///
/// As [`boot_id`].
pub fn attachments_dir(state_dir: &Path) -> io::Result<PathBuf> {
    Ok(boots_dir(state_dir).join(boot_id()?))
}

/// What [`read_attachments`] found.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Found {
    /// What is recorded, those among them that are being made ([`Attachment::host`] is `None`).
    pub attachments: Vec<Attachment>,
    /// Files that say nothing usable. Their interface, if the plug-in made one, has the name with which they begin.
    pub unreadable: Vec<PathBuf>,
    /// There were more than [`ATTACHMENTS_MAX`]; the rest was not read.
    pub truncated: bool,
}

/// Reads all attachments of a folder (see [`attachments_dir`]). One that is not there has none.
///
/// # Errors
///
/// If the folder cannot be listed.
pub fn read_attachments(folder: &Path) -> io::Result<Found> {
    let mut found = Found::default();
    for name in file_names(folder)? {
        if found.attachments.len() + found.unreadable.len() == ATTACHMENTS_MAX {
            found.truncated = true;
            break;
        }
        let path = folder.join(name.to_string());
        match read_attachment(&path) {
            Ok(attachment) => found.attachments.push(attachment),
            // Removed since.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(_) => found.unreadable.push(path),
        }
    }
    Ok(found)
}

/// The names of all attachments' files in a folder, in order. One that is not there has none.
///
/// # Errors
///
/// If the folder cannot be listed.
pub fn file_names(folder: &Path) -> io::Result<Vec<FileName>> {
    let entries = match fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut names = Vec::new();
    for entry in entries {
        names.extend(entry?.file_name().to_str().and_then(FileName::parse));
    }
    names.sort();
    Ok(names)
}

/// Reads one attachment.
///
/// # Errors
///
/// If it cannot be read, or is not one ([`io::ErrorKind::InvalidData`]); the file's name must belong to the content.
pub fn read_attachment(path: &Path) -> io::Result<Attachment> {
    let invalid = |why: String| io::Error::new(io::ErrorKind::InvalidData, why);
    let attachment: Attachment =
        serde_json::from_slice(&read_bounded(path)?).map_err(|error| invalid(error.to_string()))?;
    let name = path.file_name().and_then(|name| name.to_str());
    let name = name.and_then(FileName::parse);
    let name = name.ok_or_else(|| invalid("no name of an attachment".to_owned()))?;
    let held_by_it = attachment.veth.is_none() || attachment.addresses == name.held;
    if attachment.id.key() != name.key || !held_by_it {
        return Err(invalid("the name is another attachment's".to_owned()));
    }
    Ok(attachment)
}

fn read_bounded(path: &Path) -> io::Result<Vec<u8>> {
    use io::Read as _;
    let mut bytes = Vec::new();
    let file = fs::File::open(path)?;
    file.take(FILE_LEN_MAX + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > FILE_LEN_MAX {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("more than {FILE_LEN_MAX} bytes"),
        ));
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(container: &str) -> AttachmentId {
        AttachmentId {
            network: "mesh".to_owned(),
            container: container.to_owned(),
            interface: "eth0".to_owned(),
        }
    }

    fn attachment() -> Attachment {
        Attachment {
            id: id("c1"),
            netns: "/run/netns/c1".into(),
            host: None,
            addresses: vec!["10.1.0.2".parse().unwrap(), "fd00::2".parse().unwrap()],
            veth: Some(VethRecord {
                mac: [2; 6],
                host_mac: [6; 6],
                mtu_bytes: 1_400,
            }),
            pod: None,
        }
    }

    fn file_of(attachment: &Attachment) -> FileName {
        FileName {
            key: attachment.id.key(),
            held: attachment.addresses.clone(),
        }
    }

    #[test]
    fn a_key_is_a_name_of_an_interface_and_differs_with_each_part() {
        let one = id("c1");
        assert_eq!(one.key().len(), 15);
        assert!(one.key().starts_with(INTERFACE_PREFIX));
        let shifted = AttachmentId {
            network: "meshc".to_owned(),
            container: "1".to_owned(),
            ..one.clone()
        };
        assert_ne!(one.key(), id("c2").key());
        assert_ne!(one.key(), shifted.key());
    }

    #[test]
    fn a_file_name_says_key_and_addresses() {
        let name = file_of(&attachment());
        let text = name.to_string();
        assert_eq!(FileName::parse(&text), Some(name));
        for bad in ["hfp0.tmp", "eth0.json", "hfp0,x.json", ".hfp0.1.tmp"] {
            assert_eq!(FileName::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn attachments_are_read_back_and_a_cut_one_is_told_at_every_byte() {
        let folder = tempfile::tempdir().unwrap();
        let attachment = attachment();
        let path = folder.path().join(file_of(&attachment).to_string());
        let whole = serde_json::to_vec(&attachment).unwrap();
        for length in 0..whole.len() {
            fs::write(&path, &whole[..length]).unwrap();
            let found = read_attachments(folder.path()).unwrap();
            assert_eq!(
                found.unreadable,
                std::slice::from_ref(&path),
                "cut at {length}"
            );
        }
        fs::write(&path, &whole).unwrap();
        let found = read_attachments(folder.path()).unwrap();
        assert_eq!(found.attachments, [attachment]);
    }

    #[test]
    fn a_file_under_anothers_name_is_not_believed() {
        let folder = tempfile::tempdir().unwrap();
        let attachment = attachment();
        let mut name = file_of(&attachment);
        name.held.pop();
        let path = folder.path().join(name.to_string());
        fs::write(&path, serde_json::to_vec(&attachment).unwrap()).unwrap();
        assert!(read_attachment(&path).is_err());
    }

    #[test]
    fn no_folder_has_no_attachments() {
        assert_eq!(
            read_attachments(Path::new("/no/such/folder")).unwrap(),
            Found::default()
        );
    }

    #[test]
    fn the_agents_file_is_read_back_and_checked() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(NETWORK_FILE);
        let read = || NodeNetwork::read(folder.path());
        assert!(matches!(read(), Err(NetworkError::Absent(_))));
        let network = NodeNetwork {
            ipv4: Some("10.1.0.0/24".parse().unwrap()),
            ipv6: None,
            mtu_bytes: 1_400,
            mesh_interface: Some("holdfast0".to_owned()),
            behind: vec!["10.1.0.0/24".parse().unwrap()],
        };
        fs::write(&path, network.to_json()).unwrap();
        assert_eq!(read().unwrap(), network);
        for bad in [
            "",
            "{}",
            r#"{"mtuBytes":1400}"#,
            r#"{"ipv4":"10.1.0.0/24","mtuBytes":68}"#,
            r#"{"ipv4":"10.1.0.0","mtuBytes":1400}"#,
            r#"{"ipv4":"10.1.0.0/24","mtuBytes":1400,"more":1}"#,
            r#"{"ipv4":"10.1.0.0/24","mtuBytes":1400,"meshInterface":"a-name-too-long!"}"#,
            r#"{"ipv4":"10.1.0.0/24","mtuBytes":1400,"behind":["x"]}"#,
        ] {
            fs::write(&path, bad).unwrap();
            assert!(matches!(read(), Err(NetworkError::Damaged(..))), "{bad}");
        }
    }

    #[test]
    fn this_boot_has_an_id() {
        assert_eq!(boot_id().unwrap().len(), 36);
    }
}
