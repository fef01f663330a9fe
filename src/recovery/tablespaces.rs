//! Tablespaces that WAL creates. Replay makes each at the path that it has on the source, whoever uses that path now.

use std::ffi::OsString;
use std::fs;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::files;
use crate::postgres::wal::header::LONG_PAGE_HEADER_BYTES;
use crate::postgres::wal::records::{CutRecord, Event, Stop, TABLESPACE_BYTES, may_create_tablespace, walk};
use crate::postgres::{CONTROL_FILE, ControlFile, Lsn, Major, SegmentName, Timeline, WalIdentity};

/// Bytes of WAL that are looked at together; whole pages.
const READ_BYTES: usize = 1 << 20;
/// A segment's first header, and as much as a record's header may go on behind it.
const FIRST_WORDS: usize = LONG_PAGE_HEADER_BYTES + 16;

/// A tablespace as the source made it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Created {
    /// its oid
    pub oid: u32,
    /// the directory that it was given on the source
    pub path: PathBuf,
}

impl Created {
    /// Whether the data directory leads to this tablespace already, so that its directory is the data directory's own.
    pub fn is_of(&self, data: &Path) -> bool {
        fs::read_link(data.join("pg_tblspc").join(self.oid.to_string())).is_ok_and(|target| target == self.path)
    }

    /// Whether a server of this version has its files there; never where it lies inside the data directory.
    pub fn is_used(&self, major: Major) -> bool {
        self.path.is_absolute() && self.path.join(major.tablespace_directory().to_string()).exists()
    }

    /// Whether a server of this version that is not the data directory's has its files there.
    pub fn is_used_by_another(&self, data: &Path, major: Major) -> bool {
        self.is_used(major) && !self.is_of(data)
    }

    /// Why a copy of a cluster does not replay its creation.
    pub fn refusal(&self) -> Error {
        Error::new(format!(
            "the WAL creates tablespace {} in {}, where another server has its files: the copy would write to them",
            self.oid,
            self.path.display()
        ))
        .hint(
            "\"pgcairn start\" or \"pgcairn mount --recovered\" can go past it; a copy can on another machine, or up to a \
             point before this segment of WAL",
        )
    }
}

/// Returns the tablespaces whose creation a server replays in `data` once it has this file of WAL: each record that ends in the
/// file. A record that began in the segment before is read together with that one, which recovery keeps in `pg_wal`.
pub fn created_by_delivered(data: &Path, name: SegmentName, file: &Path) -> Result<(Vec<Created>, Major)> {
    let failed = |path: &Path| Error::new(format!("{} cannot be read", path.display()));
    let version = files::read_regular_text(&data.join("PG_VERSION")).unwrap_or_default();
    let major = version.trim().parse().ok().and_then(|major| Major::new(major).ok());
    let major = major.ok_or_else(|| failed(&data.join("PG_VERSION")).hint("the command runs in a data directory"))?;
    let path = data.join(CONTROL_FILE);
    let control = files::read_regular(&path).map_err(|error| Error::io("read", &path, error))?;
    let control = ControlFile::parse(&control).map_err(|error| failed(&path).source(error))?;
    let identity = WalIdentity {
        major,
        system_identifier: control.system_identifier,
        segment_size: control.wal_segment_size,
        page_bytes: control.wal_page_bytes,
    };
    Ok((created_by_next(&data.join("pg_wal"), name, file, &identity)?, major))
}

/// A segment of WAL, wherever it is kept.
pub struct Segment<'a> {
    /// its name
    pub name: SegmentName,
    /// fills a buffer from an offset; short only at the end
    pub read_at: &'a dyn Fn(u64, &mut [u8]) -> Result<usize>,
}

