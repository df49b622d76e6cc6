//! A VM becomes a module on two nodes, and plain again.
//!
//! ```text
//! protect:   look here and there ─> voters ─> gather (journalled) ─> replica ─> configuration on both ─> first record
//!            ─> commit (the journal goes) ─> start on both
//! unprotect: both stopped, this copy up to date ─> files given back here (journalled) ─> put aside there ─> forgotten
//! ```
//! Invariant: until `commit` the VM is a plain VM and everything can be taken back; a run that was cut is taken back by the
//! next one. No step here deletes a file of the VM.
use super::processes::Seen;
use super::{Node, VERSION, chain, no_module};
use crate::acceptors::wire::{Ask, Reply};
use crate::acceptors::{Acceptors, News, Place, ask_once, places};
use crate::api::client::failed;
use crate::api::types::{Action, CommandRequest, Done, ErrorBody, ProtectRequest, UnprotectRequest};
use crate::config::{Cluster, Driver, ModuleConfig, Paths};
use crate::host;
use crate::protect::peer::Question;
use crate::protect::{self, Host, ProtectError, QemuImg, hook};
use crate::store::create_replica;
use crate::store::replica::State;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::time::timeout;
use vmtwin_core::arbiter::message::{Reply as CoreReply, Request};
use vmtwin_core::arbiter::{Arbiter, Change, Effect, Event, Setup};
use vmtwin_core::ids::{AcceptorId, ModuleId, ModuleName, NodeName, RecordId, ReplicaId};
use vmtwin_core::limits::MODULES_MAX;
use vmtwin_core::record::Record;
use vmtwin_hypervisor::fake::Fake;
use vmtwin_hypervisor::libvirt::{Libvirt, SYSTEM_URI};

const PEER_TIME: Duration = Duration::from_secs(60);
const ROUND_TIME: Duration = Duration::from_secs(30);

/// What is asked of the other node.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", tag = "step")]
pub enum PeerStep {
    /// May this VM be protected onto you?
    #[serde(rename_all = "camelCase")]
    Check {
        /// Of the program that asks.
        version: String,
        /// The module to be.
        module: String,
        /// Its directory.
        dir: PathBuf,
        /// What libvirt and its files need; none for a fake VM.
        question: Option<Question>,
    },
    /// Take its configuration.
    #[serde(rename_all = "camelCase")]
    Take {
        /// userconfig.xml.
        xml: String,
    },
    /// Forget it again: `protect` did not come to its end.
    #[serde(rename_all = "camelCase")]
    Drop {
        /// The module.
        module: String,
        /// Only this one.
        id: String,
    },
    /// Could it be put aside?
    #[serde(rename_all = "camelCase")]
    MayRetire {
        /// The module.
        module: String,
    },
    /// Put it aside.
    #[serde(rename_all = "camelCase")]
    Retire {
        /// The module.
        module: String,
        /// Part of the directory's new name.
        date: String,
    },
}

/// Its answer.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PeerStepAnswer {
    /// Why not; empty: done.
    pub reasons: Vec<String>,
    /// For the operator.
    pub notes: Vec<String>,
}

/// All that a `protect` needs to know.
struct Job {
    cluster: Cluster,
    me: NodeName,
    peer: NodeName,
    config: ModuleConfig,
}

impl From<ProtectError> for ErrorBody {
    fn from(error: ProtectError) -> Self {
        failed(if error.is_refusal() { 3 } else { 1 }, chain(&error))
    }
}

/// The VM's host, as one that blocks; to be used on a thread of its own.
fn vm_host(config: &ModuleConfig) -> Result<Box<dyn Host>, ErrorBody> {
    match config.driver {
        Driver::Fake => Ok(Box::new(Fake::new(&config.vm))),
        Driver::Libvirt => {
            let host = Libvirt::connect(SYSTEM_URI, &config.vm).map_err(|e| failed(1, chain(&e)))?;
            Ok(Box::new(host))
        }
    }
}

async fn blocking<T: Send + 'static>(
    act: impl FnOnce() -> Result<T, ErrorBody> + Send + 'static,
) -> Result<T, ErrorBody> {
    let done = tokio::task::spawn_blocking(act).await;
    done.unwrap_or_else(|_| Err(failed(1, "the daemon failed at it: its output tells why")))
}

