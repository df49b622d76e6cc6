//! A stand-in for a module process: it follows the record, mirrors a few blocks, drops and joins its peer, takes over and
//! hands over, by PROTOCOL.md and with the real arbiter. One guest operation at a time; no log, no map: a resync copies.
use crate::check::{BLOCKS, Blocks, Riser};
use crate::world::{ACCEPTORS, Message, REPLICAS, SECOND, World};
use vmtwin_core::arbiter::{Arbiter, Change, Effect, Event, Setup};
use vmtwin_core::ids::{RecordId, ReplicaId};
use vmtwin_core::record::{Record, RecordName};
use vmtwin_core::time::{Time, millis};
use vmtwin_tests::Rng;

/// What outlives the process; what outlives power, too, is `flushed`, the record and the mark.
#[derive(Clone, Debug, Default)]
pub struct Disk {
    pub blocks: Blocks,
    pub flushed: Blocks,
    pub record: Option<Record>,
    pub broken: bool,
}

impl Disk {
    pub fn lose_power(&mut self, rng: &mut Rng) {
        for block in 0..BLOCKS {
            if rng.chance(700) {
                self.blocks[block] = self.flushed[block];
            }
        }
        self.flushed = self.blocks;
        self.broken = true;
    }
}

/// The peer link. A session belongs to one record, and an operation has a number in it.
#[derive(Clone, Debug)]
pub enum LinkMessage {
    Hello { session: u64, record: Record },
    Welcome { session: u64, taken: bool, broken: bool },
    Do { session: u64, number: u64, what: Operation },
    Done { session: u64, number: u64 },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    Write {
        block: usize,
        stamp: u64,
    },
    Flush,
    /// Everything, to a peer in sync whose last writes may not have arrived (R13).
    Resend(Blocks),
    /// Everything, to a peer that is out.
    Copy(Blocks),
    /// Both sides flush, the peer's mark ends; then it may join (R5).
    Prove,
    /// Both sides flush before the release.
    HandOver,
}

struct Pending {
    what: Operation,
    number: u64,
    since: Time,
    sent: Option<(u64, Time)>,
    peer_done: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Mirror {
    No,
    /// Copied or being copied; every write goes to both.
    Copying,
    /// The join was sent: both answers count until the outcome is known (R9).
    Joining,
}

pub struct Module {
    pub life: u64,
    node: usize,
    pub arbiter: Arbiter,
    /// The guest runs here (or is paused) since this node became holder.
    risen: bool,
    // As holder.
    session: u64,
    session_record: Option<RecordName>,
    welcome: Option<Time>,
    peer_broken: bool,
    next_hello: Time,
    pending: Option<Pending>,
    mirror: Mirror,
    number: u64,
    next_guest: Time,
    pub wants_swap: bool,
    released_at: Option<Time>,
    // As follower.
    following: Option<u64>,
    copied: bool,
    last_number: u64,
    /// A takeover or restart of its own is wanted: nothing is admitted until its outcome is known (R7).
    proposing: Option<RecordId>,
}

const PEER_SLOW_MS: u64 = 1500;
const AGAIN_MS: u64 = 150;

impl Module {
    pub fn start(world: &mut World, node: usize, life: u64) -> Self {
        let now = world.local(node);
        let disk = &world.disks[node];
        let setup = Setup {
            me: REPLICAS[node],
            own: ACCEPTORS[node],
            acceptors: ACCEPTORS.to_vec(),
            record: disk.record.clone(),
            broken: disk.broken,
            first_nonce: world.rng.bits(),
        };
        Self {
            life,
            node,
            arbiter: Arbiter::with_rules(setup, now, world.sabotage.rules),
            risen: false,
            session: 0,
            session_record: None,
            welcome: None,
            peer_broken: false,
            next_hello: now,
            pending: None,
            mirror: Mirror::No,
            number: 0,
            next_guest: now,
            wants_swap: false,
            released_at: None,
            following: None,
            copied: false,
            last_number: 0,
            proposing: None,
        }
    }

