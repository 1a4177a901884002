//! What processes say to each other: control gRPC, admin gRPC, custom resources.
