//! A pass-through file system over the front end's API: what a data thread does, without replication. Test code.
use rustix::fs::{self, AtFlags, Dir, Mode, OFlags, RenameFlags, SeekFrom, Stat, XattrFlags};
use rustix::io::Errno;
use std::collections::BTreeMap;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;
use vmtwin_core::ids::FileId;
use vmtwin_frontend::fuse::{
    Attr, Directory, Entry, Event, FileSystem, Fuse, Kernel, Listed, Operation, Options, Reply, Request, SetAttr,
    SetTime, Ticket, Timestamp,
};
use vmtwin_ring::{Completion, Descriptor, Pool, Ring, Waker};

const POLL: u64 = u64::MAX;

/// What a test tells the server while it runs.
#[derive(Default)]
pub struct Control {
    /// Reads and writes are held until so many are in hand, then done, the last one first. 0: none is held.
    pub hold: AtomicUsize,
    /// How many are being held.
    pub held: AtomicUsize,
    /// Most that were ever held.
    pub held_max: AtomicUsize,
    /// Messages about signals.
    pub interrupts: AtomicUsize,
    /// The pool ran out.
    pub no_slot: AtomicUsize,
    /// Files that the kernel has a reference to, and the root.
    pub nodes: AtomicUsize,
    /// Most messages between two waits.
    pub round_max: AtomicUsize,
    /// End, and abort the connection.
    pub quit: AtomicBool,
}

/// How a test wants it.
pub struct Config {
    pub slots: usize,
    pub valid: Duration,
    pub readdirplus: bool,
}

impl Default for Config {
    fn default() -> Self {
        Self { slots: 64, valid: Duration::ZERO, readdirplus: false }
    }
}

/// A running server.
pub struct Server {
    pub control: Arc<Control>,
    pub kernel: Kernel,
    pub waker: Waker,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Serves `back` at `at` (which may be the same directory) on a thread of its own.
    pub fn start(back: &Path, at: &Path, config: Config) -> Self {
        let (back, at) = (back.to_owned(), at.to_owned());
        let control = Arc::new(Control::default());
        let shared = Arc::clone(&control);
        let (tell, told) = mpsc::channel();
        let thread = std::thread::spawn(move || {
            let state = State::new(&back, &at, config, shared);
            tell.send((state.fuse.kernel(), state.ring.waker())).unwrap();
            state.run();
        });
        let (kernel, waker) = told.recv().expect("the server has mounted");
        Self { control, kernel, waker, thread: Some(thread) }
    }

    /// Waits until it has ended by itself.
    pub fn join(mut self) {
        self.thread.take().unwrap().join().expect("the server ended in good order");
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.control.quit.store(true, Ordering::SeqCst);
        self.waker.wake();
        if let Some(thread) = self.thread.take() {
            let ended = thread.join();
            assert!(ended.is_ok() || std::thread::panicking(), "the server panicked");
        }
    }
}

struct Node {
    /// O_PATH.
    fd: OwnedFd,
    /// References that the kernel has: one for each `Entry` that it got.
    looked_up: u64,
}

#[derive(Clone, Copy)]
enum Kind {
    Read,
    Write,
    Plain,
}

enum Handle {
    File(Descriptor),
    Folder(Vec<(Vec<u8>, u64, u32)>),
}

struct State {
    ring: Ring,
    pool: Pool,
    fuse: Fuse,
    config: Config,
    control: Arc<Control>,
    /// Files by inode number; the root by 1.
    nodes: BTreeMap<FileId, Node>,
    root_inode: u64,
    handles: BTreeMap<u64, Handle>,
    next_handle: u64,
    in_flight: BTreeMap<u64, (Ticket, Kind)>,
    next_token: u64,
    held: Vec<Request>,
}

type Outcome = Result<Reply<'static>, Errno>;

impl State {
    fn new(back: &Path, at: &Path, config: Config, control: Arc<Control>) -> Self {
        let root = fs::open(back, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).unwrap();
        let root_inode = fs::fstat(&root).unwrap().st_ino;
        let options = Options { source: "vmtwin:test".into(), readdirplus: config.readdirplus, ..Options::default() };
        let fuse = Fuse::mount(at, &options).unwrap();
        Self {
            ring: Ring::new(64).unwrap(),
            pool: Pool::new(config.slots).unwrap(),
            fuse,
            config,
            control,
            nodes: BTreeMap::from([(FileId::ROOT, Node { fd: root, looked_up: 1 })]),
            root_inode,
            handles: BTreeMap::new(),
            next_handle: 1,
            in_flight: BTreeMap::new(),
            next_token: 1,
            held: Vec::new(),
        }
    }

