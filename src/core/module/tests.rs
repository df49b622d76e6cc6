//! The module machine's promises. Each test is one story on one node, `h1`; the other node is `h2`.
use super::*;
use crate::ids::{AcceptorId, RecordId, ReplicaId};
use crate::limits::LEASE_MS;
use crate::record::Record;
use crate::time::{Time, millis};
use std::time::Duration;

const ME: ReplicaId = ReplicaId(1);
const OTHER: ReplicaId = ReplicaId(2);
const PEER: Peer = Peer { replica: OTHER, broken: false, erred: false };
const STOP_LIMIT: Duration = Duration::from_secs(180);

// The process begins.

#[test]
fn the_directory_is_mounted_only_when_no_vm_of_a_dead_process_is_left() {
    let mut node = Node::new();
    assert_eq!(node.tell(Event::Begin), [Effect::Vm(VmOrder::Clear)]);
    node.tell(failed(VmCall::Clear, "no contact"));
    assert_eq!((node.view().state, node.view().health), (State::Wait, Health::Red));
    assert!(node.view().reason.contains("no contact"));
    node.pass(millis(2_000));
    assert_eq!(node.last(), [Effect::Vm(VmOrder::Clear)], "tried again");
    assert_eq!(node.tell(off()), [Effect::Data(DataOrder::Open)]);
}

#[test]
fn a_process_started_anew_serves_only_by_a_generation_of_its_own() {
    let mut node = Node::ready(false, false);
    let found = record(4, ME, &[ME, OTHER]);
    let effects = node.known(found.clone(), false);
    assert!(!effects.contains(&Effect::Data(DataOrder::Record(found))), "not the holder yet: {effects:?}");
    assert_eq!(drain(&effects), Some(1), "R7: drained before it is proposed");
    assert_eq!(node.tell(Event::Drained(1)), [Effect::Arbiter(Ask::TakeOver)]);
    // An older change of the dead process turns up: not taken for the proposal.
    assert_eq!(node.known(record(5, ME, &[ME]), false), []);
    let won = record(6, ME, &[ME]);
    let effects = node.known(won.clone(), true);
    assert!(effects.contains(&Effect::Data(DataOrder::Record(won.clone()))));
    assert_eq!(vm_orders(&node.lease_for(millis(LEASE_MS))), [], "its files cannot be opened for writing yet");
    assert!(node.machine.may_start(node.now).is_err());
    node.pass(millis(LEASE_MS));
    assert_eq!(vm_orders(&node.tell(Event::InForce(won.id))), [], "no lease, no VM");
    assert_eq!(vm_orders(&node.lease_for(millis(LEASE_MS))), [VmOrder::Start]);
    assert_eq!(node.view().state, State::Alone);
    node.tell(running());
    assert_eq!(node.view().health, Health::Green);
}

#[test]
fn a_node_that_may_have_to_take_over_defines_the_vm_ahead_once() {
    let mut node = Node::ready(false, false);
    node.tell(Event::PeerUp(PEER));
    assert_eq!(vm_orders(&node.known(record(4, OTHER, &[OTHER]), false)), []);
    assert_eq!(vm_orders(&node.known(record(5, OTHER, &[ME, OTHER]), false)), [VmOrder::Define]);
    assert_eq!(vm_orders(&node.known(record(6, OTHER, &[ME, OTHER]), false)), []);
}

#[test]
fn a_node_that_has_just_begun_leaves_the_last_holder_time_to_begin() {
    let mut node = Node::begun(false, false);
    node.known(record(5, OTHER, &[ME, OTHER]), false);
    assert_eq!(drain(&node.tell(Event::HolderSilent(true))), None);
    let effects = node.pass(state::START_GRACE);
    assert!(drain(&effects).is_some(), "{effects:?}");
    // What an admin orders does not wait.
    let mut node = Node::begun(false, false);
    node.known(record(5, OTHER, &[ME, OTHER]), false);
    assert_eq!(drain(&node.tell(Event::HolderSilent(true))), None);
    assert!(drain(&node.command(Command::Prim)).is_some());
}

#[test]
fn news_of_an_old_drain_starts_no_proposal() {
    let mut node = Node::ready(false, false);
    node.known(record(4, ME, &[ME]), false);
    assert_eq!(node.tell(Event::Drained(77)), []);
}

#[test]
fn a_broken_holder_waits_until_the_arbiter_lets_it_go() {
    let mut node = Node::ready(true, false);
    assert_eq!(drain(&node.known(record(4, ME, &[ME, OTHER]), false)), None, "an unbroken in-sync node goes first");
    assert_eq!(drain(&node.pass(Duration::from_secs(60))), None);
    assert_eq!(node.view().health, Health::Magenta);
    assert!(drain(&node.tell(Event::HolderSilent(true))).is_some(), "it did not: not for ever");
}

#[test]
fn an_erred_replica_takes_over_nothing() {
    let mut node = Node::ready(false, true);
    assert_eq!(drain(&node.known(record(4, OTHER, &[ME, OTHER]), false)), None);
    assert_eq!(drain(&node.tell(Event::HolderSilent(true))), None);
    assert_eq!(drain(&node.pass(Duration::from_secs(60))), None);
    let refusal = node.refused(Command::Prim);
    assert!(refusal.contains("disk of h1 failed"), "{refusal}");
    // Made equal and joined: the mark is over.
    node.known(record(5, OTHER, &[OTHER]), false);
    node.known(record(6, OTHER, &[ME, OTHER]), false);
    assert!(drain(&node.tell(Event::HolderSilent(true))).is_some());
}

