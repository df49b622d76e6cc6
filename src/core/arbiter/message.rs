//! What a proposer asks an acceptor, and what it answers.
//!
//! Bytes (little-endian), without a frame: kind u8, then the fields in the order in which they stand below. A ballot is
//! number u64 · node u128; a record's name epoch u64 · generation u64 · id u128; an accepted value ballot · record; an
//! option a 0/1 byte before its value. An answer begins with acceptor u128 · changes u64.
//! Keeps out: frames, nonces and the module's name, which the shell puts around it.
use crate::ids::{AcceptorId, Epoch, Generation, RecordId, ReplicaId};
use crate::record::{Record, RecordName};
use crate::wire::codec::{DecodeError, Reader, Writer};

/// Bytes of the longest request or answer, for the shell's frame: a record with all lists full, and room to spare.
pub const MESSAGE_BYTES_MAX: usize = 1024;

/// A proposer's number. No two proposers share one, and none uses one twice: its own acceptor promised it first (R12).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ballot {
    /// Counts up.
    pub number: u64,
    /// The proposer, by its own acceptor.
    pub node: AcceptorId,
}

impl Default for Ballot {
    /// Lower than every ballot that is used.
    fn default() -> Self {
        Self { number: 0, node: AcceptorId(0) }
    }
}

/// A value with the ballot at which an acceptor accepted it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Accepted {
    /// When, in the order of ballots.
    pub ballot: Ballot,
    /// What.
    pub record: Record,
}

/// A question to an acceptor.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Request {
    /// What do you hold? Uses no ballot and changes nothing.
    Read {
        /// The reader's replica, where it is unbroken, in sync as far as it knows, and would run the VM (R4: a broken one
        /// stays back behind it).
        candidate: Option<ReplicaId>,
    },
    /// Promise this ballot.
    Prepare {
        /// The ballot.
        ballot: Ballot,
        /// Who proposes: the holder itself is not held off by its own grant.
        by: ReplicaId,
    },
    /// Accept this record.
    Accept {
        /// The ballot that a majority promised.
        ballot: Ballot,
        /// The value.
        record: Record,
    },
    /// Grant the holder its lease once more.
    Renew {
        /// At which the acceptor should have accepted the record.
        ballot: Ballot,
        /// The record that the holder goes on under.
        record: RecordName,
        /// Number of the last grant of this acceptor that arrived; 0: none.
        heard: u64,
    },
    /// The holder serves nothing any more under this record; its grant is void.
    Release {
        /// At which it was accepted: a late release of an older reign changes nothing.
        ballot: Ballot,
        /// The record.
        record: RecordName,
        /// The swap's target: it may keep both in sync, all was flushed on both sides.
        to: Option<ReplicaId>,
    },
}

/// What an acceptor says.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Answer {
    /// Who answers: one that lost its state is another one (R12).
    pub acceptor: AcceptorId,
    /// How often its stored state has changed. It never goes back, unless it was restored from a copy.
    pub changes: u64,
    /// The answer itself.
    pub reply: Reply,
}

/// The answer itself.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Reply {
    /// To `Read`.
    State(AcceptorState),
    /// To `Prepare`: no lower ballot will be promised or accepted any more.
    Promised {
        /// What it had accepted.
        accepted: Option<Accepted>,
        /// Who was named when that record was released.
        released_to: Option<ReplicaId>,
    },
    /// To `Accept`.
    Accepted,
    /// To `Renew`.
    Granted {
        /// Its number, for the next renewal.
        number: u64,
    },
    /// To `Release`.
    Released,
    /// To any but `Read`.
    Refused(Refusal),
}

/// Why not.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Refusal {
    /// This ballot was promised, and yours is not higher.
    Promised(Ballot),
    /// A grant to another replica lasts.
    Granted {
        /// To whom.
        holder: ReplicaId,
        /// How much longer, in milliseconds.
        left_ms: u32,
    },
    /// The register has gone on to this epoch.
    OlderEpoch(Epoch),
    /// This acceptor is not among the record's voters.
    NotVoter,
    /// It has accepted this and not what you named.
    NotAccepted(Option<(Ballot, RecordName)>),
    /// The record that you named was released.
    Released,
    /// Its answers do not reach you (one-way cut): no grant for some time.
    Unheard {
        /// How long, in milliseconds.
        left_ms: u32,
    },
}

