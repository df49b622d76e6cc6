//! vmtwin: the product. Shells around `vmtwin-core`; `main.rs` holds the subcommands only.
#![forbid(unsafe_code)]
pub mod acceptors;
pub mod api;
pub mod cli;
pub mod config;
pub mod engine;
pub mod eventlog;
pub mod host;
pub mod keep;
pub mod link;
pub mod listen;
pub mod node;
pub mod pidfile;
pub mod protect;
pub mod store;
#[cfg(test)]
mod testing;
pub mod trust;
pub mod witness;
