//! What the node's CNI plug-in is told (pods' address ranges), and what it tells (pods' interfaces): files of
//! [`mesh_api::cni`], so that either works while the other does not.

use std::{
    collections::BTreeSet,
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::Context as _;
use ipnet::IpNet;
use mesh_api::cni::{BEHIND_MAX, NETWORK_FILE, NodeNetwork, attachments_dir, read_attachments};
use mesh_core::{
    offline::local::{PodInterface, Pods},
    pattern::NamePattern,
    policy::resources::ObjectName,
    services::View,
    snapshot::Snapshot,
};
use mesh_wire::id::NodeName;
use notify::{RecommendedWatcher, RecursiveMode, Watcher as _};
use tokio::{sync::watch, task, time};
use tokio_util::sync::CancellationToken;

use crate::store::{remove_if_there, write_atomically};

/// How soon a file that could not be written is tried again.
const RETRY: time::Duration = time::Duration::from_secs(5);

/// What pods of `own` need, whose tunnel is `interface`: its first range of each family. `None`: it has none, or is not in the snapshot.
#[must_use]
pub fn network(snapshot: &Snapshot, own: &NodeName, interface: &str) -> Option<NodeNetwork> {
    let node = snapshot.nodes.get(own)?;
    let ranges = &node.pod_prefixes;
    // The pods' own ranges first, whatever has no room.
    let behind: BTreeSet<_> = node
        .prefixes
        .iter()
        .filter(|net| !ranges.contains(net))
        .collect();
    let behind = ranges.iter().chain(behind);
    let v4 = |net: &IpNet| match net {
        IpNet::V4(net) => Some(*net),
        IpNet::V6(_) => None,
    };
    let v6 = |net: &IpNet| match net {
        IpNet::V4(_) => None,
        IpNet::V6(net) => Some(*net),
    };
    let network = NodeNetwork {
        ipv4: ranges.iter().find_map(v4),
        ipv6: ranges.iter().find_map(v6),
        mtu_bytes: snapshot.mesh.mtu_bytes.into(),
        mesh_interface: Some(interface.to_owned()),
        behind: behind.take(BEHIND_MAX).copied().collect(),
    };
    network.checked().ok()
}

/// Makes the file below `folder` say `network`; nothing is written if it does already.
///
/// # Errors
///
/// Any of the file system's; the file is then as it was.
pub fn publish(folder: &Path, network: Option<&NodeNetwork>) -> io::Result<()> {
    let path = folder.join(NETWORK_FILE);
    match network {
        None => remove_if_there(&path),
        Some(network) if NodeNetwork::read(folder).ok().as_ref() == Some(network) => Ok(()),
        Some(network) => {
            fs::create_dir_all(folder)?;
            write_atomically(&path, network.to_json().as_bytes())
        }
    }
}

/// Keeps the file as the mesh is, until `stop`.
///
/// # Errors
///
/// None of the disk's: those are logged once and tried again.
pub async fn keep_network(
    folder: PathBuf,
    interface: String,
    mut views: watch::Receiver<Option<Arc<View>>>,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    let mut published = None;
    let mut complaint = String::new();
    loop {
        let view = views.borrow_and_update().clone();
        if let Some(view) = view {
            let wanted = network(&view.snapshot, &view.node, &interface);
            if published.as_ref() != Some(&wanted) {
                let (at, network) = (folder.clone(), wanted.clone());
                let done = task::spawn_blocking(move || publish(&at, network.as_ref())).await?;
                match done {
                    Ok(()) => {
                        complaint.clear();
                        published = Some(wanted);
                    }
                    Err(error) => {
                        let text = error.to_string();
                        if text != complaint {
                            tracing::warn!(folder = %folder.display(), %error, "cannot tell the CNI plug-in the pods' ranges");
                            complaint = text;
                        }
                    }
                }
            }
        }
        tokio::select! {
            () = stop.cancelled() => return Ok(()),
            changed = views.changed() => changed?,
            () = time::sleep(RETRY), if !complaint.is_empty() => {}
        }
    }
}

/// Where this node's pods are, as the plug-in recorded it below `state_dir` since this boot; `None`: that cannot be read as a
/// whole. Pods whose names the runtime did not say are not in it.
#[must_use]
pub fn pods(state_dir: &Path) -> Option<Pods> {
    pods_in(&attachments_dir(state_dir).ok()?)
}

fn pods_in(folder: &Path) -> Option<Pods> {
    let found = read_attachments(folder).ok()?;
    if found.truncated || !found.unreadable.is_empty() {
        return None;
    }
    let mut pods = Pods::new();
    for attachment in found.attachments {
        let (Some(pod), Some(_made)) = (attachment.pod, attachment.host) else {
            continue;
        };
        let interface = PodInterface {
            pod: ObjectName {
                namespace: pod.namespace,
                name: pod.name,
            },
            interface: attachment.id.interface,
        };
        let addresses: &mut Vec<_> = pods.entry(interface).or_default();
        addresses.extend(attachment.addresses);
    }
    Some(pods)
}

/// The interfaces that the plug-in recorded as pods', and news of them: each clone hears all.
#[derive(Debug, Clone)]
pub struct Attachments {
    folder: PathBuf,
    changed: watch::Receiver<()>,
    /// Kept alive.
    _watcher: Arc<RecommendedWatcher>,
}

impl Attachments {
    /// Follows what is recorded below `state_dir` since this boot.
    ///
    /// # Errors
    ///
    /// If the folder cannot be made, or the kernel does not tell what happens in it.
    pub fn follow(state_dir: &Path) -> anyhow::Result<Self> {
        let folder = attachments_dir(state_dir).context("the boot's id")?;
        let made = fs::create_dir_all(&folder);
        made.with_context(|| format!("cannot make {}", folder.display()))?;
        let (told, changed) = watch::channel(());
        let watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
            // That somebody read a file is no news.
            if !event.is_ok_and(|event| event.kind.is_access()) {
                told.send_replace(());
            }
        });
        let mut watcher = watcher.context("cannot follow files")?;
        let watched = watcher.watch(&folder, RecursiveMode::NonRecursive);
        watched.with_context(|| format!("cannot follow {}", folder.display()))?;
        Ok(Self {
            folder,
            changed,
            _watcher: Arc::new(watcher),
        })
    }

    /// The names of pods' interfaces, and what is wrong with some records.
    #[must_use]
    pub fn interfaces(&self) -> (BTreeSet<NamePattern>, Option<String>) {
        let found = match read_attachments(&self.folder) {
            Ok(found) => found,
            Err(error) => {
                let problem = format!("{}: {error}", self.folder.display());
                return (BTreeSet::new(), Some(problem));
            }
        };
        let names = found.attachments.into_iter().filter_map(|one| one.host);
        // A name that would be taken for a pattern is nobody's but a prankster's.
        let names = names
            .map(|host| host.name)
            .filter(|name| !name.contains('*'));
        let mut problems: Vec<String> = Vec::new();
        if let Some(path) = found.unreadable.first() {
            let others = found.unreadable.len() - 1;
            problems.push(format!(
                "{} and {others} other records of pods cannot be read: delete those pods",
                path.display()
            ));
        }
        if found.truncated {
            problems.push("there are more pods than can be followed".to_owned());
        }
        let problem = (!problems.is_empty()).then(|| problems.join("; "));
        (names.map(NamePattern::new).collect(), problem)
    }

    /// As [`pods`].
    #[must_use]
    pub fn pods(&self) -> Option<Pods> {
        pods_in(&self.folder)
    }

    /// Returns when something was recorded or removed since the last time.
    pub async fn changed(&mut self) {
        if self.changed.changed().await.is_err() {
            std::future::pending().await // The watcher that tells is alive as long as this.
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use mesh_api::cni::{Attachment, AttachmentId, FileName, HostInterface, PodName};
    use mesh_core::snapshot::{MeshSettings, Node};
    use mesh_wire::id::{MeshId, NodeId};

    use super::*;

    fn snapshot(ranges: &[&str]) -> Snapshot {
        let mesh = MeshId([1; 32]);
        let id = NodeId([2; 32]);
        let node = Node {
            prefixes: vec!["192.168.7.0/24".parse().unwrap()],
            pod_prefixes: ranges.iter().map(|net| net.parse().unwrap()).collect(),
            ..Node::new(&mesh, "a".parse().unwrap(), id, [100, 96, 0, 1].into())
        };
        let mut snapshot = Snapshot::empty(MeshSettings::with_defaults(mesh, "demo"));
        snapshot.nodes.insert(node.name.clone(), node);
        snapshot
    }

    #[test]
    fn pods_get_addresses_of_the_node_s_pod_ranges_and_of_no_lan() {
        let own = "a".parse().unwrap();
        assert_eq!(network(&snapshot(&[]), &own, "holdfast0"), None);
        let found = network(
            &snapshot(&["10.244.1.0/24", "fd00:1::/64", "10.9.0.0/24"]),
            &own,
            "holdfast0",
        );
        let found = found.unwrap();
        assert_eq!(found.ipv4, Some("10.244.1.0/24".parse().unwrap()));
        assert_eq!(found.ipv6, Some("fd00:1::/64".parse().unwrap()));
        assert_eq!(found.mtu_bytes, 1280);
        assert_eq!(found.mesh_interface.as_deref(), Some("holdfast0"));
        // The LAN, too, sees them as themselves.
        let behind: Vec<_> = found.behind.iter().map(ToString::to_string).collect();
        let all = [
            "10.244.1.0/24",
            "fd00:1::/64",
            "10.9.0.0/24",
            "192.168.7.0/24",
        ];
        assert_eq!(behind, all);
        assert_eq!(
            network(
                &snapshot(&["10.244.1.0/24"]),
                &"b".parse().unwrap(),
                "holdfast0"
            ),
            None
        );
    }

    #[test]
    fn the_file_says_what_is_and_is_written_only_when_that_changes() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path().join("cni");
        let own = "a".parse().unwrap();
        publish(&folder, None).unwrap();
        let one = network(&snapshot(&["10.244.1.0/24"]), &own, "holdfast0");
        publish(&folder, one.as_ref()).unwrap();
        assert_eq!(NodeNetwork::read(&folder).ok(), one);
        let path = folder.join(NETWORK_FILE);
        let written = |path: &Path| {
            use std::os::unix::fs::MetadataExt as _;
            fs::metadata(path).unwrap().ino()
        };
        let before = written(&path);
        publish(&folder, one.as_ref()).unwrap();
        assert_eq!(written(&path), before);
        // What is damaged is mended.
        fs::write(&path, "{").unwrap();
        publish(&folder, one.as_ref()).unwrap();
        assert_eq!(NodeNetwork::read(&folder).ok(), one);
        publish(&folder, None).unwrap();
        assert!(!path.exists());
    }

    #[test]
    fn pods_are_told_by_name_once_they_are_wired_and_only_if_every_record_can_be_read() {
        let state = tempfile::tempdir().unwrap();
        assert_eq!(pods(state.path()), Some(Pods::new()));
        let folder = attachments_dir(state.path()).unwrap();
        fs::create_dir_all(&folder).unwrap();
        let record = |container: &str, pod: Option<&str>, made: bool, address: &str| {
            let id = AttachmentId {
                network: "mesh".into(),
                container: container.into(),
                interface: "eth0".into(),
            };
            let name = FileName {
                key: id.key(),
                held: Vec::new(),
            };
            let host = HostInterface {
                name: id.key(),
                index: 7,
            };
            let attachment = Attachment {
                id,
                netns: "/run/netns/x".into(),
                host: made.then_some(host),
                addresses: vec![address.parse().unwrap()],
                veth: None,
                pod: pod.map(|name| PodName {
                    namespace: "shop".into(),
                    name: name.into(),
                }),
            };
            let path = folder.join(name.to_string());
            fs::write(&path, serde_json::to_vec(&attachment).unwrap()).unwrap();
            path
        };
        record("c1", Some("web-0"), true, "10.1.0.2");
        // The one before, that is not taken away yet.
        record("c0", Some("web-0"), true, "10.1.0.9");
        record("c2", Some("web-1"), false, "10.1.0.3");
        let unnamed = record("c3", None, true, "10.1.0.4");
        let found = pods(state.path()).unwrap();
        let [(interface, addresses)] = &found.into_iter().collect::<Vec<_>>()[..] else {
            panic!("one pod is wired");
        };
        assert_eq!(interface.pod.to_string(), "shop/web-0");
        let addresses: BTreeSet<_> = addresses.iter().map(ToString::to_string).collect();
        assert_eq!(addresses, ["10.1.0.2".into(), "10.1.0.9".into()].into());
        fs::write(unnamed, "{").unwrap();
        assert_eq!(pods(state.path()), None);
    }

    #[tokio::test]
    async fn what_the_plug_in_records_is_heard_of_at_once() {
        let state = tempfile::tempdir().unwrap();
        let mut attachments = Attachments::follow(state.path()).unwrap();
        let mut other = attachments.clone();
        assert_eq!(attachments.interfaces(), (BTreeSet::new(), None));
        let id = AttachmentId {
            network: "mesh".into(),
            container: "c1".into(),
            interface: "eth0".into(),
        };
        let name = FileName {
            key: id.key(),
            held: Vec::new(),
        };
        let attachment = Attachment {
            id,
            netns: "/run/netns/x".into(),
            host: Some(HostInterface {
                name: "veth1".into(),
                index: 7,
            }),
            addresses: Vec::new(),
            veth: None,
            pod: None,
        };
        let path = attachments_dir(state.path())
            .unwrap()
            .join(name.to_string());
        write_atomically(&path, &serde_json::to_vec(&attachment).unwrap()).unwrap();
        let limit = Duration::from_secs(10);
        let mut until = async |wanted: &dyn Fn(&BTreeSet<NamePattern>, &Option<String>) -> bool| {
            loop {
                let (names, problem) = attachments.interfaces();
                if wanted(&names, &problem) {
                    return;
                }
                time::timeout(limit, attachments.changed()).await.unwrap();
            }
        };
        let veth = BTreeSet::from([NamePattern::new("veth1".into())]);
        until(&|names, problem| *names == veth && problem.is_none()).await;
        fs::write(&path, "{").unwrap();
        let unreadable = |text: &String| text.contains("cannot be read");
        until(&|names, problem| names.is_empty() && problem.as_ref().is_some_and(unreadable)).await;
        fs::remove_file(&path).unwrap();
        until(&|names, problem| names.is_empty() && problem.is_none()).await;
        // Whoever else listens heard of it as well.
        time::timeout(limit, other.changed()).await.unwrap();
    }
}