    fn run(mut self) {
        let mut done = Vec::new();
        loop {
            for completion in done.drain(..) {
                self.completed(completion);
            }
            if self.control.quit.load(Ordering::SeqCst) {
                return self.quit();
            }
            if !self.take_requests() {
                return;
            }
            if self.held.len() >= self.control.hold.load(Ordering::SeqCst) {
                self.release();
            }
            self.fuse.arm(&mut self.ring, POLL);
            self.ring.wait(None, &mut done).unwrap();
        }
    }

    /// Ends the connection and what is in flight; the ring is still of use.
    fn quit(mut self) {
        self.fuse.abort(&mut self.ring);
        while self.ring.in_flight() > 0 {
            self.ring.wait(None, &mut Vec::new()).unwrap();
        }
        assert_eq!(self.pool.free(), self.config.slots - self.held.len());
    }

    /// False when there is nothing to serve any more.
    fn take_requests(&mut self) -> bool {
        for messages in 0.. {
            self.control.round_max.fetch_max(messages, Ordering::SeqCst);
            match self.fuse.next(&self.pool) {
                Event::Request(request) => self.request(request),
                Event::Forget(list) => list.iter().for_each(|f| self.forget(f.node, f.count)),
                Event::Interrupt(id) => {
                    self.control.interrupts.fetch_add(1, Ordering::SeqCst);
                    if let Some(at) = self.held.iter().position(|r| r.ticket.id() == id) {
                        let request = self.held.remove(at);
                        self.fuse.reply(request.ticket, &Reply::Error(Errno::INTR));
                        self.control.held.store(self.held.len(), Ordering::SeqCst);
                    }
                }
                Event::Empty => return true,
                Event::NoSlot => {
                    self.control.no_slot.fetch_add(1, Ordering::SeqCst);
                    self.release();
                    return true;
                }
                Event::Ended => return false,
            }
        }
        unreachable!("a round ends")
    }

    fn request(&mut self, request: Request) {
        let data = matches!(request.operation, Operation::Read { .. } | Operation::Write { .. });
        if data && self.control.hold.load(Ordering::SeqCst) > 0 {
            self.held.push(request);
            self.control.held.store(self.held.len(), Ordering::SeqCst);
            self.control.held_max.fetch_max(self.held.len(), Ordering::SeqCst);
            if self.held.len() >= self.control.hold.load(Ordering::SeqCst) {
                self.release();
            }
        } else {
            self.serve(request);
        }
    }

    fn release(&mut self) {
        while let Some(request) = self.held.pop() {
            self.serve(request);
        }
        self.control.held.store(0, Ordering::SeqCst);
    }

    /// Ring operations are answered when they complete, all others here.
    fn serve(&mut self, request: Request) {
        let Request { ticket, node, caller, operation } = request;
        let token = self.next_token;
        self.next_token += 1;
        let mut wait = |ticket, kind| assert!(self.in_flight.insert(token, (ticket, kind)).is_none());
        match operation {
            Operation::Read { handle, offset, size } => match (self.handles.get(&handle), self.pool.take()) {
                (Some(Handle::File(fd)), Some(slot)) => {
                    self.ring.read(fd, slot, 0..size as usize, offset, token);
                    wait(ticket, Kind::Read);
                }
                (Some(Handle::File(_)), None) => {
                    // Served by hand: the test has made the pool that small.
                    let mut bytes = vec![0; size as usize];
                    let Some(Handle::File(fd)) = self.handles.get(&handle) else { unreachable!() };
                    let read = rustix::io::pread(fd, &mut bytes[..], offset).unwrap();
                    self.fuse.reply(ticket, &Reply::Data(&bytes[..read]));
                }
                _ => self.fuse.reply(ticket, &Reply::Error(Errno::BADF)),
            },
            Operation::Write { handle, offset, size, slot } => match self.handles.get(&handle) {
                Some(Handle::File(fd)) => {
                    assert_eq!(slot.payload().as_ptr() as usize % 4096, 0);
                    self.ring.write(fd, slot, 0..size as usize, offset, token);
                    wait(ticket, Kind::Write);
                }
                _ => self.fuse.reply(ticket, &Reply::Error(Errno::BADF)),
            },
            Operation::FSync { handle, data_only } => match self.handles.get(&handle) {
                Some(Handle::File(fd)) => {
                    self.ring.fsync(fd, data_only, token);
                    wait(ticket, Kind::Plain);
                }
                _ => self.fuse.reply(ticket, &Reply::Error(Errno::BADF)),
            },
            Operation::FAllocate { handle, offset, length, mode } => match self.handles.get(&handle) {
                Some(Handle::File(fd)) => {
                    self.ring.fallocate(fd, mode as i32, offset, length, token);
                    wait(ticket, Kind::Plain);
                }
                _ => self.fuse.reply(ticket, &Reply::Error(Errno::BADF)),
            },
            Operation::ReadLink => match fs::readlinkat(&self.nodes[&node].fd, "", Vec::new()) {
                Ok(target) => self.fuse.reply(ticket, &Reply::Data(target.as_bytes())),
                Err(errno) => self.fuse.reply(ticket, &Reply::Error(errno)),
            },
            Operation::GetXattr { name, size } => {
                let mut value = vec![0; 65536];
                let got = fs::getxattr(self.proc_path(node), &name[..], &mut value[..]);
                self.value(ticket, got.map(|n| &value[..n]), size);
            }
            Operation::ListXattr { size } => {
                let mut list = vec![0; 65536];
                let got = fs::listxattr(self.proc_path(node), &mut list[..]);
                self.value(ticket, got.map(|n| &list[..n]), size);
            }
            operation => {
                let reply = self.at_once(node, (caller.uid, caller.gid), operation).unwrap_or_else(Reply::Error);
                self.fuse.reply(ticket, &reply);
            }
        }
    }

