//! Shape of an XML file by serde, places in it by roxmltree: so that every refusal names file, line and element.
use roxmltree::{Document, Node};
use serde::de::DeserializeOwned;
use std::path::{Path, PathBuf};

/// Longest configuration file, in bytes.
pub const XML_BYTES_MAX: usize = 256 * 1024;

/// Why a configuration file was refused.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// It cannot be read.
    #[error("cannot read {}", file.display())]
    Read {
        /// Which file.
        file: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// It cannot be written.
    #[error("cannot write {}", file.display())]
    Write {
        /// Which file.
        file: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// It says something that is wrong, or that this version does not know.
    #[error("{}:{line}: <{element}>: {what}", file.display())]
    Wrong {
        /// Which file.
        file: PathBuf,
        /// Counted from 1.
        line: u32,
        /// Name of the element.
        element: String,
        /// One sentence.
        what: String,
    },
}

/// A file's text, and where it came from.
pub(super) struct Source<'a> {
    pub file: &'a Path,
    pub document: Document<'a>,
}

/// Reads a file of bounded size.
pub(super) fn read(file: &Path) -> Result<String, ConfigError> {
    use std::io::Read;
    let failed = |source| ConfigError::Read { file: file.to_owned(), source };
    let mut text = String::new();
    let most = XML_BYTES_MAX as u64 + 1;
    std::fs::File::open(file).and_then(|f| f.take(most).read_to_string(&mut text)).map_err(failed)?;
    Ok(text)
}

impl<'a> Source<'a> {
    /// Parses the text and its shape; `root` is the name that its outermost element must have.
    pub fn parse<T: DeserializeOwned>(text: &'a str, file: &'a Path, root: &str) -> Result<(Self, T), ConfigError> {
        let wrong = |line, element: &str, what: String| ConfigError::Wrong {
            file: file.to_owned(),
            line,
            element: element.to_owned(),
            what,
        };
        if text.len() > XML_BYTES_MAX {
            return Err(wrong(1, root, format!("the file is larger than {XML_BYTES_MAX} bytes")));
        }
        let document = Document::parse(text).map_err(|e| wrong(e.pos().row, root, format!("this is no XML: {e}")))?;
        let source = Self { file, document };
        let top = source.document.root_element();
        if top.tag_name().name() != root {
            return Err(source.wrong(top, format!("the outermost element must be <{root}>")));
        }
        let mut reader = quick_xml::de::Deserializer::from_str(text);
        match T::deserialize(&mut reader) {
            Ok(shape) => Ok((source, shape)),
            Err(e) => {
                let read = usize::try_from(reader.get_ref().get_ref().buffer_position()).unwrap_or(usize::MAX);
                Err(source.shape_error(read, &e.to_string()))
            }
        }
    }

    /// serde knows the name, not the place: the place is the last element before where reading stopped that has a child or
    /// attribute of that name.
    fn shape_error(&self, read: usize, text: &str) -> ConfigError {
        let elements = || self.document.descendants().filter(|n| n.is_element() && n.range().start < read);
        let quoted = text.split('`').nth(1).unwrap_or_default();
        let found = match quoted.strip_prefix('@') {
            Some(attribute) => elements().rfind(|n| n.has_attribute(attribute)),
            None => elements().rfind(|n| n.tag_name().name() == quoted),
        };
        let place = found.or_else(|| elements().next_back()).unwrap_or_else(|| self.document.root_element());
        let what = match (text.starts_with("unknown field"), quoted.strip_prefix('@')) {
            (true, Some(attribute)) => {
                format!("this version does not know the attribute {attribute:?} here: remove it")
            }
            (true, None) if quoted.starts_with('$') => "no text belongs here".to_owned(),
            (true, None) => format!("this version does not know the element <{quoted}> here: remove it"),
            (false, _) if text.starts_with("duplicate field") => format!("{quoted} stands here twice"),
            (false, _) => text.to_owned(),
        };
        self.wrong(place, what)
    }

    /// A refusal at an element.
    pub fn wrong(&self, at: Node<'_, '_>, what: impl Into<String>) -> ConfigError {
        ConfigError::Wrong {
            file: self.file.to_owned(),
            line: self.document.text_pos_at(at.range().start).row,
            element: at.tag_name().name().to_owned(),
            what: what.into(),
        }
    }

    /// All elements with this name, in order.
    pub fn all(&self, name: &str) -> Vec<Node<'_, 'a>> {
        self.document.descendants().filter(|n| n.is_element() && n.tag_name().name() == name).collect()
    }

    /// The first element with this name, or the outermost one where there is none.
    pub fn first(&self, name: &str) -> Node<'_, 'a> {
        self.all(name).into_iter().next().unwrap_or_else(|| self.document.root_element())
    }

    /// The value of an attribute that must be there, as a type that checks it.
    pub fn need<T>(&self, at: Node<'_, '_>, attribute: &str, value: Option<&String>) -> Result<T, ConfigError>
    where
        T: std::str::FromStr<Err: std::fmt::Display>,
    {
        let value = value.ok_or_else(|| self.wrong(at, format!("the attribute {attribute:?} is missing")))?;
        value.parse().map_err(|e| self.wrong(at, format!("{attribute}={value:?}: {e}")))
    }

    /// The value of an attribute that may be left out.
    pub fn or<T>(
        &self,
        at: Node<'_, '_>,
        attribute: &str,
        value: Option<&String>,
        otherwise: T,
    ) -> Result<T, ConfigError>
    where
        T: std::str::FromStr<Err: std::fmt::Display>,
    {
        if value.is_none() { Ok(otherwise) } else { self.need(at, attribute, value) }
    }

    /// `on` or `off`.
    pub fn on(
        &self,
        at: Node<'_, '_>,
        attribute: &str,
        value: Option<&String>,
        otherwise: bool,
    ) -> Result<bool, ConfigError> {
        match value.map(String::as_str) {
            None => Ok(otherwise),
            Some("on") => Ok(true),
            Some("off") => Ok(false),
            Some(other) => Err(self.wrong(at, format!("{attribute}={other:?}: \"on\" or \"off\""))),
        }
    }

    /// Refuses a setting that is planned and not built: whoever set it would rely on it.
    pub fn only(
        &self,
        at: Node<'_, '_>,
        attribute: &str,
        value: Option<&String>,
        known: &str,
    ) -> Result<(), ConfigError> {
        match value {
            Some(value) if value != known => Err(self.wrong(
                at,
                format!("{attribute}={value:?} is not supported yet by this version: leave it out or write {known:?}"),
            )),
            _ => Ok(()),
        }
    }
}

/// The text of a file: the shape with two blanks of indent.
pub(super) fn write<T: serde::Serialize>(root: &str, shape: &T) -> String {
    let mut text = String::new();
    let mut out = quick_xml::se::Serializer::with_root(&mut text, Some(root)).expect("the root's name is a constant");
    out.indent(' ', 2);
    shape.serialize(out).expect("a shape of attributes and lists can always be written");
    text.push('\n');
    text
}
