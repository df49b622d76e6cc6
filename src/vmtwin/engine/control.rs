//! The control loop of one module process: it owns the arbiter and the module machine and carries what they say to the data
//! thread, the voters, the VM thread, the event log and the control socket.
//!
//! Holds: the two machines, the ends of all ways, callers that wait. Keeps out: decisions (they are the machines'), I/O of
//! the guest (the data thread's). `route` is the one table of who hears what.
//! Invariant: the lease that the data thread reads moves only with a lease of the arbiter, and the arbiter is asked for one
//! only by this loop itself (R1): where it hangs, the lease runs out.
use super::clock::{Alarm, now, wall_ms};
use super::messages::{Change as DataChange, FromData, Lease, Opened, PeerSocket, ToData, Word};
use super::socket::{Answer, Request};
use super::status::Watched;
use super::vm::VmThread;
use crate::acceptors::{Acceptors, News as VoterNews};
use crate::eventlog::{self, EventLog, Level};
use crate::host;
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::sync::{oneshot, watch};
use vmtwin_core::arbiter::{self, Arbiter, Request as VoterRequest, Setup};
use vmtwin_core::ids::{AcceptorId, RecordId, ReplicaId};
use vmtwin_core::limits::RENEW_MS;
use vmtwin_core::module::{self, Ask, Command, DataOrder, Effect, Event, Machine, Mark, Refusal, Settings, VmNews};
use vmtwin_core::record::Record;
use vmtwin_core::time::{Time, millis};

/// The arbiter is asked for the lease this often.
const ASK_LEASE: Duration = millis(RENEW_MS / 2);
/// The loop waits at least this long where no news came: all that brings news runs on the same thread, and something that
/// stays due must not keep it from that.
const WAIT_MIN: Duration = Duration::from_millis(1);
/// Answers and releases that are on their way get this long at the end.
const LAST_WORDS: Duration = Duration::from_millis(200);

/// All that reaches the loop.
#[derive(Debug)]
pub enum News {
    /// From the data thread.
    Data(FromData),
    /// From the voters.
    Voters(VoterNews),
    /// From the VM thread.
    Vm(VmNews),
    /// A connection to the peer, hands shaken.
    Link(PeerSocket),
    /// From the control socket.
    Request(Request, oneshot::Sender<Answer>),
    /// SIGTERM.
    Terminate,
}

/// The way to the data thread.
pub trait DataPort {
    /// Takes an order.
    fn order(&self, order: ToData);
}

/// The way to the voters.
pub trait VoterPort {
    /// Sends a question. False: not connected; the arbiter asks again.
    fn ask(&self, to: AcceptorId, nonce: u64, request: VoterRequest) -> bool;
    /// Ids of those that are connected, this node's own first.
    fn ids(&self) -> Vec<Option<AcceptorId>>;
}

impl VoterPort for Acceptors {
    fn ask(&self, to: AcceptorId, nonce: u64, request: VoterRequest) -> bool {
        Acceptors::ask(self, to, nonce, request)
    }
    fn ids(&self) -> Vec<Option<AcceptorId>> {
        Acceptors::ids(self)
    }
}

/// Opens the directory and starts the data thread; its news come through the channel.
pub type OpenData = Box<dyn FnMut() -> Result<Box<dyn DataPort>, String>>;

/// What the loop is built from.
pub struct Parts {
    /// For the module machine.
    pub settings: Settings,
    /// `tls` or `clear`.
    pub link_protection: &'static str,
    /// Read by the data thread.
    pub lease: Arc<Lease>,
    /// Opens the directory.
    pub open_data: OpenData,
    /// The voters.
    pub voters: Box<dyn VoterPort>,
    /// The VM.
    pub vm: VmThread,
    /// The event log.
    pub log: EventLog,
    /// True while a connection to the peer is missing.
    pub link_wanted: watch::Sender<bool>,
}

enum Routed {
    Machine(Effect),
    Arbiter(arbiter::Effect),
}

/// See the head of this file.
pub struct Control {
    machine: Machine,
    arbiter: Option<Arbiter>,
    /// What `Ready` said, until the arbiter can be made.
    opened: Option<Opened>,
    parts: Parts,
    data: Option<Box<dyn DataPort>>,
    queue: VecDeque<Routed>,
    /// The proposal by which this node would become the holder.
    takeover: Option<RecordId>,
    broken_told: bool,
    peer: Option<ReplicaId>,
    asked_lease: Time,
    callers: BTreeMap<u64, oneshot::Sender<Answer>>,
    next_caller: u64,
    /// Who ordered a verification, until it has begun.
    verify_caller: Option<oneshot::Sender<Answer>>,
    voter_trouble: BTreeMap<usize, String>,
    watched: Watched,
    exit: Option<u8>,
}

