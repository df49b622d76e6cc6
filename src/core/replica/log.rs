//! Decides which extents are in the activity log, and when one may leave it (R10).
//!
//! Holds: a table of `LOG_EXTENTS_MAX` slots, of which the last `RING_BLOCKS` transactions are on disk, and what keeps each
//! slot: writes in flight, writes not flushed, pages that the map has not got durably. Keeps out: who waits for a
//! transaction, and the disk.
//! Invariant: an extent with a write that went out and is in flight, not flushed, or not covered by the durable map where
//! it must be, is in the table that a crash leaves behind, wherever the crash comes.
//!
//! On disk: a ring of 4 KiB blocks, transaction `n` in block `n % RING_BLOCKS`. Each has `format`'s header (sequence: the
//! transaction's number) and: count + updates (u16 slot, slot), u16 first slot of the rotating part, `ROTATING` slots. A
//! slot is u64 file (0: empty), u64 first extent, u64 count of extents. The updates are what this transaction changed; the
//! rotating part repeats a part of the table as it is then, so that any `LOG_EXTENTS_MAX / ROTATING` blocks in a row hold
//! all of it. One transaction is in flight at most, so a crash tears or loses one block at most, the one after the newest
//! whole one, and nothing was let out on the strength of that.
use crate::format::{FileKind, FormatError, Owner, open, seal};
use crate::ids::FileId;
use crate::limits::{EXTENT_BYTES, FILE_BYTES_MAX, LOG_EXTENTS_MAX};
use crate::wire::codec::{DecodeError, Reader, Writer};
use std::collections::VecDeque;
use std::collections::btree_map::{BTreeMap, Entry};
use std::ops::Range;

/// Bytes of a transaction.
pub const BLOCK_BYTES: usize = 4096;
/// Transactions in the ring.
pub const RING_BLOCKS: usize = 64;
/// Bytes of the log's file.
pub const RING_BYTES: usize = RING_BLOCKS * BLOCK_BYTES;
/// Slots that one transaction changes, at most.
const UPDATES_MAX: usize = 64;
/// Slots that each transaction repeats.
const ROTATING: usize = 64;
/// An operation on more extents than this has one slot for all of them.
const SINGLE_EXTENTS_MAX: u64 = 4;

const _: () = assert!(LOG_EXTENTS_MAX.is_multiple_of(ROTATING) && LOG_EXTENTS_MAX <= u16::MAX as usize);
const _: () = assert!(LOG_EXTENTS_MAX / ROTATING < RING_BLOCKS, "the ring holds the whole table, one block torn");
const _: () = assert!(64 + 4 + UPDATES_MAX * 26 + 2 + ROTATING * 24 <= BLOCK_BYTES, "a transaction fits its block");

/// What a slot stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Key {
    file: FileId,
    first: u64,
    count: u64,
}

const EMPTY: Key = Key { file: FileId(0), first: 0, count: 0 };

impl Key {
    fn bytes(self) -> (FileId, Range<u64>) {
        (self.file, self.first * EXTENT_BYTES..(self.first + self.count) * EXTENT_BYTES)
    }
    fn encode(self, out: &mut Writer<'_>) {
        out.u64(self.file.0);
        out.u64(self.first);
        out.u64(self.count);
    }
    fn decode(from: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let key = Self { file: FileId(from.u64()?), first: from.u64()?, count: from.u64()? };
        let end = key.first.checked_add(key.count);
        let sound = end.is_some_and(|end| end <= FILE_BYTES_MAX.div_ceil(EXTENT_BYTES)) && key.count > 0;
        if key == EMPTY || (sound && key.file != FileId(0)) {
            Ok(key)
        } else {
            Err(DecodeError::Bad { what: "slot of the activity log" })
        }
    }
}

#[derive(Clone, Copy, Debug)]
struct Slot {
    key: Key,
    /// The transaction that it is (or will be) durable with.
    logged_in: u64,
    /// Writes admitted and not ended.
    in_flight: u32,
    /// When its last write ended, on the log's own count; 0: since flushed, or never.
    unflushed_since: u64,
    /// The version of the map that must be durable before it leaves; 0: none.
    needs_map: u64,
    /// When it was used last, on the log's own count.
    used: u64,
}

