//! The two files that the end of a backup returns: `backup_label` and `tablespace_map`.

use super::lsn::{Lsn, Timeline};
use super::version::Major;
use super::wal::SegmentName;

/// Where a backup was taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BackupSource {
    /// on a primary, which PostgreSQL 13 calls master
    Primary,
    /// on a standby
    Standby,
}

/// What `backup_label` says. The file itself is kept byte for byte; this is to check and to show it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackupLabel {
    /// where replay starts
    pub start: Lsn,
    /// the segment that holds the start; of the timeline the backup started on
    pub start_segment: SegmentName,
    /// the checkpoint the backup began with
    pub checkpoint: Lsn,
    /// how it was taken: `streamed` for every backup of the supported majors
    pub method: String,
    /// where it was taken
    pub source: BackupSource,
    /// when, as text in the server's time zone
    pub start_time: String,
    /// the name given to it, not this system's label
    pub label: String,
    /// the timeline it started on
    pub start_timeline: Timeline,
    /// set in an incremental backup of PostgreSQL 17 and later: a server refuses to start from it
    pub incremental_from: Option<(Lsn, Timeline)>,
}

/// A `backup_label` that cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BackupLabelError {
    /// a line is missing
    #[error("backup_label has no line \"{key}\"")]
    Missing {
        /// what the line begins with
        key: &'static str,
    },
    /// a line is there twice
    #[error("backup_label has two lines \"{key}\"")]
    Twice {
        /// what the lines begin with
        key: &'static str,
    },
    /// a line has a value that cannot be
    #[error("backup_label has \"{value}\" as \"{key}\"")]
    Value {
        /// what the line begins with
        key: &'static str,
        /// what follows
        value: String,
    },
}

impl BackupLabel {
    /// Reads the file. Lines that are not known are skipped.
    pub fn parse(contents: &[u8]) -> Result<Self, BackupLabelError> {
        let text = String::from_utf8_lossy(contents);
        let lines = Lines(&text);
        let key = "START WAL LOCATION";
        let location = lines.required(key)?;
        let (start, start_segment) = start_location(location).ok_or_else(|| bad(key, location))?;
        let key = "BACKUP FROM";
        let source = match lines.required(key)? {
            "primary" | "master" => BackupSource::Primary,
            "standby" => BackupSource::Standby,
            other => return Err(bad(key, other)),
        };
        let from_lsn = lines.parsed("INCREMENTAL FROM LSN")?;
        let from_timeline = lines.parsed("INCREMENTAL FROM TLI")?;
        Ok(Self {
            start,
            start_segment,
            checkpoint: lines.required_parsed("CHECKPOINT LOCATION")?,
            method: lines.required("BACKUP METHOD")?.to_owned(),
            source,
            start_time: lines.required("START TIME")?.to_owned(),
            label: lines.required("LABEL")?.to_owned(),
            start_timeline: lines.required_parsed("START TIMELINE")?,
            incremental_from: match (from_lsn, from_timeline) {
                (None, None) => None,
                (Some(lsn), Some(timeline)) => Some((lsn, timeline)),
                (None, _) => return Err(BackupLabelError::Missing { key: "INCREMENTAL FROM LSN" }),
                (_, None) => return Err(BackupLabelError::Missing { key: "INCREMENTAL FROM TLI" }),
            },
        })
    }
}

fn bad(key: &'static str, value: &str) -> BackupLabelError {
    BackupLabelError::Value { key, value: value.chars().take(100).collect() }
}

/// `0/2000028 (file 000000010000000000000002)`
fn start_location(value: &str) -> Option<(Lsn, SegmentName)> {
    let (lsn, file) = value.split_once(" (file ")?;
    Some((lsn.parse().ok()?, file.strip_suffix(')')?.parse().ok()?))
}

/// The lines `KEY: value` of a text.
struct Lines<'a>(&'a str);

impl<'a> Lines<'a> {
    /// A label with a line break in it could forge a line, so none may be there twice.
    fn optional(&self, key: &'static str) -> Result<Option<&'a str>, BackupLabelError> {
        let mut values = self.0.lines().filter_map(|line| line.strip_prefix(key)?.strip_prefix(": "));
        match (values.next(), values.next()) {
            (value, None) => Ok(value),
            _ => Err(BackupLabelError::Twice { key }),
        }
    }

    fn required(&self, key: &'static str) -> Result<&'a str, BackupLabelError> {
        self.optional(key)?.ok_or(BackupLabelError::Missing { key })
    }

    fn parsed<T: std::str::FromStr>(&self, key: &'static str) -> Result<Option<T>, BackupLabelError> {
        self.optional(key)?.map(|value| value.parse().map_err(|_| bad(key, value))).transpose()
    }

    fn required_parsed<T: std::str::FromStr>(&self, key: &'static str) -> Result<T, BackupLabelError> {
        self.parsed(key)?.ok_or(BackupLabelError::Missing { key })
    }
}

/// One line of `tablespace_map`: a link that recovery makes in `pg_tblspc`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TablespaceLink {
    /// the tablespace's oid, the link's name
    pub oid: u32,
    /// where it leads; need not be UTF-8
    pub path: Vec<u8>,
}

/// A `tablespace_map` that cannot be read or written.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TablespaceMapError {
    /// a line that is no oid and a path
    #[error("entry {entry} of tablespace_map reads \"{text}\", not an oid and a path")]
    Entry {
        /// the entry, from 1
        entry: usize,
        /// its first bytes
        text: String,
    },
    /// the last line is cut
    #[error("tablespace_map ends within entry {entry}")]
    Cut {
        /// the entry, from 1
        entry: usize,
    },
    /// PostgreSQL 13 has no way to say it
    #[error("tablespace {oid} cannot be at \"{path}\": PostgreSQL 13 misreads a path that ends in a backslash")]
    EndsInBackslash {
        /// the tablespace
        oid: u32,
        /// the path
        path: String,
    },
}

