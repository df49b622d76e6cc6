//! The stories of PROTOCOL.md, section 5, as far as they need no diskless holder: each ends well, and does not with its rule
//! off. Chance is left only in delays and in what a power loss takes, so a story is told with a few seeds.
use super::attempt;
use super::disk::SECTOR;
use super::faults::Faults;
use super::guest::FILES;
use super::world::{Happens, MS, SECOND, World, replica_of};
use vmtwin_core::ids::FileId;
use vmtwin_core::limits::SLOW_PEER_MS;
use vmtwin_core::namespace::Errno;
use vmtwin_core::replica::{IDLE_GRACE_MS, Rule};

const SEEDS: u64 = 12;
const F: FileId = FILES[0];

/// The story ends well with every seed; with the rule off, not with all.
fn tell(rule: Option<Rule>, story: fn(&mut World)) {
    for seed in 1..=SEEDS {
        if let Err(why) = attempt(seed, None, Faults::NONE, story) {
            panic!("seed {seed}: {why}");
        }
    }
    if let Some(rule) = rule {
        let noticed = (1..=SEEDS * 4).find(|seed| attempt(*seed, Some(rule), Faults::NONE, story).is_err());
        assert!(noticed.is_some(), "{rule:?} off is not noticed");
    }
}

impl World {
    fn run_for(&mut self, span: u64) {
        self.run_until(self.now + span);
    }

    fn run_while(&mut self, what: &str, goes_on: impl Fn(&World) -> bool) {
        let deadline = self.now + 60 * SECOND;
        while goes_on(self) {
            assert!(self.now < deadline, "{what} takes too long: {}", self.describe());
            self.run_for(5 * MS);
        }
    }

    /// The VM runs on n0, both in sync, and nothing is asked but what the story asks.
    fn green_and_idle(&mut self) {
        self.depth = 0;
        self.run_while("the start", |world| !world.is_green());
        self.run_for(20 * MS);
    }

    fn write(&mut self, sector: u64, count: u64) {
        let node = self.guest.node.expect("a VM runs");
        let ask = self.guest.write(self.now, F, sector, count);
        self.ask(node, ask);
    }

    fn flush(&mut self) {
        let node = self.guest.node.expect("a VM runs");
        let ask = self.guest.flush(Some(F));
        self.ask(node, ask);
    }

    fn answered(&mut self) {
        self.run_while("an answer", |world| world.guest.in_hand() > 0);
    }

    fn vm_on(&mut self, node: usize) {
        self.run_while("the takeover", |world| world.guest.node != Some(node));
    }

    fn both_in_sync(&mut self) {
        self.run_while("the join", |world| world.register.record.in_sync.len() < 2);
        self.run_for(200 * MS);
    }

    fn peer_out(&mut self) {
        self.run_while("the drop", |world| world.register.record.in_sync.len() > 1);
    }
}

#[test]
fn local_eio_then_link_cut() {
    // R3: n0's disk fails; before anything is decided the link is cut. n0 may not drop n1 and go on.
    tell(None, |world| {
        world.green_and_idle();
        world.write(0, 4);
        world.answered();
        world.fail_disk(0, Errno::EIO);
        world.write(512, 4);
        world.run_for(3 * MS);
        world.cut();
        world.vm_on(1);
        assert!(world.register.record.in_sync == [replica_of(1)], "the failed disk is out");
        world.settle();
    });
}

#[test]
fn a_full_disk_of_the_holder_hands_over_and_errs_nobody() {
    tell(None, |world| {
        world.green_and_idle();
        world.fail_disk(0, Errno::ENOSPC);
        world.write(0, 4);
        world.vm_on(1);
        world.settle();
    });
}

