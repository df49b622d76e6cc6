//! The fixed header before everything that the two module processes of a module send each other.
//!
//! | byte | field | |
//! | --- | --- | --- |
//! | 0 | magic u32 | `vmTf` |
//! | 4 | version u8 | 1 |
//! | 5 | kind u8 | `Kind`; an unknown one ends the session |
//! | 6 | flags u16 | per kind; unknown ones end the session |
//! | 8 | length u32 | bytes of payload that follow, at most `PAYLOAD_BYTES_MAX` |
//! | 12 | payload crc32c u32 | of these bytes; 0 where there are none |
//! | 16 | session u64 | 0 in a hello |
//! | 24 | sequence u64 | of the request; an answer repeats it |
//! | 32 | file id u64 | |
//! | 40 | offset u64 | |
//! | 48 | extent u64 | length of a range, number of a namespace operation |
//! | 56 | result i32 | of an answer: 0 or the errno |
//! | 60 | header crc32c u32 | of bytes 0 to 59 |
//!
//! All little-endian. Keeps out: what the payload means (`message`), when to send (`replica`).
use super::codec::{DecodeError, Reader, Writer};
use crate::ids::{FileId, Sequence, SessionId};
use crate::limits::{FILE_BYTES_MAX, PAYLOAD_BYTES_MAX};

/// Bytes of a header.
pub const HEADER_BYTES: usize = 64;
/// Version of the peer link's protocol.
pub const PROTOCOL: u8 = 1;
const MAGIC: u32 = u32::from_le_bytes(*b"vmTf");

