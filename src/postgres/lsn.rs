//! Positions in the WAL, and the timelines they lie on.

use std::fmt;
use std::str::FromStr;

/// A byte position in the WAL, written as PostgreSQL writes it: `16/B374D848`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Lsn(pub u64);

impl Lsn {
    /// Zero: PostgreSQL's "no position".
    pub const INVALID: Self = Self(0);

    /// Whether this is a position at all.
    pub fn is_valid(self) -> bool {
        self != Self::INVALID
    }

    /// The position `bytes` further on, unless that is past the end of the WAL.
    pub fn checked_add(self, bytes: u64) -> Option<Self> {
        self.0.checked_add(bytes).map(Self)
    }

    /// The position `bytes` before, unless that is before its beginning.
    pub fn checked_sub(self, bytes: u64) -> Option<Self> {
        self.0.checked_sub(bytes).map(Self)
    }

    /// The bytes of WAL from `earlier` to here; `None` when `earlier` is later.
    pub fn bytes_since(self, earlier: Self) -> Option<u64> {
        self.0.checked_sub(earlier.0)
    }
}

impl fmt::Display for Lsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:X}/{:X}", self.0 >> 32, self.0 & 0xFFFF_FFFF)
    }
}

/// A text that is no LSN.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("\"{text}\" is not an LSN, which reads like 16/B374D848")]
pub struct LsnError {
    /// what was given
    pub text: String,
}

impl FromStr for Lsn {
    type Err = LsnError;

    fn from_str(text: &str) -> Result<Self, LsnError> {
        let half = |digits: &str| match digits.len() {
            1..=8 if digits.bytes().all(|b| b.is_ascii_hexdigit()) => u64::from_str_radix(digits, 16).ok(),
            _ => None,
        };
        text.split_once('/')
            .and_then(|(high, low)| Some(Self(half(high)? << 32 | half(low)?)))
            .ok_or_else(|| LsnError { text: text.to_owned() })
    }
}

/// A timeline's id, written in decimal; in the names of WAL files it is 8 hexadecimal digits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Timeline(pub u32);

impl fmt::Display for Timeline {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// A text that is no timeline.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("\"{text}\" is not a timeline, which is a number from 1 to 4294967295")]
pub struct TimelineError {
    /// what was given
    pub text: String,
}

impl FromStr for Timeline {
    type Err = TimelineError;

    fn from_str(text: &str) -> Result<Self, TimelineError> {
        let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
        match text.parse() {
            Ok(id) if digits && id > 0 => Ok(Self(id)),
            _ => Err(TimelineError { text: text.to_owned() }),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn reads_and_writes_as_postgresql_does() {
        let lsn: Lsn = "16/B374D848".parse().unwrap();
        assert_eq!(lsn, Lsn(0x16_B374_D848));
        assert_eq!(lsn.to_string(), "16/B374D848");
        assert_eq!(Lsn(0x0100_0000).to_string(), "0/1000000");
        assert_eq!("ffffffff/ffffffff".parse(), Ok(Lsn(u64::MAX)));
    }

    #[test]
    fn refuses_what_is_no_lsn() {
        for text in ["", "/", "1", "1/", "/1", "1/2/3", "+1/2", "1/ 2", "100000000/0", "0/100000000", "g/0", "é/0"] {
            assert_eq!(text.parse::<Lsn>(), Err(LsnError { text: text.to_owned() }));
        }
        for text in ["", "0", "-1", "+1", "4294967296", "1 "] {
            assert!(text.parse::<Timeline>().is_err(), "{text}");
        }
    }

    #[test]
    fn arithmetic_stops_at_both_ends() {
        assert_eq!(Lsn(u64::MAX).checked_add(1), None);
        assert_eq!(Lsn(5).checked_sub(6), None);
        assert_eq!(Lsn(5).bytes_since(Lsn(3)), Some(2));
        assert_eq!(Lsn(3).bytes_since(Lsn(5)), None);
        assert!(!Lsn::INVALID.is_valid());
    }

    proptest! {
        #[test]
        fn round_trips(value: u64) {
            prop_assert_eq!(Lsn(value).to_string().parse(), Ok(Lsn(value)));
        }

        #[test]
        fn any_text_is_answered(text in ".*") {
            let _ = text.parse::<Lsn>();
            let _ = text.parse::<Timeline>();
        }
    }
}
