//! Decides what of two replicas is compared and copied, in which order, and when they are equal.
//!
//! Holds: the phase, what is in flight, what was copied and is to be proved. The marks are in the caller's `DirtyMap`: what
//! a cut leaves undone is there. Keeps out: data, the disk, the link, the guest's writes, which are mirrored from
//! `Mirror` on.
//!
//! Holding ─held─> Listing ─plan─> Marking ─saved─> Applying ─┐
//!                    ^─────────── list again ────────────────┘
//!                 Listing ─nothing to do, Mirror─> Working ─nothing left─> Flushing ─> Proving ─equal─> Joined
//!                                                     ^────────────── more was marked ────┘
//! any ─no progress for a minute─> Holding
//!
//! Order within Working: what is marked to be sent; then what is to be compared, by blocks and, in those that differ, by
//! pages, which makes marks to send; then whole files, from data to data, which makes marks of both kinds.
//! Invariant: a mark is settled only by a copy's answer or by equal hashes, and `Join` comes only when all marks are
//! settled, a flush of both sides followed the last of them, and all that was copied was found equal after that.
pub mod event;
#[cfg(test)]
mod tests;
pub mod verify;
#[cfg(test)]
mod verify_tests;

pub use event::{Data, Effect, Event, JobId, Progress, Side};

use crate::ids::FileId;
use crate::limits::{
    BLOCK_BYTES, PAGE_BYTES, RESYNC_BATCH_BYTES, RESYNC_COPIES_MAX, RESYNC_COPY_BYTES, RESYNC_DATA_BYTES,
    RESYNC_FLUSH_BYTES, RESYNC_HASHES_MAX, RESYNC_STALL_MS, RESYNC_TREE_ROUNDS_MAX,
};
use crate::namespace::{Op, Tree, plan};
use crate::replica::map::{DirtyMap, Mark, Pages};
use crate::time::{Time, millis};
use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;

#[derive(Clone, Debug)]
enum Phase {
    Holding,
    Listing(JobId, Both<Tree>),
    Marking(JobId, VecDeque<Op>),
    Applying(JobId, VecDeque<Op>),
    /// The trees cannot be made equal: waits for the next pass.
    Refused,
    Working,
    Flushing,
    Proving(Pages),
    Joined,
}

#[derive(Clone, Debug)]
enum Job {
    Copy { file: FileId, range: Range<u64> },
    Compare { file: FileId, range: Range<u64>, unit: u64, proof: bool, answers: Both<Hashes> },
    Data { file: FileId, from: u64, answers: Both<Data> },
}

type Hashes = Vec<[u8; 32]>;

/// The answers of both sides to one question.
#[derive(Clone, Debug)]
struct Both<T> {
    holder: Option<T>,
    target: Option<T>,
}

impl<T> Both<T> {
    const NONE: Self = Self { holder: None, target: None };

    /// Takes one in; both, when they are there.
    fn add(&mut self, side: Side, answer: T) -> Option<(T, T)> {
        match side {
            Side::Holder => self.holder = Some(answer),
            Side::Target => self.target = Some(answer),
        }
        if self.holder.is_some() && self.target.is_some() { self.holder.take().zip(self.target.take()) } else { None }
    }
}

/// The holder's side of a resync of one peer, within one session. When the session ends it is dropped, and the map takes
/// back what was not flushed (`DirtyMap::take_back`).
#[derive(Clone, Debug)]
pub struct Resync {
    phase: Phase,
    tree_rounds: u32,
    /// Lengths of the holder's files at the last listing; for the progress only.
    sizes: BTreeMap<FileId, u64>,
    jobs: BTreeMap<JobId, Job>,
    next_job: u64,
    /// Copied, not proved yet.
    copied: Pages,
    /// What this node cannot read: left alone until the next pass.
    unreadable: Vec<(FileId, Range<u64>)>,
    /// The flush that is under way.
    flush: Option<JobId>,
    bytes_done: u64,
    bytes_sent: u64,
    /// When it last got further.
    moved: Time,
    told: Progress,
}

