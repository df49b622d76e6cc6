//! userconfig.xml: one protected VM.
//!
//! Invariant of a `ModuleConfig`: its nodes differ, its directory is an absolute plain path, its times fit the lease.
use super::cluster::Cluster;
use super::xml::{self, ConfigError, Source};
use super::{Paths, durable};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::path::{Component, Path, PathBuf};
use std::time::Duration;
use vmtwin_core::ids::{ModuleId, ModuleName, NodeName};
use vmtwin_core::limits::{LEASE_MS, SLOW_PEER_MS};

/// One module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModuleConfig {
    /// Its name; names its files, sockets and commands.
    pub name: ModuleName,
    /// Random; made by `protect`.
    pub id: ModuleId,
    /// Rises with each `apply`.
    pub version: u64,
    /// Name of the VM at its hypervisor.
    pub vm: String,
    /// Which hypervisor.
    pub driver: Driver,
    /// What a power-off from inside the guest means.
    pub on_guest_shutdown: OnGuestShutdown,
    /// A graceful stop may take this long; then the VM is destroyed.
    pub stop_timeout: Duration,
    /// Node that runs it by preference.
    pub primary: NodeName,
    /// The other one.
    pub secondary: NodeName,
    /// The VM's directory, the same path on both.
    pub dir: PathBuf,
    /// A peer that holds up a write this long is dropped.
    pub slow_peer: Duration,
}

/// Which hypervisor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Driver {
    /// libvirt on this host.
    Libvirt,
    /// A pretended VM, for tests.
    Fake,
}

/// What a power-off from inside the guest means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnGuestShutdown {
    /// The module stops on both nodes.
    Stop,
    /// The VM is started again.
    Restart,
}

impl fmt::Display for Driver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Libvirt => "libvirt",
            Self::Fake => "fake",
        })
    }
}

impl std::str::FromStr for Driver {
    type Err = &'static str;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "libvirt" => Ok(Self::Libvirt),
            "fake" => Ok(Self::Fake),
            _ => Err("\"libvirt\", or leave it out"),
        }
    }
}

impl std::str::FromStr for OnGuestShutdown {
    type Err = &'static str;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "stop" => Ok(Self::Stop),
            "restart" => Ok(Self::Restart),
            _ => Err("\"stop\" or \"restart\""),
        }
    }
}

impl ModuleConfig {
    /// A module with default settings.
    #[must_use]
    pub fn new(name: ModuleName, id: ModuleId, primary: NodeName, secondary: NodeName, dir: PathBuf) -> Self {
        Self {
            vm: name.to_string(),
            name,
            id,
            version: 1,
            driver: Driver::Libvirt,
            on_guest_shutdown: OnGuestShutdown::Stop,
            stop_timeout: Duration::from_secs(STOP_SECONDS),
            primary,
            secondary,
            dir,
            slow_peer: Duration::from_millis(SLOW_PEER_MS),
        }
    }

    /// Reads a module's userconfig.xml on this host.
    ///
    /// # Errors
    /// `Read` where there is none, `Wrong` with the place.
    pub fn load(paths: &Paths, name: &ModuleName) -> Result<Self, ConfigError> {
        let file = paths.userconfig(name);
        let text = xml::read(&file)?;
        let config = Self::parse(&text, &file)?;
        if config.name != *name {
            let (source, _) = Source::parse::<RawModule>(&text, &file, "module")?;
            let what = format!("name=\"{}\" in the folder of module {name}", config.name);
            return Err(source.wrong(source.document.root_element(), what));
        }
        Ok(config)
    }

    /// Writes it as the module's userconfig.xml on this host, durably.
    ///
    /// # Errors
    /// `Write`.
    pub fn store(&self, paths: &Paths) -> Result<(), ConfigError> {
        let file = paths.userconfig(&self.name);
        let folder = file.parent().map_or(Ok(()), std::fs::create_dir_all);
        folder
            .and_then(|()| durable::write(&file, self.to_xml().as_bytes(), 0o644))
            .map_err(|source| ConfigError::Write { file, source })
    }

    /// The other node's name; `None` where `me` is neither of the two.
    #[must_use]
    pub fn peer_of(&self, me: &NodeName) -> Option<&NodeName> {
        match me {
            me if *me == self.primary => Some(&self.secondary),
            me if *me == self.secondary => Some(&self.primary),
            _ => None,
        }
    }