impl Slot {
    fn empty(key: Key) -> Self {
        Self { key, logged_in: 0, in_flight: 0, unflushed_since: 0, needs_map: 0, used: 0 }
    }
    fn is_clean(&self) -> bool {
        self.in_flight == 0 && self.unflushed_since == 0 && self.needs_map == 0
    }
}

/// What became of a request to admit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Admit {
    /// Its extents are in the durable log: it may go out.
    Logged,
    /// It may go out when this transaction was `saved`.
    After(u64),
    /// No slot is free, and nothing was admitted: flush, end writes or save the map, and ask again.
    Full,
}

/// A block to be written and made durable; then `saved`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Transaction {
    /// Its number.
    pub number: u64,
    /// Where it goes in the log's file.
    pub offset: u64,
    /// `BLOCK_BYTES` of them.
    pub bytes: Vec<u8>,
}

/// Why a log is of no use. Everything is suspect then.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LoadError {
    /// The file has another length.
    #[error("activity log of {found} bytes, expected {RING_BYTES}")]
    Length {
        /// As read.
        found: usize,
    },
    /// A block is not ours, or of a newer program, or none is whole.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// More than the block after the newest is damaged.
    #[error("activity log damaged: block {block} of {RING_BLOCKS} is missing or out of order")]
    Damaged {
        /// Which.
        block: usize,
    },
}

/// The log.
#[derive(Clone, Debug)]
pub struct ActivityLog {
    owner: Owner,
    slots: Vec<Slot>,
    index: BTreeMap<Key, usize>,
    /// Slots that changed, in order; those of the next transaction first.
    pending: VecDeque<usize>,
    /// The transaction that was ordered last; it is in flight if it is not the saved one.
    ordered: u64,
    saved: u64,
    /// Counts ends of writes and uses.
    count: u64,
}

impl ActivityLog {
    /// A new, empty log, and the bytes of its file.
    #[must_use]
    pub fn create(owner: Owner) -> (Self, Vec<u8>) {
        let slots = vec![Slot::empty(EMPTY); LOG_EXTENTS_MAX];
        let mut log =
            Self { owner, slots, index: BTreeMap::new(), pending: VecDeque::new(), ordered: 0, saved: 0, count: 0 };
        let mut bytes = vec![0; RING_BYTES];
        for number in 1..=RING_BLOCKS as u64 {
            let at = offset_of(number);
            bytes[at..at + BLOCK_BYTES].copy_from_slice(&log.block(number, &[]));
            log.ordered = number;
        }
        log.saved = log.ordered;
        (log, bytes)
    }

    /// The log as its file has it. All its extents are suspect: fold them into the map, tell `folded`.
    ///
    /// # Errors
    /// `LoadError`.
    pub fn load(owner: Owner, bytes: &[u8]) -> Result<Self, LoadError> {
        if bytes.len() != RING_BYTES {
            return Err(LoadError::Length { found: bytes.len() });
        }
        let mut blocks = BTreeMap::new();
        let mut refused = None;
        for (at, raw) in bytes.chunks(BLOCK_BYTES).enumerate() {
            match open(FileKind::Log, owner, raw) {
                Ok((number, body)) if number % RING_BLOCKS as u64 == at as u64 && number < u64::MAX / 2 => {
                    blocks.insert(number, body);
                }
                Ok(_) => return Err(LoadError::Damaged { block: at }),
                // A block of somebody else, or of a newer program, is no torn one.
                Err(FormatError::Bytes { source, what }) if !matches!(source, DecodeError::Version { .. }) => {
                    refused = Some(FormatError::Bytes { what, source });
                }
                Err(other) => return Err(other.into()),
            }
        }
        let newest = match (blocks.last_key_value(), refused) {
            (Some((newest, _)), _) => *newest,
            (None, refused) => return Err(refused.expect("no block was whole").into()),
        };
        let mut log = Self::create(owner).0;
        (log.ordered, log.saved) = (newest, newest);
        for number in newest.saturating_sub(RING_BLOCKS as u64 - 2)..=newest {
            let damaged = LoadError::Damaged { block: offset_of(number) / BLOCK_BYTES };
            let body = blocks.get(&number).ok_or(damaged)?;
            log.replay(body).map_err(|source| FormatError::Bytes { what: "activity log", source })?;
        }
        for (at, slot) in log.slots.iter_mut().enumerate().filter(|(_, slot)| slot.key != EMPTY) {
            match log.index.entry(slot.key) {
                Entry::Vacant(free) => {
                    free.insert(at);
                    slot.needs_map = u64::MAX;
                }
                // Where the rotating part of one block was ahead of the updates of the next, an extent is there twice.
                Entry::Occupied(_) => slot.key = EMPTY,
            }
        }
        Ok(log)
    }

