//! Verifications as operators see them: how far one is, how the last one ended, when the replicas were proved equal.
//!
//! Keeps out: the verification itself (`core::resync::verify`), and whether one may begin (`core::replica`).
use crate::api::types::{DifferenceStatus, Verdict, VerifiedStatus, VerifyStatus};
use vmtwin_core::namespace::Errno;
use vmtwin_core::replica::effect::VerifyEnd;
use vmtwin_core::resync::Side;
use vmtwin_core::resync::verify::{Difference, Different, Progress};
use vmtwin_core::time::{Time, millis};

/// The rate is measured over this span at least.
const RATE_SPAN: std::time::Duration = millis(1_000);

/// What is known of them.
#[derive(Debug, Default)]
pub struct Verifications {
    running: Option<Running>,
    /// How the last one ended.
    pub ended: Option<VerifiedStatus>,
    /// When the replicas were last proved equal.
    pub proved_equal: Option<String>,
}

#[derive(Debug)]
struct Running {
    status: VerifyStatus,
    /// Where and when the span began that the rate is measured over.
    from: (Time, u64),
}

impl Verifications {
    /// One began, at this time of day; it is named by that.
    pub fn begin(&mut self, now: Time, begun_ms: u64) {
        self.running = Some(Running { status: VerifyStatus { begun_ms, ..VerifyStatus::default() }, from: (now, 0) });
    }

    /// It got on.
    pub fn progress(&mut self, now: Time, progress: Progress) {
        let Some(Running { status, from }) = &mut self.running else { return };
        (status.bytes_total, status.bytes_done) = (progress.bytes_total, progress.bytes_done);
        let span = now.since(from.0);
        if span >= RATE_SPAN {
            let bytes = u128::from(progress.bytes_done.saturating_sub(from.1));
            status.rate = u64::try_from(bytes * 1_000_000_000 / span.as_nanos()).unwrap_or(u64::MAX);
            *from = (now, progress.bytes_done);
        }
        let left = status.bytes_total.saturating_sub(status.bytes_done);
        status.seconds_left = (status.rate > 0).then(|| left.div_ceil(status.rate));
    }

    /// It ended at this time of day. What is to be written into the log, and whether it should wake one.
    pub fn end(&mut self, end: &VerifyEnd, time: String) -> Option<(bool, String)> {
        let Running { status, .. } = self.running.take()?;
        let mut ended = VerifiedStatus {
            begun_ms: status.begun_ms,
            ended: time,
            verdict: Verdict::Cut,
            reason: String::new(),
            bytes: 0,
            differences: Vec::new(),
            more: 0,
            repaired: false,
        };
        match end {
            VerifyEnd::Done { verdict, repaired } => {
                ended.verdict = if verdict.is_equal() { Verdict::Equal } else { Verdict::Different };
                ended.differences = verdict.differences.iter().map(told).collect();
                (ended.bytes, ended.more, ended.repaired) = (verdict.bytes, verdict.more, *repaired);
                let count = verdict.differences.len() as u64 + verdict.more;
                ended.reason = match (count, repaired, verdict.holder_unreadable) {
                    (0, ..) => {
                        self.proved_equal = Some(ended.ended.clone());
                        format!("the replicas are proved equal ({} bytes compared by hash)", verdict.bytes)
                    }
                    (_, true, _) => format!(
                        "{count} differences were found; the other replica was dropped and gets this node's copy by a resync"
                    ),
                    (_, false, true) => format!(
                        "{count} differences were found, and this node's own copy cannot be read everywhere: swap the VM to the other node, then see to this disk"
                    ),
                    (_, false, false) => format!(
                        "{count} differences were found: see to disks and memory of both nodes; `verify --repair` gives this node's copy to the other one"
                    ),
                };
            }
            VerifyEnd::Cut(why) => ended.reason = format!("the verification ended before all was compared: {why}"),
            VerifyEnd::Broke(side, errno) => {
                ended.reason = format!("{} directory cannot be read: {}", whose(*side), words(*errno));
            }
        }
        let told = (ended.verdict == Verdict::Different, ended.reason.clone());
        self.ended = Some(ended);
        Some(told)
    }