#[test]
fn an_outdated_node_takes_over_nothing_and_says_so() {
    let mut node = Node::ready(false, false);
    node.known(record(4, OTHER, &[OTHER]), false);
    assert_eq!(drain(&node.pass(Duration::from_secs(60))), None);
    assert_eq!((node.view().state, node.view().health), (State::Wait, Health::Red));
    let refusal = node.refused(Command::Prim);
    assert!(refusal.contains("only h2 may run it"), "{refusal}");
    node.tell(Event::PeerUp(PEER));
    node.tell(Event::Resync(Some(Progress { total: 200 << 20, done: 50 << 20 })));
    let view = node.view();
    assert_eq!((view.state, view.health), (State::Second, Health::Magenta));
    assert!(view.reason.contains("25% of 200 MiB"), "{}", view.reason);
    node.known(record(5, OTHER, &[ME, OTHER]), false);
    assert_eq!((node.view().state, node.view().health), (State::Second, Health::Green));
}

// Takeover.

#[test]
fn a_silent_holder_is_followed_by_drain_proposal_and_start() {
    let mut node = Node::second();
    let effects = node.tell(Event::HolderSilent(true));
    assert!(effects.contains(&Effect::Mark(Mark::Detected)));
    let token = drain(&effects).unwrap();
    assert_eq!(node.tell(Event::Drained(token)), [Effect::Arbiter(Ask::TakeOver)]);
    let effects = node.known(record(6, ME, &[ME]), true);
    assert!(effects.contains(&Effect::Mark(Mark::Won)));
    let order = effects.iter().position(|e| matches!(e, Effect::Data(DataOrder::Record(_))));
    let undrain = effects.iter().position(|e| *e == Effect::Data(DataOrder::Undrain));
    assert!(order < undrain, "the record first, then the gate: {effects:?}");
    assert_eq!(vm_orders(&node.lease()), [VmOrder::Start]);
    assert_eq!(node.tell(Event::Vm(VmNews::StartCalled)), [Effect::Mark(Mark::StartCalled)]);
    assert!(node.tell(running()).contains(&Effect::Mark(Mark::Started)));
}

#[test]
fn a_holder_that_is_heard_again_is_not_followed() {
    let mut node = Node::second();
    node.broken(|m| m.settings.failover = false);
    node.tell(Event::HolderSilent(true));
    assert_eq!(node.view().health, Health::Red);
    node.tell(Event::HolderSilent(false));
    assert_eq!(node.view().health, Health::Green);
    assert_eq!(drain(&node.pass(Duration::from_secs(60))), None);
}

#[test]
fn a_takeover_that_did_not_land_is_undone_and_tried_again_later() {
    let mut node = Node::second();
    let token = drain(&node.tell(Event::HolderSilent(true))).unwrap();
    node.tell(Event::Drained(token));
    assert!(node.tell(Event::NotLanded).contains(&Effect::Data(DataOrder::Undrain)));
    assert_eq!(drain(&node.pass(Duration::from_secs(60))), None, "the holder may live after all");
    assert!(drain(&node.tell(Event::HolderSilent(true))).is_some());
}

#[test]
fn a_takeover_that_another_won_ends_as_a_follower() {
    let mut node = Node::second();
    let token = drain(&node.tell(Event::HolderSilent(true))).unwrap();
    node.tell(Event::Drained(token));
    let theirs = record(6, OTHER, &[OTHER]);
    let effects = node.known(theirs.clone(), false);
    assert_eq!(data_orders(&effects), [DataOrder::Record(theirs), DataOrder::Undrain]);
    assert_eq!((node.view().state, node.view().health), (State::Second, Health::Magenta), "out");
}

#[test]
fn without_failover_only_prim_takes_over_and_only_from_a_silent_holder() {
    let mut node = Node::second();
    node.broken(|m| m.settings.failover = false);
    let refusal = node.refused(Command::Prim);
    assert!(refusal.contains("h2 holds db and lives"), "{refusal}");
    assert_eq!(drain(&node.tell(Event::HolderSilent(true))), None);
    assert!(node.view().reason.contains("vmtwin prim db"));
    assert!(drain(&node.command(Command::Prim)).is_some());
}

#[test]
fn prim_without_a_majority_says_what_is_missing() {
    let mut node = Node::ready(false, false);
    node.tell(Event::Reached { answering: 1, voters: 3 });
    assert!(node.view().reason.contains("1 of 3"));
    let refusal = node.refused(Command::Prim);
    assert!(refusal.contains("witness"), "{refusal}");
}

// Holding.

#[test]
fn a_lost_link_stops_nothing_the_peer_is_dropped_and_the_vm_goes_on() {
    let mut node = Node::prim();
    node.tell(Event::PeerDown("silent for 1.5 s".to_owned()));
    assert_eq!((node.view().state, node.view().health), (State::Prim, Health::Magenta));
    assert_eq!(node.tell(Event::Propose(Change::DropPeer)), [Effect::Arbiter(Ask::DropPeer)]);
    let effects = node.known(record(7, ME, &[ME]), true);
    assert_eq!(vm_orders(&effects), []);
    let view = node.view();
    assert_eq!((view.state, view.health), (State::Alone, Health::Green));
    assert!(view.notes.iter().any(|n| n.contains("Only h1 has all data")), "{:?}", view.notes);
}

#[test]
fn the_peer_comes_back_through_a_join() {
    let mut node = Node::alone();
    node.tell(Event::PeerUp(PEER));
    node.tell(Event::Resync(Some(Progress { total: 10, done: 5 })));
    assert_eq!(node.view().health, Health::Magenta);
    assert_eq!(node.tell(Event::Propose(Change::JoinPeer(OTHER))), [Effect::Arbiter(Ask::JoinPeer(OTHER))]);
    node.known(record(8, ME, &[ME, OTHER]), true);
    assert_eq!((node.view().state, node.view().health), (State::Prim, Health::Green));
}

#[test]
fn only_a_holder_changes_the_in_sync_set() {
    let mut node = Node::second();
    assert_eq!(node.tell(Event::Propose(Change::DropPeer)), []);
}

