//! What runs in a process of its own, because it is to be killed or because its memory is to be looked at: this program again, with its part as its
//! first argument. It is spoken with line by line.

use std::io::{BufRead, BufReader, Lines, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitCode, Stdio};

use crate::peer::Failure;
use crate::work::{recovery, scale};

const FIRST: &str = "as-child";

/// Another process. Killed when dropped.
pub(crate) struct Process {
    child: Child,
    input: ChildStdin,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Process {
    pub(crate) fn start(work: &str, path: &Path, arguments: &[String]) -> Result<Self, Failure> {
        let mut child = Command::new(std::env::current_exe()?)
            .args([FIRST, work])
            .arg(path)
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let input = child.stdin.take().ok_or("no input")?;
        let output = child.stdout.take().ok_or("no output")?;
        Ok(Self { child, input, lines: BufReader::new(output).lines() })
    }

    pub(crate) fn say(&mut self, line: &str) -> Result<(), Failure> {
        writeln!(self.input, "{line}")?;
        Ok(self.input.flush()?)
    }

    /// The next line it says: numbers.
    pub(crate) fn hear(&mut self) -> Result<Vec<f64>, Failure> {
        let line = self.lines.next().ok_or("the child process ended by itself")??;
        line.split(' ').map(|word| word.parse().map_err(|_| format!("it said: {line}").into())).collect()
    }

    /// SIGKILL; then what it had said until then and nobody has heard.
    pub(crate) fn kill(mut self) -> Result<Vec<String>, Failure> {
        self.child.kill()?;
        self.child.wait()?;
        let mut left = Vec::new();
        for line in self.lines.by_ref() {
            left.push(line?);
        }
        Ok(left)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Where it has ended already there is nothing to kill.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Says numbers to whoever started this process.
pub(crate) fn report(numbers: &[f64]) -> Result<(), Failure> {
    let words: Vec<_> = numbers.iter().map(f64::to_string).collect();
    let mut output = std::io::stdout().lock();
    writeln!(output, "{}", words.join(" "))?;
    Ok(output.flush()?)
}

/// If this process is such a child, its whole life.
pub(crate) fn run() -> Option<ExitCode> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [first, work, path, rest @ ..] = arguments.as_slice() else { return None };
    if first != FIRST {
        return None;
    }
    let ended = match work.as_str() {
        recovery::CHILD => recovery::child(Path::new(path), rest),
        scale::CHILD => scale::child(Path::new(path), rest),
        _ => Err(format!("nobody is called {work}").into()),
    };
    Some(match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("versus, {work}: {failure}");
            ExitCode::FAILURE
        }
    })
}
