//! Who this replica is, and how it was left.
//!
//! Decides, at each start, what PROTOCOL.md's marks say: *broken* where the host went down without a clean stop (the boot
//! id differs), *suspect* where the directory is not as the metadata left it. Holds: the state file's content.
//! Invariant: the id lies in the directory and beside the metadata; where they differ or one is missing, this is a new
//! replica that no record names, so it serves nothing until it was made equal.
//!
//! Both files: magic u32 · version u16 · module u128 · replica u128 · body · crc32c u32 of all before.
//! Body of `replica` (state): boot id u128 · u8 (1 broken, 2 erred, 4 suspects all) · boolean + record · boolean + list of
//! fingerprints (id u64, size u64, changed s i64, changed ns u32, inode u64). Body of the directory's file: none.
use super::metafiles::{MetaError, MetaFolder};
use super::{Scanned, Store};
use rustix::fs::{Mode, OFlags};
use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use vmtwin_core::ids::{BootId, FileId, ModuleId, ReplicaId};
use vmtwin_core::limits::FILES_MAX;
use vmtwin_core::record::Record;
use vmtwin_core::replica::effect::Marks;
use vmtwin_core::wire::codec::{DecodeError, Reader, Writer};

const STATE_MAGIC: u32 = u32::from_le_bytes(*b"vmTs");
const ID_MAGIC: u32 = u32::from_le_bytes(*b"vmTi");
const VERSION: u16 = 1;
const STATE_FILE: &str = "replica";
const ID_FILE: &str = "replica";

/// What tells whether a file was changed while the module was stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Fingerprint {
    /// Which file.
    pub id: FileId,
    /// Its size in bytes.
    pub size: u64,
    /// Its last change, seconds and nanoseconds.
    pub changed: (i64, u32),
    /// The local file system's inode number.
    pub inode: u64,
}

/// Content of the state file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct State {
    /// Whose.
    pub module: ModuleId,
    /// Which replica.
    pub replica: ReplicaId,
    /// The boot in which it was written.
    pub boot: BootId,
    /// Durable marks.
    pub marks: Marks,
    /// The newest record that was known here.
    pub record: Option<Record>,
    /// After a clean stop: what the files looked like.
    pub clean: Option<Vec<Fingerprint>>,
}

/// Why a replica cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The directory.
    #[error("cannot open the module's directory {directory}")]
    Directory {
        /// Its path.
        directory: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The metadata.
    #[error(transparent)]
    Meta(#[from] MetaError),
    /// A file of ours that is damaged, or of a newer version.
    #[error("{path} cannot be used")]
    Damaged {
        /// Which.
        path: PathBuf,
        /// Why.
        source: DecodeError,
    },
    /// Another module's.
    #[error("{path} belongs to module {found}, not to {wanted}")]
    OtherModule {
        /// Which file.
        path: PathBuf,
        /// Whose it is.
        found: ModuleId,
        /// Whose it should be.
        wanted: ModuleId,
    },
    /// An empty mount point, most likely.
    #[error(
        "{directory} holds no replica, but its metadata in {metadata} says that it did. Is its file system mounted? If \
         the directory is really lost, remove the metadata: this node is then resynced from the other one"
    )]
    DirectoryLost {
        /// The directory.
        directory: PathBuf,
        /// Its metadata.
        metadata: PathBuf,
    },
    /// Created twice.
    #[error("{directory} already holds a replica of a module")]
    AlreadyThere {
        /// The directory.
        directory: PathBuf,
    },
}

/// A replica, opened.
#[derive(Debug)]
pub struct Replica {
    /// Its files.
    pub store: Store,
    /// Its metadata.
    pub meta: MetaFolder,
    /// What the state file says from now on; not yet written.
    pub state: State,
    /// What the scan met.
    pub scanned: Scanned,
    /// The id is new: log and map of an older one say nothing.
    pub fresh: bool,
}

/// The id of this boot.
///
/// # Errors
/// Without /proc.
pub fn boot_id() -> io::Result<BootId> {
    let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    let hex: String = text.trim().chars().filter(|c| *c != '-').collect();
    u128::from_str_radix(&hex, 16).map(BootId).map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))
}

/// Makes the first replica of a module out of a directory with the VM's files in it, for `protect`.
///
/// # Errors
/// One that is there already, and what the kernel says.
pub fn create_replica(directory: &Path, metadata: &Path, module: ModuleId) -> Result<ReplicaId, OpenError> {
    let meta = MetaFolder::open(metadata)?;
    if meta.read(STATE_FILE)?.is_some() {
        return Err(OpenError::AlreadyThere { directory: directory.to_owned() });
    }
    let (store, _) = open_store(directory)?;
    if read_id_file(&store, directory)?.is_some() {
        return Err(OpenError::AlreadyThere { directory: directory.to_owned() });
    }
    let replica = ReplicaId(random());
    let boot = boot_id().map_err(|source| failed(directory, source))?;
    let clean = Some(store.fingerprints().map_err(|e| failed(directory, e.into()))?);
    let state = State { module, replica, boot, marks: Marks::default(), record: None, clean };
    meta.replace(STATE_FILE, &state.encode())?;
    write_id_file(&store, directory, module, replica)?;
    Ok(replica)
}

