//! Who may run the VM: one compare-and-swap register per module (CASPaxos) with leases. PROTOCOL.md R1, R4, R9, R12.
pub mod acceptor;
pub mod event;
pub mod message;
pub mod rules;
pub mod stored;
