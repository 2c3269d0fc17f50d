//! Attackers of a store: what is promised against each, what is not, and how to configure it.
//!
//! This page is for operators and reviewers, and has no code. Each promise names the tests that
//! hold it (`module::test`, in `tests/it` or in `src`).
//!
//! # Configure it
//!
//! 1. **One RabbitMQ user per service, with the least rights.** An operator makes the topology, so
//!    a service needs no right to configure anything. The service `bank` publishes to its exchange
//!    `payments`; `credit` consumes its queue `credit`:
//!
//!    ```text
//!    rabbitmqctl add_vhost money
//!    rabbitmqctl add_user bank "$BANK_PASSWORD"
//!    rabbitmqctl add_user credit "$CREDIT_PASSWORD"
//!    rabbitmqctl set_permissions -p money bank '^$' '^payments$' '^$'
//!    rabbitmqctl set_permissions -p money credit '^$' '^$' '^credit$'
//!    rabbitmqctl set_topic_permissions -p money bank payments '^paid$' '^$'
//!    rabbitmqctl set_policy -p money bounds '^credit$' '{"max-length":100000,"overflow":"reject-publish"}' --apply-to queues
//!    rabbitmqctl delete_user guest
//!    ```
//!
//!    The right to write to `amq.default` is the right to publish to *every* queue of the virtual
//!    host: give each producer an exchange. If a service declares its topology itself, it needs the
//!    right to configure and bind those names.
//! 2. **Signatures.** Give each producer a key: 32 random bytes from a secret store. Set it with
//!    [`RelayBuilder::sign_with`](crate::RelayBuilder::sign_with) at the producer, and with
//!    [`ConsumerBuilder::authenticate`](crate::ConsumerBuilder::authenticate) at each consumer.
//!    [`ProducerKeys`](crate::ProducerKeys) says how keys rotate. Without signatures, nothing
//!    proves the producer of a message.
//! 3. **TLS.** Use `amqps://`, with the feature `tls`. `Tls::ca_file` trusts one authority and no
//!    other. The client shows its certificate (`Tls::client_certificate_files`) if the broker
//!    requests one. The certificate comes beside the password, not in its place: the SASL mechanism
//!    is PLAIN. If a broker offers `EXTERNAL` alone, the client refuses it by name and sends no
//!    password.
//! 4. **Files.** Use a folder of mode 0700 that belongs to the service's user, on a local disk.
//!    Files are made with mode 0600. A journal
//!    ([`StoreBuilder::journal_bytes`](crate::StoreBuilder::journal_bytes)) lies beside the file
//!    and is as secret.
//! 5. **Memory of a consumer.** Unsettled deliveries take up to 64 MiB, unless
//!    `RabbitMqSource::prefetch_bytes` says otherwise. One delivery takes up to
//!    `RabbitMqSource::body_bytes_max`: 128 MiB unless set. Set both to what the service expects.
//! 6. **Ids of foreign producers.**
//!    [`StoreBuilder::inbox_ids_max`](crate::StoreBuilder::inbox_ids_max) bounds them per scope.
//!    Keep [`IdsPolicy::Refuse`](crate::IdsPolicy::Refuse), the default: with `ForgetOldest`,
//!    hostile ids make a genuine repeat new.
//! 7. **Logs.** Keep the target `lapin` off `TRACE`. Put no secret into the text of an error that a
//!    handler returns.
//!
//! # Bounds of what deliveries write
//!
//! | what | bound |
//! |---|---|
//! | deliveries that wait | [`ConsumerBuilder::parked_max`](crate::ConsumerBuilder::parked_max), rows and bytes, per scope |
//! | tries of deliveries | 16,384, per scope |
//! | ids of foreign messages | [`StoreBuilder::inbox_ids_max`](crate::StoreBuilder::inbox_ids_max), per scope; none unless set |
//! | rejected deliveries | [`ConsumerBuilder::rejected_max`](crate::ConsumerBuilder::rejected_max), rows and bytes, per scope; [`on_rejected_full`](crate::ConsumerBuilder::on_rejected_full) says what happens to more |
//! | lanes and their gaps | [`StoreBuilder::lanes_max`](crate::StoreBuilder::lanes_max), [`gaps_max`](crate::StoreBuilder::gaps_max), per scope; none unless set. Set more lanes than producers use in a day |
//! | space on the disk | [`ConsumerBuilder::free_space_min`](crate::ConsumerBuilder::free_space_min) stays free |
//!
//! The last bound limits all of them together. [`Stats::consumers`](crate::Stats::consumers) has a
//! figure for each: set an alarm on its growth.
//!
//! [`limits`](crate::limits) names all other bounds. By default, a full quarantine stops the
//! consumer, which loses nothing: discard or redrive the rejected deliveries. If the queue has a
//! dead-letter exchange, set `RejectedFull::DeadLetter`, and genuine deliveries flow on.
//!
//! # Somebody may publish to the queue
//!
//! They may write any header, body, id and number, and as many messages as the broker takes.
//!
//! | promise | held by |
//! |---|---|
//! | Nothing genuine is dropped in silence on account of forgeries. It is applied, or set aside with a reason. | `forged::nothing_genuine_is_dropped_on_account_of_forgeries`, `forged::one_id_and_another_content_is_rejected`, `forged::a_rejected_claim_takes_no_id`, `forged::a_redriven_message_takes_its_place` |
//! | With signatures, a forgery is refused before its handler runs, and marks neither number nor id. | `signed::forgeries_mark_nothing`, `signed::a_forged_copy_does_not_stand_for_the_genuine_message`, `signed::a_redrive_proves_nothing`, `signed::a_key_is_taken_over` |
//! | With `IdsPolicy::Refuse`, ids of others make no id forgotten that was applied. | `forged::hostile_ids_make_nothing_forgotten` |
//! | Rejected deliveries take bounded room, and little more of the file than their length. | `rejected_room::a_full_quarantine_stops_the_consumer_until_there_is_room`, `rejected_room::a_full_quarantine_gives_back_what_it_cannot_keep`, `rejected_room::parked_deliveries_that_are_rejected_are_bounded_too`, `rejected_room::a_kept_delivery_takes_little_more_than_its_length` |
//! | With `lanes_max` and `gaps_max`, lanes and gaps take bounded rows. What is forgotten applies nothing twice, and drops nothing. | `lanes_kept::forged_lanes_are_bounded`, `lanes_kept::a_forgotten_lane_applies_nothing_twice`, `lanes_kept::forgotten_gaps_drop_nothing` |
//! | With `rejects_unknown`, messages that are not believed go back to the broker and leave no row. | `lanes_kept::unknown_producers_leave_no_row` |
//! | Deliveries do not fill the disk of the application's own writes. | `small_disk::deliveries_do_not_fill_the_disk_of_the_application` |
//! | No form of a message stops the queue: text that is not UTF-8, tables without end, headers larger than a frame, a body over the cap. | `poison::text_that_is_not_utf8_reaches_the_consumer`, `poison::tables_without_end_reach_the_consumer`, `poison::headers_larger_than_a_frame_reach_the_consumer`, `poison::a_body_over_the_cap_is_rejected` |
//! | Failing deliveries make no other handler run often. A write of the application waits for one handler and one group at most. | `failing_writes::failing_deliveries_make_no_other_run_often`, `failing_writes::a_write_waits_for_one_handler` |
//! | Control characters of others are escaped in reasons, errors and logs. | `escaping::text_of_others_is_escaped_where_it_comes_in` |
//!
//! **Not promised.**
//!
//! - Without signatures, a forged message can be applied. The consumer then rejects the genuine
//!   message of that number, and keeps it until a person decides.
//! - A signature hides nothing, and does not name the queue of its message.
//! - A message with a lane is applied once for ever: a copy of it is a repeat, or is rejected if
//!   its lane was forgotten.
//! - A message without a lane (`publish_unpublished`) is known by its id, for the [inbox
//!   age](crate::StoreBuilder::inbox_age). A copy that comes later is applied again, signed or not.
//! - Each consumer that can check a producer's signature can also forge it.
//! - A flood costs time and network.
//! - A forger can fill the quarantine, and so stop a consumer whose policy is to stop.
//!
//! # Somebody runs the broker, or answers instead of it
//!
//! | promise | held by |
//! |---|---|
//! | No bytes from the peer cause a panic or an abort. Memory is bounded, and no event spends an attempt. | `matrix::hostile::b21_hostile_peers`, `matrix::hostile::b21_cut_and_garbled_lines`, `broker::rabbitmq::inbound::tests::what_the_broker_promises_is_counted` |
//! | Deliveries that are not settled take bounded memory, however large they are. | `large_deliveries::unsettled_deliveries_are_bounded_in_bytes`, `large_deliveries::a_delivery_that_is_larger_than_the_bound_comes_alone`, `large_deliveries::memory_is_bounded_by_bytes` |
//! | Deliveries beyond the prefetch and returns of nothing end the connection; the fault says what came. | `rabbitmq_limits::deliveries_beyond_the_prefetch_end_the_connection` |
//! | The peer's certificate and name are always verified, and TLS never falls back to plain text. | `rabbitmq_tls::b17_a_peer_that_cannot_be_trusted_is_refused`, `rabbitmq_tls::b17_plain_text_and_tls_do_not_mix`, `rabbitmq_tls::b17_expired_misnamed_and_outdated_servers` |
//! | No password goes to a peer that offers no PLAIN. Over plain text it leaves this machine only if `allow_plaintext_credentials()` is set. | `broker::rabbitmq::inbound::tests::the_greeting_is_looked_at_before_the_login`, `rabbitmq_publisher::plain_text_is_never_used_by_accident` |
//! | The application's writes go on, and `stop` keeps its deadline. | `matrix::outage::b01_connection_blocked`, `matrix::outage::b02_close_while_blocked_or_frozen` |
//!
//! **Not promised.** The broker reads every message: encrypt payloads that the broker must not
//! read. It can withhold, reorder and repeat messages, and can confirm a message and then drop it.
//! With signatures, the broker can neither make nor change a message. A broker that takes the login
//! has the password.
//!
//! # Somebody else has an account on the machine
//!
//! | promise | held by |
//! |---|---|
//! | Only regular files are opened: no link is followed, no pipe or device makes the open wait. | `odd_files::what_is_no_regular_file_is_refused_at_once`, `hostile_files::no_name_makes_open_wait` |
//! | A journal that another user can have prepared, read or changed is refused by name. A new one is made aside and renamed. | `hostile_files::a_journal_that_others_can_have_prepared_is_refused`, `hostile_files::a_journal_is_made_as_a_temporary_file`, `storage::private::tests::only_what_is_closed_to_others_is_used` |
//! | A store's file that is open to others, or has several names, is warned of once per open. | `hostile_files::a_loose_file_is_warned_of_once` |
//! | `OpenError::LockedByReader` distinguishes a reader's `flock` from the lock of an owner, and says how to end it. | `hostile_files::a_readers_lock_is_reported_with_a_way_out` |
//! | A file that is moved, removed or replaced while it is open poisons its store: within 64 commits, 2,048 events or a second. | `lost_files::a_file_that_loses_its_name_poisons_its_store` |
//!
//! **Not promised.** Nothing holds against root, or against the service's own user: the file is not
//! encrypted. The file holds payloads, rejected deliveries, and the secret with which contents are
//! hashed. Each backup holds the same. On systems other than Unix, the store checks no owners and
//! no modes.
//!
//! # Somebody hands over a file
//!
//! | promise | held by |
//! |---|---|
//! | Damage and crafted bytes are typed errors. No number in the file is a length in memory. | `hostile_rows::a_number_in_a_record_is_no_length_in_memory`, `hostile_rows::a_key_of_another_length_is_walked_past_or_reported`, `odd_files::zeros_and_stumps_are_refused_for_what_they_are` |
//! | No panic of the engine reaches a caller. | `damaged_calls::no_panic_of_the_engine_reaches_a_caller`, `guarded_entries::every_way_into_the_engine_is_guarded` |
//! | The time to open grows with the size of file and journal alone. | `storage::journal::frame::tests::crafted_heads_cost_no_more_than_the_journal_is_long` |
//! | A record whose checksum fails is never published. | `matrix::message::b20_undecodable_record` |
//!
//! **Not promised.** Checksums are no signatures: a program that can write the file can write any
//! state and any event into it. Two panics at once within redb end the process. The tables that
//! [`Transaction::open_table`](crate::Transaction::open_table) hands out are redb's own.
//!
//! # Somebody reads the logs
//!
//! | promise | held by |
//! |---|---|
//! | No log line, error, `Debug` or report shows a password or a payload. | `matrix::secrets::no_failure_shows_a_secret`, `broker::rabbitmq::uri_text::tests::texts_with_two_readings_are_refused_and_not_shown` |
//! | A flood of failures is logged at a bounded rate. | `logs::at_run_time::a_flood_is_logged_at_a_bounded_rate` |
//!
//! **Not promised.** Logs show ids, event types, exchanges, routing keys, ordering keys, hosts and
//! paths of files. They repeat the broker's words, user names included, and the text of an error
//! that a handler returns. Passwords and keys are wiped when they are freed; lapin's own copy of a
//! password is not.
