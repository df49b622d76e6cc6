//! What is to be seen of modules, nodes and the cluster; events of all nodes in one line.
use super::processes::Seen;
use super::{Node, VERSION, no_module};
use crate::acceptors::{Reach, ask_once, places, wire};
use crate::api::client::failed;
use crate::api::types::{
    ClusterStatus, ErrorBody, FiguresStatus, Health, MemberStatus, ModuleStatus, NodeStatus, State, StatusAnswer,
    Unreached,
};
use crate::config::Cluster;
use crate::engine::socket::{self, Request};
use crate::{eventlog, pidfile, trust};
use std::time::Duration;
use tokio::time::timeout;
use vmtwin_core::ids::{ModuleId, ModuleName, NodeName};

const MODULE_TIME: Duration = Duration::from_millis(1500);
/// A node that is off costs this much of each `status`.
const NODE_TIME: Duration = Duration::from_millis(2000);
/// Most events of one answer.
const EVENTS_MAX: usize = 10_000;

impl Node {
    /// This node, as it sees itself.
    #[must_use]
    pub fn node_status(&self) -> NodeStatus {
        let cluster = Cluster::load(&self.paths).ok();
        NodeStatus {
            name: trust::own_identity(&self.paths).ok().map(|identity| identity.name),
            version: VERSION.to_owned(),
            cluster_version: cluster.map(|c| c.version),
            keep: pidfile::find(&self.paths.keep_pid()).ok().flatten().map(|found| found.pid),
            modules: self.paths.list_modules().unwrap_or_default().iter().map(ToString::to_string).collect(),
        }
    }

    /// Modules of this node and, unless only `here`, of all that can be reached.
    ///
    /// # Errors
    /// Where no node that answers has a module of this name.
    pub async fn status(&self, module: Option<&str>, here: bool) -> Result<StatusAnswer, ErrorBody> {
        if let Some(name) = module {
            ModuleName::new(name).map_err(|e| failed(2, e.to_string()))?;
        }
        let (cluster, me) = match self.cluster() {
            Ok(found) => found,
            // A daemon without a cluster has no modules, and says so.
            Err(_) if module.is_none() && !self.paths.cluster_xml().exists() => return Ok(StatusAnswer::default()),
            Err(e) => return Err(e),
        };
        let mut answer = StatusAnswer::default();
        let wanted = |name: &ModuleName| module.is_none_or(|wanted| wanted == name.as_str());
        for name in self.paths.list_modules().unwrap_or_default().iter().filter(|name| wanted(name)) {
            answer.modules.push(self.module_status(name, &me).await);
        }
        if here {
            return Ok(answer);
        }
        let mut asked = Vec::new();
        for node in cluster.nodes.iter().filter(|n| n.name != me) {
            let daemon = self.daemon(&cluster, &node.name)?;
            let name = node.name.to_string();
            let path = module.map_or("/v1/status?here=true".to_owned(), |m| format!("/v1/status?here=true&module={m}"));
            asked.push((name, tokio::spawn(async move { daemon.get::<StatusAnswer>(&path, NODE_TIME).await })));
        }
        for (node, task) in asked {
            match task.await {
                Ok(Ok(theirs)) => answer.modules.extend(theirs.modules),
                Ok(Err(e)) => answer.unreached.push(Unreached { node, why: e.error }),
                Err(_) => answer.unreached.push(Unreached { node, why: "the daemon failed at it".into() }),
            }
        }
        answer.modules.sort_by(|a, b| (&a.module, &a.node).cmp(&(&b.module, &b.node)));
        match module {
            Some(name) if answer.modules.is_empty() => Err(no_module(name)),
            _ => Ok(answer),
        }
    }

    async fn module_status(&self, name: &ModuleName, me: &NodeName) -> ModuleStatus {
        let asked = timeout(MODULE_TIME, socket::ask(&self.paths.module_socket(name), &Request::Status)).await;
        if let Ok(Ok(answer)) = &asked
            && let Some(status) = &answer.status
        {
            return status.clone();
        }
        let (state, health, reason, process) = match self.modules.see(name) {
            Seen::Stopped => (State::Stop, Health::Red, format!("stopped: `vmtwin start {name}` starts it"), None),
            Seen::Starting => (State::Wait, Health::Magenta, "its process is being started".to_owned(), None),
            Seen::Running(pid) if asked.is_ok() => {
                (State::Wait, Health::Magenta, "its process is on its way up or down".to_owned(), Some(pid))
            }
            Seen::Running(pid) => {
                let reason = format!("its process {pid} does not answer: `vmtwin log {name}` may tell why");
                (State::Wait, Health::Red, reason, Some(pid))
            }
            Seen::Down(why) => (State::Stop, Health::Red, why, None),
        };
        ModuleStatus {
            module: name.to_string(),
            node: me.to_string(),
            state,
            health,
            reason,
            in_sync: false,
            holder: None,
            epoch: 0,
            generation: 0,
            vm: "unknown".into(),
            link: "down".into(),
            link_protection: "tls".into(),
            resync: None,
            verify: None,
            verified: None,
            proved_equal: None,
            notes: Vec::new(),
            figures: FiguresStatus::default(),
            process,
            last_takeover: None,
        }
    }

