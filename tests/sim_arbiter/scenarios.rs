//! The scenarios of PROTOCOL.md section 5 that are the arbiter's: each holds with all rules on, and fails with its own off.
//!
//! Node 0 is A, the holder; node 1 is B. A scenario runs with several seeds: clocks, delays and the guest differ.
use crate::module::{LinkMessage, Operation};
use crate::world::{Fate, MS, NONE, REPLICAS, SECOND, Sabotage, Seen, WITNESS, World};
use std::cell::Cell;
use std::rc::Rc;
use vmtwin_core::arbiter::message::{Reply, Request};
use vmtwin_core::arbiter::rules::{Rule, Rules};

type Outcome = Result<(), String>;
const SEEDS: std::ops::Range<u64> = 1..9;

/// With all rules it holds for every seed; with the rules off that it is about, it fails for one at least.
fn holds_only_with(rules: &[Rule], scenario: fn(World) -> Outcome) {
    let off = rules.iter().fold(Rules::ALL, |left, rule| left.without(*rule));
    fails_with(Sabotage { rules: off, ..NONE }, scenario);
}

fn fails_with(sabotage: Sabotage, scenario: fn(World) -> Outcome) {
    for seed in SEEDS {
        println!("---- seed {seed}, all rules on");
        if let Err(what) = scenario(World::new(seed, NONE)) {
            panic!("seed {seed}, all rules on: {what}");
        }
    }
    println!("---- {sabotage:?}");
    let fails = SEEDS.filter(|seed| scenario(World::new(*seed, sabotage)).is_err()).count();
    assert!(fails > 0, "nobody notices {sabotage:?}");
}

// ---- R1

#[test]
fn promise_left_then_witness_lost() {
    holds_only_with(&[Rule::WriteBack], |mut world| {
        in_sync(&mut world)?;
        world.cut_both(0, 1);
        world.run(100);
        world.prim(1);
        world.run(1500);
        world.kill_module(1);
        world.start_modules = false;
        world.heal();
        world.run(1500);
        world.power_off(WITNESS);
        world.run(5000);
        goes_on(&world, 0)
    });
}

#[test]
fn restart_forgets_join() {
    // No grant after a higher promise would hold the new process off, too.
    holds_only_with(&[Rule::ProvesByRound, Rule::NoGrantUnderPromise], |mut world| {
        // The join is accepted by the witness only; then A's process is gone.
        let sent = join_only_at(&mut world, WITNESS);
        while !sent.get() {
            world.run(5);
        }
        world.run(25);
        world.kill_module(0);
        // The new one reaches nobody with a round, and reads the record of before from a majority.
        world.filter = Some(Box::new(|from, to, seen| match seen {
            Seen::Link(_) => Fate::Drop,
            Seen::Ask(Request::Prepare { .. } | Request::Accept { .. }) if from == 0 && to != 0 => Fate::Drop,
            _ => Fate::Pass,
        }));
        world.start_module(0);
        world.run(4000);
        world.power_off(0);
        world.run(6000);
        sound(&world)
    });
}

#[test]
fn witness_one_way_cut() {
    holds_only_with(&[Rule::OneWayCut], |mut world| {
        in_sync(&mut world)?;
        // An idle guest: nothing makes A propose.
        world.guest_idle = true;
        world.run(100);
        world.cut_both(0, 1);
        world.cut(WITNESS, 0);
        world.run(12_000);
        world.guest_idle = false;
        world.run(500);
        goes_on(&world, 1)
    });
}

