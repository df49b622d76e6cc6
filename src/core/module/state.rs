//! What the module machine knows, and what follows from it without any change: who may do what, until when.
use super::event::{Peer, Progress, Refusal};
use crate::ids::ReplicaId;
use crate::limits::{LEASE_MS, TAKEOVER_MS};
use crate::record::Record;
use crate::time::{Time, millis};
use std::time::Duration;

/// Local restarts of a VM that crashed, within `CRASH_SPAN`, before the other node tries it; if that did, it is given up.
pub const CRASHES_MAX: usize = 3;
/// Crashes older than this are forgotten.
pub const CRASH_SPAN: Duration = Duration::from_secs(600);
/// The other node's word that the VM crashed there counts this long: its crashes may span one `CRASH_SPAN`, ours another.
pub const CRASHES_THERE_SPAN: Duration = Duration::from_secs(1200);
/// A VM that is being shut down when the lease ends gets this much longer: nobody takes over before, and a power cut costs
/// its guest more than a pause would.
pub const STOP_WITHOUT_LEASE: Duration = millis((TAKEOVER_MS - LEASE_MS) / 2);
/// A call that shuts a VM down destroys it when its limit is over. One that is not back this much later hangs, as with I/O
/// that a disk does not answer: the VM is killed past it.
pub const SHUTDOWN_SPARE: Duration = Duration::from_secs(15);
/// A call to the hypervisor that failed, and a proposal that did not land, are tried again after this long.
pub const RETRY: Duration = Duration::from_secs(2);
/// A node whose process has just begun leaves the last holder this time to begin, too: both are started by one command, or
/// after one power cut, and the VM belongs where it was.
pub const START_GRACE: Duration = millis(TAKEOVER_MS + 1200);
/// A takeover that did not land is tried again after this long.
pub const RETRY_TAKEOVER: Duration = Duration::from_millis(500);
/// Longest wait for both disks to flush before a hand-over or a stop.
pub const QUIESCE_LIMIT: Duration = Duration::from_secs(30);
/// Longest wait for the other node to take what was handed over, before it is taken back.
pub const HAND_OVER_LIMIT: Duration = Duration::from_secs(10);
/// Longest wait for the data thread to close.
pub const END_LIMIT: Duration = Duration::from_secs(30);
/// A node that was told of a stop ends this long after the VM's own limit, whatever the holder does.
pub const STOP_SPARE: Duration = Duration::from_secs(60);
/// At SIGTERM a graceful stop of the VM gets at most this.
pub const TERMINATE_LIMIT: Duration = Duration::from_secs(60);

/// Exit code: stopped as ordered; the module is no longer wanted on this node.
pub const EXIT_STOPPED: u8 = 0;
/// Exit code: something failed; the daemon starts the process again.
pub const EXIT_FAILED: u8 = 1;
/// Exit code: ended by SIGTERM; still wanted at the next boot.
pub const EXIT_TERMINATED: u8 = 143;

/// What the configuration says. Names are for sentences only.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// The module.
    pub module: String,
    /// This node.
    pub node: String,
    /// The other node.
    pub peer: String,
    /// Whether this node takes over by itself.
    pub failover: bool,
    /// A VM that was powered off from inside is started again, instead of stopping the module.
    pub restart_on_guest_shutdown: bool,
    /// A graceful stop of the VM may take this long.
    pub stop_limit: Duration,
}

/// Why this node proposes itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Cause {
    /// It is the holder by the record, its process is a new one.
    Own,
    /// The holder is silent.
    Silent,
    /// The holder released to us.
    HandedOver,
    /// Nobody took what we released.
    TakeBack,
}

/// Why a holder lets go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Goal {
    /// The module stops on both nodes.
    Stop,
    /// The VM goes to the other node.
    Swap,
    /// It does, and this node stops then.
    SwapThenStop,
    /// SIGTERM.
    Terminate,
    /// This disk failed.
    GiveUp,
}

/// How far it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum LeaveStep {
    /// The VM is being stopped.
    VmDown,
    /// Both sides flush.
    Quiescing { token: u64, until: Time },
    /// The release is out: this node serves nothing until it has read the register.
    Releasing { until: Time },
}

/// See the picture at the module's head.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// A VM that a dead process of ours left behind is ended before anything else.
    Clearing,
    /// The data thread opens the directory.
    Opening,
    /// No record is known.
    Waiting,
    /// A record is known, and this process does not hold.
    Following,
    /// R7, before a proposal of our own.
    Draining { token: u64, cause: Cause },
    /// Proposed; nothing is admitted until the outcome is known.
    Proposing { cause: Cause },
    /// The holder, by a record that this process won.
    Holding,
    /// The holder, on its way out.
    Leaving { goal: Goal, step: LeaveStep },
    /// Another is the holder, our VM is being killed.
    Deposed,
    /// The data thread closes; the order is given again where the mount was in use.
    Ending { code: u8, until: Time, again: Option<Time> },
    /// `Exit` is out.
    Over,
}

/// How the VM stands here, as far as was heard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Vm {
    Off,
    Starting,
    Running,
    Paused { io_error: bool },
    Stopping,
    Killing,
}

