//! The changes that vmtwin makes to a domain's XML, as splices of byte ranges.
use super::read::{child, is_boot_file, module_element, nvram_source, parse};
use super::{Device, Disk, DomainError, Layer, METADATA_URI, Source, read};
use roxmltree::Node;
use std::collections::BTreeMap;
use std::ops::Range;

/// What is to be different afterwards. The default changes nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Change {
    /// Where files went: path as the XML has it, to the new path. Disks, backing layers, NVRAM and boot files alike.
    pub paths: BTreeMap<String, String>,
    /// By disk target: a volume's file; the disk becomes one of type `file`.
    pub volumes: BTreeMap<String, String>,
    /// By disk target: the whole chain below it (old paths), which gets an explicit end, so that libvirt probes nothing.
    pub chains: BTreeMap<String, Vec<Layer>>,
    /// Targets of drives whose medium may be missing at a start.
    pub optional: Vec<String>,
    /// NVRAM file of a domain that names none itself (old path).
    pub nvram: Option<String>,
    /// I/O errors pause the VM instead of reaching the guest, and a crash ends it, so that the module decides.
    pub guard: bool,
    /// Our own metadata element: set to this module, removed, or left.
    pub module: Module,
}

/// What happens to our own metadata element.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Module {
    /// As it was.
    #[default]
    Keep,
    /// Names this module.
    Set(String),
    /// Gone.
    Remove,
}

/// Our own element, as it stands in `<metadata>`.
#[must_use]
pub fn metadata(module: &str) -> String {
    format!("<vmtwin:module xmlns:vmtwin=\"{METADATA_URI}\" name=\"{}\"/>", escape(module))
}

/// Gives the XML with the change made, all other bytes as they were.
///
/// # Errors
/// Where the text is no domain, or a changed one would not parse any more.
pub fn rewrite(xml: &str, change: &Change) -> Result<String, DomainError> {
    let document = parse(xml)?;
    let root = document.root_element();
    let mut splices = Splices { xml, list: Vec::new() };
    if let Some(devices) = child(root, "devices") {
        for node in devices.children().filter(|n| n.has_tag_name("disk")) {
            splices.disk(node, change)?;
        }
    }
    if let Some(os) = child(root, "os") {
        splices.os(os, change)?;
    }
    if change.guard {
        splices.on_crash(root)?;
    }
    splices.module(root, &change.module)?;
    let text = splices.apply()?;
    read(&text)?;
    Ok(text)
}

/// Escapes for an attribute's value in either kind of quote, and for text.
fn escape(value: &str) -> String {
    let mut out = String::with_capacity(value.len());
    for c in value.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '\'' => out.push_str("&apos;"),
            '"' => out.push_str("&quot;"),
            c => out.push(c),
        }
    }
    out
}

/// Changes of one text, collected before any is made, as all ranges belong to the unchanged text.
struct Splices<'t> {
    xml: &'t str,
    list: Vec<(Range<usize>, String)>,
}

