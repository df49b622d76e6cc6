//! The store against the model of the namespace (`core::namespace::Tree`): the same operations, the same outcomes.
use super::*;
use proptest::prelude::*;
use vmtwin_core::namespace::{Attrs, FileName, NodeKind, Op, Owner, RenameMode, Tree, XattrMode};

const OWNER: Owner = Owner { mode: 0o640, uid: 0, gid: 0 };

fn store() -> (tempfile::TempDir, Store) {
    let folder = tempfile::tempdir().unwrap();
    let (store, _) = Store::open(folder.path()).unwrap();
    (folder, store)
}

fn name(text: &str) -> FileName {
    FileName::new(text).unwrap()
}

fn create(store: &mut Store, text: &str, id: u64) -> FileId {
    store.apply(&Op::Create { parent: FileId::ROOT, name: name(text), id: FileId(id), owner: OWNER }).unwrap();
    FileId(id)
}

/// Operations over few names and ids, so that most of them meet something.
fn operation() -> impl Strategy<Value = Op> {
    let file = || (1_u64..9).prop_map(FileId);
    let text = || "[abc]".prop_map(|t| name(&t));
    let owner = || (0_u32..2, 0_u32..0o1000).prop_map(|(uid, mode)| Owner { mode, uid, gid: uid });
    let value = || proptest::collection::vec(any::<u8>(), 0..3);
    prop_oneof![
        (file(), text(), file(), owner()).prop_map(|(parent, name, id, owner)| Op::Create { parent, name, id, owner }),
        (file(), text(), file(), owner()).prop_map(|(parent, name, id, owner)| Op::Mkdir { parent, name, id, owner }),
        (file(), text(), file(), owner()).prop_map(|(parent, name, id, owner)| Op::Symlink {
            parent,
            name,
            id,
            owner,
            target: b"to".to_vec()
        }),
        (file(), text(), file(), owner()).prop_map(|(parent, name, id, owner)| Op::Mknod {
            parent,
            name,
            id,
            owner,
            kind: NodeKind::Fifo
        }),
        (file(), file(), text()).prop_map(|(id, parent, name)| Op::Link { id, parent, name }),
        (file(), text(), file()).prop_map(|(parent, name, id)| Op::Unlink { parent, name, id }),
        (file(), text(), file()).prop_map(|(parent, name, id)| Op::Rmdir { parent, name, id }),
        (file(), text(), file(), file(), text(), proptest::option::of(file()), 0..3_usize).prop_map(
            |(parent, name, id, new_parent, new_name, over, mode)| {
                let mode = [RenameMode::Replace, RenameMode::NoReplace, RenameMode::Exchange][mode];
                Op::Rename { parent, name, id, new_parent, new_name, over, mode }
            }
        ),
        (file(), proptest::option::of(0_u32..0o1000), proptest::option::of(0_u64..9000))
            .prop_map(|(id, mode, size)| Op::SetAttr { id, attrs: Attrs { mode, size, ..Attrs::default() } }),
        (file(), value()).prop_map(|(id, value)| Op::SetXattr {
            id,
            name: b"security.vmtwintest".to_vec(),
            value,
            mode: XattrMode::Set
        }),
        file().prop_map(|id| Op::RemoveXattr { id, name: b"security.vmtwintest".to_vec() }),
    ]
}

/// Ids that fit: what an operation names is what lies there, more often than not.
fn aimed(op: Op, model: &Tree) -> Op {
    let there = |parent: FileId, name: &FileName| model.lookup(parent, name);
    match op {
        Op::Unlink { parent, name, id } => {
            let id = there(parent, &name).unwrap_or(id);
            Op::Unlink { parent, name, id }
        }
        Op::Rmdir { parent, name, id } => {
            let id = there(parent, &name).unwrap_or(id);
            Op::Rmdir { parent, name, id }
        }
        Op::Rename { parent, name, id, new_parent, new_name, mode, .. } => {
            let (id, over) = (there(parent, &name).unwrap_or(id), there(new_parent, &new_name));
            Op::Rename { parent, name, id, new_parent, new_name, over, mode }
        }
        other => other,
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn the_store_does_what_the_model_does_and_finds_it_again(
        ops in proptest::collection::vec((operation(), prop::bool::weighted(0.8)), 1..60),
    ) {
        let (folder, mut store) = store();
        let mut model = store.list().unwrap();
        for (op, aim) in ops {
            let op = if aim { aimed(op, &model) } else { op };
            // A file that lost its names is out of the model; the store keeps it until it is told.
            for parked in store.parked() {
                store.forget(parked).unwrap();
            }
            let (ours, theirs) = (store.apply(&op), model.apply(&op));
            prop_assert_eq!(ours.is_ok(), theirs.is_ok(), "{:?}: store {:?}, model {:?}", op, ours, theirs);
        }
        prop_assert_eq!(&store.list().unwrap(), &model);
        drop(store);
        let (store, scanned) = Store::open(folder.path()).unwrap();
        prop_assert_eq!(scanned, Scanned::default());
        prop_assert_eq!(&store.list().unwrap(), &model);
    }
}

#[test]
fn what_was_there_gets_ids_and_keeps_them_and_hard_links_share_one() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::create_dir(folder.path().join("sub")).unwrap();
    std::fs::write(folder.path().join("sub/disk"), b"12345").unwrap();
    std::fs::hard_link(folder.path().join("sub/disk"), folder.path().join("again")).unwrap();
    std::os::unix::fs::symlink("nowhere", folder.path().join("link")).unwrap();
    let (store, scanned) = Store::open(folder.path()).unwrap();
    assert_eq!(scanned, Scanned { fresh: 3, skipped: 0 });
    let sub = store.lookup(FileId::ROOT, b"sub").unwrap();
    let disk = store.lookup(sub, b"disk").unwrap();
    assert_eq!(store.lookup(FileId::ROOT, b"again").unwrap(), disk);
    assert_eq!(store.stat(disk).unwrap().st_nlink, 2);
    assert_eq!(store.read_link(store.lookup(FileId::ROOT, b"link").unwrap()).unwrap(), b"nowhere");
    let (again, scanned) = Store::open(folder.path()).unwrap();
    assert_eq!((again.list().unwrap(), scanned.fresh), (store.list().unwrap(), 0));
}

