//! Decides what of two replicas in sync is compared by hash, at which rate, and whether they are proved equal.
//!
//! Holds: where it is, what is in flight, what differed once, what differs. Keeps out: data, the disk, the link, the
//! guest's writes, which go on.
//!
//! Listing ─> Confirming (entries that differed, four at a time) ─> Walking ─> Naming ─> Over
//!                                                                     └─ nothing differs ─^
//! A first look runs beside the guest: entries with no operation on names under way, ranges under the overlap rule. A write
//! beyond a file's end makes one side longer a little before the other, and a file that goes may live on on one side as
//! long as it is open. So what differs at the first look is looked at again with the whole file at rest, and counts only
//! where the file still has a name then.
//! Invariant: what is reported as a difference was one while nothing that touches it was under way: no false alarm.
use super::Both;
use super::event::{Data, JobId, Side};
use crate::ids::FileId;
use crate::limits::{
    BLOCK_BYTES, PAGE_BYTES, RESYNC_COPY_BYTES, RESYNC_DATA_BYTES, VERIFY_LISTED_MAX, VERIFY_RANGES_MAX,
};
use crate::namespace::{Errno, Kind, Tree};
use crate::replica::map::Pages;
use crate::time::{Time, millis};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ops::Range;

/// What it may fall behind its rate and catch up later.
const BURST: std::time::Duration = millis(100);

/// News for it. Those that name a job answer an order; others are late and dropped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// One of the two answers to `AskTrees`.
    Tree(JobId, Side, Tree),
    /// One of the two answers to `AskData`.
    Data(JobId, Side, Data),
    /// One of the two answers to `Hash`: one per block, none beyond the end of the file.
    Hashes(JobId, Side, Vec<[u8; 32]>),
    /// This side cannot do it.
    Failed(JobId, Side, Errno),
    /// Time went on: the rate allows more.
    Tick,
}

/// Its orders.
#[derive(Clone, Debug, PartialEq)]
pub enum Order {
    /// List both trees while no operation on names is under way, nor any change of these files (0: none).
    AskTrees(JobId, [FileId; 4]),
    /// Ask both sides where the file has data from this byte on.
    AskData(JobId, FileId, u64),
    /// Hash these bytes on both sides in blocks, while nothing that touches them is under way; `whole`: nor anything else
    /// of this file.
    Hash {
        /// The comparison.
        job: JobId,
        /// Which file.
        file: FileId,
        /// A multiple of a block, as is the length.
        offset: u64,
        /// At most `RESYNC_COPY_BYTES`: a guest's write may have to wait for it.
        length: u32,
        /// See above.
        whole: bool,
    },
    /// It is over.
    Done(Verdict),
    /// It cannot go on, for this side's sake.
    Broke(Side, Errno),
}

/// What two replicas differ in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Different {
    /// These bytes.
    Content(Range<u64>),
    /// What is written about the file: in words, which of it.
    Entry(String),
    /// Only the holder has it.
    OnlyHere,
    /// Only the peer has it.
    OnlyThere,
    /// One side cannot read these bytes.
    Unreadable(Side, Range<u64>, Errno),
}

/// A difference, of one file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// Which.
    pub file: FileId,
    /// One of its names, from the directory down.
    pub name: String,
    /// In what.
    pub what: Different,
}

/// The result.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Verdict {
    /// At most `VERIFY_LISTED_MAX`.
    pub differences: Vec<Difference>,
    /// Those that are not listed.
    pub more: u64,
    /// Bytes that were hashed on each side; between them are holes on both.
    pub bytes: u64,
    /// All bytes that are not equal.
    pub unequal: Pages,
    /// Some of the holder's own bytes cannot be read.
    pub holder_unreadable: bool,
}

impl Verdict {
    /// The replicas are proved equal.
    #[must_use]
    pub fn is_equal(&self) -> bool {
        self.differences.is_empty() && self.more == 0
    }
}

/// How far it is, in bytes of the files' lengths.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// To look at.
    pub bytes_total: u64,
    /// Looked at.
    pub bytes_done: u64,
}

#[derive(Debug)]
enum Phase {
    Listing(JobId, Both<Tree>),
    Confirming(JobId, [FileId; 4], Both<Tree>),
    Walking,
    Naming(JobId, Both<Tree>),
    Over,
}

#[derive(Debug)]
enum Job {
    Hash { file: FileId, range: Range<u64>, whole: bool, answers: Both<Vec<[u8; 32]>> },
    Data { file: FileId, size: u64, from: u64, answers: Both<Data> },
}

