//! The CNI plug-in as a runtime sees it: the real binary, in real network namespaces, alone and with the stock plug-ins.
//!
//! **Invariant:** the machine's own network is not touched: every node here is a namespace without a name, which ends
//! with the test.

mod chains;
mod damage;
mod egress;
mod harness;
mod protocol;
mod repair;
mod runtimes;
