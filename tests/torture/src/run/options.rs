//! The command line, and the timetable that follows from it.

use std::time::Duration;

use crate::Result;

/// What is asked for.
#[derive(Debug, Clone, Default)]
pub(super) struct Options {
    pub(super) events: Option<u64>,
    pub(super) app_kills: Option<u64>,
    pub(super) broker_kills: Option<u64>,
    pub(super) seconds: Option<u64>,
    pub(super) seed: Option<u64>,
    /// Keep the folder also of a clean run.
    pub(super) keep: bool,
    /// The library has a mistake on purpose: nothing is worth keeping, also where a promise is broken.
    pub(super) mistakes: bool,
}

/// What is done.
#[derive(Debug, Clone)]
pub(super) struct Timetable {
    pub(super) seed: u64,
    /// How long there are faults, if all goes as planned; quotas that are not reached by then prolong it.
    pub(super) time: Duration,
    /// Events that must be reached; none: as many as the time gives.
    pub(super) events: Option<u64>,
    /// Events per second.
    pub(super) rate: u64,
    pub(super) app_kills: u64,
    pub(super) broker_kills: u64,
}

const SECONDS_DEFAULT: u64 = 120;
/// What two cores take beside all else: events per second, seconds per kill of an application, and of the broker.
const RATE: u64 = 900;
const APP_KILL_SECONDS: u64 = 5;
const BROKER_KILL_SECONDS: u64 = 20;

impl Options {
    pub(super) fn parse(arguments: &[String]) -> Result<Self> {
        let mut options = Self::default();
        let mut arguments = arguments.iter();
        while let Some(name) = arguments.next() {
            match name.as_str() {
                "--keep" => {
                    options.keep = true;
                    continue;
                }
                "--mistakes" => {
                    options.mistakes = true;
                    continue;
                }
                _ => {}
            }
            let slot = match name.as_str() {
                "--events" => &mut options.events,
                "--app-kills" => &mut options.app_kills,
                "--broker-kills" => &mut options.broker_kills,
                "--seconds" => &mut options.seconds,
                "--seed" => &mut options.seed,
                _ => return Err(format!("unknown option {name}").into()),
            };
            let value = arguments.next().ok_or_else(|| format!("{name} needs a number"))?;
            *slot = Some(value.parse().map_err(|_| format!("{name} needs a number, not {value:?}"))?);
        }
        Ok(options)
    }

    pub(super) fn timetable(&self, fresh_seed: u64) -> Timetable {
        let asked = [
            self.events.map(|events| events / RATE),
            self.app_kills.map(|kills| kills * APP_KILL_SECONDS),
            self.broker_kills.map(|kills| kills * BROKER_KILL_SECONDS),
        ];
        let by_quotas = asked.into_iter().flatten().max();
        let seconds = self.seconds.or(by_quotas).unwrap_or(SECONDS_DEFAULT).max(10);
        Timetable {
            seed: self.seed.unwrap_or(fresh_seed),
            time: Duration::from_secs(seconds),
            events: self.events,
            // One in eleven events is of a write that fails on purpose.
            rate: self.events.map_or(RATE, |events| (events * 11 / 10 / seconds).max(1)),
            app_kills: self.app_kills.unwrap_or(seconds / APP_KILL_SECONDS),
            broker_kills: self.broker_kills.unwrap_or(seconds / BROKER_KILL_SECONDS),
        }
    }
}
