//! The body of `vmtwin module NAME`: the loops that own the cores.
mod clock;
pub mod control;
pub mod data;
pub mod link;
pub mod messages;
pub mod socket;
mod start;
mod status;
#[cfg(test)]
mod tests;
mod verify;
pub mod vm;

pub use start::run;
