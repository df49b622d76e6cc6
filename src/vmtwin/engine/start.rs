//! `vmtwin module NAME`: reads the configuration, makes the parts and runs the control loop with them.
//!
//! Holds: nothing. Keeps out: decisions. What is wrong before the loop runs is told on stderr and in the event log, and ends
//! the process with 1: the daemon tries again, a few times.
use super::control::{Control, DataPort, News, OpenData, Parts};
use super::data::{self, DataThread, Orders};
use super::link::{self, LinkSettings};
use super::messages::{Lease, ToData};
use super::socket;
use super::vm::VmThread;
use crate::acceptors::{Acceptors, places};
use crate::config::{Cluster, Driver, ModuleConfig, OnGuestShutdown, Paths};
use crate::eventlog::{EventLog, Level};
use crate::keep::pass::Inbox;
use crate::store::replica::boot_id;
use crate::{host, trust};
use std::path::Path;
use std::sync::Arc;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};
use tokio::sync::watch;
use vmtwin_core::ids::{BootId, ModuleName, NodeName};
use vmtwin_core::module::{EXIT_FAILED, Settings};
use vmtwin_hypervisor::Hypervisor;
use vmtwin_hypervisor::fake::Fake;
use vmtwin_hypervisor::libvirt::{Libvirt, SYSTEM_URI};

/// Where a VM's replicated definition lies, in its directory.
const DEFINITION: &str = ".vmtwin/domain.xml";
/// The SELinux context in which confined VMs may use the mount.
const SELINUX_CONTEXT: &str = "system_u:object_r:svirt_image_t:s0";

/// Runs one module until it stops; the process's exit code: 0 stopped as ordered, 143 ended by SIGTERM, else it failed and
/// should be started again.
#[must_use]
pub fn run(paths: &Paths, module: &ModuleName) -> u8 {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let code = runtime.map_err(|e| format!("no event loop: {e}")).and_then(|runtime| {
        let code = runtime.block_on(run_loop(paths, module));
        // A handshake with a silent caller may still be waiting on its thread.
        runtime.shutdown_background();
        code
    });
    code.unwrap_or_else(|why| {
        host::warn(&format!("module {module}: {why}"));
        EXIT_FAILED
    })
}

async fn run_loop(paths: &Paths, module: &ModuleName) -> Result<u8, String> {
    let read = read(paths, module);
    let node = read.as_ref().map_or_else(|_| String::new(), |c| c.me.to_string());
    let mut log = EventLog::open(&paths.module_log(module), &node, module.as_str());
    let begun = read.and_then(|read| begin(paths, read));
    let (parts, news) = begun.inspect_err(|why| log.write(0, Level::Error, "not-started", why))?;
    log.write(0, Level::Info, "started", &format!("module process {}", std::process::id()));
    Control::new(parts(log)).run(news).await.map_err(|e| format!("no timer: {e}"))
}

struct Configured {
    cluster: Cluster,
    config: ModuleConfig,
    me: NodeName,
    peer: NodeName,
    boot: BootId,
}

fn read(paths: &Paths, module: &ModuleName) -> Result<Configured, String> {
    let cluster = Cluster::load(paths).map_err(|e| e.to_string())?;
    let config = ModuleConfig::load(paths, module).map_err(|e| e.to_string())?;
    config.check_nodes(&cluster)?;
    let me = trust::own_identity(paths).map_err(|e| e.to_string())?;
    let me = NodeName::new(&me.name).map_err(|e| e.to_string())?;
    let peer = config.peer_of(&me).ok_or_else(|| format!("module {module} is not on node {me}"))?.clone();
    let boot = boot_id().map_err(|e| format!("no boot id: {e}"))?;
    Ok(Configured { cluster, config, me, peer, boot })
}

type Begun<P> = (P, tokio::sync::mpsc::UnboundedReceiver<News>);

