//! A [`Publisher`] of our own: publishes go over a socket, and outcomes come back. Another broker
//! can stand behind a relay in the same way, because the trait is public.
//!
//! One thread connects, reads, and connects again. That thread alone sends `Up`, `Outcomes` and
//! `Down`, so the relay gets them in their order, and nothing of an epoch after its end. A second
//! thread per connection writes, so that `publish` never blocks. The window of the relay bounds the
//! messages that wait for the writing thread.

use std::collections::BTreeSet;
use std::io::{self, BufReader, BufWriter, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use onewrite::broker::{Epoch, Publisher, PublisherEvent, PublisherEvents};
use onewrite::{Fault, FaultClass, Outcome, Outgoing, SettingError, Ticket};

use crate::frames::{self, Publish, Word};

/// First and longest wait between attempts to connect.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(50), Duration::from_millis(500));
/// The longest time of one attempt.
const CONNECT: Duration = Duration::from_secs(2);

#[derive(Debug)]
pub(crate) struct SocketPublisher {
    address: SocketAddr,
    link: Arc<Mutex<Link>>,
    running: Option<Running>,
}

#[derive(Debug)]
struct Running {
    events: PublisherEvents,
    /// Dropped to end the thread.
    stop: Sender<()>,
    ended: Receiver<()>,
}

/// The connection that is up, if one is.
#[derive(Debug, Default)]
struct Link {
    epoch: Epoch,
    up: Option<(TcpStream, Sender<Publish>)>,
    /// Isolated messages that await their outcome. Each gets exactly one, even if the connection
    /// ends.
    isolated: BTreeSet<Ticket>,
    stopped: bool,
}

impl SocketPublisher {
    pub(crate) fn new(address: SocketAddr) -> Self {
        Self { address, link: Arc::default(), running: None }
    }
}

impl Publisher for SocketPublisher {
    fn start(&mut self, events: PublisherEvents) -> Result<(), SettingError> {
        let (stop, stopped) = mpsc::channel();
        let (end, ended) = mpsc::channel();
        let connector =
            Connector { address: self.address, link: Arc::clone(&self.link), events: events.clone() };
        thread::spawn(move || {
            connector.run(&stopped);
            let _ = end.send(());
        });
        self.running = Some(Running { events, stop, ended });
        Ok(())
    }

    fn publish(&mut self, epoch: Epoch, outgoing: Outgoing) {
        let Some(running) = &self.running else { return };
        let mut link = lock(&self.link);
        let sent = link.epoch == epoch
            && link.up.as_ref().is_some_and(|(_, writer)| writer.send(Publish::new(&outgoing)).is_ok());
        match (outgoing.isolated, sent) {
            (false, _) => {} // the epoch is over: the message is dropped
            (true, true) => _ = link.isolated.insert(outgoing.ticket),
            (true, false) => {
                let unknown = Outcome::Unknown(outage("not sent: the connection is over"));
                running.events.send(PublisherEvent::Outcomes(vec![(outgoing.ticket, unknown)]));
            }
        }
    }

    fn stop(&mut self, deadline: Duration) {
        let Some(Running { stop, ended, .. }) = self.running.take() else { return };
        drop(stop);
        let mut link = lock(&self.link);
        link.stopped = true;
        if let Some((stream, _)) = &link.up {
            let _ = stream.shutdown(Shutdown::Both);
        }
        drop(link);
        let _ = ended.recv_timeout(deadline);
    }
}

/// The thread that owns the connection.
struct Connector {
    address: SocketAddr,
    link: Arc<Mutex<Link>>,
    events: PublisherEvents,
}

impl Connector {
    fn run(&self, stopped: &Receiver<()>) {
        let mut wait = BACKOFF.0;
        for number in 1.. {
            let epoch = Epoch(number);
            let mut was_up = false;
            let fault = match self.connect(epoch, &mut was_up) {
                Ok(()) => outage("the connection ended"),
                Err(error) => outage(&error.to_string()),
            };
            if !self.take_down(epoch, fault) {
                return;
            }
            wait = if was_up { BACKOFF.0 } else { (wait * 2).min(BACKOFF.1) };
            if stopped.recv_timeout(wait) == Err(RecvTimeoutError::Disconnected) {
                return;
            }
        }
    }

    /// One connection, from its beginning to its end.
    fn connect(&self, epoch: Epoch, was_up: &mut bool) -> io::Result<()> {
        let stream = TcpStream::connect_timeout(&self.address, CONNECT)?;
        stream.set_nodelay(true)?;
        let mut reader = BufReader::new(stream.try_clone()?);
        // A shut door accepts a connection and drops it. So only the greeting proves a connection.
        let Word::Ready = frames::read(&mut reader)? else {
            return Err(io::Error::other("the broker did not greet"));
        };
        let (writer, publishes) = mpsc::channel();
        let to = stream.try_clone()?;
        thread::spawn(move || write(&to, &publishes));
        {
            let mut link = lock(&self.link);
            if link.stopped {
                return Ok(());
            }
            link.epoch = epoch;
            link.up = Some((stream, writer));
        }
        *was_up = true;
        self.events.send(PublisherEvent::Up { epoch });
        loop {
            let Some((ticket, outcome)) = frames::read::<Word>(&mut reader)?.into_outcome() else { continue };
            lock(&self.link).isolated.remove(&Ticket(ticket));
            if !self.events.send(PublisherEvent::Outcomes(vec![(Ticket(ticket), outcome)])) {
                return Ok(());
            }
        }
    }

    /// Ends the epoch. Returns `false` if the publisher is gone.
    fn take_down(&self, epoch: Epoch, fault: Fault) -> bool {
        let mut link = lock(&self.link);
        if let Some((stream, _)) = link.up.take() {
            let _ = stream.shutdown(Shutdown::Both);
        }
        let isolated = std::mem::take(&mut link.isolated);
        drop(link);
        let unknown: Vec<_> =
            isolated.into_iter().map(|ticket| (ticket, Outcome::Unknown(fault.clone()))).collect();
        self.events.send(PublisherEvent::Down { epoch, fault })
            && (unknown.is_empty() || self.events.send(PublisherEvent::Outcomes(unknown)))
    }
}

/// Writes messages until the connection or the publisher ends. Flushes when no message waits.
fn write(stream: &TcpStream, publishes: &Receiver<Publish>) {
    let mut to = BufWriter::new(stream);
    while let Ok(first) = publishes.recv() {
        let mut waiting = std::iter::once(first).chain(publishes.try_iter());
        let written =
            waiting.try_for_each(|publish| frames::write(&mut to, &publish)).and_then(|()| to.flush());
        if written.is_err() {
            let _ = stream.shutdown(Shutdown::Both); // the reading thread ends the epoch
            return;
        }
    }
}

fn outage(text: &str) -> Fault {
    Fault::new(FaultClass::Outage, text)
}

fn lock(link: &Mutex<Link>) -> MutexGuard<'_, Link> {
    link.lock().unwrap_or_else(PoisonError::into_inner)
}
