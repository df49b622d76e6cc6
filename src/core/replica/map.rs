//! The dirty map: what the peer has not got, or may not have.
//!
//! Decides: which bytes a resync still has to look at, and what of that a crash must leave behind. Holds: pages to send
//! (the peer has not got them), pages to compare (it may not have them), files to compare from a byte on, and what a
//! resync has settled that no flush covers yet. Keeps out: the files, their lengths, who copies.
//! Invariant: a page leaves what `snapshot` writes only when a flush that began after it was settled has ended (R10); a
//! session that ends before puts it back.
//!
//! Body of a snapshot: twice (send, compare) u32 count + sets (u64 file, u32 high half of the page numbers, u32 length +
//! roaring's portable format), then u32 count + files to compare (u64 file, u64 first byte).
use crate::format::{FileKind, FormatError, Owner, open, seal};
use crate::ids::FileId;
use crate::limits::{FILE_BYTES_MAX, FILES_MAX, MAP_SET_BYTES_MAX, MARK_BYTES_MAX, PAGE_BYTES};
use crate::wire::codec::{DecodeError, Reader, Writer};
use roaring::RoaringBitmap;
use std::collections::BTreeMap;
use std::ops::Range;

/// A set of pages of many files. Ranges are in bytes.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Pages {
    /// By file and high half of the page's number; none is empty.
    sets: BTreeMap<(FileId, u32), RoaringBitmap>,
    count: u64,
}

impl Pages {
    /// Puts in all pages that the range touches.
    pub fn insert(&mut self, file: FileId, range: &Range<u64>) {
        for (high, lows) in halves(range.start / PAGE_BYTES..range.end.div_ceil(PAGE_BYTES)) {
            self.count += self.sets.entry((file, high)).or_default().insert_range(lows);
        }
    }

    /// Takes out all pages that lie whole in the range.
    pub fn remove(&mut self, file: FileId, range: &Range<u64>) {
        for (high, lows) in halves(range.start.div_ceil(PAGE_BYTES)..range.end / PAGE_BYTES) {
            let Some(set) = self.sets.get_mut(&(file, high)) else { continue };
            self.count -= set.remove_range(lows);
            if set.is_empty() {
                self.sets.remove(&(file, high));
            }
        }
    }

    /// Puts in all of another set.
    pub fn union(&mut self, other: &Pages) {
        for (key, set) in &other.sets {
            let mine = self.sets.entry(*key).or_default();
            self.count -= mine.len();
            *mine |= set;
            self.count += mine.len();
        }
    }

    /// The pages that are not in another set.
    #[must_use]
    pub fn without(&self, other: &Pages) -> Pages {
        let mut left = self.clone();
        for (key, theirs) in &other.sets {
            if let Some(set) = left.sets.get_mut(key) {
                left.count -= set.len();
                *set -= theirs;
                left.count += set.len();
            }
        }
        left.sets.retain(|_, set| !set.is_empty());
        left
    }

    /// The first run of pages at or after this place, at most `most` bytes of it (a multiple of a page).
    #[must_use]
    pub fn next(&self, file: FileId, offset: u64, most: u64) -> Option<(FileId, Range<u64>)> {
        let (high, low) = split(offset / PAGE_BYTES);
        self.sets.range((file, high)..).find_map(|(key, set)| {
            let mut pages = set.iter();
            if *key == (file, high) {
                pages.advance_to(low);
            }
            let first = pages.next()?;
            let last = u64::from(first) + most.div_ceil(PAGE_BYTES).max(1) - 1;
            let last = u32::try_from(last).unwrap_or(u32::MAX);
            let run = set.range(first..=last).next_range().expect("its first page is in it");
            let base = u64::from(key.1) << 32;
            Some((
                key.0,
                (base + u64::from(*run.start())) * PAGE_BYTES..(base + u64::from(*run.end()) + 1) * PAGE_BYTES,
            ))
        })
    }

