//! Bytes of an acceptor's file: what it promised and accepted, which survives everything.
//!
//! | bytes | field |
//! | --- | --- |
//! | 8 | magic `vmtwACPT` |
//! | 2 | version, 1 |
//! | 16 | module id |
//! | 16 | acceptor id |
//! | 8 | change count |
//! | 24 | promised ballot: number u64, node u128 |
//! | 1 + n | accepted: 0, or 1 · ballot · record |
//! | 4 | CRC-32C of all before |
//!
//! Little-endian. The shell replaces the file as a whole: written aside, flushed, renamed, the folder flushed.
use super::message::{Accepted, Ballot, decode_ballot, encode_ballot};
use crate::ids::{AcceptorId, ModuleId};
use crate::wire::codec::{DecodeError, Reader, Writer};

const MAGIC: &[u8; 8] = b"vmtwACPT";
const VERSION: u16 = 1;
/// Bytes of the longest file.
pub const STORED_BYTES_MAX: usize = 1024;

/// What an acceptor keeps on disk.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Stored {
    /// The module whose register this is a part of.
    pub module: ModuleId,
    /// The voter.
    pub acceptor: AcceptorId,
    /// How often this has changed.
    pub changes: u64,
    /// Highest ballot promised.
    pub promised: Ballot,
    /// The last value accepted.
    pub accepted: Option<Accepted>,
}

impl Stored {
    /// A new voter of a module: nothing promised, nothing accepted.
    #[must_use]
    pub fn new(module: ModuleId, acceptor: AcceptorId) -> Self {
        Self { module, acceptor, changes: 0, promised: Ballot::default(), accepted: None }
    }

    /// The file's bytes.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(256);
        let mut out = Writer::new(&mut bytes);
        out.bytes(MAGIC);
        out.u16(VERSION);
        out.u128(self.module.0);
        out.u128(self.acceptor.0);
        out.u64(self.changes);
        encode_ballot(self.promised, &mut out);
        out.option(self.accepted.as_ref(), |out, accepted| accepted.encode(out));
        let crc = crc32c::crc32c(&bytes);
        bytes.extend_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// Reads and checks a file. The magic and version come first: a newer version is refused unread.
    ///
    /// # Errors
    /// No such file, another version, damage, or values that make no sense. Such an acceptor has lost its state: it has
    /// no vote under its old id any more (R12).
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, DecodeError> {
        let mut from = Reader::new(bytes);
        if from.bytes(8)? != MAGIC {
            return Err(DecodeError::Bad { what: "magic of an acceptor's file" });
        }
        let version = from.u16()?;
        if version != VERSION {
            return Err(DecodeError::Version { what: "acceptor's file", found: version.into(), known: VERSION.into() });
        }
        let Some((body, crc)) = bytes.split_last_chunk::<4>() else {
            return Err(DecodeError::Short { at: bytes.len(), wanted: 4 });
        };
        if crc32c::crc32c(body) != u32::from_le_bytes(*crc) {
            return Err(DecodeError::Checksum { what: "acceptor's file" });
        }
        let stored = Self {
            module: ModuleId(from.u128()?),
            acceptor: AcceptorId(from.u128()?),
            changes: from.u64()?,
            promised: decode_ballot(&mut from)?,
            accepted: from.option(Accepted::decode)?,
        };
        from.u32()?;
        from.end()?;
        Ok(stored)
    }
}

#[cfg(test)]
mod tests {
    use super::super::message::tests::{any_accepted, any_ballot};
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn a_file_reads_back_as_it_was_written_and_any_damage_is_seen(
            module: u128, acceptor: u128, changes: u64, promised in any_ballot(),
            accepted in proptest::option::of(any_accepted()), at: proptest::sample::Index, bit in 0..8u8,
        ) {
            let stored = Stored { module: ModuleId(module), acceptor: AcceptorId(acceptor), changes, promised, accepted };
            let mut bytes = stored.to_bytes();
            prop_assert!(bytes.len() <= STORED_BYTES_MAX);
            prop_assert_eq!(Stored::from_bytes(&bytes), Ok(stored));
            for cut in 0..bytes.len() {
                prop_assert!(Stored::from_bytes(&bytes[..cut]).is_err());
            }
            let at = at.index(bytes.len());
            bytes[at] ^= 1 << bit;
            prop_assert!(Stored::from_bytes(&bytes).is_err());
        }
    }

    #[test]
    fn a_newer_version_is_refused_unread() {
        let mut bytes = Stored::new(ModuleId(1), AcceptorId(2)).to_bytes();
        bytes[8] = 2;
        let found = Stored::from_bytes(&bytes);
        assert_eq!(found, Err(DecodeError::Version { what: "acceptor's file", found: 2, known: 1 }));
    }
}
