//! The driver while libvirtd is killed and started again. Runs where `VMTWIN_LIBVIRT_URI` is set and `VMTWIN_LIBVIRTD` is the
//! command that starts libvirtd in the background (the lab sets both); a file of its own, so that no other test uses the
//! daemon meanwhile.
use std::process::Command;
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};
use vmtwin_hypervisor::libvirt::Libvirt;
use vmtwin_hypervisor::{Hypervisor, Inventory, VmEnd, VmError, VmEvent, VmState};

const NAME: &str = "vmtwin-test-restart";
const PID_FILE: &str = "/run/libvirt/libvirtd.pid";

fn wait(events: &Receiver<VmEvent>, wanted: &VmEvent) {
    let until = Instant::now() + Duration::from_secs(90);
    loop {
        let left = until.saturating_duration_since(Instant::now());
        if events.recv_timeout(left).expect("the event comes") == *wanted {
            return;
        }
    }
}

fn shell(command: &str) {
    assert!(Command::new("/bin/sh").args(["-c", command]).status().unwrap().success(), "{command}");
}

/// Destroys and undefines the VM when the test ends, however it ends.
struct Vm(Libvirt);

impl Drop for Vm {
    fn drop(&mut self) {
        let _ = self.0.destroy();
        let _ = self.0.undefine();
    }
}

#[test]
fn a_daemon_that_comes_back_is_found_and_what_was_missed_is_told() {
    let set = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
    let (Some(uri), Some(daemon)) = (set("VMTWIN_LIBVIRT_URI"), set("VMTWIN_LIBVIRTD")) else {
        println!("SKIPPED: VMTWIN_LIBVIRT_URI and VMTWIN_LIBVIRTD are not set; tools/test sets them in the lab");
        return;
    };
    let vm = Vm(Libvirt::connect(&uri, NAME).unwrap());
    vm.0.destroy().unwrap();
    vm.0.define(&format!(
        "<domain type='qemu'><name>{NAME}</name><memory unit='MiB'>32</memory>\
         <os><type arch='x86_64' machine='q35'>hvm</type></os>\
         <devices><controller type='usb' model='none'/><memballoon model='none'/></devices></domain>"
    ))
    .unwrap();
    let events = vm.0.events().unwrap();

    // A VM that lives on is not told to have ended; one that died meanwhile is.
    vm.0.start().unwrap();
    shell(&format!("kill -KILL $(cat {PID_FILE}) && rm -f {PID_FILE}"));
    wait(&events, &VmEvent::Connection { up: false });
    assert!(matches!(vm.0.state(), Err(VmError::NoContact { .. })));
    assert!(vm.0.process().unwrap().is_some(), "found without libvirtd");
    shell(&daemon);
    wait(&events, &VmEvent::Connection { up: true });
    assert_eq!(vm.0.state().unwrap(), VmState::Running);

    shell(&format!("kill -KILL $(cat {PID_FILE}) && rm -f {PID_FILE}"));
    wait(&events, &VmEvent::Connection { up: false });
    let pid = vm.0.process().unwrap().unwrap();
    shell(&format!("kill -KILL {pid}"));
    shell(&daemon);
    wait(&events, &VmEvent::Ended(VmEnd::Crashed));
    assert_eq!(vm.0.state().unwrap(), VmState::Off);

    // And without any daemon a VM can be ended.
    vm.0.start().unwrap();
    shell(&format!("kill -KILL $(cat {PID_FILE}) && rm -f {PID_FILE}"));
    wait(&events, &VmEvent::Connection { up: false });
    vm.0.destroy().unwrap();
    assert_eq!(vm.0.process().unwrap(), None);
    shell(&daemon);
    wait(&events, &VmEvent::Ended(VmEnd::Destroyed));
}
