//! What comes through the mount, and its answers.
//!
//! Decides: what this node may serve by its role and the core's gate; everything that changes data goes to the core. Holds:
//! requests that wait for the core, for the gate, or behind a namespace operation on their file.
//! Invariant: a file is opened for writing, and a name or attribute changed, only on the holder (EROFS elsewhere); reads on
//! the holder only while its lease lasts.
use super::{Data, Payload, Pending, SLOTS_KEPT, local};
use crate::store::Seek;
use rustix::fs::Stat;
use rustix::io::Errno;
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::time::Duration;
use vmtwin_core::ids::FileId;
use vmtwin_core::limits::{FILE_BYTES_MAX, FILE_NAME_BYTES_MAX};
use vmtwin_core::namespace::Kind;
use vmtwin_core::replica::event::{Errno as CoreErrno, Event, Job, OpId, RangeKind, Request as CoreRequest};
use vmtwin_core::replica::{Gate, Role};
use vmtwin_frontend::fuse::{
    Attr, Directory, Entry, Event as MountEvent, FileSystem, Listed, Operation, Reply, Request, Ticket, Timestamp,
};
use vmtwin_ring::{Completion, Slot};

/// Neither names nor attributes are believed by the kernel for long: roles change.
const VALID: Duration = Duration::ZERO;

/// A request of the mount that the ring has in hand, beside the core.
#[derive(Debug)]
pub(super) enum Step {
    /// So many bytes are in the slot already.
    Read(Ticket, Reading, u32),
    /// A write to a file without a name: no replica will ever need it.
    Write(Ticket),
    /// The same, a flush or a range.
    Done(Ticket),
}

/// A read, so that it can be begun again.
#[derive(Clone, Copy, Debug)]
pub(super) struct Reading {
    file: FileId,
    offset: u64,
    size: u32,
}

/// What to say when the core has completed a request.
#[derive(Debug)]
pub(super) enum After {
    Written(u32),
    Done,
    Entry(FileId),
    Attr(FileId),
    Created(FileId, u64),
}

/// A request that waits for the gate.
#[derive(Debug)]
enum Held {
    Read(Ticket, Reading),
    Other(Request),
}

#[derive(Default)]
pub(super) struct Guest {
    next_op: u64,
    /// In the core's hands.
    waiting: HashMap<OpId, (Ticket, After)>,
    /// Wait for the gate, in order.
    held: VecDeque<Held>,
    /// The gate has let nothing through since the last look.
    pub(super) names: super::names::Names,
    /// Open handles by file.
    opens: BTreeMap<FileId, u64>,
    /// Listings of open folders.
    folders: HashMap<u64, Vec<(Vec<u8>, FileId, Kind)>>,
    next_handle: u64,
    /// The mount had more requests than slots.
    pub(super) short_of_slots: bool,
}

impl Guest {
    pub fn in_hand(&self) -> usize {
        self.held.len() + self.names.waiting()
    }
}

/// How a request may be served now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    /// By the holder.
    Holder,
    /// Read only.
    Reader,
    Held,
    Failing,
}

impl Data {
    /// Takes in what the mount has.
    pub(super) fn serve_mount(&mut self) {
        loop {
            if self.pool.free() <= SLOTS_KEPT {
                self.guest.short_of_slots = true;
                return;
            }
            let Some(fuse) = &mut self.fuse else { return };
            match fuse.next(&self.pool) {
                MountEvent::Request(request) => self.request(request),
                MountEvent::Forget(_) => {}
                MountEvent::Interrupt(id) => self.interrupted(id),
                MountEvent::Empty => return,
                MountEvent::Ended => {
                    // What is written to the directory from now on would be on this node only, unseen.
                    if !self.control.is_ending() {
                        self.fail("the mount over the module's directory was taken away".to_owned());
                    }
                    return;
                }
                MountEvent::NoSlot => {
                    self.guest.short_of_slots = true;
                    return;
                }
            }
        }
    }

