//! What anybody on a LAN can send to a node: announcements.

#![no_main]

use libfuzzer_sys::fuzz_target;
use mesh_wire::{
    announcement::{Announcement, Signed},
    id::MeshId,
};

const MESH: MeshId = MeshId([0; 32]);

fuzz_target!(|bytes: &[u8]| {
    if let Ok(signed) = Signed::decode(bytes, &MESH) {
        if let Ok(said) = Announcement::decode(&signed.statement) {
            assert_eq!(Announcement::decode(&said.encode()), Ok(said));
        }
        let again = signed.clone().encode(&MESH);
        // Longer at most by what the sender left out.
        if let Ok(again) = again {
            assert_eq!(Signed::decode(&again, &MESH), Ok(signed));
        }
    }
    Announcement::decode(bytes).ok();
});
