//! The calling thread.

use rustix::{process::setpriority_process, thread::gettid};

/// Sets this thread's niceness: below 0 it runs before others. Without CAP_SYS_NICE it stays as it
/// is: slower under load, not wrong.
pub fn raise_priority(niceness: i32) {
    // On Linux the call takes threads as well as processes (setpriority(2), "C library/kernel
    // differences").
    setpriority_process(Some(gettid()), niceness).ok();
}