impl Node {
    /// Protects a VM of this host.
    ///
    /// # Errors
    /// Code 3 with each reason, nothing touched; or 1, everything put back.
    pub async fn protect(self: Arc<Self>, request: ProtectRequest) -> Result<Done, ErrorBody> {
        let changing = self.changing.lock().await;
        let job = self.protect_job(&request)?;
        let name = job.config.name.clone();
        self.take_back_an_older_run(&job).await?;
        if self.module(name.as_str())?.is_some() {
            return Err(failed(3, format!("VM {name} is protected already: `vmtwin status {name}` shows it")));
        }
        if self.paths.list_modules().is_ok_and(|all| all.len() >= MODULES_MAX) {
            return Err(failed(3, format!("{MODULES_MAX} modules are the most that a cluster takes")));
        }
        let notes = self.check_both(&job).await?;
        let made = self.make_module(&job).await;
        if let Err(error) = made {
            return Err(match self.take_back(&job).await {
                Ok(()) => error,
                Err(back) => {
                    failed(error.code, format!("{}; and not everything could be put back: {}", error.error, back.error))
                }
            });
        }
        drop(changing);
        let start =
            CommandRequest { module: name.to_string(), action: Action::Start, node: None, here: false, no_wait: false };
        let started = self.command(start).await;
        let mut done = Done { notes, going_on: false };
        match started {
            Ok(started) => done.notes.extend(started.notes),
            Err(e) => done.notes.push(format!("it is protected and did not start: {}", e.error)),
        }
        Ok(done)
    }

    fn protect_job(&self, request: &ProtectRequest) -> Result<Job, ErrorBody> {
        let wrong = |e: &dyn std::fmt::Display| failed(2, e.to_string());
        let (cluster, me) = self.cluster()?;
        let name = ModuleName::new(&request.vm).map_err(|e| wrong(&e))?;
        let peer = NodeName::new(&request.peer).map_err(|e| wrong(&e))?;
        self.daemon(&cluster, &peer)?;
        if peer == me {
            return Err(failed(2, format!("the peer of a VM on {me} is another node than {me}")));
        }
        let primary = request.primary.as_deref().map_or(Ok(me.clone()), NodeName::new).map_err(|e| wrong(&e))?;
        let secondary = match &primary {
            primary if *primary == me => peer.clone(),
            primary if *primary == peer => me.clone(),
            other => return Err(failed(2, format!("--primary {other}: it is {me} or {peer}"))),
        };
        let dir = request.dir.as_ref().map_or_else(|| protect::directory_of(&request.vm), PathBuf::from);
        let mut config = ModuleConfig::new(name, ModuleId(host::random()), primary, secondary, dir);
        config.driver = request.driver.as_deref().unwrap_or("libvirt").parse().map_err(|e| wrong(&e))?;
        // Through the same checks as a file that an admin wrote.
        ModuleConfig::parse(&config.to_xml(), Path::new("the module's userconfig.xml"))
            .map_err(|e| failed(2, chain(&e)))?;
        Ok(Job { cluster, me, peer, config })
    }

    /// Looks on both nodes, and touches nothing. Gives what the operator should know.
    async fn check_both(&self, job: &Job) -> Result<Vec<String>, ErrorBody> {
        let (paths, config) = (self.paths.clone(), job.config.clone());
        let (question, notes) = blocking(move || match config.driver {
            Driver::Fake if std::fs::read_dir(&config.dir).is_ok_and(|mut dir| dir.next().is_some()) => {
                Ok((None, Vec::new()))
            }
            Driver::Fake => Err(failed(3, format!("{} holds no files of a VM", config.dir.display()))),
            Driver::Libvirt => {
                let host = vm_host(&config)?;
                let plan = protect::preflight(&paths, &config.name, &config.vm, &config.dir, &*host, &QemuImg)?;
                Ok((Some(protect::peer::question(&plan)?), plan.notes))
            }
        })
        .await?;
        let check = PeerStep::Check {
            version: VERSION.to_owned(),
            module: job.config.name.to_string(),
            dir: job.config.dir.clone(),
            question,
        };
        let answer = self.ask_peer(&job.cluster, &job.peer, &check).await?;
        if !answer.reasons.is_empty() {
            return Err(failed(3, answer.reasons.join("\n")));
        }
        Ok(notes)
    }

