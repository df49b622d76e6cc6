//! The command line: what can be said, and which file does it.
//!
//! - `cluster`  init, token, join, status
//! - `modules`  start, stop, restart, swap, prim, second, protect, unprotect, apply
//! - `status`   tables and JSON
//! - `log`      events of both nodes
//! - `verify`   are both replicas equal?
//!
//! Invariant: a failure is one sentence on stderr that says what to do, and an exit code that means something.
mod cluster;
mod log;
mod modules;
mod status;
#[cfg(test)]
mod tests;
mod verify;

use crate::api::client::{Daemon, failed};
use crate::api::types::{Action, ErrorBody};
use crate::config::Paths;
use crate::{keep, node, protect, witness};
use clap::{Args, Parser, Subcommand};
use std::io::Write;
use std::net::IpAddr;
use std::path::PathBuf;
use vmtwin_core::ids::ModuleName;

/// Virtual machines that survive the loss of their hypervisor.
#[derive(Debug, Parser)]
#[command(
    name = "vmtwin",
    version,
    max_term_width = 110,
    after_help = "Exit codes: 0 done, 1 failed, 2 usage, 3 its state forbids it (the sentence says why), 4 no contact with the daemon,\n5 still going on when the wait ended, 6 not authorised."
)]
pub struct Cli {
    /// All folders below this one; for tests.
    #[arg(long, hide = true, global = true)]
    root: Option<PathBuf>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run this node's daemon, in the foreground.
    #[command(after_help = "Example: systemctl start vmtwin      (or: vmtwin node)")]
    Node,
    /// Run a witness, in the foreground.
    #[command(after_help = "Example: vmtwin witness --state /var/lib/vmtwin-witness")]
    Witness {
        /// Folder of its certificate and its votes, as given to `cluster join`.
        #[arg(long, value_name = "DIR")]
        state: PathBuf,
        /// Listen here instead of at its address in cluster.xml.
        #[arg(long, value_name = "IP")]
        listen: Option<IpAddr>,
    },
    /// This node's votes and the listener of its links; started by the daemon.
    #[command(hide = true)]
    Keep,
    /// The process of one module; started by the daemon.
    #[command(hide = true)]
    Module {
        /// Its name.
        name: ModuleName,
    },
    /// Make a cluster, let hosts in, see how it stands.
    #[command(subcommand)]
    Cluster(cluster::Cluster),
    /// Check a cluster.xml or userconfig.xml and give it to all nodes that it concerns.
    #[command(
        after_help = "Example: cp /etc/vmtwin/modules/db/userconfig.xml /root/db.xml; vi /root/db.xml; vmtwin apply /root/db.xml"
    )]
    Apply {
        /// The file.
        file: PathBuf,
        /// Also where a node is away: it gets the file with the next `apply`.
        #[arg(long)]
        force: bool,
    },
    /// Protect a VM of this host: gather its files into one directory, mirror it, start it.
    #[command(after_help = "Example: virsh shutdown db; vmtwin protect db --peer h2")]
    Protect(modules::Protect),
    /// Give a VM back: stopped, plain files, startable by virsh.
    #[command(after_help = "Example: vmtwin stop db; vmtwin unprotect db --restore-layout")]
    Unprotect {
        /// The VM.
        vm: String,
        /// Put its files back to where they were before `protect`.
        #[arg(long)]
        restore_layout: bool,
    },
    /// How modules stand, on all nodes.
    #[command(after_help = "Examples: vmtwin status; vmtwin status db --watch; vmtwin status --json")]
    Status(status::Status),
    /// Start a module on both nodes; the VM starts on the one that may run it.
    #[command(after_help = "Example: vmtwin start db")]
    Start(Target),
    /// Stop a VM gracefully, and its module on both nodes; never a failover.
    #[command(
        after_help = "Examples: vmtwin stop db; vmtwin stop db --node h2      (h2 only: the VM is swapped away first)"
    )]
    Stop(Target),
    /// Restart a VM, in place.
    #[command(after_help = "Example: vmtwin restart db")]
    Restart(Target),
    /// Bring a VM to the other node.
    #[command(after_help = "Example: vmtwin swap db")]
    Swap(Target),
    /// Start a VM on this node, if the record allows it.
    #[command(after_help = "Example: vmtwin prim db")]
    Prim(Target),
    /// Be the replica on this node.
    #[command(after_help = "Example: vmtwin second db")]
    Second(Target),
    /// Compare both replicas of a VM by hash, while it runs. Exit code 0: equal; 1: they differ (each file and range is named).
    #[command(
        after_help = "Examples: vmtwin verify db; vmtwin verify db --rate 50; vmtwin verify db --repair      (the copy under the running VM wins)"
    )]
    Verify(verify::Verify),
    /// Events of a module, of both nodes.
    #[command(after_help = "Examples: vmtwin log db; vmtwin log db -f")]
    Log(log::Log),
    /// libvirt's question before it starts a VM.
    #[command(hide = true)]
    Hook {
        /// As libvirt gives them.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
}

