//! The resync against two small replicas: answers in any order, guest writes under way, cuts, lost unflushed writes.
//!
//! A page's content is one number, 0 a hole. A page beside the guest's and the resync's claims changes for nobody.
use super::*;
use crate::format::Owner as Module;
use crate::ids::{ModuleId, ReplicaId};
use crate::namespace::{Errno, FileName, Owner, Tree};
use proptest::prelude::*;
use std::collections::BTreeSet;

const OWNER: Owner = Owner { mode: 0o644, uid: 0, gid: 0 };
const MODULE: Module = Module { module: ModuleId(1), replica: ReplicaId(2) };
const ROOT: FileId = FileId::ROOT;
const PAGES: u64 = 600;
type Content = BTreeMap<(FileId, u64), u64>;

#[derive(Clone)]
struct Replica {
    tree: Tree,
    content: Content,
    durable: Content,
}

impl Replica {
    fn new() -> Self {
        Self { tree: Tree::new(OWNER), content: Content::new(), durable: Content::new() }
    }
    fn size(&self, file: FileId) -> u64 {
        self.tree.get(file).map_or(0, |entry| entry.size)
    }
    fn page(&self, file: FileId, page: u64) -> u64 {
        self.content.get(&(file, page)).copied().unwrap_or(0)
    }
    fn write(&mut self, file: FileId, page: u64, value: u64) {
        if self.tree.get(file).is_some() {
            self.content.insert((file, page), value);
            let size = self.size(file).max((page + 1) * PAGE_BYTES);
            self.tree.set_size(file, size);
        }
    }
    fn apply(&mut self, op: &Op) -> crate::namespace::Outcome {
        self.tree.apply(op)?;
        // What is cut off or gone reads as zeros when it comes again.
        let tree = &self.tree;
        let there = |(file, page): &(FileId, u64)| tree.get(*file).is_some_and(|e| page * PAGE_BYTES < e.size);
        self.content.retain(|at, _| there(at));
        self.durable.retain(|at, _| there(at));
        Ok(())
    }
    fn flush(&mut self) {
        self.durable = self.content.clone();
    }
    /// A crash: of what was not flushed each page is lost or not.
    fn lose(&mut self, random: &mut Random) {
        let pages: BTreeSet<_> = self.content.keys().chain(self.durable.keys()).copied().collect();
        for at in pages {
            if random.below(2) == 0 {
                match self.durable.get(&at) {
                    Some(old) => self.content.insert(at, *old),
                    None => self.content.remove(&at),
                };
            }
        }
        self.flush();
    }
    fn hashes(&self, file: FileId, range: &Range<u64>, unit: u64) -> Vec<[u8; 32]> {
        let end = range.end.min(self.size(file).next_multiple_of(PAGE_BYTES));
        (range.start..end)
            .step_by(unit as usize)
            .map(|start| {
                let mut hash = [0; 32];
                for page in start / PAGE_BYTES..(start + unit) / PAGE_BYTES {
                    let sum = u64::from_le_bytes(hash[..8].try_into().unwrap());
                    let mixed =
                        (sum ^ self.page(file, page)).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(23) + page;
                    hash[..8].copy_from_slice(&mixed.to_le_bytes());
                }
                hash
            })
            .collect()
    }
    /// At most `most` ranges with data.
    fn data(&self, file: FileId, from: u64, most: usize) -> Data {
        let mut ranges: Vec<Range<u64>> = Vec::new();
        for page in from / PAGE_BYTES..self.size(file).div_ceil(PAGE_BYTES) {
            if self.page(file, page) == 0 {
                continue;
            }
            let (start, full) = (page * PAGE_BYTES, ranges.len() == most);
            match ranges.last_mut() {
                Some(last) if last.end == start => last.end += PAGE_BYTES,
                _ if full => return Data { ranges, until: start },
                _ => ranges.push(start..start + PAGE_BYTES),
            }
        }
        Data { ranges, until: u64::MAX }
    }
}

/// A small generator, so that a seed replays.
struct Random(u64);
impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
}

/// An order that is being carried out.
struct Order {
    effect: Effect,
    /// What a copy has read.
    read: Option<Vec<(u64, u64)>>,
    asked: [bool; 2],
    claimed: bool,
}

