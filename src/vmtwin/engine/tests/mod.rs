//! Two nodes and three voters in one process: real control loops, arbiters and acceptors over pretended VMs and data
//! threads. Every wait is for a state that must come, however slow the machine; while it waits, no two nodes may serve.
mod real;

use super::control::{Control, DataPort, News, Parts, VoterPort};
use super::messages::{Change, FromData, Lease, Opened, PeerUp, ResyncProgress, ToData};
use super::socket::{Answer, Request};
use super::vm::VmThread;
use crate::acceptors::News as VoterNews;
use crate::api::types::{Health, ModuleStatus, State};
use crate::eventlog::EventLog;
use crate::host::now;
use std::cell::RefCell;
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};
use tokio::sync::{oneshot, watch};
use tokio::task::{JoinHandle, LocalSet, spawn_local};
use vmtwin_core::arbiter::message::{Ballot, Request as VoterRequest};
use vmtwin_core::arbiter::{Acceptor, Stored};
use vmtwin_core::ids::{AcceptorId, ModuleId, RecordId, ReplicaId};
use vmtwin_core::module::Settings;
use vmtwin_core::record::Record;
use vmtwin_core::replica::effect::VerifyEnd;
use vmtwin_core::resync::verify::{Progress, Verdict};
use vmtwin_hypervisor::fake::Fake;
use vmtwin_hypervisor::{VmEnd, VmState};

/// However slow the machine is.
const LONG: Duration = Duration::from_secs(120);
const H1: usize = 0;
const H2: usize = 1;
const WITNESS: usize = 2;

#[test]
fn both_start_and_the_second_one_joins() {
    story(async |pair| {
        pair.start_both().await;
        assert_eq!((pair.vm(H1).peek(), pair.vm(H2).starts()), (VmState::Running, 0));
        let status = pair.status(H1).await;
        assert_eq!((status.holder.as_deref(), status.in_sync, &status.link[..]), (Some("h1"), true, "up"));
        let times = status.last_takeover.unwrap();
        assert!(times.detected_ms <= times.won_ms && times.won_ms <= times.start_called_ms);
    });
}

#[test]
fn a_host_that_dies_loses_its_vm_to_the_other_one_and_comes_back_as_its_replica() {
    story(async |pair| {
        pair.start_both().await;
        pair.kill_host(H1);
        pair.until("h2 goes on alone", H2, |s| s.state == State::Alone && s.health == Health::Green).await;
        assert_eq!(pair.vm(H2).peek(), VmState::Running);
        pair.boot_host(H1, true);
        pair.until("h1 is the replica", H1, |s| s.state == State::Second && s.health == Health::Green).await;
        pair.until("h2 has a peer", H2, |s| s.state == State::Prim && s.health == Health::Green).await;
        assert_eq!(pair.vm(H1).starts(), 0, "a new host, and its VM was never started on it");
    });
}

#[test]
fn a_swap_moves_the_vm_and_keeps_both_in_sync_there_and_back() {
    story(async |pair| {
        pair.start_both().await;
        pair.done(H1, Request::Swap).await;
        pair.until("h2 runs it", H2, |s| s.state == State::Prim && s.health == Health::Green).await;
        assert_eq!(pair.vm(H1).peek(), VmState::Off);
        pair.until("h1 follows", H1, |s| s.state == State::Second && s.health == Health::Green).await;
        pair.done(H2, Request::Swap).await;
        pair.until("h1 runs it", H1, |s| s.state == State::Prim && s.health == Health::Green).await;
        let refused = pair.ask(H2, Request::Swap).await;
        assert_eq!((refused.ok, refused.code), (false, Some(3)), "{refused:?}");
    });
}

