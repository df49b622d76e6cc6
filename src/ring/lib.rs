//! One io_uring and the buffers that its requests own: the only way in which the data thread reads, writes and waits.
//!
//! Decides: when to submit, to spin and to sleep. Holds: every request in flight together with its memory and its
//! descriptor. Keeps out: what the bytes mean, replication, errors' consequences.
//! Invariant: memory that the kernel may touch belongs to the request's entry here until its completion was reaped; what
//! has not ended when the ring is dropped is leaked, never freed.
mod memory;
mod pool;
mod ring;
mod slab;
#[cfg(test)]
mod tests;
mod wake;

pub use memory::{Memory, Room};
pub use pool::{HEAD_BYTES, PAYLOAD_BYTES, Pool, Shared, Slot};
pub use ring::{Completion, OpId, Ring, RingError};
pub use wake::Waker;

/// A descriptor that stays open as long as a request on it is in flight.
pub type Descriptor = std::rc::Rc<std::os::fd::OwnedFd>;