impl Control {
    /// Ready to run.
    #[must_use]
    pub fn new(parts: Parts) -> Self {
        Self {
            machine: Machine::new(parts.settings.clone()),
            arbiter: None,
            opened: None,
            parts,
            data: None,
            queue: VecDeque::new(),
            takeover: None,
            broken_told: false,
            peer: None,
            asked_lease: Time(0),
            callers: BTreeMap::new(),
            next_caller: 0,
            verify_caller: None,
            voter_trouble: BTreeMap::new(),
            watched: Watched::default(),
            exit: None,
        }
    }

    /// Runs until the module machine says `Exit`; gives its code.
    ///
    /// # Errors
    /// No timer.
    pub async fn run(mut self, mut news: UnboundedReceiver<News>) -> std::io::Result<u8> {
        let mut alarm = Alarm::new()?;
        self.tell(now(), Event::Begin);
        self.route(now());
        while self.exit.is_none() {
            let asleep = now();
            let wake = self.wake(asleep).max(asleep + WAIT_MIN);
            let arrived = tokio::select! {
                biased;
                arrived = news.recv() => arrived,
                () = alarm.until(wake) => None,
            };
            // The clock is read after every wait: the host may have been suspended in it.
            let now = now();
            if let Some(arrived) = arrived {
                self.hear(now, arrived);
            }
            self.tick(now);
            self.route(now);
            self.log_changes(now);
        }
        tokio::time::sleep(LAST_WORDS).await;
        Ok(self.exit.unwrap_or(1))
    }

    fn wake(&self, now: Time) -> Time {
        let arbiter = self.arbiter.as_ref().map(|a| a.wake(now).min(self.asked_lease + ASK_LEASE));
        let idle = now + Duration::from_secs(60);
        [arbiter, self.machine.deadline()].into_iter().flatten().fold(idle, Time::min)
    }

    fn tick(&mut self, now: Time) {
        if self.machine.deadline().is_some_and(|at| at <= now) {
            self.tell(now, Event::Tick);
        }
        if self.arbiter.is_some() {
            if self.asked_lease + ASK_LEASE <= now {
                self.asked_lease = now;
                self.ask_arbiter(now, arbiter::Event::Asked);
            } else {
                self.ask_arbiter(now, arbiter::Event::Tick);
            }
        }
    }

    fn tell(&mut self, now: Time, event: Event) {
        let mut effects = Vec::new();
        self.machine.step(now, event, &mut effects);
        self.queue.extend(effects.into_iter().map(Routed::Machine));
        if self.machine.is_broken() != self.broken_told {
            self.broken_told = self.machine.is_broken();
            self.ask_arbiter(now, arbiter::Event::Broken(self.broken_told));
        }
    }

    fn ask_arbiter(&mut self, now: Time, event: arbiter::Event) {
        let Some(arbiter) = &mut self.arbiter else { return };
        let mut effects = Vec::new();
        arbiter.step(now, event, &mut effects);
        self.queue.extend(effects.into_iter().map(Routed::Arbiter));
    }

    fn order(&mut self, now: Time, order: ToData) {
        match (&self.data, order) {
            (Some(data), order) => data.order(order),
            // Ended before it was opened.
            (None, ToData::End) => self.tell(now, Event::Ended(Ok(()))),
            (None, _) => {}
        }
    }

    // News in.

    fn hear(&mut self, now: Time, news: News) {
        match news {
            News::Data(news) => self.hear_data(now, news),
            News::Voters(news) => self.hear_voters(now, news),
            News::Vm(news) => self.tell(now, Event::Vm(news)),
            News::Link(socket) => self.order(now, ToData::Link(socket)),
            News::Request(request, caller) => self.hear_request(now, request, caller),
            News::Terminate => self.tell(now, Event::Terminate),
        }
    }