#[test]
fn stop_ends_both_processes_with_success_and_is_no_takeover() {
    story(async |pair| {
        pair.start_both().await;
        let told = pair.tell(H2, Request::Stop { both: true });
        pair.done(H1, Request::Stop { both: true }).await;
        assert!(told.await.unwrap().ok);
        assert_eq!((pair.exit(H1).await, pair.exit(H2).await), (0, 0));
        assert_eq!((pair.vm(H1).peek(), pair.vm(H2).starts()), (VmState::Off, 0));
        // Started again, it goes on.
        pair.start(H1);
        pair.start(H2);
        pair.until_green().await;
    });
}

#[test]
fn a_guest_that_powers_off_stops_the_module_on_both_nodes() {
    story(async |pair| {
        pair.start_both().await;
        pair.vm(H1).end(VmEnd::GuestShutdown);
        assert_eq!((pair.exit(H1).await, pair.exit(H2).await), (0, 0));
        assert_eq!((pair.vm(H1).starts(), pair.vm(H2).starts()), (1, 0));
    });
}

#[test]
fn a_vm_that_crashes_is_started_again_in_place() {
    story(async |pair| {
        pair.start_both().await;
        pair.vm(H1).end(VmEnd::Crashed);
        pair.wait("started again", |pair| pair.vm(H1).starts() == 2 && pair.vm(H1).peek() == VmState::Running).await;
        pair.until_green().await;
    });
}

#[test]
fn a_verification_is_begun_where_the_vm_runs_and_its_proof_is_in_the_status() {
    story(async |pair| {
        pair.start_both().await;
        pair.until_green().await;
        let verify = Request::Verify { rate: 1 << 30, repair: false };
        let refused = pair.ask(H2, verify).await;
        assert_eq!((refused.ok, refused.code), (false, Some(3)), "{refused:?}");
        let begun = pair.ask(H1, verify).await.begun_ms.unwrap();
        pair.until("the proof", H1, |s| s.proved_equal.is_some()).await;
        let status = pair.status(H1).await;
        let verified = status.verified.unwrap();
        assert_eq!((verified.begun_ms, verified.verdict), (begun, crate::api::types::Verdict::Equal));
        assert_eq!((status.verify, status.proved_equal), (None, Some(verified.ended)));
    });
}

#[test]
fn a_lost_witness_changes_nothing_but_a_note() {
    story(async |pair| {
        pair.start_both().await;
        pair.reach(WITNESS, false);
        let noted = |s: &ModuleStatus| s.notes.iter().any(|n| n.contains("2 of 3 acceptors"));
        pair.until("noted", H1, noted).await;
        pair.until_green().await;
        assert_eq!(pair.vm(H1).starts() + pair.vm(H2).starts(), 1);
    });
}

#[test]
fn a_cut_link_with_the_witness_in_reach_restarts_nothing_and_the_peer_catches_up() {
    story(async |pair| {
        pair.start_both().await;
        pair.cable(false);
        pair.until("alone", H1, |s| s.state == State::Alone && s.health == Health::Green).await;
        pair.until("out", H2, |s| !s.in_sync).await;
        pair.cable(true);
        pair.until_green().await;
        assert_eq!(pair.vm(H1).starts() + pair.vm(H2).starts(), 1);
    });
}

#[test]
fn a_module_process_that_dies_on_a_living_host_is_followed_by_a_fresh_vm() {
    story(async |pair| {
        pair.start_both().await;
        pair.kill_process(H1);
        assert_eq!(pair.vm(H1).peek(), VmState::Running, "left behind, on a dead mount");
        pair.start(H1);
        pair.wait("a fresh VM", |pair| pair.vm(H1).starts() + pair.vm(H2).starts() == 2).await;
        pair.until_green().await;
        let running = [H1, H2].map(|node| usize::from(pair.vm(node).peek() == VmState::Running));
        assert_eq!(running.iter().sum::<usize>(), 1);
    });
}

#[test]
fn both_nodes_restarted_come_back_in_sync_with_one_vm() {
    story(async |pair| {
        pair.start_both().await;
        for broken in [false, true] {
            pair.kill_host(H1);
            pair.kill_host(H2);
            pair.boot_host(H2, broken);
            pair.boot_host(H1, broken);
            pair.until_green().await;
            assert_eq!(pair.vm(H1).starts() + pair.vm(H2).starts(), 1);
        }
    });
}

