//! Several controllers that share a store in etcd, and what befalls them.

use std::{collections::BTreeSet, fmt::Write as _, time::Duration};

use prost::Message as _;
use tokio::time::Instant;
use tonic::Code;

use crate::{
    etcd_lab::{EtcdLab, TOKEN_TTL, join_somewhere},
    lab::{Agent, until},
};

/// How long after a leader was last heard of another leads: the lease of 10 s, a round of 2 s, and the time
/// that a machine with two cores takes.
const HANDOVER: Duration = Duration::from_secs(20);

fn services(count: usize) -> String {
    let mut text = String::new();
    for number in 0..count {
        let (high, low) = (number / 250, number % 250 + 1);
        writeln!(
            text,
            "---\napiVersion: v1\nkind: Service\nmetadata: {{name: s{number}, namespace: shop}}\nspec: {{clusterIP: 10.96.{high}.{low}, ports: [{{name: http, port: 80}}]}}"
        )
        .unwrap();
    }
    text
}

#[test]
fn two_controllers_that_let_nodes_in_at_once_give_nothing_twice() {
    EtcdLab::inside("", async |lab| {
        const NODES: u8 = 40;
        let [c1, c2] = lab.controllers.as_slice() else {
            panic!("two controllers");
        };
        let token = c1.token(u32::from(NODES) + 1).await;
        let joins = (0..NODES).map(|seed| {
            let (token, name) = (token.clone(), format!("n{seed}"));
            async move {
                let controllers = &[c1, c2];
                let controller = controllers[usize::from(seed % 2)];
                controller.join(&token, &name, seed + 1).await
            }
        });
        for joined in futures_util::future::join_all(joins).await {
            joined.unwrap();
        }
        // One name, two keys, at the same moment: one of them has it.
        let (first, second) =
            tokio::join!(c1.join(&token, "twin", 201), c2.join(&token, "twin", 202));
        let refused: Vec<_> = [first, second]
            .into_iter()
            .filter_map(Result::err)
            .collect();
        let [refused] = refused.as_slice() else {
            panic!("{refused:?}");
        };
        assert!(
            matches!(refused.code(), Code::AlreadyExists | Code::PermissionDenied),
            "{refused}"
        );
        // A key that another node has is refused by the controller that did not see it join, too.
        let token = c2.token(1).await;
        let taken = c2.join(&token, "thief", 1).await.unwrap_err();
        assert_eq!(taken.code(), Code::AlreadyExists, "{taken}");

        for controller in [c1, c2] {
            let nodes = until("every node is known", async || {
                let nodes = controller.nodes().await;
                (nodes.len() == usize::from(NODES) + 1).then_some(nodes)
            })
            .await;
            let addresses: BTreeSet<_> = nodes
                .iter()
                .map(|node| &node.overlay_addresses[0])
                .collect();
            assert_eq!(addresses.len(), nodes.len(), "{addresses:?}");
            let uses: Vec<_> = controller.tokens().await;
            let left: Vec<_> = uses.iter().map(|token| token.uses_left).collect();
            assert_eq!(left.iter().sum::<u32>(), 1, "{uses:?}");
        }
    });
}

#[test]
fn one_member_less_stops_nothing_and_two_less_only_joining() {
    EtcdLab::inside(&services(20), async |lab| {
        let token = lab.controllers[0].token(20).await;
        let credentials = lab.controllers[0].join(&token, "a", 1).await.unwrap();
        let mut agent = Agent::new(lab.controllers[1].address, &credentials, None).await;

        lab.members[0].kill();
        join_somewhere(&lab.controllers, 0, &token, "b", 2).await;
        join_somewhere(&lab.controllers, 1, &token, "c", 3).await;
        agent
            .until(|view| view.contains_key("node b") && view.contains_key("node c"))
            .await;
        lab.members[0].start();

        // Cut off in silence: its connections stay open, and nothing comes.
        lab.members[1].cut(true);
        join_somewhere(&lab.controllers, 0, &token, "d", 4).await;
        join_somewhere(&lab.controllers, 1, &token, "e", 5).await;
        agent
            .until(|view| view.contains_key("node d") && view.contains_key("node e"))
            .await;
        // A controller that followed the one that is cut off first had to leave it.
        for controller in &lab.controllers {
            until("every node is known", async || {
                (controller.nodes().await.len() == 5).then_some(())
            })
            .await;
        }

        // No majority: nobody joins, and is told so in time; who is in is served, here and there.
        lab.members[0].kill();
        let asked = Instant::now();
        let refused = lab.controllers[0].join(&token, "f", 6).await.unwrap_err();
        assert_eq!(refused.code(), Code::Unavailable, "{refused}");
        assert!(
            asked.elapsed() < Duration::from_secs(20),
            "{:?}",
            asked.elapsed()
        );
        for controller in &lab.controllers {
            let fresh = Agent::new(controller.address, &credentials, None).await;
            assert!(fresh.view().contains_key("node e"));
            until("the trouble is told", async || {
                let problems = controller.problems().await;
                let told = problems
                    .iter()
                    .any(|one| one.contains("what other controllers do"));
                told.then_some(())
            })
            .await;
        }
        lab.controllers[1].write_manifest(&services(21));
        let mut agent = Agent::new(lab.controllers[1].address, &credentials, Some(agent)).await;
        agent
            .until(|view| view.contains_key("service shop/s20"))
            .await;

        lab.members[1].cut(false);
        lab.members[0].start();
        join_somewhere(&lab.controllers, 0, &token, "f", 6).await;
        agent.until(|view| view.contains_key("node f")).await;
        assert_eq!(agent.removed(), [""; 0]);
        for controller in &lab.controllers {
            until("nothing is wrong any more", async || {
                controller.problems().await.is_empty().then_some(())
            })
            .await;
        }
    });
}

