//! Power that is lost, on a real file system: what it gave its disk until then is there afterwards, and nothing of what it kept in
//! memory. A killed process loses nothing that it wrote, synced or not; here it does.
//!
//! Needs root: it mounts images, each in a mount namespace that ends with its process.

use std::{env, fs, path::Path, process::Command, thread, time::Duration};

use rustix::process::{Pid, Signal, kill_process};

use super::tests::{Writer, number_in};

/// How often power is lost, each time from the same running writer.
const LOSSES: u64 = 30;

/// An ext4 that gives its disk what it is told to sync and little else: files that are renamed unsynced are not written for
/// their sake (`noauto_da_alloc`: XFS and others do not either), and nothing is committed by itself for five minutes.
const MOUNT: &str = r#"mount -o loop,noauto_da_alloc,commit=300 "$0" "$1""#;

/// Runs in a shell with `image` mounted at `folder`, for itself alone; `then` gets `word` as `$2`.
fn mounted(image: &Path, folder: &Path, then: &str, word: &Path) -> Command {
    let mut command = Command::new("unshare");
    let script = format!("{MOUNT} && {then}");
    command.args(["--mount", "sh", "-c", &script]);
    command.args([image, folder, word]);
    command
}

fn succeed(command: &mut Command) {
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {said}");
}

/// Stops the writer between two of its system calls, and lets it go on when dropped.
struct Stopped(Pid);

impl Stopped {
    fn new(writer: &Writer) -> Self {
        let id = writer.process.id();
        let pid = Pid::from_raw(id.cast_signed()).unwrap();
        kill_process(pid, Signal::STOP).unwrap();
        let state = || fs::read_to_string(format!("/proc/{id}/stat")).unwrap();
        while !state().contains(") T ") {
            thread::sleep(Duration::from_micros(100));
        }
        Self(pid)
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        kill_process(self.0, Signal::CONT).ok();
    }
}

#[test]
fn power_lost_at_any_moment_leaves_what_was_written_or_what_was_being_written() {
    let home = tempfile::tempdir().unwrap();
    let folder = |name: &str| {
        let folder = home.path().join(name);
        fs::create_dir(&folder).unwrap();
        folder
    };
    let (disk, lost) = (home.path().join("disk"), home.path().join("lost"));
    let (mount, found) = (folder("mount"), folder("found"));
    fs::File::create(&disk).unwrap().set_len(16 << 20).unwrap();
    succeed(Command::new("mkfs.ext4").arg("-q").arg(&disk));
    let writer = mounted(
        &disk,
        &mount,
        r#"exec "$2" --exact store::tests::writer"#,
        &env::current_exe().unwrap(),
    );
    let writer = Writer::start(writer, &mount, home.path().join("said"));
    let mut leftovers = 0;
    for loss in 0..LOSSES {
        thread::sleep(Duration::from_micros(9_973 * loss % 40_000));
        let said = {
            let _stopped = Stopped::new(&writer);
            fs::copy(&disk, &lost).unwrap();
            writer.said()
        };
        // Power is back: the file system is mounted, and repairs itself.
        succeed(&mut mounted(
            &lost,
            &mount,
            r#"cp "$1"/snapshot.* "$2""#,
            &found,
        ));
        let number = number_in(&found);
        assert!(
            number == said || number == said + 1,
            "{number}, said {said}"
        );
        leftovers += u32::from(found.join("snapshot.tmp").exists());
        fs::remove_dir_all(&found).unwrap();
        fs::create_dir(&found).unwrap();
    }
    eprintln!("lost with a part written: {leftovers} of {LOSSES}");
    assert!(leftovers > 0, "no loss hit a write");
}
