//! What goes wrong, and when.
use super::world::{Happens, MS, SECOND, World};
use vmtwin_core::namespace::Errno;
use vmtwin_core::replica::Role;

/// Which faults there are, and how often (one draw a time between `every` / 2 and `every` * 3 / 2).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Faults {
    pub every: u64,
    pub cut: bool,
    pub flap: bool,
    pub slow: bool,
    pub kill: bool,
    pub power: bool,
    pub pause: bool,
    pub arbiter: bool,
    pub isolate: bool,
    pub disk: bool,
    pub swap: bool,
}

impl Faults {
    pub const NONE: Self = Self {
        every: SECOND,
        cut: false,
        flap: false,
        slow: false,
        kill: false,
        power: false,
        pause: false,
        arbiter: false,
        isolate: false,
        disk: false,
        swap: false,
    };
    pub const ALL: Self = Self {
        every: 1500 * MS,
        cut: true,
        flap: true,
        slow: true,
        kill: true,
        power: true,
        pause: true,
        arbiter: true,
        isolate: true,
        disk: true,
        swap: true,
    };

    pub fn off(&mut self) {
        *self = Self::NONE;
    }
}

impl World {
    /// One fault, or the end of one.
    pub fn fault(&mut self) {
        let faults = self.faults;
        let delay = self.rng.between(faults.every / 2, faults.every * 3 / 2);
        self.at(delay, Happens::Fault);
        if faults == Faults::NONE {
            // A story says itself what breaks and what is mended.
            return;
        }
        // What is broken is mended again, by and by.
        if self.rng.chance(500) {
            self.net.works = true;
            self.net.slow_ns = 0;
            self.register.reached = [true; 2];
        }
        for node in [0, 1] {
            if self.nodes[node].replica.is_none() && self.rng.chance(600) {
                self.at(0, Happens::Boot(node));
            }
            if self.nodes[node].disk.fault.is_some() && self.rng.chance(700) {
                self.nodes[node].disk.fault = None;
            }
        }
        let node = usize::from(self.rng.chance(500));
        match self.rng.below(14) {
            0 if faults.cut => {
                self.note(|| "the link is cut".to_owned());
                self.cut();
            }
            1 | 2 if faults.flap => {
                self.note(|| "the connection breaks".to_owned());
                self.break_connection();
            }
            3 if faults.slow => self.net.slow_ns = *self.rng.pick(&[5 * MS, 300 * MS, 4 * SECOND]),
            4 if faults.kill => self.kill(node),
            5 | 6 if faults.power => self.power_loss(node),
            7 if faults.power && self.rng.chance(300) => {
                self.power_loss(node);
                self.power_loss(1 - node);
            }
            8 if faults.pause => {
                let until = self.now + self.rng.between(10 * MS, 4 * SECOND);
                self.note(|| format!("n{node} stands still until {until}"));
                self.nodes[node].paused_until = until;
            }
            9 if faults.arbiter => {
                self.note(|| format!("n{node} is cut off from the acceptors"));
                self.register.reached[node] = false;
            }
            10 if faults.disk && self.rng.chance(500) => {
                // One disk at a time, and only where the other replica lives in sync (PROTOCOL.md, section 4).
                let other = &self.nodes[1 - node];
                let covered = self.register.record.in_sync.len() == 2
                    && other.replica.as_ref().is_some_and(|r| matches!(r.role(), Role::Holder | Role::Follower))
                    && !other.disk.marks.erred
                    && !other.disk.marks.broken
                    && other.disk.fault.is_none();
                if covered && !self.nodes[node].disk.marks.broken {
                    let errno = *self.rng.pick(&[Errno::EIO, Errno::ENOSPC]);
                    self.fail_disk(node, errno);
                }
            }
            12 | 13 if faults.isolate => {
                self.note(|| format!("n{node} is cut off from all"));
                self.cut();
                self.register.reached[node] = false;
            }
            11 if faults.swap => self.begin_swap(),
            _ => {}
        }
    }
}