/// Calls `work` with the segment that a file holds.
fn with_file<T>(name: SegmentName, path: &Path, work: impl FnOnce(&Segment<'_>) -> Result<T>) -> Result<T> {
    let file = files::open_regular(path).map_err(|error| Error::io("open", path, error))?;
    let read_at = |offset: u64, buf: &mut [u8]| {
        files::read_full(&file, offset, buf).map_err(|error| Error::io("read", path, error))
    };
    work(&Segment { name, read_at: &read_at })
}

/// The names under which the segment before may lie, the nearest first: an earlier timeline can end in it.
pub fn names_before(name: SegmentName, identity: &WalIdentity) -> impl Iterator<Item = SegmentName> {
    let size = identity.segment_size;
    let number = name.number(size).and_then(|number| number.checked_sub(1));
    let names = move |number| {
        (1..=name.timeline().0).rev().map(move |timeline| SegmentName::of_number(Timeline(timeline), number, size))
    };
    number.into_iter().flat_map(names)
}

/// Returns those of a segment that is replayed after the ones in `pg_wal`.
fn created_by_next(pg_wal: &Path, name: SegmentName, file: &Path, identity: &WalIdentity) -> Result<Vec<Created>> {
    let before = names_before(name, identity).find(|before| pg_wal.join(before.to_string()).exists());
    with_file(name, file, |segment| match before {
        None => created_by_segment(segment, None, Lsn(0), identity),
        Some(before) => with_file(before, &pg_wal.join(before.to_string()), |before| {
            created_by_segment(segment, Some(before), Lsn(0), identity)
        }),
    })
}

/// Returns the tablespaces whose creation ends in a segment that is replayed after another. Replay begins at `start`.
pub fn created_by_segment(
    segment: &Segment<'_>,
    before: Option<&Segment<'_>>,
    start: Lsn,
    identity: &WalIdentity,
) -> Result<Vec<Created>> {
    let mut found = Vec::new();
    let before = cut_before(before, segment, identity)?;
    if before.is_some() || may_create(segment, identity)? {
        created_by(segment, identity, before, &mut found)?;
    }
    Ok(found.into_iter().filter(|(lsn, _)| *lsn >= start).map(|(_, created)| created).collect())
}

/// Returns the record that creates a tablespace, or may, and goes on in this segment. There is none without the segment before
/// it: replay begins in this one, after the rest of a record.
fn cut_before(
    before: Option<&Segment<'_>>,
    segment: &Segment<'_>,
    identity: &WalIdentity,
) -> Result<Option<CutRecord>> {
    let words = first_words(segment)?;
    let rest = u32::from_le_bytes([words[16], words[17], words[18], words[19]]);
    let Some(before) = before.filter(|_| (1..*TABLESPACE_BYTES.end()).contains(&rest)) else { return Ok(None) };
    // the record's header lies in the segment before, or ends in the first words of this one
    match may_create_tablespace(&words, FIRST_WORDS) || may_create(before, identity)? {
        true => created_by(before, identity, None, &mut Vec::new()),
        false => Ok(None),
    }
}

/// The bytes in which a record's header ends that began in the segment before.
fn first_words(segment: &Segment<'_>) -> Result<[u8; FIRST_WORDS]> {
    let mut bytes = [0; FIRST_WORDS];
    match (segment.read_at)(0, &mut bytes)? {
        FIRST_WORDS => Ok(bytes),
        read => Err(Error::new(format!("WAL {} has {read} bytes", segment.name))),
    }
}

/// Those that the segments in a directory create, in their order. What is not WAL of this cluster creates none.
pub fn created_in(pg_wal: &Path, identity: &WalIdentity) -> Result<Vec<Created>> {
    let failed = |error| Error::io("list", pg_wal, error);
    let mut names: Vec<SegmentName> = Vec::new();
    for entry in fs::read_dir(pg_wal).map_err(failed)? {
        let name = entry.map_err(failed)?.file_name();
        names.extend(name.to_str().and_then(|name| name.parse::<SegmentName>().ok()));
    }
    names.sort_unstable();
    let path = |name: &SegmentName| pg_wal.join(name.to_string());
    let may = |name: &SegmentName| with_file(*name, &path(name), |segment| may_create(segment, identity));
    let may = names.iter().map(may).collect::<Result<Vec<bool>>>()?;
    let mut found = Vec::new();
    let mut before = None;
    for (number, name) in names.iter().enumerate() {
        // the header that tells of one may lie in the next segment
        let looked_at = may[number] || may.get(number + 1) == Some(&true);
        before = match looked_at || before.is_some() {
            true => with_file(*name, &path(name), |segment| created_by(segment, identity, before.take(), &mut found))?,
            false => None,
        };
    }
    Ok(found.into_iter().map(|(_, created)| created).collect())
}

/// Adds those of one segment to `found`, with the one whose record the segment before cut. Returns a record that goes on in the
/// next segment, if it may create one.
fn created_by(
    segment: &Segment<'_>,
    identity: &WalIdentity,
    before: Option<CutRecord>,
    found: &mut Vec<(Lsn, Created)>,
) -> Result<Option<CutRecord>> {
    let mut bytes = vec![0; identity.segment_size.bytes() as usize];
    let read = (segment.read_at)(0, &mut bytes)?;
    bytes.truncate(read);
    let mut here = Vec::new();
    let Ok(walked) = walk(identity, segment.name, &bytes, |lsn, _, event| here.push((lsn, event))) else {
        return Ok(None);
    };
    let joined = before.and_then(|before| Some((before.lsn, before.joined(&walked.rest, identity.major)?)));
    for (lsn, event) in joined.into_iter().chain(here) {
        if let Event::Tablespace { oid, path } = event {
            found.push((lsn, Created { oid, path: PathBuf::from(OsString::from_vec(path)) }));
        }
    }
    Ok(match walked.stop {
        Stop::Cut(cut) if cut.may_create_tablespace() => Some(cut),
        _ => None,
    })
}

fn may_create(segment: &Segment<'_>, identity: &WalIdentity) -> Result<bool> {
    let mut bytes = vec![0; READ_BYTES];
    let mut at = 0;
    loop {
        let read = (segment.read_at)(at, &mut bytes)?;
        if read == 0 {
            return Ok(false);
        }
        if may_create_tablespace(&bytes[..read], identity.page_bytes as usize) {
            return Ok(true);
        }
        at += read as u64;
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::postgres::wal::records::tests::{Writer, create_tablespace, identity, name, record};

    /// What is found in segment 1, then in segment 2 with segment 1 in `pg_wal`.
    fn found_in(wal: &Writer) -> [Vec<Created>; 2] {
        let place = tempfile::tempdir().unwrap();
        let segments = wal.segments();
        let look = |number: u64, bytes: &[u8]| {
            let file = place.path().join("RECOVERYXLOG");
            fs::write(&file, bytes).unwrap();
            let found = created_by_next(place.path(), name(number), &file, &identity()).unwrap();
            fs::rename(file, place.path().join(name(number).to_string())).unwrap();
            found
        };
        [look(1, &segments[0]), segments.get(1).map_or_else(Vec::new, |bytes| look(2, bytes))]
    }

    #[test]
    fn a_tablespace_is_found_with_the_segment_in_which_its_record_ends() {
        let expected = vec![Created { oid: 16_384, path: "/srv/fast".into() }];
        for left in (8..120).step_by(8) {
            let mut wal = Writer::new(1);
            wal.fill(left);
            create_tablespace(&mut wal, 16_384, "/srv/fast");
            let [first, second] = found_in(&wal);
            let is_whole = wal.segments().len() == 1;
            assert_eq!((first, second), if is_whole { (expected.clone(), vec![]) } else { (vec![], expected.clone()) });
        }
    }

    #[test]
    fn what_begins_before_replay_is_not_replayed() {
        let mut wal = Writer::new(1);
        create_tablespace(&mut wal, 16_384, "/srv/before");
        let start = wal.end();
        create_tablespace(&mut wal, 16_385, "/srv/fast");
        let bytes = wal.segments().remove(0);
        let place = tempfile::tempdir().unwrap();
        let file = place.path().join(name(1).to_string());
        fs::write(&file, bytes).unwrap();
        let found = |start| {
            let look = |segment: &Segment<'_>| created_by_segment(segment, None, start, &identity());
            with_file(name(1), &file, look).unwrap().iter().map(|created| created.oid).collect::<Vec<_>>()
        };
        assert_eq!((found(Lsn(0)), found(start)), (vec![16_384, 16_385], vec![16_385]));
    }

    #[test]
    fn a_record_that_an_earlier_timeline_began_is_found() {
        let mut wal = Writer::new(1);
        wal.fill(32);
        create_tablespace(&mut wal, 16_384, "/srv/fast");
        let segments = wal.segments();
        let place = tempfile::tempdir().unwrap();
        fs::write(place.path().join(name(1).to_string()), &segments[0]).unwrap();
        let file = place.path().join("RECOVERYXLOG");
        fs::write(&file, &segments[1]).unwrap();
        let next = SegmentName::of_number(Timeline(2), 2, identity().segment_size);
        let found = created_by_next(place.path(), next, &file, &identity()).unwrap();
        assert_eq!(found, [Created { oid: 16_384, path: "/srv/fast".into() }]);
    }

    #[test]
    fn a_record_of_another_kind_across_the_end_of_a_segment_creates_none() {
        // words that look like the end of the header of such a record, wherever the segment ends
        let data: Vec<u8> = 0x0500u64.to_le_bytes().repeat(60);
        for left in (8..200).step_by(8) {
            let mut wal = Writer::new(1);
            wal.fill(left);
            record(&mut wal, 10, &data);
            assert_eq!(wal.segments().len(), 2);
            assert_eq!(found_in(&wal), [vec![], vec![]], "{left} bytes left");
        }
    }
}
