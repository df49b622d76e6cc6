//! Brings connections to the peer's module process: dials while none stands, takes those that `keep` passes on.
//!
//! Holds: attempts under way, bounded. Keeps out: which connection is used (the data thread's), frames. A stranger's
//! connection ends here, in the handshake, and changes nothing; one node of the two dials, so that no two cross.
use crate::config::Paths;
use crate::config::paths::PORT_LINK;
use crate::engine::messages::PeerSocket;
use crate::host;
use crate::keep::pass::Inbox;
use crate::keep::preamble::Preamble;
use crate::link::handshake::{self, HandshakeError};
use crate::trust::{self, Identity};
use rustls::pki_types::CertificateDer;
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::{Semaphore, watch};
use tokio::task::spawn_blocking;
use vmtwin_core::ids::{ModuleName, NodeName};

/// Between two attempts while the link is missing.
const AGAIN: Duration = Duration::from_millis(250);
/// Between two lines about a link that is missing.
const SAY_AGAIN: Duration = Duration::from_secs(60);
/// Handshakes of passed connections at once: a stranger may hold one for as long as a handshake may take.
const HANDSHAKES_MAX: usize = 8;

/// Where the peer is and how the link is protected.
#[derive(Clone, Debug)]
pub struct LinkSettings {
    /// Certificates, cluster.xml.
    pub paths: Paths,
    /// The module.
    pub module: ModuleName,
    /// This node.
    pub me: NodeName,
    /// The other one.
    pub peer: NodeName,
    /// Its addresses, best first, and whether each goes in the clear.
    pub addresses: Vec<(IpAddr, bool)>,
    /// This node's own: whether connections to each go in the clear.
    pub own_addresses: Vec<(IpAddr, bool)>,
}

/// Takes a connection whose hands are shaken.
pub type Deliver = Arc<dyn Fn(PeerSocket) + Send + Sync>;

/// Starts both tasks. Within a tokio runtime.
pub fn start(settings: LinkSettings, inbox: Inbox, wanted: watch::Receiver<bool>, deliver: Deliver) {
    // Both sides notice a lost link by themselves; one dials.
    if settings.me < settings.peer {
        tokio::spawn(dial_while_wanted(settings.clone(), wanted, deliver.clone()));
    }
    tokio::spawn(accept_all(settings, inbox, deliver));
}

async fn dial_while_wanted(settings: LinkSettings, mut wanted: watch::Receiver<bool>, deliver: Deliver) {
    let mut turn = 0;
    let mut said = None;
    while wanted.wait_for(|wanted| *wanted).await.is_ok() {
        let Some(&(ip, clear)) = settings.addresses.get(turn % settings.addresses.len().max(1)) else { return };
        turn += 1;
        let attempt = settings.clone();
        let dialed = spawn_blocking(move || dial(&attempt, ip, clear)).await;
        match dialed.unwrap_or_else(|panic| Err(panic.to_string())) {
            Ok(socket) => {
                said = None;
                deliver(socket);
                // The data thread says hello on it; until it has, another one would only take its place.
                tokio::time::sleep(4 * AGAIN).await;
            }
            Err(why) => {
                // A peer that is away for days must not fill the log.
                if said.is_none_or(|at: Instant| at.elapsed() >= SAY_AGAIN) {
                    host::info(&format!("no link to {} at {ip} yet: {why}", settings.peer));
                    said = Some(Instant::now());
                }
                tokio::time::sleep(AGAIN).await;
            }
        }
    }
}

fn dial(settings: &LinkSettings, ip: IpAddr, clear: bool) -> Result<PeerSocket, String> {
    let config = trust::client_config(&settings.paths, settings.peer.as_str()).map_err(|e| e.to_string())?;
    let preamble = Preamble::Module(settings.module.clone()).encode();
    let who = |certificate: &CertificateDer<'_>| who_is(settings, certificate);
    let address = SocketAddr::new(ip, PORT_LINK);
    handshake::dial(address, &preamble, config, trust::server_name(), clear, &who).map_err(|e| in_words(&e))
}

async fn accept_all(settings: LinkSettings, inbox: Inbox, deliver: Deliver) {
    let places = Arc::new(Semaphore::new(HANDSHAKES_MAX));
    loop {
        let (socket, from) = match inbox.next().await {
            Ok(passed) => passed,
            Err(why) => {
                host::warn(&format!("no connections from keep: {why}"));
                tokio::time::sleep(AGAIN).await;
                continue;
            }
        };
        let Ok(place) = places.clone().try_acquire_owned() else {
            host::warn(&format!("closed a connection from {from}: too many handshakes are under way"));
            continue;
        };
        let (settings, deliver) = (settings.clone(), deliver.clone());
        spawn_blocking(move || {
            match accept(&settings, socket) {
                Ok(socket) => deliver(socket),
                Err(why) => host::warn(&format!("closed a connection from {from}: {why}")),
            }
            drop(place);
        });
    }
}

fn accept(settings: &LinkSettings, socket: TcpStream) -> Result<PeerSocket, String> {
    let local = socket.local_addr().map_err(|e| e.to_string())?.ip();
    let clear = settings.own_addresses.iter().any(|(ip, clear)| *ip == local && *clear);
    let config = trust::server_config(&settings.paths).map_err(|e| e.to_string())?;
    let who = |certificate: &CertificateDer<'_>| who_is(settings, certificate);
    handshake::accept(socket.into(), config, clear, &who).map_err(|e| in_words(&e))
}

/// Only the other node of this module is let in here, whatever else the cluster's authority signed.
fn who_is(settings: &LinkSettings, certificate: &CertificateDer<'_>) -> Result<NodeName, String> {
    let identity = Identity::of(certificate).ok_or("it names no node")?;
    if identity.name == settings.peer.as_str() { Ok(settings.peer.clone()) } else { Err(identity.name) }
}

fn in_words(error: &HandshakeError) -> String {
    let source = std::error::Error::source(error).map(|s| format!(": {s}")).unwrap_or_default();
    format!("{error}{source}")
}
