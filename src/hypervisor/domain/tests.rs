//! Domain XML as virt-install makes it, read and changed; goldens lie in `golden/`.
use super::*;
use proptest::prelude::*;
use std::collections::BTreeMap;

const PLAIN: &str = include_str!("golden/plain.xml");
const UEFI: &str = include_str!("golden/uefi.xml");

fn paths(list: &[(&str, &str)]) -> BTreeMap<String, String> {
    list.iter().map(|(from, to)| ((*from).to_owned(), (*to).to_owned())).collect()
}

fn layer(path: &str, format: &str) -> Layer {
    Layer { path: path.to_owned(), format: format.to_owned() }
}

/// What `protect` changes in `PLAIN`.
fn plain_change() -> Change {
    Change {
        paths: paths(&[
            ("/var/lib/libvirt/images/db.qcow2", "/var/lib/libvirt/images/db/db.qcow2"),
            ("/srv/R&D/data \"1\".img", "/var/lib/libvirt/images/db/data \"1\".img"),
        ]),
        chains: [("vda".to_owned(), vec![]), ("vdb".to_owned(), vec![])].into(),
        optional: vec!["sda".to_owned()],
        guard: true,
        module: Module::Set("db".to_owned()),
        ..Change::default()
    }
}

/// What `protect` changes in `UEFI`.
fn uefi_change() -> Change {
    Change {
        paths: paths(&[
            ("/images/web.qcow2", "/d/web.qcow2"),
            ("/images/mid.qcow2", "/d/mid.qcow2"),
            ("/images/base.raw", "/d/base.raw"),
            ("/images/web-data", "/d/web-data"),
            ("/images/old", "/d/old"),
            ("/var/lib/libvirt/qemu/nvram/web_VARS.fd", "/d/web_VARS.fd"),
            ("/boot/vmlinuz", "/d/vmlinuz"),
            ("/boot/initrd.img", "/d/initrd.img"),
        ]),
        volumes: [("vdb".to_owned(), "/images/web-data".to_owned())].into(),
        chains: [
            ("vda".to_owned(), vec![layer("/images/mid.qcow2", "qcow2"), layer("/images/base.raw", "raw")]),
            ("vdb".to_owned(), vec![]),
            ("vdc".to_owned(), vec![]),
        ]
        .into(),
        guard: true,
        module: Module::Set("web".to_owned()),
        ..Change::default()
    }
}

#[test]
fn a_domain_made_by_virt_install_is_read() {
    let domain = read(PLAIN).unwrap();
    assert_eq!(domain.name, "db");
    assert_eq!(domain.uuid.as_deref(), Some("5f0e7f1c-0c1f-4b3a-9a55-6d1c5f3f7a01"));
    assert_eq!(domain.emulator.as_deref(), Some("/usr/bin/qemu-system-x86_64"));
    assert_eq!((domain.on_reboot.as_deref(), domain.on_crash.as_deref()), (Some("restart"), Some("restart")));
    assert_eq!((domain.module, domain.obstacles), (None, vec![]));
    let seen: Vec<_> =
        domain.disks.iter().map(|d| (d.target.as_str(), d.device, d.format.as_str(), d.file())).collect();
    assert_eq!(
        seen,
        [
            ("vda", Device::Disk, "qcow2", Some("/var/lib/libvirt/images/db.qcow2")),
            ("vdb", Device::Disk, "raw", Some("/srv/R&D/data \"1\".img")),
            ("sda", Device::Cdrom, "raw", Some("/var/lib/libvirt/images/debian-12-netinst.iso")),
            ("sdb", Device::Cdrom, "raw", None),
        ]
    );
}