/// What an acceptor holds, for readers and watchers.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct AcceptorState {
    /// Highest ballot promised.
    pub promised: Ballot,
    /// What it accepted last.
    pub accepted: Option<Accepted>,
    /// The last sign of life of a holder.
    pub grant: Option<GrantState>,
    /// Whether the accepted record was released, and to whom.
    pub released: Option<Option<ReplicaId>>,
    /// The last candidate that read here.
    pub candidate: Option<CandidateState>,
}

/// The last grant, release or accepted record: signs of life of that holder.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct GrantState {
    /// Whose.
    pub holder: ReplicaId,
    /// How long ago, in milliseconds.
    pub ago_ms: u32,
    /// How much longer the grant lasts, in milliseconds; 0: it does not.
    pub left_ms: u32,
}

/// A reader that could take over without loss.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CandidateState {
    /// Its replica.
    pub replica: ReplicaId,
    /// When it read last, in milliseconds before this answer.
    pub ago_ms: u32,
}

impl Ballot {
    fn encode(self, out: &mut Writer<'_>) {
        out.u64(self.number);
        out.u128(self.node.0);
    }

    fn decode(from: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let ballot = Self { number: from.u64()?, node: AcceptorId(from.u128()?) };
        // Half of the numbers stay free, so that the next one always exists.
        if ballot.number > u64::MAX / 2 { Err(DecodeError::Bad { what: "ballot" }) } else { Ok(ballot) }
    }
}

impl Accepted {
    pub(super) fn encode(&self, out: &mut Writer<'_>) {
        self.ballot.encode(out);
        self.record.encode(out);
    }

    pub(super) fn decode(from: &mut Reader<'_>) -> Result<Self, DecodeError> {
        Ok(Self { ballot: Ballot::decode(from)?, record: Record::decode(from)? })
    }
}

fn encode_name(name: &RecordName, out: &mut Writer<'_>) {
    out.u64(name.epoch.0);
    out.u64(name.generation.0);
    out.u128(name.id.0);
}

fn decode_name(from: &mut Reader<'_>) -> Result<RecordName, DecodeError> {
    Ok(RecordName { epoch: Epoch(from.u64()?), generation: Generation(from.u64()?), id: RecordId(from.u128()?) })
}

fn encode_replica(replica: Option<&ReplicaId>, out: &mut Writer<'_>) {
    out.option(replica, |out, r| out.u128(r.0));
}

fn decode_replica(from: &mut Reader<'_>) -> Result<Option<ReplicaId>, DecodeError> {
    from.option(|f| f.u128().map(ReplicaId))
}

pub(super) fn encode_ballot(ballot: Ballot, out: &mut Writer<'_>) {
    ballot.encode(out);
}

pub(super) fn decode_ballot(from: &mut Reader<'_>) -> Result<Ballot, DecodeError> {
    Ballot::decode(from)
}

impl Request {
    /// Appends the bytes.
    pub fn encode(&self, out: &mut Writer<'_>) {
        match self {
            Self::Read { candidate } => {
                out.u8(1);
                encode_replica(candidate.as_ref(), out);
            }
            Self::Prepare { ballot, by } => {
                out.u8(2);
                ballot.encode(out);
                out.u128(by.0);
            }
            Self::Accept { ballot, record } => {
                out.u8(3);
                ballot.encode(out);
                record.encode(out);
            }
            Self::Renew { ballot, record, heard } => {
                out.u8(4);
                ballot.encode(out);
                encode_name(record, out);
                out.u64(*heard);
            }
            Self::Release { ballot, record, to } => {
                out.u8(5);
                ballot.encode(out);
                encode_name(record, out);
                encode_replica(to.as_ref(), out);
            }
        }
    }

