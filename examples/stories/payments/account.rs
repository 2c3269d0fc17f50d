//! The account: both files are read from their tables, row by row, and must tell the same story.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use onewrite::{ConsumerStatus, Result, Store};

use crate::bank;
use crate::credit_service::{self, offer_for};
use crate::payment_service::RELAY;
use crate::report::{Account, count};
use crate::supervisor::Events;

/// Reads both stores. No other process uses them now.
pub(crate) fn take(
    payments: &Store,
    credit: &Store,
    seen: &ConsumerStatus,
    events: &Events,
    time: Duration,
) -> Result<Account> {
    let transfers = bank::transfers(payments)?;
    let books = credit_service::books(credit)?;
    let stats = payments.stats()?;
    let relay = stats.relays.get(RELAY).cloned().unwrap_or_default();
    let money = bank::total(payments)?;

    let committed = transfers.len() as u64;
    let ids: BTreeSet<&str> = transfers.iter().map(|transfer| &*transfer.id).collect();
    let lost = ids.iter().filter(|id| !books.effects.contains_key(**id)).count();
    let invented = books.effects.keys().filter(|id| !ids.contains(&***id)).count();
    let twice = books.effects.values().filter(|times| **times != 1).count();
    let mut offers = BTreeMap::<String, u64>::new();
    for transfer in &transfers {
        *offers.entry(transfer.payer.clone()).or_default() += offer_for(transfer.dollars);
    }
    let dollars = |offers: &BTreeMap<String, u64>| offers.values().sum::<u64>();

    let mut account = Account::new("from the tables of both stores", time);
    let mut line = |name, value: String, right| account.line(name, value, right);
    line("transfers committed", count(committed), committed > 0);
    line(
        "events in the log",
        format!("{}, one per transfer", count(stats.next_seq)),
        stats.next_seq == committed,
    );
    line("events confirmed by the broker", count(relay.confirmed), relay.confirmed == committed);
    line(
        "events waiting or quarantined",
        count(stats.backlog_events + relay.quarantined),
        stats.backlog_events + relay.quarantined == 0,
    );
    line("offers updated", count(seen.applied), seen.applied == committed);
    line(
        "deliveries seen",
        format!("{}, of which repeats dropped {}", count(seen.applied + seen.repeated), count(seen.repeated)),
        seen.rejected == 0,
    );
    line("lost", count(lost as u64), lost == 0);
    line("applied twice", count(twice as u64), twice == 0);
    line("applied, but never committed", count(invented as u64), invented == 0);
    line("out of order for a payer", count(books.early as u64), books.early == 0);
    line(
        "credit offered",
        format!("${}, by the transfers ${}", count(dollars(&books.offers)), count(dollars(&offers))),
        books.offers == offers,
    );
    line("money", format!("${} before, ${} after", count(bank::TOTAL), count(money)), money == bank::TOTAL);
    line(
        "payment service killed",
        format!("{} time; {} requests asked again and recognised", events.kills, count(events.asked_again)),
        events.kills == 1,
    );
    line("broker outages", count(events.outages.into()), events.outages == 1);
    line(
        "payment service at the end",
        events.problem.clone().unwrap_or_else(|| "done, closed".into()),
        events.problem.is_none(),
    );
    Ok(account)
}
