//! What libvirt's events mean: pure.
//!
//! Holds: what was last seen of the VM, and the detail of its last SHUTDOWN: the final reason alone cannot tell a guest's
//! power-off from a SIGTERM of the host. Keeps out: libvirt, threads, the definition's text.
//! Invariant: a VM that was told `Running` or `Paused` is told `Ended` exactly once, over a lost connection too.
use super::ffi::Raw;
use crate::{VmEnd, VmEvent, VmState};
use virt_sys as sys;

/// What comes out of one event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum News {
    /// Tell this.
    Event(VmEvent),
    /// The definition changed: fetch it, and tell.
    Definition,
}

/// Reads events.
#[derive(Debug, Default)]
pub(super) struct Reader {
    /// It was told to be there.
    alive: bool,
    /// Detail of a SHUTDOWN that its STOPPED has not followed yet: by the host.
    shutdown_by_host: Option<bool>,
    /// CRASHED was seen; what follows is its consequence.
    panicked: bool,
}

impl Reader {
    /// One event. `killed`: this driver killed the VM's process since its last start.
    pub(super) fn read(&mut self, raw: Raw, killed: bool) -> Option<News> {
        let event = match raw {
            Raw::Reboot => VmEvent::Rebooted,
            Raw::IoError { paused: true } => VmEvent::Paused { io_error: true },
            Raw::IoError { paused: false } | Raw::Closed { .. } => return None,
            Raw::Lifecycle { event, detail } => match event {
                sys::VIR_DOMAIN_EVENT_DEFINED => return Some(News::Definition),
                sys::VIR_DOMAIN_EVENT_STARTED => {
                    *self = Self { alive: true, ..Self::default() };
                    VmEvent::Running
                }
                sys::VIR_DOMAIN_EVENT_RESUMED => {
                    self.alive = true;
                    VmEvent::Running
                }
                sys::VIR_DOMAIN_EVENT_SUSPENDED | sys::VIR_DOMAIN_EVENT_PMSUSPENDED => {
                    self.alive = true;
                    let paused = event == sys::VIR_DOMAIN_EVENT_SUSPENDED;
                    VmEvent::Paused { io_error: paused && detail == sys::VIR_DOMAIN_EVENT_SUSPENDED_IOERROR }
                }
                sys::VIR_DOMAIN_EVENT_SHUTDOWN => {
                    self.shutdown_by_host = Some(detail == sys::VIR_DOMAIN_EVENT_SHUTDOWN_HOST);
                    return None;
                }
                sys::VIR_DOMAIN_EVENT_CRASHED => {
                    self.panicked = true;
                    return None;
                }
                sys::VIR_DOMAIN_EVENT_STOPPED => {
                    let end = self.end(detail, killed);
                    *self = Self::default();
                    VmEvent::Ended(end)
                }
                // UNDEFINED follows a stop, or comes alone; what libvirt adds later is not known here.
                _ => return None,
            },
        };
        Some(News::Event(event))
    }

    fn end(&self, detail: u32, killed: bool) -> VmEnd {
        match detail {
            _ if killed => VmEnd::Destroyed,
            _ if self.panicked => VmEnd::Crashed,
            sys::VIR_DOMAIN_EVENT_STOPPED_SHUTDOWN if self.shutdown_by_host == Some(true) => VmEnd::HostShutdown,
            sys::VIR_DOMAIN_EVENT_STOPPED_SHUTDOWN => VmEnd::GuestShutdown,
            sys::VIR_DOMAIN_EVENT_STOPPED_CRASHED | sys::VIR_DOMAIN_EVENT_STOPPED_FAILED => VmEnd::Crashed,
            // Destroyed, saved, migrated away, reverted to a snapshot: an admin's act, not the VM's.
            _ => VmEnd::Destroyed,
        }
    }

