//! The simulator of the arbiter.
