//! The acceptors of one process, `keep` or witness: one per module, each with its file.
//!
//! Invariant: what an answer rests on is on disk before the answer leaves. A file that is lost comes back only by `Make`,
//! as a new voter (R12); one that is damaged is not taken for lost.
use super::wire::{Ask, Call, Reply, read_frame, write_frame};
use crate::config::durable;
use crate::host;
use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use tokio::io::{AsyncRead, AsyncWrite};
use vmtwin_core::arbiter::acceptor::Acceptor;
use vmtwin_core::arbiter::message::Request;
use vmtwin_core::arbiter::stored::Stored;
use vmtwin_core::ids::{AcceptorId, ModuleId};
use vmtwin_core::limits::MODULES_MAX;
use vmtwin_core::record::RecordName;

/// Modules that one process votes for: those of several clusters' worth, so that only a fault reaches it.
const VOTERS_MAX: usize = 8 * MODULES_MAX;

/// All of this process's acceptors.
#[derive(Debug)]
pub struct Voters {
    folder: PathBuf,
    /// Guards the map only; never held over a wait.
    slots: Mutex<BTreeMap<ModuleId, Arc<tokio::sync::Mutex<Slot>>>>,
}

#[derive(Debug)]
enum Slot {
    /// To be read from its file, as after a start: also after a write that failed, since memory is ahead of disk then.
    Unread,
    Absent,
    Voting(Box<Acceptor>),
}

impl Voters {
    /// Those whose files lie in this folder.
    ///
    /// # Errors
    /// Where the folder cannot be made.
    pub fn open(folder: PathBuf) -> io::Result<Self> {
        std::fs::create_dir_all(&folder)?;
        Ok(Self { folder, slots: Mutex::default() })
    }

    /// Answers one request. Requests for one module go one after the other, those for different ones side by side.
    pub async fn answer(&self, module: ModuleId, ask: Ask) -> Reply {
        let Some(slot) = self.slot(module) else {
            return Reply::Refused(format!("{VOTERS_MAX} modules have their votes here already"));
        };
        let mut slot = slot.lock_owned().await;
        let file = self.folder.join(module.to_string());
        // Files are read and flushed on a thread of their own: other modules' renewals go on meanwhile. The lock moves along,
        // so that a caller who goes away in between leaves no half-done request to the next one.
        let done = tokio::task::spawn_blocking(move || slot.answer(&file, module, ask));
        done.await.unwrap_or_else(|_| Reply::Refused("the acceptor failed".into()))
    }

    /// Renewals and reads need no disk: they are answered here and now where the acceptor is in memory and idle.
    fn answer_at_once(&self, module: ModuleId, ask: &Ask) -> Option<Reply> {
        let Ask::Core(request @ (Request::Renew { .. } | Request::Read { .. })) = ask else { return None };
        let slot = self.slots.lock().expect("nothing panics under it").get(&module)?.clone();
        let mut slot = slot.try_lock_owned().ok()?;
        let Slot::Voting(acceptor) = &mut *slot else { return None };
        let handled = acceptor.handle(host::now(), request);
        assert!(!handled.save, "a grant lives in memory");
        Some(Reply::Core(handled.answer))
    }

    fn slot(&self, module: ModuleId) -> Option<Arc<tokio::sync::Mutex<Slot>>> {
        let mut slots = self.slots.lock().expect("nothing panics under it");
        if slots.len() >= VOTERS_MAX && !slots.contains_key(&module) {
            return None;
        }
        Some(slots.entry(module).or_insert_with(|| Arc::new(tokio::sync::Mutex::new(Slot::Unread))).clone())
    }

    /// The record that a module's acceptor has accepted; `None` also where it is at work, or its file was not read yet.
    #[must_use]
    pub fn accepted(&self, module: ModuleId) -> Option<RecordName> {
        let slot = self.slots.lock().expect("nothing panics under it").get(&module)?.clone();
        let slot = slot.try_lock_owned().ok()?;
        let Slot::Voting(acceptor) = &*slot else { return None };
        acceptor.stored().accepted.as_ref().map(|accepted| accepted.record.name())
    }

    /// Serves one connection to its end. `heard` is told of each request before it is answered.
    ///
    /// # Errors
    /// As the connection says, or bytes that make no sense.
    pub async fn serve(
        &self,
        stream: impl AsyncRead + AsyncWrite + Unpin,
        heard: impl Fn(ModuleId, &Ask),
    ) -> io::Result<()> {
        let (mut from, mut to) = tokio::io::split(stream);
        while let Some(bytes) = read_frame(&mut from).await? {
            let Call { nonce, module, ask } = Call::decode(&bytes).map_err(io::Error::other)?;
            heard(module, &ask);
            let reply = match self.answer_at_once(module, &ask) {
                Some(reply) => reply,
                None => self.answer(module, ask).await,
            };
            write_frame(&mut to, &reply.encode(nonce)).await?;
        }
        Ok(())
    }
}

impl Slot {
    fn answer(&mut self, file: &Path, module: ModuleId, ask: Ask) -> Reply {
        match self.try_answer(file, module, ask) {
            Ok(reply) => reply,
            Err(why) => {
                host::warn(&format!("votes of module {module}: {why}"));
                *self = Self::Unread;
                Reply::Refused(why)
            }
        }
    }

    fn try_answer(&mut self, file: &Path, module: ModuleId, ask: Ask) -> Result<Reply, String> {
        if matches!(self, Self::Unread) {
            *self = Self::read(file, module)?;
        }
        let failed = |e: io::Error| format!("cannot store {}: {e}", file.display());
        let save = |stored: &Stored| durable::write(file, &stored.to_bytes(), 0o600).map_err(failed);
        match (ask, &mut *self) {
            (Ask::Core(request), Self::Voting(acceptor)) => {
                let handled = acceptor.handle(host::now(), &request);
                if handled.save {
                    save(acceptor.stored())?;
                }
                Ok(Reply::Core(handled.answer))
            }
            (Ask::Core(_), _) => Ok(Reply::Refused(format!("no vote of module {module} is kept here"))),
            (Ask::Who | Ask::Make, Self::Voting(acceptor)) => Ok(Reply::Id(Some(acceptor.stored().acceptor))),
            (Ask::Who, _) => Ok(Reply::Id(None)),
            (Ask::Make, _) => {
                let id = AcceptorId(host::random());
                let stored = Stored::new(module, id);
                save(&stored)?;
                *self = Self::Voting(Box::new(Acceptor::new(stored, host::now())));
                Ok(Reply::Id(Some(id)))
            }
            (Ask::Forget, _) => {
                durable::remove(file).map_err(failed)?;
                *self = Self::Absent;
                Ok(Reply::Id(None))
            }
        }
    }

    fn read(file: &Path, module: ModuleId) -> Result<Self, String> {
        let bytes = match std::fs::read(file) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Self::Absent),
            Err(e) => return Err(format!("cannot read {}: {e}", file.display())),
        };
        let stored = Stored::from_bytes(&bytes).map_err(|e| {
            format!(
                "{}: {e}. Where it cannot be restored, remove it: this acceptor then comes back as a new voter",
                file.display()
            )
        })?;
        if stored.module != module {
            return Err(format!("{} belongs to module {}", file.display(), stored.module));
        }
        Ok(Self::Voting(Box::new(Acceptor::new(stored, host::now()))))
    }
}