#[test]
fn a_vm_is_paused_when_the_lease_ends_and_goes_on_when_the_record_proved_unchanged() {
    let mut node = Node::prim();
    assert_eq!(node.machine.deadline(), Some(node.machine_lease()));
    let effects = node.pass(millis(LEASE_MS));
    assert_eq!(vm_orders(&effects), [VmOrder::Pause]);
    assert_eq!(node.view().health, Health::Red);
    assert_eq!(vm_orders(&node.tell(paused())), []);
    // A resume by hand is no right to go on.
    assert_eq!(vm_orders(&node.tell(running())), [VmOrder::Pause]);
    node.tell(paused());
    assert_eq!(vm_orders(&node.lease()), [VmOrder::Resume]);
    node.tell(running());
    assert_eq!(node.view().health, Health::Green);
}

#[test]
fn a_pause_that_failed_is_tried_again_while_there_is_no_lease() {
    let mut node = Node::prim();
    node.pass(millis(LEASE_MS));
    assert_eq!(vm_orders(&node.tell(failed(VmCall::Pause, "no contact"))), []);
    assert_eq!(vm_orders(&node.pass(millis(2_000))), [VmOrder::Pause]);
    node.tell(paused());
    assert_eq!(vm_orders(&node.pass(millis(2_000))), []);
    assert_eq!(vm_orders(&node.lease()), [VmOrder::Resume]);
}

#[test]
fn a_vm_that_somebody_else_paused_is_not_resumed_with_the_lease() {
    let mut node = Node::prim();
    node.tell(Event::Vm(VmNews::Paused { io_error: true }));
    assert_eq!(vm_orders(&node.pass(millis(LEASE_MS))), []);
    assert_eq!(vm_orders(&node.lease()), []);
    node.pass(millis(LEASE_MS));
    assert_eq!(vm_orders(&node.tell(running())), [VmOrder::Pause], "resumed by hand, without a lease");
}

#[test]
fn a_vm_that_is_powering_off_when_the_lease_ends_is_killed_before_anybody_takes_over() {
    for command in [Command::Swap, Command::Stop { both: true }, Command::Restart] {
        let mut node = Node::prim();
        node.command(command);
        assert_eq!(vm_orders(&node.pass(millis(LEASE_MS))), [], "{command:?}");
        assert!(node.machine.deadline().unwrap() < node.now + millis(crate::limits::TAKEOVER_MS - LEASE_MS));
        assert_eq!(vm_orders(&node.pass(millis(400))), [VmOrder::Kill], "{command:?}");
        assert_eq!(data_orders(&node.tell(Event::Vm(VmNews::Dying))), [DataOrder::FailHeld]);
        // Requests of the next VM here do not fail for it.
        assert_eq!(data_orders(&node.tell(off()))[0], DataOrder::Undrain, "{command:?}");
    }
}

#[test]
fn a_resume_that_failed_is_tried_again() {
    let mut node = Node::prim();
    node.pass(millis(LEASE_MS));
    node.tell(paused());
    node.lease();
    assert_eq!(vm_orders(&node.tell(failed(VmCall::Resume, "busy"))), []);
    node.lease_for(Duration::from_secs(60));
    assert_eq!(vm_orders(&node.pass(millis(2_000))), [VmOrder::Resume]);
}

#[test]
fn a_deposed_holder_kills_its_vm_before_the_data_thread_hears_of_the_new_one() {
    let mut node = Node::prim();
    node.pass(millis(LEASE_MS));
    let theirs = record(9, OTHER, &[OTHER]);
    let effects = node.known(theirs.clone(), false);
    assert_eq!(vm_orders(&effects), [VmOrder::Kill]);
    assert_eq!(data_orders(&effects), []);
    assert_eq!(node.tell(Event::Vm(VmNews::Dying)), [Effect::Data(DataOrder::FailHeld)]);
    assert_eq!(data_orders(&node.tell(off())), [DataOrder::Record(theirs)]);
    assert_eq!(node.view().vm, "off");
    node.tell(Event::PeerUp(PEER));
    assert_eq!(node.view().state, State::Second);
}

#[test]
fn a_kill_that_failed_is_tried_until_the_vm_is_gone() {
    let mut node = Node::prim();
    node.known(record(9, OTHER, &[OTHER]), false);
    node.tell(failed(VmCall::Clear, "no contact"));
    assert!(node.view().reason.contains("could not be killed"));
    assert_eq!(vm_orders(&node.pass(millis(2_000))), [VmOrder::Kill]);
}

#[test]
fn a_vm_started_past_us_on_a_node_that_does_not_hold_is_killed() {
    let mut node = Node::second();
    assert_eq!(vm_orders(&node.tell(running())), [VmOrder::Kill]);
    node.tell(off());
    assert_eq!(node.view().health, Health::Green);
}

#[test]
fn the_hook_lets_a_vm_start_on_the_live_holder_only() {
    let mut node = Node::prim();
    assert_eq!(node.machine.may_start(node.now), Ok(()));
    node.pass(millis(LEASE_MS));
    assert!(node.machine.may_start(node.now).unwrap_err().contains("no majority"));
    assert!(Node::second().machine.may_start(Time(0)).unwrap_err().contains("held by h2"));
    assert!(Node::new().machine.may_start(Time(0)).is_err());
}

#[test]
fn a_failed_disk_of_the_holder_hands_the_vm_to_the_peer() {
    let mut node = Node::prim();
    let effects = node.tell(Event::Erred("EIO at write".to_owned()));
    assert_eq!(vm_orders(&effects), [VmOrder::Kill], "its I/O is held: no graceful stop is possible");
    node.tell(Event::Vm(VmNews::Dying));
    assert_eq!(node.tell(off()).last(), Some(&Effect::Arbiter(Ask::Release { to: None })));
    assert_eq!(drain(&node.pass(Duration::from_secs(60))), None, "it does not come back by itself");
    assert_eq!(node.view().health, Health::Red);
}

#[test]
fn a_disk_that_fails_while_its_node_is_handed_the_vm_hands_it_back() {
    let mut node = Node::second();
    let token = drain(&node.tell(Event::HandedOver)).unwrap();
    node.tell(Event::Drained(token));
    node.tell(Event::Erred("EIO at write".to_owned()));
    let effects = node.known(record(7, ME, &[ME, OTHER]), true);
    assert!(effects.contains(&Effect::Arbiter(Ask::Release { to: None })), "{effects:?}");
    assert_eq!(vm_orders(&node.lease()), []);
}

