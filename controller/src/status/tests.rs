use mesh_wire::id::MeshId;

use super::*;
use crate::{
    cluster,
    desired::desired,
    manifests::{
        Object,
        parse::{FieldProblem, parse_file},
    },
    store::{Nodes, Registered},
};

const T0: i64 = 1_800_000_000;

#[test]
fn an_accepted_object_is_told_once() {
    let mut lab = Lab::new("kind: MeshRelay\nspec: {addresses: [192.0.2.1]}", &[]);
    let due = lab.due(T0);
    let status = &due.statuses[&lab.id(Kind::MeshRelay)];
    assert_eq!(status["conditions"][0]["reason"], "Accepted");
    assert_eq!(
        status["conditions"][0]["lastTransitionTime"],
        "2027-01-15T08:00:00Z"
    );
    lab.write(&due);
    assert_eq!(lab.due(T0 + 9), Due::default());
}

#[test]
fn a_condition_keeps_its_time_while_it_says_the_same() {
    let mut lab = Lab::new("kind: Community\nspec: {sites: [a]}", &[]);
    let due = lab.due(T0);
    let id = lab.id(Kind::Community);
    let condition = &due.statuses[&id]["conditions"][0];
    assert_eq!(condition["reason"], "Accepted");
    assert_eq!(condition["status"], "True");
    lab.write(&due);
    let mut item = lab.cluster.get(&id).unwrap().clone();
    item.generation = 2;
    lab.cluster.handle(cluster::Event::Set(item.into()));
    let due = lab.due(T0 + 60);
    let condition = &due.statuses[&id]["conditions"][0];
    assert_eq!(condition["observedGeneration"], 2);
    assert_eq!(condition["lastTransitionTime"], "2027-01-15T08:00:00Z");
}

#[test]
fn what_is_wrong_with_ours_is_a_condition_and_with_others_an_event_alone() {
    let mut lab = Lab::new("kind: MeshRelay\nspec: {addresses: [192.0.2.1]}", &[]);
    for kind in [Kind::MeshRelay, Kind::Service] {
        let problem = FieldProblem::new("spec.x", "is odd".repeat(400));
        let item = Item::new(lab.id(kind), T0, Err(problem));
        lab.cluster.handle(cluster::Event::Set(item.into()));
    }
    let due = lab.due(T0);
    let condition = &due.statuses[&lab.id(Kind::MeshRelay)]["conditions"][0];
    assert_eq!(condition["reason"], "Invalid");
    let message = condition["message"].as_str().unwrap();
    assert!(message.starts_with("spec.x: is odd"), "{message}");
    assert!(message.ends_with("(what it said before stays in force)"));
    let [event, own] = due.events.as_slice() else {
        panic!("{:?}", due.events);
    };
    assert_eq!((own.id.kind, own.reason), (Kind::MeshRelay, "Invalid"));
    assert_eq!(
        (event.id.kind, event.reason, event.note.len()),
        (Kind::Service, "NotInMesh", telling::NOTE_LEN_MAX)
    );
}

#[test]
fn a_node_is_seen_to_the_hour_and_its_end_to_the_second() {
    let mut lab = Lab::new("kind: MeshNode\nspec: {}", &["a"]);
    let id = lab.id(Kind::MeshNode);
    lab.see(true, T0, 5);
    let due = lab.due(T0);
    let status = due.statuses[&id].clone();
    assert_eq!(status["connected"], true);
    assert_eq!(status["lastSeen"], "2027-01-15T08:00:00Z");
    assert_eq!(status["snapshotGeneration"], 5);
    assert_eq!(status["overlayAddresses"][0], "100.96.0.1");
    lab.write(&due);
    // Thousands of generations later, nothing is written.
    lab.see(true, T0 + 3000, 9000);
    assert_eq!(lab.due(T0 + LAST_SEEN_S - 1), Due::default());
    let due = lab.due(T0 + LAST_SEEN_S);
    assert_eq!(due.statuses[&id]["snapshotGeneration"], 9000);
    lab.write(&due);
    lab.see(false, T0 + 4000, 9001);
    let due = lab.due(T0 + 4001);
    let status = &due.statuses[&id];
    assert_eq!(status["lastSeen"], "2027-01-15T09:06:40Z");
    assert_eq!(status["conditions"][2]["reason"], "Disconnected");
    assert_eq!(status["connected"], false);
}

