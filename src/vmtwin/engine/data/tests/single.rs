//! One node alone: the mount does what a directory does.
use super::harness::*;
use crate::engine::messages::{FromData, ToData};
use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt, symlink};
use std::time::Duration;
use vmtwin_core::ids::RecordId;

const O_DIRECT: i32 = 0o40000;

fn alone() -> (Node, vmtwin_core::record::Record) {
    let mut node = Node::protected("a");
    node.start();
    let record = first_record(node.me);
    node.hold(&record);
    (node, record)
}

#[test]
fn what_is_done_through_the_mount_is_in_the_plain_directory_after_the_end() {
    let (mut node, _) = alone();
    fs::create_dir(node.path("sub")).unwrap();
    let mut file = File::create(node.path("sub/disk.qcow2")).unwrap();
    file.write_all(&[7; 100_000]).unwrap();
    file.write_all_at(b"unaligned", 4093).unwrap();
    file.sync_all().unwrap();
    fs::write(node.path("small"), b"text").unwrap();
    fs::set_permissions(node.path("small"), fs::Permissions::from_mode(0o4751)).unwrap();
    fs::hard_link(node.path("small"), node.path("again")).unwrap();
    symlink("small", node.path("link")).unwrap();
    fs::rename(node.path("sub/disk.qcow2"), node.path("disk.qcow2")).unwrap();
    fs::write(node.path("gone"), b"x").unwrap();
    fs::remove_file(node.path("gone")).unwrap();
    file.set_len(50_000).unwrap();
    assert_eq!(fs::metadata(node.path("again")).unwrap().ino(), fs::metadata(node.path("small")).unwrap().ino());
    assert_eq!(fs::read_dir(node.path("sub")).unwrap().count(), 0);
    let mut at = [0; 9];
    file.read_exact_at(&mut at, 4093).unwrap_err(); // opened for writing only
    File::open(node.path("disk.qcow2")).unwrap().read_exact_at(&mut at, 4093).unwrap();
    assert_eq!(&at, b"unaligned");
    drop(file);
    let seen = picture(&node.directory());
    assert_eq!(seen, picture(&node.backing()));
    node.stop();
    assert_eq!(seen, picture(&node.directory()));
    assert!(!node.backing().exists());
    // And again, clean: nothing is suspect.
    let opened = node.start();
    assert!(!opened.broken && !opened.suspect_all && opened.record.is_some());
    node.stop();
}

#[test]
fn holes_ranges_and_direct_requests_work() {
    let (mut node, _) = alone();
    let file = OpenOptions::new().read(true).write(true).create_new(true).open(node.path("disk.raw")).unwrap();
    file.set_len(8 << 20).unwrap();
    file.write_all_at(&[1; 1 << 20], 4 << 20).unwrap();
    let seek = |from| rustix::fs::seek(&file, from);
    assert_eq!(seek(rustix::fs::SeekFrom::Data(0)).unwrap(), 4 << 20);
    assert_eq!(seek(rustix::fs::SeekFrom::Hole(4 << 20)).unwrap(), 5 << 20);
    let punch = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
    rustix::fs::fallocate(&file, punch, 4 << 20, 65536).unwrap();
    rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::ZERO_RANGE, (4 << 20) + 65536, 4096).unwrap();
    rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, 9 << 20).unwrap();
    assert_eq!(file.metadata().unwrap().len(), 9 << 20);
    let mut back = vec![9; 1 << 20];
    file.read_exact_at(&mut back, 4 << 20).unwrap();
    assert!(back[..65536 + 4096].iter().all(|b| *b == 0) && back[65536 + 4096..].iter().all(|b| *b == 1));
    let direct = OpenOptions::new().read(true).write(true).custom_flags(O_DIRECT).open(node.path("disk.raw")).unwrap();
    for size in [512, 4096, 65536] {
        direct.write_all_at(&vec![size as u8; size], 512).unwrap();
    }
    let mut tail = Vec::new();
    let mut direct = direct;
    direct.seek(SeekFrom::Start((9 << 20) - 512)).unwrap();
    direct.read_to_end(&mut tail).unwrap();
    assert_eq!(tail.len(), 512);
    drop((file, direct));
    assert_eq!(picture(&node.directory()), picture(&node.backing()));
    node.stop();
}

#[test]
fn an_unlinked_file_can_be_used_until_it_is_closed() {
    let (mut node, _) = alone();
    let file = OpenOptions::new().read(true).write(true).create_new(true).open(node.path("a")).unwrap();
    file.write_all_at(b"before", 0).unwrap();
    fs::remove_file(node.path("a")).unwrap();
    file.write_all_at(b"after!", 6).unwrap();
    file.sync_all().unwrap();
    file.set_len(11).unwrap();
    let mut text = String::new();
    (&file).read_to_string(&mut text).unwrap();
    assert_eq!((text.as_str(), file.metadata().unwrap().nlink()), ("beforeafter", 0));
    fs::write(node.path("b"), b"new").unwrap();
    let over = File::open(node.path("b")).unwrap();
    fs::write(node.path("c"), b"other").unwrap();
    fs::rename(node.path("c"), node.path("b")).unwrap();
    let mut kept = String::new();
    (&over).read_to_string(&mut kept).unwrap();
    assert_eq!((kept.as_str(), fs::read(node.path("b")).unwrap().as_slice()), ("new", &b"other"[..]));
    drop((file, over));
    let parked = node.backing().join(".vmtwin-local/parked");
    eventually("parked files go with their last handle", || fs::read_dir(&parked).unwrap().count() == 0);
    node.stop();
}

