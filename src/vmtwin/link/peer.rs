//! One link to the peer's module process, on the ring.
//!
//! Holds: frames that wait, the bytes on their way, when the peer was heard last. Decides: when to send a beat, when a
//! silent link counts as cut. Keeps out: what frames mean. Invariant: at most one receive and one send are in flight, so
//! bytes keep their order; frames that wait hold their slots, never copies, so nothing grows beyond the requests in hand.
use super::frames::{Assembly, Body, FrameError, Taken};
use crate::engine::messages::PeerSocket;
use rustls::Connection;
use std::collections::VecDeque;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::time::Duration;
use vmtwin_core::ids::{NodeName, Sequence, SessionId};
use vmtwin_core::limits::{BEAT_MS, LINK_SILENT_MS};
use vmtwin_core::time::{Time, millis};
use vmtwin_core::wire::frame::{Header, Kind};
use vmtwin_ring::{Completion, Descriptor, Pool, Ring};

/// Bytes of one receive.
const RECEIVE_BYTES: usize = 256 * 1024;
/// A send takes in whole frames until it has this many bytes.
const SEND_BYTES: usize = 256 * 1024;
/// A link that is to be closed has this long to send what waits.
const LINGER: Duration = Duration::from_millis(500);

/// A frame that waits to be sent.
#[derive(Debug)]
struct Frame {
    header: Header,
    body: Option<Body>,
}

/// One link.
pub struct Peer {
    socket: Descriptor,
    tls: Option<Box<Connection>>,
    /// Whom the certificate names.
    pub name: NodeName,
    /// Dialed by us.
    pub dialed: bool,
    queue: VecDeque<Frame>,
    sending: bool,
    /// The buffer of the next send; away while one is in flight.
    out: Vec<u8>,
    /// The buffer of the next receive; away while one is in flight.
    inbox: Vec<u8>,
    /// What of the inbox was received and not yet read.
    unread: std::ops::Range<usize>,
    receiving: bool,
    assembly: Assembly,
    heard: Time,
    spoke: Time,
    closing: Option<Time>,
}

impl Peer {
    /// Takes over a socket after its handshake.
    ///
    /// # Errors
    /// The socket is broken already.
    pub fn new(link: PeerSocket, now: Time) -> io::Result<Self> {
        let PeerSocket { socket, peer, dialed, mut tls } = link;
        set_up(&socket)?;
        if let Some(tls) = &mut tls {
            tls.set_buffer_limit(None); // bounded by what `send` takes in
        }
        Ok(Self {
            socket: Rc::new(socket),
            tls,
            name: peer,
            dialed,
            queue: VecDeque::new(),
            sending: false,
            out: Vec::new(),
            inbox: vec![0; RECEIVE_BYTES],
            unread: 0..0,
            receiving: false,
            assembly: Assembly::default(),
            heard: now,
            spoke: now,
            closing: None,
        })
    }

    /// Queues a frame. A slot's first `header.length` bytes are its payload.
    pub fn push(&mut self, header: Header, body: Option<Body>) {
        if self.closing.is_none() {
            self.queue.push_back(Frame { header, body });
        }
    }

    /// Sends what waits, if nothing is on its way. True: the ring has a request under this token.
    ///
    /// # Errors
    /// TLS is of no use any more.
    pub fn send(&mut self, ring: &mut Ring, token: u64, now: Time) -> Result<bool, FrameError> {
        if self.sending {
            return Ok(false);
        }
        let mut out = std::mem::take(&mut self.out);
        out.clear();
        while out.len() < SEND_BYTES {
            let Some(frame) = self.queue.pop_front() else { break };
            let payload = match &frame.body {
                None => &[][..],
                Some(Body::Bytes(bytes)) => bytes,
                Some(Body::Slot(slot)) => &slot.payload()[..frame.header.length as usize],
            };
            let header = frame.header.seal(payload).encode();
            match &mut self.tls {
                None => {
                    out.extend_from_slice(&header);
                    out.extend_from_slice(payload);
                }
                Some(tls) => {
                    tls.writer().write_all(&header)?;
                    tls.writer().write_all(payload)?;
                }
            }
            self.flush_tls(&mut out)?;
        }
        self.flush_tls(&mut out)?; // what TLS itself has to say
        if out.is_empty() {
            self.out = out;
            return Ok(false);
        }
        let length = out.len();
        (self.sending, self.spoke) = (true, now);
        ring.send(&self.socket, out, 0..length, token);
        Ok(true)
    }

    fn flush_tls(&mut self, out: &mut Vec<u8>) -> io::Result<()> {
        if let Some(tls) = &mut self.tls {
            while tls.wants_write() {
                tls.write_tls(out)?;
            }
        }
        Ok(())
    }

    /// A send has ended. Gives the reason where the link is broken.
    pub fn sent(&mut self, done: Completion) -> Option<String> {
        self.sending = false;
        let out = done.memory.and_then(vmtwin_ring::Memory::into_bytes).unwrap_or_default();
        let broken = match done.result {
            Ok(count) if count as usize == out.len() || out.is_empty() => None,
            Ok(_) => Some("the connection broke while sending".to_owned()),
            Err(e) => Some(format!("cannot send to the peer: {e}")),
        };
        self.out = out;
        broken
    }

    /// Asks for more bytes, if none are asked for and all were read. True: the ring has a request under this token.
    pub fn receive(&mut self, ring: &mut Ring, token: u64) -> bool {
        if self.receiving || !self.unread.is_empty() {
            return false;
        }
        self.receiving = true;
        self.unread = 0..0; // of a buffer that is away
        let inbox = std::mem::take(&mut self.inbox);
        ring.recv(&self.socket, inbox, 0..RECEIVE_BYTES, token);
        true
    }

