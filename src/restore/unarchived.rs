//! Refuses to remove WAL that may be the only trace of committed transactions.
//!
//! A server marks a segment `.ready` when it is full. The one that it was writing when it crashed has
//! no mark, and holds the last transactions. So every segment in `pg_wal` is compared, by name and
//! content, with what the archive has.

use std::collections::BTreeMap;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::files;
use crate::format::CHUNK;
use crate::format::chunk::Keys;
use crate::format::manifest::Database;
use crate::format::pack::WalKey;
use crate::postgres::wal::coverage::Coverage;
use crate::postgres::wal::records::{Event, walk};
use crate::postgres::{
    AUTO_CONF, CONTROL_FILE, ClusterState, ControlFile, Lsn, SegmentName, TimestampTz, WalName, conf,
};
use crate::read::view::View;
use crate::recovery::outline::Survey;
use crate::repo::Repository;
use crate::repo::wal::wal_identity;

/// A segment of `pg_wal` with ends of transactions that the archive does not have.
struct Unarchived {
    name: SegmentName,
    last: (Lsn, TimestampTz),
}

/// Refuses a data directory whose `pg_wal` holds WAL that its server wanted to archive and has not.
/// Returns a note where such WAL is removed, because the directory's server does not archive.
pub(super) fn refuse_unarchived(root: &Path, view: &View) -> Result<Option<String>> {
    let wal = root.join("pg_wal");
    refuse_ready(&wal)?;
    let lost = unarchived(&wal, view)?;
    let (Some(first), Some(last)) = (lost.first(), lost.last()) else { return Ok(None) };
    let (lsn, time) = lost.iter().map(|of| of.last).max().unwrap_or(last.last);
    let names = match lost.len() {
        1 => format!("WAL segment {}", first.name),
        count => format!("{count} WAL segments, {} to {},", first.name, last.name),
    };
    let what = format!(
        "{names} in {} with transactions that the archive does not have, the last of {time} (LSN {lsn})",
        wal.display()
    );
    if view.description.wal_stored || !archives(root)? {
        return Ok(Some(format!("removed: {what}; the directory's server did not archive")));
    }
    Err(Error::new(format!("there is {what}")).hint(format!(
        "they would be removed: archive each, so that recovery reaches them, with \"pgcairn archive-push {}/NAME\"; \
         or move them elsewhere, and the transactions that only they hold are lost",
        wal.display()
    )))
}

/// Refuses a `pg_wal` in which files wait for the archiver.
fn refuse_ready(wal: &Path) -> Result<()> {
    let status = wal.join("archive_status");
    let mut waiting: Vec<String> = names(&status)?
        .into_iter()
        .filter_map(|name| name.strip_suffix(".ready").map(str::to_owned))
        .filter(|name| wal.join(name).exists())
        .collect();
    waiting.sort_unstable();
    let (Some(first), Some(last)) = (waiting.first(), waiting.last()) else { return Ok(()) };
    let count = waiting.len();
    Err(Error::new(format!("{count} WAL files in {} were not archived yet, {first} to {last}", wal.display())).hint(
        format!(
            "they would be removed: archive each with \"pgcairn archive-push {}/NAME\", or, if nobody needs them, \
             remove {}/*.ready and the files",
            wal.display(),
            status.display()
        ),
    ))
}

/// Whether the directory's server archives WAL of its own. A standby's comes from its primary, and a
/// copy that this program made has `archive_mode = 'off'` at the end of its settings.
fn archives(root: &Path) -> Result<bool> {
    let control = files::read_regular(&root.join(CONTROL_FILE)).ok().and_then(|bytes| ControlFile::parse(&bytes).ok());
    let follows = [ClusterState::InArchiveRecovery, ClusterState::ShutDownInRecovery];
    if control.is_some_and(|control| follows.contains(&control.state)) {
        return Ok(false);
    }
    let path = root.join(AUTO_CONF);
    match files::read_regular(&path) {
        Ok(contents) => Ok(conf::values(&contents, "archive_mode").last().is_none_or(|value| value != "off")),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(true),
        Err(error) => Err(Error::io("read", &path, error)),
    }
}

