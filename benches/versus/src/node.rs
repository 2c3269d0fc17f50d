//! A private RabbitMQ node, on loopback, with its files beside the stores'.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

const SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../scripts/rabbit-node");

/// Killed when dropped.
pub(crate) struct Node {
    folder: PathBuf,
    pub(crate) url: String,
}

fn script(arguments: &[&str]) -> Result<String, Box<dyn Error>> {
    let Output { status, stdout, stderr } =
        Command::new(SCRIPT).args(arguments).output().map_err(|error| format!("{SCRIPT}: {error}"))?;
    if !status.success() {
        return Err(
            format!("{}: {}", arguments.join(" "), String::from_utf8_lossy(&stderr).trim_end()).into()
        );
    }
    Ok(String::from_utf8(stdout)?.trim().to_owned())
}

impl Node {
    pub(crate) fn start(folder: &Path) -> Result<Self, Box<dyn Error>> {
        let folder = folder.join("rabbit");
        let port = script(&["free-port"])?;
        // Before the start, so that what a failed one leaves behind is ended as well.
        let node = Self { url: format!("amqp://guest:guest@127.0.0.1:{port}/%2f"), folder };
        script(&["start", &node.folder.display().to_string(), &port]).map_err(|error| {
            format!("no RabbitMQ to measure beside (scripts/test packages installs it): {error}")
        })?;
        Ok(node)
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let folder = self.folder.display().to_string();
        // At once, for there is nothing to save. That it fails says no more than that the node has not come up, or has ended.
        let _ = script(&["kill9", &folder]);
        // Ends what is left of it, and its helpers.
        let ended = script(&["stop", &folder]);
        if let Err(error) = ended.and_then(|_| Ok(std::fs::remove_dir_all(&self.folder)?)) {
            eprintln!("versus: RabbitMQ in {folder} is not ended: {error}");
        }
    }
}
