//! Settings of what a store remembers of received messages.

use std::time::Duration;

use crate::store::open::builder::StoreBuilder;
use crate::store::settings::policies::{IdsPolicy, LanesPolicy};
use crate::time::as_ms;

impl StoreBuilder {
    /// Sets how long a recorded id (of a request, a delivery, or an event to which the application
    /// gave one) is remembered at least; 7 days unless set.
    ///
    /// The age is the time that has passed while the store was open. Time while the store is closed
    /// does not count, and a jump of the wall clock changes nothing. A crash may lose some seconds
    /// of the age: then an id is remembered longer.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// use std::time::Duration;
    /// use onewrite::Store;
    /// let day = Duration::from_secs(24 * 3600);
    /// let store = Store::builder().inbox_age(30 * day).open(folder.path().join("a.redb"))?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn inbox_age(mut self, age: Duration) -> Self {
        self.settings.inbox_age_ms = as_ms(age);
        self
    }

    /// Sets how many ids of foreign messages are remembered per scope at most; as many as the
    /// [age](Self::inbox_age) allows unless set. The bound concerns
    /// [consumers](crate::Store::consumer) and
    /// [`first_delivery`](crate::Transaction::first_delivery). Messages with a lane need no
    /// remembered id.
    ///
    /// The [policy](Self::inbox_ids_policy) says what happens to a further id. Unless set, the id
    /// is refused with [`Error::InboxFull`](crate::Error::InboxFull), and a consumer rejects the
    /// message. So other publishers cannot make the store forget what it has applied. Set more than
    /// the number of ids that come within the age.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// use onewrite::{Message, Store};
    /// let store = Store::builder().inbox_ids_max(2).open(folder.path().join("a.redb"))?;
    /// let message = |id: &str| Message { message_id: Some(id.into()), ..Message::default() };
    /// let tx = store.begin()?;
    /// for id in ["m-1", "m-2"] {
    ///     assert!(tx.first_delivery("credit-service", &message(id))?);
    /// }
    /// assert!(tx.first_delivery("credit-service", &message("m-3")).is_err()); // refused
    /// assert!(!tx.first_delivery("credit-service", &message("m-1"))?); // still known
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn inbox_ids_max(mut self, ids: u64) -> Self {
        self.settings.inbox_ids_max = Some(ids);
        self
    }

    /// Sets how many lanes of producers are remembered per scope at most; all unless set.
    ///
    /// A producer has a lane for each exchange, routing key and key that it publishes to. A lane
    /// takes 100 to 600 bytes, and up to 270 KB after thousands of messages. Without this bound,
    /// only [`free_space_min`](crate::ConsumerBuilder::free_space_min) bounds what forged lanes
    /// take.
    ///
    /// The [policy](Self::lanes_policy) says what happens to a message of a further lane. Unless
    /// set, the store forgets a lane that got no message for a day, if it finds one among the next
    /// 64 rows. Otherwise the message is refused with
    /// [`Error::LanesFull`](crate::Error::LanesFull), and a consumer rejects it. So set more lanes
    /// than producers use in that time.
    ///
    /// **A forgotten lane applies nothing twice.** Its producer's row keeps which lanes were
    /// forgotten, as at most 32 ranges of ids. A message of such a lane is rejected as a conflict
    /// ([`Error::LaneConflict`](crate::Error::LaneConflict)), since it may be a repeat. If ranges
    /// are merged, messages of new lanes between them are rejected too. Nothing is dropped.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// use onewrite::Store;
    /// let store = Store::builder().lanes_max(100_000).open(folder.path().join("a.redb"))?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn lanes_max(mut self, lanes: u64) -> Self {
        self.settings.lanes_max = lanes;
        self
    }

    /// Sets how many gaps in lanes are remembered per scope at most; all unless set.
    ///
    /// Each lane may have 64 gaps ([`LANE_GAPS_MIN`](crate::limits::LANE_GAPS_MIN)), whatever the
    /// other lanes have, or the number set here if that is less. No lane may have more than 16,384
    /// gaps ([`LANE_GAPS_MAX`](crate::limits::LANE_GAPS_MAX)).
    ///
    /// Beyond that, the oldest gap of the lane is forgotten. A message that would have filled the
    /// gap is rejected as a conflict, since it may be a repeat. Nothing is applied twice, and
    /// nothing is dropped.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// use onewrite::Store;
    /// let store = Store::builder().gaps_max(10_000).open(folder.path().join("a.redb"))?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn gaps_max(mut self, gaps: u64) -> Self {
        self.settings.gaps_max = gaps;
        self
    }

    /// Sets the policy for a message of a new lane beyond [`lanes_max`](Self::lanes_max).
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// use onewrite::{LanesPolicy, Store};
    /// let store = Store::builder().lanes_policy(LanesPolicy::Refuse).open(folder.path().join("a.redb"))?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn lanes_policy(mut self, policy: LanesPolicy) -> Self {
        self.settings.lanes_policy = policy;
        self
    }

    /// Sets the policy for a new id beyond [`inbox_ids_max`](Self::inbox_ids_max); refused unless
    /// set.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// use onewrite::{IdsPolicy, Message, Store};
    /// let newest = Store::builder().inbox_ids_max(2).inbox_ids_policy(IdsPolicy::ForgetOldest);
    /// let store = newest.open(folder.path().join("a.redb"))?;
    /// let message = |id: &str| Message { message_id: Some(id.into()), ..Message::default() };
    /// let tx = store.begin()?;
    /// for id in ["m-1", "m-2", "m-3"] {
    ///     assert!(tx.first_delivery("credit-service", &message(id))?);
    /// }
    /// assert!(tx.first_delivery("credit-service", &message("m-1"))?); // forgotten
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn inbox_ids_policy(mut self, policy: IdsPolicy) -> Self {
        self.settings.ids_policy = policy;
        self
    }
}
