//! Requests in flight, each with what it owns, found by the number that the kernel carries.
use crate::{Descriptor, Memory};
use io_uring::types::Timespec;

/// What a completion leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Work of the caller's.
    Work,
    /// A time of the caller's: brings no work, so no spinning after it.
    Timer,
    /// The read on the eventfd; armed again.
    Wake,
    /// The time at which `wait` ends at the latest.
    Alarm,
}

/// A request and what must outlive it.
pub(crate) struct Op {
    pub kind: Kind,
    pub token: u64,
    pub memory: Option<Memory>,
    /// Keeps the descriptor's number from being given to another file before the kernel looks at it.
    pub _descriptor: Option<Descriptor>,
    pub _time: Option<Box<Timespec>>,
}

#[derive(Default)]
struct Place {
    generation: u32,
    op: Option<Op>,
}

/// Places by number; a number names its place and how often it was used, so an old number finds nothing.
#[derive(Default)]
pub(crate) struct Slab {
    places: Vec<Place>,
    free: Vec<u32>,
    live: usize,
}

impl Slab {
    pub fn insert(&mut self, op: Op) -> u64 {
        let index = self.free.pop().unwrap_or_else(|| {
            self.places.push(Place::default());
            u32::try_from(self.places.len() - 1).expect("fewer than 2^32 requests in flight")
        });
        let place = &mut self.places[index as usize];
        place.op = Some(op);
        self.live += 1;
        u64::from(place.generation) << 32 | u64::from(index)
    }

    /// Takes the request out; `None` for a number that is not in flight.
    pub fn remove(&mut self, number: u64) -> Option<Op> {
        let (generation, index) = ((number >> 32) as u32, number as u32);
        let place = self.places.get_mut(index as usize).filter(|p| p.generation == generation)?;
        let op = place.op.take()?;
        // 31 bits: the top one marks what has no entry here.
        place.generation = (generation + 1) & 0x7fff_ffff;
        self.free.push(index);
        self.live -= 1;
        Some(op)
    }

    pub fn live(&self) -> usize {
        self.live
    }
}
