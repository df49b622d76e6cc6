//! Bytes from /dev/fuse to requests. The kernel is trusted with the host, but what it passes on came from its callers, and
//! a wrong length here would be a panic under every VM: all is bounded and checked, nothing panics.
use super::Timestamp;
use super::abi::{Fields, IN_HEADER_BYTES, WRITE_HEAD_BYTES, fattr, op};
use super::request::{Caller, Forget, Operation, Request, SetAttr, SetTime, Ticket};
use rustix::io::Errno;
use vmtwin_core::ids::FileId;
use vmtwin_core::limits::{FILE_NAME_BYTES_MAX, PAYLOAD_BYTES_MAX, XATTR_BYTES_MAX};
use vmtwin_ring::Slot;

/// Longest target of a symbolic link (PATH_MAX, its NUL counted).
const TARGET_BYTES_MAX: usize = 4095;

/// KEEP_SIZE, PUNCH_HOLE and ZERO_RANGE: all that FUSE passes on. What moves a file's bytes (COLLAPSE, INSERT) it refuses.
const FALLOCATE_MODES: u32 = 0x01 | 0x02 | 0x10;

/// What a message from the kernel is.
#[derive(Debug)]
pub enum Decoded {
    /// To be answered from above.
    Request(Request),
    /// Needs no answer.
    Forget(Vec<Forget>),
    /// Needs no answer: the caller of this request got a signal.
    Interrupt(u64),
    /// To be answered with this error at once.
    Refuse(Ticket, Errno),
    /// Nothing to do.
    Nothing,
}

/// The fixed front of a message.
struct Header {
    op: u32,
    unique: u64,
    node: FileId,
    caller: Caller,
}

/// Decodes the message of `len` bytes that begins `WRITE_HEAD_BYTES` before the slot's payload.
pub fn decode(slot: Slot, len: usize) -> Decoded {
    let message = slot.headed(WRITE_HEAD_BYTES).get(..len).unwrap_or_default();
    let mut fields = Fields(message);
    let Some(header) = header(&mut fields, len) else { return Decoded::Nothing };
    let ticket = |room: u32| Ticket { unique: header.unique, op: header.op, room };
    match header.op {
        op::FORGET | op::BATCH_FORGET => return forgets(&header, fields).map_or(Decoded::Nothing, Decoded::Forget),
        op::INTERRUPT => return fields.u64().map_or(Decoded::Nothing, Decoded::Interrupt),
        op::NOTIFY_REPLY => return Decoded::Nothing,
        _ => {}
    }
    if header.node.0 == 0 && header.op != op::STATFS {
        return Decoded::Refuse(ticket(0), Errno::INVAL);
    }
    let operation = if header.op == op::WRITE {
        write(fields).map(|(handle, offset, size)| Operation::Write { handle, offset, size, slot })
    } else {
        other(header.op, fields)
    };
    match operation {
        Ok(operation) => {
            let ticket = ticket(room(&operation));
            Decoded::Request(Request { ticket, node: header.node, caller: header.caller, operation })
        }
        Err(errno) => Decoded::Refuse(ticket(0), errno),
    }
}

fn header(fields: &mut Fields<'_>, len: usize) -> Option<Header> {
    let stated = fields.u32()? as usize;
    let (op, unique, node) = (fields.u32()?, fields.u64()?, fields.u64()?);
    let (uid, gid, pid) = (fields.u32()?, fields.u32()?, fields.u32()?);
    fields.skip(4)?;
    (stated == len).then_some(Header { op, unique, node: FileId(node), caller: Caller { uid, gid, pid } })
}

fn forgets(header: &Header, mut fields: Fields<'_>) -> Option<Vec<Forget>> {
    if header.op == op::FORGET {
        return Some(vec![Forget { node: header.node, count: fields.u64()? }]);
    }
    let count = fields.u32()? as usize;
    fields.skip(4)?;
    // No room is reserved for what is only announced.
    (0..count.min(fields.0.len() / 16))
        .map(|_| Some(Forget { node: FileId(fields.u64()?), count: fields.u64()? }))
        .collect()
}

/// Bytes that the answer to an operation may have, where it is not fixed.
fn room(operation: &Operation) -> u32 {
    match operation {
        Operation::Read { size, .. }
        | Operation::GetXattr { size, .. }
        | Operation::ListXattr { size }
        | Operation::ReadDir { size, .. } => *size,
        Operation::ReadLink => TARGET_BYTES_MAX as u32,
        _ => 0,
    }
}

/// Handle, offset and size of a WRITE, whose data follows.
fn write(mut fields: Fields<'_>) -> Result<(u64, u64, u32), Errno> {
    let mut parse = || {
        let (handle, offset, size) = (fields.u64()?, fields.u64()?, fields.u32()?);
        fields.skip(20)?;
        Some((handle, offset, size, fields.0.len()))
    };
    let (handle, offset, size, present) = parse().ok_or(Errno::INVAL)?;
    if size as usize != present {
        return Err(Errno::INVAL);
    }
    span(offset, u64::from(payload(size)?))?;
    Ok((handle, offset, size))
}

