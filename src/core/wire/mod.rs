//! Bytes that travel: frames of the peer link, questions to acceptors, and the cursor that reads and writes them.
pub mod codec;
pub mod frame;
pub mod message;