    /// All runs, in order; a long one in pieces.
    pub fn runs(&self) -> impl Iterator<Item = (FileId, Range<u64>)> {
        let mut at = (FileId(0), 0);
        std::iter::from_fn(move || {
            let (file, run) = self.next(at.0, at.1, RUN_BYTES_MAX)?;
            at = (file, run.end);
            Some((file, run))
        })
    }

    /// Whether the range touches one of the pages.
    #[must_use]
    pub fn touches(&self, file: FileId, range: &Range<u64>) -> bool {
        self.next(file, range.start, PAGE_BYTES).is_some_and(|(found, run)| found == file && run.start < range.end)
    }

    /// Bytes of all pages.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.count.saturating_mul(PAGE_BYTES)
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    fn encode(&self, out: &mut Writer<'_>) {
        out.list(&self.sets.iter().collect::<Vec<_>>(), |out, ((file, high), set)| {
            out.u64(file.0);
            out.u32(*high);
            let mut bytes = Vec::with_capacity(set.serialized_size());
            set.serialize_into(&mut bytes).expect("a vector takes all");
            out.blob(&bytes);
        });
    }

    fn decode(from: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let sets = from.list(SETS_MAX, |from| {
            let key = (FileId(from.u64()?), from.u32()?);
            let bytes = from.blob(MAP_SET_BYTES_MAX)?;
            let set = RoaringBitmap::deserialize_from(bytes).map_err(|_| DecodeError::Bad { what: "set of pages" })?;
            Ok((key, set))
        })?;
        let count = sets.iter().map(|(_, set)| set.len()).sum();
        let bounded = sets.iter().all(|((_, high), set)| {
            u64::from(set.max().unwrap_or(u32::MAX)) + (u64::from(*high) << 32) < FILE_BYTES_MAX / PAGE_BYTES
        });
        let listed = sets.len();
        let pages = Self { sets: sets.into_iter().collect(), count };
        let empty = pages.sets.values().any(RoaringBitmap::is_empty);
        if pages.sets.len() != listed || empty || !bounded {
            return Err(DecodeError::Bad { what: "set of pages" });
        }
        Ok(pages)
    }
}

/// Longer runs come in pieces.
const RUN_BYTES_MAX: u64 = 1 << 40;
/// Sets of one kind in a snapshot: a file has one per 16 TiB.
const SETS_MAX: usize = 2 * FILES_MAX;

fn split(page: u64) -> (u32, u32) {
    (u32::try_from(page >> 32).expect("a page of a file below 2^63 bytes"), (page & u64::from(u32::MAX)) as u32)
}

/// A range of pages, cut where the high half of the number changes.
fn halves(pages: Range<u64>) -> impl Iterator<Item = (u32, std::ops::RangeInclusive<u32>)> {
    let mut next = pages.start;
    std::iter::from_fn(move || {
        if next >= pages.end {
            return None;
        }
        let (high, low) = split(next);
        let last = (pages.end - 1).min(next | u64::from(u32::MAX));
        next = last + 1;
        Some((high, low..=split(last).1))
    })
}

/// Why a page is in the map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mark {
    /// The peer has not got it: it is sent.
    Send,
    /// The peer may not have it: it is compared.
    Compare,
}

/// Marks of both kinds, and files from a byte on.
#[derive(Clone, Debug, Default, PartialEq)]
struct Marks {
    send: Pages,
    compare: Pages,
    /// To be compared from this byte to the end.
    whole: BTreeMap<FileId, u64>,
}

impl Marks {
    fn union(&mut self, other: &Marks) {
        self.send.union(&other.send);
        self.compare.union(&other.compare);
        for (file, from) in &other.whole {
            self.mark_whole(*file, *from);
        }
    }
    fn mark_whole(&mut self, file: FileId, from: u64) {
        let mine = self.whole.entry(file).or_insert(from);
        *mine = from.min(*mine);
    }
    fn is_empty(&self) -> bool {
        self.send.is_empty() && self.compare.is_empty() && self.whole.is_empty()
    }
}

