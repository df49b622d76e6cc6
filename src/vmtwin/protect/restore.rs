//! `unprotect`: the VM out of vmtwin's hands, on its node; and on its peer, where nothing is ever deleted.
use super::gather::{MARKS, if_defined};
use super::plan::{FileStep, HeaderStep, Kind};
use super::{During, Host, METADATA, ORIGIN_XML, Plan, ProtectError, files};
use crate::protect::chain::Images;
use roxmltree::Document;
use rustix::fs::{lremovexattr, statvfs};
use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use vmtwin_core::ids::ModuleName;
use vmtwin_hypervisor::VmState;
use vmtwin_hypervisor::domain::{self, Change, METADATA_URI, Module};

/// What became of the peer's side.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unprotected {
    /// Where its directory lies now; none where it had none.
    pub dir: Option<PathBuf>,
    /// Its definition was removed.
    pub undefined: bool,
}

/// origin.xml: what the VM was before, and where each file came from.
pub(super) fn origin(module: &ModuleName, plan: &Plan) -> String {
    let mut text = format!(
        "<vmtwin:origin xmlns:vmtwin=\"{METADATA_URI}\" module=\"{module}\" autostart=\"{}\">\n",
        plan.autostart
    );
    for (from, to) in &plan.paths {
        text += &format!("  <vmtwin:path from=\"{}\" to=\"{}\"/>\n", escape(from), escape(to));
    }
    for step in &plan.files {
        let (from, to) = (escape(&step.from), escape(&step.to));
        text += &format!("  <vmtwin:file from=\"{from}\" to=\"{to}\" copy=\"{}\"/>\n", step.copy);
    }
    for header in &plan.headers {
        let (file, format) = (escape(&header.file), escape(&header.format));
        let (before, after) = (escape(&header.before), escape(&header.after));
        let backing = escape(&header.backing_format);
        text += &format!(
            "  <vmtwin:header file=\"{file}\" format=\"{format}\" backing=\"{backing}\" before=\"{before}\" after=\"{after}\"/>\n"
        );
    }
    // libvirt's own output has no XML declaration; an admin's file may.
    let domain = plan.before.find("<domain").map_or("", |start| &plan.before[start..]);
    text + domain.trim_end() + "\n</vmtwin:origin>\n"
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('"', "&quot;")
}

#[derive(Debug, Default)]
struct Origin {
    autostart: bool,
    paths: BTreeMap<String, String>,
    files: Vec<(String, String, bool)>,
    headers: Vec<HeaderStep>,
}

fn read_origin(dir: &Path) -> Result<Origin, ProtectError> {
    let path = dir.join(METADATA).join(ORIGIN_XML);
    let wrong = |what: &str| io::Error::other(what.to_owned());
    let found = path.metadata().during("find", &path)?;
    if found.len() > 2 * domain::XML_BYTES_MAX as u64 {
        return Err(wrong("it is too large")).during("read", &path);
    }
    let text = fs::read_to_string(&path).during("read", &path)?;
    let document = Document::parse(&text).map_err(io::Error::other).during("understand", &path)?;
    let root = document.root_element();
    if !root.has_tag_name((METADATA_URI, "origin")) {
        return Err(wrong("it is no origin.xml")).during("understand", &path);
    }
    let mut origin = Origin { autostart: root.attribute("autostart") == Some("true"), ..Origin::default() };
    for node in root.children().filter(|n| n.tag_name().namespace() == Some(METADATA_URI)) {
        let text = |name: &str| {
            let value = node.attribute(name).map(str::to_owned);
            value.ok_or_else(|| wrong(&format!("an attribute {name} is missing"))).during("understand", &path)
        };
        match node.tag_name().name() {
            "path" => drop(origin.paths.insert(text("from")?, text("to")?)),
            "file" => origin.files.push((text("from")?, text("to")?, text("copy")? == "true")),
            "header" => origin.headers.push(HeaderStep {
                file: text("file")?,
                format: text("format")?,
                backing_format: text("backing")?,
                before: text("before")?,
                after: text("after")?,
            }),
            _ => {}
        }
    }
    Ok(origin)
}

/// Works out how the VM leaves vmtwin: its definition without our mark, and with `layout` its files back where they came
/// from. The module must be in STOP (its directory plain). Touches nothing; `gather` carries it out, `commit` ends it.
///
/// # Errors
/// `Refused` with one sentence for each reason; or what kept it from looking.
pub fn plan_restore(
    vm: &str,
    dir: &Path,
    layout: bool,
    host: &dyn Host,
    images: &dyn Images,
) -> Result<Plan, ProtectError> {
    let facts = host.facts()?;
    if facts.state != VmState::Off {
        return Err(ProtectError::refused(format!("VM {vm} is running: vmtwin stop {vm} first")));
    }
    let before = host.definition()?;
    let domain = domain::read(&before)?;
    let origin = read_origin(dir)?;
    let mut no = Vec::new();
    let mut plan = Plan {
        kind: Kind::Unprotect,
        vm: vm.to_owned(),
        uuid: domain.uuid,
        dir: dir.to_owned(),
        dir_existed: true,
        before,
        after: String::new(),
        autostart: origin.autostart,
        files: Vec::new(),
        headers: Vec::new(),
        paths: BTreeMap::new(),
        notes: Vec::new(),
        copy_bytes: 0,
        bytes: 0,
        spare: Vec::new(),
    };
    if layout {
        back_to_origin(&origin, images, &mut plan, &mut no)?;
    }
    if !no.is_empty() {
        return Err(ProtectError::Refused(no));
    }
    let change = Change { paths: plan.paths.clone(), module: Module::Remove, ..Change::default() };
    plan.after = domain::rewrite(&plan.before, &change)?;
    Ok(plan)
}

