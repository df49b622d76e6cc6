//! The blocking part of a new peer link: TCP, preamble, TLS handshake. Run on a helper thread; the ring takes over after.
//!
//! With encryption switched off both sides still prove who they are: the handshake is done, one byte goes each way under
//! TLS, and what follows is in the clear. So that no clear byte is taken for TLS, records are read one by one.
use crate::engine::messages::PeerSocket;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, ClientConnection, Connection, ServerConfig, ServerConnection};
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};
use vmtwin_core::ids::NodeName;

/// Longest time for the TCP connection: a host that is down answers nothing, and it is dialed again soon.
pub const CONNECT_LIMIT: Duration = Duration::from_secs(1);
/// Longest time for all of it.
pub const HANDSHAKE_LIMIT: Duration = Duration::from_secs(10);
/// What each side says under TLS before it goes on in the clear.
const CLEAR_FROM_HERE: u8 = 0x43;
const RECORD_HEADER_BYTES: usize = 5;

/// Why there is no link.
#[derive(Debug, thiserror::Error)]
pub enum HandshakeError {
    /// TCP.
    #[error("cannot reach {address}")]
    Connect {
        /// Where to.
        address: SocketAddr,
        /// The kernel's words.
        source: io::Error,
    },
    /// The socket, or its time limit.
    #[error("the connection broke in the handshake")]
    Broken(#[source] io::Error),
    /// TLS: another cluster's certificate, another version.
    #[error("TLS refused")]
    Tls(#[source] rustls::Error),
    /// The certificate is good, but names nobody that may be here.
    #[error("the peer's certificate names nobody that we know: {0}")]
    Who(String),
    /// One side encrypts and the other does not.
    #[error("the peer encrypts this link and we do not, or the other way round: cluster.xml differs")]
    Mode,
}

/// How to tell the node from its certificate.
pub type WhoIs<'a> = &'a dyn Fn(&CertificateDer<'_>) -> Result<NodeName, String>;

/// Connects, sends the preamble, shakes hands. `clear`: go on without encryption.
///
/// # Errors
/// No contact, a refused certificate, or the time limit.
pub fn dial(
    address: SocketAddr,
    preamble: &[u8],
    config: Arc<ClientConfig>,
    name: ServerName<'static>,
    clear: bool,
    who: WhoIs<'_>,
) -> Result<PeerSocket, HandshakeError> {
    let deadline = Instant::now() + HANDSHAKE_LIMIT;
    let connected = TcpStream::connect_timeout(&address, CONNECT_LIMIT);
    let socket = connected.map_err(|source| HandshakeError::Connect { address, source })?;
    let mut records = Records { socket: &socket, deadline, left: 0, header: Vec::new() };
    records.write_all(preamble).map_err(HandshakeError::Broken)?;
    let client = ClientConnection::new(config, name).map_err(HandshakeError::Tls)?;
    let tls = shake(records, Connection::Client(client), clear)?;
    finish(socket, tls, true, clear, who)
}

/// Shakes hands on a connection whose preamble `keep` has read.
///
/// # Errors
/// A refused certificate, a broken connection, or the time limit.
pub fn accept(
    socket: OwnedFd,
    config: Arc<ServerConfig>,
    clear: bool,
    who: WhoIs<'_>,
) -> Result<PeerSocket, HandshakeError> {
    let socket = TcpStream::from(socket);
    let deadline = Instant::now() + HANDSHAKE_LIMIT;
    let records = Records { socket: &socket, deadline, left: 0, header: Vec::new() };
    let server = ServerConnection::new(config).map_err(HandshakeError::Tls)?;
    let tls = shake(records, Connection::Server(server), clear)?;
    finish(socket, tls, false, clear, who)
}

fn finish(
    socket: TcpStream,
    tls: Connection,
    dialed: bool,
    clear: bool,
    who: WhoIs<'_>,
) -> Result<PeerSocket, HandshakeError> {
    let certificate = tls.peer_certificates().and_then(<[_]>::first);
    let certificate = certificate.ok_or_else(|| HandshakeError::Who("it sent none".to_owned()))?;
    let peer = who(certificate).map_err(HandshakeError::Who)?;
    let no_limit = socket.set_read_timeout(None).and_then(|()| socket.set_write_timeout(None));
    no_limit.map_err(HandshakeError::Broken)?;
    Ok(PeerSocket { socket: socket.into(), peer, dialed, tls: (!clear).then(|| Box::new(tls)) })
}

fn shake(mut records: Records<'_>, mut tls: Connection, clear: bool) -> Result<Connection, HandshakeError> {
    records.socket.set_nonblocking(false).map_err(HandshakeError::Broken)?;
    records.socket.set_nodelay(true).map_err(HandshakeError::Broken)?;
    while tls.is_handshaking() {
        exchange(&mut records, &mut tls)?;
    }
    // Both sides say how they go on, so that two configurations that differ are told apart from noise.
    let mode = if clear { CLEAR_FROM_HERE } else { 0 };
    tls.writer().write_all(&[mode]).map_err(HandshakeError::Broken)?;
    let mut said = [0_u8];
    loop {
        match tls.reader().read(&mut said) {
            Ok(1) => break,
            Ok(_) => return Err(HandshakeError::Broken(io::ErrorKind::UnexpectedEof.into())),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => exchange(&mut records, &mut tls)?,
            Err(e) => return Err(HandshakeError::Broken(e)),
        }
    }
    send_all(&mut records, &mut tls)?;
    if said[0] == mode { Ok(tls) } else { Err(HandshakeError::Mode) }
}

/// Sends what is to be sent, then takes in one record.
fn exchange(records: &mut Records<'_>, tls: &mut Connection) -> Result<(), HandshakeError> {
    send_all(records, tls)?;
    if tls.read_tls(records).map_err(HandshakeError::Broken)? == 0 {
        return Err(HandshakeError::Broken(io::ErrorKind::UnexpectedEof.into()));
    }
    if let Err(e) = tls.process_new_packets() {
        let _ = send_all(records, tls); // the alert tells the other side why
        return Err(HandshakeError::Tls(e));
    }
    send_all(records, tls)
}

fn send_all(records: &mut Records<'_>, tls: &mut Connection) -> Result<(), HandshakeError> {
    while tls.wants_write() {
        tls.write_tls(records).map_err(HandshakeError::Broken)?;
    }
    Ok(())
}

/// A socket that gives one TLS record and no byte more, and nothing after the deadline.
struct Records<'a> {
    socket: &'a TcpStream,
    deadline: Instant,
    /// Bytes of the record that are still to come.
    left: usize,
    /// The record's header, read and not handed on yet.
    header: Vec<u8>,
}

impl Records<'_> {
    fn limit(&self) -> io::Result<Duration> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() { Err(io::ErrorKind::TimedOut.into()) } else { Ok(left) }
    }
}

