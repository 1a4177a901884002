//! The process's memory.

use std::{ffi::c_void, fs, ptr};

use rustix::mm::{Advice, madvise};

/// Gives back what is not needed again of what a start, or much work, took: it reads and parses much that is needed once.
pub fn give_back() {
    give_back_freed();
    give_back_text();
}

/// What the allocator keeps of memory that was freed. Nothing with an allocator other than glibc's.
#[expect(unsafe_code, reason = "glibc's own call has no wrapper")]
fn give_back_freed() {
    #[cfg(target_env = "gnu")]
    // SAFETY: malloc_trim(3) may be called by any thread at any time; it takes the allocator's locks.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// The program's text, of which a quiet process needs a small part. What is used comes back from the page cache, a fault of
/// about a microsecond for each 64 KiB; the rest the kernel may have when it needs memory, where before it was taken for in
/// use. Nothing without `/proc`.
#[expect(unsafe_code, reason = "who gives memory back says what is in it")]
fn give_back_text() {
    let maps = fs::read_to_string("/proc/self/maps").unwrap_or_default();
    for (begin, end) in maps.lines().filter_map(text) {
        let begin = ptr::without_provenance_mut::<c_void>(begin);
        // SAFETY: of a file's pages that nobody may write, none differs from the file: each reads the same again.
        // Refused (locked pages), they stay.
        unsafe { madvise(begin, end - begin.addr(), Advice::LinuxDontNeed) }.ok();
    }
}

/// Where a line of proc_pid_maps(5) says that there is a file's text.
fn text(line: &str) -> Option<(usize, usize)> {
    let mut words = line.split_whitespace();
    let (begin, end) = words.next()?.split_once('-')?;
    let (mode, inode) = (words.next()?, words.nth(2)?);
    let place = |text| usize::from_str_radix(text, 16).ok();
    (mode == "r-xp" && inode != "0").then_some((place(begin)?, place(end)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_what_may_run_of_a_file_and_nothing_else() {
        let of_file = "5581c0400000-5581c13bf000 r-xp 00400000 fe:00 131 /usr/bin/mesh-agent";
        assert_eq!(text(of_file), Some((0x5581_c040_0000, 0x5581_c13b_f000)));
        for other in [
            "5581c0000000-5581c0400000 r--p 00000000 fe:00 131 /usr/bin/mesh-agent",
            "5581c0400000-5581c13bf000 rwxp 00400000 fe:00 131 /usr/bin/mesh-agent",
            "7ffd5c1f2000-7ffd5c1f4000 r-xp 00000000 00:00 0 [vdso]",
            "",
        ] {
            assert_eq!(text(other), None, "{other}");
        }
    }
}
