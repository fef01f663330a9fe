//! The data directory read directly, on the server's machine: between the calls that begin and end a backup.

use std::path::Path;
use std::sync::Arc;

use super::assemble::{Assembler, Done};
use super::chunker::{Cut, Worker};
use super::copy::{Files, copy};
use super::preflight::{read_control, source};
use super::run::{Begun, Copying, Ended, Started, seconds, wal_needed};
use super::scan::{Scan, Scanned, ScannedKind, scan_without};
use super::server::Server;
use super::source::Origin;
use super::standby;
use crate::error::{Context, Error, Result};
use crate::files;
use crate::format::{INLINE_BYTES, LEAF_BYTES};
use crate::postgres::{ControlFile, Lsn, SegmentName, Timeline};
use crate::repo::wal::wal_identity;
use crate::user::as_user;

/// Begins the backup on the server.
pub(super) fn begin(server: &mut Server, label: &str, fast: bool) -> Result<Begun> {
    let start_lsn = server.start_backup(label, fast)?;
    let timeline = proven_start(server, start_lsn)?;
    Ok(Begun { start_lsn, timeline, source: source(server)? })
}

/// Copies the data directory, pg_control last, ends the backup on the server, and reads the WAL where it is stored.
pub(super) fn copy_files(copying: Copying<'_>) -> Result<Ended> {
    let Copying { server, started, cutting, workers, assembler, parent, monitor } = copying;
    let layout = started.database.layout().context(|| "pg_control".into())?;
    let user = cutting.user.as_ref();
    let Scan { found, tablespaces, bytes } =
        as_user(user, || scan_without(&server.data_directory, layout, cutting.repository.as_deref()))?;
    monitor.stage("copying", bytes);
    let files = Files { found, parent };
    let control = copy(cutting, files, workers, assembler, monitor, &mut || server.alive())?;
    server.alive()?;
    let control = copy_control(server, control, started, assembler)?;
    monitor.stage("stopping", 0);
    let stopped = server.stop_backup()?;
    if server.in_recovery {
        standby::prove_stop(server, &control, stopped.lsn)?;
    }
    let stop_time = server.now_s()?;
    let mut last = Worker::new(cutting)?;
    let wal = match started.wal_stored {
        true => read_wal(&mut last, started, &wal_needed(started, &stopped)?)?,
        false => Vec::new(),
    };
    // a WAL segment is 1 GiB at most: no index is needed
    assembler.fill_wal(wal, &|_| Err(Error::new("a WAL segment past its limit")))?;
    last.finish()?;
    Ok(Ended { stopped, stop_time, tablespaces, owner: owner(&server.data_directory)? })
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
    match server.in_recovery {
        true => standby::timeline(&control, None),
        false => Ok(control.checkpoint.timeline),
    }
}

fn copy_control(server: &Server, found: Scanned, started: &Started, assembler: &mut Assembler) -> Result<ControlFile> {
    let (bytes, parsed) = read_control(&server.data_directory)?;
    if server.in_recovery {
        standby::timeline(&parsed, Some(started.timeline))?;
    }
    if parsed.checkpoint.timeline != started.timeline {
        return Err(Error::new(format!(
            "the server changed from timeline {} to {} during the backup",
            started.timeline, parsed.checkpoint.timeline
        ))
        .hint("run the backup again"));
    }
    assembler.fill_control(&Scanned { kind: ScannedKind::File, ..found }, &bytes)?;
    Ok(parsed)
}

/// Reads the segments from pg_wal, where the slot keeps them, as files of the backup.
fn read_wal(worker: &mut Worker<'_>, started: &Started, segments: &[SegmentName]) -> Result<Vec<Done>> {
    let identity = wal_identity(&started.database)?;
    let mut done = Vec::new();
    for segment in segments {
        let path = worker.root().join("pg_wal").join(segment.to_string());
        let metadata = as_user(worker.user(), || {
            check_wal_header(&path, *segment, identity)?;
            std::fs::metadata(&path).map_err(|error| Error::io("read", &path, error))
        })?;
        let size = started.database.wal_segment_size;
        let file = Scanned {
            path: format!("pg_wal/{segment}").into_bytes().into(),
            mode: 0o600,
            mtime: metadata.modified().map_or(0, seconds),
            size,
            kind: ScannedKind::File,
            first_block: None,
            identity: None,
            is_settled: false,
        };
        if size <= INLINE_BYTES {
            let cut = worker.small(&[(&file, None, &Origin::Disk)])?.pop();
            done.push(Done::Small(vec![(file, cut)]));
            continue;
        }
        let file = Arc::new(file);
        for number in 0..size.div_ceil(LEAF_BYTES) {
            match worker.leaf(&file, number, None, &Origin::Disk)? {
                Cut::Vanished => return Err(Error::new(format!("{} vanished", path.display()))),
                part => done.push(Done::Leaf { file: file.clone(), number, part }),
            }
        }
    }
    Ok(done)
}

fn check_wal_header(path: &Path, segment: SegmentName, identity: crate::postgres::WalIdentity) -> Result<()> {
    use std::io::Read;
    let mut header = [0; 64];
    let read = files::open_regular(path).and_then(|mut file| file.read_exact(&mut header));
    read.map_err(|error| Error::io("read", path, error))?;
    identity.check_segment(segment, &header).context(|| format!("{} cannot be stored", path.display()))?;
    Ok(())
}

fn owner(path: &Path) -> Result<(String, String)> {
    use std::os::unix::fs::MetadataExt;
    let metadata = std::fs::metadata(path).map_err(|error| Error::io("look at", path, error))?;
    let user = nix::unistd::User::from_uid(metadata.uid().into()).ok().flatten().map(|user| user.name);
    let group = nix::unistd::Group::from_gid(metadata.gid().into()).ok().flatten().map(|group| group.name);
    Ok((user.unwrap_or_else(|| metadata.uid().to_string()), group.unwrap_or_else(|| metadata.gid().to_string())))
}
