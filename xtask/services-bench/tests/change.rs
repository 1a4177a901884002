//! The tables in the kernel: what is said of them is there, and a change is one.

use std::{
    fs,
    path::PathBuf,
    process::{self, Command},
};

use serde_json::Value;

/// A cgroup without processes, until it is dropped.
struct Cgroup(PathBuf);

impl Cgroup {
    fn new() -> Self {
        let mount = ebpf_loader::find_cgroup2().expect("services need cgroup2");
        let path = mount.join(format!("hf-services-bench-{}", process::id()));
        fs::create_dir(&path).expect("making a cgroup needs root");
        Self(path)
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        fs::remove_dir(&self.0).ok();
    }
}

#[test]
fn one_endpoint_at_a_time_changes_in_the_maps() {
    let cgroup = Cgroup::new();
    let mut change = Command::new(env!("CARGO_BIN_EXE_services-bench"));
    let output = change
        .arg("change")
        .arg(&cgroup.0)
        .args(["40", "5", "7"])
        .output();
    let output = output.unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
    let said: Value = serde_json::from_slice(&output.stdout).unwrap();
    let changes = said["change_ns"].as_array().unwrap();
    assert_eq!(changes.len(), 7);
    assert!(changes.iter().all(|time| time.as_u64() > Some(0)), "{said}");
    assert!(said["load_ns"].as_u64() > Some(0));
    // The buckets alone take more than a MiB, and the whole must not take more than 128.
    let memory = said["map_memory_bytes"].as_u64().unwrap();
    assert!((1 << 20..128 << 20).contains(&memory), "{said}");
}
