//! Stories with two arbiters and three acceptors, on a network without delay that can be cut. The simulator in
//! `tests/sim_arbiter` has the faults; here each step can be read.
use super::*;
use crate::ids::ModuleId;
use crate::limits::{LEASE_MS, TAKEOVER_MS};
use crate::time::millis;

#[test]
fn the_first_record_makes_its_maker_the_holder_with_a_lease() {
    let mut world = World::new();
    world.first_record();
    assert!(world.arbiters[0].is_holder());
    assert!(world.arbiters[0].lease() > world.now);
    world.run(1000);
    assert_eq!(world.arbiters[1].known().map(Record::name), world.arbiters[0].known().map(Record::name));
    assert!(!world.arbiters[1].is_holder());
}

#[test]
fn the_lease_goes_on_while_the_module_asks_and_ends_when_its_loop_hangs() {
    let mut world = World::new();
    world.first_record();
    world.run(5000);
    assert!(world.arbiters[0].lease() > world.now);
    world.asking[0] = false;
    world.run(2 * LEASE_MS);
    assert!(world.arbiters[0].lease() <= world.now, "renewals went on without the module's own loop");
}

#[test]
fn join_and_drop_change_the_set_and_keep_the_lease() {
    let mut world = World::in_sync();
    assert_eq!(world.arbiters[0].known().unwrap().in_sync, [A, B]);
    let lease = world.arbiters[0].lease();
    world.cut(1);
    world.want(0, Change::Drop(B));
    assert_eq!(world.arbiters[0].known().unwrap().in_sync, [A]);
    assert!(world.arbiters[0].lease() >= lease);
}

#[test]
fn an_in_sync_node_takes_over_about_two_seconds_after_the_holder_died_and_a_node_that_is_out_never_does() {
    for in_sync in [true, false] {
        let mut world = if in_sync { World::in_sync() } else { World::new() };
        if !in_sync {
            world.first_record();
        }
        world.run(3000);
        let died = world.now;
        world.kill(0);
        world.run(10_000);
        let silent = world.news(1, |e| matches!(e, Effect::HolderSilent { .. }));
        assert_eq!(silent.is_some(), in_sync, "said to a node in sync only");
        world.want(1, Change::TakeOver);
        world.run(100);
        assert_eq!(world.arbiters[1].is_holder(), in_sync);
        if let Some(at) = silent {
            let took = at.since(died);
            assert!(took > millis(LEASE_MS) && took < millis(TAKEOVER_MS + 100), "{took:?}");
            assert_eq!(world.arbiters[1].known().unwrap().in_sync, [B]);
        } else {
            assert!(world.news(1, |e| matches!(e, Effect::NotLanded(_))).is_some());
        }
    }
}

#[test]
fn a_contender_cannot_take_over_from_a_living_holder_and_is_told_so() {
    let mut world = World::in_sync();
    world.want(1, Change::TakeOver);
    world.run(3000);
    assert!(world.arbiters[0].is_holder() && world.arbiters[0].lease() > world.now);
    assert!(!world.arbiters[1].is_holder());
    assert!(world.news(1, |e| matches!(e, Effect::NotLanded(_))).is_some());
}

#[test]
fn a_deposed_holder_learns_it_and_has_no_lease() {
    let mut world = World::in_sync();
    world.cut(0);
    world.run(4000);
    assert!(world.arbiters[0].lease() <= world.now);
    world.want(1, Change::TakeOver);
    world.run(100);
    assert!(world.arbiters[1].is_holder());
    world.mend();
    world.run(1500);
    assert!(!world.arbiters[0].is_holder());
    assert_eq!(world.arbiters[0].known().unwrap().holder, B);
    assert_eq!(world.arbiters[0].lease(), Time(0));
    assert!(world.arbiters[1].lease() > world.now, "the new holder is not disturbed for long");
}

#[test]
fn a_release_names_its_target_who_keeps_both_in_sync() {
    let mut world = World::in_sync();
    world.event(0, Event::Release { to: Some(B) });
    world.run(400);
    assert_eq!(world.arbiters[0].lease(), Time(0));
    assert!(world.news(0, |e| matches!(e, Effect::Released(_))).is_some());
    assert!(world.news(1, |e| matches!(e, Effect::Offered(_))).is_some());
    world.want(1, Change::TakeOver);
    world.run(400);
    assert!(world.arbiters[1].is_holder());
    assert_eq!(world.arbiters[1].known().unwrap().in_sync, [A, B]);
    assert_eq!(world.arbiters[0].known().unwrap().holder, B);
}

