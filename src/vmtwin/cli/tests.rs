//! What is printed, and what can be said.
use super::status::{progress, show, size, table};
use super::{Cli, log};
use crate::api::types::{
    FiguresStatus, Health, ModuleStatus, ResyncStatus, State, StatusAnswer, TakeoverTimes, Unreached,
};
use crate::eventlog::{Event, Level};
use clap::{CommandFactory, Parser};

#[test]
fn every_command_has_help_with_an_example() {
    let mut command = Cli::command();
    command.clone().debug_assert();
    command.build();
    let mut all: Vec<&clap::Command> = command.get_subcommands().collect();
    let mut shown = 0;
    while let Some(command) = all.pop() {
        let nested = command.get_subcommands().filter(|c| c.get_name() != "help").collect::<Vec<_>>();
        if command.is_hide_set() || command.get_name() == "help" {
            continue;
        }
        assert!(command.get_about().is_some(), "{}", command.get_name());
        if nested.is_empty() {
            let after = command.get_after_help().map(ToString::to_string).unwrap_or_default();
            assert!(after.contains("Example"), "{} has no example", command.get_name());
            shown += 1;
        }
        all.extend(nested);
    }
    assert!(shown >= 17, "{shown}");
}

#[test]
fn the_lines_of_the_readme_are_understood_and_nonsense_is_a_usage_error() {
    let good = [
        "node",
        "witness --state /var/lib/vmtwin-witness",
        "cluster init --name lab --node h1 --address 10.0.0.1 --witness w1=10.0.0.9",
        "cluster init --name lab --node h1 --address 10.0.0.1 --replication-address 10.1.0.1 --replication-tls off --witness w1=10.0.0.9",
        "cluster token",
        "cluster join TOKEN --node h2 --address 10.0.0.2 --replication-address 10.1.0.2",
        "cluster join TOKEN --witness w1 --state /x",
        "cluster status",
        "apply /root/db.xml",
        "protect db --peer h2 --dir /srv/db --primary h2",
        "unprotect db --restore-layout",
        "status",
        "status db --json",
        "status db --watch",
        "start db --no-wait",
        "stop db --node h2 --wait 60",
        "log db -f",
        "--root /tmp/x hook db prepare begin -",
    ];
    for line in good {
        let words = std::iter::once("vmtwin").chain(line.split(' '));
        Cli::try_parse_from(words).unwrap_or_else(|e| panic!("{line}: {e}"));
    }
    let bad = [
        "",
        "frobnicate",
        "cluster init --name a/b --node h1 --address 10.0.0.1 --witness w1=10.0.0.9",
        "cluster init --name lab --node h1 --address host.example --witness w1=10.0.0.9",
        "cluster init --name lab --node h1 --address 10.0.0.1 --witness w1",
        "cluster init --name lab --node h1 --address 10.0.0.1 --witness w1=10.0.0.9 --replication-tls off",
        "cluster join TOKEN",
        "cluster join TOKEN --node h2",
        "cluster join TOKEN --witness w1",
        "cluster join TOKEN --node h2 --address 10.0.0.2 --witness w1 --state /x",
        "protect db",
        "start",
        "stop db --wait 3 --no-wait",
    ];
    for line in bad {
        let words = std::iter::once("vmtwin").chain(line.split(' ').filter(|w| !w.is_empty()));
        let error = Cli::try_parse_from(words).err().unwrap_or_else(|| panic!("{line} was taken"));
        assert_eq!(error.exit_code(), 2, "{line}");
    }
}