    fn hear_data(&mut self, now: Time, news: FromData) {
        match news {
            FromData::Ready(opened) => {
                let (replica, broken, erred) = (opened.replica, opened.broken, opened.erred);
                self.opened = Some(opened);
                self.broken_told = broken;
                self.make_arbiter(now);
                self.tell(now, Event::Ready { replica, broken, erred });
                self.parts.link_wanted.send_replace(true);
            }
            FromData::Failed(why) => self.tell(now, Event::Failed(why)),
            FromData::PeerUp(peer) => {
                self.peer = Some(peer.replica);
                self.parts.link_wanted.send_replace(false);
                let known = module::Peer { replica: peer.replica, broken: peer.broken, erred: peer.erred };
                self.tell(now, Event::PeerUp(known));
                self.told_by_holder(now, peer.record);
            }
            FromData::PeerDown(why) => {
                self.parts.link_wanted.send_replace(true);
                self.watched.resync(now, None);
                self.tell(now, Event::PeerDown(why));
            }
            FromData::OtherRecord(record) | FromData::Adopted(record) => self.told_by_holder(now, Some(record)),
            FromData::InForce(id) => self.tell(now, Event::InForce(id)),
            FromData::Say(line) => self.note(Level::Info, "replica", &line),
            FromData::Told(word) => self.tell(
                now,
                Event::Told(match word {
                    Word::Stop => module::Word::Stop,
                    Word::StopUndone => module::Word::StopUndone,
                    Word::Crashes => module::Word::Crashes,
                }),
            ),
            FromData::Propose(change) => self.tell(
                now,
                Event::Propose(match change {
                    DataChange::DropPeer => module::Change::DropPeer,
                    DataChange::JoinPeer(replica) => module::Change::JoinPeer(replica),
                }),
            ),
            FromData::Resync(progress) => {
                self.watched.resync(now, Some(progress));
                let progress = module::Progress { total: progress.bytes_total, done: progress.bytes_done };
                self.tell(now, Event::Resync(Some(progress)));
            }
            FromData::VerifyRefused(why) => {
                if let Some(caller) = self.verify_caller.take() {
                    let _ = caller.send(Answer::refused(3, why));
                }
            }
            FromData::Verify(progress) => match self.verify_caller.take() {
                Some(caller) => {
                    let begun_ms = wall_ms();
                    self.watched.verify.begin(now, begun_ms);
                    let _ = caller.send(Answer { begun_ms: Some(begun_ms), ..Answer::done() });
                }
                None => self.watched.verify.progress(now, progress),
            },
            FromData::Verified(end) => {
                if let Some((wakes, text)) = self.watched.verify.end(&end, eventlog::now()) {
                    self.note(if wakes { Level::Warn } else { Level::Info }, "verified", &text);
                }
            }
            FromData::Erred(why) => self.tell(now, Event::Erred(why)),
            FromData::Drained(token) => self.tell(now, Event::Drained(token)),
            FromData::Quiesced { token, both } => self.tell(now, Event::Quiesced { token, both }),
            FromData::Held(held) => {
                let text = if held { "the VM's I/O is held" } else { "the VM's I/O goes on" };
                self.note(Level::Info, "io", text);
            }
            FromData::Ended(result) => self.tell(now, Event::Ended(result)),
            FromData::Figures(figures) => self.watched.figures = figures,
        }
    }

    /// A holder's own word about its own record is knowledge; anybody else's is none.
    fn told_by_holder(&mut self, now: Time, record: Option<Record>) {
        if let Some(record) = record.filter(|record| Some(record.holder) == self.peer) {
            self.ask_arbiter(now, arbiter::Event::Told(record));
        }
    }

    fn hear_voters(&mut self, now: Time, news: VoterNews) {
        match news {
            VoterNews::Up { place, id } => {
                let trouble = id.is_none().then(|| "it has no vote of this module".to_owned());
                self.voter_is(place, trouble);
                self.make_arbiter(now);
                self.tell_reached(now);
            }
            VoterNews::Down { place, why } => {
                self.voter_is(place, Some(why));
                self.tell_reached(now);
            }
            VoterNews::Answer { place, nonce, answer } => {
                let from = self.parts.voters.ids().get(place).copied().flatten();
                if let Some(from) = from {
                    self.ask_arbiter(now, arbiter::Event::Answered { from, nonce, answer });
                }
            }
            VoterNews::Refused { place, why, .. } => self.voter_is(place, Some(why)),
        }
    }

    fn voter_is(&mut self, place: usize, trouble: Option<String>) {
        let who = ["this node's keep", "the other node's keep", "the witness"].get(place).unwrap_or(&"a voter");
        match trouble {
            Some(why) if self.voter_trouble.get(&place) != Some(&why) => {
                self.note(Level::Warn, "voter-down", &format!("no answer of {who}: {why}"));
                self.voter_trouble.insert(place, why);
            }
            None if self.voter_trouble.remove(&place).is_some() => {
                self.note(Level::Info, "voter-up", &format!("{who} answers"));
            }
            Some(_) | None => {}
        }
    }

