//! onewrite beside what a user would pick instead: SQLite with an outbox table, fjall, plain redb, a bare lapin loop, a bare
//! `fdatasync`. Each peer is written as its own users would write it at its best; its settings are in its file under `peer`.
//!
//! All sides of a comparison take turns within each round, in one process, on one disk, beside one broker; what is reported is the ratio of medians.
//! Absolute figures are of the machine and the moment, and are printed only to make sense of the ratios.

mod child;
mod flow;
mod node;
mod peer;
mod plot;
mod report;
mod tap;
mod work;

use std::error::Error;
use std::path::PathBuf;
use std::process::ExitCode;

use lexopt::Arg;

use crate::report::Report;

const USAGE: &str = "\
usage: versus WORK [--quick] [--json] [--rounds N] [--folder DIR] [--plot FILE]

  WORK          commit, drain, latency, pipeline, replay, recovery, scale, or all
  --quick       at reduced size: each work within two minutes; for a look, not for a claim
  --json        the last line is one object of ratios, ours over the peer's
  --rounds N    interleaved rounds
  --folder DIR  where the files are made; a folder of its own in it is removed afterwards (default: the system's for scratch)
  --plot FILE   commit only: an SVG of commits per second against writers
";

/// How large, and where.
pub(crate) struct Setup {
    pub(crate) quick: bool,
    pub(crate) rounds: Option<usize>,
    /// Removed at the end.
    pub(crate) folder: PathBuf,
    pub(crate) plot: Option<PathBuf>,
}

impl Setup {
    /// One of two sizes.
    pub(crate) fn size<T>(&self, quick: T, full: T) -> T {
        if self.quick { quick } else { full }
    }
}

struct Arguments {
    works: Vec<&'static work::Work>,
    quick: bool,
    json: bool,
    rounds: Option<usize>,
    folder: Option<PathBuf>,
    plot: Option<PathBuf>,
}

fn arguments() -> Result<Option<Arguments>, Box<dyn Error>> {
    let mut name = None;
    let (mut quick, mut json, mut rounds, mut folder, mut plot) = (false, false, None, None, None);
    let mut parser = lexopt::Parser::from_env();
    while let Some(argument) = parser.next()? {
        match argument {
            Arg::Value(value) if name.is_none() => name = Some(value.to_string_lossy().into_owned()),
            Arg::Long("quick") => quick = true,
            Arg::Long("json") => json = true,
            Arg::Long("rounds") => {
                let text = parser.value()?;
                let count = text.to_str().and_then(|text| text.parse().ok()).filter(|count| *count > 0);
                rounds =
                    Some(count.ok_or_else(|| format!("--rounds {}: not a number above 0", text.display()))?);
            }
            Arg::Long("folder") => folder = Some(parser.value()?.into()),
            Arg::Long("plot") => plot = Some(parser.value()?.into()),
            Arg::Long("help") | Arg::Short('h') => return Ok(None),
            _ => return Err(argument.unexpected().into()),
        }
    }
    let name = name.ok_or("no WORK is named")?;
    let works: Vec<_> = work::ALL.iter().filter(|work| name == "all" || work.name == name).collect();
    if works.is_empty() {
        return Err(format!("no work is named '{name}'").into());
    }
    if plot.is_some() && name != "commit" {
        return Err(format!("--plot: only commit has a plot, not {name}").into());
    }
    Ok(Some(Arguments { works, quick, json, rounds, folder, plot }))
}

fn run(arguments: Arguments) -> Result<(), Box<dyn Error>> {
    let scratch = arguments.folder.unwrap_or_else(std::env::temp_dir);
    let folder = tempfile::Builder::new()
        .prefix("versus")
        .tempdir_in(&scratch)
        .map_err(|error| format!("--folder {}: {error}", scratch.display()))?;
    let setup = Setup {
        quick: arguments.quick,
        rounds: arguments.rounds,
        folder: folder.path().to_owned(),
        plot: arguments.plot,
    };
    let mut all = Report::default();
    for work in arguments.works {
        println!("== {}: {}", work.name, work.about);
        all.join((work.run)(&setup)?);
    }
    println!("\n{all}");
    if arguments.json {
        println!("{}", all.json());
    }
    Ok(())
}

fn main() -> ExitCode {
    if let Some(ended) = child::run() {
        return ended;
    }
    match arguments() {
        Ok(Some(arguments)) => match run(arguments) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("versus: {error}");
                ExitCode::FAILURE
            }
        },
        Ok(None) => {
            print!("{USAGE}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprint!("versus: {error}\n{USAGE}");
            ExitCode::from(2)
        }
    }
}
