//! One round of the register: promises of a majority, a value, acceptance by a majority.
//!
//! Decides which value a round writes. Holds: one round's answers. Keeps out: when rounds begin and what follows.
//! Own ─own acceptor promised─> Promises ─majority─> Accepting ─majority─> known
//! Invariant: what a majority's promises show with the highest ballot is what the round goes on from, be it whose it may.
use super::event::Change;
use super::message::{Accepted, Ballot, Refusal};
use super::rules::{Rule, Rules};
use crate::ids::{AcceptorId, RecordId, ReplicaId};
use crate::record::{Record, RecordName};
use crate::time::Time;
use std::collections::{BTreeMap, BTreeSet};

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Round {
    pub ballot: Ballot,
    /// The phase is given up then.
    pub deadline: Time,
    /// The want that it began for.
    pub serves: Option<RecordId>,
    pub phase: Phase,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Phase {
    Own,
    Promises {
        promised: BTreeMap<AcceptorId, Promise>,
        refused: BTreeMap<AcceptorId, Refusal>,
        /// A holder waits so long for a majority that does not depose it.
        patience: Time,
    },
    Accepting {
        record: Record,
        accepted: BTreeSet<AcceptorId>,
        refused: BTreeMap<AcceptorId, Refusal>,
        /// Who was silent is told again then.
        again: Time,
    },
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Promise {
    pub accepted: Option<Accepted>,
    pub released_to: Option<ReplicaId>,
}

/// What a change is judged by.
pub(super) struct Proposal<'a> {
    pub me: ReplicaId,
    pub broken: bool,
    pub rules: Rules,
    pub want: Option<&'a Want>,
    /// The record under which this node is (or was, before it released it) the holder.
    pub mine: Option<RecordName>,
    /// The mine was released.
    pub released: bool,
    /// Ids that this process proposed and whose outcome it does not know.
    pub unsettled: &'a BTreeMap<RecordId, Ballot>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Want {
    pub id: RecordId,
    pub change: Change,
    pub since: Time,
    /// The record that the caller knew when it asked.
    pub expected: Option<RecordName>,
}

/// Where a round goes on from: the highest value of a majority, and whether its holder released it to whom.
#[derive(Debug)]
pub(super) struct Base<'a> {
    pub accepted: Option<&'a Accepted>,
    pub released_to: Option<ReplicaId>,
}

/// A new value, an old one written back, or nothing to write.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Value {
    New(Record),
    Back(Record),
    Nothing,
}

/// Whether `who` is a majority of `voters`.
pub(super) fn is_majority<'a>(voters: &[AcceptorId], who: impl Iterator<Item = &'a AcceptorId>) -> bool {
    who.filter(|id| voters.contains(id)).count() > voters.len() / 2
}

/// The majority of promises to go on from. Any majority will do; a holder prefers one that shows nothing newer than its own
/// record, and waits for it until its patience ends: what one acceptor took from a contender need not depose it.
pub(super) fn choose<'a>(
    promised: &'a BTreeMap<AcceptorId, Promise>,
    configured: &[AcceptorId],
    mine: Option<&Accepted>,
    patient: bool,
) -> Option<Base<'a>> {
    if let Some(mine) = mine {
        let agrees = |p: &&Promise| p.accepted.as_ref().is_none_or(|a| a.ballot <= mine.ballot);
        let agreeing: Vec<_> = promised.iter().filter(|(_, p)| agrees(p)).collect();
        if is_majority(&mine.record.voters, agreeing.iter().map(|(id, _)| *id)) {
            return Some(base(agreeing.into_iter().map(|(_, p)| p)));
        }
        if patient {
            return None;
        }
    }
    let all = base(promised.values());
    let voters = all.accepted.map_or(configured, |a| &a.record.voters);
    is_majority(voters, promised.keys()).then_some(all)
}

fn base<'a>(promises: impl Iterator<Item = &'a Promise> + Clone) -> Base<'a> {
    let accepted = promises.clone().filter_map(|p| p.accepted.as_ref()).max_by_key(|a| a.ballot);
    let of_highest = |p: &&Promise| p.accepted.as_ref().map(|a| a.ballot) == accepted.map(|a| a.ballot);
    let released_to = promises.filter(of_highest).find_map(|p| p.released_to);
    Base { accepted, released_to }
}

