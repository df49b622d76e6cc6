//! The world of the arbiter's simulator: two nodes and a witness, each with a clock of its own, an acceptor and, on the
//! nodes, a module's stand-in; a network that loses, repeats, delays and cuts; faults; and what must never be.
//!
//! One seed, one run. True time is in nanoseconds; what the cores see goes through their site's clock.
use crate::check::Truth;
use crate::module::{Disk, LinkMessage, Module};
use std::collections::{BTreeMap, VecDeque};
use vmtwin_core::arbiter::message::{Answer, Request};
use vmtwin_core::arbiter::rules::Rules;
use vmtwin_core::arbiter::{Acceptor, Effect, Event, Stored};
use vmtwin_core::ids::{AcceptorId, ModuleId, RecordId, ReplicaId};
use vmtwin_core::record::Record;
use vmtwin_core::time::Time;
use vmtwin_core::wire::codec::{Reader, Writer};
use vmtwin_tests::Rng;

pub const MS: u64 = 1_000_000;
pub const SECOND: u64 = 1000 * MS;
/// The witness's site; 0 and 1 are the nodes.
pub const WITNESS: usize = 2;
pub const REPLICAS: [ReplicaId; 2] = [ReplicaId(0xa << 96), ReplicaId(0xb << 96)];
pub const ACCEPTORS: [AcceptorId; 3] = [AcceptorId(1 << 96), AcceptorId(2 << 96), AcceptorId(3 << 96)];

/// How a run is to be spoiled: rules of the core, and of the stand-in, that are switched off.
#[derive(Clone, Copy, Debug)]
pub struct Sabotage {
    pub rules: Rules,
    /// R3: acknowledges alone as soon as the drop is wanted.
    pub acknowledges_before_drop_is_known: bool,
    /// R12: an acceptor forgets its promise in a restart.
    pub promise_lost_in_restart: bool,
}

pub const NONE: Sabotage =
    Sabotage { rules: Rules::ALL, acknowledges_before_drop_is_known: false, promise_lost_in_restart: false };

/// How faults follow each other.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Pace {
    /// One at a time, with time to recover between.
    Calm,
    Lively,
    /// Thick and short, one in the other.
    Dense,
}

/// A message on the network.
#[derive(Clone, Debug)]
pub enum Message {
    Ask { nonce: u64, request: Vec<u8> },
    Answer { nonce: u64, answer: Vec<u8> },
    Link(LinkMessage),
}

enum Due {
    Deliver { from: usize, to: usize, message: Message },
    Late { from: usize, to: usize, message: Message },
    Wake { node: usize, life: u64 },
    Saved { site: usize, life: u64 },
    StartKeep(usize),
    StartModule(usize),
    PowerOn(usize),
    Fault,
    Mend(Mend),
}

#[derive(Clone, Copy)]
pub enum Mend {
    Cut(usize, usize),
    Pause(usize),
    Noise,
}

pub struct Site {
    /// The clock: offset in nanoseconds, and what it gains per million.
    offset: u64,
    drift_ppm: i64,
    pub stored: Stored,
    pub acceptor: Option<Acceptor>,
    saving: bool,
    waiting: VecDeque<(usize, u64, Request)>,
    unsent: Vec<(usize, u64, Answer)>,
    keep_life: u64,
    pub paused: bool,
    held: Vec<Due>,
    /// When the last fault of this site ended.
    pub trouble: u64,
    pub powered: bool,
}

pub struct Network {
    pub cut: [[bool; 3]; 3],
    pub loss_per_mille: u64,
    pub repeat_per_mille: u64,
    pub slow_per_mille: u64,
}

/// What a script does with a message.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    Pass,
    Drop,
    /// Kept back until `World::release_held`.
    Hold,
}

