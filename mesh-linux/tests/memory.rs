//! What a process has in memory, of itself: so alone in its process.

use std::fs;

use mesh_linux::memory;

#[test]
fn a_program_s_text_is_given_back() {
    // Of files, as proc_pid_status(5) has it.
    let kib = || -> u64 {
        let status = fs::read_to_string("/proc/self/status").unwrap();
        let mut lines = status.lines();
        let line = lines.find_map(|line| line.strip_prefix("RssFile:"));
        let words = line.unwrap().trim_end_matches("kB").trim();
        words.parse().unwrap()
    };
    let before = kib();
    memory::give_back();
    let after = kib(); // By text that came back.
    println!("{before} KiB, then {after}");
    assert!(after < before, "{before} KiB, then {after}");
}