impl Splices<'_> {
    fn put(&mut self, range: Range<usize>, text: impl Into<String>) {
        self.list.push((range, text.into()));
    }

    fn apply(mut self) -> Result<String, DomainError> {
        // Stable: several insertions at one place stay in the order in which they were asked for.
        self.list.sort_by_key(|(range, _)| (range.start, range.end));
        let mut out = String::with_capacity(self.xml.len() + 1024);
        let mut at = 0;
        for (range, text) in &self.list {
            out.push_str(self.xml.get(at..range.start).ok_or(DomainError::Splice(range.start))?);
            out.push_str(text);
            at = range.end;
        }
        out.push_str(self.xml.get(at..).ok_or(DomainError::Splice(at))?);
        Ok(out)
    }

    /// The byte after a start tag's `>`, and whether the element is an empty tag (`/>`).
    fn start_tag(&self, node: Node<'_, '_>) -> Result<(usize, bool), DomainError> {
        let range = node.range();
        let text = self.xml.get(range.clone()).ok_or(DomainError::Splice(range.start))?;
        let mut quote = None;
        for (at, byte) in text.bytes().enumerate() {
            match (quote, byte) {
                (None, b'"' | b'\'') => quote = Some(byte),
                (Some(open), _) if open == byte => quote = None,
                (None, b'>') => return Ok((range.start + at + 1, text[..at].ends_with('/'))),
                _ => {}
            }
        }
        Err(DomainError::Splice(range.start))
    }

    /// The tag's name with its prefix, as written.
    fn tag<'a>(&'a self, node: Node<'_, '_>) -> &'a str {
        let rest = self.xml.get(node.range().start + 1..).unwrap_or("");
        &rest[..rest.find(|c: char| c.is_ascii_whitespace() || c == '/' || c == '>').unwrap_or(0)]
    }

    fn set_attribute(&mut self, node: Node<'_, '_>, name: &str, value: &str) {
        let Some(old) = node.attribute_node(name) else {
            let at = node.range().start + 1 + self.tag(node).len();
            return self.put(at..at, format!(" {name}='{}'", escape(value)));
        };
        if old.value() != value {
            // The reader's own range of a value is not right for absurdly spaced text; names have no quotes.
            let range = old.range();
            let quote = self.xml.get(range.clone()).and_then(|t| t.find(['\'', '"'])).unwrap_or(0);
            self.put(range.start + quote + 1..range.end.saturating_sub(1), escape(value));
        }
    }

    /// Puts `text` behind the element's start tag.
    fn insert_first(&mut self, node: Node<'_, '_>, text: &str) -> Result<(), DomainError> {
        let (end, empty) = self.start_tag(node)?;
        if empty {
            let closed = format!(">{text}</{}>", self.tag(node));
            self.put(end - 2..end, closed);
        } else {
            self.put(end..end, text);
        }
        Ok(())
    }

    /// Replaces an element's text.
    fn set_text(&mut self, node: Node<'_, '_>, value: &str) -> Result<(), DomainError> {
        let (start, empty) = self.start_tag(node)?;
        if empty {
            return self.insert_first(node, &escape(value));
        }
        let close = self.xml.get(start..node.range().end).and_then(|t| t.rfind("</"));
        let end = start + close.ok_or(DomainError::Splice(start))?;
        self.put(start..end, escape(value));
        Ok(())
    }

    /// Removes an element with the white space before it.
    fn remove(&mut self, node: Node<'_, '_>) {
        let before = &self.xml[..node.range().start];
        self.put(before.trim_end().len()..node.range().end, "");
    }

    fn disk(&mut self, node: Node<'_, '_>, change: &Change) -> Result<(), DomainError> {
        let Some(target) = child(node, "target").and_then(|t| t.attribute("dev")) else { return Ok(()) };
        let source = child(node, "source");
        if let (Some(file), Some(source)) = (change.volumes.get(target), source) {
            let file = change.paths.get(file).unwrap_or(file);
            self.set_attribute(node, "type", "file");
            self.put(source.range(), format!("<source file='{}'/>", escape(file)));
        } else {
            self.moved(node, change);
        }
        if change.optional.iter().any(|t| t == target) {
            if let Some(source) = source {
                self.set_attribute(source, "startupPolicy", "optional");
            }
        }
        if let Some(chain) = change.chains.get(target) {
            self.chain(node, chain, change)?;
        } else {
            self.layers_moved(node, change);
        }
        if change.guard && matches!(node.attribute("device"), None | Some("disk" | "lun")) {
            match child(node, "driver") {
                Some(driver) => {
                    self.set_attribute(driver, "error_policy", "stop");
                    self.set_attribute(driver, "rerror_policy", "stop");
                }
                None => self
                    .insert_first(node, "<driver name='qemu' type='raw' error_policy='stop' rerror_policy='stop'/>")?,
            }
        }
        Ok(())
    }

    /// A disk's or layer's own file has moved.
    fn moved(&mut self, node: Node<'_, '_>, change: &Change) {
        let source = child(node, "source").filter(|_| node.attribute("type").is_none_or(|t| t == "file"));
        if let Some(source) = source {
            if let Some(new) = source.attribute("file").and_then(|old| change.paths.get(old)) {
                self.set_attribute(source, "file", new);
            }
        }
    }

    fn layers_moved(&mut self, disk: Node<'_, '_>, change: &Change) {
        let mut above = disk;
        while let Some(layer) = child(above, "backingStore") {
            self.moved(layer, change);
            above = layer;
        }
    }

    /// Writes the whole chain below a disk, with its end.
    fn chain(&mut self, disk: Node<'_, '_>, chain: &[Layer], change: &Change) -> Result<(), DomainError> {
        let old = child(disk, "backingStore");
        if old.is_some() && same_chain(disk, chain) {
            self.layers_moved(disk, change);
            return Ok(());
        }
        let mut text = String::new();
        for layer in chain {
            let path = change.paths.get(&layer.path).unwrap_or(&layer.path);
            text += &format!(
                "<backingStore type='file'><format type='{}'/><source file='{}'/>",
                escape(&layer.format),
                escape(path)
            );
        }
        text += "<backingStore/>";
        text += &"</backingStore>".repeat(chain.len());
        match (old, child(disk, "source")) {
            (Some(old), _) => self.put(old.range(), text),
            (None, Some(source)) => {
                let end = source.range().end;
                self.put(end..end, text);
            }
            (None, None) => self.insert_first(disk, &text)?,
        }
        Ok(())
    }

    fn os(&mut self, os: Node<'_, '_>, change: &Change) -> Result<(), DomainError> {
        for node in os.descendants().filter(|n| is_boot_file(*n)) {
            if let Some(new) = node.text().and_then(|old| change.paths.get(old.trim())) {
                self.set_text(node, new)?;
            }
        }
        let moved = |old: &str| change.paths.get(old.trim()).cloned();
        match child(os, "nvram") {
            Some(nvram) => match (nvram_source(nvram), nvram.text().map(str::trim).filter(|t| !t.is_empty())) {
                (Some(source), _) => {
                    if let Some(new) = source.attribute("file").and_then(moved) {
                        self.set_attribute(source, "file", &new);
                    }
                }
                (None, Some(old)) => {
                    if let Some(new) = moved(old) {
                        self.set_text(nvram, &new)?;
                    }
                }
                // `<nvram template='..'/>`: libvirt would choose the place.
                (None, None) => {
                    if let Some(file) = &change.nvram {
                        self.set_text(nvram, change.paths.get(file).unwrap_or(file))?;
                    }
                }
            },
            None => {
                if let Some(file) = &change.nvram {
                    let file = change.paths.get(file).unwrap_or(file);
                    self.insert_first(os, &format!("<nvram>{}</nvram>", escape(file)))?;
                }
            }
        }
        Ok(())
    }

    fn on_crash(&mut self, root: Node<'_, '_>) -> Result<(), DomainError> {
        match child(root, "on_crash") {
            Some(node) if matches!(node.text().map(str::trim), Some("destroy" | "coredump-destroy")) => Ok(()),
            Some(node) => self.set_text(node, "destroy"),
            None => {
                let at = child(root, "devices").ok_or(DomainError::Missing("devices"))?.range().start;
                self.put(at..at, "<on_crash>destroy</on_crash>");
                Ok(())
            }
        }
    }

    fn module(&mut self, root: Node<'_, '_>, module: &Module) -> Result<(), DomainError> {
        let all = child(root, "metadata");
        let ours = module_element(root);
        match (module, ours, all) {
            (Module::Keep, ..) | (Module::Remove, None, _) => Ok(()),
            (Module::Remove, Some(ours), Some(all)) => {
                let alone = all.children().filter(Node::is_element).count() == 1;
                self.remove(if alone { all } else { ours });
                Ok(())
            }
            (Module::Remove, Some(ours), None) => Err(DomainError::Splice(ours.range().start)),
            (Module::Set(name), Some(ours), _) => {
                self.put(ours.range(), metadata(name));
                Ok(())
            }
            (Module::Set(name), None, Some(all)) => self.insert_first(all, &metadata(name)),
            (Module::Set(name), None, None) => {
                let before = child(root, "uuid").or_else(|| child(root, "name"));
                let at = before.ok_or(DomainError::Missing("name"))?.range().end;
                self.put(at..at, format!("<metadata>{}</metadata>", metadata(name)));
                Ok(())
            }
        }
    }
}

/// Whether the XML already names exactly this chain, up to its end.
fn same_chain(disk: Node<'_, '_>, chain: &[Layer]) -> bool {
    let mut above = disk;
    for layer in chain {
        let Some(next) = child(above, "backingStore") else { return false };
        let path = child(next, "source").and_then(|s| s.attribute("file"));
        let format = child(next, "format").and_then(|f| f.attribute("type"));
        if path != Some(&layer.path) || format != Some(&layer.format) {
            return false;
        }
        above = next;
    }
    child(above, "backingStore").is_some_and(|end| child(end, "source").is_none())
}

impl Disk {
    /// The file of a disk of type `file`.
    #[must_use]
    pub fn file(&self) -> Option<&str> {
        match &self.source {
            Source::File(path) => Some(path),
            _ => None,
        }
    }

    /// Whether it is a hard disk.
    #[must_use]
    pub fn is_hard_disk(&self) -> bool {
        self.device == Device::Disk
    }
}
