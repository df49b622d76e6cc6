//! One node's disk: files as sectors with stamps, a tree, metadata files. What was not flushed may be lost in any part at
//! a power loss; blocks of the log may be torn.
use std::collections::BTreeMap;
use vmtwin_core::ids::FileId;
use vmtwin_core::limits::{PAGE_BYTES, RESYNC_DATA_RANGES_MAX};
use vmtwin_core::namespace::{Attrs, Errno, Op, Owner as Rights, Tree};
use vmtwin_core::replica::effect::{Marks, Work};
use vmtwin_core::replica::event::{RangeKind, Value};
use vmtwin_core::resync::Data;
use vmtwin_tests::Rng;

/// Half a page, so that a copy of a page can go wrong in one half.
pub const SECTOR: u64 = 2048;
/// What is in a sector; 0 is zeros.
pub type Stamp = u64;

/// What a job carries.
#[derive(Clone, Debug, Default)]
pub struct Payload {
    pub stamps: Vec<Stamp>,
    pub op: Option<Op>,
}

#[derive(Clone, Debug)]
enum Change {
    Write(u64, Vec<Stamp>),
    Zero(u64, u64, Option<u64>),
    Resize(u64),
}

/// Content as it is, in the page cache or on the medium.
#[derive(Clone, Debug)]
pub struct Content {
    pub tree: Tree,
    pub sectors: BTreeMap<(FileId, u64), Stamp>,
}

impl Content {
    fn new() -> Self {
        Self { tree: Tree::new(rights()), sectors: BTreeMap::new() }
    }

    pub fn size(&self, file: FileId) -> Option<u64> {
        self.tree.get(file).map(|entry| entry.size)
    }

    fn change(&mut self, file: FileId, change: &Change) {
        let Some(size) = self.size(file) else { return };
        match change {
            Change::Write(offset, stamps) => {
                for (at, stamp) in stamps.iter().enumerate() {
                    self.put(file, offset / SECTOR + at as u64, *stamp);
                }
                let end = offset + stamps.len() as u64 * SECTOR;
                self.tree.set_size(file, size.max(end));
            }
            Change::Zero(offset, length, grow_to) => {
                self.zero(file, offset / SECTOR, (offset + length) / SECTOR);
                self.tree.set_size(file, size.max(grow_to.unwrap_or(0)));
            }
            Change::Resize(to) => {
                self.zero(file, to / SECTOR, u64::MAX);
                self.tree.set_size(file, *to);
            }
        }
    }

    fn put(&mut self, file: FileId, sector: u64, stamp: Stamp) {
        if stamp == 0 {
            self.sectors.remove(&(file, sector));
        } else {
            self.sectors.insert((file, sector), stamp);
        }
    }

    fn zero(&mut self, file: FileId, from: u64, to: u64) {
        let gone: Vec<_> = self.sectors.range((file, from)..(file, to)).map(|(key, _)| *key).collect();
        for key in gone {
            self.sectors.remove(&key);
        }
    }

    pub fn get(&self, file: FileId, sector: u64) -> Stamp {
        self.sectors.get(&(file, sector)).copied().unwrap_or(0)
    }

    /// A namespace operation as the file system does it.
    fn apply(&mut self, op: &Op) -> Result<(), Errno> {
        let before = op.unlinks();
        self.tree.apply(op)?;
        if let Op::SetAttr { id, attrs: Attrs { size: Some(to), .. } } = op {
            self.zero(*id, to / SECTOR, u64::MAX);
        }
        if let Some(id) = before.filter(|id| self.tree.get(*id).is_none()) {
            self.zero(id, 0, u64::MAX);
        }
        Ok(())
    }

