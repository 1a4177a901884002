//! A name server of one answer, for labs where something has a name.

use std::{
    net::{Ipv4Addr, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use anyhow::Result;

use crate::node::Node;

/// For it every name has one address; ends when dropped.
#[derive(Debug)]
pub struct NameServer {
    stop: Arc<AtomicBool>,
    thread: Option<thread::JoinHandle<()>>,
}

impl NameServer {
    /// At this address of a node, port 53; it answers `known`.
    ///
    /// # Errors
    ///
    /// If the address is not the node's.
    pub fn start(node: &Node, at: Ipv4Addr, known: Ipv4Addr) -> Result<Self> {
        let bind = || {
            let socket = UdpSocket::bind((at, 53))?;
            socket.set_read_timeout(Some(Duration::from_millis(100)))?;
            std::io::Result::Ok(socket)
        };
        let socket = node.enter(bind)??;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let serve = move || {
            let mut buffer = [0; 512];
            while !stopped.load(Ordering::Relaxed) {
                if let Ok((length, from)) = socket.recv_from(&mut buffer)
                    && let Some(question) = buffer.get(..length)
                    && let Some(answer) = answer(question, known)
                {
                    socket.send_to(&answer, from).ok();
                }
            }
        };
        let thread = Some(thread::spawn(serve));
        Ok(Self { stop, thread })
    }
}

impl Drop for NameServer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.join().ok();
        }
    }
}

/// To one question (RFC 1035 §4.1): `known` for an A record, and nothing for others.
fn answer(question: &[u8], known: Ipv4Addr) -> Option<Vec<u8>> {
    let name_len = question.get(12..)?.iter().position(|byte| *byte == 0)? + 1;
    let end = 12 + name_len + 4; // Its type and class.
    let is_a = question.get(end - 4..end - 2)? == [0, 1];
    let mut answer = question.get(..2)?.to_vec();
    answer.extend([0x81, 0x80, 0, 1, 0, u8::from(is_a), 0, 0, 0, 0]);
    answer.extend(question.get(12..end)?);
    if is_a {
        // The name is the question's; for a second.
        answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 1, 0, 4]);
        answer.extend(known.octets());
    }
    Some(answer)
}
