//! Requests as types: what is in them was checked (see `decode`).
use vmtwin_core::ids::FileId;
use vmtwin_ring::Slot;

/// What answers one request, once. Dropped without an answer, the caller waits until the file system is unmounted.
#[derive(Debug)]
#[must_use = "a request without an answer leaves its caller waiting"]
pub struct Ticket {
    pub(super) unique: u64,
    pub(super) op: u32,
    /// Bytes that the answer may have behind its header.
    pub(super) room: u32,
}

impl Ticket {
    /// Names the request, as `Event::Interrupt` does.
    #[must_use]
    pub fn id(&self) -> u64 {
        self.unique
    }
}

/// Who asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Caller {
    /// File system user; a new file is theirs.
    pub uid: u32,
    /// File system group.
    pub gid: u32,
    /// Process (thread), 0 if it has none here.
    pub pid: u32,
}

/// A request that waits for an answer.
#[derive(Debug)]
pub struct Request {
    /// To answer it by.
    pub ticket: Ticket,
    /// The file or directory concerned.
    pub node: FileId,
    /// Who asks.
    pub caller: Caller,
    /// What is asked.
    pub operation: Operation,
}

/// The kernel has dropped `count` of its references to a file's id, which it got by answers with an `Entry`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Forget {
    /// The file.
    pub node: FileId,
    /// How many.
    pub count: u64,
}

/// What is asked. Names are 1 to 255 bytes without `/` and NUL, never `.` or `..`; a range of bytes ends at `i64::MAX` at
/// most; `handle` is what the answer to open gave. Beside each stands the answer that it takes (or `Reply::Error`).
#[derive(Debug)]
#[allow(missing_docs)] // fields are the system calls' own
pub enum Operation {
    /// `Entry`. In the directory `node`.
    Lookup { name: Vec<u8> },
    /// `Attr`.
    GetAttr { handle: Option<u64> },
    /// `Attr`.
    SetAttr(SetAttr),
    /// `Data`: the target.
    ReadLink,
    /// `Entry`.
    Symlink { name: Vec<u8>, target: Vec<u8> },
    /// `Entry`. Regular files too; the umask was applied. `rdev`: as the kernel's new_encode_dev.
    MkNod { name: Vec<u8>, mode: u32, rdev: u32 },
    /// `Entry`. The umask was applied.
    MkDir { name: Vec<u8>, mode: u32 },
    /// `Done`.
    Unlink { name: Vec<u8> },
    /// `Done`.
    RmDir { name: Vec<u8> },
    /// `Done`. `flags`: those of renameat2(2): none, NOREPLACE, EXCHANGE or WHITEOUT.
    Rename { name: Vec<u8>, new_parent: FileId, new_name: Vec<u8>, flags: u32 },
    /// `Entry`. A new name, in `node`, for `file`.
    Link { file: FileId, name: Vec<u8> },
    /// `Opened`. `flags`: of open(2), without O_CREAT, O_EXCL, O_NOCTTY and O_TRUNC (a `SetAttr` follows for that).
    Open { flags: u32 },
    /// `Created`. The umask was applied.
    Create { name: Vec<u8>, flags: u32, mode: u32 },
    /// `Data`, fewer bytes at the file's end only. At most 1 MiB.
    Read { handle: u64, offset: u64, size: u32 },
    /// `Written`. The bytes are `slot.payload()[..size]`, page-aligned; at most 1 MiB. `offset` counts even for O_APPEND.
    Write { handle: u64, offset: u64, size: u32, slot: Slot },
    /// `FileSystem`.
    StatFs,
    /// `Done`. The last descriptor of this open was closed; nobody waits for it.
    Release { handle: u64, flags: u32 },
    /// `Done`.
    FSync { handle: u64, data_only: bool },
    /// `Done`. `flags`: XATTR_CREATE, XATTR_REPLACE.
    SetXattr { name: Vec<u8>, value: Vec<u8>, flags: u32 },
    /// `Data`, or `XattrSize` where `size` is 0; ERANGE if it does not fit.
    GetXattr { name: Vec<u8>, size: u32 },
    /// `Data`: the names, each with a NUL behind it; or `XattrSize` where `size` is 0; ERANGE if they do not fit.
    ListXattr { size: u32 },
    /// `Done`.
    RemoveXattr { name: Vec<u8> },
    /// `Opened`.
    OpenDir { flags: u32 },
    /// `Directory` of at most `size` bytes, from `offset`: 0, or the `next` of an entry given before. Empty: the end.
    /// `plus`: each entry but `.` and `..` comes with an `Entry`, which counts as looked up.
    ReadDir { handle: u64, offset: u64, size: u32, plus: bool },
    /// `Done`.
    ReleaseDir { handle: u64 },
    /// `Done`.
    FSyncDir { handle: u64, data_only: bool },
    /// `Done`. `mode`: of fallocate(2); only the bits KEEP_SIZE, PUNCH_HOLE and ZERO_RANGE. `length` is not 0.
    FAllocate { handle: u64, offset: u64, length: u64, mode: u32 },
    /// `Sought`. Only SEEK_DATA (3) and SEEK_HOLE (4) come here.
    LSeek { handle: u64, offset: u64, whence: u32 },
}

/// Attributes to set; those that are `None` stay.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SetAttr {
    /// The open file that it came by, for a truncation by descriptor.
    pub handle: Option<u64>,
    /// Permission bits (the type is in it too and does not change).
    pub mode: Option<u32>,
    /// Owner.
    pub uid: Option<u32>,
    /// Group.
    pub gid: Option<u32>,
    /// Size in bytes.
    pub size: Option<u64>,
    /// Last read.
    pub atime: Option<SetTime>,
    /// Last write.
    pub mtime: Option<SetTime>,
}

/// A time to set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SetTime {
    /// The server's clock.
    Now,
    /// This one.
    At(super::Timestamp),
}
