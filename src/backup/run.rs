//! A backup from the first question to the commit.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;

use super::assemble::{Assembler, Totals};
use super::chunker::{Cutting, Lanes};
use super::dedup::Dedup;
use super::orphan_packs::{left_behind, take_over};
use super::packer::{PACK_BYTES, Uploads};
use super::parent::{Parent, ParentFiles, Unusable};
use super::parent_choice::{Compared, Packs, compared};
use super::preflight::{await_segments, await_told, identify, prove_archiving, prove_backup, prove_local};
use super::rival::{Checks, refuse_rival};
use super::schedule::Schedule;
use super::server::{Archiving, Server, Stopped};
use super::source::Pages;
use super::stream::Stream;
use super::{datadir, standby};
use crate::error::{Context, Error, Result};
use crate::format::chunk::PackId;
use crate::format::info::LockKind;
use crate::format::manifest::{Database, Description, NamedDatabase, PackUse, Sizes, Source, Tablespace};
use crate::postgres::{BackupKind, Label, Lsn, SegmentName, SegmentSize, Timeline};
use crate::progress::Monitor;
use crate::repo::lock::Lock;
use crate::repo::proof::Claims;
use crate::repo::{Repository, layout};
use crate::store::Body;
use crate::user::User;

/// Seconds that two clocks may be apart before it is said.
const CLOCKS_APART_MAX: u64 = 5;

/// How a backup is taken.
#[derive(Clone, Debug)]
pub struct BackupOptions {
    /// full, diff or incr, or what is due
    pub kind: Wanted,
    /// hash every file, also those whose size and time did not change
    pub checksum: bool,
    /// libpq conninfo of the server
    pub conninfo: String,
    /// libpq conninfo of the primary, when the server is a standby
    pub primary: Option<String>,
    /// threads that read, hash and compress
    pub process_max: usize,
    /// bytes of packs held in memory at once
    pub buffer_bytes: usize,
    /// zstd level
    pub level: i32,
    /// begin with an immediate checkpoint
    pub start_fast: bool,
    /// where the WAL goes that consistency needs
    pub wal: WalChoice,
    /// how long to wait for a WAL segment to be archived
    pub archive_timeout: Duration,
    /// fail when a page's checksum is wrong
    pub page_errors_fail: bool,
    /// which servers are refused
    pub checks: Checks,
    /// how the files come to us
    pub way: Way,
}

/// How the files of a server come to us.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// read from the data directory, on the server's machine
    Files,
    /// sent by the server over a replication connection
    Stream,
}

/// Which kind of backup is taken; where there is nothing to build on, a full one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// this kind
    Kind(BackupKind),
    /// what is due
    Due(Schedule),
}

/// Where the WAL goes that consistency needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WalChoice {
    /// the archive if the server archives, else with the backup
    Auto,
    /// the archive
    Archive,
    /// stored with the backup
    Stored,
}

/// What is known of a backup before copying.
pub(super) struct Started {
    pub(super) database: Database,
    label: Label,
    prior: Option<String>,
    pub(super) timeline: Timeline,
    pub(super) start_lsn: Lsn,
    pub(super) start_time: i64,
    /// the same by the server's clock
    server_time: i64,
    pub(super) wal_stored: bool,
    source: Source,
}

/// What the server says when a backup begins.
pub(super) struct Begun {
    pub(super) start_lsn: Lsn,
    pub(super) timeline: Timeline,
    pub(super) source: Source,
}

/// What either way of copying needs.
pub(super) struct Copying<'a> {
    pub(super) server: &'a mut Server,
    pub(super) started: &'a Started,
    pub(super) cutting: &'a Cutting<'a>,
    pub(super) workers: usize,
    pub(super) assembler: &'a mut Assembler,
    pub(super) parent: Option<ParentFiles>,
    pub(super) monitor: &'a dyn Monitor,
}

