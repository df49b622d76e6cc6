//! Decides which operations make the target's tree equal to the holder's.
//!
//! Holds nothing. Keeps out: data; which bytes are then suspect is part of the answer.
//! Invariant: carried out in order on the target's tree the operations give the holder's, whatever the two were. A plan
//! that was cut in the middle leaves a tree that the next plan repairs.
//!
//! Order: names that go, files that wait under a hidden name in the root, directories from the top, names that come,
//! attributes. So no name is ever taken twice and no directory ever moved into itself.
use super::tree::{Entry, Kind, Tree};
use super::{Attrs, FileName, NodeKind, Op, Owner, RenameMode, XattrMode};
use crate::ids::FileId;
use std::collections::BTreeMap;

/// What is to be done at the target.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// In this order.
    pub ops: Vec<Op>,
    /// Files whose data must be compared, each from this byte on: new ones from 0, those of another length from the
    /// shorter length.
    pub suspects: BTreeMap<FileId, u64>,
}

/// Makes the plan.
#[must_use]
pub fn plan(holder: &Tree, target: &Tree) -> Plan {
    let mut planner = Planner { holder, model: target.clone(), plan: Plan::default(), hidden: BTreeMap::new() };
    planner.remove_and_hide();
    planner.place_directories();
    planner.place_files();
    planner.set_attributes(target);
    assert!(planner.model == *holder, "a plan makes the target's tree the holder's");
    planner.plan
}

struct Planner<'a> {
    holder: &'a Tree,
    /// The target's tree after the operations so far.
    model: Tree,
    plan: Plan,
    /// Files that wait in the root, and under which name.
    hidden: BTreeMap<FileId, FileName>,
}

