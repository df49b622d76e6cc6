//! The VM: writes, reads, flushes and changes names, and knows what each of its cells may contain. A cell is a sector of a
//! file or a name in the root.
//!
//! A read may return the last acknowledged value, or one whose write was under way since; nothing older, nothing else.
use super::disk::{SECTOR, Stamp, rights};
use std::collections::BTreeMap;
use vmtwin_core::ids::FileId;
use vmtwin_core::namespace::{Attrs, FileName, Op, RenameMode, Tree};
use vmtwin_core::replica::event::{OpId, RangeKind, Request, Resize};
use vmtwin_tests::Rng;

/// Files with data; they are there from the beginning.
pub const FILES: [FileId; 3] = [FileId(10), FileId(11), FileId(12)];
const NAMES: u64 = 5;

/// What can be written and read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Cell {
    Sector(FileId, u64),
    Name(u64),
}

#[derive(Clone, Debug, Default)]
struct History {
    /// What may be in it now, and until when its write was under way.
    possible: Vec<(Stamp, u64)>,
    /// Writes under way.
    writing: Vec<(OpId, Stamp)>,
    /// All since the last flush: after the loss of every unflushed write it may be any of these.
    since_flush: Vec<(u64, Stamp)>,
}

#[derive(Clone, Debug)]
enum Doing {
    Change(u64, Vec<(Cell, Stamp)>),
    /// The count of changes when it began, and what may be in each cell then.
    Flush(u64, Vec<(Cell, Vec<Stamp>)>),
    Read(Cell, Vec<Stamp>, bool),
}

/// What the guest asks of the world.
pub enum Ask {
    Request { op: OpId, request: Request, stamps: Vec<Stamp>, change: Option<Op> },
    Read { op: OpId, file: FileId, sector: u64 },
}

pub struct Guest {
    rng: Rng,
    cells: BTreeMap<Cell, History>,
    doing: BTreeMap<OpId, Doing>,
    next_op: u64,
    next_stamp: u64,
    next_file: u64,
    count: u64,
    /// Where its VM runs.
    pub node: Option<usize>,
    pub acknowledged: u64,
    pub writes_only: bool,
    pub flushes: bool,
    /// Extents of each file that are used, and sectors at the beginning of each.
    extents: u64,
    sectors: u64,
}

pub fn name(n: u64) -> FileName {
    FileName::new(format!("n{n}")).unwrap()
}

impl Guest {
    pub fn new(rng: Rng) -> Self {
        let mut guest = Self {
            rng,
            cells: BTreeMap::new(),
            doing: BTreeMap::new(),
            next_op: 0,
            next_stamp: 0,
            next_file: 100,
            count: 0,
            node: None,
            acknowledged: 0,
            writes_only: false,
            flushes: true,
            extents: 0,
            sectors: 0,
        };
        guest.spread(6, 8);
        guest
    }

    /// It works on this many extents of each file, and sectors in each.
    pub fn spread(&mut self, extents: u64, sectors: u64) {
        (self.extents, self.sectors) = (extents, sectors);
        self.cells.clear();
        let files = FILES.iter().flat_map(|file| {
            (0..extents * sectors).map(|slot| Cell::Sector(*file, slot / sectors * 512 + slot % sectors))
        });
        for cell in files.chain((0..NAMES).map(Cell::Name)) {
            let blank = History { possible: vec![(0, 0)], writing: Vec::new(), since_flush: vec![(0, 0)] };
            self.cells.insert(cell, blank);
        }
    }

    fn any_sector(&mut self) -> u64 {
        self.rng.below(self.extents) * 512 + self.rng.below(self.sectors)
    }

    pub fn in_hand(&self) -> usize {
        self.doing.len()
    }

    fn op(&mut self) -> OpId {
        self.next_op += 1;
        OpId(self.next_op)
    }

    /// The next thing that it does; `tree` and `sizes` as the node shows them.
    pub fn next(&mut self, now: u64, tree: &Tree) -> Option<Ask> {
        let what = if self.writes_only { 0 } else { self.rng.below(100) };
        let file = *self.rng.pick(&FILES);
        match what {
            0..48 => {
                let extent = self.rng.below(self.extents);
                let (from, to) = (self.rng.below(self.sectors), self.rng.below(self.sectors));
                Some(self.write(now, file, extent * 512 + from.min(to), from.abs_diff(to) + 1))
            }
            48..75 => {
                let sector = self.any_sector();
                Some(self.read(Cell::Sector(file, sector)))
            }
            75..85 if self.flushes => {
                let file = self.rng.chance(800).then_some(file);
                Some(self.flush(file))
            }
            85..89 => {
                let first = self.rng.below(self.extents) * 512;
                let length = *self.rng.pick(&[2 * SECTOR, 8 * SECTOR, 3 << 20]);
                Some(self.zero(now, file, first * SECTOR, length))
            }
            89..92 => {
                let from = tree.get(file).map_or(0, |entry| entry.size);
                let to = self.any_sector() * SECTOR;
                Some(self.truncate(now, file, to, from))
            }
            92..100 => self.names(now, tree),
            _ => None,
        }
    }

