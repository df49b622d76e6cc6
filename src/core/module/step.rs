//! What the module machine does with each piece of news. `step` routes by event; each handler is one table over phases;
//! `follow_up` then does what the facts call for (take over, start, pause, resume, end), whatever brought them about.
use super::event::{
    Ask, Change, Command, DataOrder, Effect, Event, Level, Mark, Peer, Refusal, VmCall, VmEnd, VmNews, VmOrder, Word,
};
use super::state::{
    CRASH_SPAN, CRASHES_MAX, CRASHES_THERE_SPAN, Cause, END_LIMIT, EXIT_FAILED, EXIT_STOPPED, EXIT_TERMINATED, Goal,
    HAND_OVER_LIMIT, LeaveStep, Machine, Phase, QUIESCE_LIMIT, RETRY, RETRY_TAKEOVER, SHUTDOWN_SPARE, STOP_SPARE,
    TERMINATE_LIMIT, Vm, failed, forbidden,
};
use crate::record::Record;
use crate::time::Time;
use std::time::Duration;

type Effects = Vec<Effect>;

fn note(effects: &mut Effects, level: Level, event: &'static str, text: impl Into<String>) {
    effects.push(Effect::Note(level, event, text.into()));
}

impl Machine {
    /// Takes one piece of news and appends what is to be done, in order.
    pub fn step(&mut self, now: Time, event: Event, effects: &mut Effects) {
        use Event as E;
        if self.phase == Phase::Over {
            return;
        }
        match event {
            E::Begin => effects.push(Effect::Vm(VmOrder::Clear)),
            E::Tick => self.on_tick(now, effects),
            E::Ready { replica, broken, erred } => self.on_ready(now, replica, broken, erred, effects),
            E::Failed(why) => self.on_data_failed(why, effects),
            E::InForce(id) => self.in_force |= self.holds() && self.record.as_ref().is_some_and(|r| r.id == id),
            E::PeerUp(peer) => self.on_peer_up(peer, effects),
            E::PeerDown(why) => self.on_peer_down(why, effects),
            E::Told(word) => self.on_told(now, word, effects),
            E::Propose(change) => self.on_propose(change, effects),
            E::Resync(progress) => self.resync = progress,
            E::Erred(why) => self.on_erred(now, why, effects),
            E::Drained(token) => self.on_drained(token, effects),
            E::Quiesced { token, both } => self.on_quiesced(now, token, both, effects),
            E::Ended(result) => self.on_data_ended(now, result, effects),
            E::Known { record, ours } => self.on_known(now, record, ours, effects),
            E::NotLanded => self.on_not_landed(now, effects),
            E::Lease(until) => self.lease_until = until,
            E::HolderSilent(silent) => self.silent = silent,
            E::HandedOver => self.handed_over = true,
            E::Reached { answering, voters } => self.reached = Some((answering, voters)),
            E::Vm(news) => self.on_vm(now, news, effects),
            E::Command(id, command) => self.on_command(now, id, command, effects),
            E::Terminate => self.on_terminate(now, effects),
        }
        self.follow_up(now, effects);
        self.check();
    }

    /// The invariants that can be seen from here.
    fn check(&self) {
        let vm_up = !matches!(self.vm, Vm::Off | Vm::Killing);
        let may_be_up = self.holds() || matches!(self.phase, Phase::Deposed | Phase::Ending { .. } | Phase::Over);
        assert!(!vm_up || may_be_up, "a VM is up in phase {:?} ({:?})", self.phase, self.vm);
        let holds_by_record = !self.holds() || self.is_holder_by_record();
        assert!(holds_by_record, "phase {:?} under another's record {:?}", self.phase, self.record);
    }

    // What the facts call for.

    fn follow_up(&mut self, now: Time, effects: &mut Effects) {
        if matches!(self.phase, Phase::Waiting | Phase::Following) {
            let stop_is_due = self.stopping_until.is_some_and(|until| self.peer.is_none() || now >= until);
            match self.takeover_due() {
                _ if stop_is_due => self.end(now, EXIT_STOPPED, effects),
                Some((at, cause)) if at <= now => self.begin_takeover(cause, effects),
                _ => {}
            }
        }
        let (live, rested) = (self.lease_is_live(now), self.vm_after <= now);
        match (&self.phase, self.vm) {
            (Phase::Holding, Vm::Off) if live && rested && self.in_force && self.given_up.is_none() => {
                self.vm = Vm::Starting;
                self.vm_after = Time(0);
                effects.push(Effect::Vm(VmOrder::Start));
            }
            // One that somebody else paused stays as it is: it would be resumed with the lease.
            (Phase::Holding, Vm::Starting | Vm::Running) if !live && !self.paused_by_us => {
                self.paused_by_us = true;
                effects.push(Effect::Vm(VmOrder::Pause));
                let text = "no majority renewed the lease: I/O is held, the VM is paused";
                note(effects, Level::Warn, "lease-ended", text);
            }
            (Phase::Holding, _) if live && rested && self.paused_by_us => {
                self.paused_by_us = false;
                self.vm_after = Time(0);
                effects.push(Effect::Vm(VmOrder::Resume));
                let text = "the lease is back and nobody else became holder: the VM goes on";
                note(effects, Level::Info, "lease-back", text);
            }
            // It cannot power off with its I/O held, and a pause would wait behind the call that stops it.
            (Phase::Holding | Phase::Leaving { .. }, Vm::Stopping) if self.kill_at() <= now => {
                let why = if live { "it does not end" } else { "the lease ended while the guest was powering off" };
                note(effects, Level::Error, "vm-killed", format!("{why}: the VM is killed"));
                self.kill(effects);
            }
            _ => {}
        }
    }

