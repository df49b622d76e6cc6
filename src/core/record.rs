//! The record: who holds the VM and who is in sync. It lives in the register (PROTOCOL.md, section 1).
//!
//! Bytes (little-endian): version u16 · epoch u64 · generation u64 · id u128 · holder u128 · lease_ms u32 ·
//! count u32 + in-sync ids u128 · count u32 + voters u128 · count u32 + forced-from ids u128.
use crate::ids::{AcceptorId, Epoch, Generation, RecordId, ReplicaId};
use crate::limits::{FORCED_FROM_MAX, LEASE_MS, REPLICAS_MAX, VOTERS_MAX};
use crate::wire::codec::{DecodeError, Reader, Writer};
use std::fmt;

/// One value of the register.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Record {
    /// Rises with each forced start.
    pub epoch: Epoch,
    /// Rises with each change.
    pub generation: Generation,
    /// Random; two records with the same generation differ here.
    pub id: RecordId,
    /// The one replica whose node may run the VM.
    pub holder: ReplicaId,
    /// The replicas that have every acknowledged write; ordered, never empty.
    pub in_sync: Vec<ReplicaId>,
    /// Length of a lease under this record, in milliseconds.
    pub lease_ms: u32,
    /// Who votes; ordered, an odd number.
    pub voters: Vec<AcceptorId>,
    /// Records that a forced start overrode.
    pub forced_from: Vec<RecordId>,
}

/// What tells two records apart in short.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RecordName {
    /// Epoch first: a forced start outranks every generation of the old register.
    pub epoch: Epoch,
    /// Then the generation.
    pub generation: Generation,
    /// Then the random id.
    pub id: RecordId,
}

impl Record {
    /// The first record of a module: epoch 1, generation 1, `holder` alone in sync.
    #[must_use]
    pub fn first(id: RecordId, holder: ReplicaId, mut voters: Vec<AcceptorId>) -> Self {
        voters.sort_unstable();
        Self {
            epoch: Epoch(1),
            generation: Generation(1),
            id,
            holder,
            in_sync: vec![holder],
            lease_ms: u32::try_from(LEASE_MS).expect("a second fits"),
            voters,
            forced_from: Vec::new(),
        }
    }

    /// The record after this one, with another id, holder and in-sync set.
    #[must_use]
    pub fn next(&self, id: RecordId, holder: ReplicaId, mut in_sync: Vec<ReplicaId>) -> Self {
        in_sync.sort_unstable();
        in_sync.dedup();
        Self { generation: self.generation.next(), id, holder, in_sync, ..self.clone() }
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> RecordName {
        RecordName { epoch: self.epoch, generation: self.generation, id: self.id }
    }

    /// Whether `replica` has every acknowledged write.
    #[must_use]
    pub fn is_in_sync(&self, replica: ReplicaId) -> bool {
        self.in_sync.contains(&replica)
    }

    /// Whether this record comes after `other` in epoch and generation. Within one epoch the register is a line, so
    /// this says that it descends from `other`.
    #[must_use]
    pub fn is_newer_than(&self, other: &Record) -> bool {
        (self.epoch, self.generation) > (other.epoch, other.generation)
    }

    /// Smallest number of voters that is a majority.
    #[must_use]
    pub fn majority(&self) -> usize {
        self.voters.len() / 2 + 1
    }

    /// Appends the bytes of the format above.
    pub fn encode(&self, out: &mut Writer<'_>) {
        out.u16(1);
        out.u64(self.epoch.0);
        out.u64(self.generation.0);
        out.u128(self.id.0);
        out.u128(self.holder.0);
        out.u32(self.lease_ms);
        out.list(&self.in_sync, |out, r| out.u128(r.0));
        out.list(&self.voters, |out, v| out.u128(v.0));
        out.list(&self.forced_from, |out, r| out.u128(r.0));
    }

    /// Reads and checks one.
    ///
    /// # Errors
    /// Another version, missing bytes, too long a list, or a record that breaks its own rules.
    pub fn decode(from: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let version = from.u16()?;
        if version != 1 {
            return Err(DecodeError::Version { what: "record", found: u64::from(version), known: 1 });
        }
        let record = Self {
            epoch: Epoch(from.u64()?),
            generation: Generation(from.u64()?),
            id: RecordId(from.u128()?),
            holder: ReplicaId(from.u128()?),
            lease_ms: from.u32()?,
            in_sync: from.list(REPLICAS_MAX, |f| f.u128().map(ReplicaId))?,
            voters: from.list(VOTERS_MAX, |f| f.u128().map(AcceptorId))?,
            forced_from: from.list(FORCED_FROM_MAX, |f| f.u128().map(RecordId))?,
        };
        let ordered = record.in_sync.is_sorted_by(|a, b| a < b) && record.voters.is_sorted_by(|a, b| a < b);
        let bounded = record.epoch.0 < u64::MAX / 2 && record.generation.0 < u64::MAX / 2;
        let whole = !record.in_sync.is_empty() && record.voters.len() % 2 == 1;
        if !ordered || !whole || !bounded || record.lease_ms == 0 || record.lease_ms > 600_000 {
            return Err(DecodeError::Bad { what: "record" });
        }
        Ok(record)
    }
}

impl fmt::Debug for Record {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "Record{{{}.{} {:?} holder {:?} in sync {:?}}}",
            self.epoch, self.generation, self.id, self.holder, self.in_sync
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_record_reads_back_as_it_was_written(id: u128, holder: u128, other: u128, voters in proptest::collection::btree_set(any::<u128>(), 3)) {
            let first = Record::first(RecordId(id), ReplicaId(holder), voters.into_iter().map(AcceptorId).collect());
            let record = first.next(RecordId(id ^ 1), ReplicaId(holder), vec![ReplicaId(holder), ReplicaId(other)]);
            let mut bytes = Vec::new();
            record.encode(&mut Writer::new(&mut bytes));
            let mut reader = Reader::new(&bytes);
            prop_assert_eq!(Record::decode(&mut reader).unwrap(), record);
            prop_assert!(reader.end().is_ok());
        }

        #[test]
        fn hostile_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = Record::decode(&mut Reader::new(&bytes));
        }
    }
}