    fn value(&mut self, ticket: Ticket, got: Result<&[u8], Errno>, size: u32) {
        let reply = match got {
            Err(errno) => Reply::Error(errno),
            Ok(bytes) if size == 0 => Reply::XattrSize(bytes.len() as u32),
            Ok(bytes) if bytes.len() > size as usize => Reply::Error(Errno::RANGE),
            Ok(bytes) => Reply::Data(bytes),
        };
        self.fuse.reply(ticket, &reply);
    }

    fn completed(&mut self, completion: Completion) {
        if completion.token == POLL {
            return self.fuse.polled();
        }
        let (ticket, kind) = self.in_flight.remove(&completion.token).expect("a request in flight");
        let memory = completion.memory.as_ref().map_or(&[][..], vmtwin_ring::Memory::bytes);
        let reply = match (&completion.result, kind) {
            (Err(_), _) => Reply::Error(Errno::from_raw_os_error(completion.errno())),
            (Ok(n), Kind::Read) => Reply::Data(&memory[..*n as usize]),
            (Ok(n), Kind::Write) => Reply::Written(*n),
            (Ok(_), Kind::Plain) => Reply::Done,
        };
        self.fuse.reply(ticket, &reply);
    }

    fn at_once(&mut self, node: FileId, owner: (u32, u32), operation: Operation) -> Outcome {
        let folder = || self.nodes.get(&node).map(|n| &n.fd).ok_or(Errno::STALE);
        match operation {
            Operation::Lookup { name } => self.entry(node, &name).map(Reply::Entry),
            Operation::GetAttr { .. } => Ok(Reply::Attr(self.attr(&self.stat(node)?), self.config.valid)),
            Operation::SetAttr(set) => {
                self.set_attr(node, &set)?;
                Ok(Reply::Attr(self.attr(&self.stat(node)?), self.config.valid))
            }
            Operation::Symlink { name, target } => {
                fs::symlinkat(&target[..], folder()?, &name[..])?;
                self.own(node, &name, owner).map(Reply::Entry)
            }
            Operation::MkNod { name, mode, rdev } => {
                let (kind, bits) = (fs::FileType::from_raw_mode(mode), Mode::from_raw_mode(mode & 0o7777));
                fs::mknodat(folder()?, &name[..], kind, bits, u64::from(rdev))?;
                self.own(node, &name, owner).map(Reply::Entry)
            }
            Operation::MkDir { name, mode } => {
                fs::mkdirat(folder()?, &name[..], Mode::from_raw_mode(mode & 0o7777))?;
                self.own(node, &name, owner).map(Reply::Entry)
            }
            Operation::Unlink { name } => done(fs::unlinkat(folder()?, &name[..], AtFlags::empty())),
            Operation::RmDir { name } => done(fs::unlinkat(folder()?, &name[..], AtFlags::REMOVEDIR)),
            Operation::Rename { name, new_parent, new_name, flags } => {
                let to = &self.nodes.get(&new_parent).ok_or(Errno::STALE)?.fd;
                let flags = RenameFlags::from_bits(flags).ok_or(Errno::INVAL)?;
                done(fs::renameat_with(folder()?, &name[..], to, &new_name[..], flags))
            }
            Operation::Link { file, name } => {
                fs::linkat(fs::CWD, self.proc_path(file), folder()?, &name[..], AtFlags::SYMLINK_FOLLOW)?;
                self.entry(node, &name).map(Reply::Entry)
            }
            Operation::Open { flags } => Ok(Reply::Opened(self.open(node, flags)?)),
            Operation::Create { name, flags, mode } => {
                let bits = OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC | OFlags::WRONLY;
                fs::openat(folder()?, &name[..], bits, Mode::from_raw_mode(mode & 0o7777))?;
                let entry = self.own(node, &name, owner)?;
                Ok(Reply::Created(entry, self.open(entry.attr.node, flags)?))
            }
            Operation::StatFs => {
                let f = fs::fstatvfs(folder()?)?;
                Ok(Reply::FileSystem(FileSystem {
                    blocks: f.f_blocks,
                    blocks_free: f.f_bfree,
                    blocks_available: f.f_bavail,
                    files: f.f_files,
                    files_free: f.f_ffree,
                    block_bytes: f.f_bsize as u32,
                    fragment_bytes: f.f_frsize as u32,
                    name_bytes_max: f.f_namemax as u32,
                }))
            }
            Operation::Release { handle, .. } | Operation::ReleaseDir { handle } => {
                self.handles.remove(&handle).map(|_| Reply::Done).ok_or(Errno::BADF)
            }
            Operation::SetXattr { name, value, flags } => {
                let flags = XattrFlags::from_bits(flags).ok_or(Errno::INVAL)?;
                done(fs::setxattr(self.proc_path(node), &name[..], &value, flags))
            }
            Operation::RemoveXattr { name } => done(fs::removexattr(self.proc_path(node), &name[..])),
            Operation::OpenDir { .. } => {
                let list = self.list(node)?;
                Ok(Reply::Opened(self.handle(Handle::Folder(list))))
            }
            Operation::ReadDir { handle, offset, size, plus } => self.read_folder(node, handle, offset, size, plus),
            Operation::FSyncDir { .. } => {
                let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
                done(fs::fsync(fs::open(self.proc_path(node), flags, Mode::empty())?))
            }
            Operation::LSeek { handle, offset, whence } => {
                let Some(Handle::File(fd)) = self.handles.get(&handle) else { return Err(Errno::BADF) };
                let to = if whence == 3 { SeekFrom::Data(offset) } else { SeekFrom::Hole(offset) };
                fs::seek(fd, to).map(Reply::Sought)
            }
            other => panic!("{other:?} is served elsewhere"),
        }
    }

