//! The grammar of points: what a person asks for, before anything is known of the repository.
//!
//! A point is a backup (a label, or `latest`), or what recovery is to reach: a time, an LSN, the end of a transaction, a restore
//! point. The names of the types and what they mean are pgBackRest's.

use jiff::Zoned;

use super::datetime::{self, Moment};
use crate::error::{Error, Result};
use crate::postgres::{Label, Lsn, Timeline};

/// What recovery is to reach.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// `none`: the backup as it is; replay ends where it is consistent
    None,
    /// `preserve`: as `none`, and settings of recovery stay as they are
    Preserve,
    /// `immediate`: as soon as the backup is consistent, on a timeline of its own
    Immediate,
    /// `default`: the end of the archive
    End,
    /// `standby`: a standby that follows the archive
    Standby,
    /// `time`
    Time(Moment),
    /// `xid`: the end of this transaction
    Xid(u32),
    /// `name`: a restore point
    Name(String),
    /// `lsn`
    Lsn(Lsn),
}

/// The names that `--type` has for targets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TargetType {
    /// as the names say
    None,
    /// as the names say
    Preserve,
    /// as the names say
    Immediate,
    /// the end of the archive
    Default,
    /// as the names say
    Standby,
    /// as the names say
    Time,
    /// as the names say
    Xid,
    /// as the names say
    Name,
    /// as the names say
    Lsn,
}

/// What a server does when it has reached its target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// it waits there, open for reading
    Pause,
    /// it begins a timeline, open for writing
    Promote,
    /// it shuts down
    Shutdown,
}

/// The timeline to recover along.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TargetTimeline {
    /// the newest in the archive
    #[default]
    Latest,
    /// the backup's own
    Current,
    /// this one
    Id(Timeline),
}

/// A point as it was asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Point {
    /// label of the backup to start from; none: the right one is chosen
    pub label: Option<String>,
    /// what to reach
    pub target: Target,
    /// stop just before the target
    pub exclusive: bool,
    /// along which timeline
    pub timeline: TargetTimeline,
    /// what the server does then; none: what the verb does by default
    pub action: Option<Action>,
}

/// The parts of a point as options give them.
#[derive(Clone, Copy, Debug, Default)]
pub struct PointParts<'a> {
    /// a label, `latest`, or a target as text
    pub point: Option<&'a str>,
    /// `--type`
    pub kind: Option<TargetType>,
    /// `--target`
    pub target: Option<&'a str>,
    /// `--target-exclusive`
    pub exclusive: bool,
    /// `--target-timeline`
    pub timeline: Option<&'a str>,
    /// `--target-action`
    pub action: Option<Action>,
}

impl Point {
    /// A backup as it is.
    pub fn backup(label: &str) -> Self {
        Self {
            label: Some(label.to_owned()),
            target: Target::None,
            exclusive: false,
            timeline: TargetTimeline::Latest,
            action: None,
        }
    }

    /// Reads the parts.
    pub fn new(parts: PointParts<'_>, now: &Zoned) -> Result<Self> {
        let named = parts.point.filter(|point| *point != "latest");
        let (label, in_place) = match named {
            Some(text) if text.parse::<Label>().is_ok() => (Some(text.to_owned()), None),
            other => (None, other),
        };
        let target = match (parts.kind, parts.target, in_place) {
            (_, Some(target), Some(other)) => {
                return Err(Error::new(format!("both \"{other}\" and --target \"{target}\" say what to reach"))
                    .hint("beside --target give a label, \"latest\" or nothing"));
            }
            (Some(kind), target, other) => typed(kind, target.or(other), now)?,
            (None, Some(text), None) | (None, None, Some(text)) => untyped(text, now)?,
            (None, None, None) => Target::None,
        };
        let point = Self {
            label,
            target,
            exclusive: parts.exclusive,
            timeline: parts.timeline.map(timeline).transpose()?.unwrap_or_default(),
            action: parts.action,
        };
        point.check(parts.timeline.is_some())?;
        Ok(point)
    }

    /// Reads a name below `pitr/`: a target that means the same whenever it is looked at.
    pub fn of_name(name: &str, now: &Zoned) -> Result<Self> {
        let target = untyped(name, now)?;
        match &target {
            Target::Time(moment) if moment.is_relative => {
                Err(Error::new(format!("\"{name}\" means another moment tomorrow")).hint("give date and time"))
            }
            _ => Ok(Self { target, ..Self::backup("") }.chosen()),
        }
    }

    fn chosen(self) -> Self {
        Self { label: None, ..self }
    }

    /// Whether PostgreSQL gets a target.
    pub fn has_target(&self) -> bool {
        matches!(self.target, Target::Immediate | Target::Time(_) | Target::Xid(_) | Target::Name(_) | Target::Lsn(_))
    }

