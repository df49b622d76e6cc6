//! Where everything lies. The one place that joins a name to a path; names were checked when they became types.
use std::path::{Path, PathBuf};
use vmtwin_core::ids::ModuleName;

/// Port of the daemon's API, node to node.
pub const PORT_API: u16 = 7720;
/// Port of `keep`: peer links and acceptors.
pub const PORT_LINK: u16 = 7721;
/// Port of a witness.
pub const PORT_WITNESS: u16 = 7722;

/// The four folders of one host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Paths {
    /// Configuration: /etc/vmtwin.
    pub etc: PathBuf,
    /// State that outlives a boot: /var/lib/vmtwin.
    pub lib: PathBuf,
    /// Sockets, pid files, backing mounts: /run/vmtwin.
    pub run: PathBuf,
    /// Event logs: /var/log/vmtwin.
    pub log: PathBuf,
    root: Option<PathBuf>,
}

impl Paths {
    /// The fixed names of a real host.
    #[must_use]
    pub fn system() -> Self {
        let [etc, lib, run, log] =
            ["/etc/vmtwin", "/var/lib/vmtwin", "/run/vmtwin", "/var/log/vmtwin"].map(PathBuf::from);
        Self { etc, lib, run, log, root: None }
    }
    /// All four under one folder, for tests. Keep it short: a socket's path has 107 bytes.
    #[must_use]
    pub fn under(root: &Path) -> Self {
        let [etc, lib, run, log] = ["etc", "lib", "run", "log"].map(|folder| root.join(folder));
        Self { etc, lib, run, log, root: Some(root.to_owned()) }
    }
    /// The folder given to `under`: child processes are started with `--root` and it.
    #[must_use]
    pub fn root(&self) -> Option<&Path> {
        self.root.as_deref()
    }
    /// Makes the four folders.
    ///
    /// # Errors
    /// As `mkdir` says.
    pub fn create(&self) -> std::io::Result<()> {
        [&self.etc, &self.lib, &self.run, &self.log].into_iter().try_for_each(std::fs::create_dir_all)
    }

    /// The cluster's configuration.
    #[must_use]
    pub fn cluster_xml(&self) -> PathBuf {
        self.etc.join("cluster.xml")
    }
    /// Certificates and keys.
    #[must_use]
    pub fn tls(&self) -> PathBuf {
        self.etc.join("tls")
    }
    /// Folder of all modules' configurations.
    #[must_use]
    pub fn modules(&self) -> PathBuf {
        self.etc.join("modules")
    }
    /// One module's configuration.
    #[must_use]
    pub fn userconfig(&self, module: &ModuleName) -> PathBuf {
        self.modules().join(module.as_str()).join("userconfig.xml")
    }
    /// One module's record, log, map, boot id.
    #[must_use]
    pub fn module_lib(&self, module: &ModuleName) -> PathBuf {
        self.lib.join(module.as_str())
    }
    /// Exists while the module is wanted started on this node.
    #[must_use]
    pub fn wanted(&self, module: &ModuleName) -> PathBuf {
        self.module_lib(module).join("wanted")
    }
    /// State of this node's acceptors, one file per module id.
    #[must_use]
    pub fn acceptors(&self) -> PathBuf {
        self.lib.join(".acceptors")
    }
    /// Join tokens that were given and not used yet.
    #[must_use]
    pub fn tokens(&self) -> PathBuf {
        self.lib.join(".tokens")
    }
    /// The module process's control socket.
    #[must_use]
    pub fn module_socket(&self, module: &ModuleName) -> PathBuf {
        self.run.join(format!("{module}.sock"))
    }
    /// Where `keep` hands a peer's connection to the module process.
    #[must_use]
    pub fn module_link(&self, module: &ModuleName) -> PathBuf {
        self.run.join(format!("{module}.link"))
    }
    /// Locked by the module process while it lives; holds its process id.
    #[must_use]
    pub fn module_pid(&self, module: &ModuleName) -> PathBuf {
        self.run.join(format!("{module}.pid"))
    }
    /// The plain directory under the mount (root only), for diagnosis.
    #[must_use]
    pub fn backing(&self, module: &ModuleName) -> PathBuf {
        self.run.join("backing").join(module.as_str())
    }
    /// Where the guardian mounts the kernel's list of FUSE connections for a moment.
    #[must_use]
    pub fn connections(&self, module: &ModuleName) -> PathBuf {
        self.run.join(format!("{module}.connections"))
    }
    /// The module's event log.
    #[must_use]
    pub fn module_log(&self, module: &ModuleName) -> PathBuf {
        self.log.join(format!("{module}.jsonl"))
    }
    /// Acceptor requests of this node's own module processes.
    #[must_use]
    pub fn keep_socket(&self) -> PathBuf {
        self.run.join("keep.sock")
    }
    /// Locked by `keep` while it lives; holds its process id.
    #[must_use]
    pub fn keep_pid(&self) -> PathBuf {
        self.run.join("keep.pid")
    }
    /// The daemon's API for the CLI.
    #[must_use]
    pub fn node_socket(&self) -> PathBuf {
        self.run.join("node.sock")
    }
    /// Locked by the daemon while it lives; holds its process id.
    #[must_use]
    pub fn node_pid(&self) -> PathBuf {
        self.run.join("node.pid")
    }
    /// All modules that are configured here, in order of their names.
    ///
    /// # Errors
    /// Where the folder cannot be read. A folder that is not there has none.
    pub fn list_modules(&self) -> std::io::Result<Vec<ModuleName>> {
        let entries = match std::fs::read_dir(self.modules()) {
            Ok(entries) => entries,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(e) => return Err(e),
        };
        let mut all = Vec::new();
        for entry in entries {
            if let Some(name) = entry?.file_name().to_str().and_then(|name| ModuleName::new(name).ok())
                && self.userconfig(&name).exists()
            {
                all.push(name);
            }
        }
        all.sort();
        Ok(all)
    }
}
