//! Jittered exponential backoff from a seed, because the machine itself draws no randomness.

/// The SplitMix64 generator. It is small, and good enough to keep many relays from retrying in
/// step.
#[derive(Debug, Clone)]
pub(crate) struct Jitter(u64);

impl Jitter {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Returns the wait before try number `tries` + 1. It is between half and all of `first_ms`
    /// doubled `tries` times, and `max_ms` at most.
    pub(crate) fn wait_ms(&mut self, first_ms: u64, max_ms: u64, tries: u32) -> u64 {
        let full = first_ms.saturating_mul(1 << tries.min(32)).clamp(1, max_ms.max(1));
        let half = full / 2;
        half + self.next() % (full - half + 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grows_to_its_limit_and_no_further() {
        let mut jitter = Jitter::new(7);
        for tries in 0..70 {
            let full = 100_u64.saturating_mul(1 << tries.min(32)).min(30_000);
            let wait = jitter.wait_ms(100, 30_000, tries);
            assert!((full / 2..=full).contains(&wait), "{tries}: {wait}");
        }
    }
}
