//! What `wg` says to the control socket of a plain WireGuard device.

#![no_main]
#![allow(dead_code, reason = "the device's files are here without the device")]

use libfuzzer_sys::fuzz_target;

#[path = "../../mesh-tunnel/src/device/config.rs"]
mod config;
#[path = "../../mesh-tunnel/src/device/uapi.rs"]
mod uapi;

fuzz_target!(|request: &[u8]| {
    for verb in ["", "set=1\n"] {
        let request = [verb.as_bytes(), request].concat();
        if let Err(refused) = uapi::parse(&request, |name| (name == "eth0").then_some(2)) {
            assert!(refused.what.len() < 1024, "a log line without end");
        }
    }
});