#[test]
fn only_the_holder_under_a_lease_can_change_and_reads_wait_for_the_lease() {
    let (mut node, record) = alone();
    fs::write(node.path("a"), b"1").unwrap();
    // The lease ends: a write waits, and goes through when there is one again.
    node.lease_for(Duration::ZERO);
    node.wait("hold", |news| (*news == FromData::Held(true)).then_some(()));
    let path = node.path("a");
    let writer = std::thread::spawn(move || fs::write(path, b"2"));
    let path = node.path("a");
    let reader = std::thread::spawn(move || fs::read(path));
    std::thread::sleep(Duration::from_millis(200));
    assert!(!writer.is_finished() && !reader.is_finished());
    node.lease_for(Duration::from_secs(3600));
    writer.join().unwrap().unwrap();
    reader.join().unwrap().unwrap();
    // Another node holds: everything can be read, nothing changed.
    let other = record.next(RecordId(2), vmtwin_core::ids::ReplicaId(99), vec![vmtwin_core::ids::ReplicaId(99)]);
    node.order(ToData::Record(other));
    let path = node.path("a");
    eventually("it is no holder any more", || {
        OpenOptions::new().write(true).open(&path).is_err_and(|e| e.kind() == ErrorKind::ReadOnlyFilesystem)
    });
    assert_eq!(fs::read(&path).unwrap(), b"2");
    for refused in [fs::remove_file(&path), fs::create_dir(node.path("d")), symlink("x", node.path("l"))] {
        assert_eq!(refused.unwrap_err().kind(), ErrorKind::ReadOnlyFilesystem);
    }
    node.stop();
}

#[test]
fn held_requests_fail_when_the_vm_is_being_killed() {
    let (mut node, _) = alone();
    let mut file = File::create(node.path("a")).unwrap();
    node.lease_for(Duration::ZERO);
    node.wait("hold", |news| (*news == FromData::Held(true)).then_some(()));
    let writer = std::thread::spawn(move || file.write_all(b"never"));
    std::thread::sleep(Duration::from_millis(100));
    assert!(!writer.is_finished());
    node.order(ToData::FailHeld);
    assert!(writer.join().unwrap().is_err());
    node.order(ToData::Undrain);
    node.stop();
}

#[test]
fn who_writes_to_a_node_that_is_no_holder_any_more_is_answered() {
    let (mut node, record) = alone();
    let file = std::sync::Arc::new(File::create(node.path("a")).unwrap());
    node.lease_for(Duration::ZERO);
    node.wait("hold", |news| (*news == FromData::Held(true)).then_some(()));
    let writers = [0, 1].map(|n| {
        let (file, path) = (file.clone(), node.path(&format!("new{n}")));
        (std::thread::spawn(move || file.write_all_at(b"held", n)), std::thread::spawn(move || fs::create_dir(path)))
    });
    std::thread::sleep(Duration::from_millis(100));
    let other = record.next(RecordId(2), vmtwin_core::ids::ReplicaId(99), vec![vmtwin_core::ids::ReplicaId(99)]);
    node.order(ToData::Record(other));
    node.wait("the record", |news| (*news == FromData::InForce(RecordId(2))).then_some(()));
    eventually("all were answered", || writers.iter().all(|(a, b)| a.is_finished() && b.is_finished()));
    for (write, make) in writers {
        assert!(write.join().unwrap().is_err() && make.join().unwrap().is_err());
    }
    let late = file.write_all_at(b"late", 0).unwrap_err();
    assert_eq!(late.kind(), ErrorKind::ReadOnlyFilesystem);
    drop(file);
    node.stop();
}

#[test]
fn an_order_that_was_given_after_a_record_is_obeyed_after_it() {
    let (mut node, record) = alone();
    let file = File::create(node.path("a")).unwrap();
    let next = record.next(RecordId(2), node.me, vec![node.me]);
    node.order(ToData::Record(next));
    // The VM is being killed, under the new record: that must not end with the record.
    node.order(ToData::FailHeld);
    node.wait("the record", |news| (*news == FromData::InForce(RecordId(2))).then_some(()));
    eventually("what the VM still asks for fails", || file.write_all_at(b"x", 0).is_err());
    assert!(file.write_all_at(b"x", 0).is_err());
    node.order(ToData::Undrain);
    drop(file);
    node.stop();
}

#[test]
fn a_data_thread_whose_mount_was_taken_away_ends() {
    let (mut node, _) = alone();
    vmtwin_frontend::fuse::detach(&node.directory()).unwrap();
    let why = node.wait("failure", |news| match news {
        FromData::Failed(why) => Some(why.clone()),
        _ => None,
    });
    assert!(why.contains("taken away"), "{why}");
}

