//! `vmtwin witness`: votes and nothing else, on any machine. All of it lies in its state folder.
use crate::acceptors::Voters;
use crate::config::paths::PORT_WITNESS;
use crate::config::{Cluster, Paths};
use crate::listen::{self, Door, STRANGER_TIME};
use crate::pidfile::PidFile;
use crate::{host, trust};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;

/// Runs until it is killed. `listen`: not at its address in cluster.xml, as it was at the join, but there.
///
/// # Errors
/// Where it has not joined, or another one runs with this state.
pub async fn run(paths: Paths, listen: Option<IpAddr>) -> io::Result<()> {
    let who = trust::own_identity(&paths).map_err(io::Error::other)?;
    let cluster = Cluster::load(&paths).map_err(io::Error::other)?;
    let address = listen.unwrap_or(cluster.witness.address);
    paths.create()?;
    let tls = trust::witness_server_config(&paths).map_err(io::Error::other)?;
    let Some(_alone) = PidFile::take(&paths.run.join("witness.pid"))? else {
        return Err(io::Error::other(format!("a witness with the state in {} runs already", paths.lib.display())));
    };
    let voters = Arc::new(Voters::open(paths.acceptors())?);
    host::info(&format!("witness {who}"));
    let serve = move |stream, from: SocketAddr, place: listen::Place| {
        let (tls, voters) = (TlsAcceptor::from(tls.clone()), voters.clone());
        async move {
            match timeout(STRANGER_TIME, tls.accept(stream)).await {
                Ok(Ok(stream)) => {
                    drop(place);
                    if let Err(e) = voters.serve(stream, |_, _| ()).await
                        && e.kind() == io::ErrorKind::Other
                    {
                        host::warn(&format!("votes asked for from {from}: {e}"));
                    }
                }
                Ok(Err(e)) => place.turned_away(&format!("no handshake: {e}")),
                Err(_) => place.turned_away("no handshake in time"),
            }
        }
    };
    listen::at(SocketAddr::new(address, PORT_WITNESS), Arc::new(Door::default()), serve).await;
    Ok(())
}
