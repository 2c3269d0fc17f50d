//! The in-process broker's end of a publisher's connection.

use std::io::{self, BufReader};
use std::net::TcpStream;

use onewrite::broker::MemoryBroker;

use crate::frames::{self, Publish, Word};

/// Serves one connection: takes each publish in, then sends its outcome.
pub(crate) fn serve(broker: &MemoryBroker, stream: &TcpStream) -> io::Result<()> {
    let mut from = BufReader::new(stream);
    let mut to = stream;
    frames::write(&mut to, &Word::Ready)?;
    loop {
        let Publish { ticket, exchange, routing_key, letter } = frames::read(&mut from)?;
        let word = match broker.publish(&exchange, &routing_key, letter.into_message()) {
            Ok(()) => Word::Confirmed { ticket },
            Err(fault) => match fault.code {
                None => Word::Nacked { ticket },
                Some(code @ 312) => Word::Returned { ticket, code, text: fault.text },
                Some(code) => Word::Refused { ticket, code, text: fault.text },
            },
        };
        frames::write(&mut to, &word)?;
    }
}
