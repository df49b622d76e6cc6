//! Decides when a guest's write may be acknowledged, and keeps two copies of a directory equal. One machine per module
//! process, in both roles: holder, and follower or resync target.
//!
//! Holds: the record that is known, requests on their way, the session with the peer, activity log, dirty map, resync.
//! Keeps out: payload, buffers, sockets, files, the clock, the register.
//!
//! Role by the record: Idle (none known) | Holder | Follower (in sync) | Target (out).
//! Invariant: no write is acknowledged that a node of the in-sync set has not got, nor one that the peer has not got while
//! it may be in that set (R2, R3, R9).
//!
//! `event` says what comes in, `effect` what goes out; `guest` is the way of a request, `session` the link, `follower` the
//! other side, `catchup` the resync, `verify` the proof while both are in sync.
mod catchup;
pub mod effect;
pub mod event;
mod follower;
mod guest;
pub mod log;
pub mod map;
pub mod overlap;
mod session;
mod verify;

use crate::format::Owner;
use crate::ids::{ModuleId, ReplicaId, Sequence};
use crate::limits::{LINK_SILENT_MS, LOG_EXTENTS_MAX, SLOW_PEER_MS};
use crate::record::Record;
use crate::time::{Time, millis};
use crate::wire::codec::Writer;
use crate::wire::frame::{Header, Kind};
use effect::{Change, Effect, Marks, Payload, Work};
use event::{Errno, Event, Job, OpId};
use guest::{Op, Purpose};
use log::ActivityLog;
use map::{DirtyMap, Mark};
use overlap::{Overlap, Who};
use session::{Asked, Link};
use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// A peer in sync that has no session is dropped when a request has waited this long for it, in milliseconds.
pub const LINK_GRACE_MS: u64 = 500;
const _: () = assert!(LINK_GRACE_MS < SLOW_PEER_MS, "a link that is down is worse than a slow one");
/// One that has no session for this long is dropped though nothing waits for it, in milliseconds: whoever looks at an idle
/// holder should see whether it could go on alone. A peer whose process is only restarted is back before.
pub const IDLE_GRACE_MS: u64 = LINK_SILENT_MS + 1000;
const _: () = assert!(LINK_GRACE_MS < IDLE_GRACE_MS, "an idle guest is in less of a hurry than a waiting one");
/// A proposal that failed is made again after this time, in milliseconds.
const PROPOSE_AGAIN_MS: u64 = 200;
/// Slots of the log in use from which on it is flushed.
const LOG_HIGH: usize = LOG_EXTENTS_MAX / 4 * 3;

/// What does not change while the process lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Config {
    /// Which module.
    pub module: ModuleId,
    /// This replica.
    pub me: ReplicaId,
    /// The other one as far as it is known, 0 if not: a hello says who it really is.
    pub peer: ReplicaId,
    /// Version of the module's configuration, told to the peer.
    pub configuration: u64,
    /// A peer that holds up a write this long is dropped, in milliseconds.
    pub slow_peer_ms: u64,
    /// Durable marks, as they were found.
    pub marks: Marks,
}

/// What this node is by the record that it knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// No record is known.
    Idle,
    /// It may run the VM, while its lease lasts.
    Holder,
    /// The other one holds, this one is in sync.
    Follower,
    /// The other one holds, this one is out.
    Target,
}

/// What a guest's request finds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gate {
    /// Reads are served.
    Open,
    /// They wait.
    Held,
    /// They are answered EIO: the VM is being killed.
    Failing,
}

