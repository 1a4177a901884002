//! Asks one server one question.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    str::FromStr,
    time::Duration,
};

use hickory_net::NetError;
use hickory_proto::{
    op::{Edns, Message, MessageType, Query, ResponseCode},
    rr::{Name, RecordType},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpSocket, TcpStream, UdpSocket},
    time::{Instant, timeout, timeout_at},
};

use crate::answer::UDP_PAYLOAD_MAX_BYTES;

/// After this long without an answer the question is sent once more: longer than a satellite
/// hop of 600 ms would be safer for the link, and worse for everybody who lost a packet.
const RESEND_AFTER: Duration = Duration::from_millis(400);

/// After this long the server counts as silent: twice the round trip of a geostationary
/// satellite, and well inside the 5 s that glibc waits.
const UDP_TIMEOUT: Duration = Duration::from_millis(1200);

/// For connecting, asking and answering over TCP.
const TCP_TIMEOUT: Duration = Duration::from_millis(1500);

/// Room for servers that send more than they were asked to.
const UDP_ANSWER_MAX_BYTES: usize = 4096;

/// What a server said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reply {
    /// The response code: `NOERROR`, `NXDOMAIN`, `SERVFAIL` …
    pub code: String,
    /// The answer section, a record a line as in a zone file.
    pub answers: Vec<String>,
    /// How long it took.
    pub elapsed: Duration,
}

/// Why there is no [`Reply`].
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    /// The name is no domain name.
    #[error("{0:?} is not a domain name")]
    Name(String),
    /// The type is no record type.
    #[error("{0:?} is not a record type (A, AAAA, SRV, PTR, TXT, CNAME …)")]
    Type(String),
    /// The exchange did not work.
    #[error("no answer from {server}")]
    Exchange {
        /// The server.
        server: SocketAddr,
        /// What went wrong.
        source: ExchangeError,
    },
}

