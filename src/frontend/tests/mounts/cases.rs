//! What a virtual machine's directory goes through, case by case, and the life of a mount.
use crate::harness::{LIMIT, Random, unserved, until, world};
use crate::server::{Config, Server};
use rustix::fs::{CWD, FallocateFlags, FileType, Mode, OFlags, SeekFrom};
use rustix::io::Errno;
use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, symlink};
use std::path::Path;
use std::process::{Command, Stdio};
use std::rc::Rc;
use std::sync::Barrier;
use std::sync::atomic::Ordering;
use vmtwin_frontend::fuse::{self, Life, UnmountError};
use vmtwin_ring::{Descriptor, Pool, Ring};

const MIB: usize = 1 << 20;

fn open_direct(path: &Path) -> File {
    let flags = (OFlags::DIRECT).bits() as i32;
    OpenOptions::new().read(true).write(true).create(true).truncate(false).custom_flags(flags).open(path).unwrap()
}

fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut random = Random(seed);
    let mut bytes: Vec<u8> = (0..len.div_ceil(8)).flat_map(|_| random.next().to_ne_bytes()).collect();
    bytes.truncate(len);
    bytes
}

#[test]
fn writes_larger_than_one_request_arrive_whole_at_any_offset() {
    let Some(world) = world(Config::default()) else { return };
    let file = open_direct(&world.at.join("disk"));
    for (seed, offset) in [(1, 0), (2, 512), (3, 4095), (4, 3 * MIB as u64 + 1)] {
        let bytes = pattern(seed, 5 * MIB + 777);
        file.write_all_at(&bytes, offset).unwrap();
        let mut back = vec![0; bytes.len()];
        file.read_exact_at(&mut back, offset).unwrap();
        assert!(back == bytes, "offset {offset}");
        let below = File::open(world.back.join("disk")).unwrap();
        below.read_exact_at(&mut back, offset).unwrap();
        assert!(back == bytes, "offset {offset}, below the mount");
    }
    let mut more = [0; 100];
    let end = file.metadata().unwrap().len();
    assert_eq!(file.read_at(&mut more, end - 40).unwrap(), 40, "a read ends at the file's end");
    assert_eq!(file.read_at(&mut more, end).unwrap(), 0);
}

#[test]
fn parallel_writes_to_one_file_are_in_hand_together_and_may_end_in_any_order() {
    const DEPTH: usize = 12;
    let Some(world) = world(Config::default()) else { return };
    let file = open_direct(&world.at.join("disk"));
    file.set_len(64 * MIB as u64).unwrap();
    let control = &world.server().control;
    let depth = if world.server().kernel.parallel_direct_writes() { DEPTH } else { 1 };
    for round in 0..8u64 {
        control.held_max.store(0, Ordering::SeqCst);
        control.hold.store(depth, Ordering::SeqCst);
        let start = Barrier::new(DEPTH);
        std::thread::scope(|scope| {
            for n in 0..DEPTH as u64 {
                let (file, start) = (&file, &start);
                scope.spawn(move || {
                    start.wait();
                    file.write_all_at(&pattern(round * 100 + n, 16_384), n * MIB as u64).unwrap();
                });
            }
        });
        control.hold.store(0, Ordering::SeqCst);
        assert_eq!(control.held_max.load(Ordering::SeqCst), depth);
        for n in 0..DEPTH as u64 {
            let mut bytes = vec![0; 16_384];
            file.read_exact_at(&mut bytes, n * MIB as u64).unwrap();
            assert!(bytes == pattern(round * 100 + n, 16_384), "round {round}, write {n}");
        }
    }
}

