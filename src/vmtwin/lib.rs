//! vmtwin: the product. Shells around `vmtwin-core`; `main.rs` holds the subcommands only.
#![forbid(unsafe_code)]
pub mod api;
pub mod config;
pub mod engine;
pub mod link;
pub mod store;
pub mod eventlog;
pub mod trust;