/// Opens a module's replica, and makes an empty one where there is none.
///
/// # Errors
/// See `OpenError`: it is never guessed whose files these are.
pub fn open_replica(directory: &Path, metadata: &Path, module: ModuleId, boot: BootId) -> Result<Replica, OpenError> {
    let meta = MetaFolder::open(metadata)?;
    let state = match meta.read(STATE_FILE)? {
        None => None,
        Some(bytes) => {
            let path = metadata.join(STATE_FILE);
            let decoded = State::decode(&bytes);
            let state = decoded.map_err(|source| OpenError::Damaged { path: path.clone(), source })?;
            check_module(&path, state.module, module)?;
            Some(state)
        }
    };
    std::fs::create_dir_all(directory).map_err(|source| failed(directory, source))?;
    let (store, scanned) = open_store(directory)?;
    let found = read_id_file(&store, directory)?;
    if let Some((found, _)) = found {
        check_module(&directory.join(super::LOCAL_FOLDER).join(ID_FILE), found, module)?;
    }
    let (state, fresh) = match (state, found) {
        (Some(_), None) => {
            let (directory, metadata) = (directory.to_owned(), metadata.to_owned());
            return Err(OpenError::DirectoryLost { directory, metadata });
        }
        (Some(state), Some((_, id))) if state.replica == id => (state, false),
        // New here, restored from elsewhere, or the metadata is lost: a replica that nobody knows.
        (Some(_) | None, _) => {
            let marks = Marks { suspect_all: true, ..Marks::default() };
            let replica = ReplicaId(random());
            (State { module, replica, boot, marks, record: None, clean: Some(Vec::new()) }, true)
        }
    };
    let mut opened = Replica { store, meta, state, scanned, fresh };
    opened.judge(boot).map_err(|e| failed(directory, e.into()))?;
    if fresh {
        // First: an id without its metadata is made anew at the next start, metadata without its id is refused.
        write_id_file(&opened.store, directory, module, opened.state.replica)?;
    }
    opened.meta.replace(STATE_FILE, &opened.state.encode())?;
    Ok(opened)
}

impl Replica {
    /// Sets the marks by how it was left. From here on it counts as running.
    fn judge(&mut self, boot: BootId) -> Result<(), rustix::io::Errno> {
        match self.state.clean.take() {
            Some(left) if !self.fresh => {
                let changed = left != self.store.fingerprints()?;
                self.state.marks.suspect_all |= changed || self.scanned.fresh > 0;
            }
            Some(_) => {}
            None => self.state.marks.broken |= self.state.boot != boot,
        }
        self.state.boot = boot;
        Ok(())
    }
}

impl State {
    /// As it lies in a module's metadata folder; `None` where there is none.
    ///
    /// # Errors
    /// What the kernel says, or a file that is damaged.
    pub fn load(metadata: &Path) -> Result<Option<Self>, OpenError> {
        let Some(bytes) = MetaFolder::open(metadata)?.read(STATE_FILE)? else { return Ok(None) };
        let damaged = |source| OpenError::Damaged { path: metadata.join(STATE_FILE), source };
        Self::decode(&bytes).map(Some).map_err(damaged)
    }

    /// Writes it, durably.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn save(&self, meta: &MetaFolder) -> Result<(), MetaError> {
        meta.replace(STATE_FILE, &self.encode())
    }

    fn encode(&self) -> Vec<u8> {
        seal(STATE_MAGIC, self.module, self.replica, |out| {
            out.u128(self.boot.0);
            let Marks { broken, erred, suspect_all } = self.marks;
            out.u8(u8::from(broken) | u8::from(erred) << 1 | u8::from(suspect_all) << 2);
            out.option(self.record.as_ref(), |out, record| record.encode(out));
            out.option(self.clean.as_ref(), |out, files| {
                out.list(files, |out, file| {
                    out.u64(file.id.0);
                    out.u64(file.size);
                    out.i64(file.changed.0);
                    out.u32(file.changed.1);
                    out.u64(file.inode);
                });
            });
        })
    }

    fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let (module, replica, mut from) = unseal(STATE_MAGIC, bytes)?;
        let boot = BootId(from.u128()?);
        let flags = from.u8()?;
        if flags > 7 {
            return Err(DecodeError::Bad { what: "marks" });
        }
        let marks = Marks { broken: flags & 1 != 0, erred: flags & 2 != 0, suspect_all: flags & 4 != 0 };
        let record = from.option(Record::decode)?;
        let clean = from.option(|from| {
            from.list(FILES_MAX, |from| {
                let (id, size) = (FileId(from.u64()?), from.u64()?);
                Ok(Fingerprint { id, size, changed: (from.i64()?, from.u32()?), inode: from.u64()? })
            })
        })?;
        from.end()?;
        Ok(Self { module, replica, boot, marks, record, clean })
    }
}

