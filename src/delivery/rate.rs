//! A limit on publishes per second: a token bucket, with the time as a parameter.
//!
//! **Invariant.** In any period `t`, at most `burst + rate × t` publishes go out, including
//! resends.

/// The burst after a pause, in milliseconds' worth of publishes.
const BURST_MS: u64 = 100;

const NS_PER_MS: u64 = 1_000_000;

/// A token bucket that keeps the time at which it would be full again. That is one number, and
/// nothing has to be refilled.
#[derive(Debug, Clone)]
pub(crate) struct Bucket {
    per_second: u32,
    full_at_ns: u64,
}

impl Bucket {
    /// Makes a full bucket. `per_second` is at least 1.
    pub(crate) fn new(per_second: u32) -> Self {
        Self { per_second, full_at_ns: 0 }
    }

    /// Returns the number of publishes that a full bucket allows at once.
    pub(crate) fn burst(per_second: u32) -> u64 {
        (u64::from(per_second) * BURST_MS / 1000).max(1)
    }

    /// Returns the time that one publish takes. It is rounded up, so the rate is never exceeded.
    fn cost_ns(&self) -> u64 {
        1_000_000_000_u64.div_ceil(u64::from(self.per_second).max(1))
    }

    /// Returns when so many publishes may go, at most a full bucket.
    pub(crate) fn free_at_ms(&self, publishes: u64) -> u64 {
        let missing = Self::burst(self.per_second).saturating_sub(publishes.max(1));
        self.full_at_ns.saturating_sub(missing * self.cost_ns()).div_ceil(NS_PER_MS)
    }

    /// Returns when the relay wakes to publish again, with so many events ready. That is when half
    /// a bucket of them may go, so that a high rate does not mean many wake-ups.
    pub(crate) fn wake_at_ms(&self, ready: usize) -> u64 {
        self.free_at_ms((Self::burst(self.per_second) / 2).min(ready as u64))
    }

    /// Takes one token if there is one.
    pub(crate) fn take(&mut self, now_ms: u64) -> bool {
        if self.free_at_ms(1) > now_ms {
            return false;
        }
        self.full_at_ns =
            self.full_at_ns.max(now_ms.saturating_mul(NS_PER_MS)).saturating_add(self.cost_ns());
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: no period sees more than burst and rate allow, and little less when there is always
    /// something to send. Method: rates from 1 to 100,000 per second, asked at uneven times,
    /// counted over all pairs of moments.
    #[test]
    fn holds_its_rate_over_every_stretch() {
        for per_second in [1, 2, 3, 7, 10, 99, 1_000, 12_345, 100_000] {
            let mut bucket = Bucket::new(per_second);
            let (burst, mut now_ms, mut sent) = (Bucket::burst(per_second), 0_u64, Vec::new());
            for step in 0..400_u64 {
                let mut taken = 0;
                while bucket.take(now_ms) {
                    taken += 1;
                }
                sent.push((now_ms, taken));
                now_ms += [0, 1, 3, 40, 1700][usize::try_from(step * 7 % 5).unwrap()];
            }
            for (first, (from, _)) in sent.iter().enumerate() {
                let mut count = 0;
                for (to, taken) in &sent[first..] {
                    count += taken;
                    let allowed = burst + u64::from(per_second) * (to - from) / 1000;
                    assert!(count <= allowed, "{per_second}/s: {count} of {allowed} from {from} to {to}");
                }
            }
        }
    }

    /// Goal: the bucket reaches its rate with few wake-ups. Method: sleep until its wake-up time,
    /// always with more to send, for ten seconds.
    #[test]
    fn reaches_its_rate_with_few_wake_ups() {
        for per_second in [1, 7, 1_000, 50_000] {
            let mut bucket = Bucket::new(per_second);
            let (mut now_ms, mut sent, mut wake_ups) = (0, 0_u64, 0);
            while now_ms < 10_000 {
                while bucket.take(now_ms) {
                    sent += 1;
                }
                wake_ups += 1;
                let next = bucket.wake_at_ms(usize::MAX);
                assert!(next > now_ms, "it sleeps");
                now_ms = next;
            }
            let whole = 10 * u64::from(per_second);
            assert!(sent >= whole * 95 / 100, "{per_second}/s: {sent} in ten seconds");
            assert!(wake_ups <= 10 * 21, "{per_second}/s: {wake_ups} wake-ups in ten seconds");
        }
    }
}
