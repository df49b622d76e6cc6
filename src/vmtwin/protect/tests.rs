//! `protect` and `unprotect` in real folders, with a fake hypervisor and images whose headers are text; cut at every step.
use super::*;
use crate::config::{ModuleConfig, Paths};
use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Receiver;
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;
use vmtwin_core::ids::{ModuleId, ModuleName, NodeName};
use vmtwin_hypervisor::domain;
use vmtwin_hypervisor::{Facts, Listed, VmEvent, VmResult, VmState};

#[test]
fn a_vm_as_virt_install_made_it_is_gathered_with_all_its_files() {
    let world = World::new();
    let plan = world.plan().unwrap();
    assert_eq!(plan.copy_bytes, files::allocated(&world.at("boot/vmlinuz")).unwrap(), "only the kernel is copied");
    assert!(plan.notes.iter().any(|note| note.contains("install.iso")), "{:?}", plan.notes);
    world.gather(&plan).unwrap();
    commit(&world.paths, &world.module).unwrap();

    let dir = world.at("images/db");
    let domain = domain::read(&world.host.definition().unwrap()).unwrap();
    let lie = |name: &str| dir.join(name).to_string_lossy().into_owned();
    let found: Vec<_> = domain.disks.iter().map(|d| d.file().unwrap().to_owned()).collect();
    let installer = world.at("iso/install.iso").to_string_lossy().into_owned();
    assert_eq!(found, [lie("db.qcow2"), lie("data.img"), lie("seed.iso"), installer]);
    assert_eq!(domain.disks[0].chain, [domain::Layer { path: lie("data-2.img"), format: "raw".into() }]);
    assert!(domain.disks[0].chain_ends && domain.disks[1].chain_ends);
    assert_eq!(domain.firmware.nvram, Some(lie("db_VARS.fd")));
    assert_eq!(domain.boot_files[0].path, lie("vmlinuz"));
    assert_eq!((domain.module.as_deref(), domain.on_crash.as_deref()), (Some("db"), Some("destroy")));
    assert!(!world.host.facts().unwrap().autostart);
    assert_eq!(fs::read(dir.join("db.qcow2")).unwrap(), b"backing data-2.img raw\n");
    assert_eq!(fs::read_to_string(dir.join(METADATA).join(DOMAIN_XML)).unwrap(), world.host.definition().unwrap());
    assert!(world.at("boot/vmlinuz").exists(), "the host's own kernel stays");
    assert!(!world.at("flat/db.qcow2").exists() && !world.at("nvram/db_VARS.fd").exists());
    assert_eq!(pending(&world.paths, &world.module).unwrap(), None);
}

#[test]
fn a_cut_at_any_step_is_finished_by_the_next_run() {
    let whole = World::new();
    whole.gather(&whole.plan().unwrap()).unwrap();
    let expected = whole.look();
    let cuts = each_cut(
        World::new,
        |world| {
            let _ = world.gather_cut(&world.plan().unwrap());
        },
        |world| {
            // Nothing had begun, or the journal says what.
            let plan = match pending(&world.paths, &world.module).unwrap() {
                Some(pending) => pending.plan,
                None => world.plan().unwrap(),
            };
            world.gather(&plan).unwrap();
            assert_eq!(world.look(), expected);
        },
    );
    assert!(cuts >= 12, "{cuts} places to cut");
}

#[test]
fn a_cut_at_any_step_is_taken_back_as_if_nothing_had_been() {
    let expected = World::new().look();
    let taken_back = |world: &World| {
        world.undo().unwrap();
        assert_eq!(world.look(), expected);
        assert_eq!(pending(&world.paths, &world.module).unwrap(), None);
        assert!(world.host.facts().unwrap().autostart);
    };
    each_cut(
        World::new,
        |world| {
            let _ = world.gather_cut(&world.plan().unwrap());
        },
        taken_back,
    );
    let gathered = || {
        let world = World::new();
        world.gather(&world.plan().unwrap()).unwrap();
        world
    };
    let cuts = each_cut(
        gathered,
        |world| {
            let _ = world.undo_cut();
        },
        taken_back,
    );
    assert!(cuts >= 12, "{cuts} places to cut");
}

