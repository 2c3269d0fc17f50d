//! A real RabbitMQ of a test's own: own ports, own node name, own folder, own epmd.
//!
//! **Invariants.** Nothing outlives the test process, however it ends: each process that is started has a small
//! supervisor, which reads a pipe from the test process and kills its charge when the pipe closes. Only processes
//! that were started here are killed, by their pid. A missing broker fails the test; it never skips it.

use std::ffi::OsStr;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

/// Where Debian puts the broker's programs. `RABBITMQ_BIN` names another folder, and with it another broker.
const SYSTEM_PROGRAMS: &str = "/usr/lib/rabbitmq/bin";
/// Mnesia writes later; Khepri, of RabbitMQ 4, has written before it answers.
const SETTLE: &str = "case lists:keymember(mnesia, 1, application:which_applications()) of \
    true -> mnesia:dump_log(), ok = mnesia:sync_log(); false -> ok end.";
const START_LIMIT: Duration = Duration::from_secs(180);

/// The largest message that these brokers take, in bytes. RabbitMQ's own 128 MiB would make tests slow.
pub(crate) const MESSAGE_BYTES_MAX: usize = 2 << 20;

/// Runs its arguments in the background, reports their pid, and kills them when its input ends. The pid cannot be
/// another's by then: the shell has not waited for it.
const SUPERVISOR: &str = r#""$@" </dev/null & pid=$!; echo $pid; read -r _; kill -9 $pid; wait $pid"#;

/// Removes a folder once its input has ended, and those who write into it have been killed for the same reason.
const CLEANER: &str = r#"echo $$; read -r _; for n in 1 2 3 4 5; do sleep 0.2; rm -rf "$1"; done"#;

/// A broker of one test. Dropping it stops it and removes its folder.
#[derive(Debug)]
pub(crate) struct RabbitNode {
    folder: PathBuf,
    name: String,
    place: Place,
    port: u16,
    dist_port: u16,
    epmd_port: u16,
    /// Where it listens as well; RabbitMQ 4 opens these later.
    more_ports: Vec<u16>,
    broker: Option<Supervised>,
    _epmd: Arc<Supervised>,
    _cleaner: Supervised,
}

/// Where a broker listens.
#[derive(Debug, Clone)]
pub(crate) struct Place {
    pub(crate) address: IpAddr,
    /// A process in whose network namespace it runs; in ours without one.
    pub(crate) namespace_of: Option<u32>,
}

impl RabbitNode {
    /// Starts a broker on 127.0.0.1 and waits until it takes logins.
    pub(crate) fn start() -> Self {
        Self::start_with("")
    }

    /// The same with more lines in its `rabbitmq.conf`.
    pub(crate) fn start_with(settings: &str) -> Self {
        Self::start_in(Place::HERE, settings)
    }

    /// The same, with the broker's own default for the largest message.
    pub(crate) fn start_with_default_message_size() -> Self {
        let mut node = Self::start_with("");
        // Read once, when it starts.
        std::fs::write(node.folder.join("rabbitmq.conf"), "").expect("write into the temporary folder");
        node.restart();
        node
    }

    /// Starts a broker somewhere else, where we can reach it.
    pub(crate) fn start_at(place: Place) -> Self {
        Self::start_in(place, "")
    }

    fn start_in(place: Place, settings: &str) -> Self {
        let epmd_port = free_port();
        let epmd = start_epmd(&place, epmd_port);
        let mut node = Self::prepare(place, settings, epmd_port, epmd);
        node.restart();
        node
    }

