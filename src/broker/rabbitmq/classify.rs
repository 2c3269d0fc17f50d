//! Turns lapin's errors into faults with a class.
//!
//! The same reply code means different things at different times: 403 at login is a wrong password,
//! and 403 on a publish is an exchange without write permission. So the phase is a parameter.

use lapin::ErrorKind;

use crate::message::{Fault, FaultClass};

use super::refusal::is_refusal;

/// The work that the connection was doing when the failure came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    /// TCP, login, opening the virtual host, opening a channel.
    Connect,
    /// Declaring, or checking that an exchange exists.
    SetUp,
    /// Publishing.
    Publish,
    /// Consuming.
    Consume,
}

/// Returns the fault for a failure. The text is the broker's or the operating system's own: it may
/// hold names, but neither a payload nor a password.
pub(super) fn classify(error: &lapin::Error, phase: Phase) -> Fault {
    match error.kind() {
        ErrorKind::ProtocolError(error) => {
            let (code, text) = (error.get_id(), error.get_message().as_str());
            let is_outage = is_lapins_own(text) || is_away(code, text);
            let class = if is_outage { FaultClass::Outage } else { class_of(code, phase) };
            Fault::with_code(class, code, text)
        }
        ErrorKind::InvalidProtocolVersion(version) => {
            Fault::new(FaultClass::Config, format!("the server speaks AMQP {version}, not 0-9-1"))
        }
        ErrorKind::AuthProviderError(_) => {
            Fault::new(FaultClass::Config, "the server asks for another login")
        }
        ErrorKind::SerialisationError(_) => {
            Fault::new(FaultClass::Message, "a message cannot be encoded as AMQP frames")
        }
        ErrorKind::ChannelsLimitReached => Fault::new(
            FaultClass::Config,
            "the broker allows no further channel on one connection (its `channel_max`)",
        ),
        ErrorKind::IOError(io) if phase == Phase::Connect && is_refusal(io) => {
            Fault::new(FaultClass::Config, io.to_string())
        }
        _ => Fault::new(FaultClass::Outage, error.to_string()),
    }
}

/// Whether lapin itself complains about bytes from the broker, under a reply code that lapin chose:
/// a frame out of place or too large, an acknowledgement of nothing. No published message causes
/// such a complaint.
///
/// lapin's texts are the only evidence. RabbitMQ's own texts begin with the code's name
/// (`FRAME_ERROR - …`). So an exchange's name in them cannot be mistaken for one of lapin's texts.
fn is_lapins_own(text: &str) -> bool {
    !text.starts_with(|first: char| first.is_ascii_uppercase())
        && (text.starts_with("frame too large: ")
            || text.contains(" received on channel ")
            || text.contains(" received for inexistant delivery_tag "))
}

/// Whether a queue exists and cannot be reached now. RabbitMQ answers 404, as for a queue that does
/// not exist. The texts are those of `rabbit_amqqueue`. A text that begins with *no queue* means a
/// missing queue, for any name in the text.
pub(super) fn is_away(code: u16, text: &str) -> bool {
    const AWAY: [&str; 4] = [
        "is down or inaccessible",
        "process is stopped by supervisor",
        "has crashed and failed to restart",
        "due to timeout",
    ];
    code == 404 && !text.starts_with("NOT_FOUND - no ") && AWAY.iter().any(|away| text.contains(away))
}

/// Whether the error answers a question about a queue. A publishing connection asks such a question
/// to learn why a message was returned, and the question's channel has ended. No publish gets such
/// an answer.
pub(super) fn is_about_a_queue(error: &lapin::Error) -> bool {
    let ErrorKind::ProtocolError(error) = error.kind() else { return false };
    let (code, text) = (error.get_id(), error.get_message().as_str());
    is_away(code, text) || (code == 404 && text.starts_with("NOT_FOUND - no queue ")) || code == 405
}

/// The class of an AMQP reply code.
pub(super) fn class_of(code: u16, phase: Phase) -> FaultClass {
    use FaultClass::{Config, Destination, Message, Outage};
    match (phase, code) {
        // 320 connection forced, 506 resource error, 541 internal error: trouble of the broker
        // itself.
        (_, 320 | 506 | 541) => Outage,
        // 402 invalid path, 403 access refused, 530 not allowed.
        (Phase::Connect, 402 | 403 | 530) => Config,
        (Phase::Connect, _) => Outage,
        (Phase::SetUp, _) => Config,
        // 403 access refused, 404 not found, 405 resource locked.
        (Phase::Publish, 403..=405) => Destination,
        (Phase::Publish, 402 | 530) => Config,
        // 311 content too large, 406 precondition failed, 540 not implemented, and 501 to 505
        // (frame, syntax, command, channel, unexpected frame): a fault in what the client sent.
        (Phase::Publish, 300..=319 | 406 | 501..=505 | 540) => Message,
        (Phase::Publish, _) => Outage,
        (Phase::Consume, 404 | 405) => Destination,
        (Phase::Consume, 402 | 403 | 530) => Config,
        (Phase::Consume, _) => Outage,
    }
}

