//! Promises of the listing, the model and the planner, over arbitrary trees and bytes.
use super::*;
use proptest::prelude::*;
use std::collections::BTreeMap;

fn name(n: &str) -> FileName {
    FileName::new(n).unwrap()
}

fn owner(n: u32) -> Owner {
    Owner { mode: 0o600 + n % 8, uid: n % 3, gid: n % 2 }
}

/// Operations over few ids and names, so that they meet; those that make no sense are refused by the model.
fn any_op() -> impl Strategy<Value = Op> {
    let id = || prop_oneof![Just(1u64), 2..9u64].prop_map(FileId);
    let new = || (2..9u64).prop_map(FileId);
    let file_name = || (0..4u8).prop_map(|n| name(&format!("n{n}")));
    let who = || (0..24u32).prop_map(owner);
    let place = move || (id(), file_name());
    let xattr = || prop_oneof![Just(b"user.a".to_vec()), Just(b"security.capability".to_vec())];
    let value = || proptest::collection::vec(any::<u8>(), 0..4);
    let xattr_mode = prop_oneof![Just(XattrMode::Set), Just(XattrMode::Create), Just(XattrMode::Replace)];
    let node = prop_oneof![Just(NodeKind::Fifo), Just(NodeKind::Socket)];
    let rename_mode = prop_oneof![Just(RenameMode::Replace), Just(RenameMode::NoReplace), Just(RenameMode::Exchange)];
    let option_u32 = || proptest::option::of(0..8u32);
    let time = || {
        proptest::option::of((any::<i64>(), 0..1_000_000_000u32))
            .prop_map(|t| t.map(|(seconds, nanos)| FileTime { seconds, nanos }))
    };
    prop_oneof![
        3 => (place(), new(), who()).prop_map(|((parent, name), id, owner)| Op::Create { parent, name, id, owner }),
        3 => (place(), new(), who()).prop_map(|((parent, name), id, owner)| Op::Mkdir { parent, name, id, owner }),
        1 => (place(), new(), who(), 0..3u8).prop_map(|((parent, name), id, owner, t)| Op::Symlink {
            parent, name, id, owner, target: format!("to{t}").into_bytes()
        }),
        1 => (place(), new(), who(), node)
            .prop_map(|((parent, name), id, owner, kind)| Op::Mknod { parent, name, id, owner, kind }),
        2 => (place(), new()).prop_map(|((parent, name), id)| Op::Link { id, parent, name }),
        1 => (place(), new()).prop_map(|((parent, name), id)| Op::Unlink { parent, name, id }),
        1 => (place(), new()).prop_map(|((parent, name), id)| Op::Rmdir { parent, name, id }),
        2 => (place(), new(), place(), proptest::option::of(new()), rename_mode).prop_map(
            |((parent, name), id, (new_parent, new_name), over, mode)| Op::Rename {
                parent, name, id, new_parent, new_name, over, mode
            }
        ),
        2 => (id(), option_u32(), option_u32(), option_u32(), proptest::option::of(0..100_000u64), time(), time())
            .prop_map(|(id, mode, uid, gid, size, atime, mtime)| Op::SetAttr {
                id, attrs: Attrs { mode, uid, gid, size, atime, mtime }
            }),
        1 => (id(), xattr(), value(), xattr_mode)
            .prop_map(|(id, name, value, mode)| Op::SetXattr { id, name, value, mode }),
        1 => (id(), xattr()).prop_map(|(id, name)| Op::RemoveXattr { id, name }),
    ]
}

/// Sets the ids that an operation names to those that its names belong to, as the holder does.
fn resolved(tree: &Tree, op: Op) -> Op {
    match op {
        Op::Unlink { parent, name, id } => Op::Unlink { id: tree.lookup(parent, &name).unwrap_or(id), parent, name },
        Op::Rmdir { parent, name, id } => Op::Rmdir { id: tree.lookup(parent, &name).unwrap_or(id), parent, name },
        Op::Rename { parent, name, id, new_parent, new_name, mode, .. } => Op::Rename {
            id: tree.lookup(parent, &name).unwrap_or(id),
            over: tree.lookup(new_parent, &new_name),
            parent,
            name,
            new_parent,
            new_name,
            mode,
        },
        other => other,
    }
}

fn grown(mut tree: Tree, ops: Vec<Op>) -> Tree {
    for op in ops {
        let op = resolved(&tree, op);
        let before = tree.clone();
        if tree.apply(&op).is_err() {
            assert_eq!(tree, before, "what is refused changes nothing: {op:?}");
        }
    }
    tree
}

