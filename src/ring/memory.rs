//! What a request may read from or write to: values that own their bytes, at an address that does not move with them.
use crate::pool::{Shared, Slot};
use std::ops::Range;

/// Memory of a request. Comes back with its completion.
#[derive(Debug)]
pub enum Memory {
    /// A slot of a pool; ranges count from its payload.
    Slot(Slot),
    /// A slot that others read too.
    Shared(Shared),
    /// Bytes on the heap; ranges count from the first of its `len`.
    Bytes(Vec<u8>),
}

/// Memory that the kernel may write to: nobody else can have a reference to it.
pub trait Room: Into<Memory> + sealed::Sealed {}
impl Room for Slot {}
impl Room for Vec<u8> {}

mod sealed {
    pub trait Sealed {}
    impl Sealed for super::Slot {}
    impl Sealed for Vec<u8> {}
}

impl Memory {
    /// The bytes that a range counts in.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        match self {
            Self::Slot(slot) => slot.payload(),
            Self::Shared(shared) => shared.payload(),
            Self::Bytes(bytes) => bytes,
        }
    }
    /// The slot, if it is one with one owner.
    #[must_use]
    pub fn into_slot(self) -> Option<Slot> {
        match self {
            Self::Slot(slot) => Some(slot),
            Self::Shared(_) | Self::Bytes(_) => None,
        }
    }
    /// The bytes on the heap, if it is those.
    #[must_use]
    pub fn into_bytes(self) -> Option<Vec<u8>> {
        match self {
            Self::Bytes(bytes) => Some(bytes),
            Self::Slot(_) | Self::Shared(_) => None,
        }
    }
    /// Where `range` lies, to be read by the kernel.
    pub(crate) fn source(&self, range: Range<usize>) -> (*const u8, u32) {
        let bytes = &self.bytes()[range];
        (bytes.as_ptr(), length(bytes.len()))
    }
    /// Where `range` lies, to be written by the kernel. Made from a `Room`, so it is not `Shared`.
    pub(crate) fn target(&mut self, range: Range<usize>) -> (*mut u8, u32) {
        let _ = &self.bytes()[range.clone()]; // panics here rather than in the kernel where it does not fit
        let start = match self {
            Self::Slot(slot) => slot.payload_ptr(),
            Self::Bytes(bytes) => bytes.as_mut_ptr(),
            Self::Shared(_) => unreachable!("`Room` leaves shared memory out"),
        };
        (start.wrapping_add(range.start), length(range.len()))
    }
}

fn length(bytes: usize) -> u32 {
    u32::try_from(bytes).expect("requests stay below 4 GiB")
}

impl From<Slot> for Memory {
    fn from(slot: Slot) -> Self {
        Self::Slot(slot)
    }
}
impl From<Shared> for Memory {
    fn from(shared: Shared) -> Self {
        Self::Shared(shared)
    }
}
impl From<Vec<u8>> for Memory {
    fn from(bytes: Vec<u8>) -> Self {
        Self::Bytes(bytes)
    }
}
