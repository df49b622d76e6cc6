//! Commands: to the process that can do them, on the node where it is.
//!
//! Keeps out: whether a module may do it; its own machine refuses with a sentence.
use super::processes::Seen;
use super::{Node, no_module};
use crate::api::client::{Daemon, failed};
use crate::api::types::{Action, CommandRequest, Done, ErrorBody, NodeStatus, State, VerifyRequest, VerifyStarted};
use crate::config::ModuleConfig;
use crate::engine::socket::{self, Answer, Request};
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::{sleep, timeout};
use vmtwin_core::ids::NodeName;

const SHORT: Duration = Duration::from_secs(3);
/// Beside the guest's own time to stop: flush, hand-over, start, unmount.
const SPARE: Duration = Duration::from_secs(300);
/// `--no-wait` answers after this time, where nothing was refused until then.
const REFUSALS: Duration = Duration::from_millis(1500);
const LOOK: Duration = Duration::from_millis(100);
/// Bytes per second of a verification that names no rate.
const VERIFY_RATE: u64 = 200 << 20;
/// What a verification may be given.
const VERIFY_RATES: std::ops::RangeInclusive<u64> = 1 << 20..=1 << 40;

impl Node {
    /// Does a command, or has it done.
    ///
    /// # Errors
    /// With the exit code that the CLI ends with.
    pub async fn command(self: Arc<Self>, request: CommandRequest) -> Result<Done, ErrorBody> {
        if !request.no_wait {
            return self.do_command(request).await;
        }
        // Goes on by itself once the caller has its answer.
        let mut doing = tokio::spawn(async move { self.do_command(request).await });
        match timeout(REFUSALS, &mut doing).await {
            Ok(done) => done.unwrap_or_else(|_| Err(failed(1, "the daemon failed at it: its output tells why"))),
            Err(_) => Ok(Done { notes: Vec::new(), going_on: true }),
        }
    }

    async fn do_command(self: Arc<Self>, request: CommandRequest) -> Result<Done, ErrorBody> {
        let Some(config) = self.module(&request.module)? else {
            return self.pass_on(&request).await;
        };
        if request.here {
            return self.do_here(&config, &request).await;
        }
        let (_, me) = self.cluster()?;
        match (request.action, &request.node) {
            (Action::Start | Action::Stop, None) => self.do_on_both(&config, &me, &request).await,
            (Action::Restart | Action::Swap, _) => {
                let word = if request.action == Action::Swap { "swapped" } else { "restarted" };
                let holder = self.holder(&config, word).await?;
                self.do_on(&config, &me, &holder, &request).await
            }
            (_, Some(node)) => {
                let node = NodeName::new(node).map_err(|e| failed(2, e.to_string()))?;
                self.do_on(&config, &me, &node, &request).await
            }
            (_, None) => self.do_on(&config, &me, &me.clone(), &request).await,
        }
    }

    async fn do_on(
        self: &Arc<Self>,
        config: &ModuleConfig,
        me: &NodeName,
        node: &NodeName,
        request: &CommandRequest,
    ) -> Result<Done, ErrorBody> {
        let here = CommandRequest { here: true, no_wait: false, ..request.clone() };
        if node == me {
            return self.do_here(config, &here).await;
        }
        if config.peer_of(node).is_none() {
            let (one, two) = (&config.primary, &config.secondary);
            return Err(failed(2, format!("module {} is on {one} and {two}, not on {node}", config.name)));
        }
        let (cluster, _) = self.cluster()?;
        self.daemon(&cluster, node)?.post("/v1/command", &here, config.stop_timeout + SPARE).await
    }

    /// `start` and `stop`. One node that is away does not keep the other from it.
    async fn do_on_both(
        self: &Arc<Self>,
        config: &ModuleConfig,
        me: &NodeName,
        request: &CommandRequest,
    ) -> Result<Done, ErrorBody> {
        let peer = config.peer_of(me).ok_or_else(|| failed(1, format!("module {} is not on {me}", config.name)))?;
        let (mine, theirs) = tokio::join!(self.do_on(config, me, me, request), self.do_on(config, me, peer, request));
        let mut done = match (mine, &theirs) {
            (Ok(done), _) => done,
            (Err(error), _) => return Err(error),
        };
        match theirs {
            Ok(theirs) => done.notes.extend(theirs.notes),
            Err(error) if error.code == 4 => done.notes.push(format!("not on {peer}: {}", error.error)),
            Err(error) => return Err(failed(error.code, format!("on {peer}: {}", error.error))),
        }
        done.notes.dedup();
        Ok(done)
    }

    async fn do_here(self: &Arc<Self>, config: &ModuleConfig, request: &CommandRequest) -> Result<Done, ErrorBody> {
        let limit = config.stop_timeout + SPARE;
        match request.action {
            Action::Start => self.start_here(config).await,
            Action::Stop => self.stop_here(config, request.node.is_none(), limit).await,
            Action::Restart => self.ask_module(config, Request::Restart, limit).await,
            Action::Swap => self.ask_module(config, Request::Swap, limit).await,
            Action::Prim => self.ask_module(config, Request::Prim, limit).await,
            Action::Second => self.ask_module(config, Request::Second, limit).await,
        }
    }

    async fn start_here(self: &Arc<Self>, config: &ModuleConfig) -> Result<Done, ErrorBody> {
        let name = &config.name;
        let begun = tokio::time::Instant::now();
        loop {
            let started = self.modules.clone().start(name);
            if started.map_err(|e| failed(1, format!("cannot mark module {name} as started: {e}")))? {
                return Ok(Done::default());
            }
            match self.ask_module(config, Request::Start, SHORT).await {
                Ok(done) => return Ok(done),
                // On its way up, or on its way down from a stop just before: then it is started once it has ended.
                Err(error) if begun.elapsed() > 20 * SHORT => return Err(error),
                Err(_) => sleep(LOOK).await,
            }
        }
    }

