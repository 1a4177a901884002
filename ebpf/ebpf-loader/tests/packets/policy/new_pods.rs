//! Pods that are guarded by whoever makes them, before or without an agent that knows them.

use std::{path::Path, process::Command, time::Duration};

use ebpf_loader::{BPFFS, Pins, guard, policy::end_left};

use super::{
    interfaces::{
        Guarded, SHORT, at_bridge, becomes_so, class, connected, hears, programs_from, talks,
        unredirected,
    },
    *,
};
use crate::{
    bpffs::new_bpffs,
    lan::index,
    netns::ip,
    pods::{A, B, Name, Pod, exchange, host},
};

/// As the CNI plug-in does it.
fn guard_new(pod: Name) -> bool {
    guard_port(pod.port, None)
}

fn guard_port(port: &str, bridge: Option<NonZeroU32>) -> bool {
    guard::attach(
        Path::new(BPFFS),
        index(port),
        bridge,
        Duration::from_secs(10),
    )
    .unwrap_or_else(|error| panic!("{error}\n{error:?}"))
}

/// How many of policy's programs see the pod's packets as filters, as the plug-in attaches them.
fn filters_of(pod: Name) -> usize {
    let ways = ["ingress", "egress"].map(|way| {
        let output = Command::new("tc")
            .args(["filter", "show", "dev", pod.port, way])
            .output();
        let text = String::from_utf8(output.unwrap().stdout).unwrap();
        text.matches(" handle 0x1 hf_policy_").count()
    });
    ways.iter().sum()
}

#[test]
fn a_new_pod_is_guarded_by_what_holds_whether_an_agent_runs_or_not_and_the_next_one_takes_it_over()
{
    let (_node, a, b) = unredirected();
    new_bpffs();
    let pins = || Pins::of_policy(Path::new(BPFFS)).unwrap();
    assert!(!guard_new(B), "no agent ever ran");
    for (a_ip, b_ip) in A.addresses().into_iter().zip(B.addresses()) {
        let from_a = || hears(&a.socket(a_ip), &b.socket(b_ip));
        let from_b = || hears(&b.socket(b_ip), &a.socket(a_ip));
        let mut first = Guarded::kept(Some(pins()));
        assert!(!guard_new(B), "nothing is published yet");
        first.attach_to(&[A]);
        first.say(B, class(A), Out, DENIED);
        assert!(from_b(), "nobody guards B");
        // While it runs, before it knows the pod.
        assert!(guard_new(B) && guard_new(B));
        assert_eq!((filters_of(B), programs_from(B)), (2, 0));
        assert!(!from_b() && from_a());
        assert_eq!(first.attach_to(&[A]), 0);
        assert!(!from_b(), "it leaves alone what it does not know");
        assert_eq!(first.attach(), 1, "it is its own now");
        assert_eq!((filters_of(B), programs_from(B)), (0, 1));
        assert!(guard_new(B));
        assert_eq!(filters_of(B), 0, "the agent's own are there");
        first.attach_to(&[A]);
        becomes_so(|| programs_from(B) == 0);
        drop(first);
        // While none runs.
        assert!(from_b());
        assert!(guard_new(B));
        assert!(!from_b() && from_a());
        let (mut client, mut server) = connected(&a, &b.listener(b_ip));
        assert!(talks(&mut client, &mut server, SHORT));
        // The next one: in its place, without a moment in between.
        let mut second = Guarded::kept(Some(pins()));
        second.say(B, class(A), Out, DENIED);
        assert!(guard_new(B));
        assert_eq!(filters_of(B), 2, "still the first one's");
        assert_eq!(second.attach(), 2);
        let all = [
            filters_of(A),
            filters_of(B),
            programs_from(A),
            programs_from(B),
        ];
        assert_eq!(all, [0, 0, 1, 1]);
        assert!(!from_b() && from_a());
        assert!(talks(&mut client, &mut server, SHORT));
        assert!(talks(&mut server, &mut client, SHORT));
        second.policy.remove();
        becomes_so(from_b);
        assert!(!guard_new(B), "nothing is enforced any more");
        assert_eq!(filters_of(B), 0);
    }
}

