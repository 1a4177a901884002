//! What processes say to each other: control gRPC, admin gRPC, custom resources.
//!
//! **Invariant:** nothing here decides anything: it checks form, converts, and carries.

#![forbid(unsafe_code)]

pub mod cni;
pub mod connect;
pub mod convert;
pub mod crd;
pub mod head;
pub mod resources;
pub mod serve;

/// `holdfast.control.v1`: agents and the controller.
#[expect(
    missing_docs,
    clippy::allow_attributes_without_reason,
    reason = "generated"
)]
pub mod control {
    tonic::include_proto!("holdfast.control.v1");
}

/// `holdfast.admin.v1`: the local sockets.
#[expect(
    missing_docs,
    clippy::allow_attributes_without_reason,
    reason = "generated"
)]
pub mod admin {
    tonic::include_proto!("holdfast.admin.v1");
}
