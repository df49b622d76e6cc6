//! Small files below /var/lib/vmtwin/NAME: a reader finds the old bytes or the new ones, never a part.
//!
//! A file is replaced by writing a second one, flushing it, renaming it, flushing the folder, and reading it back. Keeps
//! out what the bytes mean; their formats check themselves.
use rustix::fs::{FlockOperation, Mode, OFlags};
use rustix::io::Errno;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Largest file that is read whole: the dirty map of the largest disk stays far below.
const FILE_BYTES_MAX: u64 = 1 << 30;

/// What went wrong with a metadata file.
#[derive(Debug, thiserror::Error)]
pub enum MetaError {
    /// The kernel's words.
    #[error("cannot {what} {path}")]
    Io {
        /// Read, write, ...
        what: &'static str,
        /// Which file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// What was read back is not what was written.
    #[error("{path} does not read back as it was written: the disk below is failing")]
    ReadBack {
        /// Which file.
        path: PathBuf,
    },
    /// A predecessor's requests have not ended.
    #[error("requests of the module's previous process have not ended within {} s ({path} is locked)", waited.as_secs())]
    NotDrained {
        /// The lock.
        path: PathBuf,
        /// How long it was waited for.
        waited: Duration,
    },
}

/// A module's folder of metadata. Cheap to clone and to send to another thread.
#[derive(Clone, Debug)]
pub struct MetaFolder {
    folder: Arc<OwnedFd>,
    path: PathBuf,
}

impl MetaFolder {
    /// Opens it, and makes it where it is missing.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn open(path: &Path) -> Result<Self, MetaError> {
        let failed = |what, source| MetaError::Io { what, path: path.to_owned(), source };
        if !path.is_dir() {
            std::fs::create_dir_all(path).map_err(|e| failed("make", e))?;
            if let Some(parent) = path.parent().filter(|parent| !parent.as_os_str().is_empty()) {
                File::open(parent)
                    .and_then(|parent| parent.sync_all())
                    .map_err(|e| failed("flush the folder of", e))?;
            }
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let folder = rustix::fs::open(path, flags, Mode::empty()).map_err(|e| failed("open", e.into()))?;
        Ok(Self { folder: Arc::new(folder), path: path.to_owned() })
    }

    fn failed(&self, what: &'static str, name: &str) -> impl Fn(io::Error) -> MetaError {
        let path = self.path.join(name);
        move |source| MetaError::Io { what, path: path.clone(), source }
    }

    fn open_file(&self, name: &str, flags: OFlags) -> io::Result<File> {
        let flags = flags | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let fd = rustix::fs::openat(&self.folder, name, flags, Mode::from_raw_mode(0o600))?;
        Ok(File::from(fd))
    }

    /// The bytes of a file; none where there is none.
    ///
    /// # Errors
    /// What the kernel says, or a size beyond all sense.
    pub fn read(&self, name: &str) -> Result<Option<Vec<u8>>, MetaError> {
        let file = match self.open_file(name, OFlags::RDONLY) {
            Ok(file) => file,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(self.failed("open", name)(e)),
        };
        let mut bytes = Vec::new();
        file.take(FILE_BYTES_MAX).read_to_end(&mut bytes).map_err(self.failed("read", name))?;
        Ok(Some(bytes))
    }

    /// Puts `bytes` in a file's place, durably.
    ///
    /// # Errors
    /// What the kernel says; the old file stands then.
    pub fn replace(&self, name: &str, bytes: &[u8]) -> Result<(), MetaError> {
        let new = format!("{name}.new");
        let written = (|| {
            let mut file = self.open_file(&new, OFlags::CREATE | OFlags::TRUNC | OFlags::WRONLY)?;
            file.write_all(bytes)?;
            file.sync_all()?;
            rustix::fs::renameat(&self.folder, &*new, &self.folder, name)?;
            rustix::fs::fsync(&self.folder)?;
            Ok(())
        })();
        written.map_err(self.failed("write", name))?;
        if self.read(name)?.as_deref() == Some(bytes) {
            Ok(())
        } else {
            Err(MetaError::ReadBack { path: self.path.join(name) })
        }
    }

    /// Removes a file that may be there.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn remove(&self, name: &str) -> Result<(), MetaError> {
        let removed = rustix::fs::unlinkat(&self.folder, name, rustix::fs::AtFlags::empty())
            .or_else(|e| if e == Errno::NOENT { Ok(()) } else { Err(e) })
            .and_then(|()| rustix::fs::fsync(&self.folder));
        removed.map_err(|e| self.failed("remove", name)(e.into()))
    }

    /// A file that is written in place: what a write to this descriptor returned for is durable.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn in_place(&self, name: &str) -> Result<OwnedFd, MetaError> {
        let opened = self.open_file(name, OFlags::CREATE | OFlags::RDWR | OFlags::DSYNC).and_then(|file| {
            rustix::fs::fsync(self.folder.as_fd())?;
            Ok(file.into())
        });
        opened.map_err(self.failed("open", name))
    }

    /// R7: the lock that a process hands to its ring, so that it is free again only when the last request of that ring has
    /// ended, however the process did. Waits for a predecessor's.
    ///
    /// # Errors
    /// `NotDrained` when the limit is over.
    pub fn drain_lock(&self, limit: Duration) -> Result<OwnedFd, MetaError> {
        const NAME: &str = "drain";
        let file = self.open_file(NAME, OFlags::CREATE | OFlags::RDWR).map_err(self.failed("open", NAME))?;
        let began = Instant::now();
        loop {
            match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => return Ok(file.into()),
                Err(Errno::WOULDBLOCK | Errno::INTR) if began.elapsed() < limit => {
                    std::thread::sleep(Duration::from_millis(20));
                }
                Err(Errno::WOULDBLOCK | Errno::INTR) => {
                    return Err(MetaError::NotDrained { path: self.path.join(NAME), waited: limit });
                }
                Err(e) => return Err(self.failed("lock", NAME)(e.into())),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_replaced_file_reads_back_and_a_leftover_of_a_crash_does_not_matter() {
        let folder = tempfile::tempdir().unwrap();
        let meta = MetaFolder::open(&folder.path().join("a/b")).unwrap();
        assert_eq!(meta.read("x").unwrap(), None);
        std::fs::write(folder.path().join("a/b/x.new"), b"half of an older wri").unwrap();
        meta.replace("x", b"one").unwrap();
        meta.replace("x", b"two!").unwrap();
        assert_eq!(meta.read("x").unwrap().unwrap(), b"two!");
        meta.remove("x").unwrap();
        meta.remove("x").unwrap();
        assert_eq!(meta.read("x").unwrap(), None);
    }

    #[test]
    fn the_lock_is_had_once_and_by_the_next_when_it_is_let_go() {
        let folder = tempfile::tempdir().unwrap();
        let meta = MetaFolder::open(folder.path()).unwrap();
        let first = meta.drain_lock(Duration::ZERO).unwrap();
        assert!(matches!(meta.drain_lock(Duration::ZERO), Err(MetaError::NotDrained { .. })));
        drop(first);
        meta.drain_lock(Duration::from_secs(60)).unwrap();
    }
}
