//! The arbiter's own initiative: rounds, renewals, releases, polls, and what follows from silence.
//!
//! Every function here may be called at any time and does what is due; the state is the arbiter's.
use super::event::{Change, Effect};
use super::message::{Ballot, Refusal, Reply, Request};
use super::proposer::{Phase, Promise, Proposal, Round, Value, choose, is_majority};
use super::rules::Rule;
use super::watch;
use super::{About, Arbiter, Question, Standing};
use crate::ids::{AcceptorId, RecordId};
use crate::limits::{LEASE_MS, RENEW_MS, TAKEOVER_MS};
use crate::record::Record;
use crate::time::{Time, millis};
use std::collections::{BTreeMap, BTreeSet};

/// A phase of a round is given up after this long, in milliseconds, twice as long after each failure, up to 8 times.
const PHASE_MS: u64 = 400;
/// Between a failed round and the next, in milliseconds, twice as long after each failure, up to 16 times.
const BACKOFF_MS: u64 = 25;
/// A record that an acceptor did not answer is sent again after this long, in milliseconds.
const ACCEPT_AGAIN_MS: u64 = 150;
/// A holder waits this long for a majority that does not depose it, in milliseconds.
const PATIENCE_MS: u64 = 100;
/// Between two reads of the own acceptor, in milliseconds.
const POLL_OWN_MS: u64 = 100;
/// Between two reads of the others, in milliseconds.
const POLL_MS: u64 = 300;
/// Between two reads while a takeover comes near, in milliseconds.
const POLL_URGENT_MS: u64 = 40;
/// Questions without an answer are forgotten after this long, in milliseconds.
const FORGET_MS: u64 = 15_000;

impl Arbiter {
    /// Until when nothing is due unless an event comes.
    #[must_use]
    pub fn wake(&self, now: Time) -> Time {
        let mut next = if self.polls(now) { self.next_poll.min(self.next_poll_own) } else { now + millis(RENEW_MS) };
        let mut due = |at: Time| next = next.min(at);
        match &self.round {
            Some(round) => {
                due(round.deadline);
                match &round.phase {
                    Phase::Own => {}
                    Phase::Promises { patience, .. } if now < *patience => due(*patience),
                    Phase::Promises { .. } => {}
                    Phase::Accepting { again, .. } => due(*again),
                }
            }
            // One that is due and not begun waits for something else.
            None if self.round_is_due() => due(self.next_round.max(now + millis(10))),
            None => {}
        }
        match &self.standing {
            Standing::Holder if self.asked => due(self.next_renewal),
            Standing::Released { again, .. } => due((*again).max(now + millis(1))),
            Standing::Holder | Standing::Watching => {}
        }
        next.max(now)
    }

    pub(super) fn advance(&mut self, now: Time, effects: &mut Vec<Effect>) {
        self.drive_round(now, effects);
        self.begin_round(now, effects);
        self.renew(now, effects);
        self.release(now, effects);
        self.poll(now, effects);
        self.speak_of_silence(now, effects);
        self.questions.retain(|_, question| now.since(question.sent) < millis(FORGET_MS));
    }

    pub(super) fn ask(&mut self, now: Time, to: AcceptorId, about: About, request: Request, effects: &mut Vec<Effect>) {
        if self.out.contains_key(&to) {
            return;
        }
        let changes = self.changes.get(&to).copied().unwrap_or(0);
        let nonce = self.next_nonce;
        self.next_nonce = self.next_nonce.wrapping_add(1);
        self.questions.insert(nonce, Question { to, about, sent: now, changes });
        effects.push(Effect::Ask { to, nonce, request });
    }

    fn round_is_due(&self) -> bool {
        let write_back = self.write_back && self.is_holder();
        self.want.is_some() || write_back || !self.unsettled.is_empty()
    }

