//! TLS settings of every connection: 1.3 only, one provider by name, certificates on both sides, no tickets (a resumed
//! session would skip the look at cluster.xml).
use super::{Credentials, Identity, TrustError, fingerprint};
use crate::config::{Cluster, Paths};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{Resumption, verify_server_cert_signed_by_trust_anchor};
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{NoServerSessionStorage, ParsedCertificate, WebPkiClientVerifier};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, Error, RootCertStore, ServerConfig,
    SignatureScheme,
};
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

/// What a client gives as the server's name. Names are not looked up and not sent: the certificate's URI counts.
#[must_use]
pub fn server_name() -> ServerName<'static> {
    ServerName::IpAddress(IpAddr::V4(Ipv4Addr::LOCALHOST).into())
}

/// For a connection to `expected` (a node or the witness) and nobody else.
///
/// # Errors
/// Where this host has no certificate.
pub fn client_config(paths: &Paths, expected: &str) -> Result<Arc<ClientConfig>, TrustError> {
    let own = Credentials::load(paths)?;
    let members = Members::new(&own, Who::InClusterXml(paths.clone()), Some(expected.to_owned()))?;
    let config = client_builder()?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(members))
        .with_client_auth_cert(vec![own.own, own.authority], own.key)
        .map_err(unusable)?;
    Ok(Arc::new(without_resumption(config)))
}

/// For connections from nodes of this cluster.
///
/// # Errors
/// Where this host has no certificate.
pub fn server_config(paths: &Paths) -> Result<Arc<ServerConfig>, TrustError> {
    server(paths, Who::InClusterXml(paths.clone()), true)
}

/// As `server_config`, but a client may show no certificate: it can then only join.
///
/// # Errors
/// Where this host has no certificate.
pub fn api_server_config(paths: &Paths) -> Result<Arc<ServerConfig>, TrustError> {
    server(paths, Who::InClusterXml(paths.clone()), false)
}

/// For a witness. It has no cluster.xml that could fall behind: whom the authority signed for this cluster may ask it; what
/// they may change, each record's own voters decide.
///
/// # Errors
/// Where it has not joined yet.
pub fn witness_server_config(paths: &Paths) -> Result<Arc<ServerConfig>, TrustError> {
    server(paths, Who::SignedForThisCluster, true)
}

/// For a host that has nothing yet but a token: believes the server whose authority has this fingerprint.
///
/// # Errors
/// Never in practice: where the provider refuses TLS 1.3.
pub fn join_client_config(authority_fingerprint: &str) -> Result<Arc<ClientConfig>, TrustError> {
    let verifier = Joined { fingerprint: authority_fingerprint.to_owned(), algorithms: algorithms() };
    let config =
        client_builder()?.dangerous().with_custom_certificate_verifier(Arc::new(verifier)).with_no_client_auth();
    Ok(Arc::new(without_resumption(config)))
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::aws_lc_rs::default_provider())
}

fn algorithms() -> WebPkiSupportedAlgorithms {
    rustls::crypto::aws_lc_rs::default_provider().signature_verification_algorithms
}

fn unusable(e: impl std::fmt::Display) -> TrustError {
    TrustError::Certificate(e.to_string())
}

fn client_builder() -> Result<rustls::ConfigBuilder<ClientConfig, rustls::WantsVerifier>, TrustError> {
    ClientConfig::builder_with_provider(provider()).with_protocol_versions(&[&rustls::version::TLS13]).map_err(unusable)
}

fn without_resumption(mut config: ClientConfig) -> ClientConfig {
    config.resumption = Resumption::disabled();
    config
}

fn server(paths: &Paths, who: Who, certificate_needed: bool) -> Result<Arc<ServerConfig>, TrustError> {
    let own = Credentials::load(paths)?;
    let members = Members { certificate_needed, ..Members::new(&own, who, None)? };
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(unusable)?
        .with_client_cert_verifier(Arc::new(members))
        .with_single_cert(vec![own.own, own.authority], own.key)
        .map_err(unusable)?;
    config.send_tls13_tickets = 0;
    config.session_storage = Arc::new(NoServerSessionStorage {});
    Ok(Arc::new(config))
}

