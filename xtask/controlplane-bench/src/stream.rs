//! One simulated agent: a connection and its `Sync` stream, and the next one when that breaks.

use std::{net::Ipv4Addr, time::Duration};

use anyhow::{Context as _, Result, ensure};
use integration::joining::connect;
use mesh_api::{
    connect::ALPN,
    control::{Resource, SyncRequest, SyncResponse, resource::Kind},
    resources::SYNC_BYTES_MAX,
};
use mesh_identity::{credentials::Credentials, tls::client_config};
use prost::{
    Message as _,
    bytes::{Buf as _, Bytes},
};
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, sleep},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{
    Request, Status,
    client::Grpc,
    codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder},
    codegen::http::uri::PathAndQuery,
    transport::Channel,
};

/// As an agent's, `mesh-agent/src/sync.rs`: the first pause, the longest, and how long a good connection holds.
const RETRY_MIN: Duration = Duration::from_millis(500);
const RETRY_MAX: Duration = Duration::from_secs(30);
const GOOD_CONNECTION: Duration = Duration::from_secs(10);

/// Acknowledgements that wait, as an agent has it.
const REQUESTS_MAX: usize = 4;

/// What happened to an agent.
#[derive(Debug)]
pub(crate) struct Heard {
    /// Which.
    pub(crate) agent: usize,
    /// When.
    pub(crate) at_ns: u64,
    pub(crate) what: What,
}

#[derive(Debug)]
pub(crate) enum What {
    /// The first answer on a connection: it is up to date. Its size in bytes, and whether it held everything.
    First { bytes: u64, full: bool },
    /// A change with the endpoint that is looked for. Its size in bytes.
    Change { bytes: u64 },
    /// The connection is gone, or did not come about.
    Ended(String),
}

/// Who an agent is, and whom it tells.
pub(crate) struct Agent {
    pub(crate) number: usize,
    pub(crate) controller: String,
    pub(crate) credentials: Credentials,
    /// The endpoint that is looked for.
    pub(crate) wanted: watch::Receiver<Option<Ipv4Addr>>,
    pub(crate) heard: mpsc::Sender<Heard>,
}

impl Agent {
    /// Follows the controller as an agent does, for ever.
    pub(crate) async fn run(self) {
        let mut has = SyncRequest::default();
        let mut pause = RETRY_MIN;
        loop {
            let begun = Instant::now();
            let ended = self.follow(&mut has).await;
            let problem = ended.map_or_else(|error| format!("{error:#}"), |()| "ended".to_owned());
            if self.tell(What::Ended(problem)).await.is_err() {
                return;
            }
            if begun.elapsed() > GOOD_CONNECTION {
                pause = RETRY_MIN;
            }
            sleep(pause.mul_f64(rand::random_range(0.5..1.0))).await;
            pause = (pause * 2).min(RETRY_MAX);
        }
    }

    async fn follow(&self, has: &mut SyncRequest) -> Result<()> {
        let config = client_config(&self.credentials, ALPN)?;
        let domain = self.credentials.trust_domain();
        let channel = connect(&self.controller, domain, config).await?;
        let mut client = Grpc::new(channel).max_decoding_message_size(SYNC_BYTES_MAX);
        loop {
            let had = has.clone();
            self.follow_stream(&mut client, has).await?;
            // As an agent has it: after a large answer the controller ends the stream.
            ensure!(*has != had, "the controller closed the stream");
        }
    }

    async fn follow_stream(&self, client: &mut Grpc<Channel>, has: &mut SyncRequest) -> Result<()> {
        client.ready().await?;
        let (say, said) = mpsc::channel(REQUESTS_MAX);
        say.send(has.clone()).await?;
        let path = PathAndQuery::from_static("/holdfast.control.v1.Control/Sync");
        let answers = client.streaming(Request::new(ReceiverStream::new(said)), path, SyncCodec);
        let mut answers = answers.await?.into_inner();
        let mut is_first = true;
        while let Some(told) = answers.message().await? {
            let at_ns = crate::now_ns();
            let wanted = *self.wanted.borrow();
            has.store_id = told.head.store_id;
            has.generation = told.head.generation;
            say.send(has.clone())
                .await
                .context("the stream is closed")?;
            let (bytes, full) = (told.bytes, told.head.full);
            if std::mem::take(&mut is_first) {
                self.tell_at(at_ns, What::First { bytes, full }).await?;
            }
            if wanted.is_some_and(|wanted| has_endpoint(&told.set, &wanted.to_string())) {
                self.tell_at(at_ns, What::Change { bytes }).await?;
            }
        }
        Ok(())
    }