    /// Whether its nodes are nodes of the cluster.
    ///
    /// # Errors
    /// A sentence that names the one that is not.
    pub fn check_nodes(&self, cluster: &Cluster) -> Result<(), String> {
        let stranger = [&self.primary, &self.secondary].into_iter().find(|n| cluster.node(n).is_none());
        stranger.map_or(Ok(()), |n| {
            Err(format!("cluster {} has no node {n}: `vmtwin cluster status` lists them", cluster.name))
        })
    }

    /// Checks a text; `file` is named in errors.
    ///
    /// # Errors
    /// `Wrong` with the place.
    pub fn parse(text: &str, file: &Path) -> Result<Self, ConfigError> {
        let (source, raw) = Source::parse::<RawModule>(text, file, "module")?;
        let s = &source;
        let top = s.document.root_element();
        raw.refuse_what_is_not_built(s)?;
        let name: ModuleName = s.need(top, "name", raw.name.as_ref())?;
        if ["node", "keep"].contains(&name.as_str()) {
            return Err(s.wrong(top, format!("{name} is a name that vmtwin uses itself: choose another")));
        }
        let id = s.need(top, "id", raw.id.as_ref())?;
        let version = s.need(top, "version", raw.version.as_ref())?;

        let at = s.first("vm");
        let vm = raw.vm.as_ref().ok_or_else(|| s.wrong(top, "<vm> is missing"))?;
        let vm_name: String = s.or(at, "name", vm.name.as_ref(), name.to_string())?;
        if vm_name.is_empty() || vm_name.len() > 200 || vm_name.contains(|c: char| c == '/' || c.is_control()) {
            return Err(s.wrong(at, format!("{vm_name:?} is no name of a VM")));
        }
        let driver = s.or(at, "driver", vm.driver.as_ref(), Driver::Libvirt)?;
        let on_guest_shutdown = s.or(at, "onGuestShutdown", vm.on_guest_shutdown.as_ref(), OnGuestShutdown::Stop)?;
        let stop_timeout: u64 = s.or(at, "stopTimeout", vm.stop_timeout.as_ref(), STOP_SECONDS)?;
        if !(1..=86_400).contains(&stop_timeout) {
            return Err(s.wrong(at, format!("stopTimeout=\"{stop_timeout}\": 1 to 86400 seconds")));
        }

        let at = s.first("nodes");
        let nodes = raw.nodes.as_ref().ok_or_else(|| s.wrong(top, "<nodes> is missing"))?;
        let primary = s.need(at, "primary", nodes.primary.as_ref())?;
        let secondary = s.need(at, "secondary", nodes.secondary.as_ref())?;
        if primary == secondary {
            return Err(s.wrong(at, "primary and secondary are the same node"));
        }

        let at = s.first("replication");
        let replication = raw.replication.as_ref().ok_or_else(|| s.wrong(top, "<replication> is missing"))?;
        let dir: PathBuf = s.need(at, "path", replication.path.as_ref())?;
        check_dir(&dir).map_err(|what| s.wrong(at, format!("path={:?}: {what}", dir.display().to_string())))?;
        let slow_peer = s.or(at, "slowPeer", replication.slow_peer.as_ref(), SLOW_PEER_MS)?;
        if !(LEASE_MS..=60_000).contains(&slow_peer) {
            let what = format!("slowPeer=\"{slow_peer}\": {LEASE_MS} (a lease) to 60000 milliseconds");
            return Err(s.wrong(at, what));
        }
        Ok(Self {
            name,
            id,
            version,
            vm: vm_name,
            driver,
            on_guest_shutdown,
            stop_timeout: Duration::from_secs(stop_timeout),
            primary,
            secondary,
            dir,
            slow_peer: Duration::from_millis(slow_peer),
        })
    }

    /// The file's text.
    #[must_use]
    pub fn to_xml(&self) -> String {
        let restart = self.on_guest_shutdown == OnGuestShutdown::Restart;
        let text = |value: &dyn fmt::Display| Some(value.to_string());
        xml::write(
            "module",
            &RawModule {
                name: text(&self.name),
                template: text(&"kvm"),
                id: text(&self.id),
                version: text(&self.version),
                vm: Some(RawVm {
                    name: text(&self.vm),
                    driver: (self.driver != Driver::Libvirt).then(|| self.driver.to_string()),
                    on_guest_shutdown: text(if restart { &"restart" } else { &"stop" }),
                    stop_timeout: text(&self.stop_timeout.as_secs()),
                }),
                nodes: Some(RawPair { primary: text(&self.primary), secondary: text(&self.secondary), failback: None }),
                replication: Some(RawReplication {
                    path: text(&self.dir.display()),
                    ack: None,
                    slow_peer: text(&self.slow_peer.as_millis()),
                    resync_rate: None,
                }),
                check: None,
                failover: None,
            },
        )
    }
}

