//! Bodies of the frames that carry more than their header says.
//!
//! Keeps out: data of writes, which stays in the shell's buffers, and namespace operations, which the store reads.
use super::codec::{DecodeError, Reader, Writer};
use crate::ids::{ModuleId, ReplicaId};
use crate::record::Record;

/// First word of each side on a new link, and again when it learnt another record before a session stood.
///
/// Bytes: protocol min u16 · max u16 · features u64 · module u128 · replica u128 · nonce u64 · flags u8 (1 broken,
/// 2 erred, 4 suspects all) · configuration u64 · boolean + record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hello {
    /// Oldest protocol that it speaks.
    pub protocol_min: u16,
    /// Newest protocol that it speaks.
    pub protocol_max: u16,
    /// Optional abilities; unknown bits are ignored.
    pub features: u64,
    /// Which module.
    pub module: ModuleId,
    /// Which replica.
    pub replica: ReplicaId,
    /// A number of this side and this link; both together make the session's id.
    pub nonce: u64,
    /// R4: its host went down without a clean stop.
    pub broken: bool,
    /// R3: it once failed.
    pub erred: bool,
    /// Its metadata or a file is not as it left them: compare everything.
    pub suspect_all: bool,
    /// Version of the module's configuration.
    pub configuration: u64,
    /// The record that it knows.
    pub record: Option<Record>,
}

impl Hello {
    /// Appends the bytes of the format above.
    pub fn encode(&self, out: &mut Writer<'_>) {
        out.u16(self.protocol_min);
        out.u16(self.protocol_max);
        out.u64(self.features);
        out.u128(self.module.0);
        out.u128(self.replica.0);
        out.u64(self.nonce);
        out.u8(u8::from(self.broken) | u8::from(self.erred) << 1 | u8::from(self.suspect_all) << 2);
        out.u64(self.configuration);
        out.option(self.record.as_ref(), |out, record| record.encode(out));
    }

    /// Reads and checks one.
    ///
    /// # Errors
    /// Missing or extra bytes, or a record that makes no sense.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let mut from = Reader::new(bytes);
        let (protocol_min, protocol_max) = (from.u16()?, from.u16()?);
        let (features, module) = (from.u64()?, ModuleId(from.u128()?));
        let (replica, nonce, flags) = (ReplicaId(from.u128()?), from.u64()?, from.u8()?);
        if flags > 7 {
            return Err(DecodeError::Bad { what: "hello's flags" });
        }
        let configuration = from.u64()?;
        let record = from.option(Record::decode)?;
        from.end()?;
        let (broken, erred, suspect_all) = (flags & 1 != 0, flags & 2 != 0, flags & 4 != 0);
        Ok(Self {
            protocol_min,
            protocol_max,
            features,
            module,
            replica,
            nonce,
            broken,
            erred,
            suspect_all,
            configuration,
            record,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::{AcceptorId, RecordId};

    #[test]
    fn a_hello_reads_back_as_it_was_written_and_not_if_cut() {
        let record = Record::first(RecordId(5), ReplicaId(1), vec![AcceptorId(1), AcceptorId(2), AcceptorId(3)]);
        let hello = Hello {
            protocol_min: 1,
            protocol_max: 1,
            features: 0,
            module: ModuleId(77),
            replica: ReplicaId(1),
            nonce: 99,
            broken: true,
            erred: false,
            suspect_all: true,
            configuration: 3,
            record: Some(record),
        };
        let mut bytes = Vec::new();
        hello.encode(&mut Writer::new(&mut bytes));
        assert_eq!(Hello::decode(&bytes).unwrap(), hello);
        for end in 0..bytes.len() {
            assert!(Hello::decode(&bytes[..end]).is_err(), "cut at {end}");
        }
    }
}
