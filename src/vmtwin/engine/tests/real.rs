//! The same two nodes over real data threads: mounts, rings and a TCP link; guest writes are file writes on the mount.
use super::*;
use crate::engine::data::{self, DataThread};
use crate::engine::messages::PeerSocket;
use crate::store::create_replica;
use std::net::{Shutdown, TcpListener, TcpStream};
use std::path::PathBuf;
use tokio::task::spawn_blocking;
use vmtwin_core::ids::{BootId, NodeName};
use vmtwin_frontend::fuse;

#[test]
fn what_a_guest_was_answered_survives_takeover_return_swap_and_stop_on_both_disks() {
    on_one_thread(async {
        let mut real = Real::new();
        let pair = &mut real.pair;
        pair.start(H1);
        pair.until("h1 starts it", H1, |s| s.vm == "running").await;
        let disks = real.disks.clone();
        disks[H1].write("first", b"before there was a peer").await;
        pair.start(H2);
        pair.until_green().await;
        disks[H1].write("second", &[7; 100_000]).await;

        pair.kill_process(H1);
        pair.vms[H1] = Fake::new("db");
        pair.reach(H1, false);
        pair.until("h2 goes on", H2, |s| s.state == State::Alone && s.vm == "running").await;
        assert_eq!(disks[H2].read("second").await, [7; 100_000]);
        assert_eq!(disks[H2].read("first").await, b"before there was a peer");
        disks[H2].write("second", b"shorter now").await;
        disks[H2].write("third", &[9; 50_000]).await;

        pair.reach(H1, true);
        pair.start(H1);
        pair.until("h1 has caught up", H1, |s| s.state == State::Second && s.health == Health::Green).await;
        let refused = disks[H1].try_write("by-hand", b"on the replica").await;
        assert_eq!(refused.unwrap_err().kind(), std::io::ErrorKind::ReadOnlyFilesystem);
        disks[H2].write("fourth", b"mirrored").await;

        pair.done(H2, Request::Swap).await;
        pair.until("home again", H1, |s| s.state == State::Prim && s.health == Health::Green).await;
        assert_eq!(disks[H1].read("second").await, b"shorter now");
        disks[H1].write("fifth", b"at home").await;

        let told = pair.tell(H2, Request::Stop { both: true });
        pair.done(H1, Request::Stop { both: true }).await;
        assert!(told.await.unwrap().ok);
        assert_eq!((pair.exit(H1).await, pair.exit(H2).await), (0, 0));
        for disk in disks.iter() {
            assert_eq!(fuse::standing(&disk.directory()).unwrap(), 0, "unmounted");
        }
        let names = ["first", "second", "third", "fourth", "fifth", ".vmtwin/domain.xml"];
        for name in names {
            let [one, two] = [H1, H2].map(|node| std::fs::read(disks[node].directory().join(name)).unwrap());
            assert_eq!(one, two, "{name}");
        }
    });
}

#[test]
fn a_cut_cable_loses_no_answered_write_and_heals_by_itself() {
    on_one_thread(async {
        let mut real = Real::new();
        real.pair.start_both().await;
        let disks = real.disks.clone();
        disks[H1].write("a", b"on both").await;
        real.cable.cut(true);
        disks[H1].write("a", b"on one").await;
        real.pair.until("alone", H1, |s| s.state == State::Alone && s.health == Health::Green).await;
        real.cable.cut(false);
        real.pair.until_green().await;
        real.pair.done(H1, Request::Swap).await;
        real.pair.until("there", H2, |s| s.state == State::Prim && s.vm == "running").await;
        assert_eq!(disks[H2].read("a").await, b"on one");
        assert_eq!(real.pair.vm(H1).starts(), 1);
        real.stop().await;
    });
}

struct Real {
    pair: Pair,
    disks: Rc<[Disk; 2]>,
    cable: Cable,
}

impl Real {
    fn new() -> Self {
        let disks = Rc::new([Disk::new("h1"), Disk::new("h2")]);
        std::fs::create_dir_all(disks[H1].directory().join(".vmtwin")).unwrap();
        std::fs::write(disks[H1].directory().join(".vmtwin/domain.xml"), "<domain/>").unwrap();
        std::fs::create_dir(disks[H2].directory()).unwrap();
        let holder = create_replica(&disks[H1].directory(), &disks[H1].metadata(), ModuleId(7)).unwrap();
        let open = disks.clone();
        let opener = move |world: &Rc<RefCell<World>>, node: usize, lease: Arc<Lease>| {
            let DataThread { orders, mut news, .. } = DataThread::spawn(open[node].settings(), lease)?;
            let to = world.borrow().sides[node].news.clone().ok_or("no process")?;
            spawn_local(async move {
                while let Some(news) = news.recv().await {
                    let _ = to.send(News::Data(news));
                }
            });
            Ok(Box::new(orders) as Box<dyn DataPort>)
        };
        let mut pair = Pair::new(holder, Rc::new(opener));
        pair.definitions = [H1, H2].map(|node| disks[node].directory().join(".vmtwin/domain.xml"));
        let cable = Cable::default();
        connect_while_wanted(&pair, cable.clone());
        Self { pair, disks, cable }
    }

