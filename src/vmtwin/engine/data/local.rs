//! Jobs of this node's disk: the core's `Work` as requests of the ring.
//!
//! Holds: jobs of several steps, and those that wait for a free slot. Decides: past the page cache or through it. Invariant:
//! each job ends with exactly one `Event::Done`; what it wrote counts as unflushed from the moment that it ended.
use super::{Data, Payload, Pending};
use crate::store::{Descriptors, Seek};
use rustix::io::Errno as OsErrno;
use std::collections::{HashMap, VecDeque};
use vmtwin_core::ids::FileId;
use vmtwin_core::limits::{BLOCK_BYTES, PAGE_BYTES, PAYLOAD_BYTES_MAX, RESYNC_DATA_RANGES_MAX};
use vmtwin_core::namespace::{Kind, Op};
use vmtwin_core::replica::effect::Work;
use vmtwin_core::replica::event::{Errno, Event, Job, RangeKind, Value, is_disk_fault};
use vmtwin_core::resync::Data as FileData;
use vmtwin_core::wire::codec::Reader;
use vmtwin_ring::{Completion, Descriptor, Shared, Slot};

/// Files of a flush of everything that are flushed at once.
const FLUSHES_MAX: usize = 32;

/// Step of a job that the ring has in hand.
#[derive(Debug)]
pub(super) enum Step {
    Write {
        job: Job,
        file: FileId,
        offset: u64,
        done: usize,
        length: usize,
        data: Shared,
    },
    /// `size`: what it was before, where it may grow.
    Range {
        job: Job,
        file: FileId,
        size: Option<u64>,
    },
    Flush {
        job: Job,
    },
    FlushPart {
        job: Job,
    },
    Read {
        job: Job,
        file: FileId,
        offset: u64,
        done: usize,
        length: usize,
    },
    Hash {
        job: Job,
        hash: Hashing,
        done: usize,
        length: usize,
    },
}

/// A range that is hashed, a slot's worth at a time.
#[derive(Debug)]
pub(super) struct Hashing {
    file: FileId,
    at: u64,
    end: u64,
    unit: u64,
    hashes: Vec<[u8; 32]>,
}

/// A flush of everything: files that wait, how many are being flushed, the first error.
struct Flushing {
    files: Vec<FileId>,
    running: usize,
    result: Result<(), Errno>,
}

#[derive(Default)]
pub(super) struct Local {
    flushes: HashMap<Job, Flushing>,
    /// Wait for a slot.
    starved: VecDeque<(Job, Work)>,
}

/// An errno as the core has it.
pub(super) fn errno(e: OsErrno) -> Errno {
    Errno(e.raw_os_error())
}

/// What a flush that did not take place means, whatever kept it from that: nobody may rely on what it was to make durable.
fn unflushed(e: OsErrno) -> OsErrno {
    if is_disk_fault(errno(e)) { e } else { OsErrno::IO }
}

fn flushed(result: Result<usize, Errno>) -> Result<(), Errno> {
    result.map(drop).map_err(|e| if is_disk_fault(e) { e } else { Errno::EIO })
}

/// A fault of the disk in words.
pub(super) fn describe(errno: Errno) -> String {
    format!("this node's disk failed: {}", std::io::Error::from_raw_os_error(errno.0))
}

/// The descriptor for a request: past the page cache where memory and range are aligned. Slots always are.
pub(super) fn descriptor(of: &Descriptors, offset: u64, length: u64) -> Descriptor {
    let aligned = offset.is_multiple_of(PAGE_BYTES) && length.is_multiple_of(PAGE_BYTES);
    of.direct.as_ref().filter(|_| aligned).unwrap_or(&of.buffered).clone()
}

impl Data {
    /// Begins a job.
    pub(super) fn begin(&mut self, job: Job, work: Work) {
        let at_once = matches!(work, Work::Namespace | Work::Data { .. } | Work::Tree);
        self.begin_one(job, work);
        if at_once {
            self.look_at_lease_again();
        }
    }