    fn replay(&mut self, body: &[u8]) -> Result<(), DecodeError> {
        let mut from = Reader::new(body);
        let updates = from.list(UPDATES_MAX, |from| Ok((from.u16()?, Key::decode(from)?)))?;
        let first = from.u16()?;
        if usize::from(first) + ROTATING > LOG_EXTENTS_MAX {
            return Err(DecodeError::Bad { what: "first slot" });
        }
        let rotating = (0..ROTATING).map(|_| Key::decode(&mut from)).collect::<Result<Vec<_>, _>>()?;
        from.end()?;
        let all = updates.into_iter().chain((first..).zip(rotating));
        for (at, key) in all {
            let slot = self.slots.get_mut(usize::from(at)).ok_or(DecodeError::Bad { what: "slot's number" })?;
            *slot = Slot::empty(key);
        }
        Ok(())
    }

    /// The bytes of transaction `number` with these updates.
    fn block(&self, number: u64, updates: &[usize]) -> Vec<u8> {
        let mut body = Vec::with_capacity(BLOCK_BYTES);
        let mut out = Writer::new(&mut body);
        let short = |at: usize| u16::try_from(at).expect("asserted above");
        out.list(updates, |out, &at| {
            out.u16(short(at));
            self.slots[at].key.encode(out);
        });
        let parts = (LOG_EXTENTS_MAX / ROTATING) as u64;
        let first = usize::try_from(number % parts).expect("small") * ROTATING;
        out.u16(short(first));
        for slot in &self.slots[first..first + ROTATING] {
            // Some may be ahead of their own updates. They count as durable with these, no sooner.
            slot.key.encode(&mut out);
        }
        let mut bytes = seal(FileKind::Log, self.owner, number, &body);
        bytes.resize(BLOCK_BYTES, 0);
        bytes
    }

    /// Admits an operation on these bytes. Unless `Full`, its extents are held until `ended` is told the same bytes.
    pub fn admit(&mut self, file: FileId, range: &Range<u64>) -> Admit {
        let keys = keys(file, range);
        let missing = keys.iter().filter(|key| !self.index.contains_key(key)).count();
        let mut free = self.free_slots(missing, &keys);
        if free.len() < missing {
            return Admit::Full;
        }
        self.count += 1;
        let mut after = 0;
        for key in keys {
            let at = match self.index.get(&key) {
                Some(&at) => at,
                None => {
                    let at = free.pop().expect("as many as are missing");
                    self.replace(at, key);
                    at
                }
            };
            let slot = &mut self.slots[at];
            slot.in_flight += 1;
            slot.used = self.count;
            after = after.max(slot.logged_in);
        }
        if after <= self.saved { Admit::Logged } else { Admit::After(after) }
    }

    /// Puts `key` into a slot, with the next transaction that has room.
    fn replace(&mut self, at: usize, key: Key) {
        self.index.remove(&self.slots[at].key);
        self.slots[at] = Slot::empty(key);
        if key != EMPTY {
            self.index.insert(key, at);
        }
        self.slots[at].logged_in = self.ordered + 1 + (self.pending.len() / UPDATES_MAX) as u64;
        self.pending.push_back(at);
    }