    fn handle(&mut self, handle: Handle) -> u64 {
        self.next_handle += 1;
        self.handles.insert(self.next_handle, handle);
        self.next_handle
    }

    /// The backing file never sees O_DIRECT or O_APPEND: alignment and position are the caller's affair above.
    fn open(&mut self, node: FileId, flags: u32) -> Result<u64, Errno> {
        let flags = OFlags::from_bits_retain(flags) & (OFlags::RDONLY | OFlags::WRONLY | OFlags::RDWR);
        let fd = fs::open(self.proc_path(node), flags | OFlags::CLOEXEC, Mode::empty())?;
        Ok(self.handle(Handle::File(Rc::new(fd))))
    }

    fn proc_path(&self, node: FileId) -> PathBuf {
        let fd = self.nodes.get(&node).map_or(-1, |n| n.fd.as_raw_fd());
        PathBuf::from(format!("/proc/self/fd/{fd}"))
    }

    fn stat(&self, node: FileId) -> Result<Stat, Errno> {
        fs::statat(&self.nodes.get(&node).ok_or(Errno::STALE)?.fd, "", AtFlags::EMPTY_PATH)
    }

    fn entry(&mut self, folder: FileId, name: &[u8]) -> Result<Entry, Errno> {
        let folder = &self.nodes.get(&folder).ok_or(Errno::STALE)?.fd;
        let fd = fs::openat(folder, name, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?;
        let stat = fs::fstat(&fd)?;
        let attr = self.attr(&stat);
        self.nodes.entry(attr.node).or_insert(Node { fd, looked_up: 0 }).looked_up += 1;
        self.control.nodes.store(self.nodes.len(), Ordering::SeqCst);
        Ok(Entry { attr, name_valid: self.config.valid, attr_valid: self.config.valid })
    }

    fn forget(&mut self, node: FileId, count: u64) {
        let known = self.nodes.get_mut(&node).expect("only what was looked up is forgotten");
        known.looked_up = known.looked_up.checked_sub(count).expect("no more is forgotten than was looked up");
        if known.looked_up == 0 {
            self.nodes.remove(&node);
        }
        self.control.nodes.store(self.nodes.len(), Ordering::SeqCst);
    }

    /// A new file belongs to who asked for it.
    fn own(&mut self, folder: FileId, name: &[u8], (uid, gid): (u32, u32)) -> Result<Entry, Errno> {
        let folder_fd = &self.nodes[&folder].fd;
        let (uid, gid) = (fs::Uid::from_raw(uid), fs::Gid::from_raw(gid));
        fs::chownat(folder_fd, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)?;
        self.entry(folder, name)
    }

    fn attr(&self, stat: &Stat) -> Attr {
        let node = if stat.st_ino == self.root_inode { FileId::ROOT } else { FileId(stat.st_ino) };
        let time = |seconds, nanos: u64| Timestamp { seconds, nanos: nanos as u32 };
        Attr {
            node,
            size: stat.st_size as u64,
            blocks: stat.st_blocks as u64,
            atime: time(stat.st_atime, stat.st_atime_nsec),
            mtime: time(stat.st_mtime, stat.st_mtime_nsec),
            ctime: time(stat.st_ctime, stat.st_ctime_nsec),
            mode: stat.st_mode,
            links: stat.st_nlink as u32,
            uid: stat.st_uid,
            gid: stat.st_gid,
            rdev: stat.st_rdev as u32,
            block_bytes: stat.st_blksize as u32,
        }
    }

    fn set_attr(&mut self, node: FileId, set: &SetAttr) -> Result<(), Errno> {
        let path = self.proc_path(node);
        let fd = &self.nodes.get(&node).ok_or(Errno::STALE)?.fd;
        if set.uid.is_some() || set.gid.is_some() {
            let (uid, gid) = (set.uid.map(fs::Uid::from_raw), set.gid.map(fs::Gid::from_raw));
            fs::chownat(fd, "", uid, gid, AtFlags::EMPTY_PATH)?;
        }
        if let Some(mode) = set.mode {
            fs::chmodat(fs::CWD, &path, Mode::from_raw_mode(mode & 0o7777), AtFlags::empty())?;
        }
        if let Some(size) = set.size {
            fs::ftruncate(fs::open(&path, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())?, size)?;
        }
        if set.atime.is_some() || set.mtime.is_some() {
            let time = |set: Option<SetTime>| {
                let (tv_sec, tv_nsec) = match set {
                    None => (0, fs::UTIME_OMIT),
                    Some(SetTime::Now) => (0, fs::UTIME_NOW),
                    Some(SetTime::At(t)) => (t.seconds, i64::from(t.nanos)),
                };
                fs::Timespec { tv_sec, tv_nsec }
            };
            let times = fs::Timestamps { last_access: time(set.atime), last_modification: time(set.mtime) };
            fs::utimensat(fs::CWD, &path, &times, AtFlags::empty())?;
        }
        Ok(())
    }

    fn list(&self, node: FileId) -> Result<Vec<(Vec<u8>, u64, u32)>, Errno> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = fs::open(self.proc_path(node), flags, Mode::empty())?;
        let mut list = Vec::new();
        for entry in Dir::read_from(fd)? {
            let entry = entry?;
            list.push((entry.file_name().to_bytes().to_vec(), entry.ino(), entry.file_type().as_raw_mode()));
        }
        Ok(list)
    }

    fn read_folder(&mut self, node: FileId, handle: u64, offset: u64, size: u32, plus: bool) -> Outcome {
        let Some(Handle::Folder(list)) = self.handles.get(&handle) else { return Err(Errno::BADF) };
        let part: Vec<_> = (1..).zip(list.clone()).skip(offset as usize).collect();
        let mut out = Directory::new(size, plus);
        for (next, (name, inode, mode)) in part {
            let known = if plus && name != b"." && name != b".." { self.entry(node, &name).ok() } else { None };
            let listed = Listed { node: FileId(inode), mode, next, name: &name };
            if !out.push(listed, known.as_ref()) {
                known.inspect(|entry| self.forget(entry.attr.node, 1));
                break;
            }
        }
        Ok(Reply::Directory(out))
    }
}

fn done(result: Result<(), Errno>) -> Outcome {
    result.map(|()| Reply::Done)
}
