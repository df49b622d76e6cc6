//! Requests to an acceptor and its answers, as they travel: over TLS to ports 7721 and 7722, plain over keep.sock.
//!
//! A frame: length u32 of what follows · nonce u64 (comes back in the answer) · for a request: module id u128 · kind u8 ·
//! body. A request's kinds: 1 a core request, 2 who are you, 3 make an acceptor, 4 forget it. An answer's: 1 a core answer,
//! 2 an id or none, 3 a refusal in words.
use std::io;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use vmtwin_core::arbiter::message::{Answer, Request};
use vmtwin_core::ids::{AcceptorId, ModuleId};
use vmtwin_core::wire::codec::{DecodeError, Reader, Writer};

/// Longest frame after its length.
pub const FRAME_BYTES_MAX: usize = 8192;
const TEXT_BYTES_MAX: usize = 500;

/// What is asked of a process that keeps acceptors.
#[derive(Clone, Debug, PartialEq)]
pub enum Ask {
    /// The protocol's own.
    Core(Request),
    /// The id of the module's acceptor.
    Who,
    /// The same; one is made where there is none.
    Make,
    /// The module is no longer protected: its state goes.
    Forget,
}

/// What comes back.
#[derive(Clone, Debug, PartialEq)]
#[expect(clippy::large_enum_variant, reason = "it lives from the socket to the next match")]
pub enum Reply {
    /// The protocol's own.
    Core(Answer),
    /// The id of the module's acceptor; none: there is no state of it here.
    Id(Option<AcceptorId>),
    /// Not done, and why.
    Refused(String),
}

/// A request with where it goes.
#[derive(Clone, Debug, PartialEq)]
pub struct Call {
    /// Comes back in the answer.
    pub nonce: u64,
    /// Whose acceptor.
    pub module: ModuleId,
    /// What.
    pub ask: Ask,
}

impl Call {
    /// The whole frame.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        frame(|out| {
            out.u64(self.nonce);
            out.u128(self.module.0);
            match &self.ask {
                Ask::Core(request) => {
                    out.u8(1);
                    request.encode(out);
                }
                Ask::Who => out.u8(2),
                Ask::Make => out.u8(3),
                Ask::Forget => out.u8(4),
            }
        })
    }

    /// Reads a frame without its length.
    ///
    /// # Errors
    /// Bytes that make no sense: the connection ends.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let mut from = Reader::new(bytes);
        let (nonce, module) = (from.u64()?, ModuleId(from.u128()?));
        let ask = match from.u8()? {
            1 => Ask::Core(Request::decode(&mut from)?),
            2 => Ask::Who,
            3 => Ask::Make,
            4 => Ask::Forget,
            _ => return Err(DecodeError::Bad { what: "kind of a request" }),
        };
        from.end()?;
        Ok(Self { nonce, module, ask })
    }
}

impl Reply {
    /// The whole frame.
    #[must_use]
    pub fn encode(&self, nonce: u64) -> Vec<u8> {
        frame(|out| {
            out.u64(nonce);
            match self {
                Self::Core(answer) => {
                    out.u8(1);
                    answer.encode(out);
                }
                Self::Id(id) => {
                    out.u8(2);
                    out.option(id.as_ref(), |out, id| out.u128(id.0));
                }
                Self::Refused(why) => {
                    out.u8(3);
                    let cut = why.char_indices().map(|(at, _)| at).take_while(|at| *at <= TEXT_BYTES_MAX - 4).last();
                    let short = if why.len() <= TEXT_BYTES_MAX { why } else { &why[..cut.unwrap_or(0)] };
                    out.text(short);
                }
            }
        })
    }

    /// Reads a frame without its length: the nonce and the answer.
    ///
    /// # Errors
    /// Bytes that make no sense: the connection ends.
    pub fn decode(bytes: &[u8]) -> Result<(u64, Self), DecodeError> {
        let mut from = Reader::new(bytes);
        let nonce = from.u64()?;
        let reply = match from.u8()? {
            1 => Self::Core(Answer::decode(&mut from)?),
            2 => Self::Id(from.option(|from| from.u128().map(AcceptorId))?),
            3 => Self::Refused(from.text(TEXT_BYTES_MAX)?.to_owned()),
            _ => return Err(DecodeError::Bad { what: "kind of an answer" }),
        };
        from.end()?;
        Ok((nonce, reply))
    }
}

fn frame(fill: impl FnOnce(&mut Writer<'_>)) -> Vec<u8> {
    let mut bytes = vec![0; 4];
    fill(&mut Writer::new(&mut bytes));
    let length = u32::try_from(bytes.len() - 4).expect("requests are small");
    assert!(length as usize <= FRAME_BYTES_MAX, "a request or answer larger than the bound of both sides");
    bytes[..4].copy_from_slice(&length.to_le_bytes());
    bytes
}

/// Reads one frame without its length; `None` where the other side has closed between two.
///
/// # Errors
/// A length beyond the bound, or as the connection says.
pub async fn read_frame(from: &mut (impl AsyncRead + Unpin)) -> io::Result<Option<Vec<u8>>> {
    let mut length = [0; 4];
    match from.read_exact(&mut length).await {
        Ok(_) => {}
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        Err(e) => return Err(e),
    }
    let length = u32::from_le_bytes(length) as usize;
    if length > FRAME_BYTES_MAX {
        return Err(io::Error::other(format!("a frame of {length} bytes, where {FRAME_BYTES_MAX} are allowed")));
    }
    let mut bytes = vec![0; length];
    from.read_exact(&mut bytes).await?;
    Ok(Some(bytes))
}

/// Writes a whole frame.
///
/// # Errors
/// As the connection says.
pub async fn write_frame(to: &mut (impl AsyncWrite + Unpin), bytes: &[u8]) -> io::Result<()> {
    to.write_all(bytes).await?;
    to.flush().await
}
