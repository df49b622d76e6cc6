//! How a module stands, for people and scripts: SafeKit's state, its health, and, where that is not green, one sentence
//! for an admin at three in the morning: what is, why, and what to do.
use super::event::Progress;
use super::state::{Cause, Goal, Machine, Phase, Vm};
use crate::time::Time;

/// State of a module on one node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Not running.
    Stop,
    /// Waiting for up-to-date data or for a decision.
    Wait,
    /// Running the VM with a peer.
    Prim,
    /// Holding the replica.
    Second,
    /// Running the VM with no peer in sync.
    Alone,
}

/// Beside the state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Health {
    /// Not ready.
    Red,
    /// In transition.
    Magenta,
    /// Ready.
    Green,
}

/// What an operator sees.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct View {
    /// The state.
    pub state: State,
    /// Its health.
    pub health: Health,
    /// Why it is not green and what to do; empty when green.
    pub reason: String,
    /// Whether this node's replica is in sync, by the record it knows.
    pub in_sync: bool,
    /// Node that holds, by the record.
    pub holder: Option<String>,
    /// `off`, `starting`, `running`, `paused`, `stopping`, or `unknown`.
    pub vm: &'static str,
    /// What is worth knowing beside a green state, too.
    pub notes: Vec<String>,
}

impl Machine {
    /// How the module stands.
    #[must_use]
    pub fn view(&self, now: Time) -> View {
        let (state, health, reason) = match &self.phase {
            Phase::Clearing | Phase::Opening => self.view_beginning(),
            Phase::Waiting | Phase::Following => self.view_following(),
            Phase::Draining { cause, .. } | Phase::Proposing { cause } => self.view_proposing(*cause),
            Phase::Holding => self.view_holding(now),
            Phase::Leaving { goal, .. } => self.view_leaving(*goal),
            Phase::Deposed => self.view_deposed(),
            Phase::Ending { .. } => (
                State::Stop,
                Health::Magenta,
                match &self.end_trouble {
                    Some(why) => format!("The directory cannot be unmounted yet: {why}"),
                    None => "Unmounting; wait.".to_owned(),
                },
            ),
            Phase::Over => (State::Stop, Health::Red, "The module process is ending.".to_owned()),
        };
        View {
            state,
            health,
            reason,
            in_sync: self.is_in_sync(),
            holder: self.holder_name().map(str::to_owned),
            vm: self.vm_word(),
            notes: self.notes(),
        }
    }

