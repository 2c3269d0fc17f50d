//! The store: one redb file with the application's state and the event log.

pub(crate) mod capture;
pub(crate) mod handle;
pub(crate) mod open;
pub(crate) mod read;
pub(crate) mod settings;
pub(crate) mod shared;
pub(crate) mod streams;
pub(crate) mod transaction;
pub(crate) mod writer;

pub use self::capture::table::CapturedTable;
pub use self::handle::Store;
pub use self::handle::once::{WriteOnce, WriteOnceFuture};
pub use self::handle::write_future::WriteFuture;
pub use self::open::builder::StoreBuilder;
pub use self::read::replay::{PageBytes, Replay, ReplayedEvent};
pub use self::read::snapshot::{Events, Snapshot};
pub use self::read::stream::{StreamEvents, StreamReader};
pub use self::settings::capture::{Capture, Change, Operation};
pub use self::settings::start_at::StartAt;
pub use self::settings::{BacklogQuota, IdsPolicy, LanesPolicy, QuotaPolicy, Retention};
pub use self::shared::capture_schedule::CaptureWait;
pub use self::shared::holders::{Holder, HolderKind};
pub use self::shared::projections::{ProjectionState, ProjectionStatus};
pub use self::shared::relays::{RelayState, RelayStatus, SuspendedDestination};
pub use self::streams::{EventStream, StreamAppended};
pub use self::transaction::receipt::{ConfirmError, Receipt};
pub use self::transaction::{Appended, Transaction};
#[cfg(fuzzing)]
pub(crate) use crate::storage::journal::fuzzing_journal;
pub use crate::storage::metered::IoStats;
pub use crate::storage::tables::capture::CaptureMode;