fn begin(paths: &Paths, read: Configured) -> Result<Begun<impl FnOnce(EventLog) -> Parts>, String> {
    let Configured { cluster, config, me, peer, boot } = read;
    let (to, news) = unbounded_channel();
    socket::listen(&paths.module_socket(&config.name), to.clone()).map_err(|e| format!("no control socket: {e}"))?;
    let vm = vm_thread(&config, to.clone())?;
    let lease = Arc::<Lease>::default();

    let (acceptors, mut answers) = Acceptors::connect(paths, places(paths, &cluster, &me, &peer), config.id);
    let to_loop = to.clone();
    tokio::spawn(async move {
        while let Some(news) = answers.recv().await {
            let _ = to_loop.send(News::Voters(news));
        }
    });

    let inbox = Inbox::bind(&paths.module_link(&config.name)).map_err(|e| format!("no socket for the peer: {e}"))?;
    let link_wanted = watch::Sender::new(false);
    let addresses = |node| cluster.node(node).into_iter().flat_map(crate::config::Node::link_addresses);
    let settings = LinkSettings {
        paths: paths.clone(),
        module: config.name.clone(),
        addresses: addresses(&peer).map(|a| (a.ip, !a.tls)).collect(),
        own_addresses: addresses(&me).map(|a| (a.ip, !a.tls)).collect(),
        me: me.clone(),
        peer: peer.clone(),
    };
    let clear = settings.addresses.first().is_some_and(|(_, clear)| *clear);
    let to_loop = to.clone();
    let deliver = Arc::new(move |socket| drop(to_loop.send(News::Link(socket))));
    link::start(settings, inbox, link_wanted.subscribe(), deliver);

    terminate_on_signal(&to).map_err(|e| format!("no signals: {e}"))?;
    let settings = Settings {
        module: config.name.to_string(),
        node: me.to_string(),
        peer: peer.to_string(),
        failover: true,
        restart_on_guest_shutdown: config.on_guest_shutdown == OnGuestShutdown::Restart,
        stop_limit: config.stop_timeout,
    };
    let open_data = open_data(data_settings(paths, &config, me, boot), lease.clone(), to);
    let parts = move |log| Parts {
        settings,
        link_protection: if clear { "clear" } else { "tls" },
        lease,
        open_data,
        voters: Box::new(acceptors),
        vm,
        log,
        link_wanted,
    };
    Ok((parts, news))
}

fn data_settings(paths: &Paths, config: &ModuleConfig, node: NodeName, boot: BootId) -> data::Settings {
    data::Settings {
        module: config.name.clone(),
        id: config.id,
        node,
        directory: config.dir.clone(),
        metadata: paths.module_lib(&config.name),
        backing: paths.backing(&config.name),
        boot,
        configuration: config.version,
        slow_peer_ms: u64::try_from(config.slow_peer.as_millis()).unwrap_or(u64::MAX),
        selinux_context: Path::new("/sys/fs/selinux/enforce").exists().then(|| SELINUX_CONTEXT.to_owned()),
    }
}

fn open_data(settings: data::Settings, lease: Arc<Lease>, to: UnboundedSender<News>) -> OpenData {
    Box::new(move || {
        let DataThread { orders, mut news, .. } = DataThread::spawn(settings.clone(), lease.clone())?;
        let to_loop = to.clone();
        tokio::spawn(async move {
            while let Some(news) = news.recv().await {
                let _ = to_loop.send(News::Data(news));
            }
        });
        Ok(Box::new(orders) as Box<dyn DataPort>)
    })
}

impl DataPort for Orders {
    fn order(&self, order: ToData) {
        // A thread that has ended said so, or why.
        let _ = self.send(order);
    }
}

fn vm_thread(config: &ModuleConfig, to: UnboundedSender<News>) -> Result<VmThread, String> {
    let hypervisor: Arc<dyn Hypervisor> = match config.driver {
        Driver::Libvirt => Arc::new(Libvirt::connect(SYSTEM_URI, &config.vm).map_err(|e| e.to_string())?),
        Driver::Fake => Arc::new(Fake::new(&config.vm)),
    };
    let tell = Arc::new(move |news| drop(to.send(News::Vm(news))));
    VmThread::start(hypervisor, config.dir.join(DEFINITION), tell).map_err(|e| format!("no thread for the VM: {e}"))
}

fn terminate_on_signal(to: &UnboundedSender<News>) -> std::io::Result<()> {
    for kind in [SignalKind::terminate(), SignalKind::interrupt()] {
        let mut signal = signal(kind)?;
        let to_loop = to.clone();
        tokio::spawn(async move {
            while signal.recv().await.is_some() {
                let _ = to_loop.send(News::Terminate);
            }
        });
    }
    Ok(())
}