#[test]
fn a_takeover_that_lands_in_a_process_that_ends_is_released() {
    let mut node = Node::second();
    let token = drain(&node.tell(Event::HandedOver)).unwrap();
    node.tell(Event::Drained(token));
    node.tell(Event::Terminate);
    let effects = node.known(record(7, ME, &[ME, OTHER]), true);
    assert_eq!(effects, [Effect::Arbiter(Ask::Release { to: None })]);
}

#[test]
fn the_last_disk_that_fails_is_red_and_stays_the_holder() {
    let mut node = Node::alone();
    let effects = node.tell(Event::Erred("EIO".to_owned()));
    assert_eq!(vm_orders(&effects), []);
    assert!(node.view().reason.contains("nobody else has all data"));
}

// The VM ends.

#[test]
fn a_vm_shut_down_from_inside_stops_the_module_on_both_nodes_and_is_no_takeover() {
    let mut node = Node::prim();
    let effects = node.tell(ended(VmEnd::GuestShutdown));
    let orders = data_orders(&effects);
    assert_eq!(orders[0], DataOrder::Tell(Word::Stop), "before the lease is given up");
    let [_, DataOrder::Quiesce(token)] = orders[..] else { panic!("{orders:?}") };
    let effects = node.tell(Event::Quiesced { token, both: true });
    assert!(effects.contains(&Effect::Arbiter(Ask::Release { to: None })));
    assert!(effects.contains(&Effect::Data(DataOrder::End)));
    assert_eq!(node.tell(Event::Ended(Ok(()))).last(), Some(&Effect::Exit(0)));

    let mut other = Node::second();
    other.tell(Event::Told(Word::Stop));
    assert_eq!(drain(&other.tell(Event::HolderSilent(true))), None);
    assert_eq!(data_orders(&other.tell(Event::PeerDown("ended".to_owned()))), [DataOrder::End]);
    assert_eq!(other.tell(Event::Ended(Ok(()))).last(), Some(&Effect::Exit(0)));
}

#[test]
fn a_vm_shut_down_from_inside_is_started_again_where_the_module_says_so() {
    let mut node = Node::prim();
    node.broken(|m| m.settings.restart_on_guest_shutdown = true);
    assert_eq!(vm_orders(&node.tell(ended(VmEnd::GuestShutdown))), [VmOrder::Start]);
}

#[test]
fn a_vm_destroyed_by_its_admin_stops_the_module_with_a_warning() {
    for how in [VmEnd::Destroyed, VmEnd::HostShutdown] {
        let mut node = Node::prim();
        let effects = node.tell(ended(how));
        assert!(effects.iter().any(|e| matches!(e, Effect::Note(Level::Warn, "vm-stopped-by-hand", _))));
        assert!(data_orders(&effects).contains(&DataOrder::Tell(Word::Stop)));
    }
}

#[test]
fn a_vm_that_crashes_is_restarted_three_times_and_then_given_up() {
    let mut node = Node::alone();
    node.lease_for(Duration::from_secs(3600));
    for _ in 0..3 {
        assert_eq!(vm_orders(&node.tell(ended(VmEnd::Crashed))), [VmOrder::Start]);
        node.tell(running());
        node.pass(Duration::from_secs(60));
    }
    assert_eq!(vm_orders(&node.tell(ended(VmEnd::Crashed))), []);
    let view = node.view();
    assert_eq!((view.state, view.health), (State::Stop, Health::Magenta));
    assert!(view.reason.contains("crashed 4 times"), "{}", view.reason);
    assert!(node.machine.may_start(node.now).is_err());
    assert_eq!(vm_orders(&node.pass(Duration::from_secs(1200))), []);
    // A person says so: again, with a fresh count.
    assert_eq!(vm_orders(&node.command(Command::Restart)), [VmOrder::Start]);
    assert_eq!(node.answers(&running()), [Ok(())]);
}

#[test]
fn a_vm_that_crashes_too_often_here_is_tried_on_the_other_node() {
    let mut node = Node::prim();
    let effects = node.crash_four_times();
    let orders = data_orders(&effects);
    let [DataOrder::Tell(Word::Crashes), DataOrder::Quiesce(token)] = orders[..] else { panic!("{orders:?}") };
    let effects = node.tell(Event::Quiesced { token, both: true });
    assert_eq!(effects, [Effect::Arbiter(Ask::Release { to: Some(OTHER) })]);
    node.known(record(7, OTHER, &[ME, OTHER]), false);
    assert_eq!(node.view().health, Health::Green);
    // That it was given up is forgotten: when the other one dies, it is started here.
    let token = drain(&node.tell(Event::HolderSilent(true))).unwrap();
    node.tell(Event::Drained(token));
    node.known(record(8, ME, &[ME]), true);
    assert_eq!(vm_orders(&node.lease()), [VmOrder::Start]);
}

#[test]
fn a_vm_that_crashes_on_both_nodes_stops_where_it_is() {
    let mut node = Node::second();
    node.tell(Event::Told(Word::Crashes));
    let token = drain(&node.tell(Event::HandedOver)).unwrap();
    node.tell(Event::Drained(token));
    node.known(record(7, ME, &[ME, OTHER]), true);
    node.lease();
    node.tell(running());
    node.tell(Event::PeerUp(PEER));
    assert_eq!(data_orders(&node.crash_four_times()), []);
    assert_eq!((node.view().state, node.view().health), (State::Stop, Health::Magenta));
}

#[test]
fn a_crashing_vm_that_the_other_node_does_not_take_is_given_up() {
    let mut node = Node::prim();
    let token = quiesce(&node.crash_four_times()).unwrap();
    assert_eq!(vm_orders(&node.tell(Event::Quiesced { token, both: false })), []);
    assert_eq!((node.view().state, node.view().health), (State::Stop, Health::Magenta));
    assert_eq!(vm_orders(&node.command(Command::Start)), [VmOrder::Start]);
}

