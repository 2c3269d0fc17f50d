//! The end of a process, and its doubling: destructors of thread-locals, and `fork`.
//!
//! Goal: neither aborts a process, hangs it or damages a store. Method: this program starts each scenario as a process of its own,
//! with a limit of time. The process must end with success and write nothing to stderr. A harness of threads would not do: a
//! process that forks must not hold locks of other threads.
//!
//! `cargo test --test process NAME` runs the scenarios whose names hold `NAME`.

#![allow(missing_docs, unreachable_pub, clippy::unwrap_used, clippy::indexing_slicing, reason = "a test")]

#[cfg(unix)]
mod forked;
mod thread_locals;

use std::io::{Read, Write};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

/// A name, and what is done in a process of its own: it panics if something is wrong.
type Scenario = (&'static str, fn());

/// A scenario takes a second; the machine may be busy.
const LIMIT: Duration = Duration::from_secs(120);

fn scenarios() -> Vec<Scenario> {
    let mut scenarios = thread_locals::SCENARIOS.to_vec();
    #[cfg(unix)]
    scenarios.extend(forked::SCENARIOS);
    scenarios
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let [is_scenario, name] = &arguments[..]
        && is_scenario == "scenario"
    {
        let (_, run) = scenarios().into_iter().find(|(known, _)| known == name).expect("a known scenario");
        run();
        return ExitCode::SUCCESS;
    }
    let filters: Vec<_> = arguments.iter().filter(|argument| !argument.starts_with('-')).collect();
    let is_wanted = |name: &str| filters.is_empty() || filters.iter().any(|filter| name.contains(&**filter));
    let wanted: Vec<_> =
        scenarios().into_iter().map(|(name, _)| name).filter(|name| is_wanted(name)).collect();
    let mut out = std::io::stdout();
    if arguments.iter().any(|argument| argument == "--list") {
        wanted.iter().for_each(|name| writeln!(out, "{name}: test").unwrap());
        return ExitCode::SUCCESS;
    }
    writeln!(out, "\nrunning {} tests", wanted.len()).unwrap();
    let mut failed = 0;
    for name in &wanted {
        match in_a_process(name) {
            Ok(()) => writeln!(out, "test {name} ... ok").unwrap(),
            Err(why) => {
                failed += 1;
                writeln!(out, "test {name} ... FAILED\n{why}").unwrap();
            }
        }
    }
    let result = if failed == 0 { "ok" } else { "FAILED" };
    let passed = wanted.len() - failed;
    writeln!(
        out,
        "\ntest result: {result}. {passed} passed; {failed} failed; 0 ignored; 0 measured; 0 filtered out"
    )
    .unwrap();
    ExitCode::from(u8::from(failed > 0))
}

fn in_a_process(name: &str) -> Result<(), String> {
    let mut process = Command::new(std::env::current_exe().unwrap())
        .args(["scenario", name])
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stderr = process.stderr.take().unwrap();
    let said = std::thread::spawn(move || {
        let mut said = String::new();
        let _ = stderr.read_to_string(&mut said);
        said
    });
    let deadline = Instant::now() + LIMIT;
    let status = loop {
        if let Some(status) = process.try_wait().unwrap() {
            break status;
        }
        if Instant::now() >= deadline {
            process.kill().unwrap();
            process.wait().unwrap();
            return Err(format!("it has not ended within {LIMIT:?}"));
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    // A process that was forked from it, and hangs, would keep the pipe open.
    while !said.is_finished() {
        if Instant::now() >= deadline {
            return Err(format!("it ended ({status}), and a process that it had forked has not"));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    let said = said.join().unwrap();
    if status.success() && said.is_empty() {
        return Ok(());
    }
    Err(format!("{status}\n{said}"))
}
