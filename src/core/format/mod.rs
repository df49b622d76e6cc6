//! Bytes of the files in which a replica keeps what differs from its peer: activity log and dirty map.
//!
//! Decides: whether bytes are what this program wrote for this replica of this module. Holds nothing. Keeps out: paths,
//! when a file is written, and how it is made durable.
//! Invariant: nothing of a file is believed before its magic, kind, version, owner and both checksums were.
//!
//! | byte | field | |
//! | --- | --- | --- |
//! | 0 | magic u32 | `vmTw` |
//! | 4 | kind u16 | `FileKind` |
//! | 6 | version u16 | of that kind; a newer one is refused unread |
//! | 8 | module u128 | |
//! | 24 | replica u128 | |
//! | 40 | sequence u64 | rises with each writing |
//! | 48 | body bytes u32 | |
//! | 52 | body crc32c u32 | |
//! | 56 | zero u32 | |
//! | 60 | header crc32c u32 | of bytes 0 to 59 |
//! | 64 | body | |
use crate::ids::{ModuleId, ReplicaId};
use crate::wire::codec::{DecodeError, Reader, Writer};

/// Bytes before the body.
pub const HEADER_BYTES: usize = 64;
const MAGIC: u32 = u32::from_le_bytes(*b"vmTw");

/// What a file holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum FileKind {
    /// A block of the activity log.
    Log = 1,
    /// A snapshot of the dirty map.
    Map = 2,
}

impl FileKind {
    /// The version that this program writes; it reads this one and older ones.
    const fn version(self) -> u16 {
        match self {
            Self::Log | Self::Map => 1,
        }
    }
    const fn what(self) -> &'static str {
        match self {
            Self::Log => "activity log",
            Self::Map => "dirty map",
        }
    }
}

/// Why a file is not read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FormatError {
    /// It was written for another module.
    #[error("{what} belongs to module {found}, expected {expected}: restored from elsewhere?")]
    OtherModule {
        /// Which file.
        what: &'static str,
        /// As read.
        found: ModuleId,
        /// Ours.
        expected: ModuleId,
    },
    /// It was written for another replica.
    #[error("{what} belongs to replica {found}, expected {expected}: the directory was restored or copied")]
    OtherReplica {
        /// Which file.
        what: &'static str,
        /// As read.
        found: ReplicaId,
        /// Ours.
        expected: ReplicaId,
    },
    /// A newer program wrote it, or it is damaged.
    #[error("{what}: {source}")]
    Bytes {
        /// Which file.
        what: &'static str,
        /// Why.
        source: DecodeError,
    },
}

/// Whose files these are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Owner {
    /// The module.
    pub module: ModuleId,
    /// The replica.
    pub replica: ReplicaId,
}

/// Header and body.
///
/// # Panics
/// For a body of 4 GiB or more; the bodies' own bounds lie far below.
#[must_use]
pub fn seal(kind: FileKind, owner: Owner, sequence: u64, body: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEADER_BYTES + body.len());
    let mut out = Writer::new(&mut bytes);
    out.u32(MAGIC);
    out.u16(kind as u16);
    out.u16(kind.version());
    out.u128(owner.module.0);
    out.u128(owner.replica.0);
    out.u64(sequence);
    out.u32(u32::try_from(body.len()).expect("bodies are bounded far below 4 GiB"));
    out.u32(crc32c::crc32c(body));
    out.u32(0);
    let crc = crc32c::crc32c(&bytes);
    Writer::new(&mut bytes).u32(crc);
    bytes.extend_from_slice(body);
    bytes
}

/// Sequence and body of a file of `owner`. Bytes after the body are not looked at.
///
/// # Errors
/// `FormatError`.
pub fn open(kind: FileKind, owner: Owner, bytes: &[u8]) -> Result<(u64, &[u8]), FormatError> {
    let what = kind.what();
    let (header, body) = check(kind, bytes).map_err(|source| FormatError::Bytes { what, source })?;
    if header.owner.module != owner.module {
        return Err(FormatError::OtherModule { what, found: header.owner.module, expected: owner.module });
    }
    if header.owner.replica != owner.replica {
        return Err(FormatError::OtherReplica { what, found: header.owner.replica, expected: owner.replica });
    }
    Ok((header.sequence, body))
}

struct Header {
    owner: Owner,
    sequence: u64,
}

fn check(kind: FileKind, bytes: &[u8]) -> Result<(Header, &[u8]), DecodeError> {
    let mut from = Reader::new(bytes);
    if from.u32()? != MAGIC || from.u16()? != kind as u16 {
        return Err(DecodeError::Bad { what: "beginning of the file" });
    }
    let (found, known) = (u64::from(from.u16()?), u64::from(kind.version()));
    if found > known {
        return Err(DecodeError::Version { what: kind.what(), found, known });
    }
    let owner = Owner { module: ModuleId(from.u128()?), replica: ReplicaId(from.u128()?) };
    let (sequence, length, body_crc, zero) = (from.u64()?, from.u32()?, from.u32()?, from.u32()?);
    if crc32c::crc32c(&bytes[..HEADER_BYTES - 4]) != from.u32()? {
        return Err(DecodeError::Checksum { what: "file's header" });
    }
    if zero != 0 || found == 0 {
        return Err(DecodeError::Bad { what: "file's header" });
    }
    let body = from.bytes(length as usize)?;
    if crc32c::crc32c(body) != body_crc {
        return Err(DecodeError::Checksum { what: "file's body" });
    }
    Ok((Header { owner, sequence }, body))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const OWNER: Owner = Owner { module: ModuleId(5), replica: ReplicaId(6) };

    #[test]
    fn a_file_of_another_owner_kind_or_newer_version_is_refused() {
        let bytes = seal(FileKind::Map, OWNER, 9, b"body");
        assert_eq!(open(FileKind::Map, OWNER, &bytes), Ok((9, &b"body"[..])));
        let other = Owner { replica: ReplicaId(7), ..OWNER };
        assert!(matches!(open(FileKind::Map, other, &bytes), Err(FormatError::OtherReplica { .. })));
        let other = Owner { module: ModuleId(7), ..OWNER };
        assert!(matches!(open(FileKind::Map, other, &bytes), Err(FormatError::OtherModule { .. })));
        assert!(open(FileKind::Log, OWNER, &bytes).is_err());
        // What comes after the version may mean anything then: it is not read, and not called damaged.
        let mut newer = bytes;
        newer[6..].fill(0xff);
        let found = open(FileKind::Map, OWNER, &newer).unwrap_err();
        assert!(matches!(found, FormatError::Bytes { source: DecodeError::Version { found: 0xffff, .. }, .. }));
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]
        #[test]
        fn any_damage_is_noticed(body in proptest::collection::vec(any::<u8>(), 0..200), at: usize, flip in 1..=255u8, cut: usize) {
            let mut bytes = seal(FileKind::Map, OWNER, 1, &body);
            prop_assert!(open(FileKind::Map, OWNER, &bytes[..cut % bytes.len()]).is_err());
            let at = at % bytes.len();
            bytes[at] ^= flip;
            prop_assert!(open(FileKind::Map, OWNER, &bytes).is_err());
        }
        #[test]
        fn hostile_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            prop_assert!(open(FileKind::Log, OWNER, &bytes).is_err());
        }
    }
}
