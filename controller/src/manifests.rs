//! The folder of manifests: read again when it changes, and good until it is good again.

use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::OsStr,
    fmt, fs,
    io::{self, Read as _},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use mesh_api::{
    control::{Resource, ResourceKey},
    convert::{
        community_resource, key,
        policy::{mesh_policy_resource, namespace_resource, network_policy_resource, pod_resource},
        relay_resource, service_resource, slice_resource,
    },
};
use mesh_core::{
    policy::resources::{DefaultAction, Labels, MeshPolicy, NetworkPolicy, Pod},
    snapshot::{
        Balance, EndpointSlice, ExternalPeer, Locality, Mapping, Relay, Service, ServiceName,
    },
};
use mesh_wire::id::{NodeName, SiteName};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use ipnet::{IpNet, Ipv4Net};
use ring::digest::{SHA256, digest};

use self::parse::parse_file;
use crate::change::Change;

pub mod approve;
pub mod parse;
pub mod watch;

pub(crate) mod kinds;

/// Longest manifest file: 20,000 endpoints at some 200 bytes, four times over.
pub const FILE_BYTES_MAX: u64 = 16 << 20;

/// Most manifest files.
pub const FILES_MAX: usize = 10_000;

/// A file that changed less than so long before it was read is read again: another change may bear the same time, which
/// file systems count in steps of 4 ms, some of 2 s (FAT).
const SAME_TIME: Duration = Duration::from_secs(2);

/// Where an object stands. The order is that in which objects count when they collide.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Source {
    /// In a manifest.
    File {
        /// The file's name in the folder.
        file: String,
        /// The document in it, from 1.
        document: usize,
        /// The item of a `kind: List`, from 0.
        item: Option<usize>,
        /// The line in the file at which the document begins, from 1.
        line: usize,
    },
    /// In a Kubernetes cluster: who was made first comes first.
    Cluster {
        /// When it was made, as Unix seconds.
        created_unix_s: i64,
    },
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File {
                file,
                document,
                item,
                line,
            } => {
                write!(f, "{file}:{line}: document {document}")?;
                match item {
                    Some(item) => write!(f, ": items[{item}]"),
                    None => Ok(()),
                }
            }
            Self::Cluster { .. } => f.write_str("the cluster"),
        }
    }
}

impl Source {
    /// The place of the object `id` here, for people.
    #[must_use]
    pub fn place(&self, id: &ObjectId) -> String {
        match self {
            Self::File { .. } => format!("{self}: {id}"),
            Self::Cluster { .. } => id.to_string(),
        }
    }
}

/// The kinds that the mesh knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// `v1`.
    Service,
    /// `discovery.k8s.io/v1`.
    EndpointSlice,
    /// `v1`.
    Node,
    /// `mesh.holdfast.dev/v1alpha1`, as those below.
    MeshNode,
    /// A relay.
    MeshRelay,
    /// A plain WireGuard device.
    ExternalPeer,
    /// The mesh's settings.
    MeshConfig,
    /// How a service's flows are spread.
    MeshService,
    /// Who may speak with whom.
    MeshPolicy,
    /// LAN subnets behind gateways.
    SiteRoute,
    /// Sites that may connect directly.
    Community,
    /// `networking.k8s.io/v1`.
    NetworkPolicy,
    /// `v1`: whom policies select.
    Pod,
    /// `v1`.
    Namespace,
}

/// What makes an object the same object in another place.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct ObjectId {
    /// Its kind.
    pub kind: Kind,
    /// Its namespace; empty if the kind has none.
    pub namespace: String,
    /// Its name.
    pub name: String,
}

impl fmt::Display for ObjectId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            kind,
            namespace,
            name,
        } = self;
        if namespace.is_empty() {
            write!(f, "{kind:?} {name}")
        } else {
            write!(f, "{kind:?} {namespace}/{name}")
        }
    }
}

/// An object, checked by itself. Whether it agrees with the others is `desired`'s business.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Object {
    /// A service; `None`: another proxy's, to be left alone.
    Service(Option<Service>),
    /// Some of a service's endpoints.
    Slice(ServiceName, EndpointSlice),
    /// What Kubernetes says of a node.
    Node(NodeFacts),
    /// What the operator says of a node.
    MeshNode(NodeFacts),
    /// A relay.
    Relay(Relay),
    /// A plain WireGuard device.
    ExternalPeer(ExternalPeer),
    /// The mesh's settings.
    Config(Config),
    /// How a service's flows are spread.
    Balance(ServiceName, Balance),
    /// Who may speak with whom.
    MeshPolicy(MeshPolicy),
    /// The same, of pods.
    NetworkPolicy(NetworkPolicy),
    /// A pod; `None`: it has no address (any more).
    Pod(Option<Pod>),
    /// A namespace's labels.
    Namespace(String, Labels),
    /// Sites that may connect directly, by the community's name.
    Community(String, BTreeSet<SiteName>),
    /// LAN subnets behind gateways, each as the mesh sees it.
    Route(Vec<NodeName>, Vec<Mapping>),
}

