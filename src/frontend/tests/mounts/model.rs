//! The same operations on the mount and on a plain directory: what they answer, and what is there afterwards, is equal.
use crate::harness::{World, world};
use crate::lives::{Side, live, seeds, tree};
use crate::server::Config;
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::Duration;

fn same_trees(world: &World) {
    let mut trees = [&world.at, &world.model, &world.back].map(|root| {
        let mut found = BTreeMap::new();
        tree(root, Path::new(""), &mut found);
        found
    });
    for ((name, mount), model) in trees[0].iter().zip(trees[1].values()) {
        assert_eq!(mount.0, model.0, "{name:?}");
        assert!(mount.1 == model.1, "the content of {name:?} differs");
    }
    let names = trees.each_mut().map(|t| t.keys().cloned().collect::<Vec<_>>());
    assert_eq!(names[0], names[1]);
    assert!(trees[0] == trees[2], "the mount does not show what is below it");
}

fn run(seed: u64, steps: usize, config: Config, direct: bool) {
    let Some(world) = world(config) else { return };
    live(seed, steps, Side::new(&world.at, direct), Side::new(&world.model, false));
    same_trees(&world);
}

#[test]
fn a_random_life_is_the_same_as_on_a_plain_directory() {
    for seed in seeds(&[1, 2, 3]) {
        run(seed, 1500, Config::default(), false);
    }
}

#[test]
fn direct_io_of_any_alignment_is_the_same_as_on_a_plain_directory() {
    for seed in seeds(&[4, 5]) {
        run(seed, 1500, Config::default(), true);
    }
}

#[test]
fn lives_side_by_side_do_not_touch_each_other() {
    let Some(world) = world(Config { slots: 16, ..Config::default() }) else { return };
    std::thread::scope(|scope| {
        for seed in seeds(&[11, 12, 13, 14]) {
            let [at, model] = [&world.at, &world.model].map(|root| root.join(seed.to_string()));
            [&at, &model].into_iter().for_each(|folder| fs::create_dir(folder).unwrap());
            scope.spawn(move || live(seed, 600, Side::new(&at, seed % 2 == 0), Side::new(&model, false)));
        }
    });
    same_trees(&world);
}

#[test]
fn readdirplus_and_answers_that_stay_valid_show_the_same() {
    for seed in seeds(&[6, 7]) {
        run(seed, 1500, Config { valid: Duration::from_secs(60), readdirplus: true, ..Config::default() }, false);
    }
}
