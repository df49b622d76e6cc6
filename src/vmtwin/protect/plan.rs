//! What `protect` will do to a VM, worked out before anything is touched, and every reason not to.
use super::chain::{Chain, Images, follow};
use super::{During, Host, IMAGES, METADATA, METADATA_LOCAL, ProtectError, files, journal};
use crate::config::{ModuleConfig, Paths};
use rustix::fs::statvfs;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};
use vmtwin_core::ids::ModuleName;
use vmtwin_hypervisor::domain::{self, Change, Device, Disk, Domain, Module, Source};
use vmtwin_hypervisor::{VmError, VmState};

/// A CD-ROM image up to this size that only this VM uses is a seed image and part of it; a larger one is an installer's.
const SEED_BYTES_MAX: u64 = 64 << 20;
/// Room that must stay beside what is copied, in bytes: definitions, and the replica's own metadata.
const SPARE_BYTES: u64 = 16 << 20;
/// Where libvirt puts NVRAM that the XML does not place.
const NVRAM: &str = "/var/lib/libvirt/qemu/nvram";

/// What a plan is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Into the directory.
    Protect,
    /// Out of vmtwin's hands.
    Unprotect,
}

/// All that is to be done, and what it was before.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// What for.
    pub kind: Kind,
    /// The VM's name.
    pub vm: String,
    /// Its identity at the hypervisor.
    pub uuid: Option<String>,
    /// The module's directory.
    pub dir: PathBuf,
    /// It was there before.
    pub dir_existed: bool,
    /// The definition before.
    pub before: String,
    /// The definition afterwards.
    pub after: String,
    /// Whether the VM started with its host before `protect`.
    pub autostart: bool,
    /// Files to bring to another name, in this order.
    pub files: Vec<FileStep>,
    /// Headers that name a file which goes to another name.
    pub headers: Vec<HeaderStep>,
    /// Where files went, as the definitions name them: before, to afterwards.
    pub paths: BTreeMap<String, String>,
    /// What the operator should know, one sentence each.
    pub notes: Vec<String>,
    /// Bytes that have to be copied as they come from another file system.
    pub copy_bytes: u64,
    /// Bytes on disk of all that is gathered: what the peer needs.
    pub bytes: u64,
    /// Copies that nothing names afterwards, as their originals are used again; they go at the end.
    #[serde(default)]
    pub spare: Vec<PathBuf>,
}

/// One file that goes to another name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileStep {
    /// Its name before, symbolic links resolved.
    pub from: String,
    /// Its name afterwards.
    pub to: String,
    /// The original stays: it belongs to the host (a kernel).
    pub copy: bool,
    /// The original's file system and inode, by which it is known again.
    pub device: u64,
    /// See `device`.
    pub inode: u64,
}

/// One image's header.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeaderStep {
    /// The image, by its name afterwards.
    pub file: String,
    /// Its format.
    pub format: String,
    /// Format of the layer below.
    pub backing_format: String,
    /// The layer's name in the header before.
    pub before: String,
    /// The layer's name in the header afterwards.
    pub after: String,
}

/// The directory of a VM when nothing else is said.
#[must_use]
pub fn directory_of(vm: &str) -> PathBuf {
    Path::new(IMAGES).join(vm)
}

/// Works out the plan. Touches nothing.
///
/// # Errors
/// `Refused` with one sentence for each reason; or what kept it from looking.
pub fn preflight(
    paths: &Paths,
    module: &ModuleName,
    vm: &str,
    dir: &Path,
    host: &dyn Host,
    images: &dyn Images,
) -> Result<Plan, ProtectError> {
    if let Some(pending) = journal::pending(paths, module)? {
        return Err(ProtectError::refused(format!(
            "an earlier `vmtwin {}` of VM {} was interrupted: it has to be finished or undone first",
            if pending.plan.kind == Kind::Protect { "protect" } else { "unprotect" },
            pending.plan.vm
        )));
    }
    let facts = match host.facts() {
        Err(VmError::Undefined { .. }) => {
            return Err(ProtectError::refused(format!(
                "VM {vm} is not defined on this host: virsh list --all names all"
            )));
        }
        other => other?,
    };
    let before = host.definition()?;
    let domain = domain::read(&before)?;
    let mut planner = Planner { host, images, vm, dir, no: Vec::new(), files: Vec::new(), change: Change::default() };
    planner.refuse_states(&facts);
    planner.refuse_features(paths, &domain)?;
    let mut plan = planner.gather(&domain)?;
    let others = planner.others()?;
    planner.settle_drives(&domain, &others, &mut plan);
    planner.refuse_shared(&others);
    planner.refuse_directory(paths, module)?;
    planner.place(&mut plan)?;
    if !planner.no.is_empty() {
        return Err(ProtectError::Refused(planner.no));
    }
    planner.change.guard = true;
    planner.change.module = Module::Set(module.to_string());
    plan.after = domain::rewrite(&before, &planner.change)?;
    plan.paths = planner.change.paths;
    plan.before = before;
    plan.autostart = facts.autostart;
    if facts.autostart {
        plan.notes.push(format!("autostart of VM {vm} is switched off: vmtwin starts it, on the right host"));
    }
    Ok(plan)
}

