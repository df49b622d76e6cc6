//! libvirt's hook: may this VM start here?
//!
//! Decides only to refuse, and only for VMs in vmtwin's list; for those it fails closed. It never calls libvirt, which waits
//! for it with the VM's lock held. An error at `reconnect` would kill a running VM: only what begins a VM's life is looked at.
use super::journal;
use crate::config::{ModuleConfig, Paths, durable};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;
use vmtwin_core::ids::ModuleName;
use vmtwin_hypervisor::domain;

/// libvirt's folder of hooks.
pub const HOOKS: &str = "/etc/libvirt/hooks";
/// A module process that does not answer within this time does not allow a start.
const ANSWER: Duration = Duration::from_secs(2);
/// Longest answer that is read, in bytes.
const ANSWER_BYTES_MAX: u64 = 65_536;
const SCRIPT: &str = include_str!("../../../vmmodules/kvm/90-vmtwin");

/// The body of `vmtwin hook NAME OPERATION SUB-OPERATION [EXTRA]`, the domain's XML on `stdin`: gives the exit code; a
/// refusal's sentence goes to `stderr`, which libvirt shows to the user.
pub fn hook(paths: &Paths, arguments: &[String], stdin: impl Read, stderr: &mut impl Write) -> u8 {
    let [vm, operation, ..] = arguments else { return 0 };
    if !matches!(operation.as_str(), "prepare" | "start" | "restore" | "migrate") {
        return 0;
    }
    let mut xml = String::new();
    // XML that cannot be read names no module; the name alone decides then.
    let _ = stdin.take(domain::XML_BYTES_MAX as u64).read_to_string(&mut xml);
    match refusal(paths, vm, operation, &xml) {
        None => 0,
        Some(sentence) => {
            // With nobody to tell it to, the refusal stands all the same.
            let _ = writeln!(stderr, "vmtwin: {sentence}");
            1
        }
    }
}

fn refusal(paths: &Paths, vm: &str, operation: &str, xml: &str) -> Option<String> {
    if let Some(module) = being_moved(paths, vm) {
        return Some(format!(
            "VM {vm} is being moved into or out of module {module}: run the vmtwin command again to finish or undo it"
        ));
    }
    let module = match protected_by(paths, vm, xml) {
        Ok(module) => module?,
        Err(error) => return Some(format!("whether VM {vm} is protected cannot be seen: {error}")),
    };
    if operation == "restore" {
        let what = "to resume saved memory over newer disks would destroy its file systems";
        return Some(format!("VM {vm} is protected by module {module}: {what}; use `vmtwin start {module}`"));
    }
    match ask(&paths.module_socket(&module)) {
        Ok(None) => None,
        Ok(Some(why)) => Some(format!("VM {vm} may not start here: {why}")),
        Err(_) => Some(format!(
            "VM {vm} is protected by module {module}, which is not running here: use `vmtwin start {module}`"
        )),
    }
}

/// The module whose `protect` or `unprotect` has this VM's files in hand.
fn being_moved(paths: &Paths, vm: &str) -> Option<String> {
    let folders = std::fs::read_dir(&paths.lib).ok()?;
    let modules = folders.flatten().filter_map(|f| ModuleName::new(f.file_name().to_str()?).ok());
    modules
        .filter(|module| match journal::pending(paths, module) {
            Ok(Some(pending)) => pending.plan.vm == vm && pending.phase != journal::Phase::Done,
            Ok(None) => false,
            // A journal that cannot be read: its module is named like its VM, unless told otherwise.
            Err(_) => module.as_str() == vm,
        })
        .map(|module| module.to_string())
        .next()
}

/// The module that has this VM, by name or by our mark in its definition.
fn protected_by(paths: &Paths, vm: &str, xml: &str) -> io::Result<Option<ModuleName>> {
    let mark = domain::read(xml).ok().and_then(|domain| domain.module);
    Ok(paths.list_modules()?.into_iter().find(|module| {
        mark.as_deref() == Some(module.as_str())
            || match ModuleConfig::load(paths, module) {
                Ok(config) => config.vm == vm,
                Err(_) => module.as_str() == vm,
            }
    }))
}

/// Asks the module process; none: it may start.
fn ask(socket: &Path) -> io::Result<Option<String>> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(ANSWER))?;
    stream.set_write_timeout(Some(ANSWER))?;
    stream.write_all(b"{\"do\":\"may-start\"}\n")?;
    let mut line = String::new();
    BufReader::new(stream.take(ANSWER_BYTES_MAX)).read_line(&mut line)?;
    let answer: Value = serde_json::from_str(&line).map_err(io::Error::from)?;
    if answer.get("ok").and_then(Value::as_bool) == Some(true) {
        return Ok(None);
    }
    let why = answer.get("error").and_then(Value::as_str).unwrap_or("its module process does not allow it");
    Ok(Some(why.to_owned()))
}