#[test]
fn a_vm_that_ends_with_its_host_goes_to_the_other_node_or_waits_for_the_end() {
    let mut node = Node::prim();
    let orders = data_orders(&node.tell(ended(VmEnd::HostStops)));
    assert!(matches!(orders[..], [DataOrder::Quiesce(_)]), "no stop of the module: {orders:?}");
    let mut node = Node::alone();
    assert_eq!(node.tell(ended(VmEnd::HostStops)), []);
    assert_eq!(vm_orders(&node.lease()), [], "not started on a host that goes down");
    let token = quiesce(&node.tell(Event::Terminate)).unwrap();
    node.tell(Event::Quiesced { token, both: false });
    assert_eq!(node.tell(Event::Ended(Ok(()))).last(), Some(&Effect::Exit(143)), "still wanted at the next boot");
}

#[test]
fn crashes_far_apart_are_not_added_up() {
    let mut node = Node::prim();
    node.lease_for(Duration::from_secs(36_000));
    for _ in 0..10 {
        assert_eq!(vm_orders(&node.tell(ended(VmEnd::Crashed))), [VmOrder::Start]);
        node.tell(running());
        node.pass(Duration::from_secs(301));
    }
}

#[test]
fn a_start_that_fails_is_tried_again_and_says_why() {
    let mut node = Node::alone();
    node.lease_for(Duration::from_secs(3600));
    node.tell(ended(VmEnd::Crashed));
    assert_eq!(vm_orders(&node.tell(failed(VmCall::Start, "no memory"))), []);
    assert!(node.view().reason.contains("no memory"));
    assert_eq!(vm_orders(&node.pass(millis(2_000))), [VmOrder::Start]);
    node.tell(failed(VmCall::Start, "no memory"));
    node.pass(millis(2_000));
    node.tell(failed(VmCall::Start, "no memory"));
    assert_eq!(vm_orders(&node.pass(millis(2_000))), []);
    assert_eq!(node.view().state, State::Stop);
}

#[test]
fn a_vm_paused_for_an_io_error_is_not_restarted() {
    let mut node = Node::prim();
    assert_eq!(vm_orders(&node.tell(Event::Vm(VmNews::Paused { io_error: true }))), []);
    assert_eq!(node.view().health, Health::Red);
}

// Commands.

#[test]
fn stop_powers_the_guest_off_flushes_both_releases_and_answers_at_the_end() {
    let mut node = Node::prim();
    let effects = node.command(Command::Stop { both: true });
    assert_eq!(data_orders(&effects), [DataOrder::Tell(Word::Stop)]);
    assert_eq!(vm_orders(&effects), [VmOrder::Shutdown(STOP_LIMIT)]);
    let token = quiesce(&node.tell(off())).unwrap();
    node.tell(Event::Quiesced { token, both: true });
    assert_eq!(node.answers(&Event::Ended(Ok(()))), [Ok(())]);
    assert!(node.machine.is_over());
}

#[test]
fn stop_of_a_vm_whose_io_is_held_does_not_wait_for_its_guest() {
    let mut node = Node::prim();
    node.pass(millis(LEASE_MS));
    assert_eq!(vm_orders(&node.command(Command::Stop { both: true })), [VmOrder::Kill]);
    let token = quiesce(&node.tell(off()));
    assert!(token.is_some());
    // No majority: the flush may never be answered. It ends all the same.
    assert!(data_orders(&node.pass(Duration::from_secs(30))).contains(&DataOrder::End));
}

#[test]
fn stop_overtakes_a_swap_that_is_under_way() {
    let mut node = Node::prim();
    node.command(Command::Swap);
    let effects = node.command(Command::Stop { both: true });
    assert!(matches!(effects[..], [Effect::Answer(1, Err(_)), Effect::Data(DataOrder::Tell(Word::Stop))]));
    let token = quiesce(&node.tell(off())).unwrap();
    let effects = node.tell(Event::Quiesced { token, both: true });
    assert!(effects.contains(&Effect::Arbiter(Ask::Release { to: None })));
    assert_eq!(node.tell(Event::Ended(Ok(()))).last(), Some(&Effect::Exit(0)));

    let mut node = Node::prim();
    node.command(Command::Swap);
    let token = quiesce(&node.tell(off())).unwrap();
    node.tell(Event::Quiesced { token, both: true });
    assert!(data_orders(&node.command(Command::Stop { both: true })).contains(&DataOrder::End));
    assert_eq!(node.answers(&Event::Ended(Ok(()))), [Ok(())]);
}

#[test]
fn a_vm_that_cannot_be_shut_down_is_killed_past_the_call_that_hangs() {
    for command in [Command::Swap, Command::Restart] {
        let mut node = Node::prim();
        node.lease_for(Duration::from_secs(3600));
        node.command(command);
        assert_eq!(vm_orders(&node.pass(STOP_LIMIT)), [], "the call itself destroys it now");
        assert_eq!(vm_orders(&node.pass(Duration::from_secs(15))), [VmOrder::Kill], "{command:?}");
    }
}

#[test]
fn stop_is_never_a_failover_on_the_node_that_follows() {
    let mut node = Node::second();
    assert_eq!(node.command(Command::Stop { both: true }), [], "the holder goes first");
    node.tell(Event::HolderSilent(true));
    assert_eq!(drain(&node.last()), None);
    assert_eq!(data_orders(&node.tell(Event::PeerDown("ended".to_owned()))), [DataOrder::End]);
    assert_eq!(node.answers(&Event::Ended(Ok(()))), [Ok(())]);
}

#[test]
fn a_follower_that_is_to_stop_waits_for_its_holder_only_so_long() {
    let mut node = Node::second();
    node.command(Command::Stop { both: true });
    assert_eq!(data_orders(&node.pass(STOP_LIMIT + Duration::from_secs(60))), [DataOrder::End]);
}

#[test]
fn a_follower_stops_alone_at_once() {
    let mut node = Node::second();
    assert_eq!(data_orders(&node.command(Command::Stop { both: false })), [DataOrder::End]);
}