    /// Started anew: a recorded holder that is unbroken goes on by a round. Its drain is trivial here.
    pub fn began(&mut self, world: &mut World) {
        let disk = &world.disks[self.node];
        if disk.record.as_ref().is_some_and(|record| record.holder == self.me()) {
            self.want(world, Change::GoOn, true);
        }
    }

    fn me(&self) -> ReplicaId {
        REPLICAS[self.node]
    }

    fn peer(&self) -> ReplicaId {
        REPLICAS[1 - self.node]
    }

    /// An operator's `prim`: asks for a takeover whether the holder lives or not. The acceptors know better.
    pub fn prim(&mut self, world: &mut World) {
        if !self.risen && self.proposing.is_none() {
            self.want(world, Change::TakeOver, true);
        }
    }

    fn want(&mut self, world: &mut World, change: Change, proposes_itself: bool) {
        let id = RecordId(world.rng.id());
        if proposes_itself {
            self.proposing = Some(id);
            self.following = None;
        }
        self.step(world, Event::Want { id, change });
    }

    pub fn step(&mut self, world: &mut World, event: Event) {
        let mut effects = Vec::new();
        self.arbiter.step(world.local(self.node), event, &mut effects);
        for effect in effects {
            world.carry_out(self.node, &effect);
            match effect {
                Effect::Known(record) => self.known(world, record),
                Effect::NotLanded(id) if self.proposing == Some(id) => self.proposing = None,
                Effect::NotLanded(_) => {}
                Effect::Lease(until) => {
                    let until = world.true_time(self.node, until);
                    world.truth.lease(self.node, world.now, until);
                }
                Effect::HolderSilent { .. } | Effect::Offered(_) if self.proposing.is_none() => {
                    self.want(world, Change::TakeOver, true);
                }
                Effect::HolderSilent { .. }
                | Effect::Offered(_)
                | Effect::HolderHeard
                | Effect::Released(_)
                | Effect::AcceptorOut { .. }
                | Effect::Ask { .. } => {}
            }
        }
    }

    fn known(&mut self, world: &mut World, record: Record) {
        world.truth.known(world.now, &record);
        let disk = &mut world.disks[self.node];
        disk.record = Some(record.clone());
        if record.holder != self.me() {
            // Whoever is not the holder destroys its VM.
            self.risen = false;
            self.pending = None;
            self.mirror = Mirror::No;
            self.released_at = None;
            return;
        }
        if !self.arbiter.is_holder() {
            return;
        }
        let own = self.proposing.take() == Some(record.id);
        self.released_at = None;
        if !self.risen {
            self.risen = true;
            self.following = None;
            self.mirror = Mirror::No;
            self.pending = None;
            let broken = disk.broken;
            let blocks = disk.blocks;
            if record.in_sync == [self.me()] {
                disk.broken = false;
            }
            let other_was_there = self.other_was_there(world);
            world.truth.rise(world.now, &Riser { node: self.node, blocks, broken, other_was_there });
            if record.in_sync.len() == 2 && own {
                // Handed over: both disks are equal, nothing is sent again.
                let other = world.disks[1 - self.node].blocks;
                world.truth.taken_for_equal(world.now, &blocks, &other);
                world.truth.settled();
            } else {
                self.begin(world, Operation::Resend(blocks));
            }
        }
    }

    /// Whether a broken node had to leave it to the other one: that one could have taken over for long.
    fn other_was_there(&self, world: &World) -> bool {
        let other = 1 - self.node;
        let there = world.sites[other].trouble.saturating_add(8 * SECOND) < world.now && world.modules[other].is_some();
        let before = world.truth.before_latest();
        there && !world.disks[other].broken && before.is_some_and(|record| record.is_in_sync(self.peer()))
    }

