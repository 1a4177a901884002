use super::*;
use crate::services::Tier;
use crate::snapshot::{Place, WEIGHT_MAX, Weight};

fn endpoint(number: usize) -> SocketAddr {
    let [.., high, low] = number.to_be_bytes();
    ([10, 42, high, low], 80).into()
}

fn at<T>(tier: T, number: usize, weight: u16) -> Weighted<T> {
    let endpoint = endpoint(number);
    Weighted {
        tier,
        endpoint,
        weight,
    }
}

fn weighted(policy: Policy) -> Balance {
    let anywhere = Weight {
        place: Place::Region("r".into()),
        weight: 1,
    };
    Balance {
        policy,
        weights: vec![anywhere],
        ..Balance::default()
    }
}

/// How often each of the first endpoints is in the list.
fn counts(list: &[SocketAddr], endpoints: usize) -> Vec<usize> {
    let count = |number| list.iter().filter(|&&one| one == endpoint(number)).count();
    (0..endpoints).map(count).collect()
}

#[test]
fn without_weights_each_endpoint_is_there_once_sorted_and_nearest_counts() {
    let (near, far) = (Tier::SameNode, Tier::Anywhere);
    let chosen = vec![at(near, 2, 1), at(near, 1, 1), at(far, 2, 1)];
    let list = slots(&Balance::default(), 1, chosen);
    assert_eq!(list, [endpoint(1), endpoint(2)]);
    for policy in [Policy::Random, Policy::ConsistentHash, Policy::RoundRobin] {
        assert_eq!(slots::<Tier>(&weighted(policy), 1, Vec::new()), []);
    }
}

#[test]
fn weights_are_repetitions_without_a_common_divisor_and_evenly_mixed() {
    let near = Tier::SameNode;
    let chosen = vec![at(near, 0, 4), at(near, 1, 2), at(near, 2, 2)];
    let list = slots(&weighted(Policy::RoundRobin), 1, chosen);
    let [a, b, c] = [0, 1, 2].map(endpoint);
    assert_eq!(list, [a, b, c, a]);
    let alike = vec![at(near, 0, 7), at(near, 1, 7)];
    assert_eq!(slots(&weighted(Policy::Random), 1, alike), [a, b]);
}

#[test]
fn weights_that_would_fill_a_list_are_rounded_and_nobody_is_left_out() {
    let near = Tier::SameNode;
    for (count, longest) in [
        (2, 256),
        (100, 500),
        (1_024, 4_096),
        (3_000, 4_096),
        (4_096, 4_096),
    ] {
        // The first takes a hundredth of the second, all others 97 and 89 in turn.
        let weight = |number| match number {
            0 => 1,
            1 => WEIGHT_MAX,
            even if even % 2 == 0 => 97,
            _ => 89,
        };
        let chosen = (0..count).map(|number| at(near, number, weight(number)));
        let list = slots(&weighted(Policy::Random), 1, chosen.collect());
        assert!(list.len() <= longest, "{count}: {}", list.len());
        let counts = counts(&list, count);
        assert!(counts.iter().all(|&times| times > 0), "{count}");
        assert!(counts[0] == 1 && counts[1] >= counts[0], "{count}");
        if count == 2 {
            assert_eq!(counts, [1, 100]);
        }
    }
}

