//! Nodes of a LAN give each other the state of the mesh while no controller speaks: what the mesh's authority signed, over mutual
//! TLS with their own certificates. `mesh_core::offline::exchange` decides who asks whom; what is not signed changes nothing
//! (`desired`).

use std::{
    collections::BTreeMap,
    pin::Pin,
    sync::{Arc, Mutex},
    time::Duration,
};

use anyhow::Context as _;
use arc_swap::ArcSwap;
use futures_util::{Stream, StreamExt as _, stream};
use mesh_api::{
    control::{
        FetchRequest, FetchResponse,
        neighbour_client::NeighbourClient,
        neighbour_server::{Neighbour, NeighbourServer},
    },
    resources::{
        SYNC_BYTES_MAX,
        digest::{BUCKETS_MAX, buckets},
    },
    serve::{caller, tls_incoming_of},
};
use mesh_core::offline::exchange::{Answers, Ask, Exchange, Offer, Outcome};
use mesh_identity::credentials::Credentials;
use mesh_wire::id::{Identity, NodeId};
use tokio::{
    net::TcpListener,
    sync::{Semaphore, mpsc, watch},
    time,
};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, transport::Server};

use crate::{
    desired::{self, NotTaken, lock},
    driver::{now, sleep_until},
    mutual,
    sync::Connection,
};

/// How long asking, or answering, may take: 64 MiB at 10 Mb/s take 54 s.
const LIFETIME: Duration = Duration::from_secs(60);

/// Connections of neighbours at once, shaking hands or not.
const CONNECTIONS_MAX: usize = 16;

/// Answers under way at once: each is in memory until it is taken, or [`LIFETIME`] is over; at most 64 MiB.
const ANSWERS_MAX: usize = 2;

/// Longest request: the digests of all buckets, and their frame.
const REQUEST_BYTES_MAX: usize = BUCKETS_MAX as usize * size_of::<u64>() + 64;

/// Offers that wait to be looked at; more are dropped, and announced again.
pub const OFFERS_QUEUED_MAX: usize = 64;

/// Gives what this node has to neighbours of the mesh that ask.
#[derive(Debug, Clone)]
pub struct Giver {
    desired: desired::Shared,
    credentials: Arc<ArcSwap<Credentials>>,
    connections: Arc<Semaphore>,
    places: Arc<Semaphore>,
    answers: Arc<Mutex<Answers>>,
}

impl Giver {
    /// Of what `desired` has, as who `credentials` say.
    #[must_use]
    pub fn new(desired: desired::Shared, credentials: Arc<ArcSwap<Credentials>>) -> Self {
        Self {
            desired,
            credentials,
            connections: Arc::new(Semaphore::new(CONNECTIONS_MAX)),
            places: Arc::new(Semaphore::new(ANSWERS_MAX)),
            answers: Arc::default(),
        }
    }

    /// Answers on `listener`, until it is dropped.
    pub async fn serve(self, listener: TcpListener) {
        let credentials = Arc::clone(&self.credentials);
        let (places, connections) = (self.clone(), Arc::clone(&self.connections));
        let Ok(config) = mutual::accept(credentials) else {
            return;
        };
        let refused = |peer, problem: &str| {
            tracing::debug!(%peer, problem, "a neighbour's connection was refused");
        };
        let incoming = tls_incoming_of(listener, connections, config, refused);
        let incoming =
            incoming.map(|connection| connection.map(|connection| connection.ending_in(LIFETIME)));
        let service = NeighbourServer::new(places).max_decoding_message_size(REQUEST_BYTES_MAX);
        let served = Server::builder()
            .max_concurrent_streams(1)
            .add_service(service)
            .serve_with_incoming(incoming);
        if let Err(error) = served.await {
            tracing::warn!(%error, "neighbours are not answered any more");
        }
    }

    /// The node that asks, if it is one of the mesh as far as this node knows: who was taken out gets nothing newer.
    async fn member(&self, request: &Request<FetchRequest>) -> Result<NodeId, Status> {
        let snapshot = self.desired.lock().await.snapshots().borrow().clone();
        let (_, identity) = caller(request)?.identity()?;
        let node = mutual::member(&identity, snapshot.as_deref())?;
        Ok(node.id)
    }
}

#[tonic::async_trait]
impl Neighbour for Giver {
    type FetchStream = Pin<Box<dyn Stream<Item = Result<FetchResponse, Status>> + Send>>;

