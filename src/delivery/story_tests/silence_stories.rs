//! Destinations without an answer: which events wait, which are tried, and which are repeated.

use super::*;
use crate::tuning::{SILENT_BACKOFF_MS, SILENT_TRIALS_MAX, SLOW_MS};

fn silence() -> Outcome {
    Outcome::Silent(fault(FaultClass::Outage))
}

fn to(story: &mut Story, queue: &str, count: usize) {
    for _ in 0..count {
        story.append_entry(|entry| entry.routing_key = queue.into());
    }
}

fn silent(story: &Story) -> Vec<String> {
    story.machine.suspended().map(|silent| silent.routing_key.to_string()).collect()
}

/// Goal: a silent destination is tried by one isolated event at a time, at growing intervals, and
/// consumes no attempts; other destinations flow. The first answer releases the destination.
/// Method: three events for it, and some for another at every step.
#[test]
fn a_silent_destination_is_asked_by_one_event_at_a_time() {
    let mut story = Story::new(settings());
    story.up();
    to(&mut story, "sick", 3);
    to(&mut story, "well", 2);
    assert_eq!(story.published(), [0, 1, 2, 3, 4]);
    story.confirm(3);
    story.outcome(0, silence());
    assert_eq!(silent(&story), ["sick"]);
    assert_eq!(story.published_how(), [(0, true, true)], "the first trial goes at once, alone");
    let mut waits = Vec::new();
    for n in 0..12 {
        let tried = story.in_flight().into_iter().find(|seq| story.machine.items[seq].is_alone()).unwrap();
        story.outcome(tried, silence());
        let began = story.now.mono_ms;
        to(&mut story, "sick", 1);
        to(&mut story, "well", 1);
        let new = 6 + 2 * n;
        assert_eq!(story.published(), [new], "only the other one's goes");
        story.confirm(new);
        story.pass_to_timer();
        waits.push(story.now.mono_ms - began);
        let trials = story.published_how();
        assert!(matches!(trials[..], [(_, _, true)]), "{trials:?}");
    }
    let (first_ms, max_ms) = SILENT_BACKOFF_MS;
    assert!(waits[0] <= first_ms && waits[11] >= max_ms / 2, "{waits:?}");
    assert!(waits.windows(2).all(|pair| pair[1] >= pair[0] / 2), "{waits:?}");
    assert_eq!(story.machine.figures().quarantined, 0);
    assert!(!story.saved().iter().any(|change| matches!(change, Change::PutException { .. })));
    // One answer, to any of the messages.
    let tried = story.in_flight().into_iter().find(|seq| story.machine.items[seq].is_alone()).unwrap();
    story.confirm(tried);
    assert_eq!(silent(&story), [""; 0]);
    story.pass(SILENT_BACKOFF_MS.1);
    while let Some(seq) = story.in_flight().first().copied() {
        story.confirm(seq);
    }
    assert_eq!(story.machine.figures().in_memory, 0, "all are confirmed");
}

/// Goal: a late answer counts, and spares the repeat. Method: the first publish of three is
/// confirmed while the trial is in flight, another while it waits.
#[test]
fn a_late_word_counts() {
    let mut story = Story::new(settings());
    story.up();
    to(&mut story, "sick", 3);
    story.published();
    let tickets = [0, 1, 2].map(|seq| story.ticket(seq));
    let outcomes = tickets.map(|ticket| (ticket, silence()));
    story.handle(Input::Outcomes(outcomes.into()));
    assert_eq!(story.published_how(), [(0, true, true)]);
    story.handle(Input::Outcomes(vec![(tickets[0], Outcome::Confirmed)]));
    assert_eq!((story.machine.confirmed(), silent(&story).len()), (1, 0));
    assert_eq!(story.published(), [0; 0], "the others' words may be on their way");
    story.handle(Input::Outcomes(vec![(tickets[1], Outcome::Confirmed), (tickets[2], Outcome::Confirmed)]));
    assert_eq!(story.machine.figures().in_memory, 0);
    story.pass(SILENT_BACKOFF_MS.1);
    assert_eq!(story.published(), [0; 0]);
}

/// Goal: a silent destination costs other destinations neither room nor order. Method: a key whose
/// first event is silent. The key's later events for another destination wait; other keys do not.
#[test]
fn a_key_waits_for_its_silent_event_and_others_do_not() {
    let mut story = Story::new(settings());
    story.up();
    for (key, queue) in [("k", "sick"), ("k", "well"), ("l", "well")] {
        story.append_entry(|entry| {
            entry.key = Some(key.into());
            entry.routing_key = queue.into();
        });
    }
    assert_eq!(story.published(), [0, 2]);
    story.confirm(2);
    story.outcome(0, silence());
    assert_eq!(story.published_how(), [(0, true, true)]);
    story.confirm(0);
    assert_eq!(story.published(), [1]);
}

/// Goal: many silent destinations are tried at once, but with a bound, and the window stays free.
/// Method: forty of them.
#[test]
fn many_silent_destinations_share_a_bounded_number_of_trials() {
    let mut story = Story::new(Settings { window_events: 64, lookahead_events: 256, ..settings() });
    story.up();
    for n in 0..40 {
        to(&mut story, &format!("sick-{n}"), 1);
    }
    story.published();
    for seq in 0..40 {
        story.outcome(seq, silence());
    }
    assert_eq!(story.in_flight().len(), SILENT_TRIALS_MAX);
    to(&mut story, "well", 64);
    assert_eq!(story.in_flight().len(), SILENT_TRIALS_MAX + 64);
    for _ in 0..40 {
        let trial = story.in_flight().into_iter().find(|seq| story.machine.items[seq].is_alone()).unwrap();
        story.confirm(trial);
    }
    assert_eq!(silent(&story), [""; 0]);
}

