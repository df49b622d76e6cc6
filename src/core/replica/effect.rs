//! What the replica machine orders. The shell carries effects out in their order; what takes time it starts in that order
//! and reports back by the event that the effect names.
use super::event::{Errno, Job, OpId, RangeKind};
use crate::ids::FileId;
use crate::record::Record;
use crate::resync::Side;
use crate::resync::verify::{self, Verdict};
use crate::wire::frame::Header;
use crate::wire::message::Hello;

/// A piece of work for this node's disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// Write the job's payload.
    Write {
        /// Into which file.
        file: FileId,
        /// At which byte.
        offset: u64,
        /// Bytes.
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
        /// How many.
        length: u64,
    },
    /// fdatasync of the file; `None`: of every file that was written, and the tree's folders.
    Flush {
        /// Which.
        file: Option<FileId>,
    },
    /// The namespace operation that is the job's payload.
    Namespace,
    /// Read into the job's payload; answers `Value::Read`. A file that is not there reads as empty.
    Read {
        /// From which file.
        file: FileId,
        /// From which byte.
        offset: u64,
        /// At most this many.
        length: u32,
    },
    /// Hash each `unit` of the range; answers `Value::Hashes`. A file that is not there has none.
    Hash {
        /// Of which file.
        file: FileId,
        /// From which byte; a multiple of `unit`.
        offset: u64,
        /// How many; a multiple of `unit`.
        length: u32,
        /// `BLOCK_BYTES` or `PAGE_BYTES`.
        unit: u32,
    },
    /// Where the file has data; answers `Value::Data`. A file that is not there has none.
    Data {
        /// Which file.
        file: FileId,
        /// From which byte.
        from: u64,
        /// How far.
        length: u64,
    },
    /// List the whole tree; answers `Value::Tree`.
    Tree,
}

/// What follows a frame's header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Payload {
    /// Nothing.
    None,
    /// These bytes.
    Bytes(Vec<u8>),
    /// The payload of this job.
    Of(Job),
}

/// A change of the record that is needed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// R3: the peer is to be out before anything is acknowledged without it.
    DropPeer,
    /// R5: the peer is equal and has flushed; from now on both answers count until the outcome is known.
    JoinPeer,
}

/// Durable marks of this replica (R3, R4).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Marks {
    /// Its host went down without a clean stop.
    pub broken: bool,
    /// It once failed.
    pub erred: bool,
    /// Everything is suspect until the next join.
    pub suspect_all: bool,
}

/// How far a resync is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Bytes to look at.
    pub bytes_total: u64,
    /// Bytes looked at.
    pub bytes_done: u64,
    /// Bytes that travelled.
    pub bytes_sent: u64,
    /// Equal and flushed; the join is asked for.
    pub finished: bool,
}

/// How a verification ended.
#[derive(Clone, Debug, PartialEq)]
pub enum VerifyEnd {
    /// Everything was looked at.
    Done {
        /// What came of it.
        verdict: Verdict,
        /// The peer is being dropped and gets this node's copy.
        repaired: bool,
    },
    /// The session ended before.
    Cut(&'static str),
    /// This side's directory cannot be listed, or a file's holes not be found.
    Broke(Side, Errno),
}

/// Orders of the replica machine.
#[derive(Clone, Debug, PartialEq)]
pub enum Effect {
    /// Begin this job; answer `Event::Done`. Jobs run in parallel, in any order.
    Local {
        /// Its name.
        job: Job,
        /// What.
        work: Work,
    },
    /// Send a frame on the link: fill in the payload, `Header::seal`, send. Frames keep their order.
    Send {
        /// Its header.
        header: Header,
        /// What follows it.
        payload: Payload,
    },
    /// Send a hello (session 0, sequence 0) on the link.
    SendHello(Hello),
    /// Answer the guest. Its payload may still be needed.
    Complete {
        /// Which.
        op: OpId,
        /// With which errno, if not well.
        result: Result<(), Errno>,
    },
    /// This job's payload is needed no more, beside what was ordered before: a `Local` and a `Send` keep it until they
    /// ended.
    Release {
        /// Whose.
        job: Job,
    },
    /// Write these bytes into the log's file at this offset and make them durable; answer `LogSaved`.
    SaveLog {
        /// Its number.
        transaction: u64,
        /// Where.
        offset: u64,
        /// What.
        bytes: Vec<u8>,
    },
    /// Replace the map's file by these bytes, atomically and durably; answer `MapSaved`. One at a time.
    SaveMap {
        /// Its number.
        version: u64,
        /// What.
        bytes: Vec<u8>,
    },
    /// Make these marks durable; answer `MarksSaved`. One at a time.
    SaveMarks(Marks),
    /// A change of the record is needed; answer `Record` or `NotLanded`, however long it takes. One at a time.
    Propose(Change),
    /// Close the link, for this reason. Frames ordered before may go out. `Disconnected` comes as the answer.
    EndLink(&'static str),
    /// A session with the peer stands; this is what it said.
    SessionUp(Hello),
    /// It has ended.
    SessionDown(&'static str),
    /// The peer knows this record, and it is not ours: read the register.
    OtherRecord(Record),
    /// The holder named this new record in the session (R7): it is known here now. Keep it.
    Adopted(Record),
    /// All jobs have ended, and none begins.
    Drained(u64),
    /// The guest is held, nothing is in flight and all is flushed; `both`: on the peer too, which is in sync.
    Quiesced {
        /// The order's number.
        token: u64,
        /// See above.
        both: bool,
    },
    /// This node's disk failed with this errno and the mark is durable: the holder gives up its lease, the peer takes over.
    Erred(Errno),
    /// The last replica's disk failed (R3): I/O is held, red; a restart goes on by R4.
    Stuck(Errno),
    /// A line for the operator's log.
    Say(String),
    /// Progress of the resync, on each change.
    Progress(Progress),
    /// The verification was not begun.
    VerifyRefused(&'static str),
    /// It began; later: its progress, on each change.
    VerifyProgress(verify::Progress),
    /// It has ended.
    Verified(VerifyEnd),
}
