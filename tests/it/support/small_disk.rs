//! A disk of a few megabytes: a test runs itself again in a mount namespace of its own and mounts one there. It goes with the process.

use std::path::Path;
use std::process::Command;

use super::netns::run;
use crate::scratch::child_under;

/// What puts a program into a mount namespace of its own.
pub(crate) fn unshare() -> Vec<&'static str> {
    let id = Command::new("id").arg("-u").output().expect("`id` can be run");
    let mut line = vec!["unshare", "--mount"];
    if String::from_utf8_lossy(&id.stdout).trim() != "0" {
        line.push("--map-root-user");
    }
    line
}

/// Runs the test `task` of this binary in a mount namespace of its own. It prints "all well" at its end.
pub(crate) fn enter(task: &str, path: &Path, argument: &str) {
    let output =
        child_under(&unshare(), task, path, argument).output().expect("`unshare` (util-linux) can be run");
    let shown =
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(
        output.status.success() && shown.contains("all well"),
        "in its namespace (which needs root, or unprivileged user namespaces):\n{shown}"
    );
}

/// Mounts a disk of so many megabytes over a folder. From within the namespace.
pub(crate) fn mount(folder: &Path, megabytes: u32) {
    run(&format!("mount -t tmpfs -o size={megabytes}m tmpfs {}", folder.display()));
}
