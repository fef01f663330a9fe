//! PostgreSQL's `timestamptz`: microseconds since 2000-01-01 00:00 UTC.

use std::fmt;

/// Seconds from 1970 to 2000.
const EPOCH_S: i64 = 946_684_800;

/// A moment, in microseconds since 2000-01-01 00:00 UTC.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TimestampTz(pub i64);

impl TimestampTz {
    /// From seconds since 1970; `None` beyond what PostgreSQL can hold.
    pub fn from_unix_s(seconds: i64) -> Option<Self> {
        seconds.checked_sub(EPOCH_S)?.checked_mul(1_000_000).map(Self)
    }

    /// From microseconds since 1970; `None` beyond what PostgreSQL can hold.
    pub fn from_unix_us(micros: i64) -> Option<Self> {
        micros.checked_sub(EPOCH_S * 1_000_000).map(Self)
    }

    /// Whole seconds since 1970, rounded down.
    pub fn unix_s(self) -> i64 {
        self.0.div_euclid(1_000_000).saturating_add(EPOCH_S)
    }

    /// Microseconds since 1970.
    pub fn unix_us(self) -> i64 {
        self.0.saturating_add(EPOCH_S * 1_000_000)
    }
}

/// As PostgreSQL reads it whatever its time zone: `2026-11-22 14:30:00.123456+00`.
impl fmt::Display for TimestampTz {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match jiff::Timestamp::from_microsecond(self.unix_us()) {
            Ok(time) => {
                let civil = jiff::tz::Offset::UTC.to_datetime(time);
                let (date, time) = (civil.date(), civil.time());
                match time.subsec_nanosecond() {
                    0 => write!(f, "{date} {time}+00"),
                    nanos => write!(
                        f,
                        "{date} {}.{:06}+00",
                        time.with().subsec_nanosecond(0).build().unwrap_or(time),
                        nanos / 1000
                    ),
                }
            }
            Err(_) => write!(f, "{} us since 2000", self.0),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn is_written_as_postgresql_reads_it() {
        let time = TimestampTz::from_unix_us(1_795_357_800_123_456).unwrap();
        assert_eq!(time.to_string(), "2026-11-22 14:30:00.123456+00");
        assert_eq!(TimestampTz(0).to_string(), "2000-01-01 00:00:00+00");
        assert_eq!(TimestampTz(1000).to_string(), "2000-01-01 00:00:00.001000+00");
        assert_eq!(TimestampTz(-1).unix_s(), EPOCH_S - 1);
        assert_eq!(TimestampTz::from_unix_s(0).unwrap().unix_us(), 0);
        assert!(TimestampTz::from_unix_s(i64::MAX).is_none());
        assert!(!TimestampTz(i64::MAX).to_string().is_empty());
    }
}
