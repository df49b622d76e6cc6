//! Orders of the control plane, and what is told to it.
use super::{Data, local};
use crate::engine::messages::{Change, FromData, ResyncProgress, ToData};
use crate::link::frames::Body;
use std::sync::mpsc;
use std::time::Duration;
use vmtwin_core::ids::{RecordId, ReplicaId, Sequence, SessionId};
use vmtwin_core::record::Record;
use vmtwin_core::replica::Role;
use vmtwin_core::replica::effect::{Change as CoreChange, Progress, VerifyEnd};
use vmtwin_core::replica::event::{Errno, Event};
use vmtwin_core::resync::verify::Progress as VerifyProgress;
use vmtwin_core::time::{Time, millis};
use vmtwin_core::wire::frame::{Header, Kind};
use vmtwin_frontend::fuse::{UnmountError, unmount_aside};

/// The drain of the clean end; the control plane's numbers are smaller.
const END: u64 = u64::MAX;
/// A mount in use is tried again for this long: whoever closed a file a moment ago may still be seen in it.
const BUSY_LIMIT: Duration = Duration::from_secs(5);
const BUSY_PAUSE: Duration = millis(100);
/// Progress is told this often at most.
const PROGRESS_PAUSE: Duration = millis(200);

#[derive(Default)]
pub(super) struct Control {
    /// The change that was asked for, and the record it was proposed as.
    proposed: Option<Option<RecordId>>,
    pub(super) peer: Option<ReplicaId>,
    ending: Option<Ending>,
    progress: Option<Progress>,
    progress_at: Time,
    verify: Option<VerifyProgress>,
    verify_at: Time,
}

impl Control {
    /// The mount is gone and the clean mark is on its way: nothing may change a file any more.
    fn is_draining(&self) -> bool {
        matches!(self.ending, Some(Ending::Draining))
    }
    pub(super) fn is_ending(&self) -> bool {
        self.ending.is_some()
    }
}

enum Ending {
    Unmounting(mpsc::Receiver<Result<(), UnmountError>>, Time),
    Busy(Time, Time),
    Draining,
}

impl Data {
    /// Obeys orders in the order in which they were given: one that came after a record waits until that is in force.
    pub(super) fn take_orders(&mut self) {
        while !self.saves.is_saving_record() {
            match self.orders.try_recv() {
                Ok(order) => self.order_came(order),
                Err(mpsc::TryRecvError::Empty) => return,
                // Nobody is left to give a lease: this process is ending.
                Err(mpsc::TryRecvError::Disconnected) => {
                    self.over = true;
                    return;
                }
            }
        }
    }

    fn order_came(&mut self, order: ToData) {
        match order {
            ToData::Tell(word) => self.tell_peer(word.code()),
            ToData::Record(record) => self.save_record(record),
            ToData::Proposed(_, id) => {
                if let Some(named) = &mut self.control.proposed {
                    *named = Some(id);
                }
            }
            ToData::NotLanded(id) => {
                if self.control.proposed.is_some_and(|named| named.is_none_or(|named| named == id)) {
                    self.control.proposed = None;
                    self.events.push_back(Event::NotLanded);
                }
            }
            // The loop looks at the lease each time before it does anything.
            ToData::LeaseRenewed => {}
            ToData::Link(_) | ToData::Undrain if self.control.is_draining() => {}
            ToData::Link(link) => self.link_came(link),
            ToData::Drain(token) => self.events.push_back(Event::Drain(token)),
            ToData::Undrain => self.events.push_back(Event::Undrain),
            ToData::Quiesce(token) => self.events.push_back(Event::Quiesce(token)),
            ToData::Unquiesce => self.events.push_back(Event::Unquiesce),
            ToData::Verify { rate, repair } => self.events.push_back(Event::Verify { rate, repair }),
            ToData::FailHeld => self.events.push_back(Event::FailHeld),
            ToData::End => self.end(),
        }
    }

    /// A word of our control plane for the other one. Without a link it is lost, as agreed.
    fn tell_peer(&mut self, code: u8) {
        if let Some(link) = self.link.current.and_then(|id| self.links.get_mut(&id)) {
            let header = Header::new(Kind::Tell, SessionId(0), Sequence(0));
            link.push(header, Some(Body::Bytes(vec![code])));
        }
    }