/// A rule that the simulator switches off, to show that it would be missed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rule {
    /// R2: an answer of every replica in sync comes before the guest's.
    Acknowledge,
    /// R10: the extent is durable in the activity log before the write goes out.
    Log,
    /// R10: extents stay in the log until every replica has flushed.
    Unflushed,
    /// R10: no overlapping write while one is in flight.
    Overlap,
    /// R7: nothing of an old session is believed.
    Session,
    /// R5: a replica joins when nothing is dirty.
    JoinEqual,
    /// R5: both have flushed before the join.
    JoinFlush,
    /// R9: while the outcome of a drop is unknown, the peer's answer is needed.
    DropKnown,
    /// R2: a follower's answer to a flush comes after its fdatasync.
    FollowerFlush,
    /// No false alarm: what a verification compares is at rest.
    VerifyAtRest,
}

/// The machine.
#[derive(Debug)]
pub struct Replica {
    config: Config,
    now: Time,
    rule_off: Option<Rule>,

    record: Option<Record>,
    lease: bool,
    fail_held: bool,
    drain: Option<Drain>,
    quiesce: Option<Quiesce>,
    proposed: Option<Change>,
    propose_at: Time,
    /// Why the peer in sync is to be dropped.
    peer_bad: Option<&'static str>,
    /// It stays bad even if the drop does not land at first: this process is new and knows not what the peer has.
    is_new: bool,

    marks: Marks,
    /// Marks are on their way to the disk; others have to follow.
    marks_due: bool,
    marks_again: bool,
    failed: Option<Errno>,
    /// To be told when the mark is durable.
    tell_failed: Option<Effect>,

    ops: BTreeMap<Job, Op>,
    held: VecDeque<Job>,
    logging: VecDeque<Job>,
    no_room: VecDeque<Job>,
    /// Answers that wait for the lease.
    unanswered: VecDeque<(OpId, Result<(), Errno>)>,
    overlap: Overlap,
    admitted: Vec<Who>,
    /// What this node's disk is doing.
    local: BTreeSet<Job>,
    own_next: u64,
    namespace_number: u64,

    link: Link,
    lost_since: Time,
    sequence: Sequence,
    sent: BTreeMap<Sequence, (Asked, Time)>,
    follower: follower::Follower,
    catchup: Option<catchup::Catchup>,
    verify: Option<verify::Verifying>,
    repair: Option<verify::Repair>,

    log: ActivityLog,
    map: DirtyMap,
    /// The number of the map's next snapshot: what is marked now is durable with it.
    map_next: u64,
    map_saving: bool,
    map_wanted: bool,
    look_at_log: bool,
    room_stamp: Option<u64>,
}

#[derive(Clone, Copy, Debug)]
struct Drain {
    token: u64,
    said: bool,
}

#[derive(Clone, Copy, Debug)]
struct Quiesce {
    token: u64,
    began: bool,
}

impl Replica {
    /// A machine that knows no record yet, over the metadata as it was found; `map_sequence` is that of the map's file. The
    /// log is folded into the map (R10).
    #[must_use]
    pub fn new(config: Config, log: ActivityLog, map: DirtyMap, map_sequence: u64) -> Self {
        let mut replica = Self {
            config,
            now: Time(0),
            rule_off: None,
            record: None,
            lease: false,
            fail_held: false,
            drain: None,
            quiesce: None,
            proposed: None,
            propose_at: Time(0),
            peer_bad: None,
            is_new: false,
            marks: config.marks,
            marks_due: false,
            marks_again: false,
            failed: config.marks.erred.then_some(Errno::EIO),
            tell_failed: None,
            ops: BTreeMap::new(),
            held: VecDeque::new(),
            logging: VecDeque::new(),
            no_room: VecDeque::new(),
            unanswered: VecDeque::new(),
            overlap: Overlap::default(),
            admitted: Vec::new(),
            local: BTreeSet::new(),
            own_next: 0,
            namespace_number: 0,
            link: Link::Down,
            lost_since: Time(0),
            sequence: Sequence(0),
            sent: BTreeMap::new(),
            follower: follower::Follower::default(),
            catchup: None,
            verify: None,
            repair: None,
            log,
            map,
            map_next: map_sequence + 1,
            map_saving: false,
            map_wanted: false,
            look_at_log: true,
            room_stamp: None,
        };
        replica.fold_log();
        replica
    }

