//! How a data thread begins: what lies there is read, judged and mounted.
use super::saves::Saves;
use super::{Data, SLOTS, Settings, clock, control, guest, local, peer, sentence};
use crate::engine::messages::{Figures, FromData, Lease, Opened, ToData};
use crate::store::metafiles::{MetaError, MetaFolder};
use crate::store::mounts::Backing;
use crate::store::replica::{self, Replica as OnDisk, State};
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::{Arc, mpsc};
use std::time::Duration;
use tokio::sync::mpsc::UnboundedSender;
use vmtwin_core::format::Owner;
use vmtwin_core::ids::ReplicaId;
use vmtwin_core::replica::log::ActivityLog;
use vmtwin_core::replica::map::DirtyMap;
use vmtwin_core::replica::{Config, Replica};
use vmtwin_frontend::fuse::{self, Fuse};
use vmtwin_ring::{Pool, Ring, Waker};

/// Entries of the ring's submission queue.
const RING_ENTRIES: u32 = 512;
/// How long a predecessor's requests may take to end.
const DRAIN_LIMIT: Duration = Duration::from_secs(60);
/// How long a mount that stands there may take to show whether it is dead.
const LIFE_LIMIT: Duration = Duration::from_secs(5);
pub(super) const LOG_FILE: &str = "log";
pub(super) const MAP_FILE: &str = "map";

/// Body of the thread.
pub(super) fn run(
    settings: Settings,
    lease: Arc<Lease>,
    orders: mpsc::Receiver<ToData>,
    news: UnboundedSender<FromData>,
    ready: &mpsc::SyncSender<Result<Waker, String>>,
) {
    let ring = match Ring::new(RING_ENTRIES) {
        Ok(ring) => ring,
        Err(e) => return drop(ready.send(Err(sentence(&e)))),
    };
    let _ = ready.send(Ok(ring.waker()));
    match open(settings, ring, lease, orders, news.clone()) {
        Ok(mut data) => data.run(),
        Err(why) => drop(news.send(FromData::Failed(why))),
    }
}

fn open(
    settings: Settings,
    mut ring: Ring,
    lease: Arc<Lease>,
    orders: mpsc::Receiver<ToData>,
    news: UnboundedSender<FromData>,
) -> Result<Data, String> {
    let text = |e: &dyn std::error::Error| sentence(e);
    let folder = MetaFolder::open(&settings.metadata).map_err(|e| text(&e))?;
    // R7: no request of a predecessor may still be on its way to these files.
    let lock = folder.drain_lock(DRAIN_LIMIT).map_err(|e| text(&e))?;
    ring.hold_until_drained(lock).map_err(|e| format!("cannot hand the drain lock to the ring: {e}"))?;
    fuse::clear_dead(&settings.directory, LIFE_LIMIT).map_err(|e| text(&e))?;
    let opened = replica::open_replica(&settings.directory, &settings.metadata, settings.id, settings.boot);
    let OnDisk { store, meta, mut state, fresh, .. } = opened.map_err(|e| text(&e))?;
    let owner = Owner { module: settings.id, replica: state.replica };
    let found = if fresh { None } else { read_metadata(&meta, owner, &mut state)? };
    // Found again at the next start, whatever happens until then: before the log that could not be read is replaced.
    state.save(&meta).map_err(|e| text(&e))?;
    let (log, map, sequence) = match found {
        Some(found) => found,
        None => (create_log(&meta, owner).map_err(|e| text(&e))?, DirtyMap::default(), 0),
    };
    let log_file: OwnedFd = meta.in_place(LOG_FILE).map_err(|e| text(&e))?;
    let config = Config {
        module: settings.id,
        me: state.replica,
        peer: ReplicaId(0),
        configuration: settings.configuration,
        slow_peer_ms: settings.slow_peer_ms,
        marks: state.marks,
    };
    let backing = Backing::bind(&settings.directory, &settings.backing).map_err(|e| text(&e))?;
    let pool = Pool::new(SLOTS).map_err(|e| format!("no address space for buffers: {e}"))?;
    let options = fuse::Options {
        source: format!("vmtwin:{}", settings.module),
        selinux_context: settings.selinux_context.clone(),
        readdirplus: false,
    };
    let mounted = Fuse::mount(&settings.directory, &options).map_err(|e| text(&e))?;
    let saves = Saves::new(meta, ring.waker()).map_err(|e| format!("no thread for metadata: {e}"))?;
    let data = Data {
        core: Replica::new(config, log, map, sequence),
        settings,
        orders,
        news,
        ring,
        pool,
        fuse: Some(mounted),
        store,
        state,
        events: VecDeque::new(),
        effects: Vec::new(),
        pending: HashMap::new(),
        next_token: super::MOUNT_TOKEN + 1,
        payloads: HashMap::new(),
        guest: guest::Guest::default(),
        local: local::Local::default(),
        links: BTreeMap::new(),
        link: peer::LinkState::default(),
        saves,
        log_file: Rc::new(log_file),
        control: control::Control::default(),
        figures: Figures::default(),
        now: clock(),
        lease,
        lease_open: false,
        over: false,
        _backing: backing,
    };
    data.tell(FromData::Ready(Opened {
        replica: data.state.replica,
        record: data.state.record.clone(),
        broken: data.state.marks.broken,
        erred: data.state.marks.erred,
        suspect_all: data.state.marks.suspect_all,
    }));
    Ok(data)
}

/// Log and map as they were left. What cannot be read makes everything suspect; it is never guessed.
fn read_metadata(
    meta: &MetaFolder,
    owner: Owner,
    state: &mut State,
) -> Result<Option<(ActivityLog, DirtyMap, u64)>, String> {
    let read = |name| meta.read(name).map_err(|e| sentence(&e));
    let (log, map) = (read(LOG_FILE)?, read(MAP_FILE)?);
    let Some(log) = log.filter(|bytes| !bytes.is_empty()) else {
        // It is there before the first record is.
        state.marks.suspect_all |= map.is_some() || state.record.is_some();
        return Ok(None);
    };
    let log = match ActivityLog::load(owner, &log) {
        Ok(log) => log,
        Err(_) => {
            state.marks.suspect_all = true;
            return Ok(None);
        }
    };
    let (sequence, map) = match map.as_deref().map(|bytes| DirtyMap::load(owner, bytes)) {
        None => (0, DirtyMap::default()),
        Some(Ok(found)) => found,
        Some(Err(_)) => {
            state.marks.suspect_all = true;
            (0, DirtyMap::default())
        }
    };
    Ok(Some((log, map, sequence)))
}

fn create_log(meta: &MetaFolder, owner: Owner) -> Result<ActivityLog, MetaError> {
    let (log, bytes) = ActivityLog::create(owner);
    meta.replace(LOG_FILE, &bytes)?;
    meta.remove(MAP_FILE)?;
    Ok(log)
}