#[test]
fn a_holder_stops_alone_only_by_a_swap_first() {
    let mut node = Node::alone();
    let refusal = node.refused(Command::Stop { both: false });
    assert!(refusal.contains("vmtwin stop db"), "{refusal}");
    let mut node = Node::prim();
    node.command(Command::Stop { both: false });
    let token = quiesce(&node.tell(off())).unwrap();
    let effects = node.tell(Event::Quiesced { token, both: true });
    assert_eq!(effects, [Effect::Arbiter(Ask::Release { to: Some(OTHER) })]);
    let effects = node.known(record(7, OTHER, &[ME, OTHER]), false);
    assert!(data_orders(&effects).contains(&DataOrder::End));
    assert_eq!(node.answers(&Event::Ended(Ok(()))), [Ok(())]);
}

#[test]
fn swap_stops_flushes_both_and_hands_over() {
    let mut node = Node::prim();
    assert_eq!(vm_orders(&node.command(Command::Swap)), [VmOrder::Shutdown(STOP_LIMIT)]);
    assert!(node.refused(Command::Swap).contains("middle of another change"));
    let token = quiesce(&node.tell(off())).unwrap();
    let effects = node.tell(Event::Quiesced { token, both: true });
    assert_eq!(effects, [Effect::Arbiter(Ask::Release { to: Some(OTHER) })]);
    let theirs = record(7, OTHER, &[ME, OTHER]);
    assert_eq!(node.answers(&Event::Known { record: theirs.clone(), ours: false }), [Ok(())]);
    assert_eq!(data_orders(&node.last()), [DataOrder::Record(theirs)]);
    assert_eq!((node.view().state, node.view().health), (State::Second, Health::Green));
}

#[test]
fn the_target_of_a_swap_takes_over_at_once_and_keeps_both_in_sync() {
    let mut node = Node::second();
    let token = drain(&node.tell(Event::HandedOver)).unwrap();
    assert_eq!(node.tell(Event::Drained(token)), [Effect::Arbiter(Ask::TakeOver)]);
    node.known(record(7, ME, &[ME, OTHER]), true);
    assert_eq!(vm_orders(&node.lease()), [VmOrder::Start]);
    assert_eq!(node.view().state, State::Prim);
}

#[test]
fn a_swap_whose_peer_cannot_flush_stays_and_starts_the_vm_again() {
    let mut node = Node::prim();
    node.command(Command::Swap);
    let token = quiesce(&node.tell(off())).unwrap();
    node.lease_for(Duration::from_secs(60));
    let effects = node.tell(Event::Quiesced { token, both: false });
    assert_eq!(data_orders(&effects), [DataOrder::Unquiesce]);
    assert_eq!(vm_orders(&effects), [VmOrder::Start]);
    assert!(effects.iter().any(|e| matches!(e, Effect::Answer(_, Err(Refusal { code: 1, .. })))));
}

#[test]
fn a_swap_that_nobody_takes_is_taken_back_by_a_change_of_our_own() {
    let mut node = Node::prim();
    node.command(Command::Swap);
    let token = quiesce(&node.tell(off())).unwrap();
    node.tell(Event::Quiesced { token, both: true });
    let effects = node.pass(Duration::from_secs(10));
    assert!(effects.iter().any(|e| matches!(e, Effect::Answer(_, Err(_)))));
    assert_eq!(vm_orders(&effects), [], "released: it serves nothing until it has won again");
    let token = drain(&effects).unwrap();
    assert_eq!(node.tell(Event::Drained(token)), [Effect::Arbiter(Ask::TakeBack)]);
    // Whose outcome is open is asked for again, and never as an ordinary takeover, even if a drop of before lands.
    node.tell(Event::NotLanded);
    node.known(record(7, ME, &[ME]), false);
    let token = drain(&node.pass(Duration::from_secs(1))).unwrap();
    assert_eq!(node.tell(Event::Drained(token)), [Effect::Arbiter(Ask::TakeBack)]);
    node.known(record(8, ME, &[ME]), true);
    assert_eq!(vm_orders(&node.lease()), [VmOrder::Start]);
}

#[test]
fn a_swap_is_refused_with_the_reason_and_the_way_out() {
    let mut node = Node::alone();
    assert!(node.refused(Command::Swap).contains("no link to h2"));
    node.tell(Event::PeerUp(PEER));
    assert!(node.refused(Command::Swap).contains("not in sync yet"));
    assert!(Node::second().refused(Command::Swap).contains("h2 holds db"));
    let mut node = Node::prim();
    node.pass(millis(LEASE_MS));
    assert!(node.refused(Command::Swap).contains("no majority"));
    assert!(node.refused(Command::Stop { both: false }).contains("no majority"));
    let effects = node.last();
    assert_eq!(vm_orders(&effects), []);
}

#[test]
fn second_on_the_holder_is_a_swap_and_nothing_on_the_replica() {
    assert_eq!(vm_orders(&Node::prim().command(Command::Second)), [VmOrder::Shutdown(STOP_LIMIT)]);
    let mut node = Node::second();
    assert!(node.command(Command::Second).iter().any(|e| matches!(e, Effect::Answer(_, Ok(())))));
}

#[test]
fn restart_stops_and_starts_in_place_and_answers_when_the_vm_runs() {
    let mut node = Node::prim();
    assert_eq!(vm_orders(&node.command(Command::Restart)), [VmOrder::Shutdown(STOP_LIMIT)]);
    assert!(node.refused(Command::Swap).contains("middle of another change"));
    assert_eq!(vm_orders(&node.tell(off())), [VmOrder::Start]);
    assert_eq!(node.answers(&running()), [Ok(())]);
    assert!(Node::second().refused(Command::Restart).contains("ask there"));
}

#[test]
fn start_of_what_runs_is_done_already() {
    assert!(Node::prim().command(Command::Start).iter().any(|e| matches!(e, Effect::Answer(_, Ok(())))));
}

// SIGTERM.

