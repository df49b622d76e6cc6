//! Changes of the directory that are not data: what they are, how they travel, and what one copy must do to look like
//! the other.
//!
//! Decides: whether an operation makes sense (`Tree::apply`, the model), and which operations make the target's tree
//! equal to the holder's (`plan`). Holds nothing. Keeps out: paths, descriptors, times of the clock, data.
//! Invariant: an operation means the same on both nodes: files are named by their shared id, never by a path.
mod plan;
#[cfg(test)]
mod tests;
mod tree;

pub use plan::{Plan, plan};
pub use tree::{Entry, Kind, Tree, TreeReader};

use crate::ids::FileId;
use crate::limits::{FILE_BYTES_MAX, FILE_NAME_BYTES_MAX, SYMLINK_BYTES_MAX, XATTR_BYTES_MAX, XATTR_NAME_BYTES_MAX};
use crate::wire::codec::{DecodeError, Reader, Writer};
use std::fmt;

/// Linux's number of an error.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Errno(pub i32);

macro_rules! errnos {
    ($($name:ident = $value:literal),* $(,)?) => {
        impl Errno {
            $(#[doc = concat!("`", stringify!($name), "`.")] pub const $name: Self = Self($value);)*
        }
        impl fmt::Debug for Errno {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                match self.0 {
                    $($value => f.write_str(stringify!($name)),)*
                    other => write!(f, "errno {other}"),
                }
            }
        }
    };
}
errnos! {
    EPERM = 1, ENOENT = 2, EIO = 5, EACCES = 13, EEXIST = 17, EXDEV = 18, ENOTDIR = 20, EISDIR = 21, EINVAL = 22,
    EFBIG = 27, ENOSPC = 28, EROFS = 30, EMLINK = 31, ENAMETOOLONG = 36, ENOTEMPTY = 39, ENODATA = 61,
    EOPNOTSUPP = 95, ESTALE = 116, EDQUOT = 122,
}

/// How an operation ended.
pub type Outcome = Result<(), Errno>;

/// A name within a directory: 1 to 255 bytes, no slash, no zero, neither `.` nor `..`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FileName(Vec<u8>);

impl FileName {
    /// Checks and takes a name.
    ///
    /// # Errors
    /// What Linux says to such a name: `ENOENT`, `ENAMETOOLONG`, `EINVAL`.
    pub fn new(name: impl Into<Vec<u8>>) -> Result<Self, Errno> {
        let name = name.into();
        if name.is_empty() {
            return Err(Errno::ENOENT);
        }
        if name.len() > FILE_NAME_BYTES_MAX {
            return Err(Errno::ENAMETOOLONG);
        }
        if name == b"." || name == b".." || name.iter().any(|&b| b == 0 || b == b'/') {
            return Err(Errno::EINVAL);
        }
        Ok(Self(name))
    }
    /// Its bytes.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
    fn decode(from: &mut Reader<'_>) -> Result<Self, DecodeError> {
        Self::new(from.blob(FILE_NAME_BYTES_MAX)?).map_err(|_| DecodeError::Bad { what: "file name" })
    }
}
impl fmt::Display for FileName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0.escape_ascii())
    }
}
impl fmt::Debug for FileName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{self}\"")
    }
}

/// Who may do what with a new file. `mode` has permission bits only (07777); the umask is already taken off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Owner {
    /// Permission bits.
    pub mode: u32,
    /// Numeric owner.
    pub uid: u32,
    /// Numeric group.
    pub gid: u32,
}

/// Bits of `mode` that are permissions.
pub const MODE_BITS: u32 = 0o7777;

impl Owner {
    fn encode(self, out: &mut Writer<'_>) {
        out.u32(self.mode);
        out.u32(self.uid);
        out.u32(self.gid);
    }
    fn decode(from: &mut Reader<'_>) -> Result<Self, DecodeError> {
        Ok(Self { mode: decode_mode(from)?, uid: from.u32()?, gid: from.u32()? })
    }
}

