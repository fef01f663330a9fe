//! Waits until a clone's server has reached its target, proves that it has, and says why it does not.

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use jiff::Zoned;
use postgres::Client;

use super::super::clones::{Clone, Login, Place};
use super::super::stop;
use super::limits::Limits;
use super::login::{Logins, NoLogin, said};
use super::replay::Replay;
use crate::error::{Error, Result};
use crate::files;
use crate::interrupt;
use crate::postgres::{Lsn, SegmentName, TimestampTz};
use crate::recovery::datetime;

/// A server's lock file in its data directory, and which of its lines says how far the server is.
pub(super) const LOCK_FILE: &str = "postmaster.pid";
const LOCK_FILE_STATUS: usize = 7;
/// Time between two looks at the server, at first and in the end.
const LOOK_EVERY: (Duration, Duration) = (Duration::from_millis(10), Duration::from_millis(250));

/// What a server logs at its target, and when it pauses for whatever reason (`access/transam/xlogrecovery.c`).
const AT_TARGET: &str = "recovery stopping ";
const PAUSED: [&str; 2] = ["recovery has paused", "pausing at the end of recovery"];

/// One start of a clone's server.
pub(super) struct Attempt<'a> {
    pub(super) place: &'a Place,
    pub(super) clone: &'a Clone,
    /// how to log in; none where nobody has to
    pub(super) logins: Option<&'a Logins>,
    /// what it was given at least
    pub(super) limits: Limits,
    /// how long its log was before
    log_bytes: u64,
    started: Instant,
    timeout: Duration,
}

/// What an attempt comes to.
pub(super) enum Arrival {
    /// it is at its target
    Reached(Reached),
    /// replay met larger settings than it was given
    Raised(Limits),
}

/// Where a recovery ended, and how to log in there.
#[derive(Clone, Debug, Default)]
pub(super) struct Reached {
    /// where somebody can log in
    pub(super) login: Option<Login>,
    /// the end of the last record that was replayed
    pub(super) lsn: Option<Lsn>,
    /// when the last transaction ended that was replayed
    pub(super) time: Option<TimestampTz>,
    /// what of the backup's configuration the server does without
    pub(super) left_out: Vec<String>,
}

impl Reached {
    /// In words; none where nothing was recovered.
    pub(super) fn moment(&self) -> Option<String> {
        let lsn = self.lsn?;
        Some(match self.time {
            Some(time) => format!("recovered to LSN {lsn}; the last transaction in it ended at {time}"),
            None => format!("recovered to LSN {lsn}; no transaction ended between the backup and there"),
        })
    }
}

impl<'a> Attempt<'a> {
    pub(super) fn new(
        (place, clone): (&'a Place, &'a Clone),
        logins: Option<&'a Logins>,
        limits: Limits,
        (started, timeout): (Instant, Duration),
    ) -> Self {
        let log_bytes = fs::metadata(place.log()).map_or(0, |log| log.len());
        Self { place, clone, logins, limits, log_bytes, started, timeout }
    }

    /// Runs `pg_ctl` to its end. It waits longer than anybody who wants to interrupt this, and what it has started stays when
    /// it is killed: so the server is ended instead.
    pub(super) fn output(&self, pg_ctl: &mut Command, replay: &mut Option<Replay>) -> Result<Output> {
        // a terminal's Ctrl-C is not for it
        pg_ctl.process_group(0).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = pg_ctl.spawn().map_err(|error| Error::new("cannot run pg_ctl").source(error))?;
        let mut pause = LOOK_EVERY.0;
        while child.try_wait().map_err(|error| Error::new("cannot wait for pg_ctl").source(error))?.is_none() {
            if interrupt::caught().is_some() {
                _ = stop::end_server(self.place);
            }
            replay.iter_mut().for_each(|replay| replay.look(self.place));
            std::thread::sleep(pause);
            pause = (pause * 2).min(LOOK_EVERY.0 * 5);
        }
        let output = child.wait_with_output().map_err(|error| Error::new("cannot wait for pg_ctl").source(error))?;
        interrupt::check()?;
        Ok(output)
    }

