//! Timeline history files: where each timeline left the one before it.

use crate::postgres::lsn::{Lsn, Timeline};

/// One line of a history file: a timeline that was left.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ancestor {
    /// the timeline that was left
    pub timeline: Timeline,
    /// where it was left: the next one begins here
    pub end: Lsn,
    /// why, for people
    pub reason: String,
}

/// The contents of a history file: all the timelines before this one, oldest first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TimelineHistory {
    /// the timeline the file is named for
    pub timeline: Timeline,
    /// those before it
    pub ancestors: Vec<Ancestor>,
}

/// A file that tells no history.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HistoryError {
    /// a line that cannot be read
    #[error("line {line} of the history of timeline {timeline} reads \"{text}\", not a timeline and an LSN")]
    Line {
        /// the timeline the file is named for
        timeline: Timeline,
        /// the line, from 1
        line: usize,
        /// what it says
        text: String,
    },
    /// timelines out of order
    #[error("line {line} of the history of timeline {timeline} names timeline {found} after {before}")]
    Order {
        /// the timeline the file is named for
        timeline: Timeline,
        /// the line, from 1
        line: usize,
        /// the timeline on that line
        found: Timeline,
        /// the one before it
        before: Timeline,
    },
    /// a timeline that does not come before the file's own
    #[error("line {line} of the history of timeline {timeline} names timeline {found}, which is not before it")]
    NotBefore {
        /// the timeline the file is named for
        timeline: Timeline,
        /// the line, from 1
        line: usize,
        /// the timeline on that line
        found: Timeline,
    },
}

impl TimelineHistory {
    /// Timeline 1 has no history file; every other timeline has one.
    pub fn of_first_timeline() -> Self {
        Self { timeline: Timeline(1), ancestors: Vec::new() }
    }

    /// Reads the file named for `timeline`. As PostgreSQL does, empty lines and those that begin with `#` are skipped.
    pub fn parse(timeline: Timeline, contents: &[u8]) -> Result<Self, HistoryError> {
        let text = String::from_utf8_lossy(contents);
        let mut ancestors: Vec<Ancestor> = Vec::new();
        for (index, content) in text.lines().enumerate() {
            let (line, content) = (index + 1, content.trim());
            if content.is_empty() || content.starts_with('#') {
                continue;
            }
            let ancestor = ancestor(content).ok_or_else(|| {
                let text = content.chars().take(100).collect();
                HistoryError::Line { timeline, line, text }
            })?;
            let found = ancestor.timeline;
            match ancestors.last() {
                Some(last) if last.timeline >= found => {
                    return Err(HistoryError::Order { timeline, line, found, before: last.timeline });
                }
                _ if found >= timeline => return Err(HistoryError::NotBefore { timeline, line, found }),
                _ => ancestors.push(ancestor),
            }
        }
        // a recovery along a timeline to a point before its beginning leaves both where it ended
        for number in (1..ancestors.len()).rev() {
            ancestors[number - 1].end = ancestors[number - 1].end.min(ancestors[number].end);
        }
        Ok(Self { timeline, ancestors })
    }

    /// The timeline whose WAL holds the byte at `lsn`.
    pub fn timeline_at(&self, lsn: Lsn) -> Timeline {
        let holder = self.ancestors.iter().find(|ancestor| lsn < ancestor.end);
        holder.map_or(self.timeline, |ancestor| ancestor.timeline)
    }

    /// Where `timeline` was left; `None` for this timeline itself, and for one that is not in its history.
    pub fn end_of(&self, timeline: Timeline) -> Option<Lsn> {
        self.ancestors.iter().find(|ancestor| ancestor.timeline == timeline).map(|ancestor| ancestor.end)
    }

    /// Whether `timeline` is this one or one before it.
    pub fn contains(&self, timeline: Timeline) -> bool {
        timeline == self.timeline || self.end_of(timeline).is_some()
    }
}

/// `<timeline> <lsn> <reason>`, with any white space between.
fn ancestor(line: &str) -> Option<Ancestor> {
    let (timeline, rest) = line.split_once(char::is_whitespace)?;
    let rest = rest.trim_start();
    let (end, reason) = rest.split_once(char::is_whitespace).unwrap_or((rest, ""));
    Some(Ancestor { timeline: timeline.parse().ok()?, end: end.parse().ok()?, reason: reason.trim().to_owned() })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    /// Written by PostgreSQL 15 at the promotion of a standby.
    const PROMOTED: &[u8] = b"1\t0/73067A0\tno recovery target specified\n";

    #[test]
    fn reads_what_a_promotion_wrote() {
        let history = TimelineHistory::parse(Timeline(2), PROMOTED).unwrap();
        assert_eq!(
            history.ancestors,
            [Ancestor {
                timeline: Timeline(1),
                end: Lsn(0x730_67A0),
                reason: "no recovery target specified".to_owned()
            }]
        );
        assert_eq!(history.timeline_at(Lsn(0x730_679F)), Timeline(1));
        assert_eq!(history.timeline_at(Lsn(0x730_67A0)), Timeline(2));
        assert!(history.contains(Timeline(1)) && history.contains(Timeline(2)) && !history.contains(Timeline(3)));
    }

    #[test]
    fn skips_comments_and_joins_several_timelines() {
        let text = b"# by hand\n\n1 0/A000000\n2\t0/B000000\tbefore 2000-01-01\r\n";
        let history = TimelineHistory::parse(Timeline(4), text).unwrap();
        assert_eq!(history.end_of(Timeline(2)), Some(Lsn(0xB00_0000)));
        assert_eq!(history.timeline_at(Lsn(0xA00_0000)), Timeline(2));
        assert_eq!(history.timeline_at(Lsn(0xB00_0000)), Timeline(4));
        assert_eq!(history.ancestors[1].reason, "before 2000-01-01");
        assert_eq!(TimelineHistory::of_first_timeline().timeline_at(Lsn(1)), Timeline(1));
    }

    /// As PostgreSQL writes it after a recovery with `recovery_target_timeline = latest` to a point before timeline 2 began.
    #[test]
    fn a_timeline_that_was_left_before_it_began_holds_nothing() {
        let history =
            TimelineHistory::parse(Timeline(3), b"1\t0/5000000\tx\n2\t0/4000000\tbefore 2000-01-01\n").unwrap();
        for (lsn, timeline) in [(0x3FF_FFFF, 1), (0x400_0000, 3), (0x4FF_FFFF, 3), (0x500_0000, 3)] {
            assert_eq!(history.timeline_at(Lsn(lsn)), Timeline(timeline), "{lsn:X}");
        }
        assert_eq!(history.end_of(Timeline(1)), Some(Lsn(0x400_0000)));
        assert!(history.contains(Timeline(2)));
    }

    #[test]
    fn refuses_what_is_out_of_order_or_unreadable() {
        let refused = |text: &[u8]| TimelineHistory::parse(Timeline(3), text).unwrap_err().to_string();
        assert_eq!(refused(b"2\t0/1\n1\t0/2\n"), "line 2 of the history of timeline 3 names timeline 1 after 2");
        assert_eq!(
            refused(b"3\t0/1\n"),
            "line 1 of the history of timeline 3 names timeline 3, which is not before it"
        );
        assert_eq!(
            refused(b"1 0-1\n"),
            "line 1 of the history of timeline 3 reads \"1 0-1\", not a timeline and an LSN"
        );
    }

    proptest! {
        #[test]
        fn any_bytes_are_answered(contents: Vec<u8>) {
            let _ = TimelineHistory::parse(Timeline(7), &contents);
        }
    }
}
