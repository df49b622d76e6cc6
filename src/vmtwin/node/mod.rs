//! `vmtwin node`: the daemon. Starts `keep` and the module processes, answers the CLI and the other nodes.
//!
//! - `processes`  started, watched, found again after a restart of the daemon
//! - `commands`   start, stop, swap and the like, to the process that can do them
//! - `status`     what is to be seen, from all nodes
//! - `configs`    apply: one configuration to all nodes that it concerns, or to none
//! - `join`       the cluster's first steps
//! - `protect`    a VM becomes a module on two nodes, and plain again
//!
//! Invariant: it may die at any time: nothing that protects a VM depends on it, and what it has to know is on disk.
pub mod commands;
pub mod configs;
pub mod join;
pub mod processes;
pub mod protect;
pub mod status;

use crate::api::client::{Daemon, failed};
use crate::api::server;
use crate::api::types::ErrorBody;
use crate::config::{Cluster, ConfigError, ModuleConfig, Paths};
use crate::pidfile::PidFile;
use crate::trust;
use crate::{host, keep};
use processes::Modules;
use std::io;
use std::sync::Arc;
use vmtwin_core::ids::{ModuleName, NodeName};

/// Version of this program; both nodes need the same to protect a VM.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");

/// A daemon.
#[derive(Debug)]
pub struct Node {
    /// Of this host.
    pub paths: Paths,
    modules: Arc<Modules>,
    /// Held by whoever changes configurations: joins, applies, protects and unprotects go one after the other.
    changing: tokio::sync::Mutex<()>,
}

/// Runs until it is killed.
///
/// # Errors
/// Where another one runs, or its folders and socket cannot be made.
pub async fn run(paths: Paths) -> io::Result<()> {
    paths.create()?;
    let Some(_alone) = PidFile::take(&paths.node_pid())? else {
        return Err(io::Error::other("a vmtwin daemon runs on this host already"));
    };
    let listener = keep::listen_locally(&paths.node_socket())?;
    let modules = Arc::new(Modules::new(paths.clone()));
    let node = Arc::new(Node { paths: paths.clone(), modules, changing: tokio::sync::Mutex::default() });
    if listen_name(&node).is_none() {
        host::info("this host is in no cluster yet: `vmtwin cluster init` or `vmtwin cluster join`");
    }
    tokio::spawn(processes::mind_keep(paths.clone()));
    node.modules.clone().start_wanted();
    tokio::spawn(server::serve_nodes(paths, node.clone()));
    server::serve_locally(listener, node).await;
    Ok(())
}

fn listen_name(node: &Node) -> Option<NodeName> {
    crate::listen::own_addresses(&node.paths).map(|(name, _)| name)
}

impl Node {
    /// The cluster and this node's name in it.
    ///
    /// # Errors
    /// Where it is in none (code 3), or a file is wrong.
    pub fn cluster(&self) -> Result<(Cluster, NodeName), ErrorBody> {
        let cluster = Cluster::load(&self.paths).map_err(|e| match e {
            ConfigError::Read { source, .. } if source.kind() == io::ErrorKind::NotFound => failed(
                3,
                "this host is in no cluster yet: `vmtwin cluster init` makes one, `vmtwin cluster join` enters one",
            ),
            other => failed(1, chain(&other)),
        })?;
        let identity = trust::own_identity(&self.paths).map_err(|e| failed(1, chain(&e)))?;
        let me = NodeName::new(&identity.name).map_err(|e| failed(1, e.to_string()))?;
        Ok((cluster, me))
    }

    /// The daemon of another node.
    fn daemon(&self, cluster: &Cluster, name: &NodeName) -> Result<Daemon, ErrorBody> {
        let node = cluster.node(name).ok_or_else(|| {
            failed(2, format!("cluster {} has no node {name}: `vmtwin cluster status` lists them", cluster.name))
        })?;
        let mut addresses: Vec<_> = node.addresses.iter().map(|a| a.ip).collect();
        addresses.sort_by_key(|ip| *ip != node.address());
        Ok(Daemon::Node { paths: self.paths.clone(), name: name.to_string(), addresses })
    }

    /// A module that is configured here; `None` where it is not.
    fn module(&self, name: &str) -> Result<Option<ModuleConfig>, ErrorBody> {
        let name = ModuleName::new(name).map_err(|e| failed(2, e.to_string()))?;
        match ModuleConfig::load(&self.paths, &name) {
            Ok(config) => Ok(Some(config)),
            Err(ConfigError::Read { source, .. }) if source.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(failed(1, chain(&e))),
        }
    }
}

/// An error with its causes, as one sentence.
#[must_use]
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        let inner_text = inner.to_string();
        if !text.contains(&inner_text) {
            text = format!("{text}: {inner_text}");
        }
        cause = inner.source();
    }
    text
}

fn no_module(name: &str) -> ErrorBody {
    failed(1, format!("no module is named {name}: `vmtwin status` lists them, `vmtwin protect` makes one"))
}