/// One verification, within one session.
#[derive(Debug)]
pub struct Verify {
    phase: Phase,
    next_job: u64,
    jobs: BTreeMap<JobId, Job>,
    /// Entries that differed once.
    entries: VecDeque<FileId>,
    /// Files whose data is not looked for yet, with their lengths at the listing; the first from this byte on.
    files: VecDeque<(FileId, u64)>,
    from: u64,
    /// Where there is data.
    left: Pages,
    /// What differed once.
    doubtful: VecDeque<(FileId, Range<u64>)>,
    verdict: Verdict,
    rate: u64,
    /// Bytes that may be hashed now, and up to when that was counted.
    allowance: u64,
    counted: Time,
    total: u64,
    walked: u64,
}

impl Verify {
    /// Begins; hashes at most `rate` bytes a second on each side.
    #[must_use]
    pub fn begin(now: Time, rate: u64, orders: &mut Vec<Order>) -> Self {
        let job = JobId(1);
        orders.push(Order::AskTrees(job, [FileId(0); 4]));
        Self {
            phase: Phase::Listing(job, Both::NONE),
            next_job: 1,
            jobs: BTreeMap::new(),
            entries: VecDeque::new(),
            files: VecDeque::new(),
            from: 0,
            left: Pages::default(),
            doubtful: VecDeque::new(),
            verdict: Verdict::default(),
            rate: rate.max(1),
            allowance: 0,
            counted: now,
            total: 0,
            walked: 0,
        }
    }

    /// One event.
    pub fn step(&mut self, now: Time, event: Event, orders: &mut Vec<Order>) {
        match event {
            Event::Tree(job, side, tree) => self.listed(job, side, tree, orders),
            Event::Data(job, side, data) => self.found(job, side, data),
            Event::Hashes(job, side, hashes) => self.hashed(job, side, hashes),
            Event::Failed(job, side, errno) => self.failed(job, side, errno, orders),
            Event::Tick => {}
        }
        self.earn(now);
        self.walk(orders);
    }

    /// How far it is.
    #[must_use]
    pub fn progress(&self) -> Progress {
        Progress { bytes_total: self.total, bytes_done: self.walked.saturating_sub(self.left.bytes()).min(self.total) }
    }

    fn number(&mut self) -> JobId {
        self.next_job += 1;
        JobId(self.next_job)
    }

    fn listed(&mut self, job: JobId, side: Side, tree: Tree, orders: &mut Vec<Order>) {
        let (Phase::Listing(wanted, answers) | Phase::Confirming(wanted, _, answers) | Phase::Naming(wanted, answers)) =
            &mut self.phase
        else {
            return;
        };
        if *wanted != job {
            return;
        }
        let Some((here, there)) = answers.add(side, tree) else { return };
        match std::mem::replace(&mut self.phase, Phase::Walking) {
            Phase::Listing(..) => {
                let ids: BTreeSet<FileId> = here.entries().keys().chain(there.entries().keys()).copied().collect();
                self.entries = ids.into_iter().filter(|id| here.get(*id) != there.get(*id)).collect();
                let both = |id: &FileId| there.get(*id).is_some_and(|entry| entry.kind == Kind::File);
                let files = here.entries().iter().filter(|(id, entry)| entry.kind == Kind::File && both(id));
                self.files = files.map(|(id, entry)| (*id, entry.size)).collect();
                self.total = self.files.iter().fold(0, |sum, (_, size)| sum.saturating_add(*size));
                self.confirm(orders);
            }
            Phase::Confirming(_, ids, _) => {
                for id in ids {
                    if let Some(what) = compare(&here, &there, id) {
                        let name = path(if here.get(id).is_some() { &here } else { &there }, id);
                        self.report(Difference { file: id, name, what });
                    }
                }
                self.confirm(orders);
            }
            Phase::Naming(..) => self.name(&here, &there, orders),
            Phase::Walking | Phase::Over => unreachable!("nothing is listed then"),
        }
    }

    /// The next entries that differed, at rest.
    fn confirm(&mut self, orders: &mut Vec<Order>) {
        if self.verdict.differences.len() >= VERIFY_LISTED_MAX {
            // The list is full of real ones: these are counted as they were first seen.
            self.verdict.more += self.entries.drain(..).count() as u64;
        }
        if self.entries.is_empty() {
            return;
        }
        let mut ids = [FileId(0); 4];
        for (id, entry) in ids.iter_mut().zip(self.entries.drain(..self.entries.len().min(4))) {
            *id = entry;
        }
        let job = self.number();
        self.phase = Phase::Confirming(job, ids, Both::NONE);
        orders.push(Order::AskTrees(job, ids));
    }