#[test]
fn an_isolated_holder_is_deposed_and_its_vm_killed_when_it_hears_of_it() {
    story(async |pair| {
        pair.start_both().await;
        pair.cable(false);
        pair.isolate(H1, true);
        pair.until("h2 goes on", H2, |s| s.state == State::Alone && s.health == Health::Green).await;
        pair.until("h1 stands", H1, |s| s.health == Health::Red).await;
        pair.wait("h1's VM is paused", |pair| pair.vm(H1).peek() == VmState::Paused).await;
        pair.isolate(H1, false);
        pair.cable(true);
        pair.until("h1 follows", H1, |s| s.state == State::Second && s.health == Health::Green).await;
        assert_eq!(pair.vm(H1).peek(), VmState::Off);
    });
}

#[test]
fn a_disk_that_fails_on_the_holder_moves_the_vm() {
    story(async |pair| {
        pair.start_both().await;
        pair.world.borrow().sides[H1].news(FromData::Erred("EIO".to_owned()));
        pair.until("h2 runs it", H2, |s| s.holder.as_deref() == Some("h2") && s.vm == "running").await;
        assert_eq!((pair.vm(H1).peek(), pair.vm(H1).starts()), (VmState::Off, 1));
        pair.until_green().await;
    });
}

#[test]
fn sigterm_on_the_holder_hands_over() {
    story(async |pair| {
        pair.start_both().await;
        pair.world.borrow().sides[H1].news.as_ref().unwrap().send(News::Terminate).unwrap();
        assert_eq!(pair.exit(H1).await, 143);
        pair.until("h2 runs it", H2, |s| s.vm == "running").await;
    });
}

// The pretended world.

fn on_one_thread(body: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    LocalSet::new().block_on(&runtime, body);
}

fn story(body: impl AsyncFnOnce(&mut Pair)) {
    on_one_thread(async {
        let mut pair = Pair::new(replica(H1), Rc::new(open_pretended));
        body(&mut pair).await;
    });
}

fn replica(node: usize) -> ReplicaId {
    ReplicaId(node as u128 + 1)
}

fn voter(place: usize) -> AcceptorId {
    AcceptorId(place as u128 + 11)
}

#[derive(Default)]
struct Side {
    /// To the control loop of the process, while there is one.
    news: Option<UnboundedSender<News>>,
    lease: Arc<Lease>,
    open: bool,
    record: Option<Record>,
    stored: Option<Record>,
    broken: bool,
    drained: bool,
}

impl Side {
    fn news(&self, news: FromData) {
        self.tell(News::Data(news));
    }
    fn tell(&self, news: News) {
        if let Some(to) = &self.news {
            let _ = to.send(news);
        }
    }
    fn serves(&self, node: usize) -> bool {
        let held = self.record.as_ref().is_some_and(|r| r.holder == replica(node));
        self.open && held && !self.drained && now() < self.lease.until()
    }
}

struct World {
    sides: [Side; 2],
    cable: bool,
    linked: bool,
    voters: [Acceptor; 3],
    /// Whether a voter lives, and which node is cut off from the others.
    reachable: [bool; 3],
    isolated: Option<usize>,
}

impl World {
    fn reaches(&self, node: usize, place: usize) -> bool {
        let cut = self.isolated.is_some_and(|isolated| (isolated == node) != (isolated == place));
        self.reachable[place] && !cut
    }

