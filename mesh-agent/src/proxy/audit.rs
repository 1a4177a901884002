//! The proxy's audit log: a JSON object a line, on disk before the next batch is taken.
//!
//! A disk that is full or broken does not stop the proxy: that is when somebody has to get at nodes. Lines that
//! cannot be written go to the agent's own log, are counted, and `meshctl status` says so.

use std::{
    fs::{self, File},
    io::{self, Read as _, Seek as _, SeekFrom, Write as _},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use serde::Serialize;
use tokio::sync::mpsc;

/// A file that would grow beyond this is put aside: with those kept, 32 MiB, and 80,000 connections or more.
const FILE_BYTES_MAX: u64 = 8 << 20;

/// Older files that are kept, as `<name>.1` (the newest) and so on.
const OLD_FILES_MAX: u32 = 3;

/// Lines that wait for the disk: 400 bytes each. Those that find no room are lost, and counted.
const QUEUE_LINES_MAX: usize = 1_024;

/// Lines that are written, and waited for, at once.
const BATCH_LINES_MAX: usize = 64;

/// Where lines go. Clones lead to the same file.
#[derive(Debug, Clone)]
pub(crate) struct Audit {
    queue: mpsc::Sender<Option<String>>,
    state: Arc<State>,
}

#[derive(Debug, Default)]
struct State {
    lost: AtomicU64,
    problem: Mutex<Option<String>>,
}

/// What writes them: blocks, so on a thread of its own.
#[derive(Debug)]
pub(crate) struct Writer {
    queue: mpsc::Receiver<Option<String>>,
    state: Arc<State>,
    log: LogFile,
}

/// A log at `path`.
pub(crate) fn open(path: &Path) -> (Audit, Writer) {
    open_with(path, FILE_BYTES_MAX)
}

fn open_with(path: &Path, bytes_max: u64) -> (Audit, Writer) {
    let (sender, queue) = mpsc::channel(QUEUE_LINES_MAX);
    let state = Arc::new(State::default());
    let audit = Audit {
        queue: sender,
        state: Arc::clone(&state),
    };
    let log = LogFile {
        path: path.to_owned(),
        bytes_max,
        open: None,
    };
    (audit, Writer { queue, state, log })
}

impl Audit {
    /// Writes one down, without waiting for it.
    pub(crate) fn line(&self, record: &impl Serialize) {
        let Ok(line) = serde_json::to_string(record) else {
            return; // Records are plain fields: they always can be.
        };
        if let Err(refused) = self.queue.try_send(Some(line)) {
            let (mpsc::error::TrySendError::Full(line) | mpsc::error::TrySendError::Closed(line)) =
                refused;
            self.state
                .lost(&[line.unwrap_or_default()], "too many wait for the disk");
        }
    }

    /// Tells the writer to end once it has written what it has.
    pub(crate) async fn end(&self) {
        self.queue.send(None).await.ok(); // It may have ended.
    }

    /// Lines that are not in the file.
    pub(crate) fn lost(&self) -> u64 {
        self.state.lost.load(Ordering::Relaxed)
    }

    /// Why the last ones are not.
    pub(crate) fn problem(&self) -> Option<String> {
        let problem = self.state.problem.lock();
        problem.unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl State {
    fn lost(&self, lines: &[String], problem: &str) {
        for line in lines {
            tracing::warn!(%problem, %line, "a line of the proxy's audit log could not be written");
        }
        let count = u64::try_from(lines.len()).unwrap_or(u64::MAX);
        self.lost.fetch_add(count, Ordering::Relaxed);
        self.tell(Some(problem.to_owned()));
    }

    fn tell(&self, problem: Option<String>) {
        *self.problem.lock().unwrap_or_else(PoisonError::into_inner) = problem;
    }
}

impl Writer {
    /// Writes until it is told to end, or nobody is left who could.
    pub(crate) fn run(mut self) {
        let mut ended = false;
        while !ended && let Some(Some(line)) = self.queue.blocking_recv() {
            let mut lines = vec![line];
            while !ended && lines.len() < BATCH_LINES_MAX {
                match self.queue.try_recv() {
                    Ok(Some(line)) => lines.push(line),
                    Ok(None) => ended = true,
                    Err(_) => break,
                }
            }
            match self.log.write(&lines) {
                Ok(()) => self.state.tell(None),
                Err(error) => {
                    let problem = format!("{}: {error}", self.log.path.display());
                    self.state.lost(&lines, &problem);
                }
            }
        }
    }
}

/// The file, and how long it is.
#[derive(Debug)]
struct LogFile {
    path: PathBuf,
    bytes_max: u64,
    /// Nothing: not yet, or something was wrong with it.
    open: Option<(File, u64)>,
}

impl LogFile {
    /// Appends lines, and waits until the disk has them. A part of a line that was left behind, by a full disk or
    /// a lost power supply, stays a line of its own.
    fn write(&mut self, lines: &[String]) -> io::Result<()> {
        let text: String = lines
            .iter()
            .flat_map(|line| [line.as_str(), "\n"])
            .collect();
        let more = u64::try_from(text.len()).unwrap_or(u64::MAX);
        let (mut file, mut length) = match self.open.take() {
            Some(open) => open,
            None => self.append_to()?,
        };
        if length > 0 && length.saturating_add(more) > self.bytes_max {
            drop(file);
            self.put_aside()?;
            (file, length) = self.append_to()?;
        }
        file.write_all(text.as_bytes())?;
        file.sync_data()?;
        self.open = Some((file, length + more));
        Ok(())
    }

    fn append_to(&self) -> io::Result<(File, u64)> {
        if let Some(folder) = self.path.parent() {
            fs::DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(folder)?;
        }
        let mut file = File::options()
            .read(true)
            .append(true)
            .create(true)
            .mode(0o600)
            .open(&self.path)?;
        let mut length = file.metadata()?.len();
        if length > 0 {
            let mut last = [0];
            file.seek(SeekFrom::End(-1))?;
            file.read_exact(&mut last)?;
            if last != *b"\n" {
                file.write_all(b"\n")?;
                length += 1;
            }
        }
        Ok((file, length))
    }

    fn put_aside(&self) -> io::Result<()> {
        let aside = |age: u32| {
            let mut name = self.path.as_os_str().to_owned();
            if age > 0 {
                name.push(format!(".{age}"));
            }
            PathBuf::from(name)
        };
        for age in (0..OLD_FILES_MAX).rev() {
            match fs::rename(aside(age), aside(age + 1)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                Ok(()) | Err(_) => {}
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    /// Writes lines as an agent's life would, and ends.
    fn write(path: &Path, bytes_max: u64, lines: impl IntoIterator<Item = Value>) -> Audit {
        let (audit, writer) = open_with(path, bytes_max);
        let thread = std::thread::spawn(|| writer.run());
        for line in lines {
            audit.line(&line);
        }
        audit.queue.blocking_send(None).unwrap();
        thread.join().unwrap();
        audit
    }

    fn lines(path: &Path) -> Vec<String> {
        let text = fs::read_to_string(path).unwrap();
        assert!(text.ends_with('\n'));
        text.lines().map(str::to_owned).collect()
    }

    #[test]
    fn lines_stay_and_a_torn_one_spoils_no_other() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log/proxy.jsonl");
        write(&path, FILE_BYTES_MAX, [json!({"n": 1})]);
        // The power went while a line was written.
        let mut file = File::options().append(true).open(&path).unwrap();
        file.write_all(b"{\"n\": ").unwrap();
        let audit = write(&path, FILE_BYTES_MAX, [json!({"n": 2}), json!({"n": 3})]);
        assert_eq!(
            lines(&path),
            [r#"{"n":1}"#, r#"{"n": "#, r#"{"n":2}"#, r#"{"n":3}"#]
        );
        assert_eq!((audit.lost(), audit.problem()), (0, None));
    }

    #[test]
    fn files_are_bounded_and_the_oldest_go() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("proxy.jsonl");
        for n in 100..200 {
            write(&path, 64, [json!({"n": n})]); // 10 bytes each: six fit.
        }
        let mut names: Vec<_> = fs::read_dir(folder.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        let kept = [
            "proxy.jsonl",
            "proxy.jsonl.1",
            "proxy.jsonl.2",
            "proxy.jsonl.3",
        ];
        assert_eq!(names, kept);
        let mut all = Vec::new();
        for name in kept.iter().rev() {
            let lines = lines(&folder.path().join(name));
            assert!(lines.len() <= 6, "{lines:?}");
            all.extend(lines);
        }
        assert_eq!(all.last().unwrap(), r#"{"n":199}"#);
        // Nothing is missing between the oldest that is kept and the newest.
        let first = 200 - i64::try_from(all.len()).unwrap();
        let expected: Vec<_> = (first..200).map(|n| format!(r#"{{"n":{n}}}"#)).collect();
        assert_eq!(all, expected);
    }

    #[test]
    fn on_a_full_disk_lines_are_counted_as_lost_and_the_reason_is_told() {
        let audit = write(
            Path::new("/dev/full"),
            FILE_BYTES_MAX,
            (0..3).map(|n| json!({"n": n})),
        );
        assert_eq!(audit.lost(), 3);
        let problem = audit.problem().unwrap();
        assert!(problem.contains("/dev/full: No space left"), "{problem}");
    }

    #[test]
    fn once_the_disk_has_room_again_it_goes_on() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("proxy.jsonl");
        let (audit, writer) = open_with(&path, FILE_BYTES_MAX);
        fs::create_dir(&path).unwrap(); // Cannot be opened.
        let thread = std::thread::spawn(|| writer.run());
        audit.line(&json!({"n": 1}));
        while audit.lost() == 0 {
            std::thread::yield_now();
        }
        fs::remove_dir(&path).unwrap();
        audit.line(&json!({"n": 2}));
        audit.queue.blocking_send(None).unwrap();
        thread.join().unwrap();
        assert_eq!(lines(&path), [r#"{"n":2}"#]);
        assert_eq!((audit.lost(), audit.problem()), (1, None));
    }

    #[test]
    fn a_disk_that_hangs_holds_up_nobody() {
        // Nobody writes.
        let (audit, writer) = open_with(Path::new("/nowhere"), FILE_BYTES_MAX);
        for n in 0..QUEUE_LINES_MAX + 5 {
            audit.line(&json!({"n": n}));
        }
        assert_eq!(audit.lost(), 5);
        drop(writer);
    }
}