#[test]
fn new_pods_are_free_once_nothing_is_to_be_enforced_whoever_says_so() {
    let (_node, a, b) = unredirected();
    new_bpffs();
    let pins = || Pins::of_policy(Path::new(BPFFS)).unwrap();
    let ([a_ip, _], [b_ip, _]) = (A.addresses(), B.addresses());
    let from_b = || hears(&b.socket(b_ip), &a.socket(a_ip));
    type End<'a> = &'a dyn Fn(Policy);
    let ends: [End<'_>; 3] = [
        &|policy| policy.remove(),
        &|policy| {
            drop(policy);
            end_left(pins());
        },
        &|policy| {
            drop(policy);
            assert!(pins().remove().is_empty());
        },
    ];
    for end in ends {
        let mut guarded = Guarded::kept(Some(pins()));
        guarded.attach_to(&[A]);
        assert!(guard_new(B));
        guarded.say_of_all(DENIED);
        assert!(!from_b());
        end(guarded.policy);
        becomes_so(from_b);
        assert_eq!(filters_of(B), 0);
        assert!(!guard_new(B));
    }
}

#[test]
fn an_index_that_comes_again_is_guarded_anew_and_others_filters_stay() {
    let (_node, a, b) = unredirected();
    new_bpffs();
    let pins = Pins::of_policy(Path::new(BPFFS)).unwrap();
    let mut guarded = Guarded::kept(Some(pins));
    guarded.attach_to(&[A]);
    guarded.say(B, class(A), Out, DENIED);
    assert!(guard_new(B));
    let number = index(B.port);
    ip(&["link", "del", B.port]);
    drop(b);
    let b = Pod::new(B, &["index", &number.to_string()]);
    assert_eq!(filters_of(B), 0);
    let mut tc = Command::new("tc");
    tc.args(["qdisc", "add", "dev", B.port, "clsact"]);
    assert!(tc.status().unwrap().success());
    let mut tc = Command::new("tc");
    let other = ["filter", "add", "dev", B.port, "ingress", "prio", "99"];
    tc.args(other)
        .args(["protocol", "arp", "u32", "match", "u8", "0", "0"]);
    assert!(tc.status().unwrap().success());
    assert!(guard_new(B));
    let ([a_ip, _], [b_ip, _]) = (A.addresses(), B.addresses());
    assert!(!hears(&b.socket(b_ip), &a.socket(a_ip)));
    guarded.attach();
    assert_eq!((filters_of(B), programs_from(B)), (0, 1));
    let mut tc = Command::new("tc");
    let output = tc
        .args(["filter", "show", "dev", B.port, "ingress"])
        .output();
    let text = String::from_utf8(output.unwrap().stdout).unwrap();
    assert!(text.contains("u32"), "{text}");
}

/// What a pod's start pays, for the documentation: `--nocapture`.
#[test]
fn a_pod_with_an_address_that_the_tables_do_not_have_is_judged_as_nobody_and_guarding_is_quick() {
    let (_node, a, b) = unredirected();
    new_bpffs();
    let mut guarded = Guarded::kept(Some(Pins::of_policy(Path::new(BPFFS)).unwrap()));
    for own in B.addresses() {
        guarded.tables.addresses.remove(&host(own));
    }
    guarded.apply();
    guarded.attach_to(&[A]);
    let start = std::time::Instant::now();
    assert!(guard_new(B));
    println!("guarded in {:?}", start.elapsed());
    let [a_ip, _] = A.addresses();
    let [b_ip, _] = B.addresses();
    let from_b = || hears(&b.socket(b_ip), &a.socket(a_ip));
    assert!(
        !from_b(),
        "nothing is said of nobody and A: it does not pass"
    );
    let nobody = Pair {
        local: ANYBODY,
        remote: class(A),
        direction: Out,
    };
    guarded.tables.pairs.insert(nobody, rules(ALLOWED, None));
    guarded.apply();
    assert!(from_b());
    guarded.tables.pairs.insert(nobody, rules(DENIED, None));
    guarded.apply();
    assert!(!from_b());
}

#[test]
fn a_new_pod_at_a_bridge_s_port_is_guarded_too() {
    let (_node, a, b) = at_bridge(true);
    new_bpffs();
    let mut guarded = Guarded::kept(Some(Pins::of_policy(Path::new(BPFFS)).unwrap()));
    guarded.attach_to(&[]);
    assert!(guard_port(A.port, Some(index("br0"))) && guard_port(B.port, Some(index("br0"))));
    for (a_ip, b_ip) in A.addresses().into_iter().zip(B.addresses()) {
        guarded.say_of_all(ALLOWED);
        exchange(&a.socket(a_ip), &b.socket(b_ip));
        guarded.say(B, class(A), In, DENIED);
        assert!(!hears(&a.socket(a_ip), &b.socket(b_ip)));
        guarded.say_of_all(ALLOWED);
        guarded.say(A, class(B), Out, DENIED);
        assert!(!hears(&a.socket(a_ip), &b.socket(b_ip)));
        assert!(hears(&b.socket(b_ip), &a.socket(a_ip)));
    }
}