fn decode_mode(from: &mut Reader<'_>) -> Result<u32, DecodeError> {
    let mode = from.u32()?;
    if mode & !MODE_BITS == 0 { Ok(mode) } else { Err(DecodeError::Bad { what: "mode" }) }
}

fn decode_size(from: &mut Reader<'_>) -> Result<u64, DecodeError> {
    let size = from.u64()?;
    if size <= FILE_BYTES_MAX { Ok(size) } else { Err(DecodeError::Length { found: size, most: FILE_BYTES_MAX }) }
}

/// A time of a file, as the holder's clock gave it: both nodes set the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileTime {
    /// Seconds since 1970.
    pub seconds: i64,
    /// Below a thousand million.
    pub nanos: u32,
}

/// What `SetAttr` changes; what is `None` stays. Carried out in the order owner, mode, size, times: a change of the owner
/// clears bits of the mode.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Attrs {
    /// Permission bits.
    pub mode: Option<u32>,
    /// Numeric owner.
    pub uid: Option<u32>,
    /// Numeric group.
    pub gid: Option<u32>,
    /// New length in bytes (truncate or extend).
    pub size: Option<u64>,
    /// Last access.
    pub atime: Option<FileTime>,
    /// Last change of data.
    pub mtime: Option<FileTime>,
}

/// How `Rename` treats a file under the new name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RenameMode {
    /// It is replaced.
    Replace,
    /// `EEXIST`.
    NoReplace,
    /// Both change places; `over` names the other.
    Exchange,
}

/// How `SetXattr` treats an attribute of that name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum XattrMode {
    /// Made or replaced.
    Set,
    /// `EEXIST` where there is one.
    Create,
    /// `ENODATA` where there is none.
    Replace,
}

/// What `Mknod` makes. Devices are refused: they would mean another thing on the other host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NodeKind {
    /// A named pipe.
    Fifo,
    /// A socket's name.
    Socket,
}

/// One operation on the namespace. The holder fills in ids before it is carried out: `id` is the file meant, `over` the one
/// under the new name, if any. Who carries it out and finds another id under a name answers `ESTALE`: the trees differ.
///
/// Format: u8 tag in the order below, 1 to 11, then the fields in their order; names, targets and values are u32 length +
/// bytes, options a 0/1 byte + value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    /// A new, empty file.
    Create { parent: FileId, name: FileName, id: FileId, owner: Owner },
    /// A new directory.
    Mkdir { parent: FileId, name: FileName, id: FileId, owner: Owner },
    /// A symbolic link; `owner.mode` says nothing.
    Symlink { parent: FileId, name: FileName, id: FileId, owner: Owner, target: Vec<u8> },
    /// A pipe or socket.
    Mknod { parent: FileId, name: FileName, id: FileId, owner: Owner, kind: NodeKind },
    /// One more name of a file.
    Link { id: FileId, parent: FileId, name: FileName },
    /// A name less.
    Unlink { parent: FileId, name: FileName, id: FileId },
    /// An empty directory goes.
    Rmdir { parent: FileId, name: FileName, id: FileId },
    /// A name moves.
    Rename {
        parent: FileId,
        name: FileName,
        id: FileId,
        new_parent: FileId,
        new_name: FileName,
        over: Option<FileId>,
        mode: RenameMode,
    },
    /// Attributes and length.
    SetAttr { id: FileId, attrs: Attrs },
    /// An extended attribute is set.
    SetXattr { id: FileId, name: Vec<u8>, value: Vec<u8>, mode: XattrMode },
    /// An extended attribute goes.
    RemoveXattr { id: FileId, name: Vec<u8> },
}

/// Whether this attribute is part of what both nodes share. `trusted.*` belongs to a host, the SELinux label to its policy.
#[must_use]
pub fn xattr_is_shared(name: &[u8]) -> bool {
    !name.starts_with(b"trusted.") && name != b"security.selinux"
}