    fn vm_word(&self) -> &'static str {
        match self.vm {
            _ if self.phase == Phase::Clearing => "unknown",
            Vm::Off => "off",
            Vm::Starting => "starting",
            Vm::Running if self.paused_by_us => "paused",
            Vm::Running => "running",
            Vm::Paused { .. } => "paused",
            Vm::Stopping | Vm::Killing => "stopping",
        }
    }

    fn notes(&self) -> Vec<String> {
        let (module, node, peer) = (&self.settings.module, &self.settings.node, &self.settings.peer);
        let mut notes = Vec::new();
        if self.phase == Phase::Holding && self.other_in_sync().is_none() {
            notes.push(match self.peer {
                Some(_) => format!("Only {node} has all data of {module}; {peer} is catching up."),
                None => format!(
                    "Only {node} has all data of {module}: if it is lost, {module} is. Bring {peer} back ({}).",
                    self.peer_down
                ),
            });
        }
        if !self.contact {
            notes.push(format!(
                "No contact with the hypervisor's daemon on {node}; a running VM goes on. Start libvirtd."
            ));
        }
        if !self.settings.failover {
            notes.push(format!("Failover is off: {module} is not taken over by itself."));
        }
        if let Some((answering, voters)) = self.reached
            && answering < voters
        {
            notes.push(format!("{answering} of {voters} acceptors answer; one more lost may stop {module}."));
        }
        notes
    }

    fn majority_missing(&self) -> Option<String> {
        let (answering, voters) = self.reached?;
        let module = &self.settings.module;
        (answering <= voters / 2).then(|| {
            format!(
                "Only {answering} of {voters} acceptors (both nodes and the witness) answer, so nobody may decide who runs \
                 {module}. Bring the other node or the witness back, or mend the network."
            )
        })
    }

    fn view_beginning(&self) -> (State, Health, String) {
        match &self.vm_trouble {
            Some(why) => {
                let node = &self.settings.node;
                let text = format!(
                    "Nobody knows whether an old VM still runs on {node}, as the hypervisor does not answer ({why}). \
                     Start libvirtd; this goes on by itself."
                );
                (State::Wait, Health::Red, text)
            }
            None => (State::Wait, Health::Magenta, "The replica is being opened and mounted; wait.".to_owned()),
        }
    }

    fn view_following(&self) -> (State, Health, String) {
        let (module, node, peer) = (&self.settings.module, &self.settings.node, &self.settings.peer);
        if self.vm == Vm::Killing {
            return (State::Wait, Health::Red, format!("A VM that may not run on {node} is being killed."));
        }
        if self.stopping_until.is_some() {
            return (State::Second, Health::Magenta, format!("{module} stops on both nodes; {node} waits for {peer}."));
        }
        if let Some(why) = &self.erred {
            let state = if self.is_holder_by_record() { State::Wait } else { State::Second };
            let text = match self.resync {
                Some(progress) => {
                    format!("Its disk failed ({why}); it is being copied from {peer}: {}.", percent(progress))
                }
                None => format!(
                    "The disk of {node} failed ({why}). Mend or replace it, then restart {module} here; {peer} has all data."
                ),
            };
            return (state, if self.resync.is_some() { Health::Magenta } else { Health::Red }, text);
        }
        let Some(_) = &self.record else {
            return match self.majority_missing() {
                Some(why) => (State::Wait, Health::Red, why),
                None => (State::Wait, Health::Magenta, "Asking the acceptors who may run it; wait.".to_owned()),
            };
        };
        let majority_missing = self.majority_missing();
        if self.is_holder_by_record() {
            return match majority_missing {
                Some(why) => (State::Wait, Health::Red, why),
                None if self.broken => {
                    let text = format!(
                        "{node} went down without a clean stop: it waits a moment whether {peer} has more, then starts {module}."
                    );
                    (State::Wait, Health::Magenta, text)
                }
                None => (State::Wait, Health::Magenta, format!("{node} is about to start {module}; wait.")),
            };
        }
        match (self.is_in_sync(), self.peer.is_some(), self.resync) {
            (true, true, _) if !self.silent => (State::Second, Health::Green, String::new()),
            (true, _, _) => match (majority_missing, self.silent) {
                (Some(why), _) => (State::Wait, Health::Red, why),
                (None, true) if !self.settings.failover => {
                    let text = format!(
                        "{peer} is silent, {node} has all data, and failover is off. To run {module} here: `vmtwin prim {module}`."
                    );
                    (State::Wait, Health::Red, text)
                }
                (None, true) => (
                    State::Second,
                    Health::Magenta,
                    format!("{peer} is silent; {node} is about to take {module} over."),
                ),
                (None, false) => {
                    let why = &self.peer_down;
                    (
                        State::Second,
                        Health::Magenta,
                        format!("No link to {peer} ({why}), which still holds {module}; wait."),
                    )
                }
            },
            (false, true, Some(progress)) => {
                (State::Second, Health::Magenta, format!("Catching up with {peer}: {}. Wait.", percent(progress)))
            }
            (false, true, None) => (
                State::Second,
                Health::Magenta,
                format!("{node} is out of date and about to catch up with {peer}; wait."),
            ),
            (false, false, _) => {
                let why = &self.peer_down;
                let text = format!(
                    "{node} has not got all of {module}'s data; {peer} has, but there is no link to it ({why}). \
                     Start {module} on {peer}, or mend the link."
                );
                (State::Wait, Health::Red, text)
            }
        }
    }

    fn view_proposing(&self, cause: Cause) -> (State, Health, String) {
        let (module, node, peer) = (&self.settings.module, &self.settings.node, &self.settings.peer);
        let text = match (self.majority_missing(), cause) {
            (Some(why), _) => return (State::Wait, Health::Red, why),
            (None, Cause::Own) => format!("{node} is about to start {module}; wait."),
            (None, Cause::Silent) => format!("{peer} is silent: {node} is taking {module} over; wait."),
            (None, Cause::HandedOver) => format!("{peer} hands {module} over to {node}; wait."),
            (None, Cause::TakeBack) => format!("{peer} did not take {module} over: {node} takes it back; wait."),
        };
        (State::Wait, Health::Magenta, text)
    }

    fn view_holding(&self, now: Time) -> (State, Health, String) {
        let (module, node, peer) = (&self.settings.module, &self.settings.node, &self.settings.peer);
        let state = if self.other_in_sync().is_some() { State::Prim } else { State::Alone };
        if let Some(why) = &self.given_up {
            let text = format!(
                "{node} does not start the VM again, as {why}. Look at `vmtwin log {module}` and the VM's console log, then \
                 `vmtwin start {module}`."
            );
            return (State::Stop, Health::Magenta, text);
        }
        if !self.lease_is_live(now) && self.lease_until == Time(0) && self.majority_missing().is_none() {
            return (state, Health::Magenta, format!("{node} holds {module} and asks for its lease; wait."));
        }
        if !self.lease_is_live(now) {
            let text = self.majority_missing().unwrap_or_else(|| "The lease is over and being asked for.".to_owned());
            return (state, Health::Red, format!("The VM's I/O is held and its CPUs stand. {text}"));
        }
        if let Some(why) = &self.erred {
            let text = format!(
                "The only up-to-date disk, that of {node}, failed ({why}): I/O is held. Mend it and restart {module}; \
                 nobody else has all data."
            );
            return (state, Health::Red, text);
        }
        match self.vm {
            Vm::Paused { io_error: true } => {
                let text = format!(
                    "The hypervisor paused the VM for a disk error. Look at `vmtwin log {module}`, then `virsh resume` or \
                     `vmtwin restart {module}`."
                );
                (state, Health::Red, text)
            }
            Vm::Paused { io_error: false } => (
                state,
                Health::Magenta,
                format!("The VM is paused, not by vmtwin. To go on: `virsh resume` on {node}."),
            ),
            Vm::Off | Vm::Starting => match &self.vm_trouble {
                Some(why) => {
                    let text = format!(
                        "The VM could not be started on {node} ({why}); tried again. See `vmtwin log {module}`."
                    );
                    (state, Health::Red, text)
                }
                None => (state, Health::Magenta, "The VM is being started; wait.".to_owned()),
            },
            Vm::Stopping | Vm::Killing => {
                (state, Health::Magenta, "The VM is being stopped, to be started again; wait.".to_owned())
            }
            Vm::Running => match (self.other_in_sync().is_some(), self.peer.is_some(), self.resync) {
                (true, false, _) => {
                    let why = &self.peer_down;
                    (state, Health::Magenta, format!("No link to {peer} ({why}); {node} is about to go on alone."))
                }
                (false, true, Some(progress)) => {
                    (state, Health::Magenta, format!("{peer} is catching up: {}. Wait.", percent(progress)))
                }
                _ => (state, Health::Green, String::new()),
            },
        }
    }

    fn view_leaving(&self, goal: Goal) -> (State, Health, String) {
        let (module, node, peer) = (&self.settings.module, &self.settings.node, &self.settings.peer);
        let state = if self.other_in_sync().is_some() { State::Prim } else { State::Alone };
        let text = match goal {
            Goal::Stop => format!("{module} stops on both nodes: VM down, then both disks flushed; wait."),
            Goal::Swap => format!("{module} goes to {peer}: VM down, both disks flushed, started there; wait."),
            Goal::SwapThenStop | Goal::Terminate => format!("{node} stops and lets {peer} go on with {module}; wait."),
            Goal::GiveUp => {
                let why = self.erred.as_deref().unwrap_or("an error");
                return (
                    state,
                    Health::Red,
                    format!("The disk of {node} failed ({why}): the VM ends here, {peer} takes over."),
                );
            }
        };
        (state, Health::Magenta, text)
    }

    fn view_deposed(&self) -> (State, Health, String) {
        let (module, node, peer) = (&self.settings.module, &self.settings.node, &self.settings.peer);
        match &self.vm_trouble {
            Some(why) => {
                let text = format!(
                    "{peer} runs {module}, and the old VM on {node} could not be killed ({why}); its I/O is refused. Kill its \
                     QEMU process, or restart {node}."
                );
                (State::Wait, Health::Red, text)
            }
            None => (
                State::Wait,
                Health::Magenta,
                format!("{peer} became the holder: the old VM on {node} is being killed."),
            ),
        }
    }
}

fn percent(progress: Progress) -> String {
    let done = progress.done.min(progress.total);
    let percent = if progress.total == 0 { 0 } else { u128::from(done) * 100 / u128::from(progress.total) };
    format!("{percent}% of {} MiB", progress.total >> 20)
}
