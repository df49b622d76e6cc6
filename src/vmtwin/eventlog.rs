//! The event log of one module on one node: what an operator reads afterwards, one JSON object a line.
//!
//! Holds: the open file and its size. Keeps out: what is worth a line (the module machine's notes say so), guest data.
//! Invariant: a line is written whole or not at all, and a full disk never stops the module: the line goes to stderr then.
use serde::{Deserialize, Serialize};
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

/// A file of this size is put aside as `.1`, and the one before it goes, in bytes.
pub const LOG_BYTES_MAX: u64 = 8 << 20;
/// A line longer than this is not ours: it is skipped by readers, in bytes.
const LINE_BYTES_MAX: usize = 64 << 10;

/// How much it matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// A change that an operator wants in a timeline.
    Info,
    /// Should wake one.
    Warn,
    /// Something is lost or stands still.
    Error,
}

/// One line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// RFC 3339, in UTC, with milliseconds.
    pub time: String,
    /// Node that wrote it.
    pub node: String,
    /// Module.
    pub module: String,
    /// Of the record that was known then; 0 before one was.
    pub generation: u64,
    /// How much it matters.
    pub level: Level,
    /// A short word for scripts: `takeover-begun`.
    pub event: String,
    /// A sentence for people.
    pub text: String,
}

/// The writer. One per module process.
#[derive(Debug)]
pub struct EventLog {
    path: PathBuf,
    file: Option<File>,
    bytes: u64,
    node: String,
    module: String,
}

impl EventLog {
    /// Opens or makes the file. Where that fails, lines go to stderr only, and so does the reason.
    #[must_use]
    pub fn open(path: &Path, node: &str, module: &str) -> Self {
        let mut log =
            Self { path: path.to_owned(), file: None, bytes: 0, node: node.to_owned(), module: module.to_owned() };
        log.reopen();
        log
    }

    fn reopen(&mut self) {
        match OpenOptions::new().create(true).append(true).open(&self.path) {
            Ok(file) => {
                self.bytes = file.metadata().map_or(0, |m| m.len());
                self.file = Some(file);
            }
            Err(why) => {
                self.file = None;
                eprintln!("event log {}: {why}", self.path.display());
            }
        }
    }

    /// Writes one event.
    pub fn write(&mut self, generation: u64, level: Level, event: &str, text: &str) {
        eprintln!("{}: {event}: {text}", self.module);
        let event = Event {
            time: now(),
            node: self.node.clone(),
            module: self.module.clone(),
            generation,
            level,
            event: event.to_owned(),
            text: text.to_owned(),
        };
        let mut line = serde_json::to_vec(&event).expect("plain texts and numbers become JSON");
        line.push(b'\n');
        if self.bytes + line.len() as u64 > LOG_BYTES_MAX {
            self.file = None;
            if let Err(why) = fs::rename(&self.path, aside(&self.path)) {
                eprintln!("event log {}: {why}", self.path.display());
            }
            self.reopen();
        }
        if let Some(file) = &mut self.file {
            match file.write_all(&line) {
                Ok(()) => self.bytes += line.len() as u64,
                Err(why) => eprintln!("event log {}: {why}", self.path.display()),
            }
        }
    }
}

/// The time of day as the log writes it.
#[must_use]
pub fn now() -> String {
    jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%S%.3fZ").to_string()
}

fn aside(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".1");
    PathBuf::from(name)
}

/// The last `limit` events, oldest first. A log that does not exist yet has none; lines that are no events are skipped.
///
/// # Errors
/// The file cannot be read.
pub fn read(path: &Path, limit: usize) -> io::Result<Vec<Event>> {
    let mut all = Vec::new();
    for path in [aside(path), path.to_owned()] {
        match File::open(&path) {
            Ok(file) => {
                let mut lines = BufReader::new(file);
                let mut line = Vec::new();
                while lines.by_ref().take(LINE_BYTES_MAX as u64).read_until(b'\n', &mut line)? > 0 {
                    all.extend(serde_json::from_slice::<Event>(&line));
                    line.clear();
                }
            }
            Err(why) if why.kind() == io::ErrorKind::NotFound => {}
            Err(why) => return Err(why),
        }
        if all.len() > limit {
            all.drain(..all.len() - limit);
        }
    }
    Ok(all)
}