/// What is known when everything was copied and the backup has ended on the server.
pub(super) struct Ended {
    pub(super) stopped: Stopped,
    pub(super) stop_time: i64,
    pub(super) tablespaces: Vec<Tablespace>,
    /// names of the data directory's user and group
    pub(super) owner: (String, String),
}

/// What copying gave: everything of the manifest but its description.
struct Copied {
    assembler: Assembler,
    ended: Ended,
    segments: Vec<SegmentName>,
    packs: Packs,
}

/// Takes a backup of the server; returns what it is once it is committed.
///
/// A parent that turns out to be damaged is left aside: then every file is stored anew.
pub fn backup(repository: &Repository, options: &BackupOptions, monitor: &dyn Monitor) -> Result<Description> {
    match attempt(repository, options, true, monitor) {
        Err(error) if error.find::<Unusable>().is_some() => {
            tracing::warn!(%error, "a parent is damaged");
            monitor.note(&format!("{error}, it is damaged: a full backup is taken that shares nothing with it"));
            attempt(
                repository,
                &BackupOptions { kind: Wanted::Kind(BackupKind::Full), ..options.clone() },
                false,
                monitor,
            )
        }
        other => other,
    }
}

fn attempt(
    repository: &Repository,
    options: &BackupOptions,
    share: bool,
    monitor: &dyn Monitor,
) -> Result<Description> {
    let mut server = Server::connect(&options.conninfo)?;
    let database = proven_database(repository, &mut server)?;
    let mut stream = match options.way {
        Way::Files => prove_local(&server).map(|()| None)?,
        Way::Stream => Some(Stream::connect(&mut server, &options.conninfo)?),
    };
    refuse_rival(&mut server, repository, &database, options.checks)?;
    server.lock()?;
    let lock = repository.lock(LockKind::Backup, "")?;
    let (kind, compared) = compared(repository, &database, options, share, monitor)?;
    let prior = compared.as_ref().map(|of| of.description.label.clone());
    let started = start(repository, &mut server, stream.as_mut(), database, kind, prior, options, monitor)?;
    lock.set_note(&started.label.to_string());
    let trust = |parent: Compared| {
        let start = (started.timeline, started.start_lsn, (started.start_time, started.server_time));
        parent.trusted(repository, start, &server.data_directory, &started.source, options)
    };
    let compared = compared.map(trust).transpose()?;
    let dead = lock.dead_backups()?;
    let left = left_behind(repository, &dead)?;
    match store(repository, &mut server, stream, started, compared, left, &lock, options, monitor) {
        Ok(description) => {
            if let Err(error) = lock.dead_backups().and_then(|dead| lock.remove(&dead)) {
                tracing::warn!(%error, "locks of backups that died could not be removed");
            }
            Ok(description)
        }
        Err(error) => {
            // the next backup takes over what this one and those before it stored
            lock.leave(&dead);
            Err(error)
        }
    }
}

/// Copies everything and commits the backup.
#[expect(clippy::too_many_arguments, reason = "what is copied, from where, and what is known of it")]
fn store(
    repository: &Repository,
    server: &mut Server,
    stream: Option<Stream>,
    started: Started,
    compared: Option<Compared>,
    left: HashMap<PackId, u64>,
    lock: &Lock,
    options: &BackupOptions,
    monitor: &dyn Monitor,
) -> Result<Description> {
    let mut copied = copy_all(repository, server, stream, &started, compared, left, options, monitor)?;
    let totals = copied.assembler.totals();
    // another server may have been promoted meanwhile
    options.checks.refuse_left(repository, &started.database, started.timeline, copied.ended.stopped.lsn)?;
    let page_errors = totals.page_errors(copied.ended.stopped.lsn);
    if let (true, Some(file)) = (options.page_errors_fail, page_errors.first()) {
        return Err(Error::new(format!("{} pages of {} fail their checksum", file.blocks.len(), file.file))
            .hint("run pg_checksums or pg_amcheck on the server; without --page-errors=fail the backup is kept"));
    }
    let packs = copied.packs.table(&totals.weights)?;
    prove_old(repository, &copied.packs, &packs)?;
    let description = describe(server, started, &copied, totals, &packs)?;
    commit(repository, copied.assembler, &description, &packs, lock)?;
    Ok(description)
}

