//! A node that was away: what it is told when it comes back, beside what changed meanwhile.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result};
use integration::joining::connect;
use mesh_api::{
    connect::{ALPN, control_client},
    control::{
        Endpoint, Resource, ResourceKey, SignedHead, SyncRequest, SyncResponse, resource::Kind,
    },
    convert::key,
};
use mesh_identity::{credentials::Credentials, tls::client_config};
use prost::Message as _;
use serde::Serialize;
use tokio::{
    sync::mpsc,
    time::{Duration, timeout},
};
use tokio_stream::wrappers::ReceiverStream;

/// The answer that takes longest is one of everything, of 25 MB.
const ANSWER_LIMIT: Duration = Duration::from_secs(60);

/// What a node has, which is connected only while it is told what is new.
#[derive(Debug, Default)]
pub(crate) struct Away {
    has: SyncRequest,
    resources: BTreeMap<ResourceKey, Resource>,
}

/// Sizes in bytes, of what is encoded as in the message.
#[derive(Debug, Default, PartialEq, Eq, Serialize)]
pub(crate) struct Told {
    /// The whole answer.
    message: usize,
    /// Its signed head.
    head: usize,
    /// Resources that changed, as they are now, and the keys of those that are gone.
    changed: usize,
    /// Of a slice of endpoints that was there before, only the endpoints that are others.
    changed_least: usize,
    /// How many resources changed or are gone.
    resources: usize,
    /// Whether it held everything.
    full: bool,
}

impl Away {
    /// Connects, takes what is new, says that it has it, and leaves.
    pub(crate) async fn come_back(
        &mut self,
        controller: &str,
        credentials: &Credentials,
    ) -> Result<Told> {
        let config = client_config(credentials, ALPN)?;
        let channel = connect(controller, credentials.trust_domain(), config).await?;
        let (say, said) = mpsc::channel(2);
        say.send(self.has.clone()).await?;
        let mut client = control_client(channel);
        let answers = client.sync(ReceiverStream::new(said));
        let mut answers = answers.await?.into_inner();
        let answer = timeout(ANSWER_LIMIT, answers.message()).await;
        let answer = answer.context("no answer")??.context("the stream ended")?;
        let told = self.take(answer);
        say.send(self.has.clone()).await?;
        Ok(told)
    }

    fn take(&mut self, answer: SyncResponse) -> Told {
        let head = answer.head.as_ref();
        let mut told = Told {
            message: answer.encoded_len(),
            head: head.map_or(0, SignedHead::encoded_len),
            resources: answer.set.len() + answer.removed.len(),
            full: answer.full,
            ..Told::default()
        };
        let head = head.and_then(SignedHead::read).unwrap_or_default();
        self.has = SyncRequest {
            store_id: answer.store_id,
            generation: answer.generation,
            life: head.life,
            epoch: head.epoch,
            compares: true,
            ..SyncRequest::default()
        };
        for resource in answer.set {
            // What a controller tells has a key.
            let Ok(key) = key(&resource) else { continue };
            told.changed += resource.encoded_len();
            told.changed_least += least(self.resources.get(&key), &resource);
            self.resources.insert(key, resource);
        }
        for key in answer.removed {
            told.changed += key.encoded_len();
            told.changed_least += key.encoded_len();
            self.resources.remove(&key);
        }
        told
    }
}

/// The size of what is other than before.
fn least(before: Option<&Resource>, now: &Resource) -> usize {
    let endpoints = |resource: &Resource| match &resource.kind {
        Some(Kind::Slice(slice)) => Some(slice.endpoints.clone()),
        Some(_) | None => None,
    };
    let (Some(before), Some(now)) = (before.and_then(endpoints), endpoints(now)) else {
        return now.encoded_len();
    };
    let others = now.iter().filter(|endpoint| !before.contains(endpoint));
    let gone = before.iter().filter(|endpoint| !now.contains(endpoint));
    let replaced = others.clone().count();
    // One that another one took the place of is told by that.
    let gone = gone.skip(replaced).map(|endpoint| endpoint.address.len());
    others.map(Endpoint::encoded_len).sum::<usize>() + gone.sum::<usize>()
}

#[cfg(test)]
mod tests {
    use mesh_api::control::EndpointSlice;

    use super::*;

    fn slice(addresses: &[&str]) -> Resource {
        let endpoints = addresses.iter().map(|address| Endpoint {
            address: (*address).to_owned(),
            ..Endpoint::default()
        });
        Resource {
            kind: Some(Kind::Slice(EndpointSlice {
                name: "orders-1".to_owned(),
                endpoints: endpoints.collect(),
                ..EndpointSlice::default()
            })),
        }
    }

    #[test]
    fn of_a_slice_only_the_endpoints_that_are_others_changed_at_least() {
        let before = slice(&["10.0.0.1", "10.0.0.2"]);
        let one = 2 + "10.0.0.3".len();
        let sizes = [
            (slice(&["10.0.0.1", "10.0.0.3"]), one),
            (slice(&["10.0.0.1", "10.0.0.2", "10.0.0.3"]), one),
            (slice(&["10.0.0.1"]), "10.0.0.2".len()),
            (before.clone(), 0),
        ];
        for (now, size) in sizes {
            assert_eq!(least(Some(&before), &now), size, "{now:?}");
            assert_eq!(least(None, &now), now.encoded_len());
        }
    }

    #[test]
    fn an_answer_s_parts_are_counted_as_they_are_in_it() {
        let mut away = Away::default();
        let answer = |set: Vec<Resource>, removed: Vec<ResourceKey>| SyncResponse {
            generation: 7,
            set,
            removed,
            ..SyncResponse::default()
        };
        let resource = slice(&["10.0.0.1"]);
        let size = resource.encoded_len();
        let first = answer(vec![resource.clone()], Vec::new());
        let message = first.encoded_len();
        let told = away.take(first);
        assert_eq!(
            (told.message, told.changed, told.resources),
            (message, size, 1)
        );
        assert_eq!((away.has.generation, away.resources.len()), (7, 1));
        let gone = key(&resource).unwrap();
        let told = away.take(answer(Vec::new(), vec![gone.clone()]));
        assert_eq!((told.changed, told.resources), (gone.encoded_len(), 1));
        assert!(away.resources.is_empty());
    }
}