impl Op {
    /// The files that it is about (not the directories that the names are in): the writes to these keep clear of it.
    #[must_use]
    pub fn files(&self) -> Vec<FileId> {
        match self {
            Self::Create { id, .. }
            | Self::Mkdir { id, .. }
            | Self::Symlink { id, .. }
            | Self::Mknod { id, .. }
            | Self::Link { id, .. }
            | Self::Unlink { id, .. }
            | Self::Rmdir { id, .. }
            | Self::SetAttr { id, .. }
            | Self::SetXattr { id, .. }
            | Self::RemoveXattr { id, .. } => vec![*id],
            Self::Rename { id, over, .. } => std::iter::once(*id).chain(*over).collect(),
        }
    }

    /// The file that a new id is given to.
    #[must_use]
    pub fn creates(&self) -> Option<FileId> {
        match self {
            Self::Create { id, .. } | Self::Mkdir { id, .. } | Self::Symlink { id, .. } | Self::Mknod { id, .. } => {
                Some(*id)
            }
            _ => None,
        }
    }

    /// The file that loses a name and may be gone after it.
    #[must_use]
    pub fn unlinks(&self) -> Option<FileId> {
        match self {
            Self::Unlink { id, .. } | Self::Rmdir { id, .. } => Some(*id),
            Self::Rename { over, mode: RenameMode::Replace, .. } => *over,
            _ => None,
        }
    }

