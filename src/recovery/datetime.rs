//! Times as people write them: `2026-11-22 14:30`, `14:30:00.25+01`, `yesterday 14:30`, `10 minutes ago`.

use jiff::civil::{Date, DateTime, Time};
use jiff::tz::{AmbiguousOffset, Offset, TimeZone};
use jiff::{Span, ToSpan, Zoned};

use crate::error::{Error, Result};
use crate::postgres::TimestampTz;

/// A moment that a person named.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Moment {
    /// when
    pub at: TimestampTz,
    /// the zone that was taken because none was given
    pub zone_taken: Option<String>,
    /// whether it means another moment when it is said later
    pub is_relative: bool,
}

const FORMS: &str = "times read like \"2026-11-22 14:30\", \"2026-11-22T14:30:00.5Z\", \"2026-11-22 14:30 Europe/Berlin\", \
                     \"14:30\", \"yesterday 14:30\" or \"10 minutes ago\"";

/// Whether `text` is meant as a time, well written or not.
pub fn looks_like_time(text: &str) -> bool {
    let text = text.trim().to_ascii_lowercase();
    let word = text.split_whitespace().next().unwrap_or_default();
    matches!(word, "now" | "today" | "yesterday")
        || text.ends_with(" ago")
        || (text.starts_with(|c: char| c.is_ascii_digit()) && text.contains([':', '-']))
}

/// Reads a time. What lacks a zone is of the zone of `now`.
pub fn parse(text: &str, now: &Zoned) -> Result<Moment> {
    let trimmed = text.trim();
    let lower = trimmed.to_ascii_lowercase();
    let bad = |why: &str| Error::new(format!("\"{text}\" is not a time: {why}")).hint(FORMS);
    if lower == "now" {
        return Ok(Moment { is_relative: true, ..moment(now.timestamp(), None)? });
    }
    // not the end of a zone, as of America/Chicago
    if lower.ends_with(" ago") {
        let span: Span = lower.parse().map_err(|error| bad("no such time span").source(error))?;
        let then = now.checked_add(span).map_err(|error| bad("too long ago").source(error))?;
        return Ok(Moment { is_relative: true, ..moment(then.timestamp(), None)? });
    }
    let (date, rest, is_relative) = match date(trimmed, &lower, now) {
        Some((date, rest, is_relative)) => (date, rest, is_relative),
        None => (now.date(), trimmed, true),
    };
    let at = rest.find(|c: char| !c.is_ascii_digit() && c != ':' && c != '.').unwrap_or(rest.len());
    let (clock, zone) = (&rest[..at], rest[at..].trim());
    let time = match clock {
        "" if rest.is_empty() && !is_relative => Time::midnight(),
        "" => return Err(bad("the time of day is missing")),
        clock if !clock.contains(':') => return Err(bad("a time of day has hours and minutes, as 14:30")),
        clock => clock.parse().map_err(|error| bad("no such time of day").source(error))?,
    };
    if time.subsec_nanosecond() % 1000 != 0 {
        return Err(bad("PostgreSQL knows no parts of a microsecond"));
    }
    let civil = DateTime::from_parts(date, time);
    let timestamp = match zone {
        "" => in_zone(civil, now.time_zone(), text)?,
        zone => in_zone(civil, &named_zone(zone).ok_or_else(|| bad(&format!("unknown zone {zone}")))?, text)?,
    };
    let zone_taken = zone.is_empty().then(|| zone_name(now));
    Ok(Moment { is_relative, ..moment(timestamp, zone_taken)? })
}

fn moment(timestamp: jiff::Timestamp, zone_taken: Option<String>) -> Result<Moment> {
    let at = TimestampTz::from_unix_us(timestamp.as_microsecond());
    let at = at.ok_or_else(|| Error::new(format!("{timestamp} is beyond what PostgreSQL knows")))?;
    Ok(Moment { at, zone_taken, is_relative: false })
}

fn zone_name(now: &Zoned) -> String {
    let zone = now.time_zone();
    zone.iana_name().map_or_else(|| format!("UTC{}", now.offset()), str::to_owned)
}