/// Whether a message with this fault ends the whole connection, and not only its channel.
pub(super) fn ends_the_connection(fault: &Fault) -> bool {
    fault.class == FaultClass::Message && matches!(fault.code, Some(501..=505 | 540))
}

/// Whether this is the broker's own error, and not an echo of it (`channel is closing`).
pub(super) fn is_the_brokers_own(error: &lapin::Error) -> bool {
    !matches!(
        error.kind(),
        ErrorKind::InvalidChannelState(..)
            | ErrorKind::InvalidConnectionState(_)
            | ErrorKind::InvalidChannel(_)
            | ErrorKind::FutureCompleted
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn access_refused_depends_on_the_phase() {
        assert_eq!(class_of(403, Phase::Connect), FaultClass::Config);
        assert_eq!(class_of(403, Phase::Publish), FaultClass::Destination);
        assert_eq!(class_of(403, Phase::Consume), FaultClass::Config);
        assert_eq!(class_of(404, Phase::SetUp), FaultClass::Config);
        assert_eq!(class_of(404, Phase::Publish), FaultClass::Destination);
    }

    /// Goal: the broker's own trouble never costs a message an attempt. Method: every such code in
    /// every phase.
    #[test]
    fn the_brokers_own_trouble_is_an_outage() {
        for phase in [Phase::Connect, Phase::SetUp, Phase::Publish, Phase::Consume] {
            for code in [320, 506, 541] {
                assert_eq!(class_of(code, phase), FaultClass::Outage, "{code} while {phase:?}");
            }
        }
    }

    /// The story: a hostile peer answered a publish with a frame out of place. lapin reports that
    /// as 505, the code of a message's own fault. The event was quarantined for it. Method: lapin's
    /// texts, and a broker's text that looks like them.
    #[test]
    fn what_lapin_complains_of_is_nobodys_fault() {
        for text in [
            "frame too large: 131081 bytes",
            "unexpected content header frame received on channel 1",
            "content header frame with class id 10 instead of 60 received on channel 1",
            "heartbeat frame received on channel 3",
            "connection frame received on channel 1",
            "invalid ack received for inexistant delivery_tag 999 on channel 1, current is Some(2)",
        ] {
            assert!(is_lapins_own(text), "{text}");
        }
        assert!(!is_lapins_own("NOT_FOUND - no exchange ' received on channel ' in vhost '/'"));
        assert!(!is_lapins_own("FRAME_ERROR - type 33, first 16 octets"));
    }

    /// Goal: a queue that exists and cannot be reached is an outage in every phase. A missing queue
    /// of any name is not. Method: RabbitMQ's own texts, and names that look like them.
    #[test]
    fn not_found_has_two_meanings() {
        for text in [
            "NOT_FOUND - home node 'rabbit@b' of durable queue 'q' in vhost '/' is down or inaccessible",
            "NOT_FOUND - queue 'q' in vhost '/' process is stopped by supervisor",
            "NOT_FOUND - queue 'q' in vhost '/' has crashed and failed to restart",
            "NOT_FOUND - failed to perform operation on queue 'q' in vhost '/' due to timeout",
        ] {
            assert!(is_away(404, text), "{text}");
            assert!(!is_away(403, text), "{text}");
        }
        for text in [
            "NOT_FOUND - no queue 'q' in vhost '/'",
            "NOT_FOUND - no queue 'it is down or inaccessible' in vhost '/'",
            "NOT_FOUND - no exchange 'due to timeout' in vhost '/'",
            "NOT_FOUND - Queue 'q' does not exist",
        ] {
            assert!(!is_away(404, text), "{text}");
        }
    }

    #[test]
    fn what_one_message_did_is_a_message_fault() {
        for code in [311, 406, 501, 502, 503, 504, 505, 540] {
            assert_eq!(class_of(code, Phase::Publish), FaultClass::Message, "{code}");
        }
    }
}
