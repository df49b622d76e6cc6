//! The driver against a real libvirtd and QEMU. Runs where `VMTWIN_LIBVIRT_URI` is set (the lab sets it); it defines, runs
//! and undefines VMs named `vmtwin-test-*`, without disks: QEMU alone is enough to live, pause and die.
//!
//! And against libvirt's built-in `test:` driver, which needs no daemon: events of another's acts.
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};
use vmtwin_hypervisor::libvirt::Libvirt;
use vmtwin_hypervisor::{Hypervisor, Inventory, VmEnd, VmError, VmEvent, VmState};

const LONG: Duration = Duration::from_secs(90);

/// The URI to test with, or a word that the test was skipped.
fn uri() -> Option<String> {
    let uri = std::env::var("VMTWIN_LIBVIRT_URI").ok().filter(|uri| !uri.is_empty());
    if uri.is_none() {
        println!("SKIPPED: VMTWIN_LIBVIRT_URI is not set; tools/test sets it in the lab");
    }
    uri
}

/// A VM of the test; undefined when it goes.
struct Vm {
    driver: Libvirt,
    events: Receiver<VmEvent>,
}

impl Vm {
    fn new(uri: &str, name: &str) -> Self {
        let driver = Libvirt::connect(uri, name).unwrap();
        driver.destroy().unwrap();
        driver.undefine().unwrap();
        let events = driver.events().unwrap();
        driver.define(&xml(name)).unwrap();
        Self { driver, events }
    }

    /// The next event that `wanted` takes.
    fn wait<T>(&self, wanted: impl Fn(&VmEvent) -> Option<T>) -> T {
        let until = Instant::now() + LONG;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let event = self.events.recv_timeout(left).expect("the event comes");
            if let Some(found) = wanted(&event) {
                return found;
            }
        }
    }

    fn ended(&self) -> VmEnd {
        self.wait(|event| if let VmEvent::Ended(end) = event { Some(*end) } else { None })
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        let _ = self.driver.destroy();
        let _ = self.driver.undefine();
    }
}

fn xml(name: &str) -> String {
    format!(
        "<domain type='qemu'><name>{name}</name><memory unit='MiB'>32</memory><vcpu>1</vcpu>\
         <os><type arch='x86_64' machine='q35'>hvm</type></os><features><acpi/></features>\
         <on_poweroff>destroy</on_poweroff><on_crash>destroy</on_crash>\
         <devices><controller type='usb' model='none'/><memballoon model='none'/></devices></domain>"
    )
}

#[test]
fn a_vm_lives_pauses_and_ends_as_told() {
    let Some(uri) = uri() else { return };
    let vm = Vm::new(&uri, "vmtwin-test-life");
    let driver = &vm.driver;
    let defined = vm.wait(|event| if let VmEvent::Defined { xml } = event { Some(xml.clone()) } else { None });
    assert_eq!(defined, driver.definition().unwrap());
    assert_eq!((driver.state().unwrap(), driver.process().unwrap()), (VmState::Off, None));

    driver.start().unwrap();
    vm.wait(|event| (*event == VmEvent::Running).then_some(()));
    assert_eq!(driver.state().unwrap(), VmState::Running);
    assert!(driver.process().unwrap().is_some());
    assert!(matches!(driver.start(), Err(VmError::Refused { call: "start", .. })), "it runs already");

    driver.pause().unwrap();
    vm.wait(|event| (*event == VmEvent::Paused { io_error: false }).then_some(()));
    assert_eq!(driver.state().unwrap(), VmState::Paused);
    driver.resume().unwrap();
    vm.wait(|event| (*event == VmEvent::Running).then_some(()));

    driver.destroy().unwrap();
    assert_eq!((driver.state().unwrap(), driver.process().unwrap()), (VmState::Off, None));
    assert_eq!(vm.ended(), VmEnd::Destroyed);
    driver.destroy().unwrap();
}