#[test]
fn renew_vs_promise() {
    let scenario = |mut world: World| {
        in_sync(&mut world)?;
        world.cut_both(0, 1);
        world.pause(0);
        world.run(1200);
        world.filter = Some(Box::new(|from, to, seen| match seen {
            Seen::Ask(Request::Accept { .. }) if from == 1 && to == WITNESS => Fate::Hold,
            _ => Fate::Pass,
        }));
        world.prim(1);
        world.run(60);
        world.resume(0);
        world.run(60);
        world.release_held();
        world.run(300);
        sound(&world)
    };
    holds_only_with(&[Rule::NoGrantUnderPromise, Rule::NoAcceptUnderGrant], scenario);
    // Either of the two is enough for safety.
    for rule in [Rule::NoGrantUnderPromise, Rule::NoAcceptUnderGrant] {
        for seed in SEEDS {
            let sabotage = Sabotage { rules: Rules::ALL.without(rule), ..NONE };
            assert_eq!(scenario(World::new(seed, sabotage)), Ok(()), "seed {seed} without {rule:?}");
        }
    }
}

#[test]
fn witness_restart_in_lease() {
    holds_only_with(&[Rule::GuardAfterStart], |mut world| {
        in_sync(&mut world)?;
        world.cut_both(0, 1);
        world.run(1150);
        world.kill_keep(WITNESS);
        world.start_keep(WITNESS);
        world.prim(1);
        world.run(500);
        sound(&world)
    });
}

#[test]
fn b_contends_while_a_renews() {
    holds_only_with(&[Rule::NoPromiseUnderGrant, Rule::NoAcceptUnderGrant], |mut world| {
        in_sync(&mut world)?;
        world.cut_both(0, 1);
        for _ in 0..20 {
            world.prim(1);
            world.run(300);
        }
        if world.truth.rises != 1 {
            return Err("B became holder".to_owned());
        }
        goes_on(&world, 0)?;
        world.heal();
        world.run(8000);
        both_in_sync(&world)
    });
}

#[test]
fn renewal_answered_late() {
    holds_only_with(&[Rule::LeaseFromSend], |mut world| {
        in_sync(&mut world)?;
        let mut renewed = [false; 3];
        world.filter = Some(Box::new(move |from, to, seen| match seen {
            Seen::Ask(Request::Renew { .. }) if from == 0 => {
                if std::mem::replace(&mut renewed[to], true) {
                    Fate::Drop
                } else {
                    Fate::Pass
                }
            }
            Seen::Answer(answer) if to == 0 && matches!(answer.reply, Reply::Granted { .. }) => Fate::Hold,
            _ => Fate::Pass,
        }));
        world.run(1000);
        world.cut_both(0, 1);
        world.cut_both(0, WITNESS);
        world.release_held();
        world.run(400);
        world.prim(1);
        world.run(300);
        sound(&world)
    });
}

#[test]
fn release_arrives_in_the_next_reign() {
    holds_only_with(&[Rule::ReleaseNamesReign], |mut world| {
        in_sync(&mut world)?;
        world.filter = Some(Box::new(|from, to, seen| match seen {
            Seen::Ask(Request::Release { .. }) if from == 0 && to == WITNESS => Fate::Hold,
            Seen::Ask(Request::Release { .. }) => Fate::Drop,
            // B would take over from a holder that is silent for so long.
            Seen::Ask(Request::Prepare { .. }) if from == 1 => Fate::Drop,
            _ => Fate::Pass,
        }));
        world.swap(0);
        world.run(6000);
        goes_on(&world, 0)?;
        world.filter = None;
        world.cut_both(0, 1);
        world.run(1150);
        world.release_held();
        world.run(5);
        world.prim(1);
        world.run(400);
        sound(&world)
    });
}

// ---- R4

#[test]
fn takeover_old_holder_extra_write() {
    holds_only_with(&[Rule::TakeoverAlone], |mut world| {
        in_sync(&mut world)?;
        world.filter = Some(Box::new(|from, _, seen| match seen {
            Seen::Link(LinkMessage::Do { what: Operation::Write { .. }, .. }) if from == 0 => Fate::Drop,
            _ => Fate::Pass,
        }));
        world.run(400);
        world.kill_module(0);
        world.filter = None;
        world.run(5000);
        world.start_module(0);
        world.run(5000);
        goes_on(&world, 1)?;
        both_in_sync(&world)
    });
}

