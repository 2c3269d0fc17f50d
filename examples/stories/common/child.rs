//! A child process of the example: started, listened to, killed.

use std::io::{self, BufRead, BufReader, Write};
use std::process::{self, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use onewrite::BoxError;
use serde::Serialize;
use serde::de::DeserializeOwned;

/// A child process that prints its progress as lines of JSON. Dropping the handle kills the child.
pub(crate) struct Child<P> {
    process: process::Child,
    input: ChildStdin,
    progress: Arc<Mutex<P>>,
    /// Reads the child's output to its end.
    reader: Option<thread::JoinHandle<()>>,
}

impl<P: Clone + Default + DeserializeOwned + Send + 'static> Child<P> {
    /// Starts this same executable. An environment variable holds its part: all users of the
    /// machine can see a command line.
    pub(crate) fn start(variable: &str, plan: &impl Serialize) -> Result<Self, BoxError> {
        let mut process = Command::new(std::env::current_exe()?)
            .env(variable, serde_json::to_string(plan)?)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let (input, output) =
            process.stdin.take().zip(process.stdout.take()).ok_or("the child has no pipes")?;
        let progress = Arc::<Mutex<P>>::default();
        let newest = Arc::clone(&progress);
        let reader = thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                if let Ok(line) = serde_json::from_str(&line) {
                    *newest.lock().unwrap_or_else(PoisonError::into_inner) = line;
                }
            }
        });
        Ok(Self { process, input, progress, reader: Some(reader) })
    }

    /// The newest line of progress.
    pub(crate) fn progress(&self) -> P {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Sends `SIGKILL` and waits for the end of the child: its file is free then.
    pub(crate) fn kill(&mut self) -> io::Result<()> {
        end(&mut self.process)?;
        self.hear_out();
        Ok(())
    }

    /// Asks the child to end.
    pub(crate) fn finish(&mut self) {
        // It fails only if the child is gone, which is noticed elsewhere.
        let _ = self.input.write_all(b"finish\n");
    }

    /// How it ended, if it has.
    pub(crate) fn ended(&mut self) -> io::Result<Option<ExitStatus>> {
        let status = self.process.try_wait()?;
        if status.is_some() {
            self.hear_out();
        }
        Ok(status)
    }

    /// Its last words.
    fn hear_out(&mut self) {
        if let Some(reader) = self.reader.take() {
            let _ = reader.join();
        }
    }
}

impl<P> Drop for Child<P> {
    fn drop(&mut self) {
        let _ = end(&mut self.process);
    }
}

fn end(process: &mut process::Child) -> io::Result<()> {
    process.kill()?;
    process.wait().map(drop)
}
