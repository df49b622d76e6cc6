//! The id table: which file carries which id, and under which names it lies.
//!
//! Holds: every directory entry of the module's directory, read once by `scan` and kept up with each change, as nobody else
//! changes it while the mount covers it. Keeps out: contents and descriptors.
//! Invariant: an id belongs to exactly one inode; hard links share it; `.vmtwin-local` is in no listing.
use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, ResolveFlags, XattrFlags, openat2};
use rustix::io::Errno;
use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use vmtwin_core::ids::FileId;
use vmtwin_core::limits::{FILE_NAME_BYTES_MAX, FILES_MAX};
use vmtwin_core::namespace::Kind;

/// The attribute that carries a file's id, little-endian.
const ID_ATTRIBUTE: &str = "trusted.vmtwin.id";
/// Where what is never replicated lies, below the directory.
pub(super) const LOCAL_FOLDER: &str = ".vmtwin-local";

/// What a `st_mode` says it is; none for a device, which is not replicated and so not seen.
fn kind_of(mode: u32) -> Option<Kind> {
    match FileType::from_raw_mode(mode) {
        FileType::RegularFile => Some(Kind::File),
        FileType::Directory => Some(Kind::Directory),
        FileType::Symlink => Some(Kind::Symlink),
        FileType::Fifo => Some(Kind::Fifo),
        FileType::Socket => Some(Kind::Socket),
        _ => None,
    }
}

/// One file of the table.
#[derive(Clone, Debug)]
pub(super) struct Node {
    pub kind: Kind,
    /// Its names: folder and name in it. Empty for the root and for a parked file.
    pub names: Vec<(FileId, Vec<u8>)>,
}

/// The table.
#[derive(Debug)]
pub(super) struct Tree {
    root: OwnedFd,
    pub nodes: BTreeMap<FileId, Node>,
    pub entries: BTreeMap<(FileId, Vec<u8>), FileId>,
}

/// What a scan met that makes the replica suspect.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Scanned {
    /// Files that had no id, or another file's: new since the last run.
    pub fresh: usize,
    /// Devices, which are left alone.
    pub skipped: usize,
}

/// How every file is reached: below the root by descriptor, over no mount and no symbolic link.
const BENEATH: ResolveFlags = ResolveFlags::BENEATH
    .union(ResolveFlags::NO_XDEV)
    .union(ResolveFlags::NO_SYMLINKS)
    .union(ResolveFlags::NO_MAGICLINKS);

/// Opens `path` below `root`.
pub(super) fn open_beneath(root: BorrowedFd<'_>, path: &[u8], flags: OFlags) -> Result<OwnedFd, Errno> {
    loop {
        match openat2(root, path, flags | OFlags::CLOEXEC | OFlags::NOFOLLOW, Mode::empty(), BENEATH) {
            Err(Errno::INTR | Errno::AGAIN) => {}
            other => return other,
        }
    }
}

/// The name by which calls that take only a path reach an open file: its descriptor's, so no walk takes place.
pub(super) fn by_descriptor(fd: impl AsFd) -> String {
    format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd())
}

/// A random id that is not in use: two holders that never met give no id twice.
pub(super) fn random_id(taken: impl Fn(FileId) -> bool) -> FileId {
    loop {
        let id = FileId(getrandom::u64().expect("the kernel gives random numbers") >> 1);
        if id > FileId::ROOT && !taken(id) {
            return id;
        }
    }
}

/// Writes a file's id beside it.
pub(super) fn write_id(fd: impl AsFd, id: FileId) -> Result<(), Errno> {
    rustix::fs::setxattr(by_descriptor(fd), ID_ATTRIBUTE, &id.0.to_le_bytes(), XattrFlags::empty())
}

fn read_id(fd: impl AsFd) -> Result<Option<FileId>, Errno> {
    let mut bytes = [0_u8; 8];
    match rustix::fs::getxattr(by_descriptor(fd), ID_ATTRIBUTE, &mut bytes) {
        Ok(8) => Ok(Some(FileId(u64::from_le_bytes(bytes)))),
        Ok(_) | Err(Errno::NODATA | Errno::RANGE) => Ok(None),
        Err(e) => Err(e),
    }
}

impl Tree {
    /// Reads the whole directory; files without an id get one.
    pub fn scan(root: OwnedFd) -> Result<(Self, Scanned), Errno> {
        let mut tree = Self { root, nodes: BTreeMap::new(), entries: BTreeMap::new() };
        tree.nodes.insert(FileId::ROOT, Node { kind: Kind::Directory, names: Vec::new() });
        let mut scanned = Scanned::default();
        let mut by_inode: BTreeMap<u64, FileId> = BTreeMap::new();
        let mut folders = vec![FileId::ROOT];
        while let Some(folder) = folders.pop() {
            let fd = tree.open(folder, OFlags::RDONLY | OFlags::DIRECTORY)?;
            for (name, _) in list(&fd)? {
                if folder == FileId::ROOT && name == LOCAL_FOLDER.as_bytes() {
                    continue;
                }
                let file = open_beneath(fd.as_fd(), &name, OFlags::PATH)?;
                let stat = rustix::fs::fstat(&file)?;
                let Some(kind) = kind_of(stat.st_mode) else {
                    scanned.skipped += 1;
                    continue;
                };
                if tree.nodes.len() >= FILES_MAX {
                    return Err(Errno::MFILE);
                }
                let id = match by_inode.get(&stat.st_ino) {
                    Some(id) => *id,
                    None => {
                        let id = tree.claim_id(&file, &mut scanned)?;
                        by_inode.insert(stat.st_ino, id);
                        tree.nodes.insert(id, Node { kind, names: Vec::new() });
                        if kind == Kind::Directory {
                            folders.push(id);
                        }
                        id
                    }
                };
                tree.add_name(folder, &name, id);
            }
        }
        Ok((tree, scanned))
    }