#[test]
fn files_of_another_file_system_are_copied_and_no_cut_loses_one() {
    let Some(far) = far_folder() else { return };
    let far = || World::with_disks(far.path());
    let plan = far().plan().unwrap();
    assert!(plan.copy_bytes >= 64 << 10, "{} bytes to copy", plan.copy_bytes);
    let before = far().look();
    let whole = far();
    whole.gather(&whole.plan().unwrap()).unwrap();
    let after = whole.look();
    let holes = fs::metadata(whole.at("images/db/data.img")).unwrap();
    assert!(holes.blocks() * 512 < holes.len() / 2, "holes stay holes");
    drop(whole);
    let mut turn = 0;
    let cuts = each_cut(
        far,
        |world| {
            let _ = world.gather_cut(&world.plan().unwrap());
        },
        |world| {
            turn += 1;
            if turn % 2 == 0 {
                world.undo().unwrap();
                assert_eq!(world.look(), before);
            } else {
                let resumed = pending(&world.paths, &world.module).unwrap();
                let plan = resumed.map_or_else(|| world.plan().unwrap(), |pending| pending.plan);
                world.gather(&plan).unwrap();
                assert_eq!(world.look(), after);
                world.undo().unwrap();
                assert_eq!(world.look(), before);
            }
        },
    );
    assert!(cuts > 30, "{cuts} places to cut");
}

#[test]
fn what_was_written_between_a_cut_and_the_next_run_is_not_lost() {
    let Some(far) = far_folder() else { return };
    for finish in [true, false] {
        let world = World::with_disks(far.path());
        let plan = world.plan().unwrap();
        let disk = plan.files.iter().find(|step| step.from.ends_with("flat/data.img")).unwrap().clone();
        // The copy is whole, the original still there, when the host dies; its VM runs once more, under its old names.
        world.cut_when(|progress| progress.step == "remove" && progress.path.ends_with("flat/data.img"));
        assert!(world.gather_cut(&plan).is_err());
        assert!(Path::new(&disk.from).exists() && Path::new(&disk.to).exists());
        fs::OpenOptions::new().write(true).open(&disk.from).unwrap().write_all_at(b"newer", 0).unwrap();
        let now = if finish {
            world.gather(&plan).unwrap();
            disk.to
        } else {
            world.undo().unwrap();
            disk.from
        };
        assert!(fs::read(now).unwrap().starts_with(b"newer"), "finish: {finish}");
    }
}

#[test]
fn a_step_that_fails_puts_everything_back() {
    let expected = World::new().look();
    let world = World::new();
    let plan = world.plan().unwrap();
    world.host.refuse_define.store(true, Ordering::Relaxed);
    let error = world.gather(&plan).unwrap_err();
    assert!(matches!(error, ProtectError::HalfWay { .. }), "define fails on the way back, too: {error}");
    world.host.refuse_define.store(false, Ordering::Relaxed);
    world.undo().unwrap();
    assert_eq!(world.look(), expected);

    fs::write(world.at("images/db"), "in the way").unwrap();
    let error = world.gather(&plan).unwrap_err();
    assert!(matches!(error, ProtectError::PutBack { .. }), "{error}");
    fs::remove_file(world.at("images/db")).unwrap();
    assert_eq!(world.look(), expected);
}

#[test]
fn a_vm_started_meanwhile_keeps_its_files() {
    let world = World::new();
    let plan = world.plan().unwrap();
    let before = world.look();
    world.host.facts.lock().unwrap().state = VmState::Running;
    assert!(world.gather(&plan).unwrap_err().is_refusal());
    assert_eq!(world.look(), before);
    assert_eq!(pending(&world.paths, &world.module).unwrap(), None);
}

#[test]
fn a_foreign_file_at_an_old_name_is_not_overwritten_on_the_way_back() {
    let world = World::new();
    world.gather(&world.plan().unwrap()).unwrap();
    fs::write(world.at("flat/data.img"), "somebody's").unwrap();
    assert!(world.undo().unwrap_err().to_string().contains("move"));
    assert_eq!(fs::read(world.at("flat/data.img")).unwrap(), b"somebody's");
    fs::remove_file(world.at("flat/data.img")).unwrap();
    world.undo().unwrap();
    assert_eq!(world.look(), World::new().look());
}

