//! Two nodes, each a `Replica` over a disk that forgets, the link between them, and the queue of what happens when. One
//! seed, one run.
use super::control::{Control, Register};
use super::disk::{Disk, Payload};
use super::faults::Faults;
use super::guest::{Ask, Cell, FILES, Guest, name};
use super::net::{Net, Packet};
use std::collections::{BTreeMap, VecDeque};
use vmtwin_core::format::Owner;
use vmtwin_core::ids::{FileId, ModuleId, ReplicaId};
use vmtwin_core::limits::SLOW_PEER_MS;
use vmtwin_core::namespace::{Errno, Op};
use vmtwin_core::record::Record;
use vmtwin_core::replica::effect::{Effect, Marks, Payload as Follows, VerifyEnd, Work};
use vmtwin_core::replica::event::{Event, Job, OpId};
use vmtwin_core::replica::log::ActivityLog;
use vmtwin_core::replica::map::DirtyMap;
use vmtwin_core::replica::{Config, Gate, Replica, Role, Rule};
use vmtwin_core::time::Time;
use vmtwin_core::wire::codec::Reader;
use vmtwin_core::wire::frame::{Header, Kind};
use vmtwin_tests::Rng;

pub const MS: u64 = 1_000_000;
pub const SECOND: u64 = 1000 * MS;
const MODULE: ModuleId = ModuleId(7);

/// The replica of a node.
pub fn replica_of(node: usize) -> ReplicaId {
    ReplicaId(node as u128 + 1)
}

fn owner(node: usize) -> Owner {
    Owner { module: MODULE, replica: replica_of(node) }
}

/// What happens.
#[derive(Debug)]
pub enum Happens {
    /// To a process; nothing if another one runs by then.
    To(usize, u64, Then),
    Packet {
        to: usize,
        connection: u64,
        packet: Packet,
    },
    Connected {
        node: usize,
        connection: u64,
    },
    Lost {
        node: usize,
        connection: u64,
    },
    Connect,
    Tick,
    Guest,
    Fault,
    Boot(usize),
}

#[derive(Debug)]
pub enum Then {
    JobDone(Job, Work),
    LogSaved,
    MapSaved,
    MarksSaved,
    ReadBegin(OpId, FileId, u64),
    ReadEnd(OpId, FileId, u64),
    Control(super::control::News),
}

pub struct Node {
    pub replica: Option<Replica>,
    pub incarnation: u64,
    /// Events wait until then.
    pub paused_until: u64,
    pub disk: Disk,
    payloads: BTreeMap<Job, Payload>,
    /// What the kernel has in hand.
    doing: Vec<(Job, Work)>,
    saving_log: VecDeque<(u64, u64, Vec<u8>)>,
    saving_map: Option<(u64, Vec<u8>)>,
    saving_marks: Option<Marks>,
    pub control: Control,
    /// It lost what it had not flushed, and was not made equal since.
    pub lost: bool,
    gate_was: bool,
}

pub struct World {
    pub now: u64,
    pub rng: Rng,
    queue: BTreeMap<(u64, u64), Happens>,
    order: u64,
    pub nodes: [Node; 2],
    pub net: Net,
    pub guest: Guest,
    pub register: Register,
    pub faults: Faults,
    rule: Option<Rule>,
    /// Requests that the guest may have in hand; 0: it is idle.
    pub depth: usize,
    /// Longest time between two requests of the guest.
    pub pace: u64,
    trace: Option<VecDeque<String>>,
    pub joins: u64,
    /// How verifications ended.
    pub verified: Vec<VerifyEnd>,
}