    fn begin_takeover(&mut self, cause: Cause, effects: &mut Effects) {
        let token = self.next_token();
        self.phase = Phase::Draining { token, cause };
        self.handed_over = cause == Cause::HandedOver;
        effects.push(Effect::Mark(Mark::Detected));
        effects.push(Effect::Data(DataOrder::Drain(token)));
        let (node, peer) = (self.settings.node.clone(), self.settings.peer.clone());
        let text = match cause {
            Cause::Own => format!("{node} is the holder and starts anew: it asks for a generation of its own"),
            Cause::Silent => format!("{peer} is silent and its lease is over: {node} asks to be the holder"),
            Cause::HandedOver => format!("{peer} hands over: {node} asks to be the holder"),
            Cause::TakeBack => format!("{peer} did not take over: {node} asks to be the holder again"),
        };
        note(effects, Level::Info, "takeover-begun", text);
    }

    fn end(&mut self, now: Time, code: u8, effects: &mut Effects) {
        self.phase = Phase::Ending { code, until: now + END_LIMIT, again: None };
        effects.push(Effect::Data(DataOrder::End));
    }

    fn exit(&mut self, code: u8, effects: &mut Effects) {
        self.phase = Phase::Over;
        effects.push(Effect::Exit(code));
    }

    fn answer_all(&mut self, result: &Result<(), Refusal>, effects: &mut Effects) {
        effects.extend(self.waiting.drain(..).map(|id| Effect::Answer(id, result.clone())));
    }

    // The data thread's news.

    fn on_ready(
        &mut self,
        now: Time,
        replica: crate::ids::ReplicaId,
        broken: bool,
        erred: bool,
        effects: &mut Effects,
    ) {
        self.ready_at = now;
        self.me = Some(replica);
        self.broken = broken;
        self.erred = erred.then(|| "it failed before this process began".to_owned());
        if self.phase == Phase::Opening {
            self.phase = Phase::Waiting;
        }
        let condition = match (erred, broken) {
            (true, _) => ": its disk once failed, it has to be resynced",
            (_, true) => ": the host went down without a clean stop",
            _ => "",
        };
        note(effects, Level::Info, "ready", format!("replica opened and mounted{condition}"));
    }

    fn on_data_failed(&mut self, why: String, effects: &mut Effects) {
        note(effects, Level::Error, "data-failed", why.clone());
        if self.vm_is_up() {
            // Its files are gone with this process, and nobody would pause it when the lease ends.
            self.kill(effects);
        }
        self.answer_all(&Err(failed(why)), effects);
        self.exit(EXIT_FAILED, effects);
    }

    fn on_data_ended(&mut self, now: Time, result: Result<(), String>, effects: &mut Effects) {
        let Phase::Ending { code, until, .. } = self.phase else {
            return self.on_data_failed("the data thread ended unasked".to_owned(), effects);
        };
        match result {
            Ok(()) => {
                note(effects, Level::Info, "stopped", "unmounted, the directory is plain");
                self.answer_all(&Ok(()), effects);
                self.exit(code, effects);
            }
            Err(why) => {
                if self.end_trouble.is_none() {
                    note(effects, Level::Warn, "busy", format!("not unmounted yet: {why}"));
                }
                self.end_trouble = Some(why);
                self.phase = Phase::Ending { code, until, again: Some(now + RETRY) };
            }
        }
    }

    fn on_peer_up(&mut self, peer: Peer, effects: &mut Effects) {
        if self.peer != Some(peer) {
            note(effects, Level::Info, "link-up", format!("link to {}", self.settings.peer));
        }
        self.peer = Some(peer);
    }

    fn on_peer_down(&mut self, why: String, effects: &mut Effects) {
        if self.peer.take().is_some() {
            note(effects, Level::Warn, "link-down", format!("no link to {}: {why}", self.settings.peer));
        }
        self.peer_down = why;
        self.resync = None;
    }

