//! Digests of resources, by which a node and a controller that never met find what differs.
//!
//! Resources are spread over buckets by their keys, and each bucket has a digest. A node with
//! 100,000 resources of 300 bytes tells 8,192 digests, 64 KiB instead of 30 MB, and gets back the
//! buckets that differ, some 4 KB each.

use std::collections::BTreeSet;

use prost::Message as _;
use ring::digest::{Context, SHA256, SHA256_OUTPUT_LEN, digest};

use super::{Encoded, Resources};
use crate::control::{
    Comparison, Resource, ResourceKey, SyncResponse, resource, resource_key::Kind,
};

/// Most buckets: 64 KiB of digests.
pub const BUCKETS_MAX: u32 = 8192;

/// Resources in a bucket, as long as there may be more buckets: to tell a digest costs 8 bytes, to
/// send a bucket again for one resource in it 16 × 300.
const BUCKET_RESOURCES: usize = 16;

/// How many buckets are right for so many resources.
#[must_use]
pub fn buckets(resources: usize) -> u32 {
    let wanted = (resources / BUCKET_RESOURCES).next_power_of_two();
    u32::try_from(wanted).map_or(BUCKETS_MAX, |wanted| wanted.min(BUCKETS_MAX))
}

/// The bucket of `key`: below `buckets`.
#[must_use]
pub fn bucket(key: &ResourceKey, buckets: u32) -> u32 {
    let mut bytes = key.kind.to_be_bytes().to_vec();
    bytes.extend_from_slice(key.name.as_bytes());
    let hash = first_eight(digest(&SHA256, &bytes).as_ref());
    // The upper half of the product: as even as the hash.
    let place = (u128::from(hash) * u128::from(buckets)) >> u64::BITS;
    u32::try_from(place).unwrap_or(0)
}

/// Which resources make up the buckets.
#[derive(Clone)]
pub struct Digests {
    buckets: Vec<Context>,
}

impl std::fmt::Debug for Digests {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let buckets = self.buckets.len();
        f.debug_struct("Digests")
            .field("buckets", &buckets)
            .finish()
    }
}

impl Digests {
    /// Nothing, in so many buckets.
    #[must_use]
    pub fn new(buckets: u32) -> Self {
        let buckets = (0..buckets).map(|_| Context::new(&SHA256));
        Self {
            buckets: buckets.collect(),
        }
    }

    /// Adds a resource, and says to which bucket. The order is that of the keys.
    ///
    /// Of a node only the record counts: each controller signs it once for itself, and signatures
    /// are random.
    pub fn add(&mut self, key: &ResourceKey, resource: &Resource) -> u32 {
        match signed_record(resource) {
            Some(record) => self.add_content(key, record),
            None => self.add_content(key, &resource.encode_to_vec()),
        }
    }

    /// The same, of what a node keeps.
    fn add_encoded(&mut self, key: &ResourceKey, resource: &Encoded) {
        if key.kind() == Kind::Node {
            self.add(key, &resource.decode());
        } else {
            self.add_content(key, &resource.0);
        }
    }

    fn add_content(&mut self, key: &ResourceKey, content: &[u8]) -> u32 {
        let buckets = u32::try_from(self.buckets.len()).unwrap_or(u32::MAX);
        let place = bucket(key, buckets);
        if let Some(context) = self.buckets.get_mut(place as usize) {
            add_content(context, key, content);
        }
        place
    }

    /// The digest of each bucket: 8 bytes of SHA-256. To hide a change behind one, 2^64 others
    /// have to be tried.
    #[must_use]
    pub fn finish(self) -> Vec<u64> {
        let buckets = self.buckets.into_iter();
        buckets
            .map(|context| first_eight(context.finish().as_ref()))
            .collect()
    }
}

/// The digests of `resources` in so many buckets.
#[must_use]
pub fn digests(resources: &Resources, buckets: u32) -> Vec<u64> {
    let mut digests = Digests::new(buckets);
    for (key, resource) in resources {
        digests.add_encoded(key, resource);
    }
    digests.finish()
}

/// The digest of one resource: what [`Whole`] is made of. As in [`Digests::add`], of a node only the record counts.
#[must_use]
pub fn resource_digest(key: &ResourceKey, resource: &Resource) -> ResourceDigest {
    match signed_record(resource) {
        Some(record) => content_digest(key, record),
        None => content_digest(key, &resource.encode_to_vec()),
    }
}

/// SHA-256 of a resource and its key.
pub type ResourceDigest = [u8; SHA256_OUTPUT_LEN];