fn back_to_origin(
    origin: &Origin,
    images: &dyn Images,
    plan: &mut Plan,
    no: &mut Vec<String>,
) -> Result<(), ProtectError> {
    let mut leaves = BTreeMap::new();
    for (from, to, copy) in &origin.files {
        let (old, now) = (Path::new(from), Path::new(to));
        if *copy {
            // The original stayed where it was; on the other node, or after an upgrade, it is another one.
            if old.is_file() && now.is_file() && files::same_content(old, now, &mut |_| {})? {
                leaves.insert(to.clone(), from.clone());
                plan.spare.push(now.to_owned());
            } else {
                plan.notes.push(format!("{from} is not what it was: {to} stays in use"));
            }
            continue;
        }
        let Ok(found) = now.symlink_metadata() else {
            plan.notes.push(format!("{to} is not there any more"));
            continue;
        };
        let folder = old.parent().unwrap_or(Path::new("/"));
        if old.symlink_metadata().is_ok() {
            no.push(format!(
                "{from} exists: move it away, or leave the files where they are (without --restore-layout)"
            ));
            continue;
        }
        let Ok(ground) = folder.metadata() else {
            no.push(format!("{} does not exist any more: make it, or leave out --restore-layout", folder.display()));
            continue;
        };
        if ground.dev() != found.dev() {
            let room = statvfs(folder).during("look at", folder)?;
            let size = files::allocated(now)?;
            plan.copy_bytes += size;
            if room.f_bavail.saturating_mul(room.f_frsize) < size {
                no.push(format!("{} has no room for {to} ({} MiB)", folder.display(), size >> 20));
            }
        }
        leaves.insert(to.clone(), from.clone());
        plan.files.push(FileStep {
            from: to.clone(),
            to: from.clone(),
            copy: false,
            device: found.dev(),
            inode: found.ino(),
        });
    }
    for (named, to) in &origin.paths {
        if leaves.contains_key(to) {
            plan.paths.insert(to.clone(), named.clone());
        }
    }
    for header in &origin.headers {
        // The admin may have changed the chain since: then its header is left alone.
        let now = images.info(Path::new(&header.file), &header.format).ok().and_then(|info| info.backing);
        if let (Some(file), true) = (leaves.get(&header.file), now.is_some_and(|b| b.name == header.after)) {
            plan.headers.push(HeaderStep {
                file: file.clone(),
                before: header.after.clone(),
                after: header.before.clone(),
                ..header.clone()
            });
        }
    }
    Ok(())
}

/// `plan_restore`, `gather` and `commit` in one, with what to tell the operator.
///
/// # Errors
/// As theirs.
#[allow(clippy::too_many_arguments, reason = "each is a border of its own")]
pub fn restore(
    paths: &crate::config::Paths,
    module: &ModuleName,
    vm: &str,
    dir: &Path,
    layout: bool,
    host: &dyn Host,
    images: &dyn Images,
    tell: &mut super::Tell<'_>,
) -> Result<Vec<String>, ProtectError> {
    let plan = match super::pending(paths, module)? {
        Some(pending) if pending.plan.kind == Kind::Unprotect => pending.plan,
        Some(_) => return Err(ProtectError::refused(format!("`vmtwin protect` of VM {vm} is not finished"))),
        None => plan_restore(vm, dir, layout, host, images)?,
    };
    super::gather(paths, module, &plan, host, images, tell)?;
    super::commit(paths, module)?;
    Ok(plan.notes)
}

/// Takes vmtwin's own metadata out of a directory; its files stay.
pub(super) fn remove_marks(dir: &Path) -> Result<(), ProtectError> {
    for mark in MARKS {
        let path = dir.join(mark);
        match fs::remove_dir_all(&path) {
            Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => Ok(()),
            removed => removed.during("remove", &path),
        }?;
    }
    let Ok(entries) = fs::read_dir(dir) else { return Ok(()) };
    for entry in entries.flatten() {
        // A file without one, or a file system that has none: nothing to remove.
        let _ = lremovexattr(entry.path(), "trusted.vmtwin.id");
    }
    let _ = lremovexattr(dir, "trusted.vmtwin.id");
    files::sync_folder(&dir.join(METADATA))
}

/// On the peer: the VM is not known there any more, its NVRAM and TPM kept; its directory is renamed to
/// `DIR.unprotected-DATE`, never deleted. The module must be in STOP there.
///
/// # Errors
/// Where the VM runs there, or a call fails; it can be called again.
pub fn retire_peer(vm: &str, dir: &Path, date: &str, host: &dyn Host) -> Result<Unprotected, ProtectError> {
    let state = host.state()?;
    if matches!(state, VmState::Running | VmState::Paused) {
        return Err(ProtectError::refused(format!("VM {vm} runs on the peer: vmtwin stop {vm} first")));
    }
    // One of the same name that is not ours stays.
    let ours =
        if_defined(host.definition())?.and_then(|xml| domain::read(&xml).ok()).is_some_and(|d| d.module.is_some());
    if ours {
        host.undefine()?;
    }
    let mut retired = Unprotected { dir: None, undefined: ours };
    if dir.is_dir() {
        let name = |n: u32| {
            let ending = if n == 1 { String::new() } else { format!("-{n}") };
            PathBuf::from(format!("{}.unprotected-{date}{ending}", dir.display()))
        };
        let free = (1..).map(name).find(|path| path.symlink_metadata().is_err()).expect("of endless names one is free");
        fs::rename(dir, &free).during("rename", dir)?;
        files::sync_folder(dir)?;
        retired.dir = Some(free);
    }
    Ok(retired)
}
