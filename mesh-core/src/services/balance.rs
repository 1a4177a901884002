//! How new flows are spread over endpoints, as order and repetition in a list: the kernel takes a
//! slot by chance, by turn or by the client's hash, and knows no weights.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
};

use crate::snapshot::{Balance, Policy};

/// Longest list in the kernel (`ebpf-abi`: `LIST_ENDPOINTS_MAX`).
const SLOTS_MAX: usize = 4_096;

/// Slots that a weighted list may take, whatever it holds: a share is then off by less than 1/256.
/// A thousand services with weights take what all services have (262,144).
const WEIGHTED_SLOTS_MIN: usize = 256;

/// With many endpoints: so many slots each, on average; an endpoint's share is off by less than a
/// quarter of an even share.
const WEIGHTED_SLOTS_EACH: usize = 4;

/// Lengths of lists for clients' hashes: primes, so that every endpoint's step reaches every slot.
const HASHED_SLOTS: [usize; 3] = [251, 1_021, 4_093];

/// With at least so many slots an endpoint, shares are within a fifth of each other (Eisenbud and
/// others, "Maglev", NSDI 2016, §5.3, has 100 for a hundredth).
const HASHED_SLOTS_EACH: usize = 10;

/// An endpoint that takes flows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Weighted<T> {
    /// How far it is, as far as that counts.
    pub(super) tier: T,
    pub(super) endpoint: SocketAddr,
    pub(super) weight: u16,
}

/// The furthest tier of `candidates` that takes flows: the nearest, and with spill-over as many
/// as it takes to have `enough` endpoints.
pub(super) fn last_tier<T: Copy + Ord>(
    enough: usize,
    candidates: impl Iterator<Item = (T, IpAddr)>,
) -> Option<T> {
    if enough <= 1 {
        return candidates.map(|(tier, _)| tier).min();
    }
    let by_tier: BTreeSet<_> = candidates.collect();
    let mut seen = BTreeSet::new();
    let mut last = None;
    for (tier, address) in by_tier {
        if seen.len() >= enough && last != Some(tier) {
            break;
        }
        seen.insert(address);
        last = Some(tier);
    }
    last
}

/// The list in which `chosen`, which are of all tiers down to the last, take their shares.
pub(super) fn slots<T: Copy + Ord>(
    balance: &Balance,
    enough: usize,
    mut chosen: Vec<Weighted<T>>,
) -> Vec<SocketAddr> {
    // Several controllers may write the same endpoint into their slices.
    chosen.sort_unstable_by_key(|one| (one.endpoint, one.tier));
    chosen.dedup_by_key(|one| one.endpoint);
    let alike = enough <= 1 && balance.weights.is_empty();
    match balance.policy {
        Policy::ConsistentHash => hashed(&shares(enough, &chosen)),
        Policy::Random | Policy::RoundRobin | Policy::LeastLatency if alike => {
            chosen.into_iter().map(|one| one.endpoint).collect()
        }
        Policy::Random | Policy::RoundRobin | Policy::LeastLatency => {
            repeated(&shares(enough, &chosen))
        }
    }
}

type Shares = BTreeMap<SocketAddr, u128>;

/// How many flows each gets compared with the others. Each tier but the last carries one part for
/// each of its endpoints, the last what is left of the parts that are enough, or as many as it
/// has; the endpoints of a tier divide its parts by weight.
fn shares<T: Copy + Ord>(enough: usize, chosen: &[Weighted<T>]) -> Shares {
    let mut tiers: BTreeMap<T, (u128, u128)> = BTreeMap::new(); // Endpoints, sum of weights.
    for one in chosen {
        let (count, sum) = tiers.entry(one.tier).or_default();
        *count += 1;
        *sum += u128::from(one.weight);
    }
    // With the product of parts and weight below 2^118. Ten tiers of together SPILL_OVER_MAX endpoints
    // may have a larger common multiple: then parts are rounded, by less than 2^-80.
    let mut common = tiers.values();
    let common = common.try_fold(1_u128, |whole, &(_, sum)| lcm(whole, sum));
    let whole = common.filter(|whole| whole >> 100 == 0).unwrap_or(1 << 100);
    let mut left = u128::try_from(enough.max(1)).unwrap_or(1);
    let mut parts = BTreeMap::new();
    let several = tiers.len() > 1;
    for (tier, (count, sum)) in tiers {
        let carried = if several { count.min(left.max(1)) } else { 1 };
        left = left.saturating_sub(carried);
        parts.insert(tier, carried * (whole / sum));
    }
    let share = |one: &Weighted<T>| {
        let of_one = parts.get(&one.tier).copied().unwrap_or(1);
        (one.endpoint, of_one * u128::from(one.weight))
    };
    let mut shares: Shares = chosen.iter().map(share).collect();
    let common = shares.values().fold(0, |common, &share| gcd(common, share));
    for share in shares.values_mut() {
        *share /= common.max(1);
    }
    shares
}

