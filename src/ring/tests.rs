//! The ring against the real kernel: no wake-up is overslept, no memory is lost or freed too soon.
use crate::{Completion, Descriptor, Memory, PAYLOAD_BYTES, Pool, Ring};
use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::rc::Rc;
use std::sync::mpsc;
use std::thread;

/// Far longer than anything here takes, in nanoseconds: reached only by a wake-up that got lost.
const LIMIT: u64 = 120_000_000_000;

fn now() -> u64 {
    let t = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    t.tv_sec as u64 * 1_000_000_000 + t.tv_nsec as u64
}

fn pair() -> (Descriptor, UnixStream) {
    let (ours, other) = UnixStream::pair().unwrap();
    (Rc::new(OwnedFd::from(ours)), other)
}

fn temporary() -> Descriptor {
    Rc::new(OwnedFd::from(tempfile::tempfile().unwrap()))
}

/// Waits for `count` completions.
fn collect(ring: &mut Ring, count: usize) -> Vec<Completion> {
    let (mut done, end) = (Vec::new(), now() + LIMIT);
    while done.len() < count {
        ring.wait(Some(end), &mut done).unwrap();
        assert!(now() < end, "{} of {count} completions came", done.len());
    }
    assert_eq!(done.len(), count);
    done
}

fn one(ring: &mut Ring) -> Completion {
    collect(ring, 1).pop().unwrap()
}

#[test]
fn no_wake_up_is_overslept_in_a_storm() {
    const EACH: u64 = 20_000;
    let mut ring = Ring::new(8).unwrap();
    let (tell, told) = mpsc::channel();
    let threads: Vec<_> = (0..3)
        .map(|part| {
            let (tell, waker) = (tell.clone(), ring.waker());
            thread::spawn(move || {
                for n in 0..EACH {
                    tell.send(part * EACH + n).unwrap();
                    waker.wake();
                    if n % 97 == 0 {
                        thread::yield_now();
                    }
                }
            })
        })
        .collect();
    let (mut got, mut done, end) = (BTreeSet::new(), Vec::new(), now() + LIMIT);
    while got.len() < 3 * EACH as usize {
        ring.wait(Some(end), &mut done).unwrap();
        got.extend(told.try_iter());
        assert!(now() < end, "{} messages came", got.len());
    }
    assert!(done.is_empty(), "wake-ups are no completions");
    threads.into_iter().for_each(|t| t.join().unwrap());
}

#[test]
fn a_wake_up_sent_while_nobody_waits_ends_the_next_wait() {
    let mut ring = Ring::new(8).unwrap();
    ring.waker().wake();
    ring.wait(Some(now() + LIMIT), &mut Vec::new()).unwrap();
}

#[test]
fn bytes_go_out_of_any_memory_and_come_back_into_any() {
    let (mut ring, pool, file) = (Ring::new(8).unwrap(), Pool::new(4).unwrap(), temporary());
    let mut slot = pool.take().unwrap();
    slot.payload_mut()[..8192].fill(7);
    slot.payload_mut()[8191] = 9;
    let shared = slot.share();
    ring.write(&file, shared.clone(), 0..8192, 4096, 1);
    ring.write(&file, vec![1, 2, 3, 4], 1..3, 100, 2);
    for done in collect(&mut ring, 2) {
        assert_eq!(done.result.unwrap(), if done.token == 1 { 8192 } else { 2 });
    }
    assert_eq!(shared.payload()[8191], 9, "who shares it reads on");
    let slot = shared.unshare().expect("the ring gave its share back");

    ring.read(&file, slot, 10..10 + 8192, 4096, 3);
    let slot = one(&mut ring).into_slot().unwrap();
    assert_eq!((slot.payload()[10], slot.payload()[10 + 8191]), (7, 9));
    ring.read(&file, vec![0; 8], 4..8, 99, 4);
    let bytes = one(&mut ring).memory.and_then(Memory::into_bytes).unwrap();
    assert_eq!(bytes, [0, 0, 0, 0, 0, 2, 3, 0]);
}

#[test]
fn more_requests_than_the_queue_holds_are_all_done() {
    let (mut ring, file) = (Ring::new(8).unwrap(), temporary());
    for n in 0..3000u64 {
        ring.write(&file, n.to_ne_bytes().to_vec(), 0..8, n * 8, n);
    }
    assert_eq!(ring.in_flight(), 3000);
    let done = collect(&mut ring, 3000);
    assert!(done.iter().all(|c| matches!(c.result, Ok(8))));
    assert_eq!(done.iter().map(|c| c.token).collect::<BTreeSet<_>>().len(), 3000);
    ring.read(&file, vec![0; 8], 0..8, 2999 * 8, 0);
    assert_eq!(one(&mut ring).memory.unwrap().bytes(), 2999u64.to_ne_bytes());
    assert_eq!(ring.in_flight(), 0);
}