    fn on_told(&mut self, now: Time, word: Word, effects: &mut Effects) {
        if !matches!(self.phase, Phase::Waiting | Phase::Following) {
            return;
        }
        match word {
            Word::Stop => {
                self.stopping_until.get_or_insert(now + self.settings.stop_limit + STOP_SPARE);
                note(
                    effects,
                    Level::Info,
                    "stop-told",
                    format!("{} stops the module on both nodes", self.settings.peer),
                );
            }
            Word::StopUndone => self.stopping_until = None,
            Word::Crashes => self.crashes_there = Some(now),
        }
    }

    fn on_propose(&mut self, change: Change, effects: &mut Effects) {
        if self.holds() {
            effects.push(Effect::Arbiter(match change {
                Change::DropPeer => Ask::DropPeer,
                Change::JoinPeer(replica) => Ask::JoinPeer(replica),
            }));
        }
    }

    fn on_erred(&mut self, now: Time, why: String, effects: &mut Effects) {
        note(effects, Level::Error, "disk-failed", format!("the disk of {} failed: {why}", self.settings.node));
        self.erred = Some(why);
        if self.holds() && self.other_in_sync().is_some() {
            let sentence = format!("the disk of {} failed; {} takes over", self.settings.node, self.settings.peer);
            self.answer_all(&Err(failed(sentence)), effects);
            self.phase = Phase::Leaving { goal: Goal::GiveUp, step: LeaveStep::VmDown };
            if self.vm_is_up() { self.kill(effects) } else { self.vm_is_down(now, effects) }
        }
    }

    fn on_drained(&mut self, drained: u64, effects: &mut Effects) {
        if let Phase::Draining { token, cause } = self.phase
            && token == drained
        {
            self.phase = Phase::Proposing { cause };
            effects.push(Effect::Arbiter(if cause == Cause::TakeBack { Ask::TakeBack } else { Ask::TakeOver }));
        }
    }

    fn on_quiesced(&mut self, now: Time, quiesced: u64, both: bool, effects: &mut Effects) {
        let Phase::Leaving { goal, step: LeaveStep::Quiescing { token, .. } } = self.phase else { return };
        if token != quiesced {
            return;
        }
        let ready = if both { self.peer_ready() } else { Err("it could not be flushed".to_owned()) };
        match (goal, ready) {
            (Goal::Stop, ready) => {
                if let (Err(why), Some(_)) = (ready, self.other_in_sync()) {
                    let text = format!("stopping without a flush on {}: {why}", self.settings.peer);
                    note(effects, Level::Warn, "stop-unflushed", text);
                }
                effects.push(Effect::Arbiter(Ask::Release { to: None }));
                self.end(now, EXIT_STOPPED, effects);
            }
            (Goal::Terminate, Err(_)) => {
                effects.push(Effect::Arbiter(Ask::Release { to: None }));
                self.end(now, EXIT_TERMINATED, effects);
            }
            (Goal::Swap | Goal::SwapThenStop | Goal::Terminate, Ok(peer)) => {
                effects.push(Effect::Arbiter(Ask::Release { to: Some(peer.replica) }));
                self.released = true;
                self.phase = Phase::Leaving { goal, step: LeaveStep::Releasing { until: now + HAND_OVER_LIMIT } };
            }
            (Goal::Swap | Goal::SwapThenStop, Err(why)) => self.stay(&why, effects),
            (Goal::GiveUp, _) => {}
        }
    }

    // The arbiter's news.

