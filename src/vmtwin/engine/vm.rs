//! The threads that talk to the hypervisor: calls one after the other on one, events on another, a kill on its own.
//!
//! Holds: the queue of calls, whether a VM of ours is up. Keeps out: when to call what (the module machine).
//! Invariants: calls never overtake each other (a pause would overtake a resume), but a kill overtakes all: it does not wait
//! for a call that hangs with the VM's I/O, and what was queued before it is not called any more. An end that we ordered is
//! told once, as `Off`; one that we did not, once, as `Ended`, and only if the VM is off indeed (events come late).
use crate::host;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;
use vmtwin_core::module::{VmCall, VmEnd as CoreEnd, VmNews, VmOrder};
use vmtwin_hypervisor::{Hypervisor, VmEnd, VmError, VmEvent, VmState};

/// A hypervisor that gives no events is asked again after this long.
const EVENTS_RETRY: Duration = Duration::from_secs(2);
const STACK_BYTES: usize = 256 << 10;

/// Takes news to the control loop.
pub type Tell = Arc<dyn Fn(VmNews) + Send + Sync>;

enum Job {
    Order(u64, VmOrder),
    Runs,
    Ended(VmEnd),
    Defined(String),
}

/// The face of the threads. They end when it is dropped.
pub struct VmThread {
    jobs: Sender<Job>,
    shared: Arc<Shared>,
}

struct Shared {
    hypervisor: Arc<dyn Hypervisor>,
    tell: Tell,
    /// Number of the last order.
    order: AtomicU64,
    /// Orders before this one were overtaken by a kill.
    overtaken: AtomicU64,
    /// A VM is up whose end was not told yet.
    up: AtomicBool,
    /// Whether the host is going down: then an end says nothing about the VM.
    host_stops: fn() -> bool,
}

impl VmThread {
    /// Starts the threads. `definition`: the replicated definition, as a path under the mount.
    ///
    /// # Errors
    /// No more threads.
    pub fn start(hypervisor: Arc<dyn Hypervisor>, definition: PathBuf, tell: Tell) -> io::Result<Self> {
        Self::start_on(hypervisor, definition, tell, host::is_stopping)
    }

    fn start_on(
        hypervisor: Arc<dyn Hypervisor>,
        definition: PathBuf,
        tell: Tell,
        host_stops: fn() -> bool,
    ) -> io::Result<Self> {
        let (jobs, queue) = channel();
        let shared = Arc::new(Shared {
            hypervisor,
            tell,
            order: AtomicU64::new(0),
            overtaken: AtomicU64::new(0),
            up: AtomicBool::new(false),
            host_stops,
        });
        let calls = shared.clone();
        thread("vm-calls", move || calls.call_all(&queue, &definition))?;
        let (events, to_calls) = (shared.clone(), jobs.clone());
        thread("vm-events", move || events.hear_all(&to_calls))?;
        Ok(Self { jobs, shared })
    }

    /// Takes an order; its answer comes as news.
    pub fn order(&self, order: VmOrder) {
        let number = self.shared.order.fetch_add(1, Ordering::SeqCst) + 1;
        let queued = if order == VmOrder::Kill {
            self.shared.overtaken.store(number, Ordering::SeqCst);
            let shared = self.shared.clone();
            if let Err(why) = thread("vm-kill", move || shared.kill()) {
                (self.shared.tell)(VmNews::Failed { call: VmCall::Clear, why: why.to_string() });
            }
            VmOrder::Clear
        } else {
            order
        };
        // The thread ends only after this sender.
        let _ = self.jobs.send(Job::Order(number, queued));
    }
}

fn thread(name: &str, body: impl FnOnce() + Send + 'static) -> io::Result<()> {
    std::thread::Builder::new().name(name.to_owned()).stack_size(STACK_BYTES).spawn(body).map(drop)
}

impl Shared {
    fn tell(&self, news: VmNews) {
        (self.tell)(news);
    }

    fn failed(&self, call: VmCall, why: &dyn std::fmt::Display) {
        self.tell(VmNews::Failed { call, why: why.to_string() });
    }

