//! The integration tests: one binary, a module per theme.

#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::print_stderr,
    reason = "clippy.toml allows them in tests, but knows only functions marked #[test]"
)]

mod support;

mod ages;
#[cfg(feature = "rabbitmq")]
mod all_properties;

#[cfg(unix)]
mod aggregates;
mod async_forms;
mod cancel_rebuild;
#[cfg(unix)]
mod capture;
#[cfg(unix)]
mod capture_old_rows;
mod capture_pace;
#[cfg(unix)]
mod capture_passes;
mod cleanup;
mod clock_jumps;
#[cfg(feature = "json")]
mod cloud_events;
#[cfg(all(unix, feature = "json", feature = "bincode"))]
mod codec_losses;
mod consumer;
#[cfg(target_os = "linux")]
mod consumer_failures;
mod contention;
#[cfg(all(unix, feature = "json"))]
mod damaged_calls;
#[cfg(unix)]
mod damaged_generations;
mod deferred;
#[cfg(all(feature = "rabbitmq", target_os = "linux"))]
mod delivery_limits;
#[cfg(unix)]
mod earlier_marks;
mod escaping;
#[cfg(feature = "rabbitmq")]
mod failing_writes;
mod fairness;
#[cfg(target_os = "linux")]
mod faults;
mod figures;
mod floors;
#[cfg(unix)]
mod foreign_code;
#[cfg(unix)]
mod forged;
mod guarded_entries;
mod holders;
#[cfg(unix)]
mod hostile_files;
#[cfg(unix)]
mod hostile_rows;
#[cfg(unix)]
mod in_hand;
mod journal;
#[cfg(unix)]
mod lanes_inbox;
mod lanes_kept;
mod large_deliveries;
#[cfg(unix)]
mod log_and_lanes;
mod logs;
mod longest_waits;
#[cfg(unix)]
mod lost_files;
#[cfg(all(feature = "rabbitmq", target_os = "linux"))]
mod matrix;
#[cfg(unix)]
mod mixed_attack;
mod model;
mod moments;
mod never_work;
#[cfg(unix)]
mod odd_files;
#[cfg(all(target_os = "linux", feature = "rabbitmq"))]
mod offline;
#[cfg(unix)]
mod one_write;
#[cfg(unix)]
mod page_writes;
mod pages;
mod parking_order;
#[cfg(feature = "rabbitmq")]
mod pauses;
mod poison;
mod positions;
mod projection_rebuilds;
mod projections;
mod quarantined;
mod quota;
#[cfg(feature = "rabbitmq")]
mod rabbitmq4;
mod rabbitmq_end_to_end;
#[cfg(feature = "rabbitmq")]
mod rabbitmq_failover;
#[cfg(feature = "rabbitmq")]
mod rabbitmq_limits;
#[cfg(feature = "rabbitmq")]
mod rabbitmq_publisher;
#[cfg(feature = "rabbitmq")]
mod rabbitmq_refusal;
mod rabbitmq_silence;
#[cfg(feature = "rabbitmq")]
mod rabbitmq_source;
#[cfg(feature = "tls")]
mod rabbitmq_tls;
#[cfg(unix)]
mod rebuild_load;
#[cfg(unix)]
mod rejected;
mod rejected_room;
mod relay;
#[cfg(unix)]
mod releases;
mod replay;
#[cfg(unix)]
mod retries;
#[cfg(feature = "rabbitmq")]
mod returned;
#[cfg(unix)]
mod scratch;
#[cfg(feature = "rabbitmq")]
mod security_page;
#[cfg(unix)]
mod signed;
#[cfg(all(feature = "rabbitmq", target_os = "linux"))]
mod small_disk;
#[cfg(unix)]
mod store_open;
#[cfg(unix)]
mod stream_snapshots;
#[cfg(unix)]
mod streams;
mod subscriptions;
mod texts;
#[cfg(unix)]
mod transaction_limits;
#[cfg(unix)]
mod upcasts;
#[cfg(unix)]
mod verify;
#[cfg(unix)]
mod verify_pages;
mod wanted;
mod write_waits;
