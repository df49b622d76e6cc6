//! Join tokens: where to join, the authority's fingerprint, a secret. Used once, within an hour.
//!
//! The giving node keeps only the secret's hash, as a file's name; taking the file away is the use, so two joins with one
//! token cannot both find it.
use super::{Authority, TrustError};
use crate::config::{Paths, durable};
use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

/// How long a token is good, in seconds.
pub const TOKEN_SECONDS: u64 = 3600;

/// Given by `cluster token`, as one word: `vmtwin1_ADDRESS_FINGERPRINT_SECRET`.
#[derive(Clone, PartialEq, Eq)]
pub struct Token {
    /// Node to join at, port 7720.
    pub address: IpAddr,
    /// BLAKE3 of the authority's certificate, in hex.
    pub fingerprint: String,
    /// 32 hex digits.
    pub secret: String,
}

/// Why a token was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TokenRefused {
    /// Not in the form of a token.
    #[error("this is no join token: copy the whole line that `vmtwin cluster token` printed")]
    Form,
    /// Never given here, or used.
    #[error("this token was not given here, or was used already: `vmtwin cluster token` gives a new one")]
    Unknown,
    /// Too late.
    #[error("this token has run out (it is good for one hour): `vmtwin cluster token` gives a new one")]
    Expired,
}

impl fmt::Display for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "vmtwin1_{}_{}_{}", self.address, self.fingerprint, self.secret)
    }
}

impl FromStr for Token {
    type Err = TokenRefused;
    fn from_str(text: &str) -> Result<Self, TokenRefused> {
        let parts: Vec<&str> = text.trim().split('_').collect();
        let ["vmtwin1", address, fingerprint, secret] = parts[..] else { return Err(TokenRefused::Form) };
        let hex = |text: &str, digits| text.len() == digits && text.bytes().all(|c| c.is_ascii_hexdigit());
        let address = address.parse().map_err(|_| TokenRefused::Form)?;
        if !hex(fingerprint, 64) || !hex(secret, 32) {
            return Err(TokenRefused::Form);
        }
        Ok(Self { address, fingerprint: fingerprint.to_owned(), secret: secret.to_owned() })
    }
}

impl Token {
    /// A new one, remembered on this node until it is used. `now`: seconds since 1970.
    ///
    /// # Errors
    /// Where this node is in no cluster, or cannot write.
    pub fn give(paths: &Paths, address: IpAddr, now: u64) -> Result<Self, TrustError> {
        let folder = paths.tokens();
        let failed = |source| TrustError::File { file: folder.clone(), source };
        let fingerprint = Authority::own_fingerprint(paths)?;
        let mut secret = [0u8; 16];
        getrandom::fill(&mut secret).map_err(|e| failed(std::io::Error::other(e.to_string())))?;
        let token = Self { address, fingerprint, secret: format!("{:032x}", u128::from_be_bytes(secret)) };
        std::fs::create_dir_all(&folder).map_err(failed)?;
        let until = now + TOKEN_SECONDS;
        durable::write(&folder.join(file_of(&token.secret)), until.to_string().as_bytes(), 0o600).map_err(failed)?;
        Ok(token)
    }

    /// Takes the token with this secret: good or not, it is gone then.
    ///
    /// # Errors
    /// `Unknown`, `Expired`.
    pub fn take(paths: &Paths, secret: &str, now: u64) -> Result<(), TokenRefused> {
        let file = paths.tokens().join(file_of(secret));
        let until = std::fs::read_to_string(&file).map_err(|_| TokenRefused::Unknown)?;
        std::fs::remove_file(&file).map_err(|_| TokenRefused::Unknown)?;
        match until.parse::<u64>() {
            Ok(until) if now <= until => Ok(()),
            _ => Err(TokenRefused::Expired),
        }
    }
}

fn file_of(secret: &str) -> String {
    blake3::hash(secret.as_bytes()).to_hex().to_string()
}
