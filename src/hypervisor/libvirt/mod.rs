//! libvirt as a [`Hypervisor`], for one VM.
//!
//! Holds: the connection, which is made anew when libvirtd comes back; whether this driver killed the VM. A thread per
//! driver reads events, fetches definitions and reconnects; libvirt's own event loop has one thread per process.
//! Keeps out: time limits and retries (the caller's), and the decision when to act.
//! Invariant: `destroy` returns success only when the VM's process is gone, whether libvirtd answers or not.
mod ffi;
mod inventory;
mod news;
pub mod process;

use crate::{Hypervisor, VmError, VmEvent, VmResult, VmState};
use ffi::{Raw, Subscription};
use news::{News, Reader};
use process::Process;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};
use virt::connect::Connect;
use virt::domain::Domain;
use virt::error::Error;
use virt_sys as sys;

/// URI of the system's QEMU driver.
pub const SYSTEM_URI: &str = "qemu:///system";

/// A lost daemon is looked for this often.
const RECONNECT: Duration = Duration::from_millis(500);
/// A VM that is asked to power off is looked at this often.
const SHUTDOWN_LOOK: Duration = Duration::from_millis(100);
/// It is asked again this often: a guest that is still booting loses the first request.
const SHUTDOWN_ASK: Duration = Duration::from_secs(10);
/// libvirtd is asked for a sign of life each so many seconds, and taken for lost after three without.
const KEEPALIVE_SECONDS: i32 = 5;

/// The inactive definition, with secrets, in the form that other hosts of the same version or newer accept.
const DEFINITION: u32 = sys::VIR_DOMAIN_XML_INACTIVE | sys::VIR_DOMAIN_XML_SECURE | sys::VIR_DOMAIN_XML_MIGRATABLE;

/// One VM, through libvirt.
pub struct Libvirt {
    shared: Arc<Shared>,
}

struct Shared {
    uri: String,
    name: String,
    /// Guards the connection itself, never a call over it: a call that hangs does not keep others from being made.
    link: Mutex<Option<Link>>,
    links: AtomicU64,
    raw: Sender<Raw>,
    /// Who is told; none before `events`.
    told: Mutex<Option<Sender<VmEvent>>>,
    /// This driver killed the VM's process: its end, still to be told, is not a crash.
    killed: AtomicBool,
    /// The process that was killed last: once it is dying it cannot be found by its command line any more.
    dying: Mutex<Option<Process>>,
}

struct Link {
    number: u64,
    connect: Connect,
    _subscription: Subscription,
}

/// A panic in another thread leaves these values whole: each is replaced in one step.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Libvirt {
    /// A driver for the VM of this name, which need not be defined. A libvirtd that does not answer yet is no error: calls
    /// give `NoContact` until it does.
    ///
    /// # Errors
    /// Where libvirt's library cannot be used at all.
    pub fn connect(uri: &str, name: &str) -> VmResult<Self> {
        ffi::run_event_loop().map_err(|e| VmError::NoContact { why: e.message().to_owned() })?;
        let (raw, news) = channel();
        let shared = Arc::new(Shared {
            uri: uri.to_owned(),
            name: name.to_owned(),
            link: Mutex::new(None),
            links: AtomicU64::new(0),
            raw,
            told: Mutex::new(None),
            killed: AtomicBool::new(false),
            dying: Mutex::new(None),
        });
        let mut reader = Reader::default();
        let up = shared.open(&mut reader);
        let weak = Arc::downgrade(&shared);
        let thread = std::thread::Builder::new().name(format!("vm-{name}"));
        thread
            .spawn(move || watch(&weak, &news, reader, up))
            .map_err(|e| VmError::NoContact { why: format!("no thread: {e}") })?;
        Ok(Self { shared })
    }

    fn on<T>(&self, call: &'static str, act: impl FnOnce(&Domain) -> Result<T, Error>) -> VmResult<T> {
        self.shared.on(call, act)
    }
}