#[test]
fn a_node_that_comes_and_goes_is_missed_when_it_did_not_come_twice() {
    let mut lab = Lab::new("kind: MeshNode\nspec: {}", &["a"]);
    let id = lab.id(Kind::MeshNode);
    lab.returns_within_s = 3600;
    lab.see(true, T0, 5);
    lab.write(&lab.due(T0));
    lab.see(false, T0 + 2, 5);
    let due = lab.due(T0 + 2);
    let status = &due.statuses[&id];
    assert_eq!(status["connected"], true);
    assert_eq!(status["conditions"][2]["reason"], "Visits");
    let missed_at = T0 + 2 + 2 * 3600 + START_GRACE_S;
    assert_eq!(status["missedAt"], moment(missed_at));
    lab.write(&due);
    assert_eq!(lab.due(missed_at - 1), Due::default());
    // A visit is written once, when it is over.
    lab.see(true, T0 + 3000, 6);
    assert_eq!(lab.due(T0 + 3000), Due::default());
    lab.see(false, T0 + 3002, 6);
    assert_eq!(
        lab.due(T0 + 3002).statuses[&id]["missedAt"],
        moment(missed_at + 3000)
    );
    // A controller that began anew goes by what the last one wrote.
    lab.seen.clear();
    lab.began = T0 + 4000;
    assert_eq!(lab.due(missed_at - 1), Due::default());
    let due = lab.due(missed_at);
    assert_eq!(due.statuses[&id]["connected"], false);
    assert_eq!(due.statuses[&id]["conditions"][2]["reason"], "Disconnected");
    // One that came by another way out since stays, and is gone when it goes.
    lab.returns_within_s = 0;
    lab.see(true, missed_at, 7);
    let due = lab.due(missed_at);
    assert_eq!(due.statuses[&id].get("missedAt"), None);
    assert_eq!(due.statuses[&id]["conditions"][2]["reason"], "Connected");
    // Nobody may say that it comes in a hundred years.
    lab.returns_within_s = u32::MAX;
    lab.see(false, missed_at, 7);
    let day = i64::from(RETURNS_WITHIN_S_MAX);
    assert_eq!(
        lab.due(missed_at + 2 * day + START_GRACE_S).statuses[&id]["connected"],
        false
    );
}

#[test]
fn what_a_node_says_of_itself_is_written_as_often_as_it_is_worth() {
    let mut lab = Lab::new("kind: MeshNode\nspec: {}", &["a"]);
    let id = lab.id(Kind::MeshNode);
    let report = |nat, paths| Report { nat, paths };
    lab.see(true, T0, 5);
    let due = lab.due(T0);
    assert_eq!(due.statuses[&id].get("nat"), None);
    assert_eq!(due.statuses[&id]["snapshotTime"], "2027-01-15T08:00:00Z");
    lab.write(&due);
    // A NAT is written at once, and takes the rest along.
    lab.report = report(Some("Hard"), Some([1, 2, 0]));
    lab.see(true, T0 + 10, 5);
    lab.generation = 6;
    let due = lab.due(T0 + 10);
    let status = &due.statuses[&id];
    assert_eq!(status["nat"], "Hard");
    assert_eq!(
        status["paths"],
        json!({"direct": 1, "relayed": 2, "unreachable": 0})
    );
    // It does not have the newest generation: what it serves from is as old as before.
    assert_eq!(status["snapshotTime"], "2027-01-15T08:00:00Z");
    lab.write(&due);
    // Paths come and go; that it does not know its NAT just now says nothing.
    lab.report = report(None, Some([3, 0, 0]));
    lab.see(true, T0 + 20, 6);
    assert_eq!(lab.due(T0 + PATHS_S - 1), Due::default());
    let due = lab.due(T0 + PATHS_S);
    let status = &due.statuses[&id];
    assert_eq!(
        (&status["nat"], &status["paths"]["direct"]),
        (&json!("Hard"), &json!(3))
    );
    assert_eq!(status["snapshotTime"], status["lastSeen"]);
    lab.write(&due);
    assert_eq!(lab.due(T0 + 3 * PATHS_S), Due::default());
}

#[test]
fn a_node_that_was_taken_out_is_told_apart_from_one_that_never_joined() {
    let mut lab = Lab::new("kind: MeshNode\nspec: {}", &[]);
    let id = lab.id(Kind::MeshNode);
    let joined = |due: &Due| due.statuses[&id]["conditions"][1].clone();
    assert_eq!(joined(&lab.due(T0))["reason"], "NeverJoined");
    lab.desired.removed.insert("a".parse().unwrap(), T0);
    let removed = joined(&lab.due(T0 + 9));
    assert_eq!(
        (&removed["status"], &removed["reason"]),
        (&json!("False"), &json!("Removed"))
    );
    let message = removed["message"].as_str().unwrap();
    assert!(message.contains("2027-01-15T08:00:00Z"), "{message}");
    assert_eq!(lab.due(T0 + 9).missing, []);
}

