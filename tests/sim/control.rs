//! A stand-in for register, lease and control plane, that obeys PROTOCOL.md: one cell with delays and lost answers, a
//! lease that the register knows too, takeover only by an in-sync node after the lease has run out, after a drain (R1, R4,
//! R7, R9).
use super::world::{MS, World, replica_of};
use vmtwin_core::ids::{AcceptorId, RecordId, ReplicaId};
use vmtwin_core::limits::{LEASE_MS, TAKEOVER_MS};
use vmtwin_core::record::Record;
use vmtwin_core::replica::effect::Change;
use vmtwin_core::replica::event::Event;
use vmtwin_core::replica::{Gate, Role};
use vmtwin_tests::Rng;

/// The register and what its acceptors know of the lease.
pub struct Register {
    pub record: Record,
    lease: (ReplicaId, u64),
    rng: Rng,
    /// Whether a node reaches a majority.
    pub reached: [bool; 2],
    /// Sabotage: a node that is out takes over, too.
    pub anyone_takes_over: bool,
    /// Scenario: answers to changes take this long.
    pub answer_ns: Option<u64>,
    /// Scenario: nobody takes over.
    pub no_takeover: bool,
}

impl Register {
    pub fn new(mut rng: Rng) -> Self {
        let voters = vec![AcceptorId(1), AcceptorId(2), AcceptorId(3)];
        let first = Record::first(RecordId(rng.id()), replica_of(0), voters);
        let record = first.next(RecordId(rng.id()), replica_of(0), vec![replica_of(0), replica_of(1)]);
        Self {
            record,
            lease: (replica_of(0), 0),
            rng,
            reached: [true; 2],
            anyone_takes_over: false,
            answer_ns: None,
            no_takeover: false,
        }
    }
}

/// One node's control plane.
#[derive(Clone, Debug, Default)]
pub struct Control {
    pub booted: u64,
    /// As it was at the start of this process.
    pub broken: bool,
    pub known: Option<Record>,
    pub lease_until: u64,
    /// A change is under way, its outcome not known here.
    pub changing: bool,
    /// What is to be proposed after the drain.
    pub draining: Option<u64>,
    /// Its disk failed: it asks for no more grants.
    pub gave_up: bool,
    /// Its VM is being killed.
    pub killed: bool,
    pub token: u64,
    pub swap: Option<Swap>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Swap {
    Quiescing,
    Released,
}

/// What a control plane hears after a delay.
#[derive(Debug)]
pub enum News {
    /// The acceptors decide on a change now.
    Decide {
        base: RecordId,
        wanted: Record,
        takeover: bool,
    },
    Outcome {
        wanted: Record,
        landed: bool,
        takeover: bool,
    },
    FailHeld,
}

impl World {
    /// A look at the register, each 50 ms.
    pub fn poll(&mut self, node: usize) {
        if !self.register.reached[node] || self.nodes[node].control.changing {
            return;
        }
        let record = self.register.record.clone();
        let mine = record.holder == replica_of(node);
        let control = &self.nodes[node].control;
        if control.known.as_ref() != Some(&record) && (!mine || !control.broken || control.known.is_some()) {
            self.learn(node, record.clone());
        }
        let control = &mut self.nodes[node].control;
        let known = control.known.as_ref() == Some(&record);
        if mine && known && !control.gave_up && control.draining.is_none() && control.swap != Some(Swap::Released) {
            control.lease_until = self.now + (LEASE_MS - 150) * MS;
            self.register.lease = (replica_of(node), self.now + LEASE_MS * MS);
            self.step(node, Event::Tick);
            self.maybe_start_vm(node);
        } else if self.may_take_over(node, &record) && self.nodes[node].control.draining.is_none() {
            let control = &mut self.nodes[node].control;
            control.token += 1;
            control.draining = Some(control.token);
            let token = control.token;
            self.note(|| format!("n{node} wants to take over"));
            self.step(node, Event::Drain(token));
        }
    }

    fn maybe_start_vm(&mut self, node: usize) {
        let open = self.nodes[node].replica.as_ref().is_some_and(|replica| replica.gate() == Gate::Open);
        let control = &self.nodes[node].control;
        if open && self.guest.node != Some(node) && !control.killed && control.swap.is_none() {
            self.start_vm(node);
        }
    }

    fn may_take_over(&self, node: usize, record: &Record) -> bool {
        let control = &self.nodes[node].control;
        let disk = &self.nodes[node].disk;
        let in_sync = record.is_in_sync(replica_of(node)) && !disk.marks.erred;
        let (holder, until) = self.register.lease;
        let mut wait = if holder == replica_of(node) { 0 } else { TAKEOVER_MS * MS };
        let broken = control.broken && disk.marks.broken;
        if broken {
            // R4: an unbroken one goes first.
            wait += (LEASE_MS + TAKEOVER_MS) * MS;
            let other = 1 - node;
            let it = &self.nodes[other];
            let better = it.replica.is_some() && !it.disk.marks.broken && !it.disk.marks.erred;
            if record.is_in_sync(replica_of(other)) && better {
                return false;
            }
        }
        let mine = record.holder == replica_of(node);
        let due = self.now > until.max(control.booted) + wait;
        let wanted = (in_sync || self.register.anyone_takes_over) && (!mine || broken) && !control.gave_up;
        wanted && due && !self.register.no_takeover
    }