/// The segments of `wal` that hold ends of transactions which the archive does not have, by name.
fn unarchived(wal: &Path, view: &View) -> Result<Vec<Unarchived>> {
    let (repository, database) = (view.fetcher().repository(), &view.description.database);
    let mut segments: BTreeMap<SegmentName, PathBuf> = BTreeMap::new();
    for name in names(wal)? {
        if let Ok(WalName::Segment(segment)) = WalName::parse(&name) {
            segments.insert(segment, wal.join(name));
        }
    }
    let known: Vec<SegmentName> = segments.keys().copied().collect();
    let mut archived = Vec::with_capacity(known.len());
    for of_timeline in known.chunk_by(|a, b| a.timeline() == b.timeline()) {
        archived.extend(repository.archive(database).stored(of_timeline)?);
    }
    let mut coverage = None;
    let mut lost = Vec::new();
    for ((name, path), objects) in segments.into_iter().zip(archived) {
        let bytes = files::read_regular(&path).map_err(|error| Error::io("read", &path, error))?;
        let content = content(&repository.keys, &bytes);
        let is_same = |key: &str| WalKey::parse(key).is_some_and(|key| key.content == content);
        if objects.iter().any(|object| is_same(&object.key)) {
            continue;
        }
        let Some(last) = last_end(database, name, &bytes)? else { continue };
        if !objects.is_empty() || !is_covered(name, last.0, &mut coverage, repository, database)? {
            lost.push(Unarchived { name, last });
        }
    }
    Ok(lost)
}

/// What the name of an archived file says of its content.
fn content(keys: &Keys, bytes: &[u8]) -> String {
    keys.file(bytes.chunks(CHUNK).map(|chunk| keys.digest(chunk).id)).to_string()
}

/// The last transaction that committed in a segment, or was prepared. A segment that was made ready
/// for later use has the content of another one, and none.
fn last_end(database: &Database, name: SegmentName, bytes: &[u8]) -> Result<Option<(Lsn, TimestampTz)>> {
    let mut last = None;
    let walked = walk(&wal_identity(database)?, name, bytes, |lsn, _, event| match event {
        Event::End { committed: true, time, .. } | Event::Prepared { time } => last = Some((lsn, time)),
        _ => {}
    });
    Ok(walked.ok().and(last))
}

/// Whether a later timeline took over the WAL at this place of this one, and the archive has that: so
/// it is after a failover.
fn is_covered(
    name: SegmentName,
    last: Lsn,
    coverage: &mut Option<Coverage>,
    repository: &Repository,
    database: &Database,
) -> Result<bool> {
    let coverage = match coverage {
        Some(coverage) => coverage,
        None => coverage.insert(Survey::new(repository, database)?.all(repository, database, None)?.coverage),
    };
    let took_over = |later: &crate::postgres::Timeline| {
        let history = coverage.history(*later);
        let left = history.contains(name.timeline()).then(|| history.end_of(name.timeline())).flatten();
        left.is_some_and(|left| last < left)
            && coverage.road(&history, last).segment(0).is_some_and(|found| found.timeline() != name.timeline())
    };
    Ok(coverage.timelines().iter().any(took_over))
}

/// The names in a directory; none where it is not there.
fn names(directory: &Path) -> Result<Vec<String>> {
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => return Ok(Vec::new()),
        Err(error) => return Err(Error::io("list", directory, error)),
    };
    let name =
        |entry: std::io::Result<fs::DirEntry>| entry.map(|entry| entry.file_name().to_string_lossy().into_owned());
    entries.map(name).collect::<std::io::Result<_>>().map_err(|error| Error::io("list", directory, error))
}
