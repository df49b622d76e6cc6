//! `keep` and the module processes: started, watched, started again; found again by their locked pid files.
//!
//! Wanted ─spawned or found─> running ─exit 0─> not wanted;  ─any other end─> running again;  ─third death in ten
//! minutes─> down, red, until `start`.
//! How a process ended is told by the file that it writes last, so it matters not whose child it was.
use crate::config::{Paths, durable};
use crate::{host, pidfile};
use rustix::event::{PollFd, PollFlags, poll};
use std::collections::{BTreeMap, VecDeque};
use std::fs::OpenOptions;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio::process::Command;
use tokio::task::JoinHandle;
use vmtwin_core::ids::ModuleName;

const DEATHS_MAX: usize = 3;
const DEATHS_SPAN: Duration = Duration::from_secs(600);
const AGAIN: Duration = Duration::from_millis(200);
const OUTPUT_BYTES_MAX: u64 = 4 << 20;

/// How a module process ended, as it says itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// The module was stopped: on order, or its guest powered off.
    Stopped,
    /// SIGTERM: orderly.
    Terminated,
    /// It failed and says so.
    Code(u8),
    /// It said nothing: killed, or a failed assertion.
    Died,
}

/// Where a module process writes its exit code as its last act.
#[must_use]
pub fn exit_file(paths: &Paths, module: &ModuleName) -> PathBuf {
    paths.run.join(format!("{module}.exit"))
}

/// The module processes of this node.
#[derive(Debug)]
pub struct Modules {
    paths: Paths,
    /// Guards the map only; never held over a wait.
    entries: Mutex<BTreeMap<ModuleName, Entry>>,
}

#[derive(Debug, Default)]
struct Entry {
    watcher: Option<JoinHandle<()>>,
    /// Why it stays down.
    down: Option<String>,
    deaths: VecDeque<Instant>,
}

/// What the daemon knows of a module process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Seen {
    /// Not wanted.
    Stopped,
    /// Wanted; its process is on its way.
    Starting,
    /// There is one.
    Running(u32),
    /// It stays down; why.
    Down(String),
}

impl Modules {
    /// None is watched yet.
    #[must_use]
    pub fn new(paths: Paths) -> Self {
        Self { paths, entries: Mutex::default() }
    }

    /// Starts, or finds again, all that are wanted: after a boot, or a restart of the daemon.
    pub fn start_wanted(self: Arc<Self>) {
        for module in self.paths.list_modules().unwrap_or_default() {
            let runs = matches!(pidfile::find(&self.paths.module_pid(&module)), Ok(Some(_)));
            // It was stopped while no daemon was there to see it. (After a boot there is no such file.)
            if !runs && read_end(&exit_file(&self.paths, &module)) == End::Stopped {
                if let Err(e) = self.unwant(&module) {
                    host::warn(&format!("module {module}: {e}"));
                }
                continue;
            }
            if runs || self.paths.wanted(&module).exists() {
                self.clone().watch(&module);
            }
        }
    }

    /// Marks it as wanted and starts its process. False: one is running already.
    ///
    /// # Errors
    /// Where the mark cannot be written.
    pub fn start(self: Arc<Self>, module: &ModuleName) -> io::Result<bool> {
        let wanted = self.paths.wanted(module);
        std::fs::create_dir_all(self.paths.module_lib(module))?;
        if !matches!(pidfile::find(&self.paths.module_pid(module)), Ok(Some(_))) {
            // The end of an older process says nothing about the one that is wanted now.
            remove_if_there(&exit_file(&self.paths, module))?;
        }
        durable::write(&wanted, b"", 0o600)?;
        Ok(self.watch(module))
    }

    /// Not wanted any more: a process that runs is let be, and not started again after its end.
    ///
    /// # Errors
    /// Where the mark cannot be removed.
    pub fn unwant(&self, module: &ModuleName) -> io::Result<()> {
        self.entries.lock().expect("nothing panics under it").entry(module.clone()).or_default().down = None;
        durable::remove(&self.paths.wanted(module))
    }

    /// Forgets a module that was unprotected.
    pub fn forget(&self, module: &ModuleName) {
        self.entries.lock().expect("nothing panics under it").remove(module);
        let _ = std::fs::remove_file(self.paths.module_pid(module));
        let _ = std::fs::remove_file(exit_file(&self.paths, module));
    }

    /// What is known of it.
    #[must_use]
    pub fn see(&self, module: &ModuleName) -> Seen {
        if let Ok(Some(found)) = pidfile::find(&self.paths.module_pid(module)) {
            return Seen::Running(found.pid);
        }
        let entries = self.entries.lock().expect("nothing panics under it");
        match entries.get(module) {
            Some(Entry { down: Some(why), .. }) => Seen::Down(why.clone()),
            Some(Entry { watcher: Some(watcher), .. }) if !watcher.is_finished() => Seen::Starting,
            _ => Seen::Stopped,
        }
    }

