//! The text of PostgreSQL's own `backup_manifest`, piece by piece, as `pg_verifybackup` reads it.
//!
//! A whole manifest is [`header`], a [`ManifestFile::line`] for each file, [`wal_ranges`], then [`closing`]
//! with the SHA-256 of everything before it.

use std::fmt::Write;

use jiff::Timestamp;
use jiff::tz::TimeZone;

use super::lsn::{Lsn, Timeline};
use super::version::Major;

/// A file of the backup.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ManifestFile<'a> {
    /// relative to PGDATA, tablespaces under `pg_tblspc/<oid>/`; need not be UTF-8
    pub path: &'a [u8],
    /// its size, in bytes
    pub size: u64,
    /// its last change, in seconds since 1970
    pub modified_s: i64,
    /// the CRC32C of its contents
    pub crc32c: u32,
}

/// WAL that must be replayed on one timeline.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WalRange {
    /// the timeline
    pub timeline: Timeline,
    /// where replay starts
    pub start: Lsn,
    /// where it may stop
    pub end: Lsn,
}

/// The beginning, up to the first file. Since PostgreSQL 17 it names the cluster.
pub fn header(major: Major, system_identifier: u64) -> String {
    if major.number() < 17 {
        return "{ \"PostgreSQL-Backup-Manifest-Version\": 1,\n\"Files\": [".to_owned();
    }
    format!("{{ \"PostgreSQL-Backup-Manifest-Version\": 2,\n\"System-Identifier\": {system_identifier},\n\"Files\": [")
}

impl ManifestFile<'_> {
    /// The file's line, after whatever separates it from the one before.
    pub fn line(&self, is_first: bool) -> String {
        let mut line = String::with_capacity(self.path.len() + 160);
        line.push_str(if is_first { "\n" } else { ",\n" });
        match std::str::from_utf8(self.path) {
            Ok(path) => {
                line.push_str("{ \"Path\": ");
                push_json_string(&mut line, path);
            }
            Err(_) => {
                line.push_str("{ \"Encoded-Path\": \"");
                push_hex(&mut line, self.path);
                line.push('"');
            }
        }
        line.push_str(&format!(", \"Size\": {}, \"Last-Modified\": \"{}\"", self.size, gmt(self.modified_s)));
        line.push_str(", \"Checksum-Algorithm\": \"CRC32C\", \"Checksum\": \"");
        // the server prints its 32-bit variable as it lies in memory
        push_hex(&mut line, &self.crc32c.to_le_bytes());
        line.push_str("\" }");
        line
    }
}

/// The end of the list of files and the WAL that the backup needs, newest timeline first.
pub fn wal_ranges(ranges: &[WalRange]) -> String {
    let lines: Vec<String> = ranges
        .iter()
        .map(|WalRange { timeline, start, end }| {
            format!("{{ \"Timeline\": {timeline}, \"Start-LSN\": \"{start}\", \"End-LSN\": \"{end}\" }}")
        })
        .collect();
    format!("\n],\n\"WAL-Ranges\": [\n{}\n],\n", lines.join(",\n"))
}

/// The last line, given the SHA-256 of everything before it.
pub fn closing(sha256: &[u8; 32]) -> String {
    let mut line = "\"Manifest-Checksum\": \"".to_owned();
    push_hex(&mut line, sha256);
    line.push_str("\"}\n");
    line
}

/// `2024-01-07 12:00:00 GMT`; times no calendar has are shown as the nearest one it has.
fn gmt(time_s: i64) -> String {
    let nearest = if time_s < 0 { Timestamp::MIN } else { Timestamp::MAX };
    let time = TimeZone::UTC.to_datetime(Timestamp::from_second(time_s).unwrap_or(nearest));
    let (date, clock) = (time.date(), time.time());
    let day = format!("{:04}-{:02}-{:02}", date.year(), date.month(), date.day());
    format!("{day} {:02}:{:02}:{:02} GMT", clock.hour(), clock.minute(), clock.second())
}

/// As PostgreSQL's `escape_json` does: only what JSON demands is escaped.
fn push_json_string(line: &mut String, text: &str) {
    line.push('"');
    for c in text.chars() {
        match c {
            '"' => line.push_str("\\\""),
            '\\' => line.push_str("\\\\"),
            '\u{8}' => line.push_str("\\b"),
            '\u{c}' => line.push_str("\\f"),
            '\n' => line.push_str("\\n"),
            '\r' => line.push_str("\\r"),
            '\t' => line.push_str("\\t"),
            c if c < ' ' => line.push_str(&format!("\\u{:04x}", u32::from(c))),
            c => line.push(c),
        }
    }
    line.push('"');
}