#[test]
fn a_controller_that_begins_says_of_nobody_that_it_is_gone() {
    let mut lab = Lab::new("kind: MeshNode\nspec: {}", &["a"]);
    lab.see(true, T0, 5);
    let due = lab.due(T0);
    lab.write(&due);
    lab.seen.clear();
    lab.began = T0 + 100;
    assert_eq!(lab.due(T0 + 100), Due::default());
    assert_eq!(lab.due(T0 + 100 + START_GRACE_S).statuses.len(), 1);
}

#[test]
fn nodes_without_an_object_get_one_and_those_that_wait_are_told_how_to_get_in() {
    let mut lab = Lab::new("kind: MeshNode\nspec: {}", &["a", "b"]);
    let pending = Pending {
        id: NodeId([7; 32]),
        address: Some([203, 0, 113, 7].into()),
        since_unix_s: T0,
    };
    lab.pending.insert("c".parse().unwrap(), pending);
    let missing: Vec<_> = lab.due(T0).missing;
    let missing: Vec<_> = missing.iter().map(|name| name.as_str()).collect();
    assert_eq!(missing, ["b", "c"]);

    lab.pending.insert("a".parse().unwrap(), pending);
    let due = lab.due(T0);
    let joined = &due.statuses[&lab.id(Kind::MeshNode)]["conditions"][1];
    assert_eq!(joined["reason"], "AwaitingApproval");
    assert!(
        joined["message"]
            .as_str()
            .unwrap()
            .starts_with("it asked to join from 203.0.113.7 with key ")
    );
}

#[test]
fn each_controller_speaks_of_its_own_nodes_and_the_leader_of_all_else() {
    let mut lab = Lab::new("kind: MeshNode\nspec: {}", &["a"]);
    let id = lab.id(Kind::MeshNode);
    lab.role = Role::Follower("two");
    assert_eq!(lab.due(T0), Due::default());
    lab.see(true, T0, 5);
    let due = lab.due(T0);
    assert_eq!(due.statuses[&id]["connected"], true);
    assert_eq!(due.statuses[&id]["controller"], "two");
    lab.write(&due);

    // The leader never saw it, and leaves that to the other.
    let seen = std::mem::take(&mut lab.seen);
    lab.role = Role::Leader("one");
    lab.began = T0 - 1000;
    assert_eq!(lab.due(T0 + 1), Due::default());
    // Only when the other is silent for long, it is gone, and so is the node.
    let due = lab.due(T0 + 2 * LAST_SEEN_S + 1);
    assert_eq!(due.statuses[&id]["connected"], false);

    // It moved to the leader: the other says no more that it is gone.
    lab.see(true, T0 + 5, 6);
    let due = lab.due(T0 + 5);
    assert_eq!(due.statuses[&id]["controller"], "one");
    lab.write(&due);
    lab.role = Role::Follower("two");
    lab.seen = seen;
    lab.see(false, T0 + 6, 5);
    assert_eq!(lab.due(T0 + 6), Due::default());
}

#[test]
fn a_node_that_waits_at_another_controller_still_waits() {
    let mut lab = Lab::new("kind: MeshNode\nspec: {}", &[]);
    let pending = Pending {
        id: NodeId([7; 32]),
        address: Some([203, 0, 113, 7].into()),
        since_unix_s: T0,
    };
    lab.role = Role::Follower("two");
    lab.pending.insert("a".parse().unwrap(), pending);
    let due = lab.due(T0);
    let id = lab.id(Kind::MeshNode);
    assert_eq!(
        due.statuses[&id]["conditions"][1]["reason"],
        AWAITING_APPROVAL
    );
    lab.write(&due);
    lab.role = Role::Leader("one");
    lab.pending.clear();
    assert_eq!(lab.due(T0 + START_GRACE_S), Due::default());
}

