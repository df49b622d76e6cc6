//! A hypervisor whose VM is a state in memory: for tests of what stands above, without libvirt.
//!
//! Holds: the definition, the state, a log of calls. Keeps out: processes, disks.
//! Clones share one VM, so that a test keeps a handle and looks at, ends or breaks what the engine drives.
use crate::{Facts, Hypervisor, Inventory, Listed, VmEnd, VmError, VmEvent, VmResult, VmState};
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

/// The fake. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Fake {
    name: String,
    // One lock for all: guards the VM's whole state between the engine's VM thread and the test.
    shared: Arc<Mutex<Shared>>,
}

#[derive(Debug)]
struct Shared {
    definition: Option<String>,
    state: VmState,
    calls: Vec<&'static str>,
    refused: Vec<&'static str>,
    deaf_guest: bool,
    starts: usize,
    events: Vec<Sender<VmEvent>>,
}

impl Shared {
    fn tell(&mut self, event: &VmEvent) {
        self.events.retain(|to| to.send(event.clone()).is_ok());
    }
}

impl Fake {
    /// A host on which the VM is not defined.
    #[must_use]
    pub fn new(name: &str) -> Self {
        let shared = Shared {
            definition: None,
            state: VmState::Undefined,
            calls: Vec::new(),
            refused: Vec::new(),
            deaf_guest: false,
            starts: 0,
            events: Vec::new(),
        };
        Self { name: name.to_owned(), shared: Arc::new(Mutex::new(shared)) }
    }

    fn lock(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().expect("no test panics while it holds the fake VM")
    }

    fn call(&self, call: &'static str) -> VmResult<MutexGuard<'_, Shared>> {
        let mut vm = self.lock();
        vm.calls.push(call);
        if vm.refused.contains(&call) {
            let why = "the test says so".to_owned();
            return Err(VmError::Refused { call, name: self.name.clone(), why });
        }
        Ok(vm)
    }

    fn change(&self, call: &'static str, from: &[VmState], to: VmState) -> VmResult<()> {
        let mut vm = self.call(call)?;
        if vm.state == VmState::Undefined {
            return Err(VmError::Undefined { name: self.name.clone() });
        }
        if !from.contains(&vm.state) {
            let why = format!("it is {:?}", vm.state);
            return Err(VmError::Refused { call, name: self.name.clone(), why });
        }
        vm.state = to;
        Ok(())
    }

    /// Ends the VM from outside the engine, as a guest, an admin or a crash does.
    pub fn end(&self, how: VmEnd) {
        let mut vm = self.lock();
        if matches!(vm.state, VmState::Running | VmState::Paused) {
            vm.state = VmState::Off;
            vm.tell(&VmEvent::Ended(how));
        }
    }

    /// This call fails from now on, or works again.
    pub fn refuse(&self, call: &'static str, refused: bool) {
        let mut vm = self.lock();
        vm.refused.retain(|c| *c != call);
        if refused {
            vm.refused.push(call);
        }
    }

    /// The guest does not listen to a request to power off.
    pub fn deaf_guest(&self, deaf: bool) {
        self.lock().deaf_guest = deaf;
    }

    /// How it stands, without a call.
    #[must_use]
    pub fn peek(&self) -> VmState {
        self.lock().state
    }

    /// How often it was started.
    #[must_use]
    pub fn starts(&self) -> usize {
        self.lock().starts
    }

    /// The calls so far.
    #[must_use]
    pub fn calls(&self) -> Vec<&'static str> {
        self.lock().calls.clone()
    }
}

impl Hypervisor for Fake {
    fn define(&self, xml: &str) -> VmResult<()> {
        let mut vm = self.call("define")?;
        vm.definition = Some(xml.to_owned());
        if vm.state == VmState::Undefined {
            vm.state = VmState::Off;
        }
        Ok(())
    }
    fn definition(&self) -> VmResult<String> {
        let vm = self.call("definition")?;
        vm.definition.clone().ok_or_else(|| VmError::Undefined { name: self.name.clone() })
    }
    fn start(&self) -> VmResult<()> {
        self.change("start", &[VmState::Off], VmState::Running)?;
        let mut vm = self.lock();
        vm.starts += 1;
        vm.tell(&VmEvent::Running);
        Ok(())
    }
    fn shutdown(&self, _limit: Duration) -> VmResult<bool> {
        self.change("shutdown", &[VmState::Running, VmState::Paused, VmState::Off], VmState::Off)?;
        let mut vm = self.lock();
        let by_itself = !vm.deaf_guest;
        vm.tell(&VmEvent::Ended(if by_itself { VmEnd::GuestShutdown } else { VmEnd::Destroyed }));
        Ok(by_itself)
    }
    fn destroy(&self) -> VmResult<()> {
        self.change("destroy", &[VmState::Running, VmState::Paused, VmState::Off], VmState::Off)?;
        self.lock().tell(&VmEvent::Ended(VmEnd::Destroyed));
        Ok(())
    }
    fn pause(&self) -> VmResult<()> {
        self.change("pause", &[VmState::Running, VmState::Paused], VmState::Paused)?;
        self.lock().tell(&VmEvent::Paused { io_error: false });
        Ok(())
    }
    fn resume(&self) -> VmResult<()> {
        self.change("resume", &[VmState::Running, VmState::Paused], VmState::Running)?;
        self.lock().tell(&VmEvent::Running);
        Ok(())
    }
    fn state(&self) -> VmResult<VmState> {
        Ok(self.call("state")?.state)
    }
    fn process(&self) -> VmResult<Option<u32>> {
        drop(self.call("process")?);
        Ok(None)
    }
    fn events(&self) -> VmResult<Receiver<VmEvent>> {
        let (to, from) = channel();
        self.lock().events.push(to);
        Ok(from)
    }
}

impl Inventory for Fake {
    fn list(&self) -> VmResult<Vec<Listed>> {
        let vm = self.call("list")?;
        Ok(vm.definition.iter().map(|xml| Listed { name: self.name.clone(), xml: xml.clone() }).collect())
    }
    fn facts(&self) -> VmResult<Facts> {
        let state = self.call("facts")?.state;
        Ok(Facts { state, persistent: true, autostart: false, snapshots: 0, checkpoints: 0, managed_save: false })
    }
    fn set_autostart(&self, _on: bool) -> VmResult<()> {
        self.call("set_autostart").map(drop)
    }
    fn undefine(&self) -> VmResult<()> {
        let mut vm = self.call("undefine")?;
        (vm.definition, vm.state) = (None, VmState::Undefined);
        Ok(())
    }
    fn volume_path(&self, _pool: &str, volume: &str) -> VmResult<PathBuf> {
        drop(self.call("volume_path")?);
        Ok(PathBuf::from(volume))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fake_vm_starts_only_when_defined_and_tells_how_it_ended() {
        let vm = Fake::new("db");
        let events = vm.events().unwrap();
        assert!(matches!(vm.start(), Err(VmError::Undefined { .. })));
        vm.define("<domain/>").unwrap();
        vm.start().unwrap();
        assert!(vm.start().is_err(), "it runs");
        vm.pause().unwrap();
        vm.resume().unwrap();
        vm.end(VmEnd::Crashed);
        let seen: Vec<_> = events.try_iter().collect();
        let paused = VmEvent::Paused { io_error: false };
        assert_eq!(seen, [VmEvent::Running, paused, VmEvent::Running, VmEvent::Ended(VmEnd::Crashed)]);
        vm.refuse("start", true);
        assert!(matches!(vm.start(), Err(VmError::Refused { .. })));
        assert_eq!(vm.starts(), 1);
    }
}