impl World {
    pub fn new(seed: u64, rule: Option<Rule>, faults: Faults) -> Self {
        let mut rng = Rng::new(seed);
        let nodes = [0, 1].map(|node| {
            let log = ActivityLog::create(owner(node)).1;
            let map = DirtyMap::default().snapshot(owner(node), 1);
            let mut disk = Disk::new(log, map);
            for id in FILES {
                let (parent, name) = (FileId::ROOT, vmtwin_core::namespace::FileName::new(format!("f{id}")).unwrap());
                let op = Op::Create { parent, name, id, owner: super::disk::rights() };
                let mut payload = Payload { op: Some(op), ..Payload::default() };
                disk.work(&Work::Namespace, &mut payload).unwrap();
            }
            disk.work(&Work::Flush { file: None }, &mut Payload::default()).unwrap();
            Node {
                replica: None,
                incarnation: 0,
                paused_until: 0,
                disk,
                payloads: BTreeMap::new(),
                doing: Vec::new(),
                saving_log: VecDeque::new(),
                saving_map: None,
                saving_marks: None,
                control: Control::default(),
                lost: false,
                gate_was: false,
            }
        });
        let guest = Guest::new(rng.fork());
        let net = Net { works: true, ..Net::default() };
        let register = Register::new(rng.fork());
        let trace = vmtwin_tests::trace_wanted().then(VecDeque::new);
        let mut world = Self {
            now: 0,
            rng,
            queue: BTreeMap::new(),
            order: 0,
            nodes,
            net,
            guest,
            register,
            faults,
            rule,
            depth: 4,
            pace: 6 * MS,
            trace,
            joins: 0,
            verified: Vec::new(),
        };
        world.boot(0);
        world.boot(1);
        world.at(0, Happens::Connect);
        world.at(MS, Happens::Tick);
        world.at(2 * MS, Happens::Guest);
        world.at(SECOND, Happens::Fault);
        world
    }

    pub fn at(&mut self, delay: u64, what: Happens) {
        self.order += 1;
        self.queue.insert((self.now + delay, self.order), what);
    }

    fn to(&mut self, delay: u64, node: usize, then: Then) {
        let incarnation = self.nodes[node].incarnation;
        self.at(delay, Happens::To(node, incarnation, then));
    }

    /// News for a node's control plane, if this process still lives then.
    pub fn tell_control(&mut self, delay: u64, node: usize, news: super::control::News) {
        self.to(delay, node, Then::Control(news));
    }

    pub fn note(&mut self, line: impl FnOnce() -> String) {
        if let Some(trace) = &mut self.trace {
            let line = format!("{:>10.3} ms  {}", self.now as f64 / 1e6, line());
            if std::env::var("VMTWIN_TRACE_ALL").is_ok() {
                println!("{line}");
            }
            trace.push_back(line);
            if trace.len() > 400 {
                trace.pop_front();
            }
        }
    }

    pub fn is_up(&self, node: usize) -> bool {
        self.nodes[node].replica.is_some() && self.nodes[node].paused_until <= self.now
    }

    /// Runs until `until` (a time, not a span).
    pub fn run_until(&mut self, until: u64) {
        while let Some(entry) = self.queue.first_entry() {
            if entry.key().0 > until {
                break;
            }
            let ((at, _), what) = entry.remove_entry();
            self.now = at;
            self.happens(what);
        }
        self.now = until;
    }

    fn happens(&mut self, what: Happens) {
        let node = match &what {
            Happens::To(node, ..) | Happens::Connected { node, .. } | Happens::Lost { node, .. } => Some(*node),
            Happens::Packet { to, .. } => Some(*to),
            _ => None,
        };
        if let Some(node) = node
            && self.nodes[node].paused_until > self.now
        {
            let wait = self.nodes[node].paused_until - self.now;
            return self.at(wait, what);
        }
        match what {
            Happens::To(node, incarnation, then) => {
                if self.nodes[node].incarnation == incarnation && self.nodes[node].replica.is_some() {
                    self.then(node, then);
                }
            }
            Happens::Packet { to, connection, packet } => self.packet(to, connection, packet),
            Happens::Connected { node, connection } => {
                if self.net.connection == connection && self.net.alive && self.nodes[node].replica.is_some() {
                    self.net.known[node] = connection;
                    let nonce = self.rng.bits();
                    self.step(node, Event::Connected { nonce });
                }
            }
            Happens::Lost { node, connection } => {
                if self.net.known[node] == connection && self.nodes[node].replica.is_some() {
                    self.net.known[node] = 0;
                    self.step(node, Event::Disconnected);
                }
            }
            Happens::Connect => self.connect(),
            Happens::Tick => {
                for node in [0, 1] {
                    if self.is_up(node) {
                        self.step(node, Event::Tick);
                        self.poll(node);
                    }
                }
                self.at(50 * MS, Happens::Tick);
            }
            Happens::Guest => self.guest_turn(),
            Happens::Fault => self.fault(),
            Happens::Boot(node) => self.boot(node),
        }
    }