    /// On a thread of its own. Only a VM whose process is dying may get errors: without the kill no `Dying`.
    fn kill(&self) {
        match self.hypervisor.kill() {
            Ok(_) | Err(VmError::Undefined { .. }) => self.tell(VmNews::Dying),
            Err(why) => self.failed(VmCall::Clear, &why),
        }
    }

    fn call_all(&self, queue: &Receiver<Job>, definition: &Path) {
        for job in queue {
            match job {
                Job::Order(number, _) if number < self.overtaken.load(Ordering::SeqCst) => {}
                Job::Order(_, order) => self.call(order, definition),
                Job::Runs => self.confirm_running(),
                Job::Ended(how) => self.confirm_end(how),
                Job::Defined(xml) => self.keep_definition(definition, &xml),
            }
        }
    }

    fn call(&self, order: VmOrder, definition: &Path) {
        match order {
            VmOrder::Clear | VmOrder::Kill => self.clear(),
            VmOrder::Define => {
                if let Err(why) = self.define(definition) {
                    self.failed(VmCall::Define, &why);
                }
            }
            VmOrder::Start => self.start_vm(definition),
            VmOrder::Shutdown(limit) => match self.hypervisor.shutdown(limit) {
                Ok(by_itself) => self.off(by_itself),
                Err(VmError::Undefined { .. }) => self.off(true),
                Err(why) => self.failed(VmCall::Shutdown, &why),
            },
            VmOrder::Pause => self.report(VmCall::Pause, self.hypervisor.pause(), VmNews::Paused { io_error: false }),
            VmOrder::Resume => self.report(VmCall::Resume, self.hypervisor.resume(), VmNews::Running),
        }
    }

    fn report(&self, call: VmCall, result: Result<(), VmError>, done: VmNews) {
        match result {
            Ok(()) => self.tell(done),
            Err(why) => self.failed(call, &why),
        }
    }

    fn off(&self, by_itself: bool) {
        self.up.store(false, Ordering::SeqCst);
        self.tell(VmNews::Off { by_itself });
    }

    fn clear(&self) {
        let destroyed = match self.hypervisor.state() {
            Ok(VmState::Running | VmState::Paused) => self.hypervisor.destroy(),
            Ok(VmState::Undefined | VmState::Off) => Ok(()),
            Err(why) => Err(why),
        };
        match destroyed {
            Ok(()) | Err(VmError::Undefined { .. }) => self.off(false),
            Err(why) => self.failed(VmCall::Clear, &why),
        }
    }

    fn define(&self, definition: &Path) -> Result<(), String> {
        match std::fs::read_to_string(definition) {
            Ok(xml) => self.hypervisor.define(&xml).map_err(|why| why.to_string()),
            // Protected before its definition was stored: what the hypervisor has will do.
            Err(why) if why.kind() == ErrorKind::NotFound => {
                self.hypervisor.definition().map(drop).map_err(|why| why.to_string())
            }
            Err(why) => Err(format!("cannot read {}: {why}", definition.display())),
        }
    }

    fn start_vm(&self, definition: &Path) {
        if let Err(why) = self.define(definition) {
            return self.failed(VmCall::Start, &why);
        }
        self.tell(VmNews::StartCalled);
        let started = self.hypervisor.start();
        // A call that failed late, or an admin who was faster: what counts is that it runs.
        if started.is_ok() || matches!(self.hypervisor.state(), Ok(VmState::Running)) {
            self.up.store(true, Ordering::SeqCst);
            self.tell(VmNews::Running);
        } else if let Err(why) = started {
            self.failed(VmCall::Start, &why);
        }
    }

    /// Started by an admin, maybe; or late news of a VM that was stopped since.
    fn confirm_running(&self) {
        if !self.up.load(Ordering::SeqCst) && matches!(self.hypervisor.state(), Ok(VmState::Running)) {
            self.up.store(true, Ordering::SeqCst);
        }
    }

