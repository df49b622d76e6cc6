//! Names and numbers as types of their own, so that two that could be swapped cannot be.
use std::fmt;

/// Why a name was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{given:?} is no {what} name: 1 to {NAME_BYTES_MAX} of a-z A-Z 0-9 . _ -, beginning with a letter or digit")]
pub struct BadName {
    what: &'static str,
    given: String,
}

/// Longest name of a module, node, witness or cluster, in bytes: it becomes a file name and part of a socket's path.
pub const NAME_BYTES_MAX: usize = 48;

macro_rules! name {
    ($(#[$doc:meta])* $type:ident, $what:literal) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $type(String);
        impl $type {
            /// Checks and takes a name.
            ///
            /// # Errors
            /// `BadName` where it is empty, too long, or has a character that is not allowed.
            pub fn new(given: &str) -> Result<Self, BadName> {
                let good = |c: u8| c.is_ascii_alphanumeric() || matches!(c, b'.' | b'_' | b'-');
                let bytes = given.as_bytes();
                let fits = (1..=NAME_BYTES_MAX).contains(&bytes.len());
                if fits && bytes.iter().copied().all(good) && bytes[0].is_ascii_alphanumeric() {
                    Ok(Self(given.to_owned()))
                } else {
                    Err(BadName { what: $what, given: given.chars().take(80).collect() })
                }
            }
            /// The name as text.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }
        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
        impl fmt::Debug for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
        impl std::str::FromStr for $type {
            type Err = BadName;
            fn from_str(s: &str) -> Result<Self, BadName> {
                Self::new(s)
            }
        }
    };
}
name!(/** One protected VM. */ ModuleName, "module");
name!(/** A node's role in the cluster. */ NodeName, "node");
name!(/** A witness. */ WitnessName, "witness");
name!(/** A cluster. */ ClusterName, "cluster");

macro_rules! id128 {
    ($(#[$doc:meta])* $type:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $type(pub u128);
        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:032x}", self.0)
            }
        }
        impl fmt::Debug for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($type), "({:.8})"), format!("{:032x}", self.0))
            }
        }
        impl std::str::FromStr for $type {
            type Err = std::num::ParseIntError;
            fn from_str(s: &str) -> Result<Self, Self::Err> {
                u128::from_str_radix(s, 16).map(Self)
            }
        }
    };
}
id128!(/** A module's identity over all renamings; random, made by `protect`. */ ModuleId);
id128!(/** One node's copy of a module's directory; random, stored in it. */ ReplicaId);
id128!(/** A voter: random, stored with its state; one that lost its state is a new one (R12). */ AcceptorId);
id128!(/** Random name of one record, by which a retry knows its own (R9). */ RecordId);
id128!(/** The kernel's boot id: changes with every boot of the host. */ BootId);
id128!(/** A cluster's identity; random, made by `cluster init`. */ ClusterId);

macro_rules! number {
    ($(#[$doc:meta])* $type:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $type(pub $inner);
        impl $type {
            /// The one after this.
            #[must_use]
            pub fn next(self) -> Self {
                Self(self.0.checked_add(1).expect("a 64-bit count does not run out"))
            }
        }
        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}", self.0)
            }
        }
    };
}
number!(/** Rises with each change of the record. */ Generation(u64));
number!(/** Rises with each forced start (R12). */ Epoch(u64));
number!(/** A file, by the same number on both nodes; given by the holder. The root is 1, 0 is none. */ FileId(u64));
number!(/** One connection between the two module processes, bound to one record (R7). */ SessionId(u64));
number!(/** Order of frames within a session, beginning with 1. */ Sequence(u64));

impl FileId {
    /// The module's directory itself.
    pub const ROOT: Self = Self(1);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_could_leave_their_folder_are_refused() {
        for bad in ["", ".", "..", "-x", "a/b", "a b", "a\n", "ä", &"x".repeat(49)] {
            assert!(ModuleName::new(bad).is_err(), "{bad:?}");
        }
        for good in ["a", "db-1", "Web_2.test", &"x".repeat(48)] {
            assert_eq!(ModuleName::new(good).unwrap().as_str(), good);
        }
    }

    #[test]
    fn ids_read_back_as_they_were_written() {
        let id = ReplicaId(0x12ab);
        assert_eq!(id.to_string().parse::<ReplicaId>().unwrap(), id);
    }
}
