//! `vmtwin verify`: begins a verification, follows it, tells what came of it.
use super::status::{size, verifying};
use super::{Outcome, say};
use crate::api::client::{Daemon, failed};
use crate::api::types::{
    DifferenceStatus, ErrorBody, StatusAnswer, Verdict, VerifiedStatus, VerifyRequest, VerifyStarted, VerifyStatus,
};
use clap::Args;
use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};
use tokio::time::sleep;

const ASK: Duration = Duration::from_secs(310);
const LOOK: Duration = Duration::from_millis(500);
/// Its node may be out of reach this long before it is given up.
const LOST: Duration = Duration::from_secs(30);

#[derive(Debug, Args)]
pub struct Verify {
    /// The VM.
    vm: String,
    /// Overwrite what differs by the copy of the node that runs the VM: the other node is dropped and resynced.
    #[arg(long)]
    repair: bool,
    /// Read at most this many MiB per second on each node.
    #[arg(long, value_name = "MIB", default_value_t = 200, value_parser = clap::value_parser!(u64).range(1..=1 << 20))]
    rate: u64,
    /// The result as JSON.
    #[arg(long)]
    json: bool,
    /// Do not wait for the end: `vmtwin status VM` tells it.
    #[arg(long, conflicts_with = "json")]
    no_wait: bool,
}

pub async fn run(daemon: &Daemon, given: &Verify) -> Outcome {
    let vm = super::module(&given.vm)?;
    let request =
        VerifyRequest { module: vm.to_string(), rate: Some(given.rate << 20), repair: given.repair, here: false };
    let started: VerifyStarted = daemon.post("/v1/verify", &request, ASK).await?;
    if given.no_wait {
        say(&format!("under way: `vmtwin status {vm} --watch` follows it"));
        return Ok(());
    }
    let bars = !given.json && std::io::stdout().is_terminal();
    let ended = follow(daemon, vm.as_str(), &started, |at| {
        if bars {
            // A bar that cannot be drawn is no reason to end.
            let _ = write!(std::io::stdout(), "\r\x1b[K{}", verifying(at));
            let _ = std::io::stdout().flush();
        }
    })
    .await;
    if bars {
        let _ = write!(std::io::stdout(), "\r\x1b[K");
    }
    let ended = ended?;
    if given.json {
        say(&serde_json::to_string_pretty(&ended).expect("plain values become JSON"));
    } else {
        differences(&ended).iter().for_each(|line| say(line));
    }
    match ended.verdict {
        Verdict::Equal if given.json => Ok(()),
        Verdict::Equal => {
            say(&format!("{vm}: {} ({})", ended.reason, ended.ended));
            Ok(())
        }
        Verdict::Different => Err(failed(1, format!("{vm}: {}", ended.reason))),
        Verdict::Cut => Err(failed(3, format!("{vm}: {}", ended.reason))),
    }
}

/// Until it has ended.
async fn follow(
    daemon: &Daemon,
    vm: &str,
    started: &VerifyStarted,
    mut show: impl FnMut(&VerifyStatus),
) -> Result<VerifiedStatus, ErrorBody> {
    let mut seen = Instant::now();
    loop {
        let status: StatusAnswer = daemon.get(&format!("/v1/status?module={vm}"), ASK).await?;
        let node = status.modules.into_iter().find(|m| m.node == started.node);
        let (running, ended) = node.map_or((None, None), |m| (m.verify, m.verified));
        if let Some(ended) = ended.filter(|ended| ended.begun_ms == started.begun_ms) {
            return Ok(ended);
        }
        if let Some(running) = running.filter(|running| running.begun_ms == started.begun_ms) {
            seen = Instant::now();
            show(&running);
        }
        if seen.elapsed() > LOST {
            return Err(failed(
                3,
                format!(
                    "{vm}: the verification on {} ended without a result: `vmtwin log {vm}` may tell why",
                    started.node
                ),
            ));
        }
        sleep(LOOK).await;
    }
}

/// A line for each difference.
#[must_use]
pub fn differences(ended: &VerifiedStatus) -> Vec<String> {
    let line = |one: &DifferenceStatus| match (one.offset, one.length) {
        (Some(offset), Some(length)) => {
            format!("{}: {}, {} from byte {offset} on", one.file, one.what, size(length))
        }
        _ => format!("{}: {}", one.file, one.what),
    };
    let more = (ended.more > 0).then(|| format!("and {} more", ended.more));
    ended.differences.iter().map(line).chain(more).collect()
}
