//! A private RabbitMQ node, by `scripts/rabbit-node`.

use std::process::{Command, Output};

use onewrite::broker::{RabbitMq, Topology};

use super::QUEUE;

const SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/rabbit-node");

/// Killed when dropped.
#[derive(Debug)]
pub struct Node {
    folder: tempfile::TempDir,
    port: String,
}

impl Node {
    /// Panics with what the script says where RabbitMQ is missing or does not start.
    pub fn start() -> Self {
        let port = said(Command::new(SCRIPT).arg("free-port").output().unwrap());
        let node = Self { folder: tempfile::tempdir().unwrap(), port: port.trim().to_owned() };
        said(node.script("start").arg(&node.port).output().unwrap());
        node
    }

    fn script(&self, verb: &str) -> Command {
        let mut command = Command::new(SCRIPT);
        command.arg(verb).arg(self.folder.path());
        command
    }

    pub fn url(&self) -> String {
        format!("amqp://guest:guest@127.0.0.1:{}/%2f", self.port)
    }
}

/// A publisher that declares its queue, durable. Nobody reads it.
pub fn publisher(url: &str) -> RabbitMq {
    RabbitMq::new(url).unwrap().declare(Topology::new().queue(QUEUE))
}

fn said(output: Output) -> String {
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success(),
        "RabbitMQ is missing or does not start (run: scripts/test packages): {error}"
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

impl Drop for Node {
    fn drop(&mut self) {
        let killed = self.script("stop").output().expect("the script runs");
        if !killed.status.success() && !std::thread::panicking() {
            panic!("the node does not end: {}", String::from_utf8_lossy(&killed.stderr));
        }
    }
}