fn ops(most: usize) -> impl Strategy<Value = Vec<Op>> {
    proptest::collection::vec(any_op(), 0..most)
}

fn carried_out(plan: &Plan, target: &Tree) -> Tree {
    let mut tree = target.clone();
    for op in &plan.ops {
        assert_eq!(tree.apply(op), Ok(()), "{op:?}");
    }
    tree
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_plan_makes_any_target_the_holder(common in ops(60), holder in ops(60), target in ops(60)) {
        let common = grown(Tree::new(owner(1)), common);
        let (holder, target) = (grown(common.clone(), holder), grown(common, target));
        let made = plan(&holder, &target);
        prop_assert_eq!(&carried_out(&made, &target), &holder);
        prop_assert!(plan(&holder, &holder).ops.is_empty());
        // Data that both had in a file of the same length is the only data that is not suspect here.
        for (id, wanted) in holder.entries().iter().filter(|(_, e)| e.size > 0) {
            let kept = target.get(*id).filter(|e| e.kind == Kind::File).map_or(0, |e| e.size);
            let suspect = made.suspects.get(id).copied().unwrap_or(u64::MAX);
            prop_assert!(kept == wanted.size || suspect <= kept.min(wanted.size));
        }
    }

    #[test]
    fn a_plan_cut_anywhere_is_finished_by_the_next(common in ops(40), holder in ops(40), target in ops(40), cut: usize) {
        let common = grown(Tree::new(owner(1)), common);
        let (holder, mut target) = (grown(common.clone(), holder), grown(common, target));
        let made = plan(&holder, &target);
        for op in made.ops.iter().take(cut % (made.ops.len() + 1)) {
            prop_assert_eq!(target.apply(op), Ok(()));
        }
        prop_assert_eq!(&carried_out(&plan(&holder, &target), &target), &holder);
    }

    #[test]
    fn a_tree_stays_a_tree_and_travels(all in ops(80)) {
        let tree = grown(Tree::new(owner(1)), all);
        prop_assert_eq!(Tree::from_entries(tree.entries().clone()), Ok(tree.clone()));
        let mut reader = TreeReader::default();
        let mut found = None;
        for piece in tree.pieces() {
            prop_assert!(found.is_none());
            found = reader.add(&piece).unwrap();
        }
        prop_assert_eq!(found, Some(tree));
    }

    #[test]
    fn an_operation_reads_back_as_it_was_written(op in any_op()) {
        let mut bytes = Vec::new();
        op.encode(&mut Writer::new(&mut bytes));
        let mut reader = Reader::new(&bytes);
        prop_assert_eq!(Op::decode(&mut reader).unwrap(), op);
        prop_assert!(reader.end().is_ok());
    }

    #[test]
    fn mutated_bytes_never_panic(op in any_op(), all in ops(20), at: usize, with: u8, cut: usize) {
        let mut bytes = Vec::new();
        op.encode(&mut Writer::new(&mut bytes));
        let at_op = at % bytes.len();
        bytes[at_op] = with;
        let _ = Op::decode(&mut Reader::new(&bytes[..cut % (bytes.len() + 1)]));
        let mut piece = grown(Tree::new(owner(1)), all).pieces().remove(0);
        let at_piece = at % piece.len();
        piece[at_piece] = with;
        let _ = TreeReader::default().add(&piece);
        let _ = TreeReader::default().add(&piece[..cut % (piece.len() + 1)]);
    }

    #[test]
    fn hostile_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
        let _ = Op::decode(&mut Reader::new(&bytes));
        let _ = TreeReader::default().add(&bytes);
    }
}

#[test]
fn two_files_that_changed_places_are_put_right_through_a_hidden_name() {
    let (a, b) = (FileId(2), FileId(3));
    let mut target = Tree::new(owner(0));
    target.apply(&Op::Create { parent: FileId::ROOT, name: name("a"), id: a, owner: owner(0) }).unwrap();
    target.apply(&Op::Create { parent: FileId::ROOT, name: name("b"), id: b, owner: owner(0) }).unwrap();
    let mut holder = target.clone();
    let swap = Op::Rename {
        parent: FileId::ROOT,
        name: name("a"),
        id: a,
        new_parent: FileId::ROOT,
        new_name: name("b"),
        over: Some(b),
        mode: RenameMode::Exchange,
    };
    holder.apply(&swap).unwrap();
    let made = plan(&holder, &target);
    assert_eq!(carried_out(&made, &target), holder);
    assert!(made.ops.iter().all(|op| matches!(op, Op::Rename { .. })), "files keep their ids: {made:?}");
    assert!(made.suspects.is_empty());
}