/// Where a repository is that is a directory, links resolved.
fn directory_of(repository: &Repository) -> Option<PathBuf> {
    Some(Path::new(repository.store.url())).filter(|url| url.is_absolute()).and_then(|url| url.canonicalize().ok())
}

/// Copies the data directory, ends the backup on the server, and proves the WAL; every pack is durable when it returns.
#[expect(clippy::too_many_arguments, reason = "what is copied, from where, and what is known of it")]
fn copy_all(
    repository: &Repository,
    server: &mut Server,
    stream: Option<Stream>,
    started: &Started,
    compared: Option<Compared>,
    left: HashMap<PackId, u64>,
    options: &BackupOptions,
    monitor: &dyn Monitor,
) -> Result<Copied> {
    let (workers, uploaders) = plan(options);
    let uploads = Uploads::start(repository, uploaders);
    let page_size = started.database.page_size as usize;
    let old_errors = compared.as_ref().map(|of| of.description.page_errors.clone()).unwrap_or_default();
    let (parent_files, parent) = compared.map(|of| (of.files, of.parent)).unzip();
    let dedup = Dedup::default();
    take_over(repository, &left, &dedup)?;
    let mut old = left;
    old.extend(parent.iter().flat_map(Parent::packs).map(|pack| (pack.pack, pack.size)));
    let cutting = Cutting {
        root: if stream.is_some() { PathBuf::new() } else { server.data_directory.clone() },
        user: if stream.is_some() { None } else { User::of_server(&server.data_directory)? },
        repository: directory_of(repository),
        keys: &repository.keys,
        level: options.level,
        uploads: &uploads,
        dedup,
        lanes: Lanes::new(&repository.keys),
        pages: started.database.checksums.then_some(Pages { size: page_size, start: started.start_lsn }),
        parent,
    };
    let assembler = Assembler::new(repository.keys.clone(), &old_errors)?;
    let mut assembler = if stream.is_some() { assembler.in_any_order() } else { assembler };
    let copying = Copying {
        server,
        started,
        cutting: &cutting,
        workers,
        assembler: &mut assembler,
        parent: parent_files,
        monitor,
    };
    let ended = match stream {
        Some(stream) => stream.copy(copying)?,
        None => datadir::copy_files(copying)?,
    };
    let segments = wal_needed(started, &ended.stopped)?;
    if !started.wal_stored {
        monitor.stage("waiting for WAL", 0);
        let (database, timeout) = (&started.database, options.archive_timeout);
        match server.in_recovery {
            true => {
                let primary = options.primary.as_deref();
                standby::await_wal(primary, server, repository, database, &segments, timeout)?;
            }
            false => {
                await_segments(&repository.archive(database), &segments, timeout)?;
                await_told(server, segments[0], segments[segments.len() - 1], timeout)?;
            }
        }
        let Stopped { lsn, backup_label, .. } = &ended.stopped;
        prove_backup(repository, database, &Claims::new(started.timeline, backup_label, *lsn)?)?;
    }
    cutting.lanes.flush(&uploads)?;
    drop(cutting);
    let packs = Packs { new: uploads.finish()?, old };
    Ok(Copied { assembler, ended, segments, packs })
}

/// What was taken over must be there at the commit too, whatever was deleted meanwhile.
fn prove_old(repository: &Repository, packs: &Packs, needed: &[PackUse]) -> Result<()> {
    let old: Vec<_> = needed.iter().filter(|pack| !packs.new.contains_key(&pack.pack)).copied().collect();
    repository.prove_packs(&old)
}