/// Reads events and keeps the connection, until the driver is dropped.
fn watch(shared: &Weak<Shared>, news: &Receiver<Raw>, mut reader: Reader, mut up: bool) {
    loop {
        let raw = news.recv_timeout(RECONNECT);
        let Some(shared) = shared.upgrade() else { return };
        match raw {
            Err(RecvTimeoutError::Disconnected) => return,
            Err(RecvTimeoutError::Timeout) => {}
            Ok(Raw::Closed { link }) => shared.lost(link),
            Ok(raw) => match reader.read(raw, shared.killed.load(Ordering::Acquire)) {
                Some(News::Event(event)) => shared.news(event),
                // Undefined again meanwhile, or contact lost: then there is nothing to tell.
                Some(News::Definition) => {
                    if let Ok(xml) = shared.on("definition", |d| d.xml_desc(DEFINITION)) {
                        shared.tell(VmEvent::Defined { xml });
                    }
                }
                None => {}
            },
        }
        let linked = lock(&shared.link).is_some();
        if up && !linked {
            up = false;
            shared.tell(VmEvent::Connection { up });
        }
        if !linked && shared.open(&mut reader) {
            up = true;
        }
    }
}

impl Shared {
    fn tell(&self, event: VmEvent) {
        if let Some(told) = &*lock(&self.told) {
            // A receiver that is gone wants no events.
            let _ = told.send(event);
        }
    }

    /// News of the VM itself. A kill explains one end, not the next.
    fn news(&self, event: VmEvent) {
        if matches!(event, VmEvent::Ended(_)) {
            self.killed.store(false, Ordering::Release);
        }
        self.tell(event);
    }

    /// Opens a connection, registers for events, and tells what changed meanwhile.
    fn open(&self, reader: &mut Reader) -> bool {
        let number = self.links.fetch_add(1, Ordering::Relaxed);
        let opened = Connect::open(Some(&self.uri)).and_then(|connect| {
            // Drivers inside this process (`test:`) have nothing to keep alive.
            let _ = connect.set_keep_alive(KEEPALIVE_SECONDS, 3);
            let subscription = ffi::subscribe(&connect, &self.name, number, &self.raw)?;
            Ok(Link { number, connect, _subscription: subscription })
        });
        let Ok(link) = opened else { return false };
        *lock(&self.link) = Some(link);
        self.tell(VmEvent::Connection { up: true });
        if let Ok((state, reason)) = self.found() {
            if let Some(event) = reader.found(state, reason, self.killed.load(Ordering::Acquire)) {
                self.news(event);
            }
        }
        true
    }

    /// The connection with this number is gone. It is dropped outside the lock: dropping it calls libvirt.
    fn lost(&self, number: u64) {
        let mut link = lock(&self.link);
        let gone = if link.as_ref().is_some_and(|l| l.number == number) { link.take() } else { None };
        drop(link);
        drop(gone);
    }

    fn connection(&self) -> VmResult<(u64, Connect)> {
        let link = lock(&self.link);
        let link = link.as_ref().ok_or_else(|| VmError::NoContact { why: format!("{} does not answer", self.uri) })?;
        Ok((link.number, link.connect.clone()))
    }

    /// One call on the connection; its error worded, and a dead connection noticed.
    fn with<T>(&self, call: &'static str, act: impl FnOnce(&Connect) -> Result<T, Error>) -> VmResult<T> {
        let (number, connect) = self.connection()?;
        act(&connect).map_err(|error| {
            let why = error.message().to_owned();
            if !connect.is_alive().unwrap_or(false) {
                self.lost(number);
                VmError::NoContact { why }
            } else if error.code().to_raw() == sys::VIR_ERR_NO_DOMAIN {
                VmError::Undefined { name: self.name.clone() }
            } else {
                VmError::Refused { call, name: self.name.clone(), why }
            }
        })
    }

