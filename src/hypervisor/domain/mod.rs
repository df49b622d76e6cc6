//! A libvirt domain's XML: what vmtwin has to know of it, and the few places where vmtwin changes it.
//!
//! Holds: nothing; text in, facts or text out. Keeps out: files, libvirt, the decision what to refuse (`protect` decides).
//! The text is an operator's or another host's: it is bounded, DTDs are refused, and no text makes this panic.
//! Invariant: a rewrite changes the byte ranges that it names and no other byte, so that elements unknown to us survive.
mod read;
mod rewrite;
#[cfg(test)]
mod tests;

pub use read::read;
pub use rewrite::{Change, Module, metadata, rewrite};

/// Longest domain XML that is looked at, in bytes. Real ones have 5 to 20 KiB.
pub const XML_BYTES_MAX: usize = 1 << 20;
/// Most nodes of one.
pub const XML_NODES_MAX: u32 = 50_000;
/// Longest backing chain of one disk.
pub const LAYERS_MAX: usize = 64;
/// Name space of our own element in `<metadata>`.
pub const METADATA_URI: &str = "https://vmtwin.org/xml/module/1";

/// Why a text is no domain that we can work with.
#[derive(Debug, thiserror::Error)]
pub enum DomainError {
    /// Larger than any real one.
    #[error("the domain XML has {0} bytes, more than {XML_BYTES_MAX}")]
    TooLong(usize),
    /// Not XML.
    #[error("the domain XML does not parse")]
    Syntax(#[from] roxmltree::Error),
    /// XML of something else.
    #[error("the XML describes <{0}>, not <domain>")]
    NotDomain(String),
    /// Something that every domain has is not there.
    #[error("the domain XML has no {0}")]
    Missing(&'static str),
    /// A chain beyond all reason.
    #[error("disk {target} has more than {LAYERS_MAX} backing layers")]
    ChainTooLong {
        /// The disk.
        target: String,
    },
    /// A place that was to be changed is not there, or two changes overlap.
    #[error("the domain XML cannot be changed at byte {0}")]
    Splice(usize),
}

/// What is known of a domain from its XML.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Domain {
    /// Its name.
    pub name: String,
    /// Its identity; absent in XML that was never defined.
    pub uuid: Option<String>,
    /// Path of the QEMU binary.
    pub emulator: Option<String>,
    /// All disks, CD-ROMs and floppies, in the order of the XML.
    pub disks: Vec<Disk>,
    /// Firmware.
    pub firmware: Firmware,
    /// Files that the hypervisor reads at the start: kernel, initrd, device tree, ACPI tables.
    pub boot_files: Vec<BootFile>,
    /// What ties the VM to this host or is not replicated, in words ("a TPM", "a host device"), in the order of the XML.
    pub obstacles: Vec<String>,
    /// Action at a power-off from inside; libvirt's default is `destroy`.
    pub on_poweroff: Option<String>,
    /// Action at a reboot from inside; libvirt's default is `restart`.
    pub on_reboot: Option<String>,
    /// Action at a guest panic.
    pub on_crash: Option<String>,
    /// The module that our own metadata element names.
    pub module: Option<String>,
}

/// Firmware of a domain.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Firmware {
    /// `firmware='efi'` or `'bios'`: libvirt chooses the files.
    pub auto: Option<String>,
    /// Firmware image; belongs to a package.
    pub loader: Option<String>,
    /// The VM's own variables.
    pub nvram: Option<String>,
}

/// A file read at the start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BootFile {
    /// Name of its element: `kernel`, `initrd`, `dtb`, `table`.
    pub element: String,
    /// Where it lies.
    pub path: String,
}

/// What kind of drive a `<disk>` is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Device {
    /// A hard disk, or a whole SCSI LUN.
    Disk,
    /// A CD-ROM drive.
    Cdrom,
    /// A floppy drive.
    Floppy,
}

/// Where a disk's content lies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// An empty drive.
    Empty,
    /// A file.
    File(String),
    /// A volume of a storage pool, by name.
    Volume {
        /// Pool.
        pool: String,
        /// Volume.
        volume: String,
    },
    /// Anything else, by libvirt's word for it: `block`, `network`, `nvme`, `vhostuser`, ...
    Other(String),
}

/// One layer of a backing chain below the disk itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layer {
    /// Its file.
    pub path: String,
    /// Its image format.
    pub format: String,
}

/// One `<disk>`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disk {
    /// The guest's name for it (`vda`); unique in a domain.
    pub target: String,
    /// Kind of drive.
    pub device: Device,
    /// Content.
    pub source: Source,
    /// Image format by the driver element; libvirt takes `raw` where it is not named.
    pub format: String,
    /// Backing layers named in the XML, the one right below the disk first.
    pub chain: Vec<Layer>,
    /// The XML says where the chain ends (`<backingStore/>`), so nobody probes.
    pub chain_ends: bool,
    /// A layer that is not a plain file, by libvirt's word for it.
    pub chain_other: Option<String>,
    /// Written by several VMs at once.
    pub shareable: bool,
    /// Changes are thrown away at power-off.
    pub transient: bool,
    /// Needs a secret to be opened.
    pub encrypted: bool,
    /// The guest cannot write to it.
    pub readonly: bool,
}
