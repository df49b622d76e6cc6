//! What the module machine is told and what it orders. Plain values; the engine routes them.
use crate::ids::{RecordId, ReplicaId};
use crate::record::Record;
use crate::time::Time;
use std::time::Duration;

/// The peer, as its hello says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Its replica.
    pub replica: ReplicaId,
    /// R4: its host went down without a clean stop.
    pub broken: bool,
    /// R3: its disk once failed.
    pub erred: bool,
}

/// How far a resync is, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// To look at.
    pub total: u64,
    /// Looked at.
    pub done: u64,
}

/// A word between the two control planes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Word {
    /// The module stops on both nodes.
    Stop,
    /// It does not, after all.
    StopUndone,
    /// The VM crashed too often here: whoever gets it now does not give it back for the same reason.
    Crashes,
}

/// A change of the in-sync set that the data path needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// R3.
    DropPeer,
    /// R5.
    JoinPeer(ReplicaId),
}

/// Why a VM ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VmEnd {
    /// Powered off from inside.
    GuestShutdown,
    /// Its process got SIGTERM.
    HostShutdown,
    /// It ended, however, while its host was going down.
    HostStops,
    /// Destroyed by hand.
    Destroyed,
    /// Its process died, or the guest panicked.
    Crashed,
}

/// A call to the hypervisor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VmCall {
    /// Make sure that none runs; and the confirmation of a kill.
    Clear,
    /// Define, ahead of a start.
    Define,
    /// Define and start.
    Start,
    /// Power off, then destroy.
    Shutdown,
    /// Stop its CPUs.
    Pause,
    /// Let them go on.
    Resume,
}

/// News of the VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VmNews {
    /// It is off: the answer to `Clear`, `Kill` and `Shutdown`. True: by itself.
    Off {
        /// The guest did it; false: it was destroyed, or had been off.
        by_itself: bool,
    },
    /// The start call goes out now.
    StartCalled,
    /// Its CPUs run.
    Running,
    /// Its CPUs stand.
    Paused {
        /// For an I/O error.
        io_error: bool,
    },
    /// It rebooted from inside.
    Rebooted,
    /// It ended, unordered.
    Ended(VmEnd),
    /// SIGKILL was sent, or there is no process.
    Dying,
    /// A call failed.
    Failed {
        /// Which.
        call: VmCall,
        /// The hypervisor's words.
        why: String,
    },
    /// The hypervisor's daemon answers, or not.
    Contact(bool),
}

/// Orders to the thread that calls the hypervisor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VmOrder {
    /// See that none runs. Answered by `Off` or `Failed`.
    Clear,
    /// Define it from the replicated definition, so that a takeover need not wait for what the hypervisor looks up the first
    /// time (libvirt asks QEMU for its capabilities: seconds). Answered only by `Failed`.
    Define,
    /// Define it from the replicated definition and start it.
    Start,
    /// Ask the guest to power off; destroy it after this time.
    Shutdown(Duration),
    /// SIGKILL at once, past whatever call is under way (`Dying`), then see that it is gone (`Off`).
    Kill,
    /// Stop its CPUs.
    Pause,
    /// Let them go on.
    Resume,
}

/// Orders to the data thread. What needs no decision (sockets, names of proposals, the lease) the engine routes itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DataOrder {
    /// Start the thread: open the directory, mount.
    Open,
    /// A record that is known.
    Record(Record),
    /// R7. Answered by `Drained`.
    Drain(u64),
    /// Its cause is over.
    Undrain,
    /// Hold writers, flush both. Answered by `Quiesced`.
    Quiesce(u64),
    /// Go on.
    Unquiesce,
    /// The VM is being killed: its requests may fail now.
    FailHeld,
    /// Say it to the peer.
    Tell(Word),
    /// Unmount, close. Answered by `Ended`.
    End,
}