    /// One call on the VM.
    fn on<T>(&self, call: &'static str, act: impl FnOnce(&Domain) -> Result<T, Error>) -> VmResult<T> {
        self.with(call, |connect| act(&connect.lookup_domain_by_name(&self.name)?))
    }

    /// State, and libvirt's number for its reason.
    fn found(&self) -> VmResult<(VmState, u32)> {
        match self.on("state", ffi::state) {
            Err(VmError::Undefined { .. }) => Ok((VmState::Undefined, 0)),
            Err(error) => Err(error),
            Ok((state, reason)) => Ok((
                match state {
                    sys::VIR_DOMAIN_SHUTOFF => VmState::Off,
                    sys::VIR_DOMAIN_PAUSED | sys::VIR_DOMAIN_PMSUSPENDED | sys::VIR_DOMAIN_CRASHED => VmState::Paused,
                    // SHUTDOWN is "on its way down": it still has a process.
                    _ => VmState::Running,
                },
                reason,
            )),
        }
    }
}

impl Hypervisor for Libvirt {
    fn define(&self, xml: &str) -> VmResult<()> {
        self.shared.with("define", |connect| connect.define_domain_xml(xml).map(drop))
    }

    fn definition(&self) -> VmResult<String> {
        self.on("definition", |domain| domain.xml_desc(DEFINITION))
    }

    fn start(&self) -> VmResult<()> {
        self.shared.killed.store(false, Ordering::Release);
        self.on("start", |domain| domain.create_with_flags(sys::VIR_DOMAIN_START_FORCE_BOOT))
    }

    fn shutdown(&self, limit: Duration) -> VmResult<bool> {
        let began = Instant::now();
        let mut asked: Option<Instant> = None;
        loop {
            if matches!(self.state()?, VmState::Off | VmState::Undefined) {
                return Ok(true);
            }
            if began.elapsed() >= limit {
                return self.destroy().map(|()| false);
            }
            if asked.is_none_or(|at| at.elapsed() >= SHUTDOWN_ASK) {
                asked = Some(Instant::now());
                // It may end between the look and the request; and a guest that cannot be asked is destroyed in the end.
                if let Err(error @ VmError::NoContact { .. }) = self.on("shutdown", Domain::shutdown) {
                    return Err(error);
                }
            }
            std::thread::sleep(SHUTDOWN_LOOK.min(limit.saturating_sub(began.elapsed())));
        }
    }

    fn kill(&self) -> VmResult<bool> {
        let Some(process) = Process::find(&self.shared.name) else { return Ok(false) };
        self.shared.killed.store(true, Ordering::Release);
        process.kill();
        *lock(&self.shared.dying) = Some(process);
        Ok(true)
    }

    fn destroy(&self) -> VmResult<()> {
        self.kill()?;
        let dying = lock(&self.shared.dying).take();
        if let Some(process) = &dying {
            process.wait();
        }
        // libvirtd notices the death by itself; this call returns when it has, and ends what had no process to be found.
        match self.on("destroy", Domain::destroy) {
            Ok(()) | Err(VmError::Undefined { .. }) => Ok(()),
            Err(VmError::NoContact { .. }) if dying.is_some() => Ok(()),
            Err(error) => match self.state() {
                Ok(VmState::Off | VmState::Undefined) => Ok(()),
                _ => Err(error),
            },
        }
    }

    fn pause(&self) -> VmResult<()> {
        self.on("pause", Domain::suspend).map(drop)
    }

    fn resume(&self) -> VmResult<()> {
        self.on("resume", Domain::resume).map(drop)
    }

    fn state(&self) -> VmResult<VmState> {
        self.shared.found().map(|(state, _)| state)
    }

    fn process(&self) -> VmResult<Option<u32>> {
        Ok(Process::find(&self.shared.name).map(|process| process.pid))
    }

    fn events(&self) -> VmResult<Receiver<VmEvent>> {
        let (told, events) = channel();
        *lock(&self.shared.told) = Some(told);
        Ok(events)
    }
}
