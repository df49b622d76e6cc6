//! What the resync is told and what it orders. `replica` carries it out, on this node's disk and over the session.
use crate::ids::FileId;
use crate::namespace::{Errno, Op, Outcome, Tree};
use std::ops::Range;

/// A question, order, comparison or copy of one resync; its numbers are never used twice in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct JobId(pub u64);

/// Whose answer it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// This node.
    Holder,
    /// The node that is brought up to date.
    Target,
}

/// What SEEK_DATA and SEEK_HOLE found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Data {
    /// Ranges with data, in order, not meeting; at most `RESYNC_DATA_RANGES_MAX`. Between them are holes.
    pub ranges: Vec<Range<u64>>,
    /// Up to where that holds, beyond what was asked from; `u64::MAX`: to the end of the file and beyond.
    pub until: u64,
}

/// News for the resync. Those that name a job answer the effect of that job; late ones of an older pass are dropped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// `Hold` is done.
    Held,
    /// One of the two answers to `AskTrees`.
    Tree(JobId, Side, Tree),
    /// The map as it was at `SaveMap`, or later, is durable.
    MapSaved(JobId),
    /// How the operation of `Apply` ended at the target.
    Applied(JobId, Outcome),
    /// One of the two answers to `AskData`.
    Data(JobId, Side, Data),
    /// One of the two answers to `Hash`: one per unit, in order, none for units beyond the end of the file. A part unit at
    /// the end is filled up with zeros: a guest's write further on, which makes one side longer a little before the other,
    /// does not touch the claim of these bytes.
    Hashes(JobId, Side, Vec<[u8; 32]>),
    /// The target has written what `Copy` read; this many bytes of data travelled (0: zeros, as a hole).
    Copied(JobId, u64),
    /// This node could not read what the job needs (R3: no other copy has it). What the target cannot do ends the session.
    Failed(JobId, Errno),
    /// `FlushBoth` was answered well by both sides.
    Flushed(JobId),
    /// Time went on. At least each second.
    Tick,
}

/// Orders of the resync.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Hold what the guest changes (data and names), let all that is in flight end; then `Held`. May come while it is held.
    Hold,
    /// List both trees; answer two `Tree`. The guest is held.
    AskTrees(JobId),
    /// Make the map durable as it is now, or later; answer `MapSaved`. Where its answer is waited for, the guest is held.
    SaveMap(JobId),
    /// Do this at the target; answer `Applied`. The guest is held.
    Apply(JobId, Op),
    /// Both trees are equal. From here every write, flush and namespace operation goes to both; the guest goes on.
    Mirror,
    /// Ask both sides where the file has data from this byte on, and no further than this many bytes; answer two `Data`.
    AskData {
        /// The question.
        job: JobId,
        /// Which file; one side may not have it, or a shorter one: no data there.
        file: FileId,
        /// From which byte.
        from: u64,
        /// How far.
        length: u64,
    },
    /// Hash this range on both sides, in parallel; answer two `Hashes`.
    Hash {
        /// The comparison.
        job: JobId,
        /// Which file; one side may not have it: no hashes there.
        file: FileId,
        /// From which byte, a multiple of `unit`.
        offset: u64,
        /// How many, a multiple of `unit`, at most `RESYNC_BATCH_BYTES`.
        length: u32,
        /// `BLOCK_BYTES` or `PAGE_BYTES`.
        unit: u32,
        /// Under the overlap rule, as a write of the range, from before both read until both answered (the last proof).
        /// Otherwise beside the guest's writes: what differs only for them is copied, harmlessly.
        claim: bool,
    },
    /// Under the overlap rule, as a write of the range: read it here, then write it at the target, or punch it where it is
    /// all zeros; answer `Copied` before the claim is given up.
    Copy {
        /// The copy.
        job: JobId,
        /// Which file.
        file: FileId,
        /// From which byte, a multiple of a page.
        offset: u64,
        /// How many, a multiple of a page; the file may end before.
        length: u32,
    },
    /// Flush both sides, all files: what was written before this on either is durable after it. Answer `Flushed`.
    FlushBoth(JobId),
    /// This node cannot read these bytes; they stay dirty and there is no join (R3). Say so.
    Unreadable(FileId, Range<u64>, Errno),
    /// What was copied was not equal afterwards. It is copied again. Say so: disk or memory is at fault.
    Unequal(FileId, u64),
    /// The trees cannot be made equal; for this operation's errno, if it was one. The pass starts again after
    /// `RESYNC_STALL_MS`. Say so.
    TreesDiffer(Option<Errno>),
    /// No progress for `RESYNC_STALL_MS`: the pass starts again. Say so.
    Restarted,
    /// How far it is.
    Progress(Progress),
    /// All is equal, flushed and proved: ask for the join (R5).
    Join,
}

/// How far a resync is. The total grows when more is found to be looked at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Bytes to look at.
    pub bytes_total: u64,
    /// Bytes looked at.
    pub bytes_done: u64,
    /// Bytes that travelled.
    pub bytes_sent: u64,
}
