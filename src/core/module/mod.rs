//! Decides what a module does: who may run the VM is the arbiter's, what is written where the replica's; what follows
//! for the VM, the process and the operator is decided here.
//!
//! Holds: the phase, the known record, how VM, peer and lease stand, the commands that wait for an answer. Keeps out:
//! sockets, files, libvirt, the clock. SafeKit's five states are a *view* of it (`view`).
//!
//! ```text
//! Clearing ─VM off─> Opening ─ready─> Waiting ─record known─> Following <───────────────┐
//!                                        │ held by me,            │ holder silent, or    │ not landed,
//!                                        │ process anew           │ handed over to me    │ another's record
//!                                        └────────> Draining <────┘                      │
//!                                                      │ drained ──> Proposing ──────────┤
//!                                                                      │ won             │
//!  Deposed <──another's record── Holding <─────────────────────────────┘                 │
//!     │ VM dead                     │ stop, swap, disk erred, SIGTERM                    │
//!     │                          Leaving: VM down, both flushed, released ──taken over───┤
//!     └──────────────────────────────────────────────────────────────────────────────────┘
//!                          any ──end ordered──> Ending ──closed──> Exit
//! ```
//!
//! Invariants: the VM is started only while Holding, under a live lease, by a record that this very process won (R1, R9);
//! another's record is handed to the data thread only when no VM of ours is left; nothing is proposed before the
//! drain (R7); an erred or outdated replica takes over nothing (R3, R4).
mod event;
mod state;
mod step;
#[cfg(test)]
mod tests;
mod view;

pub use event::{
    Ask, Change, Command, DataOrder, Effect, Event, Level, Mark, Peer, Progress, Refusal, VmCall, VmEnd, VmNews,
    VmOrder, Word,
};
pub use state::{EXIT_FAILED, EXIT_STOPPED, EXIT_TERMINATED, Machine, Settings};
pub use view::{Health, State, View};
