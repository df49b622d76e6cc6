//! Carries out what the resync machine orders, on this disk and over the session, under the overlap rule (R5, R10).
//!
//! Asking (the target's suspects; the own files, where all is suspect) ─> Running ─> Preparing ─> Proposed
//! Invariant: the join is proposed only when the resync machine asked for it and the target has flushed since.
use super::effect::{self, Change, Effect, Payload, Work};
use super::event::{Errno, Job, RangeKind, Value};
use super::guest::{Purpose, Stage, who};
use super::map::DirtyMap;
use super::overlap::Claim;
use super::session::Asked;
use super::{Replica, Rule};
use crate::ids::{FileId, Sequence, SessionId};
use crate::limits::{BLOCK_BYTES, RESYNC_DATA_RANGES_MAX, SUSPECTS_BYTES_MAX};
use crate::namespace::{self, TreeReader};
use crate::resync::{self, Data, JobId, Resync, Side};
use crate::wire::codec::{DecodeError, Reader, Writer};
use crate::wire::frame::{Header, Kind};
use crate::wire::message::Hello;
use std::collections::BTreeMap;

/// Bytes of suspects in one answer.
const SUSPECTS_PART_BYTES: usize = 512 << 10;

#[derive(Debug)]
enum Phase {
    /// Gathers what is suspect; `all`: every file is.
    Asking {
        bytes: Vec<u8>,
        all: bool,
    },
    Running(Box<Resync>),
    Preparing,
    Proposed,
}

/// What is under way for the resync machine, by numbers of the replica machine.
#[derive(Clone, Copy, Debug)]
enum Task {
    Suspects,
    ListAll,
    /// `left`, here and below: how many of the two sides are still to answer.
    Tree {
        job: JobId,
        left: u8,
    },
    Apply(JobId),
    Data {
        job: JobId,
        left: u8,
    },
    /// `claim`: under the overlap rule.
    Hash {
        job: JobId,
        file: FileId,
        offset: u64,
        length: u32,
        unit: u32,
        left: u8,
        claim: bool,
    },
    /// Bytes of data that were sent.
    Copy {
        job: JobId,
        file: FileId,
        offset: u64,
        length: u32,
        sent: u64,
    },
    Prepare,
}

/// A resync within one session.
#[derive(Debug)]
pub(super) struct Catchup {
    phase: Phase,
    mirroring: bool,
    holding: bool,
    tasks: BTreeMap<u64, Task>,
    tree: TreeReader,
    flush: Option<(JobId, Job)>,
    /// The map that must be durable before the machine goes on.
    awaited_map: Option<(JobId, u64)>,
}

impl Catchup {
    pub(super) fn is_mirroring(&self) -> bool {
        self.mirroring
    }
    pub(super) fn is_holding(&self) -> bool {
        self.holding
    }
}

impl Replica {
    /// Whether the peer was proved equal in this session and the join was proposed.
    pub(super) fn is_joining(&self) -> bool {
        self.session().is_some() && self.catchup.as_ref().is_some_and(|c| matches!(c.phase, Phase::Proposed))
    }

    /// A session with a peer that is out.
    pub(super) fn begin_resync(&mut self, hello: &Hello, out: &mut Vec<Effect>) {
        if self.proposed == Some(Change::JoinPeer) {
            // Its outcome comes first: what waits for the peer's answer could not end, and no resync begin.
            return;
        }
        self.catchup = Some(Catchup {
            phase: Phase::Asking { bytes: Vec::new(), all: hello.suspect_all || self.marks.suspect_all },
            mirroring: false,
            holding: false,
            tasks: BTreeMap::new(),
            tree: TreeReader::default(),
            flush: None,
            awaited_map: None,
        });
        self.ask_resync(Task::Suspects, Header::new(Kind::Suspects, SessionId(0), Sequence(0)), Payload::None, out);
    }

    /// The session is over: what was settled without a flush is to be looked at again.
    pub(super) fn end_resync(&mut self, out: &mut Vec<Effect>) {
        let Some(catchup) = self.catchup.take() else { return };
        self.map.take_back();
        for (number, task) in catchup.tasks {
            if matches!(task, Task::Copy { .. } | Task::Hash { claim: true, .. }) {
                self.unclaim(Job::Own(number), out);
            }
            if matches!(task, Task::Copy { .. }) && !self.local.contains(&Job::Own(number)) {
                out.push(Effect::Release { job: Job::Own(number) });
            }
        }
    }

