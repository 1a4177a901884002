//! The control socket, to which `wg` talks.

use std::{
    collections::VecDeque,
    fs::{self, DirBuilder},
    io,
    os::unix::{
        fs::{DirBuilderExt as _, MetadataExt as _},
        net as std_unix,
    },
    path::{Path, PathBuf},
    rc::Rc,
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use rustix::{fs::Mode, io::Errno, process::umask};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::{UnixListener, UnixStream},
    task::{AbortHandle, spawn_local},
    time::sleep,
};
use zeroize::Zeroizing;

use super::{
    Device,
    uapi::{self, REQUEST_BYTES_MAX},
};

/// Where `wg` looks for sockets.
const FOLDER: &str = "/var/run/wireguard";

/// Most clients at once: people and a few monitors. At this limit the one that has been connected
/// longest goes, so nobody can lock the others out. They can hold 16 requests, 512 MiB; all
/// of them are root.
const CLIENTS_MAX: usize = 16;

/// How long to wait when the kernel gives no descriptor for a client.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// How often to look whether the socket is still there: as nobody waits for our end, seldom.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// How often, and how far apart, to ask a program that answers: one whose interface was just
/// deleted ends within a fifth of a second.
const ENDING_LOOKS: usize = 25;
const ENDING_PAUSE: Duration = Duration::from_millis(20);

/// A socket that exists until it is dropped or somebody removes it.
pub(crate) struct ControlSocket {
    path: PathBuf,
    /// Device and number of the file that we made; another may come to stand in its place.
    inode: (u64, u64),
    listener: UnixListener,
}

impl ControlSocket {
    /// Fails if a program answers at the socket of `interface`; a socket that a dead one left is
    /// removed.
    pub(crate) fn clear_place(interface: &str) -> Result<()> {
        let path = socket_path(interface);
        let mut answer = std_unix::UnixStream::connect(&path);
        for _ in 0..ENDING_LOOKS {
            if answer.is_err() {
                break;
            }
            thread::sleep(ENDING_PAUSE);
            answer = std_unix::UnixStream::connect(&path);
        }
        match answer {
            Ok(_) => bail!(
                "a program answers at {}: stop it, or choose another name than {interface}",
                path.display()
            ),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                let what = || format!("cannot remove {}, which nobody serves", path.display());
                fs::remove_file(&path).with_context(what)
            }
            Err(error) => Err(error).with_context(|| format!("cannot ask {}", path.display())),
        }
    }

    /// Makes the socket, for root only.
    pub(crate) fn bind(interface: &str) -> Result<Self> {
        let mut folder = DirBuilder::new();
        folder.recursive(true).mode(0o700);
        folder
            .create(FOLDER)
            .with_context(|| format!("cannot make the folder {FOLDER}"))?;
        let path = socket_path(interface);
        let before = umask(Mode::from_bits_truncate(0o177));
        let bound = UnixListener::bind(&path);
        umask(before);
        let what = || format!("cannot make the socket {}", path.display());
        let listener = bound.with_context(what)?;
        let inode = inode(&path).with_context(what)?;
        Ok(Self {
            path,
            inode,
            listener,
        })
    }

    fn is_there(&self) -> bool {
        inode(&self.path).is_ok_and(|inode| inode == self.inode)
    }

    /// Waits until somebody has removed or replaced the socket.
    pub(crate) async fn removed(&self) {
        while self.is_there() {
            sleep(LOOK_EVERY).await;
        }
    }

    /// Answers clients, for ever. None waits for another.
    pub(crate) async fn serve(&self, device: &Rc<Device>) {
        let mut clients: VecDeque<AbortHandle> = VecDeque::new();
        loop {
            let stream = match self.listener.accept().await {
                Ok((stream, _)) => stream,
                Err(error) => {
                    tracing::warn!("cannot accept a client of {}: {error}", self.path.display());
                    sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            clients.retain(|client| !client.is_finished());
            if clients.len() == CLIENTS_MAX
                && let Some(oldest) = clients.pop_front()
            {
                tracing::warn!("{CLIENTS_MAX} clients: the oldest is hung up on");
                oldest.abort();
            }
            let device = Rc::clone(device);
            let client = spawn_local(async move {
                if let Err(error) = serve_client(stream, &device).await {
                    tracing::debug!("a client hung up: {error}");
                }
            });
            clients.push_back(client.abort_handle());
        }
    }
}

impl Drop for ControlSocket {
    fn drop(&mut self) {
        if self.is_there()
            && let Err(error) = fs::remove_file(&self.path)
        {
            tracing::warn!("cannot remove {}: {error}", self.path.display());
        }
    }
}

fn socket_path(interface: &str) -> PathBuf {
    Path::new(FOLDER).join(format!("{interface}.sock"))
}

fn inode(path: &Path) -> io::Result<(u64, u64)> {
    let metadata = fs::symlink_metadata(path)?;
    Ok((metadata.dev(), metadata.ino()))
}

async fn serve_client(mut stream: UnixStream, device: &Device) -> io::Result<()> {
    let (reader, mut writer) = stream.split();
    let mut reader = BufReader::new(reader);
    loop {
        let mut request = Zeroizing::new(Vec::new());
        match read_request(&mut reader, &mut request).await? {
            Read::Whole => {
                let reply = device.answer(&request).await;
                writer.write_all(reply.as_bytes()).await?;
            }
            Read::TooLong => {
                tracing::warn!("refused: a request of more than {REQUEST_BYTES_MAX} bytes");
                let reply = uapi::reply_to_set(Err(Errno::MSGSIZE));
                writer.write_all(reply.as_bytes()).await?;
                // Where the next request begins cannot be known.
                return Ok(());
            }
            Read::End => return Ok(()),
        }
    }
}

/// How reading a request ended.
enum Read {
    /// With the empty line.
    Whole,
    TooLong,
    /// The client hung up; what it did not end is nothing.
    End,
}

async fn read_request(
    reader: impl tokio::io::AsyncBufRead + Unpin,
    request: &mut Vec<u8>,
) -> io::Result<Read> {
    let mut reader = reader.take(REQUEST_BYTES_MAX as u64);
    loop {
        let start = request.len();
        if reader.read_until(b'\n', request).await? == 0 {
            let long = request.len() >= REQUEST_BYTES_MAX;
            return Ok(if long { Read::TooLong } else { Read::End });
        }
        if request.get(start..) == Some(b"\n") {
            return Ok(Read::Whole);
        }
    }
}