fn describe(
    server: &mut Server,
    started: Started,
    copied: &Copied,
    totals: Totals,
    packs: &[PackUse],
) -> Result<Description> {
    let (owner, group) = copied.ended.owner.clone();
    let (databases, spaces) = (server.databases()?, server.tablespaces()?);
    let named = |of: &Tablespace| {
        let name = spaces.iter().find(|(oid, _)| *oid == of.oid).map(|(_, name)| name.clone());
        Tablespace { name, ..of.clone() }
    };
    let Stopped { lsn: stop_lsn, backup_label, tablespace_map } = copied.ended.stopped.clone();
    Ok(Description {
        label: started.label.to_string(),
        kind: started.label.kind(),
        prior: started.prior,
        pgcairn: env!("CARGO_PKG_VERSION").into(),
        start_time: started.start_time,
        stop_time: copied.ended.stop_time,
        start_lsn: started.start_lsn.to_string(),
        stop_lsn: stop_lsn.to_string(),
        timeline: started.timeline.0,
        wal_start: copied.segments[0].to_string(),
        wal_stop: copied.segments[copied.segments.len() - 1].to_string(),
        wal_stored: started.wal_stored,
        database: started.database,
        data_directory: server.data_directory.display().to_string(),
        source: Some(started.source),
        owner,
        group,
        superuser: Some(server.bootstrap_superuser()?),
        backup_label,
        tablespace_map,
        tablespaces: copied.ended.tablespaces.iter().map(named).collect(),
        databases: databases.into_iter().map(|(oid, name)| NamedDatabase { oid, name }).collect(),
        page_errors: totals.page_errors(stop_lsn),
        sizes: Sizes {
            database: totals.bytes,
            read: totals.read,
            stored_new: copied.packs.new.values().sum(),
            stored_all: packs.iter().map(|pack| pack.weight.min(pack.size)).sum(),
            files: totals.files,
        },
    })
}

/// Packs are durable; the manifest makes the backup, the catalog makes it known. Without the lock packs that it refers to may be
/// gone: it must be held before, and where it was lost meanwhile the packs are looked for once more.
fn commit(
    repository: &Repository,
    assembler: Assembler,
    description: &Description,
    packs: &[PackUse],
    lock: &Lock,
) -> Result<()> {
    let manifest = Bytes::from(assembler.finish(description, packs)?);
    let key = layout::manifest(&repository.stanza, &description.label);
    if repository.store.size(&key)?.is_some() {
        return Err(Error::new(format!("backup {} exists already; another backup took its label", description.label))
            .hint("run the backup again"));
    }
    lock.check()?;
    repository.store.put(&key, Body::Bytes(manifest))?;
    if lock.check().is_err() {
        repository.prove_packs(packs).map_err(|error| {
            Error::new(format!(
                "backup {} must not be relied on: packs vanished while it was committed",
                description.label
            ))
            .hint("remove it with \"pgcairn expire --set\", and run the backup again")
            .source(error)
        })?;
    }
    repository.enter(description)
}

/// Workers and uploaders that fit into the buffer, at least one of each.
fn plan(options: &BackupOptions) -> (usize, usize) {
    const SHARED_LANES: usize = 3;
    let packs = (options.buffer_bytes / PACK_BYTES).saturating_sub(SHARED_LANES).max(2);
    let workers = options.process_max.clamp(1, packs / 2 + packs % 2);
    (workers, (packs - workers).clamp(1, 16))
}

fn proven_database(repository: &Repository, server: &mut Server) -> Result<Database> {
    let info = repository.archive_info()?;
    let mut database = identify(server)?;
    info.check(&repository.stanza, &database)?;
    database.id = info.current()?.id;
    Ok(database)
}

