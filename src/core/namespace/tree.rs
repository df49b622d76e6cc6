//! The listing of a directory, and the model of what an operation does to it.
//!
//! Holds: for each file its kind, attributes, names. Keeps out: data, times, allocation, and files without a name (they
//! are parked or open, not part of the directory).
//! Invariant: every name lies in a directory of the tree, no name is used twice, a directory has one name (the root
//! none), and every file is reached from the root.
use super::{Attrs, Errno, FileName, MODE_BITS, Op, Outcome, Owner, RenameMode, XattrMode};
use crate::ids::FileId;
use crate::limits::{
    FILES_MAX, LINKS_MAX, PAYLOAD_BYTES_MAX, SYMLINK_BYTES_MAX, TREE_BYTES_MAX, XATTR_BYTES_MAX, XATTRS_BYTES_MAX,
    XATTRS_MAX,
};
use crate::wire::codec::{DecodeError, Reader, Writer};
use std::collections::{BTreeMap, BTreeSet};

/// What a file is. Devices are not carried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Has data.
    File,
    /// Has names.
    Directory,
    /// Has a target.
    Symlink,
    /// A named pipe.
    Fifo,
    /// A socket's name.
    Socket,
}

/// One file of the listing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// What it is.
    pub kind: Kind,
    /// Permission bits; 0o777 for a symbolic link.
    pub mode: u32,
    /// Numeric owner.
    pub uid: u32,
    /// Numeric group.
    pub gid: u32,
    /// Length in bytes; zero for all but files.
    pub size: u64,
    /// Target of a symbolic link; empty otherwise.
    pub target: Vec<u8>,
    /// Shared extended attributes (`xattr_is_shared`).
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    /// Its names: directory and name.
    pub links: BTreeSet<(FileId, FileName)>,
}

impl Entry {
    /// A nameless, empty one.
    #[must_use]
    pub fn new(kind: Kind, owner: Owner) -> Self {
        Self {
            kind,
            mode: if kind == Kind::Symlink { 0o777 } else { owner.mode & MODE_BITS },
            uid: owner.uid,
            gid: owner.gid,
            size: 0,
            target: Vec::new(),
            xattrs: BTreeMap::new(),
            links: BTreeSet::new(),
        }
    }

    /// Format: u64 id · u8 kind 0..=4 · u32 mode, uid, gid · u64 size · target · count + attributes (name, value) · count +
    /// links (u64 directory, name).
    fn encode(&self, id: FileId, out: &mut Writer<'_>) {
        out.u64(id.0);
        out.u8(match self.kind {
            Kind::File => 0,
            Kind::Directory => 1,
            Kind::Symlink => 2,
            Kind::Fifo => 3,
            Kind::Socket => 4,
        });
        Owner { mode: self.mode, uid: self.uid, gid: self.gid }.encode(out);
        out.u64(self.size);
        out.blob(&self.target);
        out.list(&self.xattrs.iter().collect::<Vec<_>>(), |out, (name, value)| {
            out.blob(name);
            out.blob(value);
        });
        out.list(&self.links.iter().collect::<Vec<_>>(), |out, (parent, name)| {
            out.u64(parent.0);
            out.blob(name.as_bytes());
        });
    }

    fn decode(from: &mut Reader<'_>) -> Result<(FileId, Self), DecodeError> {
        let id = FileId(from.u64()?);
        let kind = match from.u8()? {
            0 => Kind::File,
            1 => Kind::Directory,
            2 => Kind::Symlink,
            3 => Kind::Fifo,
            4 => Kind::Socket,
            _ => return Err(DecodeError::Bad { what: "kind of file" }),
        };
        let mut entry = Self::new(kind, Owner::decode(from)?);
        entry.size = super::decode_size(from)?;
        entry.target = from.blob(SYMLINK_BYTES_MAX)?.to_vec();
        let xattrs =
            from.list(XATTRS_MAX, |from| Ok((super::decode_xattr_name(from)?, from.blob(XATTR_BYTES_MAX)?.to_vec())))?;
        let links = from.list(LINKS_MAX, |from| Ok((FileId(from.u64()?), FileName::decode(from)?)))?;
        let (xattrs_len, links_len) = (xattrs.len(), links.len());
        entry.xattrs = xattrs.into_iter().collect();
        entry.links = links.into_iter().collect();
        let twice = entry.xattrs.len() != xattrs_len || entry.links.len() != links_len;
        let only_files_have_data = kind == Kind::File || entry.size == 0;
        let only_links_have_targets = (kind == Kind::Symlink) != entry.target.is_empty();
        let xattr_bytes: usize = entry.xattrs.iter().map(|(n, v)| n.len() + v.len()).sum();
        if twice || !only_files_have_data || !only_links_have_targets || xattr_bytes > XATTRS_BYTES_MAX {
            return Err(DecodeError::Bad { what: "entry of the listing" });
        }
        Ok((id, entry))
    }
}

