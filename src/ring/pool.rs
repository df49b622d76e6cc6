//! Page-aligned buffers out of one lazily populated mapping.
//!
//! Decides: which slot is used next (the one used last: its pages are warm) and whose pages go back to the system.
//! Holds: the mapping, who has which slot. Keeps out: what is in it.
//! Invariant: a slot has one `Slot` or any number of `Shared`, and is in the free list only when it has neither.
use std::cell::{Cell, RefCell};
use std::fmt;
use std::io;
use std::ptr::{self, NonNull};
use std::rc::Rc;
use std::slice;

const PAGE: usize = 4096;
/// Room before a slot's payload: what precedes the data in one read from /dev/fuse.
pub const HEAD_BYTES: usize = PAGE;
/// A slot's payload: 1 MiB, and two pages more so that a range that is not aligned can be widened to pages.
pub const PAYLOAD_BYTES: usize = (1 << 20) + 2 * PAGE;
const SLOT_BYTES: usize = HEAD_BYTES + PAYLOAD_BYTES;

/// Slots for requests in hand. Only pages that were touched count: 64 bytes in a slot cost one page. Cheap to clone; all
/// clones are the same pool. The mapping ends with the last of its slots.
#[derive(Clone)]
pub struct Pool(Rc<Inner>);

struct Inner {
    base: NonNull<u8>,
    /// Per slot: how many `Slot` or `Shared` there are.
    holders: Box<[Cell<u32>]>,
    /// Per slot: it was handed out since its pages were last given back.
    used: Box<[Cell<bool>]>,
    /// A stack: at its bottom are those that were free the longest.
    free: RefCell<Vec<u32>>,
    /// The least number of free slots since the last `trim`.
    free_min: Cell<usize>,
}

impl Pool {
    /// A pool of `slots` slots of `HEAD_BYTES + PAYLOAD_BYTES`; nothing is populated yet.
    ///
    /// # Errors
    /// The system's, where it has no address space for it.
    pub fn new(slots: usize) -> io::Result<Self> {
        let count = u32::try_from(slots).map_err(|_| io::ErrorKind::InvalidInput)?;
        let bytes = slots.checked_mul(SLOT_BYTES).filter(|&n| n > 0).ok_or(io::ErrorKind::InvalidInput)?;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new private mapping at an address of the kernel's choice touches no memory of ours.
        let at = unsafe { libc::mmap(ptr::null_mut(), bytes, protection, flags, -1, 0) };
        if at == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        // A huge page would make each touched slot cost 2 MiB; a kernel without them refuses, which is as good.
        // SAFETY: the range is the mapping just made; this advice changes no content.
        unsafe { libc::madvise(at, bytes, libc::MADV_NOHUGEPAGE) };
        Ok(Self(Rc::new(Inner {
            base: NonNull::new(at.cast()).expect("mmap gives no null without MAP_FIXED"),
            holders: (0..slots).map(|_| Cell::new(0)).collect(),
            used: (0..slots).map(|_| Cell::new(false)).collect(),
            free: RefCell::new((0..count).rev().collect()),
            free_min: Cell::new(slots),
        })))
    }

    /// A free slot, with old bytes of ours in it; `None` while all are in hand.
    #[must_use]
    pub fn take(&self) -> Option<Slot> {
        let mut free = self.0.free.borrow_mut();
        let index = free.pop()?;
        self.0.free_min.set(self.0.free_min.get().min(free.len()));
        let at = index as usize;
        assert_eq!(self.0.holders[at].replace(1), 0, "a free slot has no holder");
        self.0.used[at].set(true);
        Some(Slot(Hold { pool: Rc::clone(&self.0), index }))
    }

    /// Slots that `take` could give now.
    #[must_use]
    pub fn free(&self) -> usize {
        self.0.free.borrow().len()
    }

    /// All slots.
    #[must_use]
    pub fn slots(&self) -> usize {
        self.0.holders.len()
    }

    /// Gives the pages of slots that nobody took since the last call back to the system. To be called about once a
    /// second: a load keeps its warm slots, an idle module keeps none.
    pub fn trim(&self) {
        let free = self.0.free.borrow();
        for &index in &free[..self.0.free_min.get().min(free.len())] {
            if self.0.used[index as usize].replace(false) {
                let at = self.0.start(index).cast().as_ptr();
                // SAFETY: the range is one slot of our mapping, and it is free: nobody has a reference into it, no
                // request owns it. Its pages read as zeroes from now on, which is as good as any content.
                unsafe { libc::madvise(at, SLOT_BYTES, libc::MADV_DONTNEED) };
            }
        }
        self.0.free_min.set(free.len());
    }
}