/// Why an exchange gave no answer.
#[derive(Debug, thiserror::Error)]
pub enum ExchangeError {
    /// Nothing came back in time.
    #[error("nothing came back in time")]
    Timeout,
    /// The network said no.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// TLS or HTTP did not work.
    #[error(transparent)]
    Secure(#[from] NetError),
    /// What came back is not an answer to the question.
    #[error("what came back is not an answer to the question")]
    NotAnAnswer,
    /// The question cannot be written.
    #[error("the question cannot be written")]
    Unwritable,
}

/// Asks `server` for the records of `record_type` at `name` (always a full name, no search list).
///
/// # Errors
///
/// [`AskError`], ready to be shown to the person who asked.
pub async fn ask(server: SocketAddr, name: &str, record_type: &str) -> Result<Reply, AskError> {
    let mut full = Name::from_ascii(name).map_err(|_| AskError::Name(name.to_owned()))?;
    full.set_fqdn(true);
    let record_type = RecordType::from_str(&record_type.to_ascii_uppercase())
        .map_err(|_| AskError::Type(record_type.to_owned()))?;
    let question = question(Query::query(full, record_type));
    let started = Instant::now();
    let received = exchange(server, question, None).await;
    let (message, _) = received.map_err(|source| AskError::Exchange { server, source })?;
    Ok(Reply {
        code: code_text(message.response_code),
        answers: message.answers.iter().map(ToString::to_string).collect(),
        elapsed: started.elapsed(),
    })
}

/// Asks `server` for the addresses of `name` (always a full name, no search list), by the interface `device`, or as the
/// kernel's routes say. IPv4 first.
///
/// # Errors
///
/// [`AskError`], if neither family has an answer.
pub async fn addresses(
    server: SocketAddr,
    name: &str,
    device: Option<&str>,
) -> Result<Vec<IpAddr>, AskError> {
    let mut full = Name::from_utf8(name).map_err(|_| AskError::Name(name.to_owned()))?;
    full.set_fqdn(true);
    let of = async |record_type| {
        let question = question(Query::query(full.clone(), record_type));
        exchange(server, question, device).await
    };
    let (v4, v6) = tokio::join!(of(RecordType::A), of(RecordType::AAAA));
    if let (Err(source), Err(_)) = (&v4, &v6) {
        tracing::debug!(%server, %source, "no answer of either family");
    }
    let mut found = Vec::new();
    let mut failed = None;
    for asked in [v4, v6] {
        match asked {
            Ok((message, _)) => {
                found.extend(
                    message
                        .answers
                        .iter()
                        .filter_map(|record| record.data.ip_addr()),
                );
            }
            Err(source) => failed = Some(AskError::Exchange { server, source }),
        }
    }
    match failed {
        Some(error) if found.is_empty() => Err(error),
        Some(_) | None => Ok(found),
    }
}

/// A recursive question with a fresh random id.
pub(crate) fn question(query: Query) -> Message {
    let mut message = Message::query();
    message.metadata.recursion_desired = true;
    message.add_query(query);
    let mut edns = Edns::new();
    edns.set_max_payload(UDP_PAYLOAD_MAX_BYTES);
    message.set_edns(edns);
    message
}

/// Puts `question` to `server` over UDP, and over TCP if the answer does not fit, by the interface `device`, or as the kernel's
/// routes say. Gives the answer, and the bytes that it came in.
///
/// # Errors
///
/// [`ExchangeError::Timeout`] if the server is silent; the others come at once.
pub(crate) async fn exchange(
    server: SocketAddr,
    mut question: Message,
    device: Option<&str>,
) -> Result<(Message, Vec<u8>), ExchangeError> {
    let mut answer = over_udp(server, &question, device).await?;
    let refused = matches!(
        answer.0.response_code,
        ResponseCode::FormErr | ResponseCode::NotImp
    );
    if refused && answer.0.edns.is_none() && question.edns.is_some() {
        question.edns = None; // An old server at the edge (RFC 6891 §6.2.2).
        answer = over_udp(server, &question, device).await?;
    }
    if answer.0.truncation {
        return exchange_by_tcp(server, &question, device).await;
    }
    Ok(answer)
}

/// Puts `question` to `server` over TCP alone.
///
/// # Errors
///
/// As [`exchange`].
pub(crate) async fn exchange_by_tcp(
    server: SocketAddr,
    question: &Message,
    device: Option<&str>,
) -> Result<(Message, Vec<u8>), ExchangeError> {
    let over_tcp = timeout(TCP_TIMEOUT, over_tcp(server, question, device));
    over_tcp.await.unwrap_or(Err(ExchangeError::Timeout))
}

async fn over_udp(
    server: SocketAddr,
    question: &Message,
    device: Option<&str>,
) -> Result<(Message, Vec<u8>), ExchangeError> {
    let bytes = question.to_vec().map_err(|_| ExchangeError::Unwritable)?;
    let local = match server {
        SocketAddr::V4(_) => IpAddr::from(Ipv4Addr::UNSPECIFIED),
        SocketAddr::V6(_) => IpAddr::from(Ipv6Addr::UNSPECIFIED),
    };
    // A socket for each question: a random port to guess (RFC 5452 §9.2), and, connected, an
    // error at once when nobody listens there.
    let socket = UdpSocket::bind((local, 0)).await?;
    socket.bind_device(device.map(str::as_bytes))?;
    socket.connect(server).await?;
    let start = Instant::now();
    let mut buffer = vec![0; UDP_ANSWER_MAX_BYTES];
    for wait in [RESEND_AFTER, UDP_TIMEOUT] {
        socket.send(&bytes).await?;
        let answered = answer_from(&socket, &mut buffer, question);
        if let Ok(answer) = timeout_at(start + wait, answered).await {
            return answer;
        }
    }
    Err(ExchangeError::Timeout)
}

/// The first datagram that answers `question`; others may be forged, and are passed over.
async fn answer_from(
    socket: &UdpSocket,
    buffer: &mut [u8],
    question: &Message,
) -> Result<(Message, Vec<u8>), ExchangeError> {
    loop {
        let len = socket.recv(buffer).await?;
        let bytes = buffer.get(..len).unwrap_or_default();
        if let Some(message) = parse_answer(bytes, question) {
            return Ok((message, bytes.to_vec()));
        }
    }
}

/// Connects, by the interface `device`, or as the kernel's routes say.
pub(crate) async fn connect(server: SocketAddr, device: Option<&str>) -> io::Result<TcpStream> {
    let socket = match server {
        SocketAddr::V4(_) => TcpSocket::new_v4()?,
        SocketAddr::V6(_) => TcpSocket::new_v6()?,
    };
    socket.bind_device(device.map(str::as_bytes))?;
    socket.set_nodelay(true)?;
    socket.connect(server).await
}

async fn over_tcp(
    server: SocketAddr,
    question: &Message,
    device: Option<&str>,
) -> Result<(Message, Vec<u8>), ExchangeError> {
    let bytes = question.to_vec().map_err(|_| ExchangeError::Unwritable)?;
    let len = u16::try_from(bytes.len()).map_err(|_| ExchangeError::Unwritable)?;
    let mut stream = connect(server, device).await?;
    stream
        .write_all(&[&len.to_be_bytes()[..], &bytes].concat())
        .await?;
    let mut answer = vec![0; usize::from(stream.read_u16().await?)];
    stream.read_exact(&mut answer).await?;
    let message = parse_answer(&answer, question).ok_or(ExchangeError::NotAnAnswer)?;
    Ok((message, answer))
}

fn parse_answer(bytes: &[u8], question: &Message) -> Option<Message> {
    let message = Message::from_vec(bytes).ok()?;
    // Old servers leave the question out when they say FORMERR.
    let bare_error = message.queries.is_empty() && message.response_code == ResponseCode::FormErr;
    let answers = message.message_type == MessageType::Response
        && message.id == question.id
        && (message.queries == question.queries || bare_error);
    answers.then_some(message)
}

pub(crate) fn code_text(code: ResponseCode) -> String {
    format!("{code:?}").to_ascii_uppercase()
}
