//! One state of the model: the real `Arbiter` of two nodes and the real `Acceptor` of three sites, what is under way between
//! them, one replicated cell, and what an observer knows whom no fault touches.
//!
//! Time stands still until `Action::Pass`, half a lease or a whole one; each site's clock goes by its own rate. Whatever may
//! happen at one instant happens in any order. An exchange with the node's own acceptor is one step with what caused it, and
//! what an acceptor stores is durable at once. Loss is a message that is never delivered: no action is needed for it.
use std::collections::VecDeque;
use std::sync::Arc;
use vmtwin_core::arbiter::message::{Answer, Request};
use vmtwin_core::arbiter::rules::Rules;
use vmtwin_core::arbiter::{Acceptor, Arbiter, Change, Effect, Event, Setup, Stored};
use vmtwin_core::ids::{AcceptorId, ModuleId, RecordId, ReplicaId};
use vmtwin_core::record::{Record, RecordName};
use vmtwin_core::time::Time;

pub const WITNESS: usize = 2;
const REPLICAS: [ReplicaId; 2] = [ReplicaId(0xa), ReplicaId(0xb)];
const ACCEPTORS: [AcceptorId; 3] = [AcceptorId(1), AcceptorId(2), AcceptorId(3)];
/// So many accepts of one node are under way to one acceptor; an older one is lost.
const ACCEPTS_UNDER_WAY: usize = 2;

/// What a run explores, and what of the protocol is switched off in it.
#[derive(Clone, Copy, Debug)]
pub struct Space {
    /// The holder at the beginning.
    pub holder: usize,
    /// Whether the other node is in sync then.
    pub in_sync: bool,
    /// Milliseconds of each site's clock that pass at a time.
    pub clocks: [u64; 3],
    pub left: Left,
    /// No ballot has a higher number than this.
    pub ballots: u64,
    /// Whether each node reaches the other one's acceptor, or the witness's and its own only.
    pub reaches: [bool; 2],
    /// Whether renewals arrive after the beginning.
    pub renews: bool,
    /// Whether acceptors are read after the beginning; else nodes learn by rounds and from the holder.
    pub reads: bool,
    pub off: Sabotage,
}

/// How often each of these may still happen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Left {
    pub passes: u8,
    pub takeovers: u8,
    pub drops: u8,
    pub joins: u8,
    /// Releases to the other node, and their taking back.
    pub releases: u8,
    pub writes: u8,
    /// A module process is killed.
    pub kills: u8,
    /// A node loses power: broken.
    pub powers: u8,
    /// A `keep` or the witness restarts.
    pub keeps: u8,
    /// An answer is held back.
    pub late: u8,
    /// A request arrives twice.
    pub repeats: u8,
}

/// Rules that are broken on purpose: the core's, and those that the stand-in for a module process keeps.
#[derive(Clone, Copy, Debug)]
pub struct Sabotage {
    pub rules: Rules,
    /// R3: acknowledges alone as soon as the drop is wanted.
    pub acknowledges_before_drop_is_known: bool,
    /// R5: a peer is joined without having been copied to.
    pub joins_unequal: bool,
    /// R6: a resync copies from whoever wrote last, not from the holder.
    pub copies_the_newer: bool,
    /// R7: a frame is taken whatever its session.
    pub takes_any_frame: bool,
    /// R9: a write needs no peer while a join's outcome is unknown.
    pub join_counts_when_known: bool,
    /// R12: an acceptor forgets its promise in a restart.
    pub promise_lost_in_restart: bool,
}

pub const NOTHING: Sabotage = Sabotage {
    rules: Rules::ALL,
    acknowledges_before_drop_is_known: false,
    joins_unequal: false,
    copies_the_newer: false,
    takes_any_frame: false,
    join_counts_when_known: false,
    promise_lost_in_restart: false,
};

