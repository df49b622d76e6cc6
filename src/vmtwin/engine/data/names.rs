//! Requests that change names and attributes: turned into namespace operations, one at a time.
//!
//! Decides: who owns a new file, what an operation is about. Holds: requests that wait for their turn, and requests for
//! data of a file that the running operation concerns. Invariant: an operation is made of the tree as it is when nothing
//! else changes it, so ids and names fit; a file that has lost its last name is this node's own affair from then on.
use super::guest::{After, Way};
use super::{Data, Payload};
use rustix::fs::XattrFlags;
use rustix::io::Errno;
use rustix::time::{ClockId, clock_gettime};
use std::collections::VecDeque;
use vmtwin_core::ids::FileId;
use vmtwin_core::limits::FILE_BYTES_MAX;
use vmtwin_core::namespace::{Attrs, FileName, FileTime, NodeKind, Op, Owner, RenameMode, XattrMode, xattr_is_shared};
use vmtwin_core::replica::event::{Event, Job, OpId, Request as CoreRequest, Resize};
use vmtwin_core::wire::codec::Writer;
use vmtwin_frontend::fuse::{Caller, Operation, Reply, Request, SetAttr, SetTime, Ticket};

const SET_GROUP_ID: u32 = 0o2000;

#[derive(Debug, Default)]
pub(super) struct Names {
    /// The operation that the core has in hand, and the files that it is about.
    running: Option<(OpId, Vec<FileId>)>,
    queue: VecDeque<Request>,
    behind: Vec<Request>,
}

impl Names {
    pub fn waiting(&self) -> usize {
        self.queue.len() + self.behind.len()
    }
    /// Whether the running operation is about this file.
    pub fn concerns(&self, file: FileId) -> bool {
        self.running.as_ref().is_some_and(|(_, files)| files.contains(&file))
    }
    pub fn wait_behind(&mut self, request: Request) {
        self.behind.push(request);
    }
}

/// Whether a request changes a name or an attribute.
pub(super) fn changes(operation: &Operation) -> bool {
    use Operation as O;
    matches!(
        operation,
        O::SetAttr(_)
            | O::Symlink { .. }
            | O::MkNod { .. }
            | O::MkDir { .. }
            | O::Unlink { .. }
            | O::RmDir { .. }
            | O::Rename { .. }
            | O::Link { .. }
            | O::Create { .. }
            | O::SetXattr { .. }
            | O::RemoveXattr { .. }
    )
}

/// What became of a request.
enum Made {
    /// An operation for both nodes.
    Op(Op, After),
    /// It concerns this node alone and is done.
    Here(After),
}

impl Data {
    pub(super) fn name_request(&mut self, request: Request) {
        match self.way() {
            Way::Reader => return self.refuse(request.ticket, Errno::ROFS),
            Way::Failing => return self.refuse(request.ticket, Errno::IO),
            Way::Holder | Way::Held => {}
        }
        self.guest.names.queue.push_back(request);
        self.next_name();
    }

    /// Gives the core the next operation, if it has none.
    fn next_name(&mut self) {
        while self.guest.names.running.is_none() {
            let Some(request) = self.guest.names.queue.pop_front() else { return };
            let Request { ticket, node, caller, operation } = request;
            match self.operation(node, caller, operation) {
                Ok(Made::Op(op, after)) => self.give(ticket, &op, after),
                Ok(Made::Here(After::Attr(id))) => match self.attr(id) {
                    Ok(attr) => self.answer(ticket, &Reply::Attr(attr, std::time::Duration::ZERO)),
                    Err(e) => self.refuse(ticket, e),
                },
                Ok(Made::Here(_)) => self.answer(ticket, &Reply::Done),
                Err(e) => self.refuse(ticket, e),
            }
        }
    }