    async fn ask_peer(&self, cluster: &Cluster, peer: &NodeName, step: &PeerStep) -> Result<PeerStepAnswer, ErrorBody> {
        self.daemon(cluster, peer)?.post("/v1/protect/peer", step, PEER_TIME).await
    }

    async fn make_module(&self, job: &Job) -> Result<(), ErrorBody> {
        let voters = self.voters(&job.cluster, &job.me, &job.peer);
        let mut ids = Vec::new();
        for voter in &voters {
            ids.push(self.make_voter(voter, job.config.id).await?);
        }
        let (paths, config) = (self.paths.clone(), job.config.clone());
        let replica = blocking(move || gather_here(&paths, &config)).await?;
        let take = PeerStep::Take { xml: job.config.to_xml() };
        self.ask_peer(&job.cluster, &job.peer, &take).await?;
        job.config.store(&self.paths).map_err(|e| failed(1, chain(&e)))?;
        self.first_record(&voters, job.config.id, replica, ids).await?;
        let (paths, config) = (self.paths.clone(), job.config.clone());
        blocking(move || {
            if config.driver == Driver::Libvirt {
                install_hook(&paths)?;
            }
            Ok(protect::commit(&paths, &config.name)?)
        })
        .await
    }

    fn voters(&self, cluster: &Cluster, me: &NodeName, peer: &NodeName) -> Vec<Place> {
        places(&self.paths, cluster, me, peer)
    }

    async fn make_voter(&self, voter: &Place, module: ModuleId) -> Result<AcceptorId, ErrorBody> {
        match ask_once(&self.paths, voter, module, Ask::Make).await {
            Ok(Reply::Id(Some(id))) => Ok(id),
            Ok(Reply::Refused(why)) => Err(failed(1, format!("{} keeps no vote of it: {why}", voter.name))),
            Ok(_) => Err(failed(1, format!("{} gives no clear answer to a request for its vote", voter.name))),
            Err(e) => Err(failed(
                3,
                format!(
                    "{} cannot be asked for its vote ({e}); all three are needed to protect a VM: `vmtwin cluster status`",
                    voter.name
                ),
            )),
        }
    }

    /// The module's first record, by a round over its voters.
    async fn first_record(
        &self,
        voters: &[Place],
        module: ModuleId,
        replica: ReplicaId,
        ids: Vec<AcceptorId>,
    ) -> Result<(), ErrorBody> {
        let record = Record::first(RecordId(host::random()), replica, ids.clone());
        let own = ids[0];
        let first_nonce = u64::try_from(host::random() >> 65).expect("63 bits fit");
        let setup = Setup { me: replica, own, acceptors: ids, record: None, broken: false, first_nonce };
        let mut arbiter = Arbiter::new(setup, host::now());
        let (acceptors, mut news) = Acceptors::connect(&self.paths, voters.to_vec(), module);
        let round = async {
            let mut event = Event::Want { id: record.id, change: Change::First(record.clone()) };
            loop {
                let mut effects = Vec::new();
                arbiter.step(host::now(), event, &mut effects);
                for effect in effects {
                    match effect {
                        // One that is not connected yet is asked again.
                        Effect::Ask { to, nonce, request } => drop(acceptors.ask(to, nonce, request)),
                        Effect::Known(known) if known.id == record.id => return Ok(()),
                        Effect::NotLanded(_) | Effect::Known(_) => {
                            return Err(failed(1, "another record of this module is there already"));
                        }
                        _ => {}
                    }
                }
                let now = host::now();
                let wait = arbiter.wake(now).since(now);
                event = match timeout(wait, news.recv()).await {
                    Ok(Some(News::Answer { nonce, answer, .. })) => {
                        Event::Answered { from: answer.acceptor, nonce, answer }
                    }
                    _ => Event::Tick,
                };
            }
        };
        timeout(ROUND_TIME, round).await.unwrap_or_else(|_| {
            Err(failed(1, "the voters did not agree on the module's first record in time: `vmtwin cluster status`"))
        })
    }

