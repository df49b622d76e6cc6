//! cluster.xml: which nodes there are, how to reach them, who is the witness.
//!
//! Invariant of a `Cluster`: names differ (a witness's from the nodes', too: all are certificates' names), each node has
//! an address for everything, no address serves two.
use super::xml::{self, ConfigError, Source};
use super::{Paths, durable};
use serde::{Deserialize, Serialize};
use std::net::IpAddr;
use std::path::Path;
use vmtwin_core::ids::{ClusterId, ClusterName, NodeName, WitnessName};

/// The whole cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cluster {
    /// Random; made by `cluster init`.
    pub id: ClusterId,
    /// Its name, part of every certificate.
    pub name: ClusterName,
    /// Rises with each `apply`.
    pub version: u64,
    /// Its nodes, as the file orders them.
    pub nodes: Vec<Node>,
    /// The third vote.
    pub witness: Witness,
}

/// One node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// Its name.
    pub name: NodeName,
    /// At least one that serves everything.
    pub addresses: Vec<Address>,
}

/// One address of a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Address {
    /// The address.
    pub ip: IpAddr,
    /// What it is for.
    pub purpose: Use,
    /// Whether a replication link over it is encrypted.
    pub tls: bool,
}

/// What an address is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Use {
    /// API, votes, and replication where no other address is for it.
    Any,
    /// Replication, first choice.
    Replication,
}

/// The third vote.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Witness {
    /// Its name.
    pub name: WitnessName,
    /// Where it listens, port 7722.
    pub address: IpAddr,
}

impl Node {
    /// The address for API and votes.
    #[must_use]
    pub fn address(&self) -> IpAddr {
        let any = self.addresses.iter().find(|a| a.purpose == Use::Any);
        any.expect("checked: each node has an address for everything").ip
    }
    /// The addresses for the peer link, best first: those for replication, then the others.
    #[must_use]
    pub fn link_addresses(&self) -> Vec<&Address> {
        let mut all: Vec<_> = self.addresses.iter().collect();
        all.sort_by_key(|a| a.purpose != Use::Replication);
        all
    }
}

impl Cluster {
    /// Reads this host's cluster.xml.
    ///
    /// # Errors
    /// `Read` where there is none, `Wrong` with the place.
    pub fn load(paths: &Paths) -> Result<Self, ConfigError> {
        let file = paths.cluster_xml();
        Self::parse(&xml::read(&file)?, &file)
    }

    /// Writes it as this host's cluster.xml, durably.
    ///
    /// # Errors
    /// `Write`.
    pub fn store(&self, paths: &Paths) -> Result<(), ConfigError> {
        let file = paths.cluster_xml();
        durable::write(&file, self.to_xml().as_bytes(), 0o644).map_err(|source| ConfigError::Write { file, source })
    }

    /// The node of this name.
    #[must_use]
    pub fn node(&self, name: &NodeName) -> Option<&Node> {
        self.nodes.iter().find(|n| n.name == *name)
    }

    /// Whether a certificate of this name belongs to the cluster as it is now.
    #[must_use]
    pub fn has_member(&self, name: &str) -> bool {
        self.witness.name.as_str() == name || self.nodes.iter().any(|n| n.name.as_str() == name)
    }

    /// Checks a text; `file` is named in errors.
    ///
    /// # Errors
    /// `Wrong` with the place.
    pub fn parse(text: &str, file: &Path) -> Result<Self, ConfigError> {
        let (source, raw) = Source::parse::<RawCluster>(text, file, "cluster")?;
        let top = source.document.root_element();
        let id = match &raw.id {
            Some(id) => id.parse().map_err(|_| source.wrong(top, format!("id={id:?} is no id: 32 hex digits")))?,
            None => return Err(source.wrong(top, "the attribute \"id\" is missing: `vmtwin cluster init` makes it")),
        };
        let mut nodes: Vec<Node> = Vec::new();
        let places = source.all("node");
        for (raw, place) in raw.nodes.iter().flat_map(|n| &n.node).zip(places) {
            let node = raw.check(&source, place)?;
            if nodes.iter().any(|n| n.name == node.name) {
                return Err(source.wrong(place, format!("a second node named {}", node.name)));
            }
            nodes.push(node);
        }
        if nodes.is_empty() {
            return Err(source.wrong(source.first("nodes"), "a cluster has at least one <node>"));
        }
        let cluster = Self {
            id,
            name: source.need(top, "name", raw.name.as_ref())?,
            version: source.need(top, "version", raw.version.as_ref())?,
            nodes,
            witness: raw.witness(&source)?,
        };
        cluster.check_addresses(&source)?;
        Ok(cluster)
    }

    fn check_addresses(&self, source: &Source<'_>) -> Result<(), ConfigError> {
        let place = source.first("witness");
        if self.nodes.iter().any(|n| n.name.as_str() == self.witness.name.as_str()) {
            return Err(source.wrong(place, format!("a node is named {}, too: choose another name", self.witness.name)));
        }
        let mut seen = Vec::new();
        let ips = self.nodes.iter().flat_map(|n| &n.addresses).map(|a| a.ip);
        for (ip, place) in ips.zip(source.all("address")) {
            if seen.contains(&ip) {
                return Err(source.wrong(place, format!("{ip} stands here twice: each address belongs to one node")));
            }
            if ip.is_unspecified() || ip.is_multicast() {
                return Err(source.wrong(place, format!("{ip} is no address of a host")));
            }
            seen.push(ip);
        }
        if seen.contains(&self.witness.address) {
            let what =
                "the witness has an address of a node: on a node it would die with it, and its vote is worth nothing";
            return Err(source.wrong(place, what));
        }
        Ok(())
    }