/// What a manifest says of a node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeFacts {
    /// Its name.
    pub name: NodeName,
    /// Its overlay IPv4 address, if the operator chose one.
    pub overlay_v4: Option<Ipv4Addr>,
    /// Where it is.
    pub locality: Locality,
    /// Prefixes behind it.
    pub prefixes: Vec<IpNet>,
    /// Its own addresses.
    pub underlay_addresses: Vec<IpAddr>,
    /// Addresses where it is reachable for sure.
    pub static_candidates: Vec<SocketAddr>,
    /// Whether it may join although joining needs approval.
    pub approved: bool,
}

/// What a manifest says of the mesh.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Config {
    /// Overlay IPv4 addresses come from here.
    pub overlay_v4: Option<Ipv4Net>,
    /// Zone of the services.
    pub cluster_domain: Option<String>,
    /// Zone of the node names.
    pub node_domain: Option<String>,
    /// MTU of the overlay.
    pub mtu_bytes: Option<u16>,
    /// What happens to flows of which no policy says anything.
    pub default_action: Option<DefaultAction>,
    /// For how many days nodes count on what they have while no controller speaks; 0: for ever.
    pub offline_limit_days: Option<u32>,
    /// Whether nodes wait until they are approved.
    pub manual_approval: bool,
}

/// An object and where it stands.
#[derive(Debug, Clone, PartialEq)]
pub struct Loaded {
    /// What it is.
    pub id: ObjectId,
    /// Where it stands.
    pub source: Source,
    /// What it says.
    pub object: Object,
    /// What agents are told of it, when no other object changes that: made once, and shared with what is published.
    pub(crate) resource: Option<(ResourceKey, Arc<Resource>)>,
}

impl Loaded {
    /// The object `id` at `source`.
    #[must_use]
    pub fn new(id: ObjectId, source: Source, object: Object) -> Self {
        let resource = own_resource(&object).and_then(|resource| {
            // What was just made from checked parts has a key.
            let key = key(&resource).ok()?;
            Some((key, Arc::new(resource)))
        });
        Self {
            id,
            source,
            object,
            resource,
        }
    }

    /// The mesh's settings, if it is such.
    #[must_use]
    pub fn config(&self) -> Option<&Config> {
        if let Object::Config(config) = &self.object {
            Some(config)
        } else {
            None
        }
    }

    /// The service, if it is one of ours.
    #[must_use]
    pub fn service(&self) -> Option<&Service> {
        if let Object::Service(Some(service)) = &self.object {
            Some(service)
        } else {
            None
        }
    }

    /// Whether it is a policy of either kind.
    #[must_use]
    pub fn is_policy(&self) -> bool {
        matches!(
            self.object,
            Object::MeshPolicy(_) | Object::NetworkPolicy(_)
        )
    }

    /// Where it stands and what it is, for people.
    #[must_use]
    pub fn place(&self) -> String {
        self.source.place(&self.id)
    }
}

/// What agents are told of `object`, if that depends on nothing else (of a service: unless a
/// MeshService says more).
fn own_resource(object: &Object) -> Option<Resource> {
    match object {
        Object::Service(Some(service)) => Some(service_resource(service)),
        Object::Slice(service, slice) => Some(slice_resource(service, slice)),
        Object::Relay(relay) => Some(relay_resource(relay)),
        Object::MeshPolicy(policy) => Some(mesh_policy_resource(policy)),
        Object::NetworkPolicy(policy) => Some(network_policy_resource(policy)),
        Object::Pod(Some(pod)) => Some(pod_resource(pod)),
        Object::Namespace(name, labels) => Some(namespace_resource(name, labels)),
        Object::Community(name, sites) => Some(community_resource(name, sites)),
        Object::Service(None)
        | Object::Pod(None)
        | Object::Node(_)
        | Object::MeshNode(_)
        | Object::ExternalPeer(_)
        | Object::Config(_)
        | Object::Balance(..)
        | Object::Route(..) => None,
    }
}

/// The folder as it last was good.
#[derive(Debug, Default)]
pub struct Folder {
    files: BTreeMap<String, File>,
    problem: Option<String>,
    /// How many files were ever read, and parsed.
    reads: u64,
    parses: u64,
}

#[derive(Debug, Default)]
struct File {
    /// Of what was read last; `None`: it may change without another one.
    stamp: Option<Stamp>,
    hash: [u8; 32],
    objects: BTreeMap<ObjectId, Loaded>,
    problems: Vec<String>,
}