    fn tell_reached(&mut self, now: Time) {
        let ids = self.parts.voters.ids();
        let (answering, voters) = (ids.iter().flatten().count(), ids.len());
        self.tell(now, Event::Reached { answering, voters });
    }

    /// As soon as the replica is open and the voters can be named: by the stored record, else a majority of them itself.
    fn make_arbiter(&mut self, now: Time) {
        let ids = self.parts.voters.ids();
        let (None, Some(opened), Some(Some(own))) = (&self.arbiter, &self.opened, ids.first()) else { return };
        let reached: Vec<AcceptorId> = ids.iter().copied().flatten().collect();
        let acceptors = match &opened.record {
            Some(record) => record.voters.clone(),
            None if reached.len() > ids.len() / 2 => reached,
            None => return,
        };
        let setup = Setup {
            me: opened.replica,
            own: *own,
            acceptors,
            record: opened.record.clone(),
            broken: opened.broken,
            first_nonce: u64::try_from(host::random() >> 65).expect("63 bits fit"),
        };
        self.arbiter = Some(Arbiter::new(setup, now));
    }

    fn hear_request(&mut self, now: Time, request: Request, caller: oneshot::Sender<Answer>) {
        let command = match request {
            Request::Status | Request::Follow => {
                // A caller that hung up needs no answer; so below.
                let _ = caller.send(Answer::status(self.status(now)));
                return;
            }
            Request::MayStart => {
                let answer =
                    self.machine.may_start(now).map_or_else(|why| Answer::refused(3, why), |()| Answer::done());
                let _ = caller.send(answer);
                return;
            }
            Request::Verify { rate, repair } => return self.begin_verify(now, rate, repair, caller),
            Request::Start => Command::Start,
            Request::Stop { both } => Command::Stop { both },
            Request::Swap => Command::Swap,
            Request::Restart => Command::Restart,
            Request::Prim => Command::Prim,
            Request::Second => Command::Second,
        };
        self.note(Level::Info, "command", &format!("{command:?}"));
        self.next_caller += 1;
        self.callers.insert(self.next_caller, caller);
        self.tell(now, Event::Command(self.next_caller, command));
    }

    /// Whether it can be the data thread knows; only what needs no look at the data is refused here.
    fn begin_verify(&mut self, now: Time, rate: u64, repair: bool, caller: oneshot::Sender<Answer>) {
        let module = self.parts.settings.module.clone();
        let state = self.machine.view(now).state;
        let refused = if self.verify_caller.is_some() || self.watched.verify.running().is_some() {
            format!("a verification of {module} is under way: `vmtwin status {module} --watch` follows it")
        } else if state != module::State::Prim {
            let state = format!("{state:?}").to_uppercase();
            format!("{module} is {state} here: replicas are compared while the VM runs with its peer in sync (PRIM)")
        } else {
            self.note(Level::Info, "command", &format!("verify, repair: {repair}"));
            self.verify_caller = Some(caller);
            return self.order(now, ToData::Verify { rate, repair });
        };
        let _ = caller.send(Answer::refused(3, refused));
    }

    // Effects out.

    fn route(&mut self, now: Time) {
        while let Some(routed) = self.queue.pop_front() {
            match routed {
                Routed::Machine(effect) => self.route_machine(now, effect),
                Routed::Arbiter(effect) => self.route_arbiter(now, effect),
            }
        }
    }

    fn route_machine(&mut self, now: Time, effect: Effect) {
        match effect {
            Effect::Data(order) => self.route_data(now, order),
            Effect::Arbiter(ask) => self.route_ask(now, ask),
            Effect::Vm(order) => self.parts.vm.order(order),
            Effect::Note(level, event, text) => {
                let level = match level {
                    module::Level::Info => Level::Info,
                    module::Level::Warn => Level::Warn,
                    module::Level::Error => Level::Error,
                };
                self.note(level, event, &text);
            }
            Effect::Mark(mark) => self.mark(mark),
            Effect::Answer(caller, result) => {
                if let Some(caller) = self.callers.remove(&caller) {
                    let refused = |Refusal { code, error }| Answer::refused(code, error);
                    let _ = caller.send(result.map_or_else(refused, |()| Answer::done()));
                }
            }
            Effect::Exit(code) => self.exit = Some(code),
        }
    }