#[test]
fn a_release_that_nobody_used_is_taken_back_by_a_new_record() {
    let mut world = World::in_sync();
    let before = world.arbiters[0].known().unwrap().generation;
    world.event(0, Event::Release { to: Some(B) });
    world.run(200);
    assert!(!world.arbiters[0].is_holder());
    world.want(0, Change::TakeBack);
    world.run(400);
    assert!(world.arbiters[0].is_holder() && world.arbiters[0].lease() > world.now);
    assert_eq!(world.arbiters[0].known().unwrap().generation, before.next());
    assert_eq!(world.arbiters[0].known().unwrap().in_sync, [A, B]);
    // The offer went with the record that it was for.
    world.want(1, Change::TakeOver);
    world.run(3000);
    assert!(world.arbiters[0].is_holder() && !world.arbiters[1].is_holder());
}

#[test]
fn a_process_started_anew_goes_on_by_a_round_only_and_not_at_all_while_broken() {
    let mut world = World::in_sync();
    world.restart(0, false);
    world.run(500);
    assert_eq!(world.arbiters[0].known().unwrap().holder, A, "read from the acceptors");
    assert!(!world.arbiters[0].is_holder() && world.arbiters[0].lease() == Time(0));
    world.want(0, Change::GoOn);
    world.run(100);
    assert!(world.arbiters[0].is_holder() && world.arbiters[0].lease() > world.now);
    world.restart(0, true);
    world.want(0, Change::GoOn);
    world.run(500);
    assert!(!world.arbiters[0].is_holder());
    // Broken, it goes on by a generation of its own, alone in sync, after a lease and a takeover time.
    world.cut(1);
    let began = world.now;
    world.want(0, Change::TakeOver);
    world.run(6000);
    assert!(world.arbiters[0].is_holder());
    assert_eq!(world.arbiters[0].known().unwrap().in_sync, [A]);
    let known = world.news(0, |e| matches!(e, Effect::Known(r) if r.in_sync == [A])).unwrap();
    assert!(known.since(began) >= millis(LEASE_MS + TAKEOVER_MS - 500), "{:?}", known.since(began));
}

#[test]
fn an_acceptor_that_lost_its_state_or_went_back_is_not_believed() {
    let mut world = World::in_sync();
    let old = Stored { changes: 1, ..world.acceptors[2].as_ref().unwrap().stored().clone() };
    world.acceptors[2] = Some(Acceptor::new(old, world.now));
    world.run(1000);
    let out = |why| move |e: &Effect| matches!(e, Effect::AcceptorOut { acceptor: W, why: w } if *w == why);
    assert!(world.news(0, out(OutBecause::WentBack)).is_some());
    let other = AcceptorId(99);
    let mut world = World::in_sync();
    world.acceptors[2] = Some(Acceptor::new(Stored::new(ModuleId(1), other), world.now));
    world.run(1000);
    assert!(world.news(0, out(OutBecause::Replaced(other))).is_some());
    assert!(world.arbiters[0].lease() > world.now, "two of three are a majority");
}

#[test]
fn an_acceptor_that_missed_a_record_gets_it_with_the_next_renewal() {
    let mut world = World::in_sync();
    world.cut(2);
    world.want(0, Change::Drop(B));
    world.run(500);
    world.mend();
    world.run(1000);
    let held = world.acceptors[2].as_ref().unwrap().stored().accepted.clone().unwrap();
    assert_eq!(held.record.name(), world.arbiters[0].known().unwrap().name());
}

#[test]
fn a_higher_promise_is_answered_by_writing_the_record_back() {
    let mut world = World::in_sync();
    let ballot = Ballot { number: 1000, node: AcceptorId(2) };
    // Left behind by a contender that is gone: the witness would refuse every renewal from now on.
    let witness = world.acceptors[2].as_mut().unwrap();
    let mut stored = witness.stored().clone();
    stored.promised = ballot;
    stored.changes += 1;
    *witness = Acceptor::new(stored, world.now);
    world.run(1500);
    world.cut(1);
    world.run(3000);
    assert!(world.arbiters[0].lease() > world.now, "the witness grants again");
}

