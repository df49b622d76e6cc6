//! What every process asks of its host: the clock, random numbers, its boot; and the line that it writes to stderr.
use rustix::time::{ClockId, clock_gettime};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use vmtwin_core::time::Time;

/// CLOCK_BOOTTIME: it goes on in a suspend, as a lease does.
#[must_use]
pub fn now() -> Time {
    let now = clock_gettime(ClockId::Boottime);
    let seconds = u64::try_from(now.tv_sec).expect("a host is not older than its boot");
    Time(seconds * 1_000_000_000 + u64::try_from(now.tv_nsec).expect("nanoseconds of a second"))
}

/// Seconds since 1970, for tokens and what people read; never for a decision about data.
#[must_use]
pub fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// A random id, from the kernel.
///
/// # Panics
/// Where the kernel has no random numbers: nothing here may go on with guessable or repeated ids.
#[must_use]
pub fn random() -> u128 {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).expect("the kernel gives random numbers");
    u128::from_le_bytes(bytes)
}

/// Whether the host is on its way down, as systemd says; where it does not answer within two seconds, or is not there: no.
#[must_use]
pub fn is_stopping() -> bool {
    let asked = Command::new("systemctl")
        .arg("is-system-running")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn();
    let Ok(mut asked) = asked else { return false };
    let began = Instant::now();
    while let Ok(None) = asked.try_wait() {
        if began.elapsed() > Duration::from_secs(2) {
            let _ = asked.kill();
            break;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    asked.wait_with_output().is_ok_and(|said| said.stdout.trim_ascii() == b"stopping")
}

/// News on stderr.
pub fn info(text: &str) {
    eprintln!("{} vmtwin: {text}", stamp());
}

/// Trouble on stderr.
pub fn warn(text: &str) {
    eprintln!("{} vmtwin: warning: {text}", stamp());
}

fn stamp() -> String {
    jiff::Zoned::now().strftime("%H:%M:%S%.3f").to_string()
}