#[test]
fn holder_power_blink() {
    let scenario = |mut world: World| {
        in_sync(&mut world)?;
        world.run(7000);
        world.power_off(0);
        world.run(150);
        world.power_on(0);
        world.run(10_000);
        goes_on(&world, 1)?;
        both_in_sync(&world)
    };
    holds_only_with(&[Rule::BrokenProposes], scenario);
    holds_only_with(&[Rule::BrokenWaits], scenario);
}

#[test]
fn broken_holder_finds_own_join() {
    holds_only_with(&[Rule::BrokenProposes], |mut world| {
        let sent = join_only_at(&mut world, WITNESS);
        world.run(6000);
        assert!(sent.get(), "a join was sent");
        world.filter = None;
        world.power_off(0);
        world.run(100);
        world.power_on(0);
        world.run(12_000);
        sound(&world)?;
        let latest = world.truth.latest().ok_or("no record")?;
        // Whoever goes on does so by a record that it proposed since: never by the join itself.
        if latest.generation.0 == 2 { Err(format!("{latest:?}")) } else { both_in_sync(&world) }
    });
}

// ---- R9

#[test]
fn join_cas_answer_lost() {
    holds_only_with(&[Rule::OutcomeUnknown], |mut world| {
        let sent = Rc::new(Cell::new(false));
        let seen_it = sent.clone();
        world.filter = Some(Box::new(move |from, to, seen| match seen {
            Seen::Ask(Request::Accept { record, .. }) if from == 0 && record.in_sync.len() == 2 => {
                seen_it.set(true);
                Fate::Pass
            }
            Seen::Answer(answer) if to == 0 && seen_it.get() => match answer.reply {
                Reply::Accepted | Reply::State(_) => Fate::Drop,
                _ => Fate::Pass,
            },
            Seen::Link(_) if seen_it.get() => Fate::Drop,
            _ => Fate::Pass,
        }));
        world.run(6000);
        assert!(sent.get(), "a join was sent");
        world.power_off(0);
        world.filter = None;
        world.run(6000);
        sound(&world)
    });
}

#[test]
fn exclude_cas_half_accepted() {
    fails_with(Sabotage { acknowledges_before_drop_is_known: true, ..NONE }, |mut world| {
        in_sync(&mut world)?;
        world.cut_both(0, 1);
        world.filter = Some(Box::new(|from, to, seen| match seen {
            Seen::Ask(Request::Accept { .. }) if from == 0 && to == WITNESS => Fate::Drop,
            _ => Fate::Pass,
        }));
        world.run(5000);
        world.power_off(0);
        world.filter = None;
        world.run(6000);
        goes_on(&world, 1)
    });
}

#[test]
fn round_promised_not_accepted() {
    holds_only_with(&[Rule::AcceptanceSettles], |mut world| {
        let mut sent = false;
        world.filter = Some(Box::new(move |from, to, seen| match seen {
            Seen::Ask(Request::Accept { record, .. }) if from == 0 && record.in_sync.len() == 2 => {
                sent = true;
                if to == 1 { Fate::Hold } else { Fate::Drop }
            }
            // The later round: promised by A's own and the witness, accepted nowhere.
            Seen::Ask(Request::Prepare { .. }) if sent && from == 0 && to == 1 => Fate::Drop,
            Seen::Ask(Request::Accept { .. }) if sent && from == 0 => Fate::Drop,
            Seen::Link(_) if sent => Fate::Drop,
            _ => Fate::Pass,
        }));
        world.run(7000);
        world.power_off(0);
        world.filter = None;
        world.release_held();
        world.run(6000);
        sound(&world)
    });
}