    /// Looks again at what waits for the gate.
    pub(super) fn serve_held(&mut self) {
        if self.guest.held.is_empty() || self.way() == Way::Held {
            return;
        }
        for held in std::mem::take(&mut self.guest.held) {
            match held {
                Held::Read(ticket, reading) => self.read(ticket, reading),
                Held::Other(request) => self.request(request),
            }
        }
    }

    /// The caller got a signal. What is held for the gate can end; what the core has cannot.
    fn interrupted(&mut self, id: u64) {
        let is_it = |held: &Held| match held {
            Held::Read(ticket, _) => ticket.id() == id,
            Held::Other(request) => request.ticket.id() == id,
        };
        if let Some(at) = self.guest.held.iter().position(is_it) {
            let ticket = match self.guest.held.remove(at).expect("just found") {
                Held::Read(ticket, _) => ticket,
                Held::Other(request) => request.ticket,
            };
            self.refuse(ticket, Errno::INTR);
        }
    }

    pub(super) fn way(&self) -> Way {
        match (self.core.role(), self.core.gate()) {
            (_, Gate::Failing) => Way::Failing,
            (Role::Holder, Gate::Open) => Way::Holder,
            (Role::Holder, Gate::Held) => Way::Held,
            _ => Way::Reader,
        }
    }

    pub(super) fn answer(&mut self, ticket: Ticket, reply: &Reply<'_>) {
        if let Some(fuse) = &mut self.fuse {
            fuse.reply(ticket, reply);
        }
    }

    pub(super) fn refuse(&mut self, ticket: Ticket, e: Errno) {
        self.answer(ticket, &Reply::Error(e));
    }

    /// Answers with what a closure finds, or its error.
    fn answer_with(&mut self, ticket: Ticket, found: Result<Reply<'_>, Errno>) {
        self.answer(ticket, &found.unwrap_or_else(Reply::Error));
    }

    fn request(&mut self, request: Request) {
        let Request { ticket, node, caller, operation } = request;
        // What follows is told apart by whether it needs the holder; the names of files are another page (`names`).
        match operation {
            Operation::Read { offset, size, .. } => self.read(ticket, Reading { file: node, offset, size }),
            Operation::Write { offset, size, slot, .. } => self.write(ticket, node, offset, size, slot),
            operation if self.guest.names.concerns(node) && is_ranged(&operation) => {
                let request = Request { ticket, node, caller, operation };
                self.guest.names.wait_behind(request);
            }
            operation if super::names::changes(&operation) => {
                self.name_request(Request { ticket, node, caller, operation });
            }
            Operation::FSync { data_only, .. } => self.flush(ticket, node, data_only),
            Operation::FSyncDir { .. } => self.flush(ticket, node, false),
            Operation::FAllocate { offset, length, mode, .. } => {
                self.allocate(ticket, node, offset, length, mode);
            }
            Operation::Open { flags } if opens_for_writing(flags) => match self.way() {
                Way::Reader => self.refuse(ticket, Errno::ROFS),
                Way::Failing => self.refuse(ticket, Errno::IO),
                Way::Held => {
                    let operation = Operation::Open { flags };
                    let request = Request { ticket, node, caller, operation };
                    self.guest.held.push_back(Held::Other(request));
                }
                Way::Holder => self.open(ticket, node, flags),
            },
            operation => self.look(ticket, node, operation),
        }
    }

