//! Proofs before and after copying: that this server is this stanza's, and that its WAL arrives in the archive. A name proves
//! nothing: another server with the same system identifier gives the same names to other WAL.

use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use super::server::{Archiving, Server};
use super::stream::Stream;
use crate::error::{Context, Error, Result};
use crate::files;
use crate::format::manifest::{Database, Source};
use crate::interrupt;
use crate::postgres::wal::landmarks::{Place, mark_name};
use crate::postgres::wal::records::Event;
use crate::postgres::{CONTROL_FILE, ClusterState, ControlFile, SegmentName};
use crate::repo::Repository;
use crate::repo::proof::{Claims, Contradiction};
use crate::repo::wal::Archive;
use crate::user::{User, as_user};

/// How long pg_control is read again before its CRC counts as wrong.
const CONTROL_TIMEOUT: Duration = Duration::from_secs(10);

/// Reads pg_control, as the server's user, until its CRC is right, since the server may be writing it.
pub fn read_control(data_directory: &Path) -> Result<(Vec<u8>, ControlFile)> {
    let path = data_directory.join(CONTROL_FILE);
    let user = User::of_server(data_directory)?;
    let started = Instant::now();
    loop {
        let read = || files::read_regular(&path).map_err(|error| Error::io("read", &path, error));
        let bytes = as_user(user.as_ref(), read).map_err(|error| {
            error.hint(
                "backups read the data directory directly: run pgcairn on the server's machine, as its user or root, or let the server send it: --source=stream",
            )
        })?;
        match ControlFile::parse(&bytes) {
            Ok(control) => return Ok((bytes, control)),
            Err(_) if started.elapsed() < CONTROL_TIMEOUT => sleep(Duration::from_millis(20)),
            Err(error) => return Err(Error::new(format!("{} cannot be read", path.display())).source(error)),
        }
    }
}

/// What the connected server is, as it says itself.
pub fn identify(server: &mut Server) -> Result<Database> {
    let number = |server: &mut Server, column: &str, function: &str| -> Result<u64> {
        let text = server.value(&format!("SELECT {column} FROM pg_catalog.{function}()"))?;
        text.parse().context(|| format!("{column} is {text}"))
    };
    let system = |server: &mut Server, column| number(server, column, "pg_control_system");
    let init = |server: &mut Server, column| number(server, column, "pg_control_init");
    let page_size = init(server, "database_block_size")?;
    Ok(Database {
        id: 1,
        version: server.major.number(),
        system_id: server.system_id,
        catalog_version: system(server, "catalog_version_no")? as u32,
        control_version: system(server, "pg_control_version")? as u32,
        page_size: page_size as u32,
        segment_size: page_size * init(server, "blocks_per_segment")?,
        wal_page_size: init(server, "wal_block_size")? as u32,
        wal_segment_size: init(server, "bytes_per_wal_segment")?,
        checksums: init(server, "data_page_checksum_version")? != 0,
    })
}

/// Proves that the data directory of the connected server is the one that we can read.
pub fn prove_local(server: &Server) -> Result<()> {
    let (_, control) = read_control(&server.data_directory)?;
    if control.system_identifier != server.system_id {
        return Err(Error::new(format!(
            "the server's system identifier is {}, but {} belongs to {}",
            server.system_id,
            server.data_directory.display(),
            control.system_identifier
        ))
        .hint("pgcairn must run on the machine of the server it connects to, or read with --source=stream"));
    }
    works_there(server, &control)
}

/// Proves that the connected server would send its files.
pub fn prove_stream(server: &mut Server, conninfo: &str) -> Result<()> {
    Stream::connect(server, conninfo).map(drop)
}

/// A primary and its standbys share their system identifier, and often the path too: so the state in pg_control must be that
/// of this server, and postmaster.pid must name the same process.
fn works_there(server: &Server, control: &ControlFile) -> Result<()> {
    let other = |what: String| {
        Err(Error::new(format!("{} is not the data directory of this server: {what}", server.data_directory.display()))
            .hint("a standby has the system identifier of its primary; pgcairn must run on the machine of the server it connects to"))
    };
    let expected = if server.in_recovery { ClusterState::InArchiveRecovery } else { ClusterState::InProduction };
    if control.state != expected {
        let kind = if server.in_recovery { "a standby" } else { "a running primary" };
        return other(format!("its pg_control is not that of {kind}, which the server is"));
    }
    let Some(theirs) = &server.postmaster else { return Ok(()) };
    let path = server.data_directory.join("postmaster.pid");
    let user = User::of_server(&server.data_directory)?;
    let read = || files::read_regular_text(&path).map_err(|error| Error::io("read", &path, error));
    let ours = as_user(user.as_ref(), read)?;
    // the process id and when it started
    let process = |text: &str| [0, 2].map(|line| text.lines().nth(line).map(str::trim).map(str::to_owned));
    match process(&ours) == process(theirs) {
        true => Ok(()),
        false => other("another process works in it".into()),
    }
}