    /// Reads one.
    ///
    /// # Errors
    /// An unknown kind, missing bytes, or a record that breaks its rules.
    pub fn decode(from: &mut Reader<'_>) -> Result<Self, DecodeError> {
        Ok(match from.u8()? {
            1 => Self::Read { candidate: decode_replica(from)? },
            2 => Self::Prepare { ballot: Ballot::decode(from)?, by: ReplicaId(from.u128()?) },
            3 => Self::Accept { ballot: Ballot::decode(from)?, record: Record::decode(from)? },
            4 => Self::Renew { ballot: Ballot::decode(from)?, record: decode_name(from)?, heard: from.u64()? },
            5 => Self::Release { ballot: Ballot::decode(from)?, record: decode_name(from)?, to: decode_replica(from)? },
            _ => return Err(DecodeError::Bad { what: "kind of a request" }),
        })
    }
}

impl Answer {
    /// Appends the bytes.
    pub fn encode(&self, out: &mut Writer<'_>) {
        out.u128(self.acceptor.0);
        out.u64(self.changes);
        match &self.reply {
            Reply::State(state) => {
                out.u8(1);
                state.encode(out);
            }
            Reply::Promised { accepted, released_to } => {
                out.u8(2);
                out.option(accepted.as_ref(), |out, a| a.encode(out));
                encode_replica(released_to.as_ref(), out);
            }
            Reply::Accepted => out.u8(3),
            Reply::Granted { number } => {
                out.u8(4);
                out.u64(*number);
            }
            Reply::Released => out.u8(5),
            Reply::Refused(why) => {
                out.u8(6);
                why.encode(out);
            }
        }
    }

    /// Reads one.
    ///
    /// # Errors
    /// An unknown kind, missing bytes, or a record that breaks its rules.
    pub fn decode(from: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let (acceptor, changes) = (AcceptorId(from.u128()?), from.u64()?);
        let reply = match from.u8()? {
            1 => Reply::State(AcceptorState::decode(from)?),
            2 => Reply::Promised { accepted: from.option(Accepted::decode)?, released_to: decode_replica(from)? },
            3 => Reply::Accepted,
            4 => Reply::Granted { number: from.u64()? },
            5 => Reply::Released,
            6 => Reply::Refused(Refusal::decode(from)?),
            _ => return Err(DecodeError::Bad { what: "kind of an answer" }),
        };
        Ok(Self { acceptor, changes, reply })
    }
}

impl Refusal {
    fn encode(&self, out: &mut Writer<'_>) {
        match self {
            Self::Promised(ballot) => {
                out.u8(1);
                ballot.encode(out);
            }
            Self::Granted { holder, left_ms } => {
                out.u8(2);
                out.u128(holder.0);
                out.u32(*left_ms);
            }
            Self::OlderEpoch(epoch) => {
                out.u8(3);
                out.u64(epoch.0);
            }
            Self::NotVoter => out.u8(4),
            Self::NotAccepted(accepted) => {
                out.u8(5);
                out.option(accepted.as_ref(), |out, (ballot, name)| {
                    ballot.encode(out);
                    encode_name(name, out);
                });
            }
            Self::Released => out.u8(6),
            Self::Unheard { left_ms } => {
                out.u8(7);
                out.u32(*left_ms);
            }
        }
    }

    fn decode(from: &mut Reader<'_>) -> Result<Self, DecodeError> {
        Ok(match from.u8()? {
            1 => Self::Promised(Ballot::decode(from)?),
            2 => Self::Granted { holder: ReplicaId(from.u128()?), left_ms: from.u32()? },
            3 => Self::OlderEpoch(Epoch(from.u64()?)),
            4 => Self::NotVoter,
            5 => Self::NotAccepted(from.option(|f| Ok((Ballot::decode(f)?, decode_name(f)?)))?),
            6 => Self::Released,
            7 => Self::Unheard { left_ms: from.u32()? },
            _ => return Err(DecodeError::Bad { what: "kind of a refusal" }),
        })
    }
}

