// SPDX-License-Identifier: BSD-3-Clause
//! Medians, and how sure they are.
//!
//! The interval of a median is that of the sign test: two of the sorted values, which have the
//! true median between them with a probability that depends on their number alone and on no
//! distribution. Six values are the fewest whose extremes reach 95 % (96.9 %).

/// The least probability that an interval is chosen for.
const LEVEL: f64 = 0.95;

/// A cell of which the interval lies wholly below this ratio to upstream's falls behind.
pub const BEHIND: f64 = 0.95;

/// A median and where it may be.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Estimate {
    /// The median of the values.
    pub median: f64,
    /// The true median is at least this …
    pub low: f64,
    /// … and at most this …
    pub high: f64,
    /// … with this probability.
    pub level: f64,
}

impl Estimate {
    /// Whether the interval holds 95 % and lies wholly below `bound`.
    pub fn is_surely_below(&self, bound: f64) -> bool {
        self.level >= LEVEL && self.high < bound
    }
}

/// The estimate from these values; none from none.
pub fn estimate(values: impl IntoIterator<Item = f64>) -> Option<Estimate> {
    let mut sorted: Vec<f64> = values.into_iter().collect();
    sorted.sort_by(f64::total_cmp);
    let count = sorted.len();
    if count == 0 {
        return None;
    }
    let median = (sorted[(count - 1) / 2] + sorted[count / 2]) / 2.0;
    // The closest pair that reaches the level, else the extremes.
    let (mut skipped, mut outside) = (0, tail(count, 0));
    while skipped + 1 < count / 2 && tail(count, skipped + 1) <= 1.0 - LEVEL {
        skipped += 1;
        outside = tail(count, skipped);
    }
    Some(Estimate {
        median,
        low: sorted[skipped],
        high: sorted[count - 1 - skipped],
        level: 1.0 - outside,
    })
}

/// The probability that the true median lies outside of the values that remain when `skipped`
/// are left out at each end.
fn tail(count: usize, skipped: usize) -> f64 {
    let mut choose = 1.0;
    let mut sum = 0.0;
    for i in 0..=skipped {
        sum += choose;
        choose *= (count - i) as f64 / (i + 1) as f64;
    }
    (2.0 * sum / 2f64.powi(count as i32)).min(1.0)
}

/// The geometric mean; none of none.
pub fn geometric_mean(values: impl IntoIterator<Item = f64>) -> Option<f64> {
    let logs: Vec<f64> = values.into_iter().map(f64::ln).collect();
    (!logs.is_empty()).then(|| (logs.iter().sum::<f64>() / logs.len() as f64).exp())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(values: std::ops::RangeInclusive<u32>) -> Estimate {
        estimate(values.map(f64::from)).unwrap()
    }

    // The levels are those of tables of the binomial distribution.
    #[test]
    fn intervals_are_those_of_the_sign_test() {
        let six = of(1..=6);
        assert_eq!((six.median, six.low, six.high), (3.5, 1.0, 6.0));
        assert!((six.level - 0.96875).abs() < 1e-9);
        let nine = of(1..=9);
        assert_eq!((nine.median, nine.low, nine.high), (5.0, 2.0, 8.0));
        assert!((nine.level - 0.9609375).abs() < 1e-9);
        let twenty = of(1..=20);
        assert_eq!((twenty.low, twenty.high), (6.0, 15.0));
        assert!((twenty.level - 0.9586).abs() < 1e-4);
    }

    #[test]
    fn few_values_promise_less() {
        let five = of(1..=5);
        assert_eq!((five.low, five.high), (1.0, 5.0));
        assert!((five.level - 0.9375).abs() < 1e-9);
        assert!(!five.is_surely_below(100.0));
        assert!(of(1..=6).is_surely_below(6.5));
        assert!(!of(1..=6).is_surely_below(6.0));
        assert_eq!(of(1..=1).level, 0.0);
        assert_eq!(estimate([]), None);
    }

    #[test]
    fn the_geometric_mean_of_a_ratio_and_its_inverse_is_one() {
        assert!((geometric_mean([4.0, 0.25]).unwrap() - 1.0).abs() < 1e-12);
        assert_eq!(geometric_mean([]), None);
    }
}
