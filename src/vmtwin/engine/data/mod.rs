//! The data thread of a module: the mount, the local disk and the peer link on one ring, driven by the replica core.
//!
//! Decides nothing about data: it turns what the kernel and the peer say into events of `core::replica`, and its effects
//! into requests of the ring. Holds: payload, by the core's job; requests that wait for their answer. Keeps out: the
//! register, the VM.
//!
//! ```text
//!  orders ─┐                                   ┌─> guest  (answers)
//!  mount  ─┼─> events ─> core::replica ─> effects ─> local  (jobs of the disk)
//!  link   ─┤                                   ├─> peer   (frames)
//!  ring   ─┘                                   └─> saves  (state, log, map)
//! ```
//! Invariant: nothing sleeps in here but `Ring::wait`, and the lease is looked at after each time that it did.
mod control;
mod guest;
mod local;
mod names;
mod peer;
mod saves;
mod start;
#[cfg(test)]
mod tests;

use super::messages::{Figures, FromData, Lease, ToData};
use crate::link::peer::Peer;
use crate::store::Store;
use crate::store::mounts::Backing;
use crate::store::replica::State;
use rustix::time::{ClockId, clock_gettime};
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::path::PathBuf;
use std::sync::{Arc, mpsc};
use std::time::Duration;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use vmtwin_core::ids::{BootId, ModuleId, ModuleName, NodeName};
use vmtwin_core::limits::REQUESTS_MAX;
use vmtwin_core::replica::effect::Effect;
use vmtwin_core::replica::event::{Event, Job};
use vmtwin_core::replica::{Replica, Role};
use vmtwin_core::time::{Time, millis};
use vmtwin_frontend::fuse::Fuse;
use vmtwin_ring::{Completion, Descriptor, Pool, Ring, Shared, Waker};

/// The core is told that time went on this often.
const TICK: Duration = millis(50);
/// Slots for the peer's data and the resync, beside the guest's.
const SLOTS: usize = 2 * REQUESTS_MAX + 128;
/// The guest gets no slot when only this many are left: what the peer sent has to go on.
const SLOTS_KEPT: usize = REQUESTS_MAX;
/// Names the mount's poll; all others are in `pending`.
const MOUNT_TOKEN: u64 = 0;
/// A gap of this length means that this process did not run: what was not heard meanwhile proves nothing.
const GAP: Duration = millis(400);

/// What a data thread is given.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The module.
    pub module: ModuleName,
    /// Its identity.
    pub id: ModuleId,
    /// This node.
    pub node: NodeName,
    /// The VM's directory, mounted over.
    pub directory: PathBuf,
    /// Where the metadata lies.
    pub metadata: PathBuf,
    /// Where the plain directory is bound.
    pub backing: PathBuf,
    /// This boot of the host.
    pub boot: BootId,
    /// Version of the configuration, told to the peer.
    pub configuration: u64,
    /// A peer that holds up a write this long is dropped, in milliseconds.
    pub slow_peer_ms: u64,
    /// SELinux context of the mount, where the host enforces it.
    pub selinux_context: Option<String>,
}

/// The way to a data thread. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Orders {
    sender: mpsc::Sender<ToData>,
    waker: Waker,
}

impl Orders {
    /// Gives an order. False: the thread has ended.
    pub fn send(&self, order: ToData) -> bool {
        let sent = self.sender.send(order).is_ok();
        self.waker.wake();
        sent
    }
}

/// A running data thread.
#[derive(Debug)]
pub struct DataThread {
    /// Orders to it.
    pub orders: Orders,
    /// News from it: `Ready` or `Failed` comes first, `Ended` or `Failed` last.
    pub news: UnboundedReceiver<FromData>,
    thread: std::thread::JoinHandle<()>,
}

