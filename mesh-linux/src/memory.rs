//! The process's memory.

/// Gives back what the allocator keeps of memory that was freed: after a start, which reads and
/// parses much that is needed once. Does nothing with an allocator other than glibc's.
#[expect(unsafe_code, reason = "glibc's own call has no wrapper")]
pub fn give_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: malloc_trim(3) may be called by any thread at any time; it takes the allocator's locks.
    unsafe {
        libc::malloc_trim(0);
    }
}
