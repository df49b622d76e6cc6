//! Votes: the acceptors that a process keeps, and the way to those of others.
mod client;
#[cfg(test)]
mod tests;
mod voters;
pub mod wire;

pub use client::{Acceptors, News, Place, Reach, ask_once, places};
pub use voters::Voters;