#[test]
fn every_refusal_is_a_sentence_and_touches_nothing() {
    type Spoil = fn(&World);
    let cases: &[(&str, Spoil)] = &[
        ("not defined", |w| w.host.set_definition(None)),
        ("is running", |w| w.host.facts.lock().unwrap().state = VmState::Running),
        ("3 snapshots", |w| w.host.facts.lock().unwrap().snapshots = 3),
        ("checkpoints", |w| w.host.facts.lock().unwrap().checkpoints = 1),
        ("managed save", |w| w.host.facts.lock().unwrap().managed_save = true),
        ("a TPM", |w| w.change("</devices>", "<tpm model='tpm-crb'/></devices>")),
        ("a host device", |w| w.change("</devices>", "<hostdev mode='subsystem'/></devices>")),
        ("on_poweroff", |w| w.change("<devices>", "<on_poweroff>restart</on_poweroff><devices>")),
        ("on_reboot", |w| w.change("<devices>", "<on_reboot>destroy</on_reboot><devices>")),
        ("type block", |w| {
            w.change("</devices>", "<disk type='block'><source dev='/dev/sdb'/><target dev='vdz'/></disk></devices>")
        }),
        ("on the network", |w| {
            w.change(
                "</devices>",
                "<disk type='network'><source protocol='rbd' name='x'/><target dev='vdz'/></disk></devices>",
            )
        }),
        ("pool nowhere", |w| {
            w.change(
                "</devices>",
                "<disk type='volume'><source pool='nowhere' volume='x'/><target dev='vdz'/></disk></devices>",
            )
        }),
        ("shareable", |w| w.change("<target dev='vdb'/>", "<target dev='vdb'/><shareable/>")),
        ("transient", |w| w.change("<target dev='vdb'/>", "<target dev='vdb'/><transient/>")),
        ("encrypted", |w| w.change("<target dev='vdb'/>", "<target dev='vdb'/><encryption format='luks'/>")),
        ("cannot be found", |w| fs::remove_file(w.at("flat/data.img")).unwrap()),
        ("hard links", |w| fs::hard_link(w.at("flat/data.img"), w.at("flat/again.img")).unwrap()),
        ("does not say which format", |w| {
            let header = format!("backing {} -\n", w.at("base/data.img").display());
            fs::write(w.at("flat/db.qcow2"), header).unwrap();
        }),
        ("cannot be read as qcow2", |w| fs::write(w.at("flat/db.qcow2"), "garbage\n").unwrap()),
        ("no plain file", |w| fs::write(w.at("flat/db.qcow2"), "backing nbd://h/x raw\n").unwrap()),
        ("belongs to VM other", |w| {
            let xml = format!(
                "<domain><name>other</name><devices><disk><driver type='raw'/><source file='{}'/>\
                 <target dev='vda'/></disk></devices></domain>",
                w.at("base/data.img").display()
            );
            w.host.others.lock().unwrap().push(Listed { name: "other".into(), xml });
        }),
        ("is no part of VM", |w| {
            fs::create_dir(w.at("images/db")).unwrap();
            fs::write(w.at("images/db/letter.txt"), "hello").unwrap();
        }),
        ("no directory", |w| fs::write(w.at("images/db"), "a file").unwrap()),
        ("does not exist", |w| fs::remove_dir(w.at("images")).unwrap()),
        ("was interrupted", |w| {
            w.cut_when(|progress| progress.step == "define");
            assert!(w.gather_cut(&w.plan().unwrap()).is_err());
        }),
    ];
    for (words, spoil) in cases {
        let world = World::new();
        spoil(&world);
        let before = world.look();
        let error = world.plan().expect_err(words);
        assert!(error.is_refusal() && error.to_string().contains(words), "{words}: {error}");
        assert_eq!(world.look(), before, "{words}");
    }
    let world = World::new();
    world.configure("web", Path::new("/srv/vms/web"));
    for taken in ["/srv/vms", "/srv/vms/web", "/srv/vms/web/db"] {
        let error = world.plan_in(Path::new(taken)).unwrap_err();
        assert!(error.is_refusal() && error.to_string().contains("in use by module web"), "{taken}: {error}");
    }
    for bad in ["images", "/a/../b", "/", "./x"] {
        let error = world.plan_in(Path::new(bad)).unwrap_err();
        assert!(error.to_string().contains("no absolute path"), "{bad}: {error}");
    }
}

#[test]
fn an_empty_or_missing_medium_keeps_no_vm_from_being_protected() {
    let world = World::new();
    fs::remove_file(world.at("iso/seed.iso")).unwrap();
    let plan = world.plan().unwrap();
    assert!(plan.notes.iter().any(|note| note.contains("seed.iso")), "{:?}", plan.notes);
    assert!(plan.after.matches("startupPolicy='optional'").count() == 2, "{}", plan.after);
}