struct World {
    random: Random,
    now: Time,
    holder: Replica,
    target: Replica,
    map: DirtyMap,
    saved: Vec<u8>,
    resync: Resync,
    orders: Vec<Order>,
    effects: Vec<Effect>,
    mirrored: bool,
    guest_writes: bool,
    /// A guest's write in hand: file, page, value, where it still has to go.
    guest: Vec<(FileId, u64, u64, bool, bool)>,
    /// Written by the guest on both sides and not flushed since: the activity log has it.
    unflushed: BTreeSet<(FileId, u64)>,
    claims: Vec<(FileId, Range<u64>)>,
    stamp: u64,
    copies_most: usize,
    joined: bool,
    sent_pages: u64,
    said: Vec<Effect>,
    unreadable: BTreeSet<(FileId, u64)>,
    /// Pages that the target's disk turns into something else as it writes them, once.
    corrupting: BTreeSet<(FileId, u64)>,
}

impl World {
    fn new(seed: u64, guest_writes: bool) -> Self {
        let mut effects = Vec::new();
        let resync = Resync::begin(Time(0), &mut effects);
        let mut world = Self {
            random: Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1),
            now: Time(0),
            holder: Replica::new(),
            target: Replica::new(),
            map: DirtyMap::default(),
            saved: DirtyMap::default().snapshot(MODULE, 0),
            resync,
            orders: Vec::new(),
            effects,
            mirrored: false,
            guest_writes,
            guest: Vec::new(),
            unflushed: BTreeSet::new(),
            claims: Vec::new(),
            stamp: 1,
            copies_most: 0,
            joined: false,
            sent_pages: 0,
            said: Vec::new(),
            unreadable: BTreeSet::new(),
            corrupting: BTreeSet::new(),
        };
        for n in 2..6 {
            let name = FileName::new(format!("f{n}")).unwrap();
            let op = Op::Create { parent: ROOT, name, id: FileId(n), owner: OWNER };
            world.holder.apply(&op).unwrap();
        }
        for _ in 0..300 {
            let (file, page) = world.place();
            let value = world.fresh();
            world.holder.write(file, page, value);
        }
        world.holder.flush();
        world.target = world.holder.clone();
        world
    }
    fn place(&mut self) -> (FileId, u64) {
        // Runs and lonely pages, over several batches.
        let page = if self.random.below(2) == 0 { self.random.below(40) } else { self.random.below(PAGES) };
        (FileId(2 + self.random.below(4)), page)
    }
    fn fresh(&mut self) -> u64 {
        self.stamp += 1;
        self.stamp
    }

    /// The target was away: the holder changed data and names, the target has things of its own in its suspect places.
    fn diverge(&mut self, writes: u64) {
        for _ in 0..writes {
            let (file, page) = self.place();
            let range = page * PAGE_BYTES..(page + 1) * PAGE_BYTES;
            match self.random.below(4) {
                0 | 1 => {
                    let value = if self.random.below(5) == 0 { 0 } else { self.fresh() };
                    self.holder.write(file, page, value);
                    self.map.mark(Mark::Send, file, &range);
                }
                2 => {
                    let extent = page / 16 * 16 * PAGE_BYTES..(page / 16 + 1) * 16 * PAGE_BYTES;
                    self.map.mark(Mark::Compare, file, &extent);
                    let value = self.fresh();
                    self.target.write(file, page, value);
                }
                _ => self.map.mark(Mark::Compare, file, &range),
            }
        }
        let size = self.random.below(PAGES) * PAGE_BYTES;
        let attrs = crate::namespace::Attrs { size: Some(size), uid: Some(7), ..Default::default() };
        let shorter = Op::SetAttr { id: FileId(3), attrs };
        let gone = Op::Unlink { parent: ROOT, name: FileName::new("f4").unwrap(), id: FileId(4) };
        let made = |id, name: &str| Op::Create { parent: ROOT, name: FileName::new(name).unwrap(), id, owner: OWNER };
        self.holder.apply(&made(FileId(8), "new")).unwrap();
        for page in [0, 1, 2, 250, 251, 590] {
            let value = self.fresh();
            self.holder.write(FileId(8), page, value);
        }
        // A truncation marks its range, as R11 has it.
        let before = self.holder.size(FileId(3));
        self.map.mark(Mark::Send, FileId(3), &(size.min(before)..size.max(before)));
        self.holder.apply(&shorter).unwrap();
        self.holder.apply(&gone).unwrap();
        self.target.apply(&made(FileId(9), "new")).unwrap();
        self.target.flush();
        self.saved = self.map.snapshot(MODULE, 1);
    }

    fn claim(&mut self, file: FileId, range: &Range<u64>) -> bool {
        let free = self.claims.iter().all(|(f, r)| *f != file || r.end <= range.start || range.end <= r.start);
        if free {
            self.claims.push((file, range.clone()));
        }
        free
    }
    fn unclaim(&mut self, file: FileId, range: &Range<u64>) {
        let at = self.claims.iter().position(|(f, r)| *f == file && r == range).expect("what is given up is held");
        self.claims.swap_remove(at);
    }

    fn step(&mut self, event: Event) {
        self.resync.step(self.now, event, &mut self.map, &mut self.effects);
        for effect in std::mem::take(&mut self.effects) {
            match effect {
                Effect::Mirror => self.mirrored = true,
                Effect::Join => {
                    assert!(!std::mem::replace(&mut self.joined, true), "once");
                }
                Effect::Progress(progress) => assert!(progress.bytes_done <= progress.bytes_total),
                Effect::Unreadable(..) | Effect::Unequal(..) | Effect::TreesDiffer(_) | Effect::Restarted => {
                    self.said.push(effect);
                }
                effect => {
                    self.mirrored &= !matches!(effect, Effect::Hold);
                    self.orders.push(Order { effect, read: None, asked: [false; 2], claimed: false });
                }
            }
        }
        let copies = self.orders.iter().filter(|o| matches!(o.effect, Effect::Copy { .. })).count();
        self.copies_most = self.copies_most.max(copies);
    }

    /// Carries one order a step further, if it can.
    fn advance(&mut self, which: usize) {
        let effect = self.orders[which].effect.clone();
        let side = usize::from(self.random.below(2) == 1);
        let sides = [Side::Holder, Side::Target];
        let event = match effect {
            Effect::Hold if self.guest.is_empty() => Event::Held,
            Effect::Hold => return,
            Effect::AskTrees(job) => {
                if std::mem::replace(&mut self.orders[which].asked[side], true) {
                    return;
                }
                let tree = [&self.holder, &self.target][side].tree.clone();
                self.finish_if_asked(which);
                return self.step(Event::Tree(job, sides[side], tree));
            }
            Effect::SaveMap(job) => {
                self.saved = self.map.snapshot(MODULE, job.0);
                Event::MapSaved(job)
            }
            Effect::Apply(job, op) => Event::Applied(job, self.target.apply(&op)),
            Effect::AskData { job, file, from, .. } => {
                if std::mem::replace(&mut self.orders[which].asked[side], true) {
                    return;
                }
                let data = [&self.holder, &self.target][side].data(file, from, 3);
                self.finish_if_asked(which);
                return self.step(Event::Data(job, sides[side], data));
            }
            Effect::Hash { job, file, offset, length, unit, claim } => {
                let range = offset..offset + u64::from(length);
                if claim && !self.orders[which].claimed {
                    self.orders[which].claimed = self.claim(file, &range);
                    return;
                }
                if std::mem::replace(&mut self.orders[which].asked[side], true) {
                    return;
                }
                let touched = range.start / PAGE_BYTES..range.end / PAGE_BYTES;
                if side == 0 && touched.clone().any(|page| self.unreadable.contains(&(file, page))) {
                    self.orders.swap_remove(which);
                    return self.step(Event::Failed(job, Errno::EIO));
                }
                let hashes = [&self.holder, &self.target][side].hashes(file, &range, u64::from(unit));
                if self.finish_if_asked(which) && claim {
                    self.unclaim(file, &range);
                }
                return self.step(Event::Hashes(job, sides[side], hashes));
            }
            Effect::Copy { job, file, offset, length } => {
                let range = offset..offset + u64::from(length);
                let pages = range.start / PAGE_BYTES..range.end / PAGE_BYTES;
                if !self.orders[which].claimed {
                    self.orders[which].claimed = self.claim(file, &range);
                    return;
                }
                let Some(read) = self.orders[which].read.take() else {
                    if pages.clone().any(|page| self.unreadable.contains(&(file, page))) {
                        self.unclaim(file, &range);
                        self.orders.swap_remove(which);
                        return self.step(Event::Failed(job, Errno::EIO));
                    }
                    let end = self.holder.size(file).div_ceil(PAGE_BYTES);
                    let read = pages.filter(|page| *page < end).map(|page| (page, self.holder.page(file, page)));
                    self.orders[which].read = Some(read.collect());
                    return;
                };
                for (page, mut value) in read.iter().copied() {
                    if self.corrupting.remove(&(file, page)) {
                        value += 1 << 40;
                    }
                    self.target.write(file, page, value);
                }
                self.unclaim(file, &range);
                let zeros = read.iter().all(|(_, value)| *value == 0);
                self.sent_pages += if zeros { 0 } else { read.len() as u64 };
                Event::Copied(job, if zeros { 0 } else { read.len() as u64 * PAGE_BYTES })
            }
            Effect::FlushBoth(job) => {
                self.holder.flush();
                self.target.flush();
                self.unflushed.retain(|at| self.guest.iter().any(|(f, p, ..)| (*f, *p) == *at));
                Event::Flushed(job)
            }
            _ => unreachable!("the others are no orders"),
        };
        self.orders.swap_remove(which);
        self.step(event);
    }
    fn finish_if_asked(&mut self, which: usize) -> bool {
        let done = self.orders[which].asked == [true; 2];
        if done {
            self.orders.swap_remove(which);
        }
        done
    }

    /// The guest begins a write, or one of its writes arrives somewhere. Returns false where it had nothing to do.
    fn guest(&mut self) {
        if !self.guest.is_empty() && self.random.below(2) == 0 {
            let which = self.random.below(self.guest.len() as u64) as usize;
            let (file, page, value, mut here, mut there) = self.guest[which];
            if self.random.below(2) == 0 {
                self.holder.write(file, page, value);
                here = true;
            } else {
                self.target.write(file, page, value);
                there = true;
            }
            self.guest[which] = (file, page, value, here, there);
            if here && there {
                self.guest.swap_remove(which);
                self.unclaim(file, &(page * PAGE_BYTES..(page + 1) * PAGE_BYTES));
            }
        } else if self.guest_writes && self.mirrored && self.guest.len() < 8 {
            let (file, page) = self.place();
            if self.holder.tree.get(file).is_some() && self.claim(file, &(page * PAGE_BYTES..(page + 1) * PAGE_BYTES)) {
                let value = self.fresh();
                self.guest.push((file, page, value, false, false));
                self.unflushed.insert((file, page));
            }
        }
    }

    fn run(&mut self, steps: u64) {
        for _ in 0..steps {
            if self.joined {
                return;
            }
            if self.orders.is_empty() || self.random.below(4) == 0 {
                self.guest();
            } else {
                let which = self.random.below(self.orders.len() as u64) as usize;
                self.advance(which);
            }
            if self.random.below(50) == 0 {
                self.now = self.now + millis(self.random.below(200));
                self.step(Event::Tick);
            }
        }
    }

    /// The session ends; the target, or both, lose power, or the holder's process starts anew; then all begins again.
    fn cut(&mut self) {
        for order in std::mem::take(&mut self.orders) {
            // What was on its way may arrive.
            if let (Effect::Copy { file, .. }, Some(read), 0) = (&order.effect, &order.read, self.random.below(2)) {
                for (page, value) in read {
                    self.target.write(*file, *page, *value);
                }
            }
        }
        for (file, page, value, here, _) in std::mem::take(&mut self.guest) {
            // The holder's own part of the write ends as it may; it was not acknowledged by both.
            if !here && self.random.below(2) == 0 {
                self.holder.write(file, page, value);
            }
        }
        if self.random.below(2) == 0 {
            self.target.lose(&mut self.random);
        }
        self.map.take_back();
        if self.random.below(3) == 0 {
            self.map = DirtyMap::load(MODULE, &self.saved).unwrap().1;
        }
        // The log: all that was in flight or not flushed.
        for (file, page) in std::mem::take(&mut self.unflushed) {
            self.map.mark(Mark::Compare, file, &(page * PAGE_BYTES..(page + 1) * PAGE_BYTES));
        }
        self.saved = self.map.snapshot(MODULE, 0);
        self.claims.clear();
        self.mirrored = false;
        self.resync = Resync::begin(self.now, &mut self.effects);
        self.begin();
    }

    fn begin(&mut self) {
        self.step(Event::Tick);
    }

    fn check_equal(&mut self) {
        assert!(self.joined, "it did not come to an end: {:?} {:?}", self.resync, self.said);
        while !self.guest.is_empty() {
            self.guest_writes = false;
            self.guest();
        }
        assert_eq!(self.holder.tree, self.target.tree);
        let keys: BTreeSet<_> = self.holder.content.keys().chain(self.target.content.keys()).copied().collect();
        for (file, page) in keys {
            assert_eq!(self.holder.page(file, page), self.target.page(file, page), "{file} page {page}");
            for side in [&self.holder, &self.target] {
                let durable = side.durable.get(&(file, page)).copied().unwrap_or(0) == side.page(file, page);
                assert!(durable || self.unflushed.contains(&(file, page)), "{file} page {page} was not flushed");
            }
        }
        assert!(self.map.is_empty());
        assert!(self.copies_most <= RESYNC_COPIES_MAX);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn two_replicas_are_equal_and_flushed_when_the_join_is_asked_for(seed: u64, writes in 0..200u64, guest: bool) {
        let mut world = World::new(seed, guest);
        world.diverge(writes);
        world.begin();
        world.run(400_000);
        world.check_equal();
        prop_assert!(world.said.is_empty(), "{:?}", world.said);
    }

    #[test]
    fn a_resync_that_is_cut_anywhere_is_finished_by_the_next(seed: u64, cuts in proptest::collection::vec(1..3000u64, 1..5)) {
        let mut world = World::new(seed, true);
        world.diverge(60);
        world.begin();
        for steps in cuts {
            world.run(steps);
            if !world.joined {
                world.cut();
            }
        }
        world.run(400_000);
        world.check_equal();
    }

    #[test]
    fn what_is_equal_does_not_travel(seed: u64, writes in 0..100u64) {
        let mut world = World::new(seed, false);
        world.diverge(writes);
        let marked = world.map.pages(Mark::Send).clone();
        let (mut wanted, end) = (marked.bytes() / PAGE_BYTES, PAGES + 1);
        for file in (2..10).map(FileId).filter(|file| world.holder.tree.get(*file).is_some()) {
            let differs = |page: &u64| world.holder.page(file, *page) != world.target.page(file, *page);
            let unmarked = |page: &u64| !marked.touches(file, &(page * PAGE_BYTES..page * PAGE_BYTES + 1));
            wanted += (0..end).filter(differs).filter(unmarked).count() as u64;
        }
        world.begin();
        world.run(400_000);
        world.check_equal();
        prop_assert!(world.sent_pages <= wanted, "{} pages sent, {wanted} differ", world.sent_pages);
    }
}