    fn give(&mut self, ticket: Ticket, op: &Op, after: After) {
        let concerned = op.files();
        let mut files = [FileId(0); 4];
        for (place, file) in files.iter_mut().zip(&concerned) {
            *place = *file;
        }
        let resize = match op {
            Op::SetAttr { id, attrs: Attrs { size: Some(to), .. } } => {
                Some(Resize { file: *id, from: self.store.size(*id).unwrap_or(0), to: *to })
            }
            _ => None,
        };
        let mut bytes = Vec::new();
        op.encode(&mut Writer::new(&mut bytes));
        let number = self.ask(ticket, after);
        self.guest.names.running = Some((number, concerned));
        self.payloads.insert(Job::Guest(number), Payload::Bytes(bytes));
        self.events.push_back(Event::Guest { op: number, request: CoreRequest::Namespace { files, resize } });
    }

    /// The running operation is over, however it ended: what waited goes on.
    pub(super) fn name_completed(&mut self, op: OpId) {
        let Some((_, files)) = self.guest.names.running.take_if(|(running, _)| *running == op) else { return };
        for file in files {
            self.forget_if_unused(file);
        }
        let behind = std::mem::take(&mut self.guest.names.behind);
        self.again(behind);
        self.next_name();
    }

    /// An operation of either node on this node's tree.
    pub(super) fn apply(&mut self, op: &Op) -> Result<(), Errno> {
        self.store.apply(op)?;
        if let Some(file) = op.unlinks() {
            self.forget_if_unused(file);
        }
        Ok(())
    }

    fn operation(&mut self, node: FileId, caller: Caller, operation: Operation) -> Result<Made, Errno> {
        let op = match operation {
            Operation::SetAttr(set) => return self.set_attr(node, &set),
            Operation::SetXattr { name, value, flags } => return self.set_xattr(node, name, value, flags),
            Operation::RemoveXattr { name } => {
                if !xattr_is_shared(&name) {
                    self.store.remove_attribute(node, &name)?;
                    return Ok(Made::Here(After::Done));
                }
                return Ok(Made::Op(Op::RemoveXattr { id: node, name }, After::Done));
            }
            Operation::Create { name, flags, mode } => {
                let (name, owner, id) = self.new_file(node, name, caller, mode)?;
                let op = Op::Create { parent: node, name, id, owner };
                return Ok(Made::Op(op, After::Created(id, u64::from(flags))));
            }
            Operation::MkNod { name, mode, .. } => {
                let (name, owner, id) = self.new_file(node, name, caller, mode)?;
                let parent = node;
                match mode & 0o170_000 {
                    0 | 0o100_000 => Op::Create { parent, name, id, owner },
                    0o010_000 => Op::Mknod { parent, name, id, owner, kind: NodeKind::Fifo },
                    0o140_000 => Op::Mknod { parent, name, id, owner, kind: NodeKind::Socket },
                    _ => return Err(Errno::PERM),
                }
            }
            Operation::MkDir { name, mode } => {
                let (name, mut owner, id) = self.new_file(node, name, caller, mode)?;
                owner.mode |= self.store.stat(node)?.st_mode & SET_GROUP_ID;
                Op::Mkdir { parent: node, name, id, owner }
            }
            Operation::Symlink { name, target } => {
                let (name, owner, id) = self.new_file(node, name, caller, 0o777)?;
                Op::Symlink { parent: node, name, id, owner, target }
            }
            Operation::Link { file, name } => Op::Link { id: file, parent: node, name: checked(name)? },
            Operation::Unlink { name } => {
                Op::Unlink { parent: node, id: self.store.lookup(node, &name)?, name: checked(name)? }
            }
            Operation::RmDir { name } => {
                Op::Rmdir { parent: node, id: self.store.lookup(node, &name)?, name: checked(name)? }
            }
            Operation::Rename { name, new_parent, new_name, flags } => {
                self.rename(node, name, new_parent, new_name, flags)?
            }
            _ => unreachable!("`changes` says what comes here"),
        };
        let after = match &op {
            Op::Unlink { .. } | Op::Rmdir { .. } | Op::Rename { .. } => After::Done,
            Op::Link { id, .. } => After::Entry(*id),
            op => After::Entry(op.creates().expect("all others make a file")),
        };
        Ok(Made::Op(op, after))
    }

