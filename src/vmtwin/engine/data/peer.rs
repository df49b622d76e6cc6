//! The peer link and the core's session on it.
//!
//! Holds: links, of which one is current; others say their last word. Decides: which of two links stays. Invariant: of each
//! link the core hears `Connected` once, frames only after it, `Disconnected` once, and nothing after that.
use super::{Data, Payload, Pending};
use crate::engine::messages::{FromData, PeerSocket, PeerUp, Word};
use crate::link::frames::{Body, Taken};
use crate::link::peer::Peer;
use vmtwin_core::ids::{Sequence, SessionId};
use vmtwin_core::replica::effect::Payload as CorePayload;
use vmtwin_core::replica::event::{Event, Job};
use vmtwin_core::wire::codec::Writer;
use vmtwin_core::wire::frame::{Header, Kind};
use vmtwin_core::wire::message::Hello;
use vmtwin_ring::Completion;

#[derive(Default)]
pub(super) struct LinkState {
    /// The link that the core knows.
    pub current: Option<u64>,
    next: u64,
    /// Why the last link went, in the words of who noticed it.
    lost: Option<String>,
    /// Its end has not been told to the control plane.
    to_tell: bool,
}

impl Data {
    /// A new socket. Of two that crossed the one dialed by the smaller node name stays, unless it is silent already.
    pub(super) fn link_came(&mut self, socket: PeerSocket) {
        let ours = self.settings.node < socket.peer;
        if let Some(old) = self.link.current.and_then(|id| self.links.get(&id)) {
            let (old_wins, new_wins) = (old.dialed == ours, socket.dialed == ours);
            if old_wins && !new_wins && old.is_lively(self.now) {
                return;
            }
            self.cut("a newer link took its place");
        }
        match Peer::new(socket, self.now) {
            Ok(peer) => {
                self.link.next += 1;
                let id = self.link.next;
                self.links.insert(id, peer);
                (self.link.current, self.link.to_tell) = (Some(id), true);
                let nonce = getrandom::u64().expect("the kernel gives random numbers");
                self.events.push_back(Event::Connected { nonce });
                self.step();
            }
            Err(e) => self.tell(FromData::PeerDown(format!("the new link is broken already: {e}"))),
        }
    }

    /// The current link is gone.
    fn cut(&mut self, why: &str) {
        let Some(id) = self.link.current.take() else { return };
        if let Some(link) = self.links.get_mut(&id) {
            link.close(why, self.now);
        }
        self.link.lost = Some(why.to_owned());
        self.events.push_back(Event::Disconnected);
        self.step();
        self.tell_down(why);
        self.link.lost = None;
    }

    /// The core closes the link.
    pub(super) fn end_link(&mut self, reason: &'static str) {
        let Some(id) = self.link.current.take() else { return };
        if let Some(link) = self.links.get_mut(&id) {
            link.close(reason, self.now);
        }
        self.events.push_back(Event::Disconnected);
        self.tell_down(reason);
    }

    /// Tells once of each link that it is gone, whether a session stood on it or not: it has to be dialed again.
    fn tell_down(&mut self, why: &str) {
        if std::mem::take(&mut self.link.to_tell) {
            self.tell(FromData::PeerDown(why.to_owned()));
        }
    }

    pub(super) fn session_up(&mut self, hello: Hello) {
        self.control.peer = Some(hello.replica);
        let Hello { replica, broken, erred, record, .. } = hello;
        self.tell(FromData::PeerUp(PeerUp { replica, broken, erred, record }));
    }

    pub(super) fn session_down(&mut self, reason: &'static str) {
        let why = self.link.lost.clone().unwrap_or_else(|| reason.to_owned());
        self.tell_down(&why);
    }

    pub(super) fn send_hello(&mut self, hello: &Hello) {
        let mut bytes = Vec::new();
        hello.encode(&mut Writer::new(&mut bytes));
        self.push(Header::new(Kind::Hello, SessionId(0), Sequence(0)), Some(Body::Bytes(bytes)));
    }

