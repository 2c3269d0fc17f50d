//! Matching of topic patterns and routing keys.
//!
//! Both consist of words with dots between. In a pattern `*` matches exactly one word and `#` any
//! number of words, also none. An empty text has no words at all, as in RabbitMQ. In `a..b` the
//! middle word is empty.

/// Whether `pattern` matches `key`. Takes at most `words in pattern × words in key` steps.
pub(in crate::broker) fn matches(pattern: &str, key: &str) -> bool {
    let (pattern, key) = (words(pattern), words(key));
    let (mut p, mut k) = (0, 0);
    // The last `#` seen, and the key's index at that point. On a mismatch the `#` swallows one word
    // more. An earlier `#` need not be tried again, since the last `#` can swallow the same words.
    let mut hash: Option<(usize, usize)> = None;
    while let Some(&word) = key.get(k) {
        match pattern.get(p) {
            Some(&"#") => {
                hash = Some((p, k));
                p += 1;
            }
            Some(&wanted) if wanted == "*" || wanted == word => {
                p += 1;
                k += 1;
            }
            _ => {
                let Some((hash_p, hash_k)) = hash else { return false };
                hash = Some((hash_p, hash_k + 1));
                p = hash_p + 1;
                k = hash_k + 1;
            }
        }
    }
    pattern.iter().skip(p).all(|&rest| rest == "#")
}

fn words(text: &str) -> Vec<&str> {
    if text.is_empty() { Vec::new() } else { text.split('.').collect() }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn words_stars_and_hashes() {
        for (pattern, key, expected) in [
            ("payment.completed", "payment.completed", true),
            ("payment.completed", "payment.failed", false),
            ("payment.*", "payment.failed", true),
            ("payment.*", "payment", false),
            ("payment.*", "payment.failed.late", false),
            ("payment.#", "payment", true),
            ("payment.#", "payment.failed.late", true),
            ("#.late", "late", true),
            ("#.late", "payment.failed.late", true),
            ("#.a.#.b", "x.a.a.y.b", true),
            ("#.a.#.b", "x.a.a.y", false),
            ("*.#", "", false),
            ("#", "", true),
            ("", "", true),
            ("", "a", false),
            ("*", "", false),
            ("a.*.b", "a..b", true),
            ("#.#", "a", true),
        ] {
            assert_eq!(matches(pattern, key), expected, "{pattern} on {key}");
        }
    }

    /// The definition, as a simple recursion.
    fn naive(pattern: &[&str], key: &[&str]) -> bool {
        match (pattern.split_first(), key.split_first()) {
            (None, None) => true,
            (None, Some(_)) => false,
            (Some((&"#", rest)), None) => naive(rest, key),
            (Some((&"#", rest)), Some((_, key_rest))) => naive(rest, key) || naive(pattern, key_rest),
            (Some(_), None) => false,
            (Some((&word, rest)), Some((&first, key_rest))) => {
                (word == "*" || word == first) && naive(rest, key_rest)
            }
        }
    }

    proptest! {
        /// Goal: the quick matcher agrees with the definition. Method: few different words, so that
        /// matches are common.
        #[test]
        fn agrees_with_the_naive_matcher(
            pattern in proptest::collection::vec(prop_oneof!["a", "b", Just("".to_owned()), Just("*".to_owned()), Just("#".to_owned())], 0..7),
            key in proptest::collection::vec(prop_oneof!["a", "b", Just("".to_owned())], 0..8),
        ) {
            let (pattern, key) = (pattern.join("."), key.join("."));
            prop_assert_eq!(matches(&pattern, &key), naive(&words(&pattern), &words(&key)), "{} on {}", pattern, key);
        }
    }
}