#[test]
fn last_replica_fsync_fails() {
    // R3: where there is no other, the flush is held, not answered, and the replica goes on after a restart.
    tell(None, |world| {
        world.green_and_idle();
        world.kill(1);
        world.write(0, 2);
        world.peer_out();
        world.answered();
        world.fail_disk(0, Errno::EIO);
        world.flush();
        world.run_for(5 * SECOND);
        assert_eq!(world.guest.in_hand(), 1, "a failed flush is not answered");
        assert!(world.nodes[0].disk.marks.broken && !world.nodes[0].disk.marks.erred);
        world.settle();
    });
}

#[test]
fn a_peer_that_holds_up_a_write_is_dropped_and_nothing_is_answered_before() {
    tell(Some(Rule::Acknowledge), |world| {
        world.green_and_idle();
        world.net.slow_ns = 20 * SECOND;
        world.write(0, 2);
        world.run_for((SLOW_PEER_MS - 500) * MS);
        assert_eq!(world.guest.in_hand(), 1, "the peer has not got it and is in sync");
        world.peer_out();
        world.answered();
        world.settle();
    });
}

#[test]
fn a_holder_whose_guest_idles_drops_a_peer_that_stays_away() {
    tell(None, |world| {
        world.green_and_idle();
        world.cut();
        world.run_for((IDLE_GRACE_MS - 500) * MS);
        assert!(world.register.record.in_sync.len() > 1, "not before the grace is over");
        world.peer_out();
        assert_eq!(world.register.record.in_sync, [replica_of(0)]);
        world.settle();
    });
}

#[test]
fn a_link_that_blinks_under_an_idle_guest_costs_no_resync() {
    tell(None, |world| {
        world.green_and_idle();
        let generation = world.register.record.generation;
        world.break_connection();
        world.run_for(2 * IDLE_GRACE_MS * MS);
        assert_eq!(world.register.record.generation, generation);
        world.settle();
    });
}

#[test]
fn second_power_blink_idle() {
    // R5: n1 power-cycles while the guest idles; the guest flushes; n1's fdatasync succeeds without the lost write; n0 dies.
    tell(Some(Rule::Unflushed), |world| {
        world.green_and_idle();
        for sector in 0..8 {
            world.write(sector * 512, 2);
        }
        world.answered();
        world.power_loss(1);
        world.at(100 * MS, Happens::Boot(1));
        world.run_for(2 * SECOND);
        world.flush();
        world.answered();
        world.both_in_sync();
        world.power_loss(0);
        world.vm_on(1);
        world.settle();
    });
}

#[test]
fn join_both_power_loss() {
    // R5: n1 took over with writes of its follower's days unflushed; n0 joins, its log is cleared; n1 loses its power.
    tell(Some(Rule::JoinFlush), |world| {
        world.green_and_idle();
        for sector in 0..6 {
            world.write(sector * 512, 4);
        }
        world.answered();
        world.kill(0);
        world.vm_on(1);
        world.at(0, Happens::Boot(0));
        world.both_in_sync();
        world.power_loss(1);
        world.vm_on(0);
        world.at(0, Happens::Boot(1));
        world.settle();
    });
}

#[test]
fn join_with_unmirrored_write() {
    // R5: the guest writes all through the resync.
    tell(Some(Rule::JoinEqual), |world| {
        world.green_and_idle();
        world.kill(1);
        world.depth = 8;
        world.peer_out();
        world.run_for(2 * SECOND);
        world.at(0, Happens::Boot(1));
        world.both_in_sync();
        world.kill(0);
        world.vm_on(1);
        world.settle();
    });
}

#[test]
fn takeover_peer_write_in_ring() {
    // R7: n1 has n0's write in its ring when it takes over; it drains first, so nothing of n0 lands after its own.
    tell(None, |world| {
        world.green_and_idle();
        world.depth = 8;
        for _ in 0..4 {
            world.run_for(300 * MS);
            let holder = world.guest.node.expect("a VM runs");
            world.kill(holder);
            world.vm_on(1 - holder);
            world.at(0, Happens::Boot(holder));
            world.both_in_sync();
        }
        world.settle();
    });
}