/// A directory with all that is in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tree {
    entries: BTreeMap<FileId, Entry>,
    names: BTreeMap<(FileId, FileName), FileId>,
}

impl Tree {
    /// An empty directory.
    #[must_use]
    pub fn new(owner: Owner) -> Self {
        let root = Entry::new(Kind::Directory, owner);
        Self { entries: BTreeMap::from([(FileId::ROOT, root)]), names: BTreeMap::new() }
    }

    /// A tree of entries as a listing found them.
    ///
    /// # Errors
    /// A sentence where the entries make no tree: no root, a name in no directory or used twice, a directory with several
    /// names, a file that the root does not reach.
    pub fn from_entries(entries: BTreeMap<FileId, Entry>) -> Result<Self, &'static str> {
        let mut names = BTreeMap::new();
        let directory = |id: &FileId| entries.get(id).is_some_and(|e| e.kind == Kind::Directory);
        if !directory(&FileId::ROOT) {
            return Err("a tree without its root");
        }
        if entries.len() > FILES_MAX {
            return Err("too many files");
        }
        for (id, entry) in &entries {
            let wanted = match (*id, entry.kind) {
                (FileId(0), _) => return Err("a file with the number that means none"),
                (FileId::ROOT, _) => 0..=0,
                (_, Kind::Directory) => 1..=1,
                _ => 1..=LINKS_MAX,
            };
            if !wanted.contains(&entry.links.len()) {
                return Err("a file with too few or too many names");
            }
            for link in &entry.links {
                if !directory(&link.0) {
                    return Err("a name that lies in no directory");
                }
                if names.insert(link.clone(), *id).is_some() {
                    return Err("a name that is used twice");
                }
            }
        }
        let tree = Self { entries, names };
        if tree.top_down().len() != tree.entries.values().filter(|e| e.kind == Kind::Directory).count() {
            return Err("a directory that the root does not reach");
        }
        Ok(tree)
    }

    /// All files, in the order of their ids.
    #[must_use]
    pub fn entries(&self) -> &BTreeMap<FileId, Entry> {
        &self.entries
    }

    /// One file.
    #[must_use]
    pub fn get(&self, id: FileId) -> Option<&Entry> {
        self.entries.get(&id)
    }

    /// Which file has this name.
    #[must_use]
    pub fn lookup(&self, parent: FileId, name: &FileName) -> Option<FileId> {
        self.names.get(&(parent, name.clone())).copied()
    }

    /// Names in a directory, in order.
    pub fn children(&self, parent: FileId) -> impl Iterator<Item = (&FileName, FileId)> {
        let from = (parent, FileName(Vec::new()));
        self.names.range(from..).take_while(move |((p, _), _)| *p == parent).map(|((_, name), id)| (name, *id))
    }

    /// Directories, each after the one that it lies in.
    #[must_use]
    pub fn top_down(&self) -> Vec<FileId> {
        let mut order = vec![FileId::ROOT];
        let mut next = 0;
        while let Some(&parent) = order.get(next) {
            let inner = |id: &FileId| self.entries.get(id).is_some_and(|e| e.kind == Kind::Directory);
            order.extend(self.children(parent).map(|(_, id)| id).filter(inner));
            next += 1;
        }
        order
    }

    /// Sets a file's length, as a write beyond its end does.
    pub fn set_size(&mut self, id: FileId, size: u64) {
        if let Some(entry) = self.entries.get_mut(&id).filter(|e| e.kind == Kind::File) {
            entry.size = size;
        }
    }

    /// Does what a file system does with `op`. A file whose last name goes is out of the tree.
    ///
    /// # Errors
    /// As Linux; `ESTALE` where a name belongs to another file than the operation says. Nothing is changed then.
    pub fn apply(&mut self, op: &Op) -> Outcome {
        match op {
            Op::Create { parent, name, id, owner } => self.make(*parent, name, *id, Entry::new(Kind::File, *owner)),
            Op::Mkdir { parent, name, id, owner } => self.make(*parent, name, *id, Entry::new(Kind::Directory, *owner)),
            Op::Symlink { parent, name, id, owner, target } => {
                if target.is_empty() {
                    return Err(Errno::ENOENT);
                }
                let entry = Entry { target: target.clone(), ..Entry::new(Kind::Symlink, *owner) };
                self.make(*parent, name, *id, entry)
            }
            Op::Mknod { parent, name, id, owner, kind } => {
                let kind = match kind {
                    super::NodeKind::Fifo => Kind::Fifo,
                    super::NodeKind::Socket => Kind::Socket,
                };
                self.make(*parent, name, *id, Entry::new(kind, *owner))
            }
            Op::Link { id, parent, name } => {
                let entry = self.entries.get(id).ok_or(Errno::ENOENT)?;
                if entry.kind == Kind::Directory {
                    return Err(Errno::EPERM);
                }
                if entry.links.len() >= LINKS_MAX {
                    return Err(Errno::EMLINK);
                }
                self.free(*parent, name)?;
                self.tie(*parent, name, *id);
                Ok(())
            }
            Op::Unlink { parent, name, id } => {
                if self.named(*parent, name, *id)?.kind == Kind::Directory {
                    return Err(Errno::EISDIR);
                }
                self.untie(*parent, name);
                Ok(())
            }
            Op::Rmdir { parent, name, id } => {
                if self.named(*parent, name, *id)?.kind != Kind::Directory {
                    return Err(Errno::ENOTDIR);
                }
                if self.children(*id).next().is_some() {
                    return Err(Errno::ENOTEMPTY);
                }
                self.untie(*parent, name);
                Ok(())
            }
            Op::Rename { parent, name, id, new_parent, new_name, over, mode } => {
                self.rename((*parent, name), *id, (*new_parent, new_name), *over, *mode)
            }
            Op::SetAttr { id, attrs } => self.set_attrs(*id, attrs),
            Op::SetXattr { id, name, value, mode } => {
                let entry = self.entries.get_mut(id).ok_or(Errno::ENOENT)?;
                match (mode, entry.xattrs.contains_key(name)) {
                    (XattrMode::Create, true) => return Err(Errno::EEXIST),
                    (XattrMode::Replace, false) => return Err(Errno::ENODATA),
                    _ => {}
                }
                entry.xattrs.insert(name.clone(), value.clone());
                Ok(())
            }
            Op::RemoveXattr { id, name } => {
                let entry = self.entries.get_mut(id).ok_or(Errno::ENOENT)?;
                entry.xattrs.remove(name).map(|_| ()).ok_or(Errno::ENODATA)
            }
        }
    }

    /// That this name may be made.
    fn free(&self, parent: FileId, name: &FileName) -> Outcome {
        match self.entries.get(&parent) {
            None => Err(Errno::ENOENT),
            Some(entry) if entry.kind != Kind::Directory => Err(Errno::ENOTDIR),
            Some(_) if self.lookup(parent, name).is_some() => Err(Errno::EEXIST),
            Some(_) => Ok(()),
        }
    }

    /// The file of this name, which must be `id`.
    fn named(&self, parent: FileId, name: &FileName, id: FileId) -> Result<&Entry, Errno> {
        match self.lookup(parent, name) {
            None => Err(Errno::ENOENT),
            Some(found) if found != id => Err(Errno::ESTALE),
            Some(_) => Ok(&self.entries[&id]),
        }
    }

    fn make(&mut self, parent: FileId, name: &FileName, id: FileId, entry: Entry) -> Outcome {
        self.free(parent, name)?;
        if self.entries.contains_key(&id) || id == FileId(0) {
            return Err(Errno::ESTALE);
        }
        if self.entries.len() >= FILES_MAX {
            return Err(Errno::ENOSPC);
        }
        self.entries.insert(id, entry);
        self.tie(parent, name, id);
        Ok(())
    }

    fn tie(&mut self, parent: FileId, name: &FileName, id: FileId) {
        let link = (parent, name.clone());
        self.entries.get_mut(&id).expect("its caller looked").links.insert(link.clone());
        self.names.insert(link, id);
    }

    fn untie(&mut self, parent: FileId, name: &FileName) {
        let link = (parent, name.clone());
        let id = self.names.remove(&link).expect("its caller looked");
        let entry = self.entries.get_mut(&id).expect("a name has its file");
        entry.links.remove(&link);
        if entry.links.is_empty() {
            self.entries.remove(&id);
        }
    }

    fn rename(
        &mut self,
        (parent, name): (FileId, &FileName),
        id: FileId,
        (new_parent, new_name): (FileId, &FileName),
        over: Option<FileId>,
        mode: RenameMode,
    ) -> Outcome {
        let moved = self.named(parent, name, id)?.kind == Kind::Directory;
        match self.entries.get(&new_parent) {
            None => return Err(Errno::ENOENT),
            Some(entry) if entry.kind != Kind::Directory => return Err(Errno::ENOTDIR),
            Some(_) => {}
        }
        let found = self.lookup(new_parent, new_name);
        if found != over {
            return Err(Errno::ESTALE);
        }
        if moved && self.lies_in(new_parent, id) {
            return Err(Errno::EINVAL);
        }
        let Some(other) = over else {
            if mode == RenameMode::Exchange {
                return Err(Errno::ENOENT);
            }
            self.tie(new_parent, new_name, id);
            self.untie(parent, name);
            return Ok(());
        };
        let other_moved = self.entries[&other].kind == Kind::Directory;
        match mode {
            RenameMode::NoReplace => Err(Errno::EEXIST),
            // Two names of one file: Linux does nothing, and says so to nobody.
            _ if other == id => Ok(()),
            RenameMode::Exchange if other_moved && self.lies_in(parent, other) => Err(Errno::EINVAL),
            RenameMode::Exchange => {
                self.entries.get_mut(&id).expect("named").links.remove(&(parent, name.clone()));
                self.entries.get_mut(&other).expect("named").links.remove(&(new_parent, new_name.clone()));
                self.tie(new_parent, new_name, id);
                self.tie(parent, name, other);
                Ok(())
            }
            RenameMode::Replace => {
                match (moved, other_moved) {
                    (true, false) => return Err(Errno::ENOTDIR),
                    (false, true) => return Err(Errno::EISDIR),
                    (true, true) if self.children(other).next().is_some() => return Err(Errno::ENOTEMPTY),
                    _ => {}
                }
                self.untie(new_parent, new_name);
                self.tie(new_parent, new_name, id);
                self.untie(parent, name);
                Ok(())
            }
        }
    }

    /// Whether `directory` is `above` or lies somewhere in it.
    fn lies_in(&self, mut directory: FileId, above: FileId) -> bool {
        loop {
            if directory == above {
                return true;
            }
            match self.entries.get(&directory).and_then(|e| e.links.first()) {
                Some((parent, _)) => directory = *parent,
                None => return false,
            }
        }
    }

    fn set_attrs(&mut self, id: FileId, attrs: &Attrs) -> Outcome {
        let entry = self.entries.get_mut(&id).ok_or(Errno::ENOENT)?;
        if attrs.size.is_some() && entry.kind != Kind::File {
            return Err(if entry.kind == Kind::Directory { Errno::EISDIR } else { Errno::EINVAL });
        }
        if attrs.mode.is_some() && entry.kind == Kind::Symlink {
            return Err(Errno::EOPNOTSUPP);
        }
        entry.uid = attrs.uid.unwrap_or(entry.uid);
        entry.gid = attrs.gid.unwrap_or(entry.gid);
        entry.mode = attrs.mode.unwrap_or(entry.mode) & MODE_BITS;
        entry.size = attrs.size.unwrap_or(entry.size);
        Ok(())
    }

    /// The listing in pieces that each fit one frame: u32 number from 0 · u8 last · entries, whole ones, to the end.
    #[must_use]
    pub fn pieces(&self) -> Vec<Vec<u8>> {
        let mut pieces: Vec<Vec<u8>> = Vec::new();
        let begin = |number: usize| {
            let mut piece = u32::try_from(number).expect("bounded by FILES_MAX").to_le_bytes().to_vec();
            piece.push(0);
            piece
        };
        let mut piece = begin(0);
        let mut bytes = Vec::new();
        for (id, entry) in &self.entries {
            bytes.clear();
            entry.encode(*id, &mut Writer::new(&mut bytes));
            if piece.len() + bytes.len() > PAYLOAD_BYTES_MAX {
                pieces.push(std::mem::replace(&mut piece, begin(pieces.len() + 1)));
            }
            piece.extend_from_slice(&bytes);
        }
        piece[4] = 1;
        pieces.push(piece);
        pieces
    }
}