impl DataThread {
    /// Starts it. Everything that can go wrong after that is told by `FromData::Failed`.
    ///
    /// # Errors
    /// No thread or no ring, in words.
    pub fn spawn(settings: Settings, lease: Arc<Lease>) -> Result<Self, String> {
        let (sender, orders) = mpsc::channel();
        let (news_sender, news) = unbounded_channel();
        let (tell, told) = mpsc::sync_channel(1);
        let thread = std::thread::Builder::new()
            .name(format!("data-{}", settings.module))
            .spawn(move || start::run(settings, lease, orders, news_sender, &tell))
            .map_err(|e| format!("cannot start the data thread: {e}"))?;
        let waker = told.recv().map_err(|_| "the data thread ended at its start".to_owned())??;
        Ok(Self { orders: Orders { sender, waker }, news, thread })
    }

    /// Waits until it has ended.
    pub fn join(self) {
        let _ = self.thread.join();
    }
}

/// Data that belongs to a job of the core.
#[derive(Clone)]
enum Payload {
    /// The first bytes of a slot.
    Slot(Shared),
    /// Bytes on the heap: a namespace operation.
    Bytes(Vec<u8>),
}

/// What a request of the ring is for.
#[derive(Debug)]
enum Pending {
    Receive(u64),
    Send(u64),
    Local(local::Step),
    Guest(guest::Step),
    Log(u64),
}

/// All that the thread owns.
struct Data {
    settings: Settings,
    orders: mpsc::Receiver<ToData>,
    news: UnboundedSender<FromData>,
    ring: Ring,
    pool: Pool,
    fuse: Option<Fuse>,
    store: Store,
    state: State,
    core: Replica,
    events: VecDeque<Event>,
    effects: Vec<Effect>,
    pending: HashMap<u64, Pending>,
    next_token: u64,
    payloads: HashMap<Job, Payload>,
    guest: guest::Guest,
    local: local::Local,
    links: BTreeMap<u64, Peer>,
    link: peer::LinkState,
    saves: saves::Saves,
    log_file: Descriptor,
    control: control::Control,
    figures: Figures,
    now: Time,
    lease: Arc<Lease>,
    lease_open: bool,
    over: bool,
    _backing: Backing,
}

/// CLOCK_BOOTTIME: goes on in a suspend, as leases do.
pub fn clock() -> Time {
    let now = clock_gettime(ClockId::Boottime);
    let seconds = u64::try_from(now.tv_sec).expect("the host has booted");
    Time(seconds * 1_000_000_000 + u64::try_from(now.tv_nsec).expect("nanoseconds are not negative"))
}

impl Data {
    fn run(&mut self) {
        let mut done = Vec::new();
        let (mut tick, mut second) = (self.now, self.now);
        while !self.over {
            let now = clock();
            if now.since(self.now) > GAP {
                self.links.values_mut().for_each(|link| link.forgive(now));
            }
            self.now = now;
            self.look_at_lease();
            self.take_saved();
            self.take_orders();
            for completion in done.drain(..) {
                self.completed(completion);
            }
            self.serve_mount();
            self.look_at_links();
            if now >= tick {
                self.events.push_back(Event::Tick);
                tick = now + TICK;
            }
            self.step();
            self.serve_held();
            self.feed_starved();
            self.step();
            self.use_links();
            self.look_at_end();
            if now >= second {
                self.tell_figures();
                self.pool.trim();
                second = now + Duration::from_secs(1);
            }
            if self.over {
                break;
            }
            if let Some(fuse) = &mut self.fuse {
                fuse.arm(&mut self.ring, MOUNT_TOKEN);
            }
            let until = if self.lease_open { tick.min(self.lease.until()) } else { tick };
            if let Err(e) = self.ring.wait(Some(until.0), &mut done) {
                self.fail(format!("io_uring does not work any more: {e}"));
            }
        }
    }

    /// Lets the core take in what happened and does what it orders, until both are quiet.
    fn step(&mut self) {
        while let Some(event) = self.events.pop_front() {
            let mut effects = std::mem::take(&mut self.effects);
            self.core.step(self.now, event, &mut effects);
            for effect in effects.drain(..) {
                self.carry_out(effect);
            }
            self.effects = effects;
        }
    }