    fn ask_resync(&mut self, task: Task, header: Header, payload: Payload, out: &mut Vec<Effect>) {
        let number = self.begin_task(task);
        self.ask(Asked::Resync(number), header, payload, out);
    }

    fn begin_task(&mut self, task: Task) -> u64 {
        let Job::Own(number) = self.next_own() else { unreachable!("own jobs are own") };
        self.catchup.as_mut().expect("tasks belong to a resync").tasks.insert(number, task);
        number
    }

    /// Gives news to the resync machine and carries out its orders.
    fn tell_resync(&mut self, event: resync::Event, out: &mut Vec<Effect>) {
        let Some(Catchup { phase: Phase::Running(machine), .. }) = &mut self.catchup else { return };
        let mut orders = Vec::new();
        machine.step(self.now, event, &mut self.map, &mut orders);
        for order in orders {
            self.obey(order, out);
        }
    }

    fn obey(&mut self, order: resync::Effect, out: &mut Vec<Effect>) {
        use resync::Effect as O;
        let unflushed = self.off(Rule::JoinFlush);
        let Some(catchup) = &mut self.catchup else { return };
        let ask = |kind| Header::new(kind, SessionId(0), Sequence(0));
        match order {
            O::Hold => (catchup.holding, catchup.mirroring) = (true, false),
            O::AskTrees(job) => {
                catchup.tree = TreeReader::default();
                let number = self.begin_task(Task::Tree { job, left: 2 });
                self.local(Job::Own(number), Work::Tree, out);
                self.ask(Asked::Resync(number), ask(Kind::Tree), Payload::None, out);
            }
            O::SaveMap(job) => {
                catchup.awaited_map = Some((job, self.map_next));
                self.map_wanted = true;
                self.look_at_log = true;
            }
            O::Apply(job, op) => {
                let mut bytes = Vec::new();
                op.encode(&mut Writer::new(&mut bytes));
                self.namespace_number += 1;
                let header = Header { extent: self.namespace_number, ..ask(Kind::Namespace) };
                self.ask_resync(Task::Apply(job), header, Payload::Bytes(bytes), out);
            }
            O::Mirror => {
                (catchup.mirroring, catchup.holding) = (true, false);
                self.send_unanswered(out);
                if self.off(Rule::JoinEqual) {
                    self.obey(O::Join, out);
                }
            }
            O::AskData { job, file, from, length } => {
                let number = self.begin_task(Task::Data { job, left: 2 });
                self.local(Job::Own(number), Work::Data { file, from, length }, out);
                let header = Header { file, offset: from, extent: length, ..ask(Kind::Data) };
                self.ask(Asked::Resync(number), header, Payload::None, out);
            }
            O::Hash { job, file, offset, length, unit, claim } => {
                let number = self.begin_task(Task::Hash { job, file, offset, length, unit, left: 2, claim });
                let pages = Claim::pages(file, offset, u64::from(length));
                if !claim || self.overlap.take(who(Job::Own(number)), pages) {
                    self.resync_claimed(number, out);
                }
            }
            O::Copy { job, file, offset, length } => {
                let number = self.begin_task(Task::Copy { job, file, offset, length, sent: 0 });
                let pages = Claim::pages(file, offset, u64::from(length));
                if self.off(Rule::Overlap) || self.overlap.take(who(Job::Own(number)), pages) {
                    self.resync_claimed(number, out);
                }
            }
            O::FlushBoth(job) if unflushed => self.tell_resync(resync::Event::Flushed(job), out),
            O::FlushBoth(job) => {
                catchup.flush = Some((job, Job::Own(self.own_next + 1)));
                self.own_flush(Purpose::Join, out);
            }
            O::Join => {
                catchup.phase = Phase::Preparing;
                self.ask_resync(Task::Prepare, ask(Kind::Prepare), Payload::None, out);
            }
            O::Progress(now) => {
                let resync::Progress { bytes_total, bytes_done, bytes_sent } = now;
                out.push(Effect::Progress(effect::Progress { bytes_total, bytes_done, bytes_sent, finished: false }));
            }
            O::Unreadable(file, range, errno) => {
                out.push(Effect::Say(format!("file {file} cannot be read from byte {} on: {errno:?}", range.start)));
            }
            O::Unequal(file, at) => {
                out.push(Effect::Say(format!(
                    "file {file} is not equal at byte {at} after it was copied; copied again"
                )));
            }
            O::TreesDiffer(errno) => {
                out.push(Effect::Say(format!("the directories cannot be made equal yet ({errno:?}); tried again")));
            }
            O::Restarted => out.push(Effect::Say("the resync got no further for a minute; it starts again".to_owned())),
        }
    }