/// All operations but WRITE. Those not named here are of no use to us: told so, the kernel does without, mostly for good.
fn other(code: u32, fields: Fields<'_>) -> Result<Operation, Errno> {
    if let Some(operation) = by_name(code, Fields(fields.0))? {
        return Ok(operation);
    }
    match by_number(code, fields) {
        Some(Some(operation)) => check(operation),
        Some(None) => Err(Errno::NOSYS),
        None => Err(Errno::INVAL),
    }
}

/// Operations that carry names; `Ok(None)` for the others.
fn by_name(code: u32, mut f: Fields<'_>) -> Result<Option<Operation>, Errno> {
    let f = &mut f;
    let short = Errno::INVAL;
    Ok(Some(match code {
        op::LOOKUP => Operation::Lookup { name: name(f)? },
        op::UNLINK => Operation::Unlink { name: name(f)? },
        op::RMDIR => Operation::RmDir { name: name(f)? },
        op::SYMLINK => Operation::Symlink { name: name(f)?, target: target(f)? },
        op::MKNOD => {
            let (mode, rdev) = (f.u32().ok_or(short)?, f.u32().ok_or(short)?);
            f.skip(8).ok_or(short)?;
            Operation::MkNod { name: name(f)?, mode, rdev }
        }
        op::MKDIR => {
            let mode = f.u32().ok_or(short)?;
            f.skip(4).ok_or(short)?;
            Operation::MkDir { name: name(f)?, mode }
        }
        op::CREATE => {
            let (flags, mode) = (f.u32().ok_or(short)?, f.u32().ok_or(short)?);
            f.skip(8).ok_or(short)?;
            Operation::Create { name: name(f)?, flags, mode }
        }
        op::LINK => {
            let file = node(f.u64().ok_or(short)?)?;
            Operation::Link { file, name: name(f)? }
        }
        op::RENAME => {
            let new_parent = node(f.u64().ok_or(short)?)?;
            Operation::Rename { name: name(f)?, new_parent, new_name: name(f)?, flags: 0 }
        }
        op::RENAME2 => {
            let (new_parent, flags) = (node(f.u64().ok_or(short)?)?, f.u32().ok_or(short)?);
            f.skip(4).ok_or(short)?;
            Operation::Rename { name: name(f)?, new_parent, new_name: name(f)?, flags }
        }
        op::SETXATTR => {
            let (size, flags) = (f.u32().ok_or(short)? as usize, f.u32().ok_or(short)?);
            let name = attribute_name(f)?;
            let value = f.bytes(size).filter(|v| v.len() <= XATTR_BYTES_MAX && f.0.is_empty()).ok_or(short)?;
            Operation::SetXattr { name, value: value.to_vec(), flags }
        }
        op::GETXATTR => {
            let size = f.u32().ok_or(short)?;
            f.skip(4).ok_or(short)?;
            Operation::GetXattr { name: attribute_name(f)?, size: size.min(XATTR_BYTES_MAX as u32) }
        }
        op::REMOVEXATTR => Operation::RemoveXattr { name: attribute_name(f)? },
        _ => return Ok(None),
    }))
}

/// Operations of numbers only. `None`: too short; `Some(None)`: not one that we serve.
fn by_number(code: u32, mut f: Fields<'_>) -> Option<Option<Operation>> {
    Some(Some(match code {
        op::GETATTR => {
            let flags = f.u32()?;
            f.skip(4)?;
            let handle = f.u64()?;
            Operation::GetAttr { handle: (flags & 1 != 0).then_some(handle) }
        }
        op::SETATTR => Operation::SetAttr(set_attr(f)?),
        op::READLINK => Operation::ReadLink,
        op::OPEN => Operation::Open { flags: f.u32()? },
        op::OPENDIR => Operation::OpenDir { flags: f.u32()? },
        op::READ => Operation::Read { handle: f.u64()?, offset: f.u64()?, size: f.u32()? },
        op::READDIR | op::READDIRPLUS => {
            let plus = code == op::READDIRPLUS;
            Operation::ReadDir { handle: f.u64()?, offset: f.u64()?, size: f.u32()?, plus }
        }
        op::STATFS => Operation::StatFs,
        op::RELEASE => Operation::Release { handle: f.u64()?, flags: f.u32()? },
        op::RELEASEDIR => Operation::ReleaseDir { handle: f.u64()? },
        op::FSYNC => Operation::FSync { handle: f.u64()?, data_only: f.u32()? & 1 != 0 },
        op::FSYNCDIR => Operation::FSyncDir { handle: f.u64()?, data_only: f.u32()? & 1 != 0 },
        op::LISTXATTR => Operation::ListXattr { size: f.u32()?.min(XATTR_BYTES_MAX as u32) },
        op::FALLOCATE => Operation::FAllocate { handle: f.u64()?, offset: f.u64()?, length: f.u64()?, mode: f.u32()? },
        op::LSEEK => Operation::LSeek { handle: f.u64()?, offset: f.u64()?, whence: f.u32()? },
        _ => return Some(None),
    }))
}

