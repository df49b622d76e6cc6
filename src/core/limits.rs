//! Every bound, in one place; those that lean on each other are asserted.

/// Unit of the dirty map, of overlap and of bounce, in bytes.
pub const PAGE_BYTES: u64 = 4096;
/// Unit of comparison by hash, in bytes.
pub const BLOCK_BYTES: u64 = 65_536;
/// Unit of the activity log, in bytes.
pub const EXTENT_BYTES: u64 = 1 << 20;

/// A holder asks its acceptors for their grants this often, in milliseconds.
pub const RENEW_MS: u64 = 300;
/// Length of a lease, in milliseconds, counted by the holder from when the renewal was sent.
pub const LEASE_MS: u64 = 1000;
/// What clocks of two hosts may drift apart within one lease, in milliseconds.
pub const DRIFT_MS: u64 = 50;
/// A node that wants to take over stays back this long after it last heard of the holder, in milliseconds.
pub const TAKEOVER_MS: u64 = 1800;
/// Longest time between the look at the clock and the act that it allowed, in milliseconds.
pub const PAUSE_MS: u64 = 100;
/// Heartbeat on the peer link, in milliseconds, when nothing else was sent.
pub const BEAT_MS: u64 = 250;
/// A peer link that was silent this long is cut, in milliseconds.
pub const LINK_SILENT_MS: u64 = 1500;
/// A peer that holds up a write this long is dropped, in milliseconds (setting `slowPeer`).
pub const SLOW_PEER_MS: u64 = 3000;
/// A resync without progress for this long starts its pass again, in milliseconds.
pub const RESYNC_STALL_MS: u64 = 60_000;

/// The guardian looks this often, in milliseconds.
pub const GUARD_LOOK_MS: u64 = 100;
/// It acts where the process of a holder is stopped or dead and asked for nothing for this long, in milliseconds.
pub const GUARD_STOPPED_MS: u64 = 1500;
/// Where that process runs, and a newer record shows that somebody else went on, in milliseconds.
pub const GUARD_PASSED_MS: u64 = LEASE_MS + 2000;
/// Where that process runs and nothing more is known: it may only be slow, in milliseconds.
pub const GUARD_SILENT_MS: u64 = 10_000;

const _: () = assert!(RENEW_MS * 3 <= LEASE_MS, "two lost renewals would end a lease");
const _: () = assert!(LEASE_MS + DRIFT_MS + PAUSE_MS < TAKEOVER_MS, "two nodes could run one VM");
const _: () = assert!(GUARD_STOPPED_MS + 2 * GUARD_LOOK_MS < TAKEOVER_MS, "two VMs of one name would be seen");
const _: () = assert!(LEASE_MS + DRIFT_MS + PAUSE_MS < GUARD_STOPPED_MS, "a VM would be ended under a lease");
const _: () = assert!(LINK_SILENT_MS < TAKEOVER_MS, "a takeover would wait for the link's own time");

/// Modules of a cluster.
pub const MODULES_MAX: usize = 25;
/// Voters of a record: an odd number, both nodes and the witnesses.
pub const VOTERS_MAX: usize = 7;
/// Replicas in sync: two nodes.
pub const REPLICAS_MAX: usize = 2;
/// Records that one was forced from, at most.
pub const FORCED_FROM_MAX: usize = 8;

