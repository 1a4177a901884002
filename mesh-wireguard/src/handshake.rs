//! The two messages of Noise IKpsk2 (the paper, §5.4.2 and §5.4.3), by `snow`.

use std::time::Duration;

use snow::{Builder, HandshakeState};
use zeroize::Zeroizing;

use crate::{
    keys::{LocalKey, PresharedKey},
    mac::MAC_LEN,
    message::{INITIATION_LEN, RESPONSE_LEN, TYPE_INITIATION, TYPE_RESPONSE, header},
    session::Keys,
};

const PATTERN: &str = "Noise_IKpsk2_25519_ChaChaPoly_BLAKE2s";
const PROLOGUE: &[u8] = b"WireGuard v1 zx2c4 Jason@zx2c4.com";

/// Where the preshared key is mixed in: the end of the second message.
const PSK_LOCATION: u8 = 2;

/// An initiation and a response without their MACs.
const INITIATION_BODY: usize = INITIATION_LEN - 2 * MAC_LEN;
const RESPONSE_BODY: usize = RESPONSE_LEN - 2 * MAC_LEN;

/// A TAI64N label: 2⁶² and the seconds, and nanoseconds, both big-endian.
pub(crate) type Timestamp = [u8; 12];

/// The time `since_1970`, as it stands in initiations. TAI's distance from UTC does not matter, for
/// only the order counts; the nanoseconds lose their lower 24 bits, so that nobody can learn this
/// machine's load from them.
pub(crate) fn timestamp(since_1970: Duration) -> Timestamp {
    let seconds = (1 << 62) + 10 + since_1970.as_secs();
    let nanos = since_1970.subsec_nanos() & !0x00ff_ffff;
    let mut label = [0; 12];
    if let Some((high, low)) = label.split_first_chunk_mut::<8>() {
        *high = seconds.to_be_bytes();
        low.copy_from_slice(&nanos.to_be_bytes());
    }
    label
}

/// The time from the one to the other, in whole seconds.
pub(crate) fn between(earlier: &Timestamp, later: &Timestamp) -> Duration {
    let seconds = |label: &Timestamp| {
        label
            .first_chunk()
            .map_or(0, |high| u64::from_be_bytes(*high))
    };
    Duration::from_secs(seconds(later).saturating_sub(seconds(earlier)))
}

fn builder(local: &LocalKey) -> Option<Builder<'_>> {
    let builder = Builder::new(PATTERN.parse().ok()?)
        .prologue(PROLOGUE)
        .ok()?;
    builder.local_private_key(local.private()).ok()
}

/// Begins a handshake: what waits for the response, and the message without MACs.
pub(crate) fn initiate(
    local: &LocalKey,
    remote: &[u8; 32],
    psk: &PresharedKey,
    index: u32,
    timestamp: Timestamp,
) -> Option<(HandshakeState, [u8; INITIATION_BODY])> {
    let builder = builder(local)?.remote_public_key(remote).ok()?;
    let builder = builder.psk(PSK_LOCATION, psk.bytes()).ok()?;
    let mut noise = builder.build_initiator().ok()?;
    let mut body = [0; INITIATION_BODY];
    let (head, rest) = body.split_first_chunk_mut::<8>()?;
    *head = joined(header(TYPE_INITIATION), index);
    noise.write_message(&timestamp, rest).ok()?;
    Some((noise, body))
}

/// An initiation whose sender has proven to have the private key of `remote`.
pub struct Received {
    noise: HandshakeState,
    sender: u32,
    remote: [u8; 32],
    timestamp: Timestamp,
}

impl Received {
    /// Reads an initiation: two Diffie-Hellman computations. Ask [`crate::gate::Gate`] first.
    #[must_use]
    pub fn read(local: &LocalKey, datagram: &[u8]) -> Option<Self> {
        let body = datagram.first_chunk::<INITIATION_BODY>()?;
        let (head, message) = body.split_first_chunk::<8>()?;
        let mut noise = builder(local)?.build_responder().ok()?;
        let mut timestamp = Timestamp::default();
        // `snow` wants room for the tag of the payload, too.
        let mut payload = [0; 12 + MAC_LEN];
        let len = noise.read_message(message, &mut payload).ok()?;
        timestamp.copy_from_slice(payload.get(..len)?.first_chunk::<12>()?);
        let remote = noise.get_remote_static()?.first_chunk().copied()?;
        Some(Self {
            noise,
            sender: number(head.last_chunk::<4>()?),
            remote,
            timestamp,
        })
    }

    /// Whose it is.
    #[must_use]
    pub fn remote(&self) -> [u8; 32] {
        self.remote
    }

    pub(crate) fn timestamp(&self) -> Timestamp {
        self.timestamp
    }

    pub(crate) fn sender(&self) -> u32 {
        self.sender
    }

    /// The response without MACs, and the keys.
    pub(crate) fn respond(
        mut self,
        psk: &PresharedKey,
        index: u32,
    ) -> Option<([u8; RESPONSE_BODY], Keys)> {
        self.noise.set_psk(PSK_LOCATION.into(), psk.bytes()).ok()?;
        let mut body = [0; RESPONSE_BODY];
        let (head, rest) = body.split_first_chunk_mut::<12>()?;
        let (kind, receiver) = head.split_first_chunk_mut::<8>()?;
        *kind = joined(header(TYPE_RESPONSE), index);
        receiver.copy_from_slice(&self.sender.to_le_bytes());
        self.noise.write_message(&[], rest).ok()?;
        Some((body, keys(&mut self.noise)))
    }
}

impl std::fmt::Debug for Received {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Received")
            .field("sender", &self.sender)
            .finish_non_exhaustive()
    }
}

/// Reads the response to what [`initiate`] began: the responder's session number, and the keys.
/// After an error `noise` waits on.
pub(crate) fn finish(noise: &mut HandshakeState, datagram: &[u8]) -> Option<(u32, Keys)> {
    let body = datagram.first_chunk::<RESPONSE_BODY>()?;
    let (head, message) = body.split_first_chunk::<12>()?;
    noise.read_message(message, &mut [0; MAC_LEN]).ok()?;
    let sender = number(head.get(4..)?.first_chunk::<4>()?);
    Some((sender, keys(noise)))
}

fn keys(noise: &mut HandshakeState) -> Keys {
    let (of_initiator, of_responder) = noise.dangerously_get_raw_split();
    Keys {
        of_initiator: Zeroizing::new(of_initiator),
        of_responder: Zeroizing::new(of_responder),
    }
}

fn joined(kind: [u8; 4], index: u32) -> [u8; 8] {
    let [a, b, c, d] = kind;
    let [e, f, g, h] = index.to_le_bytes();
    [a, b, c, d, e, f, g, h]
}

fn number(bytes: &[u8; 4]) -> u32 {
    u32::from_le_bytes(*bytes)
}
