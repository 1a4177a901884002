//! The packet level: built packets through the programs, byte for byte, and real sockets in
//! network namespaces. Needs root.

#[cfg(test)]
mod affinity;
#[cfg(test)]
#[path = "../common/bpffs.rs"]
mod bpffs;
#[cfg(test)]
mod coexistence;
#[cfg(test)]
mod connects;
#[cfg(test)]
mod datagrams;
#[cfg(test)]
mod differential;
#[cfg(test)]
mod hairpin;
#[cfg(test)]
mod inspect;
#[cfg(test)]
mod kept;
#[cfg(test)]
#[path = "../common/kube_proxy.rs"]
mod kube_proxy;
#[cfg(test)]
mod lan;
#[cfg(test)]
mod links;
#[cfg(test)]
mod machine;
#[cfg(test)]
mod mapping;
#[cfg(test)]
mod masquerade;
#[cfg(test)]
#[path = "../common/netns.rs"]
mod netns;
#[cfg(test)]
mod offload;
#[cfg(test)]
mod outside;
#[cfg(test)]
mod pods;
#[cfg(test)]
mod policy;
#[cfg(test)]
mod redirect;
#[cfg(test)]
mod sockets;
#[cfg(test)]
mod tracked;
#[cfg(test)]
mod verdicts;
#[cfg(test)]
mod ways;
#[cfg(test)]
mod wire;
