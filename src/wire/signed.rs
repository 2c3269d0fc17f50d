//! The proof of the store that produced a message: an HMAC with a secret that the producer and its
//! consumers share.
//!
//! ```text
//! onewrite-signature   "v1=" │ 64 hex digits: HMAC-SHA-256 over
//!                      "onewrite signature 1" │ store, epoch, lane, number, each a header or its absence │ all that the message says
//! ```
//!
//! The signed content is that of the content hash (`content.rs`), and the relay's `app_id` and
//! `source` too. So without a key, a sender can neither make a message of the producer nor change
//! one. Parts that brokers and hops may change are not signed. For example, the resend header of a
//! second publish is not: both copies have one signature.
//!
//! **A signature does not cover** the message's destination. Brokers and operators move messages
//! between queues, and the messages stay genuine.

use std::collections::BTreeMap;
use std::fmt;
use std::hash::Hasher;

use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;

use super::content::{Canonical, put};
use super::{EPOCH, LANE, LANE_NUMBER, STORE, one};
use crate::error::{Error, Result, SettingError};
use crate::event::{uuid_from_text, uuid_text};
use crate::limits::{PRODUCER_KEYS_MAX, SIGNING_KEY_BYTES_MIN};
use crate::message::{HeaderValue, Message};
use crate::text::Text;

/// The header that proves which store produced the message. A relay that
/// [signs](crate::RelayBuilder::sign_with) sets it.
///
/// ```
/// # let folder = tempfile::tempdir()?;
/// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
/// # let broker = onewrite::broker::MemoryBroker::new();
/// # broker.declare_queue("payments", Default::default());
/// let key = onewrite::SigningKey::new(b"32 bytes that nobody else knows.")?;
/// let relay = store.relay("rabbit").sign_with(key).spawn(broker.publisher())?;
/// # store.write(|tx| tx.append(onewrite::Event::bytes("payment.completed", "100").key("alice").to("", "payments")))?
/// #     .wait_confirmed(std::time::Duration::from_secs(5))?;
/// let message = &broker.messages("payments")[0].message; // the first event, published
/// let signature = message.header(onewrite::wire::SIGNATURE).and_then(|value| value.as_text());
/// assert!(signature.is_some_and(|signature| signature.starts_with("v1=") && signature.len() == 3 + 64));
/// # let _ = relay.stop(std::time::Duration::from_secs(5));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub const SIGNATURE: &str = "onewrite-signature";

/// The prefix of a signature's text.
const FORM: &str = "v1=";

/// The first signed bytes. A later form signs other first bytes.
const DOMAIN: &[u8] = b"onewrite signature 1";

/// A secret that a producer and its consumers share. The producer signs with it
/// ([`RelayBuilder::sign_with`](crate::RelayBuilder::sign_with)), and the consumers check with it
/// ([`ProducerKeys`]).
///
/// Use 32 random bytes from a secret store. A consumer can sign everything that it can check, so
/// share a key only between services that trust each other. Each copy is wiped from memory when it
/// is dropped.
///
/// ```
/// use onewrite::SigningKey;
/// let key = SigningKey::new(b"32 bytes that nobody else knows.")?;
/// assert_eq!(format!("{key:?}"), "SigningKey");
/// assert!(SigningKey::new("password").is_err()); // too short
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone)]
pub struct SigningKey(Hmac<Sha256>);

/// Shows nothing.
impl fmt::Debug for SigningKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SigningKey")
    }
}

impl SigningKey {
    /// Makes a key of these bytes, of which there must be at least [`SIGNING_KEY_BYTES_MIN`].
    ///
    /// # Errors
    /// [`SettingError`] for fewer bytes.
    ///
    /// ```
    /// # use onewrite::SigningKey;
    /// assert!(SigningKey::new([7; 32]).is_ok());
    /// assert!(SigningKey::new([7; 15]).is_err());
    /// ```
    pub fn new(secret: impl AsRef<[u8]>) -> Result<Self, SettingError> {
        let secret = secret.as_ref();
        if secret.len() < SIGNING_KEY_BYTES_MIN {
            let reason = format!("a key has at least {SIGNING_KEY_BYTES_MIN} bytes");
            return Err(SettingError::new("signing_key", reason));
        }
        let mac = Hmac::new_from_slice(secret)
            .map_err(|error| SettingError::new("signing_key", error.to_string()))?;
        Ok(Self(mac))
    }