    fn on_known(&mut self, now: Time, record: Record, ours: bool, effects: &mut Effects) {
        if self.record.as_ref().is_some_and(|known| !record.is_newer_than(known)) {
            return;
        }
        let could_take_over = self.is_in_sync();
        let was_in_sync = could_take_over || self.record.is_none();
        self.record = Some(record.clone());
        self.silent = false;
        // A change that was under way when the lease was given back leaves the release as it is.
        self.released &= self.is_holder_by_record() && !ours;
        self.handed_over = false;
        self.takeover_ordered = false;
        if self.is_in_sync() && !was_in_sync {
            // Made equal and flushed before the join was sent: what the marks stood for is over (PROTOCOL, section 1).
            (self.broken, self.erred, self.resync) = (false, None, None);
        }
        if self.other_in_sync().is_some() {
            self.resync = None;
        }
        let held_by_me = self.is_holder_by_record();
        if !held_by_me {
            // Another's turn: what went wrong here is no reason not to start when it is ours again.
            self.given_up = None;
            self.crashes.clear();
        }
        let to_data = Effect::Data(DataOrder::Record(record));
        match (&self.phase, held_by_me) {
            // A process that was started anew serves only by a round of its own (R1).
            (Phase::Waiting | Phase::Following, true) => self.phase = Phase::Following,
            (Phase::Waiting | Phase::Following, false) => {
                self.phase = Phase::Following;
                effects.push(to_data);
                self.note_record(effects);
                if self.is_in_sync() && !could_take_over {
                    effects.push(Effect::Vm(VmOrder::Define));
                }
            }
            (Phase::Proposing { .. }, true) if ours => {
                self.phase = Phase::Holding;
                (self.broken, self.in_force) = (false, false);
                effects.extend([Effect::Mark(Mark::Won), to_data, Effect::Data(DataOrder::Undrain)]);
                self.note_record(effects);
                if let Some(why) = self.erred.clone() {
                    // It failed while it was being asked for.
                    self.on_erred(now, why, effects);
                }
            }
            // It landed after all: others need not wait for this process to be gone.
            (Phase::Ending { .. }, true) if ours => effects.push(Effect::Arbiter(Ask::Release { to: None })),
            (Phase::Draining { .. } | Phase::Proposing { .. }, true) => {}
            (Phase::Draining { .. } | Phase::Proposing { .. }, false) => {
                self.phase = Phase::Following;
                effects.extend([to_data, Effect::Data(DataOrder::Undrain)]);
                self.note_record(effects);
            }
            (Phase::Holding | Phase::Leaving { .. }, true) => {
                effects.push(to_data);
                self.note_record(effects);
            }
            (Phase::Leaving { goal, step: LeaveStep::Releasing { .. } }, false) => {
                let goal = *goal;
                self.phase = Phase::Following;
                effects.push(to_data);
                self.note_record(effects);
                match goal {
                    Goal::SwapThenStop => self.end(now, EXIT_STOPPED, effects),
                    Goal::Terminate => self.end(now, EXIT_TERMINATED, effects),
                    Goal::Stop | Goal::Swap | Goal::GiveUp => self.answer_all(&Ok(()), effects),
                }
            }
            (Phase::Holding | Phase::Leaving { .. }, false) => self.depose(effects),
            (Phase::Clearing | Phase::Opening | Phase::Deposed | Phase::Ending { .. } | Phase::Over, _) => {}
        }
    }

    fn note_record(&self, effects: &mut Effects) {
        let Some(record) = &self.record else { return };
        let (node, peer) = (&self.settings.node, &self.settings.peer);
        let holder = self.holder_name().unwrap_or_default();
        let who = match (self.is_in_sync(), self.other_in_sync().is_some()) {
            (true, true) => format!("{node} and {peer} are in sync"),
            (true, false) => format!("only {node} is in sync"),
            (false, _) => format!("only {peer} is in sync"),
        };
        let level = if record.in_sync.len() > 1 { Level::Info } else { Level::Warn };
        note(effects, level, "record", format!("generation {}: {holder} holds, {who}", record.generation));
    }

    fn depose(&mut self, effects: &mut Effects) {
        let peer = self.settings.peer.clone();
        note(effects, Level::Error, "deposed", format!("{peer} became the holder: the VM here ends at once"));
        self.answer_all(&Err(failed(format!("{peer} became the holder meanwhile"))), effects);
        self.phase = Phase::Deposed;
        if self.vm_is_up() { self.kill(effects) } else { self.follow_after_deposal(effects) }
    }

    fn follow_after_deposal(&mut self, effects: &mut Effects) {
        self.phase = Phase::Following;
        effects.extend(self.record.clone().map(|record| Effect::Data(DataOrder::Record(record))));
        self.note_record(effects);
    }

    fn on_not_landed(&mut self, now: Time, effects: &mut Effects) {
        if matches!(self.phase, Phase::Proposing { .. }) {
            self.phase = Phase::Following;
            // The arbiter speaks of silence again where there still is some.
            self.silent = false;
            self.takeover_after = now + RETRY_TAKEOVER;
            effects.push(Effect::Data(DataOrder::Undrain));
            note(effects, Level::Info, "takeover-refused", "the other acceptors did not agree; tried again if need be");
        }
    }

    // The VM's news.

    fn kill(&mut self, effects: &mut Effects) {
        self.vm = Vm::Killing;
        self.paused_by_us = false;
        effects.push(Effect::Vm(VmOrder::Kill));
    }

