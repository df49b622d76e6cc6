//! CLOCK_BOOTTIME: the only clock of leases. It goes on while the host is suspended; tokio's own timers do not.
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};
use std::io;
use std::os::fd::OwnedFd;
use tokio::io::unix::AsyncFd;
use vmtwin_core::time::Time;

pub use crate::host::now;

/// Milliseconds since 1970, for people.
#[must_use]
pub fn wall_ms() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// One timer that wakes at a time of CLOCK_BOOTTIME, also right after a suspend that it lay in.
#[derive(Debug)]
pub struct Alarm {
    timer: AsyncFd<OwnedFd>,
    set: Option<Time>,
}

impl Alarm {
    /// Not set. Within a tokio runtime.
    ///
    /// # Errors
    /// No more descriptors.
    pub fn new() -> io::Result<Self> {
        let timer = timerfd_create(TimerfdClockId::Boottime, TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC)?;
        #[expect(
            deprecated,
            reason = "its successor is `unsafe`; an `OwnedFd` that is only borrowed keeps what that asks for"
        )]
        let timer = AsyncFd::new(timer)?;
        Ok(Self { timer, set: None })
    }

    /// Comes back at `at`, or soon after; at once if it is past.
    pub async fn until(&mut self, at: Time) {
        if self.set != Some(at) {
            // Zero would disarm it.
            let at_least = at.0.max(1);
            let zero = Timespec { tv_sec: 0, tv_nsec: 0 };
            let value = Timespec {
                tv_sec: i64::try_from(at_least / 1_000_000_000).unwrap_or(i64::MAX),
                tv_nsec: i64::try_from(at_least % 1_000_000_000).unwrap_or(0),
            };
            let spec = Itimerspec { it_interval: zero, it_value: value };
            timerfd_settime(self.timer.get_ref(), TimerfdTimerFlags::ABSTIME, &spec)
                .expect("a valid time on our own timer");
            self.set = Some(at);
        }
        while now() < at {
            let mut ready = self.timer.readable().await.expect("the timer lives as long as its runtime");
            // The count of expirations says nothing: the clock does.
            let _ = rustix::io::read(self.timer.get_ref(), &mut [0_u8; 8]);
            ready.clear_ready();
        }
        self.set = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmtwin_core::time::millis;

    #[tokio::test]
    async fn an_alarm_never_rings_early_and_rings_again_after_it_was_moved() {
        let mut alarm = Alarm::new().unwrap();
        alarm.until(Time(0)).await;
        for _ in 0..3 {
            let (far, near) = (now() + millis(600_000), now() + millis(20));
            tokio::select! {
                () = alarm.until(far) => panic!("ten minutes are not over"),
                () = tokio::time::sleep(millis(1)) => {}
            }
            alarm.until(near).await;
            assert!(now() >= near);
        }
    }
}
