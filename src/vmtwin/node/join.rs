//! A cluster's first steps: made by `init`, entered with a token.
//!
//! Invariant: a join that is refused changes nothing, and its token is gone only if it was good.
use super::{Node, VERSION, chain};
use crate::api::client::{Daemon, failed};
use crate::api::types::{ErrorBody, JoinAnswer, JoinNode, JoinRequest};
use crate::config::{Address, Cluster, Paths, Use, Witness};
use crate::host;
use crate::trust::{Authority, Identity, Request, Token};
use std::net::IpAddr;
use std::path::Path;
use std::time::Duration;
use vmtwin_core::ids::{ClusterId, ClusterName, NodeName, WitnessName};

const JOIN_TIME: Duration = Duration::from_secs(20);

/// What `cluster init` is told.
#[derive(Clone, Debug)]
pub struct Init {
    /// The cluster's name.
    pub name: ClusterName,
    /// This node's name.
    pub node: NodeName,
    /// Its addresses.
    pub addresses: JoinNode,
    /// The witness.
    pub witness: (WitnessName, IpAddr),
}

fn wrong(e: &dyn std::error::Error) -> ErrorBody {
    failed(1, chain(e))
}

fn address(text: &str) -> Result<IpAddr, ErrorBody> {
    text.parse().map_err(|_| {
        failed(2, format!("{text:?} is no IP address (names are not resolved: they fail with the network)"))
    })
}

fn node_of(name: NodeName, at: &JoinNode) -> Result<crate::config::Node, ErrorBody> {
    let mut addresses = vec![Address { ip: address(&at.address)?, purpose: Use::Any, tls: true }];
    if let Some(replication) = &at.replication {
        addresses.push(Address { ip: address(replication)?, purpose: Use::Replication, tls: at.replication_tls });
    }
    Ok(crate::config::Node { name, addresses })
}

fn not_in_one_yet(paths: &Paths) -> Result<(), ErrorBody> {
    if paths.cluster_xml().exists() {
        let file = paths.cluster_xml();
        return Err(failed(3, format!("this host is in a cluster already: {} says in which", file.display())));
    }
    Ok(())
}

/// Makes a cluster with this host as its first node.
///
/// # Errors
/// Where it is in one, a name or address is wrong, or files cannot be written.
pub fn init(paths: &Paths, init: &Init) -> Result<Cluster, ErrorBody> {
    not_in_one_yet(paths)?;
    let (witness, witness_address) = init.witness.clone();
    let cluster = Cluster {
        id: ClusterId(host::random()),
        name: init.name.clone(),
        version: 1,
        nodes: vec![node_of(init.node.clone(), &init.addresses)?],
        witness: Witness { name: witness, address: witness_address },
    };
    // Through the same checks as a file that an admin wrote.
    Cluster::parse(&cluster.to_xml(), Path::new("cluster.xml")).map_err(|e| failed(2, chain(&e)))?;
    paths.create().map_err(|e| failed(1, format!("cannot make the folders of vmtwin: {e}")))?;
    let authority = Authority::create(init.name.as_str()).map_err(|e| wrong(&e))?;
    let identity = Identity { cluster: init.name.to_string(), name: init.node.to_string() };
    let request = Request::create().map_err(|e| wrong(&e))?;
    let signed = authority.sign(&request.pem, &identity).map_err(|e| wrong(&e))?;
    request.store(paths, &signed, authority.certificate_pem(), Some(authority.key_pem())).map_err(|e| wrong(&e))?;
    // Last: with it the host is in the cluster.
    cluster.store(paths).map_err(|e| wrong(&e))?;
    Ok(cluster)
}

/// Enters a cluster, as a node or as a witness, from the host that joins.
///
/// # Errors
/// Where it is in one, or the cluster refuses.
pub async fn enter(paths: &Paths, token: &Token, name: &str, node: Option<JoinNode>) -> Result<Cluster, ErrorBody> {
    not_in_one_yet(paths)?;
    let request = Request::create().map_err(|e| wrong(&e))?;
    let at = Daemon::Joining { address: token.address, fingerprint: token.fingerprint.clone() };
    let ask = JoinRequest {
        secret: token.secret.clone(),
        request: request.pem.clone(),
        name: name.to_owned(),
        node,
        version: VERSION.to_owned(),
    };
    let answer: JoinAnswer = at.post(crate::api::routes::JOIN, &ask, JOIN_TIME).await?;
    let cluster = Cluster::parse(&answer.cluster, Path::new("the cluster's cluster.xml")).map_err(|e| wrong(&e))?;
    paths.create().map_err(|e| failed(1, format!("cannot make the folders of vmtwin: {e}")))?;
    request
        .store(paths, &answer.certificate, &answer.authority, answer.authority_key.as_deref())
        .map_err(|e| wrong(&e))?;
    cluster.store(paths).map_err(|e| wrong(&e))?;
    Ok(cluster)
}

impl Node {
    /// Lets a host in that has a token.
    ///
    /// # Errors
    /// Code 6 for the token; else why not.
    pub async fn join(&self, request: JoinRequest) -> Result<JoinAnswer, ErrorBody> {
        let _changing = self.changing.lock().await;
        let (cluster, me) = self.cluster()?;
        let authority = Authority::load(&self.paths).map_err(|e| wrong(&e))?;
        let identity = Identity { cluster: cluster.name.to_string(), name: request.name.clone() };
        let signed = authority.sign(&request.request, &identity).map_err(|e| failed(2, chain(&e)));
        let changed = admit(&cluster, &me, &request);
        // Whether the rest of the request is good is told only to who has a good token.
        Token::take(&self.paths, &request.secret, host::unix_seconds()).map_err(|e| failed(6, e.to_string()))?;
        let (signed, changed) = (signed?, changed?);
        if changed != cluster {
            let others: Vec<_> =
                changed.nodes.iter().map(|n| n.name.clone()).filter(|n| n.as_str() != request.name).collect();
            self.store_on_all(&cluster, &me, &changed.to_xml(), &others, false).await?;
        }
        host::info(&format!("{} has joined cluster {}", request.name, cluster.name));
        Ok(JoinAnswer {
            certificate: signed,
            authority: authority.certificate_pem().to_owned(),
            authority_key: request.node.is_some().then(|| authority.key_pem().to_owned()),
            cluster: changed.to_xml(),
        })
    }
}

/// The cluster with the host in it.
fn admit(cluster: &Cluster, me: &NodeName, request: &JoinRequest) -> Result<Cluster, ErrorBody> {
    if request.version != VERSION {
        let error = format!(
            "the host that joins has version {}, this node {VERSION}: install the same on both",
            request.version
        );
        return Err(failed(3, error));
    }
    let Some(node) = &request.node else {
        let witness = &cluster.witness.name;
        return if request.name == witness.as_str() {
            Ok(cluster.clone())
        } else {
            Err(failed(3, format!("cluster {} has the witness {witness}, not {}", cluster.name, request.name)))
        };
    };
    let name = NodeName::new(&request.name).map_err(|e| failed(2, e.to_string()))?;
    if name == *me {
        return Err(failed(3, format!("{name} is the node at which you join: choose another name")));
    }
    let node = node_of(name, node)?;
    let mut changed = cluster.clone();
    match changed.nodes.iter_mut().find(|n| n.name == node.name) {
        // It was installed anew.
        Some(known) => *known = node,
        None => changed.nodes.push(node),
    }
    if changed != *cluster {
        changed.version += 1;
        Cluster::parse(&changed.to_xml(), Path::new("cluster.xml")).map_err(|e| failed(3, chain(&e)))?;
    }
    Ok(changed)
}