    /// Breaks a rule. For the simulator only.
    #[doc(hidden)]
    pub fn without(mut self, rule: Option<Rule>) -> Self {
        self.rule_off = rule;
        self
    }

    /// What this node is.
    #[must_use]
    pub fn role(&self) -> Role {
        match &self.record {
            None => Role::Idle,
            Some(record) if record.holder == self.config.me => Role::Holder,
            Some(record) if record.is_in_sync(self.config.me) => Role::Follower,
            Some(_) => Role::Target,
        }
    }

    /// The record that is known.
    #[must_use]
    pub fn record(&self) -> Option<&Record> {
        self.record.as_ref()
    }

    /// Whether reads may be served now. The shell looks before it begins a read and before it answers one. A read that
    /// failed is told by `Event::ReadFailed` first: where the gate is still open then, the guest gets the error.
    #[must_use]
    pub fn gate(&self) -> Gate {
        let serving = self.is_holder() && self.lease && self.drain.is_none() && self.failed.is_none();
        match (self.fail_held, serving && !self.is_new) {
            (true, _) => Gate::Failing,
            (_, true) => Gate::Open,
            (_, false) => Gate::Held,
        }
    }

    /// Bytes that the peer has not got, or may have not.
    #[must_use]
    pub fn dirty_bytes(&self) -> u64 {
        self.map.bytes()
    }

    /// Requests of the guest that are not answered yet.
    #[must_use]
    pub fn in_hand(&self) -> usize {
        self.ops.len() + self.unanswered.len()
    }

    /// Takes an event; appends what is to be done to `out`.
    pub fn step(&mut self, now: Time, event: Event, out: &mut Vec<Effect>) {
        self.now = self.now.max(now);
        match event {
            Event::Record(record) => self.known(record, out),
            Event::NotLanded => self.not_landed(out),
            Event::Lease(open) => self.lease = open,
            Event::FailHeld => {
                self.fail_held = true;
                self.fail_guest(out);
            }
            Event::Drain(token) => {
                self.drain = Some(Drain { token, said: false });
                self.end_link("drain", out);
            }
            Event::Undrain => (self.drain, self.fail_held) = (None, false),
            Event::Quiesce(token) => self.quiesce = Some(Quiesce { token, began: false }),
            Event::Unquiesce => self.quiesce = None,
            Event::Guest { op, request } => self.guest(Job::Guest(op), request, out),
            Event::Done { job, result } => self.done(job, result, out),
            Event::ReadFailed(errno) => {
                if self.is_holder() && self.needs_peer() {
                    self.disk_failed(errno, out);
                }
            }
            Event::LogSaved { transaction } => self.log_saved(transaction, out),
            Event::MapSaved { version } => {
                self.map_saving = false;
                self.log.map_saved(version);
                self.look_at_log = true;
                self.resync_map_saved(version, out);
                self.verify_map_saved(version, out);
            }
            Event::MarksSaved => self.marks_saved(out),
            Event::Connected { nonce } => self.connected(nonce, out),
            Event::Disconnected => self.disconnected(out),
            Event::Hello(hello) => self.hello(hello, out),
            Event::Frame { header, body } => self.frame(header, body, out),
            Event::Verify { rate, repair } => self.begin_verify(rate, repair, out),
            Event::Tick => self.tick(out),
        }
        self.pump(out);
        self.check();
    }

    /// Does what the event made possible.
    fn pump(&mut self, out: &mut Vec<Effect>) {
        if self.lease {
            while let Some((op, result)) = self.unanswered.pop_front() {
                out.push(Effect::Complete { op, result });
            }
        }
        self.admit_held(out);
        self.advance_resync(out);
        self.make_room(out);
        self.advance_quiesce(out);
        if let Some(drain) = self.drain.as_mut().filter(|drain| !drain.said && self.local.is_empty()) {
            drain.said = true;
            out.push(Effect::Drained(drain.token));
        }
        self.propose(out);
        self.say_hello(out);
    }

