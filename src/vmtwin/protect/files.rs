//! One file brought from one name to another, so that it can be done again after a crash at any point.
//!
//! On one file system it is renamed. Else it is copied beside its new name (holes stay holes), flushed, compared byte by
//! byte, renamed, and only then removed under its old name.
//! Invariant: a file is removed only where another with the same content, or the untouched original, stays.
use super::plan::FileStep;
use super::{During, Progress, ProtectError, Tell};
use rustix::fs::{
    Advice, AtFlags, CWD, Gid, Mode, RenameFlags, SeekFrom, Timespec, Timestamps, Uid, chownat, fadvise, fchmod,
    futimens, renameat_with, seek,
};
use rustix::io::Errno;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// Read, written and compared at once, in bytes.
const CHUNK: usize = 1 << 20;

/// Does the step. Done already is done.
pub(super) fn forward(step: &FileStep, tell: &mut Tell<'_>) -> Result<(), ProtectError> {
    let (from, to) = (Path::new(&step.from), Path::new(&step.to));
    if step.copy {
        if !exists(to)? || !same_content(from, to, tell)? {
            remove(to)?;
            copy(from, to, tell)?;
        }
        return Ok(());
    }
    if exists(from)? && exists(to)? && is_original(from, step)? && !same_content(from, to, tell)? {
        // Somebody used the VM after a crash, under its old names: the original is the newer one.
        remove(to)?;
    }
    bring(from, to, tell)
}

/// Takes the step back. Taken back already is taken back.
pub(super) fn back(step: &FileStep, tell: &mut Tell<'_>) -> Result<(), ProtectError> {
    let (from, to) = (Path::new(&step.from), Path::new(&step.to));
    if step.copy {
        remove(&part(to))?;
        return remove(to);
    }
    remove(&part(to))?;
    if exists(from)? && is_original(from, step)? {
        // It was copied and not removed yet: the original is whole, and maybe newer.
        return remove(to);
    }
    bring(to, from, tell)
}

/// Brings a file from `old` to `new`.
fn bring(old: &Path, new: &Path, tell: &mut Tell<'_>) -> Result<(), ProtectError> {
    match (exists(old)?, exists(new)?) {
        (false, true) => return remove(&part(new)),
        (false, false) => {
            return Err(io::Error::from(io::ErrorKind::NotFound)).during("find", old);
        }
        (true, false) => {
            tell(&Progress { step: "move", path: old, bytes_done: 0, bytes_total: 0 });
            match renameat_with(CWD, old, CWD, new, RenameFlags::NOREPLACE) {
                Ok(()) => {
                    sync_folder(new)?;
                    return sync_folder(old);
                }
                Err(Errno::XDEV) => copy(old, new, tell)?,
                Err(error) => return Err(error).during("move", old),
            }
        }
        // A crash between copy and removal.
        (true, true) if same_content(old, new, tell)? => {}
        // Somebody made a file of that name since.
        (true, true) => {
            let both = format!("{} exists, too, and differs: move one of them away", new.display());
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, both)).during("move", old);
        }
    }
    tell(&Progress { step: "remove", path: old, bytes_done: 0, bytes_total: 0 });
    remove(old)
}

fn exists(path: &Path) -> Result<bool, ProtectError> {
    match path.symlink_metadata() {
        Ok(found) if found.is_file() => Ok(true),
        Ok(_) => Err(io::Error::other("it is no plain file any more")).during("use", path),
        Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => Ok(false),
        Err(e) => Err(e).during("look at", path),
    }
}

fn is_original(path: &Path, step: &FileStep) -> Result<bool, ProtectError> {
    let found = path.metadata().during("look at", path)?;
    Ok((found.dev(), found.ino()) == (step.device, step.inode))
}

/// Removes a file durably; one that is not there is removed.
pub(super) fn remove(path: &Path) -> Result<(), ProtectError> {
    match crate::config::durable::remove(path) {
        // Its folder is no folder (any more).
        Err(e) if e.kind() == io::ErrorKind::NotADirectory => Ok(()),
        removed => removed.during("remove", path),
    }
}

/// Makes the names in the folder of `path` durable.
pub(super) fn sync_folder(path: &Path) -> Result<(), ProtectError> {
    let folder = path.parent().unwrap_or(Path::new("/"));
    File::open(folder).and_then(|f| f.sync_all()).during("flush", folder)
}

/// The name of a copy that is not whole yet.
fn part(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".vmtwin-part");
    name.into()
}

