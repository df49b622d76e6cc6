//! The guardian: ends the VM of a holder whose module process is stopped, hangs or has died, and that process with it, so
//! that the daemon starts it anew. One VM, never the host, never another VM.
//!
//! Holds: a handle of each process that renewed a lease through this node's `keep`. Keeps out: when to act (the core's
//! `arbiter::guardian`), libvirt. What it learns, it learns from the requests that `keep` serves anyway; /etc is read
//! only where it acts.
//! Order: SIGKILL to the VM, then its mount is aborted, so that it can die of that and no error reaches a live guest, then
//! SIGKILL to the module process.
use crate::acceptors::Voters;
use crate::acceptors::wire::Ask;
use crate::config::{Driver, ModuleConfig, Paths};
use crate::eventlog::{EventLog, Level};
use crate::{host, trust};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;
use tokio::time::{MissedTickBehavior, interval, sleep};
use vmtwin_core::arbiter::Request;
use vmtwin_core::arbiter::guardian::{Facts, Guardian, Process};
use vmtwin_core::ids::ModuleId;
use vmtwin_core::limits::GUARD_LOOK_MS;
use vmtwin_core::time::millis;
use vmtwin_frontend::fuse;
use vmtwin_hypervisor::libvirt::process::Process as VmProcess;

/// A silent process without a VM is looked at again after this: a start that was on its way may still bring one up.
const AGAIN: Duration = Duration::from_secs(1);

/// All modules that hold, or held, a lease here.
#[derive(Debug)]
pub struct Guard {
    paths: Paths,
    /// Guards the map only; never held over a wait.
    watched: Mutex<BTreeMap<ModuleId, Watched>>,
}

#[derive(Debug)]
struct Watched {
    guardian: Guardian,
    pid: Pid,
    handle: Arc<OwnedFd>,
    /// Somebody is at work on it.
    busy: bool,
}

impl Guard {
    /// Nobody is watched before it renews.
    #[must_use]
    pub fn new(paths: Paths) -> Self {
        Self { paths, watched: Mutex::default() }
    }

    /// A process of this host asks. One that renews a lease is watched until it gives the lease up or is ended; whatever
    /// it asks is a sign of life. Others (the daemon asks, too) are none of ours.
    pub fn hear(&self, pid: Option<Pid>, module: ModuleId, ask: &Ask) {
        let Some(pid) = pid else { return };
        let (mut watched, now) = (self.watched(), host::now());
        let known = watched.get_mut(&module).filter(|known| known.pid == pid);
        match (ask, known) {
            (Ask::Core(Request::Release { .. }) | Ask::Forget, _) => drop(watched.remove(&module)),
            (Ask::Core(Request::Renew { record, .. }), Some(known)) => known.guardian.renewed(now, *record),
            (Ask::Core(Request::Renew { record, .. }), None) => {
                if let Ok(handle) = pidfd_open(pid, PidfdFlags::empty()) {
                    let guardian = Guardian::new(now, *record);
                    watched.insert(module, Watched { guardian, pid, handle: Arc::new(handle), busy: false });
                }
            }
            (_, Some(known)) => known.guardian.asked(now),
            (_, None) => {}
        }
    }

