//! What a hypervisor does for a module: one trait. It does not know when to act; the module machine does.
//!
//! Every call blocks, maybe for long: callers use a thread of their own and a time limit. The data path never waits
//! for any of this.
use std::time::Duration;

/// How a VM stands, as its hypervisor says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VmState {
    /// Not known to this hypervisor.
    Undefined,
    /// Defined and off.
    Off,
    /// Its CPUs run.
    Running,
    /// It has a process, its CPUs stand.
    Paused,
}

/// Why a VM ended; HYPERVISOR facts in ARCHITECTURE.md tell how libvirt's events are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VmEnd {
    /// Powered off from inside.
    GuestShutdown,
    /// Its process got SIGTERM: the host goes down, or an admin's kill.
    HostShutdown,
    /// `virsh destroy`, by us or an admin.
    Destroyed,
    /// Its process died, or the guest panicked.
    Crashed,
}

/// News of a VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VmEvent {
    /// CPUs run (started or resumed).
    Running,
    /// CPUs stand: the proof of a pause, even where the call has not returned yet.
    Paused {
        /// The hypervisor paused it for an I/O error.
        io_error: bool,
    },
    /// It rebooted from inside; same process.
    Rebooted,
    /// It ended.
    Ended(VmEnd),
    /// Its definition changed; the driver gives the new inactive XML.
    Defined {
        /// The inactive, secure, migratable XML.
        xml: String,
    },
    /// The hypervisor's daemon is gone or back.
    Connection {
        /// Whether it answers.
        up: bool,
    },
}

/// What went wrong in a call, worded for an operator.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// The hypervisor does not know it.
    #[error("VM {name} is not defined on this host")]
    Undefined {
        /// Its name.
        name: String,
    },
    /// No connection.
    #[error("no contact with the hypervisor: {why}")]
    NoContact {
        /// Its own words.
        why: String,
    },
    /// The call was refused.
    #[error("{call} of VM {name} failed: {why}")]
    Refused {
        /// Which call.
        call: &'static str,
        /// The VM.
        name: String,
        /// The hypervisor's own words.
        why: String,
    },
}

/// Result of a call.
pub type VmResult<T> = Result<T, VmError>;

/// One hypervisor, seen by one module (the VM's name is given to the constructor).
pub trait Hypervisor: Send + Sync {
    /// Defines the VM, or replaces its definition.
    fn define(&self, xml: &str) -> VmResult<()>;
    /// The inactive definition.
    fn definition(&self) -> VmResult<String>;
    /// A fresh boot, never a managed save.
    fn start(&self) -> VmResult<()>;
    /// Asks the guest to power off, waits up to `limit`, then destroys. True: it went down by itself.
    fn shutdown(&self, limit: Duration) -> VmResult<bool>;
    /// Ends it at once. Kills the VM's process first where the hypervisor would wait for its I/O.
    fn destroy(&self) -> VmResult<()>;
    /// Stops its CPUs.
    fn pause(&self) -> VmResult<()>;
    /// Lets them go on.
    fn resume(&self) -> VmResult<()>;
    /// How it stands.
    fn state(&self) -> VmResult<VmState>;
    /// The process id of the running VM, if there is one.
    fn process(&self) -> VmResult<Option<u32>>;
    /// Events from now on. Called once.
    fn events(&self) -> VmResult<std::sync::mpsc::Receiver<VmEvent>>;
}
