//! What the control plane (tokio: module machine, arbiter, VM) and the data thread (ring: mount, disk, peer link) of one
//! module process say to each other. They share nothing else but the lease's end.
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use vmtwin_core::ids::{NodeName, RecordId, ReplicaId};
use vmtwin_core::record::Record;
use vmtwin_core::replica::effect::VerifyEnd;
use vmtwin_core::resync::verify::Progress as VerifyProgress;
use vmtwin_core::time::Time;

/// Until when the holder may go on, on CLOCK_BOOTTIME: the one thing that both threads share. The control plane moves it on
/// with each majority of grants; the data thread looks at it before it admits or answers, so a control plane that hangs
/// lets it run out by itself.
#[derive(Debug, Default)]
pub struct Lease(AtomicU64);

impl Lease {
    /// Moves the end. Zero: no lease.
    pub fn set(&self, until: Time) {
        self.0.store(until.0, Ordering::Release);
    }
    /// Its end.
    pub fn until(&self) -> Time {
        Time(self.0.load(Ordering::Acquire))
    }
}

/// A change of the record that the data path needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// R3: the peer is to be out before anything is acknowledged without it.
    DropPeer,
    /// R5: this replica is equal and flushed; from now on both answers count until the outcome is known (R9).
    JoinPeer(ReplicaId),
}

/// A word from one module process's control plane to the other's, as one frame on the peer link. Best effort: it goes with
/// the session's frames, it is not repeated, and nothing that keeps data right rests on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Word {
    /// The module stops on both nodes (ordered, or the VM was shut down): take nothing over; end when the link ends.
    Stop,
    /// The stop was given up: be the replica again.
    StopUndone,
    /// The VM crashed too often on the node that says so, and comes over: do not hand it back for the same reason.
    Crashes,
}

impl Word {
    /// Its byte in the frame.
    #[must_use]
    pub fn code(self) -> u8 {
        match self {
            Self::Stop => 1,
            Self::StopUndone => 2,
            Self::Crashes => 3,
        }
    }
    /// From its byte; unknown ones are ignored by the reader (a newer peer's).
    #[must_use]
    pub fn from_code(code: u8) -> Option<Self> {
        [Self::Stop, Self::StopUndone, Self::Crashes].into_iter().find(|w| w.code() == code)
    }
}

/// Orders to the data thread.
#[derive(Debug)]
pub enum ToData {
    /// Say this to the peer's control plane, if a session stands.
    Tell(Word),
    /// A record that is known (PROTOCOL.md, section 1). Decides the role: holder, follower or target.
    Record(Record),
    /// The change proposed with this record id is known not to have happened (R9).
    NotLanded(RecordId),
    /// The proposal of the last `Propose` was named so.
    Proposed(Change, RecordId),
    /// The lease was moved on after it had run out: look again.
    LeaseRenewed,
    /// A socket to the peer's module process, TLS handshake done.
    Link(PeerSocket),
    /// R7: end all sessions, let every older request end, admit nothing; then say `Drained` with this number.
    Drain(u64),
    /// The drain's cause is over (the proposal did not land): admit again by record and lease.
    Undrain,
    /// Hold all new writers, flush both sides; then say `Quiesced`.
    Quiesce(u64),
    /// Go on after a `Quiesce`.
    Unquiesce,
    /// The VM's process is being killed: answer what is held with an error so that it can die, until the next `Record` or
    /// `Undrain`.
    FailHeld,
    /// Compare both replicas while they are in sync. Answered by `VerifyRefused`, or progress and one `Verified`.
    Verify {
        /// Bytes a second on each side, at most.
        rate: u64,
        /// What differs is overwritten on the peer.
        repair: bool,
    },
    /// Unmount, close, end. Answered by `Ended`.
    End,
}

/// A connection to the peer's module process.
#[derive(Debug)]
pub struct PeerSocket {
    /// The TCP socket, in blocking mode as the handshake left it.
    pub socket: OwnedFd,
    /// Whom the certificate names.
    pub peer: NodeName,
    /// Dialed by us: of two crossing connections the one dialed by the smaller node name stays.
    pub dialed: bool,
    /// The TLS state after the handshake, with what it has buffered; `None` where the link is in the clear.
    pub tls: Option<Box<rustls::Connection>>,
}

/// News from the data thread.
#[derive(Clone, Debug, PartialEq)]
pub enum FromData {
    /// Metadata read, directory mounted.
    Ready(Opened),
    /// It cannot: mount, directory or metadata. The process ends with this sentence.
    Failed(String),
    /// A session with the peer stands.
    PeerUp(PeerUp),
    /// No session; why, in words.
    PeerDown(String),
    /// The peer says it knows this record and it is not ours: read the register.
    OtherRecord(Record),
    /// The holder named this record in the session: it is known here now.
    Adopted(Record),
    /// The last ordered record of this id is durable here and decides the role: a holder's files can be opened for writing.
    InForce(RecordId),
    /// A line for the operator's log.
    Say(String),
    /// The peer's control plane said this.
    Told(Word),
    /// A change of the record is needed; answer with `Proposed`, then `Record` or `NotLanded`.
    Propose(Change),
    /// Progress of a resync; one at most each 200 ms.
    Resync(ResyncProgress),
    /// The verification was not begun; why.
    VerifyRefused(&'static str),
    /// It began, or got on; one at most each 200 ms.
    Verify(VerifyProgress),
    /// It has ended.
    Verified(VerifyEnd),
    /// This node's disk failed: the replica is erred (R3), a durable mark. No I/O is acknowledged on it any more.
    Erred(String),
    /// All older requests have ended.
    Drained(u64),
    /// Writers are held and what was acknowledged is flushed; `both`: on the peer, too, and it is in sync.
    Quiesced {
        /// The order's number.
        token: u64,
        /// Whether the peer flushed too.
        both: bool,
    },
    /// I/O is held because the lease ended; or goes on.
    Held(bool),
    /// Unmounted and closed; the thread ends.
    Ended(Result<(), String>),
    /// Figures, each second while there is a mount.
    Figures(Figures),
}

/// What was found when the replica was opened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Opened {
    /// This replica.
    pub replica: ReplicaId,
    /// The last record that was stored here.
    pub record: Option<Record>,
    /// R4: the host went down without a clean stop.
    pub broken: bool,
    /// R3: it once failed.
    pub erred: bool,
    /// The directory was restored, its metadata lost, or a file was changed while stopped: compare all.
    pub suspect_all: bool,
}

/// The peer, as its hello says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerUp {
    /// Its replica.
    pub replica: ReplicaId,
    /// R4.
    pub broken: bool,
    /// R3.
    pub erred: bool,
    /// The record it knows.
    pub record: Option<Record>,
}

/// How far a resync is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ResyncProgress {
    /// Bytes to look at.
    pub bytes_total: u64,
    /// Bytes looked at.
    pub bytes_done: u64,
    /// Bytes that travelled.
    pub bytes_sent: u64,
    /// Equal and flushed; the join is asked for.
    pub finished: bool,
}

/// Counters since the process began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Figures {
    /// Guest reads.
    pub reads: u64,
    /// Guest writes.
    pub writes: u64,
    /// Guest flushes.
    pub flushes: u64,
    /// Bytes read.
    pub read_bytes: u64,
    /// Bytes written.
    pub written_bytes: u64,
    /// Requests in hand.
    pub in_hand: u64,
    /// Bytes that the peer has not got.
    pub dirty_bytes: u64,
}