#[test]
fn what_was_written_wrong_is_found_by_the_proof_and_copied_again() {
    let mut world = World::new(7, false);
    let (file, page) = (FileId(2), 5);
    world.holder.write(file, page, 77);
    world.map.mark(Mark::Send, file, &(page * PAGE_BYTES..(page + 1) * PAGE_BYTES));
    world.corrupting.insert((file, page));
    world.begin();
    world.run(100_000);
    world.check_equal();
    assert_eq!(world.said, [Effect::Unequal(file, page * PAGE_BYTES)]);
}

#[test]
fn what_cannot_be_read_is_named_stays_dirty_and_refuses_the_join_until_it_can() {
    let mut world = World::new(7, false);
    let file = FileId(2);
    for page in [5, 100, 200] {
        let value = world.fresh();
        world.holder.write(file, page, value);
        world.map.mark(Mark::Send, file, &(page * PAGE_BYTES..(page + 1) * PAGE_BYTES));
    }
    world.unreadable.insert((file, 100));
    world.begin();
    world.run(20_000);
    let bad = 100 * PAGE_BYTES..101 * PAGE_BYTES;
    assert_eq!(world.said[0], Effect::Unreadable(file, bad.clone(), Errno::EIO));
    assert!(!world.joined && world.map.pages(Mark::Send).touches(file, &bad));
    assert_eq!(world.map.bytes(), PAGE_BYTES, "the others were copied");
    // Nothing moves for a minute: it says so, begins again, and now the disk gives it.
    world.unreadable.clear();
    world.now = world.now + millis(RESYNC_STALL_MS);
    world.step(Event::Tick);
    assert_eq!(world.said.last(), Some(&Effect::Restarted));
    world.run(100_000);
    world.check_equal();
}

