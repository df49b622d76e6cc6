//! The link between the two module processes of a module: TCP, by default under TLS, on the data thread's ring.
//!
//! - `handshake`  the blocking part, on a helper thread
//! - `frames`     bytes in, frames out
//! - `peer`       one link: what is queued, what is on its way, when it was heard last
pub mod frames;
pub mod handshake;
pub mod peer;
