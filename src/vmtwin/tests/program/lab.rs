//! Hosts for tests of the whole program: folders of their own, loopback addresses of their own, real processes.
//!
//! Whatever a test started ends with it, also when it panics: by process id, mounts last.
use std::fs::File;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};
use vmtwin::config::Paths;
use vmtwin::host::random;

/// Everything that waits gives up after this.
pub const LONG: Duration = Duration::from_secs(120);

/// One host.
pub struct Host {
    /// Node or witness.
    pub name: &'static str,
    /// Its folders.
    pub paths: Paths,
    /// Its address.
    pub address: Ipv4Addr,
    root: PathBuf,
    /// Where VMs' directories lie for its processes: the same path on all hosts, each with files of its own.
    images: PathBuf,
    main: Option<Child>,
}

/// A command's end.
#[derive(Debug)]
pub struct Ended {
    /// Exit code.
    pub code: i32,
    /// What it printed.
    pub out: String,
    /// What it complained.
    pub err: String,
}

impl Host {
    /// Below `folder`, with an address that no other test has.
    pub fn new(folder: &Path, name: &'static str) -> Self {
        let root = folder.join(name);
        let paths = Paths::under(&root);
        paths.create().unwrap();
        let [a, b, c, ..] = random().to_le_bytes();
        let address = Ipv4Addr::new(127, 1 + a % 250, b, 1 + c % 250);
        let images = folder.join("images");
        for folder in [&images, &root.join("images")] {
            std::fs::create_dir_all(folder).unwrap();
        }
        Self { name, paths, address, root, images, main: None }
    }

    /// A VM's directory, as the host's processes name it.
    pub fn dir(&self, vm: &str) -> PathBuf {
        self.images.join(vm)
    }

    /// The same directory as it lies on the disk, below every mount.
    pub fn disk(&self, vm: &str) -> PathBuf {
        self.root.join("images").join(vm)
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vmtwin"));
        command.arg("--root").arg(&self.root).args(arguments).stdin(Stdio::null());
        command
    }

    /// Runs a command to its end.
    pub fn run(&self, line: &str) -> Ended {
        let words: Vec<&str> = line.split(' ').collect();
        let Output { status, stdout, stderr } = self.command(&words).output().unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        Ended { code: status.code().unwrap_or(-1), out: text(stdout), err: text(stderr) }
    }

    /// Runs a command that has to go well; gives what it printed.
    pub fn ok(&self, line: &str) -> String {
        let ended = self.run(line);
        assert_eq!(ended.code, 0, "{} on {}: {ended:?}\n{}", line, self.name, self.output());
        ended.out
    }

    /// Runs a command that has to be refused, with this code and this word in its one sentence.
    pub fn refused(&self, line: &str, code: i32, word: &str) {
        let ended = self.run(line);
        let clear = ended.err.starts_with("vmtwin: ") && ended.err.contains(word) && ended.err.lines().count() <= 6;
        assert!(ended.code == code && clear, "{line} on {}: {ended:?}", self.name);
    }

    /// Starts its long-running process.
    pub fn start(&mut self, line: &str) {
        assert!(self.main.is_none());
        let output = File::options().create(true).append(true).open(self.root.join("output")).unwrap();
        let words: Vec<&str> = line.split(' ').collect();
        let inner = self.command(&words);
        // A mount namespace of its own: what it mounts goes with its last process.
        let script = r#"mount --bind "$1" "$2"; shift 2; exec "$@""#;
        let mut command = Command::new("unshare");
        command.args(["--mount", "--propagation", "private", "sh", "-ec", script, "sh"]);
        command.arg(self.root.join("images")).arg(&self.images).arg(inner.get_program()).args(inner.get_args());
        command.stdin(Stdio::null()).stdout(output.try_clone().unwrap()).stderr(output);
        self.main = Some(command.spawn().unwrap());
    }

