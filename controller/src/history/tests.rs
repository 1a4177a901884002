use std::convert::Infallible;

use mesh_api::{
    control::{Relay, resource_key::Kind},
    resources::{Encoded, Resources, apply, digest::digests},
};

use super::*;

#[test]
fn a_delta_has_each_changed_key_once_and_nothing_else() {
    let mut history = History::default();
    go(&mut history, &[("a", 1), ("b", 1)]);
    let had = history.generation();
    go(&mut history, &[("a", 2), ("b", 1), ("c", 1)]);
    go(&mut history, &[("a", 3), ("b", 1)]);
    let delta = history.since(b"s", Some(had));
    assert!(!delta.full);
    assert_eq!(delta.set, [relay("a", 3)]);
    assert_eq!(delta.removed, [key("c")]);
}

#[test]
fn who_has_everything_is_told_nothing() {
    let mut history = History::default();
    go(&mut history, &[("a", 1)]);
    let delta = history.since(b"s", Some(history.generation()));
    assert_eq!(
        (delta.full, delta.set.len(), delta.removed.len()),
        (false, 0, 0)
    );
}

#[test]
fn the_same_state_is_no_new_generation() {
    let mut history = History::default();
    go(&mut history, &[("a", 1)]);
    assert_eq!(plan(&history, &[("a", 1)]), None);
}

#[test]
fn another_store_or_a_later_generation_gets_everything() {
    let mut history = History::default();
    go(&mut history, &[("a", 1)]);
    for known in [None, Some(history.generation() + 1)] {
        let answer = history.since(b"s", known);
        assert!(answer.full && answer.set == [relay("a", 1)]);
    }
}

#[test]
fn a_removal_that_is_forgotten_costs_a_full_answer_and_no_earlier() {
    let mut history = History::default();
    go(&mut history, &[("first", 1)]);
    let before = history.generation();
    go(&mut history, &[]);
    let after = history.generation();
    let many: Vec<_> = (0..REMOVED_MAX)
        .map(|number| format!("r{number}"))
        .collect();
    let many: Vec<_> = many.iter().map(|name| (name.as_str(), 1)).collect();
    go(&mut history, &many);
    go(&mut history, &[]);
    assert!(history.since(b"s", Some(before)).full);
    assert!(!history.since(b"s", Some(after)).full);
    assert_eq!(history.removed.len(), REMOVED_MAX);
}

#[test]
fn agents_that_came_at_any_time_end_up_with_the_same_resources() {
    let steps: [&[(&str, u16)]; 6] = [
        &[("a", 1)],
        &[("a", 1), ("b", 1)],
        &[("b", 2)],
        &[("a", 3), ("b", 2), ("c", 1)],
        &[("a", 3)],
        &[("a", 3), ("b", 1)],
    ];
    let mut history = History::default();
    let mut agents: Vec<(Option<u64>, Resources)> = Vec::new();
    for (number, step) in steps.iter().enumerate() {
        go(&mut history, step);
        assert_eq!(history.kinds()[&Kind::Relay], step.len() as u64);
        agents.push((None, Resources::new()));
        for (index, (known, resources)) in agents.iter_mut().enumerate() {
            // Each agent misses some steps.
            if (number + index).is_multiple_of(2) || number == steps.len() - 1 {
                let answer = history.since(b"s", *known);
                *known = Some(answer.generation);
                assert_eq!(apply(resources, answer), []);
            }
        }
    }
    for (_, resources) in agents {
        let names: Vec<_> = resources.values().map(Encoded::decode).collect();
        assert_eq!(names, [relay("a", 3), relay("b", 1)]);
    }
}

fn go(history: &mut History, wanted: &[(&str, u16)]) {
    if let Some(step) = plan(history, wanted) {
        history.apply(step);
    }
}

fn plan(history: &History, wanted: &[(&str, u16)]) -> Option<Step> {
    let wanted = wanted.iter();
    let wanted =
        wanted.map(|(name, port)| (key(name), Wanted::Resource(relay(name, *port).into())));
    let unsigned = |_| Ok::<_, Infallible>(Resource::default());
    let Ok(step) = history.plan(wanted.collect(), unsigned);
    step
}

fn key(name: &str) -> ResourceKey {
    ResourceKey {
        kind: Kind::Relay.into(),
        name: name.to_owned(),
    }
}

fn relay(name: &str, port: u16) -> Resource {
    Resource {
        kind: Some(resource::Kind::Relay(Relay {
            name: name.to_owned(),
            quic_port: port.into(),
            ..Relay::default()
        })),
    }
}

#[test]
fn a_node_of_another_store_is_told_the_buckets_that_differ_and_what_changed_since() {
    let mut history = History::default();
    let many = |skip: usize| -> Vec<_> { (0..500).filter(|n| *n != skip).collect() };
    let wanted = |numbers: &[usize], changed: usize| -> BTreeMap<ResourceKey, Wanted> {
        let resources = numbers.iter().map(|&n| {
            let address = if n == changed { "b" } else { "a" };
            let relay = Relay {
                name: format!("r{n}"),
                addresses: vec![address.to_owned()],
                ..Relay::default()
            };
            let kind = Some(resource::Kind::Relay(relay));
            let resource = Arc::new(Resource { kind });
            let key = mesh_api::convert::key(&resource).unwrap();
            (key, Wanted::Resource(resource))
        });
        resources.collect()
    };
    let step = |history: &mut History, wanted| {
        let step = history.plan(wanted, |_| Err(())).unwrap();
        history.apply(step.unwrap());
    };
    // The node has what the mesh once was, from elsewhere.
    step(&mut history, wanted(&many(1), 2));
    let mut had = Resources::new();
    assert_eq!(apply(&mut had, history.since(b"elsewhere", None)), []);
    step(&mut history, wanted(&many(3), 4));

    let index = Arc::new(history.index());
    let theirs = digests(&had, index.buckets());
    let differing = index.clone().compare(&theirs).unwrap();
    // Something changes in a differing bucket, and elsewhere, before the node is told.
    step(&mut history, wanted(&many(4), 5));
    let answer = history.since_differing(b"here", &differing);
    assert!(!answer.full);
    assert!(answer.set.len() < 500 / 3, "{} of 500", answer.set.len());
    assert!(answer.set.len() > 4);
    let rejected = apply(&mut had, answer);
    assert_eq!(rejected, []);
    let mut all = Resources::new();
    assert_eq!(apply(&mut all, history.since(b"here", None)), []);
    assert_eq!(had, all);

    let same = Arc::new(history.index());
    let theirs = digests(&had, same.buckets());
    let nothing = same.clone().compare(&theirs).unwrap();
    assert_eq!(history.differing_bytes(&nothing), 0);
    assert_eq!(history.since_differing(b"here", &nothing).set, []);
    assert!(same.compare(&[1]).is_none());
}