    fn prepare(place: Place, settings: &str, epmd_port: u16, epmd: Arc<Supervised>) -> Self {
        let server = programs().join("rabbitmq-server");
        assert!(
            server.exists(),
            "these tests need RabbitMQ, and {server:?} is missing: run `apt-get install rabbitmq-server`, or set RABBITMQ_BIN"
        );
        static COUNT: AtomicU32 = AtomicU32::new(0);
        // Not removed by a destructor: that of the shared broker never runs.
        let folder =
            tempfile::Builder::new().prefix("onewrite-rabbit-").tempdir().expect("a temporary folder").keep();
        let cleaner = Supervised::cleaner(&folder);
        std::fs::write(folder.join("plugins"), "[].\n").expect("write into the temporary folder");
        let more_ports = settings.lines().filter_map(listener_port).collect();
        // The default user may come from wherever a test puts the broker.
        let settings = format!("max_message_size = {MESSAGE_BYTES_MAX}\nloopback_users = none\n{settings}");
        std::fs::write(folder.join("rabbitmq.conf"), settings).expect("write into the temporary folder");
        let name = format!("ow{}_{}@localhost", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let (port, dist_port) = (free_port(), free_port());
        Self {
            folder,
            name,
            place,
            port,
            dist_port,
            epmd_port,
            more_ports,
            broker: None,
            _epmd: epmd,
            _cleaner: cleaner,
        }
    }

    /// `amqp://` with the default user, for the virtual host `/`.
    pub(crate) fn url(&self) -> String {
        self.url_as("guest", "guest", "%2f")
    }

    pub(crate) fn url_as(&self, user: &str, password: &str, vhost: &str) -> String {
        format!("amqp://{user}:{password}@{}:{}/{vhost}", self.place.address, self.port)
    }

    /// Where it takes AMQP connections, on 127.0.0.1.
    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    /// The secret that nodes of a cluster share. Before the first start.
    fn take_cookie(&self, cookie: &str) {
        use std::os::unix::fs::PermissionsExt;
        let path = self.folder.join(".erlang.cookie");
        std::fs::write(&path, cookie.replace(' ', "")).expect("write into the temporary folder");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o400)).expect("its own file");
    }

    /// Its version's first two numbers. What brokers do is not the same in all of them.
    pub(crate) fn version(&self) -> (u32, u32) {
        let said = self.ctl(&["eval", "rabbit_misc:version()."]);
        let mut numbers = said.trim().trim_matches('"').split('.').map(|number| number.parse::<u32>().ok());
        match (numbers.next().flatten(), numbers.next().flatten()) {
            (Some(major), Some(minor)) => (major, minor),
            _ => panic!("no version: {said:?}"),
        }
    }

    /// Waits until what was declared is on the broker's disk. RabbitMQ answers a declaration earlier: of about thirty
    /// kills within a second of a durable queue's declaration, one takes the queue and its confirmed messages along.
    pub(crate) fn settle_declarations(&self) {
        self.ctl(&["eval", SETTLE]);
    }

    /// Kills the broker with SIGKILL, as a power cut would end it. Its files stay. Call
    /// [`settle_declarations`](Self::settle_declarations) before, if anything was declared just now.
    pub(crate) fn kill9(&mut self) {
        drop(self.broker.take());
    }

    /// Starts the broker if it does not run.
    pub(crate) fn ensure_running(&mut self) {
        if self.broker.is_none() {
            self.restart();
        }
    }

    /// Starts the broker again, with the files it had.
    pub(crate) fn restart(&mut self) {
        self.kill9();
        let began = Instant::now();
        let log = self.folder.join("broker.out");
        let mut server = self.command("rabbitmq-server");
        // As under systemd: the script then becomes the broker, so the pid is the broker's.
        server.env("RUNNING_UNDER_SYSTEMD", "true");
        self.broker = Some(Supervised::start(&server, &log));
        while !self.answers() {
            if began.elapsed() > START_LIMIT {
                let log = std::fs::read_to_string(&log).unwrap_or_default();
                panic!("the broker {} was not up within {START_LIMIT:?}; it said:\n{log}", self.name);
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Stops the broker in its tracks (SIGSTOP): it keeps its connections and says nothing, as behind a dead network.
    pub(crate) fn freeze(&self) {
        self.signal("-STOP");
    }

    /// Lets it go on.
    pub(crate) fn thaw(&self) {
        self.signal("-CONT");
    }

    fn signal(&self, signal: &str) {
        let broker = self.broker.as_ref().expect("the broker runs");
        let status =
            Command::new("kill").args([signal, &broker.pid.to_string()]).status().expect("kill runs");
        assert!(status.success());
    }

    /// Runs `rabbitmqctl` and returns what it printed.
    pub(crate) fn ctl(&self, arguments: &[&str]) -> String {
        self.try_ctl(arguments).unwrap_or_else(|said| panic!("rabbitmqctl {arguments:?} failed: {said}"))
    }

    /// The same; what it printed when it failed is the error.
    pub(crate) fn try_ctl(&self, arguments: &[&str]) -> Result<String, String> {
        let Output { status, stdout, stderr } =
            self.command("rabbitmqctl").args(arguments).output().expect("rabbitmqctl runs");
        let said = String::from_utf8_lossy(&stdout).into_owned();
        if status.success() { Ok(said) } else { Err(said + &String::from_utf8_lossy(&stderr)) }
    }

    /// Raises the memory alarm: publishers are blocked at their next publish.
    pub(crate) fn block(&self) {
        self.ctl(&["set_vm_memory_high_watermark", "0.0001"]);
    }

    /// Ends the memory alarm.
    pub(crate) fn unblock(&self) {
        self.ctl(&["set_vm_memory_high_watermark", "0.4"]);
    }

    fn command(&self, script: &str) -> Command {
        let folder = &self.folder;
        let mut command = self.place.command(programs().join(script));
        command
            .env("HOME", folder)
            .env("ERL_EPMD_PORT", self.epmd_port.to_string())
            .env("ERL_EPMD_ADDRESS", "127.0.0.1")
            .env("RABBITMQ_NODENAME", &self.name)
            .env("RABBITMQ_NODE_IP_ADDRESS", self.place.address.to_string())
            .env("RABBITMQ_NODE_PORT", self.port.to_string())
            .env("RABBITMQ_DIST_PORT", self.dist_port.to_string())
            .env("RABBITMQ_MNESIA_BASE", folder.join("mnesia"))
            .env("RABBITMQ_LOG_BASE", folder.join("log"))
            .env("RABBITMQ_LOGS", "-")
            .env("RABBITMQ_CONFIG_FILE", folder.join("rabbitmq.conf"))
            .env("RABBITMQ_CONF_ENV_FILE", folder.join("none"))
            .env("RABBITMQ_ENABLED_PLUGINS_FILE", folder.join("plugins"))
            .env("RABBITMQ_PID_FILE", folder.join("pid"))
            .current_dir(folder);
        command
    }

    /// Whether the broker greets and takes our login, and all its listeners are there.
    fn answers(&self) -> bool {
        greets((self.place.address, self.port).into())
            && super::tap::Tap::try_connect(&self.url()).is_ok()
            && self.more_ports.iter().all(|port| TcpStream::connect((self.place.address, *port)).is_ok())
    }
}

impl Place {
    const HERE: Self = Self { address: IpAddr::V4(Ipv4Addr::LOCALHOST), namespace_of: None };

    /// `nsenter` becomes the program, so its pid is the program's.
    fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let Some(pid) = self.namespace_of else { return Command::new(program) };
        let mut command = Command::new("nsenter");
        command.args(["--net", "--target", &pid.to_string(), "--"]).arg(program);
        command
    }
}

/// Several brokers that are one cluster. Its nodes are killed and started again one by one.
#[derive(Debug)]
pub(crate) struct RabbitCluster {
    pub(crate) nodes: Vec<RabbitNode>,
}

impl RabbitCluster {
    /// Starts `count` brokers and joins them.
    pub(crate) fn start(count: usize) -> Self {
        let epmd_port = free_port();
        let epmd = start_epmd(&Place::HERE, epmd_port);
        let nodes: Vec<_> = (0..count)
            .map(|_| {
                let mut node = RabbitNode::prepare(Place::HERE, "", epmd_port, Arc::clone(&epmd));
                node.take_cookie("one cookie for all of the cluster");
                node.restart();
                node
            })
            .collect();
        for node in nodes.iter().skip(1) {
            node.ctl(&["stop_app"]);
            node.ctl(&["join_cluster", &nodes[0].name]);
            node.ctl(&["start_app"]);
        }
        Self { nodes }
    }

    pub(crate) fn urls(&self) -> Vec<String> {
        self.nodes.iter().map(RabbitNode::url).collect()
    }

    /// The place of the node that leads this quorum queue; asked of the first node that runs.
    pub(crate) fn leader(&self, queue: &str) -> Option<usize> {
        let said = self.running()?.ctl(&["--quiet", "list_queues", "--no-table-headers", "name", "leader"]);
        let leader = said.lines().find_map(|line| line.trim().strip_prefix(queue)).map(str::trim)?;
        self.nodes.iter().position(|node| node.name == leader)
    }

    /// How many members of this quorum queue are up.
    pub(crate) fn online(&self, queue: &str) -> usize {
        let arguments = ["--quiet", "list_queues", "--no-table-headers", "name", "online"];
        let said = self.running().map(|node| node.ctl(&arguments)).unwrap_or_default();
        let online = said.lines().find_map(|line| line.trim().strip_prefix(queue));
        online.map_or(0, |names| names.matches("@localhost").count())
    }

    fn running(&self) -> Option<&RabbitNode> {
        self.nodes.iter().find(|node| node.broker.is_some())
    }
}

/// The folder of the broker's programs: `rabbitmq-server`, `rabbitmqctl`, and `epmd` unless the system has it.
pub(crate) fn programs() -> PathBuf {
    let chosen = std::env::var_os("RABBITMQ_BIN").filter(|folder| !folder.is_empty());
    chosen.map_or_else(|| PathBuf::from(SYSTEM_PROGRAMS), PathBuf::from)
}

/// Erlang's name server, of a test's own.
fn start_epmd(place: &Place, port: u16) -> Arc<Supervised> {
    let theirs = programs().join("epmd");
    let mut epmd = place.command(if theirs.exists() { theirs } else { PathBuf::from("epmd") });
    epmd.args(["-port", &port.to_string(), "-address", "127.0.0.1"]);
    Arc::new(Supervised::start(&epmd, Path::new("/dev/null")))
}

/// The broker that tests share which neither kill nor block it. Give every queue and exchange a name of its own.
pub(crate) fn shared_node() -> &'static RabbitNode {
    static NODE: OnceLock<RabbitNode> = OnceLock::new();
    NODE.get_or_init(RabbitNode::start)
}