    fn begin_round(&mut self, now: Time, effects: &mut Vec<Effect>) {
        if self.round.is_some() || now < self.next_round || !self.round_is_due() {
            return;
        }
        let takes_over = self.want.as_ref().is_some_and(|want| want.change == Change::TakeOver);
        let stays_back = self.broken && self.offered.is_none() && self.silent_since(now).is_none();
        if takes_over && stays_back && self.rules.keep(Rule::BrokenWaits) && self.unsettled.is_empty() {
            return;
        }
        self.highest += 1;
        let deadline = now + millis(PHASE_MS << self.failures.min(3));
        let own_first = self.rules.keep(Rule::OwnPromiseFirst);
        let ballot = Ballot { number: self.highest, node: if own_first { self.own } else { AcceptorId(0) } };
        self.round = Some(Round { ballot, deadline, serves: None, phase: Phase::Own });
        if own_first {
            let request = Request::Prepare { ballot, by: self.me };
            self.ask(now, self.own, About::Prepare(ballot), request, effects);
        } else {
            self.ask_promises(now, BTreeMap::new(), effects);
        }
    }

    /// The own acceptor has promised: now the others.
    fn ask_promises(&mut self, now: Time, promised: BTreeMap<AcceptorId, Promise>, effects: &mut Vec<Effect>) {
        let targets: BTreeSet<AcceptorId> = self.voters().iter().chain(&self.configured).copied().collect();
        let Some(round) = &mut self.round else { return };
        let ballot = round.ballot;
        round.deadline = now + millis(PHASE_MS << self.failures.min(3));
        let patience = now + millis(PATIENCE_MS);
        let asked: Vec<AcceptorId> = targets.into_iter().filter(|id| !promised.contains_key(id)).collect();
        round.phase = Phase::Promises { promised, refused: BTreeMap::new(), patience };
        for to in asked {
            self.ask(now, to, About::Prepare(ballot), Request::Prepare { ballot, by: self.me }, effects);
        }
    }

    pub(super) fn promised(
        &mut self,
        now: Time,
        ballot: Ballot,
        from: AcceptorId,
        promise: Promise,
        effects: &mut Vec<Effect>,
    ) {
        let Some(round) = self.round.as_mut().filter(|round| round.ballot == ballot) else { return };
        match &mut round.phase {
            Phase::Own => self.ask_promises(now, BTreeMap::from([(from, promise)]), effects),
            Phase::Promises { promised, .. } => {
                promised.insert(from, promise);
            }
            Phase::Accepting { .. } => {}
        }
    }

    pub(super) fn prepare_refused(&mut self, now: Time, ballot: Ballot, from: AcceptorId, why: Refusal) {
        let Some(round) = self.round.as_mut().filter(|round| round.ballot == ballot) else { return };
        match (&mut round.phase, why) {
            // The own acceptor knows of a higher ballot: begin again above it, at once.
            (Phase::Own, Refusal::Promised(_)) => {
                (self.round, self.next_round) = (None, now);
            }
            (Phase::Own, why) => self.fail(now, &BTreeMap::from([(from, why)])),
            (Phase::Promises { refused, .. }, why) => {
                refused.insert(from, why);
            }
            (Phase::Accepting { .. }, _) => {}
        }
    }

    pub(super) fn accept_answered(&mut self, ballot: Ballot, from: AcceptorId, reply: Reply) {
        let Some(round) = self.round.as_mut().filter(|round| round.ballot == ballot) else { return };
        let Phase::Accepting { accepted, refused, .. } = &mut round.phase else { return };
        match reply {
            Reply::Accepted => {
                accepted.insert(from);
            }
            Reply::Refused(why) => {
                refused.insert(from, why);
            }
            _ => {}
        }
    }

