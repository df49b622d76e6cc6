//! The way of a guest's request: held → claimed (no overlap) → logged (R10) → flying on every replica → answered (R2).
//!
//! Own flushes of the machine (room in the log, quiesce, join) go the same way.
use super::effect::{Effect, Payload, Work};
use super::event::{Errno, Job, RangeKind, Request, Value, is_disk_fault};
use super::log::Admit;
use super::map::Mark;
use super::overlap::{Claim, Who};
use super::session::Asked;
use super::{Replica, Rule};
use crate::ids::{FileId, Sequence, SessionId};
use crate::limits::PAGE_BYTES;
use crate::time::Time;
use crate::wire::frame::{Header, Kind};
use std::ops::Range;

/// Why an operation runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    /// The guest asked.
    Guest,
    /// Extents are to leave the log.
    Room,
    /// Everything is to be durable on both, then this token is answered.
    Quiesce(u64),
    /// R5: both sides flush before the join.
    Join,
    /// The guest was told an error and is gone; it goes on so that both sides end up with the same.
    Orphan,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    /// The gate is closed.
    Held,
    /// Waits for its turn in `Overlap`.
    Claiming,
    /// Waits for a free slot of the log.
    NoRoom,
    /// Waits until this transaction of the log is durable.
    Logging(u64),
    /// Out.
    Flying,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Remote {
    /// Not sent in this session, or the session that it was sent in has ended.
    Unsent,
    Sent,
    Answered(Result<(), Errno>),
}

/// One request on its way.
#[derive(Clone, Copy, Debug)]
pub(super) struct Op {
    pub request: Request,
    pub purpose: Purpose,
    pub stage: Stage,
    pub local: Option<Result<(), Errno>>,
    pub remote: Remote,
    /// When it went out.
    pub since: Time,
    /// A namespace operation's number.
    pub number: u64,
    /// A flush's stamp of the log.
    pub stamp: u64,
}

impl Op {
    fn new(request: Request, purpose: Purpose, now: Time) -> Self {
        let (stage, remote) = (Stage::Held, Remote::Unsent);
        Self { request, purpose, stage, local: None, remote, since: now, number: 0, stamp: 0 }
    }

    /// Whether it runs here first, and on the peer only if it went well: where a refusal must leave both as they were.
    fn is_here_first(&self) -> bool {
        matches!(self.request, Request::Namespace { .. } | Request::Range { .. })
    }
}

/// Whose payload or end this is in the table of claims.
pub(super) fn who(job: Job) -> Who {
    match job {
        Job::Guest(op) => Who::Guest(op),
        Job::Own(number) => Who::Resync(number),
        Job::Peer(..) => unreachable!("what the peer asks for was claimed at the holder"),
    }
}

/// The bytes whose content a request changes, widened to pages.
pub(super) fn touched(request: &Request) -> Option<(FileId, Range<u64>)> {
    let (file, start, end) = match *request {
        Request::Write { file, offset, length } => (file, offset, offset + u64::from(length)),
        Request::Range { kind: super::event::RangeKind::Allocate { .. }, .. } | Request::Flush { .. } => return None,
        Request::Range { file, offset, length, .. } => (file, offset, offset.saturating_add(length)),
        Request::Namespace { resize, .. } => {
            let resize = resize?;
            (resize.file, resize.from.min(resize.to), resize.from.max(resize.to))
        }
    };
    let end = end.checked_next_multiple_of(PAGE_BYTES).unwrap_or(u64::MAX / PAGE_BYTES * PAGE_BYTES);
    let start = start / PAGE_BYTES * PAGE_BYTES;
    (start < end).then_some((file, start..end))
}

fn claim(request: &Request) -> Option<Claim> {
    use super::event::RangeKind as K;
    match *request {
        Request::Write { file, offset, length } => Some(Claim::pages(file, offset, u64::from(length))),
        Request::Range { file, kind: K::Punch, offset, length }
        | Request::Range {
            file,
            kind: K::Zero { keep_size: true } | K::Allocate { keep_size: true },
            offset,
            length,
        } => Some(Claim::pages(file, offset, length)),
        // It may change the size, which the tree's comparison reads.
        Request::Range { file, .. } => Some(Claim::Tree([file, FileId(0), FileId(0), FileId(0)])),
        Request::Namespace { files, .. } => Some(Claim::Tree(files)),
        Request::Flush { .. } => None,
    }
}

