//! Facts out of a domain's XML.
use super::{
    BootFile, Device, Disk, Domain, DomainError, Firmware, LAYERS_MAX, Layer, METADATA_URI, Source, XML_BYTES_MAX,
    XML_NODES_MAX,
};
use roxmltree::{Document, Node, ParsingOptions};

/// Parses within bounds and gives the document, whose root element is `<domain>`.
pub(super) fn parse(xml: &str) -> Result<Document<'_>, DomainError> {
    if xml.len() > XML_BYTES_MAX {
        return Err(DomainError::TooLong(xml.len()));
    }
    let options = ParsingOptions { nodes_limit: XML_NODES_MAX, ..ParsingOptions::default() };
    let document = Document::parse_with_options(xml, options)?;
    let root = document.root_element();
    if root.has_tag_name("domain") {
        Ok(document)
    } else {
        Err(DomainError::NotDomain(root.tag_name().name().chars().take(40).collect()))
    }
}

/// The first child element of this name.
pub(super) fn child<'a, 'i>(node: Node<'a, 'i>, name: &str) -> Option<Node<'a, 'i>> {
    node.children().find(|c| c.has_tag_name(name))
}

/// Text of the first child element of this name, trimmed; none where it is empty.
fn text_of(node: Node<'_, '_>, name: &str) -> Option<String> {
    child(node, name).and_then(|c| text(c))
}

fn text(node: Node<'_, '_>) -> Option<String> {
    node.text().map(str::trim).filter(|t| !t.is_empty()).map(str::to_owned)
}

/// Reads what vmtwin has to know of a domain.
///
/// # Errors
/// Where the text is no XML of a domain, too large, or without a name.
pub fn read(xml: &str) -> Result<Domain, DomainError> {
    let document = parse(xml)?;
    let root = document.root_element();
    let devices = child(root, "devices");
    let disks = match devices {
        None => Vec::new(),
        Some(d) => d.children().filter(|n| n.has_tag_name("disk")).map(disk).collect::<Result<_, _>>()?,
    };
    let mut domain = Domain {
        name: text_of(root, "name").ok_or(DomainError::Missing("name"))?,
        uuid: text_of(root, "uuid"),
        emulator: devices.and_then(|d| text_of(d, "emulator")),
        disks,
        on_poweroff: text_of(root, "on_poweroff"),
        on_reboot: text_of(root, "on_reboot"),
        on_crash: text_of(root, "on_crash"),
        module: module_element(root).and_then(|m| m.attribute("name")).map(str::to_owned),
        ..Domain::default()
    };
    if let Some(os) = child(root, "os") {
        read_os(os, &mut domain);
    }
    domain.obstacles.extend(devices.into_iter().flat_map(|d| d.children()).filter_map(obstacle));
    Ok(domain)
}

/// Our own element in `<metadata>`.
pub(super) fn module_element<'a, 'i>(root: Node<'a, 'i>) -> Option<Node<'a, 'i>> {
    child(root, "metadata")?.children().find(|n| n.has_tag_name((METADATA_URI, "module")))
}

/// Elements that name a file which is read at the start.
pub(super) fn is_boot_file(node: Node<'_, '_>) -> bool {
    matches!(node.tag_name().name(), "kernel" | "initrd" | "dtb" | "table")
}

/// The path of an `<nvram>`: its text, or (libvirt 8.5) a `<source file=''>` in it.
pub(super) fn nvram_source<'a, 'i>(nvram: Node<'a, 'i>) -> Option<Node<'a, 'i>> {
    child(nvram, "source").filter(|s| s.has_attribute("file"))
}

