//! What is to be durable beside the VM's files: the state file and the dirty map on a helper thread, the activity log on
//! the ring.
//!
//! Holds: the order in which they were given, which is the order in which they are done. Invariant: a record is told to the
//! core only when the state file names it, so a new holder's record is durable before anything is served under it.
use super::{Data, Pending};
use crate::engine::data::start::MAP_FILE;
use crate::store::metafiles::{MetaError, MetaFolder};
use crate::store::replica::State;
use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::mpsc;
use vmtwin_core::record::Record;
use vmtwin_core::replica::effect::Marks;
use vmtwin_core::replica::event::Event;
use vmtwin_ring::{Completion, Waker};

enum Save {
    State(Box<State>, Saved),
    Map(u64, Vec<u8>),
    /// The clean end: everything on the file system first, then the state that says so.
    Flush(OwnedFd),
}

/// What was made durable.
#[derive(Debug)]
pub(super) enum Saved {
    /// This record is known here.
    Record(Box<Record>),
    /// The marks.
    Marks,
    /// The core knows it already.
    Nothing,
    /// The clean end.
    Clean,
    Map(u64),
    Flushed,
}

/// The helper thread, and the log's queue.
pub(super) struct Saves {
    orders: mpsc::Sender<Save>,
    done: mpsc::Receiver<Result<Saved, String>>,
    /// Records that are on their way to the state file.
    records: usize,
    log: VecDeque<(u64, u64, Vec<u8>)>,
    log_busy: bool,
}

impl Saves {
    pub fn new(meta: MetaFolder, waker: Waker) -> io::Result<Self> {
        let (orders, taken) = mpsc::channel();
        let (tell, done) = mpsc::channel();
        std::thread::Builder::new().name("metadata".into()).spawn(move || {
            for save in taken {
                let saved = carry_out(&meta, save).map_err(|e| super::sentence(&e));
                if tell.send(saved).is_err() {
                    return;
                }
                waker.wake();
            }
        })?;
        Ok(Self { orders, done, records: 0, log: VecDeque::new(), log_busy: false })
    }

    pub fn is_saving_record(&self) -> bool {
        self.records > 0
    }
}

fn carry_out(meta: &MetaFolder, save: Save) -> Result<Saved, MetaError> {
    match save {
        Save::State(state, saved) => state.save(meta).map(|()| saved),
        Save::Map(version, bytes) => meta.replace(MAP_FILE, &bytes).map(|()| Saved::Map(version)),
        Save::Flush(root) => match rustix::fs::syncfs(root) {
            Ok(()) => Ok(Saved::Flushed),
            Err(e) => Err(MetaError::Io { what: "flush", path: "the module's directory".into(), source: e.into() }),
        },
    }
}

impl Data {
    fn order(&mut self, save: Save) {
        if self.saves.orders.send(save).is_err() {
            self.fail("the thread that writes metadata has ended".to_owned());
        }
    }

    fn save_state(&mut self, saved: Saved) {
        let state = Box::new(self.state.clone());
        self.order(Save::State(state, saved));
    }

    /// A record that is known: first durable, then told to the core.
    pub(super) fn save_record(&mut self, record: Record) {
        self.state.record = Some(record.clone());
        self.saves.records += 1;
        self.save_state(Saved::Record(Box::new(record)));
    }

    /// The core knows this record from its holder.
    pub(super) fn keep_record(&mut self, record: Record) {
        self.state.record = Some(record);
        self.save_state(Saved::Nothing);
    }

    pub(super) fn save_marks(&mut self, marks: Marks) {
        self.state.marks = marks;
        self.save_state(Saved::Marks);
    }

    pub(super) fn save_map(&mut self, version: u64, bytes: Vec<u8>) {
        self.order(Save::Map(version, bytes));
    }

    /// Flushes the file system on the helper thread.
    pub(super) fn flush_all(&mut self) {
        match self.store.root() {
            Ok(root) => self.order(Save::Flush(root)),
            Err(e) => self.fail(format!("cannot flush the module's directory: {e}")),
        }
    }

    /// The last word of a clean stop.
    pub(super) fn save_clean(&mut self) {
        match self.store.fingerprints() {
            Ok(fingerprints) => {
                self.state.clean = Some(fingerprints);
                self.save_state(Saved::Clean);
            }
            Err(e) => self.fail(format!("cannot look at the module's files: {e}")),
        }
    }

    /// Takes in what the helper thread has done.
    pub(super) fn take_saved(&mut self) {
        while let Ok(saved) = self.saves.done.try_recv() {
            match saved {
                Ok(Saved::Record(record)) => {
                    self.saves.records -= 1;
                    self.record_is_durable(*record);
                }
                Ok(Saved::Marks) => self.events.push_back(Event::MarksSaved),
                Ok(Saved::Nothing) => {}
                Ok(Saved::Map(version)) => self.events.push_back(Event::MapSaved { version }),
                Ok(Saved::Flushed) => self.flushed_all(),
                Ok(Saved::Clean) => self.clean_is_durable(),
                Err(why) => self.fail(why),
            }
        }
    }

    /// Writes a transaction of the activity log: one after the other.
    pub(super) fn save_log(&mut self, transaction: u64, offset: u64, bytes: Vec<u8>) {
        self.saves.log.push_back((transaction, offset, bytes));
        self.next_log();
    }

    fn next_log(&mut self) {
        if self.saves.log_busy {
            return;
        }
        if let Some((transaction, offset, bytes)) = self.saves.log.pop_front() {
            self.saves.log_busy = true;
            let (token, length) = (self.token(Pending::Log(transaction)), bytes.len());
            let file = Rc::clone(&self.log_file);
            self.ring.write(&file, bytes, 0..length, offset, token);
        }
    }

    pub(super) fn log_saved(&mut self, transaction: u64, done: &Completion) {
        self.saves.log_busy = false;
        let wanted = done.memory.as_ref().map_or(0, |memory| memory.bytes().len());
        match &done.result {
            Ok(count) if *count as usize == wanted => self.events.push_back(Event::LogSaved { transaction }),
            Ok(_) => self.fail("the activity log cannot be written: its disk is full".to_owned()),
            Err(e) => self.fail(format!("the activity log cannot be written: {e}")),
        }
        self.next_log();
    }
}