/// Copies a file to a name that is free: whole and flushed, or not at all.
fn copy(from: &Path, to: &Path, tell: &mut Tell<'_>) -> Result<(), ProtectError> {
    let part = part(to);
    remove(&part)?;
    let copied = copy_content(from, &part, tell).and_then(|()| {
        if same_content(from, &part, tell)? {
            Ok(())
        } else {
            Err(io::Error::other("what was written reads back differently")).during("copy", from)
        }
    });
    if let Err(error) = copied {
        // The disk may be full: leave nothing behind. The first error is the one to tell.
        let _ = remove(&part);
        return Err(error);
    }
    tell(&Progress { step: "rename", path: to, bytes_done: 0, bytes_total: 0 });
    renameat_with(CWD, &part, CWD, to, RenameFlags::NOREPLACE).during("rename", &part)?;
    sync_folder(to)
}

fn copy_content(from: &Path, to: &Path, tell: &mut Tell<'_>) -> Result<(), ProtectError> {
    let source = File::open(from).during("read", from)?;
    let target = OpenOptions::new().write(true).create_new(true).mode(0o600).open(to).during("create", to)?;
    let found = source.metadata().during("look at", from)?;
    target.set_len(found.len()).during("size", to)?;
    let mut buffer = vec![0; CHUNK];
    let mut at = 0;
    while let Some((start, end)) = next_data(&source, at, found.len()).during("read", from)? {
        tell(&Progress { step: "copy", path: from, bytes_done: start, bytes_total: found.len() });
        let length = chunk(start, end);
        source.read_exact_at(&mut buffer[..length], start).during("read", from)?;
        target.write_all_at(&buffer[..length], start).during("write", to)?;
        at = start + length as u64;
    }
    let (owner, group) = (Uid::from_raw(found.uid()), Gid::from_raw(found.gid()));
    chownat(CWD, to, Some(owner), Some(group), AtFlags::SYMLINK_NOFOLLOW).during("own", to)?;
    fchmod(&target, Mode::from_raw_mode(found.mode() & 0o7777)).during("set the mode of", to)?;
    let times = Timestamps {
        last_access: Timespec { tv_sec: found.atime(), tv_nsec: found.atime_nsec() },
        last_modification: Timespec { tv_sec: found.mtime(), tv_nsec: found.mtime_nsec() },
    };
    futimens(&target, &times).during("set the times of", to)?;
    target.sync_all().during("flush", to)
}

/// The file's next range that is not a hole, from `at` on.
fn next_data(file: &File, at: u64, size: u64) -> io::Result<Option<(u64, u64)>> {
    if at >= size {
        return Ok(None);
    }
    let start = match seek(file, SeekFrom::Data(at)) {
        Ok(start) => start,
        Err(Errno::NXIO) => return Ok(None),
        // A file system without holes.
        Err(Errno::INVAL | Errno::OPNOTSUPP) => at,
        Err(error) => return Err(error.into()),
    };
    let end = seek(file, SeekFrom::Hole(start)).unwrap_or(size).min(size);
    Ok((start < end).then_some((start, end)))
}

/// Bytes of a range that are taken at once.
fn chunk(start: u64, end: u64) -> usize {
    usize::try_from(end - start).map_or(CHUNK, |length| length.min(CHUNK))
}

/// Whether both have the same size and bytes, read from the disk where the system lets us say so.
pub(super) fn same_content(one: &Path, other: &Path, tell: &mut Tell<'_>) -> Result<bool, ProtectError> {
    let open = |path: &Path| {
        let file = File::open(path).during("read", path)?;
        // Advice: where it is not taken, the page cache is compared.
        let _ = fadvise(&file, 0, None, Advice::DontNeed);
        let size = file.metadata().during("look at", path)?.len();
        Ok::<_, ProtectError>((file, size))
    };
    let ((one_file, size), (other_file, other_size)) = (open(one)?, open(other)?);
    if size != other_size {
        return Ok(false);
    }
    let (mut left, mut right) = (vec![0; CHUNK], vec![0; CHUNK]);
    let mut at = 0;
    loop {
        let data = |file: &File, path: &Path| next_data(file, at, size).during("read", path);
        let next = match (data(&one_file, one)?, data(&other_file, other)?) {
            (None, None) => return Ok(true),
            // What is a hole in both is equal; the end of the nearer one's data is where to look again.
            (Some(a), Some(b)) => {
                if a.0 <= b.0 {
                    a
                } else {
                    b
                }
            }
            (Some(a), None) | (None, Some(a)) => a,
        };
        let (next, end) = next;
        tell(&Progress { step: "verify", path: other, bytes_done: next, bytes_total: size });
        let length = chunk(next, end);
        one_file.read_exact_at(&mut left[..length], next).during("read", one)?;
        other_file.read_exact_at(&mut right[..length], next).during("read", other)?;
        if left[..length] != right[..length] {
            return Ok(false);
        }
        at = next + length as u64;
    }
}

/// Bytes that a file takes on its disk.
pub(super) fn allocated(path: &Path) -> Result<u64, ProtectError> {
    fs::metadata(path).map(|found| found.blocks() * 512).during("look at", path)
}