#[test]
fn asynchronous_direct_io_reaches_the_server_at_its_full_depth() {
    const DEPTH: usize = 32;
    let Some(world) = world(Config::default()) else { return };
    let file = open_direct(&world.at.join("disk"));
    file.set_len(64 * MIB as u64).unwrap();
    let disk: Descriptor = Rc::new(OwnedFd::from(file));
    let (mut ring, pool) = (Ring::new(64).unwrap(), Pool::new(DEPTH).unwrap());
    let control = &world.server().control;
    for writing in [true, false] {
        control.hold.store(DEPTH, Ordering::SeqCst);
        for n in 0..DEPTH as u64 {
            let mut slot = pool.take().unwrap();
            if writing {
                slot.payload_mut()[..8192].copy_from_slice(&pattern(n, 8192));
                ring.write(&disk, slot, 0..8192, n * 8192, n);
            } else {
                ring.read(&disk, slot, 0..8192, n * 8192, n);
            }
        }
        let mut done = Vec::new();
        while done.len() < DEPTH {
            ring.wait(None, &mut done).unwrap();
        }
        for completion in done {
            assert_eq!(*completion.result.as_ref().unwrap(), 8192);
            assert!(completion.memory.unwrap().bytes()[..8192] == pattern(completion.token, 8192));
        }
    }
    assert_eq!(control.held_max.load(Ordering::SeqCst), DEPTH);
    control.hold.store(0, Ordering::SeqCst);
}

#[test]
fn a_flood_is_taken_in_rounds_and_nothing_of_it_is_left_lying() {
    let Some(world) = world(Config { slots: 256, ..Config::default() }) else { return };
    let file = open_direct(&world.at.join("disk"));
    file.set_len(MIB as u64).unwrap();
    let disk: Descriptor = Rc::new(OwnedFd::from(file));
    let mut ring = Ring::new(256).unwrap();
    let mut done = Vec::new();
    for _ in 0..10 {
        for n in 0..200 {
            ring.read(&disk, vec![1; 4096], 0..4096, n * 4096, n);
        }
        while done.len() < 200 {
            ring.wait(None, &mut done).unwrap();
        }
        assert!(
            done.drain(..).all(|c| matches!(c.result, Ok(4096)) && c.memory.unwrap().bytes().iter().all(|&b| b == 0))
        );
    }
    assert!(world.server().control.round_max.load(Ordering::SeqCst) <= 64);
}

#[test]
fn more_requests_than_slots_wait_and_are_all_served() {
    let Some(world) = world(Config { slots: 4, ..Config::default() }) else { return };
    let file = open_direct(&world.at.join("disk"));
    file.set_len(MIB as u64).unwrap();
    let control = &world.server().control;
    control.hold.store(1000, Ordering::SeqCst);
    std::thread::scope(|scope| {
        for n in 0..16u64 {
            let file = &file;
            scope.spawn(move || file.write_all_at(&pattern(n, 4096), n * 4096).unwrap());
        }
        // Of 16 that come together 4 fill the pool; a kernel that sends one at a time never does.
        let together = world.server().kernel.parallel_direct_writes();
        until("the pool is empty", || !together || control.no_slot.load(Ordering::SeqCst) > 0);
        control.hold.store(0, Ordering::SeqCst);
        world.server().waker.wake();
    });
    for n in 0..16 {
        let mut bytes = [0; 4096];
        file.read_exact_at(&mut bytes, n * 4096).unwrap();
        assert!(bytes[..] == pattern(n, 4096));
    }
}

#[test]
fn holes_are_found_punched_and_filled() {
    let Some(world) = world(Config::default()) else { return };
    let file = File::create_new(world.at.join("sparse")).unwrap();
    file.set_len(4 * MIB as u64).unwrap();
    file.write_all_at(&pattern(1, MIB), MIB as u64).unwrap();
    file.sync_all().unwrap();
    let seek = |to| rustix::fs::seek(&file, to);
    let mib = MIB as u64;
    assert_eq!(seek(SeekFrom::Data(0)), Ok(mib));
    assert_eq!(seek(SeekFrom::Hole(mib)), Ok(2 * mib));
    assert_eq!(seek(SeekFrom::Hole(0)), Ok(0));
    assert_eq!(seek(SeekFrom::Data(2 * mib)), Err(Errno::NXIO));
    let call = |mode, offset, len| rustix::fs::fallocate(&file, mode, offset, len);
    call(FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, mib, mib / 2).unwrap();
    file.sync_all().unwrap();
    assert_eq!(seek(SeekFrom::Data(0)), Ok(mib + mib / 2));
    match call(FallocateFlags::ZERO_RANGE, 5 * mib, mib) {
        Ok(()) => assert_eq!(file.metadata().unwrap().len(), 6 * mib),
        Err(e) => assert_eq!(e, Errno::OPNOTSUPP, "a file system without it says so"),
    }
    call(FallocateFlags::KEEP_SIZE, 8 * mib, mib).unwrap();
    assert!(file.metadata().unwrap().len() < 8 * mib);
    call(FallocateFlags::empty(), 8 * mib, mib).unwrap();
    assert_eq!(file.metadata().unwrap().len(), 9 * mib);
    for moves in [FallocateFlags::COLLAPSE_RANGE, FallocateFlags::INSERT_RANGE] {
        assert_eq!(call(moves, 0, mib), Err(Errno::OPNOTSUPP));
    }
}