/// The map for one peer.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct DirtyMap {
    marks: Marks,
    /// Settled since the last flush began.
    settled: Marks,
    /// Settled before the flush that is under way.
    flushing: Marks,
}

impl DirtyMap {
    /// Marks all pages that the range touches. A range beyond `MARK_BYTES_MAX` becomes a comparison from its beginning on:
    /// sparse files may be larger than anything that a bitmap should hold.
    pub fn mark(&mut self, mark: Mark, file: FileId, range: &Range<u64>) {
        let end = range.end.min(FILE_BYTES_MAX);
        if end.saturating_sub(range.start) > MARK_BYTES_MAX {
            self.mark_whole(file, range.start);
        } else if range.start < end {
            match mark {
                Mark::Send => self.marks.send.insert(file, &(range.start..end)),
                Mark::Compare => self.marks.compare.insert(file, &(range.start..end)),
            }
        }
    }

    /// The file is to be compared from this byte on.
    pub fn mark_whole(&mut self, file: FileId, from: u64) {
        self.marks.mark_whole(file, from / PAGE_BYTES * PAGE_BYTES);
    }

    /// What the other side holds suspect is to be compared here, whatever it thought of it.
    pub fn compare_all_of(&mut self, other: &DirtyMap) {
        for part in [&other.marks, &other.settled, &other.flushing] {
            self.marks.compare.union(&part.send);
            self.marks.compare.union(&part.compare);
            for (file, from) in &part.whole {
                self.mark_whole(*file, *from);
            }
        }
    }

    /// The copy of these pages was answered, or they were found equal: they need a flush, no more.
    pub fn settle(&mut self, mark: Mark, file: FileId, range: &Range<u64>) {
        let (marks, settled) = match mark {
            Mark::Send => (&mut self.marks.send, &mut self.settled.send),
            Mark::Compare => (&mut self.marks.compare, &mut self.settled.compare),
        };
        let mut at = range.start;
        while let Some((found, run)) = marks.next(file, at, RUN_BYTES_MAX) {
            let run = run.start.max(range.start)..run.end.min(range.end);
            if found != file || run.is_empty() {
                break;
            }
            marks.remove(file, &run);
            settled.insert(file, &run);
            at = run.end;
        }
    }

    /// The comparison of a whole file got to this byte (`None`: to its end); what it found is marked.
    pub fn settle_whole(&mut self, file: FileId, to: Option<u64>) {
        let Some(from) = self.marks.whole.get(&file).copied() else { return };
        match to {
            Some(to) => {
                self.marks.whole.insert(file, from.max(to / PAGE_BYTES * PAGE_BYTES));
            }
            None => {
                self.marks.whole.remove(&file);
            }
        }
        self.settled.mark_whole(file, from);
    }

    /// A flush of both sides begins. One at a time.
    pub fn flush_began(&mut self) {
        let settled = std::mem::take(&mut self.settled);
        self.flushing.union(&settled);
    }

    /// It was answered well by both: what was settled before it is done.
    pub fn flush_ended(&mut self) {
        self.flushing = Marks::default();
    }

    /// The session ended: what was settled without a flush is to be looked at again.
    pub fn take_back(&mut self) {
        let (settled, flushing) = (std::mem::take(&mut self.settled), std::mem::take(&mut self.flushing));
        self.marks.union(&settled);
        self.marks.union(&flushing);
    }

    /// The join is known: nothing differs any more.
    pub fn clear(&mut self) {
        *self = Self::default();
    }

    /// Pages to be looked at.
    #[must_use]
    pub fn pages(&self, mark: Mark) -> &Pages {
        match mark {
            Mark::Send => &self.marks.send,
            Mark::Compare => &self.marks.compare,
        }
    }