    /// A run that was cut (the host or the daemon died) is undone: its journal stands until the module is whole.
    async fn take_back_an_older_run(&self, job: &Job) -> Result<(), ErrorBody> {
        let pending = protect::pending(&self.paths, &job.config.name)?;
        match pending {
            None => Ok(()),
            Some(pending) if pending.plan.kind == protect::Kind::Protect => {
                host::info(&format!("protect of {}: an earlier run was cut and is taken back", job.config.name));
                // It is the older run's module that goes.
                let old = self.module(job.config.name.as_str())?;
                let config =
                    ModuleConfig { dir: pending.plan.dir.clone(), ..old.unwrap_or_else(|| job.config.clone()) };
                let (cluster, me, peer) = (job.cluster.clone(), job.me.clone(), job.peer.clone());
                self.take_back(&Job { cluster, me, peer, config }).await
            }
            Some(_) => Err(failed(
                3,
                format!(
                    "an earlier `vmtwin unprotect` of it was cut: run `vmtwin unprotect {}` again first",
                    job.config.name
                ),
            )),
        }
    }

    /// Undoes all that `make_module` may have done.
    async fn take_back(&self, job: &Job) -> Result<(), ErrorBody> {
        let (name, id) = (&job.config.name, job.config.id);
        let drop_step = PeerStep::Drop { module: name.to_string(), id: id.to_string() };
        let dropped = self.ask_peer(&job.cluster, &job.peer, &drop_step).await;
        self.forget_votes(&self.voters(&job.cluster, &job.me, &job.peer), id).await;
        forget_config(&self.paths, name)?;
        let (paths, config) = (self.paths.clone(), job.config.clone());
        blocking(move || {
            if config.driver == Driver::Libvirt {
                let host = vm_host(&config)?;
                protect::undo(&paths, &config.name, &*host, &QemuImg, &mut |_| {})?;
            }
            forget_state(&paths, &config.name)
        })
        .await?;
        dropped.map(|_| ())
    }

    /// Votes that stay behind do no harm: nobody has the module's id any more.
    async fn forget_votes(&self, voters: &[Place], module: ModuleId) {
        for voter in voters {
            if let Err(e) = ask_once(&self.paths, voter, module, Ask::Forget).await {
                host::warn(&format!("{} keeps a vote of a module that is gone: {e}", voter.name));
            }
        }
    }

    /// This node's part, asked by the other one.
    ///
    /// # Errors
    /// Where a step fails. A refusal is an answer.
    pub async fn protect_step(&self, step: PeerStep) -> Result<PeerStepAnswer, ErrorBody> {
        let paths = self.paths.clone();
        match step {
            PeerStep::Check { version, module, dir, question } => {
                let name = ModuleName::new(&module).map_err(|e| failed(2, e.to_string()))?;
                let (_, me) = self.cluster()?;
                if version != VERSION {
                    let error = format!("{me} has version {VERSION}, not {version}: install the same on both nodes");
                    return Err(failed(3, error));
                }
                if self.module(&module)?.is_some() {
                    return Err(failed(3, format!("{me} has a module named {module} already")));
                }
                blocking(move || check_as_peer(&paths, &name, &dir, question)).await
            }
            PeerStep::Take { xml } => {
                let config = ModuleConfig::parse(&xml, Path::new("the given userconfig.xml"))
                    .map_err(|e| failed(2, chain(&e)))?;
                if self.module(config.name.as_str())?.is_some_and(|old| old.id != config.id) {
                    return Err(failed(3, format!("another module is named {} here", config.name)));
                }
                blocking(move || {
                    if config.driver == Driver::Libvirt {
                        install_hook(&paths)?;
                    }
                    config.store(&paths).map_err(|e| failed(1, chain(&e)))?;
                    Ok(PeerStepAnswer::default())
                })
                .await
            }
            PeerStep::Drop { module, id } => {
                if let Some(config) = self.module(&module)?
                    && config.id.to_string() == id
                {
                    forget_config(&paths, &config.name)?;
                    forget_state(&paths, &config.name)?;
                }
                Ok(PeerStepAnswer::default())
            }
            PeerStep::MayRetire { module } => {
                let config = self.module(&module)?.ok_or_else(|| no_module(&module))?;
                self.is_stopped(&config)?;
                Ok(PeerStepAnswer::default())
            }
            PeerStep::Retire { module, date } => {
                let config = self.module(&module)?.ok_or_else(|| no_module(&module))?;
                self.is_stopped(&config)?;
                if !date.bytes().all(|c| c.is_ascii_alphanumeric() || c == b'-') || date.len() > 40 {
                    return Err(failed(2, "this is no date"));
                }
                let answer = blocking({
                    let config = config.clone();
                    move || retire(&paths, &config, &date)
                })
                .await?;
                self.modules.forget(&config.name);
                Ok(answer)
            }
        }
    }