impl Planner<'_> {
    fn push(&mut self, op: Op) {
        let outcome = self.model.apply(&op);
        assert!(outcome.is_ok(), "a plan holds only operations that can be done: {op:?} gave {outcome:?}");
        self.plan.ops.push(op);
    }

    /// Whether the target's file can become the holder's: kind and target of a link cannot be changed.
    fn survives(&self, id: FileId, entry: &Entry) -> bool {
        self.holder.get(id).is_some_and(|wanted| wanted.kind == entry.kind && wanted.target == entry.target)
    }

    /// Takes all names away that the holder has not got. A file that would lose its last one waits in the root.
    fn remove_and_hide(&mut self) {
        let before = self.model.clone();
        for (id, entry) in before.entries() {
            let survives = self.survives(*id, entry);
            let right = |link| survives && self.holder.get(*id).is_some_and(|wanted| wanted.links.contains(link));
            let wrong: Vec<_> = entry.links.iter().filter(|link| !right(link)).cloned().collect();
            let mut lost = survives && wrong.len() == entry.links.len();
            for (parent, name) in wrong {
                if std::mem::take(&mut lost) {
                    self.hide(parent, name, *id);
                } else if entry.kind != Kind::Directory {
                    self.push(Op::Unlink { parent, name, id: *id });
                }
            }
        }
        // From below: what is left in a directory that goes are directories that go, too.
        for id in self.model.top_down().into_iter().rev() {
            let entry = self.model.get(id).expect("it was listed");
            if !self.survives(id, entry) {
                let (parent, name) = entry.links.first().expect("only the root has no name, and it stays").clone();
                self.push(Op::Rmdir { parent, name, id });
            }
        }
    }

    fn hide(&mut self, parent: FileId, name: FileName, id: FileId) {
        let root = FileId::ROOT;
        let hidden = (0..)
            .map(|n: u64| FileName::new(format!(".vmtwin-resync-{id}-{n}")).expect("short and plain"))
            .find(|h| self.model.lookup(root, h).is_none() && self.holder.lookup(root, h).is_none())
            .expect("there are fewer files than numbers");
        self.move_to((parent, name), id, (root, hidden.clone()));
        self.hidden.insert(id, hidden);
    }

    fn move_to(&mut self, (parent, name): (FileId, FileName), id: FileId, (new_parent, new_name): (FileId, FileName)) {
        let mode = RenameMode::NoReplace;
        self.push(Op::Rename { parent, name, id, new_parent, new_name, over: None, mode });
    }

    fn place_directories(&mut self) {
        for id in self.holder.top_down().into_iter().skip(1) {
            let wanted = self.holder.get(id).expect("it was listed");
            let (parent, name) = wanted.links.first().expect("a directory has a name").clone();
            if let Some(hidden) = self.hidden.remove(&id) {
                self.move_to((FileId::ROOT, hidden), id, (parent, name));
            } else if self.model.get(id).is_none() {
                self.push(Op::Mkdir { parent, name, id, owner: owner(wanted) });
            }
        }
    }

    fn place_files(&mut self) {
        let holder = self.holder;
        for (&id, wanted) in holder.entries().iter().filter(|(_, e)| e.kind != Kind::Directory) {
            let mut links = wanted.links.iter().cloned();
            if let Some(hidden) = self.hidden.remove(&id) {
                let to = links.next().expect("a file has a name");
                self.move_to((FileId::ROOT, hidden), id, to);
            } else if self.model.get(id).is_none() {
                let (parent, name) = links.next().expect("a file has a name");
                self.push(make(parent, name, id, wanted));
                if wanted.size > 0 {
                    self.plan.suspects.insert(id, 0);
                }
            }
            for (parent, name) in links {
                if self.model.lookup(parent, &name).is_none() {
                    self.push(Op::Link { id, parent, name });
                }
            }
        }
    }

    /// Attributes go away before owners and modes are set, and come after: an access list is part of the mode, and a change
    /// of the owner clears capabilities and bits of the mode.
    fn set_attributes(&mut self, target: &Tree) {
        let holder = self.holder;
        for (&id, wanted) in holder.entries() {
            let mut have = self.model.get(id).expect("all files are in place").clone();
            for name in have.xattrs.keys().filter(|name| !wanted.xattrs.contains_key(*name)) {
                self.push(Op::RemoveXattr { id, name: name.clone() });
            }
            let owner_changes = (have.uid, have.gid) != (wanted.uid, wanted.gid);
            let mode_changes = (owner_changes || have.mode != wanted.mode) && wanted.kind != Kind::Symlink;
            let attrs = Attrs {
                mode: mode_changes.then_some(wanted.mode),
                uid: owner_changes.then_some(wanted.uid),
                gid: owner_changes.then_some(wanted.gid),
                size: (have.size != wanted.size).then_some(wanted.size),
                ..Attrs::default()
            };
            if let (Some(_), Some(old)) = (attrs.size, target.get(id)) {
                self.plan.suspects.entry(id).or_insert(old.size.min(wanted.size));
            }
            if attrs != Attrs::default() {
                self.push(Op::SetAttr { id, attrs });
            }
            if owner_changes || mode_changes {
                have.xattrs.retain(|name, _| name.starts_with(b"user."));
            }
            for (name, value) in wanted.xattrs.iter().filter(|(name, value)| have.xattrs.get(*name) != Some(value)) {
                let (name, value) = (name.clone(), value.clone());
                self.push(Op::SetXattr { id, name, value, mode: XattrMode::Set });
            }
        }
    }
}

fn owner(entry: &Entry) -> Owner {
    Owner { mode: entry.mode, uid: entry.uid, gid: entry.gid }
}

fn make(parent: FileId, name: FileName, id: FileId, wanted: &Entry) -> Op {
    let owner = owner(wanted);
    match wanted.kind {
        Kind::File => Op::Create { parent, name, id, owner },
        Kind::Directory => Op::Mkdir { parent, name, id, owner },
        Kind::Symlink => Op::Symlink { parent, name, id, owner, target: wanted.target.clone() },
        Kind::Fifo => Op::Mknod { parent, name, id, owner, kind: NodeKind::Fifo },
        Kind::Socket => Op::Mknod { parent, name, id, owner, kind: NodeKind::Socket },
    }
}