/// A message as a script sees it.
pub enum Seen<'a> {
    Ask(&'a Request),
    Answer(&'a Answer),
    Link(&'a LinkMessage),
}

type Filter = Box<dyn FnMut(usize, usize, Seen<'_>) -> Fate>;

pub struct World {
    pub now: u64,
    due: BTreeMap<(u64, u64), Due>,
    sequence: u64,
    pub rng: Rng,
    pub sites: Vec<Site>,
    pub modules: [Option<Module>; 2],
    pub disks: [Disk; 2],
    /// Counts processes and sessions: each has a number of its own, the later the higher.
    pub lives: u64,
    pub network: Network,
    pub truth: Truth,
    pub sabotage: Sabotage,
    pub trace: bool,
    /// Scripts drop and hold single messages by it.
    pub filter: Option<Filter>,
    held: Vec<(usize, usize, Message)>,
    faults_until: u64,
    pub start_modules: bool,
    pub guest_idle: bool,
    pace: Pace,
}

impl World {
    /// Both nodes up, node 0 the holder of the first record, clocks apart within the margin.
    pub fn new(seed: u64, sabotage: Sabotage) -> Self {
        let mut rng = Rng::new(seed);
        let sites = (0..3)
            .map(|site| Site {
                offset: rng.between(10 * SECOND, 100_000 * SECOND),
                // 24 per mille each way: two clocks differ by less than DRIFT_MS in a lease.
                drift_ppm: i64::try_from(rng.below(48_000)).unwrap() - 24_000,
                stored: Stored::new(ModuleId(1), ACCEPTORS[site]),
                acceptor: None,
                saving: false,
                waiting: VecDeque::new(),
                unsent: Vec::new(),
                keep_life: 0,
                paused: false,
                held: Vec::new(),
                trouble: 0,
                powered: true,
            })
            .collect();
        let mut world = Self {
            now: 0,
            due: BTreeMap::new(),
            sequence: 0,
            rng,
            sites,
            modules: [None, None],
            disks: [Disk::default(), Disk::default()],
            lives: 0,
            network: Network { cut: [[false; 3]; 3], loss_per_mille: 0, repeat_per_mille: 0, slow_per_mille: 0 },
            truth: Truth::default(),
            sabotage,
            trace: vmtwin_tests::trace_wanted(),
            filter: None,
            held: Vec::new(),
            faults_until: 0,
            start_modules: true,
            guest_idle: false,
            pace: [Pace::Calm, Pace::Lively, Pace::Dense][usize::try_from(seed % 3).unwrap()],
        };
        for site in 0..3 {
            world.start_keep(site);
        }
        world.start_module(0);
        let id = RecordId(world.rng.id());
        let first = Record::first(id, REPLICAS[0], ACCEPTORS.to_vec());
        world.module_event(0, Event::Want { id, change: vmtwin_core::arbiter::Change::First(first) });
        world.start_module(1);
        world
    }

    // ---- time

    pub fn local(&self, site: usize) -> Time {
        let Site { offset, drift_ppm, .. } = self.sites[site];
        let gained = i128::from(self.now) * i128::from(drift_ppm) / 1_000_000;
        Time(u64::try_from(i128::from(self.now + offset) + gained).unwrap())
    }

    pub fn true_time(&self, site: usize, local: Time) -> u64 {
        let Site { offset, drift_ppm, .. } = self.sites[site];
        let passed = i128::from(local.0) - i128::from(offset);
        u64::try_from((passed * 1_000_000 / (1_000_000 + i128::from(drift_ppm))).max(0)).unwrap()
    }

    fn at(&mut self, when: u64, due: Due) {
        self.sequence += 1;
        self.due.insert((when.max(self.now), self.sequence), due);
    }

    /// Runs for this many milliseconds of true time, or until something happened that must not.
    pub fn run(&mut self, ms: u64) {
        let end = self.now + ms * MS;
        while self.truth.violation.is_none() {
            let Some(entry) = self.due.first_entry() else { break };
            if entry.key().0 > end {
                break;
            }
            let ((when, _), due) = entry.remove_entry();
            self.now = when;
            self.happen(due);
        }
        self.now = end;
    }

    fn happen(&mut self, due: Due) {
        let site = match &due {
            Due::Deliver { to, .. } | Due::Late { to, .. } => Some(*to),
            Due::Wake { node, .. } => Some(*node),
            Due::Saved { site, .. } => Some(*site),
            _ => None,
        };
        if let Some(site) = site.filter(|site| self.sites[*site].paused) {
            self.sites[site].held.push(due);
            return;
        }
        match due {
            Due::Deliver { from, to, message } => self.deliver(from, to, message),
            Due::Late { from, to, message } => self.arrive(from, to, message),
            Due::Wake { node, life } => {
                if self.modules[node].as_ref().is_some_and(|module| module.life == life) {
                    self.module_event(node, Event::Asked);
                    self.with_module(node, |module, world| module.beat(world));
                    self.module_event(node, Event::Tick);
                    self.wake_later(node);
                }
            }
            Due::Saved { site, life } if self.sites[site].keep_life == life => self.saved(site),
            Due::Saved { .. } => {}
            Due::StartKeep(site) => self.start_keep(site),
            Due::StartModule(node) => self.start_module(node),
            Due::PowerOn(site) => self.power_on(site),
            Due::Fault => self.random_fault(),
            Due::Mend(mend) => self.mend(mend),
        }
    }

    pub fn say(&self, who: &str, what: impl std::fmt::Debug) {
        if self.trace {
            println!("{:9.3} {who} {what:?}", self.now as f64 / MS as f64);
        }
    }

    // ---- the network

    pub fn send(&mut self, from: usize, to: usize, message: Message) {
        if let Some(mut filter) = self.filter.take() {
            let fate = match &message {
                Message::Ask { request, .. } => filter(from, to, Seen::Ask(&read_request(request))),
                Message::Answer { answer, .. } => filter(from, to, Seen::Answer(&read_answer(answer))),
                Message::Link(message) => filter(from, to, Seen::Link(message)),
            };
            self.filter = Some(filter);
            match fate {
                Fate::Pass => {}
                Fate::Drop => return,
                Fate::Hold => {
                    self.held.push((from, to, message));
                    return;
                }
            }
        }
        if from == to {
            let soon = self.now + self.rng.between(20_000, 80_000);
            self.at(soon, Due::Deliver { from, to, message });
            return;
        }
        if self.network.cut[from][to] || self.rng.chance(self.network.loss_per_mille) {
            return;
        }
        let copies = if self.rng.chance(self.network.repeat_per_mille) { 2 } else { 1 };
        for _ in 0..copies {
            let slow = self.rng.chance(self.network.slow_per_mille);
            let delay = if slow { self.rng.between(MS, 900 * MS) } else { self.rng.between(100_000, 2 * MS) };
            self.at(self.now + delay, Due::Deliver { from, to, message: message.clone() });
        }
    }

    /// What a script held back arrives now, cut or not: it was on its way before.
    pub fn release_held(&mut self) {
        for (from, to, message) in std::mem::take(&mut self.held) {
            self.at(self.now, Due::Late { from, to, message });
        }
    }

    fn deliver(&mut self, from: usize, to: usize, message: Message) {
        if from == to || !self.network.cut[from][to] {
            self.arrive(from, to, message);
        }
    }

    fn arrive(&mut self, from: usize, to: usize, message: Message) {
        if !self.sites[to].powered {
            return;
        }
        match message {
            Message::Ask { nonce, request } => {
                let request = read_request(&request);
                self.sites[to].waiting.push_back((from, nonce, request));
                self.serve(to);
            }
            Message::Answer { nonce, answer } => {
                let answer = read_answer(&answer);
                // Whoever runs the connection knows whom it asked; the simulator's sites keep their places.
                self.module_event(to, Event::Answered { from: ACCEPTORS[from], nonce, answer });
            }
            Message::Link(message) => self.with_module(to, |module, world| module.heard(world, message)),
        }
    }

    // ---- acceptors: what has to be saved is saved before the answer leaves, and before the next request

    fn serve(&mut self, site: usize) {
        let now = self.local(site);
        loop {
            let state = &mut self.sites[site];
            let Some(acceptor) = &mut state.acceptor else {
                state.waiting.clear();
                return;
            };
            if state.saving {
                return;
            }
            let Some((from, nonce, request)) = state.waiting.pop_front() else { return };
            let handled = acceptor.handle(now, &request);
            self.say(&format!("  acceptor {site}"), (from, &request, &handled.answer.reply));
            if handled.save {
                let state = &mut self.sites[site];
                state.saving = true;
                state.unsent.push((from, nonce, handled.answer));
                let life = state.keep_life;
                let slow = if self.rng.chance(30) { 200 } else { 8 };
                let takes = self.rng.between(MS / 2, slow * MS);
                self.at(self.now + takes, Due::Saved { site, life });
            } else {
                self.answer(site, from, nonce, &handled.answer);
            }
        }
    }

    fn saved(&mut self, site: usize) {
        let state = &mut self.sites[site];
        let Some(acceptor) = &state.acceptor else { return };
        // The file's own bytes, so that what is not in them is lost.
        state.stored = Stored::from_bytes(&acceptor.stored().to_bytes()).expect("a file that we wrote");
        state.saving = false;
        for (to, nonce, answer) in std::mem::take(&mut state.unsent) {
            self.answer(site, to, nonce, &answer);
        }
        self.serve(site);
    }

    fn answer(&mut self, site: usize, to: usize, nonce: u64, answer: &Answer) {
        let mut bytes = Vec::new();
        answer.encode(&mut Writer::new(&mut bytes));
        self.send(site, to, Message::Answer { nonce, answer: bytes });
    }

    pub fn start_keep(&mut self, site: usize) {
        if !self.sites[site].powered || self.sites[site].acceptor.is_some() {
            return;
        }
        let now = self.local(site);
        let mut stored = self.sites[site].stored.clone();
        if self.sabotage.promise_lost_in_restart {
            stored.promised = vmtwin_core::arbiter::message::Ballot::default();
        }
        let state = &mut self.sites[site];
        state.acceptor = Some(Acceptor::with_rules(stored, now, self.sabotage.rules));
        state.keep_life += 1;
        self.say(&format!("  acceptor {site}"), "starts");
    }

    /// The process ends; a save under way is finished or not.
    pub fn kill_keep(&mut self, site: usize) {
        let (lucky, now) = (self.rng.chance(500), self.now);
        let state = &mut self.sites[site];
        state.trouble = state.trouble.max(now);
        if let (true, true, Some(acceptor)) = (state.saving, lucky, &state.acceptor) {
            state.stored = acceptor.stored().clone();
        }
        state.acceptor = None;
        state.saving = false;
        state.unsent.clear();
        state.waiting.clear();
        self.say(&format!("  acceptor {site}"), "ends");
    }

    // ---- modules

    pub fn start_module(&mut self, node: usize) {
        if self.sites[node].powered && self.modules[node].is_none() && self.start_modules {
            self.lives += 1;
            let module = Module::start(self, node, self.lives);
            self.modules[node] = Some(module);
            self.with_module(node, |module, world| module.began(world));
            self.wake_later(node);
        }
    }

    pub fn kill_module(&mut self, node: usize) {
        self.say(&format!("node {node}"), "module process ends");
        self.sites[node].trouble = self.sites[node].trouble.max(self.now);
        self.modules[node] = None;
        self.truth.lease_over(node, self.now);
    }

    fn wake_later(&mut self, node: usize) {
        let now = self.local(node);
        let Some(module) = &self.modules[node] else { return };
        let (life, wake) = (module.life, module.arbiter.wake(now).min(now + vmtwin_core::time::millis(25)));
        let when = self.true_time(node, wake).max(self.now + MS);
        self.at(when, Due::Wake { node, life });
    }

    /// Runs `act` with the module taken out of the world, so that both can be changed.
    pub fn with_module(&mut self, node: usize, act: impl FnOnce(&mut Module, &mut World)) {
        if let Some(mut module) = self.modules[node].take() {
            act(&mut module, self);
            self.modules[node] = Some(module);
        }
    }

    pub fn module_event(&mut self, node: usize, event: Event) {
        self.with_module(node, |module, world| module.step(world, event));
    }

    /// An operator's `prim` on this node.
    pub fn prim(&mut self, node: usize) {
        self.with_module(node, Module::prim);
    }

    /// An operator's `swap` on the holder.
    pub fn swap(&mut self, node: usize) {
        self.with_module(node, |module, _| module.wants_swap = true);
    }

    pub fn is_holder(&self, node: usize) -> bool {
        self.modules[node].as_ref().is_some_and(|module| module.arbiter.is_holder())
    }

    pub fn carry_out(&mut self, node: usize, effect: &Effect) {
        if let Effect::Ask { to, nonce, request } = effect {
            let mut bytes = Vec::new();
            request.encode(&mut Writer::new(&mut bytes));
            let site = ACCEPTORS.iter().position(|id| id == to).expect("a voter of this world");
            self.send(node, site, Message::Ask { nonce: *nonce, request: bytes });
        } else {
            self.say(&format!("node {node}"), effect);
        }
    }

    // ---- faults

    /// The host loses power: memory is gone, and of what was not flushed, any part.
    pub fn power_off(&mut self, site: usize) {
        self.say(&format!("site {site}"), "power off");
        self.kill_keep(site);
        if site < 2 {
            self.kill_module(site);
            let mut rng = self.rng.fork();
            self.disks[site].lose_power(&mut rng);
        }
        let state = &mut self.sites[site];
        (state.powered, state.paused) = (false, false);
        state.held.clear();
        state.trouble = u64::MAX;
    }

    pub fn power_on(&mut self, site: usize) {
        self.say(&format!("site {site}"), "power on");
        let state = &mut self.sites[site];
        (state.powered, state.trouble) = (true, self.now);
        self.start_keep(site);
        if site < 2 {
            self.start_module(site);
        }
    }

    /// The host stands still; its clock goes on.
    pub fn pause(&mut self, site: usize) {
        self.say(&format!("site {site}"), "pauses");
        self.sites[site].paused = true;
        self.sites[site].trouble = u64::MAX;
    }

    pub fn resume(&mut self, site: usize) {
        self.say(&format!("site {site}"), "goes on");
        let state = &mut self.sites[site];
        state.paused = false;
        state.trouble = self.now;
        for due in std::mem::take(&mut state.held) {
            self.at(self.now, due);
        }
    }

    pub fn cut(&mut self, from: usize, to: usize) {
        self.say("network", ("cut", from, to));
        self.network.cut[from][to] = true;
        (self.sites[from].trouble, self.sites[to].trouble) = (u64::MAX, u64::MAX);
    }

    pub fn cut_both(&mut self, one: usize, other: usize) {
        self.cut(one, other);
        self.cut(other, one);
    }

    pub fn heal(&mut self) {
        self.say("network", "heals");
        self.network.cut = [[false; 3]; 3];
        for site in &mut self.sites {
            if site.powered && !site.paused {
                site.trouble = self.now;
            }
        }
    }

    fn mend(&mut self, mend: Mend) {
        match mend {
            Mend::Cut(from, to) => {
                self.network.cut[from][to] = false;
                self.say("network", ("mended", from, to));
                for site in [from, to] {
                    let still = (0..3).any(|s| self.network.cut[site][s] || self.network.cut[s][site]);
                    if !still && self.sites[site].powered && !self.sites[site].paused {
                        self.sites[site].trouble = self.now;
                    }
                }
            }
            Mend::Pause(site) if self.sites[site].paused => self.resume(site),
            Mend::Pause(_) => {}
            Mend::Noise => {
                self.network.loss_per_mille = 0;
                self.network.repeat_per_mille = 0;
                self.network.slow_per_mille = 0;
                for site in &mut self.sites {
                    site.trouble = site.trouble.max(self.now);
                }
            }
        }
    }

    /// Faults happen from now on for this many milliseconds.
    pub fn with_faults(&mut self, ms: u64) {
        self.faults_until = self.now + ms * MS;
        self.at(self.now, Due::Fault);
    }

    fn random_fault(&mut self) {
        if self.now >= self.faults_until {
            return;
        }
        let (soon, brief, longest) = match self.pace {
            Pace::Calm => (0, 700, 12_000),
            Pace::Lively => (300, 500, 6000),
            Pace::Dense => (800, 800, 6000),
        };
        let pause = if self.rng.chance(soon) { self.rng.between(1, 300) } else { self.rng.between(300, longest) };
        let pause = if self.pace == Pace::Calm { pause.max(8500) } else { pause };
        self.at(self.now + pause * MS, Due::Fault);
        let lasts = if self.rng.chance(brief) { self.rng.between(5, 900) } else { self.rng.between(900, 7000) } * MS;
        let end = self.now + lasts;
        let site = usize::try_from(self.rng.below(3)).unwrap();
        let other = (site + 1 + usize::try_from(self.rng.below(2)).unwrap()) % 3;
        let node = site % 2;
        match self.rng.below(100) {
            0..20 => {
                self.cut_both(site, other);
                self.at(end, Due::Mend(Mend::Cut(site, other)));
                self.at(end, Due::Mend(Mend::Cut(other, site)));
            }
            20..30 => {
                self.cut(site, other);
                self.at(end, Due::Mend(Mend::Cut(site, other)));
            }
            30..40 => {
                for other in (0..3).filter(|s| *s != site) {
                    self.cut_both(site, other);
                    self.at(end, Due::Mend(Mend::Cut(site, other)));
                    self.at(end, Due::Mend(Mend::Cut(other, site)));
                }
            }
            40..52 => {
                self.network.loss_per_mille = *self.rng.pick(&[0, 50, 300]);
                self.network.repeat_per_mille = *self.rng.pick(&[0, 100, 400]);
                self.network.slow_per_mille = *self.rng.pick(&[0, 50, 300]);
                self.at(end, Due::Mend(Mend::Noise));
            }
            52..66 if self.sites[site].powered => {
                self.power_off(site);
                self.at(end, Due::PowerOn(site));
            }
            66..74 => {
                self.kill_module(node);
                self.at(self.now + lasts / 4, Due::StartModule(node));
            }
            74..82 => {
                self.kill_keep(site);
                self.at(self.now + lasts / 4, Due::StartKeep(site));
            }
            82..92 if self.sites[site].powered => {
                self.pause(site);
                self.at(end, Due::Mend(Mend::Pause(site)));
            }
            92..97 => self.swap(node),
            97..100 => self.prim(node),
            _ => {}
        }
    }
}

fn read_request(bytes: &[u8]) -> Request {
    let mut reader = Reader::new(bytes);
    let request = Request::decode(&mut reader).expect("what we sent");
    reader.end().expect("nothing left");
    request
}

fn read_answer(bytes: &[u8]) -> Answer {
    let mut reader = Reader::new(bytes);
    let answer = Answer::decode(&mut reader).expect("what we sent");
    reader.end().expect("nothing left");
    answer
}