    pub(super) fn record_is_durable(&mut self, record: Record) {
        self.control.proposed = None;
        if self.control.is_draining() {
            return; // kept for the next start; nothing is served by it here
        }
        let was_holder = self.core.role() == Role::Holder;
        if was_holder && record.holder != self.state.replica {
            // The VM is gone: its control plane told us of the record only then. Whoever else still waits for an answer
            // would wait for ever.
            self.events.push_back(Event::FailHeld);
            self.step();
        }
        let id = record.id;
        self.events.push_back(Event::Record(record));
        self.step();
        self.tell(FromData::InForce(id));
        if self.core.role() == Role::Holder && !was_holder {
            self.forget_parked();
        }
    }

    pub(super) fn adopted(&mut self, record: Record) {
        self.keep_record(record.clone());
        self.tell(FromData::Adopted(record));
    }

    pub(super) fn propose(&mut self, change: CoreChange) {
        self.control.proposed = Some(None);
        let change = match (change, self.control.peer) {
            (CoreChange::DropPeer, _) => Change::DropPeer,
            (CoreChange::JoinPeer, Some(peer)) => Change::JoinPeer(peer),
            (CoreChange::JoinPeer, None) => unreachable!("only a peer that said hello is resynced"),
        };
        self.tell(FromData::Propose(change));
    }

    pub(super) fn stuck(&mut self, errno: Errno) {
        self.tell(FromData::Erred(format!("{}; it is the last replica in sync", local::describe(errno))));
    }

    pub(super) fn progress(&mut self, progress: Progress) {
        self.control.progress = Some(progress);
    }

    pub(super) fn verify_progress(&mut self, progress: VerifyProgress) {
        if progress == VerifyProgress::default() {
            // It began.
            self.control.verify_at = self.now;
            return self.tell(FromData::Verify(progress));
        }
        self.control.verify = Some(progress);
    }

    pub(super) fn verified(&mut self, end: VerifyEnd) {
        self.control.verify = None;
        self.tell(FromData::Verified(end));
    }

    fn tell_progress(&mut self) {
        if self.now.since(self.control.verify_at) >= PROGRESS_PAUSE
            && let Some(progress) = self.control.verify.take()
        {
            self.control.verify_at = self.now;
            self.tell(FromData::Verify(progress));
        }
        if self.now.since(self.control.progress_at) >= PROGRESS_PAUSE
            && let Some(progress) = self.control.progress.take()
        {
            self.control.progress_at = self.now;
            let Progress { bytes_total, bytes_done, bytes_sent, finished } = progress;
            self.tell(FromData::Resync(ResyncProgress { bytes_total, bytes_done, bytes_sent, finished }));
        }
    }

    /// The clean end begins with the mount: as long as it stands somebody may use it.
    fn end(&mut self) {
        if self.control.ending.is_none() {
            self.unmount(self.now);
        }
    }

    fn unmount(&mut self, began: Time) {
        let told = unmount_aside(&self.settings.directory, self.ring.waker());
        self.control.ending = Some(Ending::Unmounting(told, began));
    }

    /// Goes on with the clean end, and with what is told at intervals.
    pub(super) fn look_at_end(&mut self) {
        self.tell_progress();
        match self.control.ending.take() {
            Some(Ending::Unmounting(told, began)) => match told.try_recv() {
                Err(_) => self.control.ending = Some(Ending::Unmounting(told, began)),
                Ok(Ok(()) | Err(UnmountError::NotMounted(_))) => {
                    self.fuse = None;
                    self.control.ending = Some(Ending::Draining);
                    self.events.push_back(Event::Drain(END));
                    self.step();
                }
                Ok(Err(UnmountError::Busy(_))) if self.now.since(began) < BUSY_LIMIT => {
                    self.control.ending = Some(Ending::Busy(began, self.now + BUSY_PAUSE));
                }
                // It stands, so it is served; the order may be given again.
                Ok(Err(e)) => self.tell(FromData::Ended(Err(super::sentence(&e)))),
            },
            Some(Ending::Busy(began, again)) if self.now >= again => self.unmount(began),
            other => self.control.ending = other,
        }
    }

    pub(super) fn drained(&mut self, token: u64) {
        if token != END {
            return self.tell(FromData::Drained(token));
        }
        self.flush_all();
    }

    pub(super) fn flushed_all(&mut self) {
        self.save_clean();
    }

    pub(super) fn clean_is_durable(&mut self) {
        self.over = true;
        self.tell(FromData::Ended(Ok(())));
    }
}
