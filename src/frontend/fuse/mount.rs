//! Mounts over a directory, unmounts, and finds what a predecessor left behind.
//!
//! Keeps out: what lies under the mount; whoever needs that opened it before. Nothing here walks a path *into* a mount of
//! ours, except `life`, and that on a thread of its own.
use rustix::fs::{Mode, OFlags, open};
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags};
use std::ffi::{CString, OsString};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::Duration;
use std::{fs, io, thread};
use vmtwin_ring::Waker;

/// As the kernel, df and `PRUNEFS` see it.
const TYPE: &str = "fuse.vmtwin";
/// Dead mounts over one directory, at most; more come from a loop of ours.
const DEAD_MAX: usize = 64;

/// How to mount.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Shown as the mounted device: `vmtwin:NAME`.
    pub source: String,
    /// SELinux context of all files, where the host enforces SELinux.
    pub selinux_context: Option<String>,
    /// Lets the kernel ask for directories with attributes; worth it only where entries stay valid for a while.
    pub readdirplus: bool,
}

/// Why it is not mounted.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// No FUSE.
    #[error("cannot open /dev/fuse (is the kernel module fuse loaded?)")]
    Device(#[source] io::Error),
    /// mount(2) refused.
    #[error("cannot mount on {}", path.display())]
    Mount {
        /// Where.
        path: PathBuf,
        /// Its error.
        source: io::Error,
    },
    /// The kernel's first request did not come or was not understood.
    #[error("FUSE of this kernel does not answer as expected: {0}")]
    Handshake(&'static str),
    /// Too old.
    #[error("FUSE of this kernel speaks {major}.{minor}; vmtwin needs 7.36 (Linux 6.1) or newer")]
    TooOld {
        /// Its version.
        major: u32,
        /// Its version.
        minor: u32,
    },
}

/// Why it is still mounted.
#[derive(Debug, thiserror::Error)]
pub enum UnmountError {
    /// Files are open, or somebody's current directory is in it.
    #[error("{} is in use", .0.display())]
    Busy(PathBuf),
    /// Nothing of ours is mounted there.
    #[error("{} is not mounted", .0.display())]
    NotMounted(PathBuf),
    /// Somebody serves it.
    #[error("{} is served by another process", .0.display())]
    Served(PathBuf),
    /// Any other error.
    #[error("cannot unmount {}", path.display())]
    System {
        /// Where.
        path: PathBuf,
        /// Its error.
        source: io::Error,
    },
}

/// Opens a connection and mounts it. The kernel's INIT waits in the descriptor then.
pub(super) fn mount(path: &Path, options: &Options) -> Result<OwnedFd, MountError> {
    let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let device = open("/dev/fuse", flags, Mode::empty()).map_err(|e| MountError::Device(e.into()))?;
    let mut data =
        format!("fd={},rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions", device.as_raw_fd());
    if let Some(context) = &options.selinux_context {
        data.push_str(&format!(",context=\"{context}\""));
    }
    let fails = |source: io::Error| MountError::Mount { path: path.to_owned(), source };
    let data = CString::new(data).map_err(|e| fails(e.into()))?;
    let flags = MountFlags::NOSUID | MountFlags::NODEV;
    rustix::mount::mount(options.source.as_str(), path, TYPE, flags, data.as_c_str()).map_err(|e| fails(e.into()))?;
    Ok(device)
}

/// Unmounts; refused while it is in use. Where the caller is the thread that serves the mount: `unmount_aside`.
///
/// # Errors
/// `Busy`, `NotMounted`, `System`.
pub fn unmount(path: &Path) -> Result<(), UnmountError> {
    unmount_with(path, UnmountFlags::empty())
}

/// Takes a mount out of the tree at once; it ends when nobody uses it any more.
///
/// # Errors
/// `NotMounted`, `System`.
pub fn detach(path: &Path) -> Result<(), UnmountError> {
    unmount_with(path, UnmountFlags::DETACH)
}

/// `unmount` on a thread of its own: the kernel may want something of the server meanwhile. Wakes the ring when the
/// result is there.
#[must_use]
pub fn unmount_aside(path: &Path, waker: Waker) -> mpsc::Receiver<Result<(), UnmountError>> {
    let (tell, told) = mpsc::sync_channel(1);
    let path = path.to_owned();
    thread::spawn(move || {
        let _ = tell.send(unmount(&path));
        waker.wake();
    });
    told
}

fn unmount_with(path: &Path, flags: UnmountFlags) -> Result<(), UnmountError> {
    let standing = standing(path).map_err(|source| UnmountError::System { path: path.to_owned(), source })?;
    if standing == 0 {
        return Err(UnmountError::NotMounted(path.to_owned()));
    }
    rustix::mount::unmount(path, flags | UnmountFlags::NOFOLLOW).map_err(|e| match e {
        Errno::BUSY => UnmountError::Busy(path.to_owned()),
        e => UnmountError::System { path: path.to_owned(), source: e.into() },
    })
}

/// How many mounts of vmtwin's stand on exactly this directory, one over the other.
///
/// # Errors
/// /proc cannot be read, or the path has no parent that exists.
pub fn standing(path: &Path) -> io::Result<usize> {
    let full = full(path)?;
    let table = fs::read("/proc/thread-self/mountinfo")?;
    Ok(table.split(|&b| b == b'\n').filter_map(mount_point).filter(|point| *point == full).count())
}

/// Ends the uppermost connection on `path` from outside, whatever its server does: every request in its hands fails, and
/// a killed process that waits for one can die. The mount stays there, dead. False: nothing of ours is mounted there.
/// `place`: where the kernel's list of connections may be mounted for the moment, where the host has it not mounted.
///
/// # Errors
/// /proc cannot be read, or the kernel refuses.
pub fn abort(path: &Path, place: &Path) -> io::Result<bool> {
    let full = full(path)?;
    let table = fs::read("/proc/thread-self/mountinfo")?;
    let mut of_ours = table.split(|&b| b == b'\n').filter(|line| mount_point(line).is_some_and(|point| point == full));
    let Some(connection) = of_ours.next_back().and_then(connection) else { return Ok(false) };
    let usual = Path::new("/sys/fs/fuse/connections").join(&connection).join("abort");
    if usual.exists() {
        return fs::write(usual, "1").map(|()| true);
    }
    fs::create_dir_all(place)?;
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    match rustix::mount::mount("fusectl", place, "fusectl", flags, None) {
        // BUSY: left there by one that was killed in between.
        Ok(()) | Err(Errno::BUSY) => {}
        Err(e) => return Err(e.into()),
    }
    let told = fs::write(place.join(connection).join("abort"), "1");
    rustix::mount::unmount(place, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW)?;
    let _ = fs::remove_dir(place);
    told.map(|()| true)
}

/// The path with the links in its folder resolved. The path itself is not looked at: under a dead mount that fails, under
/// a stuck one it waits.
fn full(path: &Path) -> io::Result<PathBuf> {
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    let parent = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
    Ok(fs::canonicalize(parent)?.join(name))
}

/// Where a line of mountinfo says that one of ours is mounted.
fn mount_point(line: &[u8]) -> Option<PathBuf> {
    let mut words = line.split(|&b| b == b' ');
    let point = words.nth(4)?;
    let kind = words.skip_while(|w| *w != b"-").nth(1)?;
    (kind == TYPE.as_bytes()).then(|| PathBuf::from(unescaped(point)))
}

/// The kernel's number of the connection in a line of mountinfo: the minor number of its device.
fn connection(line: &[u8]) -> Option<String> {
    let device = std::str::from_utf8(line.split(|&b| b == b' ').nth(2)?).ok()?;
    let minor = device.split_once(':')?.1;
    (!minor.is_empty() && minor.bytes().all(|b| b.is_ascii_digit())).then(|| minor.to_owned())
}

/// Space, tab, newline and backslash stand as `\` and three octal digits.
fn unescaped(word: &[u8]) -> OsString {
    let mut out = Vec::with_capacity(word.len());
    let mut rest = word;
    while let Some((&first, tail)) = rest.split_first() {
        let digits = tail.get(..3).filter(|d| first == b'\\' && d.iter().all(|d| (b'0'..b'8').contains(d)));
        let (byte, after) = match digits {
            Some(d) => (d.iter().fold(0u8, |value, d| value.wrapping_mul(8).wrapping_add(d - b'0')), &tail[3..]),
            None => (first, tail),
        };
        out.push(byte);
        rest = after;
    }
    OsString::from_vec(out)
}

/// Whether somebody serves a mount.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Life {
    /// It answered.
    Serves,
    /// Its server has died ("Transport endpoint is not connected").
    Dead,
    /// No answer in time: its server hangs or holds requests.
    Silent,
}