/// The date a text begins with, what follows it, and whether it depends on today.
fn date<'t>(text: &'t str, lower: &str, now: &Zoned) -> Option<(Date, &'t str, bool)> {
    for (word, days) in [("today", 0), ("yesterday", 1)] {
        if lower.starts_with(word) {
            let date = now.date().checked_sub(days.days()).ok()?;
            return Some((date, text[word.len()..].trim_start(), true));
        }
    }
    let date: Date = text.get(..10).filter(|date| date.as_bytes()[4] == b'-')?.parse().ok()?;
    let rest = &text[10..];
    let rest = rest.strip_prefix(['T', 't', '_']).unwrap_or(rest).trim_start();
    Some((date, rest, false))
}

fn in_zone(civil: DateTime, zone: &TimeZone, text: &str) -> Result<jiff::Timestamp> {
    let ambiguous = zone.to_ambiguous_timestamp(civil);
    let clocks = |verb: &str, before: Offset, after: Offset| {
        Error::new(format!("\"{text}\" {verb}: the clocks were changed from {before} to {after}"))
            .hint(format!("say which with an offset, for example \"{civil}{before}\""))
    };
    match ambiguous.offset() {
        AmbiguousOffset::Fold { before, after } => return Err(clocks("was twice", before, after)),
        AmbiguousOffset::Gap { before, after } => return Err(clocks("never was", before, after)),
        AmbiguousOffset::Unambiguous { .. } => {}
    }
    ambiguous.unambiguous().map_err(|error| Error::new(format!("\"{text}\" is not a time")).source(error))
}