#[test]
fn a_layer_whose_name_looks_like_a_protocol_is_named_as_a_file() {
    let world = World::new();
    let odd = world.at("base/a:b.img");
    fs::rename(world.at("base/data.img"), &odd).unwrap();
    fs::write(world.at("flat/db.qcow2"), format!("backing {} raw\n", odd.display())).unwrap();
    world.gather(&world.plan().unwrap()).unwrap();
    assert_eq!(fs::read(world.at("images/db/db.qcow2")).unwrap(), b"backing ./a:b.img raw\n");
    world.undo().unwrap();
    assert!(odd.exists());
}

#[test]
fn a_protected_vm_is_not_protected_twice() {
    let world = World::new();
    world.gather(&world.plan().unwrap()).unwrap();
    commit(&world.paths, &world.module).unwrap();
    world.configure("db", &world.at("images/db"));
    assert!(world.plan().unwrap_err().to_string().contains("protected already, by module db"));
}

#[test]
fn a_full_disk_is_seen_before_anything_is_touched() {
    let small = tempfile::tempdir().unwrap();
    let mounted =
        rustix::mount::mount("vmtwin-test", small.path(), "tmpfs", rustix::mount::MountFlags::empty(), c"size=1m");
    if let Err(error) = mounted {
        println!("SKIPPED: no tmpfs can be mounted here: {error}");
        return;
    }
    let world = World::new();
    let result = catch_unwind(AssertUnwindSafe(|| {
        let before = world.look();
        let error = world.plan_in(&small.path().join("db")).unwrap_err();
        assert!(error.is_refusal() && error.to_string().contains("MiB free"), "{error}");
        assert_eq!(world.look(), before);
        // One that fills up while it is copied to: everything is put back.
        let mut plan = world.plan().unwrap();
        let to = small.path().join("data.img").to_string_lossy().into_owned();
        let step = plan.files.iter_mut().find(|step| step.from.ends_with("flat/data.img")).unwrap();
        fs::write(&step.from, vec![7; 3 << 20]).unwrap();
        step.to = to;
        let before = world.look();
        assert!(matches!(world.gather(&plan).unwrap_err(), ProtectError::PutBack { .. }));
        assert_eq!(world.look(), before);
        assert_eq!(fs::read_dir(small.path()).unwrap().count(), 0, "nothing is left on the full disk");
    }));
    rustix::mount::unmount(small.path(), rustix::mount::UnmountFlags::empty()).unwrap();
    result.unwrap_or_else(|panic| resume_unwind(panic));
}

#[test]
fn unprotect_leaves_the_files_or_takes_them_back_at_every_cut() {
    let protected = || {
        let world = World::new();
        world.gather(&world.plan().unwrap()).unwrap();
        commit(&world.paths, &world.module).unwrap();
        fs::create_dir(world.at("images/db").join(METADATA_LOCAL)).unwrap();
        world
    };
    let world = protected();
    world.restore(false).unwrap();
    let domain = domain::read(&world.host.definition().unwrap()).unwrap();
    assert_eq!(domain.module, None);
    assert_eq!(domain.disks[0].file().unwrap(), world.at("images/db/db.qcow2").to_string_lossy());
    assert!(world.host.facts().unwrap().autostart);
    assert!(!world.at("images/db").join(METADATA).exists() && !world.at("images/db").join(METADATA_LOCAL).exists());

    let before = World::new().look();
    let cuts = each_cut(
        protected,
        |world| {
            let _ = world.cut(|tell| world.restore_with(true, tell));
        },
        |world| {
            world.restore(true).unwrap();
            let mut after = world.look();
            // Nothing is left behind, the kernel's copy neither; the definition keeps its guards.
            assert!(after.remove("definition").is_some());
            let mut expected = before.clone();
            expected.remove("definition");
            assert_eq!(after, expected);
            let disks = domain::read(&world.host.definition().unwrap()).unwrap().disks;
            let original = domain::read(&world.xml).unwrap().disks;
            let files = |disks: &[domain::Disk]| disks.iter().map(|d| d.file().map(str::to_owned)).collect::<Vec<_>>();
            assert_eq!(files(&disks), files(&original));
            assert!(world.host.facts().unwrap().autostart);
        },
    );
    assert!(cuts >= 12, "{cuts} places to cut");
}

