//! The cluster's authority: made by `cluster init`, kept on every node (either may replace the other), signs joins.
//!
//! Certificates do not run out: a host whose clock is wrong after a boot must still reach its peer. Who is to be trusted
//! no longer is taken out of cluster.xml.
use super::{Credentials, Identity, TrustError, certificate, read};
use crate::config::{Paths, durable};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, SanType,
};
use rustls::pki_types::CertificateDer;
use std::fs::DirBuilder;
use std::os::unix::fs::DirBuilderExt;

/// Can sign.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    certificate_pem: String,
    key_pem: String,
}

/// A key made on the host that joins, which never leaves it, and what it sends instead.
pub struct Request {
    key_pem: String,
    /// To be signed.
    pub pem: String,
}

fn made(e: rcgen::Error) -> TrustError {
    TrustError::Certificate(e.to_string())
}

fn new_key() -> Result<KeyPair, TrustError> {
    KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(made)
}

fn params(common_name: String) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.not_before = rcgen::date_time_ymd(2000, 1, 1);
    params.not_after = rcgen::date_time_ymd(2999, 1, 1);
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, common_name);
    params
}

impl Authority {
    /// A new one for a cluster of this name; not stored yet.
    ///
    /// # Errors
    /// Where no key can be made.
    pub fn create(cluster: &str) -> Result<Self, TrustError> {
        let key = new_key()?;
        let mut params = params(format!("vmtwin cluster {cluster}"));
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
        let certificate_pem = params.self_signed(&key).map_err(made)?.pem();
        let key_pem = key.serialize_pem();
        Ok(Self { issuer: Issuer::new(params, key), certificate_pem, key_pem })
    }

    /// This host's copy.
    ///
    /// # Errors
    /// Where it has none.
    pub fn load(paths: &Paths) -> Result<Self, TrustError> {
        let text = |name: &str| {
            let file = paths.tls().join(name);
            let bytes = read(&file)?;
            String::from_utf8(bytes).map_err(|_| TrustError::Damaged { file, why: "no text".into() })
        };
        Self::from_pem(text("ca.pem")?, text("ca.key")?)
    }

    /// From the two texts that a join gives to a node.
    ///
    /// # Errors
    /// Where they make no sense.
    pub fn from_pem(certificate_pem: String, key_pem: String) -> Result<Self, TrustError> {
        let key = KeyPair::from_pem(&key_pem).map_err(made)?;
        let issuer = Issuer::from_ca_cert_pem(&certificate_pem, key).map_err(made)?;
        Ok(Self { issuer, certificate_pem, key_pem })
    }

    /// Its certificate as text.
    #[must_use]
    pub fn certificate_pem(&self) -> &str {
        &self.certificate_pem
    }

    /// Its key as text: for nodes of the cluster only.
    #[must_use]
    pub fn key_pem(&self) -> &str {
        &self.key_pem
    }

    /// Signs a request for this name and no other, whatever the request asks for.
    ///
    /// # Errors
    /// Where the request makes no sense.
    pub fn sign(&self, request_pem: &str, identity: &Identity) -> Result<String, TrustError> {
        let mut request = CertificateSigningRequestParams::from_pem(request_pem).map_err(made)?;
        let mut params = params(identity.name.clone());
        let uri = identity.to_string().try_into().map_err(made)?;
        params.subject_alt_names = vec![SanType::URI(uri)];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        request.params = params;
        Ok(request.signed_by(&self.issuer).map_err(made)?.pem())
    }
}

impl Request {
    /// A new key and its request.
    ///
    /// # Errors
    /// Where no key can be made.
    pub fn create() -> Result<Self, TrustError> {
        let key = new_key()?;
        let request = params("vmtwin".into()).serialize_request(&key).map_err(made)?;
        Ok(Self { key_pem: key.serialize_pem(), pem: request.pem().map_err(made)? })
    }

    /// Puts key, signed certificate and authority into the `tls` folder, readable by root only. `authority_key` goes to
    /// nodes, not to a witness.
    ///
    /// # Errors
    /// As the system says.
    pub fn store(
        &self,
        paths: &Paths,
        certificate_pem: &str,
        authority_pem: &str,
        authority_key: Option<&str>,
    ) -> Result<(), TrustError> {
        let tls = paths.tls();
        let failed = |source| TrustError::File { file: tls.clone(), source };
        DirBuilder::new().recursive(true).mode(0o700).create(&tls).map_err(failed)?;
        let mut files = vec![("ca.pem", authority_pem), ("node.key", self.key_pem.as_str())];
        files.extend(authority_key.map(|key| ("ca.key", key)));
        // Last: with it the folder is whole.
        files.push(("node.pem", certificate_pem));
        for (name, text) in files {
            let file = tls.join(name);
            durable::write(&file, text.as_bytes(), 0o600).map_err(|source| TrustError::File { file, source })?;
        }
        Credentials::load(paths).map(|_| ())
    }
}

/// What a token names the authority by: BLAKE3 of its certificate.
#[must_use]
pub fn fingerprint(authority: &CertificateDer<'_>) -> String {
    blake3::hash(authority).to_hex().to_string()
}

impl Authority {
    /// The fingerprint of this host's authority.
    ///
    /// # Errors
    /// Where it has none.
    pub fn own_fingerprint(paths: &Paths) -> Result<String, TrustError> {
        Ok(fingerprint(&certificate(&paths.tls().join("ca.pem"))?))
    }
}
