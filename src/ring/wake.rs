//! Wakes the ring's thread from any other one: an eventfd with a read of the ring always pending on it.
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{FromRawFd, OwnedFd};
use std::sync::Arc;

/// Wakes the ring that it came from. First put the message where the ring's thread looks, then wake: it looks after each
/// return of `Ring::wait`, so no message is overslept.
#[derive(Clone, Debug)]
pub struct Waker(Arc<File>);

impl Waker {
    /// A waker, and the end for the ring to read from.
    pub(crate) fn new() -> io::Result<(Self, OwnedFd)> {
        // Blocking: the ring answers EAGAIN for a read on a non-blocking descriptor instead of waiting.
        // SAFETY: takes no pointers; the result is checked.
        let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: `fd` was just made and nobody else owns it.
        let file = unsafe { File::from_raw_fd(fd) };
        let end = OwnedFd::from(file.try_clone()?);
        Ok((Self(Arc::new(file)), end))
    }

    /// Makes the ring's current or next `wait` return.
    pub fn wake(&self) {
        // It cannot fail while the descriptor is open, nor block before 2^64 - 2 wakes were not read.
        let _ = (&*self.0).write(&1u64.to_ne_bytes());
    }
}