/// Asks the uppermost mount on `path` for its figures, for at most `limit`. Never to be called by the thread that serves
/// it. Where it is silent a thread is left waiting.
///
/// # Errors
/// No thread.
pub fn life(path: &Path, limit: Duration) -> io::Result<Life> {
    let (tell, told) = mpsc::sync_channel(1);
    let asked = path.to_owned();
    thread::Builder::new().name("mount-life".into()).spawn(move || tell.send(rustix::fs::statfs(&asked).map(drop)))?;
    Ok(match told.recv_timeout(limit) {
        Ok(Err(Errno::NOTCONN | Errno::CONNABORTED)) => Life::Dead,
        Ok(_) => Life::Serves,
        Err(_) => Life::Silent,
    })
}

/// Takes dead mounts of ours off a directory; says how many there were.
///
/// # Errors
/// `Served` where the uppermost one is served, or silent for `limit`.
pub fn clear_dead(path: &Path, limit: Duration) -> Result<usize, UnmountError> {
    let system = |source| UnmountError::System { path: path.to_owned(), source };
    for cleared in 0..DEAD_MAX {
        if standing(path).map_err(system)? == 0 {
            return Ok(cleared);
        }
        match life(path, limit).map_err(system)? {
            Life::Dead => detach(path)?,
            Life::Serves | Life::Silent => return Err(UnmountError::Served(path.to_owned())),
        }
    }
    Err(UnmountError::Busy(path.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;

    #[test]
    fn mount_points_are_found_in_mountinfo_whatever_is_in_their_names() {
        let line = br"36 35 0:98 / /srv/my\040vm\134x rw,nosuid shared:7 master:1 - fuse.vmtwin vmtwin:db rw,user_id=0";
        assert_eq!(mount_point(line), Some(PathBuf::from(OsStr::from_bytes(br"/srv/my vm\x"))));
        assert_eq!(connection(line).as_deref(), Some("98"));
        let other = b"36 35 0:98 / /srv rw - ext4 /dev/sda rw";
        assert_eq!(mount_point(other), None);
        for cut in 0..line.len() {
            let _ = (mount_point(&line[..cut]), connection(&line[..cut]));
        }
    }

    #[test]
    fn nothing_stands_on_a_plain_directory() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(standing(folder.path()).unwrap(), 0);
        assert!(matches!(unmount(folder.path()), Err(UnmountError::NotMounted(_))));
        assert_eq!(clear_dead(folder.path(), Duration::from_secs(60)).unwrap(), 0);
    }
}
