//! A backup without access to the server's files: the server sends them, as it does to `pg_basebackup`.
//!
//! - The server begins and ends the backup, and leaves out what does not belong into one. What it sends is named and told apart
//!   as what a scan finds.
//! - Files come in the order in which the server finds them, each once. They are cut as they arrive; the manifest sorts.
//! - Nothing is taken over unread: a time in an archive was seen before the file was read.
//! - A page whose checksum fails cannot be read again here, so the server is asked to check, and to read again, too.
//! - pg_control comes last, and behind it, where it is stored with the backup, the WAL.

mod base;
mod supply;
mod wire;

use std::path::Path;

use self::base::{BaseBackup, Begin, Command};
use self::supply::{Arrived, Incoming};
use self::wire::Wire;
use super::copy::copy;
use super::parent::ParentFiles;
use super::peer;
use super::scan::{Scanned, ScannedKind};
use super::server::{Server, Stopped, config, describe, guarded};
use super::standby;
use crate::backup::run::{Begun, Copying, Ended, wal_needed};
use crate::backup::slot_channel::{Budget, PIECES_MAX};
use crate::error::{Context, Error, Result};
use crate::format::manifest::Source;
use crate::postgres::{CONTROL_FILE, ControlFile, tablespace_place};

/// What tells one start of a server from every other.
const WHICH_SERVER: &str =
    "SELECT pg_catalog.concat(pg_catalog.pg_is_in_recovery(), ' ', pg_catalog.pg_postmaster_start_time())";

/// A second connection to the server, on which it sends its files.
pub(super) struct Stream {
    host: String,
    state: State,
}

enum State {
    Connected(Wire),
    Begun(Box<(BaseBackup, Begin)>),
    Lost,
}

impl Stream {
    /// Connects to the server of that session. A conninfo string can name several, so that is proved.
    pub(super) fn connect(server: &mut Server, conninfo: &str) -> Result<Self> {
        let config = guarded(&config(conninfo)?);
        let mut wire = peer::connect(&config, Wire::connect)?;
        wire.query(WHICH_SERVER)?;
        let answer = wire.rows()?.pop().and_then(|mut row| row.pop()).flatten();
        wire.ready()?;
        match answer == Some(server.value(WHICH_SERVER)?) {
            true => Ok(Self { host: describe(&config), state: State::Connected(wire) }),
            false => Err(Error::new("the connection for replication leads to another server than the first one")
                .hint("name one server in --pg")),
        }
    }

    /// Begins the backup on the server.
    pub(super) fn begin(&mut self, server: &Server, label: &str, fast: bool, wal: bool) -> Result<Begun> {
        let State::Connected(wire) = std::mem::replace(&mut self.state, State::Lost) else {
            return Err(Error::new("the backup has begun already"));
        };
        let (backup, mut begin) = BaseBackup::begin(wire, server.major, &Command { label, fast, wal })
            .context(|| "the server does not begin a backup".into())?;
        for of in &mut begin.tablespaces {
            if of.path.starts_with("pg_tblspc/") {
                return Err(Error::new(format!("tablespace {} is a directory inside the data directory", of.oid))
                    .hint("in-place tablespaces are for PostgreSQL's own tests; move its tables to an ordinary one"));
            }
            if of.path.contains(char::REPLACEMENT_CHARACTER) {
                return Err(Error::new(format!("the path of tablespace {} is not UTF-8: {}", of.oid, of.path))
                    .hint("a backup notes it as text: move the directory, and make the link in pg_tblspc again while the server is down"));
            }
            of.path = tablespace_place(&server.data_directory, Path::new(&of.path)).display().to_string();
        }
        // nothing is ever taken over by its time from a backup with this mark
        let source = Source { standby: server.in_recovery, host: self.host.clone(), mark: "stream".into() };
        let (start_lsn, timeline) = (begin.start, begin.timeline);
        self.state = State::Begun(Box::new((backup, begin)));
        Ok(Begun { start_lsn, timeline, source })
    }

    /// Stores what the server sends, to the end of the backup.
    pub(super) fn copy(self, copying: Copying<'_>) -> Result<Ended> {
        let Copying { server, started, cutting, workers, assembler, parent, monitor } = copying;
        let State::Begun(begun) = self.state else { return Err(Error::new("the backup has not begun")) };
        let (backup, Begin { tablespaces, bytes, .. }) = *begun;
        monitor.stage("copying", bytes);
        let incoming = Incoming {
            backup,
            tablespaces: &tablespaces,
            root_mode: root_mode(server)?,
            layout: started.database.layout().context(|| "pg_control".into())?,
            started,
            parent: parent.map(ParentFiles::by_path).transpose()?,
            budget: Budget::new(PIECES_MAX),
        };
        let arrived = copy(cutting, incoming, workers, assembler, monitor, &mut || server.alive())?;
        let Arrived { stop, owner, backup_label, tablespace_map, control: (found, control), segments } = arrived;
        server.alive()?;
        let parsed = ControlFile::parse(&control).map_err(|error| {
            Error::new(format!("the server sent a {CONTROL_FILE} that cannot be read"))
                .hint("it may have been written just then; run the backup again")
                .source(error)
        })?;
        let timeline = if server.in_recovery { standby::timeline(&parsed, Some(started.timeline))? } else { stop.1 };
        if (timeline, parsed.checkpoint.timeline) != (started.timeline, started.timeline) || stop.1 != timeline {
            return Err(Error::new(format!(
                "the server changed from timeline {} to {} during the backup",
                started.timeline, stop.1
            ))
            .hint("run the backup again"));
        }
        if parsed.system_identifier != started.database.system_id || parsed.checkpoint.redo < started.start_lsn {
            return Err(Error::new(format!("the server sent a {CONTROL_FILE} that is not of this backup")));
        }
        if server.in_recovery && stop.0 < parsed.min_recovery_point {
            let (end, needed) = (stop.0, parsed.min_recovery_point);
            return Err(Error::new(format!("the backup ended at {end}, but pg_control needs replay up to {needed}")));
        }
        assembler.fill_control(&Scanned { kind: ScannedKind::File, ..found }, &control)?;
        let stopped = Stopped { lsn: stop.0, backup_label, tablespace_map };
        if started.wal_stored {
            let needed = wal_needed(started, &stopped)?;
            if let Some(missing) = needed.iter().find(|segment| !segments.contains(segment)) {
                return Err(Error::new(format!("the server did not send WAL segment {missing}")));
            }
        }
        Ok(Ended { stopped, stop_time: server.now_s()?, tablespaces, owner })
    }
}

/// The permission bits of the data directory, which no archive has.
fn root_mode(server: &mut Server) -> Result<u32> {
    let mode = server.value("SHOW data_directory_mode")?;
    u32::from_str_radix(&mode, 8).context(|| format!("data_directory_mode is {mode}"))
}
