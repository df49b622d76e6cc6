//! Puts frames together out of the bytes of a stream.
//!
//! Holds: the frame that is being read. Data of writes goes into a slot of the pool, page-aligned for the disk; everything
//! else onto the heap. Invariant: no frame is handed on whose checksums do not fit; no more is set aside than the header's
//! length, which is bounded.
use std::io::{self, ErrorKind, Read};
use vmtwin_core::wire::codec::DecodeError;
use vmtwin_core::wire::frame::{HEADER_BYTES, Header, Kind};
use vmtwin_ring::{Pool, Shared, Slot};

/// What followed a header.
#[derive(Debug)]
pub enum Body {
    /// Data of a write.
    Slot(Shared),
    /// Anything else.
    Bytes(Vec<u8>),
}

/// What came of reading on.
#[derive(Debug)]
pub enum Taken {
    /// A whole frame; there may be more.
    Frame(Header, Body),
    /// The bytes are used up.
    Starved,
    /// No slot is free for the data that comes next.
    NoSlot,
}

/// Why a stream cannot be gone on with.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// Bytes that are no frame, or a damaged one.
    #[error("a frame from the peer is refused: {0}")]
    Refused(#[from] DecodeError),
    /// The stream.
    #[error("the peer link cannot be read: {0}")]
    Read(#[from] io::Error),
}

enum Target {
    Slot(Slot),
    Bytes(Vec<u8>),
}

/// The frame that is being read.
pub struct Assembly {
    header: [u8; HEADER_BYTES],
    have: usize,
    body: Option<(Header, Target)>,
    have_body: usize,
}

impl Default for Assembly {
    fn default() -> Self {
        Self { header: [0; HEADER_BYTES], have: 0, body: None, have_body: 0 }
    }
}

impl Assembly {
    /// Reads on until a frame is whole.
    ///
    /// # Errors
    /// The link is of no use any more.
    pub fn take(&mut self, from: &mut impl Read, pool: &Pool) -> Result<Taken, FrameError> {
        if self.body.is_none() {
            while self.have < HEADER_BYTES {
                match read_some(from, &mut self.header[self.have..])? {
                    0 => return Ok(Taken::Starved),
                    count => self.have += count,
                }
            }
            let header = Header::decode(&self.header)?;
            let target = if header.kind == Kind::Write {
                let Some(slot) = pool.take() else { return Ok(Taken::NoSlot) };
                Target::Slot(slot)
            } else {
                Target::Bytes(vec![0; header.length as usize])
            };
            (self.body, self.have_body) = (Some((header, target)), 0);
        }
        let (header, target) = self.body.as_mut().expect("just seen to");
        let length = header.length as usize;
        let room = match target {
            Target::Slot(slot) => &mut slot.payload_mut()[..length],
            Target::Bytes(bytes) => &mut bytes[..],
        };
        while self.have_body < length {
            match read_some(from, &mut room[self.have_body..])? {
                0 => return Ok(Taken::Starved),
                count => self.have_body += count,
            }
        }
        header.check_payload(room)?;
        let (header, target) = self.body.take().expect("just seen to");
        self.have = 0;
        let body = match target {
            Target::Slot(slot) => Body::Slot(slot.share()),
            Target::Bytes(bytes) => Body::Bytes(bytes),
        };
        Ok(Taken::Frame(header, body))
    }
}

/// Reads what is there; 0 where nothing is, now or ever: the end of the stream is told by the socket.
fn read_some(from: &mut impl Read, to: &mut [u8]) -> io::Result<usize> {
    match from.read(to) {
        Err(e) if e.kind() == ErrorKind::WouldBlock => Ok(0),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use vmtwin_core::ids::{FileId, Sequence, SessionId};

    fn frame(kind: Kind, payload: &[u8]) -> Vec<u8> {
        let mut header = Header::new(kind, SessionId(3), Sequence(4)).seal(payload);
        header.file = FileId(5);
        [&header.encode()[..], payload].concat()
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]
        #[test]
        fn frames_come_out_whole_however_the_bytes_were_cut(
            payloads in proptest::collection::vec((any::<bool>(), proptest::collection::vec(any::<u8>(), 1..9000)), 1..6),
            cuts in proptest::collection::vec(1_usize..5000, 1..40),
        ) {
            let pool = Pool::new(16).unwrap();
            let kind = |write| if write { Kind::Write } else { Kind::Answer };
            let stream: Vec<u8> = payloads.iter().flat_map(|(w, p)| frame(kind(*w), p)).collect();
            let (mut assembly, mut out, mut at, mut cuts) = (Assembly::default(), Vec::new(), 0, cuts.into_iter().cycle());
            while at < stream.len() {
                let end = (at + cuts.next().unwrap()).min(stream.len());
                let mut piece = &stream[at..end];
                while let Taken::Frame(header, body) = assembly.take(&mut piece, &pool).unwrap() {
                    let bytes = match &body {
                        Body::Slot(slot) => slot.payload()[..header.length as usize].to_vec(),
                        Body::Bytes(bytes) => bytes.clone(),
                    };
                    out.push((header.kind == Kind::Write, bytes));
                }
                prop_assert!(piece.is_empty());
                at = end;
            }
            prop_assert_eq!(out, payloads);
        }
    }

    #[test]
    fn a_damaged_payload_or_header_ends_the_stream() {
        let pool = Pool::new(1).unwrap();
        let good = frame(Kind::Write, &[7; 100]);
        for at in [3, 40, 63, 64, 163] {
            let mut bad = good.clone();
            bad[at] ^= 1;
            let refused = Assembly::default().take(&mut &bad[..], &pool);
            assert!(matches!(refused, Err(FrameError::Refused(_))), "byte {at}: {refused:?}");
        }
    }

    #[test]
    fn data_waits_for_a_free_slot_and_is_read_then() {
        let pool = Pool::new(1).unwrap();
        let taken = pool.take().unwrap();
        let bytes = frame(Kind::Write, &[7; 100]);
        let (mut assembly, mut stream) = (Assembly::default(), &bytes[..]);
        assert!(matches!(assembly.take(&mut stream, &pool), Ok(Taken::NoSlot)));
        assert!(matches!(assembly.take(&mut stream, &pool), Ok(Taken::NoSlot)));
        drop(taken);
        assert!(matches!(assembly.take(&mut stream, &pool), Ok(Taken::Frame(..))));
    }
}