    /// A new connection found the VM in this state (with libvirt's reason for being off): tells what was missed.
    pub(super) fn found(&mut self, state: VmState, reason: u32, killed: bool) -> Option<VmEvent> {
        match state {
            VmState::Running | VmState::Paused => {
                let began = !std::mem::replace(&mut self.alive, true);
                // A pause that began or ended meanwhile is news, too; told again it does no harm.
                match state {
                    VmState::Paused => Some(VmEvent::Paused { io_error: false }),
                    _ => began.then_some(VmEvent::Running),
                }
            }
            VmState::Off | VmState::Undefined => {
                let before = std::mem::take(self);
                before.alive.then(|| {
                    VmEvent::Ended(match reason {
                        _ if killed => VmEnd::Destroyed,
                        sys::VIR_DOMAIN_SHUTOFF_SHUTDOWN if before.shutdown_by_host == Some(true) => {
                            VmEnd::HostShutdown
                        }
                        sys::VIR_DOMAIN_SHUTOFF_SHUTDOWN => VmEnd::GuestShutdown,
                        sys::VIR_DOMAIN_SHUTOFF_DESTROYED
                        | sys::VIR_DOMAIN_SHUTOFF_MIGRATED
                        | sys::VIR_DOMAIN_SHUTOFF_SAVED
                        | sys::VIR_DOMAIN_SHUTOFF_FROM_SNAPSHOT => VmEnd::Destroyed,
                        _ => VmEnd::Crashed,
                    })
                })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STARTED: Raw = Raw::Lifecycle { event: sys::VIR_DOMAIN_EVENT_STARTED, detail: 0 };
    fn shutdown(detail: u32) -> Raw {
        Raw::Lifecycle { event: sys::VIR_DOMAIN_EVENT_SHUTDOWN, detail }
    }
    fn stopped(detail: u32) -> Raw {
        Raw::Lifecycle { event: sys::VIR_DOMAIN_EVENT_STOPPED, detail }
    }
    fn end_of(raws: &[Raw], killed: bool) -> Option<VmEvent> {
        let mut reader = Reader::default();
        let told: Vec<_> = raws.iter().filter_map(|raw| reader.read(*raw, killed)).collect();
        match told.last() {
            Some(News::Event(event)) => Some(event.clone()),
            _ => None,
        }
    }

    #[test]
    fn the_cause_of_an_end_is_told_apart_as_libvirt_shows_it() {
        use sys::*;
        let guest = shutdown(VIR_DOMAIN_EVENT_SHUTDOWN_GUEST);
        let host = shutdown(VIR_DOMAIN_EVENT_SHUTDOWN_HOST);
        let panic = Raw::Lifecycle { event: VIR_DOMAIN_EVENT_CRASHED, detail: 0 };
        let by_itself = stopped(VIR_DOMAIN_EVENT_STOPPED_SHUTDOWN);
        let destroyed = stopped(VIR_DOMAIN_EVENT_STOPPED_DESTROYED);
        let failed = stopped(VIR_DOMAIN_EVENT_STOPPED_FAILED);
        for (raws, killed, end) in [
            (vec![STARTED, guest, by_itself], false, VmEnd::GuestShutdown),
            (vec![STARTED, host, by_itself], false, VmEnd::HostShutdown),
            (vec![STARTED, host, destroyed], false, VmEnd::Destroyed),
            (vec![STARTED, failed], false, VmEnd::Crashed),
            (vec![STARTED, failed], true, VmEnd::Destroyed),
            (vec![STARTED, panic, destroyed], false, VmEnd::Crashed),
            // A shutdown that an earlier life of the VM began says nothing about this one.
            (vec![STARTED, host, STARTED, by_itself], false, VmEnd::GuestShutdown),
        ] {
            assert_eq!(end_of(&raws, killed), Some(VmEvent::Ended(end)), "{raws:?}");
        }
    }

    #[test]
    fn an_io_error_pauses_without_ending_and_a_reboot_is_no_end() {
        let io_error = sys::VIR_DOMAIN_EVENT_SUSPENDED_IOERROR;
        let pause = Raw::Lifecycle { event: sys::VIR_DOMAIN_EVENT_SUSPENDED, detail: io_error };
        assert_eq!(end_of(&[STARTED, pause], false), Some(VmEvent::Paused { io_error: true }));
        assert_eq!(end_of(&[STARTED, Raw::IoError { paused: true }], false), Some(VmEvent::Paused { io_error: true }));
        assert_eq!(end_of(&[STARTED, Raw::Reboot], false), Some(VmEvent::Rebooted));
        assert_eq!(end_of(&[Raw::IoError { paused: false }], false), None);
    }

    #[test]
    fn an_end_missed_while_the_daemon_was_away_is_told_once() {
        let mut reader = Reader::default();
        reader.read(STARTED, false);
        let crashed = sys::VIR_DOMAIN_SHUTOFF_CRASHED;
        assert_eq!(reader.found(VmState::Off, crashed, false), Some(VmEvent::Ended(VmEnd::Crashed)));
        assert_eq!(reader.found(VmState::Off, crashed, false), None);
        assert_eq!(reader.found(VmState::Running, 1, false), Some(VmEvent::Running));
        assert_eq!(reader.found(VmState::Running, 1, false), None);
        assert_eq!(
            reader.found(VmState::Undefined, sys::VIR_DOMAIN_SHUTOFF_SHUTDOWN, false),
            Some(VmEvent::Ended(VmEnd::GuestShutdown))
        );
    }
}