/// Bounds of those operations.
fn check(operation: Operation) -> Result<Operation, Errno> {
    match &operation {
        Operation::Read { offset, size, .. } => span(*offset, u64::from(payload(*size)?))?,
        Operation::ReadDir { size, .. } => payload(*size).map(drop)?,
        Operation::FAllocate { mode, .. } if mode & !FALLOCATE_MODES != 0 => return Err(Errno::OPNOTSUPP),
        Operation::FAllocate { length: 0, .. } => return Err(Errno::INVAL),
        Operation::FAllocate { offset, length, .. } => span(*offset, *length)?,
        Operation::LSeek { offset, .. } => span(*offset, 0)?,
        Operation::SetAttr(SetAttr { size: Some(size), .. }) => span(0, *size)?,
        _ => {}
    }
    Ok(operation)
}

fn set_attr(mut f: Fields<'_>) -> Option<SetAttr> {
    let valid = f.u32()?;
    f.skip(4)?;
    let (handle, size) = (f.u64()?, f.u64()?);
    f.skip(8)?;
    let (atime, mtime, _ctime) = (f.u64()?, f.u64()?, f.u64()?);
    let (atime_nanos, mtime_nanos, _ctime_nanos) = (f.u32()?, f.u32()?, f.u32()?);
    let mode = f.u32()?;
    f.skip(4)?;
    let (uid, gid) = (f.u32()?, f.u32()?);
    let has = |bit: u32| valid & bit != 0;
    let time = |set: u32, now: u32, seconds: u64, nanos: u32| {
        let at = Timestamp { seconds: seconds as i64, nanos: nanos.min(999_999_999) };
        has(set | now).then(|| if has(now) { SetTime::Now } else { SetTime::At(at) })
    };
    Some(SetAttr {
        handle: has(fattr::FH).then_some(handle),
        mode: has(fattr::MODE).then_some(mode),
        uid: has(fattr::UID).then_some(uid),
        gid: has(fattr::GID).then_some(gid),
        size: has(fattr::SIZE).then_some(size),
        atime: time(fattr::ATIME, fattr::ATIME_NOW, atime, atime_nanos),
        mtime: time(fattr::MTIME, fattr::MTIME_NOW, mtime, mtime_nanos),
    })
}

fn node(id: u64) -> Result<FileId, Errno> {
    if id == 0 { Err(Errno::INVAL) } else { Ok(FileId(id)) }
}

fn name(f: &mut Fields<'_>) -> Result<Vec<u8>, Errno> {
    let name = f.text().ok_or(Errno::INVAL)?;
    match name {
        b"" | b"." | b".." => Err(Errno::INVAL),
        _ if name.len() > FILE_NAME_BYTES_MAX => Err(Errno::NAMETOOLONG),
        _ if name.contains(&b'/') => Err(Errno::INVAL),
        _ => Ok(name.to_vec()),
    }
}

fn target(f: &mut Fields<'_>) -> Result<Vec<u8>, Errno> {
    let target = f.text().filter(|t| !t.is_empty()).ok_or(Errno::INVAL)?;
    if target.len() > TARGET_BYTES_MAX { Err(Errno::NAMETOOLONG) } else { Ok(target.to_vec()) }
}

fn attribute_name(f: &mut Fields<'_>) -> Result<Vec<u8>, Errno> {
    let name = f.text().filter(|t| !t.is_empty()).ok_or(Errno::INVAL)?;
    if name.len() > FILE_NAME_BYTES_MAX { Err(Errno::RANGE) } else { Ok(name.to_vec()) }
}

fn payload(size: u32) -> Result<u32, Errno> {
    if size as usize <= PAYLOAD_BYTES_MAX { Ok(size) } else { Err(Errno::INVAL) }
}

/// A range must lie within what an `off_t` holds.
fn span(offset: u64, length: u64) -> Result<(), Errno> {
    match offset.checked_add(length) {
        Some(end) if end <= i64::MAX as u64 => Ok(()),
        _ => Err(Errno::FBIG),
    }
}

const _: () = assert!(WRITE_HEAD_BYTES <= vmtwin_ring::HEAD_BYTES && PAYLOAD_BYTES_MAX <= vmtwin_ring::PAYLOAD_BYTES);
const _: () = assert!(IN_HEADER_BYTES + 40 == WRITE_HEAD_BYTES);
