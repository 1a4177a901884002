//! Mapping: LAN subnets that the mesh sees under another range.

use crate::layout::{counters, layouts, limits};

limits! {
    /// Subnets of a gateway that are mapped: four `SiteRoute`s of 64 each. Those beyond it are left out. Two maps
    /// of 256 × 2 × 96 bytes at most: 96 KiB.
    MAPPINGS_MAX = 256;
}

layouts! {
    /// What the addresses of a prefix become.
    pub struct MappedTo as "mapped_to" {
        /// The other prefix, its other bits 0. IPv4 as `::ffff:a.b.c.d`. Network byte order in memory.
        ip: [u32; 4],
        /// The bits that stay as they are.
        host: [u32; 4],
    }
}

const _: () = assert!(size_of::<MappedTo>() == 32 && align_of::<MappedTo>() == 4);

counters! {
    MappingCounter {
        /// A packet went on with its other address.
        Mapped = "mapped",
        /// The packet that an ICMP error quotes got its other address; the error itself is counted too.
        QuoteMapped = "quote_mapped",
        /// It is in none of the ranges.
        Passed = "passed",
        /// Its headers are not all there, behind more extension headers than looked through, or it has a source
        /// route: dropped, or its checksum would be wrong.
        Unreadable = "unreadable",
        /// The kernel refused a change to the packet: dropped, it may be half changed.
        ChangeFailed = "change_failed",
    }
}