    /// Equal in what counts: names, sizes, content.
    pub fn difference(&self, other: &Content) -> Option<String> {
        if self.tree != other.tree {
            let (a, b) = (self.tree.entries(), other.tree.entries());
            let ids: std::collections::BTreeSet<_> = a.keys().chain(b.keys()).collect();
            let id = ids.into_iter().find(|id| a.get(id) != b.get(id)).expect("trees that differ do so in a file");
            return Some(format!("file {id}: {:?} and {:?}", a.get(id), b.get(id)));
        }
        let keys: std::collections::BTreeSet<_> = self.sectors.keys().chain(other.sectors.keys()).collect();
        keys.into_iter().find(|key| self.sectors.get(key) != other.sectors.get(key)).map(|(file, sector)| {
            format!("file {file} sector {sector}: {} and {}", self.get(*file, *sector), other.get(*file, *sector))
        })
    }
}

pub fn rights() -> Rights {
    Rights { mode: 0o700, uid: 0, gid: 0 }
}

/// The disk.
#[derive(Clone, Debug)]
pub struct Disk {
    /// As processes see it.
    pub now: Content,
    /// As the medium has it.
    durable: Content,
    names: Vec<Op>,
    data: BTreeMap<FileId, Vec<Change>>,
    pub log: Vec<u8>,
    pub map: Vec<u8>,
    pub marks: Marks,
    /// The next operation fails with this.
    pub fault: Option<Errno>,
}

impl Disk {
    pub fn new(log: Vec<u8>, map: Vec<u8>) -> Self {
        Self {
            now: Content::new(),
            durable: Content::new(),
            names: Vec::new(),
            data: BTreeMap::new(),
            log,
            map,
            marks: Marks::default(),
            fault: None,
        }
    }

    /// A sector changes by itself, on the medium, too.
    pub fn rot(&mut self, file: FileId, sector: u64, stamp: Stamp) {
        self.now.put(file, sector, stamp);
        self.durable.put(file, sector, stamp);
    }

    fn data(&mut self, file: FileId, change: Change) {
        self.now.change(file, &change);
        self.data.entry(file).or_default().push(change);
    }