#[derive(Debug)]
enum Who {
    /// Read at each handshake: a member that was taken out is refused from then on.
    InClusterXml(Paths),
    SignedForThisCluster,
}

/// Believes members of this cluster.
#[derive(Debug)]
struct Members {
    roots: Arc<RootCertStore>,
    chain: Arc<dyn ClientCertVerifier>,
    cluster: String,
    who: Who,
    expected: Option<String>,
    certificate_needed: bool,
    algorithms: WebPkiSupportedAlgorithms,
}

impl Members {
    fn new(own: &Credentials, who: Who, expected: Option<String>) -> Result<Self, TrustError> {
        let mut roots = RootCertStore::empty();
        roots.add(own.authority.clone()).map_err(unusable)?;
        let roots = Arc::new(roots);
        let chain = WebPkiClientVerifier::builder_with_provider(roots.clone(), provider()).build().map_err(unusable)?;
        let me = Identity::of(&own.own).ok_or_else(|| unusable("this host's certificate names no node"))?;
        Ok(Self {
            roots,
            chain,
            cluster: me.cluster,
            who,
            expected,
            certificate_needed: true,
            algorithms: algorithms(),
        })
    }

    /// After the chain was checked: is this somebody whom we speak to?
    fn check_name(&self, certificate: &CertificateDer<'_>) -> Result<(), Error> {
        let refused = || Error::InvalidCertificate(CertificateError::ApplicationVerificationFailure);
        let identity = Identity::of(certificate).ok_or_else(refused)?;
        let known = match &self.who {
            Who::SignedForThisCluster => true,
            Who::InClusterXml(paths) => {
                let cluster = Cluster::load(paths).map_err(|_| refused())?;
                // A witness is asked and asks nothing: its certificate opens no port of a node.
                let asked = self.expected.is_some() && cluster.has_member(&identity.name);
                asked || cluster.nodes.iter().any(|node| node.name.as_str() == identity.name)
            }
        };
        let meant = self.expected.as_ref().is_none_or(|expected| *expected == identity.name);
        if identity.cluster == self.cluster && known && meant { Ok(()) } else { Err(refused()) }
    }
}

impl ServerCertVerifier for Members {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let parsed = ParsedCertificate::try_from(certificate)?;
        let all = self.algorithms.all;
        verify_server_cert_signed_by_trust_anchor(&parsed, &self.roots, intermediates, now, all)?;
        self.check_name(certificate)?;
        Ok(ServerCertVerified::assertion())
    }
    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(Error::General("TLS 1.3 only".into()))
    }
    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, certificate, signed, &self.algorithms)
    }
    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

impl ClientCertVerifier for Members {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }
    fn client_auth_mandatory(&self) -> bool {
        self.certificate_needed
    }
    fn verify_client_cert(
        &self,
        certificate: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        self.chain.verify_client_cert(certificate, intermediates, now)?;
        self.check_name(certificate)?;
        Ok(ClientCertVerified::assertion())
    }
    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(Error::General("TLS 1.3 only".into()))
    }
    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, certificate, signed, &self.algorithms)
    }
    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

/// Believes a server whose authority has the token's fingerprint.
#[derive(Debug)]
struct Joined {
    fingerprint: String,
    algorithms: WebPkiSupportedAlgorithms,
}

impl ServerCertVerifier for Joined {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let authority = intermediates.iter().find(|c| fingerprint(c) == self.fingerprint);
        let authority = authority.ok_or(Error::InvalidCertificate(CertificateError::UnknownIssuer))?;
        let mut roots = RootCertStore::empty();
        roots.add(authority.clone().into_owned())?;
        let parsed = ParsedCertificate::try_from(certificate)?;
        verify_server_cert_signed_by_trust_anchor(&parsed, &roots, &[], now, self.algorithms.all)?;
        Ok(ServerCertVerified::assertion())
    }
    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(Error::General("TLS 1.3 only".into()))
    }
    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, certificate, signed, &self.algorithms)
    }
    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}
