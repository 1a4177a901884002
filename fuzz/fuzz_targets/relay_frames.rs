//! What a relay and its clients read: frames of every framing, and control messages.

#![no_main]

use libfuzzer_sys::fuzz_target;
use mesh_wire::relay::{
    Control, Frame, Session, data_frame, data_header,
    udp::{UdpFrame, data_session, looks_like_frame, run_len, unbound_frame},
};

fuzz_target!(|bytes: &[u8]| {
    if let Ok(Frame::Data { session, payload }) = Frame::decode(bytes) {
        let again = data_frame(session, payload);
        assert_eq!(Frame::decode(&again), Ok(Frame::Data { session, payload }));
    }
    if let Ok(message) = Control::decode(bytes) {
        assert_eq!(Control::decode(&message.encode()), Ok(message));
    }
    let frame = UdpFrame::decode(bytes);
    assert!(frame.is_err() || looks_like_frame(bytes));
    if let Ok(UdpFrame::Data(session)) = frame {
        assert_eq!(data_session(bytes), Some(session));
    }
    if let Some(answer) = unbound_frame(bytes) {
        assert!(answer.len() <= bytes.len() && UdpFrame::decode(&answer).is_ok());
    }
    let (number, epoch) = (7, 1);
    let session = data_session(bytes).unwrap_or(Session { number, epoch });
    for segment_len in [0, 1, 8, 20, bytes.len()] {
        let run = run_len(bytes, segment_len, session);
        assert!(run <= bytes.len().div_ceil(segment_len.max(1)));
    }
    assert_eq!(data_session(&data_header(session)), Some(session));
});
