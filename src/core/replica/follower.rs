//! The other side: does what the holder's frames ask for, and answers when it is done.
//!
//! Holds: what is being done, results of namespace operations, so that a repeated one is answered and not done again (R7).
//! Keeps out: order and overlap, which the holder sees to.
//! Invariant: an answer says what this disk really did; a disk that failed is marked, durably, before it answers anything.
use super::catchup::encode_data;
use super::effect::{Effect, Marks, Payload, Work};
use super::event::{Errno, Job, RangeKind, Value, is_disk_fault};
use super::{Replica, Role, Rule};
use crate::ids::{FileId, Sequence};
use crate::limits::{BLOCK_BYTES, PAGE_BYTES, PAYLOAD_BYTES_MAX, REQUESTS_MAX};
use crate::record::RecordName;
use crate::wire::frame::{Header, Kind};
use std::collections::{BTreeMap, VecDeque};

/// Results of namespace operations that are kept. One runs at a time, so the last would do; a few more cost nothing.
const RESULTS_KEPT: usize = 16;
/// Requests of the peer in hand: the guest's and the resync's.
const PEER_REQUESTS_MAX: usize = 2 * REQUESTS_MAX + 64;

#[derive(Debug, Default)]
pub(super) struct Follower {
    /// What the disk is doing, over sessions: the drain waits for it.
    doing: BTreeMap<Job, Header>,
    last: Sequence,
    results: VecDeque<(u64, Result<(), Errno>)>,
    /// Answers in parts, for the session.
    tree: Vec<Vec<u8>>,
    suspects: Vec<Vec<u8>>,
    /// Wait until the marks are durable.
    after_marks: Vec<(Header, Result<(), Errno>)>,
}

impl Follower {
    pub(super) fn begin_session(&mut self) {
        self.last = Sequence(0);
    }

    pub(super) fn end_session(&mut self) {
        (self.tree, self.suspects) = (Vec::new(), Vec::new());
        self.after_marks.clear();
    }

    /// Another reign numbers its operations anew.
    pub(super) fn forget_results(&mut self, _: RecordName) {
        self.results.clear();
    }
}

impl Replica {
    /// A request of the holder.
    pub(super) fn follow(&mut self, header: Header, out: &mut Vec<Effect>) {
        let in_order = header.sequence == self.follower.last.next() || self.off(Rule::Session);
        if !in_order || self.follower.doing.len() >= PEER_REQUESTS_MAX {
            Self::refuse(&header, out);
            return self.end_link("requests out of order, or more than agreed", out);
        }
        self.follower.last = header.sequence;
        if let Some(errno) = self.failed {
            Self::refuse(&header, out);
            return self.reply(&header, Err(errno), Payload::None, out);
        }
        let job = Job::Peer(header.session, header.sequence);
        let file = header.file;
        let some_file = (file != FileId(0)).then_some(file);
        let work = match header.kind {
            Kind::Write => Work::Write { file, offset: header.offset, length: header.length },
            Kind::Range => match RangeKind::of_flags(header.flags) {
                Some(kind) => Work::Range { file, kind, offset: header.offset, length: header.extent },
                None => return self.end_link("an unknown ranged operation", out),
            },
            Kind::Flush if self.off(Rule::FollowerFlush) => return self.reply(&header, Ok(()), Payload::None, out),
            Kind::Flush => Work::Flush { file: some_file },
            Kind::Prepare => Work::Flush { file: None },
            Kind::Namespace => {
                let known = self.follower.results.iter().find(|(number, _)| *number == header.extent);
                if let Some((_, result)) = known.copied() {
                    Self::refuse(&header, out);
                    return self.reply(&header, result, Payload::None, out);
                }
                Work::Namespace
            }
            Kind::Hash => match hash_work(&header) {
                Some(work) => work,
                None => return self.end_link("a question for hashes that makes no sense", out),
            },
            Kind::Data => Work::Data { file, from: header.offset, length: header.extent },
            Kind::Tree if header.offset == 0 => Work::Tree,
            Kind::Tree => {
                let parts = std::mem::take(&mut self.follower.tree);
                self.reply_part(&header, &parts, out);
                self.follower.tree = parts;
                return;
            }
            Kind::Suspects => {
                if header.offset == 0 {
                    self.follower.suspects = self.suspect_parts();
                }
                let parts = std::mem::take(&mut self.follower.suspects);
                self.reply_part(&header, &parts, out);
                self.follower.suspects = parts;
                return;
            }
            Kind::Hello | Kind::Answer | Kind::NewRecord | Kind::Beat | Kind::Bye | Kind::Tell => {
                unreachable!("`frame` sends requests only")
            }
        };
        self.follower.doing.insert(job, header);
        self.local(job, work, out);
    }

