//! Clusters for tests: hosts as folders, addresses of their own on the loopback network, real certificates.
use crate::config::{Address, Cluster, Node, Paths, Use, Witness};
use crate::host;
use crate::trust::{Authority, Identity, Request};
use std::net::{IpAddr, Ipv4Addr};
use vmtwin_core::ids::ClusterId;

/// Nodes h1 and h2 and the witness w1.
pub struct TestCluster {
    /// As every host has it.
    pub cluster: Cluster,
    authority: Authority,
    folder: tempfile::TempDir,
}

impl TestCluster {
    /// One of this name, with addresses that no other test has.
    pub fn new(name: &str) -> Self {
        let node = |name: &str| Node {
            name: name.parse().unwrap(),
            addresses: vec![Address { ip: loopback(), purpose: Use::Any, tls: true }],
        };
        let cluster = Cluster {
            id: ClusterId(7),
            name: name.parse().unwrap(),
            version: 1,
            nodes: vec![node("h1"), node("h2")],
            witness: Witness { name: "w1".parse().unwrap(), address: loopback() },
        };
        let folder = tempfile::Builder::new().prefix("vmtwin").tempdir().unwrap();
        Self { cluster, authority: Authority::create(name).unwrap(), folder }
    }

    /// The paths of a host, with a certificate of this name and cluster.xml. Called again: a new certificate.
    pub fn host(&self, name: &str) -> Paths {
        let paths = Paths::under(&self.folder.path().join(name));
        paths.create().unwrap();
        let identity = Identity { cluster: self.cluster.name.to_string(), name: name.to_owned() };
        let request = Request::create().unwrap();
        let signed = self.authority.sign(&request.pem, &identity).unwrap();
        let authority = &self.authority;
        request.store(&paths, &signed, authority.certificate_pem(), Some(authority.key_pem())).unwrap();
        self.cluster.store(&paths).unwrap();
        paths
    }

    /// The address of a node or the witness.
    pub fn address(&self, name: &str) -> IpAddr {
        let node = self.cluster.nodes.iter().find(|n| n.name.as_str() == name);
        node.map_or(self.cluster.witness.address, Node::address)
    }
}

/// A loopback address that nobody else uses: ports are fixed, so each host of a test has an address of its own.
pub fn loopback() -> IpAddr {
    let [a, b, c, ..] = host::random().to_le_bytes();
    IpAddr::V4(Ipv4Addr::new(127, 1 + a % 250, b, 1 + c % 250))
}
