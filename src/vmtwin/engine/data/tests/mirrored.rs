//! Two nodes: what is acknowledged is on both, in whatever way one of them is lost.
use super::harness::*;
use crate::engine::messages::{Change, FromData, PeerSocket, ToData, Word};
use std::fs::{self, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{FileExt, PermissionsExt, symlink};
use std::time::Duration;
use vmtwin_core::ids::{RecordId, Sequence, SessionId};
use vmtwin_core::replica::effect::VerifyEnd;
use vmtwin_core::resync::verify::{Different, Verdict};
use vmtwin_core::wire::frame::{Header, Kind};

/// A holder with files, and a node that was resynced from nothing and joined.
fn pair(clear: bool) -> Pair {
    let (mut a, mut b) = (Node::protected("a"), Node::new("b"));
    a.start();
    b.start();
    let record = first_record(a.me);
    a.hold(&record);
    fs::write(a.path("old"), vec![5; 300_000]).unwrap();
    fs::write(a.path("young"), b"written while alone").unwrap();
    b.order(ToData::Record(record.clone()));
    let mut pair = Pair { holder: a, other: b, record, clear, changes: Vec::new(), linked: true };
    pair.in_sync();
    pair
}

fn assert_equal(pair: &Pair) {
    assert_eq!(picture(&pair.holder.backing()), picture(&pair.other.backing()));
}

/// Stamped writes on several threads, some overlapping, with flushes.
fn load(directory: std::path::PathBuf, seed: u64) {
    let writers: Vec<_> = (0..4_u64)
        .map(|thread| {
            let path = directory.join(format!("disk{}", thread % 2));
            std::thread::spawn(move || {
                let file = OpenOptions::new().write(true).create(true).truncate(false).open(path).unwrap();
                let mut state = seed * 4 + thread + 1;
                for round in 0..150 {
                    state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                    let (at, length) = ((state >> 33) % (4 << 20), (state >> 20) % 40_000 + 1);
                    file.write_all_at(&vec![(state >> 40) as u8; length as usize], at).unwrap();
                    if round % 40 == 0 {
                        file.sync_data().unwrap();
                    }
                }
            })
        })
        .collect();
    writers.into_iter().for_each(|writer| writer.join().unwrap());
}

#[test]
fn an_empty_node_is_resynced_joins_and_has_every_change_then() {
    for clear in [false, true] {
        let mut pair = pair(clear);
        assert_equal(&pair);
        let at = pair.holder.directory();
        pair.during("the changes", move || {
            load(at.clone(), 1);
            fs::create_dir(at.join("sub")).unwrap();
            fs::write(at.join("sub/x"), b"1").unwrap();
            fs::set_permissions(at.join("sub/x"), fs::Permissions::from_mode(0o600)).unwrap();
            fs::rename(at.join("sub/x"), at.join("sub/y")).unwrap();
            fs::hard_link(at.join("sub/y"), at.join("z")).unwrap();
            symlink("z", at.join("l")).unwrap();
            fs::remove_file(at.join("old")).unwrap();
            let young = OpenOptions::new().write(true).open(at.join("young")).unwrap();
            young.set_len(5).unwrap();
            fs::remove_file(at.join("young")).unwrap();
            young.write_all_at(b"nobody else needs this", 3).unwrap();
            drop(young);
            let disk = OpenOptions::new().write(true).open(at.join("disk0")).unwrap();
            let punch = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
            rustix::fs::fallocate(&disk, punch, 8192, 65536).unwrap();
            rustix::fs::fallocate(&disk, rustix::fs::FallocateFlags::ZERO_RANGE, 1 << 20, 12345).unwrap();
            disk.sync_all().unwrap();
        });
        pair.in_sync();
        assert_equal(&pair);
        // It can be read on the other node, and not changed there.
        assert_eq!(fs::read(pair.other.path("z")).unwrap(), b"1");
        assert!(OpenOptions::new().write(true).open(pair.other.path("z")).is_err());
        pair.holder.stop();
        pair.other.stop();
        assert_eq!(picture(&pair.holder.directory()), picture(&pair.other.directory()));
    }
}

#[test]
fn a_link_that_breaks_under_load_loses_nothing() {
    let mut pair = pair(false);
    let at = pair.holder.directory();
    let writers = std::thread::spawn(move || (2..6).for_each(|seed| load(at.clone(), seed)));
    for round in 0..6 {
        // Another link takes its place, in the middle of whatever was going on.
        for _ in 0..30 {
            std::thread::sleep(Duration::from_millis(2));
            pair.turn();
        }
        pair.clear = round % 2 == 0;
        pair.link();
    }
    pair.until("the load", |_| writers.is_finished());
    writers.join().unwrap();
    pair.in_sync();
    assert_equal(&pair);
}

#[test]
fn a_node_that_was_away_catches_up_while_the_guest_writes_on() {
    let mut pair = pair(false);
    let at = pair.holder.directory();
    pair.during("a load on both", move || load(at, 3));
    pair.linked = false;
    pair.other.stop();
    let at = pair.holder.directory();
    pair.during("changes alone", move || {
        fs::write(at.join("while-away"), vec![9; 100_000]).unwrap();
        load(at.clone(), 4);
        fs::rename(at.join("disk1"), at.join("renamed")).unwrap();
        fs::remove_file(at.join("old")).unwrap();
    });
    assert_eq!(pair.changes.last(), Some(&Change::DropPeer));
    pair.other.start();
    pair.other.order(ToData::Record(pair.record.clone()));
    pair.linked = true;
    let at = pair.holder.directory();
    let writers = std::thread::spawn(move || load(at, 5));
    pair.in_sync();
    pair.until("the load", |_| writers.is_finished());
    writers.join().unwrap();
    pair.in_sync();
    assert_equal(&pair);
    pair.holder.stop();
    pair.other.stop();
}

#[test]
fn the_peer_of_a_holder_that_died_has_everything_and_serves() {
    let mut pair = pair(false);
    let at = pair.holder.directory();
    pair.during("a load on both", move || load(at, 6));
    pair.in_sync();
    let disk = fs::read(pair.holder.path("disk0")).unwrap();
    let Pair { holder: mut a, other: mut b, record, .. } = pair;
    a.crash();
    b.order(ToData::Drain(3));
    b.wait("drained", |news| (*news == FromData::Drained(3)).then_some(()));
    let taken = record.next(RecordId(77), b.me, vec![b.me]);
    b.hold(&taken);
    assert_eq!(fs::read(b.path("disk0")).unwrap(), disk);
    fs::write(b.path("new-reign"), b"1").unwrap();
    load(b.directory(), 7);
    // The old holder comes back, after its host went down, and is made equal.
    a.boot = 2;
    assert!(a.start().broken);
    a.order(ToData::Record(taken.clone()));
    let mut pair = Pair { holder: b, other: a, record: taken, clear: true, changes: Vec::new(), linked: true };
    pair.in_sync();
    assert_equal(&pair);
    pair.holder.stop();
    pair.other.stop();
}

#[test]
fn a_hand_over_with_nothing_in_flight_keeps_both() {
    let mut pair = pair(false);
    // Where the link was lost in between, only the holder has flushed: once more then.
    for token in 9.. {
        pair.holder.order(ToData::Quiesce(token));
        let mut both = None;
        pair.until("quiet", |pair| {
            let quiet = |news: &FromData| matches!(news, FromData::Quiesced { token: t, .. } if *t == token);
            both = pair.holder.said.iter().find(|news| quiet(news)).cloned();
            both.is_some()
        });
        if both == Some(FromData::Quiesced { token, both: true }) {
            break;
        }
        pair.holder.order(ToData::Unquiesce);
        pair.in_sync();
    }
    let Pair { holder: mut a, other: b, record, .. } = pair;
    a.order(ToData::Drain(10));
    a.wait("drained", |news| (*news == FromData::Drained(10)).then_some(()));
    let swapped = record.next(RecordId(78), b.me, vec![a.me, b.me]);
    b.lease_for(Duration::from_secs(3600));
    let mut pair =
        Pair { holder: b, other: a, record: swapped.clone(), clear: true, changes: Vec::new(), linked: true };
    pair.set(swapped, true);
    let path = pair.holder.path("x");
    pair.during("the new holder serves", move || eventually("it serves", || fs::write(&path, b"after").is_ok()));
    pair.in_sync();
    assert_equal(&pair);
}

#[test]
fn a_word_for_the_other_control_plane_arrives() {
    let mut pair = pair(true);
    pair.until("the word", |pair| {
        pair.holder.order(ToData::Tell(Word::Stop)); // a lost one is lost
        pair.other.said.contains(&FromData::Told(Word::Stop))
    });
}

#[test]
fn a_damaged_byte_on_the_wire_is_never_applied() {
    // In the clear nothing but the frame's own checksum stands between the wire and the disk.
    let mut pair = pair(true);
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    let peer = pair.holder.name.clone();
    pair.other.order(ToData::Link(PeerSocket { socket: theirs.into(), peer, dialed: false, tls: None }));
    let header = Header::new(Kind::Write, SessionId(1), Sequence(1)).seal(b"payload");
    (&ours).write_all(&header.encode()).unwrap();
    (&ours).write_all(b"pAyload").unwrap();
    let why = pair.other.wait("refusal", |news| match news {
        FromData::PeerDown(why) if why.contains("refused") => Some(why.clone()),
        _ => None,
    });
    assert!(why.contains("hecksum"), "{why}");
}

/// A verification that comes to its end, however often a link is lost meanwhile.
fn verify(pair: &mut Pair, repair: bool) -> Verdict {
    loop {
        pair.in_sync();
        let before = pair.holder.said.len();
        pair.holder.order(ToData::Verify { rate: 1 << 40, repair });
        let mut end = None;
        pair.until("the verification", |pair| {
            end = pair.holder.said[before..].iter().find_map(|news| match news {
                FromData::Verified(end) => Some(Some(end.clone())),
                FromData::VerifyRefused(_) => Some(None),
                _ => None,
            });
            end.is_some()
        });
        if let Some(Some(VerifyEnd::Done { verdict, .. })) = end {
            return verdict;
        }
    }
}

#[test]
fn a_verification_beside_a_load_raises_no_false_alarm_and_finds_and_repairs_a_flipped_bit() {
    let mut pair = pair(false);
    let at = pair.holder.directory();
    let writers = std::thread::spawn(move || (20..23).for_each(|seed| load(at.clone(), seed)));
    while !writers.is_finished() {
        let verdict = verify(&mut pair, false);
        assert!(verdict.is_equal(), "a false alarm: {verdict:?}");
    }
    writers.join().unwrap();
    let flip = |node: &Node| {
        let file = OpenOptions::new().read(true).write(true).open(node.backing().join("old")).unwrap();
        let mut byte = [0];
        file.read_exact_at(&mut byte, 200_000).unwrap();
        file.write_all_at(&[byte[0] ^ 4], 200_000).unwrap();
    };
    flip(&pair.other);
    let mut drops = 0;
    for repair in [false, true] {
        drops = pair.changes.iter().filter(|change| **change == Change::DropPeer).count();
        let verdict = verify(&mut pair, repair);
        let [one] = &verdict.differences[..] else { panic!("{verdict:?}") };
        assert_eq!((&one.name[..], &one.what), ("old", &Different::Content(196_608..262_144)));
    }
    pair.until("the drop", |pair| pair.changes.iter().filter(|change| **change == Change::DropPeer).count() > drops);
    assert!(verify(&mut pair, false).is_equal(), "it was repaired");
    assert_equal(&pair);
    pair.holder.stop();
    pair.other.stop();
}
