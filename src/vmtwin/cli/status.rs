//! `vmtwin status`: a table, one sentence for each state that is not green, and JSON for scripts.
use super::{Outcome, say};
use crate::api::client::Daemon;
use crate::api::types::{Health, ModuleStatus, ResyncStatus, State, StatusAnswer, Verdict, VerifyStatus};
use clap::Args;
use std::fmt::Write;
use std::io::IsTerminal;
use std::time::Duration;

const ASK: Duration = Duration::from_secs(10);
const WATCH: Duration = Duration::from_millis(1000);

#[derive(Debug, Args)]
pub struct Status {
    /// Only this one, with all that is known of it.
    vm: Option<String>,
    /// As JSON.
    #[arg(long, conflicts_with = "watch")]
    json: bool,
    /// Again and again, until Ctrl-C.
    #[arg(long)]
    watch: bool,
}

pub async fn run(daemon: &Daemon, given: &Status) -> Outcome {
    let path = match &given.vm {
        None => "/v1/status".to_owned(),
        Some(vm) => format!("/v1/status?module={}", super::module(vm)?),
    };
    let colours = std::io::stdout().is_terminal();
    loop {
        let answer: StatusAnswer = daemon.get(&path, ASK).await?;
        if given.json {
            say(&serde_json::to_string_pretty(&answer).expect("plain values become JSON"));
            return Ok(());
        }
        let text = show(&answer, given.vm.is_some(), colours);
        if !given.watch {
            say(text.trim_end());
            return Ok(());
        }
        // Home, the text, and nothing of the longer text before.
        say(&if colours { format!("\x1b[H\x1b[2J{text}") } else { text });
        tokio::time::sleep(WATCH).await;
    }
}

/// A state as users write it.
#[must_use]
pub fn word(state: State) -> &'static str {
    match state {
        State::Stop => "STOP",
        State::Wait => "WAIT",
        State::Prim => "PRIM",
        State::Second => "SECOND",
        State::Alone => "ALONE",
    }
}

fn health(health: Health) -> &'static str {
    match health {
        Health::Red => "red",
        Health::Magenta => "magenta",
        Health::Green => "green",
    }
}

/// The whole text.
#[must_use]
pub fn show(answer: &StatusAnswer, in_full: bool, colours: bool) -> String {
    let mut text = String::new();
    if answer.modules.is_empty() {
        text.push_str("no modules: `vmtwin protect VM --peer NODE` makes one\n");
    } else {
        let rows: Vec<_> = answer.modules.iter().map(row).collect();
        let shown = table(&["MODULE", "NODE", "STATE", "HEALTH", "VM", "LINK", "IN SYNC"], &rows);
        text.push_str(&if colours { colour(&shown) } else { shown });
        text.push('\n');
    }
    for m in &answer.modules {
        if m.health != Health::Green && !m.reason.is_empty() {
            let _ = writeln!(text, "{} on {}: {}", m.module, m.node, m.reason);
        }
        if let Some(resync) = &m.resync {
            let _ = writeln!(text, "{} on {}: {}", m.module, m.node, progress(resync));
        }
        if let Some(verify) = &m.verify {
            let _ = writeln!(text, "{} on {}: {}", m.module, m.node, verifying(verify));
        }
    }
    for node in &answer.unreached {
        let _ = writeln!(text, "{}: {}", node.node, node.why);
    }
    if in_full {
        answer.modules.iter().for_each(|m| details(&mut text, m));
    }
    text
}

fn row(m: &ModuleStatus) -> Vec<String> {
    let link = match (m.link.as_str(), m.link_protection.as_str()) {
        ("up", "clear") => "up, clear",
        (link, _) => link,
    };
    let in_sync = if m.in_sync { "yes" } else { "no" };
    [&m.module, &m.node, word(m.state), health(m.health), &m.vm, link, in_sync].map(str::to_owned).to_vec()
}