/// The module machine of one node. `step` and `view` are its face.
#[derive(Clone, Debug)]
pub struct Machine {
    pub(super) settings: Settings,
    pub(super) phase: Phase,
    pub(super) me: Option<ReplicaId>,
    pub(super) broken: bool,
    pub(super) erred: Option<String>,
    pub(super) record: Option<Record>,
    /// The data thread serves by the record that was won: before that, the VM's files could not be opened for writing.
    pub(super) in_force: bool,
    /// When the replica was opened.
    pub(super) ready_at: Time,
    pub(super) lease_until: Time,
    /// R3, R9: acceptors that answer, of how many.
    pub(super) reached: Option<(usize, usize)>,
    /// The arbiter calls the holder silent.
    pub(super) silent: bool,
    /// What this process holds was released to the peer, and only a change of our own takes that back.
    pub(super) released: bool,
    pub(super) handed_over: bool,
    /// By hand (`prim`): no wait, and against `failover off`; until the next record.
    pub(super) takeover_ordered: bool,
    /// No takeover before this.
    pub(super) takeover_after: Time,
    pub(super) peer: Option<Peer>,
    pub(super) peer_down: String,
    pub(super) resync: Option<Progress>,
    pub(super) vm: Vm,
    /// When a VM that is being stopped is killed.
    pub(super) shutdown_until: Time,
    /// The VM is paused by us, for the lease.
    pub(super) paused_by_us: bool,
    pub(super) contact: bool,
    /// The last failure of a call to the hypervisor, until one works.
    pub(super) vm_trouble: Option<String>,
    /// No call is repeated before this.
    pub(super) vm_after: Time,
    pub(super) restarting: bool,
    pub(super) crashes: Vec<Time>,
    /// When the other node said that the VM crashed there too often.
    pub(super) crashes_there: Option<Time>,
    /// The data thread was told to fail what the VM waits for.
    pub(super) fails_held: bool,
    /// Why the VM is not started again.
    pub(super) given_up: Option<String>,
    /// The module stops on both nodes, and this one follows: until when it waits for the holder.
    pub(super) stopping_until: Option<Time>,
    /// Why the directory could not be unmounted yet.
    pub(super) end_trouble: Option<String>,
    /// Commands whose answer waits for what is under way.
    pub(super) waiting: Vec<u64>,
    pub(super) token: u64,
}

impl Machine {
    /// A process that has just begun. Send it `Begin`.
    #[must_use]
    pub fn new(settings: Settings) -> Self {
        Self {
            settings,
            phase: Phase::Clearing,
            me: None,
            broken: false,
            erred: None,
            record: None,
            in_force: false,
            ready_at: Time(0),
            lease_until: Time(0),
            reached: None,
            silent: false,
            released: false,
            handed_over: false,
            takeover_ordered: false,
            takeover_after: Time(0),
            peer: None,
            peer_down: "no link yet".to_owned(),
            resync: None,
            vm: Vm::Off,
            shutdown_until: Time(0),
            paused_by_us: false,
            contact: true,
            vm_trouble: None,
            vm_after: Time(0),
            restarting: false,
            crashes: Vec::new(),
            crashes_there: None,
            fails_held: false,
            given_up: None,
            stopping_until: None,
            end_trouble: None,
            waiting: Vec::new(),
            token: 0,
        }
    }

    /// The record that is known.
    #[must_use]
    pub fn record(&self) -> Option<&Record> {
        self.record.as_ref()
    }

    /// Whether this process holds: it may change the in-sync set and run the VM.
    #[must_use]
    pub fn holds(&self) -> bool {
        matches!(self.phase, Phase::Holding | Phase::Leaving { .. })
    }

    /// R4: whether this replica's host went down without a clean stop, and it was not made equal since.
    #[must_use]
    pub fn is_broken(&self) -> bool {
        self.broken
    }

    /// Whether a session with the peer stands.
    #[must_use]
    pub fn has_peer(&self) -> bool {
        self.peer.is_some()
    }

    /// Whether one side is being brought up to date.
    #[must_use]
    pub fn is_resyncing(&self) -> bool {
        self.resync.is_some()
    }

