//! A backup from the first question to the commit.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use crossbeam_channel::{Receiver, Sender, bounded};
use parking_lot::Mutex;

use super::assemble::{Assembler, Done, Later};
use super::check::{await_segment, identify, prove_archiving, read_control};
use super::cut::{Cut, Cutting, Lanes, Pages, Worker};
use super::dedup::Dedup;
use super::packer::{PACK_BYTES, Uploads};
use super::push::wal_identity;
use super::scan::{Scan, Scanned, ScannedKind, scan};
use super::server::{Archiving, Server, Stopped};
use crate::error::{Context, Error, Result};
use crate::format::manifest::{Database, Description, Sizes};
use crate::format::{INLINE_BYTES, LEAF_BYTES};
use crate::postgres::{BackupKind, Label, Layout, Lsn, SegmentName, SegmentSize, Timeline};
use crate::progress::Monitor;
use crate::repo::{Repository, keys};
use crate::store::Body;

/// How a backup is taken.
#[derive(Clone, Debug)]
pub struct BackupOptions {
    /// libpq conninfo of the server
    pub conninfo: String,
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

/// Files and bytes one batch of small files holds at most.
const BATCH_FILES: usize = 256;
const BATCH_BYTES: u64 = 4 * 1024 * 1024;
/// Jobs handed out beyond the first that is not complete: bounds what waits for its turn in the manifest.
const JOBS_AHEAD: usize = 64;

/// One piece of work for a worker.
enum Job {
    Batch(Vec<Scanned>),
    Leaf(Arc<Scanned>, u64),
    Later(Later),
}

/// What is known of a backup before copying.
struct Started {
    database: Database,
    label: Label,
    timeline: Timeline,
    start_lsn: Lsn,
    start_time: i64,
    wal_stored: bool,
}

/// Takes a full backup of the server; returns what it is once it is committed.
pub fn backup(repository: &Repository, options: &BackupOptions, monitor: &dyn Monitor) -> Result<Description> {
    let mut server = Server::connect(&options.conninfo)?;
    let database = proven_database(repository, &server)?;
    server.lock()?;
    let started = start(repository, &mut server, database, options, monitor)?;
    let layout = layout(&started.database, server.major)?;
    let scan = scan(&server.data_directory, layout)?;
    let uploads = Uploads::start(repository, plan(options).1);
    let cutting = Cutting {
        root: server.data_directory.clone(),
        keys: &repository.keys,
        level: options.level,
        uploads: &uploads,
        dedup: Dedup::default(),
        lanes: Lanes::default(),
        pages: started
            .database
            .checksums
            .then_some(Pages { size: started.database.page_size as usize, start: started.start_lsn }),
    };
    monitor.stage("copying", scan.bytes);
    let mut assembler = Assembler::new(repository.keys.clone())?;
    let Scan { found, tablespaces, .. } = scan;
    let control = copy(&cutting, found, plan(options).0, &mut assembler, monitor)?;
    server.alive()?;
    let mut last = Worker::new(&cutting)?;
    copy_control(&mut last, &control, &started, &mut assembler)?;
    monitor.stage("stopping", 0);
    let stopped = server.stop_backup()?;
    let segments = wal_needed(&started, &stopped)?;
    if started.wal_stored {
        let wal = read_wal(&mut last, &started, &segments)?;
        assembler.fill(Later::Wal, wal, &|_| Err(Error::new("a WAL segment too large for its entry")))?;
    } else {
        assembler.fill(Later::Wal, Vec::new(), &|_| Err(Error::new("no WAL is stored here")))?;
        monitor.stage("waiting for WAL", 0);
        let archive = repository.archive(&started.database);
        segments.iter().try_for_each(|segment| await_segment(&archive, *segment, options.archive_timeout))?;
    }
    last.finish()?;
    cutting.lanes.flush(&uploads)?;
    drop(cutting);
    let stored_new = uploads.finish()?;
    let totals = assembler.totals();
    if options.page_errors_fail && !totals.page_errors.is_empty() {
        let file = &totals.page_errors[0];
        return Err(Error::new(format!("{} pages of {} fail their checksum", file.blocks.len(), file.file))
            .hint("run pg_checksums or pg_amcheck on the server; without --page-errors=fail the backup is kept"));
    }
    let owner = owner(&server.data_directory)?;
    let description = Description {
        label: started.label.to_string(),
        kind: BackupKind::Full,
        prior: None,
        pgcairn: env!("CARGO_PKG_VERSION").into(),
        start_time: started.start_time,
        stop_time: now_s(),
        start_lsn: started.start_lsn.to_string(),
        stop_lsn: stopped.lsn.to_string(),
        timeline: started.timeline.0,
        wal_start: segments[0].to_string(),
        wal_stop: segments[segments.len() - 1].to_string(),
        wal_stored: started.wal_stored,
        database: started.database,
        data_directory: server.data_directory.display().to_string(),
        owner: owner.0,
        group: owner.1,
        backup_label: stopped.backup_label,
        tablespace_map: stopped.tablespace_map,
        tablespaces,
        page_errors: totals.page_errors,
        sizes: Sizes {
            database: totals.bytes,
            read: totals.bytes,
            stored_new,
            stored_all: stored_new,
            files: totals.files,
        },
    };
    commit(repository, assembler, &description)?;
    Ok(description)
}

/// Packs are durable; the manifest makes the backup, the catalog makes it known.
fn commit(repository: &Repository, assembler: Assembler, description: &Description) -> Result<()> {
    let manifest = Bytes::from(assembler.finish(description)?);
    repository.store.put(&keys::manifest(&repository.stanza, &description.label), Body::Bytes(manifest))?;
    repository.enter(description)
}

/// Workers and uploaders that fit into the buffer, at least one of each.
fn plan(options: &BackupOptions) -> (usize, usize) {
    const SHARED_LANES: usize = 3;
    let packs = (options.buffer_bytes / PACK_BYTES).saturating_sub(SHARED_LANES).max(2);
    let workers = options.process_max.clamp(1, packs / 2 + packs % 2);
    (workers, (packs - workers).clamp(1, 16))
}

fn proven_database(repository: &Repository, server: &Server) -> Result<Database> {
    let info = repository.archive_info()?;
    let mut database = identify(server)?;
    info.check(&repository.stanza, &database)?;
    database.id = info.current()?.id;
    Ok(database)
}

fn start(
    repository: &Repository,
    server: &mut Server,
    database: Database,
    options: &BackupOptions,
    monitor: &dyn Monitor,
) -> Result<Started> {
    let wal_stored = match options.wal {
        WalChoice::Auto => server.archiving == Archiving::Off,
        WalChoice::Archive if server.archiving == Archiving::Off => {
            return Err(Error::new("archive_mode is off")
                .hint("set archive_mode = on and an archive_command, or let the backup store its WAL: --wal=stored"));
        }
        WalChoice::Archive => false,
        WalChoice::Stored => true,
    };
    let size = SegmentSize::new(database.wal_segment_size).context(|| "pg_control".into())?;
    match wal_stored {
        true => server.hold_wal()?,
        false => {
            monitor.stage("checking the archive", 0);
            prove_archiving(server, &repository.archive(&database), size, options.archive_timeout)?;
        }
    }
    let newest = repository.labels()?.pop().map(|label| label.parse()).transpose().context(|| "a label".into())?;
    let label = Label::next(BackupKind::Full, None, now_s(), newest).context(|| "no label for this backup".into())?;
    monitor.stage("waiting for a checkpoint", 0);
    let start_lsn = server.start_backup(&format!("pgcairn backup {label}"), options.start_fast)?;
    let timeline = proven_start(server, start_lsn)?;
    Ok(Started { database, label, timeline, start_lsn, start_time: now_s(), wal_stored })
}

/// The checkpoint of the start must be in the pg_control that we can read.
fn proven_start(server: &mut Server, start_lsn: Lsn) -> Result<Timeline> {
    let (_, control) = read_control(&server.data_directory)?;
    if control.checkpoint.redo < start_lsn {
        return Err(Error::new(format!(
            "the backup starts at {start_lsn}, but the checkpoint in {} is of {}",
            server.data_directory.display(),
            control.checkpoint.redo
        ))
        .hint("is this the data directory of the server that --pg names?"));
    }
    Ok(control.checkpoint.timeline)
}

fn layout(database: &Database, major: crate::postgres::Major) -> Result<Layout> {
    let pages = database.segment_size / u64::from(database.page_size);
    let relation_segment_pages = u32::try_from(pages).context(|| format!("a segment of {pages} pages"))?;
    Ok(Layout { tablespace_directory: major.tablespace_directory(), relation_segment_pages })
}

/// Reads everything but pg_control; returns pg_control as it was found.
fn copy(
    cutting: &Cutting<'_>,
    found: Vec<Scanned>,
    workers: usize,
    assembler: &mut Assembler,
    monitor: &dyn Monitor,
) -> Result<Scanned> {
    let (job_queue, jobs) = bounded::<(usize, Job)>(workers);
    let (results_queue, results) = bounded::<Result<(usize, Done)>>(workers);
    let (ticket_queue, tickets) = bounded::<()>(JOBS_AHEAD);
    let total = AtomicUsize::new(usize::MAX);
    let control = Mutex::new(None);
    let index_worker = Mutex::new(Worker::new(cutting)?);
    let index = |plain: &[u8]| index_worker.lock().index(plain);
    std::thread::scope(|scope| {
        // moved in, so that every exit from here closes the queues and lets the threads end
        let (results, tickets) = (results, tickets);
        for _ in 0..workers {
            let (jobs, results_queue) = (jobs.clone(), results_queue.clone());
            scope.spawn(move || work(cutting, &jobs, &results_queue, monitor));
        }
        drop((jobs, results_queue));
        let (total, control) = (&total, &control);
        scope.spawn(move || {
            let count = hand_out(found, control, |number, job| {
                ticket_queue.send(()).is_ok() && job_queue.send((number, job)).is_ok()
            });
            total.store(count, Ordering::Release);
        });
        let mut complete = 0;
        while let Ok(result) = results.recv() {
            let (number, done) = result?;
            let now = assembler.take(number, done, &index)?;
            (complete..now).for_each(|_| _ = tickets.recv());
            complete = now;
        }
        match complete == total.load(Ordering::Acquire) {
            true => Ok(()),
            false => Err(Error::new("a worker died")),
        }
    })?;
    let control = control.lock().take();
    control.ok_or_else(|| Error::new("global/pg_control vanished"))
}

/// Cuts the files into jobs; returns how many.
fn hand_out(found: Vec<Scanned>, control: &Mutex<Option<Scanned>>, send: impl Fn(usize, Job) -> bool) -> usize {
    let mut number = 0;
    let mut send = |job| {
        number += 1;
        send(number - 1, job)
    };
    let (mut batch, mut bytes) = (Vec::new(), 0);
    for file in found {
        let large = file.is_file() && file.size > INLINE_BYTES;
        let is_control = file.kind == ScannedKind::Control;
        let full = batch.len() >= BATCH_FILES || bytes + file.size > BATCH_BYTES;
        if (large || is_control || full) && !batch.is_empty() {
            bytes = 0;
            if !send(Job::Batch(std::mem::take(&mut batch))) {
                return number;
            }
        }
        if large {
            let leaves = file.size.div_ceil(LEAF_BYTES);
            let file = Arc::new(file);
            if !(0..leaves).all(|leaf| send(Job::Leaf(file.clone(), leaf))) {
                return number;
            }
        } else if is_control {
            *control.lock() = Some(file);
            if !send(Job::Later(Later::Control)) {
                return number;
            }
        } else {
            let is_wal = &*file.path == b"pg_wal";
            bytes += file.size;
            batch.push(file);
            if is_wal && !(send(Job::Batch(std::mem::take(&mut batch))) && send(Job::Later(Later::Wal))) {
                return number;
            }
        }
    }
    if !batch.is_empty() {
        send(Job::Batch(batch));
    }
    number
}

fn work(
    cutting: &Cutting<'_>,
    jobs: &Receiver<(usize, Job)>,
    results: &Sender<Result<(usize, Done)>>,
    monitor: &dyn Monitor,
) {
    let run = || -> Result<()> {
        let mut worker = Worker::new(cutting)?;
        while let Ok((number, job)) = jobs.recv() {
            let (done, bytes) = one(&mut worker, job)?;
            monitor.advance(bytes);
            if results.send(Ok((number, done))).is_err() {
                return Ok(());
            }
        }
        worker.finish()
    };
    if let Err(error) = run() {
        _ = results.send(Err(error));
    }
}

fn one(worker: &mut Worker<'_>, job: Job) -> Result<(Done, u64)> {
    match job {
        Job::Later(later) => Ok((Done::Later(later), 0)),
        Job::Leaf(file, number) => {
            let bytes = file.size.min((number + 1) * LEAF_BYTES) - number * LEAF_BYTES;
            let part = worker.leaf(&file, number)?;
            Ok((Done::Leaf { file, number, part }, bytes))
        }
        Job::Batch(batch) => {
            let files: Vec<&Scanned> = batch.iter().filter(|found| found.is_file()).collect();
            let bytes = files.iter().map(|file| file.size).sum();
            let mut cuts = worker.small(&files)?.into_iter();
            let with_cut = |found: Scanned| match found.is_file() {
                true => (found, cuts.next()),
                false => (found, None),
            };
            Ok((Done::Small(batch.into_iter().map(with_cut).collect()), bytes))
        }
    }
}

fn copy_control(
    worker: &mut Worker<'_>,
    control: &Scanned,
    started: &Started,
    assembler: &mut Assembler,
) -> Result<()> {
    let root = worker.root().to_owned();
    let (bytes, parsed) = read_control(&root)?;
    if parsed.checkpoint.timeline != started.timeline {
        return Err(Error::new(format!(
            "the server changed from timeline {} to {} during the backup",
            started.timeline, parsed.checkpoint.timeline
        ))
        .hint("run the backup again"));
    }
    let mut found = control.clone();
    found.size = bytes.len() as u64;
    let cut = worker.small_bytes(&found, bytes)?;
    let done = Done::Small(vec![(Scanned { kind: ScannedKind::File, ..found }, Some(cut))]);
    assembler.fill(Later::Control, vec![done], &|_| Err(Error::new("pg_control needs no index")))
}

/// The segments that hold the WAL from start to stop.
fn wal_needed(started: &Started, stopped: &Stopped) -> Result<Vec<SegmentName>> {
    let size = SegmentSize::new(started.database.wal_segment_size).context(|| "pg_control".into())?;
    Ok(size.names_covering(started.timeline, started.start_lsn, stopped.lsn).collect())
}

/// Reads the segments from pg_wal, where the slot keeps them, as files of the backup.
fn read_wal(worker: &mut Worker<'_>, started: &Started, segments: &[SegmentName]) -> Result<Vec<Done>> {
    let identity = wal_identity(&started.database)?;
    let mut done = Vec::new();
    for segment in segments {
        let path = worker.root().join("pg_wal").join(segment.to_string());
        let metadata = std::fs::metadata(&path).map_err(|error| Error::io("read", &path, error))?;
        check_wal_header(&path, *segment, identity)?;
        let size = started.database.wal_segment_size;
        let file = Scanned {
            path: format!("pg_wal/{segment}").into_bytes().into(),
            mode: 0o600,
            mtime: metadata.modified().map_or(0, seconds),
            size,
            kind: ScannedKind::File,
            first_block: None,
        };
        if size <= INLINE_BYTES {
            let cut = worker.small(&[&file])?.pop();
            done.push(Done::Small(vec![(file, cut)]));
            continue;
        }
        let file = Arc::new(file);
        for number in 0..size.div_ceil(LEAF_BYTES) {
            match worker.leaf(&file, number)? {
                Cut::Vanished => return Err(Error::new(format!("{} vanished", path.display()))),
                part => done.push(Done::Leaf { file: file.clone(), number, part }),
            }
        }
    }
    Ok(done)
}

fn check_wal_header(
    path: &std::path::Path,
    segment: SegmentName,
    identity: crate::postgres::WalIdentity,
) -> Result<()> {
    use std::io::Read;
    let mut header = [0; 64];
    let read = std::fs::File::open(path).and_then(|mut file| file.read_exact(&mut header));
    read.map_err(|error| Error::io("read", path, error))?;
    identity.check_segment(segment, &header).context(|| format!("{} cannot be stored", path.display()))?;
    Ok(())
}

fn owner(path: &std::path::Path) -> Result<(String, String)> {
    use std::os::unix::fs::MetadataExt;
    let metadata = std::fs::metadata(path).map_err(|error| Error::io("look at", path, error))?;
    let user = nix::unistd::User::from_uid(metadata.uid().into()).ok().flatten().map(|user| user.name);
    let group = nix::unistd::Group::from_gid(metadata.gid().into()).ok().flatten().map(|group| group.name);
    Ok((user.unwrap_or_else(|| metadata.uid().to_string()), group.unwrap_or_else(|| metadata.gid().to_string())))
}

fn now_s() -> i64 {
    seconds(std::time::SystemTime::now())
}

fn seconds(time: std::time::SystemTime) -> i64 {
    time.duration_since(std::time::UNIX_EPOCH).map_or(0, |since| since.as_secs() as i64)
}
