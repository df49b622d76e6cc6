//! The verification against two small replicas: one number is the content of a block, 0 a hole.
use super::verify::*;
use super::{Data, JobId, Side};
use crate::ids::FileId;
use crate::limits::{BLOCK_BYTES, VERIFY_LISTED_MAX};
use crate::namespace::{Errno, FileName, Op, Owner, Tree};
use crate::time::Time;
use std::collections::{BTreeMap, VecDeque};

const FILE: FileId = FileId(10);
const OWNER: Owner = Owner { mode: 0o644, uid: 0, gid: 0 };

#[derive(Clone)]
struct Half {
    tree: Tree,
    blocks: BTreeMap<u64, u8>,
}

/// A file of this many blocks, one of three of them a hole.
fn replica(blocks: u64) -> Half {
    let mut tree = Tree::new(OWNER);
    let name = FileName::new("disk").unwrap();
    tree.apply(&Op::Create { parent: FileId::ROOT, name, id: FILE, owner: OWNER }).unwrap();
    tree.set_size(FILE, blocks * BLOCK_BYTES);
    let data = (0..blocks).filter(|block| block % 3 != 0).map(|block| (block, block as u8 | 1));
    Half { tree, blocks: data.collect() }
}

impl Half {
    fn answer(&self, side: Side, order: &Order) -> Event {
        match order {
            Order::AskTrees(job, _) => Event::Tree(*job, side, self.tree.clone()),
            Order::AskData(job, _, from) => {
                let ranges = self.blocks.keys().map(|block| block * BLOCK_BYTES..(block + 1) * BLOCK_BYTES);
                let ranges: Vec<_> = ranges.filter(|range| range.start >= *from).take(5).collect();
                let until = if ranges.len() == 5 { ranges[4].end } else { u64::MAX };
                Event::Data(*job, side, Data { ranges, until })
            }
            Order::Hash { job, offset, length, .. } => {
                let size = self.tree.get(FILE).map_or(0, |entry| entry.size);
                let end = size.min(offset + u64::from(*length));
                let blocks = offset / BLOCK_BYTES..end.div_ceil(BLOCK_BYTES);
                let hash = |block: u64| [self.blocks.get(&block).copied().unwrap_or(0); 32];
                Event::Hashes(*job, side, blocks.map(hash).collect())
            }
            Order::Done(_) | Order::Broke(..) => unreachable!("they end it"),
        }
    }
}

/// Runs it at this rate; `change` may meddle with an answer. How long it took, and the end.
fn run(here: &Half, there: &Half, rate: u64, mut change: impl FnMut(&Order, Side, Event) -> Event) -> (u64, Order) {
    let mut orders = Vec::new();
    let mut verify = Verify::begin(Time(0), rate, &mut orders);
    let mut queue: VecDeque<Order> = orders.drain(..).collect();
    for ms in 0..1_000_000 {
        let now = Time::from_millis(ms);
        verify.step(now, Event::Tick, &mut orders);
        queue.extend(orders.drain(..));
        while let Some(order) = queue.pop_front() {
            if matches!(order, Order::Done(_) | Order::Broke(..)) {
                let progress = verify.progress();
                assert!(matches!(order, Order::Broke(..)) || progress.bytes_done == progress.bytes_total);
                return (ms, order);
            }
            for (side, of) in [(Side::Target, there), (Side::Holder, here)] {
                let answer = change(&order, side, of.answer(side, &order));
                verify.step(now, answer, &mut orders);
                queue.extend(orders.drain(..));
            }
        }
    }
    panic!("it comes to no end");
}

fn verdict(here: &Half, there: &Half) -> Verdict {
    match run(here, there, u64::MAX, |_, _, answer| answer).1 {
        Order::Done(verdict) => verdict,
        other => panic!("{other:?}"),
    }
}

#[test]
fn equal_replicas_are_proved_equal_and_holes_are_not_read() {
    let side = replica(300);
    let verdict = verdict(&side, &side);
    assert!(verdict.is_equal());
    assert_eq!(verdict.bytes, 200 * BLOCK_BYTES);
}

#[test]
fn every_single_block_that_differs_is_found_also_where_one_side_has_a_hole() {
    let here = replica(64);
    for block in 0..64 {
        for content in [77, 0] {
            let mut there = here.clone();
            there.blocks.insert(block, content);
            if content == 0 {
                there.blocks.remove(&block);
            }
            let verdict = verdict(&here, &there);
            if there.blocks == here.blocks {
                assert!(verdict.is_equal());
                continue;
            }
            let range = block * BLOCK_BYTES..(block + 1) * BLOCK_BYTES;
            let (name, what) = ("disk".to_owned(), Different::Content(range));
            assert_eq!(verdict.differences, [Difference { file: FILE, name, what }]);
        }
    }
}

#[test]
fn more_differences_than_are_listed_are_counted_and_all_of_them_are_kept_for_the_repair() {
    let here = replica(900);
    let mut there = here.clone();
    there.blocks.values_mut().step_by(2).for_each(|content| *content ^= 0x80);
    let verdict = verdict(&here, &there);
    assert_eq!((verdict.differences.len(), verdict.more), (VERIFY_LISTED_MAX, 300 - VERIFY_LISTED_MAX as u64));
    assert_eq!(verdict.unequal.bytes(), 300 * BLOCK_BYTES);
}