    /// Waits for the server's answer at its target: `pg_ctl` is content with one that replays.
    pub(super) fn reach_target(&self, replay: &mut Option<Replay>) -> Result<Arrival> {
        let mut pause = LOOK_EVERY.0;
        let mut session = None;
        loop {
            interrupt::check()?;
            replay.iter_mut().for_each(|replay| replay.look(self.place));
            let error = match self.look(&mut session)? {
                Look::Reached(reached) => return Ok(Arrival::Reached(reached)),
                Look::Raised(limits) => return Ok(Arrival::Raised(limits)),
                Look::NotYet(error) => error,
            };
            if stop::running_server(self.place).is_none() {
                return self.ended("ended before its target");
            }
            if self.started.elapsed() > self.timeout {
                let late = format!("the clone did not answer at its target within {} s", self.timeout.as_secs());
                let late = Error::new(late).hint("give it more time with --start-timeout");
                return Err(match error {
                    Some(error) => late.source(error),
                    None => late,
                });
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(LOOK_EVERY.1);
        }
    }

    fn look(&self, session: &mut Option<(Client, Login)>) -> Result<Look> {
        // before that it would refuse, once more in its log for each time it was asked
        if !server_accepts(self.place) {
            return Ok(Look::NotYet(None));
        }
        let Some(logins) = self.logins else {
            // only a server that has ended its recovery is ready, where none is open before
            return Ok(Look::Reached(Reached::default()));
        };
        if session.is_none() {
            *session = match logins.connect(self.place, self.clone) {
                Ok(session) => Some(session),
                Err(NoLogin::NotYet(error)) => return Ok(Look::NotYet(Some(said(&error)))),
                // what replay has not reached yet may still let somebody in
                Err(NoLogin::Refused(error)) if self.clone.read_only && !self.has_paused() => {
                    return Ok(Look::NotYet(Some(error.to_string())));
                }
                Err(NoLogin::Refused(error)) => return Err(error),
            };
        }
        let Some((client, login)) = session.as_mut() else { return Ok(Look::NotYet(None)) };
        let state = match state(client) {
            Ok(state) => state,
            Err(error) => {
                *session = None;
                return Ok(Look::NotYet(Some(said(&error))));
            }
        };
        let time = state.time.max(self.time_of_target(state.lsn));
        let reached = Reached { login: Some(login.clone()), lsn: state.lsn, time, left_out: Vec::new() };
        match (state.in_recovery, self.clone.read_only) {
            (false, false) => Ok(Look::Reached(reached)),
            (false, true) => Err(promoted(&reached)),
            (true, false) => Ok(Look::NotYet(None)),
            (true, true) if state.paused => self.proved(reached),
            (true, true) => Ok(Look::NotYet(None)),
        }
    }

    /// A pause alone proves nothing: a server also pauses when it meets a larger setting than its own.
    fn proved(&self, reached: Reached) -> Result<Look> {
        if let Some(raised) = self.limits.raised_by(&Limits::of(self.place)?) {
            return Ok(Look::Raised(raised));
        }
        let log = self.log();
        if log.contains(AT_TARGET) || self.is_at_position(&reached) {
            return Ok(Look::Reached(reached));
        }
        let at = reached.lsn.map_or_else(String::new, |lsn| format!(" at {lsn}"));
        Err(Error::new(format!("recovery paused{at}, and nothing proves that this is the target:\n  {}", tail(&log)))
            .hint("the lines above are the end of the server's log; an --option that lowers a limit or silences the log must go"))
    }

    /// When the transaction ended at whose record recovery stops: the server does not count it
    /// among those that it replayed.
    fn time_of_target(&self, lsn: Option<Lsn>) -> Option<TimestampTz> {
        let reaches = self.clone.recovery.as_ref()?.recovery.reaches.as_ref()?;
        let is_there = lsn? > reaches.lsn.parse::<Lsn>().ok()?;
        is_there.then(|| datetime::parse(&reaches.time, &Zoned::now()).ok()).flatten().map(|moment| moment.at)
    }

    /// Whether replay has passed the position that was asked for.
    fn is_at_position(&self, reached: &Reached) -> bool {
        let settings = self.clone.recovery.iter().flat_map(|prepared| &prepared.recovery.settings);
        let mut positions = settings.filter(|(name, _)| name == "recovery_target_lsn");
        let wanted = positions.next().and_then(|(_, value)| value.parse::<Lsn>().ok());
        wanted.is_some_and(|wanted| reached.lsn.is_some_and(|lsn| lsn >= wanted))
    }

    fn has_paused(&self) -> bool {
        let log = self.log();
        PAUSED.iter().any(|line| log.contains(line))
    }

    /// What the server logged since this attempt began.
    pub(super) fn log(&self) -> String {
        let log = files::read_regular(&self.place.log()).unwrap_or_default();
        let from = usize::try_from(self.log_bytes).unwrap_or(0).min(log.len());
        String::from_utf8_lossy(&log[from..]).into_owned()
    }

    /// The server has ended: it needs more room, or cannot go on.
    pub(super) fn ended(&self, what: &str) -> Result<Arrival> {
        match self.limits.raised_by(&Limits::of(self.place)?) {
            Some(raised) => Ok(Arrival::Raised(raised)),
            None => Err(did_not_start(&self.place.log(), what)),
        }
    }
}

enum Look {
    Reached(Reached),
    Raised(Limits),
    NotYet(Option<String>),
}

/// What a server says of its recovery.
struct State {
    in_recovery: bool,
    paused: bool,
    lsn: Option<Lsn>,
    time: Option<TimestampTz>,
}

fn state(client: &mut Client) -> std::result::Result<State, postgres::Error> {
    let row = client.query_one(
        "SELECT pg_catalog.pg_is_in_recovery(),
                CASE WHEN pg_catalog.pg_is_in_recovery() THEN pg_catalog.pg_is_wal_replay_paused() ELSE false END,
                pg_catalog.pg_last_wal_replay_lsn()::text,
                (pg_catalog.date_part('epoch', pg_catalog.pg_last_xact_replay_timestamp()) * 1000000)::bigint",
        &[],
    )?;
    Ok(State {
        in_recovery: row.get(0),
        paused: row.get(1),
        lsn: row.get::<_, Option<String>>(2).and_then(|lsn| lsn.parse().ok()),
        time: row.get::<_, Option<i64>>(3).and_then(TimestampTz::from_unix_us),
    })
}

/// At the target nobody could log in, and so the server did not wait there: it went on, and is open for writing.
fn promoted(reached: &Reached) -> Error {
    let at = reached.lsn.map_or_else(String::new, |lsn| format!(" {lsn}"));
    Error::new(format!(
        "PostgreSQL could not be open for reading only at the target{at}, and so did not stop there: no list of running transactions in the \
         WAL was complete, as while one with more than 64 subtransactions is under way"
    ))
    .hint("leave --read-only out: the clone holds the same rows, and what is written to it stays in its scratch; or choose a moment after a checkpoint without such a transaction")
}

/// Whether the server takes connections, by the last line of its lock file.
fn server_accepts(place: &Place) -> bool {
    let lock = files::read_regular_text(&place.mount().join(LOCK_FILE)).unwrap_or_default();
    lock.lines().nth(LOCK_FILE_STATUS).is_some_and(|status| status.trim() == "ready")
}

fn tail(log: &str) -> String {
    let tail: Vec<&str> = log.lines().rev().take(8).collect();
    tail.into_iter().rev().collect::<Vec<_>>().join("\n  ")
}

pub(super) fn did_not_start(log: &Path, what: &str) -> Error {
    let log_text = files::read_regular(log).unwrap_or_default();
    let log_text = String::from_utf8_lossy(&log_text);
    let tail = tail(&log_text);
    if let Some(segment) = unreadable_segment(&log_text) {
        return Error::new(format!("recovery stopped at WAL segment {segment}, which cannot be read"))
            .hint("the mount's log says why; choose a point before it, or run \"pgcairn verify\"")
            .source(format!("the server's log ends with:\n  {tail}"));
    }
    Error::new(format!("the clone's server {what}:\n  {tail}"))
        .hint("the lines above are the end of its log; --option NAME=VALUE changes a setting")
}

/// The segment that the server failed to read, if it says so.
fn unreadable_segment(log: &str) -> Option<&str> {
    let line = log.lines().rev().find(|line| line.contains("could not read from") && line.contains("segment"))?;
    line.split(|c: char| !c.is_ascii_alphanumeric()).find(|word| word.parse::<SegmentName>().is_ok())
}