impl Resync {
    /// Begins. What the target holds suspect is in `map` already (`DirtyMap::compare_all_of`), and all that this side does.
    #[must_use]
    pub fn begin(now: Time, effects: &mut Vec<Effect>) -> Self {
        effects.push(Effect::Hold);
        Self {
            phase: Phase::Holding,
            tree_rounds: 0,
            sizes: BTreeMap::new(),
            jobs: BTreeMap::new(),
            next_job: 0,
            copied: Pages::default(),
            unreadable: Vec::new(),
            flush: None,
            bytes_done: 0,
            bytes_sent: 0,
            moved: now,
            told: Progress::default(),
        }
    }

    /// Whether the join was asked for.
    #[must_use]
    fn is_joined(&self) -> bool {
        matches!(self.phase, Phase::Joined)
    }

    /// One event, with the map of this peer.
    pub fn step(&mut self, now: Time, event: Event, map: &mut DirtyMap, effects: &mut Vec<Effect>) {
        use {Event as E, Phase as P};
        let ticked = matches!(event, E::Tick);
        match (&mut self.phase, event) {
            (P::Holding, E::Held) => self.list(now, effects),
            (P::Listing(wanted, answers), E::Tree(job, side, tree)) if job == *wanted => {
                if let Some((holder, target)) = answers.add(side, tree) {
                    self.planned(now, &holder, &target, map, effects);
                }
            }
            (P::Marking(wanted, ops), E::MapSaved(job)) | (P::Applying(wanted, ops), E::Applied(job, Ok(())))
                if job == *wanted =>
            {
                let ops = std::mem::take(ops);
                self.apply(now, ops, effects);
            }
            (P::Applying(wanted, _), E::Applied(job, Err(errno))) if job == *wanted => {
                self.phase = P::Refused;
                effects.push(Effect::TreesDiffer(Some(errno)));
            }
            (_, E::Data(job, side, data)) => self.found(now, job, side, data, map),
            (_, E::Hashes(job, side, hashes)) => self.hashed(now, job, side, hashes, map, effects),
            (_, E::Copied(job, sent)) => self.copied(now, job, sent, map),
            (_, E::Failed(job, errno)) => self.failed(job, errno, map, effects),
            (_, E::Flushed(job)) if self.flush == Some(job) => {
                self.flush = None;
                self.moved = now;
                map.flush_ended();
                effects.push(Effect::SaveMap(self.number()));
                if matches!(self.phase, P::Flushing) {
                    self.phase = P::Proving(std::mem::take(&mut self.copied));
                }
            }
            // Late or repeated news.
            (_, E::Held | E::Tree(..) | E::MapSaved(_) | E::Applied(..) | E::Flushed(_) | E::Tick) => {}
        }
        self.go_on(map, effects);
        let progress = self.progress(map);
        if progress != self.told {
            self.told = progress;
            effects.push(Effect::Progress(progress));
        }
        if ticked && now.since(self.moved) >= millis(RESYNC_STALL_MS) && !self.is_joined() {
            self.restart(now, map, effects);
        }
    }

    fn number(&mut self) -> JobId {
        self.next_job += 1;
        JobId(self.next_job)
    }

    fn list(&mut self, now: Time, effects: &mut Vec<Effect>) {
        self.moved = now;
        self.tree_rounds += 1;
        let job = self.number();
        self.phase = Phase::Listing(job, Both::NONE);
        effects.push(Effect::AskTrees(job));
    }

    fn planned(&mut self, now: Time, holder: &Tree, target: &Tree, map: &mut DirtyMap, effects: &mut Vec<Effect>) {
        self.moved = now;
        self.sizes = holder.entries().iter().map(|(id, entry)| (*id, entry.size)).collect();
        let plan = plan(holder, target);
        if plan.ops.is_empty() {
            self.phase = Phase::Working;
            effects.push(Effect::Mirror);
        } else if self.tree_rounds > RESYNC_TREE_ROUNDS_MAX {
            self.phase = Phase::Refused;
            effects.push(Effect::TreesDiffer(None));
        } else {
            // Durable before the lengths agree: from then on nothing else tells that the data may not.
            for (file, from) in plan.suspects {
                map.mark_whole(file, from);
            }
            let job = self.number();
            self.phase = Phase::Marking(job, plan.ops.into());
            effects.push(Effect::SaveMap(job));
        }
    }

    fn apply(&mut self, now: Time, mut ops: VecDeque<Op>, effects: &mut Vec<Effect>) {
        self.moved = now;
        match ops.pop_front() {
            Some(op) => {
                let job = self.number();
                effects.push(Effect::Apply(job, op));
                self.phase = Phase::Applying(job, ops);
            }
            // The target's own file system may have had a say: look again.
            None => self.list(now, effects),
        }
    }

