//! Which of the working paths carries the traffic.

use std::time::Duration;

use mesh_wire::id::Via;

use crate::node::path::Path;

/// Within a tier a path must be this much cheaper (`paths.md`), or traffic would swing.
const CHEAPER_BY: f64 = 0.8;

/// And cheaper by at least this (`paths.md`).
const CHEAPER_BY_AT_LEAST: Duration = Duration::from_millis(10);

/// A path that loses more than this gives up its tier (`paths.md` says it of direct ones) …
const LOSSY: f64 = 0.03;

/// … until it loses less than this: otherwise traffic would swing around the other number. …
const LOSSY_NO_MORE: f64 = 0.015;

/// … if a relay of a lower tier loses less than this.
const LOSSLESS: f64 = 0.005;

/// The path to use of `usable` ones, given the one in use.
pub(crate) fn choose(usable: &[(Via, &Path)], primary: Option<Via>) -> Option<Via> {
    let current = usable.iter().find(|(via, _)| Some(*via) == primary);
    let lossless = |path: &Path| path.judged_loss().is_some_and(|loss| loss < LOSSLESS);
    let best_clean_relay = usable
        .iter()
        .filter(|(_, path)| path.kind.is_relayed() && lossless(path))
        .map(|(_, path)| path.kind)
        .max();
    let tier = |path: &Path| {
        let much = path.judged_loss().is_some_and(|loss| loss > LOSSY);
        let was_left = current.is_some_and(|(_, current)| current.kind > path.kind);
        let lossy = is_lossy(path) && (much || was_left);
        match best_clean_relay.filter(|relay| lossy && *relay > path.kind) {
            Some(relay) => relay,
            None => path.kind,
        }
    };
    let key = |path: &Path| (tier(path), path.cost().unwrap_or(Duration::MAX));
    let &(best, best_path) = usable.iter().min_by_key(|(via, path)| (key(path), *via))?;
    let Some(&(current, current_path)) = current else {
        return Some(best);
    };
    let better = tier(best_path) < tier(current_path)
        || tier(best_path) == tier(current_path)
            && match (best_path.cost(), current_path.cost()) {
                (Some(cost), Some(than)) => is_cheaper(cost, than),
                _ => false,
            };
    Some(if better { best } else { current })
}

/// Whether a path that does not carry the traffic now loses too much to carry it.
pub(crate) fn is_lossy(path: &Path) -> bool {
    path.recent_loss().is_some_and(|loss| loss > LOSSY_NO_MORE)
}

/// Whether so much is saved that it is worth a move.
pub(crate) fn is_cheaper(cost: Duration, than: Duration) -> bool {
    cost < than.mul_f64(CHEAPER_BY) && than.saturating_sub(cost) >= CHEAPER_BY_AT_LEAST
}

#[cfg(test)]
mod tests {
    use mesh_wire::id::RelayId;

    use super::*;
    use crate::node::{path::PathKind, tests::at};

