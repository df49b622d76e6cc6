//! When a VM is ended from outside, because the module process that should do it cannot (R1).
//!
//! Decides: whether a holder's process has been silent for too long. Holds: when it last asked for anything, for how long
//! the guardian itself has heard nothing since. Keeps out: processes, signals, the clock.
//! Heard ─asked─> Heard;  Heard ─silent beyond the limit for what is known of the process─> the VM is ended
//! Invariant: only silence that the guardian was awake for counts, so a pause of the whole host makes nobody guilty; a
//! VM that began after its holder had fallen silent is not of that reign.
use crate::limits::{GUARD_LOOK_MS, GUARD_PASSED_MS, GUARD_SILENT_MS, GUARD_STOPPED_MS};
use crate::record::RecordName;
use crate::time::{Time, millis};
use std::time::Duration;

/// What the kernel says of a module process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Process {
    /// Running, sleeping or waiting for a disk: it may go on by itself.
    Runs,
    /// By a signal or a tracer: it does not.
    Stopped,
    /// It has ended.
    Gone,
}

/// What is looked up only where a process has been silent.
#[derive(Clone, Copy, Debug)]
pub struct Facts {
    /// Its state.
    pub process: Process,
    /// The record that this node's acceptor has accepted, where it can be asked now.
    pub accepted: Option<RecordName>,
}

/// Watches one process that renews a lease.
#[derive(Clone, Debug)]
pub struct Guardian {
    record: RecordName,
    asked: Time,
    looked: Time,
    quiet: Duration,
}

impl Guardian {
    /// Its first renewal was heard.
    #[must_use]
    pub fn new(now: Time, record: RecordName) -> Self {
        Self { record, asked: now, looked: now, quiet: Duration::ZERO }
    }

    /// It asked for its grant under this record.
    pub fn renewed(&mut self, now: Time, record: RecordName) {
        self.record = record;
        self.asked(now);
    }

    /// It asked for anything: its loop runs, and does itself what a lost lease calls for.
    pub fn asked(&mut self, now: Time) {
        (self.asked, self.looked, self.quiet) = (now, now, Duration::ZERO);
    }

    /// The record under which it asked last.
    #[must_use]
    pub fn record(&self) -> RecordName {
        self.record
    }

    /// When it asked for anything, last.
    #[must_use]
    pub fn last_asked(&self) -> Time {
        self.asked
    }

    /// For how long it has been silent, as far as that counts.
    #[must_use]
    pub fn quiet(&self) -> Duration {
        self.quiet
    }

    /// Whether a VM that began at this time is of the reign that is watched.
    #[must_use]
    pub fn is_of_this_reign(&self, began: Time) -> bool {
        began <= self.asked
    }

    /// To be called every `GUARD_LOOK_MS`. True: end the VM, now.
    pub fn look(&mut self, now: Time, facts: impl FnOnce() -> Facts) -> bool {
        self.quiet += now.since(self.looked).min(millis(2 * GUARD_LOOK_MS));
        self.looked = now;
        if self.quiet < millis(GUARD_STOPPED_MS) {
            return false;
        }
        let Facts { process, accepted } = facts();
        let passed = |by: RecordName| (by.epoch, by.generation) > (self.record.epoch, self.record.generation);
        let limit = match process {
            Process::Stopped | Process::Gone => GUARD_STOPPED_MS,
            Process::Runs if accepted.is_some_and(passed) => GUARD_PASSED_MS,
            Process::Runs => GUARD_SILENT_MS,
        };
        self.quiet >= millis(limit)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::{Epoch, Generation, RecordId};
    use crate::limits::{LEASE_MS, RENEW_MS, TAKEOVER_MS};

    const START: Time = Time(50_000_000_000);

    #[test]
    fn a_stopped_or_dead_holders_vm_is_ended_after_its_lease_and_before_anybody_takes_over() {
        for process in [Process::Stopped, Process::Gone] {
            let ended = acts_after(process, None).unwrap();
            assert!((LEASE_MS..TAKEOVER_MS).contains(&ended), "{ended} ms");
        }
    }

    #[test]
    fn a_process_that_runs_gets_a_grace_and_a_longer_one_while_nobody_else_is_seen_to_go_on() {
        let passed = acts_after(Process::Runs, Some(name(5))).unwrap();
        assert!((LEASE_MS + 2000..GUARD_SILENT_MS).contains(&passed), "{passed} ms");
        for accepted in [None, Some(name(4)), Some(name(3))] {
            assert!(acts_after(Process::Runs, accepted).unwrap() >= GUARD_SILENT_MS);
        }
    }

    #[test]
    fn whoever_asks_is_let_be_with_or_without_a_lease() {
        let mut guardian = Guardian::new(START, name(4));
        for ms in (0..60_000).step_by(100) {
            let now = START + millis(ms);
            if ms % RENEW_MS == 0 {
                guardian.asked(now);
            }
            assert!(!guardian.look(now, || unreachable!("nothing is looked up of a process that asks")));
        }
    }

    #[test]
    fn a_pause_of_the_whole_host_makes_nobody_guilty() {
        let mut guardian = Guardian::new(START, name(4));
        let woken = START + Duration::from_secs(3600);
        assert!(!guardian.look(woken, || unreachable!("the guardian slept, too")));
        assert!(!guardian.look(woken + millis(100), || unreachable!("the module has no time to ask")));
        // One that does not ask then either, is.
        let mut now = woken + millis(100);
        while !guardian.look(now, || Facts { process: Process::Stopped, accepted: None }) {
            now = now + millis(GUARD_LOOK_MS);
        }
        assert!(now.since(woken) >= millis(LEASE_MS));
    }

    #[test]
    fn a_vm_that_began_after_the_silence_is_not_of_that_reign() {
        let mut guardian = Guardian::new(START, name(4));
        guardian.renewed(START + millis(300), name(5));
        assert_eq!(guardian.record(), name(5));
        assert!(guardian.is_of_this_reign(START + millis(299)));
        assert!(!guardian.is_of_this_reign(START + millis(310)));
    }

    /// Milliseconds of silence after which it acts.
    fn acts_after(process: Process, accepted: Option<RecordName>) -> Option<u64> {
        let mut guardian = Guardian::new(START, name(4));
        (0..60_000).step_by(100).find(|ms| guardian.look(START + millis(*ms), || Facts { process, accepted }))
    }

    fn name(generation: u64) -> RecordName {
        RecordName { epoch: Epoch(1), generation: Generation(generation), id: RecordId(generation.into()) }
    }
}
