//! What the acceptors say when they are only read: the record that a majority holds, and how long ago a holder last gave a
//! sign of life.
//!
//! Holds: the last state that each acceptor answered. Keeps out: rounds. Never takes one acceptor's word for a record.
use super::message::{Accepted, AcceptorState};
use super::rules::{Rule, Rules};
use crate::ids::{AcceptorId, ReplicaId};
use crate::limits::{LEASE_MS, TAKEOVER_MS};
use crate::record::Record;
use crate::time::{Time, millis};
use std::collections::BTreeMap;

/// An answer older than this says nothing about now, in milliseconds.
const FRESH_MS: u64 = 800;

#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Watch {
    seen: BTreeMap<AcceptorId, Seen>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Seen {
    /// When the answer came, and when it was asked for.
    at: Time,
    asked: Time,
    state: AcceptorState,
}

/// Who asks how long the holder has been silent.
pub(super) struct Watcher {
    pub me: ReplicaId,
    pub broken: bool,
    /// Since when it watches.
    pub since: Time,
    /// When it last learnt of a new record, and whether that is another's.
    pub news: Time,
    pub follows: bool,
    pub rules: Rules,
}

impl Watch {
    /// An acceptor's answer; one to an older question than the last says nothing any more.
    pub(super) fn saw(&mut self, from: AcceptorId, at: Time, asked: Time, state: AcceptorState) {
        if self.seen.get(&from).is_none_or(|seen| seen.asked <= asked) {
            self.seen.insert(from, Seen { at, asked, state });
        }
    }

    pub(super) fn forget(&mut self, acceptor: AcceptorId) {
        self.seen.remove(&acceptor);
    }

    /// The value that a majority of its own voters holds with one ballot: it was chosen.
    pub(super) fn majority(&self) -> Option<&Accepted> {
        let held = |voter: &AcceptorId| self.seen.get(voter).and_then(|seen| seen.state.accepted.as_ref());
        let of_majority = |accepted: &&Accepted| {
            let record = &accepted.record;
            record.voters.iter().filter(|voter| held(voter) == Some(accepted)).count() >= record.majority()
        };
        self.seen.values().filter_map(|seen| seen.state.accepted.as_ref()).filter(of_majority).max_by_key(|a| a.ballot)
    }

    /// Whether some acceptor holds a record, newer than what is known, that has `replica` in sync. It may not have been
    /// chosen; a round tells.
    pub(super) fn newer_record_has(&self, replica: ReplicaId, known: Option<&Record>) -> bool {
        self.accepted().any(|accepted| {
            let newer = known.is_none_or(|known| accepted.record.is_newer_than(known));
            newer && accepted.record.is_in_sync(replica)
        })
    }

    /// All values held, one per acceptor at most.
    pub(super) fn accepted(&self) -> impl Iterator<Item = &Accepted> {
        self.seen.values().filter_map(|seen| seen.state.accepted.as_ref())
    }

    /// The record that an acceptor says was released to `replica`.
    pub(super) fn offered_to(&self, replica: ReplicaId) -> Option<&Accepted> {
        let offer = self.seen.values().find(|seen| seen.state.released == Some(Some(replica)))?;
        offer.state.accepted.as_ref().filter(|a| a.record.is_in_sync(replica) && a.record.holder != replica)
    }

    /// The last sign of life of another holder that any fresh acceptor saw, if a majority of `voters` is fresh. Read late
    /// is seen late: an error is on the safe side. An acceptor that has no record, or still one of this node's own reign,
    /// says nothing about the holder; then the news of the record itself count.
    pub(super) fn last_heard(&self, now: Time, watcher: &Watcher, voters: &[AcceptorId]) -> Option<Time> {
        let fresh: Vec<&Seen> =
            voters.iter().filter_map(|v| self.seen.get(v)).filter(|s| now.since(s.at) <= millis(FRESH_MS)).collect();
        if fresh.len() < voters.len() / 2 + 1 {
            return None;
        }
        let heard = |seen: &&Seen| match seen.state.grant {
            None => Some(watcher.news),
            Some(grant) if grant.holder == watcher.me => watcher.follows.then_some(watcher.news),
            Some(grant) => Some(seen.at - millis(u64::from(grant.ago_ms))),
        };
        Some(fresh.iter().filter_map(heard).max().unwrap_or(Time(0)))
    }