    fn check(&self, names_timeline: bool) -> Result<()> {
        let stops_before = matches!(self.target, Target::Time(_) | Target::Xid(_) | Target::Lsn(_));
        if self.exclusive && !stops_before {
            return Err(Error::new("--target-exclusive goes with a time, a transaction or an LSN")
                .hint("recovery ends after a restore point, never before it; leave the option out"));
        }
        let recovers = !matches!(self.target, Target::None | Target::Preserve);
        if names_timeline && !recovers {
            return Err(Error::new("--target-timeline goes with a target")
                .hint("give --type, for example \"--type default\" for the end of the archive"));
        }
        if self.action.is_some() && !(self.has_target() || self.target == Target::End) {
            return Err(Error::new("--target-action goes with a target").hint("give --type and --target"));
        }
        Ok(())
    }
}

/// For people: `time 2026-11-22 14:30:00+00`, `LSN 0/3000060`.
impl std::fmt::Display for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::None | Self::Preserve => f.write_str("its backup"),
            Self::Immediate => f.write_str("consistency"),
            Self::End => f.write_str("the end of the archive"),
            Self::Standby => f.write_str("standby"),
            Self::Time(moment) => write!(f, "{}", moment.at),
            Self::Xid(xid) => write!(f, "transaction {xid}"),
            Self::Name(name) => write!(f, "restore point \"{name}\""),
            Self::Lsn(lsn) => write!(f, "LSN {lsn}"),
        }
    }
}

fn typed(kind: TargetType, text: Option<&str>, now: &Zoned) -> Result<Target> {
    let (target, name) = match kind {
        TargetType::None => (Target::None, "none"),
        TargetType::Preserve => (Target::Preserve, "preserve"),
        TargetType::Immediate => (Target::Immediate, "immediate"),
        TargetType::Default => (Target::End, "default"),
        TargetType::Standby => (Target::Standby, "standby"),
        TargetType::Time | TargetType::Xid | TargetType::Name | TargetType::Lsn => {
            let text = text.ok_or_else(|| {
                Error::new("this --type needs a --target").hint("for example --type time --target \"2026-11-22 14:30\"")
            })?;
            return match kind {
                TargetType::Time => Ok(Target::Time(datetime::parse(text, now)?)),
                TargetType::Xid => xid(text),
                TargetType::Name => restore_point(text),
                _ => lsn(text),
            };
        }
    };
    match text {
        None => Ok(target),
        Some(text) => Err(Error::new(format!("--type {name} takes no target, but \"{text}\" is given"))
            .hint("leave the target out, or give the --type it belongs to: time, lsn, xid or name")),
    }
}

/// A target whose type its text tells.
fn untyped(text: &str, now: &Zoned) -> Result<Target> {
    if let Some((prefix, rest)) = text.split_once(':') {
        match prefix {
            "time" => return Ok(Target::Time(datetime::parse(rest, now)?)),
            "lsn" => return lsn(rest),
            "xid" => return xid(rest),
            "name" => return restore_point(rest),
            _ => {}
        }
    }
    if let Some(lsn) = as_lsn(text) {
        return Ok(Target::Lsn(lsn));
    }
    if datetime::looks_like_time(text) {
        return Ok(Target::Time(datetime::parse(text, now)?));
    }
    restore_point(text)
}

/// `0/3000060`, or `0-3000060` where a slash cannot be.
fn as_lsn(text: &str) -> Option<Lsn> {
    let (high, low) = text.split_once(['/', '-'])?;
    format!("{high}/{low}").parse().ok()
}

fn lsn(text: &str) -> Result<Target> {
    as_lsn(text).map(Target::Lsn).ok_or_else(|| {
        Error::new(format!("\"{text}\" is not an LSN"))
            .hint("an LSN reads like 16/B374D848, in names of files 16-B374D848")
    })
}

/// The epoch that `txid_current()` puts before a transaction's number is not in the WAL.
fn xid(text: &str) -> Result<Target> {
    let number = text.parse::<u64>().ok().map(|number| number as u32).filter(|number| *number >= 3);
    number.map(Target::Xid).ok_or_else(|| {
        Error::new(format!("\"{text}\" is no transaction"))
            .hint("a transaction is a number from 3 on, as txid_current() gives")
    })
}

/// PostgreSQL keeps 63 bytes of a name.
fn restore_point(text: &str) -> Result<Target> {
    match text.len() {
        1..=63 if !text.contains('\0') => Ok(Target::Name(text.to_owned())),
        _ => Err(Error::new(format!("\"{text}\" is no name of a restore point")).hint("names have 1 to 63 bytes")),
    }
}