/// Gives what was written since it was made, poll by poll.
#[derive(Debug)]
pub struct Follow {
    path: PathBuf,
    at: u64,
}

impl Follow {
    /// From the end of the file as it is now.
    #[must_use]
    pub fn new(path: &Path) -> Self {
        Self { path: path.to_owned(), at: fs::metadata(path).map_or(0, |m| m.len()) }
    }

    /// Whole lines written since the last poll. A file that was put aside meanwhile is read to its end first.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn poll(&mut self) -> io::Result<Vec<Event>> {
        let mut found = Vec::new();
        let bytes = fs::metadata(&self.path).map_or(0, |m| m.len());
        if bytes < self.at {
            self.take_from(&aside(&self.path), &mut found)?;
            self.at = 0;
        }
        let path = self.path.clone();
        self.take_from(&path, &mut found)?;
        Ok(found)
    }

    fn take_from(&mut self, path: &Path, found: &mut Vec<Event>) -> io::Result<()> {
        let mut file = match File::open(path) {
            Ok(file) => file,
            Err(why) if why.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(why) => return Err(why),
        };
        file.seek(SeekFrom::Start(self.at))?;
        let mut bytes = Vec::new();
        file.take(LOG_BYTES_MAX).read_to_end(&mut bytes)?;
        let whole = bytes.iter().rposition(|b| *b == b'\n').map_or(0, |last| last + 1);
        self.at += whole as u64;
        found.extend(bytes[..whole].split(|b| *b == b'\n').filter_map(|line| serde_json::from_slice(line).ok()));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_read_back_in_order_and_foreign_lines_are_skipped() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("db.jsonl");
        assert_eq!(read(&path, 10).unwrap(), []);
        let mut log = EventLog::open(&path, "h1", "db");
        log.write(3, Level::Warn, "peer-lost", "no contact with \"h2\"");
        fs::OpenOptions::new().append(true).open(&path).unwrap().write_all(b"\xff rubbish\n").unwrap();
        log.write(4, Level::Info, "alone", "h2 is out");
        let events = read(&path, 10).unwrap();
        let short: Vec<_> = events.iter().map(|e| (e.generation, e.level, e.event.as_str())).collect();
        assert_eq!(short, [(3, Level::Warn, "peer-lost"), (4, Level::Info, "alone")]);
        assert_eq!(events[0].text, "no contact with \"h2\"");
        assert_eq!(read(&path, 1).unwrap()[0].generation, 4);
    }

    #[test]
    fn a_follower_sees_each_event_once_also_over_a_rotation() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("db.jsonl");
        let mut log = EventLog::open(&path, "h1", "db");
        log.write(1, Level::Info, "before", "not followed");
        let mut follow = Follow::new(&path);
        assert_eq!(follow.poll().unwrap(), []);
        log.write(2, Level::Info, "a", "");
        assert_eq!(follow.poll().unwrap().len(), 1);
        log.write(3, Level::Info, "b", "");
        log.bytes = LOG_BYTES_MAX; // the next line begins a new file
        log.write(4, Level::Info, "c", "");
        let seen: Vec<_> = follow.poll().unwrap().into_iter().map(|e| e.event).collect();
        assert_eq!(seen, ["b", "c"]);
        assert_eq!(follow.poll().unwrap(), []);
        assert_eq!(read(&path, 10).unwrap().len(), 4, "two files are kept");
    }

    #[test]
    fn a_log_that_cannot_be_written_stops_nothing() {
        let mut log = EventLog::open(Path::new("/proc/no/such/log.jsonl"), "h1", "db");
        log.write(1, Level::Error, "x", "goes to stderr");
    }
}
