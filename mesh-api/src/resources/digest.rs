//! Digests of resources, by which a node and a controller that never met find what differs.
//!
//! Resources are spread over buckets by their keys, and each bucket has a digest. A node with
//! 100,000 resources of 300 bytes tells 8,192 digests, 64 KiB instead of 30 MB, and gets back the
//! buckets that differ, some 4 KB each.

use std::collections::BTreeSet;

use prost::Message as _;
use ring::digest::{Context, SHA256, digest};

use super::{Encoded, Resources};
use crate::control::{Comparison, Resource, ResourceKey, resource, resource_key::Kind};

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
        if let Some(resource::Kind::Node(signed)) = &resource.kind {
            return self.add_content(key, &signed.record);
        }
        self.add_content(key, &resource.encode_to_vec())
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
            context.update(&key.kind.to_be_bytes());
            for part in [key.name.as_bytes(), content] {
                context.update(&(part.len() as u64).to_be_bytes());
                context.update(part);
            }
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
    use crate::control::{SignedNode, SyncResponse};
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
            digests(&[(key, Encoded::from(&Resource { kind }))].into(), 1)
        };
        assert_eq!(node(1, 1), node(1, 2));
        assert_ne!(node(1, 1), node(2, 1));
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