    /// What only looks: answered at once, on every node.
    fn look(&mut self, ticket: Ticket, node: FileId, operation: Operation) {
        match operation {
            Operation::Lookup { name } => {
                let found = self.store.lookup(node, &name).and_then(|id| self.entry(id)).map(Reply::Entry);
                self.answer_with(ticket, found);
            }
            Operation::GetAttr { .. } => {
                let found = self.attr(node).map(|attr| Reply::Attr(attr, VALID));
                self.answer_with(ticket, found);
            }
            Operation::ReadLink => match self.store.read_link(node) {
                Ok(target) => self.answer(ticket, &Reply::Data(&target)),
                Err(e) => self.refuse(ticket, e),
            },
            Operation::Open { flags } => self.open(ticket, node, flags),
            Operation::Release { .. } => {
                self.answer(ticket, &Reply::Done);
                self.closed(node);
            }
            Operation::StatFs => {
                let found = self.room().map(Reply::FileSystem);
                self.answer_with(ticket, found);
            }
            Operation::GetXattr { name, size } => {
                let value = self.store.attribute(node, &name);
                self.answer_sized(ticket, value, size);
            }
            Operation::ListXattr { size } => {
                let names = self.store.attribute_names(node);
                let list = names.map(|all| all.iter().flat_map(|n| n.iter().copied().chain([0])).collect());
                self.answer_sized(ticket, list, size);
            }
            Operation::OpenDir { .. } => match self.listing(node) {
                Ok(listing) => {
                    self.guest.next_handle += 1;
                    let handle = self.guest.next_handle;
                    self.guest.folders.insert(handle, listing);
                    self.answer(ticket, &Reply::Opened(handle));
                }
                Err(e) => self.refuse(ticket, e),
            },
            Operation::ReadDir { handle, offset, size, plus } => {
                let found = self.read_folder(node, handle, offset, size, plus).map(Reply::Directory);
                self.answer_with(ticket, found);
            }
            Operation::ReleaseDir { handle } => {
                self.guest.folders.remove(&handle);
                self.answer(ticket, &Reply::Done);
            }
            Operation::LSeek { offset, whence, .. } => {
                const SEEK_DATA: u32 = 3;
                let what = if whence == SEEK_DATA { Seek::Data } else { Seek::Hole };
                let found = self.store.seek(node, offset, what).map(Reply::Sought);
                self.answer_with(ticket, found);
            }
            _ => unreachable!("`request` has sent everything else elsewhere"),
        }
    }

    fn open(&mut self, ticket: Ticket, node: FileId, flags: u32) {
        match self.store.kind(node) {
            Ok(Kind::File) => {
                self.opened(node);
                self.answer(ticket, &Reply::Opened(u64::from(flags)));
            }
            Ok(Kind::Directory) => self.refuse(ticket, Errno::ISDIR),
            Ok(_) => self.refuse(ticket, Errno::NXIO),
            Err(e) => self.refuse(ticket, e),
        }
    }

    pub(super) fn opened(&mut self, node: FileId) {
        *self.guest.opens.entry(node).or_default() += 1;
    }

    fn closed(&mut self, node: FileId) {
        if let Some(count) = self.guest.opens.get_mut(&node) {
            *count -= 1;
            if *count == 0 {
                self.guest.opens.remove(&node);
                self.forget_if_unused(node);
            }
        }
    }

    /// A file without a name goes with its last handle, and when the peer knows that the name is gone.
    pub(super) fn forget_if_unused(&mut self, file: FileId) {
        let wanted = self.guest.opens.contains_key(&file) || self.guest.names.concerns(file);
        if self.store.is_parked(file) && !wanted {
            // What cannot be removed now is at the next start.
            let _ = self.store.forget(file);
        }
    }

    /// A new holder: nobody here has a file of the old one's open.
    pub(super) fn forget_parked(&mut self) {
        for file in self.store.parked() {
            self.forget_if_unused(file);
        }
    }

    // --- reads

    fn read(&mut self, ticket: Ticket, reading: Reading) {
        match self.way() {
            Way::Failing => return self.refuse(ticket, Errno::IO),
            Way::Held => return self.guest.held.push_back(Held::Read(ticket, reading)),
            Way::Holder | Way::Reader => {}
        }
        let Reading { file, offset, size } = reading;
        let files = match self.store.descriptors(file) {
            Ok(files) => files,
            Err(e) => return self.refuse(ticket, e),
        };
        // The last slots are for the peer; a read that finds none left comes again with the next completion.
        let Some(slot) = self.pool.take() else {
            return self.guest.held.push_back(Held::Read(ticket, reading));
        };
        let fd = local::descriptor(&files, offset, u64::from(size));
        let token = self.token(Pending::Guest(Step::Read(ticket, reading, 0)));
        self.ring.read(&fd, slot, 0..size as usize, offset, token);
    }