#[test]
fn a_pass_without_progress_starts_again_and_drops_late_answers() {
    let mut world = World::new(7, false);
    let (file, range) = (FileId(2), 0..4 * PAGE_BYTES);
    for page in 0..4 {
        world.holder.write(file, page, 500 + page);
    }
    world.map.mark(Mark::Send, file, &range);
    world.begin();
    while !world.orders.iter().any(|order| matches!(order.effect, Effect::Copy { .. })) {
        world.run(1);
    }
    let Effect::Copy { job, .. } = world.orders.remove(0).effect else { unreachable!() };
    world.now = world.now + millis(RESYNC_STALL_MS - 1);
    world.step(Event::Tick);
    assert!(world.said.is_empty());
    world.now = world.now + millis(1);
    world.step(Event::Tick);
    assert_eq!(world.said, [Effect::Restarted]);
    world.step(Event::Copied(job, 4 * PAGE_BYTES));
    assert!(world.map.pages(Mark::Send).touches(file, &range), "an answer of the old pass settles nothing");
    world.run(100_000);
    world.check_equal();
}

#[test]
fn a_target_that_refuses_an_operation_is_named_and_asked_again_after_a_minute() {
    let mut world = World::new(7, false);
    world.diverge(0);
    world.begin();
    loop {
        let order = world.orders.iter().position(|order| matches!(order.effect, Effect::Apply(..)));
        if let Some(at) = order {
            let Effect::Apply(job, _) = world.orders.swap_remove(at).effect else { unreachable!() };
            world.step(Event::Applied(job, Err(Errno::ENOSPC)));
            break;
        }
        world.run(1);
    }
    assert_eq!(world.said, [Effect::TreesDiffer(Some(Errno::ENOSPC))]);
    assert!(world.orders.is_empty() && !world.mirrored);
    world.now = world.now + millis(RESYNC_STALL_MS);
    world.step(Event::Tick);
    world.run(100_000);
    world.check_equal();
}

