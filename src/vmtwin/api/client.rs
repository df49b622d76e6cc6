//! Asking a daemon: the CLI over /run/vmtwin/node.sock, a daemon another one over TLS, a host that joins without a name yet.
//!
//! Invariant: an answer is bounded in size and time, and a failure is a sentence with an exit code.
use super::types::ErrorBody;
use crate::config::Paths;
use crate::config::paths::PORT_API;
use crate::{listen, trust};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Bytes;
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

/// Longest answer.
pub const ANSWER_BYTES_MAX: usize = 16 << 20;
/// Per address; less where the whole has less.
const CONNECT_TIME: Duration = Duration::from_secs(3);

/// Whom to ask.
#[derive(Clone, Debug)]
pub enum Daemon {
    /// This host's own.
    Local(Paths),
    /// Another node's: certificates on both sides.
    Node {
        /// Ours.
        paths: Paths,
        /// Its name.
        name: String,
        /// Its addresses, best first.
        addresses: Vec<IpAddr>,
    },
    /// One that is known by its authority's fingerprint only.
    Joining {
        /// Where.
        address: IpAddr,
        /// From the token.
        fingerprint: String,
    },
}

impl Daemon {
    /// Asks for something that changes nothing.
    ///
    /// # Errors
    /// No contact (code 4), or what the daemon says.
    pub async fn get<A: DeserializeOwned>(&self, path: &str, limit: Duration) -> Result<A, ErrorBody> {
        self.ask(Method::GET, path, Bytes::new(), limit).await
    }

    /// Asks for an act.
    ///
    /// # Errors
    /// No contact (code 4), or what the daemon says.
    pub async fn post<A: DeserializeOwned>(
        &self,
        path: &str,
        body: &impl Serialize,
        limit: Duration,
    ) -> Result<A, ErrorBody> {
        let body = serde_json::to_vec(body).expect("requests of ours become JSON");
        self.ask(Method::POST, path, body.into(), limit).await
    }

    async fn ask<A: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
        limit: Duration,
    ) -> Result<A, ErrorBody> {
        let asked = async {
            match self {
                Self::Local(paths) => {
                    let stream = UnixStream::connect(paths.node_socket()).await.map_err(|e| self.no_contact(&e))?;
                    self.exchange(stream, method, path, body).await
                }
                Self::Node { paths, name, addresses } => {
                    let config = trust::client_config(paths, name).map_err(|e| failed(4, e.to_string()))?;
                    let stream = self.connect(config, addresses, limit).await?;
                    self.exchange(stream, method, path, body).await
                }
                Self::Joining { address, fingerprint } => {
                    let config = trust::join_client_config(fingerprint).map_err(|e| failed(1, e.to_string()))?;
                    let stream = self.connect(config, &[*address], limit).await?;
                    self.exchange(stream, method, path, body).await
                }
            }
        };
        match timeout(limit, asked).await {
            Ok(answer) => answer,
            Err(_) => Err(failed(4, format!("{} gave no answer within {} s", self.who(), limit.as_secs()))),
        }
    }

    async fn connect(
        &self,
        config: Arc<ClientConfig>,
        addresses: &[IpAddr],
        limit: Duration,
    ) -> Result<impl Stream + use<>, ErrorBody> {
        let connect_time = CONNECT_TIME.min(limit / 2);
        let mut last = std::io::Error::other("it has no address");
        for address in addresses {
            let connect = async {
                let stream = TcpStream::connect(SocketAddr::new(*address, PORT_API)).await?;
                listen::tune(&stream);
                TlsConnector::from(config.clone()).connect(trust::server_name(), stream).await
            };
            match timeout(connect_time, connect).await {
                Ok(Ok(stream)) => return Ok(stream),
                Ok(Err(e)) => last = e,
                Err(_) => last = std::io::Error::other("no answer in time"),
            }
        }
        Err(self.no_contact(&last))
    }

    async fn exchange<A: DeserializeOwned>(
        &self,
        stream: impl Stream + 'static,
        method: Method,
        path: &str,
        body: Bytes,
    ) -> Result<A, ErrorBody> {
        let broken = |e: &dyn std::fmt::Display| failed(4, format!("{} broke off: {e}", self.who()));
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(|e| broken(&e))?;
        // Ends with the answer; its own error shows there, too.
        let connection = tokio::spawn(connection);
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", "vmtwin")
            .header("content-type", "application/json")
            .body(Full::new(body))
            .map_err(|e| failed(2, format!("{path}: {e}")))?;
        let answer = sender.send_request(request).await.map_err(|e| broken(&e));
        let collected = match answer {
            Ok(answer) => {
                let status = answer.status();
                let body = Limited::new(answer.into_body(), ANSWER_BYTES_MAX).collect().await;
                body.map(|body| (status, body.to_bytes())).map_err(|e| broken(&e))
            }
            Err(e) => Err(e),
        };
        connection.abort();
        let (status, bytes) = collected?;
        if status == StatusCode::OK {
            return serde_json::from_slice(&bytes).map_err(|e| {
                failed(1, format!("{} answers in another form ({e}): is it of another version?", self.who()))
            });
        }
        Err(serde_json::from_slice(&bytes).unwrap_or_else(|_| {
            failed(1, format!("{} answers {status} to {path}: is it of another version?", self.who()))
        }))
    }

    fn who(&self) -> String {
        match self {
            Self::Local(_) => "the daemon".to_owned(),
            Self::Node { name, .. } => format!("node {name}"),
            Self::Joining { address, .. } => format!("the node at {address}"),
        }
    }

    fn no_contact(&self, e: &std::io::Error) -> ErrorBody {
        let hint = match self {
            Self::Local(_) => {
                "is it running? `systemctl start vmtwin`, or `vmtwin node` in the foreground; this needs root"
            }
            Self::Node { .. } => "is the host up, its daemon running, port 7720 open?",
            Self::Joining { .. } => "is its daemon running, port 7720 open, the token from this cluster?",
        };
        failed(4, format!("no contact with {} ({e}): {hint}", self.who()))
    }
}

trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Stream for T {}

/// A sentence and its exit code.
#[must_use]
pub fn failed(code: u8, error: impl Into<String>) -> ErrorBody {
    ErrorBody { error: error.into(), code }
}
