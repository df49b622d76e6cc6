//! Who may run the VM: one compare-and-swap register per module (CASPaxos) with leases. PROTOCOL.md R1, R4, R9, R12.
//!
//! `Acceptor` is one voter (in `keep` and the witness); `Arbiter`, below, is a module process's side: it proposes, holds
//! the lease and watches. Both are pure; the shells carry messages and keep the acceptor's file.
//!
//! Decides: when to propose and what, which record is known, when the lease ends, when the holder counts as silent.
//! Holds: the known record, the one want, proposals whose outcome is unknown, grants, what the acceptors last said.
//! Keeps out: data, sessions and drains (the caller drains before it wants `TakeOver` or `GoOn`), the VM, files, sockets.
//!
//! Watching ─own round proves own record─> Holder ─Release─> Released ─TakeBack known─> Holder;
//! any ─a record of another is known─> Watching
//! Invariant: a lease is counted only while Holder, under a record that a round of this process proved or that this
//! process has held since.
pub mod acceptor;
mod drive;
pub mod event;
pub mod guardian;
mod lease;
pub mod message;
mod proposer;
pub mod rules;
pub mod stored;
#[cfg(test)]
mod tests;
mod watch;

pub use acceptor::{Acceptor, Handled};
pub use event::{Change, Effect, Event, OutBecause};
pub use message::{Answer, Request};
pub use stored::Stored;

use crate::ids::{AcceptorId, RecordId, ReplicaId};
use crate::limits::RENEW_MS;
use crate::record::{Record, RecordName};
use crate::time::{Time, millis};
use lease::Grants;
use message::{Accepted, Ballot, Refusal, Reply};
use proposer::{Phase, Promise, Round, Want};
use rules::{Rule, Rules};
use std::collections::{BTreeMap, BTreeSet};
use watch::{Watch, Watcher};

/// Whom an arbiter decides for.
#[derive(Clone, Debug)]
pub struct Setup {
    /// This node's replica.
    pub me: ReplicaId,
    /// The acceptor in this node's `keep`: its promise comes first, and its id makes this node's ballots its own.
    pub own: AcceptorId,
    /// All acceptors, as configured; once a record is known, its voters count.
    pub acceptors: Vec<AcceptorId>,
    /// The last record that was stored with the replica: a hint, not knowledge.
    pub record: Option<Record>,
    /// The host went down without a clean stop since the replica was last made equal (R4).
    pub broken: bool,
    /// Random, so that an answer to a question of the last process is told from one to ours.
    pub first_nonce: u64,
}