/// A file of the VM.
struct Part {
    /// As the XML has it.
    named: String,
    /// Symbolic links resolved.
    real: PathBuf,
    copy: bool,
    /// A backing layer: gets its name after the disks have theirs.
    lower: bool,
    /// Goes only if nobody else has it and it is small.
    drive: Option<String>,
}

struct Planner<'a> {
    host: &'a dyn Host,
    images: &'a dyn Images,
    vm: &'a str,
    dir: &'a Path,
    /// Why not, one sentence each.
    no: Vec<String>,
    files: Vec<Part>,
    change: Change,
}

impl Planner<'_> {
    fn refuse_states(&mut self, facts: &vmtwin_hypervisor::Facts) {
        let vm = self.vm;
        let mut no = |sentence: String| self.no.push(sentence);
        if facts.state != VmState::Off {
            no(format!(
                "VM {vm} is running: shut it down first (virsh shutdown {vm}), protecting a running VM is not supported yet"
            ));
        }
        if facts.snapshots > 0 {
            no(format!(
                "VM {vm} has {} snapshots, which are not supported yet: virsh snapshot-delete {vm} NAME",
                facts.snapshots
            ));
        }
        if facts.checkpoints > 0 {
            no(format!(
                "VM {vm} has {} checkpoints, which are not supported yet: virsh checkpoint-delete {vm} NAME",
                facts.checkpoints
            ));
        }
        if facts.managed_save {
            no(format!("VM {vm} has a managed save: start it and shut it down, or virsh managedsave-remove {vm}"));
        }
    }

    fn refuse_features(&mut self, paths: &Paths, domain: &Domain) -> Result<(), ProtectError> {
        let vm = self.vm;
        for obstacle in &domain.obstacles {
            self.no.push(format!("VM {vm} has {obstacle}, which is not supported yet: remove it from the definition"));
        }
        for (action, now, wanted) in
            [("on_poweroff", &domain.on_poweroff, "destroy"), ("on_reboot", &domain.on_reboot, "restart")]
        {
            if let Some(other) = now.as_deref().filter(|now| *now != wanted) {
                self.no.push(format!(
                    "VM {vm} has {action}={other}: vmtwin needs {wanted} to see why it stopped (virsh edit {vm})"
                ));
            }
        }
        let modules = paths.list_modules().during("read", &paths.modules())?;
        if let Some(of) = domain.module.as_ref().filter(|of| modules.iter().any(|m| m.as_str() == *of)) {
            self.no.push(format!("VM {vm} is protected already, by module {of}: vmtwin status {of}"));
        }
        Ok(())
    }

    /// Finds all files.
    fn gather(&mut self, domain: &Domain) -> Result<Plan, ProtectError> {
        let mut plan = Plan {
            kind: Kind::Protect,
            vm: self.vm.to_owned(),
            uuid: domain.uuid.clone(),
            dir: self.dir.to_owned(),
            dir_existed: self.dir.symlink_metadata().is_ok(),
            before: String::new(),
            after: String::new(),
            autostart: false,
            files: Vec::new(),
            headers: Vec::new(),
            paths: BTreeMap::new(),
            notes: Vec::new(),
            copy_bytes: 0,
            bytes: 0,
            spare: Vec::new(),
        };
        for disk in &domain.disks {
            if let Some(file) = self.refuse_disk(disk) {
                self.disk(disk, &file, &mut plan);
            }
        }
        if let Some(nvram) = &domain.firmware.nvram {
            self.nvram(nvram);
        } else if domain.firmware.auto.as_deref() == Some("efi") {
            let own = ["fd", "qcow2"].map(|ending| format!("{NVRAM}/{}_VARS.{ending}", self.vm));
            let made = own.iter().find(|path| Path::new(path).exists()).unwrap_or(&own[0]).clone();
            self.nvram(&made);
            self.change.nvram = Some(made);
        }
        for boot in &domain.boot_files {
            self.file(&boot.path, &boot.element, true, None);
        }
        Ok(plan)
    }

    /// NVRAM is made at the first start: a VM that never started has none yet.
    fn nvram(&mut self, path: &str) {
        if Path::new(path).symlink_metadata().is_ok() {
            self.file(path, "NVRAM", false, None);
        } else if let Some(name) = Path::new(path).file_name() {
            let to = self.dir.join(name).to_string_lossy().into_owned();
            self.change.paths.insert(path.to_owned(), to);
        }
    }

    /// The file of a disk that can be taken; a drive may be empty.
    fn refuse_disk(&mut self, disk: &Disk) -> Option<String> {
        let target = &disk.target;
        let copy = "copy it to a file (qemu-img convert) and let the disk be that file";
        for (is, what) in [
            (disk.shareable, "is shared by several VMs (shareable)"),
            (disk.transient, "is transient: its changes are thrown away"),
            (disk.encrypted, "is encrypted with a secret that only this host has"),
        ] {
            if is {
                self.no.push(format!("disk {target} {what}, which is not supported"));
            }
        }
        match &disk.source {
            Source::Empty if disk.is_hard_disk() => {
                self.no.push(format!("disk {target} has no source"));
                None
            }
            Source::Empty => None,
            Source::File(file) => Some(file.clone()),
            Source::Volume { pool, volume } => match self.host.volume_path(pool, volume) {
                Ok(path) if path.is_file() => {
                    let file = path.to_string_lossy().into_owned();
                    self.change.volumes.insert(target.clone(), file.clone());
                    Some(file)
                }
                Ok(path) => {
                    self.no.push(format!("disk {target} is the volume {}, which is no file: {copy}", path.display()));
                    None
                }
                Err(error) => {
                    self.no.push(format!("disk {target}: volume {volume} of pool {pool} cannot be found: {error}"));
                    None
                }
            },
            Source::Other(kind) if kind == "network" => {
                self.no.push(format!("disk {target} lies on the network, not on this host: {copy}"));
                None
            }
            Source::Other(kind) => {
                self.no
                    .push(format!("disk {target} is no file but of type {kind}, which is not supported yet: {copy}"));
                None
            }
        }
    }

    /// A disk's own file and its chain.
    fn disk(&mut self, disk: &Disk, file: &str, plan: &mut Plan) {
        if !disk.is_hard_disk() && !Path::new(file).exists() {
            self.change.optional.push(disk.target.clone());
            plan.notes.push(format!("{file} in drive {} does not exist: the drive is empty", disk.target));
            return;
        }
        if !disk.is_hard_disk() {
            return self.file(file, &disk.target, false, Some(disk.target.clone()));
        }
        let sound = self.no.len();
        self.file(file, &disk.target, false, None);
        if self.no.len() > sound {
            return;
        }
        match follow(self.images, disk, file) {
            Err(sentence) => self.no.push(sentence),
            Ok(Chain { below, headers }) => {
                for layer in &below {
                    let known = self.files.len();
                    self.file(&layer.path, &disk.target, false, None);
                    if let Some(part) = self.files.get_mut(known) {
                        part.lower = true;
                    }
                }
                let formats = std::iter::once(&disk.format).chain(below.iter().map(|l| &l.format));
                let names = std::iter::once(file).chain(below.iter().map(|l| l.path.as_str()));
                for (((name, format), header), layer) in names.zip(formats).zip(&headers).zip(&below) {
                    if let Some(header) = header {
                        // Both names are those before; `place` puts in where the files go.
                        plan.headers.push(HeaderStep {
                            file: name.to_owned(),
                            format: format.clone(),
                            backing_format: layer.format.clone(),
                            before: header.name.clone(),
                            after: layer.path.clone(),
                        });
                    }
                }
                self.change.chains.insert(disk.target.clone(), below);
            }
        }
    }

    /// Takes a file in, or says why it cannot be.
    fn file(&mut self, named: &str, of: &str, copy: bool, drive: Option<String>) {
        let refusal = match Path::new(named).canonicalize() {
            _ if !Path::new(named).is_absolute() => format!("{of}: {named} is no absolute path"),
            Err(error) => format!("{of}: {named} cannot be found: {error}"),
            Ok(real) => match real.metadata() {
                Err(error) => format!("{of}: {named} cannot be looked at: {error}"),
                Ok(found) if !found.is_file() => format!("{of}: {named} is no plain file"),
                Ok(found) if found.nlink() > 1 && !copy => {
                    format!("{of}: {named} has other names (hard links), which would be left behind")
                }
                Ok(_) if real.to_str().is_none() => format!("{of}: the name of {named} is no text"),
                Ok(_) => {
                    if !self.files.iter().any(|part| part.named == named) {
                        self.files.push(Part { named: named.to_owned(), real, copy, lower: false, drive });
                    }
                    return;
                }
            },
        };
        self.no.push(refusal);
    }

    /// The files of all other VMs, with who has them.
    fn others(&self) -> Result<BTreeMap<PathBuf, String>, ProtectError> {
        let mut others = BTreeMap::new();
        for listed in self.host.list()?.into_iter().filter(|listed| listed.name != self.vm) {
            // A definition that we cannot read is none that `protect` could have made; its files are not known.
            let Ok(other) = domain::read(&listed.xml) else { continue };
            let mut named: Vec<String> = other.firmware.nvram.clone().into_iter().collect();
            for disk in &other.disks {
                let file = match &disk.source {
                    Source::File(file) => Some(file.clone()),
                    Source::Volume { pool, volume } => {
                        let path = self.host.volume_path(pool, volume).ok();
                        path.and_then(|path| path.to_str().map(str::to_owned))
                    }
                    _ => None,
                };
                let Some(file) = file else { continue };
                // A chain that is broken half-way is that VM's trouble; what is known of it counts.
                match follow(self.images, disk, &file) {
                    Ok(chain) => named.extend(chain.below.into_iter().map(|layer| layer.path)),
                    Err(_) => named.extend(disk.chain.iter().map(|layer| layer.path.clone())),
                }
                named.push(file);
            }
            let real = named.iter().filter_map(|path| Path::new(path).canonicalize().ok());
            others.extend(real.map(|path| (path, listed.name.clone())));
        }
        Ok(others)
    }

    /// Small images in CD-ROM and floppy drives that only this VM has are seeds; others stay, and may be missing.
    fn settle_drives(&mut self, domain: &Domain, others: &BTreeMap<PathBuf, String>, plan: &mut Plan) {
        let hard: BTreeSet<_> = domain.disks.iter().filter(|d| d.device == Device::Disk).map(|d| &d.target).collect();
        self.files.retain(|part| {
            let Some(target) = part.drive.as_ref().filter(|target| !hard.contains(target)) else { return true };
            let small = part.real.metadata().is_ok_and(|found| found.len() <= SEED_BYTES_MAX);
            let taken = small && !others.contains_key(&part.real);
            if !taken {
                self.change.optional.push(target.clone());
                self.change.volumes.remove(target);
                plan.notes.push(format!(
                    "{} in drive {target} stays where it is and is not replicated: after a failover the drive is empty",
                    part.named
                ));
            }
            taken
        });
    }

    fn refuse_shared(&mut self, others: &BTreeMap<PathBuf, String>) {
        for part in self.files.iter().filter(|part| !part.copy) {
            if let Some(other) = others.get(&part.real) {
                self.no.push(format!(
                    "{} belongs to VM {other}, too: give each its own copy (qemu-img convert)",
                    part.named
                ));
            }
        }
    }

    fn refuse_directory(&mut self, paths: &Paths, module: &ModuleName) -> Result<(), ProtectError> {
        let dir = self.dir;
        let shown = dir.display();
        let plain = |c: Component<'_>| matches!(c, Component::RootDir | Component::Normal(_));
        if !dir.is_absolute() || !dir.components().all(plain) || dir.parent().is_none() || dir.to_str().is_none() {
            self.no.push(format!("--dir {shown} is no absolute path without . and .."));
            return Ok(());
        }
        for other in paths.list_modules().during("read", &paths.modules())?.iter().filter(|other| *other != module) {
            // A module whose configuration is broken says so itself.
            let Ok(config) = ModuleConfig::load(paths, other) else { continue };
            if dir.starts_with(&config.dir) || config.dir.starts_with(dir) {
                self.no.push(format!(
                    "{shown} is in use by module {other} ({}): choose another --dir",
                    config.dir.display()
                ));
            }
        }
        let entries = match fs::symlink_metadata(dir) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                let parent = dir.parent().unwrap_or(Path::new("/"));
                if !parent.is_dir() {
                    self.no.push(format!("{} does not exist: make it, or choose another --dir", parent.display()));
                }
                return Ok(());
            }
            Err(e) => return Err(e).during("look at", dir),
            Ok(found) if !found.is_dir() => {
                self.no.push(format!("{shown} exists and is no directory: choose another --dir"));
                return Ok(());
            }
            Ok(_) => fs::read_dir(dir).during("read", dir)?,
        };
        for entry in entries {
            let path = entry.during("read", dir)?.path();
            let real = path.canonicalize().unwrap_or_else(|_| path.clone());
            let ours = self.files.iter().any(|part| part.real == real);
            if !ours && path.file_name() != Some("lost+found".as_ref()) {
                self.no.push(format!(
                    "{shown} holds {}, which is no part of VM {}: choose another --dir, or move it away",
                    path.display(),
                    self.vm
                ));
                break;
            }
        }
        Ok(())
    }

    /// Gives each file its new name, and looks whether there is room.
    fn place(&mut self, plan: &mut Plan) -> Result<(), ProtectError> {
        if !self.no.is_empty() {
            return Ok(());
        }
        let real_dir = self.dir.canonicalize().unwrap_or_else(|_| self.dir.to_owned());
        let ground = self.dir.ancestors().find(|path| path.is_dir()).unwrap_or(Path::new("/"));
        let device = ground.metadata().during("look at", ground)?.dev();
        self.files.sort_by_key(|part| part.lower);
        let mut placed: BTreeMap<&Path, String> = BTreeMap::new();
        let mut taken: BTreeSet<String> = [METADATA, METADATA_LOCAL].map(str::to_owned).into();
        // Names that files have in the directory already stay theirs.
        let inside = |part: &Part| part.real.parent() == Some(&real_dir);
        let name_of =
            |part: &Part| part.real.file_name().map_or_else(String::new, |n| n.to_string_lossy().into_owned());
        taken.extend(self.files.iter().filter(|part| inside(part)).map(name_of));
        taken.extend(self.change.paths.values().filter_map(|to| to.rsplit('/').next().map(str::to_owned)));
        for part in &self.files {
            let found = part.real.metadata().during("look at", &part.real)?;
            let size = files::allocated(&part.real)?;
            let to = match placed.get(part.real.as_path()) {
                Some(to) => to.clone(),
                None if inside(part) => self.dir.join(name_of(part)).to_string_lossy().into_owned(),
                None => {
                    let to = self.dir.join(free_name(&name_of(part), &mut taken)).to_string_lossy().into_owned();
                    plan.files.push(FileStep {
                        from: part.real.to_string_lossy().into_owned(),
                        to: to.clone(),
                        copy: part.copy,
                        device: found.dev(),
                        inode: found.ino(),
                    });
                    if part.copy || found.dev() != device {
                        plan.copy_bytes += size;
                    }
                    to
                }
            };
            if !placed.contains_key(part.real.as_path()) {
                plan.bytes += size;
            }
            placed.insert(&part.real, to.clone());
            if to != part.named {
                self.change.paths.insert(part.named.clone(), to);
            }
        }
        for header in &mut plan.headers {
            let to = |named: &str| self.change.paths.get(named).map_or(named, String::as_str).to_owned();
            header.file = to(&header.file);
            let below = to(&header.after);
            header.after = below.rsplit('/').next().unwrap_or(&below).to_owned();
            if header.after.contains(':') {
                // QEMU takes what stands before a colon for a protocol, but not behind a slash.
                header.after.insert_str(0, "./");
            }
        }
        plan.headers.retain(|header| header.before != header.after);
        let room = statvfs(ground).during("look at", ground)?;
        let free = room.f_bavail.saturating_mul(room.f_frsize);
        if free < plan.copy_bytes.saturating_add(SPARE_BYTES) {
            self.no.push(format!(
                "{} has {} MiB free, {} MiB are needed: make room, or choose another --dir",
                ground.display(),
                free >> 20,
                (plan.copy_bytes + SPARE_BYTES) >> 20
            ));
        }
        Ok(())
    }
}

/// The name, or one with a number before its ending where it is taken.
fn free_name(name: &str, taken: &mut BTreeSet<String>) -> String {
    let (stem, ending) =
        name.rsplit_once('.').filter(|(stem, _)| !stem.is_empty()).map_or((name, None), |(s, e)| (s, Some(e)));
    let numbered = |n: u32| match ending {
        Some(ending) => format!("{stem}-{n}.{ending}"),
        None => format!("{stem}-{n}"),
    };
    let free = std::iter::once(name.to_owned()).chain((2..).map(numbered)).find(|n| !taken.contains(n));
    let free = free.expect("of endless names one is free");
    taken.insert(free.clone());
    free
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_files_of_one_name_get_two_names() {
        let mut taken = BTreeSet::new();
        let names: Vec<_> = ["a.img", "a.img", "a.img", "x", "x", ".h"].map(|n| free_name(n, &mut taken)).into();
        assert_eq!(names, ["a.img", "a-2.img", "a-3.img", "x", "x-2", ".h"]);
    }
}
