//! A FUSE file system over /dev/fuse, served by one thread on its ring.
//!
//! Decides: what the kernel is told at INIT and at open; which requests need no answer from above. Holds: the
//! connection, whether it has more to read. Keeps out: files, replication, when a request is answered.
//! Invariant: what the kernel hands in is checked before anybody sees it, and each request with a `Ticket` is
//! answered by it once.
//!
//! ```text
//! loop: ring.wait ── polled() ──> next() until Empty or NoSlot ── arm() ──> ring.wait
//! ```
//! Why /dev/fuse, why one poll and then read(2), why these flags: measured (ARCHITECTURE.md).
mod abi;
mod connection;
mod decode;
#[cfg(test)]
mod decode_tests;
mod mount;
mod reply;
mod request;

pub use connection::{Event, Fuse, Kernel};
pub use mount::{
    Life, MountError, Options, UnmountError, abort, clear_dead, detach, life, standing, unmount, unmount_aside,
};
pub use reply::{Attr, Directory, Entry, FileSystem, Listed, Reply, Timestamp};
pub use request::{Caller, Forget, Operation, Request, SetAttr, SetTime, Ticket};