#[test]
fn a_wake_up_is_always_ahead_or_due() {
    let mut world = World::in_sync();
    world.kill(0);
    for _ in 0..400 {
        let wake = world.arbiters[1].wake(world.now);
        assert!(wake >= world.now && wake <= world.now + millis(400), "{wake:?} at {:?}", world.now);
        world.run(10);
    }
}

const A: ReplicaId = ReplicaId(0xa);
const B: ReplicaId = ReplicaId(0xb);
const W: AcceptorId = AcceptorId(3);

/// Node 0 has acceptor 1, node 1 has acceptor 2, the witness is acceptor 3. Time goes in steps of 10 ms.
struct World {
    now: Time,
    acceptors: Vec<Option<Acceptor>>,
    arbiters: Vec<Arbiter>,
    alive: [bool; 2],
    asking: [bool; 2],
    /// Sites (0, 1: nodes; 2: witness) that only reach themselves.
    cut: [bool; 3],
    effects: Vec<(Time, usize, Effect)>,
    ids: u128,
}

impl World {
    fn new() -> Self {
        let now = Time::from_millis(10_000);
        let acceptor = |id| Some(Acceptor::new(Stored::new(ModuleId(1), AcceptorId(id)), now));
        Self {
            now,
            acceptors: (1..=3).map(acceptor).collect(),
            arbiters: (0..2).map(|n| Arbiter::new(Self::setup(n, false), now)).collect(),
            alive: [true; 2],
            asking: [true; 2],
            cut: [false; 3],
            effects: Vec::new(),
            ids: 100,
        }
    }

    fn setup(node: usize, broken: bool) -> Setup {
        Setup {
            me: [A, B][node],
            own: AcceptorId(node as u128 + 1),
            acceptors: (1..=3).map(AcceptorId).collect(),
            record: None,
            broken,
            first_nonce: 0,
        }
    }

    fn first_record(&mut self) {
        let id = RecordId(1);
        let record = Record::first(id, A, (1..=3).map(AcceptorId).collect());
        self.event(0, Event::Want { id, change: Change::First(record) });
        self.run(100);
    }

    fn in_sync() -> Self {
        let mut world = Self::new();
        world.first_record();
        world.want(0, Change::Join(B));
        world.run(1000);
        world
    }

    fn want(&mut self, node: usize, change: Change) {
        self.ids += 1;
        self.event(node, Event::Want { id: RecordId(self.ids), change });
    }

    fn event(&mut self, node: usize, event: Event) {
        let mut waiting = vec![event];
        while !waiting.is_empty() {
            let event = waiting.remove(0);
            let mut effects = Vec::new();
            self.arbiters[node].step(self.now, event, &mut effects);
            for effect in effects {
                if let Effect::Ask { to, nonce, request } = &effect {
                    let site = to.0 as usize - 1;
                    let reached = site == node || !(self.cut[site] || self.cut[node]);
                    if let (true, Some(acceptor)) = (reached, &mut self.acceptors[site]) {
                        let answer = acceptor.handle(self.now, request).answer;
                        waiting.push(Event::Answered { from: *to, nonce: *nonce, answer });
                    }
                }
                self.effects.push((self.now, node, effect));
            }
        }
    }

    fn run(&mut self, ms: u64) {
        for _ in 0..ms / 10 {
            self.now = self.now + millis(10);
            for node in (0..2).filter(|n| self.alive[*n]).collect::<Vec<_>>() {
                if self.asking[node] {
                    self.event(node, Event::Asked);
                }
                self.event(node, Event::Tick);
            }
        }
    }

    fn kill(&mut self, node: usize) {
        self.alive[node] = false;
        self.acceptors[node] = None;
    }

    fn cut(&mut self, site: usize) {
        self.cut[site] = true;
    }

    fn mend(&mut self) {
        self.cut = [false; 3];
    }

    fn restart(&mut self, node: usize, broken: bool) {
        self.arbiters[node] = Arbiter::new(Self::setup(node, broken), self.now);
        self.effects.retain(|(_, n, _)| *n != node);
    }

    /// When `node` first said something like this.
    fn news(&self, node: usize, like: impl Fn(&Effect) -> bool) -> Option<Time> {
        self.effects.iter().find(|(_, n, effect)| *n == node && like(effect)).map(|(at, ..)| *at)
    }
}
