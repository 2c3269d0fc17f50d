//! Settings of what a store remembers of messages that have come.

use std::time::Duration;

use crate::store::open::builder::StoreBuilder;
use crate::store::settings::policies::{IdsPolicy, LanesPolicy};
use crate::time::as_ms;

impl StoreBuilder {
    /// How long a recorded id (request, delivery, event id given by the application) is remembered at least; 7 days unless set.
    ///
    /// The age is the time that has passed while the store was open. Time during which it is closed does not count, and a jump of the
    /// wall clock changes nothing. A crash may lose some seconds of it: then an id is remembered longer.
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

    /// How many ids of foreign messages are remembered per scope at most; as many as the [age](Self::inbox_age) allows unless
    /// set. It concerns [consumers](crate::Store::consumer) and [`first_delivery`](crate::Transaction::first_delivery); messages with a
    /// lane need no id to be remembered.
    ///
    /// What becomes of a further id says the [policy](Self::inbox_ids_policy). Unless set it is refused with
    /// [`Error::InboxFull`](crate::Error::InboxFull), which a consumer rejects: others who may publish cannot make the
    /// store forget what it has applied. Set more than come within the age.
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

    /// How many lanes of producers are remembered per scope at most; all unless set. A producer has a lane for each exchange, routing key and
    /// key that it publishes to. A lane takes 100 to 600 bytes, and up to 270 KB once thousands of its messages came. Without this,
    /// [`free_space_min`](crate::ConsumerBuilder::free_space_min) alone bounds what forged lanes take.
    ///
    /// The [policy](Self::lanes_policy) says what becomes of a message of a further lane. Unless set, a lane of which nothing came for a day is
    /// forgotten for the new one, if one is found among the next 64 rows; else the message is refused with
    /// [`Error::LanesFull`](crate::Error::LanesFull), and a consumer rejects it. So set more than producers use in that time.
    ///
    /// **A forgotten lane applies nothing twice**: its producer's row keeps which lanes were forgotten, as 32 ranges of ids at
    /// most, and a message of such a lane is rejected as a conflict ([`Error::LaneConflict`](crate::Error::LaneConflict)), since it may be a repeat. Where ranges
    /// become one, messages of lanes between them that never came before are rejected too. Nothing is dropped.
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

    /// How many gaps in lanes are remembered per scope; all unless set. Each lane may have 64 whatever others have
    /// ([`LANE_GAPS_MIN`](crate::limits::LANE_GAPS_MIN)), or as many as are set here if that is less; and no lane more than 16,384
    /// ([`LANE_GAPS_MAX`](crate::limits::LANE_GAPS_MAX)).
    ///
    /// Beyond that the oldest gap of the lane is forgotten: a message that would have filled it is rejected as a conflict, since
    /// it may be a repeat. Nothing is applied twice, and nothing is dropped.
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

    /// What becomes of a message of a new lane beyond [`lanes_max`](Self::lanes_max).
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

    /// What becomes of a new id beyond [`inbox_ids_max`](Self::inbox_ids_max): refused unless set.
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
