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
    /// A verification under way; on the node that runs the VM.
    #[serde(default)]
    pub verify: Option<VerifyStatus>,
    /// How the last one ended, since this process began.
    #[serde(default)]
    pub verified: Option<VerifiedStatus>,
    /// When the replicas were last proved equal, since this process began.
    #[serde(default)]
    pub proved_equal: Option<String>,
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

/// A verification under way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct VerifyStatus {
    /// When it began, in milliseconds since 1970; names it, too.
    pub begun_ms: u64,
    /// Bytes to look at: the lengths of all files.
    pub bytes_total: u64,
    /// Bytes looked at, holes among them.
    pub bytes_done: u64,
    /// Bytes per second looked at, lately.
    pub rate: u64,
    /// Seconds left, if known.
    pub seconds_left: Option<u64>,
}

/// What came of a verification.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// The replicas were proved equal.
    Equal,
    /// They differ.
    Different,
    /// It could not go on: the session ended, or one side cannot be read at all.
    Cut,
}

/// How a verification ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct VerifiedStatus {
    /// When it began, in milliseconds since 1970; names it, too.
    pub begun_ms: u64,
    /// When it ended.
    pub ended: String,
    /// What came of it.
    pub verdict: Verdict,
    /// One sentence.
    pub reason: String,
    /// Bytes that were hashed on each side.
    pub bytes: u64,
    /// At most 64.
    pub differences: Vec<DifferenceStatus>,
    /// Differences that are not listed.
    pub more: u64,
    /// The peer was dropped to get the holder's copy.
    pub repaired: bool,
}

/// Where two replicas differ.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DifferenceStatus {
    /// A name of the file, from the VM's directory down.
    pub file: String,
    /// `content`, `unreadable here`, `unreadable there`, `only here`, `only there`, or what of its entry differs.
    pub what: String,
    /// Of content: from which byte.
    pub offset: Option<u64>,
    /// Of content: how many; whole blocks of 64 KiB, also where the file ends before.
    pub length: Option<u64>,
}

/// A verification is ordered. The rate is in bytes per second.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct VerifyRequest {
    /// Which module.
    pub module: String,
    /// Bytes a second that each side reads, at most; none: 200 MiB.
    #[serde(default)]
    pub rate: Option<u64>,
    /// What differs is overwritten by the holder's copy.
    #[serde(default)]
    pub repair: bool,
    /// Between daemons: this node's own process only.
    #[serde(default)]
    pub here: bool,
}

/// It began.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct VerifyStarted {
    /// On which node; its status tells how it goes on.
    pub node: String,
    /// See `VerifyStatus`.
    pub begun_ms: u64,
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

/// Answer to `status`: every node that was reached, and which were not.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct StatusAnswer {
    /// One entry per module and node.
    pub modules: Vec<ModuleStatus>,
    /// Nodes that gave no answer.
    pub unreached: Vec<Unreached>,
}

/// A node that gave no answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Unreached {
    /// Its name.
    pub node: String,
    /// In words.
    pub why: String,
}

/// What is asked of a module.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Action {
    /// Both module processes up; the VM starts where it may.
    Start,
    /// Graceful stop on both nodes.
    Stop,
    /// The VM, in place.
    Restart,
    /// The VM to the other node.
    Swap,
    /// Start here, if the record allows it.
    Prim,
    /// Be the replica here.
    Second,
}

/// A command to a module.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct CommandRequest {
    /// Which module.
    pub module: String,
    /// What.
    pub action: Action,
    /// Only on this node (`stop --node`); none: as the action means it.
    #[serde(default)]
    pub node: Option<String>,
    /// Between daemons: this node's own process only.
    #[serde(default)]
    pub here: bool,
    /// Answer at once where nothing forbids it; else when it is done.
    #[serde(default)]
    pub no_wait: bool,
}

/// Something was done.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Done {
    /// Sentences for the operator: what was done, what was not.
    pub notes: Vec<String>,
    /// It is still going on.
    #[serde(default)]
    pub going_on: bool,
}

/// A configuration file to be taken.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ApplyRequest {
    /// Its name, for errors.
    pub file: String,
    /// Its text.
    pub xml: String,
    /// Even where a node that it concerns is away.
    #[serde(default)]
    pub force: bool,
}

/// One node's part of an `apply`: checked first on all, then stored on all.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ConfigRequest {
    /// The text; its root element tells which file it is.
    pub xml: String,
    /// Only check it.
    pub check_only: bool,
}

/// Answer to a `ConfigRequest`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ConfigAnswer {
    /// The file's text as it was before; none: there was none.
    pub before: Option<String>,
}

/// A VM to be protected.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ProtectRequest {
    /// Its name at the hypervisor, and the module's.
    pub vm: String,
    /// The node that gets the replica.
    pub peer: String,
    /// Its directory; none: where its disks lie.
    #[serde(default)]
    pub dir: Option<String>,
    /// The preferred node; none: this one.
    #[serde(default)]
    pub primary: Option<String>,
    /// `libvirt`, or `fake` in tests.
    #[serde(default)]
    pub driver: Option<String>,
}

/// A VM to be given back.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct UnprotectRequest {
    /// Which module.
    pub module: String,
    /// Files back to where they came from.
    #[serde(default)]
    pub restore_layout: bool,
}

/// A host that asks to be let in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct JoinRequest {
    /// The token's secret.
    pub secret: String,
    /// Certificate request, PEM.
    pub request: String,
    /// Its name.
    pub name: String,
    /// A node's addresses; none: it joins as a witness.
    #[serde(default)]
    pub node: Option<JoinNode>,
    /// Of the joining program.
    pub version: String,
}

/// How a node that joins can be reached.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct JoinNode {
    /// For everything.
    pub address: String,
    /// For replication, first choice.
    #[serde(default)]
    pub replication: Option<String>,
    /// Whether a replication link over that is encrypted.
    pub replication_tls: bool,
}

/// What a host that joins gets.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct JoinAnswer {
    /// Its certificate, PEM.
    pub certificate: String,
    /// The authority's certificate, PEM.
    pub authority: String,
    /// The authority's key, PEM: for nodes only, so that either can replace the other.
    pub authority_key: Option<String>,
    /// cluster.xml, with the new node in it.
    pub cluster: String,
}

/// One node, as it sees itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NodeStatus {
    /// Its name; none: it is in no cluster.
    pub name: Option<String>,
    /// Of its program.
    pub version: String,
    /// Of its cluster.xml.
    pub cluster_version: Option<u64>,
    /// Process id of its `keep`; none: it does not run.
    pub keep: Option<u32>,
    /// Modules that it takes part in.
    pub modules: Vec<String>,
}

/// The whole cluster.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ClusterStatus {
    /// Its name.
    pub cluster: String,
    /// Of this node's cluster.xml.
    pub version: u64,
    /// Each node and the witness.
    pub members: Vec<MemberStatus>,
}

/// A member, as this node sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct MemberStatus {
    /// Node or witness.
    pub name: String,
    /// `node` or `witness`.
    pub role: String,
    /// Its address.
    pub address: String,
    /// Whether it answers.
    pub reached: bool,
    /// Empty where all is well; else one sentence.
    pub reason: String,
    /// Of its program, where known.
    pub version: Option<String>,
}