    fn route_data(&mut self, now: Time, order: DataOrder) {
        let order = match order {
            DataOrder::Open => {
                match (self.parts.open_data)() {
                    Ok(data) => self.data = Some(data),
                    Err(why) => self.tell(now, Event::Failed(why)),
                }
                return;
            }
            DataOrder::Record(record) => ToData::Record(record),
            DataOrder::Drain(token) => ToData::Drain(token),
            DataOrder::Undrain => ToData::Undrain,
            DataOrder::Quiesce(token) => ToData::Quiesce(token),
            DataOrder::Unquiesce => ToData::Unquiesce,
            DataOrder::FailHeld => ToData::FailHeld,
            DataOrder::Tell(module::Word::Stop) => ToData::Tell(Word::Stop),
            DataOrder::Tell(module::Word::StopUndone) => ToData::Tell(Word::StopUndone),
            DataOrder::Tell(module::Word::Crashes) => ToData::Tell(Word::Crashes),
            DataOrder::End => ToData::End,
        };
        self.order(now, order);
    }

    fn route_ask(&mut self, now: Time, ask: Ask) {
        let id = RecordId(host::random());
        let change = match ask {
            Ask::TakeOver | Ask::TakeBack => {
                self.takeover = Some(id);
                if ask == Ask::TakeBack { arbiter::Change::TakeBack } else { arbiter::Change::TakeOver }
            }
            Ask::DropPeer => {
                // Named before it is wanted: its outcome may be known at once.
                self.order(now, ToData::Proposed(DataChange::DropPeer, id));
                match self.machine.other_in_sync() {
                    Some(peer) => arbiter::Change::Drop(peer),
                    None => return self.order(now, ToData::NotLanded(id)),
                }
            }
            Ask::JoinPeer(peer) => {
                self.order(now, ToData::Proposed(DataChange::JoinPeer(peer), id));
                arbiter::Change::Join(peer)
            }
            Ask::Release { to } => return self.ask_arbiter(now, arbiter::Event::Release { to }),
        };
        self.ask_arbiter(now, arbiter::Event::Want { id, change });
    }

    fn route_arbiter(&mut self, now: Time, effect: arbiter::Effect) {
        use arbiter::Effect as E;
        match effect {
            E::Ask { to, nonce, request } => {
                // Lost where it is not connected: the arbiter asks again by itself.
                let _ = self.parts.voters.ask(to, nonce, request);
            }
            E::Known(record) => {
                let ours = self.takeover == Some(record.id);
                self.tell(now, Event::Known { record, ours });
            }
            E::NotLanded(id) if self.takeover == Some(id) => {
                self.takeover = None;
                self.tell(now, Event::NotLanded);
            }
            E::NotLanded(id) => self.order(now, ToData::NotLanded(id)),
            E::Lease(until) => {
                let had_run_out = self.parts.lease.until() <= now;
                self.parts.lease.set(until);
                if had_run_out && until > now {
                    self.order(now, ToData::LeaseRenewed);
                }
                self.tell(now, Event::Lease(until));
            }
            E::HolderSilent { .. } => self.tell(now, Event::HolderSilent(true)),
            E::HolderHeard => self.tell(now, Event::HolderSilent(false)),
            E::Offered(_) => self.tell(now, Event::HandedOver),
            E::Released(_) => {}
            E::AcceptorOut { acceptor, why } => {
                let text = format!("acceptor {acceptor} is not believed any more ({why:?}): it has to be replaced");
                self.note(Level::Error, "voter-out", &text);
            }
        }
    }

    // For people.

    fn note(&mut self, level: Level, event: &str, text: &str) {
        let generation = self.machine.record().map_or(0, |record| record.generation.0);
        self.parts.log.write(generation, level, event, text);
    }

    fn mark(&mut self, mark: Mark) {
        let at = wall_ms();
        let times = &mut self.watched.times;
        match mark {
            Mark::Detected => *times = crate::api::types::TakeoverTimes { detected_ms: at, ..Default::default() },
            Mark::Won => times.won_ms = at,
            Mark::StartCalled => times.start_called_ms = at,
            Mark::Started => times.started_ms = at,
        }
    }

    fn status(&self, now: Time) -> crate::api::types::ModuleStatus {
        let voters_missing = self.arbiter.is_none().then(|| self.voter_trouble.get(&0)).flatten();
        let settings = &self.parts.settings;
        self.watched.status(now, &self.machine, settings, self.parts.link_protection, voters_missing)
    }

    fn log_changes(&mut self, now: Time) {
        let view = self.machine.view(now);
        if self.watched.last_view != Some((view.state, view.health)) {
            self.watched.last_view = Some((view.state, view.health));
            let level = if view.health == module::Health::Red { Level::Warn } else { Level::Info };
            let text = format!("{:?} {:?}", view.state, view.health).to_uppercase();
            let text = if view.reason.is_empty() { text } else { format!("{text}: {}", view.reason) };
            self.note(level, "state", &text);
        }
    }
}
