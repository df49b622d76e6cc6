//! The first 64 bytes of a connection to port 7721, in the clear: for whom it is. Nothing secret, nothing believed: TLS
//! comes after it.
//!
//! Bytes: magic `VMTWIN\r\n` · version u16 · purpose u16 · zero u32 · module name, 48 bytes filled up with zeros.
use vmtwin_core::ids::{ModuleName, NAME_BYTES_MAX};
use vmtwin_core::wire::codec::{DecodeError, Reader, Writer};

/// Length of a preamble.
pub const PREAMBLE_BYTES: usize = 16 + NAME_BYTES_MAX;
const MAGIC: &[u8; 8] = b"VMTWIN\r\n";
const VERSION: u16 = 1;

/// For whom a connection is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Preamble {
    /// The process of this module.
    Module(ModuleName),
    /// The acceptors.
    Acceptors,
}

impl Preamble {
    /// What a caller sends first.
    #[must_use]
    pub fn encode(&self) -> [u8; PREAMBLE_BYTES] {
        let (purpose, name) = match self {
            Self::Module(name) => (1, name.as_str()),
            Self::Acceptors => (2, ""),
        };
        let mut bytes = Vec::with_capacity(PREAMBLE_BYTES);
        let mut out = Writer::new(&mut bytes);
        out.bytes(MAGIC);
        out.u16(VERSION);
        out.u16(purpose);
        out.u32(0);
        out.bytes(name.as_bytes());
        bytes.resize(PREAMBLE_BYTES, 0);
        bytes.try_into().expect("a name has at most 48 bytes")
    }

    /// Reads and checks one.
    ///
    /// # Errors
    /// Another program, another version, or a name that is none.
    pub fn decode(bytes: &[u8; PREAMBLE_BYTES]) -> Result<Self, DecodeError> {
        let mut from = Reader::new(bytes);
        if from.bytes(8)? != MAGIC {
            return Err(DecodeError::Bad { what: "first word of the connection" });
        }
        let version = from.u16()?;
        if version != VERSION {
            return Err(DecodeError::Version { what: "preamble", found: version.into(), known: VERSION.into() });
        }
        let purpose = from.u16()?;
        let zero = from.u32()?;
        let name = from.bytes(NAME_BYTES_MAX)?;
        let name = &name[..name.iter().rposition(|b| *b != 0).map_or(0, |last| last + 1)];
        match (purpose, zero, name) {
            (2, 0, []) => Ok(Self::Acceptors),
            (1, 0, name) => std::str::from_utf8(name)
                .ok()
                .and_then(|name| ModuleName::new(name).ok())
                .map(Self::Module)
                .ok_or(DecodeError::Bad { what: "module name of the connection" }),
            _ => Err(DecodeError::Bad { what: "purpose of the connection" }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_preamble_reads_back_as_it_was_written() {
        let long = ModuleName::new(&"x".repeat(48)).unwrap();
        for preamble in [Preamble::Acceptors, Preamble::Module("db".parse().unwrap()), Preamble::Module(long)] {
            assert_eq!(Preamble::decode(&preamble.encode()), Ok(preamble));
        }
        let mut other = Preamble::Acceptors.encode();
        other[8] = 2;
        assert!(Preamble::decode(&other).unwrap_err().to_string().contains("version 2"));
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(256) })]
        #[test]
        fn hostile_bytes_never_panic_nor_name_a_path(tail in proptest::array::uniform32(any::<u8>()), magic: bool) {
            let mut bytes = Preamble::Module("db".parse().unwrap()).encode();
            bytes[if magic { 16 } else { 0 }..][..32].copy_from_slice(&tail);
            if let Ok(Preamble::Module(name)) = Preamble::decode(&bytes) {
                prop_assert!(!name.as_str().contains('/'));
            }
        }
    }
}