#[test]
fn who_comes_next_takes_what_the_nearest_are_too_few_for() {
    let near = Tier::SameNode;
    let next = Tier::SameSite;
    let far = Tier::Anywhere;
    let all = |per_tier: [usize; 3]| {
        let tiers = [near, next, far].into_iter().zip(per_tier);
        let tiers = tiers.flat_map(|(tier, count)| std::iter::repeat_n(tier, count));
        tiers
            .enumerate()
            .map(|(number, tier)| at(tier, number, 1))
            .collect::<Vec<_>>()
    };
    // How many are enough, endpoints of each tier, the furthest that takes flows, the shares.
    let rows: [(usize, [usize; 3], Tier, &[usize]); 7] = [
        (1, [1, 2, 2], near, &[1]),
        (2, [2, 2, 2], near, &[1, 1]),
        (3, [1, 2, 2], next, &[1, 1, 1]),
        // One of three parts, and two parts for ten.
        (3, [1, 10, 0], next, &[5, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
        // One, two and one of four parts; the last part for two.
        (4, [1, 2, 2], far, &[2, 2, 2, 1, 1]),
        // Not enough anywhere: all alike.
        (9, [1, 2, 2], far, &[1, 1, 1, 1, 1]),
        (5, [0, 2, 6], far, &[2, 2, 1, 1, 1, 1, 1, 1]),
    ];
    for (enough, per_tier, last, expected) in rows {
        let chosen = all(per_tier);
        let candidates = chosen.iter().map(|one| (one.tier, one.endpoint.ip()));
        let found = last_tier(enough, candidates);
        assert_eq!(found, Some(last), "{enough} {per_tier:?}");
        let chosen: Vec<_> = chosen.into_iter().filter(|one| one.tier <= last).collect();
        let list = slots(&Balance::default(), enough, chosen);
        assert_eq!(
            counts(&list, expected.len()),
            expected,
            "{enough} {per_tier:?}"
        );
    }
    assert_eq!(last_tier::<Tier>(3, std::iter::empty()), None);
}

#[test]
fn a_tier_s_part_is_divided_by_weight() {
    // The near one carries half, the far ones the other half as two to one.
    let chosen = vec![
        at(Tier::SameNode, 0, 50),
        at(Tier::Anywhere, 1, 2),
        at(Tier::Anywhere, 2, 1),
    ];
    let list = slots(&Balance::default(), 2, chosen);
    assert_eq!(counts(&list, 3), [3, 2, 1]);
}

#[test]
fn hashed_lists_share_evenly_and_by_weight() {
    let hashed = weighted(Policy::ConsistentHash);
    for count in [1, 2, 3, 25, 26, 100, 409] {
        let chosen = (0..count).map(|number| at(Tier::SameNode, number, 1));
        let list = slots(&hashed, 1, chosen.collect());
        let expected = HASHED_SLOTS
            .into_iter()
            .find(|&length| length >= 10 * count);
        assert_eq!(list.len(), expected.unwrap());
        let counts = counts(&list, count);
        let even = list.len() / count;
        // Everybody has a turn in each round.
        assert!(
            counts
                .iter()
                .all(|&times| times == even || times == even + 1),
            "{counts:?}"
        );
    }
    let chosen = vec![at(Tier::SameNode, 0, 3), at(Tier::SameNode, 1, 1)];
    let counts = counts(&slots(&hashed, 1, chosen), 2);
    assert!((187..=190).contains(&counts[0]), "{counts:?}"); // Three quarters of 251.
    let crowd = (0..5_000).map(|number| at(Tier::SameNode, number, 1));
    assert_eq!(slots(&hashed, 1, crowd.collect()).len(), 5_000);
}

#[test]
fn few_clients_move_when_an_endpoint_goes() {
    let hashed = weighted(Policy::ConsistentHash);
    let list_without = |gone: usize| {
        let chosen = (0..10).filter(|&number| number != gone);
        let chosen = chosen.map(|number| at(Tier::SameNode, number, 1));
        slots(&hashed, 1, chosen.collect())
    };
    let all = list_without(10);
    for gone in 0..10 {
        let rest = list_without(gone);
        let both = all.iter().zip(&rest);
        let stayed = |(before, after): &(&SocketAddr, &SocketAddr)| {
            **before != endpoint(gone) && before != after
        };
        let moved = both.filter(stayed).count();
        // Of 225 that had another endpoint; with a table made anew at random some 200 would.
        assert!(moved < 45, "{gone}: {moved}");
    }
}
