//! A plan carried out, or taken back. Every step looks at what is there and does what is missing, so a run that was cut
//! anywhere is finished, or taken back, by running again.
use super::chain::Images;
use super::journal::{self, Phase};
use super::plan::Kind;
use super::{
    DOMAIN_XML, During, Host, METADATA, METADATA_LOCAL, ORIGIN_XML, Plan, Progress, ProtectError, Tell, files, restore,
};
use crate::config::{Paths, durable};
use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;
use vmtwin_core::ids::ModuleName;
use vmtwin_hypervisor::{VmError, VmState};

/// Carries out a plan of [`preflight`](super::preflight) or [`plan_restore`](super::plan_restore), or goes on with one that
/// was interrupted. Afterwards its journal stands, until `commit` or `undo`. Where a step fails all is put back.
///
/// # Errors
/// `PutBack` where all is as it was; `HalfWay` where that failed, too.
pub fn gather(
    paths: &Paths,
    module: &ModuleName,
    plan: &Plan,
    host: &dyn Host,
    images: &dyn Images,
    tell: &mut Tell<'_>,
) -> Result<(), ProtectError> {
    let mut work = Work { paths, module, plan, host, images, tell };
    work.vm_is_off()?;
    work.say("journal", &plan.dir);
    journal::store(paths, module, plan, Phase::Forward)?;
    work.forward().map_err(|cause| match work.back() {
        Ok(()) => ProtectError::PutBack { cause: Box::new(cause) },
        Err(back) => ProtectError::HalfWay {
            cause: Box::new(cause),
            back: Box::new(back),
            journal: journal::path(paths, module),
        },
    })
}

/// What was gathered stands: the journal goes. For `unprotect`, vmtwin's own metadata goes from the directory, too.
///
/// # Errors
/// Where a file cannot be removed; it can be called again.
pub fn commit(paths: &Paths, module: &ModuleName) -> Result<(), ProtectError> {
    if let Some(pending) = journal::pending(paths, module)? {
        if pending.phase != Phase::Done {
            let early = "the gathering was not finished";
            return Err(io::Error::other(early)).during("commit", &journal::path(paths, module));
        }
        if pending.plan.kind == Kind::Unprotect {
            for copy in &pending.plan.spare {
                files::remove(copy)?;
            }
            restore::remove_marks(&pending.plan.dir)?;
            if !pending.plan.files.is_empty() {
                remove_folder(&pending.plan.dir)?;
            }
        }
        journal::remove(paths, module)?;
    }
    Ok(())
}

/// Takes back what the module's journal says. Without a journal there is nothing to take back.
///
/// # Errors
/// Where it cannot; it can be called again.
pub fn undo(
    paths: &Paths,
    module: &ModuleName,
    host: &dyn Host,
    images: &dyn Images,
    tell: &mut Tell<'_>,
) -> Result<(), ProtectError> {
    match journal::pending(paths, module)? {
        None => Ok(()),
        Some(pending) => Work { paths, module, plan: &pending.plan, host, images, tell }.back(),
    }
}

struct Work<'a, 't> {
    paths: &'a Paths,
    module: &'a ModuleName,
    plan: &'a Plan,
    host: &'a dyn Host,
    images: &'a dyn Images,
    tell: &'a mut Tell<'t>,
}

impl Work<'_, '_> {
    fn say(&mut self, step: &'static str, path: &Path) {
        (self.tell)(&Progress { step, path, bytes_done: 0, bytes_total: 0 });
    }

    /// Nothing is moved under a VM that runs: somebody may have started it meanwhile.
    fn vm_is_off(&self) -> Result<(), ProtectError> {
        match self.host.state()? {
            VmState::Off | VmState::Undefined => Ok(()),
            VmState::Running | VmState::Paused => {
                Err(ProtectError::refused(format!("VM {} was started meanwhile: shut it down", self.plan.vm)))
            }
        }
    }