/// Of a line of `rabbitmq.conf` such as `listeners.ssl.1 = 127.0.0.1:5671`.
fn listener_port(line: &str) -> Option<u16> {
    let (name, value) = line.split_once('=')?;
    let at = name.trim().strip_prefix("listeners.").and(Some(value.trim()))?;
    Some(at.rsplit(':').next()?.parse().expect("a listener's port"))
}

fn greets(address: SocketAddr) -> bool {
    let Ok(mut stream) = TcpStream::connect_timeout(&address, Duration::from_secs(1)) else { return false };
    let mut first = [0];
    stream.set_read_timeout(Some(Duration::from_secs(2))).is_ok()
        && stream.write_all(b"AMQP\0\0\x09\x01").is_ok()
        && stream.read_exact(&mut first).is_ok()
        && first == [1]
}

/// A port nobody listens on, outside the range that outgoing connections take theirs from: a broker that is down for a
/// while finds its own again.
pub(crate) fn free_port() -> u16 {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    loop {
        let step = NEXT.fetch_add(1, Ordering::Relaxed);
        let port = 20_000 + (std::process::id() * 61 + step) % 12_000;
        let port = u16::try_from(port).expect("below 32,000");
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}

/// A process that ends when this is dropped, or when the test process does.
#[derive(Debug)]
pub(crate) struct Supervised {
    supervisor: Child,
    /// Of the process that is supervised.
    pid: u32,
}

impl Supervised {
    /// Removes the folder when everything else has ended.
    pub(crate) fn cleaner(folder: &Path) -> Self {
        let mut cleaner = Command::new("sh");
        cleaner.args(["-c", CLEANER, "cleaner"]).arg(folder);
        Self::spawn(cleaner)
    }

    pub(crate) fn start(command: &Command, log: &Path) -> Self {
        let log =
            std::fs::OpenOptions::new().create(true).append(true).open(log).expect("the log file opens");
        let mut supervisor = Command::new("sh");
        supervisor.args(["-c", SUPERVISOR, "supervisor"]).arg(command.get_program()).args(command.get_args());
        supervisor.envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))));
        if let Some(folder) = command.get_current_dir() {
            supervisor.current_dir(folder);
        }
        supervisor.stderr(log);
        Self::spawn(supervisor)
    }

    fn spawn(mut supervisor: Command) -> Self {
        let mut supervisor =
            supervisor.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("a shell starts");
        let stdout = supervisor.stdout.take().expect("it is piped");
        let mut pid = String::new();
        let mut lines = BufReader::new(stdout);
        lines.read_line(&mut pid).expect("the supervisor reports a pid");
        let pid = pid.trim().parse().unwrap_or_else(|_| panic!("the supervisor said {pid:?}"));
        // What the charge prints is read, so that it never waits for us.
        std::thread::spawn(move || std::io::copy(&mut lines, &mut std::io::sink()));
        Self { supervisor, pid }
    }
}

impl Drop for Supervised {
    fn drop(&mut self) {
        // Closing its input makes it do its last work.
        drop(self.supervisor.stdin.take());
        let _ = self.supervisor.wait();
    }
}