#[test]
fn a_copy_that_brought_its_id_along_is_a_new_file() {
    let (folder, mut store) = store();
    let id = create(&mut store, "a", 77);
    drop(store);
    std::fs::write(folder.path().join("b"), b"").unwrap();
    let copy = rustix::fs::setxattr(
        folder.path().join("b"),
        "trusted.vmtwin.id",
        &id.0.to_le_bytes(),
        rustix::fs::XattrFlags::empty(),
    );
    copy.unwrap();
    let (store, scanned) = Store::open(folder.path()).unwrap();
    assert_eq!(scanned.fresh, 1);
    assert_eq!(store.lookup(FileId::ROOT, b"a").unwrap(), id);
    assert_ne!(store.lookup(FileId::ROOT, b"b").unwrap(), id);
}

#[test]
fn the_hidden_folder_is_in_no_listing_and_cannot_be_reached_or_made() {
    let (_folder, mut store) = store();
    let hidden = b".vmtwin-local";
    assert_eq!(store.lookup(FileId::ROOT, hidden), Err(Errno::NOENT));
    assert_eq!(store.children(FileId::ROOT).unwrap().count(), 0);
    let op = Op::Mkdir { parent: FileId::ROOT, name: name(".vmtwin-local"), id: FileId(5), owner: OWNER };
    assert_eq!(store.apply(&op), Err(Errno::ACCESS));
    let id = create(&mut store, "a", 6);
    let op = Op::Rename {
        parent: FileId::ROOT,
        name: name("a"),
        id,
        new_parent: FileId::ROOT,
        new_name: name(".vmtwin-local"),
        over: None,
        mode: RenameMode::Replace,
    };
    assert_eq!(store.apply(&op), Err(Errno::ACCESS));
}

#[test]
fn an_unlinked_file_lives_on_until_it_is_forgotten_or_the_next_start() {
    let (folder, mut store) = store();
    let id = create(&mut store, "a", 6);
    rustix::io::pwrite(&store.descriptors(id).unwrap().buffered, b"data", 0).unwrap();
    store.apply(&Op::Unlink { parent: FileId::ROOT, name: name("a"), id }).unwrap();
    assert!(store.is_parked(id) && !folder.path().join("a").exists());
    assert_eq!((store.stat(id).unwrap().st_nlink, store.size(id).unwrap()), (0, 4));
    let other = create(&mut store, "a", 7);
    store.forget(id).unwrap();
    assert_eq!(store.stat(id).unwrap_err(), Errno::STALE);
    store.apply(&Op::Unlink { parent: FileId::ROOT, name: name("a"), id: other }).unwrap();
    drop(store);
    let (store, _) = Store::open(folder.path()).unwrap();
    assert_eq!(store.list().unwrap().entries().len(), 1);
    assert_eq!(std::fs::read_dir(folder.path().join(".vmtwin-local/parked")).unwrap().count(), 0);
}

#[test]
fn attributes_of_the_host_are_not_offered_and_the_others_are_listed() {
    let (_folder, mut store) = store();
    let id = create(&mut store, "a", 6);
    let none = rustix::fs::XattrFlags::empty();
    assert_eq!(store.set_attribute(id, b"trusted.x", b"1", none), Err(Errno::NOTSUP));
    assert_eq!(store.attribute(id, b"trusted.vmtwin.id"), Err(Errno::NOTSUP));
    store.set_attribute(id, b"user.x", &[7; 2000], none).unwrap();
    assert_eq!(store.attribute_names(id).unwrap(), vec![b"user.x".to_vec()]);
    assert_eq!(store.attribute(id, b"user.x").unwrap(), vec![7; 2000]);
    assert_eq!(store.attribute(id, b"user.y"), Err(Errno::NODATA));
}

#[test]
fn holes_are_found() {
    let (_folder, mut store) = store();
    let id = create(&mut store, "a", 6);
    rustix::io::pwrite(&store.descriptors(id).unwrap().buffered, &[1; 4096], 1 << 20).unwrap();
    assert_eq!(store.seek(id, 0, Seek::Data).unwrap(), 1 << 20);
    assert_eq!(store.seek(id, 0, Seek::Hole).unwrap(), 0);
}
