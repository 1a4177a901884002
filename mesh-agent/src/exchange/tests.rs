use mesh_api::{
    connect::ALPN,
    control::{SignedHead, SyncResponse},
};
use mesh_identity::tls::{ClientAuth, server_config};
use tempfile::TempDir;
use tokio::{
    io::{self, AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::Instant,
};

use super::*;
use crate::desired::tests::{Controller, node};

/// The node with this number, of a mesh that has 20 more with each generation: 40 KB to tell by the ninth.
async fn giver(controller: &Controller, number: u8, generation: u8) -> (Giver, TempDir) {
    let (desired, folder) = node(controller, generation.into(), 20 * generation).await;
    let desired = Arc::new(tokio::sync::Mutex::new(desired));
    let credentials = Arc::new(ArcSwap::from_pointee(controller.credentials_of(number)));
    (Giver::new(desired, credentials), folder)
}

async fn listen() -> (TcpListener, std::net::SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    (listener, address)
}

/// Asks the second node, which is at this address.
async fn ask(giver: &Giver, address: std::net::SocketAddr) -> Outcome {
    let ask = Ask {
        node: NodeId([2; 32]),
        name: "edge-2".parse().unwrap(),
        address,
    };
    take_from(giver, ask).await.unwrap()
}

/// Passes on what `to` says: so many bytes at once, and then one every `pause`.
async fn slow(listener: TcpListener, to: std::net::SocketAddr, at_once: u64, pause: Duration) {
    let (asker, _) = listener.accept().await.unwrap();
    let giver = TcpStream::connect(to).await.unwrap();
    let ((mut asks, mut hears), (says, mut hears_back)) = (asker.into_split(), giver.into_split());
    tokio::spawn(async move { io::copy(&mut asks, &mut hears_back).await });
    let mut first = says.take(at_once);
    io::copy(&mut first, &mut hears).await.ok();
    let mut says = first.into_inner();
    let mut byte = [0];
    while says.read_exact(&mut byte).await.is_ok() {
        time::sleep(pause).await;
        if hears.write_all(&byte).await.is_err() {
            return;
        }
    }
}

#[tokio::test]
async fn a_neighbour_is_asked_over_mutual_tls_and_gives_what_it_has() {
    let controller = Controller::new();
    let (older, _older) = giver(&controller, 1, 3).await;
    let (newer, _newer) = giver(&controller, 2, 9).await;
    let (listener, address) = listen().await;
    tokio::spawn(newer.serve(listener));
    assert_eq!(ask(&older, address).await, Outcome::Taken);
    assert_eq!(older.desired.lock().await.position().generation.0, 9);
}

/// In virtual time, over real sockets.
#[tokio::test(start_paused = true)]
async fn a_neighbour_that_takes_its_time_holds_nobody_up_for_longer_than_a_minute() {
    let controller = Controller::new();
    let (older, _older) = giver(&controller, 1, 3).await;
    let (newer, _newer) = giver(&controller, 2, 9).await;
    let (listener, real) = listen().await;
    tokio::spawn(newer.serve(listener));
    let (second, never) = (Duration::from_secs(1), LIFETIME * 10);
    for (what, at_once, pause) in [
        ("a byte a second", 0, second),
        ("a byte a second, of its answer", 8_000, second),
        ("half of its answer", 8_000, never),
        ("nothing", 0, never),
    ] {
        let (listener, address) = listen().await;
        tokio::spawn(slow(listener, real, at_once, pause));
        let begin = Instant::now();
        assert_eq!(ask(&older, address).await, Outcome::Failed, "{what}");
        let took = begin.elapsed();
        assert!(took <= LIFETIME + second, "{what}: {took:?}");
        assert_eq!(older.desired.lock().await.position().generation.0, 3);
    }
}

/// A neighbour of the mesh that gives more than there can be.
struct Endless;

#[tonic::async_trait]
impl Neighbour for Endless {
    type FetchStream = Pin<Box<dyn Stream<Item = Result<FetchResponse, Status>> + Send>>;

    async fn fetch(
        &self,
        _request: Request<FetchRequest>,
    ) -> Result<Response<Self::FetchStream>, Status> {
        let given = FetchResponse {
            head: Some(SignedHead {
                head: vec![0; SYNC_BYTES_MAX + 1],
                ..SignedHead::default()
            }),
            change: Some(SyncResponse::default()),
        };
        Ok(Response::new(Box::pin(stream::iter([Ok(given)]))))
    }
}

#[tokio::test]
async fn a_neighbour_that_gives_more_than_there_can_be_is_left_at_its_first_bytes() {
    let controller = Controller::new();
    let (older, _older) = giver(&controller, 1, 3).await;
    let (listener, address) = listen().await;
    let credentials = controller.credentials_of(2);
    let config = server_config(&credentials, ClientAuth::Required, ALPN).unwrap();
    let config = Arc::new(config);
    let places = Arc::new(Semaphore::new(1));
    let incoming = tls_incoming_of(listener, places, move || Arc::clone(&config), |_, _| ());
    let server = Server::builder().add_service(NeighbourServer::new(Endless));
    tokio::spawn(server.serve_with_incoming(incoming));
    assert_eq!(ask(&older, address).await, Outcome::Failed);
    assert_eq!(older.desired.lock().await.position().generation.0, 3);
}
