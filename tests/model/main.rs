//! The model check of the arbiter: the product's own `Arbiter` and `Acceptor`, explored in every order of what may happen.
//!
//! A space is bounded by how often each thing may happen and by the highest number of a ballot, and is explored to its end.
//! With all rules on, no state of it may break a property; with a rule off, one has to. Left to `tests/sim_arbiter`: rules that
//! need reads or more events than fit (a majority's reads, a process that proves its record by a round, acceptance settles),
//! that only liveness rests on (write back, one-way cut, a broken node waits), or a restored witness (some are not noticed).
//! Epochs have no switch: an acceptor refuses an older one, and nothing here makes a newer.
//! `VMTWIN_MODEL_MORE=n` adds n to the bounds of the first test: minutes, then hours.
#![forbid(unsafe_code)]
mod checker;
mod world;

use checker::explore;
use vmtwin_core::arbiter::rules::{Rule, Rules};
use world::{Left, NOTHING, Sabotage, Space};

/// Half a lease on each clock.
const EVEN: [u64; 3] = [500; 3];
/// The holder's clock is slow by the whole margin: 50 ms in a lease.
const SLOW_HOLDER: [u64; 3] = [475, 500, 500];

const NONE: Left = Left {
    passes: 0,
    takeovers: 0,
    drops: 0,
    joins: 0,
    releases: 0,
    writes: 0,
    kills: 0,
    powers: 0,
    keeps: 0,
    late: 0,
    repeats: 0,
};
/// The lease of a holder that is cut off runs out, and the other node asks once.
const TAKEOVER: Left = Left { passes: 2, takeovers: 1, ..NONE };

/// Both in sync; the nodes reach the witness, not each other's `keep`.
const IN_SYNC: Space = Space {
    holder: 0,
    in_sync: true,
    clocks: SLOW_HOLDER,
    left: TAKEOVER,
    ballots: 5,
    reaches: [false; 2],
    renews: true,
    reads: false,
    off: NOTHING,
};
/// The second node is out.
const ALONE: Space = Space { in_sync: false, ..IN_SYNC };
/// The holder reaches all three acceptors; its renewals are lost.
const THREE: Space = Space { holder: 1, reaches: [false, true], clocks: EVEN, ballots: 4, renews: false, ..IN_SYNC };

fn more(space: Space) -> Space {
    let more = std::env::var("VMTWIN_MODEL_MORE").map_or(0, |n| n.parse().expect("a small number"));
    let Left { passes, takeovers, writes, .. } = space.left;
    let left = Left { passes: passes + more, takeovers: takeovers + more, writes: writes + more, ..space.left };
    Space { left, ballots: space.ballots + u64::from(more), ..space }
}

#[test]
fn no_state_breaks_a_property_while_all_rules_are_kept() {
    let spaces = [
        ("every change", Space { left: Left { drops: 1, joins: 1, releases: 1, writes: 1, ..TAKEOVER }, ..IN_SYNC }),
        ("back and forth", Space { left: Left { passes: 3, takeovers: 2, writes: 2, ..NONE }, ..IN_SYNC }),
        ("from alone", Space { left: Left { joins: 1, drops: 1, writes: 1, ..TAKEOVER }, ..ALONE }),
        ("process killed", Space { left: Left { kills: 1, writes: 1, ..TAKEOVER }, clocks: EVEN, ..IN_SYNC }),
        ("power lost", Space { left: Left { powers: 1, writes: 1, ..TAKEOVER }, clocks: EVEN, ballots: 4, ..IN_SYNC }),
        ("late and twice", Space { left: Left { keeps: 1, late: 1, repeats: 1, ..TAKEOVER }, ballots: 4, ..IN_SYNC }),
        ("three acceptors", Space { left: Left { drops: 1, writes: 1, ..TAKEOVER }, ..THREE }),
    ];
    let mut reached = std::collections::BTreeSet::new();
    let (mut states, mut depth) = (0, 0);
    for (name, space) in spaces.map(|(name, space)| (name, more(space))) {
        let report = explore(space);
        println!("{name}: {} states, depth {}, reached {:?}", report.states, report.depth, report.reached);
        assert!(report.broken.is_none(), "{name}: {:?}, in {space:?}", report.broken);
        states += report.states;
        depth = depth.max(report.depth);
        reached.extend(report.reached);
    }
    println!("states: {states} unique, depth {depth}");
    assert_eq!(Vec::from_iter(reached), ["drop", "hand-over", "join", "takeover"]);
}

