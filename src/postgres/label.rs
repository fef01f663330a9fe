//! Labels of backups: `20240107-120000F`, `20240107-120000F_20240108-120000D`, `20240107-120000F_20240108-180000I`.
//!
//! The rule is pgBackRest's: a differential or incremental backup carries the label of its full backup,
//! and a new label sorts after every earlier one, whatever the clock did. Times are UTC.

use std::fmt;
use std::str::FromStr;

use jiff::civil::DateTime;
use jiff::tz::TimeZone;
use jiff::{Timestamp, ToSpan};

/// What a backup builds on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BackupKind {
    /// nothing
    Full,
    /// the last full backup
    Diff,
    /// the last backup
    Incr,
}

impl BackupKind {
    /// The letter that ends a label.
    pub fn letter(self) -> char {
        match self {
            Self::Full => 'F',
            Self::Diff => 'D',
            Self::Incr => 'I',
        }
    }
}

impl fmt::Display for BackupKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Full => "full",
            Self::Diff => "diff",
            Self::Incr => "incr",
        })
    }
}

/// A backup's label. The order is that in which backups were taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Label {
    taken: DateTime,
    full_taken: DateTime,
    kind: BackupKind,
}

/// A text that is no label, or a label that cannot be made.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LabelError {
    /// not a label
    #[error("\"{text}\" is not a backup label, which reads like 20240107-120000F")]
    Text {
        /// what was given
        text: String,
    },
    /// a differential or incremental backup of nothing
    #[error("no full backup that this {kind} backup could build on")]
    NoFull {
        /// the kind asked for
        kind: BackupKind,
    },
    /// a clock that shows no year from 0 to 9999, or labels that have used them up
    #[error("no label can be made for {now_s} seconds since 1970")]
    Time {
        /// what the clock showed
        now_s: i64,
    },
}

impl Label {
    /// The label of a backup that starts now.
    ///
    /// `full` is the backup whose full backup the new one builds on (any label of that full will do); not used for a
    /// full. `now_s` is what the clock shows, in seconds since 1970. When `newest` is not earlier than that, the label
    /// takes the second after it.
    pub fn next(kind: BackupKind, full: Option<Self>, now_s: i64, newest: Option<Self>) -> Result<Self, LabelError> {
        let bad_time = LabelError::Time { now_s };
        let now = Timestamp::from_second(now_s).map_err(|_| bad_time.clone())?;
        let now = TimeZone::UTC.to_datetime(now);
        let full = if kind == BackupKind::Full { None } else { Some(full.ok_or(LabelError::NoFull { kind })?) };
        let newest = newest.max(full).map(|label| label.taken.max(label.full_taken));
        let taken = match newest {
            Some(newest) if now <= newest => newest.checked_add(1.second()).map_err(|_| bad_time.clone())?,
            _ => now,
        };
        if taken.year() < 0 {
            return Err(bad_time);
        }
        Ok(Self { taken, full_taken: full.map_or(taken, |label| label.full_taken), kind })
    }

    /// What the backup builds on.
    pub fn kind(self) -> BackupKind {
        self.kind
    }

    /// The label of the full backup it builds on; a full's is itself.
    pub fn full(self) -> Self {
        Self { taken: self.full_taken, full_taken: self.full_taken, kind: BackupKind::Full }
    }

    /// The time in the label, in seconds since 1970.
    pub fn taken_s(self) -> i64 {
        TimeZone::UTC.to_timestamp(self.taken).map_or(0, Timestamp::as_second)
    }

    fn parse(text: &str) -> Option<Self> {
        let mut parts = text.split('_');
        let full_taken = parse_part(parts.next()?, 'F')?;
        let (taken, kind) = match parts.next() {
            None => (full_taken, BackupKind::Full),
            Some(part) if part.ends_with('D') => (parse_part(part, 'D')?, BackupKind::Diff),
            Some(part) => (parse_part(part, 'I')?, BackupKind::Incr),
        };
        let sound = parts.next().is_none() && (kind == BackupKind::Full || full_taken < taken);
        sound.then_some(Self { taken, full_taken, kind })
    }
}

/// `20240107-120000` and the letter
fn parse_part(part: &str, letter: char) -> Option<DateTime> {
    let digits = part.strip_suffix(letter)?.as_bytes();
    let shaped = digits.len() == 15
        && digits.iter().enumerate().all(|(at, b)| if at == 8 { *b == b'-' } else { b.is_ascii_digit() });
    if !shaped {
        return None;
    }
    let number = |from: usize, to: usize| digits[from..to].iter().fold(0i16, |sum, b| sum * 10 + i16::from(b - b'0'));
    // two digits always fit
    let two = |from: usize| number(from, from + 2) as i8;
    DateTime::new(number(0, 4), two(4), two(6), two(9), two(11), two(13), 0).ok()
}