fn timeline(text: &str) -> Result<TargetTimeline> {
    match text {
        "latest" => Ok(TargetTimeline::Latest),
        "current" => Ok(TargetTimeline::Current),
        _ => {
            let id = text.strip_prefix("0x").map_or_else(|| text.parse().ok(), |hex| u32::from_str_radix(hex, 16).ok());
            id.filter(|id| *id > 0).map(|id| TargetTimeline::Id(Timeline(id))).ok_or_else(|| {
                Error::new(format!("\"{text}\" is no timeline")).hint("give \"latest\", \"current\" or a number")
            })
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    fn now() -> Zoned {
        "2026-07-15T16:00:00+00:00[UTC]".parse().unwrap()
    }

    fn read(parts: PointParts<'_>) -> Result<Point> {
        Point::new(parts, &now())
    }

    #[test]
    fn a_text_tells_what_it_is() {
        let time = |text| Target::Time(datetime::parse(text, &now()).unwrap());
        for (text, target) in [
            ("2026-07-14 14:30", time("2026-07-14 14:30")),
            ("time:14:30", time("14:30")),
            ("10 minutes ago", time("10 minutes ago")),
            ("0/3000060", Target::Lsn(Lsn(0x300_0060))),
            ("A-3000060", Target::Lsn(Lsn(0xA_0300_0060))),
            ("lsn:0/3000060", Target::Lsn(Lsn(0x300_0060))),
            ("xid:4294968000", Target::Xid(704)),
            ("before the upgrade", Target::Name("before the upgrade".into())),
            ("name:14:30", Target::Name("14:30".into())),
            ("v1.2-rc", Target::Name("v1.2-rc".into())),
        ] {
            assert_eq!(
                read(PointParts { point: Some(text), ..PointParts::default() }).unwrap().target,
                target,
                "{text}"
            );
            assert_eq!(
                read(PointParts { target: Some(text), ..PointParts::default() }).unwrap().target,
                target,
                "{text}"
            );
        }
    }

    #[test]
    fn labels_and_types() {
        let label = "20240107-120000F";
        assert_eq!(read(PointParts { point: Some(label), ..PointParts::default() }).unwrap(), Point::backup(label));
        for none in [None, Some("latest")] {
            let point = read(PointParts { point: none, ..PointParts::default() }).unwrap();
            assert_eq!((point.label, point.target), (None, Target::None));
        }
        for (kind, target) in [
            (TargetType::Default, Target::End),
            (TargetType::Immediate, Target::Immediate),
            (TargetType::Standby, Target::Standby),
            (TargetType::Preserve, Target::Preserve),
        ] {
            let parts = PointParts { point: Some(label), kind: Some(kind), ..PointParts::default() };
            let point = read(parts).unwrap();
            assert_eq!((point.label.as_deref(), point.target), (Some(label), target));
            let with_target = read(PointParts { target: Some("0/1"), ..parts }).unwrap_err();
            assert!(with_target.to_string().contains("takes no target"), "{with_target}");
        }
        for (kind, text, ok) in [
            (TargetType::Name, "14:30", true),
            (TargetType::Lsn, "14:30", false),
            (TargetType::Time, "0/3000060", false),
            (TargetType::Xid, "700", true),
            (TargetType::Xid, "2", false),
            (TargetType::Xid, "-5", false),
        ] {
            let parts = PointParts { kind: Some(kind), target: Some(text), ..PointParts::default() };
            assert_eq!(read(parts).is_ok(), ok, "{kind:?} {text}");
        }
        assert!(read(PointParts { kind: Some(TargetType::Time), ..PointParts::default() }).is_err());
    }

    #[test]
    fn what_does_not_fit_together_is_refused() {
        let refused = |parts| read(parts).unwrap_err().to_string();
        let none = PointParts::default();
        assert!(refused(PointParts { point: Some("14:30"), target: Some("15:30"), ..none }).contains("both"));
        assert!(refused(PointParts { exclusive: true, target: Some("name:x"), ..none }).contains("exclusive"));
        assert!(refused(PointParts { exclusive: true, ..none }).contains("exclusive"));
        assert!(refused(PointParts { timeline: Some("2"), ..none }).contains("timeline"));
        assert!(refused(PointParts { timeline: Some("zero"), target: Some("0/1"), ..none }).contains("no timeline"));
        assert!(refused(PointParts { action: Some(Action::Pause), ..none }).contains("action"));
        let timeline = |text| read(PointParts { timeline: Some(text), target: Some("0/1"), ..none }).unwrap().timeline;
        assert_eq!(timeline("0x1F"), TargetTimeline::Id(Timeline(31)));
        assert_eq!(timeline("current"), TargetTimeline::Current);
    }

    #[test]
    fn names_on_a_mount_mean_the_same_every_day() {
        assert!(Point::of_name("yesterday 14:30", &now()).is_err());
        assert!(Point::of_name("14:30", &now()).is_err());
        let point = Point::of_name("2026-07-14T14:30:00Z", &now()).unwrap();
        assert_eq!((point.label.as_deref(), point.target.to_string()), (None, "2026-07-14 14:30:00+00".into()));
    }

    proptest! {
        #[test]
        fn any_text_is_answered(point in ".*", target in proptest::option::of(".*"), timeline in proptest::option::of(".*")) {
            let _ = read(PointParts {
                point: Some(&point), target: target.as_deref(), timeline: timeline.as_deref(), ..PointParts::default()
            });
            let _ = Point::of_name(&point, &now());
        }
    }
}
