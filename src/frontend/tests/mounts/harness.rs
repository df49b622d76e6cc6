//! A mount in a mount namespace of the test's own thread: however the test ends, nothing of it stays on the host.
pub use crate::lives::Random;
use crate::server::{Config, Server};
use rustix::mount::{MountPropagationFlags, mount_change};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use rustix::thread::{UnshareFlags, unshare_unsafe};
use std::io::Write;
use std::path::PathBuf;
use std::time::{Duration, Instant};
use tempfile::TempDir;
use vmtwin_frontend::fuse;

/// Far longer than anything here takes.
pub const LIMIT: Duration = Duration::from_secs(120);

/// A served mount `at` over the plain directory `back`, and an empty plain directory `model`.
pub struct World {
    pub back: PathBuf,
    pub at: PathBuf,
    pub model: PathBuf,
    /// Taken away to end it early.
    pub server: Option<Server>,
    _folder: TempDir,
}

/// `None` where this machine lets nobody mount FUSE: the test then says so and passes, unless
/// VMTWIN_TESTS_MUST_MOUNT is set.
pub fn world(config: Config) -> Option<World> {
    let mut world = unserved()?;
    world.server = Some(Server::start(&world.back, &world.at, config));
    Some(world)
}

/// The directories, nothing mounted yet.
pub fn unserved() -> Option<World> {
    if let Err(why) = prepare() {
        assert!(std::env::var_os("VMTWIN_TESTS_MUST_MOUNT").is_none(), "cannot mount here: {why}");
        // Not by eprintln!, which the test runner swallows.
        let _ = writeln!(std::io::stderr(), "SKIPPED: cannot mount here: {why}");
        return None;
    }
    // Where other users can get to, too.
    let folder = tempfile::Builder::new().prefix("vmtwin-").tempdir_in("/tmp").unwrap();
    let [back, at, model] = ["back", "at", "model"].map(|name| folder.path().join(name));
    for path in [&back, &at, &model] {
        std::fs::create_dir(path).unwrap();
    }
    Some(World { back, at, model, server: None, _folder: folder })
}

fn prepare() -> Result<(), String> {
    std::fs::OpenOptions::new().read(true).write(true).open("/dev/fuse").map_err(|e| format!("/dev/fuse: {e}"))?;
    // SAFETY: NEWNS gives this thread its own mounts and working directory; descriptors stay shared.
    unsafe { unshare_unsafe(UnshareFlags::NEWNS) }.map_err(|e| format!("a mount namespace: {e}"))?;
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC).map_err(|e| format!("/: {e}"))?;
    // The server holds a descriptor for each file that it knows.
    let hard = getrlimit(Resource::Nofile).maximum;
    let wanted = hard.map_or(16_384, |max| max.min(16_384));
    setrlimit(Resource::Nofile, Rlimit { current: Some(wanted), maximum: hard }).map_err(|e| format!("limits: {e}"))
}

impl World {
    pub fn server(&self) -> &Server {
        self.server.as_ref().expect("a served world")
    }
}

impl Drop for World {
    fn drop(&mut self) {
        drop(self.server.take());
        while fuse::standing(&self.at).is_ok_and(|n| n > 0) && fuse::detach(&self.at).is_ok() {}
        while fuse::standing(&self.back).is_ok_and(|n| n > 0) && fuse::detach(&self.back).is_ok() {}
    }
}

/// Looks again and again until it is so.
pub fn until(what: &str, mut so: impl FnMut() -> bool) {
    let end = Instant::now() + LIMIT;
    while !so() {
        assert!(Instant::now() < end, "{what}: not within {LIMIT:?}");
        std::thread::sleep(Duration::from_millis(2));
    }
}
