//! `protect` and `unprotect` with a real libvirtd, qemu-img and QEMU. Runs where `VMTWIN_LIBVIRT_URI` is set (the lab sets it).
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use vmtwin::config::Paths;
use vmtwin::protect::{QemuImg, commit, gather, preflight, restore};
use vmtwin_core::ids::ModuleName;
use vmtwin_hypervisor::libvirt::Libvirt;
use vmtwin_hypervisor::{Hypervisor, Inventory, VmState, domain};

const NAME: &str = "vmtwin-test-protect";

/// Destroys and undefines the VM when the test ends, however it ends.
struct Vm(Libvirt);

impl Drop for Vm {
    fn drop(&mut self) {
        let _ = self.0.destroy();
        let _ = self.0.undefine();
    }
}

fn qemu_img(arguments: &[&str], folder: &Path) {
    let run = Command::new("qemu-img").args(arguments).current_dir(folder).output().unwrap();
    assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
}

fn runs(vm: &Libvirt) {
    vm.start().unwrap();
    assert_eq!(vm.state().unwrap(), VmState::Running);
    vm.destroy().unwrap();
}

#[test]
fn a_vm_with_a_backing_chain_runs_from_its_directory_and_from_its_old_places() {
    let Some(uri) = std::env::var("VMTWIN_LIBVIRT_URI").ok().filter(|uri| !uri.is_empty()) else {
        println!("SKIPPED: VMTWIN_LIBVIRT_URI is not set; tools/test sets it in the lab");
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).to_string_lossy().into_owned();
    for name in ["flat", "base", "images", "boot"] {
        fs::create_dir(at(name)).unwrap();
    }
    // QEMU may run as a user of its own.
    Command::new("chmod").args(["-R", "a+rX"]).arg(folder.path()).status().unwrap();
    qemu_img(&["create", "-q", "-f", "raw", "base/root.img", "16M"], folder.path());
    qemu_img(
        &["create", "-q", "-f", "qcow2", "-F", "raw", "-b", &at("base/root.img"), "base/mid.qcow2"],
        folder.path(),
    );
    qemu_img(
        &["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", "../base/mid.qcow2", "flat/root.qcow2"],
        folder.path(),
    );
    qemu_img(&["create", "-q", "-f", "raw", "flat/root.img", "8M"], folder.path());
    fs::write(at("boot/vmlinuz"), "stands in for a kernel").unwrap();
    fs::write(at("boot/seed.iso"), [0; 4096]).unwrap();
    let disk = |device: &str, format: &str, file: &str, target: &str| {
        let file = at(file);
        format!(
            "<disk type='file' device='{device}'><driver name='qemu' type='{format}'/><source file='{file}'/>\
             <target dev='{target}'/></disk>"
        )
    };
    let xml = format!(
        "<domain type='qemu'><name>{NAME}</name><memory unit='MiB'>64</memory>\
         <os><type arch='x86_64' machine='q35'>hvm</type></os><features><acpi/></features>\
         <devices>{}{}{}<controller type='usb' model='none'/><memballoon model='none'/></devices></domain>",
        disk("disk", "qcow2", "flat/root.qcow2", "vda"),
        disk("disk", "raw", "flat/root.img", "vdb"),
        disk("cdrom", "raw", "boot/seed.iso", "sda"),
    );
    let vm = Vm(Libvirt::connect(&uri, NAME).unwrap());
    vm.0.destroy().unwrap();
    vm.0.undefine().unwrap();
    vm.0.define(&xml).unwrap();
    vm.0.set_autostart(true).unwrap();
    runs(&vm.0);
    let before = vm.0.definition().unwrap();

    let paths = Paths::under(&folder.path().join("vt"));
    paths.create().unwrap();
    let module = ModuleName::new("guest").unwrap();
    let dir = PathBuf::from(at("images/guest"));
    let plan = preflight(&paths, &module, NAME, &dir, &vm.0, &QemuImg).unwrap();
    assert_eq!(plan.copy_bytes, 0, "one file system: nothing is copied");
    gather(&paths, &module, &plan, &vm.0, &QemuImg, &mut |_| {}).unwrap();
    commit(&paths, &module).unwrap();
    let protected = domain::read(&vm.0.definition().unwrap()).unwrap();
    assert_eq!(protected.module.as_deref(), Some("guest"));
    assert!(!vm.0.facts().unwrap().autostart);
    for disk in &protected.disks {
        assert!(disk.file().unwrap().starts_with(dir.to_str().unwrap()), "{disk:?}");
        assert!(disk.chain_ends || !disk.is_hard_disk(), "{disk:?}");
    }
    let stored = fs::read_to_string(dir.join(".vmtwin/domain.xml")).unwrap();
    assert_eq!(stored, vm.0.definition().unwrap());
    // The whole chain is read by its new names: headers and definition agree.
    qemu_img(&["check", "-q", "-f", "qcow2", "root.qcow2"], &dir);
    let chain =
        Command::new("qemu-img").args(["info", "--backing-chain", "root.qcow2"]).current_dir(&dir).output().unwrap();
    let chain = String::from_utf8_lossy(&chain.stdout).into_owned();
    assert!(chain.contains("mid.qcow2") && chain.contains("root-2.img") && !chain.contains("base/"), "{chain}");
    runs(&vm.0);
    // What a takeover does: define what is stored, on a host that does not know the VM.
    vm.0.undefine().unwrap();
    vm.0.define(&stored).unwrap();
    runs(&vm.0);

    restore(&paths, &module, NAME, &dir, true, &vm.0, &QemuImg, &mut |_| {}).unwrap();
    let files = |xml: &str| -> Vec<_> {
        domain::read(xml).unwrap().disks.iter().map(|disk| disk.file().map(str::to_owned)).collect()
    };
    assert_eq!(files(&vm.0.definition().unwrap()), files(&before));
    assert!(!dir.exists() && Path::new(&at("base/root.img")).exists());
    assert!(vm.0.facts().unwrap().autostart);
    qemu_img(&["check", "-q", "-f", "qcow2", "root.qcow2"], Path::new(&at("flat")));
    runs(&vm.0);
}