    fn is_stopped(&self, config: &ModuleConfig) -> Result<(), ErrorBody> {
        let name = &config.name;
        match self.modules.see(name) {
            Seen::Stopped | Seen::Down(_) if !self.paths.wanted(name).exists() => Ok(()),
            _ => {
                let (_, me) = self.cluster()?;
                Err(failed(3, format!("module {name} runs on {me}: `vmtwin stop {name}` first")))
            }
        }
    }

    /// Gives a VM back.
    ///
    /// # Errors
    /// Code 3 where it runs, or this node's copy is not the newest.
    pub async fn unprotect(self: Arc<Self>, request: UnprotectRequest) -> Result<Done, ErrorBody> {
        let _changing = self.changing.lock().await;
        let (cluster, me) = self.cluster()?;
        let config = self.module(&request.module)?.ok_or_else(|| no_module(&request.module))?;
        let name = &config.name;
        let peer = config.peer_of(&me).ok_or_else(|| failed(1, format!("module {name} is not on {me}")))?.clone();
        self.is_stopped(&config)?;
        self.ask_peer(&cluster, &peer, &PeerStep::MayRetire { module: name.to_string() }).await?;
        let voters = self.voters(&cluster, &me, &peer);
        self.check_newest(&config, &voters).await?;
        let (paths, given_back) = (self.paths.clone(), config.clone());
        let mut notes = blocking(move || match given_back.driver {
            Driver::Fake => Ok(Vec::new()),
            Driver::Libvirt => {
                let host = vm_host(&given_back)?;
                let (name, vm, dir) = (&given_back.name, &given_back.vm, &given_back.dir);
                let layout = request.restore_layout;
                Ok(protect::restore(&paths, name, vm, dir, layout, &*host, &QemuImg, &mut |_| {})?)
            }
        })
        .await?;
        let date = jiff::Zoned::now().strftime("%Y%m%d-%H%M%S").to_string();
        match self.ask_peer(&cluster, &peer, &PeerStep::Retire { module: name.to_string(), date }).await {
            Ok(answer) => notes.extend(answer.notes),
            Err(e) => notes.push(format!(
                "{peer} could not put its copy aside ({}): remove {} there, and {} when you do not need it any more",
                e.error,
                self.paths.modules().join(name.as_str()).display(),
                config.dir.display()
            )),
        }
        self.forget_votes(&voters, config.id).await;
        forget_config(&self.paths, name)?;
        forget_state(&self.paths, name)?;
        self.modules.forget(name);
        Ok(Done { notes, going_on: false })
    }

    /// Only a copy that has every acknowledged write is given back: what a majority of voters accepted names it.
    async fn check_newest(&self, config: &ModuleConfig, voters: &[Place]) -> Result<(), ErrorBody> {
        let metadata = self.paths.module_lib(&config.name);
        let state = State::load(&metadata).map_err(|e| failed(1, chain(&e)))?;
        let mut answers = Vec::new();
        for voter in voters {
            if let Ok(Reply::Core(answer)) =
                ask_once(&self.paths, voter, config.id, Ask::Core(Request::Read { candidate: None })).await
                && let CoreReply::State(state) = answer.reply
            {
                answers.push(state.accepted.map(|accepted| accepted.record));
            }
        }
        if answers.len() * 2 <= voters.len() {
            return Err(failed(3, "too few voters answer to tell which copy is the newest: `vmtwin cluster status`"));
        }
        let newest = answers.into_iter().flatten().max_by_key(|record| (record.epoch, record.generation));
        let name = &config.name;
        match (state, newest) {
            (Some(state), Some(record)) if record.is_in_sync(state.replica) => Ok(()),
            // A `protect` that never came to its first record.
            (_, None) => Ok(()),
            _ => Err(failed(
                3,
                format!(
                    "this node's copy of {name} is not up to date: unprotect it on the other node, or `vmtwin start {name}`, wait until it is green, stop, and try again"
                ),
            )),
        }
    }
}

