//! Redirection: what the tcx programs know of the interfaces between which packets go past the
//! host's stack.

use crate::layout::{counters, layouts, limits};

limits! {
    /// Interfaces to which packets are redirected: the tunnel's, those of devices, and one for each pod. The
    /// kubelet starts 110 pods unless told otherwise, and large nodes are told 500. Packets to
    /// pods beyond it go by the host's stack. 1,024 × 8 bytes, and 64 for each that there is: 72 KiB at most.
    REDIRECTS_MAX = 1_024;
    /// Routes of the node: two for each pod, and as many again for other nodes' prefixes, LANs and
    /// its own addresses. Where there are more, nothing is redirected: one left out could be the
    /// one that leads elsewhere. Allocated as they are written: 8,192 × 2 × 104 bytes, 1.6 MiB at most; as many again, with 128 KiB
    /// of buckets, for those to single addresses.
    ROUTES_MAX = 8_192;
}

layouts! {
    /// The key of a longest-prefix match.
    pub struct RoutePrefix as "route_prefix" {
        /// Of IPv4, 96 more than it is called by.
        prefix_len: u32,
        /// IPv4 as `::ffff:a.b.c.d`. Network byte order in memory.
        ip: [u32; 4],
    }

    /// Where packets to a prefix go.
    pub struct Route as "route" {
        /// Its index; 0: what the host's stack alone knows.
        interface: u32,
        /// Where it is in the kernel's map of interfaces.
        slot: u32,
        /// The longest packet by it, from the IP header on. In bytes.
        mtu: u32,
        /// Of the node's end of a pod's veth.
        mac: [u8; 6],
        /// Of the pod's end.
        pod_mac: [u8; 6],
        /// 1: a veth whose other end is in a pod.
        is_pod: u8,
        /// 1: clients behind it are served by packet.
        is_served: u8,
        /// 1: behind it are devices, with an Ethernet header before their packets. Neither: a device whose packets begin with
        /// the IP header.
        has_devices: u8,
        /// Always 0.
        zero: u8,
    }
}

const _: () = assert!(size_of::<RoutePrefix>() == 20 && align_of::<RoutePrefix>() == 4);
const _: () = assert!(size_of::<Route>() == 28 && align_of::<Route>() == 4);

counters! {
    RedirectCounter {
        /// A packet went into a pod.
        ToPod = "to_pod",
        /// A packet went into the tunnel.
        ToTunnel = "to_tunnel",
        /// A packet of a service went to a device that had asked for it.
        ToDevice = "to_device",
        /// Too big for where it goes: left to the stack, which says so or makes fragments.
        TooBig = "too_big",
        /// Its last hop: left to the stack, which says so.
        HopLimit = "hop_limit",
        /// From an address that is not behind the interface it came by: left to the stack, whose
        /// `rp_filter` judges.
        Source = "source",
        /// To an interface that went just now: left to the stack, which knows better.
        Gone = "gone",
        /// To the node itself, between devices and anything but services of pods, or where the stack alone knows the way: left
        /// to it.
        Elsewhere = "elsewhere",
        /// With options, link-local, marked by somebody, tagged, not IP, or from the tunnel to clients that are served
        /// by packet: left to the stack.
        Other = "other",
        /// The kernel refused a change to the packet: dropped, it may be half changed.
        ChangeFailed = "change_failed",
    }
}
