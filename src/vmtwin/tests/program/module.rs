//! The whole program as processes, around a VM that is pretended: protected, lost, brought back, swapped, stopped, killed,
//! given back. What a guest would write is written by hand through the mount.
use super::lab::{self, Ended, Host, kill, until};
use std::collections::BTreeMap;
use std::path::Path;
use vmtwin::api::types::{Health, ModuleStatus, State, StatusAnswer, VerifiedStatus};
use vmtwin::config::ModuleConfig;
use vmtwin_core::ids::ModuleName;

#[test]
fn a_vm_survives_its_host_comes_home_and_is_given_back() {
    let folder = tempfile::Builder::new().prefix("vmt").tempdir().unwrap();
    let [mut h1, h2, mut w1] = lab::cluster(folder.path());
    let dir = h1.dir("db").display().to_string();
    let protect = format!("protect db --peer h2 --driver fake --dir {dir}");
    h1.refused(&protect, 3, "holds no files");
    std::fs::create_dir(h1.disk("db")).unwrap();
    std::fs::write(h1.disk("db").join("disk.raw"), vec![7; 300_000]).unwrap();
    std::fs::create_dir(h2.disk("db")).unwrap();
    std::fs::write(h2.disk("db").join("precious"), "mine").unwrap();
    h1.refused(&protect, 3, "not empty");
    assert!(!h1.disk("db").join(".vmtwin").exists(), "a refused protect touched something");
    std::fs::remove_dir_all(h2.disk("db")).unwrap();
    w1.kill();
    h1.refused(&protect, 3, "w1 cannot be asked for its vote");
    for host in [&h1, &h2] {
        assert!(!host.paths.modules().join("db").exists() && !host.paths.lib.join("db").exists(), "on {}", host.name);
        let votes = std::fs::read_dir(host.paths.acceptors()).unwrap().count();
        assert_eq!(votes, 0, "{} keeps a vote of a module that is not there", host.name);
    }
    w1.start_witness();
    h1.ok(&protect);
    h1.refused(&protect, 3, "protected already");
    green(&h1, &h2);

    // Written on the holder, there on both; the other side refuses, in a sentence.
    write(&h1, "first");
    assert_eq!(files(&h1), files(&h2));
    assert_ne!(h2.shell(&format!("echo spoiled >> {dir}/disk.raw")).code, 0, "a replica could be written by hand");
    h2.refused("prim db", 3, "h1");
    h1.refused("unprotect db", 3, "vmtwin stop db");

    // h1 loses power.
    h1.end();
    until("h2 to take over", || is(&h2, "h2", State::Alone, None));
    assert_eq!(read(&h2), "first\n");
    write(&h2, "second");
    h1.start("node");
    green(&h2, &h1);
    assert_eq!(files(&h1), files(&h2));

    // Home again.
    assert!(h1.ok("swap db").contains("runs on h1"));
    green(&h1, &h2);
    assert_eq!(read(&h1), "second\n");
    write(&h1, "third");

    // Both copies are proved equal; a byte that changes by itself is found, named and mended, asked on either node.
    let verify =
        |host: &Host, line: &str, code| until(line, || Some(host.run(line)).filter(|ended| ended.code == code));
    assert!(verify(&h1, "verify db", 0).out.contains("proved equal"));
    assert!(status(&h1).iter().any(|m| m.node == "h1" && m.proved_equal.is_some()));
    let spoiled = std::fs::File::options().write(true).open(h2.disk("db").join("disk.raw")).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&spoiled, b"!", 200_000).unwrap();
    let found = verify(&h2, "verify db --json", 1);
    let found: VerifiedStatus = serde_json::from_str(&found.out).unwrap();
    assert_eq!((&found.differences[0].file[..], found.differences[0].offset), ("disk.raw", Some(196_608)));
    assert!(verify(&h1, "verify db --repair", 1).out.contains("disk.raw: content"));
    verify(&h1, "verify db", 0);
    assert_eq!(files(&h1), files(&h2));

    // The module process dies, and its daemon starts another one.
    let first = h1.pid(&h1.paths.module_pid(&"db".parse().unwrap()));
    kill(first);
    until("another module process", || {
        let pid = status(&h1).into_iter().find(|m| m.node == "h1")?.process?;
        (pid != first).then_some(())
    });
    until("somebody to run it", || {
        status(&h1).into_iter().find(|m| matches!(m.state, State::Prim | State::Alone) && m.vm == "running")
    });
    until("both to be green", || status(&h1).iter().all(|m| m.health == Health::Green).then_some(()));
    if is(&h1, "h2", State::Prim, None).is_some() {
        h1.ok("swap db");
        green(&h1, &h2);
    }
    assert_eq!(read(&h1), "third\n");

    // Stopped on both, plain on both; started again.
    h2.ok("stop db");
    for node in ["h1", "h2"] {
        until("both to stop", || is(&h1, node, State::Stop, None));
    }
    assert_eq!(files(&h1), files(&h2));
    h2.ok("start db");
    until("both to be green", || status(&h1).iter().all(|m| m.health == Health::Green).then_some(()));
    assert!(!h1.ok("log db").is_empty());
    h1.ok("stop db");

    // Given back: plain files here, a copy put aside there.
    h1.ok("unprotect db");
    h1.refused("status db", 1, "db");
    assert_eq!(std::fs::read_to_string(h1.disk("db").join("note")).unwrap(), "third\n");
    let aside = std::fs::read_dir(h2.disk("db").parent().unwrap()).unwrap();
    let aside: Vec<_> = aside.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    assert!(aside.len() == 1 && aside[0].starts_with("db.unprotected-"), "{aside:?}");
}

