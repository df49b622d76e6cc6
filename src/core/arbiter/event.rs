//! What the arbiter is told and what it orders.
use super::message::{Answer, Request};
use crate::ids::{AcceptorId, RecordId, ReplicaId};
use crate::record::{Record, RecordName};
use crate::time::Time;

/// News for the arbiter.
#[derive(Clone, Debug)]
#[expect(clippy::large_enum_variant, reason = "an event is moved once and never kept")]
pub enum Event {
    /// Time went on; due at `Arbiter::wake` at the latest.
    Tick,
    /// An acceptor answered the question with this number.
    Answered {
        /// Whom the shell had asked.
        from: AcceptorId,
        /// Of `Effect::Ask`.
        nonce: u64,
        /// What it said.
        answer: Answer,
    },
    /// The module's own loop is alive and wants its lease: one renewal goes out for each (R1). Send it more often than
    /// RENEW_MS.
    Asked,
    /// A change of the record is wanted. A later want replaces one that is not decided yet; what the older one left behind
    /// is settled first (R9).
    Want {
        /// Random and never used before; the new record gets it as its id, and `NotLanded` names it.
        id: RecordId,
        /// Which change.
        change: Change,
    },
    /// The want is not wanted any more. Its outcome may still be `Known` or `NotLanded`.
    Withdraw,
    /// The holder serves nothing any more (drained and flushed, VM gone or paused): give the lease back. `to`: the swap's
    /// target, if both disks are flushed. Only `Change::TakeBack` takes it back.
    Release {
        /// Who may keep both in sync.
        to: Option<ReplicaId>,
    },
    /// The holder itself said, over the peer link, that it knows this record.
    Told(Record),
    /// Whether this replica is broken now: `false` once it was made equal and has flushed (R5).
    Broken(bool),
}

/// A change of the record. The caller has drained before (R7) where it says so.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Change {
    /// The module's first record, made by `protect`. Its id is the want's.
    First(Record),
    /// A holder whose process was started anew goes on under its record, if that proves unchanged (R1). Refused while
    /// broken. Drained before.
    GoOn,
    /// R4: this node becomes the holder, alone in sync; together with the old holder where that released to this node.
    /// Drained before.
    TakeOver,
    /// R3: the holder drops this replica.
    Drop(ReplicaId),
    /// R5: the holder joins this replica. Its answer is needed from before this event until the outcome is known.
    Join(ReplicaId),
    /// Swap: the outgoing node takes its release back, where nobody has used it.
    TakeBack,
}

/// Orders and news from the arbiter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Send this to that acceptor. Lost, late and repeated messages are fine.
    Ask {
        /// Whom.
        to: AcceptorId,
        /// Comes back with the answer.
        nonce: u64,
        /// What.
        request: Request,
    },
    /// This record is known (PROTOCOL.md, section 1): it decides everybody's role. Said again where a holder's own round
    /// proved it: only then does a holder get a lease.
    Known(Record),
    /// The change with this id is not in force, nor will it be: it did not land, or a newer record, said by `Known` before
    /// this, has overtaken it.
    NotLanded(RecordId),
    /// The lease's end; `Time(0)`: there is none. Moves forward, or to zero.
    Lease(Time),
    /// No acceptor of a majority has seen a sign of life of a holder for TAKEOVER_MS (longer where this node is broken),
    /// and a record that one of them holds has this replica in sync: drain and want `TakeOver`. Said once per silence, and
    /// again after each attempt that did not land.
    HolderSilent {
        /// Since when, at the latest.
        since: Time,
    },
    /// A sign of life came after `HolderSilent`.
    HolderHeard,
    /// The holder released this record to this node: want `TakeOver`, both stay in sync.
    Offered(RecordName),
    /// A majority has confirmed the release: nobody counts on this node's lease any more.
    Released(RecordName),
    /// R12: this acceptor is out until it is replaced.
    AcceptorOut {
        /// Which.
        acceptor: AcceptorId,
        /// Why.
        why: OutBecause,
    },
}

/// Why an acceptor is not believed any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum OutBecause {
    /// It answers an older change count than it did before: restored from a copy.
    WentBack,
    /// Another one answers in its place: it lost its state.
    Replaced(AcceptorId),
}
