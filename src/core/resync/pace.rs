//! How long a resync will still take, by the bytes of the last seconds.
//!
//! Holds: a few samples of how far it was when. Keeps out: the clock.
//! Invariant: never a number where nothing moved.
use super::event::Progress;
use crate::time::Time;
use std::collections::VecDeque;
use std::time::Duration;

/// Samples are kept this long.
const WINDOW: Duration = Duration::from_secs(20);
/// And taken this far apart, at least.
const STEP: Duration = Duration::from_millis(500);

/// Watches a resync's progress.
#[derive(Clone, Debug, Default)]
pub struct Pace {
    samples: VecDeque<(Time, u64)>,
}

impl Pace {
    /// Takes note of how far it is now.
    pub fn note(&mut self, now: Time, progress: Progress) {
        if self.samples.back().is_some_and(|(at, done)| progress.bytes_done < *done || now < *at) {
            self.samples.clear();
        }
        if self.samples.back().is_none_or(|(at, _)| now.since(*at) >= STEP) {
            self.samples.push_back((now, progress.bytes_done));
        }
        while self.samples.len() > 1 && self.samples.front().is_some_and(|(at, _)| now.since(*at) > WINDOW) {
            self.samples.pop_front();
        }
    }

    /// Bytes looked at per second lately; `None` before the second sample.
    #[must_use]
    pub fn bytes_per_second(&self, now: Time, progress: Progress) -> Option<u64> {
        let (at, done) = self.samples.front()?;
        let millis = now.since(*at).as_millis();
        if millis == 0 {
            return None;
        }
        let moved = u128::from(progress.bytes_done.saturating_sub(*done));
        Some(u64::try_from(moved * 1000 / millis).unwrap_or(u64::MAX))
    }

    /// Time left at that rate; `None` where it is not known, or nothing moves.
    #[must_use]
    pub fn time_left(&self, now: Time, progress: Progress) -> Option<Duration> {
        let left = progress.bytes_total.saturating_sub(progress.bytes_done);
        if left == 0 {
            return Some(Duration::ZERO);
        }
        let rate = self.bytes_per_second(now, progress).filter(|rate| *rate > 0)?;
        Some(Duration::from_millis(u64::try_from(u128::from(left) * 1000 / u128::from(rate)).unwrap_or(u64::MAX)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(ms: u64) -> Time {
        Time::from_millis(ms)
    }
    fn progress(done: u64) -> Progress {
        Progress { bytes_total: 1_000_000, bytes_done: done, bytes_sent: 0 }
    }

    #[test]
    fn time_left_follows_from_the_bytes_of_the_last_seconds() {
        let mut pace = Pace::default();
        assert_eq!(pace.time_left(at(0), progress(0)), None);
        pace.note(at(0), progress(0));
        pace.note(at(1000), progress(100_000));
        assert_eq!(pace.bytes_per_second(at(1000), progress(100_000)), Some(100_000));
        assert_eq!(pace.time_left(at(1000), progress(100_000)), Some(Duration::from_secs(9)));
        // A slow end counts, the quick beginning is forgotten.
        for second in 2..=60 {
            pace.note(at(second * 1000), progress(100_000 + second * 1000));
        }
        assert_eq!(pace.bytes_per_second(at(60_000), progress(160_000)), Some(1000));
        assert_eq!(pace.time_left(at(60_000), progress(160_000)), Some(Duration::from_secs(840)));
    }

    #[test]
    fn nothing_that_moves_gives_no_number_and_the_end_gives_zero() {
        let mut pace = Pace::default();
        pace.note(at(0), progress(5));
        pace.note(at(5000), progress(5));
        assert_eq!(pace.time_left(at(5000), progress(5)), None);
        assert_eq!(pace.time_left(at(5000), progress(1_000_000)), Some(Duration::ZERO));
        // Another pass: what was is forgotten.
        pace.note(at(6000), progress(0));
        assert_eq!(pace.bytes_per_second(at(6000), progress(0)), None);
    }
}