    fn done(&mut self, job: Job, result: Result<event::Value, Errno>, out: &mut Vec<Effect>) {
        if !self.local.remove(&job) {
            return;
        }
        match job {
            Job::Peer(..) => self.peer_job_done(job, result, out),
            Job::Own(number) if !self.ops.contains_key(&job) => {
                if !self.verify_done(number, &result, out) {
                    self.resync_done(number, result, out);
                }
            }
            Job::Guest(_) | Job::Own(_) => self.op_done(job, result, out),
        }
    }

    fn tick(&mut self, out: &mut Vec<Effect>) {
        self.look_at_log = true;
        self.tick_resync(out);
        self.tick_verify(out);
        if !self.is_holder() || self.failed.is_some() {
            return;
        }
        let now = self.now;
        let waited = |since: Time, ms: u64| now.since(since) >= millis(ms);
        if self.oldest_asked().is_some_and(|since| waited(since, self.config.slow_peer_ms)) {
            self.peer_failed("the peer holds up a request", out);
        }
        if self.session().is_some() {
            return;
        }
        let since = self.ops.values().filter(|op| Self::is_due(op)).map(|op| op.since.max(self.lost_since)).min();
        let wanted = since.is_some_and(|since| waited(since, LINK_GRACE_MS));
        // Without a lease nobody would decide it, and the peer may be about to take over.
        let idle = self.lease && self.drain.is_none() && waited(self.lost_since, IDLE_GRACE_MS);
        if wanted || idle {
            self.peer_failed("no link to the peer", out);
        }
    }

    // --- the record

    /// A record is known: the outcome of what was proposed, and the role.
    fn known(&mut self, record: Record, out: &mut Vec<Effect>) {
        (self.drain, self.fail_held) = (None, false);
        if self.record.as_ref() == Some(&record) {
            return;
        }
        let me = self.config.me;
        let before = self.record.replace(record);
        let record = self.record.as_ref().expect("just put there");
        let was_holder = before.as_ref().is_some_and(|old| old.holder == me);
        let grew = before
            .as_ref()
            .is_some_and(|old| old.holder == record.holder && old.in_sync.iter().all(|one| record.is_in_sync(*one)));
        let proposed = self.proposed.take();
        (self.peer_bad, self.quiesce, self.repair) = (None, None, None);
        if record.holder == me {
            let in_sync = record.in_sync.iter().any(|one| *one != me);
            self.is_new = before.is_none() && in_sync;
            if self.is_new {
                self.peer_bad =
                    Some("this process is new: what was in its predecessor's hands may be on one side only");
            }
            if !was_holder {
                self.fail_guest(out);
                self.lost_since = self.now;
            }
            if self.marks.broken && !in_sync {
                self.set_marks(Marks { broken: false, ..self.marks }, out);
            }
            if in_sync && grew {
                self.map.clear();
                (self.map_wanted, self.look_at_log) = (true, true);
                if self.marks.suspect_all {
                    self.set_marks(Marks { suspect_all: false, ..self.marks }, out);
                }
                if proposed == Some(Change::JoinPeer) && self.is_joining() {
                    self.carry_over(out);
                } else {
                    self.end_link("the record changed", out);
                }
                self.catchup = None;
            } else {
                self.end_link("the record changed", out);
            }
            if !in_sync {
                self.fold_log();
                self.settle_all(out);
            }
        } else {
            let (name, in_sync) = (record.name(), record.is_in_sync(me));
            if was_holder {
                self.end_link("another node holds", out);
                self.drop_guest(out);
            }
            if in_sync {
                // Equal, as the holder has proved or been from the start: nothing here is suspect any more.
                self.map.clear();
                self.log.clear();
                (self.map_wanted, self.look_at_log) = (true, true);
            }
            if !grew {
                self.follower.forget_results(name);
                self.end_link("the record changed", out);
            }
        }
    }