    fn claim_id(&self, file: &OwnedFd, scanned: &mut Scanned) -> Result<FileId, Errno> {
        let good = |id: &FileId| *id > FileId::ROOT && !self.nodes.contains_key(id);
        if let Some(id) = read_id(file)?.filter(good) {
            return Ok(id);
        }
        scanned.fresh += 1;
        let id = random_id(|id| self.nodes.contains_key(&id));
        write_id(file, id)?;
        Ok(id)
    }

    /// Records a name.
    pub fn add_name(&mut self, folder: FileId, name: &[u8], id: FileId) {
        self.entries.insert((folder, name.to_vec()), id);
        self.nodes.get_mut(&id).expect("a name is given to a known file").names.push((folder, name.to_vec()));
    }

    /// Forgets a name, never the file.
    pub fn remove_name(&mut self, folder: FileId, name: &[u8]) {
        if let Some(id) = self.entries.remove(&(folder, name.to_vec())) {
            let node = self.nodes.get_mut(&id).expect("an entry belongs to a known file");
            node.names.retain(|(f, n)| *f != folder || n != name);
        }
    }

    /// Which file lies under a name.
    pub fn find(&self, folder: FileId, name: &[u8]) -> Result<FileId, Errno> {
        check_name(name)?;
        match self.node(folder)?.kind {
            Kind::Directory => self.entries.get(&(folder, name.to_vec())).copied().ok_or(Errno::NOENT),
            _ => Err(Errno::NOTDIR),
        }
    }

    /// A file of the table.
    pub fn node(&self, id: FileId) -> Result<&Node, Errno> {
        self.nodes.get(&id).ok_or(Errno::STALE)
    }

    /// Names in a folder, in order.
    pub fn children(&self, folder: FileId) -> impl Iterator<Item = (&[u8], FileId)> {
        self.entries
            .range((folder, Vec::new())..)
            .take_while(move |((f, _), _)| *f == folder)
            .map(|((_, name), id)| (name.as_slice(), *id))
    }

    /// Whether `inner` is `outer` or lies below it.
    pub fn lies_within(&self, inner: FileId, outer: FileId) -> bool {
        let mut at = inner;
        let mut seen = BTreeSet::new();
        while at != outer && seen.insert(at) {
            match self.nodes.get(&at).and_then(|n| n.names.first()) {
                Some((folder, _)) => at = *folder,
                None => return false,
            }
        }
        at == outer
    }

    /// A file's path below the root.
    pub fn path(&self, id: FileId) -> Result<Vec<u8>, Errno> {
        if id == FileId::ROOT {
            return Ok(b".".to_vec());
        }
        let mut parts: Vec<&[u8]> = Vec::new();
        let mut at = id;
        while at != FileId::ROOT {
            let Some((folder, name)) = self.node(at)?.names.first() else {
                if at == id {
                    return Ok(format!("{LOCAL_FOLDER}/parked/{}", parked_name(id)).into_bytes());
                }
                return Err(Errno::NOENT);
            };
            parts.push(name);
            at = *folder;
        }
        parts.reverse();
        Ok(parts.join(&b'/'))
    }

    /// Opens a file.
    pub fn open(&self, id: FileId, flags: OFlags) -> Result<OwnedFd, Errno> {
        open_beneath(self.root.as_fd(), &self.path(id)?, flags)
    }

    /// The directory itself.
    pub fn root(&self) -> BorrowedFd<'_> {
        self.root.as_fd()
    }
}

/// The name of a file without a name, in the folder for such.
pub(super) fn parked_name(id: FileId) -> String {
    format!("{:016x}", id.0)
}

/// Whether a name can be one.
pub(super) fn check_name(name: &[u8]) -> Result<(), Errno> {
    if name.len() > FILE_NAME_BYTES_MAX {
        return Err(Errno::NAMETOOLONG);
    }
    if name.is_empty() || name == b"." || name == b".." || name.contains(&b'/') || name.contains(&0) {
        return Err(Errno::INVAL);
    }
    Ok(())
}

/// Names and types in an open folder, in order.
pub(super) fn list(folder: impl AsFd) -> Result<Vec<(Vec<u8>, FileType)>, Errno> {
    let mut all = Vec::new();
    for entry in Dir::read_from(folder)? {
        let entry = entry?;
        let name = entry.file_name().to_bytes();
        if name != b"." && name != b".." {
            all.push((name.to_vec(), entry.file_type()));
        }
    }
    all.sort_unstable_by(|a, b| a.0.cmp(&b.0));
    Ok(all)
}

/// Removes everything in a folder of plain files.
pub(super) fn empty_folder(folder: impl AsFd) -> Result<(), Errno> {
    let folder = folder.as_fd();
    for (name, kind) in list(folder)? {
        let flags = if kind == FileType::Directory { AtFlags::REMOVEDIR } else { AtFlags::empty() };
        rustix::fs::unlinkat(folder, &*name, flags)?;
    }
    Ok(())
}
