//! The plain directory's second place: it is bound at /run/vmtwin/backing/NAME, for root and for recovery:
//! the way to the files while they are covered. It is private, or the front end's mount would appear in it, too.
use rustix::fs::Mode;
use rustix::mount::{MountPropagationFlags, UnmountFlags};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// What is wrong with a mount.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// The kernel's words.
    #[error("cannot {what} {path}")]
    Failed {
        /// Bind, unmount, ...
        what: &'static str,
        /// Where.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// The plain directory's second place.
#[derive(Debug)]
pub struct Backing {
    path: PathBuf,
}

impl Backing {
    /// Binds `directory` at `path`, for root only. What a killed predecessor left there goes first.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn bind(directory: &Path, path: &Path) -> Result<Self, MountError> {
        let failed = |what, source: io::Error| MountError::Failed { what, path: path.to_owned(), source };
        std::fs::create_dir_all(path).map_err(|e| failed("make", e))?;
        if let Some(parent) = path.parent() {
            rustix::fs::chmod(parent, Mode::RWXU).map_err(|e| failed("protect", e.into()))?;
        }
        while is_mounted(path).map_err(|e| failed("look at", e))? {
            rustix::mount::unmount(path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW)
                .map_err(|e| failed("unmount", e.into()))?;
        }
        rustix::mount::mount_bind(directory, path).map_err(|e| failed("bind", e.into()))?;
        let backing = Self { path: path.to_owned() };
        rustix::mount::mount_change(path, MountPropagationFlags::PRIVATE)
            .map_err(|e| failed("make private", e.into()))?;
        Ok(backing)
    }
}

impl Drop for Backing {
    fn drop(&mut self) {
        // Lazily: a shell that stands in it must not keep the module from ending.
        if rustix::mount::unmount(&self.path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW).is_ok() {
            let _ = std::fs::remove_dir(&self.path);
        }
    }
}

/// Whether something is mounted exactly here.
fn is_mounted(path: &Path) -> io::Result<bool> {
    let table = std::fs::read("/proc/self/mountinfo")?;
    let wanted = real_place(path)?;
    let places = table.split(|b| *b == b'\n').filter_map(|line| line.split(|b| *b == b' ').nth(4));
    Ok(places.map(unescape).any(|place| place == wanted.as_os_str().as_bytes()))
}

/// The path with the links in its folder resolved, without touching the last part.
fn real_place(path: &Path) -> io::Result<PathBuf> {
    match (path.parent(), path.file_name()) {
        (Some(folder), Some(name)) => Ok(std::fs::canonicalize(folder)?.join(name)),
        _ => Ok(path.to_owned()),
    }
}

/// Spaces and their like are octal in the kernel's table.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((first, tail)) = rest.split_first() {
        let octal = tail.get(..3).filter(|_| *first == b'\\');
        let value = octal.and_then(|o| u8::from_str_radix(std::str::from_utf8(o).ok()?, 8).ok());
        out.push(value.unwrap_or(*first));
        rest = if value.is_some() { &tail[3..] } else { tail };
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_way_to_write_a_space_is_read() {
        assert_eq!(unescape(br"/a\040b\134c"), br"/a b\c");
    }

    #[test]
    fn the_backing_directory_shows_the_files_and_is_gone_after() {
        let folder = tempfile::tempdir().unwrap();
        let (directory, place) = (folder.path().join("dir"), folder.path().join("run/backing"));
        std::fs::create_dir(&directory).unwrap();
        std::fs::write(directory.join("x"), b"1").unwrap();
        let left = Backing::bind(&directory, &place).unwrap();
        std::mem::forget(left); // as a killed process leaves it
        let backing = Backing::bind(&directory, &place).unwrap();
        assert_eq!(std::fs::read(place.join("x")).unwrap(), b"1");
        assert!(is_mounted(&place).unwrap());
        drop(backing);
        assert!(!place.exists());
    }
}
