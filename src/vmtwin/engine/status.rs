//! Fills the status that operators and scripts see from what the machine and the threads said.
use super::messages::{Figures, ResyncProgress};
use super::verify::Verifications;
use crate::api::types::{FiguresStatus, Health, ModuleStatus, ResyncStatus, State, TakeoverTimes};
use vmtwin_core::module::{self, Machine, Settings};
use vmtwin_core::time::{Time, millis};

/// A resync's rate is measured over this span at least.
const RATE_SPAN: std::time::Duration = millis(1_000);

/// What is kept for the status only: nothing is decided by it.
#[derive(Debug, Default)]
pub struct Watched {
    /// The data thread's last figures.
    pub figures: Figures,
    /// The last takeover here.
    pub times: TakeoverTimes,
    /// The last state that was logged.
    pub last_view: Option<(module::State, module::Health)>,
    /// Verifications.
    pub verify: Verifications,
    resync: Option<Resync>,
}

#[derive(Clone, Copy, Debug)]
struct Resync {
    progress: ResyncProgress,
    /// Where and when the span began that the rate is measured over.
    from: (Time, u64),
    rate: u64,
}

impl Watched {
    /// How far the resync is, or that there is none.
    pub fn resync(&mut self, now: Time, progress: Option<ResyncProgress>) {
        self.resync = progress.map(|progress| {
            let begun = Resync { progress, from: (now, progress.bytes_done), rate: 0 };
            let Some(mut last) = self.resync.filter(|last| last.progress.bytes_done <= progress.bytes_done) else {
                return begun;
            };
            last.progress = progress;
            let span = now.since(last.from.0);
            if span >= RATE_SPAN {
                let bytes = u128::from(progress.bytes_done - last.from.1);
                last.rate = u64::try_from(bytes * 1_000_000_000 / span.as_nanos()).unwrap_or(u64::MAX);
                last.from = (now, progress.bytes_done);
            }
            last
        });
    }

    fn resync_status(&self, machine: &Machine) -> Option<ResyncStatus> {
        let resync = self.resync.filter(|_| machine.is_resyncing())?;
        let left = resync.progress.bytes_total.saturating_sub(resync.progress.bytes_done);
        Some(ResyncStatus {
            bytes_total: resync.progress.bytes_total,
            bytes_done: resync.progress.bytes_done,
            bytes_sent: resync.progress.bytes_sent,
            rate: resync.rate,
            seconds_left: (resync.rate > 0).then(|| left.div_ceil(resync.rate)),
        })
    }

    /// The whole status. `voters_missing`: why not even this node's own acceptor can be asked.
    #[must_use]
    pub fn status(
        &self,
        now: Time,
        machine: &Machine,
        settings: &Settings,
        link_protection: &str,
        voters_missing: Option<&String>,
    ) -> ModuleStatus {
        let view = machine.view(now);
        let record = machine.record();
        let mut reason = view.reason;
        let mut health = match view.health {
            module::Health::Red => Health::Red,
            module::Health::Magenta => Health::Magenta,
            module::Health::Green => Health::Green,
        };
        if let Some(why) = voters_missing {
            health = Health::Red;
            reason =
                format!("This node's own acceptor (`vmtwin keep`) does not answer: {why}. Is vmtwin.service running?");
        }
        let figures = self.figures;
        ModuleStatus {
            module: settings.module.clone(),
            node: settings.node.clone(),
            state: match view.state {
                module::State::Stop => State::Stop,
                module::State::Wait => State::Wait,
                module::State::Prim => State::Prim,
                module::State::Second => State::Second,
                module::State::Alone => State::Alone,
            },
            health,
            reason,
            in_sync: view.in_sync,
            holder: view.holder,
            epoch: record.map_or(0, |r| r.epoch.0),
            generation: record.map_or(0, |r| r.generation.0),
            vm: view.vm.to_owned(),
            link: if machine.has_peer() { "up" } else { "down" }.to_owned(),
            link_protection: link_protection.to_owned(),
            resync: self.resync_status(machine),
            verify: self.verify.running(),
            verified: self.verify.ended.clone(),
            proved_equal: self.verify.proved_equal.clone(),
            notes: view.notes,
            figures: FiguresStatus {
                reads: figures.reads,
                writes: figures.writes,
                flushes: figures.flushes,
                read_bytes: figures.read_bytes,
                written_bytes: figures.written_bytes,
                dirty_bytes: figures.dirty_bytes,
            },
            process: Some(std::process::id()),
            last_takeover: (self.times.detected_ms > 0).then_some(self.times),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_left_follows_from_bytes_and_the_rate_of_late() {
        let mut watched = Watched::default();
        let at = |ms: u64| Time::from_millis(10_000 + ms);
        let progress = |done: u64| Some(ResyncProgress { bytes_total: 1000, bytes_done: done, ..Default::default() });
        for (ms, done) in [(0, 0), (200, 10), (1000, 100), (1200, 190), (2000, 500)] {
            watched.resync(at(ms), progress(done));
        }
        let resync = watched.resync.unwrap();
        assert_eq!(resync.rate, 400, "bytes per second in the last whole second");
        // A pass that begins again begins its measure again.
        watched.resync(at(2200), progress(0));
        assert_eq!(watched.resync.unwrap().rate, 0);
        watched.resync(at(2300), None);
        assert!(watched.resync.is_none());
    }
}
