//! A life of random operations through the data thread's mount is the same as on a plain directory, and on the peer's copy.
use super::harness::*;
use super::lives::{Side, live, seeds, tree};
use crate::engine::messages::{Change, FromData, ToData};
use std::collections::BTreeMap;
use std::path::Path;
use vmtwin_core::ids::RecordId;
use vmtwin_core::record::Record;

fn compare(node: &Node, model: &Path) {
    let mut trees = [node.directory(), model.to_owned()].map(|root| {
        let mut found = BTreeMap::new();
        tree(&root, Path::new(""), &mut found);
        found
    });
    for tree in &mut trees {
        tree.retain(|name, _| !name.starts_with(".vmtwin-local"));
    }
    let names = trees.each_ref().map(|t| t.keys().cloned().collect::<Vec<_>>());
    assert_eq!(names[0], names[1]);
    for ((name, ours), model) in trees[0].iter().zip(trees[1].values()) {
        assert_eq!(ours.0, model.0, "{name:?}");
        assert!(ours.1 == model.1, "the content of {name:?} differs");
    }
}

#[test]
fn a_random_life_on_a_holder_alone_is_that_of_a_plain_directory() {
    for seed in seeds(&[21, 22]) {
        let model = tempfile::tempdir().unwrap();
        let mut node = Node::protected("a");
        node.start();
        let record = first_record(node.me);
        node.hold(&record);
        live(seed, 800, Side::new(&node.directory(), seed % 2 == 0), Side::new(model.path(), false));
        compare(&node, model.path());
        node.stop();
        compare(&node, model.path());
    }
}

/// The register of a pair: lets every change happen, and links both again when the link is gone.
fn govern(a: &mut Node, b: &mut Node, record: &mut Record, joined: &mut bool) {
    while let Some(news) = a.news() {
        match news {
            FromData::Propose(change) => {
                *joined = matches!(change, Change::JoinPeer(_));
                let in_sync = if *joined { vec![a.me, b.me] } else { vec![a.me] };
                *record = record.next(RecordId(record.id.0 + 1), a.me, in_sync);
                a.order(ToData::Proposed(change, record.id));
                a.order(ToData::Record(record.clone()));
                if !*joined {
                    b.order(ToData::Record(record.clone()));
                }
            }
            FromData::PeerDown(_) => link(a, b, false),
            FromData::Failed(why) => panic!("{why}"),
            _ => {}
        }
    }
    while let Some(news) = b.news() {
        if let FromData::Failed(why) = news {
            panic!("{why}");
        }
    }
}

#[test]
fn a_random_life_on_a_holder_is_on_its_peer_too_from_the_first_resync_on() {
    for seed in seeds(&[31, 32]) {
        let model = tempfile::tempdir().unwrap();
        let (mut a, mut b) = (Node::protected("a"), Node::new("b"));
        a.start();
        b.start();
        let mut record = first_record(a.me);
        a.hold(&record);
        live(seed, 300, Side::new(&a.directory(), seed % 2 == 0), Side::new(model.path(), false));
        b.order(ToData::Record(record.clone()));
        link(&a, &b, true);
        let (sides, mut joined) = ((a.directory(), model.path().to_owned()), false);
        // Resync, join and, now and then, a lost link, all while the life goes on.
        let life = std::thread::spawn(move || {
            live(seed + 1000, 2500, Side::new(&sides.0, seed % 2 == 1), Side::new(&sides.1, false));
        });
        let mut round = 0u64;
        eventually("the life ends", || {
            govern(&mut a, &mut b, &mut record, &mut joined);
            round += 1;
            if joined && round.is_multiple_of(300) {
                link(&a, &b, true);
            }
            life.is_finished()
        });
        life.join().unwrap();
        std::fs::write(model.path().join("last"), b"mirrored").unwrap();
        // Until one write was answered while both were in sync: the peer may be dropped and joined at any time.
        let mut mirrored = false;
        while !mirrored {
            eventually("both are in sync", || {
                govern(&mut a, &mut b, &mut record, &mut joined);
                joined
            });
            let path = a.path("last");
            let write = std::thread::spawn(move || std::fs::write(path, b"mirrored"));
            eventually("the write is answered", || {
                govern(&mut a, &mut b, &mut record, &mut joined);
                write.is_finished()
            });
            write.join().unwrap().unwrap();
            mirrored = joined;
        }
        compare(&a, model.path());
        a.stop();
        b.stop();
        compare(&a, model.path());
        compare(&b, model.path());
    }
}