impl Store {
    /// What tells later whether a file was changed.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn fingerprints(&self) -> Result<Vec<Fingerprint>, rustix::io::Errno> {
        let mut all = Vec::new();
        for id in self.ids() {
            let stat = self.raw_stat(id)?;
            // A folder's own size and time change with the hidden folder; its names are told by the files.
            if self.kind(id)? != vmtwin_core::namespace::Kind::Directory {
                all.push(Fingerprint {
                    id,
                    size: u64::try_from(stat.st_size).unwrap_or(0),
                    changed: (stat.st_ctime, u32::try_from(stat.st_ctime_nsec).unwrap_or(0)),
                    inode: stat.st_ino,
                });
            }
        }
        Ok(all)
    }
}

fn open_store(directory: &Path) -> Result<(Store, Scanned), OpenError> {
    Store::open(directory).map_err(|e| failed(directory, e.into()))
}

fn failed(directory: &Path, source: io::Error) -> OpenError {
    OpenError::Directory { directory: directory.to_owned(), source }
}

fn check_module(path: &Path, found: ModuleId, wanted: ModuleId) -> Result<(), OpenError> {
    if found == wanted { Ok(()) } else { Err(OpenError::OtherModule { path: path.to_owned(), found, wanted }) }
}

fn random() -> u128 {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).expect("the kernel gives random numbers");
    u128::from_le_bytes(bytes)
}

fn read_id_file(store: &Store, directory: &Path) -> Result<Option<(ModuleId, ReplicaId)>, OpenError> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let fd = match rustix::fs::openat(store.local(), ID_FILE, flags, Mode::empty()) {
        Ok(fd) => fd,
        Err(rustix::io::Errno::NOENT) => return Ok(None),
        Err(e) => return Err(failed(directory, e.into())),
    };
    let mut bytes = Vec::new();
    File::from(fd).take(4096).read_to_end(&mut bytes).map_err(|source| failed(directory, source))?;
    let path = directory.join(super::LOCAL_FOLDER).join(ID_FILE);
    let damaged = |source| OpenError::Damaged { path, source };
    let (module, replica, from) = unseal(ID_MAGIC, &bytes).map_err(damaged.clone())?;
    from.end().map_err(damaged)?;
    Ok(Some((module, replica)))
}

fn write_id_file(store: &Store, directory: &Path, module: ModuleId, replica: ReplicaId) -> Result<(), OpenError> {
    let written = (|| {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let fd = rustix::fs::openat(store.local(), "replica.new", flags, Mode::from_raw_mode(0o600))?;
        let mut file = File::from(fd);
        file.write_all(&seal(ID_MAGIC, module, replica, |_| {}))?;
        file.sync_all()?;
        rustix::fs::renameat(store.local(), "replica.new", store.local(), ID_FILE)?;
        rustix::fs::fsync(store.local())?;
        rustix::fs::fsync(store.root()?)?;
        Ok(())
    })();
    written.map_err(|source| failed(directory, source))
}

