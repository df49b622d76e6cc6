//! The holder's lease: a majority of grants, each counted from when its renewal was sent.
//!
//! Holds: per acceptor when the last renewal that it granted was sent, and the number of its answer. Keeps out: who the
//! holder is and which record it goes on under.
use crate::ids::AcceptorId;
use crate::limits::DRIFT_MS;
use crate::record::Record;
use crate::time::{Time, millis};
use std::collections::BTreeMap;

#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Grants {
    sent: BTreeMap<AcceptorId, Time>,
    heard: BTreeMap<AcceptorId, u64>,
}

impl Grants {
    /// `from` granted the renewal that was sent at `sent`; late answers to older ones move nothing back.
    pub(super) fn granted(&mut self, from: AcceptorId, sent: Time, number: u64) {
        let last = self.sent.entry(from).or_insert(sent);
        if *last <= sent {
            *last = sent;
            self.heard.insert(from, number);
        }
    }

    /// Number of the last answer of this acceptor that arrived.
    pub(super) fn heard(&self, from: AcceptorId) -> u64 {
        self.heard.get(&from).copied().unwrap_or(0)
    }

    /// Until when a majority of the record's voters holds off everybody else, on this node's clock.
    pub(super) fn end(&self, record: &Record) -> Time {
        let mut sent: Vec<Time> = record.voters.iter().filter_map(|v| self.sent.get(v).copied()).collect();
        sent.sort_unstable_by(|a, b| b.cmp(a));
        let length = millis(u64::from(record.lease_ms).saturating_sub(DRIFT_MS));
        sent.get(record.majority() - 1).map_or(Time(0), |oldest_of_majority| *oldest_of_majority + length)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::{RecordId, ReplicaId};

    #[test]
    fn a_lease_ends_with_the_oldest_grant_of_the_best_majority() {
        let voters: Vec<_> = (1..=3).map(AcceptorId).collect();
        let record = Record::first(RecordId(1), ReplicaId(1), voters.clone());
        let mut grants = Grants::default();
        grants.granted(voters[0], Time::from_millis(5000), 1);
        assert_eq!(grants.end(&record), Time(0), "one of three is no majority");
        grants.granted(AcceptorId(99), Time::from_millis(9000), 1);
        assert_eq!(grants.end(&record), Time(0), "who is no voter does not count");
        grants.granted(voters[1], Time::from_millis(5300), 1);
        assert_eq!(grants.end(&record), Time::from_millis(5950));
        grants.granted(voters[2], Time::from_millis(5200), 1);
        assert_eq!(grants.end(&record), Time::from_millis(6150));
        grants.granted(voters[1], Time::from_millis(4000), 7);
        assert_eq!((grants.end(&record), grants.heard(voters[1])), (Time::from_millis(6150), 1), "late news");
    }
}