const STOP_SECONDS: u64 = 180;

/// Whether a path can be a VM's directory.
///
/// # Errors
/// What is wrong with it.
pub fn check_dir(dir: &Path) -> Result<(), &'static str> {
    let plain = |c: Component<'_>| matches!(c, Component::RootDir | Component::Normal(_));
    if !dir.is_absolute() || !dir.components().all(plain) || dir.components().count() < 2 {
        return Err("an absolute path without \"..\", and not \"/\"");
    }
    let text = dir.to_str().ok_or("a path in UTF-8")?;
    if text.len() > 512 || text.contains(char::is_control) {
        return Err("at most 512 bytes, without control characters");
    }
    if ["/etc", "/proc", "/sys", "/dev", "/run", "/usr", "/boot", "/var/lib/vmtwin"]
        .iter()
        .any(|own| dir.starts_with(own))
    {
        return Err("a folder of the system's own: a VM's directory lies elsewhere");
    }
    Ok(())
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawModule {
    #[serde(rename = "@name", default, skip_serializing_if = "Option::is_none")]
    name: Option<String>,
    #[serde(rename = "@template", default, skip_serializing_if = "Option::is_none")]
    template: Option<String>,
    #[serde(rename = "@id", default, skip_serializing_if = "Option::is_none")]
    id: Option<String>,
    #[serde(rename = "@version", default, skip_serializing_if = "Option::is_none")]
    version: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    vm: Option<RawVm>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    nodes: Option<RawPair>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    replication: Option<RawReplication>,
    #[serde(default, skip_serializing)]
    check: Option<serde::de::IgnoredAny>,
    #[serde(default, skip_serializing)]
    failover: Option<serde::de::IgnoredAny>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawVm {
    #[serde(rename = "@name", default, skip_serializing_if = "Option::is_none")]
    name: Option<String>,
    #[serde(rename = "@driver", default, skip_serializing_if = "Option::is_none")]
    driver: Option<String>,
    #[serde(rename = "@onGuestShutdown", default, skip_serializing_if = "Option::is_none")]
    on_guest_shutdown: Option<String>,
    #[serde(rename = "@stopTimeout", default, skip_serializing_if = "Option::is_none")]
    stop_timeout: Option<String>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawPair {
    #[serde(rename = "@primary", default, skip_serializing_if = "Option::is_none")]
    primary: Option<String>,
    #[serde(rename = "@secondary", default, skip_serializing_if = "Option::is_none")]
    secondary: Option<String>,
    #[serde(rename = "@failback", default, skip_serializing_if = "Option::is_none")]
    failback: Option<String>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawReplication {
    #[serde(rename = "@path", default, skip_serializing_if = "Option::is_none")]
    path: Option<String>,
    #[serde(rename = "@ack", default, skip_serializing_if = "Option::is_none")]
    ack: Option<String>,
    #[serde(rename = "@slowPeer", default, skip_serializing_if = "Option::is_none")]
    slow_peer: Option<String>,
    #[serde(rename = "@resyncRate", default, skip_serializing_if = "Option::is_none")]
    resync_rate: Option<String>,
}

impl RawModule {
    fn refuse_what_is_not_built(&self, s: &Source<'_>) -> Result<(), ConfigError> {
        s.only(s.document.root_element(), "template", self.template.as_ref(), "kvm")?;
        if let Some(nodes) = &self.nodes {
            s.only(s.first("nodes"), "failback", nodes.failback.as_ref(), "off")?;
        }
        if let Some(replication) = &self.replication {
            let at = s.first("replication");
            s.only(at, "ack", replication.ack.as_ref(), "written")?;
            s.only(at, "resyncRate", replication.resync_rate.as_ref(), "0")?;
        }
        for (name, there) in [("check", self.check.is_some()), ("failover", self.failover.is_some())] {
            if there {
                let what = format!("<{name}> is not supported yet by this version: remove it");
                return Err(s.wrong(s.first(name), what));
            }
        }
        Ok(())
    }
}
