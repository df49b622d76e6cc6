//! Descriptors of regular files, and what works on ranges of them.
//!
//! Two descriptors per file: one past the page cache for requests that are aligned in memory and on disk, one through it for
//! the rest. The kernel keeps both in step as long as no two overlapping requests run, which the replica core sees to.
use super::Store;
use rustix::fs::{FallocateFlags, OFlags, SeekFrom};
use rustix::io::Errno;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use vmtwin_core::ids::FileId;
use vmtwin_core::namespace::Kind;

/// Files kept open beyond those in use.
const IDLE_DESCRIPTORS_MAX: usize = 256;

/// A regular file, opened.
#[derive(Clone, Debug)]
pub struct Descriptors {
    /// Through the page cache.
    pub buffered: Rc<OwnedFd>,
    /// Past it; none where the file system cannot.
    pub direct: Option<Rc<OwnedFd>>,
}

/// What to look for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seek {
    /// The next byte that is not in a hole.
    Data,
    /// The next hole.
    Hole,
}

impl Store {
    /// A regular file's descriptors.
    ///
    /// # Errors
    /// `EISDIR`, `EINVAL` for a link, `ESTALE` for an id that nothing has, and what the kernel says.
    pub fn descriptors(&mut self, id: FileId) -> Result<Descriptors, Errno> {
        if let Some(open) = self.open.get(&id) {
            return Ok(open.clone());
        }
        match self.kind(id)? {
            Kind::File => {}
            Kind::Directory => return Err(Errno::ISDIR),
            _ => return Err(Errno::INVAL),
        }
        if self.open.len() >= IDLE_DESCRIPTORS_MAX {
            self.open.retain(|_, open| Rc::strong_count(&open.buffered) > 1);
        }
        let buffered = Rc::new(self.tree.open(id, OFlags::RDWR)?);
        let direct = match self.tree.open(id, OFlags::RDWR | OFlags::DIRECT) {
            Ok(fd) => Some(Rc::new(fd)),
            Err(Errno::INVAL) => None,
            Err(e) => return Err(e),
        };
        let open = Descriptors { buffered, direct };
        self.open.insert(id, open.clone());
        Ok(open)
    }

    /// Forgets a file's descriptors; those in use live on until their requests end.
    pub(super) fn close(&mut self, id: FileId) {
        self.open.remove(&id);
    }

    /// Size in bytes.
    ///
    /// # Errors
    /// As `stat`.
    pub fn size(&self, id: FileId) -> Result<u64, Errno> {
        Ok(u64::try_from(self.stat(id)?.st_size).expect("a size is not negative"))
    }

    /// Cuts or grows a file.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn truncate(&mut self, id: FileId, size: u64) -> Result<(), Errno> {
        rustix::fs::ftruncate(&self.descriptors(id)?.buffered, size)
    }

    /// Room, holes and zeros, as fallocate(2) has them.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn allocate(&mut self, id: FileId, mode: FallocateFlags, offset: u64, length: u64) -> Result<(), Errno> {
        rustix::fs::fallocate(&self.descriptors(id)?.buffered, mode, offset, length)
    }

    /// Where the next data or hole begins, at or after `from`.
    ///
    /// # Errors
    /// `ENXIO` beyond the end.
    pub fn seek(&mut self, id: FileId, from: u64, what: Seek) -> Result<u64, Errno> {
        let to = match what {
            Seek::Data => SeekFrom::Data(from),
            Seek::Hole => SeekFrom::Hole(from),
        };
        rustix::fs::seek(&self.descriptors(id)?.buffered, to)
    }

    /// A folder's descriptor, to flush its names by.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn folder_descriptor(&self, id: FileId) -> Result<Rc<OwnedFd>, Errno> {
        Ok(Rc::new(self.tree.open(id, OFlags::RDONLY | OFlags::DIRECTORY)?))
    }
}
