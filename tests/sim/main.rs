//! The simulator of the replica core.
mod control;
mod disk;
mod faults;
mod guest;
mod net;
mod scenarios;
mod verify;
mod world;

use faults::Faults;
use std::panic::{AssertUnwindSafe, catch_unwind};
use vmtwin_core::replica::Rule;
use vmtwin_tests::{replay_command, seeds, trace_wanted};
use world::{MS, SECOND, World};

/// One run: a world, what is done to it, and that it comes to rest well; the panic's text where it does not.
fn attempt(seed: u64, rule: Option<Rule>, faults: Faults, story: impl FnOnce(&mut World)) -> Result<World, String> {
    let mut world = World::new(seed, rule, faults);
    match catch_unwind(AssertUnwindSafe(|| story(&mut world))) {
        Ok(()) => Ok(world),
        Err(panic) => {
            world.print_trace();
            let text = panic.downcast_ref::<String>().cloned();
            Err(text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned())).unwrap_or_default())
        }
    }
}

/// A guest of its own kind, faults for a while, rest.
fn random_run(seed: u64, rule: Option<Rule>, faults: Faults, arrange: fn(&mut World)) -> Result<World, String> {
    attempt(seed, rule, faults, |world| {
        world.depth = *world.rng.pick(&[1, 3, 8]);
        world.guest.flushes = world.rng.chance(600);
        arrange(world);
        let span = world.rng.between(4, 16);
        world.run_until(span * SECOND);
        world.settle();
    })
}

/// What every run has to do, with the command that runs a failed one again.
fn all_seeds(test: &str, count: u64, faults: Faults, arrange: fn(&mut World)) -> (u64, u64) {
    let (mut answered, mut joins) = (0, 0);
    for seed in seeds(count) {
        match random_run(seed, None, faults, arrange) {
            Ok(world) => (answered, joins) = (answered + world.guest.acknowledged, joins + world.joins),
            Err(why) => panic!("seed {seed}: {why}\n{}", replay_command("sim", test, seed)),
        }
    }
    println!("{test}: {answered} requests answered, {joins} joins proposed");
    (answered, joins)
}

#[test]
fn nothing_is_lost() {
    let (answered, joins) = all_seeds("nothing_is_lost", 250, Faults::ALL, |_| {});
    assert!(trace_wanted() || answered > 50_000 && joins > 100, "the runs do something: {answered}, {joins}");
}

#[test]
fn a_log_that_runs_full_holds_up_nothing_and_loses_nothing() {
    // 1350 extents, 1024 slots; no flush of the guest's own.
    let faults = Faults { every: 4 * SECOND, ..Faults::ALL };
    all_seeds("a_log_that_runs_full_holds_up_nothing_and_loses_nothing", 12, faults, |world| {
        world.guest.spread(450, 2);
        world.guest.writes_only = true;
        (world.depth, world.pace) = (8, 2 * MS);
    });
}

/// Shows that the simulator notices that a rule is off, within `most` seeds.
fn found(most: u64, rule: Option<Rule>, faults: Faults, arrange: fn(&mut World)) {
    let found = (1..=most).find_map(|seed| random_run(seed, rule, faults, arrange).err().map(|why| (seed, why)));
    let (seed, why) = found.unwrap_or_else(|| panic!("{rule:?} off: not noticed within {most} seeds"));
    println!("{rule:?} off, seed {seed} of {most}: {why:.160}");
}

const CRASHES: Faults = Faults { every: 3 * SECOND, kill: true, power: true, ..Faults::NONE };

fn scattered(world: &mut World) {
    world.guest.spread(150, 2);
    world.guest.writes_only = true;
}

#[test]
fn acknowledging_early_is_noticed() {
    found(30, Some(Rule::Acknowledge), Faults::ALL, |_| {});
}

#[test]
fn skipping_the_activity_log_is_noticed() {
    found(250, Some(Rule::Log), CRASHES, scattered);
}

#[test]
fn forgetting_unflushed_writes_is_noticed() {
    found(50, Some(Rule::Unflushed), CRASHES, scattered);
}

#[test]
fn letting_overlapping_writes_pass_is_noticed() {
    found(100, Some(Rule::Overlap), Faults::NONE, |world| world.depth = 8);
}

#[test]
fn believing_frames_of_an_old_session_is_noticed() {
    let flaps = Faults { every: 300 * MS, flap: true, pause: true, ..Faults::NONE };
    found(200, Some(Rule::Session), flaps, |world| world.depth = 8);
}

#[test]
fn joining_before_all_is_equal_is_noticed() {
    found(30, Some(Rule::JoinEqual), Faults::ALL, |_| {});
}

#[test]
fn acknowledging_alone_before_the_drop_is_known_is_noticed() {
    let isolated = Faults { every: 3 * SECOND, isolate: true, ..Faults::NONE };
    found(100, Some(Rule::DropKnown), isolated, |_| {});
}

#[test]
fn a_follower_that_does_not_flush_is_noticed() {
    let power = Faults { every: 1500 * MS, power: true, ..Faults::NONE };
    found(120, Some(Rule::FollowerFlush), power, |world| world.guest.flushes = true);
}

#[test]
fn data_from_old_to_new_is_noticed() {
    found(30, None, Faults::ALL, |world| world.register.anyone_takes_over = true);
}
