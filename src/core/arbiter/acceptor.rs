//! One voter of one module's register, and one of the grants that make up a lease.
//!
//! Decides whether to promise, to accept and to grant. Holds: what it promised and accepted (on disk, before it answers),
//! its grant and what it knows of its answers' arrival (in memory only: a busy disk must not depose a holder).
//! Keeps out: files, sockets, the clock. The shell hands it one request after the other and has stored what `handle`
//! asks for before it hands in the next: a grant must not rest on a record that a power cut takes back.
//! Invariant: while a grant lasts, no other holder's record is accepted here; after a promise, no lower ballot.
use super::message::{Accepted, AcceptorState, Answer, Ballot, CandidateState, GrantState, Refusal, Reply, Request};
use super::rules::{Rule, Rules};
use super::stored::Stored;
use crate::ids::ReplicaId;
use crate::limits::TAKEOVER_MS;
use crate::record::{Record, RecordName};
use crate::time::{Time, millis};
use std::time::Duration;

/// A voter.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Acceptor {
    stored: Stored,
    rules: Rules,
    /// Last sign of life of a holder and until when its grant lasts.
    grant: Option<Grant>,
    /// The accepted record was released, to whom.
    released: Option<Option<ReplicaId>>,
    /// A candidate that read here last, and when.
    candidate: Option<(ReplicaId, Time)>,
    /// Number of grants given since the start.
    grants_given: u64,
    /// Number and time of the first grant since the last one that is known to have arrived.
    unheard: Option<(u64, Time)>,
    /// One-way cut: no grant before.
    mute_until: Time,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Grant {
    holder: ReplicaId,
    seen: Time,
    until: Time,
}

/// What came of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
#[must_use]
pub struct Handled {
    /// To be sent.
    pub answer: Answer,
    /// `stored()` has to be durable before the answer leaves and before the next request is handled. If it cannot be made
    /// so, the acceptor ends without an answer.
    pub save: bool,
}

impl Acceptor {
    /// Begins with what was stored, or with `Stored::new`. After a start it cannot know which grants it gave, so it holds
    /// off all but the recorded holder for one full lease.
    #[must_use]
    pub fn new(stored: Stored, now: Time) -> Self {
        Self::with_rules(stored, now, Rules::ALL)
    }

    /// As `new`, with rules switched off; for simulators.
    #[must_use]
    pub fn with_rules(stored: Stored, now: Time, rules: Rules) -> Self {
        let guard = stored.accepted.as_ref().map(|accepted| Grant {
            holder: accepted.record.holder,
            seen: now,
            until: if rules.keep(Rule::GuardAfterStart) { now + lease(&accepted.record) } else { now },
        });
        Self {
            stored,
            rules,
            grant: guard,
            released: None,
            candidate: None,
            grants_given: 0,
            unheard: None,
            mute_until: Time(0),
        }
    }

    /// What has to be on disk.
    #[must_use]
    pub fn stored(&self) -> &Stored {
        &self.stored
    }

    /// Answers one request.
    pub fn handle(&mut self, now: Time, request: &Request) -> Handled {
        let changes = self.stored.changes;
        let reply = match request {
            Request::Read { candidate } => {
                self.candidate = candidate.map(|replica| (replica, now)).or(self.candidate);
                Reply::State(self.state(now))
            }
            Request::Prepare { ballot, by } => match self.may_promise(now, *ballot, *by) {
                Err(why) => Reply::Refused(why),
                Ok(()) => {
                    self.stored.promised = self.stored.promised.max(*ballot);
                    self.stored.changes += 1;
                    let accepted = self.stored.accepted.clone();
                    Reply::Promised { accepted, released_to: self.released.flatten() }
                }
            },
            Request::Accept { ballot, record } => match self.may_accept(now, *ballot, record) {
                Err(why) => Reply::Refused(why),
                Ok(Repeated(true)) => Reply::Accepted,
                Ok(Repeated(false)) => {
                    self.accept(now, *ballot, record);
                    Reply::Accepted
                }
            },
            Request::Renew { ballot, record, heard } => match self.may_grant(now, *ballot, *record, *heard) {
                Err(why) => Reply::Refused(why),
                Ok((holder, length)) => {
                    self.grant = Some(Grant { holder, seen: now, until: now + length });
                    self.grants_given += 1;
                    self.unheard.get_or_insert((self.grants_given, now));
                    Reply::Granted { number: self.grants_given }
                }
            },
            Request::Release { ballot, record, to } => {
                let names = match &self.stored.accepted {
                    Some(accepted) if self.rules.keep(Rule::ReleaseNamesReign) => {
                        (accepted.ballot, accepted.record.name()) == (*ballot, *record)
                    }
                    accepted => accepted.is_some(),
                };
                if names {
                    if let Some(grant) = &mut self.grant {
                        (grant.seen, grant.until) = (now, now);
                    }
                    self.released = Some(*to);
                    Reply::Released
                } else {
                    Reply::Refused(self.not_accepted())
                }
            }
        };
        let answer = Answer { acceptor: self.stored.acceptor, changes: self.stored.changes, reply };
        Handled { answer, save: self.stored.changes != changes }
    }