#[test]
fn a_sparse_file_costs_by_its_data_not_by_its_length() {
    let mut world = World::new(7, false);
    let file = FileId(2);
    let size = 1 << 40;
    for side in [&mut world.holder, &mut world.target] {
        side.tree.set_size(file, size);
    }
    world.map.mark_whole(file, 0);
    let mut asked = 0;
    let mut hashed = 0;
    world.begin();
    while !world.joined {
        let orders = world.orders.len();
        assert!(orders > 0);
        // The answer of a file system: data in the first MiB of each side, a hole to the end.
        if let Some(at) = world.orders.iter().position(|order| matches!(order.effect, Effect::AskData { .. })) {
            let Effect::AskData { job, .. } = world.orders.swap_remove(at).effect else { unreachable!() };
            asked += 1;
            for side in [Side::Holder, Side::Target] {
                world.step(Event::Data(
                    job,
                    side,
                    Data { ranges: std::iter::once(0..1 << 20).collect(), until: u64::MAX },
                ));
            }
        } else {
            hashed += world.orders.iter().filter(|order| matches!(order.effect, Effect::Hash { .. })).count();
            world.run(1);
        }
    }
    assert!(asked == 1 && hashed < 1000);
    assert_eq!(world.resync.progress(&world.map).bytes_done, size);
    assert_eq!(world.sent_pages, 0);
}

#[test]
fn a_proof_is_by_blocks_where_whole_ones_were_copied_and_by_pages_elsewhere() {
    let page = PAGE_BYTES;
    assert_eq!(proof_of(&(3 * page..5 * page)), (3 * page..5 * page, page));
    assert_eq!(proof_of(&(3 * page..50 * page)), (3 * page..16 * page, page));
    assert_eq!(proof_of(&(16 * page..50 * page)), (16 * page..48 * page, BLOCK_BYTES));
    assert_eq!(proof_of(&(48 * page..50 * page)), (48 * page..50 * page, page));
}
