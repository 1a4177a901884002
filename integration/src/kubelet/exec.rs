//! Sessions in containers, by the channels of `v5.channel.k8s.io`: the first byte of each message says which.

use std::{
    process::{ExitStatus, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result};
use bytes::{Bytes, BytesMut};
use futures_util::{SinkExt as _, StreamExt as _};
use serde_json::{Value, json};
use tempfile::NamedTempFile;
use tokio::{
    fs,
    io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _},
    process::{ChildStdin, Command},
    sync::mpsc,
    time,
};
use tokio_tungstenite::tungstenite::{
    Message, Utf8Bytes,
    protocol::{CloseFrame, frame::coding::CloseCode},
};

use super::Socket;
use crate::apiserver::Query;

const STDIN: u8 = 0;
const STDOUT: u8 = 1;
const STDERR: u8 = 2;
/// The size of the terminal, as JSON.
const RESIZE: u8 = 4;
/// How it ended, as a `Status`.
const ERROR: u8 = 3;
/// The channel that the next byte names sends no more.
const CLOSE: u8 = 255;

/// Most that a process' output is read at once.
const CHUNK_BYTES_MAX: usize = 32 << 10;

/// Messages that wait for the client.
const QUEUE_MAX: usize = 16;

/// How often is looked whether a session's terminal is there, and how many times: 2 s.
const TERMINAL_LOOK: Duration = Duration::from_millis(20);
const TERMINAL_LOOKS_MAX: u32 = 100;

/// As long as a container runtime takes at least. What comes before `kubectl` (1.32) has made its streams is lost to it.
const START: Duration = Duration::from_millis(100);

/// Runs what the query says, for the client at the other end of `socket`; without that, it is killed.
pub(super) async fn run(socket: Socket, query: Query) -> Result<()> {
    time::sleep(START).await;
    let (program, arguments) = query.texts("command").split_first().context("no command")?;
    let piped = |name: &str| match query.flag(name) {
        true => Stdio::piped(),
        false => Stdio::null(),
    };
    let terminal = query.flag("tty").then(Terminal::new).transpose()?;
    let mut command = match &terminal {
        Some(terminal) => terminal.command(query.texts("command")),
        None => {
            let mut command = Command::new(program);
            command.args(arguments);
            command
        }
    };
    let mut child = command
        .stdin(piped("input"))
        .stdout(piped("output"))
        .stderr(piped("error"))
        .kill_on_drop(true)
        .spawn()
        .with_context(|| format!("start {program}"))?;
    let (mut sink, mut messages) = socket.split();
    let (queue, mut queued) = mpsc::channel::<Message>(QUEUE_MAX);
    let mut stdin = child.stdin.take();
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    let hear = async {
        while let Some(Ok(message)) = messages.next().await {
            if let Message::Binary(bytes) = message {
                heard(&mut stdin, terminal.as_ref(), &bytes).await;
            }
        }
    };
    let finish = async {
        tokio::join!(
            pump(STDOUT, stdout, queue.clone()),
            pump(STDERR, stderr, queue.clone())
        );
        let status = status(child.wait().await?);
        queue
            .send(message(ERROR, status.to_string().as_bytes()))
            .await
            .ok();
        let done = CloseFrame {
            code: CloseCode::Normal,
            reason: Utf8Bytes::default(),
        };
        queue.send(Message::Close(Some(done))).await.ok();
        anyhow::Ok(())
    };
    let say = async {
        while let Some(message) = queued.recv().await {
            let last = message.is_close();
            sink.send(message).await?;
            if last {
                break;
            }
        }
        anyhow::Ok(())
    };
    tokio::select! {
        () = hear => Ok(()), // The client is gone.
        both = async { tokio::try_join!(finish, say) } => both.map(drop),
    }
}

async fn heard(stdin: &mut Option<ChildStdin>, terminal: Option<&Terminal>, bytes: &[u8]) {
    match bytes.split_first() {
        Some((&STDIN, bytes)) => {
            if let Some(open) = stdin
                && open.write_all(bytes).await.is_err()
            {
                *stdin = None; // It reads no more.
            }
        }
        Some((&CLOSE, [STDIN])) => *stdin = None,
        Some((&RESIZE, size)) => {
            if let Some(terminal) = terminal {
                terminal.resize(size).await;
            }
        }
        _ => {} // Nothing else is said to a session.
    }
}

/// A terminal for a session, by `script`.
struct Terminal {
    /// Has its name, once there is one.
    name: NamedTempFile,
}

impl Terminal {
    fn new() -> Result<Self> {
        let name = NamedTempFile::new().context("make a file for the terminal's name")?;
        Ok(Self { name })
    }

    fn command(&self, words: &[String]) -> Command {
        let quoted = words
            .iter()
            .map(|word| format!("'{}'", word.replace('\'', r"'\''")));
        let quoted: Vec<_> = quoted.collect();
        let name = self.name.path().display();
        let script = format!("tty > {name}; exec {}", quoted.join(" "));
        let mut command = Command::new("script");
        command.args(["-qefc", &script, "/dev/null"]);
        command
    }

    /// The client says how large its own terminal is, first before there is one here.
    async fn resize(&self, size: &[u8]) {
        let size: Value = serde_json::from_slice(size).unwrap_or_default();
        let side = |name: &str| {
            let side = size.get(name).and_then(Value::as_u64);
            side.unwrap_or(0).to_string()
        };
        for _ in 0..TERMINAL_LOOKS_MAX {
            let name = fs::read_to_string(self.name.path()).await;
            if let Some(name) = name
                .ok()
                .as_deref()
                .and_then(|name| name.strip_suffix('\n'))
            {
                let (rows, columns) = (side("Height"), side("Width"));
                let words = ["-F", name, "rows", &rows, "cols", &columns];
                // A session that has ended has no size.
                Command::new("stty").args(words).status().await.ok();
                return;
            }
            time::sleep(TERMINAL_LOOK).await;
        }
    }
}

async fn pump(channel: u8, output: Option<impl AsyncRead + Unpin>, queue: mpsc::Sender<Message>) {
    let Some(mut output) = output else {
        return;
    };
    let mut chunk = vec![0; CHUNK_BYTES_MAX];
    while let Ok(count @ 1..) = output.read(&mut chunk).await {
        let bytes = chunk.get(..count).unwrap_or_default();
        if queue.send(message(channel, bytes)).await.is_err() {
            return; // Nobody listens any more.
        }
    }
}

fn message(channel: u8, bytes: &[u8]) -> Message {
    let mut whole = BytesMut::with_capacity(bytes.len() + 1);
    whole.extend_from_slice(&[channel]);
    whole.extend_from_slice(bytes);
    Message::Binary(Bytes::from(whole))
}

/// As `k8s.io/kubelet` says it: the reason and cause are what `kubectl` makes its own exit code of.
fn status(ended: ExitStatus) -> Value {
    if ended.success() {
        return json!({"metadata": {}, "status": "Success"});
    }
    let code = ended.code().unwrap_or(137).to_string(); // Killed.
    json!({
        "metadata": {}, "status": "Failure", "reason": "NonZeroExitCode",
        "message": format!("command terminated with non-zero exit code: {ended}"),
        "details": {"causes": [{"reason": "ExitCode", "message": code}]},
    })
}
