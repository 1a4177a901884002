//! The sending side of a link, whatever it runs over. Nothing here waits.

use std::{sync::Arc, time::Instant};

use bytes::Bytes;
use mesh_wire::relay::Control;
use quinn::{Connection, VarInt};
use tokio::sync::mpsc;

use crate::{
    quic::{self, Sent},
    websocket::Queue,
};

/// Control messages that wait for a slow receiver: all sessions of a node (1,024) announced and
/// taken back twice. A link on which more wait is closed; the node comes back and starts afresh.
pub(crate) const CONTROL_QUEUE_MAX: usize = 4096;

/// The code of a link that ends in order.
pub(crate) const CLOSE_CODE: VarInt = VarInt::from_u32(0);

/// The sending side of a link.
#[derive(Debug, Clone)]
pub(crate) enum Outlet {
    /// QUIC.
    Quic {
        connection: Connection,
        control: mpsc::Sender<Control>,
    },
    /// WebSocket over TLS.
    Tls(Arc<Queue>),
}

impl Outlet {
    pub(crate) fn send_data(&self, frames: impl Iterator<Item = Bytes>) -> Sent {
        match self {
            Self::Quic { connection, .. } => quic::send_frames(connection, frames),
            Self::Tls(queue) => queue.push_data(frames, Instant::now()),
        }
    }

    /// Closes the link if there is no room.
    pub(crate) fn send_control(&self, message: Control) {
        let sent = match self {
            Self::Quic { control, .. } => control.try_send(message).is_ok(),
            Self::Tls(queue) => queue.push_control(&message),
        };
        if !sent {
            self.close("too slow");
        }
    }

    pub(crate) fn is_closed(&self) -> bool {
        match self {
            Self::Quic { connection, .. } => connection.close_reason().is_some(),
            Self::Tls(queue) => queue.is_closed(),
        }
    }

    pub(crate) fn close(&self, reason: &str) {
        match self {
            Self::Quic { connection, .. } => connection.close(CLOSE_CODE, reason.as_bytes()),
            Self::Tls(queue) => queue.close(reason),
        }
    }
}
