//! Carries out what the verification orders, on this disk and over the session, under the overlap rule; and its repair.
//!
//! Beginning to end it belongs to one session between a holder and a peer in sync. Repair: what differs is marked to be
//! compared, durably, and then the peer is dropped: the ordinary resync makes it the holder's copy.
//! Invariant: while both sides hash a range no write to it is under way; the peer is dropped only when the marks are
//! durable, for after that nothing else tells that it differs.
use super::catchup::{decode_data, read_tree};
use super::effect::{Effect, Payload, VerifyEnd, Work};
use super::event::{Errno, Job, Value};
use super::guest::who;
use super::map::Mark;
use super::overlap::Claim;
use super::session::Asked;
use super::{Replica, Rule};
use crate::ids::{FileId, Sequence, SessionId};
use crate::limits::{BLOCK_BYTES, RESYNC_DATA_BYTES};
use crate::namespace::TreeReader;
use crate::resync::verify::{Event, Order, Progress, Verdict, Verify};
use crate::resync::{JobId, Side};
use crate::wire::frame::{Header, Kind};
use std::collections::BTreeMap;

/// What is under way for the verification, by numbers of the replica machine.
#[derive(Clone, Copy, Debug)]
enum Task {
    Trees(JobId),
    Data(JobId, FileId, u64),
    Hash { job: JobId, file: FileId, offset: u64, length: u32 },
}

#[derive(Debug)]
pub(super) struct Verifying {
    machine: Verify,
    repair: bool,
    /// With how many sides are still to answer.
    tasks: BTreeMap<u64, (Task, u8)>,
    tree: TreeReader,
    told: Progress,
}

/// A repair that waits until its marks are durable; of this record, whatever becomes of the session.
#[derive(Clone, Copy, Debug)]
pub(super) struct Repair {
    version: u64,
}

impl Replica {
    /// The operator wants to know whether both replicas are equal.
    pub(super) fn begin_verify(&mut self, rate: u64, repair: bool, out: &mut Vec<Effect>) {
        let refused = if self.verify.is_some() || self.repair.is_some() {
            Some("a verification is under way already")
        } else if !self.is_holder() {
            Some("only the node that holds the VM can verify")
        } else if !self.peer_in_sync() || !self.is_mirroring() || self.failed.is_some() {
            Some("the other replica is not in sync: nothing can be compared until it is")
        } else if self.quiesce.is_some() || self.drain.is_some() {
            Some("the VM is being handed over")
        } else {
            None
        };
        if let Some(why) = refused {
            return out.push(Effect::VerifyRefused(why));
        }
        let mut orders = Vec::new();
        let machine = Verify::begin(self.now, rate, &mut orders);
        let (tasks, tree) = (BTreeMap::new(), TreeReader::default());
        self.verify = Some(Verifying { machine, repair, tasks, tree, told: Progress::default() });
        out.push(Effect::VerifyProgress(Progress::default()));
        self.obey_verify(orders, out);
    }

    /// The session is over, and with it what was under way in it.
    pub(super) fn end_verify(&mut self, reason: &'static str, out: &mut Vec<Effect>) {
        if self.verify.is_some() {
            out.push(Effect::Verified(VerifyEnd::Cut(reason)));
            self.leave_verify(out);
        }
    }

    /// Nothing of it goes on, nor holds anybody up.
    fn leave_verify(&mut self, out: &mut Vec<Effect>) {
        let Some(verify) = self.verify.take() else { return };
        for (number, (task, _)) in verify.tasks {
            // Who is not the holder any more lets nobody in by this.
            if self.is_holder() && !matches!(task, Task::Data(..)) {
                self.unclaim(Job::Own(number), out);
            }
        }
    }

    /// Time went on.
    pub(super) fn tick_verify(&mut self, out: &mut Vec<Effect>) {
        self.tell_verify(Event::Tick, out);
    }

    fn tell_verify(&mut self, event: Event, out: &mut Vec<Effect>) {
        let Some(verify) = &mut self.verify else { return };
        let mut orders = Vec::new();
        verify.machine.step(self.now, event, &mut orders);
        let progress = verify.machine.progress();
        if progress != std::mem::replace(&mut verify.told, progress) {
            out.push(Effect::VerifyProgress(progress));
        }
        self.obey_verify(orders, out);
    }

    fn obey_verify(&mut self, orders: Vec<Order>, out: &mut Vec<Effect>) {
        for order in orders {
            match order {
                Order::AskTrees(job, files) => self.begin_verify_task(Task::Trees(job), Some(Claim::Tree(files)), out),
                Order::AskData(job, file, from) => self.begin_verify_task(Task::Data(job, file, from), None, out),
                Order::Hash { job, file, offset, length, whole } => {
                    let range = Claim::pages(file, offset, u64::from(length));
                    let claim = if whole { Claim::Tree([file, FileId(0), FileId(0), FileId(0)]) } else { range };
                    self.begin_verify_task(Task::Hash { job, file, offset, length }, Some(claim), out);
                }
                Order::Done(verdict) => self.verified(verdict, out),
                Order::Broke(side, errno) => {
                    self.leave_verify(out);
                    out.push(Effect::Verified(VerifyEnd::Broke(side, errno)));
                }
            }
        }
    }

    fn begin_verify_task(&mut self, task: Task, claim: Option<Claim>, out: &mut Vec<Effect>) {
        let Job::Own(number) = self.next_own() else { unreachable!("own jobs are own") };
        let claim = if self.off(Rule::VerifyAtRest) { None } else { claim };
        let Some(verify) = &mut self.verify else { return };
        verify.tasks.insert(number, (task, 2));
        if claim.is_none_or(|claim| self.overlap.take(who(Job::Own(number)), claim)) {
            self.verify_claimed(number, out);
        }
    }

