//! The programs that run in the kernel, as the objects that clang made of `programs.c`, `policy.c` and `mapping.c`.
//!
//! **Invariant:** no Rust here but the bytes.

#![forbid(unsafe_code)]

#[repr(C, align(8))]
struct Aligned<T: ?Sized>(T);

/// The ELF parser reads 64-bit words in place.
static ALIGNED: &Aligned<[u8]> = &Aligned(*include_bytes!(concat!(env!("OUT_DIR"), "/programs.o")));

/// The ELF object with the cgroup programs, the tcx programs, and their maps.
pub static SERVICES: &[u8] = &ALIGNED.0;

static ALIGNED_POLICY: &Aligned<[u8]> =
    &Aligned(*include_bytes!(concat!(env!("OUT_DIR"), "/policy.o")));

/// The ELF object with the tcx programs of policy, and their maps.
pub static POLICY: &[u8] = &ALIGNED_POLICY.0;

static ALIGNED_MAPPING: &Aligned<[u8]> =
    &Aligned(*include_bytes!(concat!(env!("OUT_DIR"), "/mapping.o")));

/// The ELF object with the tcx programs that map LAN subnets, and their maps.
pub static MAPPING: &[u8] = &ALIGNED_MAPPING.0;