/// A command's module, and how long it is waited for.
#[derive(Debug, Args)]
struct Target {
    /// The VM.
    vm: String,
    /// On this node only.
    #[arg(long, value_name = "NODE")]
    node: Option<String>,
    /// Wait this long for its end (exit code 5 when it still goes on).
    #[arg(long, value_name = "SECONDS", default_value_t = 900, conflicts_with = "no_wait")]
    wait: u64,
    /// Do not wait: return as soon as nothing forbids it.
    #[arg(long)]
    no_wait: bool,
}

/// What a command came to.
type Outcome = Result<(), ErrorBody>;

/// Does what the command line says; gives the exit code.
#[must_use]
pub fn run(cli: Cli) -> u8 {
    let paths = cli.root.as_deref().map_or_else(Paths::system, Paths::under);
    let outcome = match cli.command {
        Command::Hook { arguments } => {
            return protect::hook::hook(&paths, &arguments, std::io::stdin(), &mut std::io::stderr());
        }
        Command::Module { name } => return modules::process(&paths, &name),
        Command::Node => serve(node::run(paths)),
        Command::Keep => serve(keep::run(paths)),
        Command::Witness { state, listen } => serve(witness::run(Paths::under(&state), listen)),
        command => match tokio::runtime::Builder::new_current_thread().enable_all().build() {
            Ok(runtime) => runtime.block_on(ask(&paths, command)),
            Err(e) => Err(failed(1, e.to_string())),
        },
    };
    match outcome {
        Ok(()) => 0,
        Err(error) => {
            // A closed stderr is no reason for another code.
            let _ = writeln!(std::io::stderr(), "vmtwin: {}", error.error);
            error.code
        }
    }
}

/// A process that runs until it is killed.
fn serve(body: impl Future<Output = std::io::Result<()>>) -> Outcome {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    runtime.and_then(|runtime| runtime.block_on(body)).map_err(|e| failed(1, e.to_string()))
}

async fn ask(paths: &Paths, command: Command) -> Outcome {
    let daemon = Daemon::Local(paths.clone());
    match command {
        Command::Cluster(command) => cluster::run(paths, &daemon, command).await,
        Command::Apply { file, force } => modules::apply(&daemon, &file, force).await,
        Command::Protect(protect) => modules::protect(&daemon, protect).await,
        Command::Unprotect { vm, restore_layout } => modules::unprotect(&daemon, vm, restore_layout).await,
        Command::Status(given) => status::run(&daemon, &given).await,
        Command::Verify(given) => verify::run(&daemon, &given).await,
        Command::Log(given) => log::run(&daemon, &given).await,
        Command::Start(target) => modules::act(&daemon, Action::Start, target).await,
        Command::Stop(target) => modules::act(&daemon, Action::Stop, target).await,
        Command::Restart(target) => modules::act(&daemon, Action::Restart, target).await,
        Command::Swap(target) => modules::act(&daemon, Action::Swap, target).await,
        Command::Prim(target) => modules::act(&daemon, Action::Prim, target).await,
        Command::Second(target) => modules::act(&daemon, Action::Second, target).await,
        Command::Node | Command::Witness { .. } | Command::Keep | Command::Module { .. } | Command::Hook { .. } => {
            unreachable!("done by `run`")
        }
    }
}

/// A name that can be part of a question.
fn module(vm: &str) -> Result<ModuleName, ErrorBody> {
    ModuleName::new(vm).map_err(|e| failed(2, e.to_string()))
}

/// Writes to stdout. A reader that went away (`| head`) ends the program quietly.
fn say(text: &str) {
    if writeln!(std::io::stdout(), "{text}").is_err() {
        std::process::exit(0);
    }
}
