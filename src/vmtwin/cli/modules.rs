//! Commands to one module, `protect`, `unprotect`, `apply`; and the module's own process.
use super::{Outcome, Target, say};
use crate::api::client::{Daemon, failed};
use crate::api::types::{
    Action, ApplyRequest, CommandRequest, Done, Health, ModuleStatus, ProtectRequest, State, StatusAnswer,
    UnprotectRequest,
};
use crate::config::{Paths, durable};
use crate::node::processes::exit_file;
use crate::pidfile::PidFile;
use crate::{engine, host};
use clap::Args;
use std::path::Path;
use std::time::{Duration, Instant};
use tokio::time::{sleep, timeout};
use vmtwin_core::ids::ModuleName;

const ASK: Duration = Duration::from_secs(10);
const LOOK: Duration = Duration::from_millis(250);
/// Moving a VM's files to another file system may take this long.
const GATHER: Duration = Duration::from_secs(24 * 3600);
/// A module whose processes are all down this long after a start will not come up.
const HOPELESS: Duration = Duration::from_secs(5);
const VM_RUNS: Duration = Duration::from_secs(180);

#[derive(Debug, Args)]
pub struct Protect {
    /// The VM, as `virsh list --all` names it. It has to be shut off.
    vm: String,
    /// The node that gets the replica.
    #[arg(long, value_name = "NODE")]
    peer: String,
    /// Its directory, the same path on both nodes [default: /var/lib/libvirt/images/VM].
    #[arg(long, value_name = "DIR")]
    dir: Option<String>,
    /// The node that runs it by preference [default: this one].
    #[arg(long, value_name = "NODE")]
    primary: Option<String>,
    /// The hypervisor; for tests.
    #[arg(long, hide = true)]
    driver: Option<String>,
}

pub async fn act(daemon: &Daemon, action: Action, target: Target) -> Outcome {
    let limit = Duration::from_secs(target.wait);
    super::module(&target.vm)?;
    let begun = Instant::now();
    let request = CommandRequest {
        module: target.vm.clone(),
        action,
        node: target.node.clone(),
        here: false,
        no_wait: target.no_wait,
    };
    let asked = daemon.post::<Done>("/v1/command", &request, limit + ASK);
    let done = match timeout(limit.max(ASK), asked).await {
        Ok(done) => done?,
        Err(_) => return Err(still(&target.vm)),
    };
    tell(&done);
    if done.going_on {
        say(&format!("under way: `vmtwin status {} --watch` follows it", target.vm));
        return Ok(());
    }
    match action {
        Action::Start if !target.no_wait && target.node.is_none() => {
            let runs = wait_until_it_runs(daemon, &target.vm, limit.saturating_sub(begun.elapsed())).await?;
            say(&format!("{} runs on {} ({})", runs.module, runs.node, super::status::word(runs.state)));
        }
        Action::Start | Action::Prim | Action::Second => {
            say(&format!("{}: done; `vmtwin status {}` shows it", target.vm, target.vm))
        }
        Action::Stop => say(&format!("{} is stopped", target.vm)),
        Action::Restart => say(&format!("{} was restarted", target.vm)),
        Action::Swap => {
            let runs = wait_until_it_runs(daemon, &target.vm, limit.saturating_sub(begun.elapsed())).await?;
            say(&format!("{} runs on {} now", runs.module, runs.node));
        }
    }
    Ok(())
}

fn still(vm: &str) -> crate::api::types::ErrorBody {
    failed(5, format!("{vm}: still going on: `vmtwin status {vm}` tells how far it is"))
}

fn tell(done: &Done) {
    for note in &done.notes {
        say(note);
    }
}

/// The status of the node that runs the VM, as soon as one does.
async fn wait_until_it_runs(
    daemon: &Daemon,
    vm: &str,
    limit: Duration,
) -> Result<ModuleStatus, crate::api::types::ErrorBody> {
    let begun = Instant::now();
    let mut down_since = None;
    loop {
        let status: StatusAnswer = daemon.get(&format!("/v1/status?module={vm}"), ASK).await?;
        let runs = |m: &&ModuleStatus| matches!(m.state, State::Prim | State::Alone) && m.vm == "running";
        if let Some(runs) = status.modules.iter().find(runs) {
            return Ok(runs.clone());
        }
        let reasons = || {
            let all = status.modules.iter().filter(|m| !m.reason.is_empty());
            all.map(|m| format!("{vm} on {}: {}", m.node, m.reason)).collect::<Vec<_>>().join("\n")
        };
        let down = |m: &ModuleStatus| m.state == State::Stop && m.health == Health::Red;
        if status.modules.iter().all(down) {
            if down_since.get_or_insert_with(Instant::now).elapsed() > HOPELESS {
                return Err(failed(1, format!("{vm} did not start\n{}", reasons())));
            }
        } else {
            down_since = None;
        }
        if begun.elapsed() > limit {
            return Err(failed(5, format!("{vm} does not run yet\n{}", reasons())));
        }
        sleep(LOOK).await;
    }
}

pub async fn protect(daemon: &Daemon, given: Protect) -> Outcome {
    let vm = given.vm.clone();
    let request =
        ProtectRequest { vm: given.vm, peer: given.peer, dir: given.dir, primary: given.primary, driver: given.driver };
    let done: Done = daemon.post("/v1/protect", &request, GATHER).await?;
    tell(&done);
    let runs = wait_until_it_runs(daemon, &vm, VM_RUNS).await?;
    say(&format!(
        "{vm} is protected and runs on {}; `vmtwin status {vm} --watch` shows the first synchronisation",
        runs.node
    ));
    Ok(())
}

pub async fn unprotect(daemon: &Daemon, vm: String, restore_layout: bool) -> Outcome {
    let request = UnprotectRequest { module: vm.clone(), restore_layout };
    let done: Done = daemon.post("/v1/unprotect", &request, GATHER).await?;
    tell(&done);
    say(&format!("{vm} is no longer protected: `virsh start {vm}` starts it"));
    Ok(())
}

pub async fn apply(daemon: &Daemon, file: &Path, force: bool) -> Outcome {
    let xml = std::fs::read_to_string(file).map_err(|e| failed(2, format!("cannot read {}: {e}", file.display())))?;
    let request = ApplyRequest { file: file.display().to_string(), xml, force };
    let done: Done = daemon.post("/v1/apply", &request, Duration::from_secs(60)).await?;
    tell(&done);
    Ok(())
}

/// The body of `vmtwin module NAME`: one per name, and its exit code where the daemon finds it.
pub fn process(paths: &Paths, name: &ModuleName) -> u8 {
    let alone = match PidFile::take(&paths.module_pid(name)) {
        Ok(Some(alone)) => alone,
        Ok(None) => {
            host::warn(&format!("a process of module {name} runs already"));
            return 1;
        }
        Err(e) => {
            host::warn(&format!("module {name}: {}: {e}", paths.module_pid(name).display()));
            return 1;
        }
    };
    let code = engine::run(paths, name);
    if let Err(e) = durable::write(&exit_file(paths, name), code.to_string().as_bytes(), 0o600) {
        host::warn(&format!("module {name}: {e}"));
    }
    drop(alone);
    code
}