fn install_hook(paths: &Paths) -> Result<(), ErrorBody> {
    let installed = hook::install_hook(paths, Path::new(hook::HOOKS));
    installed.map(drop).map_err(|e| failed(1, format!("cannot install libvirt's hook below {}: {e}", hook::HOOKS)))
}

fn gather_here(paths: &Paths, config: &ModuleConfig) -> Result<ReplicaId, ErrorBody> {
    let metadata = paths.module_lib(&config.name);
    std::fs::create_dir_all(&metadata).map_err(|e| failed(1, format!("cannot make {}: {e}", metadata.display())))?;
    match config.driver {
        Driver::Libvirt => {
            let host = vm_host(config)?;
            let plan = protect::preflight(paths, &config.name, &config.vm, &config.dir, &*host, &QemuImg)?;
            let mut last = "";
            let mut tell = |progress: &protect::Progress<'_>| {
                if progress.step != last {
                    last = progress.step;
                    host::info(&format!("protect: {} {}", progress.step, progress.path.display()));
                }
            };
            protect::gather(paths, &config.name, &plan, &*host, &QemuImg, &mut tell)?;
        }
        Driver::Fake => {
            let folder = config.dir.join(protect::METADATA);
            let xml = format!("<domain type=\"fake\"><name>{}</name></domain>\n", config.vm);
            std::fs::create_dir_all(&folder)
                .and_then(|()| std::fs::write(folder.join(protect::DOMAIN_XML), xml))
                .map_err(|e| failed(1, format!("cannot write into {}: {e}", folder.display())))?;
        }
    }
    create_replica(&config.dir, &metadata, config.id).map_err(|e| failed(1, chain(&e)))
}

fn check_as_peer(
    paths: &Paths,
    name: &ModuleName,
    dir: &Path,
    question: Option<Question>,
) -> Result<PeerStepAnswer, ErrorBody> {
    let mut reasons = Vec::new();
    match question {
        Some(question) => {
            let host = Libvirt::connect(SYSTEM_URI, &question.vm).map_err(|e| failed(1, chain(&e)))?;
            reasons = protect::peer::check(paths, name, &question, &host)?;
        }
        None if std::fs::read_dir(dir).is_ok_and(|mut dir| dir.next().is_some()) => {
            reasons.push(format!("{} on the peer is not empty: move it away", dir.display()));
        }
        None => {}
    }
    Ok(PeerStepAnswer { reasons, notes: Vec::new() })
}

fn retire(paths: &Paths, config: &ModuleConfig, date: &str) -> Result<PeerStepAnswer, ErrorBody> {
    let host = vm_host(config)?;
    let retired = protect::retire_peer(&config.vm, &config.dir, date, &*host)?;
    forget_config(paths, &config.name)?;
    forget_state(paths, &config.name)?;
    let kept = retired.dir.map(|dir| format!("the peer's copy was kept as {}: delete it when you like", dir.display()));
    Ok(PeerStepAnswer { reasons: Vec::new(), notes: kept.into_iter().collect() })
}

fn forget_config(paths: &Paths, name: &ModuleName) -> Result<(), ErrorBody> {
    remove_all(&paths.modules().join(name.as_str()))
}

/// The module's own state: record, log, map. Its directory is not touched. A journal stays: it belongs to the directory.
fn forget_state(paths: &Paths, name: &ModuleName) -> Result<(), ErrorBody> {
    if matches!(protect::pending(paths, name), Ok(None)) { remove_all(&paths.module_lib(name)) } else { Ok(()) }
}

fn remove_all(path: &Path) -> Result<(), ErrorBody> {
    match std::fs::remove_dir_all(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            Err(failed(1, format!("cannot remove {}: {e}", path.display())))
        }
        _ => Ok(()),
    }
}