    /// A write of `count` sectors.
    pub fn write(&mut self, now: u64, file: FileId, first: u64, count: u64) -> Ask {
        let op = self.op();
        let stamps: Vec<Stamp> = (0..count).map(|nth| (self.next_stamp + 1 + nth) << 8 | op.0 & 0xff).collect();
        self.next_stamp += count;
        let cells = (first..).zip(&stamps).map(|(sector, stamp)| (Cell::Sector(file, sector), *stamp)).collect();
        self.begin(op, now, cells);
        let length = u32::try_from(count * SECTOR).unwrap();
        Ask::Request { op, request: Request::Write { file, offset: first * SECTOR, length }, stamps, change: None }
    }

    pub fn read(&mut self, cell: Cell) -> Ask {
        let Cell::Sector(file, sector) = cell else { unreachable!("names are looked up") };
        let op = self.op();
        let history = &self.cells[&cell];
        let allowed = history.possible.iter().map(|(s, _)| *s).chain(history.writing.iter().map(|(_, s)| *s));
        let alone = history.writing.is_empty();
        self.doing.insert(op, Doing::Read(cell, allowed.collect(), alone));
        Ask::Read { op, file, sector }
    }

    pub fn flush(&mut self, file: Option<FileId>) -> Ask {
        let op = self.op();
        let covered = |cell: &Cell| match cell {
            Cell::Sector(id, _) => file.is_none_or(|file| file == *id),
            Cell::Name(_) => file.is_none(),
        };
        let cells = self.cells.iter().filter(|(cell, _)| covered(cell)).map(|(cell, history)| {
            let now = history.possible.iter().map(|(s, _)| *s).chain(history.writing.iter().map(|(_, s)| *s));
            (*cell, now.collect())
        });
        let flush = Doing::Flush(self.count, cells.collect());
        self.doing.insert(op, flush);
        Ask::Request { op, request: Request::Flush { file }, stamps: Vec::new(), change: None }
    }

    fn zero(&mut self, now: u64, file: FileId, offset: u64, length: u64) -> Ask {
        let op = self.op();
        let cells = self.sectors(file, offset / SECTOR, (offset + length) / SECTOR);
        self.begin(op, now, cells);
        let kind = *self.rng.pick(&[RangeKind::Punch, RangeKind::Zero { keep_size: true }]);
        Ask::Request { op, request: Request::Range { file, kind, offset, length }, stamps: Vec::new(), change: None }
    }

    fn sectors(&self, file: FileId, from: u64, to: u64) -> Vec<(Cell, Stamp)> {
        let range = Cell::Sector(file, from)..Cell::Sector(file, to);
        self.cells.range(range).map(|(cell, _)| (*cell, 0)).collect()
    }

    /// The file is made this long; it was `from` bytes long.
    pub fn truncate(&mut self, now: u64, file: FileId, to: u64, from: u64) -> Ask {
        let attrs = Attrs { size: Some(to), ..Attrs::default() };
        let cells = self.sectors(file, to / SECTOR, u64::MAX);
        self.change(now, Op::SetAttr { id: file, attrs }, Some(Resize { file, from, to }), cells)
    }

    /// One change of a name, none where one is under way.
    pub fn names(&mut self, now: u64, tree: &Tree) -> Option<Ask> {
        if self.cells.iter().any(|(cell, history)| matches!(cell, Cell::Name(_)) && !history.writing.is_empty()) {
            return None;
        }
        let found = |n: u64| tree.lookup(FileId::ROOT, &name(n));
        // It looks first, and what it sees must be right.
        for n in 0..NAMES {
            let stamp = found(n).map_or(0, |id| id.0);
            self.seen(Cell::Name(n), stamp, now);
        }
        let (a, b) = (self.rng.below(NAMES), self.rng.below(NAMES));
        let parent = FileId::ROOT;
        let (op, cells) = match (found(a), found(b)) {
            (None, _) => {
                self.next_file += 1;
                let id = FileId(self.next_file);
                (Op::Create { parent, name: name(a), id, owner: rights() }, vec![(Cell::Name(a), id.0)])
            }
            (Some(id), over) if a != b && self.rng.chance(600) => {
                let (new_parent, new_name) = (parent, name(b));
                let op =
                    Op::Rename { parent, name: name(a), id, new_parent, new_name, over, mode: RenameMode::Replace };
                (op, vec![(Cell::Name(a), 0), (Cell::Name(b), id.0)])
            }
            (Some(id), _) => (Op::Unlink { parent, name: name(a), id }, vec![(Cell::Name(a), 0)]),
        };
        Some(self.change(now, op, None, cells))
    }