impl Read for Records<'_> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        if self.left == 0 && self.header.is_empty() {
            let mut header = [0_u8; RECORD_HEADER_BYTES];
            let mut have = 0;
            while have < header.len() {
                self.socket.set_read_timeout(Some(self.limit()?))?;
                match self.socket.read(&mut header[have..])? {
                    0 => return Ok(0),
                    count => have += count,
                }
            }
            self.left = usize::from(u16::from_be_bytes([header[3], header[4]]));
            self.header = header.to_vec();
        }
        if !self.header.is_empty() {
            let count = self.header.len().min(out.len());
            out[..count].copy_from_slice(&self.header[..count]);
            self.header.drain(..count);
            return Ok(count);
        }
        self.socket.set_read_timeout(Some(self.limit()?))?;
        let most = self.left.min(out.len());
        let count = self.socket.read(&mut out[..most])?;
        self.left -= count;
        Ok(count)
    }
}

impl Write for Records<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.socket.set_write_timeout(Some(self.limit()?))?;
        self.socket.write(bytes)
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use std::net::TcpListener;

    /// Certificates of a cluster of two nodes, and configurations that demand them of both sides.
    pub(crate) fn configurations() -> (Arc<ClientConfig>, Arc<ServerConfig>) {
        use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
        let authority_key = KeyPair::generate().unwrap();
        let mut authority = CertificateParams::new(Vec::new()).unwrap();
        authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let authority_cert = authority.self_signed(&authority_key).unwrap();
        let issuer = Issuer::new(authority, authority_key);
        let key = KeyPair::generate().unwrap();
        let node = CertificateParams::new(vec!["node".to_owned()]).unwrap();
        let chain = vec![node.signed_by(&key, &issuer).unwrap().der().clone()];
        let key = rustls::pki_types::PrivateKeyDer::Pkcs8(key.serialize_der().into());
        let mut roots = rustls::RootCertStore::empty();
        roots.add(authority_cert.der().clone()).unwrap();
        let roots = Arc::new(roots);
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let client = ClientConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_root_certificates(roots.clone())
            .with_client_auth_cert(chain.clone(), key.clone_key())
            .unwrap();
        let verifier = rustls::server::WebPkiClientVerifier::builder_with_provider(roots, provider.clone());
        let server = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_client_cert_verifier(verifier.build().unwrap())
            .with_single_cert(chain, key)
            .unwrap();
        (Arc::new(client), Arc::new(server))
    }

    /// Two ends of a link over loopback, by way of `dial` and `accept`.
    pub(crate) fn linked(
        clear: (bool, bool),
    ) -> (Result<PeerSocket, HandshakeError>, Result<PeerSocket, HandshakeError>) {
        let (client, server) = configurations();
        linked_with(client, server, clear)
    }

    pub(crate) fn linked_with(
        client: Arc<ClientConfig>,
        server: Arc<ServerConfig>,
        clear: (bool, bool),
    ) -> (Result<PeerSocket, HandshakeError>, Result<PeerSocket, HandshakeError>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let accepting = std::thread::spawn(move || {
            let (mut socket, _) = listener.accept().unwrap();
            let mut preamble = [0_u8; 8];
            socket.read_exact(&mut preamble).unwrap();
            assert_eq!(&preamble, b"preamble");
            accept(socket.into(), server, clear.1, &|_| Ok(NodeName::new("dialer").unwrap()))
        });
        let name = ServerName::try_from("node").unwrap();
        let who = |_: &CertificateDer<'_>| Ok(NodeName::new("acceptor").unwrap());
        let dialed = dial(address, b"preamble", client, name, clear.0, &who);
        (dialed, accepting.join().unwrap())
    }

    #[test]
    fn both_sides_know_each_other_and_go_on_encrypted() {
        let (dialed, accepted) = linked((false, false));
        let (dialed, accepted) = (dialed.unwrap(), accepted.unwrap());
        assert!(dialed.dialed && dialed.tls.is_some() && dialed.peer.as_str() == "acceptor");
        assert!(!accepted.dialed && accepted.tls.is_some() && accepted.peer.as_str() == "dialer");
    }

    #[test]
    fn in_the_clear_no_byte_after_the_handshake_is_lost() {
        for _ in 0..20 {
            let (dialed, accepted) = linked((true, true));
            let (mut a, mut b) = (TcpStream::from(dialed.unwrap().socket), TcpStream::from(accepted.unwrap().socket));
            let (mut at_a, mut at_b) = ([0_u8; 5], [0_u8; 5]);
            b.write_all(b"first").unwrap();
            a.write_all(b"other").unwrap();
            a.read_exact(&mut at_a).unwrap();
            b.read_exact(&mut at_b).unwrap();
            assert_eq!((&at_a, &at_b), (b"first", b"other"));
        }
    }

    #[test]
    fn a_side_that_encrypts_and_one_that_does_not_say_so() {
        let (dialed, accepted) = linked((true, false));
        assert!(matches!(dialed, Err(HandshakeError::Mode)) && matches!(accepted, Err(HandshakeError::Mode)));
    }

    #[test]
    fn a_certificate_of_another_cluster_is_refused() {
        let ((client, _), (_, server)) = (configurations(), configurations());
        let (dialed, accepted) = linked_with(client, server, (false, false));
        assert!(matches!(dialed, Err(HandshakeError::Tls(_))), "{dialed:?}");
        assert!(accepted.is_err());
    }
}
