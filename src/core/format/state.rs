//! What a replica knows about itself over restarts: its file of some hundred bytes to some megabytes.
//!
//! Holds: the last record known here, the durable marks, which boot they are from, how the last stop was. Keeps out: log
//! and map (files of their own).
//! Invariant: a stop counts as clean only on the boot and the files that it was written for; any doubt is suspicion.
//!
//! Body: option of a record · u128 boot id · u8 broken, erred, suspect all · u64 count of file ids given in the
//! generation, u64 that generation · option of count + fingerprints (u64 file, inode, size, i64 ctime seconds, u32 nanos).
use super::{FileKind, FormatError, Owner, open, seal};
use crate::ids::{BootId, FileId, Generation};
use crate::limits::{FILE_BYTES_MAX, FILES_MAX};
use crate::record::Record;
use crate::wire::codec::{DecodeError, Reader, Writer};

/// By what a change of a file that nobody told us of is noticed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fingerprint {
    /// Its number in its file system.
    pub inode: u64,
    /// Length in bytes.
    pub size: u64,
    /// Last change of the inode, seconds.
    pub ctime_seconds: i64,
    /// And nanoseconds.
    pub ctime_nanos: u32,
}

/// The state file of a replica.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct State {
    /// The last record known here.
    pub record: Option<Record>,
    /// The boot on which this was written.
    pub boot: BootId,
    /// R4, as it was found at an earlier start; see `is_broken`.
    pub broken: bool,
    /// R3.
    pub erred: bool,
    /// Everything is to be compared.
    pub suspect_all: bool,
    /// The generation in which ids were given last, and how many (`FileId::made_in`). Durable before an id is used: written
    /// ahead by a block of ids.
    pub ids_given: (Generation, u32),
    /// After a clean stop: the files as they were, by id, ordered. `None` while the module runs.
    pub stopped: Option<Vec<(FileId, Fingerprint)>>,
}

impl State {
    /// A replica that was never used.
    #[must_use]
    pub fn new(boot: BootId) -> Self {
        Self {
            record: None,
            boot,
            broken: false,
            erred: false,
            suspect_all: false,
            ids_given: (Generation(0), 0),
            stopped: None,
        }
    }

    /// R4: whether this replica's host went down without a clean stop since this was written, or earlier.
    #[must_use]
    pub fn is_broken(&self, boot: BootId) -> bool {
        self.broken || (self.boot != boot && self.stopped.is_none())
    }

    /// Files that are not as the clean stop left them, new and lost ones among them. Empty where there was no clean stop:
    /// then log and map say what is suspect.
    #[must_use]
    pub fn changed_while_stopped(&self, now: &[(FileId, Fingerprint)]) -> Vec<FileId> {
        let Some(then) = &self.stopped else { return Vec::new() };
        let then: std::collections::BTreeMap<_, _> = then.iter().copied().collect();
        let now: std::collections::BTreeMap<_, _> = now.iter().copied().collect();
        let mut changed: Vec<FileId> = then.keys().chain(now.keys()).copied().collect();
        changed.sort_unstable();
        changed.dedup();
        changed.retain(|id| then.get(id) != now.get(id));
        changed
    }

    /// The file's bytes.
    #[must_use]
    pub fn encode(&self, owner: Owner, sequence: u64) -> Vec<u8> {
        let mut body = Vec::new();
        let mut out = Writer::new(&mut body);
        out.option(self.record.as_ref(), |out, record| record.encode(out));
        out.u128(self.boot.0);
        out.bool(self.broken);
        out.bool(self.erred);
        out.bool(self.suspect_all);
        out.u64(self.ids_given.0.0);
        out.u32(self.ids_given.1);
        out.option(self.stopped.as_ref(), |out, files| {
            out.list(files, |out, (id, print)| {
                out.u64(id.0);
                out.u64(print.inode);
                out.u64(print.size);
                out.i64(print.ctime_seconds);
                out.u32(print.ctime_nanos);
            });
        });
        seal(FileKind::State, owner, sequence, &body)
    }