    fn forward(&mut self) -> Result<(), ProtectError> {
        let plan = self.plan;
        if plan.kind == Kind::Protect {
            self.say("make", &plan.dir);
            make_folder(&plan.dir, 0o711)?;
            make_folder(&plan.dir.join(METADATA), 0o700)?;
            if plan.autostart {
                self.host.set_autostart(false)?;
            }
        }
        for step in &plan.files {
            self.say("file", Path::new(&step.from));
            self.vm_is_off()?;
            files::forward(step, self.tell)?;
        }
        for header in &plan.headers {
            self.header(&header.file, &header.format, &header.after, &header.backing_format)?;
        }
        let metadata = plan.dir.join(METADATA);
        if plan.kind == Kind::Protect {
            self.say("write", &metadata.join(ORIGIN_XML));
            write(&metadata.join(ORIGIN_XML), &restore::origin(self.module, plan))?;
        }
        self.say("define", &plan.dir);
        self.vm_is_off()?;
        self.host.define(&plan.after)?;
        match plan.kind {
            // As libvirt gives it back: complete, and in the form that the peer's libvirt will take.
            Kind::Protect => {
                let definition = self.host.definition()?;
                self.say("write", &metadata.join(DOMAIN_XML));
                write(&metadata.join(DOMAIN_XML), &definition)?;
            }
            Kind::Unprotect => self.host.set_autostart(plan.autostart)?,
        }
        self.say("journal", &plan.dir);
        journal::store(self.paths, self.module, plan, Phase::Done)
    }

    fn back(&mut self) -> Result<(), ProtectError> {
        let plan = self.plan;
        self.say("journal", &plan.dir);
        self.vm_is_off()?;
        journal::store(self.paths, self.module, plan, Phase::Back)?;
        self.say("define", &plan.dir);
        self.host.define(&plan.before)?;
        for header in plan.headers.iter().rev().filter(|header| Path::new(&header.file).exists()) {
            self.header(&header.file, &header.format, &header.before, &header.backing_format)?;
        }
        for step in plan.files.iter().rev() {
            self.say("file", Path::new(&step.to));
            self.vm_is_off()?;
            files::back(step, self.tell)?;
        }
        match plan.kind {
            Kind::Protect => {
                self.say("remove", &plan.dir);
                restore::remove_marks(&plan.dir)?;
                if !plan.dir_existed {
                    remove_folder(&plan.dir)?;
                }
                if plan.autostart {
                    self.host.set_autostart(true)?;
                }
            }
            Kind::Unprotect => self.host.set_autostart(false)?,
        }
        self.say("journal", &plan.dir);
        journal::remove(self.paths, self.module)
    }

    /// Lets a header name this layer, durably.
    fn header(&mut self, file: &str, format: &str, name: &str, backing_format: &str) -> Result<(), ProtectError> {
        let path = Path::new(file);
        self.say("header", path);
        let now = self.images.info(path, format).during("read the header of", path)?;
        if now.backing.is_some_and(|backing| backing.name == name) {
            return Ok(());
        }
        self.images.rename_backing(path, format, name, backing_format).during("rewrite the header of", path)?;
        File::open(path).and_then(|f| f.sync_all()).during("flush", path)
    }
}

fn write(path: &Path, text: &str) -> Result<(), ProtectError> {
    durable::write(path, text.as_bytes(), 0o600).during("write", path)
}

fn make_folder(path: &Path, mode: u32) -> Result<(), ProtectError> {
    match DirBuilder::new().mode(mode).create(path) {
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists && path.is_dir() => Ok(()),
        made => made.during("make", path),
    }?;
    files::sync_folder(path)
}

fn remove_folder(path: &Path) -> Result<(), ProtectError> {
    match fs::remove_dir(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        // Somebody put something there meanwhile: it is not ours to remove.
        Err(e) if matches!(e.kind(), io::ErrorKind::DirectoryNotEmpty | io::ErrorKind::NotADirectory) => Ok(()),
        removed => removed.during("remove", path),
    }?;
    files::sync_folder(path)
}

/// Turns an error for a VM that is not there into none.
pub(super) fn if_defined<T>(result: Result<T, VmError>) -> Result<Option<T>, VmError> {
    match result {
        Err(VmError::Undefined { .. }) => Ok(None),
        other => other.map(Some),
    }
}

/// The folders of vmtwin's own metadata.
pub(super) const MARKS: [&str; 2] = [METADATA, METADATA_LOCAL];
