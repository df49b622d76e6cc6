//! One process per name, and a way to find it again: a file that it keeps locked while it lives, with its id inside.
//!
//! A lock ends with its process, whatever killed it: an unlocked file says that nobody is there, whoever has the number now.
use rustix::fs::{FlockOperation, flock};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::path::Path;

/// Locked until dropped.
#[derive(Debug)]
pub struct PidFile {
    _file: File,
}

impl PidFile {
    /// Locks the file for this process; `None` where another one lives.
    ///
    /// # Errors
    /// Where the file cannot be made or written.
    pub fn take(path: &Path) -> io::Result<Option<Self>> {
        let mut file = open(path)?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => return Ok(None),
            Err(e) => return Err(e.into()),
        }
        file.set_len(0)?;
        file.write_all(std::process::id().to_string().as_bytes())?;
        Ok(Some(Self { _file: file }))
    }
}

fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)
}

/// A process that was found by its file.
#[derive(Debug)]
pub struct Found {
    /// Its process id.
    pub pid: u32,
    /// Readable once it has ended.
    pub pidfd: OwnedFd,
}

/// The process that holds the lock; `None` where nobody does.
///
/// # Errors
/// Where the file cannot be read.
pub fn find(path: &Path) -> io::Result<Option<Found>> {
    let Some(pid) = locked_by(path)? else { return Ok(None) };
    let Ok(pidfd) = pidfd_open(pid, PidfdFlags::NONBLOCK) else { return Ok(None) };
    // The number might have gone to another process in between: then nobody holds the lock, or another number stands there.
    let same = locked_by(path)? == Some(pid);
    Ok(same.then(|| Found { pid: pid.as_raw_nonzero().get().unsigned_abs(), pidfd }))
}

fn locked_by(path: &Path) -> io::Result<Option<Pid>> {
    let mut file = match File::open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(e),
    };
    match flock(&file, FlockOperation::NonBlockingLockShared) {
        Ok(()) => Ok(None),
        Err(rustix::io::Errno::WOULDBLOCK) => {
            let mut text = String::new();
            file.read_to_string(&mut text)?;
            Ok(text.trim().parse().ok().and_then(Pid::from_raw))
        }
        Err(e) => Err(e.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_process_of_one_name_is_refused_and_the_first_is_found_while_it_lives() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("db.pid");
        assert!(find(&path).unwrap().is_none());
        let held = PidFile::take(&path).unwrap().unwrap();
        assert!(PidFile::take(&path).unwrap().is_none());
        assert_eq!(find(&path).unwrap().unwrap().pid, std::process::id());
        drop(held);
        assert!(find(&path).unwrap().is_none());
        assert!(PidFile::take(&path).unwrap().is_some());
    }
}
