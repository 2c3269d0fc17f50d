//! A way in for the fuzz target `wire`.

use super::content::kept;
use super::{EPOCH, LANE, LANE_NUMBER, STORE, lane_of, one, ordering_key, resend, time_ms};
use super::{ProducerKeys, SIGNATURE, SigningKey};
use crate::message::Message;

/// Reads the message, then signs it. The signature holds as long as the message names its producer
/// once and its content is unchanged.
pub(crate) fn message(message: &Message, key: &SigningKey, keys: &ProducerKeys, left_out: usize) {
    let _ = (lane_of(message).is_ok(), ordering_key(message));
    assert!(time_ms(message).is_none_or(|(earliest, latest)| earliest <= latest));

    let mut signed = message.clone();
    signed.headers.retain(|(name, _)| name != SIGNATURE);
    let signature = key.sign(&signed);
    signed.headers.push((SIGNATURE.into(), signature));
    let once = [STORE, EPOCH, LANE, LANE_NUMBER].into_iter().all(|name| one(&signed, name).is_ok());
    if !once || keys.verify(&signed).is_err() {
        return;
    }
    assert!(keys.verify(&resend(&signed)).is_ok(), "a second publish has the signature of the first");
    let mut longer = signed.clone();
    longer.payload.push(0);
    assert!(keys.verify(&longer).is_err(), "another payload");
    let mut less = signed.clone();
    let (name, _) = less.headers.remove(left_out % less.headers.len());
    let says =
        [STORE, EPOCH, LANE, LANE_NUMBER, SIGNATURE].contains(&name.as_ref()) || kept(&name, false).is_some();
    assert_eq!(keys.verify(&less).is_err(), says, "without `{name}`");
}