impl Replica {
    /// A new request of the guest.
    pub(super) fn guest(&mut self, job: Job, request: Request, out: &mut Vec<Effect>) {
        if self.fail_held {
            self.answer(job, Err(Errno::EIO), out);
            out.push(Effect::Release { job });
            return;
        }
        let fresh = self.ops.insert(job, Op::new(request, Purpose::Guest, self.now)).is_none();
        assert!(fresh, "the shell numbers requests once");
        self.held.push_back(job);
    }

    /// A flush of everything, by the machine's own need.
    pub(super) fn own_flush(&mut self, purpose: Purpose, out: &mut Vec<Effect>) {
        let job = self.next_own();
        self.ops.insert(job, Op::new(Request::Flush { file: None }, purpose, self.now));
        self.fly(job, out);
    }

    pub(super) fn has_own(&self, purpose: Purpose) -> bool {
        // Own flushes are the newest numbers and few; guests' jobs sort before them.
        self.ops.range(Job::Own(0)..).any(|(_, op)| op.purpose == purpose)
    }

    /// Lets in what was held, as far as the gate is open.
    pub(super) fn admit_held(&mut self, out: &mut Vec<Effect>) {
        while self.is_admitting() {
            let Some(job) = self.held.pop_front() else { return };
            let Some(op) = self.ops.get_mut(&job) else { continue };
            let claim = claim(&op.request);
            op.stage = Stage::Claiming;
            let taken = claim.is_none_or(|claim| {
                if self.off(Rule::Overlap) && matches!(claim, Claim::Range(..)) {
                    return true;
                }
                self.overlap.take(who(job), claim)
            });
            if taken {
                self.log_in(job, out);
            }
        }
    }

    /// The claim is held: now the log.
    pub(super) fn log_in(&mut self, job: Job, out: &mut Vec<Effect>) {
        let op = self.ops.get_mut(&job).expect("who claims is in the table");
        let Some((file, range)) = touched(&op.request) else { return self.fly(job, out) };
        let unlogged = self.rule_off == Some(Rule::Log);
        match self.log.admit(file, &range) {
            Admit::Logged => self.fly(job, out),
            Admit::After(_) if unlogged => self.fly(job, out),
            Admit::After(number) => {
                op.stage = Stage::Logging(number);
                self.logging.push_back(job);
                self.look_at_log = true;
            }
            Admit::Full => {
                op.stage = Stage::NoRoom;
                self.no_room.push_back(job);
                self.look_at_log = true;
            }
        }
    }

    /// A transaction is durable: what waited for it goes out.
    pub(super) fn log_saved(&mut self, number: u64, out: &mut Vec<Effect>) {
        self.log.saved(number);
        self.look_at_log = true;
        for _ in 0..self.logging.len() {
            let job = self.logging.pop_front().expect("as long as it was");
            match self.ops.get(&job).map(|op| op.stage) {
                Some(Stage::Logging(after)) if after > number => self.logging.push_back(job),
                Some(Stage::Logging(_)) => self.fly(job, out),
                _ => {}
            }
        }
    }

    /// It goes out to everybody.
    fn fly(&mut self, job: Job, out: &mut Vec<Effect>) {
        let stamp = self.log.stamp();
        let op = self.ops.get_mut(&job).expect("what flies is in the table");
        (op.stage, op.since, op.stamp) = (Stage::Flying, self.now, stamp);
        let (request, here_first) = (op.request, op.is_here_first());
        if matches!(request, Request::Namespace { .. }) {
            self.namespace_number += 1;
            op.number = self.namespace_number;
        }
        let work = match request {
            Request::Write { file, offset, length } => Work::Write { file, offset, length },
            Request::Range { file, kind, offset, length } => Work::Range { file, kind, offset, length },
            Request::Flush { file } => Work::Flush { file },
            Request::Namespace { .. } => Work::Namespace,
        };
        self.local(job, work, out);
        if !here_first {
            self.send_op(job, out);
        }
    }

