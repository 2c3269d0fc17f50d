//! Reads a run's folder: histories, store files, the tap's file.

use std::io;
use std::path::{Path, PathBuf};

use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition, TableError};

use crate::formats::{Run, read_history, read_tap};
use crate::judge::Judge;
use crate::verdict::Verdict;

/// `onewrite.log`: sequence number to record.
const LOG: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("onewrite.log");
/// `onewrite.exceptions`: (cursor u32, sequence number u64), big-endian, to the exceptions to the cursor.
const EXCEPTIONS: TableDefinition<'_, &[u8], &[u8]> = TableDefinition::new("onewrite.exceptions");
/// `onewrite.rejected`: deliveries that a consumer has rejected.
const REJECTED: TableDefinition<'_, &[u8], &[u8]> = TableDefinition::new("onewrite.rejected");
/// The application's own: batch to number of events.
const BATCHES: TableDefinition<'_, u64, u64> = TableDefinition::new("batches");
/// The consumer's own: application and number, `a0/17`, to how often it was applied.
const EFFECTS: TableDefinition<'_, &str, u64> = TableDefinition::new("effects");
/// The consumer's own: application and key, `a0/k1`, to number and sum of effects.
const BALANCES: TableDefinition<'_, &str, (u64, u64)> = TableDefinition::new("balances");

type Result<T, E = Box<dyn std::error::Error>> = std::result::Result<T, E>;

/// Judges the run in this folder.
///
/// # Errors
/// What keeps it from judging: a file that is missing, or damaged where a kill cannot have damaged it.
pub fn judge(folder: &Path) -> Result<(Run, Verdict)> {
    let run: Run = serde_json::from_slice(&std::fs::read(folder.join("run.json"))?)?;
    let mut judge = Judge::new(run.apps.iter().map(String::as_str));
    if run.apps.is_empty() {
        return Err("run.json names no application".into());
    }
    run.keep_logs.iter().for_each(|app| judge.keeps_log(app));
    for app in &run.apps {
        for path in histories(folder, app)? {
            read_history(&path, |line| judge.history(app, line))?;
        }
        read_app(&folder.join(format!("{app}.redb")), app, &mut judge)?;
    }
    read_tap(&folder.join("tap.bin"), |message| judge.tapped(&message))?;
    read_consumer(&folder.join(format!("{}.redb", run.consumer)), &mut judge)?;
    let verdict = judge.finish();
    if verdict.events == 0 {
        return Err("there is not one event: nothing was tested".into());
    }
    Ok((run, verdict))
}

/// The histories of an application, in the order of its lives: names hold the number of the life in five digits.
fn histories(folder: &Path, app: &str) -> io::Result<Vec<PathBuf>> {
    let mut paths = Vec::new();
    for entry in std::fs::read_dir(folder.join("hist"))? {
        let path = entry?.path();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        if name.starts_with(&format!("{app}-")) {
            paths.push(path);
        }
    }
    paths.sort();
    if paths.is_empty() {
        return Err(io::Error::other(format!("there is no history of {app}")));
    }
    Ok(paths)
}

fn read_app(path: &Path, app: &str, judge: &mut Judge) -> Result<()> {
    let db = Database::open(path)?;
    let tx = db.begin_read()?;
    for row in tx.open_table(LOG)?.iter()? {
        let (seq, record) = row?;
        judge.record(app, seq.value(), record.value());
    }
    match tx.open_table(BATCHES) {
        Ok(table) => {
            for row in table.iter()? {
                let (batch, events) = row?;
                judge.row(app, batch.value(), events.value());
            }
        }
        Err(TableError::TableDoesNotExist(_)) => {}
        Err(error) => return Err(error.into()),
    }
    for row in tx.open_table(EXCEPTIONS)?.iter()? {
        let (key, row) = row?;
        if let (Some(seq), Some(reason)) = (key.value().last_chunk(), reason(row.value())) {
            judge.quarantined(app, u64::from_be_bytes(*seq), reason);
        }
    }
    Ok(())
}

/// Why an event is in quarantine, if it is: state 2 and a fault with a text.
fn reason(row: &[u8]) -> Option<String> {
    let (state, rest) = row.split_first()?;
    // time u64, holds key u8, attempts u32, destination attempts u32
    let (_, rest) = rest.split_at_checked(8 + 1 + 4 + 4)?;
    let (keyed, mut rest) = rest.split_first()?;
    if *keyed == 1 {
        let (len, after) = rest.split_first()?;
        (_, rest) = after.split_at_checked(usize::from(*len))?;
    }
    let (fault, rest) = rest.split_first()?;
    // class u8, code u16, length of the text u16
    let (_, text) = rest.split_at_checked(5)?;
    (*state == 2 && *fault == 1).then(|| String::from_utf8_lossy(text).into_owned())
}

fn read_consumer(path: &Path, judge: &mut Judge) -> Result<()> {
    let db = Database::open(path)?;
    let tx = db.begin_read()?;
    for row in tx.open_table(EFFECTS)?.iter()? {
        let (name, times) = row?;
        let (app, n) = name.value().split_once('/').ok_or("an effect without a name")?;
        judge.effect(app, n.parse()?, times.value());
    }
    for row in tx.open_table(BALANCES)?.iter()? {
        let (name, balance) = row?;
        let (app, key) = name.value().split_once('/').ok_or("a balance without a name")?;
        let (effects, sum) = balance.value();
        judge.balance(app, key, effects, sum);
    }
    for row in tx.open_table(REJECTED)?.iter()? {
        let (key, row) = row?;
        // The row of a scope itself is its two counters; each delivery has a 0 behind the scope.
        let scope = key.value().first().map_or(0, |len| usize::from(*len) + 1);
        if key.value().get(scope) == Some(&0) {
            judge.rejected(&String::from_utf8_lossy(row.value()));
        }
    }
    Ok(())
}