    fn begin_one(&mut self, job: Job, work: Work) {
        let begun = match work {
            Work::Write { file, offset, length } => {
                let Some(Payload::Slot(data)) = self.payloads.get(&job) else {
                    unreachable!("a write's data is there when it begins")
                };
                let data = data.clone();
                self.write_on(Step::Write { job, file, offset, done: 0, length: length as usize, data })
            }
            Work::Range { file, kind, offset, length } => self.range(job, file, kind, offset, length),
            Work::Flush { file: Some(file) } => self.flush_one(job, file).map_err(unflushed),
            Work::Flush { file: None } => {
                let files = self.store.take_unflushed().into_iter().collect();
                self.local.flushes.insert(job, Flushing { files, running: 0, result: Ok(()) });
                self.flush_more(job);
                Ok(())
            }
            Work::Namespace => {
                let result = self.namespace(job);
                return self.end_job(job, result.map(|()| Value::Nothing).map_err(errno));
            }
            Work::Read { .. } | Work::Hash { .. } => match self.pool.take() {
                None => {
                    self.local.starved.push_back((job, work));
                    Ok(())
                }
                Some(slot) => self.read_into(job, work, slot),
            },
            Work::Data { file, from, length } => self.data(file, from, length).map(|data| {
                self.end_job(job, Ok(Value::Data(data)));
            }),
            Work::Tree => self.store.list().map(|tree| {
                self.end_job(job, Ok(Value::Tree(tree.pieces())));
            }),
        };
        self.end_if_failed(job, begun);
    }

    fn end_job(&mut self, job: Job, result: Result<Value, Errno>) {
        self.events.push_back(Event::Done { job, result });
    }

    /// A write, or what is left of one: it keeps its data until it has ended, whether the core still wants it or not.
    fn write_on(&mut self, step: Step) -> Result<(), OsErrno> {
        let Step::Write { file, offset, done, length, ref data, .. } = step else { unreachable!("only this writes") };
        let (data, at) = (data.clone(), offset + done as u64);
        let files = self.store.descriptors(file)?;
        let fd = if done == 0 { descriptor(&files, at, length as u64) } else { files.buffered };
        let token = self.token(Pending::Local(step));
        self.ring.write(&fd, data, done..length, at, token);
        Ok(())
    }

    fn range(&mut self, job: Job, file: FileId, kind: RangeKind, offset: u64, length: u64) -> Result<(), OsErrno> {
        const KEEP_SIZE: i32 = 1;
        const PUNCH_HOLE: i32 = 2;
        const ZERO_RANGE: i32 = 16;
        let keep = |keep_size| if keep_size { KEEP_SIZE } else { 0 };
        let mode = match kind {
            RangeKind::Punch => PUNCH_HOLE | KEEP_SIZE,
            RangeKind::Zero { keep_size } => ZERO_RANGE | keep(keep_size),
            RangeKind::Allocate { keep_size } => keep(keep_size),
        };
        let fd = self.store.descriptors(file)?.buffered;
        let size = if mode & KEEP_SIZE == 0 { Some(self.store.size(file)?) } else { None };
        let token = self.token(Pending::Local(Step::Range { job, file, size }));
        self.ring.fallocate(&fd, mode, offset, length, token);
        Ok(())
    }

    fn flush_one(&mut self, job: Job, file: FileId) -> Result<(), OsErrno> {
        let kind = match self.store.kind(file) {
            Err(OsErrno::STALE) => {
                // Its last name went and nobody has it open: nothing of it is left to be durable.
                self.end_job(job, Ok(Value::Nothing));
                return Ok(());
            }
            other => other?,
        };
        let (fd, data_only) = match kind {
            Kind::File => (self.store.descriptors(file)?.buffered, !self.store.take_changed(file)),
            Kind::Directory => (self.store.folder_descriptor(file)?, false),
            _ => {
                self.end_job(job, Ok(Value::Nothing));
                return Ok(());
            }
        };
        let token = self.token(Pending::Local(Step::Flush { job }));
        self.ring.fsync(&fd, data_only, token);
        Ok(())
    }

    /// Goes on with a flush of everything: a few files at once, or a large folder would take all descriptors.
    fn flush_more(&mut self, job: Job) {
        loop {
            let flushing = self.local.flushes.get_mut(&job).expect("it is under way");
            if flushing.result.is_err() {
                flushing.files.clear();
            }
            let next = if flushing.running < FLUSHES_MAX { flushing.files.pop() } else { None };
            let Some(id) = next else {
                if flushing.running == 0 {
                    let result = flushing.result;
                    self.local.flushes.remove(&job);
                    self.end_job(job, result.map(|()| Value::Nothing));
                }
                return;
            };
            let fd = match self.store.kind(id) {
                Ok(Kind::File) => self.store.descriptors(id).map(|files| files.buffered),
                Ok(Kind::Directory) => self.store.folder_descriptor(id),
                Ok(_) | Err(_) => continue, // durable with its folder, or gone
            };
            let flushing = self.local.flushes.get_mut(&job).expect("it is under way");
            match fd {
                Ok(fd) => {
                    flushing.running += 1;
                    let token = self.token(Pending::Local(Step::FlushPart { job }));
                    self.ring.fsync(&fd, false, token);
                }
                Err(e) => flushing.result = Err(errno(unflushed(e))),
            }
        }
    }

