//! The account: reads the tables of the three files, row by row. They must hold the same as after
//! one process that never dies.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::time::Instant;

use onewrite::{BoxError, Result, Store};

use crate::arrivals::Arrivals;
use crate::clients::{REQUESTS, request};
use crate::mortal::KILLS;
use crate::orders::{ORDERS, Order, PRODUCTS};
use crate::payments::{ACCOUNTS, CUSTOMERS, OPENING, PAYMENTS, Payment, customer};
use crate::plan::Role;
use crate::report::{Account, count};
use crate::service::RELAY;
use crate::shipping::{LEDGER, REVENUE, STOCK, STOCKED};
use crate::supervisor::Events;
use crate::tables;

/// The rows of the three files.
struct Books {
    orders: BTreeMap<String, Order>,
    payments: BTreeMap<String, Payment>,
    accounts: BTreeMap<String, u64>,
    ledger: BTreeMap<String, Payment>,
    stock: BTreeMap<String, u64>,
    revenue: BTreeMap<String, u64>,
    /// At payments and at shipping.
    arrivals: [Arrivals; 2],
}

/// Reads the three stores. No other process uses them now.
pub(crate) fn take(folder: &Path, events: &Events, begin: Instant) -> Result<Account, BoxError> {
    let stores = Role::ALL.map(|role| Store::open(role.file(folder)));
    let [orders, payments, shipping] = stores;
    let (orders, payments, shipping) = (orders?, payments?, shipping?);
    let books = Books {
        orders: tables::rows(&orders, ORDERS)?,
        payments: tables::rows(&payments, PAYMENTS)?,
        accounts: tables::numbers(&payments, ACCOUNTS)?,
        ledger: tables::rows(&shipping, LEDGER)?,
        stock: tables::numbers(&shipping, STOCK)?,
        revenue: tables::numbers(&shipping, REVENUE)?,
        arrivals: [Arrivals::read(&payments)?, Arrivals::read(&shipping)?],
    };
    let mut account = Account::new("from the tables of the three stores", begin.elapsed());
    rows(&mut account, &books, events);
    logs(&mut account, books.orders.len() as u64, [&orders, &payments])?;
    promises(&mut account, &books, events.seed);
    values(&mut account, &books);
    happened(&mut account, events);
    for store in [orders, payments, shipping] {
        store.close()?;
    }
    Ok(account)
}

/// Counts the orders in each place.
fn rows(account: &mut Account, books: &Books, events: &Events) {
    let asked = u64::from(REQUESTS);
    let placed = books.orders.len() as u64;
    account.line(
        "orders placed",
        format!("{}, of {} asked for", count(placed), count(asked)),
        placed == asked,
    );
    account.line(
        "clients answered",
        format!(
            "{}; {} requests asked again, {} of them recognised",
            count(events.answered),
            count(events.asked_again),
            count(events.recognised)
        ),
        events.answered == placed,
    );
    let taken = |payments: &BTreeMap<String, Payment>| {
        payments.values().filter(|payment| payment.taken).count() as u64
    };
    let (paid, shipped) = (taken(&books.payments), taken(&books.ledger));
    let (refused, cancelled) = (books.payments.len() as u64 - paid, books.ledger.len() as u64 - shipped);
    account.line(
        "payments",
        format!("{} taken, {} refused", count(paid), count(refused)),
        paid + refused == placed && paid > 0 && refused > 0,
    );
    account.line(
        "shipping",
        format!("{} shipped, {} cancelled", count(shipped), count(cancelled)),
        (shipped, cancelled) == (paid, refused),
    );
}

/// Checks that each row has its event, and each event its confirm.
fn logs(account: &mut Account, placed: u64, stores: [&Store; 2]) -> Result<()> {
    let (mut logged, mut confirmed, mut left, mut findings) = (vec![], vec![], 0, 0);
    for store in stores {
        let stats = store.stats()?;
        let relay = stats.relays.get(RELAY).cloned().unwrap_or_default();
        logged.push(stats.next_seq);
        confirmed.push(relay.confirmed);
        left += stats.backlog_events + relay.quarantined;
        findings += store.verify()?.findings_total;
    }
    let all = |numbers: &[u64]| numbers.iter().all(|number| *number == placed);
    let list =
        |numbers: &[u64]| numbers.iter().map(|number| count(*number)).collect::<Vec<_>>().join(" and ");
    account.line("events logged", format!("{}, one per order and hop", list(&logged)), all(&logged));
    account.line("events confirmed by the broker", list(&confirmed), all(&confirmed));
    account.line("events waiting or quarantined", count(left), left == 0);
    account.line("findings of Store::verify", count(findings), findings == 0);
    Ok(())
}