#[test]
fn reconnect_same_gen_old_frame() {
    // R7: the connection breaks again and again under one record; late frames of the old ones come in.
    tell(Some(Rule::Session), |world| {
        world.green_and_idle();
        world.depth = 8;
        for _ in 0..60 {
            world.run_for(60 * MS);
            world.break_connection();
        }
        world.settle();
    });
}

#[test]
fn rename_repeated() {
    // R7: the answer to a namespace operation is lost; repeated, it is answered from what is stored, and nobody is dropped.
    tell(None, |world| {
        world.green_and_idle();
        let before = world.register.record.generation;
        for _ in 0..30 {
            let tree = world.nodes[0].disk.now.tree.clone();
            if let Some(ask) = world.guest.names(world.now, &tree) {
                world.ask(0, ask);
            }
            let wait = world.rng.between(0, 4 * MS);
            world.run_for(wait);
            world.net.alive = false;
            for node in [0, 1] {
                world.at(MS, Happens::Lost { node, connection: world.net.known[node] });
            }
            world.answered();
        }
        assert_eq!(world.register.record.generation, before, "nobody was dropped");
        world.settle();
    });
}

#[test]
fn join_cas_answer_lost() {
    // R9: n0's join lands, its answer is long in coming; the link is lost; n0 may not acknowledge alone; it dies, n1 takes over.
    tell(Some(Rule::Acknowledge), |world| {
        world.green_and_idle();
        world.kill(1);
        world.write(0, 4);
        world.peer_out();
        world.answered();
        world.register.answer_ns = Some(20 * SECOND);
        world.at(0, Happens::Boot(1));
        world.run_while("the join", |world| world.register.record.in_sync.len() < 2);
        world.cut();
        world.run_for(10 * MS);
        world.write(1024, 4);
        world.run_for(1200 * MS);
        assert_eq!(world.guest.in_hand(), 1, "the peer may be in sync and has not got it");
        world.kill(0);
        world.register.answer_ns = None;
        world.vm_on(1);
        world.settle();
    });
}

#[test]
fn exclude_cas_half_accepted() {
    // R9: n0, cut off from all, proposes to drop n1 and never hears of it; n1 takes over.
    tell(Some(Rule::DropKnown), |world| {
        world.green_and_idle();
        world.write(0, 2);
        world.answered();
        world.register.reached[0] = false;
        world.net.works = false;
        world.net.alive = false;
        for node in [0, 1] {
            world.at(MS, Happens::Lost { node, connection: world.net.known[node] });
        }
        world.write(0, 2);
        world.vm_on(1);
        world.register.reached = [true; 2];
        world.settle();
    });
}

#[test]
fn resync_w1_w2_order() {
    // R10: two writes of one page, one after the other, arrive in this order on both.
    tell(Some(Rule::Overlap), |world| {
        world.green_and_idle();
        for round in 0..40 {
            world.write(round % 4, 2);
            world.write((round + 1) % 4, 2);
            world.run_for(200_000);
        }
        world.answered();
        world.settle();
    });
}

#[test]
fn copy_vs_write() {
    // R10: the guest rewrites what the resync copies.
    tell(None, |world| {
        world.green_and_idle();
        world.kill(1);
        world.guest.writes_only = true;
        (world.depth, world.pace) = (8, MS);
        world.peer_out();
        world.run_for(SECOND);
        world.at(0, Happens::Boot(1));
        world.both_in_sync();
        world.settle();
    });
}

#[test]
fn alone_flush_then_power() {
    // R10: n0 goes on alone, flushes, loses its power: what n1 has not got is still known.
    tell(None, |world| {
        world.green_and_idle();
        world.kill(1);
        for sector in 0..5 {
            world.write(sector * 512, 4);
        }
        world.peer_out();
        world.flush();
        world.answered();
        world.power_loss(0);
        world.at(100 * MS, Happens::Boot(0));
        world.at(100 * MS, Happens::Boot(1));
        world.run_while("the restart", |world| world.guest.node.is_none());
        world.settle();
    });
}