    fn confirm_end(&self, how: VmEnd) {
        let off = matches!(self.hypervisor.state(), Ok(VmState::Off | VmState::Undefined));
        if off && self.up.swap(false, Ordering::SeqCst) {
            self.tell(VmNews::Ended(match how {
                // libvirt-guests powers guests off, systemd ends their processes: no person's wish for this VM.
                _ if (self.host_stops)() => CoreEnd::HostStops,
                VmEnd::GuestShutdown => CoreEnd::GuestShutdown,
                VmEnd::HostShutdown => CoreEnd::HostShutdown,
                VmEnd::Destroyed => CoreEnd::Destroyed,
                VmEnd::Crashed => CoreEnd::Crashed,
            }));
        }
    }

    /// The definition lives in the replicated directory. On a node that does not hold, the mount refuses: then it is not
    /// this node's to keep.
    fn keep_definition(&self, definition: &Path, xml: &str) {
        if std::fs::read_to_string(definition).is_ok_and(|kept| kept == xml) {
            return;
        }
        let beside = definition.with_extension("xml.new");
        let written = std::fs::write(&beside, xml)
            .and_then(|()| std::fs::File::open(&beside)?.sync_all())
            .and_then(|()| std::fs::rename(&beside, definition));
        if let Err(why) = written
            && why.kind() != ErrorKind::ReadOnlyFilesystem
        {
            eprintln!("the VM's new definition could not be stored at {}: {why}", definition.display());
        }
    }

    fn hear_all(&self, jobs: &Sender<Job>) {
        loop {
            match self.hypervisor.events() {
                Ok(events) => {
                    self.tell(VmNews::Contact(true));
                    for event in events {
                        if !self.hear(event, jobs) {
                            return;
                        }
                    }
                }
                Err(_) => self.tell(VmNews::Contact(false)),
            }
            std::thread::sleep(EVENTS_RETRY);
        }
    }