/// The arbiter of one module process.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Arbiter {
    me: ReplicaId,
    own: AcceptorId,
    configured: Vec<AcceptorId>,
    hint: Option<Record>,
    broken: bool,
    rules: Rules,

    known: Option<Record>,
    /// When it became known, or this process began.
    news_at: Time,
    standing: Standing,
    /// The record that this node holds or has released, with the ballot that it was proved at.
    mine: Option<Accepted>,
    /// Since when this node is not the holder.
    watching_since: Time,

    want: Option<Want>,
    round: Option<Round>,
    next_round: Time,
    failures: u32,
    /// Highest number of a ballot seen.
    highest: u64,
    /// Proposals whose outcome is not known, with the highest ballot that they were sent at (R9).
    unsettled: BTreeMap<RecordId, Ballot>,
    /// All ids that this process proposed.
    proposed: BTreeSet<RecordId>,
    /// An acceptor has promised a higher ballot or taken another record: ours has to be written back (R1).
    write_back: bool,

    asked: bool,
    next_renewal: Time,
    grants: Grants,
    lease: Time,

    questions: BTreeMap<u64, Question>,
    next_nonce: u64,
    changes: BTreeMap<AcceptorId, u64>,
    out: BTreeMap<AcceptorId, OutBecause>,
    last_answer: BTreeMap<AcceptorId, Time>,

    watch: Watch,
    next_poll_own: Time,
    next_poll: Time,
    silence_told: bool,
    /// After an attempt that did not land.
    speak_again: Time,
    offered: Option<RecordName>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Standing {
    Watching,
    Holder,
    Released {
        to: Option<ReplicaId>,
        confirmed: BTreeSet<AcceptorId>,
        told: bool,
        again: Time,
        /// The proposal that takes it back.
        take_back: Option<RecordId>,
    },
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Question {
    to: AcceptorId,
    about: About,
    sent: Time,
    /// The acceptor's change count that was known when this was sent.
    changes: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum About {
    Read,
    Prepare(Ballot),
    Accept(Ballot),
    /// The holder's record once more, for an acceptor that missed it.
    Repair,
    Renew,
    Release,
}

impl Arbiter {
    /// Begins without knowing anything: it watches.
    #[must_use]
    pub fn new(setup: Setup, now: Time) -> Self {
        Self::with_rules(setup, now, Rules::ALL)
    }

    /// As `new`, with rules switched off; for simulators.
    #[must_use]
    pub fn with_rules(setup: Setup, now: Time, rules: Rules) -> Self {
        Self {
            me: setup.me,
            own: setup.own,
            configured: setup.acceptors,
            hint: setup.record,
            broken: setup.broken,
            rules,
            known: None,
            news_at: now,
            standing: Standing::Watching,
            mine: None,
            watching_since: now,
            want: None,
            round: None,
            next_round: now,
            failures: 0,
            highest: 0,
            unsettled: BTreeMap::new(),
            proposed: BTreeSet::new(),
            write_back: false,
            asked: false,
            next_renewal: now,
            grants: Grants::default(),
            lease: Time(0),
            questions: BTreeMap::new(),
            next_nonce: setup.first_nonce,
            changes: BTreeMap::new(),
            out: BTreeMap::new(),
            last_answer: BTreeMap::new(),
            watch: Watch::default(),
            next_poll_own: now,
            next_poll: now,
            silence_told: false,
            speak_again: now,
            offered: None,
        }
    }

    /// The record that is known.
    #[must_use]
    pub fn known(&self) -> Option<&Record> {
        self.known.as_ref()
    }

    /// Whether this node is the holder by a round of its own and has not released.
    #[must_use]
    pub fn is_holder(&self) -> bool {
        matches!(self.standing, Standing::Holder)
    }

    /// The lease's end; `Time(0)`: none.
    #[must_use]
    pub fn lease(&self) -> Time {
        self.lease
    }

    /// The undecided want.
    #[must_use]
    pub fn want(&self) -> Option<(RecordId, &Change)> {
        self.want.as_ref().map(|want| (want.id, &want.change))
    }

    /// Whether a proposal of this process has an unknown outcome (R9): no other change may be relied on meanwhile.
    #[must_use]
    pub fn is_unsettled(&self) -> bool {
        !self.unsettled.is_empty()
    }

    /// Since when a majority has had no sign of life of another holder, if that is long enough to take over.
    #[must_use]
    pub fn silent_since(&self, now: Time) -> Option<Time> {
        self.watch.silent_since(now, &self.watcher(), self.voters())
    }

    fn last_heard(&self, now: Time) -> Option<Time> {
        self.watch.last_heard(now, &self.watcher(), self.voters())
    }

    fn watcher(&self) -> Watcher {
        Watcher {
            me: self.me,
            broken: self.broken,
            since: self.watching_since,
            news: self.news_at,
            follows: self.known.as_ref().is_some_and(|known| known.holder != self.me),
            rules: self.rules,
        }
    }

    /// When each voter last answered, and why it is out, if it is; for the operator.
    pub fn voters_seen(&self) -> impl Iterator<Item = (AcceptorId, Option<Time>, Option<OutBecause>)> + '_ {
        self.voters().iter().map(|id| (*id, self.last_answer.get(id).copied(), self.out.get(id).copied()))
    }

    /// Takes one event.
    pub fn step(&mut self, now: Time, event: Event, effects: &mut Vec<Effect>) {
        match event {
            Event::Tick => {}
            Event::Answered { from, nonce, answer } => self.answered(now, from, nonce, answer, effects),
            Event::Asked => self.asked = true,
            Event::Want { id, change } => self.wanted(now, id, change, effects),
            Event::Withdraw => self.give_up_want(now, effects),
            Event::Release { to } => {
                if self.is_holder() {
                    let (confirmed, told, again, take_back) = (BTreeSet::new(), false, now, None);
                    self.standing = Standing::Released { to, confirmed, told, again, take_back };
                    self.end_lease(effects);
                    if !matches!(self.round, Some(Round { phase: Phase::Accepting { .. }, .. })) {
                        self.round = None;
                    }
                }
            }
            // A holder speaks for itself only: what is said of this node's own record has to be proved.
            Event::Told(record) if record.holder == self.me => {}
            Event::Told(record) => self.learn(now, None, record, false, effects),
            Event::Broken(broken) => self.broken = broken,
        }
        self.advance(now, effects);
        self.check();
    }

    fn wanted(&mut self, now: Time, id: RecordId, change: Change, effects: &mut Vec<Effect>) {
        self.give_up_want(now, effects);
        let expected = self.known.as_ref().map(Record::name);
        let want = Want { id, change, since: now, expected };
        // What cannot be is said at once.
        if self.is_futile(&want) {
            effects.push(Effect::NotLanded(id));
        } else {
            if let (Change::TakeBack, Standing::Released { take_back, .. }) = (&want.change, &mut self.standing) {
                *take_back = Some(id);
            }
            (self.want, self.asked, self.next_round) = (Some(want), true, now);
        }
    }

    /// Whether `want` can no longer come about, whatever a round shows.
    fn is_futile(&self, want: &Want) -> bool {
        let known = self.known.as_ref().map(Record::name);
        match &want.change {
            Change::First(record) => known.is_some() || record.id != want.id,
            Change::GoOn => {
                let released = matches!(self.standing, Standing::Released { .. });
                released || (self.broken && self.rules.keep(Rule::BrokenProposes))
            }
            Change::TakeOver => want.expected.is_some() && known != want.expected,
            Change::Drop(_) | Change::Join(_) => !self.is_holder(),
            Change::TakeBack => !matches!(self.standing, Standing::Released { .. }),
        }
    }

    /// Drops the want. If it was never sent to be accepted, it has not landed; else a round finds out (R9).
    fn give_up_want(&mut self, now: Time, effects: &mut Vec<Effect>) {
        if let Some(want) = self.want.take() {
            (self.silence_told, self.speak_again) = (false, now + millis(RENEW_MS));
            if !self.unsettled.contains_key(&want.id) {
                effects.push(Effect::NotLanded(want.id));
            }
        }
    }

    fn answered(&mut self, now: Time, from: AcceptorId, nonce: u64, answer: Answer, effects: &mut Vec<Effect>) {
        // Late, repeated or made up: not asked, or asked of somebody else.
        if self.questions.get(&nonce).is_none_or(|question| question.to != from) || self.out.contains_key(&from) {
            return;
        }
        let Some(question) = self.questions.remove(&nonce) else { return };
        let why = if answer.acceptor != from {
            Some(OutBecause::Replaced(answer.acceptor))
        } else if answer.changes < question.changes && self.rules.keep(Rule::ChangeCount) {
            Some(OutBecause::WentBack)
        } else {
            None
        };
        if let Some(why) = why {
            self.out.insert(from, why);
            self.watch.forget(from);
            effects.push(Effect::AcceptorOut { acceptor: from, why });
            return;
        }
        let seen = self.changes.entry(from).or_insert(0);
        *seen = answer.changes.max(*seen);
        self.last_answer.insert(from, now);
        if let Reply::Refused(Refusal::Promised(ballot)) = &answer.reply {
            self.highest = self.highest.max(ballot.number);
        }
        match (question.about, answer.reply) {
            (About::Read, Reply::State(state)) => {
                self.highest = self.highest.max(state.promised.number);
                self.watch.saw(from, now, question.sent, state);
                let chosen = if self.rules.keep(Rule::MajorityReads) {
                    self.watch.majority()
                } else {
                    self.watch.accepted().max_by_key(|accepted| accepted.ballot)
                };
                if let Some(chosen) = chosen.cloned() {
                    self.learn(now, Some(chosen.ballot), chosen.record, false, effects);
                }
            }
            (About::Prepare(ballot), Reply::Promised { accepted, released_to }) => {
                self.promised(now, ballot, from, Promise { accepted, released_to }, effects);
            }
            (About::Prepare(ballot), Reply::Refused(why)) => self.prepare_refused(now, ballot, from, why),
            (About::Accept(ballot), reply) => self.accept_answered(ballot, from, reply),
            (About::Renew, Reply::Granted { number }) if self.is_holder() => {
                let sent = if self.rules.keep(Rule::LeaseFromSend) { question.sent } else { now };
                self.grants.granted(from, sent, number);
                let end = self.mine.as_ref().map_or(Time(0), |mine| self.grants.end(&mine.record));
                if end > self.lease {
                    self.lease = end;
                    effects.push(Effect::Lease(end));
                }
            }
            (About::Renew, Reply::Refused(why)) if self.is_holder() => self.renewal_refused(now, from, &why, effects),
            (About::Repair, Reply::Refused(Refusal::Promised(_))) if self.is_holder() => {
                self.write_back = self.rules.keep(Rule::WriteBack);
            }
            (About::Release, Reply::Released | Reply::Refused(Refusal::NotAccepted(_))) => {
                if let Standing::Released { confirmed, .. } = &mut self.standing {
                    confirmed.insert(from);
                }
            }
            // An answer of another kind than the question: nothing that can be used.
            _ => {}
        }
    }

    /// R1: an acceptor that missed the record gets it; one that went on to a higher ballot is caught up by a round.
    fn renewal_refused(&mut self, now: Time, from: AcceptorId, why: &Refusal, effects: &mut Vec<Effect>) {
        let Some(mine) = self.mine.clone() else { return };
        match why {
            Refusal::NotAccepted(found) if found.is_none_or(|(ballot, _)| ballot < mine.ballot) => {
                let request = Request::Accept { ballot: mine.ballot, record: mine.record };
                if self.rules.keep(Rule::WriteBack) {
                    self.ask(now, from, About::Repair, request, effects);
                }
            }
            Refusal::NotAccepted(_) | Refusal::Promised(_) => self.write_back = self.rules.keep(Rule::WriteBack),
            Refusal::Granted { .. }
            | Refusal::OlderEpoch(_)
            | Refusal::NotVoter
            | Refusal::Released
            | Refusal::Unheard { .. } => {}
        }
    }

    /// A record is known: `proved` by an own round that a majority accepted, else by a majority's same answer or from its
    /// holder. Settles what it decides.
    fn learn(&mut self, now: Time, ballot: Option<Ballot>, record: Record, proved: bool, effects: &mut Vec<Effect>) {
        let news = self.known.as_ref().map(Record::name) != Some(record.name());
        let late = news && self.known.as_ref().is_some_and(|known| !record.is_newer_than(known));
        if !late {
            let risen = self.stand(now, ballot, &record, proved, effects);
            if news {
                self.news_at = now;
            }
            if news || risen {
                effects.push(Effect::Known(record.clone()));
            }
            self.known = Some(record.clone());
        }
        // A majority that accepted at this ballot accepts nothing lower any more.
        let settled = |at: &Ballot| ballot.is_some_and(|ballot| *at <= ballot);
        let over: Vec<RecordId> = self.unsettled.iter().filter(|(_, at)| settled(at)).map(|(id, _)| *id).collect();
        for id in over {
            self.unsettled.remove(&id);
            if id != record.id && self.want.as_ref().is_none_or(|want| want.id != id) {
                effects.push(Effect::NotLanded(id));
            }
        }
        let Some(want) = &self.want else { return };
        let landed = want.id == record.id || (want.change == Change::GoOn && proved && self.is_holder());
        if landed {
            self.want = None;
        } else if self.is_futile(want) {
            self.give_up_want(now, effects);
        }
    }

    /// Takes the place that a known record gives to this node. True where it has just become the holder.
    fn stand(
        &mut self,
        now: Time,
        ballot: Option<Ballot>,
        record: &Record,
        proved: bool,
        effects: &mut Vec<Effect>,
    ) -> bool {
        let own = self.proposed.contains(&record.id);
        let goes_on = self.mine.as_ref().is_some_and(|mine| mine.record.name() == record.name());
        let unbroken = !self.broken || !self.rules.keep(Rule::BrokenProposes);
        let proved = proved || !self.rules.keep(Rule::ProvesByRound);
        if record.holder != self.me || !(own || goes_on || (proved && unbroken)) {
            if !matches!(self.standing, Standing::Watching) {
                self.standing = Standing::Watching;
                self.mine = None;
                self.watching_since = now;
                self.end_lease(effects);
            }
            return false;
        }
        let before = self.mine.as_ref().map(|mine| mine.ballot).unwrap_or_default();
        let ballot = ballot.unwrap_or(before).max(before);
        self.mine = Some(Accepted { ballot, record: record.clone() });
        if own && record.in_sync == [self.me] {
            self.broken = false;
        }
        match &mut self.standing {
            Standing::Holder => return false,
            // A change that was still under way when the lease was given back: the release holds for its outcome, too.
            Standing::Released { confirmed, again, take_back, .. } if *take_back != Some(record.id) => {
                if ballot > before {
                    confirmed.clear();
                    *again = now;
                }
                return false;
            }
            Standing::Watching | Standing::Released { .. } => {}
        }
        self.standing = Standing::Holder;
        self.grants = Grants::default();
        (self.next_renewal, self.silence_told) = (now, false);
        true
    }

    fn end_lease(&mut self, effects: &mut Vec<Effect>) {
        self.grants = Grants::default();
        self.write_back = false;
        // A grant that is still under way would be counted in the next reign.
        self.questions.retain(|_, question| question.about != About::Renew);
        if self.lease != Time(0) {
            self.lease = Time(0);
            effects.push(Effect::Lease(Time(0)));
        }
    }

    fn voters(&self) -> &[AcceptorId] {
        watch::voters(self.known.as_ref().or(self.hint.as_ref()), &self.configured)
    }

    fn check(&self) {
        assert!(self.lease == Time(0) || self.is_holder(), "a lease belongs to a holder");
        assert!(
            self.mine.is_some() == !matches!(self.standing, Standing::Watching),
            "who holds or released has a record of its own"
        );
        assert!(self.mine.as_ref().is_none_or(|mine| mine.record.holder == self.me), "nobody holds another's record");
    }
}