    /// Sequence and state.
    ///
    /// # Errors
    /// `FormatError`: the replica must not guess; without its state everything is suspect.
    pub fn decode(owner: Owner, bytes: &[u8]) -> Result<(u64, Self), FormatError> {
        let (sequence, body) = open(FileKind::State, owner, bytes)?;
        let state =
            Self::decode_body(body).map_err(|source| FormatError::Bytes { what: FileKind::State.what(), source })?;
        Ok((sequence, state))
    }

    fn decode_body(body: &[u8]) -> Result<Self, DecodeError> {
        let mut from = Reader::new(body);
        let state = Self {
            record: from.option(Record::decode)?,
            boot: BootId(from.u128()?),
            broken: from.bool()?,
            erred: from.bool()?,
            suspect_all: from.bool()?,
            ids_given: (Generation(from.u64()?), from.u32()?),
            stopped: from.option(|from| {
                from.list(FILES_MAX, |from| {
                    let id = FileId(from.u64()?);
                    let (inode, size) = (from.u64()?, from.u64()?);
                    let (ctime_seconds, ctime_nanos) = (from.i64()?, from.u32()?);
                    Ok((id, Fingerprint { inode, size, ctime_seconds, ctime_nanos }))
                })
            })?,
        };
        let bounded = state.stopped.iter().flatten().all(|(_, print)| print.size <= FILE_BYTES_MAX);
        if !bounded {
            return Err(DecodeError::Bad { what: "fingerprint" });
        }
        from.end()?;
        Ok(state)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::{AcceptorId, ModuleId, RecordId, ReplicaId};
    use proptest::prelude::*;

    const OWNER: Owner = Owner { module: ModuleId(1), replica: ReplicaId(2) };

    fn print(n: u64) -> Fingerprint {
        Fingerprint { inode: n, size: n * 3, ctime_seconds: -5, ctime_nanos: 7 }
    }

    fn state(marks: u8, files: Option<Vec<u64>>) -> State {
        State {
            record: (marks & 1 == 0).then(|| Record::first(RecordId(3), ReplicaId(2), vec![AcceptorId(1)])),
            broken: marks & 2 == 0,
            erred: marks & 4 == 0,
            suspect_all: marks & 8 == 0,
            ids_given: (Generation(u64::from(marks)), 9),
            stopped: files.map(|all| all.into_iter().map(|n| (FileId(n), print(n))).collect()),
            ..State::new(BootId(4))
        }
    }

    #[test]
    fn a_boot_since_the_last_word_breaks_the_replica_unless_it_was_stopped_cleanly() {
        let running = State::new(BootId(1));
        assert!(!running.is_broken(BootId(1)) && running.is_broken(BootId(2)));
        let stopped = State { stopped: Some(Vec::new()), ..running };
        assert!(!stopped.is_broken(BootId(2)));
        assert!(State { broken: true, ..stopped }.is_broken(BootId(1)), "a boot does not mend it");
    }

    #[test]
    fn files_that_somebody_touched_while_stopped_are_named() {
        let state = state(0, Some(vec![2, 3, 4]));
        let touched = Fingerprint { ctime_nanos: 8, ..print(3) };
        let now = [(FileId(2), print(2)), (FileId(3), touched), (FileId(9), print(9))];
        assert_eq!(state.changed_while_stopped(&now), [FileId(3), FileId(4), FileId(9)]);
        assert!(State { stopped: None, ..state }.changed_while_stopped(&now).is_empty());
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]
        #[test]
        fn a_state_reads_back_and_damage_never_panics(
            marks: u8, files in proptest::option::of(proptest::collection::vec(0..1_000u64, 0..9)), at: usize, with: u8
        ) {
            let state = state(marks, files);
            let bytes = state.encode(OWNER, 8);
            prop_assert_eq!(State::decode(OWNER, &bytes), Ok((8, state)));
            let mut body = bytes[super::super::HEADER_BYTES..].to_vec();
            let at = at % body.len();
            body[at] = with;
            let _ = State::decode_body(&body);
            let _ = State::decode_body(&body[..at]);
        }
    }
}