    const A: Via = Via::Direct(std::net::SocketAddr::new(
        std::net::IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 1)),
        1,
    ));
    const R: Via = Via::Relay(RelayId(1));
    const R2: Via = Via::Relay(RelayId(2));

    /// A path with eighty echoes of this round-trip time, every `lost_every`th lost.
    fn path(kind: PathKind, rtt_ms: u64, lost_every: u64) -> Path {
        let mut path = Path::new(kind, None);
        for txid in 0..80 {
            path.on_echo_sent(txid, 0, at(10_000 * txid));
            if txid == 0 || lost_every == 0 || txid % lost_every != 0 {
                path.on_echo_answered(txid, 0, at(10_000 * txid + rtt_ms));
            }
        }
        path.on_echo_sent(99, 0, at(800_000)); // Lets the last loss be seen.
        path
    }

    #[test]
    fn tier_first_then_cost_with_hysteresis() {
        use PathKind::{Direct, Lan, PeerRelay, Relay};
        // Name, the path in use, another, whether to move.
        let table = [
            (
                "direct beats a faster relay",
                (Relay, 5, 0),
                (Direct, 80, 0),
                true,
            ),
            (
                "a faster relay does not beat direct",
                (Direct, 80, 0),
                (Relay, 5, 0),
                false,
            ),
            ("LAN beats direct", (Direct, 5, 0), (Lan, 6, 0), true),
            (
                "a peer relay beats a faster relay",
                (Relay, 5, 0),
                (PeerRelay, 80, 0),
                true,
            ),
            (
                "and direct beats a faster peer relay",
                (PeerRelay, 5, 0),
                (Direct, 80, 0),
                true,
            ),
            (
                "a lossy peer relay gives up its tier",
                (PeerRelay, 50, 4),
                (Relay, 60, 0),
                true,
            ),
            (
                "a lossy direct path gives it up to a clean peer relay, too",
                (Direct, 50, 4),
                (PeerRelay, 60, 0),
                true,
            ),
            (
                "a clean relay is no reason to leave a lossless peer relay",
                (PeerRelay, 60, 0),
                (Relay, 5, 0),
                false,
            ),
            (
                "9 ms better is not enough",
                (Relay, 20, 0),
                (Relay, 11, 0),
                false,
            ),
            (
                "15 % better is not enough",
                (Relay, 100, 0),
                (Relay, 85, 0),
                false,
            ),
            (
                "30 % and 30 ms better is",
                (Relay, 100, 0),
                (Relay, 70, 0),
                true,
            ),
            (
                "a lossy direct path gives up its tier",
                (Direct, 50, 4),
                (Relay, 60, 0),
                true,
            ),
            (
                "but not to a lossy relay",
                (Direct, 50, 4),
                (Relay, 60, 4),
                false,
            ),
        ];
        for (name, (kind, rtt, lost), (other_kind, other_rtt, other_lost), moves) in table {
            let current = path(kind, rtt, lost);
            let other = path(other_kind, other_rtt, other_lost);
            let chosen = choose(&[(R, &current), (R2, &other)], Some(R));
            assert_eq!(chosen == Some(R2), moves, "{name}");
        }
    }

    #[test]
    fn a_direct_path_that_lost_gets_its_tier_back_when_it_loses_half_of_what_took_it() {
        let (relay, lossy) = (path(PathKind::Relay, 60, 0), path(PathKind::Direct, 20, 30));
        assert!(
            (0.015..0.03).contains(&lossy.loss().unwrap()),
            "{:?}",
            lossy.loss()
        );
        let ways = [(A, &lossy), (R, &relay)];
        assert_eq!(choose(&ways, Some(A)), Some(A), "under 3 %: stays");
        assert_eq!(
            choose(&ways, Some(R)),
            Some(A),
            "by its cost: far cheaper all the same"
        );
        let slow = path(PathKind::Direct, 59, 30);
        assert_eq!(
            choose(&[(A, &slow), (R, &relay)], Some(R)),
            Some(R),
            "over 1.5 %: not back"
        );
        let clean = path(PathKind::Direct, 59, 0);
        assert_eq!(choose(&[(A, &clean), (R, &relay)], Some(R)), Some(A));
    }

    #[test]
    fn what_was_lost_before_the_last_64_echoes_moves_nothing() {
        let relay = path(PathKind::Relay, 60, 0);
        let mut direct = Path::new(PathKind::Direct, None);
        for txid in 0..112 {
            direct.on_echo_sent(txid, 0, at(10_000 * txid));
            if txid > 10 || txid % 2 == 0 {
                direct.on_echo_answered(txid, 0, at(10_000 * txid + 50));
            }
        }
        assert!(direct.judged_loss().unwrap() > LOSSY);
        let ways = [(A, &direct), (R, &relay)];
        assert_eq!(choose(&ways, Some(A)), Some(A));
        assert_eq!(choose(&ways, Some(R)), Some(A), "or it would swing");
    }

    #[test]
    fn without_a_path_in_use_the_best_one_is_taken() {
        let (relay, direct) = (path(PathKind::Relay, 5, 0), path(PathKind::Direct, 50, 0));
        assert_eq!(choose(&[(R, &relay), (A, &direct)], None), Some(A));
        assert_eq!(choose(&[(R, &relay)], Some(A)), Some(R));
        assert_eq!(choose(&[], Some(A)), None);
    }
}