    fn drive_round(&mut self, now: Time, effects: &mut Vec<Effect>) {
        if matches!(self.round, Some(Round { phase: Phase::Promises { .. }, .. })) {
            self.drive_promises(now, effects);
        }
        if matches!(self.round, Some(Round { phase: Phase::Accepting { .. }, .. })) {
            self.drive_accepting(now, effects);
        }
        if self.round.as_ref().is_some_and(|round| now >= round.deadline) {
            self.fail(now, &BTreeMap::new());
        }
        self.give_up_if_the_holder_lives(now, effects);
    }

    fn drive_promises(&mut self, now: Time, effects: &mut Vec<Effect>) {
        let Some(Round { phase: Phase::Promises { promised, refused, patience }, .. }) = &self.round else { return };
        let voters = self.voters();
        let all_in = voters.iter().all(|id| promised.contains_key(id) || refused.contains_key(id));
        let patient = now < *patience && !all_in;
        let first = match self.want.as_ref().map(|want| &want.change) {
            Some(Change::First(record)) => &record.voters,
            _ => &self.configured,
        };
        let Some(mut base) = choose(promised, first, self.mine.as_ref(), patient) else {
            // Who was refused by so many that no majority is left has lost this round.
            let left = voters.iter().filter(|id| !refused.contains_key(id));
            if !is_majority(voters, left) {
                let refused = refused.clone();
                self.fail(now, &refused);
            }
            return;
        };
        let stand_in;
        if !self.rules.keep(Rule::HighestValueWins) {
            // Sabotage: goes on from what this node believes.
            let believed = self.known.clone().or(self.hint.clone());
            stand_in = believed.map(|record| super::Accepted { ballot: Ballot::default(), record });
            base.accepted = stand_in.as_ref();
        }
        let proposal = Proposal {
            me: self.me,
            broken: self.broken,
            rules: self.rules,
            want: self.want.as_ref(),
            mine: self.mine.as_ref().map(|mine| mine.record.name()),
            released: matches!(self.standing, Standing::Released { .. }),
            unsettled: &self.unsettled,
        };
        let value = proposal.value(&base);
        let serves = self.want.as_ref().map(|want| want.id);
        match value {
            Value::Nothing => {
                // A majority holds nothing and promised: what was tried lower cannot land any more.
                self.round = None;
                self.give_up_want(now, effects);
                let over = std::mem::take(&mut self.unsettled);
                effects.extend(over.into_keys().map(Effect::NotLanded));
            }
            Value::New(record) => {
                self.proposed.insert(record.id);
                self.propose(now, record, true, serves, effects);
            }
            Value::Back(record) => self.propose(now, record, false, serves, effects),
        }
    }

    fn propose(&mut self, now: Time, record: Record, new: bool, serves: Option<RecordId>, effects: &mut Vec<Effect>) {
        let Some(round) = &mut self.round else { return };
        let ballot = round.ballot;
        if new || self.unsettled.contains_key(&record.id) {
            self.unsettled.insert(record.id, ballot);
        }
        round.serves = serves;
        round.deadline = now + millis(PHASE_MS << self.failures.min(3));
        round.phase = Phase::Accepting {
            record: record.clone(),
            accepted: BTreeSet::new(),
            refused: BTreeMap::new(),
            again: now + millis(ACCEPT_AGAIN_MS),
        };
        for to in record.voters.clone() {
            self.ask(now, to, About::Accept(ballot), Request::Accept { ballot, record: record.clone() }, effects);
        }
        if !self.rules.keep(Rule::AcceptanceSettles) && !new {
            // Sabotage: what the promises show is taken for known.
            self.conclude(now, ballot, record, serves, effects);
        }
    }