    fn then(&mut self, node: usize, then: Then) {
        let it = &mut self.nodes[node];
        match then {
            Then::JobDone(job, work) => {
                it.doing.retain(|(one, _)| *one != job);
                let mut payload = it.payloads.remove(&job).unwrap_or_default();
                let result = it.disk.work(&work, &mut payload);
                it.payloads.insert(job, payload);
                self.step(node, Event::Done { job, result });
            }
            Then::LogSaved => {
                let (transaction, offset, bytes) = it.saving_log.pop_front().unwrap();
                it.disk.save_log(offset, &bytes);
                self.step(node, Event::LogSaved { transaction });
            }
            Then::MapSaved => {
                let (version, bytes) = it.saving_map.take().unwrap();
                it.disk.map = bytes;
                self.step(node, Event::MapSaved { version });
            }
            Then::MarksSaved => {
                it.disk.marks = it.saving_marks.take().unwrap();
                if !it.disk.marks.broken && it.replica.as_ref().unwrap().role() == Role::Target {
                    it.lost = false;
                }
                self.step(node, Event::MarksSaved);
            }
            Then::ReadBegin(op, file, sector) => {
                if it.replica.as_ref().unwrap().gate() != Gate::Open || !self.is_lease_live(node) {
                    return self.to(5 * MS, node, Then::ReadBegin(op, file, sector));
                }
                let delay = self.rng.between(20_000, MS);
                self.to(delay, node, Then::ReadEnd(op, file, sector));
            }
            Then::ReadEnd(op, file, sector) => {
                if it.replica.as_ref().unwrap().gate() != Gate::Open || !self.is_lease_live(node) {
                    return self.to(5 * MS, node, Then::ReadBegin(op, file, sector));
                }
                let stamp = self.nodes[node].disk.now.get(file, sector);
                if self.guest.node == Some(node) {
                    self.guest.read_answered(op, stamp, self.now);
                }
            }
            Then::Control(news) => self.control(node, news),
        }
    }

    /// Whether the node may believe in its lease now.
    pub fn is_lease_live(&self, node: usize) -> bool {
        self.now < self.nodes[node].control.lease_until
    }

    /// One step of a node's machine, with the look at the clock that comes before it.
    pub fn step(&mut self, node: usize, event: Event) {
        let live = self.is_lease_live(node);
        let mut effects = Vec::new();
        let now = Time(self.now);
        let it = &mut self.nodes[node];
        let Some(replica) = &mut it.replica else { return };
        if std::mem::replace(&mut it.gate_was, live) != live {
            replica.step(now, Event::Lease(live), &mut effects);
        }
        let line = self.trace.is_some().then(|| format!("{event:?}"));
        replica.step(now, event, &mut effects);
        if let Some(line) = line.filter(|line| line != "Tick") {
            self.note(|| format!("n{node} <- {line:.200}"));
        }
        for effect in effects {
            self.note(|| format!("n{node}    -> {:.200}", format!("{effect:?}")));
            self.carry_out(node, effect);
        }
    }

