//! Layout of the eBPF maps.