impl Inner {
    fn start(&self, index: u32) -> NonNull<u8> {
        assert!((index as usize) < self.holders.len(), "a slot of this pool");
        // SAFETY: `index` is below the number of slots, so the offset lies within the mapping, whose size was checked
        // not to overflow.
        unsafe { self.base.add(index as usize * SLOT_BYTES) }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        // SAFETY: the mapping was made with exactly this size; every `Slot` and `Shared` keeps `Inner` alive, so none
        // and no request refers to it any more.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.holders.len() * SLOT_BYTES) };
    }
}

/// One holding of a slot: gives it back with the last one.
struct Hold {
    pool: Rc<Inner>,
    index: u32,
}

impl Hold {
    fn holders(&self) -> &Cell<u32> {
        &self.pool.holders[self.index as usize]
    }
    fn start(&self) -> *mut u8 {
        self.pool.start(self.index).as_ptr()
    }
    fn all(&self) -> &[u8] {
        // SAFETY: the slot's bytes are mapped and initialised (the kernel zeroes them) as long as `self.pool` lives. A
        // `&mut` into them is only made from `&mut Slot`, which is the only holder; the kernel writes to them only while
        // a request owns that `Slot`.
        unsafe { slice::from_raw_parts(self.start(), SLOT_BYTES) }
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        let left = self.holders().get() - 1;
        self.holders().set(left);
        if left == 0 {
            self.pool.free.borrow_mut().push(self.index);
        }
    }
}

/// A slot with one owner, who may write to it.
pub struct Slot(Hold);

impl Slot {
    /// The payload, `PAYLOAD_BYTES`, page-aligned.
    #[must_use]
    pub fn payload(&self) -> &[u8] {
        self.headed(0)
    }
    /// The payload, to be written.
    #[must_use]
    pub fn payload_mut(&mut self) -> &mut [u8] {
        self.headed_mut(0)
    }
    /// The payload with the `head` bytes before it (at most `HEAD_BYTES`).
    #[must_use]
    pub fn headed(&self, head: usize) -> &[u8] {
        &self.0.all()[HEAD_BYTES - head..]
    }
    /// The payload with the `head` bytes before it (at most `HEAD_BYTES`), to be written.
    #[must_use]
    pub fn headed_mut(&mut self, head: usize) -> &mut [u8] {
        // SAFETY: as in `all`; `&mut self` is the slot's only holder, so nobody else reads or writes meanwhile.
        let all = unsafe { slice::from_raw_parts_mut(self.0.start(), SLOT_BYTES) };
        &mut all[HEAD_BYTES - head..]
    }
    /// Gives up writing for any number of readers.
    #[must_use]
    pub fn share(self) -> Shared {
        Shared(self.0)
    }
    /// The payload's address, for a request that owns this slot.
    pub(crate) fn payload_ptr(&mut self) -> *mut u8 {
        self.payload_mut().as_mut_ptr()
    }
}

/// A slot that is only read any more: a write on its way to disk and wire at once. Cloning it copies nothing.
pub struct Shared(Hold);

impl Shared {
    /// The payload, `PAYLOAD_BYTES`, page-aligned.
    #[must_use]
    pub fn payload(&self) -> &[u8] {
        &self.0.all()[HEAD_BYTES..]
    }
    /// The slot to be written again.
    ///
    /// # Errors
    /// Itself, while others hold it too.
    pub fn unshare(self) -> Result<Slot, Shared> {
        if self.0.holders().get() == 1 { Ok(Slot(self.0)) } else { Err(self) }
    }
}

impl Clone for Shared {
    fn clone(&self) -> Self {
        let count = self.0.holders().get();
        self.0.holders().set(count.checked_add(1).expect("fewer holders than 2^32"));
        Self(Hold { pool: Rc::clone(&self.0.pool), index: self.0.index })
    }
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Pool({} of {} free)", self.free(), self.slots())
    }
}
impl fmt::Debug for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Slot({})", self.0.index)
    }
}
impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Shared({})", self.0.index)
    }
}