impl Proposal<'_> {
    /// The value that follows from `base`: the wanted change where the rules allow it, else what was found, written back.
    pub(super) fn value(&self, base: &Base<'_>) -> Value {
        let Some(found) = base.accepted.map(|accepted| &accepted.record) else {
            return match self.want.map(|want| &want.change) {
                Some(Change::First(record)) => Value::New(record.clone()),
                _ => Value::Nothing,
            };
        };
        let Some(want) = self.want else { return Value::Back(found.clone()) };
        if found.id == want.id {
            return Value::Back(found.clone());
        }
        match self.change(found, base.released_to, want) {
            Some(record) => Value::New(record),
            None => Value::Back(found.clone()),
        }
    }

    fn change(&self, found: &Record, released_to: Option<ReplicaId>, want: &Want) -> Option<Record> {
        let mine = self.mine == Some(found.name()) && found.holder == self.me;
        let mine_or_own = found.holder == self.me && (mine || self.unsettled.contains_key(&found.id));
        match &want.change {
            Change::First(_) | Change::GoOn => None,
            Change::TakeOver => {
                let as_expected = want.expected.is_none_or(|name| name == found.name());
                // What this process proposed before and did not see the end of is no surprise either.
                let own = self.unsettled.contains_key(&found.id);
                if !found.is_in_sync(self.me) || !(as_expected || own) {
                    return None;
                }
                let handed_over = released_to == Some(self.me) && !self.broken;
                let keep = handed_over || !self.rules.keep(Rule::TakeoverAlone);
                Some(found.next(want.id, self.me, if keep { found.in_sync.clone() } else { vec![self.me] }))
            }
            Change::Drop(peer) => {
                let (may, has) = (mine_or_own && !self.released && *peer != self.me, found.is_in_sync(*peer));
                let rest = found.in_sync.iter().copied().filter(|replica| replica != peer).collect();
                (may && has).then(|| found.next(want.id, self.me, rest))
            }
            Change::Join(peer) => {
                let (may, has) = (mine && !self.released, found.is_in_sync(*peer));
                let all = found.in_sync.iter().copied().chain([*peer]).collect();
                (may && !has).then(|| found.next(want.id, self.me, all))
            }
            Change::TakeBack => (mine && self.released).then(|| found.next(want.id, self.me, found.in_sync.clone())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: ReplicaId = ReplicaId(0xa);
    const B: ReplicaId = ReplicaId(0xb);

    #[test]
    fn a_takeover_leaves_the_old_holder_out_unless_it_was_handed_over() {
        let found = found(A, vec![A, B]);
        let want = want(Change::TakeOver, None);
        let proposal = Proposal { me: B, ..proposal(&want, None) };
        let Value::New(record) = proposal.value(&base(&found, None)) else { panic!("nothing new") };
        assert_eq!((record.holder, &record.in_sync[..], record.generation.0), (B, &[B][..], 3));
        let Value::New(record) = proposal.value(&base(&found, Some(B))) else { panic!("nothing new") };
        assert_eq!((record.holder, &record.in_sync[..]), (B, &[A, B][..]));
        let broken = Proposal { broken: true, ..proposal };
        let Value::New(record) = broken.value(&base(&found, Some(B))) else { panic!("nothing new") };
        assert_eq!(record.in_sync, [B]);
    }

    #[test]
    fn who_is_out_or_expected_something_else_writes_back_what_it_found() {
        let found_out = found(A, vec![A]);
        let takeover = want(Change::TakeOver, None);
        let proposal_b = Proposal { me: B, ..proposal(&takeover, None) };
        assert_eq!(proposal_b.value(&base(&found_out, None)), Value::Back(found_out.record.clone()));
        let mut both = found(A, vec![A, B]);
        both.record.id = RecordId(3);
        let takeover = want(Change::TakeOver, Some(found_out.record.name()));
        let proposal_b = Proposal { me: B, ..proposal(&takeover, None) };
        assert_eq!(proposal_b.value(&base(&both, None)), Value::Back(both.record.clone()));
    }

    #[test]
    fn the_holder_changes_only_what_it_holds() {
        let both = found(A, vec![A, B]);
        let drop = want(Change::Drop(B), None);
        let Value::New(record) = proposal(&drop, Some(both.record.name())).value(&base(&both, None)) else { panic!() };
        assert_eq!(record.in_sync, [A]);
        assert_eq!(proposal(&drop, None).value(&base(&both, None)), Value::Back(both.record.clone()));
        let alone = found(A, vec![A]);
        let join = want(Change::Join(B), None);
        let Value::New(record) = proposal(&join, Some(alone.record.name())).value(&base(&alone, None)) else {
            panic!()
        };
        assert_eq!(record.in_sync, [A, B]);
        let released = Proposal { released: true, ..proposal(&join, Some(alone.record.name())) };
        assert_eq!(released.value(&base(&alone, None)), Value::Back(alone.record.clone()));
    }

    #[test]
    fn a_retry_knows_its_own_by_the_id() {
        let mut own = found(A, vec![A]);
        own.record.id = WANT;
        let drop = want(Change::Drop(B), None);
        assert_eq!(proposal(&drop, None).value(&base(&own, None)), Value::Back(own.record.clone()));
    }

    #[test]
    fn a_holder_prefers_a_majority_that_agrees_and_anybody_else_takes_the_highest() {
        let mine = found(A, vec![A, B]);
        let mut contender = found(B, vec![B]);
        contender.ballot.number = 9;
        let promise = |a: &Accepted| Promise { accepted: Some(a.clone()), released_to: None };
        let two = BTreeMap::from([(AcceptorId(1), promise(&mine)), (AcceptorId(2), promise(&contender))]);
        assert!(choose(&two, &[], Some(&mine), true).is_none());
        assert_eq!(choose(&two, &[], Some(&mine), false).unwrap().accepted, Some(&contender));
        let mut three = two.clone();
        three.insert(AcceptorId(3), promise(&mine));
        assert_eq!(choose(&three, &[], Some(&mine), true).unwrap().accepted, Some(&mine));
        assert_eq!(choose(&three, &[], None, false).unwrap().accepted, Some(&contender));
    }

    const WANT: RecordId = RecordId(77);
    static NOTHING: BTreeMap<RecordId, Ballot> = BTreeMap::new();

    fn want(change: Change, expected: Option<RecordName>) -> Want {
        Want { id: WANT, change, since: Time(0), expected }
    }

    fn proposal(want: &Want, mine: Option<RecordName>) -> Proposal<'_> {
        Proposal {
            me: A,
            broken: false,
            rules: Rules::ALL,
            want: Some(want),
            mine,
            released: false,
            unsettled: &NOTHING,
        }
    }

    fn found(holder: ReplicaId, in_sync: Vec<ReplicaId>) -> Accepted {
        let first = Record::first(RecordId(1), holder, (1..=3).map(AcceptorId).collect());
        let ballot = Ballot { number: 2, node: AcceptorId(1) };
        Accepted { ballot, record: first.next(RecordId(2), holder, in_sync) }
    }

    fn base(accepted: &Accepted, released_to: Option<ReplicaId>) -> Base<'_> {
        Base { accepted: Some(accepted), released_to }
    }
}