#[test]
fn what_differs_only_while_it_is_written_is_no_difference() {
    let side = replica(30);
    // A write beyond the end was under way at the first look: one side has a hash more. With the file at rest none has.
    let (_, end) = run(&side, &side, u64::MAX, |order, at, answer| match (order, answer) {
        (Order::Hash { whole: false, .. }, Event::Hashes(job, side, mut hashes)) if at == Side::Holder => {
            hashes.push([9; 32]);
            hashes[0] = [8; 32];
            Event::Hashes(job, side, hashes)
        }
        (_, answer) => answer,
    });
    assert!(matches!(end, Order::Done(verdict) if verdict.is_equal()));
    // Lengths, likewise: the listing that counts is the one with the file at rest.
    let mut longer = side.clone();
    longer.tree.set_size(FILE, 31 * BLOCK_BYTES);
    let (_, end) = run(&side, &side, u64::MAX, |order, at, answer| match order {
        Order::AskTrees(job, [FileId(0), ..]) if at == Side::Holder && *job == JobId(1) => {
            Event::Tree(*job, at, longer.tree.clone())
        }
        _ => answer,
    });
    assert!(matches!(end, Order::Done(verdict) if verdict.is_equal()));
}

#[test]
fn a_file_that_went_meanwhile_does_not_count() {
    let here = replica(30);
    let mut there = here.clone();
    there.blocks.insert(1, 99);
    let gone = Tree::new(OWNER);
    let (_, end) = run(&here, &there, u64::MAX, |order, side, answer| match order {
        Order::AskTrees(job, _) if *job != JobId(1) => Event::Tree(*job, side, gone.clone()),
        _ => answer,
    });
    assert!(matches!(end, Order::Done(verdict) if verdict.is_equal()));
}

#[test]
fn entries_that_differ_are_named_with_what_differs() {
    let here = replica(3);
    let mut there = here.clone();
    let make = |name: &str, id, mode| {
        let name = FileName::new(name).unwrap();
        Op::Create { parent: FileId::ROOT, name, id: FileId(id), owner: Owner { mode, ..OWNER } }
    };
    let mut here = here;
    here.tree.apply(&make("a", 20, 0o600)).unwrap();
    there.tree.apply(&make("b", 20, 0o640)).unwrap();
    here.tree.apply(&make("mine", 21, 0o600)).unwrap();
    there.tree.apply(&make("theirs", 22, 0o600)).unwrap();
    let verdict = verdict(&here, &there);
    let told: Vec<_> = verdict.differences.iter().map(|d| (&d.name[..], d.what.clone())).collect();
    let names_and_mode = Different::Entry("names, mode".to_owned());
    assert_eq!(told, [("a", names_and_mode), ("mine", Different::OnlyHere), ("theirs", Different::OnlyThere)]);
}

#[test]
fn a_range_that_cannot_be_read_is_a_difference_and_whose_it_is_decides_about_the_repair() {
    let here = replica(30);
    for bad in [Side::Holder, Side::Target] {
        let (_, end) = run(&here, &here, u64::MAX, |order, side, answer| match order {
            Order::Hash { job, offset: 65_536, .. } if side == bad => Event::Failed(*job, side, Errno::EIO),
            _ => answer,
        });
        let Order::Done(verdict) = end else { panic!("{end:?}") };
        assert_eq!(verdict.holder_unreadable, bad == Side::Holder);
        let [Difference { name, what: Different::Unreadable(side, range, Errno::EIO), .. }] = &verdict.differences[..]
        else {
            panic!("{verdict:?}")
        };
        assert_eq!((&name[..], *side, range.start), ("disk", bad, 65_536));
    }
    let (_, end) = run(&here, &here, u64::MAX, |order, side, answer| match order {
        Order::AskData(job, ..) if side == Side::Target => Event::Failed(*job, side, Errno::EIO),
        _ => answer,
    });
    assert_eq!(end, Order::Broke(Side::Target, Errno::EIO));
}

#[test]
fn answers_of_a_peer_that_make_no_sense_break_nothing() {
    let side = replica(3);
    let data = |ranges: Vec<std::ops::Range<u64>>, until| {
        let asked = run(&side, &side, u64::MAX, |order, at, answer| match order {
            Order::AskData(job, ..) if at == Side::Target => {
                Event::Data(*job, at, Data { ranges: ranges.clone(), until })
            }
            // More hashes than were asked for, or none.
            Order::Hash { job, .. } if at == Side::Target => Event::Hashes(*job, at, vec![[1; 32]; ranges.len() * 99]),
            _ => answer,
        });
        assert!(matches!(asked.1, Order::Done(_)));
    };
    data(vec![1..2, 5..6 << 30], u64::MAX);
    data(vec![1..2, (u64::MAX - 1)..u64::MAX], u64::MAX);
    data(Vec::new(), 0);
    data(vec![7..9, 9..11], 1);
}

#[test]
fn the_rate_is_kept() {
    let side = replica(300);
    // 200 blocks of 64 KiB are 12.5 MiB.
    let (ms, _) = run(&side, &side, 1 << 20, |_, _, answer| answer);
    assert!((12_000..13_500).contains(&ms), "{ms} ms for 12.5 MiB at 1 MiB/s");
    let (ms, _) = run(&side, &side, 64 << 10, |_, _, answer| answer);
    assert!((190_000..201_000).contains(&ms), "{ms} ms for 12.5 MiB at 64 KiB/s");
}