/// The digest of all resources, by those of each in the order of the keys: a controller that keeps them hashes 3.2 MB
/// for a change among 100,000.
#[derive(Clone)]
pub struct Whole(Context);

impl std::fmt::Debug for Whole {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Whole")
    }
}

impl Default for Whole {
    fn default() -> Self {
        Self(Context::new(&SHA256))
    }
}

impl Whole {
    /// Adds the next one.
    pub fn add(&mut self, resource: &ResourceDigest) {
        self.0.update(resource);
    }

    /// The digest.
    #[must_use]
    pub fn finish(self) -> [u8; SHA256_OUTPUT_LEN] {
        exact(&self.0.finish())
    }
}

/// The digest of all that a node keeps.
#[must_use]
pub fn whole(resources: &Resources) -> [u8; SHA256_OUTPUT_LEN] {
    let mut whole = Whole::default();
    for (key, resource) in resources {
        whole.add(&if key.kind() == Kind::Node {
            resource_digest(key, &resource.decode())
        } else {
            content_digest(key, &resource.0)
        });
    }
    whole.finish()
}

fn content_digest(key: &ResourceKey, content: &[u8]) -> ResourceDigest {
    let mut context = Context::new(&SHA256);
    add_content(&mut context, key, content);
    exact(&context.finish())
}

/// With the lengths of its parts before them, so that no two resources are the same bytes.
fn add_content(context: &mut Context, key: &ResourceKey, content: &[u8]) {
    context.update(&key.kind.to_be_bytes());
    for part in [key.name.as_bytes(), content] {
        context.update(&(part.len() as u64).to_be_bytes());
        context.update(part);
    }
}

fn signed_record(resource: &Resource) -> Option<&[u8]> {
    let Some(resource::Kind::Node(signed)) = &resource.kind else {
        return None;
    };
    Some(&signed.record)
}

fn exact(hash: &ring::digest::Digest) -> [u8; SHA256_OUTPUT_LEN] {
    hash.as_ref().first_chunk().copied().unwrap_or_default()
}

/// Where resources differ from those of somebody who has these digests: what he has to be told. Digests of no number of buckets
/// that anybody has are those of nothing.
#[must_use]
pub fn difference(resources: &Resources, theirs: &[u64]) -> SyncResponse {
    let count = u32::try_from(theirs.len()).unwrap_or(u32::MAX);
    if count == 0 || count > BUCKETS_MAX {
        return SyncResponse {
            full: true,
            set: resources.values().map(Encoded::decode).collect(),
            ..SyncResponse::default()
        };
    }
    let ours = digests(resources, count);
    let pairs = (0..).zip(ours.iter().zip(theirs));
    let differing: Vec<u32> = pairs
        .filter(|(_, (ours, theirs))| ours != theirs)
        .map(|(bucket, _)| bucket)
        .collect();
    let set = resources.iter().filter(|(key, _)| {
        let place = bucket(key, count);
        differing.binary_search(&place).is_ok()
    });
    SyncResponse {
        set: set.map(|(_, resource)| resource.decode()).collect(),
        compared: Some(Comparison {
            buckets: count,
            differing,
        }),
        ..SyncResponse::default()
    }
}

/// The keys in those buckets that `compared` says differ.
pub(super) fn differing(resources: &Resources, compared: &Comparison) -> Vec<ResourceKey> {
    if compared.differing.is_empty() {
        return Vec::new();
    }
    let differing: BTreeSet<_> = compared.differing.iter().collect();
    let keys = resources.keys();
    keys.filter(|key| differing.contains(&bucket(key, compared.buckets)))
        .cloned()
        .collect()
}