    /// The claim of a copy or proof is held, or none was needed.
    pub(super) fn resync_claimed(&mut self, number: u64, out: &mut Vec<Effect>) {
        let Some(task) = self.catchup.as_ref().and_then(|catchup| catchup.tasks.get(&number)) else { return };
        match *task {
            Task::Hash { file, offset, length, unit, .. } => {
                self.local(Job::Own(number), Work::Hash { file, offset, length, unit }, out);
                let mut header = Header::new(Kind::Hash, SessionId(0), Sequence(0));
                (header.file, header.offset, header.extent) = (file, offset, u64::from(length));
                header.flags = u16::from(u64::from(unit) != BLOCK_BYTES);
                self.ask(Asked::Resync(number), header, Payload::None, out);
            }
            Task::Copy { file, offset, length, .. } => {
                self.local(Job::Own(number), Work::Read { file, offset, length }, out);
            }
            _ => unreachable!("only copies and proofs claim"),
        }
    }

    /// This disk has ended a task.
    pub(super) fn resync_done(&mut self, number: u64, result: Result<Value, Errno>, out: &mut Vec<Effect>) {
        let Some(task) = self.catchup.as_ref().and_then(|catchup| catchup.tasks.get(&number)).copied() else {
            // Of a resync that is over. A read left its payload.
            return out.push(Effect::Release { job: Job::Own(number) });
        };
        match (task, result) {
            (Task::ListAll, Ok(Value::Tree(parts))) => {
                self.end_task(number);
                let Some(tree) = read_tree(&parts) else {
                    return self.end_link("this node's directory cannot be listed", out);
                };
                for (file, _) in tree.entries().iter().filter(|(_, entry)| entry.kind == namespace::Kind::File) {
                    self.map.mark_whole(*file, 0);
                }
                self.run_resync(out);
            }
            (Task::Tree { job, .. }, Ok(Value::Tree(parts))) => match read_tree(&parts) {
                Some(tree) => {
                    self.side_done(number, out);
                    self.tell_resync(resync::Event::Tree(job, Side::Holder, tree), out);
                }
                None => self.end_link("this node's directory cannot be listed", out),
            },
            (Task::Data { job, .. }, Ok(Value::Data(data))) => {
                self.side_done(number, out);
                self.tell_resync(resync::Event::Data(job, Side::Holder, data), out);
            }
            (Task::Hash { job, .. }, Ok(Value::Hashes(hashes))) => {
                self.side_done(number, out);
                self.tell_resync(resync::Event::Hashes(job, Side::Holder, hashes), out);
            }
            (Task::Copy { file, offset, length: asked, .. }, Ok(Value::Read { length, zeros })) => {
                if length == 0 {
                    return self.copied(number, out);
                }
                let mut header = Header::new(Kind::Write, SessionId(0), Sequence(0));
                (header.file, header.offset) = (file, offset);
                if zeros {
                    (header.kind, header.flags) = (Kind::Range, RangeKind::Punch.flags());
                    header.extent = u64::from(asked);
                    return self.ask(Asked::Resync(number), header, Payload::None, out);
                }
                header.length = length;
                if let Some(Task::Copy { sent, .. }) =
                    self.catchup.as_mut().and_then(|catchup| catchup.tasks.get_mut(&number))
                {
                    *sent = u64::from(length);
                }
                self.ask(Asked::Resync(number), header, Payload::Of(Job::Own(number)), out);
            }
            (Task::Data { job, .. } | Task::Hash { job, .. } | Task::Copy { job, .. }, Err(errno)) => {
                self.end_task(number);
                if matches!(task, Task::Copy { .. } | Task::Hash { claim: true, .. }) {
                    self.unclaim(Job::Own(number), out);
                    out.push(Effect::Release { job: Job::Own(number) });
                }
                self.tell_resync(resync::Event::Failed(job, errno), out);
            }
            (task, result) => {
                debug_assert!(result.is_err(), "{task:?} ended with {result:?}");
                self.end_link("this node's directory cannot be read", out);
            }
        }
    }

