//! Decides which requests may run beside each other (R10, R11).
//!
//! Holds: ranges in flight, widened to pages; the files under a namespace operation; who waits, first come first served.
//! Keeps out: what the requests do.
//! Invariant: of two claims that touch the same page, or the same file where one is a namespace operation's, at most one
//! is held.
use crate::ids::FileId;
use crate::limits::PAGE_BYTES;
use crate::replica::event::OpId;
use std::collections::{BTreeMap, VecDeque};

/// Who claims.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Who {
    /// A guest's request.
    Guest(OpId),
    /// The resync: its copies, comparisons and the reconciling of the tree.
    Resync(u64),
}

/// What is claimed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Claim {
    /// Pages of a file, from a first byte to the byte after the last.
    Range(FileId, u64, u64),
    /// Being the only namespace operation, and these files whole; 0 is none.
    Tree([FileId; 4]),
}

impl Claim {
    /// The pages that `length` bytes at `offset` touch.
    #[must_use]
    pub fn pages(file: FileId, offset: u64, length: u64) -> Self {
        let end = offset.saturating_add(length);
        let end = end.checked_next_multiple_of(PAGE_BYTES).unwrap_or(u64::MAX);
        Self::Range(file, offset / PAGE_BYTES * PAGE_BYTES, end)
    }

    fn meets(&self, other: &Claim) -> bool {
        match (self, other) {
            (Self::Range(a, start, end), Self::Range(b, from, to)) => a == b && start < to && from < end,
            (Self::Tree(_), Self::Tree(_)) => true,
            (Self::Tree(files), Self::Range(file, ..)) | (Self::Range(file, ..), Self::Tree(files)) => {
                files.contains(file)
            }
        }
    }
}

/// The table of claims.
#[derive(Debug, Default)]
pub struct Overlap {
    /// Ranges in flight: no two of a file meet, so the neighbour below a range's end decides.
    ranges: BTreeMap<(FileId, u64), (u64, Who)>,
    tree: Option<(Who, [FileId; 4])>,
    waiting: VecDeque<(Who, Claim)>,
    held: BTreeMap<Who, Claim>,
}

impl Overlap {
    /// Takes the claim or queues for it; whether it was taken. Who waits hears of it from `release`.
    pub fn take(&mut self, who: Who, claim: Claim) -> bool {
        debug_assert!(!self.held.contains_key(&who), "one claim each");
        let free = self.is_free(&claim) && !self.waiting.iter().any(|(_, earlier)| earlier.meets(&claim));
        if free {
            self.hold(who, claim);
        } else {
            self.waiting.push_back((who, claim));
        }
        free
    }

    /// Ends a claim, held or waiting; those that now hold theirs are appended to `admitted`.
    pub fn release(&mut self, who: Who, admitted: &mut Vec<Who>) {
        match self.held.remove(&who) {
            Some(Claim::Range(file, start, _)) => {
                self.ranges.remove(&(file, start));
            }
            Some(Claim::Tree(_)) => self.tree = None,
            None => self.waiting.retain(|(waiter, _)| *waiter != who),
        }
        let mut at = 0;
        while at < self.waiting.len() {
            let (waiter, claim) = self.waiting[at];
            let behind = self.waiting.iter().take(at).any(|(_, earlier)| earlier.meets(&claim));
            if !behind && self.is_free(&claim) {
                self.waiting.remove(at);
                self.hold(waiter, claim);
                admitted.push(waiter);
            } else {
                at += 1;
            }
        }
    }

    /// Whether the claim is held (not merely waited for).
    #[must_use]
    pub fn holds(&self, who: Who) -> bool {
        self.held.contains_key(&who)
    }

