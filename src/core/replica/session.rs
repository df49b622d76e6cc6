//! The link to the peer: hello, the session that it leads to, what was asked in it (R7).
//!
//! Down ─connected─> Up ─both know the same record─> Stands ─lost, or the record changed─> Ending ─disconnected─> Down
//! Invariant: a session is bound to exactly one record, and nothing of an older one is believed.
use super::effect::{Effect, Payload};
use super::event::{Errno, Job};
use super::guest::Remote;
use super::{Replica, Role, Rule};
use crate::ids::{Sequence, SessionId};
use crate::record::{Record, RecordName};
use crate::time::Time;
use crate::wire::codec::Reader;
use crate::wire::frame::{Header, Kind, PROTOCOL};
use crate::wire::message::Hello;

#[derive(Clone, Debug)]
pub(super) enum Link {
    Down,
    /// A connection without a session: what was said and heard last.
    Up {
        nonce: u64,
        said: Option<Option<RecordName>>,
        heard: Option<Box<Hello>>,
    },
    /// A session.
    Stands {
        id: SessionId,
    },
    /// We closed it; the shell has not said so yet.
    Ending,
}

/// What a frame asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Asked {
    /// A guest's operation or an own flush.
    Op(Job),
    /// Something of the resync, by its number.
    Resync(u64),
    /// Something of the verification, likewise.
    Verify(u64),
}

impl Replica {
    pub(super) fn session(&self) -> Option<SessionId> {
        if let Link::Stands { id } = self.link { Some(id) } else { None }
    }

    pub(super) fn connected(&mut self, nonce: u64, out: &mut Vec<Effect>) {
        self.lose_session("a new link", out);
        self.link = Link::Up { nonce, said: None, heard: None };
    }

    pub(super) fn disconnected(&mut self, out: &mut Vec<Effect>) {
        self.lose_session("the link was lost", out);
        self.link = Link::Down;
    }

    /// Closes the link, with what stands on it.
    pub(super) fn end_link(&mut self, reason: &'static str, out: &mut Vec<Effect>) {
        if matches!(self.link, Link::Down | Link::Ending) {
            return;
        }
        self.lose_session(reason, out);
        self.link = Link::Ending;
        out.push(Effect::EndLink(reason));
    }

    /// What the session carried is unanswered again.
    fn lose_session(&mut self, reason: &'static str, out: &mut Vec<Effect>) {
        if self.session().is_none() {
            return;
        }
        self.link = Link::Ending;
        self.lost_since = self.now;
        self.sent.clear();
        self.follower.end_session();
        self.end_resync(out);
        self.end_verify(reason, out);
        out.push(Effect::SessionDown(reason));
        if self.is_holder() && !self.peer_in_sync() {
            // What it answered and had not flushed may be lost with it.
            self.fold_log();
        }
        let sent = |op: &super::guest::Op| op.remote == Remote::Sent;
        let jobs: Vec<Job> = self.ops.iter().filter(|(_, op)| sent(op)).map(|(job, _)| *job).collect();
        for job in &jobs {
            self.ops.get_mut(job).expect("just listed").remote = Remote::Unsent;
        }
        for job in jobs {
            self.settle(job, out);
        }
    }

    /// Says hello, when all that went before has ended here: of a session, and of a reign (R7). A holder's own requests
    /// belong to its reign, which goes on.
    pub(super) fn say_hello(&mut self, out: &mut Vec<Effect>) {
        let Link::Up { nonce, said, .. } = &mut self.link else { return };
        let name = self.record.as_ref().map(Record::name);
        let holder = self.record.as_ref().is_some_and(|record| record.holder == self.config.me);
        let ready = self.drain.is_none() && (holder || self.local.is_empty()) && !self.marks_due;
        if !ready || *said == Some(name) {
            return;
        }
        *said = Some(name);
        out.push(Effect::SendHello(Hello {
            protocol_min: u16::from(PROTOCOL),
            protocol_max: u16::from(PROTOCOL),
            features: 0,
            module: self.config.module,
            replica: self.config.me,
            nonce: *nonce,
            broken: self.marks.broken,
            erred: self.marks.erred,
            suspect_all: self.marks.suspect_all,
            configuration: self.config.configuration,
            record: self.record.clone(),
        }));
        self.begin_session(out);
    }

    pub(super) fn hello(&mut self, hello: Hello, out: &mut Vec<Effect>) {
        match &mut self.link {
            Link::Up { heard, .. } => *heard = Some(Box::new(hello.clone())),
            Link::Stands { .. } => return self.end_link("the peer says hello again", out),
            Link::Down | Link::Ending => return,
        }
        let spoken = (hello.protocol_min..=hello.protocol_max).contains(&u16::from(PROTOCOL));
        if hello.module != self.config.module || hello.replica == self.config.me || !spoken {
            return self.end_link("not our peer: another module, replica or protocol", out);
        }
        self.config.peer = hello.replica;
        let named = self.record.as_ref().is_some_and(|record| record.is_in_sync(hello.replica));
        if self.role() == Role::Holder && self.peer_in_sync() && !named {
            // It was set up anew: the replica that the record names is lost, and has to be out first (R3).
            return self.peer_failed("the peer has another replica than the one in sync", out);
        }
        if let Some(theirs) = hello.record
            && self.record.as_ref().is_none_or(|ours| theirs.is_newer_than(ours))
        {
            out.push(Effect::OtherRecord(theirs));
        }
        self.begin_session(out);
    }