#[test]
fn without_a_rule_a_state_breaks_a_property() {
    let off = |rules: &[Rule]| {
        let rules = rules.iter().fold(Rules::ALL, |left, rule| left.without(*rule));
        Sabotage { rules, ..NOTHING }
    };
    let table = [
        ("clocks beyond the margin", NOTHING, Space { clocks: [450, 500, 500], ..IN_SYNC }),
        ("R1 under grants", off(&[Rule::NoPromiseUnderGrant, Rule::NoAcceptUnderGrant]), IN_SYNC),
        ("R1 under promises", off(&[Rule::NoGrantUnderPromise, Rule::NoAcceptUnderGrant]), IN_SYNC),
        ("R1 guard", off(&[Rule::GuardAfterStart]), Space { left: Left { keeps: 1, ..TAKEOVER }, ..IN_SYNC }),
        (
            "R1 counted from sending",
            off(&[Rule::LeaseFromSend]),
            Space { left: Left { passes: 3, late: 1, ..TAKEOVER }, ..IN_SYNC },
        ),
        (
            "R1 release names its reign",
            off(&[Rule::ReleaseNamesReign]),
            Space { left: Left { releases: 2, ..TAKEOVER }, ballots: 6, clocks: EVEN, ..IN_SYNC },
        ),
        (
            "R3",
            Sabotage { acknowledges_before_drop_is_known: true, ..NOTHING },
            Space { left: Left { drops: 1, writes: 1, ..TAKEOVER }, ..IN_SYNC },
        ),
        ("R4 alone", off(&[Rule::TakeoverAlone]), Space { left: Left { writes: 1, ..TAKEOVER }, ..IN_SYNC }),
        ("R4 broken", off(&[Rule::BrokenProposes]), Space { left: Left { powers: 1, writes: 1, ..NONE }, ..IN_SYNC }),
        (
            "R5",
            Sabotage { joins_unequal: true, ..NOTHING },
            Space { left: Left { joins: 1, writes: 1, ..TAKEOVER }, ..ALONE },
        ),
        (
            "R6",
            Sabotage { copies_the_newer: true, ..NOTHING },
            Space { left: Left { joins: 1, writes: 1, ..TAKEOVER }, clocks: EVEN, ..IN_SYNC },
        ),
        (
            "R7",
            Sabotage { takes_any_frame: true, ..NOTHING },
            Space { left: Left { writes: 2, ..TAKEOVER }, clocks: EVEN, ..IN_SYNC },
        ),
        (
            "R9 join",
            Sabotage { join_counts_when_known: true, ..NOTHING },
            Space { left: Left { joins: 1, writes: 1, ..TAKEOVER }, ..ALONE },
        ),
        (
            "R9 unknown",
            off(&[Rule::OutcomeUnknown]),
            Space {
                left: Left { joins: 1, writes: 1, kills: 1, late: 1, ..TAKEOVER },
                ballots: 4,
                renews: false,
                clocks: EVEN,
                ..ALONE
            },
        ),
        (
            "R12 promise raised",
            off(&[Rule::AcceptRaisesPromise]),
            // A whole lease at a time: it ends, a round fails, and it is tried again.
            Space { left: Left { passes: 3, drops: 1, ..TAKEOVER }, clocks: [1000; 3], ..THREE },
        ),
        (
            "R12 promise kept",
            Sabotage { promise_lost_in_restart: true, ..NOTHING },
            Space { left: Left { drops: 1, keeps: 1, ..TAKEOVER }, ..THREE },
        ),
        (
            "R12 equal ballots",
            off(&[Rule::OwnPromiseFirst, Rule::PromiseStrictlyHigher]),
            Space { left: Left { drops: 1, ..TAKEOVER }, reaches: [true; 2], ..THREE },
        ),
        ("R12 highest value", off(&[Rule::HighestValueWins]), Space { left: Left { drops: 1, ..TAKEOVER }, ..IN_SYNC }),
    ];
    let mut missed = Vec::new();
    for (name, off, space) in table {
        let report = explore(Space { off, ..space });
        println!("{name}: {} states, {:?}", report.states, report.broken);
        if report.broken.is_none() {
            missed.push(name);
        }
    }
    assert!(missed.is_empty(), "nobody notices {missed:?}");
}