    /// The disk has ended a request of the peer.
    pub(super) fn peer_job_done(&mut self, job: Job, result: Result<Value, Errno>, out: &mut Vec<Effect>) {
        let Some(header) = self.follower.doing.remove(&job) else { return };
        Self::refuse(&header, out);
        let ended = result.as_ref().map(|_| ()).map_err(|errno| *errno);
        if header.kind == Kind::Namespace {
            self.follower.results.push_back((header.extent, ended));
            if self.follower.results.len() > RESULTS_KEPT {
                self.follower.results.pop_front();
            }
        }
        match ended {
            Err(errno) if is_disk_fault(errno) && !matches!(header.kind, Kind::Hash | Kind::Data | Kind::Tree) => {
                self.disk_failed(errno, out);
                self.follower.after_marks.push((header, ended));
                return;
            }
            Ok(()) if header.kind == Kind::Prepare => {
                // R5: equal and flushed. The marks end before the join is sent.
                self.set_marks(Marks::default(), out);
                self.follower.after_marks.push((header, ended));
                return;
            }
            _ => {}
        }
        let payload = match result {
            Ok(Value::Hashes(hashes)) => Payload::Bytes(hashes.concat()),
            Ok(Value::Data(data)) => Payload::Bytes(encode_data(&data)),
            Ok(Value::Tree(parts)) => {
                self.reply_part(&header, &parts, out);
                self.follower.tree = parts;
                return;
            }
            _ => Payload::None,
        };
        self.reply(&header, ended, payload, out);
    }

    /// The marks are durable: what waited for that is answered.
    pub(super) fn answer_after_marks(&mut self, out: &mut Vec<Effect>) {
        for (header, result) in std::mem::take(&mut self.follower.after_marks) {
            self.reply(&header, result, Payload::None, out);
        }
    }

    fn reply_part(&mut self, header: &Header, parts: &[Vec<u8>], out: &mut Vec<Effect>) {
        let part = usize::try_from(header.offset).ok().and_then(|at| parts.get(at));
        match part {
            Some(part) => {
                let payload = Payload::Bytes(part.clone());
                self.reply_with(header, Ok(()), payload, (header.offset, parts.len() as u64), out);
            }
            None => self.end_link("a question for a part that is not there", out),
        }
    }

    fn reply(&mut self, asked: &Header, result: Result<(), Errno>, payload: Payload, out: &mut Vec<Effect>) {
        self.reply_with(asked, result, payload, (0, 0), out);
    }

    /// `part`: which part of how many.
    fn reply_with(
        &mut self,
        asked: &Header,
        result: Result<(), Errno>,
        payload: Payload,
        part: (u64, u64),
        out: &mut Vec<Effect>,
    ) {
        if self.session() != Some(asked.session) || self.role() == Role::Holder {
            return;
        }
        let mut header = Header::new(Kind::Answer, asked.session, asked.sequence);
        header.result = result.err().map_or(0, |errno| errno.0);
        (header.offset, header.extent) = part;
        out.push(Effect::Send { header, payload });
    }
}

/// `Work::Hash` as a frame asks for it, within bounds.
fn hash_work(header: &Header) -> Option<Work> {
    let unit = match header.flags {
        0 => BLOCK_BYTES,
        1 => PAGE_BYTES,
        _ => return None,
    };
    let fits = header.offset.is_multiple_of(unit) && header.extent.is_multiple_of(unit);
    let few = header.extent / unit * 32 <= PAYLOAD_BYTES_MAX as u64;
    let (length, unit) = (u32::try_from(header.extent).ok()?, u32::try_from(unit).ok()?);
    (fits && few).then_some(Work::Hash { file: header.file, offset: header.offset, length, unit })
}