    /// Gives out as much work as may be in flight, and goes on to the next phase when there is none left.
    fn go_on(&mut self, map: &mut DirtyMap, effects: &mut Vec<Effect>) {
        match &mut self.phase {
            Phase::Working => {
                while self.in_flight(|job| matches!(job, Job::Copy { .. })) < RESYNC_COPIES_MAX
                    && self.copy(map, effects)
                {}
                while self.in_flight(|job| matches!(job, Job::Compare { .. })) < RESYNC_HASHES_MAX
                    && self.compare(map, effects)
                {}
                if self.jobs.is_empty() {
                    self.ask_data(map, effects);
                }
                let last = self.jobs.is_empty() && map.is_settled();
                if self.flush.is_none() && (last || map.settled_bytes() >= RESYNC_FLUSH_BYTES) {
                    let job = self.number();
                    self.flush = Some(job);
                    map.flush_began();
                    effects.push(Effect::FlushBoth(job));
                    if last {
                        self.phase = Phase::Flushing;
                    }
                }
            }
            Phase::Proving(left) => {
                let mut batches = Vec::new();
                let room = RESYNC_HASHES_MAX - self.jobs.len();
                while batches.len() < room {
                    let Some((file, run)) = left.next(FileId(0), 0, RESYNC_BATCH_BYTES) else { break };
                    let (range, unit) = proof_of(&run);
                    left.remove(file, &range);
                    batches.push((file, range, unit));
                }
                let last = left.is_empty() && batches.is_empty() && self.jobs.is_empty();
                for (file, range, unit) in batches {
                    self.hash(file, range, unit, true, effects);
                }
                if last {
                    if map.is_empty() {
                        self.phase = Phase::Joined;
                        effects.push(Effect::Join);
                    } else {
                        self.phase = Phase::Working;
                        self.go_on(map, effects);
                    }
                }
            }
            _ => {}
        }
    }

    fn in_flight(&self, kind: impl Fn(&Job) -> bool) -> usize {
        self.jobs.values().filter(|job| kind(job)).count()
    }

    fn begin_job(&mut self, job: Job) -> JobId {
        let id = self.number();
        self.jobs.insert(id, job);
        id
    }

    /// The first run of marked pages that is neither in flight nor unreadable.
    fn free_run(&self, pages: &Pages, most: u64) -> Option<(FileId, Range<u64>)> {
        let in_flight = self.jobs.values().filter_map(|job| match job {
            Job::Copy { file, range } | Job::Compare { file, range, .. } => Some((*file, range)),
            Job::Data { .. } => None,
        });
        let taken: Vec<_> = in_flight.chain(self.unreadable.iter().map(|(file, range)| (*file, range))).collect();
        let mut at = (FileId(0), 0);
        loop {
            let (file, run) = pages.next(at.0, at.1, most)?;
            let of_file = || taken.iter().filter(|(other, _)| *other == file).map(|(_, range)| *range);
            match of_file().filter(|range| range.contains(&run.start)).map(|range| range.end).max() {
                Some(end) => at = (file, end),
                None => {
                    let next = of_file().map(|range| range.start).filter(|start| *start > run.start).min();
                    return Some((file, run.start..run.end.min(next.unwrap_or(u64::MAX))));
                }
            }
        }
    }

    /// Begins one copy; false where there is none to begin.
    fn copy(&mut self, map: &DirtyMap, effects: &mut Vec<Effect>) -> bool {
        let Some((file, range)) = self.free_run(map.pages(Mark::Send), RESYNC_COPY_BYTES) else { return false };
        let job = self.begin_job(Job::Copy { file, range: range.clone() });
        let length = u32::try_from(range.end - range.start).expect("a copy is small");
        effects.push(Effect::Copy { job, file, offset: range.start, length });
        true
    }

    /// Begins one comparison; false where there is none to begin.
    fn compare(&mut self, map: &DirtyMap, effects: &mut Vec<Effect>) -> bool {
        let Some((file, run)) = self.free_run(map.pages(Mark::Compare), RESYNC_BATCH_BYTES) else { return false };
        // A few pages are not worth a block.
        if run.end - run.start <= BLOCK_BYTES / 4 {
            self.hash(file, run, PAGE_BYTES, false, effects);
            return true;
        }
        let start = run.start / BLOCK_BYTES * BLOCK_BYTES;
        let end = run.end.next_multiple_of(BLOCK_BYTES).min(start + RESYNC_BATCH_BYTES);
        self.hash(file, start..end, BLOCK_BYTES, false, effects);
        true
    }