    fn drive_accepting(&mut self, now: Time, effects: &mut Vec<Effect>) {
        let Some(round) = &mut self.round else { return };
        let (ballot, serves) = (round.ballot, round.serves);
        let Phase::Accepting { record, accepted, refused, again } = &mut round.phase else { return };
        if is_majority(&record.voters, accepted.iter()) {
            let record = record.clone();
            self.round = None;
            (self.failures, self.write_back) = (0, false);
            self.conclude(now, ballot, record, serves, effects);
            return;
        }
        let left = record.voters.iter().filter(|id| !refused.contains_key(id));
        if !is_majority(&record.voters, left) {
            let refused = refused.clone();
            self.fail_accepting(now, &refused, effects);
        } else if now >= round.deadline {
            self.fail_accepting(now, &BTreeMap::new(), effects);
        } else if now >= *again {
            *again = now + millis(ACCEPT_AGAIN_MS);
            let record = record.clone();
            let silent = record.voters.iter().copied().filter(|id| !accepted.contains(id) && !refused.contains_key(id));
            for to in silent.collect::<Vec<_>>() {
                self.ask(now, to, About::Accept(ballot), Request::Accept { ballot, record: record.clone() }, effects);
            }
        }
    }

    /// A majority accepted. The want that the round served is decided.
    fn conclude(
        &mut self,
        now: Time,
        ballot: Ballot,
        record: Record,
        serves: Option<RecordId>,
        effects: &mut Vec<Effect>,
    ) {
        self.next_round = now;
        self.learn(now, Some(ballot), record, true, effects);
        if serves.is_some() && self.want.as_ref().map(|want| want.id) == serves {
            self.give_up_want(now, effects);
        }
    }

    fn fail_accepting(&mut self, now: Time, refused: &BTreeMap<AcceptorId, Refusal>, effects: &mut Vec<Effect>) {
        self.fail(now, refused);
        if !self.rules.keep(Rule::OutcomeUnknown) {
            // Sabotage: takes a failure for "did not happen".
            let over = std::mem::take(&mut self.unsettled);
            effects.extend(over.into_keys().map(Effect::NotLanded));
            self.want = None;
        }
    }