    /// A receive has ended. Gives the reason where the link is broken.
    pub fn received(&mut self, done: Completion, now: Time) -> Option<String> {
        self.receiving = false;
        self.inbox = done.memory.and_then(vmtwin_ring::Memory::into_bytes).unwrap_or_else(|| vec![0; RECEIVE_BYTES]);
        match done.result {
            Ok(0) => Some("the peer closed the connection".to_owned()),
            Ok(count) => {
                self.unread = 0..count as usize;
                self.heard = now;
                None
            }
            Err(e) => Some(format!("cannot receive from the peer: {e}")),
        }
    }

    /// The next whole frame. Beats are swallowed.
    ///
    /// # Errors
    /// Bytes that are no frame of ours: the link is to be closed.
    pub fn next(&mut self, pool: &Pool) -> Result<Taken, FrameError> {
        loop {
            let taken = match &mut self.tls {
                None => {
                    let mut bytes = &self.inbox[self.unread.clone()];
                    let taken = self.assembly.take(&mut bytes, pool)?;
                    self.unread.start = self.unread.end - bytes.len();
                    taken
                }
                Some(tls) => match self.assembly.take(&mut tls.reader(), pool)? {
                    Taken::Starved if !self.unread.is_empty() => {
                        let mut bytes = &self.inbox[self.unread.clone()];
                        if tls.read_tls(&mut bytes)? == 0 {
                            // TLS has said its last word, and these bytes came after it.
                            return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
                        }
                        self.unread.start = self.unread.end - bytes.len();
                        tls.process_new_packets().map_err(io::Error::other)?;
                        continue;
                    }
                    taken => taken,
                },
            };
            match taken {
                Taken::Frame(header, _) if header.kind == Kind::Beat => {}
                taken => return Ok(taken),
            }
        }
    }

    /// Sends a beat where nothing was sent for a while.
    pub fn beat(&mut self, now: Time) {
        if self.queue.is_empty() && !self.sending && now.since(self.spoke) >= millis(BEAT_MS) {
            self.push(Header::new(Kind::Beat, SessionId(0), Sequence(0)), None);
        }
    }

    /// Whether the peer was silent for too long.
    #[must_use]
    pub fn is_silent(&self, now: Time) -> bool {
        now.since(self.heard) > millis(LINK_SILENT_MS)
    }

    /// Whether the peer was heard within two beats.
    #[must_use]
    pub fn is_lively(&self, now: Time) -> bool {
        now.since(self.heard) < millis(2 * BEAT_MS)
    }

    /// We ourselves did not look for a while: the silence up to now proves nothing.
    pub fn forgive(&mut self, now: Time) {
        self.heard = self.heard.max(now);
    }

    /// No more frames: what waits goes out with this last one, then the link closes.
    pub fn close(&mut self, why: &str, now: Time) {
        if self.closing.is_none() {
            let why: String = why.chars().take(200).collect();
            let bye = Header::new(Kind::Bye, SessionId(0), Sequence(0)).seal(why.as_bytes());
            self.push(bye, Some(Body::Bytes(why.into_bytes())));
            self.closing = Some(now + LINGER);
        }
    }

    /// Whether it was told to close.
    #[must_use]
    pub fn is_closing(&self) -> bool {
        self.closing.is_some()
    }

    /// Whether a link that closes has sent all, or had its time.
    #[must_use]
    pub fn is_over(&self, now: Time) -> bool {
        self.closing.is_some_and(|end| now >= end || (self.queue.is_empty() && !self.sending))
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // The ring keeps the descriptor until its requests ended; this ends them.
        let _ = rustix::net::shutdown(&*self.socket, rustix::net::Shutdown::Both);
    }
}

impl std::fmt::Debug for Peer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Peer({}, {} frames wait)", self.name, self.queue.len())
    }
}

/// No delay for small frames; a congestion control that does not pace them; an end to sends that nobody acknowledges.
fn set_up(socket: &OwnedFd) -> io::Result<()> {
    let socket = socket2::SockRef::from(socket);
    socket.set_nonblocking(false)?;
    if socket.local_addr()?.is_unix() {
        return Ok(()); // in tests
    }
    socket.set_tcp_nodelay(true)?;
    socket.set_tcp_user_timeout(Some(Duration::from_millis(2 * LINK_SILENT_MS)))?;
    // Where the kernel was built without it the host's own is as good as any.
    let _ = socket.set_tcp_congestion(b"reno");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::link::handshake::tests::linked;
    use vmtwin_ring::Memory;

    #[test]
    fn bytes_after_the_last_word_of_tls_end_the_link() {
        let (dialed, accepted) = linked((false, false));
        let (dialed, now, pool) = (dialed.unwrap(), Time(1), Pool::new(1).unwrap());
        let mut peer = Peer::new(accepted.unwrap(), now).unwrap();
        let (mut bytes, mut tls) = (Vec::new(), dialed.tls.unwrap());
        tls.send_close_notify();
        tls.write_tls(&mut bytes).unwrap();
        bytes.resize(bytes.len() + 20_000, 7); // more than TLS takes in at once
        let done = Completion { token: 1, result: Ok(bytes.len() as u32), memory: Some(Memory::Bytes(bytes)) };
        assert_eq!(peer.received(done, now), None);
        let said = loop {
            match peer.next(&pool) {
                Ok(Taken::Frame(..)) => {}
                other => break other,
            }
        };
        assert!(matches!(said, Err(FrameError::Read(_))), "{said:?}");
    }
}