    pub(super) fn guest_done(&mut self, step: Step, done: Completion) {
        let result = match done.errno() {
            0 => Ok(done.result.as_ref().map_or(0, |count| *count)),
            e => Err(Errno::from_raw_os_error(e)),
        };
        match (step, result) {
            (Step::Read(ticket, reading, before), Ok(count)) => {
                let slot = done.into_slot().expect("a read has a slot to itself");
                self.read_done(ticket, reading, (before, count), slot);
            }
            (Step::Read(ticket, reading, _), Err(e)) => self.read_failed(ticket, reading, e),
            (Step::Write(ticket), Ok(count)) => self.answer(ticket, &Reply::Written(count)),
            (Step::Done(ticket), Ok(_)) => self.answer(ticket, &Reply::Done),
            (Step::Write(ticket) | Step::Done(ticket), Err(e)) => self.refuse(ticket, e),
        }
    }

    fn read_failed(&mut self, ticket: Ticket, reading: Reading, e: Errno) {
        self.events.push_back(Event::ReadFailed(local::errno(e)));
        self.step();
        match self.way() {
            Way::Held => self.guest.held.push_back(Held::Read(ticket, reading)),
            _ => self.refuse(ticket, e),
        }
    }

    fn read_done(&mut self, ticket: Ticket, reading: Reading, (before, count): (u32, u32), slot: Slot) {
        match self.way() {
            Way::Held => return self.guest.held.push_back(Held::Read(ticket, reading)),
            Way::Failing => return self.refuse(ticket, Errno::IO),
            Way::Holder | Way::Reader => {}
        }
        let Reading { file, offset, size } = reading;
        let got = before + count;
        // Short, but not at the end of the file: the rest says why, be it a bad block.
        if count > 0 && got < size && self.store.size(file).is_ok_and(|there| offset + u64::from(got) < there) {
            match self.store.descriptors(file) {
                Ok(files) => {
                    let token = self.token(Pending::Guest(Step::Read(ticket, reading, got)));
                    let rest = got as usize..size as usize;
                    self.ring.read(&files.buffered, slot, rest, offset + u64::from(got), token);
                }
                Err(e) => self.refuse(ticket, e),
            }
            return;
        }
        self.figures.reads += 1;
        self.figures.read_bytes += u64::from(got);
        self.answer(ticket, &Reply::Data(&slot.payload()[..got as usize]));
    }

    // --- changes of data

    fn write(&mut self, ticket: Ticket, file: FileId, offset: u64, size: u32, slot: Slot) {
        if self.way() == Way::Reader {
            // Opened when this node was the holder.
            return self.refuse(ticket, Errno::ROFS);
        }
        if offset.saturating_add(u64::from(size)) > FILE_BYTES_MAX {
            return self.refuse(ticket, Errno::FBIG);
        }
        if size == 0 {
            return self.answer(ticket, &Reply::Written(0));
        }
        if self.guest.names.concerns(file) {
            let operation = Operation::Write { handle: 0, offset, size, slot };
            let caller = vmtwin_frontend::fuse::Caller { uid: 0, gid: 0, pid: 0 };
            return self.guest.names.wait_behind(Request { ticket, node: file, caller, operation });
        }
        if self.store.is_parked(file) {
            let Ok(files) = self.store.descriptors(file) else { return self.refuse(ticket, Errno::STALE) };
            let fd = local::descriptor(&files, offset, u64::from(size));
            let token = self.token(Pending::Guest(Step::Write(ticket)));
            self.ring.write(&fd, slot, 0..size as usize, offset, token);
            return;
        }
        self.figures.writes += 1;
        self.figures.written_bytes += u64::from(size);
        let request = CoreRequest::Write { file, offset, length: size };
        let op = self.ask(ticket, After::Written(size));
        self.payloads.insert(Job::Guest(op), Payload::Slot(slot.share()));
        self.events.push_back(Event::Guest { op, request });
    }