    fn carry_out(&mut self, effect: Effect) {
        match effect {
            Effect::Local { job, work } => self.begin(job, work),
            Effect::Send { header, payload } => self.send_frame(header, payload),
            Effect::SendHello(hello) => self.send_hello(&hello),
            Effect::Complete { op, result } => self.complete(op, result),
            Effect::Release { job } => drop(self.payloads.remove(&job)),
            Effect::SaveLog { transaction, offset, bytes } => self.save_log(transaction, offset, bytes),
            Effect::SaveMap { version, bytes } => self.save_map(version, bytes),
            Effect::SaveMarks(marks) => self.save_marks(marks),
            Effect::EndLink(reason) => self.end_link(reason),
            Effect::SessionUp(hello) => self.session_up(hello),
            Effect::SessionDown(reason) => self.session_down(reason),
            Effect::Propose(change) => self.propose(change),
            Effect::OtherRecord(record) => self.tell(FromData::OtherRecord(record)),
            Effect::Adopted(record) => self.adopted(record),
            Effect::Drained(token) => self.drained(token),
            Effect::Quiesced { token, both } => self.tell(FromData::Quiesced { token, both }),
            Effect::Erred(errno) => self.tell(FromData::Erred(local::describe(errno))),
            Effect::Stuck(errno) => self.stuck(errno),
            Effect::Progress(progress) => self.progress(progress),
            Effect::VerifyProgress(progress) => self.verify_progress(progress),
            Effect::VerifyRefused(why) => self.tell(FromData::VerifyRefused(why)),
            Effect::Verified(end) => self.verified(end),
            Effect::Say(line) => self.tell(FromData::Say(line)),
        }
    }

    fn completed(&mut self, done: Completion) {
        if done.token == MOUNT_TOKEN {
            return if let Some(fuse) = &mut self.fuse {
                fuse.polled()
            };
        }
        let pending = self.pending.remove(&done.token).expect("every request of the ring has its purpose noted");
        match pending {
            Pending::Receive(link) => self.received(link, done),
            Pending::Send(link) => self.sent(link, done),
            Pending::Local(step) => self.local_done(step, done),
            Pending::Guest(step) => self.guest_done(step, done),
            Pending::Log(transaction) => self.log_saved(transaction, &done),
        }
    }

    /// A token for the next request of the ring.
    fn token(&mut self, purpose: Pending) -> u64 {
        let token = self.next_token;
        self.next_token += 1;
        self.pending.insert(token, purpose);
        token
    }

    /// The gate's clock: looked at before anything else that a wake-up brought.
    fn look_at_lease(&mut self) {
        let open = self.now < self.lease.until();
        if open != self.lease_open {
            self.lease_open = open;
            self.events.push_back(Event::Lease(open));
            // The core knows before a completed read asks it whether it may be answered.
            self.step();
            if self.core.role() == Role::Holder {
                self.tell(FromData::Held(!open));
            }
        }
    }

    /// After a call that may have taken long: the lease may be over before anything that waits is answered.
    fn look_at_lease_again(&mut self) {
        if self.lease_open && clock() >= self.lease.until() {
            self.lease_open = false;
            self.events.push_front(Event::Lease(false));
            if self.core.role() == Role::Holder {
                self.tell(FromData::Held(true));
            }
        }
    }

    fn tell(&self, news: FromData) {
        // Who does not listen any more is about to end this thread, or gone.
        let _ = self.news.send(news);
    }

    /// Something that this thread cannot go on without is gone.
    fn fail(&mut self, why: String) {
        if !self.over {
            self.over = true;
            self.tell(FromData::Failed(why));
        }
    }

    fn tell_figures(&mut self) {
        if self.fuse.is_some() {
            let in_hand = self.core.in_hand() + self.guest.in_hand();
            let dirty_bytes = self.core.dirty_bytes();
            self.tell(FromData::Figures(Figures { in_hand: in_hand as u64, dirty_bytes, ..self.figures }));
        }
    }
}

/// An error with its causes, in one line.
fn sentence(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut at = error.source();
    while let Some(cause) = at {
        text.push_str(&format!(": {cause}"));
        at = cause.source();
    }
    text
}