#[test]
fn an_unlinked_file_lives_as_long_as_it_is_open() {
    let Some(world) = world(Config::default()) else { return };
    let path = world.at.join("temporary");
    let file = OpenOptions::new().read(true).write(true).create_new(true).open(&path).unwrap();
    file.write_all_at(b"before", 0).unwrap();
    fs::remove_file(&path).unwrap();
    assert!(!path.exists() && !world.back.join("temporary").exists());
    file.write_all_at(b"after", 100).unwrap();
    file.set_len(103).unwrap();
    file.sync_data().unwrap();
    let meta = file.metadata().unwrap();
    assert_eq!((meta.len(), meta.nlink()), (103, 0));
    let mut all = Vec::new();
    (&file).read_to_end(&mut all).unwrap();
    assert_eq!((&all[..6], &all[100..]), (&b"before"[..], &b"aft"[..]));
    File::create_new(&path).expect("the name is free");
}

#[test]
fn names_of_one_file_show_one_inode() {
    let Some(world) = world(Config::default()) else { return };
    let at = |name| world.at.join(name);
    fs::write(at("a"), "x").unwrap();
    fs::create_dir(at("d")).unwrap();
    fs::hard_link(at("a"), at("d/b")).unwrap();
    let (a, b) = (fs::metadata(at("a")).unwrap(), fs::metadata(at("d/b")).unwrap());
    assert_eq!((a.ino(), a.nlink()), (b.ino(), 2));
    fs::write(at("d/b"), "longer").unwrap();
    assert_eq!(fs::read_to_string(at("a")).unwrap(), "longer");
    fs::remove_file(at("a")).unwrap();
    assert_eq!(fs::metadata(at("d/b")).unwrap().nlink(), 1);
    symlink("d/b", at("s")).unwrap();
    assert_eq!(fs::read_to_string(at("s")).unwrap(), "longer");
    let long = "x/".repeat(2000) + "y";
    symlink(&long, at("long")).unwrap();
    assert_eq!(fs::read_link(at("long")).unwrap(), Path::new(&long));
    rustix::fs::mknodat(CWD, at("pipe"), FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
    assert_eq!(fs::metadata(at("pipe")).unwrap().mode(), 0o10_600);
}

#[test]
fn a_directory_of_many_files_is_listed_once_each() {
    for readdirplus in [false, true] {
        let Some(world) = world(Config { readdirplus, ..Config::default() }) else { return };
        let names: BTreeSet<_> = (0..1500).map(|n| format!("file-{n:0>width$}", width = n % 200 + 4)).collect();
        for name in &names {
            File::create_new(world.at.join(name)).unwrap();
        }
        let listed: Vec<_> = fs::read_dir(&world.at).unwrap().map(|e| e.unwrap()).collect();
        assert_eq!(listed.len(), names.len());
        for entry in listed {
            assert!(names.contains(entry.file_name().to_str().unwrap()));
            assert!(entry.file_type().unwrap().is_file() && entry.metadata().unwrap().len() == 0);
        }
        // What the kernel forgets can be let go: else a server grows with each name that it ever showed.
        for name in &names {
            fs::remove_file(world.at.join(name)).unwrap();
        }
        let control = &world.server().control;
        until("all are forgotten", || control.nodes.load(Ordering::SeqCst) == 1);
    }
}

#[test]
fn new_files_belong_to_who_makes_them_and_permissions_hold() {
    let Some(world) = world(Config::default()) else { return };
    let everybody: fs::Permissions = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    for folder in [world.at.parent().unwrap(), &world.at] {
        fs::set_permissions(folder, everybody.clone()).unwrap();
    }
    fs::create_dir(world.at.join("theirs")).unwrap();
    std::os::unix::fs::chown(world.at.join("theirs"), Some(1234), Some(4321)).unwrap();
    fs::write(world.at.join("secret"), "x").unwrap();
    fs::set_permissions(world.at.join("secret"), std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    let script = "umask 027; echo mine > theirs/file && ! cat secret 2>/dev/null && ! touch here 2>/dev/null";
    let mut shell = Command::new("/bin/sh");
    std::os::unix::process::CommandExt::uid(&mut shell, 1234);
    std::os::unix::process::CommandExt::gid(&mut shell, 4321);
    assert!(shell.args(["-c", script]).current_dir(&world.at).status().unwrap().success());
    let meta = fs::metadata(world.at.join("theirs/file")).unwrap();
    assert_eq!((meta.uid(), meta.gid(), meta.mode()), (1234, 4321, 0o100_640));
}

#[test]
fn a_caller_that_is_killed_gets_its_held_request_interrupted() {
    let Some(world) = world(Config::default()) else { return };
    fs::write(world.at.join("disk"), pattern(1, 4096)).unwrap();
    let control = &world.server().control;
    control.hold.store(1000, Ordering::SeqCst);
    let mut reader = Command::new("cat").arg(world.at.join("disk")).stdout(Stdio::null()).spawn().unwrap();
    until("the read is held", || control.held.load(Ordering::SeqCst) == 1);
    reader.kill().unwrap();
    assert!(!reader.wait().unwrap().success());
    assert!(control.interrupts.load(Ordering::SeqCst) > 0);
    control.hold.store(0, Ordering::SeqCst);
    assert_eq!(fs::read(world.at.join("disk")).unwrap(), pattern(1, 4096), "the mount goes on");
}

#[test]
fn over_its_own_directory_the_mount_hides_it_and_an_unmount_bares_it() {
    let Some(mut world) = unserved() else { return };
    fs::write(world.back.join("disk"), "plain").unwrap();
    let at = world.back.clone();
    world.server = Some(Server::start(&world.back, &at, Config::default()));
    assert_eq!(fuse::standing(&at).unwrap(), 1);
    assert_eq!(fuse::life(&at, LIMIT).unwrap(), Life::Serves);
    assert!(matches!(fuse::clear_dead(&at, LIMIT), Err(UnmountError::Served(_))));
    let mut file = OpenOptions::new().append(true).open(at.join("disk")).unwrap();
    file.write_all(b" and mirrored").unwrap();
    assert!(matches!(fuse::unmount(&at), Err(UnmountError::Busy(_))));
    drop(file);
    // The close is told to the server behind the caller's back; until then it is busy.
    let waker = world.server().waker.clone();
    until("unmounted", || fuse::unmount_aside(&at, waker.clone()).recv_timeout(LIMIT).unwrap().is_ok());
    world.server.take().unwrap().join();
    assert_eq!(fuse::standing(&at).unwrap(), 0);
    assert_eq!(fs::read_to_string(at.join("disk")).unwrap(), "plain and mirrored");
}

#[test]
fn a_dead_mount_is_found_cleared_and_mounted_anew() {
    let Some(mut world) = unserved() else { return };
    for _ in 0..2 {
        drop(Server::start(&world.back, &world.at, Config::default()));
    }
    // ECONNABORTED where the kernel was still letting go of the device when we asked.
    let dead = [Errno::NOTCONN, Errno::CONNABORTED].map(|e| Some(e.raw_os_error()));
    assert!(dead.contains(&fs::metadata(&world.at).unwrap_err().raw_os_error()));
    assert_eq!(fuse::life(&world.at, LIMIT).unwrap(), Life::Dead);
    assert_eq!(fuse::clear_dead(&world.at, LIMIT).unwrap(), 2);
    assert_eq!(fuse::standing(&world.at).unwrap(), 0);
    world.server = Some(Server::start(&world.back, &world.at, Config::default()));
    fs::write(world.at.join("disk"), "again").unwrap();
    assert_eq!(fs::read_to_string(world.back.join("disk")).unwrap(), "again");
}

/// Serves in a process of its own, to be killed.
#[test]
#[ignore = "the other half of a_killed_server_leaves_a_mount_that_its_successor_clears"]
fn serve_in_a_process_of_its_own() {
    let [back, at] = ["VMTWIN_SERVE_BACK", "VMTWIN_SERVE_AT"].map(|name| std::env::var_os(name).expect("a folder"));
    Server::start(Path::new(&back), Path::new(&at), Config::default()).join();
}

#[test]
fn a_killed_server_leaves_a_mount_that_its_successor_clears() {
    let Some(mut world) = unserved() else { return };
    let mut other = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "cases::serve_in_a_process_of_its_own", "--ignored"])
        .env("VMTWIN_SERVE_BACK", &world.back)
        .env("VMTWIN_SERVE_AT", &world.at)
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    until("it is mounted", || fuse::standing(&world.at).unwrap() == 1);
    let file = open_direct(&world.at.join("disk"));
    let written = std::thread::scope(|scope| {
        let write = scope.spawn(|| (0..).find(|n| file.write_all_at(&pattern(*n, 4096), n * 4096).is_err()).unwrap());
        until("it writes", || fs::metadata(world.back.join("disk")).unwrap().len() > 100 * 4096);
        other.kill().unwrap();
        write.join().unwrap()
    });
    other.wait().unwrap();
    // Its ring lets go of the device some time after its death.
    until("it is dead", || fuse::life(&world.at, LIMIT).unwrap() == Life::Dead);
    assert_eq!(fuse::clear_dead(&world.at, LIMIT).unwrap(), 1);
    world.server = Some(Server::start(&world.back, &world.at, Config::default()));
    let file = File::open(world.at.join("disk")).unwrap();
    for n in 0..written {
        let mut bytes = [0; 4096];
        file.read_exact_at(&mut bytes, n * 4096).unwrap();
        assert!(bytes[..] == pattern(n, 4096), "write {n} of {written} was answered");
    }
}

