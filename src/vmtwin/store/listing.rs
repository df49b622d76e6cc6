//! The whole tree as the resync compares it.
use super::Store;
use super::attributes::is_offered;
use rustix::io::Errno;
use std::collections::{BTreeMap, BTreeSet};
use vmtwin_core::ids::FileId;
use vmtwin_core::namespace::{Entry, FileName, Kind, MODE_BITS, Tree, xattr_is_shared};

impl Store {
    /// Lists every file that has a name.
    ///
    /// # Errors
    /// What the kernel says; `EUCLEAN` where the names make no tree.
    pub fn list(&self) -> Result<Tree, Errno> {
        let mut entries = BTreeMap::new();
        for id in self.ids() {
            entries.insert(id, self.entry(id)?);
        }
        Tree::from_entries(entries).map_err(|_| Errno::UCLEAN)
    }

    fn entry(&self, id: FileId) -> Result<Entry, Errno> {
        let (kind, stat) = (self.kind(id)?, self.stat(id)?);
        let mut xattrs = BTreeMap::new();
        for name in self.attribute_names(id)? {
            if xattr_is_shared(&name) && is_offered(&name) {
                let value = self.attribute(id, &name)?;
                xattrs.insert(name, value);
            }
        }
        let mut links = BTreeSet::new();
        for (folder, name) in &self.tree.node(id)?.names {
            links.insert((*folder, FileName::new(name.clone()).map_err(|_| Errno::UCLEAN)?));
        }
        Ok(Entry {
            kind,
            mode: if kind == Kind::Symlink { 0o777 } else { stat.st_mode & MODE_BITS },
            uid: stat.st_uid,
            gid: stat.st_gid,
            size: if kind == Kind::File { u64::try_from(stat.st_size).unwrap_or(0) } else { 0 },
            target: if kind == Kind::Symlink { self.read_link(id)? } else { Vec::new() },
            xattrs,
            links,
        })
    }
}