/// Where a file is, how large, and when it and what the system says of it last changed: as long as that is the same, so is
/// the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stamp {
    device: u64,
    inode: u64,
    size_bytes: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Stamp {
    fn of(metadata: &fs::Metadata) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            size_bytes: metadata.size(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        }
    }

    /// It, if the file's times are so old at `now` that another change will have others.
    fn if_old(metadata: &fs::Metadata, now: SystemTime) -> Option<Self> {
        let modified = metadata.modified().ok()?;
        let age = now.duration_since(modified).ok()?;
        let changed =
            SystemTime::UNIX_EPOCH + Duration::from_secs(metadata.ctime().try_into().ok()?);
        let age = age.min(now.duration_since(changed).ok()?);
        (age > SAME_TIME).then(|| Self::of(metadata))
    }
}

impl File {
    /// What it changes that the file holds these. What is the same stays the same, so that it is known by its place.
    fn becomes(&self, objects: &mut BTreeMap<ObjectId, Loaded>, problems: &[String]) -> Change {
        let same = self.problems == problems && self.objects.keys().eq(objects.keys());
        let mut changed = Change::any_if(!same);
        for (id, now) in objects {
            if let Some(before) = self.objects.get(id) {
                changed |= Change::of(before, now);
                if before.object == now.object {
                    now.resource.clone_from(&before.resource);
                }
            }
        }
        changed
    }
}

/// What a scan of the folder changed.
#[derive(Debug, Default, PartialEq)]
pub struct Scanned {
    /// What objects or problems may be others than before.
    pub changed: Change,
    /// Files that are good now, with their text, and files that are gone (`None`): to be
    /// remembered, so that a restart with a broken file takes nothing away either.
    pub remember: BTreeMap<String, Option<String>>,
}

impl Folder {
    /// Begins with what was remembered.
    #[must_use]
    pub fn restore(remembered: &BTreeMap<String, String>) -> Self {
        let files = remembered.iter().map(|(name, text)| {
            let objects = by_id(parse_file(name, text).objects, &mut Vec::new());
            let file = File {
                objects,
                ..File::default()
            };
            (name.clone(), file)
        });
        Self {
            files: files.collect(),
            ..Self::default()
        }
    }

    /// Reads what changed in the folder at `path`: of 10,000 files that did not, only what the system says of them. A file with a problem takes nothing away: its
    /// good objects are taken, and those that it had before and that are not good in it now stay.
    pub fn scan(&mut self, path: &Path) -> Scanned {
        let mut scanned = Scanned::default();
        let (reads, parses) = (self.reads, self.parses);
        let names = match list(path) {
            Ok(names) => names,
            Err(error) => {
                let problem = format!("{}: {error}", path.display());
                scanned.changed = Change::any_if(self.problem.as_ref() != Some(&problem));
                self.problem = Some(problem);
                return scanned;
            }
        };
        scanned.changed = Change::any_if(self.problem.take().is_some());
        let gone = self.files.keys().filter(|name| !names.contains_key(*name));
        for name in gone.cloned().collect::<Vec<_>>() {
            self.files.remove(&name);
            scanned.changed = Change::Any;
            scanned.remember.insert(name, None);
        }
        for (name, path) in names {
            self.scan_file(name, &path, true, &mut scanned);
        }
        let (read, parsed) = (self.reads - reads, self.parses - parses);
        tracing::debug!(
            files = self.files.len(),
            read,
            parsed,
            "the folder was read"
        );
        scanned
    }

    /// Reads a folder, or one file.
    pub fn scan_at(&mut self, path: &Path) {
        match path.file_name().and_then(OsStr::to_str) {
            Some(name) if path.is_file() => {
                self.scan_file(name.to_owned(), path, true, &mut Scanned::default());
            }
            Some(_) | None => drop(self.scan(path)),
        }
    }

    /// Reads these files in the folder at `path`, soon after they changed: takes what they bring. What one of them no
    /// longer holds may be in another file that is still on its way, so that such a file, and one with a problem,
    /// stays as it was until [`Self::scan`].
    pub fn scan_files(&mut self, path: &Path, names: &BTreeSet<String>) -> Scanned {
        let mut scanned = Scanned::default();
        for name in names {
            if self.files.contains_key(name) || self.files.len() < FILES_MAX {
                self.scan_file(name.clone(), &path.join(name), false, &mut scanned);
            }
        }
        scanned
    }

