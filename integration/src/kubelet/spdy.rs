//! Forwarded ports: SPDY/3.1 streams (draft-mbelshe-httpbis-spdy-00) in WebSocket messages, as `kubectl` tunnels them.
//! Each connection to a forwarded port is two streams, one of bytes and one of what went wrong, with the same
//! `requestid`. Only what a client of `port-forward` does is understood.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, bail, ensure};
use bytes::{Buf as _, Bytes, BytesMut};
use futures_util::{SinkExt as _, StreamExt as _};
use miniz_oxide::inflate::{
    TINFLStatus,
    core::{
        DecompressorOxide, decompress,
        inflate_flags::{TINFL_FLAG_HAS_MORE_INPUT, TINFL_FLAG_USING_NON_WRAPPING_OUTPUT_BUF},
    },
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    sync::mpsc,
    task::JoinSet,
};
use tokio_tungstenite::tungstenite::Message;

use super::Socket;

/// With what header blocks are compressed from the start (§2.6.10.1).
static DICTIONARY: &[u8] = include_bytes!("spdy-dictionary.bin");

/// All header blocks of one session, inflated: 100 bytes for each stream.
const HEADERS_BYTES_MAX: usize = 1 << 20;

const SYN_STREAM: u16 = 1;
const SYN_REPLY: u16 = 2;
const RST_STREAM: u16 = 3;
const PING: u16 = 6;
const GOAWAY: u16 = 7;

/// The flag of the last frame of a stream's direction.
const FIN: u8 = 1;

/// A control frame's first two bytes: the bit that says so, and the version.
const CONTROL: [u8; 2] = [0x80, 3];

/// Frames that wait for the client, and chunks that wait for the port.
const QUEUE_MAX: usize = 16;

const CHUNK_BYTES_MAX: usize = 32 << 10;