#[test]
fn a_guest_that_ignores_the_request_is_destroyed_at_the_limit() {
    let Some(uri) = uri() else { return };
    let vm = Vm::new(&uri, "vmtwin-test-deaf");
    vm.driver.start().unwrap();
    assert!(!vm.driver.shutdown(Duration::from_secs(2)).unwrap());
    assert_eq!(vm.driver.state().unwrap(), VmState::Off);
    assert!(vm.driver.shutdown(LONG).unwrap(), "one that is off went down by itself");
}

#[test]
fn a_kill_from_outside_is_a_crash_and_our_own_is_not() {
    let Some(uri) = uri() else { return };
    let vm = Vm::new(&uri, "vmtwin-test-crash");
    for (signal, end) in [("-KILL", VmEnd::Crashed), ("-TERM", VmEnd::HostShutdown)] {
        vm.driver.start().unwrap();
        let pid = vm.driver.process().unwrap().unwrap().to_string();
        assert!(std::process::Command::new("kill").args([signal, &pid]).status().unwrap().success());
        assert_eq!(vm.ended(), end);
    }
    vm.driver.start().unwrap();
    assert!(vm.driver.kill().unwrap());
    vm.driver.destroy().unwrap();
    assert_eq!(vm.ended(), VmEnd::Destroyed);
    assert!(!vm.driver.kill().unwrap(), "there is no process any more");
}

#[test]
fn facts_autostart_and_undefine_are_what_protect_needs() {
    let Some(uri) = uri() else { return };
    let vm = Vm::new(&uri, "vmtwin-test-facts");
    let facts = vm.driver.facts().unwrap();
    assert_eq!((facts.state, facts.persistent, facts.autostart), (VmState::Off, true, false));
    assert_eq!((facts.snapshots, facts.checkpoints, facts.managed_save), (0, 0, false));
    vm.driver.set_autostart(true).unwrap();
    assert!(vm.driver.facts().unwrap().autostart);
    vm.driver.set_autostart(false).unwrap();
    assert!(vm.driver.list().unwrap().iter().any(|listed| listed.name == "vmtwin-test-facts"));
    vm.driver.undefine().unwrap();
    vm.driver.undefine().unwrap();
    assert_eq!(vm.driver.state().unwrap(), VmState::Undefined);
    assert!(matches!(vm.driver.definition(), Err(VmError::Undefined { .. })));
    assert!(matches!(vm.driver.facts(), Err(VmError::Undefined { .. })));
}

#[test]
fn a_daemon_that_is_not_there_is_no_contact() {
    let nobody = Libvirt::connect("qemu+unix:///system?socket=/nonexistent/libvirt-sock", "x").unwrap();
    assert!(matches!(nobody.state(), Err(VmError::NoContact { .. })));
    assert!(matches!(nobody.start(), Err(VmError::NoContact { .. })));
}

#[test]
fn acts_of_others_are_told_as_events() {
    let uri = "test:///default";
    let name = "vmtwin-events";
    let driver = Libvirt::connect(uri, name).unwrap();
    let events = driver.events().unwrap();
    let next = || events.recv_timeout(LONG).expect("the event comes");
    // The `test:` driver keeps one host per process: this is the admin beside us.
    let admin = virt::connect::Connect::open(Some(uri)).unwrap();
    let other = xml("vmtwin-other").replace("type='qemu'", "type='test'").replace("x86_64' machine='q35", "i686");
    admin.define_domain_xml(&other).unwrap();
    let domain = admin.define_domain_xml(&other.replace("vmtwin-other", name)).unwrap();
    assert!(matches!(next(), VmEvent::Defined { xml } if xml.contains(name)));
    domain.create().unwrap();
    assert_eq!(next(), VmEvent::Running);
    domain.suspend().unwrap();
    assert_eq!(next(), VmEvent::Paused { io_error: false });
    assert_eq!(driver.state().unwrap(), VmState::Paused);
    driver.resume().unwrap();
    assert_eq!(next(), VmEvent::Running);
    domain.destroy().unwrap();
    assert_eq!(next(), VmEvent::Ended(VmEnd::Destroyed));
    assert_eq!(driver.state().unwrap(), VmState::Off);
}
