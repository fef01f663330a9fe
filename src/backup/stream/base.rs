//! `BASE_BACKUP`: the command, and the archives in which the server answers (`protocol.sgml`, "Streaming Replication Protocol").
//!
//! Every tablespace is an archive, the data directory is the last. Up to 14 each is a copy of its own; from 15 on all are in one
//! copy whose messages begin with a letter that says what they are.

use std::collections::VecDeque;
use std::time::Duration;

use bytes::{Buf, Bytes};
use postgres_protocol::message::backend::Message;

use super::wire::{Refusal, Row, Wire, out_of_turn};
use crate::error::{Context, Error, Result};
use crate::format::manifest::Tablespace;
use crate::postgres::tar::{TAR_BLOCK, TarEntry};
use crate::postgres::{Lsn, Major, Timeline};

/// How long the server may send nothing while it sends a backup.
const SILENCE_MAX: Duration = Duration::from_secs(600);
/// From this major on all archives are in one copy.
const ONE_COPY: u32 = 15;
/// SQLSTATE of what the server says at the very end when it has seen pages that fail their checksum.
const DATA_CORRUPTED: &str = "XX001";

/// What is asked for.
pub(super) struct Command<'a> {
    /// for `backup_label`; without quotes
    pub(super) label: &'a str,
    /// begin with an immediate checkpoint
    pub(super) fast: bool,
    /// send the WAL from start to stop too
    pub(super) wal: bool,
}

/// A base backup on its way.
#[derive(Debug)]
pub(super) struct BaseBackup {
    wire: Wire,
    major: Major,
    /// archives that have not begun, where each is a copy
    ahead: VecDeque<Option<u32>>,
    /// the archive that begins next, where messages name it
    named: Option<Option<u32>>,
    /// what arrived and was not read
    arrived: Bytes,
    is_copying: bool,
}

/// What the server says before the first archive.
#[derive(Debug)]
pub(super) struct Begin {
    pub(super) start: Lsn,
    pub(super) timeline: Timeline,
    /// by oid
    pub(super) tablespaces: Vec<Tablespace>,
    /// an estimate
    pub(super) bytes: u64,
}

impl Command<'_> {
    /// The server is asked to check pages, since it can read a page again whose checksum fails. It is not asked to wait for
    /// the archive: we look there ourselves.
    fn text(&self, major: Major) -> String {
        let Self { label, fast, wal } = self;
        if major.number() < ONE_COPY {
            let word = |is_wanted: &bool, word: &'static str| if *is_wanted { word } else { "" };
            let (fast, wal) = (word(fast, " FAST"), word(wal, " WAL"));
            return format!("BASE_BACKUP LABEL '{label}' PROGRESS{fast}{wal} NOWAIT TABLESPACE_MAP");
        }
        let checkpoint = if *fast { "fast" } else { "spread" };
        format!(
            "BASE_BACKUP (LABEL '{label}', PROGRESS, CHECKPOINT '{checkpoint}', WAL {wal}, WAIT false, TABLESPACE_MAP, MANIFEST 'no')"
        )
    }
}

impl BaseBackup {
    /// Begins; waits for the checkpoint.
    pub(super) fn begin(mut wire: Wire, major: Major, command: &Command<'_>) -> Result<(Self, Begin)> {
        wire.query(&command.text(major))?;
        let (start, timeline) = position(&wire.rows()?)?;
        wire.set_timeout(SILENCE_MAX)?;
        let rows = wire.rows()?;
        let (mut ahead, mut tablespaces, mut kilobytes) = (VecDeque::new(), Vec::new(), 0);
        for row in rows {
            let oid = number::<u32>(&row, 0)?;
            ahead.push_back(oid);
            kilobytes += number::<u64>(&row, 2)?.unwrap_or_default();
            let path = row.get(1).cloned().flatten();
            tablespaces.extend(oid.zip(path).map(|(oid, path)| Tablespace { oid, name: None, path }));
        }
        tablespaces.sort_by_key(|tablespace| tablespace.oid);
        let (named, arrived) = (None, Bytes::new());
        let backup = Self { wire, major, ahead, named, arrived, is_copying: false };
        Ok((backup, Begin { start, timeline, tablespaces, bytes: kilobytes * 1024 }))
    }

    /// Goes to the next archive: the oid of the tablespace that it is of, or `None` for the data directory. The one before must
    /// have been read to its end.
    pub(super) fn archive(&mut self) -> Result<Option<Option<u32>>> {
        if self.major.number() < ONE_COPY {
            let Some(next) = self.ahead.pop_front() else { return Ok(None) };
            self.copy()?;
            return Ok(Some(next));
        }
        if !std::mem::take(&mut self.ahead).is_empty() {
            self.copy()?;
            self.receive()?;
        }
        Ok(self.named.take())
    }

