//! Writes a message so that it fits.

use hickory_proto::{
    ProtoError,
    op::{Header, Message},
    rr::Record,
    serialize::binary::{BinDecodable, BinDecoder, BinEncodable, BinEncoder},
};

/// The largest message on TCP, in bytes: its length is a `u16`.
pub(crate) const TCP_MESSAGE_MAX_BYTES: u16 = u16::MAX;

/// What happens to answers that do not fit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Overflow {
    /// The client is told to ask again over TCP. Clients that cannot still get the first ones.
    Truncate,
    /// There is no larger transport: the last answers are left out. They are the farthest.
    LeaveOut,
}

/// `message` in at most `max` bytes, and whether answers are missing.
///
/// # Errors
///
/// If not even the question fits, or a record cannot be written.
pub(crate) fn encode(
    mut message: Message,
    max: u16,
    overflow: Overflow,
) -> Result<(Vec<u8>, bool), ProtoError> {
    if let Some(bytes) = encode_whole(&message, max) {
        return Ok((bytes, false));
    }
    message.additionals.clear(); // A courtesy: their absence is no truncation (RFC 2181 §9).
    if let Some(bytes) = encode_whole(&message, max) {
        return Ok((bytes, false));
    }
    message.authorities.clear();
    let fitting = answers_that_fit(&message, max)?;
    message.answers.truncate(fitting);
    message.metadata.truncation |= overflow == Overflow::Truncate;
    Ok((message.to_vec()?, true))
}

fn encode_whole(message: &Message, max: u16) -> Option<Vec<u8>> {
    let mut bytes = Vec::with_capacity(512);
    let mut encoder = BinEncoder::new(&mut bytes);
    encoder.set_max_size(max);
    message.emit(&mut encoder).ok()?;
    // The encoder leaves out what does not fit, and says so only in the header.
    let cut = truncated(&bytes)? && !message.truncation;
    (!cut).then_some(bytes)
}

fn truncated(bytes: &[u8]) -> Option<bool> {
    let header = Header::read(&mut BinDecoder::new(bytes)).ok()?;
    Some(header.metadata.truncation)
}

fn answers_that_fit(message: &Message, max: u16) -> Result<usize, ProtoError> {
    let mut options = Vec::new();
    if let Some(edns) = &message.edns {
        Record::from(edns).emit(&mut BinEncoder::new(&mut options))?;
    }
    let room = usize::from(max).saturating_sub(options.len());
    let mut bare = message.clone();
    bare.edns = None;
    let mut bytes = Vec::with_capacity(512);
    let mut encoder = BinEncoder::new(&mut bytes);
    encoder.set_max_size(u16::try_from(room).unwrap_or(max));
    bare.emit(&mut encoder)?;
    let header = Header::read(&mut BinDecoder::new(&bytes))?;
    Ok(usize::from(header.counts.answers))
}
