//! The customers: they send requests at an even pace, and repeat each until they have an answer.

use std::io::{self, BufReader};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::dice::Dice;
use crate::frames;
use crate::orders::{Answer, PRODUCTS, Request};
use crate::payments::{CUSTOMERS, customer};

/// Threads of clients.
pub(crate) const CLIENTS: u32 = 8;
/// The number of requests.
pub(crate) const REQUESTS: u32 = 4_000;
/// How long to wait for an answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// How long to wait between two attempts.
const RETRY_PAUSE: Duration = Duration::from_millis(10);

/// The state that the clients share with the supervisor.
#[derive(Debug, Default)]
pub(crate) struct Desk {
    /// The address of the order service, while that service runs.
    address: Mutex<Option<SocketAddr>>,
    /// No answer will come any more.
    closed: AtomicBool,
    pub(crate) answered: AtomicU64,
    /// Requests that were sent again, because no answer had come.
    pub(crate) asked_again: AtomicU64,
    /// The requests among them that had been placed at the first time.
    pub(crate) recognised: AtomicU64,
}

impl Desk {
    pub(crate) fn move_to(&self, address: Option<SocketAddr>) {
        *self.address.lock().unwrap_or_else(PoisonError::into_inner) = address;
    }

    /// Clients give up requests without an answer.
    pub(crate) fn close(&self) {
        self.closed.store(true, Ordering::Relaxed);
    }
}

/// All requests by number, the same for the same seed.
pub(crate) fn request(seed: u64, number: u32) -> Request {
    let mut dice = Dice::new(seed ^ u64::from(number) << 32);
    let mut product = PRODUCTS.iter().cycle().skip(dice.roll(PRODUCTS.len() as u64) as usize);
    Request {
        id: format!("order-{number:05}"),
        customer: customer(dice.roll(CUSTOMERS)),
        product: product.next().map(|(name, _)| (*name).into()).unwrap_or_default(),
        pieces: 1 + dice.roll(3),
    }
}

/// Starts the clients, each with its share of the requests.
pub(crate) fn start(desk: &Arc<Desk>, seed: u64, writing: Duration) -> Vec<thread::JoinHandle<()>> {
    let begin = Instant::now();
    let start = |client: u32| {
        let mut client = Client { number: client, desk: Arc::clone(desk), connection: None };
        thread::spawn(move || client.run(seed, begin, writing))
    };
    (0..CLIENTS).map(start).collect()
}

struct Client {
    number: u32,
    desk: Arc<Desk>,
    connection: Option<BufReader<TcpStream>>,
}

impl Client {
    fn run(&mut self, seed: u64, begin: Instant, writing: Duration) {
        for number in (self.number..REQUESTS).step_by(CLIENTS as usize) {
            thread::sleep((writing * number / REQUESTS).saturating_sub(begin.elapsed()));
            let request = request(seed, number);
            while !self.ask(&request) {
                if self.desk.closed.load(Ordering::Relaxed) {
                    return;
                }
                thread::sleep(RETRY_PAUSE);
            }
        }
    }

    /// `false` if there is no answer: the order may be placed, or not.
    fn ask(&mut self, request: &Request) -> bool {
        let Ok(connection) = self.connect() else { return false };
        match exchange(connection, request) {
            Ok(Answer { repeat }) => {
                self.desk.answered.fetch_add(1, Ordering::Relaxed);
                self.desk.recognised.fetch_add(repeat.into(), Ordering::Relaxed);
                true
            }
            Err(_) => {
                self.connection = None;
                self.desk.asked_again.fetch_add(1, Ordering::Relaxed);
                false
            }
        }
    }

    fn connect(&mut self) -> io::Result<&mut BufReader<TcpStream>> {
        let connection = match self.connection.take() {
            Some(connection) => connection,
            None => {
                let address = *self.desk.address.lock().unwrap_or_else(PoisonError::into_inner);
                let address = address.ok_or(io::ErrorKind::NotConnected)?;
                let stream = TcpStream::connect_timeout(&address, ANSWER_TIMEOUT)?;
                stream.set_nodelay(true)?;
                stream.set_read_timeout(Some(ANSWER_TIMEOUT))?;
                BufReader::new(stream)
            }
        };
        Ok(self.connection.insert(connection))
    }
}

fn exchange(connection: &mut BufReader<TcpStream>, request: &Request) -> io::Result<Answer> {
    frames::write(connection.get_mut(), request)?;
    frames::read(connection)
}
