//! Requests to a running relay.

use std::collections::BTreeSet;

use super::prepare::Met;
use super::rows::{self, RowState};
use super::worker::Worker;
use crate::delivery::SeqState;
use crate::delivery::types::{Input, Key};
use crate::error::Result;
use crate::message::{Fault, FaultClass};
use crate::oneshot;
use crate::store::read::records;
use crate::store::shared::relays::{Awaited, RelayRequest};

impl Worker {
    pub(super) fn request(&mut self, request: RelayRequest) -> Result<()> {
        match request {
            RelayRequest::Await { seqs, reply } => self.await_confirms(seqs, reply)?,
            RelayRequest::Echo { reply } => reply.send(()),
            RelayRequest::Redriven { seq, fault } => {
                // The relay may have met this event among the due ones before it took the request.
                // By now the event may be in memory, delivered, perhaps trimmed, or back in
                // quarantine. The file knows.
                self.flush_rows()?;
                if !rows::is_to_be_tried(self.registered.store.core(), self.cursor.id, seq)? {
                    return Ok(());
                }
                let read = records::read_records(self.registered.store.core(), std::iter::once(seq))?;
                let known = self.held.contains_key(&seq);
                if let Some(loaded) =
                    (!known).then(|| self.hold_all(read, Met::Again)).and_then(|mut all| all.pop())
                {
                    self.step(Input::Redriven(loaded, fault));
                }
            }
            RelayRequest::Discarded { seq, key } => {
                let fault = Fault::new(FaultClass::Message, "discarded by request");
                self.waiters.quarantined(seq, &fault);
                self.step(Input::Discarded { seq, key: key.map(Key::from) });
            }
            RelayRequest::LetExpiredGo => self.step(Input::LetExpiredGo),
            RelayRequest::Pause => {
                self.paused = true;
                self.step(Input::Pause);
            }
            RelayRequest::Resume => {
                self.paused = false;
                self.step(Input::Resume);
            }
            RelayRequest::Stop { deadline } => {
                self.stop_at = Some(deadline);
                self.step(Input::Pause);
            }
        }
        Ok(())
    }

    pub(super) fn await_confirms(&mut self, seqs: Vec<u64>, reply: oneshot::Sender<Awaited>) -> Result<()> {
        // The relay may not know yet of the commit that appended these events.
        self.report_tail();
        self.work()?;
        let mut left = BTreeSet::new();
        for seq in seqs {
            let state = self.machine.seq_state(seq);
            if state == SeqState::Pending {
                left.insert(seq);
                continue;
            }
            self.flush_rows()?;
            match rows::row_state(self.registered.store.core(), self.cursor.id, seq) {
                Ok(RowState::Settled) if state == SeqState::AskDisk => {}
                Ok(RowState::Settled | RowState::Waiting) => drop(left.insert(seq)),
                Ok(RowState::Quarantined(exception)) => {
                    let unknown = || Fault::new(FaultClass::Undecodable, "no reason was recorded");
                    let fault = exception.fault.unwrap_or_else(unknown);
                    reply.send(Awaited::Quarantined { seq, fault });
                    return Ok(());
                }
                Err(error) => {
                    reply.send(Awaited::Failed(error));
                    return Ok(());
                }
            }
        }
        self.waiters.add(left, reply);
        Ok(())
    }
}