#[test]
fn sigterm_on_the_holder_hands_over_and_ends_as_still_wanted() {
    let mut node = Node::prim();
    assert_eq!(vm_orders(&node.tell(Event::Terminate)), [VmOrder::Shutdown(Duration::from_secs(60))]);
    let token = quiesce(&node.tell(off())).unwrap();
    let effects = node.tell(Event::Quiesced { token, both: true });
    assert_eq!(effects, [Effect::Arbiter(Ask::Release { to: Some(OTHER) })]);
    node.known(record(7, OTHER, &[ME, OTHER]), false);
    assert_eq!(node.tell(Event::Ended(Ok(()))).last(), Some(&Effect::Exit(143)));
}

#[test]
fn sigterm_without_a_peer_stops_the_vm_and_releases() {
    let mut node = Node::alone();
    node.tell(Event::Terminate);
    let token = quiesce(&node.tell(off())).unwrap();
    let effects = node.tell(Event::Quiesced { token, both: false });
    assert!(effects.contains(&Effect::Arbiter(Ask::Release { to: None })));
    assert_eq!(node.tell(Event::Ended(Ok(()))).last(), Some(&Effect::Exit(143)));
}

#[test]
fn sigterm_on_the_replica_just_ends() {
    let mut node = Node::second();
    assert_eq!(data_orders(&node.tell(Event::Terminate)), [DataOrder::End]);
    assert_eq!(node.tell(Event::Ended(Ok(()))).last(), Some(&Effect::Exit(143)));
}

#[test]
fn a_data_thread_that_fails_or_never_closes_ends_the_process() {
    let mut node = Node::prim();
    let effects = node.tell(Event::Failed("no directory".to_owned()));
    assert_eq!(vm_orders(&effects), [VmOrder::Kill], "nobody would pause it any more");
    assert_eq!(effects.last(), Some(&Effect::Exit(1)));
    let mut node = Node::second();
    node.command(Command::Stop { both: false });
    let effects = node.pass(Duration::from_secs(30));
    assert!(effects.iter().any(|e| matches!(e, Effect::Answer(_, Err(_)))));
    assert_eq!(effects.last(), Some(&Effect::Exit(0)));
}

#[test]
fn a_directory_in_use_is_unmounted_as_soon_as_it_is_not() {
    let mut node = Node::second();
    node.command(Command::Stop { both: false });
    assert_eq!(node.answers(&Event::Ended(Err("in use by process 7".to_owned()))), []);
    assert!(node.view().reason.contains("in use by process 7"));
    assert_eq!(data_orders(&node.pass(millis(2_000))), [DataOrder::End]);
    assert_eq!(node.answers(&Event::Ended(Ok(()))), [Ok(())]);
}

// Everything at once.

#[test]
fn whatever_comes_in_whatever_order_the_invariants_hold_and_red_states_say_why() {
    for seed in 1..=400u64 {
        let mut random = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let mut next = |below: u64| {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            random % below
        };
        let mut node = Node::new();
        node.tell(Event::Begin);
        let (mut generation, mut token) = (1, 0);
        for _ in 0..300 {
            let event = match next(30) {
                0 => Event::Vm(VmNews::Off { by_itself: next(2) == 0 }),
                1 => running(),
                2 => paused(),
                3 => {
                    ended([VmEnd::Crashed, VmEnd::Destroyed, VmEnd::GuestShutdown, VmEnd::HostStops][next(4) as usize])
                }
                4 => {
                    let calls = [VmCall::Clear, VmCall::Start, VmCall::Pause, VmCall::Resume, VmCall::Shutdown];
                    failed(calls[next(5) as usize], "x")
                }
                5 => Event::Vm(VmNews::Dying),
                6 if node.machine.me.is_none() => {
                    Event::Ready { replica: ME, broken: next(2) == 0, erred: next(4) == 0 }
                }
                7..=9 => {
                    generation += 1;
                    let holder = [ME, OTHER][next(2) as usize];
                    let both = next(2) == 0;
                    let in_sync: &[ReplicaId] = if both { &[ME, OTHER] } else { &[holder] };
                    Event::Known { record: record(generation, holder, in_sync), ours: next(2) == 0 }
                }
                10 => Event::NotLanded,
                11..=14 => Event::Lease(node.now + millis(next(LEASE_MS))),
                15 => Event::HolderSilent(next(2) == 0),
                16 => Event::HandedOver,
                17 if next(2) == 0 => Event::InForce(RecordId(generation.into())),
                17 => Event::PeerUp(PEER),
                18 => Event::PeerDown("y".to_owned()),
                19 => Event::Drained(token),
                20 => Event::Quiesced { token, both: next(2) == 0 },
                21 => Event::Erred("z".to_owned()),
                22 => Event::Propose(Change::DropPeer),
                23 => Event::Command(next(1000), Command::Swap),
                24 => Event::Command(next(1000), Command::Restart),
                25 => Event::Command(next(1000), Command::Prim),
                26 if next(20) == 0 => Event::Command(next(1000), Command::Stop { both: next(2) == 0 }),
                27 => Event::Told([Word::Stop, Word::StopUndone, Word::Crashes][next(3) as usize]),
                _ => {
                    node.now = node.now + millis(next(3000));
                    Event::Tick
                }
            };
            let was_known = node.machine.record().cloned();
            for effect in node.tell(event.clone()) {
                match effect {
                    Effect::Data(DataOrder::Drain(t) | DataOrder::Quiesce(t)) => token = t,
                    Effect::Vm(VmOrder::Start) => {
                        assert!(node.machine.is_holder_by_record(), "seed {seed}: started under {was_known:?}");
                        assert!(node.machine.lease_is_live(node.now), "seed {seed}: started without a lease");
                    }
                    _ => {}
                }
            }
            if event == Event::Tick {
                let due = node.machine.deadline().filter(|at| *at <= node.now);
                assert_eq!(due, None, "seed {seed}: due for ever in {:?}", node.machine);
            }
            let view = node.view();
            assert_eq!(view.health == Health::Green, view.reason.is_empty(), "seed {seed}: {view:?}");
        }
    }
}

// Builders and helpers.