    fn on_vm(&mut self, now: Time, news: VmNews, effects: &mut Effects) {
        match news {
            VmNews::StartCalled => effects.push(Effect::Mark(Mark::StartCalled)),
            // Late news of the VM before this one.
            VmNews::Off { .. } if self.phase == Phase::Holding && self.vm == Vm::Starting => {}
            VmNews::Off { by_itself } => {
                if !by_itself && self.vm == Vm::Stopping {
                    let text = "the guest did not power off in time: its VM was destroyed";
                    note(effects, Level::Warn, "vm-destroyed", text);
                }
                self.vm_is_down(now, effects);
            }
            VmNews::Ended(how) if self.phase == Phase::Holding && self.vm != Vm::Stopping && self.vm != Vm::Killing => {
                self.vm = Vm::Off;
                self.paused_by_us = false;
                self.vm_ended_unordered(now, how, effects);
            }
            VmNews::Ended(_) => self.vm_is_down(now, effects),
            VmNews::Running => self.on_vm_running(effects),
            VmNews::Paused { io_error } => {
                if matches!(self.vm, Vm::Starting | Vm::Running) {
                    self.vm = Vm::Paused { io_error };
                }
                if io_error {
                    note(effects, Level::Error, "vm-io-error", "the hypervisor paused the VM for a disk error");
                }
            }
            VmNews::Rebooted => note(effects, Level::Info, "vm-rebooted", "the guest rebooted"),
            VmNews::Dying => {
                // Only now may what the VM waits for fail: no error reaches a guest that lives.
                if self.vm == Vm::Killing {
                    self.fails_held = true;
                    effects.push(Effect::Data(DataOrder::FailHeld));
                }
            }
            VmNews::Failed { call, why } => self.on_vm_failed(now, call, why, effects),
            VmNews::Contact(up) => {
                if self.contact != up {
                    let (level, text) = if up {
                        (Level::Info, "the hypervisor's daemon answers again")
                    } else {
                        (Level::Warn, "no contact with the hypervisor's daemon; a running VM goes on")
                    };
                    note(effects, level, "hypervisor", text);
                }
                self.contact = up;
            }
        }
    }

    fn on_vm_running(&mut self, effects: &mut Effects) {
        match (&self.phase, self.vm) {
            (Phase::Holding, Vm::Off | Vm::Starting | Vm::Running | Vm::Paused { .. }) => {
                let began = self.vm == Vm::Starting;
                self.vm = Vm::Running;
                self.vm_trouble = None;
                if began {
                    effects.push(Effect::Mark(Mark::Started));
                    note(effects, Level::Info, "vm-running", format!("the VM runs on {}", self.settings.node));
                    self.restarting = false;
                    self.answer_all(&Ok(()), effects);
                }
                if self.paused_by_us {
                    effects.push(Effect::Vm(VmOrder::Pause));
                }
            }
            (Phase::Waiting | Phase::Following | Phase::Draining { .. } | Phase::Proposing { .. }, _) => {
                let text = format!("the VM was started on {}, which does not hold it: killed", self.settings.node);
                note(effects, Level::Error, "vm-not-allowed", text);
                self.kill(effects);
            }
            // Late news of a VM that is on its way down.
            _ => {}
        }
    }

    /// The VM is off, by our order or while one was on its way.
    fn vm_is_down(&mut self, now: Time, effects: &mut Effects) {
        self.vm = Vm::Off;
        self.paused_by_us = false;
        self.vm_trouble = None;
        self.vm_after = Time(0);
        if std::mem::take(&mut self.fails_held) && self.holds() {
            // The next VM's requests are not to fail for the sake of this one; a new record ends it anyway.
            effects.push(Effect::Data(DataOrder::Undrain));
        }
        match self.phase {
            Phase::Clearing => {
                self.phase = Phase::Opening;
                effects.push(Effect::Data(DataOrder::Open));
            }
            Phase::Deposed => self.follow_after_deposal(effects),
            Phase::Leaving { goal: Goal::GiveUp, step: LeaveStep::VmDown } => {
                effects.push(Effect::Arbiter(Ask::Release { to: None }));
                self.lease_until = Time(0);
                self.phase = Phase::Following;
            }
            Phase::Leaving { goal, step: LeaveStep::VmDown } => {
                let token = self.next_token();
                effects.push(Effect::Data(DataOrder::Quiesce(token)));
                self.phase = Phase::Leaving { goal, step: LeaveStep::Quiescing { token, until: now + QUIESCE_LIMIT } };
            }
            _ => {}
        }
    }

