//! What PostgreSQL is told of a recovery, and what is known of it beforehand.

use serde::{Deserialize, Serialize};

use super::crossing::StopPoint;
use super::target::Action;
use crate::postgres::{SegmentName, SegmentSize, Timeline};

/// The parameters of which only one may have a value.
const TARGETS: [&str; 5] =
    ["recovery_target", "recovery_target_name", "recovery_target_time", "recovery_target_xid", "recovery_target_lsn"];
const INCLUSIVE: &str = "recovery_target_inclusive";

/// An archive recovery.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Recovery {
    /// the server's major version
    #[serde(default)]
    pub major: u32,
    /// stay a standby
    pub standby: bool,
    /// settings that say what is reached; `restore_command` and the action are the verb's
    pub settings: Vec<(String, String)>,
    /// true: the settings name a target, so that PostgreSQL fails rather than stop before it
    pub has_target: bool,
    /// the WAL that is needed, as consecutive segments: timeline, first number, last number
    pub wal: Vec<(u32, u64, u64)>,
    /// timelines whose history files are needed
    pub histories: Vec<u32>,
    /// in words
    pub to: String,
    /// the last transaction that it brings back, as far as that was looked for
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reaches: Option<Reached>,
    /// the moment that was asked for, where nothing in the archive says that it was reached
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub wanted: Option<String>,
    /// what the user must know: a clock that was set, a gap
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
}

/// The last transaction that a recovery brings back.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Reached {
    /// where its end is in the WAL
    pub lsn: String,
    /// when it ended, as PostgreSQL writes it
    pub time: String,
}

impl From<StopPoint> for Reached {
    fn from(point: StopPoint) -> Self {
        Self { lsn: point.lsn.to_string(), time: point.time.to_string() }
    }
}

/// For people: `the last commit at 2026-11-22 14:30:00+00 (LSN 0/3000060)`.
impl std::fmt::Display for Reached {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "the last transaction ended {} (LSN {})", self.time, self.lsn)
    }
}

impl Recovery {
    /// The names of the segments it needs.
    pub fn segments(&self, size: SegmentSize) -> impl Iterator<Item = SegmentName> + '_ {
        let of_leg = move |(timeline, first, last): &(u32, u64, u64)| {
            let timeline = Timeline(*timeline);
            (*first..=*last).map(move |number| SegmentName::of_number(timeline, number, size))
        };
        self.wal.iter().flat_map(of_leg)
    }

    /// All settings of it for `postgresql.auto.conf` which PostgreSQL
    /// reads last.
    ///
    /// Settings of an earlier recovery, or of the standby that the source once was, may lie in any
    /// included file. Each is said anew: for a parameter the last word counts. Only one parameter may
    /// name a target, and PostgreSQL checks that whenever it sets one of them, in the order of the
    /// lines: first those that must be empty, then the one that is meant.
    pub fn settings_with(&self, action: Action, restore_command: &str) -> Vec<(String, String)> {
        let mut settings: Vec<(&str, &str)> = Vec::new();
        let own = |name: &str| self.settings.iter().any(|(own, _)| own == name);
        settings.extend(TARGETS.into_iter().filter(|name| !own(name)).map(|name| (name, "")));
        settings.extend(self.settings.iter().map(|(name, value)| (name.as_str(), value.as_str())));
        if !own(INCLUSIVE) {
            settings.push((INCLUSIVE, "on"));
        }
        // without a target it does nothing, but must not be another's
        let action = match action {
            Action::Pause => "pause",
            Action::Promote => "promote",
            Action::Shutdown => "shutdown",
        };
        settings.push(("recovery_target_action", if self.has_target { action } else { "pause" }));
        settings.push(("restore_command", restore_command));
        if !self.standby {
            settings.extend([
                ("recovery_min_apply_delay", "0"),
                ("recovery_end_command", ""),
                ("archive_cleanup_command", ""),
            ]);
            if self.major < 16 {
                settings.push(("promote_trigger_file", ""));
            }
        }
        settings.into_iter().map(|(name, value)| (name.to_owned(), value.to_owned())).collect()
    }
}