fn record(generation: u64, holder: ReplicaId, in_sync: &[ReplicaId]) -> Record {
    let first = Record::first(RecordId(generation.into()), holder, [1, 2, 3].map(AcceptorId).to_vec());
    Record { generation: crate::ids::Generation(generation), in_sync: in_sync.to_vec(), ..first }
}

fn off() -> Event {
    Event::Vm(VmNews::Off { by_itself: true })
}
fn running() -> Event {
    Event::Vm(VmNews::Running)
}
fn paused() -> Event {
    Event::Vm(VmNews::Paused { io_error: false })
}
fn ended(how: VmEnd) -> Event {
    Event::Vm(VmNews::Ended(how))
}
fn failed(call: VmCall, why: &str) -> Event {
    Event::Vm(VmNews::Failed { call, why: why.to_owned() })
}
fn vm_orders(effects: &[Effect]) -> Vec<VmOrder> {
    effects.iter().filter_map(|e| if let Effect::Vm(order) = e { Some(*order) } else { None }).collect()
}
fn data_orders(effects: &[Effect]) -> Vec<DataOrder> {
    effects.iter().filter_map(|e| if let Effect::Data(order) = e { Some(order.clone()) } else { None }).collect()
}
fn drain(effects: &[Effect]) -> Option<u64> {
    effects.iter().find_map(|e| if let Effect::Data(DataOrder::Drain(token)) = e { Some(*token) } else { None })
}
fn quiesce(effects: &[Effect]) -> Option<u64> {
    effects.iter().find_map(|e| if let Effect::Data(DataOrder::Quiesce(token)) = e { Some(*token) } else { None })
}

struct Node {
    machine: Machine,
    now: Time,
    last: Vec<Effect>,
    commands: u64,
}

impl Node {
    fn new() -> Self {
        let machine = Machine::new(Settings {
            module: "db".to_owned(),
            node: "h1".to_owned(),
            peer: "h2".to_owned(),
            failover: true,
            restart_on_guest_shutdown: false,
            stop_limit: STOP_LIMIT,
        });
        Self { machine, now: Time::from_millis(10_000), last: Vec::new(), commands: 0 }
    }
    /// Its process has run for a while.
    fn ready(broken: bool, erred: bool) -> Self {
        let mut node = Self::begun(broken, erred);
        node.now = node.now + state::START_GRACE;
        node
    }
    fn begun(broken: bool, erred: bool) -> Self {
        let mut node = Self::new();
        node.tell(Event::Begin);
        node.tell(off());
        node.tell(Event::Ready { replica: ME, broken, erred });
        node
    }
    /// In sync, linked, the other one holds.
    fn second() -> Self {
        let mut node = Self::ready(false, false);
        node.tell(Event::PeerUp(PEER));
        node.known(record(5, OTHER, &[ME, OTHER]), false);
        node
    }
    fn alone() -> Self {
        let mut node = Self::ready(false, false);
        let token = drain(&node.known(record(4, ME, &[ME]), false)).unwrap();
        node.tell(Event::Drained(token));
        node.known(record(5, ME, &[ME]), true);
        node.lease();
        node.tell(running());
        node
    }
    fn prim() -> Self {
        let mut node = Self::alone();
        node.tell(Event::PeerUp(PEER));
        node.known(record(6, ME, &[ME, OTHER]), true);
        assert_eq!((node.view().state, node.view().health), (State::Prim, Health::Green));
        node
    }
    fn crash_four_times(&mut self) -> Vec<Effect> {
        self.lease_for(Duration::from_secs(3600));
        for _ in 0..3 {
            assert_eq!(vm_orders(&self.tell(ended(VmEnd::Crashed))), [VmOrder::Start]);
            self.tell(running());
        }
        self.tell(ended(VmEnd::Crashed))
    }
    fn broken(&mut self, change: impl FnOnce(&mut Machine)) {
        change(&mut self.machine);
    }
    /// Without notes: those are for people.
    fn tell(&mut self, event: Event) -> Vec<Effect> {
        let mut effects = Vec::new();
        self.machine.step(self.now, event, &mut effects);
        let kept = |e: &Effect| {
            !matches!(
                e,
                Effect::Note(Level::Info | Level::Error, ..)
                    | Effect::Note(_, "record" | "link-down" | "lease-ended", _)
            )
        };
        effects.retain(kept);
        self.last = effects.clone();
        effects
    }
    fn last(&self) -> Vec<Effect> {
        self.last.clone()
    }
    fn known(&mut self, record: Record, ours: bool) -> Vec<Effect> {
        self.tell(Event::Known { record, ours })
    }
    /// The first lease of a record, and that it is in force, in one.
    fn lease(&mut self) -> Vec<Effect> {
        let record = self.machine.record().unwrap().id;
        let mut effects = self.lease_for(millis(LEASE_MS));
        effects.extend(self.tell(Event::InForce(record)));
        effects
    }
    fn lease_for(&mut self, span: Duration) -> Vec<Effect> {
        let until = self.now + span;
        self.tell(Event::Lease(until))
    }
    fn machine_lease(&self) -> Time {
        self.machine.lease_until
    }
    fn pass(&mut self, span: Duration) -> Vec<Effect> {
        self.now = self.now + span;
        self.tell(Event::Tick)
    }
    fn command(&mut self, command: Command) -> Vec<Effect> {
        self.commands += 1;
        self.tell(Event::Command(self.commands, command))
    }
    fn refused(&mut self, command: Command) -> String {
        let id = self.commands + 1;
        match self.command(command).pop() {
            Some(Effect::Answer(answered, Err(Refusal { code: 3, error }))) if answered == id => error,
            other => panic!("{command:?} was not refused: {other:?}"),
        }
    }
    fn answers(&mut self, event: &Event) -> Vec<Result<(), Refusal>> {
        let effects = self.tell(event.clone());
        effects
            .into_iter()
            .filter_map(|e| if let Effect::Answer(_, result) = e { Some(result) } else { None })
            .collect()
    }
    fn view(&self) -> View {
        self.machine.view(self.now)
    }
}
