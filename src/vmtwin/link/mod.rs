//! The link between the two module processes of a module.
pub mod handshake;