    /// Called at each wake-up of the process.
    pub fn beat(&mut self, world: &mut World) {
        let now = world.local(self.node);
        if self.released_at.is_some_and(|at| now.since(at) > millis(3000)) {
            self.released_at = Some(now);
            self.want(world, Change::TakeBack, false);
        }
        let Some(record) = self.arbiter.known().cloned() else { return };
        if !self.risen || !self.arbiter.is_holder() {
            return;
        }
        if self.session_record != Some(record.name()) {
            world.lives += 1;
            (self.session, self.session_record) = (world.lives, Some(record.name()));
            (self.welcome, self.next_hello) = (None, now);
        }
        if now >= self.next_hello {
            self.next_hello = now + millis(AGAIN_MS);
            self.say(world, LinkMessage::Hello { session: self.session, record: record.clone() });
        }
        self.care_for_the_peer(world, now, &record);
        self.push_on(world, now);
        self.let_the_guest_work(world, now, &record);
    }

    fn say(&self, world: &mut World, message: LinkMessage) {
        world.send(self.node, 1 - self.node, Message::Link(message));
    }

    fn peer_is_up(&self, now: Time) -> bool {
        self.welcome.is_some_and(|at| now.since(at) < millis(PEER_SLOW_MS))
    }

    /// Whether the peer's answer counts (R2, R9).
    fn needs_peer(&self, world: &World) -> bool {
        let in_sync = self.arbiter.known().is_some_and(|record| record.is_in_sync(self.peer()));
        let dropping = matches!(self.arbiter.want(), Some((_, Change::Drop(_))));
        if world.sabotage.acknowledges_before_drop_is_known && dropping {
            return false;
        }
        in_sync || self.mirror != Mirror::No || self.arbiter.is_unsettled()
    }

    fn care_for_the_peer(&mut self, world: &mut World, now: Time, record: &Record) {
        let in_sync = record.is_in_sync(self.peer());
        let idle = self.arbiter.want().is_none() && !self.arbiter.is_unsettled();
        if self.mirror == Mirror::Joining && idle {
            self.mirror = Mirror::No;
        }
        let dropping = matches!(self.arbiter.want(), Some((_, Change::Drop(_))));
        let late = self.pending.as_ref().is_some_and(|p| !p.peer_done && now.since(p.since) > millis(PEER_SLOW_MS));
        let broken = in_sync && self.peer_broken && self.mirror == Mirror::No;
        if self.mirror == Mirror::Copying && late {
            // The join was not sent: nothing of it counts.
            self.mirror = Mirror::No;
            if self.pending.as_ref().is_some_and(|p| matches!(p.what, Operation::Copy(_) | Operation::Prove)) {
                self.pending = None;
            }
        } else if !dropping && (broken || (late && (in_sync || self.mirror == Mirror::Joining))) {
            self.want(world, Change::Drop(self.peer()), false);
        } else if !in_sync && idle && self.mirror == Mirror::No && self.pending.is_none() && self.peer_is_up(now) {
            self.mirror = Mirror::Copying;
            let blocks = world.disks[self.node].blocks;
            self.begin(world, Operation::Copy(blocks));
        }
    }

    fn begin(&mut self, world: &mut World, what: Operation) {
        self.number += 1;
        let since = world.local(self.node);
        self.pending = Some(Pending { what, number: self.number, since, sent: None, peer_done: false });
        self.push_on(world, since);
    }

    /// Sends what is in hand, and ends it when all answered.
    fn push_on(&mut self, world: &mut World, now: Time) {
        let needs_peer = self.needs_peer(world);
        let up = self.peer_is_up(now);
        let session = self.session;
        let Some(pending) = &mut self.pending else { return };
        if pending.peer_done || !needs_peer {
            let Some(done) = self.pending.take() else { return };
            self.done(world, now, done.what);
            return;
        }
        // A new session repeats what is unanswered.
        let due = pending.sent.is_none_or(|(s, at)| s != session || now.since(at) > millis(AGAIN_MS));
        if up && due {
            pending.sent = Some((session, now));
            let message = LinkMessage::Do { session, number: pending.number, what: pending.what };
            self.say(world, message);
        }
    }