/// `Z`, `UTC`, `+01`, `+01:30`, `-0330`, `Europe/Berlin`, `[Europe/Berlin]`.
fn named_zone(zone: &str) -> Option<TimeZone> {
    let zone = zone.trim_start_matches('[').trim_end_matches(']');
    if ["z", "utc", "gmt"].contains(&zone.to_ascii_lowercase().as_str()) {
        return Some(TimeZone::UTC);
    }
    let Some(digits) = zone.strip_prefix(['+', '-']) else { return TimeZone::get(zone).ok() };
    let digits = digits.replace(':', "");
    let valid = matches!(digits.len(), 2 | 4 | 6) && digits.bytes().all(|byte| byte.is_ascii_digit());
    let number = |range: std::ops::Range<usize>| digits.get(range).map_or(Some(0), |part| part.parse::<i32>().ok());
    let (hours, minutes, seconds) = (number(0..2)?, number(2..4)?, number(4..6)?);
    let seconds = hours * 3600 + minutes * 60 + seconds;
    let sign = if zone.starts_with('-') { -1 } else { 1 };
    let offset = Offset::from_seconds(sign * seconds).ok()?;
    (valid && minutes < 60).then(|| TimeZone::fixed(offset))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    /// A Wednesday in summer time.
    fn now() -> Zoned {
        "2026-07-15T16:00:00.5+02:00[Europe/Berlin]".parse().unwrap()
    }

    fn read(text: &str) -> String {
        parse(text, &now()).map_or_else(|error| format!("{error}"), |moment| moment.at.to_string())
    }

    #[test]
    fn times_are_read_as_they_are_meant() {
        for (text, meant) in [
            ("2026-07-14 14:30", "2026-07-14 12:30:00+00"),
            ("2026-07-14T14:30:00", "2026-07-14 12:30:00+00"),
            ("2026-07-14_14:30", "2026-07-14 12:30:00+00"),
            ("2026-01-14 14:30", "2026-01-14 13:30:00+00"),
            ("2026-07-14 14:30:15.123456", "2026-07-14 12:30:15.123456+00"),
            ("2026-07-14 14:30:15.5Z", "2026-07-14 14:30:15.500000+00"),
            ("2026-07-14T14:30:00+00:00", "2026-07-14 14:30:00+00"),
            ("2026-07-14 14:30:00-0330", "2026-07-14 18:00:00+00"),
            ("2026-07-14 14:30+05", "2026-07-14 09:30:00+00"),
            ("2026-07-14 14:30 UTC", "2026-07-14 14:30:00+00"),
            ("2026-07-14 14:30 America/New_York", "2026-07-14 18:30:00+00"),
            ("2026-07-14 14:30[America/New_York]", "2026-07-14 18:30:00+00"),
            ("2026-07-14", "2026-07-13 22:00:00+00"),
            (" 2026-07-14 14:30 ", "2026-07-14 12:30:00+00"),
            ("14:30", "2026-07-15 12:30:00+00"),
            ("14:30:05Z", "2026-07-15 14:30:05+00"),
            ("today 00:00", "2026-07-14 22:00:00+00"),
            ("Yesterday 14:30", "2026-07-14 12:30:00+00"),
            ("now", "2026-07-15 14:00:00.500000+00"),
            ("10 minutes ago", "2026-07-15 13:50:00.500000+00"),
            ("2026-07-15 09:30 America/Chicago", "2026-07-15 14:30:00+00"),
            ("1 hour 30 minutes ago", "2026-07-15 12:30:00.500000+00"),
            ("2h ago", "2026-07-15 12:00:00.500000+00"),
            ("3 days ago", "2026-07-12 14:00:00.500000+00"),
            // across the change of the clocks a day has as many hours as it has
            ("180 days ago", "2026-01-16 15:00:00.500000+00"),
        ] {
            assert_eq!(read(text), meant, "{text}");
            assert!(looks_like_time(text), "{text}");
        }
    }

    #[test]
    fn what_is_no_time_or_two_is_refused() {
        for (text, why) in [
            ("2026-10-25 02:30", "\"2026-10-25 02:30\" was twice: the clocks were changed from +02 to +01"),
            ("2026-03-29 02:30", "\"2026-03-29 02:30\" never was: the clocks were changed from +01 to +02"),
            ("2026-02-30 10:00", "\"2026-02-30 10:00\" is not a time: a time of day has hours and minutes, as 14:30"),
            ("yesterday", "\"yesterday\" is not a time: the time of day is missing"),
            ("25:00", "\"25:00\" is not a time: no such time of day"),
            ("2026-07-14 14", "\"2026-07-14 14\" is not a time: a time of day has hours and minutes, as 14:30"),
            (
                "2026-07-14 14:30 Mars/Olympus",
                "\"2026-07-14 14:30 Mars/Olympus\" is not a time: unknown zone Mars/Olympus",
            ),
            ("2026-07-14 14:30+1", "\"2026-07-14 14:30+1\" is not a time: unknown zone +1"),
            ("14:30:00.1234567", "\"14:30:00.1234567\" is not a time: PostgreSQL knows no parts of a microsecond"),
            ("some time ago", "\"some time ago\" is not a time: no such time span"),
            ("", "\"\" is not a time: the time of day is missing"),
        ] {
            assert_eq!(read(text), why, "{text}");
        }
    }

    #[test]
    fn the_zone_that_was_taken_is_told() {
        let taken = |text| parse(text, &now()).unwrap().zone_taken;
        assert_eq!(taken("14:30").as_deref(), Some("Europe/Berlin"));
        assert_eq!(taken("14:30Z"), None);
        assert_eq!(taken("10 minutes ago"), None);
        assert!(parse("yesterday 14:30Z", &now()).unwrap().is_relative);
        assert!(!parse("2026-07-14 14:30", &now()).unwrap().is_relative);
    }

    proptest! {
        #[test]
        fn any_text_is_answered(text in ".*") {
            let _ = parse(&text, &now());
            let _ = looks_like_time(&text);
        }

        #[test]
        fn what_is_written_is_read_back(micros in 0i64..2_000_000_000_000_000) {
            let time = TimestampTz::from_unix_us(micros).unwrap();
            prop_assert_eq!(parse(&time.to_string(), &now()).unwrap().at, time);
        }
    }
}
