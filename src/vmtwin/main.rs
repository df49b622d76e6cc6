//! `vmtwin`: subcommands only; `cli` has them.
#![forbid(unsafe_code)]
use clap::Parser;
use std::process::ExitCode;
use vmtwin::cli::{Cli, run};

fn main() -> ExitCode {
    ExitCode::from(run(Cli::parse()))
}
