//! The flows of devices, as the programs remember them: sets of places, in an array.

use std::hash::{BuildHasher as _, RandomState};

use aya::{
    Ebpf,
    maps::{Array, Map, MapData, MapError},
};
use ebpf_abi::{TRACKED_WAY_BITS, TRACKED_WAYS, Tracked, TrackedSet};

use crate::{missing, packets::map_of};

pub(crate) const TRACKED: &str = "hf_tracked";
const SEED: &str = "hf_tracked_seed";
const ENDED: &str = "hf_ended";

/// `BPF_F_LOCK`: nobody takes a place of the set, or gives it back, while it is read.
const LOCKED: u64 = 4;

/// Where a flow is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Place {
    number: u32,
    /// Another flow's is another one.
    generation: u32,
}

/// How many flows a map has room for that has room for so many sets.
pub(crate) fn places(sets: u32) -> u32 {
    sets.saturating_mul(TRACKED_WAYS)
}

/// Looks at each flow in the map. Costs a system call for each set of places: 8 ms, whatever is in them.
pub(crate) fn each(
    map: &Map,
    mut look: impl FnMut(Place, &Tracked) -> Result<(), MapError>,
) -> Result<(), MapError> {
    let sets: Array<&MapData, TrackedSet> = map.try_into()?;
    for number in 0..sets.len() {
        let TrackedSet { tags, flows, .. } = sets.get(&number, LOCKED)?;
        for (way, (tag, flow)) in (0..).zip(tags.iter().zip(&flows)) {
            if *tag != 0 {
                let place = Place {
                    number: number << TRACKED_WAY_BITS | way,
                    generation: flow.generation,
                };
                look(place, flow)?;
            }
        }
    }
    Ok(())
}

/// Whether [`end`] was called for it.
pub(crate) fn is_ended(ebpf: &Ebpf, place: Place) -> Result<bool, MapError> {
    let ended: Array<&MapData, u32> = ebpf.map(ENDED).ok_or_else(|| missing(ENDED))?.try_into()?;
    Ok(ended.get(&place.number, 0)? == place.generation)
}

/// Tells the programs that a flow by UDP is over. One that has its place meanwhile is not.
pub(crate) fn end(ebpf: &mut Ebpf, place: Place) -> Result<(), MapError> {
    let mut ended: Array<&mut MapData, u32> = map_of(ebpf, ENDED)?;
    ended.set(place.number, place.generation, 0)
}

/// Makes it impossible to say which flows share a set: once, as what is there would not be found by another seed.
pub(crate) fn seed(ebpf: &mut Ebpf) -> Result<(), MapError> {
    let mut map: Array<&mut MapData, u64> = map_of(ebpf, SEED)?;
    if map.get(&0, 0)? != 0 {
        return Ok(());
    }
    map.set(0, RandomState::new().hash_one(SEED), 0)
}
