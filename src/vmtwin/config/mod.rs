//! What an admin writes and where everything lies: paths, cluster.xml, userconfig.xml.
//!
//! Keeps out: what the settings do. Invariant: a file is taken whole and checked, or refused with file, line and element.
pub mod cluster;
pub mod durable;
pub mod module;
pub mod paths;
#[cfg(test)]
mod tests;
mod xml;

pub use cluster::{Address, Cluster, Node, Use, Witness};
pub use module::{Driver, ModuleConfig, OnGuestShutdown};
pub use paths::Paths;
pub use xml::ConfigError;
