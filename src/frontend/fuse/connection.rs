//! One mounted connection: reads requests, writes answers.
//!
//! Holds: the device, whether it has more to read. Invariant: the device is read only with a free slot in hand, and
//! never blocks (O_NONBLOCK): a poll in the ring says when.
use super::abi::{
    Bytes, Fields, IN_HEADER_BYTES, MAJOR, MINOR_MIN, OUT_HEADER_BYTES, WRITE_HEAD_BYTES, fopen, init, op,
};
use super::decode::{Decoded, decode};
use super::mount::{self, MountError, Options};
use super::reply::Reply;
use super::request::{Forget, Request, Ticket};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use std::fmt;
use std::io::IoSlice;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::rc::Rc;
use vmtwin_core::limits::{PAYLOAD_BYTES_MAX, REQUESTS_MAX};
use vmtwin_ring::{Descriptor, OpId, Pool, Ring};

/// The newest protocol that this code was written to.
const MINOR_MAX: u32 = 41;
/// How long the kernel's INIT may take; it is there when mount(2) returns.
const INIT_WAIT: Timespec = Timespec { tv_sec: 60, tv_nsec: 0 };
const POLLIN: i16 = 1;
/// Messages that `next` gives between two calls of `arm`: who serves them has a lease and a peer to look at, too.
const ROUND: u32 = 64;

/// What comes from the kernel.
#[derive(Debug)]
pub enum Event {
    /// A request to answer.
    Request(Request),
    /// References to files that the kernel has dropped.
    Forget(Vec<Forget>),
    /// The caller of the request with this `Ticket::id` got a signal and waits for the answer still: one that is being
    /// held may be answered with EINTR; ignored if it was answered.
    Interrupt(u64),
    /// Nothing more now: arm the poll and wait.
    Empty,
    /// There may be more, but the pool has no free slot: come again when one was given back.
    NoSlot,
    /// Unmounted or aborted: no request comes any more, none can be answered.
    Ended,
}

/// What this kernel's FUSE has.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Kernel {
    minor: u32,
    flags: u64,
}

impl Kernel {
    /// Writes to one file inside its size run in parallel (Linux 6.2); else QEMU's aio=threads writes one at a time:
    /// advise io='native' or 'io_uring'.
    #[must_use]
    pub fn parallel_direct_writes(self) -> bool {
        self.minor >= 38
    }
    /// A successor can ask for the requests in hand again (Linux 6.9).
    #[must_use]
    pub fn resend(self) -> bool {
        self.flags & init::HAS_RESEND != 0
    }
}

impl fmt::Debug for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "FUSE {MAJOR}.{} flags {:#x}", self.minor, self.flags)
    }
}

/// A mounted file system. It is ended by an unmount, or by `abort`; dropped, it lives on as long as its poll in the ring.
pub struct Fuse {
    device: Descriptor,
    kernel: Kernel,
    readable: bool,
    /// Messages left in this round.
    round: u32,
    armed: Option<OpId>,
    ended: bool,
    /// Header and fields of the answer that is being written: kept for its room.
    answer: Bytes,
}

impl Fuse {
    /// Mounts over a directory, for all users, permissions checked by the kernel. What lies below can be reached only by
    /// descriptors opened before.
    ///
    /// # Errors
    /// `MountError`; nothing is mounted then.
    pub fn mount(path: &Path, options: &Options) -> Result<Self, MountError> {
        let device = mount::mount(path, options)?;
        let kernel = handshake(&device, options).inspect_err(|_| {
            let _ = mount::detach(path);
        })?;
        Ok(Self {
            device: Rc::new(device),
            kernel,
            readable: true,
            round: ROUND,
            armed: None,
            ended: false,
            answer: Bytes::default(),
        })
    }

    /// What the kernel has.
    #[must_use]
    pub fn kernel(&self) -> Kernel {
        self.kernel
    }

    /// The next message, whose data is in a slot of `pool`. Requests that are of no use to us were answered with ENOSYS.
    /// Says `Empty` after 64 messages too: then the armed poll completes at once.
    pub fn next(&mut self, pool: &Pool) -> Event {
        while self.readable && self.round > 0 && !self.ended {
            let Some(mut slot) = pool.take() else { return Event::NoSlot };
            self.round -= 1;
            match rustix::io::read(&self.device, slot.headed_mut(WRITE_HEAD_BYTES)) {
                Ok(len) => match decode(slot, len) {
                    Decoded::Request(request) => return Event::Request(request),
                    Decoded::Forget(list) => return Event::Forget(list),
                    Decoded::Interrupt(id) => return Event::Interrupt(id),
                    Decoded::Refuse(ticket, errno) => self.reply(ticket, &Reply::Error(errno)),
                    Decoded::Nothing => {}
                },
                // ENOENT: its caller got a signal before it was handed out.
                Err(Errno::INTR | Errno::NOENT) => {}
                Err(Errno::NODEV | Errno::CONNABORTED) => self.ended = true,
                // EAGAIN: no more. Anything else: the kernel has ended that request; the poll tells of the next.
                Err(_) => self.readable = false,
            }
        }
        if self.ended { Event::Ended } else { Event::Empty }
    }