#[test]
fn memory_comes_back_with_an_error_too() {
    let (mut ring, pool) = (Ring::new(8).unwrap(), Pool::new(2).unwrap());
    let (socket, _other) = pair();
    ring.fsync(&socket, true, 1);
    assert_eq!(one(&mut ring).errno(), libc::EINVAL);
    let folder: Descriptor = Rc::new(OwnedFd::from(std::fs::File::open("/").unwrap()));
    ring.read(&folder, pool.take().unwrap(), 0..4096, 0, 2);
    let done = one(&mut ring);
    assert_eq!(done.errno(), libc::EISDIR);
    assert_eq!(pool.free(), 1);
    drop(done.into_slot().unwrap());
    assert_eq!(pool.free(), 2);
}

#[test]
#[should_panic(expected = "out of range")]
fn a_range_beyond_its_memory_is_refused() {
    let (mut ring, file) = (Ring::new(8).unwrap(), temporary());
    ring.read(&file, vec![0; 8], 4..9, 0, 1);
}

#[test]
fn what_is_cancelled_ends_and_gives_its_memory_back() {
    let (mut ring, pool) = (Ring::new(8).unwrap(), Pool::new(2).unwrap());
    let (socket, other) = pair();
    let poll = ring.poll(&socket, libc::POLLIN, 1);
    let recv = ring.recv(&socket, pool.take().unwrap(), 0..100, 2);
    let timer = ring.timer(now() + LIMIT, 3);
    ring.wait(Some(now()), &mut Vec::new()).unwrap();
    [poll, recv, timer].into_iter().for_each(|op| ring.cancel(op));
    let done = collect(&mut ring, 3);
    assert!(done.iter().all(|c| c.errno() == libc::ECANCELED), "{done:?}");
    drop(done);
    assert_eq!(pool.free(), 2);

    // An old name finds nothing, also where its place is used again.
    ring.poll(&socket, libc::POLLIN, 4);
    [poll, recv, timer].into_iter().for_each(|op| ring.cancel(op));
    (&other).write_all(b"x").unwrap();
    let done = one(&mut ring);
    assert_eq!((done.token, done.result.unwrap() & 1), (4, 1));
}

#[test]
fn no_timer_goes_off_before_its_time_and_a_past_one_does_too() {
    let mut ring = Ring::new(8).unwrap();
    let start = now();
    let times = [start + 60_000_000, 1, start + 20_000_000];
    for (token, at) in (0..).zip(times) {
        ring.timer(at, token);
    }
    let (mut done, end) = (Vec::new(), start + LIMIT);
    while done.len() < times.len() && now() < end {
        ring.wait(Some(end), &mut done).unwrap();
        assert!(done.iter().all(|c| now() >= times[c.token as usize] && matches!(c.result, Ok(0))));
    }
    assert_eq!((done.len(), ring.in_flight()), (times.len(), 0));
}

#[test]
fn a_wait_ends_at_its_time_whatever_times_came_before() {
    let mut ring = Ring::new(8).unwrap();
    let mut done = Vec::new();
    let far = now() + LIMIT;
    ring.wait(Some(now()), &mut done).unwrap();
    for _ in 0..50 {
        let until = now() + 2_000_000;
        ring.waker().wake();
        ring.wait(Some(far), &mut done).unwrap();
        while now() < until {
            ring.wait(Some(until), &mut done).unwrap();
        }
        assert!(now() < far, "the earlier time was lost");
    }
    assert!(done.is_empty() && ring.in_flight() == 0);
}

#[test]
fn a_large_send_arrives_whole() {
    const BYTES: usize = 1 << 20;
    let (mut ring, pool) = (Ring::new(8).unwrap(), Pool::new(2).unwrap());
    let (socket, mut other) = pair();
    let reader = thread::spawn(move || {
        let mut all = Vec::new();
        other.read_to_end(&mut all).unwrap();
        all
    });
    let mut slot = pool.take().unwrap();
    for (n, byte) in slot.payload_mut().iter_mut().enumerate() {
        *byte = (n / 4096) as u8;
    }
    ring.send(&socket, slot, 0..BYTES, 1);
    let done = one(&mut ring);
    assert_eq!(*done.result.as_ref().unwrap() as usize, BYTES);
    let slot = done.into_slot().unwrap();
    drop(socket);
    assert!(reader.join().unwrap() == slot.payload()[..BYTES]);
}

