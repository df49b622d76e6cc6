//! Nodes of a test, and a register that always answers.
use crate::engine::data::{DataThread, Settings, clock};
use crate::engine::messages::{Change, FromData, Lease, Opened, PeerSocket, ToData};
use crate::link::handshake::tests::linked;
use crate::store::create_replica;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};
use vmtwin_core::ids::{AcceptorId, BootId, ModuleId, ModuleName, NodeName, RecordId, ReplicaId};
use vmtwin_core::record::Record;
use vmtwin_frontend::fuse;

/// Longer than anything takes here; only a test that fails waits for so long.
pub const LIMIT: Duration = Duration::from_secs(120);

/// One node: a directory, its metadata, and a data thread over them while it runs.
pub struct Node {
    folder: tempfile::TempDir,
    pub name: NodeName,
    pub data: Option<DataThread>,
    pub lease: Arc<Lease>,
    pub me: ReplicaId,
    pub boot: u128,
    pub said: Vec<FromData>,
}

impl Node {
    pub fn new(name: &str) -> Self {
        let folder = tempfile::Builder::new().prefix("vmt").tempdir().unwrap();
        let name = NodeName::new(name).unwrap();
        let lease = Arc::new(Lease::default());
        Self { folder, name, data: None, lease, me: ReplicaId(0), boot: 1, said: Vec::new() }
    }

    /// A node whose directory `protect` made a replica of.
    pub fn protected(name: &str) -> Self {
        let node = Self::new(name);
        std::fs::create_dir(node.directory()).unwrap();
        create_replica(&node.directory(), &node.metadata(), ModuleId(7)).unwrap();
        node
    }

