//! Small answers over HTTP/1.1, for load balancers and Prometheus: one request for each connection, and nothing read of its
//! body.

use std::{convert::Infallible, sync::Arc, time::Duration};

use hyper::{Request, Response, body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    task::JoinSet,
    time,
};

/// How long a connection lasts at most, with its one request: who asks is near.
const CONNECTION_LIMIT: Duration = Duration::from_secs(5);

/// What a request's header may take: hyper's least.
const HEADER_BYTES_MAX: usize = 8_192;

/// Pause after a connection that the kernel could not give (no file descriptor left).
const RETRY: Duration = Duration::from_secs(5);

/// Answers whoever connects to `listener`, as long as it is polled. At most as many at once as `connections` has permits; one
/// more for each listener waits, and others in the kernel's backlog.
pub async fn serve<F>(
    listener: TcpListener,
    connections: Arc<Semaphore>,
    answer: impl Fn(Request<Incoming>) -> F + Clone + Send + 'static,
) where
    F: Future<Output = Response<String>> + Send + 'static,
{
    let mut clients = JoinSet::new();
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(at = ?listener.local_addr().ok(), %error, "cannot take a connection");
                time::sleep(RETRY).await;
                continue;
            }
        };
        let Ok(permit) = Arc::clone(&connections).acquire_owned().await else {
            return; // Never closed.
        };
        while clients.try_join_next().is_some() {}
        let answer = answer.clone();
        clients.spawn(async move {
            let answered = time::timeout(CONNECTION_LIMIT, answer_one(stream, answer)).await;
            if let Ok(Err(error)) = answered {
                tracing::debug!(%error, "a request went wrong");
            }
            drop(permit);
        });
    }
}

async fn answer_one<F>(
    stream: TcpStream,
    answer: impl Fn(Request<Incoming>) -> F + Send,
) -> hyper::Result<()>
where
    F: Future<Output = Response<String>> + Send,
{
    let answer = service_fn(move |request| {
        let answer = answer(request);
        async move { Ok::<_, Infallible>(answer.await) }
    });
    http1::Builder::new()
        .timer(TokioTimer::new())
        .keep_alive(false)
        .max_buf_size(HEADER_BYTES_MAX)
        .serve_connection(TokioIo::new(stream), answer)
        .await
}