#[test]
fn unprotect_goes_back_to_a_hosts_own_kernel_only_if_it_is_the_same() {
    let world = World::new();
    world.gather(&world.plan().unwrap()).unwrap();
    commit(&world.paths, &world.module).unwrap();
    fs::write(world.at("boot/vmlinuz"), "a newer one").unwrap();
    let notes = world.restore(true).unwrap();
    assert!(notes.len() == 1 && notes[0].contains("vmlinuz"), "{notes:?}");
    let domain = domain::read(&world.host.definition().unwrap()).unwrap();
    assert_eq!(domain.boot_files[0].path, world.at("images/db/vmlinuz").to_string_lossy());
    assert_eq!(fs::read(&domain.boot_files[0].path).unwrap(), b"a kernel");
}

#[test]
fn unprotect_does_not_overwrite_what_lies_at_the_old_names() {
    let world = World::new();
    world.gather(&world.plan().unwrap()).unwrap();
    commit(&world.paths, &world.module).unwrap();
    fs::write(world.at("flat/data.img"), "somebody's").unwrap();
    let before = world.look();
    let error = world.restore(true).unwrap_err();
    assert!(error.is_refusal() && error.to_string().contains("move it away"), "{error}");
    assert_eq!(world.look(), before);
    world.host.facts.lock().unwrap().state = VmState::Running;
    assert!(world.restore(false).unwrap_err().to_string().contains("vmtwin stop"));
}

#[test]
fn the_peers_directory_is_renamed_and_never_deleted() {
    let world = World::new();
    world.gather(&world.plan().unwrap()).unwrap();
    let dir = world.at("images/db");
    let retire = || retire_peer("db", &dir, "2026-11-27", &*world.host).unwrap();
    let first = retire();
    assert_eq!((first.undefined, first.dir.as_deref()), (true, Some(&*world.at("images/db.unprotected-2026-11-27"))));
    assert!(first.dir.unwrap().join("db.qcow2").exists());
    assert_eq!(world.host.state().unwrap(), VmState::Undefined);
    assert_eq!(retire(), Unprotected { dir: None, undefined: false });
    fs::create_dir(&dir).unwrap();
    assert_eq!(retire().dir.unwrap(), world.at("images/db.unprotected-2026-11-27-2"));
    // A VM of that name without our mark is somebody's own.
    world.host.set_definition(Some(world.xml.clone()));
    assert!(!retire().undefined);
    assert!(world.host.definition().is_ok());
}

#[test]
fn the_peer_says_what_is_missing_there() {
    let world = World::new();
    let plan = world.plan().unwrap();
    let question = peer::question(&plan).unwrap();
    let peer = World::new();
    peer.host.set_definition(None);
    let ask = |question: &peer::Question| peer::check(&peer.paths, &peer.module, question, &*peer.host).unwrap();
    let here = peer::Question { dir: peer.at("images/db"), ..question };
    assert_eq!(ask(&here), Vec::<String>::new());
    let users = |number| [("root".to_owned(), number)].into();
    for (words, question) in [
        ("no /no/qemu", peer::Question { emulator: Some("/no/qemu".into()), ..here.clone() }),
        ("no /no/fd", peer::Question { firmware: [("/no/fd".into(), String::new())].into(), ..here.clone() }),
        ("differs", peer::Question { firmware: [("/etc/passwd".into(), "00".into())].into(), ..here.clone() }),
        ("MiB are needed", peer::Question { bytes: u64::MAX / 2, ..here.clone() }),
        ("not empty", peer::Question { dir: peer.at("flat"), ..here.clone() }),
        ("no directory", peer::Question { dir: peer.at("boot/vmlinuz"), ..here.clone() }),
    ] {
        let answer = ask(&question);
        assert!(answer.len() == 1 && answer[0].contains(words), "{words}: {answer:?}");
    }
    // A user that both have by other numbers; one that only one has owns nothing here.
    assert_eq!(ask(&peer::Question { users: users(1), ..here.clone() }), Vec::<String>::new());
    peer.host.set_definition(Some(peer.xml.clone()));
    assert!(ask(&here)[0].contains("named db already"));
    let renamed =
        peer::Question { vm: "new".into(), uuid: Some("5f0e7f1c-0c1f-4b3a-9a55-6d1c5f3f7a01".into()), ..here };
    assert!(ask(&renamed)[0].contains("same uuid"));
}

/// Where worlds lie: in memory where that can be, as each step of theirs is flushed.
fn near_folder() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap()
}

