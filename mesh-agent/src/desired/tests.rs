use mesh_api::{
    cni::{Attachment, AttachmentId, FileName, HostInterface, PodName, attachments_dir},
    convert::{mesh_resource, node_record_bytes, node_resource, slice_resource},
    resources::digest::whole,
};
use mesh_core::snapshot::{Endpoint, EndpointSlice, MeshSettings, Node, ServiceName};
use mesh_identity::{
    authority::{CertificateAuthority, new_key},
    certificate::Validity,
};
use mesh_wire::id::{Identity, NodeId};
use tempfile::TempDir;

use super::*;

#[test]
fn an_unending_stream_of_changes_does_not_wear_out_the_disk() {
    assert_eq!(write_pause(0), Duration::from_secs(1));
    assert_eq!(write_pause(640 << 10), Duration::from_secs(10));
    assert_eq!(write_pause(1 << 30), Duration::from_secs(60));
}

/// A controller, as far as nodes see it.
pub(crate) struct Controller {
    authority: CertificateAuthority,
    store: Vec<u8>,
}

impl Controller {
    pub(crate) fn new() -> Self {
        Self {
            authority: CertificateAuthority::generate("demo", UNIX_EPOCH).unwrap(),
            store: vec![7; 16],
        }
    }

    fn credentials(&self) -> Credentials {
        self.credentials_of(1)
    }

    /// Of the node with this number, for the next minute.
    pub(crate) fn credentials_of(&self, number: u8) -> Credentials {
        let key = new_key().unwrap();
        let identity = Identity::Node {
            name: format!("edge-{number}").parse().unwrap(),
            id: NodeId([number; 32]),
        };
        let validity = Validity::from_now(SystemTime::now(), Duration::from_secs(60));
        let certificate = self
            .authority
            .issue(&identity, &key.csr_der, validity)
            .unwrap();
        let authority = self.authority.certificate_der().clone();
        Credentials::from_parts(vec![certificate], &key.key_pem, authority).unwrap()
    }

    /// All of a mesh with so many nodes, signed as this generation.
    fn tells(&self, generation: u64, nodes: u8) -> SyncResponse {
        let mesh = self.authority.mesh_id();
        let mut set = vec![mesh_resource(&MeshSettings::with_defaults(mesh, "demo"))];
        for number in 1..=nodes {
            let name: NodeName = format!("edge-{number}").parse().unwrap();
            let address = [100, 96, 0, number].into();
            let record = node_record_bytes(&Node::new(&mesh, name, NodeId([number; 32]), address));
            let signature = self.authority.sign_record(&record).unwrap();
            set.push(node_resource(record, signature));
        }
        let mut response = SyncResponse {
            store_id: self.store.clone(),
            generation,
            full: true,
            set,
            ..SyncResponse::default()
        };
        response.head = Some(self.head(&response, 1).sign(&self.authority).unwrap());
        response
    }

    fn head(&self, response: &SyncResponse, epoch: u64) -> Head {
        let mut resources = Resources::new();
        assert_eq!(apply(&mut resources, response.clone()), []);
        Head {
            store_id: self.store.clone(),
            generation: response.generation,
            epoch,
            made_unix_ms: 1_000 * response.generation,
            digest: whole(&resources).to_vec(),
            life: 5,
        }
    }
}

async fn open(controller: &Controller, folder: &TempDir) -> Desired {
    let state = Arc::new(StateFolder::open(folder.path()).unwrap());
    let credentials = controller.credentials();
    let opened = Desired::open("edge-1".parse().unwrap(), state, &credentials, None).await;
    opened.unwrap().0
}

/// A node that has this generation, with so many nodes in it.
pub(crate) async fn node(
    controller: &Controller,
    generation: u64,
    nodes: u8,
) -> (Desired, TempDir) {
    let folder = tempfile::tempdir().unwrap();
    let mut desired = open(controller, &folder).await;
    desired
        .take(controller.tells(generation, nodes))
        .await
        .unwrap();
    (desired, folder)
}

fn nodes(desired: &Desired) -> usize {
    let snapshot = desired.snapshots().borrow().clone();
    snapshot.map_or(0, |snapshot| snapshot.nodes.len())
}

fn given(response: SyncResponse) -> FetchResponse {
    FetchResponse {
        head: response.head.clone(),
        change: Some(response),
    }
}

