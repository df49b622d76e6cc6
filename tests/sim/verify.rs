//! The verification: no false alarm beside whatever the guest does and whatever breaks, no difference overlooked, and the
//! repair makes the peer the holder's copy.
use super::disk::SECTOR;
use super::faults::Faults;
use super::guest::FILES;
use super::world::{MS, SECOND, World};
use super::{attempt, found};
use vmtwin_core::ids::FileId;
use vmtwin_core::namespace::Errno;
use vmtwin_core::replica::effect::VerifyEnd;
use vmtwin_core::replica::event::Event;
use vmtwin_core::replica::{Role, Rule};
use vmtwin_core::resync::Side;
use vmtwin_core::resync::verify::{Different, Verdict};
use vmtwin_tests::{replay_command, seeds};

const F: FileId = FILES[0];
/// A sector that no random guest writes, within the file as soon as its second extent was written.
const BESIDE: u64 = 300;

impl World {
    fn holder(&self) -> Option<usize> {
        let holds = |node: &usize| self.nodes[*node].replica.as_ref().is_some_and(|r| r.role() == Role::Holder);
        [0, 1].into_iter().filter(|node| self.is_up(*node)).find(holds)
    }

    /// Asks for a verification, where there is anybody to ask; refused where it cannot be.
    fn verify(&mut self, repair: bool) {
        let rate = *self.rng.pick(&[1 << 20, 8 << 20, 200 << 20]);
        if let Some(holder) = self.holder() {
            self.step(holder, Event::Verify { rate, repair });
        }
    }

    /// Verifies again and again; how often to its end.
    fn keep_verifying(&mut self, until: u64) {
        while self.now < until {
            self.verify(false);
            self.run_until(self.now + 50 * MS);
        }
    }

    fn green(&mut self) {
        let deadline = self.now + 60 * SECOND;
        while !self.is_green() {
            assert!(self.now < deadline, "{}", self.describe());
            self.run_until(self.now + 5 * MS);
        }
    }

    /// A repair was ordered: until the peer has joined again.
    fn repaired(&mut self) {
        let (joins, deadline) = (self.joins, self.now + 60 * SECOND);
        while self.joins == joins || !self.is_green() {
            assert!(self.now < deadline, "no repair: {}", self.describe());
            self.run_until(self.now + 5 * MS);
        }
    }

    /// A whole verification, beside the guest.
    fn verdict(&mut self, repair: bool) -> Verdict {
        self.green();
        self.verified.clear();
        let deadline = self.now + 60 * SECOND;
        self.verify(repair);
        while self.verified.is_empty() {
            assert!(self.now < deadline, "it takes too long: {}", self.describe());
            self.run_until(self.now + 5 * MS);
        }
        match self.verified.remove(0) {
            VerifyEnd::Done { verdict, repaired } => {
                assert_eq!(repaired, repair && !verdict.is_equal());
                verdict
            }
            other => panic!("{other:?}"),
        }
    }
}

fn no_false_alarm(world: &mut World) {
    let until = world.rng.between(3, 8) * SECOND;
    world.keep_verifying(until);
    for end in &world.verified {
        if let VerifyEnd::Done { verdict, .. } = end {
            assert!(verdict.is_equal(), "a false alarm: {verdict:?}");
        }
    }
}

#[test]
fn healthy_replicas_are_proved_equal_whatever_the_guest_does_and_whatever_breaks() {
    let (mut done, mut cut) = (0, 0);
    for (faults, count) in [(Faults::NONE, 40), (Faults { every: 700 * MS, disk: false, ..Faults::ALL }, 80)] {
        for seed in seeds(count) {
            let run = attempt(seed, None, faults, |world| {
                world.depth = *world.rng.pick(&[1, 3, 8]);
                no_false_alarm(world);
                world.settle();
            });
            let test = "healthy_replicas_are_proved_equal_whatever_the_guest_does_and_whatever_breaks";
            let world = run.unwrap_or_else(|why| panic!("seed {seed}: {why}\n{}", replay_command("sim", test, seed)));
            let ended = |end: &&VerifyEnd| matches!(end, VerifyEnd::Done { .. });
            done += world.verified.iter().filter(ended).count();
            cut += world.verified.iter().filter(|end| !ended(end)).count();
        }
    }
    println!("{done} verifications came to their end, {cut} were cut");
    assert!(vmtwin_tests::trace_wanted() || done > 500 && cut > 20, "the runs do something: {done}, {cut}");
}

