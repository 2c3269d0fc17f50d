//! `torture-check FOLDER`: judges the run in this folder. Sentences on stderr, the last line on stdout; exit 1 if a promise was broken, 2 if
//! it cannot judge.

use std::path::Path;
use std::process::ExitCode;

fn main() -> ExitCode {
    let Some(folder) = std::env::args_os().nth(1) else {
        eprintln!("usage: torture-check FOLDER");
        return ExitCode::from(2);
    };
    match onewrite_torture_checker::sources::judge(Path::new(&folder)) {
        Ok((run, verdict)) => {
            for sentence in &verdict.sentences {
                eprintln!("{sentence}");
            }
            if !verdict.is_clean() {
                eprintln!("seed {}, judged in {}", run.seed, Path::new(&folder).display());
            }
            println!("{}", verdict.last_line(&run));
            ExitCode::from(u8::from(!verdict.is_clean()))
        }
        Err(error) => {
            eprintln!("cannot judge {}: {error}", Path::new(&folder).display());
            ExitCode::from(2)
        }
    }
}