    /// Files to be compared, and from which byte on.
    #[must_use]
    pub fn whole(&self) -> &BTreeMap<FileId, u64> {
        &self.marks.whole
    }

    /// Bytes that were settled and wait for a flush.
    #[must_use]
    pub fn settled_bytes(&self) -> u64 {
        self.settled.send.bytes() + self.settled.compare.bytes()
    }

    /// Whether nothing is to be looked at (something may still wait for a flush).
    #[must_use]
    pub fn is_settled(&self) -> bool {
        self.marks.is_empty()
    }

    /// Whether nothing differs and nothing waits for a flush.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.marks.is_empty() && self.settled.is_empty() && self.flushing.is_empty()
    }

    /// Bytes that differ or may differ, without files that are compared whole.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.marks.send.bytes().saturating_add(self.marks.compare.bytes())
    }

    /// All that may differ after a crash now, as it travels to the holder that resyncs this side.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut all = self.marks.clone();
        all.union(&self.settled);
        all.union(&self.flushing);
        let mut body = Vec::new();
        let mut out = Writer::new(&mut body);
        all.send.encode(&mut out);
        all.compare.encode(&mut out);
        out.list(&all.whole.iter().collect::<Vec<_>>(), |out, (file, from)| {
            out.u64(file.0);
            out.u64(**from);
        });
        body
    }

    /// Reads it back.
    ///
    /// # Errors
    /// `DecodeError`.
    pub fn decode(body: &[u8]) -> Result<Self, DecodeError> {
        let mut from = Reader::new(body);
        let (send, compare) = (Pages::decode(&mut from)?, Pages::decode(&mut from)?);
        let files = from.list(FILES_MAX, |from| Ok((FileId(from.u64()?), from.u64()?)))?;
        from.end()?;
        let whole: BTreeMap<_, _> = files.iter().copied().collect();
        let sound = whole.values().all(|first| first.is_multiple_of(PAGE_BYTES) && *first <= FILE_BYTES_MAX);
        if whole.len() != files.len() || !sound {
            return Err(DecodeError::Bad { what: "files to compare" });
        }
        Ok(Self { marks: Marks { send, compare, whole }, ..Self::default() })
    }

    /// The bytes of the map's file.
    #[must_use]
    pub fn snapshot(&self, owner: Owner, sequence: u64) -> Vec<u8> {
        seal(FileKind::Map, owner, sequence, &self.encode())
    }

    /// Sequence and map of a file.
    ///
    /// # Errors
    /// `FormatError`: everything is suspect then.
    pub fn load(owner: Owner, bytes: &[u8]) -> Result<(u64, Self), FormatError> {
        let (sequence, body) = open(FileKind::Map, owner, bytes)?;
        let map = Self::decode(body).map_err(|source| FormatError::Bytes { what: "dirty map", source })?;
        Ok((sequence, map))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::{ModuleId, ReplicaId};
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    const OWNER: Owner = Owner { module: ModuleId(1), replica: ReplicaId(2) };
    const TIB: u64 = 1 << 40;

    fn collected(pages: &Pages) -> BTreeSet<(u64, u64)> {
        pages
            .runs()
            .flat_map(|(file, run)| (run.start / PAGE_BYTES..run.end / PAGE_BYTES).map(move |p| (file.0, p)))
            .collect()
    }

    /// Around the places where sets and containers meet.
    fn offset() -> impl Strategy<Value = u64> {
        let border = prop_oneof![Just(0), Just(1 << 28), Just(16 * TIB), Just(48 * TIB)];
        (border, 0..40 * PAGE_BYTES)
            .prop_map(|(border, more): (u64, u64)| (border + more).saturating_sub(20 * PAGE_BYTES))
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 128, failure_persistence: None, ..ProptestConfig::default() })]
        #[test]
        fn pages_are_a_set(
            steps in proptest::collection::vec((0..8u8, 2..4u64, offset(), 0..30 * PAGE_BYTES), 0..60),
            probe in (2..4u64, offset(), 1..9u64)
        ) {
            let (mut pages, mut model) = (Pages::default(), BTreeSet::new());
            for (what, file, start, length) in steps {
                let range = start..start + length;
                match what {
                    0..=4 => {
                        pages.insert(FileId(file), &range);
                        model.extend((start / PAGE_BYTES..range.end.div_ceil(PAGE_BYTES)).map(|p| (file, p)));
                    }
                    _ => {
                        pages.remove(FileId(file), &range);
                        model.retain(|(f, p)| *f != file || p * PAGE_BYTES < start || (p + 1) * PAGE_BYTES > range.end);
                    }
                }
            }
            prop_assert_eq!(&collected(&pages), &model);
            prop_assert_eq!(pages.bytes(), model.len() as u64 * PAGE_BYTES);
            let (file, at, most) = probe;
            let next = pages.next(FileId(file), at, most * PAGE_BYTES);
            let wanted = model.range((file, at / PAGE_BYTES)..).next();
            prop_assert_eq!(next.as_ref().map(|(f, run)| (f.0, run.start / PAGE_BYTES)), wanted.copied());
            prop_assert!(next.is_none_or(|(_, run)| !run.is_empty() && run.end - run.start <= most * PAGE_BYTES));
            let touched = model.iter().any(|(f, p)| *f == file && *p >= at / PAGE_BYTES && p * PAGE_BYTES < at + most);
            prop_assert_eq!(pages.touches(FileId(file), &(at..at + most)), touched);
        }

        #[test]
        fn what_was_settled_leaves_the_file_only_after_a_flush_that_came_later(
            steps in proptest::collection::vec((0..12u8, 0..64u64, 1..16u64), 1..80)
        ) {
            // Per page: still to be looked at, settled before no flush, settled before the flush under way.
            let (mut map, mut model) = (DirtyMap::default(), [BTreeSet::new(), BTreeSet::new(), BTreeSet::new()]);
            let file = FileId(2);
            let mut under_way = false;
            for (what, first, count) in steps {
                let range = first * PAGE_BYTES..(first + count) * PAGE_BYTES;
                match what {
                    0..=3 => {
                        map.mark(Mark::Send, file, &range);
                        model[0].extend(first..first + count);
                    }
                    4..=7 => {
                        map.settle(Mark::Send, file, &range);
                        let gone: Vec<_> = model[0].range(first..first + count).copied().collect();
                        model[0].retain(|p| !gone.contains(p));
                        model[1].extend(gone);
                    }
                    8 if !under_way => {
                        map.flush_began();
                        let settled = std::mem::take(&mut model[1]);
                        model[2].extend(settled);
                        under_way = true;
                    }
                    9 if under_way => {
                        map.flush_ended();
                        model[2].clear();
                        under_way = false;
                    }
                    10 => {
                        map.take_back();
                        for part in [1, 2] {
                            let back = std::mem::take(&mut model[part]);
                            model[0].extend(back);
                        }
                        under_way = false;
                    }
                    _ => {}
                }
                let now: BTreeSet<u64> = collected(map.pages(Mark::Send)).into_iter().map(|(_, p)| p).collect();
                prop_assert_eq!(&now, &model[0]);
                let (sequence, loaded) = DirtyMap::load(OWNER, &map.snapshot(OWNER, 7)).unwrap();
                let kept: BTreeSet<u64> = collected(loaded.pages(Mark::Send)).into_iter().map(|(_, p)| p).collect();
                let wanted: BTreeSet<u64> = model.iter().flatten().copied().collect();
                prop_assert_eq!((sequence, kept), (7, wanted));
            }
        }

        #[test]
        fn mutated_snapshots_never_panic(
            marks in proptest::collection::vec((2..4u64, offset(), 1..300 * PAGE_BYTES), 0..20), at: usize, with: u8, cut: usize
        ) {
            let mut map = DirtyMap::default();
            for (file, start, length) in marks {
                map.mark(if start % 2 == 0 { Mark::Send } else { Mark::Compare }, FileId(file), &(start..start + length));
                map.mark_whole(FileId(file), start);
            }
            let mut body = map.encode();
            prop_assert_eq!(DirtyMap::decode(&body).unwrap(), map);
            let at = at % body.len();
            body[at] = with;
            let _ = DirtyMap::decode(&body);
            let _ = DirtyMap::decode(&body[..cut % body.len()]);
        }

        #[test]
        fn hostile_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = DirtyMap::decode(&bytes);
        }
    }

    #[test]
    fn one_gibibyte_scattered_over_sixteen_tebibytes_stays_under_eight_mebibytes() {
        let mut map = DirtyMap::default();
        // A full-period generator: each page once, all over the file.
        let mut page = 12_345u64;
        for _ in 0..(1 << 30) / PAGE_BYTES {
            page = (page * 1_664_525 + 1_013_904_223) % (16 * TIB / PAGE_BYTES);
            map.mark(Mark::Send, FileId(2), &(page * PAGE_BYTES..page * PAGE_BYTES + 1));
        }
        assert_eq!(map.bytes(), 1 << 30);
        assert!(map.snapshot(OWNER, 1).len() < 2 << 20);
        let held = map.marks.send.sets.values().map(RoaringBitmap::statistics).fold(0, |sum, s| {
            // What roaring counts, and its own record of each container.
            sum + s.n_bytes_array_containers + s.n_bytes_bitset_containers + u64::from(s.n_containers) * 48
        });
        assert!(held < 8 << 20, "{held} bytes");
    }

    #[test]
    fn a_range_that_no_bitmap_should_hold_is_compared_from_its_beginning_on() {
        let mut map = DirtyMap::default();
        map.mark(Mark::Send, FileId(2), &(5000..FILE_BYTES_MAX));
        assert_eq!((map.bytes(), map.whole().get(&FileId(2))), (0, Some(&PAGE_BYTES)));
        map.mark(Mark::Send, FileId(3), &(0..4 * TIB));
        assert_eq!(map.bytes(), 4 * TIB);
        assert!(map.encode().len() < 1 << 20, "runs are stored as runs");
    }

    #[test]
    fn a_whole_comparison_goes_on_where_a_flush_proved_it() {
        let (mut map, file) = (DirtyMap::default(), FileId(2));
        map.mark_whole(file, 0);
        map.settle_whole(file, Some(10 * PAGE_BYTES));
        map.flush_began();
        map.flush_ended();
        map.settle_whole(file, Some(20 * PAGE_BYTES));
        assert_eq!(map.whole()[&file], 20 * PAGE_BYTES);
        map.take_back();
        assert_eq!(map.whole()[&file], 10 * PAGE_BYTES);
        map.settle_whole(file, None);
        assert!(map.is_settled() && !map.is_empty());
        map.flush_began();
        map.flush_ended();
        assert!(map.is_empty());
    }

    #[test]
    fn what_the_other_side_suspects_is_compared_never_believed() {
        let (mut mine, mut other) = (DirtyMap::default(), DirtyMap::default());
        other.mark(Mark::Send, FileId(2), &(0..PAGE_BYTES));
        other.mark(Mark::Compare, FileId(3), &(0..PAGE_BYTES));
        other.mark_whole(FileId(4), 0);
        mine.mark(Mark::Send, FileId(2), &(0..1));
        mine.compare_all_of(&other);
        assert_eq!(collected(mine.pages(Mark::Send)), BTreeSet::from([(2, 0)]));
        assert_eq!(collected(mine.pages(Mark::Compare)), BTreeSet::from([(2, 0), (3, 0)]));
        assert_eq!(mine.whole().len(), 1);
    }
}
