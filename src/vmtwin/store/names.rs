//! Namespace operations carried out: the same operation with the same ids gives the same tree on both nodes.
//!
//! Invariant: a file appears under its name whole, with id, owner and mode. A regular file whose last name goes is parked,
//! not removed, until `forget`: it may be open here. What the operation says of ids is checked before anything is changed.
use super::tree::{self, Node, check_name, parked_name};
use super::{LOCAL_FOLDER, Store};
use rustix::fs::{AtFlags, FileType, Mode, OFlags, RenameFlags, XattrFlags};
use rustix::io::Errno;
use std::os::fd::OwnedFd;
use vmtwin_core::ids::FileId;
use vmtwin_core::limits::FILES_MAX;
use vmtwin_core::namespace::{Attrs, FileName, Kind, NodeKind, Op, Owner, RenameMode, XattrMode};

/// A file of this size is freed aside.
const LARGE_BYTES: u64 = 64 << 20;

impl Store {
    /// Carries out one operation.
    ///
    /// # Errors
    /// As Linux; `ESTALE` where a name belongs to another file than the operation says. Nothing is changed then.
    pub fn apply(&mut self, op: &Op) -> Result<(), Errno> {
        for file in op.files() {
            self.touch(file);
            self.changed.insert(file);
        }
        match op {
            Op::Create { parent, name, id, owner } => self.make(*parent, name, *id, (Kind::File, b""), *owner),
            Op::Mkdir { parent, name, id, owner } => self.make(*parent, name, *id, (Kind::Directory, b""), *owner),
            Op::Symlink { parent, name, id, owner, target } => {
                self.make(*parent, name, *id, (Kind::Symlink, target), *owner)
            }
            Op::Mknod { parent, name, id, owner, kind: NodeKind::Fifo } => {
                self.make(*parent, name, *id, (Kind::Fifo, b""), *owner)
            }
            Op::Mknod { parent, name, id, owner, kind: NodeKind::Socket } => {
                self.make(*parent, name, *id, (Kind::Socket, b""), *owner)
            }
            Op::Link { id, parent, name } => self.link(*id, *parent, name.as_bytes()),
            Op::Unlink { parent, name, id } => self.unlink(*parent, name.as_bytes(), *id),
            Op::Rmdir { parent, name, id } => self.remove_folder(*parent, name.as_bytes(), *id),
            Op::Rename { parent, name, id, new_parent, new_name, over, mode } => {
                self.rename(*id, (*parent, name.as_bytes()), (*new_parent, new_name.as_bytes()), *over, *mode)
            }
            Op::SetAttr { id, attrs } => self.change(*id, attrs),
            Op::SetXattr { id, name, value, mode } => {
                let flags = match mode {
                    XattrMode::Set => XattrFlags::empty(),
                    XattrMode::Create => XattrFlags::CREATE,
                    XattrMode::Replace => XattrFlags::REPLACE,
                };
                self.set_attribute(*id, name, value, flags)
            }
            Op::RemoveXattr { id, name } => self.remove_attribute(*id, name),
        }
    }

    /// Makes a file in the hidden folder, complete, and moves it to its name.
    fn make(
        &mut self,
        folder: FileId,
        name: &FileName,
        id: FileId,
        (kind, target): (Kind, &[u8]),
        owner: Owner,
    ) -> Result<(), Errno> {
        let parent = self.free_place(folder, name.as_bytes())?;
        if id <= FileId::ROOT || self.tree.nodes.contains_key(&id) {
            return Err(Errno::STALE);
        }
        if self.tree.nodes.len() >= FILES_MAX {
            return Err(Errno::NOSPC);
        }
        let hidden = parked_name(id);
        let mode = Mode::from_raw_mode(0o600);
        match kind {
            Kind::File => {
                let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
                drop(rustix::fs::openat(&self.parked, &*hidden, flags, mode)?);
            }
            Kind::Directory => rustix::fs::mkdirat(&self.parked, &*hidden, Mode::from_raw_mode(0o700))?,
            Kind::Symlink => rustix::fs::symlinkat(target, &self.parked, &*hidden)?,
            Kind::Fifo => rustix::fs::mknodat(&self.parked, &*hidden, FileType::Fifo, mode, 0)?,
            Kind::Socket => rustix::fs::mknodat(&self.parked, &*hidden, FileType::Socket, mode, 0)?,
        }
        self.tree.nodes.insert(id, Node { kind, names: Vec::new() });
        let attrs = Attrs { mode: Some(owner.mode), uid: Some(owner.uid), gid: Some(owner.gid), ..Attrs::default() };
        let placed = self
            .tree
            .open(id, OFlags::PATH)
            .and_then(|file| tree::write_id(&file, id))
            .and_then(|()| self.set_attributes(id, &attrs))
            .and_then(|()| {
                let flags = RenameFlags::NOREPLACE;
                rustix::fs::renameat_with(&self.parked, &*hidden, &parent, name.as_bytes(), flags)
            });
        if let Err(e) = placed {
            self.tree.nodes.remove(&id);
            let flags = if kind == Kind::Directory { AtFlags::REMOVEDIR } else { AtFlags::empty() };
            let _ = rustix::fs::unlinkat(&self.parked, &*hidden, flags); // what is left is swept at the next start
            return Err(e);
        }
        self.tree.add_name(folder, name.as_bytes(), id);
        self.touch(folder);
        Ok(())
    }