/// Which files a backup of this server reads.
pub fn source(server: &Server) -> Result<Source> {
    use std::os::unix::fs::MetadataExt;
    // written once, when the directory is made
    let path = server.data_directory.join("PG_VERSION");
    let version = std::fs::metadata(&path).map_err(|error| Error::io("look at", &path, error))?;
    let host = nix::unistd::gethostname().map_err(|error| Error::new("this machine has no name").source(error))?;
    Ok(Source {
        standby: server.in_recovery,
        host: host.to_string_lossy().into_owned(),
        mark: format!("{}-{}", version.ino(), version.mtime()),
    })
}

/// Proves that what the server writes arrives in the archive: writes a mark, ends its segment, waits for that, and reads the
/// mark back. Returns the segment.
pub fn prove_archiving(
    server: &mut Server,
    repository: &Repository,
    database: &Database,
    timeout: Duration,
) -> Result<SegmentName> {
    if server.archiving == Archiving::Unset {
        return Err(Error::new("archive_mode is on, but neither archive_command nor archive_library is set")
            .hint("set archive_command = 'pgcairn --repo ... --stanza ... archive-push %p'"));
    }
    let mut nonce = [0; 16];
    getrandom::fill(&mut nonce).context(|| "cannot get random bytes".into())?;
    let mark = mark_name(nonce);
    let (end, segment) = server.mark_wal(&mark)?;
    await_segments(&repository.archive(database), &[segment], timeout)?;
    match repository.archived_record(database, segment.timeline(), Place::Ends(end))? {
        Some(Event::RestorePoint { name, .. }) if name == mark => Ok(segment),
        _ => Err(not_ours(segment, format!("it lacks what the server has just written at {end}"))),
    }
}

/// Fails unless the archive holds the WAL of this very backup.
pub(super) fn prove_backup(repository: &Repository, database: &Database, claims: &Claims) -> Result<()> {
    let Some(Contradiction { segment, what }) = repository.contradiction(database, claims)? else { return Ok(()) };
    Err(match what {
        Some(what) => not_ours(segment, format!("it {what}")),
        None => Error::new(format!("WAL segment {segment} is not in the archive any more")),
    })
}

pub(super) fn not_ours(segment: SegmentName, why: String) -> Error {
    Error::new(format!("the archive holds other WAL as {segment}: {why}")).hint(
        "another server with this system identifier archives into the stanza, or archived before this machine went back to a \
         snapshot; the server's log says whether archive_command fails. Give a copy a stanza of its own",
    )
}

/// Waits until the server was told of all segments from `first` to `last` that they are archived, as `pg_backup_stop` does: the
/// archive may have other WAL as one of them, though it has the later ones.
pub fn await_told(server: &mut Server, first: SegmentName, last: SegmentName, timeout: Duration) -> Result<()> {
    let started = Instant::now();
    let mut pause = Duration::from_millis(20);
    while let Some(segment) = server.unarchived(first, last)? {
        if started.elapsed() > timeout {
            return Err(Error::new(format!(
                "the server has not archived WAL segment {segment}, though the archive has later ones"
            ))
            .hint("archive_command fails for it; the server's log says why"));
        }
        sleep(pause);
        pause = (pause * 2).min(Duration::from_secs(1));
    }
    Ok(())
}

/// Waits until all of these segments, given in ascending order, are in the archive.
pub fn await_segments(archive: &Archive<'_>, segments: &[SegmentName], timeout: Duration) -> Result<()> {
    let started = Instant::now();
    let mut pause = Duration::from_millis(20);
    loop {
        interrupt::check()?;
        let found = archive.segments(segments)?;
        let Some(missing) = found.iter().position(Option::is_none) else { return Ok(()) };
        if started.elapsed() > timeout {
            let (segment, waited) = (segments[missing], timeout.as_secs());
            return Err(Error::new(format!("WAL segment {segment} did not reach the archive within {waited} s"))
                .hint("see the server's log for what archive_command says; --archive-timeout waits longer"));
        }
        sleep(pause);
        pause = (pause * 2).min(Duration::from_secs(1));
    }
}