    fn carry_out(&mut self, node: usize, effect: Effect) {
        let quick = self.rng.between(20_000, 2 * MS);
        match effect {
            Effect::Local { job, work } => {
                if matches!(job, Job::Peer(..)) {
                    // R6, R7: nothing that a peer sent is carried out on the node that the register names as the holder.
                    let changes = matches!(work, Work::Write { .. } | Work::Range { .. } | Work::Namespace);
                    let holder = self.register.record.holder == replica_of(node);
                    assert!(!(changes && holder), "data flows to the holder");
                }
                let delay = if matches!(work, Work::Flush { .. }) { quick * 3 } else { quick };
                self.nodes[node].doing.push((job, work));
                self.to(delay, node, Then::JobDone(job, work));
            }
            Effect::Send { header, payload } => {
                let payloads = &self.nodes[node].payloads;
                let (body, payload) = match payload {
                    Follows::None => (Vec::new(), None),
                    Follows::Bytes(bytes) if header.kind == Kind::Namespace => {
                        let op = Op::decode(&mut Reader::new(&bytes)).unwrap();
                        (Vec::new(), Some(Payload { op: Some(op), ..Payload::default() }))
                    }
                    Follows::Bytes(bytes) => (bytes, None),
                    Follows::Of(job) => (Vec::new(), Some(payloads.get(&job).expect("its payload is kept").clone())),
                };
                if let Ok(read) = Header::decode(&header.encode()) {
                    assert_eq!(read, header);
                } else {
                    panic!("a frame that its reader refuses: {header:?}");
                }
                self.send(node, Packet::Frame { header, body, payload });
            }
            Effect::SendHello(hello) => self.send(node, Packet::Hello(hello)),
            Effect::Complete { op, result } => {
                if self.guest.node == Some(node) && !self.nodes[node].control.killed {
                    let payload = self.nodes[node].payloads.get(&Job::Guest(op));
                    let names = payload.is_some_and(|payload| payload.op.is_some());
                    match result {
                        Ok(()) => self.guest.answered(op, self.now),
                        // A full disk refuses a new name as any does; nothing was changed.
                        Err(Errno::ENOSPC) if names => self.guest.refused(op),
                        Err(errno) => panic!("the guest gets {errno:?}"),
                    }
                }
            }
            Effect::Release { job } => {
                self.nodes[node].payloads.remove(&job);
            }
            Effect::SaveLog { transaction, offset, bytes } => {
                self.nodes[node].saving_log.push_back((transaction, offset, bytes));
                self.to(quick, node, Then::LogSaved);
            }
            Effect::SaveMap { version, bytes } => {
                self.nodes[node].saving_map = Some((version, bytes));
                self.to(quick * 2, node, Then::MapSaved);
            }
            Effect::SaveMarks(marks) => {
                self.nodes[node].saving_marks = Some(marks);
                self.to(quick, node, Then::MarksSaved);
            }
            Effect::EndLink(_) => self.close(node),
            Effect::Propose(change) => self.proposed(node, change),
            Effect::Drained(token) => self.drained(node, token),
            Effect::Erred(_) | Effect::Stuck(_) => self.nodes[node].control.gave_up = true,
            Effect::Adopted(record) => self.nodes[node].control.known = Some(record),
            Effect::Quiesced { token, both } => self.quiesced(node, token, both),
            Effect::Verified(end) => self.verified.push(end),
            Effect::OtherRecord(_)
            | Effect::VerifyRefused(_)
            | Effect::VerifyProgress(_)
            | Effect::SessionUp(_)
            | Effect::SessionDown(_)
            | Effect::Say(_)
            | Effect::Progress(_) => {}
        }
    }

    // --- link

    fn connect(&mut self) {
        if self.net.works && !self.net.alive && self.is_up(0) && self.is_up(1) && self.net.known == [0, 0] {
            self.net.connection += 1;
            self.net.alive = true;
            for node in [0, 1] {
                let delay = self.rng.between(50_000, 3 * MS);
                self.net.last_arrival[node] = self.now + delay;
                self.at(delay, Happens::Connected { node, connection: self.net.connection });
            }
        }
        let delay = self.rng.between(5 * MS, 60 * MS);
        self.at(delay, Happens::Connect);
    }

    fn send(&mut self, from: usize, packet: Packet) {
        let (to, connection) = (1 - from, self.net.known[from]);
        if connection == 0 || connection != self.net.connection || !self.net.alive {
            return self.swallow(to, packet);
        }
        let delay = self.rng.between(30_000, MS) + self.net.slow_ns;
        let arrival = (self.now + delay).max(self.net.last_arrival[to] + 1);
        self.net.last_arrival[to] = arrival;
        self.at(arrival - self.now, Happens::Packet { to, connection, packet });
    }

    fn packet(&mut self, to: usize, connection: u64, packet: Packet) {
        if connection != 0 && (connection != self.net.connection || !self.net.alive) {
            return self.swallow(to, packet);
        }
        if self.nodes[to].replica.is_none() || connection != 0 && self.net.known[to] != connection {
            return;
        }
        match packet {
            Packet::Hello(hello) => self.step(to, Event::Hello(hello)),
            Packet::Frame { header, body, payload } => {
                if let Some(payload) = payload {
                    self.nodes[to].payloads.insert(Job::Peer(header.session, header.sequence), payload);
                }
                self.step(to, Event::Frame { header, body });
            }
        }
    }