#[tokio::test]
async fn a_neighbour_s_newer_state_is_taken_kept_and_passed_on() {
    let controller = Controller::new();
    let (newer, _folder) = node(&controller, 9, 5).await;
    let (mut older, folder) = node(&controller, 3, 2).await;
    let theirs = older.digests(1).await.unwrap();
    let given = newer.give(theirs).await.unwrap().unwrap();
    let version = older.adopt(given).await.unwrap().unwrap();
    assert_eq!((version.made_unix_ms, nodes(&older)), (9_000, 5));
    assert_eq!(older.position(), newer.position());
    assert_eq!(older.says().life, 5);
    older.next_write = None;
    older.write_if_dirty().await;
    drop(older);
    let again = open(&controller, &folder).await;
    assert_eq!((again.position(), nodes(&again)), (newer.position(), 5));
    assert_eq!(*again.version().borrow(), version);
    assert!(again.give(Vec::new()).await.unwrap().is_some());
}

#[tokio::test]
async fn what_is_not_what_the_authority_signed_changes_nothing() {
    let controller = Controller::new();
    let (mut desired, _folder) = node(&controller, 3, 2).await;
    let newer = controller.tells(9, 5);
    type Change<'a> = &'a dyn Fn(&mut FetchResponse);
    let change = |given: &mut FetchResponse, how: &dyn Fn(&mut SyncResponse)| {
        how(given.change.as_mut().unwrap());
    };
    let more = controller.tells(9, 6).set.pop().unwrap();
    let stranger = Controller::new();
    let cases: [(&str, Change<'_>); 7] = [
        ("no head", &|given| given.head = None),
        ("no change", &|given| given.change = None),
        ("a resource less", &|given| {
            change(given, &|change| drop(change.set.pop()));
        }),
        ("a resource more", &|given| {
            change(given, &|change| change.set.push(more.clone()));
        }),
        ("a head that somebody changed", &|given| {
            given.head.as_mut().unwrap().head[3] ^= 1;
        }),
        ("a head of another mesh", &|given| {
            let response = controller.tells(9, 5);
            let head = controller.head(&response, 1).sign(&stranger.authority);
            given.head = Some(head.unwrap());
        }),
        ("an older state", &|given| {
            *given = self::given(controller.tells(2, 5))
        }),
    ];
    for (name, spoil) in cases {
        let mut bad = given(newer.clone());
        spoil(&mut bad);
        let taken = desired.adopt(bad).await.unwrap();
        assert!(
            matches!(taken, Err(NotTaken::Distrusted(_))),
            "{name}: {taken:?}"
        );
        assert_eq!(
            (nodes(&desired), desired.position().generation.0),
            (2, 3),
            "{name}"
        );
    }
    assert!(desired.adopt(given(newer)).await.unwrap().is_ok());
}

#[tokio::test]
async fn nothing_is_taken_from_a_neighbour_while_a_controller_s_stream_is_open() {
    let controller = Controller::new();
    let (mut desired, _folder) = node(&controller, 3, 2).await;
    desired.follow(true);
    let newer = given(controller.tells(9, 5));
    let taken = desired.adopt(newer.clone()).await.unwrap();
    assert_eq!(taken, Err(NotTaken::NotNeeded));
    desired.follow(false);
    assert!(desired.adopt(newer).await.unwrap().is_ok());
}

#[tokio::test]
async fn what_an_older_controller_told_without_a_head_is_not_taken_back_by_a_neighbour() {
    let controller = Controller::new();
    let (mut desired, folder) = node(&controller, 3, 2).await;
    let unsigned = SyncResponse {
        head: None,
        ..controller.tells(9, 5)
    };
    desired.next_write = None;
    desired.take(unsigned).await.unwrap();
    assert_eq!(*desired.version().borrow(), Version::default());
    drop(desired);
    let mut desired = open(&controller, &folder).await;
    let lost = desired.adopt(given(controller.tells(4, 2))).await.unwrap();
    let error = lost.unwrap_err().to_string();
    assert_eq!(error, "it is older than what this node has");
    assert_eq!((nodes(&desired), desired.position().generation.0), (5, 9));
    let newer = desired.adopt(given(controller.tells(10, 6))).await.unwrap();
    assert!(newer.is_ok(), "{newer:?}");
    assert_eq!((nodes(&desired), desired.position().generation.0), (6, 10));
}

#[tokio::test]
async fn a_controller_that_went_back_is_refused_until_its_operator_lets_it() {
    let controller = Controller::new();
    let (mut desired, folder) = node(&controller, 9, 5).await;
    let error = desired.take(controller.tells(4, 2)).await.unwrap_err();
    assert!(error.to_string().contains("accept-rollback"), "{error}");
    assert_eq!((nodes(&desired), desired.position().generation.0), (5, 9));
    drop(desired);
    // Nor does a restart forget it.
    let mut desired = open(&controller, &folder).await;
    desired.take(controller.tells(4, 2)).await.unwrap_err();
    let mut accepted = controller.tells(4, 2);
    let head = controller.head(&accepted, 2);
    accepted.head = Some(head.sign(&controller.authority).unwrap());
    desired.take(accepted).await.unwrap();
    assert_eq!((nodes(&desired), desired.position().generation.0), (2, 4));
    // What counts no more is taken from nobody.
    let lost = desired.adopt(given(controller.tells(9, 5))).await.unwrap();
    assert!(matches!(lost, Err(NotTaken::Distrusted(_))), "{lost:?}");
}

#[tokio::test(start_paused = true)]
async fn a_state_is_warned_of_and_over_by_time_that_passed_and_counts_again_at_once() {
    const DAY: Duration = Duration::from_secs(86_400);
    let controller = Controller::new();
    let (mut desired, folder) = node(&controller, 3, 2).await;
    desired.follow(false);
    let standing = desired.standing();
    let later = async |desired: &mut Desired, time| {
        time::advance(time).await;
        desired.pass_time().await.unwrap();
        *standing.borrow()
    };
    assert_eq!(later(&mut desired, 14 * DAY).await, Standing::Counts);
    assert_eq!(later(&mut desired, DAY).await, Standing::Warned(15 * DAY));
    assert_eq!(nodes(&desired), 2);
    assert_eq!(later(&mut desired, 15 * DAY).await, Standing::Over);
    assert_eq!(nodes(&desired), 1, "itself");
    drop(desired);
    // A restart does not help, whatever the clock says.
    let mut desired = open(&controller, &folder).await;
    assert_eq!(
        (nodes(&desired), *desired.standing().borrow()),
        (1, Standing::Over)
    );
    desired.take(controller.tells(3, 2)).await.unwrap();
    assert_eq!(
        (nodes(&desired), *desired.standing().borrow()),
        (2, Standing::Counts)
    );
    drop(desired);
    // Nor does a loss of power right after it bring back what was counted.
    let desired = open(&controller, &folder).await;
    assert_eq!(
        (nodes(&desired), *desired.standing().borrow()),
        (2, Standing::Counts)
    );
}

#[tokio::test]
async fn a_full_disk_costs_nothing_but_the_next_start_s_news() {
    let controller = Controller::new();
    let (mut desired, folder) = node(&controller, 3, 2).await;
    // The other slot cannot be replaced, as on a full disk.
    std::fs::create_dir(folder.path().join("snapshot.1")).unwrap();
    desired.next_write = None;
    desired.take(controller.tells(4, 5)).await.unwrap();
    assert_eq!(nodes(&desired), 5);
    assert!(desired.write_due().is_some(), "it is tried again");
    drop(desired);
    let desired = open(&controller, &folder).await;
    assert_eq!((nodes(&desired), desired.position().generation.0), (2, 3));
}

fn web() -> ServiceName {
    ServiceName {
        namespace: "shop".to_owned(),
        name: "web".to_owned(),
    }
}

/// What the controller tells of a mesh with one node and a service of these endpoints on it.
fn tells_web(controller: &Controller, generation: u64, addresses: &[&str]) -> SyncResponse {
    let endpoints = addresses
        .iter()
        .map(|address| Endpoint::new(address.parse().unwrap(), Some("edge-1".parse().unwrap())));
    let slice = EndpointSlice {
        name: "web-1".to_owned(),
        ports: Vec::new(),
        endpoints: endpoints.collect(),
    };
    let mut response = controller.tells(generation, 1);
    response.set.push(slice_resource(&web(), &slice));
    let head = controller.head(&response, 1);
    response.head = Some(head.sign(&controller.authority).unwrap());
    response
}

/// As the CNI plug-in records a pod below `cni`; the file.
fn wire(cni: &Path, container: &str, pod: &str, address: &str) -> std::path::PathBuf {
    let id = AttachmentId {
        network: "mesh".to_owned(),
        container: container.to_owned(),
        interface: "eth0".to_owned(),
    };
    let name = FileName {
        key: id.key(),
        held: Vec::new(),
    };
    let attachment = Attachment {
        netns: "/run/netns/x".into(),
        host: Some(HostInterface {
            name: id.key(),
            index: 7,
        }),
        id,
        addresses: vec![address.parse().unwrap()],
        veth: None,
        pod: Some(PodName {
            namespace: "shop".to_owned(),
            name: pod.to_owned(),
        }),
    };
    let folder = attachments_dir(cni).unwrap();
    std::fs::create_dir_all(&folder).unwrap();
    let path = folder.join(name.to_string());
    std::fs::write(&path, serde_json::to_vec(&attachment).unwrap()).unwrap();
    path
}

fn served(desired: &Desired) -> Vec<String> {
    let snapshot = desired.snapshots().borrow().clone().unwrap();
    let endpoints = snapshot.endpoints(&web());
    endpoints.map(|(_, one)| one.address.to_string()).collect()
}

#[tokio::test]
async fn until_a_controller_speaks_endpoints_are_where_the_plug_in_wired_their_pods() {
    let controller = Controller::new();
    let (folder, cni) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let open = async || {
        let state = Arc::new(StateFolder::open(folder.path()).unwrap());
        let (node, credentials) = ("edge-1".parse().unwrap(), controller.credentials());
        let opened = Desired::open(node, state, &credentials, Some(cni.path()));
        opened.await.unwrap().0
    };
    let told = ["10.1.0.2", "10.1.0.3", "10.1.0.4"]; // The last one is somebody else's.
    let first = wire(cni.path(), "c1", "web-0", told[0]);
    let mut desired = open().await;
    desired.follow(true);
    desired
        .take(tells_web(&controller, 3, &told))
        .await
        .unwrap();
    assert_eq!(served(&desired), told);
    // What the plug-in records is known a moment later than what the controller says.
    assert!(desired.write_due().is_none());
    let second = wire(cni.path(), "c2", "web-1", told[1]);
    desired.handle_pods(crate::cni::pods(cni.path()));
    assert!(desired.write_due().is_some());
    desired.write_if_dirty().await;
    drop(desired);

    // While the node was down one pod moved, and one is not back.
    std::fs::remove_file(first).unwrap();
    std::fs::remove_file(second).unwrap();
    let moved = wire(cni.path(), "c3", "web-1", "10.1.0.9");
    let mut desired = open().await;
    assert_eq!(served(&desired), ["10.1.0.9", "10.1.0.4"]);
    wire(cni.path(), "c4", "web-0", "10.1.0.8");
    let mut seen = desired.snapshots();
    desired.handle_pods(crate::cni::pods(cni.path()));
    assert!(seen.has_changed().unwrap());
    assert_eq!(served(&desired), ["10.1.0.8", "10.1.0.9", "10.1.0.4"]);
    seen.mark_unchanged();
    desired.handle_pods(crate::cni::pods(cni.path()));
    assert!(!seen.has_changed().unwrap(), "nothing is other than before");

    // A neighbour's word is no controller's.
    let newer = tells_web(&controller, 4, &told);
    desired.adopt(given(newer.clone())).await.unwrap().unwrap();
    assert_eq!(served(&desired), ["10.1.0.8", "10.1.0.9", "10.1.0.4"]);

    // The controller's word counts, also that nothing changed; and no more when it is gone.
    let nothing = SyncResponse {
        full: false,
        set: Vec::new(),
        ..newer
    };
    desired.follow(true);
    desired.take(nothing).await.unwrap();
    assert_eq!(served(&desired), told);
    desired.follow(false);
    assert_eq!(served(&desired), ["10.1.0.8", "10.1.0.9", "10.1.0.4"]);

    // What cannot be read corrects nothing.
    std::fs::write(moved, "{").unwrap();
    desired.handle_pods(crate::cni::pods(cni.path()));
    assert_eq!(served(&desired), told);
}