fn read_os(os: Node<'_, '_>, domain: &mut Domain) {
    for node in os.descendants().filter(|n| is_boot_file(*n)) {
        if let Some(path) = text(node) {
            domain.boot_files.push(BootFile { element: node.tag_name().name().to_owned(), path });
        }
    }
    let nvram = child(os, "nvram");
    domain.firmware = Firmware {
        auto: os.attribute("firmware").map(str::to_owned),
        loader: text_of(os, "loader"),
        nvram: nvram.and_then(|n| nvram_source(n).and_then(|s| s.attribute("file").map(str::to_owned)).or(text(n))),
    };
    if let Some(kind) = nvram.and_then(|n| n.attribute("type")).filter(|kind| *kind != "file") {
        domain.obstacles.push(format!("its NVRAM on {kind} storage"));
    }
}

/// What of a device ties the VM to its host or is not in the directory.
fn obstacle(device: Node<'_, '_>) -> Option<String> {
    let is = |attribute: &str, value: &str| device.attribute(attribute) == Some(value);
    let words = match device.tag_name().name() {
        "tpm" => "a TPM",
        "hostdev" => "a host device",
        "filesystem" => "a shared directory of the host (filesystem)",
        "interface" if is("type", "hostdev") => "a network card of the host",
        "memory" if is("model", "nvdimm") || is("model", "virtio-pmem") => "persistent memory in a file of the host",
        "input" if is("type", "passthrough") || is("type", "evdev") => "an input device of the host",
        "shmem" => "memory shared with other VMs",
        "smartcard" if is("mode", "host") => "a smart card of the host",
        "lease" => "a lock manager's lease",
        "redirdev" | "channel" | "serial" if is("type", "dev") => "a character device of the host",
        _ => return None,
    };
    Some(words.to_owned())
}

fn disk(node: Node<'_, '_>) -> Result<Disk, DomainError> {
    let target = child(node, "target")
        .and_then(|t| t.attribute("dev"))
        .ok_or(DomainError::Missing("target device of a disk"))?
        .to_owned();
    let driver = child(node, "driver");
    let device = match node.attribute("device") {
        Some("cdrom") => Device::Cdrom,
        Some("floppy") => Device::Floppy,
        _ => Device::Disk,
    };
    let source_node = child(node, "source");
    let mut found = Disk {
        device,
        source: source(node),
        format: driver.and_then(|d| d.attribute("type")).unwrap_or("raw").to_owned(),
        chain: Vec::new(),
        chain_ends: false,
        chain_other: None,
        shareable: child(node, "shareable").is_some(),
        transient: child(node, "transient").is_some(),
        encrypted: child(node, "encryption").is_some() || source_node.is_some_and(|s| child(s, "encryption").is_some()),
        readonly: child(node, "readonly").is_some(),
        target,
    };
    let mut above = node;
    while let Some(layer) = child(above, "backingStore") {
        match source(layer) {
            Source::Empty => {
                found.chain_ends = true;
                break;
            }
            Source::File(path) => {
                let format = child(layer, "format").and_then(|f| f.attribute("type")).unwrap_or("raw").to_owned();
                found.chain.push(Layer { path, format });
            }
            Source::Volume { .. } => found.chain_other = Some("volume".to_owned()),
            Source::Other(kind) => found.chain_other = Some(kind),
        }
        if found.chain.len() > LAYERS_MAX || found.chain_other.is_some() {
            break;
        }
        above = layer;
    }
    if found.chain.len() > LAYERS_MAX {
        return Err(DomainError::ChainTooLong { target: found.target });
    }
    Ok(found)
}

/// Content of a `<disk>` or `<backingStore>`.
fn source(node: Node<'_, '_>) -> Source {
    let source = child(node, "source");
    let attribute = |name: &str| source.and_then(|s| s.attribute(name)).map(str::to_owned);
    match node.attribute("type").unwrap_or("file") {
        "file" => attribute("file").map_or(Source::Empty, Source::File),
        "volume" => match (attribute("pool"), attribute("volume")) {
            (Some(pool), Some(volume)) => Source::Volume { pool, volume },
            _ => Source::Empty,
        },
        // A drive of another type without a medium is an empty drive, too.
        _ if source.is_none() => Source::Empty,
        kind => Source::Other(kind.to_owned()),
    }
}