#[test]
fn requests_in_hand_fail_when_the_server_ends() {
    let Some(mut world) = world(Config::default()) else { return };
    let file = open_direct(&world.at.join("disk"));
    file.set_len(MIB as u64).unwrap();
    world.server().control.hold.store(1000, Ordering::SeqCst);
    std::thread::scope(|scope| {
        let write = scope.spawn(|| file.write_all_at(&pattern(1, 4096), 0));
        until("the write is held", || world.server.as_ref().unwrap().control.held.load(Ordering::SeqCst) == 1);
        drop(world.server.take());
        assert!(write.join().unwrap().is_err());
    });
}

#[test]
fn an_abort_from_outside_fails_what_is_held_and_ends_the_server() {
    let Some(mut world) = world(Config::default()) else { return };
    let file = open_direct(&world.at.join("disk"));
    file.set_len(MIB as u64).unwrap();
    let list = world.model.join("connections");
    assert!(!fuse::abort(&world.back, &list).unwrap(), "nothing is mounted there");
    world.server().control.hold.store(1000, Ordering::SeqCst);
    std::thread::scope(|scope| {
        let write = scope.spawn(|| file.write_all_at(&pattern(1, 4096), 0));
        until("the write is held", || world.server().control.held.load(Ordering::SeqCst) == 1);
        assert!(fuse::abort(&world.at, &list).unwrap());
        assert!(write.join().unwrap().is_err());
    });
    world.server.take().unwrap().join();
    assert_eq!(fuse::life(&world.at, LIMIT).unwrap(), Life::Dead);
    assert!(!list.exists());
}