macro_rules! kinds {
    ($($(#[$doc:meta])* $name:ident = $number:literal,)*) => {
        /// What a frame is.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[repr(u8)]
        pub enum Kind { $($(#[$doc])* $name = $number,)* }
        impl Kind {
            fn of(number: u8) -> Option<Self> {
                match number { $($number => Some(Self::$name),)* _ => None }
            }
            /// All of them, for tests of decoders.
            pub const ALL: &'static [Kind] = &[$(Self::$name,)*];
        }
    };
}
kinds! {
    /// Who I am and which record I know; payload: `message::Hello`. Before it nothing else is believed.
    Hello = 1,
    /// Data for `file` at `offset`; payload: the data.
    Write = 2,
    /// A ranged operation on `file` at `offset`, `extent` bytes long; flags: `RangeKind::flags`.
    Range = 3,
    /// Make `file` durable; file 0: all files and the tree.
    Flush = 4,
    /// A namespace operation, `extent` its number; payload: its bytes (`namespace`).
    Namespace = 5,
    /// The answer to request `sequence`: `result`; payload: what was asked for.
    Answer = 6,
    /// What follows belongs to this record (R7); payload: the record.
    NewRecord = 7,
    /// I am here. No answer.
    Beat = 8,
    /// Resync: tell me the tree; the answer's payload is part `offset` of `extent` parts.
    Tree = 9,
    /// Resync: tell me your suspects; the answer's payload is part `offset` of `extent` parts.
    Suspects = 10,
    /// Resync: hash `file` from `offset` for `extent` bytes; `flags` 0: in blocks, 1: in pages.
    Hash = 11,
    /// Resync: where has `file` data, from `offset` on, no further than `extent` bytes?
    Data = 14,
    /// A word of one control plane to the other; payload: its byte. Belongs to no session, and the core does not see it.
    Tell = 15,
    /// Resync: flush everything and end your marks, the join is near (R5).
    Prepare = 12,
    /// The session ends; payload: why, in words.
    Bye = 13,
}

/// The fields of a header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// What it is.
    pub kind: Kind,
    /// Per kind.
    pub flags: u16,
    /// Bytes of payload.
    pub length: u32,
    /// crc32c of the payload; `seal` sets it.
    pub payload_crc: u32,
    /// Which session.
    pub session: SessionId,
    /// Which request of the session.
    pub sequence: Sequence,
    /// Which file; 0 where none is meant.
    pub file: FileId,
    /// Where in the file.
    pub offset: u64,
    /// Length of a range, or a namespace operation's number.
    pub extent: u64,
    /// An answer's errno.
    pub result: i32,
}

impl Header {
    /// A header of `kind` in `session`, all else zero.
    #[must_use]
    pub fn new(kind: Kind, session: SessionId, sequence: Sequence) -> Self {
        Self {
            kind,
            flags: 0,
            length: 0,
            payload_crc: 0,
            session,
            sequence,
            file: FileId(0),
            offset: 0,
            extent: 0,
            result: 0,
        }
    }

    /// Length and checksum of `payload` put in. The shell calls it for each frame before `encode`.
    #[must_use]
    pub fn seal(mut self, payload: &[u8]) -> Self {
        self.length = u32::try_from(payload.len()).expect("payloads are bounded");
        self.payload_crc = if payload.is_empty() { 0 } else { crc32c::crc32c(payload) };
        self
    }

    /// Checks the payload that came after this header.
    ///
    /// # Errors
    /// `Checksum` where it is not what was sent.
    pub fn check_payload(&self, payload: &[u8]) -> Result<(), DecodeError> {
        let crc = if payload.is_empty() { 0 } else { crc32c::crc32c(payload) };
        if payload.len() == self.length as usize && crc == self.payload_crc {
            Ok(())
        } else {
            Err(DecodeError::Checksum { what: "payload" })
        }
    }

    /// The 64 bytes.
    #[must_use]
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = Vec::with_capacity(HEADER_BYTES);
        let mut out = Writer::new(&mut bytes);
        out.u32(MAGIC);
        out.u8(PROTOCOL);
        out.u8(self.kind as u8);
        out.u16(self.flags);
        out.u32(self.length);
        out.u32(self.payload_crc);
        out.u64(self.session.0);
        out.u64(self.sequence.0);
        out.u64(self.file.0);
        out.u64(self.offset);
        out.u64(self.extent);
        out.u32(self.result.cast_unsigned());
        let crc = crc32c::crc32c(&bytes);
        Writer::new(&mut bytes).u32(crc);
        bytes.try_into().expect("the fields above are 64 bytes")
    }

    /// Reads and checks one. The checksum comes before any field is believed.
    ///
    /// # Errors
    /// Another magic or version, a wrong checksum, an unknown kind, a length or range beyond its bound.
    pub fn decode(bytes: &[u8; HEADER_BYTES]) -> Result<Self, DecodeError> {
        let mut from = Reader::new(bytes);
        if from.u32()? != MAGIC {
            return Err(DecodeError::Bad { what: "frame's magic" });
        }
        let version = from.u8()?;
        let crc = u32::from_le_bytes(bytes[60..].try_into().expect("four bytes"));
        if crc32c::crc32c(&bytes[..60]) != crc {
            return Err(DecodeError::Checksum { what: "frame header" });
        }
        if version != PROTOCOL {
            let known = u64::from(PROTOCOL);
            return Err(DecodeError::Version { what: "peer link", found: u64::from(version), known });
        }
        let header = Self {
            kind: Kind::of(from.u8()?).ok_or(DecodeError::Bad { what: "frame's kind" })?,
            flags: from.u16()?,
            length: from.u32()?,
            payload_crc: from.u32()?,
            session: SessionId(from.u64()?),
            sequence: Sequence(from.u64()?),
            file: FileId(from.u64()?),
            offset: from.u64()?,
            extent: from.u64()?,
            result: from.u32()?.cast_signed(),
        };
        if header.length as usize > PAYLOAD_BYTES_MAX {
            return Err(DecodeError::Length { found: u64::from(header.length), most: PAYLOAD_BYTES_MAX as u64 });
        }
        let ranged = matches!(header.kind, Kind::Write | Kind::Range | Kind::Hash | Kind::Data);
        let length = if header.kind == Kind::Write { u64::from(header.length) } else { header.extent };
        let end = header.offset.checked_add(length);
        if ranged && (length == 0 || end.is_none_or(|end| end > FILE_BYTES_MAX)) {
            return Err(DecodeError::Bad { what: "frame's range" });
        }
        Ok(header)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn write(length: usize) -> Header {
        let mut header = Header::new(Kind::Write, SessionId(7), Sequence(9)).seal(&vec![3; length]);
        (header.file, header.offset) = (FileId(5), 8192);
        header
    }

    #[test]
    fn a_damaged_header_is_refused_whichever_bit_it_is() {
        let good = write(4096).encode();
        assert_eq!(Header::decode(&good).unwrap(), write(4096));
        for bit in 0..good.len() * 8 {
            let mut bad = good;
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(Header::decode(&bad).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn a_length_or_range_beyond_its_bound_is_refused() {
        let mut header = write(4096);
        header.length = u32::try_from(PAYLOAD_BYTES_MAX).unwrap() + 1;
        assert!(matches!(Header::decode(&header.encode()), Err(DecodeError::Length { .. })));
        let mut header = write(4096);
        header.offset = u64::MAX - 100;
        assert!(Header::decode(&header.encode()).is_err());
    }

    #[test]
    fn a_damaged_payload_is_noticed() {
        let header = write(3);
        assert!(header.check_payload(&[3, 3, 3]).is_ok());
        assert!(header.check_payload(&[3, 3, 2]).is_err());
        assert!(header.check_payload(&[3, 3]).is_err());
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..ProptestConfig::default() })]
        #[test]
        fn no_bytes_break_the_decoder(bytes in proptest::array::uniform32(any::<u8>()), sealed: bool) {
            let mut all = write(1).encode();
            all[5..37].copy_from_slice(&bytes);
            if sealed {
                let crc = crc32c::crc32c(&all[..60]);
                all[60..].copy_from_slice(&crc.to_le_bytes());
            }
            if let Ok(header) = Header::decode(&all) {
                prop_assert_eq!(header.encode(), all);
            }
        }
    }
}