    fn report(&mut self, difference: Difference) {
        if self.verdict.differences.len() < VERIFY_LISTED_MAX {
            self.verdict.differences.push(difference);
        } else {
            self.verdict.more += 1;
        }
    }

    /// The rate is kept in whole bytes: what is left of a byte stays in `counted`.
    fn earn(&mut self, now: Time) {
        let span = now.since(self.counted).min(BURST);
        let earned = u128::from(self.rate) * span.as_nanos() / 1_000_000_000;
        let earned = u64::try_from(earned).unwrap_or(u64::MAX);
        if span == BURST {
            self.counted = now;
        } else if earned > 0 {
            let nanos = u128::from(earned) * 1_000_000_000 / u128::from(self.rate);
            self.counted = Time(self.counted.0 + u64::try_from(nanos).expect("at most a burst"));
        }
        let most = (self.rate / 10).max(RESYNC_COPY_BYTES);
        self.allowance = self.allowance.saturating_add(earned).min(most);
    }

    fn walk(&mut self, orders: &mut Vec<Order>) {
        if !matches!(self.phase, Phase::Walking) {
            return;
        }
        while self.jobs.len() < VERIFY_RANGES_MAX && self.hash(orders) {}
        if !self.jobs.is_empty() || !self.left.is_empty() || !self.doubtful.is_empty() {
            return;
        }
        if let Some((file, size)) = self.files.front().copied() {
            let (job, from) = (self.number(), self.from);
            self.jobs.insert(job, Job::Data { file, size, from, answers: Both::NONE });
            orders.push(Order::AskData(job, file, from));
        } else if self.verdict.unequal.is_empty() {
            self.end(orders);
        } else {
            let job = self.number();
            self.phase = Phase::Naming(job, Both::NONE);
            orders.push(Order::AskTrees(job, [FileId(0); 4]));
        }
    }

    /// Begins one comparison; false where there is none, or not now.
    fn hash(&mut self, orders: &mut Vec<Order>) -> bool {
        let doubtful = self.doubtful.front().cloned();
        let whole = doubtful.is_some();
        let Some((file, range)) = doubtful.or_else(|| self.left.next(FileId(0), 0, RESYNC_COPY_BYTES)) else {
            return false;
        };
        let bytes = range.end - range.start;
        if bytes > self.allowance {
            return false;
        }
        self.allowance -= bytes;
        if whole {
            self.doubtful.pop_front();
        } else {
            self.left.remove(file, &range);
            self.verdict.bytes += bytes;
        }
        let job = self.number();
        let (offset, length) = (range.start, u32::try_from(bytes).expect("a batch is small"));
        self.jobs.insert(job, Job::Hash { file, range, whole, answers: Both::NONE });
        orders.push(Order::Hash { job, file, offset, length, whole });
        true
    }

    fn found(&mut self, id: JobId, side: Side, data: Data) {
        let Some(Job::Data { file, size, from, answers }) = self.jobs.get_mut(&id) else { return };
        let Some((here, there)) = answers.add(side, data) else { return };
        let (file, size, from) = (*file, *size, *from);
        self.jobs.remove(&id);
        let end = from.saturating_add(RESYNC_DATA_BYTES);
        let mut until = here.until.min(there.until);
        if until / PAGE_BYTES <= from / PAGE_BYTES {
            // An answer that does not get on says nothing: all of it is looked at.
            let end = end.min(size);
            until = if end < size { end } else { u64::MAX };
            if from < end {
                self.look_at(file, from..end);
            }
        } else {
            for range in here.ranges.iter().chain(&there.ranges) {
                // No further than was asked, whatever the peer says.
                let range = range.start.max(from)..range.end.min(until).min(end);
                if range.start < range.end {
                    self.look_at(file, range);
                }
            }
        }
        self.walked = self.walked.saturating_add(until.min(size).saturating_sub(from));
        if until < size {
            self.from = until;
        } else {
            self.from = 0;
            self.files.pop_front();
        }
    }

    fn look_at(&mut self, file: FileId, range: Range<u64>) {
        let start = range.start / BLOCK_BYTES * BLOCK_BYTES;
        self.left.insert(file, &(start..range.end.next_multiple_of(BLOCK_BYTES)));
    }