    async fn stop(&mut self) {
        let told = self.pair.tell(H1, Request::Stop { both: true });
        self.pair.done(H2, Request::Stop { both: true }).await;
        assert!(told.await.unwrap().ok);
        assert_eq!((self.pair.exit(H1).await, self.pair.exit(H2).await), (0, 0));
    }
}

/// Connections that were made; cut ones end on both sides.
#[derive(Clone, Default)]
struct Cable(Rc<RefCell<(bool, Vec<TcpStream>)>>);

impl Cable {
    fn cut(&self, cut: bool) {
        let mut inner = self.0.borrow_mut();
        inner.0 = cut;
        for socket in inner.1.drain(..) {
            // It may have ended by itself.
            let _ = socket.shutdown(Shutdown::Both);
        }
    }
    fn ends(&self) -> Option<[TcpStream; 2]> {
        let mut inner = self.0.borrow_mut();
        if inner.0 {
            return None;
        }
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let dialed = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (accepted, _) = listener.accept().unwrap();
        for end in [&dialed, &accepted] {
            end.set_nodelay(true).unwrap();
            inner.1.push(end.try_clone().unwrap());
        }
        Some([dialed, accepted])
    }
}

/// Plays the dialer and `keep`: a connection whenever both processes miss one.
fn connect_while_wanted(pair: &Pair, cable: Cable) {
    let (world, wanted) = (pair.world.clone(), pair.link_wanted.clone());
    spawn_local(async move {
        loop {
            tokio::time::sleep(Duration::from_millis(50)).await;
            let both = wanted.borrow().iter().all(|wanted| wanted.has_changed().is_ok() && *wanted.borrow());
            let Some(ends) = (if both { cable.ends() } else { None }) else { continue };
            for (node, (socket, peer)) in ends.into_iter().zip(["h2", "h1"]).enumerate() {
                let peer = NodeName::new(peer).unwrap();
                let socket = PeerSocket { socket: socket.into(), peer, dialed: node == H1, tls: None };
                world.borrow().sides[node].tell(News::Link(socket));
            }
            // As the dialer does: the hello takes its time.
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    });
}

struct Disk {
    folder: tempfile::TempDir,
    node: NodeName,
}

impl Disk {
    fn new(node: &str) -> Self {
        let folder = tempfile::Builder::new().prefix("vmt").tempdir().unwrap();
        Self { folder, node: NodeName::new(node).unwrap() }
    }
    fn directory(&self) -> PathBuf {
        self.folder.path().join("vm")
    }
    fn metadata(&self) -> PathBuf {
        self.folder.path().join("lib")
    }
    fn settings(&self) -> data::Settings {
        data::Settings {
            module: "db".parse().unwrap(),
            id: ModuleId(7),
            node: self.node.clone(),
            directory: self.directory(),
            metadata: self.metadata(),
            backing: self.folder.path().join("run/backing/vm"),
            boot: BootId(1),
            configuration: 1,
            slow_peer_ms: 60_000,
            selinux_context: None,
        }
    }
    /// As a guest that waits for its flush. On a thread of its own: the control loops run on this one.
    async fn write(&self, name: &str, bytes: &[u8]) {
        self.try_write(name, bytes).await.unwrap();
    }
    async fn try_write(&self, name: &str, bytes: &[u8]) -> std::io::Result<()> {
        let (path, bytes) = (self.directory().join(name), bytes.to_vec());
        let write = move || {
            use std::io::Write;
            let mut file = std::fs::File::create(path)?;
            file.write_all(&bytes)?;
            file.sync_all()
        };
        spawn_blocking(write).await.unwrap()
    }
    async fn read(&self, name: &str) -> Vec<u8> {
        let path = self.directory().join(name);
        spawn_blocking(move || std::fs::read(path).unwrap()).await.unwrap()
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        while fuse::standing(&self.directory()).is_ok_and(|count| count > 0) {
            fuse::detach(&self.directory()).unwrap();
        }
    }
}