#[test]
fn a_controller_killed_while_nodes_join_leaves_nothing_half_done() {
    EtcdLab::inside("", async |lab| {
        const NODES: u8 = 24;
        let token = lab.controllers[1].token(u32::from(NODES)).await;
        let mut next = 0;
        for round in 0..3 {
            let (killed, rest) = lab.controllers.split_at_mut(1);
            let (killed, other) = (&mut killed[0], &rest[0]);
            let names: Vec<u8> = (next..next + NODES / 3).collect();
            next += NODES / 3;
            {
                let joins = names.iter().map(|seed| {
                    let (token, name) = (&token, format!("n{seed}"));
                    let killed = &*killed;
                    async move { killed.join(token, &name, seed + 1).await }
                });
                // The answers of those that are under way then are lost.
                let joins = futures_util::future::join_all(joins);
                let moment = Duration::from_millis(5 + 25 * round);
                tokio::time::timeout(moment, joins).await.ok();
            }
            killed.kill();
            // As agents do: with the same key and token, at the other one.
            for seed in names {
                other
                    .join(&token, &format!("n{seed}"), seed + 1)
                    .await
                    .unwrap();
            }
            killed.start();
        }
        for controller in &lab.controllers {
            let nodes = until("every node is known", async || {
                let nodes = controller.nodes().await;
                (nodes.len() == usize::from(NODES)).then_some(nodes)
            })
            .await;
            let addresses: BTreeSet<_> = nodes
                .iter()
                .map(|node| &node.overlay_addresses[0])
                .collect();
            assert_eq!(addresses.len(), nodes.len());
            // Each cost one use, however often it asked.
            let tokens = controller.tokens().await;
            assert_eq!(tokens[0].uses_left, 0, "{tokens:?}");
        }
    });
}

#[test]
fn the_lead_passes_on_when_the_leader_stalls_is_cut_off_or_stops() {
    EtcdLab::inside("", async |lab| {
        let first = lab.leader().await;
        let other = 1 - first;
        let said = |lab: &EtcdLab, which: usize, text: &str| {
            lab.controllers[which].log().matches(text).count()
        };
        assert_eq!(said(lab, other, "leads now"), 0);

        // Stalled: it wakes after its lease, and by its own clock it leads no more before it asks anybody.
        lab.controllers[first].signal("-STOP");
        let stalled = Instant::now();
        until("the other leads", async || {
            (said(lab, other, "leads now") == 1).then_some(())
        })
        .await;
        assert!(stalled.elapsed() < HANDOVER, "{:?}", stalled.elapsed());
        let holder = lab.value("/holdfast/leader");
        lab.controllers[first].signal("-CONT");
        until("it knows", async || {
            (said(lab, first, "leads no more") == 1).then_some(())
        })
        .await;
        assert_eq!(lab.value("/holdfast/leader"), holder);

        // Cut off from etcd.
        lab.controllers[other].cut(true);
        until("the first leads again", async || {
            (said(lab, first, "leads now") == 2).then_some(())
        })
        .await;
        lab.controllers[other].cut(false);
        until("it knows too", async || {
            (said(lab, other, "leads no more") == 1).then_some(())
        })
        .await;
        assert_ne!(lab.value("/holdfast/leader"), holder);

        // Stopped in an orderly way, it leaves the lead at once.
        lab.controllers[first].stop();
        let stopped = Instant::now();
        until("the other leads again", async || {
            (said(lab, other, "leads now") == 2).then_some(())
        })
        .await;
        assert!(
            stopped.elapsed() < Duration::from_secs(8),
            "{:?}",
            stopped.elapsed()
        );
    });
}

