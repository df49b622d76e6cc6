//! Front ends: how a hypervisor reaches the module's files. Requests in, completions out, in any order.
//!
//! Decides: nothing about when to acknowledge. Keeps out: replication, disks, who may write.
#![forbid(unsafe_code)]
pub mod fuse;