/// What may happen next. Numbers without a name are places in `asks` or `late`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    Pass,
    /// A request arrives, its answer too.
    Exchange(usize),
    /// A request arrives, its answer will be late.
    Hold(usize),
    /// A request arrives and will arrive again.
    Repeat(usize),
    /// A late answer arrives.
    Late(usize),
    TakeOver(usize),
    Drop(usize),
    Join(usize),
    HandOver(usize),
    TakeBack(usize),
    /// The holder tells its peer which record it knows.
    Tell(usize),
    Write(usize),
    /// The frame under way to the peer arrives, and its answer.
    Frame,
    /// A holder that goes on repeats to its peer what it has (R13).
    Resend(usize),
    Kill(usize),
    PowerOff(usize),
    Start(usize),
    RestartKeep(usize),
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct World {
    left: Left,
    passed: u64,
    acceptors: [Arc<Acceptor>; 3],
    powered: [bool; 2],
    nodes: [Node; 2],
    asks: Vec<Ask>,
    late: Vec<Late>,
    frame: Option<Frame>,
    pub truth: Truth,
}

/// A module process and its disk.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Node {
    /// None: there is no process.
    arbiter: Option<Arc<Arbiter>>,
    lives: u64,
    wants: u128,
    /// The guest runs here since this node became holder.
    risen: bool,
    /// A takeover or restart of its own is wanted: nothing is admitted until its outcome is known (R7).
    proposing: Option<RecordId>,
    /// A join was sent: the peer's answer counts until the outcome is known (R9).
    joining: bool,
    /// A write that waits for the peer.
    pending: Option<u8>,
    resend: bool,
    value: u8,
    flushed: u8,
    record: Option<Arc<Record>>,
    broken: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Ask {
    node: usize,
    site: usize,
    nonce: u64,
    request: Arc<Request>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Late {
    node: usize,
    site: usize,
    nonce: u64,
    answer: Arc<Answer>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Frame {
    from: usize,
    value: u8,
    session: RecordName,
}

/// What the guest saw and was told, and what the register has chosen.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Truth {
    last_write: u8,
    /// What the running guest sees.
    visible: u8,
    acked: u8,
    /// Acknowledged at the last flush: what a lone disk that lost power has at least.
    durable: u8,
    /// Written by a guest that may be gone, never acknowledged: may be found or not.
    maybe: Vec<u8>,
    /// What the last riser found: a write that it holds may still be acknowledged to the guest of before.
    found: u8,
    pub chosen: Option<Arc<Record>>,
    /// A holder that was not in the in-sync set of the record before.
    pub usurped: Option<String>,
    /// Two records of one generation, or an older one after a newer.
    pub forked: Option<String>,
    /// A riser or a running guest that has not what was acknowledged.
    pub lost: Option<String>,
}

fn site_of(id: AcceptorId) -> usize {
    ACCEPTORS.iter().position(|known| *known == id).expect("a voter of this world")
}

fn kind(request: &Request) -> u8 {
    match request {
        Request::Read { .. } => 0,
        Request::Prepare { .. } => 1,
        Request::Accept { .. } => 2,
        Request::Renew { .. } => 3,
        Request::Release { .. } => 4,
    }
}

impl World {
    /// The holder has the first record, the other node knows it, and where the space says so, has joined.
    pub fn begin(space: &Space) -> Self {
        let (goal, space) = (space, &Space { reaches: [true; 2], reads: true, renews: true, ..*space });
        let acceptor = |site: usize| {
            let stored = Stored::new(ModuleId(1), ACCEPTORS[site]);
            Arc::new(Acceptor::with_rules(stored, Self::clock(space, 0, site), space.off.rules))
        };
        let node = Node {
            arbiter: None,
            lives: 0,
            wants: 0,
            risen: false,
            proposing: None,
            joining: false,
            pending: None,
            resend: false,
            value: 0,
            flushed: 0,
            record: None,
            broken: false,
        };
        let mut world = Self {
            left: Left { joins: 1, passes: 1, ..Left::default() },
            passed: 0,
            acceptors: [acceptor(0), acceptor(1), acceptor(2)],
            powered: [true; 2],
            nodes: [node.clone(), node],
            asks: Vec::new(),
            late: Vec::new(),
            frame: None,
            truth: Truth::default(),
        };
        world.start(space, 0);
        world.start(space, 1);
        let holder = space.holder;
        let id = RecordId(1);
        let first = Record::first(id, REPLICAS[holder], ACCEPTORS.to_vec());
        world.event(space, holder, Event::Want { id, change: Change::First(first) });
        world.quiesce(space);
        world.act(space, Action::Tell(holder));
        if space.in_sync {
            world.act(space, Action::Join(holder));
            world.quiesce(space);
            world.act(space, Action::Tell(holder));
        }
        // Everybody has read what everybody holds, and the lease is fresh.
        world.act(space, Action::Pass);
        world.quiesce(space);
        world.left = goal.left;
        world
    }

    fn quiesce(&mut self, space: &Space) {
        while !self.asks.is_empty() {
            self.act(space, Action::Exchange(0));
        }
    }

    fn clock(space: &Space, passed: u64, site: usize) -> Time {
        Time::from_millis(10_000 + passed * space.clocks[site])
    }

    fn now(&self, space: &Space, site: usize) -> Time {
        Self::clock(space, self.passed, site)
    }

    fn known(&self, node: usize) -> Option<&Record> {
        self.nodes[node].arbiter.as_ref().and_then(|arbiter| arbiter.known())
    }

    fn is_holder(&self, node: usize) -> bool {
        self.nodes[node].arbiter.as_ref().is_some_and(|arbiter| arbiter.is_holder())
    }

    pub fn is_within(&self, space: &Space) -> bool {
        self.acceptors.iter().all(|acceptor| acceptor.stored().promised.number <= space.ballots)
    }

    pub fn has_lease(&self, space: &Space, node: usize) -> bool {
        let lasts = |arbiter: &Arc<Arbiter>| arbiter.is_holder() && self.now(space, node) < arbiter.lease();
        self.nodes[node].arbiter.as_ref().is_some_and(lasts)
    }

    /// Whether a record was chosen since the beginning with so many in sync, by another holder or by the same.
    pub fn is_changed(&self, space: &Space, other_holder: bool, in_sync: usize) -> bool {
        self.truth.chosen.as_ref().is_some_and(|record| {
            let since = record.generation.0 > if space.in_sync { 2 } else { 1 };
            since && (record.holder != REPLICAS[space.holder]) == other_holder && record.in_sync.len() == in_sync
        })
    }

    /// The guest that may go on finds what it last saw.
    pub fn guest_sees_its_own(&self, space: &Space) -> bool {
        let fine = |node: usize| {
            let guest = self.nodes[node].risen && self.has_lease(space, node);
            !guest || self.nodes[node].value == self.truth.visible
        };
        fine(0) && fine(1)
    }

    // ---- what may happen

    pub fn actions(&self, space: &Space, out: &mut Vec<Action>) {
        if self.left.passes > 0 {
            out.push(Action::Pass);
        }
        for (at, ask) in self.asks.iter().enumerate() {
            if self.is_up(ask.site) {
                out.push(Action::Exchange(at));
                let matters = kind(&ask.request) != 0 && self.is_asked_by_the_living(ask);
                if self.left.late > 0 && matters {
                    out.push(Action::Hold(at));
                }
                if self.left.repeats > 0 && kind(&ask.request) != 0 {
                    out.push(Action::Repeat(at));
                }
            }
        }
        out.extend((0..self.late.len()).map(Action::Late));
        for node in 0..2 {
            self.actions_of(space, node, out);
        }
        if self.frame.as_ref().is_some_and(|frame| self.may_take(space, frame)) {
            out.push(Action::Frame);
        }
        if self.left.keeps > 0 {
            out.extend((0..3).filter(|site| self.is_up(*site)).map(Action::RestartKeep));
        }
    }

    fn actions_of(&self, space: &Space, node: usize, out: &mut Vec<Action>) {
        let (left, state) = (&self.left, &self.nodes[node]);
        let Some(arbiter) = &state.arbiter else {
            out.push(Action::Start(node));
            return;
        };
        if left.kills > 0 {
            out.push(Action::Kill(node));
        }
        if left.powers > 0 {
            out.push(Action::PowerOff(node));
        }
        let Some(known) = arbiter.known() else {
            if left.takeovers > 0 && state.proposing.is_none() {
                out.push(Action::TakeOver(node));
            }
            return;
        };
        let released = known.holder == REPLICAS[node] && !arbiter.is_holder() && state.risen;
        if released && left.releases > 0 && arbiter.want().is_none() {
            out.push(Action::TakeBack(node));
        }
        if left.takeovers > 0 && !state.risen && state.proposing.is_none() {
            out.push(Action::TakeOver(node));
        }
        if !(state.risen && arbiter.is_holder()) {
            return;
        }
        let peer = 1 - node;
        let in_sync = known.is_in_sync(REPLICAS[peer]);
        let idle = arbiter.want().is_none() && !arbiter.is_unsettled();
        let peer_lives = self.nodes[peer].arbiter.is_some();
        if peer_lives && self.known(peer).map(Record::name) != Some(known.name()) {
            out.push(Action::Tell(node));
        }
        let session = self.follows(peer, known.name());
        if left.drops > 0 && in_sync && !state.joining && arbiter.want().is_none() {
            out.push(Action::Drop(node));
        }
        if left.joins > 0 && !in_sync && idle && session && state.pending.is_none() {
            out.push(Action::Join(node));
        }
        let equal = session && state.pending.is_none() && !state.resend && !self.nodes[peer].broken;
        if left.releases > 0 && in_sync && idle && equal {
            out.push(Action::HandOver(node));
        }
        if state.resend && session && !self.nodes[peer].broken {
            out.push(Action::Resend(node));
        }
        if left.writes > 0 && state.pending.is_none() && !state.resend && self.has_lease(space, node) {
            out.push(Action::Write(node));
        }
    }

    fn is_up(&self, site: usize) -> bool {
        site == WITNESS || self.powered[site]
    }

    fn is_asked_by_the_living(&self, ask: &Ask) -> bool {
        let node = &self.nodes[ask.node];
        node.arbiter.is_some() && ask.nonce / 1000 == node.lives
    }

    /// Whether `node` takes the frames of the session of this record.
    fn follows(&self, node: usize, session: RecordName) -> bool {
        let state = &self.nodes[node];
        !state.risen && state.proposing.is_none() && self.known(node).map(Record::name) == Some(session)
    }

    fn may_take(&self, space: &Space, frame: &Frame) -> bool {
        let peer = 1 - frame.from;
        let state = &self.nodes[peer];
        let session = self.follows(peer, frame.session) && !state.broken;
        session || (space.off.takes_any_frame && state.arbiter.is_some())
    }

    // ---- what then happens

    pub fn act(&mut self, space: &Space, action: Action) {
        match action {
            Action::Pass => {
                self.left.passes -= 1;
                self.passed += 1;
                for node in 0..2 {
                    if self.is_holder(node) {
                        self.event(space, node, Event::Asked);
                    }
                    self.event(space, node, Event::Tick);
                }
            }
            Action::Exchange(at) => {
                let ask = self.asks.remove(at);
                self.exchange(space, &ask);
            }
            Action::Repeat(at) => {
                self.left.repeats -= 1;
                let ask = self.asks[at].clone();
                self.exchange(space, &ask);
            }
            Action::Hold(at) => {
                self.left.late -= 1;
                let Ask { node, site, nonce, request } = self.asks.remove(at);
                let answer = Arc::new(self.handle(space, site, &request));
                self.late.push(Late { node, site, nonce, answer });
            }
            Action::Late(at) => {
                let Late { node, site, nonce, answer } = self.late.remove(at);
                let answer = Arc::unwrap_or_clone(answer);
                self.event(space, node, Event::Answered { from: ACCEPTORS[site], nonce, answer });
            }
            Action::TakeOver(node) => {
                self.left.takeovers -= 1;
                self.propose_itself(space, node, Change::TakeOver);
            }
            Action::Drop(node) => {
                self.left.drops -= 1;
                self.want(space, node, Change::Drop(REPLICAS[1 - node]));
            }
            Action::Join(node) => self.join(space, node),
            Action::HandOver(node) => {
                self.left.releases -= 1;
                self.flush_both();
                self.event(space, node, Event::Release { to: Some(REPLICAS[1 - node]) });
            }
            Action::TakeBack(node) => {
                self.left.releases -= 1;
                self.want(space, node, Change::TakeBack);
            }
            Action::Tell(node) => {
                let record = self.known(node).expect("a holder knows its record").clone();
                self.event(space, 1 - node, Event::Told(record));
            }
            Action::Write(node) => self.write(space, node),
            Action::Frame => self.take_frame(space),
            Action::Resend(node) => {
                self.nodes[1 - node].value = self.nodes[node].value;
                self.nodes[node].resend = false;
                self.truth.settled();
            }
            Action::Kill(node) => {
                self.left.kills -= 1;
                self.end_process(node);
            }
            Action::PowerOff(node) => {
                self.left.powers -= 1;
                self.end_process(node);
                self.powered[node] = false;
                let state = &mut self.nodes[node];
                (state.value, state.broken) = (state.flushed, true);
            }
            Action::Start(node) => self.start(space, node),
            Action::RestartKeep(site) => {
                self.left.keeps -= 1;
                self.restart_keep(space, site);
            }
        }
        for node in 0..2 {
            self.settle(space, node);
        }
        // What would be granted to somebody who holds nothing serves nobody.
        let holders = [self.is_holder(0), self.is_holder(1)];
        self.asks
            .retain(|ask| kind(&ask.request) != 3 || (holders[ask.node] && self.nodes[ask.node].arbiter.is_some()));
    }

    fn start(&mut self, space: &Space, node: usize) {
        if !self.powered[node] {
            self.powered[node] = true;
            self.restart_keep(space, node);
        }
        let now = self.now(space, node);
        let state = &mut self.nodes[node];
        state.lives += 1;
        let setup = Setup {
            me: REPLICAS[node],
            own: ACCEPTORS[node],
            acceptors: ACCEPTORS.to_vec(),
            record: state.record.as_deref().cloned(),
            broken: state.broken,
            first_nonce: state.lives * 1000,
        };
        state.arbiter = Some(Arc::new(Arbiter::with_rules(setup, now, space.off.rules)));
        if state.record.as_ref().is_some_and(|record| record.holder == REPLICAS[node]) {
            self.propose_itself(space, node, Change::GoOn);
        }
    }

    fn end_process(&mut self, node: usize) {
        let state = &mut self.nodes[node];
        (state.arbiter, state.risen, state.proposing) = (None, false, None);
        (state.joining, state.pending, state.resend) = (false, None, false);
        // An answer to a process that is gone is lost.
        self.late.retain(|late| late.node != node);
    }

    fn restart_keep(&mut self, space: &Space, site: usize) {
        let now = self.now(space, site);
        let mut stored = self.acceptors[site].stored().clone();
        if space.off.promise_lost_in_restart {
            stored.promised = vmtwin_core::arbiter::message::Ballot::default();
        }
        self.acceptors[site] = Arc::new(Acceptor::with_rules(stored, now, space.off.rules));
    }

    fn propose_itself(&mut self, space: &Space, node: usize, change: Change) {
        self.nodes[node].proposing = Some(self.next_id(node));
        self.want(space, node, change);
    }

    fn next_id(&self, node: usize) -> RecordId {
        RecordId((node as u128 + 1) * 100 + self.nodes[node].wants)
    }

    fn want(&mut self, space: &Space, node: usize, change: Change) {
        let id = self.next_id(node);
        self.nodes[node].wants += 1;
        self.event(space, node, Event::Want { id, change });
    }

    /// R5, in one step: copy, flush, end the peer's mark, ask to join.
    fn join(&mut self, space: &Space, node: usize) {
        self.left.joins -= 1;
        let peer = 1 - node;
        let [own, other] = [self.nodes[node].value, self.nodes[peer].value];
        if space.off.copies_the_newer && other > own {
            self.nodes[node].value = other;
        } else if !space.off.joins_unequal {
            self.nodes[peer].value = own;
        }
        self.flush_both();
        self.nodes[peer].broken = false;
        self.event(space, peer, Event::Broken(false));
        self.nodes[node].joining = true;
        self.want(space, node, Change::Join(REPLICAS[peer]));
    }

    fn flush_both(&mut self) {
        for state in &mut self.nodes {
            state.flushed = state.value;
        }
        self.truth.durable = self.truth.acked;
    }

    fn write(&mut self, space: &Space, node: usize) {
        self.left.writes -= 1;
        let value = self.truth.write();
        self.nodes[node].value = value;
        self.nodes[node].pending = Some(value);
        if self.needs_peer(space, node) {
            let session = self.known(node).expect("a holder knows its record").name();
            self.frame = Some(Frame { from: node, value, session });
        }
    }

    fn take_frame(&mut self, space: &Space) {
        let Some(Frame { from, value, session }) = self.frame.take() else { return };
        self.nodes[1 - from].value = value;
        let same = space.off.takes_any_frame || self.known(from).map(Record::name) == Some(session);
        if same && self.nodes[from].pending == Some(value) {
            self.nodes[from].pending = None;
            self.truth.acknowledge(value);
        }
    }

    /// Whether the peer's answer counts (R2, R9).
    fn needs_peer(&self, space: &Space, node: usize) -> bool {
        let Some(arbiter) = &self.nodes[node].arbiter else { return false };
        let in_sync = arbiter.known().is_some_and(|record| record.is_in_sync(REPLICAS[1 - node]));
        let dropping = matches!(arbiter.want(), Some((_, Change::Drop(_))));
        if space.off.acknowledges_before_drop_is_known && dropping {
            return false;
        }
        let unknown = self.nodes[node].joining || arbiter.is_unsettled();
        in_sync || (unknown && !space.off.join_counts_when_known)
    }

    /// What follows from a change of the record for the write in hand and for a join.
    fn settle(&mut self, space: &Space, node: usize) {
        let Some(arbiter) = self.nodes[node].arbiter.clone() else { return };
        if arbiter.want().is_none() && !arbiter.is_unsettled() {
            self.nodes[node].joining = false;
        }
        if !self.nodes[node].risen || !arbiter.is_holder() {
            return;
        }
        let needs_peer = self.needs_peer(space, node);
        if !needs_peer && std::mem::take(&mut self.nodes[node].resend) {
            self.truth.settled();
        }
        match (self.nodes[node].pending, arbiter.known()) {
            (Some(value), _) if !needs_peer => {
                self.nodes[node].pending = None;
                self.truth.acknowledge(value);
            }
            // A new session repeats what was not answered.
            (Some(value), Some(known)) => {
                self.frame = Some(Frame { from: node, value, session: known.name() });
            }
            _ => {}
        }
    }

    // ---- the network

    fn exchange(&mut self, space: &Space, ask: &Ask) {
        let answer = self.handle(space, ask.site, &ask.request);
        if self.is_asked_by_the_living(ask) {
            self.event(space, ask.node, Event::Answered { from: ACCEPTORS[ask.site], nonce: ask.nonce, answer });
        }
    }

    fn handle(&mut self, space: &Space, site: usize, request: &Request) -> Answer {
        let now = self.now(space, site);
        let answer = Arc::make_mut(&mut self.acceptors[site]).handle(now, request).answer;
        if let Request::Accept { record, .. } = request {
            let accepted = self.acceptors[site].stored().accepted.as_ref();
            let same = |acceptor: &&Arc<Acceptor>| acceptor.stored().accepted.as_ref() == accepted;
            if accepted.is_some_and(|a| a.record == *record) && self.acceptors.iter().filter(same).count() >= 2 {
                self.truth.choose(record);
            }
        }
        answer
    }

    /// The newest request of a kind pushes out the older ones: they are lost.
    fn send(&mut self, ask: Ask) {
        let alike = |other: &Ask| {
            let pair = (other.node, other.site, kind(&other.request));
            pair == (ask.node, ask.site, kind(&ask.request))
        };
        let most = if kind(&ask.request) == 2 { ACCEPTS_UNDER_WAY } else { 1 };
        // Sent once more, a record takes its own place.
        self.asks.retain(|other| !(alike(other) && other.request == ask.request));
        if self.asks.iter().filter(|other| alike(other)).count() >= most {
            let oldest = self.asks.iter().position(alike).expect("one at least");
            self.asks.remove(oldest);
        }
        self.asks.push(ask);
        self.asks.sort_by_key(|ask| (ask.node, ask.site, kind(&ask.request), ask.nonce));
    }

    // ---- a module process

    fn event(&mut self, space: &Space, node: usize, event: Event) {
        let mut waiting = VecDeque::from([event]);
        while let Some(event) = waiting.pop_front() {
            let now = self.now(space, node);
            let Some(arbiter) = &mut self.nodes[node].arbiter else { return };
            let mut effects = Vec::new();
            Arc::make_mut(arbiter).step(now, event, &mut effects);
            for effect in effects {
                match effect {
                    Effect::Ask { request: Request::Read { .. }, .. } if !space.reads => {}
                    Effect::Ask { request: Request::Renew { .. }, .. } if !space.renews => {}
                    Effect::Ask { to, .. } if site_of(to) == 1 - node && !space.reaches[node] => {}
                    Effect::Ask { to, nonce, request } if site_of(to) == node => {
                        let answer = self.handle(space, node, &request);
                        waiting.push_back(Event::Answered { from: to, nonce, answer });
                    }
                    Effect::Ask { to, nonce, request } => {
                        self.send(Ask { node, site: site_of(to), nonce, request: Arc::new(request) });
                    }
                    Effect::Known(record) => self.learnt(node, record),
                    Effect::NotLanded(id) if self.nodes[node].proposing == Some(id) => {
                        self.nodes[node].proposing = None;
                    }
                    Effect::NotLanded(_)
                    | Effect::Lease(_)
                    | Effect::HolderSilent { .. }
                    | Effect::HolderHeard
                    | Effect::Offered(_)
                    | Effect::Released(_)
                    | Effect::AcceptorOut { .. } => {}
                }
            }
        }
    }

    fn learnt(&mut self, node: usize, record: Record) {
        let holder = self.is_holder(node);
        let equal = self.nodes[0].value == self.nodes[1].value;
        let state = &mut self.nodes[node];
        let (mine, alone) = (record.holder == REPLICAS[node], record.in_sync.len() == 1);
        let id = record.id;
        state.record = Some(Arc::new(record));
        if !mine {
            (state.risen, state.joining, state.pending, state.resend) = (false, false, None, false);
            return;
        }
        if !holder {
            return;
        }
        let own = state.proposing.take() == Some(id);
        if state.risen {
            return;
        }
        state.risen = true;
        self.truth.rise(state.value, state.broken && alone);
        state.broken &= !alone;
        if alone || own {
            if !alone && !equal {
                self.truth.lost.get_or_insert_with(|| format!("{node} was handed over to, and both disks differ"));
            }
            self.truth.settled();
        } else {
            state.resend = true;
        }
    }
}

impl Truth {
    fn choose(&mut self, record: &Record) {
        if let Some(last) = &self.chosen {
            if last.name() == record.name() {
                return;
            }
            if !record.is_newer_than(last) {
                self.forked.get_or_insert_with(|| format!("{record:?} after {last:?}"));
                return;
            }
            if record.generation == last.generation.next() && !last.is_in_sync(record.holder) {
                self.usurped.get_or_insert_with(|| format!("{record:?} after {last:?}"));
            }
        }
        self.chosen = Some(Arc::new(record.clone()));
    }

    fn write(&mut self) -> u8 {
        self.last_write += 1;
        self.visible = self.last_write;
        self.maybe.push(self.last_write);
        self.last_write
    }

    fn acknowledge(&mut self, value: u8) {
        if self.visible == value {
            self.acked = value;
            self.maybe.retain(|other| *other != value);
        } else if self.found != value {
            self.lost.get_or_insert_with(|| format!("{value} is acknowledged, which a takeover did not find"));
        }
    }

    /// A node becomes holder and starts the guest on what it has. `power_lost`: alone, on a disk that forgot what was not
    /// flushed.
    fn rise(&mut self, found: u8, power_lost: bool) {
        let right = found == self.acked || self.maybe.contains(&found) || (power_lost && found >= self.durable);
        if !right {
            let (acked, maybe) = (self.acked, &self.maybe);
            let what = format!("a holder begins with {found}: {acked} was acknowledged, {maybe:?} written");
            self.lost.get_or_insert(what);
        }
        (self.visible, self.found) = (found, found);
    }

    /// What the guest sees is on every replica in sync: it counts from here on.
    fn settled(&mut self) {
        self.acked = self.visible;
        self.maybe.clear();
    }
}