/// Forwards ports for the client at the other end of `socket`.
pub(super) async fn forward(socket: Socket) -> Result<()> {
    let (mut sink, mut messages) = socket.split();
    let (queue, mut queued) = mpsc::channel::<Vec<u8>>(QUEUE_MAX);
    let hear = async {
        let mut session = Session::new(queue);
        let mut bytes = BytesMut::new();
        while let Some(Ok(message)) = messages.next().await {
            if let Message::Binary(more) = message {
                bytes.extend_from_slice(&more);
                while let Some(frame) = next_frame(&mut bytes) {
                    session.take(frame).await?;
                }
            }
        }
        anyhow::Ok(())
    };
    let say = async {
        while let Some(frame) = queued.recv().await {
            sink.send(Message::Binary(frame.into())).await?;
        }
        anyhow::Ok(())
    };
    tokio::select! {
        heard = hear => heard,
        said = say => said,
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Frame {
    Control { kind: u16, flags: u8, body: Bytes },
    Data { stream: u32, flags: u8, body: Bytes },
}

/// Takes the next whole frame from the front (§2.2).
fn next_frame(bytes: &mut BytesMut) -> Option<Frame> {
    let (head, _) = bytes.split_first_chunk::<8>()?;
    let &[a, b, c, d, flags, x, y, z] = head;
    let length = usize::try_from(u32::from_be_bytes([0, x, y, z])).ok()?;
    if bytes.len() < 8 + length {
        return None;
    }
    bytes.advance(8);
    let body = bytes.split_to(length).freeze();
    Some(if [a, b] == CONTROL {
        let kind = u16::from_be_bytes([c, d]);
        Frame::Control { kind, flags, body }
    } else {
        let stream = u32::from_be_bytes([a, b, c, d]);
        Frame::Data {
            stream,
            flags,
            body,
        }
    })
}

fn frame(head: [u8; 4], flags: u8, body: &[u8]) -> Vec<u8> {
    let length = u32::try_from(body.len()).unwrap_or(0).to_be_bytes();
    let [_, x, y, z] = length;
    let mut frame = Vec::with_capacity(8 + body.len());
    frame.extend_from_slice(&head);
    frame.extend_from_slice(&[flags, x, y, z]);
    frame.extend_from_slice(body);
    frame
}

fn control(kind: u16, body: &[u8]) -> Vec<u8> {
    let [a, b] = CONTROL;
    let [c, d] = kind.to_be_bytes();
    frame([a, b, c, d], 0, body)
}

struct Session {
    queue: mpsc::Sender<Vec<u8>>,
    headers: Headers,
    replied: bool,
    /// Streams for errors, by the request that they are of.
    errors: BTreeMap<String, u32>,
    /// Bytes for ports, by stream; an end is an empty chunk.
    ports: BTreeMap<u32, mpsc::Sender<Bytes>>,
    connections: JoinSet<()>,
}

impl Session {
    fn new(queue: mpsc::Sender<Vec<u8>>) -> Self {
        Self {
            queue,
            headers: Headers::new(),
            replied: false,
            errors: BTreeMap::new(),
            ports: BTreeMap::new(),
            connections: JoinSet::new(),
        }
    }

    async fn take(&mut self, frame: Frame) -> Result<()> {
        while self.connections.try_join_next().is_some() {}
        match frame {
            Frame::Control {
                kind: SYN_STREAM,
                body,
                ..
            } => self.open(&body).await,
            Frame::Control {
                kind: RST_STREAM,
                body,
                ..
            } => {
                let stream = body.first_chunk().copied().context("a short RST_STREAM")?;
                self.ports.remove(&u32::from_be_bytes(stream));
                Ok(())
            }
            Frame::Control {
                kind: PING, body, ..
            } => Ok(self.queue.send(control(PING, &body)).await?),
            Frame::Control { kind: GOAWAY, .. } => Ok(()), // The connection ends by itself.
            Frame::Control { kind, flags, .. } => bail!("frame {kind} with flags {flags}"),
            Frame::Data {
                stream,
                flags,
                body,
            } => {
                let Some(port) = self.ports.get(&stream) else {
                    return Ok(()); // The client says that it sends nothing on a stream for errors.
                };
                if !body.is_empty() {
                    port.send(body).await.ok(); // The port may be closed.
                }
                if flags & FIN != 0 {
                    self.ports.remove(&stream);
                }
                Ok(())
            }
        }
    }

    async fn open(&mut self, body: &[u8]) -> Result<()> {
        let (fixed, block) = body
            .split_first_chunk::<10>()
            .context("a short SYN_STREAM")?;
        let &[a, b, c, d, ..] = fixed;
        let stream = u32::from_be_bytes([a, b, c, d]);
        let headers = self.headers.read(block)?;
        let header = |name: &str| headers.get(name).map_or("", String::as_str);
        let mut reply = vec![a, b, c, d];
        if !self.replied {
            reply.extend_from_slice(&[0x78, 0x01]); // zlib, and no dictionary.
            self.replied = true;
        }
        // No headers, stored; and an empty block, at which a reader hands out what it has.
        reply.extend_from_slice(&[0, 4, 0, 0xfb, 0xff, 0, 0, 0, 0]);
        reply.extend_from_slice(&[0, 0, 0, 0xff, 0xff]);
        self.queue.send(control(SYN_REPLY, &reply)).await?;
        let request = header("requestid").to_owned();
        match header("streamtype") {
            "error" => {
                self.errors.insert(request, stream);
            }
            "data" => {
                let errors = self.errors.remove(&request);
                let errors = errors.context("a port without a stream for its errors")?;
                let port = header("port").parse().context("which port?")?;
                let (sender, chunks) = mpsc::channel(QUEUE_MAX);
                self.ports.insert(stream, sender);
                let connection = Connection {
                    queue: self.queue.clone(),
                    stream,
                    errors,
                    port,
                };
                self.connections.spawn(connection.run(chunks));
            }
            other => bail!("a stream of type {other:?}"),
        }
        Ok(())
    }
}

/// One connection to a port.
struct Connection {
    queue: mpsc::Sender<Vec<u8>>,
    stream: u32,
    errors: u32,
    port: u16,
}

impl Connection {
    async fn run(self, mut chunks: mpsc::Receiver<Bytes>) {
        let copied = async {
            let stream = TcpStream::connect(("127.0.0.1", self.port)).await;
            let (mut read, mut write) = stream.context("dial")?.into_split();
            let to_port = async {
                while let Some(chunk) = chunks.recv().await {
                    write.write_all(&chunk).await?;
                }
                write.shutdown().await
            };
            let from_port = async {
                let mut chunk = vec![0; CHUNK_BYTES_MAX];
                while let count @ 1.. = read.read(&mut chunk).await? {
                    self.say(self.stream, 0, chunk.get(..count).unwrap_or_default())
                        .await;
                }
                self.say(self.stream, FIN, &[]).await;
                Ok(())
            };
            tokio::try_join!(to_port, from_port)?;
            anyhow::Ok(())
        };
        if let Err(error) = copied.await {
            let why = format!("error forwarding port {}: {error:#}", self.port);
            self.say(self.errors, 0, why.as_bytes()).await;
            self.say(self.stream, FIN, &[]).await;
        }
        self.say(self.errors, FIN, &[]).await;
    }

    async fn say(&self, stream: u32, flags: u8, bytes: &[u8]) {
        let frame = frame(stream.to_be_bytes(), flags, bytes);
        self.queue.send(frame).await.ok(); // The client may be gone.
    }
}

/// Header blocks of a session: one zlib stream (§2.6.10.1).
struct Headers {
    inflate: Box<DecompressorOxide>,
    /// What was inflated so far, after the dictionary.
    window: Vec<u8>,
    end: usize,
    begun: bool,
}

impl Headers {
    fn new() -> Self {
        let mut window = vec![0; DICTIONARY.len() + HEADERS_BYTES_MAX];
        for (at, byte) in window.iter_mut().zip(DICTIONARY) {
            *at = *byte;
        }
        Self {
            inflate: Box::default(),
            window,
            end: DICTIONARY.len(),
            begun: false,
        }
    }

    fn read(&mut self, mut block: &[u8]) -> Result<BTreeMap<String, String>> {
        if !self.begun {
            let (head, rest) = block
                .split_first_chunk::<6>()
                .context("a short zlib header")?;
            let &[_, flags, checksum @ ..] = head;
            ensure!(flags & 0x20 != 0, "no dictionary is used");
            ensure!(
                u32::from_be_bytes(checksum) == adler32(DICTIONARY),
                "another dictionary is used"
            );
            (block, self.begun) = (rest, true);
        }
        let flags = TINFL_FLAG_HAS_MORE_INPUT | TINFL_FLAG_USING_NON_WRAPPING_OUTPUT_BUF;
        let (status, taken, more) =
            decompress(&mut self.inflate, block, &mut self.window, self.end, flags);
        ensure!(
            status == TINFLStatus::NeedsMoreInput && taken == block.len(),
            "headers: {status:?} after {taken} of {} bytes",
            block.len()
        );
        let inflated = self.window.get(self.end..self.end + more);
        self.end += more;
        parse(inflated.unwrap_or_default())
    }
}

/// Names and values (§2.6.10).
fn parse(mut block: &[u8]) -> Result<BTreeMap<String, String>> {
    fn number(block: &mut &[u8]) -> Result<usize> {
        let (number, rest) = block.split_first_chunk().context("a short header block")?;
        *block = rest;
        Ok(u32::from_be_bytes(*number).try_into()?)
    }
    fn text(block: &mut &[u8]) -> Result<String> {
        let length = number(block)?;
        let (text, rest) = block.split_at_checked(length).context("a short header")?;
        *block = rest;
        Ok(String::from_utf8(text.to_vec())?)
    }
    let count = number(&mut block)?;
    let headers = (0..count).map(|_| Ok((text(&mut block)?, text(&mut block)?)));
    headers.collect()
}

/// RFC 1950 §8.2.
fn adler32(bytes: &[u8]) -> u32 {
    let step = |(a, b): (u32, u32), &byte: &u8| {
        let a = (a + u32::from(byte)) % 65_521;
        (a, (b + a) % 65_521)
    };
    let (a, b) = bytes.iter().fold((1, 0), step);
    (b << 16) | a
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_come_whole() {
        let mut bytes = BytesMut::from(frame([0, 0, 0, 5], FIN, b"hello").as_slice());
        bytes.extend_from_slice(&control(PING, &[0, 0, 0, 1])[..6]);
        let data = Frame::Data {
            stream: 5,
            flags: FIN,
            body: Bytes::from_static(b"hello"),
        };
        assert_eq!(next_frame(&mut bytes), Some(data));
        assert_eq!(next_frame(&mut bytes), None);
        assert_eq!(bytes.len(), 6);
    }

    #[test]
    fn the_dictionary_is_the_drafts() {
        assert_eq!(adler32(DICTIONARY), 0xe3c6_a7c2);
    }
}
