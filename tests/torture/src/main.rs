//! The torture test: `run` is the conductor, the other sub-commands are the processes that it starts and kills.

mod app;
mod consume;
mod plan;
mod random;
mod run;
#[allow(dead_code, reason = "what the tests need and this does not")]
mod support;
mod tap;
mod writer;

use std::process::ExitCode;

type Result<T, E = Box<dyn std::error::Error + Send + Sync>> = std::result::Result<T, E>;

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    let command = arguments.next().unwrap_or_default();
    let done = match command.as_str() {
        "app" => plan::from(arguments.next()).and_then(|plan| app::run(&plan)),
        "consume" => plan::from(arguments.next()).and_then(|plan| consume::run(&plan)),
        "tap" => plan::from(arguments.next()).and_then(|plan| tap::run(&plan)),
        "run" => return run::main(arguments.collect()),
        _ => {
            Err("usage: torture run [--events N] [--app-kills N] [--broker-kills N] [--seconds N] [--seed S]"
                .into())
        }
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("torture {command}: {error}");
            ExitCode::from(3)
        }
    }
}