    fn flush(&mut self, ticket: Ticket, node: FileId, data_only: bool) {
        self.figures.flushes += 1;
        if self.core.role() != Role::Holder || self.store.is_parked(node) {
            // What this node may not change it has nothing of its own to flush of.
            let flushed = match self.store.descriptors(node) {
                Ok(files) => files,
                Err(_) => return self.answer(ticket, &Reply::Done),
            };
            let token = self.token(Pending::Guest(Step::Done(ticket)));
            self.ring.fsync(&flushed.buffered, data_only, token);
            return;
        }
        let op = self.ask(ticket, After::Done);
        self.events.push_back(Event::Guest { op, request: CoreRequest::Flush { file: Some(node) } });
    }

    fn allocate(&mut self, ticket: Ticket, file: FileId, offset: u64, length: u64, mode: u32) {
        let kind = match mode {
            0 => RangeKind::Allocate { keep_size: false },
            1 => RangeKind::Allocate { keep_size: true },
            3 => RangeKind::Punch,
            0x10 => RangeKind::Zero { keep_size: false },
            0x11 => RangeKind::Zero { keep_size: true },
            _ => return self.refuse(ticket, Errno::OPNOTSUPP),
        };
        if self.way() == Way::Reader {
            return self.refuse(ticket, Errno::ROFS);
        }
        if offset.checked_add(length).is_none_or(|end| end > FILE_BYTES_MAX) {
            return self.refuse(ticket, Errno::FBIG);
        }
        if self.store.is_parked(file) {
            let Ok(files) = self.store.descriptors(file) else { return self.refuse(ticket, Errno::STALE) };
            let token = self.token(Pending::Guest(Step::Done(ticket)));
            self.ring.fallocate(&files.buffered, mode.cast_signed(), offset, length, token);
            return;
        }
        let op = self.ask(ticket, After::Done);
        self.events.push_back(Event::Guest { op, request: CoreRequest::Range { file, kind, offset, length } });
    }

    /// Numbers a request for the core.
    pub(super) fn ask(&mut self, ticket: Ticket, after: After) -> OpId {
        self.guest.next_op += 1;
        let op = OpId(self.guest.next_op);
        self.guest.waiting.insert(op, (ticket, after));
        op
    }

    /// The core has completed a request.
    pub(super) fn complete(&mut self, op: OpId, result: Result<(), CoreErrno>) {
        let (ticket, after) = self.guest.waiting.remove(&op).expect("the core completes each request once");
        match result {
            Err(e) => self.refuse(ticket, Errno::from_raw_os_error(e.0)),
            Ok(()) => match after {
                After::Written(size) => self.answer(ticket, &Reply::Written(size)),
                After::Done => self.answer(ticket, &Reply::Done),
                After::Entry(id) => {
                    let found = self.entry(id).map(Reply::Entry);
                    self.answer_with(ticket, found);
                }
                After::Attr(id) => {
                    let found = self.attr(id).map(|attr| Reply::Attr(attr, VALID));
                    self.answer_with(ticket, found);
                }
                After::Created(id, handle) => match self.entry(id) {
                    Ok(entry) => {
                        self.opened(id);
                        self.answer(ticket, &Reply::Created(entry, handle));
                    }
                    Err(e) => self.refuse(ticket, e),
                },
            },
        }
        self.name_completed(op);
    }

    /// Requests that waited behind a namespace operation.
    pub(super) fn again(&mut self, requests: Vec<Request>) {
        for request in requests {
            self.request(request);
        }
    }

    // --- what is shown

    pub(super) fn attr(&self, id: FileId) -> Result<Attr, Errno> {
        self.store.stat(id).map(|stat| shown(id, &stat))
    }

    fn entry(&self, id: FileId) -> Result<Entry, Errno> {
        Ok(Entry { attr: self.attr(id)?, name_valid: VALID, attr_valid: VALID })
    }