    fn link(&mut self, id: FileId, folder: FileId, name: &[u8]) -> Result<(), Errno> {
        let parent = self.free_place(folder, name)?;
        let node = self.tree.node(id)?;
        let Some((from, old)) = node.names.first().filter(|_| node.kind != Kind::Directory).cloned() else {
            return Err(if node.kind == Kind::Directory { Errno::PERM } else { Errno::NOENT });
        };
        rustix::fs::linkat(self.folder(from)?, &*old, &parent, name, AtFlags::empty())?;
        self.tree.add_name(folder, name, id);
        self.touch(folder);
        Ok(())
    }

    fn unlink(&mut self, folder: FileId, name: &[u8], id: FileId) -> Result<(), Errno> {
        self.is_named(folder, name, id)?;
        let node = self.tree.node(id)?;
        let last = node.names.len() == 1;
        let parks = last && node.kind == Kind::File;
        let parent = self.folder(folder)?;
        match node.kind {
            Kind::Directory => return Err(Errno::ISDIR),
            _ if parks => rustix::fs::renameat(&parent, name, &self.parked, parked_name(id))?,
            _ => rustix::fs::unlinkat(&parent, name, AtFlags::empty())?,
        }
        self.tree.remove_name(folder, name);
        if last && !parks {
            self.tree.nodes.remove(&id);
        }
        self.touch(folder);
        Ok(())
    }

    fn remove_folder(&mut self, folder: FileId, name: &[u8], id: FileId) -> Result<(), Errno> {
        self.is_named(folder, name, id)?;
        if self.tree.node(id)?.kind != Kind::Directory {
            return Err(Errno::NOTDIR);
        }
        if self.tree.children(id).next().is_some() {
            return Err(Errno::NOTEMPTY);
        }
        rustix::fs::unlinkat(self.folder(folder)?, name, AtFlags::REMOVEDIR)?;
        self.tree.remove_name(folder, name);
        self.tree.nodes.remove(&id);
        self.touch(folder);
        Ok(())
    }

