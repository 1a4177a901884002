//! The kernel side, compiled by clang.