/// The script's text, for this binary and these folders.
fn script(paths: &Paths, binary: &Path) -> String {
    let root = paths.root().map_or(String::new(), |root| format!("--root \"{}\"", root.display()));
    SCRIPT
        .replace("@VMTWIN@", &binary.display().to_string())
        .replace("@ETC@", &paths.etc.display().to_string())
        .replace("@ROOT@ ", &if root.is_empty() { root } else { root + " " })
}

/// Puts the hook in place below `hooks` (on a real host [`HOOKS`]) and has libvirt notice it: it looks for hooks only at its
/// start and at SIGHUP. True: it was not there, or another one.
///
/// # Errors
/// Where the script cannot be written.
pub fn install_hook(paths: &Paths, hooks: &Path) -> io::Result<bool> {
    let folder = hooks.join("qemu.d");
    let file = folder.join("90-vmtwin");
    // After an upgrade the kernel shows the old binary so; the new one lies at its name.
    let binary = std::env::current_exe()?.to_string_lossy().trim_end_matches(" (deleted)").to_owned();
    let text = script(paths, Path::new(&binary));
    if std::fs::read_to_string(&file).is_ok_and(|old| old == text) {
        return Ok(false);
    }
    std::fs::create_dir_all(&folder)?;
    durable::write(&file, text.as_bytes(), 0o755)?;
    // Another folder is a test's: the host's own daemon does not look there.
    let daemons: &[&str] = if hooks == Path::new(HOOKS) { &["libvirtd", "virtqemud"] } else { &[] };
    for daemon in daemons {
        for pid_file in [format!("/run/{daemon}.pid"), format!("/run/libvirt/{daemon}.pid")] {
            reload(daemon, &PathBuf::from(pid_file));
        }
    }
    Ok(true)
}

