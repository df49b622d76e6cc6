//! `apply`: one configuration file, checked, to all nodes that it concerns, or to none.
//!
//! First every node checks it, then every node stores it; where one cannot store, those that did get the old text back.
use super::{Node, chain};
use crate::api::client::failed;
use crate::api::types::{ApplyRequest, ConfigAnswer, ConfigRequest, Done, ErrorBody};
use crate::config::{Cluster, ModuleConfig};
use std::path::Path;
use std::time::Duration;
use vmtwin_core::ids::NodeName;

const NODE_TIME: Duration = Duration::from_secs(10);

/// One of the two kinds of file.
enum Config {
    Cluster(Cluster),
    Module(ModuleConfig),
}

impl Config {
    fn parse(xml: &str, file: &Path) -> Result<Self, ErrorBody> {
        let document = roxmltree::Document::parse(xml);
        let is_module = document.is_ok_and(|d| d.root_element().has_tag_name("module"));
        let parsed = if is_module {
            ModuleConfig::parse(xml, file).map(Self::Module)
        } else {
            Cluster::parse(xml, file).map(Self::Cluster)
        };
        parsed.map_err(|e| failed(2, chain(&e)))
    }

    fn to_xml(&self) -> String {
        match self {
            Self::Cluster(cluster) => cluster.to_xml(),
            Self::Module(module) => module.to_xml(),
        }
    }
}

impl Node {
    /// Takes a file that an admin has edited.
    ///
    /// # Errors
    /// Code 2 with file, line and element; 3 where it may not change so, or a node is away.
    pub async fn apply(&self, request: ApplyRequest) -> Result<Done, ErrorBody> {
        let _changing = self.changing.lock().await;
        let (cluster, me) = self.cluster()?;
        let mut config = Config::parse(&request.xml, Path::new(&request.file))?;
        let (what, version, concerned) = match &mut config {
            Config::Cluster(new) => {
                self.check_cluster(&cluster, new)?;
                new.version = cluster.version + 1;
                ("cluster.xml".to_owned(), new.version, new.nodes.iter().map(|n| n.name.clone()).collect())
            }
            Config::Module(new) => {
                let old = self.module(new.name.as_str())?.ok_or_else(|| {
                    failed(
                        3,
                        format!("no module {} on this node: `vmtwin protect` makes one, `apply` changes one", new.name),
                    )
                })?;
                check_module(&old, new)?;
                new.version = old.version + 1;
                let nodes: Vec<NodeName> = vec![new.primary.clone(), new.secondary.clone()];
                (format!("module {}", new.name), new.version, nodes)
            }
        };
        let mut done = self.store_on_all(&cluster, &me, &config.to_xml(), &concerned, request.force).await?;
        done.notes.insert(0, format!("{what} is version {version} now"));
        if matches!(config, Config::Module(_)) {
            done.notes.push("a module that runs takes its new settings when its process starts next".to_owned());
        }
        Ok(done)
    }

    /// Gives a configuration to these nodes: all, or none. With `force`, those that can be reached.
    pub(super) async fn store_on_all(
        &self,
        cluster: &Cluster,
        me: &NodeName,
        xml: &str,
        nodes: &[NodeName],
        force: bool,
    ) -> Result<Done, ErrorBody> {
        let mut done = Done::default();
        let mut reached = Vec::new();
        for node in nodes {
            match self.give_config(cluster, me, node, xml, true).await {
                Ok(_) => reached.push(node),
                Err(e) if e.code == 4 && force => {
                    done.notes.push(format!("{node} has not got it: {}", e.error));
                }
                Err(e) if e.code == 4 => {
                    let error = format!("{}. Nothing was changed; `--force` leaves {node} out", e.error);
                    return Err(failed(3, error));
                }
                Err(e) => return Err(failed(e.code, format!("on {node}: {}", e.error))),
            }
        }
        let mut stored = Vec::new();
        for node in reached {
            match self.give_config(cluster, me, node, xml, false).await {
                Ok(answer) => stored.push((node, answer.before)),
                Err(e) => {
                    for (node, before) in stored {
                        let Some(before) = before else { continue };
                        if let Err(e) = self.give_config(cluster, me, node, &before, false).await {
                            crate::host::warn(&format!(
                                "{node} keeps a configuration that {me} took back: {}",
                                e.error
                            ));
                        }
                    }
                    return Err(failed(1, format!("{node} did not store it ({}): nothing was changed", e.error)));
                }
            }
        }
        Ok(done)
    }

