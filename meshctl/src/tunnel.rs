//! Standard input and output, led to a node by the CONNECT proxy of this machine's agent: what `ssh` takes as its
//! `ProxyCommand`.

use std::{
    io::{self, Read as _, Write as _},
    net::Shutdown,
    os::unix::net::UnixStream,
    path::Path,
    thread,
    time::Duration,
};

use crate::{Verdict, failure::Failure, table::printable};

/// Longest answer to the request: the proxy's fit into one line.
const HEAD_BYTES_MAX: usize = 16 << 10;

/// The proxy gives up long before that (`connect_timeout_s`).
const ANSWER_TIMEOUT: Duration = Duration::from_secs(120);

/// Connects to `target` by the proxy at `proxy`, and ends when the node does.
pub(crate) fn tunnel(proxy: &Path, target: &str) -> Result<Verdict, Failure> {
    let odd = |c: char| c.is_whitespace() || c.is_control();
    if target.contains(odd) {
        return Err(Failure::Refused(format!("{target:?} is not `host:port`")));
    }
    let broken = |error: io::Error| Failure::Proxy(format!("{}: {error}", proxy.display()));
    let mut stream = UnixStream::connect(proxy).map_err(|error| {
        let hint =
            "is there an agent with `socket` in its [proxy], and is this its socket? (--proxy)";
        Failure::Proxy(format!("{}: {error}: {hint}", proxy.display()))
    })?;
    let request = format!("CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n\r\n");
    stream.write_all(request.as_bytes()).map_err(broken)?;
    stream
        .set_read_timeout(Some(ANSWER_TIMEOUT))
        .map_err(broken)?;
    let head = head(&mut stream).map_err(broken)?;
    let status = head.lines().next().unwrap_or_default();
    let (_, status) = status.split_once(' ').unwrap_or_default();
    if !status.starts_with("200 ") {
        return Err(Failure::Proxy(printable(status)));
    }
    stream.set_read_timeout(None).map_err(broken)?;
    let mut to_node = stream.try_clone().map_err(broken)?;
    // It ends with the process, if not before: nothing takes it from a terminal that says nothing.
    thread::spawn(move || {
        io::copy(&mut io::stdin().lock(), &mut to_node).ok(); // The node is gone: the other way says so.
        to_node.shutdown(Shutdown::Write).ok();
    });
    let mut out = io::stdout().lock();
    io::copy(&mut stream, &mut Unbuffered(&mut out)).map_err(broken)?;
    Ok(Verdict::Ok)
}

/// The answer's first lines, and not a byte more: what follows is the node's.
fn head(stream: &mut UnixStream) -> io::Result<String> {
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") {
        if head.len() == HEAD_BYTES_MAX {
            return Err(io::Error::other("answers with more than a proxy says"));
        }
        stream.read_exact(&mut byte)?;
        head.extend_from_slice(&byte);
    }
    Ok(String::from_utf8_lossy(&head).into_owned())
}

/// Standard output keeps back what does not end a line.
struct Unbuffered<W>(W);

impl<W: io::Write> io::Write for Unbuffered<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = self.0.write(bytes)?;
        self.0.flush()?;
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}
