//! The simulator of the replica core.
