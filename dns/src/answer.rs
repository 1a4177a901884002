//! From a query's bytes to what is to be done about it.

use hickory_proto::{
    op::{Edns, Message, MessageType, Metadata, OpCode, Query, ResponseCode},
    rr::{DNSClass, Name, RData, Record, RecordType, rdata::opt::EdnsOption},
};
use mesh_core::{policy::callers::Caller, services::View};

use crate::{
    counters::DropReason,
    local::LocalNames,
    zone::{self, Asked, Found, OWN_TTL_S, Records},
};

/// The largest UDP payload that this server sends and asks for, in bytes: fits an IPv6 packet of
/// 1280 bytes, the overlay's MTU (DNS Flag Day 2020).
pub const UDP_PAYLOAD_MAX_BYTES: u16 = 1232;

/// `ExternalName` services that may follow one another. More is a loop or a mistake.
const ALIASES_MAX: usize = 8;

/// Answers over UDP to clients without EDNS (RFC 1035 §2.3.4).
pub(crate) const PLAIN_UDP_MAX_BYTES: u16 = 512;

const HEADER_LEN_BYTES: usize = 12;

/// What to do about a query.
#[derive(Debug, Clone, PartialEq)]
pub enum Answer {
    /// Send this.
    Reply(Message, Told),
    /// Put `question` to an upstream, add what it says to `reply`, and send that.
    Ask {
        /// The reply so far: the client's question, and aliases that lead to `question`.
        reply: Message,
        /// Not in an own zone.
        question: Query,
    },
    /// Send nothing.
    Drop(DropReason),
}

/// Whom an answer is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Told {
    /// Everybody who asks.
    All,
    /// Policy may deny some of it to others, but not to who asks.
    Whole,
    /// Policy denies more to who asks: that is left out.
    Part,
}

/// Reads the bytes of a query.
///
/// # Errors
///
/// What to do about bytes that are none.
pub fn parse(query: &[u8]) -> Result<Message, Box<Answer>> {
    let Some(header) = query.first_chunk::<HEADER_LEN_BYTES>() else {
        return Err(Box::new(Answer::Drop(DropReason::Short)));
    };
    let [id_high, id_low, flags, ..] = *header;
    if flags & 0x80 != 0 {
        return Err(Box::new(Answer::Drop(DropReason::Response)));
    }
    Message::from_vec(query).map_err(|_| {
        let id = u16::from_be_bytes([id_high, id_low]);
        let op_code = OpCode::from_u8((flags >> 3) & 0x0f);
        let reply = Message::error_msg(id, op_code, ResponseCode::FormErr);
        Box::new(Answer::Reply(reply, Told::All))
    })
}

/// How large an answer over UDP may be for this client, in bytes (RFC 6891 §6.2.3).
pub(crate) fn udp_answer_max_bytes(query: &Message) -> u16 {
    let asked = query
        .edns
        .as_ref()
        .map_or(PLAIN_UDP_MAX_BYTES, |edns| edns.max_payload());
    asked.clamp(PLAIN_UDP_MAX_BYTES, UDP_PAYLOAD_MAX_BYTES)
}

/// Decides about a query. Without a view, own names are answered "try later". With a `caller`, who asks is that pod.
#[must_use]
pub fn answer(
    query: &Message,
    view: Option<&View>,
    local: &LocalNames,
    caller: Option<Caller<'_>>,
) -> Answer {
    if query.message_type == MessageType::Response {
        return Answer::Drop(DropReason::Response);
    }
    let mut reply = reply_to(query);
    if let Err(code) = acceptable(query) {
        reply.metadata.response_code = code;
        return Answer::Reply(reply, Told::All);
    }
    let Some(question) = query.queries.first() else {
        reply.metadata.response_code = ResponseCode::FormErr;
        return Answer::Reply(reply, Told::All);
    };
    let question = question.clone();
    match view {
        Some(view) => from_view(view, local, caller, reply, question),
        None if zone::is_in_a_default_zone(question.name()) => {
            fail(&mut reply, ExtendedError::NotReady);
            Answer::Reply(reply, Told::All)
        }
        None => from_records(None, local, reply, question),
    }
}

/// Extended errors (RFC 8914) that tell a person with `dig` what is wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ExtendedError {
    StaleAnswer,
    NotReady,
    NoReachableAuthority,
    Busy,
    TooManyAliases,
}

impl ExtendedError {
    fn code_and_text(self) -> (u16, &'static str) {
        match self {
            Self::StaleAnswer => (3, "no upstream answers; this is from the cache"),
            Self::NotReady => (14, "this node has no snapshot of the mesh yet"),
            Self::NoReachableAuthority => (22, "no upstream answers"),
            Self::Busy => (0, "too many questions are waiting for upstreams"),
            Self::TooManyAliases => (0, "too many ExternalName services in a row"),
        }
    }
}

pub(crate) fn fail(reply: &mut Message, error: ExtendedError) {
    reply.metadata.response_code = ResponseCode::ServFail;
    explain(reply, error);
}

