//! Who a process is: keys, certificates, signed records, TLS settings.
//!
//! **Invariant:** nothing here opens a socket, decides where something is stored, or shows a
//! private key or a token's secret in `Debug` or in an error.

#![forbid(unsafe_code)]

pub mod authority;
pub mod certificate;
pub mod credentials;
pub mod pem;
pub mod record;
pub mod statement;
pub mod tls;
pub mod token;
