//! `vmtwin log`: what happened to a module, on both nodes.
use super::{Outcome, say};
use crate::api::client::Daemon;
use crate::eventlog::{Event, Level};
use clap::Args;
use std::collections::BTreeSet;
use std::time::Duration;

const ASK: Duration = Duration::from_secs(15);
const AGAIN: Duration = Duration::from_secs(1);

#[derive(Debug, Args)]
pub struct Log {
    /// The VM.
    vm: String,
    /// Go on with what comes, until Ctrl-C.
    #[arg(short, long)]
    follow: bool,
    /// At most the last of them.
    #[arg(short = 'n', long, value_name = "LINES", default_value_t = 1000)]
    lines: usize,
    /// As JSON, one event a line.
    #[arg(long)]
    json: bool,
}

pub async fn run(daemon: &Daemon, given: &Log) -> Outcome {
    let module = super::module(&given.vm)?;
    let path = |limit| format!("/v1/log?module={module}&limit={limit}");
    let mut events: Vec<Event> = daemon.get(&path(given.lines), ASK).await?;
    let mut seen = BTreeSet::new();
    loop {
        let mut now = BTreeSet::new();
        for event in events {
            let key = (event.time.clone(), event.node.clone(), event.event.clone(), event.text.clone());
            if !seen.contains(&key) {
                say(&line(&event, given.json));
            }
            now.insert(key);
        }
        seen = now;
        if !given.follow {
            return Ok(());
        }
        tokio::time::sleep(AGAIN).await;
        events = daemon.get(&path(given.lines.max(1000)), ASK).await?;
    }
}

/// One event.
#[must_use]
pub fn line(event: &Event, json: bool) -> String {
    if json {
        return serde_json::to_string(event).expect("plain values become JSON");
    }
    let level = match event.level {
        Level::Info => "",
        Level::Warn => "warning: ",
        Level::Error => "error: ",
    };
    format!("{}  {}  g{}  {}: {level}{}", event.time, event.node, event.generation, event.event, event.text)
}
