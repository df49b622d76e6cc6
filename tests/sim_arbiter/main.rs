//! The simulator of the arbiter: two nodes, a witness, their clocks, a network, and every fault at any time.
#![forbid(unsafe_code)]
mod check;
mod module;
mod world;

use vmtwin_core::arbiter::rules::{Rule, Rules};
use vmtwin_tests::{replay_command, seeds};
use world::{NONE, SECOND, Sabotage, World};

/// Runs of the whole, with all rules on.
const SEEDS: u64 = 300;

/// One run: faults for a while, then quiet. What must never be is checked all along, what must come in the end, then.
fn run(seed: u64, sabotage: Sabotage) -> Result<World, String> {
    let mut world = World::new(seed, sabotage);
    world.run(3000);
    world.with_faults(30_000);
    // The last fault may last 7 s; a broken node waits for 5 s, then copies.
    world.run(37_000 + 15_000);
    if let Some(what) = &world.truth.violation {
        return Err(what.clone());
    }
    let quiet = world.now - world.truth.last_acknowledged;
    if quiet > 2 * SECOND {
        return Err(format!("faults ended long ago, and no write was acknowledged for {} ms", quiet / world::MS));
    }
    let latest = world.truth.latest().expect("there was a first record");
    if latest.in_sync.len() != 2 {
        return Err(format!("faults ended long ago, and the nodes are not in sync: {latest:?}"));
    }
    Ok(world)
}

#[test]
fn nothing_is_lost_and_nobody_runs_twice_under_any_faults() {
    let test = "nothing_is_lost_and_nobody_runs_twice_under_any_faults";
    let (mut rises, mut handed_over, mut joins, mut drops, mut writes) = (0, 0, 0, 0, 0);
    for seed in seeds(SEEDS) {
        match run(seed, NONE) {
            Ok(world) => {
                rises += world.truth.rises;
                handed_over += world.truth.handed_over;
                joins += world.truth.joins;
                drops += world.truth.drops;
                writes += world.truth.writes_acknowledged;
            }
            Err(what) => panic!("seed {seed}: {what}\nreplay: {}", replay_command("sim_arbiter", test, seed)),
        }
    }
    println!("{writes} writes, {rises} starts of the VM, {handed_over} hand-overs, {joins} joins, {drops} drops");
}

#[test]
fn probe() {
    let rule = |r: &[Rule]| Sabotage { rules: r.iter().fold(Rules::ALL, |all, r| all.without(*r)), ..NONE };
    use Rule as R;
    let all: Vec<(String, Sabotage)> = vec![
        vec![R::NoPromiseUnderGrant], vec![R::NoAcceptUnderGrant], vec![R::NoPromiseUnderGrant, R::NoAcceptUnderGrant],
        vec![R::NoGrantUnderPromise], vec![R::NoGrantUnderPromise, R::NoAcceptUnderGrant], vec![R::GuardAfterStart], vec![R::OneWayCut], vec![R::ReleaseNamesReign], vec![R::LeaseFromSend], vec![R::WriteBack],
        vec![R::TakeoverAlone], vec![R::BrokenProposes], vec![R::BrokenWaits], vec![R::OutcomeUnknown], vec![R::OwnPromiseFirst], vec![R::PromiseStrictlyHigher], vec![R::OwnPromiseFirst, R::PromiseStrictlyHigher],
        vec![R::AcceptRaisesPromise], vec![R::ChangeCount], vec![R::HighestValueWins],
    ].into_iter().map(|r| (format!("{r:?}"), rule(&r))).chain([
        ("ack before drop".to_owned(), Sabotage { acknowledges_before_drop_is_known: true, ..NONE }),
        ("promise lost".to_owned(), Sabotage { promise_lost_in_restart: true, ..NONE }),
        ("no drain".to_owned(), Sabotage { takes_writes_while_it_proposes: true, ..NONE }),
    ]).collect();
    for (name, sabotage) in all {
        let mut found = Vec::new();
        for seed in seeds(300) {
            let outcome = std::panic::catch_unwind(|| run(seed, sabotage).err());
            let why = match outcome { Ok(None) => continue, Ok(Some(why)) => why, Err(_) => "panic".to_owned() };
            found.push((seed, why));
        }
        println!("{name}: {} {:?}", found.len(), found.iter().take(2).collect::<Vec<_>>());
    }
}