fn first_eight(hash: &[u8]) -> u64 {
    hash.first_chunk().copied().map_or(0, u64::from_be_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::SignedNode;
    use crate::resources::apply;

    fn namespace(name: &str, label: &str) -> (ResourceKey, Encoded) {
        let key = ResourceKey {
            kind: Kind::Namespace.into(),
            name: name.to_owned(),
        };
        let namespace = crate::control::Namespace {
            name: name.to_owned(),
            labels: [("label".to_owned(), label.to_owned())].into(),
        };
        let kind = Some(resource::Kind::Namespace(namespace));
        (key, Encoded::from(&Resource { kind }))
    }

    fn many(count: usize) -> Resources {
        (0..count)
            .map(|n| namespace(&format!("n{n}"), "a"))
            .collect()
    }

    #[test]
    fn the_number_of_buckets_grows_with_the_resources_up_to_a_limit() {
        let cases = [
            (0, 1),
            (31, 1),
            (32, 2),
            (100_000, 8192),
            (usize::MAX / 32, BUCKETS_MAX),
        ];
        for (resources, expected) in cases {
            assert_eq!(buckets(resources), expected, "{resources}");
        }
    }

    #[test]
    fn keys_are_spread_evenly() {
        let mut full = vec![0; 64];
        for key in many(6400).keys() {
            full[bucket(key, 64) as usize] += 1;
        }
        assert!(
            full.iter().all(|&count| (50..200).contains(&count)),
            "{full:?}"
        );
    }

    #[test]
    fn one_change_is_in_one_bucket_whatever_it_is() {
        let before = many(1000);
        let ours = digests(&before, 64);
        let change = |change: &dyn Fn(&mut Resources)| {
            let mut after = before.clone();
            change(&mut after);
            let theirs = digests(&after, 64);
            let pairs = ours.iter().zip(&theirs);
            pairs.filter(|(ours, theirs)| ours != theirs).count()
        };
        assert_eq!(change(&|_| ()), 0);
        assert_eq!(change(&|all| all.extend([namespace("n7", "b")])), 1);
        assert_eq!(change(&|all| all.extend([namespace("new", "a")])), 1);
        assert_eq!(change(&|all| drop(all.remove(&namespace("n7", "a").0))), 1);
    }

    #[test]
    fn the_whole_is_the_same_from_both_sides_and_another_with_any_change() {
        let resources = many(100);
        let mut theirs = Whole::default();
        for (key, resource) in &resources {
            theirs.add(&resource_digest(key, &resource.decode()));
        }
        let ours = whole(&resources);
        assert_eq!(theirs.finish(), ours);
        for (name, label) in [("n7", "b"), ("new", "a")] {
            let mut changed = resources.clone();
            changed.extend([namespace(name, label)]);
            assert_ne!(whole(&changed), ours, "{name}");
        }
        let mut fewer = resources;
        fewer.remove(&namespace("n7", "a").0);
        assert_ne!(whole(&fewer), ours);
    }

    #[test]
    fn another_signature_of_the_same_record_is_no_difference() {
        let node = |record: u8, signature: u8| {
            let key = ResourceKey {
                kind: Kind::Node.into(),
                name: "a".to_owned(),
            };
            let node = SignedNode {
                record: vec![record],
                signature: vec![signature],
            };
            let kind = Some(resource::Kind::Node(node));
            let resources = [(key, Encoded::from(&Resource { kind }))].into();
            (digests(&resources, 1), whole(&resources))
        };
        assert_eq!(node(1, 1), node(1, 2));
        assert_ne!(node(1, 1), node(2, 1));
    }

    #[test]
    fn what_one_is_told_who_told_digests_makes_both_the_same() {
        let ours = many(1_000);
        let mut theirs = ours.clone();
        theirs.extend([namespace("n7", "b"), namespace("theirs", "a")]);
        theirs.remove(&namespace("n8", "a").0);
        for count in [0, 1, 64, BUCKETS_MAX, BUCKETS_MAX + 1] {
            let told = difference(&ours, &digests(&theirs, count));
            let mut after = theirs.clone();
            assert_eq!(apply(&mut after, told.clone()), []);
            assert!(after == ours, "{count} buckets");
            assert_eq!(told.full, count == 0 || count > BUCKETS_MAX);
        }
        let told = difference(&ours, &digests(&theirs, 64));
        assert!(told.set.len() < 100, "{} of 1,000", told.set.len());
        assert!(difference(&ours, &digests(&ours, 64)).set.is_empty());
    }

    #[test]
    fn what_is_in_a_differing_bucket_and_not_sent_again_is_gone() {
        let mut resources = many(100);
        let (key, resource) = namespace("n7", "b");
        let place = bucket(&key, 8);
        let kept: Vec<_> = resources
            .keys()
            .filter(|key| bucket(key, 8) != place)
            .cloned()
            .collect();
        let response = SyncResponse {
            set: vec![resource.decode()],
            compared: Some(Comparison {
                buckets: 8,
                differing: vec![place],
            }),
            ..SyncResponse::default()
        };
        assert_eq!(apply(&mut resources, response), []);
        assert_eq!(resources.remove(&key), Some(resource));
        assert_eq!(resources.into_keys().collect::<Vec<_>>(), kept);
    }
}