    /// Looks after all of them, for ever.
    pub async fn run(self: Arc<Self>, voters: Arc<Voters>) {
        let mut looks = interval(millis(GUARD_LOOK_MS));
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            looks.tick().await;
            for module in self.look(&voters) {
                tokio::spawn(self.clone().act(module));
            }
        }
    }

    /// Those to act upon; they are busy from now on.
    fn look(&self, voters: &Voters) -> Vec<ModuleId> {
        let (now, mut due) = (host::now(), Vec::new());
        for (module, watched) in self.watched().iter_mut() {
            let facts = || Facts { process: state(watched.pid, &watched.handle), accepted: voters.accepted(*module) };
            if watched.guardian.look(now, facts) && !watched.busy {
                watched.busy = true;
                due.push(*module);
            }
        }
        due
    }

    /// On a thread of its own: what it reads of a process that hangs may hang, and concerns this one module.
    async fn act(self: Arc<Self>, module: ModuleId) {
        let this = self.clone();
        let done = tokio::task::spawn_blocking(move || this.end_vm(module)).await;
        if !matches!(done, Ok(Some(()))) {
            sleep(AGAIN).await;
        }
        if let Some(watched) = self.watched().get_mut(&module) {
            watched.busy = false;
        }
    }

    /// `None`: there is no VM to be ended, or it is too late for that.
    fn end_vm(&self, module: ModuleId) -> Option<()> {
        let (guardian, pid, handle) = {
            let watched = self.watched();
            let watched = watched.get(&module)?;
            (watched.guardian.clone(), watched.pid, watched.handle.clone())
        };
        let process = state(pid, &handle);
        let config = self.config(module).filter(|config| config.driver == Driver::Libvirt);
        let vm = config.as_ref().and_then(|config| VmProcess::find(&config.vm));
        let vm = vm.filter(|vm| guardian.is_of_this_reign(vm.began));
        let (Some(config), Some(vm)) = (config, vm) else {
            if process == Process::Gone {
                self.forget(module, pid);
            }
            return None;
        };
        // It may have asked meanwhile. Whoever does from here on finds its VM ended.
        if self.watched().get(&module)?.guardian.quiet() < guardian.quiet() {
            return None;
        }
        vm.kill();
        let aborted = match process {
            Process::Gone => Ok(false), // the kernel did it
            Process::Runs | Process::Stopped => fuse::abort(&config.dir, &self.paths.connections(&config.name)),
        };
        let _ = pidfd_send_signal(&handle, Signal::KILL);
        self.forget(module, pid);

        let node = trust::own_identity(&self.paths).map_or_else(|_| String::new(), |who| who.name);
        let mut log = EventLog::open(&self.paths.module_log(&config.name), &node, config.name.as_str());
        let how = match process {
            Process::Gone => "has died",
            Process::Stopped => "is stopped",
            Process::Runs => "hangs",
        };
        let mount = match aborted {
            Ok(true) => "its mount aborted, the module process killed".to_owned(),
            Ok(false) => "nothing else was left of it".to_owned(),
            Err(e) => format!("its mount could not be aborted ({e}), the module process killed"),
        };
        let text = format!(
            "the module process {} {how}, it asked for no lease for {:.1} s: its VM {} (process {}) was killed, {mount}",
            pid.as_raw_nonzero(),
            host::now().since(guardian.last_asked()).as_secs_f64(),
            config.vm,
            vm.pid
        );
        log.write(guardian.record().generation.0, Level::Error, "guardian", &text);
        Some(())
    }

    fn config(&self, module: ModuleId) -> Option<ModuleConfig> {
        let names = self.paths.list_modules().ok()?;
        names.iter().filter_map(|name| ModuleConfig::load(&self.paths, name).ok()).find(|config| config.id == module)
    }

    /// Unless a successor is watched already.
    fn forget(&self, module: ModuleId, pid: Pid) {
        let mut watched = self.watched();
        if watched.get(&module).is_some_and(|watched| watched.pid == pid) {
            watched.remove(&module);
        }
    }

    fn watched(&self) -> MutexGuard<'_, BTreeMap<ModuleId, Watched>> {
        self.watched.lock().expect("nothing panics under it")
    }
}

