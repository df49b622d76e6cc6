//! /var/lib/vmtwin/NAME/protect.journal: the whole plan and its direction, on disk from before the first step until all
//! is done. Every step can be done again, so the journal need not say how far it came.
use super::{During, Plan, ProtectError};
use crate::config::{Paths, durable};
use serde::{Deserialize, Serialize};
use std::io;
use std::path::PathBuf;
use vmtwin_core::ids::ModuleName;

/// Version of the file's format; another one is refused unread.
const FORMAT: u32 = 1;
/// Largest journal that is read, in bytes: two definitions and a list of files.
const BYTES_MAX: u64 = 8 << 20;

/// Which way it goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// Steps are being done.
    Forward,
    /// All are done; `commit` or `undo` is to follow.
    Done,
    /// Steps are being taken back.
    Back,
}

/// What an earlier run left.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pending {
    format: u32,
    /// Where it stands.
    pub phase: Phase,
    /// What it was about.
    pub plan: Plan,
}

/// Where a module's journal lies.
pub(super) fn path(paths: &Paths, module: &ModuleName) -> PathBuf {
    paths.module_lib(module).join("protect.journal")
}

/// The journal of a run that did not end, if there is one.
///
/// # Errors
/// Where it cannot be read, or is of another version.
pub fn pending(paths: &Paths, module: &ModuleName) -> Result<Option<Pending>, ProtectError> {
    let path = path(paths, module);
    match path.metadata() {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Ok(found) if found.len() > BYTES_MAX => {
            return Err(io::Error::other("it is too large for a journal")).during("read", &path);
        }
        _ => {}
    }
    let bytes = std::fs::read(&path).during("read", &path)?;
    let pending: Pending = serde_json::from_slice(&bytes).map_err(io::Error::from).during("understand", &path)?;
    if pending.format != FORMAT {
        let other = format!("it has format {}, this version knows {FORMAT}", pending.format);
        return Err(io::Error::other(other)).during("understand", &path);
    }
    Ok(Some(pending))
}

/// Makes the plan and its phase durable.
pub(super) fn store(paths: &Paths, module: &ModuleName, plan: &Plan, phase: Phase) -> Result<(), ProtectError> {
    let path = path(paths, module);
    let folder = paths.module_lib(module);
    std::fs::create_dir_all(&folder).during("make", &folder)?;
    super::files::sync_folder(&folder)?;
    let pending = Pending { format: FORMAT, phase, plan: plan.clone() };
    let bytes = serde_json::to_vec_pretty(&pending).map_err(io::Error::from).during("write", &path)?;
    // The definition may hold a console's password.
    durable::write(&path, &bytes, 0o600).during("write", &path)
}

/// All is done.
pub(super) fn remove(paths: &Paths, module: &ModuleName) -> Result<(), ProtectError> {
    super::files::remove(&path(paths, module))
}