fn seal(magic: u32, module: ModuleId, replica: ReplicaId, body: impl FnOnce(&mut Writer<'_>)) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut out = Writer::new(&mut bytes);
    out.u32(magic);
    out.u16(VERSION);
    out.u128(module.0);
    out.u128(replica.0);
    body(&mut out);
    let crc = crc32c::crc32c(&bytes);
    Writer::new(&mut bytes).u32(crc);
    bytes
}

fn unseal(magic: u32, bytes: &[u8]) -> Result<(ModuleId, ReplicaId, Reader<'_>), DecodeError> {
    let mut from = Reader::new(bytes);
    if from.u32()? != magic {
        return Err(DecodeError::Bad { what: "file's magic" });
    }
    let version = from.u16()?;
    if version != VERSION {
        let (found, known) = (u64::from(version), u64::from(VERSION));
        return Err(DecodeError::Version { what: "metadata file", found, known });
    }
    let Some((body, crc)) = bytes.split_last_chunk::<4>() else {
        return Err(DecodeError::Short { at: 0, wanted: 4 });
    };
    if crc32c::crc32c(body) != u32::from_le_bytes(*crc) {
        return Err(DecodeError::Checksum { what: "metadata file" });
    }
    let mut from = Reader::new(body);
    from.bytes(6)?;
    let (module, replica) = (ModuleId(from.u128()?), ReplicaId(from.u128()?));
    Ok((module, replica, from))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MODULE: ModuleId = ModuleId(7);
    const BOOT: BootId = BootId(1);

    struct Host(tempfile::TempDir);
    impl Host {
        fn new() -> Self {
            Self(tempfile::tempdir().unwrap())
        }
        fn directory(&self) -> PathBuf {
            self.0.path().join("images")
        }
        fn metadata(&self) -> PathBuf {
            self.0.path().join("lib")
        }
        fn open(&self, boot: u128) -> Result<Replica, OpenError> {
            open_replica(&self.directory(), &self.metadata(), MODULE, BootId(boot))
        }
        fn stop(&self, mut replica: Replica) {
            replica.state.clean = Some(replica.store.fingerprints().unwrap());
            replica.state.save(&replica.meta).unwrap();
        }
    }

    #[test]
    fn a_protected_directory_is_known_again_and_clean() {
        let host = Host::new();
        std::fs::create_dir_all(host.directory()).unwrap();
        std::fs::write(host.directory().join("disk.raw"), b"content").unwrap();
        let id = create_replica(&host.directory(), &host.metadata(), MODULE).unwrap();
        assert!(create_replica(&host.directory(), &host.metadata(), MODULE).is_err());
        let replica = host.open(5).unwrap();
        assert_eq!((replica.state.replica, replica.state.marks, replica.fresh), (id, Marks::default(), false));
        host.stop(replica);
        assert_eq!(host.open(6).unwrap().state.marks, Marks::default());
    }

    #[test]
    fn a_host_that_went_down_without_a_clean_stop_leaves_it_broken_and_a_killed_process_does_not() {
        let host = Host::new();
        drop(host.open(BOOT.0).unwrap());
        assert!(!host.open(BOOT.0).unwrap().state.marks.broken);
        assert!(host.open(2).unwrap().state.marks.broken);
        assert!(host.open(2).unwrap().state.marks.broken, "the mark stays until it is taken away");
    }

    #[test]
    fn a_file_changed_while_stopped_makes_all_suspect() {
        for change in 0..3 {
            let host = Host::new();
            std::fs::create_dir_all(host.directory()).unwrap();
            std::fs::write(host.directory().join("disk.raw"), b"content").unwrap();
            create_replica(&host.directory(), &host.metadata(), MODULE).unwrap();
            host.stop(host.open(1).unwrap());
            match change {
                0 => std::fs::write(host.directory().join("disk.raw"), b"CONTENT").unwrap(),
                1 => std::fs::write(host.directory().join("new"), b"").unwrap(),
                _ => std::fs::remove_file(host.directory().join("disk.raw")).unwrap(),
            }
            assert!(host.open(1).unwrap().state.marks.suspect_all, "change {change}");
        }
    }

    #[test]
    fn lost_metadata_and_a_restored_directory_make_a_new_replica() {
        let (a, b) = (Host::new(), Host::new());
        let first = a.open(1).unwrap().state.replica;
        std::fs::remove_dir_all(a.metadata()).unwrap();
        let second = a.open(1).unwrap();
        assert!(second.fresh && second.state.replica != first && second.state.marks.suspect_all);
        drop(second);
        // b's folder of metadata beside a's directory.
        b.open(1).unwrap();
        let mixed = open_replica(&a.directory(), &b.metadata(), MODULE, BOOT).unwrap();
        assert!(mixed.fresh && mixed.state.marks.suspect_all);
    }

    #[test]
    fn an_empty_mount_point_and_another_modules_files_are_refused() {
        let host = Host::new();
        host.open(1).unwrap();
        let other = open_replica(&host.directory(), &host.metadata(), ModuleId(8), BOOT);
        assert!(matches!(other, Err(OpenError::OtherModule { .. })));
        std::fs::remove_dir_all(host.directory()).unwrap();
        assert!(matches!(host.open(1), Err(OpenError::DirectoryLost { .. })));
    }

    #[test]
    fn a_damaged_state_file_is_refused_whichever_bit_it_is() {
        let record = Record::first(
            vmtwin_core::ids::RecordId(5),
            ReplicaId(1),
            vec![vmtwin_core::ids::AcceptorId(1), vmtwin_core::ids::AcceptorId(2), vmtwin_core::ids::AcceptorId(3)],
        );
        let file = Fingerprint { id: FileId(3), size: 4, changed: (5, 6), inode: 7 };
        let marks = Marks { broken: true, erred: false, suspect_all: true };
        let state = State {
            module: MODULE,
            replica: ReplicaId(9),
            boot: BOOT,
            marks,
            record: Some(record),
            clean: Some(vec![file]),
        };
        let good = state.encode();
        assert_eq!(State::decode(&good).unwrap(), state);
        for bit in 0..good.len() * 8 {
            let mut bad = good.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(State::decode(&bad).is_err(), "bit {bit}");
        }
    }
}