    fn carry_over(&mut self, out: &mut Vec<Effect>) {
        let Some(session) = self.session() else { return };
        let mut bytes = Vec::new();
        self.record.as_ref().expect("a record is carried over").encode(&mut Writer::new(&mut bytes));
        let header = Header::new(Kind::NewRecord, session, Sequence(0));
        out.push(Effect::Send { header, payload: Payload::Bytes(bytes) });
    }

    fn not_landed(&mut self, out: &mut Vec<Effect>) {
        self.propose_at = self.now + millis(PROPOSE_AGAIN_MS);
        match self.proposed.take() {
            Some(Change::DropPeer) if !self.is_new => self.peer_bad = None,
            Some(Change::JoinPeer) => {
                self.end_link("the join did not happen", out);
                self.settle_all(out);
            }
            Some(Change::DropPeer) | None => {}
        }
    }

    fn propose(&mut self, out: &mut Vec<Effect>) {
        let due = self.peer_bad.is_some() && self.is_holder() && self.peer_in_sync() && self.failed.is_none();
        if due && self.proposed.is_none() && self.now >= self.propose_at && self.drain.is_none() {
            self.proposed = Some(Change::DropPeer);
            out.push(Effect::Propose(Change::DropPeer));
            if self.off(Rule::DropKnown) {
                self.settle_all(out);
            }
        }
    }

    /// The peer does not do its part: out with it, if it is in sync; a resync begins anew with the next session.
    fn peer_failed(&mut self, reason: &'static str, out: &mut Vec<Effect>) {
        if self.is_holder() && self.peer_in_sync() {
            self.peer_bad.get_or_insert(reason);
        }
        self.end_link(reason, out);
    }

    // --- conditions

    fn off(&self, rule: Rule) -> bool {
        self.rule_off == Some(rule)
    }

    fn is_holder(&self) -> bool {
        self.role() == Role::Holder
    }

    fn peer_in_sync(&self) -> bool {
        self.record.as_ref().is_some_and(|record| record.in_sync.iter().any(|one| *one != self.config.me))
    }

    /// Whether the peer's answer is needed: it is in sync, or may be (R9).
    fn needs_peer(&self) -> bool {
        if self.off(Rule::DropKnown) && self.proposed == Some(Change::DropPeer) {
            return false;
        }
        self.peer_in_sync() || self.proposed == Some(Change::JoinPeer)
    }

    /// Whether what the guest does goes to the peer too.
    fn is_mirroring(&self) -> bool {
        let ready = self.peer_in_sync() || self.catchup.as_ref().is_some_and(catchup::Catchup::is_mirroring);
        self.session().is_some() && self.is_holder() && self.peer_bad.is_none() && ready
    }

    fn is_admitting(&self) -> bool {
        let open = self.is_holder() && self.lease && !self.is_new;
        let held = self.quiesce.is_some() || self.catchup.as_ref().is_some_and(catchup::Catchup::is_holding);
        open && !held && self.drain.is_none() && self.failed.is_none()
    }

    // --- this node's disk

    fn local(&mut self, job: Job, work: Work, out: &mut Vec<Effect>) {
        let fresh = self.local.insert(job);
        assert!(fresh, "a job runs once");
        out.push(Effect::Local { job, work });
    }

    fn next_own(&mut self) -> Job {
        self.own_next += 1;
        Job::Own(self.own_next)
    }

    /// R3: this disk failed. Nothing is acknowledged on it any more.
    fn disk_failed(&mut self, errno: Errno, out: &mut Vec<Effect>) {
        if self.failed.is_some() {
            return;
        }
        self.failed = Some(errno);
        let last = self.is_holder() && !self.needs_peer();
        self.tell_failed = Some(if last { Effect::Stuck(errno) } else { Effect::Erred(errno) });
        let marks = Marks { broken: self.marks.broken || last, erred: self.marks.erred || !last, ..self.marks };
        self.set_marks(marks, out);
        if self.is_holder() {
            self.end_link("this node's disk failed", out);
        }
    }