    fn vm_ended_unordered(&mut self, now: Time, how: VmEnd, effects: &mut Effects) {
        let module = self.settings.module.clone();
        match how {
            VmEnd::GuestShutdown if self.settings.restart_on_guest_shutdown => {
                note(effects, Level::Info, "guest-shutdown", "powered off from inside; onGuestShutdown=restart");
            }
            VmEnd::GuestShutdown => {
                note(effects, Level::Info, "guest-shutdown", "powered off from inside: the module stops on both nodes");
                self.leave(now, Goal::Stop, effects);
            }
            VmEnd::Destroyed | VmEnd::HostShutdown => {
                let by = if how == VmEnd::Destroyed { "destroyed" } else { "its process was asked to end" };
                let text = format!(
                    "the VM was stopped past vmtwin ({by}): the module stops on both nodes; `vmtwin start {module}`"
                );
                note(effects, Level::Warn, "vm-stopped-by-hand", text);
                self.leave(now, Goal::Stop, effects);
            }
            VmEnd::HostStops => {
                self.move_or_give_up(now, false, "its host is shutting down".to_owned(), effects);
            }
            VmEnd::Crashed => {
                note(effects, Level::Error, "vm-crashed", "the VM's process died or its guest panicked");
                self.count_crash(now, now, "crashed", effects);
            }
        }
    }

    /// One more of the few local restarts; the next one at `at`.
    fn count_crash(&mut self, now: Time, at: Time, what: &str, effects: &mut Effects) {
        self.crashes.retain(|when| now.since(*when) < CRASH_SPAN);
        self.crashes.push(now);
        self.vm_after = at;
        if self.crashes.len() > CRASHES_MAX {
            let tried = self.crashes_there.is_some_and(|at| now.since(at) < CRASHES_THERE_SPAN);
            let text = format!("the VM {what} {} times within 10 minutes", self.crashes.len());
            self.vm_after = Time(0);
            if !tried {
                effects.push(Effect::Data(DataOrder::Tell(Word::Crashes)));
            }
            self.move_or_give_up(now, tried, text, effects);
        }
    }

    /// The VM does not run here any more: the other node is to, if it can and has not `tried` before.
    fn move_or_give_up(&mut self, now: Time, tried: bool, why: String, effects: &mut Effects) {
        self.restarting = false;
        self.answer_all(&Err(failed(why.clone())), effects);
        // Also where nobody takes it over.
        self.given_up = Some(why.clone());
        let peer = self.settings.peer.clone();
        let ready = if tried { Err(format!("{peer} tried before")) } else { self.may_hand_over(now) };
        match ready {
            Ok(()) => {
                note(effects, Level::Warn, "vm-moved", format!("{why}: it goes to {peer}"));
                self.leave(now, Goal::Swap, effects);
            }
            Err(not) => {
                note(effects, Level::Error, "vm-given-up", format!("{why}: not started again, and not moved ({not})"));
            }
        }
    }

    fn on_vm_failed(&mut self, now: Time, call: VmCall, why: String, effects: &mut Effects) {
        note(effects, Level::Error, "hypervisor-failed", format!("{call:?}: {why}"));
        self.vm_trouble = Some(why.clone());
        match (call, &self.phase) {
            (VmCall::Start, Phase::Holding) if self.vm == Vm::Starting => {
                self.vm = Vm::Off;
                self.count_crash(now, now + RETRY, "failed to start", effects);
            }
            (VmCall::Shutdown, Phase::Leaving { .. }) => self.kill(effects),
            (VmCall::Shutdown, Phase::Holding) if self.vm == Vm::Stopping => {
                self.vm = Vm::Running;
                self.restarting = false;
                self.answer_all(&Err(failed(format!("the VM could not be stopped: {why}"))), effects);
            }
            (VmCall::Resume, Phase::Holding) => {
                self.paused_by_us = true;
                self.vm_after = now + RETRY;
            }
            (VmCall::Clear, _) => self.vm_after = now + RETRY,
            (VmCall::Pause, Phase::Holding) if self.paused_by_us => self.vm_after = now + RETRY,
            // Late news.
            _ => {}
        }
    }

    // Letting go.

    fn leave(&mut self, now: Time, goal: Goal, effects: &mut Effects) {
        if goal == Goal::Stop {
            effects.push(Effect::Data(DataOrder::Tell(Word::Stop)));
        }
        self.restarting = false;
        self.phase = Phase::Leaving { goal, step: LeaveStep::VmDown };
        let limit = if goal == Goal::Terminate {
            self.settings.stop_limit.min(TERMINATE_LIMIT)
        } else {
            self.settings.stop_limit
        };
        match self.vm {
            Vm::Off => self.vm_is_down(now, effects),
            // A guest whose I/O is held cannot power off.
            _ if self.paused_by_us => self.kill(effects),
            Vm::Starting | Vm::Running | Vm::Paused { .. } => self.shut_down(now, limit, effects),
            Vm::Stopping | Vm::Killing => {}
        }
    }

    fn shut_down(&mut self, now: Time, limit: Duration, effects: &mut Effects) {
        self.vm = Vm::Stopping;
        self.shutdown_until = now + limit + SHUTDOWN_SPARE;
        effects.push(Effect::Vm(VmOrder::Shutdown(limit)));
    }