#[test]
fn flush_other_file() {
    // R10: a flush of another file lets no extent of this one leave the log.
    tell(Some(Rule::Unflushed), |world| {
        world.green_and_idle();
        for sector in 0..6 {
            world.write(sector * 512, 4);
        }
        world.answered();
        let ask = world.guest.flush(Some(FILES[1]));
        world.ask(0, ask);
        world.answered();
        world.power_loss(1);
        world.at(100 * MS, Happens::Boot(1));
        world.run_for(4 * SECOND);
        world.settle();
    });
}

#[test]
fn holder_restart_peer_away() {
    // R10: the holder's process dies while the peer is away; its map and log are found again.
    tell(None, |world| {
        world.green_and_idle();
        world.kill(1);
        world.depth = 4;
        world.peer_out();
        world.run_for(SECOND);
        world.kill(0);
        world.at(50 * MS, Happens::Boot(0));
        world.vm_on(0);
        world.run_for(SECOND);
        world.settle();
    });
}

#[test]
fn truncate_holder_dies() {
    // R11: in the middle of a truncate the holder dies.
    tell(None, |world| {
        world.green_and_idle();
        world.write(512, 8);
        world.answered();
        let ask = world.guest.truncate(world.now, F, 100 * SECTOR, 520 * SECTOR);
        world.ask(0, ask);
        let wait = world.rng.between(0, 4 * MS);
        world.run_for(wait);
        world.kill(0);
        world.vm_on(1);
        world.settle();
    });
}

#[test]
fn truncate_regrow_peer_away() {
    // R11: sizes agree in the end, content does not.
    tell(None, |world| {
        world.green_and_idle();
        world.write(512, 8);
        world.answered();
        world.kill(1);
        let ask = world.guest.truncate(world.now, F, 4 * SECTOR, 520 * SECTOR);
        world.ask(0, ask);
        world.peer_out();
        world.answered();
        world.write(519, 1);
        world.answered();
        world.kill(0);
        world.at(0, Happens::Boot(0));
        world.at(0, Happens::Boot(1));
        world.settle();
    });
}

#[test]
fn rename_over_holder_dies() {
    // R11: names change all the time, and the holder dies.
    tell(None, |world| {
        world.green_and_idle();
        for _ in 0..3 {
            for _ in 0..12 {
                let holder = world.guest.node.expect("a VM runs");
                let tree = world.nodes[holder].disk.now.tree.clone();
                if let Some(ask) = world.guest.names(world.now, &tree) {
                    world.ask(holder, ask);
                }
                let wait = world.rng.between(0, 6 * MS);
                world.run_for(wait);
            }
            let holder = world.guest.node.expect("a VM runs");
            world.kill(holder);
            world.vm_on(1 - holder);
            world.at(0, Happens::Boot(holder));
            world.both_in_sync();
        }
        world.settle();
    });
}

#[test]
fn directory_restored() {
    // R12's cousin here: n1's directory comes back from an old copy. Its store noticed, so everything is compared.
    tell(None, |world| {
        world.green_and_idle();
        world.write(0, 4);
        world.answered();
        let old = world.nodes[1].disk.clone();
        world.write(512, 8);
        world.write(2, 4);
        world.answered();
        world.flush();
        world.answered();
        world.kill(1);
        world.nodes[1].disk = old;
        world.nodes[1].disk.marks.suspect_all = true;
        world.at(100 * MS, Happens::Boot(1));
        world.run_for(2 * SECOND);
        world.settle();
    });
}

#[test]
fn a_swap_keeps_both_in_sync_and_loses_nothing() {
    tell(None, |world| {
        world.green_and_idle();
        world.depth = 4;
        world.run_for(SECOND);
        world.begin_swap();
        world.vm_on(1);
        assert_eq!(world.register.record.in_sync.len(), 2);
        world.run_for(SECOND);
        world.begin_swap();
        world.vm_on(0);
        world.settle();
    });
}
