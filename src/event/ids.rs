//! Fresh ids: UUIDs of version 7.
//!
//! **Invariant.** A fresh id is available at any time, also in the destructor of a thread-local.
//! `uuid` keeps its random numbers in a thread-local. That thread-local may already be destroyed,
//! and an access would then panic.

use std::cell::Cell;
use std::hash::{BuildHasher, RandomState};
use std::panic::catch_unwind;
use std::time::{SystemTime, UNIX_EPOCH};

use uuid::Uuid;

use crate::text::Text;
use crate::time::as_ms;

/// A value that is destroyed before the random numbers of its thread. A thread destroys its
/// thread-locals in the opposite order of their first use.
struct Canary;

impl Drop for Canary {
    // The destructor is empty, but needed: a thread-local without a destructor is never destroyed.
    fn drop(&mut self) {}
}

thread_local! {
    static CANARY: Canary = const { Canary };
    /// Whether the canary has been used. It has no destructor, so it is readable at any time.
    static WATCHED: Cell<bool> = const { Cell::new(false) };
}

/// Returns a fresh UUIDv7, which is ordered by time and unique without coordination.
pub(crate) fn fresh_uuid() -> [u8; 16] {
    fresh().into_bytes()
}

/// Returns 128 random bits. A thread of their own draws them, because the calling thread may be
/// ending and its random numbers destroyed.
pub(crate) fn fresh_secret() -> [u8; 16] {
    let drawn = std::thread::Builder::new().spawn(secret).map(std::thread::JoinHandle::join);
    match drawn {
        Ok(Ok(drawn)) => drawn,
        // No thread could be started.
        _ => secret(),
    }
}

fn secret() -> [u8; 16] {
    // In each UUID six bits are fixed, but not in the same places.
    let (first, second) = (Uuid::new_v4().into_bytes(), Uuid::new_v4().into_bytes());
    let mut secret = first;
    secret.iter_mut().zip(second.iter().rev()).for_each(|(byte, other)| *byte ^= other);
    secret
}

/// Returns a fresh UUID as text.
pub(crate) fn fresh_uuid_text() -> String {
    fresh().to_string()
}

fn fresh() -> Uuid {
    if !WATCHED.get() {
        return first_of_thread();
    }
    if CANARY.try_with(|_| ()).is_ok() { Uuid::now_v7() } else { without_thread_local() }
}

#[cold]
fn first_of_thread() -> Uuid {
    // The application may have used the same random numbers before, and its thread may be ending.
    let Ok(id) = catch_unwind(Uuid::now_v7) else { return without_thread_local() };
    WATCHED.set(CANARY.try_with(|_| ()).is_ok());
    id
}

/// Returns an id from the seeds of the standard library's hashers. Each thread draws these seeds
/// from the operating system once, and never destroys them.
#[cold]
fn without_thread_local() -> Uuid {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let draw = || RandomState::new().hash_one(now).to_le_bytes();
    let (head, tail) = (draw(), draw());
    let mut random = [0; 10];
    for (byte, drawn) in random.iter_mut().zip(head.into_iter().chain(tail)) {
        *byte = drawn;
    }
    uuid::Builder::from_unix_timestamp_millis(as_ms(now), &random).into_uuid()
}

/// Returns the UUID of this usual text of 36 characters.
pub(crate) fn uuid_from_text(text: &str) -> Option<[u8; 16]> {
    // A second spelling of a UUID would be a second name of one store.
    let uuid = Uuid::try_parse(text).ok().filter(|_| text.len() == 36)?;
    Some(uuid.into_bytes())
}

/// The usual text of a UUID.
pub(crate) fn uuid_text(bytes: [u8; 16]) -> Text {
    let mut text = Uuid::encode_buffer();
    Text::from(&*Uuid::from_bytes(bytes).hyphenated().encode_lower(&mut text))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    /// Goal: ids that are made without the thread-local are as good. Method: ten thousand of them
    /// are distinct, of version 7, and of this moment.
    #[test]
    fn ids_without_the_thread_local_are_unique_and_of_their_time() {
        let before = as_ms(SystemTime::now().duration_since(UNIX_EPOCH).unwrap());
        let ids: BTreeSet<Uuid> = (0..10_000).map(|_| without_thread_local()).collect();
        assert_eq!(ids.len(), 10_000);
        for id in ids {
            assert_eq!(id.get_version_num(), 7);
            let (seconds, nanos) = id.get_timestamp().unwrap().to_unix();
            assert!(seconds * 1000 + u64::from(nanos) / 1_000_000 >= before);
        }
    }

    struct LastIds(std::sync::mpsc::Sender<([Uuid; 2], [u8; 16])>);

    impl Drop for LastIds {
        fn drop(&mut self) {
            let _ = self.0.send(([fresh(), fresh()], fresh_secret()));
        }
    }

    /// Goal: an id and a secret are available in the destructor of a thread-local. Method: the
    /// thread uses its thread-local before the random numbers, so it destroys the random numbers
    /// first. The thread draws an id during its life once, and does not the second time.
    #[test]
    fn an_id_in_the_destructor_of_a_thread_local() {
        thread_local! {
            static LAST: Cell<Option<LastIds>> = const { Cell::new(None) };
        }
        for asked_before in [true, false] {
            let (sender, receiver) = std::sync::mpsc::channel();
            let thread = std::thread::spawn(move || {
                LAST.set(Some(LastIds(sender)));
                if asked_before {
                    fresh();
                }
            });
            thread.join().unwrap();
            let ([one, other], secret) = receiver.recv().unwrap();
            assert_ne!(secret, fresh_secret());
            assert!(one != other && one.get_version_num() == 7 && other.get_version_num() == 7);
        }
    }
}