    /// Whether `Exit` was given.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.phase == Phase::Over
    }

    /// For the hypervisor's hook: whether the VM may start here now.
    ///
    /// # Errors
    /// The sentence that the hook prints.
    pub fn may_start(&self, now: Time) -> Result<(), String> {
        let (module, node) = (&self.settings.module, &self.settings.node);
        match self.phase {
            Phase::Holding if self.given_up.is_some() => {
                Err(format!("{module} was given up here; use `vmtwin start {module}`"))
            }
            Phase::Holding if self.lease_is_live(now) && self.in_force => Ok(()),
            Phase::Holding if !self.in_force => {
                Err(format!("{node} has just become the holder of {module}: try again"))
            }
            Phase::Holding => Err(format!("{node} holds {module}, but reaches no majority now; see `vmtwin status`")),
            _ => match self.holder_name() {
                Some(holder) if holder != *node => {
                    Err(format!("{module} is held by {holder}: start it there, or use `vmtwin swap {module}`"))
                }
                _ => Err(format!("{node} may not run {module} now; see `vmtwin status {module}`")),
            },
        }
    }

    /// When `Tick` is due, if ever. What was due is no more after it: a loop that waits for it never turns on the spot.
    #[must_use]
    pub fn deadline(&self) -> Option<Time> {
        if self.is_over() {
            return None;
        }
        let phase = match self.phase {
            Phase::Leaving { step: LeaveStep::Quiescing { until, .. } | LeaveStep::Releasing { until }, .. }
            | Phase::Ending { until, again: None, .. } => Some(until),
            Phase::Ending { until, again: Some(again), .. } => Some(until.min(again)),
            _ => None,
        };
        let lease = match self.vm {
            Vm::Starting | Vm::Running if self.phase == Phase::Holding && !self.paused_by_us => Some(self.lease_until),
            Vm::Stopping if self.holds() => Some(self.kill_at()),
            _ => None,
        };
        let stop = self.stopping_until.filter(|_| matches!(self.phase, Phase::Waiting | Phase::Following));
        // A VM that is to be started, killed, paused or resumed again after a failed call.
        let vm = (self.vm_after > Time(0)).then_some(self.vm_after);
        let takeover = self.takeover_due().map(|(at, _)| at);
        [phase, lease, vm, takeover, stop].into_iter().flatten().min()
    }

    pub(super) fn lease_is_live(&self, now: Time) -> bool {
        now < self.lease_until
    }

    /// When a VM that is powering off has to be gone.
    pub(super) fn kill_at(&self) -> Time {
        self.shutdown_until.min(self.lease_until + STOP_WITHOUT_LEASE)
    }

    pub(super) fn vm_is_up(&self) -> bool {
        self.vm != Vm::Off
    }

    pub(super) fn is_in_sync(&self) -> bool {
        matches!((&self.record, self.me), (Some(record), Some(me)) if record.is_in_sync(me))
    }

    pub(super) fn is_holder_by_record(&self) -> bool {
        matches!((&self.record, self.me), (Some(record), Some(me)) if record.holder == me)
    }

    /// The other replica, if the record has it in sync.
    #[must_use]
    pub fn other_in_sync(&self) -> Option<ReplicaId> {
        self.record.as_ref()?.in_sync.iter().copied().find(|r| Some(*r) != self.me)
    }

    pub(super) fn holder_name(&self) -> Option<&str> {
        self.record.as_ref()?;
        Some(if self.is_holder_by_record() { &self.settings.node } else { &self.settings.peer })
    }

    /// When and why this node would propose itself, as things stand. Whether it may is proved by the register (R4): the
    /// arbiter writes back what it finds where this node is not in sync.
    pub(super) fn takeover_due(&self) -> Option<(Time, Cause)> {
        let may = matches!(self.phase, Phase::Waiting | Phase::Following)
            && self.erred.is_none()
            && self.stopping_until.is_none();
        let cause = match self.silent {
            _ if !may => return None,
            _ if self.is_holder_by_record() && self.released => Cause::TakeBack,
            // An unbroken in-sync node goes first (R4): a broken one waits until the arbiter calls the holder silent.
            silent if self.is_holder_by_record() && (silent || !self.broken || self.takeover_ordered) => Cause::Own,
            _ if self.handed_over => Cause::HandedOver,
            true if self.settings.failover || self.takeover_ordered => Cause::Silent,
            _ => return None,
        };
        if cause == Cause::Silent && !self.takeover_ordered {
            return Some((self.takeover_after.max(self.ready_at + START_GRACE), cause));
        }
        Some((self.takeover_after, cause))
    }

    /// Whether the VM could go to the peer now.
    ///
    /// # Errors
    /// Why not, and what to do.
    pub(super) fn peer_ready(&self) -> Result<Peer, String> {
        let (module, other) = (&self.settings.module, &self.settings.peer);
        let Some(peer) = self.peer else {
            let why = &self.peer_down;
            return Err(format!("no link to {other} ({why}): start {module} there and wait until it is in sync"));
        };
        if Some(peer.replica) != self.other_in_sync() || peer.erred {
            return Err(format!("{other} is not in sync yet: wait until `vmtwin status {module}` shows PRIM green"));
        }
        Ok(peer)
    }

    /// Whether it could go there and somebody could decide so.
    ///
    /// # Errors
    /// Why not, and what to do.
    pub(super) fn may_hand_over(&self, now: Time) -> Result<(), String> {
        self.peer_ready()?;
        if self.lease_is_live(now) {
            Ok(())
        } else {
            Err("no majority of acceptors answers; a swap needs one".to_owned())
        }
    }

    pub(super) fn next_token(&mut self) -> u64 {
        self.token += 1;
        self.token
    }
}

/// A refusal because of the state.
pub(super) fn forbidden(error: String) -> Refusal {
    Refusal { code: 3, error }
}

/// Something was tried and failed.
pub(super) fn failed(error: String) -> Refusal {
    Refusal { code: 1, error }
}