    fn change(&mut self, now: u64, change: Op, resize: Option<Resize>, cells: Vec<(Cell, Stamp)>) -> Ask {
        let op = self.op();
        self.begin(op, now, cells);
        let mut files = [FileId(0); 4];
        for (to, from) in files.iter_mut().zip(change.files()) {
            *to = from;
        }
        let request = Request::Namespace { files, resize };
        Ask::Request { op, request, stamps: Vec::new(), change: Some(change) }
    }

    fn begin(&mut self, op: OpId, now: u64, cells: Vec<(Cell, Stamp)>) {
        self.count += 1;
        for (cell, stamp) in &cells {
            let history = self.cells.entry(*cell).or_default();
            history.writing.push((op, *stamp));
            history.since_flush.push((self.count, *stamp));
        }
        for doing in self.doing.values_mut() {
            if let Doing::Read(cell, allowed, alone) = doing
                && let Some((_, stamp)) = cells.iter().find(|(written, _)| written == cell)
            {
                allowed.push(*stamp);
                *alone = false;
            }
        }
        self.doing.insert(op, Doing::Change(now, cells));
    }

    /// The world answers a request well.
    pub fn answered(&mut self, op: OpId, now: u64) {
        let Some(doing) = self.doing.remove(&op) else { return };
        self.acknowledged += 1;
        match doing {
            Doing::Change(began, cells) => {
                for (cell, stamp) in cells {
                    let history = self.cells.get_mut(&cell).unwrap();
                    history.writing.retain(|(writer, _)| *writer != op);
                    history.possible.retain(|(_, ended)| *ended > began);
                    history.possible.push((stamp, now));
                }
            }
            Doing::Flush(count, cells) => {
                for (cell, then) in cells {
                    let history = self.cells.get_mut(&cell).unwrap();
                    history.since_flush.retain(|(nth, stamp)| *nth > count || then.contains(stamp));
                }
            }
            Doing::Read(..) => unreachable!("reads are answered with a value"),
        }
    }

    /// The world refuses a namespace operation: nothing was changed.
    pub fn refused(&mut self, op: OpId) {
        let Some(Doing::Change(_, cells)) = self.doing.remove(&op) else { return };
        for (cell, _) in cells {
            self.cells.get_mut(&cell).unwrap().writing.retain(|(writer, _)| *writer != op);
        }
    }

    /// The world answers a read.
    ///
    /// # Panics
    /// Where it returns what it must not.
    pub fn read_answered(&mut self, op: OpId, stamp: Stamp, now: u64) {
        let Some(Doing::Read(cell, allowed, alone)) = self.doing.remove(&op) else { return };
        assert!(allowed.contains(&stamp), "a read of {cell:?} returned {stamp}, allowed are {allowed:?}");
        if alone {
            self.seen(cell, stamp, now);
        }
    }

    /// What is in a cell was seen while nothing was written to it.
    ///
    /// # Panics
    /// Where it must not be there.
    pub fn seen(&mut self, cell: Cell, stamp: Stamp, now: u64) {
        let history = self.cells.get_mut(&cell).unwrap();
        let known = history.possible.iter().any(|(one, _)| *one == stamp);
        assert!(known, "{cell:?} contains {stamp}, possible are {:?} (lost or stale)", history.possible);
        history.possible = vec![(stamp, now)];
    }

    /// The VM died: what was under way may have happened or not, and is over.
    pub fn crash(&mut self, now: u64) {
        for (op, doing) in std::mem::take(&mut self.doing) {
            let Doing::Change(_, cells) = doing else { continue };
            for (cell, stamp) in cells {
                let history = self.cells.get_mut(&cell).unwrap();
                history.writing.retain(|(writer, _)| *writer != op);
                history.possible.push((stamp, now));
            }
        }
        self.node = None;
    }

    /// The last replica lost what it had not flushed, as one disk does.
    pub fn unflushed_lost(&mut self, now: u64) {
        for history in self.cells.values_mut() {
            history.possible = history.since_flush.iter().map(|(_, stamp)| (*stamp, now)).collect();
        }
    }

    /// Everything is read while nothing is under way.
    pub fn check_all(&mut self, now: u64, read: impl Fn(Cell) -> Stamp) {
        assert!(self.doing.is_empty(), "quiet");
        for cell in self.cells.keys().copied().collect::<Vec<_>>() {
            self.seen(cell, read(cell), now);
        }
    }
}
