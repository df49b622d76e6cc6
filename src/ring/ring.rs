//! The ring itself: requests in, completions out.
//!
//! Decides: when to submit, spin and sleep. Holds: requests in flight. Keeps out: what they are for.
//! Invariant: nothing is pushed that does not stand in the slab first, with its memory, descriptor and time.
use crate::slab::{Kind, Op, Slab};
use crate::{Descriptor, Memory, Room, Waker};
use io_uring::types::{CancelBuilder, Fd, FsyncFlags, TimeoutFlags, Timespec};
use io_uring::{IoUring, Probe, opcode, squeue};
use std::collections::VecDeque;
use std::ops::Range;
use std::os::fd::{AsRawFd, IntoRawFd, OwnedFd};
use std::rc::Rc;
use std::time::{Duration, Instant};
use std::{io, mem};

/// How long to look for the next completion before sleeping, after a wake-up that brought work.
const SPIN: Duration = Duration::from_micros(20);
/// How long a ring that is dropped waits for what it cancelled; what is stuck longer is leaked.
const DROP_WAIT: Duration = Duration::from_secs(5);
/// Marks a cancellation: it has no entry in the slab, and its completion is of no interest.
const CANCEL: u64 = u64::MAX;

/// Why there is no ring.
#[derive(Debug, thiserror::Error)]
pub enum RingError {
    /// The kernel has none, or an administrator switched it off.
    #[error("io_uring is not available here (kernel.io_uring_disabled, a seccomp filter, or a kernel without it)")]
    Unavailable(#[source] io::Error),
    /// The kernel is older than 6.1.
    #[error("io_uring of this kernel lacks {0}; vmtwin needs Linux 6.1 or newer")]
    Lacks(&'static str),
    /// It cannot be set up now.
    #[error("cannot set up io_uring")]
    SetUp(#[source] io::Error),
}

/// A request in flight, to cancel it by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OpId(u64);

/// A request that ended.
#[derive(Debug)]
pub struct Completion {
    /// As given with the request.
    pub token: u64,
    /// Bytes moved, poll's events, or 0. A timer that went off is `Ok(0)`; what was cancelled ends with ECANCELED.
    pub result: io::Result<u32>,
    /// The request's memory.
    pub memory: Option<Memory>,
}

impl Completion {
    /// The request's slot, where it had one to itself.
    #[must_use]
    pub fn into_slot(self) -> Option<crate::Slot> {
        self.memory.and_then(Memory::into_slot)
    }
    /// The raw error number, 0 for success.
    #[must_use]
    pub fn errno(&self) -> i32 {
        self.result.as_ref().err().and_then(io::Error::raw_os_error).unwrap_or(0)
    }
}

/// An io_uring of one thread. No request fails to be taken: what does not fit the kernel's queue waits here.
pub struct Ring {
    uring: IoUring,
    ops: Slab,
    /// Entries that found the queue full, in order.
    backlog: VecDeque<squeue::Entry>,
    waker: Waker,
    wake_end: Descriptor,
    /// The armed alarm: when, and its number.
    alarm: Option<(u64, u64)>,
    spin: Duration,
    /// The last `wait` brought work.
    busy: bool,
    closing: bool,
    /// Of a slab's numbers: those that are the ring's own.
    own: usize,
}

impl Ring {
    /// A ring for this thread with a submission queue of `entries` (rounded up to a power of two).
    ///
    /// # Errors
    /// `RingError` says what is missing.
    pub fn new(entries: u32) -> Result<Self, RingError> {
        let uring = set_up(entries)?;
        probe(&uring)?;
        let (waker, end) = Waker::new().map_err(RingError::SetUp)?;
        // Alone on one core the spin would only keep the others from it.
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let spin = if cores > 1 { SPIN } else { Duration::ZERO };
        let mut ring = Self {
            uring,
            ops: Slab::default(),
            backlog: VecDeque::new(),
            waker,
            wake_end: Rc::new(end),
            alarm: None,
            spin,
            busy: false,
            closing: false,
            own: 0,
        };
        ring.arm_wake();
        Ok(ring)
    }

    /// Wakes this ring's thread out of `wait`, from any thread.
    #[must_use]
    pub fn waker(&self) -> Waker {
        self.waker.clone()
    }

    /// Requests of the caller's in flight, timers and polls too.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.ops.live() - self.own
    }

    /// Reads into `range` of `memory` from byte `offset` of a file.
    pub fn read(&mut self, fd: &Descriptor, memory: impl Room, range: Range<usize>, offset: u64, token: u64) -> OpId {
        let mut memory = memory.into();
        let (at, len) = memory.target(range);
        let entry = opcode::Read::new(Fd(fd.as_raw_fd()), at, len).offset(offset).build();
        self.start(entry, work(token, fd).with(memory))
    }

    /// Writes `range` of `memory` at byte `offset` of a file.
    pub fn write(
        &mut self,
        fd: &Descriptor,
        memory: impl Into<Memory>,
        range: Range<usize>,
        offset: u64,
        token: u64,
    ) -> OpId {
        let memory = memory.into();
        let (at, len) = memory.source(range);
        let entry = opcode::Write::new(Fd(fd.as_raw_fd()), at, len).offset(offset).build();
        self.start(entry, work(token, fd).with(memory))
    }

    /// Makes a file's written data durable (fdatasync), or its attributes too.
    pub fn fsync(&mut self, fd: &Descriptor, data_only: bool, token: u64) -> OpId {
        let flags = if data_only { FsyncFlags::DATASYNC } else { FsyncFlags::empty() };
        let entry = opcode::Fsync::new(Fd(fd.as_raw_fd())).flags(flags).build();
        self.start(entry, work(token, fd))
    }

    /// fallocate(2) with its own mode bits.
    pub fn fallocate(&mut self, fd: &Descriptor, mode: i32, offset: u64, len: u64, token: u64) -> OpId {
        let entry = opcode::Fallocate::new(Fd(fd.as_raw_fd()), len).offset(offset).mode(mode).build();
        self.start(entry, work(token, fd))
    }

    /// Completes once when one of `events` (POLLIN, ...) is there; the result says which.
    pub fn poll(&mut self, fd: &Descriptor, events: i16, token: u64) -> OpId {
        let entry = opcode::PollAdd::new(Fd(fd.as_raw_fd()), u32::from(events as u16)).build();
        self.start(entry, work(token, fd))
    }

    /// Receives at most `range` from a socket; 0 bytes: the other side has ended. The socket is in blocking mode.
    pub fn recv(&mut self, socket: &Descriptor, memory: impl Room, range: Range<usize>, token: u64) -> OpId {
        let mut memory = memory.into();
        let (at, len) = memory.target(range);
        let entry = opcode::Recv::new(Fd(socket.as_raw_fd()), at, len).build();
        self.start(entry, work(token, socket).with(memory))
    }

    /// Sends all of `range` on a stream socket in blocking mode; a short count means that it broke off there. One send at
    /// a time on one socket, else they mix.
    pub fn send(&mut self, socket: &Descriptor, memory: impl Into<Memory>, range: Range<usize>, token: u64) -> OpId {
        let memory = memory.into();
        let (at, len) = memory.source(range);
        let flags = libc::MSG_NOSIGNAL | libc::MSG_WAITALL;
        let entry = opcode::Send::new(Fd(socket.as_raw_fd()), at, len).flags(flags).build();
        self.start(entry, work(token, socket).with(memory))
    }

    /// Goes off at `at`, in nanoseconds on CLOCK_BOOTTIME; at once if that has passed.
    pub fn timer(&mut self, at: u64, token: u64) -> OpId {
        self.start_timer(Kind::Timer, at, token)
    }

    /// Closes a descriptor without waiting for it here: the last close of an unlinked file frees all its blocks.
    pub fn close(&mut self, fd: OwnedFd, token: u64) -> OpId {
        let entry = opcode::Close::new(Fd(fd.into_raw_fd())).build();
        self.start(entry, Op { kind: Kind::Work, token, memory: None, _descriptor: None, _time: None })
    }

    /// Asks for a request to end early. Its completion comes in any case, with ECANCELED or with what it came to.
    pub fn cancel(&mut self, op: OpId) {
        let entry = opcode::AsyncCancel::new(op.0).build().user_data(CANCEL);
        self.push(entry);
    }

    /// Hands a descriptor over to the kernel's side of this ring, which keeps it open until every request has ended, even
    /// after this process has died. Once per ring (the drain file of PROTOCOL.md R7).
    ///
    /// # Errors
    /// The kernel's.
    pub fn hold_until_drained(&mut self, fd: OwnedFd) -> io::Result<()> {
        self.uring.submitter().register_files(&[fd.as_raw_fd()])
    }

    /// Submits, and waits until there is a completion, a wake-up, or until `until` (nanoseconds on CLOCK_BOOTTIME); adds
    /// the completions to `done`. May return with none: the caller looks at its clock and its mailbox and comes back.
    ///
    /// # Errors
    /// The ring is of no use any more.
    pub fn wait(&mut self, until: Option<u64>, done: &mut Vec<Completion>) -> io::Result<()> {
        self.set_alarm(until);
        self.push_backlog()?;
        if self.uring.completion().is_empty() && !self.spin()? {
            match self.uring.submit_and_wait(1) {
                Ok(_) => {}
                Err(e) if passes(&e) => {}
                Err(e) => return Err(e),
            }
        } else {
            self.submit()?;
        }
        self.reap(done);
        Ok(())
    }

    /// Submits, then looks for completions for a while. With DEFER_TASKRUN the kernel only sets a flag in shared memory
    /// meanwhile: no interrupt, no system call until there is something. True if there is.
    fn spin(&mut self) -> io::Result<bool> {
        if !self.busy || self.spin.is_zero() {
            return Ok(false);
        }
        self.submit()?;
        let end = Instant::now() + self.spin;
        while Instant::now() < end {
            if self.uring.submission().taskrun() {
                self.run_task_work()?;
            }
            if !self.uring.completion().is_empty() {
                return Ok(true);
            }
            std::hint::spin_loop();
        }
        Ok(false)
    }

    fn run_task_work(&mut self) -> io::Result<()> {
        const GETEVENTS: u32 = 1;
        // SAFETY: submits nothing and passes no argument; it only lets the kernel post what has ended.
        let entered = unsafe { self.uring.submitter().enter::<libc::sigset_t>(0, 0, GETEVENTS, None) };
        match entered {
            Err(e) if !passes(&e) => Err(e),
            _ => Ok(()),
        }
    }

    fn submit(&mut self) -> io::Result<()> {
        if self.uring.submission().is_empty() {
            return Ok(());
        }
        match self.uring.submit() {
            Err(e) if !passes(&e) => Err(e),
            _ => Ok(()),
        }
    }

    fn reap(&mut self, done: &mut Vec<Completion>) {
        self.busy = false;
        let (mut rewake, before) = (false, done.len());
        for entry in self.uring.completion() {
            if entry.user_data() == CANCEL {
                continue;
            }
            let op = self.ops.remove(entry.user_data()).expect("the kernel completes each request once");
            match op.kind {
                Kind::Work => self.busy = true,
                Kind::Timer => {}
                Kind::Wake => {
                    self.own -= 1;
                    rewake = true;
                    continue;
                }
                Kind::Alarm => {
                    self.own -= 1;
                    self.alarm = self.alarm.filter(|&(_, number)| number != entry.user_data());
                    continue;
                }
            }
            let result = outcome(op.kind, entry.result());
            done.push(Completion { token: op.token, result, memory: op.memory });
        }
        debug_assert!(done.len() >= before);
        if rewake && !self.closing {
            self.arm_wake();
        }
    }

    fn arm_wake(&mut self) {
        let fd = Rc::clone(&self.wake_end);
        let mut memory = Memory::Bytes(vec![0; 8]);
        let (at, len) = memory.target(0..8);
        let entry = opcode::Read::new(Fd(fd.as_raw_fd()), at, len).build();
        self.own += 1;
        let op = Op { kind: Kind::Wake, token: 0, memory: Some(memory), _descriptor: Some(fd), _time: None };
        self.start(entry, op);
    }

    /// Sees to it that an alarm goes off at `until` or before. One that goes off early only costs a round.
    fn set_alarm(&mut self, until: Option<u64>) {
        let Some(until) = until else { return };
        match self.alarm {
            Some((at, _)) if at <= until => return,
            Some((_, number)) => self.cancel(OpId(number)),
            None => {}
        }
        self.own += 1;
        let op = self.start_timer(Kind::Alarm, until, 0);
        self.alarm = Some((until, op.0));
    }

    fn start_timer(&mut self, kind: Kind, at: u64, token: u64) -> OpId {
        let nanos = (at % 1_000_000_000) as u32;
        let time = Box::new(Timespec::new().sec(at / 1_000_000_000).nsec(nanos));
        let flags = TimeoutFlags::ABS | TimeoutFlags::BOOTTIME;
        let entry = opcode::Timeout::new(&raw const *time).flags(flags).build();
        self.start(entry, Op { kind, token, memory: None, _descriptor: None, _time: Some(time) })
    }

    fn start(&mut self, entry: squeue::Entry, op: Op) -> OpId {
        let number = self.ops.insert(op);
        self.push(entry.user_data(number));
        OpId(number)
    }

    /// Queues an entry, whose request (if it has memory) is in the slab already.
    fn push(&mut self, entry: squeue::Entry) {
        if !self.backlog.is_empty() || !self.try_push(&entry) {
            self.backlog.push_back(entry);
        }
    }

    fn try_push(&mut self, entry: &squeue::Entry) -> bool {
        if self.uring.submission().is_full() {
            // What the kernel refuses to take now stays queued; `wait` meets the error again.
            let _ = self.uring.submit();
        }
        // SAFETY: every entry is made in this file from memory, descriptor and time that its `Op` owns. The `Op` stands in
        // the slab before this and leaves it only when the completion is reaped, or is leaked (see `drop`).
        unsafe { self.uring.submission().push(entry) }.is_ok()
    }

    fn push_backlog(&mut self) -> io::Result<()> {
        while let Some(entry) = self.backlog.pop_front() {
            if !self.try_push(&entry) {
                self.backlog.push_front(entry);
                // Full although submitted: the kernel is short of memory, or completions have to be reaped first.
                return self.submit();
            }
        }
        Ok(())
    }
}

impl Drop for Ring {
    /// Ends what is in flight. Memory of a request that does not end (a disk that hangs) is leaked: the kernel may still
    /// write to it.
    fn drop(&mut self) {
        self.closing = true;
        let end = Instant::now() + DROP_WAIT;
        let mut done = Vec::new();
        while self.ops.live() > 0 && Instant::now() < end {
            let entry = opcode::AsyncCancel2::new(CancelBuilder::any().all()).build().user_data(CANCEL);
            self.push(entry);
            let ended = self.push_backlog().and_then(|()| self.submit()).and_then(|()| self.run_task_work());
            if ended.is_err() {
                break;
            }
            self.reap(&mut done);
            done.clear();
            if self.ops.live() > 0 {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        if self.ops.live() > 0 {
            mem::forget(mem::take(&mut self.ops));
        }
    }
}

fn work(token: u64, fd: &Descriptor) -> Op {
    Op { kind: Kind::Work, token, memory: None, _descriptor: Some(Rc::clone(fd)), _time: None }
}

impl Op {
    fn with(mut self, memory: Memory) -> Self {
        self.memory = Some(memory);
        self
    }
}

fn outcome(kind: Kind, result: i32) -> io::Result<u32> {
    match result {
        0.. => Ok(result as u32),
        _ if kind == Kind::Timer && result == -libc::ETIME => Ok(0),
        _ => Err(io::Error::from_raw_os_error(-result)),
    }
}

/// Errors of `enter` after which all entries stay queued and a later round does it.
fn passes(e: &io::Error) -> bool {
    matches!(e.raw_os_error(), Some(libc::EINTR | libc::EAGAIN | libc::EBUSY | libc::ETIME))
}

/// Builds the ring with the best set of flags that this kernel takes.
fn set_up(entries: u32) -> Result<IoUring, RingError> {
    let base = || {
        let mut builder = IoUring::builder();
        builder.dontfork().setup_clamp().setup_cqsize(entries.saturating_mul(8).max(4096)).setup_submit_all();
        builder
    };
    let mut builder = base();
    builder.setup_single_issuer().setup_defer_taskrun().setup_taskrun_flag();
    let mut last = match builder.build(entries) {
        Ok(uring) => return Ok(uring),
        Err(e) => e,
    };
    if last.raw_os_error() == Some(libc::EINVAL) {
        let mut builder = base();
        builder.setup_coop_taskrun().setup_taskrun_flag();
        last = match builder.build(entries) {
            Ok(uring) => return Ok(uring),
            Err(e) => e,
        };
    }
    match last.raw_os_error() {
        Some(libc::ENOSYS | libc::EPERM | libc::EACCES) => Err(RingError::Unavailable(last)),
        Some(libc::EINVAL) => Err(RingError::Lacks("the flags of Linux 6.0")),
        _ => Err(RingError::SetUp(last)),
    }
}

fn probe(uring: &IoUring) -> Result<(), RingError> {
    let mut found = Probe::new();
    uring.submitter().register_probe(&mut found).map_err(RingError::SetUp)?;
    let needed = [
        (opcode::Read::CODE, "READ"),
        (opcode::Write::CODE, "WRITE"),
        (opcode::Fsync::CODE, "FSYNC"),
        (opcode::Fallocate::CODE, "FALLOCATE"),
        (opcode::PollAdd::CODE, "POLL_ADD"),
        (opcode::Recv::CODE, "RECV"),
        (opcode::Send::CODE, "SEND"),
        (opcode::Timeout::CODE, "TIMEOUT"),
        (opcode::AsyncCancel::CODE, "ASYNC_CANCEL"),
        (opcode::Close::CODE, "CLOSE"),
    ];
    if !uring.params().is_feature_nodrop() {
        return Err(RingError::Lacks("completions that are never dropped"));
    }
    match needed.iter().find(|(code, _)| !found.is_supported(*code)) {
        Some((_, name)) => Err(RingError::Lacks(name)),
        None => Ok(()),
    }
}