fn details(text: &mut String, m: &ModuleStatus) {
    let holder = m.holder.as_deref().unwrap_or("unknown");
    let _ = writeln!(text, "\n{} on {}:", m.module, m.node);
    let _ = writeln!(text, "  record      {}.{}, holder {holder}", m.epoch, m.generation);
    let _ = writeln!(
        text,
        "  link        {} ({})",
        m.link,
        if m.link_protection == "clear" { "in the clear" } else { "TLS" }
    );
    let f = &m.figures;
    let _ = writeln!(
        text,
        "  guest I/O   {} reads ({}), {} writes ({}), {} flushes",
        f.reads,
        size(f.read_bytes),
        f.writes,
        size(f.written_bytes),
        f.flushes
    );
    let _ = writeln!(text, "  peer lacks  {}", size(f.dirty_bytes));
    if let Some(at) = &m.proved_equal {
        let _ = writeln!(text, "  verified    replicas proved equal at {at}");
    }
    if let Some(verified) = m.verified.as_ref().filter(|verified| verified.verdict != Verdict::Equal) {
        let _ = writeln!(text, "  last check  {}: {}", verified.ended, verified.reason);
    }
    if let Some(pid) = m.process {
        let _ = writeln!(text, "  process     {pid}");
    }
    if let Some(t) = &m.last_takeover {
        let _ = writeln!(
            text,
            "  last start  {} after the loss was seen: won after {} ms, start call {} ms later, it took {} ms",
            seconds(t.started_ms.saturating_sub(t.detected_ms)),
            t.won_ms.saturating_sub(t.detected_ms),
            t.start_called_ms.saturating_sub(t.won_ms),
            t.started_ms.saturating_sub(t.start_called_ms)
        );
    }
    for note in &m.notes {
        let _ = writeln!(text, "  note        {note}");
    }
}

fn seconds(ms: u64) -> String {
    format!("{}.{} s", ms / 1000, ms % 1000 / 100)
}

/// How far a resync is: a bar, bytes, rate, time left.
#[must_use]
pub fn progress(resync: &ResyncStatus) -> String {
    let ResyncStatus { bytes_total, bytes_done, bytes_sent, rate, seconds_left } = *resync;
    let sent = format!(", {} sent", size(bytes_sent));
    format!("resync {}", bar(bytes_done, bytes_total, &sent, rate, seconds_left))
}

/// How far a verification is, likewise.
#[must_use]
pub fn verifying(verify: &VerifyStatus) -> String {
    let VerifyStatus { bytes_total, bytes_done, rate, seconds_left, .. } = *verify;
    format!("verify {}", bar(bytes_done, bytes_total, "", rate, seconds_left))
}

fn bar(done: u64, total: u64, more: &str, rate: u64, seconds_left: Option<u64>) -> String {
    let permille = if total == 0 { 0 } else { u128::from(done.min(total)) * 1000 / u128::from(total) };
    let full = usize::try_from(permille / 50).expect("at most 20");
    let left = seconds_left.map_or("time left unknown".to_owned(), |s| {
        if s >= 120 { format!("{} min left", s / 60) } else { format!("{s} s left") }
    });
    format!(
        "[{}{}] {}.{}%, {} of {} looked at{more}, {}/s, {left}",
        "#".repeat(full),
        ".".repeat(20 - full),
        permille / 10,
        permille % 10,
        size(done),
        size(total),
        size(rate)
    )
}

/// Bytes for people.
#[must_use]
pub fn size(bytes: u64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let unit = if bytes < 1024 { 0 } else { bytes.ilog2() as usize / 10 };
    if unit == 0 {
        return format!("{bytes} B");
    }
    let scaled = u128::from(bytes) * 10 / (1u128 << (10 * unit));
    format!("{}.{} {}", scaled / 10, scaled % 10, units[unit])
}

/// Columns as wide as their widest cell, two blanks between.
#[must_use]
pub fn table(heads: &[&str], rows: &[Vec<String>]) -> String {
    let width = |column: usize| {
        let cells = rows.iter().map(|row| row[column].chars().count());
        cells.chain([heads[column].len()]).max().unwrap_or(0)
    };
    let widths: Vec<_> = (0..heads.len()).map(width).collect();
    let line = |cells: &mut dyn Iterator<Item = &str>| {
        let padded: Vec<_> = cells.zip(&widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        padded.join("  ").trim_end().to_owned()
    };
    let mut lines = vec![line(&mut heads.iter().copied())];
    lines.extend(rows.iter().map(|row| line(&mut row.iter().map(String::as_str))));
    lines.join("\n")
}

fn colour(table: &str) -> String {
    let mut lines = table.lines();
    let head = format!("\x1b[1m{}\x1b[0m", lines.next().unwrap_or_default());
    let body = lines.map(|line| {
        let paint = |word: &str, code: &str, line: String| {
            line.replacen(&format!(" {word} "), &format!(" \x1b[{code}m{word}\x1b[0m "), 1)
        };
        let line = paint("green", "32", line.to_owned());
        paint("magenta", "35", paint("red", "31", line))
    });
    std::iter::once(head).chain(body).collect::<Vec<_>>().join("\n")
}