    /// What follows for the link and, on the holder, for its peer.
    fn settle(&mut self) {
        let up = self.cable && self.sides.iter().all(|side| side.open);
        if up != self.linked {
            self.linked = up;
            for node in [H1, H2] {
                let other = &self.sides[1 - node];
                let news = if up {
                    let (replica, record) = (replica(1 - node), other.record.clone().or(other.stored.clone()));
                    FromData::PeerUp(PeerUp { replica, broken: other.broken, erred: false, record })
                } else {
                    FromData::PeerDown("cut".to_owned())
                };
                if self.sides[node].open {
                    self.sides[node].news(news);
                }
            }
        }
        for node in [H1, H2] {
            let (side, peer) = (&self.sides[node], replica(1 - node));
            let Some(record) = side.record.as_ref().filter(|r| side.open && r.holder == replica(node)) else {
                continue;
            };
            match (self.linked, record.is_in_sync(peer)) {
                (false, true) => side.news(FromData::Propose(Change::DropPeer)),
                (true, false) if self.sides[1 - node].record.as_ref() == Some(record) => {
                    let half = ResyncProgress { bytes_total: 2, bytes_done: 1, ..ResyncProgress::default() };
                    side.news(FromData::Resync(half));
                    side.news(FromData::Propose(Change::JoinPeer(peer)));
                }
                _ => {}
            }
        }
    }
}

struct PretendedData {
    world: Rc<RefCell<World>>,
    node: usize,
}

impl DataPort for PretendedData {
    fn order(&self, order: ToData) {
        let mut world = self.world.borrow_mut();
        let (node, linked) = (self.node, world.linked);
        let side = &mut world.sides[node];
        match order {
            ToData::Record(record) => {
                side.record = Some(record.clone());
                side.stored = Some(record.clone());
                side.news(FromData::InForce(record.id));
                side.drained = false;
                if record.is_in_sync(replica(node)) {
                    side.broken = false;
                }
                if linked && record.holder == replica(node) {
                    world.sides[1 - node].news(FromData::OtherRecord(record));
                }
                world.settle();
            }
            ToData::NotLanded(_) | ToData::LeaseRenewed => {
                let world = self.world.clone();
                spawn_local(async move {
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    world.borrow_mut().settle();
                });
            }
            ToData::Drain(token) => {
                side.drained = true;
                side.news(FromData::Drained(token));
            }
            ToData::Undrain => side.drained = false,
            ToData::Quiesce(token) => side.news(FromData::Quiesced { token, both: linked }),
            ToData::Tell(word) if linked => world.sides[1 - node].news(FromData::Told(word)),
            ToData::End => {
                side.news(FromData::Ended(Ok(())));
                (side.open, side.record) = (false, None);
                world.settle();
            }
            ToData::Verify { repair, .. } => {
                side.news(FromData::Verify(Progress::default()));
                side.news(FromData::Verify(Progress { bytes_total: 2, bytes_done: 1 }));
                side.news(FromData::Verified(VerifyEnd::Done { verdict: Verdict::default(), repaired: repair }));
            }
            ToData::Tell(_) | ToData::Proposed(..) | ToData::Link(_) | ToData::Unquiesce | ToData::FailHeld => {}
        }
    }
}

struct PretendedVoters {
    world: Rc<RefCell<World>>,
    node: usize,
}

impl PretendedVoters {
    /// Own first.
    fn places(&self) -> [usize; 3] {
        [self.node, 1 - self.node, WITNESS]
    }
}

impl VoterPort for PretendedVoters {
    fn ask(&self, to: AcceptorId, nonce: u64, request: VoterRequest) -> bool {
        let mut world = self.world.borrow_mut();
        let places = self.places();
        let Some(place) = places.iter().position(|p| voter(*p) == to) else { return false };
        if !world.reaches(self.node, places[place]) {
            return false;
        }
        let answer = world.voters[places[place]].handle(now(), &request).answer;
        world.sides[self.node].tell(News::Voters(VoterNews::Answer { place, nonce, answer }));
        true
    }
    fn ids(&self) -> Vec<Option<AcceptorId>> {
        let world = self.world.borrow();
        self.places().iter().map(|p| world.reaches(self.node, *p).then(|| voter(*p))).collect()
    }
}