    fn hash(&mut self, file: FileId, range: Range<u64>, unit: u64, proof: bool, effects: &mut Vec<Effect>) {
        let (offset, length) = (range.start, u32::try_from(range.end - range.start).expect("a batch is small"));
        let job = self.begin_job(Job::Compare { file, range, unit, proof, answers: Both::NONE });
        let unit = u32::try_from(unit).expect("a block at most");
        effects.push(Effect::Hash { job, file, offset, length, unit, claim: proof });
    }

    /// Asks where the first file that is to be compared whole has data; once all else is done.
    fn ask_data(&mut self, map: &DirtyMap, effects: &mut Vec<Effect>) {
        let pending = self.free_run(map.pages(Mark::Send), PAGE_BYTES).is_some()
            || self.free_run(map.pages(Mark::Compare), PAGE_BYTES).is_some();
        let readable =
            |file: &FileId| !self.unreadable.iter().any(|(other, range)| other == file && range.end == u64::MAX);
        let next = map.whole().iter().find(|(file, _)| readable(file)).map(|(file, from)| (*file, *from));
        if let (false, Some((file, from))) = (pending, next) {
            let job = self.begin_job(Job::Data { file, from, answers: Both::NONE });
            effects.push(Effect::AskData { job, file, from, length: RESYNC_DATA_BYTES });
        }
    }

    fn found(&mut self, now: Time, id: JobId, side: Side, data: Data, map: &mut DirtyMap) {
        let Some(Job::Data { file, from, answers }) = self.jobs.get_mut(&id) else { return };
        let Some((here, there)) = answers.add(side, data) else { return };
        let (file, from) = (*file, *from);
        self.jobs.remove(&id);
        self.moved = now;
        let size = self.sizes.get(&file).copied().unwrap_or(0);
        let end = from.saturating_add(RESYNC_DATA_BYTES);
        let mut until = here.until.min(there.until);
        let (mut mine, mut theirs) = (Pages::default(), Pages::default());
        // An answer that does not get on says nothing: then all of it is looked at. (What lies beyond the length of the
        // listing was written since, on both sides.)
        let useless = until / PAGE_BYTES <= from / PAGE_BYTES;
        if useless {
            until = if end < size { end } else { u64::MAX };
        }
        for (pages, side) in [(&mut mine, &here), (&mut theirs, &there)] {
            if useless && from < size {
                pages.insert(file, &(from..end.min(size)));
            }
            for range in side.ranges.iter().filter(|_| !useless) {
                let range = range.start.max(from)..range.end.min(until).min(end);
                if range.start < range.end {
                    pages.insert(file, &range);
                }
            }
        }
        // Holes on both sides are equal. Data on one side only differs, unless it is zeros; then it travels as a hole.
        let (only_mine, only_theirs) = (mine.without(&theirs), theirs.without(&mine));
        for (_, run) in mine.without(&only_mine).runs() {
            map.mark(Mark::Compare, file, &run);
        }
        for (_, run) in only_mine.runs().chain(only_theirs.runs()) {
            map.mark(Mark::Send, file, &run);
        }
        let looked_at = until.min(size).saturating_sub(from);
        self.bytes_done += looked_at.saturating_sub(mine.bytes() + only_theirs.bytes());
        map.settle_whole(file, (until < u64::MAX).then_some(until));
    }