#[expect(clippy::too_many_arguments, reason = "what begins, where, and how")]
fn start(
    repository: &Repository,
    server: &mut Server,
    stream: Option<&mut Stream>,
    database: Database,
    kind: BackupKind,
    prior: Option<String>,
    options: &BackupOptions,
    monitor: &dyn Monitor,
) -> Result<Started> {
    let wal_stored = is_wal_stored(server, options)?;
    let timeout = options.archive_timeout;
    // the archive is that of this server, also where the backup does without it
    let is_archived = match wal_stored {
        true => server.archiving != Archiving::Off && repository.archive(&database).has_segments()?,
        false => true,
    };
    if is_archived {
        monitor.stage("checking the archive", 0);
    }
    if wal_stored {
        server.hold_wal()?;
    }
    match (is_archived, server.in_recovery, &options.primary) {
        (false, ..) => {}
        (true, false, _) => prove_archiving(server, repository, &database, timeout).map(|_| ())?,
        (true, true, Some(primary)) => {
            standby::prove_primary_archives(primary, server, repository, &database, timeout).map(|_| ())?;
        }
        // seen once the backup has begun
        (true, true, None) => {}
    }
    let label = next_label(repository, kind, prior.as_deref())?;
    monitor.stage("waiting for a checkpoint", 0);
    let name = format!("pgcairn backup {label}");
    let Begun { start_lsn, timeline, source } = match stream {
        Some(stream) => stream.begin(server, &name, options.start_fast, wal_stored)?,
        None => datadir::begin(server, &name, options.start_fast)?,
    };
    if server.in_recovery {
        monitor.stage("checking the archive", 0);
        standby::prove_archived(server, repository, &database, start_lsn, timeout)?;
    }
    let prior = prior.filter(|_| kind != BackupKind::Full);
    let (start_time, server_time) = (now_s(), server.now_s()?);
    if server_time.abs_diff(start_time) > CLOCKS_APART_MAX {
        monitor.note(&format!(
            "the server's clock and this machine's are {} s apart: the backup's end is noted by the server's",
            server_time.abs_diff(start_time)
        ));
    }
    Ok(Started { database, label, prior, timeline, start_lsn, start_time, server_time, wal_stored, source })
}

fn is_wal_stored(server: &Server, options: &BackupOptions) -> Result<bool> {
    let off = server.archiving == Archiving::Off;
    match (options.wal, server.in_recovery) {
        (WalChoice::Stored, true) => {
            Err(Error::new("a standby cannot end the WAL segment that the backup would store last")
                .hint("leave --wal=stored out: a backup from a standby takes its WAL from the archive"))
        }
        (_, true) => Ok(false),
        (WalChoice::Archive, false) if off => Err(Error::new("archive_mode is off")
            .hint("set archive_mode = on and an archive_command, or let the backup store its WAL: --wal=stored")),
        (WalChoice::Auto, false) => Ok(off),
        (WalChoice::Archive, false) => Ok(false),
        (WalChoice::Stored, false) => Ok(true),
    }
}

fn next_label(repository: &Repository, kind: BackupKind, prior: Option<&str>) -> Result<Label> {
    let parse = |label: &str| label.parse::<Label>().context(|| "a label of the repository".into());
    let newest = repository.labels()?.pop().map(|label| parse(&label)).transpose()?;
    let full = prior.map(parse).transpose()?;
    Label::next(kind, full, now_s(), newest).context(|| "no label for this backup".into())
}

/// The segments that hold the WAL from start to stop.
pub(super) fn wal_needed(started: &Started, stopped: &Stopped) -> Result<Vec<SegmentName>> {
    let size = SegmentSize::new(started.database.wal_segment_size).context(|| "pg_control".into())?;
    Ok(size.names_covering(started.timeline, started.start_lsn, stopped.lsn).collect())
}

pub(super) fn now_s() -> i64 {
    seconds(std::time::SystemTime::now())
}

pub(super) fn seconds(time: std::time::SystemTime) -> i64 {
    time.duration_since(std::time::UNIX_EPOCH).map_or(0, |since| since.as_secs() as i64)
}

#[cfg(test)]
pub(crate) mod tests;