    /// The cluster as this node sees it.
    ///
    /// # Errors
    /// Where it is in none.
    pub async fn cluster_status(&self) -> Result<ClusterStatus, ErrorBody> {
        let (cluster, me) = self.cluster()?;
        let mut members = Vec::new();
        for node in &cluster.nodes {
            let status = if node.name == me {
                Ok(self.node_status())
            } else {
                self.daemon(&cluster, &node.name)?.get::<NodeStatus>("/v1/node", NODE_TIME).await
            };
            let reason = match &status {
                Err(e) => e.error.clone(),
                Ok(status) if status.keep.is_none() => {
                    "its keep does not run, so it has no vote: its daemon starts it again".to_owned()
                }
                Ok(status) if status.version != VERSION => {
                    format!("version {}, this node has {VERSION}", status.version)
                }
                Ok(status) if status.cluster_version != Some(cluster.version) => {
                    format!(
                        "its cluster.xml is another one than this node's version {}: `vmtwin apply` it",
                        cluster.version
                    )
                }
                Ok(_) => String::new(),
            };
            members.push(MemberStatus {
                name: node.name.to_string(),
                role: "node".into(),
                address: node.address().to_string(),
                reached: status.is_ok(),
                reason,
                version: status.ok().map(|s| s.version),
            });
        }
        members.push(self.witness_status(&cluster, &me).await);
        Ok(ClusterStatus { cluster: cluster.name.to_string(), version: cluster.version, members })
    }

    async fn witness_status(&self, cluster: &Cluster, me: &NodeName) -> MemberStatus {
        let all = places(&self.paths, cluster, me, me);
        let witness = all.iter().find(|p| matches!(p.reach, Reach::Witness(_))).expect("one of the three");
        let asked = timeout(NODE_TIME, ask_once(&self.paths, witness, ModuleId(0), wire::Ask::Who)).await;
        let reason = match asked {
            Ok(Ok(_)) => String::new(),
            Ok(Err(e)) => {
                format!("no contact ({e}): has it joined, does `vmtwin witness` run there, is port 7722 open?")
            }
            Err(_) => "no answer in time: is the host up, port 7722 open?".to_owned(),
        };
        MemberStatus {
            name: cluster.witness.name.to_string(),
            role: "witness".into(),
            address: cluster.witness.address.to_string(),
            reached: reason.is_empty(),
            reason,
            version: None,
        }
    }

    /// The last events of a module, of both nodes, in order of generation and time.
    ///
    /// # Errors
    /// Where no node that answers has it.
    pub async fn log(&self, module: &str, limit: usize, here: bool) -> Result<Vec<eventlog::Event>, ErrorBody> {
        let name = ModuleName::new(module).map_err(|e| failed(2, e.to_string()))?;
        let limit = limit.min(EVENTS_MAX);
        let known = self.module(module)?.is_some();
        let mut events = eventlog::read(&self.paths.module_log(&name), limit)
            .map_err(|e| failed(1, format!("cannot read {}: {e}", self.paths.module_log(&name).display())))?;
        if here {
            return Ok(events);
        }
        let (cluster, me) = self.cluster()?;
        for node in cluster.nodes.iter().filter(|n| n.name != me) {
            let path = format!("/v1/log?here=true&module={module}&limit={limit}");
            if let Ok(theirs) = self.daemon(&cluster, &node.name)?.get::<Vec<eventlog::Event>>(&path, NODE_TIME).await {
                events.extend(theirs);
            }
        }
        if events.is_empty() && !known {
            return Err(no_module(module));
        }
        Ok(in_order(events, limit))
    }
}

/// Clocks of two hosts differ; generations do not. Events that were written before a record was known follow their own
/// node's line.
fn in_order(mut events: Vec<eventlog::Event>, limit: usize) -> Vec<eventlog::Event> {
    events.sort_by(|a, b| (&a.time, &a.node).cmp(&(&b.time, &b.node)));
    let mut last = std::collections::BTreeMap::new();
    let mut keyed: Vec<_> = events
        .into_iter()
        .map(|event| {
            let known = last.entry(event.node.clone()).or_insert(0);
            if event.generation > 0 {
                *known = event.generation;
            }
            (*known, event)
        })
        .collect();
    // Stable: within one generation the times stay in order. An event of an older process of the other node may carry an
    // older generation later in time: it belongs there.
    keyed.sort_by_key(|(generation, _)| *generation);
    let skip = keyed.len().saturating_sub(limit);
    keyed.into_iter().skip(skip).map(|(_, event)| event).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use eventlog::{Event, Level};

    #[test]
    fn events_of_two_nodes_are_told_by_generation_first_and_time_then() {
        let event = |node: &str, time: &str, generation, text: &str| Event {
            time: time.into(),
            node: node.into(),
            module: "db".into(),
            generation,
            level: Level::Info,
            event: "x".into(),
            text: text.into(),
        };
        // h2's clock is late by a minute.
        let events = vec![
            event("h1", "10:05", 3, "h1 lost h2"),
            event("h2", "10:04", 4, "h2 took over"),
            event("h2", "10:05", 0, "h2's next process began"),
            event("h1", "10:06", 4, "h1 is back"),
        ];
        let told: Vec<_> = in_order(events.clone(), 10).into_iter().map(|e| e.text).collect();
        assert_eq!(told, ["h1 lost h2", "h2 took over", "h2's next process began", "h1 is back"]);
        assert_eq!(in_order(events, 1)[0].text, "h1 is back");
    }
}