/// Puts a listing together again.
#[derive(Debug, Default)]
pub struct TreeReader {
    entries: BTreeMap<FileId, Entry>,
    pieces: u32,
    bytes: usize,
}

impl TreeReader {
    /// Takes the next piece; the tree, when it was the last.
    ///
    /// # Errors
    /// A piece out of order, bytes beyond the bounds, entries that make no tree. The reader is of no use after that.
    pub fn add(&mut self, piece: &[u8]) -> Result<Option<Tree>, DecodeError> {
        let mut from = Reader::new(piece);
        let (number, last) = (from.u32()?, from.bool()?);
        if number != self.pieces {
            return Err(DecodeError::Bad { what: "number of a piece of the listing" });
        }
        self.pieces += 1;
        self.bytes += piece.len();
        if piece.len() > PAYLOAD_BYTES_MAX || self.bytes > TREE_BYTES_MAX {
            return Err(DecodeError::Length { found: self.bytes as u64, most: TREE_BYTES_MAX as u64 });
        }
        while from.left() > 0 {
            let (id, entry) = Entry::decode(&mut from)?;
            if self.entries.insert(id, entry).is_some() || self.entries.len() > FILES_MAX {
                return Err(DecodeError::Bad { what: "number of files in the listing" });
            }
        }
        if !last {
            return Ok(None);
        }
        let entries = std::mem::take(&mut self.entries);
        Tree::from_entries(entries).map(Some).map_err(|what| DecodeError::Bad { what })
    }
}
