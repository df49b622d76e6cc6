//! What must never be, judged from outside with true time and a memory that no fault touches.
use crate::world::MS;
use std::collections::{BTreeMap, BTreeSet};
use vmtwin_core::ids::{Epoch, Generation, RecordId};
use vmtwin_core::record::Record;

pub const BLOCKS: usize = 3;
pub type Blocks = [u64; BLOCKS];

/// What the guest was told, and who may run it.
#[derive(Debug, Default)]
pub struct Truth {
    /// What the running guest sees.
    visible: Blocks,
    /// The last acknowledged write of each block.
    acked: Blocks,
    /// Written by a guest that may be gone, never acknowledged: may be found or not.
    maybe: Vec<(usize, u64)>,
    /// Writes that a takeover found, unacknowledged. An answer that the old guest still gets for one is no lie.
    survived: BTreeSet<u64>,
    /// Per block, everything written since the last acknowledged flush: what a disk that lost power may show.
    history: [Vec<u64>; BLOCKS],
    /// The record of each generation that somebody knew.
    names: BTreeMap<(Epoch, Generation), RecordId>,
    latest: Option<Record>,
    before: Option<Record>,
    /// When each node's lease ends, in true time.
    lease_end: [u64; 2],
    pub violation: Option<String>,
    pub writes_acknowledged: u64,
    pub last_acknowledged: u64,
    pub rises: u64,
    pub handed_over: u64,
    pub joins: u64,
    pub drops: u64,
}

/// How a node that becomes holder stands.
pub struct Riser {
    pub node: usize,
    pub blocks: Blocks,
    /// Its replica was broken until now.
    pub broken: bool,
    /// The other node is in sync, unbroken, and has been there and reachable for long.
    pub other_was_there: bool,
}

impl Truth {
    pub fn violate(&mut self, now: u64, what: String) {
        self.violation.get_or_insert_with(|| format!("at {} ms: {what}", now / MS));
    }

    /// Somebody knows this record: no two of one generation.
    pub fn known(&mut self, now: u64, record: &Record) {
        let key = (record.epoch, record.generation);
        let first = *self.names.entry(key).or_insert(record.id);
        if first != record.id {
            self.violate(now, format!("two records of generation {}: {first:?} and {:?}", key.1, record.id));
        }
        let newer = self.latest.as_ref().is_none_or(|latest| record.is_newer_than(latest));
        if newer {
            match &self.latest {
                Some(old) if old.holder != record.holder && record.in_sync.len() == 2 => self.handed_over += 1,
                Some(old) if old.holder == record.holder && old.in_sync.len() < record.in_sync.len() => self.joins += 1,
                Some(old) if old.holder == record.holder && old.in_sync.len() > record.in_sync.len() => self.drops += 1,
                _ => {}
            }
            self.before = self.latest.replace(record.clone());
        }
    }

    pub fn latest(&self) -> Option<&Record> {
        self.latest.as_ref()
    }

    /// The record before the latest.
    pub fn before_latest(&self) -> Option<&Record> {
        self.before.as_ref()
    }

    /// A node counts on a lease until then: no two at a time.
    pub fn lease(&mut self, node: usize, now: u64, until: u64) {
        let other = self.lease_end[1 - node];
        if until > now && other > now {
            self.violate(
                now,
                format!("node {node} has a lease while that of the other lasts {} us", (other - now) / 1000),
            );
        }
        self.lease_end[node] = until;
    }

    pub fn lease_over(&mut self, node: usize, now: u64) {
        self.lease_end[node] = self.lease_end[node].min(now);
    }

    /// A node became holder and starts the guest on what it has.
    pub fn rise(&mut self, now: u64, riser: &Riser) {
        self.rises += 1;
        for block in 0..BLOCKS {
            let found = riser.blocks[block];
            if found == self.acked[block] || self.maybe.contains(&(block, found)) {
                continue;
            }
            let unflushed = riser.broken && self.history[block].contains(&found) && !riser.other_was_there;
            if !unflushed {
                let acked = self.acked[block];
                let (node, maybe) = (riser.node, &self.maybe);
                self.violate(
                    now,
                    format!("node {node} becomes holder with {found} in block {block}: {acked} was acknowledged, {maybe:?} written"),
                );
            }
            self.acked[block] = found;
        }
        self.visible = riser.blocks;
        self.survived.extend(riser.blocks);
    }

    /// A node became holder and kept the other one in sync.
    pub fn taken_for_equal(&mut self, now: u64, one: &Blocks, other: &Blocks) {
        if one != other {
            self.violate(now, format!("both are in sync, with {one:?} here and {other:?} there"));
        }
    }

    /// What the guest sees is on every replica in sync: it is what counts from here on.
    pub fn settled(&mut self) {
        self.acked = self.visible;
        self.maybe.clear();
    }

    /// The guest is let through: it sees what it saw before.
    pub fn admitted(&mut self, now: u64, node: usize, blocks: &Blocks) {
        if *blocks != self.visible {
            let seen = self.visible;
            self.violate(now, format!("the guest on node {node} finds {blocks:?} where {seen:?} is right"));
        }
    }

    pub fn written(&mut self, block: usize, stamp: u64) {
        self.maybe.push((block, stamp));
        self.history[block].push(stamp);
        self.visible[block] = stamp;
    }

    pub fn acknowledged(&mut self, now: u64, block: usize, stamp: u64) {
        if self.visible[block] != stamp || !self.maybe.contains(&(block, stamp)) {
            if !self.survived.contains(&stamp) {
                self.violate(now, format!("acknowledges write {stamp}, which a takeover did not find"));
            }
            return;
        }
        self.acked[block] = stamp;
        self.maybe.retain(|(b, _)| *b != block);
        self.writes_acknowledged += 1;
        self.last_acknowledged = now;
    }

    pub fn flushed(&mut self) {
        for block in 0..BLOCKS {
            self.history[block] = vec![self.acked[block]];
        }
    }
}