/// Largest data of one frame and of one guest request, in bytes (FUSE's `max_write`).
pub const PAYLOAD_BYTES_MAX: usize = 1 << 20;
/// Guest requests in hand at once.
pub const REQUESTS_MAX: usize = 256;
/// Extents in the activity log at once.
pub const LOG_EXTENTS_MAX: usize = 1024;
/// Bytes that a target's suspects may take on their way to the holder.
pub const SUSPECTS_BYTES_MAX: usize = 64 << 20;
/// Files in one module's directory. A VM has tens.
pub const FILES_MAX: usize = 65_536;
/// Bytes of a file name.
pub const FILE_NAME_BYTES_MAX: usize = 255;
/// Bytes of one extended attribute's value.
pub const XATTR_BYTES_MAX: usize = 65_536;
/// Bytes of an extended attribute's name.
pub const XATTR_NAME_BYTES_MAX: usize = 255;
/// Bytes of all shared attributes of one file, names and values: with its links an entry fits one frame.
pub const XATTRS_BYTES_MAX: usize = 256 << 10;
/// Extended attributes of one file.
pub const XATTRS_MAX: usize = 256;
/// Bytes of a symbolic link's target.
pub const SYMLINK_BYTES_MAX: usize = 4095;
/// Names of one file.
pub const LINKS_MAX: usize = 1024;
/// Bytes of a whole listing of the directory as it travels.
pub const TREE_BYTES_MAX: usize = 64 << 20;
/// Largest size of a file, in bytes: 8 EiB less a page, what an `off_t` holds.
pub const FILE_BYTES_MAX: u64 = i64::MAX as u64 & !(PAGE_BYTES - 1);

/// Copies of a resync in flight.
pub const RESYNC_COPIES_MAX: usize = 16;
/// Bytes of one copy: as long as a guest's write to it may have to wait.
pub const RESYNC_COPY_BYTES: u64 = 256 << 10;
/// Comparisons of a resync in flight, on both sides.
pub const RESYNC_HASHES_MAX: usize = 8;
/// Bytes of one comparison.
pub const RESYNC_BATCH_BYTES: u64 = 1 << 20;
/// Bytes of a file that are asked for data and holes at once.
pub const RESYNC_DATA_BYTES: u64 = 64 << 30;
/// Ranges in one answer to that.
pub const RESYNC_DATA_RANGES_MAX: usize = 256;
/// What a resync settled is flushed after so many bytes, so that a cut does not cost more.
pub const RESYNC_FLUSH_BYTES: u64 = 256 << 20;
/// Plans for the target's tree in one pass: the second mends what its file system added to the first.
pub const RESYNC_TREE_ROUNDS_MAX: u32 = 4;
/// Ranges of a verification in flight.
pub const VERIFY_RANGES_MAX: usize = 2;
/// Differences that a verification names; more are counted.
pub const VERIFY_LISTED_MAX: usize = 64;
/// A longer range is not marked page by page, but compared from its beginning on, in bytes: 16,384 runs of a bitmap.
pub const MARK_BYTES_MAX: u64 = 4 << 40;
/// Bytes of one bitmap as it is stored: half of the pages of 16 TiB, none beside another, need less.
pub const MAP_SET_BYTES_MAX: usize = 640 << 20;

const _: () = assert!(BLOCK_BYTES.is_multiple_of(PAGE_BYTES) && EXTENT_BYTES.is_multiple_of(BLOCK_BYTES));
const _: () = assert!(PAYLOAD_BYTES_MAX as u64 >= BLOCK_BYTES, "a block travels in one frame");
const _: () = assert!(
    XATTRS_BYTES_MAX + 8 * XATTRS_MAX + LINKS_MAX * (FILE_NAME_BYTES_MAX + 12) + SYMLINK_BYTES_MAX + 256
        <= PAYLOAD_BYTES_MAX,
    "an entry of the listing fits one frame"
);
const _: () = assert!(RESYNC_DATA_BYTES <= MARK_BYTES_MAX, "what is found of a whole file is marked by pages");
const _: () = assert!(RESYNC_BATCH_BYTES / PAGE_BYTES * 32 <= PAYLOAD_BYTES_MAX as u64, "hashes fit a frame");
const _: () = assert!(RESYNC_COPY_BYTES <= PAYLOAD_BYTES_MAX as u64, "a copy fits a frame");
const _: () = assert!(RESYNC_COPY_BYTES.is_multiple_of(BLOCK_BYTES), "a verification looks at whole blocks");