#[test]
fn a_ring_that_is_dropped_leaks_what_the_kernel_still_owns() {
    let Some(world) = world(Config::default()) else { return };
    let file = open_direct(&world.at.join("disk"));
    file.write_all_at(&pattern(1, 4096), 0).unwrap();
    let (mut ring, pool) = (Ring::new(8).unwrap(), Pool::new(3).unwrap());
    let control = &world.server().control;
    control.hold.store(1000, Ordering::SeqCst);
    ring.read(&Rc::new(OwnedFd::from(file)), pool.take().unwrap(), 0..4096, 0, 1);
    ring.wait(Some(1), &mut Vec::new()).unwrap();
    until("the read is held", || control.held.load(Ordering::SeqCst) == 1);
    drop(ring); // a file's read is not cancelled: it gives up waiting
    assert_eq!(pool.free(), 2, "the slot must not be used again");
    let others = [pool.take().unwrap(), pool.take().unwrap()];
    assert!(pool.take().is_none());
    drop((others, pool));
    control.hold.store(0, Ordering::SeqCst);
    world.server().waker.wake();
    // The kernel writes into the slot some time from now; nothing else may lie there.
    until("the read has ended", || control.held.load(Ordering::SeqCst) == 0);
    assert!(fs::read(world.at.join("disk")).unwrap() == pattern(1, 4096));
}