    /// A packet of a connection that is gone; a few come in late after all.
    fn swallow(&mut self, to: usize, packet: Packet) {
        if matches!(&packet, Packet::Frame { header, .. } if header.kind == Kind::Write) && self.rng.chance(700) {
            let delay = self.rng.between(20 * MS, 400 * MS);
            self.at(delay, Happens::Packet { to, connection: 0, packet });
        }
    }

    fn close(&mut self, node: usize) {
        let connection = self.net.known[node];
        if connection == 0 {
            return;
        }
        self.at(1000, Happens::Lost { node, connection });
        if connection == self.net.connection {
            self.net.alive = false;
            let delay = self.rng.between(100_000, 20 * MS);
            self.at(delay, Happens::Lost { node: 1 - node, connection });
        }
    }

    /// The link is cut: what is under way is lost; each side notices in its own time.
    pub fn cut(&mut self) {
        self.net.works = false;
        self.break_connection();
    }

    /// The connection breaks; a new one can be had at once if the cable works.
    pub fn break_connection(&mut self) {
        self.net.alive = false;
        for node in [0, 1] {
            let delay = if self.rng.chance(500) { self.rng.between(MS, 50 * MS) } else { 1500 * MS };
            self.at(delay, Happens::Lost { node, connection: self.net.known[node] });
        }
    }

    // --- power

    fn boot(&mut self, node: usize) {
        if self.nodes[node].replica.is_some() {
            return;
        }
        let it = &mut self.nodes[node];
        it.incarnation += 1;
        let config = Config {
            module: MODULE,
            me: replica_of(node),
            peer: replica_of(1 - node),
            configuration: 1,
            slow_peer_ms: SLOW_PEER_MS,
            marks: it.disk.marks,
        };
        let log = ActivityLog::load(owner(node), &it.disk.log).expect("a torn block is survived");
        let (sequence, map) = DirtyMap::load(owner(node), &it.disk.map).expect("the map is replaced atomically");
        it.replica = Some(Replica::new(config, log, map, sequence).without(self.rule));
        it.gate_was = false;
        let Marks { broken, erred, .. } = it.disk.marks;
        it.control = Control { booted: self.now, broken, gave_up: erred, ..Control::default() };
        self.note(|| format!("n{node} boots"));
    }

    /// The process dies; its kernel goes on: what it has in hand ends, or not, before a successor runs.
    pub fn kill(&mut self, node: usize) {
        if self.nodes[node].replica.take().is_none() {
            return;
        }
        self.note(|| format!("n{node} is killed"));
        let it = &mut self.nodes[node];
        it.incarnation += 1;
        it.paused_until = 0;
        for (job, work) in std::mem::take(&mut it.doing) {
            if self.rng.chance(500) {
                let mut payload = it.payloads.remove(&job).unwrap_or_default();
                let _ = it.disk.work(&work, &mut payload);
            }
        }
        it.payloads.clear();
        for (_, offset, bytes) in std::mem::take(&mut it.saving_log) {
            if self.rng.chance(500) {
                it.disk.save_log(offset, &bytes);
            }
        }
        if let Some((_, bytes)) = it.saving_map.take().filter(|_| self.rng.chance(500)) {
            it.disk.map = bytes;
        }
        if let Some(marks) = it.saving_marks.take().filter(|_| self.rng.chance(500)) {
            it.disk.marks = marks;
        }
        self.net.known[node] = 0;
        self.net.alive = false;
        let delay = if self.rng.chance(500) { self.rng.between(MS, 20 * MS) } else { 1500 * MS };
        self.at(delay, Happens::Lost { node: 1 - node, connection: self.net.connection });
        if self.guest.node == Some(node) {
            self.guest.crash(self.now);
        }
    }

    /// The power goes.
    pub fn power_loss(&mut self, node: usize) {
        if self.nodes[node].replica.is_none() {
            return;
        }
        if let Some((_, offset, bytes)) = self.nodes[node].saving_log.pop_front() {
            let rng = &mut self.rng;
            self.nodes[node].disk.tear_log(offset, &bytes, rng);
        }
        self.nodes[node].saving_log.clear();
        self.kill(node);
        let it = &mut self.nodes[node];
        it.disk.power_loss(&mut self.rng);
        it.disk.marks.broken = true;
        it.lost = true;
        self.note(|| format!("n{node} lost its power"));
    }

    // --- guest

