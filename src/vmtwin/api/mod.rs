//! The API: HTTP and JSON, over /run/vmtwin/node.sock for root and over TLS on port 7720 between nodes.
//!
//! - `types`   what is asked and answered
//! - `server`  connections, who calls, failures
//! - `routes`  one line per route, to `node`
//! - `client`  asking
pub mod client;
pub mod routes;
pub mod server;
pub mod types;
