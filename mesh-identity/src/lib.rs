//! Who a process is: keys, certificates, signed records, TLS settings.