    /// Runs a shell line among its processes, as a guest or an admin would; gives code and output.
    pub fn shell(&self, line: &str) -> Ended {
        let main = self.main.as_ref().expect("it runs").id().to_string();
        let output = Command::new("nsenter").args(["-t", &main, "-m", "sh", "-c", line]).output().unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Ended { code: output.status.code().unwrap_or(-1), out: text(&output.stdout), err: text(&output.stderr) }
    }

    /// Starts the witness whose state is this host's folder.
    pub fn start_witness(&mut self) {
        let line = format!("witness --state {}", self.root.display());
        self.start(&line);
    }

    /// Kills it without warning.
    pub fn kill(&mut self) {
        if let Some(mut main) = self.main.take() {
            main.kill().unwrap();
            main.wait().unwrap();
        }
    }

    /// What its processes wrote.
    pub fn output(&self) -> String {
        let mut all = std::fs::read_to_string(self.root.join("output")).unwrap_or_default();
        for entry in std::fs::read_dir(&self.paths.log).into_iter().flatten().flatten() {
            let text = std::fs::read_to_string(entry.path()).unwrap_or_default();
            all += &format!("--- {} on {}\n{text}", entry.path().display(), self.name);
        }
        all
    }

    /// The id in a pid file, as soon as it is there and locked.
    pub fn pid(&self, file: &Path) -> u32 {
        until(&format!("a process for {}", file.display()), || {
            vmtwin::pidfile::find(file).unwrap().map(|found| found.pid)
        })
    }

    /// All of its processes at once, as a power cut does.
    pub fn end(&mut self) {
        // The daemon first: it would start the others again.
        if let Some(mut main) = self.main.take() {
            let _ = main.kill();
            let _ = main.wait();
        }
        let files = std::fs::read_dir(&self.paths.run).into_iter().flatten().flatten().map(|entry| entry.path());
        let files: Vec<_> = files.filter(|path| path.extension().is_some_and(|ending| ending == "pid")).collect();
        for file in &files {
            if let Ok(Some(found)) = vmtwin::pidfile::find(file) {
                kill(found.pid);
            }
        }
        let begun = Instant::now();
        while files.iter().any(|f| matches!(vmtwin::pidfile::find(f), Ok(Some(_)))) && begun.elapsed() < LONG {
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.end();
        if std::thread::panicking() {
            eprintln!("=== {}\n{}", self.name, self.output());
        }
    }
}

/// SIGKILL.
pub fn kill(pid: u32) {
    let pid = rustix::process::Pid::from_raw(pid.cast_signed()).unwrap();
    let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
}

/// Looks again and again.
pub fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let begun = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(begun.elapsed() < LONG, "in vain: {what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Nodes h1 and h2 and the witness w1, running, in one cluster.
pub fn cluster(folder: &Path) -> [Host; 3] {
    let [mut h1, mut h2, mut w1] = ["h1", "h2", "w1"].map(|name| Host::new(folder, name));
    h1.start("node");
    h2.start("node");
    until("the daemons to answer", || (h1.run("status").code == 0 && h2.run("status").code == 0).then_some(()));
    h1.ok(&format!("cluster init --name lab --node h1 --address {} --witness w1={}", h1.address, w1.address));
    let token = h1.ok("cluster token");
    let join = format!("cluster join {} --node h2 --address {}", token.trim(), h2.address);
    until("h2 to join", || match h2.run(&join) {
        Ended { code: 0, .. } => Some(()),
        // Its listener follows cluster.xml; the token was not used.
        Ended { code: 4, .. } => None,
        other => panic!("{other:?}"),
    });
    let (token, state) = (h1.ok("cluster token"), w1.root.display().to_string());
    w1.ok(&format!("cluster join {} --witness w1 --state {state}", token.trim()));
    w1.start_witness();
    until("all members to answer", || {
        let all = [&h1, &h2].map(|host| host.run("cluster status").out);
        all.iter().all(|text| text.matches("answers").count() == 3 && !text.contains(": ")).then_some(())
    });
    [h1, h2, w1]
}
