//! A network of a test's own: two namespaces and a cable between them that can be pulled.
//!
//! A test runs itself again inside the near namespace ([`enter`]); that process makes the far one and the cable ([`Cable::lay`]). All of
//! it lives in these processes and goes with them. Without root a user namespace is made around it.

use std::path::Path;
use std::process::{Child, Command, Stdio};

use crate::scratch::child_under;

pub(crate) const NEAR: &str = "10.77.0.1";
pub(crate) const FAR: &str = "10.77.0.2";

/// What puts a program into a network namespace of its own, with the right to change it.
fn unshare() -> Vec<&'static str> {
    let am_root = run_output("id", &["-u"]) == "0";
    if am_root {
        vec!["unshare", "--net", "--mount"]
    } else {
        vec!["unshare", "--net", "--mount", "--map-root-user"]
    }
}

/// Runs the test `task` of this binary in a namespace of its own and shows what it said if it fails.
pub(crate) fn enter(task: &str, path: &Path, argument: &str) -> String {
    for program in ["unshare", "nsenter", "ip"] {
        let found = Command::new(program).arg("--help").output().is_ok();
        assert!(found, "this test needs `{program}`: apt-get install iproute2 util-linux");
    }
    let output = child_under(&unshare(), task, path, argument).output().unwrap();
    let shown =
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(
        output.status.success() && shown.contains("all well"),
        "in its namespaces (which need root, or unprivileged user namespaces):\n{shown}"
    );
    shown
}

/// Runs a program that must succeed.
pub(crate) fn run(line: &str) {
    let mut words = line.split_whitespace();
    let program = words.next().expect("a program");
    let output = Command::new(program).args(words).output().unwrap_or_else(|error| panic!("{line}: {error}"));
    assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
}

fn run_output(program: &str, arguments: &[&str]) -> String {
    let output =
        Command::new(program).args(arguments).output().unwrap_or_else(|error| panic!("{program}: {error}"));
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

/// The far namespace, held open by a process that waits for its input to end, and the cable to it.
pub(crate) struct Cable {
    holder: Child,
}

impl Cable {
    /// From within the near namespace.
    pub(crate) fn lay() -> Self {
        run("ip link set lo up");
        let mut holder = Command::new("unshare");
        holder
            .args(["--net", "sh", "-c", "echo ready; read -r _"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        let mut holder = holder.spawn().expect("unshare runs");
        // `unshare` has become the shell by then, in its namespace.
        let mut ready = [0; 6];
        std::io::Read::read_exact(holder.stdout.as_mut().expect("it is piped"), &mut ready)
            .expect("it is ready");
        let cable = Self { holder };
        run(&format!("ip link add near type veth peer name far netns {}", cable.far_pid()));
        run(&format!("ip addr add {NEAR}/24 dev near"));
        run("ip link set near up");
        cable.in_far(&format!("ip addr add {FAR}/24 dev far"));
        cable.in_far("ip link set far up");
        cable.in_far("ip link set lo up");
        // Known once and for all: a pulled cable then swallows packets, instead of reporting that nobody has the address.
        run(&format!("ip neigh replace {FAR} lladdr {} dev near nud permanent", cable.far_address()));
        cable
    }

    /// A process in the far namespace, for whoever wants to enter it.
    pub(crate) fn far_pid(&self) -> u32 {
        self.holder.id()
    }

    /// Runs a program there, which must succeed.
    pub(crate) fn in_far(&self, line: &str) {
        run(&format!("nsenter --net --target {} {line}", self.far_pid()));
    }

    /// Pulls the cable at the far end: both sides keep their sockets and addresses, and hear nothing.
    pub(crate) fn pull(&self) {
        self.in_far("ip link set far down");
    }

    pub(crate) fn plug(&self) {
        self.in_far("ip link set far up");
    }

    fn far_address(&self) -> String {
        let pid = self.far_pid().to_string();
        let shown = run_output("nsenter", &["--net", "--target", &pid, "ip", "-o", "link", "show", "far"]);
        let mut words = shown.split_whitespace().skip_while(|word| *word != "link/ether");
        words.nth(1).expect("an address").to_owned()
    }
}

impl Drop for Cable {
    fn drop(&mut self) {
        drop(self.holder.stdin.take());
        let _ = self.holder.wait();
    }
}