    fn state(&self, now: Time) -> AcceptorState {
        AcceptorState {
            promised: self.stored.promised,
            accepted: self.stored.accepted.clone(),
            grant: self.grant.map(|grant| GrantState {
                holder: grant.holder,
                ago_ms: whole_ms(now.since(grant.seen)),
                left_ms: ms_up(grant.until.since(now)),
            }),
            released: self.released,
            candidate: self
                .candidate
                .map(|(replica, read)| CandidateState { replica, ago_ms: whole_ms(now.since(read)) }),
        }
    }

    fn may_promise(&self, now: Time, ballot: Ballot, by: ReplicaId) -> Result<(), Refusal> {
        let strict = self.rules.keep(Rule::PromiseStrictlyHigher);
        let promised = self.stored.promised;
        if ballot < promised || (strict && ballot == promised) {
            return Err(Refusal::Promised(promised));
        }
        self.held_by_another(now, by, Rule::NoPromiseUnderGrant)
    }

    fn may_accept(&self, now: Time, ballot: Ballot, record: &Record) -> Result<Repeated, Refusal> {
        if ballot < self.stored.promised {
            return Err(Refusal::Promised(self.stored.promised));
        }
        if !record.voters.contains(&self.stored.acceptor) {
            return Err(Refusal::NotVoter);
        }
        if let Some(accepted) = &self.stored.accepted {
            if record.epoch < accepted.record.epoch {
                return Err(Refusal::OlderEpoch(accepted.record.epoch));
            }
            if ballot == accepted.ballot && self.rules.keep(Rule::PromiseStrictlyHigher) {
                // A ballot has one value. Another one under it is a proposer gone wrong.
                let same = *record == accepted.record;
                return if same { Ok(Repeated(true)) } else { Err(self.not_accepted()) };
            }
        }
        self.held_by_another(now, record.holder, Rule::NoAcceptUnderGrant)?;
        Ok(Repeated(false))
    }

    fn accept(&mut self, now: Time, ballot: Ballot, record: &Record) {
        if self.rules.keep(Rule::AcceptRaisesPromise) {
            self.stored.promised = self.stored.promised.max(ballot);
        }
        // The holder's own change (join, drop) leaves its grant as it is. A new holder begins afresh.
        let until = match self.grant {
            Some(grant) if grant.holder == record.holder => grant.until,
            _ => {
                self.mute_until = Time(0);
                self.unheard = None;
                now
            }
        };
        self.grant = Some(Grant { holder: record.holder, seen: now, until });
        self.released = None;
        self.stored.accepted = Some(Accepted { ballot, record: record.clone() });
        self.stored.changes += 1;
    }

    fn may_grant(
        &mut self,
        now: Time,
        ballot: Ballot,
        name: RecordName,
        heard: u64,
    ) -> Result<(ReplicaId, Duration), Refusal> {
        if self.stored.promised > ballot && self.rules.keep(Rule::NoGrantUnderPromise) {
            return Err(Refusal::Promised(self.stored.promised));
        }
        let (holder, length) = match &self.stored.accepted {
            Some(a) if a.record.name() == name && a.ballot == ballot => (a.record.holder, lease(&a.record)),
            _ => return Err(self.not_accepted()),
        };
        if self.released.is_some() {
            return Err(Refusal::Released);
        }
        self.held_by_another(now, holder, Rule::NoAcceptUnderGrant)?;
        self.check_heard(now, heard, length)?;
        Ok((holder, length))
    }

