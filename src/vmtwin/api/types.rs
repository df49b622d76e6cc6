//! What the API answers, as JSON. Field names are a promise to scripts.
use serde::{Deserialize, Serialize};

/// State of a module on one node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum State {
    /// Not running; the directory is plain.
    Stop,
    /// Waiting for up-to-date data or for a decision.
    Wait,
    /// Running the VM with a peer.
    Prim,
    /// Holding the replica.
    Second,
    /// Running the VM with no peer.
    Alone,
}

/// Beside the state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Health {
    /// Not ready.
    Red,
    /// In transition.
    Magenta,
    /// Ready.
    Green,
}

/// One module on one node.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ModuleStatus {
    /// Module.
    pub module: String,
    /// Node that answers.
    pub node: String,
    /// Its state.
    pub state: State,
    /// Its health.
    pub health: Health,
    /// One sentence for every state that is not green: what is, and what to do. Empty when green.
    pub reason: String,
    /// Whether this node's replica is in sync, by the record it knows.
    pub in_sync: bool,
    /// Node that holds the VM, by the record.
    pub holder: Option<String>,
    /// Of the record.
    pub epoch: u64,
    /// Of the record.
    pub generation: u64,
    /// `undefined`, `off`, `running`, `paused`, or `unknown`.
    pub vm: String,
    /// Peer link: `up`, `down`; and how it is protected: `tls` or `clear`.
    pub link: String,
    /// `tls` or `clear`.
    pub link_protection: String,
    /// A resync under way.
    pub resync: Option<ResyncStatus>,
    /// What a taker of this version should know (simplified rules).
    pub notes: Vec<String>,
    /// Counters.
    pub figures: FiguresStatus,
    /// Process id of the module process.
    pub process: Option<u32>,
    /// Times of the last start of the VM here, CLOCK_REALTIME ms: when the loss of the holder was seen, when the record
    /// was won, when the start call went out, when it returned.
    pub last_takeover: Option<TakeoverTimes>,
}

/// Milliseconds since 1970.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct TakeoverTimes {
    /// The holder was taken for lost.
    pub detected_ms: u64,
    /// This node's record was known.
    pub won_ms: u64,
    /// The start call went out.
    pub start_called_ms: u64,
    /// It returned.
    pub started_ms: u64,
}

/// A resync under way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ResyncStatus {
    /// Bytes to look at.
    pub bytes_total: u64,
    /// Bytes looked at.
    pub bytes_done: u64,
    /// Bytes that travelled.
    pub bytes_sent: u64,
    /// Bytes per second looked at, lately.
    pub rate: u64,
    /// Seconds left, if known.
    pub seconds_left: Option<u64>,
}

/// Counters since the module process began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FiguresStatus {
    /// Guest reads.
    pub reads: u64,
    /// Guest writes.
    pub writes: u64,
    /// Guest flushes.
    pub flushes: u64,
    /// Bytes read.
    pub read_bytes: u64,
    /// Bytes written.
    pub written_bytes: u64,
    /// Bytes that the peer has not got.
    pub dirty_bytes: u64,
}

/// A refusal or failure, as every route gives it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ErrorBody {
    /// One sentence that says what to do.
    pub error: String,
    /// The exit code that the CLI ends with (DESIGN: 1 failed, 2 usage, 3 state forbids it, 4 no contact, 5 still going on,
    /// 6 not authorised).
    pub code: u8,
}