#[test]
fn a_password_is_read_anew_and_a_token_that_ended_is_followed_by_another() {
    EtcdLab::inside_with_login(async |lab| {
        let [c1, c2] = lab.controllers.as_mut_slice() else {
            panic!("two controllers");
        };
        // A wrong password is told at once, and asked for again: whoever corrects it need not restart anything.
        c1.set_password("sesame");
        c1.begin();
        let refused =
            "user holdfast: etcdserver: authentication failed, invalid user ID or password";
        until("the password is refused", async || {
            c1.log().contains(refused).then_some(())
        })
        .await;
        assert!(!c1.log().contains("mesh-controller serves"));
        c1.set_password("open-sesame\n");
        until("it serves", async || {
            c1.log().contains("mesh-controller serves").then_some(())
        })
        .await;
        c2.set_password("open-sesame");
        c2.start();
        assert!(!c2.log().contains(refused));

        let token = c1.token(3).await;
        let credentials = c1.join(&token, "a", 1).await.unwrap();
        until("the other knows it", async || {
            (c2.nodes().await.len() == 1).then_some(())
        })
        .await;
        let mut agent = Agent::new(c2.address, &credentials, None).await;
        // Whom nobody used for so long, etcd knows no more; that is nothing that a node would notice.
        tokio::time::sleep(TOKEN_TTL * 2).await;
        for (controller, name, seed) in [(&*c1, "b", 2), (&*c2, "c", 3)] {
            let said = || controller.log().matches("invalid auth token").count();
            let before = said();
            controller.join(&token, name, seed).await.unwrap();
            assert!(said() > before, "{}", controller.log());
        }
        agent
            .until(|view| view.contains_key("node b") && view.contains_key("node c"))
            .await;
        for controller in [c1, c2] {
            until("nothing is wrong", async || {
                controller.problems().await.is_empty().then_some(())
            })
            .await;
        }
        // Nor does a change of who may what: tokens from before it count no more.
        lab.etcdctl(&["--user=root:the-root-of-all", "user", "add", "other:x"]);
        let [c1, c2] = lab.controllers.as_slice() else {
            panic!("two controllers");
        };
        let token = c2.token(1).await;
        c1.join(&token, "d", 4).await.unwrap();
        agent.until(|view| view.contains_key("node d")).await;
    });
}

#[test]
fn a_node_that_moves_to_another_controller_is_told_what_differs() {
    const SERVICES: usize = 3000;
    EtcdLab::inside(&services(SERVICES), async |lab| {
        let [c1, c2] = lab.controllers.as_slice() else {
            panic!("two controllers");
        };
        let token = c1.token(2).await;
        let credentials = c1.join(&token, "a", 1).await.unwrap();
        let other = c2.join(&token, "b", 2).await.unwrap();
        let mut agent = Agent::new(c1.address, &credentials, None).await;
        agent
            .until(|view| view.contains_key("node a") && view.contains_key("node b"))
            .await;
        let everything = agent.told[0].encoded_len();
        let mut reference = Agent::new(c2.address, &other, None).await;
        reference
            .until(|view| view.contains_key("node a") && view.contains_key("node b"))
            .await;

        // Nothing differs, not even the nodes that each controller signed for itself.
        let before = agent.view();
        let agent = Agent::new(c2.address, &credentials, Some(agent)).await;
        let [same] = agent.told.as_slice() else {
            panic!("{} answers", agent.told.len());
        };
        assert_eq!(
            (same.full, same.set.len(), same.removed.len()),
            (false, 0, 0)
        );
        // The signed head alone is some 160.
        assert!(same.encoded_len() < 250, "{} bytes", same.encoded_len());
        assert_eq!(agent.view(), before);

        // While it is away, one service changes and one goes.
        let with = agent.has.clone();
        let changed = services(SERVICES - 1).replace("10.96.3.7,", "10.97.3.7,");
        let published = || c1.log().matches("published generation").count();
        let before = published();
        c1.write_manifest(&changed);
        c2.write_manifest(&changed);
        reference
            .until(|view| !view.contains_key("service shop/s2999"))
            .await;
        until("the first controller saw it, too", async || {
            (published() > before).then_some(())
        })
        .await;
        let mut agent = Agent::new(c1.address, &credentials, Some(agent)).await;
        agent
            .until(|view| !view.contains_key("service shop/s2999"))
            .await;
        assert_ne!(agent.has.store_id, with.store_id);
        let told: usize = agent.told.iter().map(prost::Message::encoded_len).sum();
        assert!(agent.told.iter().all(|told| !told.full));
        assert!(
            told * 20 < everything,
            "{told} bytes, where everything is {everything}"
        );
        // What is the same stayed, and what is there now is what the other controller tells.
        let strip = |mut view: std::collections::BTreeMap<String, String>| {
            view.retain(|key, _| !key.starts_with("node "));
            view
        };
        assert_eq!(strip(agent.view()), strip(reference.view()));
        println!("moved with {told} bytes; everything is {everything}");
    });
}
