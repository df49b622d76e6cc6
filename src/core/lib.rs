//! vmtwin-core: every decision that keeps data right, as pure state machines.
//!
//! No clock, file, socket, thread or randomness in here: time comes as a value, what happened as an event, what is to
//! be done goes out as an effect. The product's shells and the simulators in `tests/` drive the same code.
#![forbid(unsafe_code)]

pub mod arbiter;
pub mod format;
pub mod ids;
pub mod limits;
pub mod module;
pub mod namespace;
pub mod record;
pub mod replica;
pub mod resync;
pub mod time;
pub mod wire;