#[test]
fn an_event_tells_what_became_of_a_node_once() {
    let mut lab = Lab::new("kind: MeshNode\nspec: {}", &[]);
    let pending = Pending {
        id: NodeId([7; 32]),
        address: None,
        since_unix_s: T0,
    };
    lab.pending.insert("a".parse().unwrap(), pending);
    let told = |lab: &mut Lab, at: i64| {
        let due = lab.due(at);
        lab.write(&due);
        assert_eq!(lab.due(at).events, []);
        let told = due.events.into_iter();
        told.map(|event| (event.is_warning, event.reason))
            .collect::<Vec<_>>()
    };
    assert_eq!(told(&mut lab, T0), [(true, AWAITING_APPROVAL)]);
    // From somewhere else: the condition says so, and nobody is told again.
    lab.pending.get_mut("a").unwrap().address = Some([192, 0, 2, 9].into());
    assert_eq!(told(&mut lab, T0 + 1), []);
    lab.pending.clear();
    let joined = |lab: &mut Lab, seed: u8| {
        let id = NodeId([seed; 32]);
        let node = Node::new(
            &MeshId([3; 32]),
            "a".parse().unwrap(),
            id,
            [100, 96, 0, 1].into(),
        );
        lab.desired.nodes.insert("a".parse().unwrap(), node);
    };
    joined(&mut lab, 1);
    assert_eq!(told(&mut lab, T0 + 2), [(false, "Joined")]);
    joined(&mut lab, 2);
    let due = lab.due(T0 + 3);
    let [event] = due.events.as_slice() else {
        panic!("{:?}", due.events);
    };
    assert_eq!(event.reason, "Rejoined");
    for seed in [1, 2] {
        let key = NodeId([seed; 32]).to_string();
        assert!(event.note.contains(&key), "{}", event.note);
    }
    lab.write(&due);
    lab.desired.nodes.clear();
    lab.desired.removed.insert("a".parse().unwrap(), T0 + 4);
    assert_eq!(told(&mut lab, T0 + 4), [(false, "Removed")]);
}