/// Starts the data thread of a node: a pretended one, or a real one.
type Opener = Rc<dyn Fn(&Rc<RefCell<World>>, usize, Arc<Lease>) -> Result<Box<dyn DataPort>, String>>;

fn open_pretended(world: &Rc<RefCell<World>>, node: usize, _lease: Arc<Lease>) -> Result<Box<dyn DataPort>, String> {
    let mut all = world.borrow_mut();
    let side = &mut all.sides[node];
    (side.open, side.drained) = (true, false);
    let (record, broken) = (side.stored.clone(), side.broken);
    let opened = Opened { replica: replica(node), record, broken, erred: false, suspect_all: false };
    side.news(FromData::Ready(opened));
    all.settle();
    Ok(Box::new(PretendedData { world: world.clone(), node }))
}

struct Pair {
    opener: Opener,
    /// Whether each process misses its link.
    link_wanted: Rc<RefCell<[watch::Receiver<bool>; 2]>>,
    definitions: [std::path::PathBuf; 2],
    world: Rc<RefCell<World>>,
    vms: [Fake; 2],
    processes: [Option<JoinHandle<u8>>; 2],
    _folder: tempfile::TempDir,
}

impl Pair {
    fn new(holder: ReplicaId, opener: Opener) -> Self {
        let record = Record::first(RecordId(1), holder, (0..3).map(voter).collect());
        let voters = [0, 1, 2].map(|place| {
            let mut acceptor = Acceptor::new(Stored::new(ModuleId(7), voter(place)), now());
            let ballot = Ballot { number: 1, node: voter(0) };
            let accepted = acceptor.handle(now(), &VoterRequest::Accept { ballot, record: record.clone() });
            assert!(accepted.save);
            acceptor
        });
        let world = World {
            sides: Default::default(),
            cable: true,
            linked: false,
            voters,
            reachable: [true; 3],
            isolated: None,
        };
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("domain.xml"), "<domain/>").unwrap();
        let definitions = [(); 2].map(|()| folder.path().join("domain.xml"));
        let link_wanted = Rc::new(RefCell::new([(); 2].map(|()| watch::channel(false).1)));
        let world = Rc::new(RefCell::new(world));
        let vms = [(); 2].map(|()| Fake::new("db"));
        Self { opener, link_wanted, definitions, world, vms, processes: [None, None], _folder: folder }
    }

    fn vm(&self, node: usize) -> &Fake {
        &self.vms[node]
    }

    fn start(&mut self, node: usize) {
        let (to, news) = unbounded_channel();
        let lease = Arc::<Lease>::default();
        {
            let side = &mut self.world.borrow_mut().sides[node];
            (side.news, side.lease) = (Some(to.clone()), lease.clone());
        }
        let (world, opener, for_data) = (self.world.clone(), self.opener.clone(), lease.clone());
        let open_data = move || opener(&world, node, for_data.clone());
        let link_wanted = watch::Sender::new(false);
        self.link_wanted.borrow_mut()[node] = link_wanted.subscribe();
        let vm_news = to.clone();
        let tell = Arc::new(move |news| drop(vm_news.send(News::Vm(news))));
        let definition = self.definitions[node].clone();
        let names = ["h1", "h2"];
        let parts = Parts {
            settings: Settings {
                module: "db".to_owned(),
                node: names[node].to_owned(),
                peer: names[1 - node].to_owned(),
                failover: true,
                restart_on_guest_shutdown: false,
                stop_limit: Duration::from_secs(180),
            },
            link_protection: "tls",
            lease,
            open_data: Box::new(open_data),
            voters: Box::new(PretendedVoters { world: self.world.clone(), node }),
            vm: VmThread::start(Arc::new(self.vms[node].clone()), definition, tell).unwrap(),
            log: EventLog::open(Path::new("/dev/null"), names[node], "db"),
            link_wanted,
        };
        self.processes[node] = Some(spawn_local(async move { Control::new(parts).run(news).await.unwrap() }));
        self.tell_reach(node);
    }

    /// The voters' connections, as the process sees them.
    fn tell_reach(&self, node: usize) {
        let voters = PretendedVoters { world: self.world.clone(), node };
        for (place, id) in voters.ids().into_iter().enumerate() {
            let news = match id {
                Some(_) => VoterNews::Up { place, id },
                None => VoterNews::Down { place, why: "cut".to_owned() },
            };
            self.world.borrow().sides[node].tell(News::Voters(news));
        }
    }

    async fn start_both(&mut self) {
        self.start(H1);
        self.until("h1 starts it", H1, |s| s.vm == "running").await;
        self.start(H2);
        self.until_green().await;
    }

    fn kill_process(&mut self, node: usize) {
        if let Some(process) = self.processes[node].take() {
            process.abort();
        }
        let mut world = self.world.borrow_mut();
        let side = &mut world.sides[node];
        (side.news, side.open, side.record) = (None, false, None);
        world.settle();
    }

    fn kill_host(&mut self, node: usize) {
        self.kill_process(node);
        self.vms[node] = Fake::new("db");
        self.reach(node, false);
    }

    fn boot_host(&mut self, node: usize, broken: bool) {
        self.world.borrow_mut().sides[node].broken = broken;
        self.reach(node, true);
        self.start(node);
    }

    fn reach(&self, place: usize, up: bool) {
        self.world.borrow_mut().reachable[place] = up;
        self.tell_reach(H1);
        self.tell_reach(H2);
    }

    fn isolate(&self, node: usize, cut: bool) {
        self.world.borrow_mut().isolated = cut.then_some(node);
        self.tell_reach(H1);
        self.tell_reach(H2);
    }

    fn cable(&self, whole: bool) {
        let mut world = self.world.borrow_mut();
        world.cable = whole;
        world.settle();
    }

    fn tell(&self, node: usize, request: Request) -> oneshot::Receiver<Answer> {
        let (to, answer) = oneshot::channel();
        self.world.borrow().sides[node].tell(News::Request(request, to));
        answer
    }

    async fn ask(&self, node: usize, request: Request) -> Answer {
        self.tell(node, request).await.expect("the process answers")
    }

    async fn done(&self, node: usize, request: Request) {
        let answer = self.ask(node, request).await;
        assert!(answer.ok, "{request:?}: {answer:?}");
    }

    async fn status(&self, node: usize) -> ModuleStatus {
        self.ask(node, Request::Status).await.status.unwrap()
    }

    async fn exit(&mut self, node: usize) -> u8 {
        let process = self.processes[node].take().unwrap();
        tokio::time::timeout(LONG, process).await.expect("the process ends").unwrap()
    }

    fn check(&self) {
        let world = self.world.borrow();
        let serving = [H1, H2].into_iter().filter(|node| world.sides[*node].serves(*node)).count();
        assert!(serving < 2, "two nodes serve");
    }

    async fn wait(&self, what: &str, come: impl Fn(&Self) -> bool) {
        let since = now();
        while !come(self) {
            self.check();
            assert!(now().since(since) < LONG, "{what}: not in {LONG:?}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    async fn until(&self, what: &str, node: usize, come: impl Fn(&ModuleStatus) -> bool) {
        let since = now();
        loop {
            let status = self.status(node).await;
            self.check();
            if come(&status) {
                return;
            }
            assert!(now().since(since) < LONG, "{what}: {status:?}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// One PRIM, one SECOND, both green, whoever is which.
    async fn until_green(&self) {
        let since = now();
        loop {
            let (one, two) = (self.status(H1).await, self.status(H2).await);
            self.check();
            let green = one.health == Health::Green && two.health == Health::Green;
            let states = [one.state, two.state];
            if green && states.contains(&State::Prim) && states.contains(&State::Second) {
                return;
            }
            assert!(now().since(since) < LONG, "not green: {one:?} {two:?}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}