    /// A session stands as soon as both have said that they know the same record.
    fn begin_session(&mut self, out: &mut Vec<Effect>) {
        let Link::Up { nonce, said: Some(Some(said)), heard: Some(heard) } = &self.link else { return };
        if heard.record.as_ref().map(Record::name) != Some(*said) {
            return;
        }
        let hello = (**heard).clone();
        let id = SessionId((nonce ^ hello.nonce).max(1));
        if self.role() == Role::Holder && self.peer_in_sync() && (hello.broken || hello.erred || hello.suspect_all) {
            // R5: it has lost writes, or may have. It gets no data before it is out.
            self.peer_failed("the peer is broken", out);
        }
        if self.role() == Role::Holder && self.peer_in_sync() && self.peer_bad.is_some() {
            return self.end_link("the peer is being dropped", out);
        }
        self.link = Link::Stands { id };
        self.sequence = Sequence(0);
        self.follower.begin_session();
        if self.role() == Role::Target {
            // Its disk gets another chance: a resync writes it anew, and it proves itself or errs again.
            self.failed = None;
        }
        out.push(Effect::SessionUp(hello.clone()));
        if self.role() == Role::Holder {
            if self.peer_in_sync() {
                self.send_unanswered(out);
            } else {
                self.begin_resync(&hello, out);
            }
        }
    }

    /// Sends a request in the session that stands.
    pub(super) fn ask(&mut self, asked: Asked, mut header: Header, payload: Payload, out: &mut Vec<Effect>) {
        self.sequence = self.sequence.next();
        header.session = self.session().expect("requests are sent in a session");
        header.sequence = self.sequence;
        self.sent.insert(self.sequence, (asked, self.now));
        out.push(Effect::Send { header, payload });
    }

    /// A frame of the peer.
    pub(super) fn frame(&mut self, header: Header, body: Vec<u8>, out: &mut Vec<Effect>) {
        let ours = self.session() == Some(header.session);
        let believed = self.off(Rule::Session) && self.session().is_some();
        if !ours && !believed {
            // Late, from a session that has ended.
            return Self::refuse(&header, out);
        }
        match (header.kind, self.role()) {
            (Kind::Beat, _) => {}
            (Kind::Bye, _) => self.end_link("the peer ended the session", out),
            (Kind::Answer, Role::Holder) => self.answered(&header, body, out),
            (Kind::NewRecord, Role::Follower | Role::Target) => self.new_record(&body, out),
            (
                Kind::Write
                | Kind::Range
                | Kind::Flush
                | Kind::Namespace
                | Kind::Tree
                | Kind::Suspects
                | Kind::Hash
                | Kind::Data
                | Kind::Prepare,
                Role::Follower | Role::Target,
            ) => self.follow(header, out),
            _ => {
                Self::refuse(&header, out);
                self.end_link("the peer sent what its role does not allow", out);
            }
        }
    }

    /// Gives a kept payload back.
    pub(super) fn refuse(header: &Header, out: &mut Vec<Effect>) {
        if matches!(header.kind, Kind::Write | Kind::Namespace) {
            out.push(Effect::Release { job: Job::Peer(header.session, header.sequence) });
        }
    }

    fn answered(&mut self, header: &Header, body: Vec<u8>, out: &mut Vec<Effect>) {
        let Some((asked, _)) = self.sent.remove(&header.sequence) else {
            if self.off(Rule::Acknowledge) || self.off(Rule::Session) {
                return;
            }
            return self.end_link("the peer answers what was not asked", out);
        };
        let result = match header.result {
            0 => Ok(()),
            errno => Err(Errno(errno)),
        };
        match asked {
            Asked::Op(job) => self.op_answered(job, result, out),
            Asked::Resync(number) => self.resync_answered(number, result, header, &body, out),
            Asked::Verify(number) => self.verify_answered(number, result, header, &body, out),
        }
    }

    /// The holder goes on in this session under a new record (R7).
    fn new_record(&mut self, body: &[u8], out: &mut Vec<Effect>) {
        let mut from = Reader::new(body);
        let record = Record::decode(&mut from).and_then(|record| from.end().map(|()| record));
        let fits = record.as_ref().ok().zip(self.record.as_ref()).is_some_and(|(new, old)| {
            new.holder == old.holder && new.is_in_sync(self.config.me) && (new == old || new.is_newer_than(old))
        });
        match record {
            Ok(record) if fits => {
                if self.record.as_ref() != Some(&record) {
                    out.push(Effect::Adopted(record.clone()));
                    self.known(record, out);
                }
            }
            _ => self.end_link("the peer names a record that does not follow", out),
        }
    }

    /// The time that the oldest unanswered request was sent.
    pub(super) fn oldest_asked(&self) -> Option<Time> {
        // Numbers rise with time.
        self.sent.first_key_value().map(|(_, (_, since))| *since)
    }
}