#[test]
fn a_verification_that_looks_at_what_is_under_way_is_noticed() {
    found(60, Some(Rule::VerifyAtRest), Faults::NONE, |world| {
        world.depth = 8;
        no_false_alarm(world);
    });
}

#[test]
fn a_silently_changed_page_is_always_found_named_and_repaired() {
    for seed in seeds(40) {
        let run = attempt(seed, None, Faults::NONE, |world| {
            world.guest.writes_only = true;
            world.depth = 4;
            world.green();
            world.run_until(world.now + SECOND);
            let node = usize::from(world.rng.chance(500));
            // A hole on one side only, on the holder or its peer; or one in the midst of a guest's data, on the peer.
            let at = if node == 0 || world.rng.chance(500) { BESIDE } else { 700 };
            if at == 700 {
                let ask = world.guest.write(world.now, F, at, 4);
                world.ask(0, ask);
                world.run_until(world.now + 200 * MS);
            }
            world.nodes[node].disk.rot(F, at, 0xbad);
            let verdict = world.verdict(false);
            let block = at * SECTOR / 65_536 * 65_536;
            let [one] = &verdict.differences[..] else { panic!("one difference: {verdict:?}") };
            assert_eq!((one.file, &one.name[..]), (F, "f10"));
            assert_eq!(one.what, Different::Content(block..block + 65_536), "{verdict:?}");
            assert_eq!(world.register.record.in_sync.len(), 2, "it was only asked");

            assert_eq!(world.verdict(true).differences, verdict.differences);
            world.repaired();
            world.settle();
            let stamps = [0, 1].map(|node| world.nodes[node].disk.now.get(F, at));
            assert!(
                stamps[0] == stamps[1] && (stamps[0] == 0xbad) == (node == 0),
                "the holder's copy wins: {stamps:?}"
            );
            world.depth = 4;
            assert!(world.verdict(false).is_equal());
        });
        let test = "a_silently_changed_page_is_always_found_named_and_repaired";
        run.unwrap_or_else(|why| panic!("seed {seed}: {why}\n{}", replay_command("sim", test, seed)));
    }
}

#[test]
fn an_entry_that_differs_is_named_and_repaired_and_a_peer_that_cannot_be_read_is_no_difference() {
    let run = attempt(1, None, Faults::NONE, |world| {
        world.guest.writes_only = true;
        world.green();
        world.run_until(world.now + SECOND);
        let longer = world.nodes[1].disk.now.size(FILES[1]).unwrap() + SECTOR;
        world.nodes[1].disk.now.tree.set_size(FILES[1], longer);
        world.depth = 0;
        world.run_until(world.now + 100 * MS);
        let verdict = world.verdict(false);
        let told: Vec<_> = verdict.differences.iter().map(|d| (&d.name[..], &d.what)).collect();
        assert_eq!(told, [("f11", &Different::Entry("length".to_owned()))]);
        assert!(world.verdict(true).unequal.is_empty());
        world.repaired();
        assert!(world.verdict(false).is_equal(), "the ordinary way made the tree equal");

        world.verified.clear();
        world.nodes[1].disk.fault = Some(Errno::EIO);
        world.verify(true);
        world.run_until(world.now + SECOND);
        assert_eq!(world.verified, [VerifyEnd::Broke(Side::Target, Errno::EIO)]);
        world.settle();
    });
    run.unwrap_or_else(|why| panic!("{why}"));
}
