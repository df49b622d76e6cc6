//! The files below a disk. The XML says what they are; where it does not say where the chain ends, the image's own header
//! does, read as the format that the XML names: nothing is probed, and no backing file is opened by itself.
use serde_json::Value;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use vmtwin_hypervisor::domain::{Disk, LAYERS_MAX, Layer};

/// What an image's header says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ImageInfo {
    /// The layer below it.
    pub backing: Option<Backing>,
    /// Its data lies in a file of its own.
    pub data_file: bool,
}

/// A layer as the header of the one above names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backing {
    /// Word for word.
    pub name: String,
    /// As a path, relative to the image's folder where the name is.
    pub path: PathBuf,
    /// Its format, where the header says it.
    pub format: Option<String>,
}

/// Reads and writes images' headers.
pub trait Images: Send + Sync {
    /// What the header says, the image read as this format.
    fn info(&self, path: &Path, format: &str) -> io::Result<ImageInfo>;
    /// Writes another name and format of the layer below; no data is touched.
    fn rename_backing(&self, path: &Path, format: &str, name: &str, backing_format: &str) -> io::Result<()>;
}

/// The real thing: qemu-img.
#[derive(Clone, Copy, Debug, Default)]
pub struct QemuImg;

fn qemu_img(arguments: &[&str], path: &Path) -> io::Result<Vec<u8>> {
    let run = Command::new("qemu-img").args(arguments).arg(path).output();
    let run = run.map_err(|e| io::Error::new(e.kind(), format!("qemu-img (package qemu-utils): {e}")))?;
    if run.status.success() {
        Ok(run.stdout)
    } else {
        Err(io::Error::other(String::from_utf8_lossy(&run.stderr).trim().to_owned()))
    }
}

impl Images for QemuImg {
    fn info(&self, path: &Path, format: &str) -> io::Result<ImageInfo> {
        // -U: another VM that runs on it is no reason not to read its header.
        read_info(path, &qemu_img(&["info", "--output=json", "-U", "-f", format], path)?)
    }

    fn rename_backing(&self, path: &Path, format: &str, name: &str, backing_format: &str) -> io::Result<()> {
        qemu_img(&["rebase", "-u", "-f", format, "-F", backing_format, "-b", name], path).map(drop)
    }
}

fn read_info(image: &Path, json: &[u8]) -> io::Result<ImageInfo> {
    let info: Value = serde_json::from_slice(json).map_err(io::Error::other)?;
    let text = |key: &str| info.get(key).and_then(Value::as_str).map(str::to_owned);
    let folder = image.parent().unwrap_or(Path::new("/"));
    let backing = text("backing-filename").map(|name| Backing {
        path: folder.join(&name),
        format: text("backing-filename-format"),
        name,
    });
    Ok(ImageInfo { backing, data_file: info.pointer("/format-specific/data/data-file").is_some() })
}

/// Whether images of this format have a header that can name a layer below.
fn can_have_backing(format: &str) -> bool {
    matches!(format, "qcow2" | "qcow" | "qed" | "vmdk")
}

/// A disk's own file and all below it, top first, and what the headers say.
#[derive(Debug)]
pub(super) struct Chain {
    /// The layers below the disk's own file.
    pub below: Vec<Layer>,
    /// For each of the files, from the disk's own: what its header names, where it names something.
    pub headers: Vec<Option<Backing>>,
}

/// Follows a disk to the end of its chain. The error is a sentence for the operator.
pub(super) fn follow(images: &dyn Images, disk: &Disk, file: &str) -> Result<Chain, String> {
    let target = &disk.target;
    if let Some(kind) = &disk.chain_other {
        return Err(format!(
            "disk {target} has a backing layer on {kind} storage: not supported, flatten it (qemu-img convert)"
        ));
    }
    let mut below = disk.chain.clone();
    let mut headers = Vec::new();
    let mut at = Layer { path: file.to_owned(), format: disk.format.clone() };
    loop {
        let depth = headers.len();
        if depth > LAYERS_MAX {
            return Err(format!(
                "disk {target} has more than {LAYERS_MAX} backing layers: flatten it (qemu-img convert)"
            ));
        }
        let backing = if can_have_backing(&at.format) {
            let info = images
                .info(Path::new(&at.path), &at.format)
                .map_err(|e| format!("disk {target}: {} cannot be read as {}: {e}", at.path, at.format))?;
            if info.data_file {
                return Err(format!(
                    "disk {target}: {} keeps its data in another file: not supported, convert it",
                    at.path
                ));
            }
            info.backing
        } else {
            None
        };
        headers.push(backing.clone());
        at = match (below.get(depth), backing) {
            (Some(layer), _) => layer.clone(),
            (None, Some(backing)) if !disk.chain_ends => {
                let next = named_layer(target, &at.path, &backing)?;
                below.push(next.clone());
                next
            }
            (None, _) => return Ok(Chain { below, headers }),
        };
    }
}

fn named_layer(target: &str, image: &str, backing: &Backing) -> Result<Layer, String> {
    let name = &backing.name;
    let protocol = name.split('/').next().is_some_and(|first| first.contains(':'));
    let Some(path) = backing.path.to_str().filter(|_| !protocol) else {
        return Err(format!(
            "disk {target}: {image} has the backing file {name:?}, which is no plain file: flatten it"
        ));
    };
    let Some(format) = &backing.format else {
        return Err(format!(
            "disk {target}: {image} does not say which format its backing file {name} has, and vmtwin does not guess: \
             qemu-img rebase -u -F FORMAT -b {name} {image}"
        ));
    };
    Ok(Layer { path: path.to_owned(), format: format.clone() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_qemu_img_prints_is_read() {
        let json = br#"{"filename": "/i/top.qcow2", "format": "qcow2", "backing-filename": "base.raw",
            "full-backing-filename": "/i/base.raw", "backing-filename-format": "raw",
            "format-specific": {"type": "qcow2", "data": {"compat": "1.1"}}}"#;
        let backing = Backing { name: "base.raw".into(), path: "/i/base.raw".into(), format: Some("raw".into()) };
        assert_eq!(
            read_info(Path::new("/i/top.qcow2"), json).unwrap(),
            ImageInfo { backing: Some(backing), data_file: false }
        );
        let json = br#"{"format-specific": {"type": "qcow2", "data": {"data-file": "x.raw"}}}"#;
        assert!(read_info(Path::new("/i/x"), json).unwrap().data_file);
        assert!(read_info(Path::new("/i/x"), b"qemu-img: what?").is_err());
    }
}