    /// Sends it, if there is a session to send it in.
    pub(super) fn send_op(&mut self, job: Job, out: &mut Vec<Effect>) {
        if !self.is_mirroring() {
            return;
        }
        let op = self.ops.get_mut(&job).expect("what is sent is in the table");
        op.remote = Remote::Sent;
        let (request, number) = (op.request, op.number);
        let mut header = Header::new(Kind::Flush, SessionId(0), Sequence(0));
        let mut payload = Payload::None;
        match request {
            Request::Write { file, offset, length } => {
                (header.kind, header.file, header.offset, header.length) = (Kind::Write, file, offset, length);
                payload = Payload::Of(job);
            }
            Request::Range { file, kind, offset, length } => {
                (header.kind, header.flags) = (Kind::Range, kind.flags());
                (header.file, header.offset, header.extent) = (file, offset, length);
            }
            Request::Flush { file } => header.file = file.unwrap_or(FileId(0)),
            Request::Namespace { .. } => {
                (header.kind, header.extent) = (Kind::Namespace, number);
                payload = Payload::Of(job);
            }
        }
        self.ask(Asked::Op(job), header, payload, out);
    }

    /// Sends what flies and was not answered in an older session, or went out when nobody was to be told.
    pub(super) fn send_unanswered(&mut self, out: &mut Vec<Effect>) {
        let jobs: Vec<Job> = self.ops.iter().filter(|(_, op)| Self::is_due(op)).map(|(job, _)| *job).collect();
        for job in jobs {
            self.send_op(job, out);
        }
    }

    /// Whether it flies and is to be sent now.
    pub(super) fn is_due(op: &Op) -> bool {
        let here = !op.is_here_first() || op.local == Some(Ok(()));
        op.stage == Stage::Flying && op.remote == Remote::Unsent && here
    }

    /// This node's disk has done it.
    pub(super) fn op_done(&mut self, job: Job, result: Result<Value, Errno>, out: &mut Vec<Effect>) {
        let Some(op) = self.ops.get_mut(&job) else { return };
        let result = result.map(|_| ());
        // A full disk may refuse what runs here first and asks for room: nothing was changed anywhere.
        let asks_room =
            matches!(op.request, Request::Namespace { .. } | Request::Range { kind: RangeKind::Allocate { .. }, .. });
        if let Err(errno) = result
            && is_disk_fault(errno)
            && !(asks_room && errno == Errno::ENOSPC)
        {
            return self.disk_failed(errno, out);
        }
        op.local = Some(result);
        if op.is_here_first() && result.is_ok() {
            self.send_op(job, out);
        }
        self.settle(job, out);
    }

    /// The peer has answered it.
    pub(super) fn op_answered(&mut self, job: Job, result: Result<(), Errno>, out: &mut Vec<Effect>) {
        let Some(op) = self.ops.get_mut(&job) else { return };
        op.remote = Remote::Answered(result);
        self.settle(job, out);
    }

