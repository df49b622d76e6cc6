//! Decides when a guest's write may be acknowledged, and keeps two copies of a directory equal.
pub mod effect;
pub mod event;
pub mod log;
pub mod map;
pub mod overlap;

use crate::ids::{ModuleId, ReplicaId};
use effect::Marks;

/// What does not change while the process lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Config {
    /// Which module.
    pub module: ModuleId,
    /// This replica.
    pub me: ReplicaId,
    /// The other one.
    pub peer: ReplicaId,
    /// Version of the module's configuration, told to the peer.
    pub configuration: u64,
    /// A peer that holds up a write this long is dropped, in milliseconds.
    pub slow_peer_ms: u64,
    /// Durable marks, as they were found.
    pub marks: Marks,
}