/// Each as often as its share says, evenly mixed: in turns, no endpoint gets its flows in a row.
fn repeated(shares: &Shares) -> Vec<SocketAddr> {
    let count = shares.len();
    let room = WEIGHTED_SLOTS_MIN
        .max(WEIGHTED_SLOTS_EACH * count)
        .min(SLOTS_MAX.saturating_sub(count));
    let room = u128::try_from(room).unwrap_or_default();
    let total: u128 = shares.values().sum();
    let mut slots = Vec::new();
    for (&endpoint, &share) in shares {
        // What is rounded up to one takes room of its own: below SLOTS_MAX still.
        let times = if total <= room {
            share
        } else {
            (share * room / total).max(1)
        };
        let place = |turn: u128| ((2 * turn + 1) << 32) / times;
        slots.extend((0..times).map(|turn| (place(turn), endpoint)));
    }
    slots.sort_unstable();
    slots.into_iter().map(|(_, endpoint)| endpoint).collect()
}

/// Maglev's table (NSDI 2016, §3.4): a client's hash is a slot, and when endpoints come or go few
/// slots change hands.
fn hashed(shares: &Shares) -> Vec<SocketAddr> {
    let most = shares.values().max().copied().unwrap_or_default();
    let wanted = HASHED_SLOTS_EACH * shares.len();
    let [.., longest] = HASHED_SLOTS;
    let fitting = HASHED_SLOTS.into_iter().find(|&length| length >= wanted);
    let length = fitting.unwrap_or(longest);
    if shares.is_empty() || shares.len() > length {
        return shares.keys().copied().collect();
    }
    struct Turn {
        endpoint: SocketAddr,
        share: u128,
        /// Turns that it could have had, in units of the largest share.
        due: u128,
        next: usize,
        step: usize,
    }
    let mut turns: Vec<_> = shares
        .iter()
        .map(|(&endpoint, &share)| Turn {
            endpoint,
            share,
            due: 0,
            next: modulo(hash(endpoint, 1), length),
            step: 1 + modulo(hash(endpoint, 2), length - 1),
        })
        .collect();
    let mut table: Vec<Option<SocketAddr>> = vec![None; length];
    let mut free = length;
    'full: loop {
        for turn in &mut turns {
            turn.due += turn.share;
            if turn.due < most {
                continue;
            }
            turn.due -= most;
            // A free slot is there, and the steps of a prime length reach it.
            while let Some(slot) = table.get_mut(turn.next) {
                turn.next = (turn.next + turn.step) % length;
                if slot.is_none() {
                    *slot = Some(turn.endpoint);
                    free -= 1;
                    break;
                }
            }
            if free == 0 {
                break 'full;
            }
        }
    }
    table.into_iter().flatten().collect()
}

fn modulo(hash: u64, length: usize) -> usize {
    let length = u64::try_from(length).unwrap_or(1);
    usize::try_from(hash % length).unwrap_or_default()
}

/// Mixes the address with `seed` (splitmix64's finalizer): the same in every version, so that an
/// update of the agent moves no client.
fn hash(endpoint: SocketAddr, seed: u64) -> u64 {
    let ip = match endpoint.ip() {
        IpAddr::V4(v4) => v4.to_ipv6_mapped(),
        IpAddr::V6(v6) => v6,
    };
    let (high, low) = (ip.to_bits() >> 64, ip.to_bits() & u128::from(u64::MAX));
    let words = [high, low].map(|word| u64::try_from(word).unwrap_or_default());
    let words = words.into_iter().chain([endpoint.port().into()]);
    words.fold(seed, |hash, word| {
        let mut mixed = (hash ^ word).wrapping_add(0x9e37_79b9_7f4a_7c15);
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    })
}

fn gcd(a: u128, b: u128) -> u128 {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// `None`: it is too large.
fn lcm(a: u128, b: u128) -> Option<u128> {
    (a / gcd(a, b).max(1)).checked_mul(b)
}

#[cfg(test)]
mod tests;