    fn guest_turn(&mut self) {
        if let Some(node) = self.guest.node
            && self.is_up(node)
            && !self.nodes[node].control.killed
            && self.guest.in_hand() < self.depth
        {
            let ask = self.guest.next(self.now, &self.nodes[node].disk.now.tree);
            if let Some(ask) = ask {
                self.ask(node, ask);
            }
        }
        let delay = self.rng.between(MS / 2, self.pace);
        self.at(delay, Happens::Guest);
    }

    pub fn ask(&mut self, node: usize, ask: Ask) {
        match ask {
            Ask::Request { op, request, stamps, change } => {
                self.nodes[node].payloads.insert(Job::Guest(op), Payload { stamps, op: change });
                self.step(node, Event::Guest { op, request });
            }
            Ask::Read { op, file, sector } => self.then(node, Then::ReadBegin(op, file, sector)),
        }
    }

    /// The VM starts on a node.
    pub fn start_vm(&mut self, node: usize) {
        let lost = self.nodes[node].lost;
        self.note(|| format!("the VM starts on n{node}, lost: {lost}"));
        self.guest.crash(self.now);
        if std::mem::take(&mut self.nodes[node].lost) {
            self.guest.unflushed_lost(self.now);
        }
        self.guest.node = Some(node);
    }

    // --- the end

    /// Faults end; both nodes come back, and in bounded time all is equal and green.
    ///
    /// # Panics
    /// Where it is not.
    pub fn settle(&mut self) {
        self.faults.off();
        self.net.works = true;
        self.register.reached = [true; 2];
        self.net.slow_ns = 0;
        for node in [0, 1] {
            self.nodes[node].disk.fault = None;
            if self.nodes[node].control.gave_up && !self.nodes[node].disk.marks.erred {
                // R3: the last replica, whose disk failed and is well again: its process is restarted.
                self.kill(node);
            }
            self.at(0, Happens::Boot(node));
        }
        let deadline = self.now + 200 * SECOND;
        self.depth = self.depth.min(2);
        while !self.is_green() {
            assert!(self.now < deadline, "not green 200 s after the last fault: {}", self.describe());
            self.run_until(self.now + 100 * MS);
        }
        self.depth = 0;
        while self.guest.in_hand() > 0 || !self.is_green() {
            assert!(self.now < deadline, "requests are not answered: {}", self.describe());
            self.run_until(self.now + 10 * MS);
        }
        if let Some(difference) = self.nodes[0].disk.now.difference(&self.nodes[1].disk.now) {
            panic!("the replicas differ: {difference}");
        }
        let node = self.guest.node.expect("green");
        let content = self.nodes[node].disk.now.clone();
        self.guest.check_all(self.now, |cell| match cell {
            Cell::Sector(file, sector) => content.get(file, sector),
            Cell::Name(n) => content.tree.lookup(FileId::ROOT, &name(n)).map_or(0, |id| id.0),
        });
    }

    /// The VM runs on the holder, both are in sync, sound, and know it.
    pub fn is_green(&self) -> bool {
        let record: &Record = &self.register.record;
        let knows = |node: usize| {
            self.is_up(node) && self.nodes[node].replica.as_ref().and_then(Replica::record) == Some(record)
        };
        let vm = self.guest.node.is_some_and(|node| replica_of(node) == record.holder);
        let sound = self.nodes.iter().all(|node| node.disk.marks == Marks::default());
        record.in_sync.len() == 2 && sound && knows(0) && knows(1) && vm
    }

    pub fn describe(&self) -> String {
        let nodes = [0, 1].map(|node| {
            let it = &self.nodes[node];
            let replica = it.replica.as_ref().map(|r| (r.role(), r.gate(), r.in_hand(), r.dirty_bytes()));
            format!("n{node}: {replica:?} {:?} marks {:?}", it.control, it.disk.marks)
        });
        format!("{:?}\n{}\n{}\nguest on {:?}", self.register.record, nodes[0], nodes[1], self.guest.node)
    }

    /// The last lines of the trace, for a failure.
    pub fn print_trace(&self) {
        for line in self.trace.iter().flatten() {
            println!("{line}");
        }
    }

    /// A disk of a node fails from now on.
    pub fn fail_disk(&mut self, node: usize, errno: Errno) {
        self.note(|| format!("n{node}'s disk fails: {errno:?}"));
        self.nodes[node].disk.fault = Some(errno);
    }
}