#[test]
fn a_certificate_that_nobody_renews_is_told_before_it_ends_also_of_a_node_that_is_away() {
    const DAY_S: i64 = 86_400;
    let mut lab = Lab::new("kind: MeshNode\nspec: {}", &["a"]);
    let id = lab.id(Kind::MeshNode);
    let told = |lab: &mut Lab, at: i64| {
        let due = lab.due(at);
        lab.write(&due);
        let told = due.events.iter().map(|event| event.reason);
        let told: Vec<_> = told.collect();
        let status = &lab.cluster.get(&id).unwrap().status;
        let condition = &status["conditions"][3];
        assert_eq!(condition["type"], "CertificateCurrent");
        (told, condition["reason"].as_str().unwrap().to_owned())
    };
    let said = |told: &[&'static str], reason: &str| (told.to_vec(), reason.to_owned());
    let ends = T0 + 60 * DAY_S;
    lab.certificate_ends = Some(ends);
    lab.see(true, T0, 5);
    assert_eq!(told(&mut lab, T0), said(&["Joined"], "Current"));
    // Another controller, which never saw the node, goes by what the last one wrote.
    lab.seen.clear();
    assert_eq!(told(&mut lab, ends - 15 * DAY_S), said(&[], "Current"));
    let late = ends - 15 * DAY_S + 1;
    assert_eq!(
        told(&mut lab, late),
        said(&["RenewalOverdue"], "RenewalOverdue")
    );
    assert_eq!(told(&mut lab, ends - 1), said(&[], "RenewalOverdue"));
    assert_eq!(told(&mut lab, ends), said(&["Expired"], "Expired"));
    lab.certificate_ends = Some(ends + 60 * DAY_S);
    lab.see(true, ends + 1, 6);
    assert_eq!(told(&mut lab, ends + 1), said(&["Renewed"], "Current"));
    // Who is out has none.
    lab.desired.nodes.clear();
    let status = &lab.due(ends + 2).statuses[&id];
    assert_eq!(status.get("certificateExpires"), None);
    assert_eq!(status["conditions"].as_array().unwrap().len(), 3);
}

#[test]
fn a_policy_that_cannot_be_honoured_is_told_and_again_when_it_is_wrong_in_another_way() {
    let mut lab = Lab::new("kind: MeshRelay\nspec: {addresses: [192.0.2.1]}", &[]);
    let told = |lab: &mut Lab, kind: Kind, text: &str| {
        let problem = FieldProblem::new("spec.ports[0]", text);
        let item = Item::new(lab.id(kind), T0, Err(problem));
        lab.cluster.handle(cluster::Event::Set(item.into()));
        let due = lab.due(T0);
        let of_kind = due.events.iter().filter(|event| event.id.kind == kind);
        let told: Vec<_> = of_kind.cloned().collect();
        lab.write(&due);
        told
    };
    for kind in [Kind::MeshPolicy, Kind::NetworkPolicy] {
        for text in ["is odd", "is strange"] {
            let told = told(&mut lab, kind, text);
            let [event] = told.as_slice() else {
                panic!("{told:?}");
            };
            assert_eq!(
                (event.is_warning, event.reason),
                (true, "PolicyNotEnforced")
            );
            assert!(event.note.contains(text), "{}", event.note);
        }
    }
    // What was written of it is not told a second time.
    assert!(
        lab.due(T0)
            .events
            .iter()
            .all(|event| event.id.kind == Kind::NetworkPolicy)
    );
}

#[test]
fn a_service_without_a_ready_endpoint_is_told_once_and_when_it_has_one() {
    let slice = |ready| {
        format!(
            "kind: MeshService\nspec: {{policy: least-latency}}\n---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\n\
             metadata: {{name: a-1, labels: {{kubernetes.io/service-name: a}}}}\naddressType: IPv4\n\
             endpoints: [{{addresses: [10.0.0.1], conditions: {{ready: {ready}}}}}]"
        )
    };
    let mut lab = Lab::new(&slice(false), &[]);
    let due = lab.due(T0);
    let (id, status) = due.statuses.first_key_value().unwrap();
    let condition = &status["conditions"][1];
    assert_eq!(condition["type"], "EndpointsReady");
    assert_eq!(condition["reason"], "NoEndpoint");
    lab.write(&due);
    assert_eq!(lab.due(T0 + 1), Due::default());
    let better = Lab::new(&slice(true), &[]).due(T0);
    assert_eq!(better.statuses[id]["conditions"][1]["status"], "True");
    let other = Lab::new("kind: MeshRelay\nspec: {addresses: [192.0.2.1]}", &[]);
    let status = &other.due(T0).statuses[&other.id(Kind::MeshRelay)];
    assert_eq!(status["conditions"].as_array().unwrap().len(), 1);
}

struct Lab {
    cluster: Cluster,
    desired: Desired,
    seen: BTreeMap<NodeName, Seen>,
    pending: BTreeMap<NodeName, Pending>,
    began: i64,
    role: Role<'static>,
    report: Report,
    returns_within_s: u32,
    certificate_ends: Option<i64>,
    generation: u64,
}

impl Lab {
    /// An object named `a`, and nodes that joined.
    fn new(object: &str, nodes: &[&str]) -> Self {
        let head = "apiVersion: mesh.holdfast.dev/v1alpha1\nmetadata: {name: a}\n";
        let parsed = parse_file("m.yaml", &format!("{head}{object}"));
        assert_eq!(parsed.problems, [""; 0]);
        let mut cluster = Cluster::default();
        for loaded in parsed.objects {
            let object: Object = loaded.object;
            let mut item = Item::new(loaded.id, T0, Ok(object));
            item.generation = 1;
            cluster.handle(cluster::Event::Set(item.into()));
        }
        let nodes = nodes.iter().zip(1..).map(|(name, seed)| {
            let address = [100, 96, 0, seed].into();
            let registered = Registered::new(NodeId([seed; 32]), address);
            (name.parse().unwrap(), registered)
        });
        let nodes: Nodes = nodes.collect();
        let desired = desired(&cluster.objects(), &nodes, MeshId([3; 32]), "demo");
        Self {
            cluster,
            desired,
            seen: BTreeMap::new(),
            pending: BTreeMap::new(),
            began: T0,
            role: Role::Sole,
            report: Report::default(),
            returns_within_s: 0,
            certificate_ends: None,
            generation: 0,
        }
    }

    fn due(&self, now_unix_s: i64) -> Due {
        due(&Mesh {
            role: self.role,
            cluster: &self.cluster,
            desired: &self.desired,
            seen: &self.seen,
            pending: &self.pending,
            generation: self.generation,
            began_unix_s: self.began,
            now_unix_s,
        })
    }

    fn id(&self, kind: Kind) -> ObjectId {
        ObjectId {
            kind,
            namespace: String::new(),
            name: "a".to_owned(),
        }
    }

    fn see(&mut self, connected: bool, at_unix_s: i64, generation: u64) {
        let seen = Seen {
            connected,
            at_unix_s,
            generation,
            returns_within_s: self.returns_within_s,
            certificate_ends_unix_s: self.certificate_ends,
            report: self.report,
        };
        self.seen.insert("a".parse().unwrap(), seen);
    }

    /// As if the API server had taken it, and the watch told so.
    fn write(&mut self, due: &Due) {
        for (id, status) in &due.statuses {
            let mut item = self.cluster.get(id).unwrap().clone();
            item.status = status.clone();
            self.cluster.handle(cluster::Event::Set(item.into()));
        }
    }
}