#[test]
fn firmware_kernel_chain_and_volume_are_read() {
    let domain = read(UEFI).unwrap();
    assert_eq!(domain.firmware.auto.as_deref(), Some("efi"));
    assert_eq!(domain.firmware.loader.as_deref(), Some("/usr/share/OVMF/OVMF_CODE_4M.fd"));
    assert_eq!(domain.firmware.nvram.as_deref(), Some("/var/lib/libvirt/qemu/nvram/web_VARS.fd"));
    let boot: Vec<_> = domain.boot_files.iter().map(|f| (f.element.as_str(), f.path.as_str())).collect();
    assert_eq!(boot, [("kernel", "/boot/vmlinuz"), ("initrd", "/boot/initrd.img")]);
    assert_eq!(domain.disks[0].chain, [layer("/images/mid.qcow2", "qcow2")]);
    assert!(!domain.disks[0].chain_ends);
    assert_eq!(domain.disks[1].source, Source::Volume { pool: "default".into(), volume: "web-data".into() });
    assert_eq!(domain.disks[2].format, "raw");
}

#[test]
fn what_ties_a_vm_to_its_host_is_named() {
    let with = |devices: &str| format!("<domain><name>x</name><os/><devices>{devices}</devices></domain>");
    for (devices, word) in [
        ("<tpm model='tpm-crb'><backend type='emulator'/></tpm>", "TPM"),
        ("<hostdev mode='subsystem' type='pci'/>", "host device"),
        ("<filesystem type='mount'><driver type='virtiofs'/></filesystem>", "shared directory"),
        ("<interface type='hostdev'/>", "network card"),
    ] {
        let obstacles = read(&with(devices)).unwrap().obstacles;
        assert!(obstacles.len() == 1 && obstacles[0].contains(word), "{obstacles:?}");
    }
    let disk = |inner: &str| read(&with(&format!("<disk {inner}<target dev='vda'/></disk>"))).unwrap().disks.remove(0);
    assert_eq!(disk("type='block'><source dev='/dev/sdb'/>").source, Source::Other("block".into()));
    assert_eq!(disk("type='network'><source protocol='rbd' name='x'/>").source, Source::Other("network".into()));
    assert!(disk("type='file'><shareable/>").shareable);
    assert!(disk("type='file'><transient/>").transient);
    assert!(disk("type='file'><source file='/a'><encryption format='luks'/></source>").encrypted);
    let other = "type='file'><source file='/a'/><backingStore type='block'><source dev='/dev/x'/></backingStore>";
    assert_eq!(disk(other).chain_other.as_deref(), Some("block"));
    assert!(disk("type='file'><source file='/a'/><backingStore/>").chain_ends);
}

#[test]
fn protect_changes_named_lines_and_no_other_byte() {
    golden("golden/plain.protected.xml", PLAIN, &plain_change(), include_str!("golden/plain.protected.xml"));
    golden("golden/uefi.protected.xml", UEFI, &uefi_change(), include_str!("golden/uefi.protected.xml"));
}

#[test]
fn a_change_made_twice_is_made_once() {
    for (xml, change) in [(PLAIN, plain_change()), (UEFI, uefi_change())] {
        let once = rewrite(xml, &change).unwrap();
        let mut again = change;
        // Chains are named by old paths; after the first time the files have the new ones.
        for layers in again.chains.values_mut() {
            for layer in layers {
                layer.path = again.paths[&layer.path].clone();
            }
        }
        assert_eq!(rewrite(&once, &again).unwrap(), once);
    }
}

#[test]
fn no_change_changes_nothing() {
    for xml in [PLAIN, UEFI] {
        assert_eq!(rewrite(xml, &Change::default()).unwrap(), xml);
    }
}

#[test]
fn restoring_paths_and_metadata_leaves_only_the_guards() {
    let change = plain_change();
    let back = Change {
        paths: change.paths.iter().map(|(from, to)| (to.clone(), from.clone())).collect(),
        module: Module::Remove,
        ..Change::default()
    };
    let restored = rewrite(&rewrite(PLAIN, &change).unwrap(), &back).unwrap();
    let guards = Change { module: Module::Keep, paths: BTreeMap::new(), ..change };
    assert_eq!(restored, rewrite(PLAIN, &guards).unwrap());
}