fn push_hex(line: &mut String, bytes: &[u8]) {
    for byte in bytes {
        // writing to a String cannot fail
        let _ = write!(line, "{byte:02x}");
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    fn major(number: u32) -> Major {
        Major::new(number).unwrap()
    }

    #[test]
    fn a_small_manifest_reads_like_one_of_pg_basebackup() {
        // lines of manifests of 15 and 17, made with --manifest-checksums=CRC32C
        let files = [
            ManifestFile { path: b"empty", size: 0, modified_s: 1_795_377_427, crc32c: 0 },
            ManifestFile {
                path: b"q\"b\\t\tn\nc\x01\x7f\xc3\xa9",
                size: 9,
                modified_s: 1_795_377_427,
                crc32c: crc32c::crc32c(b"123456789"),
            },
            ManifestFile { path: b"bad\xff name", size: 1, modified_s: 1_795_377_427, crc32c: crc32c::crc32c(b"x") },
        ];
        let mut text = header(major(15), 1);
        for (index, file) in files.iter().enumerate() {
            text.push_str(&file.line(index == 0));
        }
        text.push_str(&wal_ranges(&[WalRange { timeline: Timeline(1), start: Lsn(0x400_0028), end: Lsn(0x400_0100) }]));
        let expected = "{ \"PostgreSQL-Backup-Manifest-Version\": 1,\n\"Files\": [\n\
            { \"Path\": \"empty\", \"Size\": 0, \"Last-Modified\": \"2026-11-22 19:57:07 GMT\", \
            \"Checksum-Algorithm\": \"CRC32C\", \"Checksum\": \"00000000\" },\n\
            { \"Path\": \"q\\\"b\\\\t\\tn\\nc\\u0001\u{7f}é\", \"Size\": 9, \"Last-Modified\": \"2026-11-22 19:57:07 GMT\", \
            \"Checksum-Algorithm\": \"CRC32C\", \"Checksum\": \"839206e3\" },\n\
            { \"Encoded-Path\": \"626164ff206e616d65\", \"Size\": 1, \"Last-Modified\": \"2026-11-22 19:57:07 GMT\", \
            \"Checksum-Algorithm\": \"CRC32C\", \"Checksum\": \"935f3ca9\" }\n],\n\"WAL-Ranges\": [\n\
            { \"Timeline\": 1, \"Start-LSN\": \"0/4000028\", \"End-LSN\": \"0/4000100\" }\n],\n";
        assert_eq!(text, expected);
        let of_17 = "{ \"PostgreSQL-Backup-Manifest-Version\": 2,\n\
            \"System-Identifier\": 7711086955514644809,\n\"Files\": [";
        assert_eq!(header(major(17), 7711086955514644809), of_17);
        assert_eq!(closing(&[0xA5; 32]), format!("\"Manifest-Checksum\": \"{}\"}}\n", "a5".repeat(32)));
    }

    #[test]
    fn several_timelines_are_separated() {
        let range = |id| WalRange { timeline: Timeline(id), start: Lsn(1), end: Lsn(2) };
        let text = wal_ranges(&[range(2), range(1)]);
        let line = |id| format!("{{ \"Timeline\": {id}, \"Start-LSN\": \"0/1\", \"End-LSN\": \"0/2\" }}");
        assert_eq!(text, format!("\n],\n\"WAL-Ranges\": [\n{},\n{}\n],\n", line(2), line(1)));
    }

    proptest! {
        #[test]
        fn every_manifest_is_json(path: Vec<u8>, size: u64, modified_s: i64, crc32c: u32) {
            let file = ManifestFile { path: &path, size, modified_s, crc32c };
            let lines = file.line(true) + &file.line(false);
            let text = header(major(18), u64::MAX) + &lines + &wal_ranges(&[]) + &closing(&[0; 32]);
            let json: serde_json::Value = serde_json::from_str(&text).unwrap();
            let name = &json["Files"][1]["Path"];
            prop_assert!(name.is_null() || name.as_str().unwrap().as_bytes() == path);
            prop_assert_eq!(json["Files"][0]["Size"].as_u64(), Some(size));
        }
    }
}
