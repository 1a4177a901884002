use mesh_core::policy::resources::Labels;

use super::*;
use crate::manifests::Object;

#[test]
fn nothing_counts_before_every_kind_was_listed_once() {
    let mut cluster = Cluster::default();
    for kind in KINDS {
        assert!(cluster.awaited(false).contains(&kind));
        cluster.handle(Event::ListBegins(kind));
        cluster.handle(Event::ListEnds(kind));
    }
    assert!(cluster.awaited(false).is_empty());
    let of_policies: BTreeSet<_> = KINDS_OF_POLICIES.into_iter().collect();
    assert_eq!(cluster.awaited(true), of_policies);
    cluster.handle(Event::Set(item(Kind::MeshPolicy, "p", 1).into()));
    assert_eq!(cluster.awaited(false), of_policies);
}

#[test]
fn a_list_that_does_not_end_takes_nothing_away() {
    let mut cluster = listed(&["a", "b"]);
    cluster.handle(Event::ListBegins(Kind::Service));
    cluster.handle(Event::Listed(item(Kind::Service, "a", 1).into()));
    assert_eq!(names(&cluster), ["a", "b"]);
    // The watch breaks, and begins again.
    cluster.handle(Event::ListBegins(Kind::Service));
    assert_eq!(names(&cluster), ["a", "b"]);
    cluster.handle(Event::Listed(item(Kind::Service, "b", 1).into()));
    let changed = cluster.handle(Event::ListEnds(Kind::Service));
    assert_eq!(changed.desired, Change::Any);
    assert_eq!(names(&cluster), ["b"]);
}

#[test]
fn the_same_list_again_is_no_change_and_keeps_every_object_in_its_place() {
    let mut cluster = listed(&["a", "b"]);
    let place = |cluster: &Cluster| {
        let loaded = cluster.objects()[0].resource.as_ref().unwrap();
        std::sync::Arc::as_ptr(&loaded.1)
    };
    cluster.handle(Event::Set(namespace("n").into()));
    let had = place(&cluster);
    cluster.handle(Event::ListBegins(Kind::Namespace));
    cluster.handle(Event::Listed(namespace("n").into()));
    cluster.handle(Event::ListEnds(Kind::Namespace));
    cluster.handle(Event::ListBegins(Kind::Namespace));
    cluster.handle(Event::Listed(namespace("n").into()));
    let changed = cluster.handle(Event::ListEnds(Kind::Namespace));
    assert_eq!(changed, Changed::default());
    assert_eq!(place(&cluster), had);
}

#[test]
fn an_object_that_breaks_stays_as_it_was_until_it_is_another() {
    let mut cluster = listed(&["a"]);
    let broken = |uid: &str| {
        let mut broken = item(Kind::Service, "a", 1);
        broken.uid = uid.to_owned();
        broken.loaded = None;
        broken.problem = Some(FieldProblem::new("spec.type", "is not known"));
        Event::Set(broken.into())
    };
    assert_eq!(cluster.handle(broken("")).desired, Change::Any);
    assert_eq!(names(&cluster), ["a"]);
    assert_eq!(cluster.problems(), ["Service d/a: spec.type: is not known"]);
    assert!(cluster.handle(broken("")).desired.is_nothing());

    assert_eq!(cluster.handle(broken("another")).desired, Change::Any);
    assert_eq!(names(&cluster), [""; 0]);
    cluster.handle(Event::Set(item(Kind::Service, "a", 1).into()));
    assert_eq!(cluster.problems(), [""; 0]);
}

#[test]
fn a_status_that_comes_back_changes_nothing_of_what_the_mesh_is() {
    let mut cluster = listed(&["a"]);
    let mut with_status = item(Kind::Service, "a", 1);
    with_status.status = serde_json::json!({"conditions": []});
    let changed = cluster.handle(Event::Set(with_status.into()));
    let expected = Changed {
        desired: Change::Nothing,
        status: true,
    };
    assert_eq!(changed, expected);
}

#[test]
fn who_was_made_first_comes_first() {
    let mut cluster = Cluster::default();
    for (name, created) in [("a", 3), ("b", 1), ("c", 2)] {
        cluster.handle(Event::Set(item(Kind::Service, name, created).into()));
    }
    assert_eq!(names(&cluster), ["b", "c", "a"]);
}

#[test]
fn trouble_is_told_and_over() {
    let mut cluster = Cluster::default();
    let trouble = || Event::Trouble(Kind::Pod, "gone".to_owned());
    assert_eq!(cluster.handle(trouble()).desired, Change::Any);
    assert!(cluster.handle(trouble()).desired.is_nothing());
    let expected = "the API server cannot be asked for Pod objects: gone";
    assert_eq!(cluster.problems(), [expected]);
    assert_eq!(cluster.handle(Event::Well(Kind::Pod)).desired, Change::Any);
    assert!(cluster.handle(Event::Well(Kind::Pod)).desired.is_nothing());
    assert_eq!(cluster.problems(), [""; 0]);
}

fn listed(names: &[&str]) -> Cluster {
    let mut cluster = Cluster::default();
    cluster.handle(Event::ListBegins(Kind::Service));
    for name in names {
        cluster.handle(Event::Listed(item(Kind::Service, name, 1).into()));
    }
    cluster.handle(Event::ListEnds(Kind::Service));
    cluster
}

fn item(kind: Kind, name: &str, created_unix_s: i64) -> Item {
    let id = ObjectId {
        kind,
        namespace: "d".to_owned(),
        name: name.to_owned(),
    };
    Item::new(id, created_unix_s, Ok(Object::Service(None)))
}

fn namespace(name: &str) -> Item {
    let id = ObjectId {
        kind: Kind::Namespace,
        namespace: String::new(),
        name: name.to_owned(),
    };
    let object = Object::Namespace(name.to_owned(), Labels::new());
    // The first of all objects.
    Item::new(id, 0, Ok(object))
}

fn names(cluster: &Cluster) -> Vec<&str> {
    let objects = cluster.objects().into_iter();
    objects.map(|loaded| loaded.id.name.as_str()).collect()
}
