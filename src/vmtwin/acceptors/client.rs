//! The way from a module process to its voters: one standing connection to each, requests out, answers in.
//!
//! Requests may be lost (no connection, one that ended): the proposer asks again, an answer to an old question is known by
//! its nonce. Holds no decision.
use super::wire::{Ask, Call, Reply, read_frame, write_frame};
use crate::config::paths::{PORT_LINK, PORT_WITNESS};
use crate::config::{Cluster, Paths};
use crate::keep::preamble::Preamble;
use crate::{listen, trust};
use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsConnector;
use vmtwin_core::arbiter::message::{Answer, Request};
use vmtwin_core::ids::{AcceptorId, ModuleId, NodeName};

const CONNECT_TIME: Duration = Duration::from_millis(1000);
/// An answer that takes longer serves nobody; a connection that keeps one back longer is made anew.
const ANSWER_TIME: Duration = Duration::from_secs(3);
const BACKOFF_MIN: Duration = Duration::from_millis(50);
const BACKOFF_MAX: Duration = Duration::from_millis(250);
const CALLS_MAX: usize = 64;
const NEWS_MAX: usize = 256;

/// A process that keeps votes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// Node or witness.
    pub name: String,
    /// How to get there.
    pub reach: Reach,
}

/// How to get there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reach {
    /// This node's own `keep`.
    Local(PathBuf),
    /// Another node's `keep`, at any of these.
    Keep(Vec<SocketAddr>),
    /// A witness.
    Witness(SocketAddr),
}

/// The three voters of a module on the nodes `me` and `peer`: own `keep`, the peer's, the witness.
#[must_use]
pub fn places(paths: &Paths, cluster: &Cluster, me: &NodeName, peer: &NodeName) -> Vec<Place> {
    let mut addresses: Vec<_> = cluster.node(peer).into_iter().flat_map(|n| &n.addresses).map(|a| a.ip).collect();
    let first = cluster.node(peer).map(crate::config::Node::address);
    addresses.sort_by_key(|ip| Some(*ip) != first);
    let keeps = addresses.into_iter().map(|ip| SocketAddr::new(ip, PORT_LINK)).collect();
    let witness = SocketAddr::new(cluster.witness.address, PORT_WITNESS);
    vec![
        Place { name: me.to_string(), reach: Reach::Local(paths.keep_socket()) },
        Place { name: peer.to_string(), reach: Reach::Keep(keeps) },
        Place { name: cluster.witness.name.to_string(), reach: Reach::Witness(witness) },
    ]
}

/// News of the voters. `place` is the index in the list given to `connect`.
#[derive(Clone, Debug, PartialEq)]
#[expect(clippy::large_enum_variant, reason = "it lives for one hop through a short queue")]
pub enum News {
    /// It can be asked; no id: it has no state of this module.
    Up {
        /// Which.
        place: usize,
        /// Its id.
        id: Option<AcceptorId>,
    },
    /// It cannot, for now.
    Down {
        /// Which.
        place: usize,
        /// In words.
        why: String,
    },
    /// An answer.
    Answer {
        /// Which.
        place: usize,
        /// Of the request.
        nonce: u64,
        /// What it says.
        answer: Answer,
    },
    /// It could not answer (its disk, no state).
    Refused {
        /// Which.
        place: usize,
        /// Of the request.
        nonce: u64,
        /// In words.
        why: String,
    },
}

/// The connections to all voters; they end when this is dropped.
#[derive(Debug)]
pub struct Acceptors {
    links: Vec<Link>,
    module: ModuleId,
}

#[derive(Debug)]
struct Link {
    /// The id of the acceptor while it is connected. Guards one word; never held over a wait.
    id: Arc<Mutex<Option<AcceptorId>>>,
    calls: mpsc::Sender<Call>,
    task: JoinHandle<()>,
}

impl Drop for Link {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Acceptors {
    /// Begins to connect to all of them, for one module.
    #[must_use]
    pub fn connect(paths: &Paths, places: Vec<Place>, module: ModuleId) -> (Self, mpsc::Receiver<News>) {
        let (news, receiver) = mpsc::channel(NEWS_MAX);
        let links = places.into_iter().enumerate().map(|(number, place)| {
            let (calls, queue) = mpsc::channel(CALLS_MAX);
            let id = Arc::new(Mutex::new(None));
            let dialer =
                Dialer { paths: paths.clone(), place, number, module, id: id.clone(), news: news.clone(), turn: 0 };
            Link { id, calls, task: tokio::spawn(dialer.run(queue)) }
        });
        (Self { links: links.collect(), module }, receiver)
    }

    /// Sends a request to the acceptor with this id. False: not connected, or it does not keep up; ask again later.
    #[must_use]
    pub fn ask(&self, to: AcceptorId, nonce: u64, request: Request) -> bool {
        let link = self.links.iter().find(|link| *link.id.lock().expect("nothing panics under it") == Some(to));
        let call = Call { nonce, module: self.module, ask: Ask::Core(request) };
        link.is_some_and(|link| link.calls.try_send(call).is_ok())
    }

