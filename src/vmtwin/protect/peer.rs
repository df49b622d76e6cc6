//! What the other node has to say before a VM is protected: asked with a `Question`, answered by `check` on that node.
use super::{During, Host, Plan, ProtectError, plan::Kind};
use crate::config::{ModuleConfig, Paths};
use rustix::fs::statvfs;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use vmtwin_core::ids::ModuleName;
use vmtwin_hypervisor::domain::{self, Domain};

/// Users whose numbers travel with the files they own.
const USERS: [&str; 3] = ["libvirt-qemu", "qemu", "tss"];

/// Where QEMU's firmware packages describe what they hold.
const FIRMWARE: [&str; 2] = ["/usr/share/qemu/firmware", "/etc/qemu/firmware"];

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
    /// Files of the firmware package that the VM starts from, or that libvirt chooses from: path, and BLAKE3 hash.
    pub firmware: BTreeMap<String, String>,
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
    Ok(Question {
        vm: plan.vm.clone(),
        uuid: plan.uuid.clone(),
        dir: plan.dir.clone(),
        bytes: plan.bytes,
        firmware: firmware(&domain)?,
        emulator: domain.emulator,
        users: users()?,
    })
}

/// The loader that the definition names; where it leaves the choice to libvirt, all descriptions and what they name.
fn firmware(domain: &Domain) -> Result<BTreeMap<String, String>, ProtectError> {
    let mut files = BTreeMap::new();
    if let Some(loader) = &domain.firmware.loader {
        files.insert(loader.clone(), hash(Path::new(loader))?);
    } else if domain.firmware.auto.is_some() {
        for folder in FIRMWARE {
            let Ok(entries) = fs::read_dir(folder) else { continue };
            for path in
                entries.flatten().map(|entry| entry.path()).filter(|path| path.extension() == Some("json".as_ref()))
            {
                let text = fs::read_to_string(&path).during("read", &path)?;
                files.insert(path.to_string_lossy().into_owned(), hash(&path)?);
                // A description that we do not understand is compared, at least.
                let described: Value = serde_json::from_str(&text).unwrap_or_default();
                let image = described.pointer("/mapping/executable/filename").and_then(Value::as_str);
                if let Some(hash) = image.and_then(|image| hash(Path::new(image)).ok()) {
                    files.extend(image.map(|image| (image.to_owned(), hash)));
                }
            }
        }
    }
    Ok(files)
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
    let missing = question.firmware.iter().find_map(|(file, wanted)| match hash(Path::new(file)) {
        Ok(found) if found == *wanted => None,
        Ok(_) => Some(format!("{file} differs on the peer: install the same firmware package on both")),
        Err(_) => Some(format!("the peer has no {file}: install the same firmware package")),
    });
    no.extend(missing);
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
