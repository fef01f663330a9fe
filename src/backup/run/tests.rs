//! A backup of a plain directory: the order of [`attempt`](super::attempt) and all of its parts that need no server. For tests
//! of everything that lives with backups.
#![allow(clippy::unwrap_used)]

use std::path::Path;

use super::*;
use crate::backup::copy::tests::settle;
use crate::backup::copy::{Files, copy};
use crate::backup::rival::Checks;
use crate::backup::scan::{Scanned, ScannedKind, scan};
use crate::progress::Silent;
use crate::repo::lock::Timing;
use crate::retention::tests::backup_positions;

/// What a server would say, and the directory.
pub(crate) struct Directory<'a> {
    pub(crate) root: &'a Path,
    pub(crate) kind: BackupKind,
    /// the present second
    pub(crate) now: i64,
    /// archives the segment that is being written, and says which it was
    pub(crate) archive: &'a mut dyn FnMut() -> Result<SegmentName>,
}

/// Takes a backup of a directory, as [`backup`] does of a server.
pub(crate) fn backup_directory(repository: &Repository, of: &mut Directory<'_>) -> Result<Description> {
    match attempt_directory(repository, of, of.kind, true) {
        Err(error) if error.find::<Unusable>().is_some() => attempt_directory(repository, of, BackupKind::Full, false),
        other => other,
    }
}

fn attempt_directory(
    repository: &Repository,
    of: &mut Directory<'_>,
    kind: BackupKind,
    share: bool,
) -> Result<Description> {
    let database = repository.archive_info()?.current()?.clone();
    let timing = Timing { patience: Duration::ZERO, ..Timing::default() };
    let lock = repository.lock_with(LockKind::Backup, "", timing)?;
    let options = options(kind);
    let (kind, compared) = compared(repository, &database, &options, share, &Silent)?;
    let prior = compared.as_ref().map(|of| of.description.label.clone());
    let started = started(repository, of, database, kind, prior)?;
    lock.set_note(&started.label.to_string());
    let trust = |parent: Compared| {
        let start = (started.timeline, started.start_lsn, (started.start_time, started.server_time));
        parent.trusted(repository, start, of.root, &started.source, &options)
    };
    let compared = compared.map(trust).transpose()?;
    let dead = lock.dead_backups()?;
    let left = left_behind(repository, &dead)?;
    let description = match store_directory(repository, of, started, compared, left, &lock) {
        Ok(description) => description,
        Err(error) => {
            lock.leave(&dead);
            return Err(error);
        }
    };
    if let Ok(dead) = lock.dead_backups() {
        _ = lock.remove(&dead);
    }
    Ok(description)
}

/// As [`store`] does.
fn store_directory(
    repository: &Repository,
    of: &mut Directory<'_>,
    started: Started,
    compared: Option<Compared>,
    left: HashMap<PackId, u64>,
    lock: &Lock,
) -> Result<Description> {
    let mut copied = copy_directory(repository, of, &started, compared, left)?;
    let totals = copied.assembler.totals();
    let packs = copied.packs.table(&totals.weights)?;
    prove_old(repository, &copied.packs, &packs)?;
    let description = described(of, started, &copied);
    commit(repository, copied.assembler, &description, &packs, lock)?;
    Ok(description)
}

fn options(kind: BackupKind) -> BackupOptions {
    BackupOptions {
        kind: Wanted::Kind(kind),
        checksum: false,
        conninfo: String::new(),
        primary: None,
        process_max: 2,
        buffer_bytes: 0,
        level: 1,
        start_fast: true,
        wal: WalChoice::Archive,
        archive_timeout: Duration::ZERO,
        page_errors_fail: false,
        checks: Checks { archive_mode: false, timeline: true },
        way: Way::Files,
    }
}