/// Checks both hops against the requests of the clients: once in effect, and in order.
fn promises(account: &mut Account, books: &Books, seed: u64) {
    let asked: BTreeSet<String> = (0..REQUESTS).map(|number| request(seed, number).id).collect();
    let mut line = |name, at: [usize; 2]| {
        let [payments, shipping] = at.map(|number| count(number as u64));
        account.line(name, format!("{payments} at payments, {shipping} at shipping"), at == [0, 0]);
    };
    let at = |count: &dyn Fn(&Arrivals) -> usize| books.arrivals.each_ref().map(count);
    line("lost", at(&|came| asked.iter().filter(|id| !came.effects.contains_key(*id)).count()));
    line("applied twice", at(&Arrivals::twice));
    line("invented", at(&|came| came.effects.keys().filter(|id| !asked.contains(*id)).count()));
    line("out of order for a customer", at(&|came| came.out_of_order));
}

/// Checks the sums of money and goods.
fn values(account: &mut Account, books: &Books) {
    let differing = |a: &BTreeMap<String, Payment>| {
        a.iter().filter(|(id, payment)| books.orders.get(*id) != Some(&payment.order)).count()
    };
    let differ = differing(&books.payments) + differing(&books.ledger);
    account.line("orders that changed on the way", count(differ as u64), differ == 0);

    // The work of one process that never crashes: the orders of each customer, one after another.
    let mut by_customer: Vec<&Order> = books.orders.values().collect();
    by_customer.sort_by_key(|order| (&order.customer, order.nth));
    let mut balances: BTreeMap<String, u64> = (0..CUSTOMERS).map(|n| (customer(n), OPENING)).collect();
    let mut wrong = 0;
    for order in by_customer {
        let balance = balances.entry(order.customer.clone()).or_default();
        let left = balance.checked_sub(order.cents);
        *balance = left.unwrap_or(*balance);
        let right = |payment: Option<&Payment>| payment.is_some_and(|it| it.taken == left.is_some());
        wrong += u64::from(!right(books.payments.get(&order.id)) || !right(books.ledger.get(&order.id)));
    }
    account.line("decided otherwise than at rest", count(wrong), wrong == 0 && balances == books.accounts);

    let before = CUSTOMERS * OPENING;
    let (customers, revenue) = (books.accounts.values().sum::<u64>(), books.revenue.values().sum::<u64>());
    account.line(
        "money",
        format!(
            "{} before; after, {} of the customers + {} earned",
            dollars(before),
            dollars(customers),
            dollars(revenue)
        ),
        customers + revenue == before,
    );
    let before = PRODUCTS.len() as u64 * STOCKED;
    let left = books.stock.values().sum::<u64>();
    let shipped = books.ledger.values().filter(|payment| payment.taken);
    let shipped = shipped.map(|payment| payment.order.pieces).sum::<u64>();
    account.line(
        "goods",
        format!("{} before; after, {} in stock + {} shipped", count(before), count(left), count(shipped)),
        left + shipped == before,
    );
}

/// Checks that each service died as often as planned, and rejected nothing.
fn happened(account: &mut Account, events: &Events) {
    for service in &events.services {
        let mut value = format!("{} times", service.kills);
        if service.role != Role::Orders {
            value += &format!("; {} repeats dropped", count(service.repeated));
        }
        if service.rejected > 0 {
            value += &format!("; {} DELIVERIES REJECTED", count(service.rejected));
        }
        account.line(
            format!("{} killed", service.role),
            value,
            service.kills == KILLS && service.rejected == 0,
        );
    }
    account.line(
        "services at the end",
        events.problem.clone().unwrap_or_else(|| "drained, closed".into()),
        events.problem.is_none(),
    );
}

fn dollars(cents: u64) -> String {
    format!("${}.{:02}", count(cents / 100), cents % 100)
}
