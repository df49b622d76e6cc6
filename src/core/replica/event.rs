//! What the shell tells the replica machine, and the words that events and effects share.
//!
//! Payload never comes in here. It stays in the shell, keyed by the `Job` that it belongs to: a guest's write by the
//! guest's job, what a peer's `Write` or `Namespace` frame brought by the peer's job, what a resync read by the copy's.
use crate::ids::{FileId, Sequence, SessionId};
pub use crate::namespace::Errno;
use crate::record::Record;
use crate::resync::Data;
use crate::wire::frame::Header;
use crate::wire::message::Hello;

/// A guest's request; the shell numbers them, never twice in one process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct OpId(pub u64);

/// A piece of work of this node's disk, by which its payload and its end are known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Job {
    /// For the guest.
    Guest(OpId),
    /// What the peer's frame asked for.
    Peer(SessionId, Sequence),
    /// Of this machine itself (flush, read, hash, tree), by its own numbers.
    Own(u64),
}

/// Whether an errno says that this node's disk, not the request, is at fault: EIO, ENXIO, EBADF, ENODEV, ENOSPC, EROFS,
/// EUCLEAN, EDQUOT.
#[must_use]
pub fn is_disk_fault(errno: Errno) -> bool {
    matches!(errno.0, 5 | 6 | 9 | 19 | 28 | 30 | 117 | 122)
}

/// Operations on a range that bring no data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum RangeKind {
    /// Zeros from a hole; the size stays.
    Punch,
    /// Zeros.
    Zero {
        /// The size stays even where the range ends beyond it.
        keep_size: bool,
    },
    /// Room, without change of content.
    Allocate {
        /// As above.
        keep_size: bool,
    },
}

impl RangeKind {
    /// As a frame's flags.
    #[must_use]
    pub fn flags(self) -> u16 {
        match self {
            Self::Punch => 0,
            Self::Zero { keep_size } => 1 | u16::from(keep_size) << 8,
            Self::Allocate { keep_size } => 2 | u16::from(keep_size) << 8,
        }
    }
    /// From a frame's flags.
    #[must_use]
    pub fn of_flags(flags: u16) -> Option<Self> {
        let keep_size = flags & 256 != 0;
        match flags & !256 {
            0 if !keep_size => Some(Self::Punch),
            1 => Some(Self::Zero { keep_size }),
            2 => Some(Self::Allocate { keep_size }),
            _ => None,
        }
    }
}

/// A change of a file's size by a namespace operation (truncate, open with O_TRUNC).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Resize {
    /// Which file.
    pub file: FileId,
    /// Its size before, in bytes.
    pub from: u64,
    /// And after.
    pub to: u64,
}

/// What a guest asks for that changes or flushes. Reads do not come in: see `Replica::gate`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// Write the payload of this job.
    Write {
        /// Into which file.
        file: FileId,
        /// At which byte.
        offset: u64,
        /// Bytes; 1 to `PAYLOAD_BYTES_MAX`.
        length: u32,
    },
    /// A ranged operation.
    Range {
        /// On which file.
        file: FileId,
        /// Which.
        kind: RangeKind,
        /// From which byte.
        offset: u64,
        /// How many; at least 1.
        length: u64,
    },
    /// Make durable what was acknowledged of this file; `None`: of all files, and the tree.
    Flush {
        /// Which file.
        file: Option<FileId>,
    },
    /// A namespace operation; its bytes are the payload of this job. It runs alone among namespace operations, and as a
    /// barrier for the files that it names: after all before it that touch them, before all after.
    Namespace {
        /// Files concerned; 0 fills up. Directories need not be named.
        files: [FileId; 4],
        /// Where it changes a size.
        resize: Option<Resize>,
    },
}

/// What a job of this node's disk gave, beside what stays in the shell as its payload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Value {
    /// It is done.
    Nothing,
    /// Of `Work::Read`: this many bytes are the job's payload (fewer than asked at the end of the file, 0 beyond).
    Read {
        /// Bytes.
        length: u32,
        /// All of them zero: a hole is sent instead.
        zeros: bool,
    },
    /// Of `Work::Hash`: one per unit, in order; a part unit at the end of the file is filled up with zeros, none beyond.
    Hashes(Vec<[u8; 32]>),
    /// Of `Work::Data`.
    Data(Data),
    /// Of `Work::Tree`: `namespace::Tree::pieces`.
    Tree(Vec<Vec<u8>>),
}

/// News for the replica machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A record that is known (PROTOCOL.md, section 1). It ends an unknown outcome and a drain, and decides the role.
    Record(Record),
    /// The change that was proposed is known not to have happened (R9).
    NotLanded,
    /// The gate: whether the lease of the holder is live now. The shell looks at the clock before each batch of events and
    /// tells changes.
    Lease(bool),
    /// The VM is being killed: answer all that the guest waits for with EIO, and what comes, until the next `Record` or
    /// `Undrain`.
    FailHeld,
    /// R7: end the session, admit nothing, let all jobs end; then `Drained` with this number.
    Drain(u64),
    /// The drain's cause is over without a new record.
    Undrain,
    /// Hold what changes, let all in flight end, flush both sides; then `Quiesced` with this number.
    Quiesce(u64),
    /// Go on after it.
    Unquiesce,
    /// The guest asks. Answered by one `Complete`; its payload is needed until `Release`.
    Guest {
        /// The request's number.
        op: OpId,
        /// What it wants.
        request: Request,
    },
    /// A job of `Effect::Local` has ended.
    Done {
        /// Which.
        job: Job,
        /// How.
        result: Result<Value, Errno>,
    },
    /// A guest's read failed with a fault of this disk. See `Replica::gate`.
    ReadFailed(Errno),
    /// The bytes of `Effect::SaveLog` are durable, in the order in which they were given.
    LogSaved {
        /// Its number.
        transaction: u64,
    },
    /// The bytes of `Effect::SaveMap` are durable.
    MapSaved {
        /// Its number.
        version: u64,
    },
    /// The marks of `Effect::SaveMarks` are durable.
    MarksSaved,
    /// A new link stands (an older one is gone for good); nothing went over it yet. The machine says hello.
    Connected {
        /// A number that this side never used before (random).
        nonce: u64,
    },
    /// The link is gone. Nothing that it brought comes in any more.
    Disconnected,
    /// The peer's hello, decoded by the shell (which checks cluster, module and protocol).
    Hello(Hello),
    /// Any other frame, its checksums checked. The payload of `Write` and `Namespace` stays in the shell under
    /// `Job::Peer(session, sequence)` until `Release`; `body` is that of all other kinds.
    Frame {
        /// Its header.
        header: Header,
        /// Its payload, if not kept.
        body: Vec<u8>,
    },
    /// Compare both replicas while they are in sync. Answered by one `Verified`, or `VerifyRefused` at once.
    Verify {
        /// Bytes a second on each side, at most.
        rate: u64,
        /// What differs is overwritten by this node's copy.
        repair: bool,
    },
    /// Time went on. At least every 100 ms.
    Tick,
}