    fn done(&mut self, world: &mut World, now: Time, what: Operation) {
        let disk = &mut world.disks[self.node];
        match what {
            Operation::Write { block, stamp } => world.truth.acknowledged(world.now, block, stamp),
            Operation::Flush => {
                disk.flushed = disk.blocks;
                world.truth.flushed();
            }
            Operation::Resend(_) => world.truth.settled(),
            Operation::Copy(_) => self.begin(world, Operation::Prove),
            Operation::Prove => {
                disk.flushed = disk.blocks;
                self.mirror = Mirror::Joining;
                self.want(world, Change::Join(self.peer()), false);
            }
            Operation::HandOver => {
                disk.flushed = disk.blocks;
                world.truth.flushed();
                self.released_at = Some(now);
                self.step(world, Event::Release { to: Some(self.peer()) });
            }
        }
    }

    fn let_the_guest_work(&mut self, world: &mut World, now: Time, record: &Record) {
        let idle = world.guest_idle || self.pending.is_some();
        if idle || now < self.next_guest || now >= self.arbiter.lease() || !self.arbiter.is_holder() {
            return;
        }
        self.next_guest = now + millis(world.rng.between(20, 90));
        world.truth.admitted(world.now, self.node, &world.disks[self.node].blocks);
        let quiet = self.mirror == Mirror::No && self.arbiter.want().is_none() && !self.arbiter.is_unsettled();
        if self.wants_swap && quiet && record.is_in_sync(self.peer()) && self.peer_is_up(now) {
            self.wants_swap = false;
            self.begin(world, Operation::HandOver);
        } else if world.rng.chance(200) {
            self.begin(world, Operation::Flush);
        } else {
            let block = usize::try_from(world.rng.below(BLOCKS as u64)).unwrap();
            world.lives += 1;
            let stamp = world.lives;
            world.disks[self.node].blocks[block] = stamp;
            world.truth.written(block, stamp);
            self.begin(world, Operation::Write { block, stamp });
        }
    }

    pub fn heard(&mut self, world: &mut World, message: LinkMessage) {
        let now = world.local(self.node);
        match message {
            LinkMessage::Hello { session, record } => {
                self.step(world, Event::Told(record.clone()));
                let same = self.arbiter.known().map(Record::name) == Some(record.name());
                if !same || record.holder == self.me() || self.proposing.is_some() {
                    return;
                }
                // Frames of a session that is older than this process, or than the last one, would be late ones.
                let taken = session > self.life && self.following.is_none_or(|last| last <= session);
                if taken && self.following != Some(session) {
                    (self.following, self.copied, self.last_number) = (Some(session), false, 0);
                }
                let broken = world.disks[self.node].broken;
                self.say(world, LinkMessage::Welcome { session, taken, broken });
            }
            LinkMessage::Welcome { session, .. } if session != self.session => {}
            LinkMessage::Welcome { taken: false, .. } => self.session_record = None,
            LinkMessage::Welcome { broken, .. } => (self.welcome, self.peer_broken) = (Some(now), broken),
            LinkMessage::Do { session, .. } if self.following != Some(session) => {}
            LinkMessage::Do { session, number, what } => {
                let taken = number <= self.last_number || self.take(world, what);
                if taken {
                    self.last_number = self.last_number.max(number);
                    self.say(world, LinkMessage::Done { session, number });
                }
            }
            LinkMessage::Done { session, number } if session == self.session => {
                if let Some(pending) = self.pending.as_mut().filter(|pending| pending.number == number) {
                    pending.peer_done = true;
                    self.push_on(world, now);
                }
            }
            LinkMessage::Done { .. } => {}
        }
    }

    /// The follower's part. A broken replica takes nothing but a copy.
    fn take(&mut self, world: &mut World, what: Operation) -> bool {
        let disk = &mut world.disks[self.node];
        if let Operation::Copy(blocks) = what {
            (disk.blocks, self.copied) = (blocks, true);
            return true;
        }
        if disk.broken && !self.copied {
            return false;
        }
        match what {
            Operation::Write { block, stamp } => disk.blocks[block] = stamp,
            Operation::Resend(blocks) => disk.blocks = blocks,
            Operation::Flush | Operation::HandOver => disk.flushed = disk.blocks,
            Operation::Prove => {
                disk.flushed = disk.blocks;
                disk.broken = false;
                self.step(world, Event::Broken(false));
            }
            Operation::Copy(_) => {}
        }
        true
    }
}