    /// Slots that may be given away, the least recently used last; empty ones before all.
    fn free_slots(&self, wanted: usize, keep: &[Key]) -> Vec<usize> {
        if wanted == 0 {
            return Vec::new();
        }
        let mut free: Vec<(u64, usize)> = (0..self.slots.len())
            .filter(|&at| {
                let slot = &self.slots[at];
                slot.is_clean() && slot.logged_in <= self.saved && !keep.contains(&slot.key)
            })
            .map(|at| (if self.slots[at].key == EMPTY { 0 } else { self.slots[at].used }, at))
            .collect();
        if free.len() > wanted {
            free.select_nth_unstable(wanted - 1);
            free.truncate(wanted);
        }
        free.sort_unstable_by(|a, b| b.cmp(a));
        free.into_iter().map(|(_, at)| at).collect()
    }

    /// An admitted operation has ended everywhere, done or not. `needs_map`: the version of the map in which its pages are
    /// marked, where a replica that is out has not got them.
    ///
    /// # Panics
    /// Where no such operation was admitted.
    pub fn ended(&mut self, file: FileId, range: &Range<u64>, needs_map: Option<u64>) {
        self.count += 1;
        for key in keys(file, range) {
            let at = *self.index.get(&key).expect("an extent with a write in flight stays in the log");
            let slot = &mut self.slots[at];
            slot.in_flight = slot.in_flight.checked_sub(1).expect("what ends was admitted");
            slot.unflushed_since = self.count;
            slot.needs_map = slot.needs_map.max(needs_map.unwrap_or(0));
        }
    }

    /// To be taken when a flush is sent, and given to `flushed` when all replicas in sync have answered it.
    #[must_use]
    pub fn stamp(&self) -> u64 {
        self.count
    }

    /// A flush of `file` (`None`: of all) that was sent at `stamp` was answered by every replica in sync.
    pub fn flushed(&mut self, file: Option<FileId>, stamp: u64) {
        for slot in self.slots.iter_mut().filter(|slot| file.is_none_or(|file| slot.key.file == file)) {
            if slot.unflushed_since <= stamp {
                slot.unflushed_since = 0;
            }
        }
    }

    /// This version of the map is durable.
    pub fn map_saved(&mut self, version: u64) {
        for slot in self.slots.iter_mut().filter(|slot| slot.needs_map <= version) {
            slot.needs_map = 0;
        }
    }

    /// All suspects are marked in this version of the map: after `load`, and when the peer is out, which may have lost what it
    /// had not flushed.
    pub fn folded(&mut self, version: u64) {
        for slot in self.slots.iter_mut().filter(|slot| slot.key != EMPTY && !slot.is_clean()) {
            slot.needs_map = version;
        }
    }

    /// Nothing is suspect any more: the join is known, or what was proved equal is handed over. No operation is in flight.
    pub fn clear(&mut self) {
        for slot in &mut self.slots {
            (slot.in_flight, slot.unflushed_since, slot.needs_map) = (0, 0, 0);
        }
        self.retire();
    }

    /// Empties all slots that nothing keeps (after the fold at a start, or at a clean stop), so that the next start has less
    /// to compare.
    pub fn retire(&mut self) {
        for at in 0..self.slots.len() {
            let slot = &self.slots[at];
            if slot.key != EMPTY && slot.is_clean() && slot.logged_in <= self.saved {
                self.replace(at, EMPTY);
            }
        }
    }

    /// The next transaction, if something waits for one and none is in flight. It takes all that waits, up to a block.
    pub fn transaction(&mut self) -> Option<Transaction> {
        if self.pending.is_empty() || self.ordered != self.saved {
            return None;
        }
        let number = self.ordered + 1;
        let updates: Vec<usize> = self.pending.drain(..self.pending.len().min(UPDATES_MAX)).collect();
        debug_assert!(updates.iter().all(|&at| self.slots[at].logged_in == number));
        let bytes = self.block(number, &updates);
        self.ordered = number;
        Some(Transaction { number, offset: offset_of(number) as u64, bytes })
    }

    /// A transaction is durable.
    ///
    /// # Panics
    /// Where it is not the one in flight.
    pub fn saved(&mut self, number: u64) {
        assert!(number == self.ordered && number == self.saved + 1, "one transaction at a time, in order");
        self.saved = number;
    }