    /// R1, one-way cut: renewals arrive, but none of the answers of a whole lease did. This acceptor's grants serve nobody
    /// then and only keep others off, so it lets the last one run out and leaves time for a takeover.
    fn check_heard(&mut self, now: Time, heard: u64, length: Duration) -> Result<(), Refusal> {
        if !self.rules.keep(Rule::OneWayCut) {
            return Ok(());
        }
        if now < self.mute_until {
            return Err(Refusal::Unheard { left_ms: ms_up(self.mute_until.since(now)) });
        }
        let until = self.grant.map_or(Time(0), |grant| grant.until);
        // After a gap without a grant, others had their turn already: begin to count anew.
        // A number beyond those given is one from before this acceptor's start.
        let arrived = |(number, _)| (number..=self.grants_given).contains(&heard);
        if until <= now || self.unheard.is_some_and(arrived) {
            self.unheard = None;
        }
        if self.unheard.is_some_and(|(_, since)| now.since(since) >= length) {
            self.mute_until = until + millis(TAKEOVER_MS);
            self.unheard = None;
            return Err(Refusal::Unheard { left_ms: ms_up(self.mute_until.since(now)) });
        }
        Ok(())
    }

    fn held_by_another(&self, now: Time, replica: ReplicaId, rule: Rule) -> Result<(), Refusal> {
        match self.grant {
            Some(grant) if grant.holder != replica && now < grant.until && self.rules.keep(rule) => {
                Err(Refusal::Granted { holder: grant.holder, left_ms: ms_up(grant.until.since(now)) })
            }
            _ => Ok(()),
        }
    }

    fn not_accepted(&self) -> Refusal {
        Refusal::NotAccepted(self.stored.accepted.as_ref().map(|a| (a.ballot, a.record.name())))
    }
}

/// Whether this very value was accepted before: a message that came twice.
struct Repeated(bool);

fn lease(record: &Record) -> Duration {
    millis(u64::from(record.lease_ms))
}

fn whole_ms(span: Duration) -> u32 {
    u32::try_from(span.as_millis()).unwrap_or(u32::MAX)
}

