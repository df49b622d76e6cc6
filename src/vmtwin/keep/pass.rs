//! Handing a peer's connection from `keep` to the module process, by SCM_RIGHTS over /run/vmtwin/NAME.link.
//!
//! `keep` has read the preamble and nothing else: the next byte is the TLS handshake's first (or the link's, in the clear).
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    recvmsg, sendmsg,
};
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::net::{SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::path::Path;
use std::time::Duration;
use tokio::io::Interest;
use tokio::net::{UnixListener, UnixStream};
use tokio::time::timeout;

const WAIT: Duration = Duration::from_secs(5);
const FROM_BYTES_MAX: usize = 64;

/// Gives `socket` to the module process that listens at `link`.
///
/// # Errors
/// `NotFound` or `ConnectionRefused` where there is no such process; `TimedOut` where it does not take it.
pub async fn hand_over(link: &Path, socket: &TcpStream, from: SocketAddr) -> io::Result<()> {
    let late = |_| io::Error::from(io::ErrorKind::TimedOut);
    let stream = timeout(WAIT, UnixStream::connect(link)).await.map_err(late)??;
    let from = from.to_string();
    let send = || {
        let mut room = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut room);
        let sockets = [socket.as_fd()];
        assert!(control.push(SendAncillaryMessage::ScmRights(&sockets)), "the room is for one descriptor");
        Ok(sendmsg(&stream, &[IoSlice::new(from.as_bytes())], &mut control, SendFlags::NOSIGNAL)?)
    };
    timeout(WAIT, stream.async_io(Interest::WRITABLE, send)).await.map_err(late)?.map(|_| ())
}

/// The module process's end.
#[derive(Debug)]
pub struct Inbox {
    listener: UnixListener,
}

impl Inbox {
    /// Listens at `link`; a socket that a dead process left there is replaced.
    ///
    /// # Errors
    /// As bind(2) says.
    pub fn bind(link: &Path) -> io::Result<Self> {
        match std::fs::remove_file(link) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        let listener = UnixListener::bind(link)?;
        std::fs::set_permissions(link, std::os::unix::fs::PermissionsExt::from_mode(0o600))?;
        Ok(Self { listener })
    }

    /// The next connection, in non-blocking mode, and where it comes from, for the log.
    ///
    /// # Errors
    /// Where the listener itself fails. A caller that sends nothing is passed over.
    pub async fn next(&self) -> io::Result<(TcpStream, String)> {
        loop {
            let (stream, _) = self.listener.accept().await?;
            if let Ok(Ok(passed)) = timeout(WAIT, stream.async_io(Interest::READABLE, || receive(&stream))).await {
                return Ok(passed);
            }
        }
    }
}

fn receive(stream: &UnixStream) -> io::Result<(TcpStream, String)> {
    let mut room = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut room);
    let mut from = [0; FROM_BYTES_MAX];
    let got = recvmsg(stream, &mut [IoSliceMut::new(&mut from)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let socket = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut sockets) => sockets.next(),
        _ => None,
    });
    let socket = socket.ok_or_else(|| io::Error::other("no descriptor came along"))?;
    Ok((TcpStream::from(socket), String::from_utf8_lossy(&from[..got.bytes]).into_owned()))
}
