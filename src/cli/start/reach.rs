//! Waits until a clone's server has reached its target, and says why it does not.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use super::super::clones::{Clone, Place};
use super::super::stop;
use super::Start;
use crate::error::{Error, Result};
use crate::postgres::SegmentName;

/// A server's lock file in its data directory, and which of its lines says how far the server is.
pub(super) const LOCK_FILE: &str = "postmaster.pid";
const LOCK_FILE_STATUS: usize = 7;

impl Start {
    /// Waits for the answer to a first query, at the target: pg_ctl is content with a server that replays.
    pub(super) fn reach_target(&self, place: &Place, clone: &Clone, conninfo: &str) -> Result<()> {
        let started = Instant::now();
        let query = match clone.read_only {
            true => "SELECT NOT pg_is_in_recovery() OR pg_is_wal_replay_paused()",
            false => "SELECT NOT pg_is_in_recovery()",
        };
        let is_there = || -> std::result::Result<bool, postgres::Error> {
            let mut client = postgres::Client::connect(conninfo, postgres::NoTls)?;
            Ok(client.query_one(query, &[])?.get(0))
        };
        loop {
            // before that it would refuse, once more in its log for each time it was asked
            let error = match server_accepts(place).then(is_there) {
                Some(Ok(true)) => return Ok(()),
                Some(Err(error)) => Some(error),
                Some(Ok(false)) | None => None,
            };
            if stop::running_server(place).is_none() {
                return Err(did_not_start(&place.log(), "ended before its target"));
            }
            if started.elapsed() > Duration::from_secs(self.start_timeout) {
                let late = format!("the clone did not answer at its target within {} s", self.start_timeout);
                let late = Error::new(late).hint("give it more time with --start-timeout");
                return Err(match error {
                    Some(error) => late.source(error),
                    None => late,
                });
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

/// Whether the server takes connections, by the last line of its lock file.
fn server_accepts(place: &Place) -> bool {
    let lock = fs::read_to_string(place.mount().join(LOCK_FILE)).unwrap_or_default();
    lock.lines().nth(LOCK_FILE_STATUS).is_some_and(|status| status.trim() == "ready")
}

pub(super) fn did_not_start(log: &Path, what: &str) -> Error {
    let log_text = fs::read_to_string(log).unwrap_or_default();
    let tail: Vec<&str> = log_text.lines().rev().take(8).collect();
    let tail: Vec<&str> = tail.into_iter().rev().collect();
    if let Some(segment) = unreadable_segment(&log_text) {
        return Error::new(format!("recovery stopped at WAL segment {segment}, which cannot be read"))
            .hint("the mount's log says why; choose a point before it, or run \"pgcairn verify\"")
            .source(format!("the server's log ends with:\n  {}", tail.join("\n  ")));
    }
    Error::new(format!("the clone's server {what}:\n  {}", tail.join("\n  ")))
        .hint("the lines above are the end of its log; --option NAME=VALUE changes a setting")
}

/// The segment that the server failed to read, if it says so.
fn unreadable_segment(log: &str) -> Option<&str> {
    let line = log.lines().rev().find(|line| line.contains("could not read from") && line.contains("segment"))?;
    line.split(|c: char| !c.is_ascii_alphanumeric()).find(|word| word.parse::<SegmentName>().is_ok())
}