pub(crate) fn explain(reply: &mut Message, error: ExtendedError) {
    const EDE: u16 = 15; // RFC 8914 §2
    if let Some(edns) = &mut reply.edns {
        let (code, text) = error.code_and_text();
        let payload = [&code.to_be_bytes(), text.as_bytes()].concat();
        edns.options_mut().insert(EdnsOption::Unknown(EDE, payload));
    }
}

fn reply_to(query: &Message) -> Message {
    let mut reply = Message::response(query.id, query.op_code);
    reply.metadata = Metadata::response_from_request(&query.metadata);
    reply.metadata.recursion_available = true;
    reply.queries.clone_from(&query.queries); // As asked, letter for letter (RFC 5452 §9.1).
    reply.edns = query.edns.as_ref().map(|asked| {
        let mut edns = Edns::new();
        edns.set_max_payload(UDP_PAYLOAD_MAX_BYTES);
        edns.set_dnssec_ok(asked.flags().dnssec_ok);
        edns
    });
    reply
}

fn acceptable(query: &Message) -> Result<(), ResponseCode> {
    match query.op_code {
        OpCode::Query => {}
        OpCode::Update => return Err(ResponseCode::Refused),
        OpCode::Status | OpCode::Notify | OpCode::Unknown(_) => return Err(ResponseCode::NotImp),
    }
    let [question] = query.queries.as_slice() else {
        return Err(ResponseCode::FormErr); // RFC 9619
    };
    if query.edns.as_ref().is_some_and(|edns| edns.version() != 0) {
        return Err(ResponseCode::BADVERS);
    }
    let transfer = matches!(
        question.query_type(),
        RecordType::AXFR | RecordType::IXFR | RecordType::OPT | RecordType::TSIG
    );
    if transfer || question.query_class() != DNSClass::IN {
        return Err(ResponseCode::Refused);
    }
    Ok(())
}

fn ask(mut reply: Message, question: Query) -> Answer {
    if reply.recursion_desired {
        return Answer::Ask { reply, question };
    }
    if reply.answers.is_empty() {
        reply.metadata.response_code = ResponseCode::Refused;
    }
    Answer::Reply(reply, Told::All)
}

/// A name that is not the mesh's.
fn from_records(
    view: Option<&View>,
    local: &LocalNames,
    mut reply: Message,
    question: Query,
) -> Answer {
    let Some(data) = local.find(question.name()) else {
        return ask(reply, question);
    };
    reply.metadata.authoritative = true;
    let records = Records {
        apex: question.name().clone(), // The zone around it is somebody else's.
        data,
        additional: Vec::new(),
        told: Told::All,
    };
    finish(view, reply, &question, records)
}

fn from_view(
    view: &View,
    local: &LocalNames,
    caller: Option<Caller<'_>>,
    mut reply: Message,
    mut question: Query,
) -> Answer {
    for _ in 0..=ALIASES_MAX {
        let name = question.name().clone();
        let asked = Asked {
            name: &name,
            record_type: question.query_type(),
            turn: reply.id,
            caller,
        };
        let records = match zone::find(view, local.pods(), asked) {
            Found::Foreign => return from_records(Some(view), local, reply, question),
            Found::NoName { apex } => {
                reply.metadata.authoritative = true;
                reply.metadata.response_code = ResponseCode::NXDomain;
                reply.authorities.push(zone::soa(Some(view), &apex));
                return Answer::Reply(reply, Told::All);
            }
            Found::Here(records) => records,
        };
        reply.metadata.authoritative = true;
        match alias(&records, question.query_type()) {
            Some(target) => {
                add(&mut reply, &name, &records.data);
                question.set_name(target);
            }
            None => return finish(Some(view), reply, &question, records),
        }
    }
    fail(&mut reply, ExtendedError::TooManyAliases);
    Answer::Reply(reply, Told::All)
}

/// Where an alias leads, unless the client wants to see the alias itself.
fn alias(records: &Records, wanted: RecordType) -> Option<Name> {
    match records.data.as_slice() {
        [RData::CNAME(target)] if !matches!(wanted, RecordType::CNAME | RecordType::ANY) => {
            Some(target.0.clone())
        }
        _ => None,
    }
}

fn finish(view: Option<&View>, mut reply: Message, question: &Query, records: Records) -> Answer {
    let wanted = question.query_type();
    let mut data = records.data;
    data.retain(|data| wanted.is_any() || data.record_type() == wanted);
    if data.is_empty() {
        reply.authorities.push(zone::soa(view, &records.apex));
        // To nobody less than something is told where there is something.
        return Answer::Reply(reply, Told::All);
    }
    add(&mut reply, question.name(), &data);
    reply.additionals = records.additional;
    Answer::Reply(reply, records.told)
}

fn add(reply: &mut Message, name: &Name, data: &[RData]) {
    let record = |data: &RData| Record::from_rdata(name.clone(), OWN_TTL_S, data.clone());
    reply.answers.extend(data.iter().map(record));
}
