//! Which rules of PROTOCOL.md the arbiter keeps: all of them, in the product.
//!
//! A simulator switches single ones off and has to find what they prevent: a rule whose loss nobody notices is either
//! not needed or not tested.

/// One rule that can be switched off by a test.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Rule {
    /// R1: no promise to another while a grant lasts.
    NoPromiseUnderGrant = 1,
    /// R1: no other holder's record is accepted while a grant lasts.
    NoAcceptUnderGrant = 1 << 1,
    /// R1: no grant after a higher promise.
    NoGrantUnderPromise = 1 << 2,
    /// R1: after its start an acceptor refuses others for one full lease.
    GuardAfterStart = 1 << 3,
    /// R1: a holder whose renewals arrive and who does not hear the answers gets no more.
    OneWayCut = 1 << 4,
    /// R1: a release counts for the reign that it names only.
    ReleaseNamesReign = 1 << 5,
    /// R1: the lease is counted from when the renewal was sent.
    LeaseFromSend = 1 << 6,
    /// R1: a holder that is refused writes its record back.
    WriteBack = 1 << 7,
    /// R4: a takeover leaves the old holder out.
    TakeoverAlone = 1 << 8,
    /// R4: a broken holder goes on only by a generation that it proposed since its boot.
    BrokenProposes = 1 << 9,
    /// R4: a broken node stays back longer than an unbroken one.
    BrokenWaits = 1 << 10,
    /// R9: an outcome is unknown until a majority accepted.
    OutcomeUnknown = 1 << 11,
    /// R12: a proposer takes its own acceptor's promise first.
    OwnPromiseFirst = 1 << 12,
    /// R12: a promise needs a strictly higher ballot.
    PromiseStrictlyHigher = 1 << 13,
    /// R12: an accept raises the promise.
    AcceptRaisesPromise = 1 << 14,
    /// R12: an acceptor that answers an older change count than was seen is out.
    ChangeCount = 1 << 15,
    /// What a majority's promises show is written back, not overwritten.
    HighestValueWins = 1 << 16,
    /// R9: promises settle nothing, only acceptance by a majority does.
    AcceptanceSettles = 1 << 17,
    /// Section 1: a record is known by a majority's answer, never by one acceptor's word.
    MajorityReads = 1 << 18,
    /// R1: a holder's process that was started anew goes on by a round only.
    ProvesByRound = 1 << 19,
}

/// The rules that are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Rules(u32);

impl Rules {
    /// Every one: the only choice of the product.
    pub const ALL: Self = Self(u32::MAX);

    /// All of these but one.
    #[must_use]
    pub const fn without(self, rule: Rule) -> Self {
        Self(self.0 & !(rule as u32))
    }

    pub(super) const fn keep(self, rule: Rule) -> bool {
        self.0 & rule as u32 != 0
    }
}
