//! Which of the times that backups noted can be believed.
//!
//! Backups are made one after the other, so their times rise in the order of their labels. One that
//! was made while a clock was wrong contradicts the others; the majority is believed. Whoever decides
//! by time asks for a bound that errs on the safe side where a time is not believed.

/// How far two clocks that are right may be apart.
const SLACK_S: i64 = 600;

/// Times of backups in the order in which they were made, in seconds since 1970.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Clock {
    times: Vec<i64>,
    believed: Vec<bool>,
    now: i64,
}

impl Clock {
    /// Judges `times`, which are in the order of making, at `now`.
    pub fn new(times: Vec<i64>, now: i64) -> Self {
        let believed = rising(&times, now.saturating_add(SLACK_S));
        Self { times, believed, now }
    }

    /// Whether a time fits the others.
    pub fn believes(&self, number: usize) -> bool {
        self.believed.get(number).copied().unwrap_or(false)
    }

    /// The latest that a backup can have been made: its own time, or the next that is believed.
    pub fn at_most(&self, number: usize) -> i64 {
        let next = (number..self.times.len()).find(|number| self.believes(*number));
        next.map_or(self.now, |next| self.times[next])
    }

    /// The earliest that a backup can have been made: its own time, or the one before that is believed.
    pub fn at_least(&self, number: usize) -> Option<i64> {
        (0..=number).rev().find(|number| self.believes(*number)).map(|number| self.times[number])
    }
}

/// The longest run of times that rise, of those up to `limit`; of several the one with later times.
fn rising(times: &[i64], limit: i64) -> Vec<bool> {
    // of each: how long the longest run is that ends with it, and the one before it in that
    let mut runs: Vec<(usize, Option<usize>)> = Vec::with_capacity(times.len());

    for time in times {
        let mut best: Option<((usize, i64), usize)> = None;
        for (before, (len, _)) in runs.iter().enumerate() {
            let fits = *len > 0 && times[before] <= *time;
            let key = (*len, times[before]);
            if fits && best.as_ref().is_none_or(|(best, _)| key > *best) {
                best = Some((key, before));
            }
        }
        runs.push(match *time <= limit {
            true => (best.map_or(1, |((len, _), _)| len + 1), best.map(|(_, before)| before)),
            false => (0, None),
        });
    }
    let mut believed = vec![false; times.len()];
    let last = runs.iter().enumerate().filter(|(_, run)| run.0 > 0).max_by_key(|(number, run)| (run.0, times[*number]));
    let mut at = last.map(|(number, _)| number);
    while let Some(number) = at {
        believed[number] = true;
        at = runs[number].1;
    }
    believed
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: i64 = 1_800_000_000;
    const DAY_S: i64 = 86_400;

    /// Days before now.
    fn clock(days: &[i64]) -> Clock {
        Clock::new(days.iter().map(|days| NOW - days * DAY_S).collect(), NOW)
    }

    fn believed(days: &[i64]) -> String {
        let clock = clock(days);
        (0..days.len()).map(|number| if clock.believes(number) { '+' } else { '-' }).collect()
    }

    #[test]
    fn one_wrong_clock_is_not_believed() {
        assert_eq!(believed(&[]), "");
        assert_eq!(believed(&[40, 30, 20, 10]), "++++");
        assert_eq!(believed(&[40, 30, 30, 10]), "++++");
        // in the future, behind, ahead
        assert_eq!(believed(&[40, 30, -400, 10]), "++-+");
        assert_eq!(believed(&[40, 30, 20_000, 10]), "++-+");
        assert_eq!(believed(&[40, 20_000, 30, 10]), "+-++");
        assert_eq!(believed(&[40, 2, 30, 20, 10]), "+-+++");
        assert_eq!(believed(&[-400]), "-");
        assert_eq!(Clock::new(vec![NOW + 60], NOW).believed, [true]);
    }

    #[test]
    fn bounds_of_what_is_not_believed() {
        let clock = clock(&[40, -400, 30, 20_000]);
        let days = |time: i64| (NOW - time) / DAY_S;
        assert_eq!((0..4).map(|number| days(clock.at_most(number))).collect::<Vec<_>>(), [40, 30, 30, 0]);
        let least: Vec<_> = (0..4).map(|number| clock.at_least(number).map(days)).collect();
        assert_eq!(least, [Some(40), Some(40), Some(30), Some(30)]);
    }
}
