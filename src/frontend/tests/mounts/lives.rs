//! A life of random operations, done at two places: each answer is compared. Shared with the data thread's tests.
use rustix::fs::{AtFlags, CWD, FallocateFlags, OFlags, RenameFlags, Timespec, Timestamps, XattrFlags};
use rustix::io::Errno;
use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

const HANDLES: usize = 4;
const NAMES: &[&str] = &["a", "b", "c", "p", "q", "p/a", "p/b", "p/q", "q/a", "q/c", "p/q/a", "p/q/b"];
const ATTRIBUTES: &[&str] = &["user.one", "user.two"];

#[derive(Clone, Copy, Debug)]
enum Op {
    Open { name: &'static str, handle: usize, flags: OFlags },
    Close { handle: usize },
    Write { handle: usize, offset: u64, len: usize, fill: u8 },
    Read { handle: usize, offset: u64, len: usize },
    Truncate { handle: usize, size: u64 },
    TruncateByName { name: &'static str, size: u64 },
    Allocate { handle: usize, mode: FallocateFlags, offset: u64, len: u64 },
    Flush { handle: usize },
    StatHandle { handle: usize },
    Stat { name: &'static str },
    List { name: &'static str },
    Rename { from: &'static str, to: &'static str, flags: RenameFlags },
    Link { from: &'static str, to: &'static str },
    Symlink { target: &'static str, name: &'static str },
    Unlink { name: &'static str },
    MkDir { name: &'static str },
    RmDir { name: &'static str },
    Mode { name: &'static str, mode: u32 },
    Times { name: &'static str, seconds: i64 },
    SetXattr { name: &'static str, attribute: &'static str, len: usize, flags: XattrFlags },
    GetXattr { name: &'static str, attribute: &'static str, room: usize },
    RemoveXattr { name: &'static str, attribute: &'static str },
    Copy { from: &'static str, to: &'static str },
}

fn random_op(r: &mut Random) -> Op {
    let (name, other, handle) = (r.pick(NAMES), r.pick(NAMES), r.below(HANDLES as u64) as usize);
    let offset = match r.below(4) {
        0 => r.below(64) * 4096,
        1 => r.below(512) * 512,
        _ => r.below(300_000),
    };
    let len = match r.below(16) {
        0 => 1_200_000 + r.below(1000) as usize,
        1..6 => 4096 * (1 + r.below(8) as usize),
        6..9 => 512 * (1 + r.below(16) as usize),
        _ => 1 + r.below(9000) as usize,
    };
    let (attribute, fill) = (r.pick(ATTRIBUTES), r.next() as u8);
    match r.below(40) {
        0..6 => {
            let access = r.pick(&[OFlags::RDWR, OFlags::RDWR, OFlags::RDONLY, OFlags::WRONLY]);
            let more = [OFlags::CREATE, OFlags::CREATE, OFlags::TRUNC, OFlags::APPEND, OFlags::EXCL | OFlags::CREATE];
            Op::Open { name, handle, flags: access | if r.below(3) > 0 { r.pick(&more) } else { OFlags::empty() } }
        }
        6 => Op::Close { handle },
        7..13 => Op::Write { handle, offset, len, fill },
        13..17 => Op::Read { handle, offset, len },
        17 => Op::Truncate { handle, size: offset },
        18 => Op::TruncateByName { name, size: offset },
        19..22 => {
            use FallocateFlags as F;
            let modes = [
                F::empty(),
                F::KEEP_SIZE,
                F::PUNCH_HOLE | F::KEEP_SIZE,
                F::PUNCH_HOLE | F::KEEP_SIZE,
                F::ZERO_RANGE,
                F::ZERO_RANGE | F::KEEP_SIZE,
                F::PUNCH_HOLE,
            ];
            Op::Allocate { handle, mode: r.pick(&modes), offset, len: len as u64 }
        }
        22 => Op::Flush { handle },
        23 => Op::StatHandle { handle },
        24 => Op::Stat { name },
        25 => Op::List { name },
        26..29 => {
            let flags = [RenameFlags::empty(), RenameFlags::empty(), RenameFlags::NOREPLACE, RenameFlags::EXCHANGE];
            Op::Rename { from: name, to: other, flags: r.pick(&flags) }
        }
        29 => Op::Link { from: name, to: other },
        30 => Op::Symlink { target: other, name },
        31 => Op::Unlink { name },
        32 | 33 => Op::MkDir { name },
        34 => Op::RmDir { name },
        35 => Op::Mode { name, mode: r.below(0o1000) as u32 },
        36 => Op::Times { name, seconds: r.below(2_000_000_000) as i64 },
        37 => {
            let flags = r.pick(&[XattrFlags::empty(), XattrFlags::CREATE, XattrFlags::REPLACE]);
            Op::SetXattr { name, attribute, len: len % 2000, flags }
        }
        38 => match r.below(3) {
            0 => Op::RemoveXattr { name, attribute },
            _ => Op::GetXattr { name, attribute, room: r.pick(&[0, 10, 3000]) },
        },
        _ => Op::Copy { from: name, to: other },
    }
}

/// One of the two places, with its open files.
pub struct Side {
    root: PathBuf,
    direct: bool,
    handles: [Option<File>; HANDLES],
}

impl Side {
    /// `direct`: with O_DIRECT.
    pub fn new(root: &Path, direct: bool) -> Self {
        Self { root: root.to_owned(), direct, handles: Default::default() }
    }

    /// What the operation answers: bytes, or an error number.
    fn apply(&mut self, op: Op) -> Result<Vec<u8>, i32> {
        let at = |name: &str| self.root.join(name);
        let number = |e: std::io::Error| e.raw_os_error().unwrap_or(-1);
        let errno = |e: Errno| e.raw_os_error();
        let file = |handle: usize| self.handles[handle].as_ref().ok_or(Errno::BADF.raw_os_error());
        let none = |()| Vec::new();
        match op {
            Op::Open { name, handle, flags } => {
                // A directory cannot be opened with O_DIRECT anywhere.
                let direct = if self.direct && !at(name).is_dir() { OFlags::DIRECT } else { OFlags::empty() };
                let mode = rustix::fs::Mode::from_raw_mode(0o644);
                let flags = flags | direct | OFlags::CLOEXEC | OFlags::NONBLOCK;
                let opened = rustix::fs::open(at(name), flags, mode).map_err(errno)?;
                // No open folder is kept: a server need not serve one that was removed.
                let opened = File::from(opened);
                self.handles[handle] = opened.metadata().is_ok_and(|meta| !meta.is_dir()).then_some(opened);
                Ok(Vec::new())
            }
            Op::Close { handle } => {
                self.handles[handle] = None;
                Ok(Vec::new())
            }
            Op::Write { handle, offset, len, fill } => {
                let bytes: Vec<u8> = (0..len).map(|n| fill ^ (n / 512) as u8).collect();
                file(handle)?.write_all_at(&bytes, offset).map(none).map_err(number)
            }
            Op::Read { handle, offset, len } => {
                let mut bytes = vec![0; len];
                let got = read_all_at(file(handle)?, &mut bytes, offset).map_err(number)?;
                bytes.truncate(got);
                Ok(bytes)
            }
            Op::Truncate { handle, size } => file(handle)?.set_len(size).map(none).map_err(number),
            Op::TruncateByName { name, size } => {
                let file = OpenOptions::new().write(true).custom_flags(libc_nonblock()).open(at(name));
                file.and_then(|f| f.set_len(size)).map(none).map_err(number)
            }
            Op::Allocate { handle, mode, offset, len } => {
                rustix::fs::fallocate(file(handle)?, mode, offset, len).map(none).map_err(errno)
            }
            Op::Flush { handle } => file(handle)?.sync_all().map(none).map_err(number),
            Op::StatHandle { handle } => Ok(shown(&file(handle)?.metadata().map_err(number)?)),
            Op::Stat { name } => Ok(shown(&fs::symlink_metadata(at(name)).map_err(number)?)),
            Op::List { name } => {
                let mut names = Vec::new();
                for entry in fs::read_dir(at(name)).map_err(number)? {
                    names.push(entry.map_err(number)?.file_name().into_encoded_bytes());
                }
                names.sort();
                Ok(names.join(&b'/'))
            }
            Op::Rename { from, to, flags } => {
                rustix::fs::renameat_with(CWD, at(from), CWD, at(to), flags).map(none).map_err(errno)
            }
            Op::Link { from, to } => fs::hard_link(at(from), at(to)).map(none).map_err(number),
            Op::Symlink { target, name } => {
                std::os::unix::fs::symlink(target, at(name)).map_err(number)?;
                Ok(fs::read_link(at(name)).map_err(number)?.into_os_string().into_encoded_bytes())
            }
            Op::Unlink { name } => fs::remove_file(at(name)).map(none).map_err(number),
            Op::MkDir { name } => fs::create_dir(at(name)).map(none).map_err(number),
            Op::RmDir { name } => fs::remove_dir(at(name)).map(none).map_err(number),
            Op::Mode { name, mode } => {
                fs::set_permissions(at(name), fs::Permissions::from_mode(mode)).map(none).map_err(number)
            }
            Op::Times { name, seconds } => {
                let time = Timespec { tv_sec: seconds, tv_nsec: 123_456_789 };
                let times = Timestamps { last_access: time, last_modification: time };
                rustix::fs::utimensat(CWD, at(name), &times, AtFlags::empty()).map_err(errno)?;
                let meta = fs::metadata(at(name)).map_err(number)?;
                Ok([meta.mtime(), meta.mtime_nsec()].map(i64::to_ne_bytes).concat())
            }
            Op::SetXattr { name, attribute, len, flags } => {
                rustix::fs::setxattr(at(name), attribute, &vec![7; len], flags).map(none).map_err(errno)
            }
            Op::GetXattr { name, attribute, room } => {
                let mut value = vec![0; room];
                let got = rustix::fs::getxattr(at(name), attribute, &mut value[..]).map_err(errno)?;
                value.truncate(got);
                value.extend_from_slice(&got.to_ne_bytes());
                Ok(value)
            }
            Op::RemoveXattr { name, attribute } => {
                rustix::fs::removexattr(at(name), attribute).map(none).map_err(errno)
            }
            Op::Copy { from, to } => {
                // Not onto itself, which loses it here as there, but says so in its own way.
                let same = fs::metadata(at(from)).and_then(|a| Ok(a.ino() == fs::metadata(at(to))?.ino()));
                if same.unwrap_or(false) {
                    return Ok(Vec::new());
                }
                fs::copy(at(from), at(to)).map(|n| n.to_ne_bytes().to_vec()).map_err(number)
            }
        }
    }
}

fn libc_nonblock() -> i32 {
    OFlags::NONBLOCK.bits() as i32
}

fn read_all_at(file: &File, bytes: &mut [u8], offset: u64) -> std::io::Result<usize> {
    let mut got = 0;
    while got < bytes.len() {
        match file.read_at(&mut bytes[got..], offset + got as u64)? {
            0 => break,
            n => got += n,
        }
    }
    Ok(got)
}

/// What is compared of a file's attributes.
fn shown(meta: &fs::Metadata) -> Vec<u8> {
    let size = if meta.is_dir() { 0 } else { meta.len() };
    format!("{:o} {} {} {} {size}", meta.mode(), meta.nlink(), meta.uid(), meta.gid()).into_bytes()
}

/// All that is below a directory: attributes, contents, targets, extended attributes.
pub fn tree(root: &Path, below: &Path, found: &mut BTreeMap<PathBuf, (String, Vec<u8>)>) {
    for entry in fs::read_dir(root.join(below)).unwrap() {
        let name = below.join(entry.unwrap().file_name());
        let path = root.join(&name);
        let meta = fs::symlink_metadata(&path).unwrap();
        let mut text = String::from_utf8(shown(&meta)).unwrap();
        let mut content = Vec::new();
        if meta.is_symlink() {
            content = fs::read_link(&path).unwrap().into_os_string().into_encoded_bytes();
        } else {
            for attribute in ATTRIBUTES {
                let mut value = vec![0; 65536];
                let got = rustix::fs::getxattr(&path, *attribute, &mut value[..]);
                text.push_str(&format!(" {attribute}={got:?}"));
            }
            if meta.is_file() {
                content = fs::read(&path).unwrap();
            }
        }
        found.insert(name.clone(), (text, content));
        if meta.is_dir() {
            tree(root, &name, found);
        }
    }
}

/// Does the same at both places, and compares each answer.
pub fn live(seed: u64, steps: usize, mut mount: Side, mut model: Side) {
    let mut random = Random(seed);
    for step in 0..steps {
        let op = random_op(&mut random);
        let (got, expected) = (mount.apply(op), model.apply(op));
        assert!(got == expected, "seed {seed} step {step}: {op:?}: {} is not {}", brief(&got), brief(&expected));
    }
}

fn brief(outcome: &Result<Vec<u8>, i32>) -> String {
    match outcome {
        Ok(bytes) if bytes.len() > 100 => {
            format!("{} bytes, crc {:x}", bytes.len(), bytes.iter().map(|&b| u64::from(b)).sum::<u64>())
        }
        Ok(bytes) => String::from_utf8_lossy(bytes).into_owned(),
        Err(number) => format!("error {number}"),
    }
}

/// The seeds of a test; VMTWIN_SEED=n runs that one only.
pub fn seeds(list: &[u64]) -> Vec<u64> {
    match std::env::var("VMTWIN_SEED") {
        Ok(seed) => vec![seed.parse().expect("VMTWIN_SEED is a number")],
        Err(_) => list.to_vec(),
    }
}

/// Numbers that follow from a seed (SplitMix64).
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }
    /// Below `n`.
    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
    /// One of a list.
    pub fn pick<T: Copy>(&mut self, list: &[T]) -> T {
        list[self.below(list.len() as u64) as usize]
    }
}