    /// The claim is held, or none was needed: both sides begin. False: it is none of the verification's.
    pub(super) fn verify_claimed(&mut self, number: u64, out: &mut Vec<Effect>) -> bool {
        let Some(verify) = &mut self.verify else { return false };
        let Some((task, _)) = verify.tasks.get(&number).copied() else { return false };
        let ask = |kind| Header::new(kind, SessionId(0), Sequence(0));
        let (work, header) = match task {
            Task::Trees(_) => {
                verify.tree = TreeReader::default();
                (Work::Tree, ask(Kind::Tree))
            }
            Task::Data(_, file, from) => {
                let header = Header { file, offset: from, extent: RESYNC_DATA_BYTES, ..ask(Kind::Data) };
                (Work::Data { file, from, length: RESYNC_DATA_BYTES }, header)
            }
            Task::Hash { file, offset, length, .. } => {
                let header = Header { file, offset, extent: u64::from(length), ..ask(Kind::Hash) };
                let unit = u32::try_from(BLOCK_BYTES).expect("a block is small");
                (Work::Hash { file, offset, length, unit }, header)
            }
        };
        self.local(Job::Own(number), work, out);
        self.ask(Asked::Verify(number), header, Payload::None, out);
        true
    }

    /// This disk has ended a task. False: it is none of the verification's.
    pub(super) fn verify_done(&mut self, number: u64, result: &Result<Value, Errno>, out: &mut Vec<Effect>) -> bool {
        let found = self.verify.as_ref().and_then(|verify| verify.tasks.get(&number)).copied();
        let Some((task, _)) = found else { return false };
        let event = match (task, result) {
            (Task::Trees(job), Ok(Value::Tree(parts))) => match read_tree(parts) {
                Some(tree) => Event::Tree(job, Side::Holder, tree),
                None => Event::Failed(job, Side::Holder, Errno::EIO),
            },
            (Task::Data(job, ..), Ok(Value::Data(data))) => Event::Data(job, Side::Holder, data.clone()),
            (Task::Hash { job, .. }, Ok(Value::Hashes(hashes))) => Event::Hashes(job, Side::Holder, hashes.clone()),
            (Task::Trees(job) | Task::Data(job, ..) | Task::Hash { job, .. }, result) => {
                Event::Failed(job, Side::Holder, result.as_ref().err().copied().unwrap_or(Errno::EIO))
            }
        };
        self.verify_side_done(number, event, out);
        true
    }

    /// The peer has answered a task.
    pub(super) fn verify_answered(
        &mut self,
        number: u64,
        result: Result<(), Errno>,
        header: &Header,
        body: &[u8],
        out: &mut Vec<Effect>,
    ) {
        let Some(verify) = &mut self.verify else { return };
        let Some((task, _)) = verify.tasks.get(&number).copied() else { return };
        let event = match (task, result) {
            (Task::Trees(job) | Task::Data(job, ..) | Task::Hash { job, .. }, Err(errno)) => {
                Event::Failed(job, Side::Target, errno)
            }
            (Task::Trees(job), Ok(())) => match verify.tree.add(body) {
                Ok(Some(tree)) => Event::Tree(job, Side::Target, tree),
                Ok(None) => {
                    let next = Header::new(Kind::Tree, SessionId(0), Sequence(0));
                    let part = Header { offset: header.offset + 1, ..next };
                    return self.ask(Asked::Verify(number), part, Payload::None, out);
                }
                Err(_) => return self.end_link("the peer's list of files makes no sense", out),
            },
            (Task::Data(job, ..), Ok(())) => match decode_data(body) {
                Ok(data) => Event::Data(job, Side::Target, data),
                Err(_) => return self.end_link("the peer's answer makes no sense", out),
            },
            (Task::Hash { job, .. }, Ok(())) => {
                let hashes = body.chunks_exact(32).map(|hash| hash.try_into().expect("32 bytes each")).collect();
                Event::Hashes(job, Side::Target, hashes)
            }
        };
        self.verify_side_done(number, event, out);
    }

    /// The claim goes when both sides have answered, whatever they said; what comes next may claim the same again.
    fn verify_side_done(&mut self, number: u64, event: Event, out: &mut Vec<Effect>) {
        let Some(verify) = &mut self.verify else { return };
        let Some((task, left)) = verify.tasks.get_mut(&number) else { return };
        *left -= 1;
        if *left == 0 {
            let claimed = !matches!(task, Task::Data(..));
            verify.tasks.remove(&number);
            if claimed {
                self.unclaim(Job::Own(number), out);
            }
        }
        self.tell_verify(event, out);
    }

    fn verified(&mut self, verdict: Verdict, out: &mut Vec<Effect>) {
        let Some(repair) = self.verify.as_ref().map(|verify| verify.repair) else { return };
        // Of a range that one side could not read, the other one may still hash.
        self.leave_verify(out);
        let repaired = repair && !verdict.is_equal() && !verdict.holder_unreadable;
        if repaired {
            for (file, run) in verdict.unequal.runs() {
                self.map.mark(Mark::Compare, file, &run);
            }
            self.repair = Some(Repair { version: self.map_next });
            (self.map_wanted, self.look_at_log) = (true, true);
        }
        out.push(Effect::Verified(VerifyEnd::Done { verdict, repaired }));
    }

    /// This version of the map is durable: the repair goes on by the ordinary way.
    pub(super) fn verify_map_saved(&mut self, version: u64, out: &mut Vec<Effect>) {
        if self.repair.take_if(|repair| repair.version <= version).is_some() {
            self.peer_failed("the verification found differences: the peer gets this node's copy", out);
        }
    }
}