    /// Returns the header's value for this message, which has no signature yet.
    pub(super) fn sign(&self, message: &Message) -> HeaderValue {
        let mut text = String::with_capacity(FORM.len() + 64);
        text.push_str(FORM);
        for byte in self.mac(message).finalize().into_bytes() {
            for digit in [byte >> 4, byte & 15] {
                text.push(char::from_digit(digit.into(), 16).expect("four bits are a digit"));
            }
        }
        HeaderValue::Text(Text::from(text.as_str()))
    }

    /// Checks a signature in a time that does not depend on the signature.
    fn has_signed(&self, message: &Message, signature: &[u8; 32]) -> bool {
        self.mac(message).verify_slice(signature).is_ok()
    }

    fn mac(&self, message: &Message) -> Hmac<Sha256> {
        let mut sink = Signing(self.0.clone());
        sink.write(DOMAIN);
        for name in [STORE, EPOCH, LANE, LANE_NUMBER] {
            match message.header(name) {
                Some(value) => {
                    put(&mut sink, 1, name.as_bytes());
                    self.value(&mut sink, value);
                }
                None => put(&mut sink, 0, name.as_bytes()),
            }
        }
        self.message(&mut sink, message, false);
        sink.0
    }
}

/// A sink that signs the bytes written to it.
pub(super) struct Signing(Hmac<Sha256>);

impl Hasher for Signing {
    fn write(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    fn finish(&self) -> u64 {
        unreachable!("a signature has more than 64 bits: it is taken from the field")
    }
}

impl Canonical for SigningKey {
    type Sink = Signing;

    fn unordered<'a>(
        &self,
        sink: &mut Signing,
        entries: impl Iterator<Item = (u8, &'a str, &'a HeaderValue)>,
    ) {
        // Each entry begins with its kind, and no signed message does. So a signature of an entry
        // is never the signature of a message.
        let mut signed: Vec<[u8; 32]> = entries
            .map(|(kind, name, value)| {
                let mut of_entry = Signing(self.0.clone());
                put(&mut of_entry, kind, name.as_bytes());
                self.value(&mut of_entry, value);
                of_entry.0.finalize().into_bytes().into()
            })
            .collect();
        signed.sort_unstable();
        sink.write(&(signed.len() as u64).to_le_bytes());
        sink.write(signed.as_flattened());
    }
}

/// The stores that a consumer believes, and their keys. See
/// [`ConsumerBuilder::authenticate`](crate::ConsumerBuilder::authenticate).
///
/// **Rotation.** Each producer may have several keys ([`PRODUCER_KEYS_MAX`]). Add the new key at
/// the consumers, then let the relay sign with it. Remove the old key once no queue holds an older
/// message.
///
/// ```
/// # let folder = tempfile::tempdir()?;
/// # let bank = onewrite::Store::open(folder.path().join("bank.redb"))?;
/// # let broker = onewrite::broker::MemoryBroker::new();
/// # broker.declare_queue("credit", Default::default());
/// use onewrite::{Error, Event, Message, ProducerKeys, SigningKey};
/// let (old, new) = (SigningKey::new([1; 32])?, SigningKey::new([2; 32])?);
/// let keys = ProducerKeys::new().key(&bank.id(), old)?.key(&bank.id(), new.clone())?;
///
/// let relay = bank.relay("rabbit").sign_with(new).spawn(broker.publisher())?;
/// bank.write(|tx| tx.append(Event::bytes("paid", "100").to("", "credit")))?.wait_confirmed(std::time::Duration::from_secs(5))?;
/// let message = &broker.messages("credit")[0].message;
/// assert!(keys.verify(message).is_ok());
/// let forged = Message { payload: b"999".to_vec(), ..(**message).clone() };
/// assert!(matches!(keys.verify(&forged), Err(Error::NotAuthentic { .. })));
/// # let _ = relay.stop(std::time::Duration::from_secs(5));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, Default)]
pub struct ProducerKeys {
    keys: BTreeMap<[u8; 16], Vec<SigningKey>>,
    foreign: bool,
}