    fn hashed(
        &mut self,
        now: Time,
        id: JobId,
        side: Side,
        hashes: Hashes,
        map: &mut DirtyMap,
        effects: &mut Vec<Effect>,
    ) {
        let Some(Job::Compare { file, range, unit, proof, answers }) = self.jobs.get_mut(&id) else { return };
        let Some((here, there)) = answers.add(side, hashes) else { return };
        let (file, range, unit, proof) = (*file, range.clone(), *unit, *proof);
        self.jobs.remove(&id);
        self.moved = now;
        let units = (range.end - range.start) / unit;
        let at = |n: u64| usize::try_from(n).expect("a batch is small");
        let differs = |n: &u64| here.get(at(*n)) != there.get(at(*n));
        let place = |n: u64| range.start + n * unit..range.start + (n + 1) * unit;
        let mut differing = (0..units).filter(differs);
        if proof {
            let mut unequal = false;
            for wrong in differing {
                // Where one side has none a guest's write beyond made the file longer there just now.
                if here.len().min(there.len()) > at(wrong) {
                    effects.push(Effect::Unequal(file, place(wrong).start));
                }
                map.mark(Mark::Send, file, &place(wrong));
                unequal = true;
            }
            if unequal {
                // The durable map has let go of it.
                effects.push(Effect::SaveMap(self.number()));
            }
            self.bytes_done += range.end - range.start;
        } else if unit == PAGE_BYTES {
            for page in differing.map(place) {
                map.mark(Mark::Send, file, &page);
            }
            map.settle(Mark::Compare, file, &range);
            self.bytes_done += range.end - range.start;
        } else {
            let Some(first) = differing.next() else {
                map.settle(Mark::Compare, file, &range);
                self.bytes_done += range.end - range.start;
                return;
            };
            let rest = place(first).start..place(differing.next_back().unwrap_or(first)).end;
            for equal in [range.start..rest.start, rest.end..range.end] {
                map.settle(Mark::Compare, file, &equal);
                self.bytes_done += equal.end - equal.start;
            }
            self.hash(file, rest, PAGE_BYTES, false, effects);
        }
    }

    fn copied(&mut self, now: Time, id: JobId, sent: u64, map: &mut DirtyMap) {
        let Some(Job::Copy { file, range }) = self.jobs.get(&id).cloned() else { return };
        self.jobs.remove(&id);
        self.moved = now;
        map.settle(Mark::Send, file, &range);
        self.copied.insert(file, &range);
        self.bytes_done += range.end - range.start;
        self.bytes_sent += sent;
    }

    fn failed(&mut self, id: JobId, errno: crate::namespace::Errno, map: &mut DirtyMap, effects: &mut Vec<Effect>) {
        let (file, range) = match self.jobs.remove(&id) {
            Some(Job::Copy { file, range }) => (file, range),
            Some(Job::Compare { file, range, proof, .. }) => {
                if proof {
                    map.mark(Mark::Send, file, &range);
                }
                (file, range)
            }
            Some(Job::Data { file, from, .. }) => (file, from..u64::MAX),
            None => return,
        };
        self.unreadable.push((file, range.clone()));
        effects.push(Effect::Unreadable(file, range, errno));
    }

    fn restart(&mut self, now: Time, map: &mut DirtyMap, effects: &mut Vec<Effect>) {
        map.take_back();
        for (file, run) in self.copied.runs() {
            map.mark(Mark::Compare, file, &run);
        }
        if let Phase::Proving(left) = &self.phase {
            for (file, run) in left.runs() {
                map.mark(Mark::Compare, file, &run);
            }
        }
        let (next_job, bytes_done, bytes_sent) = (self.next_job, self.bytes_done, self.bytes_sent);
        effects.push(Effect::Restarted);
        *self = Self { next_job, bytes_done, bytes_sent, ..Self::begin(now, effects) };
    }

    /// How far it is.
    #[must_use]
    pub fn progress(&self, map: &DirtyMap) -> Progress {
        let whole =
            map.whole().iter().map(|(file, from)| self.sizes.get(file).copied().unwrap_or(0).saturating_sub(*from));
        let proof = match &self.phase {
            Phase::Proving(left) => left.bytes(),
            _ => self.copied.bytes(),
        };
        let left = whole.fold(map.bytes().saturating_add(proof), u64::saturating_add);
        Progress {
            bytes_total: self.bytes_done.saturating_add(left),
            bytes_done: self.bytes_done,
            bytes_sent: self.bytes_sent,
        }
    }
}

/// The first part of a run that can be proved by one batch, and in which units: blocks where whole ones were copied.
fn proof_of(run: &Range<u64>) -> (Range<u64>, u64) {
    let (first, last) = (run.start.next_multiple_of(BLOCK_BYTES), run.end / BLOCK_BYTES * BLOCK_BYTES);
    if first > run.start {
        (run.start..run.end.min(first), PAGE_BYTES)
    } else if first < last {
        (first..last, BLOCK_BYTES)
    } else {
        (run.clone(), PAGE_BYTES)
    }
}
