//! Who may speak to whom: the cluster's own authority, one certificate per node and witness, one-time join tokens.
//!
//! A name is the URI `vmtwin://CLUSTER/NAME` in a certificate. Invariant: nobody is believed whose certificate the
//! cluster's authority has not signed, or whom cluster.xml does not name; revoking is taking out of cluster.xml.
mod authority;
mod config;
#[cfg(test)]
mod tests;
mod token;

pub use authority::{Authority, Request, fingerprint};
pub use config::{
    api_server_config, client_config, join_client_config, server_config, server_name, witness_server_config,
};
pub use token::{TOKEN_SECONDS, Token, TokenRefused};

use crate::config::Paths;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use std::fmt;
use std::path::{Path, PathBuf};
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

/// Why there is no trust to work with.
#[derive(Debug, thiserror::Error)]
pub enum TrustError {
    /// A file of the `tls` folder cannot be read or written.
    #[error("cannot use {}: is this host in a cluster? `vmtwin cluster init` or `vmtwin cluster join` makes it", file.display())]
    File {
        /// Which.
        file: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// It is there and makes no sense.
    #[error("{} is damaged: {why}", file.display())]
    Damaged {
        /// Which.
        file: PathBuf,
        /// In words.
        why: String,
    },
    /// A certificate, key or request that cannot be made or used.
    #[error("certificate: {0}")]
    Certificate(String),
}

/// The name that a certificate gives.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Identity {
    /// Cluster.
    pub cluster: String,
    /// Node or witness.
    pub name: String,
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "vmtwin://{}/{}", self.cluster, self.name)
    }
}

impl Identity {
    /// The one `vmtwin://` name in a certificate; `None` where there is none, or more than one.
    #[must_use]
    pub fn of(certificate: &CertificateDer<'_>) -> Option<Self> {
        let (_, parsed) = X509Certificate::from_der(certificate).ok()?;
        let names = parsed.subject_alternative_name().ok()??;
        let mut ours = names.value.general_names.iter().filter_map(|name| match name {
            GeneralName::URI(uri) => uri.strip_prefix("vmtwin://"),
            _ => None,
        });
        let (cluster, name) = ours.next()?.split_once('/')?;
        let whole = ours.next().is_none() && !cluster.is_empty() && !name.is_empty() && !name.contains('/');
        whole.then(|| Self { cluster: cluster.to_owned(), name: name.to_owned() })
    }

    /// Whom the other side of a connection is, by the certificate that the handshake has checked.
    #[must_use]
    pub fn of_peer(certificates: Option<&[CertificateDer<'_>]>) -> Option<Self> {
        certificates?.first().and_then(Self::of)
    }
}

/// What this host shows and believes.
struct Credentials {
    authority: CertificateDer<'static>,
    own: CertificateDer<'static>,
    key: PrivateKeyDer<'static>,
}

impl Credentials {
    fn load(paths: &Paths) -> Result<Self, TrustError> {
        let tls = paths.tls();
        let key = tls.join("node.key");
        let text = read(&key)?;
        Ok(Self {
            authority: certificate(&tls.join("ca.pem"))?,
            own: certificate(&tls.join("node.pem"))?,
            key: PrivateKeyDer::from_pem_slice(&text)
                .map_err(|e| TrustError::Damaged { file: key, why: e.to_string() })?,
        })
    }
}

/// Whom this host is, by its own certificate.
///
/// # Errors
/// Where it has none, or one without a name.
pub fn own_identity(paths: &Paths) -> Result<Identity, TrustError> {
    let file = paths.tls().join("node.pem");
    Identity::of(&certificate(&file)?)
        .ok_or_else(|| TrustError::Damaged { file, why: "it names no node of a cluster".into() })
}

fn read(file: &Path) -> Result<Vec<u8>, TrustError> {
    std::fs::read(file).map_err(|source| TrustError::File { file: file.to_owned(), source })
}

fn certificate(file: &Path) -> Result<CertificateDer<'static>, TrustError> {
    CertificateDer::from_pem_slice(&read(file)?)
        .map_err(|e| TrustError::Damaged { file: file.to_owned(), why: e.to_string() })
}