impl AcceptorState {
    fn encode(&self, out: &mut Writer<'_>) {
        self.promised.encode(out);
        out.option(self.accepted.as_ref(), |out, a| a.encode(out));
        out.option(self.grant.as_ref(), |out, g| {
            out.u128(g.holder.0);
            out.u32(g.ago_ms);
            out.u32(g.left_ms);
        });
        out.option(self.released.as_ref(), |out, to| encode_replica(to.as_ref(), out));
        out.option(self.candidate.as_ref(), |out, c| {
            out.u128(c.replica.0);
            out.u32(c.ago_ms);
        });
    }

    fn decode(from: &mut Reader<'_>) -> Result<Self, DecodeError> {
        Ok(Self {
            promised: Ballot::decode(from)?,
            accepted: from.option(Accepted::decode)?,
            grant: from
                .option(|f| Ok(GrantState { holder: ReplicaId(f.u128()?), ago_ms: f.u32()?, left_ms: f.u32()? }))?,
            released: from.option(decode_replica)?,
            candidate: from.option(|f| Ok(CandidateState { replica: ReplicaId(f.u128()?), ago_ms: f.u32()? }))?,
        })
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::limits::{FORCED_FROM_MAX, VOTERS_MAX};
    use proptest::prelude::*;

    pub fn any_ballot() -> impl Strategy<Value = Ballot> {
        (0..u64::MAX / 2, any::<u128>()).prop_map(|(number, node)| Ballot { number, node: AcceptorId(node) })
    }

    pub fn any_record() -> impl Strategy<Value = Record> {
        let voters = prop_oneof![Just(1usize), Just(3), Just(VOTERS_MAX)]
            .prop_flat_map(|count| proptest::collection::btree_set(any::<u128>(), count));
        (any::<u128>(), any::<u128>(), any::<u128>(), voters).prop_map(|(id, holder, other, voters)| {
            let first = Record::first(RecordId(id), ReplicaId(holder), voters.into_iter().map(AcceptorId).collect());
            first.next(RecordId(id ^ 1), ReplicaId(holder), vec![ReplicaId(holder), ReplicaId(other)])
        })
    }

    pub fn any_accepted() -> impl Strategy<Value = Accepted> {
        (any_ballot(), any_record()).prop_map(|(ballot, record)| Accepted { ballot, record })
    }

    fn any_request() -> impl Strategy<Value = Request> {
        let replica = || any::<Option<u128>>().prop_map(|r| r.map(ReplicaId));
        prop_oneof![
            replica().prop_map(|candidate| Request::Read { candidate }),
            (any_ballot(), any::<u128>()).prop_map(|(ballot, by)| Request::Prepare { ballot, by: ReplicaId(by) }),
            any_accepted().prop_map(|a| Request::Accept { ballot: a.ballot, record: a.record }),
            (any_accepted(), any::<u64>()).prop_map(|(a, heard)| Request::Renew {
                ballot: a.ballot,
                record: a.record.name(),
                heard
            }),
            (any_accepted(), replica()).prop_map(|(a, to)| Request::Release {
                ballot: a.ballot,
                record: a.record.name(),
                to
            }),
        ]
    }

    fn any_reply() -> impl Strategy<Value = Reply> {
        let accepted = || proptest::option::of(any_accepted());
        let replica = || any::<Option<u128>>().prop_map(|r| r.map(ReplicaId));
        let state = (any_ballot(), accepted(), any::<u32>(), proptest::option::of(replica())).prop_map(
            |(promised, accepted, ms, released)| AcceptorState {
                promised,
                grant: accepted.as_ref().map(|a: &Accepted| GrantState {
                    holder: a.record.holder,
                    ago_ms: ms,
                    left_ms: !ms,
                }),
                candidate: accepted
                    .as_ref()
                    .map(|a: &Accepted| CandidateState { replica: a.record.holder, ago_ms: ms }),
                accepted,
                released,
            },
        );
        prop_oneof![
            state.prop_map(Reply::State),
            (accepted(), replica()).prop_map(|(accepted, released_to)| Reply::Promised { accepted, released_to }),
            Just(Reply::Accepted),
            any::<u64>().prop_map(|number| Reply::Granted { number }),
            Just(Reply::Released),
            any_ballot().prop_map(|b| Reply::Refused(Refusal::Promised(b))),
            any::<u32>().prop_map(|ms| Reply::Refused(Refusal::Granted { holder: ReplicaId(1), left_ms: ms })),
            any::<u64>().prop_map(|e| Reply::Refused(Refusal::OlderEpoch(Epoch(e)))),
            Just(Reply::Refused(Refusal::NotVoter)),
            accepted().prop_map(|a| Reply::Refused(Refusal::NotAccepted(a.map(|a| (a.ballot, a.record.name()))))),
            Just(Reply::Refused(Refusal::Released)),
            any::<u32>().prop_map(|left_ms| Reply::Refused(Refusal::Unheard { left_ms })),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn a_request_reads_back_as_it_was_written(request in any_request()) {
            let mut bytes = Vec::new();
            request.encode(&mut Writer::new(&mut bytes));
            prop_assert!(bytes.len() <= MESSAGE_BYTES_MAX);
            let mut reader = Reader::new(&bytes);
            prop_assert_eq!(Request::decode(&mut reader).unwrap(), request);
            prop_assert!(reader.end().is_ok());
        }

        #[test]
        fn an_answer_reads_back_as_it_was_written(id: u128, changes: u64, reply in any_reply()) {
            let answer = Answer { acceptor: AcceptorId(id), changes, reply };
            let mut bytes = Vec::new();
            answer.encode(&mut Writer::new(&mut bytes));
            prop_assert!(bytes.len() <= MESSAGE_BYTES_MAX);
            let mut reader = Reader::new(&bytes);
            prop_assert_eq!(Answer::decode(&mut reader).unwrap(), answer);
            prop_assert!(reader.end().is_ok());
        }

        #[test]
        fn hostile_bytes_are_refused_or_mean_exactly_themselves(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let mut reader = Reader::new(&bytes);
            if let Ok(request) = Request::decode(&mut reader) {
                let mut again = Vec::new();
                request.encode(&mut Writer::new(&mut again));
                prop_assert_eq!(&again[..], &bytes[..again.len()]);
            }
            let mut reader = Reader::new(&bytes);
            if let Ok(answer) = Answer::decode(&mut reader) {
                let mut again = Vec::new();
                answer.encode(&mut Writer::new(&mut again));
                prop_assert_eq!(&again[..], &bytes[..again.len()]);
            }
        }
    }

    #[test]
    fn the_largest_message_fits_its_bound() {
        let voters = (1..=VOTERS_MAX as u128).map(AcceptorId).collect();
        let mut record = Record::first(RecordId(1), ReplicaId(1), voters);
        record.in_sync = vec![ReplicaId(1), ReplicaId(2)];
        record.forced_from = (0..FORCED_FROM_MAX as u128).map(RecordId).collect();
        let accepted = Some(Accepted { ballot: Ballot::default(), record });
        let state = AcceptorState {
            accepted,
            grant: Some(GrantState { holder: ReplicaId(1), ago_ms: 0, left_ms: 0 }),
            released: Some(Some(ReplicaId(1))),
            candidate: Some(CandidateState { replica: ReplicaId(1), ago_ms: 0 }),
            promised: Ballot::default(),
        };
        let mut bytes = Vec::new();
        Answer { acceptor: AcceptorId(1), changes: 0, reply: Reply::State(state) }.encode(&mut Writer::new(&mut bytes));
        assert!(bytes.len() <= MESSAGE_BYTES_MAX, "{} bytes", bytes.len());
    }

    #[test]
    fn a_ballot_beyond_which_no_other_exists_is_refused() {
        let mut bytes = vec![2];
        bytes.extend([0xff; 40]);
        assert_eq!(Request::decode(&mut Reader::new(&bytes)), Err(DecodeError::Bad { what: "ballot" }));
    }
}