    fn copy(&mut self) -> Result<()> {
        match self.wire.next()? {
            Message::CopyOutResponse(_) => {
                self.is_copying = true;
                Ok(())
            }
            _ => Err(out_of_turn("an archive")),
        }
    }

    /// The next header of this archive; `None` at its end. What it is the header of must have been read.
    pub(super) fn entry(&mut self) -> Result<Option<TarEntry>> {
        let mut block = [0; TAR_BLOCK];
        if self.arrived.is_empty() {
            self.receive()?;
        }
        if self.arrived.is_empty() {
            return Ok(None);
        }
        self.read(&mut block)?;
        match TarEntry::parse(&block).context(|| "the server sends what is no archive".into())? {
            Some(entry) => Ok(Some(entry)),
            None => {
                while !self.arrived.is_empty() {
                    self.arrived.clear();
                    self.receive()?;
                }
                Ok(None)
            }
        }
    }

    /// Fills `buf` with what follows.
    pub(super) fn read(&mut self, buf: &mut [u8]) -> Result<()> {
        let mut done = 0;
        while done < buf.len() {
            let count = self.some(buf.len() - done)?;
            self.arrived.copy_to_slice(&mut buf[done..done + count]);
            done += count;
        }
        Ok(())
    }

    /// Passes over what follows.
    pub(super) fn skip(&mut self, mut len: u64) -> Result<()> {
        while len > 0 {
            let count = self.some(usize::try_from(len).unwrap_or(usize::MAX))?;
            self.arrived.advance(count);
            len -= count as u64;
        }
        Ok(())
    }

    /// How much has arrived, of `wanted` and at least one.
    fn some(&mut self, wanted: usize) -> Result<usize> {
        if self.arrived.is_empty() {
            self.receive()?;
        }
        match self.arrived.len().min(wanted) {
            0 => Err(out_of_turn("the rest of a file")),
            count => Ok(count),
        }
    }

    /// Waits for the next bytes of this archive; there are none at its end.
    fn receive(&mut self) -> Result<()> {
        while self.arrived.is_empty() && self.is_copying && self.named.is_none() {
            match self.wire.next()? {
                Message::CopyData(body) if self.major.number() < ONE_COPY => self.arrived = body.into_bytes(),
                Message::CopyData(body) => self.lettered(body.into_bytes())?,
                Message::CopyDone => self.is_copying = false,
                _ => return Err(out_of_turn("an archive's bytes")),
            }
        }
        Ok(())
    }

    fn lettered(&mut self, mut message: Bytes) -> Result<()> {
        match message.try_get_u8() {
            Ok(b'd') => self.arrived = message,
            Ok(b'p') => {}
            Ok(b'n') => {
                let name = message.split(|byte| *byte == 0).next().unwrap_or_default();
                let name = String::from_utf8_lossy(name);
                let oid = || name.strip_suffix(".tar")?.parse().ok();
                self.named = Some(match (&*name, oid()) {
                    ("base.tar", _) => None,
                    (_, Some(oid)) => Some(oid),
                    _ => return Err(Error::new(format!("the server sends an unknown archive {name}"))),
                });
            }
            _ => return Err(out_of_turn("an archive's bytes")),
        }
        Ok(())
    }

    /// Reads the end of the backup, after the last archive: where it is consistent.
    pub(super) fn finish(mut self) -> Result<(Lsn, Timeline)> {
        let stop = position(&self.wire.rows()?)?;
        match self.wire.ready() {
            // all has arrived, and each page was checked here as well: which of them fail is known, and told
            Err(error) if error.find::<Refusal>().is_some_and(|refusal| refusal.code == DATA_CORRUPTED) => {
                tracing::warn!(%error, "the server has seen pages that fail their checksum");
                Ok(stop)
            }
            ended => ended.map(|()| stop),
        }
    }
}

fn position(rows: &[Row]) -> Result<(Lsn, Timeline)> {
    let row = rows.first().map(Vec::as_slice).unwrap_or_default();
    match (number(row, 0)?, number(row, 1)?) {
        (Some(lsn), Some(timeline)) => Ok((lsn, Timeline(timeline))),
        _ => Err(out_of_turn("a WAL position")),
    }
}

/// A column that may be null.
fn number<T: std::str::FromStr<Err: std::error::Error + Send + Sync + 'static>>(
    row: &[Option<String>],
    column: usize,
) -> Result<Option<T>> {
    let Some(text) = row.get(column).and_then(Option::as_ref) else { return Ok(None) };
    text.parse().map(Some).context(|| format!("the server answers \"{text}\" where a number belongs"))
}
