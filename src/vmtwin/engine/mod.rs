//! The body of `vmtwin module NAME`: the loops that own the cores.
pub mod data;
pub mod messages;