    /// Since when a majority has heard nothing of a holder, where that is long enough for `watcher` to ask (R4).
    pub(super) fn silent_since(&self, now: Time, watcher: &Watcher, voters: &[AcceptorId]) -> Option<Time> {
        let mut since = self.last_heard(now, watcher, voters)?;
        let mut wait = TAKEOVER_MS;
        if watcher.broken && watcher.rules.keep(Rule::BrokenWaits) {
            since = since.max(watcher.since);
            wait += LEASE_MS;
            if self.other_candidate(now, watcher.me) {
                wait += TAKEOVER_MS;
            }
        }
        (now.since(since) >= millis(wait)).then_some(since)
    }

    /// Whether another replica reads on, unbroken and in sync as far as it knows.
    fn other_candidate(&self, now: Time, me: ReplicaId) -> bool {
        self.seen.values().any(|seen| {
            let lately = |ago_ms: u32| now.since(seen.at - millis(ago_ms.into())) <= millis(LEASE_MS);
            seen.state.candidate.is_some_and(|c| c.replica != me && lately(c.ago_ms))
        })
    }
}

/// Who votes, as far as is known: by the record, else as configured.
pub(super) fn voters<'a>(record: Option<&'a Record>, configured: &'a [AcceptorId]) -> &'a [AcceptorId] {
    record.map_or(configured, |record| &record.voters)
}

#[cfg(test)]
mod tests {
    use super::super::message::{Ballot, CandidateState, GrantState};
    use super::*;
    use crate::ids::RecordId;

    const A: ReplicaId = ReplicaId(0xa);
    const B: ReplicaId = ReplicaId(0xb);

    #[test]
    fn one_acceptors_word_is_no_record_and_two_ballots_are_no_majority() {
        let mut watch = Watch::default();
        watch.saw(AcceptorId(1), Time(1), Time(1), state(4, 0));
        assert_eq!(watch.majority(), None);
        watch.saw(AcceptorId(2), Time(1), Time(1), state(5, 0));
        assert_eq!(watch.majority(), None);
        watch.saw(AcceptorId(3), Time(1), Time(1), state(4, 0));
        assert_eq!(watch.majority().map(|a| a.ballot.number), Some(4));
    }

    #[test]
    fn silence_needs_fresh_answers_of_a_majority_and_a_broken_node_waits_longer() {
        let voters: Vec<_> = (1..=3).map(AcceptorId).collect();
        let mut watcher =
            Watcher { me: B, broken: false, since: Time(0), news: Time(0), follows: true, rules: Rules::ALL };
        let mut watch = Watch::default();
        let at = Time::from_millis(10_000);
        watch.saw(voters[0], at, at, state(1, 1900));
        assert_eq!(watch.silent_since(at, &watcher, &voters), None, "one of three");
        watch.saw(voters[1], at, at, state(1, 1700));
        assert_eq!(watch.silent_since(at, &watcher, &voters), None, "heard 1700 ms ago");
        let later = at + millis(100);
        assert_eq!(watch.silent_since(later, &watcher, &voters), Some(Time::from_millis(8300)));
        assert_eq!(watch.silent_since(at + millis(FRESH_MS + 1), &watcher, &voters), None, "stale");
        watcher.broken = true;
        assert_eq!(watch.silent_since(later, &watcher, &voters), None);
        for voter in &voters {
            watch.saw(*voter, at, at, state(1, 3000));
        }
        assert!(watch.silent_since(at, &watcher, &voters).is_some());
        let mut seen = state(1, 3000);
        seen.candidate = Some(CandidateState { replica: A, ago_ms: 100 });
        watch.saw(voters[2], at, at, seen);
        assert_eq!(watch.silent_since(at, &watcher, &voters), None, "the other one is there and unbroken");
    }

    fn state(ballot: u64, ago_ms: u32) -> AcceptorState {
        let record = Record::first(RecordId(1), A, (1..=3).map(AcceptorId).collect());
        AcceptorState {
            accepted: Some(Accepted { ballot: Ballot { number: ballot, node: AcceptorId(1) }, record }),
            grant: Some(GrantState { holder: A, ago_ms, left_ms: 0 }),
            ..AcceptorState::default()
        }
    }
}
