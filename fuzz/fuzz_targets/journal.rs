//! Whatever a journal holds, also with right checksums: damage or blocks, never a panic, in time that grows with its length alone.
#![no_main]

use libfuzzer_sys::fuzz_target;

const BLOCK: usize = 4096;

fuzz_target!(|input: (u8, &[u8])| {
    // Heads of frames at the beginnings of blocks, and zeros behind: what is between is summed and copied, and looked at by nobody.
    let (blocks, heads) = input;
    let mut halves = [vec![0; usize::from(blocks) * BLOCK], vec![0; usize::from(blocks) * BLOCK]];
    let mut places = halves.iter_mut().flat_map(|half| half.chunks_exact_mut(BLOCK));
    for head in heads.chunks(40) {
        let Some(place) = places.next() else { break };
        place[..head.len()].copy_from_slice(head);
        // An odd first byte begins a frame.
        if head[0] % 2 == 1 {
            place[..8].copy_from_slice(b"saltsalt");
        }
    }
    let [a, b] = &mut halves;
    onewrite::fuzzing::replay_journal(*b"saltsalt", [a, b]);
});