fn started(
    repository: &Repository,
    of: &mut Directory<'_>,
    database: Database,
    kind: BackupKind,
    prior: Option<String>,
) -> Result<Started> {
    let parse = |label: &str| label.parse::<Label>().unwrap();
    let newest = repository.labels()?.pop().map(|label| parse(&label));
    let label = Label::next(kind, prior.as_deref().map(parse), of.now, newest).unwrap();
    let segment = (of.archive)()?;
    Ok(Started {
        database,
        label,
        prior: prior.filter(|_| kind != BackupKind::Full),
        timeline: segment.timeline(),
        start_lsn: backup_positions((segment, segment)).0,
        start_time: of.now,
        server_time: of.now,
        wal_stored: false,
        source: Source { standby: false, host: "here".into(), mark: "one".into() },
    })
}

/// As [`copy_all`] does.
fn copy_directory(
    repository: &Repository,
    of: &mut Directory<'_>,
    started: &Started,
    compared: Option<Compared>,
    left: HashMap<PackId, u64>,
) -> Result<Copied> {
    let uploads = Uploads::start(repository, 2);
    let (parent_files, parent) = compared.map(|of| (of.files, of.parent)).unzip();
    let dedup = Dedup::default();
    take_over(repository, &left, &dedup)?;
    let mut old = left;
    old.extend(parent.iter().flat_map(Parent::packs).map(|pack| (pack.pack, pack.size)));
    let cutting = Cutting {
        root: of.root.to_owned(),
        user: None,
        repository: None,
        keys: &repository.keys,
        level: 1,
        uploads: &uploads,
        dedup,
        lanes: Lanes::new(&repository.keys),
        // the bytes are no pages
        pages: None,
        parent,
    };
    let mut assembler = Assembler::new(repository.keys.clone(), &[])?;
    let mut found = scan(of.root, started.database.layout().unwrap())?;
    settle(&mut found.found, of.now);
    let files = Files { found: found.found, parent: parent_files };
    let control = copy(&cutting, files, 2, &mut assembler, &Silent, &mut || Ok(()))?;
    let bytes = std::fs::read(of.root.join("global/pg_control")).unwrap();
    assembler.fill_control(&Scanned { kind: ScannedKind::File, ..control }, &bytes)?;
    assembler.fill_wal(Vec::new(), &|_| Err(Error::new("no index here")))?;
    let size = SegmentSize::new(started.database.wal_segment_size).unwrap();
    let first = SegmentName::of_lsn(started.timeline, started.start_lsn, size);
    let (_, lsn, backup_label) = backup_positions((first, (of.archive)()?));
    let stopped = Stopped { lsn, backup_label, tablespace_map: String::new() };
    let segments = wal_needed(started, &stopped)?;
    await_segments(&repository.archive(&started.database), &segments, Duration::ZERO)?;
    cutting.lanes.flush(&uploads)?;
    drop(cutting);
    let packs = Packs { new: uploads.finish()?, old };
    let owner = ("postgres".into(), "postgres".into());
    let ended = Ended { stopped, stop_time: of.now, tablespaces: Vec::new(), owner };
    Ok(Copied { assembler, ended, segments, packs })
}

fn described(of: &Directory<'_>, started: Started, copied: &Copied) -> Description {
    Description {
        label: started.label.to_string(),
        kind: started.label.kind(),
        prior: started.prior,
        pgcairn: "test".into(),
        start_time: started.start_time,
        stop_time: copied.ended.stop_time,
        start_lsn: started.start_lsn.to_string(),
        stop_lsn: copied.ended.stopped.lsn.to_string(),
        timeline: started.timeline.0,
        wal_start: copied.segments[0].to_string(),
        wal_stop: copied.segments[copied.segments.len() - 1].to_string(),
        wal_stored: false,
        database: started.database,
        data_directory: of.root.display().to_string(),
        source: Some(started.source),
        owner: copied.ended.owner.0.clone(),
        group: copied.ended.owner.1.clone(),
        superuser: None,
        backup_label: copied.ended.stopped.backup_label.clone(),
        tablespace_map: String::new(),
        tablespaces: Vec::new(),
        databases: Vec::new(),
        page_errors: Vec::new(),
        sizes: Sizes::default(),
    }
}