    fn hashed(&mut self, id: JobId, side: Side, hashes: Vec<[u8; 32]>) {
        let Some(Job::Hash { file, range, whole, answers }) = self.jobs.get_mut(&id) else { return };
        let Some((here, there)) = answers.add(side, hashes) else { return };
        let (file, range, whole) = (*file, range.clone(), *whole);
        self.jobs.remove(&id);
        for block in 0..(range.end - range.start) / BLOCK_BYTES {
            let at = usize::try_from(block).expect("a batch is small");
            if here.get(at) == there.get(at) {
                continue;
            }
            let start = range.start + block * BLOCK_BYTES;
            let block = start..start + BLOCK_BYTES;
            if whole {
                self.verdict.unequal.insert(file, &block);
            } else {
                self.doubtful.push_back((file, block));
            }
        }
    }

    fn failed(&mut self, id: JobId, side: Side, errno: Errno, orders: &mut Vec<Order>) {
        let listing = match &self.phase {
            Phase::Listing(job, _) | Phase::Confirming(job, ..) | Phase::Naming(job, _) => *job == id,
            Phase::Walking | Phase::Over => false,
        };
        match self.jobs.remove(&id) {
            Some(Job::Hash { file, range, .. }) => {
                self.verdict.holder_unreadable |= side == Side::Holder;
                self.verdict.unequal.insert(file, &range);
                self.report(Difference { file, name: String::new(), what: Different::Unreadable(side, range, errno) });
            }
            Some(Job::Data { .. }) => self.broke(side, errno, orders),
            None if listing => self.broke(side, errno, orders),
            None => {}
        }
    }

    fn broke(&mut self, side: Side, errno: Errno, orders: &mut Vec<Order>) {
        self.phase = Phase::Over;
        orders.push(Order::Broke(side, errno));
    }

    /// What differs gets its names; what has none any more does not count.
    fn name(&mut self, here: &Tree, there: &Tree, orders: &mut Vec<Order>) {
        let gone = |id: FileId| here.get(id).is_none() || there.get(id).is_none();
        let runs: Vec<_> = self.verdict.unequal.runs().filter(|(file, _)| !gone(*file)).collect();
        let unreadable: Vec<_> = self.verdict.differences.iter_mut().filter(|one| one.name.is_empty()).collect();
        let mut told = Pages::default();
        for difference in unreadable {
            difference.name = path(here, difference.file);
            if let Different::Unreadable(_, range, _) = &difference.what {
                told.insert(difference.file, range);
            }
        }
        let mut unequal = Pages::default();
        runs.iter().for_each(|(file, run)| unequal.insert(*file, run));
        for (file, run) in unequal.without(&told).runs() {
            self.report(Difference { file, name: path(here, file), what: Different::Content(run) });
        }
        self.verdict.unequal = unequal;
        self.end(orders);
    }

    fn end(&mut self, orders: &mut Vec<Order>) {
        self.phase = Phase::Over;
        orders.push(Order::Done(std::mem::take(&mut self.verdict)));
    }
}

/// In what an entry differs, if it does.
fn compare(here: &Tree, there: &Tree, id: FileId) -> Option<Different> {
    let (mine, theirs) = match (here.get(id), there.get(id)) {
        (None, None) => return None,
        (Some(_), None) => return Some(Different::OnlyHere),
        (None, Some(_)) => return Some(Different::OnlyThere),
        (Some(mine), Some(theirs)) => (mine, theirs),
    };
    let parts = [
        ("kind", mine.kind != theirs.kind),
        ("names", mine.links != theirs.links),
        ("length", mine.size != theirs.size),
        ("mode", mine.mode != theirs.mode),
        ("owner", (mine.uid, mine.gid) != (theirs.uid, theirs.gid)),
        ("target", mine.target != theirs.target),
        ("extended attributes", mine.xattrs != theirs.xattrs),
    ];
    let different: Vec<&str> = parts.iter().filter(|(_, differs)| *differs).map(|(name, _)| *name).collect();
    (!different.is_empty()).then(|| Different::Entry(different.join(", ")))
}

/// One of a file's names, from the directory down.
fn path(tree: &Tree, id: FileId) -> String {
    let mut parts = Vec::new();
    let mut at = id;
    while let Some((parent, name)) = tree.get(at).and_then(|entry| entry.links.first()) {
        parts.push(String::from_utf8_lossy(name.as_bytes()).into_owned());
        at = *parent;
    }
    parts.reverse();
    match (parts.is_empty(), id == FileId::ROOT) {
        (false, _) => parts.join("/"),
        (true, true) => ".".to_owned(),
        (true, false) => format!("file {id}"),
    }
}