#[test]
fn daemons_come_and_go_settings_change_and_a_process_that_keeps_dying_stays_down() {
    let folder = tempfile::Builder::new().prefix("vmt").tempdir().unwrap();
    let [h1, mut h2, _w1] = lab::cluster(folder.path());
    std::fs::create_dir(h1.disk("db")).unwrap();
    std::fs::write(h1.disk("db").join("disk.raw"), vec![7; 300_000]).unwrap();
    h1.ok(&format!("protect db --peer h2 --driver fake --dir {}", h1.dir("db").display()));
    green(&h1, &h2);
    let name: ModuleName = "db".parse().unwrap();
    let process = h2.paths.module_pid(&name);

    // Settings go to both nodes or to none.
    let file = folder.path().join("db.xml");
    let text = std::fs::read_to_string(h1.paths.userconfig(&name)).unwrap();
    std::fs::write(&file, text.replace("\"180\"", "\"77\"")).unwrap();
    assert!(h2.ok(&format!("apply {}", file.display())).contains("version 2"));
    let [one, two] = [&h1, &h2].map(|host| ModuleConfig::load(&host.paths, &name).unwrap());
    assert_eq!((one.version, one.stop_timeout.as_secs()), (2, 77));
    assert_eq!(one, two);
    std::fs::write(&file, text.replace("/db\"", "/other\"")).unwrap();
    h2.refused(&format!("apply {}", file.display()), 3, "<replication path>");

    // A daemon that dies is no loss; the next one finds the module's process.
    let first = h2.pid(&process);
    h2.kill();
    assert!(h1.ok("status").contains("no contact with node h2"));
    h2.start("node");
    until("h2's daemon", || is(&h2, "h2", State::Second, Some(Health::Green)));
    assert_eq!(h2.pid(&process), first, "the module's process was started anew");

    // One node only.
    h1.ok("stop db --node h2");
    until("h2 to stop", || is(&h1, "h2", State::Stop, None));
    write(&h1, "alone");
    until("h1 to go on", || is(&h1, "h1", State::Alone, None));
    h1.ok("start db --node h2");
    green(&h1, &h2);

    // Three deaths within ten minutes.
    let mut dead = 0;
    for _ in 0..3 {
        let pid = until("h2's process", || Some(h2.pid(&process)).filter(|pid| *pid != dead));
        kill(pid);
        dead = pid;
        until("its death", || {
            (vmtwin::pidfile::find(&process).unwrap().map(|found| found.pid) != Some(dead)).then_some(())
        });
    }
    let down = until("h2 to stay down", || {
        status(&h1).into_iter().find(|m| m.node == "h2" && m.state == State::Stop && m.health == Health::Red)
    });
    assert!(down.reason.contains("ended 3 times") && down.reason.contains("vmtwin start db"), "{}", down.reason);
    h1.ok("start db");
    green(&h1, &h2);

    // Stopped while h2's daemon is away: it does not start the module when it is back.
    h2.kill();
    assert!(h1.ok("stop db").contains("not on h2"));
    until("h2's process to end", || vmtwin::pidfile::find(&process).unwrap().is_none().then_some(()));
    h2.start("node");
    until("h2's daemon", || is(&h2, "h2", State::Stop, None));
    assert!(!h2.paths.wanted(&name).exists());
    assert_eq!(files(&h1), files(&h2));
}

/// `holder` runs it, `other` has the replica, both green.
fn green(holder: &Host, other: &Host) {
    until("the holder to be green", || is(holder, holder.name, State::Prim, Some(Health::Green)));
    until("the peer to be green", || is(holder, other.name, State::Second, Some(Health::Green)));
}

fn status(ask: &Host) -> Vec<ModuleStatus> {
    match ask.run("status db --json") {
        Ended { code: 0, out, .. } => serde_json::from_str::<StatusAnswer>(&out).unwrap().modules,
        _ => Vec::new(),
    }
}

fn is(ask: &Host, node: &str, state: State, health: Option<Health>) -> Option<()> {
    let all = status(ask);
    let found = all.iter().find(|m| m.node == node)?;
    (found.state == state && health.is_none_or(|health| health == found.health)).then_some(())
}

fn write(host: &Host, text: &str) {
    let dir = host.dir("db").display().to_string();
    let ended = host.shell(&format!("echo {text} > {dir}/note && sync {dir}/note && dd if=/dev/urandom of={dir}/disk.raw bs=4k seek=3 count=9 conv=notrunc,fsync"));
    assert_eq!(ended.code, 0, "{ended:?}");
}

fn read(host: &Host) -> String {
    host.shell(&format!("cat {}/note", host.dir("db").display())).out
}

/// What lies on the disk, without what each node keeps for itself.
fn files(host: &Host) -> BTreeMap<String, Vec<u8>> {
    fn walk(folder: &Path, name: &str, found: &mut BTreeMap<String, Vec<u8>>) {
        for entry in std::fs::read_dir(folder).unwrap().map(Result::unwrap) {
            let name = format!("{name}/{}", entry.file_name().to_str().unwrap());
            if name == "/.vmtwin-local" {
                continue;
            }
            if entry.file_type().unwrap().is_dir() {
                walk(&entry.path(), &name, found);
            } else {
                found.insert(name, std::fs::read(entry.path()).unwrap());
            }
        }
    }
    let mut found = BTreeMap::new();
    walk(&host.disk("db"), "", &mut found);
    assert!(!found.is_empty(), "nothing lies below {}", host.disk("db").display());
    found
}
