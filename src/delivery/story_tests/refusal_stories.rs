//! Destinations that nack: the copies that tries leave elsewhere, the waits, and the recovery.

use super::*;
use crate::delivery::types::SuspendCause;

fn to(story: &mut Story, queue: &str, count: usize) {
    for _ in 0..count {
        story.append_entry(|entry| entry.routing_key = queue.into());
    }
}

fn suspended(story: &Story) -> Vec<(String, SuspendCause)> {
    story.machine.suspended().map(|it| (it.routing_key.to_string(), it.cause)).collect()
}

fn full() -> Vec<(String, SuspendCause)> {
    vec![("full".to_owned(), SuspendCause::Nacks)]
}

/// Passes the time until a publish, which must be one isolated event.
fn next_trial(story: &mut Story) -> u64 {
    for _ in 0..20 {
        story.pass_to_timer();
        match story.published_how()[..] {
            [] => {}
            [(seq, _, true)] => return seq,
            ref more => panic!("no trial: {more:?}"),
        }
    }
    panic!("no trial in 20 timers");
}

/// Nacks everything in flight for that queue, again and again, for the given time. Returns the
/// number of these publishes.
fn nack_for(story: &mut Story, duration_ms: u64, step_ms: u64) -> usize {
    let (end_ms, mut publishes) = (story.now.mono_ms + duration_ms, 0);
    while story.now.mono_ms < end_ms {
        for seq in story.in_flight() {
            publishes += 1;
            story.outcome(seq, Outcome::Nacked);
        }
        story.pass(step_ms);
    }
    publishes
}

/// The story: an exchange led to a full queue and to a healthy queue. A hundred events left 1,176
/// copies in 90 s. Goal: a destination that nacks everything takes one copy of each event, and then
/// ever fewer; no attempts are consumed. Method: a hundred events, nacked for an hour.
#[test]
fn a_destination_that_nacks_is_asked_ever_more_rarely() {
    let mut story = Story::new(Settings {
        window_events: 128,
        lookahead_events: 256,
        backoff_first_ms: 100,
        backoff_max_ms: 30_000,
        ..settings()
    });
    story.up();
    to(&mut story, "full", 100);
    let copies = nack_for(&mut story, 90_000, 20);
    assert!((100..=115).contains(&copies), "{copies} copies of 100 in 90 s");
    assert_eq!(suspended(&story), full());
    let copies = nack_for(&mut story, 3_600_000, 1_000);
    assert!((12..=40).contains(&copies), "{copies} more in an hour");
    let figures = story.machine.figures();
    assert_eq!((figures.quarantined, figures.in_memory), (0, 100));
}

/// Goal: the remaining events of the relay are not affected, and the first success resumes the
/// destination. Method: nacked trials beside events for another queue; then an ack.
#[test]
fn the_first_success_resumes_a_destination_that_nacked() {
    let mut story = Story::new(settings());
    story.up();
    to(&mut story, "full", 8);
    for seq in 0..8 {
        assert_eq!(suspended(&story), []);
        story.outcome(seq, Outcome::Nacked);
    }
    assert_eq!(suspended(&story), full());
    story.published();
    to(&mut story, "full", 4);
    to(&mut story, "well", 2);
    assert_eq!(story.published(), [12, 13], "what is new for it waits, too");
    story.confirm(12);
    story.confirm(13);
    let trial = next_trial(&mut story);
    story.outcome(trial, Outcome::Nacked);
    assert_eq!(story.published(), [0; 0]);
    let trial = next_trial(&mut story);
    story.confirm(trial);
    assert_eq!(suspended(&story), []);
    let now = story.published();
    assert!(
        [8, 9, 10, 11].iter().all(|seq| now.contains(seq) || *seq == trial),
        "new ones go at once: {now:?}"
    );
    for _ in 0..40 {
        for seq in story.in_flight() {
            story.confirm(seq);
        }
        story.pass(1_000);
    }
    assert_eq!(story.machine.figures().in_memory, 0, "all are confirmed");
}

/// Goal: a queue that is full now and then causes no suspension. Method: seven nacks between two
/// acks, many times.
#[test]
fn nacks_between_acks_suspend_nothing() {
    let mut story = Story::new(settings());
    story.up();
    for _ in 0..20 {
        to(&mut story, "busy", 8);
        let mut out = story.in_flight();
        let last = out.pop().unwrap();
        for seq in out.into_iter().take(7) {
            story.outcome(seq, Outcome::Nacked);
        }
        story.confirm(last);
        assert_eq!(suspended(&story), []);
        while !story.in_flight().is_empty() || story.machine.figures().in_memory > 0 {
            for seq in story.in_flight() {
                story.confirm(seq);
            }
            story.pass(1_000);
        }
    }
}

/// Goal: a return that an outage causes consumes no attempts, however long it lasts, and heals.
/// Method: twelve events for a queue whose node is down for a day, beside an unroutable event,
/// which is quarantined.
#[test]
fn a_queue_that_is_away_spends_nothing() {
    let mut story = Story::new(settings());
    story.up();
    to(&mut story, "away", 12);
    to(&mut story, "nowhere", 1);
    let end_ms = story.now.mono_ms + 24 * 3_600_000;
    let mut publishes = 0;
    while story.now.mono_ms < end_ms {
        for seq in story.in_flight() {
            let is_away = story.machine.items[&seq].destination().1.as_ref() == "away";
            publishes += usize::from(is_away);
            let class = if is_away { FaultClass::Outage } else { FaultClass::Destination };
            story.outcome(seq, Outcome::Returned(fault(class)));
        }
        story.pass(1_000);
    }
    assert_eq!(story.machine.figures().quarantined, 1);
    assert_eq!(suspended(&story), [("away".to_owned(), SuspendCause::Away)]);
    let longest = usize::try_from(24 * 3_600_000 / settings().backoff_max_ms).unwrap();
    assert!((longest / 2..=3 * longest).contains(&publishes), "{publishes} in a day");
    for _ in 0..100 {
        for seq in story.in_flight() {
            story.confirm(seq);
        }
        story.pass(settings().backoff_max_ms);
    }
    assert_eq!(story.machine.confirmed(), 12);
}