#[test]
fn a_directory_that_swapped_places_with_its_child_is_put_right() {
    let (a, b) = (FileId(2), FileId(3));
    let dir = |parent, n, id| Op::Mkdir { parent, name: name(n), id, owner: owner(0) };
    let mut holder = Tree::new(owner(0));
    holder.apply(&dir(FileId::ROOT, "a", a)).unwrap();
    holder.apply(&dir(a, "b", b)).unwrap();
    let mut target = Tree::new(owner(0));
    target.apply(&dir(FileId::ROOT, "b", b)).unwrap();
    target.apply(&dir(b, "a", a)).unwrap();
    assert_eq!(carried_out(&plan(&holder, &target), &target), holder);
}

#[test]
fn the_targets_own_file_of_the_same_name_goes_and_the_holders_is_made() {
    let make = |id, size| {
        let mut tree = Tree::new(owner(0));
        tree.apply(&Op::Create { parent: FileId::ROOT, name: name("disk"), id, owner: owner(0) }).unwrap();
        tree.set_size(id, size);
        tree
    };
    let (holder, target) = (make(FileId(2), 5), make(FileId(7), 5));
    let made = plan(&holder, &target);
    assert!(made.ops.iter().any(|op| op.unlinks() == Some(FileId(7))));
    assert!(made.ops.iter().any(|op| matches!(op, Op::Create { id: FileId(2), .. })));
    assert_eq!(made.suspects, BTreeMap::from([(FileId(2), 0)]));
}

#[test]
fn capabilities_that_a_change_of_owner_clears_are_set_again() {
    let id = FileId(2);
    let mut target = Tree::new(owner(0));
    target.apply(&Op::Create { parent: FileId::ROOT, name: name("x"), id, owner: owner(0) }).unwrap();
    let capability = b"security.capability".to_vec();
    let set = Op::SetXattr { id, name: capability.clone(), value: vec![1], mode: XattrMode::Set };
    target.apply(&set).unwrap();
    let mut holder = target.clone();
    holder.apply(&Op::SetAttr { id, attrs: Attrs { uid: Some(64), ..Attrs::default() } }).unwrap();
    let made = plan(&holder, &target);
    assert!(matches!(&made.ops[0], Op::SetAttr { attrs: Attrs { uid: Some(64), mode: Some(_), .. }, .. }));
    assert_eq!(made.ops[1], set);
}

#[test]
fn a_listing_of_many_files_travels_in_several_pieces_and_out_of_order_is_refused() {
    let mut tree = Tree::new(owner(0));
    for n in 0..20_000 {
        let name = name(&format!("{n:0>100}"));
        tree.apply(&Op::Create { parent: FileId::ROOT, name, id: FileId(n + 2), owner: owner(0) }).unwrap();
    }
    let pieces = tree.pieces();
    assert!(pieces.len() > 1 && pieces.iter().all(|p| p.len() <= crate::limits::PAYLOAD_BYTES_MAX));
    let mut reader = TreeReader::default();
    let read: Vec<_> = pieces.iter().map(|p| reader.add(p).unwrap()).collect();
    assert!(read.last().unwrap().as_ref() == Some(&tree));
    assert!(TreeReader::default().add(&pieces[1]).is_err());
}

#[test]
fn attributes_of_a_host_do_not_travel() {
    for (name, shared) in
        [("user.x", true), ("security.capability", true), ("security.selinux", false), ("trusted.vmtwin.id", false)]
    {
        assert_eq!(xattr_is_shared(name.as_bytes()), shared);
        let mut bytes = Vec::new();
        Op::RemoveXattr { id: FileId(2), name: name.into() }.encode(&mut Writer::new(&mut bytes));
        assert_eq!(Op::decode(&mut Reader::new(&bytes)).is_ok(), shared);
    }
}

#[test]
fn names_that_lead_elsewhere_are_refused() {
    for bad in ["", ".", "..", "a/b", "a\0b"] {
        assert!(FileName::new(bad).is_err(), "{bad:?}");
    }
    assert_eq!(FileName::new("x".repeat(256)), Err(Errno::ENAMETOOLONG));
    assert!(FileName::new("x".repeat(255)).is_ok() && FileName::new("...").is_ok());
}
