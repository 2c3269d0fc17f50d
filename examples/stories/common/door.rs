//! A loopback door to a broker. Shutting the door ends all connections and refuses new ones.

use std::collections::BTreeMap;
use std::io;
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

pub(crate) struct Door {
    address: SocketAddr,
    guests: Arc<Mutex<Guests>>,
}

#[derive(Default)]
struct Guests {
    shut: bool,
    inside: BTreeMap<u64, TcpStream>,
    next: u64,
}

impl Door {
    /// Opens a door, and serves each connection on a thread of its own.
    pub(crate) fn open(serve: impl Fn(&TcpStream) + Send + Sync + 'static) -> io::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let address = listener.local_addr()?;
        let guests = Arc::<Mutex<Guests>>::default();
        let (at_door, serve) = (Arc::clone(&guests), Arc::new(serve));
        thread::spawn(move || {
            for guest in listener.incoming().flatten() {
                let Some(number) = admit(&at_door, &guest) else { continue };
                let (inside, serve) = (Arc::clone(&at_door), Arc::clone(&serve));
                thread::spawn(move || {
                    serve(&guest);
                    // `inside` has a second handle: closing one handle does not end the connection.
                    let _ = guest.shutdown(Shutdown::Both);
                    lock(&inside).inside.remove(&number);
                });
            }
        });
        Ok(Self { address, guests })
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    pub(crate) fn shut(&self) {
        let mut guests = lock(&self.guests);
        guests.shut = true;
        for guest in guests.inside.values() {
            let _ = guest.shutdown(Shutdown::Both);
        }
    }

    pub(crate) fn reopen(&self) {
        lock(&self.guests).shut = false;
    }
}

/// `None`, if the door is shut: dropping the guest closes the connection.
fn admit(guests: &Mutex<Guests>, guest: &TcpStream) -> Option<u64> {
    let mut guests = lock(guests);
    if guests.shut {
        return None;
    }
    guest.set_nodelay(true).ok()?;
    let number = guests.next;
    guests.next += 1;
    guests.inside.insert(number, guest.try_clone().ok()?);
    Some(number)
}

fn lock(guests: &Mutex<Guests>) -> MutexGuard<'_, Guests> {
    guests.lock().unwrap_or_else(PoisonError::into_inner)
}