/// A folder on another file system than worlds.
fn far_folder() -> Option<tempfile::TempDir> {
    let device = |folder: &tempfile::TempDir| folder.path().metadata().unwrap().dev();
    let far = tempfile::tempdir().unwrap();
    if device(&far) == device(&near_folder()) {
        println!("SKIPPED: /dev/shm is no other file system than the temporary folder");
        return None;
    }
    Some(far)
}

/// Runs `act` on a new world with a cut at its first step, its second, and so on, each time with `then` afterwards, until
/// `act` comes to its end uncut. Gives the number of cuts.
fn each_cut(make: impl Fn() -> World, act: impl Fn(&World), mut then: impl FnMut(&World)) -> usize {
    for cut in 0.. {
        let world = make();
        *world.cut_at.lock().unwrap() = Cut::After(cut);
        act(&world);
        let reached = matches!(*world.cut_at.lock().unwrap(), Cut::Never);
        *world.cut_at.lock().unwrap() = Cut::Never;
        if !reached {
            return cut;
        }
        then(&world);
    }
    unreachable!("it ends")
}

/// When the process "dies".
enum Cut {
    Never,
    After(usize),
    When(fn(&Progress<'_>) -> bool),
}

/// A host with one VM as virt-install made it.
struct World {
    folder: tempfile::TempDir,
    /// Of another file system, in some tests; emptied with the world.
    far: Option<PathBuf>,
    paths: Paths,
    module: ModuleName,
    host: Box<TestHost>,
    xml: String,
    cut_at: Mutex<Cut>,
}

impl Drop for World {
    fn drop(&mut self) {
        if let Some(far) = &self.far {
            let _ = fs::remove_dir_all(far);
        }
    }
}

impl World {
    fn new() -> Self {
        Self::build(None)
    }

    /// Its disks lie flat in `far`.
    fn with_disks(far: &Path) -> Self {
        Self::build(Some(far.join("flat")))
    }

    fn build(far: Option<PathBuf>) -> Self {
        let folder = near_folder();
        let paths = Paths::under(&folder.path().join("vt"));
        paths.create().unwrap();
        let module = ModuleName::new("db").unwrap();
        let at = |name: &str| folder.path().join(name);
        for name in ["images", "base", "nvram", "boot", "iso"] {
            fs::create_dir(at(name)).unwrap();
        }
        let flat = far.clone().unwrap_or_else(|| at("flat"));
        fs::create_dir(&flat).unwrap();
        fs::write(flat.join("db.qcow2"), format!("backing {} raw\n", at("base/data.img").display())).unwrap();
        fs::write(at("base/data.img"), "the base").unwrap();
        let data = fs::File::create(flat.join("data.img")).unwrap();
        data.set_len(4 << 20).unwrap();
        for offset in [0_u64, 1 << 20, (4 << 20) - 4096] {
            data.write_all_at(&[offset.to_le_bytes()[2] / 16 + 1; 4096], offset).unwrap();
        }
        data.write_all_at(&[9; 64 << 10], 5 << 19).unwrap();
        for (name, text) in
            [("nvram/db_VARS.fd", "variables"), ("boot/vmlinuz", "a kernel"), ("iso/seed.iso", "cloud-init")]
        {
            fs::write(at(name), text).unwrap();
        }
        // An installer: large, by its size alone.
        fs::File::create(at("iso/install.iso")).unwrap().set_len(65 << 20).unwrap();
        let disk = |device: &str, format: &str, file: &Path, target: &str| {
            format!(
                "<disk type='file' device='{device}'><driver name='qemu' type='{format}'/><source file='{}'/>\
                 <target dev='{target}'/></disk>",
                file.display()
            )
        };
        let xml = format!(
            "<domain type='kvm'><name>db</name><uuid>5f0e7f1c-0c1f-4b3a-9a55-6d1c5f3f7a01</uuid>\
             <os><nvram>{}</nvram><kernel>{}</kernel></os><devices>{}{}{}{}</devices></domain>",
            at("nvram/db_VARS.fd").display(),
            at("boot/vmlinuz").display(),
            disk("disk", "qcow2", &flat.join("db.qcow2"), "vda"),
            disk("disk", "raw", &flat.join("data.img"), "vdb"),
            disk("cdrom", "raw", &at("iso/seed.iso"), "sda"),
            disk("cdrom", "raw", &at("iso/install.iso"), "sdb"),
        );
        let facts = Facts {
            state: VmState::Off,
            persistent: true,
            autostart: true,
            snapshots: 0,
            checkpoints: 0,
            managed_save: false,
        };
        let host = Box::new(TestHost {
            definition: Mutex::new(Some(xml.clone())),
            facts: Mutex::new(facts),
            others: Mutex::new(Vec::new()),
            refuse_define: AtomicBool::new(false),
        });
        Self { folder, far, paths, module, host, xml, cut_at: Mutex::new(Cut::Never) }
    }

    fn at(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn change(&self, from: &str, to: &str) {
        self.host.set_definition(Some(self.xml.replacen(from, to, 1)));
    }

    fn configure(&self, module: &str, dir: &Path) {
        let node = |name: &str| NodeName::new(name).unwrap();
        let module = ModuleName::new(module).unwrap();
        ModuleConfig::new(module, ModuleId(1), node("h1"), node("h2"), dir.to_owned()).store(&self.paths).unwrap();
    }

    fn plan(&self) -> Result<Plan, ProtectError> {
        self.plan_in(&self.at("images/db"))
    }

    fn plan_in(&self, dir: &Path) -> Result<Plan, ProtectError> {
        preflight(&self.paths, &self.module, "db", dir, &*self.host, &TextImages)
    }

    fn gather(&self, plan: &Plan) -> Result<(), ProtectError> {
        gather(&self.paths, &self.module, plan, &*self.host, &TextImages, &mut |_| {})
    }

    fn undo(&self) -> Result<(), ProtectError> {
        undo(&self.paths, &self.module, &*self.host, &TextImages, &mut |_| {})
    }

    fn restore(&self, layout: bool) -> Result<Vec<String>, ProtectError> {
        self.restore_with(layout, &mut |_| {})
    }

    fn restore_with(&self, layout: bool, tell: &mut Tell<'_>) -> Result<Vec<String>, ProtectError> {
        let dir = self.at("images/db");
        restore(&self.paths, &self.module, "db", &dir, layout, &*self.host, &TextImages, tell)
    }

    fn gather_cut(&self, plan: &Plan) -> Result<(), ()> {
        self.cut(|tell| gather(&self.paths, &self.module, plan, &*self.host, &TextImages, tell))
    }

    fn undo_cut(&self) -> Result<(), ()> {
        self.cut(|tell| undo(&self.paths, &self.module, &*self.host, &TextImages, tell))
    }

    fn cut_when(&self, when: fn(&Progress<'_>) -> bool) {
        *self.cut_at.lock().unwrap() = Cut::When(when);
    }

    /// Runs until the cut: what is left then is what a killed process leaves.
    fn cut<T>(&self, act: impl FnOnce(&mut Tell<'_>) -> Result<T, ProtectError>) -> Result<T, ()> {
        let mut tell = |progress: &Progress<'_>| {
            let mut cut = self.cut_at.lock().unwrap();
            let now = match &mut *cut {
                Cut::Never => false,
                Cut::After(0) => true,
                Cut::After(left) => {
                    *left -= 1;
                    false
                }
                Cut::When(when) => when(progress),
            };
            if now {
                *cut = Cut::Never;
                drop(cut);
                resume_unwind(Box::new("cut"));
            }
        };
        match catch_unwind(AssertUnwindSafe(|| act(&mut tell))) {
            Ok(result) => Ok(result.unwrap()),
            Err(_) => Err(()),
        }
    }

    /// All files but vmtwin's own, with their content, and the definition: paths relative, so that worlds compare.
    fn look(&self) -> BTreeMap<String, String> {
        let mut seen = BTreeMap::new();
        let mut roots: Vec<PathBuf> =
            ["images", "base", "nvram", "boot", "iso", "flat"].iter().map(|name| self.at(name)).collect();
        roots.extend(self.far.clone());
        let plain = |text: &str| {
            let text = text.replace(&self.folder.path().display().to_string(), "");
            self.far.as_ref().map_or(text.clone(), |far| text.replace(&far.display().to_string(), "/far"))
        };
        while let Some(path) = roots.pop() {
            let name = plain(&path.display().to_string()).trim_start_matches('/').to_owned();
            if path.is_dir() {
                roots.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
                seen.insert(name, "folder".to_owned());
            } else if path.metadata().is_ok_and(|found| found.len() > 64 << 20) {
                // The installer, all holes.
                seen.insert(name, "large".to_owned());
            } else if let Ok(content) = fs::read(&path) {
                // Text names the world's own folder; the rest is known by its hash.
                let seen_as = match String::from_utf8(content) {
                    Ok(text) if text.len() < 4096 => plain(&text),
                    Ok(text) => blake3::hash(text.as_bytes()).to_string(),
                    Err(bytes) => blake3::hash(bytes.as_bytes()).to_string(),
                };
                seen.insert(name, seen_as);
            }
        }
        if let Ok(definition) = self.host.definition() {
            seen.insert("definition".to_owned(), plain(&definition));
        }
        seen
    }
}

/// Images whose header is their first line: `backing NAME FORMAT`, or `flat`.
struct TextImages;

impl Images for TextImages {
    fn info(&self, path: &Path, _format: &str) -> std::io::Result<ImageInfo> {
        let text = fs::read_to_string(path)?;
        let words: Vec<_> = text.lines().next().unwrap_or_default().split(' ').collect();
        match words[..] {
            ["flat"] => Ok(ImageInfo::default()),
            ["backing", name, format] => {
                let format = (format != "-").then(|| format.to_owned());
                let path = path.parent().unwrap().join(name);
                Ok(ImageInfo { backing: Some(Backing { name: name.to_owned(), path, format }), data_file: false })
            }
            _ => Err(std::io::Error::other("no header")),
        }
    }

    fn rename_backing(&self, path: &Path, _format: &str, name: &str, backing_format: &str) -> std::io::Result<()> {
        fs::write(path, format!("backing {name} {backing_format}\n"))
    }
}

/// One VM in memory, and what else is on the host.
struct TestHost {
    definition: Mutex<Option<String>>,
    facts: Mutex<Facts>,
    others: Mutex<Vec<Listed>>,
    refuse_define: AtomicBool,
}

impl TestHost {
    fn set_definition(&self, xml: Option<String>) {
        *self.defined() = xml;
    }
    fn defined(&self) -> MutexGuard<'_, Option<String>> {
        self.definition.lock().unwrap()
    }
}

fn undefined() -> VmError {
    VmError::Undefined { name: "db".into() }
}

impl Hypervisor for TestHost {
    fn define(&self, xml: &str) -> VmResult<()> {
        if self.refuse_define.load(Ordering::Relaxed) {
            return Err(VmError::Refused { call: "define", name: "db".into(), why: "the test says so".into() });
        }
        *self.defined() = Some(xml.to_owned());
        Ok(())
    }
    fn definition(&self) -> VmResult<String> {
        self.definition.lock().unwrap().clone().ok_or_else(undefined)
    }
    fn state(&self) -> VmResult<VmState> {
        let state = self.facts.lock().unwrap().state;
        Ok(if self.defined().is_some() { state } else { VmState::Undefined })
    }
    fn start(&self) -> VmResult<()> {
        unreachable!("protect starts nothing")
    }
    fn shutdown(&self, _: Duration) -> VmResult<bool> {
        unreachable!("protect stops nothing")
    }
    fn destroy(&self) -> VmResult<()> {
        unreachable!("protect stops nothing")
    }
    fn pause(&self) -> VmResult<()> {
        unreachable!("protect stops nothing")
    }
    fn resume(&self) -> VmResult<()> {
        unreachable!("protect starts nothing")
    }
    fn process(&self) -> VmResult<Option<u32>> {
        Ok(None)
    }
    fn events(&self) -> VmResult<Receiver<VmEvent>> {
        unreachable!("protect hears nothing")
    }
}

impl Inventory for TestHost {
    fn list(&self) -> VmResult<Vec<Listed>> {
        let mut all = self.others.lock().unwrap().clone();
        all.extend(self.defined().iter().map(|xml| Listed { name: "db".into(), xml: xml.clone() }));
        Ok(all)
    }
    fn facts(&self) -> VmResult<Facts> {
        self.defined().as_ref().ok_or_else(undefined)?;
        Ok(self.facts.lock().unwrap().clone())
    }
    fn set_autostart(&self, on: bool) -> VmResult<()> {
        self.facts.lock().unwrap().autostart = on;
        Ok(())
    }
    fn undefine(&self) -> VmResult<()> {
        *self.defined() = None;
        Ok(())
    }
    fn volume_path(&self, pool: &str, volume: &str) -> VmResult<PathBuf> {
        Err(VmError::Refused { call: "volume", name: "db".into(), why: format!("no {volume} in {pool}") })
    }
}