    /// To be called before each `Ring::wait`: arms the poll, once, unless there are messages that wait for a slot. Its
    /// completion carries `token`: call `polled` then.
    pub fn arm(&mut self, ring: &mut Ring, token: u64) {
        let stopped_short = std::mem::replace(&mut self.round, ROUND) == 0;
        if (stopped_short || !self.readable) && self.armed.is_none() && !self.ended {
            self.armed = Some(ring.poll(&self.device, POLLIN, token));
        }
    }

    /// The poll completed (with whatever result): there may be more to read.
    pub fn polled(&mut self) {
        self.armed = None;
        self.readable = true;
    }

    /// Ends the connection once the poll's completion was reaped: every request in the kernel's hands fails with
    /// ECONNABORTED, new ones with ENOTCONN, and the mount stays there, dead, until it is detached.
    pub fn abort(self, ring: &mut Ring) {
        if let Some(poll) = self.armed {
            ring.cancel(poll);
        }
    }

    /// Answers a request.
    ///
    /// # Panics
    /// With more data than was asked for.
    pub fn reply(&mut self, ticket: Ticket, reply: &Reply<'_>) {
        let open_flags = match ticket.op {
            op::OPEN | op::CREATE => fopen::DIRECT_IO | fopen::PARALLEL_DIRECT_WRITES,
            _ => 0,
        };
        let out = &mut self.answer;
        out.0.clear();
        out.zeroes(OUT_HEADER_BYTES);
        let (error, data) = reply.encode(open_flags, out);
        assert!(data.len() <= ticket.room as usize, "an answer holds what was asked for at most");
        let len = u32::try_from(out.0.len() + data.len()).expect("an answer's room is below 4 GiB");
        out.0[0..4].copy_from_slice(&len.to_ne_bytes());
        out.0[4..8].copy_from_slice(&(-error).to_ne_bytes());
        out.0[8..16].copy_from_slice(&ticket.unique.to_ne_bytes());
        let parts = [IoSlice::new(&out.0), IoSlice::new(data)];
        // ENOENT: nobody waits for it any more. After any other error the kernel has ended the request itself.
        let _ = rustix::io::writev(&self.device, &parts);
    }
}

/// Answers the kernel's INIT.
fn handshake(device: &OwnedFd, options: &Options) -> Result<Kernel, MountError> {
    let message = first_message(device)?;
    let mut fields = Fields(&message);
    let (unique, major, minor, readahead, offered) =
        parse_init(&mut fields).ok_or(MountError::Handshake("its first request is not INIT"))?;
    if major != MAJOR || minor < MINOR_MIN {
        return Err(MountError::TooOld { major, minor });
    }
    let mut wanted = init::ASYNC_READ
        | init::BIG_WRITES
        | init::ASYNC_DIO
        | init::PARALLEL_DIROPS
        | init::MAX_PAGES
        | init::INIT_EXT
        | init::DIRECT_IO_ALLOW_MMAP
        | init::HAS_RESEND;
    if options.readdirplus {
        wanted |= init::DO_READDIRPLUS | init::READDIRPLUS_AUTO;
    }
    let flags = wanted & offered;
    let background = REQUESTS_MAX as u16;
    let pages = (PAYLOAD_BYTES_MAX / 4096) as u16;
    let mut out = Bytes::default();
    out.u32(OUT_HEADER_BYTES as u32 + 64).u32(0).u64(unique);
    out.u32(MAJOR).u32(minor.min(MINOR_MAX)).u32(readahead).u32(flags as u32);
    out.u16(background).u16(background / 4 * 3).u32(PAYLOAD_BYTES_MAX as u32).u32(1);
    out.u16(pages).u16(0).u32((flags >> 32) as u32).zeroes(28);
    rustix::io::write(device, &out.0).map_err(|_| MountError::Handshake("the answer to INIT is refused"))?;
    Ok(Kernel { minor, flags })
}

fn first_message(device: &OwnedFd) -> Result<Vec<u8>, MountError> {
    let mut message = vec![0; PAYLOAD_BYTES_MAX + WRITE_HEAD_BYTES];
    loop {
        let mut ready = [PollFd::from_borrowed_fd(device.as_fd(), PollFlags::IN)];
        match rustix::event::poll(&mut ready, Some(&INIT_WAIT)) {
            Ok(0) => return Err(MountError::Handshake("no INIT came")),
            Ok(_) | Err(Errno::INTR) => {}
            Err(_) => return Err(MountError::Handshake("it cannot be polled")),
        }
        match rustix::io::read(device, &mut message[..]) {
            Ok(n) => {
                message.truncate(n);
                return Ok(message);
            }
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(_) => return Err(MountError::Handshake("INIT cannot be read")),
        }
    }
}

/// Unique number, version, readahead and flags of INIT.
fn parse_init(fields: &mut Fields<'_>) -> Option<(u64, u32, u32, u32, u64)> {
    fields.skip(4)?;
    let (code, unique) = (fields.u32()?, fields.u64()?);
    fields.skip(IN_HEADER_BYTES - 16)?;
    let (major, minor, readahead, low) = (fields.u32()?, fields.u32()?, fields.u32()?, fields.u32()?);
    let high = if u64::from(low) & init::INIT_EXT != 0 { fields.u32()? } else { 0 };
    (code == op::INIT).then_some((unique, major, minor, readahead, u64::from(low) | u64::from(high) << 32))
}

const _: () = assert!(REQUESTS_MAX <= u16::MAX as usize && PAYLOAD_BYTES_MAX / 4096 <= u16::MAX as usize);
