//! Answers as types, and their bytes.
use super::abi::{Bytes, ENTRY_BYTES};
use rustix::io::Errno;
use std::time::Duration;
use vmtwin_core::ids::FileId;

/// An answer. `Operation` says which one fits which request.
#[derive(Debug)]
pub enum Reply<'a> {
    /// It failed.
    Error(Errno),
    /// Done; nothing to say.
    Done,
    /// A file, now known by its id to the kernel.
    Entry(Entry),
    /// A file's attributes, and how long the kernel may believe them.
    Attr(Attr, Duration),
    /// Opened; with this handle in all that follows.
    Opened(u64),
    /// Created and opened.
    Created(Entry, u64),
    /// Bytes.
    Data(&'a [u8]),
    /// Bytes taken.
    Written(u32),
    /// The file system.
    FileSystem(FileSystem),
    /// How large the value or list is.
    XattrSize(u32),
    /// Part of a directory.
    Directory(Directory),
    /// A position.
    Sought(u64),
}

/// A point in time, since 1970; `nanos` below 1 000 000 000.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Timestamp {
    pub seconds: i64,
    pub nanos: u32,
}

/// Attributes, as of stat(2).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Attr {
    /// The inode number that is shown; one for all names of a file.
    pub node: FileId,
    pub size: u64,
    /// Of 512 bytes.
    pub blocks: u64,
    pub atime: Timestamp,
    pub mtime: Timestamp,
    pub ctime: Timestamp,
    /// Type and permissions.
    pub mode: u32,
    pub links: u32,
    pub uid: u32,
    pub gid: u32,
    /// As the kernel's new_encode_dev.
    pub rdev: u32,
    pub block_bytes: u32,
}

/// A file under a name. The spans say how long the kernel may believe name and attributes: zero, unless nobody else can
/// change them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Entry {
    pub attr: Attr,
    pub name_valid: Duration,
    pub attr_valid: Duration,
}

/// Figures of statvfs(3).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct FileSystem {
    pub blocks: u64,
    pub blocks_free: u64,
    pub blocks_available: u64,
    pub files: u64,
    pub files_free: u64,
    pub block_bytes: u32,
    pub fragment_bytes: u32,
    pub name_bytes_max: u32,
}

/// One name in a directory.
#[derive(Clone, Copy, Debug)]
pub struct Listed<'a> {
    /// Its inode number.
    pub node: FileId,
    /// The file's mode; its type bits are used.
    pub mode: u32,
    /// Where to go on behind it: never 0.
    pub next: u64,
    /// The name.
    pub name: &'a [u8],
}

/// Collects an answer to `Operation::ReadDir`.
#[derive(Debug)]
pub struct Directory {
    bytes: Vec<u8>,
    size: usize,
    plus: bool,
}

impl Directory {
    /// Nothing yet; with the operation's `size` and `plus`.
    #[must_use]
    pub fn new(size: u32, plus: bool) -> Self {
        Self { bytes: Vec::new(), size: size as usize, plus }
    }

    /// Adds a name; false if it does not fit any more. `entry`, used for `plus` only: the file, which then counts as
    /// looked up; `None` for `.` and `..`, or where it is not known.
    pub fn push(&mut self, listed: Listed<'_>, entry: Option<&Entry>) -> bool {
        let head = if self.plus { ENTRY_BYTES } else { 0 } + 24;
        let whole = (head + listed.name.len()).next_multiple_of(8);
        if self.bytes.len() + whole > self.size {
            return false;
        }
        let end = self.bytes.len() + whole;
        let mut out = Bytes(std::mem::take(&mut self.bytes));
        match entry.filter(|_| self.plus) {
            Some(entry) => entry.write(&mut out),
            None => {
                out.zeroes(head - 24);
            }
        }
        let name_bytes = u32::try_from(listed.name.len()).expect("a name that fits the answer");
        out.u64(listed.node.0).u64(listed.next).u32(name_bytes).u32(listed.mode >> 12 & 0xf);
        out.0.extend_from_slice(listed.name);
        out.0.resize(end, 0);
        self.bytes = out.0;
        true
    }

