//! Listening on all of this node's addresses, as cluster.xml has them now, with a bound on strangers.
//!
//! Invariant: who has not shown a certificate yet holds at most a few places per source, for a few seconds, so that noise at
//! a port cannot keep members out. What was turned away is counted and logged once per source and minute.
use crate::config::{Cluster, Paths};
use crate::{host, trust};
use std::collections::BTreeMap;
use std::future::Future;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{JoinHandle, JoinSet};
use vmtwin_core::ids::NodeName;

/// A connection that has not shown whose it is by then is closed.
pub const STRANGER_TIME: Duration = Duration::from_secs(5);
const STRANGERS_PER_SOURCE_MAX: usize = 32;
const STRANGERS_MAX: usize = 512;
const LOOK_AGAIN: Duration = Duration::from_millis(500);
const SOURCES_MAX: usize = 1024;
const MINUTE: Duration = Duration::from_secs(60);

/// Who waits at the ports of this process.
#[derive(Debug, Default)]
pub struct Door {
    /// Guards the counts; never held over a wait.
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    waiting: BTreeMap<IpAddr, usize>,
    turned_away: BTreeMap<IpAddr, (Instant, u64)>,
}

/// A stranger's place; dropped when it has shown a certificate.
#[derive(Debug)]
pub struct Place {
    door: Arc<Door>,
    source: IpAddr,
}

impl Place {
    /// Counts this connection as one that was closed, and logs the first of each minute.
    pub fn turned_away(&self, why: &str) {
        self.door.turned_away(self.source, why);
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut inner = self.door.inner.lock().expect("nothing panics under it");
        if let Some(count) = inner.waiting.get_mut(&self.source) {
            *count -= 1;
            if *count == 0 {
                inner.waiting.remove(&self.source);
            }
        }
    }
}

impl Door {
    /// A place for a connection from here; `None` where too many wait.
    pub fn enter(self: &Arc<Self>, source: IpAddr) -> Option<Place> {
        let mut inner = self.inner.lock().expect("nothing panics under it");
        let all: usize = inner.waiting.values().sum();
        let mine = inner.waiting.entry(source).or_default();
        if *mine >= STRANGERS_PER_SOURCE_MAX || all >= STRANGERS_MAX {
            return None;
        }
        *mine += 1;
        Some(Place { door: self.clone(), source })
    }

    /// Counts a connection that was closed, and logs the first of each minute.
    pub fn turned_away(&self, source: IpAddr, why: &str) {
        let mut inner = self.inner.lock().expect("nothing panics under it");
        let now = Instant::now();
        inner.turned_away.retain(|_, (since, _)| now.duration_since(*since) < 10 * MINUTE);
        if inner.turned_away.len() >= SOURCES_MAX && !inner.turned_away.contains_key(&source) {
            return;
        }
        let first = !inner.turned_away.contains_key(&source);
        let (since, count) = inner.turned_away.entry(source).or_insert((now, 0));
        *count += 1;
        if first || now.duration_since(*since) >= MINUTE {
            let counted = std::mem::take(count);
            *since = now;
            drop(inner);
            host::warn(&format!("closed a connection from {source}: {why} ({counted} since the last such line)"));
        }
    }
}

/// Sets what every connection of ours has: no delay of small frames, no pacing, and an end when the other host is silent.
pub fn tune(stream: &TcpStream) {
    let socket = socket2::SockRef::from(stream);
    // Each of these only makes it faster or sooner noticed: none is a condition.
    let _ = socket.set_tcp_nodelay(true);
    let _ = socket.set_tcp_congestion(b"reno");
    let _ = socket.set_tcp_user_timeout(Some(Duration::from_secs(3)));
    let beat = socket2::TcpKeepalive::new().with_time(Duration::from_secs(3)).with_interval(Duration::from_secs(1));
    let _ = socket.set_tcp_keepalive(&beat.with_retries(3));
}

/// Listens at one address for ever; one that is not there yet (at boot) is tried again.
pub async fn at<F, Done>(address: SocketAddr, door: Arc<Door>, serve: F)
where
    F: Fn(TcpStream, SocketAddr, Place) -> Done,
    Done: Future<Output = ()> + Send + 'static,
{
    let mut said = false;
    let listener = loop {
        match TcpListener::bind(address).await {
            Ok(listener) => break listener,
            Err(e) if !said => {
                host::warn(&format!("cannot listen at {address} yet: {e}"));
                said = true;
            }
            Err(_) => {}
        }
        tokio::time::sleep(LOOK_AGAIN).await;
    };
    host::info(&format!("listening at {address}"));
    // Connections end with their listener.
    let mut serving = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            Some(_) = serving.join_next() => continue,
        };
        match accepted {
            Ok((stream, from)) => match door.enter(from.ip()) {
                Some(place) => {
                    tune(&stream);
                    serving.spawn(serve(stream, from, place));
                }
                None => door.turned_away(from.ip(), "too many connections wait from there"),
            },
            // Out of descriptors, most likely: those in use go on.
            Err(_) => tokio::time::sleep(LOOK_AGAIN).await,
        }
    }
}

/// This host's own name and its addresses, as cluster.xml has them; `None` while it is in no cluster.
#[must_use]
pub fn own_addresses(paths: &Paths) -> Option<(NodeName, Vec<IpAddr>)> {
    let cluster = Cluster::load(paths).ok()?;
    let name = NodeName::new(&trust::own_identity(paths).ok()?.name).ok()?;
    let addresses = cluster.node(&name)?.addresses.iter().map(|a| a.ip).collect();
    Some((name, addresses))
}

/// Listens at `port` of all own addresses for ever, following cluster.xml: `start` gives the listener's task.
pub async fn follow(paths: &Paths, port: u16, mut start: impl FnMut(SocketAddr) -> Option<JoinHandle<()>>) {
    let mut running: BTreeMap<IpAddr, JoinHandle<()>> = BTreeMap::new();
    loop {
        // While the file cannot be read, what runs goes on.
        if let Some((_, wanted)) = own_addresses(paths) {
            running.retain(|ip, task| {
                let keep = wanted.contains(ip);
                if !keep {
                    task.abort();
                }
                keep
            });
            for ip in wanted {
                if let std::collections::btree_map::Entry::Vacant(free) = running.entry(ip)
                    && let Some(task) = start(SocketAddr::new(ip, port))
                {
                    free.insert(task);
                }
            }
        }
        tokio::time::sleep(LOOK_AGAIN).await;
    }
}