    /// Answers it, if every replica that counts has it (R2).
    pub(super) fn settle(&mut self, job: Job, out: &mut Vec<Effect>) {
        let Some(op) = self.ops.get(&job) else { return };
        let Some(local) = op.local else { return };
        if !self.is_holder() || self.failed.is_some() {
            return;
        }
        let here_only = op.is_here_first() && local.is_err();
        let early = self.off(Rule::Acknowledge) && op.purpose == Purpose::Guest;
        let peer_has = match op.remote {
            Remote::Answered(there) if there == local => true,
            Remote::Answered(_) => {
                self.ops.get_mut(&job).expect("just seen").remote = Remote::Unsent;
                return self.peer_failed("an operation ended otherwise at the peer", out);
            }
            Remote::Sent if !early => return,
            Remote::Unsent if !here_only && self.needs_peer() && !early => return,
            _ => false,
        };
        let op = self.ops.remove(&job).expect("just seen");
        if let Some((file, range)) = touched(&op.request) {
            let marked = !peer_has && !here_only && !early;
            if marked {
                self.map.mark(Mark::Send, file, &range);
            }
            self.log.ended(file, &range, marked.then_some(self.map_next));
            if self.off(Rule::Unflushed) {
                self.log.flushed(Some(file), self.log.stamp());
            }
            self.look_at_log |= !self.no_room.is_empty();
        }
        if let Request::Flush { file } = op.request
            && local.is_ok()
        {
            self.log.flushed(file, op.stamp);
            self.look_at_log |= !self.no_room.is_empty();
        }
        self.unclaim(job, out);
        match op.purpose {
            Purpose::Guest => {
                self.answer(job, local, out);
                out.push(Effect::Release { job });
            }
            Purpose::Orphan => out.push(Effect::Release { job }),
            Purpose::Room => self.look_at_log = true,
            Purpose::Quiesce(token) => {
                let both = peer_has && self.peer_in_sync();
                out.push(Effect::Quiesced { token, both });
            }
            Purpose::Join => self.own_flushed(job, peer_has, out),
        }
    }

    /// Who counts has changed: looks at all requests again.
    pub(super) fn settle_all(&mut self, out: &mut Vec<Effect>) {
        for job in self.ops.keys().copied().collect::<Vec<_>>() {
            self.settle(job, out);
        }
    }

    /// Gives the claim back; those behind it go on.
    pub(super) fn unclaim(&mut self, job: Job, out: &mut Vec<Effect>) {
        let mut admitted = std::mem::take(&mut self.admitted);
        self.overlap.release(who(job), &mut admitted);
        for next in admitted.drain(..) {
            match next {
                Who::Guest(op) => self.log_in(Job::Guest(op), out),
                Who::Resync(number) => {
                    if !self.verify_claimed(number, out) {
                        self.resync_claimed(number, out);
                    }
                }
            }
        }
        self.admitted = admitted;
    }

    /// The guest hears of it, now or when the lease is live again.
    fn answer(&mut self, job: Job, result: Result<(), Errno>, out: &mut Vec<Effect>) {
        let Job::Guest(op) = job else { return };
        if self.lease || self.fail_held {
            out.push(Effect::Complete { op, result });
        } else {
            self.unanswered.push_back((op, result));
        }
    }

    /// All that the guest waits for ends with an error: its VM is being killed (R1).
    pub(super) fn fail_guest(&mut self, out: &mut Vec<Effect>) {
        for (op, result) in std::mem::take(&mut self.unanswered) {
            out.push(Effect::Complete { op, result });
        }
        let jobs: Vec<Job> =
            self.ops.iter().filter(|(_, op)| op.purpose == Purpose::Guest).map(|(job, _)| *job).collect();
        for job in jobs {
            self.answer(job, Err(Errno::EIO), out);
            if self.is_holder() && self.ops[&job].stage == Stage::Flying {
                self.ops.get_mut(&job).expect("just seen").purpose = Purpose::Orphan;
                continue;
            }
            let op = self.ops.remove(&job).expect("just seen");
            if let (Stage::Logging(_), Some((file, range))) = (op.stage, touched(&op.request)) {
                self.log.ended(file, &range, None);
            }
            out.push(Effect::Release { job });
            if !matches!(op.stage, Stage::Held) {
                self.unclaim(job, out);
            }
        }
    }

    /// This node is not the holder any more: nothing of its guest goes on. What flew stays in the log, for nobody knows
    /// where it arrived. The guest is answered when its VM is killed.
    pub(super) fn drop_guest(&mut self, out: &mut Vec<Effect>) {
        self.overlap = super::overlap::Overlap::default();
        self.held.clear();
        self.logging.clear();
        self.no_room.clear();
        let orphans = self.ops.iter().filter(|(_, op)| op.purpose == Purpose::Orphan);
        out.extend(orphans.map(|(job, _)| Effect::Release { job: *job }));
        self.ops.retain(|_, op| op.purpose == Purpose::Guest);
        for op in self.ops.values_mut() {
            op.stage = Stage::Held;
        }
    }
}