    /// Ids of the acceptors that are connected now, in the order of the places.
    #[must_use]
    pub fn ids(&self) -> Vec<Option<AcceptorId>> {
        self.links.iter().map(|link| *link.id.lock().expect("nothing panics under it")).collect()
    }
}

trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Stream for T {}

/// One question over a connection of its own: how `protect` makes and `unprotect` forgets a voter.
///
/// # Errors
/// No contact, or no answer in time.
pub async fn ask_once(paths: &Paths, place: &Place, module: ModuleId, ask: Ask) -> io::Result<Reply> {
    let late = |_| io::Error::other("no answer in time");
    timeout(3 * ANSWER_TIME, async {
        let mut stream = open(paths, place, 0).await?;
        ask_on(&mut stream, &Call { nonce: 0, module, ask }).await
    })
    .await
    .map_err(late)?
}

async fn ask_on(stream: &mut Box<dyn Stream>, call: &Call) -> io::Result<Reply> {
    write_frame(stream, &call.encode()).await?;
    let bytes = read_frame(stream).await?.ok_or_else(|| io::Error::other("closed without an answer"))?;
    Reply::decode(&bytes).map(|(_, reply)| reply).map_err(io::Error::other)
}

/// A connection; of several addresses, the one whose turn it is.
async fn open(paths: &Paths, place: &Place, turn: usize) -> io::Result<Box<dyn Stream>> {
    let (address, preamble) = match &place.reach {
        Reach::Local(socket) => return Ok(Box::new(UnixStream::connect(socket).await?)),
        Reach::Keep(all) if all.is_empty() => return Err(io::Error::other("cluster.xml has no such node")),
        Reach::Keep(all) => (all[turn % all.len()], Some(Preamble::Acceptors)),
        Reach::Witness(address) => (*address, None),
    };
    let config = trust::client_config(paths, &place.name).map_err(io::Error::other)?;
    let mut stream = TcpStream::connect(address).await?;
    listen::tune(&stream);
    if let Some(preamble) = preamble {
        stream.write_all(&preamble.encode()).await?;
    }
    Ok(Box::new(TlsConnector::from(config).connect(trust::server_name(), stream).await?))
}

/// Keeps one connection up.
struct Dialer {
    paths: Paths,
    place: Place,
    number: usize,
    module: ModuleId,
    id: Arc<Mutex<Option<AcceptorId>>>,
    news: mpsc::Sender<News>,
    turn: usize,
}

impl Dialer {
    async fn run(mut self, mut calls: mpsc::Receiver<Call>) {
        let mut backoff = BACKOFF_MIN;
        let mut told = None;
        loop {
            let why = match self.dial().await {
                Ok((stream, id)) => {
                    // What was asked of the last connection is answered by nobody any more.
                    while calls.try_recv().is_ok() {}
                    *self.id.lock().expect("nothing panics under it") = id;
                    backoff = BACKOFF_MIN;
                    if self.news.send(News::Up { place: self.number, id }).await.is_err() {
                        return;
                    }
                    told = None;
                    // One without state may get one: look again soon.
                    let why = if id.is_some() {
                        self.carry(stream, &mut calls).await
                    } else {
                        "it has no vote of this module".to_owned()
                    };
                    *self.id.lock().expect("nothing panics under it") = None;
                    why
                }
                Err(e) => e.to_string(),
            };
            if told.as_ref() != Some(&why) {
                if self.news.send(News::Down { place: self.number, why: why.clone() }).await.is_err() {
                    return;
                }
                told = Some(why);
            }
            sleep(backoff).await;
            backoff = (backoff * 2).min(BACKOFF_MAX);
            self.turn += 1;
        }
    }

    async fn dial(&self) -> io::Result<(Box<dyn Stream>, Option<AcceptorId>)> {
        let late = |_| io::Error::other("no answer in time");
        let mut stream = timeout(CONNECT_TIME, open(&self.paths, &self.place, self.turn)).await.map_err(late)??;
        let who = Call { nonce: 0, module: self.module, ask: Ask::Who };
        match timeout(ANSWER_TIME, ask_on(&mut stream, &who)).await.map_err(late)?? {
            Reply::Id(id) => Ok((stream, id)),
            Reply::Refused(why) => Err(io::Error::other(why)),
            Reply::Core(_) => Err(io::Error::other("an answer that was not asked for")),
        }
    }

    /// Requests out, answers in, until it ends; says why.
    async fn carry(&self, stream: Box<dyn Stream>, calls: &mut mpsc::Receiver<Call>) -> String {
        let (mut from, mut to) = tokio::io::split(stream);
        let waiting: Mutex<BTreeMap<u64, Instant>> = Mutex::default();
        let waiting = || waiting.lock().expect("nothing panics under it");
        let read = async {
            loop {
                let bytes = match read_frame(&mut from).await {
                    Ok(Some(bytes)) => bytes,
                    Ok(None) => return "it closed the connection".to_owned(),
                    Err(e) => return e.to_string(),
                };
                let news = match Reply::decode(&bytes) {
                    Ok((nonce, Reply::Core(answer))) => News::Answer { place: self.number, nonce, answer },
                    Ok((nonce, Reply::Refused(why))) => News::Refused { place: self.number, nonce, why },
                    Ok((_, Reply::Id(_))) => continue,
                    Err(e) => return e.to_string(),
                };
                if let News::Answer { nonce, .. } | News::Refused { nonce, .. } = &news {
                    waiting().remove(nonce);
                }
                if self.news.send(news).await.is_err() {
                    return "nobody listens".to_owned();
                }
            }
        };
        let write = async {
            while let Some(call) = calls.recv().await {
                waiting().insert(call.nonce, Instant::now());
                if let Err(e) = write_frame(&mut to, &call.encode()).await {
                    return e.to_string();
                }
            }
            std::future::pending().await
        };
        let watch = async {
            loop {
                sleep(ANSWER_TIME / 10).await;
                if waiting().values().any(|since| since.elapsed() > ANSWER_TIME) {
                    return "no answer in time".to_owned();
                }
            }
        };
        tokio::select! { why = read => why, why = write => why, why = watch => why }
    }
}