    pub(super) fn send_frame(&mut self, mut header: Header, payload: CorePayload) {
        let body = match payload {
            CorePayload::None => None,
            CorePayload::Bytes(bytes) => Some(Body::Bytes(bytes)),
            CorePayload::Of(job) => match self.payloads.get(&job) {
                Some(Payload::Slot(slot)) => Some(Body::Slot(slot.clone())),
                Some(Payload::Bytes(bytes)) => Some(Body::Bytes(bytes.clone())),
                None => unreachable!("a payload is kept until the core releases it"),
            },
        };
        if let Some(Body::Bytes(bytes)) = &body {
            header.length = u32::try_from(bytes.len()).expect("payloads are bounded");
        }
        self.push(header, body);
    }

    fn push(&mut self, header: Header, body: Option<Body>) {
        if let Some(link) = self.link.current.and_then(|id| self.links.get_mut(&id)) {
            link.push(header, body);
        }
    }

    pub(super) fn received(&mut self, id: u64, done: Completion) {
        let Some(link) = self.links.get_mut(&id) else { return };
        if let Some(why) = link.received(done, self.now) {
            self.broke(id, &why);
        }
    }

    pub(super) fn sent(&mut self, id: u64, done: Completion) {
        let Some(link) = self.links.get_mut(&id) else { return };
        if let Some(why) = link.sent(done) {
            self.broke(id, &why);
        }
    }

    fn broke(&mut self, id: u64, why: &str) {
        if self.link.current == Some(id) {
            self.cut(why);
        }
        self.links.remove(&id);
    }

    /// Reads what came, notices silence, ends what is over.
    pub(super) fn look_at_links(&mut self) {
        if let Some(id) = self.link.current {
            self.read_frames(id);
        }
        if let Some(id) = self.link.current
            && self.links[&id].is_silent(self.now)
        {
            self.broke(id, "the peer is silent");
        }
        let now = self.now;
        self.links.retain(|_, link| !link.is_over(now));
    }

    fn read_frames(&mut self, id: u64) {
        while self.link.current == Some(id) {
            let link = self.links.get_mut(&id).expect("the current link is there");
            match link.next(&self.pool) {
                Ok(Taken::Frame(header, body)) => self.frame_came(header, body),
                Ok(Taken::Starved | Taken::NoSlot) => return,
                Err(e) => {
                    let why = super::sentence(&e);
                    return self.cut(&why);
                }
            }
        }
    }

    fn frame_came(&mut self, header: Header, body: Body) {
        let job = Job::Peer(header.session, header.sequence);
        if self.payloads.contains_key(&job) && matches!(header.kind, Kind::Write | Kind::Namespace) {
            return self.cut("the peer repeats the number of a request in hand");
        }
        let bytes = match body {
            Body::Slot(slot) => {
                self.payloads.insert(job, Payload::Slot(slot));
                Vec::new()
            }
            Body::Bytes(bytes) => bytes,
        };
        match header.kind {
            Kind::Hello => match Hello::decode(&bytes) {
                Ok(hello) => self.events.push_back(Event::Hello(hello)),
                Err(e) => return self.cut(&format!("the peer's hello is refused: {e}")),
            },
            Kind::Namespace => {
                self.payloads.insert(job, Payload::Bytes(bytes));
                self.events.push_back(Event::Frame { header, body: Vec::new() });
            }
            Kind::Tell => {
                if let Some(word) = bytes.first().copied().and_then(Word::from_code) {
                    self.tell(FromData::Told(word));
                }
            }
            Kind::Bye => {
                let why = String::from_utf8_lossy(&bytes).chars().filter(|c| !c.is_control()).collect::<String>();
                return self.cut(&format!("the peer ended the link: {why}"));
            }
            _ => self.events.push_back(Event::Frame { header, body: bytes }),
        }
        self.step();
    }

    /// Sends what waits, asks for more.
    pub(super) fn use_links(&mut self) {
        let ids: Vec<u64> = self.links.keys().copied().collect();
        for id in ids {
            self.use_link(id);
        }
    }

    fn use_link(&mut self, id: u64) {
        let (now, current) = (self.now, self.link.current == Some(id));
        let (sending, receiving) = (self.next_token, self.next_token + 1);
        self.next_token += 2;
        let Some(link) = self.links.get_mut(&id) else { return };
        if current {
            link.beat(now);
            if link.receive(&mut self.ring, receiving) {
                self.pending.insert(receiving, Pending::Receive(id));
            }
        }
        match link.send(&mut self.ring, sending, now) {
            Ok(true) => drop(self.pending.insert(sending, Pending::Send(id))),
            Ok(false) => {}
            Err(e) => self.broke(id, &super::sentence(&e)),
        }
    }
}
