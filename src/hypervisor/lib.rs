//! What a hypervisor does for a module: one trait. It does not know when to act; the module machine does.
//!
//! Every call blocks, maybe for long: callers use a thread of their own and a time limit. The data path never waits
//! for any of this.
#![deny(unsafe_code)]
use std::path::PathBuf;
use std::time::Duration;

pub mod domain;
pub mod fake;
pub mod libvirt;

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
    /// SIGKILL to the VM's process, without waiting for its death: a process whose I/O is held dies only when that I/O is
    /// answered. So: `kill`, then answer what is held (`FailHeld`), then `destroy`. True: there was a process.
    fn kill(&self) -> VmResult<bool> {
        Ok(false)
    }
    /// Ends it at once. Kills the VM's process first where the hypervisor would wait for its I/O; returns when it is gone.
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

/// One VM as a hypervisor lists it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    /// Its name.
    pub name: String,
    /// Its inactive definition.
    pub xml: String,
}

/// What is known of a VM beside its definition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Facts {
    /// How it stands.
    pub state: VmState,
    /// It stays defined when it stops.
    pub persistent: bool,
    /// It starts with its host.
    pub autostart: bool,
    /// Snapshots that the hypervisor knows.
    pub snapshots: u32,
    /// Checkpoints that the hypervisor knows.
    pub checkpoints: u32,
    /// A managed save waits to be resumed.
    pub managed_save: bool,
}

/// What `protect` and `unprotect` need beside [`Hypervisor`]: for the same VM, and for what else is on the host.
pub trait Inventory: Send + Sync {
    /// All VMs of the host.
    fn list(&self) -> VmResult<Vec<Listed>>;
    /// What is known of the VM beside its definition.
    fn facts(&self) -> VmResult<Facts>;
    /// Whether it starts with its host.
    fn set_autostart(&self, on: bool) -> VmResult<()>;
    /// Forgets the VM, and keeps its NVRAM and its TPM's state. No error where it is not known.
    fn undefine(&self) -> VmResult<()>;
    /// The file of a storage pool's volume.
    fn volume_path(&self, pool: &str, volume: &str) -> VmResult<PathBuf>;
}