    /// Where a file has data, from a byte on and not beyond a length.
    fn data(&mut self, file: FileId, from: u64, length: u64) -> Result<FileData, OsErrno> {
        let mut ranges = Vec::new();
        let (mut at, end) = (from, from.saturating_add(length));
        if self.files_if_there(file)?.is_none() {
            return Ok(FileData { ranges, until: u64::MAX });
        }
        while at < end && ranges.len() < RESYNC_DATA_RANGES_MAX {
            let start = match self.store.seek(file, at, Seek::Data) {
                Ok(start) => start,
                Err(OsErrno::NXIO) => return Ok(FileData { ranges, until: u64::MAX }),
                Err(e) => return Err(e),
            };
            if start >= end {
                at = end;
                break;
            }
            at = match self.store.seek(file, start, Seek::Hole) {
                Ok(hole) => hole.min(end),
                Err(OsErrno::NXIO) => start + 1, // it was cut meanwhile
                Err(e) => return Err(e),
            };
            ranges.push(start..at);
        }
        Ok(FileData { ranges, until: at })
    }

    /// The operation that is the job's payload.
    fn namespace(&mut self, job: Job) -> Result<(), OsErrno> {
        let Some(Payload::Bytes(bytes)) = self.payloads.get(&job) else {
            unreachable!("an operation's bytes are kept until the core releases them")
        };
        let mut from = Reader::new(bytes);
        let op = Op::decode(&mut from).and_then(|op| from.end().map(|()| op)).map_err(|_| OsErrno::BADMSG)?;
        self.apply(&op)
    }

    fn read_into(&mut self, job: Job, work: Work, slot: Slot) -> Result<(), OsErrno> {
        match work {
            Work::Read { file, offset, length } => {
                let length = length as usize;
                let Some(files) = self.files_if_there(file)? else {
                    self.end_job(job, Ok(Value::Read { length: 0, zeros: false }));
                    return Ok(());
                };
                let fd = descriptor(&files, offset, length as u64);
                let token = self.token(Pending::Local(Step::Read { job, file, offset, done: 0, length }));
                self.ring.read(&fd, slot, 0..length, offset, token);
            }
            Work::Hash { file, offset, length, unit } => {
                let end = offset + u64::from(length);
                let hash = Hashing { file, at: offset, end, unit: u64::from(unit), hashes: Vec::new() };
                self.hash_on(job, hash, slot)?;
            }
            _ => unreachable!("only these read"),
        }
        Ok(())
    }

    fn hash_on(&mut self, job: Job, hash: Hashing, slot: Slot) -> Result<(), OsErrno> {
        let Some(files) = self.files_if_there(hash.file)?.filter(|_| hash.at < hash.end) else {
            self.end_job(job, Ok(Value::Hashes(hash.hashes)));
            return Ok(());
        };
        let most = PAYLOAD_BYTES_MAX as u64 / hash.unit * hash.unit;
        let length = usize::try_from((hash.end - hash.at).min(most)).expect("a slot's worth");
        let fd = descriptor(&files, hash.at, length as u64);
        let at = hash.at;
        let token = self.token(Pending::Local(Step::Hash { job, hash, done: 0, length }));
        self.ring.read(&fd, slot, 0..length, at, token);
        Ok(())
    }