    /// Whether nobody holds or waits.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.held.is_empty() && self.waiting.is_empty()
    }

    fn hold(&mut self, who: Who, claim: Claim) {
        match claim {
            Claim::Range(file, start, end) => {
                self.ranges.insert((file, start), (end, who));
            }
            Claim::Tree(files) => self.tree = Some((who, files)),
        }
        self.held.insert(who, claim);
    }

    fn is_free(&self, claim: &Claim) -> bool {
        let tree = self.tree.is_none_or(|(_, files)| !claim.meets(&Claim::Tree(files)));
        tree && match claim {
            Claim::Range(file, start, end) => self
                .ranges
                .range(..(*file, *end))
                .next_back()
                .is_none_or(|((other, _), (stop, _))| other != file || stop <= start),
            Claim::Tree(files) => files
                .iter()
                .all(|file| file.0 == 0 || self.ranges.range((*file, 0)..=(*file, u64::MAX)).next().is_none()),
        }
    }

    /// Asserts the invariant.
    pub fn check(&self) {
        let mut last: Option<(FileId, u64)> = None;
        for ((file, start), (end, _)) in &self.ranges {
            assert!(start < end, "a range in flight is not empty");
            if let Some((other, stop)) = last {
                assert!(other != *file || stop <= *start, "two requests in flight touch one page");
            }
            last = Some((*file, *end));
        }
        assert_eq!(self.held.len(), self.ranges.len() + usize::from(self.tree.is_some()), "each claim is in one table");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const F: FileId = FileId(7);

    fn guest(n: u64) -> Who {
        Who::Guest(OpId(n))
    }

    #[test]
    fn a_write_waits_for_the_one_under_it_and_for_those_that_came_before_it() {
        let mut table = Overlap::default();
        assert!(table.take(guest(1), Claim::pages(F, 0, 4096)));
        assert!(!table.take(guest(2), Claim::pages(F, 100, 5000)), "same first page");
        assert!(!table.take(guest(3), Claim::pages(F, 4096, 1)), "free, but behind an earlier one");
        assert!(table.take(guest(4), Claim::pages(FileId(8), 0, 4096)), "another file");
        let mut admitted = Vec::new();
        table.release(guest(1), &mut admitted);
        assert_eq!(admitted, [guest(2)]);
        table.release(guest(2), &mut admitted);
        assert_eq!(admitted, [guest(2), guest(3)]);
        table.check();
    }

    #[test]
    fn a_namespace_operation_is_a_barrier_for_its_files_only() {
        let mut table = Overlap::default();
        assert!(table.take(guest(1), Claim::pages(F, 0, 4096)));
        assert!(!table.take(guest(2), Claim::Tree([F, FileId(0), FileId(0), FileId(0)])));
        assert!(!table.take(guest(3), Claim::pages(F, 1 << 20, 4096)), "behind the barrier");
        assert!(table.take(guest(4), Claim::pages(FileId(8), 0, 4096)));
        assert!(!table.take(guest(5), Claim::Tree([FileId(0); 4])), "one namespace operation at a time");
        let mut admitted = Vec::new();
        table.release(guest(1), &mut admitted);
        assert_eq!(admitted, [guest(2)]);
        table.release(guest(2), &mut admitted);
        assert_eq!(admitted, [guest(2), guest(3), guest(5)]);
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]
        #[test]
        fn claims_never_meet_and_everybody_is_admitted_in_the_end(
            claims in proptest::collection::vec((0u64..3, 0u64..20, 1u64..9, prop::bool::weighted(0.1)), 1..60),
            order in proptest::collection::vec(any::<prop::sample::Index>(), 60),
        ) {
            let mut table = Overlap::default();
            let mut held = Vec::new();
            for (n, (file, page, pages, tree)) in claims.iter().enumerate() {
                let file = FileId(file + 1);
                let claim = if *tree { Claim::Tree([file, FileId(0), FileId(0), FileId(0)]) }
                    else { Claim::pages(file, page * PAGE_BYTES, pages * PAGE_BYTES) };
                if table.take(guest(n as u64), claim) { held.push(guest(n as u64)); }
                table.check();
            }
            let mut ended = 0;
            for index in order {
                if held.is_empty() { break; }
                let who = held.swap_remove(index.index(held.len()));
                table.release(who, &mut held);
                table.check();
                ended += 1;
            }
            prop_assert_eq!(ended, claims.len());
            prop_assert!(table.is_empty());
        }
    }
}