    async fn give_config(
        &self,
        cluster: &Cluster,
        me: &NodeName,
        node: &NodeName,
        xml: &str,
        check_only: bool,
    ) -> Result<ConfigAnswer, ErrorBody> {
        let request = ConfigRequest { xml: xml.to_owned(), check_only };
        if node == me {
            self.take_config(&request)
        } else {
            self.daemon(cluster, node)?.post("/v1/config", &request, NODE_TIME).await
        }
    }

    /// This node's part.
    ///
    /// # Errors
    /// Where it is wrong, or cannot be stored.
    pub fn take_config(&self, request: &ConfigRequest) -> Result<ConfigAnswer, ErrorBody> {
        let config = Config::parse(&request.xml, Path::new("the given file"))?;
        let file = match &config {
            Config::Cluster(new) => {
                let (cluster, _) = self.cluster()?;
                if new.id != cluster.id {
                    return Err(failed(3, "it belongs to another cluster"));
                }
                self.paths.cluster_xml()
            }
            Config::Module(new) => {
                if let Some(old) = self.module(new.name.as_str())?
                    && old.id != new.id
                {
                    return Err(failed(3, format!("another module is named {}", new.name)));
                }
                self.paths.userconfig(&new.name)
            }
        };
        let before = std::fs::read_to_string(&file).ok();
        if !request.check_only {
            let stored = match &config {
                Config::Cluster(new) => new.store(&self.paths),
                Config::Module(new) => new.store(&self.paths),
            };
            stored.map_err(|e| failed(1, chain(&e)))?;
        }
        Ok(ConfigAnswer { before })
    }

    fn check_cluster(&self, old: &Cluster, new: &Cluster) -> Result<(), ErrorBody> {
        if new.id != old.id || new.name != old.name {
            return Err(failed(3, "a cluster's name and id stay as `cluster init` made them: certificates carry them"));
        }
        if new.witness.name != old.witness.name {
            return Err(failed(
                3,
                "another witness is not supported yet by this version: its vote would count for no module",
            ));
        }
        if let Some(added) = new.nodes.iter().find(|n| old.node(&n.name).is_none()) {
            return Err(failed(3, format!("node {} is new: it enters by `vmtwin cluster join`", added.name)));
        }
        for name in self.paths.list_modules().unwrap_or_default() {
            if let Some(module) = self.module(name.as_str())? {
                module.check_nodes(new).map_err(|e| failed(3, format!("module {name}: {e}")))?;
            }
        }
        Ok(())
    }
}

/// What of a module can change by editing its file.
fn check_module(old: &ModuleConfig, new: &ModuleConfig) -> Result<(), ErrorBody> {
    let fixed = [
        ("id", old.id == new.id),
        ("<vm name>", old.vm == new.vm),
        ("<vm driver>", old.driver == new.driver),
        ("<replication path>", old.dir == new.dir),
        ("nodes", new.peer_of(&old.primary).is_some() && new.peer_of(&old.secondary).is_some()),
    ];
    match fixed.iter().find(|(_, same)| !same) {
        None => Ok(()),
        Some((what, _)) => Err(failed(
            3,
            format!(
                "{what} of module {} cannot be changed by this version: unprotect the VM and protect it anew",
                old.name
            ),
        )),
    }
}