impl FromStr for Label {
    type Err = LabelError;

    fn from_str(text: &str) -> Result<Self, LabelError> {
        Self::parse(text).ok_or_else(|| LabelError::Text { text: text.to_owned() })
    }
}

impl fmt::Display for Label {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let stamp = |time: DateTime| {
            let (date, clock) = (time.date(), time.time());
            let day = format!("{:04}{:02}{:02}", date.year(), date.month(), date.day());
            format!("{day}-{:02}{:02}{:02}", clock.hour(), clock.minute(), clock.second())
        };
        if self.kind == BackupKind::Full {
            return f.pad(&format!("{}F", stamp(self.taken)));
        }
        f.pad(&format!("{}F_{}{}", stamp(self.full_taken), stamp(self.taken), self.kind.letter()))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    fn label(text: &str) -> Label {
        text.parse().unwrap()
    }

    /// 2024-01-07 12:00:00 UTC
    const NOON_S: i64 = 1_704_628_800;

    #[test]
    fn reads_and_writes_every_kind() {
        for (text, kind) in [
            ("20240107-120000F", BackupKind::Full),
            ("20240107-120000F_20240108-120000D", BackupKind::Diff),
            ("20240107-120000F_20240108-180000I", BackupKind::Incr),
        ] {
            assert_eq!(label(text).to_string(), text);
            assert_eq!(label(text).kind(), kind);
            assert_eq!(label(text).full(), label("20240107-120000F"));
        }
        assert_eq!(label("20240107-120000F").taken_s(), NOON_S);
    }

    #[test]
    fn refuses_other_texts() {
        for text in [
            "",
            "latest",
            "20240107-120000",
            "20240107-120000D",
            "20240107-120000F_",
            "20240107-120000F_20240108-120000F",
            "20240107-120000F_20240107-120000D",
            "20240107-120000F_20240106-120000D",
            "20240107-120000F_20240108-120000D_20240109-120000I",
            "20240230-120000F",
            "20240107-126000F",
            "20240107-240000F",
            "2024010+-120000F",
            "20240107-12000éF",
            "../20240107-120000F",
        ] {
            assert_eq!(text.parse::<Label>(), Err(LabelError::Text { text: text.to_owned() }));
        }
    }

    #[test]
    fn a_new_label_comes_after_every_other() {
        let full = Label::next(BackupKind::Full, None, NOON_S, None).unwrap();
        assert_eq!(full.to_string(), "20240107-120000F");
        let diff = Label::next(BackupKind::Diff, Some(full), NOON_S, Some(full)).unwrap();
        assert_eq!(diff.to_string(), "20240107-120000F_20240107-120001D");
        let incr = Label::next(BackupKind::Incr, Some(diff), NOON_S - 86_400, Some(diff)).unwrap();
        assert_eq!(incr.to_string(), "20240107-120000F_20240107-120002I");
        let next = Label::next(BackupKind::Full, None, NOON_S, Some(incr)).unwrap();
        assert_eq!(next.to_string(), "20240107-120003F");
        assert!(full < diff && diff < incr && incr < next);
        assert!(full.to_string() < diff.to_string() && incr.to_string() < next.to_string());
    }

    #[test]
    fn says_why_no_label_can_be_made() {
        let refused = Label::next(BackupKind::Incr, None, NOON_S, None).unwrap_err();
        assert_eq!(refused.to_string(), "no full backup that this incr backup could build on");
        assert_eq!(Label::next(BackupKind::Full, None, i64::MAX, None), Err(LabelError::Time { now_s: i64::MAX }));
        let last = label("99991231-235959F");
        assert_eq!(Label::next(BackupKind::Full, None, NOON_S, Some(last)), Err(LabelError::Time { now_s: NOON_S }));
    }

    proptest! {
        #[test]
        fn the_order_of_labels_is_the_order_of_their_making(clock in prop::collection::vec((0i64..5, 0u8..3), 1..30)) {
            let mut labels: Vec<Label> = Vec::new();
            for (ticks, kind) in clock {
                let kind = [BackupKind::Full, BackupKind::Diff, BackupKind::Incr][usize::from(kind)];
                let newest = labels.iter().max().copied();
                if let Ok(label) = Label::next(kind, newest, NOON_S + ticks, newest) {
                    prop_assert_eq!(label.to_string().parse::<Label>().unwrap(), label);
                    labels.push(label);
                }
            }
            prop_assert!(labels.is_sorted());
            prop_assert!(labels.iter().map(ToString::to_string).is_sorted());
        }

        #[test]
        fn any_text_is_answered(text in ".*", now_s: i64) {
            let _ = text.parse::<Label>();
            let _ = Label::next(BackupKind::Full, None, now_s, None);
        }
    }
}
