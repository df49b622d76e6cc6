//! `vmtwin keep`: one tiny process per node, the last to be restarted. Votes of all modules; the listener on port 7721; the
//! guardian of VMs whose module process hangs.
//!
//! Keeps out: HTTP, hypervisors, what a module does with the connection that it is given.
pub mod guardian;
pub mod pass;
pub mod preamble;
#[cfg(test)]
mod tests;

use crate::acceptors::Voters;
use crate::config::Paths;
use crate::config::paths::PORT_LINK;
use crate::listen::{self, Door, Place, STRANGER_TIME};
use crate::pidfile::PidFile;
use crate::{host, trust};
use guardian::Guard;
use preamble::{PREAMBLE_BYTES, Preamble};
use rustix::process::Pid;
use rustls::ServerConfig;
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use tokio::io::AsyncReadExt;
use tokio::net::{TcpStream, UnixListener};
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;

/// Runs until it is killed. Another one of this node: ends at once, all is well.
///
/// # Errors
/// Where its folders or its socket cannot be made.
pub async fn run(paths: Paths) -> io::Result<()> {
    paths.create()?;
    let Some(_alone) = PidFile::take(&paths.keep_pid())? else {
        return Ok(());
    };
    serve(paths).await
}

/// As `run`, without the lock.
async fn serve(paths: Paths) -> io::Result<()> {
    let voters = Arc::new(Voters::open(paths.acceptors())?);
    let local = listen_locally(&paths.keep_socket())?;
    let guard = Arc::new(Guard::new(paths.clone()));
    tokio::spawn(serve_locally(local, voters.clone(), guard.clone()));
    tokio::spawn(guard.run(voters.clone()));
    let door = Arc::new(Door::default());
    let shared = paths.clone();
    listen::follow(&paths, PORT_LINK, move |address| {
        let tls = trust::server_config(&shared).ok()?;
        let (paths, voters, door) = (shared.clone(), voters.clone(), door.clone());
        let serve = move |stream, from, place| {
            let (paths, voters, tls) = (paths.clone(), voters.clone(), tls.clone());
            async move { serve_caller(&paths, &voters, tls, stream, from, place).await }
        };
        Some(tokio::spawn(listen::at(address, door, serve)))
    })
    .await;
    Ok(())
}

/// A socket for root's processes on this host.
///
/// # Errors
/// As bind(2) says.
pub fn listen_locally(path: &Path) -> io::Result<UnixListener> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// Whether the process at the other end may ask us: root, or the user that this process runs as.
pub fn is_ours(stream: &tokio::net::UnixStream) -> bool {
    stream.peer_cred().is_ok_and(|who| who.uid() == 0 || who.uid() == rustix::process::geteuid().as_raw())
}

async fn serve_locally(listener: UnixListener, voters: Arc<Voters>, guard: Arc<Guard>) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) if is_ours(&stream) => {
                let (voters, guard) = (voters.clone(), guard.clone());
                let pid = stream.peer_cred().ok().and_then(|who| who.pid()).and_then(Pid::from_raw);
                tokio::spawn(async move { voters.serve(stream, |module, ask| guard.hear(pid, module, ask)).await });
            }
            Ok(_) => {}
            Err(_) => tokio::time::sleep(std::time::Duration::from_millis(100)).await,
        }
    }
}

async fn serve_caller(
    paths: &Paths,
    voters: &Voters,
    tls: Arc<ServerConfig>,
    mut stream: TcpStream,
    from: SocketAddr,
    place: Place,
) {
    let mut bytes = [0; PREAMBLE_BYTES];
    let turned_away = |why: &str| place.turned_away(why);
    match timeout(STRANGER_TIME, stream.read_exact(&mut bytes)).await {
        Ok(Ok(_)) => {}
        Ok(Err(_)) => return turned_away("it closed before it said for whom it was"),
        Err(_) => return turned_away("it did not say for whom it was"),
    }
    match Preamble::decode(&bytes) {
        Err(e) => turned_away(&e.to_string()),
        Ok(Preamble::Module(module)) => {
            let Ok(stream) = stream.into_std() else { return };
            match pass::hand_over(&paths.module_link(&module), &stream, from).await {
                Ok(()) => {}
                Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {
                    turned_away(&format!("module {module} does not run here"));
                }
                Err(e) => turned_away(&format!("module {module} does not take it: {e}")),
            }
        }
        Ok(Preamble::Acceptors) => match timeout(STRANGER_TIME, TlsAcceptor::from(tls).accept(stream)).await {
            Ok(Ok(stream)) => {
                drop(place);
                if let Err(e) = voters.serve(stream, |_, _| ()).await
                    && e.kind() == io::ErrorKind::Other
                {
                    host::warn(&format!("votes asked for from {from}: {e}"));
                }
            }
            Ok(Err(e)) => turned_away(&format!("no handshake: {e}")),
            Err(_) => turned_away("no handshake in time"),
        },
    }
}
