//! Upcasts: events of an older form, read in the newest.
//!
//! An upcast leads from one (type, version) to another; upcasts together form chains. Chains run
//! when an event is read. The log is never rewritten, and a relay publishes what was recorded.
//!
//! **Invariant:** the store checks the chains when it opens. From every version of a mentioned
//! type, one path leads to an end, and no path returns.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use crate::error::{BoxError, Error, EventError, Result, SettingError, caught};
use crate::event::{RecordedEvent, check_setting_name};
use crate::printable::printable;

type Convert = dyn Fn(&[u8]) -> Result<Vec<u8>, BoxError> + Send + Sync;

/// One step of a chain.
#[derive(Clone)]
struct Step {
    to: (String, u32),
    convert: Arc<Convert>,
}

/// All steps, by the form that they start from.
#[derive(Clone, Default)]
pub(crate) struct Upcasts {
    steps: BTreeMap<(String, u32), Step>,
    /// Two steps from the same form, or another mistake that is reported when the store opens.
    mistake: Option<String>,
    /// The newest version of each type that is mentioned.
    newest: BTreeMap<String, u32>,
    /// The newest version of each type that the application declares.
    declared: BTreeMap<String, u32>,
    /// Whether events are read as they were recorded, in any form.
    as_recorded: bool,
}

impl fmt::Debug for Upcasts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.steps.keys()).finish()
    }
}

impl Upcasts {
    /// The upcasts of a reader that looks at records and hands none to the application.
    pub(crate) fn none() -> Self {
        Self { as_recorded: true, ..Self::default() }
    }

    pub(crate) fn add(
        &mut self,
        from: (&str, u32),
        to: (&str, u32),
        convert: impl Fn(&[u8]) -> Result<Vec<u8>, BoxError> + Send + Sync + 'static,
    ) {
        for (event_type, version) in [from, to] {
            let newest = self.newest.entry(event_type.to_owned()).or_default();
            *newest = version.max(*newest);
        }
        let from = (from.0.to_owned(), from.1);
        let step = Step { to: (to.0.to_owned(), to.1), convert: Arc::new(convert) };
        if let Some(earlier) = self.steps.get(&from) {
            let mistake =
                format!("two lead from {}: to {} and to {}", name(&from), name(&earlier.to), name(&step.to));
            self.mistake.get_or_insert(mistake);
        }
        self.steps.insert(from, step);
    }

    /// Notes the newest version of a type that this release knows, even without a chain.
    pub(crate) fn declare(&mut self, event_type: &str, newest: u32) {
        self.declared.insert(event_type.to_owned(), newest);
    }

    /// The newest version of this type that is known here: the declared one, else the newest in a
    /// chain, else the first. A release that knows no second version of a type would read a second
    /// version as the first.
    fn newest_of(&self, event_type: &str) -> u32 {
        let known = self.declared.get(event_type).or_else(|| self.newest.get(event_type));
        known.copied().unwrap_or(1)
    }

    /// Refuses an event that could not be read again.
    #[inline]
    pub(crate) fn check_appended(&self, event_type: &str, version: u32) -> Result<(), EventError> {
        if version == 1 { Ok(()) } else { self.check_version(event_type, version) }
    }

    fn check_version(&self, event_type: &str, version: u32) -> Result<(), EventError> {
        let newest = self.newest_of(event_type);
        if (1..=newest).contains(&version) {
            return Ok(());
        }
        Err(EventError::UnknownVersion { event_type: event_type.to_owned(), version, newest })
    }