    /// All that is suspect now, in ranges of bytes: after `load` the whole table, later what a crash would make suspect and
    /// what is not clean.
    pub fn suspects(&self) -> impl Iterator<Item = (FileId, Range<u64>)> {
        self.slots.iter().filter(|slot| slot.key != EMPTY && !slot.is_clean()).map(|slot| slot.key.bytes())
    }

    /// Slots that something keeps. Near `LOG_EXTENTS_MAX` the next request is refused: flush before that.
    #[must_use]
    pub fn kept(&self) -> usize {
        self.slots.iter().filter(|slot| !slot.is_clean()).count()
    }
}

fn offset_of(number: u64) -> usize {
    usize::try_from(number % RING_BLOCKS as u64).expect("small") * BLOCK_BYTES
}

/// The slots that an operation on these bytes needs: one per extent, or one for all where there are many.
fn keys(file: FileId, range: &Range<u64>) -> Vec<Key> {
    let first = range.start / EXTENT_BYTES;
    let count = range.end.div_ceil(EXTENT_BYTES).saturating_sub(first);
    if count > SINGLE_EXTENTS_MAX {
        return vec![Key { file, first, count }];
    }
    (first..first + count).map(|first| Key { file, first, count: 1 }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::{ModuleId, ReplicaId};
    use proptest::prelude::*;

    const OWNER: Owner = Owner { module: ModuleId(1), replica: ReplicaId(2) };

    fn extent(n: u64) -> Range<u64> {
        n * EXTENT_BYTES..n * EXTENT_BYTES + 4096
    }

    /// Ended at a stamp and not flushed by all since; or not in the durable map, which needs this version.
    type Owed = (FileId, Range<u64>, Option<u64>, Option<u64>);

    /// The log, its disk, and what a caller keeps in mind.
    struct World {
        log: ActivityLog,
        disk: Vec<u8>,
        in_flight: Option<Transaction>,
        /// Admitted, not out yet: they wait for a transaction.
        waiting: Vec<(u64, FileId, Range<u64>)>,
        /// Out, not ended.
        out: Vec<(FileId, Range<u64>)>,
        owed: Vec<Owed>,
        map: u64,
    }

    impl World {
        fn new() -> Self {
            let (log, disk) = ActivityLog::create(OWNER);
            Self { log, disk, in_flight: None, waiting: vec![], out: vec![], owed: vec![], map: 1 }
        }
        /// So that each new extent drives an old one out.
        fn with_clean_slots_only() -> Self {
            let mut world = Self::new();
            for n in 0..LOG_EXTENTS_MAX as u64 {
                world.write(FileId(9), extent(n));
                world.order();
                world.save();
            }
            while !world.out.is_empty() {
                world.end(0, false);
            }
            world.flush(None);
            world
        }
        fn write(&mut self, file: FileId, range: Range<u64>) -> Admit {
            let admit = self.log.admit(file, &range);
            match admit {
                Admit::Logged => self.out.push((file, range)),
                Admit::After(number) => self.waiting.push((number, file, range)),
                Admit::Full => {}
            }
            admit
        }
        fn order(&mut self) {
            if let Some(transaction) = self.log.transaction() {
                assert!(self.in_flight.replace(transaction).is_none());
            }
        }
        fn save(&mut self) {
            let Some(transaction) = self.in_flight.take() else { return };
            let at = usize::try_from(transaction.offset).unwrap();
            self.disk[at..at + BLOCK_BYTES].copy_from_slice(&transaction.bytes);
            self.log.saved(transaction.number);
            self.waiting.retain(|(number, file, range)| {
                let waits = *number > transaction.number;
                if !waits {
                    self.out.push((*file, range.clone()));
                }
                waits
            });
        }
        fn end(&mut self, which: usize, peer_away: bool) {
            if self.out.is_empty() {
                return;
            }
            let (file, range) = self.out.swap_remove(which % self.out.len());
            let needs_map = peer_away.then_some(self.map + 1);
            self.log.ended(file, &range, needs_map);
            self.owed.push((file, range, Some(self.log.stamp()), needs_map));
        }
        fn flush(&mut self, file: Option<FileId>) {
            let stamp = self.log.stamp();
            self.log.flushed(file, stamp);
            for owed in self.owed.iter_mut().filter(|owed| file.is_none_or(|file| owed.0 == file)) {
                owed.2 = owed.2.filter(|&at| at > stamp);
            }
            self.owed.retain(|owed| owed.2.is_some() || owed.3.is_some());
        }
        fn save_map(&mut self) {
            self.map += 1;
            self.log.map_saved(self.map);
            for owed in &mut self.owed {
                owed.3 = owed.3.filter(|&version| version > self.map);
            }
            self.owed.retain(|owed| owed.2.is_some() || owed.3.is_some());
        }
        /// What a crash leaves, the block in flight torn after `torn` bytes, covers all that may differ.
        fn check_crash(&self, torn: usize) {
            let mut disk = self.disk.clone();
            if let Some(transaction) = &self.in_flight {
                let at = usize::try_from(transaction.offset).unwrap();
                let torn = torn.min(BLOCK_BYTES);
                disk[at..at + torn].copy_from_slice(&transaction.bytes[..torn]);
            }
            let suspects: Vec<_> = ActivityLog::load(OWNER, &disk).unwrap().suspects().collect();
            let differ = self.out.iter().map(|(file, range)| (*file, range));
            for (file, range) in differ.chain(self.owed.iter().map(|owed| (owed.0, &owed.1))) {
                let covered = |at: u64| suspects.iter().any(|(f, suspect)| *f == file && suspect.contains(&at));
                assert!(
                    covered(range.start) && covered(range.end - 1),
                    "{file} {range:?} is not in the log after a crash"
                );
            }
        }
    }

    #[derive(Clone, Debug)]
    enum Step {
        Write(u64, u64, u64),
        Order,
        Save,
        End(usize, bool),
        Flush(Option<u64>),
        SaveMap,
        Retire,
        Restart,
    }

    fn step() -> impl Strategy<Value = Step> {
        let length = prop_oneof![8 => 1..8192u64, 1 => 1..20 * EXTENT_BYTES];
        prop_oneof![
            20 => (2..4u64, prop_oneof![0..24u64, 0..6000u64], length).prop_map(|(file, page, length)| Step::Write(file, page, length)),
            4 => Just(Step::Order),
            4 => Just(Step::Save),
            10 => (any::<usize>(), proptest::bool::weighted(0.2)).prop_map(|(which, away)| Step::End(which, away)),
            2 => proptest::option::of(2..4u64).prop_map(Step::Flush),
            1 => Just(Step::SaveMap),
            1 => Just(Step::Retire),
            1 => Just(Step::Restart),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]
        #[test]
        fn after_a_crash_at_any_step_all_that_may_differ_is_in_the_log(
            steps in proptest::collection::vec(step(), 1..400), torn in 0..2 * BLOCK_BYTES
        ) {
            let mut world = World::with_clean_slots_only();
            for (n, step) in steps.into_iter().enumerate() {
                match step {
                    Step::Write(file, page, length) => {
                        // Few files over many extents: more than the table has slots for.
                        let start = page * EXTENT_BYTES / 4;
                        world.write(FileId(file), start..start + length);
                    }
                    Step::Order => world.order(),
                    Step::Save => world.save(),
                    Step::End(which, away) => world.end(which, away),
                    Step::Flush(file) => world.flush(file.map(FileId)),
                    Step::SaveMap => world.save_map(),
                    Step::Retire => world.log.retire(),
                    // The process is started anew with what is on the disk: nothing is in flight, all is folded.
                    Step::Restart => {
                        world.log = ActivityLog::load(OWNER, &world.disk).unwrap();
                        world.log.folded(world.map + 1);
                        world.in_flight = None;
                        world.waiting.clear();
                        for (file, range) in std::mem::take(&mut world.out) {
                            world.owed.push((file, range, None, Some(world.map + 1)));
                        }
                        for owed in &mut world.owed {
                            (owed.2, owed.3) = (None, Some(world.map + 1));
                        }
                    }
                }
                if n % 8 == 0 {
                    world.check_crash(torn);
                }
            }
            world.check_crash(torn);
            world.check_crash(BLOCK_BYTES);
        }

        #[test]
        fn mutated_logs_never_panic(at in 0..RING_BYTES, with: u8, body in proptest::collection::vec(any::<u8>(), 0..300)) {
            let (mut log, mut disk) = ActivityLog::create(OWNER);
            disk[at] = with;
            let _ = ActivityLog::load(OWNER, &disk);
            let _ = log.replay(&body);
        }
    }

    #[test]
    fn writes_that_wait_share_one_transaction_and_a_hot_extent_needs_none() {
        let mut world = World::new();
        let file = FileId(2);
        let first = world.write(file, extent(0));
        world.order();
        assert_eq!(first, Admit::After(world.in_flight.as_ref().unwrap().number));
        let next = RING_BLOCKS as u64 + 2;
        for n in 1..=20 {
            assert_eq!(world.write(file, extent(n)), Admit::After(next));
        }
        assert!(world.log.transaction().is_none(), "one at a time");
        world.save();
        world.order();
        world.save();
        assert_eq!(world.out.len(), 21);
        assert_eq!(world.write(file, extent(7)), Admit::Logged);
    }

    #[test]
    fn a_full_log_refuses_until_a_flush_of_the_right_file_frees_a_slot() {
        let mut world = World::new();
        let (file, other) = (FileId(2), FileId(3));
        world.write(other, extent(0));
        for n in 1..LOG_EXTENTS_MAX as u64 {
            assert_ne!(world.write(file, extent(n)), Admit::Full);
            world.order();
            world.save();
        }
        assert_eq!(world.write(file, extent(5000)), Admit::Full);
        while !world.out.is_empty() {
            world.end(0, false);
        }
        assert_eq!((world.log.kept(), world.write(file, extent(5000))), (LOG_EXTENTS_MAX, Admit::Full));
        world.flush(Some(other));
        assert!(matches!(world.write(file, extent(5000)), Admit::After(_)));
        assert_eq!(world.write(file, extent(5001)), Admit::Full);
        world.flush(None);
        assert_eq!(world.log.kept(), 1);
        // The least recently used goes first.
        world.write(file, extent(5001));
        assert!(world.log.index.keys().all(|key| key.first != 1) && world.log.index.keys().any(|key| key.first == 2));
    }

    #[test]
    fn a_flush_that_was_sent_before_a_write_ended_does_not_free_its_extent() {
        let mut world = World::new();
        world.write(FileId(2), extent(0));
        world.order();
        world.save();
        let stamp = world.log.stamp();
        world.end(0, false);
        world.log.flushed(None, stamp);
        assert_eq!(world.log.suspects().count(), 1);
        world.flush(None);
        assert_eq!(world.log.suspects().count(), 0);
    }

    #[test]
    fn retired_extents_are_gone_at_the_next_start() {
        let mut world = World::new();
        for n in 0..100 {
            world.write(FileId(2), extent(n));
        }
        for _ in 0..2 {
            world.order();
            world.save();
        }
        assert_eq!(ActivityLog::load(OWNER, &world.disk).unwrap().suspects().count(), 100);
        while !world.out.is_empty() {
            world.end(0, false);
        }
        world.flush(None);
        world.log.retire();
        for _ in 0..2 {
            world.order();
            world.save();
        }
        assert_eq!(ActivityLog::load(OWNER, &world.disk).unwrap().suspects().count(), 0);
    }

    #[test]
    fn a_log_of_another_replica_cut_short_or_damaged_in_the_middle_is_refused() {
        let (_, disk) = ActivityLog::create(OWNER);
        let other = Owner { replica: ReplicaId(9), ..OWNER };
        assert!(matches!(ActivityLog::load(other, &disk), Err(LoadError::Format(FormatError::OtherReplica { .. }))));
        assert_eq!(ActivityLog::load(OWNER, &disk[1..]).unwrap_err(), LoadError::Length { found: RING_BYTES - 1 });
        let mut damaged = disk.clone();
        damaged[9 * BLOCK_BYTES + 70] ^= 1;
        assert_eq!(ActivityLog::load(OWNER, &damaged).unwrap_err(), LoadError::Damaged { block: 9 });
        assert!(matches!(ActivityLog::load(OWNER, &vec![0; RING_BYTES]), Err(LoadError::Format(_))));
    }
}
