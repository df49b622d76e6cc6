//! One replica on disk: the module's directory and its metadata.
//!
//! The directory is reached through descriptors that were opened before it was mounted over, never by a path under the
//! mount: that would be a question to ourselves.
//! - `tree`        which file has which id and which names
//! - `names`       create, link, rename, remove; parked files
//! - `attributes`  owner, mode, times, extended attributes
//! - `files`       descriptors and ranges
//! - `listing`     the whole tree as the resync compares it, and its operations carried out
//! - `metafiles`   state, log and map below /var/lib/vmtwin: atomic, flushed, read back
//! - `replica`     a replica's identity, and how it was left: clean, broken, erred, changed behind our back
//! - `mounts`      the private bind mount, and the mount that a killed predecessor left
mod attributes;
mod files;
mod listing;
pub mod metafiles;
pub mod mounts;
mod names;
pub mod replica;
mod tree;

pub use attributes::check_attribute;
pub use files::{Descriptors, Seek};
pub use replica::{create_replica, open_replica};
pub use tree::Scanned;

use rustix::fs::{Mode, OFlags, StatVfs};
use rustix::io::Errno;
use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::OwnedFd;
use std::path::Path;
use tree::{LOCAL_FOLDER, Tree};
use vmtwin_core::ids::FileId;
use vmtwin_core::namespace::Kind;

/// A module's directory.
#[derive(Debug)]
pub struct Store {
    tree: Tree,
    /// `.vmtwin-local`: on the same file system, hidden.
    local: OwnedFd,
    /// `.vmtwin-local/parked`: files whose last name went.
    parked: OwnedFd,
    open: BTreeMap<FileId, Descriptors>,
    /// Files and folders that were changed and not flushed since; at the start all, whoever wrote them.
    unflushed: BTreeSet<FileId>,
    /// Files whose attributes or length were changed by name: a flush of their data alone would not do.
    changed: BTreeSet<FileId>,
}

impl Store {
    /// Opens a directory and reads its tree. Files that were parked are gone: whoever had them open is, too.
    ///
    /// # Errors
    /// What the kernel says; `EMFILE` for more than `FILES_MAX` files.
    pub fn open(directory: &Path) -> Result<(Self, Scanned), Errno> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = rustix::fs::open(directory, flags, Mode::empty())?;
        let local = ensure_folder(&root, LOCAL_FOLDER)?;
        let parked = ensure_folder(&local, "parked")?;
        tree::empty_folder(&parked)?;
        let (tree, scanned) = Tree::scan(root)?;
        let unflushed = tree.nodes.keys().copied().collect();
        Ok((Self { tree, local, parked, open: BTreeMap::new(), unflushed, changed: BTreeSet::new() }, scanned))
    }

    /// Which file lies under a name.
    ///
    /// # Errors
    /// `ENOENT` and what makes a name bad.
    pub fn lookup(&self, folder: FileId, name: &[u8]) -> Result<FileId, Errno> {
        self.tree.find(folder, name)
    }

    /// What a file is.
    ///
    /// # Errors
    /// `ESTALE` for an id that nothing has.
    pub fn kind(&self, id: FileId) -> Result<Kind, Errno> {
        Ok(self.tree.node(id)?.kind)
    }

    /// Names in a folder with their files, in order.
    ///
    /// # Errors
    /// `ENOTDIR`, `ESTALE`.
    pub fn children(&self, folder: FileId) -> Result<impl Iterator<Item = (&[u8], FileId, Kind)>, Errno> {
        if self.kind(folder)? != Kind::Directory {
            return Err(Errno::NOTDIR);
        }
        Ok(self.tree.children(folder).map(|(name, id)| (name, id, self.tree.nodes[&id].kind)))
    }

    /// The folder that holds a folder; its own for the root.
    #[must_use]
    pub fn parent(&self, folder: FileId) -> FileId {
        self.tree.nodes.get(&folder).and_then(|n| n.names.first()).map_or(FileId::ROOT, |(parent, _)| *parent)
    }

    /// Every file that has a name, the root among them, in order of id.
    pub fn ids(&self) -> impl Iterator<Item = FileId> {
        self.tree.nodes.iter().filter(|(id, n)| **id == FileId::ROOT || !n.names.is_empty()).map(|(id, _)| *id)
    }

    /// A file's path below the directory, for messages to people.
    #[must_use]
    pub fn shown(&self, id: FileId) -> String {
        self.tree.path(id).map_or_else(|_| format!("file {id}"), |p| String::from_utf8_lossy(&p).into_owned())
    }

    /// An id for a new file.
    #[must_use]
    pub fn new_id(&self) -> FileId {
        tree::random_id(|id| self.tree.nodes.contains_key(&id))
    }

    /// Room on the file system.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn room(&self) -> Result<StatVfs, Errno> {
        rustix::fs::fstatvfs(self.tree.root())
    }

    /// Notes that a file, or a folder's names, changed.
    pub fn touch(&mut self, id: FileId) {
        self.unflushed.insert(id);
    }

    /// Whether a file's attributes changed since this was asked last.
    pub fn take_changed(&mut self, id: FileId) -> bool {
        self.changed.remove(&id)
    }

    /// What is to be flushed so that all is durable; noted as flushed. Who fails to flush it has lost the replica, so nothing
    /// is put back.
    pub fn take_unflushed(&mut self) -> BTreeSet<FileId> {
        std::mem::take(&mut self.unflushed)
    }

    /// A descriptor of the directory, for a thread that flushes the whole file system.
    ///
    /// # Errors
    /// No descriptor left.
    pub fn root(&self) -> Result<OwnedFd, Errno> {
        rustix::io::fcntl_dupfd_cloexec(self.tree.root(), 0)
    }

    /// The hidden folder.
    pub(crate) fn local(&self) -> &OwnedFd {
        &self.local
    }
}

/// Opens a folder of ours, and makes it where it is missing.
fn ensure_folder(parent: &OwnedFd, name: &str) -> Result<OwnedFd, Errno> {
    match rustix::fs::mkdirat(parent, name, Mode::from_raw_mode(0o700)) {
        Ok(()) | Err(Errno::EXIST) => {}
        Err(e) => return Err(e),
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(parent, name, flags, Mode::empty())
}

#[cfg(test)]
mod tests;