    /// The one under way.
    #[must_use]
    pub fn running(&self) -> Option<VerifyStatus> {
        self.running.as_ref().map(|running| running.status)
    }
}

fn whose(side: Side) -> &'static str {
    match side {
        Side::Holder => "this node's",
        Side::Target => "the other node's",
    }
}

fn words(errno: Errno) -> String {
    std::io::Error::from_raw_os_error(errno.0).to_string()
}

fn told(difference: &Difference) -> DifferenceStatus {
    let (what, range) = match &difference.what {
        Different::Content(range) => ("content".to_owned(), Some(range)),
        Different::Entry(what) => (what.clone(), None),
        Different::OnlyHere => ("only here".to_owned(), None),
        Different::OnlyThere => ("only there".to_owned(), None),
        Different::Unreadable(Side::Holder, range, _) => ("unreadable here".to_owned(), Some(range)),
        Different::Unreadable(Side::Target, range, _) => ("unreadable there".to_owned(), Some(range)),
    };
    DifferenceStatus {
        file: difference.name.clone(),
        what,
        offset: range.map(|range| range.start),
        length: range.map(|range| range.end - range.start),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmtwin_core::ids::FileId;
    use vmtwin_core::resync::verify::Verdict as CoreVerdict;

    fn at(ms: u64) -> Time {
        Time::from_millis(10_000 + ms)
    }

    #[test]
    fn the_last_proof_outlives_a_verification_that_found_something_or_was_cut() {
        let mut all = Verifications::default();
        let equal = VerifyEnd::Done { verdict: CoreVerdict::default(), repaired: false };
        assert_eq!(all.end(&equal, "0".into()), None, "none was under way");
        all.begin(at(0), 7);
        assert_eq!(all.running().unwrap().begun_ms, 7);
        let (wakes, text) = all.end(&equal, "T1".into()).unwrap();
        assert!(!wakes && text.contains("proved equal"), "{text}");
        assert_eq!((all.running(), all.proved_equal.as_deref()), (None, Some("T1")));

        all.begin(at(1), 8);
        let what = Different::Content(65_536..131_072);
        let differences = vec![Difference { file: FileId(3), name: "disk.raw".into(), what }];
        let verdict = CoreVerdict { differences, more: 2, ..CoreVerdict::default() };
        let (wakes, text) = all.end(&VerifyEnd::Done { verdict, repaired: true }, "T2".into()).unwrap();
        assert!(wakes && text.starts_with("3 differences"), "{text}");
        let ended = all.ended.clone().unwrap();
        assert_eq!((ended.verdict, ended.more, ended.repaired), (Verdict::Different, 2, true));
        let one = &ended.differences[0];
        assert_eq!(
            (&one.file[..], &one.what[..], one.offset, one.length),
            ("disk.raw", "content", Some(65_536), Some(65_536))
        );

        all.begin(at(2), 9);
        let (wakes, text) = all.end(&VerifyEnd::Cut("the link was lost"), "T3".into()).unwrap();
        assert!(!wakes && text.ends_with("the link was lost"), "{text}");
        assert_eq!(all.proved_equal.as_deref(), Some("T1"));
    }

    #[test]
    fn the_time_left_follows_from_bytes_and_rate() {
        let mut all = Verifications::default();
        all.begin(at(0), 1);
        for (ms, bytes_done) in [(200, 10), (1000, 100), (1200, 190), (2000, 500)] {
            all.progress(at(ms), Progress { bytes_total: 1000, bytes_done });
        }
        let status = all.running().unwrap();
        assert_eq!((status.rate, status.seconds_left), (400, Some(2)));
    }
}