    /// False: the calls' thread has ended.
    fn hear(&self, event: VmEvent, jobs: &Sender<Job>) -> bool {
        match event {
            VmEvent::Running => {
                self.tell(VmNews::Running);
                return jobs.send(Job::Runs).is_ok();
            }
            // The proof of a pause, while the call may hang with the VM's I/O.
            VmEvent::Paused { io_error } => self.tell(VmNews::Paused { io_error }),
            VmEvent::Rebooted => self.tell(VmNews::Rebooted),
            VmEvent::Ended(how) => return jobs.send(Job::Ended(how)).is_ok(),
            VmEvent::Defined { xml } => return jobs.send(Job::Defined(xml)).is_ok(),
            VmEvent::Connection { up } => self.tell(VmNews::Contact(up)),
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;
    use std::sync::mpsc::RecvTimeoutError;
    use vmtwin_hypervisor::fake::Fake;

    const LONG: Duration = Duration::from_secs(60);

    #[test]
    fn a_start_defines_from_the_replicated_definition_and_an_ordered_end_is_told_once() {
        let mut vm = Bench::new();
        vm.order(VmOrder::Clear);
        vm.expect(&VmNews::Off { by_itself: false });
        vm.order(VmOrder::Start);
        vm.expect(&VmNews::StartCalled);
        vm.expect(&VmNews::Running);
        assert_eq!(vm.fake.definition().unwrap(), "<domain/>");
        // Restarted at once: the event of the first end, which comes late, is not taken for an end of the second VM.
        for _ in 0..20 {
            vm.order(VmOrder::Shutdown(LONG));
            vm.order(VmOrder::Start);
            vm.expect(&VmNews::Off { by_itself: true });
            vm.expect(&VmNews::StartCalled);
            vm.expect(&VmNews::Running);
        }
        vm.catch_up(21);
        vm.fake.end(VmEnd::Crashed);
        vm.expect(&VmNews::Ended(CoreEnd::Crashed));
    }

    #[test]
    fn a_vm_that_is_not_defined_anywhere_does_not_start() {
        let mut vm = Bench::new();
        std::fs::remove_file(vm.folder.path().join("domain.xml")).unwrap();
        vm.order(VmOrder::Start);
        let news = vm.next_failure();
        assert!(matches!(news, VmNews::Failed { call: VmCall::Start, .. }));
    }

    #[test]
    fn a_kill_says_dying_only_when_the_process_was_killed() {
        let mut vm = Bench::new();
        vm.order(VmOrder::Start);
        vm.expect(&VmNews::Running);
        vm.order(VmOrder::Kill);
        // From two threads, in either order.
        let both = [vm.next_of_a_kill(), vm.next_of_a_kill()];
        assert!(both.contains(&VmNews::Dying) && both.contains(&VmNews::Off { by_itself: false }), "{both:?}");
        assert_eq!(vm.fake.peek(), VmState::Off);
    }

    #[test]
    fn an_end_on_a_host_that_goes_down_is_told_as_that() {
        for how in [VmEnd::GuestShutdown, VmEnd::HostShutdown, VmEnd::Destroyed, VmEnd::Crashed] {
            let mut vm = Bench::on(|| true);
            vm.order(VmOrder::Start);
            vm.expect(&VmNews::Running);
            vm.catch_up(1);
            vm.fake.end(how);
            vm.expect(&VmNews::Ended(CoreEnd::HostStops));
        }
    }

    #[test]
    fn a_call_that_fails_says_which_and_why() {
        let mut vm = Bench::new();
        vm.order(VmOrder::Start);
        vm.expect(&VmNews::Running);
        vm.fake.refuse("pause", true);
        vm.order(VmOrder::Pause);
        let VmNews::Failed { call, why } = vm.next_failure() else { unreachable!() };
        assert_eq!(call, VmCall::Pause);
        assert!(why.contains("the test says so"), "{why}");
    }

    #[test]
    fn a_changed_definition_is_kept_in_the_directory() {
        let vm = Bench::new();
        let path = vm.folder.path().join("domain.xml");
        vm.thread.jobs.send(Job::Defined("<domain type='kvm'/>".to_owned())).unwrap();
        vm.order(VmOrder::Clear);
        let mut vm = vm;
        vm.expect(&VmNews::Off { by_itself: false });
        assert_eq!(std::fs::read_to_string(path).unwrap(), "<domain type='kvm'/>");
    }

    struct Bench {
        fake: Fake,
        thread: VmThread,
        news: Receiver<VmNews>,
        seen: Vec<VmNews>,
        folder: tempfile::TempDir,
    }

    impl Bench {
        fn new() -> Self {
            Self::on(|| false)
        }
        fn on(host_stops: fn() -> bool) -> Self {
            let folder = tempfile::tempdir().unwrap();
            let definition = folder.path().join("domain.xml");
            std::fs::write(&definition, "<domain/>").unwrap();
            let fake = Fake::new("db");
            let (to, news) = channel();
            let to = Mutex::new(to);
            let tell: Tell = Arc::new(move |news| drop(to.lock().unwrap().send(news)));
            let thread = VmThread::start_on(Arc::new(fake.clone()), definition, tell, host_stops).unwrap();
            let mut bench = Self { fake, thread, news, seen: Vec::new(), folder };
            bench.expect(&VmNews::Contact(true));
            bench
        }
        fn order(&self, order: VmOrder) {
            self.thread.order(order);
        }
        /// Waits for it; what else came meanwhile must not be an end.
        fn expect(&mut self, wanted: &VmNews) {
            self.find(|news| news == wanted);
        }
        fn next_failure(&mut self) -> VmNews {
            self.find(|news| matches!(news, VmNews::Failed { .. }))
        }
        /// Until the events of so many lives were heard and looked at: each life is told by its call and by its event.
        fn catch_up(&mut self, lives: usize) {
            while self.seen.iter().filter(|news| **news == VmNews::Running).count() < 2 * lives {
                self.expect(&VmNews::Running);
            }
            self.fake.refuse("pause", true);
            self.order(VmOrder::Pause);
            self.next_failure();
        }
        fn next_of_a_kill(&mut self) -> VmNews {
            self.find(|news| matches!(news, VmNews::Dying | VmNews::Off { .. }))
        }
        fn find(&mut self, wanted: impl Fn(&VmNews) -> bool) -> VmNews {
            loop {
                let news = match self.news.recv_timeout(LONG) {
                    Ok(news) => news,
                    Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => panic!("seen: {:?}", self.seen),
                };
                self.seen.push(news.clone());
                if wanted(&news) {
                    return news;
                }
                assert!(!matches!(news, VmNews::Ended(_)), "an end that nobody caused: {:?}", self.seen);
            }
        }
    }
}