    fn set_marks(&mut self, marks: Marks, out: &mut Vec<Effect>) {
        self.marks = marks;
        self.marks_again = self.marks_due;
        if !self.marks_due {
            self.marks_due = true;
            out.push(Effect::SaveMarks(marks));
        }
    }

    fn marks_saved(&mut self, out: &mut Vec<Effect>) {
        if std::mem::take(&mut self.marks_again) {
            out.push(Effect::SaveMarks(self.marks));
            return;
        }
        self.marks_due = false;
        out.extend(self.tell_failed.take());
        self.answer_after_marks(out);
    }

    // --- log and map

    /// All that the log suspects is marked in the map: the peer is out, and what it had not flushed may be lost (R10).
    fn fold_log(&mut self) {
        for (file, range) in self.log.suspects() {
            self.map.mark(Mark::Compare, file, &range);
        }
        self.log.folded(self.map_next);
        self.look_at_log = true;
    }

    /// Orders the next transaction of the log; makes room in it before it is full.
    fn make_room(&mut self, out: &mut Vec<Effect>) {
        if !std::mem::take(&mut self.look_at_log) {
            return;
        }
        for _ in 0..self.no_room.len() {
            let job = self.no_room.pop_front().expect("as long as it was");
            if self.ops.get(&job).is_some_and(|op| op.stage == guest::Stage::NoRoom) {
                self.log_in(job, out);
            }
        }
        self.look_at_log = false;
        if let Some(transaction) = self.log.transaction() {
            let log::Transaction { number, offset, bytes } = transaction;
            out.push(Effect::SaveLog { transaction: number, offset, bytes });
        }
        let full = !self.no_room.is_empty() || self.log.kept() >= LOG_HIGH;
        if (self.map_wanted || full && !self.peer_in_sync()) && !self.map_saving {
            self.save_map(out);
        }
        if !full {
            return;
        }
        let stamp = Some(self.log.stamp());
        let possible = self.is_holder() && self.failed.is_none() && (!self.needs_peer() || self.is_mirroring());
        if possible && stamp != self.room_stamp && !self.has_own(Purpose::Room) {
            self.room_stamp = stamp;
            self.own_flush(Purpose::Room, out);
        }
    }

    fn save_map(&mut self, out: &mut Vec<Effect>) {
        (self.map_saving, self.map_wanted) = (true, false);
        let owner = Owner { module: self.config.module, replica: self.config.me };
        let bytes = self.map.snapshot(owner, self.map_next);
        out.push(Effect::SaveMap { version: self.map_next, bytes });
        self.map_next += 1;
    }

    fn advance_quiesce(&mut self, out: &mut Vec<Effect>) {
        let Some(Quiesce { token, began: false }) = self.quiesce else { return };
        if !self.is_holder() {
            self.quiesce = Some(Quiesce { token, began: true });
            return out.push(Effect::Quiesced { token, both: false });
        }
        let idle = self.ops.values().all(|op| op.stage == guest::Stage::Held);
        if idle && self.failed.is_none() {
            self.quiesce = Some(Quiesce { token, began: true });
            self.own_flush(Purpose::Quiesce(token), out);
        }
    }

    /// Asserts the invariants; all of them where debug assertions are on.
    fn check(&self) {
        assert!(self.sent.is_empty() || self.session().is_some(), "nothing is asked outside of a session");
        if cfg!(debug_assertions) {
            if self.rule_off.is_none() {
                self.overlap.check();
            }
            let flying = self.ops.values().any(|op| op.stage == guest::Stage::Flying);
            assert!(self.is_holder() || !flying, "only a holder's requests are out");
        }
    }
}