#[test]
fn a_status_tells_in_a_sentence_what_is_not_green() {
    let mut second = module("h2", State::Second, Health::Magenta);
    second.reason = "it is being brought up to date".into();
    second.resync = Some(ResyncStatus {
        bytes_total: 10 << 30,
        bytes_done: 5 << 30,
        bytes_sent: 3 << 20,
        rate: 100 << 20,
        seconds_left: Some(51),
    });
    let answer = StatusAnswer {
        modules: vec![module("h1", State::Prim, Health::Green), second],
        unreached: vec![Unreached { node: "h3".into(), why: "no contact with node h3".into() }],
    };
    let expected = "\
MODULE  NODE  STATE   HEALTH   VM       LINK       IN SYNC
db      h1    PRIM    green    running  up, clear  yes
db      h2    SECOND  magenta  running  up, clear  yes
db on h2: it is being brought up to date
db on h2: resync [##########..........] 50.0%, 5.0 GiB of 10.0 GiB looked at, 3.0 MiB sent, 100.0 MiB/s, 51 s left
h3: no contact with node h3
";
    assert_eq!(show(&answer, false, false), expected);
    let coloured = show(&answer, false, true);
    assert!(coloured.contains("\x1b[35mmagenta\x1b[0m") && coloured.contains("\x1b[32mgreen\x1b[0m"), "{coloured}");
    let full =
        show(&StatusAnswer { modules: vec![module("h1", State::Prim, Health::Green)], unreached: vec![] }, true, false);
    let expected = "\
MODULE  NODE  STATE  HEALTH  VM       LINK       IN SYNC
db      h1    PRIM   green   running  up, clear  yes

db on h1:
  record      1.7, holder h1
  link        up (in the clear)
  guest I/O   5 reads (20.0 KiB), 3 writes (12.0 KiB), 1 flushes
  peer lacks  0 B
  process     4711
  last start  2.3 s after the loss was seen: won after 100 ms, start call 200 ms later, it took 2000 ms
  note        2 of 3 acceptors answer
";
    assert_eq!(full, expected);
    assert!(show(&StatusAnswer::default(), false, false).contains("vmtwin protect"));
}

#[test]
fn figures_are_for_people() {
    for (bytes, text) in [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1536, "1.5 KiB"), (u64::MAX, "15.9 EiB")] {
        assert_eq!(size(bytes), text);
    }
    let unknown = progress(&ResyncStatus::default());
    assert!(unknown.contains("0.0%") && unknown.contains("time left unknown"), "{unknown}");
    let over = ResyncStatus { bytes_total: 1, bytes_done: 9, ..ResyncStatus::default() };
    assert!(progress(&over).contains("100.0%"));
    assert_eq!(table(&["A", "B"], &[vec!["xy".into(), String::new()]]), "A   B\nxy");
}

#[test]
fn an_event_is_one_line() {
    let event = Event {
        time: "2026-11-27T22:00:00.000Z".into(),
        node: "h2".into(),
        module: "db".into(),
        generation: 4,
        level: Level::Warn,
        event: "takeover".into(),
        text: "h1 is lost".into(),
    };
    assert_eq!(log::line(&event, false), "2026-11-27T22:00:00.000Z  h2  g4  takeover: warning: h1 is lost");
    assert_eq!(serde_json::from_str::<Event>(&log::line(&event, true)).unwrap(), event);
}

fn module(node: &str, state: State, health: Health) -> ModuleStatus {
    ModuleStatus {
        module: "db".into(),
        node: node.into(),
        state,
        health,
        reason: String::new(),
        in_sync: true,
        holder: Some("h1".into()),
        epoch: 1,
        generation: 7,
        vm: "running".into(),
        link: "up".into(),
        link_protection: "clear".into(),
        resync: None,
        verify: None,
        verified: None,
        proved_equal: None,
        notes: vec!["2 of 3 acceptors answer".into()],
        figures: FiguresStatus {
            reads: 5,
            writes: 3,
            flushes: 1,
            read_bytes: 20 << 10,
            written_bytes: 12 << 10,
            dirty_bytes: 0,
        },
        process: Some(4711),
        last_takeover: Some(TakeoverTimes { detected_ms: 1000, won_ms: 1100, start_called_ms: 1300, started_ms: 3300 }),
    }
}