    /// Does a job.
    pub fn work(&mut self, work: &Work, payload: &mut Payload) -> Result<Value, Errno> {
        if let Some(errno) = self.fault {
            return Err(errno);
        }
        let exists = |disk: &Self, file: FileId| disk.now.size(file).map(|_| ()).ok_or(Errno::ENOENT);
        match *work {
            Work::Write { file, offset, length } => {
                exists(self, file)?;
                assert_eq!(payload.stamps.len() as u64 * SECTOR, u64::from(length), "the payload is there");
                self.data(file, Change::Write(offset, payload.stamps.clone()));
            }
            Work::Range { file, kind, offset, length } => {
                exists(self, file)?;
                let end = Some(offset + length);
                match kind {
                    RangeKind::Punch | RangeKind::Zero { keep_size: true } => {
                        self.data(file, Change::Zero(offset, length, None));
                    }
                    RangeKind::Zero { keep_size: false } => self.data(file, Change::Zero(offset, length, end)),
                    RangeKind::Allocate { keep_size: false } => self.data(file, Change::Zero(offset, 0, end)),
                    RangeKind::Allocate { keep_size: true } => {}
                }
            }
            Work::Flush { file } => self.flush(file),
            Work::Namespace => {
                let op = payload.op.as_ref().expect("the operation is there");
                self.now.apply(op)?;
                match op {
                    Op::SetAttr { id, attrs: Attrs { size: Some(to), .. } } => {
                        self.data.entry(*id).or_default().push(Change::Resize(*to));
                    }
                    _ => self.names.push(op.clone()),
                }
            }
            Work::Read { file, offset, length } => {
                let size = self.now.size(file).unwrap_or(0);
                let length = size.saturating_sub(offset).min(u64::from(length));
                let first = offset / SECTOR;
                payload.stamps = (first..first + length / SECTOR).map(|sector| self.now.get(file, sector)).collect();
                let zeros = payload.stamps.iter().all(|stamp| *stamp == 0);
                return Ok(Value::Read { length: u32::try_from(length).unwrap(), zeros });
            }
            Work::Hash { file, offset, length, unit } => {
                let end = self.now.size(file).unwrap_or(0).min(offset + u64::from(length));
                let units = end.saturating_sub(offset).div_ceil(u64::from(unit));
                let hash = |nth: u64| {
                    // What lies beyond the end counts as zeros.
                    let start = offset + nth * u64::from(unit);
                    let mut hash = [0; 32];
                    let mut mixed = 0;
                    for sector in start / SECTOR..(start + u64::from(unit)) / SECTOR {
                        let mut rng = Rng::new(mixed ^ self.now.get(file, sector).rotate_left(17));
                        mixed = rng.bits();
                    }
                    hash[..8].copy_from_slice(&mixed.to_le_bytes());
                    hash
                };
                return Ok(Value::Hashes((0..units).map(hash).collect()));
            }
            Work::Data { file, from, length } => {
                let end = from.saturating_add(length);
                let range = (file, from / SECTOR)..(file, end / SECTOR);
                let found: Vec<u64> = self.now.sectors.range(range).map(|((_, sector), _)| *sector).collect();
                let mut ranges: Vec<std::ops::Range<u64>> = Vec::new();
                for sector in found {
                    let page = sector * SECTOR / PAGE_BYTES * PAGE_BYTES;
                    let full = ranges.len() == RESYNC_DATA_RANGES_MAX;
                    match ranges.last_mut() {
                        Some(last) if last.end >= page => last.end = page + PAGE_BYTES,
                        _ if full => return Ok(Value::Data(Data { ranges, until: page })),
                        _ => ranges.push(page..page + PAGE_BYTES),
                    }
                }
                if ranges.len() > RESYNC_DATA_RANGES_MAX {
                    ranges.truncate(RESYNC_DATA_RANGES_MAX);
                    let until = ranges.last().expect("as many as that").end;
                    return Ok(Value::Data(Data { ranges, until }));
                }
                let beyond = self.now.size(file).is_none_or(|size| size <= end);
                return Ok(Value::Data(Data { ranges, until: if beyond { u64::MAX } else { end } }));
            }
            Work::Tree => return Ok(Value::Tree(self.now.tree.pieces())),
        }
        Ok(Value::Nothing)
    }

    fn flush(&mut self, file: Option<FileId>) {
        for op in std::mem::take(&mut self.names) {
            let _ = self.durable.apply(&op);
        }
        let files: Vec<FileId> = self.data.keys().copied().filter(|id| file.is_none_or(|file| file == *id)).collect();
        for file in files {
            for change in self.data.remove(&file).unwrap_or_default() {
                self.durable.change(file, &change);
            }
        }
    }

    /// The power goes: of what was not flushed, the medium has some names up to a point, and any of the data.
    pub fn power_loss(&mut self, rng: &mut Rng) {
        let kept = rng.below(self.names.len() as u64 + 1);
        for op in self.names.drain(..).take(usize::try_from(kept).unwrap()) {
            let _ = self.durable.apply(&op);
        }
        let share = *rng.pick(&[0, 0, 500, 900]);
        for (file, changes) in std::mem::take(&mut self.data) {
            for change in changes.iter().filter(|_| rng.chance(share)) {
                self.durable.change(file, change);
            }
        }
        self.now = self.durable.clone();
    }

    /// A block of the log was being written when the power went: each 512 bytes of it are old or new.
    pub fn tear_log(&mut self, offset: u64, bytes: &[u8], rng: &mut Rng) {
        let offset = usize::try_from(offset).unwrap();
        for (nth, part) in bytes.chunks(512).enumerate() {
            if rng.chance(500) {
                self.log[offset + nth * 512..][..part.len()].copy_from_slice(part);
            }
        }
    }

    pub fn save_log(&mut self, offset: u64, bytes: &[u8]) {
        self.log[usize::try_from(offset).unwrap()..][..bytes.len()].copy_from_slice(bytes);
    }
}