    fn rename(
        &mut self,
        id: FileId,
        from: (FileId, &[u8]),
        to: (FileId, &[u8]),
        over: Option<FileId>,
        mode: RenameMode,
    ) -> Result<(), Errno> {
        self.is_named(from.0, from.1, id)?;
        check_place(to.0, to.1)?;
        match self.tree.find(to.0, to.1) {
            Ok(there) if Some(there) == over => {}
            Err(Errno::NOENT) if over.is_none() => {}
            Ok(_) | Err(Errno::NOENT) => return Err(Errno::STALE),
            Err(e) => return Err(e),
        }
        // The tree below says so too, but through a path of its own making; ours stays right whatever it says.
        let inside = |folder, moved: FileId| {
            self.tree.nodes[&moved].kind == Kind::Directory && self.tree.lies_within(folder, moved)
        };
        let swapped = over.filter(|_| mode == RenameMode::Exchange);
        if inside(to.0, id) || swapped.is_some_and(|other| inside(from.0, other)) {
            return Err(Errno::INVAL);
        }
        if over == Some(id) && mode != RenameMode::NoReplace {
            return Ok(()); // two names of one file: Linux does nothing
        }
        let (old, new) = (self.folder(from.0)?, self.folder(to.0)?);
        let parks = over.filter(|over| {
            let node = &self.tree.nodes[over];
            mode == RenameMode::Replace && node.kind == Kind::File && node.names.len() == 1
        });
        if let Some(parked) = parks {
            rustix::fs::linkat(&new, to.1, &self.parked, parked_name(parked), AtFlags::empty())?;
        }
        let flags = match mode {
            RenameMode::Replace => RenameFlags::empty(),
            RenameMode::NoReplace => RenameFlags::NOREPLACE,
            RenameMode::Exchange => RenameFlags::EXCHANGE,
        };
        if let Err(e) = rustix::fs::renameat_with(&old, from.1, &new, to.1, flags) {
            if let Some(parked) = parks {
                let _ = rustix::fs::unlinkat(&self.parked, parked_name(parked), AtFlags::empty());
            }
            return Err(e);
        }
        self.tree.remove_name(from.0, from.1);
        self.tree.remove_name(to.0, to.1);
        self.tree.add_name(to.0, to.1, id);
        match (over, swapped) {
            (_, Some(other)) => self.tree.add_name(from.0, from.1, other),
            (Some(over), None) if parks.is_none() && self.tree.nodes[&over].names.is_empty() => {
                self.tree.nodes.remove(&over);
            }
            _ => {}
        }
        self.touch(from.0);
        self.touch(to.0);
        Ok(())
    }

    fn change(&mut self, id: FileId, attrs: &Attrs) -> Result<(), Errno> {
        let kind = self.kind(id)?;
        match (attrs.size, kind) {
            (None, _) | (Some(_), Kind::File) => {}
            (Some(_), Kind::Directory) => return Err(Errno::ISDIR),
            (Some(_), _) => return Err(Errno::INVAL),
        }
        if attrs.mode.is_some() && kind == Kind::Symlink {
            return Err(Errno::OPNOTSUPP);
        }
        // The size first, as only that can be refused half way; the times after it, as it changes them.
        if let Some(size) = attrs.size {
            self.truncate(id, size)?;
        }
        self.set_attributes(id, attrs)
    }

    /// Removes a parked file for good; any other is left alone.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn forget(&mut self, id: FileId) -> Result<(), Errno> {
        if !self.is_parked(id) {
            return Ok(());
        }
        let (last, size) = (self.tree.open(id, OFlags::PATH)?, self.size(id)?);
        rustix::fs::unlinkat(&self.parked, parked_name(id), AtFlags::empty())?;
        self.close(id);
        self.tree.nodes.remove(&id);
        self.unflushed.remove(&id);
        self.changed.remove(&id);
        if size >= LARGE_BYTES {
            // To give back a large file's blocks takes its time, which requests and the lease have not got. Without a
            // thread it is closed here.
            let _ = std::thread::Builder::new().name("free".into()).spawn(move || drop(last));
        }
        Ok(())
    }

    /// Whether a file lost its last name and is kept all the same.
    #[must_use]
    pub fn is_parked(&self, id: FileId) -> bool {
        id != FileId::ROOT && self.tree.nodes.get(&id).is_some_and(|n| n.names.is_empty())
    }

    /// All parked files.
    #[must_use]
    pub fn parked(&self) -> Vec<FileId> {
        self.tree.nodes.keys().copied().filter(|id| self.is_parked(*id)).collect()
    }

    fn folder(&self, id: FileId) -> Result<OwnedFd, Errno> {
        self.tree.open(id, OFlags::PATH | OFlags::DIRECTORY)
    }

    fn is_named(&self, folder: FileId, name: &[u8], id: FileId) -> Result<(), Errno> {
        if self.tree.find(folder, name)? == id { Ok(()) } else { Err(Errno::STALE) }
    }

    fn free_place(&self, folder: FileId, name: &[u8]) -> Result<OwnedFd, Errno> {
        check_place(folder, name)?;
        match self.tree.find(folder, name) {
            Err(Errno::NOENT) => self.folder(folder),
            Err(e) => Err(e),
            Ok(_) => Err(Errno::EXIST),
        }
    }
}

/// Refuses what is no name, and the name of the hidden folder.
fn check_place(folder: FileId, name: &[u8]) -> Result<(), Errno> {
    check_name(name)?;
    if folder == FileId::ROOT && name == LOCAL_FOLDER.as_bytes() { Err(Errno::ACCESS) } else { Ok(()) }
}