/// Reads `tablespace_map`, whose escapes depend on the major: a backslash makes the next byte part of the path,
/// but in PostgreSQL 13 only a line break's; there any other backslash stands for itself.
pub fn parse_tablespace_map(contents: &[u8], major: Major) -> Result<Vec<TablespaceLink>, TablespaceMapError> {
    let mut links = Vec::new();
    let mut line = Vec::new();
    let mut bytes = contents.iter().copied().peekable();
    while let Some(byte) = bytes.next() {
        match byte {
            b'\n' | b'\r' if line.is_empty() => {}
            b'\n' | b'\r' => {
                links.push(link(&line, links.len() + 1)?);
                line.clear();
            }
            b'\\' if bytes.peek().is_some_and(|&next| escapes(major, next)) => line.extend(bytes.next()),
            _ => line.push(byte),
        }
    }
    if line.is_empty() { Ok(links) } else { Err(TablespaceMapError::Cut { entry: links.len() + 1 }) }
}

/// Whether a backslash before this byte is an escape.
fn escapes(major: Major, next: u8) -> bool {
    major > Major::FIRST || matches!(next, b'\n' | b'\r')
}

fn link(line: &[u8], entry: usize) -> Result<TablespaceLink, TablespaceMapError> {
    let bad = || {
        let text = String::from_utf8_lossy(&line[..line.len().min(100)]).into_owned();
        TablespaceMapError::Entry { entry, text }
    };
    let space = line.iter().position(|&byte| byte == b' ').ok_or_else(bad)?;
    let (oid, path) = (&line[..space], &line[space + 1..]);
    let digits = std::str::from_utf8(oid).ok().filter(|text| text.bytes().all(|b| b.is_ascii_digit()));
    match digits.and_then(|text| text.parse().ok()) {
        Some(oid) if oid > 0 && !path.is_empty() => Ok(TablespaceLink { oid, path: path.to_vec() }),
        _ => Err(bad()),
    }
}