    /// Checks that every chain leads to an end, and that no version is left out.
    pub(crate) fn check(&self) -> Result<(), SettingError> {
        let fail = |reason: String| Err(SettingError::new("upcast", reason));
        if let Some(mistake) = &self.mistake {
            return fail(mistake.clone());
        }
        for event_type in self.newest.keys() {
            check_setting_name("upcast", "an event type", event_type)?;
        }
        for (event_type, declared) in &self.declared {
            let fail = |reason: String| Err(SettingError::new("event_version", reason));
            check_setting_name("event_version", "an event type", event_type)?;
            if *declared == 0 {
                return fail(format!("version 0 of `{}`: versions begin at 1", printable(event_type)));
            }
            if let Some(newest) = self.newest.get(event_type).filter(|newest| *newest > declared) {
                return fail(format!(
                    "{declared} is not the newest of `{}`: an upcast names version {newest}",
                    printable(event_type)
                ));
            }
        }
        if let Some((from, _)) = self.steps.iter().find(|(from, step)| from.1 == 0 || step.to.1 == 0) {
            return fail(format!("the one from {} names version 0; versions begin at 1", name(from)));
        }
        for (event_type, newest) in &self.newest {
            for version in 1..*newest {
                let from = (event_type.clone(), version);
                if !self.steps.contains_key(&from) {
                    return fail(format!(
                        "none leads on from {}, though there is version {newest}",
                        name(&from)
                    ));
                }
            }
        }
        for from in self.steps.keys() {
            let mut at = from;
            for _ in 0..=self.steps.len() {
                match self.steps.get(at) {
                    Some(step) => at = &step.to,
                    None => break,
                }
            }
            if self.steps.contains_key(at) {
                return fail(format!("from {} they lead round in a circle", name(from)));
            }
        }
        Ok(())
    }

    /// Each form with a step, by type, and the type that it is read as.
    pub(crate) fn read_as(&self) -> impl Iterator<Item = (&str, &str)> {
        self.steps.iter().map(|((from, _), step)| (from.as_str(), self.end_of(&step.to)))
    }

    /// The type that all events of this type are read as, if that is another type. No event has the
    /// old type any more.
    pub(crate) fn successor(&self, event_type: &str) -> Option<&str> {
        let newest = (event_type.to_owned(), *self.newest.get(event_type)?);
        let end = self.end_of(&self.steps.get(&newest)?.to);
        (end != event_type).then_some(end)
    }

    /// The types that an event of this form may be read as. There is one, except for a version that
    /// is unknown here. Such a version may follow the newest known version.
    pub(crate) fn ends<'a>(&'a self, event_type: &'a str, version: u32) -> [&'a str; 2] {
        let Some(newest) = self.newest.get(event_type) else { return [event_type; 2] };
        let known = (event_type.to_owned(), version.min(*newest));
        let end = self.steps.get(&known).map_or(event_type, |step| self.end_of(&step.to));
        [end, if version > *newest { event_type } else { end }]
    }

    /// The type at the end of the chain that goes on here. The loop ends, because no checked chain
    /// returns.
    fn end_of<'a>(&'a self, mut at: &'a (String, u32)) -> &'a str {
        while let Some(step) = self.steps.get(at) {
            at = &step.to;
        }
        &at.0
    }

    /// The event in its newest form.
    pub(crate) fn upcast(&self, mut recorded: RecordedEvent) -> Result<RecordedEvent> {
        if self.as_recorded || (self.steps.is_empty() && recorded.event.version <= 1) {
            return Ok(recorded);
        }
        let (event_type, version) = (String::from(recorded.event.event_type.clone()), recorded.event.version);
        let failed = |reason: BoxError| Error::Upcast {
            seq: recorded.seq,
            event_type: event_type.clone(),
            version,
            reason,
        };
        let mut at = (event_type.clone(), version);
        let newest = self.newest_of(&at.0);
        if at.1 > newest {
            return Err(failed(format!("the newest version known here is {newest}").into()));
        }
        let mut payload = None;
        while let Some(step) = self.steps.get(&at) {
            let old = payload.as_deref().unwrap_or(recorded.payload());
            // The conversion is the application's code, on the reader's thread. A panic must not
            // end that thread.
            let converted = caught(|| (step.convert)(old));
            let converted = converted.unwrap_or_else(|_| Err("the upcast panicked".into()));
            payload = Some(converted.map_err(failed)?);
            at = step.to.clone();
        }
        if let Some(payload) = payload {
            recorded.event.payload = payload;
            (recorded.event.event_type, recorded.event.version) = (at.0.into(), at.1);
        }
        Ok(recorded)
    }
}

fn name((event_type, version): &(String, u32)) -> String {
    format!("version {version} of `{event_type}`")
}
