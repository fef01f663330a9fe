//! Points on the command line, and the way to them.

use clap::{Args, ValueEnum};
use jiff::Zoned;

use super::options::{Cache, Common};
use super::output;
use crate::error::{Error, Result};
use crate::postgres::Label;
use crate::read::completion::Prepared;
use crate::recovery::outline::Outline;
use crate::recovery::plan::{Bound, Course};
use crate::recovery::target::{Action, Point, PointParts, Target, TargetType};
use crate::repo::Repository;

/// What recovery is to reach.
#[derive(Clone, Debug, Default, Args)]
#[command(next_help_heading = "Point options")]
pub(super) struct PointOptions {
    /// What the target is [default: what it reads like; without a target, "restore" goes to the end of the archive, and all
    /// else takes the backup as it is]
    #[arg(long = "type", value_name = "TYPE")]
    kind: Option<Type>,
    /// Time ("2026-11-22 14:30", "yesterday 14:30", "10 minutes ago"), LSN, transaction or name of a restore point
    #[arg(long, value_name = "TARGET", allow_hyphen_values = true)]
    target: Option<String>,
    /// Stop just before the target instead of just after it
    #[arg(long)]
    target_exclusive: bool,
    /// What the server does when it is there
    #[arg(long, value_name = "ACTION")]
    target_action: Option<TargetAction>,
    /// Recover along this timeline: latest, current or a number [default: latest]
    #[arg(long, value_name = "TIMELINE")]
    target_timeline: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Type {
    /// the backup, replayed until it is consistent
    None,
    /// as none; settings of recovery stay as they are
    Preserve,
    /// consistency, then a timeline of its own
    Immediate,
    /// the end of the archive
    Default,
    /// a standby
    Standby,
    /// a time
    Time,
    /// the end of a transaction
    Xid,
    /// a restore point
    Name,
    /// an LSN
    Lsn,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum TargetAction {
    /// wait, open for reading
    Pause,
    /// go on, open for writing
    Promote,
    /// shut down
    Shutdown,
}

impl PointOptions {
    /// The point that these options and `named`, which may be a label or a target, ask for. Says what was assumed.
    pub(super) fn point(&self, named: Option<&str>) -> Result<Point> {
        let parts = PointParts {
            point: named,
            kind: self.kind.map(Into::into),
            target: self.target.as_deref(),
            exclusive: self.target_exclusive,
            timeline: self.target_timeline.as_deref(),
            action: self.target_action.map(Into::into),
        };
        let point = Point::new(parts, &Zoned::now())?;
        if let Target::Time(moment) = &point.target
            && let Some(zone) = &moment.zone_taken
        {
            output::note(&format!("the time has no zone, it is taken as {zone}: {}", moment.at));
        }
        Ok(point)
    }

    /// The same, but of a backup, without a word on what to reach, the end of the archive.
    pub(super) fn point_or_end(&self, named: Option<&str>) -> Result<Point> {
        let is_backup = named.is_none_or(|name| name == "latest" || name.parse::<Label>().is_ok());
        let kind = self.kind.or((is_backup && self.target.is_none()).then_some(Type::Default));
        Self { kind, ..self.clone() }.point(named)
    }

    /// True when it is said what to reach, or how.
    pub(super) fn is_explicit(&self) -> bool {
        !self.is_empty()
    }

    /// True when the server is to wait at its target.
    pub(super) fn waits(&self) -> bool {
        self.target_action == Some(TargetAction::Pause)
    }

    /// True when nothing was given.
    pub(super) fn is_empty(&self) -> bool {
        self.kind.is_none()
            && self.target.is_none()
            && self.target_timeline.is_none()
            && self.target_action.is_none()
            && !self.target_exclusive
    }
}

/// Finds the way to a point.
pub(super) fn find(repository: &Repository, point: &Point, bound: Bound, cache: &Cache) -> Result<Course> {
    let directory = cache.directory()?;
    let outline = || Outline::load(repository, point.label.as_deref(), directory.as_deref());
    let course = Course::find(repository, point, bound, outline)?;
    course.recovery.iter().flat_map(|recovery| &recovery.notes).for_each(|text| output::note(&format!("note: {text}")));
    Ok(course)
}

/// What a view shows of a course: a data directory whose recovery finds its WAL in `pg_wal`, and asks `restore_command` for the
/// rest.
pub(super) fn presented(course: &Course, action: Action, restore_command: &str) -> Option<Prepared> {
    course.recovery.as_ref().map(|recovery| Prepared {
        settings: recovery.settings_with(action, restore_command),
        recovery: recovery.clone(),
        presents_wal: true,
    })
}

/// Whose recovery fetches WAL.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum WalFor {
    /// of a data directory in a mount: nothing that lies in `pg_wal` already
    Mount,
    /// of a copy, which must not use directories of other servers
    Copy,
    /// of a server that takes its source's place
    Replacement,
}

/// The `restore_command` that fetches from this stanza.
pub(super) fn restore_command(common: &Common, whose: WalFor) -> Result<String> {
    let program = std::env::current_exe().map_err(|error| Error::new("cannot find this program").source(error))?;
    let program = program.into_os_string().into_string();
    let program = program.map_err(|path| Error::new(format!("{} is not UTF-8", path.display())))?;
    let quoted = |word: &str| match word.chars().all(|c| c.is_ascii_alphanumeric() || "/._-:=+,@".contains(c)) {
        true => word.to_owned(),
        false => format!("'{}'", word.replace('\'', r"'\''")),
    };
    let words: Vec<String> = std::iter::once(program).chain(common.arguments()).map(|word| quoted(&word)).collect();
    // PostgreSQL replaces %f and %p, and %% by a percent sign
    let option = if whose == WalFor::Replacement { "" } else { " --for-copy" };
    let command = format!("{} archive-get{option} %f \"%p\"", words.join(" ").replace('%', "%%"));
    Ok(if whose == WalFor::Mount { format!("test ! -e \"pg_wal/%f\" && {command}") } else { command })
}

impl From<Type> for TargetType {
    fn from(kind: Type) -> Self {
        match kind {
            Type::None => Self::None,
            Type::Preserve => Self::Preserve,
            Type::Immediate => Self::Immediate,
            Type::Default => Self::Default,
            Type::Standby => Self::Standby,
            Type::Time => Self::Time,
            Type::Xid => Self::Xid,
            Type::Name => Self::Name,
            Type::Lsn => Self::Lsn,
        }
    }
}

impl From<TargetAction> for Action {
    fn from(action: TargetAction) -> Self {
        match action {
            TargetAction::Pause => Self::Pause,
            TargetAction::Promote => Self::Promote,
            TargetAction::Shutdown => Self::Shutdown,
        }
    }
}