    /// The round came to nothing. The next one follows after a while: when the grants that were in the way have run out,
    /// else the later, the more have failed; two contenders wait differently.
    fn fail(&mut self, now: Time, refused: &BTreeMap<AcceptorId, Refusal>) {
        self.round = None;
        let left = refused.values().filter_map(|why| match why {
            Refusal::Granted { left_ms, .. } => Some(u64::from(*left_ms)),
            _ => None,
        });
        let wait = left.min().map_or_else(
            || {
                let spread = (self.own.0 as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 32;
                let most = BACKOFF_MS << self.failures.min(4);
                most + spread.wrapping_mul(u64::from(self.failures) + 1) % most
            },
            |left_ms| left_ms.clamp(5, RENEW_MS),
        );
        self.failures += 1;
        self.next_round = now + millis(wait);
    }

    /// A takeover or a restart that grants to another hold off for longer than a lease meets a living holder: it is given
    /// up, so that the caller may follow again.
    fn give_up_if_the_holder_lives(&mut self, now: Time, effects: &mut Vec<Effect>) {
        let Some(want) = &self.want else { return };
        let yields = matches!(want.change, Change::TakeOver | Change::GoOn);
        let old = now.since(want.since) > millis(LEASE_MS + 2 * RENEW_MS);
        let lately = self.last_heard(now).is_some_and(|heard| heard > want.since);
        if yields && old && lately && !self.unsettled.contains_key(&want.id) {
            if !matches!(self.round, Some(Round { phase: Phase::Accepting { .. }, .. })) {
                self.round = None;
            }
            self.give_up_want(now, effects);
        }
    }

    fn renew(&mut self, now: Time, effects: &mut Vec<Effect>) {
        // A holder that has to write another's record back lets its own grants run out: they would hold it off.
        let deposes = |phase: &Phase| matches!(phase, Phase::Accepting { record, .. } if record.holder != self.me);
        let yields = self.round.as_ref().is_some_and(|round| deposes(&round.phase));
        if !self.is_holder() || !self.asked || now < self.next_renewal || yields {
            return;
        }
        let Some(mine) = self.mine.clone() else { return };
        (self.asked, self.next_renewal) = (false, now + millis(RENEW_MS));
        for to in mine.record.voters.clone() {
            let (record, heard) = (mine.record.name(), self.grants.heard(to));
            self.ask(now, to, About::Renew, Request::Renew { ballot: mine.ballot, record, heard }, effects);
        }
    }

    fn release(&mut self, now: Time, effects: &mut Vec<Effect>) {
        let (Standing::Released { to: target, confirmed, told, again, .. }, Some(mine)) =
            (&mut self.standing, &self.mine)
        else {
            return;
        };
        let (ballot, record) = (mine.ballot, &mine.record);
        let name = record.name();
        if !*told && is_majority(&record.voters, confirmed.iter()) {
            *told = true;
            effects.push(Effect::Released(name));
        }
        if now < *again {
            return;
        }
        *again = now + millis(ACCEPT_AGAIN_MS);
        let target = *target;
        let silent: Vec<_> = record.voters.iter().copied().filter(|id| !confirmed.contains(id)).collect();
        for to in silent {
            self.ask(now, to, About::Release, Request::Release { ballot, record: name, to: target }, effects);
        }
    }

    /// A holder whose renewals go through has no need to read.
    fn polls(&self, now: Time) -> bool {
        let doubts = self.write_back || !self.unsettled.is_empty() || now + millis(LEASE_MS / 2) >= self.lease;
        !self.is_holder() || doubts
    }

    fn poll(&mut self, now: Time, effects: &mut Vec<Effect>) {
        if !self.polls(now) {
            return;
        }
        let heard = self.last_heard(now);
        let near = heard.is_some_and(|at| {
            (millis(LEASE_MS)..millis(2 * TAKEOVER_MS)).contains(&now.since(at.max(self.watching_since)))
        });
        let offered = self.offered.is_some();
        let (own, others) = if near && !offered { (POLL_URGENT_MS, POLL_URGENT_MS) } else { (POLL_OWN_MS, POLL_MS) };
        let record = self.known.as_ref().or(self.hint.as_ref());
        let in_sync = record.is_some_and(|record| record.is_in_sync(self.me));
        let candidate = (in_sync && !self.broken).then_some(self.me);
        let voters = watch::voters(record, &self.configured).to_vec();
        let (read, own_acceptor) = (Request::Read { candidate }, self.own);
        if now >= self.next_poll_own || now + millis(own) < self.next_poll_own {
            self.next_poll_own = now + millis(own);
            self.ask(now, self.own, About::Read, read.clone(), effects);
        }
        if now >= self.next_poll || now + millis(others) < self.next_poll {
            self.next_poll = now + millis(others);
            for to in voters.into_iter().filter(|id| *id != own_acceptor) {
                self.ask(now, to, About::Read, read.clone(), effects);
            }
        }
    }

    fn speak_of_silence(&mut self, now: Time, effects: &mut Vec<Effect>) {
        if !matches!(self.standing, Standing::Watching) {
            return;
        }
        if let Some(offer) = self.watch.offered_to(self.me).map(|accepted| accepted.record.name()) {
            if self.offered != Some(offer) && self.known.as_ref().is_none_or(|known| known.name() == offer) {
                self.offered = Some(offer);
                effects.push(Effect::Offered(offer));
            }
        } else {
            self.offered = None;
        }
        if self.want.is_some() || !self.unsettled.is_empty() {
            return;
        }
        let known_in = self.known.as_ref().is_some_and(|known| known.is_in_sync(self.me));
        let may_be_in = known_in || self.watch.newer_record_has(self.me, self.known.as_ref());
        match self.silent_since(now) {
            Some(since) if !self.silence_told && may_be_in && now >= self.speak_again => {
                self.silence_told = true;
                effects.push(Effect::HolderSilent { since });
            }
            None if self.silence_told && self.last_heard(now).is_some() => {
                self.silence_told = false;
                effects.push(Effect::HolderHeard);
            }
            Some(_) | None => {}
        }
    }
}