/// Writes `tablespace_map` as a server of this major reads it.
pub fn write_tablespace_map(links: &[TablespaceLink], major: Major) -> Result<Vec<u8>, TablespaceMapError> {
    let mut contents = Vec::new();
    for TablespaceLink { oid, path } in links {
        if major == Major::FIRST && path.ends_with(b"\\") {
            let path = String::from_utf8_lossy(path).into_owned();
            return Err(TablespaceMapError::EndsInBackslash { oid: *oid, path });
        }
        contents.extend_from_slice(format!("{oid} ").as_bytes());
        for &byte in path {
            let escaped = matches!(byte, b'\n' | b'\r') || (byte == b'\\' && major > Major::FIRST);
            contents.extend(escaped.then_some(b'\\'));
            contents.push(byte);
        }
        contents.push(b'\n');
    }
    Ok(contents)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    /// From PostgreSQL 15.
    const PRIMARY: &str = "START WAL LOCATION: 0/2000028 (file 000000010000000000000002)\n\
        CHECKPOINT LOCATION: 0/2000060\nBACKUP METHOD: streamed\nBACKUP FROM: primary\n\
        START TIME: 2026-11-22 19:56:36 UTC\nLABEL: la\"bel\nSTART TIMELINE: 1\n";

    fn major(number: u32) -> Major {
        Major::new(number).unwrap()
    }

    #[test]
    fn reads_the_label_of_a_primary_and_of_a_standby() {
        let label = BackupLabel::parse(PRIMARY.as_bytes()).unwrap();
        let expected = BackupLabel {
            start: Lsn(0x200_0028),
            start_segment: "000000010000000000000002".parse().unwrap(),
            checkpoint: Lsn(0x200_0060),
            method: "streamed".to_owned(),
            source: BackupSource::Primary,
            start_time: "2026-11-22 19:56:36 UTC".to_owned(),
            label: "la\"bel".to_owned(),
            start_timeline: Timeline(1),
            incremental_from: None,
        };
        assert_eq!(label, expected);
        let of_13 = BackupLabel::parse(PRIMARY.replace("primary", "master").as_bytes()).unwrap();
        assert_eq!(of_13.source, BackupSource::Primary);
        let standby = BackupLabel::parse(PRIMARY.replace("primary", "standby").as_bytes()).unwrap();
        assert_eq!(standby.source, BackupSource::Standby);
    }

    #[test]
    fn reads_where_an_incremental_backup_starts_from() {
        let text = format!("{PRIMARY}INCREMENTAL FROM LSN: 0/1000028\nINCREMENTAL FROM TLI: 1\n");
        let label = BackupLabel::parse(text.as_bytes()).unwrap();
        assert_eq!(label.incremental_from, Some((Lsn(0x100_0028), Timeline(1))));
        let cut = text.replace("INCREMENTAL FROM TLI: 1\n", "");
        let missing = BackupLabelError::Missing { key: "INCREMENTAL FROM TLI" };
        assert_eq!(BackupLabel::parse(cut.as_bytes()), Err(missing));
    }

    #[test]
    fn says_which_line_is_wrong() {
        let refused = |text: String| BackupLabel::parse(text.as_bytes()).unwrap_err().to_string();
        assert_eq!(refused(String::new()), "backup_label has no line \"START WAL LOCATION\"");
        assert_eq!(
            refused(PRIMARY.replace("0/2000028", "2000028")),
            "backup_label has \"2000028 (file 000000010000000000000002)\" as \"START WAL LOCATION\""
        );
        assert_eq!(refused(PRIMARY.replace("primary", "moon")), "backup_label has \"moon\" as \"BACKUP FROM\"");
        assert_eq!(
            refused(PRIMARY.replace("LABEL: ", "LABEL: x\nSTART TIMELINE: 9\n")),
            "backup_label has two lines \"START TIMELINE\""
        );
    }

    #[test]
    fn reads_and_writes_the_maps_of_real_servers() {
        // tablespaces at /tmp/odd15back\sl, /tmp/odd15new<line break>line and /tmp/ts
        let of_15 = b"16399 /tmp/odd15back\\\\sl\n16400 /tmp/odd15new\\\nline\n16384 /tmp/ts\n";
        let of_13 = b"16399 /tmp/odd15back\\sl\n16400 /tmp/odd15new\\\nline\n16384 /tmp/ts\n";
        let links = parse_tablespace_map(of_15, major(15)).unwrap();
        let paths: Vec<_> = links.iter().map(|link| String::from_utf8_lossy(&link.path).into_owned()).collect();
        assert_eq!(paths, ["/tmp/odd15back\\sl", "/tmp/odd15new\nline", "/tmp/ts"]);
        assert_eq!(parse_tablespace_map(of_13, major(13)).unwrap(), links);
        assert_eq!(write_tablespace_map(&links, major(15)).unwrap(), of_15);
        assert_eq!(write_tablespace_map(&links, major(13)).unwrap(), of_13);
        assert_eq!(parse_tablespace_map(b"", major(15)), Ok(Vec::new()));
    }

    #[test]
    fn refuses_what_is_no_map() {
        let refused = |map: &[u8]| parse_tablespace_map(map, major(15)).unwrap_err().to_string();
        assert_eq!(refused(b"1 /a\nx /b\n"), "entry 2 of tablespace_map reads \"x /b\", not an oid and a path");
        assert_eq!(refused(b"1\n"), "entry 1 of tablespace_map reads \"1\", not an oid and a path");
        assert_eq!(refused(b"0 /a\n"), "entry 1 of tablespace_map reads \"0 /a\", not an oid and a path");
        assert_eq!(refused(b"1 /a\n2 /b"), "tablespace_map ends within entry 2");
        let odd = [TablespaceLink { oid: 1, path: b"/a\\".to_vec() }];
        assert_eq!(
            write_tablespace_map(&odd, major(13)).unwrap_err().to_string(),
            "tablespace 1 cannot be at \"/a\\\": PostgreSQL 13 misreads a path that ends in a backslash"
        );
    }

    fn any_links() -> impl Strategy<Value = Vec<TablespaceLink>> {
        let path = prop::collection::vec(prop_oneof![Just(b'\\'), Just(b'\n'), Just(b'\r'), 1u8..], 1..12);
        prop::collection::vec((1u32.., path).prop_map(|(oid, path)| TablespaceLink { oid, path }), 0..4)
    }

    proptest! {
        #[test]
        fn a_written_map_reads_the_same(links in any_links(), number in 13u32..=18) {
            if let Ok(contents) = write_tablespace_map(&links, major(number)) {
                // in 13 a backslash before a line break is lost on its own server, too
                let lossy = number == 13 && links.iter().any(|link| link.path.contains(&b'\\'));
                let read = parse_tablespace_map(&contents, major(number));
                prop_assert!(lossy || read == Ok(links));
            }
        }

        #[test]
        fn any_bytes_are_answered(contents: Vec<u8>, number in 13u32..=18) {
            let _ = BackupLabel::parse(&contents);
            let _ = parse_tablespace_map(&contents, major(number));
        }
    }
}