    async fn fetch(
        &self,
        request: Request<FetchRequest>,
    ) -> Result<Response<Self::FetchStream>, Status> {
        let node = self.member(&request).await?;
        let busy = |_| Status::resource_exhausted("others are answered now: ask another, or again");
        let place = Arc::clone(&self.places).try_acquire_owned().map_err(busy)?;
        let may = lock(&self.answers).handle_request(node, now());
        if !may {
            return Err(Status::resource_exhausted("asked again too soon"));
        }
        let digests = request.into_inner().digests;
        let given = self.desired.lock().await.give(digests).await;
        let given = given.map_err(|error| Status::internal(format!("{error:#}")))?;
        let given = given.ok_or_else(|| {
            Status::failed_precondition("what this node has was not signed by its controller")
        })?;
        tracing::debug!(?node, "a neighbour is given what this node has");
        // The place is free once the answer is taken, which is when the next one is asked for, or the connection is over.
        let answer = stream::unfold((Some(given), place), async |(given, place)| {
            Some((Ok(given?), (None, place)))
        });
        Ok(Response::new(Box::pin(answer)))
    }
}

/// Asks neighbours that have a newer state, while no controller speaks, until `stop`.
///
/// # Errors
///
/// If the machine is out of threads.
pub async fn keep_exchange(
    giver: Giver,
    mut offers: mpsc::Receiver<Offer>,
    mut connection: watch::Receiver<Connection>,
    counts: watch::Sender<BTreeMap<String, u64>>,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    let mut version = giver.desired.lock().await.version();
    let own = *version.borrow_and_update();
    let mut machine = Exchange::new(own, rand::random(), now());
    loop {
        let deadline = machine.poll_timeout();
        tokio::select! {
            () = stop.cancelled() => return Ok(()),
            Some(offer) = offers.recv() => machine.handle_offer(offer, now()),
            changed = version.changed() => {
                changed?;
                machine.handle_own(*version.borrow_and_update());
            }
            changed = connection.changed() => {
                changed?;
                let speaks = {
                    let connection = connection.borrow_and_update();
                    connection.connected || connection.next_visit.is_some()
                };
                machine.handle_controller(speaks, now());
            }
            () = sleep_until(deadline) => {
                let Some(ask) = machine.handle_timeout(now()) else {
                    continue;
                };
                let node = ask.node;
                let outcome = tokio::select! {
                    () = stop.cancelled() => return Ok(()),
                    outcome = take_from(&giver, ask) => outcome?,
                };
                machine.handle_own(*version.borrow_and_update());
                machine.handle_outcome(node, outcome, now());
                counts.send_modify(|counts| {
                    *counts.entry(in_words(outcome).to_owned()).or_default() += 1;
                });
            }
        }
    }
}

async fn take_from(giver: &Giver, ask: Ask) -> anyhow::Result<Outcome> {
    let name = ask.name.clone();
    let fetched = time::timeout(LIFETIME, fetch(giver, ask)).await;
    let fetched = fetched.unwrap_or_else(|_| Err(anyhow::anyhow!("no answer in {LIFETIME:?}")));
    let given = match fetched {
        Ok(given) => given,
        Err(error) => {
            tracing::debug!(%name, "a neighbour did not give its state: {error:#}");
            return Ok(Outcome::Failed);
        }
    };
    match giver.desired.lock().await.adopt(given).await? {
        Ok(version) => {
            tracing::info!(%name, ?version, "no controller speaks: a neighbour gave a newer state of the mesh");
            Ok(Outcome::Taken)
        }
        Err(NotTaken::NotNeeded) => Ok(Outcome::Failed),
        Err(NotTaken::Distrusted(why)) => {
            tracing::warn!(%name, why, "what a neighbour gave is not taken");
            Ok(Outcome::Distrusted)
        }
    }
}

async fn fetch(giver: &Giver, ask: Ask) -> anyhow::Result<FetchResponse> {
    let credentials = giver.credentials.load_full();
    let identity = Identity::Node {
        name: ask.name,
        id: ask.node,
    };
    let digests = {
        let desired = giver.desired.lock().await;
        let wanted = buckets(desired.resources_len());
        desired.digests(wanted).await?
    };
    let channel = mutual::connect(&credentials, identity, ask.address).await?;
    let mut client = NeighbourClient::new(channel).max_decoding_message_size(SYNC_BYTES_MAX);
    let answer = client.fetch(FetchRequest { digests }).await;
    let mut answer = answer.map_err(|status| anyhow::anyhow!("{}", status.message()))?;
    let given = answer.get_mut().message().await;
    let given = given.map_err(|status| anyhow::anyhow!("{}", status.message()))?;
    given.context("the answer is empty")
}

fn in_words(outcome: Outcome) -> &'static str {
    match outcome {
        Outcome::Taken => "state_taken",
        Outcome::Failed => "state_not_given",
        Outcome::Distrusted => "state_distrusted",
    }
}

#[cfg(test)]
mod tests;