    /// A record is known here.
    pub fn learn(&mut self, node: usize, record: Record) {
        let me = replica_of(node);
        let was_mine = self.nodes[node].control.known.as_ref().is_some_and(|known| known.holder == me);
        let control = &mut self.nodes[node].control;
        (control.draining, control.swap) = (None, None);
        control.known = Some(record.clone());
        if record.holder != me {
            control.lease_until = 0;
            if was_mine {
                control.killed = true;
                let delay = self.rng.between(MS, 60 * MS);
                self.tell_control(delay, node, News::FailHeld);
            }
            self.nodes[node].control.gave_up = false;
        }
        self.step(node, Event::Record(record));
    }

    /// The machine wants a change of the record.
    pub fn proposed(&mut self, node: usize, change: Change) {
        let (me, peer) = (replica_of(node), replica_of(1 - node));
        let Some(known) = self.nodes[node].control.known.clone() else { return };
        let in_sync = match change {
            Change::DropPeer => vec![me],
            Change::JoinPeer => vec![me, peer],
        };
        if change == Change::JoinPeer {
            self.joins += 1;
        }
        let wanted = known.next(RecordId(self.register.rng.id()), me, in_sync);
        self.change(node, &known, wanted, false);
    }

    fn change(&mut self, node: usize, known: &Record, wanted: Record, takeover: bool) {
        self.nodes[node].control.changing = true;
        let delay = self.rng.between(MS, 20 * MS);
        self.tell_control(delay, node, News::Decide { base: known.id, wanted, takeover });
    }

    /// The disk of a node that wants to take over is at rest.
    pub fn drained(&mut self, node: usize, token: u64) {
        let me = replica_of(node);
        let record = self.register.record.clone();
        let control = &self.nodes[node].control;
        if control.draining != Some(token) {
            return;
        }
        if !self.register.reached[node] || !self.may_take_over(node, &record) {
            self.nodes[node].control.draining = None;
            return self.step(node, Event::Undrain);
        }
        let wanted = record.next(RecordId(self.register.rng.id()), me, vec![me]);
        self.change(node, &record, wanted, true);
    }

    /// A swap's first half is done.
    pub fn quiesced(&mut self, node: usize, _token: u64, both: bool) {
        let other = 1 - node;
        let record = self.register.record.clone();
        let control = &mut self.nodes[node].control;
        if control.swap != Some(Swap::Quiescing) {
            return;
        }
        if !both || control.known.as_ref() != Some(&record) {
            control.swap = None;
            return self.step(node, Event::Unquiesce);
        }
        // The release is given: from here on it serves nothing until it has read the register.
        control.swap = Some(Swap::Released);
        control.lease_until = 0;
        self.register.lease.1 = 0;
        if self.guest.node == Some(node) {
            self.guest.crash(self.now);
        }
        let both = vec![replica_of(0), replica_of(1)];
        let wanted = record.next(RecordId(self.register.rng.id()), replica_of(other), both);
        self.step(node, Event::Tick);
        let delay = self.rng.between(MS, 20 * MS);
        self.nodes[other].control.changing = true;
        self.tell_control(delay, other, News::Decide { base: record.id, wanted, takeover: true });
    }

    pub fn control(&mut self, node: usize, news: News) {
        match news {
            News::Decide { base, wanted, takeover } => {
                let me = replica_of(node);
                let (holder, until) = self.register.lease;
                let free = holder == me || self.now > until;
                let landed = self.register.reached[node] && self.register.record.id == base && (!takeover || free);
                if landed {
                    self.note(|| format!("the register takes {wanted:?}"));
                    self.register.record = wanted.clone();
                    if takeover {
                        // Whoever else wants it waits from here on.
                        self.register.lease = (me, self.now);
                    }
                }
                let slow = self.rng.chance(150);
                let delay = if slow { self.rng.between(100 * MS, 1500 * MS) } else { self.rng.between(MS, 20 * MS) };
                let delay = self.register.answer_ns.unwrap_or(delay);
                self.tell_control(delay, node, News::Outcome { wanted, landed, takeover });
            }
            News::Outcome { wanted, landed, takeover } => {
                if !self.register.reached[node] {
                    // It cannot know yet.
                    return self.tell_control(100 * MS, node, News::Outcome { wanted, landed, takeover });
                }
                let control = &mut self.nodes[node].control;
                control.changing = false;
                if landed {
                    self.learn(node, wanted);
                } else if takeover {
                    control.draining = None;
                    self.step(node, Event::Undrain);
                } else {
                    self.step(node, Event::NotLanded);
                }
                if self.is_up(node) {
                    self.poll(node);
                }
            }
            News::FailHeld => {
                if self.guest.node == Some(node) {
                    self.guest.crash(self.now);
                }
                let deposed = self.nodes[node].replica.as_ref().is_some_and(|replica| replica.role() != Role::Holder);
                if deposed {
                    self.step(node, Event::FailHeld);
                }
                self.nodes[node].control.killed = false;
            }
        }
    }

    /// A swap begins, if both are in sync.
    pub fn begin_swap(&mut self) {
        let holder = if self.register.record.holder == replica_of(0) { 0 } else { 1 };
        let ready = self.is_up(0) && self.is_up(1) && self.register.record.in_sync.len() == 2;
        let control = &mut self.nodes[holder].control;
        if ready && !control.changing && control.swap.is_none() && control.draining.is_none() {
            control.swap = Some(Swap::Quiescing);
            control.token += 1;
            let token = control.token;
            self.step(holder, Event::Quiesce(token));
        }
    }
}