/// Rounded up: "0 ms left" means that nothing is.
fn ms_up(span: Duration) -> u32 {
    u32::try_from(span.as_nanos().div_ceil(1_000_000)).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::{AcceptorId, ModuleId, RecordId};
    use crate::limits::LEASE_MS;

    const A: ReplicaId = ReplicaId(0xa);
    const B: ReplicaId = ReplicaId(0xb);
    const ME: AcceptorId = AcceptorId(3);

    #[test]
    fn a_promise_and_an_accepted_record_survive_a_restart_and_the_old_holder_is_guarded_for_a_lease() {
        let mut world = World::with_record(A);
        world.promise(ballot(5, 1), A);
        let mut again = World { acceptor: Acceptor::new(world.acceptor.stored().clone(), world.now), now: world.now };
        assert_eq!(again.prepare(ballot(5, 1), A), Reply::Refused(Refusal::Promised(ballot(5, 1))));
        assert_eq!(again.prepare(ballot(6, 2), B), Reply::Refused(Refusal::Granted { holder: A, left_ms: 1000 }));
        again.now = again.now + millis(LEASE_MS);
        assert!(matches!(again.prepare(ballot(6, 2), B), Reply::Promised { accepted: Some(_), .. }));
    }

    #[test]
    fn while_a_grant_lasts_nobody_else_is_promised_or_accepted() {
        let mut world = World::with_record(A);
        world.promise(ballot(2, 2), B);
        // B's promise is older than the grant: A wrote its record back since.
        let mine = record(A);
        assert_eq!(world.accept(ballot(3, 1), &mine), Reply::Accepted);
        assert_eq!(world.renew(ballot(3, 1), &mine, 0), Reply::Granted { number: 1 });
        let held = Reply::Refused(Refusal::Granted { holder: A, left_ms: 1000 });
        assert_eq!(world.prepare(ballot(4, 2), B), held);
        assert_eq!(world.accept(ballot(4, 2), &mine.next(RecordId(9), B, vec![B])), held);
        // The holder itself may change its record meanwhile, and its grant stays.
        assert_eq!(world.accept(ballot(5, 1), &mine.next(RecordId(8), A, vec![A, B])), Reply::Accepted);
        assert_eq!(world.prepare(ballot(6, 2), B), held);
        world.now = world.now + millis(LEASE_MS);
        assert!(matches!(world.prepare(ballot(6, 2), B), Reply::Promised { .. }));
    }

    #[test]
    fn after_a_higher_promise_nothing_is_granted_and_nothing_lower_accepted() {
        let mut world = World::with_record(A);
        let mine = record(A);
        world.promise(ballot(7, 2), B);
        let refused = Reply::Refused(Refusal::Promised(ballot(7, 2)));
        assert_eq!(world.renew(ballot(1, 1), &mine, 0), refused);
        assert_eq!(world.accept(ballot(6, 1), &mine), refused);
        assert_eq!(world.accept(ballot(7, 2), &mine), Reply::Accepted);
    }

    #[test]
    fn an_accept_raises_the_promise_and_a_repeated_one_changes_nothing() {
        let mut world = World::with_record(A);
        let next = record(A).next(RecordId(2), A, vec![A, B]);
        assert_eq!(world.accept(ballot(9, 1), &next), Reply::Accepted);
        let changes = world.acceptor.stored().changes;
        let again = world.acceptor.handle(world.now, &Request::Accept { ballot: ballot(9, 1), record: next.clone() });
        assert_eq!((again.answer.reply, again.save), (Reply::Accepted, false));
        assert_eq!(world.acceptor.stored().changes, changes);
        assert_eq!(world.accept(ballot(8, 2), &record(B)), Reply::Refused(Refusal::Promised(ballot(9, 1))));
        // One ballot, one value.
        assert!(matches!(world.accept(ballot(9, 1), &record(A)), Reply::Refused(Refusal::NotAccepted(Some(_)))));
    }

    #[test]
    fn only_the_very_record_that_was_accepted_gets_a_grant() {
        let mut world = World::with_record(A);
        let (mine, other) = (record(A), record(A).next(RecordId(2), A, vec![A]));
        assert_eq!(world.renew(ballot(1, 1), &mine, 0), Reply::Granted { number: 1 });
        assert!(matches!(world.renew(ballot(1, 1), &other, 0), Reply::Refused(Refusal::NotAccepted(Some(_)))));
        assert!(matches!(world.renew(ballot(2, 1), &mine, 0), Reply::Refused(Refusal::NotAccepted(Some(_)))));
        let mut empty = World { acceptor: Acceptor::new(Stored::new(ModuleId(1), ME), T0), now: T0 };
        assert_eq!(empty.renew(ballot(1, 1), &mine, 0), Reply::Refused(Refusal::NotAccepted(None)));
    }

    #[test]
    fn a_release_voids_the_grant_of_its_reign_only_and_ends_its_renewals() {
        let mut world = World::with_record(A);
        let mine = record(A);
        world.renew(ballot(1, 1), &mine, 0);
        let late = Request::Release { ballot: ballot(0, 1), record: mine.name(), to: None };
        assert!(matches!(world.ask(&late), Reply::Refused(Refusal::NotAccepted(_))));
        assert!(matches!(world.prepare(ballot(2, 2), B), Reply::Refused(Refusal::Granted { .. })));
        let release = Request::Release { ballot: ballot(1, 1), record: mine.name(), to: Some(B) };
        assert_eq!(world.ask(&release), Reply::Released);
        assert_eq!(world.renew(ballot(1, 1), &mine, 1), Reply::Refused(Refusal::Released));
        let Reply::Promised { released_to, .. } = world.prepare(ballot(2, 2), B) else { panic!("refused") };
        assert_eq!(released_to, Some(B));
        // The next record begins without it.
        world.accept(ballot(2, 2), &mine.next(RecordId(5), B, vec![A, B]));
        let Reply::State(state) = world.ask(&Request::Read { candidate: None }) else { panic!("no state") };
        assert_eq!(state.released, None);
    }

    #[test]
    fn a_holder_that_does_not_hear_the_answers_gets_no_grant_for_a_takeover_time() {
        let mut world = World::with_record(A);
        let mine = record(A);
        let mut refused_at = None;
        for step in 0..20 {
            world.now = T0 + millis(300 * step);
            match world.renew(ballot(1, 1), &mine, 0) {
                Reply::Granted { .. } => assert_eq!(refused_at, None, "a grant after the first refusal"),
                Reply::Refused(Refusal::Unheard { .. }) => {
                    refused_at.get_or_insert(world.now);
                }
                other => panic!("{other:?}"),
            }
            if refused_at.is_some_and(|at| world.now.since(at) >= millis(TAKEOVER_MS)) {
                break;
            }
        }
        let at = refused_at.expect("refused in the end");
        assert!(at.since(T0) >= millis(LEASE_MS) && at.since(T0) <= millis(LEASE_MS + 300), "{at:?}");
        // Another takes over meanwhile.
        assert!(matches!(world.prepare(ballot(2, 2), B), Reply::Promised { .. }));
        // And one that hears is granted on and on.
        let mut world = World::with_record(A);
        let mut heard = 0;
        for step in 0..40 {
            world.now = T0 + millis(300 * step);
            let Reply::Granted { number } = world.renew(ballot(1, 1), &mine, heard) else { panic!("refused") };
            heard = number;
        }
    }

    #[test]
    fn a_pause_of_the_holder_is_not_taken_for_a_one_way_cut() {
        let mut world = World::with_record(A);
        let mine = record(A);
        world.renew(ballot(1, 1), &mine, 0);
        world.now = T0 + millis(5000);
        assert_eq!(world.renew(ballot(1, 1), &mine, 0), Reply::Granted { number: 2 });
        world.now = T0 + millis(5300);
        assert_eq!(world.renew(ballot(1, 1), &mine, 0), Reply::Granted { number: 3 });
    }

    #[test]
    fn a_record_of_an_older_epoch_or_without_this_voter_is_refused() {
        let mut world = World::with_record(A);
        let mut forced = record(B);
        forced.epoch = forced.epoch.next();
        world.now = world.now + millis(LEASE_MS);
        assert_eq!(world.accept(ballot(2, 2), &forced), Reply::Accepted);
        let older = Reply::Refused(Refusal::OlderEpoch(forced.epoch));
        assert_eq!(world.accept(ballot(3, 1), &record(B)), older);
        let mut others = forced.next(RecordId(7), B, vec![B]);
        others.voters = vec![AcceptorId(77)];
        assert_eq!(world.accept(ballot(4, 1), &others), Reply::Refused(Refusal::NotVoter));
    }

    #[test]
    fn what_has_to_be_stored_is_said_and_grants_never_are() {
        let mut world = World::with_record(A);
        let mine = record(A);
        let renew = Request::Renew { ballot: ballot(1, 1), record: mine.name(), heard: 0 };
        assert!(!world.acceptor.handle(T0, &renew).save);
        assert!(!world.acceptor.handle(T0, &Request::Read { candidate: Some(B) }).save);
        assert!(world.acceptor.handle(T0, &Request::Prepare { ballot: ballot(2, 1), by: A }).save);
        assert!(!world.acceptor.handle(T0, &Request::Prepare { ballot: ballot(2, 1), by: A }).save);
        assert!(world.acceptor.handle(T0, &Request::Accept { ballot: ballot(2, 1), record: mine }).save);
    }

    #[test]
    fn a_reader_sees_grant_release_and_candidate_with_their_ages() {
        let mut world = World::with_record(A);
        world.renew(ballot(1, 1), &record(A), 0);
        world.ask(&Request::Read { candidate: Some(B) });
        world.now = world.now + millis(400);
        let Reply::State(state) = world.ask(&Request::Read { candidate: None }) else { panic!("no state") };
        assert_eq!(state.grant, Some(GrantState { holder: A, ago_ms: 400, left_ms: 600 }));
        assert_eq!(state.candidate, Some(CandidateState { replica: B, ago_ms: 400 }));
    }

    const T0: Time = Time(5_000_000_000);

    struct World {
        acceptor: Acceptor,
        now: Time,
    }

    impl World {
        fn with_record(holder: ReplicaId) -> Self {
            let mut world = Self { acceptor: Acceptor::new(Stored::new(ModuleId(1), ME), T0), now: T0 };
            assert_eq!(world.accept(ballot(1, 1), &record(holder)), Reply::Accepted);
            world
        }
        fn ask(&mut self, request: &Request) -> Reply {
            self.acceptor.handle(self.now, request).answer.reply
        }
        fn prepare(&mut self, ballot: Ballot, by: ReplicaId) -> Reply {
            self.ask(&Request::Prepare { ballot, by })
        }
        fn promise(&mut self, ballot: Ballot, by: ReplicaId) {
            assert!(matches!(self.prepare(ballot, by), Reply::Promised { .. }));
        }
        fn accept(&mut self, ballot: Ballot, record: &Record) -> Reply {
            self.ask(&Request::Accept { ballot, record: record.clone() })
        }
        fn renew(&mut self, ballot: Ballot, record: &Record, heard: u64) -> Reply {
            self.ask(&Request::Renew { ballot, record: record.name(), heard })
        }
    }

    fn ballot(number: u64, node: u128) -> Ballot {
        Ballot { number, node: AcceptorId(node) }
    }

    fn record(holder: ReplicaId) -> Record {
        Record::first(RecordId(1), holder, vec![AcceptorId(1), AcceptorId(2), ME])
    }
}