    /// The target has answered a task.
    pub(super) fn resync_answered(
        &mut self,
        number: u64,
        result: Result<(), Errno>,
        header: &Header,
        body: &[u8],
        out: &mut Vec<Effect>,
    ) {
        let Some(task) = self.catchup.as_ref().and_then(|catchup| catchup.tasks.get(&number)).copied() else {
            // The other side of it failed here; the answer is of no use any more.
            return;
        };
        match (task, result) {
            (Task::Suspects, Ok(())) => {
                self.end_task(number);
                self.suspects_part(header, body, out);
            }
            (Task::Tree { job, .. }, Ok(())) => {
                let tree = self.catchup.as_mut().expect("it has tasks").tree.add(body);
                match tree {
                    Ok(Some(tree)) => {
                        self.side_done(number, out);
                        self.tell_resync(resync::Event::Tree(job, Side::Target, tree), out);
                    }
                    Ok(None) => {
                        let part =
                            Header { offset: header.offset + 1, ..Header::new(Kind::Tree, SessionId(0), Sequence(0)) };
                        self.ask(Asked::Resync(number), part, Payload::None, out);
                    }
                    Err(_) => self.end_link("the peer's list of files makes no sense", out),
                }
            }
            (Task::Apply(job), result) => {
                self.end_task(number);
                self.tell_resync(resync::Event::Applied(job, result), out);
            }
            (Task::Data { job, .. }, Ok(())) => match decode_data(body) {
                Ok(data) => {
                    self.side_done(number, out);
                    self.tell_resync(resync::Event::Data(job, Side::Target, data), out);
                }
                Err(_) => self.end_link("the peer's answer makes no sense", out),
            },
            (Task::Hash { job, .. }, Ok(())) => {
                let hashes = body.chunks_exact(32).map(|hash| hash.try_into().expect("32 bytes each")).collect();
                self.side_done(number, out);
                self.tell_resync(resync::Event::Hashes(job, Side::Target, hashes), out);
            }
            (Task::Copy { .. }, Ok(())) => self.copied(number, out),
            (Task::Prepare, Ok(())) => {
                self.end_task(number);
                self.catchup.as_mut().expect("it has tasks").phase = Phase::Proposed;
                self.proposed = Some(Change::JoinPeer);
                out.push(Effect::Propose(Change::JoinPeer));
            }
            (Task::ListAll, _) => unreachable!("the peer is not asked for that"),
            (_, Err(_)) => self.end_link("the peer's disk failed in the resync", out),
        }
    }

    fn end_task(&mut self, number: u64) {
        if let Some(catchup) = &mut self.catchup {
            catchup.tasks.remove(&number);
        }
    }

    fn copied(&mut self, number: u64, out: &mut Vec<Effect>) {
        let Some(Task::Copy { job, sent, .. }) = self.catchup.as_mut().and_then(|c| c.tasks.remove(&number)) else {
            return;
        };
        // Settled before the claim goes: a write that comes next marks it again (R10).
        self.tell_resync(resync::Event::Copied(job, sent), out);
        self.unclaim(Job::Own(number), out);
        out.push(Effect::Release { job: Job::Own(number) });
    }

    /// One of the two sides of a task has answered.
    fn side_done(&mut self, number: u64, out: &mut Vec<Effect>) {
        let Some(task) = self.catchup.as_mut().and_then(|catchup| catchup.tasks.get_mut(&number)) else { return };
        let (Task::Tree { left, .. } | Task::Data { left, .. } | Task::Hash { left, .. }) = task else { return };
        *left -= 1;
        if *left == 0 {
            let claimed = matches!(task, Task::Hash { claim: true, .. });
            self.end_task(number);
            if claimed {
                self.unclaim(Job::Own(number), out);
            }
        }
    }

