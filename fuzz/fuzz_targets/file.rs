//! Whatever is changed in the bytes of a store's file: errors or answers, never a panic out of a call, never a process that ends.
#![no_main]

use std::path::PathBuf;
use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use onewrite::{Event, ExpectedRevision, Store};

static FOLDER: LazyLock<PathBuf> = LazyLock::new(|| {
    // The engine's panics are caught by the library. The fuzzer's own hook would end the process at each.
    std::panic::set_hook(Box::new(|_| {}));
    let folder = std::env::temp_dir().join(format!("onewrite-fuzz-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    folder
});

static WHOLE: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let path = FOLDER.join("whole.redb");
    let store = Store::open(&path).unwrap();
    for n in 0..20_u8 {
        let write = move |tx: &onewrite::Transaction| {
            let stream = tx.stream(format!("stream-{}", n % 3));
            stream.append([Event::bytes("e", vec![n; 50]).unpublished()], ExpectedRevision::Any)?;
            stream.save_snapshot(1, b"state")?;
            tx.first_time("scope", [n])?;
            tx.append(Event::bytes("paid", vec![n]).key("k").to("", "q"))
        };
        store.write(write).unwrap();
    }
    store.close().unwrap();
    std::fs::read(&path).unwrap()
});

fuzz_target!(|changes: Vec<(u32, u8)>| {
    let mut bytes = WHOLE.clone();
    for (at, byte) in changes {
        let at = at as usize % bytes.len();
        bytes[at] = byte;
    }
    let path = FOLDER.join("changed.redb");
    std::fs::write(&path, bytes).unwrap();
    let Ok(store) = Store::open(&path) else { return };
    let _ = (store.stats(), store.verify(), store.verify_pages());
    if let Ok(snapshot) = store.read() {
        let _ = snapshot.events(0).map(|events| events.take(1000).count());
        let _ = snapshot.stream("stream-1").map(|reader| reader.events(0).take(1000).count());
    }
    let _ = store.write(|tx| tx.append(Event::bytes("paid", "1").key("k").to("", "q")));
    let _ = store.write(|tx| tx.stream("stream-1").truncate_before(2));
    let _ = store.rejected("scope").redrive_all(&onewrite::QuarantineFilter::all());
    let _ = store.close();
});