/// Orders to the arbiter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ask {
    /// Become the holder, in-sync = {me}; after a hand-over to me, the set as it was (R4, section 3).
    TakeOver,
    /// Take a release of our own back, where nobody has used it (section 3).
    TakeBack,
    /// R3.
    DropPeer,
    /// R5.
    JoinPeer(ReplicaId),
    /// Give up the lease; to one replica (hand-over), or to whom it may concern.
    Release {
        /// Who is to take over at once.
        to: Option<ReplicaId>,
    },
}

/// What an operator, the daemon or the hook asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// The process was to be started and is there: run the VM again if it was given up.
    Start,
    /// Stop the module: on both nodes, or just here.
    Stop {
        /// Both nodes. The daemons tell both processes.
        both: bool,
    },
    /// The VM to the other node: graceful stop, hand-over, start there.
    Swap,
    /// Stop and start the VM, in place.
    Restart,
    /// Start here if the record allows it.
    Prim,
    /// Be the replica here.
    Second,
}

/// Why a command was not done, with the exit code that the CLI ends with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// 1: tried and failed; 3: the state forbids it.
    pub code: u8,
    /// One sentence that says what to do.
    pub error: String,
}

/// News for the machine.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// The process began.
    Begin,
    /// A deadline (`Machine::deadline`) may have come.
    Tick,

    /// The replica is open, the directory mounted.
    Ready {
        /// This replica.
        replica: ReplicaId,
        /// R4.
        broken: bool,
        /// R3.
        erred: bool,
    },
    /// It cannot be opened.
    Failed(String),
    /// The ordered record of this id is durable and decides the data thread's role.
    InForce(RecordId),
    /// A session with the peer stands.
    PeerUp(Peer),
    /// None does; why.
    PeerDown(String),
    /// The peer's control plane said so.
    Told(Word),
    /// The data path needs another record.
    Propose(Change),
    /// How far the resync is; `None`: none is under way.
    Resync(Option<Progress>),
    /// R3: this node's disk failed.
    Erred(String),
    /// All older requests have ended.
    Drained(u64),
    /// Writers are held and all is flushed.
    Quiesced {
        /// The order's number.
        token: u64,
        /// On the peer, too.
        both: bool,
    },
    /// The data thread has closed.
    Ended(Result<(), String>),

    /// A record is known (PROTOCOL.md, section 1).
    Known {
        /// It.
        record: Record,
        /// It is the value of a proposal of this very process (R9): not just found.
        ours: bool,
    },
    /// The proposal is known not to have happened.
    NotLanded,
    /// The lease runs until then.
    Lease(Time),
    /// No holder has given a sign of life to a majority for as long as this node has to stay back (R4: a broken one longer),
    /// and some record has it in sync; or it was heard again.
    HolderSilent(bool),
    /// The holder released the lease to this replica.
    HandedOver,
    /// Acceptors that answer, and how many there are.
    Reached {
        /// Of the last round of questions.
        answering: usize,
        /// All voters.
        voters: usize,
    },

    /// News of the VM.
    Vm(VmNews),
    /// A command, with a number for the answer.
    Command(u64, Command),
    /// SIGTERM: an orderly end, so that the peer may go on.
    Terminate,
}

/// How much a note matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// A change that an operator wants in a timeline.
    Info,
    /// Should wake one.
    Warn,
    /// Something stands still.
    Error,
}

/// Steps of a takeover, stamped by the engine with the wall clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mark {
    /// The holder was taken for lost (or asked us).
    Detected,
    /// Our record is known.
    Won,
    /// The start call went out.
    StartCalled,
    /// The VM runs.
    Started,
}

/// Orders of the machine, in order.
#[derive(Clone, Debug, PartialEq)]
pub enum Effect {
    /// To the data thread.
    Data(DataOrder),
    /// To the arbiter.
    Arbiter(Ask),
    /// To the VM thread.
    Vm(VmOrder),
    /// For the event log.
    Note(Level, &'static str, String),
    /// A time to remember.
    Mark(Mark),
    /// The answer to a command.
    Answer(u64, Result<(), Refusal>),
    /// The process ends with this code.
    Exit(u8),
}