/// What the kernel says of a process. Its number is its own as long as its handle does not say that it has ended.
fn state(pid: Pid, handle: &OwnedFd) -> Process {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero())).unwrap_or_default();
    let mut ended = [PollFd::new(handle, PollFlags::IN)];
    if matches!(poll(&mut ended, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })), Ok(1..)) {
        return Process::Gone;
    }
    let letter = stat.rsplit_once(')').and_then(|(_, rest)| rest.trim_start().chars().next());
    if matches!(letter, Some('T' | 't')) { Process::Stopped } else { Process::Runs }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eventlog;
    use crate::testing::TestCluster;
    use std::process::{Child, Command, Stdio};
    use std::time::Instant;
    use vmtwin_core::arbiter::message::Ballot;
    use vmtwin_core::ids::{AcceptorId, Epoch, Generation, RecordId};
    use vmtwin_core::record::RecordName;

    const MODULE: ModuleId = ModuleId(0xdb);
    const LONG: Duration = Duration::from_secs(120);

    #[tokio::test]
    async fn the_vm_of_a_stopped_process_is_ended_with_it_and_no_other() {
        let mut world = World::new(Driver::Libvirt);
        let (mut vm, mut other) = (world.vm(""), world.vm("x"));
        let mut module = child(&[]);
        world.renew(&module);
        let guard = tokio::spawn(world.guard.clone().run(world.voters()));
        signal(&module, Signal::STOP);
        world.wait(|| ended(&mut vm) && ended(&mut module)).await;
        assert!(!ended(&mut other));
        let events = || eventlog::read(&world.paths.module_log(&"db".parse().unwrap()), 9).unwrap();
        world.wait(|| !events().is_empty()).await;
        assert_eq!((events().len(), events()[0].event.as_str(), events()[0].generation), (1, "guardian", 4));
        assert!(events()[0].text.contains("is stopped"), "{}", events()[0].text);
        // A VM that somebody starts afterwards is none of its business.
        let mut later = world.vm("");
        world.wait(|| world.guard.watched().is_empty()).await;
        assert!(!ended(&mut later));
        guard.abort();
        end([later, other]);
    }

    #[tokio::test]
    async fn the_vm_of_a_dead_process_is_ended_but_not_one_that_began_later() {
        let mut world = World::new(Driver::Libvirt);
        let mut vm = world.vm("");
        let mut module = child(&[]);
        world.renew(&module);
        module.kill().unwrap();
        module.wait().unwrap();
        assert_eq!(world.guard.end_vm(MODULE), Some(()));
        vm.wait().unwrap();

        let mut module = child(&[]);
        world.renew(&module);
        module.kill().unwrap();
        module.wait().unwrap();
        std::thread::sleep(Duration::from_millis(20)); // the kernel tells starts to 10 ms
        let mut vm = world.vm("");
        assert_eq!(world.guard.end_vm(MODULE), None);
        assert!(!ended(&mut vm) && world.guard.watched().is_empty(), "it is not looked for any longer");
        end([vm]);
    }

    #[tokio::test]
    async fn nothing_is_ended_where_the_lease_was_given_up_or_the_vm_is_pretended() {
        for driver in [Driver::Libvirt, Driver::Fake] {
            let mut world = World::new(driver);
            let mut vm = world.vm("");
            let module = child(&[]);
            world.renew(&module);
            if driver == Driver::Libvirt {
                let release = Request::Release { ballot: ballot(), record: record(), to: None };
                world.guard.hear(Some(pid(&module)), MODULE, &Ask::Core(release));
            }
            assert_eq!(world.guard.end_vm(MODULE), None);
            assert!(!ended(&mut vm));
            end([vm, module]);
        }
    }

    struct World {
        paths: Paths,
        guard: Arc<Guard>,
        vm: String,
        _cluster: TestCluster,
    }

    impl World {
        fn new(driver: Driver) -> Self {
            let cluster = TestCluster::new("paris");
            let paths = cluster.host("h1");
            let vm = format!("stand-in-{:x}", host::random());
            let [name, h1, h2] = ["db", "h1", "h2"];
            let dir = paths.run.join("dir");
            let mut config =
                ModuleConfig::new(name.parse().unwrap(), MODULE, h1.parse().unwrap(), h2.parse().unwrap(), dir);
            (config.vm, config.driver) = (vm.clone(), driver);
            config.store(&paths).unwrap();
            Self { guard: Arc::new(Guard::new(paths.clone())), paths, vm, _cluster: cluster }
        }

        fn voters(&self) -> Arc<Voters> {
            Arc::new(Voters::open(self.paths.acceptors()).unwrap())
        }

        /// A shell with QEMU's words on its command line.
        fn vm(&mut self, more: &str) -> Child {
            let name = format!("{}{more}", self.vm);
            let vm = child(&["-name", &format!("guest={name},debug-threads=on")]);
            let began = Instant::now();
            while VmProcess::find(&name).is_none() {
                assert!(began.elapsed() < LONG, "it never ran");
            }
            vm
        }

        fn renew(&self, module: &Child) {
            let renew = Request::Renew { ballot: ballot(), record: record(), heard: 0 };
            self.guard.hear(Some(pid(module)), MODULE, &Ask::Core(renew));
        }

        async fn wait(&self, mut until: impl FnMut() -> bool) {
            let began = Instant::now();
            while !until() {
                assert!(began.elapsed() < LONG, "it never came");
                sleep(Duration::from_millis(20)).await;
            }
        }
    }

    fn child(words: &[&str]) -> Child {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", "read line"]).args(words).stdin(Stdio::piped()).spawn().unwrap()
    }

    fn ended(child: &mut Child) -> bool {
        child.try_wait().unwrap().is_some()
    }

    fn end<const N: usize>(children: [Child; N]) {
        for mut child in children {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }

    fn pid(child: &Child) -> Pid {
        Pid::from_child(child)
    }

    fn signal(child: &Child, what: Signal) {
        rustix::process::kill_process(pid(child), what).unwrap();
    }

    fn ballot() -> Ballot {
        Ballot { number: 1, node: AcceptorId(1) }
    }

    fn record() -> RecordName {
        RecordName { epoch: Epoch(1), generation: Generation(4), id: RecordId(4) }
    }
}