#[test]
fn recv_says_what_came_and_when_the_other_side_ends() {
    let mut ring = Ring::new(8).unwrap();
    let (socket, other) = pair();
    ring.recv(&socket, vec![0; 16], 8..16, 1);
    (&other).write_all(b"abc").unwrap();
    let done = one(&mut ring);
    assert_eq!(done.result.unwrap(), 3);
    assert_eq!(&done.memory.unwrap().bytes()[8..11], b"abc");
    drop(other);
    ring.recv(&socket, vec![0; 16], 0..16, 2);
    assert_eq!(one(&mut ring).result.unwrap(), 0);
}

#[test]
fn files_are_allocated_flushed_and_closed() {
    let (mut ring, file) = (Ring::new(8).unwrap(), temporary());
    ring.fallocate(&file, 0, 0, 1 << 20, 1);
    assert!(one(&mut ring).result.is_ok());
    assert_eq!(rustix::fs::fstat(&file).unwrap().st_size, 1 << 20);
    ring.fsync(&file, true, 2);
    ring.fsync(&file, false, 3);
    assert!(collect(&mut ring, 2).iter().all(|c| matches!(c.result, Ok(0))));

    let (ours, mut other) = UnixStream::pair().unwrap();
    ring.close(ours.into(), 4);
    assert!(one(&mut ring).result.is_ok());
    assert_eq!(other.read(&mut [0; 1]).unwrap(), 0, "the other side sees the end");
}

#[test]
fn a_dropped_ring_ends_its_requests_before_their_memory() {
    let pool = Pool::new(3).unwrap();
    let (socket, mut other) = pair();
    let mut ring = Ring::new(8).unwrap();
    for n in 0..3 {
        ring.recv(&socket, pool.take().unwrap(), 0..4096, n);
    }
    ring.timer(now() + LIMIT, 9);
    ring.wait(Some(now()), &mut Vec::new()).unwrap();
    drop(socket);
    assert_eq!(pool.free(), 0);
    drop(ring);
    assert_eq!(pool.free(), 3, "nothing had to be leaked");
    assert_eq!(other.read(&mut [0; 1]).unwrap(), 0, "its descriptor is closed");
}

#[test]
fn a_held_descriptor_ends_with_the_ring_only() {
    let mut ring = Ring::new(8).unwrap();
    let (held, mut other) = UnixStream::pair().unwrap();
    ring.hold_until_drained(held.into()).unwrap();
    other.set_nonblocking(true).unwrap();
    assert_eq!(other.read(&mut [0; 1]).unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
    drop(ring);
    other.set_nonblocking(false).unwrap();
    assert_eq!(other.read(&mut [0; 1]).unwrap(), 0);
}

#[test]
fn a_pool_hands_out_each_slot_once_and_a_slot_goes_back_with_its_last_holder() {
    let pool = Pool::new(3).unwrap();
    let mut slots: Vec<_> = (0..3).map(|_| pool.take().unwrap()).collect();
    assert!(pool.take().is_none());
    for (n, slot) in slots.iter_mut().enumerate() {
        assert_eq!(slot.payload().as_ptr() as usize % 4096, 0);
        slot.headed_mut(80).fill(n as u8);
        assert_eq!(slot.headed(80).len(), 80 + PAYLOAD_BYTES);
    }
    assert!(slots.iter().enumerate().all(|(n, slot)| slot.headed(4096)[4096 - 80..].iter().all(|&b| b == n as u8)));
    let first = slots.remove(0).share();
    let second = first.clone();
    assert_eq!(pool.free(), 0);
    let first = first.unshare().expect_err("two hold it");
    drop(second);
    assert_eq!(pool.free(), 0);
    drop(first.unshare().unwrap());
    assert_eq!(pool.free(), 1);
    // A slot outlives the pool's handle.
    drop(pool);
    assert_eq!(slots[1].payload()[5], 2);
}

#[test]
fn trimming_gives_back_what_lay_idle_and_keeps_what_is_warm() {
    let pool = Pool::new(4).unwrap();
    let touch = |count: usize| {
        let mut slots: Vec<_> = (0..count).map(|_| pool.take().unwrap()).collect();
        slots.iter_mut().for_each(|slot| slot.payload_mut().fill(1));
        while let Some(slot) = slots.pop() {
            drop(slot); // the last taken is the first given back: the same one comes first again
        }
    };
    touch(4);
    pool.trim();
    touch(1);
    pool.trim();
    let slots: Vec<_> = (0..4).map(|_| pool.take().unwrap()).collect();
    let kept: Vec<_> = slots.iter().map(|slot| slot.payload()[0] == 1).collect();
    assert_eq!(kept, [true, false, false, false]);
}