    /// A new file belongs to the caller; in a set-group-id folder, to the folder's group.
    fn new_file(
        &self,
        folder: FileId,
        name: Vec<u8>,
        caller: Caller,
        mode: u32,
    ) -> Result<(FileName, Owner, FileId), Errno> {
        match self.store.lookup(folder, &name) {
            Err(Errno::NOENT) => {}
            Ok(_) => return Err(Errno::EXIST),
            Err(e) => return Err(e),
        }
        let parent = self.store.stat(folder)?;
        let gid = if parent.st_mode & SET_GROUP_ID != 0 { parent.st_gid } else { caller.gid };
        Ok((checked(name)?, Owner { mode: mode & 0o7777, uid: caller.uid, gid }, self.store.new_id()))
    }

    fn rename(
        &self,
        parent: FileId,
        name: Vec<u8>,
        new_parent: FileId,
        new_name: Vec<u8>,
        flags: u32,
    ) -> Result<Op, Errno> {
        let mode = match flags {
            0 => RenameMode::Replace,
            1 => RenameMode::NoReplace,
            2 => RenameMode::Exchange,
            _ => return Err(Errno::INVAL),
        };
        let id = self.store.lookup(parent, &name)?;
        let over = match self.store.lookup(new_parent, &new_name) {
            Ok(over) => Some(over),
            Err(Errno::NOENT) => None,
            Err(e) => return Err(e),
        };
        match (mode, over) {
            (RenameMode::NoReplace, Some(_)) => return Err(Errno::EXIST),
            (RenameMode::Exchange, None) => return Err(Errno::NOENT),
            _ => {}
        }
        Ok(Op::Rename { parent, name: checked(name)?, id, new_parent, new_name: checked(new_name)?, over, mode })
    }

    fn set_attr(&mut self, id: FileId, set: &SetAttr) -> Result<Made, Errno> {
        let attrs = Attrs {
            mode: set.mode.map(|mode| mode & 0o7777),
            uid: set.uid,
            gid: set.gid,
            size: set.size,
            atime: set.atime.map(file_time),
            mtime: set.mtime.map(file_time),
        };
        if attrs.size.is_some_and(|size| size > FILE_BYTES_MAX) {
            return Err(Errno::FBIG);
        }
        if attrs == Attrs::default() {
            return Ok(Made::Here(After::Attr(id)));
        }
        let op = Op::SetAttr { id, attrs };
        if self.store.is_parked(id) {
            self.store.apply(&op)?;
            return Ok(Made::Here(After::Attr(id)));
        }
        Ok(Made::Op(op, After::Attr(id)))
    }

    fn set_xattr(&mut self, id: FileId, name: Vec<u8>, value: Vec<u8>, flags: u32) -> Result<Made, Errno> {
        let mode = match flags {
            0 => XattrMode::Set,
            1 => XattrMode::Create,
            2 => XattrMode::Replace,
            _ => return Err(Errno::INVAL),
        };
        if !xattr_is_shared(&name) || self.store.is_parked(id) {
            self.store.set_attribute(id, &name, &value, XattrFlags::from_bits_retain(flags))?;
            return Ok(Made::Here(After::Done));
        }
        crate::store::check_attribute(&name)?;
        Ok(Made::Op(Op::SetXattr { id, name, value, mode }, After::Done))
    }
}

fn checked(name: Vec<u8>) -> Result<FileName, Errno> {
    FileName::new(name).map_err(|e| Errno::from_raw_os_error(e.0))
}

fn file_time(time: SetTime) -> FileTime {
    match time {
        SetTime::At(at) => FileTime { seconds: at.seconds, nanos: at.nanos },
        SetTime::Now => {
            let now = clock_gettime(ClockId::Realtime);
            FileTime { seconds: now.tv_sec, nanos: u32::try_from(now.tv_nsec).expect("below a thousand million") }
        }
    }
}