    /// Appends the bytes of the format above.
    pub fn encode(&self, out: &mut Writer<'_>) {
        let made = |out: &mut Writer<'_>, tag: u8, parent: &FileId, name: &FileName, id: &FileId, owner: &Owner| {
            out.u8(tag);
            out.u64(parent.0);
            out.blob(&name.0);
            out.u64(id.0);
            owner.encode(out);
        };
        match self {
            Self::Create { parent, name, id, owner } => made(out, 1, parent, name, id, owner),
            Self::Mkdir { parent, name, id, owner } => made(out, 2, parent, name, id, owner),
            Self::Symlink { parent, name, id, owner, target } => {
                made(out, 3, parent, name, id, owner);
                out.blob(target);
            }
            Self::Mknod { parent, name, id, owner, kind } => {
                made(out, 4, parent, name, id, owner);
                out.u8(match kind {
                    NodeKind::Fifo => 0,
                    NodeKind::Socket => 1,
                });
            }
            Self::Link { id, parent, name } => {
                out.u8(5);
                out.u64(id.0);
                out.u64(parent.0);
                out.blob(&name.0);
            }
            Self::Unlink { parent, name, id } | Self::Rmdir { parent, name, id } => {
                out.u8(if matches!(self, Self::Unlink { .. }) { 6 } else { 7 });
                out.u64(parent.0);
                out.blob(&name.0);
                out.u64(id.0);
            }
            Self::Rename { parent, name, id, new_parent, new_name, over, mode } => {
                out.u8(8);
                out.u64(parent.0);
                out.blob(&name.0);
                out.u64(id.0);
                out.u64(new_parent.0);
                out.blob(&new_name.0);
                out.option(over.as_ref(), |out, over| out.u64(over.0));
                out.u8(match mode {
                    RenameMode::Replace => 0,
                    RenameMode::NoReplace => 1,
                    RenameMode::Exchange => 2,
                });
            }
            Self::SetAttr { id, attrs } => {
                out.u8(9);
                out.u64(id.0);
                out.option(attrs.mode.as_ref(), |out, v| out.u32(*v));
                out.option(attrs.uid.as_ref(), |out, v| out.u32(*v));
                out.option(attrs.gid.as_ref(), |out, v| out.u32(*v));
                out.option(attrs.size.as_ref(), |out, v| out.u64(*v));
                for time in [&attrs.atime, &attrs.mtime] {
                    out.option(time.as_ref(), |out, t| {
                        out.i64(t.seconds);
                        out.u32(t.nanos);
                    });
                }
            }
            Self::SetXattr { id, name, value, mode } => {
                out.u8(10);
                out.u64(id.0);
                out.blob(name);
                out.blob(value);
                out.u8(match mode {
                    XattrMode::Set => 0,
                    XattrMode::Create => 1,
                    XattrMode::Replace => 2,
                });
            }
            Self::RemoveXattr { id, name } => {
                out.u8(11);
                out.u64(id.0);
                out.blob(name);
            }
        }
    }

    /// Reads and checks one.
    ///
    /// # Errors
    /// Missing bytes, an unknown tag, a name or value beyond its bound.
    pub fn decode(from: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let file = |from: &mut Reader<'_>| from.u64().map(FileId);
        let made = |from: &mut Reader<'_>| {
            Ok::<_, DecodeError>((file(from)?, FileName::decode(from)?, file(from)?, Owner::decode(from)?))
        };
        Ok(match from.u8()? {
            1 => {
                let (parent, name, id, owner) = made(from)?;
                Self::Create { parent, name, id, owner }
            }
            2 => {
                let (parent, name, id, owner) = made(from)?;
                Self::Mkdir { parent, name, id, owner }
            }
            3 => {
                let (parent, name, id, owner) = made(from)?;
                Self::Symlink { parent, name, id, owner, target: from.blob(SYMLINK_BYTES_MAX)?.to_vec() }
            }
            4 => {
                let (parent, name, id, owner) = made(from)?;
                let kind = match from.u8()? {
                    0 => NodeKind::Fifo,
                    1 => NodeKind::Socket,
                    _ => return Err(DecodeError::Bad { what: "kind of node" }),
                };
                Self::Mknod { parent, name, id, owner, kind }
            }
            5 => Self::Link { id: file(from)?, parent: file(from)?, name: FileName::decode(from)? },
            6 => Self::Unlink { parent: file(from)?, name: FileName::decode(from)?, id: file(from)? },
            7 => Self::Rmdir { parent: file(from)?, name: FileName::decode(from)?, id: file(from)? },
            8 => Self::Rename {
                parent: file(from)?,
                name: FileName::decode(from)?,
                id: file(from)?,
                new_parent: file(from)?,
                new_name: FileName::decode(from)?,
                over: from.option(file)?,
                mode: match from.u8()? {
                    0 => RenameMode::Replace,
                    1 => RenameMode::NoReplace,
                    2 => RenameMode::Exchange,
                    _ => return Err(DecodeError::Bad { what: "mode of a rename" }),
                },
            },
            9 => {
                let time = |from: &mut Reader<'_>| {
                    let time = FileTime { seconds: from.i64()?, nanos: from.u32()? };
                    if time.nanos < 1_000_000_000 { Ok(time) } else { Err(DecodeError::Bad { what: "time" }) }
                };
                let id = file(from)?;
                let attrs = Attrs {
                    mode: from.option(decode_mode)?,
                    uid: from.option(Reader::u32)?,
                    gid: from.option(Reader::u32)?,
                    size: from.option(decode_size)?,
                    atime: from.option(time)?,
                    mtime: from.option(time)?,
                };
                Self::SetAttr { id, attrs }
            }
            10 => Self::SetXattr {
                id: file(from)?,
                name: decode_xattr_name(from)?,
                value: from.blob(XATTR_BYTES_MAX)?.to_vec(),
                mode: match from.u8()? {
                    0 => XattrMode::Set,
                    1 => XattrMode::Create,
                    2 => XattrMode::Replace,
                    _ => return Err(DecodeError::Bad { what: "mode of an attribute" }),
                },
            },
            11 => Self::RemoveXattr { id: file(from)?, name: decode_xattr_name(from)? },
            _ => return Err(DecodeError::Bad { what: "namespace operation" }),
        })
    }
}

/// A name of an attribute that is shared: 1 to 255 bytes, no zero.
fn decode_xattr_name(from: &mut Reader<'_>) -> Result<Vec<u8>, DecodeError> {
    let name = from.blob(XATTR_NAME_BYTES_MAX)?;
    if name.is_empty() || name.contains(&0) || !xattr_is_shared(name) {
        return Err(DecodeError::Bad { what: "name of an attribute" });
    }
    Ok(name.to_vec())
}
