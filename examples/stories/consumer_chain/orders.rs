//! The first service: takes orders from clients.
//!
//! A client that got no answer does not know whether its order was placed, and sends the request
//! again with the same id. The store recognises the id: each order is placed once, at whatever
//! moment a service dies.

use std::io::{self, BufReader};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::thread;

use onewrite::{Event, Result, Store, Transaction};
use serde::{Deserialize, Serialize};

use crate::frames;
use crate::plan::Wiring;
use crate::tables::{self, Numbers, Rows};

/// Order id to the order as JSON.
pub(crate) const ORDERS: Rows = Rows::new("orders");
/// Customer to orders placed so far.
const PLACED: Numbers = Numbers::new("placed");

/// Product to price, in cents.
pub(crate) const PRODUCTS: [(&str, u64); 4] =
    [("book", 1_500), ("lamp", 2_500), ("chair", 4_000), ("desk", 9_000)];

/// The request of a client.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Request {
    /// Names the request, the order and the event.
    pub(crate) id: String,
    pub(crate) customer: String,
    pub(crate) product: String,
    pub(crate) pieces: u64,
}

/// The answer to a client.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Answer {
    /// The request had been placed before.
    pub(crate) repeat: bool,
}

/// An order: a row of the table, and the payload of `order.placed`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Order {
    pub(crate) id: String,
    pub(crate) customer: String,
    /// The customer's first order is 1, and so on without a gap.
    pub(crate) nth: u64,
    pub(crate) product: String,
    pub(crate) pieces: u64,
    pub(crate) cents: u64,
}

pub(crate) fn prepare(tx: &Transaction) -> Result<()> {
    let _ = (tx.open_table(ORDERS)?, tx.open_table(PLACED)?);
    Ok(())
}

/// The order and its event, in one transaction, once per request id. `true` if it had been placed
/// before.
fn place(store: &Store, request: Request, wiring: Wiring) -> Result<bool> {
    let once = store.write_once(request.id.clone(), move |tx| {
        let Request { id, customer, product, pieces } = request.clone();
        let nth = tables::add(tx, PLACED, &customer, 1)?;
        let price = PRODUCTS.iter().find(|(name, _)| *name == product).map_or(0, |(_, cents)| *cents);
        let order = Order { id, customer, nth, product, pieces, cents: price * pieces };
        tables::put(tx, ORDERS, &order.id, &order)?;
        tx.append(
            Event::json("order.placed", &order)?
                .id(&order.id)
                .key(&order.customer)
                .to(&wiring.exchange, wiring.routing_key("order.placed")),
        )?;
        Ok(())
    })?;
    Ok(once.is_repeat())
}

/// Takes requests until the process ends.
pub(crate) fn open_desk(store: &Store, wiring: &Wiring) -> io::Result<SocketAddr> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let address = listener.local_addr()?;
    let (store, wiring) = (store.clone(), wiring.clone());
    thread::spawn(move || {
        for client in listener.incoming().flatten() {
            let (store, wiring) = (store.clone(), wiring.clone());
            // It ends with the connection, or at an order that failed. The client repeats the
            // request.
            thread::spawn(move || serve(&client, &store, &wiring));
        }
    });
    Ok(address)
}

fn serve(client: &TcpStream, store: &Store, wiring: &Wiring) -> io::Result<()> {
    client.set_nodelay(true)?;
    let (mut from, mut to) = (BufReader::new(client), client);
    loop {
        let request = frames::read(&mut from)?;
        let repeat = place(store, request, wiring.clone()).map_err(io::Error::other)?;
        frames::write(&mut to, &Answer { repeat })?;
    }
}