#[test]
fn told_but_not_chosen() {
    holds_only_with(&[Rule::MajorityReads], |mut world| {
        in_sync(&mut world)?;
        world.cut_both(0, 1);
        world.cut_both(1, WITNESS);
        // A's drop of B arrives at the witness only, and its answer nowhere.
        world.filter = Some(Box::new(|from, to, seen| match seen {
            Seen::Ask(Request::Accept { .. }) if from == 0 && to == 0 => Fate::Drop,
            Seen::Answer(answer) if from == WITNESS && answer.reply == Reply::Accepted => Fate::Drop,
            _ => Fate::Pass,
        }));
        world.run(5000);
        world.kill_module(0);
        world.start_modules = false;
        world.power_off(WITNESS);
        world.filter = None;
        world.heal();
        world.run(6000);
        goes_on(&world, 1)
    });
}

// ---- R12

#[test]
fn witness_restored() {
    holds_only_with(&[Rule::ChangeCount], |mut world| {
        in_sync(&mut world)?;
        let copy = world.sites[WITNESS].stored.clone();
        world.cut_both(0, 1);
        world.run(4000);
        world.kill_keep(WITNESS);
        world.sites[WITNESS].stored = copy;
        world.start_keep(WITNESS);
        world.power_off(0);
        world.run(8000);
        sound(&world)
    });
}

#[test]
fn promise_not_raised_at_accept() {
    holds_only_with(&[Rule::AcceptRaisesPromise], late_accept);
}

#[test]
fn promise_forgotten_in_a_restart() {
    fails_with(Sabotage { promise_lost_in_restart: true, ..NONE }, late_accept);
}

/// B's accepts are late. Meanwhile A drops B in a higher ballot that the witness accepts and had not promised, and dies.
fn late_accept(mut world: World) -> Outcome {
    in_sync(&mut world)?;
    world.filter = Some(Box::new(|from, to, seen| match seen {
        Seen::Ask(Request::Accept { .. }) if from == 1 && to == WITNESS => Fate::Hold,
        Seen::Ask(Request::Accept { .. }) if from == 1 => Fate::Drop,
        Seen::Link(_) => Fate::Drop,
        _ => Fate::Pass,
    }));
    world.pause(0);
    world.run(1200);
    world.prim(1);
    world.run(40);
    world.filter = Some(Box::new(|from, to, seen| match seen {
        Seen::Ask(Request::Prepare { .. }) if from == 1 => Fate::Drop,
        Seen::Ask(Request::Prepare { .. }) if from == 0 && to == WITNESS => Fate::Drop,
        Seen::Ask(Request::Accept { .. }) if to == 1 || from == 1 => Fate::Drop,
        Seen::Answer(answer) if to == 1 && matches!(answer.reply, Reply::State(_)) => Fate::Drop,
        Seen::Link(_) => Fate::Drop,
        _ => Fate::Pass,
    }));
    world.resume(0);
    world.run(4000);
    world.power_off(0);
    world.kill_keep(WITNESS);
    world.start_keep(WITNESS);
    world.run(1200);
    world.release_held();
    world.run(50);
    world.filter = None;
    world.run(6000);
    sound(&world)
}

#[test]
fn highest_value_of_the_promises_is_what_counts() {
    holds_only_with(&[Rule::HighestValueWins], |mut world| {
        in_sync(&mut world)?;
        world.cut_both(0, 1);
        // B knows nothing of A's drop: it hears the witness only when it proposes.
        world.filter = Some(Box::new(|from, to, seen| match seen {
            Seen::Answer(answer) if from == WITNESS && to == 1 && matches!(answer.reply, Reply::State(_)) => Fate::Drop,
            _ => Fate::Pass,
        }));
        world.run(4000);
        world.power_off(0);
        world.run(1500);
        world.prim(1);
        world.run(3000);
        sound(&world)
    });
}

// ---- swap: what fails, and when

#[test]
fn swap_moves_the_holder_and_both_stay_in_sync() {
    for mut world in worlds() {
        swap_released(&mut world);
        world.run(2500);
        goes_on(&world, 1).unwrap();
        both_in_sync(&world).unwrap();
        assert_eq!((world.truth.handed_over, world.truth.drops), (1, 0));
    }
}