#[test]
fn a_flush_of_everything_goes_through_a_large_folder() {
    let (mut node, _) = alone();
    for n in 0..150 {
        fs::write(node.path(&format!("file{n}")), [7]).unwrap();
    }
    node.order(ToData::Quiesce(5));
    node.wait("quiesced", |news| matches!(news, FromData::Quiesced { token: 5, .. }).then_some(()));
    node.order(ToData::Unquiesce);
    fs::write(node.path("after"), [7]).unwrap();
    node.stop();
}

/// A small file system; gone with this value.
struct Small(std::path::PathBuf);
impl Small {
    fn mounted_on(path: &std::path::Path) -> Self {
        rustix::mount::mount("none", path, "tmpfs", rustix::mount::MountFlags::empty(), c"size=8m").unwrap();
        Self(path.to_owned())
    }
}
impl Drop for Small {
    fn drop(&mut self) {
        rustix::mount::unmount(&self.0, rustix::mount::UnmountFlags::DETACH).unwrap();
    }
}

#[test]
fn room_that_is_not_there_is_refused_and_no_fault_of_the_disk() {
    let mut node = Node::new("a");
    fs::create_dir(node.directory()).unwrap();
    let _small = Small::mounted_on(&node.directory());
    crate::store::create_replica(&node.directory(), &node.metadata(), vmtwin_core::ids::ModuleId(7)).unwrap();
    node.start();
    let record = first_record(node.me);
    node.hold(&record);
    let file = File::create(node.path("disk")).unwrap();
    file.write_all_at(b"content", 0).unwrap();
    for keep_size in [rustix::fs::FallocateFlags::empty(), rustix::fs::FallocateFlags::KEEP_SIZE] {
        let refused = rustix::fs::fallocate(&file, keep_size, 0, 1 << 30).unwrap_err();
        assert_eq!(refused, rustix::io::Errno::NOSPC);
        assert_eq!(file.metadata().unwrap().len(), 7);
    }
    file.write_all_at(b"it goes on", 0).unwrap();
    drop(file);
    node.stop();
}

#[test]
fn a_replica_whose_log_is_lost_suspects_all() {
    let (mut node, _) = alone();
    node.stop();
    fs::remove_file(node.metadata().join("log")).unwrap();
    let _ = fs::remove_file(node.metadata().join("map"));
    assert!(node.start().suspect_all);
    node.stop();
    assert!(node.start().suspect_all, "until it was made equal");
    node.stop();
}

#[test]
fn a_killed_holder_leaves_a_mount_that_its_successor_takes_away_and_files_that_it_finds() {
    let (mut node, record) = alone();
    let mut file = File::create(node.path("disk")).unwrap();
    file.write_all(&[3; 10_000]).unwrap();
    let kept = file.try_clone().unwrap();
    node.crash();
    assert!(file.write_all(b"x").is_err(), "the mount is dead");
    let opened = node.start();
    assert!(!opened.broken, "the host did not go down");
    assert_eq!(opened.record, Some(record.clone()));
    node.hold(&record);
    assert_eq!(fs::read(node.path("disk")).unwrap(), [3; 10_000]);
    drop((file, kept));
    node.crash();
    node.boot = 2;
    assert!(node.start().broken, "the host went down without a clean stop");
    node.stop();
}

#[test]
fn a_mount_in_use_is_not_torn_away() {
    let (mut node, record) = alone();
    let file = File::create(node.path("a")).unwrap();
    node.order(ToData::End);
    let refused = node.wait("answer", |news| match news {
        FromData::Ended(how) => Some(how.clone()),
        _ => None,
    });
    assert!(refused.unwrap_err().contains("in use"));
    (&file).write_all(b"it still works").unwrap();
    drop((file, record));
    node.stop();
}

#[test]
fn many_threads_on_few_files_leave_what_they_wrote() {
    let (mut node, _) = alone();
    let writers: Vec<_> = (0..8_u8)
        .map(|n| {
            let path = node.path(&format!("disk{}", n % 2));
            std::thread::spawn(move || {
                let file = OpenOptions::new().write(true).create(true).truncate(false).open(path).unwrap();
                for round in 0..100_u64 {
                    let at = (round * 8 + u64::from(n)) * 4096;
                    file.write_all_at(&[n + 1; 4096], at).unwrap();
                    if round % 10 == 0 {
                        file.sync_data().unwrap();
                    }
                }
            })
        })
        .collect();
    writers.into_iter().for_each(|w| w.join().unwrap());
    for disk in 0..2_u8 {
        let bytes = fs::read(node.path(&format!("disk{disk}"))).unwrap();
        for (at, page) in bytes.chunks(4096).enumerate() {
            let n = (at % 8) as u8;
            let wanted = if n % 2 == disk { n + 1 } else { 0 };
            assert!(page.iter().all(|b| *b == wanted), "page {at} of disk {disk}");
        }
    }
    node.stop();
}