#[test]
fn a_domain_without_metadata_on_crash_or_driver_gets_them() {
    let bare = "<domain><name>x</name><devices><disk><source file='/a'/><target dev='vda'/></disk></devices></domain>";
    let change = Change { guard: true, module: Module::Set("m".into()), ..Change::default() };
    let text = rewrite(bare, &change).unwrap();
    let domain = read(&text).unwrap();
    assert_eq!((domain.on_crash.as_deref(), domain.module.as_deref()), (Some("destroy"), Some("m")));
    assert!(text.contains("error_policy='stop' rerror_policy='stop'"), "{text}");
    let gone = rewrite(&text, &Change { module: Module::Remove, ..Change::default() }).unwrap();
    assert_eq!(gone, text.replace(&format!("<metadata>{}</metadata>", metadata("m")), ""));
}

#[test]
fn an_nvram_that_libvirt_would_choose_is_made_explicit() {
    let change = Change { nvram: Some("/n/x.fd".into()), paths: paths(&[("/n/x.fd", "/d/x.fd")]), ..Change::default() };
    for os in ["<os firmware='efi'/>", "<os firmware='efi'><nvram template='/t'/></os>"] {
        let text = rewrite(&format!("<domain><name>x</name>{os}</domain>"), &change).unwrap();
        assert_eq!(read(&text).unwrap().firmware.nvram.as_deref(), Some("/d/x.fd"), "{text}");
    }
}

#[test]
fn a_hostile_text_is_refused_not_followed() {
    let deep = format!("<domain><name>x</name>{}", "<a>".repeat(200_000));
    let long = format!("<domain><name>x</name><!--{}--></domain>", "x".repeat(XML_BYTES_MAX));
    let chain = "<backingStore><source file='/a'/>".repeat(70) + &"</backingStore>".repeat(70);
    let chain = format!("<domain><name>x</name><devices><disk><target dev='a'/>{chain}</disk></devices></domain>");
    let bomb = "<!DOCTYPE d [<!ENTITY a 'aaaa'>]><domain><name>&a;</name></domain>";
    for text in ["", "x", "<domain/>", "<network><name>x</name></network>", bomb, &deep, &long, &chain] {
        assert!(read(text).is_err());
        assert!(rewrite(text, &plain_change()).is_err());
    }
    // Spaces that the XML reader's own ranges do not hold.
    let spaced = format!(
        "<domain><name>x</name><devices><disk><source file{}='/é'/><target dev='vda'/></disk></devices></domain>",
        " ".repeat(70_000)
    );
    let change = Change { paths: paths(&[("/é", "/ü'\"")]), ..Change::default() };
    assert_eq!(read(&rewrite(&spaced, &change).unwrap()).unwrap().disks[0].file(), Some("/ü'\""));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_damaged_domain_makes_it_panic(
        which in any::<bool>(),
        cuts in proptest::collection::vec((any::<prop::sample::Index>(), 0..12_usize, ".{0,6}"), 1..6),
    ) {
        let (xml, change) = if which { (PLAIN, plain_change()) } else { (UEFI, uefi_change()) };
        let mut text: Vec<char> = xml.chars().collect();
        for (at, length, put) in cuts {
            let at = at.index(text.len());
            let end = (at + length).min(text.len());
            text.splice(at..end, put.chars());
        }
        let text: String = text.into_iter().collect();
        let _ = read(&text);
        if let Ok(changed) = rewrite(&text, &change) {
            prop_assert!(read(&changed).is_ok());
        }
    }
}

/// Compares with a golden file; with `VMTWIN_GOLDEN=write` writes it instead.
fn golden(file: &str, xml: &str, change: &Change, expected: &str) {
    let text = rewrite(xml, change).unwrap();
    if std::env::var("VMTWIN_GOLDEN").is_ok_and(|v| v == "write") {
        std::fs::write(format!("{}/domain/{file}", env!("CARGO_MANIFEST_DIR")), &text).unwrap();
    } else {
        assert_eq!(text, expected);
    }
}