    fn watch(self: Arc<Self>, module: &ModuleName) -> bool {
        let mut entries = self.entries.lock().expect("nothing panics under it");
        let entry = entries.entry(module.clone()).or_default();
        if entry.watcher.as_ref().is_some_and(|w| !w.is_finished()) {
            return false;
        }
        *entry = Entry::default();
        let (this, module) = (self.clone(), module.clone());
        entry.watcher = Some(tokio::spawn(async move { this.mind(&module).await }));
        true
    }

    /// One module's life.
    async fn mind(&self, module: &ModuleName) {
        let exit = exit_file(&self.paths, module);
        loop {
            if let Err(e) = self.run_once(module, &exit).await {
                host::warn(&format!("module {module}: its process cannot be started: {e}"));
            }
            match read_end(&exit) {
                End::Stopped => {
                    host::info(&format!("module {module} has stopped"));
                    if let Err(e) = durable::remove(&self.paths.wanted(module)) {
                        host::warn(&format!("module {module}: {e}"));
                    }
                    return;
                }
                _ if !self.paths.wanted(module).exists() => return,
                End::Terminated => host::info(&format!("module {module}: its process was asked to end")),
                end @ (End::Code(_) | End::Died) => {
                    let how = if let End::Code(code) = end { format!("ended with code {code}") } else { "died".into() };
                    host::warn(&format!("module {module}: its process {how}"));
                    if self.count_death(module, &how) {
                        return;
                    }
                }
            }
            tokio::time::sleep(AGAIN).await;
        }
    }

    /// True: that was one too many.
    fn count_death(&self, module: &ModuleName, how: &str) -> bool {
        let mut entries = self.entries.lock().expect("nothing panics under it");
        let entry = entries.entry(module.clone()).or_default();
        let now = Instant::now();
        entry.deaths.push_back(now);
        entry.deaths.retain(|at| now.duration_since(*at) < DEATHS_SPAN);
        if entry.deaths.len() < DEATHS_MAX {
            return false;
        }
        let output = self.paths.log.join(format!("{module}.stderr"));
        entry.down = Some(format!(
            "its process ended {DEATHS_MAX} times within ten minutes (the last one {how}) and stays down: `vmtwin log {module}` and {} tell why; `vmtwin start {module}` tries again",
            output.display()
        ));
        true
    }

    async fn run_once(&self, module: &ModuleName, exit: &Path) -> io::Result<()> {
        if let Some(found) = pidfile::find(&self.paths.module_pid(module))? {
            host::info(&format!("module {module}: found its process {}", found.pid));
            return wait(found).await;
        }
        remove_if_there(exit)?;
        let output = self.paths.log.join(format!("{module}.stderr"));
        spawn(&self.paths, &["module", module.as_str()], &output)?.wait().await.map(|_| ())
    }
}

/// Starts `keep`, or finds it, for ever.
pub async fn mind_keep(paths: Paths) {
    let output = paths.log.join("keep.stderr");
    loop {
        let ended = match pidfile::find(&paths.keep_pid()) {
            Ok(Some(found)) => wait(found).await,
            Ok(None) => match spawn(&paths, &["keep"], &output) {
                Ok(mut child) => child.wait().await.map(|_| ()),
                Err(e) => Err(e),
            },
            Err(e) => Err(e),
        };
        let why = ended.map_or_else(|e| format!(": {e}"), |()| String::new());
        host::warn(&format!("keep has ended{why}: it is started again"));
        tokio::time::sleep(AGAIN).await;
    }
}

fn remove_if_there(file: &Path) -> io::Result<()> {
    match std::fs::remove_file(file) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

fn read_end(exit: &Path) -> End {
    match std::fs::read_to_string(exit).ok().and_then(|text| text.trim().parse().ok()) {
        Some(0) => End::Stopped,
        Some(143) => End::Terminated,
        Some(code) => End::Code(code),
        None => End::Died,
    }
}

/// On a thread of its own: there are few, and an end is to be seen at once.
async fn wait(found: pidfile::Found) -> io::Result<()> {
    let wait = move || {
        let mut ended = [PollFd::new(&found.pidfd, PollFlags::IN)];
        rustix::io::retry_on_intr(|| poll(&mut ended, None))
    };
    tokio::task::spawn_blocking(wait).await.map_err(io::Error::other)?.map(|_| ()).map_err(Into::into)
}

/// A process of this program that outlives the daemon: in a group of its own, its output in a file of bounded size (a
/// terminal or pipe that closes would make its next line fail).
fn spawn(paths: &Paths, arguments: &[&str], output: &Path) -> io::Result<tokio::process::Child> {
    if std::fs::metadata(output).is_ok_and(|m| m.len() > OUTPUT_BYTES_MAX) {
        let mut aside = output.as_os_str().to_owned();
        aside.push(".1");
        std::fs::rename(output, aside)?;
    }
    let output = OpenOptions::new().create(true).append(true).open(output)?;
    let mut command = Command::new(std::env::current_exe()?);
    if let Some(root) = paths.root() {
        command.arg("--root").arg(root);
    }
    command
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(output.try_clone()?)
        .stderr(output)
        .process_group(0)
        .kill_on_drop(false)
        .spawn()
}