#[test]
fn swap_fail_src_before_the_release() {
    for mut world in worlds() {
        in_sync(&mut world).unwrap();
        world.swap(0);
        world.run(1);
        world.power_off(0);
        world.run(6000);
        goes_on(&world, 1).unwrap();
    }
}

#[test]
fn swap_fail_src_after_the_release() {
    for mut world in worlds() {
        swap_released(&mut world);
        world.power_off(0);
        world.run(6000);
        goes_on(&world, 1).unwrap();
    }
}

#[test]
fn swap_fail_dst_after_the_release() {
    for mut world in worlds() {
        swap_released(&mut world);
        world.power_off(1);
        world.run(8000);
        goes_on(&world, 0).unwrap();
        world.power_on(1);
        world.run(6000);
        both_in_sync(&world).unwrap();
    }
}

#[test]
fn swap_fail_link_after_the_release() {
    for mut world in worlds() {
        swap_released(&mut world);
        world.cut_both(0, 1);
        world.run(8000);
        sound(&world).unwrap();
        let latest = world.truth.latest().unwrap().holder;
        goes_on(&world, REPLICAS.iter().position(|r| *r == latest).unwrap()).unwrap();
    }
}

// ---- how long it takes

#[test]
fn takeover_takes_about_two_seconds_from_the_kill_of_the_host() {
    let mut took = Vec::new();
    for seed in 1..60 {
        let mut world = World::new(seed, NONE);
        in_sync(&mut world).unwrap();
        world.run(500 + seed * 13);
        world.power_off(0);
        let died = world.now;
        while world.truth.rises == 1 && world.now < died + 10 * SECOND {
            world.run(5);
        }
        took.push((world.now - died) / MS);
        sound(&world).unwrap();
    }
    took.sort_unstable();
    println!("kill to known: {} to {} ms, median {} ms", took[0], took[took.len() - 1], took[took.len() / 2]);
    // This is virtual time: the same on every machine.
    assert!(took[took.len() / 2] <= 1900 && took[took.len() - 1] <= 2300, "{took:?}");
}

// ---- below: how the stories are set up and judged

fn worlds() -> impl Iterator<Item = World> {
    SEEDS.map(|seed| World::new(seed, NONE))
}

fn in_sync(world: &mut World) -> Outcome {
    world.run(3000);
    both_in_sync(world)?;
    goes_on(world, 0)
}

/// A's joins of B reach one acceptor only, and no answer comes back. Tells whether one was sent.
fn join_only_at(world: &mut World, site: usize) -> Rc<Cell<bool>> {
    let sent = Rc::new(Cell::new(false));
    let seen_it = sent.clone();
    world.filter = Some(Box::new(move |from, to, seen| match seen {
        Seen::Ask(Request::Accept { record, .. }) if from == 0 && record.in_sync.len() == 2 => {
            seen_it.set(true);
            if to == site { Fate::Pass } else { Fate::Drop }
        }
        _ => Fate::Pass,
    }));
    sent
}

fn swap_released(world: &mut World) {
    in_sync(world).unwrap();
    world.swap(0);
    let mut steps = 0;
    while world.is_holder(0) {
        world.run(1);
        steps += 1;
        assert!(steps < 5000, "no release came");
    }
}

fn sound(world: &World) -> Outcome {
    world.truth.violation.clone().map_or(Ok(()), Err)
}

/// Writes are acknowledged, and `node` is the holder.
fn goes_on(world: &World, node: usize) -> Outcome {
    sound(world)?;
    let quiet = (world.now - world.truth.last_acknowledged) / MS;
    if quiet > 1500 {
        return Err(format!("no write was acknowledged for {quiet} ms"));
    }
    if !world.is_holder(node) {
        return Err(format!("node {node} is not the holder"));
    }
    Ok(())
}

fn both_in_sync(world: &World) -> Outcome {
    sound(world)?;
    match world.truth.latest() {
        Some(record) if record.in_sync.len() == 2 => Ok(()),
        other => Err(format!("not in sync: {other:?}")),
    }
}
