//! Plain UDP beside a QUIC link: what the binder decides, done.

use std::{
    fmt,
    future::pending,
    sync::atomic::{AtomicBool, Ordering::Relaxed},
    time::Instant,
};

use mesh_wire::relay::{Control, udp::BindKey};
use rand::{SeedableRng as _, rngs::StdRng};
use tokio::{sync::mpsc, time};

use super::{
    LinkEvent, Shared, UdpPort,
    bind::{Binder, Output},
};

/// Datagrams that wait for the link's task, which waits for nothing itself: more than a relay says
/// in a second. What finds no room is lost, as on any path.
const INPUTS_MAX: usize = 16;

/// The node's port, and whether the relay knows it.
pub(super) struct Udp {
    port: UdpPort,
    inputs: mpsc::Sender<Input>,
    bound: AtomicBool,
}

/// What the link's task is told.
#[derive(Debug)]
pub(super) enum Input {
    Key(BindKey),
    Datagram(Vec<u8>),
    Used,
}

impl fmt::Debug for Udp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Udp")
            .field("port", &self.port)
            .field("bound", &self.bound)
            .finish_non_exhaustive()
    }
}

impl Udp {
    pub(super) fn new(port: UdpPort) -> (Self, mpsc::Receiver<Input>) {
        let (inputs, received) = mpsc::channel(INPUTS_MAX);
        let bound = AtomicBool::new(false);
        let udp = Self {
            port,
            inputs,
            bound,
        };
        (udp, received)
    }

    pub(super) fn is_bound(&self) -> bool {
        self.bound.load(Relaxed)
    }

    pub(super) fn key(&self, key: BindKey) {
        self.tell(Input::Key(key));
    }

    pub(super) fn datagram(&self, datagram: Vec<u8>) {
        self.tell(Input::Datagram(datagram));
    }

    pub(super) fn used(&self) {
        self.tell(Input::Used);
    }

    fn tell(&self, input: Input) {
        self.inputs.try_send(input).ok(); // See INPUTS_MAX.
    }
}

/// Binds the node's port and keeps it bound. Does not end.
pub(super) async fn bind(shared: &Shared, inputs: Option<mpsc::Receiver<Input>>) {
    if let (Some(udp), Some(inputs)) = (&shared.udp, inputs) {
        drive(shared, udp, inputs).await;
    }
    pending().await
}

async fn drive(shared: &Shared, udp: &Udp, mut inputs: mpsc::Receiver<Input>) {
    shared.queue.push_control(Control::AskBindKey);
    let mut binder = None;
    loop {
        let timeout = async {
            match binder.as_ref().map(Binder::<StdRng>::poll_timeout) {
                Some(at) => time::sleep_until(at.into()).await,
                None => pending().await, // A relay that knows no plain UDP gives no key.
            }
        };
        let input = tokio::select! {
            () = timeout => None,
            Some(input) = inputs.recv() => Some(input),
        };
        let now = Instant::now();
        match (input, &mut binder) {
            (Some(Input::Key(key)), binder @ None) => {
                let rng = StdRng::from_rng(&mut rand::rng());
                *binder = Some(Binder::new(key, udp.port.frame_len, rng, now));
            }
            (Some(Input::Datagram(datagram)), Some(binder)) => {
                let knows = |session| shared.read(|peers| peers.node(session).is_some());
                binder.handle_datagram(&datagram, knows, now);
            }
            (Some(Input::Used), Some(binder)) => binder.handle_used(now),
            (None, Some(binder)) => binder.handle_timeout(now),
            (Some(Input::Key(_)), Some(_)) | (_, None) => {}
        }
        if let Some(binder) = &mut binder {
            perform(shared, udp, binder).await;
        }
    }
}

async fn perform(shared: &Shared, udp: &Udp, binder: &mut Binder<StdRng>) {
    while let Some(output) = binder.poll_output() {
        let bound = match output {
            Output::Send(datagram) => {
                (udp.port.send)(&datagram);
                continue;
            }
            Output::Bound => true,
            Output::Unbound { sequence } => {
                shared.queue.push_control(Control::Unbind { sequence });
                false
            }
        };
        udp.bound.store(bound, Relaxed);
        shared.tell(LinkEvent::Udp { bound }).await;
    }
}