/// Goal: a destination that holds the window without an answer holds it for two seconds at most,
/// and nothing is repeated for that. A broker that is slow for all destinations gets no more than a
/// window. Method: a full window, time, then an answer.
#[test]
fn a_destination_without_a_word_gives_the_window_back() {
    let mut story = Story::new(Settings { window_events: 4, lookahead_events: 64, ..settings() });
    story.up();
    to(&mut story, "quiet", 8);
    to(&mut story, "well", 3);
    assert_eq!(story.published(), [0, 1, 2, 3]);
    story.pass(SLOW_MS);
    assert_eq!(story.published(), [8, 9, 10], "the others go beside what lingers");
    assert_eq!(silent(&story), [""; 0], "that is no verdict");
    for seq in [8, 9, 10] {
        story.confirm(seq);
    }
    story.pass(10 * SLOW_MS);
    assert_eq!(story.published(), [0; 0], "nothing more goes to it, and nothing again");
    story.confirm(2);
    assert_eq!(story.published(), [4], "it speaks: the window is full of it again");
    // An answer now and then is enough, however old the oldest event is.
    for seq in [3, 4, 5, 6] {
        story.pass(SLOW_MS - 1);
        story.confirm(seq);
    }
    assert_eq!(story.published(), [5, 6, 7]);
}

/// Goal: a slow destination is forgotten with its connection. Method: a full window of it, time,
/// and a new connection. The new connection gets a full window at once, and the rest after it.
#[test]
fn a_new_connection_knows_no_slow_destination() {
    let mut story = Story::new(Settings { window_events: 4, lookahead_events: 64, ..settings() });
    story.up();
    to(&mut story, "quiet", 8);
    story.pass(SLOW_MS);
    assert_eq!(story.published(), [0, 1, 2, 3]);
    to(&mut story, "quiet", 1);
    assert_eq!(story.published(), [0; 0], "it is slow");
    story.down(FaultClass::Outage);
    story.up();
    assert_eq!(story.published(), [0, 1, 2, 3], "all of the window again");
    (0..4).for_each(|seq| story.confirm(seq));
    assert_eq!(story.published(), [4, 5, 6, 7]);
}

/// Goal: an event that is silent for a reason of its own delays no answered event of its
/// destination, and is not published among others for ever. Method: two publishes of it are silent;
/// then other events of its destination are confirmed.
#[test]
fn an_event_that_alone_is_silent_goes_alone() {
    let mut story = Story::new(settings());
    story.up();
    to(&mut story, "mixed", 1);
    story.outcome(0, silence());
    story.outcome(0, silence());
    story.published();
    to(&mut story, "mixed", 1);
    story.pass_to_timer();
    assert_eq!(story.published_how(), [(1, false, true)], "another one is tried");
    story.confirm(1);
    to(&mut story, "mixed", 1);
    assert_eq!(story.published_how(), [(2, false, false)]);
    story.confirm(2);
    story.pass(SILENT_BACKOFF_MS.1);
    assert_eq!((story.published_how(), silent(&story).len()), (vec![(0, true, true)], 0));
}

/// Goal: a slow destination waits for no answer that cannot come. Method: a full window of it; then
/// its messages end as *unknown*, one by one, while the connection lives.
#[test]
fn a_slow_destination_of_which_nothing_is_known_goes_on() {
    let mut story = Story::new(Settings { window_events: 4, lookahead_events: 64, ..settings() });
    story.up();
    to(&mut story, "quiet", 8);
    assert_eq!(story.published(), [0, 1, 2, 3]);
    story.pass(SLOW_MS);
    assert_eq!(story.published(), [0; 0]);
    for seq in 0..4 {
        story.outcome(seq, Outcome::Unknown(fault(FaultClass::Outage)));
    }
    for _ in 0..200 {
        for seq in story.in_flight() {
            story.confirm(seq);
        }
        story.pass(100);
    }
    assert_eq!(story.machine.confirmed(), 8, "none waits for ever");
}

/// Goal: a trial of unknown outcome is not repeated at once. Method: each trial ends as *unknown*,
/// for an hour.
#[test]
fn trials_that_end_as_unknown_wait() {
    let mut story = Story::new(settings());
    story.up();
    to(&mut story, "sick", 1);
    story.outcome(0, silence());
    let (end_ms, mut trials) = (story.now.mono_ms + 3_600_000, 0);
    while story.now.mono_ms < end_ms {
        for seq in story.in_flight() {
            trials += 1;
            story.outcome(seq, Outcome::Unknown(fault(FaultClass::Outage)));
        }
        story.pass(10);
    }
    let shortest_ms = SILENT_BACKOFF_MS.0 / 2;
    assert!((100..=3_600_000 / shortest_ms).contains(&trials), "{trials} trials in an hour");
}

/// Goal: silent destinations, however many, do not fill the memory of other destinations. Method:
/// more of them than the lookahead, one event each, and all stay silent. Events for another
/// destination are loaded and confirmed.
#[test]
fn many_silent_destinations_leave_room_to_read() {
    let mut story = Story::new(Settings { window_events: 8, lookahead_events: 32, ..settings() });
    story.up();
    for n in 0..40 {
        to(&mut story, &format!("sick-{n}"), 1);
    }
    for _ in 0..400 {
        for seq in story.in_flight() {
            story.outcome(seq, silence());
        }
        story.pass(100);
    }
    assert!(story.machine.has_loaded_all(), "{:?}", story.machine.figures());
}