/// SIGHUP to the daemon, if the pid is still its own: one that is not running reads the hook when it starts.
fn reload(daemon: &str, pid_file: &Path) {
    let pid = std::fs::read_to_string(pid_file).ok().and_then(|text| text.trim().parse().ok()).and_then(Pid::from_raw);
    let Some(pid) = pid else { return };
    let name = std::fs::read_to_string(format!("/proc/{}/comm", pid.as_raw_nonzero()));
    if name.is_ok_and(|name| name.trim() == daemon) {
        let _ = kill_process(pid, Signal::HUP);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;
    use std::process::Command;
    use vmtwin_core::ids::{ModuleId, NodeName};

    struct Host {
        _folder: tempfile::TempDir,
        paths: Paths,
    }

    impl Host {
        /// One that protects the VM `vm-db` by the module `db`.
        fn new() -> Self {
            let folder = tempfile::tempdir().unwrap();
            let paths = Paths::under(folder.path());
            paths.create().unwrap();
            let node = |name: &str| NodeName::new(name).unwrap();
            let module = ModuleName::new("db").unwrap();
            let mut config = ModuleConfig::new(module, ModuleId(7), node("h1"), node("h2"), "/images/db".into());
            config.vm = "vm-db".to_owned();
            config.store(&paths).unwrap();
            Self { _folder: folder, paths }
        }

        /// Asks as libvirt does: exit code and what the user sees.
        fn asks(&self, vm: &str, operation: &str, xml: &str) -> (u8, String) {
            let arguments = [vm, operation, "begin", "-"].map(str::to_owned);
            let mut stderr = Vec::new();
            let code = hook(&self.paths, &arguments, xml.as_bytes(), &mut stderr);
            (code, String::from_utf8(stderr).unwrap())
        }

        /// A module process that gives this answer once.
        fn answers(&self, answer: &'static str) -> std::thread::JoinHandle<String> {
            let listener = UnixListener::bind(self.paths.module_socket(&ModuleName::new("db").unwrap())).unwrap();
            std::thread::spawn(move || {
                let (mut stream, _) = listener.accept().unwrap();
                let mut line = String::new();
                BufReader::new(stream.try_clone().unwrap()).read_line(&mut line).unwrap();
                stream.write_all(answer.as_bytes()).unwrap();
                line
            })
        }
    }

    const XML: &str = "<domain><name>vm-db</name></domain>";

    #[test]
    fn only_the_beginning_of_a_protected_vm_is_looked_at() {
        let host = Host::new();
        for operation in ["reconnect", "started", "stopped", "release", "attach", "unheard-of"] {
            assert_eq!(host.asks("vm-db", operation, XML), (0, String::new()), "{operation}");
        }
        for operation in ["prepare", "start", "restore", "migrate"] {
            assert_eq!(host.asks("other", operation, "<domain><name>other</name></domain>").0, 0, "{operation}");
            let (code, sentence) = host.asks("vm-db", operation, XML);
            assert!(code == 1 && sentence.contains("vmtwin start db"), "{operation}: {sentence}");
        }
        assert_eq!(hook(&host.paths, &[], XML.as_bytes(), &mut Vec::new()), 0);
    }

    #[test]
    fn the_module_process_decides_and_its_reason_is_shown() {
        let host = Host::new();
        let asked = host.answers("{\"ok\":true}\n");
        assert_eq!(host.asks("vm-db", "prepare", XML), (0, String::new()));
        assert_eq!(asked.join().unwrap(), "{\"do\":\"may-start\"}\n");

        let host = Host::new();
        let asked = host.answers("{\"ok\":false,\"error\":\"h2 holds it\"}\n");
        assert_eq!(host.asks("vm-db", "start", XML), (1, "vmtwin: VM vm-db may not start here: h2 holds it\n".into()));
        asked.join().unwrap();

        let host = Host::new();
        let asked = host.answers("");
        assert_eq!(host.asks("vm-db", "start", XML).0, 1, "no answer is no permission");
        asked.join().unwrap();
    }

    #[test]
    fn a_protected_vm_is_known_by_its_mark_and_with_a_broken_configuration() {
        let host = Host::new();
        let marked = format!("<domain><name>renamed</name><metadata>{}</metadata></domain>", domain::metadata("db"));
        assert_eq!(host.asks("renamed", "prepare", &marked).0, 1);
        // A mark of a module that is not here any more says nothing.
        assert_eq!(host.asks("renamed", "prepare", &marked.replace("\"db\"", "\"gone\"")).0, 0);
        let config = host.paths.userconfig(&ModuleName::new("db").unwrap());
        std::fs::write(&config, "<module").unwrap();
        assert_eq!(host.asks("db", "prepare", "").0, 1, "closed where the list cannot be read");
        assert_eq!(host.asks("other", "prepare", "").0, 0);
    }

    #[test]
    fn the_script_asks_this_binary_and_lets_everything_else_pass() {
        let host = Host::new();
        let hooks = host.paths.etc.join("hooks");
        assert!(install_hook(&host.paths, &hooks).unwrap());
        assert!(!install_hook(&host.paths, &hooks).unwrap(), "there already");
        let file = hooks.join("qemu.d/90-vmtwin");
        let written = std::fs::read_to_string(&file).unwrap();
        assert!(!written.contains('@') || written.contains("$@"), "{written}");
        // With a stand-in for the binary: what it is called with, and what its exit code becomes.
        let stand_in = host.paths.run.join("stand-in");
        std::fs::write(&stand_in, "#!/bin/sh\necho \"$*\"\ncat\nexit 7\n").unwrap();
        Command::new("chmod").arg("+x").arg(&stand_in).status().unwrap();
        let script = host.paths.run.join("hook.sh");
        let run = |arguments: &[&str]| {
            let run = Command::new("/bin/sh").arg(&script).args(arguments).output().unwrap();
            (run.status.code(), String::from_utf8_lossy(&run.stdout).into_owned(), run.stderr)
        };
        std::fs::write(&script, super::script(&host.paths, &stand_in)).unwrap();
        let root = host.paths.root().unwrap().display().to_string();
        let words = format!("--root {root} hook vm-db prepare begin -\n");
        assert_eq!(run(&["vm-db", "prepare", "begin", "-"]), (Some(7), words, vec![]));
        assert_eq!(run(&["vm-db", "reconnect", "begin", "-"]), (Some(0), String::new(), vec![]));
        // Without the binary: closed for the VMs in the list.
        std::fs::write(&script, super::script(&host.paths, Path::new("/nonexistent/vmtwin"))).unwrap();
        let (code, _, stderr) = run(&["vm-db", "prepare", "begin", "-"]);
        assert!(code == Some(1) && !stderr.is_empty());
        assert_eq!(run(&["other", "prepare", "begin", "-"]), (Some(0), String::new(), vec![]));
    }

    #[test]
    fn a_vm_whose_files_are_being_moved_does_not_start() {
        let host = Host::new();
        let module = ModuleName::new("web").unwrap();
        std::fs::create_dir_all(host.paths.module_lib(&module)).unwrap();
        std::fs::write(host.paths.module_lib(&module).join("protect.journal"), "torn").unwrap();
        assert_eq!(host.asks("web", "prepare", "").0, 1);
        assert_eq!(host.asks("other", "prepare", "").0, 0);
    }
}
