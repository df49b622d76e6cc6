//! The QEMU process of a VM: found, killed and waited for without libvirt, which waits where the VM's I/O is held.
//!
//! Invariant: a signal goes only to a process that was seen to run this VM in our own network name space after its
//! handle was opened, so neither a successor with the same pid nor a namesake on another (namespace) host is hit.
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fd::OwnedFd;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use std::fs;
use vmtwin_core::time::Time;

/// The kernel's unit of a process's start in /proc, the same on all machines, in nanoseconds.
const TICK_NS: u64 = 10_000_000;

/// A running QEMU.
#[derive(Debug)]
pub struct Process {
    /// Its process id.
    pub pid: u32,
    /// When it was started, on CLOCK_BOOTTIME, to 10 ms.
    pub began: Time,
    handle: OwnedFd,
}

impl Process {
    /// The process of the VM, by libvirt's pid file, else by its command line.
    #[must_use]
    pub fn find(name: &str) -> Option<Self> {
        let noted = fs::read_to_string(format!("/run/libvirt/qemu/{name}.pid")).ok();
        let noted = noted.and_then(|pid| Self::open(pid.trim().parse().ok()?, name));
        noted.or_else(|| {
            let all = fs::read_dir("/proc").ok()?.flatten();
            all.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).find_map(|pid| Self::open(pid, name))
        })
    }

    fn open(pid: u32, name: &str) -> Option<Self> {
        let handle = pidfd_open(Pid::from_raw(i32::try_from(pid).ok()?)?, PidfdFlags::empty()).ok()?;
        let space = |of: &str| fs::read_link(format!("/proc/{of}/ns/net")).ok();
        let command = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        if !runs(&command, name) || space(&pid.to_string())? != space("self")? {
            return None;
        }
        let began = began(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)?;
        Some(Self { pid, began, handle })
    }

    /// SIGKILL. A process that is gone already is no error.
    pub fn kill(&self) {
        let _ = pidfd_send_signal(&self.handle, Signal::KILL);
    }

    /// Waits until all of its threads are gone, however long that takes.
    pub fn wait(&self) {
        while poll(&mut [PollFd::new(&self.handle, PollFlags::IN)], None).is_err() {}
    }
}

/// The 22nd field of /proc/PID/stat; the second, the name, may hold anything.
fn began(stat: &str) -> Option<Time> {
    let ticks: u64 = stat.rsplit_once(')')?.1.split_ascii_whitespace().nth(19)?.parse().ok()?;
    Some(Time(ticks.saturating_mul(TICK_NS)))
}

/// Whether this is the command line of a QEMU that libvirt started for the VM: `-name guest=NAME,...`, commas doubled.
fn runs(command: &[u8], name: &str) -> bool {
    let guest = format!("guest={}", name.replace(',', ",,")).into_bytes();
    let mut words = command.split(|byte| *byte == 0);
    while let Some(word) = words.next() {
        if word == b"-name" {
            let rest = words.next().and_then(|value| value.strip_prefix(guest.as_slice()));
            return rest.is_some_and(|rest| rest.is_empty() || (rest[0] == b',' && rest.get(1) != Some(&b',')));
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vm_is_told_from_its_namesakes_by_the_whole_name() {
        let command = |value: &str| format!("/usr/bin/qemu\0-name\0{value}\0-S\0").into_bytes();
        assert!(runs(&command("guest=db,debug-threads=on"), "db"));
        assert!(runs(&command("guest=db"), "db"));
        assert!(runs(&command("guest=a,,b,debug-threads=on"), "a,b"));
        assert!(!runs(&command("guest=db2,debug-threads=on"), "db"));
        assert!(!runs(&command("guest=db,,2,debug-threads=on"), "db"));
        assert!(!runs(b"/bin/sh\0-c\0guest=db", "db"));
        assert!(!runs(b"", "db"));
    }

    #[test]
    fn a_killed_process_is_waited_for() {
        // A shell with QEMU's words on its command line stands in.
        let script = ["-c", "read line", "-name", "guest=vmtwin-stand-in,debug-threads=on"];
        let mut child =
            std::process::Command::new("/bin/sh").args(script).stdin(std::process::Stdio::piped()).spawn().unwrap();
        // A new process shows its command line a moment after its parent goes on.
        let began = std::time::Instant::now();
        let process = loop {
            match Process::open(child.id(), "vmtwin-stand-in") {
                Some(process) => break process,
                None => assert!(began.elapsed().as_secs() < 60, "it never ran"),
            }
        };
        assert!(Process::open(child.id(), "another").is_none());
        let own = fs::read_to_string("/proc/self/stat").unwrap();
        assert!(super::began(&own).unwrap() <= process.began && super::began("7 (a) b) S 1").is_none());
        process.kill();
        process.wait();
        assert!(!child.wait().unwrap().success());
    }
}