    /// The file's text.
    #[must_use]
    pub fn to_xml(&self) -> String {
        let address = |a: &Address| RawAddress {
            purpose: (a.purpose == Use::Replication).then(|| "replication".to_owned()),
            tls: (!a.tls).then(|| "off".to_owned()),
            text: Some(a.ip.to_string()),
        };
        let node =
            |n: &Node| RawNode { name: Some(n.name.to_string()), address: n.addresses.iter().map(address).collect() };
        let witness =
            RawWitness { name: Some(self.witness.name.to_string()), address: Some(self.witness.address.to_string()) };
        xml::write(
            "cluster",
            &RawCluster {
                name: Some(self.name.to_string()),
                id: Some(self.id.to_string()),
                version: Some(self.version.to_string()),
                nodes: Some(RawNodes { node: self.nodes.iter().map(node).collect() }),
                arbitration: Some(RawArbitration { kind: Some("witness".to_owned()), witness: vec![witness] }),
            },
        )
    }
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawCluster {
    #[serde(rename = "@name", default, skip_serializing_if = "Option::is_none")]
    name: Option<String>,
    #[serde(rename = "@id", default, skip_serializing_if = "Option::is_none")]
    id: Option<String>,
    #[serde(rename = "@version", default, skip_serializing_if = "Option::is_none")]
    version: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    nodes: Option<RawNodes>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    arbitration: Option<RawArbitration>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawNodes {
    #[serde(default)]
    node: Vec<RawNode>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawNode {
    #[serde(rename = "@name", default, skip_serializing_if = "Option::is_none")]
    name: Option<String>,
    #[serde(default)]
    address: Vec<RawAddress>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawAddress {
    #[serde(rename = "@use", default, skip_serializing_if = "Option::is_none")]
    purpose: Option<String>,
    #[serde(rename = "@tls", default, skip_serializing_if = "Option::is_none")]
    tls: Option<String>,
    #[serde(rename = "$text", default, skip_serializing_if = "Option::is_none")]
    text: Option<String>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawArbitration {
    #[serde(rename = "@type", default, skip_serializing_if = "Option::is_none")]
    kind: Option<String>,
    #[serde(default)]
    witness: Vec<RawWitness>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawWitness {
    #[serde(rename = "@name", default, skip_serializing_if = "Option::is_none")]
    name: Option<String>,
    #[serde(rename = "@address", default, skip_serializing_if = "Option::is_none")]
    address: Option<String>,
}

impl RawNode {
    fn check(&self, source: &Source<'_>, place: roxmltree::Node<'_, '_>) -> Result<Node, ConfigError> {
        let name = source.need(place, "name", self.name.as_ref())?;
        let mut addresses = Vec::new();
        let places = place.children().filter(|n| n.has_tag_name("address"));
        for (raw, place) in self.address.iter().zip(places) {
            let text = raw.text.as_deref().unwrap_or_default().trim();
            let ip = text.parse().map_err(|_| {
                source.wrong(
                    place,
                    format!("{text:?} is no IP address (names are not resolved: they fail with the network)"),
                )
            })?;
            let purpose = match raw.purpose.as_deref() {
                None => Use::Any,
                Some("replication") => Use::Replication,
                Some(other) => {
                    return Err(source.wrong(place, format!("use={other:?}: \"replication\", or leave it out")));
                }
            };
            let tls = source.on(place, "tls", raw.tls.as_ref(), true)?;
            if !tls && purpose != Use::Replication {
                return Err(source.wrong(place, "tls=\"off\" is for an address with use=\"replication\" only"));
            }
            addresses.push(Address { ip, purpose, tls });
        }
        if !addresses.iter().any(|a| a.purpose == Use::Any) {
            return Err(source.wrong(place, "a node needs an <address> without use=\"replication\""));
        }
        Ok(Node { name, addresses })
    }
}

impl RawCluster {
    fn witness(&self, source: &Source<'_>) -> Result<Witness, ConfigError> {
        let place = source.first("arbitration");
        let raw = self.arbitration.as_ref().ok_or_else(|| source.wrong(place, "<arbitration> is missing"))?;
        match raw.kind.as_deref() {
            Some("witness") => {}
            Some(other) => {
                let what = format!("type={other:?} is not supported yet by this version: \"witness\" is");
                return Err(source.wrong(place, what));
            }
            None => return Err(source.wrong(place, "the attribute \"type\" is missing: \"witness\"")),
        }
        let [witness] = raw.witness.as_slice() else {
            let what = format!("{} witnesses: this version needs exactly one", raw.witness.len());
            return Err(source.wrong(place, what));
        };
        let place = source.first("witness");
        let name = source.need(place, "name", witness.name.as_ref())?;
        Ok(Witness { name, address: source.need(place, "address", witness.address.as_ref())? })
    }
}