    /// Whether nothing was added.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }
}

impl Attr {
    fn write(&self, out: &mut Bytes) {
        let times = [self.atime, self.mtime, self.ctime];
        out.u64(self.node.0).u64(self.size).u64(self.blocks);
        for time in times {
            out.u64(time.seconds as u64);
        }
        for time in times {
            out.u32(time.nanos);
        }
        out.u32(self.mode).u32(self.links).u32(self.uid).u32(self.gid);
        out.u32(self.rdev).u32(self.block_bytes).u32(0);
    }
}

impl Entry {
    fn write(&self, out: &mut Bytes) {
        out.u64(self.attr.node.0).u64(0).spans(&[self.name_valid, self.attr_valid]);
        self.attr.write(out);
    }
}

impl Reply<'_> {
    /// Appends the answer's fixed fields; gives its error number (0 for none) and the data to go behind them.
    /// `open_flags`: what an opened file is told.
    pub(super) fn encode(&self, open_flags: u32, out: &mut Bytes) -> (i32, &[u8]) {
        let (mut error, mut data): (i32, &[u8]) = (0, &[]);
        match self {
            Self::Error(errno) => error = errno.raw_os_error(),
            Self::Done => {}
            Self::Entry(entry) => entry.write(out),
            Self::Attr(attr, valid) => {
                out.spans(&[*valid]).u32(0);
                attr.write(out);
            }
            Self::Opened(handle) => {
                out.u64(*handle).u32(open_flags).u32(0);
            }
            Self::Created(entry, handle) => {
                entry.write(out);
                out.u64(*handle).u32(open_flags).u32(0);
            }
            Self::Data(bytes) => data = bytes,
            Self::Written(bytes) => {
                out.u32(*bytes).u32(0);
            }
            Self::FileSystem(f) => {
                out.u64(f.blocks).u64(f.blocks_free).u64(f.blocks_available).u64(f.files).u64(f.files_free);
                out.u32(f.block_bytes).u32(f.name_bytes_max).u32(f.fragment_bytes).zeroes(28);
            }
            Self::XattrSize(bytes) => {
                out.u32(*bytes).u32(0);
            }
            Self::Directory(directory) => data = &directory.bytes,
            Self::Sought(offset) => {
                out.u64(*offset);
            }
        }
        (error, data)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(reply: &Reply<'_>) -> usize {
        let mut fields = Bytes::default();
        let (_, data) = reply.encode(65, &mut fields);
        fields.0.len() + data.len()
    }

    #[test]
    fn answers_have_the_sizes_that_the_kernel_expects() {
        let (entry, attr) = (Entry::default(), Attr::default());
        let sizes = [
            (Reply::Error(Errno::IO), 0),
            (Reply::Done, 0),
            (Reply::Entry(entry), ENTRY_BYTES),
            (Reply::Attr(attr, Duration::ZERO), 104),
            (Reply::Opened(1), 16),
            (Reply::Created(entry, 1), ENTRY_BYTES + 16),
            (Reply::Data(b"abc"), 3),
            (Reply::Written(1), 8),
            (Reply::FileSystem(FileSystem::default()), 80),
            (Reply::XattrSize(1), 8),
            (Reply::Sought(1), 8),
        ];
        for (reply, size) in sizes {
            assert_eq!(bytes(&reply), size, "{reply:?}");
        }
    }

    #[test]
    fn a_directory_takes_names_as_long_as_they_fit() {
        for plus in [false, true] {
            let each = if plus { ENTRY_BYTES } else { 0 } + 32;
            let mut directory = Directory::new(each as u32 * 2 + 31, plus);
            let listed = |next| Listed { node: FileId(next), mode: 0o100_644, next, name: b"seven.." };
            assert!(directory.is_empty());
            assert!(directory.push(listed(1), Some(&Entry::default())));
            assert!(directory.push(listed(2), None));
            assert!(!directory.push(listed(3), None));
            assert_eq!(bytes(&Reply::Directory(directory)), 2 * each);
        }
    }
}
