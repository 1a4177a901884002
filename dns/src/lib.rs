//! Service-discovery DNS from the snapshot.