    pub fn directory(&self) -> PathBuf {
        self.folder.path().join("vm")
    }
    pub fn metadata(&self) -> PathBuf {
        self.folder.path().join("lib")
    }
    /// The plain files, beside the mount.
    pub fn backing(&self) -> PathBuf {
        self.folder.path().join("run/backing/vm")
    }
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory().join(name)
    }

    pub fn spawn(&mut self) {
        let settings = Settings {
            module: ModuleName::new("vm").unwrap(),
            id: ModuleId(7),
            node: self.name.clone(),
            directory: self.directory(),
            metadata: self.metadata(),
            backing: self.backing(),
            boot: BootId(self.boot),
            configuration: 1,
            slow_peer_ms: 60_000,
            selinux_context: None,
        };
        self.data = Some(DataThread::spawn(settings, self.lease.clone()).unwrap());
    }

    pub fn start(&mut self) -> Opened {
        self.spawn();
        let opened = self.wait("ready", |news| match news {
            FromData::Ready(opened) => Some(opened.clone()),
            FromData::Failed(why) => panic!("the data thread failed: {why}"),
            _ => None,
        });
        self.me = opened.replica;
        opened
    }

    pub fn order(&self, order: ToData) {
        assert!(self.data.as_ref().unwrap().orders.send(order), "the data thread lives");
    }

    /// The next piece of news, if there is one.
    pub fn news(&mut self) -> Option<FromData> {
        let news = self.data.as_mut().unwrap().news.try_recv().ok()?;
        if !matches!(news, FromData::Figures(_)) {
            self.said.push(news.clone());
        }
        Some(news)
    }

    /// Waits for news; what comes before it is passed over.
    pub fn wait<T>(&mut self, what: &str, mut is_it: impl FnMut(&FromData) -> Option<T>) -> T {
        let began = Instant::now();
        loop {
            while let Some(news) = self.news() {
                if let Some(found) = is_it(&news) {
                    return found;
                }
            }
            assert!(began.elapsed() < LIMIT, "{}: no {what} came; it said {:?}", self.name, self.said);
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    pub fn lease_for(&self, time: Duration) {
        self.lease.set(clock() + time);
        self.order(ToData::LeaseRenewed);
    }

    /// Makes it the holder under this record, with a lease that outlasts the test.
    pub fn hold(&mut self, record: &Record) {
        self.lease_for(Duration::from_secs(3600));
        self.order(ToData::Record(record.clone()));
        let path = self.path(".");
        // The record is durable and known when something can be changed.
        eventually("the holder serves", || {
            std::fs::OpenOptions::new().write(true).create(true).truncate(false).open(path.join("probe")).is_ok()
        });
        std::fs::remove_file(path.join("probe")).unwrap();
    }

    /// Whether it has no link, as far as it said.
    pub fn link_is_down(&self) -> bool {
        let last = self.said.iter().rev().find(|news| {
            matches!(news, FromData::PeerDown(_) | FromData::PeerUp(_) | FromData::Say(_) | FromData::Ready(_))
        });
        matches!(last, None | Some(FromData::PeerDown(_) | FromData::Ready(_)))
    }

    /// A clean stop.
    pub fn stop(&mut self) {
        self.order(ToData::End);
        let ended = self.wait("end", |news| match news {
            FromData::Ended(how) => Some(how.clone()),
            FromData::Failed(why) => panic!("it failed while stopping: {why}"),
            _ => None,
        });
        ended.unwrap();
        self.data.take().unwrap().join();
    }

    /// Ends it as a crash does: nothing is flushed or unmounted by it.
    pub fn crash(&mut self) {
        if let Some(DataThread { orders, news, thread }) = self.data.take() {
            drop(orders);
            drop(news);
            let _ = thread.join();
        }
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.crash();
        while fuse::standing(&self.directory()).is_ok_and(|count| count > 0) {
            fuse::detach(&self.directory()).unwrap();
        }
    }
}

/// Tries until it works.
pub fn eventually(what: &str, mut works: impl FnMut() -> bool) {
    let began = Instant::now();
    while !works() {
        assert!(began.elapsed() < LIMIT, "{what}: not within {} s", LIMIT.as_secs());
        std::thread::sleep(Duration::from_millis(5));
    }
}

pub fn first_record(holder: ReplicaId) -> Record {
    Record::first(RecordId(1), holder, vec![AcceptorId(1), AcceptorId(2), AcceptorId(3)])
}

/// Both ends of a new link.
pub fn link(a: &Node, b: &Node, clear: bool) {
    let (dialed, accepted) = linked((clear, clear));
    let to_b = PeerSocket { peer: b.name.clone(), ..dialed.unwrap() };
    let to_a = PeerSocket { peer: a.name.clone(), ..accepted.unwrap() };
    a.order(ToData::Link(to_b));
    b.order(ToData::Link(to_a));
}

/// Two nodes, and what the control planes and the register would do for them.
pub struct Pair {
    pub holder: Node,
    pub other: Node,
    pub record: Record,
    pub clear: bool,
    /// Changes that happened, in order.
    pub changes: Vec<Change>,
    /// The other one is to be reached.
    pub linked: bool,
}

impl Pair {
    /// A round: proposals land, a lost link is made anew.
    pub fn turn(&mut self) {
        while let Some(news) = self.holder.news() {
            if let FromData::Propose(change) = news {
                let in_sync = match &change {
                    Change::DropPeer => vec![self.holder.me],
                    Change::JoinPeer(peer) => vec![self.holder.me, *peer],
                };
                let record = self.record.next(RecordId(self.record.id.0 + 1), self.holder.me, in_sync);
                self.set(record, matches!(change, Change::DropPeer));
                self.changes.push(change);
            }
        }
        if self.other.data.is_some() {
            while self.other.news().is_some() {}
        }
        if self.linked && self.holder.link_is_down() && self.other.link_is_down() {
            self.link();
        }
    }

    /// A record that is known: to the holder, and to the other one where it would read it in the register.
    pub fn set(&mut self, record: Record, tell_other: bool) {
        self.holder.order(ToData::Record(record.clone()));
        if tell_other && self.other.data.is_some() {
            self.other.order(ToData::Record(record.clone()));
        }
        self.record = record;
    }

    pub fn link(&mut self) {
        for node in [&mut self.holder, &mut self.other] {
            node.said.push(FromData::Say("linked".to_owned()));
        }
        link(&self.holder, &self.other, self.clear);
    }

    /// Turns until something is so.
    pub fn until(&mut self, what: &str, mut so: impl FnMut(&mut Self) -> bool) {
        let began = Instant::now();
        while !so(self) {
            let said = (&self.holder.said, &self.other.said);
            assert!(began.elapsed() < LIMIT, "{what}: not within {} s: {said:#?}", LIMIT.as_secs());
            std::thread::sleep(Duration::from_millis(2));
            self.turn();
        }
    }

    /// Does what may wait for a change of the record, while the record changes.
    pub fn during<T: Send + 'static>(&mut self, what: &str, work: impl FnOnce() -> T + Send + 'static) -> T {
        let thread = std::thread::spawn(work);
        self.until(what, |_| thread.is_finished());
        thread.join().unwrap()
    }

    /// Until the other one is in sync, knows it, and has what was acknowledged.
    pub fn in_sync(&mut self) {
        self.until("both are in sync", |pair| {
            pair.record.is_in_sync(pair.other.me) && !pair.holder.link_is_down() && !pair.other.link_is_down()
        });
        let path = self.holder.path("probe");
        self.during("a change on both", move || {
            std::fs::write(&path, b"1").unwrap();
            std::fs::remove_file(&path).unwrap();
        });
        // A machine that stands still for a while may have lost the link meanwhile: once more then.
        if !self.record.is_in_sync(self.other.me) {
            self.in_sync();
        }
    }
}

/// Names, contents, owners, modes, links of a directory, in order; the hidden folder left out.
pub fn picture(directory: &Path) -> Vec<String> {
    use std::os::unix::fs::MetadataExt;
    let mut lines = Vec::new();
    let mut folders = vec![directory.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.strip_prefix(directory).unwrap().to_owned();
            if name == Path::new(".vmtwin-local") {
                continue;
            }
            let meta = std::fs::symlink_metadata(&path).unwrap();
            let content = if meta.is_file() {
                blake3::hash(&std::fs::read(&path).unwrap()).to_string()
            } else if meta.is_symlink() {
                format!("{:?}", std::fs::read_link(&path).unwrap())
            } else {
                folders.push(path.clone());
                String::new()
            };
            let (mode, uid, gid, links) = (meta.mode(), meta.uid(), meta.gid(), meta.nlink());
            let links = if meta.is_dir() { 0 } else { links };
            let size = if meta.is_file() { meta.len() } else { 0 };
            lines.push(format!("{} {mode:o} {uid} {gid} {links} {size} {content}", name.display()));
        }
    }
    lines.sort();
    lines
}