    /// How many objects there are, also those that are left out as there is another one.
    #[must_use]
    pub fn len(&self) -> usize {
        self.files.values().map(|file| file.objects.len()).sum()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether there are policies.
    #[must_use]
    pub fn has_policies(&self) -> bool {
        let mut objects = self.files.values().flat_map(|file| file.objects.values());
        objects.any(Loaded::is_policy)
    }

    /// Every object that is in force, in the order of the files, and what is wrong.
    #[must_use]
    pub fn objects(&self) -> (Vec<&Loaded>, Vec<String>) {
        let mut problems: Vec<String> = self.problem.iter().cloned().collect();
        let mut found: BTreeMap<&ObjectId, &Loaded> = BTreeMap::new();
        for file in self.files.values() {
            problems.extend(file.problems.iter().cloned());
            for (id, loaded) in &file.objects {
                if let Some(first) = found.get(id) {
                    problems.push(duplicate(loaded, &first.source));
                } else {
                    found.insert(id, loaded);
                }
            }
        }
        let mut objects: Vec<_> = found.into_values().collect();
        objects.sort_by(|a, b| a.source.cmp(&b.source));
        (objects, problems)
    }

    fn scan_file(&mut self, name: String, path: &Path, settled: bool, scanned: &mut Scanned) {
        let file = self.files.entry(name.clone()).or_default();
        // A file that somebody told has changed.
        if settled && file.stamp.is_some() && file.stamp == stamp(path) {
            return;
        }
        self.reads += 1;
        let (text, stamp) = match read(path) {
            Ok(read) => read,
            Err(_) if !settled => return,
            Err(error) => {
                let problems = vec![format!("{name}: {error}")];
                scanned.changed |= Change::any_if(file.problems != problems);
                file.problems = problems;
                // So that it is parsed when it can be read again.
                (file.stamp, file.hash) = (None, [0; 32]);
                return;
            }
        };
        let hash = digest(&SHA256, text.as_bytes());
        let hash = hash.as_ref().first_chunk().copied().unwrap_or_default();
        if file.hash == hash {
            file.stamp = stamp;
            return;
        }
        self.parses += 1;
        let parsed = parse_file(&name, &text);
        let mut problems = parsed.problems;
        let mut objects = by_id(parsed.objects, &mut problems);
        let takes_away = || file.objects.keys().any(|id| !objects.contains_key(id));
        if !settled && (!problems.is_empty() || takes_away()) {
            return;
        }
        if problems.is_empty() {
            scanned.remember.insert(name, Some(text));
        } else {
            for (id, loaded) in &file.objects {
                let kept = || loaded.clone();
                objects.entry(id.clone()).or_insert_with(kept);
            }
        }
        scanned.changed |= file.becomes(&mut objects, &problems);
        *file = File {
            stamp,
            hash,
            objects,
            problems,
        };
    }
}

/// The first of each; the others become problems.
fn by_id(objects: Vec<Loaded>, problems: &mut Vec<String>) -> BTreeMap<ObjectId, Loaded> {
    let mut found: BTreeMap<ObjectId, Loaded> = BTreeMap::new();
    for loaded in objects {
        match found.get(&loaded.id) {
            Some(first) => problems.push(duplicate(&loaded, &first.source)),
            None => {
                found.insert(loaded.id.clone(), loaded);
            }
        }
    }
    found
}

pub(crate) fn duplicate(loaded: &Loaded, first: &Source) -> String {
    format!(
        "{}: is already at {first}; this one is left out",
        loaded.place()
    )
}

/// Manifest files directly in the folder, by name. Hidden ones and other endings are passed over:
/// editors and Kubernetes' ConfigMap volumes keep such things there.
fn list(folder: &Path) -> io::Result<BTreeMap<String, PathBuf>> {
    let mut names = BTreeMap::new();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if let Some(name) = manifest_name(&path).map(ToOwned::to_owned)
            && !path.is_dir()
        {
            if names.len() == FILES_MAX {
                let text = format!("has more than {FILES_MAX} manifest files");
                return Err(io::Error::other(text));
            }
            names.insert(name, path);
        }
    }
    Ok(names)
}

fn manifest_name(path: &Path) -> Option<&str> {
    let name = path.file_name()?.to_str()?;
    let ending = path.extension()?.to_str()?;
    let manifest = matches!(ending, "yaml" | "yml" | "json");
    (manifest && !name.starts_with('.')).then_some(name)
}

/// What the system says of the file at `path`, or of what it leads to.
fn stamp(path: &Path) -> Option<Stamp> {
    fs::metadata(path).ok().as_ref().map(Stamp::of)
}

/// The file, and by what it is known to be the same again.
fn read(path: &Path) -> io::Result<(String, Option<Stamp>)> {
    let mut file = fs::File::open(path)?;
    // Before it is read: what is written meanwhile has another.
    let metadata = file.metadata()?;
    let length = metadata.len();
    if length > FILE_BYTES_MAX {
        let text = format!("has {length} bytes, more than {FILE_BYTES_MAX}");
        return Err(io::Error::other(text));
    }
    let mut text = String::new();
    file.read_to_string(&mut text)?;
    Ok((text, Stamp::if_old(&metadata, SystemTime::now())))
}

#[cfg(test)]
mod tests;