    fn room(&self) -> Result<FileSystem, Errno> {
        let room = self.store.room()?;
        Ok(FileSystem {
            blocks: room.f_blocks,
            blocks_free: room.f_bfree,
            blocks_available: room.f_bavail,
            files: room.f_files,
            files_free: room.f_ffree,
            block_bytes: u32::try_from(room.f_bsize).unwrap_or(4096),
            fragment_bytes: u32::try_from(room.f_frsize).unwrap_or(4096),
            name_bytes_max: FILE_NAME_BYTES_MAX as u32,
        })
    }

    fn answer_sized(&mut self, ticket: Ticket, value: Result<Vec<u8>, Errno>, size: u32) {
        let reply = match &value {
            Ok(value) if size == 0 => Ok(Reply::XattrSize(u32::try_from(value.len()).unwrap_or(u32::MAX))),
            Ok(value) if value.len() > size as usize => Err(Errno::RANGE),
            Ok(value) => Ok(Reply::Data(value)),
            Err(e) => Err(*e),
        };
        self.answer_with(ticket, reply);
    }

    fn listing(&self, folder: FileId) -> Result<Vec<(Vec<u8>, FileId, Kind)>, Errno> {
        let dots =
            [(b".".to_vec(), folder, Kind::Directory), (b"..".to_vec(), self.store.parent(folder), Kind::Directory)];
        let names = self.store.children(folder)?.map(|(name, id, kind)| (name.to_vec(), id, kind));
        Ok(dots.into_iter().chain(names).collect())
    }

    /// A part of a folder as it was when it was opened, or rewound: names do not move under a reader who removes them.
    fn read_folder(
        &mut self,
        folder: FileId,
        handle: u64,
        offset: u64,
        size: u32,
        plus: bool,
    ) -> Result<Directory, Errno> {
        if offset == 0 {
            let listing = self.listing(folder)?;
            self.guest.folders.insert(handle, listing);
        }
        let listing = self.guest.folders.get(&handle).ok_or(Errno::BADF)?;
        let mut directory = Directory::new(size, plus);
        let from = usize::try_from(offset).map_err(|_| Errno::INVAL)?;
        for (at, (name, id, kind)) in listing.iter().enumerate().skip(from) {
            let entry = if plus && at > 1 { self.entry(*id).ok() } else { None };
            let listed = Listed { node: *id, mode: type_bits(*kind), next: at as u64 + 1, name };
            if !directory.push(listed, entry.as_ref()) {
                break;
            }
        }
        Ok(directory)
    }
}

fn opens_for_writing(flags: u32) -> bool {
    const ACCESS_MODE: u32 = 3;
    flags & ACCESS_MODE != 0
}

/// What works on a file's data or length, and so waits behind an operation that may take its last name.
fn is_ranged(operation: &Operation) -> bool {
    matches!(operation, Operation::FAllocate { .. } | Operation::FSync { .. })
}

fn type_bits(kind: Kind) -> u32 {
    match kind {
        Kind::File => 0o100_000,
        Kind::Directory => 0o040_000,
        Kind::Symlink => 0o120_000,
        Kind::Fifo => 0o010_000,
        Kind::Socket => 0o140_000,
    }
}

fn shown(id: FileId, stat: &Stat) -> Attr {
    let time = |seconds, nanos: u64| Timestamp { seconds, nanos: u32::try_from(nanos).unwrap_or(0) };
    let count = |n: i64| u64::try_from(n).unwrap_or(0);
    Attr {
        node: id,
        size: count(stat.st_size),
        blocks: count(stat.st_blocks),
        atime: time(stat.st_atime, stat.st_atime_nsec),
        mtime: time(stat.st_mtime, stat.st_mtime_nsec),
        ctime: time(stat.st_ctime, stat.st_ctime_nsec),
        mode: stat.st_mode,
        links: u32::try_from(stat.st_nlink).unwrap_or(u32::MAX),
        uid: stat.st_uid,
        gid: stat.st_gid,
        rdev: 0,
        block_bytes: 4096,
    }
}
