//! Verdicts by destination port, and as prefixes of it.

use std::collections::BTreeSet;

use super::{
    PortPrefix, RuleSet, Verdict,
    resources::{IpProtocol, PortMatch, Ports},
};

/// Verdicts for every protocol and port.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct ByPort {
    /// In the order of [`IpProtocol::ALL`].
    protocols: [Steps; IpProtocol::ALL.len()],
    /// Of protocols that rules cannot name.
    other: Verdict,
}

/// From which port on which verdict holds: begins with port 0, and neighbours differ.
type Steps = Vec<(u16, Verdict)>;

impl ByPort {
    /// Asks `judge` for each protocol once between any two ports that `matches` name.
    pub(super) fn new<'a>(
        matches: impl Iterator<Item = &'a PortMatch> + Clone,
        judge: impl Fn(Option<IpProtocol>, u16) -> Verdict,
    ) -> Self {
        let protocols = IpProtocol::ALL.map(|protocol| {
            let mut starts = BTreeSet::from([0]);
            for one in matches.clone().filter(|one| one.protocol == protocol) {
                if let Ports::Range(first, last) = one.ports {
                    starts.insert(first);
                    starts.extend(last.checked_add(1));
                }
            }
            let mut steps: Steps = Vec::new();
            for start in starts {
                let verdict = judge(Some(protocol), start);
                if steps.last().is_none_or(|(_, last)| *last != verdict) {
                    steps.push((start, verdict));
                }
            }
            steps
        });
        Self {
            protocols,
            other: judge(None, 0),
        }
    }

    /// The strictest of all.
    pub(super) fn strictest(&self) -> Verdict {
        let steps = self.protocols.iter().flatten().map(|(_, verdict)| *verdict);
        steps.fold(self.other, Verdict::min)
    }

    /// Whether it is the same for all packets.
    pub(super) fn is_uniform(&self) -> bool {
        let mut steps = self.protocols.iter().flatten();
        steps.all(|(_, verdict)| *verdict == self.other)
    }

    /// For each port the stricter of the two.
    pub(super) fn and(&self, other: &Self) -> Self {
        let mut protocols = self.protocols.clone();
        for (own, others) in protocols.iter_mut().zip(&other.protocols) {
            let starts: BTreeSet<u16> = own.iter().chain(others).map(|(start, _)| *start).collect();
            let mut steps: Steps = Vec::new();
            for start in starts {
                let verdict = at(own, start).min(at(others, start));
                if steps.last().is_none_or(|(_, last)| *last != verdict) {
                    steps.push((start, verdict));
                }
            }
            *own = steps;
        }
        Self {
            protocols,
            other: self.other.min(other.other),
        }
    }

    /// As prefixes of ports: what holds for most ports of a protocol is said once.
    pub(super) fn prefixes(&self, rules: RuleSet) -> Vec<(PortPrefix, Verdict)> {
        let prefix = |protocol, port, bits| PortPrefix {
            rules,
            protocol,
            port,
            bits,
        };
        let mut prefixes = vec![(prefix(None, 0, 0), self.other)];
        for (protocol, steps) in IpProtocol::ALL.into_iter().zip(&self.protocols) {
            let ends = steps.iter().skip(1).map(|(start, _)| start - 1);
            let ranges = steps.iter().zip(ends.chain([u16::MAX]));
            let ranges: Vec<_> = ranges
                .map(|(&(first, verdict), last)| (first, last, verdict))
                .collect();
            let mut verdicts: Vec<(u32, Verdict)> = Vec::new();
            for &(first, last, verdict) in &ranges {
                let width = u32::from(last - first) + 1;
                match verdicts.iter_mut().find(|(_, known)| *known == verdict) {
                    Some((total, _)) => *total += width,
                    None => verdicts.push((width, verdict)),
                }
            }
            let Some(&(_, base)) = verdicts.iter().max() else {
                continue;
            };
            if (ranges.len(), base) == (1, self.other) {
                continue;
            }
            prefixes.push((prefix(Some(protocol), 0, 0), base));
            for (first, last, verdict) in ranges {
                if verdict != base {
                    let cut = cut(first, last).into_iter();
                    prefixes.extend(
                        cut.map(|(port, bits)| (prefix(Some(protocol), port, bits), verdict)),
                    );
                }
            }
        }
        prefixes
    }
}

fn at(steps: &Steps, port: u16) -> Verdict {
    let after = steps.partition_point(|(start, _)| *start <= port);
    let step = after.checked_sub(1).and_then(|index| steps.get(index));
    step.map_or(Verdict::NO_ROOM, |(_, verdict)| *verdict)
}

/// The leading `bits` of a port.
pub(super) fn mask(bits: u8) -> u16 {
    !u16::MAX.checked_shr(bits.into()).unwrap_or(0)
}

/// The fewest prefixes that have the ports from `first` to `last`: 30 at most.
fn cut(first: u16, last: u16) -> Vec<(u16, u8)> {
    let mut prefixes = Vec::new();
    let mut first = u32::from(first);
    while first <= u32::from(last) {
        let left = u32::from(last) + 1 - first;
        let free = first.trailing_zeros().min(left.ilog2()).min(16);
        // Both fit: `first` is at most `last`, and `free` at most 16.
        prefixes.push((
            u16::try_from(first).unwrap_or(u16::MAX),
            u8::try_from(16 - free).unwrap_or(16),
        ));
        first += 1 << free;
    }
    prefixes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_cut_into_prefixes_that_have_exactly_their_ports() {
        for (first, last, most) in [
            (0, u16::MAX, 1),
            (80, 80, 1),
            (1, u16::MAX - 1, 30),
            (30_000, 32_767, 9),
            (u16::MAX, u16::MAX, 1),
        ] {
            let cut = cut(first, last);
            assert!(cut.len() <= most, "{first}-{last}: {cut:?}");
            for port in 0..=u16::MAX {
                let having = cut
                    .iter()
                    .filter(|(start, bits)| port & mask(*bits) == *start);
                let wanted = usize::from((first..=last).contains(&port));
                assert_eq!(having.count(), wanted, "{port} of {first}-{last}");
            }
        }
    }
}
