//! `backup_manifest` as PostgreSQL writes it, so that `pg_verifybackup` can judge a view or a copy.

use std::io::{self, Write};

use sha2::{Digest, Sha256};

use super::view::View;
use crate::postgres::manifest::{ManifestFile, WalRange, closing, header, wal_ranges};
use crate::postgres::{Lsn, Major, Timeline};

/// What it does not list, as PostgreSQL's own does not.
fn is_listed(path: &[u8]) -> bool {
    !path.starts_with(b"pg_wal/") && path != b"backup_manifest" && path != b".pgcairn/status"
}

/// Writes the text for the files of `view`.
pub fn write(view: &View, out: &mut impl Write) -> io::Result<()> {
    let of = &view.description;
    let major = Major::new(of.database.version).map_err(io::Error::other)?;
    let mut out = Hashed { out, sha: Sha256::new() };
    out.put(&header(major, of.database.system_id))?;
    let mut first = true;
    view.walk(&mut |path, number| -> io::Result<()> {
        let node = view.node(number).map_err(io::Error::other)?;
        let path = crate::read::completion::stored_path(path);
        let crc = view.crc(number).map_err(io::Error::other)?;
        let Some(crc32c) = crc.filter(|_| is_listed(&path)) else { return Ok(()) };
        let file = ManifestFile {
            path: &path,
            size: view.size(number).map_err(io::Error::other)?,
            modified_s: node.mtime,
            crc32c,
        };
        out.put(&file.line(std::mem::take(&mut first)))
    })?;
    let lsn = |text: &str| text.parse::<Lsn>().map_err(io::Error::other);
    let range = WalRange { timeline: Timeline(of.timeline), start: lsn(&of.start_lsn)?, end: lsn(&of.stop_lsn)? };
    out.put(&wal_ranges(&[range]))?;
    let Hashed { out, sha } = out;
    out.write_all(closing(&sha.finalize().into()).as_bytes())
}

struct Hashed<'a, W> {
    out: &'a mut W,
    sha: Sha256,
}

impl<W: Write> Hashed<'_, W> {
    fn put(&mut self, text: &str) -> io::Result<()> {
        self.sha.update(text.as_bytes());
        self.out.write_all(text.as_bytes())
    }
}
