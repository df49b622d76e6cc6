//! Owner, mode, times and extended attributes.
//!
//! `trusted.*` belongs to one host and answers ENOTSUP, as do access control lists: the mount does not do them.
use super::Store;
use super::tree::by_descriptor;
use rustix::fs::{AtFlags, CWD, Gid, Mode, OFlags, RawMode, Stat, Timespec, Timestamps, Uid, XattrFlags};
use rustix::io::Errno;
use std::os::fd::OwnedFd;
use vmtwin_core::ids::FileId;
use vmtwin_core::limits::XATTR_BYTES_MAX;
use vmtwin_core::namespace::{Attrs, FileTime, Kind};

impl Store {
    /// Attributes as the local file system has them; the inode number is the file's id, so both nodes show the same.
    ///
    /// # Errors
    /// `ESTALE` for an id that nothing has, and what the kernel says.
    pub fn stat(&self, id: FileId) -> Result<Stat, Errno> {
        let mut stat = self.raw_stat(id)?;
        stat.st_ino = id.0;
        let parked = id != FileId::ROOT && self.tree.node(id)?.names.is_empty();
        stat.st_nlink -= u64::from(parked);
        Ok(stat)
    }

    /// Attributes with the local inode number.
    pub(super) fn raw_stat(&self, id: FileId) -> Result<Stat, Errno> {
        match self.open.get(&id) {
            Some(open) => rustix::fs::fstat(&open.buffered),
            None => rustix::fs::fstat(self.handle(id)?),
        }
    }

    /// A descriptor that names the file and opens nothing.
    fn handle(&self, id: FileId) -> Result<OwnedFd, Errno> {
        self.tree.open(id, OFlags::PATH)
    }

    /// Changes owner, mode, times, in this order: a change of owner clears the set-id bits.
    ///
    /// # Errors
    /// What the kernel says.
    pub(super) fn set_attributes(&self, id: FileId, set: &Attrs) -> Result<(), Errno> {
        let handle = self.handle(id)?;
        let path = by_descriptor(&handle);
        if set.uid.is_some() || set.gid.is_some() {
            let (uid, gid) = (set.uid.map(Uid::from_raw), set.gid.map(Gid::from_raw));
            rustix::fs::chownat(CWD, &*path, uid, gid, AtFlags::empty())?;
        }
        if let Some(mode) = set.mode
            && self.kind(id)? != Kind::Symlink
        {
            rustix::fs::chmodat(CWD, &*path, Mode::from_raw_mode(mode as RawMode & 0o7777), AtFlags::empty())?;
        }
        if set.atime.is_some() || set.mtime.is_some() {
            let times = Timestamps { last_access: timespec(set.atime), last_modification: timespec(set.mtime) };
            rustix::fs::utimensat(CWD, &*path, &times, AtFlags::empty())?;
        }
        Ok(())
    }

    /// Where a symbolic link leads.
    ///
    /// # Errors
    /// `EINVAL` for what is none.
    pub fn read_link(&self, id: FileId) -> Result<Vec<u8>, Errno> {
        if self.kind(id)? != Kind::Symlink {
            return Err(Errno::INVAL);
        }
        Ok(rustix::fs::readlinkat(self.handle(id)?, "", Vec::new())?.into_bytes())
    }

    /// The value of an extended attribute.
    ///
    /// # Errors
    /// `ENODATA`, `ENOTSUP` for a family that is not offered.
    pub fn attribute(&self, id: FileId, name: &[u8]) -> Result<Vec<u8>, Errno> {
        check_attribute(name)?;
        read_grown(|buffer| {
            let handle = self.handle(id)?;
            rustix::fs::getxattr(by_descriptor(&handle), name, buffer)
        })
    }

    /// Names of the extended attributes that are offered, in order.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn attribute_names(&self, id: FileId) -> Result<Vec<Vec<u8>>, Errno> {
        let all = read_grown(|buffer| {
            let handle = self.handle(id)?;
            rustix::fs::listxattr(by_descriptor(&handle), buffer)
        })?;
        let mut names: Vec<Vec<u8>> =
            all.split(|b| *b == 0).filter(|n| !n.is_empty() && is_offered(n)).map(<[u8]>::to_vec).collect();
        names.sort_unstable();
        Ok(names)
    }

    /// Sets an extended attribute. `create`: it must not be there; `replace`: it must.
    ///
    /// # Errors
    /// `EEXIST`, `ENODATA`, `ENOTSUP`, `E2BIG`.
    pub fn set_attribute(&self, id: FileId, name: &[u8], value: &[u8], flags: XattrFlags) -> Result<(), Errno> {
        check_attribute(name)?;
        if value.len() > XATTR_BYTES_MAX {
            return Err(Errno::TOOBIG);
        }
        let handle = self.handle(id)?;
        rustix::fs::setxattr(by_descriptor(&handle), name, value, flags)
    }

    /// Removes an extended attribute.
    ///
    /// # Errors
    /// `ENODATA`, `ENOTSUP`.
    pub fn remove_attribute(&self, id: FileId, name: &[u8]) -> Result<(), Errno> {
        check_attribute(name)?;
        let handle = self.handle(id)?;
        rustix::fs::removexattr(by_descriptor(&handle), name)
    }
}

/// Whether an attribute is shown and may be set at all. `trusted.*` and access lists are not.
pub(super) fn is_offered(name: &[u8]) -> bool {
    name.starts_with(b"user.") || name.starts_with(b"security.")
}

/// Refuses an attribute that is not offered.
///
/// # Errors
/// `ENOTSUP`.
pub fn check_attribute(name: &[u8]) -> Result<(), Errno> {
    if is_offered(name) { Ok(()) } else { Err(Errno::NOTSUP) }
}

fn timespec(stamp: Option<FileTime>) -> Timespec {
    match stamp {
        Some(stamp) => Timespec { tv_sec: stamp.seconds, tv_nsec: i64::from(stamp.nanos) },
        None => Timespec { tv_sec: 0, tv_nsec: rustix::fs::UTIME_OMIT },
    }
}

/// Reads a value whose length is not known before: small first, then the largest there may be.
fn read_grown(read: impl Fn(&mut [u8]) -> Result<usize, Errno>) -> Result<Vec<u8>, Errno> {
    let mut buffer = vec![0; 512];
    let count = match read(&mut buffer) {
        Err(Errno::RANGE) => {
            buffer.resize(XATTR_BYTES_MAX, 0);
            read(&mut buffer)?
        }
        other => other?,
    };
    buffer.truncate(count);
    Ok(buffer)
}
