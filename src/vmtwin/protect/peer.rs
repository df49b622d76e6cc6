//! What the other node has to say before a VM is protected: asked with a `Question`, answered by `check` on that node.
use super::{During, Host, Plan, ProtectError, plan::Kind};
use crate::config::{ModuleConfig, Paths};
use rustix::fs::statvfs;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use vmtwin_core::ids::ModuleName;
use vmtwin_hypervisor::domain;

/// Users whose numbers travel with the files they own.
const USERS: [&str; 3] = ["libvirt-qemu", "qemu", "tss"];

/// What the peer must have.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Question {
    /// The VM's name.
    pub vm: String,
    /// Its identity.
    pub uuid: Option<String>,
    /// Its directory.
    pub dir: PathBuf,
    /// Bytes on disk that are coming.
    pub bytes: u64,
    /// The QEMU binary.
    pub emulator: Option<String>,
    /// Firmware image, and its BLAKE3 hash.
    pub loader: Option<(String, String)>,
    /// Numbers of the users that own files, by name.
    pub users: BTreeMap<String, u32>,
}

/// The question for a plan.
///
/// # Errors
/// Where the firmware or the user list cannot be read.
pub fn question(plan: &Plan) -> Result<Question, ProtectError> {
    debug_assert_eq!(plan.kind, Kind::Protect, "only a VM that comes is asked for");
    let domain = domain::read(&plan.after)?;
    let loader = match domain.firmware.loader {
        Some(path) => Some((path.clone(), hash(Path::new(&path))?)),
        None => None,
    };
    Ok(Question {
        vm: plan.vm.clone(),
        uuid: plan.uuid.clone(),
        dir: plan.dir.clone(),
        bytes: plan.bytes,
        emulator: domain.emulator,
        loader,
        users: users()?,
    })
}

fn hash(path: &Path) -> Result<String, ProtectError> {
    let bytes = fs::read(path).during("read", path)?;
    Ok(blake3::hash(&bytes).to_hex().to_string())
}

fn users() -> Result<BTreeMap<String, u32>, ProtectError> {
    let path = Path::new("/etc/passwd");
    let text = fs::read_to_string(path).during("read", path)?;
    let users = text.lines().filter_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next().filter(|name| USERS.contains(name))?;
        Some((name.to_owned(), fields.nth(1)?.parse().ok()?))
    });
    Ok(users.collect())
}

/// On the peer: why the VM cannot be protected onto this node; one sentence each, none where it can.
///
/// # Errors
/// What kept it from looking.
pub fn check(
    paths: &Paths,
    module: &ModuleName,
    question: &Question,
    host: &dyn Host,
) -> Result<Vec<String>, ProtectError> {
    let mut no = Vec::new();
    let (vm, dir) = (&question.vm, question.dir.display());
    for listed in host.list()? {
        let Ok(other) = domain::read(&listed.xml) else { continue };
        let ours = other.module.as_deref() == Some(module.as_str());
        if !ours && listed.name == *vm {
            no.push(format!("the peer has a VM named {vm} already: rename or undefine it there"));
        } else if !ours && other.uuid.is_some() && other.uuid == question.uuid {
            no.push(format!("the peer's VM {} has the same uuid as {vm}", listed.name));
        }
    }
    for other in paths.list_modules().during("read", &paths.modules())?.iter().filter(|other| *other != module) {
        if let Ok(config) = ModuleConfig::load(paths, other)
            && (question.dir.starts_with(&config.dir) || config.dir.starts_with(&question.dir))
        {
            no.push(format!("{dir} is in use by module {other} on the peer: choose another --dir"));
        }
    }
    refuse_directory(&question.dir, question.bytes, &mut no)?;
    if let Some(emulator) = question.emulator.as_ref().filter(|path| !Path::new(path).exists()) {
        no.push(format!("the peer has no {emulator}: install the same QEMU package"));
    }
    if let Some((loader, wanted)) = &question.loader {
        match hash(Path::new(loader)) {
            Ok(found) if found == *wanted => {}
            Ok(_) => no.push(format!("{loader} differs on the peer: install the same firmware package on both")),
            Err(_) => no.push(format!("the peer has no {loader}: install the same firmware package")),
        }
    }
    let own = users()?;
    for (user, number) in &question.users {
        if let Some(found) = own.get(user).filter(|found| *found != number) {
            no.push(format!(
                "user {user} is {number} here and {found} on the peer: files would belong to somebody else"
            ));
        }
    }
    Ok(no)
}

fn refuse_directory(dir: &Path, bytes: u64, no: &mut Vec<String>) -> Result<(), ProtectError> {
    let shown = dir.display();
    match fs::read_dir(dir) {
        Ok(mut entries) => {
            if entries.any(|entry| entry.is_ok_and(|e| e.file_name() != "lost+found")) {
                no.push(format!("{shown} on the peer is not empty: move it away, vmtwin does not overwrite it"));
            }
        }
        Err(e) if e.kind() == io::ErrorKind::NotFound => {}
        Err(e) if e.kind() == io::ErrorKind::NotADirectory => no.push(format!("{shown} on the peer is no directory")),
        Err(e) => return Err(e).during("read", dir),
    }
    let ground = dir.ancestors().find(|path| path.is_dir()).unwrap_or(Path::new("/"));
    let room = statvfs(ground).during("look at", ground)?;
    let free = room.f_bavail.saturating_mul(room.f_frsize);
    if free < bytes {
        no.push(format!("the peer has {} MiB free for {shown}, {} MiB are needed", free >> 20, bytes >> 20));
    }
    Ok(())
}