    fn files_if_there(&mut self, file: FileId) -> Result<Option<Descriptors>, OsErrno> {
        match self.store.descriptors(file) {
            Ok(files) => Ok(Some(files)),
            Err(OsErrno::STALE | OsErrno::INVAL | OsErrno::ISDIR) => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// The ring has ended a step.
    pub(super) fn local_done(&mut self, step: Step, done: Completion) {
        let result = match done.errno() {
            0 => Ok(done.result.as_ref().map_or(0, |count| *count as usize)),
            e => Err(Errno(e)),
        };
        match step {
            Step::Write { job, file, offset, done: before, length, data } => {
                self.store.touch(file);
                match result {
                    // A write that moves nothing would go round for ever.
                    Ok(0) => self.end_job(job, Err(Errno::EIO)),
                    Ok(count) if before + count < length => {
                        let on = Step::Write { job, file, offset, done: before + count, length, data };
                        let on = self.write_on(on);
                        self.end_if_failed(job, on);
                    }
                    other => self.end_job(job, other.map(|_| Value::Nothing)),
                }
            }
            Step::Range { job, file, size } => {
                self.store.touch(file);
                let result = match (result, size) {
                    // A file system that runs out of room half way may have grown the file so far.
                    (Err(e), Some(size)) => Err(self.store.truncate(file, size).map_or_else(errno, |()| e)),
                    (result, _) => result,
                };
                self.end_job(job, result.map(|_| Value::Nothing));
            }
            Step::Flush { job } => self.end_job(job, flushed(result).map(|()| Value::Nothing)),
            Step::FlushPart { job } => {
                let flushing = self.local.flushes.get_mut(&job).expect("its parts are counted");
                flushing.running -= 1;
                flushing.result = flushing.result.and(flushed(result));
                self.flush_more(job);
            }
            Step::Read { job, file, offset, done: before, length } => {
                let slot = done.into_slot().expect("a read has a slot to itself");
                match result {
                    Ok(count) if count > 0 && before + count < length => {
                        let at = before + count;
                        let on = self.read_on(Step::Read { job, file, offset, done: at, length }, file, slot, offset);
                        self.end_if_failed(job, on);
                    }
                    Ok(count) => {
                        let got = before + count;
                        let zeros = got > 0 && slot.payload()[..got].iter().all(|byte| *byte == 0);
                        self.payloads.insert(job, Payload::Slot(slot.share()));
                        let length = u32::try_from(got).expect("a slot's worth");
                        self.end_job(job, Ok(Value::Read { length, zeros }));
                    }
                    Err(e) => self.end_job(job, Err(e)),
                }
            }
            Step::Hash { job, mut hash, done: before, length } => {
                let slot = done.into_slot().expect("a read has a slot to itself");
                match result {
                    Ok(count) if count > 0 && before + count < length => {
                        let (file, offset) = (hash.file, hash.at);
                        let step = Step::Hash { job, hash, done: before + count, length };
                        let on = self.read_on(step, file, slot, offset);
                        self.end_if_failed(job, on);
                    }
                    Ok(count) => {
                        let got = before + count;
                        let unit = usize::try_from(hash.unit).expect("a unit fits a slot");
                        hash.hashes.extend(slot.payload()[..got].chunks(unit).map(|part| hash_unit(part, unit)));
                        // A short read is the end of the file.
                        hash.at = if got < length { hash.end } else { hash.at + length as u64 };
                        let on = self.hash_on(job, hash, slot);
                        self.end_if_failed(job, on);
                    }
                    Err(e) => self.end_job(job, Err(e)),
                }
            }
        }
    }

    fn end_if_failed(&mut self, job: Job, begun: Result<(), OsErrno>) {
        if let Err(e) = begun {
            self.end_job(job, Err(errno(e)));
        }
    }

    /// The rest of a read that came back short: the file's end, or only a part of what is there.
    fn read_on(&mut self, step: Step, file: FileId, slot: Slot, offset: u64) -> Result<(), OsErrno> {
        let (Step::Read { done, length, .. } | Step::Hash { done, length, .. }) = step else {
            unreachable!("only these read")
        };
        let fd = self.store.descriptors(file)?.buffered;
        let token = self.token(Pending::Local(step));
        self.ring.read(&fd, slot, done..length, offset + done as u64, token);
        Ok(())
    }

    /// Begins what waited for a slot.
    pub(super) fn feed_starved(&mut self) {
        while !self.local.starved.is_empty() && self.pool.free() > 0 {
            let (job, work) = self.local.starved.pop_front().expect("just seen");
            self.begin(job, work);
        }
    }
}

/// The hash of a unit. The end of a file counts as filled up with zeros: a write further on makes one side longer a little
/// before the other, and that alone is no difference.
fn hash_unit(part: &[u8], unit: usize) -> [u8; 32] {
    static ZEROS: [u8; BLOCK_BYTES as usize] = [0; BLOCK_BYTES as usize];
    let mut hasher = blake3::Hasher::new();
    hasher.update(part).update(&ZEROS[..unit - part.len()]);
    *hasher.finalize().as_bytes()
}