    async fn tell(&self, what: What) -> Result<()> {
        self.tell_at(crate::now_ns(), what).await
    }

    async fn tell_at(&self, at_ns: u64, what: What) -> Result<()> {
        let agent = self.number;
        let heard = Heard { agent, at_ns, what };
        self.heard.send(heard).await.ok().context("nobody listens")
    }
}

fn has_endpoint(set: &[Resource], address: &str) -> bool {
    set.iter().any(|resource| match &resource.kind {
        Some(Kind::Slice(slice)) => slice.endpoints.iter().any(|one| one.address == address),
        Some(_) | None => false,
    })
}

/// What an answer begins with; all else is passed over.
#[derive(Clone, PartialEq, prost::Message)]
struct Head {
    #[prost(bytes = "vec", tag = "1")]
    store_id: Vec<u8>,
    #[prost(uint64, tag = "2")]
    generation: u64,
    #[prost(bool, tag = "3")]
    full: bool,
}

/// An answer, of which only a change is decoded as a whole.
#[derive(Debug)]
struct Told {
    head: Head,
    bytes: u64,
    set: Vec<Resource>,
}

impl Told {
    fn read(message: Bytes) -> Result<Self, prost::DecodeError> {
        let bytes = message.len() as u64;
        let head = Head::decode(message.clone())?;
        let set = if head.full {
            Vec::new()
        } else {
            SyncResponse::decode(message)?.set
        };
        Ok(Self { head, bytes, set })
    }
}

/// How `Sync`'s messages are written and read.
#[derive(Debug, Clone, Copy)]
struct SyncCodec;

impl Codec for SyncCodec {
    type Encode = SyncRequest;
    type Decode = Told;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        *self
    }

    fn decoder(&mut self) -> Self {
        *self
    }
}

impl Encoder for SyncCodec {
    type Item = SyncRequest;
    type Error = Status;

    fn encode(&mut self, item: SyncRequest, to: &mut EncodeBuf<'_>) -> Result<(), Status> {
        let encoded = item.encode(to);
        encoded.map_err(|error| Status::internal(error.to_string()))
    }
}

impl Decoder for SyncCodec {
    type Item = Told;
    type Error = Status;

    fn decode(&mut self, from: &mut DecodeBuf<'_>) -> Result<Option<Told>, Status> {
        let message = from.copy_to_bytes(from.remaining());
        let told = Told::read(message);
        told.map(Some)
            .map_err(|error| Status::internal(error.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use mesh_api::control::{Endpoint, EndpointSlice};

    use super::*;

    fn answer(full: bool) -> SyncResponse {
        let endpoint = Endpoint {
            address: "10.64.0.1".to_owned(),
            ..Endpoint::default()
        };
        let slice = EndpointSlice {
            endpoints: vec![endpoint],
            ..EndpointSlice::default()
        };
        SyncResponse {
            store_id: vec![7; 16],
            generation: 5,
            full,
            set: vec![Resource {
                kind: Some(Kind::Slice(slice)),
            }],
            ..SyncResponse::default()
        }
    }

    #[test]
    fn of_a_full_answer_only_the_head_is_read_and_of_a_change_all() {
        for full in [true, false] {
            let bytes = answer(full).encode_to_vec();
            let told = Told::read(bytes.clone().into()).unwrap();
            assert_eq!(told.bytes, bytes.len() as u64);
            assert_eq!((told.head.generation, told.head.full), (5, full));
            assert_eq!(told.head.store_id, [7; 16]);
            assert_eq!(has_endpoint(&told.set, "10.64.0.1"), !full);
            assert!(!has_endpoint(&told.set, "10.64.0.2"));
        }
    }
}