    fn suspects_part(&mut self, header: &Header, body: &[u8], out: &mut Vec<Effect>) {
        let Some(Catchup { phase: Phase::Asking { bytes, all }, .. }) = &mut self.catchup else { return };
        bytes.extend_from_slice(body);
        if bytes.len() > SUSPECTS_BYTES_MAX {
            return self.end_link("the peer suspects more than it can have", out);
        }
        let next = header.offset + 1;
        if next < header.extent {
            let part = Header { offset: next, ..Header::new(Kind::Suspects, SessionId(0), Sequence(0)) };
            return self.ask_resync(Task::Suspects, part, Payload::None, out);
        }
        let all = *all;
        match DirtyMap::decode(bytes) {
            Ok(theirs) => self.map.compare_all_of(&theirs),
            Err(_) => return self.end_link("the peer's suspects make no sense", out),
        }
        if all {
            let number = self.begin_task(Task::ListAll);
            self.local(Job::Own(number), Work::Tree, out);
        } else {
            self.run_resync(out);
        }
    }

    fn run_resync(&mut self, out: &mut Vec<Effect>) {
        let Some(catchup) = &mut self.catchup else { return };
        let mut orders = Vec::new();
        catchup.phase = Phase::Running(Box::new(Resync::begin(self.now, &mut orders)));
        for order in orders {
            self.obey(order, out);
        }
    }

    /// Tells the resync machine what it waits for, as soon as it is so.
    pub(super) fn advance_resync(&mut self, out: &mut Vec<Effect>) {
        let Some(catchup) = &self.catchup else { return };
        if catchup.holding && self.ops.values().all(|op| op.stage == Stage::Held) {
            self.tell_resync(resync::Event::Held, out);
        }
    }

    /// This version of the map is durable.
    pub(super) fn resync_map_saved(&mut self, version: u64, out: &mut Vec<Effect>) {
        let Some(catchup) = self.catchup.as_mut() else { return };
        if let Some((job, _)) = catchup.awaited_map.take_if(|(_, awaited)| *awaited <= version) {
            self.tell_resync(resync::Event::MapSaved(job), out);
        }
    }

    /// A flush for the join was answered, by the peer too where `both`.
    pub(super) fn own_flushed(&mut self, job: Job, both: bool, out: &mut Vec<Effect>) {
        let Some(catchup) = self.catchup.as_mut() else { return };
        if let Some((asked, _)) = catchup.flush.take_if(|(_, flush)| both && *flush == job) {
            self.tell_resync(resync::Event::Flushed(asked), out);
        }
    }

    /// Time went on for the resync, too.
    pub(super) fn tick_resync(&mut self, out: &mut Vec<Effect>) {
        self.tell_resync(resync::Event::Tick, out);
    }

    /// As a target: all that is suspect here, in parts.
    pub(super) fn suspect_parts(&mut self) -> Vec<Vec<u8>> {
        self.fold_log();
        let all = self.map.encode();
        all.chunks(SUSPECTS_PART_BYTES).map(<[u8]>::to_vec).collect()
    }
}

pub(super) fn read_tree(parts: &[Vec<u8>]) -> Option<namespace::Tree> {
    let mut reader = TreeReader::default();
    parts.iter().find_map(|part| reader.add(part).ok().flatten())
}

/// The bytes of an answer to `Kind::Data`: u64 until · u32 count + ranges (u64 start, u64 end).
pub(super) fn encode_data(data: &Data) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut out = Writer::new(&mut bytes);
    out.u64(data.until);
    out.list(&data.ranges, |out, range| {
        out.u64(range.start);
        out.u64(range.end);
    });
    bytes
}

pub(super) fn decode_data(body: &[u8]) -> Result<Data, DecodeError> {
    let mut from = Reader::new(body);
    let until = from.u64()?;
    let ranges = from.list(RESYNC_DATA_RANGES_MAX, |from| Ok(from.u64()?..from.u64()?))?;
    from.end()?;
    let ordered = ranges.is_sorted_by(|a, b| a.end <= b.start) && ranges.iter().all(|range| range.start < range.end);
    if ordered { Ok(Data { ranges, until }) } else { Err(DecodeError::Bad { what: "list of ranges" }) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]
        #[test]
        fn ranges_read_back_and_hostile_bytes_never_panic(steps in proptest::collection::vec(1u64..99, 0..20), junk in proptest::collection::vec(any::<u8>(), 0..99)) {
            let mut at = 0;
            let mut ranges = Vec::new();
            for pair in steps.chunks_exact(2) {
                ranges.push(at + pair[0]..at + pair[0] + pair[1]);
                at += pair[0] + pair[1];
            }
            let data = Data { ranges, until: at + 1 };
            prop_assert_eq!(decode_data(&encode_data(&data)), Ok(data));
            let _ = decode_data(&junk);
        }
    }
}
