//! What makes up a VM, gathered into one directory and given back: `protect` and `unprotect` on one node.
//!
//! - `plan`     what is to be done, and every refusal, before anything is touched
//! - `chain`    the files below a disk, as its XML and its images' headers name them
//! - `gather`   the plan carried out or taken back, each step safe to do again
//! - `files`    one file moved or copied: renamed, or copied, flushed and compared
//! - `journal`  the plan on disk, from before its first step until `commit`
//! - `restore`  `unprotect`, on the node of the VM and on its peer
//! - `peer`     what the other node has to say before
//! - `hook`     libvirt's question at each start, and the script that asks it
//!
//! Keeps out: the module's record and replica, the peer's configuration, the commands themselves (`node` and `cli`).
//! Invariant: at every moment each file of the VM exists whole under its old or its new name, and the journal says which
//! names those are; a crash anywhere is finished or taken back by the next run.
mod chain;
mod files;
mod gather;
pub mod hook;
mod journal;
pub mod peer;
mod plan;
mod restore;
#[cfg(test)]
mod tests;

pub use chain::{Backing, ImageInfo, Images, QemuImg};
pub use gather::{commit, gather, undo};
pub use journal::{Pending, Phase, pending};
pub use plan::{FileStep, HeaderStep, Kind, Plan, directory_of, preflight};
pub use restore::{Unprotected, plan_restore, restore, retire_peer};

use std::io;
use std::path::{Path, PathBuf};
use vmtwin_hypervisor::domain::DomainError;
use vmtwin_hypervisor::{Hypervisor, Inventory, VmError};

/// Where VMs' directories are made when nothing else is said.
pub const IMAGES: &str = "/var/lib/libvirt/images";
/// Replicated metadata in a module's directory.
pub const METADATA: &str = ".vmtwin";
/// One replica's own metadata in it, never replicated.
pub const METADATA_LOCAL: &str = ".vmtwin-local";
/// The definition that a takeover defines, in `METADATA`.
pub const DOMAIN_XML: &str = "domain.xml";
/// The definition before `protect` and where each file came from, in `METADATA`.
pub const ORIGIN_XML: &str = "origin.xml";

/// The host of a VM: its hypervisor, and what else is asked of it.
pub trait Host: Hypervisor + Inventory {}
impl<T: Hypervisor + Inventory> Host for T {}

/// How far it is; told before each step and during long ones.
#[derive(Clone, Copy, Debug)]
pub struct Progress<'a> {
    /// What is being done, as a word: `journal`, `move`, `copy`, `verify`, `define`, ...
    pub step: &'static str,
    /// With which file.
    pub path: &'a Path,
    /// Bytes of it that are done.
    pub bytes_done: u64,
    /// Its bytes, 0 where a step has none.
    pub bytes_total: u64,
}

/// Takes progress.
pub type Tell<'a> = dyn FnMut(&Progress<'_>) + 'a;

/// Why it was refused or failed, worded for the operator.
#[derive(Debug, thiserror::Error)]
pub enum ProtectError {
    /// Nothing was touched. One sentence for each reason.
    #[error("{}", .0.join("\n"))]
    Refused(Vec<String>),
    /// The hypervisor.
    #[error(transparent)]
    Vm(#[from] VmError),
    /// The definition.
    #[error(transparent)]
    Domain(#[from] DomainError),
    /// A file or a program.
    #[error("cannot {what} {}", path.display())]
    File {
        /// As a verb.
        what: &'static str,
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It stood half-way, and was taken back.
    #[error("{cause}; everything was put back as it was")]
    PutBack {
        /// What failed.
        #[source]
        cause: Box<ProtectError>,
    },
    /// It stands half-way.
    #[error("{cause}; and putting things back failed: {back}. Nothing is lost: {} says where each file is. Remove the cause and run the command again", journal.display())]
    HalfWay {
        /// What failed first.
        cause: Box<ProtectError>,
        /// What failed then.
        back: Box<ProtectError>,
        /// The journal.
        journal: PathBuf,
    },
}

impl ProtectError {
    pub(crate) fn refused(sentence: impl Into<String>) -> Self {
        Self::Refused(vec![sentence.into()])
    }
    /// Whether nothing was touched, as the VM's or the host's state forbids it (exit code 3).
    #[must_use]
    pub fn is_refusal(&self) -> bool {
        matches!(self, Self::Refused(_))
    }
}

/// Adds what was tried, and with which file, to a system's error.
trait During<T> {
    fn during(self, what: &'static str, path: &Path) -> Result<T, ProtectError>;
}
impl<T, E: Into<io::Error>> During<T> for Result<T, E> {
    fn during(self, what: &'static str, path: &Path) -> Result<T, ProtectError> {
        self.map_err(|source| ProtectError::File { what, path: path.to_owned(), source: source.into() })
    }
}