    /// A swap that cannot go on before its release: this node stays the holder and starts the VM again.
    fn stay(&mut self, why: &str, effects: &mut Effects) {
        let text = format!("the VM stays on {}: {why}", self.settings.node);
        note(effects, Level::Error, "swap-failed", text.clone());
        effects.push(Effect::Data(DataOrder::Unquiesce));
        self.phase = Phase::Holding;
        self.answer_all(&Err(failed(text)), effects);
    }

    fn on_tick(&mut self, now: Time, effects: &mut Effects) {
        let vm_is_due = self.vm_after > Time(0) && self.vm_after <= now;
        if vm_is_due {
            self.vm_after = Time(0);
            match self.vm {
                _ if self.phase == Phase::Clearing => effects.push(Effect::Vm(VmOrder::Clear)),
                Vm::Killing => self.kill(effects),
                Vm::Starting | Vm::Running if self.paused_by_us && !self.lease_is_live(now) => {
                    effects.push(Effect::Vm(VmOrder::Pause));
                }
                _ => {}
            }
        }
        match self.phase {
            Phase::Leaving { step: LeaveStep::Quiescing { token, until }, .. } if until <= now => {
                self.on_quiesced(now, token, false, effects);
            }
            Phase::Leaving { goal: Goal::Terminate, step: LeaveStep::Releasing { until } } if until <= now => {
                self.end(now, EXIT_TERMINATED, effects);
            }
            Phase::Leaving { step: LeaveStep::Releasing { until }, .. } if until <= now => {
                // Only a change of our own takes a release back (section 3).
                let text = format!("{} did not take over; the VM stays on {}", self.settings.peer, self.settings.node);
                note(effects, Level::Error, "swap-failed", text.clone());
                self.answer_all(&Err(failed(text)), effects);
                self.begin_takeover(Cause::TakeBack, effects);
            }
            Phase::Ending { code, until, .. } if until <= now => {
                let why = self.end_trouble.clone().unwrap_or_else(|| "it did not answer".to_owned());
                let text = format!("not closed cleanly ({why}): the mount is dead until the next start clears it");
                note(effects, Level::Error, "stopped", text.clone());
                self.answer_all(&Err(failed(text)), effects);
                self.exit(code, effects);
            }
            Phase::Ending { code, until, again: Some(again) } if again <= now => {
                self.phase = Phase::Ending { code, until, again: None };
                effects.push(Effect::Data(DataOrder::End));
            }
            _ => {}
        }
    }

    fn on_terminate(&mut self, now: Time, effects: &mut Effects) {
        match self.phase {
            Phase::Clearing => self.exit(EXIT_TERMINATED, effects),
            Phase::Holding => self.leave(now, Goal::Terminate, effects),
            Phase::Leaving { goal: Goal::Swap, step } => {
                self.phase = Phase::Leaving { goal: Goal::Terminate, step };
            }
            Phase::Leaving { .. } | Phase::Deposed | Phase::Ending { .. } | Phase::Over => {}
            Phase::Opening | Phase::Waiting | Phase::Following | Phase::Draining { .. } | Phase::Proposing { .. } => {
                self.end(now, EXIT_TERMINATED, effects)
            }
        }
    }

    // Commands.

    fn on_command(&mut self, now: Time, id: u64, command: Command, effects: &mut Effects) {
        let done = match command {
            Command::Start => self.command_start(),
            Command::Stop { both } => self.command_stop(now, both, effects),
            Command::Swap => self.command_swap(now, effects),
            Command::Restart => self.command_restart(now, effects),
            Command::Prim => self.command_prim(),
            Command::Second => match self.phase {
                Phase::Following | Phase::Waiting => Ok(true),
                _ => self.command_swap(now, effects),
            },
        };
        match done {
            Ok(true) => effects.push(Effect::Answer(id, Ok(()))),
            Ok(false) => self.waiting.push(id),
            Err(refusal) => effects.push(Effect::Answer(id, Err(refusal))),
        }
    }

    fn busy(&self) -> Refusal {
        let module = &self.settings.module;
        forbidden(format!("{module} is in the middle of another change; see `vmtwin status {module}` and try again"))
    }

    fn not_holder(&self) -> Refusal {
        let (module, node) = (&self.settings.module, &self.settings.node);
        forbidden(match self.holder_name() {
            Some(holder) if holder != *node => format!("{holder} holds {module}, not {node}: ask there"),
            _ => format!("{module} does not run on {node}; see `vmtwin status {module}`"),
        })
    }

    fn command_start(&mut self) -> Result<bool, Refusal> {
        if matches!(self.phase, Phase::Leaving { .. } | Phase::Ending { .. }) || self.stopping_until.is_some() {
            return Err(self.busy());
        }
        if self.given_up.take().is_some() {
            self.crashes.clear();
            self.crashes_there = None;
        }
        Ok(true)
    }