impl ProducerKeys {
    /// Makes a set of keys that believes no store.
    ///
    /// ```
    /// use onewrite::{Message, ProducerKeys};
    /// assert!(ProducerKeys::new().verify(&Message::default()).is_err());
    /// ```
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Believes messages of the store with this [id](crate::Store::id) that are signed with this
    /// key.
    ///
    /// # Errors
    /// [`SettingError`] if the id is not a store's id, or the store already has
    /// [`PRODUCER_KEYS_MAX`] keys.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let bank = onewrite::Store::open(folder.path().join("bank.redb"))?;
    /// use onewrite::{ProducerKeys, SigningKey};
    /// let key = SigningKey::new([7; 32])?;
    /// assert!(ProducerKeys::new().key(&bank.id(), key.clone()).is_ok());
    /// assert!(ProducerKeys::new().key("bank", key).is_err());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn key(mut self, producer: &str, key: SigningKey) -> Result<Self, SettingError> {
        let store = uuid_from_text(producer)
            .ok_or_else(|| SettingError::new("producer_keys", format!("`{producer}` is not a store's id")))?;
        let keys = self.keys.entry(store).or_default();
        if keys.len() >= PRODUCER_KEYS_MAX {
            let reason = format!("a store has at most {PRODUCER_KEYS_MAX} keys");
            return Err(SettingError::new("producer_keys", reason));
        }
        keys.push(key);
        Ok(self)
    }

    /// Also accepts messages that name no store as their producer. **Risk:** nothing proves the
    /// sender of such a message. Any sender that may publish to the queue may send one, but none in
    /// the name of a store.
    ///
    /// ```
    /// use onewrite::{Message, ProducerKeys};
    /// assert!(ProducerKeys::new().and_foreign().verify(&Message::default()).is_ok());
    /// ```
    #[must_use]
    pub fn and_foreign(mut self) -> Self {
        self.foreign = true;
        self
    }

    /// Checks one message. A consumer does this by itself; call it in your own consuming loop,
    /// before [`first_delivery`](crate::Transaction::first_delivery).
    ///
    /// # Errors
    /// [`Error::NotAuthentic`] if the proof is missing or wrong.
    ///
    /// [`Error::LaneHeader`] if its producer or signature is given twice, or is not in this
    /// library's form.
    ///
    /// ```
    /// use onewrite::{Error, Message, ProducerKeys};
    /// let error = ProducerKeys::new().verify(&Message::default()).unwrap_err();
    /// assert_eq!(error.to_string(), "nothing proves who has sent the message: it names no store as its producer");
    /// ```
    pub fn verify(&self, message: &Message) -> Result<()> {
        let Some(producer) = one(message, STORE)? else {
            let problem = "it names no store as its producer";
            return if self.foreign { Ok(()) } else { Err(Error::NotAuthentic { producer: None, problem }) };
        };
        let producer = producer.as_text().and_then(uuid_from_text);
        let problem = "is not the UUID of a store";
        let producer = producer.ok_or(Error::LaneHeader { header: STORE, problem })?;
        // The signature covers the first header of each name, so a second one is refused.
        for name in [EPOCH, LANE, LANE_NUMBER] {
            one(message, name)?;
        }
        let signature = one(message, SIGNATURE)?.map(|signature| signature.as_text().and_then(parse));
        let problem = match (self.keys.get(&producer), signature) {
            (None, _) => "no key of this store is known",
            (_, None) => "it has no signature",
            (_, Some(None)) => "its signature has an unknown form",
            (Some(keys), Some(Some(signature))) => {
                if keys.iter().any(|key| key.has_signed(message, &signature)) {
                    return Ok(());
                }
                "its signature is of another key, or of another message"
            }
        };
        Err(Error::NotAuthentic { producer: Some(uuid_text(producer).as_str().to_owned()), problem })
    }
}

fn parse(text: &str) -> Option<[u8; 32]> {
    let (digits, odd) = text.strip_prefix(FORM)?.as_bytes().as_chunks::<2>();
    if digits.len() != 32 || !odd.is_empty() {
        return None;
    }
    let mut signature = [0; 32];
    for (byte, [high, low]) in signature.iter_mut().zip(digits) {
        let digit = |digit: u8| char::from(digit).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
        *byte = digit(*high)? << 4 | digit(*low)?;
    }
    Some(signature)
}

#[cfg(test)]
mod tests;