    async fn stop_here(
        self: &Arc<Self>,
        config: &ModuleConfig,
        both: bool,
        limit: Duration,
    ) -> Result<Done, ErrorBody> {
        let name = &config.name;
        if let Seen::Running(_) = self.modules.see(name) {
            match self.ask_module(config, Request::Stop { both }, limit).await {
                Ok(_) => {}
                // It ended with the answer on its way; that it is gone is seen below.
                Err(error) if error.code == 4 => {}
                Err(error) => return Err(error),
            }
            let gone = async {
                while matches!(self.modules.see(name), Seen::Running(_)) {
                    sleep(LOOK).await;
                }
            };
            timeout(limit, gone).await.map_err(|_| {
                failed(5, format!("module {name} is still stopping: `vmtwin status {name}` tells how far it is"))
            })?;
        }
        self.modules.unwant(name).map_err(|e| failed(1, format!("cannot mark module {name} as stopped: {e}")))?;
        Ok(Done::default())
    }

    async fn ask_module(&self, config: &ModuleConfig, request: Request, limit: Duration) -> Result<Done, ErrorBody> {
        self.module_answer(config, request, limit).await.map(|_| Done::default())
    }

    async fn module_answer(
        &self,
        config: &ModuleConfig,
        request: Request,
        limit: Duration,
    ) -> Result<Answer, ErrorBody> {
        let name = &config.name;
        let asked = timeout(limit, socket::ask(&self.paths.module_socket(name), &request)).await;
        match asked {
            Ok(Ok(answer)) if answer.ok => Ok(answer),
            Ok(Ok(answer)) => Err(failed(
                answer.code.unwrap_or(1),
                answer.error.unwrap_or_else(|| format!("module {name} refused without a reason")),
            )),
            Ok(Err(e)) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {
                Err(match self.modules.see(name) {
                    Seen::Running(_) | Seen::Starting => {
                        failed(4, format!("module {name} is being started: try again"))
                    }
                    Seen::Stopped | Seen::Down(_) => {
                        failed(3, format!("module {name} does not run on this node: `vmtwin start {name}`"))
                    }
                })
            }
            Ok(Err(e)) => Err(failed(4, format!("the process of module {name} broke off: {e}"))),
            Err(_) => {
                Err(failed(5, format!("module {name} is still at it: `vmtwin status {name}` tells how far it is")))
            }
        }
    }

    /// The node that runs the VM.
    async fn holder(self: &Arc<Self>, config: &ModuleConfig, word: &str) -> Result<NodeName, ErrorBody> {
        let answer = self.status(Some(config.name.as_str()), false).await?;
        let runs = answer.modules.iter().find(|m| matches!(m.state, State::Prim | State::Alone));
        let name = &config.name;
        match runs {
            Some(status) => NodeName::new(&status.node).map_err(|e| failed(1, e.to_string())),
            None => Err(failed(
                3,
                format!(
                    "module {name} runs on no node that answers, so it cannot be {word}: `vmtwin status {name}` tells why"
                ),
            )),
        }
    }

    /// To a node that has the module, where this one has not.
    async fn pass_on(&self, request: &CommandRequest) -> Result<Done, ErrorBody> {
        if request.here {
            return Err(no_module(&request.module));
        }
        self.elsewhere(&request.module).await?.post("/v1/command", request, 2 * SPARE).await
    }

    /// Another node, which has the module.
    async fn elsewhere(&self, module: &str) -> Result<Daemon, ErrorBody> {
        let (cluster, me) = self.cluster()?;
        for node in cluster.nodes.iter().filter(|n| n.name != me) {
            let daemon: Daemon = self.daemon(&cluster, &node.name)?;
            if let Ok(status) = daemon.get::<NodeStatus>("/v1/node", SHORT).await
                && status.modules.iter().any(|name| name == module)
            {
                return Ok(daemon);
            }
        }
        Err(no_module(module))
    }

    /// Begins a verification, on the node that runs the VM.
    ///
    /// # Errors
    /// With the exit code that the CLI ends with.
    pub async fn verify(self: Arc<Self>, request: VerifyRequest) -> Result<VerifyStarted, ErrorBody> {
        let rate = request.rate.unwrap_or(VERIFY_RATE);
        if !VERIFY_RATES.contains(&rate) {
            let (least, most) = (VERIFY_RATES.start(), VERIFY_RATES.end());
            return Err(failed(2, format!("a rate of {rate} bytes per second: {least} to {most} can be had")));
        }
        let Some(config) = self.module(&request.module)? else {
            if request.here {
                return Err(no_module(&request.module));
            }
            return self.elsewhere(&request.module).await?.post("/v1/verify", &request, SPARE).await;
        };
        let (cluster, me) = self.cluster()?;
        let holder = if request.here { me.clone() } else { self.holder(&config, "verified").await? };
        if holder != me {
            let here = VerifyRequest { here: true, ..request };
            return self.daemon(&cluster, &holder)?.post("/v1/verify", &here, SPARE).await;
        }
        let answer = self.module_answer(&config, Request::Verify { rate, repair: request.repair }, SPARE).await?;
        Ok(VerifyStarted { node: me.to_string(), begun_ms: answer.begun_ms.unwrap_or_default() })
    }
}