#[test]
fn what_the_front_end_does_not_serve_is_refused_or_done_without() {
    let Some(world) = world(Config::default()) else { return };
    let (a, b) = (world.at.join("a"), world.at.join("b"));
    fs::write(&a, pattern(1, 100_000)).unwrap();
    let (from, to) = (File::open(&a).unwrap(), File::create_new(&b).unwrap());
    // copy_file_range falls back to reading and writing, or says that it cannot.
    match rustix::fs::copy_file_range(&from, None, &to, None, 100_000) {
        Ok(n) => assert!(fs::read(&b).unwrap() == pattern(1, 100_000)[..n]),
        Err(e) => assert!(matches!(e, Errno::XDEV | Errno::OPNOTSUPP), "{e:?}"),
    }
    assert!(rustix::fs::ioctl_ficlone(&to, &from).is_err());
    // Advisory locks are the kernel's own: libvirt and QEMU take them.
    rustix::fs::flock(&to, rustix::fs::FlockOperation::LockExclusive).unwrap();
    let other = File::open(&b).unwrap();
    assert_eq!(rustix::fs::flock(&other, rustix::fs::FlockOperation::NonBlockingLockShared), Err(Errno::AGAIN));
    let long = "n".repeat(256);
    assert_eq!(File::create(world.at.join(long)).unwrap_err().raw_os_error(), Some(Errno::NAMETOOLONG.raw_os_error()));
    assert!(fs::metadata(world.at.join("n".repeat(255))).unwrap_err().kind() == std::io::ErrorKind::NotFound);
}

#[test]
fn ordinary_tools_find_an_ordinary_file_system() {
    let Some(world) = world(Config::default()) else { return };
    for n in 0..40 {
        let folder = world.model.join(format!("d{}", n % 5));
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join(format!("f{n}")), pattern(n, (n as usize * 7919) % 300_000)).unwrap();
    }
    symlink("d1/f1", world.model.join("link")).unwrap();
    let run = |program: &str, arguments: &[&Path]| {
        let out = Command::new(program).args(arguments).output().unwrap();
        assert!(out.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&out.stderr));
    };
    run("cp", &[Path::new("-a"), &world.model.join("."), &world.at]);
    run("diff", &[Path::new("-r"), &world.model, &world.at]);
    run("tar", &[Path::new("-cf"), &world.model.join("all.tar"), Path::new("-C"), &world.at, Path::new(".")]);
    run("mv", &[&world.at.join("d2"), &world.at.join("d3/moved")]);
    run("rm", &[Path::new("-r"), &world.at.join("d3")]);
    run(
        "dd",
        &[
            Path::new(&format!("if={}", world.at.join("d1/f1").display())),
            Path::new(&format!("of={}", world.at.join("copy").display())),
            Path::new("bs=1000"),
            Path::new("oflag=direct"),
            Path::new("conv=fsync"),
        ],
    );
    assert!(fs::read(world.at.join("copy")).unwrap() == fs::read(world.model.join("d1/f1")).unwrap());
    let figures = rustix::fs::statvfs(&world.at).unwrap();
    assert_eq!(figures.f_blocks, rustix::fs::statvfs(&world.back).unwrap().f_blocks);
}

#[test]
fn nothing_of_a_mount_is_left_when_its_test_panics() {
    let path = std::thread::spawn(|| {
        let world = world(Config::default())?;
        fs::write(world.at.join("x"), "y").unwrap();
        let path = world.at.clone();
        let ended = std::panic::catch_unwind(std::panic::AssertUnwindSafe(move || {
            let _open = File::open(world.at.join("x")).unwrap();
            std::panic::resume_unwind(Box::new("as a failed test does"));
        }));
        assert!(ended.is_err());
        Some((fuse::standing(&path), path))
    });
    let Some((standing, path)) = path.join().unwrap() else { return };
    assert!(standing.is_err() && !path.exists(), "its folder is gone");
}