    fn command_stop(&mut self, now: Time, both: bool, effects: &mut Effects) -> Result<bool, Refusal> {
        match self.phase {
            Phase::Clearing => {
                self.exit(EXIT_STOPPED, effects);
                Ok(true)
            }
            Phase::Holding if both => {
                self.leave(now, Goal::Stop, effects);
                Ok(false)
            }
            Phase::Holding => {
                let module = &self.settings.module;
                self.may_hand_over(now).map_err(|why| {
                    forbidden(format!("{why}. To stop {module} on both nodes: `vmtwin stop {module}`"))
                })?;
                self.leave(now, Goal::SwapThenStop, effects);
                Ok(false)
            }
            // The other node is told as well and takes nothing over: the swap could only fail.
            Phase::Leaving { goal: Goal::Swap | Goal::SwapThenStop, step } if both => {
                self.answer_all(&Err(failed("the module stops on both nodes instead".to_owned())), effects);
                effects.push(Effect::Data(DataOrder::Tell(Word::Stop)));
                match step {
                    LeaveStep::VmDown | LeaveStep::Quiescing { .. } => {
                        self.phase = Phase::Leaving { goal: Goal::Stop, step };
                    }
                    // Flushed on both and released.
                    LeaveStep::Releasing { .. } => self.end(now, EXIT_STOPPED, effects),
                }
                Ok(false)
            }
            Phase::Leaving { goal: Goal::Stop, .. } | Phase::Ending { .. } => Ok(false),
            Phase::Leaving { .. } | Phase::Deposed => Err(self.busy()),
            // The holder is told as well: it goes first, so that both disks end equal and in sync.
            Phase::Following if both && self.peer.is_some() && !self.is_holder_by_record() => {
                self.stopping_until.get_or_insert(now + self.settings.stop_limit + STOP_SPARE);
                Ok(false)
            }
            Phase::Opening
            | Phase::Waiting
            | Phase::Following
            | Phase::Draining { .. }
            | Phase::Proposing { .. }
            | Phase::Over => {
                self.end(now, EXIT_STOPPED, effects);
                Ok(false)
            }
        }
    }

    fn command_swap(&mut self, now: Time, effects: &mut Effects) -> Result<bool, Refusal> {
        match self.phase {
            Phase::Holding if self.restarting => Err(self.busy()),
            Phase::Holding => {
                self.may_hand_over(now).map_err(forbidden)?;
                self.leave(now, Goal::Swap, effects);
                Ok(false)
            }
            Phase::Leaving { .. } | Phase::Ending { .. } | Phase::Deposed => Err(self.busy()),
            _ => Err(self.not_holder()),
        }
    }

    fn command_restart(&mut self, now: Time, effects: &mut Effects) -> Result<bool, Refusal> {
        match (&self.phase, self.vm) {
            (Phase::Holding, _) if self.restarting || self.paused_by_us => Err(self.busy()),
            (Phase::Holding, Vm::Running | Vm::Paused { .. }) => {
                self.restarting = true;
                self.shut_down(now, self.settings.stop_limit, effects);
                Ok(false)
            }
            (Phase::Holding, _) => {
                self.given_up = None;
                self.crashes.clear();
                self.crashes_there = None;
                self.restarting = true;
                Ok(false)
            }
            (Phase::Leaving { .. } | Phase::Ending { .. } | Phase::Deposed, _) => Err(self.busy()),
            _ => Err(self.not_holder()),
        }
    }

    fn command_prim(&mut self) -> Result<bool, Refusal> {
        let (module, node, peer) = (&self.settings.module, &self.settings.node, &self.settings.peer);
        match self.phase {
            Phase::Holding => return self.command_start(),
            Phase::Draining { .. } | Phase::Proposing { .. } => return Ok(true),
            Phase::Waiting | Phase::Following => {}
            _ => return Err(self.busy()),
        }
        if self.record.is_none() {
            let why = "no majority of acceptors has answered, so nobody knows who may run it";
            return Err(forbidden(format!("{why}: bring the other node or the witness back")));
        }
        if let Some(why) = &self.erred {
            return Err(forbidden(format!(
                "the disk of {node} failed ({why}): it has to be resynced from {peer} first"
            )));
        }
        if !self.is_in_sync() {
            let holder = self.holder_name().unwrap_or(peer);
            return Err(forbidden(format!(
                "{node} has not got every write that {module} was answered: only {holder} may run it. Bring {holder} back"
            )));
        }
        if !self.is_holder_by_record() && !self.silent {
            return Err(forbidden(format!("{peer} holds {module} and lives: use `vmtwin swap {module}`")));
        }
        self.takeover_ordered = true;
        Ok(true)
    }
}
