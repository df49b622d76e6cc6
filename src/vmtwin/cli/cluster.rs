//! `vmtwin cluster`: init, token, join, status.
use super::{Outcome, say};
use crate::api::client::{Daemon, failed};
use crate::api::types::{ClusterStatus, JoinNode};
use crate::cli::status::table;
use crate::config::Paths;
use crate::config::paths::PORT_API;
use crate::node::join::{self, Init};
use crate::trust::{Token, TokenRefused};
use crate::{host, listen, node};
use clap::{Args, Subcommand, ValueEnum};
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;
use vmtwin_core::ids::{ClusterName, NodeName, WitnessName};

#[derive(Debug, Subcommand)]
pub enum Cluster {
    /// Make a cluster, with this host as its first node.
    #[command(
        after_help = "Example: vmtwin cluster init --name paris --node h1 --address 10.0.0.1 --witness w1=10.0.0.9\n\nWhat the witness is for: when the nodes lose each other, the one that still reaches it goes on, and no VM runs twice.\nPut it on a third machine; it needs a few MB. Without it and the peer at once, a node's VMs wait."
    )]
    Init(InitGiven),
    /// Give a one-time token, good for an hour, with which a host joins.
    #[command(after_help = "Example: vmtwin cluster token")]
    Token,
    /// Enter a cluster, as a node or as its witness.
    #[command(
        after_help = "Examples: vmtwin cluster join TOKEN --node h2 --address 10.0.0.2\n          vmtwin cluster join TOKEN --witness w1 --state /var/lib/vmtwin-witness"
    )]
    Join(JoinGiven),
    /// Nodes and witness, and which of them answer.
    #[command(after_help = "Example: vmtwin cluster status")]
    Status {
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum OnOff {
    On,
    Off,
}

#[derive(Debug, Args)]
struct Addresses {
    /// A cable of its own for replication.
    #[arg(long, value_name = "IP")]
    replication_address: Option<IpAddr>,
    /// Encrypt replication over that cable.
    #[arg(long, value_name = "on|off", default_value = "on", requires = "replication_address")]
    replication_tls: OnOff,
}

impl Addresses {
    fn with(&self, address: IpAddr) -> JoinNode {
        JoinNode {
            address: address.to_string(),
            replication: self.replication_address.map(|ip| ip.to_string()),
            replication_tls: self.replication_tls == OnOff::On,
        }
    }
}

#[derive(Debug, Args)]
pub struct InitGiven {
    /// The cluster's name.
    #[arg(long)]
    name: ClusterName,
    /// This host's name in it.
    #[arg(long)]
    node: NodeName,
    /// This host's address, as the others reach it.
    #[arg(long, value_name = "IP")]
    address: IpAddr,
    #[command(flatten)]
    addresses: Addresses,
    /// The witness: its name and its address.
    #[arg(long, value_name = "NAME=IP", value_parser = witness)]
    witness: (WitnessName, IpAddr),
}

#[derive(Debug, Args)]
pub struct JoinGiven {
    /// As `vmtwin cluster token` printed it.
    token: String,
    /// As a node of this name.
    #[arg(long, value_name = "NAME", required_unless_present = "witness", requires = "address")]
    node: Option<NodeName>,
    /// This host's address, as the others reach it.
    #[arg(long, value_name = "IP", conflicts_with = "witness")]
    address: Option<IpAddr>,
    #[command(flatten)]
    addresses: Addresses,
    /// As the witness of this name.
    #[arg(long, value_name = "NAME", conflicts_with = "node", requires = "state")]
    witness: Option<WitnessName>,
    /// Where the witness keeps its certificate and its votes.
    #[arg(long, value_name = "DIR", requires = "witness")]
    state: Option<PathBuf>,
}

fn witness(text: &str) -> Result<(WitnessName, IpAddr), String> {
    let (name, address) = text.split_once('=').ok_or("NAME=IP, for example w1=10.0.0.9")?;
    let name = WitnessName::new(name).map_err(|e| e.to_string())?;
    Ok((name, address.parse().map_err(|_| format!("{address:?} is no IP address"))?))
}

pub async fn run(paths: &Paths, daemon: &Daemon, command: Cluster) -> Outcome {
    match command {
        Cluster::Init(given) => {
            init(paths, given)?;
            heard(paths).await;
            Ok(())
        }
        Cluster::Token => token(paths),
        Cluster::Join(given) => enter(paths, given).await,
        Cluster::Status { json } => status(daemon, json).await,
    }
}

fn init(paths: &Paths, given: InitGiven) -> Outcome {
    let addresses = given.addresses.with(given.address);
    let (name, node) = (given.name, given.node);
    let cluster = join::init(paths, &Init { name, node, addresses, witness: given.witness })?;
    let witness = &cluster.witness;
    say(&format!(
        "cluster {} is made, with node {} and a certificate authority of its own",
        cluster.name, cluster.nodes[0].name
    ));
    say(&format!(
        "next: `vmtwin cluster token` here, once for the second node and once for the witness {}",
        witness.name
    ));
    say("      second node:  vmtwin cluster join TOKEN --node NAME --address IP");
    say(&format!("      witness:      vmtwin cluster join TOKEN --witness {} --state DIR", witness.name));
    Ok(())
}

/// Waits until this host's daemon, if it runs, listens at its new address: whoever comes next finds it.
async fn heard(paths: &Paths) {
    if tokio::net::UnixStream::connect(paths.node_socket()).await.is_err() {
        say("note: the daemon does not run here yet: systemctl start vmtwin (or: vmtwin node)");
        return;
    }
    let Some((_, addresses)) = listen::own_addresses(paths) else { return };
    for _ in 0..200 {
        if tokio::net::TcpStream::connect((addresses[0], PORT_API)).await.is_ok() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

fn token(paths: &Paths) -> Outcome {
    let (_, addresses) = listen::own_addresses(paths).ok_or_else(|| {
        failed(3, "this host is in no cluster that can be read here: `vmtwin cluster init` makes one (needs root)")
    })?;
    let token = Token::give(paths, addresses[0], host::unix_seconds()).map_err(|e| failed(1, node::chain(&e)))?;
    say(&token.to_string());
    Ok(())
}

async fn enter(paths: &Paths, given: JoinGiven) -> Outcome {
    let token: Token = given.token.parse().map_err(|e: TokenRefused| failed(2, e.to_string()))?;
    match (given.node, given.address, given.witness, given.state) {
        (Some(node), Some(address), None, None) => {
            let cluster = join::enter(paths, &token, node.as_str(), Some(given.addresses.with(address))).await?;
            say(&format!("{node} is a node of cluster {} now", cluster.name));
            heard(paths).await;
        }
        (None, None, Some(witness), Some(state)) => {
            let cluster = join::enter(&Paths::under(&state), &token, witness.as_str(), None).await?;
            say(&format!("{witness} is the witness of cluster {} now", cluster.name));
            say(&format!("next: vmtwin witness --state {}", state.display()));
        }
        _ => return Err(failed(2, "--node NAME --address IP, or --witness NAME --state DIR")),
    }
    Ok(())
}

async fn status(daemon: &Daemon, json: bool) -> Outcome {
    let status: ClusterStatus = daemon.get("/v1/cluster", Duration::from_secs(20)).await?;
    if json {
        say(&serde_json::to_string_pretty(&status).expect("plain values become JSON"));
        return Ok(());
    }
    say(&format!("cluster {}, version {}", status.cluster, status.version));
    let rows = status.members.iter().map(|m| {
        let answers = if m.reached { "answers" } else { "no contact" };
        [m.name.as_str(), m.role.as_str(), m.address.as_str(), answers, m.version.as_deref().unwrap_or("")]
            .map(str::to_owned)
            .to_vec()
    });
    say(&table(&["NAME", "ROLE", "ADDRESS", "STATE", "VERSION"], &rows.collect::<Vec<_>>()));
    for member in status.members.iter().filter(|m| !m.reason.is_empty()) {
        say(&format!("{}: {}", member.name, member.reason));
    }
    Ok(())
}
